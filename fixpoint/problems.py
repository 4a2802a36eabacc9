"""Problems with a name: the protocol, the registry behind ``fixpoint bench``, and three classical test problems."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fixpoint.specs import check_options, parse_spec, unknown

if TYPE_CHECKING:
    from fixpoint.blocks import Study

GROUP = "fixpoint.problems"


@runtime_checkable
class Problem(Protocol):
    """A map and where to start; ``fixpoint.solve(problem)`` needs no more.

    Two further attributes are honoured if present: ``batch_dims`` (leading dimensions of ``z0`` that index independent
    rows, else 1) and ``norm``, which takes a state structured like ``z0`` to one size per row, in the batch shape.

    Example:
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
        check_options(f"problem {name!r}" if name else "the problem", self.make, options)


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def problem_names() -> list[str]:
    """Names of all registered problems, sorted; nothing is imported."""
    return sorted(_entry_points())


def find_problem(name: str) -> RegisteredProblem:
    """The registered problem of that name; no other is imported.

    Raises:
        LookupError: If nobody registered the name.
        TypeError: If the entry point holds something else than a ``RegisteredProblem``.
    """
    entries = _entry_points()
    if name not in entries:
        raise unknown("problem", name, entries)
    loaded = entries[name].load()
    if not isinstance(loaded, RegisteredProblem):
        raise TypeError(f"{entries[name].value} must be a fixpoint.RegisteredProblem, found {type(loaded).__name__}")
    return loaded


def available_problems() -> dict[str, RegisteredProblem]:
    """All registered problems by name. One that cannot be loaded is left out with a warning that names it.

    Example:
        >>> available_problems()["linear"]().z0.shape
        torch.Size([4, 200])
    """
    found = {}
    for name in problem_names():
        try:
            found[name] = find_problem(name)
        except Exception as error:
            warnings.warn(f"problem {name!r} could not be loaded: {type(error).__name__}: {error}", stacklevel=2)
    return found


def load_problem(spec: str) -> Problem:
    """Make the problem that ``"name:key=value,..."`` names.

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


@dataclass(frozen=True)
class LinearProblem:
    """``f(z) = A z + b`` for each row.

    Args:
        matrix: ``A``, ``(dim, dim)``, shared by the rows.
        offset: ``b``, ``(rows, dim)``.

    Example:
        >>> problem = LinearProblem(torch.tensor([[0.5]]), torch.tensor([[1.0], [3.0]]))
        >>> problem.solution.flatten()
        tensor([2., 6.])
    """

    matrix: Tensor
    offset: Tensor

    @property
    def z0(self) -> Tensor:
        """Zeros, ``(rows, dim)``."""
        return torch.zeros_like(self.offset)

    def __call__(self, z: Tensor, /) -> Tensor:
        return z @ self.matrix.T + self.offset

    @property
    def solution(self) -> Tensor:
        """``(I - A)^-1 b``, solved in float64 for the matrix as rounded."""
        matrix = self.matrix.double()
        system = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - matrix
        return torch.linalg.solve(system, self.offset.double().T).T.to(self.offset.dtype)


@dataclass(frozen=True)
class TanhProblem:
    """``f(z) = tanh(W z + x)`` for each row: the smallest deep-equilibrium network.

    Args:
        weight: ``W``, ``(dim, dim)``.
        injection: ``x``, ``(rows, dim)``.

    Example:
        >>> TanhProblem(torch.zeros(2, 2), torch.zeros(1, 2))(torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    weight: Tensor
    injection: Tensor

    @property
    def z0(self) -> Tensor:
        """Zeros, ``(rows, dim)``."""
        return torch.zeros_like(self.injection)

    def __call__(self, z: Tensor, /) -> Tensor:
        return torch.tanh(z @ self.weight.T + self.injection)


def _linear(
    *, rho: float = 0.9, dim: int = 200, rows: int = 4, scale: float = 1.0, seed: int = 0, dtype: str = "float32"
) -> LinearProblem:
    if not 0 < rho < 1:
        raise ValueError(f"rho must lie in (0, 1), found {rho}; try the problem 'expansive' beyond")
    generator = _generator(dim, rows, seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    symmetric = (gaussian + gaussian.T) / 2
    matrix = symmetric * (rho / torch.linalg.eigvalsh(symmetric).abs().max())
    offset = scale * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return LinearProblem(matrix.to(_dtype(dtype)), offset.to(_dtype(dtype)))


def _expansive(
    *, low: float = -3.0, high: float = 0.5, dim: int = 200, rows: int = 4, seed: int = 0, dtype: str = "float32"
) -> LinearProblem:
    if not low <= high < 1:
        raise ValueError(f"expected low <= high < 1, found low={low}, high={high}")
    generator = _generator(dim, rows, seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    matrix = (basis * torch.linspace(low, high, dim, dtype=torch.float64)) @ basis.T
    offset = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return LinearProblem(matrix.to(_dtype(dtype)), offset.to(_dtype(dtype)))


def _tanh(*, gain: float = 0.96, dim: int = 256, rows: int = 4, seed: int = 0, dtype: str = "float32") -> TanhProblem:
    generator = _generator(dim, rows, seed)
    weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * (gain / dim**0.5)
    injection = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return TanhProblem(weight.to(_dtype(dtype)), injection.to(_dtype(dtype)))


def _generator(dim: int, rows: int, seed: int) -> torch.Generator:
    for name, size in (("dim", dim), ("rows", rows)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")
    return torch.Generator().manual_seed(seed)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must name a floating point type of torch such as 'float64', found {name!r}")
    return found


linear = RegisteredProblem(_linear, "symmetric linear map with spectral radius rho, 200-d; a closed-form solution")
tanh = RegisteredProblem(_tanh, "tanh network with Gaussian weights, 256-d: the smallest deep-equilibrium model")
expansive = RegisteredProblem(_expansive, "symmetric linear map with spectrum from -3 to 0.5: plain iteration diverges")

CLASSICAL = (
    "linear",
    "linear:rho=0.99",
    "linear:rho=0.999",
    "tanh",
    "expansive",
    "linear:rho=0.99,scale=1e4",
    "linear:rho=0.99,scale=1e-4",
)
