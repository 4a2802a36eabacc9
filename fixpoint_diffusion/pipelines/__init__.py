"""Pipelines of the diffusers library that solve for all of their steps in parallel."""

from fixpoint_diffusion.pipelines.ddim import ParallelDDIMPipeline
from fixpoint_diffusion.pipelines.ddpm import ParallelDDPMPipeline
from fixpoint_diffusion.pipelines.dit import ParallelDiTPipeline
from fixpoint_diffusion.pipelines.inversion import PipelineInverse
from fixpoint_diffusion.pipelines.parallel import ParallelImagePipelineOutput
from fixpoint_diffusion.pipelines.stable_diffusion import (
    ParallelStableDiffusionPipeline,
    ParallelStableDiffusionPipelineOutput,
)

__all__ = [
    "ParallelDDIMPipeline",
    "ParallelDDPMPipeline",
    "ParallelDiTPipeline",
    "ParallelImagePipelineOutput",
    "ParallelStableDiffusionPipeline",
    "ParallelStableDiffusionPipelineOutput",
    "PipelineInverse",
]
