"""Restore held-out digits from four kinds of measurement: one step after another, and all steps at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint_diffusion import NoiseSchedule, embedded, initial_noise
from fixpoint_diffusion.restoration import BlockMean, Blur, Degradation, Mask, RestorationChain, restore
from fixpoint_diffusion.training.data import load_digits, split_held_out

COUNT = 8


def degradations() -> dict[str, Degradation]:
    """A hole of 4 x 4 pixels, means of 2 x 2 and 4 x 4 pixels, and a blur of 1.2 pixels."""
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:6, 3:7] = False
    line = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * 1.2**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    return {
        "mask": Mask(known),
        "super-resolution x2": BlockMean(2),
        "super-resolution x4": BlockMean(4),
        "blur": Blur(kernel),
    }


def chain_for(
    degradation: Degradation, images: Tensor, *, steps: int = 25, eta: float = 0.85, x_T: Tensor | None = None
) -> RestorationChain:
    """A chain of the embedded U-Net that restores the images from what the degradation leaves of them."""
    denoiser = embedded("ddpm-digits")
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    if x_T is None:
        x_T = initial_noise(0, range(len(images)), images.shape[1:])
    return RestorationChain(denoiser, x_T, schedule, degradation, degradation.apply(images), steps=steps, eta=eta)


def psnr(found: Tensor, images: Tensor) -> float:
    """Mean over the images, in dB, of values from -1 to 1."""
    return float((10 * torch.log10(4 / (found - images).square().flatten(1).mean(dim=1))).mean())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Rounds until every latent is within 1e-3 of the sequential run's, rounds and rows of the solve; three PSNRs."""

    needed: int | None
    rounds: int
    rows: int
    off: float
    pinv: float
    sequential: float
    parallel: float


def compare(degradation: Degradation, images: Tensor, *, steps: int, eta: float) -> Outcome:
    """Both methods on the same chain."""
    chain = chain_for(degradation, images, steps=steps, eta=eta)
    with torch.no_grad():
        expected = chain.sequential()
        size = expected.flatten(2).norm(dim=2)

        def off(trajectory: Tensor) -> float:
            return float(((trajectory - expected).flatten(2).norm(dim=2) / size).max())

        errors: list[float] = []
        result = restore(chain, callback=lambda now: errors.append(off(now.value.sum(dim=2))))
    return Outcome(
        needed=next((number for number, error in enumerate(errors, 1) if error < 1e-3), None),
        rounds=result.rounds,
        rows=result.evals,
        off=off(result.trajectory),
        pinv=psnr(degradation.pinv(chain.measurement), images),
        sequential=psnr(expected[:, -1], images),
        parallel=psnr(result.images, images),
    )


def optimise_noise(degradation: Degradation, images: Tensor, *, epochs: int) -> list[float]:
    """Mean squared distance from the images while x_T is optimised for it, through the solution of each epoch."""
    x_T = initial_noise(0, range(len(images)), images.shape[1:]).requires_grad_()
    optimiser, losses = torch.optim.Adam([x_T], lr=0.1), []
    for _ in range(epochs):
        chain = chain_for(degradation, images, steps=10, eta=0.0, x_T=x_T)
        loss = (restore(chain).images - images).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Print the tables of the page."""
    torch.set_num_threads(1)
    images = split_held_out(load_digits())[1].images[:COUNT]
    print(f"{'measured':21}{'T':>4}{'eta':>6}{'to 1e-3':>9}{'rounds':>8}{'rows/T':>8}{'off by':>9}", end="")
    print(f"{'pinv':>8}{'sequential':>12}{'parallel':>10}")
    for steps in (25, 100):
        for eta in (0.85, 0.0):
            for name, degradation in degradations().items():
                o = compare(degradation, images, steps=steps, eta=eta)
                rows = o.rows / steps / COUNT
                print(f"{name:21}{steps:4}{eta:6.2f}{o.needed or '-':>9}{o.rounds:8}{rows:8.1f}{o.off:9.0e}", end="")
                print(f"{o.pinv:8.2f}{o.sequential:12.2f}{o.parallel:10.2f}", flush=True)
    losses = optimise_noise(degradations()["super-resolution x4"], images, epochs=21)
    print("\nnoise optimised through the solution, super-resolution x4, T = 10, eta = 0")
    print("epoch           " + "".join(f"{epoch:8}" for epoch in range(0, 21, 5)))
    print("squared distance" + "".join(f"{losses[epoch]:8.4f}" for epoch in range(0, 21, 5)))


if __name__ == "__main__":
    main()
