"""Seconds of one sample whose rounds are shared by N devices, from rows, the cost of a call, and what is exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fixpoint_diffusion.sampling.batch_cost import BatchCost

# What every rank tells the others before outputs are exchanged.
_TOLD_BYTES = 48
# Twice the devices must save so much of the time to be worth it.
WORTH = 0.1


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link between devices: seconds until the first byte arrives, and bytes a second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links between the devices of one machine, and the slower ones between machines."""

    inside: Link
    between: Link
    per_machine: int

    def seconds(self, size: float, devices: int) -> float:
        """Until every device has all of ``size`` bytes, of which each has a part: a ring."""
        link = self.inside if devices <= self.per_machine else self.between
        hops = devices - 1
        return hops * (link.latency + size / devices / link.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One sample of one model on one kind of device.

    Attributes:
        name: of both.
        cost: seconds of a call of the model, by rows.
        row_bytes: what a row of the output takes.
        sweep: seconds that the solver itself takes in a round, which every device spends alike.
    """

    name: str
    cost: BatchCost
    row_bytes: int
    sweep: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds by what they are spent on.

    Attributes:
        devices: N.
        budget: most rows in a round; 1: the ordinary sampler.
        rounds: calls.
        floor: of the calls, what they would take with one row each.
        rows: of the calls, the rest.
        exchange: of gathering outputs.
        sweep: of the solver.
    """

    devices: int
    budget: int
    rounds: int
    floor: float
    rows: float
    exchange: float
    sweep: float

    @property
    def seconds(self) -> float:
        return self.floor + self.rows + self.exchange + self.sweep

    @property
    def limit(self) -> str:
        """The largest part, in words."""
        parts = {
            "calls of one row, one after another": self.floor,
            "rows": self.rows,
            "exchange": self.exchange,
            "the solver's own work": self.sweep,
        }
        name, most = max(parts.items(), key=lambda part: part[1])
        return f"{name}, {100 * most / self.seconds:.0f}%"


def predict(rounds: Sequence[int], workload: Workload, network: Network, devices: int, *, budget: int) -> Prediction:
    """The time of one run.

    Args:
        rounds: rows of each call.
        workload: the model and the device.
        network: between the devices.
        devices: N; each evaluates an equal part of a call's rows, rounded up.
        budget: most rows in a call.
    """
    at_work, sweep = (1, 0.0) if budget == 1 else (devices, len(rounds) * workload.sweep)  # one row cannot be shared
    calls = sum(workload.cost(-(-rows // at_work)) for rows in rounds)
    floor = len(rounds) * workload.cost(1)
    exchange = 0.0
    if at_work > 1:
        exchange = sum(
            network.seconds(_TOLD_BYTES * devices, devices) + network.seconds(rows * workload.row_bytes, devices)
            for rows in rounds
        )
    return Prediction(
        devices=devices,
        budget=budget,
        rounds=len(rounds),
        floor=floor,
        rows=calls - floor,
        exchange=exchange,
        sweep=sweep,
    )


def fastest(runs: Mapping[int, Sequence[int]], workload: Workload, network: Network, devices: int) -> Prediction:
    """With the budget that takes the least time, of those whose rounds are known."""
    found = [predict(rounds, workload, network, devices, budget=budget) for budget, rounds in runs.items()]
    return min(found, key=lambda prediction: prediction.seconds)


def last_that_pays(predictions: Sequence[Prediction]) -> Prediction:
    """Of predictions for 1, 2, 4, ... devices, the last whose time is a tenth less than that of half as many."""
    end = predictions[0]
    for half, doubled in pairwise(predictions):
        if doubled.seconds <= (1 - WORTH) * half.seconds:
            end = doubled
    return end
