"""Rounds and rows of today's samplers: flow matching, Euler, Heun, DPM-Solver++, UniPC, on the embedded U-Nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import diffusers
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.curves import spread
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import SamplingChain, embedded, initial_noise, sample
from fixpoint_diffusion.chains import chain_from_scheduler

RTOL = 1e-3
_NEVER_ABOVE = 2 * RTOL
HOW_TO_READ = f"""\
The embedded U-Nets, solved to rtol {RTOL:g} with CausalQuasiNewton by its own rule, each sample by itself.
calls: of the network in sequence. rounds: batched calls in parallel, median/worst sample, and the median by calls.
rows: network rows by those of the sequential sampler, median. error: ||x_0 - sequential|| / ||sequential||, the worst.
What is fewer than the calls in sequence saves time only where a large call costs less than as many small ones.
Flow: flow-digits, which was trained along (1 - sigma) x_0 + sigma eps; the others: ddpm-digits.
"""
# By name, the scheduler's class and its options. The network is the flow's where the name begins so.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow, Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow, Euler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow, UniPC-2, shift 3": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler, ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun, Karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ 2M, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ 2M, SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {}),
}
_model = cache(embedded)


def chain_of(name: str, calls: int, samples: range) -> SamplingChain:
    """The chain of some samples; Heun's method is given half as many steps, for the same number of calls."""
    kind, options = SAMPLERS[name]
    flow = name.startswith("flow")
    denoiser = _model("flow-digits" if flow else "ddpm-digits")
    if not flow:
        keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        options = options | {key: (denoiser.schedule_config or {})[key] for key in keys}
    return chain_from_scheduler(
        denoiser,
        initial_noise(0, samples, (1, 8, 8)),
        getattr(diffusers, kind)(**options),
        steps=calls if kind != "HeunDiscreteScheduler" else (calls + 1) // 2,
        first_sample=samples.start,
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """One sampler with so many calls in sequence: what each sample took."""

    sampler: str
    calls: int
    rounds: list[float]
    rows: list[float]
    errors: list[float]


def measure(calls: Sequence[int], *, samples: int, only: Sequence[str] = tuple(SAMPLERS)) -> list[Found]:
    """Solve and compare."""
    wanted = [(count, name) for count in calls for name in only]
    return [
        solved(name, partial(chain_of, name, count), in_parallel, samples=samples)
        for count, name in tqdm(wanted, unit="sampler", mininterval=1)
    ]


def in_parallel(chain: SamplingChain) -> Tensor:
    """x_0 by the default solver."""
    return sample(chain, rtol=RTOL, max_rows=10**6).images


def solved(
    name: str, make: Callable[[range], SamplingChain], solve: Callable[[SamplingChain], Tensor], *, samples: int
) -> Found:
    """What ``solve`` takes for each sample's chain, which ``make`` makes, and how far off the sequential x_0 it ends.

    Args:
        name: of the sampler, for the table.
        make: given a range of one sample.
        solve: from a chain to x_0.
        samples: how many, each by itself.
    """
    rounds, rows, errors = list[float](), list[float](), list[float]()
    for i in range(samples):
        chain = make(range(i, i + 1))
        expected = chain.sequential(trajectory=False)
        chain.reset_counters()
        x_0 = solve(chain)
        rounds.append(chain.rounds)
        rows.append(chain.evals / chain.steps)
        errors.append(float((x_0 - expected).norm() / expected.norm()))
    return Found(sampler=name, calls=chain.steps, rounds=rounds, rows=rows, errors=errors)


def table(found: Sequence[Found], how_to_read: str = HOW_TO_READ) -> str:
    """A line for each sampler."""
    width = max(len(each.sampler) for each in found)
    lines = [how_to_read, f"{'':{width}} calls  rounds   by calls   rows   error"]
    for each in found:
        median, worst = spread(each.rounds)
        lines.append(
            f"{each.sampler:{width}} {each.calls:>5} {f'{median:g}/{worst:g}':>7} {median / each.calls:>10.2f} "
            f"{spread(each.rows)[0]:>6.1f} {max(each.errors):>7.0e}"
        )
    return "\n".join(lines)


def targets(found: Sequence[Found]) -> list[Target]:
    """A third of the calls for 50 of them, half for 28; and no image beside the sequential one."""
    aims = []
    for each in found:
        share, words = (1 / 3, "a third") if each.calls > 40 else (1 / 2, "half")
        median, worst = spread(each.rounds)
        aims.append(
            Target(
                f"{each.sampler}, {each.calls} calls: at most {words} of them as rounds",
                median <= share * each.calls,
                f"median {median:g}, worst {worst:g}",
            )
        )
    worst = max(max(each.errors) for each in found)
    aims.append(Target(f"never worse than {_NEVER_ABOVE:g}", worst <= _NEVER_ABOVE, f"worst error {worst:.1e}"))
    return aims


def as_json(found: Sequence[Found]) -> dict[str, object]:
    """Every sample."""
    return {"samplers": [{**vars(each), "errors": [float(f"{e:.3g}") for e in each.errors]} for each in found]}
