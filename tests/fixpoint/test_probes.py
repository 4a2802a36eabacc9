"""Slopes that CausalQuasiNewton measures at displaced inputs of each step (probes)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

import fixpoint
from fixpoint import CausalQuasiNewton
from fixpoint.chains.probes import Probes, displaced, slopes
from fixpoint.chains.run import evaluate_some
from tests.fixpoint.chains import Counted

T = 200


def cells(samples=3, dim=4, dtype=torch.float64, steps=T, kind=Counted):
    """States that are driven and saturate, each entry by itself and a little by its neighbour."""
    generator = torch.Generator().manual_seed(0)
    start, drive = (torch.randn(samples, *shape, generator=generator).to(dtype) for shape in ((dim,), (steps, dim)))
    return kind(lambda x, u: torch.tanh(1.2 * x + 0.1 * x.roll(1, 1) + u), start, inputs=(drive,))


def solve(chain, **options):
    return fixpoint.solve(chain, solver=CausalQuasiNewton(**options), backward=None, rtol=1e-5, max_evals=T + 1)


def directions(count, rows, dim):
    return torch.randint(0, 2, (count, rows, dim), generator=torch.Generator().manual_seed(1)).double() * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_slopes_of_entries_that_do_not_mix_are_their_derivatives(dtype, size):
    x = (size * torch.linspace(0.5, 2, 6).reshape(2, 3)).to(dtype)
    moved = displaced(x, directions(1, 2, 3))
    assert moved.dtype == dtype
    found = slopes(x, 3 * x, moved, 3 * moved)
    roundings = torch.finfo(dtype).eps
    torch.testing.assert_close(found, torch.full_like(found, 3), rtol=4 * roundings / max(1e-2, 16 * roundings), atol=0)


def test_the_mean_over_directions_is_the_diagonal_of_the_jacobian():
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.ones(1, 4, dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)[:, None]  # all there are
    moved = displaced(x, signs)
    expected = jacobian(lambda x: x @ matrix.T, x).reshape(4, 4).diagonal()
    torch.testing.assert_close(slopes(x, x @ matrix.T, moved, moved @ matrix.T)[0], expected)


def test_states_of_no_size_are_moved_all_the_same():
    x = torch.zeros(2, 3)
    moved = displaced(x, directions(1, 2, 3))
    assert bool((moved != 0).all())
    torch.testing.assert_close(slopes(x, x.sin(), moved, moved.sin()), torch.ones(2, 3), rtol=1e-3, atol=0)


def test_interpolated_steps_have_the_slopes_of_the_last_evaluated_one():
    class Steps:
        may_skip = True

        def probed_part(self, z, row, step, evaluated, signs):
            assert signs.shape == (1, 3, 2)
            return torch.zeros(len(step), 2), torch.zeros(len(step)), step[evaluated, None].expand(-1, 2).float()

    run = SimpleNamespace(
        probes=Probes(1, 6, 2, 1, torch.zeros(1)), steps=6, start=torch.zeros(1), states=torch.zeros(7, 2), nfev=0
    )
    run.rows = lambda: torch.zeros(1, 12)
    found = evaluate_some(run, Steps(), np.arange(1, 6), np.array([0, 3, 4]))
    assert found.slopes[:, 0].tolist() == [1, 1, 1, 4, 5]
    assert run.nfev == 1


def test_no_two_steps_of_a_round_have_a_direction_in_common():
    signs = Probes(1, 100, 64, 3, torch.zeros(1)).signs(np.zeros(100, dtype=int), np.arange(100))
    assert len(signs.flatten(0, 1).unique(dim=0)) == 300


def test_directions_change_from_step_to_step_and_from_round_to_round():
    probes = Probes(2, 10, 32, 1, torch.zeros(1))
    row, step = torch.tensor([0, 0, 1]).numpy(), torch.tensor([0, 1, 0]).numpy()
    first, second = probes.signs(row, step), probes.signs(row, step)
    assert first.shape == (1, 3, 32)
    assert torch.equal(first.abs(), torch.ones_like(first))
    assert torch.equal(first[0, 0], first[0, 2])  # what a chain gets does not depend on its number
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("window", [None, 50])
def test_probes_save_rounds_and_find_the_same_states(window):
    chain = cells()
    without, probed = (solve(chain, window=window, probes=count) for count in (0, 1))
    assert probed.converged.all()
    assert probed.nfev < without.nfev
    torch.testing.assert_close(probed.value, chain.sequential(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probes", [1, 2])
def test_each_probe_is_a_row_of_the_same_call(probes):
    chain = cells(samples=1)
    solution = solve(chain, probes=probes)
    assert len(chain.asked) == solution.nfev
    assert len(chain.asked[0]) == (1 + probes) * T


@pytest.mark.parametrize("max_rows", [1, 2, 3, 40])
def test_a_budget_of_rows_counts_the_probes(max_rows):
    chain = cells(samples=3, steps=30)
    solution = solve(chain, probes=1, max_rows=max_rows)
    assert solution.converged.all()
    assert max(map(len, chain.asked)) <= max_rows
    torch.testing.assert_close(solution.value, chain.sequential(), rtol=1e-4, atol=1e-4)


def test_a_chain_takes_the_course_that_it_takes_alone():
    chain = cells(samples=3)
    together = solve(chain, probes=1)
    for k in range(3):
        alone = fixpoint.Recurrence(chain.step, chain.start[k : k + 1], inputs=(chain.inputs[0][k : k + 1],))
        solution = solve(alone, probes=1)
        assert solution.evals.item() == together.evals[k]
        torch.testing.assert_close(solution.value[0], together.value[k], rtol=1e-12, atol=1e-12)


def test_a_probe_that_leaves_the_domain_of_a_step_spoils_nothing():
    x = torch.tensor([[4.0, 1.0]])
    moved = displaced(x, -torch.ones(1, 1, 2))
    found = slopes(x, torch.sqrt(x - 1), moved, torch.sqrt(moved - 1))
    torch.testing.assert_close(found, torch.tensor([[0.5 * 3**-0.5, 0.0]]), rtol=1e-2, atol=0)
    chain = fixpoint.Recurrence(lambda x: torch.sqrt(x - 1) + 1, torch.ones(1, 2), steps=40)  # a step outside: NaN
    solution = solve(chain, probes=1)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, chain.sequential())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision_is_solved(dtype):
    chain = cells(dtype=dtype, steps=40)
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(probes=1), backward=None, rtol=3e-2)
    assert solution.converged.all()
    assert solution.value.dtype == dtype
    torch.testing.assert_close(solution.value.float(), chain.sequential().float(), rtol=0.2, atol=0.2)


def test_certificates_hold_and_gradients_are_those_of_the_sequential_run():
    drive = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    chain = fixpoint.Recurrence(lambda x, u: torch.tanh(1.2 * x + u), drive[:, 0].detach(), inputs=(drive,))
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(probes=1, certify=True), rtol=1e-10, max_evals=200)
    assert solution.converged.all()
    assert (solution.relative_residual <= 1e-10).all()
    found, expected = (torch.autograd.grad(each.sum(), drive)[0] for each in (solution.value, chain.sequential()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_fewer_rounds_are_remembered_of_steps_that_are_probed():
    assert (CausalQuasiNewton().remembered, CausalQuasiNewton(probes=1).remembered) == (3, 1)
    assert CausalQuasiNewton(memory=2, probes=1).remembered == 2


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ValueError, match="probes must be at least 0"):
        CausalQuasiNewton(probes=-1)
    with pytest.raises(TypeError, match="probes must be an integer"):
        CausalQuasiNewton(probes=1.5)
    with pytest.raises(ValueError, match="probes=1 needs single steps"):
        fixpoint.solve(lambda z: 0.5 * z, torch.ones(1, 3, 2), solver=CausalQuasiNewton(probes=1))
    chain = fixpoint.Recurrence(lambda x: 0.5 * x, torch.ones(1, 2, requires_grad=True), steps=3)
    with pytest.raises(ValueError, match="probes has no effect where gradients are recorded"):
        fixpoint.solve(chain, solver=CausalQuasiNewton(probes=1), backward=fixpoint.Unroll())


def test_under_torch_func_f_is_evaluated_whole():
    chain = cells(samples=1, steps=20, kind=fixpoint.Recurrence)

    def final(start):
        moved = fixpoint.Recurrence(chain.step, start, inputs=chain.inputs)
        return solve(moved, probes=1).value[:, -1]

    plain = torch.func.vmap(lambda start: final(start[None])[0])(chain.start)
    torch.testing.assert_close(plain, chain.sequential()[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_states_may_be_single_numbers(window):
    drive = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = fixpoint.Recurrence(lambda x, u: torch.tanh(1.2 * x + u), torch.zeros(3).double(), inputs=(drive,))
    solution = solve(chain, probes=1, window=window)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, chain.sequential(), rtol=1e-4, atol=1e-4)


def test_directions_of_large_states_take_little_memory():
    probes = Probes(1, 1000, 1 << 17, 1, torch.zeros(1))
    kept = [each for each in vars(probes).values() if isinstance(each, torch.Tensor)]
    assert sum(each.nbytes for each in kept) <= 1 << 24  # a state of each step would take half a gigabyte
    signs = probes.signs(np.array([0, 0]), np.array([998, 999]))
    assert signs.dtype == torch.float32
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert not torch.equal(signs[0, 0], signs[0, 1])


@pytest.mark.parametrize("probes", [0, 1])
@pytest.mark.parametrize("window", [None, 5])
def test_steps_that_draw_are_solved_with_the_numbers_of_the_evaluation_that_all_share(probes, window):
    def step(x):
        return 0.9 * torch.tanh(x + 0.1 * torch.rand(len(x), 1)) + 0.1 * torch.rand(len(x), 3)

    chain = fixpoint.Recurrence(step, torch.ones(3, 3), steps=20)
    torch.manual_seed(0)
    random = torch.get_rng_state()
    solution = solve(chain, probes=probes, window=window)
    torch.set_rng_state(random)
    assert solution.converged.all()
    torch.testing.assert_close(chain(solution.value), solution.value, rtol=1e-4, atol=1e-4)


def test_steps_that_draw_are_not_interpolated():
    class Slow(fixpoint.Recurrence):
        def sparse_transition(self, x, sample, step, evaluated):
            change = self.transition(x[evaluated], sample[evaluated], step[evaluated]) - x[evaluated]
            last = torch.searchsorted(evaluated, torch.arange(len(step)), right=True) - 1
            return x + change[last], torch.zeros(len(step))

    for probes in (0, 1):
        chain = Slow(lambda x: x + 0.02 * (torch.rand(len(x), 1) - x), torch.zeros(2, 1), steps=T)
        torch.manual_seed(0)
        random = torch.get_rng_state()
        solution = solve(chain, probes=probes)
        torch.set_rng_state(random)
        assert solution.converged.all()
        torch.testing.assert_close(chain(solution.value), solution.value, rtol=1e-4, atol=1e-4)


def test_a_window_of_one_state_has_no_probes_and_all_the_room():
    chain = cells(samples=8, steps=10)
    solution = solve(chain, probes=1, window=1, max_rows=8)
    assert solution.nfev == 10
    assert set(map(len, chain.asked)) == {8}


@pytest.mark.parametrize("probes", [0, 1])
def test_chains_that_go_back_keep_to_the_budget(probes):
    start = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1
    chain = Counted(lambda x: 1.3 * x + 0.2 * torch.sin(5 * x), start, steps=30)
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(max_rows=40, probes=probes), backward=None, rtol=1e-3)
    assert solution.converged.all()
    assert max(map(len, chain.asked)) <= 40
    torch.testing.assert_close(solution.value, chain.sequential(), rtol=1e-3, atol=1e-3)
