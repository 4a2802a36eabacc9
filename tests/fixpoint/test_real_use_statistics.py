"""Every backward rule with an f that normalises by statistics which it updates."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import fixpoint
from fixpoint import IFT, JFB, Picard
from fixpoint.engine.ambient import modules_of
from tests.fixpoint.differentiated import gradients

D = torch.float64


class Normalised(nn.Module):
    """``tanh(norm(z W^T) + x)``; keeps what the norm was shown."""

    def __init__(self, cell, norm):
        super().__init__()
        self.W, self.norm = cell.W, norm
        self.shown = []
        norm.register_forward_pre_hook(lambda _, inputs: self.shown.append(inputs[0].detach().clone()))

    def forward(self, z, x):
        return torch.tanh(self.norm(z @ self.W.T) + x)


def batch_norm():
    norm = nn.BatchNorm1d(4, dtype=D)
    nn.init.constant_(norm.weight, 0.2)
    return norm


def normalised_by_hand(W, z, x):
    y = z @ W.T
    return torch.tanh(0.2 * (y - y.mean(dim=0)) / (y.var(dim=0, unbiased=False) + 1e-5).sqrt() + x)


@pytest.mark.filterwarnings("ignore:f couples rows:UserWarning")  # said of the formula
def test_batch_normalisation_updates_once_by_its_last_evaluation(solve_from_zeros, formula, rule, cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="f normalises by the statistics of the batch") as caught:
        value = solve_from_zeros(f, x, rule=rule)
    assert len(caught) == 1
    assert len(f.shown) > 3
    last = f.shown[-1]
    mean, variance = 0.1 * last.mean(dim=0), 0.9 + 0.1 * last.var(dim=0)
    found = gradients(value, f.W, x)
    assert f.norm.num_batches_tracked == 1
    torch.testing.assert_close(f.norm.running_mean, mean)
    torch.testing.assert_close(f.norm.running_var, variance)
    expected = solve_from_zeros(formula(f.W, normalised_by_hand), x, rule=rule)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, gradients(expected, f.W, x), rtol=1e-6, atol=1e-8)


def test_rules_that_evaluate_at_the_solution_leave_its_statistics(solve_from_zeros, cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="statistics of the batch"):
        value = solve_from_zeros(f, x, rule=IFT(), rtol=1e-10)
    torch.testing.assert_close(f.norm.running_mean, 0.1 * (value @ f.W.T).mean(dim=0).detach(), rtol=1e-6, atol=1e-9)


def test_batch_normalisation_keeps_out_of_backward(solve_from_zeros, cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="statistics of the batch"):
        value = solve_from_zeros(f, x, rule=fixpoint.Reversible(steps=5))
    f.norm.running_mean.fill_(7)  # by whoever had the module in between
    gradients(value, x)
    assert (f.norm.running_mean == 7).all()
    assert f.norm.num_batches_tracked == 1


WAYS = {
    "module": lambda f: f,
    "bound method": lambda f: f.forward,
    "lambda": lambda f: lambda z, x: f(z, x),
    "closure of a closure": lambda f: (lambda g: lambda z, x: g(z, x))(lambda z, x: f(z, x)),
    "partial": lambda f: functools.partial(lambda g, z, x: g(z, x), f),
    "compiled": lambda f: torch.compile(f, backend="eager"),
    "attribute of an object": lambda f: Holder(f),
    "attribute of an attribute": lambda f: Holder(Holder(f)),
    "method of an object": lambda f: Holder(f).__call__,
    "closure over an object": lambda f: (lambda held: lambda z, x: held.f(z, x))(Holder(f)),
}


class Holder:
    def __init__(self, f):
        self.f = f

    def __call__(self, z, x):
        return self.f(z, x)


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_found_whichever_way_f_holds_them(solve_from_zeros, cell_class, x, way):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="statistics of the batch"):
        solve_from_zeros(WAYS[way](f), x, rule=JFB())
    assert len(f.shown) > 3
    assert f.norm.num_batches_tracked == 1


GLOBAL = nn.Sequential(nn.Linear(2, 2))


def test_each_module_is_found_once_and_globals_by_their_names():
    assert list(modules_of(lambda z: GLOBAL(z))) == [GLOBAL, GLOBAL[0]]
    held = Holder(GLOBAL)
    held.itself = held
    assert list(modules_of(functools.partial(held, GLOBAL))) == [GLOBAL, GLOBAL[0]]
    assert list(modules_of(torch.tanh)) == []
    assert list(modules_of(nn.Linear)) == []


@pytest.mark.parametrize("case", ["eval", "one row", "another part of the model"])
def test_no_warning_where_rows_are_not_coupled(solve_from_zeros, cell_class, x, case):
    f = Normalised(cell_class(), batch_norm())
    if case == "eval":
        f.eval()
    elif case == "one row":
        f.norm, x = nn.BatchNorm1d(1, dtype=D), x.detach()[:1]
        f.forward = lambda z, x: torch.tanh(0.1 * f.norm(z[:, None]).squeeze(1) + x)
    else:
        f.forward = lambda z, x: torch.tanh(z @ f.W.T + x)
    before = copy.deepcopy(f.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_from_zeros(f, x, rule=JFB())
    if case != "one row":
        torch.testing.assert_close(f.state_dict(), before, rtol=0, atol=0)


def test_batch_normalisation_without_running_statistics_couples_rows_in_any_mode(solve_from_zeros, cell_class, x):
    f = Normalised(cell_class(), nn.BatchNorm1d(4, dtype=D, track_running_stats=False)).eval()
    nn.init.constant_(f.norm.weight, 0.2)
    with pytest.warns(UserWarning, match="statistics of the batch"):
        solve_from_zeros(f, x, rule=JFB())


def test_spectral_normalisation_is_one_map_and_steps_once(solve_from_zeros, rule, normal, x):
    layer = nn.Linear(4, 4, dtype=D)
    layer.weight.data.copy_(normal(4, 4))
    f = Normalised.__new__(Normalised)
    nn.Module.__init__(f)
    f.inner = nn.utils.parametrizations.spectral_norm(layer)
    f.forward = lambda z, x: torch.tanh(0.7 * f.inner(z) + x)
    twin = copy.deepcopy(f.inner)
    twin(x)
    gradients(solve_from_zeros(f, x, rule=rule), x)
    torch.testing.assert_close(f.inner.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_tracked_instance_normalisation_updates_once(normal):
    norm, x, shown = nn.InstanceNorm1d(3, track_running_stats=True, dtype=D), normal(2, 3, 5), []
    norm.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    fixpoint.solve(lambda z: torch.tanh(0.2 * norm(z) + x), torch.zeros_like(x), backward=None)
    assert len(shown) > 3
    torch.testing.assert_close(norm.running_mean, 0.1 * shown[-1].mean(dim=(0, 2)))


def test_rows_that_have_ended_are_left_out_in_eval_mode(normal):
    norm, sizes = nn.BatchNorm1d(2, dtype=D).eval(), []
    slope = torch.tensor([[0.0]] * 9 + [[0.95]], dtype=D)

    def f(z, slope):
        sizes.append(len(z))
        return slope * norm(z) + 1

    z0 = torch.zeros(10, 2, dtype=D)
    fixpoint.solve(f, z0, (slope,), solver=Picard(), rtol=1e-3, max_evals=200, backward=None)
    assert sizes[-2:] == [1, 10]  # the last evaluation, of all rows, confirms


def test_nothing_of_it_outlives_the_value_with_the_garbage_collector_off(solve_from_zeros, rule, cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    f._forward_pre_hooks.clear()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = solve_from_zeros(f, x, rule=rule)
        watched = weakref.ref(value)
        del value
        assert watched() is None
    finally:
        gc.enable()
