"""Models of the diffusers library as denoisers, and loading any denoiser from a local folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.models import FPDMDenoiser
from fixpoint_diffusion.processes import GaussianPrior

WEIGHTS = "diffusion_pytorch_model"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Where a pipeline folder may keep its denoiser.
MODEL_FOLDERS = ("unet", "transformer")
NEEDS_DIFFUSERS = "loading this model needs the diffusers library: pip install 'fixpoint[diffusion]'"


class DiffusersDenoiser:
    """A diffusers model (``UNet2DModel``, ``DiTTransformer2DModel``, ...) called as ``denoiser(x, t)``.

    The output is the model's own, in its own prediction type; channels beyond the image's (a learned variance) are cut.
    An input of another dtype than the weights' is cast to it, and the output back.

    Args:
        model: any module called as ``model(x, t, **inputs)`` that returns a tensor or an object with ``.sample``.
        prediction_type: what the output means, in diffusers' words: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        schedule_config: the configuration of the noise schedule it was trained on, as a diffusers scheduler writes it.
        inputs: further inputs by name (``class_labels``, ``encoder_hidden_states``), each with one row ``(1, ...)``
            that is repeated for every row of x; what is no tensor is passed on as it is.
        prior: what is known of the images, from which chains predict how latents move; None: a plain guess.

    Attributes:
        sample_shape: shape of one image ``(C, H, W)``, from the model's config; None where that does not say.

    Raises:
        ValueError: for an unknown prediction type, or an input without a leading dimension of 1.

    >>> class Half(nn.Module):
    ...     def forward(self, x, t):
    ...         return x / 2
    >>> DiffusersDenoiser(Half())(torch.ones(2, 1, 1, 1), torch.tensor([3, 4])).flatten()
    tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prediction_type: str = "epsilon",
        schedule_config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        prior: GaussianPrior | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")
        self.model = model
        self.prediction_type = prediction_type
        self.schedule_config = None if schedule_config is None else dict(schedule_config)
        self.inputs = dict(inputs or {})
        self.prior = prior
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.shape[:1] != (1,):
                raise ValueError(f"input {name!r} must have one row (1, ...), got shape {tuple(value.shape)}")
        self.sample_shape = _sample_shape(getattr(model, "config", None))

    def __call__(self, x: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        """Predict for images ``(N, C, H, W)`` at timesteps ``(N,)``; returns ``(N, C, H, W)`` in x's dtype.

        Further inputs have one row for each row of x; a chain passes its conditioning so.
        """
        # Not the first parameter's: that may be packed, or stored in another dtype than it is computed in.
        dtype = getattr(self.model, "dtype", next(self.model.parameters(), x).dtype)
        repeated = {
            name: value.expand(len(x), *value.shape[1:]) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        output = self.model(x.to(dtype), t, **repeated, **inputs)
        output = output if isinstance(output, Tensor) else output.sample
        return output[:, : x.shape[1]].to(x.dtype)

    def __repr__(self) -> str:
        name, kind = type(self.model).__name__, self.prediction_type
        return f"DiffusersDenoiser({name}, prediction_type={kind!r}, sample_shape={self.sample_shape})"


def load_denoiser(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
) -> DiffusersDenoiser | FPDMDenoiser:
    """Load a denoiser from a local folder; the network is never used.

    Three layouts are understood: a model folder (``config.json`` and ``diffusion_pytorch_model.safetensors``), the same
    with ``scheduler_config.json`` beside them (as in ``google/ddpm-cifar10-32``, and as ``fixpoint-diffusion train``
    writes), and a pipeline folder with ``unet/`` or ``transformer/`` and ``scheduler/`` in it. The model's class is the
    ``_class_name`` of its config: any model of diffusers, or this package's ``FPDM``. A ``prior.safetensors`` beside
    the weights (``GaussianPrior.of(images).save(folder)``) makes parallel sampling need fewer rounds.

    The model comes in evaluation mode and with frozen parameters; gradients with respect to x still flow.

    Args:
        folder: a folder on this machine. Not the name of a repository: fetch that first.
        dtype: of the weights; None: float32, whatever they are stored in.
        device: where to put them; None: the CPU.
        allow_pickle: also read ``diffusion_pytorch_model.bin``, through ``torch.load(weights_only=True)``. Pickles are
            refused otherwise.

    Returns:
        A ``DiffusersDenoiser``, or for a config of class FPDM an ``FPDMDenoiser``; both with ``prediction_type``,
        ``schedule_config`` and ``sample_shape``.

    Raises:
        FileNotFoundError: if the folder or a part of it is missing; the message lists what was found.
        ValueError: if the config is unusable, the weights do not fit it, or only a pickle is there.
        ImportError: if the class needs diffusers and that is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} (models are loaded from local folders, never downloaded)")
    model_folder = _find_model_folder(folder)
    config = _read_json(model_folder / "config.json")
    if config.get("_class_name") == "FPDM":
        denoiser = FPDMDenoiser.from_folder(model_folder)
        denoiser.model.to(device=device or "cpu", dtype=dtype or torch.float32).eval().requires_grad_(False)
        return denoiser
    model = _load_diffusers_model(model_folder, config, dtype or torch.float32, allow_pickle)
    model.to(device or "cpu").eval().requires_grad_(False)
    schedule = read_schedule_config(folder)
    prediction_type = (schedule or {}).get("prediction_type", "epsilon")
    prior = GaussianPrior.load(model_folder)
    return DiffusersDenoiser(model, prediction_type=prediction_type, schedule_config=schedule, prior=prior)


def read_schedule_config(folder: Path) -> dict[str, Any] | None:
    """The scheduler configuration in a model or pipeline folder, None where there is none."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return _read_json(path)
    return None


def _find_model_folder(folder: Path) -> Path:
    for candidate in (folder, *(folder / name for name in MODEL_FOLDERS)):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} is not a model folder: expected config.json in it or in {' or '.join(MODEL_FOLDERS)}/, "
        f"found {_listing(folder)}"
    )


def _load_diffusers_model(folder: Path, config: dict[str, Any], dtype: torch.dtype, allow_pickle: bool) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(NEEDS_DIFFUSERS) from error

    name = config.get("_class_name")
    cls: Any = getattr(diffusers, str(name), None)
    is_model = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
    if not is_model:
        raise ValueError(
            f"{folder / 'config.json'}: _class_name is {name!r}; expected 'FPDM' or a model class of "
            f"diffusers {diffusers.__version__}, such as 'UNet2DModel'"
        )
    variant, use_safetensors = _choose_weights(folder, allow_pickle)
    # Building the model draws initial weights that the stored ones replace: keep that out of the caller's random state.
    with torch.random.fork_rng(devices=[]):
        try:
            model, report = cls.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                variant=variant,
                use_safetensors=use_safetensors,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} does not load as the {name} that its config.json names: {error}") from error
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        # diffusers only warns, and leaves random numbers in what is missing.
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    return model


def _choose_weights(folder: Path, allow_pickle: bool) -> tuple[str | None, bool]:
    """``(variant, use_safetensors)`` for diffusers: full precision before half, safetensors before pickles."""
    for suffix, use_safetensors in ((".safetensors", True), (".bin", False)):
        for variant in (None, "fp16"):
            stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
            index = f"{WEIGHTS}{suffix}.index{'' if variant is None else '.' + variant}.json"
            if not ((folder / f"{stem}{suffix}").is_file() or (folder / index).is_file()):
                continue
            if not use_safetensors and not allow_pickle:
                raise ValueError(
                    f"{folder} holds its weights as a pickle ({stem}{suffix}), which may run code when opened: convert "
                    f"it to {WEIGHTS}.safetensors, or pass allow_pickle=True if you trust where it comes from"
                )
            return variant, use_safetensors
    raise FileNotFoundError(f"no weights in {folder}: expected {WEIGHTS}.safetensors, found {_listing(folder)}")


def _sample_shape(config: Any) -> tuple[int, ...] | None:
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        return None
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _listing(folder: Path) -> str:
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"
