"""The budget of rows that a denoiser's cost suggests; costs are made up, no test measures time."""

import torch

from fixpoint_diffusion import DDIMChain, NoiseSchedule
from fixpoint_diffusion.sampling.batch_cost import BatchCost, usual_rows


def chain(samples: int = 2, steps: int = 50, denoiser=lambda x, t: 0.5 * x) -> DDIMChain:
    return DDIMChain(denoiser, torch.ones(samples, 3), NoiseSchedule.linear(), steps=steps)


def test_costs_between_and_beyond_what_was_measured():
    cost = BatchCost((1, 11, 101), (1.0, 2.0, 4.0))
    assert cost(1) == 1.0
    assert cost(6) == 1.5
    assert cost(56) == 3.0
    assert abs(cost(202) - 8.0) < 1e-12


def test_a_saturated_device_is_given_the_ordinary_sampler():
    proportional = BatchCost((1, 1000), (0.001, 1.0))
    for samples in (1, 16):
        assert proportional.best_rows(samples, 1000) == samples


def test_a_device_with_room_is_filled():
    flat = BatchCost((1, 1000), (1.0, 1.0))
    assert flat.best_rows(1, 1000) == 1000
    assert flat.best_rows(2, 100) == 200


def test_between_the_two_the_budget_is_between():
    cost = BatchCost((1, 4, 16, 64, 256), (0.0045, 0.006, 0.012, 0.03, 0.1))
    assert 1 < cost.best_rows(1, 1000) < 1000


def test_measuring_calls_the_denoiser_and_counts_it():
    sizes = []

    def denoiser(x, t):
        sizes.append(len(x))
        return 0.5 * x

    problem = chain(denoiser=denoiser)
    cost = BatchCost.measure(problem)
    assert sizes.pop(1) == problem.check_evals
    assert (problem.rounds, problem.evals) == (len(sizes), sum(sizes))
    assert sizes[:2] == [2, 2]  # a warm-up first
    assert tuple(sizes[1:]) == cost.rows
    assert all(seconds > 0 for seconds in cost.seconds)
    assert max(cost.rows) <= 100


def test_measuring_backs_off_where_memory_ends():
    def denoiser(x, t):
        if len(x) > 8:
            raise torch.OutOfMemoryError("none left")
        return 0.5 * x

    cost = BatchCost.measure(chain(samples=2, steps=1000, denoiser=denoiser))
    assert cost.limit == max(cost.rows) == 8
    assert BatchCost((2, 2000), (1.0, 1.0)).best_rows(2, 1000) == 2000
    assert BatchCost((2, 2000), (1.0, 1.0), limit=8).best_rows(2, 1000) == 8


def test_the_usual_budget_follows_device_and_size_alone():
    assert usual_rows(chain(samples=2)) == 128
    wider = DDIMChain(lambda x, t: x, torch.ones(2, 3, 16, 16), NoiseSchedule.linear(), steps=5)
    assert usual_rows(wider) == 2**15 // (3 * 16 * 16)
    meta = DDIMChain(lambda x, t: x, torch.empty(2, 3, device="meta"), NoiseSchedule.linear(), steps=5)
    assert usual_rows(meta) == 2**22 // 3
    # Rows that are decoded to larger images: the entries count before the rows are bounded.
    assert usual_rows(chain(samples=2), enlarged=100) == 2**15 // 300
    large = DDIMChain(lambda x, t: x, torch.ones(5, 3, 256, 256), NoiseSchedule.linear(), steps=5)
    assert usual_rows(large) == 5
