"""Without the libraries of the extras: what works, and what is said where it does not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import fixpoint_diffusion
from fixpoint_diffusion.extras import DISTRIBUTION

_PROJECT = Path(fixpoint_diffusion.__file__).parents[1] / "pyproject.toml"
_BLOCKED = """
import sys
import torch, numpy  # what the distribution itself asks for; torch takes some of the others where they are there

MISSING = (
    "PIL accelerate diffusers filelock matplotlib psutil safetensors scipy sklearn torchmetrics tqdm transformers typer"
).split()

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] in MISSING]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())

def message(error, run):
    try:
        run()
    except error as found:
        print(found)
"""
_CODE = """
import fixpoint, fixpoint_diffusion, fixpoint_diffusion.training, fixpoint_diffusion.evaluation
message(ModuleNotFoundError, lambda: fixpoint_diffusion.embedded("fpdm-digits"))
message(ModuleNotFoundError, lambda: fixpoint.load_problem("ddim-chain"))
message(ModuleNotFoundError, fixpoint_diffusion.training.data.load_digits)
message(SystemExit, lambda: __import__("fixpoint_diffusion.cli"))
message(SystemExit, lambda: __import__("fixpoint_cli.command"))
"""


def test_without_extras_the_package_imports_and_errors_name_the_line_that_installs_them() -> None:
    found = subprocess.run([sys.executable, "-c", _BLOCKED + _CODE], capture_output=True, text=True, check=True)
    line = "pip install 'fixpoint-torch[diffusion]'"
    assert found.stdout.splitlines() == [
        f"reading a prior needs safetensors: {line}",
        f"reading a prior needs safetensors: {line}",
        f"the data set of digits needs sklearn: {line}",
        f"the command fixpoint-diffusion needs typer: {line}",
        'the command fixpoint needs tqdm: pip install "fixpoint-torch[bench]"',
    ]


def test_the_install_line_names_this_distribution() -> None:
    assert tomllib.loads(_PROJECT.read_text())["project"]["name"] == DISTRIBUTION
