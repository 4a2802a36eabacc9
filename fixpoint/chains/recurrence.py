"""Recurrences as fixed point problems: every state of ``x_{k+1} = step(x_k)`` at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fixpoint.chains.probes import displaced, slopes
from fixpoint.solvers.base import require_count


@runtime_checkable
class Chain(Protocol):
    """A recurrence whose steps can be asked for one by one, in any order and number.

    :class:`~fixpoint.CausalQuasiNewton` asks such a problem for those steps alone that it needs. Two further attributes
    are honoured if present: ``slopes``, ``(T,)`` or ``(T, D)``, what each step does to a small displacement of its
    input; and ``basis``, ``(D, D)`` orthogonal, in whose coordinates (columns) the slopes count. Where D is large, a
    sequence of matrices ``(n, n)``, one for each dimension of a state, stands for their Kronecker product. A third one,
    ``noise_scale`` ``(T,)``, says of a chain with random steps how large the noise is that each adds, as a norm.

    A chain of many steps, of which neighbours do nearly the same, may also be a :class:`SparseChain`. Then early rounds
    evaluate a part of the steps.

    Example:
        See :class:`fixpoint.Recurrence`, which is one.
    """

    @property
    def start(self) -> Tensor:
        """The state before the first step of each sample, ``(B, *shape)``."""

    @property
    def steps(self) -> int:
        """T, the number of steps."""

    @property
    def z0(self) -> Tensor:
        """A guess of the states after each step, ``(B, T, *shape)``."""

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """States ``(N, *shape)`` after the steps ``step`` ``(N,)`` of the samples ``sample`` ``(N,)`` from ``x``.

        A step of a sample may come more than once in a call, from other states.
        """


@runtime_checkable
class SparseChain(Chain, Protocol):
    """A :class:`Chain` that can guess what a step does from what its neighbours do.

    A subclass that overrides ``transition`` and not ``sparse_transition`` is evaluated whole.

    Example:
        >>> import torch, fixpoint
        >>> class Slow(fixpoint.Recurrence):
        ...     def sparse_transition(self, x, sample, step, evaluated):
        ...         change = self.transition(x[evaluated], sample[evaluated], step[evaluated]) - x[evaluated]
        ...         last = torch.searchsorted(evaluated, torch.arange(len(step)), right=True) - 1
        ...         return x + change[last], torch.zeros(len(step))  # as the last evaluated step did
        >>> chain = Slow(lambda x: x + 0.002 * (1 - x), torch.zeros(1, 1), steps=1000)
        >>> solution = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-4, backward=None)
        >>> torch.allclose(solution.value, chain.sequential(), atol=1e-3)
        True
    """

    def sparse_transition(self, x: Tensor, sample: Tensor, step: Tensor, evaluated: Tensor) -> tuple[Tensor, Tensor]:
        """As ``transition``, but only some of the rows are evaluated, the others are interpolated.

        Args:
            x, sample, step: as for ``transition``. Rows come in stretches: the steps of a sample, ascending. A sample
                may have several, of inputs that have nothing to do with each other.
            evaluated: ``(M,)`` int64, numbers of the rows to evaluate, ascending. The first and the last row of each
                stretch are among them.

        Returns:
            The states ``(N, *shape)`` after the steps; those of evaluated rows are what ``transition`` gives. And
            ``(N,)``, of each evaluated row between two others of its stretch, the norm of what interpolation between
            these two would have missed it by; 0 elsewhere.
        """


class Recurrence:
    """``x_{k+1} = step(x_k, *inputs_k)`` for T steps, as one problem: a recurrent network, an ODE's steps.

    The unknown ``z`` has shape ``(B, T, *shape)``: row k is the state after step k. It solves ``z = recurrence(z)``,
    whose row k is one step from row k - 1, the first from ``start``.

    Args:
        step: called as ``step(x, *inputs)`` with states ``(N, *shape)`` of any samples and steps, mixed, and for each
            of ``inputs`` the rows ``(N, ...)`` that belong to them; returns ``(N, *shape)``. Must treat rows alone.
        start: ``(B, *shape)``, the state before the first step.
        inputs: tensors ``(B, T, ...)``, such as the sequence a network reads, or the time of each step.
        steps: T; may be left out where an input tells. A chain without samples or without steps is solved at once.
        slopes: what each step does to a small displacement, ``(T,)`` or, one for each entry of a state, ``(T, D)``;
            None: found on the way.

    Raises:
        TypeError, ValueError: for arguments that do not fit together, and for a step that returns another shape, dtype
            or device than it was given.

    Example:
        >>> import torch, fixpoint
        >>> h = 0.01
        >>> pendulum = fixpoint.Recurrence(
        ...     lambda x: x + h * torch.stack((x[:, 1], -x[:, 0].sin()), dim=1), torch.tensor([[1.0, 0.0]]), steps=500
        ... )
        >>> solution = fixpoint.solve(pendulum, solver=fixpoint.CausalQuasiNewton(), rtol=1e-4, backward=None)
        >>> torch.allclose(solution.value, pendulum.sequential(), atol=1e-3), solution.nfev < 20
        (True, True)
    """

    batch_dims = 1

    def __init__(
        self,
        step: Callable[..., Tensor],
        start: Tensor,
        *,
        inputs: Sequence[Tensor] = (),
        steps: int | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        if not isinstance(start, Tensor) or not start.is_floating_point() or start.ndim < 1:
            raise TypeError("start must be a floating point tensor of shape (B, *shape)")
        if not isinstance(inputs, tuple | list) or not all(isinstance(given, Tensor) for given in inputs):
            raise TypeError("inputs must be a tuple or list of tensors of shape (B, T, ...): write inputs=(x,)")
        if steps is None and not any(given.ndim > 1 for given in inputs):
            raise ValueError("steps is missing: pass it, or inputs of shape (B, T, ...)")
        told = next((given.shape[1] for given in inputs if given.ndim > 1), 0)
        self.steps = told if steps is None else require_count("steps", steps, 0)
        for number, given in enumerate(inputs):
            if tuple(given.shape[:2]) != (len(start), self.steps):
                raise ValueError(
                    f"inputs[{number}] must have shape (B, T, ...) = ({len(start)}, {self.steps}, ...), "
                    f"found {tuple(given.shape)}"
                )
        self.step = step
        self.start = start
        self.inputs = tuple(inputs)
        self.slopes = slopes

    @property
    def z0(self) -> Tensor:
        """Every state equal to ``start``."""
        return self.start.detach().unsqueeze(1).expand(-1, self.steps, *self.start.shape[1:]).clone()

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """The states ``(N, *shape)`` after chosen steps of chosen samples, see :class:`Chain`."""
        return self.step(x, *(given[sample, step] for given in self.inputs))

    def __call__(self, z: Tensor) -> Tensor:
        """One step from every state: ``(B, T, *shape)`` to the same shape."""
        return one_step(self, z)

    def sequential(self) -> Tensor:
        """The states, one step after another: ``(B, T, *shape)``."""
        x, states = self.start, []
        for k in range(self.steps):
            x = self.step(x, *(given[:, k] for given in self.inputs))
            states.append(x)
        return torch.stack(states, dim=1) if states else self.z0


class OneStep:
    """A chain as the map that takes one step from every state, of which single steps can be evaluated."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.slopes = getattr(chain, "slopes", None)
        self.basis = getattr(chain, "basis", None)
        self.noise_scale = getattr(chain, "noise_scale", None)

    def __call__(self, z: Tensor) -> Tensor:
        return one_step(self.chain, z)

    @property
    def sparse(self) -> bool:
        """Whether some of the steps can be interpolated, by a method that knows of the chain's ``transition``."""
        if not isinstance(self.chain, SparseChain) or "transition" in getattr(self.chain, "__dict__", {}):
            return False
        owners = {name: kind for kind in reversed(type(self.chain).__mro__) for name in vars(kind)}
        return issubclass(owners["sparse_transition"], owners["transition"])

    def part(self, z: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """States ``(N, *shape)`` after the steps ``step`` ``(N,)`` of samples ``sample`` ``(N,)``, from the states z.

        ``z`` is ``(B, T, *shape)``; step k starts from state k - 1 of it, the first from the chain's start.
        """
        x = self._inputs(z, sample, step)
        return _checked(x, self.chain.transition(x, sample, step), "shape", "dtype", "device")

    def sparse_part(self, z: Tensor, sample: Tensor, step: Tensor, evaluated: Tensor) -> tuple[Tensor, Tensor]:
        """As ``part``, see :class:`SparseChain`."""
        assert isinstance(self.chain, SparseChain)
        x = self._inputs(z, sample, step)
        states, missed = self.chain.sparse_transition(x, sample, step, evaluated)
        return _checked(x, states, "shape", "dtype", "device"), missed

    def probed_part(
        self, z: Tensor, sample: Tensor, step: Tensor, evaluated: Tensor, signs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``sparse_part``, with slopes ``(M, D)`` of the evaluated rows ``(M,)``, measured in the same call.

        Each is evaluated at inputs displaced by ``signs`` ``(count, M, D)`` as well. Where all rows are evaluated, the
        chain need not be a ``SparseChain``.
        """
        x = self._inputs(z, sample, step)
        some, count = x[evaluated], len(x)
        moved = displaced(some, signs)
        inputs = torch.cat((x, moved.flatten(0, 1)))
        samples, steps = (torch.cat((each, each[evaluated].repeat(len(signs)))) for each in (sample, step))
        if len(evaluated) == count:
            states = self.chain.transition(inputs, samples, steps)
            missed = torch.zeros(count, device=x.device)
        else:
            assert isinstance(self.chain, SparseChain)
            every = torch.cat((evaluated, torch.arange(count, len(inputs), device=x.device)))
            states, missed = self.chain.sparse_transition(inputs, samples, steps, every)
        states = _checked(inputs, states, "shape", "dtype", "device")
        found, others = states[:count], states[count:].unflatten(0, moved.shape[:2])
        return found, missed[:count], slopes(some, found[evaluated], moved, others)

    def _inputs(self, z: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        first = (step == 0).reshape(-1, *[1] * (z.ndim - 2))
        before = z[sample, (step - 1).clamp(min=0)]
        return torch.where(first, self.chain.start.to(z.dtype)[sample], before)


def one_step(chain: Chain, z: Tensor) -> Tensor:
    """One step of ``chain`` from every state of ``z`` ``(B, T, *shape)``, the first from its start."""
    start = chain.start
    expected = (len(start), chain.steps, *start.shape[1:])
    if tuple(z.shape) != expected:
        raise ValueError(f"a chain's state has shape (B, T, *shape) = {expected}, found {tuple(z.shape)}")
    x = torch.cat((start.unsqueeze(1).to(z.dtype), z), dim=1)[:, : chain.steps]
    sample, step = all_pairs(len(z), chain.steps, z.device)
    x = x.flatten(0, 1)
    # Of an f as a whole the dtype and the device are checked where it is evaluated: autocast may lower the first.
    return _checked(x, chain.transition(x, sample, step), "shape").reshape(z.shape)


def _checked(x: Tensor, out: Tensor, *names: str) -> Tensor:
    """``out``, which must be what the transition got, ``x``, in the attributes of these names."""
    for name in names:
        found, expected = getattr(out, name, type(out)), getattr(x, name)
        if found != expected:
            raise ValueError(f"a chain's transition must return the {name} of its input, {expected}; found {found}")
    return out


def all_pairs(samples: int, steps: int, device: Any) -> tuple[Tensor, Tensor]:
    """Sample and step of every row of a chain's state, sample by sample: two ``(B * T,)``."""
    sample, step = torch.arange(samples, device=device), torch.arange(steps, device=device)
    return sample.repeat_interleave(steps), step.repeat(samples)
