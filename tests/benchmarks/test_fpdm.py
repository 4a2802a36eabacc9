from __future__ import annotations

import json

import pytest

from benchmarks import fpdm_joint, fpdm_reuse


def test_every_way_to_spend_iterations_is_measured_at_equal_cost(tmp_path, capsys) -> None:
    out = tmp_path / "reuse.json"
    fpdm_reuse.main(["--quick", "--images", "4", "--seeds", "1", "--out", str(out)])
    figures = json.loads(out.read_text())
    costs = [each["mean"]["block_passes"] for each in figures["allocations"].values()]
    assert len(costs) == 6
    assert costs == pytest.approx([costs[0]] * 6, rel=0.1)
    assert set(figures["starts"]["1x2"]) == {"anew", "reuse", "extrapolate"}
    printed = capsys.readouterr().out
    for cell in figures["spacings"].values():
        assert f"{cell['2']['mean']['confidence']:.3f}" in printed


def test_methods_are_counted_alike_and_their_errors_are_those_of_their_layers(tmp_path) -> None:
    out = tmp_path / "joint.json"
    fpdm_joint.main(["--images", "2", "--seeds", "1", "--steps", "6", "--out", str(out)])
    (found,) = json.loads(out.read_text())["steps"]["6"]
    assert found["sequential, 4 iterations"]["serial"] == found["sequential, 4 iterations"]["work"] == 6 * 6
    for k in (1, 2, 4):  # the same images in fewer passes that wait for each other
        sequential, joint = found[f"sequential, {k} iterations"], found[f"joint, reuse, {k} iterations"]
        assert joint["error"] == pytest.approx(sequential["error"], rel=0.1)
        assert joint["work"] > sequential["work"]
    assert found["nested, layers to 1e-3"]["error"] < 0.01
    assert found["joint, Anderson"]["error"] < 0.05
