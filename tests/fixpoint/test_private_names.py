"""Names of PyTorch that are not public stand in one file. A version without one loses no more than that file says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import checkpoint

import fixpoint
from fixpoint.engine import private

ROOT = Path(fixpoint.__file__).parent
PRIVATE = re.compile(
    r"torch\._(?!_version__)|_functorch|_torchdynamo|_orig_mod|^from torch.* import .*\b_[A-Za-z]", re.MULTILINE
)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_are_not_public_stand_in_one_file(path):
    assert path == Path(private.__file__) or not PRIVATE.search(path.read_text(encoding="utf-8"))


def gradient() -> float:
    a = torch.tensor(0.5, requires_grad=True)
    fixpoint.solve(lambda z, a: a * z + 1, torch.zeros(2, 1), (a,), rtol=1e-6).value.sum().backward()
    return round(float(a.grad), 3)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_storage_Use_Count"),
        (torch._C._functorch, "unwrap_if_dead"),
        (torch._C._functorch, "maybe_current_level"),
        (torch._C, "_vmapmode_increment_nesting"),
        (torch._C, "_vmapmode_decrement_nesting"),
        (torch, "_remove_batch_dim"),
        (torch, "_add_batch_dim"),
    ],
)
def test_a_gradient_needs_none_of_them(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    assert gradient() == 8.0


def test_without_the_count_of_holders_outputs_are_copied(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    buffer = torch.zeros(1, 1)

    def f(z):
        return torch.add(0.5 * z, 1, out=buffer)

    solution = fixpoint.solve(f, torch.zeros(1, 1), solver=fixpoint.Picard(), backward=None)
    assert abs(float(solution.value) - 2) < 1e-3
    assert not private.is_only_holder(torch.zeros(1) + 1)


def test_without_the_hooks_a_checkpoint_repeats_the_global_draws(monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
    rule = fixpoint.StochasticJFB(max_no_grad=5, max_grad=5)
    depths = []

    def layer(a):
        solution = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), backward=rule)
        depths.append(float(solution.value.detach()))
        return solution.value

    with checkpoint.set_checkpoint_early_stop(False):
        for _ in range(5):
            checkpoint.checkpoint(layer, torch.tensor(0.5, requires_grad=True), use_reentrant=False).sum().backward()
    assert depths[::2] == depths[1::2]
    assert len(set(depths)) > 1


def test_whether_derivatives_are_followed_is_not_taken_for_no(monkeypatch):
    assert not private.transforming()
    monkeypatch.delattr(torch._C._functorch, "maybe_current_level")
    assert private.transforming()


def test_whether_a_backward_pass_runs_is_not_taken_for_no(monkeypatch):
    assert not private.in_backward()
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    assert private.in_backward()


def test_the_package_is_imported_without_the_private_classes():
    code = """
import torch
from torch.nn.modules import batchnorm, dropout
from torch.nn.utils import parametrizations
from torch.utils import checkpoint
del batchnorm._BatchNorm, batchnorm._NormBase, dropout._DropoutNd
del parametrizations._SpectralNorm, checkpoint._CheckpointFrame
import fixpoint
print(round(float(fixpoint.solve(torch.cos, torch.ones(1), rtol=1e-6).value), 4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.stdout.strip() == "0.7391", done.stderr
