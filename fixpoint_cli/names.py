"""Names of problems and solvers, and ``"name:key=value"`` in a command. Nothing here needs PyTorch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
GROUP = "fixpoint.problems"
SOLVERS: Mapping[str, str] = {
    "picard": "fixpoint.solvers.picard:Picard",
    "anderson": "fixpoint.solvers.anderson:Anderson",
    "broyden": "fixpoint.solvers.broyden:Broyden",
    "acx": "fixpoint.solvers.acx:ACX",
    "gmres": "fixpoint.solvers.gmres:GMRES",
    "causal": "fixpoint.chains.causal:CausalQuasiNewton",
}
# The options of what this distribution registers, for a typo to be refused at once. A test holds them to signatures.
OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "problem": {
        "linear": ("rho", "dim", "rows", "scale", "seed", "dtype"),
        "tanh": ("gain", "dim", "rows", "seed", "dtype"),
        "expansive": ("low", "high", "dim", "rows", "seed", "dtype"),
        "ddim-chain": ("steps", "samples", "seed"),
        "sddim-chain": ("steps", "samples", "eta", "seed"),
        "fpdm-layer": ("timestep", "samples", "seed"),
    },
    "solver": {
        "picard": ("damping", "blocks"),
        "anderson": ("memory", "damping", "ridge", "history_dtype", "blocks"),
        "broyden": ("memory", "history_dtype", "blocks"),
        "acx": ("blocks",),
        "gmres": ("memory", "blocks"),
        "causal": ("memory", "window", "max_rows", "certify", "noise_rtol", "probes", "blocks"),
    },
}
# So many names are listed in full; of more, those that are nearest.
_LISTED = 10
Value = bool | int | float | str
# A place is "package.module:name", "module:name" or "path/to/file.py:name".
_PLACE = re.compile(r"([^:=,]+\.py|\w+(\.\w+)*):[A-Za-z_]\w*(?=:|$)")


def problem_entries() -> dict[str, metadata.EntryPoint]:
    """The entry points of all registered problems by name, sorted; nothing is imported."""
    return {entry.name: entry for entry in sorted(metadata.entry_points(group=GROUP), key=lambda each: each.name)}


def check_names(problems: Sequence[str], solvers: Sequence[str]) -> None:
    """Raise for a name or option that nobody registered and for a file that is not there; nothing is imported.

    Raises:
        LookupError: If there is no such problem, solver or file.
        TypeError: If one of this distribution does not take an option; those of others are read where they are loaded.
        ValueError: If the text of one has another form than ``"name:key=value,..."``.

    Example:
        >>> check_names(["linear:rho=0.5"], ["acx:block=3"])
        Traceback (most recent call last):
        TypeError: solver 'acx' has no option 'block'. Did you mean 'blocks'? Legal: blocks.
    """
    known: dict[str, Mapping[str, object]] = {"problem": problem_entries(), "solver": SOLVERS}
    for kind, specs in (("problem", problems), ("solver", solvers)):
        for name, options in map(parse_spec, specs):
            if ":" in name:
                file_of(name)
            elif name.endswith(".py"):
                raise ValueError(f"expected {name}:NAME, with the name of the {kind} in that file, found {name!r}")
            else:
                named(kind, name, known[kind])
                check_options(f"{kind} {name!r}", options, OPTIONS[kind].get(name, options))


def file_of(place: str) -> Path | None:
    """The file of ``"path/to/file.py:name"``; None for ``"package.module:name"`` and ``"module:name"``.

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

    The name may be a place: ``"package.module:name"``, ``"module:name"`` or ``"path/to/file.py:name"``.

    Raises:
        ValueError: If the text has another form, or an option twice.

    Example:
        >>> parse_spec("linear:rho=0.99,dim=50,dtype=float64")
        ('linear', {'rho': 0.99, 'dim': 50, 'dtype': 'float64'})
        >>> parse_spec("solvers/mine.py:Mine:memory=5")
        ('solvers/mine.py:Mine', {'memory': 5})
    """
    name, colon, rest = spec.partition(":")
    # Behind a registered name come its options; "linear:rho" lacks a value, and names no module.
    if (place := _PLACE.match(spec)) and name not in SOLVERS and name not in problem_entries():
        name, (colon, rest) = place[0], (spec[place.end() :][:1], spec[place.end() + 1 :])
    options: dict[str, Value] = {}
    for item in rest.split(",") if colon else ():
        key, equals, text = item.partition("=")
        if not (key.strip() and equals and text.strip()):
            raise ValueError(f"expected name:key=value,key=value, found {item!r} in {spec!r}")
        if key.strip() in options:
            raise ValueError(f"option {key.strip()!r} stands twice in {spec!r}")
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


def near_miss(name: str, legal: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`` Did you mean 'x'?`` for a near miss, else nothing; ``cutoff`` is the least ratio of difflib that is near.

    Example:
        >>> near_miss("andersen", ["picard", "anderson"]), near_miss("x", ["picard"])
        (" Did you mean 'anderson'?", '')
    """
    near = difflib.get_close_matches(name, legal, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def hint(name: str, legal: Iterable[str]) -> str:
    """``near_miss``, and the legal names in any case; of more than ten those that are nearest, or the first.

    Example:
        >>> hint("roh", ["rho", "dim"])
        " Did you mean 'rho'? Legal: dim, rho."
    """
    names = sorted(set(legal))
    listed = names
    if len(names) > _LISTED:
        listed = [*(difflib.get_close_matches(name, names, n=_LISTED) or names[:_LISTED]), f"... ({len(names)} in all)"]
    return f"{near_miss(name, names)} Legal: {', '.join(listed) or 'none'}."


def check_options(owner: str, options: Iterable[str], legal: Collection[str]) -> None:
    """Raise ``TypeError`` for an option that is not legal.

    Example:
        >>> check_options("problem 'linear'", {"roh": 0.5}, ["rho", "dim"])
        Traceback (most recent call last):
        TypeError: problem 'linear' has no option 'roh'. Did you mean 'rho'? Legal: dim, rho.
    """
    for name in options:
        if name not in legal:
            raise TypeError(f"{owner} has no option {name!r}.{hint(name, legal)}")


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
