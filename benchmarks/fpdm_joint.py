"""Sampling the embedded FPDM in parallel: its layers solved inside every evaluation, or as part of the fixed point.

    python -m benchmarks.fpdm_joint [--images 8] [--seeds 3] [--out benchmarks/results/fpdm_joint.json]

DDIM, solved to a tolerance of 1e-3. Block passes are counted by hooks on the blocks: "serial" are those that have to
wait for each other, "work" all of them for one image. The error is the median over the images of the relative distance
of x_0 to that of the sequential sampler with converged layers.

    sequential      step by step, layers start at the last step's state
    nested          the chain of a denoiser that iterates its layer anew in every evaluation
    joint, reuse    ``sample_fpdm_jointly``: the layer of a step starts at the state of the step before
    joint, Anderson latents and converged layers as the unknown: an evaluation applies every layer once to its own state
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint import Anderson, Picard, solve
from fixpoint.bench import provenance
from fixpoint_diffusion import sample
from fixpoint_diffusion.chains import DDIMChain
from fixpoint_diffusion.denoisers import FPDMDenoiser, embedded
from fixpoint_diffusion.models import FPDM, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule, Transitions, initial_noise, wide
from fixpoint_diffusion.sampling import ToTolerance, sample_fpdm, sample_fpdm_jointly

RTOL = 1e-3


class ChainWithLayers:
    """Latents ``(B, T, *shape)`` and layer states ``(B, T, L, D)`` from latents and layer states."""

    batch_dims = 1

    def __init__(self, model: FPDM, x_T: Tensor, transitions: Transitions, latents: Tensor) -> None:
        self.model, self.x_T, self.transitions = model, x_T, transitions
        self.t = transitions.timesteps.repeat(len(x_T))
        layers = fpdm_layer_problem(model, self._inputs(latents).flatten(0, 1), self.t).z0
        self.z0 = (latents, layers.unflatten(0, latents.shape[:2]).contiguous())

    def __call__(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, layers = self._inputs(state[0]), state[1]
        with torch.no_grad():
            out, solution = self.model(
                inputs.flatten(0, 1), self.t, z0=layers.flatten(0, 1), depth=1, return_solution=True
            )
        after = self.transitions.cumulative(wide(inputs), wide(out.unflatten(0, inputs.shape[:2])))
        return after.to(inputs.dtype), solution.value.unflatten(0, layers.shape[:2]).contiguous()

    def _inputs(self, latents: Tensor) -> Tensor:
        return torch.cat([self.x_T[:, None], latents[:, :-1]], dim=1)


class Case:
    """The embedded model and one batch of noise, with every method as a call that returns images ``(B, 1, 8, 8)``."""

    def __init__(self, images: int, steps: int, seed: int) -> None:
        denoiser = embedded("fpdm-digits")
        assert isinstance(denoiser, FPDMDenoiser)
        self.model, self.prior, self.steps = denoiser.model.eval(), denoiser.prior, steps
        self.schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
        self.x_T = initial_noise(seed, range(images), denoiser.sample_shape)
        self.reference = self.sequential(ToTolerance(rtol=1e-6, max_iterations=200))

    def sequential(self, iterations: int | ToTolerance) -> Tensor:
        options = {"steps": self.steps, "iterations": iterations, "solver": Picard()}
        return sample_fpdm(self.model, self.x_T, self.schedule, **options).images

    def nested(self, depth: int | None) -> Callable[[], Tensor]:
        chain = self._chain(depth)
        chain.sequential(trajectory=False)  # its first call is seen twice by the chain's check
        rows = self.steps * len(self.x_T)
        return lambda: sample(chain, rtol=RTOL, max_rows=rows, on_failure="ignore").images

    def joint(self, iterations: int) -> Tensor:
        return sample_fpdm_jointly(
            self.model,
            self.x_T,
            self.schedule,
            steps=self.steps,
            iterations=iterations,
            prior=self.prior,
            rtol=RTOL,
        ).images

    def joint_anderson(self) -> Tensor:
        chain = self._chain(1)
        problem = ChainWithLayers(self.model, self.x_T, chain.transitions, chain.guess)
        solution = solve(
            problem, solver=Anderson(), backward=None, rtol=RTOL, norm="leafwise", max_evals=200, on_failure="ignore"
        )
        return solution.value[0][:, -1]

    def methods(self) -> dict[str, Callable[[], Tensor]]:
        """In the order of the table."""
        return {
            **{f"sequential, {k} iterations": lambda k=k: self.sequential(k) for k in (1, 2, 4)},
            **{f"nested, {k} iterations": self.nested(k) for k in (2, 4, 8)},
            "nested, layers to 1e-3": self.nested(None),
            **{f"joint, reuse, {k} iterations": lambda k=k: self.joint(k) for k in (1, 2, 4)},
            "joint, Anderson": self.joint_anderson,
        }

    def _chain(self, depth: int | None) -> DDIMChain:
        rtol = RTOL if depth is None else None
        denoiser = FPDMDenoiser(self.model, depth=depth, rtol=rtol, prior=self.prior)
        return DDIMChain(denoiser, self.x_T, self.schedule, steps=self.steps, spacing="trailing")


@contextmanager
def counted(model: FPDM) -> Iterator[list[int]]:
    """The rows of every call of a block while the context lasts."""
    rows: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        rows.append(len(output))

    hooks = [b.attention.register_forward_hook(note) for b in (*model.pre, *model.post, *model.implicit_block.blocks)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def run(images: int, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Serial block passes, work and error of every method."""
    case, found = Case(images, steps, seed), {}
    for name, method in case.methods().items():
        with counted(case.model) as rows:
            x_0 = method()
        distance = (x_0 - case.reference).flatten(1).norm(dim=1) / case.reference.flatten(1).norm(dim=1)
        found[name] = {"serial": len(rows), "work": sum(rows) / images, "error": float(distance.median())}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each number of steps, means over seeds, and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fpdm_joint.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = {}
    for steps in options.steps:
        each = [run(options.images, steps, seed) for seed in range(1, options.seeds + 1)]
        figures[str(steps)] = each
        print(f"{steps} steps, {options.images} images, mean of {options.seeds} seeds")
        print(f"{'':28}{'serial':>8}{'work':>8}{'error':>9}")
        for name in each[0]:
            serial, work, error = (
                sum(one[name][what] for one in each) / len(each) for what in ("serial", "work", "error")
            )
            print(f"{name:28}{serial:8.0f}{work:8.0f}{error:9.4f}")
        print(flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
    options.out.write_text(
        json.dumps({**about, "images": options.images, "rtol": RTOL, "steps": figures}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
