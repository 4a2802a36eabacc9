from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

import fixpoint
from fixpoint_cli.command import app
from fixpoint_cli.running import run_app


def invoke(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def words(result):
    """The whole output without the boxes and line breaks of the terminal."""
    return re.sub(r"[\s│]+", " ", result.output)


def test_bench_writes_results_pictures_and_page_and_prints_the_main_table(tmp_path):
    result = invoke("bench", "linear:dim=20", "--solver", "picard", "--solver", "anderson:memory=3", "--out", tmp_path)
    assert result.exit_code == 0
    data = json.loads((tmp_path / "results.json").read_text())
    rows = data["studies"][0]["blocks"][0]["rows"]
    assert [row[0] for row in rows] == ["picard", "anderson:memory=3"]
    assert re.search(rf"picard +1e-05 +{rows[0][2]}\b", result.output)
    assert str(tmp_path / "report.html") in result.output
    assert (tmp_path / "report.html").exists()
    assert list(tmp_path.glob("*.png"))


def test_bench_without_a_problem_runs_the_classical_ones(tmp_path):
    assert invoke("bench", "--solver", "broyden", "--max-evals", 3, "--out", tmp_path).exit_code == 0
    overview = json.loads((tmp_path / "results.json").read_text())["studies"][0]["blocks"][0]
    assert [row[0] for row in overview["rows"]] == list(fixpoint.bench.problems.CLASSICAL)


def test_the_package_runs_as_its_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fixpoint", "problems"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fixpoint", run_name="__main__")
    assert not stopped.value.code
    assert "linear" in capsys.readouterr().out


def test_rtol_and_max_evals_reach_the_solves(tmp_path):
    invoke(
        "bench", "linear", "--solver", "picard", "--rtol", "0.5", "--rtol", "1e-9", "--max-evals", 7, "--out", tmp_path
    )
    rows = json.loads((tmp_path / "results.json").read_text())["studies"][0]["blocks"][0]["rows"]
    assert [row[1] for row in rows] == [0.5, 1e-9]
    assert rows[0][2] < 7 == rows[1][2]


def test_a_failed_study_gives_exit_code_1_and_the_others_are_written(tmp_path):
    result = invoke("bench", "linear:rho=2", "linear:dim=5", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: linear:rho=2: ValueError: rho must lie in (0, 1)" in words(result)
    page = (tmp_path / "report.html").read_text()
    assert "Studies that failed" in page
    assert 'id="linear-dim-5"' in page


def test_where_every_study_failed_earlier_results_stay(tmp_path):
    invoke("bench", "linear:dim=5", "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    result = invoke("bench", "linear:rho=2", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: linear:rho=2" in words(result)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["bnech"], "Did you mean 'bench'?"),
        (["bench", "--quikc"], "--quick"),
        (["bench", "linaer"], "Did you mean 'linear'?"),
        (["bench", "linear:dmi=3"], "Did you mean 'dim'?"),
        (["bench", "--solver", "andersen"], "Did you mean 'anderson'?"),
        (["bench", "--solver", "anderson:memroy=3"], "Did you mean 'memory'?"),
        (["bench", "linear", "--solver", "picard:damping=7"], "damping must lie in (0, 2), found 7"),
        (["bench", "linear:rho=abc"], "problem 'linear': option 'rho' must be a number, found 'abc'"),
        (["bench", "linear", "--solver", "anderson:damping=x"], "option 'damping' must be a number, found 'x'"),
        (["bench", "linear", "--solver", "anderson:memory=x"], "memory must be an integer, found 'x'"),
        (["bench", "linear", "--rtol", "-1"], "--rtol"),
        (["bench", "linear", "--solver", "no_such.module:Solver"], "cannot import no_such.module"),
        (["bench", "linear", "--solver", "fixpoint.solvers.picard:Picrad"], "Did you mean 'Picard'?"),
        (["bench", "linear", "--solver", "math.py:Solver"], "no file math.py"),
        (["bench", "linear", "--solver", "math:Solver"], "math has no 'Solver'"),
        (["bench", "linear:rho"], "expected name:key=value,key=value, found 'rho'"),
        (["bench", "linear", "--solver", "anderson:memory"], "expected name:key=value,key=value, found 'memory'"),
        (["bench", "kepler.py"], "expected kepler.py:NAME, with the name of the problem in that file"),
        (["bench", "linear", "--solver", "fixpoint.solve:solve"], "must be a class of solvers"),
        (["bench", "fixpoint.bench.problems:CLASSICAL"], "must be a problem (z0 and __call__) or make one"),
        (["bench", "linear", "--out", "/dev/null/here"], "cannot write to /dev/null/here"),
    ],
)
def test_a_typo_is_a_usage_error_with_a_suggestion(arguments, suggestion):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert suggestion in words(result)


_OWN = '''
"""A problem and a solver of a user."""
from __future__ import annotations
from dataclasses import dataclass
import torch
import fixpoint

@dataclass(frozen=True)
class Halved(fixpoint.Picard):
    damping: float = 0.5

class Cosine:
    z0 = torch.zeros(3)
    def __call__(self, z):
        return z.cos()

cosine = Cosine()

def line(*, slope=0.5):
    """A straight line."""
    class Line:
        z0 = torch.zeros(2)
        def __call__(self, z):
            return slope * z + 1
    return Line()
'''


def test_problems_and_solvers_of_ones_own_come_from_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "things.py").write_text(_OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    problems = ["own/things.py:cosine", "own.things:Cosine", f"{tmp_path}/own/things.py:line:slope=0.25"]
    solvers = ["own.things:Halved:damping=0.9", "own/things.py:Halved"]
    result = invoke("bench", *problems, "--solver", solvers[0], "--solver", solvers[1], "--out", tmp_path)
    assert result.exit_code == 0, result.output
    studies = {study["name"]: study for study in json.loads((tmp_path / "results.json").read_text())["studies"]}
    for name in problems:
        rows = studies[name]["blocks"][0]["rows"]
        assert [row[0] for row in rows] == solvers
        assert all(row[-1] == row[-2] for row in rows)
    assert studies[problems[2]]["title"].endswith("A straight line.")
    monkeypatch.chdir(tmp_path / "own")
    alone = ("things:line:slope=0.25", "--solver", "things:Halved:damping=0.9", "--out", tmp_path / "alone")
    assert invoke("bench", *alone).exit_code == 0
    assert invoke("bench", problems[2].replace("slope", "slpoe")).exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\ntable = {}\ntable['a']", "KeyError: 'a' ({file}, line 3)"),
        ("import torch\ntorch.nn.Linear('a', 2)", "({file}, line 2)"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("def f(:", "(own.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_the_line(text, said, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(text)
    result = invoke("bench", f"{file}:mine")
    assert result.exit_code == 2
    assert f"cannot import {file}: " in words(result)
    assert said.format(file=file) in words(result)


def test_problems_lists_every_registered_problem_with_its_summary():
    result = invoke("problems")
    assert re.search(r"^linear +symmetric linear map", result.output, re.MULTILINE)
    assert re.search(r"^expansive +", result.output, re.MULTILINE)


def test_report_draws_the_same_page_from_results_alone(tmp_path):
    invoke("bench", "linear:dim=5", "--solver", "picard", "--out", tmp_path / "first")
    (tmp_path / "results.json").write_bytes((tmp_path / "first" / "results.json").read_bytes())
    assert invoke("report", tmp_path / "results.json", "--out", tmp_path / "second").exit_code == 0
    pages = [(tmp_path / folder / "report.html").read_text() for folder in ("first", "second")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"format": 1}'])
def test_report_refuses_a_file_that_holds_no_results(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    result = invoke("report", tmp_path / "x.json")
    assert result.exit_code == 2
    assert "does not hold results of fixpoint bench" in words(result)


_IN_ORDER = """
import sys
from fixpoint_cli import main

def run(*words):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as stop:
        return stop.code

assert run("bnech") == run("bench", "--quikc") == run("bench", "--rtol", "-1") == run("report", "no-such.json") == 2
assert run("bench", "no-such.py:f") == run("bench", "linear.py") == 2
assert run("bench", "linear:roh=0.5") == run("bench", "linear", "--solver", "anderson:memroy=3") == 2
assert run("bench", "lineer") == run("bench", "linear", "--solver", "andersn") == run("bench", ":rho=1") == 2
assert run("--version") == run("-h") == run("bench", "-h") == 0
assert not {"torch", "matplotlib"} & sys.modules.keys()
assert run("problems") == 0
"""


def test_a_typo_is_refused_and_help_is_shown_before_pytorch_is_imported():
    found = subprocess.run([sys.executable, "-c", _IN_ORDER], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    said = found.stderr.splitlines()
    assert len(said) == 11
    assert all(line.startswith("Error: ") for line in said)


def test_version_and_help():
    assert invoke("--version").output.strip() == fixpoint.__version__
    assert "bench" in invoke("--help").output
    assert invoke("bench", "-h").output == invoke("bench", "--help").output


@pytest.mark.parametrize("missing", ["typer", "tqdm", "matplotlib"])
def test_a_missing_extra_is_named_in_one_line(missing, tmp_path):
    # torch itself imports tqdm where it can, so it comes first.
    code = (
        f"import sys, torch; sys.modules[{missing!r}] = None; sys.argv = ['fixpoint', 'bench', 'linear', '--out', '.'];"
        "from fixpoint_cli import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == (2 if missing == "matplotlib" else 1)
    assert found.stderr.strip().splitlines()[-1].endswith(f'needs {missing}: pip install "fixpoint-torch[bench]"')
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_command_shows_warnings_without_lines_of_code(monkeypatch):
    own, shown = typer.Typer(), []

    @own.command()
    def command():
        shown.append(warnings.formatwarning(UserWarning("two files are left out"), UserWarning, "our.py", 3))

    monkeypatch.setattr(sys, "argv", ["command"])
    before = warnings.formatwarning
    assert run_app(own) == 0
    assert shown == ["Warning: two files are left out\n"]
    assert warnings.formatwarning is before
