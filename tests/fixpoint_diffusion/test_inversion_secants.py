"""Jacobians learnt while a chain is inverted: against dense linear algebra, known Jacobians and rounds without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fixpoint_diffusion import DDIMChain, NoiseSchedule, ParallelInverse, invert
from fixpoint_diffusion.inversion.problem import Asked, InverseProblem, Probes
from fixpoint_diffusion.inversion.secants import _DAMPING, BlockSecants, Memory, StepModels

SCHEDULE = NoiseSchedule.linear()
MIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 6
EVERYONE = torch.arange(3)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mixing(x: Tensor, t: Tensor) -> Tensor:
    """Linear, not symmetric, and smooth in t."""
    return 0.5 * x + (t / 1000)[:, None] * (x @ MIX)


def bending(x: Tensor, t: Tensor) -> Tensor:
    return mixing(x, t) + 0.2 * torch.sin(2 * x)


def chain_of(x_0: Tensor, steps: int, denoiser: object = mixing) -> DDIMChain:
    return DDIMChain(denoiser, torch.zeros_like(x_0), SCHEDULE, steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("fitted", [False, True])
def test_the_inverse_is_that_of_dense_matrices(fitted: bool) -> None:
    models = StepModels(1 + 0.1 * random(4, 6), samples=3, secants=2, memory=Memory(3, 0.5, 1.0), fitted=fitted)
    for scale in (1.0, 0.3):
        models.learn(EVERYONE, random(3, 4, 2, 6).flip(0), scale * random(3, 4, 2, 6))
    inverse = models.inverse()
    for k in range(4):
        dense = torch.stack([inverse.forward(k, unit.expand(3, 6)) for unit in torch.eye(6).double()], dim=2)
        left, values, right = torch.linalg.svd(dense)
        passed = values**2 / (values**2 + _DAMPING**2)
        expected = right.mT @ torch.diag_embed((1 - (1 - passed) ** 2) / values) @ left.mT
        x = random(3, 6)
        torch.testing.assert_close(inverse(k, x), (expected @ x[:, :, None])[:, :, 0])


@pytest.mark.parametrize("fitted", [False, True])
def test_what_was_shown_is_known(fitted: bool) -> None:
    """A Jacobian whose columns were all shown, and one of which nothing was, or nothing finite."""
    jacobian, slopes = torch.eye(6).double() + MIX, torch.full((1, 6), 0.8).double()
    models = StepModels(slopes, samples=3, secants=6, memory=Memory(3, 0.1), fitted=fitted)
    shown = torch.eye(6).double().expand(2, 1, 6, 6).clone()
    seen = shown @ jacobian.mT
    seen[1] = torch.nan
    models.learn(torch.tensor([0, 2]), shown, seen)
    x = random(3, 6)
    got = models.inverse().forward(0, x)
    torch.testing.assert_close(got[0], jacobian @ x[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(got[1:], slopes * x[1:])


def test_what_was_shown_fades_with_the_way_since() -> None:
    """A round later, of a direction that it did not show: known as before; where latents have gone far, forgotten."""
    slopes, shown = torch.full((1, 6), 0.8).double(), torch.eye(6).double()[None, None]
    off = []
    for length in (0.0, 0.03, 0.3, 3.0):
        models = StepModels(slopes, samples=1, secants=6, memory=Memory(3, 0.5, near=0.03))
        models.learn(EVERYONE[:1], shown, 2 * 0.8 * shown)
        later = torch.zeros_like(shown)
        later[..., -1, 5] = length * 6**0.5  # a latent that has moved so far, RMS, in the last direction
        models.learn(EVERYONE[:1], later, later)
        unit = torch.eye(6).double()[:1]
        off.append(float((models.inverse().forward(0, unit) - 1.6 * unit).norm()) / 0.8)
    # A secant is damped by the ridge over its weight, which has halved with the next round, and again after 0.03.
    ridges = [0.001 / (0.5 / (1 + (length / 0.03) ** 2)) for length in (0.0, 0.03, 0.3, 3.0)]
    assert off == pytest.approx([ridge / (1 + ridge) for ridge in ridges])
    assert off[-1] > 0.9


def test_a_way_to_another_grid_counts() -> None:
    """What was seen before it is compared with nothing, but it lies as far back."""
    x_0 = random(3, 6)
    problem = InverseProblem(chain_of(x_0, 10), x_0)
    found = []
    for forgotten in (False, True):
        secants, latents = BlockSecants(problem, 6), problem.guess()
        for move in (0.0, 0.5):
            latents = latents + move
            (seen,) = problem.look(Asked(EVERYONE, latents, probes=secants.probes(EVERYONE)))
            secants.observe(latents, seen.images, EVERYONE, seen.responses)
            if forgotten:
                secants.forget_move(EVERYONE)
        found.append(secants)
    torch.testing.assert_close(found[1]._late._way, found[0]._late._way)
    assert float(found[0]._late._way.max()) == pytest.approx(0.5)


def test_one_round_is_a_newton_step_on_a_linear_chain() -> None:
    """All steps are probed, in as many directions as there are."""
    x_0 = random(3, 6) / 2
    problem = InverseProblem(chain_of(x_0, 10), x_0)
    secants, latents = BlockSecants(problem, 8), problem.guess()
    (seen,) = problem.look(Asked(EVERYONE, latents, probes=secants.probes(EVERYONE)))
    misses = seen.images - problem.after(latents, EVERYONE)
    secants.observe(latents, seen.images, EVERYONE, seen.responses)
    moved = latents + secants.correction(misses)
    left = problem.images(moved, EVERYONE) - problem.after(moved, EVERYONE)
    assert left.norm() < 0.05 * misses.norm()
    # Errors that the sampler will make are foretold too.
    error = problem.chain.sequential(x_T=latents[:, 0], samples=EVERYONE)[:, -1] - x_0
    torch.testing.assert_close(secants.error(misses[None])[0], error.square().mean(dim=1).sqrt(), rtol=0.05, atol=0)


def test_probes_save_rounds_and_their_rows_are_counted() -> None:
    x_0 = random(3, 6) / 2
    found = {}
    for probes in (0, 8):
        method = ParallelInverse(probes=probes, second_try=None)
        found[probes] = invert(chain_of(x_0, 20, bending), x_0, method=method, rtol=0, atol=1e-6)
        assert found[probes].converged.all()
    assert found[8].rounds < found[0].rounds
    # Ten steps are probed, in no more directions than there are, and later all but the first along the drift.
    assert found[0].history[0].rows == 3 * 20
    assert found[8].history[0].rows == 3 * (20 + 10 * 6)
    assert found[8].history[1].rows == 3 * (20 + 10 * 6 + 19)


def test_a_long_chain_is_probed_at_few_steps() -> None:
    x_0 = random(3, 6) / 2
    inverse = invert(chain_of(x_0, 300, bending), x_0, rtol=0, atol=1e-4)
    # Asked at 65 steps; probed at half of them, of which eight are the last of the chain.
    assert inverse.history[0].rows == 3 * (65 + 8 * 6)
    assert inverse.history[1].rows == 3 * (65 + 8 * 6 + 32)


def test_a_round_with_probes_is_one_round() -> None:
    x_0 = random(3, 6)
    chain = chain_of(x_0, 20)
    problem = InverseProblem(chain, x_0)
    chain.reset_counters()
    problem.look(Asked(EVERYONE, problem.guess(), probes=BlockSecants(problem, 2).probes(EVERYONE)))
    assert (chain.rounds, chain.evals) == (1, 3 * (20 + 10 * 2))


@pytest.mark.parametrize("first", [0, 260])
def test_probes_of_some_steps_tell_of_those_between(first: int) -> None:
    """Random ones, the same for all samples and steps; and another for each."""
    x_0 = random(3, 6)
    problem = InverseProblem(chain_of(x_0, 300, bending), x_0)
    latents, half = problem.guess(), problem.grids[0].half
    turning = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None]
    own = turning.cos() * random(3, 1, 1, 6) + turning.sin() * random(3, 2, 1, 6)[:, 1:]
    changes = random(1, 2, 1, 6).expand(3, -1, -1, -1) if first else own
    changes = 0.01 * changes
    all_steps, some = Probes(first, torch.arange(first, 300), changes), Probes(first, half[half >= first], changes)
    assert len(some.steps) < len(all_steps.steps) / 4
    exact = problem.look(Asked(EVERYONE, latents, probes=[all_steps]))[0].responses[0]
    near = problem.look(Asked(EVERYONE, latents, problem.grids[0], [some]))[0].responses[0]
    wide = changes.transpose(1, 2).expand_as(exact)
    beside = latents.clone()
    beside[:, first:] += wide[:, :, -1]
    torch.testing.assert_close(
        exact[:, :, -1], (problem.images(beside, EVERYONE) - problem.images(latents, EVERYONE))[:, first:]
    )
    unknown = exact - wide  # what a step does beyond passing a change on
    assert (near - exact).norm() < 0.05 * unknown.norm()


def test_one_probe_looks_along_the_drift() -> None:
    """Then the error of x_0 is foretold, though of most directions nothing was shown."""
    size = 40
    weights = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 12

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x + (t / 1000)[:, None] * (x @ weights)

    x_0 = random(3, size) / 2
    problem = InverseProblem(chain_of(x_0, 20, denoiser), x_0)
    latents = problem.guess()
    found = problem.chain.sequential(x_T=latents[:, 0], samples=EVERYONE)[:, -1] - x_0
    actual = found.square().mean(dim=1).sqrt()
    secants, off = BlockSecants(problem, 1), []
    for _ in range(6):
        (seen,) = problem.look(Asked(EVERYONE, latents, probes=secants.probes(EVERYONE)))
        secants.observe(latents, seen.images, EVERYONE, seen.responses)
        misses = seen.images - problem.after(latents, EVERYONE)
        off.append(float((secants.error(misses[None])[0] / actual - 1).abs().max()))
    assert off[-1] < 0.05 < off[0]


def test_samples_at_rest_forget_nothing() -> None:
    x_0 = random(3, 6)
    problem = InverseProblem(chain_of(x_0, 10), x_0)
    secants, latents, misses = BlockSecants(problem, 6), problem.guess(), random(3, 10, 6)

    def look(samples: Tensor) -> Tensor:
        (seen,) = problem.look(Asked(samples, latents[samples], probes=secants.probes(samples)))
        images = torch.zeros_like(latents)
        images[samples] = seen.images
        secants.observe(latents, images, samples, seen.responses)
        return secants.correction(misses)

    before = look(EVERYONE)
    for _ in range(4):
        after = look(torch.tensor([1]))
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])


def test_fewer_than_no_probes_are_refused() -> None:
    with pytest.raises(ValueError, match="probes must be at least 0, got -1"):
        ParallelInverse(probes=-1)


def test_what_probes_do_not_get_there_goes_on_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # Corrections that lead nowhere: the phase with probes ends, and the solver's own rounds do the rest.
    monkeypatch.setattr(BlockSecants, "correction", lambda self, misses: torch.zeros_like(misses))
    chain = DDIMChain(lambda x, t: torch.tanh(x), torch.zeros(2, 5), NoiseSchedule.linear(), steps=12)
    inverse = invert(chain, torch.linspace(-0.5, 0.5, 10).reshape(2, 5), method=ParallelInverse(second_try=None))
    assert bool(inverse.converged.all())
    assert inverse.rounds > 6


def test_a_sample_that_probes_bring_no_further_goes_on_without_them_while_others_are_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not wait for them, and costs no rows of probes any more."""
    share = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)[:, None, None]
    correction = BlockSecants.correction
    monkeypatch.setattr(BlockSecants, "correction", lambda self, misses: share * correction(self, misses))
    x_0, steps = random(3, 6) / 2, 12
    method = ParallelInverse(second_try=None)
    inverse = invert(chain_of(x_0, steps, bending), x_0, method=method, rtol=0, atol=1e-6)
    assert inverse.converged.all()
    worked = torch.stack([torch.isfinite(each.predicted_error) for each in inverse.history])
    assert worked[: worked[:, 0].sum(), 0].all()
    # All are probed at first; then all but that one, in as many directions.
    probes = 10 * 6 + steps - 1
    assert inverse.history[1].rows == 3 * (steps + probes)
    assert inverse.history[8].rows == 3 * steps + 2 * probes


def test_what_probes_have_shown_counts_no_more_for_a_sample_that_is_not_probed_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What follows from it is no number here; the solver's rounds do without."""
    monkeypatch.setattr(BlockSecants, "error", lambda self, misses: torch.full_like(misses[:, :, 0, 0], torch.inf))
    x_0 = random(3, 6) / 2
    inverse = invert(chain_of(x_0, 12, bending), x_0, method=ParallelInverse(second_try=None), rtol=0, atol=1e-6)
    assert inverse.converged.all()
    assert inverse.history[-1].rows <= 3 * 12  # none was probed in the end


@pytest.mark.parametrize("astray", [3.0, torch.nan])
def test_what_probes_lead_astray_goes_on_from_the_best_so_far(monkeypatch: pytest.MonkeyPatch, astray: float) -> None:
    correction, calls = BlockSecants.correction, list[int]()

    def led(self: BlockSecants, misses: Tensor) -> Tensor:
        calls.append(0)
        return correction(self, misses) if len(calls) < 3 else torch.full_like(misses, astray)

    monkeypatch.setattr(BlockSecants, "correction", led)
    x_0 = random(3, 6) / 2
    inverse = invert(chain_of(x_0, 12, bending), x_0, method=ParallelInverse(second_try=None), rtol=0, atol=1e-9)
    assert inverse.converged.all()
    torch.testing.assert_close(inverse.history[len(calls) + 1].x_T, inverse.history[2].x_T)


def test_groups_of_samples_are_seen_in_one_round_as_each_alone() -> None:
    """Two on a grid with probes, of which one looks along each sample's own drift, and one at all steps without."""
    x_0 = random(3, 6)
    chain = chain_of(x_0, 300, bending)
    problem = InverseProblem(chain, x_0)
    latents, grid = problem.guess(), problem.grids[0]
    own = Probes(0, grid.half, 0.01 * random(2, 1, 1, 6))
    probes = [*BlockSecants(problem, 2).probes(EVERYONE[:2]), own]
    groups = Asked(EVERYONE[:2], latents[:2], grid, probes), Asked(EVERYONE[2:], latents[2:])
    chain.reset_counters()
    together = problem.look(*groups)
    assert (chain.rounds, chain.evals) == (1, 2 * (65 + 8 * 2 + len(grid.half)) + 300)
    for i, share in enumerate(zip(*(each.split([1, 1]) for each in probes), strict=True)):
        (alone,) = problem.look(Asked(EVERYONE[i : i + 1], latents[i : i + 1], grid, share))
        torch.testing.assert_close(together[0].images[i : i + 1], alone.images)
        for one, other in zip(together[0].responses, alone.responses, strict=True):
            torch.testing.assert_close(one[i : i + 1], other)
    torch.testing.assert_close(together[1].images, problem.images(latents[2:], EVERYONE[2:]))
