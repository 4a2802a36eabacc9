"""Steps that are compiled: the results of plain ones, few versions, and plain steps where nothing can be compiled."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import fixpoint
from fixpoint import ACX, Anderson, Blockwise, Broyden, CausalQuasiNewton, Compiled, Picard, Unroll
from fixpoint.solvers import compiled

D = torch.float64


def problem(rows, dim, dtype=D, seed=0):
    """Diagonal affine maps: f, z0 and the fixed point."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.9 * torch.rand(rows, dim, generator=generator, dtype=dtype)
    c = torch.randn(rows, dim, generator=generator, dtype=dtype)
    return (lambda z: torch.addcmul(c, w, z)), torch.zeros_like(c), c / (1 - w)


def graphs():
    """Of steps that were traced since the last call."""
    found = counters["stats"]["unique_graphs"]
    broken = dict(counters["graph_break"])
    counters.clear()
    assert not broken
    return found


def solve(solver, rows=4, dim=12, dtype=D, **options):
    f, z0, exact = problem(rows, dim, dtype)
    solution = fixpoint.solve(f, z0, solver=solver, rtol=1e-6, on_failure="raise", **options)
    torch.testing.assert_close(solution.value, exact, rtol=1e-3, atol=1e-3)
    return solution


@pytest.fixture
def traced(steps_are_traced):
    """As ``steps_are_traced``, with counts from zero."""
    counters.clear()


@pytest.fixture
def never(monkeypatch):
    """Nothing may be compiled."""
    compiled._compiled_step.cache_clear()

    def refuse(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled.torch, "compile", refuse)


@pytest.mark.parametrize(
    ("solver", "versions"),
    [(Anderson(), 3), (Anderson(memory=2, damping=0.7), 3), (Broyden(memory=5), 5), (ACX(), 8)],
    ids=repr,
)
def test_a_solver_has_few_versions_whatever_the_size_of_the_state(traced, solver, versions):
    wrapped = Compiled(solver)
    solve(wrapped)
    assert graphs() == versions
    for rows, dim in ((3, 30), (17, 9), (7, 50)):
        solve(wrapped, rows, dim)
    assert graphs() == 0
    solve(Compiled(solver))  # an equal one
    assert graphs() == 0
    solve(wrapped, 1, 12)
    assert graphs() == versions
    solve(wrapped, 1, 40)
    assert graphs() == 0


@pytest.mark.parametrize("solver", [Anderson(memory=4), Broyden(memory=6), ACX()], ids=repr)
def test_sizes_that_happen_to_be_equal_or_one_do_not_use_up_the_versions(traced, solver):
    wrapped = Compiled(solver)
    shapes = ((5, 5), (4, 12), (8, 8), (5, 1), (1, 1), (1, 5), (4, 4), (7, 9))
    for shape in shapes:
        solve(wrapped, *shape)  # raises once they are used up
    assert graphs() > 0
    for shape in shapes:
        solve(wrapped, *shape)
    assert graphs() == 0


def test_kinds_of_tensors_do_not_use_up_each_others_versions(traced, monkeypatch):
    monkeypatch.setattr(compiled, "_VERSIONS", 8)  # as before torch could be told
    solver = Compiled(ACX())
    for dtype in (D, torch.float32):
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                solve(solver, dtype=dtype, backward=None)
    assert graphs() == 4 * 8  # with gradients and without there is one


def test_states_of_any_layout_use_the_same_versions(traced):
    solver = Compiled(Anderson(memory=5))
    solve(solver)
    assert graphs() == 3
    f, z0, exact = problem(4, 12)
    shaped = (4, 3, 2, 2)
    starts = z0.reshape(shaped), z0[:1].expand(4, 12).reshape(shaped), torch.zeros(5, *shaped[1:], dtype=D)[1:]
    for start in (*starts, torch.nn.Parameter(z0.reshape(shaped))):
        found = fixpoint.solve(
            lambda z: f(z.reshape(4, 12)).reshape(shaped).transpose(2, 3).contiguous().transpose(2, 3),
            start,
            solver=solver,
            rtol=1e-9,
            on_failure="raise",
            backward=None,
        )
        torch.testing.assert_close(found.value.reshape(4, 12), exact, rtol=1e-6, atol=1e-6)
    column_major = torch.zeros(12, 4, dtype=D).T
    fixpoint.solve(lambda z: f(z).T.contiguous().T, column_major, solver=solver, rtol=1e-6, on_failure="raise")
    assert graphs() == 0
    solve(solver, 1, 12)
    assert graphs() == 3
    w = 0.5 * torch.eye(12, dtype=D)
    fixpoint.solve(lambda z: (w @ z.T + 1).T, torch.zeros(1, 12, dtype=D), solver=solver, on_failure="raise")
    assert graphs() == 0


def test_many_solvers_do_not_use_up_each_others_versions(traced, monkeypatch):
    monkeypatch.setattr(compiled, "_VERSIONS", 8)
    solvers = [Anderson(memory=2, damping=0.9 - 0.05 * index) for index in range(5)]
    for solver in solvers:
        solve(Compiled(solver))
    assert graphs() == 3 * len(solvers)


def test_the_steps_are_those_of_the_solver(traced):
    f, z0, _ = problem(4, 12)
    for solver in (Anderson(memory=3), Broyden(memory=3), ACX(), Blockwise(Anderson(memory=2), blocks=3)):
        steps = Compiled(solver)
        z, state, inner = z0, steps.init(z0), solver.init(z0)
        for _ in range(10):
            expected, inner = solver.step(z, f(z), inner)
            z, state = steps.step(z, f(z), state)
            torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


def test_inference_mode_and_gradients_beside_it(traced):
    solver = Compiled(Anderson(memory=4))
    with torch.inference_mode():
        solve(solver, backward=None)
        solve(solver, 5, 20, backward=None)
    assert graphs() == 3
    x = torch.linspace(0.1, 0.7, 4, dtype=D)[:, None].expand(4, 3).clone().requires_grad_()
    rule = fixpoint.IFT(solver=solver, rtol=1e-10)
    solution = fixpoint.solve(lambda z, x: x * z + 1, torch.zeros(4, 3, dtype=D), (x,), solver=solver, backward=rule)
    solution.value.sum().backward()
    torch.testing.assert_close(x.grad, 1 / (1 - x.detach()) ** 2, rtol=1e-4, atol=1e-4)
    assert graphs() > 0


def test_where_steps_are_followed_they_are_plain(never):
    solver = Compiled(Anderson(memory=3))
    x = torch.full((2, 3), 0.5, dtype=D, requires_grad=True)
    fixpoint.solve(
        lambda z, x: x * z + 1, torch.zeros(2, 3, dtype=D), (x,), solver=solver, backward=Unroll(), depth=6
    ).value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4.0).detach())
    z = torch.empty(2, 3, device="meta")
    assert solver.step(z, z, solver.init(z))[0].is_meta
    assert fixpoint.estimate_memory(torch.zeros(4, 8), solver=solver) == fixpoint.estimate_memory(
        torch.zeros(4, 8), solver=solver.solver
    )
    _, tangent = torch.func.jvp(
        lambda x: fixpoint.solve(lambda z, x: x * z + 1, torch.zeros(2, 3, dtype=D), (x,), solver=solver).value,
        (x.detach(),),
        (torch.ones(2, 3, dtype=D),),
    )
    torch.testing.assert_close(tangent, torch.full_like(tangent, 4.0), rtol=1e-3, atol=1e-3)


def test_a_counter_of_operations_sees_plain_steps_and_spoils_no_compiled_ones(traced):
    solver = Compiled(Anderson(memory=6))
    with FlopCounterMode(display=False) as counter:
        solve(solver, backward=None)
    assert graphs() == 0
    assert counter.get_total_flops() > 0
    solve(solver)
    assert graphs() == 3


def test_in_code_that_is_compiled_whole_a_step_is_part_of_the_graph(traced):
    f, z0, _ = problem(4, 12)

    def network(z):
        return fixpoint.solve(f, z, solver=Compiled(Anderson(memory=2)), depth=3, backward=Unroll()).value

    whole = torch.compile(network, fullgraph=True, backend="eager")(z0)
    torch.testing.assert_close(whole, network(z0), rtol=1e-9, atol=1e-9)


class Halving(Picard):
    """Whose plain step goes to half of the image."""

    def plain(self, fz):
        return fz / 2


def test_what_the_loop_and_root_ask_of_the_inner_solver(traced):
    damped = Compiled(Picard(damping=0.5))
    fz = torch.ones(2, 3)
    assert torch.equal(Compiled(Halving()).plain(fz), fz / 2)
    assert damped.forget(None, torch.tensor([True, False])) == ()
    assert Compiled(ACX()).forget(None, torch.tensor([True])) is None
    assert damped.adjoint() is None
    found = fixpoint.root(lambda x: x**3 - 2, torch.ones(3, 2, dtype=D), solver=Compiled(Broyden()), rtol=1e-12)
    torch.testing.assert_close(found.value, torch.full((3, 2), 2 ** (1 / 3), dtype=D))


class NamesItsAdjoint(Picard):
    """Says by which solver its adjoint is to be solved, and binds to its problem."""

    def adjoint(self):
        return Anderson(memory=7)

    def bind(self, f, layout):
        return functools.partial(f), Anderson(memory=8)


def test_a_bound_solver_and_an_adjoint_are_compiled_too():
    solver = Compiled(NamesItsAdjoint())
    assert solver.adjoint() == Compiled(Anderson(memory=7))
    f, bound = solver.bind(torch.cos, None)
    assert isinstance(f, functools.partial)
    assert bound == Compiled(Anderson(memory=8))


class Unhashable(Picard):
    __hash__ = None


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("anderson", r"solver must be a fixpoint\.Solver such as Anderson\(\), found 'anderson'"),
        (Unhashable(), r"solver must be hashable, as a frozen dataclass is, found Unhashable\(damping=1\.0\)"),
        (fixpoint.GMRES(), r"a solver whose steps are of few kinds, found GMRES\(memory=100\)"),
    ],
)
def test_what_cannot_be_compiled_is_refused(solver, message):
    with pytest.raises(TypeError, match=message):
        Compiled(solver)


def test_a_solver_with_a_loop_of_its_own_is_refused():
    chain = fixpoint.Recurrence(lambda x, u: torch.sin(x + u), torch.ones(2, 3), inputs=(torch.ones(2, 5, 3),))
    with pytest.raises(TypeError, match=r"a solver without a loop of its own, found CausalQuasiNewton\("):
        fixpoint.solve(chain, solver=Compiled(CausalQuasiNewton()))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_for_this_machine_it_solves_the_same():
    compiled._compiled_step.cache_clear()
    steps = Compiled(Anderson(memory=2))
    solution, plain = solve(steps, 3, 40), solve(steps.solver, 3, 40)
    assert solution.nfev == plain.nfev
    torch.testing.assert_close(solution.value, plain.value, rtol=1e-6, atol=1e-6)


def test_numbers_are_tensors_from_the_start():
    # The compiler takes an array for a tensor of another kind.
    state = Compiled(Anderson()).init(torch.zeros(2, 3))
    assert isinstance(state.lengths, torch.Tensor)
