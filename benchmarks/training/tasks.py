"""Two things to learn: handwritten digits by a deep-equilibrium cell, and sums by an implicit transformer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import fixpoint

_EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "digits_deq.py"
_LENGTH, _WIDTH, _HEADS, _BASE = 6, 32, 4, 10

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its examples and how long it trains.

    Args:
        name: As in the tables.
        seconds: Wall time of training that each run gets.
        model: ``model(backward, solver)``; called on inputs it returns logits ``(rows, ..., classes)`` and a solution.
        batches: ``batches(seed)`` yields batches of inputs and labels without end.
        test: ``test(seed)``, examples that training never sees.
        learning_rate: Of Adam.
    """

    name: str
    seconds: float
    model: Callable[[fixpoint.Backward, fixpoint.Solver], nn.Module]
    batches: Callable[[int], Iterator[Examples]]
    test: Callable[[int], Examples]
    learning_rate: float


def digits_example() -> ModuleType:
    """The example of the documentation, whose model this trains."""
    name = "fixpoint_digits_example"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _digits(seed: int) -> tuple[Examples, Examples]:
    """Training and test examples: four fifths and one, stratified."""
    digits = load_digits()
    parts: Any = train_test_split(
        digits.data / 16, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )
    train, test, train_labels, test_labels = (torch.tensor(part) for part in parts)
    return (train.float(), train_labels), (test.float(), test_labels)


def digit_batches(seed: int, size: int = 128) -> Iterator[Examples]:
    """Epoch after epoch in a new order."""
    (pixels, labels), _ = _digits(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(pixels), generator=generator).split(size):
            yield pixels[rows], labels[rows]


def sums(rows: int, generator: torch.Generator) -> Examples:
    """Pairs of numbers as tokens ``10 a + b`` for each place, lowest first, and the digits of their sums."""
    first, second = torch.randint(_BASE, (2, rows, _LENGTH), generator=generator)
    carry, digits = torch.zeros(rows, dtype=torch.int64), []
    for place in range(_LENGTH):
        total = first[:, place] + second[:, place] + carry
        digits.append(total % _BASE)
        carry = total // _BASE
    return _BASE * first + second, torch.stack(digits, dim=1)


def sum_batches(seed: int, size: int = 64) -> Iterator[Examples]:
    """New numbers in every batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sums(size, generator)


class Block(nn.Module):
    """``f(z, x)``: causal attention and a hidden layer, each added to x and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.mix = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.hidden = nn.Sequential(nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        rows, tokens, width = z.shape
        q, k, v = self.qkv(z).view(rows, tokens, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        inner = self.norms[0](x + self.mix(attention.transpose(1, 2).reshape(rows, tokens, width)))
        return self.norms[1](x + inner + self.hidden(inner))


class Adder(nn.Module):
    """Tokens to ``x``, to the fixed point of one block, to the digits of the sum."""

    def __init__(self, backward: fixpoint.Backward, solver: fixpoint.Solver) -> None:
        super().__init__()
        self.embed = nn.Embedding(_BASE**2, _WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(_LENGTH, _WIDTH))
        options = {"rtol": 1e-2, "max_evals": 16, "on_failure": "ignore"}
        self.layer = fixpoint.FixedPointLayer(Block(), solver=solver, backward=backward, **options)
        self.decode = nn.Linear(_WIDTH, _BASE)

    def forward(self, tokens: Tensor) -> tuple[Tensor, fixpoint.Solution]:
        solution = self.layer(self.embed(tokens) + self.position, return_solution=True)
        return self.decode(solution.value), solution


TASKS = (
    Task(
        name="digits",
        seconds=4.0,
        model=lambda backward, solver: digits_example().Classifier(backward, solver),
        batches=digit_batches,
        test=lambda seed: _digits(seed)[1],
        learning_rate=1e-2,
    ),
    Task(
        name="sums",
        seconds=12.0,
        model=Adder,
        batches=sum_batches,
        test=lambda seed: sums(1000, torch.Generator().manual_seed(10**6 + seed)),
        learning_rate=3e-3,
    ),
)
