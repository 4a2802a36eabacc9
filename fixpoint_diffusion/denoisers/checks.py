"""What a chain asks of a denoiser: inputs that fit, none changed in place, and a fixed function of each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fixpoint_diffusion.denoisers.protocol import Description, networks_of
from fixpoint_diffusion.processes.flow import is_flow

# Two batches of other sizes may be rounded in other ways; then a second look decides, at one size.
_CLOSE = 1e-3
# So many roundings a latent is moved, in so many calls, to see what rounding alone does to the output. Rounding is to
# blame where that moves the output by so many times as much, and by so much of what the rows beside it do.
_ROUNDINGS, _TRIALS, _GROWTH, _SHARE = 4, 4, 10.0, 0.5


def check_process(about: Description, *, along_flow: bool) -> None:
    """Refuse steps along a flow for a denoiser that was trained on noise levels, and the other way round.

    Raises:
        ValueError: If the denoiser has a ``schedule_config`` of the other kind.
    """
    config = about.schedule_config
    if config is None or (is_flow(config) or bool(config.get("use_flow_sigmas"))) == along_flow:
        return
    trained, steps = ("noise levels", "along a flow") if along_flow else ("a flow", "of noise levels")
    raise ValueError(
        f"the denoiser was trained on {trained} ({config.get('_class_name')}), and these steps are "
        f"{steps}, at which it is told other latents: chain_from_scheduler(denoiser, x_T, denoiser.schedule_config)"
    )


def check_conditioning(
    given: Mapping[str, Tensor], about: Description, samples: int, device: torch.device
) -> dict[str, Tensor]:
    """The conditioning of a chain, on its device, with what the denoiser itself holds for each sample.

    Raises:
        TypeError: If the inputs are not given by name.
        ValueError: If an input has no row for each sample, or class labels are no whole numbers or out of range.
    """
    if not isinstance(given, Mapping):
        found = type(given).__name__
        raise TypeError(f"conditioning must name its inputs, as {{'class_labels': labels}}, got a {found}")
    conditioning = {**about.per_sample, **given}
    for name, rows in conditioning.items():
        if not isinstance(rows, Tensor) or rows.shape[:1] != (samples,):
            found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"conditioning {name!r} must be a tensor with one row for each of {samples} samples, got {found}"
            )
        wanted = about.conditioning.get(name.removeprefix("negative_"))
        if wanted is None or wanted.num_classes is None or rows.device.type == "meta":
            continue
        null = wanted.null_label
        fits = (rows >= 0) & (rows < wanted.num_classes) | (rows == (-1 if null is None else null))
        if rows.is_floating_point() or rows.shape != (samples,) or not bool(fits.all()):
            allowed = f"0 to {wanted.num_classes - 1}" + ("" if null is None else f", or {null} for no class")
            raise ValueError(f"{name} must be {samples} whole numbers from {allowed}; got {_short(rows)}")
    return {name: rows.to(device) for name, rows in conditioning.items()}


def call_checked(
    denoiser: Callable[..., Tensor], x: Tensor, t: Tensor, conditioning: Mapping[str, Tensor], *, channels: int
) -> Tensor:
    """The denoiser's output for rows ``(N, C, ...)``, ``(N, channels, ...)``, checked.

    The denoiser is given a copy of x, so that nothing of the caller's is ever written to.

    Raises:
        ValueError: If the output is no tensor, of another shape, dtype or device than asked for, or x was changed in
            place.
    """
    own = x.clone()
    versions = None if own.is_inference() or torch.compiler.is_compiling() else own._version
    out = denoiser(own, t, **conditioning)
    if versions is not None and own._version != versions:
        raise ValueError("the denoiser changed its input in place (x += ..., x.clamp_()): return a new tensor instead")
    if not isinstance(out, Tensor):
        raise ValueError(f"the denoiser must return a tensor, got {type(out).__name__}")
    expected = torch.Size([len(x), channels, *x.shape[2:]]) if x.ndim > 1 else x.shape
    if out.shape != expected:
        raise ValueError(_other_shape(x, expected, out.shape))
    for name, wanted in (("dtype", x.dtype), ("device", x.device)):
        found = getattr(out, name)
        if found != wanted:
            raise ValueError(f"the denoiser must return the {name} of its input, {wanted}; it returned {found}")
    return out


def _other_shape(x: Tensor, wanted: torch.Size, found: torch.Size) -> str:
    if wanted != x.shape:
        return (
            f"the denoiser must return a prediction and what it says of the variance, {wanted}; it returned {found}. "
            "load_denoiser and DiffusersDenoiser leave that out unless told learned_variance=True; or choose a fixed "
            "variance_type"
        )
    hint = ""
    if x.ndim > 1 and found == (len(x), 2 * x.shape[1], *x.shape[2:]):
        hint = "; if the second half is about a variance, give the denoiser an attribute learned_variance = True"
    return f"the denoiser must return the shape of its input, {wanted}; it returned {found}{hint}"


def check_fixed_function(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    conditioning: Mapping[str, Tensor],
    out: Tensor,
    *,
    rows: int,
    timesteps: Tensor,
) -> None:
    """See that a row's output is a function of that row alone, by one more call.

    The last row of a call that was made is asked for again, in second place, beside its double and the first row with
    its sign turned and at another timestep. That moves what rows share: a mean, a maximum, attention, or the timestep
    of the first row taken for all. Where it gives something else, two calls more of the same size tell whether it was
    more than rounding. If so, the last row is moved by a few roundings, alone, in four calls more: an output that moves
    about as far has rounding to blame, which differs from batch to batch. Fixed-point layers that do not converge are
    like that. All calls are made in the grad mode of the first, on which a layer that draws in training may depend.

    Args:
        denoiser: called as ``denoiser(x, t, **conditioning)``.
        x, t, conditioning: ``(N, ...)``, the rows of the call that was made.
        out: what it returned.
        rows: of the further call, from 1 to 3; with 1, where no call ever has two, only chance can be seen.
        timesteps: ``(T,)``, all that the denoiser will be asked about.

    Raises:
        ValueError: If the output depends on chance or on the rows beside it; the message names modules that do so.
    """
    other = timesteps[-1]
    for one in (timesteps[len(timesteps) // 2], timesteps[0]):
        other = torch.where((one == t[0]) | (one == t[-1]), other, one)
    alone = [(x[-1], t[-1], len(x) - 1)] * rows
    mixed = [(-x[0], other, 0), (x[-1], t[-1], len(x) - 1), (2 * x[-1], t[-1], len(x) - 1)][:rows]

    def ask(batch: list[tuple[Tensor, Tensor, int]]) -> Tensor:
        latents, times, sources = zip(*batch, strict=True)
        index = torch.tensor(sources, device=x.device)
        told = {name: value[index] for name, value in conditioning.items()}
        return denoiser(torch.stack(latents), torch.stack(times), **told).detach().clone()

    def moved_by_rounding() -> Tensor:
        """Outputs of the last row ``(trials, ...)``, each from latents that are moved a little."""
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(_TRIALS, rows, *x.shape[1:], generator=generator, device="cpu").to(x)
        factors = 1 + _ROUNDINGS * torch.finfo(x.dtype).eps * factors
        trials = [[(x[-1] * factor, t[-1], len(x) - 1) for factor in batch] for batch in factors]
        return torch.cat([ask(trial) for trial in trials])

    beside, place = (mixed, 1) if rows > 1 else (alone, 0)
    first = ask(beside)[place]
    if _close(first, out[-1]):
        return
    if not _close(ask(beside)[place], first):
        cause = _in_training(denoiser, _DropoutNd) or "it draws at random or keeps a state"
        raise ValueError(f"the denoiser gives another output for the same input: {cause}")
    without = ask(alone)[0]
    if not _close(without, first):
        moved = (moved_by_rounding().float() - without.float()).flatten(1).norm(dim=1).amax()
        beside_moves = _SHARE * (first.float() - without.float()).norm()
        ordinary = _GROWTH * _ROUNDINGS * torch.finfo(x.dtype).eps * without.float().norm()
        if moved >= torch.maximum(beside_moves, ordinary):
            return
        cause = _in_training(denoiser, _BatchNorm) or (
            "steps are solved as one batch, so rows must not see each other, nor the timestep of another"
        )
        raise ValueError(f"the denoiser's output for a row depends on the rows beside it: {cause}")


def _close(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:
        return True  # no values
    a, b = a.float(), b.float()
    # Values that are not finite are the solver's to report.
    same = ~(torch.isfinite(a).all() & torch.isfinite(b).all())
    same = same | ((a - b).norm() <= _CLOSE * torch.maximum(a.norm(), b.norm()))
    try:
        return bool(same)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return True  # under vmap values cannot be looked at


def _in_training(denoiser: object, kind: type[nn.Module]) -> str | None:
    """What to do about modules of that kind in training mode, or a network as a whole; None if there is none."""
    for network in networks_of(denoiser):
        active = [part for part in network.modules() if part.training]
        found = [part for part in active if isinstance(part, kind)] or active
        if found:
            return f"{type(found[0]).__name__} is in training mode; call model.eval()"
    return None


def _short(rows: Tensor) -> str:
    return f"{tuple(rows.shape)} {str(rows.dtype).removeprefix('torch.')} {rows.flatten()[:5].tolist()}"
