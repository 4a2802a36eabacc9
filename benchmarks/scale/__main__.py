"""How long one sample takes on N devices, by prediction; and how well that predicts one and two processes here.

    python -m benchmarks.scale [--curve FILE] [--bandwidth 450] [--latency 3] [--out benchmarks/results/scale.json]

--curve names measured costs of a model on a device of yours: ``{"name": ..., "rows": [1, 8, 64], "seconds": [...],
"entries": 3072, "steps": 1000}``, entries being the numbers in a row of its output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale.measured import check, rows_of_rounds
from benchmarks.scale.prediction import Link, Network, Prediction, Workload, fastest, last_that_pays
from benchmarks.scale.workloads import ASSUMED, CALL, NETWORK, SWEEP_CALLS, workloads
from fixpoint.bench import provenance
from fixpoint_diffusion.files import read_json, write_json
from fixpoint_diffusion.sampling.batch_cost import BatchCost

DEVICES = (1, 2, 4, 8, 16, 32, 64)


def of_user(path: Path) -> tuple[Workload, int]:
    """A workload from a JSON file, and the steps of its chain."""
    told = read_json(path)
    try:
        cost = BatchCost(tuple(map(int, told["rows"])), tuple(map(float, told["seconds"])))
        entries, steps = int(told["entries"]), int(told["steps"])
        if len(cost.rows) != len(cost.seconds) or sorted(set(cost.rows)) != [*cost.rows] or not cost.rows:
            raise ValueError("rows must ascend, with seconds for each")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no curve: {error}; expected rows, seconds, entries, steps") from error
    name = str(told.get("name", path.stem))
    return Workload(name=name, cost=cost, row_bytes=4 * entries, sweep=SWEEP_CALLS * CALL), steps


def budgets(steps: int) -> list[int]:
    """Budgets of rows whose rounds are measured: 1, and up to all steps at once."""
    return [1, *(2**n for n in range(3, 20) if 2**n < steps), steps]


def table(name: str, steps: int, predictions: Sequence[Prediction], sequential: float) -> str:
    """Lines of text: seconds for each number of devices, what they go to, and where it stops paying."""
    lines = [f"{name}, {steps} steps, one sample; step by step on one device {sequential:.3g} s"]
    lines.append("devices   seconds  times faster  rows a round  rounds   exchange   most of it")
    for each in predictions:
        lines.append(
            f"{each.devices:7}{each.seconds:10.3g}{sequential / each.seconds:14.1f}{each.budget:14}{each.rounds:8}"
            f"{each.exchange / each.seconds:11.1%}   {each.limit}"
        )
    end = last_that_pays(predictions)
    lines.append(f"the last doubling that saves a tenth is to {end.devices} devices: {end.limit}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the check and a table for each workload, and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path)
    parser.add_argument("--bandwidth", type=float, default=NETWORK.inside.bandwidth / 1e9, help="GB/s in a machine")
    parser.add_argument("--latency", type=float, default=NETWORK.inside.latency * 1e6, help="us in a machine")
    parser.add_argument("--steps", type=int, default=200, help="steps of the check")
    parser.add_argument("--times", type=int, default=5, help="of which the least counts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    inside = Link(latency=options.latency / 1e6, bandwidth=options.bandwidth * 1e9)
    network = Network(inside=inside, between=NETWORK.between, per_machine=NETWORK.per_machine)
    known = workloads() if options.curve is None else {"": of_user(options.curve)}

    lines, figures = list[str](), dict[str, Any]()
    if options.curve is None:
        figures["check"] = check(options.steps, options.steps, options.times)
        lines.append(f"digits, {options.steps} steps, on this machine; process seconds, least of {options.times}")
        lines.append("processes  predicted  measured")
        for each in figures["check"]:
            lines.append(f"{each['processes']:9}{each['predicted']:11.3f}{each['measured']:10.3f}")
        lines.append("")
    rounds = {steps: rows_of_rounds(steps, budgets(steps)) for steps in {steps for _, steps in known.values()}}
    figures["rounds"] = {str(steps): found for steps, found in rounds.items()}
    for workload, steps in known.values():
        alone = fastest({1: rounds[steps][1]}, workload, network, 1).seconds
        predictions = [fastest(rounds[steps], workload, network, devices) for devices in DEVICES]
        lines += [table(workload.name, steps, predictions, alone), ""]
        told = [{**asdict(each), "seconds": each.seconds} for each in predictions]
        figures[workload.name] = {"steps": steps, "workload": asdict(workload), "devices": told}
    lines.append(ASSUMED if options.curve is None else f"the curve of {options.curve}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
    write_json(options.out, {**about, "network": asdict(network), **figures})
    options.out.with_suffix(".txt").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"Error: {error}") from None
