"""Quasi-Newton sweeps for chains, where each state's image depends on earlier states only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.recurrence import Chain, OneStep
from fixpoint.chains.sweep import Past, SecantModel, WindowPast, held_back, parts, sweep
from fixpoint.chains.windows import iterate_windows
from fixpoint.engine.layout import Layout, as_tensor
from fixpoint.engine.loop import LoopOptions, Map
from fixpoint.engine.norms import Array, to_host
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import Tolerance
from fixpoint.solvers.base import Solver, gram_dtype, require_count


@dataclass(frozen=True, kw_only=True)
class CausalQuasiNewton(Solver):
    """All T states of a chain at once, by sweeps along it with estimated Jacobians.

    A round evaluates all images ``P_k = Phi_k(X_{k-1})`` of the states X. A sweep then hands their errors down the
    chain, without an evaluation: ``N_k = P_k + M_k (N_{k-1} - X_{k-1})``. ``M_k`` estimates the Jacobian of step k: a
    slope (the problem's own, or measured) plus what the last ``memory`` rounds showed of the step. The first state
    whose input is exact becomes exact whatever ``M`` is, so T rounds always do; a good ``M`` needs far fewer.

    ``N - X`` is the error that the model predicts of X. A state is done, and is not evaluated again, when it and all
    before it have a predicted error of at most ``atol + rtol * ||N_k||``, the error enlarged by as much as later steps
    are seen to enlarge it. A row of the batch has converged when its whole chain has; at the end, errors that fell to a
    third in the last round count half. States are judged by their Euclidean norms after every evaluation: ``norm`` and
    ``check_every`` have no effect, except where gradients are recorded.

    ``Solution.predicted_error`` is the norm of the predicted errors. The residual is not measured, and
    ``Solution.residual`` is NaN. With ``certify`` the whole chain is evaluated once more at the states that are handed
    over: the residual is measured, and a row has converged only if it meets the tolerance. Then it is measured what the
    steps make of a small displacement (``Solution.amplification``), and the errors that defects become must meet the
    tolerance, too. That takes about half as many evaluations again. Without ``certify`` this is done for those rows
    that were seen to amplify errors much.

    It serves a :class:`~fixpoint.Recurrence` and any other :class:`~fixpoint.Chain`, of which it evaluates only the
    steps that it needs. Any other f with a state ``(B, T, *shape)`` is evaluated whole in each round (``max_rows`` has
    no effect), and is always certified. If it is strictly causal in the second dimension, T + 1 evaluations always do.
    If it is not, it may take many more or not converge, but it does not pass for converged at a wrong state.

    Args:
        memory: Rounds that are remembered of each step; the older a round, the less it counts. None: 3, or 1 where
            steps are probed: what older rounds showed was seen farther away than a probe.
        window: Most states of a row that are worked on at a time, from the first that is not done; what the solver
            holds grows with it. None: all.
        max_rows: Most steps evaluated in a round, in all rows of the batch together; rows that find no room wait for
            others to be done. The certificate keeps to it too, in as many evaluations as it takes. None: no limit.
        certify: Evaluate the whole chain once more at the end, measure what it amplifies, and go on if a state misses
            the tolerance.
        noise_rtol: For a chain whose steps add noise (``noise_scale``, see :class:`~fixpoint.Chain`): a state is done
            at a predicted error that is larger than ``atol + rtol * ||N_k||`` by this share of the size of its noise.
            That takes fewer evaluations. Later states go on from there, those without noise too: the result is another
            sample of nearly the same law, and may differ by more than the tolerance from the sequential run.
        probes: Each step of a round is evaluated at so many further inputs, a little away from its own in random
            directions, in the same call. They tell the slope of each entry of a state, which takes the place of the
            chain's own ``slopes``. That takes fewer rounds, of ``1 + probes`` times as many steps (``max_rows`` counts
            them all): for a device that a round does not fill, or where ``slopes`` are not known. More than 1 hardly
            helps. It has no effect where f must be evaluated whole, as under torch.func.

    Raises:
        TypeError, ValueError: If an option is out of range, or f's state has no second dimension; if the start is not
            of its chain's shape, or a row is not a sample; if ``noise_rtol`` is given for a chain without noise,
            ``probes`` for an f that is no chain, or one of these two where gradients are recorded.

    Source: generalises Eq. 10 of Pokle et al., NeurIPS 2022 (M = the linear part of the step), ParaDiGMS (Shih et al.,
    NeurIPS 2023, M = 1) and quasi-DEER (Gonzalez et al., NeurIPS 2024, M = the Jacobian's diagonal).

    Example:
        >>> import torch, fixpoint
        >>> walk = fixpoint.Recurrence(lambda x, u: 0.9 * x + u, torch.zeros(2, 1), inputs=(torch.ones(2, 100, 1),))
        >>> solution = fixpoint.solve(walk, solver=fixpoint.CausalQuasiNewton(), rtol=1e-6)
        >>> round(float(solution.value[0, -1]), 2), solution.nfev
        (10.0, 3)
    """

    memory: int | None = None
    window: int | None = None
    max_rows: int | None = None
    certify: bool = False
    noise_rtol: float = 0.0
    probes: int = 0

    def __post_init__(self) -> None:
        if self.memory is not None:
            require_count("memory", self.memory)
        require_count("probes", self.probes, 0)
        for name in ("window", "max_rows"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if not 0 <= self.noise_rtol < math.inf:
            raise ValueError(f"noise_rtol must be a finite number of at least 0, found {self.noise_rtol}")

    @property
    def remembered(self) -> int:
        """Rounds that are remembered of each step."""
        return self.memory or (1 if self.probes else 3)

    @property
    def max_states(self) -> int | None:
        """Most states in a round: with their probes they keep to ``max_rows``. None: no limit."""
        rows = 1 if self.window == 1 else 1 + self.probes  # a window of one is not probed
        return None if self.max_rows is None else max(self.max_rows // rows, 1)

    def widest(self, rows: int, steps: int) -> int:
        """Most states of each of so many rows in a round."""
        widest = min(self.window or steps, steps)
        return widest if self.max_states is None else min(widest, max(self.max_states // max(rows, 1), 1))

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        """For a chain, the map with single steps to be had; and the sweep over so many steps, with f's slopes."""
        if isinstance(f, Chain):
            _check_layout(f, layout)
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
        if slopes is not None and not bool(torch.isfinite(slopes.detach()).all()):
            raise ValueError("slopes must be finite: found NaN or infinity")
        if basis is not None:
            basis = (basis,) if isinstance(basis, Tensor) else tuple(basis)
            sizes = (dim,) if len(basis) == 1 else tuple(shape[1:])
            found = [tuple(factor.shape) for factor in basis]
            if found != [(size, size) for size in sizes]:
                raise ValueError(
                    f"basis must have shape (D, D) = ({dim}, {dim}), or be a matrix for each dimension of a state of "
                    f"shape {tuple(shape[1:])}, found {found[0] if len(found) == 1 else found}"
                )
        if basis is not None and not all(bool(torch.isfinite(factor.detach()).all()) for factor in basis):
            raise ValueError("basis must be finite: found NaN or infinity")
        wide = torch.promote_types(layout.dtype, torch.float32)
        if slopes is not None:
            slopes = slopes.detach().to(layout.device, wide)
            slopes = slopes[:, None] if slopes.ndim == 1 else slopes
        if basis is not None:
            basis = tuple(factor.detach().to(layout.device, wide) for factor in basis)
        noise_scale = self._noise_scale(f, steps)
        f = OneStep(f) if isinstance(f, Chain) else f
        single_steps = isinstance(f, OneStep)
        if self.probes and not single_steps:
            raise ValueError(f"probes={self.probes} needs single steps: pose f as a Recurrence or another Chain")
        sparse = isinstance(f, OneStep) and f.sparse
        # Nobody promises that another f is causal: what it gives is measured.
        options = self if single_steps else replace(self, certify=True, max_rows=None)
        return f, CausalSweep(options, steps, dim, slopes, basis, noise_scale, single_steps=single_steps, sparse=sparse)

    def _noise_scale(self, f: Any, steps: int) -> Array | None:
        """What ``noise_rtol`` is relative to; None where it is not asked for."""
        if not self.noise_rtol:
            return None
        given = getattr(f, "noise_scale", None)
        scale = np.zeros(0) if given is None else to_host(as_tensor(given).detach())
        if given is not None and scale.shape != (steps,):
            raise ValueError(f"noise_scale must have shape (T,) = ({steps},), found {scale.shape}")
        wrong = scale[~(np.isfinite(scale) & (scale >= 0))]
        if wrong.size:
            raise ValueError(f"noise_scale must be finite and at least 0, found {wrong[0]:g}")
        if not scale.any():
            raise ValueError(f"noise_rtol={self.noise_rtol:g} is for chains whose steps add noise; this one adds none")
        return scale

    def init(self, z: Tensor) -> Any:
        raise TypeError(
            "CausalQuasiNewton does not know yet how many steps a row has. solve() tells it; to step it yourself, take "
            "the solver that CausalQuasiNewton().bind(f, layout)[1] returns"
        )

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.init(z)


def _check_layout(chain: Chain, layout: Layout) -> None:
    """Refuse a state of other samples, steps or entries than the chain's: single steps of it would go unnoticed."""
    expected, state = (len(chain.start), chain.steps, *chain.start.shape[1:]), layout.example
    found = tuple(state.shape) if isinstance(state, Tensor) else "a nested state"
    if found != expected:
        raise ValueError(f"a chain's state has shape (B, T, *shape) = {expected}, found {found}")
    if len(layout.batch_shape) != 1:
        raise ValueError(f"the rows of a chain are its samples: batch_dims must be 1, found {len(layout.batch_shape)}")


class Swept(NamedTuple):
    """What a sweep makes of the states of some windows."""

    states: Tensor  # (B, W, D)
    corrections: Tensor  # (B, W, D), what was added to the images
    sound: Tensor  # (B, W) bool: false from the first state on that had to be held back


@dataclass(frozen=True)
class CausalSweep(Solver):
    """A ``CausalQuasiNewton`` that is bound to its problem: rows are chains of ``steps`` states with ``dim`` entries.

    Attributes:
        slopes: ``(T, 1 or D)``, in the coordinates that the columns of ``basis`` give.
        basis: One matrix ``(D, D)``, or one for each dimension of a state.
        noise_scale: ``(T,)``, on the host; None without ``noise_rtol``.
        backwards: Whether row k depends on later rows, as in the adjoint of a chain.
        single_steps: Whether the map can be asked for single steps, by its method ``part``.
        sparse: Whether it can interpolate some of them, by its method ``sparse_part``.
        fades: Whether states may fade to nothing along the row, as the derivatives of a chain do.
    """

    options: CausalQuasiNewton
    steps: int
    dim: int
    slopes: Tensor | None = None
    basis: tuple[Tensor, ...] | None = None
    noise_scale: Array | None = None
    backwards: bool = False
    single_steps: bool = False
    sparse: bool = False
    fades: bool = False

    @property
    def noise(self) -> Array:
        """``(T,)``: by how much the noise of its step lets a state be off."""
        return np.zeros(self.steps) if self.noise_scale is None else self.options.noise_rtol * self.noise_scale

    def reference_norms(self, norms: Array, rounding: float) -> Array:
        """``(B, T)``: what the tolerance of each state is relative to, for states of these ``norms`` ``(B, T)``.

        Mostly their norms. Those of an adjoint are at least ``rounding`` times the largest norm before: on the way back
        through a chain that forgets, adjoints fade without end, and to solve each to so many digits would take as many
        rounds as steps. What comes later does not count, for it is not known yet when a state is done.
        """
        if not self.fades or not norms.size:
            return norms
        return np.fmax(norms, rounding * np.fmax.accumulate(norms, axis=1))

    def run(self, f: Map, z: Tensor, tolerance: Tolerance, **options: Unpack[LoopOptions]) -> LoopResult:
        """In windows; in the ordinary loop, all rows whole, where gradients are recorded."""
        if torch.is_grad_enabled():
            for name in ("noise_rtol", "probes"):
                if getattr(self.options, name):
                    raise ValueError(f"{name} has no effect where gradients are recorded: leave it out, or use IFT()")
            return super().run(f, z, tolerance, **options)
        max_evals, record, watch = options["max_evals"], options.get("record", False), options.get("watch")
        return iterate_windows(f, z, self, tolerance, max_evals=max_evals, record=record, watch=watch)

    def init(self, z: Tensor) -> Past:
        return Past.empty((len(z), self.steps), self.options.remembered, self.dim, self.split(z))

    def step(self, z: Tensor, fz: Tensor, state: Past) -> tuple[Tensor, Past]:
        if not self.steps:
            return fz, state
        states, images = self.split(z), self.split(fz)
        inputs = torch.cat((torch.zeros_like(states[:, :1]), states), dim=1)[:, :-1]
        step = torch.arange(self.steps, device=z.device).expand(len(z), -1)
        finite = torch.isfinite(images).all(dim=2)
        images = torch.where(finite[..., None], images, states)
        swept = self.swept(states, inputs, images, finite, step, state)
        return self.join(swept.states, z), state.with_newest(inputs.detach(), images.detach(), swept.sound)

    def swept(
        self,
        states: Tensor,
        inputs: Tensor,
        images: Tensor,
        finite: Tensor,
        step: Tensor,
        past: Past | WindowPast,
        measured: Tensor | None = None,
    ) -> Swept:
        """Sweep along windows.

        Args:
            states: ``(B, W, D)``.
            inputs: ``(B, W, D)``, of their steps: the states before them.
            images: ``(B, W, D)``, what the steps make of the inputs.
            finite: ``(B, W)``, which images count; the others are the states themselves.
            step: ``(B, W)``, number of each step.
            past: of these steps.
            measured: slopes ``(B, W, D)`` of the entries of the states, in place of the chain's; None: the chain's.
        """
        # The model is a constant where gradients are recorded. Its own derivative is that of quotients of ever smaller
        # changes; it would not vanish as the solve converges, although its effect on the states does.
        if measured is not None:  # of the entries themselves, so in no other basis
            corrections = sweep(images - states, measured, SecantModel(past, inputs, images, measured, lambda x: x))
        else:
            with torch.no_grad():
                slopes = self._slopes_at(step, inputs, images, past)
            model = SecantModel(past, inputs, images, slopes, self.to_basis)
            corrections = self.from_basis(sweep(self.to_basis(images - states), slopes, model))
        after, sound = held_back(images, corrections, finite)
        return Swept(after, corrections, sound)

    def inherited(self, defects: Tensor, step: Tensor) -> Tensor:
        """What states inherit of the defects ``(B, W, D)`` before them by the problem's slopes; 0 without slopes."""
        if self.slopes is None:
            return torch.zeros_like(defects)
        return self.from_basis(sweep(self.to_basis(defects), self.slopes[step].to(defects.dtype), None))

    def follow(self, step: Tensor, moved: Tensor, moved_before: Tensor) -> Tensor:
        """By how much to move the guesses of states that enter a window: ``(B, W, D)``.

        The two states in front of the window have moved from their guesses by ``moved_before`` and ``moved``,
        ``(B, D)`` each, the last one by ``moved``. A slope says how a state should follow the one before it. What the
        last state did beyond that, each new state is taken to do as well. Without slopes, all new states move alike.
        """
        if self.slopes is None:
            return moved[:, None].expand(-1, step.shape[1], -1)
        moved, moved_before = self.to_basis(moved), self.to_basis(moved_before)
        beyond = moved - self.slopes[(step[:, 0] - 1).clamp(min=0)].to(moved.dtype) * moved_before
        slopes = self.slopes[step].to(moved.dtype).expand(len(moved), step.shape[1], -1)
        added = beyond[:, None].repeat(1, step.shape[1], 1)
        added[:, 0] += slopes[:, 0] * moved
        return self.from_basis(added + sweep(added, slopes, None))

    def _slopes_at(self, step: Tensor, inputs: Tensor, images: Tensor, past: Past | WindowPast) -> Tensor:
        """``(B, W, 1 or D)``: the problem's, or else what the last round showed, within [-1, 1].

        A step of which nothing is known takes the mean of the others, or 1.
        """
        if self.slopes is not None:
            return self.slopes[step].to(inputs.dtype)
        products = [self._products(inputs[:, part], images[:, part], past, part) for part in parts(inputs)]
        square, product = (torch.cat(each, dim=1) for each in zip(*products, strict=True))
        known = square > 0
        shown = (product / torch.where(known, square, 1)).clamp(-1, 1)
        count = known.sum(dim=1, keepdim=True)
        mean = torch.where(known, shown, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
        return torch.where(known, shown, torch.where(count > 0, mean, 1))

    def _products(self, inputs: Tensor, images: Tensor, past: Past | WindowPast, part: slice) -> tuple[Tensor, Tensor]:
        """The last changes of inputs times themselves and times those of images, ``(B, W, 1)``; 0 where unknown."""
        known, before = past.known[:, part, :1], past.newest(part)
        changes = (torch.where(known, now - then, 0) for now, then in zip((inputs, images), before, strict=True))
        moved, followed = map(self.to_basis, changes)
        return moved.square().sum(dim=2, keepdim=True), (moved * followed).sum(dim=2, keepdim=True)

    def adjoint(self) -> CausalSweep:
        """The same for ``u = v + J^T u``, a chain that runs from the last row to the first.

        A product with ``J^T`` is one of all steps, so there is nothing to be saved by windows.
        """
        slopes = self.slopes
        if slopes is not None:
            slopes = torch.cat((slopes[:1], slopes[1:].flip(0)))
        options = replace(self.options, window=None, max_rows=None, noise_rtol=0.0, probes=0)
        return replace(
            self,
            options=options,
            slopes=slopes,
            backwards=not self.backwards,
            single_steps=False,
            sparse=False,
            fades=True,
        )

    def split(self, z: Tensor) -> Tensor:
        """Rows ``(B, T * D)`` as states ``(B, T, D)`` in the order of the chain, in at least float32."""
        states = z.reshape(len(z), self.steps, self.dim).to(gram_dtype(z))
        return states.flip(1) if self.backwards else states

    def join(self, states: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``split``, in the dtype of ``like``."""
        states = states.flip(1) if self.backwards else states
        return states.reshape(like.shape).to(like.dtype)

    def to_basis(self, x: Tensor) -> Tensor:
        """Coordinates of ``(..., D)`` in which the slopes count."""
        return x if self.basis is None else times_each(x, self.basis)

    def from_basis(self, x: Tensor) -> Tensor:
        """The inverse of ``to_basis``."""
        return x if self.basis is None else times_each(x, [factor.mT for factor in self.basis])


def times_each(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x`` ``(..., D)`` times the Kronecker product of square ``factors`` of sizes whose product is D."""
    if len(factors) == 1:
        return x @ factors[0].to(x.dtype)
    sizes = [len(factor) for factor in factors]
    out = x.reshape(-1, *sizes)
    for number, factor in enumerate(factors, start=1):
        out = torch.tensordot(out, factor.to(x.dtype), dims=([number], [0])).movedim(-1, number)
    return out.reshape(x.shape)
