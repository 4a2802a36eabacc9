"""Modules inside f: buffers that they write to, training mode, hooks, layers under autocast."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fixpoint
from fixpoint import IFT, Broyden, FixedPointLayer, Neumann, Phantom, Picard

D = torch.float64


class Layered(nn.Module):
    """``tanh(0.2 norm(linear(z)) + x)`` with normalisation of some kind; counts its evaluations in a buffer."""

    def __init__(self, kind):
        super().__init__()
        linear = nn.Linear(4, 4, dtype=D)
        generator = torch.Generator().manual_seed(3)
        for parameter in linear.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=D))
        wrapped = {"parametrized": nn.utils.parametrizations.spectral_norm, "hooked": nn.utils.spectral_norm}
        self.linear = wrapped.get(kind, lambda layer: layer)(linear)
        self.norm = nn.BatchNorm1d(4, dtype=D) if kind == "batch" else nn.Identity()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z, x):
        self.count += 1
        return torch.tanh(0.2 * self.norm(self.linear(z)) + x)


KINDS = ["none", "batch", "parametrized", "hooked"]


def statistics(f):
    return {name: value.clone() for name, value in f.state_dict().items() if name != "count"}


@pytest.mark.filterwarnings("ignore:f normalises by the statistics")
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_pass_modules_that_write_to_buffers(kind, x):
    f, start = Layered(kind), torch.zeros_like(x)
    at_start = copy.deepcopy(f)
    value = fixpoint.solve(f, start, (x,), rtol=1e-12, backward=IFT(rtol=1e-12)).value
    before = statistics(f)
    (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(statistics(f), before, rtol=0, atol=0)

    def plain_loop(x):
        """Every step is the map of the solve: modules as they were at its start."""
        z = start
        for _ in range(60):
            z = copy.deepcopy(at_start)(z, x)
        return z

    (expected,) = torch.autograd.grad(plain_loop(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-6, atol=1e-9)


def test_a_buffer_of_f_counts_as_in_a_plain_loop(x):
    f = Layered("none")
    solution = fixpoint.solve(f, torch.zeros_like(x), (x,), backward=None)
    assert f.count == solution.nfev


def test_spectral_normalisation_by_hook_is_one_map_and_steps_once(x):
    f = Layered("hooked")
    twin = copy.deepcopy(f)
    solution = fixpoint.solve(f, torch.zeros_like(x), (x,), rtol=1e-10)
    with torch.no_grad():
        twin(x, x)
    torch.testing.assert_close(f.linear.weight_u, twin.linear.weight_u, rtol=0, atol=0)
    plain = fixpoint.solve(twin.eval(), torch.zeros_like(x), (x,), rtol=1e-10)
    assert solution.nfev <= plain.nfev + 1


@pytest.mark.filterwarnings("ignore:f normalises by the statistics")
def test_second_derivatives_are_taken_in_the_mode_of_the_solve(x):
    found = []
    for switch in (False, True):
        f = Layered("batch")
        value = fixpoint.solve(f, torch.zeros_like(x), (x,), rtol=1e-12).value
        f.train(not switch)
        (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
        assert f.norm.training != switch
        assert f.training != switch
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_hooks_of_the_caller_see_the_whole_batch():
    module, sizes = nn.Identity(), []
    module.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    rate = torch.tensor([[0.0]] * 9 + [[0.95]])
    fixpoint.solve(lambda z, rate: module(rate * z + 1), torch.zeros(10, 2), (rate,), solver=Picard(), max_evals=300)
    assert set(sizes) == {10}


class Biased(nn.Module):
    """A cell whose last operation adds a float32 parameter."""

    def __init__(self):
        super().__init__()
        self.linear, self.bias = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        self.seen = []

    def forward(self, z, x):
        self.seen.append(z.dtype)
        return torch.tanh(0.3 * self.linear(z) + x) + self.bias


def test_a_layer_behind_an_encoder_trains_under_autocast(rule):
    encoder, cell = nn.Linear(4, 4), Biased()
    solver = Broyden() if isinstance(rule, fixpoint.SHINE) else Picard()
    layer = FixedPointLayer(cell, backward=copy.deepcopy(rule), solver=solver, rtol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = encoder(torch.randn(8, 4))
        assert h.dtype == torch.bfloat16
        value = layer(h)
        loss = value.square().mean()
    loss.backward()
    assert value.dtype == torch.float32
    assert set(cell.seen) == {torch.float32}
    for parameter in (*encoder.parameters(), *cell.parameters()):
        assert parameter.grad.abs().max() > 0


def test_without_autocast_a_state_keeps_its_dtype():
    value = fixpoint.solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3, dtype=torch.bfloat16), rtol=2e-2).value
    assert value.dtype == torch.bfloat16


class Masked(nn.Module):
    """An encoder with a padding mask, which in eval mode leaves padding out, but only where nothing is recorded."""

    def __init__(self, **options):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, **options).eval()

    def forward(self, z, x, mask):
        return 0.4 * self.encoder(z + x, src_key_padding_mask=mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm", [None, "leafwise"])
@pytest.mark.parametrize("rule", [IFT(), Phantom(steps=2), Neumann(terms=2)], ids=repr)
def test_an_f_that_is_another_map_where_it_is_recorded_is_noticed(rule, norm):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(5) >= torch.tensor([5, 3, 5])[:, None]  # the second sequence is shorter
    options = {"backward": rule, "norm": norm, "rtol": 1e-5}
    with pytest.warns(UserWarning, match="another image of the solution where autograd records it"):
        FixedPointLayer(Masked(), **options)(x, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rtol in (1e-5, 0.1):  # a residual within the tolerance is no other image
            FixedPointLayer(Masked(enable_nested_tensor=False), **options | {"rtol": rtol})(x, mask)
