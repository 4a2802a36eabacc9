"""Names of problems and solvers, and ``"name:key=value"`` in a command. Nothing here needs PyTorch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
GROUP = "fixpoint.problems"
SOLVERS: Mapping[str, str] = {
    "picard": "fixpoint.solvers.picard:Picard",
    "anderson": "fixpoint.solvers.anderson:Anderson",
    "broyden": "fixpoint.solvers.broyden:Broyden",
    "causal": "fixpoint.chains.causal:CausalQuasiNewton",
}
Value = bool | int | float | str
# A place is "package.module:name" or "path/to/file.py:name".
_PLACE = re.compile(r"([^:=,]+\.py|\w+(\.\w+)+):[A-Za-z_]\w*(?=:|$)")


def problem_entries() -> dict[str, metadata.EntryPoint]:
    """The entry points of all registered problems by name, sorted; nothing is imported."""
    return {entry.name: entry for entry in sorted(metadata.entry_points(group=GROUP), key=lambda each: each.name)}


def check_names(problems: Sequence[str], solvers: Sequence[str]) -> None:
    """Raise for a name that nobody registered and for a file that is not there; nothing is imported.

    Raises:
        LookupError: If there is no such problem, solver or file.
        ValueError: If the text of one has another form than ``"name:key=value,..."``.

    Example:
        >>> check_names(["linear:rho=0.5"], ["andersen:memory=3"])
        Traceback (most recent call last):
        LookupError: unknown solver 'andersen'. Did you mean 'anderson'? Legal: anderson, broyden, causal, picard.
    """
    known: dict[str, Mapping[str, object]] = {"problem": problem_entries(), "solver": SOLVERS}
    for kind, specs in (("problem", problems), ("solver", solvers)):
        for name, _ in map(parse_spec, specs):
            if ":" in name:
                file_of(name)
            elif name.endswith(".py"):
                raise ValueError(f"expected {name}:NAME, with the name of the {kind} in that file, found {name!r}")
            else:
                named(kind, name, known[kind])


def file_of(place: str) -> Path | None:
    """The file of ``"path/to/file.py:name"``; None for ``"package.module:name"``.

    Raises:
        LookupError: If there is no such file.
    """
    where = place.rpartition(":")[0]
    if not where.endswith(".py"):
        return None
    if not Path(where).is_file():
        raise LookupError(f"no file {where}")
    return Path(where)


def parse_spec(spec: str) -> tuple[str, dict[str, Value]]:
    """Split ``"name:key=value,..."`` into the name and its options; values become bool, int, float or stay text.

    The name may be a place, ``"package.module:name"`` or ``"path/to/file.py:name"``.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse_spec("linear:rho=0.99,dim=50,dtype=float64")
        ('linear', {'rho': 0.99, 'dim': 50, 'dtype': 'float64'})
        >>> parse_spec("solvers/mine.py:Mine:memory=5")
        ('solvers/mine.py:Mine', {'memory': 5})
    """
    name, colon, rest = spec.partition(":")
    if place := _PLACE.match(spec):
        name, (colon, rest) = place[0], (spec[place.end() :][:1], spec[place.end() + 1 :])
    options: dict[str, Value] = {}
    for item in rest.split(",") if colon else ():
        key, equals, text = item.partition("=")
        if not (key.strip() and equals and text.strip()):
            raise ValueError(f"expected name:key=value,key=value, found {item!r} in {spec!r}")
        options[key.strip()] = _value(text.strip())
    if not name.strip():
        raise ValueError(f"expected name:key=value,key=value, found no name in {spec!r}")
    return name.strip(), options


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def hint(name: str, legal: Iterable[str]) -> str:
    """``". Did you mean 'x'?"`` for a near miss, and the legal names in any case."""
    names = sorted(legal)
    near = difflib.get_close_matches(name, names, n=1)
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Legal: {', '.join(names) or 'none'}."


def named(kind: str, name: str, legal: Mapping[str, T]) -> T:
    """The entry of that name.

    Raises:
        LookupError: If nobody registered it.

    Example:
        >>> named("solver", "andersen", {"picard": 1, "anderson": 2})
        Traceback (most recent call last):
        LookupError: unknown solver 'andersen'. Did you mean 'anderson'? Legal: anderson, picard.
    """
    if name not in legal:
        raise LookupError(f"unknown {kind} {name!r}.{hint(name, legal)}")
    return legal[name]
