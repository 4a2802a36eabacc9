"""Pipelines whose networks are kept elsewhere or in other dtypes, against diffusers' own with the same networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion import ExplicitInverse, pipelines
from tests.fixpoint_diffusion.tiny import tiny_stable_diffusion, tiny_unet, tiny_vae

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
TIGHT: dict[str, Any] = {"solver": fixpoint.Picard(), "rtol": 1e-6}
CALLS: dict[str, dict[str, Any]] = {
    "DDIMPipeline": {"batch_size": 2},
    "StableDiffusionPipeline": {"prompt": "a cat"},
    "DiTPipeline": {"class_labels": [3, 7], "guidance_scale": 4.0},
}


def parts(kind: str) -> dict[str, Any]:
    """The same at every call: offloading changes modules for good."""
    torch.manual_seed(0)
    if kind == "DDIMPipeline":
        return {"unet": tiny_unet(), "scheduler": DDIMScheduler()}
    if kind == "StableDiffusionPipeline":
        return tiny_stable_diffusion()
    transformer = diffusers.DiTTransformer2DModel(2, 8, num_layers=1, out_channels=8, norm_num_groups=4, sample_size=4)
    for parameter in transformer.parameters():  # some start at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return {"transformer": transformer.eval(), "vae": tiny_vae(), "scheduler": DDIMScheduler(clip_sample=False)}


def network(pipe: Any) -> nn.Module:
    return pipe.transformer if "transformer" in pipe.components else pipe.unet


def modules(pipe: Any) -> list[nn.Module]:
    return [module for module in pipe.components.values() if isinstance(module, nn.Module)]


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does, which itself cannot run on a CPU: the weights are on ``meta``."""
    for module in modules(pipe):
        accelerate.cpu_offload(module, CPU, offload_buffers=len(module._parameters) > 0)
    assert network(pipe).device.type == "meta"


def group_offload(pipe: Any) -> None:
    options = {"onload_device": CPU, "offload_device": CPU, "num_blocks_per_group": 1}
    if type(network(pipe))._supports_group_offloading:
        network(pipe).enable_group_offload(**options)
    pipe.vae.enable_group_offload(**options) if "vae" in pipe.components else None


def layerwise_casting(pipe: Any) -> None:
    network(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in network(pipe).parameters())


class Packed(nn.Module):
    """A layer with its weight in 8 bits and a scale, as libraries for quantised models keep it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().max() / 127
        packed = (layer.weight.detach() / scale).round() + 128
        self.weight = nn.Parameter(packed.to(torch.uint8), requires_grad=False)
        self.bias, self.scale = layer.bias, nn.Parameter(scale, requires_grad=False)
        self.padding, self.stride = layer.padding, layer.stride

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.to(x.dtype) - 128) * self.scale
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def packed_weights(pipe: Any) -> None:
    if "unet" in pipe.components:
        pipe.unet.conv_in = Packed(pipe.unet.conv_in)
    else:
        pipe.transformer.pos_embed.proj = Packed(pipe.transformer.pos_embed.proj)
    assert next(network(pipe).parameters()).dtype == torch.uint8


WAYS = [model_offload, sequential_offload, group_offload, layerwise_casting, packed_weights]


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("way", WAYS)
def test_images_are_those_of_diffusers_with_the_same_networks(kind: str, way: Callable[[Any], None]) -> None:
    outputs = []
    for name, options in ((kind, {}), (f"Parallel{kind}", TIGHT)):
        pipe = getattr(pipelines if options else diffusers, name)(**parts(kind))
        pipe.set_progress_bar_config(disable=True)
        way(pipe)
        call = {**CALLS[kind], "num_inference_steps": 3, "output_type": "pt", **options}
        for _ in range(2):  # some hooks are taken off and put on again after a call
            output = pipe(generator=torch.Generator().manual_seed(5), **call)
        outputs.append(output)
    assert outputs[1].solution.converged.all()
    torch.testing.assert_close(outputs[1].images, outputs[0].images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_inverted_wherever_the_networks_are(kind: str, way: Callable[[Any], None]) -> None:
    channels = 1 if kind == "DDIMPipeline" else 3
    image = torch.rand(2 if kind != "StableDiffusionPipeline" else 1, channels, 8, 8)
    call = {**CALLS[kind], "num_inference_steps": 3, "output_type": "pt"}
    found = []
    for there in (None, way):
        pipe = getattr(pipelines, f"Parallel{kind}")(**parts(kind))
        pipe.scheduler.register_to_config(clip_sample=False)
        pipe.set_progress_bar_config(disable=True)
        if there is not None:
            there(pipe)
        for _ in range(2):
            result = pipe.invert(image, method=ExplicitInverse(), on_failure="ignore", **call)
        back = pipe(latents=result.latents, **{"guidance_scale": 1.0, **call} if channels == 3 else call, **TIGHT)
        torch.testing.assert_close(back.images, result.images, rtol=1e-4, atol=1e-4)
        found.append(result)
    # Of weights in 8 bits.
    tolerance = 0.3 if way in (layerwise_casting, packed_weights) else 1e-4
    torch.testing.assert_close(found[1].latents, found[0].latents, rtol=0, atol=tolerance)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map_works_as_for_the_original(device_map: str, tmp_path: Path) -> None:
    diffusers.DDIMPipeline(**parts("DDIMPipeline")).save_pretrained(tmp_path)
    images = []
    for kind, options in ((diffusers.DDIMPipeline, {}), (pipelines.ParallelDDIMPipeline, TIGHT)):
        pipe = kind.from_pretrained(tmp_path, device_map=device_map)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(5)
        images.append(pipe(generator=noise, num_inference_steps=5, output_type="pt", **options).images)
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverting", [False, True])
def test_pipeline_knows_the_hooks_that_a_call_has_put_on_anew(inverting: bool) -> None:
    pipe = pipelines.ParallelStableDiffusionPipeline(**parts("StableDiffusionPipeline"))
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")
    first = list(pipe._all_hooks)
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    pipe.invert(torch.rand(1, 3, 8, 8), on_failure="ignore", **call) if inverting else pipe(**call)
    assert pipe._all_hooks
    assert not {id(hook) for hook in first} & {id(hook) for hook in pipe._all_hooks}
    assert [hook.hook for hook in pipe._all_hooks] == [hook.model._hf_hook for hook in pipe._all_hooks]
