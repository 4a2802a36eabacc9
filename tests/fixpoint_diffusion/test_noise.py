"""Noise as a function of (seed, sample, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fixpoint_diffusion import initial_noise, step_noise
from fixpoint_diffusion.processes import noise

indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**64 - 1), samples=indices, steps=indices)
def test_noise_does_not_depend_on_what_else_is_drawn(seed: int, samples: list[int], steps: list[int]) -> None:
    together = step_noise(seed, samples, steps, (2, 3))
    for b, sample in enumerate(samples):
        assert torch.equal(together[b, 0], step_noise(seed, [sample], steps[:1], (2, 3))[0, 0])
        assert torch.equal(initial_noise(seed, samples, (3,))[b], initial_noise(seed, [sample], (3,))[0])


def test_noise_is_standard_normal() -> None:
    draws = step_noise(3, range(20), range(50), (101,), dtype=torch.float64).flatten()
    n = len(draws)
    assert stats.kstest(draws.numpy(), "norm").statistic < 2.2 / np.sqrt(n)  # exceeded once in 8000 times by chance
    assert abs(float(draws.mean())) < 5 / np.sqrt(n)
    assert abs(float(draws.var()) - 1) < 5 * np.sqrt(2 / n)


def test_streams_of_seeds_samples_steps_and_starts_are_uncorrelated() -> None:
    n = 20_000
    streams = torch.stack(
        [
            *step_noise(0, [0, 1], [0, 1], (n,), dtype=torch.float64).flatten(0, 1),
            *step_noise(1, [0], [0], (n,), dtype=torch.float64)[0],
            *initial_noise(0, [0, 1], (n,), dtype=torch.float64),
        ]
    )
    off_diagonal = torch.corrcoef(streams) - torch.eye(len(streams), dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 5 / np.sqrt(n)


def test_halves_of_one_draw_are_uncorrelated_in_size() -> None:
    """Box-Muller pairs share a radius; their squares must be independent all the same."""
    n = 20_000
    first, second = step_noise(0, [0], [0], (2 * n,), dtype=torch.float64)[0, 0].square().chunk(2)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / np.sqrt(n)


def test_numbers_are_pinned_so_that_a_seed_means_the_same_in_every_version() -> None:
    bits = np.random.Philox(key=[7, 5], counter=[0, 0, 0, 3]).random_raw(4)
    uniform = [((int(word) >> 11) + 1) / 2**53 for word in bits]
    expected = [np.sqrt(-2 * np.log(uniform[i])) * np.cos(2 * np.pi * uniform[2 + i]) for i in range(2)]
    found = step_noise(7, [5], [3], (2, 2), dtype=torch.float64)[0, 0, 0]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.tolist() == pytest.approx(PINNED, rel=1e-12)


PINNED = [-0.7751750595699157, -0.3245720740537559]


def test_global_random_states_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[2]
    first = initial_noise(0, [0], (4,))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[2]
    torch.manual_seed(1)
    assert torch.equal(first, initial_noise(0, [0], (4,)))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 8, 8)])
def test_shape_and_dtype_are_as_asked(shape: tuple[int, ...]) -> None:
    noise = step_noise(0, range(2), range(5), shape, dtype=torch.float16)
    assert noise.shape == (2, 5, *shape)
    assert noise.dtype == torch.float16
    assert initial_noise(0, range(2), shape).shape == (2, *shape)


def test_indices_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="seed must be from 0"):
        initial_noise(-1, [0], (2,))
    with pytest.raises(ValueError, match="sample must be from 0"):
        initial_noise(0, [-1], (2,))
    with pytest.raises(ValueError, match="step must be from 0"):
        step_noise(0, [0], [2**64 - 1], (2,))


WORDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))


@settings(max_examples=50)
@given(seed=WORDS, streams=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), count=st.integers(1, 40))
def test_words_made_on_a_device_are_those_of_numpys_generator(seed, streams, count) -> None:
    made = noise._from_torch(seed, streams, count, torch.device("cpu")).numpy().view(np.uint64)
    for row, (sample, step) in zip(made, streams, strict=True):
        key, counter = np.array([seed, sample], dtype=np.uint64), np.array([0, 0, 0, step], dtype=np.uint64)
        np.testing.assert_array_equal(row, np.random.Philox(key=key, counter=counter).random_raw(count))


def test_parts_do_not_change_the_numbers(monkeypatch) -> None:
    whole = step_noise(4, [3, 9], range(5), (7,), dtype=torch.float64)
    monkeypatch.setattr(noise, "_PART", 21)  # three streams at a time, of ten
    assert torch.equal(step_noise(4, [3, 9], range(5), (7,), dtype=torch.float64), whole)


def test_noise_takes_about_the_memory_of_its_result(monkeypatch) -> None:
    from fixpoint.memory import LiveBytes

    monkeypatch.setattr(noise, "_PART", 2**12)
    with LiveBytes() as live:
        made = step_noise(0, range(4), range(64), (4, 16, 16))
    assert live.peak < 1.5 * made.numel() * made.element_size()
