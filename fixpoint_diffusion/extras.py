"""Libraries that not everybody has: imported where they are used, and named with the line that installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTION = "fixpoint-torch"


def install_line(extra: str = "diffusion") -> str:
    """What to type for the libraries of one of the distribution's extras.

    >>> install_line()
    "pip install 'fixpoint-torch[diffusion]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    with needed_for("the size of the machine's memory"):
        from psutil import virtual_memory

    return int(virtual_memory().total)


@contextmanager
def needed_for(work: str, extra: str = "diffusion") -> Iterator[None]:
    """Import optional libraries in this block; one that is missing is named, with the line that installs it.

    Args:
        work: what needs them, for the message, such as ``"training"``.
        extra: the extra of the distribution that brings them.

    Raises:
        ModuleNotFoundError: if one is missing.

    Example:
        >>> with needed_for("reading weights"):
        ...     import safetensors
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{work} needs {error.name}: {install_line(extra)}"
        raise ModuleNotFoundError(message, name=error.name) from error
