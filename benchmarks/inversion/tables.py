"""The table of runs that several questions print."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.inversion.cells import Cell, pair, spread
from benchmarks.inversion.methods import truthful

WRONG = 0.1  # error of the noise, as an RMS, from which it is another noise


def run_table(runs: Mapping[str, Cell]) -> list[str]:
    """A line for each run, by the name it is to have; errors of the noise where it is known."""
    latents = any("latents" in cell for cell in runs.values())
    width = max(map(len, runs))
    extra = f"{'noise':>17}{'wrong':>8}" if latents else ""
    lines = [f"{'':{width}}{'digits':>8}{'error':>17}{extra}{'rounds':>8}{'rows/digit':>12}{'s':>8}{'claims':>8}"]
    for name, cell in runs.items():
        extra = f"{pair(spread(cell['latents'])):>17}{_share(wrong_roots(cell)):>8}" if latents else ""
        lines.append(
            f"{name:{width}}{len(cell['errors']):>8}{pair(spread(cell['errors'])):>17}{extra}{cell['rounds']:>8}"
            f"{cell['rows'] / len(cell['errors']):>12.0f}{cell['seconds']:>8.1f}"
            f"{_share(truthful(cell, cell['tolerance'])):>8}"
        )
    return lines


def wrong_roots(cell: Cell) -> float:
    """Share of samples whose image comes back within the tolerance from a noise that is not the one it was made of."""
    found = [
        error is not None and error <= cell["tolerance"] and (latent is None or latent > WRONG)
        for error, latent in zip(cell["errors"], cell["latents"], strict=True)
    ]
    return sum(found) / len(found)


def _share(share: float) -> str:
    return f"{100 * share:.0f}%"
