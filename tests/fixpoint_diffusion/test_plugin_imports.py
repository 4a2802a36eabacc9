"""The plugin uses the core as anyone else could: by ``fixpoint`` and the names in ``fixpoint.__all__`` alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fixpoint
import fixpoint_diffusion

FILES = sorted(Path(fixpoint_diffusion.__file__).parent.rglob("*.py"))


def private_uses(source: str) -> list[str]:
    """Everything in the source that reaches into the core beyond its public names."""
    tree = ast.parse(source)
    found: list[str] = []
    aliases = {"fixpoint"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name == "fixpoint":
                    aliases.add(name.asname or name.name)
                elif name.name.startswith("fixpoint."):
                    found.append(f"import {name.name}")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module.startswith("fixpoint."):
                found.append(f"from {node.module}")
            elif node.module == "fixpoint":
                found += [f"fixpoint.{name.name}" for name in node.names if name.name not in fixpoint.__all__]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if node.attr not in fixpoint.__all__:
                found.append(f"fixpoint.{node.attr}")
        elif isinstance(node, ast.Constant) and names_a_module(node.value):
            found.append(repr(node.value))
    return found


def names_a_module(value: object) -> bool:
    """As importlib would be told; the registry's group is a name for others to use."""
    return isinstance(value, str) and value.startswith("fixpoint.") and value != "fixpoint.problems"


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(FILES[0].parent)) for file in FILES])
def test_plugin_imports_only_public_names_of_the_core(file: Path) -> None:
    assert private_uses(file.read_text()) == []


def test_plugin_has_files_to_check() -> None:
    assert len(FILES) >= 8


@pytest.mark.parametrize(
    "source",
    [
        "import fixpoint.solvers.anderson",
        "from fixpoint.engine.loop import iterate",
        "from fixpoint import iterate",
        "import fixpoint\nfixpoint.solvers.anderson.Anderson()",
        "import fixpoint as fp\nfp.iterate.advance",
        "import importlib\nimportlib.import_module('fixpoint.engine.loop')",
    ],
)
def test_the_check_sees_each_way_to_reach_into_the_core(source: str) -> None:
    assert private_uses(source) != []


def test_the_check_allows_public_names() -> None:
    assert private_uses("import fixpoint\nfrom fixpoint import solve, Anderson\nfixpoint.Picard()") == []
