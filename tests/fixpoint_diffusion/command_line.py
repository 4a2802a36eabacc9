"""The command ``fixpoint-diffusion sample`` as tests call it, and a small FPDM for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.models.checkpoint import save_fpdm

SCHEDULE = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "epsilon"}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def sampled(out: Path, *arguments: object) -> dict:
    result = invoke("--steps", 3, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads((out / "sample.json").read_text())


def run_main(*arguments: object) -> tuple[int, str]:
    """Exit code and what went to stderr, of the command as it is installed."""
    with pytest.MonkeyPatch.context() as patch:
        errors: list[str] = []
        patch.setattr(sys, "argv", ["fixpoint-diffusion", *map(str, arguments)])
        patch.setattr("typer.echo", lambda message="", err=False, **_: errors.append(str(message)) if err else None)
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code, "\n".join(errors)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_fpdm(folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    model = FPDM(FPDMConfig.from_dict({"width": 16, "heads": 2, "num_classes": 3, **settings}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_fpdm(model, folder)
    config = {**SCHEDULE, "prediction_type": "v_prediction", "timestep_spacing": "linspace"}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return folder
