"""What share of small faults in the loop and the solvers the tests find: mutmut on a seeded sample of its mutants.

``python -m benchmarks.mutation`` (``make mutation``) prints the score of each file and the mutants that survived;
``mutmut show NAME`` shows one. Modules and tests stand under ``[tool.mutmut]`` in pyproject.toml.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import defaultdict

KILLED = {"killed", "timeout", "segfault"}
AT_LEAST = 15  # mutants of each file, where it has so many
SMALLEST = "fixpoint.solvers.base.*"


def mutmut(*arguments: str, quiet: bool = False) -> str:
    output = subprocess.PIPE if quiet else None
    return subprocess.run([sys.executable, "-m", "mutmut", *arguments], stdout=output, text=True, check=True).stdout


def verdicts() -> dict[str, str]:
    """What is known of each mutant by its name."""
    lines = mutmut("results", "--all", "true", quiet=True).splitlines()
    return dict(line.strip().split(": ") for line in lines if ": " in line)


def module(name: str) -> str:
    return name.rsplit(".", 1)[0]


def draw(names: list[str], count: int, seed: int) -> list[str]:
    """``count`` of ``names`` at random, the first ``AT_LEAST`` of each module among them."""
    shuffled = random.Random(seed).sample(sorted(names), len(names))
    seen: defaultdict[str, int] = defaultdict(int)
    early: list[str] = []
    late: list[str] = []
    for name in shuffled:
        seen[module(name)] += 1
        (early if seen[module(name)] <= AT_LEAST else late).append(name)
    return (early + late)[: max(count, len(early))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="number of mutants; a large one takes all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mutmut("run", SMALLEST)  # writes all mutants
    chosen = draw(list(verdicts()), options.sample, options.seed)
    mutmut("run", *chosen)
    known = verdicts()
    for name in sorted({module(name) for name in chosen}):
        ours = [known[mutant] for mutant in chosen if module(mutant) == name]
        print(f"{name}: {sum(verdict in KILLED for verdict in ours)} of {len(ours)} killed")
    alive = sorted(mutant for mutant in chosen if known[mutant] not in KILLED)
    killed = len(chosen) - len(alive)
    print(
        f"{killed} of {len(chosen)} killed ({killed / len(chosen):.1%}), drawn from {len(known)}, seed {options.seed}"
    )
    print("\n".join(f"{known[mutant]}: {mutant}" for mutant in alive))


if __name__ == "__main__":
    main()
