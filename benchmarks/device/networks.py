"""The networks whose chains are timed: a U-Net of CIFAR10's size, a transformer of DiT-XL/2's, and trained ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.device.common import Part
from fixpoint_diffusion import NoiseSchedule
from fixpoint_diffusion.denoisers import DiffusersDenoiser
from fixpoint_diffusion.denoisers.protocol import NetworkDenoiser
from fixpoint_diffusion.denoisers.transformer import TransformerDenoiser
from fixpoint_diffusion.models import DiT, DiTConfig
from fixpoint_diffusion.training.data import load_digits

TRAINING_SECONDS = 60.0
M = TypeVar("M", bound=nn.Module)
_TINY = DiTConfig(sample_size=8, in_channels=4, width=32, heads=2, depth=2, num_classes=1000, learn_sigma=True)


def dit_config(tiny: bool, *, size: str = "XL/2") -> DiTConfig:
    """A DiT for images of 256 x 256, or a tiny one."""
    return _TINY if tiny else DiTConfig.preset(size)


def transformer(tiny: bool, *, size: str = "XL/2") -> DiT:
    """A DiT, random where a new one is zero (gates and head), so that it computes something."""

    def make() -> DiT:
        model = DiT(dit_config(tiny, size=size))
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    return _made(make)


def unet(tiny: bool) -> nn.Module:
    """The U-Net of Ho et al. for CIFAR10 (35.7 M), random weights; needs diffusers."""
    from diffusers import UNet2DModel

    if tiny:
        options: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
        options |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 4}
        options |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8}
    else:
        options = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2}
        options |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
        options |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
        options |= {"attention_head_dim": None}
    return _made(lambda: UNet2DModel(in_channels=3, out_channels=3, **options))


def _made(make: Callable[[], M]) -> M:
    """The same weights in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def as_denoiser(part: Part, network: nn.Module, dtype: torch.dtype, prior: Any = None) -> NetworkDenoiser:
    """On the part's device, in a precision of its own; latents keep theirs."""
    if isinstance(network, DiT):
        return TransformerDenoiser(network.to(part.device, dtype), prior=prior)
    config: Any = network.config
    shape = config.in_channels, config.sample_size, config.sample_size
    return DiffusersDenoiser(network.to(part.device, dtype), prior=prior, sample_shape=shape)


def trained(part: Part, network: nn.Module, seconds: float) -> tuple[nn.Module, dict[str, Any]]:
    """The network trained to denoise digits, enlarged to its size and three channels, for so long or one step.

    Random networks are no denoisers: how many rounds a chain needs depends on what was learnt.
    """
    sample = network.config
    images = load_digits().images.expand(-1, sample.in_channels, -1, -1)
    images = nn.functional.interpolate(images, size=(sample.sample_size,) * 2, mode="bilinear").to(part.device)
    alphas = NoiseSchedule.linear().alphas_cumprod.to(part.device, torch.float32)
    network = network.to(part.device, torch.float32).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    batch = 4 if part.rehearse else 128
    losses: list[Tensor] = []
    with torch.random.fork_rng(devices=[0] if part.device == "cuda" else []):
        torch.manual_seed(0)
        start = time.monotonic()
        while not losses or (not part.rehearse and time.monotonic() - start < seconds):
            x_0 = images[torch.randint(len(images), (batch,), device=part.device)]
            t = torch.randint(len(alphas), (batch,), device=part.device)
            noise = torch.randn_like(x_0)
            a = alphas[t][:, None, None, None]
            with torch.autocast(part.device, torch.bfloat16):
                out = network(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t)
            out = (out if isinstance(out, Tensor) else out.sample)[:, : x_0.shape[1]]
            loss = (out.float() - noise).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) % 20 == 0:
                part.wait()  # the host must not run ahead of its clock
    figures = {"steps": len(losses), "seconds": time.monotonic() - start, "batch": batch}
    figures |= {"first_loss": float(losses[0]), "last_loss": float(torch.stack(losses[-20:]).mean())}
    return network.eval().requires_grad_(False), figures
