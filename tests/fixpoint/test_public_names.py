"""The public face: names, version, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import fixpoint


def test_all_is_complete_sorted_and_importable():
    def order(name):  # CONSTANTS, Classes, functions
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert fixpoint.__all__ == sorted(set(fixpoint.__all__), key=order)
    for name in fixpoint.__all__:
        assert hasattr(fixpoint, name), name
    own = {
        name
        for name, value in vars(fixpoint).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("fixpoint")
    }
    assert own <= set(fixpoint.__all__)


def test_every_public_class_and_function_has_a_docstring():
    for name in fixpoint.__all__:
        doc = getattr(fixpoint, name).__doc__
        assert doc, name
        assert not doc.startswith(f"{name}("), f"{name} has only the signature that dataclass made"


def test_version_equals_pyprojects():
    root = Path(fixpoint.__file__).resolve().parent.parent
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert fixpoint.__version__ == pyproject["project"]["version"]


def test_importing_the_core_pulls_in_no_optional_package():
    optional = ("matplotlib", "diffusers", "sklearn", "typer", "PIL", "safetensors", "torchdeq", "fixpoint_diffusion")
    code = f"import sys, fixpoint; print([name for name in {optional!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
