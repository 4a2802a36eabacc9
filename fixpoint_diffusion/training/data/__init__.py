"""Data to train on and to judge by: folders of pictures, arrays, latents, and scikit-learn's 8x8 digits."""

from fixpoint_diffusion.training.data.dataset import EpochSampler, ImageDataset
from fixpoint_diffusion.training.data.labelled import LabelledImages, load_digits, split_held_out
from fixpoint_diffusion.training.data.opening import open_dataset

__all__ = [
    "EpochSampler",
    "ImageDataset",
    "LabelledImages",
    "load_digits",
    "open_dataset",
    "split_held_out",
]
