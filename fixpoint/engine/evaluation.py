"""The caller's f as a map on rows, checked where it is first evaluated."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fixpoint.engine.ambient import Ambient, is_compiled, version
from fixpoint.engine.layout import Layout, leaves, map_leaves, require_same_layout
from fixpoint.engine.private import is_only_holder
from fixpoint.engine.transforms import ClosureError, plain, transformed


class RowMap:
    """``f(z, *args)`` on flat rows ``(rows, dim)``.

    The first evaluation is checked: what f returns and, when gradients are wanted, whether it depends on anything that
    requires them. It is an ordinary one, recorded by autograd where gradients are wanted. What f returns is copied
    where f may write to it again. What f draws and updates beside its output is the business of ``ambient``; a map on
    some of the rows shares that of the map on all.

    Args:
        f, args: The caller's.
        layout: How states are laid out as rows.
        gradients: Whether gradients are wanted.
        has_aux: Whether f returns ``(state, aux)``.
        ambient: That of a map on all rows.

    Attributes:
        inputs: The tensors in args and, if f is a module, its parameters. Called with further tensors, the map puts
            them in the place of the inputs.
        aux: What f returned beside the state when it was last evaluated.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: Sequence[Any],
        layout: Layout,
        *,
        gradients: bool,
        has_aux: bool = False,
        ambient: Ambient | None = None,
    ) -> None:
        self._f = f
        # Tensors of inference mode cannot be saved for backward, copies of them can.
        compiling = torch.compiler.is_compiling()
        self._args = map_leaves(_savable, tuple(args)) if gradients and not compiling else tuple(args)
        self._has_aux = has_aux
        self.layout = layout
        self.aux: Any = None
        self._gradients = gradients
        parameters, self._places = _parameters(f) if isinstance(f, nn.Module) else ([], [])
        tensors = [leaf for _, leaf in leaves(self._args) if isinstance(leaf, Tensor)]
        self.inputs = (*tensors, *parameters)
        self._checked = torch.compiler.is_compiling()
        self._first: tuple[Tensor, Tensor] | None = None  # a state and its image, until they are asked for
        self.ambient = ambient or Ambient(f, layout.device)

    @property
    def can_take(self) -> bool:
        """Whether a part of the rows may be evaluated alone.

        There must be one batch dimension, and an argument that has it too. A compiled f would be compiled again for
        each number of rows, and a hook would see what no plain loop shows it. Off the CPU, an f that looks up rows by
        number and reads past the end does not raise, it loses the device.
        """
        arguments = [leaf for _, leaf in leaves(self._args) if isinstance(leaf, Tensor)]
        if len(self.layout.batch_shape) != 1 or not any(map(self._is_aligned, arguments)):
            return False
        if self.layout.device.type != "cpu" and not all(x.is_floating_point() or x.is_complex() for x in arguments):
            return False
        return not (is_compiled(self._f) or any(m._forward_hooks or m._forward_pre_hooks for m in self.ambient.modules))

    def take(self, index: Tensor, layout: Layout | None = None, *, broken_at: Tensor | None = None) -> RowMap:
        """f on the rows ``index``, with those rows of the arguments that have the batch dimension.

        ``broken_at`` ``(rows,)``: only of arguments that are not finite in one of these rows.
        """

        def is_broken(leaf: Tensor) -> bool:
            return broken_at is None or not bool(torch.isfinite(leaf.detach()[broken_at.to(leaf.device)]).all())

        def pick(leaf: Any) -> Any:
            aligned = self._is_aligned(leaf) and is_broken(leaf)
            return leaf.index_select(0, index.to(leaf.device)) if aligned else leaf

        args = map_leaves(pick, self._args)
        layout = layout or self.layout.with_rows(len(index))
        return RowMap(self._f, args, layout, gradients=False, has_aux=self._has_aux, ambient=self.ambient)

    def part(self, z: Tensor, row: Tensor, block: Tensor) -> Tensor:
        """Blocks ``block`` ``(N,)`` of rows ``row`` ``(N,)`` of ``f(z)``, as ``(N, dim)``: of T blocks a row.

        Only an f that has a ``part`` itself spares the evaluation of the others.
        """
        state = self.layout.unflatten(z)
        blocks = state.shape[1]
        part = getattr(self._f, "part", None)
        if part is None or len(block) == len(state) * blocks or self.ambient.repeats:
            return self.layout.unflatten(self(z))[row, block].reshape(len(block), math.prod(state.shape[2:]))
        self._require_no_args()
        images = self._in_ambient_state(lambda: part(state, row, block), z).reshape(len(block), -1)
        # The first evaluation may have shown that each must see all blocks: other numbers were drawn for these alone.
        return images if self.may_skip else self.part(z, row, block)

    @property
    def may_skip(self) -> bool:
        """Whether some of the blocks may go unevaluated: not if each evaluation must see all of them."""
        return not self.ambient.repeats

    def sparse_part(self, z: Tensor, row: Tensor, block: Tensor, evaluated: Tensor) -> tuple[Tensor, Tensor]:
        """As ``part``, of an f that evaluates some of the blocks alone and guesses the others.

        Returns:
            The blocks, and of each ``(N,)`` by how much a guess would have missed it, where f can tell.
        """
        self._require_no_args()
        state, sparse_part = self.layout.unflatten(z), cast(Any, self._f).sparse_part
        images, missed = self._in_ambient_state(lambda: sparse_part(state, row, block, evaluated), z)
        return images.reshape(len(block), -1), missed

    def probed_part(
        self, z: Tensor, row: Tensor, block: Tensor, evaluated: Tensor, signs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``sparse_part``, with slopes of the evaluated blocks, found in directions of these ``signs``."""
        self._require_no_args()
        state, probed_part = self.layout.unflatten(z), cast(Any, self._f).probed_part
        images, missed, slopes = self._in_ambient_state(lambda: probed_part(state, row, block, evaluated, signs), z)
        return images.reshape(len(block), -1), missed, slopes

    def _require_no_args(self) -> None:
        if self._args:
            raise TypeError(
                "args are for an f that is called with them: what the steps of a chain need is in the chain"
            )

    def _is_aligned(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.layout.rows

    def must_differentiate(self) -> bool:
        """Whether an argument or a parameter requires grad, as far as can be seen from outside f."""
        return self._gradients and any(x.requires_grad for x in self.inputs)

    def differentiates(self, z: Tensor) -> bool:
        """Whether f(z) requires grad; the evaluation, graph and all, is kept for who asks for f at this ``z`` next."""
        if not self._gradients or self.must_differentiate() or transformed(z, *self.inputs):
            return self._gradients
        with torch.enable_grad():
            fz = self._evaluate_checked(z)
        self._first = (z, fz)
        return fz.requires_grad

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        if inputs:
            return self._evaluate(z, inputs) if self._checked else self._evaluate_checked(z, inputs)
        if self._first is not None:
            (at, fz), self._first = self._first, None
            if at is z:
                return fz if torch.is_grad_enabled() else fz.detach()
        if self._checked:
            return self._evaluate(z)
        if not self._gradients or torch.is_grad_enabled():
            fz = self._evaluate_checked(z)
            self._require_dependence(fz)
            return fz
        with torch.enable_grad():
            fz = self._evaluate_checked(z)
        self._require_dependence(fz)
        return fz.detach()

    def _require_dependence(self, fz: Tensor) -> None:
        if self.must_differentiate() and not fz.requires_grad:
            raise ValueError(
                "f's output does not depend on what requires grad: an argument in args or a parameter of f requires "
                "it, the output does not. Look for detach(), no_grad() or NumPy inside f, or pass backward=None if no "
                "gradient is wanted."
            )

    def _output(self, z: Tensor, inputs: Sequence[Tensor]) -> Any:
        state = self.layout.unflatten(z)
        written = _versions(state)
        if not inputs:
            output = self._in_ambient_state(lambda: self._f(state, *self._args), z)
        else:
            given = iter(inputs)
            args = map_leaves(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, self._args)
            with _replaced(self._places, list(given)):
                output = self._in_ambient_state(lambda: self._f(state, *args), *inputs, z)
        if _versions(state) != written:
            raise ValueError(_CHANGED)
        return output

    def _in_ambient_state(self, evaluate: Callable[[], Any], *tensors: Tensor) -> Any:
        """What an evaluation of f returns, in the dtype of the state. ``tensors`` are those that f sees."""
        if not self.ambient.needed:
            output = evaluate()
        else:
            output = self.ambient.evaluate(evaluate, wrapped=transformed(*tensors))
        self.ambient.calls += 1
        if self._has_aux:
            output, self.aux = _without_aux(output)
        lower = self.ambient.lower
        if lower is None:
            return output
        return map_leaves(lambda x: x.to(self.layout.dtype) if getattr(x, "dtype", None) == lower else x, output)

    def _given(self) -> str:
        """What f is called with, in words; of many tensors the first ones."""
        tensors = [*leaves(self.layout.example), *leaves(self._args, "args")]
        # Without "torch.": where f is a NumPy function, it was given arrays.
        told = [f"{at} {tuple(x.shape)} {str(x.dtype)[6:]}" for at, x in tensors if isinstance(x, Tensor)]
        return ", ".join(told[:_MOST_NAMED]) + (", ..." if len(told) > _MOST_NAMED else "")

    def _evaluate(self, z: Tensor, inputs: Sequence[Tensor] = ()) -> Tensor:
        if torch.compiler.is_compiling():
            return self.layout.flatten(self._output(z, inputs))
        output = self._output(z, inputs)
        references = sys.getrefcount(output)
        own = torch.is_grad_enabled() or _is_own(output, references)
        return self.layout.flatten(output) if own else self._copied(output)

    def _copied(self, output: Any) -> Tensor:
        """Rows that f cannot write to: it may keep what it returned, as a buffer of its own does."""
        rows = self.layout.flatten(output)
        return rows if transformed(rows) else rows.clone()

    def _evaluate_checked(self, z: Tensor, inputs: Sequence[Tensor] = ()) -> Tensor:
        before = z.detach().clone()
        try:
            output = self._output(z, inputs)
        except (TypeError, RuntimeError) as error:
            if isinstance(error, TypeError):
                error.add_note(f"f is called as f(z, *args), here with {len(self._args)} further arguments from args")
            if isinstance(error, RuntimeError) and "does not require grad" in str(error):
                error.add_note("z is no leaf that requires grad: an f that differentiates uses torch.func.grad")
            if not torch.compiler.is_compiling():
                error.add_note(f"f was given {self._given()}")
            raise
        require_same_layout(output, self.layout.example)
        # What is written through .data is not counted as a change.
        if not (torch.compiler.is_compiling() or torch.equal(plain(before), plain(z.detach()))):
            raise ValueError(_CHANGED)
        self._checked = True
        fz = self._copied(output)
        if transformed(fz) and not transformed(z, *self.inputs, *inputs):
            raise ClosureError
        return fz


_MOST_NAMED = 8  # tensors that are named in an error
_CHANGED = "f changed its input in place (z += ..., z.relu_()): return a new tensor instead"


def _versions(state: Any) -> Any:
    """How often the leaves of a state were written to; nothing in code that is compiled."""
    if torch.compiler.is_compiling():
        return None
    return version(state) if isinstance(state, Tensor) else [version(leaf) for _, leaf in leaves(state)]


def _savable(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _without_aux(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) != 2:
        found = f"{len(output)} entries" if isinstance(output, tuple) else type(output).__name__
        raise TypeError(f"with has_aux=True f must return (state, aux), found {found}")
    return output


def _is_own(output: Any, references: int) -> bool:
    """Whether nobody but the caller holds this output or its memory, so that nobody can write to it.

    Known of tensors on the CPU alone: what CUDA graphs return may be overwritten without being held by anybody.
    ``references`` is what ``sys.getrefcount`` says where the output is a local variable: a call in between would count,
    or not, as the interpreter likes.
    """
    if references != _OWN or not isinstance(output, Tensor) or not output.is_cpu or transformed(output):
        return False
    return is_only_holder(output)


def _references_of_own() -> int:
    output = torch.zeros(1) + 1
    return sys.getrefcount(output)


_OWN = _references_of_own()


Place = tuple[dict[str, Any], str, int]  # a module's dictionary of parameters, the name in there, and which one it is


def _parameters(module: nn.Module) -> tuple[list[Tensor], list[Place]]:
    """The parameters of a module, each once, and all places where they stand."""
    parameters: list[Tensor] = list(module.parameters())
    index = {id(x): i for i, x in enumerate(parameters)}
    own = [m._parameters for m in module.modules()]
    return parameters, [(place, key, index[id(x)]) for place in own for key, x in place.items() if x is not None]


@contextlib.contextmanager
def _replaced(places: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Tensors in the places of parameters. A module that stands in two places would keep what functional_call puts."""
    found = [place[key] for place, key, _ in places]
    try:
        for place, key, index in places:
            place[key] = tensors[index]
        yield
    finally:
        for (place, key, _), parameter in zip(places, found, strict=True):
            place[key] = parameter
