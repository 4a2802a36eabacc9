"""Our solvers and backward rules, and those of the documentation, keep the contract that others inherit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

import fixpoint
from fixpoint.testing import BackwardContract, SolverContract

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"


def example(name: str, what: str) -> Any:
    """A class from a script of the gallery."""
    spec = importlib.util.spec_from_file_location(name, GALLERY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look the class up
    spec.loader.exec_module(module)
    return getattr(module, what)


def assert_succeeds(case):
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.wasSuccessful(), result.failures + result.errors
    return result


class TestPicard(SolverContract):
    solver = fixpoint.Picard()
    compiles = True


class TestDampedPicard(SolverContract):
    solver = fixpoint.Picard(damping=0.75)
    compiles = True


class TestACX(SolverContract):
    solver = fixpoint.ACX()
    compiles = True


class TestAnderson(SolverContract):
    solver = fixpoint.Anderson()
    compiles = True


class TestShortDampedAnderson(SolverContract):
    solver = fixpoint.Anderson(memory=2, damping=0.75)
    compiles = True


class TestLongAndersonWithoutRidge(SolverContract):
    solver = fixpoint.Anderson(memory=20, ridge=0.0)
    compiles = True


class TestBroyden(SolverContract):
    solver = fixpoint.Broyden()
    compiles = True


class TestShortBroyden(SolverContract):
    solver = fixpoint.Broyden(memory=3)
    compiles = True


class TestGMRES(SolverContract):
    solver = fixpoint.GMRES()
    affine_only = True


class TestShortGMRES(SolverContract):
    solver = fixpoint.GMRES(memory=4)
    affine_only = True


@pytest.mark.usefixtures("steps_are_traced")
class TestCompiledAnderson(SolverContract):
    solver = fixpoint.Compiled(fixpoint.Anderson(memory=3))
    compiles = True


class TestBlockwisePicard(SolverContract):
    solver = fixpoint.Blockwise(fixpoint.Picard(), blocks=3)
    compiles = True


class TestBlockwiseAnderson(SolverContract):
    solver = fixpoint.Blockwise(fixpoint.Anderson(memory=2), blocks=2)
    compiles = True


class TestAitkenOfTheDocs(SolverContract):
    solver = example("write_a_solver", "Aitken")()
    compiles = True


class TestIFT(BackwardContract):
    backward = fixpoint.IFT()
    exact = True


class TestIFTByPicard(BackwardContract):
    backward = fixpoint.IFT(solver=fixpoint.Picard(), max_evals=200)
    exact = True


class TestIFTByGMRES(BackwardContract):
    backward = fixpoint.IFT(solver=fixpoint.GMRES())
    exact = True


class TestUnroll(BackwardContract):
    backward = fixpoint.Unroll()
    exact = True


class TestJFB(BackwardContract):
    backward = fixpoint.JFB()


class TestPhantom(BackwardContract):
    backward = fixpoint.Phantom(steps=5, damping=0.5)


class TestManyPhantomSteps(BackwardContract):
    backward = fixpoint.Phantom(steps=40)
    exact = True


class TestStochasticJFB(BackwardContract):
    backward = fixpoint.StochasticJFB(max_no_grad=6, max_grad=6, generator=torch.Generator().manual_seed(0))


class TestMultiStepJFB(BackwardContract):
    backward = fixpoint.MultiStepJFB(no_grad=8, grad=3)


class TestNeumann(BackwardContract):
    backward = fixpoint.Neumann(terms=3)


class TestManyNeumannTerms(BackwardContract):
    backward = fixpoint.Neumann(terms=40)
    exact = True


class TestSHINE(BackwardContract):
    backward = fixpoint.SHINE()
    solver = fixpoint.Broyden(memory=40)


class TestRefinedSHINE(BackwardContract):
    backward = fixpoint.SHINE(refine=30)
    solver = fixpoint.Broyden(memory=40)
    exact = True


class TestAveragedPhantomOfTheDocs(BackwardContract):
    backward = example("write_a_backward_rule", "AveragedPhantom")()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("contract", [TestPicard, TestAnderson, TestBroyden, TestGMRES, TestIFT, TestUnroll])
def test_contracts_hold_on_cuda(contract):
    class OnCuda(contract, unittest.TestCase):
        device = "cuda"

    assert_succeeds(OnCuda)


def test_the_suites_need_no_pytest():
    code = "import sys, fixpoint.testing; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unittest_runs_them_and_skips_what_is_switched_off():
    class Case(SolverContract, unittest.TestCase):
        solver = fixpoint.Picard()
        scale_invariant = False

    result = assert_succeeds(Case)
    assert result.testsRun > 15
    assert sorted(reason for _, reason in result.skipped) == ["compiles is False", "scale_invariant is False"]
