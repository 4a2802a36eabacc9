"""Inversion by descent, as ``invert`` runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fixpoint import IFT, JFB
from fixpoint_diffusion import DDIMChain, NoiseSchedule
from fixpoint_diffusion.inversion import Descent, OptimisedInverse, ParallelInverse, invert

SCHEDULE = NoiseSchedule.linear()
IMAGES = torch.tensor([[0.9, -0.7, 0.4], [-0.8, 0.9, 0.1]], dtype=torch.float64)
ADAM = partial(torch.optim.Adam, lr=0.1)


@pytest.mark.parametrize("rule", ["sequential", IFT(rtol=1e-3), JFB()])
def test_invert_measures_what_was_found(gaussian: Callable[..., Any], rule: Any) -> None:
    chain = DDIMChain(gaussian(SCHEDULE), torch.zeros_like(IMAGES), SCHEDULE, steps=8)
    shown: list[Descent] = []
    method = OptimisedInverse(gradient=rule, optimiser=ADAM, epochs=400)
    inverse = invert(chain, IMAGES, method=method, rtol=1e-2, callback=shown.append)
    assert bool(inverse.converged.all())
    assert float(inverse.error.max()) < 1e-2
    assert torch.equal(inverse.x_T, shown[-1].best_x_T)
    assert inverse.rounds == sum(epoch.rounds for epoch in inverse.history)
    again = replace(method, resume=shown[2])
    assert torch.equal(invert(chain, IMAGES, method=again, rtol=1e-2).x_T, inverse.x_T)


def test_invert_goes_on_where_another_method_stopped(mixture: Callable[..., Any]) -> None:
    chain = DDIMChain(mixture(SCHEDULE), torch.zeros_like(IMAGES), SCHEDULE, steps=8)
    coarse = invert(chain, IMAGES, method=ParallelInverse(max_rounds=2, second_try=None), on_failure="ignore")
    fine = partial(torch.optim.Adam, lr=1e-3)
    method = OptimisedInverse(optimiser=fine, epochs=20, start=coarse.x_T, stop=0.0)
    inverse = invert(chain, IMAGES, method=method, on_failure="ignore")
    assert bool((inverse.error < coarse.error).all())
