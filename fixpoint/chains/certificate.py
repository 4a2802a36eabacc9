"""The certificate of a chain: an evaluation of all its steps at the states that are handed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.amplification import STRICTER, doubtful, go_back
from fixpoint.chains.run import ChainRun, evaluate
from fixpoint.chains.twin import Twin
from fixpoint.engine.loop import Map
from fixpoint.engine.norms import Array, safe_norm, to_host
from fixpoint.engine.outcome import figures_like, tensor_like

if TYPE_CHECKING:
    from fixpoint.chains.causal_sweep import CausalSweep


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
    """

    rows: Array
    images: Tensor
    places: Array
    known: int = 0

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

    def images_of(self, rows: Array, steps: int) -> Tensor:
        """Images ``(R, T, D)`` of some of the chains."""
        every = self.images.reshape(len(self.rows), steps, -1)
        return every[tensor_like(every, np.searchsorted(self.rows, rows))]

    def judge(
        self, sweeper: CausalSweep, states: Tensor, allowed: tuple[Array, Array], in_order: Array | bool = False
    ) -> Findings:
        """Compare the images with the states.

        A chain passes when the defect of each state is within ``atol + rtol * ||image||`` (for adjoints see
        ``CausalSweep.reference_norms``), and so is the error that it has and inherits by the problem's slopes.
        ``allowed`` holds atol of each state, ``(B, T)``, and rtol of each chain, ``(B,)``. What the noise blurs of a
        defect makes another sample, and no error that is inherited. Chains that went on step by step, ``in_order``
        ``(R,)``, are what f makes of exact states: their defects are what it rounds otherwise in another batch, and
        going back would change nothing.
        """
        rows, steps = len(self.rows), sweeper.steps
        images = self.images.reshape(rows, steps, -1)
        defects = images - states[tensor_like(states, self.places)].reshape(images.shape)
        step = torch.arange(steps, device=states.device).expand(rows, -1)
        length = safe_norm(defects)
        noise = figures_like(length, sweeper.noise)  # (T,)
        sharp = torch.where(length > noise, 1 - noise / length, 0)[..., None] * defects
        errors = defects + sweeper.inherited(sharp, step)
        norms = [length, *(safe_norm(x) for x in (images, errors))]
        defect, scale, error = to_host(torch.stack(norms))
        reference = sweeper.reference_norms(scale, torch.finfo(states.dtype).eps)
        bound = allowed[0][self.rows] + allowed[1][self.rows, None] * reference
        fits = defect <= bound
        good = fits & ((error <= bound) | np.reshape(in_order, (-1, 1)))
        finite = np.isfinite(defect).all(axis=1)
        # A state that fits the one before it fails by what it inherits: go back to the first that is not exact.
        number = np.arange(rows)
        first_wrong = np.argmin(good, axis=1)
        by_inheritance = fits[number, first_wrong]
        first_wrong = np.where(by_inheritance, np.argmax(defect > sweeper.noise, axis=1), first_wrong)
        with np.errstate(over="ignore"):  # squares of large states may leave the range
            residual = np.where(finite, np.sqrt(np.square(defect).sum(axis=1)), np.nan)
        return Findings(defect, scale, residual, good.all(axis=1) & finite, ~finite, first_wrong)


def certify(run: ChainRun, f: Map, rows: Array) -> None:
    """Evaluate more of the given chains at the states that are to be handed over; once all is, judge them.

    Where a defect is more than rounding, a twin measures what the chain amplifies, before the chain is judged.
    """
    if run.certificate is None:
        run.certificate = Certificate.empty(run.states, rows, run.steps)
    certificate = run.certificate
    pending = certificate.pending(run.sweeper.options.max_rows)
    certificate.take(pending, evaluate(run, f, pending))
    if not certificate.complete:
        return
    run.findings = certificate.judge(run.sweeper, run.states, run.allowed, run.in_order[rows])
    run.scale[rows] = run.findings.scale
    suspect = suspicious(run, rows, run.findings)
    if suspect.any():
        run.twin = Twin(run, f, rows[suspect], certificate, run.findings.defect[suspect])
    else:
        conclude(run, rows, run.findings)


def suspicious(run: ChainRun, rows: Array, findings: Findings) -> Array:
    """``(R,)``: which chains pass by their defects, which may still be large errors of later states."""
    rounding = np.where(doubtful(run, rows), 0, run.rounding)[:, None]
    inexact = (findings.defect > run.sweeper.noise + rounding * findings.scale).any(axis=1)
    return findings.passed & inexact & ~run.in_order[rows] & run.sweeper.single_steps


def conclude(run: ChainRun, rows: Array, findings: Findings, measured: Array | None = None) -> None:
    """End the chains that pass, the others go on. Those that were ``measured`` must pass by their errors, too."""
    run.residual[rows] = findings.residual
    passed, first = findings.passed.copy(), findings.first_wrong.copy()
    if measured is not None:
        # A small defect is a large error where the steps after it enlarge it. It may be enlarged more than the
        # displacement was, for its direction is another one; the more so, the more the chain enlarges at all.
        noise = run.sweeper.noise
        error = run.gains.accumulated(rows, np.maximum(findings.defect - noise, 0))
        caution = np.minimum(2 * np.exp(run.ahead(rows).max(axis=1, initial=0) / 2), STRICTER)
        wrong = (error * caution[:, None] > run.bound(rows) - noise).any(axis=1)
        wrong &= np.isin(rows, measured)
        passed &= ~wrong
        first[wrong] = np.argmax(findings.defect[wrong] > noise, axis=1)
    again = ~passed & ~findings.failed
    if run.together and (again.any() or len(rows) < run.remaining):
        run.residual[rows[passed]] = np.nan  # known once all of them pass
        passed[:] = False
    run.end_rows(rows, findings.failed, passed)
    run.error[rows[again]] = findings.defect[again]
    run.certificate, run.findings, run.twin = None, None, None
    go_back(run, rows[again], first[again])
