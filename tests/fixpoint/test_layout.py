"""Nested, scalar, complex and empty states."""

from __future__ import annotations

import weakref
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fixpoint
from fixpoint.engine.layout import Layout, leaves, map_leaves

Pair = namedtuple("Pair", ["left", "right"])


def affine(z):
    """Leaf i of z halves its distance to i + 2."""
    offsets = iter(range(1, 100))
    return map_leaves(lambda leaf: 0.5 * leaf + 0.5 * (next(offsets) + 1), z)


@pytest.mark.parametrize(
    "z0",
    [
        torch.zeros(2, 3),
        (torch.zeros(2, 3), torch.zeros(2)),
        [torch.zeros(2, 3, 4), torch.zeros(2, 1)],
        {"b": torch.zeros(2, 3), "a": torch.zeros(2)},
        Pair(torch.zeros(2, 3), torch.zeros(2, 2)),
        {"x": (torch.zeros(2), [torch.zeros(2, 3)]), "y": Pair(torch.zeros(2), {"z": torch.zeros(2, 1)})},
        (torch.zeros(2, 3), torch.zeros(2, 0)),
    ],
    ids=["tensor", "tuple", "list", "dict", "namedtuple", "deep", "empty leaf"],
)
@pytest.mark.parametrize("solver", [fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden()], ids=repr)
def test_nested_states_keep_their_structure_and_solve(solver, z0):
    sol = fixpoint.solve(affine, z0, solver=solver, rtol=1e-6)
    assert sol.converged.shape == (2,)
    for index, ((path, leaf), (path0, leaf0)) in enumerate(zip(leaves(sol.value), leaves(z0), strict=True)):
        assert (path, leaf.shape) == (path0, leaf0.shape)
        torch.testing.assert_close(leaf, torch.full_like(leaf0, index + 2), rtol=1e-4, atol=0)
    if isinstance(z0, tuple | list | dict):
        assert type(sol.value) is type(z0)


def test_f_may_return_a_dict_with_its_keys_in_another_order():
    z0 = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
    sol = fixpoint.solve(lambda z: {"b": 0.5 * z["b"] + 1, "a": 0.5 * z["a"] + 3}, z0, rtol=1e-6)
    torch.testing.assert_close(sol.value["a"], torch.full((1, 2), 6.0))
    torch.testing.assert_close(sol.value["b"], torch.full((1, 2), 2.0))


def test_f_may_return_a_list_for_a_tuple():
    sol = fixpoint.solve(lambda z: [0.5 * z[0] + 1], (torch.zeros(2),), rtol=1e-6)
    assert isinstance(sol.value, tuple)


def test_gradients_flow_through_nested_states():
    a = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    z0 = {"x": torch.zeros(1, dtype=torch.float64), "y": (torch.zeros(1, 2, dtype=torch.float64),)}
    sol = fixpoint.solve(lambda z: {"x": a[0] * z["x"] + 1, "y": (a[1] * z["y"][0] + 1,)}, z0, rtol=1e-13)
    (sol.value["x"].sum() + sol.value["y"][0].sum()).backward()
    torch.testing.assert_close(a.grad, torch.tensor([4.0, 2 * 16 / 9], dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_scalar_is_one_problem_by_default():
    sol = fixpoint.solve(torch.cos, torch.tensor(1.0), rtol=1e-6)
    assert sol.value.shape == sol.converged.shape == sol.residual.shape == ()
    assert float(sol.value) == pytest.approx(0.7390851, abs=1e-5)
    mixed = fixpoint.solve(lambda z: (0.5 * z[0], 0.5 * z[1] + 1), (torch.tensor(1.0), torch.zeros(3)), atol=1e-6)
    assert mixed.converged.shape == ()


def test_batch_dims_say_what_is_one_problem(solver):
    slope = torch.linspace(0.1, 0.8, 12, dtype=torch.float64).reshape(2, 6, 1) * torch.ones(6, dtype=torch.float64)
    z0 = torch.zeros(2, 6, 6, dtype=torch.float64)
    options = {"solver": solver, "rtol": 1e-8, "max_evals": 400}
    two = fixpoint.solve(lambda z: slope * z + 1, z0, batch_dims=2, **options)
    flat = fixpoint.solve(lambda z: slope.reshape(12, 6) * z + 1, z0.reshape(12, 6), batch_dims=1, **options)
    torch.testing.assert_close(two.value.reshape(12, 6), flat.value, rtol=1e-12, atol=0)
    assert two.evals.flatten().tolist() == flat.evals.tolist()
    one = fixpoint.solve(lambda z: slope * z + 1, z0, batch_dims=0, **options)
    torch.testing.assert_close(one.value, 1 / (1 - slope), rtol=1e-6, atol=0)
    assert one.evals.shape == ()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_states_reach_their_closed_form(solver, dtype):
    a = torch.polar(torch.full((2, 6), 0.6), torch.linspace(0, 5, 12).reshape(2, 6)).to(dtype)
    sol = fixpoint.solve(lambda z: a * z + (1 + 2j), torch.zeros(2, 6, dtype=dtype), solver=solver, rtol=1e-6)
    assert sol.value.dtype == dtype
    torch.testing.assert_close(sol.value, (1 + 2j) / (1 - a), rtol=1e-5, atol=1e-5)
    difference = a * sol.value + (1 + 2j) - sol.value
    torch.testing.assert_close(
        sol.residual, torch.linalg.vector_norm(difference, dim=1).to(sol.residual.dtype), rtol=1e-4, atol=1e-9
    )
    assert sol.residual.dtype == (torch.float64 if dtype == torch.complex128 else torch.float32)


def test_conjugation_is_allowed_in_complex_states():
    sol = fixpoint.solve(lambda z: (0.5j * z).conj() + 1, torch.zeros(2, dtype=torch.complex128), rtol=1e-12)
    z = sol.value
    torch.testing.assert_close((0.5j * z).conj() + 1, z)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (3, 0)], ids=str)
def test_empty_states_are_solved_at_once(solver, shape):
    batch_dims = 2 if len(shape) == 3 else 1
    f = torch.nn.Identity() if shape[-1] == 0 else (lambda z: 0.5 * z + 1)
    sol = fixpoint.solve(f, torch.zeros(shape), solver=solver, batch_dims=batch_dims, record=True, on_failure="raise")
    assert sol.value.shape == shape
    assert sol.converged.shape == shape[:batch_dims]
    assert sol.trace.shape == (1, *shape[:batch_dims])
    assert sol.nfev == 1


def test_an_empty_batch_has_gradients():
    w = torch.tensor(0.5, requires_grad=True)
    fixpoint.solve(lambda z: w * z + 1, torch.zeros(0, 3)).value.sum().backward()
    assert float(w.grad) == 0


def test_states_of_any_memory_layout_are_solved():
    z0 = torch.zeros(3, 4, 5).permute(0, 2, 1)
    b = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).permute(0, 2, 1)
    sol = fixpoint.solve(lambda z: 0.5 * z + b, z0, rtol=1e-6)
    torch.testing.assert_close(sol.value, 2 * b)
    expanded = fixpoint.solve(lambda z: 0.5 * z + b, torch.zeros(1).expand(3, 5, 4), rtol=1e-6)
    torch.testing.assert_close(expanded.value, 2 * b)


def test_flatten_and_unflatten_are_inverse():
    generator = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(2, 3, 4, generator=generator, dtype=torch.complex64),
        "b": [torch.randn(2, 3, generator=generator, dtype=torch.complex64).conj()],
    }
    layout = Layout.of(state, 2)
    flat = layout.flatten(state)
    assert flat.shape == (6, 10)
    assert not flat.is_complex()
    torch.testing.assert_close(layout.unflatten(flat), {"a": state["a"], "b": [state["b"][0].resolve_conj()]})


@given(order=st.permutations([1, 2, 3]), kept=st.integers(1, 4))
def test_fewer_rows_stand_in_memory_as_all_of_them_do(order: list[int], kept: int) -> None:
    """States of some rows, as a solve sees them that goes on without the others, are rows of the whole state."""
    sizes = {1: 2, 2: 3, 3: 5}
    stored = torch.randn(4, *(sizes[i] for i in order), dtype=torch.float64)
    state = stored.permute(0, *(order.index(i) + 1 for i in (1, 2, 3)))
    layout = Layout.of(state, 1)
    part = layout.with_rows(kept).unflatten(layout.flatten(state)[:kept])
    torch.testing.assert_close(part, state[:kept], rtol=0, atol=0)
    assert part.stride()[1:] == state.stride()[1:]
    torch.testing.assert_close(layout.with_rows(kept).flatten(part), layout.flatten(state)[:kept], rtol=0, atol=0)


@pytest.mark.parametrize("order", [(1, 2, 3), (2, 3, 1)], ids=["own order", "channels last"])
@pytest.mark.parametrize("backward", [None, fixpoint.IFT()], ids=repr)
def test_a_solution_holds_nothing_of_its_start(order: tuple[int, ...], backward: fixpoint.Backward | None) -> None:
    stored = torch.zeros(4, *(torch.Size([2, 3, 5])[i - 1] for i in order))
    memory = weakref.ref(stored.untyped_storage())
    z0 = stored.permute(0, *(order.index(i) + 1 for i in (1, 2, 3)))
    a = torch.ones((), requires_grad=True)
    solution = fixpoint.solve(lambda z: 0.5 * torch.cos(z) + a, z0, backward=backward)
    assert solution.value.stride() == z0.stride()
    del stored, z0
    assert memory() is None


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2)])
def test_the_example_of_a_layout_is_zeros_with_a_row_of_memory(order: tuple[int, ...], batch_dims: int) -> None:
    state = torch.randn(2, 3, 4, 5, dtype=torch.complex64).permute(order)
    layout = Layout.of({"a": state, "b": torch.ones(state.shape[:batch_dims], dtype=torch.complex64)}, batch_dims)
    for like, leaf in ((layout.example["a"], state), (layout.example["b"], torch.ones(state.shape[:batch_dims]))):
        assert like.shape == leaf.shape
        assert not like.any()
        assert like.untyped_storage().nbytes() <= 8 * leaf[(0,) * batch_dims].numel()
    assert layout.unflatten(layout.flatten({"a": state, "b": layout.example["b"]}))["a"].equal(state)
