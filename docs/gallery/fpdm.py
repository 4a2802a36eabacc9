"""
A fixed point diffusion model, from training to adaptive sampling
=================================================================

A fixed point diffusion model (FPDM) has one transformer block that is applied until its output no
longer changes. How often is chosen anew at every step of the sampler, after training.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fixpoint_diffusion import NoiseSchedule, embedded, initial_noise, load_denoiser, sample_fpdm
from fixpoint_diffusion.sampling import adaptive_tolerance
from fixpoint_diffusion.training import TrainingRun

# %%
# Train one
# ---------
# A very small model, for a few seconds, on the bundled digits. From the command line this is
# ``fixpoint-diffusion train fpdm --data digits --classes``; ``--data`` takes a folder of images
# too.

folder = Path(tempfile.mkdtemp()) / "tiny-fpdm"
settings = {"width": 16, "heads": 2, "max_no_grad": 4, "max_grad": 2}
run = TrainingRun.start(folder, kind="fpdm", classes=True, settings=settings, training={"steps": 60, "batch_size": 32})
log = run.run(progress=False)
tiny = load_denoiser(folder)
print(f"{sum(p.numel() for p in tiny.model.parameters())} parameters, trained for {log.seconds:.0f} seconds")

# %%
# The embedded model
# ------------------
# Such a short training is not enough for good digits, so the rest of this page takes the model that
# ships with the package. Ten digits, four iterations of the layer in each of 20 steps:

denoiser = embedded("fpdm-digits")
model, schedule = denoiser.model, NoiseSchedule.from_diffusers(denoiser.schedule_config)
x_T = initial_noise(seed=1, samples=range(10), shape=denoiser.sample_shape)
digits = torch.arange(10)
steps = 20
usual = sample_fpdm(model, x_T, schedule, steps=steps, iterations=4, y=digits, record=True)
print(f"{usual.block_passes:.0f} block passes an image")

# %%
# Adaptive iterations
# -------------------
# In place of a number: iterate until an iteration hardly changes the state. ``adaptive_tolerance``
# finds the threshold that spends a given number of iterations on average, here two a step.

probe = initial_noise(seed=2, samples=range(16), shape=denoiser.sample_shape)
tolerance = adaptive_tolerance(model, probe, schedule, budget=2 * steps, steps=steps)
adaptive = sample_fpdm(model, x_T, schedule, steps=steps, iterations=tolerance, y=digits, record=True)
print(f"{adaptive.iterations.double().mean():.2f} iterations a step, from {int(adaptive.iterations.min())} to "
      f"{int(adaptive.iterations.max())}")  # fmt: skip

figure, (left, right) = plt.subplots(1, 2)
left.plot(range(1, steps + 1), adaptive.iterations.double().mean(dim=1), marker=".")
left.axhline(2, color="gray", linestyle=":")
left.set(title="iterations, mean of the images", xlabel="step", ylim=(0, None))
right.plot(range(1, steps + 1), usual.deltas.mean(dim=1), label="four a step")
right.plot(range(1, steps + 1), adaptive.deltas.mean(dim=1), label="adaptive")
right.set(title="change by the last iteration", xlabel="step", yscale="log")
right.legend()
plt.show()

# %%
# The digits: one iteration a step, four, and as many as needed.

one = sample_fpdm(model, x_T, schedule, steps=steps, iterations=1, y=digits)
figure, grid = plt.subplots(3, 10, figsize=(6.8, 2.0))
for title, images, axes in zip(("one", "four", "adaptive"), (one, usual, adaptive), grid, strict=True):
    for image, ax in zip(images.images, axes, strict=True):
        ax.imshow(image[0], vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
    axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
plt.show()

# %%
# The model, its training, what was measured, and how a larger one is trained: :doc:`/fpdm`.
