"""What the contracts share: options as values, and maps whose fixed points are known."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DIM = 12  # divisible by 2, 3, 4 and 6, for solvers that split their rows


def contraction() -> Tensor:
    """``(dim, dim)`` float64 matrix of spectral norm 1, the same in every run."""
    matrix = normal(DIM, DIM)
    return matrix / torch.linalg.matrix_norm(matrix, ord=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian float64 numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class RowMaps:
    """``z_r -> squash(rate_r A z_r + b_r)`` with ``|A| = 1``: each row contracts at a rate of its own.

    Rows that end at different times, and differ in what they need, show a solver that couples them.
    """

    matrix: Tensor  # (dim, dim)
    rate: Tensor  # (rows, 1)
    offset: Tensor  # (rows, dim)
    squash: Callable[[Tensor], Tensor] = torch.clone

    @classmethod
    def make(cls, rows: int = 4, *, rate: float = 0.8, seed: int = 1, **options: Any) -> RowMaps:
        """Rates from half of ``rate`` to ``rate``, in an order that is not sorted."""
        rates = rate * torch.linspace(0.5, 1, rows, dtype=torch.float64)
        return cls(contraction(), rates.roll(rows // 2)[:, None], normal(rows, DIM, seed=seed), **options)

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.offset)

    def __call__(self, z: Tensor) -> Tensor:
        return self.squash(self.rate * (z @ self.matrix.T) + self.offset)

    def to(self, where: Any) -> RowMaps:
        """The same maps in another dtype or on another device."""
        matrix, rate, offset = (tensor.to(where) for tensor in (self.matrix, self.rate, self.offset))
        return dataclasses.replace(self, matrix=matrix, rate=rate, offset=offset)

    def rows(self, index: Any) -> RowMaps:
        """The maps of some rows."""
        return dataclasses.replace(self, rate=self.rate[index], offset=self.offset[index])

    def scaled(self, factor: float) -> RowMaps:
        """Offsets times ``factor``; so is the fixed point, if nothing squashes."""
        return dataclasses.replace(self, offset=factor * self.offset)

    def solution(self, *, transposed: bool = False) -> Tensor:
        """Closed form of ``z = rate A z + b``, or with ``A^T``; differentiable."""
        A = self.matrix.T if transposed else self.matrix
        system = torch.eye(DIM, dtype=A.dtype, device=A.device) - self.rate[:, None] * A
        return torch.linalg.solve(system, self.offset)


class OptionsContract:
    """A solver or rule is a frozen dataclass: a value that can be shared, compared, copied and stored."""

    def subject(self) -> Any:
        """What is tested."""
        raise NotImplementedError

    def test_options_cannot_be_changed(self) -> None:
        subject = self.subject()
        assert dataclasses.is_dataclass(subject), f"{subject!r} must be a dataclass"
        for name in [*(field.name for field in dataclasses.fields(subject)), "an_attribute_of_no_field"]:
            try:
                setattr(subject, name, None)
            except dataclasses.FrozenInstanceError:
                continue
            raise AssertionError(f"{name} could be set: decorate {type(subject).__name__} with dataclass(frozen=True)")

    def test_equal_options_make_equal_objects(self) -> None:
        subject = self.subject()
        twin = dataclasses.replace(subject)
        assert twin == subject, f"found {twin!r} unequal to {subject!r}: leave __eq__ to dataclass"
        assert hash(twin) == hash(subject), "equal objects must have equal hashes"

    def test_it_can_be_copied_and_pickled(self) -> None:
        subject = self.subject()
        for way, twin in (("copy.deepcopy", copy.deepcopy(subject)), ("pickle", pickle.loads(pickle.dumps(subject)))):
            for field in dataclasses.fields(subject):
                found, expected = getattr(twin, field.name), getattr(subject, field.name)
                if isinstance(expected, torch.Generator):
                    found, expected = found.get_state().tolist(), expected.get_state().tolist()
                assert found == expected, f"{way} turned {field.name}={expected!r} into {found!r}"

    def test_unknown_options_raise(self) -> None:
        subject = self.subject()
        try:
            dataclasses.replace(subject, an_option_of_no_field=1)
        except TypeError:
            return
        raise AssertionError(f"{type(subject).__name__} swallowed an unknown option: it must raise TypeError")
