"""A folder's SHA256SUMS file, in the format of the command ``sha256sum``."""

from __future__ import annotations

from pathlib import Path

from fixpoint_diffusion.files import sha256_of

CHECKSUM_FILE = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write the checksums of all other files directly in ``folder``."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUM_FILE)
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in names]
    (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def verify_checksums(folder: Path) -> list[str]:
    """Check every file that ``folder``'s checksum file lists, and return their names.

    Raises:
        FileNotFoundError: if there is no checksum file.
        ValueError: if a listed file is missing or differs; the message names the files and the cure.
    """
    listing = folder / CHECKSUM_FILE
    if not listing.is_file():
        raise FileNotFoundError(f"{folder} has no {CHECKSUM_FILE}")
    names, wrong = [], []
    for line in listing.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        names.append(name)
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(folder / name) != expected:
            wrong.append(f"{name} differs")
    if wrong:
        raise ValueError(f"{folder} does not match its {CHECKSUM_FILE}: {', '.join(wrong)}; fetch the folder again")
    return names
