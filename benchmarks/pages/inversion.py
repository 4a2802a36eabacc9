"""Inversion: one table, and for one question a chart, from the results of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fixpoint.bench import Lines, Table

Results = Mapping[str, Any]


def inverted(
    settings: Mapping[str, str], methods: Sequence[str], figure: Callable[[Results], Any]
) -> Callable[[Results], tuple[None, Table]]:
    """What tables a question about inversion: methods by settings.

    Args:
        settings: heads of the columns, and how the cells of each are called before the method's name.
        methods: the rows.
        figure: what is shown of a cell.
    """

    def build(data: Results) -> tuple[None, Table]:
        def shown_of(prefix: str, method: str) -> Any:
            found = data["cells"].get(f"{prefix}, {method}")
            return None if found is None else figure(found)

        rows = [(method, *(shown_of(prefix, method) for prefix in settings.values())) for method in methods]
        return None, Table("", ("method", *settings), rows)

    return build


def rounds(data: Results) -> tuple[Lines, Table]:
    """Rounds until half of the images come back with an error of 1e-3, and the errors of 50 steps after each."""
    names = ("ours, parallel", "ours, stepwise", "DDIM inversion", "AIDI plain", "AIDI Anderson", "ReNoise", "GNRI")
    steps = (10, 50, 100, 1000)

    def points(count: int, name: str) -> list[tuple[int, float]]:
        cells = {key: cell for key, cell in data["cells"].items() if key.startswith(f"T={count}, {name}")}
        if name == "ours, parallel":
            (cell,) = cells.values()
            return [(look, _median(errors)) for look, errors in zip(cell["looks"], cell["curve"], strict=True)]
        exact = {f"T={count}, {name}", *(f"T={count}, {name}, {k}" for k in (2, 5, 10, 20, 50, 100))}
        exact |= {f"T={count}, {name}, to {tolerance}" for tolerance in ("1e-03", "1e-05")}
        return sorted((cell["rounds"], _median(cell["errors"])) for key, cell in cells.items() if key in exact)

    digits = sorted({len(cell["errors"]) for cell in data["cells"].values() if cell["steps"] == 50}, reverse=True)
    lines = Lines(
        f"Error of {' or '.join(map(str, digits))} digits, T = 50, median",
        {name: tuple(zip(*points(50, name), strict=True)) for name in names},
        "rounds",
        "error of the image, RMS",
        log_x=True,
    )

    def enough(count: int, name: str) -> int | None:
        found = points(count, name)
        above = [k for k, (_, error) in enumerate(found) if error > 1e-3]
        place = above[-1] + 1 if above else 0
        return found[place][0] if place < len(found) else None

    rows = [(name, *(enough(count, name) for count in steps)) for name in names]
    return lines, Table("", ("method", *(f"T={t}" for t in steps)), rows)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _came_back(cell: Results) -> str:
    return f"{sum(error <= cell['tolerance'] for error in cell['errors'])} of {len(cell['errors'])}"


def _noise(cell: Results) -> str:
    return f"{_median(cell['errors']):.0e}, {_median(cell['latents']):.2f}"


def _loss(cell: Results) -> str:
    return f"{sum(cell['best']) / len(cell['best']):.2g} in {cell['rounds']}"


def _gradient(cell: Results) -> str:
    return f"{cell['noise']['cosine']:.2f}, {cell['costs']['rounds']} rounds, {cell['costs']['seconds']:.2f} s"


# By the name of the table: what makes it, and the results that it is made from.
PAGES = {
    "inversion-rounds": (rounds, "inversion-rounds.json"),
    "inversion-latents": (
        inverted(
            {f"T={t}": f"T={t}" for t in (10, 20, 50, 100)},
            ("ours, parallel", "ours, stepwise", "DDIM inversion", "AIDI Anderson, 10", "ReNoise, 10"),
            _noise,
        ),
        "inversion-latents.json",
    ),
    "inversion-guidance": (
        inverted(
            {"none": "T=50 mixture", "3": "T=50 guidance 3 mixture", "7.5": "T=50 guidance 7.5 mixture"},
            (
                "ours, parallel",
                "ours, stepwise",
                "DDIM inversion",
                "AIDI plain, 10",
                "AIDI Anderson, 10",
                "ReNoise, 10",
            ),
            _came_back,
        ),
        "inversion-guidance.json",
    ),
    "inversion-stochastic": (
        inverted(
            {f"T={t}, eta={eta}": f"T={t} eta={eta}" for t in (10, 50) for eta in (0.5, 1)},
            ("ours, parallel", "ours, stepwise", "ours, drawn", "DDIM inversion", "AIDI Anderson, 5"),
            lambda cell: f"{_median(cell['errors']):.0e}",
        ),
        "inversion-stochastic.json",
    ),
    "inversion-reversible": (
        inverted(
            {f"T={t}": f"T={t}" for t in (10, 20, 50, 100)},
            ("EDICT", "BDIA", "O-BELM (ours)", "Rex"),
            lambda cell: ", ".join(
                f"{_median(cell[name]):{form}}"
                for name, form in (("images", ".0e"), ("spread", ".2g"), ("from_ddim", ".2g"))
            ),
        ),
        "inversion-reversible.json",
    ),
    "inversion-gradients": (
        inverted(
            {"T=10": "T=10", "T=50": "T=50"},
            (
                "sequential",
                "exact, IFT(rtol=1e-6)",
                "one step, JFB()",
                "phantom, k=5, tau=0.5",
                "phantom, k=1, tau=0.1",
                "linear term",
            ),
            _gradient,
        ),
        "inversion-gradients.json",
    ),
    "inversion-descent": (
        inverted(
            {f"T={t}": f"T={t}" for t in (10, 20, 50)},
            ("baseline", "paper", "released code", "ours, parallel"),
            _loss,
        ),
        "inversion-descent.json",
    ),
    "inversion-cost": (
        inverted(
            {"one digit": "T=50, 1 digits", "eight digits": "T=50, 8 digits"},
            ("ours, parallel", "ours, stepwise", "DDIM inversion", "AIDI Anderson, 5"),
            lambda cell: f"{cell['seconds']:.2f} s, {cell['bytes'] / 2**20:.1f} MiB",
        ),
        "inversion-cost.json",
    ),
}
