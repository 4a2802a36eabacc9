"""jaxopt's solvers on maps of PyTorch, which jax calls back. Needs the extra ``peers``.

Only those that ask for values of f alone: jax cannot differentiate a map that it calls back. Of optimistix that leaves
plain iteration, so it is not run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jaxopt
import numpy as np
from jaxopt.base import IterativeSolver, OptStep

from benchmarks.solvers.counting import Counted, EndedError
from benchmarks.solvers.runners import Runner, own_tolerance

# Longer than any case, so that the count ends the loop; jaxopt's Broyden keeps as many pairs.
_MAXITER = 600


class _Bridge:
    """The present case's map as a function for jax, so that one compiled loop serves every case of a shape."""

    f: Counted
    ended = False

    def __call__(self, z: jax.Array) -> jax.Array:
        return jax.pure_callback(self._host, jax.ShapeDtypeStruct(z.shape, z.dtype), z)

    def _host(self, z: jax.Array) -> np.ndarray:
        try:
            return self.f.numpy(np.asarray(z))
        except EndedError:
            # An exception cannot leave a compiled loop, but a residual of zero ends it.
            self.ended = True
            return np.asarray(z)


def _runner(name: str, make: Callable[[_Bridge, float], IterativeSolver], *, by_hand: bool = False) -> Runner:
    """``make(bridge, tolerance)`` gives jaxopt's solver of ``bridge``."""

    @functools.cache
    def made(bits: int, tolerance: float) -> tuple[_Bridge, Callable[[np.ndarray], OptStep]]:
        bridge = _Bridge()
        return bridge, jax.jit(make(bridge, tolerance).run)

    def run(f: Counted) -> bool:
        z0 = f.case.z0[0].numpy()
        tolerance = own_tolerance(f.case)
        # For every thread: calls back may come from one that the context manager of that name does not reach. jaxopt's
        # Anderson fails on float32 while it is set.
        jax.config.update("jax_enable_x64", z0.dtype == np.float64)
        bridge, solve = made(z0.dtype.itemsize, tolerance)
        bridge.f, bridge.ended = f, False
        claimed = float(solve(z0).state.error) <= tolerance
        return claimed and not bridge.ended

    return Runner(name, "jaxopt", run, by_hand)


def _anderson(bridge: _Bridge, tolerance: float) -> IterativeSolver:
    return jaxopt.AndersonAcceleration(bridge, tol=tolerance, maxiter=_MAXITER, implicit_diff=False)


def _anderson_small_ridge(bridge: _Bridge, tolerance: float) -> IterativeSolver:
    return jaxopt.AndersonAcceleration(
        bridge, history_size=10, ridge=1e-10, tol=tolerance, maxiter=_MAXITER, implicit_diff=False
    )


def _broyden(bridge: _Bridge, tolerance: float) -> IterativeSolver:
    # A line search would need the gradient of f.
    return jaxopt.Broyden(lambda z: z - bridge(z), tol=tolerance, maxiter=_MAXITER, stepsize=1.0, implicit_diff=False)


RUNNERS = (
    _runner("jaxopt Anderson m=5", _anderson),
    _runner("jaxopt Anderson m=10 ridge=1e-10", _anderson_small_ridge, by_hand=True),
    _runner("jaxopt Broyden", _broyden),
)
