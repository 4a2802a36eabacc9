"""What is compared: ours with its own stopping rule; the peers, ended from outside once they are near enough.

Peers that stop by a tolerance of their own get one that suits an error of 1e-3, found by trying a few, so that no
stopping rule harms them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers import paradigms, parataa, quasi_deer, srds
from fixpoint import Anderson, CausalQuasiNewton, Picard, Progress, Solver
from fixpoint_diffusion import DDIMChain, SamplingResult, deq_ddim_settings, sample

RTOL = 1e-3
FULL_WINDOW = "ours, full window"
PROBED = "ours, 1 probe"
Watch = Callable[[Progress], object]
Run = Callable[[DDIMChain, Watch | None, int], SamplingResult]


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


def ours(**options: int) -> Run:
    """``CausalQuasiNewton`` with these options, to the tolerance of this benchmark."""
    return _solver(lambda chain: CausalQuasiNewton(**options), rtol=RTOL)


def full_window(**options: int) -> Run:
    """The same in a window over the whole chain."""
    return _solver(lambda chain: CausalQuasiNewton(window=chain.steps, **options), rtol=RTOL)


def _solver(choose: Callable[[DDIMChain], Solver], rtol: float = 0.0) -> Run:
    def run(chain: DDIMChain, watch: Watch | None, max_rounds: int) -> SamplingResult:
        return sample(
            chain, solver=choose(chain), rtol=rtol, max_evals=max_rounds + 1, on_failure="ignore", callback=watch
        )

    return run


METHODS = (
    Method(FULL_WINDOW, full_window(), ours=True),
    Method(PROBED, full_window(probes=1), ours=True),
    Method("ours, window 100", ours(window=100), ours=True),
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
