"""One process of a chain that is solved by several.

``python -m tests.fixpoint_diffusion.sharded_worker RANK WORLD_SIZE STORE OUT [die|mesh]``; imported, the same without
processes.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fixpoint
from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    StepwiseInverse,
    StochasticDDIMChain,
    embedded,
    initial_noise,
    invert,
    sample,
)
from fixpoint_diffusion.denoisers import DiffusersDenoiser, FPDMDenoiser, Guided, sharded
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.pipelines import ParallelDDIMPipeline
from fixpoint_diffusion.ranks import ending_group

D = torch.float64
Wrap = Callable[[Any], Any]


class Network(nn.Module):
    """A small denoiser with parameters, and an input beside x and t."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(0.3 * torch.randn(4, 4, generator=generator, dtype=D))
        self.shift = nn.Parameter(0.1 * torch.randn(4, generator=generator, dtype=D))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix + label[:, None] * self.shift + (t / 1000)[:, None])


def everything(wrap: Wrap) -> dict[str, Any]:
    """Samples, an inverse and gradients, with the denoiser as ``wrap`` makes it."""
    schedule = NoiseSchedule.linear()
    labels = torch.tensor([0.5, -1.0, 2.0], dtype=D)
    x_T = initial_noise(seed=0, samples=range(3), shape=(4,)).to(D)
    network = Network()
    found: dict[str, Any] = {}

    def chain(steps: int, **options: Any) -> DDIMChain:
        return DDIMChain(wrap(network), x_T, schedule, steps=steps, conditioning={"label": labels}, **options)

    with torch.no_grad():
        for name, result in {
            "sample": sample(chain(25), rtol=1e-6),
            "one row a call": sample(chain(7), solver=fixpoint.CausalQuasiNewton(window=1)),
            "in parts": sample(chain(7, max_rows=4), rtol=1e-6),
        }.items():
            found[name] = [result.images, result.rounds, result.evals]
        inverse = invert(chain(20), chain(20).sequential(trajectory=False), rtol=1e-2, method=StepwiseInverse())
        found["invert, step by step"] = [inverse.x_T, inverse.error, inverse.rounds, inverse.evals]
        inverse = invert(chain(20), chain(20).sequential(trajectory=False), rtol=1e-2)
        found["invert"] = [inverse.x_T, inverse.error, inverse.rounds, inverse.evals]
        guided = wrap(Guided(network, 2.0))
        both = {"label": labels, "negative_label": torch.zeros_like(labels)}
        result = sample(StochasticDDIMChain(guided, x_T, schedule, steps=10, seed=3, conditioning=both), rtol=1e-6)
        found["guided"] = [result.images, result.rounds]
        torch.manual_seed(0)
        fpdm = FPDMDenoiser(FPDM(FPDMConfig(width=16, heads=2)).double().eval(), depth=3)
        images = initial_noise(seed=0, samples=range(2), shape=(1, 8, 8)).to(D)
        found["fpdm"] = [sample(DDIMChain(wrap(fpdm), images, schedule, steps=5), rtol=1e-6).images]

        found["pipeline"] = pipeline_images(wrap)

    start = x_T.clone().requires_grad_()
    told = labels.clone().requires_grad_()
    whole = DDIMChain(wrap(network), start, schedule, steps=6, conditioning={"label": told})
    z = fixpoint.solve(whole, rtol=1e-10, solver=fixpoint.CausalQuasiNewton(), backward=fixpoint.IFT(rtol=1e-10)).value
    z[:, -1].square().sum().backward()
    found["gradients"] = [start.grad, told.grad, network.mix.grad, network.shift.grad]

    x = torch.ones(3, 4, dtype=D, requires_grad=True)
    out = wrap(network)(x, torch.tensor([1, 2, 3]), label=labels)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    found["second derivatives"] = list(torch.autograd.grad(slope.square().sum(), (x, network.mix)))
    return found


def pipeline_images(wrap: Wrap) -> list[Any]:
    """Images of a pipeline whose ``shard_rows`` has the place of ``wrap``, unless that changes nothing."""
    network = copy.deepcopy(embedded("ddpm-digits").model).double()
    pipeline = ParallelDDIMPipeline(unet=network, scheduler=DDIMScheduler(num_train_timesteps=1000))
    if wrap is sharded:
        pipeline.shard_rows()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipeline(batch_size=3, num_inference_steps=5, generator=generator, output_type="np", rtol=1e-5)
    return [torch.from_numpy(output.images), output.rounds, output.evals]


def faults(rank: int) -> dict[str, str]:
    """What each rank says when they do not ask for the same, or when one fails."""
    schedule, x_T = NoiseSchedule.linear(), initial_noise(seed=0, samples=range(2), shape=(4,))

    def said(run: Callable[[], Any]) -> str:
        try:
            run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def broken(x: Tensor, t: Tensor) -> Tensor:
        if rank == 1 and bool((t < 500).any()):
            raise ZeroDivisionError("no such row")
        return 0.5 * x

    def other(x: Tensor, t: Tensor) -> Tensor:
        return x.double() if rank == 1 else x

    half = sharded(lambda x, t: 0.5 * x)
    uneven = DDIMChain(half, x_T, schedule, steps=4 + rank)
    return {
        "steps": said(lambda: uneven(torch.zeros(2, 4 + rank, 4))),
        "seed": said(lambda: sample(DDIMChain(half, x_T + rank, schedule, steps=5))),
        "auto": said(lambda: sample(DDIMChain(half, x_T, schedule, steps=5), max_rows="auto")),
        "dtype": said(lambda: sample(DDIMChain(sharded(other), x_T, schedule, steps=5))),
        "a rank fails": said(lambda: sample(DDIMChain(sharded(broken), x_T, schedule, steps=5))),
        "after all that": said(lambda: sample(DDIMChain(sharded(lambda x, t: 0.5 * x), x_T, schedule, steps=5))),
    }


class Layers(nn.Module):
    """A denoiser with two layers, whose parameters can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x) + (t / 1000)[:, None]


def images_of(denoiser: Any, first: int) -> list[Any]:
    """Two samples of a seed's, from the given one on."""
    x_T = initial_noise(seed=0, samples=range(first, first + 2), shape=(4,)).to(D)
    with torch.no_grad():
        result = sample(DDIMChain(denoiser, x_T, NoiseSchedule.linear(), steps=9), rtol=1e-8)
    return [result.images, result.rounds]


def transformer(mesh: DeviceMesh | None = None) -> DiTTransformer2DModel:
    """A small one of diffusers, its attention and MLP divided by tensor parallelism over a mesh if there is one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4, "patch_size": 2}
        channels = {"in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 10, "norm_num_groups": 1}
        model = DiTTransformer2DModel(**sizes, **channels).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    if mesh is not None:
        (block,) = model.transformer_blocks
        block.attn1.heads //= mesh.size()
        plan = dict.fromkeys(["attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj"], ColwiseParallel())
        parallelize_module(block, mesh, {**plan, "attn1.to_out.0": RowwiseParallel(), "ff.net.2": RowwiseParallel()})
    return model


def solved(network: DiTTransformer2DModel, wrap: Wrap) -> dict[str, Any]:
    """A sample, an inverse and gradients with a network that may be in parts, the denoiser as ``wrap`` makes it."""
    denoiser, schedule = wrap(DiffusersDenoiser(network, prediction_type="epsilon")), NoiseSchedule.linear()
    start = initial_noise(seed=0, samples=range(2), shape=(1, 4, 4)).to(D).requires_grad_()

    def chain(steps: int) -> DDIMChain:
        labels = torch.tensor([1, 2])
        return DDIMChain(denoiser, start, schedule, steps=steps, conditioning={"class_labels": labels})

    with torch.no_grad():
        result = sample(chain(9), rtol=1e-8)
        inverse = invert(chain(9), result.images, rtol=1e-2)
    solver, backward = fixpoint.CausalQuasiNewton(), fixpoint.IFT(rtol=1e-10)
    z = fixpoint.solve(chain(5), rtol=1e-10, solver=solver, backward=backward).value
    z[:, -1].square().sum().backward()
    gradients = [each.grad for each in (start, *network.parameters())]
    return {
        "sample": [result.images, result.rounds],
        "invert": [inverse.x_T, inverse.error, inverse.rounds],
        "gradients": [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients],
    }


def sharded_fpdm(mesh: DeviceMesh | None, **config: Any) -> FPDM:
    """An FPDM, its parameters sharded over a mesh if there is one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FPDM(FPDMConfig(**config))
        for parameter in model.parameters():  # zeros at the end would leave nothing to train before it
            nn.init.normal_(parameter, std=0.1)
    if mesh is not None:
        for part in (*model.pre, *model.post, model):  # the layer is called beside its own forward, by the model's
            fully_shard(part, mesh=mesh)
    return model


def training_step(mesh: DeviceMesh | None) -> list[Tensor]:
    """The parameters of a small FPDM after one step on two images a rank; without a mesh, on all of them."""
    model = sharded_fpdm(mesh, width=16, heads=2).double()
    x = initial_noise(seed=0, samples=range(8), shape=(1, 8, 8)).to(D)
    if mesh is not None:
        x = x[2 * dist.get_rank() :][:2]
    torch.manual_seed(3)  # the depths of stochastic JFB are the same everywhere
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x, torch.full((len(x),), 500)).square().mean().backward()
    optimizer.step()
    return [each.full_tensor() if mesh is not None else each.detach() for each in model.parameters()]


def two_dimensions() -> dict[str, Any]:
    """Rows along one dimension of a mesh of 2 x 2; along the other other samples, or parts of the parameters."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("others", "rows"))
    first = 2 * mesh.get_local_rank("others")
    network = Layers().requires_grad_(False)
    found: dict[str, Any] = {"first": first, "samples": images_of(sharded(network, mesh["rows"]), first)}
    for part in (*network.layers[::2], network):
        fully_shard(part, mesh=mesh["others"])
    found["parameters here"] = sum(each.to_local().numel() for each in network.parameters())
    found["fsdp"] = images_of(sharded(network, mesh["rows"]), 0)
    everybody = dist.init_device_mesh("cpu", (4,))
    same = fully_shard(Layers().requires_grad_(False), mesh=everybody)
    found["fsdp over the ranks that share rows"] = images_of(sharded(same), 0)
    divided = transformer(mesh["others"])
    found["tensor parallel"] = solved(divided, lambda denoiser: sharded(denoiser, mesh["rows"]))
    found["parameters of tensor parallelism here"] = divided.transformer_blocks[0].ff.net[2].weight.to_local().numel()
    try:
        solved(divided, sharded)
    except ValueError as error:
        found["refused"] = str(error)
    found["trained"] = training_step(everybody)
    return found


def die(rank: int) -> str:
    """Rank 1 is killed in the middle of a sample; what rank 0 says."""
    calls = 0

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5 * x

    chain = DDIMChain(sharded(denoiser), torch.ones(2, 4), NoiseSchedule.linear(), steps=9)
    try:
        chain.sequential()
    except RuntimeError as error:
        return type(error).__name__
    return "nothing"


if __name__ == "__main__":
    rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    with ending_group():
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        if sys.argv[5:] == ["die"]:
            torch.save(die(rank), out)
            os._exit(0)
        if sys.argv[5:] == ["mesh"]:
            torch.save(two_dimensions(), out)
        else:
            torch.save({"found": everything(sharded), "faults": faults(rank)}, out)
