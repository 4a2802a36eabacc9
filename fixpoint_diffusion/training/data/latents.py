"""A folder of latents as ``fixpoint-diffusion encode`` writes it: shards, labels, and what was done in a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fixpoint_diffusion.files import read_json

INFO_FILE = "latents.json"
LABELS_FILE = "labels.npy"


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What the latents in a folder are; two encodings of the same data with the same settings are equal in all.

    A latent is ``(z - shift_factor) * scaling_factor`` for the autoencoder's z, with one number or one a channel.

    Attributes:
        source: what was encoded.
        source_fingerprint: of the names and sizes of its files, the labels, and the choice of rows.
        images: shape of an image before, and how it was cut: size, place, flip and seed.
        vae: the autoencoder's folder.
        vae_sha256: checksum of the autoencoder's weights.
        posterior: ``"mean"`` or ``"sample"`` of what the autoencoder gives for an image, the latter with ``seed``.
        rows: how many latents there are, ``shard_rows`` in each file but the last.
        sample_shape: shape of one latent.
        num_classes, class_names: as those of the data set.
    """

    source: str
    source_fingerprint: str
    images: dict[str, Any]
    vae: str
    vae_sha256: str
    posterior: str
    seed: int
    scaling_factor: list[float]
    shift_factor: list[float]
    rows: int
    shard_rows: int
    sample_shape: list[int]
    num_classes: int | None
    class_names: list[str] | None

    def differences(self, other: LatentsInfo) -> list[str]:
        """Names of what differs; a folder that was moved is the same, if what is in it is."""
        theirs = asdict(other)
        return [name for name, value in asdict(self).items() if name not in ("source", "vae") and value != theirs[name]]

    def shards(self, folder: Path) -> list[tuple[Path, int]]:
        """All shard files in order, each with its number of rows, whether they are there yet or not."""
        begins = range(0, self.rows, self.shard_rows)
        return [
            (folder / f"latents-{number:05d}.npy", min(self.shard_rows, self.rows - begin))
            for number, begin in enumerate(begins)
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> LatentsInfo:
        """Read the folder's ``latents.json``.

        Raises:
            ValueError: if it is damaged or of another kind.
        """
        path = folder / INFO_FILE
        content = read_json(path)
        names = {entry.name for entry in fields(cls)}
        if set(content) != names:
            raise ValueError(f"{path} does not describe latents: expected an object with {', '.join(sorted(names))}")
        info = cls(**content)
        counts = (info.rows, info.shard_rows, *info.sample_shape)
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError(f"{path}: rows, shard_rows and sample_shape must be positive integers, got {counts}")
        return info
