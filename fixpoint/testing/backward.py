"""What every backward rule owes to whoever trains with it."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import ConvergenceWarning, Status
from fixpoint.solution import Solution
from fixpoint.solve import solve
from fixpoint.solvers.base import Solver
from fixpoint.solvers.picard import Picard
from fixpoint.testing.base import DIM, OptionsContract, contraction, normal


class _Affine(nn.Module):
    """``f(z, x) = z W^T + x + shift`` with a parameter W of norm 0.6, an argument x and a closure ``shift``."""

    def __init__(self, rows: Sequence[int] = range(4), dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        super().__init__()
        index = list(rows)
        self.weight = nn.Parameter((0.6 * contraction()).to(device, dtype))
        self.x = normal(4, DIM, seed=1)[index].to(device, dtype).requires_grad_()
        self.shift = normal(DIM, seed=2).to(device, dtype).requires_grad_()
        # Not zero, so that the weight has a gradient from the first evaluation on.
        self.z0 = normal(4, DIM, seed=3)[index].to(device, dtype)
        self.incoming = normal(4, DIM, seed=4)[index].to(device, dtype)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.weight.T + x + self.shift

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"argument": self.x, "parameter": self.weight, "closure": self.shift}

    def exact(self) -> Tensor:
        """The fixed point in closed form, differentiable in all leaves."""
        eye = torch.eye(DIM, dtype=self.weight.dtype, device=self.weight.device)
        return torch.linalg.solve(eye - self.weight, (self.x + self.shift).T).T


@dataclass(frozen=True)
class _Watched(Backward):
    """A rule, and what its ``attach`` returned."""

    rule: Backward
    returned: list[Any] = field(default_factory=list)

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        self.returned.append(self.rule.attach(run))
        return self.returned[-1]


class BackwardContract(OptionsContract):
    """Tests that every ``fixpoint.Backward`` must pass. Inherit them, and name your rule.

    Each solve is given a copy of the rule, so that one with a generator draws the same numbers every time.

    Attributes:
        backward: What is tested, an instance with the options that are to be tested.
        device: Where the tests run.
        dtypes: Precisions that the rule promises to work in.
        exact: Whether the gradient is the fixed point's own, to a relative 1e-4. If not, the tests ask that its inner
            product with the exact one is positive on a contraction.
        solver: Solver of the forward solves, for a rule that asks for one.

    Example:
        >>> import fixpoint, fixpoint.testing
        >>> class TestTwoPhantomSteps(fixpoint.testing.BackwardContract):
        ...     backward = fixpoint.Phantom(steps=2)
        >>> TestTwoPhantomSteps().test_gradients_reach_arguments_parameters_and_closures()
    """

    backward: ClassVar[Backward]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    exact: ClassVar[bool] = False
    # The one solver that converges as fast when it is differentiated.
    solver: ClassVar[Solver] = Picard()

    def subject(self) -> Backward:
        return self.backward

    def test_it_is_a_backward_rule(self) -> None:
        assert isinstance(self.backward, Backward), (
            f"backward must be an instance of fixpoint.Backward, found {self.backward!r}"
        )

    def test_value_and_figures_are_those_of_the_solve(self) -> None:
        f, rule = self._problem(), _Watched(copy.deepcopy(self.backward))
        value = self._solve(f, backward=rule).value
        (returned,) = rule.returned
        assert returned[0].requires_grad, "attach returned a value that does not require grad"
        found, expected = (value.shape, value.dtype), (f.z0.shape, f.z0.dtype)
        assert found == expected, f"attach must keep shape and dtype {expected}, found {found}"
        result = returned[1]
        assert isinstance(result, LoopResult), f"attach must return (value, result), found a {type(result)}"
        known = ~result.residual.isnan()  # NaN: nobody has evaluated that state
        residual = torch.linalg.vector_norm(f(result.z, f.x) - result.z, dim=1)
        assert_close(result.residual[known], residual[known].detach(), rtol=1e-9, atol=1e-12)
        done = result.status == Status.CONVERGED
        assert_close(value[done], f.exact()[done], rtol=1e-7, atol=1e-8)

    def test_every_precision_is_kept(self) -> None:
        for dtype in self.dtypes:
            f = self._problem(dtype=dtype)
            value = self._solve(f, rtol=16 * torch.finfo(dtype).eps).value
            assert value.dtype == dtype, f"the value must be {dtype}, found {value.dtype}"
            self._check_descent(self._gradients(f, value))

    # Gradients

    def test_gradients_reach_arguments_parameters_and_closures(self) -> None:
        f = self._problem()
        found = self._gradients(f, self._solve(f).value)
        for name, gradient in found.items():
            assert gradient is not None, f"no gradient reaches the {name}"
        if self.exact:
            assert_close(found, self._exact_gradients(), rtol=1e-4, atol=1e-5)
        self._check_descent(found)

    def test_a_row_depends_on_no_other_row(self) -> None:
        # Rounding, which depends on the size of the batch, reaches the slopes of secants by 1e-16 / rtol.
        f, rtol = self._problem(), 1e-6
        value = self._solve(f, rtol=rtol).value
        found = self._gradients(f, value)["argument"]
        for index in ([2, 0, 3, 1], [1]):
            part = self._problem(rows=index)
            part_value = self._solve(part, rtol=rtol).value
            assert_close(part_value, value[index], rtol=1e-9, atol=1e-10)
            assert_close(self._gradients(part, part_value)["argument"], found[index], rtol=1e-7, atol=1e-8)

    def test_a_non_finite_incoming_gradient_spoils_its_row_alone(self) -> None:
        f = self._problem()
        clean = self._gradients(f, self._solve(f).value)["argument"]
        f.incoming[1, 2] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            spoilt = self._gradients(f, self._solve(f).value)["argument"]
        assert_close(spoilt[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-7, atol=1e-8)

    # Graphs

    def test_backward_twice_gives_the_same_twice(self) -> None:
        f = self._problem()
        value = self._solve(f).value
        first, again = self._gradients(f, value, retain_graph=True), self._gradients(f, value)
        for name in first:
            assert_close(again[name], first[name], rtol=1e-9, atol=1e-10)

    def test_no_memory_is_held_when_backward_is_skipped(self) -> None:
        f, collected = self._problem(), gc.isenabled()
        gc.disable()  # what only the collector would free is held for long on a GPU
        try:
            with _saved_tensors() as saved:
                value = self._solve(f).value
            assert len(saved) > 0, "no tensor was saved for backward"
            watched = weakref.ref(value)
            del value
            assert watched() is None, "the value outlives its last user: look for a reference cycle"
            assert len(saved) == 0, f"{len(saved)} tensors saved for backward outlive the value"
        finally:
            if collected:
                gc.enable()

    def test_grad_mode_is_left_as_it_was(self) -> None:
        f = self._problem()
        try:
            self._solve(f)
            assert torch.is_grad_enabled(), "grad mode was left switched off: use it as a context"
            with torch.no_grad():
                value = self._solve(f).value
                assert not torch.is_grad_enabled(), "grad mode was left switched on: use it as a context"
            assert not value.requires_grad, "the value has a graph, though grad mode was off"
        finally:
            torch.set_grad_enabled(True)

    def _problem(self, **options: Any) -> _Affine:
        return _Affine(device=self.device, **options)

    def _solve(self, f: _Affine, **options: Any) -> Solution:
        defaults: dict[str, Any] = {"solver": self.solver, "backward": copy.deepcopy(self.backward), "rtol": 1e-10}
        return solve(f, f.z0, (f.x,), **{**defaults, "on_failure": "raise", **options})

    def _gradients(self, f: _Affine, value: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
        leaves = f.leaves
        found = torch.autograd.grad(
            value, tuple(leaves.values()), f.incoming, retain_graph=retain_graph, allow_unused=True
        )
        return dict(zip(leaves, found, strict=True))

    def _check_descent(self, found: dict[str, Tensor]) -> None:
        expected = self._exact_gradients()
        product = sum(float((found[name].double() * expected[name]).sum()) for name in expected)
        assert product > 0, f"the inner product with the exact gradient must be positive, found {product}"

    def _exact_gradients(self) -> dict[str, Tensor]:
        f = self._problem()
        return self._gradients(f, f.exact())


@contextlib.contextmanager
def _saved_tensors() -> Iterator[weakref.WeakSet[Any]]:
    """The tensors that are saved for backward inside, as long as some graph keeps them."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


class _Saved:
    """A tensor that can be referred to weakly, where packing may not return the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
