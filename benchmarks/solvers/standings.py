"""What the counts say: performance profiles, geometric means, and the targets of the suite with pass or fail."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.solvers.cases import Case
from benchmarks.solvers.runners import Outcome, Runner


@dataclass(frozen=True)
class Result:
    """How every solver, by name, did on a case."""

    case: Case
    outcomes: Mapping[str, Outcome]

    def best(self, names: Iterable[str]) -> float:
        """Fewest evaluations of the named solvers; infinity where none solved the case."""
        return min((self.evaluations(name) for name in names), default=math.inf)

    def evaluations(self, name: str) -> float:
        """Evaluations of a solver; infinity where it did not solve the case."""
        return self.outcomes[name].evaluations or math.inf


@dataclass(frozen=True)
class Target:
    """One aim: whether it is met, the figure measured, and the cases that speak against it."""

    name: str
    met: bool
    measured: str
    against: tuple[str, ...] = ()


def performance_profile(evaluations: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """Share of cases that each solver solves within each factor of the fastest solver on that case.

    Args:
        evaluations: ``(cases, solvers)``; infinity where a solver failed.
        factors: At least 1 each.

    Returns:
        ``(factors, solvers)``. Cases that nobody solved are left out.

    Source: Dolan & Moré, Math. Program. 91 (2002).
    """
    solved = evaluations[np.isfinite(evaluations).any(axis=1)]
    ratios = solved / solved.min(axis=1, keepdims=True)
    return np.stack([(ratios <= factor).mean(axis=0) for factor in factors])


def geometric_mean(ratios: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def targets(results: Sequence[Result], runners: Sequence[Runner]) -> list[Target]:
    """The aims of the solver engine, on the counts of one run."""
    ours = [runner.name for runner in runners if runner.ours]
    peers = [runner.name for runner in runners if not runner.ours]
    as_they_come = [runner.name for runner in runners if not runner.ours and not runner.by_hand]
    theirs = [name for name in peers if name.startswith("torchdeq Anderson")]
    solvable = [result for result in results if result.case.solvable]
    return [
        _robust(solvable, [*ours, *peers]),
        *(_beside(solvable, label, names) for label, names in (("m=5", theirs[:1]), ("best memory a case", theirs))),
        _beside_picard(solvable),
        *_best(solvable, ours, as_they_come, "peers as they come"),
        *_best(solvable, ours, peers, "also with settings found by hand"),
        _honest(results, ours),
    ]


def _best(results: Sequence[Result], ours: Sequence[str], peers: Sequence[str], how: str) -> list[Target]:
    return [
        _best_ratio(results, ours, peers, f"{how}, case by case"),
        _best_ratio(results, [best_single(results, ours)], [best_single(results, peers)], f"{how}, one for all"),
        _best_nowhere_slower(results, ours, peers, how),
    ]


def above_floor(results: Sequence[Result], floors: Mapping[str, int], names: Sequence[str]) -> float:
    """Best of the named solvers / GMRES, geometric mean over the cases with a floor that one of them solves."""
    pairs = [(r.best(names), floors[r.case.name]) for r in results if r.case.name in floors]
    return geometric_mean(mine / least for mine, least in pairs if mine < math.inf)


def in_hindsight(results: Sequence[Result], name: str) -> float:
    """Fastest of all solvers / the named one, geometric mean over the solvable cases that this one solves."""
    solved = [r for r in results if r.case.solvable and name in r.outcomes and math.isfinite(r.evaluations(name))]
    return geometric_mean(r.best(list(r.outcomes)) / r.evaluations(name) for r in solved)


def _robust(results: Sequence[Result], names: Sequence[str]) -> Target:
    missed = [r for r in results if math.isfinite(r.best(names)) and r.outcomes["Anderson"].evaluations is None]
    solved = sum(math.isfinite(r.best(names)) for r in results)
    return Target(
        "(a) Anderson() solves all but at most one of what any solver solves",
        len(missed) <= 1,
        f"misses {len(missed)} of {solved}",
        tuple(f"{r.case.name} ({r.best(names):.0f} by the fastest)" for r in missed),
    )


def _beside(results: Sequence[Result], label: str, names: Sequence[str]) -> Target:
    """A case that Anderson() does not solve counts with its limit, which it needs at least."""
    pairs = [
        (min(r.evaluations("Anderson"), r.case.max_evals), r.best(names)) for r in results if r.best(names) < math.inf
    ]
    ratio = geometric_mean(mine / other for mine, other in pairs)
    return Target(
        f"(b) Anderson() / torchdeq's Anderson ({label}), geometric mean over what the latter solves, at most 0.32",
        ratio <= 0.32,
        f"{ratio:.3f} over {len(pairs)} cases",
    )


def _beside_picard(results: Sequence[Result]) -> Target:
    slower = [r for r in results if r.evaluations("Anderson") > r.evaluations("Picard") + 5]
    return Target(
        "(c) Anderson() never takes more than Picard plus 5",
        not slower,
        f"does on {len(slower)} of {sum(r.evaluations('Picard') < math.inf for r in results)}",
        tuple(f"{r.case.name} ({r.evaluations('Anderson'):.0f} for {r.evaluations('Picard'):.0f})" for r in slower),
    )


def best_single(results: Sequence[Result], names: Sequence[str]) -> str:
    """The solver with the fewest evaluations in geometric mean, its limit taken where it does not solve a case."""
    solved = [result for result in results if result.best(result.outcomes) < math.inf]
    return min(names, key=lambda name: geometric_mean(min(r.evaluations(name), r.case.max_evals) for r in solved))


def _best_ratio(results: Sequence[Result], ours: Sequence[str], peers: Sequence[str], how: str) -> Target:
    pairs = [(r.best(ours), r.best(peers)) for r in results]
    both = [mine / other for mine, other in pairs if mine < math.inf and other < math.inf]
    ratio = geometric_mean(both)
    return Target(
        f"(d) the best of ours / the best peer, {how}, geometric mean over what both solve, at most 0.8",
        ratio <= 0.8,
        f"{ratio:.3f} over {len(both)} cases" + (f" ({ours[0]} / {peers[0]})" if len(peers) == 1 else ""),
    )


def _best_nowhere_slower(results: Sequence[Result], ours: Sequence[str], peers: Sequence[str], how: str) -> Target:
    def worse(result: Result) -> bool:
        mine, other = result.best(ours), result.best(peers)
        return mine > 1.1 * other and mine > other + 2

    slower = [r for r in results if worse(r)]
    return Target(
        f"(e) the best of ours is nowhere more than 10% (and two evaluations) slower than the best peer ({how})",
        not slower,
        f"is on {len(slower)}",
        tuple(f"{r.case.name} ({r.best(ours):.0f} for {r.best(peers):.0f} of {_fastest(r, peers)})" for r in slower),
    )


def _fastest(result: Result, names: Sequence[str]) -> str:
    return min(names, key=result.evaluations)


def _honest(results: Sequence[Result], ours: Sequence[str]) -> Target:
    false = [f"{r.case.name}: {name}" for r in results for name in ours if r.outcomes[name].false_claim]
    return Target(
        "(f) ours never report success at a point that does not meet the tolerance",
        not false,
        f"{len(false)} false claims",
        tuple(false),
    )
