"""solve(): options, bad input, failures, callbacks, problems."""

from __future__ import annotations

import itertools
import logging
import pickle
import warnings

import pytest
import torch

import fixpoint
from fixpoint import Anderson, ConvergenceError, ConvergenceWarning, Picard, Status


def halve(z):
    return 0.5 * z + 1


def test_arguments_are_passed_after_the_state():
    sol = fixpoint.solve(lambda z, a, b: a * z + b, torch.zeros(2), (0.5, torch.tensor([1.0, 2.0])), rtol=1e-6)
    torch.testing.assert_close(sol.value, torch.tensor([2.0, 4.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"max_evals": 1}, {"depth": 0}, {"depth": 1}], ids=str)
def test_the_value_shares_no_memory_with_the_callers_z0(options):
    z0 = torch.ones(2, 3)
    fixpoint.solve(lambda z: z, z0, **options).value.add_(1)
    assert torch.equal(z0, torch.ones(2, 3))


# Bad input


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), TypeError, r"z0 must be floating point or complex: z is torch.int64"),
        (torch.zeros(2, dtype=torch.bool), TypeError, "torch.bool"),
        (torch.tensor([0.0, torch.nan]), ValueError, "z0 must be finite: z holds NaN or infinity"),
        (torch.tensor([0.0, torch.inf]), ValueError, "z0 must be finite"),
        ({"a": torch.zeros(2), "b": 1.0}, TypeError, r"z\['b'\] is a float"),
        ((), ValueError, "z0 holds no tensor"),
        ((torch.zeros(2, 1), torch.zeros(3, 1)), ValueError, r"z\[0\] has \(2,\), z\[1\] has \(3,\)"),
        ((torch.zeros(2), torch.zeros(2).double()), TypeError, "torch.float32 on cpu, .*torch.float64"),
        (None, TypeError, "z0 is missing"),
    ],
)
def test_a_start_that_cannot_work_raises_before_f_is_called(counted, z0, error, message):
    f = counted(lambda z: z)
    with pytest.raises(error, match=message):
        fixpoint.solve(f, z0)
    assert f.calls == 0


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[:, :2], ValueError, r"keep the shape of z0: z came back as \(2, 2\), expected \(2, 3\)"),
        (
            lambda z: z.double(),
            ValueError,
            "the dtype of z0: z came back as torch.float64, expected torch.float32",
        ),
        (lambda z: z.to("meta"), ValueError, "keep the device of z0: z came back as meta, expected cpu"),
        (lambda z: (z, z), TypeError, "structure of z0: at z found tuple, not a Tensor"),
        (lambda z: None, TypeError, "found NoneType"),
        (lambda z: z.mul_(0.5).add_(1), ValueError, "changed its input in place"),
        (lambda z: z.relu_() * 0.5, ValueError, "changed its input in place"),  # leaves zeros as they are
        (lambda z: z.data.add_(1) * 0.5, ValueError, "changed its input in place"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_cannot_work_raises_at_the_first_evaluation(counted, f, error, message, grad):
    f = counted(f)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        fixpoint.solve(f, torch.zeros(2, 3))
    assert f.calls == 1


@pytest.mark.parametrize(
    ("z0", "f", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, lambda z: {"a": z["a"]}, r"found \['a'\], expected \['a', 'b'\]"),
        ((torch.zeros(2), torch.zeros(2)), lambda z: (z[0],), "found 1 entries, expected 2"),
        ([torch.zeros(2)], lambda z: z[0], "found Tensor, expected 1"),
        ({"a": (torch.zeros(2),)}, lambda z: {"a": z["a"][0]}, r"at z\['a'\] found Tensor"),
    ],
)
def test_another_structure_raises_with_the_place_where_it_differs(z0, f, message):
    with pytest.raises(TypeError, match=message):
        fixpoint.solve(f, z0)


class Detached(torch.nn.Linear):
    def forward(self, z):
        return super().forward(z).detach()


def test_an_output_cut_off_from_what_requires_grad_raises():
    with pytest.raises(ValueError, match="does not depend on what requires grad"):
        fixpoint.solve(Detached(3, 3), torch.zeros(2, 3))
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on what requires grad"):
        fixpoint.solve(lambda z, x: 0.5 * z + x["in"].detach(), torch.zeros(2, 3), ({"in": x},))


def test_a_cut_off_output_is_accepted_when_no_gradient_is_asked_for():
    assert not fixpoint.solve(Detached(3, 3), torch.zeros(2, 3), backward=None, depth=1).value.requires_grad
    with torch.no_grad():
        fixpoint.solve(Detached(3, 3), torch.zeros(2, 3), depth=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "anderson"}, TypeError, "solver must be a fixpoint.Solver .* found 'anderson'"),
        ({"solver": Anderson}, TypeError, "solver must be a fixpoint.Solver"),
        ({"backward": "ift"}, TypeError, "backward must be a fixpoint.Backward .* found 'ift'"),
        ({"max_evals": 0}, ValueError, "max_evals must be at least 1, found 0"),
        ({"max_evals": None}, TypeError, "max_evals must be an integer, found None"),
        ({"max_evals": 10.5}, TypeError, "max_evals must be an integer, found 10.5"),
        ({"check_every": 0}, ValueError, "check_every must be at least 1, found 0"),
        ({"depth": -1}, ValueError, "depth must be at least 0, found -1"),
        ({"on_failure": "explode"}, ValueError, "on_failure must be one of .* found 'explode'"),
        ({"rtol": -1.0}, ValueError, "rtol must be at least 0, found -1.0"),
        ({"rtol": float("nan")}, ValueError, "rtol must be at least 0, found nan"),
        ({"atol": -1.0}, ValueError, "atol must be at least 0, found -1.0"),
        ({"batch_dims": 3}, ValueError, r"batch_dims=3, but z has shape \(2, 3\)"),
        ({"batch_dims": -1}, ValueError, "batch_dims must be at least 0, found -1"),
        ({"tol": 1e-3}, TypeError, "tol"),
    ],
)
def test_illegal_and_unknown_options_raise_before_f_is_called(counted, options, error, message):
    f = counted(halve)
    with pytest.raises(error, match=message):
        fixpoint.solve(f, torch.zeros(2, 3), **options)
    assert f.calls == 0


# Failure


def test_failure_warns_in_one_line_with_how_many_rows_why_and_what_to_change():
    slope = torch.tensor([[0.1], [0.999], [0.999], [1e30]])
    with pytest.warns(ConvergenceWarning) as caught:
        fixpoint.solve(lambda z: slope * z + 1, torch.ones(4, 1), solver=Picard(), max_evals=20)
    (message,) = [str(w.message) for w in caught]
    assert caught[0].filename == __file__
    assert "\n" not in message
    for part in ("3 of 4 rows", "20 evaluations", "2 MAX_EVALS (raise max_evals", "1 NON_FINITE (f returned NaN"):
        assert part in message
    again = pickle.loads(pickle.dumps(caught[0].message))  # as between processes
    assert (type(again), str(again)) == (ConvergenceWarning, message)


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr("fixpoint.engine.warning._said", {})


@pytest.mark.usefixtures("nothing_said")
def test_a_training_is_warned_once_of_each_cause_and_place_by_pythons_default_filter():
    def epoch(slopes):
        for rows in range(1, 4):  # another number of rows at every step
            slope = torch.tensor(slopes[:rows] * 4)[:, None]
            fixpoint.solve(lambda z, s=slope: s * z + 1, torch.ones(len(slope), 1), solver=Picard(), max_evals=20)
            with warnings.catch_warnings():  # as libraries do; Python then forgets what it has shown
                pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", ConvergenceWarning)
        for _ in range(2):
            epoch([0.999, 0.9, 0.5])
            epoch([1e30, 0.0, 0.0])
    assert ["MAX_EVALS" in str(w.message) for w in caught] == [True, False]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        epoch([0.999, 0.9, 0.5])
    assert [str(w.message).partition(" of ")[0] for w in caught] == ["4", "8", "8"]


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize(("action", "shown"), [("default", 2), ("module", 1), ("once", 1), ("always", 4)])
def test_each_filter_shows_a_cause_as_often_as_it_says(action, shown):
    solve = "fixpoint.solve(lambda z: 0.999 * z + 1, torch.ones(rows, 1), solver=fixpoint.Picard(), max_evals=3)"
    code = f"for rows in (1, 2):\n    {solve}\nfor rows in (3, 4):\n    {solve}"
    cell = {"__name__": "__main__", "fixpoint": fixpoint, "torch": torch}
    for again in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action, ConvergenceWarning)
            exec(compile(code, f"a cell with {action}", "exec"), cell)
        assert len(caught) == (0 if action == "once" and again == 2 else shown)
        cell.pop("__warningregistry__", None)  # as IPython does before the next cell


@pytest.mark.parametrize("scope", [{}, {"__name__": None}, {"__name__": "fixpoints"}], ids=repr)
def test_code_of_any_name_is_warned_of_at_its_own_line(scope):
    call = "fixpoint.solve(lambda z: 0.999 * z + 1, torch.ones(1, 1), max_evals=1)"
    with pytest.warns(ConvergenceWarning) as caught:
        exec(compile(f"\n\n{call}", "code of any name", "exec"), {"fixpoint": fixpoint, "torch": torch, **scope})
    assert [(w.filename, w.lineno) for w in caught] == [("code of any name", 3)]


CALLS = {
    "solve": lambda f, z: fixpoint.solve(f, z, (z,)),
    "layer": lambda f, z: fixpoint.FixedPointLayer(f)(z),
    "root": lambda f, z: fixpoint.root(lambda z, x: z - f(z, x), z, (z,)),
    "attach": lambda f, z: fixpoint.attach(f, z, (z,)),
}


@pytest.mark.parametrize(
    ("fault", "call"),
    [
        *(("normalises by the statistics", name) for name in ("solve", "layer", "root")),
        *(("not as far as autograd can see", name) for name in ("solve", "layer", "attach")),
    ],
)
def test_whatever_is_called_the_warning_stands_at_the_callers_line(fault, call):
    normal, weight = torch.nn.BatchNorm1d(3), torch.tensor(0.1, requires_grad=True)

    def f(z, x):
        return 0.1 * normal(z) + x if "normalises" in fault else weight * torch.cos(z.detach()) + x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[call](f, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    found = [(w.filename, w.lineno) for w in caught if fault in str(w.message)]
    assert found == [(__file__, CALLS[call].__code__.co_firstlineno)]


def test_failure_raises_with_the_solution_when_asked_to():
    with pytest.raises(ConvergenceError, match="2 of 2 rows did not converge in 3 evaluations") as caught:
        fixpoint.solve(halve, torch.zeros(2, 1), solver=Picard(), rtol=1e-9, max_evals=3, on_failure="raise")
    assert caught.value.solution.nfev == 3
    torch.testing.assert_close(caught.value.solution.value, torch.full((2, 1), 1.5))


def test_failure_is_silent_when_ignored_and_success_always():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixpoint.solve(halve, torch.zeros(2, 1), max_evals=1, on_failure="ignore")
        fixpoint.solve(halve, torch.zeros(2, 1), on_failure="raise")
        fixpoint.solve(halve, torch.zeros(2, 1), depth=1, on_failure="raise")


def test_nothing_is_printed_or_logged(capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        fixpoint.solve(halve, torch.zeros(2, 1))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# Watching


def test_callback_sees_every_evaluation_with_its_figures():
    seen = []
    z0 = {"a": torch.zeros(2, 3, 2)}
    sol = fixpoint.solve(
        lambda z: {"a": halve(z["a"])}, z0, solver=Picard(), batch_dims=2, record=True, callback=seen.append, rtol=1e-3
    )
    assert [p.nfev for p in seen] == list(range(1, sol.nfev + 1))
    assert {p.max_evals for p in seen} == {100}
    assert [p.active for p in seen] == [6] * (sol.nfev - 1) + [0]
    torch.testing.assert_close(torch.stack([p.residual for p in seen]), sol.trace)
    torch.testing.assert_close(seen[1].value["a"], torch.ones(2, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_callback_may_write_to_the_figures_that_it_is_shown(dtype):
    options = {"solver": Picard(), "rtol": 1e-6, "record": True}
    alone = fixpoint.solve(halve, torch.zeros(2, 1, dtype=dtype), **options)
    watched = fixpoint.solve(
        halve, torch.zeros(2, 1, dtype=dtype), callback=lambda p: p.residual.zero_().any(), **options
    )
    for name in ("value", "residual", "status", "trace"):
        torch.testing.assert_close(getattr(watched, name), getattr(alone, name), rtol=0, atol=0)


@pytest.mark.parametrize("check_every", [1, 3, 8])
@pytest.mark.parametrize("other", [lambda y: y[0], lambda y: y[:1], lambda y: y[:, :2]])
def test_a_later_image_of_another_shape_is_refused(check_every, other):
    evaluations = itertools.count(1)

    def f(z):
        image = 0.5 * z + 1
        return other(image) if next(evaluations) == 5 else image

    with pytest.raises(RuntimeError, match=r"shape '\[3, 3\]' is invalid"):
        fixpoint.solve(f, torch.zeros(3, 3), solver=Picard(), rtol=1e-9, check_every=check_every)


def test_callback_stops_the_solve_by_returning_true():
    sol = fixpoint.solve(
        halve, torch.zeros(2, 1), rtol=1e-9, solver=Picard(), callback=lambda p: p.nfev == 4, on_failure="ignore"
    )
    assert sol.nfev == 4
    assert (sol.status == Status.STOPPED).all()
    assert "raise max_evals" not in sol.failure_message()


def test_callback_is_called_after_the_first_evaluation_and_once_in_check_every():
    seen = []
    sol = fixpoint.solve(halve, torch.zeros(1, 1), solver=Picard(), rtol=1e-6, check_every=4, callback=seen.append)
    assert [p.nfev for p in seen] == [1, *range(4, sol.nfev + 1, 4)]


def test_trace_has_one_residual_for_each_evaluation_and_row(contraction):
    f = contraction(rho=0.9, squash=torch.tanh)
    states = []
    sol = fixpoint.solve(f, solver=Anderson(), rtol=1e-8, record=True, callback=lambda p: states.append(p.value))
    assert sol.trace.shape == (sol.nfev, 4)
    for row in range(4):
        end = int(sol.evals[row])
        for z, residual in zip(states[:end], sol.trace[:end, row], strict=True):
            torch.testing.assert_close(residual, torch.linalg.vector_norm((f(z) - z)[row]), rtol=1e-9, atol=1e-14)
        assert (sol.trace[end - 1 :, row] == sol.residual[row]).all()


@pytest.mark.parametrize("depth", [0, 3])
def test_trace_of_a_fixed_depth_run_has_depth_entries(depth):
    sol = fixpoint.solve(halve, torch.zeros(2, 3, 1), batch_dims=2, depth=depth, solver=Picard(), record=True)
    assert sol.trace.shape == (depth, 2, 3)
    if depth:
        torch.testing.assert_close(sol.trace[:, 0, 0], torch.tensor([1.0, 0.5, 0.25]))


def test_without_record_there_is_no_trace():
    assert fixpoint.solve(halve, torch.zeros(2, 1)).trace is None


# Problems


class Problem:
    def __init__(self):
        self.z0 = {"x": torch.zeros(2, 3, 4)}

    def __call__(self, z):
        return {"x": halve(z["x"])}


def test_a_problem_brings_its_start():
    sol = fixpoint.solve(Problem(), rtol=1e-6)
    assert sol.converged.shape == (2,)
    torch.testing.assert_close(sol.value["x"], torch.full((2, 3, 4), 2.0))


def test_a_problem_brings_its_batch_dims_unless_the_caller_says_otherwise():
    problem = Problem()
    problem.batch_dims = 2
    assert fixpoint.solve(problem).converged.shape == (2, 3)
    assert fixpoint.solve(problem, batch_dims=0).converged.shape == ()
    assert fixpoint.solve(problem, {"x": torch.ones(5, 1, 1)}).converged.shape == (5, 1)


def test_a_problem_brings_its_norm():
    problem = Problem()
    problem.norm = lambda z: z["x"].abs().amax(dim=(1, 2))
    sol = fixpoint.solve(problem, solver=Picard(), max_evals=1, on_failure="ignore")
    assert sol.residual.tolist() == [1.0, 1.0]
    assert fixpoint.solve(Problem(), max_evals=1, on_failure="ignore").residual[0] == pytest.approx(12**0.5)


def test_a_modules_layer_called_norm_is_not_taken_for_a_norm():
    module = torch.nn.Linear(3, 3)
    module.norm, module.z0 = torch.nn.LayerNorm(3), torch.zeros(2, 3)
    with torch.no_grad():
        sol = fixpoint.solve(module, depth=1)
    assert sol.converged.shape == (2,)


# Randomness and modes


def test_the_global_random_state_is_neither_read_nor_moved(contraction, all_solvers):
    f = contraction(squash=torch.tanh)
    before = torch.get_rng_state()
    for solver in all_solvers:
        fixpoint.solve(f, solver=solver)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_free_modes_solve_without_a_graph_and_without_extra_evaluations(counted, mode):
    layer = torch.nn.Linear(3, 3)
    f = counted(lambda z: torch.tanh(0.3 * layer(z)))
    with mode():
        sol = fixpoint.solve(f, torch.zeros(2, 3))
    assert not sol.value.requires_grad
    assert f.calls == sol.nfev
    assert sol.converged.all()


def test_backward_none_detaches():
    w = torch.tensor(0.5, requires_grad=True)
    z0 = torch.zeros(2, requires_grad=True)
    for options in ({}, {"depth": 0}, {"depth": 2}):
        assert not fixpoint.solve(lambda z: w * z + 1, z0, backward=None, **options).value.requires_grad
