"""The progress bar."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

import fixpoint
from fixpoint import Picard, Progress, ProgressBar

SLOPE = torch.tensor([[0.0], [0.5]])


def f(z):
    return SLOPE * z + 1


def last_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err.replace("\r", "\n").rstrip("\n").split("\n")[-1]


def test_it_shows_evaluations_rows_left_and_the_worst_residual(capsys):
    sol = fixpoint.solve(f, torch.zeros(2, 1), solver=Picard(), rtol=1e-3, callback=ProgressBar("two rows"))
    line = last_line(capsys)
    for part in ("two rows", f"{sol.nfev}/100", "rows=0", f"residual={float(sol.residual.max()):.1e}"):
        assert part in line


def test_rows_left_are_counted_as_they_go(capsys):
    with ProgressBar() as bar:
        fixpoint.solve(f, torch.zeros(2, 1), solver=Picard(), max_evals=5, callback=bar, rtol=1e-9, on_failure="ignore")
    line = last_line(capsys)
    for part in ("5/5", "rows=1", "residual=6.2e-02"):
        assert part in line


def test_it_closes_when_the_solve_is_over_and_opens_anew_for_the_next():
    bar = ProgressBar()
    for z0 in (torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(0, 1)):
        fixpoint.solve(lambda z: 0.5 * z + 1, z0, callback=bar)
        assert bar._bar is None
    fixpoint.solve(f, torch.zeros(2, 1), rtol=0.0, max_evals=3, callback=bar, solver=Picard(), on_failure="ignore")
    assert bar._bar is None


def test_it_opens_once_for_a_solve_that_confirms_rows_it_had_left_out(monkeypatch):
    opened, tqdm = [], ProgressBar.tqdm
    monkeypatch.setattr(ProgressBar, "tqdm", staticmethod(lambda **options: opened.append(1) or tqdm(**options)))
    rates, seen = torch.linspace(0, 0.9, 16)[:, None], []
    bar = ProgressBar()

    def shown(progress):
        seen.append(progress.active)
        bar(progress)

    sol = fixpoint.solve(lambda z, rates: rates * z + 1, torch.zeros(16, 1), (rates,), solver=Picard(), callback=shown)
    assert len(seen) == sol.nfev
    assert 0 < seen[-2] <= 16  # all have ended, and are still to be confirmed
    assert seen.index(0) == len(seen) - 1
    assert (opened, bar._bar) == ([1], None)


@pytest.mark.parametrize("max_evals", [1, 2, 3, 10])
def test_it_closes_when_no_root_is_found(max_evals):
    bar = ProgressBar()
    fixpoint.root(torch.exp, torch.zeros(2, 1), max_evals=max_evals, callback=bar, on_failure="ignore")
    assert bar._bar is None


def test_a_with_block_closes_it_where_a_solve_is_interrupted():
    bar = ProgressBar()

    def interrupted(z):
        if bar._bar is not None and bar._bar.n == 2:
            raise KeyboardInterrupt
        return f(z)

    with pytest.raises(KeyboardInterrupt), bar:
        fixpoint.solve(interrupted, torch.zeros(2, 1), callback=bar, solver=Picard())
    assert bar._bar is None


def test_arrays_and_batch_shapes_are_shown_too(capsys):
    bar = ProgressBar()
    fixpoint.solve(np.cos, np.ones((2, 3)), callback=bar)
    assert "rows=0" in last_line(capsys)
    bar(Progress(nfev=1, max_evals=9, residual=torch.ones(2, 3), active=6, value=None))
    bar.close()
    assert "1/9" in last_line(capsys)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines_of_a_bar(stream, monkeypatch, *, seconds, steps):
    """How often a bar is drawn by so many steps that take so long, by tqdm's own clock."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with fixpoint.ProgressBar.tqdm(total=steps, file=stream) as bar:
        for _ in range(steps):
            now[0] += seconds / steps
            bar.update()
    assert f"{steps}/{steps}" in stream.getvalue()
    return stream.getvalue().count("\r")


def test_a_log_gets_a_line_every_half_minute_at_most(monkeypatch):
    assert 4 <= lines_of_a_bar(io.StringIO(), monkeypatch, seconds=150, steps=1000) <= 8
    assert lines_of_a_bar(Terminal(), monkeypatch, seconds=150, steps=1000) > 100


def test_a_bar_of_a_solve_goes_to_a_log_in_few_lines(capsys, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(now)))
    with ProgressBar() as bar:
        for nfev in range(1, 100):
            bar(Progress(nfev=nfev, max_evals=100, residual=torch.ones(1), active=1, value=None))
    assert capsys.readouterr().err.count("\r") <= 10


def test_notebooks_have_their_own_bar(monkeypatch):
    class Widget:
        __module__ = "tqdm.notebook"

        def __init__(self, iterable, **options):
            self.options = options

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    assert fixpoint.ProgressBar.tqdm(total=3).options == {"total": 3}


def test_without_tqdm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs tqdm: pip install "fixpoint-torch\[bench\]"'):
        fixpoint.solve(f, torch.zeros(2, 1), callback=ProgressBar())
