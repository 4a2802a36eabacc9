"""Rounds and rows to an error of x_0: the table, the targets, the plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.chains.cases import Setting
from benchmarks.chains.curves import ERRORS, Outcome, noise_dropped, run, spread
from benchmarks.chains.methods import BY_NAME, FULL_WINDOW, RTOL
from benchmarks.solvers.standings import Target

# Rounds to 1e-3 with our own stopping rule, for eta = 0, 0.5, 1.
_ROUNDS = {50: (9, 9, 10), 200: (9, 11, 13), 1000: (10, 13, 15)}
# Rows a step with a window of 100, T = 1000.
_ROWS = {0.0: 2.2, 1.0: 3.0}
_TICKS = (1, 2, 5, 10, 20, 50)
HOW_TO_READ = """\
Error: ||x_0 - sequential|| / ||sequential|| with the same noise.
rounds to: batched denoiser calls until the error is at most that for good, median/worst sample; -: not in 60 rounds.
rows/T, s: denoiser rows a step and seconds to 1e-3, median sample.
end: rounds and worst error where the runs ended; ours by its own rule at rtol 1e-3, a peer by its own or, once its
error is below 5e-4, from outside.
"""


def measure(settings: Sequence[Setting]) -> tuple[list[Outcome], dict[str, float]]:
    """All outcomes, and the error of ParaDiGMS without its noise for every stochastic setting."""
    outcomes, dropped = [], {}
    with tqdm(settings, unit="chain", mininterval=1) as bar:
        for setting in bar:
            bar.set_postfix_str(setting.name)
            outcomes += run(setting)
            if setting.eta > 0 and setting.denoiser == "unet" and setting.steps <= 100:
                dropped[setting.name] = noise_dropped(setting)
    return outcomes, dropped


def table(outcomes: Sequence[Outcome]) -> str:
    """One block a setting, one line a method."""
    width = max(len(outcome.method) for outcome in outcomes)
    head = f"{'':{width}} samples {'rounds to 1e-1':>15} {'1e-2':>7} {'1e-3':>7} {'rows/T':>7} {'s':>7}   end"
    lines = [HOW_TO_READ]
    for setting, group in groupby(outcomes, key=lambda outcome: outcome.setting):
        lines += ["", setting.name, head]
        for outcome in group:
            rounds = [_pair(outcome.spread("rounds", error)) for error in ERRORS]
            rows, seconds = (outcome.spread(what, RTOL)[0] for what in ("rows", "seconds"))
            end = f"{_pair(outcome.at_end('rounds'))}, {outcome.at_end('errors')[1]:.1e}"
            lines.append(
                f"{outcome.method:{width}} {len(outcome.curves):>7} {rounds[0]:>15} {rounds[1]:>7} {rounds[2]:>7} "
                f"{_figure(rows / setting.steps, '.1f'):>7} {_figure(seconds, '.2f'):>7}   {end}"
            )
    return "\n".join(lines)


def targets(outcomes: Sequence[Outcome]) -> list[Target]:
    """What is aimed at on the embedded U-Net, where it was measured."""
    found = {(o.setting.steps, o.setting.eta, o.method): o for o in outcomes if o.setting.denoiser == "unet"}
    aims = []
    for (steps, eta, method), outcome in found.items():
        if method == FULL_WINDOW and steps in _ROUNDS:
            limit = _ROUNDS[steps][(0.0, 0.5, 1.0).index(eta)]
            rounds, error = outcome.at_end("rounds"), outcome.at_end("errors")[1]
            aims.append(
                Target(
                    f"T={steps}, eta={eta:g}: at most {limit} rounds to 1e-3 by its own rule",
                    rounds[0] <= limit,
                    f"median {rounds[0]:g}, worst {rounds[1]:g}, worst error {error:.1e}",
                )
            )
        if method == "ours, window 100" and steps == 1000 and eta in _ROWS:
            share = outcome.at_end("rows")[0] / steps
            aims.append(
                Target(
                    f"T={steps}, eta={eta:g}, window 100: at most {_ROWS[eta]:g} T rows",
                    share <= _ROWS[eta],
                    f"median {share:.2f} T, worst {outcome.at_end('rows')[1] / steps:.2f} T",
                )
            )
        if method == FULL_WINDOW and eta >= 0.5 and steps >= 25 and (peer := _best_triangular(found, steps, eta)):
            mine = spread([curve.at("rounds", RTOL) for curve in outcome.curves[: len(peer.curves)]])[0]
            theirs = peer.spread("rounds", RTOL)[0]
            aims.append(
                Target(
                    f"T={steps}, eta={eta:g}: at most half of triangular Anderson's rounds",
                    mine <= theirs / 2,
                    f"{mine:g} against {_figure(theirs, 'g')} to an error of 1e-3",
                )
            )
    every = [outcome for outcome in outcomes if BY_NAME[outcome.method].ours]
    worst = max(outcome.at_end("errors")[1] for outcome in every)
    ran = sum(len(outcome.curves) for outcome in every)
    aims.append(Target("never worse than twice 1e-3", worst <= 2 * RTOL, f"worst error {worst:.1e} of {ran} runs"))
    return aims


def _best_triangular(found: dict[tuple[int, float, str], Outcome], steps: int, eta: float) -> Outcome | None:
    peers = [o for (t, e, method), o in found.items() if (t, e) == (steps, eta) and method.startswith("ParaTAA")]
    return min(peers, key=lambda outcome: outcome.spread("rounds", RTOL)[0], default=None)


def plot(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Error of x_0 against rounds and against rows, first sample, U-Net: two pictures with a panel for each chain."""
    shown = [o for o in outcomes if o.setting.denoiser == "unet" and o.setting.eta in (0.0, 1.0)]
    sizes = sorted({o.setting.steps for o in shown})
    sizes = [size for size in sizes if size in (25, 100, 1000)] or sizes
    names = list(dict.fromkeys(outcome.method for outcome in shown))
    for what, label, scale in (
        ("rounds", "rounds", lambda setting: 1),
        ("rows", "denoiser rows, as a multiple of T", lambda setting: setting.steps),
    ):
        figure = Figure(figsize=(4 * len(sizes), 6.4), layout="constrained")
        panels = figure.subplots(2, len(sizes), squeeze=False, sharey=True)
        for row, eta in enumerate((0.0, 1.0)):
            for axes, size in zip(panels[row], sizes, strict=True):
                chosen = [o for o in shown if (o.setting.steps, o.setting.eta) == (size, eta)]
                _draw(axes, chosen, names, what, scale)
                axes.set(title=f"T={size}, eta={eta:g}", yscale="log", ylim=(1e-5, 10), xscale="log", xlim=(1, 60))
                axes.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
                axes.minorticks_off()
                axes.axhline(RTOL, color="grey", linewidth=0.8)
                axes.grid(alpha=0.3)
        for axes in panels[1]:
            axes.set_xlabel(label)
        for axes in panels[:, 0]:
            axes.set_ylabel("error of x_0")
        lines: dict[str, object] = {}
        for axes in panels.flat:
            lines |= {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=8)
        figure.savefig(folder / f"chains-{what}.png", dpi=150)


def _draw(
    axes: object, outcomes: Iterable[Outcome], names: Sequence[str], what: str, scale: Callable[[Setting], float]
) -> None:
    for outcome in outcomes:
        curve, ours = outcome.curves[0], BY_NAME[outcome.method].ours
        axes.plot(  # type: ignore[attr-defined]
            np.array(getattr(curve, what)) / scale(outcome.setting),
            curve.errors,
            color=colormaps["tab20"](names.index(outcome.method)),
            linestyle="-" if ours else "--",
            linewidth=2.2 if ours else 1.1,
            label=outcome.method,
        )


def as_json(outcomes: Sequence[Outcome], dropped: dict[str, float]) -> dict[str, object]:
    """Every curve."""
    return {
        "outcomes": [
            {
                "denoiser": o.setting.denoiser,
                "steps": o.setting.steps,
                "eta": o.setting.eta,
                "method": o.method,
                "curves": [
                    {
                        "errors": [float(f"{error:.3g}") if math.isfinite(error) else None for error in curve.errors],
                        "rounds": curve.rounds,
                        "rows": curve.rows,
                        "seconds": [round(seconds, 4) for seconds in curve.seconds],
                    }
                    for curve in o.curves
                ],
            }
            for o in outcomes
        ],
        "paradigms_without_noise": dropped,
    }


def dropped_text(dropped: dict[str, float]) -> str:
    """What becomes of ParaDiGMS where the noise is dropped."""
    lines = [f"  {name}: error {error:.2f}" for name, error in dropped.items()]
    return "\n".join(["ParaDiGMS as diffusers runs it with DDIM and eta > 0, its noise dropped:", *lines])


def _pair(figures: tuple[float, float]) -> str:
    return "/".join(_figure(figure, "g") for figure in figures)


def _figure(figure: float, form: str) -> str:
    return format(figure, form) if math.isfinite(figure) else "-"
