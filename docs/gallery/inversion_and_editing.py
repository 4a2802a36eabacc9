"""
Invert an image, then edit it
=============================

A deterministic sampler takes noise to an image. :func:`fixpoint_diffusion.invert` goes back: it
finds the noise from which the ordinary sampler arrives at a given image. Sample from that noise
under another class, and the image is edited.
"""

import matplotlib.pyplot as plt
import torch

from fixpoint_diffusion import DDIMChain, ExplicitInverse, NoiseSchedule, embedded, invert
from fixpoint_diffusion.denoisers import Guided
from fixpoint_diffusion.training.data import load_digits, split_held_out


def show(rows: torch.Tensor, titles: list[str]) -> None:
    _, grid = plt.subplots(*rows.shape[:2], figsize=(0.62 * rows.shape[1] + 1.2, 0.62 * len(rows)))
    for line, title, axes in zip(rows, titles, grid, strict=True):
        for image, ax in zip(line, axes, strict=True):
            ax.imshow(image[0], vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    plt.show()


# %%
# The noise behind four digits
# ----------------------------
# The digits are held out: no model here was trained on them. Clipping takes many latents to one, so
# the chain is built without.

held_out = split_held_out(load_digits())[1]
images = torch.stack([held_out.images[held_out.labels == label][1] for label in (1, 4, 7, 9)])

unet = embedded("ddpm-digits")
schedule = NoiseSchedule.from_diffusers(unet.schedule_config)
chain = DDIMChain(unet, torch.zeros_like(images), schedule, steps=50, clip_sample=float("inf"))
inverse = invert(chain, images)
plain = invert(chain, images, method=ExplicitInverse(), on_failure="ignore")
print(f"solved: {inverse.rounds} rounds, RMS error of the reconstructions up to {float(inverse.error.max()):.0e}")
print(f"plain DDIM inversion: {plain.rounds} rounds, up to {float(plain.error.max()):.0e}")

# %%
# The error is measured: the ordinary sampler was run from the noise that was found.

rows = torch.stack([images, inverse.x_T / 2, inverse.reconstruction, plain.reconstruction])
show(rows, ["image", "its noise", "sampled from it", "plain inversion"])

# %%
# The same digits as another class
# --------------------------------
# A model that can be told a class: an embedded transformer. Invert without a class (label 10 means
# none here), then sample under a class, with a little guidance.

dit = embedded("dit-digits")
schedule = NoiseSchedule.from_diffusers(dit.schedule_config)


def sampler(x_T: torch.Tensor, labels: torch.Tensor, guidance: float = 1.0) -> DDIMChain:
    denoiser = dit if guidance == 1 else Guided(dit, guidance)
    options = {"steps": 20, "clip_sample": float("inf"), "conditioning": {"class_labels": labels}}
    return DDIMChain(denoiser, x_T, schedule, **options)


inverse = invert(sampler(torch.zeros_like(images), torch.full((4,), 10)), images, rtol=1e-2)
print(f"{int(inverse.converged.sum())} of 4 inverted")

classes = torch.tensor([0, 3, 5, 8, 9])
with torch.no_grad():
    labels = classes.repeat_interleave(4)
    edited = sampler(inverse.x_T.repeat(5, 1, 1, 1), labels, guidance=1.5).sequential()[:, -1]
rows = torch.cat([images[None], edited.unflatten(0, (5, 4))])
show(rows, ["image", *(f"as {label}" for label in classes.tolist())])

# %%
# How inversion works, and where it cannot: :doc:`/inversion`. More edits, beside SDEdit, in
# figures: :doc:`/examples/editing`.
