"""DiT: published sizes, equality with diffusers' network, and both directions of conversion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fixpoint_diffusion import initial_noise, load_denoiser
from fixpoint_diffusion.cli import app
from fixpoint_diffusion.denoisers.schedules import ZERO_SNR_SCHEDULE
from fixpoint_diffusion.models import DiT, DiTConfig, load_dit, save_dit
from fixpoint_diffusion.models.blocks import sincos_positions, timestep_features
from fixpoint_diffusion.processes import SamplerConfig, wide

diffusers = pytest.importorskip("diffusers")

CONFIG = DiTConfig(sample_size=8, patch_size=2, in_channels=3, width=16, heads=2, depth=3, num_classes=5)


def shaken(module: Any, seed: int = 0) -> Any:
    """In evaluation mode and float64, with random numbers where a new network has zeros."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def their_module(**options: Any) -> Any:
    """A tiny ``DiTTransformer2DModel`` whose blocks share the embeddings, as those of the published weights do."""
    settings: dict[str, Any] = {"num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 5, **options}
    module = shaken(diffusers.DiTTransformer2DModel(2, 8, **settings))
    first, *others = module.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return module


def batch(channels: int, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 431, 999])[:n]


@pytest.mark.parametrize(
    ("name", "millions"),
    # Peebles and Xie (2023), Table 4.
    [
        *[("S/8", 33), ("S/4", 33), ("S/2", 33), ("B/8", 131), ("B/4", 130), ("B/2", 130)],
        *[("L/8", 459), ("L/4", 458), ("L/2", 458), ("XL/8", 676), ("XL/4", 675), ("XL/2", 675)],
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig.preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(("channels", "out", "patch"), [(4, 4, 2), (3, 6, 4)])
def test_outputs_are_those_of_diffusers_on_the_same_weights(channels: int, out: int, patch: int) -> None:
    theirs = their_module(in_channels=channels, out_channels=out, patch_size=patch)
    ours = DiT.from_diffusers(theirs)
    assert ours.config.learn_sigma == (out == 2 * channels)
    x, t = batch(channels)
    with torch.no_grad():
        for y in (torch.tensor([0, 3, 5]), torch.tensor([5, 5, 5])):
            expected = theirs(x, t, class_labels=y).sample
            torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours(x, t), expected, rtol=1e-9, atol=1e-9)  # None means the null label


@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_trained_model_goes_to_diffusers_and_back(num_classes: int | None, learn_sigma: bool) -> None:
    config = dataclasses.replace(CONFIG, num_classes=num_classes, learn_sigma=learn_sigma)
    ours = shaken(DiT(config))
    theirs = ours.to_diffusers()
    assert not theirs.training
    x, t = batch(3)
    y = torch.tensor([4, 0, 5]) if num_classes else None
    labels = torch.zeros(3, dtype=torch.int64) if y is None else y
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-9, atol=1e-9)
    if num_classes is not None:
        back = DiT.from_diffusers(theirs, prediction_type="v_prediction")
        assert back.config == config
        for name, tensor in ours.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name
    # Neither shares memory with the other.
    theirs.proj_out_2.bias.data.zero_()
    assert ours.head.linear.bias.any()


@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_folder_of_diffusers_is_read(tmp_path: Path, class_name: str) -> None:
    """Also under the name that the class had when the published weights were written."""
    theirs = their_module(in_channels=4, out_channels=8).float()
    theirs.save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": class_name}))
    x, t, y = batch(4)[0].float(), batch(4)[1], torch.tensor([1, 2, 5])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=y).sample
        for folder in (tmp_path, tmp_path / "transformer"):
            torch.testing.assert_close(DiT.from_diffusers(folder)(x, t, y), expected)
            denoiser = load_denoiser(folder)
            assert denoiser.conditioning["class_labels"].null_label == 5
            torch.testing.assert_close(denoiser(x, t, class_labels=y), expected[:, :4])
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        DiT.from_diffusers(tmp_path / "elsewhere")


def test_what_the_other_class_cannot_express_is_refused() -> None:
    apart = shaken(diffusers.DiTTransformer2DModel(2, 8, num_layers=2, sample_size=8, num_embeds_ada_norm=5))
    with pytest.raises(ValueError, match=r"one time_embedding.linear1 for all blocks, .*transformer_blocks.1"):
        DiT.from_diffusers(apart)
    with pytest.raises(ValueError, match="activation_fn='gelu-approximate', but this module has 'geglu'"):
        DiT.from_diffusers(their_module(activation_fn="geglu"))
    with pytest.raises(ValueError, match="has 4 or 8 outputs, not 5"):
        DiT.from_diffusers(their_module(in_channels=4, out_channels=5))
    for field, value in {"mlp_ratio": 2.0, "freq_shift": 0, "positions": "row-column"}.items():
        with pytest.raises(ValueError, match=f"diffusers' DiT has {field}=.*, but this model has {value!r}"):
            DiT(dataclasses.replace(CONFIG, **{field: value})).to_diffusers()


def test_conversion_leaves_the_random_state_alone() -> None:
    model = DiT(CONFIG)
    torch.manual_seed(3)
    DiT.from_diffusers(model.to_diffusers())
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


def test_positions_and_frequencies_are_those_of_diffusers() -> None:
    embeddings = diffusers.models.embeddings
    expected = embeddings.get_2d_sincos_pos_embed(16, 5, base_size=5, output_type="pt")
    torch.testing.assert_close(sincos_positions(5, 16), expected.float(), rtol=0, atol=1e-6)
    t = torch.tensor([0, 7, 999])
    for shift in (0, 1):
        theirs = embeddings.get_timestep_embedding(t, 16, flip_sin_to_cos=True, downscale_freq_shift=shift)
        torch.testing.assert_close(timestep_features(t, 16, freq_shift=shift), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_classes", [None, 5])
def test_every_parameter_of_a_dit_has_a_gradient(num_classes: int | None) -> None:
    model = shaken(DiT(dataclasses.replace(CONFIG, num_classes=num_classes))).train()
    x, t = batch(3)
    y = None if num_classes is None else torch.tensor([0, 3, 5])
    model(x, t, y).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_a_new_dit_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = DiT(CONFIG)
    x, t = batch(3)
    assert not model(x.float(), t).any()
    tokens = torch.randn(3, 16, 16)
    for block in model.blocks:
        assert isinstance(block, nn.Module)
        assert torch.equal(block(tokens, torch.randn(3, 16)), tokens)


def test_a_saved_dit_comes_back(tmp_path: Path) -> None:
    model = shaken(DiT(CONFIG)).float()
    loaded = load_dit(save_dit(model, tmp_path))
    assert loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x, t = batch(3)
    assert torch.equal(loaded(x.float(), t), model(x.float(), t))


def test_what_does_not_fit_a_dit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DiTConfig.depth must be an integer of at least 1, got 0"):
        dataclasses.replace(CONFIG, depth=0)
    with pytest.raises(ValueError, match=r"DiTConfig.positions must be one of .*, got 'column'"):
        dataclasses.replace(CONFIG, positions="column")
    with pytest.raises(ValueError, match=r"DiTConfig.freq_shift must be 0 or 1, got 2"):
        dataclasses.replace(CONFIG, freq_shift=2)
    with pytest.raises(ValueError, match="no DiT preset 'XXL/2'"):
        DiTConfig.preset("XXL/2")
    x, t = batch(3)
    with pytest.raises(ValueError, match="this DiT is unconditional"):
        DiT(dataclasses.replace(CONFIG, num_classes=None))(x.float(), t, torch.tensor([0, 1, 2]))


def test_a_folder_of_a_dit_is_sampled_and_described(tmp_path: Path) -> None:
    model = shaken(DiT(dataclasses.replace(CONFIG, in_channels=1, learn_sigma=True))).float()
    save_dit(model, tmp_path / "dit")
    (tmp_path / "dit" / "scheduler_config.json").write_text(json.dumps(ZERO_SNR_SCHEDULE))
    told = CliRunner().invoke(app, ["info", str(tmp_path / "dit")]).output.split()
    assert [word for word in ("DiT", "v_prediction", "1x8x8", "5,") if word not in told] == []
    command = ["sample", "--model", tmp_path / "dit", "--num-images", 2, "--class", 3, "--guidance", 2, "--steps", 4]
    command += ["--solver", "sequential", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    found = torch.from_numpy(np.load(tmp_path / "out" / "images.npy"))

    transitions = SamplerConfig.from_diffusers(ZERO_SNR_SCHEDULE).transitions(4)
    x = initial_noise(0, range(2), (1, 8, 8))
    for k, t in enumerate(transitions.timesteps):
        with torch.no_grad():
            null, told = (model(x, t, torch.tensor([label, label]))[:, :1] for label in (5, 3))
        x = transitions.step(wide(x), wide(null + 2 * (told - null)), k).to(x.dtype)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
