"""CausalQuasiNewton: exact after T rounds at the latest, honest about its error, and frugal with evaluations."""

import pytest
import torch
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence, Status
from fixpoint.chains import sweep
from fixpoint.engine.layout import Layout
from tests.fixpoint.chains import gru, pendulum, relative_errors, solve


def logistic(steps: int = 50) -> Recurrence:
    start = torch.tensor([[0.2], [0.7]], dtype=torch.float64)
    return Recurrence(lambda x: 3.9 * x * (1 - x), start, steps=steps)


def lorenz(steps: int = 300) -> Recurrence:
    def step(x):
        a, b, c = x.unbind(dim=1)
        return x + 0.01 * torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), dim=1)

    return Recurrence(step, torch.ones(1, 3, dtype=torch.float64), steps=steps)


@pytest.mark.parametrize("solver", [CausalQuasiNewton(memory=m, window=w) for m in (1, 3) for w in (None, 25)])
@pytest.mark.parametrize("problem", [gru(), pendulum()], ids=["gru", "pendulum"])
def test_equals_the_sequential_run(problem, solver):
    solution = solve(problem, solver)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-6
    assert solution.nfev < problem.steps


def test_takes_few_rounds_where_steps_are_smooth():
    assert solve(pendulum()).nfev <= 15  # for 400 steps
    assert solve(gru(steps=400)).nfev <= 20


@pytest.mark.parametrize("problem", [logistic(), gru(steps=30)], ids=["logistic", "gru"])
def test_exact_after_as_many_rounds_as_steps_whatever_the_tolerance(problem):
    solution = solve(problem, rtol=0.0)
    assert solution.converged.all()
    assert solution.nfev <= problem.steps
    # Up to what the size of a batch changes in the rounding of a product.
    assert_close(solution.value, problem.sequential(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("slope", [-3.0, 0.0, 50.0])
def test_wrong_slopes_cost_rounds_and_nothing_else(slope):
    problem = gru(steps=40)
    problem.slopes = torch.full((40,), slope, dtype=torch.float64)
    solution = solve(problem)
    assert solution.converged.all()
    assert solution.nfev <= 40
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-6


def test_wild_predictions_are_taken_back():
    # Wrong models throw later states of this chain so far out that their images are not finite.
    problem = lorenz()
    solution = solve(problem, rtol=1e-9)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 1e-5


@pytest.mark.parametrize(("window", "rounds"), [(None, 2), (10, 12)])
def test_exact_slopes_take_two_rounds_a_window(window, rounds):
    # What was remembered of the steps that a window has left says nothing of those that it comes to.
    slopes = torch.linspace(0.5, 1.1, 60, dtype=torch.float64)
    inputs = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = slopes[None, :, None].expand_as(inputs)
    chain = Recurrence(lambda x, s, u: s * x + u, inputs[:, 0], inputs=(spread, inputs), slopes=slopes)
    solution = solve(chain, CausalQuasiNewton(window=window), rtol=1e-9)
    assert solution.nfev <= rounds
    assert_close(solution.value, chain.sequential())


def test_slopes_in_a_basis():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    slopes = torch.rand(30, 4, generator=generator, dtype=torch.float64)
    maps = basis @ torch.diag_embed(slopes) @ basis.T
    start = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    pushed = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    steps = maps.expand(2, 30, 4, 4)
    chain = Recurrence(lambda x, a, u: (a @ x[..., None])[..., 0] + u, start, inputs=(steps, pushed), slopes=slopes)
    chain.basis = basis
    solution = solve(chain, rtol=1e-9)
    assert solution.nfev == 2
    assert_close(solution.value, chain.sequential())
    for window in (7,):
        assert_close(solve(chain, CausalQuasiNewton(window=window), rtol=1e-9).value, chain.sequential())


def test_any_strictly_causal_map_is_served():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 20, generator=generator, dtype=torch.float64).tril(-1) / 5
    push = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64)
    calls = []

    def f(z):  # each row depends on all earlier ones
        calls.append(z)
        return torch.tanh(weight @ z) + push

    solution = solve(f, z0=torch.zeros_like(push))
    row, expected = torch.zeros_like(push), torch.zeros_like(push)
    for k in range(20):
        row = torch.tanh(weight[k] @ expected) + push[:, k]
        expected[:, k] = row
    assert solution.converged.all()
    assert len(calls) == solution.nfev <= 20
    assert len({float(z.sum()) for z in calls}) == len(calls)  # what f was given stays as it was
    assert_close(solution.value, expected, rtol=1e-5, atol=1e-5)
    for batch_dims, z0 in ((0, torch.zeros_like(push[0])), (2, torch.zeros_like(push)[None])):
        shaped = solve(
            lambda z: torch.tanh(weight @ z) + (push[0] if z.ndim == 2 else push), z0=z0, batch_dims=batch_dims
        )
        assert shaped.converged.all()
        assert_close(shaped.value.reshape(-1, 20, 3), expected[: shaped.value.numel() // 60], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), CausalQuasiNewton(window=20)], ids=["all", "window"])
def test_a_row_alone_is_what_it_is_in_a_batch(solver):
    problem = gru()
    together = solve(problem, solver)
    for row in range(3):
        one = Recurrence(problem.step, problem.start[row : row + 1], inputs=(problem.inputs[0][row : row + 1],))
        alone = solve(one, solver)
        assert alone.nfev == int(together.evals[row])
        assert_close(alone.value[0], together.value[row])


def test_a_row_that_is_lost_harms_no_other():
    problem = gru(steps=40)
    poisoned = problem.inputs[0].clone()
    poisoned[1, 17] = torch.nan
    problem.inputs = (poisoned,)
    solution = solve(problem, on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert solution.predicted_error.isinf().tolist() == [False, True, False]
    assert solution.residual.isnan().all()  # nothing was measured
    expected = problem.sequential()
    assert_close(solution.value[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    assert_close(solution.value[1, :17], expected[1, :17], rtol=1e-5, atol=1e-5)  # what came before is kept


def test_predicted_errors_hold_on_many_chains():
    """Linear, mixture-like and expanding chains: the last state is as near as was asked, or nearer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rtol, samples, steps, dim = 1e-3, 60, 60, 4
    noise = 0.3 * normal(samples, steps, dim)
    tilt = normal(samples, 1, dim, dim).expand(-1, steps, -1, -1) / dim**0.5
    centres = normal(samples, 1, 5, dim).expand(-1, steps, -1, -1)

    def linear(x, u, a):
        return x + 0.1 * (a @ x[..., None])[..., 0] + u

    def expanding(x, u, a):  # errors grow more than tenfold
        return x + 0.15 * torch.tanh(2 * (a @ x[..., None])[..., 0]) + 0.03 * x + 0.2 * u

    def mixture(x, u, c):  # drawn towards the nearest of five centres
        weights = torch.softmax(-2 * (x[:, None] - c).square().sum(dim=2), dim=1)
        return x + 0.1 * ((weights[..., None] * c).sum(dim=1) - x) + 0.1 * u

    for step, given_ in ((linear, tilt), (expanding, tilt), (mixture, centres)):
        chain = Recurrence(step, normal(samples, dim), inputs=(noise, given_))
        for solver in (CausalQuasiNewton(), CausalQuasiNewton(window=20)):
            solution = solve(chain, solver, rtol=rtol)
            assert solution.converged.all()
            assert float(relative_errors(solution.value, chain.sequential())[:, -1].max()) < 2 * rtol


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    chain = Recurrence(lambda x: 0.9 * x + 0.5, torch.ones(2, 3, dtype=dtype), steps=50)
    solution = solve(chain, rtol=1e-2)
    assert solution.value.dtype == dtype
    assert solution.converged.all()
    assert_close(solution.value.float(), chain.sequential().float(), rtol=3e-2, atol=3e-2)


def test_stopping_and_errors_hand_over_what_there_is():
    problem = pendulum()
    seen = []

    def callback(progress):
        seen.append(progress)
        return progress.nfev == 3

    solution = solve(problem, callback=callback, on_failure="ignore", record=True)
    assert solution.nfev == len(seen) == 3
    assert (solution.status == Status.STOPPED).all()
    assert solution.trace.shape == (3, 3)
    assert seen[-1].value.shape == problem.z0.shape

    def fails(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as info:
        solve(problem, callback=fails)
    assert info.value.solution.nfev == 1


@pytest.mark.parametrize("max_evals", [1, 2])
def test_one_round_and_two_are_legal(max_evals):
    solution = solve(pendulum(), max_evals=max_evals, on_failure="ignore")
    assert solution.nfev == max_evals
    assert not solution.converged.any()


def test_one_step():
    chain = Recurrence(lambda x: 2 * x, torch.ones(2, 3), steps=1)
    solution = solve(chain)
    assert solution.nfev == 1
    assert (solution.value == 2).all()


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"max_rows": 3}, {"certify": True}], ids=str)
@pytest.mark.parametrize(("samples", "steps"), [(0, 5), (2, 0), (0, 0)])
def test_an_empty_chain_is_solved_at_once(samples, steps, options):
    def never(x):
        raise AssertionError("nothing is to be evaluated")

    solver = CausalQuasiNewton(**options)
    chain = Recurrence(never, torch.zeros(samples, 3), steps=steps)
    solution = solve(chain, solver, record=True)
    assert solution.nfev == 0
    assert solution.converged.shape == (samples,)
    assert solution.converged.all()
    assert solution.value.shape == (samples, steps, 3)
    assert "converged" in repr(solution)
    plain = solve(lambda z: 0.5 * z, solver, z0=torch.zeros(samples, steps, 3))
    assert plain.converged.all()
    assert plain.nfev <= 1
    assert Recurrence(never, torch.zeros(samples, 3), steps=0).sequential().shape == (samples, 0, 3)
    fixed = fixpoint.solve(lambda z: 0.5 * z, torch.zeros(samples, steps, 3), solver=solver, depth=2)
    assert fixed.value.shape == (samples, steps, 3)
    assert fixpoint.estimate_memory(fixed.value, solver=solver).state_bytes == 0


def test_a_solver_that_is_bound_makes_steps_by_itself():
    chain = gru(samples=2, steps=12)
    f, solver = CausalQuasiNewton().bind(chain, Layout.of(chain.z0, 1))
    z = chain.z0.flatten(1)
    state = solver.init(z)
    for _ in range(12):
        z, state = solver.step(z, f(z.reshape(chain.z0.shape)).flatten(1), state)
    assert_close(z, chain.sequential().flatten(1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backward", [None, fixpoint.Unroll()], ids=repr)
@pytest.mark.parametrize("window", [None, 50])
def test_what_is_read_a_part_at_a_time_is_what_is_read_at_once(window, backward, monkeypatch):
    problem, solver = gru(samples=2, steps=150), CausalQuasiNewton(window=window)
    at_once = solve(problem, solver, backward=backward)
    monkeypatch.setattr(sweep, "_PART", 0)
    in_parts = solve(problem, solver, backward=backward)
    assert len(list(sweep.parts(problem.z0))) == 5
    assert in_parts.nfev == at_once.nfev
    assert_close(in_parts.value, at_once.value, rtol=1e-9, atol=1e-11)


def test_a_short_window_beside_a_long_one_is_what_it_is_alone():
    # Chains that are done at other times have windows of other lengths at the end; what pads them must not count.
    problem = gru(samples=4, steps=80)
    problem.inputs[0][1:] *= torch.tensor([3.0, 0.1, 10.0], dtype=torch.float64)[:, None, None]
    solver = CausalQuasiNewton(window=40)
    together = solve(problem, solver, rtol=1e-4)
    for row in range(4):
        one = Recurrence(problem.step, problem.start[row : row + 1], inputs=(problem.inputs[0][row : row + 1],))
        assert_close(solve(one, solver, rtol=1e-4).value[0], together.value[row], rtol=1e-9, atol=1e-11)


def test_what_does_not_fit_is_refused_at_once():
    solver = CausalQuasiNewton()
    with pytest.raises(ValueError, match="a dimension for the steps"):
        fixpoint.solve(torch.cos, torch.zeros(3), solver=solver, batch_dims=1)
    with pytest.raises(ValueError, match="nested state"):
        fixpoint.solve(lambda z: z, (torch.zeros(3, 2),), solver=solver)
    chain = pendulum()
    chain.slopes = torch.ones(7)
    with pytest.raises(ValueError, match=r"\(T,\) = \(400,\).*found \(7,\)"):
        solve(chain)
    chain = pendulum()
    chain.basis = torch.eye(3)
    with pytest.raises(ValueError, match=r"basis.*\(2, 2\)"):
        solve(chain)
    with pytest.raises(TypeError, match=r"how many steps a row has.*bind\(f, layout\)"):
        solver.init(torch.zeros(1, 2))
    for option in ("memory", "window", "max_rows"):
        with pytest.raises(ValueError, match=option):
            CausalQuasiNewton(**{option: 0})
    with pytest.raises(TypeError):
        CausalQuasiNewton(windows=3)


@pytest.mark.parametrize(("factor", "atol"), [(0.9, 0.0), (0.9, 1.0), (0.0, 1.0)])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_norms_that_overflow_or_vanish_are_no_warning(factor, atol):
    """In float32 the norm of entries above 2e19 is infinite."""
    start = torch.full((1, 4), 1e25)
    chain = Recurrence(lambda x: factor * (x + 1e24 * (x / 1e24).sin()), start, steps=50)
    solution = solve(chain, rtol=1e-4, atol=atol)
    assert solution.converged.all()
    assert_close(solution.value, chain.sequential(), rtol=1e-4, atol=0)


def test_members_of_a_vmap_have_the_figures_that_each_has_alone():
    problem = pendulum(steps=20)
    starts = torch.randn(2, 3, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def figures(z0):
        solution = solve(problem, z0=z0)
        return solution.predicted_error, solution.amplification, solution.lyapunov, solution.evals

    together = torch.func.vmap(figures)(starts)
    for member, z0 in enumerate(starts):
        for found, expected in zip(together, figures(z0), strict=True):
            assert_close(found[member], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"certify": True}, {"window": 1}, {"window": 8}], ids=str)
@pytest.mark.parametrize("power", [-0.7, 0.55])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_states_whose_squares_leave_the_range_are_solved_as_others_are(dtype, options, power):
    unit = float(torch.finfo(dtype).max) ** power
    chain = fixpoint.Recurrence(lambda x: 0.9 * x + unit, torch.full((1, 2), unit, dtype=dtype), steps=50)
    found = fixpoint.solve(chain, solver=CausalQuasiNewton(**options), backward=None)
    assert found.converged.all()
    torch.testing.assert_close(found.value / unit, chain.sequential() / unit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("window", [None, 5, 1])
def test_a_sample_that_breaks_leaves_the_gradients_of_others_alone(window):
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    k = torch.arange(50.0)[None, :, None].expand(3, 50, 1)
    row = torch.arange(3.0)[:, None, None].expand(3, 50, 1)

    def gradient(rows):
        def step(x, k, row):
            return torch.where((k == 20) & (row == 1), torch.nan, 0.9 * w * x + 0.1)

        start = torch.ones(len(rows), 2, dtype=torch.float64)
        chain = fixpoint.Recurrence(step, start, inputs=(k[rows], row[rows]))
        found = fixpoint.solve(chain, solver=CausalQuasiNewton(window=window), rtol=1e-8, on_failure="ignore")
        return torch.autograd.grad(found.value[[0, -1]].sum(), w)[0]

    torch.testing.assert_close(gradient([0, 1, 2]), gradient([0, 2]), rtol=1e-5, atol=0)


def test_slopes_that_are_not_finite_are_refused():
    chain = fixpoint.Recurrence(lambda x: 0.5 * x + 1, torch.ones(1, 2), steps=30, slopes=torch.full((30,), torch.nan))
    with pytest.raises(ValueError, match="slopes must be finite"):
        fixpoint.solve(chain, solver=CausalQuasiNewton())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [178, 372])
def test_changes_whose_squares_overflow_tell_no_slope(seed):
    """From a far start the guesses run to 1e38; a slope that is NaN would spoil states that are exact."""
    generator, steps = torch.Generator().manual_seed(seed), 60
    start = (torch.rand(2, 1, generator=generator, dtype=torch.float64) * 0.8 + 0.1).float()
    far = 10 * torch.randn(2, steps, 1, generator=generator, dtype=torch.float64).float()

    def logistic(z):
        before = torch.cat([start[:, None], z[:, :-1]], dim=1)
        return 3.7 * before * (1 - before)

    exact = start[:, None].expand(-1, steps, -1)
    for _ in range(steps):
        exact = logistic(exact)
    solution = fixpoint.solve(logistic, far, solver=CausalQuasiNewton(), rtol=1e-3, max_evals=steps + 1)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, exact, rtol=1e-3, atol=0)


def images_chain(inputs=None):
    """A chain of states ``(2, 3, 4)`` whose entries mix."""
    generator = torch.Generator().manual_seed(0)
    W = 0.2 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
    u = torch.randn(2, 20, 2, 3, 4, generator=generator, dtype=torch.float64) if inputs is None else inputs
    start = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    return fixpoint.Recurrence(lambda x, u: torch.tanh(x.flatten(1) @ W).reshape(x.shape) + u, start, inputs=(u,))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (1, 2, 3, 0), (0, 1, 3, 2)], ids=["channels last", "steps last", "T"])
@pytest.mark.parametrize("whole", [False, True], ids=["chain", "f"])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"certify": True}, {"probes": 1}], ids=str)
def test_states_in_another_order_in_memory_are_solved_as_the_same_numbers_are(order, whole, options):
    chain = images_chain()
    if whole and "probes" in options:
        options = {}  # for chains alone
    f = (lambda z: chain(z)) if whole else chain
    stored = torch.zeros(2, *((20, 2, 3, 4)[i] for i in order), dtype=torch.float64)
    z0 = stored.permute(0, *(1 + order.index(i) for i in range(4)))
    solver = CausalQuasiNewton(**options)
    found, expected = (fixpoint.solve(f, start, solver=solver, rtol=1e-4) for start in (z0, chain.z0))
    assert found.value.stride() == z0.stride() != expected.value.stride()
    assert found.nfev == expected.nfev
    assert_close(found.value, expected.value, rtol=1e-12, atol=1e-12)
    assert_close(found.amplification, expected.amplification)
    assert_close(found.value, chain.sequential(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backward", [fixpoint.IFT(rtol=1e-10), fixpoint.Unroll()], ids=repr)
def test_their_gradients_are_too(backward):
    u = images_chain().inputs[0].requires_grad_()
    chain = images_chain(u)
    z0 = chain.z0.movedim(2, 4).contiguous().movedim(4, 2)
    value = fixpoint.solve(chain, z0, solver=CausalQuasiNewton(), backward=backward, rtol=1e-10).value
    found, expected = (torch.autograd.grad(x.square().sum(), u)[0] for x in (value, chain.sequential()))
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
