"""Jacobian penalty, spectral radius and states on the way, against dense Jacobians, NumPy and plain iteration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import fixpoint
from fixpoint import IFT, JFB, Picard, Unroll

D = torch.float64


# Jacobian penalty


def test_the_penalty_is_an_unbiased_estimate_of_the_frobenius_norm_of_each_row(contraction):
    problem = contraction(rows=3, dim=4, squash=torch.tanh)
    z = problem(problem.z0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = fixpoint.jacobian_penalty(problem, z, probes=4000, generator=generator)
    jacobian = torch.autograd.functional.jacobian(lambda z: problem(z), z)
    blocks = torch.stack([jacobian[r, :, r] for r in range(3)])
    exact = blocks.square().sum(dim=(1, 2)) / 4
    # |J^T e|^2 has variance 2 |J J^T|_F^2 <= 2 |J|_F^4: five standard errors.
    torch.testing.assert_close(found, exact, rtol=5 * (2 / 4000) ** 0.5, atol=0)


def test_the_penalty_is_differentiable_in_parameters_and_the_point(linear_problem):
    A, b = linear_problem()
    z = torch.ones(3, 4, dtype=D, requires_grad=True)

    def penalty(A, b, z):
        f = lambda z: torch.tanh(z @ A.T + b)  # noqa: E731
        return fixpoint.jacobian_penalty(f, z, probes=2, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(penalty, (A, b, z))


def test_the_penalty_of_a_solution_trains_through_the_solve(cell_class, normal):
    cell, x = cell_class(), normal(3, 4)
    value = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,)).value
    held = fixpoint.jacobian_penalty(cell, value.detach(), (x,), generator=torch.Generator().manual_seed(2)).mean()
    free = fixpoint.jacobian_penalty(cell, value, (x,), generator=torch.Generator().manual_seed(2)).mean()
    assert torch.equal(held, free)
    (at_point,) = torch.autograd.grad(held, cell.W)
    (in_all,) = torch.autograd.grad(free, cell.W)
    assert not torch.allclose(at_point, in_all)


def test_the_penalty_uses_its_generator_keeps_the_batch_shape_and_follows_grad_mode(contraction):
    problem = contraction(rows=2, dim=4)
    state = {"a": torch.zeros(2, 3, dtype=D), "b": torch.zeros(2, 1, dtype=D)}

    def f(state):
        z = problem(torch.cat([state["a"], state["b"]], dim=1))
        return {"a": z[:, :3], "b": z[:, 3:]}

    before = torch.get_rng_state()
    nested = fixpoint.jacobian_penalty(f, state, generator=torch.Generator().manual_seed(3))
    flat = fixpoint.jacobian_penalty(problem, problem.z0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(nested, flat)
    assert nested.shape == (2,)
    assert fixpoint.jacobian_penalty(lambda z: 0.5 * z, torch.ones(2, 3), batch_dims=0).shape == ()
    w = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not fixpoint.jacobian_penalty(lambda z: w * z, torch.ones(2, 3)).requires_grad


def test_a_constant_map_has_neither_penalty_nor_radius():
    for f in (lambda z: torch.ones_like(z), lambda z: torch.ones_like(z).requires_grad_()):
        assert fixpoint.jacobian_penalty(f, torch.zeros(2, 3)).tolist() == [0, 0]
        assert fixpoint.spectral_radius(f, torch.zeros(2, 3)).tolist() == [0, 0]


# Spectral radius


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), symmetric=st.booleans())
def test_the_spectral_radius_of_each_row_is_numpys(seed, symmetric):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(3, 5, 5, generator=generator, dtype=D)
    W = W + W.mT if symmetric else W
    found = fixpoint.spectral_radius(
        lambda z: (W @ z[..., None]).squeeze(-1), torch.zeros(3, 5, dtype=D), steps=600, generator=generator
    )
    exact = np.abs(np.linalg.eigvals(W.numpy())).max(axis=1)
    # Close eigenvalues and a skew basis leave a factor of order one, spread over 300 steps.
    np.testing.assert_allclose(found.numpy(), exact, rtol=3e-2)


def test_the_spectral_radius_of_a_rotation_and_of_a_nilpotent_map():
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=D) * 0.7  # eigenvalues 0.7 exp(+-0.93i)
    assert fixpoint.spectral_radius(lambda z: z @ turn, torch.zeros(1, 2, dtype=D)).item() == pytest.approx(0.7)
    shift = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=D)
    assert fixpoint.spectral_radius(lambda z: z @ shift, torch.zeros(1, 2, dtype=D)).item() == 0


def test_the_spectral_radius_predicts_the_rate_of_plain_iteration(normal):
    W, b = normal(6, 6), normal(1, 6, seed=1)
    W = 1.2 * (W + W.T) / torch.linalg.matrix_norm(W + W.T, ord=2)
    f = lambda z: torch.tanh(z @ W + b)  # noqa: E731 - its Jacobian has real eigenvalues
    sol = fixpoint.solve(f, torch.zeros(1, 6, dtype=D), solver=Picard(), rtol=1e-13, max_evals=500, record=True)
    rate = float(sol.trace[-2, 0] / sol.trace[-8, 0]) ** (1 / 6)
    assert fixpoint.spectral_radius(f, sol.value).item() == pytest.approx(rate, rel=0.02)


# States on the way


@pytest.mark.parametrize("rule", [IFT(), JFB(), Unroll()], ids=repr)
def test_kept_states_are_those_of_the_iteration_with_the_gradient_of_one_application(normal, cell_class, rule):
    cell, x = cell_class(), normal(3, 4)
    options = {"solver": Picard(), "backward": rule, "keep_states": (2, 5, 10_000)}
    sol = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), **options)
    assert list(sol.states) == [2, 5]
    z = torch.zeros(3, 4, dtype=D)
    for nfev in range(1, 6):
        image = cell(z, x)
        if nfev in sol.states:
            torch.testing.assert_close(sol.states[nfev], image)
            for found, wanted in zip(
                torch.autograd.grad(sol.states[nfev].sum(), cell.W, retain_graph=True),
                torch.autograd.grad(image.sum(), cell.W),
                strict=True,
            ):
                torch.testing.assert_close(found, wanted)
        z = image.detach()


def test_kept_states_without_gradients_are_the_evaluated_states(contraction, counted):
    problem = contraction()
    f = counted(problem)
    seen = {}
    sol = fixpoint.solve(
        f, problem.z0, keep_states=[1, 3], callback=lambda progress: seen.update({progress.nfev: progress.value})
    )
    assert f.calls == sol.nfev
    assert torch.equal(sol.states[1], problem.z0)
    assert torch.equal(sol.states[3], seen[3])
    assert fixpoint.solve(problem).states == {}


def test_the_correction_loss_weighs_later_states_more():
    w = torch.tensor(0.5, dtype=D, requires_grad=True)
    z0 = torch.zeros(1, dtype=D)
    sol = fixpoint.solve(lambda z: w * z + 1, z0, solver=Picard(), keep_states=(3, 1, 2))
    loss = fixpoint.correction_loss(sol, torch.sum, decay=0.5)
    states = [0.0, 1.0, 1.5]  # f of them: 1, 1.5, 1.75; d/dw of f with the state held: the state
    assert loss.item() == pytest.approx(0.25 * 1 + 0.5 * 1.5 + 1.75)
    loss.backward()
    assert w.grad.item() == pytest.approx(0.25 * states[0] + 0.5 * states[1] + states[2])


def test_what_cannot_work_says_so():
    halve = lambda z: z / 2  # noqa: E731
    z0 = torch.ones(2, 3)
    for options in ({"check_every": 2}, {"depth": 3}):
        with pytest.raises(ValueError, match="keep_states needs"):
            fixpoint.solve(halve, z0, keep_states=(1,), **options)
    with pytest.raises(ValueError, match="found 0"):
        fixpoint.solve(halve, z0, keep_states=(0,))
    with pytest.raises(TypeError, match=r"found 1\.5"):
        fixpoint.FixedPointLayer(halve, keep_states=(1.5,))
    sol = fixpoint.solve(halve, z0)
    with pytest.raises(ValueError, match="empty"):
        fixpoint.correction_loss(sol, torch.sum)
    sol = fixpoint.solve(halve, z0, keep_states=(1,))
    with pytest.raises(ValueError, match="found 0"):
        fixpoint.correction_loss(sol, torch.sum, decay=0)
    with pytest.raises(ValueError, match=r"scalar tensor.*found shape \(2,\)"):
        fixpoint.correction_loss(sol, lambda z: z.square().mean(dim=1))
    with pytest.raises(ValueError, match=r"scalar tensor.*found float"):
        fixpoint.correction_loss(sol, lambda z: float(z.mean()))
    with pytest.raises(ValueError, match="found 0"):
        fixpoint.jacobian_penalty(halve, z0, probes=0)
    with pytest.raises(ValueError, match="found 1"):
        fixpoint.spectral_radius(halve, z0, steps=1)
    with pytest.raises(ValueError, match="shape"):
        fixpoint.spectral_radius(lambda z: z[:1], z0)


def test_in_inference_mode_a_jacobian_is_no_zero():
    A = torch.diag(torch.tensor([0.9, 0.1, -0.5]))
    with torch.inference_mode():
        inside = torch.diag(torch.tensor([0.9, 0.1, -0.5]))
        for matrix in (A, inside):
            radius = fixpoint.spectral_radius(lambda z, A: z @ A, torch.zeros(1, 3), (matrix,))
            torch.testing.assert_close(radius, torch.tensor([0.9]), rtol=1e-3, atol=0)
        penalty = fixpoint.jacobian_penalty(lambda z: z @ A, torch.zeros(1, 3), probes=500)
    torch.testing.assert_close(penalty, torch.tensor([1.07 / 3]), rtol=0.3, atol=0)


def test_the_penalty_of_rows_without_entries_is_zero():
    assert fixpoint.jacobian_penalty(lambda z: z, torch.zeros(2, 0)).tolist() == [0, 0]


W = 0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def attend(z, w=W):
    q = (z @ w).reshape(2, 5, 2, 4).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 5, 8)


def test_the_penalty_of_attention_can_be_trained():
    """PyTorch's fast kernels have no second derivative, which the penalty's gradient is."""
    w = torch.nn.Parameter(W.clone())
    z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    fixpoint.jacobian_penalty(lambda z: attend(z, w), z, probes=2).mean().backward()
    assert float(w.grad.abs().sum()) > 0


def test_a_penalty_of_attention_in_a_checkpoint_is_measured():
    """With the kernels of the checkpoint's own first run; others would save other tensors."""
    z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    measured = []
    for f in (attend, lambda z: torch.utils.checkpoint.checkpoint(attend, z, use_reentrant=False)):
        with torch.no_grad():
            measured.append(fixpoint.jacobian_penalty(f, z, probes=2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*measured)


def test_penalties_in_several_threads_leave_pytorchs_choice_of_kernels_as_it_was():
    z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))

    def work(_):
        for _ in range(100):
            fixpoint.jacobian_penalty(attend, z)

    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_helpers_name_arguments_of_another_kind():
    z = torch.zeros(2, 3)
    for helper in (fixpoint.jacobian_penalty, fixpoint.spectral_radius):
        with pytest.raises(TypeError, match=r"found a Tensor: write args=\(x,\)"):
            helper(lambda z, x: 0.5 * z + x, z, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"return_solution=True\), found a Tensor"):
        fixpoint.correction_loss(z, torch.mean)
