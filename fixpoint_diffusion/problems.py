"""The diffusion problems that ``fixpoint bench`` knows by name, on the embedded models."""

from __future__ import annotations

from fixpoint import Problem, RegisteredProblem, bench


def _ddim_chain(*, steps: int = 100, samples: int = 4, seed: int = 0) -> Problem:
    from fixpoint_diffusion.experiments.chains import embedded_chain

    return embedded_chain(steps=steps, samples=samples, seed=seed)


def _sddim_chain(*, steps: int = 100, samples: int = 4, eta: float = 1.0, seed: int = 0) -> Problem:
    from fixpoint_diffusion.experiments.chains import embedded_chain

    return embedded_chain(steps=steps, samples=samples, seed=seed, eta=eta)


def _fpdm_layer(*, timestep: int = 500, samples: int = 16, seed: int = 0) -> Problem:
    from fixpoint_diffusion.experiments.fpdm import embedded_layer

    return embedded_layer(timestep=timestep, samples=samples, seed=seed)


# The studies load models and draw pictures: they are imported when they run, not when they are listed.
def _ddim_study(quick: bool) -> bench.Study:
    from fixpoint_diffusion.experiments.chains import ddim_study

    return ddim_study(quick)


def _sddim_study(quick: bool) -> bench.Study:
    from fixpoint_diffusion.experiments.chains import sddim_study

    return sddim_study(quick)


def _fpdm_study(quick: bool) -> bench.Study:
    from fixpoint_diffusion.experiments.fpdm import fpdm_study

    return fpdm_study(quick)


ddim_chain = RegisteredProblem(
    _ddim_chain, "all latents of DDIM sampling with the embedded U-Net, as one fixed point (DEQ-DDIM)", _ddim_study
)
sddim_chain = RegisteredProblem(
    _sddim_chain, "the same with fresh noise in every step, eta = 1 (DEQ-sDDIM)", _sddim_study
)
fpdm_layer = RegisteredProblem(
    _fpdm_layer, "the implicit layer of the embedded fixed point diffusion model at one timestep (FPDM)", _fpdm_study
)
