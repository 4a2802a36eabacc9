"""A diffusers autoencoder from a local folder, as the last step of sampling: latents to images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLASS_NAME = "AutoencoderKL"


class LatentDecoder:
    """Decodes latents by a diffusers ``AutoencoderKL``, one image at a time, so that memory does not grow with a batch.

    Latents are in the scale in which diffusion models see them: the autoencoder's own times its ``scaling_factor``,
    after its ``shift_factor`` was subtracted.

    Args:
        vae: an ``AutoencoderKL``, in evaluation mode.

    >>> from diffusers import AutoencoderKL
    >>> vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
    ...     down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()
    >>> decoder = LatentDecoder(vae)
    >>> decoder(torch.randn(3, 2, 4, 4)).shape, decoder.image_shape((2, 4, 4))
    (torch.Size([3, 3, 8, 8]), (3, 8, 8))
    """

    def __init__(self, vae: Any) -> None:
        if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
            raise ValueError("this autoencoder has latents_mean or latents_std, which are not supported here")
        self.vae = vae
        vae.enable_slicing()

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> LatentDecoder:
        """Load from a folder with ``config.json`` and safetensors, or a pipeline folder with that in ``vae/``.

        Raises:
            FileNotFoundError: if there is no such folder, or no ``config.json``.
            ValueError: if what is there is no autoencoder that loads.
        """
        from diffusers import AutoencoderKL

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no autoencoder folder {str(folder)!r} (nothing is downloaded)")
        if not (folder / "config.json").is_file():
            if not (folder / "vae" / "config.json").is_file():
                raise FileNotFoundError(f"{folder} holds no autoencoder: expected config.json in it or in vae/")
            folder = folder / "vae"
        _check_class(folder / "config.json")
        with torch.random.fork_rng(devices=[]):
            try:
                vae, report = AutoencoderKL.from_pretrained(
                    str(folder),
                    torch_dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    low_cpu_mem_usage=False,
                    output_loading_info=True,
                )
            except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{folder} does not load as an AutoencoderKL: {error}") from error
        if report["missing_keys"] or report["unexpected_keys"]:
            wrong = (report["missing_keys"] + report["unexpected_keys"])[:3]
            raise ValueError(f"the weights in {folder} do not fit its config.json: missing or unexpected {wrong}")
        return cls(vae.to(device).eval().requires_grad_(False))

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape ``(C, H, W)`` of an image from a latent ``(c, h, w)``.

        Raises:
            ValueError: if the latent does not fit the autoencoder.
        """
        config = self.vae.config
        if len(latent_shape) != 3 or latent_shape[0] != config.latent_channels:
            raise ValueError(
                f"the model's samples are {'x'.join(map(str, latent_shape))}, but the autoencoder decodes "
                f"{config.latent_channels}xHxW"
            )
        factor = 2 ** (len(config.block_out_channels) - 1)
        return (config.out_channels, *(factor * side for side in latent_shape[1:]))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images ``(N, C, H, W)``, about in [-1, 1], from latents ``(N, c, h, w)``."""
        config = self.vae.config
        return self.vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample


def _check_class(config: Path) -> None:
    """Before diffusers reads another model's weights into an autoencoder, and warns of every one."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error
    name = values.get("_class_name") if isinstance(values, dict) else type(values).__name__
    if name != CLASS_NAME:
        raise ValueError(f"{config} describes a {name}, expected an {CLASS_NAME}")
