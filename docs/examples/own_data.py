"""Train, sample and evaluate on digits, on a folder of photographs, and on latents, from the command line.

Run it as ``python docs/examples/own_data.py FOLDER``. It runs the commands below one after another with ``FOLDER`` as
the current folder, in a few minutes on one core, and prints each with what it answers. ``--write`` puts that into
``own_data.txt`` beside this file, and the pictures into the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent

DIGITS = """
fixpoint-diffusion train unet --data digits --classes --steps 400 --out runs/digits
fixpoint-diffusion info runs/digits
fixpoint-diffusion sample --model runs/digits --class all --guidance 1.5 --num-images 100 --out runs/digits-samples
fixpoint-diffusion evaluate runs/digits-samples digits --out runs/digits-report.json
"""
PHOTOGRAPHS = """
python docs/examples/photographs.py runs/photographs --per-class 200 --size 16
python docs/examples/tiny_models.py runs/photographs runs/tiny --steps 300
fixpoint-diffusion train unet --data runs/photographs --flip --classes --steps 300 --batch-size 16 --out runs/photos
fixpoint-diffusion info runs/photos
fixpoint-diffusion sample --model runs/photos --class all --num-images 36 --format png --out runs/photos-samples
fixpoint-diffusion evaluate runs/photos-samples runs/photographs --features dinov2 --weights runs/tiny/dinov2
"""
LATENTS = """
fixpoint-diffusion encode runs/photographs --vae runs/tiny/vae --out runs/latents
fixpoint-diffusion train unet --data runs/latents --classes --steps 300 --batch-size 32 --out runs/latent-unet
fixpoint-diffusion info runs/latent-unet
fixpoint-diffusion sample --model runs/latent-unet --class all --num-images 36 --vae runs/tiny/vae --out runs/latent-samples
fixpoint-diffusion evaluate runs/latent-samples runs/photographs --features dinov2 --weights runs/tiny/dinov2
"""  # noqa: E501

# What takes another number when time is short.
SHORT = {
    "train": {"--steps": 2},
    "docs/examples/tiny_models.py": {"--steps": 1},
    "docs/examples/photographs.py": {"--per-class": 6},
}
SHORT |= {"sample": {"--num-images": 12, "--steps": 2}, "evaluate": {"--metric": "frechet"}}
PICTURES = ("digits-samples", "photos-samples", "latent-samples")


def commands(*, short: bool = False) -> list[list[str]]:
    """All commands as lists of words; ``short`` trains and samples next to nothing."""
    found = [shlex.split(line) for line in (DIGITS + PHOTOGRAPHS + LATENTS).splitlines() if line]
    return [with_options(words, SHORT.get(words[1], {})) if short else words for words in found]


def with_options(words: list[str], options: Mapping[str, object]) -> list[str]:
    """The command with these options in place of its own."""
    words = list(words)
    for name, value in options.items():
        if name in words:
            words[words.index(name) + 1] = str(value)
        else:
            words += [name, str(value)]
    return words


def run(words: list[str]) -> str:
    """Run one command in this process, as its program would; returns what it prints.

    Raises:
        SystemExit: if it fails.
    """
    from fixpoint_diffusion.cli import main

    script = words[0] == "python"
    with (
        mock.patch.object(sys, "argv", words[script:]),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        try:
            if script:
                runpy.run_path(str(HERE / Path(words[1]).name), run_name="__main__")
            else:
                main()
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="write what the documentation shows")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    pages = []
    for command in commands():
        pages.append(f"$ {shlex.join(command)}\n{run(command)}")
        print(pages[-1], flush=True)
    if given.write:
        (HERE / "own_data.txt").write_text("\n".join(pages), encoding="utf-8")
        for picture in PICTURES:
            shutil.copy(f"runs/{picture}/grid.png", HERE.parent / "images" / f"own-{picture}.png")
