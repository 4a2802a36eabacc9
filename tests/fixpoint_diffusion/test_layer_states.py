"""Losses on the states that an FPDM's layer passes on its way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers import family
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.training.batches import Share, StepSampler, draw
from fixpoint_diffusion.training.data import ImageDataset, LabelledImages, open_dataset
from fixpoint_diffusion.training.layer_states import objective_of
from fixpoint_diffusion.training.networks import TrainableDenoiser
from fixpoint_diffusion.training.objectives import DenoisingTask
from fixpoint_diffusion.training.trainer import train

SMALL = FPDMConfig(sample_size=4, width=8, heads=2, backward="multi-jfb", max_no_grad=2, max_grad=1)
TINY = TrainingConfig(steps=4, batch_size=4, log_every=1, prediction_type="v_prediction")
SCHEDULE = NoiseSchedule.linear().zero_terminal_snr().alphas_cumprod
LOSSES = ["supervised", "self-distilled"]


def made(config: FPDMConfig = SMALL) -> FPDM:
    generator = torch.Generator().manual_seed(0)
    model = FPDM(config)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


@pytest.fixture
def images() -> ImageDataset:
    return open_dataset(LabelledImages(images=torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))))


def drawn(images: ImageDataset, step: int, config: TrainingConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and noise of that step of the first epoch of a training."""
    share = Share(config=config)
    rows = list(StepSampler(len(images), share))[step]
    x_0 = torch.stack([images[index]["images"] for index in rows])
    found = draw(share, step, 0, (1, 4, 4), len(SCHEDULE), x_0.device)
    return x_0, found.t, found.noise


def by_hand(model: FPDM, x_0: Tensor, t: Tensor, noise: Tensor, share: float) -> Tensor:
    """Iterations without gradient and one with, an output, and the same again from the state reached."""
    a = SCHEDULE[t][:, None, None, None]
    x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float()
    target = a.sqrt() * noise - (1 - a).sqrt() * x_0
    outputs, reached = [], None
    for _ in range(2):
        z, inputs, condition = model._before_layer(x_t, t, None)
        z = z if reached is None else reached
        for _ in range(model.config.max_no_grad):
            with torch.no_grad():
                z = model.implicit_block(z, *inputs)
        z = model.implicit_block(z, *inputs)
        reached = z.detach()
        for block in model.post:
            z = block(z, condition)
        outputs.append(model.head(z, condition))
    early, late = outputs
    given = [(output - target).square().mean() for output in outputs]
    return given[1] + share * given[0] + (1 - share) * (early - late.detach()).square().mean()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("step", "no_grad"), [(0, 2), (1, 0), (3, 2)])
def test_loss_and_gradient_are_those_of_a_loop_by_hand(
    name: str, step: int, no_grad: int, images: ImageDataset
) -> None:
    config = dataclasses.replace(TINY, state_loss=name)
    x_0, t, noise = drawn(images, step % 2, config)
    models = [made(dataclasses.replace(SMALL, max_no_grad=no_grad)) for _ in range(2)]
    task = DenoisingTask(x_0=x_0, t=t, noise=noise, alphas_cumprod=SCHEDULE, config=config)
    found = objective_of(models[0], config)(models[0], task, {}, step)
    expected = by_hand(models[1], x_0, t, noise, 1.0 if name == "supervised" else 1 - step / 4)
    torch.testing.assert_close(found.float(), expected.float())
    found.backward()
    expected.backward()
    for (label, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=label)
    # The next call of the model starts anew.
    with torch.no_grad():
        torch.testing.assert_close(models[0](x_0, t, depth=2), models[1](x_0, t, depth=2), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_trainer_minimises_it(name: str, images: ImageDataset, tmp_path: Any) -> None:
    config = dataclasses.replace(TINY, state_loss=name)
    expected = by_hand(made(), *drawn(images, 0, config), share=1.0)
    model = TrainableDenoiser(made(), family("fpdm"), 1)
    _, log = train(model, images, SCHEDULE, config, checkpoint=tmp_path / "c", progress=False)
    assert log.lines[0][1] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_distillation_leaves_the_learned_variance_alone(images: ImageDataset) -> None:
    config = dataclasses.replace(TINY, state_loss="self-distilled")
    x_0, t, noise = drawn(images, 0, config)
    task = DenoisingTask(x_0=x_0, t=t, noise=noise, alphas_cumprod=SCHEDULE, config=config)
    early, late = torch.randn(2, 4, 2, 4, 4)
    other = torch.cat([late[:, :1], late[:, 1:] + 7], dim=1)
    assert torch.equal(task.distance(early, late), task.distance(early, other))
    torch.testing.assert_close(task.distance(early, late), (early[:, :1] - late[:, :1]).square().mean())


@pytest.mark.parametrize("name", LOSSES)
def test_model_without_a_layer_is_refused(name: str, images: ImageDataset, tmp_path: Any) -> None:
    config = dataclasses.replace(TINY, state_loss=name)
    with pytest.raises(ValueError, match=f"state_loss '{name}' is for a model with one fixed point layer, found 0"):
        train(nn.Linear(2, 2), images, SCHEDULE, config, checkpoint=tmp_path / "c", progress=False)
    assert not list(tmp_path.iterdir())
