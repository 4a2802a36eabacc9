"""The gradients of DEQ-DDIM's inversion: what each costs, where it points, and whether large steps upset it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.inversion.cases import Setting, held_out
from benchmarks.inversion.cells import Cell, Cells
from benchmarks.inversion.descents import descent
from benchmarks.solvers.standings import Target
from fixpoint import IFT, JFB, Phantom
from fixpoint.memory import LiveBytes
from fixpoint_diffusion.inversion import Gradient, LinearTerm, OptimisedInverse
from fixpoint_diffusion.processes import initial_noise

HOW_TO_READ = """\
Gradients of |x_0 - image|^2 by x_T, held-out digits, embedded U-Net.
cosine, length: beside the gradient by backpropagation through the ordinary sampler, mean over the digits; at noise, and
near the image, where ten epochs with the linear term have led from there.
rounds, rows: batched denoiser calls and rows a digit, of solve and gradient; products: batched products with the
denoiser's Jacobian, each about as dear as two calls. s: seconds of the processor. MiB: the most that tensors of the
epoch held at once.
"""
HOW_TO_READ_RATES = """\
The question of the paper's Figure 8: Adam at learning rates up to a hundred times its 0.01, {digits} digits, T={steps},
{epochs} epochs; losses are means over the digits. rose: share of the epochs in which it rose.
"""
GRADIENTS: dict[str, Gradient] = {
    "sequential": "sequential",
    "exact, IFT(rtol=1e-6)": IFT(rtol=1e-6, on_failure="best"),
    "exact, IFT(rtol=1e-3)": IFT(rtol=1e-3, on_failure="best"),
    "one step, JFB()": JFB(),
    "phantom, k=5, tau=0.5": Phantom(steps=5, damping=0.5),
    "phantom, k=1, tau=0.1": Phantom(steps=1, damping=0.1),
    "linear term": LinearTerm(damping=1.0),
}
_STEPS, _DIGITS = (10, 50), 4
_RATES, _RATE_STEPS, _EPOCHS = (0.01, 0.1, 1.0), 10, 20
_RATED = ("sequential", "exact, IFT(rtol=1e-3)", "one step, JFB()")


def measure(cells: Cells, quick: bool) -> Cell:
    """Every gradient at two places, and three of them at several learning rates."""
    found: Cell = {}
    for steps in (4,) if quick else _STEPS:
        for name in list(GRADIENTS)[:2] if quick else GRADIENTS:
            full = f"T={steps}, {name}"
            found[full] = {"steps": steps, **cells(full, partial(_compare, name, steps, 1 if quick else _DIGITS))}
    steps, epochs, digits = (4, 3, 1) if quick else (_RATE_STEPS, _EPOCHS, _DIGITS)
    for name in _RATED:
        for rate in _RATES[-1:] if quick else _RATES:
            full = f"rate {rate:g}, {name}"
            method = OptimisedInverse(gradient=GRADIENTS[name])
            run = partial(descent, method, Setting(steps), digits, epochs=epochs, rate=rate)
            found[full] = {"steps": steps, "rate": rate, **cells(full, run)}
    return found


def _compare(name: str, steps: int, count: int) -> Cell:
    """Cosine and length beside backpropagation at both places, and what it takes at the first."""
    cell: Cell = {}
    for place, (x_T, exact) in _places(steps, count).items():
        found, costs = _gradient(name, steps, x_T)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(1), exact.flatten(1))
        length = found.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        cell[place] = {"cosine": float(cosine.mean()), "length": float(length.mean())}
        cell.setdefault("costs", costs)
    with LiveBytes() as live:
        _gradient(name, steps, _places(steps, count)["noise"][0])
    return cell | {"bytes": live.peak, "digits": count}


@cache
def _places(steps: int, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Noise, and an x_T that is near to the right one, each with the gradient by backpropagation."""
    noise = initial_noise(0, range(count), held_out(1)[0].shape[1:])
    found = descent(OptimisedInverse(gradient=LinearTerm()), Setting(steps), count, epochs=10, rate=0.2, keep=True)
    near = torch.tensor(found["x_T"])
    return {place: (x_T, _gradient("sequential", steps, x_T)[0]) for place, x_T in (("noise", noise), ("near", near))}


def _gradient(name: str, steps: int, x_T: Tensor) -> tuple[Tensor, Cell]:
    """One epoch of gradient descent at rate 1: where it was, minus where it went, is the gradient."""
    plain = partial(torch.optim.SGD, lr=1.0)
    method = OptimisedInverse(gradient=GRADIENTS[name], start=x_T, rtol=1e-5, optimiser=plain)
    found = descent(method, Setting(steps), len(x_T), epochs=1, rate=None, keep=True)
    costs = {what: found[what] for what in ("rounds", "rows", "products", "product_rows", "seconds")}
    return x_T - torch.tensor(found["x_T"]), costs


def text(document: Cell) -> str:
    """A block for each T, and one for the learning rates."""
    lines = [HOW_TO_READ]
    heads = f"{'cosine':>8}{'length':>8}{'near':>8}{'length':>8}{'rounds':>8}{'rows':>8}{'products':>10}{'rows':>8}"
    for steps in sorted({cell["steps"] for cell in document.values() if "noise" in cell}):
        lines.append(f"{f'T={steps}':24}{heads}{'s':>8}{'MiB':>8}")
        for name, cell in document.items():
            if "noise" not in cell or cell["steps"] != steps:
                continue
            digits, costs = cell["digits"], cell["costs"]
            places = "".join(f"{cell[p]['cosine']:>8.3f}{cell[p]['length']:>8.2g}" for p in ("noise", "near"))
            lines.append(
                f"{name.split(', ', 1)[1]:24}{places}{costs['rounds']:>8}{costs['rows'] / digits:>8.0f}"
                f"{costs['products']:>10}{costs['product_rows'] / digits:>8.0f}{costs['seconds']:>8.2f}"
                f"{cell['bytes'] / 2**20:>8.1f}"
            )
        lines.append("")
    runs = _rated(document)
    any_run = next(iter(runs.values()))
    sizes = {"digits": any_run["digits"], "steps": any_run["steps"], "epochs": len(any_run["losses"])}
    lines += [HOW_TO_READ_RATES.format(**sizes), f"{'':36}{'first':>10}{'least':>10}{'last':>10}{'rose':>8}"]
    for name, cell in runs.items():
        losses = _finite(cell["losses"])
        figures = "".join(f"{each:>10.3g}" for each in (losses[0], min(losses), losses[-1]))
        lines.append(f"{name:36}{figures}{100 * _rose(losses):>7.0f}%")
    return "\n".join(lines)


def _rated(document: Cell) -> Mapping[str, Cell]:
    return {name: cell for name, cell in document.items() if "rate" in cell}


def _finite(losses: list[float | None]) -> list[float]:
    return [float("inf") if loss is None else loss for loss in losses]


def _rose(losses: list[float]) -> float:
    pairs = list(pairwise(losses))
    return sum(not after <= before for before, after in pairs) / max(len(pairs), 1)


def targets(document: Cell) -> list[Target]:
    """Exact gradients are exact, and as stable as backpropagation."""
    exact = {name: cell for name, cell in document.items() if "IFT(rtol=1e-6)" in name and "noise" in cell}
    least = min(cell[place]["cosine"] for cell in exact.values() for place in ("noise", "near"))
    aims = [Target("IFT(rtol=1e-6) points where backpropagation does, cosine 0.9999", least >= 0.9999, f"{least:.5f}")]
    runs, apart = _rated(document), []
    for name, cell in runs.items():
        if "IFT" in name:
            mine = _finite(cell["losses"])
            theirs = _finite(runs[f"rate {cell['rate']:g}, sequential"]["losses"])
            apart.append((mine[-1] / theirs[-1], cell["rate"]))
    worst = max(apart)
    return [
        *aims,
        Target(
            "Fig. 8: with exact gradients, no learning rate ends above twice backpropagation's loss",
            worst[0] <= 2,
            f"at most {worst[0]:.2f} times, at a rate of {worst[1]:g}",
        ),
    ]


def plot(document: Cell, folder: Path) -> None:
    """Loss against epochs for each learning rate."""
    runs = _rated(document)
    rates = sorted({cell["rate"] for cell in runs.values()})
    figure = Figure(figsize=(3.4 * len(rates) + 2, 3.4), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False, sharey=True)[0], rates, strict=True):
        for index, name in enumerate(_RATED):
            style = "-" if "IFT" not in name else "--"
            axes.plot(_finite(runs[f"rate {rate:g}, {name}"]["losses"]), style, color=f"C{index}", label=name)
        axes.set(title=f"learning rate {rate:g}", yscale="log", xlabel="epoch")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss, mean of the digits")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(folder / "inversion-gradients.png", dpi=130)
