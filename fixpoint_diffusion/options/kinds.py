"""The values that fields of a dataclass may have, by the types that they are declared with."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "None"}


def check_kinds(options: Any, spelt: Callable[[str], str] = str) -> None:
    """Refuse a value of another kind than its field is declared with.

    Args:
        options: of a dataclass whose fields are numbers, texts, ``Literal``, enumerations, tuples, or unions of them.
        spelt: what the message calls a field of this name.

    Raises:
        ValueError: names the field, what is expected and what was found.

    >>> from fixpoint_diffusion.options.training import TrainingConfig
    >>> TrainingConfig(batch_size=2.5)
    Traceback (most recent call last):
    ...
    ValueError: batch_size must be a whole number, got 2.5
    """
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not any(_is_of(value, kind) for kind in kinds):
            raise ValueError(f"{spelt(name)} must be {' or '.join(map(_words, kinds))}, got {value!r}")


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) > 0 and all(_is_of(each, get_args(kind)[0]) for each in value)
    if choices := _choices(kind):
        return isinstance(value, str) and value in choices
    if isinstance(value, bool):  # which Python takes for a number
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _choices(kind: Any) -> tuple[Any, ...]:
    """What a ``Literal`` or an enumeration of texts allows; nothing for other kinds."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a tuple, each {_words(get_args(kind)[0])}"
    if choices := _choices(kind):
        return f"one of {', '.join(repr(str(each)) for each in choices)}" if len(choices) > 1 else repr(choices[0])
    return _WORDS[kind]
