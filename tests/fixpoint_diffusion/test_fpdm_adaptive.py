from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion.models import FPDM, FPDMConfig, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling import ToTolerance, adaptive_tolerance, fpdm_steps, sample_fpdm

SCHEDULE = NoiseSchedule.linear().zero_terminal_snr()


@pytest.fixture
def model() -> FPDM:
    """In float64, with random values where parameters start at zero, so that images need different iterations."""
    generator = torch.Generator().manual_seed(0)
    model = FPDM(FPDMConfig(sample_size=4, patch_size=2, width=16, heads=2, num_classes=3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def iterated(problem: Callable[[Tensor], Tensor], z: Tensor, allowed: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """Plain iteration until the mean over the given rows of the last difference is allowed."""
    for count in range(1, 51):
        z, before = problem(z), z
        if float((z - before).flatten(1).norm(dim=1).mean()) <= float(allowed(z)):
            return z, count
    raise AssertionError


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("tolerance", [{"atol": 0.01}, {"rtol": 1e-3}])
def test_each_step_ends_where_the_hand_loop_does(model: FPDM, per_sample: bool, tolerance: dict[str, float]) -> None:
    until = ToTolerance(**tolerance, per_sample=per_sample)

    def allowed(z: Tensor) -> Tensor:
        return until.atol + until.rtol * z.flatten(1).norm(dim=1).mean()

    seen = set()
    for step in fpdm_steps(model, noise(5, 1), SCHEDULE, steps=4, iterations=until, solver=fixpoint.Picard()):
        for rows in [slice(i, i + 1) for i in range(5)] if per_sample else [slice(None)]:
            z0 = None if step.z0 is None else step.z0[rows]
            problem = fpdm_layer_problem(model, step.latent[rows], torch.tensor(step.timestep), z0)
            expected, count = iterated(problem, problem.z0, allowed)
            torch.testing.assert_close(step.solution.value[rows], expected, rtol=1e-10, atol=1e-10)
            assert step.solution.evals[rows].tolist() == [count] * len(expected)
            seen.add(count)
        assert bool(step.solution.converged.all())
    assert len(seen) > 1


def test_images_that_are_done_cost_nothing(model: FPDM) -> None:
    rows = []
    model.implicit_block.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    samples = sample_fpdm(model, noise(6, 2), SCHEDULE, steps=3, iterations=ToTolerance(atol=0.01), reuse=False)
    assert sum(rows) == int(samples.iterations.sum())
    assert samples.iterations.unique().numel() > 1
    expected = 3 * 2 + float(samples.iterations.double().mean(dim=1).sum())
    assert samples.block_passes == pytest.approx(expected)


@dataclasses.dataclass(frozen=True)
class HeavyBall(fixpoint.Solver):
    """Plain iteration with momentum, which moves a row on although it is its own image."""

    def init(self, z: Tensor) -> Tensor:
        return z

    def step(self, z: Tensor, fz: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return fz + 0.2 * (z - state), z


@pytest.mark.parametrize("solver", [fixpoint.Picard(), HeavyBall()])
def test_an_image_that_stops_by_itself_does_not_depend_on_its_batch(model: FPDM, solver: fixpoint.Solver) -> None:
    together, alone = (
        sample_fpdm(
            model, noise(5, 3)[rows], SCHEDULE, steps=4, iterations=ToTolerance(rtol=1e-2), record=True, solver=solver
        )
        for rows in (slice(None), slice(4, None))  # the last image is done before the others
    )
    torch.testing.assert_close(together.images[4:], alone.images, rtol=1e-10, atol=1e-10)
    assert torch.equal(together.iterations[:, 4:], alone.iterations)
    torch.testing.assert_close(together.deltas[:, 4:], alone.deltas)  # of a row that is done, its last one


@pytest.mark.parametrize("solver", [fixpoint.Picard(damping=0.9), fixpoint.Anderson(), fixpoint.Broyden()])
def test_any_solver_reaches_the_same_images(model: FPDM, solver: fixpoint.Solver) -> None:
    expected = sample_fpdm(model, noise(4, 4), SCHEDULE, steps=3, iterations=60).images
    until = ToTolerance(rtol=1e-9, max_iterations=80)
    samples = sample_fpdm(model, noise(4, 4), SCHEDULE, steps=3, iterations=until, solver=solver)
    torch.testing.assert_close(samples.images, expected, rtol=1e-6, atol=1e-6)
    assert int(samples.iterations.max()) < 40


def test_guidance_solves_both_halves_each_to_its_tolerance(model: FPDM) -> None:
    y = torch.tensor([0, 1, 2])
    samples = sample_fpdm(model, noise(3, 5), SCHEDULE, steps=3, iterations=ToTolerance(atol=1e-9), y=y, guidance=2.0)
    expected = sample_fpdm(model, noise(3, 5), SCHEDULE, steps=3, iterations=60, y=y, guidance=2.0)
    torch.testing.assert_close(samples.images, expected.images, rtol=1e-6, atol=1e-6)
    assert samples.iterations.shape == (3, 6)


def test_no_more_iterations_than_allowed(model: FPDM) -> None:
    options = {"steps": 2, "reuse": False, "solver": fixpoint.Picard()}
    samples = sample_fpdm(model, noise(3, 6), SCHEDULE, iterations=ToTolerance(atol=1e-12, max_iterations=4), **options)
    counted = sample_fpdm(model, noise(3, 6), SCHEDULE, iterations=4, **options)
    assert torch.equal(samples.iterations, counted.iterations)
    torch.testing.assert_close(samples.images, counted.images)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("mean", [2.5, 5.0])
def test_the_threshold_found_on_a_probe_batch_meets_the_budget_on_others(
    model: FPDM, per_sample: bool, mean: float
) -> None:
    until = adaptive_tolerance(model, noise(16, 7), SCHEDULE, budget=mean * 12, steps=12, per_sample=per_sample)
    assert until.rtol == 0
    assert until.per_sample == per_sample
    for seed in (7, 8):
        samples = sample_fpdm(model, noise(16, seed), SCHEDULE, steps=12, iterations=until)
        assert float(samples.iterations.double().mean(dim=1).sum()) == pytest.approx(mean * 12, rel=0.1)


def test_impossible_budgets_and_tolerances_are_refused(model: FPDM) -> None:
    with pytest.raises(ValueError, match="budget of 3 iterations cannot be met in 4 steps of 1 to 50 iterations"):
        adaptive_tolerance(model, noise(1, 0), SCHEDULE, budget=3, steps=4)
    with pytest.raises(ValueError, match=r"no threshold was found that spends 1\.5 iterations within 10%"):
        adaptive_tolerance(model, noise(1, 0), SCHEDULE, budget=1.5, steps=1)  # one image has whole numbers of them
    solved = FPDM(FPDMConfig(width=16, heads=2, sample_size=4)).double()
    solved.implicit_block.w2.weight.data.zero_()  # one iteration solves the layer, whatever the threshold
    with pytest.raises(ValueError, match="no threshold was found that spends 100 iterations within 10%"):
        adaptive_tolerance(solved, noise(2, 0), SCHEDULE, budget=100, steps=4)
    with pytest.raises(ValueError, match="needs atol or rtol"):
        ToTolerance(atol=-1.0, rtol=2.0)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        ToTolerance(atol=1.0, max_iterations=0)
