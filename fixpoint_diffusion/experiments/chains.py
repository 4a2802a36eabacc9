"""DDIM chains by every method against the sequential sampler (DEQ-DDIM, Table 1 and Figures 1, 2 and 9 in small)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fixpoint import CausalQuasiNewton, Picard, Progress, bench
from fixpoint_diffusion.chains import DDIMChain, StochasticDDIMChain
from fixpoint_diffusion.denoisers import embedded
from fixpoint_diffusion.inversion import ExplicitInverse, InverseMethod, ParallelInverse, invert
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import deq_ddim_settings, sample
from fixpoint_diffusion.training.data import load_digits, split_held_out

SEQUENTIAL, CAUSAL, PER_SAMPLE = "sequential", "Causal quasi-Newton", "Anderson, per sample"
MAX_ROUNDS = 50  # of whatever the paper sets no limit for
COLUMNS = ("chain", "method", "rounds", "denoiser rows", "seconds", "error of x_0", "converged")
HOW_TO_READ = (
    "A round is one batched call of the denoiser; rows are the latents in all calls, without those that had not "
    "changed. The error is ||x_0 - sequential|| / ||sequential|| of the worst sample. Converged: samples that met the "
    "method's tolerance of 1e-3 within the rounds allowed, by the residual ||h(z) - z|| of the whole trajectory, and "
    "for the causal solver by the predicted error of every latent."
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method on one chain: its costs, its images ``(B, *shape)``, and what it left behind on the way."""

    rounds: int
    rows: int
    seconds: float
    error: float
    converged: str
    images: Tensor
    residuals: Sequence[float] = ()  # of the worst sample, after each round
    after: Sequence[tuple[int, int, float, float]] = ()  # rounds, rows, seconds and error of x_0, after each round
    latents: Mapping[int, Tensor] = field(default_factory=dict)  # {round: trajectory of the first sample}


def embedded_chain(*, steps: int, samples: int, seed: int = 0, eta: float = 0.0) -> DDIMChain:
    """A chain of the embedded U-Net, deterministic for ``eta=0``."""
    denoiser = embedded("ddpm-digits")
    assert denoiser.sample_shape is not None
    assert denoiser.schedule_config is not None
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    x_T = initial_noise(seed, range(samples), denoiser.sample_shape)
    if eta == 0:
        return DDIMChain(denoiser, x_T, schedule, steps=steps)
    return StochasticDDIMChain(denoiser, x_T, schedule, steps=steps, eta=eta, seed=seed)


def ddim_study(quick: bool) -> bench.Study:
    """The deterministic chain, short and long, and the choice of where the solver starts."""
    sizes = ((20, 4), (100, 1)) if quick else ((100, 16), (1000, 4))
    chains = [embedded_chain(steps=steps, samples=samples) for steps, samples in sizes]
    results = {_name(chain): run_methods(chain) for chain in chains}
    pictures = [block for chain in chains for block in method_pictures(chain, results[_name(chain)])]
    return bench.Study(
        "ddim-chain",
        "DDIM chain: all latents as one fixed point",
        [
            method_table("DDIM chain", results),
            *pictures,
            *start_blocks(embedded_chain(steps=sizes[0][0], samples=4)),
            *inversion_blocks(embedded_chain(steps=20 if quick else 50, samples=2 if quick else 6)),
        ],
        "Every method gets the same x_T. Anderson is given the settings of DEQ-DDIM: memory 5, tolerance 1e-3, at most "
        "15 rounds; its coefficients are found for a sample's whole chain, or for each timestep by itself. On a "
        "processor that a batch of one image keeps busy, time follows denoiser rows; rounds are what counts where a "
        "large batch costs little more than a small one. The causal solver keeps to as many rows a round as suit "
        "the device.",
        headline=headline(chains[-1], results[_name(chains[-1])]),
    )


def sddim_study(quick: bool) -> bench.Study:
    """The stochastic chain with as much noise as DDPM."""
    steps, samples = (20, 4) if quick else (100, 16)
    chain = embedded_chain(steps=steps, samples=samples, eta=1.0)
    outcomes = run_methods(chain)
    return bench.Study(
        "sddim-chain",
        "Stochastic DDIM chain (eta = 1)",
        [method_table("Stochastic DDIM chain", {_name(chain): outcomes}), *method_pictures(chain, outcomes)],
        "The noises are drawn once and are the same for every method, the sequential sampler included. Anderson is "
        "given the settings of DEQ-sDDIM: memory 5, tolerance 1e-3, at most 50 rounds.",
        headline=headline(chain, outcomes),
    )


def run_methods(chain: DDIMChain) -> dict[str, Outcome]:
    """The sequential sampler, the solver made for chains, plain iteration, and the two readings of DEQ-DDIM."""
    start = time.perf_counter()
    reference = _sequential(chain)
    seconds = time.perf_counter() - start
    rows = chain.steps * len(reference)
    sequential = Outcome(rounds=chain.steps, rows=rows, seconds=seconds, error=0.0, converged="exact", images=reference)
    methods: dict[str, dict[str, Any]] = {
        CAUSAL: {"solver": CausalQuasiNewton(), "rtol": 1e-3},
        "Picard": {"solver": Picard(), "max_evals": MAX_ROUNDS},
        PER_SAMPLE: deq_ddim_settings(chain, "paper"),
        "Anderson, per timestep": deq_ddim_settings(chain, "released-code"),
    }
    return {
        SEQUENTIAL: sequential,
        **{label: run_method(chain, reference, **options) for label, options in methods.items()},
    }


def run_method(chain: DDIMChain, reference: Tensor, **options: Any) -> Outcome:
    """``sample(chain, **options)``, compared with ``reference`` ``(B, *shape)``."""
    latents: dict[int, Tensor] = {}
    after: list[tuple[int, int, float, float]] = []
    rounds, rows, start = chain.rounds, chain.evals, time.perf_counter()

    def look(progress: Progress) -> None:
        seconds = time.perf_counter() - start
        error = _error(chain.trajectory(progress.value)[:, -1], reference)
        after.append((chain.rounds - rounds, chain.evals - rows, seconds, error))
        if progress.nfev in (1, 2, 3, 5, 8, 15):
            latents[progress.nfev] = progress.value[0].clone()

    result = sample(chain, record=True, on_failure="ignore", callback=look, progress=True, **options)
    seconds = time.perf_counter() - start
    latents[len(after)] = result.trajectory[0]
    assert result.solution.trace is not None
    return Outcome(
        rounds=result.rounds,
        rows=result.evals,
        seconds=seconds,
        error=_error(result.images, reference),
        converged=f"{int(result.solution.converged.sum())} of {len(reference)}",
        images=result.images,
        residuals=result.solution.trace.amax(dim=1).tolist(),
        after=after,
        latents=latents,
    )


def _error(images: Tensor, reference: Tensor) -> float:
    """Relative error of the worst image; both ``(B, *shape)``."""
    return float(((images - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).max())


def _sequential(chain: DDIMChain) -> Tensor:
    with torch.no_grad():
        return chain.sequential(progress=True)[:, -1]


def _name(chain: DDIMChain) -> str:
    noise = f", eta={chain.eta:g}" if isinstance(chain, StochasticDDIMChain) else ""
    samples = len(chain.x_T)
    return f"T={chain.steps}{noise}, {samples} sample{'s' if samples > 1 else ''}"


def method_table(title: str, results: Mapping[str, Mapping[str, Outcome]]) -> bench.Table:
    """The costs of each method on each chain, and how far its images are from the sequential ones."""
    rows = [
        (name, label, o.rounds, o.rows, o.seconds, o.error, o.converged)
        for name, outcomes in results.items()
        for label, o in outcomes.items()
    ]
    return bench.Table(title, COLUMNS, rows, HOW_TO_READ)


def headline(chain: DDIMChain, outcomes: Mapping[str, Outcome]) -> str:
    """What the solver made for chains came to, in one line."""
    causal, ratio = outcomes[CAUSAL], outcomes[SEQUENTIAL].seconds / outcomes[CAUSAL].seconds
    samples = len(causal.images)
    missing = "" if causal.converged == f"{samples} of {samples}" else f", only {causal.converged} samples converged"
    return (
        f"{chain.steps} steps in {causal.rounds} rounds, {ratio:.1f} times as fast as one step after another, "
        f"error of x_0 {causal.error:.0e}{missing}."
    )


def method_pictures(chain: DDIMChain, outcomes: Mapping[str, Outcome]) -> list[bench.Block]:
    """Errors against costs, the time, images side by side, and the latents of one sample on the way."""
    name, whole = _name(chain), outcomes[SEQUENTIAL]
    wholes = {"rounds": whole.rounds, "denoiser rows": whole.rows, "seconds": whole.seconds}
    charts = [
        bench.Lines(
            f"{name}: error of x_0 against {what}",
            {
                label: ([costs[k] for costs in o.after], [error for *_, error in o.after])
                for label, o in outcomes.items()
                if o.after
            },
            what,
            "relative error, worst sample",
            caption=""
            if what != "seconds"
            else "Further left is better. A curve ends where every sample had "
            "converged, or at the limit; the sequential run has its x_0 at the line, and none before.",
            log_x=True,
            marks={"sequential run ends": cost},
        )
        for k, (what, cost) in enumerate(wholes.items())
    ]
    bars = bench.Bars(
        f"{name}: time",
        {label: outcome.seconds for label, outcome in outcomes.items()},
        "seconds",
        reference=SEQUENTIAL,
    )
    grid = bench.Images.of(
        f"{name}: images by method",
        torch.stack([o.images for o in outcomes.values()]),
        row_labels=list(outcomes),
        caption="One column a sample. Rows that look alike show methods that agree.",
    )
    return [*charts, bars, grid, *(_strip(chain, label, outcomes[label].latents) for label in (CAUSAL, PER_SAMPLE))]


def _strip(chain: DDIMChain, label: str, latents: Mapping[int, Tensor]) -> bench.Images:
    """Ten latents evenly along the chain and the last four, as in Figure 2 of the paper; one line a round."""
    chosen = sorted({*(k * chain.steps // 10 for k in range(10)), *range(chain.steps - 4, chain.steps)})
    return bench.Images.of(
        f"{_name(chain)}: latents over rounds, {label}",
        torch.stack([trajectory[chosen] for trajectory in latents.values()]),
        row_labels=[f"round {nfev}" for nfev in latents],
        column_labels=[f"x_{chain.steps - 1 - k}" for k in chosen],
        low=-2,
        high=2,
        caption="As Figure 2 of the DEQ-DDIM paper: one sample, from noise (left) to image (right), rounds downwards. "
        "Round 1 is the start; the last line is the result.",
    )


def start_blocks(chain: DDIMChain) -> list[bench.Block]:
    """Every latent starting at x_T, against zeros (Figure 9 of the paper)."""
    reference = _sequential(chain)
    anderson = deq_ddim_settings(chain, "paper")["solver"]
    outcomes = {
        f"{label} from {init}": run_method(chain, reference, solver=solver, max_evals=MAX_ROUNDS, init=init)
        for label, solver in (("Anderson", anderson), ("Picard", Picard()))
        for init in ("x_T", "zeros")
    }
    curves = {label: (range(1, len(o.residuals) + 1), o.residuals) for label, o in outcomes.items()}
    return [
        method_table("Where the solver starts", {_name(chain): outcomes}),
        bench.Lines(
            "Start: residual against rounds",
            curves,
            "rounds",
            "||h(z) - z||, worst sample",
            caption="As Figure 9 of the DEQ-DDIM paper: all latents start at x_T, or at zero. At most 50 rounds.",
        ),
    ]


def inversion_blocks(chain: DDIMChain) -> list[bench.Block]:
    """The noise behind real digits: in parallel, and by plain DDIM inversion."""
    images = split_held_out(load_digits())[1].images[: len(chain.x_T)]
    methods: dict[str, InverseMethod] = {"all steps at once": ParallelInverse(), "plain DDIM": ExplicitInverse()}
    found = {name: invert(chain, images, method=method, on_failure="ignore") for name, method in methods.items()}
    rows = [
        (
            name,
            inverse.rounds,
            inverse.evals,
            float(inverse.error.max()),
            f"{int(inverse.converged.sum())} of {len(images)}",
        )
        for name, inverse in found.items()
    ]
    best, plain = found.values()
    return [
        bench.Table(
            f"Inversion, T={chain.steps}",
            ("method", "rounds", "denoiser rows", "RMS error of x_0", "inverted"),
            rows,
            "Held-out digits. The error is that of the worst one, by the sequential sampler from the x_T that was "
            "found, for pixels from -1 to 1. Inverted: the error is within a thousandth of the image.",
        ),
        bench.Images.of(
            f"Inversion, T={chain.steps}: images and x_T",
            torch.stack([images, best.x_T / 2, best.reconstruction, plain.reconstruction]),
            row_labels=["image", "x_T", "from that x_T", "plain DDIM"],
            caption="Real digits, the noise from which the sampler arrives at them, what it makes of that noise, and "
            "what it makes of the noise that plain DDIM inversion finds. x_T is shown from -2 to 2.",
        ),
    ]
