"""Write the tables of these pages that come from the code: ``python docs/make_tables.py``."""

from __future__ import annotations

from pathlib import Path

from fixpoint_diffusion.processes import SERVED
from fixpoint_diffusion.processes.scheduler_tables import DDIM_CLASSES, DDPM_CLASSES, OTHER_PROCESSES, SOLVER_CLASSES

PAGE = Path(__file__).parent / "diffusion.md"
HEAD = "| scheduler | steps of the chain | refused |\n|---|---|---|\n"


def schedulers() -> str:
    """The table of schedulers, as Markdown."""
    lines = [
        (names(DDIM_CLASSES), "its own, with any `eta` (in diffusers, `CogVideoXDDIMScheduler` ignores it)", ""),
        (
            names(DDPM_CLASSES),
            "its own, with every `variance_type`; DDIM's for `eta` below 1",
            "`fixed_large_log`, which gives NaN in diffusers",
        ),
    ]
    for name, served in SERVED.items():
        limits = [f"`{key}` other than {choices(allowed)}" for key, allowed in served.only.items()]
        lines.append((f"`{name}`", served.steps, "; ".join(limits)))
    others = [name for name in SOLVER_CLASSES if name not in SERVED]
    lines.append((names(others), "DDIM's, on the process that it describes: pass a `SamplerConfig`", "its own steps"))
    reasons: dict[str, list[str]] = {}
    for start, what in OTHER_PROCESSES.items():
        reasons.setdefault(what, []).append(f"{start}*")
    lines += [(names(starts) + (", but for those above" if what.startswith(("a flow", "noise levels")) else ""),
               "none", f"it describes {what}") for what, starts in reasons.items()]  # fmt: skip
    return HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def names(of: object) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in of)  # type: ignore[attr-defined]


def choices(allowed: tuple[object, ...]) -> str:
    """Values as code: ``1``, ``2`` or ``3``."""
    shown = [f"`{value}`" for value in allowed]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def replaced(page: str) -> str:
    """The page with the table as the code has it."""
    before, rest = page.split(HEAD)
    return before + schedulers() + rest[rest.index("\n\n") + 1 :]


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
