"""The Gaussian prior, against the denoiser that is exact for it."""

import pytest
import torch
from torch.testing import assert_close

import fixpoint
from fixpoint_diffusion import (
    DDIMChain,
    GaussianPrior,
    NoiseSchedule,
    StochasticDDIMChain,
    initial_noise,
    load_denoiser,
)
from fixpoint_diffusion.denoisers.embedded import embedded_folder
from fixpoint_diffusion.training.data import load_digits

SCHEDULE = NoiseSchedule.linear()


def correlated_prior() -> GaussianPrior:
    images = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixing = torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.3, 0.1], [0.0, 0.0, 0.6]], dtype=torch.float64)
    return GaussianPrior.of(images @ mixing + torch.tensor([0.5, -1.0, 0.2]), shrinkage=0.0)


class ExactDenoiser:
    """Predicts the noise in data of ``N(mean, covariance)`` by the formula of Gaussian conditioning."""

    def __init__(self, prior: GaussianPrior) -> None:
        self.prior = prior
        self.mean = prior.mean
        self.covariance = prior.basis @ torch.diag(prior.variances) @ prior.basis.T

    def __call__(self, x, t):
        a = SCHEDULE.alphas_cumprod[t][:, None, None]
        spread = a * self.covariance + (1 - a) * torch.eye(3, dtype=torch.float64)
        offset = x - a[:, 0].sqrt() * self.mean
        return (1 - a[:, 0]).sqrt() * torch.linalg.solve(spread, offset[..., None])[..., 0]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_slopes_and_path_are_those_of_the_exact_denoiser(eta):
    prior = correlated_prior()
    x_T = initial_noise(0, range(3), (3,), dtype=torch.float64)
    chain = StochasticDDIMChain(ExactDenoiser(prior), x_T, SCHEDULE, steps=30, eta=eta)
    sequential = chain.sequential()
    assert_close(chain.guess, sequential, rtol=1e-5, atol=1e-6)
    step = torch.tensor([11])
    one = torch.zeros(1, dtype=torch.int64)
    jacobian = torch.autograd.functional.jacobian(lambda x: chain.transition(x[None], one, step)[0], sequential[0, 10])
    assert_close(jacobian, prior.basis @ torch.diag(chain.slopes[11]) @ prior.basis.T)


def test_gaussian_data_take_two_rounds():
    chain = DDIMChain(ExactDenoiser(correlated_prior()), initial_noise(0, range(3), (3,)).double(), SCHEDULE, steps=200)
    solution = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-6, backward=None)
    assert solution.nfev == 2
    assert_close(solution.value, chain.sequential(), rtol=1e-5, atol=1e-6)


def test_slopes_at_both_ends_of_a_schedule_are_finite():
    schedule = NoiseSchedule.linear().zero_terminal_snr()
    chain = DDIMChain(
        lambda x, t: x, torch.ones(1, 4), schedule, steps=20, spacing="linspace", prediction_type="v_prediction"
    )
    assert chain.transitions.alphas[0] == 0
    assert torch.isfinite(chain.slopes).all()
    assert torch.isfinite(chain.guess).all()


def test_statistics_of_images():
    images = load_digits().images
    flat = images.flatten(1).double()
    prior = GaussianPrior.of(images, shrinkage=0.0)
    assert_close(prior.basis @ torch.diag(prior.variances) @ prior.basis.T, torch.cov(flat.T), rtol=1e-8, atol=1e-10)
    assert_close(prior.mean, flat.mean(dim=0))
    shrunk = GaussianPrior.of(images, shrinkage=1.0)
    assert_close(shrunk.variances, prior.variances.mean().expand(64))
    large = torch.randn(5, 1, 65, 65, generator=torch.Generator().manual_seed(0))
    wide = GaussianPrior.of(large, shrinkage=0.0)
    assert wide.basis is None
    assert_close(wide.variances, large.flatten(1).double().var(dim=0))


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        GaussianPrior.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
        GaussianPrior.of(torch.zeros(4, 3), shrinkage=2)


def test_saved_beside_a_model_it_is_found_again(tmp_path):
    prior = correlated_prior()
    prior.save(tmp_path)
    loaded = GaussianPrior.load(tmp_path)
    assert_close((loaded.mean, loaded.variances, loaded.basis), (prior.mean, prior.variances, prior.basis))
    GaussianPrior.isotropic(0.5).save(tmp_path)
    assert GaussianPrior.load(tmp_path).basis is None
    assert GaussianPrior.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["ddpm-digits", "fpdm-digits"])
def test_embedded_models_bring_the_prior_of_their_training_images(name):
    from fixpoint_diffusion.training.data import split_held_out

    denoiser = load_denoiser(embedded_folder(name))
    expected = GaussianPrior.of(split_held_out(load_digits())[0].images)
    assert_close(denoiser.prior.mean, expected.mean)
    assert_close(denoiser.prior.variances, expected.variances)
