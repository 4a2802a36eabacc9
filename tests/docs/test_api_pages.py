"""The API reference has every public name once, and every public name shows how it is used."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fixpoint
import fixpoint_diffusion

PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.md"))
PUBLIC = [(package, name) for package in (fixpoint, fixpoint_diffusion) for name in package.__all__ if name != "bench"]


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
    assert [f"{package.__name__}.{name}" for package, name in PUBLIC if id(getattr(package, name)) not in objects] == []


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_every_public_name_has_an_example_or_names_the_one_that_shows_it(package: Any, name: str) -> None:
    doc = inspect.getdoc(getattr(package, name)) or ""
    assert ">>>" in doc or re.search(r"Example:\s+See :\w+:`", doc), f"{package.__name__}.{name}"
