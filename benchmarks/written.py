"""What a benchmark leaves behind: its table as text, and its numbers with where they come from."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from fixpoint.bench import provenance


def write(folder: Path, name: str, text: str, **found: Any) -> None:
    """``name.txt`` with ``text``, and ``name.json`` with machine, versions and commit before what was found."""
    document = {
        "machine": provenance.machine(),
        "versions": {**provenance.versions(), "torchdeq": metadata.version("torchdeq")},
        "commit": provenance.commit(),
        **found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
