"""The experiments of both papers: entries, records that are found again, trends that can fail, the command."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fixpoint_diffusion
from fixpoint import bench
from fixpoint_diffusion.cli import main
from fixpoint_diffusion.denoisers import embedded_folder
from fixpoint_diffusion.experiments import running
from fixpoint_diffusion.experiments.experiment import Experiment, Kind, Verdict
from fixpoint_diffusion.experiments.names import NAMES
from fixpoint_diffusion.experiments.papers.deq_ddim import convergence, inversion, quality
from fixpoint_diffusion.experiments.papers.fpdm import reuse, trained, training
from fixpoint_diffusion.experiments.papers.fpdm import sampling as fpdm_sampling
from fixpoint_diffusion.experiments.plans import plan
from fixpoint_diffusion.experiments.records import Record, Records
from fixpoint_diffusion.experiments.registry import EXPERIMENTS, experiments_named
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.experiments.summaries import lower
from fixpoint_diffusion.files import locked
from fixpoint_diffusion.training import prepared
from fixpoint_diffusion.training.checkpoints import load_record
from tests.fixpoint_diffusion.tiny import tiny_vae

COMMITTED = Path(fixpoint_diffusion.__file__).parents[1] / "benchmarks" / "results" / "experiments"
PROMISED = [
    *(f"deq-ddim/table-{n}" for n in range(1, 5)),
    *(f"deq-ddim/figure-{n}" for n in range(1, 26)),
    *(f"fpdm/table-{n}" for n in range(1, 6)),
    *(f"fpdm/figure-{n}" for n in range(4, 13)),
    "fpdm/memory",
]


def record(config: dict, **measures: object) -> Record:
    return Record(kind="k", config=config, code="c", weights="", measures=measures, seconds=1.0, date="d", machine={})


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Resources:
    """The quick runs of all experiments."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quick")
    resources = Resources(records=Records(folder / "records"), scratch=folder / "models")
    outcome = running.compute(list(EXPERIMENTS.values()), "quick", resources)
    assert outcome == running.Outcome([], 0)
    return resources


def test_every_table_and_figure_has_an_entry():
    assert set(PROMISED) <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_runs_make_a_study_that_is_judged(quick, name):
    entry = EXPERIMENTS[name]
    found = [quick.records.find(entry.kind.name, config) for config in entry.grid["quick"]]
    study, verdict = entry.study(found, 0), entry.judge(found, 0)
    assert verdict.passed in (True, False)
    assert study.main_table.title == f"{name}: {verdict.word}"
    assert entry.judge(found[1:], 1).passed is None
    assert entry.study(found[1:], 1).main_table.title == f"{name}: OPEN"
    assert len(study.blocks) > 1
    assert bench.Study.from_json(study.to_json()).to_json() == study.to_json()


def test_samples_of_several_data_sets_say_of_which_they_are(quick):
    entry = EXPERIMENTS["fpdm/figure-12"]
    found = [quick.records.find(entry.kind.name, config) for config in entry.grid["quick"]]
    (images,) = (block for block in entry.study(found, 0).blocks if isinstance(block, bench.Images))
    named = [f"{config['data']}: {config['network']}, 24 passes" for config in entry.grid["quick"]]
    assert list(images.row_labels) == named


def test_reconstructions_of_several_levels_of_noise_say_of_which_they_are(quick):
    entry = EXPERIMENTS["deq-ddim/figure-14"]
    found = [quick.records.find(entry.kind.name, config) for config in entry.grid["quick"]]
    found = [replace(found[0], config={**found[0].config, "eta": eta}) for eta in (0.0, 0.5)]
    (images,) = entry.blocks(found)
    assert [label.partition(": ")[0] for label in images.row_labels] == ["eta=0", "eta=0", "eta=0.5", "eta=0.5"]


def test_the_report_shows_every_experiment_and_the_summary_has_a_row_for_each(quick, tmp_path):
    names = ["deq-ddim/figure-1", "deq-ddim/figure-19", "deq-ddim/figure-25", "fpdm/memory", "fpdm/table-2"]
    text = running.report(experiments_named(names), "quick", quick.records, tmp_path).read_text()
    assert "<title>Both papers, reproduced (quick)</title>" in text
    rows = (tmp_path / "summary.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
    for name in names:
        assert f"<h2>{name}</h2>" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [study["name"] for study in results["studies"]] == names


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_plan_of_the_papers_scale_says_what_to_have_and_to_type(name):
    entry = EXPERIMENTS[name]
    text = plan(entry)
    for config in entry.grid["paper"]:
        for what in {config.get("model"), config.get("data")} - {None}:
            assert what in text
    assert "GPU-hours" in text
    assert f"experiments run {name} --scale paper" in text


def test_claims_of_better_have_three_seeds_at_the_mini_scale():
    for entry in EXPERIMENTS.values():
        seeds: dict[str, set] = {}
        for config in entry.grid["mini"]:
            if "seed" in config:
                rest = {key: value for key, value in config.items() if key not in ("seed", "seconds")}
                seeds.setdefault(json.dumps(rest, sort_keys=True), set()).add(config["seed"])
        assert all(len(each) >= 3 for each in seeds.values()), entry.name


def test_a_run_is_computed_once_and_found_by_its_configuration_and_code(tmp_path):
    calls = []

    def run(config):
        calls.append(dict(config))
        return {"value": torch.tensor(math.nan), "list": torch.ones(2)}

    records = Records(tmp_path)
    first = records.compute("k", {"a": 1, "seed": 0}, run)
    assert first.measures == {"value": None, "list": [1.0, 1.0]}
    assert records.compute("k", {"seed": 0, "a": 1}, run) == first
    records.compute("k", {"a": 1, "seed": 1}, run)
    assert calls == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}]
    changed, forgiving = Records(tmp_path), Records(tmp_path, any_code=True)
    changed.code = forgiving.code = "another"
    assert changed.find("k", {"a": 1, "seed": 0}) is None
    assert forgiving.find("k", {"a": 1, "seed": 0}) == first


def test_a_record_counts_for_the_embedded_weights_that_made_it(tmp_path, monkeypatch):
    records = Records(tmp_path, any_code=True)
    config = {"model": "ddpm-digits", "seed": 0}
    first = records.compute("k", config, lambda config: {"value": 1})
    records.code = "another"
    assert records.find("k", config) == first
    monkeypatch.setattr("fixpoint_diffusion.experiments.records._start_of_sha256", lambda path: "trained anew")
    assert records.find("k", config) is None
    assert records.compute("k", config, lambda config: {"value": 2}).measures == {"value": 2}


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    entry = _sums(lambda config: {"value": 1})
    records = Records(tmp_path / "records")
    resources = Resources(records=records, scratch=tmp_path)
    held = records._path("sums", entry.grid["mini"][0])
    with locked(held.parent / f".{held.stem}", work="at this run"):
        assert running.compute([entry], "mini", resources) == running.Outcome([], 1)
    assert len(list((tmp_path / "records").rglob("*.json"))) == 1
    assert running.compute([entry], "mini", resources) == running.Outcome([], 0)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    def run(config):
        if config["seed"] == 0:
            raise ArithmeticError("no such luck")
        return {"value": 1}

    entry = _sums(run)
    records = Records(tmp_path / "records")
    outcome = running.compute([entry], "mini", Resources(records=records, scratch=tmp_path))
    assert [failure["error"] for failure in outcome.failures] == ["ArithmeticError: no such luck"]
    ((_, verdict),) = running.verdicts([entry], "mini", records)
    assert verdict == Verdict(None, "1 of 2 runs are missing")


def test_no_run_is_begun_when_the_time_is_over(tmp_path):
    entry = _sums(lambda config: {"value": 1})
    resources = Resources(records=Records(tmp_path / "records"), scratch=tmp_path)
    assert running.compute([entry], "mini", resources, minutes=0) == running.Outcome([], 2)


def test_a_damaged_record_is_named(tmp_path):
    records = Records(tmp_path)
    records.compute("k", {"a": 1}, lambda config: {})
    (path,) = tmp_path.glob("k/*.json")
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is no record of a run"):
        records.find("k", {"a": 1})
    records.compute("k", {"a": 2}, lambda config: {})
    (other,) = set(tmp_path.glob("k/*.json")) - {path}
    other.replace(path)
    with pytest.raises(ValueError, match="is the record of another run; delete it"):
        records.find("k", {"a": 1})


def _sums(run) -> Experiment:
    return Experiment(
        name="deq-ddim/table-1",
        claim="",
        kind=Kind(name="sums", run=lambda config, resources: run(config), flops=lambda config: 0.0),
        grid={"mini": [{"seed": 0}, {"seed": 1}]},
        blocks=lambda records: [],
        trend=lambda records: Verdict(True, f"{len(records)} records"),
        minutes=0,
    )


def test_lower_means_by_more_than_chance():
    assert lower([1.0, 1.1, 0.9], [1.5, 1.6, 1.4])
    assert not lower([1.0, 1.1, 0.9], [1.05, 1.15, 0.95])
    assert not lower([1.0, 1.1], [9.0, 9.1])
    assert lower([1.0, 1.0, 1.0], [math.inf, 1.0, 1.0])
    assert not lower([math.nan, 1.0, 1.0], [2.0, 2.0, 2.0])


def _solves(left: float) -> list[Record]:
    config = {"solver": "paper", "steps": 25, "eta": 0.0}
    return [record(config, residual=[1.0, left], converged=[left < 0.1])]


def test_convergence_fails_where_the_residual_stays():
    assert convergence.FIGURE_1.trend(_solves(0.01)).passed
    assert not convergence.FIGURE_1.trend(_solves(0.5)).passed


def _starts(x_T: float, zeros: float) -> list[Record]:
    return [
        record({"init": init, "seed": seed}, rounds=[rounds + seed / 10])
        for init, rounds in (("x_T", x_T), ("zeros", zeros))
        for seed in range(3)
    ]


def test_the_start_is_judged_by_rounds():
    assert convergence.FIGURE_9.trend(_starts(5, 15)).passed
    assert not convergence.FIGURE_9.trend(_starts(5, 5)).passed
    assert "3 times" in convergence.FIGURE_9.trend(_starts(5, 15)).found


def _losses(deq: float, baseline: float) -> list[Record]:
    return [
        record({"data": "d", "steps": 10, "method": method, "seed": seed}, best=[loss + seed / 10], seconds=1.0)
        for method, loss in (("paper", deq), ("baseline", baseline))
        for seed in range(3)
    ]


def test_table_3_needs_a_lower_loss():
    assert inversion.TABLE_3.trend(_losses(1, 5)).passed
    assert not inversion.TABLE_3.trend(_losses(5, 1)).passed
    assert not inversion.TABLE_3.trend(_losses(5, 5)).passed


def _qualities(deq: float, seconds: float, ours: float = 5.0) -> list[Record]:
    return [
        record(
            {"data": "d", "steps": 1000, "eta": 0.0, "method": method, "seed": seed},
            distance=distance + seed / 100,
            seconds_alone=time,
        )
        for method, distance, time in (("sequential", 1.0, 10.0), ("paper", deq, seconds), ("ours", 1.0, ours))
        for seed in range(3)
    ]


def test_table_1_fails_for_worse_images_and_for_no_speed():
    assert quality.TABLE_1.trend(_qualities(1.0, 2.0)).passed
    assert not quality.TABLE_1.trend(_qualities(1.5, 2.0)).passed
    assert not quality.TABLE_1.trend(_qualities(1.0, 20.0)).passed


def test_table_1_tells_the_speed_of_our_solver_and_does_not_judge_by_it():
    slow, fast = quality.TABLE_1.trend(_qualities(1.0, 2.0, 40.0)), quality.TABLE_1.trend(_qualities(1.0, 20.0, 2.5))
    assert slow.passed
    assert not fast.passed
    assert slow.found.endswith("times faster alone: T=1000 5; with this project's own solver: T=1000 0.25")
    assert fast.found.endswith("times faster alone: T=1000 0.5; with this project's own solver: T=1000 4")


def _splits(*distances: float) -> list[Record]:
    return [
        record({"iterations": k, "seed": seed}, distance=distance + seed / 100)
        for k, distance in enumerate(distances, start=1)
        for seed in range(3)
    ]


def test_figure_4_needs_an_interior_minimum():
    assert fpdm_sampling.FIGURE_4.trend(_splits(3, 1, 3)).passed
    assert not fpdm_sampling.FIGURE_4.trend(_splits(1, 2, 3)).passed
    assert not fpdm_sampling.FIGURE_4.trend(_splits(1, 1, 1)).passed


def _rules(jfb: float, multi: float, stochastic: float) -> list[Record]:
    return [
        record(
            {"settings": {"max_no_grad": 6, "backward": rule}, "budgets": [60, 120, 240], "seed": seed},
            distances={"DDPM 120": distance + seed / 100},
        )
        for rule, distance in (("jfb", jfb), ("multi-jfb", multi), ("sjfb", stochastic))
        for seed in range(3)
    ]


def test_table_4_needs_the_order_of_the_rules():
    assert trained.TABLE_4.trend(_rules(9, 5, 4)).passed
    assert not trained.TABLE_4.trend(_rules(4, 5, 4)).passed
    assert not trained.TABLE_4.trend(_rules(9, 4, 5)).passed


def test_both_starts_of_the_layer_are_tried_at_the_latents_of_one_trajectory(quick):
    denoiser = quick.denoiser("fpdm-digits")
    schedule = fixpoint_diffusion.NoiseSchedule.from_diffusers(denoiser.schedule_config)
    x_T = fixpoint_diffusion.initial_noise(3, range(2), (1, 8, 8))
    found = reuse.convergence(denoiser.model.eval(), x_T, schedule, steps=3, timesteps=2, iterations=3)
    # By hand: the steps of DDIM, every layer iterated until nothing moves.
    x, before = x_T, None
    transitions = fixpoint_diffusion.Transitions.of(
        schedule, schedule.timesteps(3, "trailing"), prediction_type="v_prediction"
    )
    for k, t in enumerate(transitions.timesteps):
        with torch.no_grad():
            out, solution = denoiser.model(x, t, depth=400, return_solution=True)
            if k:
                for start, z0 in ((reuse.STARTS[0], None), (reuse.STARTS[1], before)):
                    problem = reuse.fpdm_layer_problem(denoiser.model, x, t, z0)
                    z = problem.z0
                    for n in range(3):
                        expected = float((problem(z) - z).flatten(1).norm(dim=1).median())
                        assert found[start][str(int(t))][n] == pytest.approx(expected, rel=2e-2)
                        z = problem(z)
        before = solution.value
        x = transitions.step(x.double(), out.double(), k).float()


def test_a_control_trains_as_many_steps_as_the_run_that_it_is_a_control_of(quick):
    dit = trained.quick("dit")
    plain = {**dit, "steps": None, "time": {"settings": dit["settings"], "steps": 3}}
    settings = trained.quick("fpdm")["settings"]
    other = {**plain, "network": "fpdm", "settings": settings}
    control = {**other, "match": "steps", "settings_of_other": plain["settings"]}
    measures = training.TRAININGS.run(control, quick)
    reference = quick.records.find("fpdm-training", plain)
    assert reference is not None
    assert measures["steps"] == reference.measures["steps"]
    measures = training.TRAININGS.run({**plain, "match": "flops", "settings_of_other": settings}, quick)
    reference = quick.records.find("fpdm-training", other)
    assert reference is not None
    step = measures["training_flops"] / measures["steps"]
    assert abs(measures["training_flops"] - reference.measures["training_flops"]) <= step


def test_equal_time_is_measured_in_turn_and_once_for_all_seeds(quick, monkeypatch, tmp_path):
    asked = []

    class Slower:
        """A trial on a machine that gets slower and slower, where a step of the FPDM takes half as long as DiT's."""

        def __init__(self, folder, *, kind, training, **options):
            asked.append(training["seed"])
            self.seconds = len(asked) * (0.5 if kind == "fpdm" else 1) * training["steps"]

        def run(self, *, progress):
            return self

    monkeypatch.setattr(training.TrainingRun, "start", Slower)
    resources = replace(quick, records=Records(tmp_path))
    time = {"settings": trained.quick("dit")["settings"], "steps": 1000}
    config = trained.quick("fpdm") | {"time": time}
    steps = training.steps_in_time(config, resources)
    assert 1600 < steps < 2400
    assert sorted(set(asked)) == list(range(8)), "steps of random depth are others in each trial"
    measured = len(asked)
    assert training.steps_in_time(config | {"seed": 5}, resources) == steps
    assert len(asked) == measured
    assert training.steps_in_time(trained.quick("dit") | {"time": time}, resources) == 1000


def test_an_interrupted_training_goes_on(quick, tmp_path):
    config = trained.quick("dit")
    resources = replace(quick, scratch=tmp_path)
    first = training.TRAININGS.run(config, resources)
    again = training.TRAININGS.run(config, resources)  # the folder is there, the record is not
    for name in ("steps", "loss", "distances"):
        assert again[name] == pytest.approx(first[name])


def test_a_model_that_other_code_has_trained_is_not_taken_for_ones_own(quick, tmp_path):
    records = Records(tmp_path / "records")
    resources = replace(quick, scratch=tmp_path, records=records)
    training.TRAININGS.run(trained.quick("dit"), resources)
    records.code = "other"
    training.TRAININGS.run(trained.quick("dit"), resources)
    assert len(list(tmp_path.glob("dit-digits-*"))) == 2


def test_models_and_data_come_from_the_folders_that_hold_them_by_name(quick, tmp_path):
    shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "models" / "mine")
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    pictures = torch.rand(5, 1, 8, 8) * 2 - 1
    np.save(tmp_path / "data" / "pictures" / "images.npy", pictures.numpy())
    elsewhere = replace(quick, models=tmp_path / "models", data=tmp_path / "data")
    config = convergence.FIGURE_1.grid["quick"][0]
    expected = quick.records.find("chain-solve", config)
    measures = convergence.SOLVES.run({**config, "model": "mine"}, elsewhere)
    assert measures["error"].tolist() == pytest.approx(expected.measures["error"], rel=1e-3)
    assert torch.allclose(elsewhere.images("pictures", 1, 3), pictures[1:4])
    with pytest.raises(FileNotFoundError, match="no data set 'others' in"):
        elsewhere.images("others", 0, 1)
    with pytest.raises(ValueError, match="distances to pictures need --features"):
        elsewhere.distance(iter([pictures]), "pictures")


def test_latents_are_judged_as_images(quick, tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "sd-vae")
    latents = torch.randn(2, vae.config.latent_channels, 4, 4)
    images = replace(quick, models=tmp_path).pictures(latents, "imagenet")
    with torch.no_grad():
        assert torch.allclose(images, vae.decode(latents / vae.config.scaling_factor).sample, atol=1e-5)
    assert quick.pictures(latents, "digits") is latents


def test_at_the_papers_scale_a_trained_folder_is_judged(quick, tmp_path):
    config = trained.quick("dit")
    measures = training.TRAININGS.run(config, replace(quick, scratch=tmp_path))
    (folder,) = tmp_path.glob("dit-*")
    again = training.TRAININGS.run({**config, "model": folder.name}, replace(quick, models=tmp_path))
    assert again["distances"] == pytest.approx(measures["distances"])
    assert "steps" not in again


def test_the_committed_summary_is_that_of_the_committed_records():
    expected = running.summary(list(EXPERIMENTS.values()), "mini", Records(COMMITTED / "records", any_code=True))
    assert (COMMITTED / "summary.md").read_text() == expected
    assert "| OPEN |" not in expected  # as docs/reproduction.md says


def run_command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fixpoint-diffusion", "experiments", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_run(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run_command(monkeypatch, "run", "fpdm/memory", "--quick", "--out", str(tmp_path / "file" / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: cannot write to {tmp_path / 'file' / 'out'}")


def test_list_prints_a_line_for_each(monkeypatch, capsys):
    assert run_command(monkeypatch, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    for line, entry in zip(lines, EXPERIMENTS.values(), strict=True):
        assert line.endswith(entry.claim)


def test_run_computes_what_is_missing_and_report_runs_nothing(monkeypatch, capsys, tmp_path):
    assert run_command(monkeypatch, "report", "fpdm/memory", "--quick", "--out", str(tmp_path)) == 0
    assert "OPEN     fpdm/memory" in capsys.readouterr().out
    assert run_command(monkeypatch, "run", "fpdm/memory", "--quick", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "PASS     fpdm/memory" in out
    assert "its verdicts mean nothing" in out
    assert (tmp_path / "report.html").exists()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.json")}
    assert len(files) == len(EXPERIMENTS["fpdm/memory"].grid["quick"])
    assert run_command(monkeypatch, "run", "fpdm/memory", "--quick", "--out", str(tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.json")} == files
    assert capsys.readouterr().err == ""  # no bar where nothing is run

    for path in files:
        path.rename(path.with_name(f"{path.stem.partition('-')[0]}-ofanother.json"))
    note = f"Note: {len(files)} missing runs have records of other versions of the code; --any-commit counts these"
    assert run_command(monkeypatch, "run", "fpdm/memory", "--quick", "--dry-run", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().out.startswith(note)
    assert run_command(monkeypatch, "report", "fpdm/memory", "--quick", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().out.startswith(note)
    command = ("report", "fpdm/memory", "--quick", "--any-commit", "--out", str(tmp_path))
    assert run_command(monkeypatch, *command) == 0
    assert capsys.readouterr().out.startswith("PASS     fpdm/memory")


def test_ctrl_c_in_a_training_keeps_its_steps_and_the_finished_runs(monkeypatch, capsys, tmp_path):
    original = prepared.PreparedRun.step

    def press(*given):
        signal.raise_signal(signal.SIGINT)
        return original(*given)

    command = ("run", "fpdm/memory", "fpdm/figure-11", "--quick", "--out", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(prepared.PreparedRun, "step", press)
        assert run_command(monkeypatch, *command) == 130
    kept, models = tmp_path / "records", tmp_path / "models"
    said = f"finished runs are kept in {kept}, checkpoints of a training in {models}. The same command goes on."
    assert capsys.readouterr().out.strip() == f"Interrupted; {said}"
    records = len(list(kept.rglob("*.json")))
    assert records == len(EXPERIMENTS["fpdm/memory"].grid["quick"])
    (state,) = models.rglob("state.safetensors")
    assert load_record(state)["step"] == 1
    assert run_command(monkeypatch, *command) == 0
    assert load_record(state)["step"] == 2
    assert "fpdm/figure-11: " in capsys.readouterr().out


def test_results_of_another_command_are_not_replaced(monkeypatch, capsys, tmp_path):
    bench.write(bench.document([], seconds=0.0), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    for command in ("run", "report"):
        assert run_command(monkeypatch, command, "fpdm/memory", "--quick", "--out", str(tmp_path)) == 2
        assert "holds results.json, which this command has not written: choose another name" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_elsewhere_ends_in_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fixpoint_diffusion.experiments.running.report", interrupted)
    assert run_command(monkeypatch, "report", "fpdm/memory", "--out", str(tmp_path)) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.parametrize("scale", [("--scale", "mini"), ("--scale", "paper"), ("--quick",)])
def test_a_dry_run_writes_nothing(monkeypatch, capsys, tmp_path, scale):
    out = tmp_path / "out"
    assert run_command(monkeypatch, "run", "deq-ddim/table-1", "--dry-run", *scale, "--out", str(out)) == 0
    assert "deq-ddim/table-1" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "deq-ddim/tabel-1"], "Did you mean 'deq-ddim/table-1'?"),
        (["run"], "name experiments, or take --all"),
        (["run", "fpdm", "--all"], "name experiments, or take --all"),
        (["run", "fpdm/memory", "--quick", "--scale", "paper"], "--quick is a scale of its own"),
        (["run", "deq-ddim/figure-1", "--scale", "paper"], "no model 'ddpm-cifar10-32': give --models"),
        (["run", "fpdm/table-1", "--scale", "paper"], "no model 'fpdm-imagenet': give --models"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    out = tmp_path / "out"
    assert run_command(monkeypatch, *arguments, "--out", str(out)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert message in line
    assert not list(tmp_path.rglob("*.json"))


def test_the_names_are_those_of_the_experiments():
    assert list(EXPERIMENTS) == list(NAMES)


def test_a_paper_is_all_of_its_experiments():
    assert {each.name for each in experiments_named(["fpdm"])} == {name for name in EXPERIMENTS if name[0] == "f"}
