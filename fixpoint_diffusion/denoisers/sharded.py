"""A denoiser whose rows are shared among processes: each evaluates its part, all get the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from fixpoint_diffusion.denoisers.protocol import describe, from_outside, networks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

if dist.is_available():
    import torch.distributed.nn  # imported while there is a process group, it would keep its threads alive

# What every rank tells the others once it has its part, as int64.
_TOLD = ("calls", "rows", "width of the output", "dtype of the output", "failed", "latents", "timesteps")
# An output of another dtype has other bytes: to gather both would end a process without an error.
_DTYPES = tuple(dict.fromkeys(each for each in vars(torch).values() if isinstance(each, torch.dtype)))


def sharded(denoiser: Callable[..., Tensor], mesh: DeviceMesh | dist.ProcessGroup | None = None) -> ShardedDenoiser:
    """The same denoiser, with the rows of every call shared among the ranks of a device mesh or process group.

    One sample over many devices: a round of a parallel solver is one call with many rows. Every rank runs the same
    program on the same chain. In a call each evaluates an equal part of the rows, and the outputs are gathered; the
    solver's own work is cheap and runs everywhere alike. So all ranks go through the same rounds, and end with the same
    numbers, as one process would up to rounding.

    Args:
        denoiser: called as ``denoiser(x, t, **inputs)``; on each rank a copy with the same weights, on its own device.
            Its parameters may be sharded too: by tensor parallelism along another dimension of the mesh, by FSDP2
            (``fully_shard``) along another or the same.
        mesh: a mesh with one dimension, such as ``mesh["rows"]``, or a process group; None: all processes.

    Returns:
        A denoiser. On one process alone, it calls the given one and nothing else.

    Raises:
        ValueError: for a mesh of more than one dimension; at a call, for tensor parallelism over the same ranks.
        RuntimeError: without a process group; at a call, on all ranks, if they are asked for different rows, or if one
            of them fails. A rank that dies ends the others by the time-out of the process group at the latest
            (``init_process_group(timeout=...)``).

    Example:
        >>> import torch, torch.distributed as dist
        >>> store = dist.HashStore()  # torchrun and init_process_group() without arguments, where there are more
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> denoiser = sharded(lambda x, t: x / 2)
        >>> denoiser(torch.ones(2, 3), torch.tensor([3, 4])).shape
        torch.Size([2, 3])
        >>> dist.destroy_process_group()
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "sharded() needs a process group: start with torchrun and call torch.distributed.init_process_group()"
        )
    if mesh is None:
        return ShardedDenoiser(denoiser, dist.group.WORLD)
    if isinstance(mesh, dist.ProcessGroup):
        return ShardedDenoiser(denoiser, mesh)
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh must have one dimension, such as mesh['rows']; it has {mesh.ndim}: {mesh.mesh_dim_names}"
        )
    return ShardedDenoiser(denoiser, mesh.get_group())


class ShardedDenoiser:
    """What :func:`sharded` returns.

    Gradients flow to x, to the inputs and to the parameters of the network (that is the denoiser itself, or its
    attribute ``model``, if it is a module), and are the same on every rank as on one process: nothing is left to
    average. Of parameters that a plain function holds, each rank gets the share of its own rows. ``torch.func`` does
    not see through the exchange.

    Attributes:
        denoiser: the one whose rows are shared.
        rows_here: rows that this rank has evaluated so far.
        prediction_type, sample_shape, schedule_config, prior, learned_variance, conditioning, per_sample: those of the
            denoiser.

    Example:
        See :func:`fixpoint_diffusion.denoisers.sharded`, which returns one.
    """

    def __init__(self, denoiser: Callable[..., Tensor], group: Any) -> None:
        about = describe(denoiser)
        self.denoiser = denoiser
        self.prediction_type = about.prediction_type
        self.sample_shape = about.sample_shape
        self.schedule_config = about.schedule_config
        self.prior = about.prior
        self.learned_variance = about.learned_variance
        self.conditioning = about.conditioning
        self.per_sample = about.per_sample
        self.rows_here = 0
        self._group = group
        self._calls = 0

    def __call__(self, x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        """Outputs ``(N, ...)`` for all rows ``(N, *shape)``, of which this rank evaluates its part."""
        size = dist.get_world_size(self._group)
        if size == 1:
            self.rows_here += len(x)
            return self.denoiser(x, t, **inputs)
        self._calls += 1
        share = _Share(len(x), dist.get_rank(self._group), size, self._group)
        out, failure = None, None
        try:
            if self._calls == 1:
                self._check_parts()
            out = self._own(share, x, t, inputs)
        except Exception as error:  # the other ranks must hear of it, or they would wait
            failure = error
        self._agree(x, t, out, failure)
        assert out is not None
        return _Gather.apply(out, share)

    def _check_parts(self) -> None:
        """Refuse a layer divided over the ranks that share rows: they would add up parts of different rows."""
        sharing = set(dist.get_process_group_ranks(self._group))
        for network in networks_of(self.denoiser):
            if _is_fully_sharded(network):  # which divides parameters, and gathers them for a call
                continue
            for name, value in network.named_parameters():
                together = sharing & set(value.device_mesh.mesh.flatten().tolist()) if _is_part(value) else set()
                if len(together) > 1:
                    raise ValueError(
                        f"{name} is divided by tensor parallelism over ranks {sorted(together)}, which share rows: "
                        f"give sharded() another dimension of the mesh"
                    )

    def _own(self, share: _Share, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The outputs for this rank's rows. A rank without any evaluates one and drops the output.

        So networks meet no empty batch, those with sharded parameters are called equally often everywhere, and every
        rank has a graph to run backwards through.
        """

        def mine(rows: Any) -> Any:
            if not isinstance(rows, Tensor) or rows.shape[:1] != x.shape[:1]:
                return rows
            own = _Take.apply(rows, share)
            return own if len(own) else torch.cat([own, rows[:1].detach()])

        self.rows_here += share.count
        given = {name: mine(value) for name, value in inputs.items()}
        return self._call(share, mine(x), mine(t), given)[: share.count].contiguous()

    def _call(self, share: _Share, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        network = next(networks_of(self.denoiser), None) if torch.is_grad_enabled() else None
        learned = dict(network.named_parameters()) if network is not None else {}
        learned = {name: value for name, value in learned.items() if value.requires_grad}
        if network is None or not learned:
            return self.denoiser(x, t, **inputs)
        if _is_fully_sharded(network):
            raise NotImplementedError(
                "gradients of the parameters of fully_shard are not summed over the ranks: sample under "
                "torch.no_grad(), or call requires_grad_(False)"
            )
        summed = _Same.apply(share, *map(_part_here, learned.values()))
        swapped = {
            f"network.{name}": _as_part(of, value) for (name, of), value in zip(learned.items(), summed, strict=True)
        }
        return functional_call(_CallWith(network, self.denoiser), swapped, (x, t), inputs)

    def _agree(self, x: Tensor, t: Tensor, out: Tensor | None, failure: Exception | None) -> None:
        """Tell what was asked for and whether it went well; raise on all ranks unless all agree."""
        width = -1 if out is None else out.shape[1:].numel()
        dtype = -1 if out is None else _DTYPES.index(out.dtype)
        told = torch.tensor([self._calls, len(x), width, dtype, int(failure is not None)], device=x.device)
        told = torch.cat([told, torch.stack([_digest(x), _digest(t)])])
        everyone = [torch.empty_like(told) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, told, group=self._group)
        table = dict(zip(_TOLD, torch.stack(everyone, dim=1).tolist(), strict=True))
        if any(table["failed"]):
            self._raise_failure(failure, table["failed"].index(1))
        for name, values in table.items():
            if len(set(values)) > 1:
                raise RuntimeError(
                    f"the ranks do not ask for the same: {name} {_by_rank(name, values)}, at call {self._calls}. "
                    f"All must solve the same chain, with the same seed, solver and options, on like devices"
                )

    def _raise_failure(self, failure: Exception | None, first: int) -> None:
        errors: list[str] = [""] * dist.get_world_size(self._group)
        mine = "" if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(errors, mine, group=self._group)
        if failure is not None:
            raise failure
        raise RuntimeError(f"the denoiser failed on rank {first} of {len(errors)}: {errors[first]}")

    def __repr__(self) -> str:
        return f"sharded({self.denoiser!r}, ranks={dist.get_world_size(self._group)})"


@dataclass(frozen=True)
class _Share:
    """Which of ``rows`` rows belong to this rank: consecutive ones, as many as the others have or one more."""

    rows: int
    rank: int
    size: int
    group: Any

    @property
    def counts(self) -> list[int]:
        """Rows of every rank."""
        return [(self.rows + self.size - 1 - rank) // self.size for rank in range(self.size)]

    @property
    def count(self) -> int:
        """Rows of this rank."""
        return self.counts[self.rank]

    @property
    def start(self) -> int:
        """The first of them."""
        return sum(self.counts[: self.rank])


# Every rank computes the same loss, of which its graph holds the part that belongs to its rows. So the adjoint of
# taking a part is to gather the parts, and the adjoint of using the same parameters everywhere is a sum. Each of these
# is written as the adjoint of the other, so that they can be differentiated twice.
class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: _Share) -> Tensor:
        ctx.share = share
        return x[share.start : share.start + share.count].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], ctx.share), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, share: _Share) -> Tensor:
        ctx.share = share
        most, counts = share.counts[0], share.counts
        sent = own if share.count == most else torch.cat([own, own.new_zeros(1, *own.shape[1:])])
        parts = own.new_empty(share.size * most, *own.shape[1:])
        dist.all_gather(list(parts.split(most)), sent.contiguous(), group=share.group)
        if counts[-1] == most:
            return parts
        return torch.cat([part[:count] for part, count in zip(parts.split(most), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Take.apply(grads[0], ctx.share), None


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: _Share, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.share = share
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Total.apply(ctx.share, *grads)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: _Share, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.share = share
        found = list(values)
        for dtype in dict.fromkeys(value.dtype for value in values):
            places = [place for place, value in enumerate(values) if value.dtype == dtype]
            flat = torch.cat([values[place].flatten() for place in places])
            dist.all_reduce(flat, group=share.group)
            for place, part in zip(places, flat.split([values[place].numel() for place in places]), strict=True):
                found[place] = part.view(values[place].shape)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Same.apply(ctx.share, *grads)


def is_sharded(denoiser: object) -> bool:
    """Whether the rows of a denoiser, or of the one that it is around, are shared among ranks."""
    return any(isinstance(each, ShardedDenoiser) for each in from_outside(denoiser))


class _CallWith(nn.Module):
    """A denoiser as a module with the parameters of its network, so that they can be exchanged for a call."""

    def __init__(self, network: nn.Module, denoiser: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self._denoiser = (denoiser,)  # in a tuple: it may be a module, and would have the parameters twice

    def forward(self, x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        return self._denoiser[0](x, t, **inputs)


def _is_fully_sharded(network: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers the parameters of a network, or of parts of it, as they are called."""
    from torch.distributed.fsdp import FSDPModule  # with the next ones, imported for a second or two

    return any(isinstance(each, FSDPModule) for each in network.modules())


def _is_part(value: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _part_here(value: Tensor) -> Tensor:
    """A parameter as a plain tensor: of one that tensor parallelism has divided, the part of this rank."""
    return value.to_local() if _is_part(value) else value


def _as_part(of: Tensor, part: Tensor) -> Tensor:
    """The inverse of :func:`_part_here`."""
    if not _is_part(of):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())


def _digest(x: Tensor) -> Tensor:
    """A number that differs where values do, as int64; ``()``."""
    total = x.detach().sum(dtype=torch.float32 if x.device.type == "mps" else torch.float64)
    return total.view(torch.int32 if total.dtype == torch.float32 else torch.int64).to(torch.int64)


def _by_rank(name: str, values: list[int]) -> str:
    if name in ("latents", "timesteps"):  # checksums say nothing
        other = next(rank for rank, value in enumerate(values) if value != values[0])
        return f"of rank {other} are not those of rank 0"
    of_dtype = name == "dtype of the output"
    return ", ".join(f"{_DTYPES[value] if of_dtype else value} on rank {rank}" for rank, value in enumerate(values))
