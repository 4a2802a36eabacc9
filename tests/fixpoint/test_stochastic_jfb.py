"""Stochastic and multi-step JFB: what is drawn, when it is drawn again, and what is reported."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fixpoint
from fixpoint import FixedPointLayer, MultiStepJFB, Picard, Status, StochasticJFB
from fixpoint.backward import draws as draws_module

D = torch.float64


def test_multi_step_jfb_is_the_stochastic_rule_without_chance(normal, cell_class):
    cell, x = cell_class(), normal(2, 4)
    before = torch.get_rng_state()
    for _ in range(3):
        cell.calls = 0
        sol = fixpoint.solve(cell, torch.zeros(2, 4, dtype=D), (x,), backward=MultiStepJFB(no_grad=4, grad=3))
        assert (sol.nfev, cell.calls) == (4, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_gives_ranks_the_same_depths_and_leaves_the_global_state_alone(normal, cell_class):
    cell, x = cell_class(), normal(2, 4)
    before = torch.get_rng_state()

    def depths(rule):
        return [fixpoint.solve(cell, torch.zeros(2, 4, dtype=D), (x,), backward=rule).nfev for _ in range(6)]

    rule = StochasticJFB(max_no_grad=30, max_grad=2, seed=5)
    clones = copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), StochasticJFB(max_no_grad=30, max_grad=2, seed=5)
    assert rule == clones[0] == clones[2]
    first = depths(rule)
    assert len(set(first)) > 1
    for clone in clones:
        assert depths(clone) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_bounds_of_stochastic_jfb_are_inclusive_on_both_sides():
    rule = StochasticJFB(min_no_grad=3, max_no_grad=5, min_grad=2, max_grad=3, seed=0)
    seen, calls = set(), []

    def f(z):
        calls.append(1)
        return torch.tanh(z).requires_grad_()

    for _ in range(200):
        calls.clear()
        nfev = fixpoint.solve(f, torch.ones(1), backward=rule).nfev
        seen.add((nfev, len(calls) - nfev))
    assert seen == {(n, m) for n in (3, 4, 5) for m in (2, 3)}


# Options


def test_a_seeded_rule_can_be_replaced_copied_and_pickled(normal, cell_class):
    cell, x = cell_class(), normal(2, 4)

    def depths(rule, count=6):
        return [fixpoint.solve(cell, torch.zeros(2, 4, dtype=D), (x,), backward=rule).nfev for _ in range(count)]

    rule = StochasticJFB(max_no_grad=30, max_grad=2, seed=5)
    first = depths(rule)
    replaced = dataclasses.replace(rule, max_grad=3)
    assert (replaced.max_grad, replaced.seed) == (3, 5)
    assert depths(dataclasses.replace(rule)) == first  # from the seed's beginning
    clones = copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))  # from where the rule is
    following = depths(rule)
    assert following != first
    for clone in clones:
        assert clone == rule
        assert depths(clone) == following


def test_any_integer_will_do_for_a_count():
    rule = StochasticJFB(max_no_grad=np.int64(3), max_grad=np.int32(2), seed=np.int64(7))
    assert rule == StochasticJFB(max_no_grad=3, max_grad=2, seed=7)
    assert {type(x) for x in (rule.max_no_grad, rule.max_grad, rule.seed)} == {int}
    for wrong in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="max_grad must be an integer"):
            StochasticJFB(max_no_grad=1, max_grad=wrong)
    with pytest.raises(TypeError):
        StochasticJFB(max_no_grad=1, max_grad=1, seed=1.5)


def test_z0_is_a_start_and_nothing_else_unless_it_is_asked_for():
    plain = StochasticJFB(max_no_grad=0, max_grad=1), MultiStepJFB(no_grad=0, grad=1)
    assert not any(rule.uses_start for rule in plain)
    assert StochasticJFB(max_no_grad=0, max_grad=1, attach_start=True).uses_start
    assert fixpoint.Reversible().uses_start
    assert not fixpoint.IFT().uses_start


def test_a_warm_start_joins_no_graphs(normal, cell_class):
    layer, x = FixedPointLayer(cell_class(), backward=StochasticJFB(max_no_grad=0, max_grad=1)), normal(2, 4)
    z = None
    for _ in range(3):
        z = layer(x, z0=z)
        z.sum().backward()


# What is reported


@pytest.mark.parametrize("rule", [MultiStepJFB(no_grad=3, grad=2), StochasticJFB(max_no_grad=3, max_grad=2, seed=0)])
def test_the_residual_of_a_state_that_nobody_evaluated_is_not_known(normal, cell_class, rule):
    solution = fixpoint.solve(cell_class(), torch.zeros(2, 4, dtype=D), (normal(2, 4),), backward=rule, record=True)
    assert solution.residual.isnan().all()
    assert solution.relative_residual.isnan().all()
    assert solution.status.tolist() == [Status.MAX_EVALS] * 2
    assert solution.trace.shape == (solution.nfev, 2)
    assert solution.trace.isfinite().all()


def test_the_status_is_that_of_the_state_that_is_handed_over():
    a = torch.tensor([[1.0], [1e200]], dtype=D, requires_grad=True)
    rule = MultiStepJFB(no_grad=1, grad=2)
    solution = fixpoint.solve(lambda z, a: a * z, torch.ones(2, 1, dtype=D), (a,), solver=Picard(), backward=rule)
    assert solution.value.isfinite().flatten().tolist() == [True, False]
    assert solution.status.tolist() == [Status.MAX_EVALS, Status.NON_FINITE]


@pytest.mark.parametrize("option", [{"callback": print}, {"keep_states": (2,)}], ids=["callback", "keep_states"])
def test_an_option_that_cannot_be_honoured_is_refused_before_f_is_evaluated(normal, cell_class, option):
    cell, rule = cell_class(), MultiStepJFB(no_grad=3, grad=2)
    with pytest.raises(ValueError, match="callback and keep_states do not work with StochasticJFB"):
        fixpoint.solve(cell, torch.zeros(2, 4, dtype=D), (normal(2, 4),), backward=rule, **option)
    assert cell.calls == 0


# Checkpoints


def seeded(seed):
    return StochasticJFB(max_no_grad=9, max_grad=6, seed=seed)


def with_generator(seed):
    return StochasticJFB(max_no_grad=9, max_grad=6, generator=torch.Generator().manual_seed(seed))


def from_the_global_state(seed):
    torch.manual_seed(seed)
    return StochasticJFB(max_no_grad=9, max_grad=6)


def plainly(f, *args):
    return f(*args)


def checkpointed(f, *args):
    return checkpoint(f, *args, use_reentrant=False)


def one_by_one(run, layers, x):
    for layer in layers:
        x = run(layer, x).sin()
    return x


def together(run, layers, x):
    return run(lambda x: one_by_one(plainly, layers, x), x)


def within_one_another(run, layers, x):
    return run(lambda x: run(layers[2], run(layers[1], layers[0](x).sin()).sin()).sin(), x)


@pytest.mark.parametrize("make", [seeded, with_generator, from_the_global_state])
@pytest.mark.parametrize("arrange", [one_by_one, together, within_one_another])
def test_a_recomputation_has_the_depths_of_the_forward_pass(normal, cell_class, make, arrange):
    cell = cell_class()

    def train(run):
        rule = make(1)
        layers = [FixedPointLayer(cell, backward=rule), FixedPointLayer(cell, backward=seeded(2))]
        layers.append(layers[0])
        found, values = [], []
        for step in range(4):
            x = normal(2, 4, seed=step).requires_grad_()
            values.append((arrange(run, layers, x), x))
            if step % 2:  # two forward passes before two backward ones
                found += [torch.autograd.grad(value.square().sum(), (cell.W, x)) for value, x in values]
                values.clear()
        return found

    torch.testing.assert_close(train(checkpointed), train(plainly))


def test_depths_are_put_back_where_the_global_state_is_not(normal, cell_class):
    layer, x = FixedPointLayer(cell_class(), backward=from_the_global_state(0)), normal(2, 4).requires_grad_()
    found = []
    for run in (plainly, lambda *args: checkpoint(*args, use_reentrant=False, preserve_rng_state=False)):
        torch.manual_seed(0)
        values = [run(layer, x).square().sum() for _ in range(3)]
        found.append([torch.autograd.grad(value, (layer.f.W, x)) for value in values])
    torch.testing.assert_close(*found)


def test_backward_twice_through_a_checkpoint_draws_the_same_twice(normal, cell_class):
    layer, x = FixedPointLayer(cell_class(), backward=seeded(0)), normal(2, 4).requires_grad_()
    value = checkpointed(layer, x).square().sum()
    first, again = (torch.autograd.grad(value, (layer.f.W, x), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again)


def test_a_checkpoint_that_is_gone_leaves_nothing_behind(normal, cell_class):
    rule = seeded(0)
    layer, x = FixedPointLayer(cell_class(), backward=rule), normal(2, 4).requires_grad_()
    value = checkpointed(layer, x)
    assert len(rule._draws._noted) == 1
    value.sum().backward()
    del value
    assert len(rule._draws._noted) == len(rule._draws._replays) == 0


@pytest.mark.parametrize("make", [seeded, with_generator])
@pytest.mark.parametrize("reentrant", [True, False])
def test_where_the_depths_cannot_be_known_there_is_an_error(normal, cell_class, monkeypatch, make, reentrant):
    monkeypatch.setattr(draws_module, "saved_tensors_hooks", list)  # as under a PyTorch that does not tell
    layer, x = FixedPointLayer(cell_class(), backward=make(0)), normal(2, 4).requires_grad_()
    value = checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="random depths were drawn in a backward pass"):
        value.sum().backward()
