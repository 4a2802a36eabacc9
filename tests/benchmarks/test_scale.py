"""The prediction for N devices against sums by hand, and the counts that it stands on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.scale.__main__ import budgets, main, of_user, table
from benchmarks.scale.measured import rows_of_rounds
from benchmarks.scale.prediction import Link, Network, Workload, fastest, last_that_pays, predict
from benchmarks.scale.workloads import count, workloads
from fixpoint_diffusion.sampling.batch_cost import BatchCost

NETWORK = Network(inside=Link(latency=1e-3, bandwidth=1e6), between=Link(latency=1e-2, bandwidth=1e5), per_machine=4)
WORKLOAD = Workload(name="w", cost=BatchCost((1, 10), (1.0, 10.0)), row_bytes=1000, sweep=0.5)


def test_parts_are_those_counted_by_hand() -> None:
    found = predict([10, 3], WORKLOAD, NETWORK, 4, budget=10)
    # Calls of 3 rows and of 1, on the device that has most.
    assert (found.rounds, found.floor, found.rows) == (2, 2.0, pytest.approx(2.0))
    assert found.sweep == 1.0
    # Each call: three hops of 1 ms for what is told and for the outputs, of which three quarters come from others.
    told = 48 * 4 * 0.75 / 1e6
    assert found.exchange == pytest.approx(4 * 3e-3 + 2 * told + 13_000 * 0.75 / 1e6)
    assert found.seconds == pytest.approx(found.floor + found.rows + found.exchange + found.sweep)
    beyond = predict([10, 3], WORKLOAD, NETWORK, 8, budget=10)
    assert beyond.exchange == pytest.approx(4 * 7e-2 + 2 * 48 * 7 / 1e5 + 13_000 * 7 / 8 / 1e5)
    alone = predict([10, 3], WORKLOAD, NETWORK, 1, budget=10)
    assert (alone.exchange, alone.seconds) == (0.0, pytest.approx(14.0))


def test_the_ordinary_sampler_gains_nothing_from_devices() -> None:
    assert {predict([1] * 20, WORKLOAD, NETWORK, n, budget=1).seconds for n in (1, 4, 64)} == {20.0}
    runs = {1: [1] * 20, 10: [10] * 4}
    assert fastest(runs, WORKLOAD, NETWORK, 1).budget == 1
    assert fastest(runs, WORKLOAD, NETWORK, 4).budget == 10


def test_doubling_stops_paying_where_it_saves_less_than_a_tenth() -> None:
    predictions = [predict([8] * 4, WORKLOAD, NETWORK, n, budget=8) for n in (1, 2, 4, 8, 16)]
    assert last_that_pays(predictions).devices == 8  # one row each, and a slower link
    text = table("w", 20, predictions, 20.0)
    assert "the last doubling that saves a tenth is to 8 devices: calls of one row, one after another" in text


def test_operations_are_counted_for_one_row() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    flops, calls = count(layer, torch.zeros(1, 8))
    assert flops == 2 * (8 * 16 + 16 * 4)
    assert calls >= 2


def test_known_models_cost_what_their_papers_say() -> None:
    """The DiT paper counts 118.6 billion multiply-adds; guidance doubles them, and each is two operations."""
    (dit, steps), (unet, _) = (workloads()[name] for name in ("DiT-XL/2, guidance", "CIFAR10 U-Net"))
    assert steps == 250
    large = dit.cost.rows[-1]
    assert dit.cost.seconds[-1] / large * 989e12 * 0.4 == pytest.approx(4 * 118.6e9, rel=0.02)
    # The U-Net's calls of one row are bound by the host.
    assert unet.cost(1) == unet.cost(4) > 4 * unet.cost(large) / large


def test_rows_of_the_ordinary_sampler_are_its_steps() -> None:
    found = rows_of_rounds(10, [1, 10])
    assert found[1] == [1] * 10
    assert len(found[10]) < 10 < sum(found[10])
    assert budgets(20) == [1, 8, 16, 20]


def test_a_curve_of_the_user_is_taken_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = tmp_path / "mine.json"
    told = {"rows": [1, 8], "seconds": [0.1, 0.2], "entries": 64, "steps": 10}
    curve.write_text(json.dumps(told))
    main(["--curve", str(curve), "--out", str(tmp_path / "out.json")])
    assert "mine, 10 steps, one sample; step by step on one device 1 s" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert [each["devices"] for each in record["mine"]["devices"]] == [1, 2, 4, 8, 16, 32, 64]
    curve.write_text(json.dumps({**told, "rows": [8, 1]}))
    with pytest.raises(ValueError, match=r"mine\.json is no curve: rows must ascend"):
        of_user(curve)
