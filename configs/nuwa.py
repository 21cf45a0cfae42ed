"""NUWA (arXiv 2111.12417): the published sizes, and the embedded model of eight tasks on the emoji theatre.

The published model was pre-trained on text-image, text-video and video data that nobody can download as one; these
recipes run on the emoji theatre, whose scenes are drawn at any size.
"""

from __future__ import annotations

from typing import Any

from walt.training.job import DataJob, NuwaClip, NuwaJob, NuwaTask, NuwaTasks, OptimizerJob, RunJob

PUBLISHED: dict[str, Any] = {
    "vocab_size": 12288,
    "text_dim": 384,
    "sketch_vocab_size": 1024,
    "num_layers_encoder": 12,
    "num_layers_decoder": 24,
    "num_attention_heads": 20,
    "attention_head_dim": 64,
    "sample_size": (10, 21, 21),
}


def nuwa_870m() -> NuwaJob:
    """The 870M model: 10 frames of 336x336, F16 tokens (21x21); Adam, lr 1e-3, batch 128 over all ranks, 5 % warm-up."""
    return NuwaJob(
        model=PUBLISHED,
        tokenizer="runs/nuwa-vq/final",  # tokenizers.nuwa_vq; pre-training has no sketch task
        text_encoder="cache/text_encoder",
        text_tokenizer="cache/tokenizer",
        data=DataJob(world="full", seed=10),
        clip=NuwaClip(frames=10, height=336, width=336, frame_step=3),
        tasks=NuwaTasks(
            text_to_image=NuwaTask(batch=1), video_to_video=NuwaTask(batch=1), text_to_video=NuwaTask(batch=1)
        ),
        optimizer=OptimizerJob(lr=1e-3, betas=(0.9, 0.999), warmup_steps=2_500_000, clip_norm=1.0),
        run=RunJob(
            output="runs/nuwa-870m",
            steps=50_000_000,
            ema_decay=0.9999,
            precision="bf16",
            checkpoint_every=2000,
            sheet_every=20_000,
            gradient_checkpointing=True,
            workers=8,
        ),
    )


def nuwa_256() -> NuwaJob:
    """The same on 256x256: 16x16 tokens per frame, as its text-to-image comparison has them."""
    large = nuwa_870m()
    return large.model_copy(
        update={
            "model": {**PUBLISHED, "sample_size": (10, 16, 16)},
            "clip": large.clip.model_copy(update={"height": 256, "width": 256}),
            "run": large.run.model_copy(update={"output": "runs/nuwa-256"}),
        }
    )


# layers of the encoder and of the decoder, heads of 64: our sizes below the paper's one; every other field is its own
SIZES = {"small": (2, 6, 6), "base": (4, 12, 12), "large": (8, 20, 16)}


def _sized(size: str) -> NuwaJob:
    """A smaller NUWA of the published shape, on the tokens of the embedded tokenizer: 10 frames of 128x128."""
    encoder, decoder, heads = SIZES[size]
    large = nuwa_870m()
    model = {
        **PUBLISHED,
        "vocab_size": 1024,
        "sketch_vocab_size": 256,
        "num_layers_encoder": encoder,
        "num_layers_decoder": decoder,
        "num_attention_heads": heads,
        "sample_size": (10, 16, 16),
    }
    return large.model_copy(
        update={
            "model": model,
            "tokenizer": "runs/emoji-vq/final",
            "sketch_tokenizer": "runs/emoji-vq-seg/final",
            "data": DataJob(seed=10),
            "clip": large.clip.model_copy(update={"height": 128, "width": 128}),
            "optimizer": large.optimizer.model_copy(update={"lr": 5e-4, "warmup_steps": 2000, "weight_decay": 0.01}),
            "run": large.run.model_copy(
                update={"output": f"runs/nuwa-{size}", "steps": 200_000, "gradient_checkpointing": False}
            ),
        }
    )


def small() -> NuwaJob:
    """A NUWA of 19M parameters: width 384, 2 + 6 layers, 10 frames of 128x128 of the emoji theatre."""
    return _sized("small")


def base() -> NuwaJob:
    """A NUWA of 143M parameters: width 768, 4 + 12 layers."""
    return _sized("base")


def large() -> NuwaJob:
    """A NUWA of 439M parameters: width 1024, 8 + 20 layers."""
    return _sized("large")


EMOJI: dict[str, Any] = {
    "vocab_size": 1024,
    "text_dim": 384,
    "sketch_vocab_size": 256,
    "num_layers_encoder": 1,
    "num_layers_decoder": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "ffn_ratio": 2.0,
    "code_dim": 64,
    "sample_size": (5, 16, 16),
    "text_length": 64,
    # Wider than the paper's 3x3x3, at no cost in training: with few layers a subject's two ends must still meet.
    "extent": (3, 5, 5),
}


def emoji() -> NuwaJob:
    """The embedded NUWA: all five objectives, 5 frames of 128x128 at 2 fps, F8 tokens (16x16), in about an hour.

    Stills cost a fifth of clips and show what subjects look like, so there are more of them.
    """
    return NuwaJob(
        model=EMOJI,
        tokenizer="runs/emoji-vq/final",
        sketch_tokenizer="runs/emoji-vq-seg/final",
        text_encoder="cache/text_encoder",
        text_tokenizer="cache/tokenizer",
        data=DataJob(seed=11),
        tasks=NuwaTasks(
            text_to_image=NuwaTask(batch=2.5),
            video_to_video=NuwaTask(batch=0.05),
            text_to_video=NuwaTask(batch=0.35),
            sketch_to_image=NuwaTask(batch=0.7),
            sketch_to_video=NuwaTask(batch=0.15),
        ),
        token_noise=0.4,  # neighbours foretell most tokens: where they say nothing, the prompt must be listened to
        optimizer=OptimizerJob(
            kind="muon", lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.02
        ),
        run=RunJob(output="runs/nuwa-emoji", steps=4200, ema_decay=0.998, checkpoint_every=100),
    )


def emoji_clips() -> NuwaJob:
    """`emoji` goes on with four times as many clips as before, once stills have shown what subjects look like."""
    first = emoji()
    return first.model_copy(
        update={
            "init": "runs/nuwa-emoji/final",
            "data": DataJob(seed=31),
            "tasks": NuwaTasks(
                text_to_image=NuwaTask(batch=0.8),
                video_to_video=NuwaTask(batch=0.4),
                text_to_video=NuwaTask(batch=1.3),
                sketch_to_image=NuwaTask(batch=0.3),
                sketch_to_video=NuwaTask(batch=0.4),
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 8e-4}),
            "run": first.run.model_copy(update={"output": "runs/nuwa-emoji-clips", "steps": 3600, "seed": 3}),
        }
    )


def emoji_turns() -> NuwaJob:
    """`emoji_clips` goes on with clips of which most turn back where a direction has an opposite, so that a prompt may turn a
    video that has begun to move.

    The embedded weights had 2,350 steps of it before these, with other shares (its model card): of 32 videos none turned at
    first, then 2, then 5, and 19 after these; stills that show the subject asked for fell from 25 to 19 of 32, which is what
    `emoji_recall` is for.
    """
    first = emoji_clips()
    return first.model_copy(
        update={
            "init": "runs/nuwa-emoji-clips/final",
            "data": DataJob(seed=43),
            "turns": 0.7,
            "tasks": NuwaTasks(
                text_to_image=NuwaTask(batch=0.8),
                video_to_video=NuwaTask(batch=0.2),
                text_to_video=NuwaTask(batch=1.8),
                sketch_to_image=NuwaTask(batch=0.2),
                sketch_to_video=NuwaTask(batch=0.4),
            ),
            "run": first.run.model_copy(
                update={"output": "runs/nuwa-emoji-turns", "steps": 4000, "ema_decay": 0.997, "seed": 7}
            ),
        }
    )


def emoji_recall() -> NuwaJob:
    """`emoji_turns` goes on, mostly with stills, which it had half forgotten: 21 of 32 show the subject asked for after it, and
    17 of 32 videos still turn."""
    first = emoji_turns()
    return first.model_copy(
        update={
            "init": "runs/nuwa-emoji-turns/final",
            "data": DataJob(seed=47),
            "turns": 0.5,
            "tasks": NuwaTasks(
                text_to_image=NuwaTask(batch=3),
                video_to_video=NuwaTask(batch=0.2),
                text_to_video=NuwaTask(batch=1.2),
                sketch_to_image=NuwaTask(batch=0.4),
                sketch_to_video=NuwaTask(batch=0.4),
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 5e-4}),
            "run": first.run.model_copy(update={"output": "runs/nuwa-emoji-recall", "steps": 1150, "seed": 11}),
        }
    )


def emoji_predict() -> NuwaJob:
    """`emoji_recall` goes on, mostly with clips of which the first frames are given."""
    first = emoji_recall()
    return first.model_copy(
        update={
            "init": "runs/nuwa-emoji-recall/final",
            "data": DataJob(seed=53),
            "continued": 0.9,
            "tasks": NuwaTasks(
                text_to_image=NuwaTask(batch=1),
                video_to_video=NuwaTask(batch=1.6),
                text_to_video=NuwaTask(batch=0.5),
                sketch_to_image=NuwaTask(batch=0.2),
                sketch_to_video=NuwaTask(batch=0.2),
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 6e-4}),
            "run": first.run.model_copy(update={"output": "runs/nuwa-emoji-predict", "steps": 4200, "seed": 13}),
        }
    )


def emoji_finish() -> NuwaJob:
    """`emoji_predict` goes on with all tasks, stills above all: it had lost some of them. The embedded weights."""
    first = emoji_predict()
    return first.model_copy(
        update={
            "init": "runs/nuwa-emoji-predict/final",
            "data": DataJob(seed=59),
            "tasks": NuwaTasks(
                text_to_image=NuwaTask(batch=3),
                video_to_video=NuwaTask(batch=1),
                text_to_video=NuwaTask(batch=0.8),
                sketch_to_image=NuwaTask(batch=0.4),
                sketch_to_video=NuwaTask(batch=0.6),
            ),
            "optimizer": first.optimizer.model_copy(update={"lr": 5e-4}),
            "run": first.run.model_copy(update={"output": "runs/nuwa-emoji-finish", "steps": 1000, "seed": 17}),
        }
    )


RECIPES = {
    "nuwa_870m": nuwa_870m,
    "nuwa_256": nuwa_256,
    "small": small,
    "base": base,
    "large": large,
    "emoji": emoji,
    "emoji_clips": emoji_clips,
    "emoji_turns": emoji_turns,
    "emoji_recall": emoji_recall,
    "emoji_predict": emoji_predict,
    "emoji_finish": emoji_finish,
}
