"""FPDM's options: a start from a DiT, groups of blocks, where the timestep enters, GELU, adaLN."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig, fpdm_layer_problem, load_fpdm, save_fpdm

SMALL = FPDMConfig(width=16, heads=2)
CLASSES = [None, 5]


def shaken(module: Any, seed: int = 0) -> Any:
    """In evaluation mode and float64, with random numbers where a new network has zeros."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def dit(depth: int, num_classes: int | None = None) -> DiT:
    return shaken(DiT(DiTConfig(width=16, heads=2, depth=depth, num_classes=num_classes)))


def batch(num_classes: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.tensor([0, 431, 999]), None if num_classes is None else torch.tensor([4, 0, num_classes])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
@pytest.mark.parametrize(("pre", "group", "post"), [(1, 1, 1), (0, 2, 1), (2, 1, 0)])
def test_one_iteration_from_a_dit_is_the_dit(
    pre: int, group: int, post: int, gelu: str, num_classes: int | None
) -> None:
    teacher = dit(pre + group + post, num_classes)
    options = {"implicit_blocks": group, "injection_gelu": gelu, "timestep_everywhere": True}
    model = FPDM.from_dit(teacher, pre, post, **options)
    x, t, y = batch(num_classes)
    close(model(x, t, y, depth=1), teacher(x, t, y))
    # The weights are copies.
    before = teacher(x, t, y)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(teacher(x, t, y), before)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("adaln", ["vector", "linear"])
def test_explicit_blocks_start_from_the_mean_timestep_of_a_dit(adaln: str, num_classes: int | None) -> None:
    teacher = dit(7, num_classes)
    model = FPDM.from_dit(teacher, pre=1, post=2, implicit_blocks=2, unconditional_adaln=adaln)
    x, t, y = batch(num_classes)
    time = teacher.time_embedding(t, x.dtype)
    mean = teacher.time_embedding(torch.arange(1000), x.dtype).mean(dim=0).expand(3, -1)
    label = 0 if teacher.class_embedding is None else teacher.class_embedding(y)

    tokens = teacher.blocks[0](teacher.patch_embedding(x) + teacher.positions, mean + label)
    problem = fpdm_layer_problem(model, x, t, y=y)
    close(problem.z0, tokens)
    # Blocks 2 and 3 are the middle of the four between.
    expected = teacher.blocks[3](teacher.blocks[2](tokens, time + label), time + label)
    close(problem(tokens), expected)
    for block in teacher.blocks[5:]:
        expected = block(expected, mean + label)
    close(model(x, t, y, depth=1), teacher.head(expected, mean + label))


def test_a_dit_with_too_few_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \+ 2 \+ 1 blocks were asked for, but the DiT has 3"):
        FPDM.from_dit(dit(3), implicit_blocks=2)


def test_starting_from_a_dit_leaves_the_random_state_alone() -> None:
    teacher = dit(3)
    torch.manual_seed(3)
    FPDM.from_dit(teacher)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_a_group_passes_its_blocks_one_after_the_other(num_classes: int | None, group: int) -> None:
    model = shaken(FPDM(dataclasses.replace(SMALL, implicit_blocks=group, num_classes=num_classes)))
    x, t, y = batch(num_classes)
    problem = fpdm_layer_problem(model, x, t, y=y)
    f = model.implicit_block
    condition = model.time_embedding(t, x.dtype)
    if model.class_embedding is not None:
        condition = condition + model.class_embedding(y)
    z = torch.randn(problem.z0.shape, dtype=torch.float64)
    w1 = torch.cat([f.w1_z.weight, f.w1_u.weight], dim=1)
    u = model.injection(problem.z0)
    expected = f.w2(nn.functional.gelu(torch.cat([z, u], dim=-1) @ w1.T + f.w1_u.bias))
    for block in f.blocks:
        expected = block(expected, condition)
    close(problem(z), expected)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_what_does_not_depend_on_z_is_computed_once_for_all_iterations_and_blocks(group: int) -> None:
    model = shaken(FPDM(dataclasses.replace(SMALL, implicit_blocks=group)))
    calls: dict[str, int] = {}
    for name, module in model.implicit_block.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    x, t, _ = batch()
    model(x, t, depth=5)
    assert calls["w1_u"] == 1
    assert [calls[f"blocks.{i}.modulation.linear"] for i in range(group)] == [1] * group
    assert [calls[f"blocks.{i}.mlp"] for i in range(group)] == [5] * group
    assert calls["w1_z"] == calls["w2"] == 5


def test_the_timestep_reaches_every_block_on_request() -> None:
    x, _, _ = batch()
    for everywhere in (False, True):
        model = shaken(FPDM(dataclasses.replace(SMALL, timestep_everywhere=everywhere)))
        early, late = (fpdm_layer_problem(model, x, torch.tensor(t)).z0 for t in (0, 999))
        assert torch.equal(early, late) != everywhere
        # depth=0 hands z0 to the blocks after the layer.
        early, late = (model(x, torch.tensor(t), z0=torch.ones_like(early), depth=0) for t in (0, 999))
        assert torch.equal(early, late) != everywhere


def test_a_model_from_before_there_was_a_choice_keeps_its_positions(tmp_path: Any) -> None:
    save_fpdm(FPDM(FPDMConfig(width=96)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["positions"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_fpdm(tmp_path)
    assert model.config.positions == "row-column"
    row, column = 3, 1  # the first half encodes the row
    frequencies = 10000.0 ** (-torch.arange(24) / 24)
    at = model.positions[row * 4 + column]
    torch.testing.assert_close(at[:24], (row * frequencies).sin())
    torch.testing.assert_close(at[48:72], (column * frequencies).sin())


def test_a_timestep_everywhere_leaves_no_vector_for_the_absence_of_classes() -> None:
    options = {"timestep_everywhere": True, "unconditional_adaln": "linear"}
    assert FPDM(dataclasses.replace(SMALL, **options)).class_embedding is None


def test_the_injection_takes_either_gelu() -> None:
    x, t, _ = batch()
    for name, gelu in {"exact": nn.GELU(), "tanh": nn.GELU(approximate="tanh")}.items():
        model = shaken(FPDM(dataclasses.replace(SMALL, injection_gelu=name)))
        problem, f = fpdm_layer_problem(model, x, t), model.implicit_block
        inner = f.w2(gelu(f.w1_z(problem.z0) + problem.projected))
        close(problem(problem.z0), f.blocks[0].transform(inner, problem.modulation))


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({"num_classes": 1000}, 86.5),
        ({"num_classes": None}, 66.8),
        ({"num_classes": None, "unconditional_adaln": "linear"}, 85.3),
        ({"num_classes": None, "timestep_everywhere": True}, 85.3),
        ({"num_classes": 1000, "implicit_blocks": 4}, 158.2),
    ],
)
def test_parameters_of_the_options_at_xl(options: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        model = FPDM(dataclasses.replace(FPDMConfig.preset("XL/2"), **options))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_linear_maps_of_a_learned_vector_are_an_unconditional_model() -> None:
    model = shaken(FPDM(dataclasses.replace(SMALL, unconditional_adaln="linear")))
    x, t, _ = batch()
    assert model.class_embedding.weight.shape == (1, 16)
    label = model.class_embedding.weight.expand(3, -1)
    tokens = model.pre[0](model.patch_embedding(x) + model.positions, label)
    close(fpdm_layer_problem(model, x, t).z0, tokens)
    with pytest.raises(ValueError, match="this FPDM is unconditional"):
        model(x, t, torch.tensor([0, 0, 0]))


@pytest.mark.parametrize(
    "options",
    [
        {"implicit_blocks": 2},
        {"timestep_everywhere": True, "num_classes": 5},
        {"timestep_everywhere": True},
        {"unconditional_adaln": "linear", "injection_gelu": "tanh"},
    ],
)
def test_stochastic_jfb_gives_every_parameter_a_gradient(options: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **options)
    model = shaken(FPDM(config)).train().requires_grad_(True)
    x, t, y = batch(config.num_classes)
    model(x, t, y).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implicit_blocks": 0}, r"FPDMConfig.implicit_blocks must be an integer of at least 1, got 0"),
        ({"timestep_everywhere": 1}, r"FPDMConfig.timestep_everywhere must be true or false, got 1"),
        ({"injection_gelu": "relu"}, r"FPDMConfig.injection_gelu must be one of \('exact', 'tanh'\), got 'relu'"),
        ({"unconditional_adaln": None}, r"FPDMConfig.unconditional_adaln must be one of .*, got None"),
        ({"prediction_type": "flow_prediction"}, "an FPDM is not trained along a flow"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize("num_classes", CLASSES)
def test_gate_goes_a_part_of_the_way_to_the_same_solution(num_classes: int | None, tmp_path: Any) -> None:
    plain, gated = (
        shaken(FPDM(dataclasses.replace(SMALL, num_classes=num_classes, gate_cap=cap))) for cap in (None, 0.9)
    )
    gate = gated.implicit_block.gate.clone()
    assert gated.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["implicit.f.gate"]
    x, t, y = batch(num_classes)
    problems = [fpdm_layer_problem(model, x, t, y=y) for model in (plain, gated)]
    z = problems[0].z0
    part = 0.9 / (1 + torch.exp(-gate))
    close(problems[1](z), (1 - part) * z + part * problems[0](z))
    solution = fixpoint.solve(problems[0], solver=fixpoint.Anderson(), rtol=1e-12, max_evals=200).value
    close(problems[1](solution), solution)
    # It begins at half of its bound, is trained, and is kept.
    new = FPDM(dataclasses.replace(SMALL, gate_cap=0.9))
    torch.testing.assert_close(0.9 * new.implicit_block.gate.sigmoid(), torch.full((16,), 0.45))
    new.implicit_block.gate.data.fill_(1.0)
    save_fpdm(new, tmp_path)
    assert torch.equal(load_fpdm(tmp_path).implicit_block.gate, new.implicit_block.gate)
    lively = FPDM(gated.config).double()
    lively.load_state_dict(gated.state_dict())
    lively(x, t, y, depth=2).square().sum().backward()
    assert float(lively.implicit_block.gate.grad.abs().min()) > 0


@pytest.mark.parametrize("cap", [0, 1.5, -0.1, float("nan"), True])
def test_gate_that_goes_nowhere_or_too_far_is_refused(cap: Any) -> None:
    with pytest.raises(ValueError, match=r"FPDMConfig.gate_cap must be None or in \(0, 1\], got"):
        dataclasses.replace(SMALL, gate_cap=cap)
