"""The models of W.A.L.T.'s Table 8 (arXiv 2312.06662) as configs of `WaltTransformer3DModel`, and their training.

Each model function returns a complete config; `PAPER_PARAMETERS` holds the size the paper reports. Where the paper is
silent or contradicts itself the reading is the one whose parameter count fits, said beside the field.

The recipes take duration, batch, learning rate, schedule, optimizer and EMA from Tables 6 and 8. What the paper does not
disclose stands in the constants below: our choices. They name no data: point `data.sources` at yours, such as
`walt train walt.ucf101 'data.sources=[{path: UCF-101}]' classes=classes.txt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from walt.configs.tokenizers import MAGVIT2, magvit2_video
from walt.training.job import DenoiserJob, DiffusionJob, MediaJob, OptimizerJob, RunJob, Shape, TokenizerJob

T5_XL_WIDTH = 2048

PAPER_PARAMETERS: dict[str, float] = {
    "imagenet_l": 460e6,  # Table 2; 458M in Table 4
    "ucf101_l": 313e6,
    "ucf101_xl": 460e6,
    "k600_l": 313e6,
    "t2v_base_3b": 3.0e9,
    "t2v_sr_1b3": 1.3e9,
    "t2v_sr_419m": 419e6,
}


def _model(**fields: Any) -> dict[str, Any]:
    """The paper's defaults: 5x16x16 latents of 8 channels, patch 1, L = 24 layers of width 1024, r = 2."""
    return {
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 1,
        "num_layers": 24,
        "num_attention_heads": 16,
        "attention_head_dim": 64,
        "ffn_dim": None,
        "text_dim": None,
        "num_classes": None,
        "adaln_rank": 2,
        "qk_norm": True,
        "sample_size": (5, 16, 16),
        "absolute_positions": True,
        "relative_positions": "bias",
        "spatial_window": None,
        "spatiotemporal_window": (8, 8),
        "cross_attention_window": "spatial",
        "self_conditioning": True,
        "frame_conditioning": False,
        "low_res_channels": None,
        "low_res_scale": 2,
        "image_identity": True,
        **fields,
    }


def imagenet_l() -> dict[str, Any]:
    """Class-conditional 256x256 images; the only model with a full AdaLN per layer.

    Its windows are not stated; an identity rule would leave half the layers without attention in a model that sees
    nothing but images, so they attend in windows of 8x8.
    """
    return _model(sample_size=(1, 32, 32), num_classes=1000, adaln_rank=None, image_identity=False)


def ucf101_l() -> dict[str, Any]:
    """Class-conditional video, 17 frames of 128x128: the L model of the ablations."""
    return _model(num_classes=101)


def ucf101_xl() -> dict[str, Any]:
    """Class-conditional video, the XL model of Tables 1 and 4."""
    return _model(num_classes=101, num_layers=28, attention_head_dim=72)


def k600_l() -> dict[str, Any]:
    """Frame prediction on Kinetics-600 from 5 frames (2 latent frames)."""
    return _model(frame_conditioning=True)


def t2v_base_3b() -> dict[str, Any]:
    """Text to 17 frames of 128x128 (finetuned to 128x224 with windows 16x28 and 8x14).

    The printed width 9216 gives 70 billion parameters; as the MLP's width, with D = 1792, it gives the reported 3.
    """
    return _model(num_layers=52, attention_head_dim=112, ffn_dim=9216, text_dim=T5_XL_WIDTH, frame_conditioning=True)


def t2v_sr_1b3() -> dict[str, Any]:
    """Super-resolution 128x224 -> 256x448."""
    return _model(
        num_layers=40,
        attention_head_dim=88,
        patch_size=2,
        sample_size=(5, 32, 56),
        spatiotemporal_window=(8, 14),
        text_dim=T5_XL_WIDTH,
        frame_conditioning=True,
        low_res_channels=8,
    )


def t2v_sr_419m() -> dict[str, Any]:
    """Super-resolution 256x448 -> 512x896; patch 4 as in Table 8 (the text says 2)."""
    return _model(
        patch_size=4,
        sample_size=(5, 64, 112),
        spatiotemporal_window=(8, 14),
        text_dim=T5_XL_WIDTH,
        frame_conditioning=True,
        low_res_channels=8,
    )


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "imagenet_l": imagenet_l,
    "ucf101_l": ucf101_l,
    "ucf101_xl": ucf101_xl,
    "k600_l": k600_l,
    "t2v_base_3b": t2v_base_3b,
    "t2v_sr_1b3": t2v_sr_1b3,
    "t2v_sr_419m": t2v_sr_419m,
}


# ---------------------------------------------------------------------------------------------------------------------
# Our choices, where the paper says nothing

EMA_DECAY = 0.9999  # as DiT and DiffiT
BETAS = (0.9, 0.99)  # AdamW's; weight decay none
WARMUP = 5000  # steps; as U-ViT
CONDITION_DROPOUT = 0.1  # of text, class and given frames, each by itself
P_FP = 0.25  # half of it one given latent frame, half two
MAX_NOISE = 300  # t_max of the noise on low-resolution latents, in steps of 1000
FINAL_LR_RATIO = 0.0  # the cosine ends at zero
STILLS_PER_CLIP = 4.0  # how often text-to-video packs draw a still for each clip
PACK_SAMPLES = 4  # clips' worth of tokens in one pack; the packs of a step make up the paper's batch

IMAGENET_IMAGES = 1_281_167
K600_VIDEOS = 392_622  # Kinetics-600's training split
UCF101_VIDEOS = 9_537  # the training part of UCF-101's first split


def _job(
    model: dict[str, Any],
    name: str,
    steps: int,
    batch: int,
    shapes: tuple[Shape, ...],
    optimizer: OptimizerJob,
    tokenizer: str,
    ema: bool,
    **fields: Any,
) -> DenoiserJob:
    """A recipe at the paper's batch: `batch` samples of the first shape, in packs of PACK_SAMPLES."""
    t, h, w = model["sample_size"]
    tokens = t * h * w // model["patch_size"] ** 2
    return DenoiserJob(
        **{
            "model": model,
            "tokenizer": tokenizer,
            "data": MediaJob(aspect="shape", captions="optional"),
            "shapes": shapes,
            "batch_tokens": PACK_SAMPLES * tokens,
            "diffusion": DiffusionJob(
                self_conditioning_probability=0.9,
                condition_dropout=CONDITION_DROPOUT,
                frame_prediction_probability=P_FP,
                max_noise_level=MAX_NOISE,
            ),
            "optimizer": optimizer,
            "run": RunJob(
                output=f"runs/walt-{name}",
                steps=steps,
                packs=batch // PACK_SAMPLES,
                precision="bf16",
                ema_decay=EMA_DECAY if ema else 0.0,
                checkpoint_every=2000,
                log_every=50,
                sheet_every=20_000,
                workers=4,
            ),
            **fields,
        }
    )


def _optimizer(kind: str, lr: float, schedule: str = "cosine") -> OptimizerJob:
    values = {"kind": kind, "lr": lr, "schedule": schedule, "warmup_steps": WARMUP, "betas": BETAS}
    return OptimizerJob.model_validate({**values, "final_lr_ratio": FINAL_LR_RATIO})


def _clip(height: int, width: int, weight: float = 1.0) -> Shape:
    return Shape(frames=17, height=height, width=width, weight=weight)


def _joint(height: int, width: int) -> tuple[Shape, ...]:
    """Clips and stills in one pack."""
    return (_clip(height, width), Shape(frames=1, height=height, width=width, weight=STILLS_PER_CLIP))


def _tokenizer(name: str, steps: int, shapes: tuple[Shape, ...], samples: int, images: bool = False) -> TokenizerJob:
    """Table 8's first stage: MAGVIT-v2's networks and losses without a quantizer, 8 channels, batches of 256, cosine.

    `samples` of the first shape are a pack, 256 a step.
    """
    widths = (128, 128, 256, 512) if images else MAGVIT2["encoder_widths"]
    first = magvit2_video()
    model = {
        **{key: value for key, value in MAGVIT2.items() if not key.startswith("quantizer")},
        "encoder_widths": widths,
        "decoder_widths": widths,
        "latent_channels": 8,
        **({"temporal_downsample": (False, False, False)} if images else {}),
    }
    shape = shapes[0]
    run = first.run.model_copy(
        update={"output": f"runs/{name}-tokenizer", "steps": steps, "packs": 256 // samples, "workers": 4}
    )
    return first.model_copy(
        update={
            "model": model,
            "data": MediaJob(aspect="shape", captions="optional", variants=64),
            "shapes": shapes,
            "batch_pixels": samples * shape.frames * (shape.cut or shape.height) * (shape.cut or shape.width),
            "loss": first.loss.model_copy(update={"latent_penalty": 0.0, "perceptual_frames": 4}),
            "run": run,
        }
    )


def imagenet_tokenizer() -> TokenizerJob:
    """First stage on ImageNet 256x256: 270 epochs in batches of 256."""
    shapes = (Shape(frames=1, height=256, width=256),)
    return _tokenizer("imagenet", 270 * IMAGENET_IMAGES // 256, shapes, samples=32, images=True)


def ucf101_tokenizer() -> TokenizerJob:
    """First stage on UCF-101, 17 frames of 128x128: 2000 epochs in batches of 256."""
    return _tokenizer("ucf101", 2000 * UCF101_VIDEOS // 256, (_clip(128, 128),), samples=8)


def k600_tokenizer() -> TokenizerJob:
    """First stage on Kinetics-600, 17 frames of 128x128: 270,000 steps."""
    return _tokenizer("k600", 270_000, (_clip(128, 128),), samples=8)


def t2v_tokenizer() -> TokenizerJob:
    """First stage of text to video, images and clips: 1,000,000 steps.

    One for the three stages, on cuts of all three sizes, where Table 8 gives each its own: a super-resolution stage here
    reads its low resolution through the same tokenizer.
    """
    sizes = ((128, 224), (256, 448), (512, 896))
    shapes = tuple(
        Shape(frames=frames, height=height, width=width, cut=128, weight=weight)
        for frames, weight in ((17, 4.0), (1, 4.0))
        for height, width in sizes
    )
    return _tokenizer("t2v", 1_000_000, shapes, samples=8)


def imagenet() -> DenoiserJob:
    """ImageNet 256x256 by class: 350 epochs in batches of 1024."""
    return _job(
        imagenet_l(),
        "imagenet",
        steps=350 * IMAGENET_IMAGES // 1024,
        batch=1024,
        shapes=(Shape(frames=1, height=256, width=256),),
        optimizer=_optimizer("adamw", 5e-4),
        tokenizer="runs/imagenet-tokenizer/final",
        ema=True,
    )


def ucf101() -> DenoiserJob:
    """UCF-101 by class, 17 frames of 128x128: the XL model, 60,000 steps in batches of 256."""
    return _job(
        ucf101_xl(),
        "ucf101",
        steps=60_000,
        batch=256,
        shapes=(_clip(128, 128),),
        optimizer=_optimizer("adamw", 5e-4),
        tokenizer="runs/ucf101-tokenizer/final",
        ema=True,
    )


def k600() -> DenoiserJob:
    """Kinetics-600, prediction of 17 frames from 5 (2 latent frames): 360 epochs in batches of 512."""
    job = _job(
        k600_l(),
        "k600",
        steps=360 * K600_VIDEOS // 512,
        batch=512,
        shapes=(_clip(128, 128),),
        optimizer=_optimizer("adamw", 5e-4),
        tokenizer="runs/k600-tokenizer/final",
        ema=True,
    )
    # Always the two frames of the benchmark, dropped like any condition.
    knobs = {"frame_prediction_probability": 1.0 - CONDITION_DROPOUT, "given_frames": (2,)}
    return job.model_copy(update={"diffusion": job.diffusion.model_copy(update=knobs)})


def _text_to_video(
    model: dict[str, Any], name: str, steps: int, lr: float, height: int, width: int, **fields: Any
) -> DenoiserJob:
    schedule = fields.pop("schedule", "cosine")
    job = _job(
        model,
        name,
        steps=steps,
        batch=512,
        shapes=_joint(height, width),
        optimizer=_optimizer("adafactor", lr, schedule),
        tokenizer="runs/t2v-tokenizer/final",
        ema=False,
        text_encoder="t5-xl-encoder",
        text_tokenizer="t5-xl-tokenizer",
        **fields,
    )
    run = job.run.model_copy(update={"parallel": "fsdp", "gradient_checkpointing": True})
    return job.model_copy(update={"run": run, "data": MediaJob(aspect="shape")})


def t2v_base() -> DenoiserJob:
    """Text to 17 frames of 128x128, clips and stills together: 550,000 steps."""
    return _text_to_video(t2v_base_3b(), "t2v-base", 550_000, 2e-4, 128, 128)


def t2v_base_wide() -> DenoiserJob:
    """The base goes on at 128x224 (Table 6): positions interpolated, windows scaled, 250,000 steps at a constant rate."""
    model = {**t2v_base_3b(), "sample_size": (5, 16, 28), "spatiotemporal_window": (8, 14)}
    return _text_to_video(
        model,
        "t2v-base-wide",
        250_000,
        5e-5,
        128,
        224,
        schedule="constant",
        init="runs/walt-t2v-base/final",
        interpolate_positions=True,
    )


def t2v_sr1() -> DenoiserJob:
    """Super-resolution 128x224 -> 256x448: 675,000 steps."""
    return _text_to_video(t2v_sr_1b3(), "t2v-sr1", 675_000, 5e-4, 256, 448)


def t2v_sr2() -> DenoiserJob:
    """Super-resolution 256x448 -> 512x896: 275,000 steps."""
    return _text_to_video(t2v_sr_419m(), "t2v-sr2", 275_000, 5e-4, 512, 896)


RECIPES = {
    "imagenet_tokenizer": imagenet_tokenizer,
    "ucf101_tokenizer": ucf101_tokenizer,
    "k600_tokenizer": k600_tokenizer,
    "t2v_tokenizer": t2v_tokenizer,
    "imagenet": imagenet,
    "ucf101": ucf101,
    "k600": k600,
    "t2v_base": t2v_base,
    "t2v_base_wide": t2v_base_wide,
    "t2v_sr1": t2v_sr1,
    "t2v_sr2": t2v_sr2,
}
