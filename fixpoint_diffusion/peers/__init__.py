"""Other parallel samplers as their papers describe them, to compare with: on the same chains, with the same counts."""

from fixpoint_diffusion.peers.paradigms import paradigms
from fixpoint_diffusion.peers.parataa import parataa
from fixpoint_diffusion.peers.quasi_deer import quasi_deer
from fixpoint_diffusion.peers.srds import srds

__all__ = ["paradigms", "parataa", "quasi_deer", "srds"]
