"""The triangular algebra of sweeps, against the recurrence written as a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fixpoint.chains.sweep import Secants, sweep


def random_case(width: int, memory: int, diagonal: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    defects = normal(2, width, 5)
    slopes = 0.3 + 0.8 * torch.rand(2, width, 5 if diagonal else 1, generator=generator, dtype=torch.float64)
    moved, images = normal(2, width, memory, 5), 0.3 * normal(2, width, memory, 5)
    return defects, slopes, Secants.fit(moved, images, slopes)


def by_loop(defects: torch.Tensor, slopes: torch.Tensor, secants: Secants | None) -> torch.Tensor:
    before, carried = torch.zeros_like(defects[:, 0]), []
    for k in range(defects.shape[1]):
        after = slopes[:, k] * before
        if secants is not None:
            coefficients = (secants.weights[:, k] * before[:, None]).sum(dim=2)
            after = after + (coefficients[..., None] * secants.images[:, k]).sum(dim=1)
        carried.append(after)
        before = after + defects[:, k]
    return torch.stack(carried, dim=1)


@settings(max_examples=25)
@given(width=st.integers(1, 100), memory=st.integers(1, 3), diagonal=st.booleans(), seed=st.integers(0, 1000))
def test_a_sweep_is_the_recurrence(width, memory, diagonal, seed):
    defects, slopes, secants = random_case(width, memory, diagonal, seed)
    for known in (secants, None):
        expected = by_loop(defects, slopes, known)
        assert_close(sweep(defects, slopes, known), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_changes_count_by_their_squares_and_older_ones_less():
    # In one direction the newest change saw the step treble it, and the one before, five times as long, leave it as it
    # was. Least squares of what is beyond the slope, with weights 1 and (5 / 10)^2; no third change was seen.
    unit = torch.tensor([0.6, 0.8], dtype=torch.float64)
    moved = torch.stack((unit, 5 * unit, 0 * unit))[None, None]
    images = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)[:, None] * moved
    secants = Secants.fit(moved, images, torch.full((1, 1, 1), 0.5, dtype=torch.float64))
    found = 0.5 * unit + (secants.weights[0, 0] @ unit) @ secants.images[0, 0]
    assert_close(found, (0.5 + (2.5 + 0.25 * 0.5) / (1.25 + 1e-3 * 1.25 / 3)) * unit)


@pytest.mark.parametrize("slope", [0.0, -0.7, -1e-9, 1e-3])
def test_slopes_at_and_below_zero(slope):
    defects, slopes, secants = random_case(70, 2, True)
    slopes[:, 5:9] = slope
    expected = by_loop(defects, slopes, secants)
    # A slope below 1e-4 counts as 1e-4 in what is handed on from step to step.
    assert_close(sweep(defects, slopes, secants), expected, rtol=1e-3, atol=1e-3)


def test_a_vanishing_product_of_slopes_leaves_the_range_of_no_number():
    defects, slopes, _ = random_case(400, 1, True)
    expected = by_loop(defects, 1e-3 * slopes, None)
    assert_close(sweep(defects, 1e-3 * slopes, None), expected)


def test_nothing_is_carried_past_what_is_exact():
    defects, slopes, secants = random_case(50, 2, True)
    defects[:, :20] = 0
    carried = sweep(defects, slopes, secants)
    assert (carried[:, :21] == 0).all()  # exactly: states whose inputs are exact must become exact
    assert (carried[:, 21] != 0).all()


def test_secants_reproduce_what_was_seen(monkeypatch):
    monkeypatch.setattr("fixpoint.chains.sweep._RIDGE", 1e-12)
    _, slopes, _ = random_case(3, 2, True)
    generator = torch.Generator().manual_seed(1)
    moved = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64)
    images = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64)
    secants = Secants.fit(moved, images, slopes)
    for seen in range(2):
        coefficients = (secants.weights * moved[:, :, seen, None]).sum(dim=3, keepdim=True)
        predicted = slopes * moved[:, :, seen] + (coefficients * secants.images).sum(dim=2)
        assert_close(predicted, images[:, :, seen], rtol=1e-6, atol=1e-8)


def test_what_did_not_move_or_is_not_finite_tells_nothing():
    moved, images = torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, 3)
    moved[0, 1], images[0, 1] = 1.0, torch.nan
    secants = Secants.fit(moved, images, torch.ones(1, 2, 1))
    assert (secants.images == 0).logical_or(secants.weights == 0).all()
    assert torch.isfinite(secants.images).all()
