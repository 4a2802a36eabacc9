"""Bridges to other libraries, each imported when it is first asked for: ``torchdeq``, ``numpy``."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("numpy", "torchdeq"):
        return importlib.import_module(f"fixpoint.interop.{name}")
    raise AttributeError(f"module 'fixpoint.interop' has no attribute {name!r}")
