from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from fixpoint import FixedPointLayer, StochasticJFB
from fixpoint_diffusion.options.training import TrainingConfig, learning_rate_at
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.training.checkpoints import load_state, save_state
from fixpoint_diffusion.training.data import ImageDataset, LabelledImages, open_dataset
from fixpoint_diffusion.training.trainer import train

SCHEDULE = NoiseSchedule.linear().alphas_cumprod
TINY = TrainingConfig(steps=12, batch_size=4, warmup_steps=3, ema_decay=0.9, log_every=5, checkpoint_every=100)


class TinyModel(nn.Module):
    """Draws from the global random state in its dropout, as a stochastic model does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 1000], 1)).view_as(x)


class Press(TinyModel):
    """Presses Ctrl-C in the forward pass of a given step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x, t)


@pytest.fixture
def images() -> ImageDataset:
    images = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return open_dataset(LabelledImages(images=images))


def run(model: nn.Module, images: ImageDataset, path, config: TrainingConfig = TINY, **options):
    return train(model, images, SCHEDULE, config, checkpoint=path, progress=False, **options)


@pytest.mark.parametrize("stop_at", [1, 5, 7, 11])
def test_interrupted_and_resumed_training_ends_with_the_same_bits(tmp_path, images: ImageDataset, stop_at: int) -> None:
    whole, whole_log = run(TinyModel(), images, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Press(stop_at), images, tmp_path / "cut")
    assert load_state(tmp_path / "cut").record["step"] == stop_at
    resumed, resumed_log = run(TinyModel(), images, tmp_path / "cut", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for part in ("model", "ema", "optimizer"):
        one, two = (getattr(load_state(tmp_path / name), part) for name in ("whole", "cut"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert [line[:3] for line in whole_log.lines] == [line[:3] for line in resumed_log.lines]


def test_training_leaves_the_global_random_state_and_the_signal_handler_alone(tmp_path, images: ImageDataset) -> None:
    # A state of this test's own: a run that disturbed it would leave the same state after every test.
    state = torch.Generator().manual_seed(987654321).get_state()
    handler = signal.getsignal(signal.SIGINT)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        run(TinyModel(), images, tmp_path / "c")
        assert torch.equal(state, torch.get_rng_state())
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def ctrl_c_as_usual() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_as_usual")
def test_second_ctrl_c_stops_at_once(tmp_path, images: ImageDataset) -> None:
    class PressTwice(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return super().forward(x, t)

    with pytest.raises(KeyboardInterrupt):
        run(PressTwice(), images, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_seed_changes_the_result(tmp_path, images: ImageDataset) -> None:
    one, _ = run(TinyModel(), images, tmp_path / "a")
    other, _ = run(TinyModel(), images, tmp_path / "b", dataclasses.replace(TINY, seed=1))
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)


def test_training_learns_the_optimal_denoiser_of_gaussian_data(tmp_path) -> None:
    """For x_0 ~ N(0, s^2) the least-squares prediction of the noise is b x_t with b = sqrt(1-a) / (a s^2 + 1-a)."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.slope * x

    spread = 0.5
    images = spread * torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    data = open_dataset(LabelledImages(images=images))
    a = 0.6
    config = TrainingConfig(steps=200, batch_size=128, learning_rate=0.05, final_learning_rate=0, warmup_steps=10)
    config = dataclasses.replace(config, ema_decay=0.98, weight_decay=0)
    one_step = torch.tensor([a], dtype=torch.float64)
    model, log = train(Slope(), data, one_step, config, checkpoint=tmp_path / "c", progress=False)
    variance = a * float(images.var()) + 1 - a
    assert model.slope.item() == pytest.approx(math.sqrt(1 - a) / variance, rel=0.02)
    assert log.lines[-1][1] == pytest.approx(1 - (1 - a) / variance, rel=0.1)


def test_average_is_the_exponential_moving_average_of_the_weights(tmp_path, images: ImageDataset) -> None:
    history: list[Tensor] = []

    class Recording(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            history.append(self.layers[3].bias.detach().clone())
            return super().forward(x, t)

    model = Recording()
    average, _ = run(model, images, tmp_path / "c")
    weights = [*history[1:], model.layers[3].bias.detach()]  # after each step
    expected = weights[0]
    for k, value in enumerate(weights[1:], start=1):
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.layers[3].bias.detach(), expected)


def test_learning_rate_warms_up_then_falls_to_its_end() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.01)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_warm_up_takes_no_more_than_a_tenth_of_the_run() -> None:
    config = TrainingConfig(steps=50, warmup_steps=200, learning_rate=1.0)
    assert [learning_rate_at(step, config) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_noise_prediction_is_refused_with_zero_terminal_snr(tmp_path, images: ImageDataset) -> None:
    schedule = NoiseSchedule.linear().zero_terminal_snr().alphas_cumprod
    with pytest.raises(ValueError, match="v_prediction"):
        train(TinyModel(), images, schedule, TINY, checkpoint=tmp_path / "c", progress=False)


def test_divergence_stops_training_with_the_step(tmp_path, images: ImageDataset) -> None:
    model = TinyModel()
    model.layers[0].weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="loss became not finite at step 0"):
        run(model, images, tmp_path / "c")


class Spoiled(TinyModel):
    """Its gradient is NaN in a given step, its loss is not."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        output = super().forward(x, t)
        if self.calls == self.at:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output


def test_gradient_that_is_not_finite_leaves_weights_and_checkpoint_good(tmp_path, images: ImageDataset) -> None:
    config = dataclasses.replace(TINY, checkpoint_every=4)
    model = Spoiled(at=8)  # the step before the second checkpoint
    with pytest.raises(FloatingPointError, match="gradient became not finite at step 7"):
        run(model, images, tmp_path / "c", config)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert load_state(tmp_path / "c").record["step"] == 4
    resumed, _ = run(TinyModel(), images, tmp_path / "c", config, resume=True)
    whole, _ = run(TinyModel(), images, tmp_path / "whole", config)
    assert torch.equal(resumed.layers[0].weight, whole.layers[0].weight)


def test_weights_that_overflow_reach_no_checkpoint(tmp_path, images: ImageDataset) -> None:
    model = TinyModel()
    model.layers[0].weight.data.fill_(10.0)
    config = dataclasses.replace(TINY, steps=1, learning_rate=1.0, weight_decay=3e38)
    with pytest.raises(FloatingPointError, match="numbers that are not finite"):
        run(model, images, tmp_path / "c", config)
    assert not (tmp_path / "c").exists()


def test_short_run_keeps_no_average_of_noise(tmp_path) -> None:
    """The best prediction of the noise of x_0 = 0 is x / sqrt(1 - a): a slope learnt within a few steps."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(-3.0))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.slope * x

    data = open_dataset(LabelledImages(images=torch.zeros(4, 1, 2, 2)))
    config = TrainingConfig(steps=100, batch_size=16, learning_rate=0.3, final_learning_rate=0)
    model = Slope()
    average, _ = train(model, data, torch.tensor([0.5]).double(), config, checkpoint=tmp_path / "c", progress=False)
    best = math.sqrt(2)
    assert float(model.slope.detach()) == pytest.approx(best, abs=0.05)
    assert float(average.slope.detach()) == pytest.approx(best, abs=0.05)


def test_longer_run_continues_with_the_learning_rate_of_its_length(tmp_path, images: ImageDataset) -> None:
    run(TinyModel(), images, tmp_path / "c")
    config = dataclasses.replace(TINY, steps=20)
    _, log = run(TinyModel(), images, tmp_path / "c", config, resume=True)
    assert load_state(tmp_path / "c").record["step"] == 20
    assert [(line[0], line[2]) for line in log.lines] == [
        (5, learning_rate_at(4, TINY)),
        (10, learning_rate_at(9, TINY)),
        (15, learning_rate_at(14, config)),
        (20, learning_rate_at(19, config)),
    ]
    with pytest.raises(ValueError, match="is of step 20, beyond the 12 steps"):
        run(TinyModel(), images, tmp_path / "c", resume=True)


def test_pieces_of_a_batch_give_what_the_whole_gives(tmp_path, images: ImageDataset) -> None:
    models = [TinyModel().eval() for _ in range(2)]
    for model, accumulate in zip(models, (1, 2), strict=True):
        model.layers[2].p = 0.0
        config = dataclasses.replace(TINY, accumulate=accumulate)
        run(model, images, tmp_path / f"{accumulate}", config)
    torch.testing.assert_close(models[0].layers[0].weight, models[1].layers[0].weight, rtol=1e-4, atol=1e-6)


def test_settings_of_accelerate_in_the_environment_change_nothing(
    tmp_path, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this one, accelerate took one optimiser step in four, and the run said that it had taken all."""
    expected, _ = run(TinyModel(), images, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found, _ = run(TinyModel(), images, tmp_path / "set")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_an_accelerator_of_the_callers_keeps_its_accumulation(tmp_path, images: ImageDataset) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    try:
        run(TinyModel(), images, tmp_path / "c", dataclasses.replace(TINY, steps=1))
        assert accelerator.gradient_accumulation_steps == 3
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_processes_that_read_images_change_no_bit(tmp_path, images: ImageDataset) -> None:
    one, _ = run(TinyModel(), images, tmp_path / "a")
    other, _ = run(TinyModel(), images, tmp_path / "b", workers=1)
    assert torch.equal(one.layers[0].weight, other.layers[0].weight)


def test_mixed_precision_computes_in_it_and_leaves_the_model_as_it_was(tmp_path, images: ImageDataset) -> None:
    seen = []

    class Watching(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(self.layers[0](torch.zeros(1, 5)).dtype)
            return super().forward(x, t)

    model = Watching()
    config = dataclasses.replace(TINY, precision="bf16", steps=2)
    average, _ = run(model, images, tmp_path / "a", config)
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in average.parameters()} == {torch.float32}
    model(torch.zeros(1, 1, 2, 2), torch.tensor([3]))
    assert seen[-1] == torch.float32
    run(model, images, tmp_path / "b", dataclasses.replace(config, precision="no"))
    assert seen[-1] == torch.float32


def test_half_precision_is_refused_without_a_gpu(tmp_path, images: ImageDataset) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        run(TinyModel(), images, tmp_path / "c", dataclasses.replace(TINY, precision="fp16"))


def test_log_is_written_as_csv_and_for_tensorboard_if_that_is_there(tmp_path, images, monkeypatch) -> None:
    calls = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    _, log = run(TinyModel(), images, tmp_path / "c")
    (five, loss_5, rate_5, _, _), (ten, loss_10, rate_10, _, _) = log.lines
    assert (five, ten) == (5, 10)
    scalars = [("loss", loss_5, 5), ("learning_rate", rate_5, 5), ("loss", loss_10, 10), ("learning_rate", rate_10, 10)]
    assert calls == [("open", str(tmp_path / "tensorboard"), 0), *scalars, ("close",)]
    lines = (tmp_path / "training_log.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate,seconds"
    assert [line.split(",")[:2] for line in lines[1:]] == [["5", f"{loss_5:.6g}"], ["10", f"{loss_10:.6g}"]]


def test_resume_refuses_other_settings_and_other_models(tmp_path, images: ImageDataset) -> None:
    run(TinyModel(), images, tmp_path / "c")
    with pytest.raises(ValueError, match="batch_size was 4, now 8"):
        run(TinyModel(), images, tmp_path / "c", dataclasses.replace(TINY, batch_size=8), resume=True)
    with pytest.raises(ValueError, match="another model"):
        run(nn.Linear(2, 2), images, tmp_path / "c", resume=True)


def test_checkpoint_from_before_an_option_existed_is_resumed(tmp_path, images: ImageDataset) -> None:
    run(TinyModel(), images, tmp_path / "c")
    state = load_state(tmp_path / "c")
    for name in ("gradient_checkpointing", "compile_blocks", "jacobian_penalty", "state_loss"):
        del state.record["config"][name]
    save_state(tmp_path / "c", state)
    run(TinyModel(), images, tmp_path / "c", dataclasses.replace(TINY, steps=14), resume=True)
    assert load_state(tmp_path / "c").record["step"] == 14


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("learning_rate", 3e38),
        ("batch_size", 10**20),
        ("seed", 2**63),
        ("ema_decay", 1.0),
        ("class_dropout", 1.0),
        ("accumulate", 3),
        ("precision", "fp8"),
        ("seed", -1),
        ("weighting", "snr"),
        ("state_loss", "all"),
        ("max_grad_norm", 0.0),
        ("jacobian_penalty", -1.0),
        ("gradient_checkpointing", 1),
    ],
)
def test_config_refuses_values_out_of_range_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


def test_what_the_model_draws_is_not_the_timesteps_again(tmp_path, images: ImageDataset) -> None:
    class Drawing(TinyModel):
        pairs: list[tuple[Tensor, Tensor]]

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.pairs.append((t, torch.randint(1000, t.shape)))
            return super().forward(x, t)

    model = Drawing()
    model.pairs = []
    train(model, images, SCHEDULE, TINY, checkpoint=tmp_path / "state", progress=False)
    assert len(model.pairs) == TINY.steps
    assert not any(torch.equal(t, own) for t, own in model.pairs)


def test_each_piece_of_a_batch_has_noise_of_its_own_and_the_depth_of_all(tmp_path, images: ImageDataset) -> None:
    noises, depths = [], []

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.1))
            self.layer = FixedPointLayer(self.f, backward=StochasticJFB(max_no_grad=50, max_grad=1))

        def f(self, z: Tensor, x: Tensor) -> Tensor:
            depths[-1] += 1
            return self.weight * z + x

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            noises.append(torch.randn(x.shape))
            depths.append(0)
            return self.layer(x, z0=noises[-1])

    for accumulate in (1, 4):
        run(Noisy(), images, tmp_path / f"{accumulate}", dataclasses.replace(TINY, steps=3, accumulate=accumulate))
    whole, pieces = depths[:3], depths[3:]
    assert pieces == [depth for depth in whole for _ in range(4)]
    assert len(set(whole)) > 1
    drawn = [float(noise[0].sum()) for noise in noises[3:]]
    assert len(set(drawn)) == 12
