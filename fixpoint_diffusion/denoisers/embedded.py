"""The small models that are part of this package, trained by it on 8x8 digits."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from fixpoint_diffusion.denoisers.checksums import verify_checksums
from fixpoint_diffusion.denoisers.loading import load_denoiser
from fixpoint_diffusion.denoisers.protocol import NetworkDenoiser
from fixpoint_diffusion.options.models import EMBEDDED_MODELS


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model, its files checked against their checksums.

    Args:
        name: ``"ddpm-digits"`` (a ``UNet2DModel`` that predicts the noise), ``"fpdm-digits"`` (an FPDM that predicts v
            and is told the digit as a class), ``"dit-digits"`` (a DiT that does the same, after as long a training) or
            ``"flow-digits"`` (a ``UNet2DModel`` that predicts ``noise - x_0`` along a flow).

    Raises:
        ValueError: if there is no such model, or a file is not as it was shipped.
        FileNotFoundError: if this installation lacks the folder.

    Example:
        >>> from fixpoint_diffusion.denoisers import embedded_folder
        >>> (embedded_folder("fpdm-digits") / "config.json").is_file()
        True
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(EMBEDDED_MODELS)}")
    folder = Path(str(files("fixpoint_diffusion"))) / "assets" / name
    if not folder.is_dir():
        raise FileNotFoundError(f"this installation lacks the embedded model {name}: no folder {folder}; reinstall it")
    verify_checksums(folder)
    return folder


def embedded(
    name: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> NetworkDenoiser:
    """Load an embedded model; nothing is downloaded.

    Args:
        name: see ``embedded_folder``.
        dtype: of the weights, which are shipped in half precision; None: float32.
        device: where to put them; None: the CPU.

    Returns:
        What ``load_denoiser`` returns for the model's folder: a denoiser of images ``(1, 8, 8)`` in [-1, 1].

    Raises:
        As ``embedded_folder``; ImportError if diffusers is not installed.

    >>> denoiser = embedded("ddpm-digits")
    >>> denoiser(torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])).shape, denoiser.prediction_type
    (torch.Size([3, 1, 8, 8]), 'epsilon')
    """
    return load_denoiser(embedded_folder(name), dtype=dtype, device=device)
