"""Part 5: a training step of a fixed point diffusion model beside a plain transformer of equal width."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

import fixpoint
from benchmarks.device.common import Part, normal
from benchmarks.device.networks import dit_config
from fixpoint_diffusion import FPDM, DiT, FPDMConfig
from fixpoint_diffusion.models import TransformerConfig

NO_GRAD = (0, 6, 12, 24)
MAX_GRAD = 12
BATCHES = (64, 32, 16)  # the first that fits the plain transformer
STEPS = 6  # draws of depths to average over


def main(part: Part) -> None:
    """The plain transformer, then S-JFB by its N: means over draws, and the deepest draw there is."""
    sizes = dit_config(part.rehearse)
    batch = 2
    for batch in (2,) if part.rehearse else BATCHES:
        before = len(part.document["errors"])
        with part.attempt(f"transformer, batch {batch}"):
            plain = DiT(sizes)
            measure(part, "transformer", None, plain, batch, plain)
        if len(part.document["errors"]) == before:
            break
    config = FPDMConfig(**{field.name: getattr(sizes, field.name) for field in fields(TransformerConfig)})
    for deepest in NO_GRAD:
        grad = 2 if part.rehearse else MAX_GRAD
        draws = fixpoint.StochasticJFB(max_no_grad=deepest, max_grad=grad, seed=0)
        worst = fixpoint.MultiStepJFB(no_grad=deepest, grad=grad)
        for name, rule in (("FPDM, S-JFB", draws), ("FPDM, deepest draw", worst)):
            if part.left < 2:
                part.leave_out(f"{name} N={deepest}", "no time left")
                continue
            with part.attempt(f"{name} N={deepest}"):
                model = FPDM(config)
                call = _with_rule(model, rule)
                measure(part, name, deepest, model, batch, call, steps=STEPS if rule is draws else 1)


def _with_rule(model: nn.Module, rule: fixpoint.Backward) -> Callable[..., Tensor]:
    return lambda x, t, y: model(x, t, y, backward=rule)


def measure(
    part: Part, name: str, deepest: int | None, model: nn.Module, batch: int, call: Any, *, steps: int = STEPS
) -> None:
    """Mean seconds of a step of AdamW under bfloat16 autocast, and its most memory, weights and moments apart."""
    model.to(part.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = model.config.sample_size  # type: ignore[union-attr]
    x, noise = (normal(batch, 4, size, size, seed=seed).to(part.device, torch.float32) for seed in (0, 1))
    t = torch.arange(batch, device=part.device) * 999 // max(batch - 1, 1)
    y = torch.arange(batch, device=part.device) % 1000

    def step() -> None:
        with torch.autocast(part.device, torch.bfloat16):
            loss = (call(x, t, y)[:, :4].float() - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    step()  # the optimiser's moments come with the first step
    optimizer.zero_grad(set_to_none=True)
    seconds: list[float] = []

    def all_steps() -> None:
        for _ in range(1 if part.rehearse else steps):
            part.wait()
            start = time.perf_counter()
            step()
            part.wait()
            seconds.append(time.perf_counter() - start)

    peak = part.peak(all_steps)
    part.add(
        "steps",
        name=name,
        no_grad=deepest,
        batch=batch,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=sum(seconds) / len(seconds),
        longest=max(seconds),
        peak_bytes=peak,
    )
