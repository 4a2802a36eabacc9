"""On a device the next step is made before the host waits for figures; and what rows that have ended cost."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fixpoint
from benchmarks.launches import DEVICE, Launches
from fixpoint import Anderson, Blockwise, Broyden, Picard, Status
from fixpoint.engine import loop
from fixpoint.engine.loop import iterate
from fixpoint.engine.norms import to_host
from fixpoint.engine.tolerance import Tolerance

SOLVERS = [
    Picard(),
    Picard(damping=0.5),
    fixpoint.ACX(),
    Anderson(),
    Anderson(memory=2, damping=0.7),
    Broyden(memory=3),
    Blockwise(Anderson(), blocks=3),
    fixpoint.GMRES(),
]


def slopes(rows: int, dim: int = 3) -> torch.Tensor:
    return torch.linspace(0.1, 0.95, rows * dim, dtype=torch.float64).reshape(dim, rows).T.contiguous()


def on_device(solve, *tensors):
    """Results of ``solve`` on tensors that claim to lie on a device, on the host."""
    with Launches(), torch.no_grad():
        solution = solve(*(x.to(DEVICE) for x in tensors))
        fields = solution.value, solution.residual, solution.status, solution.evals
        return *(x.cpu() for x in fields), solution.nfev


def assert_a_step_ahead_changes_nothing(solve, *tensors):
    """The results of ``solve``, which are the same when each step is made after its figures were read."""
    ahead = on_device(solve, *tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_step_ahead", lambda *_: None)
        after = on_device(solve, *tensors)
    for one, other in zip(ahead[:-1], after[:-1], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert ahead[-1] == after[-1]
    return ahead


class Counting(Picard):
    """Picard, which counts the steps that are asked for."""

    asked = 0

    def step(self, z, fz, state):
        Counting.asked += 1
        return super().step(z, fz, state)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(Counting, "asked", 0)
    return Counting()


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_nothing_is_launched_between_the_wait_for_figures_and_f(solver, check_every):
    gaps = []
    with Launches() as mode, torch.no_grad():
        slope = slopes(4, 39).to(DEVICE)

        def f(z):
            gaps.append((mode.counts - mode.at_wait).launches)
            return torch.addcmul(torch.ones_like(z), slope, z)

        options = {"max_evals": 12, "on_failure": "ignore", "backward": None, "check_every": check_every}
        fixpoint.solve(f, torch.zeros_like(slope), solver=solver, rtol=0, **options)
    after_a_check = gaps[2:] if check_every == 1 else gaps[3::3]
    assert set(after_a_check) == {0}


def swinging(slope, broken, coupled):
    """Rows that end at different evaluations; some are not finite where z is large, some are moved by others."""

    def f(z):
        image = torch.addcmul(torch.ones_like(z), slope, torch.sin(z) + 0.2 * z)
        image = torch.where((broken[:, None] > 0) & (z.abs() > 1.2), torch.nan, image)
        return image + 1e-2 * coupled * z.sum(dim=0)

    return f


@settings(max_examples=80)
@given(
    rows=st.integers(1, 5),
    solver=st.sampled_from(SOLVERS),
    seed=st.integers(0, 10**6),
    check_every=st.integers(1, 3),
    max_evals=st.integers(1, 40),
    rtol=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-5, 1e-12, 0.0]),
    breaks=st.booleans(),
    couples=st.booleans(),
    record=st.booleans(),
    stop=st.integers(1, 50),
)
def test_a_step_made_before_the_figures_are_known_changes_no_result(
    rows, solver, seed, check_every, max_evals, rtol, breaks, couples, record, stop
):
    generator = torch.Generator().manual_seed(seed)
    slope = 2.2 * torch.rand(rows, 3, generator=generator, dtype=torch.float64) - 1.2
    z0 = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    broken = torch.rand(rows, generator=generator) * breaks - 0.5
    options = {"solver": solver, "rtol": rtol, "max_evals": max_evals, "check_every": check_every, "record": record}

    def solve(slope, z0, broken):
        f = swinging(slope, broken, float(couples))
        callback = lambda progress: progress.nfev >= stop  # noqa: E731
        return fixpoint.solve(f, z0, backward=None, on_failure="ignore", callback=callback, **options)

    assert_a_step_ahead_changes_nothing(solve, slope, z0, broken)


class Noting(Picard):
    """Picard, whose state is the list of all that led to it: pairs ``(z, fz)``."""

    def init(self, z):
        return ()

    def step(self, z, fz, state):
        return super().step(z, fz, None)[0], (*state, (z.cpu(), fz.cpu()))


def test_rows_that_have_ended_are_shown_as_solved_in_a_step_made_ahead():
    with Launches(), torch.no_grad():
        slope = torch.tensor([[0.0], [0.9]]).to(DEVICE)
        tolerance = Tolerance(rtol=1e-1, atol=0.0)
        f = lambda z: slope * z + 1 + 1e-3 * (z == 1)  # noqa: E731 - f(1) is 1.001 in the first row, which converges
        found = iterate(f, torch.zeros_like(slope), Noting(), tolerance, max_evals=9)
    for z, fz in found.state[2:]:
        assert z[0] == fz[0] == 1


def test_a_row_that_goes_back_has_not_shown_the_solver_its_broken_image():
    with Launches(), torch.no_grad():
        z0 = torch.ones(1, 1).to(DEVICE)
        doubled = iter([3.0, float("nan"), 1.5, 1.25, 1.125])
        tolerance = Tolerance(rtol=0.0, atol=0.0)

        class Overshooting(Noting):
            def step(self, z, fz, state):
                return 2 * fz, super().step(z, fz, state)[1]

        found = iterate(lambda z: torch.full_like(z, next(doubled)), z0, Overshooting(), tolerance, max_evals=5)
    assert [(float(z), float(fz)) for z, fz in found.state[:2]] == [(1.0, 3.0), (1.0, 3.0)]


def test_rows_that_are_seen_to_depend_on_others_go_on_from_what_f_says_of_them_now():
    with Launches(), torch.no_grad():
        z0 = torch.zeros(2, 1).to(DEVICE)

        def f(z):  # the first row seems solved until the second one moves
            return torch.stack((0.5 * z[0] + 10 * z[1], 0.9 * z[1] + 1))

        tolerance = Tolerance(rtol=1e-3, atol=0.0)
        found = iterate(f, z0, Noting(), tolerance, max_evals=6)
    assert found.coupled
    # Shown as solved once. At the evaluation that says otherwise the step is made anew, with what f says.
    assert [z[0] == fz[0] for z, fz in found.state] == [True, False, False, False, False]
    for (_, fz), (z_next, _) in itertools.pairwise(found.state):
        assert torch.equal(z_next, fz)


@pytest.mark.parametrize("solver", [Broyden(), Anderson()], ids=repr)
def test_roots_are_those_that_are_found_without_a_step_ahead(solver):
    def solve(a, x0):
        return fixpoint.root(lambda x: x**3 + a * x - 1, x0, solver=solver, rtol=1e-8, backward=None)

    found = assert_a_step_ahead_changes_nothing(solve, 3 * slopes(5), slopes(5) - 2)
    assert (found[2] == int(Status.CONVERGED)).all()


def test_no_step_is_made_where_no_other_evaluation_can_follow(counting):
    def solve(z0):
        return fixpoint.solve(lambda z: z / 2 + 1, z0, solver=counting, rtol=0, max_evals=4, on_failure="ignore")

    on_device(solve, torch.zeros(2, 3))
    assert counting.asked == 3


def test_steps_that_autograd_records_are_not_made_ahead(counting):
    with Launches():
        slope = torch.full((2, 3), 0.5).to(DEVICE).requires_grad_()
        tolerance = Tolerance(rtol=1e-2, atol=0.0)
        found = iterate(lambda z: slope * z + 1, torch.zeros_like(slope), counting, tolerance, max_evals=30)
    assert found.z.requires_grad
    assert counting.asked == found.nfev - 1


def test_the_solvers_state_that_comes_back_is_the_one_of_the_last_step_that_was_taken():
    with Launches(), torch.no_grad():
        z0 = torch.zeros(2, 3).to(DEVICE)
        options = {"max_evals": 60, "watch": lambda nfev, *_: nfev == 5}
        found = iterate(lambda z: z / 2 + 1, z0, Noting(), Tolerance(rtol=0.0, atol=0.0), **options)
    assert found.nfev == 5
    assert len(found.state) == 4


def test_figures_that_several_leaves_must_meet_come_in_one_transfer():
    def waits(evals):
        with Launches() as mode, torch.no_grad():
            z0 = {name: torch.zeros(2, 3).to(DEVICE) for name in "abc"}
            options = {"backward": None, "max_evals": evals, "on_failure": "ignore", "norm": "leafwise"}
            fixpoint.solve(lambda z: {k: x / 2 + 1 for k, x in z.items()}, z0, solver=Picard(), rtol=0, **options)
        return mode.counts.waits

    assert waits(9) - waits(5) == 4


class Operations(TorchDispatchMode):
    """How often each operation was dispatched."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_rows_that_have_ended_cost_one_copy_of_the_state_an_evaluation(solver):
    """The solver is shown these rows as solved, and that is a copy; what it gives back is put right in place."""
    slope = torch.tensor([[0.0], [0.99]]) * torch.linspace(0.9, 1, 5000)

    def copies(evals):
        options = {"max_evals": evals, "on_failure": "ignore", "backward": None, "compact": False}
        with Operations() as mode:
            sol = fixpoint.solve(lambda z: slope * z + 1, torch.zeros(2, 5000), solver=solver, rtol=1e-7, **options)
        assert sol.evals.tolist() == [2, evals]
        return mode.names

    few, more = copies(6), copies(9)
    assert more["index_copy"] - few["index_copy"] == 3
    assert more["index_copy_"] - few["index_copy_"] == 3


@pytest.mark.parametrize("grad", [False, True])
def test_what_f_keeps_is_not_written_to_when_a_row_ends(grad):
    kept = torch.ones(2, 3, dtype=torch.float64)
    start = torch.tensor([[1 + 1e-9], [0.0]], dtype=torch.float64) * kept

    def run(f_of, z0):
        tolerance = Tolerance(rtol=1e-6, atol=0.0)
        return iterate(f_of, z0, Picard(), tolerance, max_evals=5)

    with torch.set_grad_enabled(grad):
        found = run(lambda z: kept, start.clone())
        with Launches():
            there = kept.to(DEVICE)
            run(lambda z: there, start.to(DEVICE))
            assert torch.equal(there.cpu(), torch.ones_like(kept))
    assert torch.equal(kept, torch.ones_like(kept))
    assert torch.equal(found.z[0], start[0])


@pytest.mark.parametrize("solver", [Anderson(), Anderson(memory=2), Broyden()], ids=repr)
def test_a_row_that_leaves_the_domain_of_f_recovers_as_without_a_step_ahead(solver, monkeypatch):
    """The thrown-away step has seen the broken image, in part: nothing of it may stay in the histories."""

    def solve(slope, z0):
        def f(z):
            image = 1 - slope * (1 - z) - 0.3 * (1 - z) ** 2  # from below, plain iteration stays below 1
            return torch.where(z > 1 + 1e-5, torch.nan, image)

        return fixpoint.solve(f, z0, solver=solver, rtol=1e-9, max_evals=80, on_failure="ignore", backward=None)

    went_back = []
    rows = loop._Retreat.rows

    def noted(*args):
        went_back.append(rows(*args))
        return went_back[-1]

    monkeypatch.setattr(loop._Retreat, "rows", noted)
    assert_a_step_ahead_changes_nothing(solve, slopes(6), slopes(6) - 0.2)
    assert any(lost is not None for lost in went_back)


def test_a_solver_on_a_device_is_never_shown_nan_or_infinity():
    shown = []

    class Spy(Anderson):
        def step(self, z, fz, state):
            shown.append((z.cpu(), fz.cpu()))
            return super().step(z, fz, state)

    with Launches(), torch.no_grad():
        z0 = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).to(DEVICE)
        images = iter([[[3.0, 1.0], [0.0, torch.inf]], [[torch.nan, 1.0], [0.0, 0.0]]])
        iterate(lambda z: torch.tensor(next(images)).to(DEVICE), z0, Spy(), Tolerance(rtol=0.0, atol=0.0), max_evals=9)
    assert len(shown) == 3  # after the first check twice: a row has ended there
    assert all(torch.isfinite(x).all() for pair in shown for x in pair)


def test_an_error_in_a_step_that_does_not_count_is_none():
    class Singular(Picard):
        def step(self, z, fz, state):
            if bool((z == fz).all(dim=1).any()):
                raise RuntimeError("singular")
            return super().step(z, fz, state)

    def solve(z0):
        return fixpoint.solve(lambda z: z * 0 + 1, z0, solver=Singular(), rtol=0, backward=None)

    assert on_device(solve, torch.zeros(1, 3))[2].tolist() == [Status.CONVERGED]

    class Broken(Picard):
        def step(self, z, fz, state):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        on_device(lambda z0: fixpoint.solve(lambda z: z / 2 + 1, z0, solver=Broken(), backward=None), torch.zeros(1, 3))


def test_steps_in_inference_mode_are_left_alone():
    class Inference(Picard):
        @torch.inference_mode()
        def step(self, z, fz, state):
            return (z + fz) / 2, state

    slope = torch.tensor([[0.0], [0.9]])
    sol = fixpoint.solve(lambda z: slope * z + 1, torch.zeros(2, 3), solver=Inference(), rtol=1e-3, backward=None)
    assert sol.converged.all()


class Calls:
    """Notes the order of what ``to_host`` asks of a tensor on a GPU, its stream and an event there."""

    is_cuda, requires_grad, device = True, False, "cuda:1"

    def __init__(self):
        self.log = []

    def to(self, *args, **kwargs):
        self.log.append(("copied", args, kwargs))
        return torch.ones(2)

    def record_event(self):
        self.log.append("recorded")
        return self

    def synchronize(self):
        self.log.append("waited")


def test_on_a_gpu_the_host_waits_for_the_copy_and_not_for_what_is_queued_after_it(monkeypatch):
    calls, streams = Calls(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.append(device) or calls)
    assert to_host(calls, lambda: calls.log.append("step")).tolist() == [1.0, 1.0]
    assert calls.log == [("copied", ("cpu",), {"non_blocking": True}), "recorded", "step", "waited"]
    assert streams == ["cuda:1"]


def test_meanwhile_is_called_once_and_before_the_wait():
    seen = []
    with Launches() as mode, torch.no_grad():
        x = torch.ones(3).to(DEVICE)
        numbers = to_host(x, lambda: seen.append(list(mode.waited)))
        assert len(mode.waited) == len(seen[0]) + 1
    assert len(seen) == 1
    assert numbers.tolist() == [1.0, 1.0, 1.0]
