"""Every backward rule with an f that depends on more than its arguments: random numbers, statistics, autocast."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, linear

import fixpoint
from fixpoint import IFT, JFB, SHINE, Broyden, Picard
from fixpoint.surroundings import modules_of

D = torch.float64


@pytest.fixture
def x(normal):
    return normal(6, 4).requires_grad_()


def solve(f, x, *, rule, **options):
    """The value from zeros, by a copy of the rule."""
    solver = Broyden(memory=40) if isinstance(rule, SHINE) else Picard()
    options = {"solver": solver, "rtol": 1e-6, "max_evals": 200, **options}
    return fixpoint.solve(f, torch.zeros_like(x), (x,), backward=copy.deepcopy(rule), **options).value


def gradients(value, *leaves):
    return torch.autograd.grad(value.square().sum(), leaves)


class Formula(nn.Module):
    """``formula(W, z, x)`` with a parameter W: what another f should amount to."""

    def __init__(self, W, formula):
        super().__init__()
        self.W, self.formula = W, formula

    def forward(self, z, x):
        return self.formula(self.W, z, x)


# Randomness


class Dropped(nn.Module):
    """A cell behind dropout, of which it keeps the masks that it was given."""

    def __init__(self, cell, p=0.4):
        super().__init__()
        self.cell, self.p = cell, p
        self.masks = []

    def forward(self, z, x):
        mask = dropout(torch.ones_like(z), self.p)
        self.masks.append(mask)
        return mask * self.cell(z, x)


def test_one_mask_serves_a_solve_and_its_backward(rule, cell_class, x):
    f = Dropped(cell_class())
    torch.manual_seed(0)
    mask = dropout(torch.ones_like(x), f.p)
    after_one = torch.get_rng_state()
    torch.manual_seed(0)
    value = solve(f, x, rule=rule)
    assert torch.equal(torch.get_rng_state(), after_one)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    found = gradients(value, f.cell.W, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(f.masks) > 3
    assert all(torch.equal(seen, mask) for seen in f.masks)

    plain = Formula(f.cell.W, lambda W, z, x: mask * torch.tanh(z @ W.T + x))
    expected = solve(plain, x, rule=rule)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, gradients(expected, f.cell.W, x))


def test_the_next_solve_draws_another_mask(cell_class, x):
    f = Dropped(cell_class())
    with torch.no_grad():
        first, second = (solve(f, x, rule=None) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(f.masks[0], f.masks[-1])


def test_second_derivatives_see_the_mask_of_the_solve(cell_class, normal):
    f, x = Dropped(cell_class()), normal(1, 4).requires_grad_()

    def of(x):
        torch.manual_seed(3)
        return solve(f, x, rule=IFT(rtol=1e-12), rtol=1e-12)

    assert torch.autograd.gradgradcheck(of, (x,))
    assert len({tuple(mask.flatten().tolist()) for mask in f.masks}) == 1


def test_an_f_that_draws_nothing_leaves_the_random_state_as_it_was(rule, cell_class, x):
    before = torch.get_rng_state()
    gradients(solve(cell_class(), x, rule=rule), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_later_evaluation_leaves_the_state_of_one(cell_class, x):
    f = Dropped(cell_class())

    def failing(z, x):
        fz = f(z, x)
        if len(f.masks) == 3:
            raise OSError("third")
        return fz

    torch.manual_seed(0)
    dropout(torch.ones_like(x), f.p)
    after_one = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(OSError, match="third"):
        solve(failing, x, rule=None)
    assert torch.equal(torch.get_rng_state(), after_one)


def test_an_f_that_draws_sees_all_rows_though_most_have_ended(normal):
    slope, sizes = torch.tensor([[0.0]] * 9 + [[0.95]], dtype=D), []

    def f(z, slope):
        sizes.append(len(z))
        return slope * z + dropout(torch.ones_like(z))

    fixpoint.solve(f, torch.zeros(10, 2, dtype=D), (slope,), solver=Picard(), rtol=1e-3, max_evals=200)
    assert len(sizes) > 50
    assert set(sizes) == {10}


def test_a_chain_whose_steps_draw_is_one_chain(normal):
    start, masks = normal(2, 3), []

    def step(x):
        masks.append(dropout(torch.ones_like(x), 0.4))
        return masks[-1] * torch.tanh(x) + 1

    chain = fixpoint.Recurrence(step, start, steps=8)
    torch.manual_seed(0)
    value = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-10, backward=None).value
    drawn, x = masks[0].reshape(2, 8, 3), start
    assert len(masks) > 2
    for k in range(8):
        x = drawn[:, k] * torch.tanh(x) + 1
        torch.testing.assert_close(value[:, k], x, rtol=1e-8, atol=1e-9)


# Statistics


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


def test_batch_normalisation_updates_once_by_the_last_evaluation_and_warns(rule, cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="f normalises by the statistics of the batch") as caught:
        value = solve(f, x, rule=rule)
    assert [warning.filename for warning in caught] == [__file__]
    assert len(f.shown) > 3
    last = f.shown[-1]
    mean, variance = 0.1 * last.mean(dim=0), 0.9 + 0.1 * last.var(dim=0)
    found = gradients(value, f.W, x)
    assert f.norm.num_batches_tracked == 1
    torch.testing.assert_close(f.norm.running_mean, mean)
    torch.testing.assert_close(f.norm.running_var, variance)
    expected = solve(Formula(f.W, normalised_by_hand), x, rule=rule)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, gradients(expected, f.W, x), rtol=1e-6, atol=1e-8)


def test_rules_that_evaluate_at_the_solution_leave_its_statistics(cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="statistics of the batch"):
        value = solve(f, x, rule=IFT(), rtol=1e-10)
    torch.testing.assert_close(f.norm.running_mean, 0.1 * (value @ f.W.T).mean(dim=0).detach(), rtol=1e-6, atol=1e-9)


def test_batch_normalisation_keeps_out_of_backward(cell_class, x):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="statistics of the batch"):
        value = solve(f, x, rule=fixpoint.Reversible(steps=5))
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
def test_modules_are_found_whichever_way_f_holds_them(cell_class, x, way):
    f = Normalised(cell_class(), batch_norm())
    with pytest.warns(UserWarning, match="statistics of the batch"):
        solve(WAYS[way](f), x, rule=JFB())
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
def test_no_warning_where_rows_are_not_coupled(cell_class, x, case):
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
        solve(f, x, rule=JFB())
    if case != "one row":
        torch.testing.assert_close(f.state_dict(), before, rtol=0, atol=0)


def test_batch_normalisation_without_running_statistics_couples_rows_in_any_mode(cell_class, x):
    f = Normalised(cell_class(), nn.BatchNorm1d(4, dtype=D, track_running_stats=False)).eval()
    nn.init.constant_(f.norm.weight, 0.2)
    with pytest.warns(UserWarning, match="statistics of the batch"):
        solve(f, x, rule=JFB())


def test_spectral_normalisation_is_one_map_and_steps_once(rule, normal, x):
    layer = nn.Linear(4, 4, dtype=D)
    layer.weight.data.copy_(normal(4, 4))
    f = Normalised.__new__(Normalised)
    nn.Module.__init__(f)
    f.inner = nn.utils.parametrizations.spectral_norm(layer)
    f.forward = lambda z, x: torch.tanh(0.7 * f.inner(z) + x)
    twin = copy.deepcopy(f.inner)
    twin(x)
    gradients(solve(f, x, rule=rule), x)
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
    assert sizes[-1] == 1


@pytest.mark.parametrize("make", [Dropped, lambda cell: Normalised(cell, batch_norm())])
def test_nothing_of_it_outlives_the_value_with_the_garbage_collector_off(rule, cell_class, x, make):
    f = make(cell_class())
    f._forward_pre_hooks.clear()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = solve(f, x, rule=rule)
        watched = weakref.ref(value)
        del value
        assert watched() is None
    finally:
        gc.enable()


# Precision


class Mixed(nn.Module):
    """A cell with a float32 weight that notes the dtype of each product."""

    def __init__(self, cell):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.data.copy_(cell.W.data)
        self.dtypes = []

    def forward(self, z, x):
        y = self.linear(z)
        self.dtypes.append(y.dtype)
        return torch.tanh(y + x)


def low(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


LOOSE = {"rtol": 2e-2}


@pytest.mark.parametrize("backward_autocast", [False, True])
def test_backward_runs_under_the_autocast_of_forward(rule, cell_class, x, backward_autocast):
    f, x = Mixed(cell_class()), x.detach().float().requires_grad_()
    with low():
        value = solve(f, x, rule=rule, **LOOSE)
    assert value.dtype == torch.float32
    with low(backward_autocast):
        found = gradients(value, f.linear.weight, x)
    assert set(f.dtypes) == {torch.bfloat16}

    by_hand = Formula(f.linear.weight, lambda W, z, x: torch.tanh(linear(z.bfloat16(), W.bfloat16()) + x))
    expected = solve(by_hand, x, rule=rule, **LOOSE)
    torch.testing.assert_close(value, expected)
    # Autocast adds up the weight's gradients in bfloat16.
    torch.testing.assert_close(found, gradients(expected, f.linear.weight, x), rtol=1e-2, atol=1e-2)


def test_backward_within_autocast_keeps_a_solve_in_full_precision(rule, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float().requires_grad_()
    expected = gradients(solve(f, x, rule=rule, rtol=1e-5), f.linear.weight)
    value = solve(f, x, rule=rule, rtol=1e-5)
    with low():
        found = torch.autograd.grad(value, f.linear.weight, 2 * value.detach())
    assert set(f.dtypes) == {torch.float32}
    # What was recorded is differentiated under the autocast of whoever calls backward, as all of PyTorch is.
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_an_output_in_the_autocast_dtype_comes_back_in_that_of_the_state(rule, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float()
    f.forward = lambda z, x: f.linear(z) + x.bfloat16()
    with low():
        value = solve(f, x, rule=rule, **LOOSE)
    assert value.dtype == torch.float32
    assert gradients(value, f.linear.weight)[0].abs().max() > 0
    for enabled, other in ((False, torch.bfloat16), (True, torch.float64)):
        with low(enabled), pytest.raises(ValueError, match="f must keep the dtype of z0"):
            solve(lambda z, x, dtype=other: z.to(dtype), x, rule=rule)


def test_solvers_keep_out_of_autocast_in_both_directions(cell_class, x):
    seen = []

    class Watching(Picard):
        def step(self, z, fz, state):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().step(z, fz, state)

    f, x = Mixed(cell_class()), x.detach().float()
    with low():
        value = solve(f, x, rule=IFT(solver=Watching(), rtol=1e-2), solver=Watching(), **LOOSE)
        forward = len(seen)
        gradients(value, f.linear.weight)
    assert 0 < forward < len(seen)
    assert not any(seen)


def test_the_steps_of_a_chain_run_under_autocast_and_its_states_do_not(normal):
    linear, seen, in_the_loop = nn.Linear(3, 3), [], []

    def watch(_):
        in_the_loop.append(torch.is_autocast_enabled("cpu"))

    def step(x):
        seen.append((x.dtype, linear(x).dtype))
        return linear(x).to(x.dtype)

    chain = fixpoint.Recurrence(step, normal(2, 3).float(), steps=8)
    with low(), torch.no_grad():
        solver = fixpoint.CausalQuasiNewton(window=4)
        solution = fixpoint.solve(chain, solver=solver, rtol=5e-2, callback=watch)
    assert set(in_the_loop) == {False}
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert solution.value.dtype == torch.float32
    assert solution.converged.all()


def test_a_second_derivative_runs_under_the_autocast_of_forward(cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float().requires_grad_()
    with low():
        value = solve(f, x, rule=IFT(rtol=1e-2), **LOOSE)
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    gradients(gradient, f.linear.weight)
    assert set(f.dtypes) == {torch.bfloat16}


def test_a_scaled_loss_gives_the_same_step(rule, cell_class, x):
    f = Mixed(cell_class())
    plain, x = copy.deepcopy(f), x.detach().float()
    for model, enabled in ((f, True), (plain, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        with low():
            loss = solve(model, x, rule=rule, **LOOSE).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(f.linear.weight, torch.as_tensor(cell_class().W).float())
    torch.testing.assert_close(f.linear.weight, plain.linear.weight)


def test_a_scale_that_overflows_skips_the_step_and_is_lowered(rule, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float()
    before = f.linear.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    loss = solve(f, x, rule=rule, rtol=1e-5).square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fixpoint.ConvergenceWarning)
        scaler.scale(loss * 1e4).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(f.linear.weight, before)
    assert scaler.get_scale() == 2.0**126
