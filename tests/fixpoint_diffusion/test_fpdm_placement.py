"""FPDM under hooks of accelerate and diffusers: weights that wait elsewhere, are cast for storage, or are packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixpoint_diffusion import NoiseSchedule, load_denoiser
from fixpoint_diffusion.denoisers import FPDMDenoiser, embedded
from fixpoint_diffusion.denoisers.embedded import embedded_folder
from fixpoint_diffusion.models import FPDM, FPDMConfig, fpdm_layer_problem, save_fpdm
from fixpoint_diffusion.sampling import sample_fpdm

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("diffusers.hooks")

CPU = torch.device("cpu")
X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500, 999])
CONDITIONAL = pytest.mark.parametrize("num_classes", [None, 10])


def model(num_classes: int | None = None) -> FPDM:
    """The same at every call, with random numbers where a new model has zeros."""
    fpdm = FPDM(FPDMConfig(width=16, heads=2, num_classes=num_classes)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in fpdm.parameters():
        parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return fpdm


def group_offload(fpdm: FPDM, offload_type: str) -> None:
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    hooks.apply_group_offloading(fpdm, onload_device=CPU, offload_device=CPU, offload_type=offload_type, **blocks)


OFFLOADS: dict[str, Callable[[FPDM], Any]] = {
    "cpu_offload": partial(accelerate.cpu_offload, execution_device=CPU),
    "cpu_offload, buffers too": partial(accelerate.cpu_offload, execution_device=CPU, offload_buffers=True),
    "cpu_offload_with_hook": partial(accelerate.cpu_offload_with_hook, execution_device=CPU),
    "groups of leaves": partial(group_offload, offload_type="leaf_level"),
    "groups of blocks": partial(group_offload, offload_type="block_level"),
}


@CONDITIONAL
@pytest.mark.parametrize("way", OFFLOADS)
def test_offloaded_fpdm_samples_what_it_samples_in_memory(way: str, num_classes: int | None) -> None:
    plain, fpdm = model(num_classes), model(num_classes)
    OFFLOADS[way](fpdm)
    if way.startswith("cpu_offload") and "hook" not in way:
        assert {parameter.device.type for parameter in fpdm.parameters()} == {"meta"}
    denoiser = FPDMDenoiser(fpdm)
    assert denoiser.device == CPU
    assert torch.equal(denoiser(X, T), FPDMDenoiser(plain)(X, T))
    options: dict[str, Any] = {"steps": 3, "iterations": 2, "record": True}
    if num_classes is not None:
        options |= {"y": torch.tensor([1, 2, 3]), "guidance": 2.0}
    schedule = NoiseSchedule.linear().zero_terminal_snr()
    ours, expected = (sample_fpdm(each, X, schedule, **options) for each in (fpdm, plain))
    assert torch.equal(ours.images, expected.images)
    assert torch.equal(ours.deltas, expected.deltas)


def cast_by_diffusers(fpdm: FPDM, dtype: torch.dtype) -> None:
    hooks.apply_layerwise_casting(fpdm, storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def cast_by_accelerate(fpdm: FPDM, dtype: torch.dtype) -> None:
    attach = accelerate.big_modeling.attach_layerwise_casting_hooks
    attach(fpdm, storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype, skip_modules_pattern=["patch_embedding"])


@CONDITIONAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [cast_by_diffusers, cast_by_accelerate])
def test_layerwise_casting_rounds_the_weights_and_changes_nothing_else(
    cast: Callable[[FPDM, torch.dtype], None], dtype: torch.dtype, num_classes: int | None
) -> None:
    rounded, fpdm = model(num_classes), model(num_classes)
    cast(fpdm, dtype)
    for whole, stored in zip(rounded.parameters(), fpdm.parameters(), strict=True):
        whole.copy_(stored)
    expected, found = (FPDMDenoiser(each, depth=5)(X, T) for each in (rounded, fpdm))
    assert found.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:
        assert float((found - expected).norm() / expected.norm()) < 0.02  # a few roundings of 1/256
    linear = [module.weight.dtype for module in fpdm.modules() if isinstance(module, nn.Linear)]
    assert set(linear) == {torch.float8_e4m3fn}


class Packed(nn.Module):
    """A linear layer with its weight in 8 bits and a scale, as libraries for quantised models keep it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(layer.weight.abs().max() / 127, requires_grad=False)
        self.packed = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.packed.to(dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(x.dtype), self.bias)


def test_quantised_layers_in_place_of_linear_ones() -> None:
    rounded, fpdm = model(10), model(10)
    for name, layer in list(rounded.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = Packed(layer)
            fpdm.set_submodule(name, packed)
            layer.weight.copy_(packed.dequantised(torch.float32))
    assert not any(isinstance(module, nn.Linear) for module in fpdm.modules())
    assert torch.equal(FPDMDenoiser(fpdm)(X, T), FPDMDenoiser(rounded)(X, T))


@CONDITIONAL
def test_every_module_with_parameters_is_called_and_the_injection_once_a_solve(num_classes: int | None) -> None:
    fpdm, calls = model(num_classes), Counter[str]()
    for name, module in fpdm.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
            calls[name] = 0
    fpdm(X, T, depth=7)
    repeated = ("implicit.f.w1_z", "implicit.f.w2", "implicit.f.blocks.0.attention.", "implicit.f.blocks.0.mlp.")
    assert calls == {name: 7 if name.startswith(repeated) else 1 for name in calls}


@pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", "sequential", {"": "cpu"}])
def test_loader_takes_a_device_map(tmp_path: Path, device_map: Any) -> None:
    save_fpdm(model(), tmp_path)
    denoiser: Any = load_denoiser(tmp_path, device_map=device_map, dtype=torch.float64)
    assert {torch.device(place) for place in denoiser.model.hf_device_map.values()} == {CPU}
    assert not denoiser.model.training
    assert torch.equal(denoiser(X.double(), T), FPDMDenoiser(model().double())(X.double(), T))


def test_loader_spreads_parts_over_devices(tmp_path: Path) -> None:
    """``meta`` in place of a GPU: what the map puts on the CPU waits there and is computed on the other device."""
    save_fpdm(model(10), tmp_path)
    device_map = {name.split(".")[0]: "meta" for name in model(10).state_dict()} | {"post": "cpu", "implicit": "cpu"}
    denoiser: Any = load_denoiser(tmp_path, device_map=device_map)
    assert denoiser.model.hf_device_map == device_map
    assert denoiser.device == torch.device("meta")
    inputs = X.to("meta"), T.to("meta")
    with torch.no_grad():
        prediction = denoiser.model(*inputs, depth=0)  # all but the layer's map, which a solve cannot run on ``meta``
    problem = fpdm_layer_problem(denoiser.model, *inputs)
    assert (prediction.shape, prediction.device.type) == (X.shape, "meta")
    assert (problem(problem.z0).shape, problem.z0.device.type) == (problem.z0.shape, "meta")


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"implicit": "cpu"}, "device_map=.*does not fit this network.*patch_embedding"),
        ({"": "cpu", "post": "disk"}, "does not fit this network.*offload_dir"),
        ("nowhere", "device_map='nowhere' does not fit this network"),
    ],
)
def test_a_device_map_that_does_not_fit_is_refused(tmp_path: Path, device_map: Any, message: str) -> None:
    save_fpdm(model(), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_denoiser(tmp_path, device_map=device_map)


def test_weights_of_an_earlier_version_go_where_the_map_says() -> None:
    spread: Any = load_denoiser(embedded_folder("fpdm-digits"), device_map="cpu")
    assert torch.equal(spread(X, T), embedded("fpdm-digits")(X, T))
