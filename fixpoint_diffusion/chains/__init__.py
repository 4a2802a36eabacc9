"""Sampling chains as fixed point problems."""

from fixpoint_diffusion.chains.chain import SamplingChain
from fixpoint_diffusion.chains.ddim import DDIMChain
from fixpoint_diffusion.chains.from_scheduler import chain_from_scheduler
from fixpoint_diffusion.chains.multistep import MultistepChain
from fixpoint_diffusion.chains.reversible import ReversibleChain
from fixpoint_diffusion.chains.stochastic import StochasticDDIMChain

__all__ = [
    "DDIMChain",
    "MultistepChain",
    "ReversibleChain",
    "SamplingChain",
    "StochasticDDIMChain",
    "chain_from_scheduler",
]
