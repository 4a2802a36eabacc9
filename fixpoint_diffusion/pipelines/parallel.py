"""What the parallel pipelines share: diffusers' own call, with its loop replaced by one parallel solve.

A pipeline of diffusers prepares prompts and noise, walks a loop of "ask the network, let the scheduler step", and
decodes what comes out. Here its own ``__call__`` does all of that, on a shallow copy of the pipeline. The copy has two
stand-ins: a scheduler whose only timestep leads from x_T to x_0, and a network that notes what it is asked and answers
zeros. When the loop takes its one step, the copy gets the real ones, and the chain of all steps is solved with them.
The pipeline itself never holds a stand-in, so that several threads may call it at once.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor
from tqdm.auto import tqdm

from fixpoint import Progress, Solution, Solver
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.denoisers import DiffusersDenoiser, Guided, sharded
from fixpoint_diffusion.denoisers.guided import NEGATIVE
from fixpoint_diffusion.pipelines.callbacks import check_assignment
from fixpoint_diffusion.pipelines.schedulers import check_scheduler, scheduler_noise, scheduler_transitions
from fixpoint_diffusion.pipelines.stand_ins import Listener, OneStep
from fixpoint_diffusion.sampling import SamplingResult, sample

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Called with the network's further inputs, the number of the round and its x_0; something true stops the solve.
AfterRound = Callable[[Mapping[str, Any], int, Tensor], bool]


@dataclass
class ParallelImagePipelineOutput(ImagePipelineOutput):
    """diffusers' output, and what the parallel solve cost.

    Attributes:
        images: PIL images, or an array or tensor of them.
        rounds: batched calls of the network.
        evals: rows in them; with guidance, the network sees two for each.
        solution: the solve's own account: ``converged``, ``status``, ``evals`` per image, and ``residual`` or
            ``predicted_error``; its ``value`` are all latents, ``(B, T, *shape)``.
    """

    rounds: int
    evals: int
    solution: Solution


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a pipeline's loop combines the two halves of a network's batch.

    Attributes:
        scale, rescale: as for :class:`~fixpoint_diffusion.denoisers.Guided`.
        negative_first: which half the negative rows are in.
    """

    scale: float
    rescale: float = 0.0
    negative_first: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What the loop of one call has come to: the copy of the pipeline, the chain, and what is drawn from."""

    pipeline: ParallelPipeline
    chain: SamplingChain
    generator: Any
    after_round: Callable[[int, Tensor], bool] | None


class ParallelPipeline(DiffusionPipeline):
    """A pipeline of diffusers whose loop is solved in parallel; the original must come next among the bases."""

    _network = "unet"
    _output: type = ParallelImagePipelineOutput
    _share_rows: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        solver: Solver | None = None,
        rtol: float = 1e-3,
        max_rows: int | None = None,
        latents: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate images as the original pipeline does, with all steps solved at once.

        Args:
            args, kwargs: those of the original's ``__call__``.
            solver: the update rule; by default that of :func:`fixpoint_diffusion.sample`.
            rtol: when an image is done, as for :func:`fixpoint_diffusion.sample`.
            max_rows: most latents in one call of the network, to bound memory; by default all at once.
            latents: x_T, ``(B, *shape)``, to start from instead of new noise, such as :meth:`invert` found; also where
                the original takes none. They are not rounded to the network's dtype.

        Returns:
            The original's output with ``rounds``, ``evals`` and ``solution``; its plain tuple with
            ``return_dict=False``.

        Raises:
            ValueError: a scheduler that cannot be served, latents that are no tensor or of another shape than the call
                makes, or whatever the original refuses.
        """
        results: list[SamplingResult] = []

        def solve(call: Call) -> Tensor:
            results.append(call.pipeline._sample(call.chain, solver, rtol, call.after_round))
            return results[0].images

        output, before, run = self._run(solve, args, kwargs, latents=latents, max_rows=max_rows)
        self._take_over(run, before)
        if isinstance(output, tuple):
            return output
        (result,) = results
        given = {field.name: getattr(output, field.name) for field in fields(output)}
        return self._output(**given, rounds=result.rounds, evals=result.evals, solution=result.solution)

    def _run(
        self,
        solve: Callable[[Call], Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        latents: Tensor | None,
        max_rows: int | None,
    ) -> tuple[Any, Mapping[str, Any], ParallelPipeline]:
        """The original's call on a copy of the pipeline, with ``solve`` in the place of its loop.

        Returns:
            The original's output, the attributes of the copy before the call, and the copy.
        """
        check_scheduler(self.scheduler)
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a tensor (B, *shape), got {type(latents).__name__}")
        run = copy.copy(self)
        before = dict(vars(run))
        real = {"scheduler": copy.copy(self.scheduler), self._network: getattr(self, self._network)}
        original = super(ParallelPipeline, run).__call__
        signature = inspect.signature(original)
        bound = signature.bind_partial(*args, **kwargs)
        for name, value in _placeholders(latents, real[self._network]).items():
            if name in signature.parameters:
                bound.arguments.setdefault(name, value)
        bound.apply_defaults()
        after_round = run._after_round(bound.arguments, self)
        asked = Listener(real[self._network])

        def take_step(step: Mapping[str, Any]) -> Tensor:
            run.__dict__.update(real)
            chain = run._chain(asked, step, run._guidance(bound.arguments), max_rows)
            if latents is not None:
                if latents.shape != chain.x_T.shape:
                    shapes = f"{tuple(chain.x_T.shape)}, not {tuple(latents.shape)}"
                    raise ValueError(f"this call is about samples of the shape {shapes}")
                chain.x_T = latents.to(chain.x_T)
            after = after_round and partial(after_round, asked.inputs)
            images = solve(Call(pipeline=run, chain=chain, generator=step.get("generator"), after_round=after))
            images = images.to(step["sample"].dtype)
            # A loop may carry the latents of a guided batch twice.
            return torch.cat([images] * (len(step["sample"]) // len(images)))

        run.__dict__.update({"scheduler": OneStep(real["scheduler"], take_step), self._network: asked})
        return original(*bound.args, **bound.kwargs), before, run

    def shard_rows(self, mesh: DeviceMesh | ProcessGroup | None = None) -> Self:
        """Share the rows of each call of the network among processes: :func:`~fixpoint_diffusion.denoisers.sharded`.

        Every rank calls the pipeline with the same arguments, and a generator of the same seed.

        Args:
            mesh: the ranks, as for ``sharded``.

        Returns:
            The pipeline itself.
        """
        self.__dict__["_share_rows"] = partial(sharded, mesh=mesh)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        check_assignment(self, name, value)
        super().__setattr__(name, value)

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """A silent bar for the loop of one step; the bar that is shown counts rounds."""
        return tqdm(iterable, total=total, disable=True)

    def to_json_string(self) -> str:
        """The configuration as the original would write it, so that diffusers loads what is saved here."""
        order = type(self).__mro__
        config = json.loads(super().to_json_string())
        config["_class_name"] = order[order.index(ParallelPipeline) + 1].__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _guidance(self, arguments: Mapping[str, Any]) -> Guidance | None:
        """How the original's loop guides, given the arguments of its call; None where it does not."""
        return None

    def _after_round(self, arguments: dict[str, Any], shared: DiffusionPipeline) -> AfterRound | None:
        """What to call after every round; the original's own callback is taken out of the arguments.

        Called on the copy that a call works on; ``shared`` is the pipeline that was called.
        """
        return None

    def _take_over(self, run: ParallelPipeline, before: Mapping[str, Any]) -> None:
        """What the original's call leaves on a pipeline and its scheduler: settings, offloading hooks, timesteps.

        Its ``_interrupt`` is not among them, for it would stop the calls of other threads.
        """
        self.scheduler.__dict__.update(vars(run.scheduler))
        left = {name: value for name, value in vars(run).items() if value is not before.get(name, run)}
        self.__dict__.update({name: value for name, value in left.items() if name not in ("scheduler", "_interrupt")})

    def _chain(
        self, asked: Listener, step: Mapping[str, Any], guidance: Guidance | None, max_rows: int | None
    ) -> SamplingChain:
        """All steps of the original's loop, from what it asked the network and the scheduler in the first."""
        eta, out = step.get("eta", 0.0), step["model_output"]
        transitions = scheduler_transitions(
            self.scheduler, eta=eta, use_clipped_model_output=bool(step.get("use_clipped_model_output"))
        )
        noise = scheduler_noise(
            self.scheduler, out.shape, eta=eta, generator=step["generator"], dtype=out.dtype, device=out.device
        )
        batch = asked.rows // 2 if guidance else asked.rows
        # What lies between two steps is not rounded to half precision.
        x_T = step["sample"][:batch].to(torch.promote_types(out.dtype, torch.float32))
        conditioning, constants = _sort_inputs(asked.inputs, batch, guidance)
        kind = transitions.prediction_type
        denoiser: Callable[..., Tensor] = DiffusersDenoiser(
            getattr(self, self._network),
            prediction_type=kind,
            inputs=constants,
            learned_variance=transitions.learned_variance,
        )
        if guidance:
            denoiser = Guided(denoiser, guidance.scale, rescale=guidance.rescale)
        return SamplingChain(
            denoiser if self._share_rows is None else self._share_rows(denoiser),
            x_T,
            transitions,
            noise=None if noise is None else noise[:batch].to(x_T.dtype),
            conditioning=conditioning,
            max_rows=max_rows,
        )

    def _sample(
        self,
        chain: SamplingChain,
        solver: Solver | None,
        rtol: float,
        after_round: Callable[[int, Tensor], bool] | None,
    ) -> SamplingResult:
        """Solve the chain, with the pipeline's own progress bar over rounds, out of those of plain iteration."""
        with super().progress_bar(total=chain.steps + 1) as bar:

            def report(progress: Progress) -> bool:
                bar.update(progress.nfev - bar.n)
                bar.set_postfix(active=progress.active, refresh=False)
                return bool(after_round and after_round(progress.nfev - 1, progress.value[:, -1]))

            options: dict[str, Any] = {} if solver is None else {"solver": solver}
            return sample(chain, rtol=rtol, callback=report, **options)


def _placeholders(latents: Tensor | None, network: Any) -> dict[str, Any]:
    """What originals are told of the latents, where they ask: how many, and themselves, so that none are drawn."""
    return {} if latents is None else {"batch_size": len(latents), "latents": latents.to(network.dtype)}


def _sort_inputs(
    inputs: Mapping[str, Any], batch: int, guidance: Guidance | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What differs from image to image, with the negative half of a guided batch under its own name; and the rest."""
    conditioning, constants = {}, {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            if _holds_tensors(value):
                raise ValueError(f"{name} holds tensors ({type(value).__name__}), which cannot be solved in parallel")
            constants[name] = value
        elif len(value) != batch * (2 if guidance else 1):
            raise ValueError(f"there are {batch} latents, but {name} for {len(value) // (2 if guidance else 1)}")
        elif not guidance:
            conditioning[name] = value
        else:
            halves = value.split(batch)
            conditioning[NEGATIVE + name], conditioning[name] = halves if guidance.negative_first else halves[::-1]
    return conditioning, constants


def _holds_tensors(value: Any) -> bool:
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(child, Tensor) or _holds_tensors(child) for child in children)
