"""Things named on a command line: ``"name:key=value,key=value"``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable

Value = bool | int | float | str


def parse_spec(spec: str) -> tuple[str, dict[str, Value]]:
    """Split ``"name:key=value,..."`` into the name and its options; values become bool, int, float or stay text.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse_spec("linear:rho=0.99,dim=50,dtype=float64")
        ('linear', {'rho': 0.99, 'dim': 50, 'dtype': 'float64'})
    """
    name, colon, rest = spec.partition(":")
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


def unknown(kind: str, name: str, legal: Collection[str]) -> LookupError:
    """The error for a name that nobody registered.

    Example:
        >>> unknown("solver", "andersen", ["picard", "anderson"])
        LookupError("unknown solver 'andersen'. Did you mean 'anderson'? Legal: anderson, picard.")
    """
    return LookupError(f"unknown {kind} {name!r}.{hint(name, legal)}")


def check_options(owner: str, make: Callable[..., object], options: Collection[str], also: Iterable[str] = ()) -> None:
    """Raise ``TypeError`` for an option that ``make`` does not take by keyword; ``also`` names further legal ones.

    Example:
        >>> check_options("problem 'p'", lambda *, rho=0.9: None, {"roh": 1})
        Traceback (most recent call last):
        TypeError: problem 'p' has no option 'roh'. Did you mean 'rho'? Legal: rho.
    """
    parameters = inspect.signature(make).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    legal = [*(parameter.name for parameter in parameters if parameter.kind in by_keyword), *also]
    for name in options:
        if name not in legal:
            raise TypeError(f"{owner} has no option {name!r}.{hint(name, legal)}")
