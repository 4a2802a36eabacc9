"""What a sampling job's options mean for an FPDM: iterations, starts and solver of its layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fixpoint import Anderson, Broyden, CausalQuasiNewton, Picard, ProgressBar, Solver
from fixpoint_diffusion.denoisers import FPDMDenoiser
from fixpoint_diffusion.models import FPDMConfig
from fixpoint_diffusion.models.allocation import allocate, iterations_per_step
from fixpoint_diffusion.options.sampling import SamplingOptions, SolverName, flag
from fixpoint_diffusion.processes import Transitions
from fixpoint_diffusion.sampling.fpdm.adaptive import threshold_for
from fixpoint_diffusion.sampling.fpdm.iterations import ToTolerance
from fixpoint_diffusion.sampling.fpdm.joint import follow_jointly
from fixpoint_diffusion.sampling.fpdm.sampler import FPDMOptions, Reuse, follow_transitions

# Images; what they cost, to be added up; what was chosen by measuring: as in ``SampleBatch``.
Drawn = tuple[Tensor, dict[str, float], dict[str, float]]

LAYER_SOLVERS: dict[str, Solver] = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}
FPDM_OPTIONS = (
    "iterations",
    "block_passes",
    "allocation",
    "slope",
    "layer_rtol",
    "layer_solver",
    "reuse",
    "extrapolate",
)
DEFAULT_ITERATIONS = 4
# Images on which the threshold of adaptive iterations is found: the first of the job.
PROBE_IMAGES = 16


def refuse_fpdm_options(options: SamplingOptions) -> None:
    """Raise for options that only an FPDM has; for a model that is none."""
    given = [flag(name) for name in FPDM_OPTIONS if getattr(options, name) is not None]
    if given:
        raise ValueError(f"only FPDM models have a layer to solve: leave out {' and '.join(given)}")


class FPDMJob:
    """Samples batches of a job from an FPDM, step by step or jointly with the states of its layer.

    Args:
        denoiser: the FPDM.
        options: of the job.
        transitions: the steps of its sampler.

    Attributes:
        settings: JSON-able: ``iterations`` in each step, ``reuse``, and ``block_passes``, the cost of one image in the
            paper's measure; None where a tolerance decides, or a parallel solver, which asks about steps repeatedly.
        chain_denoiser: the denoiser of a chain whose layers are solved inside; None where this class samples.
        passes_of_call: block passes of one call of that denoiser, for one image; None where a tolerance decides.

    Raises:
        ValueError: for iterations that do not fit the steps.
    """

    def __init__(self, denoiser: FPDMDenoiser, options: SamplingOptions, transitions: Transitions) -> None:
        self._model, self._prior = denoiser.model, denoiser.prior
        self._options, self._transitions = options, transitions
        self._solver = None if options.layer_solver is None else LAYER_SOLVERS[options.layer_solver]
        config = self._model.config
        self._total = _total_iterations(options, config)
        self._iterations = self._planned()
        self._threshold: ToTolerance | None = None
        reuse = options.reuse is not False and (options.solver == SolverName.sequential or options.reuse is True)
        self._reuse: Reuse = "extrapolate" if options.extrapolate else reuse
        passes = None
        if not isinstance(self._iterations, ToTolerance | None):
            counts = iterations_per_step(self._iterations, options.steps)
            passes = sum(config.block_passes(count) for count in counts)
        told = self._iterations if passes is not None else None
        if options.solver != SolverName.sequential:
            passes = None
        self.settings: dict[str, Any] = {"iterations": told, "reuse": self._reuse, "block_passes": passes}
        self.chain_denoiser: FPDMDenoiser | None = None
        self.passes_of_call: int | None = None
        if options.solver != SolverName.sequential and not self._reuse:
            how: dict[str, Any] = {"depth": self._iterations}
            if options.layer_rtol is not None:
                how = {"rtol": options.layer_rtol}
            else:
                assert isinstance(self._iterations, int)
                self.passes_of_call = config.block_passes(self._iterations)
            self.chain_denoiser = FPDMDenoiser(
                self._model,
                schedule_config=denoiser.schedule_config,
                prior=self._prior,
                learned_variance=transitions.learned_variance,
                solver=self._solver,
                **how,
            )

    def sample(self, x_T: Tensor, y: Tensor | None, *, first: int, probe: Any, progress: bool) -> Drawn:
        """Sample some images.

        Args:
            x_T: their noise ``(N, C, H, W)``.
            y: their classes ``(N,)``.
            first: number of the first of them among the job's images.
            probe: gives noise and classes of the images on which a threshold is found.
            progress: show a bar.

        Returns:
            Images ``(N, C, H, W)``, and ``counts`` and ``chosen`` of their ``SampleBatch``.

        Raises:
            ValueError: where no threshold meets the budget of adaptive iterations.
        """
        if self._options.solver != SolverName.sequential:
            return self._jointly(x_T, y, first, progress)
        options = self._step_options(y, first)
        options["iterations"] = iterations = self._iterations or self._adaptive(*probe())
        run = follow_transitions(self._model, x_T, self._transitions, **options)
        images, evals = torch.empty(0), 0
        done = torch.ones(len(x_T), dtype=torch.bool, device=x_T.device)
        bar = ProgressBar.tqdm(run, total=self._transitions.steps, desc="sampling", unit="step", disable=not progress)
        for step in bar:
            images = step.after
            evals = evals + step.solution.evals.sum()  # stays on the device until the end
            done &= step.solution.converged.unflatten(0, (-1, len(x_T))).all(dim=0)
        if not isinstance(iterations, ToTolerance):
            return images, {}, {}
        config, halves = self._model.config, 1 if self._options.guidance == 1 else 2
        explicit = self._transitions.steps * config.block_passes(0) * len(x_T)
        counts: dict[str, float] = {"total_block_passes": explicit + config.implicit_blocks * int(evals) / halves}
        if self._options.layer_rtol is not None:
            return images, {**counts, "converged": int(done.sum())}, {}
        return images, counts, {"layer_atol": iterations.atol}

    def _jointly(self, x_T: Tensor, y: Tensor | None, first: int, progress: bool) -> Drawn:
        options = self._options
        assert isinstance(self._iterations, int)
        assert not isinstance(options.max_rows, str)
        joint = follow_jointly(
            self._model,
            x_T,
            self._transitions,
            iterations=self._iterations,
            seed=options.seed,
            y=y,
            guidance=options.guidance,
            first_sample=first,
            prior=self._prior,
            solver=CausalQuasiNewton(max_rows=options.max_rows),
            rtol=options.tolerance,
            max_evals=options.max_rounds,
            on_failure="ignore",  # whoever runs the job sees the count
            progress=progress,
        )
        counts = {"rounds": joint.rounds, "evals": joint.evals, "converged": int(joint.solution.converged.sum())}
        return joint.images, {**counts, "total_block_passes": joint.block_passes * len(x_T)}, {}

    def _step_options(self, y: Tensor | None, first: int) -> FPDMOptions:
        options = self._options
        return {
            "reuse": self._reuse,
            "solver": self._solver,
            "seed": options.seed,
            "y": y,
            "guidance": options.guidance,
            "first_sample": first,
        }

    def _planned(self) -> int | tuple[int, ...] | ToTolerance | None:
        """The iterations of every step; None for adaptive ones, whose threshold is found when it is needed."""
        options = self._options
        if options.layer_rtol is not None:
            return ToTolerance(rtol=options.layer_rtol)
        if options.allocation == "adaptive":
            return None
        if options.allocation is not None or options.block_passes is not None:
            slope = {} if options.slope is None else {"slope": options.slope}
            return allocate(self._total, options.steps, options.allocation or "constant", **slope)
        given = DEFAULT_ITERATIONS if options.iterations is None else options.iterations
        if isinstance(given, tuple) and len(given) != options.steps:
            raise ValueError(f"--iterations lists {len(given)} numbers; expected one for each of {options.steps} steps")
        return given

    def _adaptive(self, x_T: Tensor, y: Tensor | None) -> ToTolerance:
        if self._threshold is None:

            def spent(until: ToTolerance) -> float:
                options = {**self._step_options(y, 0), "iterations": until}
                run = follow_transitions(self._model, x_T, self._transitions, **options)  # type: ignore[arg-type]
                return sum(float(step.solution.evals.double().mean()) for step in run)

            self._threshold = threshold_for(spent, budget=self._total, steps=self._transitions.steps)
        return self._threshold


def _total_iterations(options: SamplingOptions, config: FPDMConfig) -> int:
    """Iterations of the layer in all steps, as ``--block-passes`` or ``--iterations`` allow."""
    if options.block_passes is None:
        given = DEFAULT_ITERATIONS if options.iterations is None else options.iterations
        return sum(iterations_per_step(given, options.steps)) if isinstance(given, int) else sum(given)
    total = (options.block_passes - options.steps * config.block_passes(0)) // config.implicit_blocks
    if total < options.steps:
        raise ValueError(
            f"--block-passes {options.block_passes} is too few: one iteration in each of {options.steps} steps takes "
            f"{options.steps * config.block_passes(1)}"
        )
    return total
