"""A user's own captioned images and videos: small models that one machine trains; `data.sources` is all they need.

Sizes are areas here (`data.aspect=native`): a portrait clip is trained as a portrait clip.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from walt.training.job import (
    DenoiserJob,
    DiffusionJob,
    MediaJob,
    OptimizerJob,
    RunJob,
    Shape,
    TokenizerJob,
    TokenizerLoss,
)

EMBEDDED = Path(str(resources.files("walt") / "embedded"))

TOKENIZER = {
    "encoder_widths": (48, 96),
    "decoder_widths": (80, 112),
    "temporal_downsample": (False,),
    "layers_per_block": 2,
    "patch_size": 4,
    "front_end": "haar",
    "block_shortcut": True,
}

BASE = {
    "patch_size": 2,
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 512,
    "text_dim": 384,
    "sample_size": (5, 16, 28),
    "relative_positions": "rope",
    "spatiotemporal_window": None,
    "pooled_text": True,
    "local_mixing": True,
    "sigma_data": 0.1,
}

SUPER_RESOLUTION = {
    "patch_size": 2,
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 512,
    "absolute_positions": False,
    "relative_positions": "rope",
    "sample_size": (5, 32, 56),
    "spatial_window": (8, 8),
    "spatiotemporal_window": (4, 4),
    "self_conditioning": False,
    "low_res_channels": 8,
    "local_mixing": True,
    "sigma_data": 0.4,
}


def tokenizer() -> TokenizerJob:
    """Cuts of clips and stills, at two sizes; needs no captions."""
    return TokenizerJob(
        model=TOKENIZER,
        data=MediaJob(captions="optional", variants=64),
        shapes=(
            Shape(frames=17, height=128, width=224, cut=64, weight=2),
            Shape(frames=17, height=256, width=448, cut=64, weight=2),
            Shape(frames=1, height=128, width=224, cut=96, weight=2),
            Shape(frames=1, height=256, width=448, cut=96, weight=2),
        ),
        batch_pixels=4 * 17 * 64 * 64,
        loss=TokenizerLoss(perceptual_weights="cache/lpips_vgg.safetensors", perceptual_frames=2, latent_noise=0.1),
        optimizer=OptimizerJob(lr=1e-3, warmup_steps=50),
        run=RunJob(output="runs/media-tokenizer", steps=2000, ema_decay=0.995, checkpoint_every=100, workers=1),
    )


def base() -> DenoiserJob:
    """Text to clips and images of about 128x224, joint; tokenizer and words of the embedded model unless given."""
    return DenoiserJob(
        model=BASE,
        tokenizer=str(EMBEDDED / "vae"),
        text_encoder=str(EMBEDDED / "text_encoder"),
        text_tokenizer=str(EMBEDDED / "tokenizer"),
        data=MediaJob(),
        shapes=(
            Shape(frames=17, height=128, width=224, weight=2),
            Shape(frames=9, height=128, width=224, weight=1),
            Shape(frames=1, height=128, width=224, weight=4),
        ),
        batch_tokens=1120,
        diffusion=DiffusionJob(
            self_conditioning_probability=0.2, frame_prediction_probability=0.15, timestep_logit_normal=(0.0, 1.0)
        ),
        optimizer=OptimizerJob(lr=6e-4, weight_decay=0.01, warmup_steps=50),
        run=RunJob(output="runs/media-base", steps=5000, ema_decay=0.998, checkpoint_every=200, workers=1),
    )


def super_resolution() -> DenoiserJob:
    """From half size to about 256x448, on cuts; the low resolution is the mean over 2x2 pixels."""
    return DenoiserJob(
        model=SUPER_RESOLUTION,
        tokenizer=str(EMBEDDED / "vae"),
        data=MediaJob(captions="optional", variants=16),
        shapes=(
            Shape(frames=17, height=256, width=448, cut=128, weight=2),
            Shape(frames=17, height=256, width=448, start=12, cut=128, weight=1),
            Shape(frames=1, height=256, width=448, cut=128, weight=1),
            Shape(frames=1, height=256, width=448, weight=1),
        ),
        batch_tokens=2240,
        diffusion=DiffusionJob(
            self_conditioning_probability=0.0,
            frame_prediction_probability=0.15,
            max_noise_level=20,
            timestep_logit_normal=(-0.8, 1.0),
        ),
        optimizer=OptimizerJob(lr=1.5e-3, weight_decay=0.01, warmup_steps=50),
        run=RunJob(output="runs/media-sr", steps=3000, ema_decay=0.995, checkpoint_every=100, workers=1),
    )


RECIPES = {"tokenizer": tokenizer, "base": base, "super_resolution": super_resolution}
