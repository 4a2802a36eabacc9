"""What is measured at each setting; beside it, memory against depth and error against the forward tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fixpoint
from benchmarks.gradients.cells import Setting
from benchmarks.gradients.matching import Match, matched
from benchmarks.gradients.measuring import Figures, gradient, measure, relative_error, saved_bytes, seconds
from benchmarks.gradients.methods import Method, families, ours, rules, rules_at_depth
from benchmarks.gradients.reference import exact_gradient, flat, slope

DEPTHS = (10, 100, 1000)
FORWARD_RTOLS = tuple(10.0**-k for k in range(1, 7))
_TIGHT = fixpoint.IFT(solver=fixpoint.Anderson(memory=40), rtol=1e-12, max_evals=1000)
# One recorded application of f and its gradient: the unit of time and memory.
ONCE = Method(name="one application of f", run=lambda cell, x: cell(torch.zeros_like(x), x))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that was measured at one setting, in float32 against float64.

    ``slope_error``: relative difference of the exact gradient's slope and a finite difference along one direction.
    ``tight``: error of IFT at the tightest tolerance, both ways.
    """

    cell: str
    radius: float
    slope_error: float
    tight: float
    once: Figures
    rules: dict[str, Figures]
    matches: list[Match]

    @property
    def name(self) -> str:
        """Cell and radius."""
        return f"{self.cell} {self.radius:.2f}"


def at_setting(setting: Setting, rounds: int) -> Outcome:
    """Every rule's figures, and the families of exact gradients at the same errors; ``setting`` in float64."""
    exact = exact_gradient(setting)
    generator = torch.Generator().manual_seed(1)
    inputs = [setting.x, *setting.cell.parameters()]
    direction = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in inputs]
    along = float(exact @ flat(direction))
    single = setting.cast(torch.float32)
    methods = [ONCE, *rules()]
    figures = {method.name: measure(single, method, exact) for method in methods}
    times = seconds(single, methods, rounds)
    figures = {name: replace(each, seconds=times[name]) for name, each in figures.items()}
    tight = Method(name="tight", run=ours(fixpoint.IFT(rtol=1e-7, max_evals=1000), rtol=1e-7, max_evals=1000))
    return Outcome(
        cell=setting.name,
        radius=setting.radius,
        slope_error=abs(slope(setting, direction) - along) / abs(along),
        tight=relative_error(gradient(single, tight), exact),
        once=figures.pop(ONCE.name),
        rules=figures,
        matches=matched(single, families(), exact, rounds),
    )


def saved_by_depth(setting: Setting) -> dict[str, list[int]]:
    """For each rule, the bytes kept for backward after so many evaluations: ``DEPTHS``."""
    found: dict[str, list[int]] = {}
    for depth in DEPTHS:
        for method in rules_at_depth(depth):
            found.setdefault(method.name, []).append(saved_bytes(setting, method))
    return found


def recorded_steps_alone(setting: Setting) -> tuple[int, int]:
    """Bytes kept by one recorded step after 1000 steps without gradient, and after none."""
    kept = [
        saved_bytes(setting, Method(name="S-JFB", run=ours(fixpoint.MultiStepJFB(no_grad=count, grad=1))))
        for count in (DEPTHS[-1], 0)
    ]
    return kept[0], kept[1]


def error_by_forward_rtol(setting: Setting, exact: Tensor) -> dict[str, list[float]]:
    """Errors in float64 where the forward solve stops at each of ``FORWARD_RTOLS`` and all else is exact."""
    chosen: dict[str, tuple[fixpoint.Backward, fixpoint.Solver]] = {
        "IFT()": (_TIGHT, fixpoint.Anderson()),
        "IFT(), Picard": (_TIGHT, fixpoint.Picard()),
        "Phantom(steps=5)": (fixpoint.Phantom(steps=5), fixpoint.Anderson()),
        "JFB()": (fixpoint.JFB(), fixpoint.Anderson()),
        "Unroll()": (fixpoint.Unroll(), fixpoint.Anderson()),
        "Unroll(), Picard": (fixpoint.Unroll(), fixpoint.Picard()),
    }

    def errors(rule: fixpoint.Backward, solver: fixpoint.Solver) -> list[float]:
        found: Sequence[Method] = [
            Method(name=f"{rtol}", run=ours(rule, solver, rtol=rtol, max_evals=3000)) for rtol in FORWARD_RTOLS
        ]
        return [relative_error(gradient(setting, method), exact) for method in found]

    return {name: errors(*each) for name, each in chosen.items()}
