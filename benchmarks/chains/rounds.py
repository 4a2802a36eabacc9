"""Rounds and rows to an error of x_0: the table and the targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tqdm import tqdm

from benchmarks.chains.cases import ETAS, Setting
from benchmarks.chains.curves import ERRORS, Curve, Outcome, noise_dropped, run, spread
from benchmarks.chains.methods import BY_NAME, FULL_WINDOW, PROBED, RTOL
from benchmarks.solvers.standings import Target

# Rounds to 1e-3 with our own stopping rule, for eta = 0, 0.5, 1: of the median sample, and of the worst one.
_ROUNDS = {50: (9, 9, 10), 200: (9, 11, 13), 1000: (8, 10, 12)}
_WORST_ROUNDS = {1000: (10, 12, 15)}
# Rows a step with a window of 100, T = 1000.
_ROWS = {0.0: 2.2, 1.0: 3.0}
_SPENT = ("rounds", "rows", "seconds")
HOW_TO_READ = """\
Error: ||x_0 - sequential|| / ||sequential|| with the same noise.
rounds to: batched denoiser calls until the error is at most that for good, median/worst sample; -: not in 60 rounds.
rows/T, s: denoiser rows a step and seconds to 1e-3, median sample.
end: rounds and worst error where the runs ended; ours by its own rule at rtol 1e-3, a peer by its own or, once its
error is below 5e-4, from outside.
"""


def measure(
    settings: Sequence[Setting], earlier: dict[str, Any] | None = None, again: Sequence[str] = ()
) -> tuple[list[Outcome], dict[str, float]]:
    """All outcomes, and the error of ParaDiGMS without its noise for every stochastic setting.

    With an ``earlier`` document of results, only the methods of the names ``again`` are measured.
    """
    if earlier is not None:
        return _measured_again(settings, earlier, again)
    outcomes, dropped = [], {}
    with tqdm(settings, unit="chain", mininterval=1) as bar:
        for setting in bar:
            bar.set_postfix_str(setting.name)
            outcomes += run(setting)
            if setting.eta > 0 and setting.denoiser == "unet" and setting.steps <= 100:
                dropped[setting.name] = noise_dropped(setting)
    return outcomes, dropped


def _measured_again(
    settings: Sequence[Setting], earlier: dict[str, Any], again: Sequence[str]
) -> tuple[list[Outcome], dict[str, float]]:
    found = {
        (each["denoiser"], each["steps"], each["eta"], each["method"]): [
            Curve(errors=[math.inf if e is None else e for e in curve["errors"]], **{k: curve[k] for k in _SPENT})
            for curve in each["curves"]
        ]
        for each in earlier["outcomes"]
    }
    methods, outcomes = [BY_NAME[name] for name in again], []
    for setting in tqdm(settings, unit="chain", mininterval=1):
        fresh = {outcome.method: outcome for outcome in run(setting, methods)}
        for name in BY_NAME:
            curves = found.get((setting.denoiser, setting.steps, setting.eta, name))
            if name in fresh:
                outcomes.append(fresh[name])
            elif curves is not None and name not in again:
                outcomes.append(Outcome(setting, name, curves))
    return outcomes, earlier["paradigms_without_noise"]


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
        if method in (FULL_WINDOW, PROBED) and steps in _ROUNDS:
            limit = _ROUNDS[steps][ETAS.index(eta)]
            worst = _WORST_ROUNDS[steps][ETAS.index(eta)] if steps in _WORST_ROUNDS else math.inf
            also = f", {worst} in the worst case" if worst < math.inf else ""
            rounds, error = outcome.at_end("rounds"), outcome.at_end("errors")[1]
            aims.append(
                Target(
                    f"T={steps}, eta={eta:g}, {method}: at most {limit} rounds to 1e-3 by its own rule{also}",
                    rounds[0] <= limit and rounds[1] <= worst,
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
