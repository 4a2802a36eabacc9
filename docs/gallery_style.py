"""How the gallery's scripts start, in which order they are shown, and the style of all pictures of these pages."""

from __future__ import annotations

import os

import matplotlib as mpl
import torch
from sphinx_gallery.sorting import FunctionSortKey

# Their notes about missing optional packages are no part of a page.
os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}

ORDER = (
    "deq",
    "torchdeq_switch",
    "convergence_plots",
    "recurrences",
    "write_a_solver",
    "write_a_backward_rule",
    "thousand_steps",
    "pipeline",
    "inversion_and_editing",
    "restoration",
    "fpdm",
)

in_order = FunctionSortKey(lambda name: ORDER.index(name.removesuffix(".py")))

INK = "#7d8590"  # is read on white as well as on black
COLOURS = ["#2f81d7", "#e0752d", "#2da44e", "#c94f8c", "#8a6fe0", "#b0892b"]


def prepare(_conf: object = None, _script: str | None = None) -> None:
    """One thread and one random state for every script; pictures without a background, for light and dark pages."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mpl.rcParams.update(
        {
            "figure.figsize": (6.8, 3.6),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "savefig.transparent": True,
            "axes.facecolor": "none",
            "axes.prop_cycle": mpl.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "image.cmap": "gray",
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"),
                INK,
            ),
            "grid.color": INK,
        }
    )
