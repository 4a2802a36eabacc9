"""
A thousand-step sample in a few rounds
======================================

A diffusion sampler goes from noise to an image one network call after another. All of its latents
together are one fixed point. :func:`fixpoint_diffusion.sample` solves for them in rounds: each
round is one batched call of the network.
"""

import time

import matplotlib.pyplot as plt
import torch

from fixpoint import CausalQuasiNewton, Progress
from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded, initial_noise, sample

# %%
# The model is a small U-Net for 8x8 digits, which ships with the package. One sample of a thousand
# steps, first as usual:

denoiser = embedded("ddpm-digits")
schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
x_T = initial_noise(seed=0, samples=range(1), shape=(1, 8, 8))
chain = DDIMChain(denoiser, x_T, schedule, steps=1000)

start = time.perf_counter()
exact = chain.sequential()
one_by_one = time.perf_counter() - start
print(f"one step after another: {chain.rounds} calls, {chain.evals} rows, {one_by_one:.1f} seconds")

# %%
# Now all steps at once. ``window=1000`` puts the whole chain into every round; the callback keeps
# the latents of each.

latents = []


def keep(progress: Progress) -> None:
    latents.append(progress.value[0].clone())


start = time.perf_counter()
result = sample(chain, solver=CausalQuasiNewton(window=1000), rtol=1e-3, callback=keep)
seconds = time.perf_counter() - start
error = (result.images - exact[:, -1]).norm() / exact[:, -1].norm()
print(f"all steps at once:      {result.rounds} calls, {result.evals} rows, {seconds:.1f} seconds")
print(f"{one_by_one / seconds:.1f} times as fast; the images differ by {float(error):.0e}, relative")

# %%
# What each round adds
# --------------------
# The error of the image after every round, and the image as it was then, beside the one that the
# ordinary sampler draws.

errors = [float((z[-1] - exact[0, -1]).norm() / exact[0, -1].norm()) for z in latents]
figure, axes = plt.subplots()
axes.plot(range(1, len(errors) + 1), errors, marker="o")
axes.axhline(1e-3, color="gray", linestyle=":", label="rtol")
axes.set(yscale="log", xlabel="round", ylabel="relative error of the image")
axes.legend()
plt.show()

# %%
shown = [*latents, exact[0]]
figure, row = plt.subplots(1, len(shown), figsize=(6.8, 1.0))
for number, (axes, z) in enumerate(zip(row, shown, strict=True), 1):
    axes.imshow(z[-1, 0], vmin=-1, vmax=1)
    axes.set_title(f"{number}" if number < len(shown) else "usual", fontsize=8)
    axes.axis("off")
plt.show()

# %%
# Where the errors are
# --------------------
# Each line of the picture is a round, each column a step of the chain. What is right grows from the
# left, where the noise is known.

size = exact[0].flatten(1).norm(dim=1)
off = torch.stack([(z - exact[0]).flatten(1).norm(dim=1) / size for z in latents])
figure, axes = plt.subplots(figsize=(6.8, 2.4))
edges = (0.5, 1000.5, len(off) + 0.5, 0.5)
image = axes.imshow(off.clamp(min=1e-8).log10(), aspect="auto", cmap="magma", extent=edges)
axes.set(xlabel="step of the chain", ylabel="round")
axes.grid(visible=False)
figure.colorbar(image, label="log10 of the error")
plt.show()
# sphinx_gallery_thumbnail_number = 3

# %%
# Fewer rows
# ----------
# Rows cost time and memory. ``window`` and ``max_rows`` set how many go into a round; without them
# a rule chooses, by the device and the size of the samples.

for window in (1000, 250, 60):
    result = sample(chain, solver=CausalQuasiNewton(window=window), rtol=1e-3)
    print(f"window={window:<5} {result.rounds:3} rounds, {result.evals} rows")

# %%
# Why so few rounds suffice: :doc:`/parallel-sampling`. Many samples on several devices:
# :doc:`/several-devices`.
