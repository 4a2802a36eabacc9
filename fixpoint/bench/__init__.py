"""Experiments as data: problems by name, the comparison of solvers on them, tables, curves and picture grids."""

from fixpoint.bench.compare import DEFAULT_SOLVERS, check, compare, make_solver, run, write
from fixpoint.bench.results import Block, Images, Lines, Study, Table

__all__ = [
    "DEFAULT_SOLVERS",
    "Block",
    "Images",
    "Lines",
    "Study",
    "Table",
    "check",
    "compare",
    "make_solver",
    "run",
    "write",
]
