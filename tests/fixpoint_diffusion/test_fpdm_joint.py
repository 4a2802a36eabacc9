"""An FPDM's chain, as a denoiser's and as one fixed point with its layers, equals what is sampled step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import invert, sample
from fixpoint_diffusion.chains import DDIMChain
from fixpoint_diffusion.denoisers import FPDMDenoiser
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling import fpdm_steps, sample_fpdm, sample_fpdm_jointly

SCHEDULE = NoiseSchedule.linear().zero_terminal_snr()


def small_model(**options: object) -> FPDM:
    """In float64, with random values where parameters start at zero."""
    generator = torch.Generator().manual_seed(0)
    model = FPDM(FPDMConfig(sample_size=4, patch_size=2, width=16, heads=2, **options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


@pytest.fixture(name="x_T")
def initial_latents() -> Tensor:
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_latents_and_layers_equal_those_of_the_sequential_run(x_T: Tensor, iterations: int, eta: float) -> None:
    model, options = small_model(), {"steps": 8, "iterations": iterations, "eta": eta, "seed": 3}
    joint = sample_fpdm_jointly(model, x_T, SCHEDULE, rtol=1e-9, **options)
    steps = list(fpdm_steps(model, x_T, SCHEDULE, **options))
    assert bool(joint.solution.converged.all())
    torch.testing.assert_close(
        joint.trajectory, torch.stack([step.after for step in steps], dim=1), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        joint.layers, torch.stack([step.solution.value for step in steps], dim=1), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(joint.images, joint.trajectory[:, -1])


def test_guidance_and_learned_variance_equal_the_sequential_run(x_T: Tensor) -> None:
    """Both halves reuse their own solutions, whatever rows a round takes."""
    model = small_model(num_classes=3, learn_sigma=True)
    options = {"steps": 6, "iterations": 2, "eta": 1.0, "variance_type": "learned_range", "guidance": 2.0}
    y = torch.tensor([0, 2, 1])
    joint = sample_fpdm_jointly(
        model, x_T, SCHEDULE, rtol=1e-9, y=y, solver=fixpoint.CausalQuasiNewton(max_rows=5), **options
    )
    steps = list(fpdm_steps(model, x_T, SCHEDULE, y=y, **options))
    torch.testing.assert_close(joint.images, steps[-1].after, rtol=1e-6, atol=1e-6)
    assert joint.layers.shape == (3, 6, 2, 4, 16)
    last = torch.cat([joint.layers[:, -1, 0], joint.layers[:, -1, 1]])
    torch.testing.assert_close(last, steps[-1].solution.value, rtol=1e-6, atol=1e-6)


def test_cost_counts_every_block(x_T: Tensor) -> None:
    model, rows = small_model(n_pre=2, n_post=3, implicit_blocks=2), []

    def count(module: object, inputs: object, output: Tensor) -> None:
        rows.append(len(output))

    for block in (*model.pre, *model.post, *model.implicit_block.blocks):  # of which only parts may be called
        block.attention.register_forward_hook(count)
    joint = sample_fpdm_jointly(model, x_T, SCHEDULE, steps=6, iterations=2)
    assert joint.serial_block_passes == len(rows)
    assert joint.block_passes == pytest.approx(sum(rows) / 3)


def test_a_count_below_one_is_refused(x_T: Tensor) -> None:
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1, got 0"):
        sample_fpdm_jointly(small_model(), x_T, SCHEDULE, iterations=0)


def test_the_chain_of_an_fpdm_is_sampled_in_parallel_with_its_layers_solved_inside(x_T: Tensor) -> None:
    """The layer to a tolerance in every evaluation, or by a count: equal to the sampler without reuse."""
    model = small_model()
    for denoiser, iterations in (
        (FPDMDenoiser(model, rtol=1e-10), 80),
        (FPDMDenoiser(model, rtol=1e-10, solver=fixpoint.Anderson()), 80),
        (FPDMDenoiser(model, depth=3), 3),
    ):
        chain = DDIMChain(denoiser, x_T, SCHEDULE, steps=8, spacing="trailing")
        result = sample(chain, rtol=1e-8)
        expected = sample_fpdm(model, x_T, SCHEDULE, steps=8, iterations=iterations, reuse=False)
        assert bool(result.solution.converged.all())
        torch.testing.assert_close(result.images, expected.images, rtol=1e-6, atol=1e-6)


def test_the_chain_of_an_fpdm_is_inverted(x_T: Tensor) -> None:
    model = small_model()
    schedule = NoiseSchedule.linear()  # with zero terminal SNR the first step forgets x_T
    chain = DDIMChain(FPDMDenoiser(model, depth=4), x_T, schedule, steps=6)
    images = sample_fpdm(model, x_T, schedule, steps=6, iterations=4, reuse=False, spacing="leading").images
    torch.testing.assert_close(images, chain.sequential()[:, -1])
    inverse = invert(chain, images, rtol=1e-8)
    torch.testing.assert_close(inverse.x_T, x_T, rtol=1e-4, atol=1e-4)


def test_a_denoiser_solves_its_layer_by_the_given_solver(x_T: Tensor) -> None:
    model, t = small_model(), torch.tensor([900, 500, 10])
    with torch.no_grad():
        for solver in (fixpoint.Picard(), fixpoint.Anderson()):
            expected = model(x_T, t, depth=4, solver=solver)
            assert torch.equal(FPDMDenoiser(model, depth=4, solver=solver)(x_T, t), expected)
