"""The script for GPUs, rehearsed on the CPU: every part runs and writes, and none stops the next."""

from __future__ import annotations

import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fixpoint
from benchmarks import overhead as bench_overhead
from benchmarks.device import __main__ as conductor
from benchmarks.device import chains, common, correct, overhead, report
from benchmarks.device.common import Part
from benchmarks.device.graphs import GraphedSteps, Sequential, recorded, solvers_as_there
from benchmarks.device.on_device import OnDevice
from benchmarks.overhead import PEERS, SOLVERS, Size
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "device" / "run.sh"
TINY = Size(rows=3, dim=8, evals=5, rounds=2)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a whole rehearsal has written, with time in plenty."""
    folder = tmp_path_factory.mktemp("device")
    command = ["bash", str(SCRIPT), "--rehearse", "--minutes", "60", "--out", str(folder)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "summary.txt").read_text() in done.stdout
    return folder


@pytest.fixture
def documents(rehearsed: Path) -> dict[str, Any]:
    return report.load(rehearsed)


def finite(rows: list[dict[str, Any]], *names: str) -> None:
    for row in rows:
        assert all(isinstance(row[name], int | float) and math.isfinite(row[name]) for name in names), row


def test_the_summary_says_where_and_how_each_part_ended(documents: dict[str, Any]) -> None:
    summary = documents["summary"]
    assert {"date", "device", "driver", "versions", "commit", "seconds", "machine"} <= set(summary)
    assert {"torch", "python", "fixpoint"} <= set(summary["versions"])
    assert summary["rehearsal"]
    assert list(summary["parts"]) == [job.name for job in conductor.JOBS]
    assert {part["status"] for part in summary["parts"].values()} == {"done"}
    assert all(part["seconds"] <= part["limit"] for part in summary["parts"].values())


def test_the_device_is_compared_in_every_dtype_and_tests_run_there(documents: dict[str, Any]) -> None:
    cases = documents["correct"]["cases"]
    assert {(row["case"], row["dtype"]) for row in cases} == {
        (case, dtype) for case in correct.cases() for dtype in common.DTYPES
    }
    assert all(row["ok"] and row["difference"] == 0 for row in cases)
    (tests,) = documents["correct"]["tests"]
    assert tests["passed"] > 0
    assert (tests["failed"], tests["ended"]) == (0, "of themselves")


def test_overhead_has_checks_times_and_counts(documents: dict[str, Any]) -> None:
    document = documents["overhead"]
    assert len(document["checks"]) == 1 + 3 * len(PEERS) + len(overhead.SHORT)
    assert all(check["met"] for check in document["checks"])
    finite(document["times"], "rows", "dim", "milliseconds")
    steps = {f"{name} step, {how}" for name in overhead.SHORT for how in ("plain", "graphed", "float64, compiled")}
    steps |= {f"{name}, float64, {how}" for name in overhead.SHORT for how in ("plain", "compiled")}
    assert {row["name"] for row in document["times"]} >= {*SOLVERS, *PEERS.values(), *steps}
    assert {row["name"] for row in document["launches"]} >= {*SOLVERS, *PEERS.values()}
    assert all(row["operations"] > 0 for row in document["launches"])


def test_chains_have_both_samplers_and_agree(documents: dict[str, Any]) -> None:
    cells = documents["chains"]["cells"]
    assert {cell["network"] for cell in cells} == set(chains.NETWORKS)
    finite(cells, "sequential_graph", "ours", "times", "rounds", "rows_per_step", "error")
    assert {(cell["dtype"], cell["eta"]) for cell in cells} == {(d, e) for d in ("float32", "bfloat16") for e in (0, 1)}
    assert all(cell["converged"] for cell in cells)
    assert all(cell["error"] < (1e-3 if cell["dtype"] == "float32" else 3e-2) for cell in cells)
    assert any(cell["sequential_compiled"] for cell in cells)
    (training,) = documents["chains"]["training"]
    assert training["steps"] == 1


def test_costs_and_training_steps(documents: dict[str, Any]) -> None:
    curve = documents["batch_cost"]["curve"]
    finite(curve, "rows", "milliseconds")
    assert {(row["network"], row["dtype"]) for row in curve} == {
        (network, dtype) for network in ("unet", "transformer") for dtype in ("float32", "bfloat16")
    }
    steps = documents["fpdm"]["steps"]
    finite(steps, "seconds", "longest", "parameters", "batch")
    assert {row["no_grad"] for row in steps} == {None, 0, 6, 12, 24}


def test_pictures_and_table_come_from_json_alone(rehearsed: Path, tmp_path: Path) -> None:
    for path in rehearsed.glob("*.json"):
        shutil.copy(path, tmp_path)
    code = (
        "import sys; from benchmarks.device import report; report.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (rehearsed / "summary.txt").read_text() in done.stdout
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"overhead.png", "chains.png", "batch_cost.png", "fpdm.png"}


def test_parts_that_fail_or_run_out_of_time_do_not_stop_the_next(tmp_path: Path) -> None:
    def job(name: str, share: float, code: str) -> conductor.Job:
        return conductor.Job(name, share, (sys.executable, "-c", code))

    write = f"import pathlib; pathlib.Path({str(tmp_path / 'last.json')!r}).write_text('{{\"errors\": [1]}}')"
    jobs = [job("fails", 1, "raise SystemExit(3)"), job("hangs", 0.1, "import time; time.sleep(3600)")]
    outcomes = conductor.conduct([*jobs, job("last", 1, write)], tmp_path, 60)
    endings = ["failed (exit status 3)", "out of time", "done, with errors"]
    assert [each["status"] for each in outcomes.values()] == endings
    assert outcomes["hangs"]["limit"] < outcomes["last"]["limit"]  # what the others left goes to the last one


def test_the_processes_that_a_part_started_end_with_it(tmp_path: Path) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    child = f"import time; file = open({str(fifo)!r}, 'w'); print(flush=True); time.sleep(3600)"
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)"
    job = conductor.Job("parent", 1.0, (sys.executable, "-c", f"{code}; p.stdout.readline()", child))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert conductor.conduct([job], tmp_path, 60)["parent"]["status"] == "done"
    readable, _, _ = select.select([reader], [], [], 60)  # at once when nobody holds it open any more
    assert readable
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_figures_are_written_as_they_come_and_failures_beside_them(tmp_path: Path) -> None:
    part = Part("some", tmp_path, 100.0, True)
    part.add("rows", value=math.nan, nested={"x": [math.inf, 1.0]})
    with part.attempt("this"):
        raise RuntimeError("broken\nand more")
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["rows"] == [{"value": None, "nested": {"x": [None, 1.0]}}]
    assert written["errors"] == [{"what": "this", "error": "RuntimeError: broken"}]
    assert not list(tmp_path.glob("*.tmp"))


def test_without_wheels_what_needs_them_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    part = Part("chains", tmp_path, 1e4, True)
    chains.main(part)
    document = json.loads((tmp_path / "chains.json").read_text())
    assert [each["what"] for each in document["left_out"]] == ["the U-Nets"]
    assert "needs diffusers" in document["left_out"][0]["why"]
    assert {cell["network"] for cell in document["cells"]} == {"trained", "transformer"}
    assert document["training"][0]["network"] == "DiT"
    assert not document["errors"]


def test_wheels_are_installed_for_the_run_alone_and_a_bad_one_costs_itself(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "bad-1-py3-none-any.whl").write_text("no wheel")
    info = "probe_of_wheels-1.dist-info"
    with zipfile.ZipFile(wheels / "probe_of_wheels-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe_of_wheels.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: probe-of-wheels\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    python = tmp_path / "python"
    show = "import probe_of_wheels as p, benchmarks.device as d; print(p.__file__); print(d.__file__)"
    real = f'exec "{sys.executable}"'
    python.write_text(f'#!/bin/sh\n[ "$2" = benchmarks.device ] && {real} -c "{show}"\n{real} "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(SCRIPT), "--wheels", str(wheels)]
    environment = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    probe, package = done.stdout.split()
    assert Path(package).parent == SCRIPT.parent
    assert not Path(probe).exists()  # the folder is gone with the run
    assert "not installed" in done.stderr


def test_the_script_names_the_versions_that_are_pinned() -> None:
    head = SCRIPT.read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    listed = re.findall(r"^#     (\w+)==(\S+)", head, re.MULTILINE)
    assert {name for name, _ in listed} >= set(common.WHEELS)
    assert all(pinned.get(name, pinned.get(name.replace("_", "-"))) == version for name, version in listed)
    (fetching,) = re.findall(r"^#     python3 -m pip download .*", head, re.MULTILINE)
    assert all(f"{name}=={version}" in fetching for name, version in listed)


def test_without_a_device_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert conductor.main(["--out", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_copy_without_its_history_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.provenance, "commit", lambda: None)
    assert common.machine(None)["commit"] == "unknown"
    assert common.machine("abc")["commit"] == "abc"


def test_the_page_is_what_the_results_say(tmp_path: Path, rehearsed: Path) -> None:
    assert (report.RESULTS / "newest.md").read_text() == report.page()
    assert report.page(tmp_path) == "**Not yet measured on a GPU.**\n"
    for date, rehearsal in (("2001-02-03", False), ("2001-02-04", False), ("2001-02-05", True)):
        shutil.copytree(rehearsed, tmp_path / date)
        summary = json.loads((rehearsed / "summary.json").read_text()) | {"rehearsal": rehearsal, "date": date}
        (tmp_path / date / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "2001-02-04" / "chains.png").touch()
    page = report.page(tmp_path)
    assert "Measured on 2001-02-04" in page
    assert report.NOT_YET not in page
    assert "device/2001-02-04/chains.png" in page


def test_a_wrong_value_of_the_device_is_seen() -> None:
    values = iter([torch.ones(3), torch.tensor([1.0, 1.0, 1.01]), torch.ones(3), torch.tensor([1.0, math.nan, 1.0])])

    def case(device: str, dtype: torch.dtype) -> Tensor:
        return next(values)

    assert not correct.compare("it", case, "float32", "cpu")["ok"]
    assert not correct.compare("it", case, "float32", "cpu")["ok"]


def test_cells_come_in_order_of_worth() -> None:
    cells = chains.cells(rehearse=False)
    assert len(set(cells)) == len(cells)
    assert {(c.steps, c.batch, c.dtype, c.eta) for c in cells if c.network == "transformer"} == {
        (steps, batch, dtype, eta)
        for steps in (25, 100, 1000)
        for batch in (1, 8)
        for dtype in ("float32", "bfloat16")
        for eta in (0.0, 1.0)
    }
    first = cells[0]
    assert (first.steps, first.batch, first.dtype, first.eta) == (1000, 1, "bfloat16", 0.0)
    variants = [cell.max_rows is not None or cell.probes > 0 for cell in cells]
    assert variants == sorted(variants)
    assert {(c.steps, c.batch, c.eta) for c in cells if c.probes} == {(steps, 1, 0.0) for steps in (25, 100, 1000)}


def test_what_a_test_makes_lies_on_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with OnDevice("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.randn(2, generator=generator).device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.eye(2, dtype=torch.float64).dtype == torch.float64
    assert torch.zeros(2).device.type == "cpu"
    assert not torch.equal(state, generator.get_state())  # drawn on the CPU
    with OnDevice("cpu"):
        assert torch.ones(2).numpy().tolist() == [1, 1]


def test_tests_that_fail_there_are_listed_with_their_error(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_worse(): raise ValueError('it')\n")
    part = Part("correct", tmp_path, 1e4, True)
    correct.tests(part, (str(file),))
    (tests,) = part.document["tests"]
    assert (tests["passed"], tests["failed"], tests["ended"]) == (1, 2, "of themselves")
    bad, worse = part.document["failed_tests"]
    assert bad["test"].endswith("test_bad")
    assert "assert 1 == 2" in bad["error"]
    assert "ValueError: it" in worse["error"]
    assert not part.document["errors"]


@pytest.fixture
def tiny_part(tmp_path: Path) -> Part:
    return Part("some", tmp_path, 100.0, True)


@pytest.mark.parametrize(
    ("solver", "graphs"),
    [
        (fixpoint.Picard(), 1),
        (fixpoint.Anderson(), 1),
        (fixpoint.Anderson(memory=4), 1),
        (fixpoint.Broyden(), 18),
        (fixpoint.Broyden(memory=5), 3),
    ],
    ids=repr,
)
def test_replayed_steps_equal_plain_ones(solver: fixpoint.Solver, graphs: int, tiny_part: Part) -> None:
    f, z0 = bench_overhead.affine(TINY, dtype=torch.float64)
    with torch.no_grad(), solvers_as_there(tiny_part):
        assert GraphedSteps(solver, f, z0, recorded).graphs == graphs
        f, z0 = bench_overhead.affine(overhead.CHECKED, dtype=torch.float64)
        check = overhead.graphed_agrees(tiny_part, "it", solver, f, z0)
    assert (check["met"], check["found"]) == (True, "differs by 0.0e+00")


def test_what_differs_or_is_not_finite_does_not_agree() -> None:
    assert not overhead._agreement("it", [torch.tensor([math.nan])], [torch.ones(1)])["met"]
    assert not overhead._agreement("it", [torch.ones(1), torch.zeros(1)], [torch.ones(1)] * 2)["met"]
    assert overhead._agreement("it", [torch.ones(1)], [torch.ones(1)])["met"]


@pytest.mark.parametrize(("evals", "check_every"), [(40, 1), (40, 8), (41, 8), (7, 8), (1, 1), (8, 8)])
def test_checks_are_those_of_the_loop(evals: int, check_every: int) -> None:
    seen: list[int] = []
    f, z0 = bench_overhead.affine(TINY, dtype=torch.float64)
    options = {"rtol": 0, "max_evals": evals, "check_every": check_every, "on_failure": "ignore", "backward": None}
    fixpoint.solve(f, z0, solver=fixpoint.Picard(), callback=lambda progress: seen.append(progress.nfev), **options)
    assert overhead.checks_of(evals, check_every) == len(seen)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_ordinary_sampler_in_a_graph_is_the_ordinary_sampler(eta: float) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t[:, None] / 1000)

    x_T = common.normal(2, 5)
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.linear(), steps=9)
    if eta:
        chain = StochasticDDIMChain(denoiser, x_T, NoiseSchedule.linear(), steps=9, eta=eta)
    expected = chain.sequential()
    sampler = Sequential(chain, denoiser, recorded)
    for _ in range(2):  # each run starts anew
        torch.testing.assert_close(sampler(), expected[:, -1])
    torch.testing.assert_close(sampler(4), expected[:, 3])
