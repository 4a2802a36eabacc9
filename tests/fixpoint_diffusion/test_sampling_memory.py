"""How many trajectories a general solver holds while it samples."""

from __future__ import annotations

import json

import pytest
from torch.profiler import ProfilerActivity, profile

from fixpoint import Anderson, Picard, Solver
from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise, sample

STEPS, DIM = 20, 2**16


def peak(solver: Solver, folder) -> float:
    """Most that torch's allocator held at once in a sampling, in trajectories of one sample."""
    schedule = NoiseSchedule.linear()

    def denoiser(x, t):
        return 0.9 * (1 - schedule.alphas_cumprod.to(x)[t, None]).sqrt() * x

    chain = DDIMChain(denoiser, initial_noise(0, range(1), (DIM,)), schedule, steps=STEPS)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sample(chain, solver=solver, rtol=1e-5, max_evals=16, on_failure="ignore")
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return (max(event["Total Allocated"] for event in events) - before) / (4 * STEPS * DIM)


@pytest.mark.parametrize("memory", [3, 5])
def test_anderson_holds_two_trajectories_for_each_change_and_few_more(memory, tmp_path):
    alone, anderson = peak(Picard(), tmp_path), peak(Anderson(memory=memory), tmp_path)
    # Five more for the solver, and one for the loop where the best state is not the last.
    assert anderson - alone <= 2 * memory + 6.01
    # The rest is the loop's last states, and the chain's inputs, outputs and sums, of which few steps are in float64.
    assert alone <= 10.5
