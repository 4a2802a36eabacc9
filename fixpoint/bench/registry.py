"""Problems with a name: the protocol, and the registry behind ``fixpoint bench``."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fixpoint_cli.names import check_options, file_of, hint, named, parse_spec, problem_entries

if TYPE_CHECKING:
    from fixpoint.bench.results import Study


@runtime_checkable
class Problem(Protocol):
    """A map and where to start; ``fixpoint.solve(problem)`` needs no more.

    Two further attributes are honoured if present: ``batch_dims`` (leading dimensions of ``z0`` that index independent
    rows; else as in ``fixpoint.solve``) and ``norm``, which takes a state structured like ``z0`` to one size per row,
    in the batch shape.

    Example:
        >>> import torch
        >>> class Cosine:
        ...     z0 = torch.zeros(3)
        ...     def __call__(self, z):
        ...         return z.cos()
        >>> isinstance(Cosine(), Problem)
        True
    """

    @property
    def z0(self) -> Any:
        """Start: a tensor, or nested tuples, lists and dicts of tensors."""

    def __call__(self, z: Any, /) -> Any:
        """The image of ``z``, in the structure of ``z0``."""


def is_problem(found: object) -> bool:
    """Whether it can be called and has a z0, also one that a module keeps as a buffer."""
    return callable(found) and not isinstance(found, type) and hasattr(found, "z0")


@dataclass(frozen=True)
class RegisteredProblem:
    """What an entry point of the group ``fixpoint.problems`` loads to. Calling it with options makes the problem.

    Attributes:
        make: Builds the problem from keyword options.
        summary: One line for ``fixpoint problems``.
        study: The problem's own experiment for ``fixpoint bench``: takes ``quick`` and returns a ``bench.Study``. None:
            the solvers are compared on it.

    Raises:
        TypeError: When called with an option that ``make`` does not take.

    Example:
        >>> import torch
        >>> from fixpoint.bench.problems import LinearProblem
        >>> entry = RegisteredProblem(lambda *, rho=0.9: LinearProblem(rho * torch.eye(2), torch.ones(1, 2)), "scaled")
        >>> entry(rho=0.5).solution
        tensor([[2., 2.]])
    """

    make: Callable[..., Problem]
    summary: str
    study: Callable[[bool], Study] | None = None

    def __call__(self, **options: Any) -> Problem:
        self.check(options)
        return self.make(**options)

    def check(self, options: Mapping[str, Any], name: str = "") -> None:
        """Raise ``TypeError``, with a suggestion, for an option that ``make`` does not take."""
        check_keywords(f"problem {name!r}" if name else "the problem", self.make, options)


@functools.cache
def load_object(place: str) -> Any:
    """What stands at ``"module:name"`` or ``"path/to/file.py:name"``; the file is run once.

    Raises:
        LookupError: If there is no such module, file or name, or the import fails.
    """
    where, _, name = place.rpartition(":")
    file = file_of(place)
    try:
        module = importlib.import_module(where) if file is None else _run_file(file)
    except (ImportError, SyntaxError) as error:
        raise LookupError(f"cannot import {where}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = next((each for each in reversed(frames) if each.filename == os.path.abspath(where)), frames[-1])
        found = f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        raise LookupError(f"cannot import {where}: {found}") from error
    if not hasattr(module, name):
        raise LookupError(f"{where} has no {name!r}.{hint(name, [each for each in vars(module) if each[0] != '_'])}")
    return getattr(module, name)


def _run_file(file: Path) -> ModuleType:
    spec = util.spec_from_file_location(str(file), file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _at_place(place: str) -> RegisteredProblem:
    """The problem at a place, which holds a problem, what makes one, or a ``RegisteredProblem``."""
    found = load_object(place)
    if isinstance(found, RegisteredProblem):
        return found
    if is_problem(found):
        return RegisteredProblem(lambda: found, place)
    if not callable(found):
        raise TypeError(f"{place} must be a problem (z0 and __call__) or make one, found {type(found).__name__}")
    return RegisteredProblem(found, (inspect.getdoc(found) or place).partition("\n")[0])


def find_problem(name: str) -> RegisteredProblem:
    """The registered problem of that name, or that at a place such as ``"file.py:name"``; no other is imported.

    Raises:
        LookupError: If nobody registered the name, or there is nothing at the place.
        TypeError: If the entry point holds something else than a ``RegisteredProblem``.
    """
    if ":" in name:
        return _at_place(name)
    entry = named("problem", name, problem_entries())
    loaded = entry.load()
    if not isinstance(loaded, RegisteredProblem):
        raise TypeError(f"{entry.value} must be a fixpoint.RegisteredProblem, found {type(loaded).__name__}")
    return loaded


def available_problems() -> dict[str, RegisteredProblem]:
    """All registered problems by name. One that cannot be loaded is left out with a warning that names it.

    Example:
        >>> available_problems()["linear"]().z0.shape
        torch.Size([4, 200])
    """
    found = {}
    for name in problem_entries():
        try:
            found[name] = find_problem(name)
        except Exception as error:
            warnings.warn(f"problem {name!r} could not be loaded: {type(error).__name__}: {error}", stacklevel=2)
    return found


def load_problem(spec: str) -> Problem:
    """Make the problem that ``"name:key=value,..."`` names.

    In place of a registered name, ``"module:name"`` or ``"path/to/file.py:name"`` says where a problem stands,
    or what makes one of keyword options.

    Raises:
        LookupError: If there is no such problem.
        TypeError: If it does not take an option.
        ValueError: If the text has another form, or an option's value is illegal.

    Example:
        >>> import fixpoint
        >>> problem = fixpoint.load_problem("linear:rho=0.5,dim=20,dtype=float64")
        >>> fixpoint.solve(problem, rtol=1e-10).converged.all()
        tensor(True)
    """
    name, options = parse_spec(spec)
    entry = find_problem(name)
    entry.check(options, name)
    return entry(**options)


def check_keywords(
    owner: str, make: Callable[..., object], options: Mapping[str, Any], also: Iterable[str] = ()
) -> None:
    """Raise ``TypeError`` for an option that ``make`` does not take by keyword; ``also`` names further legal ones.

    Text for an option whose default is a number is refused too.

    Example:
        >>> check_keywords("problem 'p'", lambda *, rho=0.9: None, {"roh": 1})
        Traceback (most recent call last):
        TypeError: problem 'p' has no option 'roh'. Did you mean 'rho'? Legal: rho.
        >>> check_keywords("problem 'p'", lambda *, rho=0.9: None, {"rho": "abc"})
        Traceback (most recent call last):
        TypeError: problem 'p': option 'rho' must be a number, found 'abc'
    """
    parameters = inspect.signature(make).parameters.values()
    for parameter in parameters:
        value, default = options.get(parameter.name), parameter.default
        if isinstance(value, str) and isinstance(default, int | float):
            expected = "true or false" if isinstance(default, bool) else "a number"
            raise TypeError(f"{owner}: option {parameter.name!r} must be {expected}, found {value!r}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    legal = [*(parameter.name for parameter in parameters if parameter.kind in by_keyword), *also]
    check_options(owner, options, legal)
