"""Sphinx configuration."""

import sys
from pathlib import Path

import fixpoint

# `benchmarks` is not installed: the pages import it from this checkout.
sys.path.insert(0, str(Path(__file__).parents[1]))

project = "fixpoint"
author = "The fixpoint developers"
release = fixpoint.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx-mathjax-offline",  # formulas need no network to be drawn
    "sphinx_copybutton",
]
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Source", "notes_style")]
doctest_global_setup = """
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
del torch  # each page imports what it uses, as a reader has to
"""
doctest_test_doctest_blocks = ""  # docstrings are run by pytest --doctest-modules
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
html_theme = "furo"
html_title = "fixpoint"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
exclude_patterns = ["_build"]
