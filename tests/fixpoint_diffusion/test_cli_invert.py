"""``fixpoint-diffusion invert``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded
from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.training.data import load_digits


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["invert", *map(str, arguments)])


def test_what_is_written_leads_back_to_the_images(tmp_path: Path) -> None:
    options = ("--steps", 5, "--num-images", 2, "--rtol", 0.1, "--out", tmp_path / "out")
    result = invoke("digits", *options)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"x_T.npy", "grid.png", "errors.png", "invert.json"}
    record = json.loads((tmp_path / "out" / "invert.json").read_text())
    x_T = torch.from_numpy(np.load(tmp_path / "out" / "x_T.npy"))
    denoiser, x_0 = embedded("ddpm-digits"), load_digits().images[:2]
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.from_diffusers(denoiser.schedule_config), steps=5)
    with torch.no_grad():
        error = (chain.sequential()[:, -1] - x_0).square().mean(dim=(1, 2, 3)).sqrt()
    found = [row["error"] for row in record["results"]]
    assert found == pytest.approx(error.tolist(), rel=1e-3)
    assert [row["status"] for row in record["results"]] == ["CONVERGED", "CONVERGED"]
    again = invoke("digits", *options)
    assert isinstance(again.exception, ValueError)
    assert "--overwrite" in str(again.exception)
    assert invoke("digits", *options, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere"),
        (("digits", "--model", "nothing"), "no model folder"),
        (("digits", "--class", "3"), "takes none"),
        (("digits", "--guidance", "2"), "takes none"),
        (("digits", "--steps", "5000"), "5000"),
        (("digits", "--rtol", "nan"), "rtol"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", "invert", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not out.exists()


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 8, 8), dtype=np.float32))
    result = invoke(tmp_path / "images.npy", "--out", tmp_path / "out")
    assert "the model takes images" in str(result.exception)
