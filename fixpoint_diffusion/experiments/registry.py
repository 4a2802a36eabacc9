"""All entries of both papers by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fixpoint_diffusion.experiments.experiment import Experiment
from fixpoint_diffusion.experiments.papers.deq_ddim import convergence, inversion, latents, pictures, quality
from fixpoint_diffusion.experiments.papers.fpdm import memory, reuse, trained
from fixpoint_diffusion.experiments.papers.fpdm import sampling as fpdm_sampling

_MODULES = (convergence, inversion, latents, pictures, quality, fpdm_sampling, reuse, memory, trained)


def _order(experiment: Experiment) -> tuple[str, str, int]:
    paper, _, what = experiment.name.partition("/")
    kind, _, number = what.partition("-")
    return paper, kind, int("".join(filter(str.isdigit, number)) or 0)


# Tables after figures, as the alphabet has it, and each by its number.
EXPERIMENTS: dict[str, Experiment] = {
    entry.name: entry for entry in sorted((entry for module in _MODULES for entry in module.ENTRIES), key=_order)
}


def experiments_named(names: Sequence[str]) -> list[Experiment]:
    """The entries of these names, each once; ``"deq-ddim"`` or ``"fpdm"`` means all of one paper.

    Raises:
        ValueError: for a name that nobody has.

    >>> experiments_named(["fpdm/memry"])
    Traceback (most recent call last):
    ...
    ValueError: no experiment 'fpdm/memry'; did you mean 'fpdm/memory'?
    """
    found: dict[str, Experiment] = {}
    for name in names:
        chosen = [each for each in EXPERIMENTS if each == name or each.startswith(f"{name}/")]
        if not chosen:
            close = difflib.get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "fixpoint-diffusion experiments list shows all"
            raise ValueError(f"no experiment {name!r}; {hint}")
        found |= {each: EXPERIMENTS[each] for each in chosen}
    return list(found.values())
