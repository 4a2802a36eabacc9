"""Our DiT and diffusers' ``DiTTransformer2DModel``: the same network, with parameters of other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.models.dit.config import DiTConfig
from fixpoint_diffusion.models.dit.model import DiT

# Our modules by theirs, without the number of a block.
_ALONE = {
    "patch_embedding": "pos_embed.proj",
    "head.modulation.linear": "proj_out_1",
    "head.linear": "proj_out_2",
}
# One of ours is a copy in each of their blocks.
_SHARED = {
    "time_embedding.linear1": "norm1.emb.timestep_embedder.linear_1",
    "time_embedding.linear2": "norm1.emb.timestep_embedder.linear_2",
    "class_embedding": "norm1.emb.class_embedder.embedding_table",
}
# Of a block; several of theirs are the rows of one of ours.
_OF_BLOCK = {
    "modulation.linear": ("norm1.linear",),
    "attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.out": ("attn1.to_out.0",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}
# Settings of theirs that change what is computed, with the only values that a DiT has.
_FIXED = {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "attention_bias": True, "dropout": 0.0}


def read_module(folder: str | Path) -> Any:
    """Their module from a folder on this machine, in float32."""
    from diffusers import DiTTransformer2DModel

    folder = Path(folder)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no DiT in {str(folder)!r}: expected config.json and weights (nothing is downloaded)")
    # Building a module draws initial weights that the stored ones replace: keep that out of the caller's random state.
    with torch.random.fork_rng(devices=[]):
        return DiTTransformer2DModel.from_pretrained(
            str(folder), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )


def dit_from_diffusers(module: Any, *, prediction_type: str) -> DiT:
    """Our network with the weights of theirs, in its mode, dtype and place."""
    theirs = module.config
    for name, value in _FIXED.items():
        if theirs[name] != value:
            raise ValueError(f"a DiT has {name}={value!r}, but this module has {theirs[name]!r}")
    channels, out = theirs["in_channels"], theirs["out_channels"] or theirs["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(f"a DiT of {channels} channels has {channels} or {2 * channels} outputs, not {out}")
    config = DiTConfig(
        sample_size=theirs["sample_size"],
        patch_size=theirs["patch_size"],
        in_channels=channels,
        width=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        heads=theirs["num_attention_heads"],
        depth=theirs["num_layers"],
        num_classes=theirs["num_embeds_ada_norm"],
        learn_sigma=out == 2 * channels,
        prediction_type=prediction_type,
        norm_eps=theirs["norm_eps"],
    )
    stored = module.state_dict()
    first = next(iter(stored.values()))
    with torch.random.fork_rng(devices=[]):  # as above
        model = DiT(config).to(first.device, first.dtype)
    model.load_state_dict({name: _joined(name, config.depth, stored) for name in model.state_dict()})
    return model.train(module.training)


def dit_to_diffusers(model: DiT) -> Any:
    """Their module with the weights of ours, in its mode, dtype and place."""
    from diffusers import DiTTransformer2DModel

    config = model.config
    for name, value in {"mlp_ratio": 4.0, "freq_shift": 1, "positions": "column-row"}.items():
        if getattr(config, name) != value:
            raise ValueError(f"diffusers' DiT has {name}={value!r}, but this model has {getattr(config, name)!r}")
    with torch.random.fork_rng(devices=[]):  # as above
        module = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes or 1,
            norm_eps=config.norm_eps,
        )
    stored = dict(model.state_dict())
    first = next(iter(stored.values()))
    if config.num_classes is None:
        stored["class_embedding.weight"] = first.new_zeros(2, config.width)
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        names, shared = _their_names(name, config.depth)
        parts = [tensor] * len(names) if shared else tensor.chunk(len(names))
        weights |= dict(zip(names, parts, strict=True))
    # By torch's method: that of diffusers warns of modules to be kept in float32, even where there are none.
    nn.Module.to(module, first.device, first.dtype)
    module.load_state_dict(weights)
    return module.train(model.training)


def _their_names(name: str, depth: int) -> tuple[list[str], bool]:
    """Their parameters that make up one of ours, and whether these are copies of it, or else its rows in order."""
    stem, _, kind = name.rpartition(".")
    if stem in _ALONE:
        return [f"{_ALONE[stem]}.{kind}"], False
    if stem in _SHARED:
        return [f"transformer_blocks.{block}.{_SHARED[stem]}.{kind}" for block in range(depth)], True
    _, block, part = stem.split(".", 2)
    return [f"transformer_blocks.{block}.{theirs}.{kind}" for theirs in _OF_BLOCK[part]], False


def _joined(name: str, depth: int, stored: dict[str, Tensor]) -> Tensor:
    names, shared = _their_names(name, depth)
    if not shared:
        return torch.cat([stored[theirs].detach() for theirs in names])
    first = stored[names[0]].detach()
    for theirs in names[1:]:
        if not torch.equal(stored[theirs], first):
            raise ValueError(
                f"a DiT has one {name.rpartition('.')[0]} for all blocks, but in this module {theirs} differs from "
                f"{names[0]}"
            )
    return first
