"""Exact gradients at constant memory, by an iteration that can be run backwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fixpoint.backward.attachment import refuse_second_order
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.functional import for_each_gradient
from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.transforms import Functional, plain
from fixpoint.solvers.base import Solver, require_count, small_dtype

Pair = tuple[Tensor, Tensor]  # a state and the one before it


@dataclass(frozen=True, kw_only=True)
class Reversible(Backward):
    """A damped iteration of two coupled states, of which backward recomputes each state from the two after it.

    ``y <- (1 - damping) y + damping f(z)``, then ``z <- (1 - damping) z + damping f(y)``, both from z0, ``steps``
    times: exactly ``2 steps`` evaluations. The gradient is that of unrolling them, z0 included, but nothing of them is
    kept: memory is that of two states and one application of f. First derivatives only.

    Going backwards magnifies rounding, up to ``1 / |1 - damping|`` times an evaluation where f contracts. States are
    therefore in float64, and no gradient rests on a state that was lost: the recovered start is compared with z0, and
    where it differs, or where so many steps could not be recovered anyway, backward runs the iteration forward once
    more and keeps some of its states while it works. It raises if that does not end where the forward solve ended.

    In training, the rule's own iteration takes the place of the solver, and it is a run of fixed depth: the tolerance,
    ``max_evals``, ``check_every`` and ``on_failure`` play no part, and the residual of the last state is not known.
    ``record`` keeps the residual of each state that f was evaluated at. Without gradients, ``solve`` solves as always.

    A gradient for each state can only be passed to what is known by name, so f must not close over what requires grad:
    put it in ``args``, or make f a module.

    Args:
        steps: Pairs of evaluations, at least 1.
        damping: Share of each step, in (0, 2), not 1.

    Raises:
        TypeError, ValueError: If an option is of the wrong type or out of range; in the solve, if f closes over
            something that requires grad, or with ``depth``, ``callback`` or ``keep_states``.
        RuntimeError: In backward, if f is no longer the map that it was; in the backward of a gradient.

    Source: S. McCallum, K. Arora, J. Foster, Reversible Deep Equilibrium Models, 2025, arXiv:2509.12917.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.Reversible(steps=20, damping=0.8)
        >>> fixpoint.solve(lambda z, a: a * z + 1, torch.zeros(1), (a,), backward=rule).value.sum().backward()
        >>> round(float(a.grad), 3)
        4.0
    """

    steps: int = 8
    damping: float = 0.5
    runs_forward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", require_count("steps", self.steps))
        if not 0 < self.damping < 2 or self.damping == 1:
            raise ValueError(f"damping must lie in (0, 2) and not be 1, found {self.damping}")

    @property
    def uses_start(self) -> bool:
        return True

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        if run.depth is not None:
            raise ValueError(f"Reversible(steps=...) has a depth of its own, found depth={run.depth}")
        if run.watch is not None:
            raise ValueError("callback and keep_states do not work with Reversible(), whose steps= fix the evaluations")
        if run.transformed:
            raise ValueError("Reversible() does not work under torch.func or forward-mode differentiation; IFT() does")
        value, result = self._attach(run)
        # Where a row has failed, the others go their way once more without it.
        return run.recorded(lambda f, z0: self._attach(replace(run, f=f, z0=z0, results=[]))[0], run.z0, value), result

    def _attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        count, solver = 2 * self.steps, _Coupled(damping=self.damping)
        with torch.no_grad():
            result = replace(run, solver=solver, depth=count).on(_explicit(run.f, run.inputs))
        return _Reversed.apply(run.f, solver, count, *result.state, run.z0, *run.inputs), result


def _explicit(f: Functional, inputs: tuple[Tensor, ...]) -> Map:
    """f with nothing recorded, which raises if it could record something all the same."""
    fixed = [x.detach() for x in inputs]

    def evaluate(z: Tensor) -> Tensor:
        with torch.enable_grad():
            fz = f(z.detach(), *fixed)
        if fz.requires_grad:
            raise ValueError(
                "Reversible() needs all that requires grad in args or in the parameters of a module f: found that f "
                "closes over something more"
            )
        return fz

    return evaluate


@dataclass(frozen=True, kw_only=True)
class _Coupled(Solver):
    """``x_(k+1) = (1 - damping) x_(k-1) + damping f(x_k)``: y and z in turn, each from the other. State: a pair."""

    damping: float

    def init(self, z: Tensor) -> Pair:
        wide = z.to(small_dtype(z))
        return wide, wide

    def step(self, z: Tensor, fz: Tensor, state: Pair) -> tuple[Tensor, Pair]:
        at, before = state
        after = torch.lerp(before, fz.to(before.dtype), self.damping)
        return after.to(z.dtype), (after, at)


class _Reversed(torch.autograd.Function):
    """The last state; the one before it, z0 and the inputs are all else that it keeps."""

    @staticmethod
    def forward(
        ctx: Any, f: Functional, solver: _Coupled, count: int, last: Tensor, before: Tensor, z0: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.f, ctx.solver, ctx.count = f, solver, count
        # Autograd saves no inference tensors, but copies of them.
        ctx.save_for_backward(last, before, z0, *(x.clone() if x.is_inference() else x for x in inputs))
        return last.to(z0.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if plain(v) is not v:  # where nothing can be made to require a gradient
            raise ValueError("the backward of Reversible() does not work under torch.func; that of IFT() does")
        last, before, z0, *inputs = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[6:]) if needed]
        with torch.no_grad():
            transposed = _Transposed(ctx.f, ctx.solver, inputs, wanted, v.dtype)
            first = ctx.solver.init(z0)
            gradients = for_each_gradient(lambda v: transposed(first, (last, before), ctx.count, v), v)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = tuple(refuse_second_order(gradient, v, z0, *inputs) for gradient in gradients)
        start, *rest = gradients
        found = dict(zip(wanted, rest, strict=True))
        return None, None, None, None, None, start, *(found.get(i) for i in range(len(inputs)))


class _Transposed:
    """The transposed derivative of the coupled iteration, from its first and its last pair of states.

    ``inputs`` are those of f, ``wanted`` the indices of those whose gradients are, ``dtype`` what f works in.
    """

    def __init__(
        self, f: Functional, solver: _Coupled, inputs: list[Tensor], wanted: list[int], dtype: torch.dtype
    ) -> None:
        self._f, self._solver, self._dtype = f, solver, dtype
        self._inputs, self._wanted = [x.detach() for x in inputs], wanted

    def __call__(self, first: Pair, last: Pair, count: int, v: Tensor) -> tuple[Tensor, ...]:
        """Gradients for z0 and for the wanted inputs, from the gradient ``v`` of the last state."""
        bars = v.to(last[0].dtype), torch.zeros_like(last[0])
        reach = self._reach(last[0].dtype)
        found = self._reverse(first, last, count, bars) if count <= reach else None
        if found is None:
            found = self._replay(first, last, count, bars, reach if count > reach else 0)
        (z_bar, y_bar), totals = found
        return ((z_bar + y_bar).to(v.dtype), *totals)

    def _reach(self, dtype: torch.dtype) -> float:
        """How many evaluations can be reversed with a digit to spare: rounding grows by 1 / |1 - damping| in each.

        That is the most where f contracts. It may grow faster where f does not, which the comparison then finds.
        """
        growth = -math.log(abs(1 - self._solver.damping))
        if growth == 0:
            return math.inf
        return max(0, int(math.log(0.1 * self._accuracy / torch.finfo(dtype).eps) / growth))

    @property
    def _accuracy(self) -> float:
        """Relative error allowed in a recovered state; as much as an f that computes in less than float64 can see."""
        return 1e-9 if self._dtype == torch.float64 else 1e-7

    def _reverse(self, first: Pair, last: Pair, count: int, bars: Pair) -> tuple[Pair, list[Tensor]] | None:
        """Gradients by recovering each state from the two after it; None if that does not lead back to ``first``."""
        totals = self._zeros()
        (after, at), share_before = last, 1 - self._solver.damping
        for k in reversed(range(count)):
            recovered, at = at, at if k else first[0]  # the first state is known, and errors are largest there
            image, bars = self._pull(at, bars, totals)
            second, after, at = after, at, (after - self._solver.damping * image) / share_before
        # The size of the second state counts too, as z0 is often zero; that of the last would hide what f magnifies.
        size = torch.stack((*first, second)).abs().amax(dim=0)
        return (bars, totals) if _agree((recovered, at), first, size, self._accuracy) else None

    def _replay(self, first: Pair, last: Pair, count: int, bars: Pair, reach: float) -> tuple[Pair, list[Tensor]]:
        """Gradients by running forward again and keeping some pairs of states.

        Between these, states are recovered if ``reach`` promises it, and otherwise computed once more and kept: of n
        evaluations, about the square root of n states at a time.
        """
        length = math.isqrt(count - 1) + 1
        if reach >= length:
            length = int(reach)
        states = list(self._forward(first, count, length))
        accuracy = torch.finfo(self._dtype).eps ** 0.5
        size = torch.stack(last).abs().amax(dim=0)
        largest = size.amax(dim=1, keepdim=True) if size.shape[1] else size.new_zeros(len(size), 1)
        # Entries that are nothing but rounding may differ, on devices that add in another order each time.
        if not _agree(states.pop(), last, size + accuracy * largest, accuracy):
            raise RuntimeError(
                "Reversible() evaluated f again in backward and came to another state than the forward solve: f "
                "must stay the same map between forward and backward. Look for changed parameters, buffers or modes, "
                "and for randomness from other sources than torch's global state."
            )
        totals, end = self._zeros(), last
        while states:
            start = states.pop()
            number = min(length, count - len(states) * length)
            found = self._reverse(start, end, number, bars) if number <= reach else None
            if found is None:
                reach, found = 0, self._unroll(start, number, bars)
            bars, part = found
            for total, more in zip(totals, part, strict=True):
                total += more
            end = start
        return bars, totals

    def _unroll(self, first: Pair, count: int, bars: Pair) -> tuple[Pair, list[Tensor]]:
        """Gradients by running forward from ``first`` and keeping every state."""
        totals = self._zeros()
        for at, _ in reversed(list(self._forward(first, count - 1, 1))):
            _, bars = self._pull(at, bars, totals)
        return bars, totals

    def _forward(self, pair: Pair, count: int, every: int) -> Iterator[Pair]:
        """Of ``count`` steps from ``pair``, the pair at the start and after each ``every`` steps, and the last one."""
        for k in range(count):
            if k % every == 0:
                yield pair
            z = pair[0].to(self._dtype)
            _, pair = self._solver.step(z, self._f(z, *self._inputs), pair)
        yield pair

    def _pull(self, at: Tensor, bars: Pair, totals: list[Tensor]) -> tuple[Tensor, Pair]:
        """f at a state, and the gradients of that state and the one before it, from those of the next and of itself.

        The part for the inputs is added to ``totals``.
        """
        leaves = [x.detach().requires_grad_(i in self._wanted) for i, x in enumerate(self._inputs)]
        point = at.detach().to(self._dtype).requires_grad_()
        with torch.enable_grad():
            image = self._f(point, *leaves)
        if not image.requires_grad:
            raise ValueError(
                "f's output does not depend on what requires grad. Look for detach(), no_grad() or NumPy inside f."
            )
        after_bar, at_bar = bars
        targets = [point, *(leaves[i] for i in self._wanted)]
        upstream = (self._solver.damping * after_bar).to(self._dtype)
        through_f, *gradients = torch.autograd.grad(image, targets, upstream, materialize_grads=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient
        before_bar = (1 - self._solver.damping) * after_bar
        return image.detach().to(at.dtype), (at_bar + through_f.to(at.dtype), before_bar)

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(self._inputs[i]) for i in self._wanted]


def _agree(found: Pair, wanted: Pair, size: Tensor, accuracy: float) -> bool:
    """Whether two pairs of states are the same to a relative ``accuracy``, row by row.

    Each entry is measured by its own ``size``, so the unit that it is in does not matter. Rows of which something is
    not finite have no gradient that could be compared.
    """
    error = torch.stack([(ours - theirs).abs() for ours, theirs in zip(found, wanted, strict=True)]).amax(dim=0)
    error = torch.where(error == 0, 0, error / size)
    mean = torch.linalg.vector_norm(error, dim=1) / max(error.shape[1], 1) ** 0.5
    sound = torch.isfinite(torch.stack(wanted)).all(dim=0).all(dim=1)
    return not bool((sound & ~(mean <= accuracy)).any())
