"""All entries of both papers by name."""

from __future__ import annotations

from collections.abc import Sequence

from fixpoint_diffusion.experiments.experiment import Experiment
from fixpoint_diffusion.experiments.names import NAMES, names_meant
from fixpoint_diffusion.experiments.papers.deq_ddim import convergence, inversion, latents, pictures, quality
from fixpoint_diffusion.experiments.papers.fpdm import memory, reuse, trained
from fixpoint_diffusion.experiments.papers.fpdm import sampling as fpdm_sampling

_MODULES = (convergence, inversion, latents, pictures, quality, fpdm_sampling, reuse, memory, trained)


# In the order of the names, which the command knows without importing this.
EXPERIMENTS: dict[str, Experiment] = {
    entry.name: entry
    for entry in sorted((entry for module in _MODULES for entry in module.ENTRIES), key=lambda e: NAMES.index(e.name))
}


def experiments_named(names: Sequence[str]) -> list[Experiment]:
    """The entries of these names, each once; ``"deq-ddim"`` or ``"fpdm"`` means all of one paper.

    Raises:
        ValueError: for a name that nobody has.

    >>> [each.name for each in experiments_named(["fpdm/memory"])]
    ['fpdm/memory']
    """
    return [EXPERIMENTS[name] for name in names_meant(names)]
