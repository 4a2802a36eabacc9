"""Rounds and rows of today's samplers: flow matching, Euler, Heun, DPM-Solver++, UniPC, on the embedded U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.curves import spread
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import NoiseSchedule, embedded, initial_noise, sample
from fixpoint_diffusion.chains import chain_from_scheduler

RTOL = 1e-3
_NEVER_ABOVE = 2 * RTOL
HOW_TO_READ = f"""\
The embedded U-Net, solved to rtol {RTOL:g} with CausalQuasiNewton by its own rule, each sample by itself.
calls: of the network in sequence. rounds: batched calls in parallel, median/worst sample, and the median by calls.
rows: network rows by those of the sequential sampler, median. error: ||x_0 - sequential|| / ||sequential||, the worst.
What is fewer than the calls in sequence saves time only where a large call costs less than as many small ones.
Flow: the U-Net as a model of (1 - sigma) x_0 + sigma eps, asked at the level of the same signal-to-noise ratio.
"""
# A name, the scheduler's class and its options. The network is asked as a flow where the name begins so.
SAMPLERS: list[tuple[str, str, dict[str, Any]]] = [
    ("flow, Euler", "FlowMatchEulerDiscreteScheduler", {}),
    ("flow, Euler, shift 3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    (
        "flow, UniPC-2, shift 3",
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    ("DDIM", "DDIMScheduler", {"clip_sample": False}),
    ("Euler", "EulerDiscreteScheduler", {}),
    ("Euler, Karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("Euler, ancestral", "EulerAncestralDiscreteScheduler", {}),
    ("Heun, Karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPM-Solver++ 2M", "DPMSolverMultistepScheduler", {}),
    ("DPM-Solver++ 2M, Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPM-Solver++ 2M, SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPM-Solver++ 3M", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("UniPC-2", "UniPCMultistepScheduler", {}),
]


class AsFlow:
    """A network that predicts the noise as one that predicts ``eps - x_0`` along ``(1 - sigma) x_0 + sigma eps``.

    Args:
        denoiser: predicts the noise of latents at unit size.
    """

    prediction_type = "flow_prediction"

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.prior, self.sample_shape = denoiser, denoiser.prior, denoiser.sample_shape
        alphas = NoiseSchedule.from_diffusers(denoiser.schedule_config).alphas_cumprod
        self._log_ratios = ((1 - alphas) / alphas).log() / 2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """For latents ``(N, *shape)`` at timesteps ``1000 sigma`` ``(N,)``."""
        sigma = (t.double() / 1000).clamp(1e-4, 1)
        # Where there is next to no signal, the level of its training with the least.
        ratio = (sigma / (1 - sigma)).log().clamp(float(self._log_ratios[0]), float(self._log_ratios[-1]))
        above = torch.searchsorted(self._log_ratios, ratio.contiguous()).clamp(1, len(self._log_ratios) - 1)
        low, high = self._log_ratios[above - 1], self._log_ratios[above]
        time = above - 1 + (ratio - low) / (high - low)
        alpha, sigma = (y.reshape(-1, *[1] * (x.ndim - 1)) for y in ((1 + (2 * ratio).exp()).reciprocal(), sigma))
        unit = x.double() / ((1 - sigma).square() + sigma.square()).sqrt()
        eps = self.denoiser(unit.to(x.dtype), time.to(x.dtype)).double()
        image = (unit - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        return ((x - image) / sigma).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One sampler with so many calls in sequence: what each sample took."""

    sampler: str
    calls: int
    rounds: list[float]
    rows: list[float]
    errors: list[float]


def measure(steps: Sequence[int], *, samples: int, only: Sequence[str] | None = None) -> list[Found]:
    """Solve and compare; Heun's method is given half as many steps, for the same number of calls."""
    unet, found = embedded("ddpm-digits"), []
    process = {
        key: unet.schedule_config[key] for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    }  # type: ignore[index]
    cases = [(count, *case) for count in steps for case in SAMPLERS if only is None or case[0] in only]
    for count, name, kind, options in tqdm(cases, unit="sampler", mininterval=1):
        flow = name.startswith("flow")
        scheduler = getattr(diffusers, kind)(**options | ({} if flow else process))
        rounds, rows, errors = list[float](), list[float](), list[float]()
        for i in range(samples):
            chain = chain_from_scheduler(
                AsFlow(unet) if flow else unet,
                initial_noise(0, range(i, i + 1), (1, 8, 8)),
                scheduler,
                steps=count if name[:4] != "Heun" else (count + 1) // 2,
                first_sample=i,
            )
            expected = chain.sequential(trajectory=False)
            result = sample(chain, rtol=RTOL, max_rows=10**6)
            rounds.append(result.rounds)
            rows.append(result.evals / chain.steps)
            errors.append(float((result.images - expected).norm() / expected.norm()))
        found.append(Found(sampler=name, calls=chain.steps, rounds=rounds, rows=rows, errors=errors))
    return found


def table(found: Sequence[Found]) -> str:
    """A line for each sampler."""
    width = max(len(each.sampler) for each in found)
    lines = [HOW_TO_READ, f"{'':{width}} calls  rounds   by calls   rows   error"]
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
