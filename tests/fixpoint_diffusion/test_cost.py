"""What a call costs: operations as torch counts them, and bytes as autograd keeps them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig, cost

SHAPE: dict[str, Any] = {"sample_size": 12, "patch_size": 3, "in_channels": 3, "width": 24, "heads": 2}
CONFIGS = [
    DiTConfig(**SHAPE, depth=3, learn_sigma=True),
    DiTConfig(**SHAPE, depth=2, num_classes=5, mlp_ratio=2.5),
    FPDMConfig(**SHAPE),
    FPDMConfig(**SHAPE, num_classes=5, n_pre=0, n_post=2, implicit_blocks=3),
    FPDMConfig(**SHAPE, timestep_everywhere=True, learn_sigma=True),
    FPDMConfig(**SHAPE, unconditional_adaln="linear", injection_gelu="tanh"),
]


def made(config: Any) -> Any:
    return (DiT if isinstance(config, DiTConfig) else FPDM)(config)


def call(model: Any, iterations: int) -> Tensor:
    x, t = torch.randn(1, 3, 12, 12), torch.tensor([7])
    return model(x, t) if isinstance(model, DiT) else model(x, t, depth=iterations)


@pytest.mark.parametrize("config", CONFIGS)
def test_operations_are_those_that_torch_counts(config: Any) -> None:
    model = made(config).requires_grad_(False)  # the counter cannot place parameters that are an output
    for iterations in (1, 4):
        # Of the kernels for attention, torch counts the operations of this one.
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, iterations)
        assert cost(model, iterations=iterations).flops == counter.get_total_flops()


@pytest.mark.parametrize(("name", "published"), [("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.71), ("XL/2", 118.64)])
def test_operations_of_dit_are_the_published_ones(name: str, published: float) -> None:
    """Peebles and Xie (2023), Table 4, where a multiplication and an addition count as one."""
    with torch.device("meta"):
        model = DiT(DiTConfig.preset(name))
    assert cost(model).flops / 2e9 == pytest.approx(published, rel=2e-3)


class Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_kept(model: Any, forward: Callable[[], Tensor]) -> int:
    """Bytes of what autograd still holds after a call, parameters aside; each piece of memory counts once."""
    held: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = forward()
    gc.collect()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in held}
    assert output.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("config", CONFIGS)
def test_activations_are_the_bytes_that_autograd_keeps(config: Any) -> None:
    model = made(config)
    for iterations in (1, 3):
        kept = bytes_kept(model, lambda iterations=iterations: call(model, iterations))
        assert cost(model, iterations=iterations).activation_bytes == kept


def test_iterations_that_are_not_recorded_keep_nothing() -> None:
    model = made(CONFIGS[2])
    few, many = cost(model, iterations=3), cost(model, iterations=50, grad_iterations=3)
    assert few.activation_bytes == many.activation_bytes
    assert few.flops < many.flops


def test_passes_are_the_blocks_that_were_called() -> None:
    for config in CONFIGS:
        model, calls = made(config), []
        for name, module in model.named_modules():
            if name.endswith("attention"):
                module.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        call(model, 4)
        assert cost(model, iterations=4).block_passes == len(calls)
        assert cost(model).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_impossible_counts_are_refused() -> None:
    for options in ({"iterations": -1}, {"iterations": 2, "grad_iterations": 3}):
        with pytest.raises(ValueError, match="iterations and, of these, grad_iterations must not be negative"):
            cost(made(CONFIGS[2]), **options)
