"""Networks of diffusers, as small as they come, with random weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")


def tiny_unet(**options: Any) -> nn.Module:
    """For images ``(1, 8, 8)``."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**(defaults | options)).eval()


def tiny_conditional_unet() -> nn.Module:
    """For latents ``(4, 4, 4)`` and embeddings ``(L, 8)``."""
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


def tiny_vae(**options: Any) -> nn.Module:
    """From latents ``(4, 4, 4)`` to images ``(3, 8, 8)``."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        sample_size=8,
        **options,
    ).eval()


def tiny_stable_diffusion() -> dict[str, Any]:
    """What the constructor of a Stable Diffusion pipeline takes; its tokenizer knows single letters."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    vocab = {word: index for index, word in enumerate(words)}
    return {
        "vae": tiny_vae(),
        "text_encoder": transformers.CLIPTextModel(text).eval(),
        "tokenizer": transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
        "unet": tiny_conditional_unet(),
        "scheduler": diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


class NearlyGaussian(nn.Module):
    """The best noise prediction for standard normal samples, and a little of what another network says.

    Random networks know nothing of the samples; samplers with this one do what samplers with trained ones do.
    """

    def __init__(self, network: Any, scheduler: Any, *, share: float = 0.1) -> None:
        super().__init__()
        self.network, self.share = network, share
        self.register_buffer("alphas", scheduler.alphas_cumprod)
        self.config = network.config
        self.encoder_hid_proj = None

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward(self, x: Tensor, timestep: Tensor, *, return_dict: bool = True, **inputs: Any) -> Any:
        out = self.network(x, timestep, return_dict=False, **inputs)[0][:, : x.shape[1]]
        noise = (1 - self.alphas[timestep]).sqrt().to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        out = noise * x + self.share * out
        return SimpleNamespace(sample=out) if return_dict else (out,)


def awake(model: nn.Module) -> nn.Module:
    """Weights that start at zero are moved from there."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def tiny_pipeline(kind: str) -> Any:
    """A pipeline of diffusers that is given embeddings of prompts, for it has no text models."""
    torch.manual_seed(0)
    texts = dict.fromkeys(["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2"])
    texts["tokenizer_3"] = None
    if kind == "StableDiffusion3Pipeline":
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            in_channels=4,
            out_channels=4,
            pos_embed_max_size=4,
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts = {**texts, "transformer": awake(transformer), "scheduler": scheduler, "vae": tiny_vae(shift_factor=0.1)}
    elif kind == "FluxPipeline":
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        parts = {name: texts[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
        parts |= {"transformer": awake(transformer), "scheduler": scheduler, "vae": tiny_vae(shift_factor=0.1)}
    elif kind == "StableDiffusionXLPipeline":
        unet = diffusers.UNet2DConditionModel(
            **dict(tiny_conditional_unet().config)
            | {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 8 + 6 * 4,
            }
        ).eval()
        scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading")
        parts = {name: texts[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
        parts |= {"unet": unet, "scheduler": scheduler, "vae": tiny_vae()}
    else:
        return getattr(diffusers, kind)(**tiny_stable_diffusion())
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
