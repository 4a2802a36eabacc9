"""How the gallery's scripts start, in which order they are shown, and the style of all pictures of these pages."""

from __future__ import annotations

import os

import matplotlib as mpl
import torch
from sphinx_gallery.sorting import FunctionSortKey

from fixpoint.plotting import STYLE

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


def prepare(_conf: object = None, _script: str | None = None) -> None:
    """One thread and one random state for every script; pictures without a background, for light and dark pages."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mpl.rcParams.update(
        {
            "figure.figsize": (6.8, 3.6),
            "figure.constrained_layout.use": True,
            **STYLE,
        }
    )
