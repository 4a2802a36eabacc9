"""What to sample and how: the one place where these options, their defaults, ranges and help texts stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

from fixpoint_cli.names import hint
from fixpoint_diffusion.options.kinds import check_kinds

_WORD = 2**64 - 1


class SolverName(StrEnum):
    """How a chain is solved: step after step, or all steps at once by a solver of ``fixpoint``."""

    sequential = "sequential"
    causal = "causal"
    picard = "picard"
    anderson = "anderson"
    broyden = "broyden"


class ImageFormat(StrEnum):
    """How a sampling run writes its images: arrays as sampled, or pictures of 8 bit."""

    npy = "npy"
    png = "png"


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    flag: str = "",
    parser: Callable[[str], Any] | None = None,
) -> Any:
    """A field of a dataclass that is an option of a command: its default, its range, and what the command says of it.

    Args:
        default: of the field, and of the option.
        help: the option's help text.
        low: the least value.
        high: the largest.
        flag: how the option is spelt, where that is not the field's name.
        parser: what reads it, where it takes more than one kind of value.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "flag": flag, "parser": parser})


def rows_or_auto(text: str) -> int | Literal["auto"]:
    """A number of rows, or ``"auto"``.

    >>> rows_or_auto("512"), rows_or_auto("auto")
    (512, 'auto')
    """
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise ValueError(f"expected a number or auto, got {text[:40]!r}") from None


def iterations_or_list(text: str) -> int | tuple[int, ...]:
    """A number of iterations, or one for each step, with commas.

    >>> iterations_or_list("4"), iterations_or_list("8,4,2")
    (4, (8, 4, 2))
    """
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected a number, or one for each step such as 8,4,2, got {text[:40]!r}") from None
    return counts[0] if len(counts) == 1 else counts


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What to sample and how. The help text of each option is in its field's metadata, where the command reads it.

    Image i depends on the seed, on i and on the other options, but not on ``num_images`` or ``batch_size`` (beyond
    rounding, and with a parallel solver beyond its tolerance).

    Raises:
        ValueError: for a value of another kind, out of its range, or not finite; the message names the option as the
            command spells it.

    >>> SamplingOptions(eta=float("nan"))
    Traceback (most recent call last):
    ...
    ValueError: --eta must be from 0.0 to 1.0, got nan
    """

    num_images: int | None = option(None, "How many images (default: 16, or all that --x-T holds).", low=1, high=_WORD)
    batch_size: int = option(256, "Most images at once; it does not change them.", low=1, high=100_000)
    steps: int = option(50, "Sampling steps.", low=1, high=10**6)
    eta: float = option(0.0, "Noise per step: 0 is DDIM, 1 as DDPM.", low=0.0, high=1.0)
    seed: int = option(0, "Seed of all noise.", low=0, high=_WORD)
    classes: str | None = option(
        None,
        "Classes by number or name, such as 7 or 0,3,7 or cats or all: image i gets the i-th, then they repeat.",
        flag="--class",
    )
    guidance: float = option(1.0, "Classifier-free guidance; 1 is none, more is more of it.", low=0.0)
    solver: SolverName = option(  # noqa: RUF009 - it returns a field
        SolverName.sequential, "sequential: step after step; others solve all steps at once."
    )
    rtol: float | None = option(None, "Parallel solvers: relative tolerance (default: 1e-3).", low=1e-12, high=1.0)
    noise_rtol: float | None = option(
        None, "causal: a latent may be off by this share of its step's noise too (with --eta).", low=0.0
    )
    probes: int | None = option(
        None,
        "causal: evaluate each step at so many displaced inputs too: fewer rounds of more rows.",
        low=1,
        high=64,
    )
    max_rounds: int | None = option(
        None, "Parallel solvers: most rounds (batched model calls) (default: steps + 1).", low=1, high=10**6
    )
    max_rows: int | Literal["auto"] | None = option(
        None,
        "causal: most model rows in a round, or auto: time the model (default: a rule of the solver).",
        low=1,
        high=10**9,
        parser=rows_or_auto,
    )
    no_clip: bool | None = option(
        None, "Do not clip predicted images, for noise that invert has found.", flag="--no-clip"
    )
    iterations: int | tuple[int, ...] | None = option(
        None,
        "FPDM: iterations per step, or one for each step, such as 8,4,4,2 (default: 4).",
        low=1,
        high=10**4,
        parser=iterations_or_list,
    )
    block_passes: int | None = option(
        None, "FPDM: cost of an image in passes of a block, in place of --iterations.", low=1, high=10**9
    )
    allocation: Literal["constant", "increasing", "decreasing", "adaptive"] | None = option(
        None, "FPDM: how the iterations are divided among the steps; increasing: more at low noise."
    )
    slope: float | None = option(
        None, "FPDM: from 0 to 2, steepness of an increasing or decreasing allocation (default: 1).", low=0.0, high=2.0
    )
    layer_rtol: float | None = option(
        None, "FPDM: iterate the layer to this relative tolerance, in place of --iterations.", low=1e-12, high=1.0
    )
    layer_solver: Literal["picard", "anderson", "broyden"] | None = option(
        None, "FPDM: solver of the layer (default: picard; with --layer-rtol or adaptive anderson)."
    )
    reuse: bool | None = option(
        None,
        "FPDM: start at the last step's solution (default: reuse). With --solver causal: chain and layers as one.",
        flag="--reuse/--no-reuse",
    )
    extrapolate: bool | None = option(
        None, "FPDM: start from the last two solutions, extrapolated.", flag="--extrapolate"
    )

    def __post_init__(self) -> None:
        check_kinds(self, flag)
        for each in fields(self):
            value, low, high = getattr(self, each.name), each.metadata["low"], each.metadata["high"]
            by_itself = value == "auto" and each.metadata["parser"] is rows_or_auto
            if value is None or by_itself or (low is None and high is None):
                continue
            least, most = -math.inf if low is None else low, math.inf if high is None else high
            for number in value if isinstance(value, tuple) else (value,):
                if not (least <= number <= most and math.isfinite(number)):  # NaN fails every comparison
                    bound = f"at least {low} and finite" if high is None else f"from {low} to {high}"
                    raise ValueError(f"{flag(each.name)} must be {bound}, got {number}")
        for name in ("max_rows", "noise_rtol", "probes"):
            if getattr(self, name) and self.solver != SolverName.causal:
                raise ValueError(f"{flag(name)} is for --solver causal, not for --solver {self.solver}")
        if self.solver == SolverName.sequential:
            for name in ("rtol", "max_rounds"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{flag(name)} is for parallel solvers such as --solver causal, not for sequential"
                    )
        if self.noise_rtol and not self.eta:
            raise ValueError("--noise-rtol needs --eta: without it, no step adds noise")
        check_guidance(self.guidance, self.classes)
        self._check_layer()

    @property
    def tolerance(self) -> float:
        """The relative tolerance of a parallel solver."""
        return 1e-3 if self.rtol is None else self.rtol

    def _check_layer(self) -> None:
        """Refuse options of an FPDM's layer that contradict each other."""
        counted = next((name for name in ("iterations", "block_passes", "allocation") if getattr(self, name)), None)
        if self.layer_rtol is not None and counted is not None:
            raise ValueError(f"--layer-rtol decides how many iterations a step takes: leave out {flag(counted)}")
        if self.iterations is not None and self.block_passes is not None:
            raise ValueError("--block-passes takes the place of --iterations: leave one of them out")
        if self.allocation is not None and isinstance(self.iterations, tuple):
            raise ValueError("--allocation divides a number of --iterations, and here they are listed: leave one out")
        if self.slope is not None and self.allocation not in ("increasing", "decreasing"):
            raise ValueError("--slope is for --allocation increasing or decreasing")
        if self.extrapolate and self.reuse is False:
            raise ValueError("--extrapolate is a way to reuse solutions: leave out --no-reuse")
        if self.solver == SolverName.sequential:
            return
        jointly = self.reuse and self.solver == SolverName.causal
        in_turn = ["block_passes", "allocation", "extrapolate"]
        in_turn += ["iterations"] if isinstance(self.iterations, tuple) else []
        in_turn += ["layer_rtol", "layer_solver"] if jointly else ["reuse"]
        for name in in_turn:
            if getattr(self, name):
                listed = " with a list" if name == "iterations" else ""
                raise ValueError(
                    f"{flag(name)}{listed} needs steps that follow each other: leave it out, or use --solver sequential"
                )
        for name in ("noise_rtol", "probes"):
            if jointly and getattr(self, name):
                raise ValueError(
                    f"{flag(name)} is for a chain alone, not for chain and layers as one: leave out --reuse"
                )
        if jointly and self.max_rows == "auto":
            raise ValueError("--max-rows auto times the model alone, not chain and layers as one: give a number")


def flag(name: str) -> str:
    """How the command line spells an option of :class:`SamplingOptions`.

    >>> flag("num_images"), flag("classes")
    ('--num-images', '--class')
    """
    given = {each.name: each.metadata["flag"] for each in fields(SamplingOptions)}[name]
    return given.partition("/")[0] or "--" + name.replace("_", "-")


def check_guidance(guidance: float, classes: str | None) -> None:
    """Refuse guidance without a class, or one that is not finite."""
    if not math.isfinite(guidance):
        raise ValueError(f"--guidance must be finite, got {guidance}")
    if guidance != 1 and classes is None:
        raise ValueError("--guidance needs --class: it strengthens the difference that a class makes")


def parse_classes(text: str, num_classes: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    """The classes that ``"7"``, ``"0,cats,7"`` or ``"all"`` means for a model of so many.

    Args:
        text: numbers and names, with commas; or a single name, which may hold commas itself.
        num_classes: how many classes the model has.
        names: their names by number, if it has any. Where a name is the number of another class, names alone are taken.

    Raises:
        ValueError: for anything else, or a class that the model does not have.

    >>> parse_classes("all", 3), parse_classes("2,0", 3), parse_classes("dogs,0", 2, ["cats", "dogs"])
    ((0, 1, 2), (2, 0), (1, 0))
    """
    if text.strip() == "all":
        return tuple(range(num_classes))
    numbers = {name: number for number, name in enumerate(names)}
    confusing = any(_is_number(name) and int(name) != number for name, number in numbers.items())
    parts = [text.strip()] if text.strip() in numbers else [part.strip() for part in text.split(",")]
    classes = []
    for part in parts:
        if part in numbers:
            classes.append(numbers[part])
        elif _is_number(part) and not confusing:
            classes.append(int(part))
        elif names:
            raise ValueError(
                f"--class: no class {part[:40]!r} in this model.{hint(part, names)}"
                + (" Numbers are not taken, since they are names here." if confusing else "")
            )
        else:
            raise ValueError(
                "--class takes the number of a class, several with commas, or all, such as 7 or 0,3,7; "
                f"got {text[:40]!r}; this model folder holds no names of classes"
            )
    if wrong := [number for number in classes if number >= num_classes]:
        raise ValueError(f"--class {wrong[0]}: the model's classes are 0 to {num_classes - 1}")
    return tuple(classes)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
