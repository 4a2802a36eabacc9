"""Training of denoisers: the loop, its checkpoints, the embedded models' recipes, runs that live in a folder."""

from fixpoint_diffusion.training.loop import TrainingConfig, TrainingLog, diffusion_loss, train
from fixpoint_diffusion.training.runs import TrainingRun

__all__ = ["TrainingConfig", "TrainingLog", "TrainingRun", "diffusion_loss", "train"]
