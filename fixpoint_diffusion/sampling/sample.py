"""Sampling in parallel: solve a chain for all of its latents at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fixpoint import Anderson, Blockwise, CausalQuasiNewton, Progress, ProgressBar, Solution, Solver, solve
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.denoisers.sharded import is_sharded
from fixpoint_diffusion.sampling.batch_cost import BatchCost, usual_rows

# Windows of fewer states take longer than the ordinary sampler: each state is evaluated more than once.
_LEAST_WINDOW = 4


@dataclass(frozen=True, eq=False)
class SamplingResult:
    """What :func:`sample` returns.

    Attributes:
        images: ``(B, *shape)``, the x_0 of each sample: the last row of the trajectory.
        trajectory: all latents, ``(B, T, *shape)``; row k is the latent after step k.
        solution: the solve's own account: ``converged``, ``status`` and ``evals`` per sample, ``trace``, ``residual``
            or, where ``CausalQuasiNewton`` judged by that, ``predicted_error``.
        rounds: batched denoiser calls of this run, those that timed the denoiser included.
        evals: denoiser rows of this run, likewise.
        max_rows: the budget of rows a round that the run kept to; None: there was none.
        cost: what calls of the denoiser were seen to take, with ``max_rows="auto"``; else None.

    Example:
        See :func:`fixpoint_diffusion.sample`, which returns one.
    """

    images: Tensor
    trajectory: Tensor
    solution: Solution
    rounds: int
    evals: int
    max_rows: int | None = None
    cost: BatchCost | None = None

    def __repr__(self) -> str:
        samples, steps, *shape = self.trajectory.shape
        each = "x".join(map(str, shape)) or "one number"
        what = f"{samples} samples {each} in {steps} steps"
        return f"SamplingResult({what}, rounds={self.rounds}, evals={self.evals}, solution={self.solution!r})"


def sample(
    chain: SamplingChain,
    *,
    solver: Solver = CausalQuasiNewton(),  # noqa: B008 - immutable
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_evals: int | None = None,
    max_rows: int | Literal["auto"] | None = None,
    init: str | Tensor | None = None,
    on_failure: Literal["warn", "raise", "ignore"] = "warn",
    record: bool = False,
    progress: bool = False,
    callback: Callable[[Progress], object] | None = None,
) -> SamplingResult:
    """Sample by solving the chain's fixed point, all steps in parallel; without gradient.

    ``CausalQuasiNewton()`` is the solver that knows of chains, and by far the fastest here: it works on the one-step
    form, in windows, and accepts each latent by its predicted error. Where a chain is seen to amplify errors
    (``solution.amplification``), as clipping may make it do, its samples are solved more tightly, or in the end step by
    step.

    For other solvers, the denoiser is only asked about rows whose input has changed since the last round: samples that
    have converged, and latents that have settled (the first input is x_T from the start), cost nothing more. The result
    is the same as that of ``fixpoint.solve(chain)``, where every evaluation pays for every row. For the ordinary
    sampler, call ``chain.sequential()``.

    Args:
        chain: a :class:`SamplingChain`, such as :class:`DDIMChain`, of B samples and T steps.
        solver: the update rule. ``CausalQuasiNewton(certify=True)`` evaluates every latent once more at the end;
            ``deq_ddim_settings`` are the paper's.
        rtol, atol: a sample is done when ``||chain(z) - z|| <= atol + rtol ||chain(z)||`` over its whole trajectory;
            with ``CausalQuasiNewton``, when every latent's predicted error is at most ``atol + rtol ||latent||``.
        max_evals: most evaluations of the chain; by default T + 1, enough for plain iteration to be exact and know it,
            and as often T as samples have to take turns under ``max_rows``, and a certificate in as many parts. For
            ``CausalQuasiNewton`` six times that, for samples that amplify errors: these are measured and solved anew.
        max_rows: for ``CausalQuasiNewton`` without a window and a budget of its own: most rows in a round. None: by the
            rule of :func:`~fixpoint_diffusion.sampling.batch_cost.usual_rows`, from the type of device, the number of
            samples and their size. ``"auto"``: the denoiser is timed on growing batches, and the budget is taken that
            should need the least time; then the images depend, within the tolerance, on how busy the machine is.
        init: where to start: ``"prior"``, the latents that the chain's Gaussian prior expects; every latent equal to
            ``"x_T"``; ``"zeros"``; or latents of shape ``(B, T, *shape)``, such as a neighbour's. None: ``"prior"`` for
            ``CausalQuasiNewton``, else ``"x_T"``, as in the paper.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when samples do not converge.
        record: keep the residual (or the predicted error) after every evaluation in ``solution.trace``.
        progress: show a bar of the latents that are settled, with rounds, samples that are done and denoiser rows.
        callback: called with a ``fixpoint.Progress`` after every evaluation; returning something true stops the run.

    Raises:
        TypeError: anything but a chain.
        ValueError: an unknown ``init``, or one of the wrong shape; a ``max_rows`` that is no budget, or beside a solver
            that has one.
        fixpoint.ConvergenceError: with ``on_failure="raise"``.

    Example:
        >>> import fixpoint
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise
        >>> x_T = initial_noise(0, range(2), (3,))
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, x_T, NoiseSchedule.linear(), steps=20)
        >>> result = sample(chain, solver=fixpoint.Picard())
        >>> result.images.shape, result.rounds <= 20, result.evals < 20 * 2 * 20
        (torch.Size([2, 3]), True, True)
        >>> torch.allclose(result.images, chain.sequential()[:, -1], rtol=1e-2)
        True
    """
    if not isinstance(chain, SamplingChain):
        found = type(chain).__name__
        raise TypeError(f"chain must be a chain such as DDIMChain(denoiser, x_T, schedule), got a {found}")
    samples, limit, cost = len(chain.x_T), chain.steps + 1, None
    rounds, evals = chain.rounds, chain.evals
    if isinstance(solver, CausalQuasiNewton):
        solver, cost = _with_budget(solver, chain, max_rows)
        limit = _most_rounds(solver, samples, chain.steps)
        if init is None and solver.window != 1:  # a window of one has no use for a guess
            init = "prior"
    elif max_rows is not None:
        raise ValueError(f"max_rows is for CausalQuasiNewton; give the chain one to bound calls of {solver!r}")
    max_evals = limit if max_evals is None else max_evals
    settled = _Settled()
    latents = samples * chain.steps
    with torch.no_grad(), ProgressBar.tqdm(total=latents, desc="sampling", unit="latent", disable=not progress) as bar:

        def report(state: Progress) -> object:
            if progress:
                done = f"{samples - state.active}/{samples}"
                bar.set_postfix(rounds=state.nfev, done=done, rows=chain.evals - evals, refresh=False)
                bar.update((settled(state.value) if state.active else latents) - bar.n)
            return callback(state) if callback else None

        solution = solve(
            chain if isinstance(solver, CausalQuasiNewton) else _ChangedRows(chain),
            _start(chain, init),
            solver=solver,
            backward=None,
            rtol=rtol,
            atol=atol,
            max_evals=max_evals,
            batch_dims=chain.batch_dims,
            on_failure=on_failure,
            record=record,
            callback=report if progress or callback else None,
        )
    trajectory = chain.trajectory(solution.value)
    return SamplingResult(
        images=trajectory[:, -1],
        trajectory=trajectory,
        solution=solution,
        rounds=chain.rounds - rounds,
        evals=chain.evals - evals,
        max_rows=solver.max_rows if isinstance(solver, CausalQuasiNewton) else None,
        cost=cost,
    )


def deq_ddim_settings(chain: SamplingChain, reading: Literal["paper", "released-code"] = "paper") -> dict[str, Any]:
    """The options of :func:`sample` that DEQ-DDIM (Pokle et al., 2022, Appendix A) was run with.

    Both readings use Anderson acceleration with a history of 5 to a relative residual of 1e-3, in at most 15
    evaluations (50 for a stochastic chain). They differ in what shares its coefficients: in the ``"paper"`` one set for
    a sample's whole trajectory, in the ``"released-code"`` one set for each latent, with a ridge of 1e-3.

    Two things are this package's: the ridge weighs the coefficients of an orthonormal basis of the differences (the
    authors' is absolute), and the result is the best latents that were evaluated (theirs is the last).

    Args:
        chain: the chain that is to be sampled.
        reading: ``"paper"`` or ``"released-code"``.

    Returns:
        ``solver``, ``rtol`` and ``max_evals``, for ``sample(chain, **settings)``.

    Raises:
        ValueError: another reading.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=50)
        >>> deq_ddim_settings(chain)["max_evals"]
        15
    """
    if reading not in ("paper", "released-code"):
        raise ValueError(f"reading must be 'paper' or 'released-code', got {reading!r}")
    solver: Solver = Anderson(memory=5)
    if reading == "released-code":
        solver = Blockwise(Anderson(memory=5, ridge=1e-3), blocks=chain.steps)
    return {"solver": solver, "rtol": 1e-3, "max_evals": 15 if chain.noise is None else 50}


class _ChangedRows:
    """The chain's map, which asks the denoiser only about inputs that differ from those of the evaluation before."""

    def __init__(self, chain: SamplingChain) -> None:
        self._chain = chain
        self._x: Tensor | None = None
        self._out: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        x = self._chain.inputs(z)
        if self._x is None or self._out is None:
            # A copy, to write later rounds into: the denoiser may use the memory of its output again.
            self._out = self._chain.denoise_all(x).clone()
        else:
            changed = (x != self._x).reshape(*x.shape[:2], -1).any(dim=2)
            if bool(changed.any()):
                sample, step = changed.nonzero(as_tuple=True)
                # No name for the rows: they would be held while the steps are added up.
                self._out[sample, step] = self._chain.denoise(self._chain.latents(x[sample, step], step), sample, step)
        self._x = x
        return self._chain.accumulate(x, self._out)


class _Settled:
    """How many latents a round has left as they were, and all before them in their chain too."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def __call__(self, value: Tensor) -> int:
        before, self._value = self._value, value
        if before is None:
            return 0
        return int((before == value).flatten(2).all(dim=2).cumprod(dim=1).sum())


def _with_budget(
    solver: CausalQuasiNewton, chain: SamplingChain, max_rows: int | str | None
) -> tuple[CausalQuasiNewton, BatchCost | None]:
    """The solver with a budget of rows, and the denoiser's cost where that was measured."""
    samples, steps, cost = len(chain.x_T), chain.steps, None
    if solver.window is not None or solver.max_rows is not None:
        if max_rows is not None:
            raise ValueError(f"pass max_rows={max_rows!r}, or a solver with a window or max_rows; found {solver!r}")
        return solver, None
    if not samples:
        return solver, None
    if max_rows is None:
        budget = usual_rows(chain)
    elif max_rows == "auto":
        if is_sharded(chain.denoiser):
            raise ValueError('max_rows="auto" goes by a clock, and those of the ranks differ: give a number of rows')
        cost = BatchCost.measure(chain)
        budget = cost.best_rows(samples, steps)
    elif isinstance(max_rows, int) and not isinstance(max_rows, bool) and max_rows >= 1:
        budget = max_rows
    else:
        raise ValueError(f'max_rows must be an int of at least 1, "auto" or None, got {max_rows!r}')
    if max_rows in (None, "auto"):
        rows = samples * (1 + solver.probes)
        if budget >= rows * steps:
            return solver, cost
        if budget < _LEAST_WINDOW * rows:
            return replace(solver, window=1, max_rows=samples, probes=0), cost  # the ordinary sampler
    return replace(solver, max_rows=budget), cost


def _most_rounds(solver: CausalQuasiNewton, samples: int, steps: int) -> int:
    """Rounds that always do: samples take turns, are solved anew, go on step by step, and are measured in between."""
    waves = parts = 1
    if solver.max_states and solver.max_rows and samples:
        waves = math.ceil(samples / solver.max_states)
        parts = math.ceil(samples * steps / solver.max_rows)
    return 6 * waves * steps + 4 * parts


def _start(chain: SamplingChain, init: str | Tensor | None) -> Tensor:
    if isinstance(init, Tensor):
        chain.inputs(init)  # refuses another shape
        return init.detach()
    if init not in (None, "prior", "x_T", "zeros"):
        raise ValueError(f"init must be 'prior', 'x_T', 'zeros' or a tensor of latents, got {init!r}")
    if init == "prior":
        return chain.guess
    return torch.zeros_like(chain.z0) if init == "zeros" else chain.z0
