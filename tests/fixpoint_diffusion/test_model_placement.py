"""Networks that compute in another dtype than they are stored in, or whose weights wait elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise, load_denoiser, sample
from fixpoint_diffusion.denoisers import DiffusersDenoiser
from fixpoint_diffusion.denoisers.modules import compute_dtype, execution_device
from tests.fixpoint_diffusion.tiny import tiny_unet

accelerate = pytest.importorskip("accelerate")

X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500, 999])


def unet() -> Any:
    torch.manual_seed(0)
    return tiny_unet().requires_grad_(False)


class Wrapped(nn.Module):
    """So that nobody can ask the network itself for its dtype."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t).sample


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layerwise_casting_computes_in_what_its_hook_says(dtype: torch.dtype, wrapped: bool) -> None:
    model = unet()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    assert any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    expected = model(X.to(dtype), T).sample.float()
    assert torch.equal(DiffusersDenoiser(Wrapped(model) if wrapped else model)(X, T), expected)


def test_integers_among_the_parameters_say_nothing() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == torch.float64
            return self.scale * x

    torch.testing.assert_close(DiffusersDenoiser(Packed())(X, T), 0.3 * X)
    only = nn.Module()
    only.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert compute_dtype(only, torch.float16) == torch.float16


def test_a_module_may_say_itself_what_it_computes_in() -> None:
    class Says(nn.Module):
        dtype = torch.bfloat16

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.zeros(1))

    assert compute_dtype(Says(), torch.float32) == torch.bfloat16


def test_inputs_beside_x_are_cast_too_and_labels_are_not() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, prompt: Tensor, class_labels: Tensor) -> Tensor:
            assert (prompt.dtype, class_labels.dtype, t.dtype) == (torch.float64, torch.int64, torch.int64)
            return self.scale * x

    DiffusersDenoiser(Conditional())(X, T, prompt=torch.ones(3, 2), class_labels=T)


def offloaded() -> Any:
    return accelerate.cpu_offload(unet(), execution_device=torch.device("cpu"))


def offloaded_whole() -> Any:
    return accelerate.cpu_offload_with_hook(unet(), torch.device("cpu"))[0]


def offloaded_in_groups() -> Any:
    model = unet()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return model


@pytest.mark.parametrize("place", [offloaded, offloaded_whole, offloaded_in_groups])
def test_offloaded_network_samples_what_it_samples_in_memory(place: Any) -> None:
    model = place()
    if place is offloaded:
        assert {p.device.type for p in model.parameters()} == {"meta"}
    denoiser = DiffusersDenoiser(model)
    assert denoiser.device == torch.device("cpu")
    assert torch.equal(denoiser(X, T), unet()(X, T).sample)
    chain = DDIMChain(denoiser, initial_noise(0, range(2), (1, 8, 8)), NoiseSchedule.linear(), steps=4)
    plain = DDIMChain(DiffusersDenoiser(unet()), chain.x_T, NoiseSchedule.linear(), steps=4)
    torch.testing.assert_close(sample(chain, rtol=1e-6).images, plain.sequential()[:, -1], rtol=1e-3, atol=1e-3)


def test_the_device_of_an_offloaded_network_is_that_of_its_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(execution_device="meta"))
    assert execution_device(model) == torch.device("meta")


def test_the_device_of_a_network_that_is_offloaded_in_groups_is_that_of_its_hook() -> None:
    model = offloaded_in_groups()
    registries = [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]
    hooks = [registry.get_hook("group_offloading") for registry in registries]
    next(hook for hook in hooks if hook is not None).config.onload_device = torch.device("meta")
    assert execution_device(model) == torch.device("meta")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_loader_takes_a_device_map(tmp_path: Path, device_map: Any) -> None:
    unet().save_pretrained(tmp_path)
    denoiser = load_denoiser(tmp_path, device_map=device_map)
    assert denoiser.model.hf_device_map.keys() == {""}
    assert not denoiser.model.training
    assert torch.equal(denoiser(X, T), unet()(X, T).sample)
    with pytest.raises(ValueError, match="either device or device_map"):
        load_denoiser(tmp_path, device_map=device_map, device="cpu")


def test_sharded_weights_load(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load_denoiser(tmp_path)(X, T), unet()(X, T).sample)
