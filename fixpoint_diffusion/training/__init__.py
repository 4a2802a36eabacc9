"""Training of denoisers: data, objectives, the loop, its checkpoints, recipes, runs that live in a folder."""

from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.training.data.options import DataOptions
from fixpoint_diffusion.training.logs import TrainingLog
from fixpoint_diffusion.training.objectives import diffusion_loss, variational_bound
from fixpoint_diffusion.training.plan import TrainingPlan
from fixpoint_diffusion.training.runs import TrainingRun
from fixpoint_diffusion.training.trainer import train

__all__ = [
    "DataOptions",
    "TrainingConfig",
    "TrainingLog",
    "TrainingPlan",
    "TrainingRun",
    "diffusion_loss",
    "train",
    "variational_bound",
]
