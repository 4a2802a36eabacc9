"""One pipeline that several threads call at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import fixpoint
from fixpoint_diffusion import pipelines
from tests.fixpoint_diffusion.tiny import tiny_conditional_unet, tiny_unet

PROMPTS = {
    "prompt_embeds": torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)),
    "negative_prompt_embeds": torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)),
}
TIGHT: dict[str, Any] = {"solver": fixpoint.Picard(), "rtol": 1e-6}
THREADS = 3


def ddim() -> diffusers.DiffusionPipeline:
    return diffusers.DDIMPipeline(tiny_unet(), DDIMScheduler())


def stable_diffusion() -> diffusers.DiffusionPipeline:
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        **parts, unet=tiny_conditional_unet(), scheduler=scheduler, requires_safety_checker=False
    )


class Meeting:
    """Nobody goes on before every thread is there; the main thread does not count."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(THREADS)
        self.counts = threading.local()

    def __call__(self, times: int) -> None:
        """Only the first ``times`` that a thread comes here."""
        count = getattr(self.counts, "count", 0)
        if threading.current_thread() is not threading.main_thread() and count < times:
            self.counts.count = count + 1
            self.barrier.wait(timeout=120)


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (
            ddim,
            [
                {"num_inference_steps": 4, "batch_size": 2, "output_type": "pt"},
                {"num_inference_steps": 7, "eta": 0.5, "output_type": "pt"},
                {"num_inference_steps": 5, "use_clipped_model_output": True, "output_type": "pt"},
            ],
        ),
        (
            stable_diffusion,
            [
                {**PROMPTS, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"},
                {**PROMPTS, "num_inference_steps": 7, "guidance_scale": 3.0, "output_type": "latent"},
                {**PROMPTS, "num_inference_steps": 5, "guidance_scale": 9.0, "output_type": "latent", "eta": 0.3},
            ],
        ),
    ],
)
def test_each_thread_gets_the_images_of_its_own_call(
    make: Callable[[], Any], calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are within diffusers' code at the same time, and then within their solves at the same time."""
    torch.manual_seed(0)
    original = make()
    pipe = getattr(pipelines, f"Parallel{type(original).__name__}").from_pipe(original)
    for each in (original, pipe):
        each.set_progress_bar_config(disable=True)
    expected = [original(generator=torch.Generator().manual_seed(5), **call).images for call in calls]
    scheduler, network, seen = pipe.scheduler, pipe.unet, []
    in_preparation, in_solve = Meeting(), Meeting()
    set_timesteps = DDIMScheduler.set_timesteps

    def set_timesteps_together(self: Any, *args: Any, **kwargs: Any) -> None:
        in_preparation(times=1)
        set_timesteps(self, *args, **kwargs)
        in_preparation(times=2)

    def note(module: nn.Module, *_: Any) -> None:
        in_solve(times=2)
        seen.append((pipe.unet, pipe.scheduler))

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", set_timesteps_together)
    network.register_forward_pre_hook(note)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(
            pool.map(lambda call: pipe(generator=torch.Generator().manual_seed(5), **call, **TIGHT).images, calls)
        )
    for images, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)
    assert all(one is network and other is scheduler for one, other in seen)


def test_a_callback_stops_its_own_call_alone() -> None:
    torch.manual_seed(0)
    pipe = pipelines.ParallelStableDiffusionPipeline.from_pipe(stable_diffusion())
    pipe.set_progress_bar_config(disable=True)
    meeting = Meeting()

    def call(stop: bool) -> Any:
        def callback(given: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            given._interrupt = stop
            meeting(times=1)
            return tensors

        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 5, "output_type": "latent", **PROMPTS, **TIGHT}
        return pipe(generator=generator, callback_on_step_end=callback, **options).solution.nfev

    with pytest.warns(fixpoint.ConvergenceWarning), ThreadPoolExecutor(THREADS) as pool:
        stopped, *others = pool.map(call, [True, False, False])
    assert stopped == 1
    assert others == [call(False)] * 2
