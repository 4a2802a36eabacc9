"""Other parallel samplers as their papers describe them, to compare with: on the same chains, with the same counts."""

from benchmarks.peers.paradigms import paradigms
from benchmarks.peers.parataa import parataa
from benchmarks.peers.quasi_deer import quasi_deer
from benchmarks.peers.srds import srds

__all__ = ["paradigms", "parataa", "quasi_deer", "srds"]
