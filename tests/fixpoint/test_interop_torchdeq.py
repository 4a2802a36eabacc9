"""Our solvers inside torchdeq: a model trained both ways, options mapped or refused."""

from __future__ import annotations

import threading

import pytest
import torch

import fixpoint
from fixpoint.interop import torchdeq as bridge

torchdeq = pytest.importorskip("torchdeq", reason="torchdeq is in the extra 'benchmarks'")
OURS = ("fixpoint_picard", "fixpoint_anderson", "fixpoint_broyden")
GRADIENTS = ({"ift": True}, {"hook_ift": True}, {"grad": 3}, {"grad": 2, "tau": 0.8})
TIGHT = {"f_tol": 1e-10, "b_tol": 1e-10, "f_max_iter": 80, "b_max_iter": 80}


@pytest.fixture(autouse=True)
def registered():
    bridge.register()


@pytest.fixture
def run():
    """``run(name, **options)``: one of our registered solvers on a linear contraction whose solution is 2."""

    def call(name, z0=None, **options):
        solver = torchdeq.solver.get_solver(name)
        return solver(lambda z: 0.5 * z + 1, torch.zeros(3, 4) if z0 is None else z0, **options)

    return call


class Classifier(torch.nn.Module):
    """A small DEQ: points in the plane to two classes through an equilibrium of width 8."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(2, 8, dtype=torch.float64)
        self.cell = torch.nn.Linear(8, 8, dtype=torch.float64)
        self.head = torch.nn.Linear(8, 2, dtype=torch.float64)
        self.deq = torchdeq.get_deq(**options)

    def forward(self, points):
        x = self.embed(points)
        weight = 0.8 * self.cell.weight / torch.linalg.matrix_norm(self.cell.weight, ord=2)
        z, self.info = self.deq(lambda z: torch.tanh(z @ weight.T + self.cell.bias + x), torch.zeros_like(x))
        return self.head(z[-1])


def losses_and_gradient(steps=30, **options):
    """Train on points inside and outside a circle; losses, and the gradient of all parameters at the first step."""
    model = Classifier(**TIGHT, **options)
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    labels = (points.norm(dim=1) > 1).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = torch.nn.functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        losses.append(loss.item())
    return losses, gradient


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_gradients_equal_those_with_torchdeqs_own_solver(gradient, core):
    theirs = losses_and_gradient(1, core=core, f_solver="broyden", b_solver="broyden", **gradient)[1]
    for name in OURS:
        ours = losses_and_gradient(1, core=core, f_solver=name, b_solver=name, **gradient)[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gradient", GRADIENTS[:3], ids=str)
def test_training_goes_the_same_way(gradient):
    theirs, _ = losses_and_gradient(f_solver="broyden", b_solver="broyden", **gradient)
    ours, _ = losses_and_gradient(f_solver="fixpoint_anderson", b_solver="fixpoint_anderson", **gradient)
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_state_of_several_tensors_and_evaluation_mode():
    deq = torchdeq.get_deq(f_solver="fixpoint_anderson", f_tol=1e-6).eval()
    z, info = deq(lambda a, b: (0.5 * a + b.mean(1, keepdim=True), 0.3 * b + 1), (torch.zeros(3, 2), torch.zeros(3, 4)))
    a, b = z[-1]
    torch.testing.assert_close(b, torch.full((3, 4), 1 / 0.7))
    torch.testing.assert_close(a, torch.full((3, 2), 2 / 0.7))
    assert info["abs_lowest"].shape == (3,)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("z0", [torch.zeros(()), torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 2, 2)], ids=str)
def test_statistics_are_those_of_the_state_handed_back(run, name, z0):
    z, states, info = run(name, z0, max_iter=40, tol=1e-4)
    assert z.shape == z0.shape
    assert states == []
    rows = z.reshape(-1, 1) if z.ndim < 2 else z.flatten(1)
    residual = (0.5 * rows + 1 - rows).norm(dim=1)
    assert (info["abs_lowest"] <= 1e-4).all()
    torch.testing.assert_close(info["abs_lowest"], residual, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(info["rel_lowest"], residual / (0.5 * rows + 1).norm(dim=1), rtol=1e-3, atol=1e-6)
    assert info["abs_trace"].shape == info["rel_trace"].shape == (len(rows), 40)
    torch.testing.assert_close(info["abs_trace"][:, -1], info["abs_lowest"])
    torch.testing.assert_close(info["rel_trace"][:, -1], info["rel_lowest"])
    assert (info["nstep"] <= 40).all()


def test_relative_trace_divides_by_the_norm_of_the_image(run):
    _, _, info = run("fixpoint_picard", max_iter=3, tol=0)
    z = torch.tensor([0.0, 1.0, 1.5])
    torch.testing.assert_close(info["rel_trace"], ((1 - 0.5 * z) / (0.5 * z + 1)).expand(3, 3))


def test_an_f_that_draws_beside_another_thread_has_its_statistics():
    solver, stop = torchdeq.solver.get_solver("fixpoint_picard"), threading.Event()
    sizes = []

    def f(z):
        fz = 0.4 * torch.dropout(z + 1, 0.5, True)
        sizes.append(fz.norm(dim=1))
        return fz

    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:  # f is then evaluated once more, to see which thread has drawn
        *_, info = solver(f, torch.zeros(3, 4), max_iter=40)
    finally:
        stop.set()
        thread.join()
    assert info["rel_trace"].shape == info["abs_trace"].shape
    torch.testing.assert_close(info["rel_trace"][:, -1], info["rel_lowest"])
    nfev = len(sizes) - 1
    assert torch.equal(sizes[0], sizes[1])
    assert 2 < nfev < 40
    torch.testing.assert_close(
        info["rel_trace"][:, :nfev], info["abs_trace"][:, :nfev] / torch.stack(sizes[1:], dim=1), equal_nan=True
    )


def test_stop_modes(run):
    """The solution is 2 in each of 4 entries, so a relative tolerance is four times as loose as an absolute one."""
    steps = {mode: run("fixpoint_picard", tol=2.0**-10, stop_mode=mode)[2]["nstep"] for mode in ("abs", "rel")}
    # ||f(z) - z|| = 2 * 2^-k at the k-th state from 0, and ||f(z)|| is just under 4.
    assert (steps["abs"] == 12).all()
    assert (steps["rel"] == 11).all()
    with pytest.raises(ValueError, match="stop_mode must be 'abs' or 'rel', found 'both'"):
        run("fixpoint_picard", stop_mode="both")


@pytest.mark.parametrize(
    ("name", "options", "solver"),
    [
        ("fixpoint_picard", {"tau": 0.5}, fixpoint.Picard(damping=0.5)),
        ("fixpoint_picard", {"damping": 0.5}, fixpoint.Picard(damping=0.5)),
        ("fixpoint_anderson", {"m": 2, "tau": 0.5}, fixpoint.Anderson(memory=2, damping=0.5)),
        ("fixpoint_anderson", {"m": None}, fixpoint.Anderson()),
        ("fixpoint_broyden", {"LBFGS_thres": 3}, fixpoint.Broyden(memory=3)),
        ("fixpoint_broyden", {"LBFGS_thres": None}, fixpoint.Broyden()),
    ],
    ids=str,
)
def test_options_are_mapped(name, options, solver):
    def f(z):
        return torch.cos(z) * torch.tensor([0.3, 0.9, 1.5])

    z, _, info = torchdeq.solver.get_solver(name)(f, torch.zeros(2, 3), max_iter=6, tol=1e-9, **options)
    expected = fixpoint.solve(f, torch.zeros(2, 3), solver=solver, atol=1e-9, rtol=0, max_evals=6, on_failure="ignore")
    assert torch.equal(z, expected.value)
    assert torch.equal(info["abs_lowest"], expected.residual)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixpoint_anderson", {"lam": 1e-4}, "fixpoint_anderson takes no option 'lam': it is an absolute ridge"),
        ("fixpoint_broyden", {"ls": True}, "no line search"),
        ("fixpoint_picard", {"m": 5}, r"fixpoint_picard: unknown option 'm', expected one of \['tau', 'damping'\]"),
        ("fixpoint_anderson", {"mm": 5}, "unknown option 'mm'"),
    ],
)
def test_options_without_a_counterpart_are_refused(run, name, options, message):
    with pytest.raises(TypeError, match=message):
        run(name, **options)


def test_indexing_gives_one_state_for_each_index(run):
    z, states, info = run("fixpoint_picard", max_iter=30, tol=1e-3, indexing=[1, 3, 25, 30])
    assert 3 < int(info["nstep"].max()) < 25
    for state, expected in zip(states, (0.0, 1.5, float(z[0, 0]), float(z[0, 0])), strict=True):
        torch.testing.assert_close(state, torch.full((3, 4), expected))


def test_the_last_index_is_the_solution_even_where_the_last_evaluation_was_not_the_best():
    z, states, _ = torchdeq.solver.get_solver("fixpoint_picard")(
        lambda z: 2 * z + 1, torch.zeros(2, 3), max_iter=4, indexing=[2, 4]
    )
    assert (z == 0).all(), "z0 has the smallest residual"
    assert (states[0] == 1).all()
    assert torch.equal(states[1], z)


def test_corrections_along_the_way_train_in_both_cores():
    for core, states in (("indexing", 3), ("sliced", 3)):
        deq = torchdeq.get_deq(core=core, f_solver="fixpoint_anderson", n_states=states, f_max_iter=9, f_tol=0.0)
        w = torch.tensor(0.5, requires_grad=True)
        out, _ = deq(lambda z, w=w: w * torch.cos(z), torch.zeros(2, 3))
        assert len(out) == states
        sum(z.sum() for z in out).backward()
        assert w.grad.isfinite()


def test_return_final_gives_the_state_after_so_many_updates(run):
    z, states, info = run("fixpoint_picard", max_iter=3, return_final=True, indexing=[3])
    torch.testing.assert_close(z, torch.full((3, 4), 1.75))
    assert torch.equal(states[0], z)
    assert info["abs_lowest"].isnan().all(), "nobody evaluated that state"
    torch.testing.assert_close(info["abs_trace"][0], torch.tensor([2.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match=r"no state but the last, found indexing=\[1, 3\]"):
        run("fixpoint_picard", max_iter=3, return_final=True, indexing=[1, 3])


def test_no_iteration_at_all_hands_back_the_start(run):
    z, _, info = run("fixpoint_anderson", max_iter=0)
    assert torch.equal(z, torch.zeros(3, 4))
    assert info["abs_trace"].shape == (3, 0)


def test_one_bad_sample_harms_no_other():
    def f(z):
        return torch.where(torch.arange(3)[:, None] == 1, torch.nan, 0.5 * z + 1)

    z, _, info = torchdeq.solver.get_solver("fixpoint_anderson")(f, torch.zeros(3, 4), tol=1e-5)
    torch.testing.assert_close(z[[0, 2]], torch.full((2, 4), 2.0), rtol=1e-5, atol=1e-5)
    assert info["abs_lowest"][[0, 2]].max() < 1e-5
