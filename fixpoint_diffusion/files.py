"""Reading and writing JSON files, with one clear error where a file is damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not valid JSON in UTF-8, is nested too deep, or holds something else than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, indented."""
    Path(path).write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
