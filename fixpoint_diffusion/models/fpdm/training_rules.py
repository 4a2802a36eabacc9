"""How the fixed point layer of an FPDM is differentiated in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fixpoint import IFT, SHINE, Backward, Broyden, MultiStepJFB, Phantom, Solver, StochasticJFB
from fixpoint_diffusion.models.fpdm.config import FPDMConfig

_PHANTOM_DAMPING = 0.5
# Relative to the incoming gradient; the noise of a batch is far larger.
_ADJOINT_RTOL = 1e-3


@dataclass(frozen=True, kw_only=True)
class TrainingRule:
    """How a training step solves the layer and gets its gradient.

    Attributes:
        backward: The rule.
        no_grad: Mean number of iterations that record nothing.
        grad: Mean number of recorded ones.
        most_grad: The most recorded ones: memory is for these.
        depth: Updates of the solver before the rule acts; None: the rule makes iterations of its own.
        solver: Solver of the layer; None: Picard.
    """

    backward: Backward
    no_grad: float
    grad: float
    most_grad: int
    depth: int | None = None
    solver: Solver | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those of ``fixpoint.solve``, where they differ from the layer's own."""
        given = {"backward": self.backward, "depth": self.depth, "solver": self.solver}
        return {name: value for name, value in given.items() if value is not None}


def training_rule(config: FPDMConfig) -> TrainingRule:
    """The rule that ``config.backward`` names, with the bounds N and M of ``config``.

    >>> training_rule(FPDMConfig(backward="multi-jfb", max_no_grad=6, max_grad=3)).options["backward"].max_grad
    3
    """
    return _RULES[config.backward](config)


def _stochastic(c: FPDMConfig) -> TrainingRule:
    rule = StochasticJFB(max_no_grad=c.max_no_grad, max_grad=c.max_grad, attach_start=c.attach_start)
    return TrainingRule(backward=rule, no_grad=c.max_no_grad / 2, grad=(1 + c.max_grad) / 2, most_grad=c.max_grad)


def _fixed(c: FPDMConfig, grad: int) -> TrainingRule:
    rule = MultiStepJFB(no_grad=c.max_no_grad, grad=grad, attach_start=c.attach_start)
    return TrainingRule(backward=rule, no_grad=c.max_no_grad, grad=grad, most_grad=grad)


def _after_a_solve(c: FPDMConfig, rule: Backward, grad: int, solver: Solver | None = None) -> TrainingRule:
    return TrainingRule(
        backward=rule, no_grad=c.max_no_grad, grad=grad, most_grad=grad, depth=c.max_no_grad, solver=solver
    )


# One entry a word of ``Backpropagation``.
_RULES: Mapping[str, Callable[[FPDMConfig], TrainingRule]] = {
    "sjfb": _stochastic,
    "multi-jfb": lambda c: _fixed(c, c.max_grad),
    "jfb": lambda c: _fixed(c, 1),
    "phantom": lambda c: _after_a_solve(c, Phantom(steps=c.max_grad, damping=_PHANTOM_DAMPING), c.max_grad),
    "ift": lambda c: _after_a_solve(c, IFT(rtol=_ADJOINT_RTOL), 1),
    "shine": lambda c: _after_a_solve(c, SHINE(), 1, Broyden(memory=c.max_no_grad)),
}
