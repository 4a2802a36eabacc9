"""Where and with what a result was computed. No path of the machine is recorded."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("numpy", "scipy", "diffusers", "scikit-learn")


def machine() -> dict[str, str | int]:
    """Operating system and architecture, processor count and the threads that torch uses.

    Example:
        >>> from fixpoint import bench
        >>> "threads" in " ".join(bench.machine())
        True
    """
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions() -> dict[str, str]:
    """The versions of Python, of this library and of the installed packages that matter.

    Example:
        >>> from fixpoint import bench
        >>> "torch" in bench.versions()
        True
    """
    import fixpoint  # which imports this module first

    # PyTorch itself says for which device it was built.
    found = {"python": platform.python_version(), "fixpoint": fixpoint.__version__, "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Git commit of the checkout that this package runs from, "-dirty" with changes; None when it is not from one."""
    here = Path(__file__)
    try:
        # A package installed beneath somebody else's checkout is not tracked there.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def code_version(*packages: str) -> str:
    """What code these packages hold: the last commit that touched them, whatever was committed beside them since.

    Where they have been changed since that commit, or are not from a checkout, a hash of their Python files is added,
    or stands alone.

    Args:
        *packages: Names of importable packages.

    Example:
        >>> len(code_version("fixpoint")) >= 12
        True
    """
    folders = [Path(str(importlib.util.find_spec(name).submodule_search_locations[0])) for name in packages]  # type: ignore[union-attr,index]
    try:
        _git(folders[0], "ls-files", "--error-unmatch", "__init__.py")
        last = _git(folders[0], "log", "-1", "--format=%h", "--abbrev=12", "--", *map(str, folders))
        if not _git(folders[0], "status", "--porcelain", "--", *map(str, folders)):
            return last
    except (OSError, subprocess.SubprocessError):
        last = ""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder.parent)}\n".encode() + file.read_bytes())
    return f"{last}+{digest.hexdigest()[:12]}".removeprefix("+")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
