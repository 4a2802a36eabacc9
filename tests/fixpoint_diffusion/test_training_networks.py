"""What a training may ask of its network: checkpoints of activations, compiled blocks, a penalty on its layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fixpoint
from benchmarks.fpdm_memory import peak_of
from fixpoint_diffusion.denoisers import family
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.training.checkpoints import load_state
from fixpoint_diffusion.training.data import ImageDataset, LabelledImages, open_dataset
from fixpoint_diffusion.training.logs import LayerResidual, TrainingLog
from fixpoint_diffusion.training.network_options import LayerPenalty
from fixpoint_diffusion.training.networks import TrainableDenoiser
from fixpoint_diffusion.training.trainer import train

SMALL = FPDMConfig(sample_size=4, width=8, heads=2, n_pre=2, n_post=2, backward="multi-jfb", max_no_grad=2, max_grad=2)
MODELS = [SMALL, DiTConfig(sample_size=4, width=8, heads=2, depth=3, num_classes=3)]
TINY = TrainingConfig(steps=3, batch_size=4, learning_rate=1e-2, prediction_type="v_prediction")
SCHEDULE = NoiseSchedule.linear().zero_terminal_snr().alphas_cumprod


def made(config: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = (FPDM if isinstance(config, FPDMConfig) else DiT)(config)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def trainable(config: Any) -> TrainableDenoiser:
    name = "fpdm" if isinstance(config, FPDMConfig) else "dit"
    return TrainableDenoiser(made(config), family(name), 1)


@pytest.fixture
def images() -> ImageDataset:
    return open_dataset(LabelledImages(images=torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))))


def trained(config: Any, images: ImageDataset, path: Any, **options: Any) -> nn.Module:
    chosen = dataclasses.replace(TINY, **options)
    return train(trainable(config), images, SCHEDULE, chosen, checkpoint=path, progress=False)[0]


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, value), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(found, value, msg=name, **tolerance)


@pytest.mark.parametrize("config", MODELS)
def test_gradient_is_the_same_with_checkpoints_and_memory_is_less(config: Any) -> None:
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([3, 900, 1, 50])
    model, gradients, peaks = made(config), [], []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        peaks.append(peak_of(model, lambda: model(x, t).square().sum().backward()))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    assert peaks[1] < 0.9 * peaks[0]
    model.disable_gradient_checkpointing()
    assert peak_of(model, lambda: model(x, t).square().sum().backward()) == peaks[0]


@pytest.mark.parametrize("config", MODELS)
def test_training_with_checkpoints_ends_with_the_same_weights(config: Any, images: ImageDataset, tmp_path: Any) -> None:
    calls: list[int] = []
    model = trainable(config)
    block = next(module for module in model.modules() if type(module).__name__ == "DiTBlock")
    block.register_forward_pre_hook(lambda *_: calls.append(1))  # after the last saved tensor it stops
    checkpointed = dataclasses.replace(TINY, gradient_checkpointing=True)
    average, _ = train(model, images, SCHEDULE, checkpointed, checkpoint=tmp_path / "a", progress=False)
    assert len(calls) == 2 * TINY.steps, "each block runs again in the backward pass"
    same(trained(config, images, tmp_path / "b"), average)
    model(torch.zeros(1, 1, 4, 4), torch.tensor([3])).sum().backward()
    assert len(calls) == 2 * TINY.steps + 1, "after the training it does not"


@pytest.mark.parametrize("config", MODELS)
def test_compiled_blocks_have_the_same_gradient_and_keep_their_names(config: Any) -> None:
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([3, 900, 1, 50])
    models = [made(config), made(config)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models[0].compile_repeated_blocks(backend="aot_eager")  # the default backend needs a compiler, and minutes
    for model in models:
        model(x, t).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for (name, compiled), plain in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, plain.grad, msg=name)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_trainer_has_blocks_compiled_on_request(images: ImageDataset, tmp_path: Any, monkeypatch: Any) -> None:
    calls: list[object] = []
    monkeypatch.setattr(DiT, "compile_repeated_blocks", lambda self: calls.append(self))
    trained(MODELS[1], images, tmp_path / "plain")
    assert not calls
    trained(MODELS[1], images, tmp_path / "compiled", compile_blocks=True)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True}, "a Linear has no gradient checkpointing"),
        ({"compile_blocks": True}, "a Linear has no compiled blocks"),
        ({"jacobian_penalty": 1.0}, "one fixed point layer, found 0"),
    ],
)
def test_what_a_network_cannot_do_is_refused(
    options: dict[str, Any], message: str, images: ImageDataset, tmp_path: Any
) -> None:
    config = dataclasses.replace(TINY, **options)
    with pytest.raises(ValueError, match=message):
        train(nn.Linear(2, 2), images, SCHEDULE, config, checkpoint=tmp_path / "c", progress=False)
    assert not list(tmp_path.iterdir())


def test_penalty_is_the_mean_square_of_the_layers_jacobian() -> None:
    model = made(SMALL).double()
    penalty = LayerPenalty(model)
    x, t = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([3, 900])
    _, solution = model(x, t, return_solution=True)
    _, inputs, _ = model._before_layer(x, t, None)
    z = solution.value.detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: model.implicit_block(z, *inputs), z)
    size = z[0].numel()
    exact = jacobian.square().sum() / (2 * size)
    estimates = []
    for seed in range(100):
        model(x, t)
        torch.manual_seed(seed)
        estimates.append(float(penalty.take().detach()))
    spread = torch.tensor(estimates).std() / 100**0.5
    assert abs(sum(estimates) / 100 - float(exact)) < 5 * float(spread)


def test_penalty_trains_the_layer_to_contract(images: ImageDataset, tmp_path: Any) -> None:
    def norm(model: Any) -> float:
        network = model.network
        x, t = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 900, 1, 50])
        with torch.no_grad():
            z, inputs, _ = network._before_layer(x, t, None)
        generator = torch.Generator().manual_seed(0)
        args = (network.implicit_block, z, inputs)
        return fixpoint.jacobian_penalty(*args, probes=20, generator=generator).detach().mean().item()

    for name, extra in {"plain": {}, "bf16": {"precision": "bf16"}}.items():
        options = {"steps": 10, "weight_decay": 0.0, **extra}
        free = trained(SMALL, images, tmp_path / f"{name}-free", **options)
        held = trained(SMALL, images, tmp_path / f"{name}-held", jacobian_penalty=10.0, **options)
        assert norm(held) < 0.8 * norm(free)


def test_logged_residual_is_that_after_sixteen_iterations_whatever_training_draws() -> None:
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 900])
    for rule in ("multi-jfb", "ift"):
        model = made(dataclasses.replace(SMALL, backward=rule))
        residual = LayerResidual(model)
        model(x, t)
        assert residual.latest is None
        residual.wanted = True
        model(x, t)
        with torch.no_grad():
            z, inputs, _ = model._before_layer(x, t, None)
            for _ in range(16):
                z, before = model.implicit_block(z, *inputs), z
        by_hand = [float((a - b).norm() / a.norm()) for a, b in zip(z, before, strict=True)]
        assert residual.latest == pytest.approx(sum(by_hand) / 2, rel=1e-3)


def test_the_layers_residual_is_logged_and_changes_no_weight(images: ImageDataset, tmp_path: Any) -> None:
    chosen, ends = dataclasses.replace(TINY, steps=4), []
    for every in (2, 100):
        model = trainable(SMALL)
        chosen = dataclasses.replace(chosen, log_every=every)
        folder = tmp_path / str(every)
        ends.append(train(model, images, SCHEDULE, chosen, checkpoint=folder / "state", progress=False))
        assert not any(module._forward_hooks for module in model.modules())
    same(ends[0][0], ends[1][0], rtol=0, atol=0)
    header, *lines = (tmp_path / "2" / "training_log.csv").read_text().splitlines()
    assert header == "step,loss,learning_rate,seconds,layer_residual"
    assert [line.split(",")[4] for line in lines] == [f"{line[4]:.4g}" for line in ends[0][1].lines]
    old = TrainingLog(lines=[(50, 0.5, 1e-3, 2.0)])  # type: ignore[list-item]
    assert old.lines == [(50, 0.5, 1e-3, 2.0, None)]


class TwoScales(nn.Module):
    """A network of one's own: its layer has two states, takes its start for granted or not, and has dropout."""

    def __init__(self, *, states: int) -> None:
        super().__init__()
        self.states = states
        self.inject, self.mix, self.dropout = nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(0.2)
        self.layer = fixpoint.FixedPointLayer(self.f, backward=fixpoint.JFB(), rtol=1e-3, keep_states=(1,))

    def f(self, z: Any, u: Tensor) -> Any:
        if self.states == 1:
            return 0.3 * torch.tanh(self.dropout(self.mix(z)) + u)
        return {"a": 0.3 * torch.tanh(self.dropout(self.mix(z["b"])) + u), "b": 0.5 * z["a"]}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        u = self.inject(x.flatten(1)) + t[:, None] / 1000
        if self.states == 1:
            z = self.layer(u)
        else:
            z = self.layer(u, z0={"a": torch.zeros_like(u), "b": torch.zeros_like(u)}, return_solution=True).value["a"]
        return self.dropout(z).reshape(x.shape)


@pytest.mark.parametrize("options", [{}, {"jacobian_penalty": 0.1}, {"state_loss": "supervised"}], ids=str)
@pytest.mark.parametrize("states", [1, 2])
def test_any_fixed_point_layer_can_be_trained(
    states: int, options: dict[str, Any], images: ImageDataset, tmp_path: Any
) -> None:
    ends = []
    for every in (1, 100):
        torch.manual_seed(0)
        model, chosen = TwoScales(states=states), dataclasses.replace(TINY, log_every=every, **options)
        ends.append(train(model, images, SCHEDULE, chosen, checkpoint=tmp_path / str(every) / "c", progress=False))
    same(ends[0][0], ends[1][0], rtol=0, atol=0)
    # 16 iterations of a map that contracts so solve it, if one dropout mask serves all of them.
    assert all(line[4] < 1e-6 for line in ends[0][1].lines)


@pytest.mark.parametrize("factor", [400.0, 1e5])  # the last image alone is infinite, or a state before it
def test_the_logged_residual_of_a_layer_that_expands_is_infinite(factor: float) -> None:
    layer = fixpoint.FixedPointLayer(lambda z, x: factor * z + x, on_failure="ignore")
    residual = LayerResidual(nn.Sequential(layer))
    residual.wanted = True
    layer(torch.ones(2, 3))
    assert residual.latest == float("inf")


def test_the_logged_residual_is_that_of_the_call_with_its_options() -> None:
    layer = fixpoint.FixedPointLayer(lambda z, x: {"a": 0.5 * z["a"] + x, "b": 0.5 * z["b"]})
    residual = LayerResidual(nn.Sequential(layer))
    residual.wanted = True
    layer(torch.ones(2, 3), z0={"a": torch.zeros(2, 3), "b": torch.ones(5)}, batch_dims=0)
    assert residual.latest is not None
    assert 0 < residual.latest < 1e-3


@pytest.mark.parametrize(
    ("data", "alphas", "message"),
    [
        (torch.zeros(8, 1, 4, 4), SCHEDULE, r"from open_dataset\(...\), got a Tensor"),
        (None, NoiseSchedule.linear(), "as schedule.alphas_cumprod, got a NoiseSchedule"),
    ],
)
def test_data_and_schedules_of_another_kind_are_refused(
    data: Any, alphas: Any, message: str, images: ImageDataset, tmp_path: Any
) -> None:
    with pytest.raises(TypeError, match=message):
        train(nn.Linear(2, 2), images if data is None else data, alphas, TINY, checkpoint=tmp_path / "c")


def test_gradients_are_clipped_only_on_request(images: ImageDataset, tmp_path: Any) -> None:
    """AdamW's second moment after one step is a thousandth of the gradient's square."""

    def gradient(**options: Any) -> Tensor:
        model = trainable(MODELS[1])
        train(
            model,
            images,
            SCHEDULE,
            dataclasses.replace(TINY, steps=1, **options),
            checkpoint=tmp_path / str(options["max_grad_norm"]),
            progress=False,
        )
        state = load_state(tmp_path / str(options["max_grad_norm"])).optimizer
        return torch.cat([value.flatten() for key, value in state.items() if key.startswith("exp_avg_sq")])

    clipped, free = gradient(max_grad_norm=1e-3), gradient(max_grad_norm=None)
    assert float(clipped.sum()) == pytest.approx(1e-3 * 1e-6, rel=1e-3)
    assert float(free.sum()) > 1e3 * float(clipped.sum())
