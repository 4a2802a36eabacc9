"""What is compared: every rule of ours, and torchdeq's, as functions that return a solution with its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torchdeq import get_deq

import fixpoint

Solve = Callable[[nn.Module, Tensor], Tensor]

LIMIT = 300  # evaluations of f, and vector-Jacobian products
RTOL = 1e-6  # of the forward solves in the table of rules
RUNGS = tuple(10 ** (-k / 3) for k in range(3, 22))  # tolerances of both solves that errors are matched on
LEVELS = (1e-2, 1e-3, 1e-5)
OURS, PEER = "fixpoint", "torchdeq"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to a gradient. ``run(cell, x)`` is the fixed point of ``z -> cell(z, x)``, with a graph.

    ``draws``: how many runs make a figure, for a method that draws numbers.
    """

    name: str
    run: Solve
    draws: int = 1


def ours(
    backward: fixpoint.Backward, solver: fixpoint.Solver | None = None, *, rtol: float = RTOL, max_evals: int = LIMIT
) -> Solve:
    """``fixpoint.solve``, by Anderson() if no solver is named."""
    options = {"rtol": rtol, "max_evals": max_evals, "on_failure": "ignore"}

    def run(cell: nn.Module, x: Tensor) -> Tensor:
        forward = solver or fixpoint.Anderson()
        return fixpoint.solve(cell, torch.zeros_like(x), (x,), backward=backward, solver=forward, **options).value

    return run


def torchdeq(solver: str, *, rtol: float = RTOL, max_evals: int = LIMIT, **options: object) -> Solve:
    """A model of torchdeq with the same solver both ways; options name its gradient."""
    names = {f"{way}_{name}": value for way in "fb" for name, value in {"solver": solver, "tol": rtol}.items()}
    limits = {"f_max_iter": max_evals, "b_max_iter": LIMIT, "f_stop_mode": "rel", "b_stop_mode": "rel"}
    model = get_deq(**names, **limits, **options)

    def run(cell: nn.Module, x: Tensor) -> Tensor:
        (value,), _ = model(lambda z: cell(z, x), torch.zeros_like(x))
        return value

    return run


def rules() -> list[Method]:
    """Every rule of ours, then torchdeq's, at a tight tolerance."""
    broyden = fixpoint.Broyden(memory=100)  # no restart, which would forget what SHINE reuses
    random = fixpoint.StochasticJFB(max_no_grad=20, max_grad=10, min_no_grad=1, seed=0)
    return [
        Method(name="IFT()", run=ours(fixpoint.IFT(max_evals=LIMIT))),
        Method(name="Phantom(steps=5)", run=ours(fixpoint.Phantom(steps=5))),
        Method(name="Phantom(steps=5, damping=0.5)", run=ours(fixpoint.Phantom(steps=5, damping=0.5))),
        Method(name="JFB()", run=ours(fixpoint.JFB())),
        Method(name="Neumann(terms=5)", run=ours(fixpoint.Neumann(terms=5))),
        Method(name="SHINE()", run=ours(fixpoint.SHINE(), broyden)),
        Method(name="SHINE(refine=5)", run=ours(fixpoint.SHINE(refine=5), broyden)),
        Method(name="MultiStepJFB(no_grad=20, grad=5)", run=ours(fixpoint.MultiStepJFB(no_grad=20, grad=5))),
        Method(name="StochasticJFB(20, 10)", run=ours(random), draws=10),
        Method(name="Reversible(steps=25)", run=ours(fixpoint.Reversible(steps=25))),
        Method(name="Unroll()", run=ours(fixpoint.Unroll())),
        Method(name="torchdeq ift", run=torchdeq("broyden", ift=True)),
        Method(name="torchdeq hook_ift", run=torchdeq("broyden", hook_ift=True)),
        Method(name="torchdeq phantom, grad=5", run=torchdeq("broyden", grad=5)),
        Method(name="torchdeq phantom, grad=1", run=torchdeq("broyden", grad=1)),
    ]


def rules_at_depth(depth: int) -> list[Method]:
    """Rules whose forward pass makes ``depth`` evaluations of plain iteration, where it does not converge before."""
    options = {"solver": fixpoint.Picard(), "rtol": 0.0, "max_evals": depth}
    plain = partial(torchdeq, "fixed_point_iter", rtol=0.0, max_evals=depth)
    random = fixpoint.StochasticJFB(max_no_grad=depth, min_no_grad=depth, max_grad=5, seed=0)
    return [
        Method(name="IFT()", run=ours(fixpoint.IFT(), **options)),
        Method(name="Phantom(steps=5)", run=ours(fixpoint.Phantom(steps=5), **options)),
        Method(name="JFB()", run=ours(fixpoint.JFB(), **options)),
        Method(name="Neumann(terms=5)", run=ours(fixpoint.Neumann(terms=5), **options)),
        Method(
            name="MultiStepJFB(no_grad=n, grad=1)", run=ours(fixpoint.MultiStepJFB(no_grad=depth, grad=1), **options)
        ),
        Method(name="StochasticJFB(n, 5), one draw", run=ours(random, **options)),
        Method(name="Unroll()", run=ours(fixpoint.Unroll(), **options)),
        Method(name="torchdeq ift", run=plain(ift=True)),
        Method(name="torchdeq hook_ift", run=plain(hook_ift=True)),
        Method(name="torchdeq phantom, grad=5", run=plain(grad=5)),
    ]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Exact gradients with one solver both ways, that differ in their tolerance alone.

    ``forms`` make the same gradient: torchdeq has two, of which the faster counts.
    """

    library: str
    solver: str
    forms: Mapping[str, Callable[[float], Solve]]

    @property
    def name(self) -> str:
        """Library and solver."""
        return f"{self.library}, {self.solver}"

    def methods(self, rtol: float) -> list[Method]:
        """Every form at a tolerance."""
        return [Method(name=f"{self.name}, {form}, {rtol:.1e}", run=at(rtol)) for form, at in self.forms.items()]


SOLVERS = {"Anderson": "anderson", "Broyden": "broyden", "Picard": "fixed_point_iter"}


def families() -> list[Family]:
    """Ours and torchdeq's by each solver. Of ours, Anderson is IFT() as it comes."""
    rules = {
        "Anderson": (fixpoint.IFT(max_evals=LIMIT), fixpoint.Anderson()),
        "Broyden": (fixpoint.IFT(max_evals=LIMIT, solver=fixpoint.Broyden()), fixpoint.Broyden()),
        "Picard": (fixpoint.IFT(max_evals=LIMIT, solver=fixpoint.Picard()), fixpoint.Picard()),
    }

    def mine(rule: fixpoint.IFT, solver: fixpoint.Solver, rtol: float) -> Solve:
        return ours(replace(rule, rtol=rtol), solver, rtol=rtol)

    def theirs(solver: str, form: str, rtol: float) -> Solve:
        return torchdeq(solver, rtol=rtol, **{form: True})

    return [
        *(Family(library=OURS, solver=name, forms={"IFT": partial(mine, *each)}) for name, each in rules.items()),
        *(
            Family(
                library=PEER, solver=name, forms={form: partial(theirs, solver, form) for form in ("hook_ift", "ift")}
            )
            for name, solver in SOLVERS.items()
        ),
    ]
