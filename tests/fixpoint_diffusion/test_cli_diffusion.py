from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded, embedded_folder, family
from fixpoint_diffusion.denoisers.checksums import write_checksums
from fixpoint_diffusion.files import sha256_of
from fixpoint_diffusion.options.sampling import SamplingOptions
from fixpoint_diffusion.training import TrainingConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL_UNET = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4}
SMALL_FPDM = {"width": 16, "heads": 2, "max_no_grad": 2, "max_grad": 2}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "unet.json").write_text(json.dumps(SMALL_UNET))
    (tmp_path / "fpdm.json").write_text(json.dumps(SMALL_FPDM))
    return tmp_path


def train(settings: Path, out: Path, *arguments: object, kind: str = "unet") -> Result:
    options = ["--settings", settings / f"{kind}.json", "--batch-size", 4, "--out", out]
    return invoke("train", kind, *options, *arguments)


@pytest.mark.parametrize("command", [(), ("sample",), ("train",), ("info",), ("invert",)])
def test_help_explains_with_an_example(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    if command:
        assert f"Example: fixpoint-diffusion {command[0]}" in result.output


@pytest.mark.parametrize(
    ("command", "options", "own"), [("train", TrainingConfig, False), ("sample", SamplingOptions, True)]
)
def test_options_that_a_dataclass_has_are_its_fields_with_its_defaults(command: str, options: type, own: bool) -> None:
    """``train`` passes on what is typed alone, since model families have defaults of their own, and says both."""
    taken = {p.name: p for p in typer.main.get_command(app).commands[command].params}
    fields = {field.name: field for field in dataclasses.fields(options) if "help" in field.metadata}
    assert len(fields) >= 10
    for name, field in fields.items():
        option = taken.pop(name)
        assert option.help == field.metadata["help"]
        if own:
            assert option.default == field.default
        else:
            assert option.default is None
            assert option.show_default == f"the model family's, or {field.default}"
    assert not taken.keys() & {field.name for field in dataclasses.fields(options)}


def test_what_is_typed_reaches_the_training_and_the_rest_is_the_familys(tmp_path: Path, settings: Path) -> None:
    train(settings, tmp_path / "out", "--steps", 1, "--ema-decay", 0.5, "--checkpoint-every", 7, kind="fpdm")
    about = json.loads((tmp_path / "out" / "training_config.json").read_text())
    expected = TrainingConfig(
        **{**family("fpdm").training, "steps": 1, "batch_size": 4, "ema_decay": 0.5, "checkpoint_every": 7}
    )
    assert {name: about[name] for name in dataclasses.asdict(expected)} == dataclasses.asdict(expected)


def test_help_does_not_import_diffusers() -> None:
    code = "import sys, fixpoint_diffusion.cli as c; from typer.testing import CliRunner as R; r = R().invoke"
    code += "(c.app, ['train', '--help']); assert r.exit_code == 0; print('diffusers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("sampel",), "'sample'"),
        (("sample", "--num-image", "3"), "--num-images"),
        (("train", "--batchsize", "3"), "--batch-size"),
        (("sample", "--solver", "andersen"), "'anderson'"),
        (("train", "vnet"), "'unet'"),
    ],
)
def test_misspelled_words_fail_with_a_suggestion(arguments: tuple[str, ...], suggestion: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert suggestion in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--steps", "0"),
        ("sample", "--eta", "2"),
        ("sample", "--num-images", "x"),
        ("train", "--steps", "-1"),
        ("train", "--resume", "--seed", "3"),
    ],
)
def test_values_out_of_range_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert arguments[1] in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "no-such"), "embedded models are ddpm-digits"),
        (("train", "--data", "no-such"), "'digits'"),
        (("train", "--learning-rate", "-1"), "learning_rate must be positive and finite"),
        (("train", "--resume", "--out", "no-such"), "no checkpoint to resume from"),
        (("train", "--settings", "no-such.json"), "no-such.json"),
        (("sample", "--iterations", "2"), "--iterations"),
        (("sample", "--max-rows", "9"), "--max-rows is for --solver causal, not for --solver sequential"),
        (("sample", "--max-rows", "9", "--solver", "anderson"), "--max-rows is for --solver causal"),
        (("sample", "--noise-rtol", "1", "--eta", "1"), "--noise-rtol is for --solver causal, not for"),
        (("sample", "--noise-rtol", "1", "--solver", "causal"), "--noise-rtol needs --eta: without it, no step"),
        (("sample", "--probes", "1"), "--probes is for --solver causal, not for"),
        (("sample", "--max-rounds", "3"), "--max-rounds is for parallel solvers such as --solver causal, not for"),
        (("sample", "--rtol", "1e-3"), "--rtol is for parallel solvers such as --solver causal, not for sequential"),
        (("sample", "--max-rows", "auto"), "--max-rows is for --solver causal, not for --solver sequential"),
        (("sample", "--max-rows", "some", "--solver", "causal"), "expected a number or auto, got 'some'"),
        (("sample", "--max-rows", "0", "--solver", "causal"), "--max-rows must be from 1 to 1000000000, got 0"),
        (("sample", "--steps", "2000"), "1000 timesteps"),
        (("sample", "--rtol", "-1"), "--rtol"),
        (("sample", "--out", "/dev/null/here"), "cannot write to /dev/null/here"),
        (("evaluate", "digits", "digits", "--out", "/dev/null/x.json"), "cannot write to /dev/null/x.json"),
    ],
)
def test_unusable_input_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize("module", ["diffusers", "sklearn", "PIL"])
def test_missing_library_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, module: str
) -> None:
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    command = {"diffusers": ("sample", "--steps", 1), "sklearn": ("train",), "PIL": ("sample", "--steps", 1)}[module]
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *command) == 2
    assert "pip install 'fixpoint-torch[diffusion]'" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fixpoint_diffusion.commands.info.model_folder", interrupted)
    assert run_main(monkeypatch, "info", "ddpm-digits") == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


# PyTorch takes seconds to import, diffusers and PyTorch's compiler as long again.
_IN_ORDER = """
import sys
from fixpoint_diffusion.cli import main

def run(*words):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as stop:
        return stop.code

assert run("smaple") == run("sample", "--stpes", "3") == run("train", "--eta") == run("sample", "--eta", "2") == 2
assert run("sample", "--model", "ddpm-digit") == run("info", "unte") == run("invert", "digits", "--model", "unte") == 2
assert run("train", "unett") == 2
assert run("experiments", "run", "deq-ddim/tabel-1") == run("sample", "--solver", "causal", "--noise-rtol", "1") == 2
assert run("train", "--data", "digts") == run("invert", "digts") == run("encode", "a", "--vae", "b", "--out", "c") == 2
assert run("train", "fpdm", "--preset", "papr") == run("train", "fpdm", "--backward", "sjbf") == 2
assert run("--version") == run("-h") == run("sample", "-h") == 0
assert not {"torch", "diffusers"} & sys.modules.keys()
assert run("info") == run("info", "fpdm-digits") == run("info", "ddpm-digits") == 0
assert not {"diffusers", "torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()
"""


def test_commands_import_what_they_need_and_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", _IN_ORDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = ["No such command 'smaple'", "No such option: --stpes", "No such option: --eta", "Invalid value for '--eta'"]
    said += ["no model folder 'ddpm-digit'", "no model folder 'unte'", "no model folder 'unte'"]
    said += ["Invalid value for KIND: no model family 'unett'. Did you mean 'unet'?"]
    said += ["no experiment 'deq-ddim/tabel-1'. Did you mean 'deq-ddim/table-1'?", "--noise-rtol needs --eta"]
    said += [f"no data set, .npy file or folder {name!r}" for name in ("digts", "digts", "a")]
    said += ["Invalid value for '--preset': 'papr' is not one of", "Invalid value for '--backward'"]
    for line, start in zip(done.stderr.splitlines(), said, strict=True):
        assert line.startswith(f"Error: {start}")
    assert done.stdout.startswith(metadata.version("fixpoint-torch"))


def test_info_lists_the_embedded_models() -> None:
    output = invoke("info").output.splitlines()
    for name in EMBEDDED_MODELS:
        denoiser = embedded(name)
        count = sum(each.numel() for each in denoiser.model.parameters())
        about = f"{type(denoiser.model).__name__}, {count:,} parameters, samples 1x8x8"
        assert f"{name:12} {about}" in output


def test_info_describes_one_model() -> None:
    output = invoke("info", "ddpm-digits").output
    for fact in ("UNet2DModel", "701,345", "1x8x8", "epsilon", "linear 0.0001..0.02, 1000 timesteps", "files match"):
        assert fact in output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2, 1000 timesteps"),
        ({"trained_betas": [0.01] * 1000}, "trained_betas, 1000 timesteps"),
    ],
)
def test_info_names_no_betas_that_a_schedule_does_not_use(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model")
    (folder / "SHA256SUMS").unlink()
    config = folder / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    assert f"schedule   {said}" in invoke("info", folder).output


def test_info_says_the_same_of_a_network_from_its_files_and_from_itself(tmp_path: Path) -> None:
    for name in EMBEDDED_MODELS:
        folder = shutil.copytree(embedded_folder(name), tmp_path / name)
        vouched = invoke("info", folder).output.splitlines()
        (folder / "SHA256SUMS").unlink()  # nothing vouches for the files: the network is loaded
        assert invoke("info", folder).output.splitlines()[:-1] == vouched[:-1]
        assert vouched[-1].endswith("files match")


def test_info_reads_models_in_folders_of_their_own_and_in_shards(tmp_path: Path) -> None:
    model, source = embedded("ddpm-digits").model, embedded_folder("ddpm-digits")
    inner, sharded = tmp_path / "pipeline" / "unet", tmp_path / "sharded"
    shutil.copytree(source, inner, ignore=shutil.ignore_patterns("S*", "scheduler*"))
    model.save_pretrained(sharded, max_shard_size="1MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for folder in (inner.parent, sharded):
        shutil.copy(source / "scheduler_config.json", folder)
        files = [file for file in folder.rglob("*") if file.is_file()]
        lines = [f"{sha256_of(file)}  {file.relative_to(folder)}\n" for file in files]
        (folder / "SHA256SUMS").write_text("".join(lines))
        output = invoke("info", folder).output
        assert "701,345" in output
        assert f"{len(files)} files match" in output


def test_info_misses_weights_that_no_checksum_misses(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_checksums(folder)
    assert run_main(monkeypatch, "info", folder) == 2
    assert "no weights" in capsys.readouterr().err


def test_info_loads_what_its_checksums_leave_out(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model")
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.open() if "diffusion_pytorch_model" not in line))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\xff" * 4)  # NaN, which no header tells
    assert run_main(monkeypatch, "info", folder) == 2
    assert "not finite" in capsys.readouterr().err


def test_info_notices_damaged_files(settings: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    train(settings, tmp_path / "out", "--steps", 1)
    (tmp_path / "out" / "training_log.csv").write_text("changed")
    assert run_main(monkeypatch, "info", tmp_path / "out") == 2
    assert "training_log.csv differs" in capsys.readouterr().err


def sampled(tmp_path: Path, name: str, *arguments: object) -> tuple[np.ndarray, dict]:
    out = tmp_path / name
    result = invoke("sample", "--num-images", 3, "--steps", 6, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    with Image.open(out / "grid.png") as grid:
        assert min(grid.size) > 200
    return np.load(out / "images.npy"), json.loads((out / "sample.json").read_text())


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("solver", ["causal", "picard", "anderson", "broyden"])
def test_parallel_samples_equal_the_sequential_ones(tmp_path: Path, solver: str, eta: float) -> None:
    expected, _ = sampled(tmp_path, "one", "--eta", eta)
    images, figures = sampled(tmp_path, "other", "--eta", eta, "--solver", solver, "--rtol", 1e-5, "--max-rounds", 60)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert figures["converged"] == 3


def test_sequential_sampling_costs_one_round_per_step(tmp_path: Path) -> None:
    images, figures = sampled(tmp_path, "one")
    assert images.shape == (3, 1, 8, 8)
    assert (figures["rounds"], figures["evals"]) == (6, 18)


@pytest.mark.parametrize(
    ("solver", "call", "told"), [("causal", 0, True), ("causal", 1e3, False), ("sequential", 0, False)]
)
def test_whoever_asks_for_a_parallel_solver_where_it_does_not_pay_is_told_so(
    tmp_path: Path, monkeypatch, solver: str, call: float, told: bool
) -> None:
    monkeypatch.setattr("fixpoint_diffusion.sampling.job.seconds_of_call", lambda chain, rows, calls: call)
    result = invoke("sample", "--num-images", 2, "--steps", 3, "--out", tmp_path / "out", "--solver", solver)
    notes = [line for line in result.output.splitlines() if line.startswith("Note:")]
    assert len(notes) == told, result.output
    if told:
        assert "--solver causal took" in notes[0]
        assert "for 2 images; --solver sequential would take about 0 s" in notes[0]


def test_budget_of_rows_bounds_every_round_and_changes_no_image(tmp_path: Path) -> None:
    expected, _ = sampled(tmp_path, "one")
    images, figures = sampled(tmp_path, "other", "--solver", "causal", "--max-rows", 4, "--rtol", 1e-5)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert figures["converged"] == 3
    assert figures["evals"] <= 4 * figures["rounds"]


def test_budget_of_rows_by_timing_is_named_in_what_the_run_says(tmp_path: Path, monkeypatch) -> None:
    seconds = {3: 0.1, 12: 0.11}  # more rows cost nothing, then much
    monkeypatch.setattr(
        "fixpoint_diffusion.sampling.batch_cost.seconds_of_call", lambda chain, rows, calls=1: seconds.get(rows, 10.0)
    )
    options = ("--num-images", 3, "--steps", 200, "--solver", "causal", "--max-rows", "auto", "--out", tmp_path)
    result = invoke("sample", *options)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "sample.json").read_text())
    assert figures["max_rows"] == "auto"
    assert figures["rows_per_round"] == 12
    assert re.search(r"rows_per_round +12\n", result.output)
    assert figures["evals"] <= 12 * figures["rounds"]
    assert "3 images are there already" in invoke("sample", *options).output


def test_bar_ends_with_all_latents_and_shows_rounds_samples_and_rows(tmp_path: Path) -> None:
    result = invoke("sample", "--num-images", 3, "--steps", 6, "--solver", "causal", "--out", tmp_path)
    figures = json.loads((tmp_path / "sample.json").read_text())
    last = re.findall(r"sampling:.*", result.output.replace("\r", "\n"))[-1]
    assert "| 18/18 [" in last
    for shown in ("done=3/3", f"rounds={figures['rounds']}", f"rows={figures['evals']}"):
        assert shown in last


def test_seed_decides_the_images(tmp_path: Path) -> None:
    first, again, other = (sampled(tmp_path, f"{k}", "--seed", seed)[0] for k, seed in enumerate((5, 5, 6)))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_fpdm_samples_with_chosen_iterations_and_reuse(tmp_path: Path) -> None:
    images, figures = sampled(tmp_path, "a", "--model", "fpdm-digits", "--iterations", 2)
    assert figures["iterations"] == 2
    assert figures["reuse"] is True
    fresh, figures = sampled(tmp_path, "b", "--model", "fpdm-digits", "--iterations", 2, "--no-reuse")
    assert figures["reuse"] is False
    assert not np.allclose(images, fresh)
