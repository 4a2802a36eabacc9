from __future__ import annotations

import importlib
import json
import pickle
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, DiffusersDenoiser, embedded, embedded_folder, load_denoiser
from fixpoint_diffusion.denoisers.checksums import verify_checksums, write_checksums
from tests.fixpoint_diffusion.tiny import tiny_pipeline, tiny_unet

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "prediction_type": "v_prediction"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loading a denoiser must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def attentive_unet(**options: object) -> nn.Module:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return tiny_unet(**blocks, **options)


@pytest.fixture
def unet() -> nn.Module:
    return attentive_unet()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])


@pytest.fixture
def folder(tmp_path: Path, unet: nn.Module) -> Iterator[Path]:
    """A folder in the layout of google/ddpm-cifar10-32: everything beside everything."""
    unet.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return tmp_path / "model"


def check_equals(denoiser: object, unet: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(denoiser(*batch), unet(*batch).sample)


def test_adapter_returns_the_models_own_output(unet: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    denoiser = DiffusersDenoiser(unet)
    check_equals(denoiser, unet, batch)
    assert denoiser.sample_shape == (1, 8, 8)
    assert denoiser.prediction_type == "epsilon"


def test_adapter_works_in_the_models_dtype_and_answers_in_the_inputs(
    unet: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    output = DiffusersDenoiser(unet.double())(*batch)
    assert output.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(output, unet(batch[0].double(), batch[1]).sample.float())


def test_adapter_lets_gradients_through_to_x(unet: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0].requires_grad_()
    DiffusersDenoiser(unet.requires_grad_(False))(x, batch[1]).square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_adapter_repeats_further_inputs_and_drops_the_learned_variance(batch: tuple[Tensor, Tensor]) -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            assert class_labels.shape == t.shape
            return torch.cat([x + class_labels.view(-1, 1, 1, 1), torch.full_like(x, 9)], 1)

    denoiser = DiffusersDenoiser(Labelled(), inputs={"class_labels": torch.tensor([4])})
    torch.testing.assert_close(denoiser(*batch), batch[0] + 4)
    with pytest.raises(ValueError, match="class_labels"):
        DiffusersDenoiser(Labelled(), inputs={"class_labels": torch.tensor([4, 5])})


def test_adapter_refuses_an_unknown_prediction_type(unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="'eps'"):
        DiffusersDenoiser(unet, prediction_type="eps")


def test_flat_folder_loads_with_its_schedule(folder: Path, unet: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    denoiser = load_denoiser(folder)
    check_equals(denoiser, unet, batch)
    assert denoiser.prediction_type == "v_prediction"
    assert denoiser.schedule_config == SCHEDULER
    assert not denoiser.model.training
    assert not any(p.requires_grad for p in denoiser.model.parameters())


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_pipeline_folder_loads(folder: Path, unet: nn.Module, batch: tuple[Tensor, Tensor], name: str) -> None:
    pipeline = folder.parent / "pipeline"
    (pipeline / "scheduler").mkdir(parents=True)
    shutil.move(folder / "scheduler_config.json", pipeline / "scheduler")
    shutil.move(folder / "model_index.json", pipeline)
    shutil.move(folder, pipeline / name)
    denoiser = load_denoiser(str(pipeline))
    check_equals(denoiser, unet, batch)
    assert denoiser.schedule_config == SCHEDULER


def test_folder_without_a_schedule_predicts_noise(folder: Path) -> None:
    (folder / "scheduler_config.json").unlink()
    denoiser = load_denoiser(folder)
    assert denoiser.schedule_config is None
    assert denoiser.prediction_type == "epsilon"


def test_attention_names_of_old_checkpoints_are_understood(
    folder: Path, unet: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    """google/ddpm-cifar10-32 was written when diffusers called these query, key, value and proj_attn."""
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_equals(load_denoiser(folder), unet, batch)


def test_half_precision_weights_come_as_float32_unless_asked_otherwise(
    folder: Path, unet: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    (folder / WEIGHTS).unlink()
    unet.half().save_pretrained(folder, variant="fp16")
    denoiser = load_denoiser(folder)
    assert {p.dtype for p in denoiser.model.parameters()} == {torch.float32}
    check_equals(denoiser, unet.float(), batch)
    assert next(load_denoiser(folder, dtype=torch.float64).model.parameters()).dtype == torch.float64


def test_another_model_class_of_diffusers_loads_by_its_name(tmp_path: Path) -> None:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    model.save_pretrained(tmp_path)
    denoiser = load_denoiser(tmp_path)
    assert type(denoiser.model).__name__ == "DiTTransformer2DModel"
    labelled = DiffusersDenoiser(denoiser.model, inputs={"class_labels": torch.tensor([2])})
    assert labelled(torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_would_take_the_timestep_for_something_else_is_named(compiled: bool, tmp_path: Path) -> None:
    """It was told t as the embeddings of a prompt, and said that these come twice."""
    model = tiny_pipeline("StableDiffusion3Pipeline").transformer
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel is not called as .* after hidden_states is encoder_"):
        DiffusersDenoiser(torch.compile(model) if compiled else load_denoiser(tmp_path).model)
    model.forward = lambda x, t: (0.5 * x,)  # adapted
    x = torch.ones(2, 4, 8, 8)
    assert torch.equal(DiffusersDenoiser(model)(x, torch.tensor([1, 2])), 0.5 * x)


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    # Fourier time embeddings draw their frequencies whenever the model is built.
    attentive_unet(time_embedding_type="fourier").save_pretrained(tmp_path)
    state = torch.get_rng_state()
    load_denoiser(tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_pickled_weights_are_refused_unless_asked_for(
    folder: Path, unet: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder, safe_serialization=False)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load_denoiser(folder)
    check_equals(load_denoiser(folder, allow_pickle=True), unet, batch)


def test_pickle_that_would_run_code_is_refused_even_when_pickles_are_allowed(folder: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harmed",))

    (folder / WEIGHTS).unlink()
    with (folder / "diffusion_pytorch_model.bin").open("wb") as file:
        pickle.dump(Harm(), file, protocol=2)
    with pytest.raises(ValueError, match="does not load"):
        load_denoiser(folder, allow_pickle=True)
    assert not (tmp_path / "harmed").exists()


def test_missing_folder_says_that_nothing_is_downloaded() -> None:
    with pytest.raises(FileNotFoundError, match="never downloaded"):
        load_denoiser("google/ddpm-cifar10-32")


def test_folder_without_a_model_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"expected config\.json .*found notes\.txt"):
        load_denoiser(tmp_path)


def test_missing_weights_list_what_is_there(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.safetensors, found config\.json"):
        load_denoiser(folder)


@pytest.mark.parametrize("name", ["NoSuchModel", "DDIMScheduler", None])
def test_class_that_is_no_model_is_refused_by_name(folder: Path, name: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    with pytest.raises(ValueError, match=f"_class_name is {name!r}"):
        load_denoiser(folder)


def test_broken_config_names_the_file(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_denoiser(folder)


def test_missing_and_unexpected_tensors_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "stray": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="stray"):
        load_denoiser(folder)
    tensors.pop("conv_in.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        load_denoiser(folder)


def test_weights_of_another_shape_and_damaged_files_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 16]}))
    with pytest.raises(ValueError, match=r"conv_in\.bias has shape \(8,\), expected \(16,\)"):
        load_denoiser(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_denoiser(folder)


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_model_is_small_and_whole(name: str) -> None:
    folder = embedded_folder(name)
    assert {"config.json", WEIGHTS, "scheduler_config.json", "training_log.csv"} <= set(verify_checksums(folder))
    assert (folder / WEIGHTS).stat().st_size <= 3e6
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.float16}
    denoiser = embedded(name)
    assert sum(p.numel() for p in denoiser.model.parameters()) <= 1.5e6
    assert denoiser.sample_shape == (1, 8, 8)
    assert denoiser.schedule_config is not None


def test_embedded_unet_is_a_folder_that_diffusers_itself_reads(batch: tuple[Tensor, Tensor]) -> None:
    folder = embedded_folder("ddpm-digits")
    model = diffusers.UNet2DModel.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    check_equals(embedded("ddpm-digits"), model.eval(), batch)
    scheduler = diffusers.DDIMScheduler.from_pretrained(str(folder), local_files_only=True)
    assert scheduler.config.prediction_type == "epsilon"


def test_unknown_embedded_model_lists_the_known() -> None:
    with pytest.raises(ValueError, match="ddpm-digits, dit-digits, flow-digits, fpdm-digits"):
        embedded("digits")


def test_embedded_model_with_a_changed_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tmp_path / "assets"
    shutil.copytree(embedded_folder("ddpm-digits"), assets / "ddpm-digits")
    # By import_module, because the package's attribute of that name is the function.
    module = importlib.import_module("fixpoint_diffusion.denoisers.embedded")
    monkeypatch.setattr(module, "files", lambda _: tmp_path)
    content = bytearray((assets / "ddpm-digits" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (assets / "ddpm-digits" / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{WEIGHTS} differs"):
        embedded("ddpm-digits")
    shutil.rmtree(assets / "ddpm-digits")
    with pytest.raises(FileNotFoundError, match="reinstall"):
        embedded("ddpm-digits")


def test_checksums_notice_missing_files_and_are_in_sha256sum_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    write_checksums(tmp_path)
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example 1
    assert (tmp_path / "SHA256SUMS").read_text() == f"{known}  a.txt\n"
    assert verify_checksums(tmp_path) == ["a.txt"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt is missing"):
        verify_checksums(tmp_path)
