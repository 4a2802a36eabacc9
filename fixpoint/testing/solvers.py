"""What every solver owes to the loop and to the caller."""

from __future__ import annotations

import dataclasses
import unittest
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.testing import assert_close

from fixpoint.backward.ift import IFT
from fixpoint.backward.unroll import Unroll
from fixpoint.engine.tolerance import ConvergenceWarning
from fixpoint.layer import FixedPointLayer
from fixpoint.solution import Solution
from fixpoint.solve import solve
from fixpoint.solvers.base import Solver
from fixpoint.testing.base import DIM, OptionsContract, RowMaps, normal


class SolverContract(OptionsContract):
    """Tests that every ``fixpoint.Solver`` must pass. Inherit them, and name your solver; rows have length 12.

    Attributes:
        solver: What is tested, an instance with the options that are to be tested.
        device: Where the tests run.
        dtypes: Precisions that the solver promises to work in.
        scale_invariant: Whether a problem times 1e-6 or 1e6 takes the same evaluations.
        compiles: Whether ``torch.compile`` takes a step as one graph.
        affine_only: Whether the solver promises something for affine maps only, such as an adjoint's.

    Example:
        >>> import fixpoint, fixpoint.testing
        >>> class TestDampedPicard(fixpoint.testing.SolverContract):
        ...     solver = fixpoint.Picard(damping=0.5)
        >>> TestDampedPicard().test_a_row_depends_on_no_other_row()
    """

    solver: ClassVar[Solver]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    scale_invariant: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    affine_only: ClassVar[bool] = False

    def subject(self) -> Solver:
        return self.solver

    def test_it_is_a_solver(self) -> None:
        assert isinstance(self.solver, Solver), f"solver must be an instance of fixpoint.Solver, found {self.solver!r}"

    # What it computes

    def test_contractions_are_solved_to_their_closed_form(self) -> None:
        f = self._maps()
        solution = self._solve(f, rtol=1e-10)
        assert_close(solution.value, f.solution(), rtol=1e-7, atol=1e-8)
        self._check_residual(f, solution)

    def test_one_evaluation_and_two_are_enough_to_return_what_was_seen(self) -> None:
        f = self._maps()
        for max_evals in (1, 2):
            solution = self._solve(f, max_evals=max_evals, on_failure="ignore")
            assert solution.nfev == max_evals, f"{solution.nfev} evaluations, of {max_evals} granted"
            self._check_residual(f, solution)

    def test_a_fixed_depth_is_so_many_steps_and_evaluations(self) -> None:
        f, seen = self._maps(), []

        def counted(z: Tensor) -> Tensor:
            seen.append(z)
            return f(z)

        for depth in (1, 2, 5):
            seen.clear()
            value = solve(counted, f.z0, solver=self.solver, backward=None, depth=depth).value
            assert len(seen) == depth, f"{len(seen)} evaluations at depth {depth}"
            assert_close(value, list(self._iterates(f, depth))[-1], rtol=0, atol=0)

    def test_every_precision_keeps_its_dtype_and_is_solved(self) -> None:
        for dtype in self.dtypes:
            f = self._maps(rate=0.6, bent=True).to(dtype)
            for z in self._iterates(f, 8):
                found, expected = (z.shape, z.dtype, z.device), (f.z0.shape, dtype, f.z0.device)
                assert found == expected, f"a step must keep shape, dtype and device {expected}, found {found}"
            self._solve(f, rtol=16 * torch.finfo(dtype).eps)

    def test_scale_changes_nothing_but_the_scale(self) -> None:
        if not self.scale_invariant:
            raise unittest.SkipTest("scale_invariant is False")
        f = self._maps()
        plain = self._solve(f, rtol=1e-7)
        for scale in (1e-6, 1e6):
            scaled = self._solve(f.scaled(scale), rtol=1e-7)
            found, expected = scaled.evals.tolist(), plain.evals.tolist()
            assert found == expected, f"{found} evaluations at scale {scale}, {expected} at scale 1"
            assert_close(scaled.value / scale, plain.value, rtol=1e-6, atol=1e-7)

    # Rows

    def test_a_row_depends_on_no_other_row(self) -> None:
        f = self._maps(rows=6, rate=0.9, bent=True)
        steps, whole = list(self._iterates(f, 5)), self._solve(f)
        for index in ([5, 3, 1, 0, 2, 4], [2], [0, 4], [1, 1, 3]):
            for found, expected in zip(self._iterates(f.rows(index), 5), steps, strict=True):
                assert_close(found, expected[index], rtol=1e-9, atol=1e-10)
            self._check_same_rows(self._solve(f.rows(index)), whole, index)

    def test_a_broken_huge_or_tiny_row_harms_no_other(self) -> None:
        good = self._maps(rate=0.9)
        steps, whole = list(self._iterates(good, 8)), self._solve(good)
        for rate, size in ((torch.nan, 1), (torch.inf, 1), (1e200, 1), (0.5, 1e155), (0.5, 1e-155), (0.5, 0)):
            f = good.rows([0, 1, 0, 2, 3])
            f.rate[2], f.offset[2] = rate, size * f.offset[2]
            # Between two looks of the loop a step is shown NaN and infinity.
            for found, expected in zip(self._iterates(f, 8), steps, strict=True):
                assert_close(found[[0, 1, 3, 4]], expected, rtol=1e-9, atol=1e-10)
            solution = self._solve(f, on_failure="ignore")
            self._check_same_rows(whole, solution, [0, 1, 3, 4])
            assert bool(torch.isfinite(solution.value).all()), f"a row of rate {rate} and size {size} ends non-finite"

    def test_the_next_step_of_a_forgotten_row_needs_no_earlier_one(self) -> None:
        f, rows = self._maps(rate=0.9, bent=True), torch.tensor([True, False, False, True], device=self.device)
        z = list(self._iterates(f, 5))[-1]
        found = []
        for start in (f.z0, f.z0 + 1):
            at, state = start, self.solver.init(start)
            for _ in range(5):
                at, state = self.solver.step(at, f(at), state)
            forgotten = self.solver.forget(state, rows)
            if forgotten is None:  # it cannot
                return
            proposal = self.solver.step(z, f(z), forgotten)[0]
            assert_close(proposal[~rows], self.solver.step(z, f(z), state)[0][~rows], rtol=1e-9, atol=1e-10)
            found.append(proposal[rows])
        assert_close(
            *found, rtol=1e-9, atol=1e-10, msg=lambda text: f"forget() leaves something of the earlier steps: {text}"
        )

    def test_a_plain_step_stays_at_a_fixed_point(self) -> None:
        solved = self._solve(self._maps()).value
        assert_close(self.solver.plain(solved), solved, rtol=0, atol=0)

    def test_rows_that_are_solved_get_finite_proposals(self) -> None:
        f = self._maps()
        solved_from = torch.tensor([0, 1, 4, 99], device=self.device)[:, None]
        for start in (f.z0, f.z0 + 1):
            z, state = start, self.solver.init(start)
            for step in range(25):
                done = step >= solved_from
                proposal, state = self.solver.step(z, torch.where(done, z, f(z)), state)
                assert bool(torch.isfinite(proposal).all()), f"step {step}: NaN or infinity where f(z) is z, or was"
                z = torch.where(done, z, proposal)

    # Manners

    def test_what_it_is_shown_is_not_written_to(self) -> None:
        f, shown = self._maps(), []
        z, state = f.z0, self.solver.init(f.z0)
        for _ in range(8):
            fz = f(z)
            shown += [(z, z.clone()), (fz, fz.clone())]
            z, state = self.solver.step(z, fz, state)
        assert all(torch.equal(now, before) for now, before in shown), "z, f(z) or an earlier proposal was overwritten"

    def test_what_it_returns_may_be_written_to(self) -> None:
        f = self._maps(bent=True)
        expected = list(self._iterates(f, 8))
        for _ in range(2):
            z, state = f.z0, self.solver.init(f.z0)
            for proposal in expected:
                z, state = self.solver.step(z, f(z), state)
                assert_close(z[1:], proposal[1:], rtol=1e-9, atol=1e-10)
                z[0] = f.z0[0]
        kept = all(torch.equal(a, b) for a, b in zip(expected, self._iterates(f, 8), strict=True))
        assert kept, "what was written into an earlier proposal comes back: return a tensor that is used nowhere else"

    def test_what_it_remembers_travels_in_the_state(self) -> None:
        one, two = self._maps(), self._maps(seed=2)
        alone = list(self._iterates(one, 8)), list(self._iterates(two, 8))
        turns = zip(self._iterates(one, 8), self._iterates(two, 8), strict=True)
        same = [torch.equal(a, b) and torch.equal(c, d) for (a, c), b, d in zip(turns, *alone, strict=True)]
        assert all(same), "two solves taken in turns disturb each other: keep nothing outside the state"

    def test_a_state_can_be_stepped_from_again(self) -> None:
        f = self._maps(bent=True)
        expected = list(self._iterates(f, 30))
        z, state = f.z0, self.solver.init(f.z0)
        for index, proposal in enumerate(expected):
            fz = f(z)
            self.solver.step(z, fz + 1, state)
            tried, _ = self.solver.step(z, fz, state)
            again, following = self.solver.step(z, fz, state)
            assert torch.equal(tried, again), f"step {index} twice from one state: two proposals"
            assert torch.equal(again, proposal), f"step {index} proposes something else after another was tried"
            z, state = again, following

    def test_the_same_solve_gives_the_same_numbers(self) -> None:
        f, before = self._maps(), torch.get_rng_state()
        first, again = list(self._iterates(f, 8)), list(self._iterates(f, 8))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "two equal runs differ"
        assert torch.equal(torch.get_rng_state(), before), "the global random state was read or set"

    def test_a_step_does_not_wait_for_the_device(self) -> None:
        z = torch.zeros(3, DIM, device="meta")  # tensors without values: whoever asks for one fails
        try:
            state = self.solver.init(z)
            for _ in range(8):
                z, state = self.solver.step(z, torch.zeros_like(z), state)
        except (RuntimeError, TypeError) as error:
            raise AssertionError(
                f"a step must not ask for values (.item(), if tensor:, nonzero, .cpu()): {error}"
            ) from error

    # At work

    def test_it_serves_in_a_layer_and_in_the_adjoint(self) -> None:
        f, weights = self._maps(rate=0.5), normal(4, DIM, seed=3).to(self.device)
        b = f.offset.clone().requires_grad_()
        options: dict[str, Any] = {"rtol": 1e-9, "max_evals": 400}
        layer = FixedPointLayer(
            lambda z, b: dataclasses.replace(f, offset=b)(z),
            solver=self.solver,
            backward=IFT(solver=self.solver, **options),
            on_failure="raise",
            **options,
        )
        value = layer(b)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            (found,) = torch.autograd.grad(value, b, weights)
        assert_close(value, f.solution(), rtol=1e-6, atol=1e-7)
        assert_close(found, dataclasses.replace(f, offset=weights).solution(transposed=True), rtol=1e-6, atol=1e-7)

    def test_gradients_through_its_steps_are_right(self) -> None:
        f = self._maps(rows=2, bent=True)

        def third_state(b: Tensor) -> Tensor:
            g = dataclasses.replace(f, offset=b)
            return solve(g, f.z0, solver=self.solver, depth=3, backward=Unroll()).value

        assert torch.autograd.gradcheck(third_state, (f.offset.clone().requires_grad_(),))

    def test_a_step_compiles_as_one_graph(self) -> None:
        if not self.compiles:
            raise unittest.SkipTest("compiles is False")
        f = self._maps(bent=True)
        torch.compiler.reset()  # a step compiled before, with other options, would count against the limit of versions
        step = torch.compile(self.solver.step, fullgraph=True, backend="eager")
        z, state = f.z0, self.solver.init(f.z0)
        for expected in self._iterates(f, 4):
            z, state = step(z, f(z), state)
            assert_close(z, expected, rtol=1e-9, atol=1e-10)

    def _maps(self, rows: int = 4, *, bent: bool = False, **options: Any) -> RowMaps:
        """Contractions; nonlinear ones if ``bent``, unless the solver is for affine maps only."""
        if bent and not self.affine_only:
            options["squash"] = torch.tanh
        return RowMaps.make(rows, **options).to(self.device)

    def _solve(self, f: RowMaps, **options: Any) -> Solution:
        defaults: dict[str, Any] = {"rtol": 1e-8, "max_evals": 400, "on_failure": "raise", "backward": None}
        return solve(f, solver=self.solver, **{**defaults, **options})

    def _iterates(self, f: RowMaps, count: int) -> Iterator[Tensor]:
        z, state = f.z0, self.solver.init(f.z0)
        for _ in range(count):
            z, state = self.solver.step(z, f(z), state)
            yield z

    def _check_residual(self, f: RowMaps, solution: Solution) -> None:
        expected = torch.linalg.vector_norm(f(solution.value) - solution.value, dim=1)
        assert_close(solution.residual, expected, rtol=1e-9, atol=1e-12)

    def _check_same_rows(self, part: Solution, whole: Solution, index: list[int]) -> None:
        assert_close(part.value, whole.value[index], rtol=1e-9, atol=1e-10)
        found, expected = part.evals.tolist(), whole.evals[index].tolist()
        assert found == expected, f"rows {index} took {found} evaluations, and {expected} among others"
