"""Sampling in batches, as the command line does it: from a model and plain options to images and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fixpoint import Anderson, Broyden, CausalQuasiNewton, Picard, ProgressBar, Solver
from fixpoint_diffusion.chains import SamplingChain, chain_from_scheduler
from fixpoint_diffusion.denoisers import DiffusersDenoiser, FPDMDenoiser, Guided, NetworkDenoiser, describe, family_of
from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS
from fixpoint_diffusion.files import map_array
from fixpoint_diffusion.options.sampling import SamplingOptions, SolverName, check_guidance, parse_classes
from fixpoint_diffusion.processes import SERVED, Clip, SamplerConfig, initial_noise
from fixpoint_diffusion.processes.flow import is_flow
from fixpoint_diffusion.sampling.batch_cost import seconds_of_call
from fixpoint_diffusion.sampling.fpdm.job import PROBE_IMAGES, Drawn, FPDMJob, refuse_fpdm_options
from fixpoint_diffusion.sampling.sample import sample

if TYPE_CHECKING:
    from fixpoint_diffusion.models.autoencoder import LatentDecoder

SOLVERS: dict[SolverName, Solver] = {
    SolverName.causal: CausalQuasiNewton(),
    SolverName.picard: Picard(),
    SolverName.anderson: Anderson(),
    SolverName.broyden: Broyden(),
}
_NUM_IMAGES = 16
# A parallel solver is said not to pay where it takes so many times as long: clocks and machines vary.
_SLOWER = 1.3


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """Some images of a job.

    Attributes:
        first: the number of the first of them among the job's images.
        images: ``(N, *image_shape)`` float32, on the CPU.
        labels: their classes, ``(N,)`` int64; None where no class was asked for.
        counts: what they cost, to be added up over batches: ``rounds`` and ``evals`` of the model, how many
            ``converged``, and an FPDM's ``total_block_passes``, where they are not known before.
        chosen: what the job has chosen by measuring: ``rows_per_round``, the most rows of the model in a round;
            ``layer_atol``, the threshold of an FPDM's adaptive iterations.
    """

    first: int
    images: Tensor
    labels: Tensor | None
    counts: dict[str, float]
    chosen: dict[str, float]


class SamplingJob:
    """Images to be sampled from a loaded denoiser, a batch at a time. All that can be checked is checked at once.

    Args:
        denoiser: what ``load_denoiser`` returns: it knows its schedule and the shape of its samples.
        options: what to sample and how.
        decoder: turns latents into images; None: the samples are the images.
        class_names: names of the model's classes by their numbers, which the options may use.
        x_T: noise to start from ``(M, *sample_shape)``, of image 0 on; None: drawn by the seed.

    Attributes:
        num_images: how many images; by default 16, or as many as ``x_T`` has.
        image_shape: shape of one image, ``(C, H, W)``, after decoding.
        classes: the classes that the images get in turn; None where no class was asked for.
        settings: JSON-able settings that FPDM adds to the options (``iterations``, ``reuse``, and ``block_passes``, the
            cost of one image, where it is known).

    Raises:
        ValueError: for options that do not fit the model, or a model that lacks a schedule, a size or classes.

    >>> from fixpoint_diffusion.denoisers import embedded
    >>> job = SamplingJob(embedded("ddpm-digits"), SamplingOptions(num_images=3, batch_size=2, steps=2))
    >>> [tuple(batch.images.shape) for batch in job.batches(progress=False)]
    [(2, 1, 8, 8), (1, 1, 8, 8)]
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        options: SamplingOptions,
        *,
        decoder: LatentDecoder | None = None,
        class_names: Sequence[str] = (),
        x_T: Tensor | None = None,
    ) -> None:
        if denoiser.schedule_config is None or denoiser.sample_shape is None:
            missing = "scheduler_config.json" if denoiser.schedule_config is None else "sample_size in its config.json"
            raise ValueError(f"cannot sample from this model folder: it has no {missing}")
        self.options = options
        self.settings: dict[str, Any] = {}
        self._decoder = decoder
        self._sample_shape = denoiser.sample_shape
        self.image_shape = self._sample_shape if decoder is None else decoder.image_shape(self._sample_shape)
        self._config = sampler_of(denoiser.schedule_config)
        self._flow = not isinstance(self._config, SamplerConfig)
        self._device = denoiser.device
        self._x_T = x_T
        self._x0_hook = Clip(float("inf")) if options.no_clip else None
        self._took: tuple[int, float, float] | None = None
        self.num_images = options.num_images or (_NUM_IMAGES if x_T is None else len(x_T))
        if x_T is not None and self.num_images > len(x_T):
            raise ValueError(f"--num-images {self.num_images} are more than the {len(x_T)} that --x-T holds")
        self._fpdm: FPDMJob | None = None
        self._denoiser = self._prepare(denoiser)
        self.classes = classes_of(denoiser, options.classes, options.guidance, class_names)
        self._no_class = self.classes is None and describe(denoiser).class_labels is not None
        # A chain of one image that is not run: whatever does not fit is said before anything is written.
        self._chain(range(1), eta=options.eta if self._flow else 0.0)

    def labels(self, samples: range) -> Tensor | None:
        """The classes of these images, ``(N,)``: they repeat in the given order."""
        return labels_of(self.classes, samples)

    def notes(self) -> list[str]:
        """A line for each choice that whoever made it may regret: no class, a parallel solver where it does not pay.

        What pays goes by the first batch: what it took, and what one call of its images takes, timed after it.
        """
        found = []
        if self._no_class:
            found.append("without --class these are images of no class; --class all draws those of every class")
        if self._took is not None and self._took[1] > _SLOWER * self._took[2]:
            images, took, sequential = self._took
            found.append(
                f"--solver {self.options.solver} took {took:.2g} s for {images} images; --solver sequential would "
                f"take about {sequential:.2g} s. Parallel solvers pay for few images of many steps, or on a GPU"
            )
        return [f"Note: {note}" for note in found]

    def batches(self, parts: Sequence[range] | None = None, *, progress: bool = True) -> Iterator[SampleBatch]:
        """Sample images, a batch at a time; no more than a batch is held.

        Args:
            parts: which images, a range for each batch; None: all, ``batch_size`` at a time.
            progress: show a bar: of images, or of the latents or steps where one batch is all.

        Raises:
            FloatingPointError: if images are not finite.
        """
        if parts is None:
            size = self.options.batch_size
            parts = [range(i, min(i + size, self.num_images)) for i in range(0, self.num_images, size)]
        single = len(parts) == 1
        with ProgressBar.tqdm(
            total=sum(map(len, parts)), desc="sampling", unit="image", disable=single or not progress, smoothing=0
        ) as bar:
            for part in parts:
                batch = self._sample(part, progress=progress and single)
                yield batch
                bar.update(len(part))

    @torch.no_grad()
    def _sample(self, samples: range, *, progress: bool) -> SampleBatch:
        if self._fpdm is not None and self._fpdm.chain_denoiser is None:
            noise, labels = self._starts(samples)
            known = PROBE_IMAGES if self._x_T is None else min(PROBE_IMAGES, len(self._x_T))
            probe = partial(self._starts, range(known))
            images, counts, chosen = self._fpdm.sample(noise, labels, first=samples[0], probe=probe, progress=progress)
        else:
            images, counts, chosen = self._sample_chain(samples, progress=progress)
        if self._decoder is not None:
            images = self._decoder(images)
        if not bool(images.isfinite().all()):
            wrong = int((~images.isfinite()).flatten(1).any(dim=1).sum())
            raise FloatingPointError(
                f"{wrong} of images {samples[0]} to {samples[-1]} are not finite: the model gives infinities or NaNs"
            )
        return SampleBatch(
            first=samples[0],
            images=images.to("cpu", torch.float32),
            labels=self.labels(samples),
            counts=counts,
            chosen=chosen,
        )

    def _sample_chain(self, samples: range, *, progress: bool) -> Drawn:
        options, chosen = self.options, dict[str, float]()
        chain = self._chain(samples, eta=options.eta)
        if options.solver == SolverName.sequential:
            images, outcome = chain.sequential(trajectory=False, progress=progress), {}
        else:
            began = time.perf_counter()
            result = sample(
                chain,
                solver=self._solver(),
                rtol=options.tolerance,
                max_evals=options.max_rounds,
                max_rows=options.max_rows,
                on_failure="ignore",  # whoever runs the job sees the count
                progress=progress,
            )
            images, outcome = result.images, {"converged": int(result.solution.converged.sum())}
            if options.max_rows == "auto":
                chosen["rows_per_round"] = result.max_rows or len(samples) * options.steps  # no bound: all at once
            outcome |= {"rounds": chain.rounds, "evals": chain.evals}
            if self._fpdm is not None and self._fpdm.passes_of_call is not None:
                outcome["total_block_passes"] = chain.evals * self._fpdm.passes_of_call
            if self._took is None:
                took = time.perf_counter() - began
                self._took = len(samples), took, options.steps * seconds_of_call(chain, len(samples), calls=2)
        return images, {"rounds": chain.rounds, "evals": chain.evals, **outcome}, chosen

    def _solver(self) -> Solver:
        solver = SOLVERS[self.options.solver]
        if isinstance(solver, CausalQuasiNewton):
            return replace(solver, noise_rtol=self.options.noise_rtol or 0.0, probes=self.options.probes or 0)
        return solver

    def _chain(self, samples: range, *, eta: float) -> SamplingChain:
        labels = self._labels_on_device(samples)
        denoiser, conditioning = with_labels(self._denoiser, labels, self.options.guidance)
        return chain_from_scheduler(
            denoiser,
            self._noise(samples),
            self._config,
            steps=self.options.steps,
            eta=None if self._flow and eta == 0 else eta,
            x0_hook=self._x0_hook,
            seed=self.options.seed,
            first_sample=samples[0],
            conditioning=conditioning,
        )

    def _starts(self, samples: range) -> tuple[Tensor, Tensor | None]:
        return self._noise(samples), self._labels_on_device(samples)

    def _noise(self, samples: range) -> Tensor:
        if self._x_T is not None:
            return self._x_T[samples.start : samples.stop].to(self._device)
        return initial_noise(self.options.seed, samples, self._sample_shape, device=self._device)

    def _labels_on_device(self, samples: range) -> Tensor | None:
        """None where no class was asked for: a model that knows "no class" then takes that."""
        labels = self.labels(samples)
        return None if labels is None else labels.to(self._device)

    def _prepare(self, denoiser: NetworkDenoiser) -> NetworkDenoiser:
        options = self.options
        if not isinstance(self._config, SamplerConfig):
            refuse_fpdm_options(options)
            return denoiser
        transitions = self._config.transitions(
            options.steps, eta=options.eta, x0_hook=self._x0_hook, prediction_type=denoiser.prediction_type
        )
        if not isinstance(denoiser, FPDMDenoiser):
            refuse_fpdm_options(options)
            return _with_variance(denoiser) if transitions.learned_variance else denoiser
        self._fpdm = FPDMJob(denoiser, options, transitions)
        self.settings = self._fpdm.settings
        return self._fpdm.chain_denoiser or (_with_variance(denoiser) if transitions.learned_variance else denoiser)


def read_noise(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Noise to start from, as ``fixpoint-diffusion invert`` writes it: ``(M, *shape)`` float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds no such samples, or not finite numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with noise to start from")
    array = map_array(path)
    if array.ndim == 0 or array.shape[1:] != tuple(shape) or not len(array) or array.dtype.kind != "f":
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected floats (N, {', '.join(map(str, shape))})")
    noise = torch.from_numpy(array.astype("float32"))
    if not bool(noise.isfinite().all()):
        raise ValueError(f"{path} holds numbers that are not finite")
    return noise


def sampler_of(schedule_config: Mapping[str, Any]) -> Mapping[str, Any] | SamplerConfig:
    """Whose steps the commands take: of any scheduler with betas DDIM's or DDPM's; along a flow, Euler's.

    Args:
        schedule_config: of the model's scheduler.

    Returns:
        What :func:`chain_from_scheduler` takes: along a flow, ``schedule_config`` itself.

    Raises:
        ValueError: as :meth:`SamplerConfig.from_diffusers`.
    """
    if is_flow(schedule_config) and schedule_config["_class_name"] in SERVED:
        return schedule_config
    return SamplerConfig.from_diffusers(schedule_config)


def classes_of(
    denoiser: NetworkDenoiser, text: str | None, guidance: float, names: Sequence[str] = ()
) -> tuple[int, ...] | None:
    """The classes that ``--class`` means for a model; None where it was not given, for "no class".

    Raises:
        ValueError: for classes or guidance that do not go with the model; a model that must be told more than a class.
    """
    about = describe(denoiser)
    if unknown := [name for name in about.conditioning if name != CLASS_LABELS]:
        raise ValueError(f"this model takes {', '.join(unknown)}, which cannot be given here: use a pipeline")
    known = about.class_labels
    if text is not None and known is None:
        raise ValueError("--class is for models with classes, and this model has none")
    check_guidance(guidance, text)
    if known is None:
        return None
    count = known.num_classes or 0
    classes = None if text is None else parse_classes(text, count, names)
    if known.null_label is None and guidance != 1:
        raise ValueError("--guidance needs a model that was also trained without labels, and this one was not")
    if known.null_label is None and classes is None:
        raise ValueError(f"this model has {count} classes and must be told one: --class 0, or --class all")
    return classes


def labels_of(classes: Sequence[int] | None, samples: range) -> Tensor | None:
    """The classes of these images, ``(N,)``: they repeat in the given order. None where there are none."""
    return None if classes is None else torch.tensor([classes[i % len(classes)] for i in samples], device="cpu")


def with_labels(
    denoiser: NetworkDenoiser, labels: Tensor | None, guidance: float
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The denoiser and the conditioning of a chain of images with these labels."""
    if labels is None:
        return denoiser, {}
    return denoiser if guidance == 1 else Guided(denoiser, guidance), {CLASS_LABELS: labels}


def _with_variance(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """The same network, whose output keeps what it says of the variance."""
    family = family_of(denoiser.model)
    return (family.denoiser if family else DiffusersDenoiser)(
        denoiser.model,
        prediction_type=denoiser.prediction_type,
        schedule_config=denoiser.schedule_config,
        prior=denoiser.prior,
        learned_variance=True,
    )
