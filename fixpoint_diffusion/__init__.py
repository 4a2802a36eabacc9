"""Diffusion sampling and denoisers as fixed point problems, for the solvers of ``fixpoint``.

A name is imported when it is first used: PyTorch takes seconds, and the command line refuses a typo without it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fixpoint_diffusion.chains import DDIMChain, SamplingChain, StochasticDDIMChain
    from fixpoint_diffusion.denoisers import load_denoiser
    from fixpoint_diffusion.denoisers.embedded import embedded
    from fixpoint_diffusion.inversion import (
        DrawnInverse,
        ExplicitInverse,
        Inverse,
        OptimisedInverse,
        ParallelInverse,
        StepwiseInverse,
        deq_ddim_inversion_settings,
        invert,
    )
    from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig
    from fixpoint_diffusion.processes import GaussianPrior, NoiseSchedule, Transitions, initial_noise, step_noise
    from fixpoint_diffusion.sampling import SamplingResult, deq_ddim_settings, sample, sample_fpdm

__all__ = [
    "FPDM",
    "DDIMChain",
    "DiT",
    "DiTConfig",
    "DrawnInverse",
    "ExplicitInverse",
    "FPDMConfig",
    "GaussianPrior",
    "Inverse",
    "NoiseSchedule",
    "OptimisedInverse",
    "ParallelInverse",
    "SamplingChain",
    "SamplingResult",
    "StepwiseInverse",
    "StochasticDDIMChain",
    "Transitions",
    "deq_ddim_inversion_settings",
    "deq_ddim_settings",
    "embedded",
    "initial_noise",
    "invert",
    "load_denoiser",
    "sample",
    "sample_fpdm",
    "step_noise",
]

_PLACES = {
    "chains": "DDIMChain SamplingChain StochasticDDIMChain",
    "denoisers": "embedded load_denoiser",
    "inversion": "DrawnInverse ExplicitInverse Inverse OptimisedInverse ParallelInverse StepwiseInverse "
    "deq_ddim_inversion_settings invert",
    "models": "FPDM DiT DiTConfig FPDMConfig",
    "processes": "GaussianPrior NoiseSchedule Transitions initial_noise step_noise",
    "sampling": "SamplingResult deq_ddim_settings sample sample_fpdm",
}


def __getattr__(name: str) -> Any:
    module = next((place for place, names in _PLACES.items() if name in names.split()), None)
    if module is not None:
        value = getattr(import_module(f"{__name__}.{module}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
