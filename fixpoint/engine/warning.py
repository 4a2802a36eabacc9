"""Warnings for whoever called this package, as often as Python's filters say."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Hashable
from types import FrameType
from typing import Any

# Packages whose calls are not the ones to be warned of.
_INSIDE = ("fixpoint", "torch")
# What was warned of where the filters show a warning once: the cause, and the place as far as they compare it. With it
# the caller's registry of warnings: IPython gives each cell a new one.
_said: dict[Hashable, dict[Any, Any] | None] = {}


def warn(message: str, category: type[Warning], cause: Hashable) -> None:
    """Warn as Python's filters say; where they show a warning once, once for each cause.

    Python itself would show it again in a training, for two reasons. The numbers in the message change from step to
    step. And it forgets what it has shown whenever filters change, as they do where PyTorch imports what the first
    backward needs.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).partition(".")[0] in _INSIDE:
        frame = frame.f_back
    file, line, module = frame.f_code.co_filename, frame.f_lineno, _module(frame)
    action = _filter_action(message, category, module, line)
    place = {"default": (file, line), "module": (file,), "once": ()}.get(action)
    if place is not None:
        registry = frame.f_globals.setdefault("__warningregistry__", {}) if place else None
        if (cause, place) in _said and _said[cause, place] is registry:
            return
        _said[cause, place] = registry
    warnings.warn_explicit(message, category, file, line, module)


def _module(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__")
    return name if isinstance(name, str) else "<string>"  # as Python calls code that runs under no name


def _filter_action(message: str, category: type[Warning], module: str, line: int) -> str:
    """What the first filter that fits says: "default", "always", "error", ..."""
    for action, text, kind, where, number in warnings.filters:
        fits = issubclass(category, kind) and number in (0, line)
        if fits and re.match(text or "", message) and re.match(where or "", module):
            return action
    return "default"
