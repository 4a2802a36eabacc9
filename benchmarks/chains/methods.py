"""What is compared: ours with its own stopping rule; the peers, ended from outside once they are near enough.

Peers that stop by a tolerance of their own get one that suits an error of 1e-3, found by trying powers of ten, so that no
stopping rule harms them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fixpoint import Anderson, CausalQuasiNewton, Picard, Progress, Solver, solve
from fixpoint_diffusion import DDIMChain, deq_ddim_settings, sample
from fixpoint_diffusion.peers import paradigms, parataa, quasi_deer, srds

RTOL = 1e-3
Watch = Callable[[Progress], object]
Run = Callable[[DDIMChain, Watch, int], object]


@dataclass(frozen=True)
class Method:
    """A way to sample a chain. ``run(chain, watch, max_rounds)`` shows ``watch`` what it has after each round.

    ``late``: it shows in a round the state that the round before led to. ``dear``: left out where T is large.
    """

    name: str
    run: Run
    ours: bool = False
    late: bool = False
    deterministic_only: bool = False
    dear: bool = False


def ours(window: int | None = None, max_rows: int | None = None) -> Run:
    """``CausalQuasiNewton`` from the prior's path, to the tolerance of this benchmark."""

    def run(chain: DDIMChain, watch: Watch | None, max_rounds: int) -> object:
        return solve(
            chain,
            chain.guess,
            solver=CausalQuasiNewton(window=window, max_rows=max_rows),
            rtol=RTOL,
            backward=None,
            max_evals=max_rounds,
            on_failure="ignore",
            callback=watch,
        )

    return run


def _solver(choose: Callable[[DDIMChain], Solver]) -> Run:
    def run(chain: DDIMChain, watch: Watch, max_rounds: int) -> object:
        return sample(
            chain,
            solver=choose(chain),
            rtol=0.0,
            max_evals=max_rounds + 1,
            init="x_T",
            on_failure="ignore",
            callback=watch,
        )

    return run


METHODS = (
    Method("ours", ours(), ours=True),
    Method("ours, window 100", ours(100), ours=True),
    Method("Picard", _solver(lambda chain: Picard()), late=True),
    Method("Anderson, per sample", _solver(lambda chain: Anderson(memory=5)), late=True),
    Method(
        "Anderson, per timestep", _solver(lambda chain: deq_ddim_settings(chain, "released-code")["solver"]), late=True
    ),
    Method(
        "ParaTAA k=T m=5",
        lambda chain, watch, limit: parataa(chain, memory=5, tolerance=3e-4, callback=watch, max_rounds=limit),
    ),
    Method(
        "ParaTAA k=T/4 m=3",
        lambda chain, watch, limit: parataa(
            chain, order=max(chain.steps // 4, 1), tolerance=3e-4, callback=watch, max_rounds=limit
        ),
    ),
    Method(
        "ParaDiGMS",
        lambda chain, watch, limit: paradigms(chain, tolerance=0.03, callback=watch, max_rounds=limit),
    ),
    Method(
        "ParaDiGMS, window 100",
        lambda chain, watch, limit: paradigms(chain, tolerance=0.03, window=100, callback=watch, max_rounds=limit),
    ),
    Method(
        "quasi-DEER, 1 probe",
        lambda chain, watch, limit: quasi_deer(chain, tolerance=1e-3, callback=watch, max_rounds=limit),
    ),
    Method(
        "quasi-DEER, exact",
        lambda chain, watch, limit: quasi_deer(chain, probes=None, tolerance=1e-3, callback=watch, max_rounds=limit),
        dear=True,
    ),
    Method("SRDS", lambda chain, watch, limit: srds(chain, tolerance=1e-4, callback=watch), deterministic_only=True),
)
BY_NAME = {method.name: method for method in METHODS}
