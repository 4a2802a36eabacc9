"""FixedPointLayer: a module like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fixpoint
from fixpoint import JFB, Anderson, FixedPointLayer, Picard, StochasticJFB, Unroll


class Cell(torch.nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim).double()
        with torch.no_grad():
            self.linear.weight.mul_(0.7 / torch.linalg.matrix_norm(self.linear.weight, ord=2))

    def forward(self, z, x, gain=1.0):
        return torch.tanh(self.linear(z) + gain * x)


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return FixedPointLayer(Cell(), rtol=1e-10)


def test_it_returns_the_fixed_point_of_f_at_its_inputs(layer, x):
    for inputs in ((x,), (x, 0.5)):
        z = layer(*inputs)
        torch.testing.assert_close(layer.f(z, *inputs), z, rtol=1e-8, atol=1e-9)


def test_it_equals_solve_with_the_same_options(layer, x):
    sol = layer(x, return_solution=True)
    direct = fixpoint.solve(layer.f, torch.zeros_like(x), (x,), rtol=1e-10)
    assert isinstance(sol, fixpoint.Solution)
    assert torch.equal(sol.value, direct.value)
    assert sol.nfev == direct.nfev


def test_gradients_reach_inputs_and_parameters(layer, x):
    x.requires_grad_()
    reference = copy.deepcopy(layer)
    grads = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    unrolled = reference(x, backward=Unroll(), solver=Picard(), rtol=1e-14, max_evals=300)
    expected = torch.autograd.grad(unrolled.square().sum(), (x, *reference.parameters()))
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_gradients_follow_the_grad_mode_and_not_the_training_flag(layer, x):
    assert layer.eval()(x).requires_grad
    with torch.no_grad():
        assert not layer.train()(x).requires_grad


def test_z0_warms_the_start(layer, x):
    sol = layer(x, return_solution=True)
    warm = layer(x, z0=sol.value.detach(), return_solution=True)
    assert warm.nfev == 1 < sol.nfev


def test_without_z0_it_starts_from_zeros_like_the_first_input(layer, x):
    assert torch.equal(layer(x, depth=0, backward=None), torch.zeros_like(x))
    with pytest.raises(TypeError, match="z0 is missing"):
        layer()
    with pytest.raises(TypeError, match="z0 is missing"):
        layer({"x": x})


def test_nested_states_and_inputs_pass_through():
    layer = FixedPointLayer(lambda z, x: (0.5 * z[0] + x["b"], 0.25 * z[1]), rtol=1e-6)
    value = layer({"b": torch.ones(2, 3)}, z0=(torch.zeros(2, 3), torch.ones(2, 1)))
    torch.testing.assert_close(value[0], torch.full((2, 3), 2.0))


def test_options_of_one_call_leave_the_next_as_it_was(layer, x):
    before = layer(x, return_solution=True)
    four = layer(x, return_solution=True, depth=4, solver=Picard(), backward=JFB())
    assert four.nfev == 4
    after = layer(x, return_solution=True)
    assert torch.equal(before.value, after.value)
    assert before.nfev == after.nfev
    assert layer(x, return_solution=True, rtol=1e-2).nfev < before.nfev


def test_what_cannot_be_called_is_refused_when_the_layer_is_made():
    with pytest.raises(TypeError, match="f must be a module or function of z and the inputs, found int"):
        FixedPointLayer(3)


def test_unknown_options_raise_when_made_and_when_called(layer, x):
    with pytest.raises(TypeError, match="unknown option 'f_solver'"):
        FixedPointLayer(Cell(), f_solver="anderson")
    with pytest.raises(TypeError, match="unknown option 'tol'"):
        layer(x, tol=1e-3)
    with pytest.raises(TypeError, match="unknown option 'z_init'"):
        layer(x, z_init=x)


def test_a_call_keeps_nothing_on_the_module(layer, x):
    before = {key: id(value) for key, value in vars(layer).items()}
    options = dict(layer.options)
    layer(x.requires_grad_(), return_solution=True).value.sum().backward()
    assert {key: id(value) for key, value in vars(layer).items()} == before
    assert layer.options == options
    assert not layer._backward_hooks
    assert not layer.f._forward_hooks


def test_the_state_dict_is_that_of_f(layer, x):
    other = FixedPointLayer(Cell(), rtol=1e-10)
    assert set(layer.state_dict()) == {"f.linear.weight", "f.linear.bias"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(layer, x, copier):
    layer.options["backward"] = StochasticJFB(max_no_grad=2, max_grad=2, generator=torch.Generator().manual_seed(3))
    layer(x)
    other = copier(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.f.linear.bias.add_(1)
        assert not torch.equal(other(x), layer(x))


def test_it_is_named_with_its_options():
    text = repr(FixedPointLayer(torch.nn.Identity(), solver=Anderson(memory=3), rtol=1e-2))
    assert "Anderson(memory=3" in text
    assert "rtol=0.01" in text


def test_it_trains_inside_a_network(x):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), FixedPointLayer(Cell()), torch.nn.ReLU(inplace=True))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    target = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    losses = []
    for _ in range(60):
        loss = (net(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"solver": "anderson"}, TypeError, "solver must be a fixpoint.Solver"),
        ({"backward": "ift"}, TypeError, "backward must be a fixpoint.Backward"),
        ({"max_evals": 0}, ValueError, "max_evals must be at least 1, found 0"),
        ({"on_failure": "shout"}, ValueError, "on_failure must be one of"),
    ],
)
def test_options_that_cannot_work_raise_when_the_layer_is_made(options, error, text):
    with pytest.raises(error, match=text):
        fixpoint.FixedPointLayer(torch.cos, **options)
