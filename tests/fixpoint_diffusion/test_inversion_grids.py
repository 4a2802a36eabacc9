"""Long chains are inverted by asking the denoiser at some of their steps: against the same chain at all steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    ParallelInverse,
    SamplingChain,
    StochasticDDIMChain,
    Transitions,
    invert,
)
from fixpoint_diffusion.inversion.grids import step_grids
from fixpoint_diffusion.inversion.problem import Asked, InverseProblem
from fixpoint_diffusion.inversion.search import _GAIN, Search

SCHEDULE = NoiseSchedule.linear()
ALONE = ParallelInverse(second_try=None)


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that bends, row by row and entry by entry, and changes smoothly with t."""
    a = SCHEDULE.alphas_cumprod.to(x)[t].reshape(-1, *[1] * (x.ndim - 1))
    return (1 - a).sqrt() * x + 0.2 * torch.sin(2 * x)


def jumping(x: Tensor, t: Tensor) -> Tensor:
    """Another denoiser in each of two ranges of t, as of experts: not smooth in t."""
    return curved(x, t) + torch.where(t < 300, 0.3, 0.0).reshape(-1, *[1] * (x.ndim - 1)).to(x)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.6 - 0.8


def chain_of(x_0: Tensor, denoiser: object = curved, steps: int = 400) -> DDIMChain:
    return DDIMChain(denoiser, torch.zeros_like(x_0), SCHEDULE, steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tolerance", "rows"), [(1e-3, 1.0), (1e-6, 2.5)])
def test_a_long_chain_takes_fewer_rows_than_one_round_over_all_steps(tolerance: float, rows: float) -> None:
    x_0 = images(4, 5)
    chain = chain_of(x_0, steps=1000)
    inverse = invert(chain, x_0, method=ALONE, rtol=0, atol=tolerance)
    assert inverse.converged.all()
    assert (inverse.error <= tolerance).all()
    assert inverse.evals <= rows * x_0.shape[0] * chain.steps


@pytest.mark.parametrize("probes", [0, 8])
def test_samples_may_be_numbers(probes: int) -> None:
    x_0, method = images(3), ParallelInverse(second_try=None, probes=probes)
    inverse = invert(chain_of(x_0), x_0, method=method, rtol=1e-4)
    assert inverse.converged.all()
    column = invert(chain_of(x_0[:, None]), x_0[:, None], method=method, rtol=1e-4)
    torch.testing.assert_close(inverse.x_T[:, None], column.x_T)


def test_the_latents_are_those_of_a_search_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x_0 = images(3, 5)
    few = invert(chain_of(x_0), x_0, method=ALONE, rtol=0, atol=1e-7)
    monkeypatch.setattr("fixpoint_diffusion.inversion.problem.step_grids", lambda *_: [])
    every = invert(chain_of(x_0), x_0, method=ALONE, rtol=0, atol=1e-7)
    assert few.evals < every.evals
    torch.testing.assert_close(few.x_T, every.x_T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("denoiser", [curved, jumping])
def test_what_interpolation_misses_is_not_underestimated(denoiser: object) -> None:
    """By a share of the difference of two grids; where outputs jump, two grids do not agree there."""
    x_0 = images(3, 5)
    problem = InverseProblem(chain_of(x_0, denoiser), x_0)
    latents, samples = problem.guess(), torch.arange(3)
    exact = problem.images(latents, samples)
    assert len(problem.grids) == 2
    for grid in problem.grids:
        near, doubts, _ = problem.look(Asked(samples, latents, grid))[0]
        assert doubts is not None
        assert (near - exact).norm() <= doubts.norm() / (_GAIN if denoiser is curved else 0.5)
        assert (near - exact).norm() > 0


def test_a_denoiser_that_jumps_is_seen_and_inverted() -> None:
    x_0 = images(3, 5)
    inverse = invert(chain_of(x_0, jumping), x_0, method=ALONE, rtol=0, atol=1e-5)
    assert inverse.converged.all()
    assert (inverse.error <= 1e-5).all()


@pytest.mark.parametrize("probes", [0, 8])
def test_what_no_grid_shows_is_found_by_the_sampler(probes: int) -> None:
    """At one timestep between those of the grids: what they promised is not what finer ones are measured against."""
    x_0 = images(3, 5)
    timesteps = chain_of(x_0).timesteps
    shown = torch.cat([grid.steps for grid in step_grids(timesteps, x_0.device)])
    between = next(int(timesteps[k]) for k in range(330, 400) if k not in shown)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return curved(x, t) + torch.where(t == between, 3.0, 0.0).to(x)[:, None]

    chain, method = chain_of(x_0, denoiser), ParallelInverse(second_try=None, probes=probes)
    inverse = invert(chain, x_0, method=method, rtol=0, atol=1e-2)
    assert inverse.converged.all()
    assert (inverse.error > 1e-4).all()  # no more than was asked for
    assert inverse.rounds < 20
    assert chain.rounds - inverse.rounds <= 6 * chain.steps  # the sampler is not run again and again on one grid


def test_a_grid_that_will_not_do_is_passed_over() -> None:
    """Where outputs jump, twice as many steps do not help: no round has the rows of the next grid."""
    x_0 = images(1, 5)
    chain = chain_of(x_0, jumping)
    sizes = [len(grid.steps) for grid in step_grids(chain.timesteps, x_0.device)]
    method = ParallelInverse(second_try=None, probes=0)
    inverse = invert(chain, x_0, method=method, rtol=0, atol=1e-5)
    assert len(sizes) > 1
    assert {round.rows for round in inverse.history} == {sizes[0], chain.steps}


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    """They need different numbers of rounds."""
    x_0 = images(3, 5)
    x_0[0] /= 100
    together = invert(chain_of(x_0), x_0, method=ALONE, rtol=0, atol=1e-5)
    working = torch.stack([round_.predicted_error for round_ in together.history]).isfinite().sum(dim=0)
    assert len(working.unique()) > 1
    for i in range(3):
        alone = invert(chain_of(x_0[i : i + 1]), x_0[i : i + 1], method=ALONE, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.x_T[i : i + 1], alone.x_T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "probes", "scale"), [(20, 0, 1e-2), (20, 8, 1e-2), (20, 8, 1e-5), (400, 0, 1e-4), (400, 8, 1e-5)]
)
def test_nor_does_one_that_rests_before_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, steps: int, probes: int, scale: float
) -> None:
    """What was foretold is too good, so each seems to be done too early: with little to do, in its first round."""
    honest = Search._predict
    monkeypatch.setattr(Search, "_predict", lambda self, misses: honest(self, misses) / 30)
    x_0, method = images(2, 5), ParallelInverse(probes=probes, second_try=None)
    x_0[0] *= scale
    together = invert(chain_of(x_0, steps=steps), x_0, method=method, rtol=0, atol=1e-6)
    worked = torch.stack([each.predicted_error for each in together.history]).isfinite()
    alone = invert(chain_of(x_0[:1], steps=steps), x_0[:1], method=method, rtol=0, atol=1e-6)
    assert not worked[: alone.rounds, 0].all()
    assert int(worked[:, 0].sum()) == alone.rounds
    torch.testing.assert_close(together.x_T[:1], alone.x_T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("probes", [0, 8])
def test_a_first_round_that_promised_too_much_is_of_no_consequence(
    monkeypatch: pytest.MonkeyPatch, probes: int
) -> None:
    """It rests on the prior alone. A sample that seemed to be done by it goes on as others do, also after a rest."""
    x_0, method = images(2, 5), ParallelInverse(probes=probes, second_try=None)
    x_0[0] /= 100
    plain = invert(chain_of(x_0[:1], steps=20), x_0[:1], method=method, rtol=0, atol=1e-6)
    honest = Search._predict
    monkeypatch.setattr(Search, "_predict", lambda self, misses: honest(self, misses) * (1 if self.history else 1e-5))
    together = invert(chain_of(x_0, steps=20), x_0, method=method, rtol=0, atol=1e-6)
    alone = invert(chain_of(x_0[:1], steps=20), x_0[:1], method=method, rtol=0, atol=1e-6)
    worked = torch.stack([each.predicted_error for each in together.history]).isfinite()[:, 0]
    assert worked.tolist()[:2] == [True, False]
    assert alone.rounds == int(worked.sum()) == plain.rounds  # no round at the same latents
    torch.testing.assert_close(together.x_T[:1], alone.x_T, rtol=0, atol=1e-12)


def test_a_sample_does_not_wait_for_the_others_to_go_on_to_a_finer_grid() -> None:
    """It takes as many rounds in a batch as alone, and has no round of rest before its end."""
    x_0, method = images(3, 5), ParallelInverse(probes=0, second_try=None)
    sizes = [len(grid.steps) for grid in InverseProblem(chain_of(x_0, steps=1000), x_0).grids]
    together = invert(chain_of(x_0, steps=1000), x_0, method=method, rtol=0, atol=1e-7)
    assert any(each.rows == 2 * sizes[0] + sizes[1] for each in together.history)  # a round with samples on two grids
    worked = torch.stack([each.predicted_error for each in together.history]).isfinite()
    for i in range(3):
        alone = invert(chain_of(x_0[i : i + 1], steps=1000), x_0[i : i + 1], method=method, rtol=0, atol=1e-7)
        assert worked[: alone.rounds, i].all()
        assert not worked[alone.rounds :, i].any()


def test_steps_with_noise_and_short_chains_are_evaluated_each() -> None:
    x_0 = images(2, 5)
    chain = StochasticDDIMChain(curved, torch.zeros_like(x_0), SCHEDULE, steps=500, eta=0.5, seed=0)
    assert InverseProblem(chain, x_0).grids == []
    assert InverseProblem(chain_of(x_0, steps=100), x_0).grids == []


def test_a_chain_that_asks_twice_at_a_timestep_is_inverted_at_all_steps() -> None:
    x_0, timesteps = images(2, 5), torch.arange(199, -1, -1)
    timesteps[-1] = timesteps[-2]
    levels = torch.linspace(0.001, 0.999, 201, dtype=torch.float64)
    transitions = Transitions.between(timesteps, levels[:-1], levels[1:])
    chain = SamplingChain(lambda x, t: 0.5 * x + 0.05 * torch.sin(x), torch.zeros_like(x_0), transitions)
    assert invert(chain, x_0, method=ALONE).converged.all()


@given(st.sets(st.integers(0, 3000), min_size=130, max_size=600))
def test_grids_are_nested_and_exact_for_cubic_outputs(timesteps: set[int]) -> None:
    falling = torch.tensor(sorted(timesteps, reverse=True))
    grids = step_grids(falling, torch.device("cpu"))
    time = falling.double() / falling.max()
    outputs = torch.stack((time, time**3 - time**2), dim=1)[None]
    for number, grid in enumerate(grids):
        assert grid.steps[0] == 0
        assert grid.steps[-1] == len(falling) - 1
        assert bool((grid.steps.diff() > 0).all())
        fine, coarse = grid.fill(outputs[:, grid.steps])
        torch.testing.assert_close(fine, outputs, rtol=0, atol=1e-9)
        torch.testing.assert_close(coarse, outputs, rtol=0, atol=1e-9)
        if number:
            assert bool(torch.isin(grids[number - 1].steps, grid.steps).all())
