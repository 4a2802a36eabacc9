"""What a chain amplifies, measured: a small displacement is followed through all of its steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.run import ChainRun, evaluate
from fixpoint.engine.loop import Map
from fixpoint.engine.norms import Array, safe_norm, to_host
from fixpoint.engine.outcome import tensor_like
from fixpoint.engine.tolerance import Tolerance

if TYPE_CHECKING:
    from fixpoint.chains.certificate import Certificate

_FRESH = 0.1  # the displacement that is added to every state, as a share of the first one
_TIMES = 10.0  # how many defects long a displacement is
_CLOSE = 0.1  # relative tolerance for displacements
_MEMORY = 4  # rounds that are remembered of each step: differences are nearly linear, so that none is out of date


class Twin:
    """A displacement of every state of some chains: what the steps make of that of the state before, and a little more.

    A gain that is measured by itself depends on the direction in which the input of the step was displaced. Errors
    turn, over many steps, towards what these steps together amplify most. So must the displacements, and that makes
    them a chain as well: ``v_k = J_k v_{k-1} + fresh``, where ``J_k v`` is a difference of two evaluations of step k.
    It is solved as its chain is, in the same windows. A small tolerance is not needed: ``v`` grows as errors do, so
    relative errors of ``v`` hardly grow.

    ``fresh``, of random direction, is a tenth of the first displacement, both relative to the state: without it, a
    direction that was forgotten early on would not be there when later steps amplify it.

    Attributes:
        rows: ``(R,)``, numbers of the chains.
        run: of the displacements. Evaluating them counts as evaluations of the chain.
    """

    def __init__(self, chain: ChainRun, f: Map, rows: Array, certificate: Certificate, defects: Array) -> None:
        self.rows, self._chain, self._f, self._rows = rows, chain, f, tensor_like(chain.start, rows)
        steps, like = chain.steps, chain.states
        self._images = certificate.images_of(rows, steps)
        scale = chain.scale[rows]
        # Displacements are about as large as errors may be: ten times the largest defect, and at most what is allowed.
        # Larger ones would pass over what a step does near a kink. Not so small that two images cannot be told apart.
        bound = chain.bound(rows)
        largest = (defects / bound).max(axis=1, initial=0, keepdims=True)
        size = np.minimum(_TIMES * largest, 1) * bound
        size = size.clip(min=scale * torch.finfo(chain.start.dtype).eps ** 0.5)
        self._size = tensor_like(like, size).to(like.dtype)
        whole = tensor_like(like, scale).to(like.dtype)[..., None]
        generator = torch.Generator().manual_seed(0)
        unit = torch.randn(steps + 1, like.shape[1], generator=generator, dtype=torch.float64, device="cpu")
        unit = (unit / torch.linalg.vector_norm(unit, dim=1, keepdim=True)).to(like)
        start = unit[-1] * whole
        self._fresh = _FRESH * unit[:-1] * whole
        self._fresh[:, 0] += start[:, 0]
        self._gains = like.new_full((len(rows), steps), torch.nan)
        options = replace(chain.sweeper.options, certify=False, memory=_MEMORY, noise_rtol=0.0, probes=0)
        sweeper = replace(chain.sweeper, options=options, sparse=False, stored=None)
        z = sweeper.join(start, chain.start.new_empty(len(rows), steps * like.shape[1]))
        self.run = ChainRun(z, sweeper, Tolerance(rtol=_CLOSE, atol=0.0))
        self.run.doubts = False

    def __call__(self, z: Tensor) -> Tensor:
        """All displacements, each from the one before it: ``(R, T D)`` to the same shape."""
        steps = self._chain.steps
        every = torch.arange(len(z) * steps, device=z.device)
        return self.part(z, every // steps, every % steps).reshape(z.shape)

    def part(self, z: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """Displacements ``(N, D)`` after the steps ``step`` ``(N,)`` of the samples ``sample`` ``(N,)`` of z."""
        chain, before = self._chain, (step - 1).clamp(min=0)
        v = z.reshape(len(z), chain.steps, -1)[sample, before].to(chain.states.dtype)
        length, size = safe_norm(v), self._size[sample, before]
        unit = torch.where(length > 0, 1 / length, 0)[:, None] * v
        states = chain.states[:-1].clone()
        row = self._rows[sample]
        states[row * chain.steps + before] += size[:, None] * unit
        rows = chain.sweeper.join(states.reshape(len(chain.start), chain.steps, -1), chain.start)
        images = evaluate(chain, self._f, to_host(row * chain.steps + step).astype(int), rows)
        counts = (step > 0) & (size > 0)  # what starts a chain is not displaced
        change = torch.where(counts, 1 / size, 0)[:, None] * (images - self._images[sample, step])
        self._gains[sample, step] = torch.where(counts, safe_norm(change), torch.nan)
        return length[:, None] * change + self._fresh[sample, step]

    def note_gains(self) -> None:
        """Hand over what was measured."""
        self._chain.gains.note_twin(self.rows, to_host(self._gains))
