"""sample(): what it costs, what it reports, where it starts and how it stops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    StochasticDDIMChain,
    deq_ddim_settings,
    initial_noise,
    sample,
)

LINEAR = NoiseSchedule.linear()


class Watched:
    """A denoiser that keeps the rows it was asked about."""

    def __init__(self, denoiser) -> None:
        self.denoiser = denoiser
        self.calls: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(x.clone())
        return self.denoiser(x, t)


def jagged(x: Tensor, t: Tensor) -> Tensor:
    """So rough that no latent settles before it must."""
    return torch.sin(40 * x)


def make_chain(denoiser, samples: int = 2, steps: int = 12, **options) -> DDIMChain:
    x_T = options.pop("x_T", initial_noise(0, range(samples), (3,), dtype=torch.float64))
    return DDIMChain(denoiser, x_T, LINEAR, steps=steps, **options)


def test_latents_that_have_settled_cost_no_denoiser_rows() -> None:
    """Row k's input is exact after k rounds: T rows in the first round, one less in each round after it."""
    chain = make_chain(Watched(jagged))
    result = sample(chain, solver=fixpoint.Picard(), rtol=0.0, on_failure="ignore")
    rows = [len(x) for x in chain.denoiser.calls]
    assert rows.pop(1) == chain.check_evals
    assert rows == [2 * rows for rows in range(12, 0, -1)]
    assert (result.rounds, result.evals) == (12, 2 * 12 * 13 // 2)
    # 40^12 times its rounding is what this denoiser can make of a difference.
    torch.testing.assert_close(result.trajectory, chain.sequential(), rtol=1e-4, atol=1e-4)


def test_saving_rows_changes_no_result(mixture) -> None:
    chain = make_chain(mixture(LINEAR), samples=3, steps=20)
    result = sample(chain, solver=fixpoint.Anderson(), rtol=1e-6, max_evals=60)
    plain = fixpoint.solve(chain, rtol=1e-6, max_evals=60)
    torch.testing.assert_close(result.trajectory, plain.value, rtol=1e-9, atol=1e-9)
    assert torch.equal(result.solution.evals, plain.evals)


def test_finished_samples_cost_no_denoiser_rows(mixture) -> None:
    """The sample far away has a constant denoiser and is done at once; nobody asks about it again."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 100, torch.zeros_like(x), mixture(LINEAR)(x, t))

    watched = Watched(denoiser)
    x_T = torch.tensor([[1e6, 1e6, 1e6], [0.5, -1.0, 0.3]], dtype=torch.float64)
    result = sample(make_chain(watched, x_T=x_T, steps=30), solver=fixpoint.Picard(), rtol=1e-9)
    assert len(watched.calls.pop(1)) == 3  # the check of the denoiser
    done_at = int(result.solution.evals[0])
    assert done_at < int(result.solution.evals[1])
    assert all(bool((x[:, 0] < 100).all()) for x in watched.calls[done_at:])


def test_a_denoiser_may_reuse_the_memory_of_its_output() -> None:
    """As captured graphs do: what a call returned is overwritten by the next call."""
    buffer = torch.empty(100, 3, dtype=torch.float64)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x, out=buffer[: len(x)])

    result = sample(make_chain(denoiser), solver=fixpoint.Picard(), rtol=1e-12)
    expected = make_chain(lambda x, t: torch.tanh(x)).sequential()
    torch.testing.assert_close(result.trajectory, expected, rtol=1e-9, atol=1e-9)


def test_result_counts_this_run_alone(mixture) -> None:
    chain = make_chain(mixture(LINEAR))
    chain.sequential()
    result = sample(chain)
    assert result.rounds == chain.rounds - 12
    assert result.evals == chain.evals - 24
    assert torch.equal(result.images, result.trajectory[:, -1])
    assert result.trajectory.shape == (2, 12, 3)


def test_default_limit_lets_picard_finish_and_see_it() -> None:
    for steps in (1, 2, 12):
        result = sample(make_chain(jagged, steps=steps), solver=fixpoint.Picard(), rtol=1e-12)
        assert bool(result.solution.converged.all())
        assert result.rounds == steps


def test_sampling_builds_no_graph() -> None:
    network = torch.nn.Linear(3, 3, dtype=torch.float64)
    assert not sample(make_chain(lambda x, t: 0.1 * network(x))).images.requires_grad


@pytest.mark.parametrize("solver", [fixpoint.Anderson(), fixpoint.CausalQuasiNewton()], ids=["anderson", "causal"])
@pytest.mark.parametrize("init", ["prior", "x_T", "zeros", "sequential"])
def test_every_start_leads_to_the_same_images(mixture, init: str, solver: fixpoint.Solver) -> None:
    chain = make_chain(mixture(LINEAR))
    expected = chain.sequential()
    start = expected if init == "sequential" else init
    result = sample(chain, solver=solver, init=start, rtol=1e-10, max_evals=100)
    torch.testing.assert_close(result.trajectory, expected, rtol=1e-8, atol=1e-8)
    if init == "sequential":
        assert result.rounds == 1


def test_starts_are_what_their_names_say(mixture) -> None:
    seen: dict[str, Tensor] = {}
    for init in ("x_T", "zeros"):
        chain = make_chain(Watched(mixture(LINEAR)), samples=1)
        sample(chain, init=init, max_evals=1, on_failure="ignore")
        seen[init] = chain.denoiser.calls[0]
    assert torch.equal(seen["x_T"], chain.x_T.expand(12, 3))
    assert torch.equal(seen["zeros"], torch.cat([chain.x_T, torch.zeros(11, 3, dtype=torch.float64)]))


def test_starts_that_make_no_sense_are_refused(mixture) -> None:
    chain = make_chain(mixture(LINEAR))
    with pytest.raises(ValueError, match="init must be 'prior', 'x_T', 'zeros' or a tensor"):
        sample(chain, init="noise")
    with pytest.raises(ValueError, match=r"state has shape .* \(2, 12, 3\), got \(2, 11, 3\)"):
        sample(chain, init=torch.zeros(2, 11, 3, dtype=torch.float64))


def test_callback_sees_every_evaluation_and_can_stop_the_run(mixture) -> None:
    seen: list[int] = []

    def stop_at_three(progress: fixpoint.Progress) -> bool:
        seen.append(progress.nfev)
        return progress.nfev == 3

    result = sample(make_chain(mixture(LINEAR)), callback=stop_at_three, rtol=0.0, on_failure="ignore")
    assert seen == [1, 2, 3]
    assert result.solution.nfev == 3


def test_progress_bar_is_shown_only_when_asked(mixture, capsys: pytest.CaptureFixture[str]) -> None:
    sample(make_chain(mixture(LINEAR)))
    assert capsys.readouterr().err == ""
    sample(make_chain(mixture(LINEAR)), progress=True)
    assert "sampling" in capsys.readouterr().err


def test_samples_that_do_not_converge_are_reported_as_asked() -> None:
    chain = make_chain(jagged)
    with pytest.warns(fixpoint.ConvergenceWarning, match="2 of 2 rows did not converge in 3"):
        sample(chain, max_evals=3)
    with pytest.raises(fixpoint.ConvergenceError):
        sample(chain, max_evals=3, on_failure="raise")


def test_trace_is_recorded_when_asked(mixture) -> None:
    result = sample(make_chain(mixture(LINEAR)), record=True)
    assert result.solution.trace is not None
    assert result.solution.trace.shape == (result.solution.nfev, 2)


def test_one_sample_that_breaks_spoils_no_other(mixture) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 100, torch.full_like(x, torch.nan), mixture(LINEAR)(x, t))

    x_T = torch.tensor([[1e6, 1e6, 1e6], [0.5, -1.0, 0.3]], dtype=torch.float64)
    result = sample(make_chain(denoiser, x_T=x_T), solver=fixpoint.Picard(), on_failure="ignore", rtol=1e-10)
    assert result.solution.status[0] == fixpoint.Status.NON_FINITE
    expected = make_chain(mixture(LINEAR), x_T=x_T[1:]).sequential()
    torch.testing.assert_close(result.trajectory[1:], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_settings_of_deq_ddim_are_those_of_its_appendix(mixture, eta: float) -> None:
    x_T = initial_noise(0, range(2), (3,), dtype=torch.float64)
    chain = make_chain(mixture(LINEAR)) if eta == 0 else StochasticDDIMChain(mixture(LINEAR), x_T, LINEAR, steps=12)
    paper, code = (deq_ddim_settings(chain, reading) for reading in ("paper", "released-code"))
    assert paper == {"solver": fixpoint.Anderson(memory=5), "rtol": 1e-3, "max_evals": 50 if eta else 15}
    assert code["solver"] == fixpoint.Blockwise(fixpoint.Anderson(memory=5, ridge=1e-3), blocks=12)
    for settings in (paper, code):
        images = sample(chain, **settings, on_failure="ignore").images
        torch.testing.assert_close(images, chain.sequential()[:, -1], rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="reading must be 'paper' or 'released-code'"):
        deq_ddim_settings(chain, "both")
