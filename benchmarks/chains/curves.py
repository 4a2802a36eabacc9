"""One method on one sample: the error of x_0 after every round, with the rows and the seconds spent by then."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.chains.cases import Setting, batch, chain
from benchmarks.chains.methods import METHODS, Method
from benchmarks.peers import paradigms
from fixpoint import Progress
from fixpoint_diffusion import DDIMChain

ERRORS = (1e-1, 1e-2, 1e-3)
_NEAR_ENOUGH = 5e-4  # where a peer is ended
_MAX_ROUNDS = 60
_WINDOWED_FROM = 200  # steps from which windows are tried
_DEAR = {"unet": 25, "gaussian": 50, "mixture": 50}  # most steps for a method that costs D rows a state
_DEAR_SAMPLES = 1


@dataclass
class Curve:
    """``errors[k]``: ``||x_0 - sequential|| / ||sequential||`` after ``rounds[k]`` rounds, ``rows[k]`` rows."""

    errors: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def reached(self, error: float) -> int | None:
        """The first entry from which on the error is at most ``error``; None if it never is."""
        above = [k for k, found in enumerate(self.errors) if not found <= error]
        first = above[-1] + 1 if above else 0
        return first if first < len(self.errors) else None

    def at(self, what: str, error: float) -> float:
        """``rounds``, ``rows`` or ``seconds`` until the error is at most ``error`` for good; infinity if never."""
        place = self.reached(error)
        return math.inf if place is None else float(getattr(self, what)[place])


@dataclass(frozen=True)
class Outcome:
    """A method's curves on a setting, one a sample."""

    setting: Setting
    method: str
    curves: Sequence[Curve]

    def spread(self, what: str, error: float) -> tuple[float, float]:
        """Median and worst over samples of ``rounds``, ``rows`` or ``seconds`` to an error."""
        return spread([curve.at(what, error) for curve in self.curves])

    def at_end(self, what: str) -> tuple[float, float]:
        """Median and worst over samples of what a run ended with."""
        return spread([getattr(curve, what)[-1] for curve in self.curves])


def spread(figures: Sequence[float]) -> tuple[float, float]:
    """Median (the upper of two middle ones, so that infinity stays what it is) and worst."""
    return float(np.sort(figures)[len(figures) // 2]), float(max(figures))


def run(setting: Setting, methods: Sequence[Method] = METHODS) -> Iterator[Outcome]:
    """Every method that suits the setting, on its samples."""
    count = max(setting.samples, setting.peer_samples)
    references = images(setting, count)
    for method in methods:
        samples = setting.samples if method.ours else setting.peer_samples
        samples = min(samples, _DEAR_SAMPLES) if method.dear else samples
        if samples and _suits(method, setting):
            curves = [measure(method, chain(setting, k), references[k : k + 1]) for k in range(samples)]
            yield Outcome(setting, method.name, curves)


def images(setting: Setting, count: int) -> Tensor:
    """The sequential sampler's x_0 of the first samples."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return batch(setting.denoiser, setting.steps, setting.eta, range(count)).sequential()[:, -1]


def measure(method: Method, problem: DDIMChain, reference: Tensor) -> Curve:
    """Run a method on a chain of one sample and watch it."""
    curve = Curve()
    problem.reset_counters()
    start = time.perf_counter()
    spent = (0, 0, 0.0)

    def watch(progress: Progress) -> bool:
        nonlocal spent
        before, spent = spent, (problem.rounds, problem.evals, time.perf_counter() - start)
        error = float((progress.value[:, -1] - reference).norm() / reference.norm())
        curve.errors.append(error)
        for each, new in zip((curve.rounds, curve.rows, curve.seconds), before if method.late else spent, strict=True):
            each.append(new)  # type: ignore[attr-defined]
        return not method.ours and error <= _NEAR_ENOUGH

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows of an implicit layer that needed more iterations
        method.run(problem, watch, problem.steps + 1 if method.ours else min(_MAX_ROUNDS, problem.steps))
    return curve


def noise_dropped(setting: Setting) -> float:
    """Error of what diffusers' ParaDiGMS pipelines make of a DDIM scheduler with this eta: they drop the noise."""
    without = chain(replace(setting, eta=0.0), 0)
    reference = images(setting, 1)
    with torch.no_grad():
        found = paradigms(without, tolerance=0.01).images
    return float((found - reference).norm() / reference.norm())


def _suits(method: Method, setting: Setting) -> bool:
    return (
        (setting.eta == 0 or not method.deterministic_only)
        and (not method.dear or setting.steps <= _DEAR.get(setting.denoiser, 0))
        and (not method.name.endswith("window 100") or setting.steps >= _WINDOWED_FROM)
    )
