"""Is an FPDM's layer a fixed point, and do the images bear more iterations than it was trained with?

    python -m benchmarks.fpdm_fixed_points [--model FOLDER] [--images 128] [--seeds 3] [--out benchmarks/results]

- Images at k = 1/4, 1/2, 1, 2, 3 and 4 times the training depth N + M, without reuse, in ten steps: a fixed point does
  not degrade beyond that depth, a network that was trained to be looped so often does. Confidence and Fréchet distance
  as in ``benchmarks.fpdm_reuse``, for models of 8x8 digits.
- The residual |f(z) - z| / |f(z)| after every plain iteration, at the latents of a sampling run.
- The layer solved from four starts: the pre blocks' output, zeros, noise of the same norm, and the solution of the step
  before. How many solves converge, and how near the others are to that from the pre blocks' output: the cosine, and the
  distance over the norm. Then the same for what plain iteration has after N + M iterations.
- The residual over training, from ``layer_residual`` of the model's ``training_log.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fixpoint import Anderson, solve
from fixpoint.bench import provenance
from fixpoint.plotting import COLOURS, STYLE
from fixpoint_diffusion.commands.shared import open_model
from fixpoint_diffusion.denoisers import FPDMDenoiser
from fixpoint_diffusion.evaluation import digit_frechet_distance, digit_quality
from fixpoint_diffusion.models import FPDMLayerProblem, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import ToTolerance, fpdm_steps, sample_fpdm
from fixpoint_diffusion.training.data import load_digits, split_held_out

Figures = dict[str, Any]
MULTIPLES = (0.25, 0.5, 1, 2, 3, 4)
STARTS = ("pre blocks", "zeros", "noise", "last solution")
RTOL, MAX_EVALS = 1e-4, 200
LAYER_IMAGES = 32  # of each seed, whose layers are looked at


class Case:
    """A model, its schedule and depth, and the noise of every seed."""

    def __init__(self, model: str, images: int, seeds: int, steps: int) -> None:
        denoiser, self.folder = open_model(model)
        if not isinstance(denoiser, FPDMDenoiser):
            raise SystemExit(f"{model} is no FPDM, but {denoiser!r}")
        self.model, config = denoiser.model.eval(), denoiser.model.config
        self.schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
        self.depth = config.max_no_grad + config.max_grad
        self.steps = steps
        self.noise = [initial_noise(seed, range(images), config.sample_shape) for seed in range(1, seeds + 1)]
        # As many of each class.
        self.labels = None if config.num_classes is None else torch.arange(images) % config.num_classes

    def problems(self) -> list[tuple[FPDMLayerProblem, Tensor]]:
        """The layer at every step but the first of a run with solved layers, and the solution of the step before."""
        found = []
        for x_T in self.noise:
            x_T, labels = x_T[:LAYER_IMAGES], None if self.labels is None else self.labels[:LAYER_IMAGES]
            until = ToTolerance(rtol=RTOL, max_iterations=MAX_EVALS)
            for step in fpdm_steps(self.model, x_T, self.schedule, steps=self.steps, iterations=until, y=labels):
                if step.z0 is not None:
                    t = torch.tensor(step.timestep)
                    found.append((fpdm_layer_problem(self.model, step.latent, t, y=labels), step.z0))
        return found


def quality(case: Case) -> Figures:
    """Images at multiples of the training depth: means over the seeds, and what each seed gave."""
    digits, found = split_held_out(load_digits())[1].images, {}
    for multiple in MULTIPLES:
        iterations, each = max(1, round(multiple * case.depth)), []
        for x_T in case.noise:
            options = {"steps": case.steps, "iterations": iterations, "reuse": False, "y": case.labels}
            images = sample_fpdm(case.model, x_T, case.schedule, **options).images
            frechet = digit_frechet_distance(images, digits)
            each.append({"confidence": digit_quality(images).relative_confidence, "frechet": frechet})
        mean = {name: sum(run[name] for run in each) / len(each) for name in each[0]}
        found[f"{multiple:g}"] = {"iterations": iterations, "mean": mean, "seeds": each}
        spread = max(run["frechet"] for run in each) - min(run["frechet"] for run in each)
        print(
            f"{multiple:>5g} x {iterations:>5} iterations {mean['confidence']:>12.3f} {mean['frechet']:>10.2f}"
            f" {spread:>16.2f}",
            flush=True,
        )
    return found


@torch.no_grad()
def residuals(problems: Sequence[tuple[FPDMLayerProblem, Tensor]], iterations: int) -> dict[str, list[float]]:
    """Quantiles over all problems of the relative residual after every plain iteration."""
    rows = []
    for problem, _ in problems:
        z, trace = problem.z0, []
        for _ in range(iterations):
            fz = problem(z)
            trace.append(_norm(fz - z) / _norm(fz))
            z = fz
        rows.append(torch.stack(trace, dim=1))
    values = torch.cat(rows).double()
    levels = {"median": 0.5, "95 %": 0.95, "99 %": 0.99, "worst": 1.0}
    return {name: values.quantile(level, dim=0).tolist() for name, level in levels.items()}


@torch.no_grad()
def agreement(problems: Sequence[tuple[FPDMLayerProblem, Tensor]], depth: int) -> Figures:
    """Where four starts lead: by a solver to a tolerance, and by plain iteration to the training depth."""
    generator = torch.Generator().manual_seed(0)
    solved: dict[str, list[Tensor]] = {start: [] for start in STARTS}
    iterated: dict[str, list[Tensor]] = {start: [] for start in STARTS}
    converged = dict.fromkeys(STARTS, 0)
    for problem, last in problems:
        noise = torch.randn(problem.z0.shape, generator=generator)
        noise *= (_norm(problem.z0) / _norm(noise))[:, None, None]
        for start, z0 in zip(STARTS, (problem.z0, torch.zeros_like(noise), noise, last), strict=True):
            options = {"rtol": RTOL, "max_evals": MAX_EVALS, "backward": None, "on_failure": "ignore"}
            solution = solve(problem, z0, solver=Anderson(), batch_dims=1, **options)
            converged[start] += int(solution.converged.sum())
            solved[start].append(solution.value)
            for _ in range(depth):
                z0 = problem(z0)
            iterated[start].append(z0)
    count = sum(len(problem.z0) for problem, _ in problems)
    return {
        "problems": count,
        "starts": {
            start: {
                "converged": converged[start] / count,
                "solved": _apart(solved[start], solved[STARTS[0]]),
                "iterated": _apart(iterated[start], iterated[STARTS[0]]),
            }
            for start in STARTS
        },
    }


def _apart(found: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    one, other = torch.cat(found).flatten(1).double(), torch.cat(reference).flatten(1).double()
    cosine, distance = cosine_similarity(one, other), _norm(one - other) / _norm(other)
    return {
        "least cosine": float(cosine.min()),
        "median distance": float(distance.median()),
        "largest distance": float(distance.max()),
        "share beyond 1 %": float((distance > 0.01).double().mean()),
    }


def _norm(z: Tensor) -> Tensor:
    return z.flatten(1).norm(dim=1)


def over_training(folder: Path) -> dict[str, list[float]] | None:
    """Steps and the layer's residual; None where the log has none."""
    path = folder / "training_log.csv"
    if not path.is_file():
        return None
    with path.open() as file:
        lines = [line for line in csv.DictReader(file) if line.get("layer_residual")]
    return {name: [float(line[name]) for line in lines] for name in ("step", "layer_residual")} if lines else None


def draw(figures: Figures, path: Path) -> None:
    """One picture: quality against depth, residual against iterations, and the residual over training if known."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):  # readable on light and on dark pages
        depth, panels = figures["depth"], 1 + ("quality" in figures) + (figures["over_training"] is not None)
        figure = Figure(figsize=(5 * panels, 4), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if "quality" in figures:
            left, cells = axes.pop(0), figures["quality"].values()
            counts = [cell["iterations"] for cell in cells]
            for number in range(len(next(iter(cells))["seeds"])):
                values = [cell["seeds"][number]["frechet"] for cell in cells]
                left.plot(counts, values, color=COLOURS[0], alpha=0.3, linewidth=1)
            left.plot(counts, [cell["mean"]["frechet"] for cell in cells], marker="o", label="mean; thin: each seed")
            left.axvline(depth, color="grey", linestyle=":", label="training depth N + M")
            left.set(xscale="log", xlabel="iterations a step", ylabel="Fréchet distance", ylim=(0, None))
            left.set_xticks(counts, [str(count) for count in counts])
            left.minorticks_off()
            left.legend()
        middle = axes.pop(0)
        for name, values in figures["residuals"].items():
            middle.semilogy(range(1, len(values) + 1), values, label=name)
        middle.axvline(depth, color="grey", linestyle=":")
        middle.set(xlabel="plain iterations", ylabel="|f(z) - z| / |f(z)|")
        middle.legend(title="of all problems")
        if figures["over_training"] is not None:
            right, log = axes.pop(0), figures["over_training"]
            right.semilogy(log["step"], log["layer_residual"])
            right.set(xlabel="training step", ylabel="residual after 16 iterations")
        figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each question; write every figure and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fpdm-digits", help="an embedded model's name or a model folder")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = Case(options.model, options.images, options.seeds, options.steps)
    figures: Figures = {"depth": case.depth, "over_training": over_training(case.folder)}
    print(f"{options.model}: training depth N + M = {case.depth}; {case.steps} steps, {options.images} images a seed")
    if case.model.config.sample_shape == (1, 8, 8):
        print("\ndepth x                     confidence    Frechet   between seeds")
        figures["quality"] = quality(case)
    problems = case.problems()
    figures["residuals"] = residuals(problems, 4 * case.depth)
    figures["agreement"] = found = agreement(problems, case.depth)
    print(f"\nrelative residual of {found['problems']} problems" + "".join(f"{n:>10}" for n in figures["residuals"]))
    for multiple in (1, 2, 4):
        values = [f"{trace[multiple * case.depth - 1]:>10.1e}" for trace in figures["residuals"].values()]
        print(f"after {multiple * case.depth:4} iterations".ljust(36) + "".join(values))
    for way, title in (("solved", f"solved by Anderson to {RTOL:g}"), ("iterated", f"after {case.depth} iterations")):
        print(f"\n{title:32} converged  least cosine  median distance  largest  beyond 1 %")
        for start, cell in found["starts"].items():
            apart, share = cell[way], f"{cell['converged']:10.4f}" if way == "solved" else " " * 10
            print(
                f"from {start:27}{share}{apart['least cosine']:>14.6f}{apart['median distance']:>17.1e}"
                f"{apart['largest distance']:>9.1e}{apart['share beyond 1 %']:>12.4f}"
            )
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
    about |= {name: getattr(options, name) for name in ("model", "images", "seeds", "steps")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fpdm-fixed-points.json").write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    draw(figures, options.out / "fpdm-fixed-points.png")


if __name__ == "__main__":
    main()
