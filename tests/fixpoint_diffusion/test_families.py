"""The denoiser protocol and the registry of model families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, denoisers, initial_noise, load_denoiser, sample
from fixpoint_diffusion.denoisers import (
    DiffusersDenoiser,
    Family,
    Guided,
    describe,
    embedded,
    families,
    family,
    family_of,
    register_family,
    registry,
)
from fixpoint_diffusion.denoisers.schedules import LINEAR_SCHEDULE
from fixpoint_diffusion.options.models import OWN_FAMILIES

pytest.importorskip("diffusers")

LINEAR = NoiseSchedule.linear()
TINY: dict[str, tuple[tuple[int, ...], int | None, dict[str, Any]]] = {
    # Groups of two channels: normalised one by one, they would not notice the embedding that is added to them.
    "unet": ((1, 8, 8), 3, {"block_out_channels": (16, 16)}),
    "unet-1d": ((2, 16), None, {"block_out_channels": (32, 32)}),
    "unet-3d": ((2, 2, 8, 8), None, {"block_out_channels": (8, 8), "attention_head_dim": 4, "cross_attention_dim": 8}),
    "conditional-unet": ((4, 8, 8), 3, {"block_out_channels": (16, 16)}),
    "diffusers-dit": ((1, 8, 8), 3, {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}),
    "dit": ((1, 8, 8), 3, {"width": 16, "heads": 2, "depth": 2}),
    "fpdm": ((1, 8, 8), 3, {"width": 16, "heads": 2}),
}


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, and without the zeros that many networks start with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.04 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def build(name: str) -> nn.Module:
    shape, classes, settings = TINY[name]
    return shaken(family(name).build(shape, classes, settings))


def prompt(name: str, rows: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(rows, 4, 8)} if name == "unet-3d" else {}


def test_every_family_is_tried_here_and_has_a_file_of_its_name() -> None:
    assert set(TINY) == set(families()) == set(OWN_FAMILIES)


def test_families_stays_the_function_once_their_files_are_imported() -> None:
    assert registry.families()
    assert denoisers.families is registry.families


@pytest.mark.parametrize("name", TINY)
def test_family_comes_back_from_a_folder_as_it_was_saved(name: str, tmp_path: Path) -> None:
    model = build(name)
    assert family_of(model) is family(name)
    made = family(name).denoiser(model)
    family(name).save(model, tmp_path, torch.float16)
    loaded = load_denoiser(tmp_path)
    assert describe(loaded) == describe(made)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family(name).class_name
    shape = TINY[name][0]
    assert loaded.sample_shape == (None if name == "unet-3d" else shape)  # its config says nothing of frames
    x, t, inputs = torch.randn(3, *shape), torch.tensor([0, 500, 999]), prompt(name, 3)
    torch.testing.assert_close(loaded(x, t, **inputs), made(x, t, **inputs), rtol=0.02, atol=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())  # saving in halves leaves the model alone


@pytest.mark.parametrize("name", TINY)
def test_family_samples_in_parallel_what_the_ordinary_sampler_does(name: str) -> None:
    denoiser = family(name).denoiser(build(name))
    x_T = initial_noise(0, range(2), TINY[name][0])
    conditioning = prompt(name, 2)
    if describe(denoiser).class_labels:
        conditioning["class_labels"] = torch.tensor([2, 0])
    chain = DDIMChain(denoiser, x_T, LINEAR, steps=4, conditioning=conditioning)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-6, on_failure="ignore")
    torch.testing.assert_close(result.images, chain.sequential()[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in TINY if name != "fpdm"])
def test_a_compiled_network_is_of_the_same_family(name: str) -> None:
    model = build(name)
    compiled: Any = torch.compile(model, backend="eager")  # only compiled once it is called
    assert family_of(compiled) is family(name)
    denoiser = DiffusersDenoiser(compiled)
    assert describe(denoiser) == describe(DiffusersDenoiser(model))
    assert repr(denoiser) == repr(DiffusersDenoiser(model))


@pytest.mark.parametrize("name", [name for name, (_, classes, _) in TINY.items() if classes])
def test_class_labels_reach_the_network_and_no_class_is_the_null_label(name: str) -> None:
    denoiser = family(name).denoiser(build(name))
    labels = describe(denoiser).class_labels
    assert labels is not None
    assert (labels.num_classes, labels.null_label) == (3, 3)
    x, t = torch.randn(2, *TINY[name][0]), torch.tensor([10, 900])
    null = denoiser(x, t, class_labels=torch.tensor([3, 3]))
    torch.testing.assert_close(denoiser(x, t), null, rtol=0, atol=0)
    told = denoiser(x, t, class_labels=torch.tensor([1, 2]))
    assert float((told - null).abs().amax(dim=tuple(range(1, x.ndim))).min()) > 1e-3
    guided = Guided(denoiser, 3.0)(x, t, class_labels=torch.tensor([1, 2]))
    torch.testing.assert_close(guided, null + 3 * (told - null), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, (_, classes, _) in TINY.items() if classes])
def test_class_labels_are_learned_from(name: str) -> None:
    shape, classes, settings = TINY[name]
    model = shaken(family(name).build(shape, classes, settings)).train().requires_grad_(True)
    out = family(name).denoiser(model)(
        torch.randn(2, *shape), torch.tensor([10, 900]), class_labels=torch.tensor([1, 2])
    )
    out.square().sum().backward()
    (rows,) = [
        p for key, p in model.named_parameters() if key.endswith(("class_embedding.weight", "embedding_table.weight"))
    ]
    assert rows.grad is not None
    moved = rows.grad.abs().sum(dim=1) > 0
    assert moved.any()
    assert not moved[0]


@pytest.mark.parametrize("name", ["unet-1d", "unet-3d"])
def test_family_without_classes_refuses_them(name: str) -> None:
    with pytest.raises(ValueError, match="takes no class labels, but the data has 3 classes"):
        family(name).build(TINY[name][0], 3, {})


@pytest.mark.parametrize("name", TINY)
def test_building_refuses_another_number_of_dimensions_and_unknown_settings(name: str) -> None:
    shape, _, _ = TINY[name]
    with pytest.raises(ValueError, match="takes samples with channels and"):
        family(name).build((*shape, 8), None, {})
    with pytest.raises(ValueError, match="nonsense"):
        family(name).build(shape, None, {"nonsense": 1})


def test_inputs_that_are_missing_are_named() -> None:
    denoiser = DiffusersDenoiser(build("unet-3d"))
    with pytest.raises(ValueError, match="UNet3DConditionModel needs encoder_hidden_states"):
        denoiser(torch.randn(1, 2, 2, 8, 8), torch.tensor([1]))


def test_learned_variance_is_kept_on_request_and_guided_from_the_positive_half() -> None:
    settings = TINY["diffusers-dit"][2] | {"out_channels": 2}
    model = shaken(family("diffusers-dit").build((1, 8, 8), 3, settings))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 1])
    both = DiffusersDenoiser(model, learned_variance=True)
    assert describe(both).learned_variance
    expected = model(x, t, class_labels=labels).sample
    torch.testing.assert_close(both(x, t, class_labels=labels), expected)
    torch.testing.assert_close(DiffusersDenoiser(model)(x, t, class_labels=labels), expected[:, :1])
    guided = Guided(both, 2.0)
    assert describe(guided).learned_variance
    torch.testing.assert_close(guided(x, t, class_labels=labels)[:, 1:], expected[:, 1:])
    with pytest.raises(ValueError, match="twice as many output as input channels"):
        DiffusersDenoiser(build("unet"), learned_variance=True)


def test_plain_function_has_the_defaults() -> None:
    about = describe(lambda x, t: x)
    assert about == type(about)()
    assert about.prediction_type is None
    assert about.conditioning == {}


def test_guidance_describes_itself_as_what_it_guides() -> None:
    denoiser = embedded("fpdm-digits")
    guided = describe(Guided(denoiser, 2.0))
    assert guided == describe(denoiser)
    assert guided.prediction_type == "v_prediction"
    assert guided.sample_shape == (1, 8, 8)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


TOY = Family(
    name="toy",
    class_name="Toy",
    build=lambda shape, classes, settings: Toy(),
    denoiser=DiffusersDenoiser,
    load=lambda folder, config, options: Toy(),
    save=lambda model, folder, dtype: None,
    sample_shape=lambda config: None,
    conditioning=lambda config: {},
    schedule_config=LINEAR_SCHEDULE,
)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    register_family(TOY)


@pytest.mark.usefixtures("_registered")
def test_registered_family_is_known_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Toy"}))
    denoiser = load_denoiser(tmp_path)
    assert isinstance(denoiser.model, Toy)
    assert family("toy") is TOY
    with pytest.raises(ValueError, match="'toy' for class Toy exists"):
        register_family(TOY)


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no model family 'u-net'; there are conditional-unet, diffusers-dit, dit"):
        family("u-net")
