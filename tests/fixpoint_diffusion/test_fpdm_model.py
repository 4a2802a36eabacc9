from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion.denoisers import FPDMDenoiser, load_denoiser
from fixpoint_diffusion.models import (
    FPDM,
    FPDMConfig,
    fpdm_layer_problem,
    load_fpdm,
    save_fpdm,
)
from fixpoint_diffusion.models.blocks import DiTBlock, ImplicitBlock, sincos_positions, timestep_features
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling import ToTolerance, fpdm_steps
from tests.fixpoint_diffusion.earlier import EARLIER_FIELDS, as_stored_earlier

SMALL = FPDMConfig(sample_size=8, patch_size=2, width=16, heads=2)


def lively(config: FPDMConfig = SMALL, seed: int = 0, scale: float = 0.1) -> FPDM:
    """A model in float64 whose zero-initialised parts are random, so that every path of it matters."""
    generator = torch.Generator().manual_seed(seed)
    model = FPDM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def batch(config: FPDMConfig = SMALL, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *config.sample_shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 1000, (n,), generator=generator)


@pytest.mark.parametrize(("name", "millions"), [("XL/2", 86.5), ("L/2", 68.5), ("B/2", 38.8), ("S/2", 10.0)])
def test_presets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = FPDM(FPDMConfig.preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(("blocks", "millions"), [(0, 38.7), (2, 134.3), (4, 229.9)])
def test_pre_and_post_blocks_add_the_published_number_of_parameters(blocks: int, millions: float) -> None:
    config = dataclasses.replace(FPDMConfig.preset("XL/2"), n_pre=blocks, n_post=blocks)
    with torch.device("meta"):
        model = FPDM(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def implicit_block() -> ImplicitBlock:
    return ImplicitBlock(16, nn.ModuleList([DiTBlock(16, 2, 4.0, conditional=True)]))


def unsplit(block: ImplicitBlock, z: Tensor, u: Tensor) -> Tensor:
    """``W2 gelu(W1 [z; u] + b)`` with W1 as one matrix."""
    w1 = torch.cat([block.w1_z.weight, block.w1_u.weight], dim=1)
    hidden = torch.cat([z, u], dim=-1) @ w1.T + block.w1_u.bias
    return block.w2(torch.nn.functional.gelu(hidden))


def test_split_projection_equals_the_concatenated_one() -> None:
    torch.manual_seed(0)
    block = implicit_block().double()
    z, u = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    condition = torch.randn(3, 16, dtype=torch.float64)
    torch.nn.init.normal_(block.blocks[0].modulation.linear.weight)

    expected = block.blocks[0](unsplit(block, z, u), condition)
    torch.testing.assert_close(block(z, *block.prepare(u, condition)), expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_implicit_block_is_its_projection_alone() -> None:
    block = implicit_block()
    z, u, condition = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(3, 16)
    torch.testing.assert_close(block(z, *block.prepare(u, condition)), unsplit(block, z, u))


def test_timestep_enters_the_implicit_block_alone() -> None:
    model = lively()
    x, _ = batch()
    seen: dict[str, list[tuple[Tensor, ...]]] = {}
    for name in ("pre.0", "injection", "post.0", "head"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out))
    # No block between: depth=0 hands z0 to the post blocks, so whatever differs would come from t outside the layer.
    z0 = torch.zeros(3, SMALL.tokens, SMALL.width, dtype=torch.float64)
    for t in (0, 999):
        with torch.no_grad():
            model(x, torch.tensor(t), z0=z0, depth=0)
    for name, (early, late) in seen.items():
        assert torch.equal(early, late), name
    problems = [fpdm_layer_problem(model, x, torch.tensor(t)) for t in (0, 999)]
    assert not torch.allclose(problems[0](problems[0].z0), problems[1](problems[1].z0))


@pytest.mark.parametrize("num_classes", [None, 10])
def test_stochastic_jfb_gives_every_parameter_a_gradient(num_classes: int | None) -> None:
    config = dataclasses.replace(SMALL, num_classes=num_classes)
    model = lively(config).train()
    x, t = batch(config)
    y = None if num_classes is None else torch.tensor([0, 3, 10])
    model(x, t, y).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_pre_blocks_learn_through_the_start_only_without_a_step_before() -> None:
    """With u cut off, x_pre reaches the output through z0 alone: when n = 0, and never when n > 0."""
    model = lively().train()
    model.injection.weight.data.zero_()
    x, t = batch()
    reached = {}
    for seed in range(12):
        model.zero_grad()
        draws = fixpoint.StochasticJFB(max_no_grad=2, max_grad=2, seed=seed, attach_start=True)
        prediction, solution = model(x, t, backward=draws, return_solution=True)
        prediction.sum().backward()
        gradient = model.patch_embedding.weight.grad
        reached.setdefault(solution.nfev, set()).add(gradient is not None and bool((gradient != 0).any()))
    assert reached == {0: {True}, 1: {False}, 2: {False}}
    assert model.implicit.options["backward"].attach_start


def test_steps_without_gradient_save_nothing() -> None:
    """With m = 1, what autograd keeps is the same for any number of steps without gradient."""
    model = lively().train()
    x, t = batch()
    z0 = torch.zeros(3, SMALL.tokens, SMALL.width, dtype=torch.float64)
    saved: dict[int, int] = {}
    for seed in range(12):
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        draws = fixpoint.StochasticJFB(max_no_grad=30, max_grad=1, generator=torch.Generator().manual_seed(seed))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, solution = model(x, t, z0=z0, backward=draws, return_solution=True)
        saved[solution.nfev] = sum(kept)
    assert max(saved) > 10
    assert len(set(saved.values())) == 1, saved


def test_training_draws_from_the_bounds_of_the_configuration() -> None:
    model = lively(dataclasses.replace(SMALL, max_no_grad=2, max_grad=3)).train()
    x, t = batch()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.implicit_block.register_forward_hook(count)
    totals = set()
    for _ in range(60):
        calls = 0
        model(x, t)
        totals.add(calls)
    assert totals == {1, 2, 3, 4, 5}


@given(depth=st.integers(0, 6), given_start=st.booleans())
@settings(max_examples=12)
def test_depth_k_is_k_applications_of_f(depth: int, given_start: bool) -> None:
    model = lively()
    x, t = batch()
    generator = torch.Generator().manual_seed(7)
    shape = (3, SMALL.tokens, SMALL.width)
    z0 = torch.randn(shape, generator=generator, dtype=torch.float64) if given_start else None
    problem = fpdm_layer_problem(model, x, t, z0)
    z = problem.z0
    for _ in range(depth):
        z = problem(z)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            prediction, solution = model(x, t, z0=z0, depth=depth, return_solution=True)
        assert solution.nfev == depth
        torch.testing.assert_close(solution.value.detach(), z, rtol=1e-12, atol=1e-12)
        tokens = z
        for block in model.post:
            tokens = block(tokens, None)
        torch.testing.assert_close(prediction.detach(), model.head(tokens, None).detach(), rtol=1e-12, atol=1e-12)


def test_depth_with_gradient_differentiates_exactly_those_iterations() -> None:
    model = lively().train()
    x, t = batch()
    weight = model.implicit_block.w2.weight
    with torch.no_grad():
        direction = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(model(x, t, depth=3).sum(), weight)
    step = 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            values.append(float(model(x, t, depth=3).sum()))
            weight.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_solvers_agree_on_the_solution_of_the_layer() -> None:
    problem = fpdm_layer_problem(lively(), *batch(n=5))
    solvers = (fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden())
    solutions = [fixpoint.solve(problem, solver=solver, rtol=1e-11, max_evals=300) for solver in solvers]
    for solution in solutions:
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.value, solutions[0].value, rtol=1e-8, atol=1e-8)


def expanding() -> FPDM:
    """A model whose map is ``f(z) = x_pre - 1.5 z``, from which plain iteration runs away."""
    model = lively()
    block, eye = model.implicit_block, torch.eye(16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in [*block.parameters(), *model.injection.parameters()]:
            parameter.zero_()  # closed gates: blocks pass on what they get
        model.injection.weight.copy_(eye)
        block.w1_z.weight.copy_(1.5 * torch.cat([-eye, eye]))
        block.w1_u.weight.copy_(torch.cat([eye, -eye]))
        block.w2.weight.copy_(torch.cat([eye, -eye], dim=1))  # a = gelu(a) - gelu(-a)
    return model


def test_to_a_tolerance_a_layer_that_expands_is_solved_by_default() -> None:
    model, (x, t) = expanding(), batch()
    with torch.no_grad():
        prediction, solution = model(x, t, rtol=1e-6, return_solution=True)
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.value, fpdm_layer_problem(model, x, t).z0 / 2.5, rtol=1e-5, atol=1e-7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(FPDMDenoiser(model, rtol=1e-6)(x, t), prediction)
        with pytest.warns(fixpoint.ConvergenceWarning, match="3 of 3"):
            FPDMDenoiser(model, rtol=1e-6, solver=fixpoint.Picard())(x, t)
        four = model(x, t, depth=4, return_solution=True)[1].value
    schedule = NoiseSchedule.linear()
    for step in fpdm_steps(model, x, schedule, steps=2, iterations=ToTolerance(rtol=1e-6)):
        assert bool(step.solution.converged.all())
    z, problem = fpdm_layer_problem(model, x, t).z0, fpdm_layer_problem(model, x, t)
    for _ in range(4):  # a count is that many plain iterations
        z = problem(z)
    torch.testing.assert_close(four, z)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = lively()
    x, t = batch(n=4)
    with torch.no_grad():
        together = model(x, t, rtol=1e-6)
        for row in range(4):
            alone = model(x[row : row + 1], t[row : row + 1], rtol=1e-6)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-10)
        permuted = model(x.flip(0), t.flip(0), rtol=1e-6).flip(0)
    torch.testing.assert_close(together, permuted, rtol=1e-10, atol=1e-10)


def test_the_module_keeps_nothing_of_a_call() -> None:
    model = lively()
    x, t = batch()
    before = {key: value for key, value in vars(model.implicit).items() if not key.startswith("_")}
    with torch.no_grad():
        plain = model(x, t)
        for options in ({"depth": 2}, {"rtol": 0.5}):
            z0 = torch.randn(3, 16, 16, dtype=torch.float64)
            model(x, t, **options, solver=fixpoint.Anderson(), z0=z0)
        assert torch.equal(model(x, t), plain)
    assert {key: value for key, value in vars(model.implicit).items() if not key.startswith("_")} == before


def test_missing_class_means_the_null_class() -> None:
    model = lively(dataclasses.replace(SMALL, num_classes=10))
    x, t = batch()
    with torch.no_grad():
        null = model(x, t, torch.full((3,), 10), depth=2)
        assert torch.equal(model(x, t, depth=2), null)
        assert not torch.allclose(model(x, t, torch.full((3,), 4), depth=2), null)


def test_timestep_and_class_condition_the_implicit_block_as_a_sum() -> None:
    model = lively(dataclasses.replace(SMALL, num_classes=10))
    x, t = batch()
    y = torch.tensor([2, 0, 9])
    with torch.no_grad():
        condition = model.time_embedding(t, x.dtype) + model.class_embedding(y)
        expected = model.implicit_block.blocks[0].modulation(condition)
    torch.testing.assert_close(fpdm_layer_problem(model, x, t, y=y).modulation, expected)


def test_learned_variance_doubles_the_channels_and_the_denoiser_drops_it() -> None:
    model = lively(dataclasses.replace(SMALL, in_channels=3, learn_sigma=True))
    x, t = batch(model.config)
    with torch.no_grad():
        raw = model(x, t, depth=2)
        assert raw.shape == (3, 6, 8, 8)
        assert torch.equal(FPDMDenoiser(model, depth=2)(x, t), raw[:, :3])


def test_patches_return_to_where_they_came_from() -> None:
    """A change in one patch of the input, with attention and positions idle, changes that patch of the output alone."""
    model = lively()
    for block in (*model.pre, *model.post, *model.implicit_block.blocks):
        torch.nn.init.zeros_(block.attention.out.weight)
    x, t = batch(n=1)
    changed = x.clone()
    changed[:, :, 2:4, 6:8] += 1
    with torch.no_grad():
        difference = (model(changed, t, depth=3) - model(x, t, depth=3)).abs()
    inside = difference[:, :, 2:4, 6:8]
    assert float(inside.min()) > 0
    assert float(difference.sum()) == pytest.approx(float(inside.sum()))


def test_positions_and_timestep_features_have_their_closed_form() -> None:
    row, column = 2, 1
    for order, coordinates in {"column-row": (column, row), "row-column": (row, column)}.items():
        closed_form = [f(p * w) for p in coordinates for f in (math.sin, math.cos) for w in (1.0, 0.01)]
        positions = sincos_positions(3, 8, order)
        assert positions.shape == (9, 8)
        torch.testing.assert_close(positions[row * 3 + column], torch.tensor(closed_form))
    features = timestep_features(torch.tensor([0, 7]), features=4)
    angles = torch.tensor([7.0, 0.07])
    torch.testing.assert_close(
        features, torch.stack([torch.tensor([1.0, 1, 0, 0]), torch.cat([angles.cos(), angles.sin()])])
    )


def test_checkpoint_returns_the_same_model(tmp_path) -> None:
    model = lively(dataclasses.replace(SMALL, num_classes=10)).float()
    loaded = load_fpdm(save_fpdm(model, tmp_path))
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_of_earlier_versions_are_read(tmp_path) -> None:
    model = lively(dataclasses.replace(SMALL, num_classes=10, positions="row-column")).float()
    path = save_fpdm(model, tmp_path) / "diffusion_pytorch_model.safetensors"
    written = json.loads((tmp_path / "config.json").read_text())
    config = {key: written[key] for key in ("_class_name", *EARLIER_FIELDS)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    earlier = as_stored_earlier(load_file(path))
    assert earlier["implicit.f.w1.weight"].shape == (32, 32)
    assert "implicit.f.block.mlp.0.weight" in earlier
    save_file(earlier, path)
    loaded = load_fpdm(tmp_path)
    assert loaded.config == model.config
    x, t = batch()
    with torch.no_grad():
        assert torch.equal(loaded(x.float(), t, depth=2), model(x.float(), t, depth=2))
        now = lively(dataclasses.replace(model.config, positions="column-row")).float()
        assert not torch.allclose(now(x.float(), t, depth=2), model(x.float(), t, depth=2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    save_file({**earlier, "implicit.f.w1.weight": torch.zeros(32, 33)}, path)
    with pytest.raises(ValueError, match=r"implicit.f.w1_u.weight has shape \(32, 17\), expected \(32, 16\)"):
        load_fpdm(tmp_path)
    save_file({**earlier, "implicit.f.w1.weight": torch.zeros(32)}, path)
    with pytest.raises(ValueError, match=r"implicit.f.w1_z.weight has shape \(32,\)"):
        load_fpdm(tmp_path)


def test_w1_starts_in_the_range_of_the_whole_matrix() -> None:
    block = FPDM(FPDMConfig(width=64)).implicit_block
    bound = math.sqrt(6 / (128 + 128))  # Glorot and Bengio (2010), Eq. 16, for 2D inputs and 2D outputs
    for half in (block.w1_z, block.w1_u):
        assert 0.99 * bound < float(half.weight.detach().abs().max()) <= bound
    assert not block.w1_u.bias.any()


def test_half_precision_weights_are_read_as_float32(tmp_path) -> None:
    model = lively().float()
    save_fpdm(model, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = load_fpdm(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name


def test_denoiser_from_a_folder_knows_its_schedule(tmp_path) -> None:
    model = lively().float()
    save_fpdm(model, tmp_path)
    assert load_denoiser(tmp_path).schedule_config is None
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(schedule))
    assert load_denoiser(tmp_path).schedule_config == schedule
    denoiser = FPDMDenoiser(load_fpdm(tmp_path), depth=3)
    assert (denoiser.prediction_type, denoiser.sample_shape) == ("v_prediction", (1, 8, 8))
    x, t = batch()
    with torch.no_grad():
        assert torch.equal(denoiser(x.float(), t), model(x.float(), t, depth=3))
        solved = FPDMDenoiser(model, rtol=1e-5, max_evals=100)(x.float(), t)
        torch.testing.assert_close(solved, model(x.float(), t, rtol=1e-5))
        double = FPDMDenoiser(load_fpdm(tmp_path, dtype=torch.float64), depth=3)(x, t)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), denoiser(x.float(), t))
        assert denoiser(x, t).dtype == torch.float64  # float32 weights, cast there and back


def test_loading_leaves_the_random_state_alone(tmp_path) -> None:
    save_fpdm(lively(), tmp_path)
    torch.manual_seed(3)
    load_fpdm(tmp_path)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


def test_damaged_checkpoints_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_fpdm(tmp_path)
    save_fpdm(lively(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    good_config, good_weights = config.read_text(), load_file(weights)

    def expect(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_fpdm(tmp_path)

    config.write_text(good_config.replace('"FPDM"', '"UNet2DModel"'))
    expect("describes a 'UNet2DModel', expected 'FPDM'")
    config.write_text(good_config.replace('"n_pre"', '"n_before"'))
    expect("unknown FPDM configuration keys: n_before")
    config.write_text("{")
    expect("not valid JSON")
    config.write_text("[]")
    expect("must hold a JSON object, got a list")
    config.write_text(good_config)

    tensors = dict(good_weights)
    tensors["extra"] = tensors.pop("injection.bias")
    save_file(tensors, weights)
    expect("missing: injection.bias; unknown: extra")
    save_file({**good_weights, "injection.bias": torch.zeros(3)}, weights)
    expect(r"injection.bias has shape \(3,\), expected \(16,\)")
    weights.write_bytes(b"not safetensors")
    expect("not a readable safetensors file")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_fpdm(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 3}, "multiple of 4 and of heads"),
        ({"width": 16, "heads": 3}, "multiple of 4 and of heads"),
        ({"patch_size": 3}, "does not divide"),
        ({"n_pre": -1}, "n_pre must be an integer of at least 0"),
        ({"max_grad": 0}, "max_grad must be an integer of at least 1"),
        ({"width": 64.0}, "width must be an integer"),
        ({"num_classes": 0}, "num_classes must be None or a positive"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive"),
        ({"prediction_type": "v"}, "prediction_type must be one of"),
    ],
)
def test_configuration_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPDMConfig(**options)


def test_configuration_survives_json() -> None:
    config = FPDMConfig.preset("B/4")
    assert FPDMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="no FPDM preset 'H/2'"):
        FPDMConfig.preset("H/2")


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = lively()
    x, t = batch()
    with pytest.raises(ValueError, match=r"x must have shape \(N, \*\(1, 8, 8\)\), got \(3, 1, 4, 4\)"):
        model(x[..., :4, :4], t)
    with pytest.raises(ValueError, match=r"one for each of 3 images, got \(2,\)"):
        model(x, t[:2])
    with pytest.raises(ValueError, match=r"z0 must have shape \(3, 16, 16\)"):
        model(x, t, z0=torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="unconditional"):
        model(x, t, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one class for each of 3 images"):
        lively(dataclasses.replace(SMALL, num_classes=4))(x, t, torch.zeros(2, dtype=torch.int64))
    for options in ({"depth": 0}, {"rtol": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            FPDMDenoiser(model, **options)
    for options in ({"rtol": 1e-3}, {"max_evals": 50}):
        for call in (lambda o: model(x, t, depth=4, **o), lambda o: FPDMDenoiser(model, depth=4, **o)):
            with pytest.raises(ValueError, match="has no effect beside depth=4, which fixes the iterations"):
                call(options)
    denoiser = FPDMDenoiser(model, depth=4)  # can be made again from what it says of itself
    FPDMDenoiser(model, depth=denoiser.depth, rtol=denoiser.rtol, max_evals=denoiser.max_evals)
