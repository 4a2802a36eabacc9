"""Part 1: the device against the CPU on the same inputs, dtype by dtype, and the tests that mean something there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fixpoint
from benchmarks.device.common import DTYPES, Part, normal, relative_error
from fixpoint import CausalQuasiNewton, Recurrence
from fixpoint_diffusion import FPDM, DDIMChain, FPDMConfig, NoiseSchedule, StochasticDDIMChain, sample

Case = Callable[[str, torch.dtype], Tensor]

# Both sides solve to a tolerance that follows the precision, and may end at different evaluations.
RTOL = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
ALLOWED = {"float64": 1e-6, "float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}

SOLVERS = {
    "Picard": fixpoint.Picard(),
    "Anderson": fixpoint.Anderson(),
    "Anderson, damped, bf16 histories": fixpoint.Anderson(damping=0.8, history_dtype=torch.bfloat16),
    "Broyden": fixpoint.Broyden(),
    "Broyden m=4": fixpoint.Broyden(memory=4),
    "Blockwise": fixpoint.Blockwise(fixpoint.Anderson(memory=2), blocks=4),
}
RULES = {
    "IFT": fixpoint.IFT(),
    "JFB": fixpoint.JFB(),
    "Phantom": fixpoint.Phantom(steps=3, damping=0.6),
    "Neumann": fixpoint.Neumann(terms=4),
    "SHINE": fixpoint.SHINE(refine=1),
    "Reversible": fixpoint.Reversible(steps=12, damping=0.8),
    "MultiStepJFB": fixpoint.MultiStepJFB(no_grad=6, grad=3),
    "Unroll": fixpoint.Unroll(),
}
WINDOWS = {
    "all at once": CausalQuasiNewton(),
    "windows": CausalQuasiNewton(window=6),
    "rows": CausalQuasiNewton(max_rows=12),
    "one by one": CausalQuasiNewton(window=1),
    "certified": CausalQuasiNewton(certify=True),
    "probed": CausalQuasiNewton(probes=1),
}

# Contracts of solvers and rules first. What compiles, or starts processes, is measured elsewhere.
TESTS = (
    "tests/fixpoint/test_contracts.py",
    "tests/fixpoint/test_sweep.py",
    "tests/fixpoint/test_solvers.py",
    "tests/fixpoint/test_broyden.py",
    "tests/fixpoint/test_anderson.py",
    "tests/fixpoint/test_gradients_rules.py",
    "tests/fixpoint/test_compaction.py",
    "tests/fixpoint/test_windows.py",
    "tests/fixpoint/test_causal.py",
    "tests/fixpoint_diffusion/test_fpdm_model.py",
)
REHEARSED = TESTS[1:2]
TEST_SECONDS = 90.0


def main(part: Part) -> None:
    """Cases in every dtype, then the tests."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in DTYPES:
            for name, case in cases().items():
                if part.left < 0.3 * part.seconds:
                    part.leave_out(f"{name} in {dtype}", "no time left")
                    continue
                with part.attempt(f"{name} in {dtype}"):
                    part.add("cases", **compare(name, case, dtype, part.device))
    tests(part, REHEARSED if part.rehearse else TESTS)


def compare(name: str, case: Case, dtype: str, device: str) -> dict[str, Any]:
    """A case on the device beside the same on the CPU."""
    expected, found = case("cpu", DTYPES[dtype]), case(device, DTYPES[dtype])
    difference = relative_error(found, expected)
    return {
        "case": name,
        "dtype": dtype,
        "difference": difference,
        "allowed": ALLOWED[dtype],
        "ok": difference <= ALLOWED[dtype] and found.device.type == device,
    }


def cases() -> dict[str, Case]:
    """Everything that is compared, by name."""
    found: dict[str, Case] = {f"solver: {name}": partial(solved, solver) for name, solver in SOLVERS.items()}
    found |= {f"backward: {name}": partial(gradient, rule) for name, rule in RULES.items()}
    found |= {f"chain: {name}": partial(recurrence, solver) for name, solver in WINDOWS.items()}
    found |= {f"sampling: eta={eta}": partial(sampled, eta) for eta in (0.0, 1.0)}
    return found | {"FPDM: prediction": predicted, "FPDM: training step": trained}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight of norm 0.6 ``(24, 24)`` and inputs ``(8, 24)`` of ``tanh(z W + x)``."""
    weight = normal(24, 24)
    weight = 0.6 * weight / torch.linalg.matrix_norm(weight, ord=2)
    return weight.to(device, dtype), normal(8, 24, seed=1).to(device, dtype)


def solved(solver: fixpoint.Solver, device: str, dtype: torch.dtype) -> Tensor:
    """Eight rows, each with an end of its own."""
    weight, x = _cell(device, dtype)
    scale = torch.linspace(0.3, 1.0, 8, device=device, dtype=dtype)[:, None]
    options: dict[str, Any] = {"solver": solver, "rtol": RTOL[_name(dtype)], "backward": None}
    return fixpoint.solve(lambda z: torch.tanh(scale * (z @ weight) + x), torch.zeros_like(x), **options).value


def gradient(rule: fixpoint.Backward, device: str, dtype: torch.dtype) -> Tensor:
    """Of a sum of squares with respect to the weight."""
    weight, x = _cell(device, dtype)
    weight.requires_grad_()
    solver = fixpoint.Broyden(memory=40) if isinstance(rule, fixpoint.SHINE) else fixpoint.Picard()
    options: dict[str, Any] = {"solver": solver, "rtol": RTOL[_name(dtype)], "backward": rule, "max_evals": 200}
    solution = fixpoint.solve(lambda z, w: torch.tanh(z @ w + x), torch.zeros_like(x), (weight,), **options)
    solution.value.float().square().sum().backward()
    assert weight.grad is not None
    return weight.grad


def recurrence(solver: CausalQuasiNewton, device: str, dtype: torch.dtype) -> Tensor:
    """Three chains of 24 steps of a damped pendulum."""
    start = normal(3, 2, seed=2).to(device, dtype)

    def step(x: Tensor) -> Tensor:
        return x + 0.1 * torch.stack((x[:, 1], -x[:, 0].sin() - 0.5 * x[:, 1]), dim=1)

    chain = Recurrence(step, start, steps=24)
    return fixpoint.solve(chain, solver=solver, rtol=RTOL[_name(dtype)], backward=None).value


def sampled(eta: float, device: str, dtype: torch.dtype) -> Tensor:
    """Trajectories of a chain whose denoiser is a small network."""
    network = _network().to(device, dtype)
    x_T = normal(3, 6, seed=3).to(device, dtype)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return network(torch.cat((x, (t / 1000)[:, None].to(x.dtype)), dim=1))

    options: dict[str, Any] = {"steps": 20}
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.linear(), **options)
    if eta:
        chain = StochasticDDIMChain(denoiser, x_T, NoiseSchedule.linear(), eta=eta, **options)
    return sample(chain, rtol=RTOL[_name(dtype)], on_failure="ignore").trajectory


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 6)).requires_grad_(False)


def _fpdm(device: str, dtype: torch.dtype) -> tuple[FPDM, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FPDM(FPDMConfig(width=32, heads=2))
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    t = torch.tensor([10, 500, 999], device=device)
    return model.to(device, dtype), normal(3, 1, 8, 8, seed=4).to(device, dtype), t


def predicted(device: str, dtype: torch.dtype) -> Tensor:
    """Of a small model, six iterations deep."""
    model, x, t = _fpdm(device, dtype)
    with torch.no_grad():
        prediction = model.eval()(x, t, depth=6)
    assert isinstance(prediction, Tensor)
    return prediction


def trained(device: str, dtype: torch.dtype) -> Tensor:
    """The gradients of a small model by multi-step JFB, one after another."""
    model, x, t = _fpdm(device, dtype)
    prediction = model.train()(x, t, backward=fixpoint.MultiStepJFB(no_grad=4, grad=2))
    assert isinstance(prediction, Tensor)
    prediction.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def tests(part: Part, files: tuple[str, ...]) -> None:
    """Test files with the device as torch's default one; outcomes are kept as they come, should time run out."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "outcomes.jsonl"
        log.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
        command += ["-p", "benchmarks.device.on_device", "-k", "not compile and not need_no_pytest", *files]
        environment = os.environ | {"FIXPOINT_DEVICE": part.device, "FIXPOINT_OUTCOMES": str(log)}
        limit = max(min(TEST_SECONDS, part.left), 1.0)
        ended = "of themselves"
        try:
            done = subprocess.run(command, cwd=root, env=environment, timeout=limit, capture_output=True, text=True)
            if done.returncode not in (0, 1):
                raise RuntimeError(f"pytest: {(done.stdout + done.stderr).strip()[-300:]}")
        except subprocess.TimeoutExpired:
            ended = f"after {limit:.0f} s"
        except RuntimeError as error:
            part.document["errors"].append({"what": "tests", "error": str(error)})
        outcomes = [json.loads(line) for line in log.read_text().splitlines()]
    failed = [each for each in outcomes if each["outcome"] == "failed"]
    counts = {name: sum(each["outcome"] == name for each in outcomes) for name in ("passed", "failed", "skipped")}
    part.add("tests", files=list(files), ended=ended, **counts)
    for each in failed[:60]:
        part.add("failed_tests", test=each["test"], error=each["error"])
