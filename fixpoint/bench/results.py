"""Experiments as data: tables, curves and picture grids that live in ``results.json``."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fixpoint.plotting import draw_curves, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Rows of figures. A cell is a string, a number, a bool or None (shown as a dash).

    Example:
        >>> print(Table("Costs", ("solver", "evals"), (("Picard", 85), ("Anderson", 34))))
        Costs
        solver    evals
        --------  -----
        Picard       85
        Anderson     34
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: a row has {len(row)} cells for {len(self.columns)} columns: {row}"
                )

    def __str__(self) -> str:
        """Aligned plain text."""
        cells = [[shown(cell) for cell in row] for row in self.rows]
        widths = [max([len(head), *(len(row[i]) for row in cells)]) for i, head in enumerate(self.columns)]
        numeric = self.numeric

        def line(row: Sequence[str]) -> str:
            padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
            return "  ".join(padded).rstrip()

        return "\n".join([self.title, line(self.columns), line(["-" * width for width in widths]), *map(line, cells)])

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and are aligned to the right."""
        return [
            any(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in column)
            for column in ([row[i] for row in self.rows] for i in range(len(self.columns)))
        ]


def shown(cell: Cell) -> str:
    """A cell as text: three digits of a float, more where they stand before the point; a dash for None."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.0f}" if 1e3 <= abs(cell) < 1e6 else f"{cell:.3g}"


@dataclass(frozen=True)
class Lines:
    """Curves ``{label: (x, y)}`` with x and y of equal length; a y of None or NaN leaves a gap.

    Attributes:
        log_x, log_y: Logarithmic axes.
        marks: ``{label: x}``, vertical lines for what has a cost and no curve.

    Example:
        >>> Lines("Residual", {"Picard": ([1, 2], [0.5, 0.25])}, "evaluations", "residual").log_y
        True
    """

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]
    x_label: str
    y_label: str
    log_y: bool = True
    caption: str = ""
    log_x: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, (x, y) in self.series.items():
            if len(x) != len(y):
                raise ValueError(f"lines {self.title!r}: {label!r} has {len(x)} x for {len(y)} y")


@dataclass(frozen=True)
class Bars:
    """One bar for each label, from the top down; None leaves its place empty.

    Attributes:
        values: ``{label: length}``.
        x_label: What the length means.
        reference: The label of the bar that others are compared with, drawn in grey.

    Example:
        >>> Bars("Time", {"sequential": 9.8, "parallel": 3.4}, "seconds", reference="sequential").title
        'Time'
    """

    title: str
    values: Mapping[str, float | None]
    x_label: str
    caption: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Images:
    """A grid of small pictures as 8-bit integers; make one with ``Images.of``.

    Attributes:
        shape: ``(rows, columns, height, width)``, or with a last 3 for colour.
        pixels: Base64 of the uint8 array of that shape.

    Example:
        >>> import torch
        >>> from fixpoint import bench
        >>> bench.Images.of("noise", torch.rand(2, 5, 8, 8)).shape
        (2, 5, 8, 8)
    """

    title: str
    row_labels: Sequence[str]
    column_labels: Sequence[str]
    shape: Sequence[int]
    pixels: str
    caption: str = ""

    @classmethod
    def of(
        cls,
        title: str,
        images: Tensor,
        *,
        row_labels: Sequence[str] = (),
        column_labels: Sequence[str] = (),
        low: float = -1.0,
        high: float = 1.0,
        caption: str = "",
    ) -> Images:
        """Quantise a grid of images.

        Args:
            title: Heading, and name of the picture's file.
            images: ``(rows, columns, channels, height, width)`` with 1 or 3 channels, or without the channels.
            row_labels, column_labels: One for each row and column, or none.
            low, high: The values that become black and white; anything outside is clipped.
            caption: How to read the picture.

        Raises:
            ValueError: If the shape or the number of labels does not fit.

        Example:
            >>> grid = Images.of("Noise", torch.zeros(2, 3, 1, 8, 8), row_labels=["a", "b"])
            >>> grid.shape, int(grid.array()[0, 0, 0, 0])
            ((2, 3, 8, 8), 128)
        """
        if images.ndim == 5 and images.shape[2] in (1, 3):
            images = images[:, :, 0] if images.shape[2] == 1 else images.movedim(2, -1)
        elif images.ndim != 4:
            raise ValueError(
                f"images {title!r}: expected (rows, columns[, 1 or 3], height, width), found {tuple(images.shape)}"
            )
        for name, labels, size in (("row", row_labels, images.shape[0]), ("column", column_labels, images.shape[1])):
            if labels and len(labels) != size:
                raise ValueError(f"images {title!r}: {len(labels)} {name} labels for {size} {name}s")
        unit = (images.detach().to("cpu", torch.float32) - low) / (high - low)
        integers = (unit.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        pixels = base64.b64encode(integers.numpy().tobytes()).decode("ascii")
        return cls(title, tuple(row_labels), tuple(column_labels), tuple(integers.shape), pixels, caption)

    def array(self) -> Tensor:
        """The uint8 tensor of ``shape``."""
        return torch.frombuffer(bytearray(base64.b64decode(self.pixels)), dtype=torch.uint8).reshape(tuple(self.shape))


Block = Table | Lines | Bars | Images
_BLOCKS: Mapping[str, type[Block]] = {"table": Table, "lines": Lines, "bars": Bars, "images": Images}


@dataclass(frozen=True)
class Study:
    """One experiment: a name for files and anchors, a title, and blocks in reading order, the main table first.

    ``print(study)`` shows its tables, ``study.plot()`` its first curves.

    Attributes:
        summary: What was asked and how, in a sentence or two.
        headline: What came out, in one line.
        detail: True where another study sums this one up, so that its table is not printed in the terminal.

    Example:
        See :func:`fixpoint.bench.compare`, which returns one.
    """

    name: str
    title: str
    blocks: Sequence[Block]
    summary: str = ""
    detail: bool = False
    headline: str = ""

    def __str__(self) -> str:
        """Title, headline and tables as plain text."""
        tables = (str(block) for block in self.blocks if isinstance(block, Table))
        return "\n\n".join(part for part in (self.title, self.headline, *tables) if part)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the first curves of the study.

        Args:
            ax: Where to draw; None makes a figure.

        Raises:
            ValueError: If the study has no curves.
            ModuleNotFoundError: If matplotlib is missing.

        Example:
            See :func:`fixpoint.bench.compare`.
        """
        lines = next((block for block in self.blocks if isinstance(block, Lines)), None)
        if lines is None:
            raise ValueError(f"the study {self.name!r} has no curves")
        ax = new_axes() if ax is None else ax
        draw_curves(ax, lines)
        if lines.series or lines.marks:
            ax.legend()
        return ax

    @property
    def main_table(self) -> Table | None:
        """The first table."""
        return next((block for block in self.blocks if isinstance(block, Table)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers."""
        kinds = {block_type: kind for kind, block_type in _BLOCKS.items()}
        blocks = [{"kind": kinds[type(block)], **asdict(block)} for block in self.blocks]
        return plain({**asdict(replace(self, blocks=())), "blocks": blocks})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Study:
        """The study that ``to_json`` wrote."""
        blocks = [
            _BLOCKS[block["kind"]](**{key: value for key, value in block.items() if key != "kind"})
            for block in data["blocks"]
        ]
        return cls(**{**data, "blocks": blocks})


def plain(value: Any) -> Any:
    """``value`` as strict JSON knows it: tensors, arrays and tuples become lists, NaN and infinities None.

    Example:
        >>> import torch
        >>> from fixpoint import bench
        >>> bench.plain({"x": torch.tensor([1.0, float("nan")])})
        {'x': [1.0, None]}
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, tuple | list | range):
        return [plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
