"""The share of conditional samples that are what was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import class_agreement
from fixpoint_diffusion.sampling.job import SampleBatch
from fixpoint_diffusion.training.data import load_digits


class DrawsDigits:
    """In place of a model: real digits, of the class that was asked for in nine of ten."""

    def __init__(self, denoiser: object, options: object) -> None:
        data = load_digits()
        assert data.labels is not None
        wanted = torch.arange(100) % 10
        wrong = torch.where(torch.arange(100) < 10, (wanted + 1) % 10, wanted)
        rows = [int((data.labels == label).nonzero()[number // 10]) for number, label in enumerate(wrong)]
        self.batch = SampleBatch(first=0, images=data.images[rows], labels=wanted, counts={}, chosen={})

    def batches(self, *, progress: bool) -> list[SampleBatch]:
        return [self.batch]


def test_agreement_is_the_share_of_samples_that_are_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_agreement, "SamplingJob", DrawsDigits)
    monkeypatch.setattr(class_agreement, "load_denoiser", lambda folder: None)
    share, confidence = class_agreement.agreement("none", guidance=1.0, num_images=100, steps=2, seed=0)
    assert share == pytest.approx(0.9, abs=0.03)
    assert confidence > 0.9


def test_a_model_without_classes_is_refused(tmp_path: Path) -> None:
    from fixpoint_diffusion.denoisers import embedded_folder

    folder = shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model")
    with pytest.raises(ValueError, match="class"):
        class_agreement.main([str(folder), "--num-images", "2", "--steps", "2"])
