"""Quasi-Newton sweeps for chains, where each state's image depends on earlier states only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.causal_sweep import CausalSweep
from fixpoint.chains.recurrence import Chain, OneStep
from fixpoint.engine.layout import Layout, as_tensor
from fixpoint.engine.norms import Array, to_host
from fixpoint.solvers.base import Solver, require_count


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
    no effect), and is always certified. If it is strictly causal in the second dimension, T + 1 evaluations do, and one
    more for each certificate that fails. If it is not, it may take many more or not converge, but it does not pass for
    converged at a wrong state.

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
        sweep = CausalSweep(options, steps, dim, slopes, basis, noise_scale, single_steps=single_steps, sparse=sparse)
        order = layout.row_order
        return f, sweep if order is None else replace(sweep, stored=(tuple(shape), order))

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
