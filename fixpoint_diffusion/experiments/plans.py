"""What the papers' own scale takes: their networks, operations a call, and GPU-hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig, cost
from fixpoint_diffusion.training.plan import GPU, GPU_FLOPS, UTILISATION

if TYPE_CHECKING:
    from fixpoint_diffusion.experiments.experiment import Experiment

# Side of the images, and channels at each resolution over 128 (Ho et al. 2020, Song et al. 2021).
_UNETS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "ddpm-cifar10-32": (32, (1, 2, 2, 2)),
    "ddpm-celeba-64": (64, (1, 2, 2, 2, 4)),
    "ddpm-bedroom-256": (256, (1, 1, 2, 2, 4, 4)),
    "ddpm-church-256": (256, (1, 1, 2, 2, 4, 4)),
}
# Where the data sets' own models and data come from; nothing is downloaded here.
SOURCES: Mapping[str, str] = {
    "ddpm-cifar10-32": "google/ddpm-cifar10-32 on the Hugging Face hub",
    "ddpm-celeba-64": "the weights of Song et al. (DDIM), converted to a UNet2DModel folder",
    "ddpm-bedroom-256": "google/ddpm-bedroom-256 on the Hugging Face hub",
    "ddpm-church-256": "google/ddpm-church-256 on the Hugging Face hub",
    "cifar10": "the training images as files; for distances, pytorch-gan-metrics' statistics as cifar10.npz will do",
    "celeba": "aligned images cut to 140x140 and scaled to 64x64 as in DDIM's code; for distances, their statistics",
    "lsun-bedroom": "training images at 256x256; for distances, pytorch-gan-metrics' statistics will do",
    "lsun-church": "training images at 256x256; for distances, pytorch-gan-metrics' statistics will do",
    "imagenet": "latents at 256x256 to train on, as fixpoint-diffusion encode makes them; statistics as imagenet.npz",
    "celeba-hq": "latents of the images at 256x256, as for imagenet",
    "ffhq": "latents of the images at 256x256, as for imagenet",
    "church": "latents of LSUN Church's images at 256x256, as for imagenet",
    "sd-vae": "an AutoencoderKL folder, such as stabilityai/sd-vae-ft-ema on the Hugging Face hub",
}


# Data whose models work on latents.
LATENTS = ("imagenet", "celeba-hq", "ffhq", "church")


@cache
def call_flops(model: str) -> float:
    """Operations of one call for one image, a multiplication and an addition as two; counted, not run.

    >>> f"{call_flops('ddpm-cifar10-32') / 1e9:.1f}"
    '12.4'
    """
    if model in EMBEDDED_MODELS:
        denoiser: Any = embedded(model)
        if isinstance(denoiser.model, FPDM):
            return cost(denoiser.model, iterations=4).flops
        network, shape = denoiser.model.to("meta"), denoiser.sample_shape
    else:
        network, shape = _unet(model)
    x, t = torch.zeros(1, *shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    counter = FlopCounterMode(display=False)
    # Of the kernels for attention, torch counts the operations of this one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(x, t)
    return float(counter.get_total_flops())


def _unet(model: str) -> tuple[Any, tuple[int, ...]]:
    with needed_for("counting the operations of a U-Net"):
        from diffusers import UNet2DModel

    side, multipliers = _UNETS[model]
    with torch.device("meta"):
        network = UNet2DModel(
            sample_size=side,
            in_channels=3,
            out_channels=3,
            block_out_channels=tuple(128 * each for each in multipliers),
            down_block_types=tuple(
                "AttnDownBlock2D" if side >> level == 16 else "DownBlock2D" for level in range(len(multipliers))
            ),
            up_block_types=tuple(
                "AttnUpBlock2D" if side >> level == 16 else "UpBlock2D" for level in reversed(range(len(multipliers)))
            ),
        )
    return network, (3, side, side)


@cache
def published(network: str, settings: tuple[tuple[str, Any], ...] = ()) -> DiT | FPDM:
    """The FPDM paper's XL/2 for ImageNet, ``"dit"`` or ``"fpdm"``, without weights; ``settings`` change it."""
    with torch.device("meta"):
        if network == "dit":
            return DiT(DiTConfig.preset("XL/2"))
        preset = vars(FPDMConfig.preset("XL/2"))
        return FPDM(FPDMConfig(**{**preset, **dict(settings)}))


@cache
def _parts(network: str, explicit: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    model = published(network, explicit)
    outside = cost(model, iterations=0).flops if isinstance(model, FPDM) else cost(model).flops
    return float(outside), float(cost(model, iterations=1).flops - outside)


def published_flops(network: str, settings: Mapping[str, Any], iterations: float = 0) -> float:
    """Operations of one call of :func:`published`, with so many iterations of an FPDM's layer."""
    explicit = {name: value for name, value in settings.items() if name not in FPDMConfig.TRAINING}
    outside, iteration = _parts(network, tuple(sorted(explicit.items())))
    return outside + iterations * iteration


def plan(experiment: Experiment) -> str:
    """What the experiment takes at the paper's scale, and what to type; nothing is run."""
    configs: Sequence[Mapping[str, Any]] = experiment.grid["paper"]
    flops = sum(experiment.kind.flops(config) for config in configs)
    hours = flops / (GPU_FLOPS * UTILISATION) / 3600
    models = sorted({config["model"] for config in configs if "model" in config})
    models += ["sd-vae"] * any(config.get("data") in LATENTS for config in configs)
    data = sorted({config["data"] for config in configs if "data" in config})
    lines = [
        f"{experiment.name}: {experiment.claim}",
        f"  runs       {len(configs)}",
        *(
            f"  model      {name}: {SOURCES.get(name, 'trained as below, or as in the plan of fpdm/table-1')}"
            for name in models
        ),
        *(f"  data       {name}: {SOURCES.get(name, 'comes with the package')}" for name in data),
        f"  GPU-hours  {hours:.3g}, from {flops:.3g} FLOPs on an {GPU} at {UTILISATION:.0%} of its "
        f"{GPU_FLOPS / 1e12:.0f} TFLOP/s",
        *(f"  type       {line}" for line in dict.fromkeys(filter(None, map(experiment.kind.before, configs)))),
        f"  type       {command(experiment.name, 'paper', bool(models), bool(data))}",
    ]
    return "\n".join(lines)


def command(name: str, scale: str, models: bool = False, data: bool = False) -> str:
    """What to type for an experiment."""
    given = " --models FOLDER" * models + " --data FOLDER --features FILE" * data
    device = " --device cuda" if scale == "paper" else ""
    return f"fixpoint-diffusion experiments run {name} --scale {scale}{given}{device}"
