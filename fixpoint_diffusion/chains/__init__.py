"""Sampling chains as fixed point problems."""

from fixpoint_diffusion.chains.chain import SamplingChain
from fixpoint_diffusion.chains.ddim import DDIMChain
from fixpoint_diffusion.chains.stochastic import StochasticDDIMChain
from fixpoint_diffusion.chains.transitions import Transitions, wide

__all__ = ["DDIMChain", "SamplingChain", "StochasticDDIMChain", "Transitions", "wide"]
