from __future__ import annotations

import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import fixpoint
from fixpoint.plotting import plot_residuals

TRACE = torch.tensor([[4.0, 2.0, 1.0], [0.4, 0.1, 0.2]])


@pytest.fixture
def ax():
    return Figure().subplots()


def heights(band, evaluations):
    edge = band.get_paths()[0].vertices
    here = edge[edge[:, 0] == evaluations, 1]
    return here.min(), here.max()


def test_it_draws_the_median_row_and_bands_of_the_middle_half_and_of_all(ax):
    trace = torch.stack([TRACE[0], TRACE[1]]).repeat_interleave(torch.tensor([1, 2, 1]), dim=1)  # four rows
    assert plot_residuals(trace, ax) is ax
    (line,), (all_rows, middle) = ax.lines, ax.collections
    np.testing.assert_allclose(line.get_xydata(), [[1, 2.0], [2, 0.15]], rtol=1e-6)
    for evaluations in (1, 2):
        values = trace[evaluations - 1].double().numpy()
        np.testing.assert_allclose(heights(all_rows, evaluations), [values.min(), values.max()], rtol=1e-6)
        np.testing.assert_allclose(heights(middle, evaluations), np.quantile(values, [0.25, 0.75]), rtol=1e-6)
    assert ax.get_yscale() == "log"


def test_a_broken_row_and_an_exact_zero_spoil_neither_line_nor_bands(ax):
    trace = torch.tensor([[1.0, 2.0, 4.0, torch.nan], [0.1, 0.2, torch.inf, 0.0]])
    plot_residuals(trace, ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 0.15], rtol=1e-6)
    np.testing.assert_allclose(heights(ax.collections[0], 1), [1, 4], rtol=1e-6)
    np.testing.assert_allclose(heights(ax.collections[0], 2), [0.1, 0.2], rtol=1e-6)


def test_the_bands_can_be_left_out_and_a_single_row_has_none(ax):
    plot_residuals(TRACE, ax, band=False)
    plot_residuals(TRACE[:, 0], ax)
    assert len(ax.lines) == 2
    assert not ax.collections


def test_batches_of_any_shape_and_solutions_are_drawn_under_their_labels(ax):
    sol = fixpoint.solve(torch.cos, torch.ones(2, 3, 4), batch_dims=2, record=True)
    plot_residuals({"solved": sol, "trace": TRACE.reshape(2, 1, 3)}, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["solved", "trace"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(sol.trace.reshape(sol.nfev, 6).numpy(), axis=1))


def test_without_axes_it_makes_a_figure(monkeypatch):
    mpl.use("Agg")
    assert plot_residuals(TRACE).figure is not None


def test_a_solution_without_a_trace_is_refused_with_what_to_do(ax):
    with pytest.raises(ValueError, match="'x' has no trace: solve with record=True"):
        plot_residuals({"x": fixpoint.solve(torch.cos, torch.ones(2))}, ax)
    with pytest.raises(ValueError, match=r"must have shape \(nfev, \*batch\), found \(0, 3\)"):
        plot_residuals(torch.zeros(0, 3), ax)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fixpoint-torch\[bench\]"'):
        plot_residuals(TRACE)
