"""Other backbones: DiT (arXiv 2212.09748) and U-ViT (arXiv 2209.12152) at their published sizes, and small recipes.

Each function of `MODELS` returns a complete config of the backbone named in `KINDS`; `PAPER_PARAMETERS` holds the size
that the paper reports, for images of 256x256 (latents 4x32x32, patch 2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from walt.configs import emoji
from walt.training.job import DenoiserJob, DiffusionJob, OptimizerJob, RunJob

PAPER_PARAMETERS: dict[str, float] = {
    "dit_s": 33e6,
    "dit_b": 130e6,
    "dit_l": 458e6,
    "dit_xl": 675e6,
    "uvit_s": 44e6,
    "uvit_l": 287e6,
    "uvit_h": 501e6,
}

# layers, width, heads
DIT_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def dit(size: str) -> dict[str, Any]:
    """Class-conditional DiT with adaLN-Zero and a learned variance, as in the paper."""
    layers, width, heads = DIT_SIZES[size]
    return {
        "in_channels": 4,
        "patch_size": 2,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": 1000,
        "sample_size": (1, 32, 32),
        "conditioning": "adaln_zero",
        "positions": "2d",
        "learned_variance": True,
    }


def _uvit(layers: int, width: int, heads: int, **fields: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "patch_size": 2,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": 1000,
        "sample_size": (1, 32, 32),
        **fields,
    }


def uvit_s() -> dict[str, Any]:
    """The small network, 12 layers beside the middle one; text to image on COCO, 77 CLIP states of width 768."""
    return _uvit(12, 512, 8, num_classes=None, text_dim=768, text_length=77)


def uvit_l() -> dict[str, Any]:
    """Class-conditional, 20 layers beside the middle one."""
    return _uvit(20, 1024, 16)


def uvit_h() -> dict[str, Any]:
    """Class-conditional, 28 layers beside the middle one, without the final convolution."""
    return _uvit(28, 1152, 16, final_conv=False)


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"dit_{size}": partial(dit, size) for size in DIT_SIZES},
    "uvit_s": uvit_s,
    "uvit_l": uvit_l,
    "uvit_h": uvit_h,
}
KINDS = {name: name.partition("_")[0] for name in MODELS}

SMALL: dict[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "text_dim": 384,
    "sample_size": (5, 16, 28),
    "frame_conditioning": True,
}


def _small(backbone: str, model: dict[str, Any], **optimizer: Any) -> DenoiserJob:
    first = emoji.base_images()
    return DenoiserJob(
        backbone=backbone,
        model=model,
        tokenizer=first.tokenizer,
        text_encoder=first.text_encoder,
        text_tokenizer=first.text_tokenizer,
        data=first.data,
        shapes=emoji.base().shapes,
        batch_tokens=first.batch_tokens,
        diffusion=DiffusionJob(
            self_conditioning_probability=0.0, frame_prediction_probability=0.15, timestep_logit_normal=(0.0, 1.0)
        ),
        optimizer=OptimizerJob(warmup_steps=50, **optimizer),
        run=RunJob(output=f"runs/zoo-{backbone}", steps=3000, ema_decay=0.998, checkpoint_every=200),
    )


def small_dit() -> DenoiserJob:
    """DiT on the emoji theatre: text in context, full attention over images and clips of one pack."""
    model = {**SMALL, "num_layers": 8, "conditioning": "in_context", "positions": "factorised"}
    return _small("dit", model, lr=5e-4, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant")


def small_uvit() -> DenoiserJob:
    """U-ViT on the emoji theatre: time, words and patches of images and clips as one sequence each."""
    model = {**SMALL, "num_layers": 6, "text_length": 64}
    return _small("uvit", model, lr=5e-4, betas=(0.99, 0.99), weight_decay=0.03, schedule="constant")


RECIPES = {"dit": small_dit, "uvit": small_uvit}
