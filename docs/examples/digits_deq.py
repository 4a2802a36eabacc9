"""A deep-equilibrium network on scikit-learn's digits, trained with each backward rule.

Run it as ``python docs/examples/digits_deq.py``; nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fixpoint

WIDTH = 64
RULES: Mapping[str, fixpoint.Backward] = {
    "IFT": fixpoint.IFT(rtol=1e-3),
    "Phantom(steps=4)": fixpoint.Phantom(steps=4),
    "JFB": fixpoint.JFB(),
    "StochasticJFB(6, 6)": fixpoint.StochasticJFB(max_no_grad=6, max_grad=6),
    "Unroll": fixpoint.Unroll(),
}


class Cell(nn.Module):
    """``f(z, x, W) = tanh(z W^T + x)``, counting how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(z @ weight.T + x)


class Classifier(nn.Module):
    """Pixels to ``x``, to ``z* = f(z*, x, W)``, to ten logits; ``|W| <= 0.9``, so that z* exists and is unique."""

    def __init__(self, backward: fixpoint.Backward, solver: fixpoint.Solver | None = None) -> None:
        super().__init__()
        self.encode = nn.Linear(64, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        solver = solver or fixpoint.Anderson()
        self.layer = fixpoint.FixedPointLayer(Cell(), solver=solver, backward=backward, rtol=1e-3)
        self.decode = nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, fixpoint.Solution]:
        norm = torch.linalg.matrix_norm(self.weight, ord=2)
        solution = self.layer(self.encode(pixels), 0.9 * self.weight / norm.clamp(min=0.9), return_solution=True)
        return self.decode(solution.value), solution


@dataclass(frozen=True)
class Outcome:
    """What one training run gave: calls and adjoint products per training step, processor seconds in all."""

    accuracy: float
    calls: float
    adjoint_products: float
    seconds: float


def train(backward: fixpoint.Backward, *, seed: int, epochs: int = 10) -> Outcome:
    """Train on 80 % of the digits, and test on the rest."""
    torch.manual_seed(seed)
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train_rows, test_rows = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    model = Classifier(backward)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = adjoint_products = 0
    start = time.process_time()
    for _ in range(epochs):
        for rows in torch.tensor(train_rows)[torch.randperm(len(train_rows))].split(128):
            logits, solution = model(pixels[rows])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            steps += 1
            adjoint_products += solution.adjoint.nfev if solution.adjoint else 0
    seconds = time.process_time() - start
    calls = model.layer.f.calls
    with torch.no_grad():
        logits, _ = model(pixels[test_rows])
    accuracy = float((logits.argmax(dim=1) == labels[test_rows]).float().mean())
    return Outcome(accuracy, calls / steps, adjoint_products / steps, seconds)


def main() -> None:
    """Print a table: every rule, three seeds."""
    torch.set_num_threads(1)
    print(
        f"{'backward rule':20}  {'test accuracy, seeds 0 1 2':>26}  {'calls of f':>10}  {'adjoint':>7}  {'seconds':>7}"
    )
    for name, rule in RULES.items():
        runs = [train(rule, seed=seed) for seed in range(3)]
        accuracies = "  ".join(f"{run.accuracy:.3f}" for run in runs)
        calls, products, seconds = (
            sum(getattr(run, key) for run in runs) / len(runs) for key in ("calls", "adjoint_products", "seconds")
        )
        print(f"{name:20}  {accuracies:>26}  {calls:10.1f}  {products:7.1f}  {seconds:7.1f}")


if __name__ == "__main__":
    main()
