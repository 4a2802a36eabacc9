"""IFT and the truncated rules under torch.func, against the same transformations of plain iteration."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import fixpoint
from fixpoint import IFT, JFB, Anderson, Broyden, ConvergenceWarning, Phantom, Picard, StochasticJFB, Unroll
from tests.fixpoint.differentiated import EXACT, TIGHT, Z0, D, f, iterated, solved, squared

# torch.func's own rules for some products still use a deprecated part of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def assert_same(transform):
    for found, wanted in zip(tree_leaves(transform(solved)), tree_leaves(transform(iterated)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def close_over_one(A, b):
    return fixpoint.solve(lambda z, b: f(z, A, b), Z0, (b,), backward=EXACT, **TIGHT).value


TRANSFORMS = {
    "grad": lambda s, A, b: grad(squared(s), argnums=(0, 1))(A, b),
    "vjp": lambda s, A, b: vjp(s, A, b)[1](b),
    "jvp": lambda s, A, b: jvp(s, (A, b), (A + 1, b)),
    "jvp in one argument": lambda s, A, b: jvp(lambda b: s(A, b), (b,), (b,)),
    "jacrev": lambda s, A, b: jacrev(s, argnums=(0, 1))(A, b),
    "jacfwd": lambda s, A, b: jacfwd(s, argnums=(0, 1))(A, b),
    "hessian": lambda s, A, b: hessian(squared(s), argnums=(0, 1))(A, b),
    "jacrev of jacrev": lambda s, A, b: jacrev(jacrev(squared(s), argnums=1))(A, b),
    "jacrev of jacfwd": lambda s, A, b: jacrev(jacfwd(squared(s), argnums=1))(A, b),
    "jacfwd of jacfwd": lambda s, A, b: jacfwd(jacfwd(squared(s), argnums=1))(A, b),
    "gradient of a gradient": lambda s, A, b: grad(lambda A: grad(squared(s))(A, b).square().sum())(A),
    "vmap": lambda s, A, b: vmap(s, in_dims=(0, None))(torch.stack([A, -A, A / 2]), b),
    "vmap in other dimensions": lambda s, A, b: vmap(s, (2, 1), 1)(torch.stack([A, -A], 2), torch.stack([b, 2 * b], 1)),
    "vmap of vmap": lambda s, A, b: vmap(vmap(s, (0, None)), (None, 0))(torch.stack([A, -A]), torch.stack([b, 2 * b])),
    "per-sample gradients": lambda s, A, b: vmap(grad(squared(s)), (None, 0))(A, torch.stack([b, 2 * b, 0 * b])),
    "per-sample hessians": lambda s, A, b: vmap(hessian(squared(s), argnums=1), (0, None))(torch.stack([A, -A]), b),
    "gradient of a sum over vmap": lambda s, A, b: grad(lambda A: vmap(lambda b: s(A, b))(torch.stack([b, -b])).sum())(
        A
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_equal_those_of_plain_iteration(A, b, name):
    assert_same(lambda s: TRANSFORMS[name](s, A, b))


@pytest.mark.parametrize("name", ["grad", "jvp", "per-sample gradients"])
def test_transformations_work_with_every_solver(normal, solver, name):
    A, b = 0.2 * normal(6, 6), normal(2, 6, seed=1)
    z0 = torch.zeros(2, 6, dtype=D)
    rule = IFT(solver=solver, rtol=1e-12, max_evals=500)

    def found(A, b):
        return fixpoint.solve(f, z0, (A, b), solver=solver, backward=rule, rtol=1e-12, max_evals=500).value

    def wanted(A, b):
        z = z0
        for _ in range(100):
            z = f(z, A, b)
        return z

    for one, other in zip(*(tree_leaves(TRANSFORMS[name](s, A, b)) for s in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_a_layer_gives_per_sample_gradients_and_hessians_of_its_parameters(normal, cell_class):
    cell, x = cell_class(dim=3), normal(5, 2, 3)
    layer = fixpoint.FixedPointLayer(cell, backward=EXACT, **TIGHT)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["f.W"]
    for one, sample in zip(together, x, strict=True):
        (alone,) = torch.autograd.grad(layer(sample).square().sum(), cell.W)
        torch.testing.assert_close(one, alone, rtol=1e-8, atol=1e-10)
    curvature = hessian(loss)(parameters, x[0])["f.W"]["f.W"]
    (first,) = torch.autograd.grad(layer(x[0]).square().sum(), cell.W, create_graph=True)
    (row,) = torch.autograd.grad(first[0, 1], cell.W)
    torch.testing.assert_close(curvature[0, 1], row, rtol=1e-7, atol=1e-9)


def test_each_member_of_a_vmap_stops_and_reports_for_itself(A, b, counted):
    batch = torch.stack([b, 0 * b, 100 * b])
    cell = counted(f)

    def figures(b):
        sol = fixpoint.solve(cell, Z0, (A, b), record=True, rtol=1e-10)
        return sol.evals, sol.status, sol.residual, sol.trace

    evals, status, residual, trace = vmap(figures, out_dims=(0, 0, 0, 1))(batch)
    alone = [fixpoint.solve(f, Z0, (A, one), record=True, rtol=1e-10) for one in batch]
    assert evals.tolist() == [one.evals.tolist() for one in alone]
    assert status.tolist() == [[0, 0]] * 3
    torch.testing.assert_close(residual, torch.stack([one.residual for one in alone]), rtol=1e-3, atol=1e-15)
    assert trace.shape == (int(evals.max()), 3, 2)
    assert cell.calls == int(evals.max()) + 1  # one to see what f depends on


@pytest.mark.parametrize("depth", [0, 2])
def test_what_was_recorded_of_a_fixed_depth_is_there_under_transformations(A, b, depth):
    def trace(b):
        return fixpoint.solve(f, Z0, (A, b), record=True, depth=depth).trace

    assert vmap(trace, out_dims=1)(b.expand(3, *b.shape)).shape == (depth, 3, 2)
    torch.testing.assert_close(vmap(trace)(b[None])[0], trace(b))


def test_failures_under_vmap_are_counted_over_the_whole_batch(A, b):
    batch = torch.stack([b, 0 * b, -b])
    with pytest.warns(ConvergenceWarning, match="4 of 6 rows did not converge"):
        vmap(lambda b: fixpoint.solve(f, Z0, (A, b), rtol=1e-10, max_evals=2).value)(batch)
    with pytest.raises(fixpoint.ConvergenceError, match="4 of 6"):
        vmap(lambda b: fixpoint.solve(f, Z0, (A, b), rtol=1e-10, max_evals=2, on_failure="raise").value)(batch)
    rule = IFT(rtol=1e-12, max_evals=2)
    with pytest.warns(ConvergenceWarning, match="6 of 6 adjoint rows"):
        vmap(grad(squared(lambda A, b: solved(A, b, backward=rule))), (None, 0))(A, batch + 0.1)


def test_integer_arguments_go_along():
    table = torch.tensor([0.1, 0.2, 0.4], dtype=D)

    def value(a, label):
        g = lambda z, table, label: (table * (torch.arange(3) == label)).sum() * z + 1  # noqa: E731
        return fixpoint.solve(g, torch.zeros((), dtype=D), (a, label), backward=EXACT, **TIGHT).value

    found = vmap(grad(value), (None, 0))(table, torch.arange(3))
    torch.testing.assert_close(found, torch.diag(1 / (1 - table) ** 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outer", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("inner", ["none", "grad", "jvp", "vmap"])
def test_a_closure_over_what_is_transformed_is_refused_at_any_level(A, b, outer, inner):
    def lift(name, g, x):
        if name == "none":
            return g(x)
        transform = {
            "grad": lambda: grad(lambda x: g(x).sum())(x),
            "jvp": lambda: jvp(g, (x,), (x,))[1],
            "vmap": lambda: vmap(g)(torch.stack([x, x])),
        }
        return transform[name]()

    with pytest.raises(ValueError, match="closes over"):
        lift(outer, lambda A: lift(inner, lambda b: close_over_one(A, b), b), A)
    assert_same(lambda s: lift(outer, lambda A: lift(inner, lambda b: s(A, b), b), A))


def test_a_closure_over_parameters_is_refused_under_transformations(A, b):
    A = A.requires_grad_()
    with pytest.raises(ValueError, match="closes over"):
        grad(lambda b: close_over_one(A, b).sum())(b)
    frozen = A.detach()
    torch.testing.assert_close(
        grad(lambda b: close_over_one(frozen, b).sum())(b), grad(lambda b: iterated(frozen, b).sum())(b)
    )


def test_a_closure_over_a_dual_tensor_is_refused(A, b):
    for rule in (EXACT, JFB()):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(A, A)
            with pytest.raises(ValueError, match="closes over"):
                fixpoint.solve(lambda z, dual=dual: f(z, dual, b), Z0, backward=rule)


def test_a_solve_that_the_transformation_does_not_touch_may_stand_inside_one(A, b):
    def shifted(z):
        return f(z, A, b) + torch.zeros(3, dtype=D)  # what is made inside a transformation is wrapped by it

    found = grad(lambda scale: (scale * fixpoint.solve(shifted, Z0, **TIGHT).value).sum())(torch.tensor(2.0, dtype=D))
    torch.testing.assert_close(found, iterated(A, b).sum())


@pytest.mark.parametrize("rule", [JFB(), Phantom(steps=3, damping=0.5), StochasticJFB(max_no_grad=0, max_grad=1)])
def test_truncated_rules_under_transformations_equal_their_plain_gradients(A, b, rule):
    batch = torch.stack([b, 2 * b])
    A = A.requires_grad_()

    def loss(A, b):
        return solved(A, b, backward=rule).square().sum()

    expected = torch.stack([torch.autograd.grad(loss(A, one), A)[0] for one in batch])
    per_sample = vmap(grad(loss), (None, 0), randomness="same")(A.detach(), batch)
    torch.testing.assert_close(per_sample, expected, rtol=1e-9, atol=1e-11)
    _, tangent = jvp(lambda A: loss(A, b), (A.detach(),), (A.detach(),))
    torch.testing.assert_close(tangent, (expected[0] * A.detach()).sum(), rtol=1e-9, atol=1e-11)


def test_unsupported_combinations_say_so(A, b):
    with pytest.raises(ValueError, match="callback and keep_states"):
        grad(lambda A: solved(A, b, callback=lambda progress: None).sum())(A)
    for rule in (fixpoint.Reversible(), fixpoint.Neumann(terms=2), fixpoint.SHINE()):
        with pytest.raises(ValueError, match=r"under torch\.func"):
            grad(lambda A, rule=rule: solved(A, b, solver=fixpoint.Broyden(), backward=rule).sum())(A)
    with pytest.raises(ValueError, match="fixed depth"):
        vmap(lambda b: solved(A, b, backward=Unroll()))(torch.stack([b, b]))


@pytest.mark.parametrize(
    "solver", [Anderson(), Anderson(memory=2, history_dtype=torch.float32), Broyden(), Broyden(memory=3)], ids=repr
)
def test_solvers_with_histories_are_unrolled_under_transformations(A, b, solver):
    batch = torch.stack([b, 2 * b])

    def value(A, b):
        return solved(A, b, backward=Unroll(), solver=solver, depth=7).square().sum()

    together = vmap(value, (None, 0))(A, batch)
    gradients = vmap(grad(value), (None, 0))(A, batch)
    _, tangent = jvp(lambda A: value(A, b), (A,), (A,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(value(forward_ad.make_dual(A, A), b)).tangent
    A.requires_grad_()
    alone = [value(A, sample) for sample in batch]
    wanted = [torch.autograd.grad(one, A)[0] for one in alone]
    same = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(together, torch.stack(alone).detach(), **same)
    torch.testing.assert_close(gradients, torch.stack(wanted), **same)
    for found in (tangent, dual):
        torch.testing.assert_close(found, (wanted[0] * A.detach()).sum(), **same)


@pytest.mark.parametrize("rule", [Unroll(), IFT(), JFB()], ids=repr)
def test_a_fixed_depth_works_under_transformations(A, b, rule):
    batch = torch.stack([b, 2 * b])

    def loss(A, b):
        return solved(A, b, backward=rule, solver=Picard(), depth=60).square().sum()

    together = vmap(grad(loss), (None, 0))(A, batch)
    for one, sample in zip(together, batch, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(loss(A.requires_grad_(), sample), A)[0])


@pytest.mark.parametrize(
    "rule",
    [fixpoint.Phantom(steps=60), fixpoint.MultiStepJFB(no_grad=40, grad=60)],
    ids=lambda rule: type(rule).__name__,
)
def test_forward_mode_nested_in_itself(rule):
    # It gave 0: the second derivative got lost where the value is handed over.
    def value(a):
        z0 = torch.zeros(2, 1, dtype=torch.float64)
        f = lambda z, a: 0.5 * torch.sin(a * z) + a  # noqa: E731
        return fixpoint.solve(f, z0, (a,), backward=rule, rtol=1e-12, on_failure="ignore").value.sum()

    def looped(a):
        z = torch.zeros(2, 1, dtype=torch.float64)
        for _ in range(100):
            z = 0.5 * torch.sin(a * z) + a
        return z.sum()

    a = torch.tensor(0.7, dtype=torch.float64)
    twice = lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(a)  # noqa: E731
    torch.testing.assert_close(twice(value), twice(looped), rtol=1e-8, atol=0)


def test_tolerances_for_each_row_under_torch_func():
    def value(a):
        rtol = torch.full((2,), 1e-12, dtype=torch.float64)
        z0 = torch.zeros(2, 1, dtype=torch.float64)
        return fixpoint.solve(lambda z, a: a * z + 1, z0, (a,), rtol=rtol).value.sum()

    a = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(value)(a), torch.tensor(8.0, dtype=torch.float64))

    def mapped(r):
        return fixpoint.solve(lambda z: 0.5 * z + 1, torch.zeros(3, 2), rtol=r).value

    with pytest.raises(ValueError, match="rtol must be the same for all members"):
        torch.func.vmap(mapped)(torch.full((2, 3), 1e-3))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rule", [EXACT, fixpoint.Neumann(terms=5), fixpoint.SHINE(refine=2)], ids=repr)
def test_a_backward_is_linear_in_its_gradient_for_torch_func_too(A, b, rule, create_graph):
    b = b.clone().requires_grad_()  # f closes over it
    solver = Broyden() if isinstance(rule, fixpoint.SHINE) else Picard()
    z = fixpoint.solve(lambda z: f(z, A, b), Z0, solver=solver, backward=rule, **TIGHT).value
    v, direction = torch.cos(z.detach()), torch.sin(z.detach())

    def pulled(v):
        return torch.autograd.grad(z, b, v, retain_graph=True, create_graph=create_graph)[0]

    found, moved = jvp(pulled, (v,), (direction,))
    torch.testing.assert_close(found, pulled(v))
    torch.testing.assert_close(moved, pulled(direction))
    both = torch.stack((v, direction))
    expected = torch.stack([*map(pulled, both)])
    torch.testing.assert_close(vmap(pulled)(both), expected)
    torch.testing.assert_close(vmap(lambda moving: jvp(pulled, (v,), (moving,))[1])(both), expected)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(pulled(forward_ad.make_dual(v, direction))).tangent
    torch.testing.assert_close(moved, pulled(direction))


def test_what_the_backward_of_reversible_cannot_do_is_said(A, b):
    b = b.clone().requires_grad_()
    z = fixpoint.solve(f, Z0, (A, b), backward=fixpoint.Reversible()).value
    pulled = lambda v: torch.autograd.grad(z, b, v, retain_graph=True)[0].sum()  # noqa: E731
    v = torch.ones_like(z)
    for transformed in (vmap(pulled), lambda v: grad(pulled)(v[0]), lambda v: jacfwd(pulled)(v[0])):
        with pytest.raises(ValueError, match=r"backward of Reversible\(\) does not work under torch.func"):
            transformed(v[None])
