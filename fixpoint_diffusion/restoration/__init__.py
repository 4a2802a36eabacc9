"""Restoration of images from linear measurements, by sampling chains that are solved in parallel."""

from fixpoint_diffusion.restoration.chain import RestorationChain
from fixpoint_diffusion.restoration.degradations import (
    BlockMean,
    Blur,
    Degradation,
    Grey,
    LinearMap,
    Mask,
    check_degradation,
    project,
)
from fixpoint_diffusion.restoration.restore import restore

__all__ = [
    "BlockMean",
    "Blur",
    "Degradation",
    "Grey",
    "LinearMap",
    "Mask",
    "RestorationChain",
    "check_degradation",
    "project",
    "restore",
]
