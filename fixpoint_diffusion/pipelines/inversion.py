"""The noise behind an image, for pipelines of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from fixpoint_diffusion.inversion import Inverse, InverseMethod, ParallelInverse, invert
from fixpoint_diffusion.inversion.problem import ClippedChainError, check_finite, rms
from fixpoint_diffusion.models.autoencoder import LatentEncoder
from fixpoint_diffusion.pipelines.parallel import Call, ParallelPipeline
from fixpoint_diffusion.pipelines.schedulers import ADVICE, check_scheduler

# What a sampling call takes and an inversion does not.
_NOT_TAKEN = ("latents", "return_dict", "callback_on_step_end", "callback_steps")


@dataclass(frozen=True, eq=False, kw_only=True)
class PipelineInverse:
    """What a pipeline's ``invert`` returns.

    Attributes:
        latents: x_T, ``(B, *shape)`` on the pipeline's device: ``pipe(latents=...)`` samples from it.
        images: what the pipeline makes of it, in the form that ``output_type`` asks for.
        inverse: the whole result: trajectory, reconstruction, error, ``converged`` and status of each sample, cost. All
            of it is about the samples of the network, which are latents where the pipeline has an autoencoder.
        vae_error: ``(B,)``, RMS of decoded(encoded(image)) - image, for pixels from -1 to 1: what the autoencoder loses
            whatever the inversion does. None where there is none, or where latents were given.

    Example:
        See :meth:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline.invert`, which returns one.
    """

    latents: Tensor
    images: Any
    inverse: Inverse
    vae_error: Tensor | None


class InversionMixin(ParallelPipeline):
    """A pipeline that can also find the x_T from which it arrives at an image."""

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        *,
        method: InverseMethod = ParallelInverse(),  # noqa: B008 - immutable
        rtol: float = 1e-3,
        atol: float = 0.0,
        max_rows: int | None = None,
        on_failure: Literal["warn", "raise", "ignore"] = "warn",
        callback: Callable[[Any], object] | None = None,
        **call: Any,
    ) -> PipelineInverse:
        """Find the x_T from which this pipeline arrives at an image: see :func:`fixpoint_diffusion.invert`.

        The sampler that is inverted is that of a call with the same arguments: same timesteps, prompts and guidance.
        ``pipe(latents=result.latents, **call)`` gives the image back; another prompt, class or guidance edits it.
        Nothing is kept on the pipeline.

        Args:
            image: PIL images, or values from 0 to 1 as the pipeline returns them: an array ``(B, H, W, C)``, a tensor
                ``(B, C, H, W)``, a list of those, or a single one. Where the pipeline has an autoencoder, a tensor with
                as many channels as its latents holds latents, in the scale that the network sees.
            method: of the inversion. ``ExplicitInverse()`` is what diffusers' ``DDIMInverseScheduler`` does.
            rtol, atol: when a sample is done: the RMS error of the network's sample.
            max_rows: most latents in one call of the network, to bound memory; by default all at once.
            on_failure, callback: as for :func:`fixpoint_diffusion.invert`.
            call: arguments of a call of the pipeline, by name: ``prompt`` or ``class_labels``, ``num_inference_steps``,
                ``output_type``, ... One prompt serves all images. ``guidance_scale`` is 1 unless given: with guidance,
                steps may fold.

        Raises:
            ValueError: an image that is no image, is not finite or outside of 0 to 1; a number or size of images that
                does not fit the call; a scheduler that cannot be served, or that clips, for a method that undoes steps;
                an ``eta`` above 0 without a ``generator`` (give one of the same seed, and the same ``eta``, to the
                call that samples); noise from the global random state, as ``DiTPipeline`` draws DDPM's.
        """
        if check_scheduler(self.scheduler) is None:
            raise ValueError(
                f"invert is for DDIM and DDPM schedulers, found {type(self.scheduler).__name__}: invert and sample "
                f"with pipe.scheduler = {ADVICE}"
            )
        taken = [name for name in _NOT_TAKEN if name in call]
        if taken:
            raise ValueError(f"invert takes no {taken[0]}")
        x_0, vae_error = self._samples_of(image)
        original = inspect.signature(super(ParallelPipeline, self).__call__)
        # Where the original draws an x_T all the same, the global random state stays as it is.
        drawn = torch.Generator() if call.get("generator") is None else call["generator"]
        given = {**_defaults(original, call, len(x_0)), **call, "generator": drawn, "return_dict": True}
        found: list[Inverse] = []

        def solve(loop: Call) -> Tensor:
            chain = loop.chain
            if chain.noise is not None and call.get("generator") is None:
                raise ValueError("this sampler adds noise, and no generator says which: pass generator=, or eta=0")
            if chain.noise is not None and loop.generator is None:
                raise ValueError(
                    "this sampler adds noise from the global random state, whatever generator it is given, and another "
                    f"call would draw other noise: invert and sample with pipe.scheduler = {ADVICE}"
                )
            shown = not getattr(self, "_progress_bar_config", {}).get("disable", False)
            options: Any = {"rtol": rtol, "atol": atol, "on_failure": on_failure, "callback": callback}
            try:
                found.append(invert(chain, x_0.to(chain.x_T), method=method, progress=shown, **options))
            except ClippedChainError as error:
                raise ValueError(
                    f"{error}. Of a pipeline, invert and sample without: pipe.scheduler = {ADVICE}"
                ) from error
            return found[0].reconstruction

        output, _, run = self._run(solve, (), given, latents=torch.zeros_like(x_0), max_rows=max_rows)
        if "_all_hooks" in vars(run):  # offloading puts new ones in at the end of a call
            self._all_hooks = run._all_hooks
        return PipelineInverse(latents=found[0].x_T, images=output.images, inverse=found[0], vae_error=vae_error)

    def _samples_of(self, image: Any) -> tuple[Tensor, Tensor | None]:
        """The network's samples ``(B, *shape)``, and what the autoencoder loses on them."""
        device, vae = self._execution_device, getattr(self, "vae", None)
        values = _as_tensor(image).to(device)
        if vae is None:
            return _centred(values), None
        first = image[0] if isinstance(image, Sequence) else image
        if isinstance(first, Tensor) and values.shape[1] == vae.config.latent_channels:
            return values, None
        encoder, pixels = LatentEncoder(vae), _centred(values).to(vae.dtype)
        encoder.latent_shape(tuple(pixels.shape[1:]))
        latents = encoder(pixels)
        loss = vae.decode(encoder.scaling.unscale(latents)).sample - pixels
        return latents, rms(loss)


def _as_tensor(image: Any) -> Tensor:
    """``(B, C, H, W)``, finite."""
    try:
        values = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(image)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "image must be PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or a list of images of one size; "
            f"got {type(image).__name__} ({error})"
        ) from error
    if not values.is_floating_point():
        raise ValueError(f"image must hold floating-point values from 0 to 1, got {values.dtype}")
    check_finite("image", values, item="image")
    return values


def _centred(values: Tensor) -> Tensor:
    """From 0 to 1, as pipelines return images, to what networks see."""
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"image must have values from 0 to 1, got {float(values.min()):g} to {float(values.max()):g}")
    return 2 * values - 1


def _defaults(original: inspect.Signature, call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What an inversion tells the original unless told otherwise: no guidance, and one prompt for all images."""
    found: dict[str, Any] = {}
    if "guidance_scale" in original.parameters:
        found["guidance_scale"] = 1.0
    if "num_images_per_prompt" in original.parameters:
        prompts = call.get("prompt") if call.get("prompt") is not None else call.get("prompt_embeds")
        one = isinstance(prompts, str) or (prompts is not None and len(prompts) == 1)
        found["num_images_per_prompt"] = count if one else 1
    return found
