"""The API reference has every public name once, and every public name shows how it is used."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fixpoint
import fixpoint_diffusion

PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.md"))
TOPS = (fixpoint, fixpoint_diffusion)
INNER = [m.name for top in TOPS for m in pkgutil.walk_packages(top.__path__, f"{top.__name__}.") if m.ispkg]
PACKAGES = [*TOPS, *map(importlib.import_module, INNER)]
PUBLIC = {
    (value.__module__, value.__qualname__): value
    for package in PACKAGES
    for value in (getattr(package, name) for name in getattr(package, "__all__", ()))
    if inspect.isclass(value) or inspect.isfunction(value)
}


def resolve(path: str) -> Any:
    """The object behind a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def listed() -> list[str]:
    """What the pages document, as they spell it."""
    directive = re.compile(r"^\.\. auto(?:function|class|exception):: (\S+)", re.MULTILINE)
    return [path for page in PAGES for path in directive.findall(page.read_text(encoding="utf-8"))]


def test_nothing_is_listed_twice() -> None:
    counts = Counter(id(resolve(path)) for path in listed())
    assert [path for path in listed() if counts[id(resolve(path))] > 1] == []


def test_every_public_name_is_listed() -> None:
    objects = {id(resolve(path)) for path in listed()}
    assert [name for name, value in PUBLIC.items() if id(value) not in objects] == []


@pytest.mark.parametrize("name", PUBLIC, ids=".".join)
def test_every_public_name_has_an_example_or_names_the_one_that_shows_it(name: tuple[str, str]) -> None:
    doc = inspect.getdoc(PUBLIC[name]) or ""
    assert ">>>" in doc or re.search(r"Example:\s+[Ss]ee :\w+:`", doc)
