"""Quasi-Newton sweeps for chains: row i's image depends on earlier rows only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from fixpoint.chains.recurrence import Chain, OneStep
from fixpoint.chains.sweep import Past, Secants, sweep
from fixpoint.chains.windows import iterate_windows
from fixpoint.engine.layout import Layout
from fixpoint.engine.loop import LoopOptions, LoopResult, Map
from fixpoint.engine.tolerance import Tolerance
from fixpoint.solvers.base import Solver, gram_dtype, require_count


@dataclass(frozen=True, kw_only=True)
class CausalQuasiNewton(Solver):
    """All T states of a chain at once, by sweeps along it with estimated Jacobians.

    Given the states X and their images ``P_k = Phi_k(X_{k-1})``, a round hands down the whole chain what the images
    change: ``N_k = P_k + M_k (N_{k-1} - X_{k-1})``. ``M_k`` is a slope (what the problem supplies, else measured) plus
    what the last ``memory`` rounds showed of the step. It needs no evaluation. The first state whose input is exact
    becomes exact whatever ``M`` is, so T rounds always do; a good ``M`` needs far fewer.

    ``N - X`` is the error that this model predicts of X, and so for the tolerance: a state is done, and is not
    evaluated any more, when it and all before it have a predicted error of at most ``atol + rtol * ||N_k||``, the
    error enlarged by as much as later steps are seen to enlarge it. A row of the batch has converged when its whole
    chain has; at the end, errors that fell to a third in the last round count half. ``Solution.residual`` is then the
    norm of the predicted errors; with ``certify`` it is what it is for every solver, ``||f(z) - z||``, and the whole
    chain was evaluated at the states that are handed over.

    It serves a :class:`~fixpoint.Recurrence`, any other :class:`~fixpoint.Chain`, and any f whose state
    ``(B, T, *shape)`` is strictly causal in its second dimension. Only a chain can be evaluated in part: otherwise
    every round evaluates all of f.

    Args:
        memory: Rounds that are remembered of each step.
        window: Most states of a row that are worked on at a time, from the first that is not done; what the solver
            holds grows with it. None: all.
        max_rows: Most steps evaluated in a round, in all rows of the batch together; rows that find no room wait for
            others to be done. None: no limit.
        certify: Evaluate the whole chain once more at the end, and go on if a state misses the tolerance.

    Raises:
        TypeError, ValueError: If an option is out of range, or f's state has no second dimension.

    Source: generalises Eq. 10 of Pokle et al., NeurIPS 2022 (M = the linear part of the step), ParaDiGMS (Shih et al.,
    NeurIPS 2023, M = 1) and quasi-DEER (Gonzalez et al., NeurIPS 2024, M = the Jacobian's diagonal).

    Example:
        >>> import torch, fixpoint
        >>> walk = fixpoint.Recurrence(lambda x, u: 0.9 * x + u, torch.zeros(2, 1), inputs=(torch.ones(2, 100, 1),))
        >>> solution = fixpoint.solve(walk, solver=fixpoint.CausalQuasiNewton(), rtol=1e-6)
        >>> round(float(solution.value[0, -1]), 2), solution.nfev
        (10.0, 3)
    """

    memory: int = 2
    window: int | None = None
    max_rows: int | None = None
    certify: bool = False

    def __post_init__(self) -> None:
        require_count("memory", self.memory)
        for name in ("window", "max_rows"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        shape = layout.example.shape[len(layout.batch_shape) :] if isinstance(layout.example, Tensor) else ()
        if not shape or layout.example.is_complex():
            raise ValueError(
                "CausalQuasiNewton needs a real tensor with a dimension for the steps after the batch dimension, found "
                + (f"shape {tuple(layout.example.shape)}" if isinstance(layout.example, Tensor) else "a nested state")
            )
        steps, slopes, basis = shape[0], getattr(f, "slopes", None), getattr(f, "basis", None)
        dim = math.prod(shape[1:])
        if slopes is not None and tuple(slopes.shape) not in ((steps,), (steps, 1), (steps, dim)):
            raise ValueError(
                f"slopes must have shape (T,) = ({steps},) or (T, D) = ({steps}, {dim}), found {tuple(slopes.shape)}"
            )
        if basis is not None and tuple(basis.shape) != (dim, dim):
            raise ValueError(f"basis must have shape (D, D) = ({dim}, {dim}), found {tuple(basis.shape)}")
        wide = torch.promote_types(layout.dtype, torch.float32)
        if slopes is not None:
            slopes = slopes.detach().reshape(steps, -1).to(layout.device, wide)
        if basis is not None:
            basis = basis.detach().to(layout.device, wide)
        sweeper = CausalSweep(self, steps=steps, slopes=slopes, basis=basis)
        return (OneStep(f) if isinstance(f, Chain) else f), sweeper

    def init(self, z: Tensor) -> Any:
        raise TypeError("CausalQuasiNewton learns from solve() how many steps a row has; it makes no steps by itself")

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.init(z)


@dataclass(frozen=True)
class CausalSweep(Solver):
    """A ``CausalQuasiNewton`` that knows its problem. Slopes are ``(T, 1 or D)``."""

    options: CausalQuasiNewton
    steps: int
    slopes: Tensor | None = None
    basis: Tensor | None = None
    backwards: bool = field(default=False)  # later rows come first: the adjoint of a chain

    def run(self, f: Map, z: Tensor, tolerance: Tolerance, **options: Unpack[LoopOptions]) -> LoopResult:
        """In windows; what is recorded for gradients is recorded for all rows, in the ordinary loop."""
        if torch.is_grad_enabled():
            return super().run(f, z, tolerance, **options)
        return iterate_windows(f, z, self, tolerance, **options)

    def init(self, z: Tensor) -> Past:
        states = self.split(z)
        return Past.empty(len(z), self.steps, self.options.memory, states.shape[2], states)

    def step(self, z: Tensor, fz: Tensor, state: Past) -> tuple[Tensor, Past]:
        states, images = self.split(z), self.split(fz)
        nothing = torch.zeros_like(states[:, :1])
        inputs = torch.cat((nothing, states[:, :-1]), dim=1)
        step = torch.arange(self.steps, device=z.device).expand(len(z), -1)
        states = images + self.carry(inputs, images, images - states, step, state)
        return self.join(states, z), state.with_newest(inputs, images)

    def carry(self, inputs: Tensor, images: Tensor, defects: Tensor, step: Tensor, past: Past) -> Tensor:
        """``M_k (N_{k-1} - X_{k-1})`` for the steps ``step`` ``(B, W)`` of a window, from what they are given."""
        newer_inputs = torch.cat((inputs[:, :, None], past.inputs[:, :, :-1]), dim=2)
        newer_images = torch.cat((images[:, :, None], past.images[:, :, :-1]), dim=2)
        moved = self.to_basis(torch.where(past.known[..., None], newer_inputs - past.inputs, 0))
        shifted = self.to_basis(torch.where(past.known[..., None], newer_images - past.images, 0))
        slopes = self._slopes_at(step, moved, shifted)
        return self.from_basis(sweep(self.to_basis(defects), slopes, Secants.of(moved, shifted, slopes, _RIDGE)))

    def follow(self, step: Tensor, moved: Tensor, moved_before: Tensor) -> Tensor:
        """Displacements ``(B, W, D)`` after the steps ``(B, W)``, from those of the last two states, ``(B, D)`` each.

        Each step does what its slope says and drifts as the last one did: by so much that one differed from what the
        guess had expected. A guess without slopes expects nothing.
        """
        if self.slopes is None:
            return moved[:, None].expand(-1, step.shape[1], -1)
        moved, moved_before = self.to_basis(moved), self.to_basis(moved_before)
        drift = moved - self.slopes[(step[:, 0] - 1).clamp(min=0)].to(moved.dtype) * moved_before
        slopes = self.slopes[step].to(moved.dtype).expand(len(moved), step.shape[1], -1)
        added = drift[:, None].repeat(1, step.shape[1], 1)
        added[:, 0] += slopes[:, 0] * moved
        return self.from_basis(added + sweep(added, slopes, None))

    def _slopes_at(self, step: Tensor, moved: Tensor, shifted: Tensor) -> Tensor:
        """``(B, W, 1 or D)``: the problem's, or else what the last round showed, within [-1, 1].

        A step of which nothing is known takes the others' mean, or 1.
        """
        if self.slopes is not None:
            return self.slopes[step].to(moved.dtype)
        square = moved[:, :, 0].square().sum(dim=2, keepdim=True)
        known = square > 0
        product = (moved[:, :, 0] * shifted[:, :, 0]).sum(dim=2, keepdim=True)
        shown = (product / torch.where(known, square, 1)).clamp(-1, 1)
        count = known.sum(dim=1, keepdim=True)
        mean = torch.where(known, shown, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
        return torch.where(known, shown, torch.where(count > 0, mean, 1))

    def adjoint(self) -> CausalSweep:
        """The same for ``u = v + J^T u``, a chain that runs from the last row to the first."""
        slopes = self.slopes
        if slopes is not None:
            slopes = torch.cat((slopes[:1], slopes[1:].flip(0)))
        return replace(self, slopes=slopes, backwards=not self.backwards)

    def split(self, z: Tensor) -> Tensor:
        """Rows ``(B, T * D)`` as states ``(B, T, D)`` in the order of the chain, in at least float32."""
        states = z.reshape(len(z), self.steps, -1).to(gram_dtype(z))
        return states.flip(1) if self.backwards else states

    def join(self, states: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``split``, in the dtype of ``like``."""
        states = states.flip(1) if self.backwards else states
        return states.reshape(len(states), -1).to(like.dtype)

    def to_basis(self, x: Tensor) -> Tensor:
        """Coordinates of ``(..., D)`` in which the slopes count."""
        return x if self.basis is None else x @ self.basis.to(x.dtype)

    def from_basis(self, x: Tensor) -> Tensor:
        """The inverse of ``to_basis``."""
        return x if self.basis is None else x @ self.basis.mT.to(x.dtype)


_RIDGE = 1e-3  # relative weight that keeps nearly dependent displacements of a step apart
