"""Conditioning that goes with the rows of a chain, and classifier-free guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, initial_noise, sample
from fixpoint_diffusion.denoisers import DiffusersDenoiser, Guided

LINEAR = NoiseSchedule.linear()
X_T = initial_noise(0, range(3), (2,), dtype=torch.float64)
SHIFTS = torch.tensor([0.1, -0.4, 0.8], dtype=torch.float64)
MATRICES = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def denoiser(x: Tensor, t: Tensor, shift: Tensor, matrix: Tensor) -> Tensor:
    return torch.tanh(torch.einsum("nij,nj->ni", matrix, x)) + shift[:, None]


def make_chain(samples: slice = slice(None), **options) -> DDIMChain:
    conditioning = {"shift": SHIFTS[samples], "matrix": MATRICES[samples]}
    return DDIMChain(denoiser, X_T[samples], LINEAR, steps=9, conditioning=conditioning, **options)


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("form", ["sequential", "chain", "one_step", "transition", "sample"])
def test_every_row_is_told_its_own_samples_conditioning(form: str, max_rows: int | None) -> None:
    """A batch gives what each sample gives alone, whatever rows a round is made of."""
    together = make_chain(max_rows=max_rows)
    z = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(chain: DDIMChain, z: Tensor) -> Tensor:
        if form == "sequential":
            return chain.sequential()
        if form == "chain":
            return chain(z)
        if form == "one_step":
            return chain.one_step(z)
        if form == "transition":
            backwards = torch.arange(len(z)).flip(0)
            return chain.transition(z[backwards, 4], backwards, torch.full((len(z),), 5))[backwards]
        return sample(chain, solver=fixpoint.Picard(), rtol=1e-12).trajectory

    alone = torch.cat([run(make_chain(slice(i, i + 1)), z[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(run(together, z), alone, rtol=1e-9, atol=1e-9)


def test_stochastic_chains_take_conditioning_too() -> None:
    conditioning = {"shift": SHIFTS, "matrix": MATRICES}
    chain = StochasticDDIMChain(denoiser, X_T, LINEAR, steps=9, conditioning=conditioning)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    torch.testing.assert_close(result.trajectory, chain.sequential(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [SHIFTS[:2], torch.tensor(1.0), [0.1, 0.2, 0.3]])
def test_conditioning_without_a_row_for_every_sample_is_refused(rows: object) -> None:
    with pytest.raises(ValueError, match="'shift' must be a tensor with one row for each of 3 samples"):
        DDIMChain(denoiser, X_T, LINEAR, steps=9, conditioning={"shift": rows})


def test_conditioning_goes_where_the_noise_is() -> None:
    chain = DDIMChain(denoiser, X_T.to("meta"), LINEAR, steps=9, conditioning={"shift": SHIFTS})
    assert chain.conditioning["shift"].device.type == "meta"


def test_network_is_told_the_rows_beside_what_is_the_same_for_all() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, shift: Tensor, scale: Tensor, power: float) -> Tensor:
            return scale[:, None] * x**power + shift[:, None]

    network = DiffusersDenoiser(Network(), inputs={"scale": torch.tensor([2.0]), "power": 3.0})
    found = network(X_T, torch.zeros(3, dtype=torch.int64), shift=SHIFTS)
    torch.testing.assert_close(found, 2 * X_T**3 + SHIFTS[:, None])


T = torch.tensor([5, 6, 7])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_is_that_of_diffusers(scale: float, rescale: float) -> None:
    """From two calls of the denoiser, one for each half, and diffusers' own function for the rescaling."""
    negative = {"negative_shift": -SHIFTS, "negative_matrix": MATRICES.mT}
    guided = Guided(denoiser, scale, rescale=rescale)(X_T, T, shift=SHIFTS, matrix=MATRICES, **negative)
    out = denoiser(X_T, T, SHIFTS, MATRICES)
    without = denoiser(X_T, T, -SHIFTS, MATRICES.mT)
    expected = rescale_noise_cfg(without + scale * (out - without), out, rescale)
    torch.testing.assert_close(guided, expected)


def test_inputs_without_a_negative_are_the_same_in_both_halves() -> None:
    calls: list[tuple[Tensor, ...]] = []

    def watched(x: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        calls.append((x, t, inputs["shift"], inputs["matrix"]))
        return denoiser(x, t, **inputs)

    Guided(watched, 2.0)(X_T, T, shift=SHIFTS, negative_shift=-SHIFTS, matrix=MATRICES)
    ((x, t, shift, matrix),) = calls
    assert torch.equal(x, torch.cat([X_T, X_T]))
    assert torch.equal(t, torch.cat([T, T]))
    assert torch.equal(shift, torch.cat([-SHIFTS, SHIFTS]))
    assert torch.equal(matrix, torch.cat([MATRICES, MATRICES]))


@pytest.mark.parametrize("inputs", [{"shift": SHIFTS}, {"negative_shift": SHIFTS}, {}])
def test_guidance_without_two_sides_is_refused(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="guidance needs inputs NAME and negative_NAME"):
        Guided(denoiser, 2.0)(X_T, T, **inputs)


@pytest.mark.parametrize("scale", [float("nan"), "3", [1.0, 3.0], None])
def test_a_scale_that_is_no_number_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number or a tensor with one for each sample"):
        Guided(denoiser, scale)


def test_guided_chain_equals_its_sequential_run_and_keeps_the_prediction_type() -> None:
    def predicts_v(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(x) * shift[:, None]

    predicts_v.prediction_type = "v_prediction"
    conditioning = {"shift": SHIFTS, "negative_shift": torch.zeros_like(SHIFTS)}
    chain = DDIMChain(Guided(predicts_v, 3.0), X_T, LINEAR, steps=9, conditioning=conditioning)
    assert chain.transitions.prediction_type == "v_prediction"
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    torch.testing.assert_close(result.trajectory, chain.sequential(), rtol=1e-9, atol=1e-9)
    plain = DDIMChain(predicts_v, X_T, LINEAR, steps=9, conditioning={"shift": 3 * SHIFTS})
    torch.testing.assert_close(chain.sequential(), plain.sequential())
