"""The gradient benchmark: its reference, what it counts, and what it makes of the counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fixpoint
from benchmarks.gradients import __main__ as cli
from benchmarks.gradients import cells, experiments, matching, measuring, methods, report
from benchmarks.gradients.cells import Cell, Setting, Tanh
from benchmarks.gradients.matching import Match
from benchmarks.gradients.measuring import Counted, Figures, SavedBytes
from benchmarks.gradients.methods import LEVELS, OURS, PEER, RUNGS, Family, Method
from benchmarks.gradients.reference import dense_jacobian, exact_gradient, slope


class Affine(Cell):
    """``gain W z + x`` in three dimensions."""

    shape = (3,)

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = self.draw(generator, 3, 3, fan_in=3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.gain * (z @ self.weight.T) + x


class SmallTanh(Affine):
    """The same through a tanh."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(z, x))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Cell]]:
    """Two small cells in place of the three."""
    chosen: dict[str, type[Cell]] = {"affine": Affine, "small": SmallTanh}
    monkeypatch.setattr(cells, "CELLS", chosen)
    monkeypatch.setattr(cells, "_POWER_STEPS", 40)
    monkeypatch.setattr(cli, "CELLS", chosen)
    return chosen


def test_the_reference_is_the_closed_form_of_an_affine_cell(small: object) -> None:
    posed = cells.setting("affine", 0.9, rows=2)
    matrix = torch.eye(3, dtype=torch.float64) - posed.cell.gain * posed.cell.weight.detach()
    z, adjoint = torch.linalg.solve(matrix, posed.x.T).T, torch.linalg.solve(matrix.T, posed.target.T).T
    expected = torch.cat([adjoint.flatten(), (posed.cell.gain * adjoint.T @ z).flatten()])
    exact = exact_gradient(posed)
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-10)
    direction = [torch.ones_like(posed.x), -torch.ones_like(posed.cell.weight)]
    along = float(exact @ torch.cat([part.flatten() for part in direction]))
    assert slope(posed, direction) == pytest.approx(along, rel=1e-6)


@pytest.mark.parametrize("name", cells.CELLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_cells_are_scaled_to_the_radius_and_rows_are_apart(name: str) -> None:
    posed = cells.setting(name, 0.9, rows=2)
    z = torch.zeros_like(posed.x)
    z = fixpoint.solve(posed.cell, z, (posed.x,), rtol=1e-9, max_evals=1000, backward=None).value
    jacobian = dense_jacobian(posed.cell, z, posed.x)
    assert float(torch.linalg.eigvals(jacobian).abs().max()) == pytest.approx(0.9, abs=2e-3)
    assert posed.radius == pytest.approx(0.9, abs=1e-3)
    alone = torch.func.jacrev(lambda z: posed.cell(z, posed.x[1:]).flatten())(z[1:]).reshape(jacobian[1].shape)
    torch.testing.assert_close(jacobian[1], alone)


def test_bytes_kept_are_counted_once_while_they_are_kept_and_not_for_what_is_free() -> None:
    weight = torch.ones(10, requires_grad=True)
    with SavedBytes([weight]) as saved:
        image = (weight * 2).sin()  # keeps its input, of 40 bytes
        assert saved.bytes == 40
        product = image * image[:5].sum()  # keeps both: 40 bytes and one number
        assert saved.bytes == 84
        square = image.square()  # keeps its input once more
        assert saved.bytes == 84
        free = weight.square()
        assert saved.bytes == 84
        del product, square, free
        assert saved.bytes == 40


def counted(method: Method) -> tuple[int, int]:
    posed = Setting(
        name="tanh", radius=0.0, cell=Tanh(torch.Generator().manual_seed(0)), x=X, target=torch.ones_like(X)
    )
    cell = Counted(posed.cell)
    measuring.gradient(posed, method, cell)
    return cell.evaluations, cell.products


X = torch.randn(2, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::fixpoint.ConvergenceWarning")
def test_evaluations_and_products_by_hand() -> None:
    plain = {"solver": fixpoint.Picard(), "rtol": 0.0, "max_evals": 7}
    assert counted(Method(name="", run=methods.ours(fixpoint.JFB(), **plain))) == (8, 1)
    assert counted(Method(name="", run=methods.ours(fixpoint.Phantom(steps=3), **plain))) == (10, 3)
    # The first term is v itself; the last product takes u to the parameters.
    assert counted(Method(name="", run=methods.ours(fixpoint.Neumann(terms=3), **plain))) == (8, 3)
    rule = fixpoint.IFT(solver=fixpoint.Picard(), rtol=0.0, max_evals=5)
    assert counted(Method(name="", run=methods.ours(rule, **plain))) == (8, 6)
    rule = fixpoint.MultiStepJFB(no_grad=4, grad=2)
    assert counted(Method(name="", run=methods.ours(rule, **plain))) == (6, 2)
    # The first evaluation, at z0, gives nobody a gradient.
    assert counted(Method(name="", run=methods.ours(fixpoint.Unroll(), **plain))) == (7, 6)


@pytest.mark.parametrize("method", methods.rules_at_depth(30), ids=lambda method: method.name)
def test_rules_at_a_depth_make_so_many_evaluations(method: Method) -> None:
    recorded = {"Unroll()": 0, "Phantom(steps=5)": 5, "torchdeq phantom, grad=5": 5, "torchdeq ift": 2}
    evaluations, products = counted(method)
    extra = products if "JFB(n" in method.name else recorded.get(method.name, 1)
    assert evaluations == 30 + extra


def test_every_rule_has_the_error_that_theory_gives_it(small: object) -> None:
    posed = cells.setting("small", 0.9, rows=2)
    exact, single = exact_gradient(posed), posed.cast(torch.float32)
    found = {method.name: measuring.measure(single, method, exact) for method in methods.rules()}
    error = {name: figures.error for name, figures in found.items()}
    for name in ("IFT()", "torchdeq ift", "torchdeq hook_ift"):
        assert error[name] < 1e-4
    assert error["JFB()"] == pytest.approx(error["torchdeq phantom, grad=1"], rel=1e-3)
    for name in ("Neumann(terms=5)", "torchdeq phantom, grad=5", "MultiStepJFB(no_grad=20, grad=5)"):
        assert error[name] == pytest.approx(error["Phantom(steps=5)"], rel=1e-2)
    assert 1e-2 < error["Phantom(steps=5)"] < error["JFB()"] < 1
    assert found["Neumann(terms=5)"].saved == found["JFB()"].saved < found["Phantom(steps=5)"].saved
    assert found["Unroll()"].saved > 5 * found["Phantom(steps=5)"].saved


def test_methods_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order, times = [], iter([9.0, 9.0, 1.0, 10.0, 5.0, 20.0, 2.0, 60.0])

    def timed(setting: object, method: Method) -> tuple[float, float]:
        order.append(method.name)
        each = next(times)
        return each, 2 * each

    monkeypatch.setattr(measuring, "_timed", timed)
    found = measuring.seconds(None, [Method(name="a", run=None), Method(name="b", run=None)], rounds=3)  # type: ignore[arg-type]
    assert order == ["a", "b"] * 4
    assert found == {"a": (2.0, 4.0), "b": (20.0, 40.0)}


def ladder(errors: Callable[[float], float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rungs' errors for a family whose error is a function of the tolerance."""
    family = Family(library=OURS, solver="Picard", forms={"IFT": lambda rtol: rtol})  # type: ignore[dict-item, return-value]
    monkeypatch.setattr(matching, "gradient", lambda setting, method: torch.tensor([1 + errors(method.run)]))
    return matching.errors_by_rung(None, family, torch.ones(1))  # type: ignore[arg-type]


def test_rungs_end_at_the_last_level_or_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = ladder(lambda rtol: 9 * rtol, monkeypatch)
    assert errors[-1] <= LEVELS[-1] < errors[-2]
    needed = matching.needed_rtols({"it": errors}, 1e-3)
    assert needed["it"] == pytest.approx(1e-4, rel=0.01)
    assert len(ladder(lambda rtol: 0.5, monkeypatch)) == 5
    assert matching.needed_rtols({"it": [0.5] * 5}, 1e-3) == {}


def test_ratios_are_of_the_fastest_or_of_one_solver() -> None:
    seconds = {f"{OURS}, Anderson": 2.0, f"{OURS}, Picard": 1.0, f"{PEER}, Anderson": 1.6, f"{PEER}, Broyden": 4.0}
    match = Match(level=1e-3, seconds=seconds, rtols={})
    assert (match.ratio(), match.ratio("Anderson")) == (1 / 1.6, 2 / 1.6)
    assert (match.ratio("Broyden"), match.ratio("Picard")) == (math.inf, 0.0)
    assert math.isnan(replace(match, seconds={}).ratio())


def outcome(*, tight: float = 1e-6, mine: float = 1.0) -> experiments.Outcome:
    """Made-up figures: an exact gradient takes us ``mine`` seconds with each solver, and torchdeq one."""
    figures = Figures(error=1e-6, evaluations=10, products=9, saved=100, peak=200, seconds=(0.5, 1.5))
    seconds = {
        f"{library}, {name}": mine if library == OURS else 1.0 for library in (OURS, PEER) for name in methods.SOLVERS
    }
    return experiments.Outcome(
        cell="tanh",
        radius=0.9,
        slope_error=1e-9,
        tight=tight,
        once=replace(figures, seconds=(0.1, 0.1), saved=50, peak=100),
        rules={"IFT()": figures, "torchdeq ift": figures},
        matches=[Match(level=level, seconds=seconds, rtols={}) for level in LEVELS],
    )


FLAT = {"IFT()": [10, 10, 10], "Unroll()": [1, 2, 3], "torchdeq ift": [1, 2, 3]}


@pytest.mark.parametrize(
    ("made_up", "saved", "recorded", "verdicts"),
    [
        (outcome(), FLAT, (7, 7), "PPPPPPP"),
        (outcome(tight=2e-5), FLAT, (7, 7), "FPPPPPP"),
        (outcome(tight=math.nan), FLAT, (7, 7), "FPPPPPP"),
        (outcome(mine=1.01), FLAT, (7, 7), "PFFFFPP"),
        (outcome(), {**FLAT, "JFB()": [1, 1, 2]}, (7, 7), "PPPPPFP"),
        (outcome(), FLAT, (8, 7), "PPPPPPF"),
    ],
)
def test_targets_on_made_up_figures(
    made_up: experiments.Outcome, saved: dict[str, list[int]], recorded: tuple[int, int], verdicts: str
) -> None:
    aims = report.targets([made_up], saved, recorded)
    assert "".join("P" if aim.met else "F" for aim in aims) == verdicts


def test_tables_on_made_up_figures() -> None:
    text = report.rule_tables([outcome()])
    assert text.splitlines()[4].split() == ["IFT()", "1e-06"]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("IFT()")] == [
        "1e-06", "10+9", "2.5+7.5", "2.0", "2.0"
    ]  # fmt: skip
    assert "fastest, error 1e-02         1.00" in report.matching_table([outcome()])


def test_the_command_prints_and_writes_what_it_measured(
    small: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(experiments, "DEPTHS", (5, 20))
    monkeypatch.setattr(report, "DEPTHS", (5, 20))
    monkeypatch.setattr(matching, "RUNGS", RUNGS[::6])
    kept = ("IFT()", "JFB()", "StochasticJFB(20, 10)", "torchdeq ift")
    chosen = [replace(method, draws=1) for method in methods.rules() if method.name in kept]
    monkeypatch.setattr(experiments, "rules", lambda: chosen)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "gradients.txt").read_text() == printed
    assert printed.count("PASS") + printed.count("FAIL") == 7
    assert "PASS  IFT at rtol=1e-7" in printed
    assert "PASS  bytes kept do not depend on the evaluations, 5 to 20" in printed
    assert "PASS  the steps of S-JFB without gradient keep nothing: 0 bytes" in printed
    document = json.loads((tmp_path / "gradients.json").read_text())
    assert {"machine", "versions", "commit", "targets", "settings", "saved_by_depth", "error_by_forward_rtol"} <= set(
        document
    )
    assert [each["cell"] for each in document["settings"]] == ["affine", "small"]
    assert all(each["slope_error"] < 1e-5 for each in document["settings"])
    [errors] = document["error_by_forward_rtol"]["errors"].values()
    assert errors["IFT(), Picard"][-1] < 1e-4 < errors["IFT(), Picard"][0]
