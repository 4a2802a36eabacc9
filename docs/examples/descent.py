"""Descend on the distance between an image and what x_T leads to, with DEQ-DDIM's gradients and their relatives."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fixpoint import IFT, JFB, Phantom
from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded
from fixpoint_diffusion.inversion import Descent, Gradient, LinearTerm, OptimisedInverse
from fixpoint_diffusion.training.data import load_digits, split_held_out

COUNT, STEPS, EPOCHS = 4, 10, 31
GRADIENTS: dict[str, Gradient] = {
    "sequential": "sequential",
    "IFT": IFT(rtol=1e-3, on_failure="best"),
    "JFB": JFB(),
    "Phantom(steps=5)": Phantom(steps=5, damping=0.5),
    "LinearTerm": LinearTerm(),
}


def descend(gradient: Gradient, images: Tensor, *, learning_rate: float, epochs: int = EPOCHS) -> Descent:
    """The same images and the same start for every gradient."""
    denoiser = embedded("ddpm-digits")
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    chain = DDIMChain(denoiser, torch.zeros_like(images), schedule, steps=STEPS)
    optimiser = partial(torch.optim.Adam, lr=learning_rate)
    return OptimisedInverse(gradient=gradient, optimiser=optimiser, epochs=epochs, stop=0.0).descend(chain, images)


def main() -> None:
    """Print the table of the page."""
    torch.set_num_threads(1)
    images = split_held_out(load_digits())[1].images[:COUNT]
    marks = range(0, EPOCHS, 10)
    print(f"{'gradient':18}{'rate':>6}{'rounds':>8}{'rows':>7}{'products':>10}{'rows':>7}", end="")
    print("  mean loss at epoch" + "".join(f"{mark:7}" for mark in marks))
    for name, gradient in GRADIENTS.items():
        for rate in (0.05, 0.2):
            history = descend(gradient, images, learning_rate=rate).history
            cost = [sum(getattr(epoch, what) for epoch in history) / len(history) for what in WHAT]
            print(f"{name:18}{rate:6}{cost[0]:8.1f}{cost[1]:7.0f}{cost[2]:10.1f}{cost[3]:7.0f}" + 20 * " ", end="")
            print("".join(f"{float(history[mark].loss.mean()):7.2f}" for mark in marks), flush=True)


WHAT = ("rounds", "evals", "products", "product_rows")

if __name__ == "__main__":
    main()
