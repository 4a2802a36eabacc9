"""What the parallel pipelines share: diffusers' own call, with its loop replaced by one parallel solve.

A pipeline of diffusers prepares prompts and noise, walks a loop of "ask the network, let the scheduler step", and
decodes what comes out. Here its own ``__call__`` does all of that, on a shallow copy of the pipeline. The copy has two
stand-ins: a scheduler whose loop ends after one step, and a network that notes what it is asked and answers at random.
When the loop takes its one step, the copy gets the real ones. The denoiser of all steps is made from what was asked,
held against what the loop made of the answers, and its chain is solved. The pipeline itself never holds a stand-in, so
that several threads may call it at once.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from fixpoint import CausalQuasiNewton, Progress, Solver
from fixpoint_diffusion.chains import MultistepChain, SamplingChain
from fixpoint_diffusion.denoisers import Guided, sharded
from fixpoint_diffusion.pipelines.callbacks import AfterRound, Callbacks, check_assignment, state_of
from fixpoint_diffusion.pipelines.loops import Guidance, LoopDenoiser, check_loop, conditioning, joined
from fixpoint_diffusion.pipelines.refusals import check_arguments, check_latents, check_pipeline, check_source
from fixpoint_diffusion.pipelines.schedulers import check_scheduler, scheduler_noise, scheduler_transitions
from fixpoint_diffusion.pipelines.stand_ins import Listener, OneStep
from fixpoint_diffusion.sampling import SamplingResult, sample
from fixpoint_diffusion.sampling.batch_cost import usual_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What the loop of one call has come to: the copy of the pipeline, the chain, and what is drawn from."""

    pipeline: ParallelPipeline
    chain: SamplingChain
    generator: Any
    after_round: AfterRound


class ParallelPipeline(DiffusionPipeline):
    """A pipeline of diffusers whose loop is solved in parallel; the original must come next among the bases.

    A subclass says what its original does differently: which component is the network (``_network``), which tensors
    the network is told once for all rows (``_shared``), what it is told of a timestep (``_told``) and how the loop
    guides (``_guidance``). Every call checks that this is what the loop does, before the network is asked anything.

    Source: Pokle, Geng, Kolter, "Deep Equilibrium Approaches to Diffusion Models" (NeurIPS 2022), Sec. 4.

    Example:
        See :class:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline`, which is one.
    """

    _network = "unet"
    _shared: tuple[str, ...] = ()
    _share_rows: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        solver: Solver | None = None,
        rtol: float = 1e-3,
        max_rows: int | Literal["auto"] | None = None,
        latents: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate images as the original pipeline does, with all steps solved at once.

        Args:
            args, kwargs: those of the original's ``__call__``.
            solver: the update rule; by default that of :func:`fixpoint_diffusion.sample`.
            rtol: when an image is done, as for :func:`fixpoint_diffusion.sample`.
            max_rows: most latents in one call of the network, to bound memory; with guidance the network sees two rows
                for each. None: so many that the images decoded from them have 2^22 entries (2^15 on a CPU), and at
                least one for each image, as in the original. ``"auto"``: as for :func:`fixpoint_diffusion.sample`.
            latents: x_T, ``(B, *shape)``, to start from instead of new noise, such as ``invert`` found; also where
                the original takes none. They are not rounded to the network's dtype.

        Returns:
            The original's output with three attributes more; its plain tuple with ``return_dict=False``. ``rounds``
            are the batched calls of the network and ``evals`` the rows in them (with guidance, the network sees two
            for each). ``solution`` is the solve's own account: ``converged``, ``status``, ``evals`` per image, and
            ``residual`` or ``predicted_error``. Its ``value`` are all states of the chain, ``(B, T, *shape)``.

        Raises:
            ValueError: a scheduler, an argument or a component that cannot be served, latents that are no tensor or of
                another shape than the call makes, or whatever the original refuses.
        """
        results: list[SamplingResult] = []

        def solve(call: Call) -> Tensor:
            results.append(call.pipeline._sample(call, solver, rtol, max_rows))
            return results[0].images

        bound = None if max_rows == "auto" else max_rows
        output, before, run = self._run(solve, args, kwargs, latents=latents, max_rows=bound)
        self._take_over(run, before)
        if not isinstance(output, tuple):
            (result,) = results
            output.rounds, output.evals, output.solution = result.rounds, result.evals, result.solution
        return output

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
        network = getattr(self, self._network)
        check_pipeline(self, network)
        run = copy.copy(self)
        before = dict(vars(run))
        real = {"scheduler": copy.copy(self.scheduler), self._network: network}
        original = super(ParallelPipeline, run).__call__
        signature = inspect.signature(original)
        bound = signature.bind_partial(*args, **kwargs)
        if latents is not None and "image" in signature.parameters:
            raise ValueError("this pipeline starts from an image: it takes no latents")
        if latents is not None:
            check_latents(latents, network)
        for name, value in _placeholders(latents, network).items():
            if name in signature.parameters:
                bound.arguments.setdefault(name, value)
        bound.apply_defaults()
        check_arguments(bound.arguments)
        callbacks = Callbacks(run, self, bound.arguments)
        asked = Listener(network)

        def take_step(step: Mapping[str, Any]) -> Tensor:
            run.__dict__.update(real)
            chain = run._chain(asked, stand_in.walked, step, bound.arguments, max_rows)
            factor = 1.0 if chain.transitions.scales is None else float(chain.transitions.scales[-1])
            if latents is not None:
                if latents.shape != chain.x_T.shape:
                    shapes = f"{tuple(chain.x_T.shape)}, not {tuple(latents.shape)}"
                    raise ValueError(f"this call is about samples of the shape {shapes}")
                chain.x_T = (latents * _first_size(self.scheduler, chain)).to(chain.x_T)

            def finish(after_round: AfterRound) -> Tensor:
                def look(index: int, state: Tensor) -> bool:
                    last = torch.full((len(state),), chain.steps, device=state.device)
                    return after_round(index, factor * chain.latents(state, last))

                call = Call(pipeline=run, chain=chain, generator=step.get("generator"), after_round=look)
                images = (factor * solve(call)).to(step["sample"].dtype)
                # A loop may carry the latents of a guided batch twice.
                return torch.cat([images] * (len(step["sample"]) // len(images)))

            if not callbacks.wanted:
                return finish(callbacks.stopped)
            solve_later.append(finish)
            return step["sample"]

        def settings() -> dict[str, Any]:
            told = {name: value for name, value in asked.calls[0].inputs.items() if not isinstance(value, Tensor)}
            return told | state_of(run.scheduler, network)

        solve_later: list[Callable[[AfterRound], Tensor]] = []
        if callbacks.wanted:
            callbacks.solve_at_the_end(lambda after_round: solve_later[0](after_round), settings)
        stand_in = OneStep(real["scheduler"], take_step)
        run.__dict__.update({"scheduler": stand_in, self._network: asked})
        return original(*bound.args, **bound.kwargs), before, run

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As diffusers does, from the components of a loaded pipeline.

        Raises:
            ValueError: a pipeline whose loop does what the loop of this one does not (perturbed attention guidance,
                ControlNets, adapters).
        """
        check_source(pipeline)
        made: Self = super().from_pipe(pipeline, **kwargs)
        return made

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

    def _guidance(self, arguments: Mapping[str, Any], *, doubled: bool) -> Guidance | None:
        """How the original's loop guides, given the arguments of its call; None where it does not.

        Args:
            arguments: by name.
            doubled: whether the loop asks the network two rows for each latent, in one call or in two.
        """
        if not doubled:
            return None
        return Guidance(scale=arguments["guidance_scale"], rescale=arguments.get("guidance_rescale", 0.0))

    def _told(self, timestep: Tensor) -> Tensor:
        """What the loop tells the network of timesteps ``(N,)`` of the scheduler."""
        return timestep

    def _take_over(self, run: ParallelPipeline, before: Mapping[str, Any]) -> None:
        """What the original's call leaves on a pipeline and its scheduler: settings, offloading hooks, timesteps.

        Its ``_interrupt`` is not among them, for it would stop the calls of other threads.
        """
        self.scheduler.__dict__.update(vars(run.scheduler))
        left = {name: value for name, value in vars(run).items() if value is not before.get(name, run)}
        self.__dict__.update({name: value for name, value in left.items() if name not in ("scheduler", "_interrupt")})

    def _chain(
        self,
        listener: Listener,
        walked: slice,
        step: Mapping[str, Any],
        arguments: Mapping[str, Any],
        max_rows: int | None,
    ) -> SamplingChain:
        """All steps of the original's loop, from what it asked the network and the scheduler in the first."""
        eta, out, asked = step.get("eta", 0.0), step["model_output"], joined(listener.calls, self._shared)
        transitions = scheduler_transitions(
            self.scheduler, part=walked, eta=eta, use_clipped_model_output=bool(step.get("use_clipped_model_output"))
        )
        noise = scheduler_noise(
            self.scheduler,
            out.shape,
            part=walked,
            eta=eta,
            generator=step.get("generator"),
            dtype=out.dtype,
            device=out.device,
        )
        rows = len(asked.sample)
        guidance = self._guidance(arguments, doubled=rows == 2 * len(step["sample"]))
        if guidance and asked.calls == 2:
            guidance = replace(guidance, negative_first=False)
        batch = rows // 2 if guidance else rows
        # What lies between two steps is not rounded to half precision.
        x_T = step["sample"][:batch].to(torch.promote_types(out.dtype, torch.float32))
        if transitions.scales is not None:
            x_T = x_T / float(transitions.scales[0])
        inner = LoopDenoiser(
            getattr(self, self._network),
            asked,
            told=self._told,
            shared=self._shared,
            prediction_type=transitions.prediction_type,
            learned_variance=transitions.learned_variance,
        )
        denoiser = Guided(inner, guidance.scale, rescale=guidance.rescale) if guidance else inner
        told = conditioning(asked, batch, guidance, self._shared)
        first = torch.zeros(batch, dtype=torch.int64, device=x_T.device)
        t = transitions.timesteps.to(x_T.device)[first]
        check_loop(denoiser, asked, guidance, transitions.as_input(x_T, first), t, told, out[:batch])
        kind = SamplingChain if transitions.history is None else MultistepChain
        chain = kind(
            denoiser if self._share_rows is None else self._share_rows(denoiser),
            x_T,
            transitions,
            noise=None if noise is None else noise[:batch].to(x_T.dtype),
            conditioning=told,
            max_rows=max_rows,
        )
        # By the size of the images that are decoded: so large are a network's activations, too.
        enlarged = int(getattr(self, "vae_scale_factor", 1)) ** 2 * (2 if guidance else 1)
        chain.max_rows = chain.max_rows or usual_rows(chain, enlarged=enlarged)
        return chain

    def _sample(self, call: Call, solver: Solver | None, rtol: float, max_rows: int | str | None) -> SamplingResult:
        """Solve the chain, with the pipeline's own progress bar over rounds, out of those of plain iteration."""
        chain = call.chain
        options: dict[str, Any] = {} if solver is None else {"solver": solver}
        if max_rows == "auto":
            chain.max_rows, options["max_rows"] = None, max_rows
        elif solver is None or (isinstance(solver, CausalQuasiNewton) and solver.window is solver.max_rows is None):
            options["max_rows"] = chain.max_rows
        with super().progress_bar(total=chain.steps + 1) as bar:

            def report(progress: Progress) -> bool:
                bar.update(progress.nfev - bar.n)
                bar.set_postfix(active=progress.active, refresh=False)
                return call.after_round(progress.nfev - 1, progress.value[:, -1])

            return sample(chain, rtol=rtol, callback=report, **options)


def _placeholders(latents: Tensor | None, network: Any) -> dict[str, Any]:
    """What originals are told of the latents, where they ask: how many, and themselves, so that none are drawn."""
    return {} if latents is None else {"batch_size": len(latents), "latents": latents.to(network.dtype)}


def _first_size(scheduler: Any, chain: SamplingChain) -> float:
    """What a chain's x_T is in units of the latents that a pipeline is given."""
    scales = chain.transitions.scales
    return float(getattr(scheduler, "init_noise_sigma", 1.0)) / (1.0 if scales is None else float(scales[0]))
