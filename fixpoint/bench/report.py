"""Pictures and one self-contained page from ``results.json`` alone: no figure is computed here."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from fixpoint.bench.compare import WHY_NOT
from fixpoint.bench.pictures import draw_bars, draw_images, draw_lines
from fixpoint.bench.results import Bars, Block, Images, Lines, Study, Table, shown


def render(results: Mapping[str, Any], out_dir: str | Path) -> Path:
    """Draw every block of curves, bars and images as a PNG and write ``report.html``, which embeds them.

    Args:
        results: What ``bench.run`` returned, or what ``results.json`` holds.
        out_dir: Folder for the pictures and the page; made if need be.

    Returns:
        Path: of ``report.html``.

    Raises:
        ValueError: If ``results`` has another format.
        ModuleNotFoundError: If matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from fixpoint import bench
        >>> results = bench.run(["linear:dim=20"], ["picard"])
        >>> bench.render(results, tempfile.mkdtemp()).name
        'report.html'
    """
    studies = _studies(results)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    sections = []
    for study in studies:
        body = [f'<p class="headline">{html.escape(study.headline)}</p>'] if study.headline else []
        body += [f"<p>{html.escape(study.summary)}</p>"] if study.summary else []
        # Charts that follow one another stand side by side where the page is wide enough.
        for charts, blocks in itertools.groupby(study.blocks, lambda block: isinstance(block, Lines | Bars)):
            drawn = "".join(_block(study, block, folder, names) for block in blocks)
            body.append(f'<div class="charts">{drawn}</div>' if charts else drawn)
        anchor = _slug(study.name)
        sections.append(f'<section id="{anchor}"><h2>{html.escape(study.title)}</h2>{"".join(body)}</section>')
    page = Template(_PAGE).substitute(
        title=html.escape(results.get("title", "fixpoint bench")),
        facts=html.escape(facts(results)),
        failures=_failures(results),
        contents="".join(
            f'<li><a href="#{_slug(study.name)}">{html.escape(study.title)}</a></li>' for study in studies
        ),
        sections="\n".join(sections),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def facts(results: Mapping[str, Any]) -> str:
    """One line: when, how long, on what machine, with which versions and commit."""
    machine, versions = results["machine"], results["versions"]
    parts = [
        f"{results['date']}, {results['seconds']:.0f} s" + (" (quick)" if results.get("quick") else ""),
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        ", ".join(f"{key} {value}" for key, value in versions.items()),
        f"commit {results['commit'] or 'unknown'}",
    ]
    return " · ".join(parts)


def main_tables(results: Mapping[str, Any]) -> str:
    """The first table of each study as plain text, for a terminal; those that an overview sums up are left out."""
    tables = [study.main_table for study in _studies(results) if not study.detail]
    return "\n\n".join(str(table) for table in tables if table is not None)


def reasons(results: Mapping[str, Any]) -> list[str]:
    """One line for each solve whose rows did not all converge: which, and why."""
    return [
        f"{study.name}, {solver} at rtol {rtol}: {why}"
        for study in _studies(results)
        for block in study.blocks
        if isinstance(block, Table) and block.title == WHY_NOT
        for solver, rtol, why in block.rows
    ]


def _studies(results: Mapping[str, Any]) -> list[Study]:
    if results.get("format") != 1:
        raise ValueError(
            f"expected results of format 1, as fixpoint bench writes them, found {results.get('format')!r}"
        )
    return [Study.from_json(study) for study in results["studies"]]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "untitled"


def _block(study: Study, block: Block, folder: Path, names: set[str]) -> str:
    caption = f"<figcaption>{html.escape(block.caption)}</figcaption>" if block.caption else ""
    heading = f"<h3>{html.escape(block.title)}</h3>" if isinstance(block, Table | Images) else ""  # charts bear theirs
    if isinstance(block, Table):
        return f"{heading}<figure>{_table_html(block)}{caption}</figure>"
    path = folder / f"{_unused(f'{_slug(study.name)}-{_slug(block.title)}', names)}.png"
    if isinstance(block, Lines):
        draw_lines(block, path)
    elif isinstance(block, Bars):
        draw_bars(block, path)
    else:
        draw_images(block, path)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img alt="{html.escape(block.title)}" src="data:image/png;base64,{data}">'
    return f"{heading}<figure>{picture}{caption}</figure>"


def _unused(stem: str, names: set[str]) -> str:
    """``stem``, numbered if another picture of this report bears it."""
    name, count = stem, 2
    while name in names:
        name, count = f"{stem}-{count}", count + 1
    names.add(name)
    return name


def _table_html(table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in table.numeric]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(table.columns, kinds, strict=True))
    rows = []
    for row in table.rows:
        cells = (f"<td{kind}>{html.escape(shown(cell))}</td>" for cell, kind in zip(row, kinds, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _failures(results: Mapping[str, Any]) -> str:
    if not results["failures"]:
        return ""
    lines = "".join(
        f"<li><code>{html.escape(failure['name'])}</code>: {html.escape(failure['error'])}</li>"
        for failure in results["failures"]
    )
    return f'<div class="failures"><strong>Studies that failed</strong><ul>{lines}</ul></div>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #ffffff; --line: #d9dee6; --link: #0b62a3;
  --alarm: #a8321c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --paper: #14181f; --line: #333c49;
  --link: #7cbcf0; --alarm: #ff9c82; } }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 2rem; margin: 0 0 .25rem; }
h2 { font-size: 1.4rem; margin: 3.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: var(--link); }
.facts, figcaption { color: var(--soft); font-size: .88rem; }
figure { margin: 0; }
figcaption { margin-top: .6rem; max-width: 46rem; }
.headline { font-size: 1.15rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem;
  align-items: start; margin: 2rem 0; }
img { display: block; max-width: 100%; }
.charts img { width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: bottom; }
th { border-bottom: 2px solid var(--line); font-weight: 600; }
td { border-bottom: 1px solid var(--line); white-space: nowrap; }
.number { text-align: right; }
.failures { border-left: 4px solid var(--alarm); padding: .1rem 1rem; margin: 1.5rem 0; }
.failures strong { color: var(--alarm); }
</style>
</head>
<body>
<h1>$title</h1>
<p class="facts">$facts</p>
$failures
<nav><ul>$contents</ul></nav>
$sections
</body>
</html>
"""
