"""The check of the built site sees a broken link, a missing place and a search that finds nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "check_site.py"
PAGE = """<h1 id="top">Title</h1> <a href="#top">up</a> <a href="other.html#here">there</a> <a href="https://no.where/x">far</a>
<a href="folder/">folder</a> <img src="picture.png"> <a href="other.html?x=1#a%20b">with a space</a>"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A small site without faults, whose index knows every search."""
    (tmp_path / "index.html").write_text(PAGE)
    (tmp_path / "other.html").write_text('<p id="here">Text</p> <a name="a b"></a>')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text('<a href="../index.html#top">back</a>')
    (tmp_path / "picture.png").touch()
    write_index(tmp_path, {})
    return tmp_path


def write_index(folder: Path, without: dict[str, list[int]]) -> None:
    names = ["changelog", "citation", "howto", "inversion", "examples/own_data", "migrating"]
    terms: dict[str, object] = {
        "changelog": 0, "citat": [1, 2], "cite": 1, "fid": [2], "invers": 3, "photograph": 4, "sever": [2], "gpus": 2,
        "torchdeq": [5], "gpu": 2,
    }  # fmt: skip
    index = {"docnames": names, "terms": {**terms, **without}, "titleterms": {}}
    (folder / "searchindex.js").write_text(f"Search.setIndex({json.dumps(index)})")


def check(folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == bool(done.stderr), done.stderr
    return done.stderr.splitlines()


def test_a_site_without_faults_passes(site: Path) -> None:
    assert check(site) == []


def test_a_missing_page_picture_or_place_is_named_with_its_page(site: Path) -> None:
    (site / "picture.png").unlink()
    (site / "other.html").write_text('<p id="there">Text</p>')
    (site / "folder" / "index.html").write_text('<a href="index.html#top">here?</a> <a href="gone.html">gone</a>')
    assert check(site) == [
        "folder/index.html: no place for index.html#top",
        "folder/index.html: no file for gone.html",
        "index.html: no place for other.html#here",
        "index.html: no file for picture.png",
        "index.html: no place for other.html?x=1#a%20b",
    ]


def test_a_search_that_does_not_find_its_page_is_named(site: Path) -> None:
    write_index(site, {"citat": [0], "gpus": []})
    assert check(site) == [
        "the search for 'citation' does not find citation",
        "the search for 'several GPUs' does not find howto",
    ]
