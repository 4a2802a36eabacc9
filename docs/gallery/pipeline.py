"""
A diffusers pipeline in parallel
================================

A pipeline of diffusers becomes parallel by its class. It is called as before, and gives the images
of the original for the same ``generator``, up to the tolerance.
"""

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTTransformer2DModel

from fixpoint_diffusion import embedded
from fixpoint_diffusion.pipelines import ParallelDDIMPipeline, ParallelDiTPipeline

# %%
# DDIM
# ----
# From a folder it would be ``DDIMPipeline.from_pretrained(folder)``. Here the pipeline is made of
# the embedded model.

digits = embedded("ddpm-digits")
pipe = DDIMPipeline(digits.model, DDIMScheduler.from_config(digits.schedule_config))
parallel = ParallelDDIMPipeline.from_pipe(pipe)
for each in (pipe, parallel):
    each.set_progress_bar_config(disable=True)

call = {"batch_size": 4, "num_inference_steps": 100, "output_type": "pt"}
images = pipe(generator=torch.manual_seed(0), **call).images
output = parallel(generator=torch.manual_seed(0), rtol=1e-4, **call)
print(f"{output.rounds} batched calls of the network in place of 100")
print(f"largest difference of a pixel, from 0 to 1: {float((output.images - images).abs().max()):.0e}")

# %%
# The upper row is the original's, the lower one the parallel pipeline's.

figure, grid = plt.subplots(2, 4, figsize=(4, 2.1))
for axes, image in zip(grid.flat, torch.cat([images, output.images]), strict=True):
    axes.imshow(image[0], vmin=0, vmax=1)
    axes.axis("off")
plt.show()

# %%
# Classes, guidance and an autoencoder
# ------------------------------------
# A latent diffusion transformer with random weights, as small as it can be: it draws nothing, but
# everything about the call is as with a trained one. The class has the same loading, the same
# arguments, the same checks.

torch.manual_seed(0)
latent = ParallelDiTPipeline(
    transformer=DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval(),
    vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval(),
    scheduler=DDIMScheduler(clip_sample=False),
)  # fmt: skip
latent.set_progress_bar_config(disable=True)
output = latent([3, 7], guidance_scale=2.0, num_inference_steps=25, generator=torch.manual_seed(0), output_type="np")
print(output.images.shape, output.rounds)

# %%
# The noise behind an image
# -------------------------
# ``invert`` finds the latents from which a call with the same arguments draws an image. A scheduler
# that clips is refused, since clipping cannot be undone, so it is changed first.

parallel.scheduler = DDIMScheduler.from_config(parallel.scheduler.config, clip_sample=False)
call |= {"num_inference_steps": 25}
images = parallel(generator=torch.manual_seed(0), **call).images
inverse = parallel.invert(images, rtol=1e-3, num_inference_steps=25, output_type="pt")
again = parallel(latents=inverse.latents, **call).images
print(f"{int(inverse.inverse.converged.sum())} of 4 inverted, in {inverse.inverse.rounds} rounds")
print(f"largest difference of a pixel that is drawn again: {float((again - images).abs().max()):.0e}")

# %%
# Which pipelines and schedulers there are, callbacks, threads and offloading: :doc:`/pipelines`.
