"""The plugin's imports: of the core, the names in ``fixpoint.__all__`` alone; of its own folders, those before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fixpoint
import fixpoint_diffusion

ROOT = Path(fixpoint_diffusion.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A folder, or a file that is in none, imports from those before it and from itself.
ORDER = (
    "extras",
    "files",
    "ranks",
    "options",
    "processes",
    "models",
    "denoisers",
    "chains",
    "sampling",
    "inversion",
    "restoration",
    "training",
    "evaluation",
    "pipelines",
    "experiments",
    "problems",
    "commands",
    "cli",
    "__main__",
    "__init__",
)


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


def place(file: Path) -> str:
    """The folder that a file of the plugin is in, or its own name where it is in none."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def upward_imports(source: str, where: str) -> list[str]:
    """Everything that source in ``where`` imports of the plugin, at any depth, and that comes after it in the order."""
    allowed = ORDER[: ORDER.index(where) + 1]
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "fixpoint_diffusion":
            # A folder, or a public name of the package itself.
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "" or (package == "fixpoint_diffusion" and rest.partition(".")[0] not in allowed):
                found.append(name)
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_plugin_imports_run_one_way(file: Path) -> None:
    assert place(file) in ORDER, f"{place(file)} is new: say in ORDER what it may import"
    assert upward_imports(file.read_text(), place(file)) == []


def test_the_order_names_what_is_there() -> None:
    assert {place(file) for file in FILES} == set(ORDER)


@pytest.mark.parametrize(
    "source",
    [
        "from fixpoint_diffusion.sampling import sample",
        "from fixpoint_diffusion.sampling.sample import sample",
        "from fixpoint_diffusion import sampling",
        "from fixpoint_diffusion import DDIMChain",
        "import fixpoint_diffusion",
        "import fixpoint_diffusion.training.data",
        "from ..sampling import sample",
        "def later():\n    from fixpoint_diffusion.sampling import sample",
    ],
)
def test_the_check_sees_each_way_to_import_upwards(source: str) -> None:
    assert upward_imports(source, "chains") != []


def test_the_check_allows_imports_downwards() -> None:
    source = "import torch\nfrom fixpoint_diffusion.processes.noise import step_noise\nimport fixpoint"
    assert upward_imports(source + "\nfrom fixpoint_diffusion.chains.chain import SamplingChain", "chains") == []


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
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


def test_public_names_are_there_when_asked_for_and_no_others() -> None:
    assert sorted(" ".join(fixpoint_diffusion._PLACES.values()).split()) == sorted(fixpoint_diffusion.__all__)
    for name in fixpoint_diffusion.__all__:
        assert getattr(fixpoint_diffusion, name).__name__ == name
    assert fixpoint_diffusion.restoration.__name__ == "fixpoint_diffusion.restoration"
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        _ = fixpoint_diffusion.sampel


def test_every_bar_is_one_that_does_not_fill_a_log() -> None:
    # Pipelines give diffusers' own loop a silent one.
    apart = ("pipelines",)
    found = [str(file) for file in FILES if place(file) not in apart and "import tqdm" in file.read_text()]
    assert found == []
