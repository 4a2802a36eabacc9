"""Sphinx configuration."""

import fixpoint

project = "fixpoint"
author = "The fixpoint developers"
release = fixpoint.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
doctest_global_setup = "import torch, fixpoint; torch.manual_seed(0)"
html_theme = "furo"
html_title = "fixpoint"
exclude_patterns = ["_build"]
