"""The distribution as a stranger gets it: built from its own source archive, installed, and the README run from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "runs",
    "build",
    "dist",
    "_build",
    "mutants",
)


def run(*command: object, cwd: Path) -> str:
    """What a command prints, run without the paths that let tests import the source."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(kind: str, source: Path, folder: Path) -> Path:
    """The sdist or wheel of the source, by setuptools of this environment; nothing is downloaded."""
    folder.mkdir()
    code = f"import sys, setuptools.build_meta as build; build.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of this source, and the wheel that comes of what is in the sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("distribution")
    sdist = built("sdist", shutil.copytree(ROOT, folder / "copy", ignore=_LEFT_OUT), folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, built("wheel", source, folder / "wheel")


@pytest.fixture(scope="module")
def scripts(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scripts of an environment with the wheel, which finds other libraries in this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", archives[1], cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind its own packages, and without running what an editable install has put there.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_sdist_holds_tests_and_what_says_how_to_cite(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("CHANGELOG.md", "CITATION.cff", "constraints.txt", "tests/conftest.py", "docs/conf.py", "README.md"):
        assert name in names
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert ours <= names


def test_the_wheel_holds_the_packages_once_and_nothing_else(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
    assert max(Counter(names).values()) == 1
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "fixpoint", "fixpoint_cli", "fixpoint_diffusion", "fixpoint_torch",
    }  # fmt: skip
    for package in ("fixpoint", "fixpoint_cli", "fixpoint_diffusion"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {str(path.relative_to(ROOT)) for path in files} == {n for n in names if n.startswith(f"{package}/")}


def test_the_readme_runs_from_the_installed_wheel_and_shows_what_it_promises(scripts: Path, tmp_path: Path) -> None:
    solve, parallel, inverse = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    where = "import fixpoint, fixpoint_diffusion; print(fixpoint.__file__, fixpoint_diffusion.__file__)\n"
    said = run(scripts / "python", "-c", "print('---')\n".join([where, solve, parallel, inverse]), cwd=tmp_path)
    files, solved, sampled, inverted = said.split("---\n")
    assert files.count(str(scripts.parent)) == 2
    assert solved.startswith("Solution(32 of 32 rows converged")
    assert "torch.Size([64, 64])" in solved
    (rounds, _), difference = sampled.splitlines()[0].split(), sampled.splitlines()[1]
    assert int(rounds) < 30
    assert 0 < float(difference.removeprefix("tensor(").removesuffix(")")) < 3e-3
    assert inverted.startswith("tensor([True, True, True, True])")


def test_the_commands_run_from_the_installed_wheel(scripts: Path, tmp_path: Path) -> None:
    assert run(scripts / "fixpoint-diffusion", "--version", cwd=tmp_path) == run(
        scripts / "fixpoint", "--version", cwd=tmp_path
    )
    assert "ddim-chain" in run(scripts / "fixpoint", "problems", cwd=tmp_path)
    said = run(scripts / "fixpoint-diffusion", "sample", "--num-images", 1, "--steps", 5, "--out", "out", cwd=tmp_path)
    assert "written to out: grid.png, images.npy, sample.json" in said
