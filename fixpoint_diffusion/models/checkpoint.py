"""FPDM on disk (safetensors and JSON), and FPDM as a denoiser for the chains and the samplers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixpoint_diffusion.models.fpdm import FPDM
from fixpoint_diffusion.models.fpdm_config import FPDMConfig
from fixpoint_diffusion.processes import GaussianPrior

CLASS_NAME = "FPDM"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SCHEDULER_FILE = "scheduler_config.json"


def save_fpdm(model: FPDM, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model's ``config.json`` and weights, in diffusers' folder layout.

    Args:
        model: The model.
        folder: Where to; made if absent.
        dtype: Precision of the stored weights, such as ``torch.float16``; None: the model's own.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": CLASS_NAME, **model.config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    return folder


def load_fpdm(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FPDM:
    """Read a model that :func:`save_fpdm` wrote.

    Args:
        folder: A folder on this machine.
        dtype: Of the weights; None: float32, whatever they are stored in.
        device: Where to put them; None: the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder, its configuration or its weights are absent.
        ValueError: If the configuration is of another class or has unknown keys, or the weights do not fit it.
    """
    folder = Path(folder)
    values = _read_json(folder / CONFIG_FILE)
    name = values.pop("_class_name", None)
    if name != CLASS_NAME:
        raise ValueError(f"{folder / CONFIG_FILE} describes a {name!r}, expected {CLASS_NAME!r}")
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    config = FPDMConfig.from_dict(values)
    # Building the model draws initial weights that the stored ones replace: keep that out of the caller's random state.
    with torch.random.fork_rng(devices=[]):
        model = FPDM(config)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no weights {WEIGHTS_FILE} in {folder}")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    _check_fit(weights, model, path)
    model.load_state_dict(weights)  # copies into the model's float32
    return model.to(device=device or "cpu", dtype=dtype or torch.float32).eval()


class FPDMDenoiser:
    """An FPDM as a denoiser: ``denoiser(x, t)`` returns the network's raw output for ``x`` ``(N, C, H, W)``.

    Every call starts the layer anew from the pre blocks' output, so that a row's result depends on that row alone;
    reuse between timesteps belongs to :func:`~fixpoint_diffusion.sampling.sample_fpdm`.

    Args:
        model: The model; what it learned of the variance is dropped.
        schedule_config: Configuration of the noise schedule it was trained with, as a diffusers scheduler's.
        depth: Iterations of the layer per call; None: solve to ``rtol``.
        rtol: Relative tolerance of the layer's solve, unused with ``depth``.
        max_evals: Bound on evaluations of that solve.
        prior: What is known of the images, from which chains predict how latents move; None: a plain guess.

    >>> denoiser = FPDMDenoiser(FPDM(FPDMConfig(width=16, heads=2)).eval(), depth=4)
    >>> denoiser(torch.randn(2, 1, 8, 8), torch.tensor([3, 999])).shape
    torch.Size([2, 1, 8, 8])
    >>> denoiser.prediction_type, denoiser.sample_shape
    ('v_prediction', (1, 8, 8))
    """

    def __init__(
        self,
        model: FPDM,
        *,
        schedule_config: Mapping[str, Any] | None = None,
        depth: int | None = None,
        rtol: float = 1e-3,
        max_evals: int = 50,
        prior: GaussianPrior | None = None,
    ) -> None:
        if depth is not None and depth < 1:
            raise ValueError(f"depth must be a positive number of iterations, or None, got {depth}")
        if not rtol > 0:
            raise ValueError(f"rtol must be positive, got {rtol}")
        self.model = model
        self.schedule_config = None if schedule_config is None else dict(schedule_config)
        self.depth = depth
        self.rtol = rtol
        self.max_evals = max_evals
        self.prior = prior

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        depth: int | None = None,
        rtol: float = 1e-3,
        max_evals: int = 50,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FPDMDenoiser:
        """Load from a folder with ``config.json``, weights and, where present, ``scheduler_config.json``.

        The parameters are frozen; gradients with respect to ``x`` still flow. Arguments as of the class and of
        :func:`load_fpdm`.

        Raises:
            FileNotFoundError: As :func:`load_fpdm`.
            ValueError: As :func:`load_fpdm`.
        """
        model = load_fpdm(folder, dtype=dtype, device=device).requires_grad_(False)
        scheduler = Path(folder) / SCHEDULER_FILE
        schedule_config = _read_json(scheduler) if scheduler.is_file() else None
        prior = GaussianPrior.load(folder)
        return cls(model, schedule_config=schedule_config, depth=depth, rtol=rtol, max_evals=max_evals, prior=prior)

    @property
    def prediction_type(self) -> str:
        """What the output means, by diffusers' names."""
        return self.model.config.prediction_type

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(C, H, W)``."""
        return self.model.config.sample_shape

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Raw output ``(N, C, H, W)``, in x's dtype, for ``x`` ``(N, C, H, W)`` at timesteps ``t`` ``(N,)``."""
        inputs = x.to(self.model.injection.weight.dtype)
        if self.depth is None:
            output = self.model(inputs, t, rtol=self.rtol, max_evals=self.max_evals)
        else:
            output = self.model(inputs, t, depth=self.depth)
        return output[:, : self.model.config.in_channels].to(x.dtype)

    def __repr__(self) -> str:
        iterations = f"rtol={self.rtol}" if self.depth is None else f"depth={self.depth}"
        return f"FPDMDenoiser({iterations}, prediction_type={self.prediction_type!r}, sample_shape={self.sample_shape})"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def _check_fit(weights: dict[str, Tensor], model: FPDM, path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"missing: {', '.join(sorted(missing))}"] if (missing := expected.keys() - found.keys()) else []
    problems += [f"unknown: {', '.join(sorted(unknown))}"] if (unknown := found.keys() - expected.keys()) else []
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError(f"weights in {path} do not fit {CONFIG_FILE}; {'; '.join(problems)}")
