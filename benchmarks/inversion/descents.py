"""One descent of DEQ-DDIM's kind, and what is kept of it."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from functools import partial

import torch

from benchmarks.inversion.cases import Setting, chain, held_out
from benchmarks.inversion.cells import Cell
from fixpoint_diffusion.inversion import OptimisedInverse


def descent(
    method: OptimisedInverse,
    setting: Setting,
    count: int,
    *,
    epochs: int,
    rate: float | None,
    keep: bool = False,
) -> Cell:
    """``method`` for so many epochs on held-out digits, by Adam at a learning rate (None: by the method's own).

    Returns:
        ``losses`` (mean over the digits, by epoch), ``least`` and ``most`` (of a digit, by epoch), ``best`` (least loss
        of each digit), the sums ``rounds``, ``rows``, ``products``, ``product_rows``, ``seconds``, ``digits``; with
        ``keep`` also ``x_T``, where it ended.
    """
    images = held_out(count)[0]
    optimiser = method.optimiser if rate is None else partial(torch.optim.Adam, lr=rate)
    method = replace(method, optimiser=optimiser, stop=0.0, epochs=epochs)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = method.descend(chain(setting, images), images)
    seconds = time.process_time() - start
    history = found.history
    cell: Cell = {
        "losses": [float(epoch.loss.mean()) for epoch in history],
        "least": [float(epoch.loss.min()) for epoch in history],
        "most": [float(epoch.loss.max()) for epoch in history],
        "best": found.best_loss.tolist(),
        "rounds": sum(epoch.rounds for epoch in history),
        "rows": sum(epoch.evals for epoch in history),
        "products": sum(epoch.products for epoch in history),
        "product_rows": sum(epoch.product_rows for epoch in history),
        "seconds": seconds,
        "digits": count,
    }
    return cell | ({"x_T": found.x_T.tolist()} if keep else {})
