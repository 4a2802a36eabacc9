"""What came out, from the JSON alone: a table, pictures, and the page of the documentation that shows the newest.

    python -m benchmarks.device.report [FOLDER]

Draws into FOLDER. For a folder under ``benchmarks/results/device``, and without one, the page is written anew:
``newest.md`` there, which ``docs/device.md`` includes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "device"
PARTS = ("correct", "overhead", "chains", "batch_cost", "fpdm")
NOT_YET = "Not yet measured on a GPU."
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def load(folder: Path) -> dict[str, Any]:
    """The summary and every part's document by name; empty where a part wrote none."""
    names = ("summary", *PARTS)
    return {
        name: json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").is_file() else {}
        for name in names
    }


def table(folder: Path) -> str:
    """Where it ran, how each part ended, and its figures."""
    found = load(folder)
    summary = found["summary"]
    versions = summary.get("versions", {})
    lines = [
        f"{summary.get('device')}, driver {summary.get('driver')}, torch {versions.get('torch')}, "
        f"commit {summary.get('commit')}, {summary.get('date')}" + (", rehearsal" if summary.get("rehearsal") else ""),
        "",
    ]
    for name, part in summary.get("parts", {}).items():
        lines.append(f"{name:12} {part['status']}, {part['seconds']:.0f} s of {part['limit']:.0f} s")
        lines += [f"    failed: {each['what']}: {each['error']}" for each in part["errors"][:8]]
        left_out = part["left_out"]
        lines += [f"    left out: {each['what']}: {each['why']}" for each in left_out[:4]]
        lines += [f"    and {len(left_out) - 4} more left out, listed in the JSON"] if len(left_out) > 4 else []
    for name in PARTS:
        lines += ["", *_SECTIONS[name](found[name])] if found[name] else []
    return "\n".join(lines)


def _columns(rows: Sequence[dict[str, Any]], heads: Sequence[str]) -> list[str]:
    """A line for each row; the first column is as wide as it needs to be."""
    cells = [[*heads], *([_shown(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _correct(document: dict[str, Any]) -> list[str]:
    cases = document.get("cases", [])
    wrong = [each for each in cases if not each["ok"]]
    lines = [f"Correct: {len(cases) - len(wrong)} of {len(cases)} cases agree with the CPU"]
    lines += [f"    {each['case']} in {each['dtype']}: differs by {_shown(each['difference'])}" for each in wrong]
    for tests in document.get("tests", []):
        counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        lines.append(f"Tests on the device: {counts}; ended {tests['ended']}")
    return lines + [f"    {each['test']}: {each['error']}" for each in document.get("failed_tests", [])[:10]]


def _overhead(document: dict[str, Any]) -> list[str]:
    lines = [f"{'PASS' if e['met'] else 'FAIL'}  {e['check']}: {e['found']}" for e in document.get("checks", [])]
    times = document.get("times", [])
    sizes = list(dict.fromkeys(f"{each['rows']} x {each['dim']}" for each in times))
    rows: dict[str, dict[str, Any]] = {}
    for each in times:
        name = rows.setdefault(each["name"], {"ms per evaluation beyond f": each["name"]})
        name[f"{each['rows']} x {each['dim']}"] = each["milliseconds"]
    lines += ["", *_columns(list(rows.values()), ["ms per evaluation beyond f", *sizes])] if rows else []
    launches = [each | {"per evaluation": each["name"]} for each in document.get("launches", [])]
    return [*lines, "", *_columns(launches, ["per evaluation", "operations", "launches", "waits"])]


def _chains(document: dict[str, Any]) -> list[str]:
    heads = ["network", "dtype", "steps", "batch", "eta", "max_rows", "probes", "sequential_graph"]
    heads += ["sequential_compiled", "ours", "times", "rounds", "rows_per_step", "peak_bytes", "error", "rounding"]
    return [
        "Chains: seconds; times: how many times as fast as the faster ordinary sampler; rounding: its two forms apart",
        *_columns(document.get("cells", []), heads),
        *_columns(document.get("training", []), ["network", "steps", "seconds", "first_loss", "last_loss"]),
    ]


def _batch_cost(document: dict[str, Any]) -> list[str]:
    return [
        "Batch cost",
        *_columns(document.get("curve", []), ["network", "dtype", "rows", "milliseconds", "peak_bytes"]),
    ]


def _fpdm(document: dict[str, Any]) -> list[str]:
    heads = ["name", "no_grad", "batch", "parameters", "seconds", "longest", "peak_bytes"]
    return ["FPDM: a training step", *_columns(document.get("steps", []), heads)]


_SECTIONS = {"correct": _correct, "overhead": _overhead, "chains": _chains, "batch_cost": _batch_cost, "fpdm": _fpdm}


def pictures(folder: Path) -> list[Path]:
    """Draw what there are figures for; the files."""
    from matplotlib.figure import Figure

    drawn = []
    for name, curves in _curves(load(folder)).items():
        if not curves["series"]:
            continue
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for index, (label, points) in enumerate(curves["series"].items()):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", color=_COLOURS[index % len(_COLOURS)], label=label, markersize=4)
        axes.set(xlabel=curves["x"], ylabel=curves["y"], xscale=curves["scale"], yscale="log", title=curves["title"])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        drawn.append(folder / f"{name}.png")
        figure.savefig(drawn[-1], dpi=110)
    return drawn


def _curves(found: dict[str, Any]) -> dict[str, Any]:
    """Points to draw, by picture and label."""
    overhead: dict[str, list[tuple[float, float]]] = {}
    for each in found["overhead"].get("times", []):
        if each["milliseconds"] and each["milliseconds"] > 0:
            overhead.setdefault(each["name"], []).append((each["rows"] * each["dim"], each["milliseconds"]))
    chains: dict[str, list[tuple[float, float]]] = {}
    for each in found["chains"].get("cells", []):
        if each["max_rows"] is None and not each["probes"] and each["times"]:
            label = f"{each['network']} {each['dtype']}, batch {each['batch']}, eta {each['eta']:g}"
            chains.setdefault(label, []).append((each["steps"], each["times"]))
    cost: dict[str, list[tuple[float, float]]] = {}
    for each in found["batch_cost"].get("curve", []):
        cost.setdefault(f"{each['network']} {each['dtype']}", []).append((each["rows"], each["milliseconds"]))
    steps: dict[str, list[tuple[float, float]]] = {}
    for each in found["fpdm"].get("steps", []):
        for n in [each["no_grad"]] if each["no_grad"] is not None else [0, 24]:
            steps.setdefault(each["name"], []).append((n, each["seconds"]))
    device = found["summary"].get("device", "")
    return {
        "overhead": {
            "series": overhead, "x": "entries of the state", "y": "ms per evaluation beyond f", "scale": "log",
            "title": device,
        },
        "chains": {
            "series": chains, "x": "steps of the chain", "y": "times as fast as the ordinary sampler", "scale": "log",
            "title": device,
        },
        "batch_cost": {"series": cost, "x": "rows of a call", "y": "ms", "scale": "log", "title": device},
        "fpdm": {"series": steps, "x": "N", "y": "seconds of a training step", "scale": "linear", "title": device},
    }  # fmt: skip


def newest(results: Path = RESULTS) -> Path | None:
    """The folder with the last date that holds a run on a GPU; None where there is none."""
    folders = [path.parent for path in results.glob("*/summary.json")]
    measured = [path for path in folders if not json.loads((path / "summary.json").read_text()).get("rehearsal")]
    return max(measured, key=lambda path: path.name, default=None)


def page(results: Path = RESULTS) -> str:
    """What the documentation shows."""
    folder = newest(results)
    if folder is None:
        return f"**{NOT_YET}**\n"
    shown = [
        f"![{path.stem}](../benchmarks/results/device/{folder.name}/{path.name})"
        for path in sorted(folder.glob("*.png"))
    ]
    return "\n\n".join([f"Measured on {folder.name}:", f"```text\n{table(folder)}\n```", *shown]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a folder's pictures, and write the page where the folder is one of the committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what run.sh wrote")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        print(table(options.folder))
        for path in pictures(options.folder):
            print(path)
    if options.folder is None or options.folder.resolve().parent == RESULTS.resolve():
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "newest.md").write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
