"""What chains see of a denoiser before they are solved, and what is passed to it for each sample."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, SamplingChain, initial_noise, sample
from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.denoisers import DiffusersDenoiser, FPDMDenoiser, Guided
from fixpoint_diffusion.denoisers.checks import check_fixed_function
from fixpoint_diffusion.models import FPDM, FPDMConfig
from tests.fixpoint_diffusion.tiny import tiny_unet

LINEAR = NoiseSchedule.linear()
RUNS: dict[str, Callable[[SamplingChain], object]] = {
    "sequential": lambda chain: chain.sequential(),
    "sample": sample,
    "solve": fixpoint.solve,
    "one_step": lambda chain: chain.one_step(chain.z0),
}


class Network(nn.Module):
    """A convolution and what ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        if kind == "dropout":
            self.extra: nn.Module = nn.Dropout(0.1)
        elif kind == "batch norm":
            self.extra = nn.BatchNorm2d(1)
        else:
            self.extra = nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.extra(self.conv(x))
        if self.kind == "attention":
            flat = out.flatten(1)
            return (torch.softmax(flat @ flat.T / 8, dim=-1) @ flat).view_as(x)
        if self.kind == "largest":
            return out / out.abs().max()
        if self.kind == "timestep":  # of the first row, as networks that take one for all
            return out * (1 + t[0] / 1000)
        return out


CAUSES = {
    ("dropout", True): "another output for the same input: Dropout is in training mode; call model.eval()",
    ("batch norm", True): "depends on the rows beside it: BatchNorm2d is in training mode; call model.eval()",
    ("attention", False): "depends on the rows beside it: steps are solved as one batch",
    ("largest", False): "depends on the rows beside it: steps are solved as one batch",
    ("timestep", False): "depends on the rows beside it: .* nor the timestep of another",
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("kind", "training"), CAUSES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_denoiser_that_is_no_fixed_function_of_rows_is_named(
    kind: str, training: bool, run: str, samples: int, wrapped: bool
) -> None:
    network = Network(kind).train(training)
    denoiser = DiffusersDenoiser(network) if wrapped else network
    chain = DDIMChain(denoiser, initial_noise(0, range(samples), (1, 8, 8)), LINEAR, steps=6)
    with pytest.raises(ValueError, match=CAUSES[kind, training]):
        RUNS[run](chain)


def test_the_cause_is_found_in_a_denoiser_around_a_denoiser() -> None:
    class Halved:
        def __init__(self, denoiser: nn.Module) -> None:
            self.denoiser = denoiser

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x, t) / 2

    chain = DDIMChain(Halved(Network("dropout").train()), initial_noise(0, range(2), (1, 8, 8)), LINEAR, steps=6)
    with pytest.raises(ValueError, match="Dropout is in training mode"):
        chain.sequential()


@pytest.mark.parametrize("kind", ["dropout", "batch norm", "plain"])
def test_the_same_networks_in_evaluation_mode_pass(kind: str) -> None:
    chain = DDIMChain(Network(kind).eval(), initial_noise(0, range(3), (1, 8, 8)), LINEAR, steps=6, max_rows=4)
    torch.testing.assert_close(sample(chain, rtol=1e-6).images, chain.sequential()[:, -1], rtol=1e-4, atol=1e-4)


def test_the_check_costs_one_call_a_chain_and_no_more_rows_than_a_call_may_have() -> None:
    rows: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return 0.5 * x

    for max_rows, checked in ((None, 3), (2, 2), (1, 1)):
        rows.clear()
        chain = DDIMChain(denoiser, torch.ones(1, 4), LINEAR, steps=5, max_rows=max_rows)
        chain.sequential()
        chain.sequential()
        assert rows == [1, checked] + [1] * 9
        assert (chain.check_evals, chain.evals, chain.rounds) == (checked, 10, 10)


def test_rounding_between_batch_sizes_is_no_fault() -> None:
    """A network in half precision may round otherwise in another batch: here by 2 percent, the same at one size."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return x * (1 + 0.02 * (len(x) % 3))

    DDIMChain(denoiser, torch.ones(1, 4), LINEAR, steps=5).sequential()


def test_chains_still_go_through_vmap() -> None:
    def run(x_T: Tensor) -> Tensor:
        chain = DDIMChain(lambda x, t: 0.5 * x, x_T, LINEAR, steps=3)
        return chain(chain.inputs(x_T[:, None].expand(-1, 3, -1)))

    x_T = torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.func.vmap(run)(x_T), torch.stack([run(part) for part in x_T]))


def clamps(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x.clamp_(-1, 1)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_denoiser_that_changes_x_in_place_is_refused_and_leaves_no_mark(run: str, wrapped: bool) -> None:
    class Clamps(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return clamps(x, t)

    x_T = initial_noise(0, range(3), (1, 8, 8))
    before = x_T.clone()
    chain = DDIMChain(DiffusersDenoiser(Clamps()) if wrapped else clamps, x_T, LINEAR, steps=6)
    with pytest.raises(ValueError, match="the denoiser changed its input in place"):
        RUNS[run](chain)
    assert torch.equal(x_T, before)


def test_initial_noise_survives_even_a_change_that_nobody_sees() -> None:
    def hidden(x: Tensor, t: Tensor) -> Tensor:
        x.data.clamp_(-1, 1)
        return 0.5 * x

    x_T = initial_noise(0, range(3), (2,))
    before = x_T.clone()
    with torch.inference_mode():
        DDIMChain(clamps, x_T, LINEAR, steps=6).sequential()
    found = DDIMChain(hidden, x_T, LINEAR, steps=6).sequential()
    assert torch.equal(x_T, before)
    expected = DDIMChain(lambda x, t: 0.5 * x.clamp(-1, 1), x_T, LINEAR, steps=6).sequential()
    torch.testing.assert_close(found, expected)


@pytest.fixture
def conditional() -> FPDMDenoiser:
    """A small FPDM with random weights, far from the zeros that it starts with."""
    torch.manual_seed(0)
    model = FPDM(FPDMConfig(width=16, heads=2, num_classes=3)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return FPDMDenoiser(model, depth=3)


LABELS = torch.tensor([2, 0, 1])
SCALES = torch.tensor([1.0, 2.0, 5.0])


def alone(denoiser: FPDMDenoiser, x_T: Tensor) -> Tensor:
    """Each sample by itself, by the ordinary sampler, with its own scale as a number."""
    rows = []
    for i in range(len(x_T)):
        guided = Guided(denoiser, float(SCALES[i]))
        conditioning = {"class_labels": LABELS[i : i + 1]}
        rows.append(DDIMChain(guided, x_T[i : i + 1], LINEAR, steps=5, conditioning=conditioning).sequential()[:, -1])
    return torch.cat(rows)


@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("run", ["sample", "solve", "sequential"])
def test_every_sample_may_have_a_guidance_scale_of_its_own(
    conditional: FPDMDenoiser, run: str, max_rows: int | None
) -> None:
    x_T = initial_noise(0, range(3), (1, 8, 8))
    chain = DDIMChain(
        Guided(conditional, SCALES), x_T, LINEAR, steps=5, conditioning={"class_labels": LABELS}, max_rows=max_rows
    )
    if run == "sample":
        found = sample(chain, solver=fixpoint.Picard(), rtol=1e-7, on_failure="ignore").images
    elif run == "solve":
        found = fixpoint.solve(chain, solver=fixpoint.Picard(), rtol=1e-7, on_failure="ignore").value[:, -1]
    else:
        found = chain.sequential()[:, -1]
    expected = alone(conditional, x_T)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_scales_must_fit_the_rows(conditional: FPDMDenoiser) -> None:
    x_T = initial_noise(0, range(2), (1, 8, 8))
    with pytest.raises(ValueError, match="'guidance_scale' must be a tensor with one row for each of 2 samples"):
        DDIMChain(Guided(conditional, SCALES), x_T, LINEAR, steps=5, conditioning={"class_labels": LABELS[:2]})
    with pytest.raises(ValueError, match=r"the guidance has \(3,\) scales, expected one for each of 2 rows"):
        Guided(conditional, SCALES)(x_T, torch.tensor([1, 2]), class_labels=LABELS[:2])
    with pytest.raises(ValueError, match="scale must be a number or hold one for each sample"):
        Guided(conditional, SCALES[:, None])


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 4]), torch.tensor([0, -1, 1]), torch.tensor([0.0, 1.0, 2.0])])
def test_class_labels_that_the_model_does_not_know_are_refused(conditional: FPDMDenoiser, labels: Tensor) -> None:
    x_T = initial_noise(0, range(3), (1, 8, 8))
    with pytest.raises(ValueError, match="class_labels must be 3 whole numbers from 0 to 2, or 3 for no class"):
        DDIMChain(conditional, x_T, LINEAR, steps=5, conditioning={"class_labels": labels})


FLOW, BETAS = {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": "DDIMScheduler", "clip_sample": False}
FLOW_2M = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("trained", "sampled", "refused"),
    [
        (FLOW, BETAS, "trained on a flow (FlowMatchEulerDiscreteScheduler), and these steps are of noise levels"),
        (BETAS, FLOW, "trained on noise levels (DDIMScheduler), and these steps are along a flow"),
        (FLOW, FLOW_2M, None),
        (FLOW_2M, FLOW, None),
        (BETAS, {"_class_name": "EulerDiscreteScheduler"}, None),
    ],
)
def test_steps_of_another_process_than_a_model_was_trained_on_are_refused(
    trained: dict[str, Any], sampled: dict[str, Any], refused: str | None
) -> None:
    kind = "flow_prediction" if trained is not BETAS else "epsilon"
    denoiser = DiffusersDenoiser(tiny_unet(), prediction_type=kind, schedule_config=trained)
    expected = contextlib.nullcontext() if refused is None else pytest.raises(ValueError, match=re.escape(refused))
    with expected:
        chain_from_scheduler(denoiser, torch.zeros(1, 1, 8, 8), sampled, steps=4)
    if trained is FLOW and refused:
        with expected:
            DDIMChain(denoiser, torch.zeros(1, 1, 8, 8), NoiseSchedule.linear(), steps=4)


def test_a_row_that_rounding_moves_as_far_as_the_rows_beside_it_is_no_fault() -> None:
    """As a fixed-point layer that does not converge: what a batch rounds in its own way grows to all of the output."""
    calls: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        value = (0.3 + 0.1 * x.sigmoid()) * (1 + 8 * torch.finfo(x.dtype).eps * x.sum().sin())
        for _ in range(60):
            value = 4 * value * (1 - value)
        return value

    chain = DDIMChain(denoiser, initial_noise(0, range(1), (1, 8, 8)), LINEAR, steps=5)
    chain.sequential()
    assert len(calls) > 5 + 3, "a closer look was taken"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_timestep_that_is_taken_for_all_is_found_in_any_precision(dtype: torch.dtype) -> None:
    """In bfloat16 a few roundings move a smooth output by as much; but not by more than the input."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return x * (1 + t[0] / 1000)

    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([10, 20])
    with pytest.raises(ValueError, match="depends on the rows beside it"):
        check_fixed_function(denoiser, x, t, {}, denoiser(x, t), rows=3, timesteps=torch.arange(1, 1000, 50))


def test_a_layer_of_random_depth_is_found_where_gradients_are_recorded() -> None:
    """Such a layer solves under ``no_grad``, and draws where grad mode is on, in eval mode too."""
    w = torch.eye(4).mul(0.9).requires_grad_()
    rule = fixpoint.StochasticJFB(max_no_grad=3, max_grad=3, generator=torch.Generator().manual_seed(0))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return fixpoint.solve(lambda z: torch.tanh(z @ w + x), torch.zeros_like(x), backward=rule).value

    chain = DDIMChain(denoiser, torch.ones(2, 4), LINEAR, steps=5)
    with pytest.raises(ValueError, match="another output for the same input"):
        chain.sequential()
    with torch.no_grad():
        assert torch.isfinite(DDIMChain(denoiser, torch.ones(2, 4), LINEAR, steps=5).sequential()).all()
