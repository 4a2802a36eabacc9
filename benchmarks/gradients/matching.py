"""Seconds at the same error: each family of exact gradients at the loosest tolerance that reaches an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gradients.cells import Setting
from benchmarks.gradients.measuring import gradient, relative_error, seconds
from benchmarks.gradients.methods import DEFAULT, LEVELS, RUNGS, Family

_SLOW = 3.0  # a family so many times slower than its library's fastest is not timed again


@dataclass(frozen=True, kw_only=True)
class Match:
    """What reaches an error of at most ``level``: seconds of both ways, and the tolerance it takes, by family.

    ``fastest`` are the fastest of ours and of torchdeq's, None where none gets there.
    """

    level: float
    rtols: Mapping[str, float]
    seconds: Mapping[str, float]
    fastest: tuple[str | None, str | None]

    def ratio(self, default: bool = False) -> float:
        """Our fastest family's seconds, or the default one's, by torchdeq's; 0 where only ours gets there."""
        mine, theirs = self.fastest
        mine = DEFAULT if default else mine
        if mine not in self.seconds:
            return math.inf
        return self.seconds[mine] / self.seconds[theirs] if theirs else 0.0


def errors_by_rung(setting: Setting, family: Family, exact: Tensor) -> list[float]:
    """The family's errors from the loosest tolerance on, until the last level is met or two rungs bring nothing."""
    errors: list[float] = []
    for rtol in RUNGS:
        errors.append(relative_error(gradient(setting, family.method(rtol)), exact))
        if errors[-1] <= LEVELS[-1] or (len(errors) > 4 and min(errors[-4:]) >= min(errors[:-4])):
            break
    return errors


def needed_rtols(errors: Mapping[str, Sequence[float]], level: float) -> dict[str, float]:
    """For each family that gets to the level, the loosest tolerance that does."""
    return {
        name: next(rtol for rtol, error in zip(RUNGS, found, strict=False) if error <= level)
        for name, found in errors.items()
        if min(found) <= level
    }


def matched(setting: Setting, families: Sequence[Family], exact: Tensor, rounds: int) -> list[Match]:
    """The families at each level, all timed in turn; those that one round shows to be slow are timed no further."""
    errors = {family.name: errors_by_rung(setting, family, exact) for family in families}
    needed = {level: needed_rtols(errors, level) for level in LEVELS}
    by_name = {family.name: family for family in families}
    library = {family.name: family.library for family in families}

    def timed(pairs: set[tuple[str, float]], rounds: int) -> dict[tuple[str, float], float]:
        methods = {pair: by_name[pair[0]].method(pair[1]) for pair in sorted(pairs)}
        found = seconds(setting, list(methods.values()), rounds)
        return {pair: sum(found[method.name]) for pair, method in methods.items()}

    once = timed({pair for rtols in needed.values() for pair in rtols.items()}, 1)

    def is_slow(name: str, rtols: Mapping[str, float]) -> bool:
        best = min(once[other, rtol] for other, rtol in rtols.items() if library[other] == library[name])
        return name != DEFAULT and once[name, rtols[name]] > _SLOW * best

    kept = {
        level: {name: rtol for name, rtol in rtols.items() if not is_slow(name, rtols)}
        for level, rtols in needed.items()
    }
    often = timed({pair for rtols in kept.values() for pair in rtols.items()}, rounds)

    def fastest(level: float, of: str) -> str | None:
        names = [name for name in kept[level] if library[name] == of]
        return min(names, key=lambda name: often[name, kept[level][name]], default=None)

    return [
        Match(
            level=level,
            rtols=rtols,
            seconds={name: often[name, rtol] for name, rtol in rtols.items()},
            fastest=(fastest(level, "fixpoint"), fastest(level, "torchdeq")),
        )
        for level, rtols in kept.items()
    ]
