"""Seconds at the same error: each family of exact gradients at the loosest tolerance that reaches an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gradients.cells import Setting
from benchmarks.gradients.measuring import gradient, relative_error, seconds
from benchmarks.gradients.methods import LEVELS, OURS, PEER, RUNGS, Family

_LOOK_BACK = 4  # rungs in which an error must fall


@dataclass(frozen=True, kw_only=True)
class Match:
    """What it takes to bring the error to ``level``: seconds of both ways and the tolerance, by family's name.

    Families that do not get there are missing.
    """

    level: float
    seconds: Mapping[str, float]
    rtols: Mapping[str, float]

    def ratio(self, solver: str | None = None) -> float:
        """Our seconds by torchdeq's, with one solver or with the fastest of each; infinite or 0 where one fails."""
        mine, theirs = (self._least(library, solver) for library in (OURS, PEER))
        if math.inf in (mine, theirs):
            return math.nan if mine == theirs else mine if mine == math.inf else 0.0
        return mine / theirs

    def _least(self, library: str, solver: str | None) -> float:
        start = f"{library}, {solver or ''}"
        return min((each for name, each in self.seconds.items() if name.startswith(start)), default=math.inf)


def errors_by_rung(setting: Setting, family: Family, exact: Tensor) -> list[float]:
    """The errors from the loosest tolerance on, until the last level is met or some rungs bring nothing."""
    errors: list[float] = []
    for rtol in RUNGS:
        errors.append(relative_error(gradient(setting, family.methods(rtol)[0]), exact))
        stuck = len(errors) > _LOOK_BACK and min(errors[-_LOOK_BACK:]) >= min(errors[:-_LOOK_BACK])
        if errors[-1] <= LEVELS[-1] or stuck:
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
    """The families at each level, all timed in turn."""
    errors = {family.name: errors_by_rung(setting, family, exact) for family in families}
    needed = {level: needed_rtols(errors, level) for level in LEVELS}
    by_name = {family.name: family for family in families}
    pairs = sorted({pair for rtols in needed.values() for pair in rtols.items()})
    methods = {(name, rtol): by_name[name].methods(rtol) for name, rtol in pairs}
    times = seconds(setting, [form for forms in methods.values() for form in forms], rounds)
    least = {pair: min(sum(times[form.name]) for form in forms) for pair, forms in methods.items()}
    return [
        Match(level=level, rtols=rtols, seconds={name: least[name, rtol] for name, rtol in rtols.items()})
        for level, rtols in needed.items()
    ]
