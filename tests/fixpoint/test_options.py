"""Options of solve() that cannot work are named at once; what is handed out and taken in is kept apart."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import gc

import numpy as np
import pytest
import torch

import fixpoint
from fixpoint import IFT, Broyden, FixedPointLayer, Picard, Unroll

D = torch.float64


def halve(z):
    return 0.5 * z + 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"args": torch.ones(2, 3)},
            TypeError,
            "args must be a tuple or list of f's further arguments, found a Tensor",
        ),
        ({"args": {"x": 1}}, TypeError, "args must be a tuple or list of f's further arguments, found a dict"),
        ({"rtol": "tight"}, TypeError, "rtol must be a number or a tensor with the batch shape, found 'tight'"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a number or a tensor with the batch shape, found '1e-3'"),
        ({"atol": True}, TypeError, "atol must be a number or a tensor with the batch shape, found True"),
        ({"atol": -1}, ValueError, "atol must be at least 0, found -1"),
        ({"rtol": float("nan")}, ValueError, "rtol must be at least 0, found nan"),
        ({"max_evals": True}, TypeError, "max_evals must be an integer, found True"),
        ({"max_evals": 2.0}, TypeError, "max_evals must be an integer, found 2.0"),
        ({"batch_dims": 1.0}, TypeError, "batch_dims must be an integer, found 1.0"),
        ({"callback": 5}, TypeError, "callback must be a function of a fixpoint.Progress, or None, found 5"),
    ],
)
def test_options_that_cannot_work_are_named(options, error, message):
    for solve in (fixpoint.solve, fixpoint.root):
        with pytest.raises(error, match=message):
            solve(halve, torch.zeros(2, 3), **options)


def test_a_sparse_state_is_named():
    with pytest.raises(TypeError, match=r"z0 must be dense: z is torch\.sparse_coo"):
        fixpoint.solve(halve, torch.zeros(2, 3).to_sparse())


def test_an_f_that_wants_more_arguments_is_told_where_they_come_from():
    with pytest.raises(TypeError) as caught:
        fixpoint.solve(lambda z, x: 0.5 * z + x, torch.zeros(2, 3))
    assert "f(z, *args), here with 0 further arguments from args" in caught.value.__notes__[0]


def test_counts_may_be_numpys():
    counts = {"max_evals": np.int64(50), "check_every": np.int64(2)}
    assert fixpoint.solve(halve, torch.zeros(2, 3), solver=Picard(), **counts).converged.all()
    assert fixpoint.solve(halve, torch.zeros(2, 3), depth=np.int32(3)).nfev == 3


def test_what_a_callback_is_shown_is_its_own():
    def scale(progress):
        progress.value.mul_(100)

    solution = fixpoint.solve(halve, torch.zeros(2, 3), solver=Picard(), callback=scale, rtol=1e-6)
    torch.testing.assert_close(solution.value, torch.full((2, 3), 2.0), rtol=1e-5, atol=0)


def test_solutions_compare_by_identity():
    solution = fixpoint.solve(halve, torch.zeros(2, 3))
    assert solution == solution
    assert solution != dataclasses.replace(solution)


def test_dicts_keep_their_class():
    z0 = collections.OrderedDict(a=torch.zeros(2, 3), b=torch.zeros(2, 1))
    seen = []

    def f(z):
        seen.append(type(z))
        return {"a": 0.5 * z["a"] + 1, "b": 0.2 * z["b"]}

    assert type(fixpoint.solve(f, z0).value) is collections.OrderedDict
    assert set(seen) == {collections.OrderedDict}
    default = collections.defaultdict(list, a=torch.zeros(2, 3), b=torch.zeros(2, 1))
    assert fixpoint.solve(lambda z: {"a": 0.5 * z["a"], "b": z["b"]}, default).value["missing"] == []


def test_the_memory_format_of_z0_is_kept():
    last, seen, shift = torch.channels_last, [], torch.randn(2, 3, 4, 5)

    def f(z):
        seen.append(z.is_contiguous(memory_format=last))
        return 0.5 * z + shift

    value = fixpoint.solve(f, torch.zeros(2, 3, 4, 5).to(memory_format=last), rtol=1e-6).value
    assert all(seen)
    assert value.is_contiguous(memory_format=last)
    torch.testing.assert_close(value, 2 * shift, rtol=1e-5, atol=1e-5)


def test_a_transposed_complex_state_is_laid_out_as_it_lies():
    z0 = torch.zeros(2, 3, 4, dtype=torch.complex128).transpose(1, 2)
    shift = torch.randn(2, 4, 3, dtype=torch.complex128)
    value = fixpoint.solve(lambda z: 0.5j * z + shift, z0, rtol=1e-12).value
    torch.testing.assert_close(value, shift / (1 - 0.5j))


def test_a_warm_start_keeps_a_graph_alive_only_where_the_rule_differentiates_through_it(rule, cell_class):
    solver = Broyden() if isinstance(rule, fixpoint.SHINE) else Picard()
    layer, z, alive = FixedPointLayer(cell_class(), backward=copy.deepcopy(rule), solver=solver), None, []
    for _ in range(5):
        z = layer(torch.randn(2, 4, dtype=D), z0=z)
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert (alive[-1] - alive[1] >= 9) == rule.uses_start  # a graph that is kept holds more and more tensors
    z.sum().backward()
    with pytest.raises(RuntimeError, match="a second time") if rule.uses_start else contextlib.nullcontext():
        layer(torch.randn(2, 4, dtype=D), z0=z).sum().backward()  # the graph of the first is needed there alone


def test_a_rule_that_uses_the_start_gives_it_its_gradient(cell_class):
    layer = FixedPointLayer(cell_class(), backward=Unroll(), solver=Picard())
    z0 = torch.randn(2, 4, dtype=D, requires_grad=True)
    layer(torch.randn(2, 4, dtype=D), z0=z0, depth=3).sum().backward()
    assert z0.grad.abs().max() > 0


def test_several_incoming_gradients_at_once(rule, normal):
    W, x = 0.2 * normal(3, 3), normal(2, 3, seed=1).requires_grad_()

    def value(x):
        z0 = torch.zeros(2, 3, dtype=D)
        options = {"solver": Broyden(), "rtol": 1e-12, "on_failure": "ignore", "backward": copy.deepcopy(rule)}
        return fixpoint.solve(lambda z, x: torch.tanh(z @ W + x), z0, (x,), **options).value

    one_by_one = torch.autograd.functional.jacobian(value, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(value, x, vectorize=True), one_by_one)
    incoming = torch.eye(6, dtype=D).reshape(6, 2, 3)
    (batched,) = torch.autograd.grad(value(x), x, incoming, is_grads_batched=True)
    torch.testing.assert_close(batched.reshape(2, 3, 2, 3), one_by_one)


@pytest.mark.parametrize(("norm", "found"), [(lambda z: z.norm(), r"\(\)"), (lambda z: 1.0, "a float")])
def test_a_norm_of_another_shape_is_named(norm, found):
    with pytest.raises(ValueError, match=rf"norm must return a tensor of the batch shape \(3,\), found {found}"):
        fixpoint.solve(halve, torch.zeros(3, 2), norm=norm)


def test_an_f_that_differentiates_its_input_is_told_how():
    with pytest.raises(RuntimeError) as caught:
        fixpoint.solve(lambda z: z - torch.autograd.grad(z.square().sum(), z)[0], torch.zeros(3, 2))
    assert "torch.func.grad" in caught.value.__notes__[0]


def test_an_aux_that_was_not_announced_is_named():
    with pytest.raises(TypeError, match="pass has_aux=True if f returns"):
        fixpoint.solve(lambda z: (0.5 * z, 1), torch.zeros(3, 2))


def test_leaves_are_shown_as_a_plain_loop_shows_them():
    last = torch.channels_last
    z0 = (torch.zeros(2, 3, 4, 5).to(memory_format=last), torch.zeros(2, 3, 4))
    seen = []

    def f(z):
        seen.append(z[0].is_contiguous(memory_format=last))
        return 0.5 * z[0] + 1, (0.5 * z[1].view(-1) + 1).view(2, 3, 4)

    value = fixpoint.solve(f, z0, rtol=1e-6).value
    assert all(seen)
    torch.testing.assert_close(value, (torch.full((2, 3, 4, 5), 2.0), torch.full((2, 3, 4), 2.0)), rtol=1e-5, atol=0)


def test_second_derivatives_with_several_incoming_gradients_at_once(normal):
    x = normal(1, 3).requires_grad_()

    def value(x):
        z0 = torch.zeros(1, 3, dtype=D)
        rule = IFT(rtol=1e-12)
        return fixpoint.solve(lambda z, x: torch.tanh(0.3 * z.flip(1) + x), z0, (x,), rtol=1e-12, backward=rule).value

    found, expected = (
        torch.autograd.functional.jacobian(value, x, create_graph=True, vectorize=vectorize)
        for vectorize in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_a_single_number_of_evaluations_to_keep_is_named():
    with pytest.raises(TypeError, match=r"keep_states must be a tuple of numbers of evaluations, found 3"):
        fixpoint.solve(halve, torch.zeros(3, 2), keep_states=3)
    found = fixpoint.solve(halve, torch.zeros(3, 2), keep_states=(n for n in (1,)))
    assert list(found.states) == [1]


def test_a_number_of_numpys_is_a_tolerance_of_the_adjoint_too():
    assert fixpoint.IFT(rtol=np.array(1e-3)).rtol == 1e-3


def test_rows_that_disagree_are_told_of_whole_states():
    with pytest.raises(ValueError, match=r"z\[0\] has \(3,\), z\[1\] has \(5,\); pass batch_dims=0 if the whole state"):
        fixpoint.solve(lambda z: z, [torch.zeros(3, 2), torch.zeros(5, 2)])


@pytest.mark.parametrize("z0", [torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64)], ids=["rows", "dtype"])
def test_an_error_of_f_says_what_f_was_given(z0):
    x = torch.ones(4, 3)
    with pytest.raises(RuntimeError) as caught:
        fixpoint.solve(lambda z, options: z @ torch.eye(3) + options["x"], z0, ({"x": x},))
    assert caught.value.__notes__ == [
        f"f was given z {tuple(z0.shape)} {str(z0.dtype)[6:]}, args[0]['x'] (4, 3) float32"
    ]


def test_one_evaluation_is_named_in_the_singular():
    solution = fixpoint.solve(lambda z: z + 1, torch.zeros(2, 3), max_evals=1, on_failure="ignore")
    assert "did not converge in 1 evaluation, worst" in solution.failure_message()


def test_an_error_of_a_numpy_function_says_what_it_was_given():
    with pytest.raises(TypeError) as caught:
        fixpoint.solve(torch.cos, np.zeros(3))
    assert caught.value.__notes__[-1] == "f was given z (3,) float64"


def test_a_tolerance_of_the_adjoint_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="rtol must be a number, found '1e-3'"):
        IFT(rtol="1e-3")
