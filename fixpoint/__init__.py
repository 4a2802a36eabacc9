"""Fixed points in PyTorch: solve ``z = f(z)``, batched and on any device, and differentiate through the solution."""

from fixpoint import bench
from fixpoint.attach import attach
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.ift import IFT
from fixpoint.backward.neumann import Neumann
from fixpoint.backward.phantom import JFB, Phantom
from fixpoint.backward.reversible import Reversible
from fixpoint.backward.shine import SHINE
from fixpoint.backward.stochastic_jfb import MultiStepJFB, StochasticJFB
from fixpoint.backward.unroll import Unroll
from fixpoint.bench.registry import Problem, RegisteredProblem, available_problems, load_problem
from fixpoint.chains.causal import CausalQuasiNewton
from fixpoint.chains.recurrence import Chain, Recurrence, SparseChain
from fixpoint.engine.layout import Layout
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import ConvergenceError, ConvergenceWarning, Status, Tolerance
from fixpoint.layer import FixedPointLayer
from fixpoint.memory import MemoryEstimate, estimate_memory
from fixpoint.progress import ProgressBar
from fixpoint.root import root
from fixpoint.solution import Progress, Solution
from fixpoint.solve import solve
from fixpoint.solvers.acx import ACX
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver
from fixpoint.solvers.blockwise import Blockwise
from fixpoint.solvers.broyden import Broyden
from fixpoint.solvers.compiled import Compiled
from fixpoint.solvers.gmres import GMRES
from fixpoint.solvers.picard import Picard
from fixpoint.training import correction_loss, jacobian_penalty, spectral_radius

__version__ = "0.1.0"

__all__ = [
    "ACX",
    "GMRES",
    "IFT",
    "JFB",
    "SHINE",
    "Anderson",
    "Backward",
    "Blockwise",
    "Broyden",
    "CausalQuasiNewton",
    "Chain",
    "Compiled",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointLayer",
    "ForwardSolve",
    "Layout",
    "LoopResult",
    "MemoryEstimate",
    "MultiStepJFB",
    "Neumann",
    "Phantom",
    "Picard",
    "Problem",
    "Progress",
    "ProgressBar",
    "Recurrence",
    "RegisteredProblem",
    "Reversible",
    "Solution",
    "Solver",
    "SparseChain",
    "Status",
    "StochasticJFB",
    "Tolerance",
    "Unroll",
    "attach",
    "available_problems",
    "bench",
    "correction_loss",
    "estimate_memory",
    "jacobian_penalty",
    "load_problem",
    "root",
    "solve",
    "spectral_radius",
]
