"""A diffusers autoencoder from a local folder: images to latents before training, latents to images after sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.files import read_json


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """Between an autoencoder's latents z and those that diffusion models see, ``(z - shift) * factor``.

    Each is one number, or one a channel.
    """

    factor: tuple[float, ...]
    shift: tuple[float, ...]

    @classmethod
    def of(cls, config: Any) -> LatentScaling:
        """From ``scaling_factor`` and ``shift_factor``, or ``latents_mean`` and ``latents_std``, of a config.

        Raises:
            ValueError: if they are not finite numbers, or contradict each other.
        """
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if (mean is None) != (std is None) or (mean is not None and shift):
            raise ValueError(
                f"the autoencoder's config gives latents_mean={mean}, latents_std={std} and shift_factor={shift}; "
                f"expected mean and std together and then no shift, or neither of the two"
            )
        factor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float64)
        if std is not None:
            factor = factor / torch.tensor(std, dtype=torch.float64)
        offset = torch.as_tensor((shift or 0.0) if mean is None else mean, dtype=torch.float64)
        if not (factor.isfinite().all() and offset.isfinite().all() and factor.ne(0).all()):
            raise ValueError(
                f"the autoencoder's scaling factor is {scale} and its shift {shift}; expected finite numbers"
            )
        return cls(factor=tuple(factor.reshape(-1).tolist()), shift=tuple(offset.reshape(-1).tolist()))

    def scale(self, z: Tensor) -> Tensor:
        """The diffusion model's latents ``(N, c, h, w)`` from the autoencoder's."""
        return ((z - self._as_channels(self.shift, z)) * self._as_channels(self.factor, z)).to(z.dtype)

    def unscale(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents ``(N, c, h, w)`` from the diffusion model's."""
        factor, shift = (self._as_channels(values, latents) for values in (self.factor, self.shift))
        return (latents / factor + shift).to(latents.dtype)

    @staticmethod
    def _as_channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        # In half precision these numbers themselves would be rounded, and all latents be too large or too small.
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=like.device)[:, None, None]


def load_autoencoder(folder: str | Path, *, device: torch.device | str = "cpu") -> Any:
    """Load an ``AutoencoderKL`` in float32 from ``config.json`` and safetensors, or from ``vae/`` in a pipeline folder.

    Raises:
        FileNotFoundError: if there is no such folder, or no ``config.json``.
        ValueError: if what is there is no autoencoder that loads.
    """
    from diffusers import AutoencoderKL

    folder = autoencoder_folder(folder)
    path = folder / "config.json"
    name = read_json(path).get("_class_name")
    if name != "AutoencoderKL":
        raise ValueError(f"{path}: _class_name is {name!r}; expected 'AutoencoderKL'")
    # Building the model draws initial weights that the stored ones replace: keep that out of the caller's random state.
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
    return vae.to(device).eval().requires_grad_(False)


def autoencoder_folder(folder: str | Path) -> Path:
    """``folder``, or ``vae/`` in it, whichever has a ``config.json``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no autoencoder folder {str(folder)!r} (nothing is downloaded)")
    for candidate in (folder, folder / "vae"):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder} holds no autoencoder: expected config.json in it or in vae/")


def autoencoder_files(folder: str | Path) -> list[Path]:
    """What :func:`load_autoencoder` reads: the configuration and the weights."""
    folder = autoencoder_folder(folder)
    return [folder / "config.json", *folder.glob("*.safetensors")]


class LatentEncoder:
    """Encodes images by a diffusers ``AutoencoderKL`` into the latents that diffusion models see.

    Args:
        vae: an ``AutoencoderKL``, in evaluation mode.

    >>> from diffusers import AutoencoderKL
    >>> vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
    ...     down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()
    >>> encoder = LatentEncoder(vae)
    >>> encoder(torch.randn(3, 3, 8, 8)).shape, encoder.latent_shape((3, 8, 8))
    (torch.Size([3, 2, 4, 4]), (2, 4, 4))
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.scaling = LatentScaling.of(vae.config)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape ``(c, h, w)`` of a latent from an image ``(C, H, W)``.

        Raises:
            ValueError: if the autoencoder cannot encode such an image.
        """
        config = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        channels, *sides = image_shape
        if channels != config.in_channels or any(side % factor for side in sides):
            raise ValueError(
                f"images are {'x'.join(map(str, image_shape))}; the autoencoder takes {config.in_channels} channels "
                f"and sides that are multiples of {factor}: choose channels and size (--channels, --size)"
            )
        return (config.latent_channels, *(side // factor for side in sides))

    @torch.no_grad()
    def __call__(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Latents ``(N, c, h, w)`` of images ``(N, C, H, W)`` in [-1, 1].

        Args:
            images: on the autoencoder's device.
            noise: standard normal ``(N, c, h, w)`` that picks a sample of each latent; None: the mean.
        """
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return self.scaling.scale(z)


class LatentDecoder:
    """Decodes latents by a diffusers ``AutoencoderKL``, one image at a time, so that memory does not grow with a batch.

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
        self.vae = vae
        self.scaling = LatentScaling.of(vae.config)
        vae.enable_slicing()

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
        return self.vae.decode(self.scaling.unscale(latents)).sample
