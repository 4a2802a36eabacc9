"""Latents of a data set by an autoencoder, written in shards; an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from fixpoint import ProgressBar
from fixpoint_diffusion.files import locked, map_array, sha256_of_all, write_json, written_whole
from fixpoint_diffusion.models.autoencoder import LatentEncoder, autoencoder_folder, load_autoencoder
from fixpoint_diffusion.processes.noise import initial_noise
from fixpoint_diffusion.training.data.dataset import ImageDataset, batches_of
from fixpoint_diffusion.training.data.latents import INFO_FILE, LABELS_FILE, LatentsInfo


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How latents are made.

    Attributes:
        sample: draw each latent from what the autoencoder gives for an image, instead of taking the mean.
        seed: of these draws; latent i is the same in batches of any size.
        batch_size: images that are encoded together.
        shard_rows: latents in a file.
        workers: processes that read images; 0: this one.
        device: where to encode.
    """

    sample: bool = False
    seed: int = 0
    batch_size: int = 16
    shard_rows: int = 1024
    workers: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, got {self.seed}")


def encode(
    dataset: ImageDataset,
    vae: str | Path,
    folder: str | Path,
    options: EncodeOptions | None = None,
    *,
    source: str = "",
    progress: bool = True,
) -> LatentsInfo:
    """Write the latents of a data set into a folder that ``open_dataset`` reads.

    The folder gets ``latents-00000.npy``, ... (float32 ``(rows, c, h, w)``, in the scale in which diffusion models see
    them), ``labels.npy`` if there are classes, and ``latents.json``: the scaling, the autoencoder's checksum, names of
    classes and how images were cut. Each file appears whole or not at all. Called again after an interruption, the
    function makes only the shards that are missing; other data or settings than those of the first call are refused.

    Args:
        dataset: images; each row is taken at draw 0.
        vae: the folder of an ``AutoencoderKL``, or a pipeline's with ``vae/`` in it.
        folder: an empty or new folder, or one with an encoding to complete.
        options: how.
        source: where the images are from, for the record.
        progress: show a bar.

    Returns:
        What ``latents.json`` holds.

    Raises:
        BlockingIOError: if another process encodes into the folder.
        FileNotFoundError: if there is no autoencoder.
        FileExistsError: if the folder holds other files, or an encoding of other data or with other settings.
        NotADirectoryError: if the folder is a file.
        ValueError: if the autoencoder cannot encode such images, or gives values that are not finite.
    """
    options = options or EncodeOptions()
    folder = Path(folder)
    encoder = LatentEncoder(load_autoencoder(vae, device=options.device))
    info = _describe(dataset, vae, encoder, options, source)
    with (
        locked(folder, work="encoding"),
        _prepared(folder, info, dataset),
        ProgressBar.tqdm(total=info.rows, unit="image", disable=not progress) as bar,
    ):
        for number, (file, count) in enumerate(info.shards(folder)):
            if _is_whole(file, count, info):
                bar.update(count)
                continue
            begin = number * info.shard_rows
            latents = _encode_rows(dataset, encoder, range(begin, begin + count), info, options, bar.update)
            with written_whole(file) as stream:
                np.save(stream, latents)
    return info


def _describe(
    dataset: ImageDataset, vae: str | Path, encoder: LatentEncoder, options: EncodeOptions, source: str
) -> LatentsInfo:
    if dataset.is_latent:
        raise ValueError("the data are latents already; encode takes images")
    shape = encoder.latent_shape(dataset.sample_shape)
    return LatentsInfo(
        source=source,
        source_fingerprint=dataset.fingerprint(),
        images={"shape": list(dataset.sample_shape), **asdict(dataset.crop), "size": list(dataset.crop.size or ())},
        vae=str(vae),
        vae_sha256=sha256_of_all(autoencoder_folder(vae).glob("*.safetensors")),
        posterior="sample" if options.sample else "mean",
        seed=options.seed,
        scaling_factor=list(encoder.scaling.factor),
        shift_factor=list(encoder.scaling.shift),
        rows=len(dataset),
        shard_rows=options.shard_rows,
        sample_shape=list(shape),
        num_classes=dataset.num_classes,
        class_names=None if dataset.class_names is None else list(dataset.class_names),
    )


@contextlib.contextmanager
def _prepared(folder: Path, info: LatentsInfo, dataset: ImageDataset) -> Iterator[None]:
    """Write what stands beside the shards, and take it away again where it is left without any."""
    _prepare(folder, info, dataset)
    try:
        yield
    except BaseException:
        if not any(file.exists() for file, _ in info.shards(folder)):
            for name in (INFO_FILE, LABELS_FILE):
                (folder / name).unlink(missing_ok=True)
        raise


def _prepare(folder: Path, info: LatentsInfo, dataset: ImageDataset) -> None:
    """Write what stands beside the shards, unless it is there and agrees."""
    if (folder / INFO_FILE).is_file():
        differing = LatentsInfo.load(folder).differences(info)
        if differing:
            raise FileExistsError(
                f"{folder} holds another encoding, with other {', '.join(differing)}: complete it as it was begun, or "
                f"choose another folder"
            )
    else:
        present = [path.name for path in folder.iterdir() if path.name[0] != "."]
        if present:
            raise FileExistsError(f"{folder} holds {', '.join(sorted(present)[:3])}: choose an empty folder")
        write_json(folder / INFO_FILE, asdict(info))
    if dataset.labels is not None:
        with written_whole(folder / LABELS_FILE) as stream:
            np.save(stream, dataset.labels.numpy())


def _encode_rows(
    dataset: ImageDataset,
    encoder: LatentEncoder,
    rows: range,
    info: LatentsInfo,
    options: EncodeOptions,
    count: Callable[[int], object],
) -> np.ndarray:
    """The latents ``(len(rows), c, h, w)`` of some rows."""
    parts = []
    done = rows.start
    loader = DataLoader(
        dataset, batch_size=min(options.batch_size, len(rows)), sampler=rows, num_workers=options.workers
    )
    for batch in batches_of(loader):
        images = batch["images"].to(options.device)
        samples = range(done, done + len(images))
        noise = None
        if options.sample:
            noise = initial_noise(options.seed, samples, info.sample_shape, device=options.device)
        latents = encoder(images, noise=noise).cpu()
        broken = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten()
        if len(broken):
            raise ValueError(f"the autoencoder gives values that are not finite for image {samples[int(broken[0])]}")
        parts.append(latents.numpy())
        done += len(images)
        count(len(images))
    return np.concatenate(parts)


def _is_whole(file: Path, count: int, info: LatentsInfo) -> bool:
    if not file.is_file():
        return False
    try:
        array = map_array(file)
    except ValueError:
        return False
    return array.shape == (count, *info.sample_shape) and array.dtype == np.float32
