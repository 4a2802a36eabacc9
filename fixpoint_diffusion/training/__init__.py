"""Training of denoisers: data, the loop, its checkpoints, the embedded models' recipes, runs that live in a folder."""

from fixpoint_diffusion.training.runs import TrainingRun
from fixpoint_diffusion.training.trainer import TrainingConfig, TrainingLog, diffusion_loss, train

__all__ = ["TrainingConfig", "TrainingLog", "TrainingRun", "diffusion_loss", "train"]
