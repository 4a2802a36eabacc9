"""A step of Heun's method asks the network twice: as two steps of the chain, or both in one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fixpoint
from benchmarks.chains.curves import spread
from benchmarks.chains.modern import RTOL, chain_of
from fixpoint_diffusion import SamplingChain, sample

SAMPLER = "Heun, Karras"
HOW_TO_READ = f"""\
{SAMPLER}, on the embedded U-Net, solved to rtol {RTOL:g} with CausalQuasiNewton, each sample by itself.
calls: of the network in sequence, by the ordinary sampler. in parallel: batched calls in sequence, median/worst sample;
a round of steps that hold both calls makes two. rows: network rows by those of the ordinary sampler, median. error: of
x_0, the worst.
"""


class BothCalls:
    """A chain of Heun's method of which one step makes both calls, one after the other: half as many states."""

    def __init__(self, chain: SamplingChain) -> None:
        self.chain = chain
        self.steps = (chain.steps + 1) // 2
        self.start = chain.begin(chain.x_T)
        self.z0 = chain.guess[:, [min(2 * k + 1, chain.steps - 1) for k in range(self.steps)]]
        slopes = torch.cat([chain.slopes, torch.ones_like(chain.slopes[:1])])  # the last step makes one call
        self.slopes = slopes[0 : 2 * self.steps : 2] * slopes[1 : 2 * self.steps : 2]
        self.basis = chain.basis

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """States after chosen steps, see :class:`fixpoint.Chain`."""
        half = self.chain.transition(x, sample, 2 * step)
        second = 2 * step + 1 < self.chain.steps
        after = half.clone()
        if second.any():
            after[second] = self.chain.transition(half[second], sample[second], 2 * step[second] + 1)
        return after


@dataclass(frozen=True, kw_only=True)
class Found:
    """One form with so many calls in sequence: what each sample took."""

    form: str
    calls: int
    rounds: list[float]
    rows: list[float]
    errors: list[float]


def measure(calls: Sequence[int], *, samples: int) -> list[Found]:
    """Solve both forms."""
    found = []
    for count in calls:
        for form in ("two steps of the chain", "one step with both calls"):
            rounds, rows, errors = list[float](), list[float](), list[float]()
            for i in range(samples):
                chain = chain_of(SAMPLER, count, range(i, i + 1))
                expected = chain.sequential(trajectory=False)
                chain = chain_of(SAMPLER, count, range(i, i + 1))
                if form.startswith("two"):
                    images = sample(chain, rtol=RTOL, max_rows=10**6).images
                else:
                    solved = fixpoint.solve(
                        BothCalls(chain), solver=fixpoint.CausalQuasiNewton(), backward=None, rtol=RTOL, max_evals=200
                    )
                    images = chain.latents(solved.value[:, -1], torch.tensor([chain.steps]))
                rounds.append(chain.rounds)
                rows.append(chain.evals / chain.steps)
                errors.append(float((images - expected).norm() / expected.norm()))
            found.append(Found(form=form, calls=chain.steps, rounds=rounds, rows=rows, errors=errors))
    return found


def table(found: Sequence[Found]) -> str:
    """A line for each form."""
    width = max(len(each.form) for each in found)
    lines = [HOW_TO_READ, f"{'':{width}} calls  in parallel   rows   error"]
    for each in found:
        median, worst = spread(each.rounds)
        lines.append(
            f"{each.form:{width}} {each.calls:>5} {f'{median:g}/{worst:g}':>12} "
            f"{spread(each.rows)[0]:>6.1f} {max(each.errors):>7.0e}"
        )
    return "\n".join(lines)


def as_json(found: Sequence[Found]) -> dict[str, object]:
    """Every sample."""
    return {"forms": [{**vars(each), "errors": [float(f"{e:.3g}") for e in each.errors]} for each in found]}
