"""Training runs that take turns, each with a clock of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

import fixpoint
from benchmarks.gradients.measuring import SavedBytes
from benchmarks.training.tasks import Examples, Task
from fixpoint.memory import LiveBytes

Rule = tuple[fixpoint.Backward, fixpoint.Solver]

RULES: Mapping[str, Rule] = {
    "IFT(rtol=1e-2)": (fixpoint.IFT(rtol=1e-2, max_evals=16, on_failure="best"), fixpoint.Anderson()),
    "Phantom(steps=3)": (fixpoint.Phantom(steps=3), fixpoint.Anderson()),
    "JFB()": (fixpoint.JFB(), fixpoint.Anderson()),
    "Neumann(terms=3)": (fixpoint.Neumann(terms=3), fixpoint.Anderson()),
    "SHINE()": (fixpoint.SHINE(), fixpoint.Broyden()),
    "MultiStepJFB(8, 3)": (fixpoint.MultiStepJFB(no_grad=8, grad=3), fixpoint.Anderson()),
    "StochasticJFB(8, 4)": (fixpoint.StochasticJFB(max_no_grad=8, max_grad=4), fixpoint.Anderson()),
    "Reversible(steps=6)": (fixpoint.Reversible(steps=6), fixpoint.Anderson()),
    "Unroll()": (fixpoint.Unroll(), fixpoint.Anderson()),
}
LOOKS = 8  # at the test accuracy, over a run's time
_SLICE = 0.25  # seconds of one turn
_MEASURED_STEPS = 10


class Run:
    """One model in training by one rule. Its clock runs in ``train`` alone.

    Attributes:
        curve: Seconds trained and accuracy on the test examples, at each look.
    """

    def __init__(self, task: Task, rule: Rule, seed: int) -> None:
        self.task, self.seed = task, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = task.model(*rule)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=task.learning_rate)
        self.batches, self.test = task.batches(seed), task.test(seed)
        self.seconds = 0.0
        self.steps = self.evaluations = self.products = 0
        self.curve: list[tuple[float, float]] = []

    @property
    def done(self) -> bool:
        """Whether its time is spent."""
        return self.seconds >= self.task.seconds

    def train(self, seconds: float) -> None:
        """Go on for at least so many seconds, or as many as are left."""
        goal = min(self.seconds + seconds, self.task.seconds)
        while self.seconds < goal:
            start = time.perf_counter()
            solution = self._step(next(self.batches))
            self.seconds += time.perf_counter() - start
            self.steps += 1
            self.evaluations += solution.nfev
            self.products += solution.adjoint.nfev if solution.adjoint else 0
        if self.seconds >= (len(self.curve) + 1) * self.task.seconds / LOOKS:
            self.curve.append((self.seconds, self.accuracy()))

    def _step(self, examples: Examples) -> fixpoint.Solution:
        inputs, labels = examples
        logits, solution = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return solution

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test examples whose every label is right."""
        inputs, labels = self.test
        logits, _ = self.model(inputs)
        right = logits.argmax(dim=-1) == labels
        return float(right.view(len(labels), -1).all(dim=1).float().mean())

    def memory(self) -> tuple[int, int]:
        """Bytes kept for backward, and at the peak of a step: the most of some steps. Trains on."""
        most = 0, 0
        for _ in range(_MEASURED_STEPS):
            inputs, labels = next(self.batches)
            with SavedBytes([inputs, *self.model.parameters()]) as saved, LiveBytes() as live:
                logits, _ = self.model(inputs)
                kept = saved.bytes
                nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
            most = max(most[0], kept), max(most[1], live.peak)
        return most


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rule reached on one task, in the order of the seeds; counts are means per step."""

    accuracies: list[float]
    steps: list[int]
    seconds: list[float]
    evaluations: float
    products: float
    saved: int
    peak: int
    curves: list[list[tuple[float, float]]]


def train_all(task: Task, rules: Mapping[str, Rule], seeds: Iterable[int]) -> dict[str, Outcome]:
    """Every rule at every seed, in turns of a quarter of a second, so that a slow minute is slow for all."""
    runs = {name: [Run(task, rule, seed) for seed in seeds] for name, rule in rules.items()}
    everyone = [run for each in runs.values() for run in each]
    with tqdm(total=round(task.seconds * len(everyone)), unit="s", desc=task.name, mininterval=1) as bar:
        while waiting := [run for run in everyone if not run.done]:
            for run in waiting:
                run.train(_SLICE)
            bar.update(round(sum(run.seconds for run in everyone)) - bar.n)
    return {name: _outcome(each) for name, each in runs.items()}


def _outcome(runs: list[Run]) -> Outcome:
    steps = [run.steps for run in runs]
    accuracies = [run.accuracy() for run in runs]
    saved, peak = runs[0].memory()
    return Outcome(
        accuracies=accuracies,
        steps=steps,
        seconds=[run.seconds for run in runs],
        evaluations=sum(run.evaluations for run in runs) / sum(steps),
        products=sum(run.products for run in runs) / sum(steps),
        saved=saved,
        peak=peak,
        curves=[run.curve for run in runs],
    )
