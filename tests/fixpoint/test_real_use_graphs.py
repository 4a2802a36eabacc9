"""Every backward rule in the graphs that people build: closures, modules, several solves, solves within solves."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

import fixpoint
from fixpoint import IFT, Broyden, FixedPointLayer, Reversible
from tests.fixpoint.differentiated import gradients

D = torch.float64
OPTIONS = {"solver": Broyden(memory=40), "rtol": 1e-10, "max_evals": 200}


def solve(f, z0, args=(), *, rule, **options):
    """The value, by a copy of the rule."""
    return fixpoint.solve(f, z0, args, backward=copy.deepcopy(rule), **{**OPTIONS, **options}).value


@pytest.fixture
def z0():
    return torch.zeros(3, 4, dtype=D)


# What f is made of


def test_closures_over_activations_and_modules_get_the_gradients_of_arguments(rule, normal, cell_class, z0):
    encoder, cell = torch.nn.Linear(5, 4, dtype=D), cell_class()
    leaves = encoder.weight, encoder.bias, cell.W
    if isinstance(rule, Reversible):
        with pytest.raises(ValueError, match="f closes over something more"):
            solve(lambda z: cell(z, encoder(normal(3, 5))), z0, rule=rule)
        return
    h = encoder(normal(3, 5))
    closed = gradients(solve(lambda z: cell(z, h), z0, rule=rule), *leaves)
    named = gradients(solve(cell, z0, (encoder(normal(3, 5)),), rule=rule), *leaves)
    assert named[0].abs().max() > 1e-3
    torch.testing.assert_close(closed, named)


def test_frozen_parameters_get_nothing_and_take_nothing_away(rule, normal, cell_class, z0):
    cell, x = cell_class(), normal(3, 4).requires_grad_()
    (expected,) = gradients(solve(cell, z0, (x,), rule=rule), x)
    cell.W.requires_grad_(False)
    solve(cell, z0, (x,), rule=rule).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert cell.W.grad is None


class TwoLayers(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, z, x):
        return torch.tanh(self.second(torch.tanh(self.first(z))) + x)


def test_a_shared_parameter_gets_the_sum_of_what_its_places_get(rule, normal, z0):
    first = torch.nn.Linear(4, 4, dtype=D, bias=False)
    second, x = copy.deepcopy(first), normal(3, 4)
    apart = gradients(solve(TwoLayers(first, second), z0, (x,), rule=rule), first.weight, second.weight)
    (shared,) = gradients(solve(TwoLayers(first, first), z0, (x,), rule=rule), first.weight)
    torch.testing.assert_close(shared, sum(apart))


# What the solves are made into


def test_several_solves_in_one_graph_follow_the_chain_rule(rule, normal, cell_class, z0):
    cell, other, x = cell_class(gain=0.5), cell_class(gain=0.7), normal(3, 4)
    rules = [copy.deepcopy(rule) for _ in range(2)]

    def three(rule, cut):
        """Solves after each other and beside each other; ``cut`` is shown the first value and gives what goes on."""
        first = solve(cell, z0, (x,), rule=rule)
        onwards = cut(first)
        return first, onwards, onwards * solve(other, z0, (onwards,), rule=rule) + solve(cell, z0, (2 * x,), rule=rule)

    *_, joined = three(rules[0], lambda first: first)
    in_one = gradients(joined, cell.W, other.W)
    first, onwards, value = three(rules[1], lambda first: first.detach().requires_grad_())
    direct = gradients(value, cell.W, other.W, onwards)
    (by_way_of_first,) = torch.autograd.grad(first, cell.W, direct[2])
    torch.testing.assert_close(in_one, (direct[0] + by_way_of_first, direct[1]))


def test_a_solve_inside_f_is_a_function_like_any_other(rule, normal, z0):
    a, b = (normal(4, seed=1) / 4).requires_grad_(), normal(3, 4).requires_grad_()

    def f(z, a, b):
        # w = 0.3 w + a z, so w = a z / 0.7
        inner = fixpoint.solve(lambda w, z, a: 0.3 * w + a * z, z0, (z, a), rtol=1e-13, backward=IFT(rtol=1e-13))
        return torch.tanh(inner.value) + b

    nested = gradients(solve(f, z0, (a, b), rule=rule), a, b)
    flat = gradients(solve(lambda z, a, b: torch.tanh(a * z / 0.7) + b, z0, (a, b), rule=rule), a, b)
    torch.testing.assert_close(nested, flat, rtol=1e-7, atol=1e-9)


def test_every_rule_may_stand_inside_f(rule, normal, z0):
    a, b = (normal(4, seed=1) / 4).requires_grad_(), normal(3, 4).requires_grad_()

    def inner(w, z, a):
        return 0.3 * w + a * torch.sin(z)

    def f(z, a, b):
        return torch.tanh(solve(inner, z0, (z, a), rule=rule)) + b

    nested = gradients(solve(f, z0, (a, b), rule=fixpoint.Phantom(steps=2)), a, b)
    z = solve(f, z0, (a, b), rule=None).detach()
    expected = gradients(f(f(z, a, b), a, b), a, b)
    torch.testing.assert_close(nested, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("run_backward", [False, True])
def test_nothing_outlives_the_value_with_the_garbage_collector_off(rule, normal, cell_class, z0, run_backward):
    cell, x = cell_class(), normal(3, 4).requires_grad_()
    gc.disable()
    try:
        value = solve(cell, z0, (x,), rule=rule)
        if run_backward:
            value.sum().backward(retain_graph=True)
        watched = [weakref.ref(thing) for thing in (value, cell, cell.W)]
        del value, cell
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


# Modes


def test_gradients_follow_the_grad_mode_and_never_the_training_flag(rule, normal, cell_class, z0):
    layer, x = FixedPointLayer(cell_class(), backward=rule, **OPTIONS), normal(3, 4)
    found = []
    for mode in (layer.train, layer.eval):
        again = copy.deepcopy(mode())
        found.append(gradients(again(x), again.f.W))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_every_rule_gives_the_plain_solve(rule, normal, cell_class, z0, mode):
    cell, x = cell_class(), normal(3, 4)
    plain = solve(cell, z0, (x,), rule=None)
    with mode():
        value = solve(cell, z0, (x,), rule=rule)
        assert torch.equal(value, plain)
    assert not value.requires_grad
    assert value.is_inference() == (mode is torch.inference_mode)
    assert not solve(cell, z0, (x,), rule=rule).is_inference()


# Layers as values


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_has_the_same_gradients_and_its_own_parameters(rule, normal, cell_class, copier):
    layer, x = FixedPointLayer(cell_class(), backward=copy.deepcopy(rule), **OPTIONS), normal(3, 4)
    twin = copier(layer)
    (expected,), (found,) = gradients(layer(x), layer.f.W), gradients(twin(x), twin.f.W)
    assert torch.equal(found, expected)
    with torch.no_grad():
        twin.f.W.mul_(0)
    assert layer.f.W.abs().max() > 0


def test_a_state_dict_carries_a_layer_over(rule, normal, cell_class):
    layer, x = FixedPointLayer(cell_class(gain=0.7), backward=copy.deepcopy(rule), **OPTIONS), normal(3, 4)
    other = FixedPointLayer(cell_class(gain=0.2), backward=copy.deepcopy(rule), **OPTIONS)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert list(layer.state_dict()) == ["f.W"]


def test_a_compiled_value_is_the_state_where_its_image_overflows():
    def value(a):
        start = torch.full((2, 1), 1e10)
        rule = fixpoint.Phantom()
        return fixpoint.solve(
            lambda z, a: a * z * z, start, (a,), solver=fixpoint.Picard(), backward=rule, depth=1
        ).value

    compiled = torch.compile(value, backend="eager", fullgraph=True)
    assert compiled(torch.tensor(1.0, requires_grad=True)).tolist() == value(torch.tensor(1.0)).tolist()


@pytest.mark.parametrize("rule", [fixpoint.Unroll(), fixpoint.JFB(), fixpoint.Phantom(steps=2)], ids=repr)
def test_a_fixed_depth_compiles_whole_where_nothing_requires_grad(rule):
    def value(a):
        return fixpoint.solve(lambda z, a: a * torch.cos(z), torch.ones(2, 3), (a,), backward=rule, depth=4).value

    torch.compiler.reset()
    a = torch.tensor(0.5)
    torch.testing.assert_close(torch.compile(value, backend="eager", fullgraph=True)(a), value(a))


@pytest.mark.parametrize("grad", [True, False])
def test_steps_of_fixed_depth_compile_whole_with_and_without_gradients(normal, cell_class, grad):
    torch.compiler.reset()
    layer, x = FixedPointLayer(cell_class(), backward=fixpoint.MultiStepJFB(no_grad=30, grad=2)), normal(3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), layer(x, rtol=1e-6), rtol=1e-4, atol=1e-5)
