"""Error against rounds: how many batched calls, one after another, each method takes to an error of x_0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.inversion.cases import Setting, chain, held_out
from benchmarks.inversion.cells import Cell, Cells, pair, spread
from benchmarks.inversion.methods import Method, attempt, peers, rms, sampled
from benchmarks.inversion.tables import run_table
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import DDIMChain, ParallelInverse, StepwiseInverse
from fixpoint_diffusion.inversion import InverseRound

ERRORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
HOW_TO_READ = """\
Held-out real digits, DDIM chains of T steps, embedded U-Net. error: RMS of what the ordinary sampler makes of the x_T
that was found, minus the image.
rounds to: batched denoiser calls in sequence until the median (worst) sample has at most that error for good; -: never.
Ours is looked at after rounds from 2 to 25, and ends there; a peer is run with several
numbers of iterations a step, of which the least that suffices counts; five and more are for AIDI and ReNoise alone.
digits, rows, s, claims: of the whole run; s: seconds of one processor; claims: the share of samples whose own claim to
have reached the tolerance, 1e-3 or as the name says, and 1e-5 for ours, parallel, is true. Ours runs the sampler before
it claims; of the peers, small residuals at every step are taken for a claim.
GNRI's rounds each also take a product with the Jacobian, two more calls' worth, which is not counted.
Where T is large, or a method far behind, fewer digits are inverted, to keep the whole within minutes. "ours, to 1e-03"
is asked for that error.
"""
_LOOKS = (2, 4, 6, 8, 10, 12, 14, 16, 20, 25)
_FINEST = 1e-5
_CLAIM = 1e-3  # what peers are to claim
# Most rounds to an error, for T.
_ROUNDS = {1000: 8, 200: 10, 50: 12, 10: 16}
_ROUNDS_FINEST = 25
_ROWS = 2.5  # most rows for each step at T = 1000
_HALF_FROM = 50


@dataclass(frozen=True)
class Size:
    """How many digits ours, parallel, is tried on, and what goes step by step; and the peers' iterations of a step."""

    steps: int
    ours: int
    peers: int = 0
    iterations: tuple[int, ...] = ()


FULL = (
    Size(10, 64, 16, (1, 2, 5, 10, 20)),
    Size(20, 16, 8, (1, 2, 5, 10)),
    Size(50, 64, 8, (1, 2, 5, 10)),
    Size(100, 8, 4, (1, 2, 5)),
    Size(200, 16),
    Size(1000, 8, 1, (1, 2)),
)
QUICK = (Size(4, 2, 1, (1, 2)),)
# Where steps or iterations are many, only peers that are ahead where they are few.
_TO_CLAIM = "ours, to 1e-03, parallel"
_MANY_STEPS, _MANY_ITERATIONS = 1000, 5
_FEW = ("DDIM inversion", "AIDI plain", "AIDI Anderson", "ReNoise")
_FEWEST = _FEW[:3]


def measure(cells: Cells, quick: bool) -> Cell:
    """Every method at every size."""
    found: Cell = {}
    for size in QUICK if quick else FULL:
        images = held_out(size.ours)[0]
        for name, compute in _runs(size, images):
            found[name] = {"steps": size.steps, **cells(name, compute)}
    return found


def _runs(size: Size, images: torch.Tensor) -> Iterator[tuple[str, Any]]:
    setting = Setting(size.steps)

    def named(method: str) -> str:
        return f"T={size.steps}, {method}"

    yield named("ours, parallel"), lambda: _curve(chain(setting, images), images)
    few = images[: size.peers or size.ours]
    if size.peers:
        for tolerance in (1e-3, 1e-5):
            method = Method(f"ours, stepwise, to {tolerance:.0e}", StepwiseInverse(), ours=True)
            if size.steps < _MANY_STEPS or tolerance == _CLAIM:
                yield named(method.name), _attempt(method, setting, few, tolerance)
    for iterations in size.iterations:
        for method in peers(iterations):
            many = size.steps >= _MANY_STEPS
            if (iterations < _MANY_ITERATIONS and not many) or method.name.startswith(_FEWEST if many else _FEW):
                yield named(method.name), _attempt(method, setting, few, _CLAIM)
    if size.steps >= _MANY_STEPS:  # where the rows to that error are aimed at
        method = Method(_TO_CLAIM, ParallelInverse(second_try=None), ours=True)
        yield named(_TO_CLAIM), _attempt(method, setting, images, _CLAIM)


def _attempt(method: Method, setting: Setting, images: torch.Tensor, tolerance: float) -> Any:
    return lambda: attempt(method, chain(setting, images), images, tolerance=tolerance)


def _curve(chain: DDIMChain, images: torch.Tensor) -> Cell:
    """One run to the finest error, and the error and its prediction at the rounds that are looked at."""
    rounds: list[InverseRound] = []
    method = Method("", ParallelInverse(max_rounds=_LOOKS[-1], second_try=None), ours=True)
    cell = attempt(method, chain, images, tolerance=_FINEST, callback=rounds.append)
    looks = [look for look in _LOOKS if look < len(rounds)] + [len(rounds)]
    # All of them in one batch: a small batch wastes the processor.
    with torch.no_grad():
        starts = torch.stack([rounds[look - 1].x_T for look in looks])
        wide = chain.__class__(
            chain.denoiser, starts.flatten(0, 1), chain.schedule, timesteps=chain.timesteps, max_rows=chain.max_rows
        )
        reached = sampled(wide, starts.flatten(0, 1)).unflatten(0, starts.shape[:2])
    predicted, last = [], torch.full((len(images),), math.nan, dtype=torch.float64)
    for each in rounds:
        last = torch.where(each.predicted_error.isnan(), last, each.predicted_error)
        predicted.append(last)
    return cell | {
        "looks": looks,
        "curve": [rms(reconstruction - images).tolist() for reconstruction in reached],
        "predicted": [predicted[look - 1].tolist() for look in looks],
        "round_rows": [sum(each.rows for each in rounds[:look]) for look in looks],
    }


def rounds_to(cell: Cell, error: float) -> list[float]:
    """Rounds of each sample until its error is at most ``error`` for good; infinity if it never is."""
    if "curve" not in cell:
        return [cell["rounds"] if each is not None and each <= error else math.inf for each in cell["errors"]]
    found = []
    for sample in range(len(cell["errors"])):
        reached = math.inf
        for look, errors in zip(reversed(cell["looks"]), reversed(cell["curve"]), strict=True):
            if errors[sample] is None or errors[sample] > error:
                break
            reached = look
        found.append(reached)
    return found


def _family(name: str) -> str:
    """The method of a cell, without the number of iterations or the tolerance."""
    method = name.split(", ", 1)[1]
    return method if method in ("ours, parallel", "DDIM inversion") else method.rsplit(",", 1)[0]


def best_rounds(document: Cell, steps: int) -> dict[str, dict[float, tuple[float, float]]]:
    """By method and error: the fewest rounds (median sample, worst sample) of any number of iterations."""
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for name, cell in document.items():
        if cell["steps"] != steps:
            continue
        of_method = found.setdefault(_family(name), dict.fromkeys(ERRORS, (math.inf, math.inf)))
        for error in ERRORS:
            median, worst = spread(rounds_to(cell, error))  # type: ignore[arg-type]
            of_method[error] = min(of_method[error][0], median), min(of_method[error][1], worst)
    return found


def text(document: Cell) -> str:
    """A block for each T: rounds to each error, then every run."""
    lines = [HOW_TO_READ]
    for steps in _all_steps(document):
        runs = {name: cell for name, cell in document.items() if cell["steps"] == steps}
        digits = {len(cell["errors"]) for cell in runs.values()}
        lines += [f"T={steps}, {' or '.join(map(str, sorted(digits, reverse=True)))} digits"]
        lines += [f"{'rounds to':28}" + "".join(f"{error:>12.0e}" for error in ERRORS)]
        for method, reached in best_rounds(document, steps).items():
            lines.append(f"{method:28}" + "".join(f"{_rounds(reached[error]):>12}" for error in ERRORS))
        lines += ["", *run_table({name.split(", ", 1)[1]: cell for name, cell in runs.items()}), ""]
    return "\n".join(lines).rstrip()


def _all_steps(document: Cell) -> list[int]:
    return sorted({cell["steps"] for cell in document.values()})


def _rounds(figures: tuple[float, float]) -> str:
    return "/".join("-" if math.isinf(each) else f"{each:g}" for each in figures)


def targets(document: Cell) -> list[Target]:
    """What is aimed at, as far as it was measured."""
    aims = []
    for steps in _all_steps(document):
        found = best_rounds(document, steps)
        ours = found["ours, parallel"]
        for limit, error in ((_ROUNDS.get(steps), 1e-3), (_ROUNDS_FINEST, 1e-5)):
            if limit is not None:
                worst = ours[error][1]
                measured = f"median/worst {_rounds(ours[error])}"
                aims.append(
                    Target(f"T={steps}: an error of {error:.0e} within {limit} rounds", worst <= limit, measured)
                )
        rivals = {name: reached for name, reached in found.items() if not name.startswith("ours")}
        if rivals and steps >= _HALF_FROM:
            aims.append(_beside(steps, ours, rivals))
    return [*aims, _stopping(document), *_rows(document)]


def _beside(steps: int, ours: dict[float, tuple[float, float]], rivals: dict[str, Any]) -> Target:
    """Half of the rounds of any peer at every error that one of the two reaches, for the median sample."""
    met, lines = True, []
    for error in ERRORS:
        mine = ours[error][0]
        name = min(rivals, key=lambda each: rivals[each][error][0])
        theirs = rivals[name][error][0]
        met &= math.isinf(theirs) or mine <= theirs / 2
        lines.append(f"{error:.0e}: {mine:g} against {theirs:g}" + (f" ({name})" if math.isfinite(theirs) else ""))
    return Target(f"T={steps}: at most half of any peer's rounds at equal error", met, "; ".join(lines))


def _stopping(document: Cell) -> Target:
    """The prediction at the first round where it meets a tolerance, against what is then measured."""
    ratios = []
    for cell in document.values():
        for sample in range(len(cell["errors"]) if "curve" in cell else 0):
            for tolerance in (1e-2, 1e-3, 1e-4):
                for errors, predicted in zip(cell["curve"], cell["predicted"], strict=True):
                    if predicted[sample] is not None and predicted[sample] <= tolerance:
                        ratios.append((math.inf if errors[sample] is None else errors[sample]) / tolerance)
                        break
    within = sum(ratio <= 2 for ratio in ratios)
    return Target(
        "where the predicted error first meets a tolerance, the measured one is within twice of it",
        within == len(ratios),
        f"{within} of {len(ratios)} times, worst {max(ratios, default=0):.1f} times the tolerance",
    )


def _rows(document: Cell) -> list[Target]:
    if 1000 not in _all_steps(document):
        return []
    cell = document[f"T=1000, {_TO_CLAIM}"]
    rows, reached = cell["rows"] / len(cell["errors"]) / 1000, spread(cell["errors"])
    name = f"T=1000: at most {_ROWS} T rows to 1e-3"
    return [Target(name, rows <= _ROWS and reached[1] <= _CLAIM, f"{rows:.1f} T rows, error {pair(reached)}")]


def plot(document: Cell, folder: Path) -> None:
    """Median error against rounds: ours after each round, the peers at the end of each run."""
    sizes = [steps for steps in _all_steps(document) if steps != 200]
    families = list(dict.fromkeys(_family(name) for name, cell in document.items() if "curve" not in cell))
    figure = Figure(figsize=(3.4 * len(sizes) + 2, 3.8), layout="constrained")
    for axes, steps in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for name, cell in document.items():
            if cell["steps"] == steps and "curve" not in cell:
                points.setdefault(_family(name), []).append((cell["rounds"], spread(cell["errors"])[0]))
        own = document[f"T={steps}, ours, parallel"]
        axes.plot(own["looks"], [spread(each)[0] for each in own["curve"]], "k-", lw=2.2, label="ours, parallel")
        for family, runs in points.items():
            style, color = "-" if family.startswith("ours") else "--", f"C{families.index(family) % 10}"
            axes.plot(*zip(*sorted(runs), strict=True), f"{style}o", color=color, ms=3, lw=1, label=family)
        axes.set(title=f"T={steps}", xscale="log", yscale="log", ylim=(3e-6, 1), xlabel="rounds")
        axes.grid(alpha=0.3)
    axes.figure.axes[0].set_ylabel("RMS error of the reconstruction, median")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(folder / "inversion-rounds.png", dpi=130)
