"""Edit real digits through the noise behind them: another class in the same hand, and digits between two digits.

Run it as ``python docs/examples/editing.py FOLDER``, in about two minutes on one core. It trains a model that can be
told a class, starting from the embedded one, writes it to ``FOLDER/model``, and writes pictures beside it. A model that
is there already is used. ``--write`` puts tables and pictures into the documentation.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from fixpoint.bench import Images
from fixpoint.bench.pictures import draw_images
from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded, initial_noise, invert, load_denoiser
from fixpoint_diffusion.denoisers import Guided, embedded_folder
from fixpoint_diffusion.denoisers.protocol import NetworkDenoiser
from fixpoint_diffusion.denoisers.registry import family
from fixpoint_diffusion.evaluation import digit_probabilities
from fixpoint_diffusion.inversion import Inverse
from fixpoint_diffusion.training import TrainingRun
from fixpoint_diffusion.training.data import load_digits, split_held_out

STEPS = 20
CLASSES = torch.arange(10)
NO_CLASS = 10
PAIRS = ((4, 9), (2, 3), (0, 6), (5, 8), (7, 1))
HERE = Path(__file__).resolve().parent


def train(folder: Path, *, steps: int = 300) -> NetworkDenoiser:
    """The embedded U-Net with an embedding of ten classes and "no class", trained on until it knows them."""
    unet = family("unet")
    network = unet.build((1, 8, 8), 10, {})
    network.load_state_dict(embedded("ddpm-digits").model.state_dict(), strict=False)  # all but the classes
    torch.nn.init.normal_(network.class_embedding.weight, std=2.0, generator=torch.Generator().manual_seed(0))
    start = folder / "start"
    start.mkdir(parents=True)
    unet.save(network, start, None)
    shutil.copy(embedded_folder("ddpm-digits") / "scheduler_config.json", start)
    TrainingRun.start(folder / "model", init=start, training={"steps": steps, "learning_rate": 3e-3}).run()
    return load_denoiser(folder / "model")


def one_of_each_class() -> Tensor:
    """Ten held-out digits, 0 to 9, which no model here was trained on."""
    held_out = split_held_out(load_digits())[1]
    return torch.stack([held_out.images[held_out.labels == label][1] for label in range(10)])


class Editor:
    """A conditional model and its sampler.

    Args:
        denoiser: of digits, told a class.
        steps: of the sampler.
    """

    def __init__(self, denoiser: NetworkDenoiser, *, steps: int = STEPS) -> None:
        self.denoiser, self.steps = denoiser, steps
        self.schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
        self.timesteps = self.schedule.timesteps(steps)

    def chain(self, x: Tensor, labels: Tensor, *, guidance: float = 1.0, first: int = 0) -> DDIMChain:
        """The sampler from the latents x before step ``first``, told these classes."""
        return DDIMChain(
            self.denoiser if guidance == 1 else Guided(self.denoiser, guidance),
            x,
            self.schedule,
            timesteps=self.timesteps[first:],
            conditioning={"class_labels": labels},
        )

    def invert(self, images: Tensor, labels: Tensor | None = None) -> Inverse:
        """The noise behind images, for a sampler that is told their classes, or none."""
        labels = torch.full((len(images),), NO_CLASS) if labels is None else labels
        return invert(self.chain(torch.zeros_like(images), labels), images, rtol=5e-3)

    @torch.no_grad()
    def sample(self, x: Tensor, labels: Tensor, *, guidance: float = 1.0, first: int = 0) -> Tensor:
        """Images from latents."""
        return self.chain(x, labels, guidance=guidance, first=first).sequential(trajectory=False)

    def sdedit(self, images: Tensor, labels: Tensor, *, strength: float, guidance: float = 1.0) -> Tensor:
        """Add noise up to a share of the schedule, and take it away again under another class (Meng et al., 2022)."""
        first = round((1 - strength) * self.steps)
        level = self.schedule.alphas_cumprod[self.timesteps[first]].to(images.dtype)
        noise = initial_noise(0, range(len(images)), images.shape[1:])
        return self.sample(level.sqrt() * images + (1 - level).sqrt() * noise, labels, guidance=guidance, first=first)


def spherical(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two x_T along the sphere: on a straight line, noise would lose variance."""
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def every_pair(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image beside each class: ``(100, ...)`` and ``(100,)``."""
    return images.repeat(10, *[1] * (images.ndim - 1)), CLASSES.repeat_interleave(len(images))


def figures(edited: Tensor, images: Tensor, labels: Tensor) -> str:
    """How many edits a classifier reads as what they should be, and how near they stay to the original."""
    other = labels != CLASSES.repeat(len(labels) // 10)  # not what the digit was in the first place
    share = (digit_probabilities(edited).argmax(dim=1) == labels)[other].double().mean()
    distance = (edited - images).square().flatten(1).mean(dim=1).sqrt()[other].mean()
    return f"{float(share):10.2f}{float(distance):12.3f}"


def draw(originals: Tensor, edited: Tensor, path: Path) -> None:
    """Ten digits above what became of them, a row for each class."""
    rows = torch.cat([originals, edited]).unflatten(0, (11, 10))
    labels = ["original", *(f"as {number}" for number in CLASSES.tolist())]
    draw_images(Images.of(path.stem, rows, row_labels=labels), path)


def edit(editor: Editor, folder: Path) -> list[str]:
    """Every digit as every other one, by inversion, by SDEdit and from other noise: a table and two pictures."""
    originals = one_of_each_class()
    images, labels = every_pair(originals)
    inverses = {"no class told": editor.invert(originals), "its class told": editor.invert(originals, CLASSES)}
    lines = [
        f"inverted, {told}: {int(inverse.converged.sum())} of 10 in {inverse.rounds} rounds, "
        f"RMS error up to {float(inverse.error.max()):.1e}"
        for told, inverse in inverses.items()
    ]
    lines += ["", f"{'edits':46}{'as asked':>10}{'moved by':>12}"]
    for told, inverse in inverses.items():
        x_T, _ = every_pair(inverse.x_T)
        for guidance in (1.0, 1.5, 2.0):
            edited = editor.sample(x_T, labels, guidance=guidance)
            lines.append(f"{f'inversion, {told}, then guidance {guidance:g}':46}{figures(edited, images, labels)}")
            if told == "no class told" and guidance == 1.5:
                draw(originals, edited, folder / "editing.png")
    for strength in (0.3, 0.4, 0.5, 0.7):
        edited = editor.sdedit(images, labels, strength=strength, guidance=1.5)
        lines.append(f"{f'SDEdit {strength:g}, guidance 1.5':46}{figures(edited, images, labels)}")
        if strength == 0.4:
            draw(originals, edited, folder / "editing-sdedit.png")
    noise = initial_noise(1, range(len(images)), images.shape[1:])
    lines.append(
        f"{'other noise, guidance 1.5':46}{figures(editor.sample(noise, labels, guidance=1.5), images, labels)}"
    )
    return lines


def interpolate(editor: Editor, folder: Path, *, count: int = 9) -> None:
    """Between two digits along x_T, with no class told, above the same digits blended pixel by pixel."""
    originals = one_of_each_class()
    x_T = editor.invert(originals).x_T
    shares = torch.linspace(0, 1, count).tolist()
    rows, labels = [], []
    for a, b in PAIRS:
        between = torch.stack([spherical(x_T[a], x_T[b], share) for share in shares])
        rows.append(editor.sample(between, torch.full((count,), NO_CLASS)))
        rows.append(torch.stack([torch.lerp(originals[a], originals[b], share) for share in shares]))
        labels += [f"{a} to {b}: noise", "pixels"]
    draw_images(Images.of("interpolation", torch.stack(rows), row_labels=labels), folder / "interpolation.png")


def main() -> None:
    """Train, edit, interpolate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="write what the documentation shows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = (given.folder / "model" / "config.json").exists()
    editor = Editor(load_denoiser(given.folder / "model") if trained else train(given.folder))
    page = "\n".join(edit(editor, given.folder))
    print(page)
    interpolate(editor, given.folder)
    if given.write:
        (HERE / "editing.txt").write_text(page + "\n", encoding="utf-8")
        for name in ("editing", "editing-sdedit", "interpolation"):
            shutil.copy(given.folder / f"{name}.png", HERE.parent / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
