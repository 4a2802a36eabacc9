"""Experiments as data: problems by name, the comparison of solvers on them, tables, curves and picture grids."""

from fixpoint.bench.compare import DEFAULT_SOLVERS, check, compare, document, make_solver, run, write
from fixpoint.bench.provenance import code_version, machine, versions
from fixpoint.bench.report import render
from fixpoint.bench.results import Bars, Block, Images, Lines, Study, Table, plain

__all__ = [
    "DEFAULT_SOLVERS",
    "Bars",
    "Block",
    "Images",
    "Lines",
    "Study",
    "Table",
    "check",
    "code_version",
    "compare",
    "document",
    "machine",
    "make_solver",
    "plain",
    "render",
    "run",
    "versions",
    "write",
]
