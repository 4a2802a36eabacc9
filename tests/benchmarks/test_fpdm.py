from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import fpdm_fixed_points, fpdm_joint, fpdm_reuse
from tests.fixpoint_diffusion.command_line import saved_fpdm


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


def test_depths_starts_and_the_log_of_a_model_folder_are_reported(tmp_path: Path, capsys) -> None:
    folder = saved_fpdm(tmp_path / "fpdm", max_no_grad=3, max_grad=1)
    lines = ["step,loss,learning_rate,seconds,layer_residual", "50,1.0,0.001,2.0,0.5", "100,0.5,0.001,4.0,0.25"]
    (folder / "training_log.csv").write_text("\n".join([*lines, ""]))
    options = ["--model", str(folder), "--images", "6", "--seeds", "1", "--steps", "3", "--out", str(tmp_path)]
    fpdm_fixed_points.main(options)
    figures = json.loads((tmp_path / "fpdm-fixed-points.json").read_text())
    assert figures["over_training"] == {"step": [50.0, 100.0], "layer_residual": [0.5, 0.25]}
    assert [cell["iterations"] for cell in figures["quality"].values()] == [1, 2, 4, 8, 12, 16]
    assert figures["agreement"]["problems"] == 2 * 6  # every step but the first
    assert len(figures["residuals"]["median"]) == 16
    assert f"{figures['residuals']['worst'][15]:.1e}" in capsys.readouterr().out
    assert (tmp_path / "fpdm-fixed-points.png").stat().st_size > 0


class _Scaled:
    """``f(z) = -z / 2`` from ones, or with two fixed points the cube root of ``z``."""

    def __init__(self, *, two: bool) -> None:
        self.two, self.z0 = two, torch.full((3, 2, 2), 0.5)

    def __call__(self, z: Tensor) -> Tensor:
        return z.sign() * z.abs() ** (1 / 3) if self.two else -0.5 * z + 1


def test_residuals_and_agreement_are_those_of_known_maps() -> None:
    one = [(_Scaled(two=False), torch.full((3, 2, 2), -3.0))]
    trace = fpdm_fixed_points.residuals(one, 6)  # type: ignore[arg-type]
    errors = [(0.5 - 2 / 3) * (-0.5) ** k for k in range(7)]  # of the k-th state, whose limit is 2/3
    expected = [abs((errors[k + 1] - errors[k]) / (2 / 3 + errors[k + 1])) for k in range(6)]
    assert trace["median"] == pytest.approx(expected, rel=1e-4)
    found = fpdm_fixed_points.agreement(one, 1)["starts"]["last solution"]  # type: ignore[arg-type]
    assert found["converged"] == 1
    assert found["solved"]["largest distance"] < 1e-3
    assert found["iterated"]["largest distance"] == pytest.approx((2.5 - 0.75) / 0.75)
    two = [(_Scaled(two=True), torch.full((3, 2, 2), -0.5))]
    found = fpdm_fixed_points.agreement(two, 20)["starts"]["last solution"]  # type: ignore[arg-type]
    assert found["solved"]["least cosine"] == found["iterated"]["least cosine"] == pytest.approx(-1)
    assert found["solved"]["share beyond 1 %"] == 1
