"""Sphinx configuration."""

import sys
from pathlib import Path

import fixpoint

# `benchmarks` is not installed: the pages import it from this checkout; the gallery, its style from this folder.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

project = "fixpoint"
author = "The fixpoint developers"
copyright = f"2026, {author}"
release = fixpoint.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx-mathjax-offline",  # formulas need no network to be drawn
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "substitution"]
myst_substitutions = {"version": release}
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
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "gallery_style.in_order",
    "reset_modules": ("matplotlib", "gallery_style.prepare"),
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "image_srcset": ["2x"],
    "capture_repr": (),
}
html_theme = "furo"
html_title = f"fixpoint {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
exclude_patterns = ["_build", "gallery", "tables"]
