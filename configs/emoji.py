"""The embedded model: tokenizer, base and two super-resolution stages on the emoji theatre, sized for a CPU.

Where these differ from the paper (section 1.7 of Table 8) it is for compute: a Haar front end of 4, patches twice as
large, narrow and shallow networks, a small world. The path is the same.
"""

from __future__ import annotations

from walt.training.job import (
    AdversarialJob,
    DataJob,
    DenoisedJob,
    DenoiserJob,
    DiffusionJob,
    OptimizerJob,
    PixelJob,
    RunJob,
    Shape,
    TokenizerJob,
    TokenizerLoss,
)

TOKENIZER = {
    "encoder_widths": (48, 96),
    "decoder_widths": (80, 112),
    "temporal_downsample": (False,),
    "layers_per_block": 2,
    "patch_size": 4,
    "front_end": "haar",
    "block_shortcut": True,
    "detail_threshold": 0.03,
}


def tokenizer() -> TokenizerJob:
    """One tokenizer for all three resolutions, on cuts around the subject. About 21 minutes on 2 CPU cores."""
    return TokenizerJob(
        model=TOKENIZER,
        data=DataJob(seed=1),
        shapes=(
            Shape(frames=17, height=128, width=224, cut=64, weight=2),
            Shape(frames=17, height=256, width=448, cut=64, weight=2),
            Shape(frames=17, height=512, width=896, cut=64, weight=2),
            Shape(frames=1, height=128, width=224, cut=96, weight=4),
            Shape(frames=1, height=256, width=448, cut=96, weight=4),
            Shape(frames=1, height=512, width=896, cut=96, weight=4),
        ),
        batch_pixels=4 * 17 * 64 * 64,
        loss=TokenizerLoss(
            perceptual=0.1,
            perceptual_weights="cache/lpips_vgg.safetensors",
            perceptual_frames=2,
            latent_noise=0.1,
            latent_penalty=1e-4,
        ),
        optimizer=OptimizerJob(lr=1e-3, betas=(0.9, 0.99), warmup_steps=50, clip_norm=1.0),
        run=RunJob(output="runs/emoji-tokenizer", steps=1000, ema_decay=0.995, checkpoint_every=100),
    )


def decoder() -> TokenizerJob:
    """The decoder anew, encoder and latent statistics frozen.

    It works at the latent's resolution, so that it sees a whole subject and learns what the world's subjects look like,
    on latents with noise as strong as a small denoiser's errors. It starts as the best linear decoder of each latent's
    neighbourhood. About 75 minutes on one CPU core.
    """
    first = tokenizer()
    return first.model_copy(
        update={
            "model": {**TOKENIZER, "decoder_widths": (256,), "decoder_mixers": 6, "shortcut_overlap": 1},
            "shortcut_batches": 200,
            "init": "runs/emoji-tokenizer/final",
            "freeze_encoder": True,
            "data": DataJob(seed=4),
            "shapes": (
                Shape(frames=17, height=128, width=224, cut=96, weight=3),
                Shape(frames=17, height=128, width=224, start=12, cut=96, weight=1),
                Shape(frames=17, height=256, width=448, cut=96, weight=1),
                Shape(frames=17, height=512, width=896, cut=96, weight=1),
                Shape(frames=1, height=128, width=224, cut=128, weight=2),
                Shape(frames=1, height=256, width=448, cut=128, weight=2),
                Shape(frames=1, height=512, width=896, cut=128, weight=2),
            ),
            "batch_pixels": 4 * 17 * 96 * 96,
            "loss": first.loss.model_copy(update={"latent_noise": 0.3, "perceptual": 0.0, "perceptual_weights": None}),
            "optimizer": first.optimizer.model_copy(
                update={"kind": "muon", "lr": 2e-3, "weight_decay": 0.01, "warmup_steps": 30, "final_lr_ratio": 0.02}
            ),
            "run": first.run.model_copy(update={"output": "runs/emoji-decoder", "steps": 2000, "ema_decay": 0.99}),
        }
    )


def tokenizer_joint() -> TokenizerJob:
    """Encoder and decoder together, after `decoder`: what the stages' latents and the shipped pictures come from.

    The encoder is of the decoder's kind, and each latent begins as that of its last frame as an image: images then teach a
    denoiser what clips look like. About 30 minutes on two CPU cores in bfloat16.
    """
    first = decoder()
    return first.model_copy(
        update={
            "model": {**first.model, "encoder_widths": (192,), "encoder_mixers": 6},
            "init": "runs/emoji-decoder/final",
            "freeze_encoder": False,
            "hold_keyframes": True,
            "shortcut_batches": 40,
            "data": DataJob(seed=6),
            "shapes": (
                Shape(frames=17, height=128, width=224, cut=96, weight=2),
                Shape(frames=17, height=128, width=224, start=12, cut=96, weight=1),
                Shape(frames=17, height=256, width=448, cut=96, weight=1),
                Shape(frames=17, height=512, width=896, cut=96, weight=2),
                *first.shapes[4:],
            ),
            "batch_pixels": 3 * 17 * 96 * 96,
            "loss": first.loss.model_copy(update={"latent_noise": 0.2, "frame_difference": 0.5}),
            "optimizer": first.optimizer.model_copy(update={"lr": 1.5e-3}),
            "run": first.run.model_copy(update={"output": "runs/emoji-tokenizer-joint", "steps": 2600}),
        }
    )


def decoder_polish() -> TokenizerJob:
    """The decoder alone goes on after `tokenizer_joint`, with a little of the perceptual loss, while the stages train."""
    first = tokenizer_joint()
    return first.model_copy(
        update={
            "init": "runs/emoji-tokenizer-joint/final",
            "freeze_encoder": True,
            "hold_keyframes": False,
            "data": DataJob(seed=7),
            "loss": first.loss.model_copy(
                update={
                    "perceptual": 0.03,
                    "perceptual_weights": "cache/lpips_vgg.safetensors",
                    "perceptual_frames": 2,
                    "frame_difference": 0.7,
                }
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 1e-3}),
            "run": first.run.model_copy(update={"output": "runs/emoji-decoder-polish", "seed": 7, "steps": 5200}),
        }
    )


def decoder_finish() -> TokenizerJob:
    """The decoder against a discriminator, after `decoder_polish`: encoder and latent statistics frozen, as published."""
    first = decoder_polish()
    return first.model_copy(
        update={
            "init": "runs/emoji-decoder-polish/final",
            "data": DataJob(seed=5),
            "loss": first.loss.model_copy(
                update={
                    "perceptual": 0.0,
                    "perceptual_weights": None,
                    "adversarial": AdversarialJob(
                        model={"base": 24, "multipliers": (2, 3, 4), "temporal": (False, True, True)},
                        loss="hinge",
                        weight=0.05,
                        start=40,
                        r1=1.0,
                        r1_every=8,
                        optimizer=OptimizerJob(lr=5e-4, betas=(0.0, 0.99), warmup_steps=50),
                    ),
                }
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 1e-4}),
            "run": first.run.model_copy(update={"output": "runs/emoji-decoder-finish", "steps": 400}),
        }
    )


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
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 512,
    "absolute_positions": False,
    "relative_positions": "rope",
    "spatial_window": (8, 8),
    "spatiotemporal_window": (4, 4),
    "self_conditioning": False,
    "low_res_channels": 8,
    "local_mixing": True,
    "sigma_data": 0.4,
}


def base_images() -> DenoiserJob:
    """What things look like and where they stand, from stills and short cuts alone: tokens of clips repeat themselves.

    Cuts of 96x96 hold little but the subject: 36 tokens instead of 112.
    """
    return DenoiserJob(
        model=BASE,
        tokenizer="runs/emoji-tokenizer-joint/final",
        text_encoder="cache/text_encoder",
        text_tokenizer="cache/tokenizer",
        data=DataJob(seed=2),
        shapes=(
            Shape(frames=1, height=128, width=224, weight=5),
            Shape(frames=1, height=128, width=224, cut=96, weight=4),
            Shape(frames=1, height=128, width=128, weight=1),
            Shape(frames=9, height=128, width=224, cut=96, weight=1),
        ),
        batch_tokens=1120,
        diffusion=DiffusionJob(
            self_conditioning_probability=0.2, frame_prediction_probability=0.15, timestep_logit_normal=(0.0, 1.0)
        ),
        optimizer=OptimizerJob(lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.5),
        run=RunJob(output="runs/emoji-base-images", steps=1600, ema_decay=0.995, checkpoint_every=200),
    )


def base() -> DenoiserJob:
    """Text to 128x224 video and images: joint packs of clips, second chunks and stills, after `base_images`."""
    images = base_images()
    return images.model_copy(
        update={
            "init": "runs/emoji-base-images/final",
            "shapes": (
                Shape(frames=17, height=128, width=224, weight=3),
                Shape(frames=17, height=128, width=224, start=12, weight=0.5),
                Shape(frames=17, height=128, width=224, cut=96, weight=0.5),
                Shape(frames=1, height=128, width=224, weight=2),
                Shape(frames=1, height=128, width=224, cut=96, weight=1),
                Shape(frames=1, height=128, width=128, weight=0.4),
            ),
            "batch_tokens": 2240,
            "diffusion": images.diffusion.model_copy(
                update={
                    # What moves where is decided at high noise; below, the noisy latents show it already.
                    "timestep_logit_normal": (1.5, 1.2),
                    "self_conditioning_probability": 0.1,
                    "mask_probability": 0.1,
                    "mask_kinds": ("frames", "first", "last", "both", "box", "moment", "inside"),
                }
            ),
            # At equal steps of so small a batch Muon was well ahead of AdamW, at 1.7 times the time.
            "optimizer": images.optimizer.model_copy(update={"kind": "muon", "lr": 8e-4, "final_lr_ratio": 0.02}),
            "run": images.run.model_copy(
                update={"output": "runs/emoji-base", "steps": 10000, "ema_decay": 0.998, "seed": 1}
            ),
        }
    )


def base_detail() -> DenoiserJob:
    """`base` goes on with all noise levels and scenes of its own: what happens within the four frames of a latent is decided
    at low noise, of which `base` sees little (docs/training.md)."""
    first = base()
    return first.model_copy(
        update={
            "init": "runs/emoji-base/final",
            "data": DataJob(seed=17),
            "diffusion": first.diffusion.model_copy(update={"timestep_logit_normal": (0.6, 1.5)}),
            "optimizer": first.optimizer.model_copy(update={"lr": 5e-4}),
            "run": first.run.model_copy(update={"output": "runs/emoji-base-detail", "steps": 5200, "seed": 16}),
        }
    )


def base_words() -> DenoiserJob:
    """`base_detail` goes on with other scenes, and with captions that lose words, so that a word is learnt apart from those
    beside it. For pairs that training never shows that alone was no help (docs/training.md)."""
    first = base_detail()
    return first.model_copy(
        update={
            "init": "runs/emoji-base-detail/final",
            "data": DataJob(seed=19),
            "diffusion": first.diffusion.model_copy(
                update={"timestep_logit_normal": (1.0, 1.4), "partial_captions": 0.25}
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 8e-4}),
            "run": first.run.model_copy(update={"output": "runs/emoji-base-words", "steps": 5200, "seed": 19}),
        }
    )


def base_tasks() -> DenoiserJob:
    """`base` goes on with the masks of walt's tasks five times as often: the same network.

    Half of the samples get such a mask; of the others a third is continued as before, so that nothing is unlearnt. Reads
    the same latents as `base`.
    """
    first = base()
    return first.model_copy(
        update={
            "init": "runs/emoji-base/final",
            "diffusion": first.diffusion.model_copy(
                update={
                    "frame_prediction_probability": 0.35,
                    "mask_probability": 0.5,
                    "mask_kinds": ("frames", "first", "last", "both", "box", "moment", "inside"),
                }
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 2e-4}),
            "run": first.run.model_copy(update={"output": "runs/emoji-base-tasks", "steps": 800, "seed": 2}),
        }
    )


def _super_resolution(output: str, patch: int, height: int, cut: int, steps: int) -> DenoiserJob:
    width = height * 7 // 4
    return DenoiserJob(
        model={**SUPER_RESOLUTION, "patch_size": patch, "sample_size": (5, height // 8, width // 8)},
        tokenizer="runs/emoji-tokenizer-joint/final",
        data=DataJob(seed=3),
        shapes=(
            Shape(frames=17, height=height, width=width, cut=cut, weight=2),
            Shape(frames=17, height=height, width=width, start=12, cut=cut, weight=2),
            Shape(frames=1, height=height, width=width, cut=cut, weight=1),
            Shape(frames=1, height=height, width=width, weight=1),
        ),
        batch_tokens=2240,
        diffusion=DiffusionJob(
            self_conditioning_probability=0.0,
            frame_prediction_probability=0.15,
            max_noise_level=20,
            # These are sampled in one step, or a few, from the last noise level.
            timestep_logit_normal=(2.0, 1.5),
        ),
        optimizer=OptimizerJob(kind="muon", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50),
        run=RunJob(output=output, steps=steps, ema_decay=0.995, checkpoint_every=100),
    )


def super_resolution_1() -> DenoiserJob:
    """128x224 -> 256x448: small windows and rotary positions, so that training on cuts carries over to whole frames."""
    return _super_resolution("runs/emoji-sr1", patch=2, height=256, cut=128, steps=2000)


def super_resolution_2() -> DenoiserJob:
    """256x448 -> 512x896: the same network with patches of 4, as Table 8 has it."""
    return _super_resolution("runs/emoji-sr2", patch=4, height=512, cut=192, steps=1500)


def super_resolution_2_finish() -> DenoiserJob:
    """`super_resolution_2` goes on, scored on its frames as they are sampled: in one step, decoded, held to the small video.

    That video has mostly passed the tokenizer, as in a cascade: bicubic enlarging keeps what that does to it, and a stage
    that only learnt latents of clean small videos does too.
    """
    first = super_resolution_2()
    return first.model_copy(
        update={
            "init": "runs/emoji-sr2/final",
            "tokenizer": "runs/emoji-decoder-polish/final",
            "data": DataJob(seed=23),
            "shapes": (
                Shape(frames=17, height=512, width=896, cut=192, weight=2),
                Shape(frames=17, height=512, width=896, start=12, cut=192, weight=1),
                Shape(frames=5, height=512, width=896, cut=192, weight=1),
                Shape(frames=1, height=512, width=896, cut=192, weight=1),
            ),
            "batch_tokens": 360,
            "diffusion": first.diffusion.model_copy(
                update={"max_noise_level": 0, "timestep_logit_normal": (20.0, 0.0)}
            ),
            "pixels": PixelJob(perceptual=1.0, perceptual_weights="cache/lpips_vgg.safetensors"),
            "optimizer": first.optimizer.model_copy(update={"lr": 4e-4, "warmup_steps": 30}),
            "run": first.run.model_copy(update={"output": "runs/emoji-sr2-finish", "seed": 23, "steps": 1100}),
        }
    )


def temporal_super_resolution() -> DenoiserJob:
    """128x224 at 8 frames per second -> at 16, right after the base (Imagen Video's order, on the existing denoiser).

    A super-resolution stage with `low_res_scale` 1: what it is told is every second frame, each shown twice. It starts
    from the best linear map of that to the true latents, and learns what moved.
    """
    first = super_resolution_1()
    shape = Shape(frames=17, height=128, width=224, cut=96, weight=2)
    return first.model_copy(
        update={
            "model": {**first.model, "low_res_scale": 1, "sample_size": (5, 16, 28)},
            "data": DataJob(seed=6, fps=16),
            "shapes": (
                shape,
                # Later parts of a scene, with the frames before them given as in sampling.
                *(shape.model_copy(update={"start": start}) for start in (12, 24, 36)),
                Shape(frames=17, height=128, width=224, weight=1),
            ),
            "run": first.run.model_copy(update={"output": "runs/emoji-tsr", "steps": 1500}),
        }
    )


def large_tokenizer() -> TokenizerJob:
    """Encoder and decoder go on after `decoder_polish`, with 64 subjects and twenty times its pixels a step: for a GPU.

    About seven minutes of an H200.
    """
    first = decoder_polish()
    return first.model_copy(
        update={
            "init": "runs/emoji-decoder-polish/final",
            "freeze_encoder": False,
            "data": DataJob(world="large", seed=31, draw="device"),
            "shapes": (
                Shape(frames=17, height=128, width=224, cut=96, weight=3),
                Shape(frames=17, height=128, width=224, start=12, cut=96, weight=1.5),
                Shape(frames=17, height=256, width=448, cut=96, weight=1),
                Shape(frames=17, height=512, width=896, cut=96, weight=1.5),
                Shape(frames=1, height=128, width=224, cut=128, weight=2),
                Shape(frames=1, height=256, width=448, cut=128, weight=1),
                Shape(frames=1, height=512, width=896, cut=128, weight=1.5),
            ),
            "batch_pixels": 64 * 17 * 96 * 96,
            "loss": first.loss.model_copy(update={"perceptual": 0.1, "perceptual_frames": 48}),
            "optimizer": first.optimizer.model_copy(update={"lr": 1.5e-3, "warmup_steps": 100}),
            "run": first.run.model_copy(
                update={
                    "output": "runs/emoji-large-tokenizer",
                    "seed": 31,
                    "steps": 2270,
                    "ema_decay": 0.998,
                    "precision": "bf16",
                    "checkpoint_every": 1000,
                    "heldout_every": 750,
                    "heldout_clips": 8,
                }
            ),
        }
    )


def large_base() -> DenoiserJob:
    """`base_words` goes on with the latents of `large_tokenizer` and 64 subjects, thirty times its tokens a step: for a GPU.

    After 830 steps, five and a half minutes of an H200, it follows backgrounds and motions, but no subject yet
    (docs/training.md): it needs many times as many. `embedded_base` starts from there.
    """
    first = base_words()
    return first.model_copy(
        update={
            "init": "runs/emoji-base-words/final",
            "tokenizer": "runs/emoji-large-tokenizer/final",
            "data": DataJob(world="large", seed=33, draw="device", latents="runs/emoji-large-latents"),
            "batch_tokens": 2**16,
            "diffusion": first.diffusion.model_copy(update={"partial_captions": 0.1}),
            "optimizer": first.optimizer.model_copy(update={"lr": 1.5e-3, "warmup_steps": 100}),
            "run": first.run.model_copy(
                update={
                    "output": "runs/emoji-large-base",
                    "seed": 33,
                    "steps": 9000,
                    "ema_decay": 0.999,
                    "precision": "bf16",
                    "checkpoint_every": 1000,
                    "heldout_every": 1000,
                    "heldout_clips": 32,
                }
            ),
        }
    )


def embedded_base() -> DenoiserJob:
    """The embedded base: eight subjects again, on the latents of `large_tokenizer`, from what `large_base` learnt in 827
    steps (better than from `base_words`: held out at 800-999 0.233 and 0.246 before the first step)."""
    first = base_words()
    return first.model_copy(
        update={
            "init": "runs/emoji-large-base/final",
            "tokenizer": "runs/emoji-large-tokenizer/final",
            "data": DataJob(seed=41),
            "run": first.run.model_copy(
                update={"output": "runs/emoji-embedded-base", "seed": 41, "steps": 8000, "precision": "bf16"}
            ),
        }
    )


def large_base_images() -> DenoiserJob:
    """What 64 subjects look like, mostly from stills, as `base_images` of eight: the cheap way, for a CPU."""
    first = embedded_base()
    return first.model_copy(
        update={
            "init": "runs/emoji-embedded-base/final",
            "data": DataJob(world="large", seed=43),
            "shapes": (
                Shape(frames=1, height=128, width=224, cut=96, weight=5),
                Shape(frames=1, height=128, width=224, weight=2),
                Shape(frames=1, height=128, width=128, weight=1),
                Shape(frames=17, height=128, width=224, weight=0.4),
                Shape(frames=17, height=128, width=224, cut=96, weight=0.4),
            ),
            "diffusion": first.diffusion.model_copy(update={"partial_captions": 0.1}),
            "optimizer": first.optimizer.model_copy(update={"lr": 1e-3, "final_lr_ratio": 0.3}),
            # Two packs a step: two processes of one thread each train half as fast again as one of two threads.
            "run": first.run.model_copy(
                update={"output": "runs/emoji-large-base-images", "seed": 43, "steps": 3300, "packs": 2}
            ),
        }
    )


def large_base_clips() -> DenoiserJob:
    """`large_base_images` learns to move what it shows."""
    first = large_base_images()
    return first.model_copy(
        update={
            "init": "runs/emoji-large-base-images/final",
            "data": DataJob(world="large", seed=47),
            "shapes": (
                Shape(frames=17, height=128, width=224, weight=3),
                Shape(frames=17, height=128, width=224, start=12, weight=0.5),
                Shape(frames=17, height=128, width=224, cut=96, weight=0.75),
                Shape(frames=1, height=128, width=224, weight=1.5),
                Shape(frames=1, height=128, width=224, cut=96, weight=3),
                Shape(frames=1, height=128, width=128, weight=0.4),
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 8e-4, "final_lr_ratio": 0.2}),
            "run": first.run.model_copy(update={"output": "runs/emoji-large-base-clips", "seed": 47, "steps": 3300}),
        }
    )


def decoder_denoised() -> TokenizerJob:
    """The embedded decoder: `large_tokenizer`'s goes on with the eight subjects, on latents that their base has
    denoised; encoder, latents and all stages stay. About half an hour of one core with AVX512-BF16.

    Cuts of 96 and 128 are those that the base knows, so the other sizes have others.
    """
    first = large_tokenizer()
    return first.model_copy(
        update={
            "init": "runs/emoji-large-tokenizer/final",
            "freeze_encoder": True,
            "denoised": DenoisedJob(
                denoiser="runs/emoji-embedded-base-2/final",
                text_encoder="cache/text_encoder",
                text_tokenizer="cache/tokenizer",
                sizes=((96, 96), (128, 128)),
            ),
            "data": DataJob(seed=71),
            "shapes": (
                Shape(frames=17, height=128, width=224, cut=96, weight=4),
                Shape(frames=17, height=128, width=224, start=12, cut=96, weight=1),
                Shape(frames=17, height=512, width=896, cut=112, weight=0.7),
                Shape(frames=17, height=256, width=448, cut=112, weight=0.3),
                Shape(frames=1, height=128, width=224, cut=128, weight=1),
                Shape(frames=1, height=512, width=896, cut=144, weight=0.7),
            ),
            "batch_pixels": 3 * 17 * 96 * 96,
            "loss": first.loss.model_copy(update={"perceptual": 0.3, "perceptual_frames": 3}),
            # Five times this rate is too much: LPIPS doubles in 50 steps.
            "optimizer": first.optimizer.model_copy(update={"lr": 1.2e-4, "warmup_steps": 30}),
            "run": first.run.model_copy(
                update={
                    "output": "runs/emoji-decoder-denoised",
                    "seed": 71,
                    "steps": 900,
                    "ema_decay": 0.995,
                    "checkpoint_every": 150,
                    "heldout_every": 600,
                    "heldout_clips": 6,
                }
            ),
        }
    )


def _on_large_latents(first: DenoiserJob, output: str, seed: int) -> DenoiserJob:
    """A super-resolution stage of 64 subjects, on the latents of `large_tokenizer`."""
    return first.model_copy(
        update={
            "tokenizer": "runs/emoji-large-tokenizer/final",
            "data": DataJob(world="large", seed=seed),
            "run": first.run.model_copy(update={"output": output, "steps": 1500, "precision": "bf16"}),
        }
    )


def embedded_super_resolution_1() -> DenoiserJob:
    """The embedded first super-resolution stage: `super_resolution_1` of 64 subjects."""
    return _on_large_latents(super_resolution_1(), "runs/emoji-embedded-sr1", seed=35)


def embedded_super_resolution_2() -> DenoiserJob:
    """The embedded second stage before `embedded_super_resolution_2_finish`: `super_resolution_2` of 64 subjects."""
    return _on_large_latents(super_resolution_2(), "runs/emoji-embedded-sr2", seed=35)


def embedded_super_resolution_2_finish() -> DenoiserJob:
    """The embedded second super-resolution stage: `super_resolution_2_finish` of 64 subjects."""
    job = _on_large_latents(super_resolution_2_finish(), "runs/emoji-embedded-sr2-finish", seed=45)
    return job.model_copy(
        update={
            "init": "runs/emoji-embedded-sr2/final",
            "run": job.run.model_copy(update={"seed": 45, "steps": 700}),
        }
    )


RECIPES = {
    "tokenizer": tokenizer,
    "decoder": decoder,
    "tokenizer_joint": tokenizer_joint,
    "decoder_polish": decoder_polish,
    "decoder_finish": decoder_finish,
    "base_images": base_images,
    "base": base,
    "base_detail": base_detail,
    "base_words": base_words,
    "base_tasks": base_tasks,
    "super_resolution_1": super_resolution_1,
    "super_resolution_2": super_resolution_2,
    "super_resolution_2_finish": super_resolution_2_finish,
    "temporal_super_resolution": temporal_super_resolution,
    "large_tokenizer": large_tokenizer,
    "decoder_denoised": decoder_denoised,
    "large_base": large_base,
    "embedded_base": embedded_base,
    "large_base_images": large_base_images,
    "large_base_clips": large_base_clips,
    "embedded_super_resolution_1": embedded_super_resolution_1,
    "embedded_super_resolution_2": embedded_super_resolution_2,
    "embedded_super_resolution_2_finish": embedded_super_resolution_2_finish,
}
