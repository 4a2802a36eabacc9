"""Draw the pictures of these pages: ``python docs/make_images.py [NAME ...]``; without a name, all of them.

Everything is seeded and computed here; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gallery_style import prepare
from matplotlib.patches import FancyBboxPatch
from sklearn.datasets import load_digits
from torch import Tensor

import fixpoint
from fixpoint.plotting import INK
from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise, sample
from fixpoint_diffusion.denoisers import embedded
from fixpoint_diffusion.options.sampling import SamplingOptions, SolverName
from fixpoint_diffusion.sampling.grids import save_grid
from fixpoint_diffusion.sampling.job import SamplingJob

FOLDER = Path(__file__).parent / "images"
SIZE = (6.4, 3.6)


def gradient_bias(path: Path) -> None:
    """Relative error of the gradient by the offset of a linear problem, against the number of phantom steps."""
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    counts = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    for rho in (0.5, 0.9, 0.99):
        problem = fixpoint.load_problem(f"linear:rho={rho},rows=1,dtype=float64")
        target = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        exact = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - problem.matrix.T, target)
        errors = [float((_gradient(problem, target, steps) - exact).norm() / exact.norm()) for steps in counts]
        axes.plot(counts, errors, marker="o", markersize=3, label=f"spectral radius {rho}")
    axes.set(xscale="log", yscale="log", xlabel="recorded steps k of Phantom(steps=k); 1 is JFB", ylim=(1e-7, 2))
    axes.set_ylabel("relative error of the gradient")
    axes.legend()
    figure.savefig(path, dpi=150)


def _gradient(problem: fixpoint.Problem, target: Tensor, steps: int) -> Tensor:
    offset = problem.offset.clone().requires_grad_()

    def f(z: Tensor) -> Tensor:
        return z @ problem.matrix.T + offset

    rule = fixpoint.Phantom(steps=steps)
    value = fixpoint.solve(f, problem.z0, backward=rule, rtol=1e-10, max_evals=1000).value
    (gradient,) = torch.autograd.grad((value * target).sum(), offset)
    return gradient[0]


def causal_chain(path: Path) -> None:
    """Error of every latent after every Picard round: the wedge that is exact grows by a row a round, or faster."""
    schedule = NoiseSchedule.linear()
    chain = DDIMChain(_empirical_denoiser(schedule), initial_noise(3, range(1), (64,)).double(), schedule, steps=40)
    exact = chain.sequential()
    z, errors = chain.z0, []
    for _ in range(chain.steps):
        z = chain(z)
        errors.append(torch.linalg.vector_norm(z - exact, dim=2)[0] / torch.linalg.vector_norm(exact, dim=2)[0])
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    shown = torch.stack(errors).clamp(min=1e-16).log10().T
    image = axes.imshow(shown, aspect="auto", cmap="magma", extent=(0.5, 40.5, 40.5, 0.5), vmin=-16, vmax=0)
    axes.set(xlabel="Picard round", ylabel="step of the chain")
    figure.colorbar(image, label="log10 of the relative error")
    figure.savefig(path, dpi=150)


def sweep(path: Path) -> None:
    """Error of every latent after every round of sweeps, with and without a window, and the rows of each round."""
    figure, axes = plt.subplots(
        2, 2, figsize=(7.6, 6.4), layout="constrained", width_ratios=(5, 1), height_ratios=(1, 2), sharey="row"
    )
    denoiser = embedded("ddpm-digits")
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    for (left, right), window in zip(axes, (200, 50), strict=True):
        chain = _WindowsOf(denoiser, initial_noise(4, range(1), (1, 8, 8)), schedule, steps=200)
        exact = chain.sequential()
        chain.windows.clear()
        errors: list[Tensor] = []

        def note(progress: fixpoint.Progress, exact: Tensor = exact, errors: list[Tensor] = errors) -> None:
            size = torch.linalg.vector_norm(exact.flatten(2), dim=2)
            errors.append(torch.linalg.vector_norm((progress.value - exact).flatten(2), dim=2)[0] / size[0])

        sample(chain, solver=fixpoint.CausalQuasiNewton(window=window), rtol=1e-3, callback=note)
        rounds, (first, last, rows) = len(errors), torch.tensor(chain.windows).T
        shown = torch.stack(errors).clamp(min=1e-12).log10()
        edges = (0.5, chain.steps + 0.5, rounds + 0.5, 0.5)
        image = left.imshow(shown, aspect="auto", cmap="magma", extent=edges, vmin=-6, vmax=0, interpolation="nearest")
        below = torch.arange(rounds + 1) + 0.5
        for edge in (first, last + 1):
            left.stairs(edge + 0.5, below, orientation="horizontal", baseline=None, color="tab:cyan")
        whole = window == chain.steps
        left.set(ylabel="round", title="all steps at a time" if whole else f"a window of {window} steps")
        right.barh(torch.arange(rounds) + 1, rows, height=0.8, color="tab:cyan")
        right.set_title(f"rows: {int(rows.sum())}")
    axes[1, 0].set_xlabel("step of the chain")
    axes[1, 1].set_xlabel("rows in the round")
    figure.colorbar(image, ax=axes, label="log10 of the relative error", shrink=0.6)
    figure.savefig(path, dpi=150)


class _WindowsOf(DDIMChain):
    """A chain of one sample that notes the first and the last step of every call, and how many there are."""

    def __init__(self, denoiser: object, x_T: Tensor, schedule: NoiseSchedule, *, steps: int) -> None:
        super().__init__(denoiser, x_T, schedule, steps=steps)
        self.windows: list[tuple[int, int, int]] = []

    def denoise(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        self.windows.append((int(step.min()), int(step.max()), len(step)))
        return super().denoise(x, sample, step)


def _empirical_denoiser(schedule: NoiseSchedule) -> object:
    """The exact denoiser where the data are scikit-learn's digits themselves: a posterior mean over all of them."""
    data = torch.tensor(load_digits().data / 8 - 1)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        signal = schedule.alphas_cumprod[t][:, None]
        distance = (x[:, None] - signal.sqrt()[:, None] * data).square().sum(dim=2)
        mean = torch.softmax(-distance / (2 * (1 - signal)), dim=1) @ data
        return (x - signal.sqrt() * mean) / (1 - signal).sqrt()

    return denoiser


def ddim_samples(path: Path) -> None:
    """64 digits by DDIM in 50 steps from the embedded U-Net, all steps solved at once."""
    options = SamplingOptions(num_images=64, steps=50, solver=SolverName.causal, max_rows=64 * 50)
    (batch,) = SamplingJob(embedded("ddpm-digits"), options).batches()
    save_grid(batch.images, path, columns=16, smallest_side=200)


def fpdm_samples(path: Path) -> None:
    """64 digits, 0 to 9 in turn, by DDIM in 50 steps from the embedded fixed point diffusion model."""
    (batch,) = SamplingJob(embedded("fpdm-digits"), SamplingOptions(num_images=64, steps=50, classes="all")).batches()
    save_grid(batch.images, path, columns=16, smallest_side=200)


def fpdm_architecture(path: Path) -> None:
    """A DiT and an FPDM beside it, from the patches at the bottom to the prediction at the top."""
    figure, axes = plt.subplots(figsize=(6.4, 5.0), layout="constrained")
    axes.set(xlim=(0, 10.6), ylim=(-0.5, 8.3))
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str = "#e8e8e8", width: float = 2.4) -> None:
        style = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": INK, "linewidth": 0.8}
        axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.2), width, 0.4, **style))
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color="black")

    def arrow(*points: tuple[float, float], colour: str = INK) -> None:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs[:-1], ys[:-1], color=colour, lw=0.9)
        axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0.9})

    explicit, implicit, told = "#cfe2f3", "#fce5cd", "#b45f06"
    for x, title in ((2.0, "DiT"), (6.6, "FPDM")):
        axes.text(x, 8.1, title, ha="center", fontsize=10, weight="bold")
        box(x, 0.1, "patches + positions")
        box(x, 7.3, "head")
    names = ["block 1", "block 2", "...", "block n"]
    for k, name in enumerate(names):
        y = 1.6 + 1.4 * k
        box(2.0, y, name, explicit)
        arrow((2.0, y - 0.9 if k else 0.6), (2.0, y - 0.5))
        arrow((4.0, y), (3.5, y), colour=told)
    arrow((2.0, 6.3), (2.0, 6.8))
    arrow((4.0, 7.3), (3.5, 7.3), colour=told)
    axes.plot([4.0, 4.0], [1.6, 7.3], color=told, lw=0.9)
    axes.text(4.0, 1.1, "$t$, class", ha="center", fontsize=8, color=told)

    box(6.6, 1.2, "pre blocks", explicit)
    box(9.2, 2.4, r"$u$ = injection", width=1.8)
    box(6.6, 3.5, r"$W_2\,\mathrm{gelu}(W_1[z; u])$", implicit)
    box(6.6, 4.6, "block, or a group", implicit)
    box(6.6, 6.2, "post blocks", explicit)
    arrow((6.6, 0.6), (6.6, 0.7))
    arrow((6.6, 1.7), (6.6, 3.0))
    axes.text(6.5, 2.3, r"$z_0 = x_\mathrm{pre}$", ha="right", fontsize=8)
    arrow((6.6, 1.75), (9.2, 1.75), (9.2, 2.0))
    arrow((9.2, 2.8), (9.2, 3.5), (8.15, 3.5))
    arrow((6.6, 4.0), (6.6, 4.1))
    arrow((6.6, 5.1), (6.6, 5.7))
    axes.text(6.75, 5.35, "$z^\\star$", fontsize=8)
    arrow((6.6, 5.35), (4.9, 5.35), (4.9, 3.5), (5.05, 3.5))
    axes.text(4.8, 5.5, "again, $k$ times", fontsize=8)
    arrow((6.6, 6.7), (6.6, 6.8))
    for y, what in ((1.2, "class"), (4.6, "$t$, class"), (6.2, "class"), (7.3, "class")):
        arrow((8.6, y), (8.1, y), colour=told)
        axes.text(8.7, y, what, va="center", fontsize=8, color=told)
    figure.savefig(path, dpi=150)


def inversion(path: Path) -> None:
    """Sweeps towards the trajectories that lead to given numbers, and steps near the image that are flat or fold."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    schedule, x_0 = NoiseSchedule.linear(), torch.tensor([[-0.7], [0.65]], dtype=torch.float64)
    chain = DDIMChain(_two_bumps(schedule), torch.zeros_like(x_0), schedule, steps=20)
    latents, exact = _sweeps(chain, x_0, rounds=8), _undone(chain, x_0)
    for number, color in zip((0, 1, 2, 4, 8), plt.get_cmap("viridis")(torch.linspace(0.9, 0.35, 5)), strict=True):
        label = "prior's path" if number == 0 else f"round {number}"
        axes[0].plot(latents[number].T, color=color, lw=1.2, label=[label, *["_"] * (len(x_0) - 1)])
    axes[0].plot(exact.T, ":", color=INK, lw=1.6, label=["step by step", *["_"] * (len(x_0) - 1)])
    axes[0].set(title="sweeps towards two numbers, T = 20", xlabel="step: noise at 0, image at 20", ylabel="latent")
    axes[0].legend(fontsize=7, loc="lower right", ncols=2)
    axes[0].set_ylim(-2.2, 2)
    x = torch.linspace(-2, 2, 801, dtype=torch.float64)[:, None]
    for k in (-12, -3, -2):
        _draw_step(axes[1], chain, x, chain.steps + k, label=f"step {chain.steps + k + 1} of {chain.steps}")
    axes[1].set(title="steps near the image: flat and steep", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    for guidance in (1.0, 2.0, 4.0):
        guided = DDIMChain(_two_bumps(schedule, guidance=guidance), torch.zeros_like(x_0), schedule, steps=20)
        _draw_step(axes[2], guided, x, 16, label=f"guidance {guidance:g}")
    axes[2].set(title="guidance folds steps (17 of 20)", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    figure.savefig(path, dpi=130)


def _two_bumps(schedule: NoiseSchedule, *, guidance: float = 1.0) -> object:
    """The exact denoiser of numbers from two narrow bumps; with guidance, towards the right one of them."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        a = schedule.alphas_cumprod[t][:, None]
        spread = 0.01 * a + 1 - a
        offset = x - a.sqrt() * torch.tensor([[-0.7, 0.7]], dtype=x.dtype)
        images = (x - (1 - a) / spread * offset) / a.sqrt()  # of either bump
        both = (torch.softmax(-offset.square() / (2 * spread), dim=1) * images).sum(dim=1, keepdim=True)
        image = both if guidance == 1 else both + guidance * (images[:, 1:] - both)
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    return denoiser


def _sweeps(chain: DDIMChain, x_0: Tensor, *, rounds: int) -> list[Tensor]:
    """The trajectories ``(B, T + 1)`` before every round of sweeps, as the page on inversion writes them."""
    slopes, steps = chain.slopes.flatten().clamp(min=0.05), torch.arange(chain.steps).repeat(len(x_0))
    x = [x_0[:, 0]]
    for slope in reversed(slopes.tolist()):
        x.insert(0, x[0] / slope)
    found = [torch.stack(x, dim=1)]
    for _ in range(rounds):
        latents = found[-1]
        after = chain.transition(latents[:, :-1].reshape(-1, 1), torch.zeros_like(steps), steps)
        miss, move = after.reshape(len(x_0), -1) - latents[:, 1:], [torch.zeros_like(x_0[:, 0])]
        for k in reversed(range(chain.steps)):
            move.insert(0, (move[0] - miss[:, k]) / slopes[k])
        found.append(latents + torch.stack(move, dim=1))
    return found


def _undone(chain: DDIMChain, x_0: Tensor) -> Tensor:
    """The exact trajectories, each step undone by bisection."""
    x = [x_0]
    for k in reversed(range(chain.steps)):
        low, high = torch.full_like(x_0, -10.0), torch.full_like(x_0, 10.0)
        for _ in range(60):
            middle = (low + high) / 2
            index = torch.zeros(len(x_0), dtype=torch.int64)
            above = chain.transition(middle, index, index + k) > x[0]
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        x.insert(0, (low + high) / 2)
    return torch.cat(x, dim=1)


def _draw_step(axes: plt.Axes, chain: DDIMChain, x: Tensor, k: int, *, label: str) -> None:
    """What one step makes of every latent."""
    index = torch.zeros(len(x), dtype=torch.int64)
    axes.plot(x, chain.transition(x, index, index + k), label=label, lw=1.3)
    axes.set(xlabel="latent before the step", ylabel="latent after it")
    axes.legend(fontsize=7)


PICTURES = {
    "gradient-bias": gradient_bias,
    "causal-chain": causal_chain,
    "sweep": sweep,
    "ddim-samples": ddim_samples,
    "fpdm-samples": fpdm_samples,
    "fpdm-architecture": fpdm_architecture,
    "inversion": inversion,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        if name not in PICTURES:
            raise SystemExit(f"no picture {name!r}; there are {', '.join(PICTURES)}")
        prepare()
        PICTURES[name](FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
