"""What FPDM's samplers refuse before the model is asked, and dtypes and noise that both of them take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fixpoint_diffusion import NoiseSchedule
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.sampling import sample_fpdm, sample_fpdm_jointly

SCHEDULE = NoiseSchedule.linear().zero_terminal_snr()


@pytest.fixture(scope="module")
def model() -> FPDM:
    torch.manual_seed(0)
    model = FPDM(FPDMConfig(width=16, heads=2, num_classes=3))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


X_T = noise(2, 1, 8, 8)
CLASSES = torch.tensor([0, 2])


@pytest.mark.parametrize("sampler", [sample_fpdm, sample_fpdm_jointly])
@pytest.mark.parametrize(
    ("x_T", "options", "message"),
    [
        # Latents of whole numbers would be rounded in every step.
        (X_T.long(), {}, r"x_T must be floats \(N, 1, 8, 8\), N at least 1; got torch.int64 \(2, 1, 8, 8\)"),
        (X_T[:0], {}, r"N at least 1; got torch.float32 \(0, 1, 8, 8\)"),
        (X_T[..., :4], {}, r"x_T must be floats \(N, 1, 8, 8\)"),
        (X_T, {"y": torch.tensor([0, 4])}, r"y must be from 0 to 3 \(3: no class\), got \[0, 4\]"),
        (X_T, {"y": torch.tensor([-1, 0])}, "y must be from 0 to 3"),
        (
            X_T,
            {"y": torch.tensor([0, 1, 2])},
            r"one class for each of 2 images, got torch.int64 \(3,\)",
        ),
        (X_T, {"y": torch.tensor([0])}, "one class for each of 2 images"),
        (X_T, {"y": torch.tensor([0.0, 1.0])}, "one class for each of 2 images, got torch.float32"),
        (X_T, {"y": [0, 1]}, r"one class for each of 2 images, got \[0, 1\]"),
        (X_T, {"y": CLASSES, "guidance": float("nan")}, "guidance must be finite, got nan"),
        (X_T, {"y": CLASSES, "guidance": float("inf")}, "guidance must be finite, got inf"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_asked(
    model: FPDM, sampler: Callable[..., Any], x_T: Tensor, options: dict[str, Any], message: str
) -> None:
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with hook, pytest.raises(ValueError, match=message):
        sampler(model, x_T, SCHEDULE, steps=3, **options)


@pytest.mark.parametrize("iterations", [0, 2.5, True, None])
def test_joint_iterations_are_a_whole_number(model: FPDM, iterations: Any) -> None:
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1"):
        sample_fpdm_jointly(model, X_T, SCHEDULE, steps=3, iterations=iterations)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_joint_solve_takes_latents_of_another_dtype_than_the_model(
    model: FPDM, dtype: torch.dtype, close: float
) -> None:
    joint = sample_fpdm_jointly(model, X_T.to(dtype), SCHEDULE, steps=5, y=CLASSES, on_failure="ignore")
    expected = sample_fpdm(model, X_T, SCHEDULE, steps=5, iterations=1, y=CLASSES).images
    assert joint.images.dtype == dtype
    torch.testing.assert_close(joint.images.float(), expected, rtol=close, atol=close)


def test_a_joint_solve_may_start_from_nothing(model: FPDM) -> None:
    joint = sample_fpdm_jointly(model, torch.zeros_like(X_T), SCHEDULE, steps=5, y=CLASSES)
    expected = sample_fpdm(model, torch.zeros_like(X_T), SCHEDULE, steps=5, iterations=1, y=CLASSES).images
    assert bool(joint.solution.converged.all())
    torch.testing.assert_close(joint.images, expected, rtol=1e-3, atol=1e-3)
