"""A tiny autoencoder and a tiny DINOv2, so that latents and evaluation can be tried without a download.

Run it as ``python docs/examples/tiny_models.py PHOTOGRAPHS FOLDER``. It writes ``FOLDER/vae``, an ``AutoencoderKL`` of
diffusers that is trained for a short while on the pictures in ``PHOTOGRAPHS``, and ``FOLDER/dinov2``, a DINOv2 of
transformers with random weights. They stand in for real ones, whose folders have the same form.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model

from fixpoint_diffusion.training.data import EpochSampler, open_dataset


def write_autoencoder(pictures: Path, folder: Path, *, steps: int) -> float:
    """Train an autoencoder with four times fewer pixels and 4 channels; returns the last mean square error.

    The scaling factor is set to one over the latents' standard deviation, so that a diffusion model sees unit variance.
    """
    dataset = open_dataset(pictures)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        sample_size=dataset.sample_shape[-1],
        mid_block_add_attention=False,
    )
    optimiser = torch.optim.Adam(vae.parameters(), 2e-3)
    loader = iter(DataLoader(dataset, batch_size=16, sampler=EpochSampler(len(dataset), seed=0)))
    for _ in range(steps):
        images = next(loader)["images"]
        normal = vae.encode(images).latent_dist
        loss = (vae.decode(normal.sample()).sample - images).square().mean() + 1e-4 * normal.kl().mean() / 64
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / float(vae.encode(next(loader)["images"]).latent_dist.mean.std()))
    vae.save_pretrained(folder)
    return loss.item()


def write_dinov2(folder: Path) -> None:
    """Write a DINOv2 with random weights and 32 features; it takes pictures of 224 pixels, as the real ones do."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of the autoencoder's training")
    given = parser.parse_args()
    torch.manual_seed(0)
    error = write_autoencoder(given.photographs, given.folder / "vae", steps=given.steps)
    write_dinov2(given.folder / "dinov2")
    print(f"vae (mean square error {error:.3f}) and dinov2 (random weights) in {given.folder}")
