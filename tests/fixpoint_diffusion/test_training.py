from __future__ import annotations

import dataclasses
import itertools
import math
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.training.checkpoints import TrainingState, load_state, save_state
from fixpoint_diffusion.training.trainer import TrainingConfig, diffusion_loss, learning_rate_at, loss_weight, train

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
def images() -> Tensor:
    return torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(model: nn.Module, images: Tensor, path, config: TrainingConfig = TINY, **options):
    return train(model, images, SCHEDULE, config, checkpoint=path, progress=False, **options)


@pytest.mark.parametrize("stop_at", [1, 5, 7, 11])
def test_interrupted_and_resumed_training_ends_with_the_same_bits(tmp_path, images: Tensor, stop_at: int) -> None:
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


def test_training_leaves_the_global_random_state_and_the_signal_handler_alone(tmp_path, images: Tensor) -> None:
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
def test_second_ctrl_c_stops_at_once(tmp_path, images: Tensor) -> None:
    class PressTwice(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return super().forward(x, t)

    with pytest.raises(KeyboardInterrupt):
        run(PressTwice(), images, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_seed_changes_the_result(tmp_path, images: Tensor) -> None:
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
    data = spread * torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    a = 0.6
    config = TrainingConfig(steps=400, batch_size=512, learning_rate=0.05, final_learning_rate=0, warmup_steps=10)
    config = dataclasses.replace(config, ema_decay=0.95, weight_decay=0)
    one_step = torch.tensor([a], dtype=torch.float64)
    model, log = train(Slope(), data, one_step, config, checkpoint=tmp_path / "c", progress=False)
    variance = a * float(data.var()) + 1 - a
    assert model.slope.item() == pytest.approx(math.sqrt(1 - a) / variance, rel=0.02)
    assert log.lines[-1][1] == pytest.approx(1 - (1 - a) / variance, rel=0.1)


def test_average_is_the_exponential_moving_average_of_the_weights(tmp_path, images: Tensor) -> None:
    history: list[Tensor] = []

    class Recording(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            history.append(self.layers[3].bias.detach().clone())
            return super().forward(x, t)

    model = Recording()
    average, _ = run(model, images, tmp_path / "c")
    weights = [*history[1:], model.layers[3].bias.detach()]  # after each step
    expected = weights[0]
    for value in weights[1:]:
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.layers[3].bias.detach(), expected)


def test_learning_rate_warms_up_then_falls_to_its_end() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.01)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["plain", "min-snr"])
def test_loss_of_a_perfect_prediction_is_zero(prediction_type: str, weighting: str) -> None:
    x_0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    a = SCHEDULE[t].view(3, 1, 1, 1)

    class Perfect(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            torch.testing.assert_close(x, a.sqrt() * x_0 + (1 - a).sqrt() * noise)
            v = a.sqrt() * noise - (1 - a).sqrt() * x_0
            answer = {"epsilon": noise, "v_prediction": v, "sample": x_0}[prediction_type]
            return torch.cat([answer, torch.full_like(answer, 7)], 1)  # a learned variance takes no part

    config = TrainingConfig(prediction_type=prediction_type, weighting=weighting)
    assert float(diffusion_loss(Perfect(), x_0, t, noise, SCHEDULE, config)) == pytest.approx(0, abs=1e-25)


@settings(max_examples=50)
@given(a=st.floats(1e-6, 1 - 1e-6), gamma=st.floats(0.1, 50), error=st.floats(-2, 2))
def test_min_snr_weighs_the_same_error_of_x0_alike_in_every_prediction_type(
    a: float, gamma: float, error: float
) -> None:
    """With x_t given, an error e of x_0 is an error -sqrt(a/(1-a)) e of the noise and -e/sqrt(1-a) of v."""
    alpha = torch.tensor([a], dtype=torch.float64)
    errors = {"sample": error, "epsilon": -math.sqrt(a / (1 - a)) * error, "v_prediction": -error / math.sqrt(1 - a)}
    snr = a / (1 - a)
    for kind, value in errors.items():
        config = TrainingConfig(prediction_type=kind, weighting="min-snr", min_snr_gamma=gamma)
        weighted = float(loss_weight(alpha, config)) * value**2
        assert weighted == pytest.approx(min(snr, gamma) * error**2, rel=1e-9)


def test_noise_prediction_is_refused_with_zero_terminal_snr(tmp_path, images: Tensor) -> None:
    schedule = NoiseSchedule.linear().zero_terminal_snr().alphas_cumprod
    with pytest.raises(ValueError, match="v_prediction"):
        train(TinyModel(), images, schedule, TINY, checkpoint=tmp_path / "c", progress=False)


def test_divergence_stops_training_with_the_step(tmp_path, images: Tensor) -> None:
    model = TinyModel()
    model.layers[0].weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="step 0"):
        run(model, images, tmp_path / "c")


def test_resume_refuses_other_settings_and_other_models(tmp_path, images: Tensor) -> None:
    run(TinyModel(), images, tmp_path / "c")
    with pytest.raises(ValueError, match="batch_size was 4, now 8"):
        run(TinyModel(), images, tmp_path / "c", dataclasses.replace(TINY, batch_size=8), resume=True)
    with pytest.raises(ValueError, match="another model"):
        run(nn.Linear(2, 2), images, tmp_path / "c", resume=True)


def test_resume_without_a_checkpoint_or_with_a_damaged_one_says_so(tmp_path, images: Tensor) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(TinyModel(), images, tmp_path / "none", resume=True)
    run(TinyModel(), images, tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        run(TinyModel(), images, tmp_path / "c", resume=True)


def test_failed_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch) -> None:
    old = TrainingState(model={"w": torch.ones(3)}, ema={}, optimizer={}, record={"step": 1})
    save_state(tmp_path / "c", old)

    def broken(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("fixpoint_diffusion.training.checkpoints.os.fsync", broken)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path / "c", dataclasses.replace(old, record={"step": 2}))
    assert load_state(tmp_path / "c").record == {"step": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("ema_decay", 1.0), ("seed", -1), ("weighting", "snr")],
)
def test_config_refuses_values_out_of_range_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})
