"""What f may do: take gradients, write into buffers of its own, be handed inference tensors, detach its input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import autograd, nn

import fixpoint
from fixpoint import IFT, JFB, Anderson, Broyden, Neumann, Picard

D = torch.float64


def energy_step(z, a, x):
    """A gradient step on ``0.5 a (z - x)^2``, whose fixed point is x."""
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        (gradient,) = autograd.grad((0.5 * a * (z - x) ** 2).sum(), z, create_graph=True)
    return z - 0.3 * gradient


@pytest.mark.parametrize("rule", [IFT(), JFB(), Neumann(terms=5), fixpoint.Unroll()], ids=repr)
def test_f_may_take_the_gradient_of_an_energy(rule):
    a, x = torch.tensor(2.0, requires_grad=True), torch.tensor([[1.0], [3.0]])
    solution = fixpoint.solve(energy_step, torch.zeros(2, 1), (a, x), backward=rule)
    torch.testing.assert_close(solution.value.detach(), x, rtol=1e-4, atol=1e-4)
    assert solution.nfev > 1
    solution.value.sum().backward()
    torch.testing.assert_close(a.grad, torch.tensor(0.0), rtol=0, atol=1e-3)  # the minimum does not depend on a


def test_f_may_mark_its_input_as_a_leaf():
    a, x = torch.tensor(2.0, requires_grad=True), torch.tensor([[1.0], [3.0]])

    def f(z, a, x):
        with torch.enable_grad():
            z.requires_grad_()
            return z - 0.3 * autograd.grad((0.5 * a * (z - x) ** 2).sum(), z, create_graph=True)[0]

    value = fixpoint.solve(f, torch.zeros(2, 1), (a, x)).value
    torch.testing.assert_close(value.detach(), x, rtol=1e-4, atol=1e-4)


def test_an_energy_of_a_convolution_has_the_gradient_of_the_unrolled_loop(normal):
    conv, x = nn.Conv2d(1, 3, 3, padding=1, dtype=D), normal(2, 1, 5, 5)

    def f(z, x):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = 0.1 * torch.tanh(conv(z)).square().sum() + 0.5 * (z - x).square().sum()
            return z - 0.3 * autograd.grad(energy, z, create_graph=True)[0]

    value = fixpoint.solve(f, torch.zeros_like(x), (x,), rtol=1e-11, backward=IFT(rtol=1e-11)).value
    z = torch.zeros_like(x).requires_grad_()
    for _ in range(100):
        z = f(z, x)
    expected = autograd.grad(z.square().sum(), conv.weight)
    torch.testing.assert_close(autograd.grad(value.square().sum(), conv.weight), expected, rtol=1e-6, atol=1e-9)


def test_f_may_use_the_gradients_of_torch_func():
    a = torch.tensor(1.0, dtype=D, requires_grad=True)

    def f(z, a):  # z^3 + a z = 1
        return z - 0.3 * torch.func.grad(lambda z: (z**4 / 4 + a * z**2 / 2 - z).sum())(z)

    value = fixpoint.solve(f, torch.zeros(1, 1, dtype=D), (a,), rtol=1e-12).value
    assert round(float(value), 5) == 0.68233
    (gradient,) = autograd.grad(value.sum(), a)
    torch.testing.assert_close(gradient, -value.detach().squeeze() / (3 * value.detach().squeeze() ** 2 + 1))
    assert round(float(gradient), 5) == -0.28469


def buffered(kind):
    """``0.5 z + 1`` written into memory that f keeps."""
    A, buffers, calls = 0.5 * torch.eye(3), [torch.empty(1, 3), torch.empty(1, 3)], [0]
    array = np.empty((1, 3), dtype=np.float32)

    def f(z):
        calls[0] += 1
        if kind == "numpy":
            array[:] = z.numpy() @ A.numpy() + 1
            return torch.from_numpy(array)
        buffer = buffers[calls[0] % 2 if kind == "two in turn" else 0]
        torch.mm(z, A, out=buffer)
        buffer.add_(1)
        return {"view": buffer[:], "detached": buffer.detach()}.get(kind, buffer)

    return f


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("kind", ["one", "view", "detached", "two in turn", "numpy"])
def test_f_may_return_a_buffer_that_it_writes_to_again(solver, kind):
    z0 = torch.zeros(1, 3)
    with torch.no_grad():
        found = fixpoint.solve(buffered(kind), z0, solver=solver, rtol=1e-5)
        fresh = fixpoint.solve(lambda z: z @ (0.5 * torch.eye(3)) + 1, z0, solver=solver, rtol=1e-5)
    assert torch.equal(found.value, fresh.value)
    assert found.nfev == fresh.nfev
    torch.testing.assert_close(found.value, torch.full((1, 3), 2.0), rtol=1e-4, atol=0)


def test_a_buffer_that_f_begins_to_keep_later_is_noticed():
    buffer, calls = torch.empty(1, 3), [0]

    def f(z):
        calls[0] += 1
        return 0.5 * z + 1 if calls[0] < 3 else torch.add(0.5 * z, 1, out=buffer)

    with torch.no_grad():
        value = fixpoint.solve(f, torch.zeros(1, 3), solver=Picard(), rtol=1e-6).value
    torch.testing.assert_close(value, torch.full((1, 3), 2.0), rtol=1e-5, atol=0)


def test_an_output_that_nobody_else_holds_is_not_copied():
    returned = []

    def f(z):
        out = 0.5 * z + 1
        returned.append(out.data_ptr())
        return out

    seen = []
    with torch.no_grad():
        fixpoint.solve(lambda z: (seen.append(z.data_ptr()), f(z))[1], torch.zeros(64, 64), solver=Picard())
    assert seen[2:] == returned[1:-1]  # the first one is copied


@pytest.mark.parametrize("late", [1, 3])
def test_a_change_of_the_input_is_refused_at_any_evaluation(late):
    calls = [0]

    def f(z):
        calls[0] += 1
        return z.mul_(0.5).add_(1) if calls[0] == late else 0.5 * z + 1

    with torch.no_grad(), pytest.raises(ValueError, match="changed its input in place"):
        fixpoint.solve(f, torch.zeros(1, 3), solver=Picard())


def test_tensors_of_inference_mode_are_arguments_like_others(rule, normal, cell_class):
    x = normal(2, 4)
    with torch.inference_mode():
        inference = x.clone()
    gradients = []
    for argument in (x, inference):
        f = cell_class()
        value = fixpoint.solve(
            f, torch.zeros(2, 4, dtype=D), (argument,), solver=Broyden(), backward=copy.deepcopy(rule)
        ).value
        gradients.append(autograd.grad(value.square().sum(), f.W)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=repr)
def test_an_image_may_be_a_view_that_negates(solver):
    """PyTorch changes the sign of the imaginary part of a conjugate when somebody reads it; NumPy could not."""

    def f(z, rate):
        image = torch.complex(z, -rate * torch.sin(z) - 1).conj().imag
        assert image.is_neg()
        return image

    z0, rate = torch.zeros(2, 3, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    expected = fixpoint.solve(lambda z, rate: rate * torch.sin(z) + 1, z0, args=(rate,), solver=solver)
    with torch.inference_mode():
        torch.testing.assert_close(fixpoint.solve(f, z0, args=(rate,), solver=solver).value, expected.value.detach())
    unrolled = fixpoint.solve(f, z0, args=(rate,), solver=solver, backward=fixpoint.Unroll())
    torch.testing.assert_close(unrolled.value, expected.value)
    state = solver.init(z0)
    proposal, _ = solver.step(z0, f(z0, rate.detach()), state)
    torch.testing.assert_close(proposal, torch.ones_like(z0))


def test_an_f_that_detaches_its_input_is_named():
    a = torch.tensor(0.5, requires_grad=True)
    with pytest.warns(UserWarning, match="f's output depends on z, but not as far as autograd can see"):
        fixpoint.solve(lambda z: a * torch.cos(z.detach()), torch.zeros(1, 1))


@pytest.mark.parametrize("f", [lambda z, a: a * torch.ones_like(z), lambda z, a: a * torch.ones_like(z) + 0 * z])
def test_a_constant_f_is_no_reason_to_warn(f):
    a = torch.tensor(0.5, requires_grad=True)
    value = fixpoint.solve(f, torch.zeros(1, 1), (a,)).value  # a warning would be an error
    assert float(autograd.grad(value.sum(), a)[0]) == 1


def test_an_auxiliary_output_is_that_of_the_solution():
    a = torch.tensor(0.5, dtype=D, requires_grad=True)

    def f(z):
        return a * z + 1, {"sum": a * z.sum(), "calls": "any object"}

    solution = fixpoint.solve(f, torch.zeros(2, 3, dtype=D), has_aux=True, rtol=1e-12)
    torch.testing.assert_close(solution.aux["sum"].detach(), torch.tensor(6.0, dtype=D))
    assert solution.aux["calls"] == "any object"
    # d/da of 6 a / (1 - a)
    torch.testing.assert_close(autograd.grad(solution.aux["sum"], a)[0], torch.tensor(24.0, dtype=D))
    detached = fixpoint.solve(f, torch.zeros(2, 3, dtype=D), has_aux=True, backward=None).aux["sum"]
    assert detached == 6
    assert not detached.requires_grad
    assert fixpoint.solve(lambda z: 0.5 * z, torch.ones(1, 1)).aux is None
    with pytest.raises(TypeError, match=r"must return \(state, aux\), found Tensor"):
        fixpoint.solve(lambda z: z, torch.ones(1, 1), has_aux=True)
