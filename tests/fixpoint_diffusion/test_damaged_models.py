"""Model folders that are damaged or do not fit together: one clear error each, before memory is asked for."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixpoint_diffusion.cli import main
from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded_folder, load_denoiser
from fixpoint_diffusion.files import read_json

pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", "scheduler_config.json", WEIGHTS, "prior.safetensors")
ODD_VALUES = (None, True, -1, 0, 3, 1.5, 10**6, 10**12, 10**30, float("nan"), "", "x", [], [1], ["a"], {}, "\ud800")


@pytest.fixture(params=EMBEDDED_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_folder(request.param), tmp_path / request.param))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[Tensor], Tensor], *, file: str = WEIGHTS) -> str:
    """Change the first tensor of a file; returns its name."""
    tensors = load_file(folder / file)
    name = min(name for name, tensor in tensors.items() if tensor.ndim > 0)
    save_file({**tensors, name: change(tensors[name].clone())}, folder / file, metadata={"format": "pt"})
    return name


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file in one way; returns what was done."""
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    kind = rng.choice(["cut", "flip", "empty", "swap", "value", "value", "value"])
    if kind == "value":
        path = folder / rng.choice(["config.json", "config.json", "scheduler_config.json"])
        key, value = rng.choice(sorted(json.loads(path.read_text()))), rng.choice(ODD_VALUES)
        edit(path, **{key: value})
        return f"{path.name}: {key} = {value!r}"
    if kind == "swap":
        other = next(name for name in EMBEDDED_MODELS if name != folder.name)
        shutil.copy(embedded_folder(other) / path.name, path)
    elif kind == "flip":
        at = rng.randrange(min(len(content), 6000))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
    else:
        path.write_bytes(b"" if kind == "empty" else content[: rng.randrange(len(content))])
    return f"{path.name}: {kind}"


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_ends_in_one_line_or_in_a_model_that_works(folder: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    for trial in range(10):
        copy = Path(shutil.copytree(folder, tmp_path / str(trial) / folder.name))
        done = damage(copy, rng)
        try:
            denoiser = load_denoiser(copy)
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
        else:
            message = ""
            assert denoiser.sample_shape is not None
            out = denoiser(torch.randn(2, *denoiser.sample_shape), torch.tensor([3, 999]))
            assert bool(torch.isfinite(out).all()), done
        assert "\n" not in message, done
        assert len(message) < 900, done
    assert refused > 0


@pytest.mark.parametrize("seed", range(2))
def test_commands_on_damaged_folders_end_in_one_line_and_write_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    rng = random.Random(seed)
    out, refused = tmp_path / "out", 0
    commands = [
        ["info", folder],
        ["sample", "--model", folder, "--steps", 2, "--num-images", 1, "--out", out],
        ["sample", "--model", folder, "--steps", 2, "--num-images", 1, "--class", "cats", "--out", out],
        ["train", "--init", folder, "--steps", 1, "--batch-size", 1, "--out", out],
        ["invert", "digits", "--model", folder, "--steps", 1, "--num-images", 1, "--max-rounds", 1, "--out", out],
    ]
    for command in commands * 3:
        shutil.rmtree(folder)
        shutil.copytree(embedded_folder(folder.name), folder)
        done = damage(folder, rng)
        monkeypatch.setattr("sys.argv", ["fixpoint-diffusion", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, 2), done
        errors = capsys.readouterr().err
        if stop.value.code == 2:
            refused += 1
            assert errors.splitlines()[-1].startswith("Error: "), done
            assert "Traceback" not in errors, done
            assert not out.exists(), done
        shutil.rmtree(out, ignore_errors=True)
    assert refused > 0


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_json_nested_too_deep_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON: it is nested too deep"):
        load_denoiser(folder)


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "must hold a JSON object, got a list"), ("{", "not valid JSON")]
)
def test_json_of_another_kind_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"no b\.json in"):
        read_json(tmp_path / "b.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(tmp_path / "a.json")


HUGE = {
    "ddpm-digits": {"block_out_channels": [30000, 60000]},
    "dit-digits": {"width": 65536},
    "flow-digits": {"block_out_channels": [30000, 60000]},
    "fpdm-digits": {"width": 65536},
}
MANY = {
    "ddpm-digits": {"layers_per_block": 10**7},
    "dit-digits": {"depth": 10**7},
    "flow-digits": {"layers_per_block": 10**7},
    "fpdm-digits": {"n_pre": 10**7},
}


def test_sizes_that_do_not_fit_the_weights_cost_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that this config describes would take tens of gigabytes, and is never built."""
    allocated: list[int] = []
    empty = torch.empty

    def watched(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        allocated.append(0 if tensor.device.type == "meta" else tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    edit(folder / "config.json", **HUGE[folder.name])
    with pytest.raises(ValueError, match=r"do not fit its config\.json: .* has shape"):
        load_denoiser(folder)
    assert allocated
    assert max(allocated) < 10**6


def test_layers_without_end_are_refused_before_they_are_built(folder: Path) -> None:
    edit(folder / "config.json", **MANY[folder.name])
    with pytest.raises(ValueError, match=r"it asks for more than .* tensors, and the weights hold"):
        load_denoiser(folder)


def test_tables_that_no_weight_shows_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_folder("fpdm-digits"), tmp_path / "model"))
    edit(folder / "config.json", sample_size=100_000)
    with pytest.raises(ValueError, match=r"asks for .* GB beside weights of .* GB: is a size in it wrong"):
        load_denoiser(folder)


def test_zero_groups_and_settings_that_fail_only_in_a_call_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model"))
    for values in ({"norm_num_groups": 0}, {"downsample_padding": 2}):
        shutil.copy(embedded_folder("ddpm-digits") / "config.json", folder)
        edit(folder / "config.json", **values)
        with pytest.raises(ValueError, match=r"config\.json does not describe a usable network"):
            load_denoiser(folder)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    for value in (float("nan"), float("inf")):
        name = change_weights(folder, lambda tensor, value=value: tensor.index_fill_(0, torch.tensor([0]), value))
        with pytest.raises(ValueError, match=f"not finite, in {name}"):
            load_denoiser(folder)


def test_weights_stored_as_integers_are_refused_and_halved_doubles_are_told(folder: Path) -> None:
    original = (folder / WEIGHTS).read_bytes()
    name = change_weights(folder, lambda tensor: tensor.to(torch.int8))
    with pytest.raises(ValueError, match=f"{name} is stored as I8, expected one of F64, F32, F16, BF16"):
        load_denoiser(folder)
    (folder / WEIGHTS).write_bytes(original)
    change_weights(folder, lambda tensor: tensor.double())
    with pytest.warns(UserWarning, match="stored in float64 are loaded as torch.float32"):
        load_denoiser(folder)


def test_index_of_shards_may_not_leave_its_folder(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model"))
    shutil.move(folder / WEIGHTS, tmp_path / WEIGHTS)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": f"../{WEIGHTS}"}}))
    with pytest.raises(ValueError, match="outside its own folder"):
        load_denoiser(folder)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ValueError, match="must hold a weight_map"):
        load_denoiser(folder)
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": "missing.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        load_denoiser(folder)


PRIORS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"mean": torch.zeros(3)}, "must have one size"),
    "nan": ({"mean": torch.full((64,), float("nan"))}, "mean must be finite numbers"),
    "negative": ({"variances": torch.full((64,), -1.0)}, "variances must be at least 0"),
    "basis": ({"basis": torch.ones(64, 64)}, "basis must be orthogonal"),
    "shape": ({"basis": torch.eye(3)}, "must have one size"),
    "extra": ({"extra": torch.ones(1)}, "it holds basis, extra, mean, variances"),
    "foreign": ({"mean": torch.zeros(9), "variances": torch.ones(9), "basis": torch.eye(9)}, "is for 9 entries"),
}


@pytest.mark.parametrize("case", PRIORS)
def test_prior_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(embedded_folder("ddpm-digits"), tmp_path / "model"))
    tensors, message = PRIORS[case]
    save_file({**load_file(folder / "prior.safetensors"), **tensors}, folder / "prior.safetensors")
    with pytest.raises(ValueError, match=message):
        load_denoiser(folder)


def test_schedule_for_another_prediction_than_the_models_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_folder("fpdm-digits"), tmp_path / "model"))
    edit(folder / "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(ValueError, match="predicts 'v_prediction', but its schedule is for 'epsilon'"):
        load_denoiser(folder)
    edit(folder / "scheduler_config.json", prediction_type="noise")
    with pytest.raises(ValueError, match="has prediction_type 'noise'"):
        load_denoiser(folder)
