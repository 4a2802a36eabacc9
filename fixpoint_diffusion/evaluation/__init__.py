"""Distances between sets of images in the features of a network, and what digits look like to a classifier."""

from fixpoint_diffusion.evaluation.digits import (
    DigitFeatures,
    DigitQuality,
    digit_confidence,
    digit_frechet_distance,
    digit_probabilities,
    digit_quality,
    train_digit_classifier,
)
from fixpoint_diffusion.evaluation.distances import (
    KernelDistance,
    PrecisionRecall,
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)
from fixpoint_diffusion.evaluation.extractors import (
    DINOv2Features,
    FeatureExtractor,
    InceptionFeatures,
    ModuleFeatures,
)
from fixpoint_diffusion.evaluation.features import CollectedFeatures, collect_features
from fixpoint_diffusion.evaluation.images import Images
from fixpoint_diffusion.evaluation.report import EvaluationReport, evaluate
from fixpoint_diffusion.evaluation.statistics import FeatureStatistics
from fixpoint_diffusion.evaluation.uncertainty import Estimate

__all__ = [
    "CollectedFeatures",
    "DINOv2Features",
    "DigitFeatures",
    "DigitQuality",
    "Estimate",
    "EvaluationReport",
    "FeatureExtractor",
    "FeatureStatistics",
    "Images",
    "InceptionFeatures",
    "KernelDistance",
    "ModuleFeatures",
    "PrecisionRecall",
    "collect_features",
    "digit_confidence",
    "digit_frechet_distance",
    "digit_probabilities",
    "digit_quality",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "sliced_wasserstein",
    "train_digit_classifier",
]
