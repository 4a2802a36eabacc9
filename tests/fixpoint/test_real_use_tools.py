"""Every backward rule beside PyTorch's tools: checkpointing, torch.compile, distributed data parallel."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fixpoint
from fixpoint import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    Broyden,
    FixedPointLayer,
    MultiStepJFB,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    Unroll,
)
from tests.fixpoint import distributed_worker as worker
from tests.fixpoint.differentiated import gradients

D = torch.float64
ROOT = Path(__file__).parents[2]


def make_layer(f, rule, **options):
    solver = Broyden(memory=40) if isinstance(rule, SHINE) else Picard()
    return FixedPointLayer(f, backward=copy.deepcopy(rule), **{"solver": solver, "rtol": 1e-8, **options})


@pytest.fixture
def x(normal):
    return normal(3, 4).requires_grad_()


# Checkpoints


class Checkpointed(nn.Module):
    def __init__(self, cell, **options):
        super().__init__()
        self.cell, self.options = cell, options

    def forward(self, z, x):
        return checkpoint(self.cell, z, x, **self.options)


class Dropped(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.dropout = cell, nn.Dropout(0.4)

    def forward(self, z, x):
        return self.dropout(self.cell(z, x))


@pytest.mark.parametrize("wrap", [lambda cell: cell, Dropped], ids=["plain", "dropout"])
def test_a_checkpoint_inside_f_changes_no_gradient(rule, cell_class, x, wrap):
    f = wrap(cell_class())
    found = []
    for g in (f, Checkpointed(f, use_reentrant=False)):
        torch.manual_seed(0)
        found.append(gradients(make_layer(g, rule)(x), next(f.parameters()), x))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_inside_f_works_or_says_what_to_do(rule, cell_class, x):
    cell = cell_class()
    expected = gradients(make_layer(cell, rule)(x), cell.W, x)
    value = make_layer(Checkpointed(cell, use_reentrant=True), rule)(x)
    if isinstance(rule, IFT | Neumann | SHINE | Reversible):
        with pytest.raises(RuntimeError, match="set use_reentrant=False"):
            value.square().sum().backward()
        return
    value.square().sum().backward()
    torch.testing.assert_close((cell.W.grad, x.grad), expected)


def test_a_checkpoint_around_a_layer_changes_no_gradient(rule, cell_class, x):
    cell, found = cell_class(), []
    for run in (lambda layer, x: layer(x), functools.partial(checkpoint, use_reentrant=False)):
        layer = make_layer(cell, copy.deepcopy(rule))
        found.append(gradients(run(layer, x), cell.W, x))
    torch.testing.assert_close(*found)


# Compilers


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


class Cell(nn.Module):
    """The same map without a counter, for which the compiler would start anew at each call."""

    def __init__(self, cell):
        super().__init__()
        self.W = cell.W

    def forward(self, z, x):
        return torch.tanh(z @ self.W.T + x)


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    def test_a_compiled_f_has_the_same_gradients(self, rule, cell_class, x):
        cell = Cell(cell_class())
        compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
        found = [gradients(make_layer(f, rule)(x), cell.W, x) for f in (compiled, cell)]
        torch.testing.assert_close(*found)

    @needs_compiler
    def test_inductor_compiles_f(self, normal):
        W = (normal(4, 4) / 8).requires_grad_()
        x = normal(3, 4).requires_grad_()

        def f(z, W, x):
            return torch.tanh((z[:, :, None] * W).sum(dim=1) + x)

        compiled = torch.compile(f, fullgraph=True)
        values = [fixpoint.solve(g, torch.zeros_like(x), (W, x), backward=IFT()).value for g in (compiled, f)]
        torch.testing.assert_close(*(gradients(value, W, x) for value in values))

    @pytest.mark.parametrize(
        ("rule", "options"),
        [
            (JFB(), {"depth": 4}),
            (JFB(), {"depth": 4, "solver": Anderson(memory=2)}),
            (Phantom(steps=3, damping=0.6), {"depth": 4}),
            (Unroll(), {"depth": 4}),
            (MultiStepJFB(no_grad=4, grad=2), {}),
        ],
    )
    def test_a_fixed_depth_compiles_whole(self, rule, options, cell_class, x):
        layer = make_layer(Cell(cell_class()), rule, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solutions = [
                run(x, return_solution=True)
                for run in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer)
            ]
        assert not [warning for warning in caught if "copy construct" in str(warning.message)]
        torch.testing.assert_close(*(s.value for s in solutions))
        torch.testing.assert_close(*(gradients(s.value, layer.f.W, x) for s in solutions))
        assert [s.nfev for s in solutions] == [4, 4]

    def test_a_compiled_network_leaves_the_solve_as_it_is(self, rule, cell_class, x):
        network = nn.Sequential(nn.Linear(4, 4, dtype=D), make_layer(Dropped(Cell(cell_class())), rule))
        found = []
        for run in (torch.compile(copy.deepcopy(network), backend="eager"), copy.deepcopy(network)):
            torch.manual_seed(0)
            value = run(x)
            found.append((value, *gradients(value, x, *run.parameters())))
        # Reversible magnifies rounding by (1 - damping)^-steps, 2e8 here.
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)

    def test_a_solve_to_a_tolerance_does_not_compile_whole(self, cell_class, x):
        layer = torch.compile(make_layer(Cell(cell_class()), IFT()), backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            layer(x)


# Processes


def test_two_processes_train_like_one_by_every_rule(tmp_path, all_rules):
    assert {type(rule) for rule in worker.rules()} == {type(rule) for rule in all_rules}
    outs = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    command, store = [sys.executable, "-m", worker.__name__], tmp_path / "store"
    # From this directory, so that the package beside these tests is used.
    processes = [subprocess.Popen([*command, str(rank), "2", store, out], cwd=ROOT) for rank, out in enumerate(outs)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone = worker.steps(slice(None), lambda network: network)
    assert len(alone) == 2 * len(worker.rules())
    for out in outs:
        torch.testing.assert_close(torch.load(out), alone, rtol=1e-5, atol=1e-7)
