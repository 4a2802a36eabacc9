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
    sample,
)
from fixpoint_diffusion.denoisers.embedded import EMBEDDED_MODELS, embedded_folder
from fixpoint_diffusion.processes import Transitions
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


def test_gaussian_data_take_three_rounds():
    """One finds the latents, by some of the steps; one finds them right; one evaluates the steps in between."""
    chain = DDIMChain(ExactDenoiser(correlated_prior()), initial_noise(0, range(3), (3,)).double(), SCHEDULE, steps=200)
    solution = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-6, backward=None)
    assert solution.nfev == 3
    assert chain.evals < 1.6 * 3 * 200
    assert_close(solution.value, chain.sequential(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_moved_by_rounding_is_no_gain(seed):
    """From the prior's path, in float32: the second round is for the steps that were interpolated, and the last."""

    def denoiser(x, t):
        a = SCHEDULE.alphas_cumprod.to(x)[t][:, None]
        return (1 - a).sqrt() * (x - a.sqrt() * 2) / (a * 0.25 + 1 - a)

    denoiser.prior = GaussianPrior(mean=torch.tensor([2.0]), variances=torch.tensor([0.25]))
    chain = DDIMChain(denoiser, initial_noise(seed, range(4), (16,)), SCHEDULE, steps=1000)
    result = sample(chain, solver=fixpoint.CausalQuasiNewton(window=1000))
    assert result.rounds == 2
    assert result.evals == 4 * (126 + 999)
    assert_close(result.images, chain.sequential()[:, -1], rtol=1e-4, atol=1e-4)


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
    # In batches, read once, the same.
    streamed = GaussianPrior.of((batch for batch in images.split(100)), shrinkage=0.0)
    assert_close((streamed.mean, streamed.variances), (prior.mean, prior.variances), rtol=1e-8, atol=1e-10)


def waves(*shape: int) -> torch.Tensor:
    """The basis as a matrix, by SciPy's cosine transform of every unit image."""
    from scipy.fft import dctn

    units = torch.eye(torch.Size(shape).numel()).reshape(-1, *shape).double()
    axes = tuple(range(2, 1 + len(shape)))
    return torch.from_numpy(dctn(units.numpy(), type=2, norm="ortho", axes=axes)).flatten(1)


def test_large_images_have_variances_of_a_cosine_transform():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 20, 24, generator=generator, dtype=torch.float64).cumsum(dim=3)
    images[:, 1] += images[:, 0]
    prior = GaussianPrior.of(images, shrinkage=0.0)
    channels, rows, columns = prior.basis
    assert [len(factor) for factor in prior.basis] == [3, 20, 24]
    assert_close(torch.kron(rows, columns), waves(1, 20, 24))
    turned = images.flatten(1) @ torch.kron(channels, torch.kron(rows, columns))
    assert_close(prior.variances, turned.var(dim=0), rtol=1e-8, atol=1e-10)
    bytes_kept = sum(x.numel() for x in (prior.mean, prior.variances, *prior.basis)) * 8
    assert bytes_kept < 4 * images[0].numel() * 8


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_slopes_in_a_transform_are_those_of_the_exact_denoiser(eta):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(60, 2, 23, 24, generator=generator, dtype=torch.float64).cumsum(dim=2) / 4
    prior = GaussianPrior.of(images, shrinkage=0.1)
    basis = torch.kron(prior.basis[0], torch.kron(*prior.basis[1:]))

    def denoiser(x, t):
        a = SCHEDULE.alphas_cumprod[t][:, None]
        offset = (x.flatten(1) - a.sqrt() * prior.mean) @ basis
        return ((1 - a).sqrt() * offset / (a * prior.variances + 1 - a) @ basis.T).reshape(x.shape)

    denoiser.prior = prior
    x_T = initial_noise(0, range(2), (2, 23, 24), dtype=torch.float64)
    chain = StochasticDDIMChain(denoiser, x_T, SCHEDULE, steps=20, eta=eta)
    assert_close(chain.guess, chain.sequential(), rtol=1e-6, atol=1e-8)
    solution = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-5, backward=None)
    assert solution.nfev == 2
    assert_close(solution.value, chain.sequential(), rtol=1e-4, atol=1e-5)


def test_the_path_takes_no_more_memory_than_the_latents():
    from fixpoint.memory import LiveBytes

    x_T = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chain = DDIMChain(lambda x, t: x, x_T, SCHEDULE, steps=200)
    with LiveBytes() as live:
        path = GaussianPrior.isotropic().path(x_T, chain.transitions)
    assert live.peak < 1.5 * path.numel() * path.element_size()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mean": torch.zeros(3), "variances": torch.tensor([1.0, -1.0, 1.0])}, "variances must be at least 0"),
        ({"mean": torch.tensor([0.0, torch.nan]), "variances": torch.ones(2)}, "mean must be finite"),
        ({"mean": torch.zeros(3), "variances": torch.ones(2)}, "must have one size"),
        ({"mean": torch.zeros(2), "variances": torch.ones(2), "basis": 2 * torch.eye(2)}, "orthogonal"),
        ({"mean": torch.zeros(2), "variances": torch.ones(2), "basis": torch.ones(2, 3)}, "orthogonal"),
        ({"weight": torch.zeros(2)}, "no 'mean'"),
    ],
)
def test_files_that_hold_no_prior_are_refused(tmp_path, tensors, message):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=rf"prior\.safetensors.*{message}"):
        GaussianPrior.load(tmp_path)


def test_a_damaged_file_and_a_prior_of_another_size_are_refused(tmp_path):
    (tmp_path / "prior.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        GaussianPrior.load(tmp_path)
    chain = DDIMChain(lambda x, t: x, torch.ones(1, 4), SCHEDULE, steps=5)
    with pytest.raises(ValueError, match="one of 3 entries, the images have 4"):
        correlated_prior().path(chain.x_T, chain.transitions)


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="at least two images, got 1"):
        GaussianPrior.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
        GaussianPrior.of(torch.zeros(4, 3), shrinkage=2)
    with pytest.raises(ValueError, match="at least two images, got 0"):
        GaussianPrior.of(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="must be finite"):
        GaussianPrior.of(torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 6\), \(3, 4\)"):
        GaussianPrior.of([torch.zeros(4, 2, 6), torch.zeros(4, 3, 4)])


def test_saved_beside_a_model_it_is_found_again(tmp_path):
    prior = correlated_prior()
    prior.save(tmp_path)
    loaded = GaussianPrior.load(tmp_path)
    assert_close((loaded.mean, loaded.variances, loaded.basis), (prior.mean, prior.variances, prior.basis))
    wide = GaussianPrior.of(torch.randn(4, 2, 30, 20, generator=torch.Generator().manual_seed(0)))
    wide.save(tmp_path)
    loaded = GaussianPrior.load(tmp_path)
    assert_close((loaded.variances, loaded.basis), (wide.variances, wide.basis))
    GaussianPrior.isotropic(0.5).save(tmp_path)
    assert GaussianPrior.load(tmp_path).basis is None
    assert GaussianPrior.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_bring_the_prior_of_their_training_images(name):
    from fixpoint_diffusion.training.data import split_held_out

    denoiser = load_denoiser(embedded_folder(name))
    expected = GaussianPrior.of(split_held_out(load_digits())[0].images)
    assert_close(denoiser.prior.mean, expected.mean)
    assert_close(denoiser.prior.variances, expected.variances)


@pytest.mark.parametrize("shape", [(50_000,), (2, 30_000)])
def test_long_vectors_and_signals_need_no_square_matrix(shape: tuple[int, ...]) -> None:
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))  # a matrix would take 20 GB, or 7 GB
    prior = GaussianPrior.of(images, shrinkage=0.0)
    assert prior.basis is None
    assert_close(prior.mean, images.double().flatten(1).mean(dim=0))
    assert_close(prior.variances, images.double().flatten(1).var(dim=0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 20)])
def test_a_priors_own_denoiser_takes_the_priors_path(prediction_type: str, shape: tuple[int, ...]) -> None:
    images = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0)) / 3 + 0.2
    prior = GaussianPrior.of(images)
    schedule = NoiseSchedule.linear()
    transitions = Transitions.of(schedule, schedule.timesteps(6), prediction_type=prediction_type)
    x_T = initial_noise(0, range(2), shape, dtype=torch.float64)
    x, latents = x_T, []
    for k in range(6):
        x = transitions.step(x, prior.denoise(x, transitions, k), k)
        latents.append(x)
    torch.testing.assert_close(prior.path(x_T, transitions), torch.stack(latents, dim=1))
