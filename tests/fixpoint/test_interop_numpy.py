"""NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint.engine.layout import paired_leaves

A = np.random.default_rng(0).uniform(-0.3, 0.3, size=(5, 5))


def affine(z, b):
    return z @ A.T + b


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("solver", [fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden()], ids=repr)
def test_equals_the_closed_form_in_every_dtype(dtype, solver):
    b = (np.arange(10).reshape(2, 5) * (1 + 0.5j if np.issubdtype(dtype, np.complexfloating) else 1)).astype(dtype)
    rtol = 1e-5 if np.finfo(dtype).bits == 32 else 1e-12
    sol = fixpoint.solve(lambda z, b: z @ A.T.astype(dtype) + b, np.zeros_like(b), (b,), solver=solver, rtol=rtol)
    assert sol.value.dtype == dtype
    np.testing.assert_allclose(sol.value, np.linalg.solve(np.eye(5) - A, b.T).T, rtol=30 * rtol, atol=30 * rtol)


def test_equals_scipys_fixed_point():
    def f(x, c1, c2):
        return np.sqrt(c1 / (x + c2))

    x0, c1, c2 = np.array([1.2, 1.3]), np.array([10.0, 12.0]), np.array([3.0, 5.0])
    expected = scipy.optimize.fixed_point(f, x0, args=(c1, c2), xtol=1e-12)
    np.testing.assert_allclose(fixpoint.solve(f, x0, (c1, c2), rtol=1e-13).value, expected, rtol=1e-11)


def test_figures_are_arrays_too():
    sol = fixpoint.solve(affine, np.zeros((2, 5)), (np.ones((2, 5)),), rtol=1e-9, record=True)
    for name in ("value", "converged", "status", "residual", "relative_residual", "evals", "trace"):
        assert isinstance(getattr(sol, name), np.ndarray), name
    assert sol.converged.dtype == bool
    assert sol.trace.shape == (sol.nfev, 2)
    np.testing.assert_allclose(sol.residual, np.linalg.norm(affine(sol.value, 1.0) - sol.value, axis=1), atol=1e-15)
    assert repr(sol).startswith("Solution(2 of 2 rows converged")


def test_nested_states_keep_their_structure():
    def f(z):
        return {"y": [z["x"].mean(axis=1) + 1.0], "x": 0.5 * np.cos(z["x"]) + z["y"][0][:, None] / 4}

    z0 = {"x": np.zeros((3, 2)), "y": (np.zeros(3),)}
    sol = fixpoint.solve(f, z0, rtol=1e-10)
    assert isinstance(sol.value["y"], tuple)
    for path, leaf, image in paired_leaves(sol.value, f(sol.value)):
        assert isinstance(leaf, np.ndarray), path
        np.testing.assert_allclose(leaf, image, atol=1e-9)


@pytest.mark.parametrize("z0", [np.array(0.5), np.float64(0.5)], ids=["0-d array", "NumPy scalar"])
@pytest.mark.parametrize("f", [np.cos, lambda z: float(np.cos(z))], ids=["NumPy", "Python float"])
def test_scalars(z0, f):
    sol = fixpoint.solve(f, z0, rtol=1e-12)
    assert sol.value.shape == ()
    assert abs(float(sol.value) - 0.7390851332151607) < 1e-11


def test_lists_and_python_numbers_take_the_dtype_of_z0():
    sol = fixpoint.solve(lambda z: [0.5 * z[1], 1], np.zeros(2, dtype=np.float32), batch_dims=0)
    assert sol.value.dtype == np.float32
    np.testing.assert_allclose(sol.value, [0.5, 1], rtol=1e-6)


def test_f_sees_the_solvers_memory_and_the_callers_arguments_uncopied_and_a_callback_sees_a_copy():
    b, seen = np.ones((2, 5)), []

    def f(z, b_seen):
        seen.append(z)
        assert np.shares_memory(b_seen, b)
        return affine(z, b_seen)

    sol = fixpoint.solve(
        f, np.zeros((2, 5)), (b,), callback=lambda p: seen.append(p.value), max_evals=3, on_failure="ignore"
    )
    shown, reported = seen[0::2], seen[1::2]
    assert not any(np.shares_memory(ours, theirs) for ours in shown for theirs in reported)
    assert all((ours == theirs).all() for ours, theirs in zip(shown, reported, strict=True))
    assert any(np.shares_memory(sol.value, z) for z in shown), "the solution is the state that f was shown"


def test_neither_z0_nor_the_arguments_are_changed():
    z0, b = np.full((2, 5), 0.25), np.ones((2, 5))
    sol = fixpoint.solve(affine, z0, (b,))
    sol.value[:] = np.nan
    assert (z0 == 0.25).all()
    assert (b == 1).all()


def test_what_f_returns_may_be_one_buffer_written_again_and_again():
    buffer = np.empty(4)

    def f(z):
        return np.cos(z, out=buffer)

    for solver in (fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden()):
        sol = fixpoint.solve(f, np.linspace(0, 1, 4), solver=solver, rtol=1e-10)
        np.testing.assert_allclose(sol.value, 0.7390851332151607, rtol=1e-9)


def late(change):
    """A NumPy function that changes its input at its third call."""
    calls = []

    def f(z):
        calls.append(1)
        if len(calls) == 3:
            change(z)
        return 0.5 * np.cos(z)

    return f


@pytest.mark.parametrize(
    "change",
    [lambda z: z.__iadd__(1), lambda z: np.cos(z, out=z), lambda z: z.__setitem__(0, 1.0), lambda z: z.sort()],
    ids=["+=", "out=", "[0]=", "sort"],
)
def test_a_change_in_place_is_refused_at_whatever_call(change):
    with pytest.raises(ValueError, match="f changed its input in place"):
        fixpoint.solve(late(change), np.linspace(0, 1, 4), rtol=1e-12)


def test_a_view_of_the_input_may_be_returned():
    sol = fixpoint.solve(lambda z: z[:, ::-1], np.array([[1.0, 1.0]]))
    assert sol.converged.all()


@pytest.mark.parametrize(
    "z0",
    [
        np.broadcast_to(0.5, (2, 3)),
        np.ones((3, 2)).T,
        np.linspace(0, 1, 6).reshape(2, 3)[:, ::-1],
        np.ones((2, 3), dtype=">f8"),
        np.ones((2, 3), dtype=[("number", "f8"), ("other", "i4")])["number"],
    ],
    ids=["read-only", "transposed", "negative strides", "big endian", "a field of a structured array"],
)
def test_arrays_of_any_layout_serve_as_state_and_argument(z0):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = fixpoint.solve(lambda z, b: 0.5 * z + b, z0, (z0,), rtol=1e-12)
    np.testing.assert_allclose(sol.value, 2 * z0, rtol=1e-11)


def test_arguments_that_are_not_numbers_reach_f_as_they_are():
    sol = fixpoint.solve(lambda z, names, flag: 0.5 * z + len(names) * flag, np.zeros(2), (np.array(["a", "b"]), True))
    np.testing.assert_allclose(sol.value, 4, rtol=1e-3)


@pytest.mark.parametrize(
    ("f", "z0", "error", "message"),
    [
        (np.cos, np.zeros(2, dtype=int), TypeError, "z0 must be floating point or complex: z is torch.int64"),
        (np.cos, np.zeros(2, dtype=np.longdouble), TypeError, "expected arrays of numbers that PyTorch knows"),
        (np.cos, np.array([np.nan]), ValueError, "z0 must be finite"),
        (np.cos, (np.zeros(2), torch.zeros(2)), TypeError, "tensors alone or NumPy arrays alone"),
        (lambda z: z.astype(np.float32), np.zeros(2), ValueError, "keep the dtype of z0"),
        (lambda z: z[:1], np.zeros(2), ValueError, "keep the shape of z0"),
        (lambda z: [1.0], np.zeros(2), ValueError, "keep the shape of z0"),
        (lambda z: None, np.zeros(2), TypeError, "found NoneType"),
        (lambda z: (z, z), (np.zeros(2),), TypeError, "found 2 entries, expected 1"),
        (lambda z: {"b": z["a"]}, {"a": np.zeros(2)}, TypeError, r"found \['b'\], expected \['a'\]"),
        (lambda z: 1j, np.array(0.5), TypeError, "Cannot cast"),
    ],
)
def test_what_cannot_work_is_refused_as_it_is_for_tensors(f, z0, error, message):
    with pytest.raises(error, match=message):
        fixpoint.solve(f, z0)


def test_other_value_errors_of_f_come_through():
    def f(z):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fixpoint.solve(f, np.zeros(2))


def test_warning_and_error_carry_arrays_and_point_at_the_caller():
    def grow(z):
        return 2 * z + 1

    options = {"solver": fixpoint.Picard(), "max_evals": 3}
    with pytest.warns(fixpoint.ConvergenceWarning, match="2 of 2 rows") as caught:
        fixpoint.solve(grow, np.ones((2, 1)), **options)
    assert caught[0].filename == __file__
    with pytest.raises(fixpoint.ConvergenceError) as raised:
        fixpoint.solve(grow, np.ones((2, 1)), **options, on_failure="raise")
    assert isinstance(raised.value.solution.value, np.ndarray)


def test_a_callback_sees_arrays_and_can_stop():
    seen = []

    def stop(progress):
        seen.append(progress)
        return progress.nfev == 2

    sol = fixpoint.solve(affine, np.zeros((2, 5)), (np.ones((2, 5)),), callback=stop, on_failure="ignore", rtol=1e-12)
    assert sol.nfev == 2
    assert all(isinstance(part, np.ndarray) for part in (seen[0].value, seen[0].residual))


def test_a_problem_of_arrays_brings_its_start_rows_and_norm():
    class Problem:
        z0 = np.zeros((2, 3))
        batch_dims = 0

        def __call__(self, z):
            assert isinstance(z, np.ndarray)
            return 0.5 * z + 1

        def norm(self, z):
            assert isinstance(z, np.ndarray)
            return np.abs(z).max()

    sol = fixpoint.solve(Problem(), max_evals=1, on_failure="ignore")
    assert sol.residual.shape == ()
    assert sol.residual == 1


def test_fixed_depth():
    sol = fixpoint.solve(np.cos, np.zeros(2), solver=fixpoint.Picard(), depth=3)
    np.testing.assert_array_equal(sol.value, np.cos(np.cos(np.cos(np.zeros(2)))))


def test_states_on_the_way_are_arrays():
    sol = fixpoint.solve(np.cos, np.zeros(2), solver=fixpoint.Picard(), keep_states=(1, 3))
    np.testing.assert_array_equal(sol.states[1], np.zeros(2))
    np.testing.assert_array_equal(sol.states[3], np.cos(np.cos(np.zeros(2))))
    assert all(isinstance(state, np.ndarray) for state in sol.states.values())


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_numpy_function_returns_beside_its_state(nested):
    def f(z):
        z = 0.5 * (z["z"] if nested else z) + 1
        return {"z": z} if nested else z, {"sum": z.sum(), "array": z[0]}

    z0 = np.zeros((2, 2))
    found = fixpoint.solve(f, {"z": z0} if nested else z0, has_aux=True, rtol=1e-10)
    assert found.aux["sum"] == pytest.approx(8)
    np.testing.assert_allclose(found.aux["array"], [2, 2], rtol=1e-9)
    assert isinstance(found.aux["array"], np.ndarray)
    root = fixpoint.root(lambda x: (x**2 - 2, x.shape), np.ones((2, 2)), has_aux=True)
    assert root.aux == (2, 2)


def test_a_numpy_function_without_its_second_part_is_refused():
    with pytest.raises(TypeError, match=r"with has_aux=True f must return \(state, aux\)"):
        fixpoint.solve(lambda z: 0.5 * z, np.zeros((2, 2)), has_aux=True)
