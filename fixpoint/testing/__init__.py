"""Contract suites: what a solver or a backward rule of your own must keep, as tests to inherit.

pytest collects the subclasses as they are; unittest does with ``unittest.TestCase`` as a second base.
"""

from fixpoint.testing.backward import BackwardContract
from fixpoint.testing.solvers import SolverContract

__all__ = ["BackwardContract", "SolverContract"]
