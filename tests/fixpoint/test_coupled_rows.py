"""What a problem is: vectors, rows that depend on one another, and the units of their parts."""

from __future__ import annotations

import warnings

import pytest
import torch

import fixpoint
from fixpoint import Anderson, Broyden, Picard, Status
from fixpoint.chains.certificate import Certificate
from fixpoint.chains.run import ChainRun

D = torch.float64


def averages(z):
    """Each entry the mean of its neighbours, between 0 and 1 at the ends: the solution is a straight line."""
    padded = torch.cat((torch.zeros_like(z[:1]), z, torch.ones_like(z[:1])))
    return (padded[:-2] + padded[2:]) / 2


def line(n):
    return torch.linspace(0, 1, n + 2, dtype=D)[1:-1]


def test_a_vector_is_one_problem():
    solution = fixpoint.solve(averages, torch.zeros(50, dtype=D), rtol=1e-8, max_evals=500)
    assert solution.converged.shape == ()
    assert solution.converged
    torch.testing.assert_close(solution.value, line(50), rtol=1e-4, atol=1e-6)


def test_a_vector_under_vmap_is_one_problem_for_each_instance():
    A = torch.tensor([[0.0, 0.2, 0.1], [0.1, 0.0, 0.3], [0.2, 0.1, 0.0]], dtype=D)
    batch = torch.tensor([[1.0, 0.0, 0.3], [1.0, 0.0, 0.4]], dtype=D)
    found = torch.vmap(
        lambda b: fixpoint.solve(lambda z, b: A @ z + b, torch.zeros(3, dtype=D), (b,), rtol=1e-10).value
    )
    expected = torch.linalg.solve(torch.eye(3, dtype=D) - A, batch.T).T
    torch.testing.assert_close(found(batch), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("z0", [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2), torch.zeros(2, 3))])
def test_leaves_of_one_and_two_dimensions_share_the_batch(z0):
    solution = fixpoint.solve(lambda s: (0.5 * s[0] + 1, 0.5 * s[1] + 1), z0)
    assert solution.converged.shape == (2,)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_rows_that_depend_on_one_another_are_solved_together_and_named(solver):
    with pytest.warns(UserWarning, match=r"f couples rows.*batch_dims=0") as caught:
        solution = fixpoint.solve(
            averages, torch.zeros(12, 1, dtype=D), solver=solver, rtol=1e-7, max_evals=3000, backward=None
        )
    assert len(caught) == 1
    residual = (averages(solution.value) - solution.value).abs()[:, 0]
    torch.testing.assert_close(solution.residual, residual, rtol=1e-9, atol=1e-15)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value[:, 0], line(12), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:f couples rows")
def test_a_coupled_row_never_passes_for_converged_where_it_is_not():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.rand(8, 8, generator=generator, dtype=D) * (torch.rand(8, 8, generator=generator) < 0.3)
        mix = 0.9 * mix / mix.sum(dim=1).max().clamp(min=1e-9)
        b = torch.randn(8, 3, generator=generator, dtype=D) * (torch.rand(8, 1, generator=generator) < 0.4)
        found = fixpoint.solve(
            lambda z, mix=mix, b=b: mix @ z + b, torch.zeros(8, 3, dtype=D), rtol=1e-6, on_failure="ignore"
        )
        fz = mix @ found.value + b
        good = (fz - found.value).norm(dim=1) <= 1.001e-6 * fz.norm(dim=1)
        assert good[found.converged].all(), seed


def test_independent_rows_are_never_taken_for_coupled(contraction):
    for seed in range(10):
        f = contraction(rows=7, dim=5, rho=0.95, seed=seed, squash=torch.tanh, dtype=torch.float32)
        fixpoint.solve(f, f.z0, rtol=1e-5, on_failure="ignore")  # a warning would be an error


UNITS = (torch.full((2, 3), 0.9e10, dtype=D), torch.zeros(2, 3, dtype=D))


def of_mixed_units(state, b=0.1):
    return 0.5 * state[0] + 5e9, 0.9 * state[1] + b


def test_leafwise_every_leaf_meets_the_tolerance():
    together = fixpoint.solve(of_mixed_units, UNITS, solver=Picard(), max_evals=300)
    assert (together.value[1] - 1).abs().max() > 0.05  # the small leaf is lost in the norm of the large one
    leafwise = fixpoint.solve(of_mixed_units, UNITS, solver=Picard(), norm="leafwise", max_evals=300)
    assert leafwise.converged.all()
    for leaf, image in zip(leafwise.value, of_mixed_units(leafwise.value), strict=True):
        assert ((image - leaf).norm(dim=1) <= 1e-4 * image.norm(dim=1)).all()
    torch.testing.assert_close(leafwise.residual, (0.1 * leafwise.value[1] - 0.1).norm(dim=1), rtol=1e-6, atol=0)


def test_leafwise_under_vmap():
    def small(b):
        options = {"solver": Picard(), "norm": "leafwise", "max_evals": 300, "rtol": 1e-6}
        return fixpoint.solve(of_mixed_units, UNITS, (b,), **options).value[1]

    found = torch.vmap(small)(torch.tensor([0.1, 0.2], dtype=D))
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 2.0], dtype=D), rtol=1e-4, atol=0)


class Problem(torch.nn.Module):
    """A module with ``z0`` and a method ``norm``, which says how far the first entry is."""

    def __init__(self):
        super().__init__()
        self.z0 = torch.zeros(2, 3, dtype=D)

    def norm(self, z):
        return z[:, 0].abs()

    def forward(self, z, b):
        return torch.tensor([0.1, 0.9, 0.9], dtype=D) * z + b


def test_a_norm_of_the_callers_decides():
    problem, b = Problem(), torch.ones(2, 3, dtype=D)
    own = fixpoint.solve(problem, None, (b,), solver=Picard(), rtol=1e-3)
    given = fixpoint.solve(problem.forward, problem.z0, (b,), solver=Picard(), rtol=1e-3, norm=problem.norm)
    assert own.nfev == given.nfev < 8
    euclidean = fixpoint.solve(problem.forward, problem.z0, (b,), solver=Picard(), rtol=1e-3)
    assert euclidean.nfev > 20
    torch.testing.assert_close(own.residual, (problem(own.value, b) - own.value)[:, 0].abs())


def test_a_norm_under_vmap():
    def value(b):
        return fixpoint.solve(Problem(), None, (b,), solver=Picard(), rtol=1e-9, max_evals=400).value

    batch = torch.stack([torch.ones(2, 3, dtype=D), torch.full((2, 3), 2.0, dtype=D)])
    torch.testing.assert_close(torch.vmap(value)(batch)[:, :, 0], batch[:, :, 0] / 0.9, rtol=1e-8, atol=0)


@pytest.mark.parametrize("norm", ["leaves", 3])
def test_a_norm_that_is_none_is_refused(norm):
    with pytest.raises(ValueError, match='norm must be a function of a state, "leafwise" or None'):
        fixpoint.solve(lambda z: 0.5 * z, torch.ones(1, 1), norm=norm)


def test_every_row_may_have_a_tolerance_of_its_own():
    rtol = torch.tensor([1e-2, 1e-4, 1e-6])
    solution = fixpoint.solve(
        lambda z: 0.9 * z + 1, torch.zeros(3, 2, dtype=D), solver=Picard(), rtol=rtol, max_evals=300
    )
    assert (solution.relative_residual <= rtol).all()
    alone = [
        fixpoint.solve(lambda z: 0.9 * z + 1, torch.zeros(1, 2, dtype=D), solver=Picard(), rtol=float(r), max_evals=300)
        for r in rtol
    ]
    assert solution.evals.tolist() == [one.nfev for one in alone]
    with pytest.raises(ValueError, match=r"atol must be a number or have the batch shape \(3,\), found shape \(2,\)"):
        fixpoint.solve(lambda z: 0.9 * z + 1, torch.zeros(3, 2), atol=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_a_row_that_tends_to_zero_is_done_when_nothing_is_left_of_it(solver, dtype):
    beta = torch.linspace(0.1, 0.55, 8, dtype=dtype)[:, None]
    solution = fixpoint.solve(lambda m, b: torch.tanh(b * m), torch.ones(8, 1, dtype=dtype), (beta,), solver=solver)
    assert solution.converged.all()
    assert (solution.value.abs() < 1e-17).all()


@pytest.mark.parametrize("start", [1e6, 1e10])
def test_a_far_start_is_no_excuse_for_a_loose_solution(start):
    solution = fixpoint.solve(lambda z: 0.5 * z + 0.5, torch.full((2, 3), start), solver=Picard(), rtol=1e-4)
    torch.testing.assert_close(solution.value, torch.ones(2, 3), rtol=1e-3, atol=0)


def test_seldom_checks_do_not_make_rows_stagnate(contraction):
    for seed in range(15):
        f = contraction(rows=24, dim=6, rho=0.95, seed=seed, squash=torch.tanh, dtype=torch.float32)
        options = {"rtol": 1e-6, "max_evals": 300, "on_failure": "ignore", "backward": None}
        often = fixpoint.solve(f, f.z0, **options)
        seldom = fixpoint.solve(f, f.z0, check_every=10, **options)
        assert not (often.converged & (seldom.status == Status.STAGNATED)).any(), seed


@pytest.mark.filterwarnings("ignore:f couples rows:UserWarning")
def test_the_adjoint_of_an_f_that_couples_rows_is_solved_too(normal):
    eye, signs = torch.eye(6, dtype=torch.float64), torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
    M = torch.diag(torch.linspace(0.0, 0.25, 6, dtype=torch.float64)) + 0.7 * (eye.roll(1, 0) + signs[:, None] / 6)
    b = normal(6, 3).requires_grad_()
    solution = fixpoint.solve(lambda z, b: M @ z + b, 0 * b.detach(), (b,), rtol=1e-10, max_evals=500, record=True)
    (found,) = torch.autograd.grad(solution.value.sum(), b)
    expected = torch.linalg.solve((eye - M).T, torch.ones(6, 3, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert solution.adjoint.residual.shape == (6,)
    assert solution.adjoint.trace.shape == (solution.adjoint.nfev, 6)
    assert solution.adjoint.converged.all()


@pytest.mark.filterwarnings("ignore:f couples rows")
def test_the_adjoint_of_a_root_whose_g_couples_rows_is_solved_too(normal):
    M = torch.eye(3, dtype=D) + 0.3 * normal(3, 3, seed=5)
    b = normal(3, 5).requires_grad_()
    solution = fixpoint.root(lambda x, b: M @ x + 0.1 * x**3 - b, torch.full((3, 5), 0.1, dtype=D), (b,), rtol=1e-8)
    weights = normal(3, 5, seed=1)
    (found,) = torch.autograd.grad(solution.value, b, weights)
    slope = torch.diag_embed(0.3 * solution.value.detach().T ** 2) + M  # of each column, which is alone
    expected = torch.linalg.solve(slope.mT, weights.T[..., None])[..., 0].T
    assert solution.converged.all()
    assert solution.adjoint.converged.all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _chain_with_steps(coupling, seed):
    """Causal rows with jumps, in which the second may depend on the first: an f that is evaluated whole."""
    generator = torch.Generator().manual_seed(seed)
    push = torch.randn(2, 60, 4, generator=generator, dtype=torch.float64)
    push[0] *= 2

    def f(z):
        before = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1)
        image = 0.9 * torch.floor(2 * before) / 2 + push
        return torch.stack((image[0], 0.5 * image[1] + coupling * before[0]))

    return f, torch.zeros_like(push)


@pytest.mark.parametrize("max_evals", [None, 20, 21, 22])
def test_a_coupled_chain_never_passes_for_converged_where_it_is_not(max_evals):
    seen = 0
    for seed in range(12):
        f, z0 = _chain_with_steps(0.5, seed)
        solver = fixpoint.CausalQuasiNewton(window=None if seed % 2 else 3)
        options = {"rtol": 1e-3, "backward": None, "on_failure": "ignore", "max_evals": max_evals or 1000}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution = fixpoint.solve(f, z0, solver=solver, **options)
        seen += any("couples rows" in str(each.message) for each in caught)
        image = f(solution.value)
        residual, scale = ((x.flatten(1).norm(dim=1)) for x in (image - solution.value, image))
        assert (residual <= 1.001e-3 * scale)[solution.converged].all(), seed
        if max_evals is None:
            assert solution.converged.all(), seed
            torch.testing.assert_close(solution.residual, residual)
    assert seen or max_evals


def test_independent_chains_that_end_at_different_certificates_are_not_taken_for_coupled():
    apart = 0
    for seed in range(12):
        f, z0 = _chain_with_steps(0.0, seed)
        solver = fixpoint.CausalQuasiNewton(window=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution = fixpoint.solve(f, z0, solver=solver, rtol=1e-3, backward=None, max_evals=1000)
        apart += bool(solution.evals[0] != solution.evals[1])
    assert apart


def _with_one_certificate_denied(monkeypatch):
    """The second chain is not believed at the first certificate of both."""
    judge, denied = Certificate.judge, []

    def judged(self, *args):
        findings = judge(self, *args)
        if len(self.rows) == 2 and not denied:
            denied.append(findings.residual)
            findings.passed[1], findings.first_wrong[1] = False, 30
        return findings

    monkeypatch.setattr(Certificate, "judge", judged)
    return denied


def test_no_step_is_made_after_the_last_look_at_chains_that_have_converged(monkeypatch):
    push = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0), dtype=D)

    def f(z):
        before = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1)
        return 0.9 * torch.tanh(before) + push

    z0, options = torch.zeros_like(push), {"rtol": 1e-2, "backward": None, "on_failure": "ignore"}
    solver = fixpoint.CausalQuasiNewton()
    free = fixpoint.solve(f, z0, solver=solver, **options)
    last = int(free.evals.max())  # of the certificate, where none is denied
    denied = _with_one_certificate_denied(monkeypatch)
    before = fixpoint.solve(f, z0, solver=solver, **options, max_evals=last)
    assert denied
    assert before.status.tolist() == [Status.CONVERGED, Status.MAX_EVALS]
    denied.clear()
    after = fixpoint.solve(f, z0, solver=solver, **options, max_evals=last + 1)
    assert denied
    assert after.status.tolist() == [Status.CONVERGED, Status.MAX_EVALS]
    # The first chain may depend on the second one. What it was last seen with is what is handed over.
    assert torch.equal(after.value, before.value)


@pytest.mark.filterwarnings("ignore:f couples rows")
def test_chains_that_depend_on_one_another_end_at_the_same_certificate(monkeypatch):
    f, z0 = _chain_with_steps(0.5, 0)
    run_of = ChainRun.__init__

    def together(self, *args):
        run_of(self, *args)
        self.together = True  # as an earlier certificate would have shown

    monkeypatch.setattr(ChainRun, "__init__", together)
    denied, active = _with_one_certificate_denied(monkeypatch), []
    solution = fixpoint.solve(
        f,
        z0,
        solver=fixpoint.CausalQuasiNewton(),
        rtol=1e-3,
        backward=None,
        max_evals=1000,
        callback=lambda progress: active.append(progress.active),
    )
    assert denied
    assert solution.converged.all()
    assert set(active[:-1]) == {2}
    assert active[-1] == 0
