"""The fixed point diffusion model: explicit blocks around one implicit, timestep-conditioned block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint import Anderson, Backward, FixedPointLayer, Picard, Solution, Solver, StochasticJFB, Unroll
from fixpoint_diffusion.models.blocks import ImplicitBlock
from fixpoint_diffusion.models.dit.model import DiT
from fixpoint_diffusion.models.fpdm.config import FPDMConfig
from fixpoint_diffusion.models.fpdm.from_dit import config_from_dit, copy_from_dit
from fixpoint_diffusion.models.fpdm.training_rules import training_rule
from fixpoint_diffusion.models.transformer import PatchTransformer, condition_of


class FPDM(PatchTransformer):
    """A diffusion transformer whose middle is one fixed point layer (FPDM).

    Patches with fixed positions pass ``n_pre`` explicit blocks and give ``x_pre``. The layer solves

    ``z = f(z, u, t)``, ``f(z, u, t) = DiTBlock(W2 gelu(W1 [z; u]), c(t))``, ``u = Linear(x_pre)``,

    from ``z0 = x_pre`` or from a state the caller passes; ``n_post`` explicit blocks and a head turn the solution into
    the prediction. The timestep enters f alone, unless ``timestep_everywhere``. With ``num_classes``, the class enters
    every block. With ``implicit_blocks`` f has several blocks.

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

    config: FPDMConfig

    def __init__(self, config: FPDMConfig) -> None:
        super().__init__(config, label=config.has_label)
        conditional = config.has_label or config.timestep_everywhere
        self.pre = self._blocks(config.n_pre, conditional=conditional)
        self.injection = nn.Linear(config.width, config.width)
        blocks = self._blocks(config.implicit_blocks, conditional=True)
        self.implicit = FixedPointLayer(
            ImplicitBlock(config.width, blocks, gelu=config.injection_gelu, gate_cap=config.gate_cap),
            solver=Picard(),
            backward=training_rule(config).backward,
        )
        self.post = self._blocks(config.n_post, conditional=conditional)
        self.head = self._head(conditional=conditional)
        self._initialise()
        self.implicit_block.initialise_w1()

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
            solver: Solver of the layer. None: plain iteration (Picard) where iterations are counted, as in training; to
                a tolerance ``Anderson()``, because plain iteration does not converge for every image.
            backward: How gradients are attached when grad mode is on. None: in training mode as ``config.backward``
                says, which also decides how the layer is solved; in evaluation mode, or with ``depth``,
                :class:`fixpoint.Unroll`, whose value is that of the run without gradient.
            rtol: Relative tolerance of the layer's solve; None: ``fixpoint.solve``'s default. Not with ``depth``.
            max_evals: Bound on evaluations of that solve; None: ``fixpoint.solve``'s default. Not with ``depth``.
            record: Keep the residual of every evaluation in ``solution.trace``.
            return_solution: Return ``(prediction, solution)``.

        Returns:
            The prediction ``(N, C, H, W)``, or ``(N, 2C, H, W)`` with ``learn_sigma``; on request with the layer's
            :class:`fixpoint.Solution`, whose ``value`` is ``(N, L, D)``.

        Raises:
            ValueError: If a shape, or ``y`` for an unconditional model, does not fit the configuration; for options
                that contradict each other.
        """
        check_iterations(depth, rtol=rtol, max_evals=max_evals)
        state, inputs, condition = self._before_layer(x, t, y)
        if z0 is not None:
            if z0.shape != state.shape:
                raise ValueError(f"z0 must have shape {tuple(state.shape)} (N, L, D), got {tuple(z0.shape)}")
            state = z0
        trains = self.training and torch.is_grad_enabled()
        if trains and self.config.start_noise:
            noise = torch.randn(state.shape, dtype=state.dtype, device=state.device)
            state = state + self.config.start_noise * noise
        rule: dict[str, Any] = {"backward": Unroll()}
        if depth is None:
            rule = training_rule(self.config).options if trains else {**rule, "solver": Anderson()}
        given = {"depth": depth, "solver": solver, "backward": backward, "rtol": rtol, "max_evals": max_evals}
        options = rule
        if backward is not None:
            # A rule that the caller brings has nothing to do with how the model's own solves the layer.
            counts = depth is not None or isinstance(backward, StochasticJFB)
            options = {} if counts else {"solver": Anderson()}
        options |= {name: value for name, value in given.items() if value is not None}
        solution = self.implicit(*inputs, z0=state, return_solution=True, record=record, **options)
        prediction = self.head(self._through(self.post, solution.value, condition), condition)
        return (prediction, solution) if return_solution else prediction

    def _before_layer(
        self, x: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """``x_pre``, what the fixed point map takes beside z, and what conditions the explicit blocks."""
        tokens, time, label = self._embed(x, t, y)
        both = condition_of(time, label)
        explicit = both if self.config.timestep_everywhere else label
        tokens = self._through(self.pre, tokens, explicit)
        return tokens, self.implicit_block.prepare(self.injection(tokens), both), explicit

    @classmethod
    def from_dit(cls, dit: DiT, pre: int = 1, post: int = 1, **options: Any) -> FPDM:
        """An FPDM with the weights of a trained DiT, as a start for training.

        The first ``pre`` and the last ``post`` blocks become the explicit ones, and the middle of the others the fixed
        point map, whose injection starts as the mean of z and ``x_pre``. One iteration then passes ``x_pre`` through
        that middle, so that a DiT of just these blocks, with ``timestep_everywhere=True``, is met exactly by
        ``depth=1`` (but not with ``gate_cap``, which goes only a part of the way). Otherwise the explicit blocks are
        conditioned on the mean of the DiT's vectors for timesteps 0 to 999 in place of the timestep's own.

        Args:
            dit: The DiT; it is not changed.
            pre: Explicit blocks before the layer.
            post: Explicit blocks after it.
            **options: Further fields of ``FPDMConfig`` that a ``DiTConfig`` does not have.

        Raises:
            ValueError: If the DiT has fewer blocks than that.

        >>> from fixpoint_diffusion.models import DiT, DiTConfig
        >>> dit = DiT(DiTConfig(width=16, heads=2, depth=6))
        >>> model = FPDM.from_dit(dit, pre=1, post=1, implicit_blocks=2)
        >>> model.config.block_passes(10)
        22
        """
        config = config_from_dit(dit, pre, post, **options)
        weight = dit.patch_embedding.weight
        # Building the model draws weights that are replaced: keep that out of the caller's random state.
        with torch.random.fork_rng(devices=[]):
            model = cls(config).to(weight.device, weight.dtype)
        copy_from_dit(model, dit)
        return model.train(dit.training)

    @property
    def implicit_block(self) -> ImplicitBlock:
        """The map of the fixed point layer."""
        block = self.implicit.f
        assert isinstance(block, ImplicitBlock)
        return block


@dataclass(frozen=True)
class FPDMLayerProblem:
    """The implicit layer at given inputs, as a problem for :func:`fixpoint.solve`: find z with ``problem(z) = z``.

    Calls compute no gradient; gradients come from :meth:`FPDM.forward`.

    Attributes:
        z0: Starting state ``(N, L, D)``.
        batch_dims: 1: each image is a problem of its own.

    Example:
        See :func:`fixpoint_diffusion.models.fpdm_layer_problem`, which returns one.
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
    >>> _ = torch.manual_seed(0)  # some random layers expand, and take a hundred evaluations
    >>> model = FPDM(FPDMConfig(width=16, heads=2))
    >>> problem = fpdm_layer_problem(model, torch.randn(5, 1, 8, 8), torch.tensor(500))
    >>> bool(fixpoint.solve(problem, rtol=1e-3).converged.all())
    True
    """
    state, (projected, modulation), _ = model._before_layer(x, t, y)
    return FPDMLayerProblem(model.implicit_block, projected, modulation, state if z0 is None else z0)


def check_iterations(depth: int | None, *, rtol: float | None, max_evals: int | None) -> None:
    """Refuse a tolerance or a bound on evaluations beside a fixed number of iterations.

    Raises:
        ValueError: with the name of what has no effect.

    >>> check_iterations(4, rtol=1e-3, max_evals=None)
    Traceback (most recent call last):
    ...
    ValueError: rtol=0.001 has no effect beside depth=4, which fixes the iterations: leave one of them out
    """
    for name, value in (("rtol", rtol), ("max_evals", max_evals)):
        if depth is not None and value is not None:
            raise ValueError(
                f"{name}={value} has no effect beside depth={depth}, which fixes the iterations: leave one of them out"
            )
