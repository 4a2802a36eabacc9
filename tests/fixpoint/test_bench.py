from __future__ import annotations

import inspect
import json
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fixpoint
from fixpoint import bench
from fixpoint.bench import report
from fixpoint.bench.registry import find_problem
from fixpoint_cli.command import DISTRIBUTION
from fixpoint_cli.names import OPTIONS, SOLVERS, problem_entries


@pytest.fixture
def register(monkeypatch):
    """Register problems for one test: ``register(name=RegisteredProblem)``; None stands for a missing plugin."""

    def add(**problems):
        module = types.ModuleType("fake_plugin")
        vars(module).update(problems)
        monkeypatch.setitem(sys.modules, "fake_plugin", module)
        entries = [
            metadata.EntryPoint(name, f"{'fake' if problem else 'missing'}_plugin:{name}", "fixpoint.problems")
            for name, problem in problems.items()
        ]
        monkeypatch.setattr("fixpoint_cli.names.metadata.entry_points", lambda group: entries)

    return add


class Halving:
    """Two rows of f(z) = z / 2 + 1, whose solution is 2; counts its calls."""

    def __init__(self):
        self.z0, self.solution, self.calls = torch.zeros(2, 3), torch.full((2, 3), 2.0), 0

    def __call__(self, z):
        self.calls += 1
        return z / 2 + 1


def entry(study=None, make=Halving):
    return fixpoint.RegisteredProblem(make, "halving", study)


def a_study(quick):
    return bench.Study("own", f"quick={quick}", (bench.Table("T", ("a",), ((1,),)),))


# Blocks


def test_a_study_survives_strict_json_and_keeps_gaps_as_none():
    study = bench.Study(
        "s",
        "Title",
        (
            bench.Table("T", ("a", "b"), ((1, 0.5), ("x", None), (True, float("inf"))), "caption"),
            bench.Lines("L", {"one": (range(2), torch.tensor([1.0, float("nan")]))}, "x", "y", log_y=False),
            bench.Images.of("I", torch.zeros(1, 2, 3, 3), column_labels=["l", "r"]),
        ),
        summary="why",
    )
    written = json.loads(json.dumps(study.to_json(), allow_nan=False))
    again = bench.Study.from_json(written)
    assert again.to_json() == written
    assert again.main_table.rows[2] == [True, None]
    assert again.blocks[1].series["one"] == [[0, 1], [1.0, None]]
    assert torch.equal(again.blocks[2].array(), study.blocks[2].array())


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([(), (1,), (3,)]), st.integers(0, 99))
def test_images_are_quantised_to_within_half_a_level(rows, columns, channels, seed):
    images = torch.rand(rows, columns, *channels, 4, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    block = bench.Images.of("I", images)
    expected = (images.movedim(2, -1).squeeze(-1) if channels else images).numpy()
    assert tuple(block.shape) == expected.shape
    np.testing.assert_allclose(block.array().numpy() / 255 * 2 - 1, expected, atol=1.01 / 255)


def test_images_clip_what_lies_outside_the_range_and_show_nan_as_black():
    block = bench.Images.of("I", torch.tensor([-9.0, 0.0, 9.0, float("nan")]).reshape(1, 1, 2, 2), low=0, high=1)
    assert block.array().flatten().tolist() == [0, 0, 255, 0]


def test_blocks_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="a row has 1 cells for 2 columns"):
        bench.Table("T", ("a", "b"), ((1,),))
    with pytest.raises(ValueError, match="'one' has 2 x for 1 y"):
        bench.Lines("L", {"one": ([1, 2], [1])}, "x", "y")
    with pytest.raises(ValueError, match=r"expected \(rows, columns"):
        bench.Images.of("I", torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        bench.Images.of("I", torch.zeros(1, 1, 8, 8), row_labels=["a", "b"])


# Solvers by name


def test_solver_specs_make_solvers_and_refuse_typos():
    assert bench.make_solver("broyden") == fixpoint.Broyden()
    assert bench.make_solver("picard:damping=0.5") == fixpoint.Picard(damping=0.5)
    assert bench.make_solver("anderson:memory=2,blocks=3") == fixpoint.Blockwise(fixpoint.Anderson(memory=2), 3)
    with pytest.raises(LookupError, match="Did you mean 'anderson'"):
        bench.make_solver("andersen")
    with pytest.raises(TypeError, match=r"solver 'anderson' has no option 'mem'. Did you mean 'memory'"):
        bench.make_solver("anderson:mem=3")
    with pytest.raises(TypeError, match=r"blocks must be an integer, found 2.5"):
        bench.make_solver("anderson:blocks=2.5")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in OPTIONS for name in OPTIONS[kind]])
def test_the_options_that_are_known_without_pytorch_are_those_of_the_signatures(kind, name):
    make = find_problem(name).make if kind == "problem" else type(bench.make_solver(name))
    also = {"problem": (), "solver": ("blocks",)}[kind]
    assert OPTIONS[kind][name] == (*inspect.signature(make).parameters, *also)


def test_the_options_of_all_our_problems_and_solvers_are_known_without_pytorch():
    ours = {name for name, entry in problem_entries().items() if entry.dist.name == DISTRIBUTION}
    assert (OPTIONS["problem"].keys(), OPTIONS["solver"].keys()) == (ours, SOLVERS.keys())


# Comparison


def test_the_comparison_reports_what_an_independent_count_and_numpy_find():
    problem = Halving()
    study = bench.compare(problem, {"plain": fixpoint.Picard()}, rtols=[1e-3])
    row = dict(zip(study.main_table.columns, study.main_table.rows[0], strict=True))
    # By hand: after k applications z = 2 - 2^(1-k), so the relative residual is 2^-k / (2 - 2^-k).
    applications = next(k for k in range(99) if 2.0**-k / (2 - 2.0**-k) <= 1e-3)
    assert row["evaluations"] == applications + 1 == problem.calls - 3  # two to warm up, one to verify
    assert row["worst relative residual"] == pytest.approx(2.0**-applications / (2 - 2.0**-applications))
    assert row["worst error"] == pytest.approx(2.0**-applications)
    assert (row["converged"], row["rows"]) == (2, 2)
    x, y = study.blocks[1].series["plain"]
    assert x == list(range(1, applications + 2))
    np.testing.assert_allclose(y, [3**0.5 * 2.0**-k for k in range(applications + 1)], rtol=1e-4)


def test_the_comparison_uses_the_norm_and_batch_dims_of_the_problem():
    problem = Halving()
    problem.batch_dims = 0
    problem.norm = lambda z: z.abs().max()
    study = bench.compare(problem, {"plain": fixpoint.Picard()}, rtols=[1e-3])
    assert study.main_table.rows[0][-2:] == (1, 1)
    assert study.blocks[1].series["plain"][1][0] == 1.0  # the largest entry, not the Euclidean length


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (np.zeros((2, 3)), TypeError, "must be made of tensors, found ndarray at z"),
        ({"a": [0.0]}, TypeError, r"must be made of tensors, found float at z\['a'\]\[0\]"),
        (torch.zeros(0, 3), ValueError, "has no rows, so there is nothing to compare"),
    ],
)
def test_problems_that_cannot_be_shown_side_by_side_are_named(z0, error, message):
    class Own:
        def __call__(self, z):
            return z

    problem = Own()
    problem.z0 = z0
    with pytest.raises(error, match=message):
        bench.compare(problem, {"plain": fixpoint.Picard()})


@pytest.mark.parametrize("other", [torch.cos, types.SimpleNamespace(z0=torch.zeros(2)), Halving, fixpoint.Picard()])
def test_what_is_no_problem_is_refused(other):
    with pytest.raises(TypeError, match="expected a problem, an object that can be called and has a start z0, found"):
        bench.compare(other, {"plain": fixpoint.Picard()})


def test_a_module_may_keep_its_start_as_a_buffer():
    module = torch.nn.Linear(3, 3)
    module.register_buffer("z0", torch.zeros(2, 3))
    study = bench.compare(module, {"plain": fixpoint.Picard()}, rtols=[0.5])
    assert study.main_table.rows[0][-1] == 2


def test_a_solver_that_fails_is_shown_as_not_converged():
    study = bench.compare(Halving(), {"plain": fixpoint.Picard()}, rtols=[1e-6], max_evals=2)
    assert study.main_table.rows[0][-2:] == (0, 2)


def test_a_solution_of_zeros_has_no_relative_residual():
    class Vanishes:
        z0, solution = torch.ones(2, 3), torch.zeros(2, 3)

        def __call__(self, z):
            return 0 * z

    (row,) = bench.compare(Vanishes(), {"plain": fixpoint.Picard()}).main_table.rows
    assert row[4:] == (0.0, 0.0, 2, 2)


def test_seconds_are_drawn_for_every_solve_and_a_failed_one_is_marked():
    study = bench.compare(Halving(), {"plain": fixpoint.Picard(), "fast": fixpoint.Anderson()}, max_evals=5)
    seconds = [row[3] for row in study.main_table.rows]
    assert study.blocks[2].values == dict(zip(["plain (fails)", "fast"], seconds, strict=True))


def test_what_is_slow_at_first_use_counts_for_no_solver(monkeypatch):
    class SlowAtFirst:
        clock, z0 = 0.0, torch.zeros(1, 2)

        def __call__(self, z):
            self.clock += 1.0 if self.clock else 100.0
            return 0.5 * z + 1

    problem = SlowAtFirst()
    clock = types.SimpleNamespace(perf_counter=lambda: problem.clock)
    monkeypatch.setattr(sys.modules["fixpoint.bench.compare"], "time", clock)
    bars = bench.compare(problem, {"one": fixpoint.Picard(), "same": fixpoint.Picard()}).blocks[2]
    assert bars.values["one"] == bars.values["same"] < 100


def test_a_solver_that_measures_no_residual_on_the_way_has_one_dot_for_its_result():
    chain = fixpoint.Recurrence(lambda x: 0.5 * torch.cos(x), torch.ones(2, 3), steps=8)
    study = bench.compare(chain, {"causal": fixpoint.CausalQuasiNewton(), "Picard": fixpoint.Picard()}, rtols=[1e-4])
    x, (residual,) = study.blocks[1].series["causal"]
    assert x == [study.main_table.rows[0][2]]
    # The figure is that of one row; the other starts alike.
    solution = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), backward=None, rtol=1e-4)
    left = (chain(solution.value) - solution.value).flatten(1).norm(dim=1).max()
    assert residual == pytest.approx(float(left), rel=1e-5, abs=1e-9)
    assert len(study.blocks[1].series["Picard"][0]) > 1


def test_each_tolerance_is_a_row_and_a_curve_of_its_own():
    study = bench.compare(Halving(), {"plain": fixpoint.Picard()}, rtols=[1e-1, 1e-3])
    assert [row[1] for row in study.main_table.rows] == [1e-1, 1e-3]
    assert list(study.blocks[1].series) == ["plain, rtol 0.1", "plain, rtol 0.001"]


# Runs


def test_a_failing_study_is_named_and_the_others_are_kept(register, caplog):
    def explode(quick):
        raise RuntimeError("boom")

    register(bad=entry(explode), missing=None, good=entry(a_study))
    results = bench.run(["bad", "missing", "good"])
    assert [study["name"] for study in results["studies"]] == ["own"]
    assert [failure["name"] for failure in results["failures"]] == ["bad", "missing"]
    assert results["failures"][0]["error"] == "RuntimeError: boom"
    assert "study 'bad' failed" in caplog.text


def test_an_interrupt_keeps_what_has_finished(register):
    def interrupted(quick):
        raise KeyboardInterrupt

    register(first=entry(a_study), second=entry(interrupted), third=entry(a_study))
    results = bench.run(["first", "second", "third"])
    assert len(results["studies"]) == 1
    assert results["failures"] == [{"name": "second", "error": "interrupted"}]


def test_a_problem_runs_its_own_study_unless_solvers_or_options_are_given(register):
    register(problem=entry(a_study, make=lambda *, flag=False: Halving()))
    assert bench.run(["problem"], quick=True)["studies"][0]["title"] == "quick=True"
    assert bench.run(["problem"], ["picard"])["studies"][0]["name"] == "problem"
    assert bench.run(["problem:flag=true"])["studies"][0]["name"] == "problem:flag=true"


def test_unknown_names_and_options_raise_before_anything_runs(register):
    def never(quick):
        raise AssertionError("ran")

    register(problem=entry(never))
    for names, solvers, error in (
        (["problem", "nonsense"], [], LookupError),
        (["problem", "problem:x=1"], [], TypeError),
        (["problem"], ["nonsense"], LookupError),
        (["problem"], ["picard:damping=7"], ValueError),
        (["problem:"], [], ValueError),
    ):
        with pytest.raises(error):
            bench.run(names, solvers)


def test_several_comparisons_are_led_by_an_overview_of_their_evaluations():
    results = bench.run(["linear:dim=20", "expansive:dim=20"], ["picard", "broyden"], max_evals=100)
    studies = [bench.Study.from_json(study) for study in results["studies"]]
    assert [(study.name, study.detail) for study in studies] == [
        ("overview", False),
        ("linear:dim=20", True),
        ("expansive:dim=20", True),
    ]
    overview = studies[0].main_table
    assert list(overview.columns) == ["problem", "picard", "broyden"]
    assert overview.rows[0][1] == studies[1].main_table.rows[0][2]
    assert str(overview.rows[1][1]).startswith("fails (")


def test_results_carry_machine_and_versions_but_no_path(tmp_path):
    results = bench.run(["linear:dim=5"], ["picard"])
    assert results["versions"]["torch"] == torch.__version__
    assert results["machine"]["cpus"] >= 1
    assert {"date", "seconds", "commit"} <= results.keys()
    path = bench.write(results, tmp_path / "new" / "folder")
    text = path.read_text()
    assert json.loads(text) == results
    for folder in (Path.cwd(), Path.home(), Path(fixpoint.__file__).parents[1], tmp_path):
        assert str(folder) not in text or str(folder) == "/"


def test_importing_the_package_loads_neither_plots_nor_command_line():
    code = "import sys, fixpoint; print([m for m in ('matplotlib', 'typer', 'diffusers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_chains_by_the_solver_made_for_them():
    study = bench.compare(
        fixpoint.Recurrence(torch.cos, torch.zeros(2, 3), steps=40), {"c": bench.make_solver("causal")}
    )
    assert study.main_table.rows[0][0] == "c"
    assert study.main_table.rows[0][-2:] == (2, 2)  # converged, of rows


def test_the_version_of_code_is_the_last_commit_that_touched_it(tmp_path, monkeypatch):
    package = tmp_path / "somebodys_package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    alone = bench.code_version("somebodys_package")
    git("init")
    git("add", "somebodys_package")
    git("commit", "-m", "code")
    first = bench.code_version("somebodys_package")
    assert first == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "notes").write_text("beside")
    git("add", "notes")
    git("commit", "-m", "notes")
    assert bench.code_version("somebodys_package") == first
    (package / "__init__.py").write_text("x = 2\n")
    changed = bench.code_version("somebodys_package")
    assert changed.startswith(f"{first}+")
    (package / "more.py").write_text("y = 1\n")
    assert len({alone, first, changed, bench.code_version("somebodys_package")}) == 4


def test_a_comparison_says_why_rows_did_not_converge():
    results = bench.run(["linear"], ["causal", "picard"], max_evals=20)
    causal, picard = report.reasons(results)
    assert causal.startswith("linear, causal at rtol 1e-05: 4 of 4 rows did not converge")
    assert causal.endswith("This solver is for chains, and the problem does not say that it is one")
    assert "raise max_evals" in picard
    assert "chains" not in picard
    assert report.reasons(bench.run(["linear"], ["gmres"])) == []


def test_solvers_without_labels_are_named():
    with pytest.raises(TypeError, match=r"solvers must be a dict \{label: solver\}, found a list"):
        bench.compare(fixpoint.load_problem("linear"), [fixpoint.Anderson()])
