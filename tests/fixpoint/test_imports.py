"""Imports run one way, downwards: the picture in docs/design.md, held against the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fixpoint

ROOT = Path(fixpoint.__file__).parent
# From the ground up. A file imports from its own floor and from those below.
FLOORS = (
    ("engine",),
    ("solvers",),
    ("chains", "backward"),
    ("solution", "options"),
    ("progress", "plotting", "interop.numpy"),
    ("solve",),
    ("attach", "root", "layer", "memory", "training"),
    ("interop", "testing", "bench"),
)


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in ROOT.rglob("*.py")
}


def floor(module: str) -> int:
    """Of a module below ``fixpoint``; the longest name that fits counts."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert fitting, f"fixpoint.{module} stands on no floor: give it one in FLOORS"
    return max(fitting)[1]


def imports(source: str) -> set[str]:
    """The modules below ``fixpoint`` that are imported when the code runs, wherever the import stands."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fixpoint":
            below = node.module.removeprefix("fixpoint").removeprefix(".")
            inner = {".".join(filter(None, (below, alias.name))) for alias in node.names}
            names |= inner & MODULES or ({below} if below else inner)
    return names


def modules() -> dict[str, set[str]]:
    found = {}
    for name in sorted(MODULES - {"__init__"}):
        path = ROOT.joinpath(*name.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found[name] = imports(source.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(("name", "used"), modules().items(), ids=list(modules()))
def test_a_module_imports_from_its_own_floor_and_below(name, used):
    above = {other for other in used if floor(other) > floor(name)}
    assert not above, f"fixpoint.{name} imports from above: {sorted(above)}"


def test_no_two_modules_import_each_other():
    graph = modules()

    def leads_to(start: str, seen: frozenset[str]) -> set[str]:
        for other in graph.get(start, set()) - seen:
            seen |= leads_to(other, frozenset(seen | {other}))
        return set(seen)

    for name in graph:
        assert name not in {x for other in graph[name] for x in leads_to(other, frozenset({other}))}, name


def test_an_import_is_seen_wherever_it_stands():
    source = "def f():\n    from fixpoint.solve import solve\nif TYPE_CHECKING:\n    from fixpoint.bench import run\n"
    assert imports(source) == {"solve"}
    assert imports("from fixpoint import bench, solve") == {"bench", "solve"}
