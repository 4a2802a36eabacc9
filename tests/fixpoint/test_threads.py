"""Other threads: what they draw is theirs, and f is one map all the same."""

from __future__ import annotations

import contextlib
import threading

import torch

import fixpoint
from fixpoint import Picard


@contextlib.contextmanager
def another_thread(work):
    """Another thread that repeats ``work`` as long as the block runs."""
    stop = threading.Event()

    def repeat():
        while not stop.is_set():
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_what_another_thread_draws_is_never_repeated():
    drawn = []
    with another_thread(lambda: drawn.append(torch.rand(50, dtype=torch.float64))):
        for _ in range(60):
            fixpoint.solve(lambda z: 0.9 * torch.sin(z) + 0.3, torch.zeros(4, 3))
    numbers = torch.cat(drawn)
    assert len(numbers) > 1000
    assert len(numbers.unique()) == len(numbers)


def test_a_generator_of_its_own_is_the_business_of_f():
    generator, before, seen = torch.Generator().manual_seed(0), torch.get_rng_state(), []

    def f(z):
        seen.append(float(torch.randn(1, generator=generator)))
        return 0.5 * z + 1

    with another_thread(lambda: None):
        fixpoint.solve(f, torch.zeros(2, 3), solver=Picard())
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(seen)) == len(seen)


def test_solves_in_several_threads_do_not_disturb_one_another():
    def solve(seed, out):
        b = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        out[seed] = fixpoint.solve(lambda z: torch.tanh(0.5 * z + b), torch.zeros(5, 4), rtol=1e-6).value

    together, alone = {}, {}
    threads = [threading.Thread(target=solve, args=(seed, together)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        solve(seed, alone)
        assert torch.equal(together[seed], alone[seed])
