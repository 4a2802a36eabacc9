"""Options given in Python are checked as the command line checks them: their kind, then their range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fixpoint_diffusion.options.sampling import SamplingOptions, SolverName
from fixpoint_diffusion.options.training import TrainingConfig

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        (TrainingConfig, {"steps": NAN}, "steps must be a whole number, got nan"),
        (TrainingConfig, {"checkpoint_every": float("inf")}, "checkpoint_every must be a whole number, got inf"),
        (TrainingConfig, {"batch_size": True}, "batch_size must be a whole number, got True"),
        (TrainingConfig, {"max_grad_norm": "1"}, "max_grad_norm must be a number or None, got '1'"),
        (TrainingConfig, {"compile_blocks": 1}, "compile_blocks must be true or false, got 1"),
        (TrainingConfig, {"weighting": []}, r"weighting must be one of 'plain', 'min-snr', 'fpdm', got \[\]"),
        (SamplingOptions, {"steps": 2.5}, "--steps must be a whole number, got 2.5"),
        (SamplingOptions, {"steps": 10**30}, "--steps must be from 1 to 1000000, got 1000000000000000000000000000000"),
        (SamplingOptions, {"eta": None}, "--eta must be a number, got None"),
        (SamplingOptions, {"classes": 7}, "--class must be text or None, got 7"),
        (SamplingOptions, {"solver": "newton"}, "--solver must be one of 'sequential', .*, got 'newton'"),
        (SamplingOptions, {"layer_solver": "newton"}, "--layer-solver must be one of 'picard', .* or None"),
        (SamplingOptions, {"max_rows": "all"}, "--max-rows must be a whole number or 'auto' or None, got 'all'"),
        (SamplingOptions, {"iterations": (4, 2.5)}, "--iterations must be a whole number or a tuple, each a whole"),
        (SamplingOptions, {"iterations": ()}, r"--iterations must be .*, got \(\)"),
    ],
)
def test_values_of_another_kind_are_refused(options: Any, value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**value)


def test_words_and_whole_numbers_may_stand_for_what_is_declared() -> None:
    assert SamplingOptions(solver="causal", guidance=1).solver == SolverName.causal  # type: ignore[arg-type]
    assert SamplingOptions(solver=SolverName.causal, max_rows="auto", iterations=3).max_rows == "auto"
    assert TrainingConfig(learning_rate=1, max_grad_norm=None).learning_rate == 1


def test_a_tolerance_that_nobody_gave_forbids_no_other_solver() -> None:
    causal = SamplingOptions(solver=SolverName.causal)
    assert causal.tolerance == 1e-3
    assert replace(causal, solver=SolverName.sequential).rtol is None
