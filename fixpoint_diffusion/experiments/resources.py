"""What runs are made with: models, data, feature networks, a device, and the records of other runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.chains import DDIMChain, StochasticDDIMChain
from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, NetworkDenoiser, embedded, load_denoiser
from fixpoint_diffusion.evaluation import (
    DigitFeatures,
    FeatureExtractor,
    Images,
    InceptionFeatures,
    ModuleFeatures,
    frechet_distance,
)
from fixpoint_diffusion.evaluation.statistics import FeatureStatistics, RunningMoments, is_statistics_file
from fixpoint_diffusion.experiments.pictures import PICTURES, drawn_pictures
from fixpoint_diffusion.experiments.plans import LATENTS
from fixpoint_diffusion.experiments.records import Config, Records
from fixpoint_diffusion.models.autoencoder import LatentDecoder, load_autoencoder
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.training.data import load_digits, open_dataset, split_held_out

_ROWS = 256  # of a batch of features


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where runs find what they need.

    A configuration names models and data; where they lie is no part of it, so that records of several machines agree.

    Args:
        records: of all runs.
        scratch: a folder for models that runs train.
        models: a folder with a model folder for each name; not needed for the embedded ones.
        data: a folder with a data set for each name: a folder of images, or a ``.npz`` file of statistics.
        features: a file with Inception's weights, for data that is not bundled.
        device: where models run.
    """

    records: Records
    scratch: Path
    models: Path | None = None
    data: Path | None = None
    features: Path | None = None
    device: str = "cpu"

    def denoiser(self, name: str) -> NetworkDenoiser:
        """The model of that name.

        Raises:
            FileNotFoundError: if there is none.
        """
        return _denoiser(name, self.models, self.device)

    def chain(self, config: Config, x_T: Tensor, **changed: Any) -> DDIMChain:
        """The chain of ``config["model"]`` from x_T, without clipping, as DEQ-DDIM has it.

        Args:
            config: ``model``, ``steps``, ``seed``, and where they are not the usual ones ``eta`` and ``spacing``.
            x_T: ``(B, *shape)``.
            **changed: taken in place of entries of ``config``.
        """
        given = {**config, **changed}
        denoiser = self.denoiser(given["model"])
        schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config or {})
        options: dict[str, Any] = {
            "steps": given["steps"],
            "spacing": given.get("spacing"),
            "clip_sample": float("inf"),
            # More are no faster on a processor; large images take much memory.
            "max_rows": max(1, min(_ROWS, 2**24 // x_T[0].numel())),
        }
        if not given.get("eta"):
            return DDIMChain(denoiser, x_T, schedule, **options)
        first = given.get("first_sample", 0)
        return StochasticDDIMChain(
            denoiser, x_T, schedule, eta=given["eta"], seed=given["seed"], first_sample=first, **options
        )

    def noise(self, config: Config, samples: range) -> Tensor:
        """x_T of these samples, ``(B, *shape)``."""
        shape = self.denoiser(config["model"]).sample_shape
        assert shape is not None
        return initial_noise(config["seed"], samples, tuple(shape)).to(self.device)

    def images(self, name: str, first: int, count: int) -> Tensor:
        """Images of a data set, those that no embedded model was trained on, in [-1, 1]: ``(count, C, H, W)``."""
        if name == "digits":
            return split_held_out(load_digits())[1].images[first : first + count].to(self.device)
        data = open_dataset(_within(self.data, name, "data set", "--data"))
        return torch.stack([data[k]["images"] for k in range(first, first + count)]).to(self.device)

    def training_data(self, name: str) -> str:
        """What a training run opens: ``"digits"``, or a path."""
        if name in PICTURES:
            path = self.scratch / "data" / name
            return str(drawn_pictures(name, path))
        return name if name == "digits" else str(self._data(name))

    def pictures(self, samples: Tensor, data: str) -> Tensor:
        """What a model of that data has drawn, as images: latents are decoded by the autoencoder ``sd-vae``."""
        if data not in LATENTS:
            return samples
        return LatentDecoder(_autoencoder(_within(self.models, "sd-vae", "autoencoder", "--models"), self.device))(
            samples
        )

    def distance(self, batches: Iterator[Tensor], data: str) -> float:
        """Fréchet distance of images, given in batches, to a data set, in the features that go with it.

        Digits: the bundled classifier's. Other bundled pictures: their pixels. Anything else: Inception's.
        """
        extractor = self._extractor(data).to(self.device)
        moments = RunningMoments()
        with torch.no_grad():
            for batch in batches:
                moments.update(extractor(batch.clamp(-1, 1)))
        return frechet_distance(moments.statistics(), self._reference(data))

    def _extractor(self, data: str) -> FeatureExtractor:
        if data == "digits":
            return DigitFeatures()
        if data in PICTURES:
            return ModuleFeatures(lambda images: images.flatten(1), name="pixels", num_features=64)
        if self.features is None:
            raise ValueError(f"distances to {data} need --features, a file with Inception's weights")
        return InceptionFeatures(self.features)

    def _reference(self, data: str) -> FeatureStatistics:
        if data == "digits":
            return _digit_statistics()
        path = Path(self.training_data(data))
        if is_statistics_file(path):
            return FeatureStatistics.load(path)
        extractor = self._extractor(data).to(self.device)
        moments = RunningMoments()
        with torch.no_grad():
            for batch in Images(path, (0, 255) if data in PICTURES else None).batches(_ROWS):
                moments.update(extractor(batch.to(self.device)))
        return moments.statistics()

    def _data(self, name: str) -> Path:
        if self.data is not None and (self.data / f"{name}.npz").is_file():
            return self.data / f"{name}.npz"
        return _within(self.data, name, "data set", "--data")


@cache
def _autoencoder(folder: Path, device: str) -> Any:
    return load_autoencoder(folder, device=device)


@cache
def _denoiser(name: str, models: Path | None, device: str) -> NetworkDenoiser:
    if name in EMBEDDED_MODELS:
        return embedded(name, device=device)
    return load_denoiser(_within(models, name, "model", "--models"), device=device)


def _within(folder: Path | None, name: str, what: str, option: str) -> Path:
    if folder is None or not (folder / name).exists():
        where = "" if folder is None else f" in {folder}"
        raise FileNotFoundError(f"no {what} {name!r}{where}: give {option}, the folder that holds it")
    return folder / name


@cache
def _digit_statistics() -> FeatureStatistics:
    train = split_held_out(load_digits())[0].images
    return FeatureStatistics.from_features(DigitFeatures()(train))
