"""Other methods as their papers describe them, to compare with: on the same chains, with the same counts.

Parallel samplers; inverses of a chain, which are methods for ``invert``; and samplers that are made to be inverted.
"""

from benchmarks.peers.coupled import BDIA, EDICT, CoupledSampler, Rex
from benchmarks.peers.inverses import AIDI, GNRI, ForwardStep, ReNoise
from benchmarks.peers.paradigms import paradigms
from benchmarks.peers.parataa import parataa
from benchmarks.peers.quasi_deer import quasi_deer
from benchmarks.peers.srds import srds

__all__ = [
    "AIDI",
    "BDIA",
    "EDICT",
    "GNRI",
    "CoupledSampler",
    "ForwardStep",
    "ReNoise",
    "Rex",
    "paradigms",
    "parataa",
    "quasi_deer",
    "srds",
]
