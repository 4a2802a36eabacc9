"""Pipelines of the diffusers library that solve for all of their steps in parallel."""

from fixpoint_diffusion.pipelines.ddim import ParallelDDIMPipeline
from fixpoint_diffusion.pipelines.ddpm import ParallelDDPMPipeline
from fixpoint_diffusion.pipelines.dit import ParallelDiTPipeline
from fixpoint_diffusion.pipelines.flux import ParallelFluxPipeline
from fixpoint_diffusion.pipelines.inversion import PipelineInverse
from fixpoint_diffusion.pipelines.loops import Guidance
from fixpoint_diffusion.pipelines.parallel import ParallelPipeline
from fixpoint_diffusion.pipelines.stable_diffusion import (
    ParallelStableDiffusionImg2ImgPipeline,
    ParallelStableDiffusionPipeline,
)
from fixpoint_diffusion.pipelines.stable_diffusion_3 import ParallelStableDiffusion3Pipeline
from fixpoint_diffusion.pipelines.stable_diffusion_xl import ParallelStableDiffusionXLPipeline

__all__ = [
    "Guidance",
    "ParallelDDIMPipeline",
    "ParallelDDPMPipeline",
    "ParallelDiTPipeline",
    "ParallelFluxPipeline",
    "ParallelPipeline",
    "ParallelStableDiffusion3Pipeline",
    "ParallelStableDiffusionImg2ImgPipeline",
    "ParallelStableDiffusionPipeline",
    "ParallelStableDiffusionXLPipeline",
    "PipelineInverse",
]
