"""estimate_memory() beside what torch's own profiler sees in a solve."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fixpoint

SOLVERS = (
    fixpoint.Picard(),
    fixpoint.ACX(),
    fixpoint.Anderson(),
    fixpoint.Anderson(memory=3, damping=0.5),
    fixpoint.Anderson(memory=12),
    fixpoint.Broyden(),
    fixpoint.Broyden(memory=3),
    fixpoint.GMRES(memory=12),
    fixpoint.Blockwise(fixpoint.Anderson(memory=2), blocks=4),
)


@dataclasses.dataclass(frozen=True)
class Hoarder(fixpoint.Solver):
    """A third party's solver that keeps every state in a list of dicts and does damped Picard steps."""

    def init(self, z):
        return []

    def step(self, z, fz, state):
        return (z + fz) / 2, [*state, {"z": z.clone()}]


def peak_of(work, folder):
    """Most bytes that torch's CPU allocator held at once, above what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


def measured_peak(solver, rows, dim, folder, *, rtol=1e-5, check_every=1):
    """That of a solve of 30 evaluations, some of whose rows end early."""
    rates = torch.linspace(0.05, 0.97, dim) * torch.linspace(1, 0.1, rows)[:, None]
    b, z0 = torch.ones(rows, dim), torch.zeros(rows, dim)

    def f(z):
        return torch.addcmul(b, z, rates)

    options = {"backward": None, "rtol": rtol, "max_evals": 30, "on_failure": "ignore", "check_every": check_every}
    return peak_of(lambda: fixpoint.solve(f, z0, solver=solver, **options), folder)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("solver", [*SOLVERS, Hoarder()], ids=repr)
def test_is_never_below_the_measured_peak_and_at_most_a_fifth_above(solver, rows, tmp_path):
    measured = measured_peak(solver, rows, 2**17, tmp_path)
    estimate = fixpoint.estimate_memory(torch.zeros(rows, 2**17), solver=solver, max_evals=30)
    assert measured <= estimate.bytes <= 1.2 * measured + 64 * rows  # some numbers of each row


@pytest.mark.parametrize(("solver", "check_every"), [*((solver, 3) for solver in SOLVERS), (SOLVERS[7], 10)], ids=repr)
def test_counts_the_states_of_the_last_check(solver, check_every, tmp_path):
    measured = measured_peak(solver, 2, 2**17, tmp_path, check_every=check_every)
    options = {"solver": solver, "max_evals": 30, "check_every": check_every}
    estimate = fixpoint.estimate_memory(torch.zeros(2, 2**17), **options)
    assert measured <= estimate.bytes <= 1.2 * measured + 128


@pytest.mark.parametrize("memory", [20, 28])
def test_counts_what_a_full_history_needs_to_start_over(memory, tmp_path):
    solver = fixpoint.Broyden(memory=memory)
    measured = measured_peak(solver, 2, 2**17, tmp_path, rtol=0)  # no row ends before
    estimate = fixpoint.estimate_memory(torch.zeros(2, 2**17), solver=solver, max_evals=30)
    before = fixpoint.estimate_memory(torch.zeros(2, 2**17), solver=solver, max_evals=memory)
    assert before.bytes < measured <= estimate.bytes


@pytest.mark.parametrize("window", [None, 128])
def test_a_chain_takes_no_more_than_is_estimated_for_a_window_over_all_of_it(window, tmp_path):
    rate, inputs = torch.full((4096,), 0.99), torch.linspace(0, 1, 512)[None, :, None]
    chain = fixpoint.Recurrence(lambda x, u: torch.addcmul(u, x, rate), torch.ones(1, 4096), inputs=(inputs,))
    solver = fixpoint.CausalQuasiNewton(window=window)
    options = {"backward": None, "rtol": 1e-4, "max_evals": 500}
    measured = peak_of(lambda: fixpoint.solve(chain, solver=solver, **options), tmp_path)
    estimate = fixpoint.estimate_memory(chain.z0, solver=solver)
    assert measured <= estimate.bytes <= (1.25 if window is None else 2.5) * measured


@pytest.mark.parametrize("memory", [1, 2, 5, 10, 20])
def test_anderson_holds_at_most_twice_its_memory_and_four_states(memory):
    z0 = torch.empty(4, 2**16, device="meta")
    loop = fixpoint.estimate_memory(z0, solver=fixpoint.Picard()).states  # Picard holds nothing
    anderson = fixpoint.estimate_memory(z0, solver=fixpoint.Anderson(memory=memory)).states
    assert anderson - loop <= 2 * memory + 4.01  # the small numbers of a step are no hundredth of these states


def test_memory_is_bounded_for_our_solvers_and_not_for_one_that_keeps_everything():
    z0 = torch.empty(2, 4096, device="meta")
    for solver in SOLVERS:
        short, long = (fixpoint.estimate_memory(z0, solver=solver, max_evals=n) for n in (40, 80))
        assert short == long, solver
    short, long = (fixpoint.estimate_memory(z0, solver=Hoarder(), max_evals=n).states for n in (40, 80))
    assert long - short == 40


def test_a_history_that_grows_counts_as_far_as_the_evaluations_let_it():
    z0 = torch.empty(1, 4096, device="meta")
    five, eight = (fixpoint.estimate_memory(z0, solver=Hoarder(), max_evals=n).states for n in (5, 8))
    assert eight - five == 3


def test_allocates_nothing():
    z0 = torch.empty(1024, 2**30, device="meta")
    estimate = fixpoint.estimate_memory(z0, solver=fixpoint.Anderson())
    assert estimate.state_bytes == 2**42
    assert estimate.bytes > 10 * 2**42


def test_a_state_counts_all_its_leaves_in_their_dtype():
    double = fixpoint.estimate_memory(torch.zeros(2, 8, dtype=torch.float64), solver=fixpoint.Picard())
    nested = {"a": np.zeros((2, 3), dtype=complex), "b": (np.zeros((2, 2), dtype=complex),)}
    assert double.state_bytes == 2 * 8 * 8
    assert fixpoint.estimate_memory(nested, solver=fixpoint.Picard()).state_bytes == 2 * 5 * 16
    assert fixpoint.estimate_memory(torch.zeros(2, 0)).state_bytes == 0


def test_batch_dims_say_what_a_row_is():
    z0 = torch.empty(64, 32, device="meta")
    whole, rows = (fixpoint.estimate_memory(z0, batch_dims=n).bytes for n in (0, 2))
    assert whole < rows, "64 * 32 rows of one number have as many small systems"


def test_reads_like_a_sentence():
    estimate = fixpoint.MemoryEstimate(bytes=3 * 2**29, states=12.04, state_bytes=2**17)
    assert str(estimate) == "1.5 GiB at most; 12.0 states of 128.0 KiB while f runs"
    small = fixpoint.MemoryEstimate(bytes=1000, states=1.0, state_bytes=1000)
    assert str(small).startswith("1000.0 B at most")
    assert "TiB" in str(fixpoint.MemoryEstimate(bytes=2**60, states=1.0, state_bytes=1))


@pytest.mark.parametrize(
    ("z0", "options", "error", "message"),
    [
        (torch.zeros(2), {"solver": "anderson"}, TypeError, "solver must be a fixpoint.Solver"),
        (torch.zeros(2), {"max_evals": 0}, ValueError, "max_evals must be at least 1"),
        (torch.zeros(2), {"check_every": 0}, ValueError, "check_every must be at least 1"),
        (torch.zeros(2), {"batch_dims": 3}, ValueError, "batch_dims=3"),
        (torch.zeros(2, dtype=torch.int64), {}, TypeError, "floating point or complex"),
    ],
)
def test_bad_options_are_refused(z0, options, error, message):
    with pytest.raises(error, match=message):
        fixpoint.estimate_memory(z0, **options)


def test_a_chain_is_estimated_by_the_window_over_all_of_it():
    chain = torch.empty(2, 200, 64, device="meta")
    one, two = (fixpoint.estimate_memory(chain, solver=fixpoint.CausalQuasiNewton(memory=m)).states for m in (1, 2))
    assert 4 <= one < two <= one + 2.1  # an input and an image of each step for each round that is remembered
