"""
Restore what was not measured
=============================

Only a part of an image was measured: some pixels, means over blocks, a blurred version.
:func:`fixpoint_diffusion.restoration.restore` draws images that agree with the measurement and are
filled in by the model, with all steps of the sampler solved at once.
"""

import matplotlib.pyplot as plt
import torch

from fixpoint_diffusion import NoiseSchedule, embedded, initial_noise
from fixpoint_diffusion.restoration import BlockMean, Blur, Mask, RestorationChain, restore
from fixpoint_diffusion.training.data import load_digits, split_held_out

# %%
# Four kinds of measurement
# -------------------------
# A hole, means of 2 x 2 and of 4 x 4 pixels, a blur. Each says what it makes of an image
# (``apply``) and gives the image of least norm back (``pinv``).

known = torch.ones(8, 8, dtype=torch.bool)
known[2:6, 3:7] = False
line = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * 1.2**2))
measurements = {
    "hole": Mask(known),
    "means of 2 x 2": BlockMean(2),
    "means of 4 x 4": BlockMean(4),
    "blur": Blur(torch.outer(line, line) / line.sum() ** 2),
}

# %%
# Restore
# -------
# Eight digits that the model was not trained on, in 25 steps. The PSNR is in dB, for values from -1
# to 1.


def psnr(found: torch.Tensor) -> float:
    return float((10 * torch.log10(4 / (found - images).square().flatten(1).mean(dim=1))).mean())


images = split_held_out(load_digits())[1].images[:8]
denoiser = embedded("ddpm-digits")
schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
x_T = initial_noise(seed=0, samples=range(8), shape=(1, 8, 8))
rows, titles = [images], ["image"]
for name, measurement in measurements.items():
    y = measurement.apply(images)
    chain = RestorationChain(denoiser, x_T, schedule, measurement, y, steps=25)
    with torch.no_grad():
        result = restore(chain)
        off = (result.images - chain.sequential()[:, -1]).abs().max()
    before, after = psnr(measurement.pinv(y)), psnr(result.images)
    distance = f"{float(off):.0e} off the usual sampler"
    print(f"{name:15} {result.rounds:2} rounds, PSNR {before:5.2f} -> {after:5.2f}, {distance}")
    rows += [measurement.pinv(y), result.images]
    titles += [f"{name}: measured", "restored"]

# %%
figure, grid = plt.subplots(len(rows), 8, figsize=(6.4, 0.6 * len(rows)))
for images_of_row, title, axes in zip(rows, titles, grid, strict=True):
    for image, ax in zip(images_of_row, axes, strict=True):
        ax.imshow(image[0], vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
    axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
plt.show()

# %%
# Does it fit the measurement?
# ----------------------------
# Up to the tolerance of the solve: the largest difference between what was measured and what the
# last restored images would give.

print(f"{float((measurement.apply(result.images) - y).abs().max()):.0e}")

# %%
# The step that keeps to the measurement, gradients through the restoration, and other degradations:
# :doc:`/restoration`.
