"""The caller's f as a map on rows, checked where it is first evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint.engine.ambient import Ambient, version
from fixpoint.engine.layout import Layout, leaves, map_leaves
from fixpoint.engine.transforms import ClosureError, plain, transformed


class RowMap:
    """``f(z, *args)`` on flat rows ``(rows, dim)``.

    ``inputs`` are the tensors in args and, if f is a module, its parameters. Called with further tensors, it puts them
    in the place of the inputs.

    The first evaluation checks what f returns and, when gradients are wanted, whether it depends on anything that
    requires them. A first evaluation inside ``no_grad`` builds the graph to look at it, with nothing saved in it.
    ``calls`` counts the evaluations that f completed. What f draws and updates beside its output is the business of
    ``ambient``; a map on some of the rows shares those of the map on all.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: Sequence[Any],
        layout: Layout,
        *,
        gradients: bool,
        ambient: Ambient | None = None,
    ) -> None:
        self._f = f
        self._args = tuple(args)
        self.layout = layout
        self.calls = 0
        self._gradients = gradients
        parameters, self._places = _parameters(f) if isinstance(f, nn.Module) else ([], [])
        tensors = [leaf for _, leaf in leaves(self._args) if isinstance(leaf, Tensor)]
        self.inputs = (*tensors, *parameters)
        self._checked = torch.compiler.is_compiling()
        self._probed: tuple[Tensor, Tensor] | None = None
        self.ambient = ambient or Ambient(f, layout.device)

    @property
    def can_take(self) -> bool:
        """Whether a part of the rows makes sense: one batch dimension, and an argument that has it too."""
        return len(self.layout.batch_shape) == 1 and any(self._is_aligned(leaf) for _, leaf in leaves(self._args))

    def take(self, index: Tensor) -> RowMap:
        """f on the rows ``index`` alone, with those rows of the arguments that have the batch dimension."""

        def pick(leaf: Any) -> Any:
            return leaf.index_select(0, index.to(leaf.device)) if self._is_aligned(leaf) else leaf

        args, layout = map_leaves(pick, self._args), self.layout.with_rows(len(index))
        return RowMap(self._f, args, layout, gradients=False, ambient=self.ambient)

    def part(self, z: Tensor, row: Tensor, block: Tensor) -> Tensor:
        """Blocks ``block`` ``(N,)`` of rows ``row`` ``(N,)`` of ``f(z)``, as ``(N, dim)``: of T blocks a row.

        Only an f that has a ``part`` itself spares the evaluation of the others.
        """
        state = self.layout.unflatten(z)
        blocks = state.shape[1]
        part = getattr(self._f, "part", None)
        if part is None or len(block) == len(state) * blocks or self.ambient.repeats:
            return self(z).reshape(len(z), blocks, -1)[row, block]
        self.calls += 1
        return self._surrounded(lambda: part(state, row, block)).reshape(len(block), -1)

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
        self._probed = (z, fz)
        return fz.requires_grad

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        if inputs:
            return self._evaluate(z, inputs) if self._checked else self._evaluate_checked(z, inputs)
        if self._probed is not None:
            at, fz = self._probed
            self._probed = None
            if at is z:
                return fz if torch.is_grad_enabled() else fz.detach()
        if self._checked:
            return self._evaluate(z)
        if self._gradients and not torch.is_grad_enabled():
            with torch.enable_grad():
                fz, requires_grad = self._look(z)
        else:
            fz = self._evaluate_checked(z)
            requires_grad = fz.requires_grad
        if self.must_differentiate() and not requires_grad:
            raise ValueError(
                "f's output does not depend on what requires grad: an argument or a parameter of f requires it, the "
                "output does not. Look for detach(), no_grad() or NumPy inside f, or pass backward=None if no gradient "
                "is wanted."
            )
        return fz

    def _look(self, z: Tensor) -> tuple[Tensor, bool]:
        """f(z) without a graph, and whether it would have one; saves nothing for backward."""
        with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: torch.empty(0)):
            fz = self._evaluate_checked(z)
        return fz.detach(), fz.requires_grad

    def _output(self, z: Tensor, inputs: Sequence[Tensor]) -> Any:
        state = self.layout.unflatten(z)
        if not inputs:
            output = self._surrounded(lambda: self._f(state, *self._args))
        else:
            given = iter(inputs)
            args = map_leaves(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, self._args)
            with _replaced(self._places, list(given)):
                output = self._surrounded(lambda: self._f(state, *args))
        self.calls += 1
        return output

    def _surrounded(self, evaluate: Callable[[], Any]) -> Any:
        """What an evaluation of f returns, in the dtype of the state, with all beside its arguments as it should be."""
        if not self.ambient.needed:
            return evaluate()
        with self.ambient.evaluation():
            output = evaluate()
        lower = self.ambient.lower
        if lower is None:
            return output
        return map_leaves(lambda x: x.to(self.layout.dtype) if getattr(x, "dtype", None) == lower else x, output)

    def _evaluate(self, z: Tensor, inputs: Sequence[Tensor] = ()) -> Tensor:
        return self.layout.flatten(self._output(z, inputs))

    def _evaluate_checked(self, z: Tensor, inputs: Sequence[Tensor] = ()) -> Tensor:
        before, written = z.detach().clone(), version(z)
        output = self._output(z, inputs)
        self.layout.check_output(output)
        # The version tells of a change that altered no value, such as relu_() on zeros; .data escapes the version.
        if version(z) != written or not torch.equal(plain(before), plain(z.detach())):
            raise ValueError("f changed its input in place (z += ..., z.relu_()): return a new tensor instead")
        self._checked = True
        fz = self.layout.flatten(output)
        if transformed(fz) and not transformed(z, *self.inputs, *inputs):
            raise ClosureError
        return fz


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
