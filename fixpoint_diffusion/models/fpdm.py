"""The fixed point diffusion model: explicit blocks around one implicit, timestep-conditioned block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixpoint import Backward, FixedPointLayer, Picard, Solution, Solver, StochasticJFB, Unroll
from fixpoint_diffusion.models.blocks import (
    DiTBlock,
    Head,
    ImplicitBlock,
    Modulation,
    PatchEmbedding,
    TimestepEmbedding,
    sincos_positions,
)
from fixpoint_diffusion.models.fpdm_config import FPDMConfig


class FPDM(nn.Module):
    """A diffusion transformer whose middle is one fixed point layer (FPDM).

    Patches with fixed positions pass ``n_pre`` explicit blocks and give ``x_pre``. The layer solves

    ``z = f(z, u, t)``, ``f(z, u, t) = DiTBlock(W2 gelu(W1 [z; u]), c(t))``, ``u = Linear(x_pre)``,

    from ``z0 = x_pre`` or from a state the caller passes; ``n_post`` explicit blocks and a head turn the solution into
    the prediction. The timestep enters f alone. With ``num_classes``, the class enters every block.

    Nothing about a call stays on the module: depth, solver and starting state are arguments of :meth:`forward`.

    Args:
        config: The architecture.

    Source: Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", CVPR 2024, Eq. 1-4, Fig. 2.

    >>> model = FPDM(FPDMConfig(width=16, heads=2)).eval()
    >>> x, t = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 999])
    >>> with torch.no_grad():
    ...     prediction, solution = model(x, t, depth=4, return_solution=True)
    >>> prediction.shape, solution.value.shape, solution.nfev
    (torch.Size([3, 1, 8, 8]), torch.Size([3, 16, 16]), 4)
    """

    positions: Tensor

    def __init__(self, config: FPDMConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, ratio = config.width, config.heads, config.mlp_ratio
        conditional = config.num_classes is not None

        def explicit_blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(DiTBlock(width, heads, ratio, conditional=conditional) for _ in range(count))

        patch = config.patch_size
        self.patch_embedding = PatchEmbedding(config.in_channels, width, patch)
        self.register_buffer("positions", sincos_positions(config.sample_size // patch, width), persistent=False)
        self.time_embedding = TimestepEmbedding(width)
        # The row after the last class stands for "no class".
        self.class_embedding = nn.Embedding(config.num_classes + 1, width) if config.num_classes is not None else None
        self.pre = explicit_blocks(config.n_pre)
        self.injection = nn.Linear(width, width)
        self.implicit = FixedPointLayer(
            ImplicitBlock(width, heads, ratio),
            solver=Picard(),
            backward=StochasticJFB(max_no_grad=config.max_no_grad, max_grad=config.max_grad, attach_start=True),
        )
        self.post = explicit_blocks(config.n_post)
        self.head = Head(width, patch, config.out_channels, conditional=conditional)
        self._initialise()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        z0: Tensor | None = None,
        *,
        depth: int | None = None,
        solver: Solver | None = None,
        backward: Backward | None = None,
        rtol: float | None = None,
        max_evals: int | None = None,
        record: bool = False,
        return_solution: bool = False,
    ) -> Tensor | tuple[Tensor, Solution]:
        """Predict from noisy images.

        Args:
            x: Noisy images ``(N, C, H, W)``.
            t: Timesteps ``(N,)``, or one for all; 0 is the least noisy.
            y: Classes ``(N,)``, int64; ``num_classes`` is the null class, which None means for every image.
            z0: Where the layer starts, ``(N, L, D)``; None: the output of the pre blocks. Pass the previous timestep's
                ``solution.value`` to reuse it (Sec. 3.3).
            depth: Run exactly this many iterations, whatever the residual. None: solve to ``rtol``.
            solver: Solver of the layer; None: Picard.
            backward: How gradients are attached when grad mode is on. None: S-JFB in training mode; in evaluation mode,
                or with ``depth``, :class:`fixpoint.Unroll`, whose value is that of the run without gradient.
            rtol: Relative tolerance of the layer's solve; None: ``fixpoint.solve``'s default. Unused with ``depth``.
            max_evals: Bound on evaluations of that solve; None: ``fixpoint.solve``'s default. Unused with ``depth``.
            record: Keep the residual of every evaluation in ``solution.trace``.
            return_solution: Return ``(prediction, solution)``.

        Returns:
            The prediction ``(N, C, H, W)``, or ``(N, 2C, H, W)`` with ``learn_sigma``; on request with the layer's
            :class:`fixpoint.Solution`, whose ``value`` is ``(N, L, D)``.

        Raises:
            ValueError: If a shape, or ``y`` for an unconditional model, does not fit the configuration.
        """
        state, inputs, label = self._before_layer(x, t, y)
        if z0 is not None:
            if z0.shape != state.shape:
                raise ValueError(f"z0 must have shape {tuple(state.shape)} (N, L, D), got {tuple(z0.shape)}")
            state = z0
        if backward is None and not (self.training and depth is None):
            backward = Unroll()
        given = {"depth": depth, "solver": solver, "backward": backward, "rtol": rtol, "max_evals": max_evals}
        options = {name: value for name, value in given.items() if value is not None}
        solution = self.implicit(*inputs, z0=state, return_solution=True, record=record, **options)
        tokens = solution.value
        for block in self.post:
            tokens = block(tokens, label)
        prediction = self.head(tokens, label)
        return (prediction, solution) if return_solution else prediction

    def _before_layer(
        self, x: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """``x_pre``, what the implicit block takes beside z, and the class embedding."""
        if x.ndim != 4 or x.shape[1:] != self.config.sample_shape:
            raise ValueError(f"x must have shape (N, *{self.config.sample_shape}), got {tuple(x.shape)}")
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"t must be one timestep or one for each of {x.shape[0]} images, got {tuple(t.shape)}")
        label = self._label(x, y)
        tokens = self.patch_embedding(x)
        # The positions stay in float32, and on one device when the parts of a model are spread over several.
        tokens = (tokens + self.positions.to(tokens.device)).to(x.dtype)
        for block in self.pre:
            tokens = block(tokens, label)
        condition = self.time_embedding(t.expand(x.shape[0]), x.dtype)
        if label is not None:
            condition = condition + label
        return tokens, self.implicit_block.prepare(self.injection(tokens), condition), label

    def _label(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        if self.class_embedding is None:
            if y is not None:
                raise ValueError("this FPDM is unconditional (num_classes is None), but classes y were given")
            return None
        if y is None:
            null_class = self.config.num_classes
            assert null_class is not None
            y = torch.full((x.shape[0],), null_class, device=x.device)
        if y.shape != x.shape[:1]:
            raise ValueError(f"y must hold one class for each of {x.shape[0]} images, got shape {tuple(y.shape)}")
        return self.class_embedding(y).to(x.dtype)

    @property
    def implicit_block(self) -> ImplicitBlock:
        """The map of the fixed point layer."""
        block = self.implicit.f
        assert isinstance(block, ImplicitBlock)
        return block

    def _initialise(self) -> None:
        """DiT's: Xavier for linear maps, small normals for embeddings, zero for modulations and the head's output."""
        block = self.implicit_block
        for module in self.modules():
            if module is block:
                block.initialise_w1()
            elif module in (block.w1_z, block.w1_u):
                continue
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.zero()
        nn.init.normal_(self.time_embedding.linear1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear2.weight, std=0.02)
        nn.init.zeros_(self.head.linear.weight)


@dataclass(frozen=True)
class FPDMLayerProblem:
    """The implicit layer at given inputs, as a problem for :func:`fixpoint.solve`: find z with ``problem(z) = z``.

    Calls compute no gradient; gradients come from :meth:`FPDM.forward`.

    Attributes:
        z0: Starting state ``(N, L, D)``.
        batch_dims: 1: each image is a problem of its own.
    """

    block: ImplicitBlock
    projected: Tensor
    modulation: Tensor
    z0: Tensor
    batch_dims: int = 1

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        return self.block(z, self.projected, self.modulation)


@torch.no_grad()
def fpdm_layer_problem(
    model: FPDM, x: Tensor, t: Tensor, z0: Tensor | None = None, *, y: Tensor | None = None
) -> FPDMLayerProblem:
    """The fixed point problem that ``model`` solves for noisy images ``x`` at timesteps ``t``.

    Args:
        model: An FPDM.
        x: Noisy images ``(N, C, H, W)``.
        t: Timesteps ``(N,)``, or one for all.
        z0: Starting state ``(N, L, D)``, such as the previous timestep's solution; None: the pre blocks' output.
        y: Classes ``(N,)`` of a conditional model.

    Returns:
        A problem with ``__call__(z)``, ``z0`` and ``batch_dims``.

    Raises:
        ValueError: As :meth:`FPDM.forward`.

    >>> import fixpoint
    >>> model = FPDM(FPDMConfig(width=16, heads=2))
    >>> problem = fpdm_layer_problem(model, torch.randn(5, 1, 8, 8), torch.tensor(500))
    >>> bool(fixpoint.solve(problem, rtol=1e-3).converged.all())
    True
    """
    state, (projected, modulation), _ = model._before_layer(x, t, y)
    return FPDMLayerProblem(model.implicit_block, projected, modulation, state if z0 is None else z0)
