"""Compare our sweep with the other parallel samplers; say which targets are met.

    python -m benchmarks.chains [--only PART] [--out benchmarks/results] [--quick] [--again METHOD]

Parts are ``rounds``, ``speed``, ``memory``, ``quality``, ``honesty``, ``mixtures``, ``modern``, ``heun``, ``noise`` and
``worth``. Each writes its own ``chains-PART.json`` and ``chains-PART.txt``. With ``--again``, the part ``rounds``
measures this method alone, and takes the others from the results that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chains import heun, honesty, memory, mixtures, modern, noise, quality, rounds, speed, worth
from benchmarks.chains.cases import FULL, QUICK
from benchmarks.chains.methods import BY_NAME
from benchmarks.solvers.report import targets_text
from benchmarks.solvers.standings import Target
from fixpoint.bench import provenance

Part = tuple[str, dict[str, object], list[Target]]


def run_rounds(quick: bool, earlier: dict[str, Any] | None = None, again: Sequence[str] = ()) -> Part:
    """Error against rounds and rows."""
    outcomes, dropped = rounds.measure(QUICK if quick else FULL, earlier, again)
    text = "\n\n".join([rounds.table(outcomes), rounds.dropped_text(dropped)])
    return text, rounds.as_json(outcomes, dropped), rounds.targets(outcomes)


def run_speed(quick: bool) -> Part:
    """Seconds and bytes."""
    steps = 6 if quick else 1000
    times = speed.seconds(steps=steps, counts=(1, 2) if quick else (1, 16), repeats=1 if quick else 2)
    peaks = speed.memory(steps=steps)
    document = {"steps": steps, "seconds": times, "peak_mib": peaks}
    return speed.text(times, peaks, steps), document, [] if quick else speed.targets(times)


def run_memory(quick: bool) -> Part:
    """Trajectories that are held."""
    steps = memory.QUICK_STEPS if quick else memory.STEPS
    found = memory.measure(steps)
    return memory.table(found, steps), memory.as_json(found, steps), [] if quick else memory.targets(found)


def run_quality(quick: bool) -> Part:
    """Frechet distance and seconds."""
    images = 8 if quick else 2000
    steps, others = ((4,), (3,)) if quick else ((25, 50, 100, 1000), (15, 20, 25))
    chosen = quality.samplers(ddim_steps=steps, other_steps=others)
    # Two thousand images of a thousand steps are made once, for ours makes the same.
    results = quality.measure(chosen, images=images, alone_only={"DDIM T=1000, ours"})
    return quality.text(results, images), quality.as_json(results, images), []


def run_honesty(quick: bool) -> Part:
    """How often a chain that is said to have converged misses the tolerance."""
    tallies = honesty.measure(range(1 if quick else 36))
    return honesty.table(tallies), honesty.as_json(tallies), honesty.targets(tallies)


def run_mixtures(quick: bool) -> Part:
    """How often a sample that is said to have converged is not the sequential one, clipped samplers among them."""
    tallies = mixtures.measure(range(3 if quick else 210))
    tallies |= mixtures.measure(range(1 if quick else 105), mixtures.LONG_SOLVERS, mixtures.LONG)
    return mixtures.table(tallies), mixtures.as_json(tallies), mixtures.targets(tallies)


def run_modern(quick: bool) -> Part:
    """Rounds and rows of today's samplers: flow matching, DPM-Solver++, UniPC and others."""
    found = modern.measure((10,), samples=1) if quick else modern.measure((28, 50), samples=8)
    return modern.table(found), modern.as_json(found), [] if quick else modern.targets(found)


def run_heun(quick: bool) -> Part:
    """Both calls of a step of Heun's method as two steps of the chain, or as one."""
    found = heun.measure((10,), samples=1) if quick else heun.measure((28, 50), samples=8)
    return modern.table(found, heun.HOW_TO_READ), modern.as_json(found), []


def run_noise(quick: bool) -> Part:
    """Rounds, rows and quality where a latent may be off by a share of its step's noise."""
    found = noise.measure(steps=30, samples=1, images=8) if quick else noise.measure(steps=1000, samples=16, images=128)
    return noise.table(found), noise.as_json(found), [] if quick else noise.targets(found)


def run_worth(quick: bool) -> Part:
    """Frechet distance and seconds of the same sampler in sequence and in parallel."""
    images = 50 if quick else 2000
    found = worth.measure(worth.QUICK if quick else worth.CASES, images=images)
    return worth.table(found, images), worth.as_json(found, images), []


PARTS: dict[str, Callable[[bool], Part]] = {
    "rounds": run_rounds,
    "speed": run_speed,
    "memory": run_memory,
    "quality": run_quality,
    "honesty": run_honesty,
    "mixtures": run_mixtures,
    "modern": run_modern,
    "heun": run_heun,
    "noise": run_noise,
    "worth": run_worth,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="this part; may be given again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="short chains, few samples: a look in passing")
    parser.add_argument("--again", action="append", choices=list(BY_NAME), help="a method; may be given again")
    options = parser.parse_args(arguments)
    if options.again and options.only != ["rounds"]:
        parser.error("--again is for --only rounds")
    earlier = json.loads((options.out / "chains-rounds.json").read_text()) if options.again else None
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or PARTS:
        part = partial(run_rounds, earlier=earlier, again=options.again) if earlier else PARTS[name]
        text, document, targets = part(options.quick)
        text = "\n\n".join(filter(None, [text, targets_text(targets)]))
        print(text, "", sep="\n", flush=True)
        (options.out / f"chains-{name}.txt").write_text(text + "\n")
        about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
        if earlier:
            about["of_the_others"] = {key: earlier[key] for key in about}
        aims = [{"name": aim.name, "met": aim.met, "measured": aim.measured} for aim in targets]
        (options.out / f"chains-{name}.json").write_text(json.dumps({**about, "targets": aims, **document}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
