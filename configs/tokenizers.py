"""Tokenizers beside the embedded one: MAGVIT-v2's published recipe, a small LFQ one, and the codes of the embedded NUWA.

The paper's numbers are those of arXiv 2310.05737, appendix A.2; W.A.L.T. (arXiv 2312.06662, section 3.1) trains the
same networks without a quantizer.
"""

from __future__ import annotations

from walt.training.job import AdversarialJob, DataJob, OptimizerJob, RunJob, Shape, TokenizerJob, TokenizerLoss

MAGVIT2 = {
    "encoder_widths": (128, 256, 256, 512),
    "decoder_widths": (128, 256, 256, 512),
    "layers_per_block": 4,
    "latent_channels": 18,
    "norm": "group",
    "adaptation": "global",
    "quantizer": "lfq",
    "quantizer_config": {"groups": 2, "temperature": 0.01},
}


def magvit2_video() -> TokenizerJob:
    """MAGVIT-v2's video tokenizer: 17x128x128, 2^18 codes, base 128 with multipliers 1, 2, 2, 4."""
    return TokenizerJob(
        model=MAGVIT2,
        data=DataJob(world="full"),
        shapes=(
            Shape(frames=17, height=128, width=128, weight=4),
            Shape(frames=1, height=128, width=128, weight=1),
        ),
        batch_pixels=16 * 17 * 128 * 128,
        loss=TokenizerLoss(
            reconstruction=5.0,
            pixel="l2",
            perceptual=0.1,
            perceptual_weights="cache/lpips_vgg.safetensors",
            perceptual_frames=16,
            commitment=0.25,
            entropy=0.1,
            entropy_start=3.0,
            entropy_steps=2000,
            adversarial=AdversarialJob(
                weight=0.1,
                lecam=0.001,
                r1=10.0,
                optimizer=OptimizerJob(lr=1e-4, betas=(0.0, 0.99), warmup_steps=5000, final_lr_ratio=0.0),
            ),
        ),
        optimizer=OptimizerJob(lr=1e-4, betas=(0.0, 0.99), warmup_steps=5000, final_lr_ratio=0.0),
        run=RunJob(
            output="runs/magvit2-video",
            steps=270_000,
            ema_decay=0.999,
            precision="bf16",
            checkpoint_every=2000,
            sheet_every=10_000,
            gradient_checkpointing=True,
            workers=8,
        ),
    )


def magvit2_image() -> TokenizerJob:
    """MAGVIT-v2's image tokenizer: multipliers 1, 1, 2, 4; `inflate` makes a video tokenizer of it."""
    video = magvit2_video()
    widths = (128, 128, 256, 512)
    return video.model_copy(
        update={
            "model": {**MAGVIT2, "encoder_widths": widths, "decoder_widths": widths},
            "shapes": (Shape(frames=1, height=128, width=128),),
            "batch_pixels": 256 * 128 * 128,
            "run": video.run.model_copy(update={"output": "runs/magvit2-image"}),
        }
    )


def lfq_small() -> TokenizerJob:
    """A small LFQ video tokenizer on the emoji theatre: 2^10 codes, in minutes on a CPU core."""
    return TokenizerJob(
        model={
            "encoder_widths": (32, 64),
            "decoder_widths": (48, 64),
            "temporal_downsample": (False,),
            "layers_per_block": 1,
            "patch_size": 4,
            "latent_channels": 10,
            "quantizer": "lfq",
            "quantizer_config": {"temperature": 0.5},
        },
        data=DataJob(seed=6),
        shapes=(
            Shape(frames=5, height=128, width=224, cut=64, weight=1),
            Shape(frames=1, height=128, width=224, cut=64, weight=1),
        ),
        batch_pixels=4 * 5 * 64 * 64,
        loss=TokenizerLoss(perceptual=0.0, latent_penalty=0.0, entropy=0.1, entropy_start=3.0, entropy_steps=300),
        optimizer=OptimizerJob(lr=1e-3, betas=(0.9, 0.99), warmup_steps=30),
        run=RunJob(output="runs/lfq-small", steps=1200, ema_decay=0.99, checkpoint_every=100),
    )


def lfq_emoji() -> TokenizerJob:
    """2^18 codes for clips and stills of the emoji theatre, 8x8x4 pixels each: the embedded tokenizer's blocks with LFQ.

    It starts from the signs of the blocks' principal components. docs/tokenizers.md has its curve; `lfq_emoji_even` goes on.
    """
    small = lfq_small()
    return small.model_copy(
        update={
            "model": {
                "encoder_widths": (192,),
                "encoder_mixers": 6,
                "decoder_widths": (256,),
                "decoder_mixers": 6,
                "temporal_downsample": (False,),
                "layers_per_block": 2,
                "patch_size": 4,
                "front_end": "haar",
                "block_shortcut": True,
                "shortcut_overlap": 1,
                "latent_channels": 18,
                "quantizer": "lfq",
                "quantizer_config": {"groups": 2, "temperature": 0.5},
            },
            "shortcut_batches": 40,
            "shapes": (
                Shape(frames=17, height=128, width=224, cut=96, weight=2),
                Shape(frames=17, height=128, width=224, start=12, cut=96, weight=1),
                Shape(frames=1, height=128, width=224, cut=128, weight=2),
            ),
            "batch_pixels": 2 * 17 * 96 * 96,
            "loss": small.loss.model_copy(update={"entropy": 0.01, "frame_difference": 0.3}),
            "optimizer": OptimizerJob(
                kind="muon", lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=30, final_lr_ratio=0.02
            ),
            "run": small.run.model_copy(update={"output": "runs/lfq-emoji", "steps": 2400}),
        }
    )


def lfq_emoji_even() -> TokenizerJob:
    """`lfq_emoji` goes on in cuts that hold little but a subject, with a heavier entropy penalty: over whole frames a bit
    may be even and yet say no more than ground or subject."""
    first = lfq_emoji()
    return first.model_copy(
        update={
            "init": "runs/lfq-emoji/final",
            "data": DataJob(seed=91),
            "shapes": (
                Shape(frames=17, height=128, width=224, cut=32, weight=4),
                Shape(frames=17, height=128, width=224, start=12, cut=32, weight=2),
                Shape(frames=17, height=128, width=224, cut=96, weight=2),
                Shape(frames=1, height=128, width=224, cut=64, weight=1),
            ),
            "batch_pixels": 16 * 17 * 32 * 32,
            "loss": first.loss.model_copy(
                update={
                    "entropy": 0.05,
                    "entropy_start": 1.0,
                    "perceptual": 0.03,
                    "perceptual_weights": "cache/lpips_vgg.safetensors",
                    "perceptual_frames": 1,
                }
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 1e-3}),
            "run": first.run.model_copy(update={"output": "runs/lfq-emoji-even", "steps": 500, "seed": 2}),
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# the embedded NUWA: 128x128, F8

EMOJI_VQ = {
    "num_vq_embeddings": 1024,
    "vq_embed_dim": 32,
    "encoder_widths": (8, 8),  # silent: the code is linear
    "decoder_widths": (64, 112),
    "layers_per_block": 2,
    "patch_size": 4,
    "front_end": "haar",
    "norm": "channel",
    "block_shortcut": True,
    "shortcut_overlap": 1,
}


def _frames(cut: int, weight: float) -> tuple[Shape, ...]:
    """Single frames of stills and of clips, from all over their length; cuts around the subject (0: whole frames)."""
    starts = (0, 0, 2, 6, 10, 14, 18, 22, 26, 28)
    return tuple(Shape(frames=1, height=128, width=128, cut=cut, start=s, weight=weight / len(starts)) for s in starts)


def emoji_vq() -> TokenizerJob:
    """The codes of the embedded NUWA: pictures and frames of 128x128, 1024 codes; minutes on a CPU core.

    Blocks of 8x8 pixels by their principal components, a codebook that is their k-means, and a decoder that learns what
    neighbouring codes say about edges. A trained encoder was worse within this budget: its latents collapsed to the
    three dimensions of a block's mean colour (docs/tokenizers.md).
    """
    return TokenizerJob(
        architecture="frames",
        model=EMOJI_VQ,
        freeze_encoder=True,
        data=DataJob(seed=7),
        shapes=_frames(64, 1.0),
        shortcut_batches=100,
        batch_pixels=16 * 64 * 64,
        loss=TokenizerLoss(
            perceptual=0.1, perceptual_weights="cache/lpips_vgg.safetensors", perceptual_frames=1, commitment=0.0
        ),
        optimizer=OptimizerJob(lr=1e-3, betas=(0.9, 0.99), warmup_steps=30),
        run=RunJob(output="runs/emoji-vq", steps=800, ema_decay=0.99, checkpoint_every=50),
    )


def emoji_vq_decoder() -> TokenizerJob:
    """The decoder of `emoji_vq` goes on against a discriminator; encoder and codebook stay as they are."""
    first = emoji_vq()
    return first.model_copy(
        update={
            "init": "runs/emoji-vq/final",
            "data": DataJob(seed=8),
            "loss": first.loss.model_copy(
                update={
                    "perceptual": 0.2,
                    "adversarial": AdversarialJob(
                        model={"base": 24, "multipliers": (2, 3, 4)},
                        loss="hinge",
                        weight=0.05,
                        start=40,
                        r1=1.0,
                        r1_every=8,
                        optimizer=OptimizerJob(lr=5e-4, betas=(0.0, 0.99), warmup_steps=30),
                    ),
                }
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 3e-4}),
            "run": first.run.model_copy(update={"output": "runs/emoji-vq-decoder", "steps": 300}),
        }
    )


def emoji_vq_seg() -> TokenizerJob:
    """The codes of the embedded NUWA's sketches: class maps of background and 8 subjects."""
    return TokenizerJob(
        architecture="frames",
        model={
            "in_channels": 9,
            "segmentation": True,
            "num_vq_embeddings": 256,
            "vq_embed_dim": 8,
            "encoder_widths": (64,),
            "decoder_widths": (64,),
            "layers_per_block": 1,
            "patch_size": 8,
            "front_end": "haar",
            "norm": "channel",
        },
        data=DataJob(seed=9),
        shapes=_frames(0, 1.0),
        batch_pixels=8 * 128 * 128,
        loss=TokenizerLoss(perceptual=0.0),
        optimizer=OptimizerJob(lr=2e-3, betas=(0.9, 0.99), warmup_steps=30),
        run=RunJob(output="runs/emoji-vq-seg", steps=1200, ema_decay=0.99, checkpoint_every=100),
    )


def nuwa_vq() -> TokenizerJob:
    """VQ-GAN of the published NUWA: F16, 12,288 codes of 256, on 336x336 (21x21 codes); 256x256 takes the same weights.

    NUWA gives the sizes; the losses and the discriminator's start are VQ-GAN's (arXiv 2012.09841), the batch is ours.
    """
    return TokenizerJob(
        architecture="frames",
        model={"num_vq_embeddings": 12288, "vq_embed_dim": 256},
        data=DataJob(world="full", seed=10),
        shapes=tuple(Shape(frames=1, height=336, width=336, start=start) for start in (0, 14, 28)),
        batch_pixels=4 * 336 * 336,
        loss=TokenizerLoss(
            perceptual=1.0,
            perceptual_weights="cache/lpips_vgg.safetensors",
            commitment=0.25,
            adversarial=AdversarialJob(
                loss="hinge",
                weight=1.0,
                adaptive=True,
                start=50_000,
                lecam=0.0,
                r1=0.0,
                optimizer=OptimizerJob(lr=4.5e-6 * 32, betas=(0.5, 0.9), schedule="constant"),
            ),
        ),
        optimizer=OptimizerJob(lr=4.5e-6 * 32, betas=(0.5, 0.9), schedule="constant"),
        run=RunJob(output="runs/nuwa-vq", steps=500_000, packs=8, ema_decay=0.0, checkpoint_every=2000, workers=8),
    )


def nuwa_vq_seg() -> TokenizerJob:
    """VQ-GAN-Seg of the published NUWA, F16 and 1024 codes: class maps of 336x336, here of the embedded world's subjects."""
    first = nuwa_vq()
    return first.model_copy(
        update={
            "data": DataJob(seed=10),
            "model": {"in_channels": 9, "segmentation": True, "num_vq_embeddings": 1024, "vq_embed_dim": 256},
            "loss": TokenizerLoss(perceptual=0.0),
            "run": first.run.model_copy(update={"output": "runs/nuwa-vq-seg"}),
        }
    )


RECIPES = {
    "magvit2_video": magvit2_video,
    "magvit2_image": magvit2_image,
    "lfq_small": lfq_small,
    "lfq_emoji": lfq_emoji,
    "lfq_emoji_even": lfq_emoji_even,
    "nuwa_vq": nuwa_vq,
    "nuwa_vq_seg": nuwa_vq_seg,
    "emoji_vq": emoji_vq,
    "emoji_vq_decoder": emoji_vq_decoder,
    "emoji_vq_seg": emoji_vq_seg,
}
