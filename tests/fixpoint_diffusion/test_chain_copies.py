"""What a chain copies from the host to the device, and holds: counted on the meta device, which every machine has."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fixpoint.memory import LiveBytes
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, initial_noise

LINEAR = NoiseSchedule.linear()


class Copies(TorchDispatchMode):
    """Counts the tensors that come to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor)]
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = given[-1]
            self.count += source.device.type == "cpu" and out.device.type == "meta"
        return out


def chain_on_meta(steps: int) -> StochasticDDIMChain:
    x_T = torch.empty(2, 1, 4, 4, device="meta")
    noise = torch.empty(2, steps, 1, 4, 4, device="meta")
    return StochasticDDIMChain(lambda x, t: x * t.reshape(-1, 1, 1, 1), x_T, LINEAR, steps=steps, noise=noise)


@pytest.mark.parametrize("run", [lambda chain: chain.sequential(), lambda chain: chain(chain.z0)], ids=["steps", "all"])
def test_constants_come_to_the_device_once(run):
    counts = []
    for steps in (4, 16):
        chain = chain_on_meta(steps)
        with Copies() as copies:
            run(chain)
        counts.append(copies.count)
        with Copies() as again:
            run(chain)
        assert again.count == 0
    assert 0 < counts[0] == counts[1]


def test_the_last_latent_alone_takes_no_trajectory(mixture):
    chain = StochasticDDIMChain(mixture(LINEAR), initial_noise(0, range(3), (3,)).double(), LINEAR, steps=9)
    assert_close(chain.sequential(trajectory=False), chain.sequential()[:, -1], rtol=0, atol=0)
    peaks = []
    for steps in (50, 200):
        chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(1, 3, 32, 32), LINEAR, steps=steps)
        with LiveBytes() as live:
            chain.sequential(trajectory=False)
        peaks.append(live.peak)
    assert peaks[1] < 1.2 * peaks[0]


def test_sums_in_float64_take_a_few_steps_at_a_time(monkeypatch):
    from fixpoint_diffusion.processes import transitions as module

    x_T = initial_noise(0, range(8), (3, 8, 8))
    chain = StochasticDDIMChain(lambda x, t: 0.5 * x, x_T, LINEAR, steps=20)
    whole = chain(chain.z0)
    monkeypatch.setattr(module, "_PART", 2 * 8 * 3 * 64)
    assert_close(chain(chain.z0), whole, rtol=0, atol=0)
    x = chain.inputs(chain.z0)
    out = chain.denoise_all(x)
    with LiveBytes() as live:
        chain.accumulate(x, out)
    assert live.peak < 7 * x.numel() * x.element_size()
