"""The certificate of a chain: an evaluation of all its steps at the states that are handed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.amplification import AMPLIFIES, STRICTER, go_back
from fixpoint.chains.run import ChainRun, evaluate
from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import tensor_like
from fixpoint.engine.tolerance import Array, to_host

if TYPE_CHECKING:
    from fixpoint.chains.causal import CausalSweep

_PROBES = 2  # evaluations that measure what a certified chain amplifies


class Findings(NamedTuple):
    """What the certificate of ``R`` chains says."""

    defect: Array  # (R, T) norm of image minus state
    scale: Array  # (R, T) norm of the image
    residual: Array  # (R,) ||f(z) - z||; NaN where f is not finite
    passed: Array  # (R,) bool
    failed: Array  # (R,) bool: f is not finite
    first_wrong: Array  # (R,) the state from which a chain that did not pass has to go on


@dataclass
class Certificate:
    """Images of all states of some chains, as they come in, in one evaluation or in several.

    Attributes:
        rows: ``(R,)``, numbers of the chains.
        images: ``(R * T, D)``.
        places: ``(R * T,)``, where the states lie among those of all chains.
        known: how many images have come in.
        displaced: ``(R * T, D)``, what to add to the states that the steps start from; None: nothing.
    """

    rows: Array
    images: Tensor
    places: Array
    known: int = 0
    displaced: Tensor | None = None

    @classmethod
    def empty(cls, states: Tensor, rows: Array, steps: int) -> Certificate:
        """For chains of so many steps, before any image has come in."""
        places = (rows[:, None] * steps + np.arange(steps)).ravel()
        return cls(rows, states.new_empty(len(places), states.shape[1]), places)

    def pending(self, limit: int | None) -> Array:
        """Places of the next images to be evaluated, at most ``limit``."""
        return self.places[self.known :][:limit]

    def take(self, places: Array, images: Tensor) -> None:
        """Take in the images ``(N, D)`` of the places that were ``pending``."""
        self.images[self.known : self.known + len(places)] = images
        self.known += len(places)

    @property
    def complete(self) -> bool:
        """Whether all images have come in."""
        return self.known == len(self.places)

    def probe(self, rows: Array, steps: int, size: Array, last: Certificate | None) -> Certificate:
        """The same evaluation of some of the chains, at states that are displaced by ``size`` ``(R, T)``.

        The first probe displaces every state at random, the same way in every chain. Each further one follows the last
        one's changes of the images, which have turned towards what the steps amplify most.
        """
        like = self.images
        probe = Certificate.empty(like, rows, steps)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(steps, like.shape[1], generator=generator, dtype=torch.float64)
        direction = direction.to(like).repeat(len(rows), 1)
        if last is not None:
            change = last.images - self.images[self._position(rows, steps)]
            turned = torch.isfinite(change).all(dim=1, keepdim=True) & (change != 0).any(dim=1, keepdim=True)
            direction = torch.where(turned, change, direction)
        unit = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        probe.displaced = unit * tensor_like(like, size.reshape(-1, 1)).to(like.dtype)
        return probe

    def changes(self, probe: Certificate, steps: int) -> Array:
        """``(R, T)``: norms of what a probe has changed the images by."""
        change = probe.images - self.images[self._position(probe.rows, steps)]
        return to_host(torch.linalg.vector_norm(change, dim=1)).reshape(len(probe.rows), steps)

    def _position(self, rows: Array, steps: int) -> Tensor:
        """Where the images of some of the chains lie, ``(R * T,)``."""
        number = np.searchsorted(self.rows, rows)
        return tensor_like(self.images, (number[:, None] * steps + np.arange(steps)).ravel())

    def judge(self, sweeper: CausalSweep, states: Tensor, allowed: tuple[Array, Array]) -> Findings:
        """Compare the images with the states.

        A chain passes when the defect of each state is within ``atol + rtol * ||image||``, and so is the error that it
        has and inherits by the problem's slopes. ``allowed`` holds atol and rtol of each chain, ``(B,)``.
        """
        rows, steps = len(self.rows), sweeper.steps
        images = self.images.reshape(rows, steps, -1)
        defects = images - states[tensor_like(states, self.places)].reshape(images.shape)
        step = torch.arange(steps, device=states.device).expand(rows, -1)
        errors = defects + sweeper.inherited(defects, step)
        norms = [torch.linalg.vector_norm(x, dim=2) for x in (defects, images, errors)]
        defect, scale, error = to_host(torch.stack(norms))
        atol, rtol = (limit[self.rows, None] for limit in allowed)
        bound = atol + rtol * scale
        fits = defect <= bound
        good = fits & (error <= bound)
        finite = np.isfinite(defect).all(axis=1)
        # A state that fits the one before it fails by what it inherits: go back to the first that is not exact.
        number = np.arange(rows)
        first_wrong = np.argmin(good, axis=1)
        by_inheritance = fits[number, first_wrong]
        first_wrong = np.where(by_inheritance, np.argmax(defect > 0, axis=1), first_wrong)
        residual = np.where(finite, np.sqrt(np.square(defect).sum(axis=1)), np.nan)
        return Findings(defect, scale, residual, good.all(axis=1) & finite, ~finite, first_wrong)


def certify(run: ChainRun, f: Map, rows: Array) -> None:
    """Evaluate more of the given chains at the states that are to be handed over; once all is, judge them.

    Where a defect is more than rounding, probes measure what the chain amplifies, before the chain is judged.
    """
    if run.certificate is None:
        run.certificate = Certificate.empty(run.states, rows, run.steps)
    part = run.probes[-1] if run.probes else run.certificate
    pending = part.pending(run.sweeper.options.max_rows)
    part.take(pending, evaluate(run, f, pending, displaced_states(run, part)))
    if not part.complete:
        return
    if run.findings is None:
        run.findings = run.certificate.judge(run.sweeper, run.states, run.allowed)
        run.scale[rows] = run.findings.scale
    else:
        note_probe(run, run.certificate, part)
    suspects = rows[suspicious(run, rows, run.findings)]
    if suspects.size and len(run.probes) < _PROBES:
        size = np.maximum(run.bound(suspects), run.rounding * run.scale[suspects])
        last = run.probes[-1] if run.probes else None
        run.probes.append(run.certificate.probe(suspects, run.steps, size, last))
        return
    conclude(run, rows, run.findings)


def displaced_states(run: ChainRun, part: Certificate) -> Tensor:
    """The states ``(B, T * D)`` at which a part of a certificate evaluates f."""
    if part.displaced is None:
        return run.rows()
    states = run.states[:-1].clone()
    states[tensor_like(states, part.places)] += part.displaced
    return run.sweeper.join(states.reshape(len(run.start), run.steps, -1), run.start)


def suspicious(run: ChainRun, rows: Array, findings: Findings) -> Array:
    """``(R,)``: which chains pass by their defects, which are more than rounding."""
    inexact = (findings.defect > run.rounding * findings.scale).any(axis=1)
    return findings.passed & inexact & ~run.in_order[rows] & run.sweeper.single_steps


def note_probe(run: ChainRun, certificate: Certificate, probe: Certificate) -> None:
    """Take in what a probe has shown: by how much each step enlarged the displacement of its input."""
    assert probe.displaced is not None
    size = to_host(torch.linalg.vector_norm(probe.displaced, dim=1)).reshape(len(probe.rows), run.steps)
    gains = certificate.changes(probe, run.steps)[:, 1:] / size[:, :-1]
    row, step = np.broadcast_arrays(probe.rows[:, None], np.arange(1, run.steps))
    run.gains.note(row.ravel(), step.ravel(), gains.ravel(), np.full(gains.size, np.nan))


def conclude(run: ChainRun, rows: Array, findings: Findings) -> None:
    """End the chains that pass; the others go on from their first wrong state."""
    run.residual[rows] = findings.residual
    # A small defect is a large error where the steps after it enlarge it.
    error = run.gains.accumulated(rows, findings.defect)
    rough = run.ahead(rows).max(axis=1, initial=0) > np.log(AMPLIFIES)
    wrong = error > run.bound(rows) / np.where(rough, STRICTER, 1)[:, None]
    amplified = suspicious(run, rows, findings) & wrong.any(axis=1)
    first = np.where(amplified, np.argmax(findings.defect > 0, axis=1), findings.first_wrong)
    passed = findings.passed & ~amplified
    again = ~passed & ~findings.failed
    run.end_rows(rows, findings.failed, passed)
    run.error[rows[again]] = findings.defect[again]
    run.certificate, run.findings, run.probes = None, None, []
    go_back(run, rows[again], first[again])
