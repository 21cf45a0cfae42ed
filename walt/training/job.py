"""Recipes: a training job is one complete, typed, frozen value. `configs/` holds functions that return them.

A job is pydantic, so that `field=value` on the command line is parsed and checked like the recipe itself, and a wrong
name is answered with the nearest right one.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from walt.errors import WaltError, suggest
from walt.models.backbone import BACKBONES


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


SEEDS = 2**63
"""Seeds are below it, and not negative: numpy's and torch's generators take those."""


class Shape(Frozen):
    """One size of training sample: pixels before the tokenizer, and how often it is drawn."""

    frames: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    weight: float = Field(default=1.0, gt=0)
    start: int = Field(default=0, ge=0, description="first frame of the window inside its scene (12: a second chunk)")
    cut: int = Field(default=0, ge=0, description="side in pixels of a square cut out of the frame; 0: the whole frame")


class DataJob(Frozen):
    """The emoji theatre: sprites from `source` (walt data emoji), composed by seed."""

    kind: Literal["emoji"] = "emoji"
    source: str = "cache/emoji"
    world: Literal["embedded", "large", "full"] = Field(
        default="embedded", description="eight subjects, 64 over the emoji groups, or whatever the sprites are of"
    )
    subjects: tuple[str, ...] = Field(default=(), description="only these; (): the world's")
    clip_subjects: tuple[str, ...] = Field(
        default=(), description="clips show only these, stills all; (): all (benchmarks/joint.py)"
    )
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    scenes: int = Field(default=1_000_000, gt=0, description="distinct scene seeds, cycled")
    fps: Literal[8, 16] = Field(default=8, description="frame rate; shapes count their frames in it")
    draw: Literal["host", "device"] = Field(
        default="host",
        description="who draws the scenes: Pillow, clip by clip, or the device that trains, many at once (walt.data.stage)",
    )
    latents: str | None = Field(
        default=None, description="folder of precomputed latents (walt encode); None: on the fly"
    )
    mixed_latents: str | None = Field(
        default=None,
        description="folder of latents of any other world, on the same tokenizer, among those of `latents`",
    )
    mixed_share: float = Field(default=0.3, gt=0, lt=1, description="chance that a sample is of mixed_latents")

    @model_validator(mode="after")
    def _mixed_into_something(self) -> Self:
        if self.mixed_latents is not None and self.latents is None:
            raise ValueError("mixed_latents are drawn among those of latents: give both folders")
        return self


class SourceJob(Frozen):
    """One place with captioned images and videos (walt.data.sources)."""

    path: str = Field(description="a folder, shards (x-*.tar, x-{000..127}.tar), or a Hugging Face dataset (hf:NAME)")
    kind: Literal["auto", "folder", "shards", "datasets"] = "auto"
    weight: float = Field(default=1.0, gt=0, description="share of the samples, relative to the other sources")
    caption: str | None = Field(
        default=None, description="field of the captions; None: caption, captions, text, prompt"
    )
    caption_from: Literal["files", "folder"] = Field(
        default="files", description="folder: an item's caption is the name of its folder, as in a tree of classes"
    )
    media: str | None = Field(default=None, description="datasets: column of the media; None: the first")
    split: str = Field(default="train", description="datasets: the split")


class MediaJob(Frozen):
    """A user's own images and videos. Of a recipe's shapes, `height` x `width` is then an area, not a size.

    An item is scaled, its aspect ratio kept, to the largest size of whole tokens within the area; a shape with one
    frame takes images and stills of videos, the others take clips. Captions are dropped for guidance by
    `diffusion.condition_dropout`.
    """

    kind: Literal["media"] = "media"
    sources: tuple[SourceJob, ...] = Field(default=(), description="at least one; mixed by weight")
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    fps: float = Field(default=8.0, gt=0, description="frame rate of training; videos are resampled to it")
    aspect: Literal["native", "shape"] = Field(default="native", description="shape: cut to height x width exactly")
    enlarge: bool = Field(default=False, description="scale small items up to the area too")
    min_size: int = Field(default=32, gt=0, description="shorter side in pixels below which an item is left out")
    max_size: int = Field(default=8192, gt=0, description="longer side in pixels above which an item is left out")
    captions: Literal["required", "optional"] = Field(
        default="required", description="optional: an item without one is trained with an empty caption"
    )
    variants: int = Field(default=1, gt=0, description="random windows (start, cut) of each clip that epochs alternate")
    video_stills: bool = Field(default=True, description="frames of videos fill shapes of one frame too")
    max_clips: int = Field(default=64, gt=0, description="clips of one video per epoch, spread evenly over it")
    heldout_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of each source's items that is never trained on (run.heldout_every)"
    )
    max_broken: float = Field(default=0.5, ge=0, le=1, description="a source with a larger broken share stops the run")
    index: str = Field(default="cache/index", description="folder of what is known about the sources")
    latents: str | None = Field(
        default=None, description="folder of precomputed latents (walt encode); None: on the fly"
    )


DATA_KINDS: dict[str, type[Frozen]] = {"emoji": DataJob, "media": MediaJob}
AnyData = Annotated[DataJob | MediaJob, Field(discriminator="kind")]


Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerJob(Frozen):
    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Share, Share] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: float = Field(default=0.02, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)


class RunJob(Frozen):
    """Everything a run needs beside model and data."""

    output: str
    steps: int = Field(gt=0)
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    packs: int | None = Field(
        default=None, gt=0, description="packs per step, divided among the ranks and accumulated; None: one per rank"
    )
    parallel: Literal["ddp", "fsdp"] = Field(default="ddp", description="among several ranks: whole copies, or FSDP2")
    cpu_offload: bool = Field(default=False, description="fsdp: weights, gradients and moments wait in host memory")
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = Field(
        default=False,
        description="compile the network's repeated blocks: a minute or more at the start, then faster steps on a GPU",
    )
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="0: no average is kept")
    ema_lengths: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = Field(
        default=(),
        description="power-function averages kept beside that of ema_decay, by length (sigma_rel), such as [0.05, 0.1]: "
        "`walt average` makes one of any length of their snapshots",
    )
    ema_every: int = Field(
        default=500, gt=0, description="steps between snapshots of ema_lengths; the last is kept too"
    )
    spike_factor: float = Field(
        default=20.0, ge=0, description="skip a step whose gradient norm is this many times the usual; 0: never"
    )
    max_skips: int = Field(default=10, gt=0, description="stop after so many skipped steps in a row")
    checkpoint_every: int = Field(default=500, gt=0)
    checkpoint_async: bool = Field(default=True, description="training goes on while a checkpoint is written")
    keep_checkpoints: int = Field(default=2, gt=0)
    log_every: int = Field(default=10, gt=0)
    sheet_every: int = Field(default=0, ge=0, description="sample sheets every this many steps; 0: only at the end")
    heldout_every: int = Field(default=0, ge=0, description="held-out loss every this many steps; 0: never")
    heldout_clips: int = Field(default=4, gt=0, description="held-out clips per shape")
    workers: int = Field(default=0, ge=0)
    wandb: bool = True
    tensorboard: bool = False

    @field_validator("ema_lengths")
    @classmethod
    def _unlike(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(lengths)) < len(lengths):
            raise ValueError("give each length once")
        return lengths

    @field_validator("precision", mode="before")
    @classmethod
    def _written_no(cls, value: object) -> object:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value


class AdversarialJob(Frozen):
    """The discriminator of a tokenizer (MAGVIT-v2, arXiv 2310.05737, appendix A) and how it is trained."""

    model: dict[str, Any] = Field(default={}, description="arguments of walt.tokenizers.discriminator.Discriminator")
    loss: Literal["non_saturating", "hinge"] = "non_saturating"
    weight: float = Field(default=0.1, gt=0, description="of the generator's adversarial loss")
    adaptive: bool = Field(default=False, description="times the ratio of gradients at the last layer (VQ-GAN)")
    start: int = Field(default=0, ge=0, description="step from which the discriminator counts for the generator")
    lecam: float = Field(default=0.001, ge=0)
    r1: float = Field(default=10.0, ge=0, description="weight of the gradient penalty on real samples")
    r1_every: int = Field(default=1, gt=0, description="steps between penalties, each weighted by their distance")
    optimizer: OptimizerJob = OptimizerJob(lr=1e-4, betas=(0.0, 0.99))


class TokenizerLoss(Frozen):
    reconstruction: float = 1.0
    pixel: Literal["l1", "l2"] = "l1"
    perceptual: float = 0.1
    perceptual_weights: str | None = Field(default=None, description="LPIPS-VGG safetensors (walt data lpips)")
    perceptual_frames: int = Field(default=4, gt=0, description="random frames per step that the VGG sees")
    latent_penalty: float = Field(default=1e-4, ge=0, description="weight of mean z^2: keeps the latent's scale")
    latent_noise: float = Field(
        default=0.0,
        ge=0,
        description="std of the noise the decoder learns to ignore, in units of the std of each of the latent's channels",
    )
    frame_difference: float = Field(
        default=0.0, ge=0, description="weight of the error of differences between neighbouring frames: against flicker"
    )
    commitment: float = Field(default=0.25, ge=0, description="latents to their codes (quantizers)")
    codebook: float = Field(default=1.0, ge=0, description="codes to their latents (vq with a gradient codebook)")
    entropy: float = Field(default=0.1, ge=0, description="entropy penalty (lfq) at its final weight")
    entropy_start: float = Field(default=3.0, ge=0, description="the penalty begins this many times as heavy")
    entropy_steps: int = Field(default=2000, ge=0, description="steps in which it falls linearly to its final weight")
    quantizer_warmup: int = Field(
        default=0,
        ge=0,
        description="steps without quantization, so that the codebook meets latents of full dimension; then as many in "
        "which ever more samples of a batch are quantized",
    )
    adversarial: AdversarialJob | None = None


class DenoisedJob(Frozen):
    """The decoder learns from latents that a denoiser has made of noised ones, as it is given them in sampling, beside the
    true frames (walt.training.denoised). A batch is left as it is at times, with `loss.latent_noise`."""

    denoiser: str = Field(description="folder of a base denoiser of this tokenizer's latents")
    text_encoder: str | None = Field(default=None, description="folder, for a denoiser that reads text")
    text_tokenizer: str | None = None
    sizes: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]], ...] = Field(
        min_length=1, description="height and width of the shapes this is done for: what the denoiser knows; cuts count"
    )
    steps: int = Field(default=10, gt=0, le=1000, description="of sampling, evenly spaced")
    last: int = Field(default=4, gt=0, description="none to this many of them are run, from the end, drawn evenly")

    @model_validator(mode="after")
    def _check(self) -> DenoisedJob:
        if self.last > self.steps:
            raise ValueError(f"last must be at most steps, got {self.last} of {self.steps}")
        return self


class TokenizerJob(Frozen):
    kind: Literal["tokenizer"] = "tokenizer"
    architecture: Literal["causal", "frames"] = Field(
        default="causal",
        description="causal: AutoencoderKLWalt; frames: WaltVQModel, pictures or class maps one by one",
    )
    model: dict[str, Any]
    init: str | None = Field(default=None, description="folder of a trained tokenizer to go on from")
    inflate: str | None = Field(
        default=None,
        description="folder of a trained image tokenizer that a causal one starts as (walt.tokenizers.inflation)",
    )
    freeze_encoder: bool = Field(default=False, description="train the decoder alone: latents of denoisers stay valid")
    hold_keyframes: bool = Field(
        default=False,
        description="start from latents that are those of their last frames as images; needs model.block_shortcut",
    )
    data: AnyData
    shapes: tuple[Shape, ...] = Field(min_length=1)
    shortcut_batches: int = Field(default=60, gt=0, description="batches that a block_shortcut is fitted to")
    batch_pixels: int = Field(gt=0, description="video pixels (frames x height x width) per step and rank")
    loss: TokenizerLoss = TokenizerLoss()
    denoised: DenoisedJob | None = Field(default=None, description="needs freeze_encoder=true: latents must stay")
    optimizer: OptimizerJob
    run: RunJob


class DiffusionJob(Frozen):
    """Every switch of W.A.L.T.'s training that is not the network's own (papers: sections 3-4, Table 3)."""

    zero_snr: bool = True
    latent_normalization: bool = True
    timestep_logit_normal: tuple[float, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="mean and std of logit(t / T) (Esser et al. 2024, section 3.1); None: uniform t"
    )
    self_conditioning_probability: float = Field(default=0.9, ge=0, le=1)
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    partial_captions: float = Field(
        default=0.0, ge=0, le=1, description="chance that a caption loses words, each of them at even odds"
    )
    frame_prediction_probability: float = Field(default=0.2, ge=0, le=1, description="p_fp")
    given_frames: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(1, 2), min_length=1, description="latent frames given in frame prediction, drawn evenly"
    )
    mask_probability: float = Field(
        default=0.0, ge=0, le=1, description="chance that something of `mask_kinds` is given instead"
    )
    mask_kinds: tuple[Literal["frames", "first", "last", "both", "box", "moment", "inside"], ...] = Field(
        default=("box", "frames"),
        min_length=1,
        description="drawn evenly; walt.conditioning.random_mask says what they are",
    )
    max_noise_level: int = Field(default=300, ge=0, lt=1000, description="t_max of the low-resolution augmentation")
    loss_weighting: Literal["token", "sample"] = "token"
    variance_weight: float = Field(
        default=1.0, ge=0, description="of the bound, in bits, of a learned variance (1: 0.001 over 1000 steps, as DiT)"
    )


class ResolutionJob(Frozen):
    """NaViT's resolution sampling: each sample of a whole-frame shape gets a size of its own, its aspect ratio kept.

    The paper's finding (arXiv 2307.06304, section 3.4): sampling sides beats sampling areas, and a low bias (normal,
    mean -0.5) is best.
    """

    low: int = Field(gt=0, description="smallest side R in pixels; a sample has about R x R pixels per frame")
    high: int = Field(gt=0, description="largest R; memory is bounded by batch_tokens whatever it is")
    distribution: Literal["uniform", "normal"] = "normal"
    mean: float = Field(default=-0.5, ge=-1, le=1, description="of the normal, in [-1, 1] from low to high")
    by: Literal["side", "area"] = "side"


class TokenDropJob(Frozen):
    """NaViT's token dropping: the denoiser sees and is scored on a part of each sample's tokens.

    The paper's warning: dropping made recognition cheaper to train, but using fewer tokens at inference by dropping is
    much worse than by resizing, and follow-up work advises against it for video generation, where it hurts fine detail
    and consistency (NaViT, section 3.3). Train the last steps without it.
    """

    schedule: Literal["constant", "beta", "resolution", "sigmoid"] = "constant"
    low: float = Field(default=0.0, ge=0, lt=1, description="rate of the shortest sample, or where sigmoid ends")
    high: float = Field(gt=0, lt=1, description="the rate (constant), the largest one (beta), the longest sample's")
    mean: float = Field(default=0.5, gt=0, lt=1, description="beta: mean rate as a share of high")
    middle: float = Field(default=0.0, description="sigmoid: the step halfway between low and high")
    scale: float = Field(default=-1.0, description="sigmoid: steps of its slope; below 0 the rate falls (best)")

    @field_validator("scale")
    @classmethod
    def _has_slope(cls, value: float) -> float:
        if not value:
            raise ValueError("a slope of 0 steps is none")
        return value


class LoraJob(Frozen):
    """Finetuning by low-rank adapters (PEFT) on the weights of `init`, which stay as they are."""

    rank: int = Field(default=16, gt=0)
    alpha: float | None = Field(default=None, gt=0, description="scale of the update times rank; None: the rank")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="ends of the names of adapted layers"
    )
    export: Literal["adapter", "merged"] = Field(
        default="adapter", description="adapter: for load_lora_adapter; merged: a whole model"
    )


class PixelJob(Frozen):
    """A super-resolution stage is scored on its frames too: decoded, held to the small video as in sampling, beside the true
    ones. For a stage that has learnt its latents and is sampled in one step (diffusion.timestep_logit_normal=[20, 0])."""

    reconstruction: float = Field(
        default=1.0, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]"
    )
    perceptual: float = Field(default=0.5, ge=0, description="weight of LPIPS")
    perceptual_weights: str | None = Field(default=None, description="LPIPS-VGG safetensors (walt data lpips)")
    perceptual_frames: int = Field(default=4, gt=0, description="random frames per step that the VGG sees")
    fidelity: float = Field(default=0.6, ge=0, le=1, description="as in sampling; 0: frames as they are decoded")
    passes: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="chance that the small video has passed the tokenizer, as what a stage before makes has; the others are "
        "held to in full (fidelity 1), as a user's video is",
    )
    latent_noise: float = Field(
        default=0.2,
        ge=0,
        description="most noise on the latents of such a pass, in units of their std: a stage before errs",
    )


class DenoiserJob(Frozen):
    kind: Literal["denoiser"] = "denoiser"
    backbone: str = Field(default="walt", description=f"the network: {', '.join(BACKBONES)}")
    model: dict[str, Any]
    init: str | None = Field(default=None, description="folder of a trained denoiser of the same shape to go on from")
    interpolate_positions: bool = Field(
        default=False, description="init may have another sample_size and windows: its position tables are interpolated"
    )
    lora: LoraJob | None = None
    classes: str | None = Field(
        default=None,
        description="file with a class per line, of a model with num_classes: captions name classes; None: the "
        "folders of sources with caption_from=folder, in alphabetical order",
    )
    tokenizer: str = Field(description="folder of the trained tokenizer")
    text_encoder: str | None = None
    text_tokenizer: str | None = None
    data: AnyData
    shapes: tuple[Shape, ...] = Field(min_length=1)
    batch_tokens: int = Field(gt=0, description="tokens per step and rank")
    resolution: ResolutionJob | None = Field(default=None, description="NaViT's resolution sampling; None: off")
    token_drop: TokenDropJob | None = Field(default=None, description="NaViT's token dropping; None: off")
    low_res_batches: int = Field(default=30, gt=0, description="batches that a super-resolution start is fitted to")
    diffusion: DiffusionJob = DiffusionJob()
    pixels: PixelJob | None = Field(
        default=None, description="a super-resolution stage's score on its frames; None: off"
    )
    optimizer: OptimizerJob
    run: RunJob

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"one of {', '.join(BACKBONES)} needed{suggest(name, BACKBONES)}")
        return name


class NuwaClip(Frozen):
    """What NUWA sees of a scene of 29 frames: every `frame_step`-th frame from `start` on, and stills of that size.

    Of a user's media `frames` frames at `data.fps`, cut to height x width; `start` and `frame_step` are the theatre's.
    """

    frames: int = Field(default=5, gt=0)
    height: int = Field(default=128, gt=0)
    width: int = Field(default=128, gt=0)
    start: int = Field(default=0, ge=0)
    frame_step: int = Field(default=4, gt=0, description="4: 2 frames per second, over the 17 frames of a base clip")


class NuwaTask(Frozen):
    """How much of a step one task is."""

    batch: float = Field(
        default=0, ge=0, description="samples per step and rank; a fraction is the chance of one more; 0: not trained"
    )
    weight: float = Field(default=1.0, gt=0, description="of its cross-entropy (mean over tokens) in the sum")


class NuwaTasks(Frozen):
    """The three tasks of NUWA's pre-training (section 3.4) and the two sketch tasks it is finetuned on."""

    text_to_image: NuwaTask = NuwaTask(batch=1)
    video_to_video: NuwaTask = NuwaTask(batch=1)
    text_to_video: NuwaTask = NuwaTask(batch=1)
    sketch_to_image: NuwaTask = NuwaTask()
    sketch_to_video: NuwaTask = NuwaTask()


class NuwaJob(Frozen):
    kind: Literal["nuwa"] = "nuwa"
    model: dict[str, Any]
    init: str | None = Field(default=None, description="folder of a trained NUWA of the same shape to go on from")
    tokenizer: str = Field(description="folder of the trained VQ tokenizer of frames")
    sketch_tokenizer: str | None = Field(default=None, description="folder of the trained VQ-Seg; sketch tasks need it")
    text_encoder: str
    text_tokenizer: str
    data: AnyData
    clip: NuwaClip = NuwaClip()
    tasks: NuwaTasks = NuwaTasks()
    condition_dropout: float = Field(default=0.1, ge=0, le=1, description='share of conditions made "None"')
    token_noise: float = Field(
        default=0.0, ge=0, le=1, description="share of samples that see a random part of their tokens as random codes"
    )
    turns: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of text_to_video clips that turn back from some frame on, after the caption of the opposite "
        "motion; the loss is of the frames from there on (text-guided video manipulation)",
    )
    continued: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of video_to_video clips of which some first frames (one to all but one, at random) are given: the "
        "loss is of the frames after them (video prediction)",
    )
    tokens: str | None = Field(
        default=None, description="folder where tokens of the theatre's scenes are kept, made once; None: on the fly"
    )
    optimizer: OptimizerJob
    run: RunJob


Job = TokenizerJob | DenoiserJob | NuwaJob


# ---------------------------------------------------------------------------------------------------------------------
# Finding and overriding recipes


def recipes() -> dict[str, Callable[[], Job]]:
    """All recipes as {"family.name": function}, read from the RECIPES table of every module of walt.configs."""
    import walt.configs

    table: dict[str, Callable[[], Job]] = {}
    for module in sorted(found.name for found in pkgutil.iter_modules(walt.configs.__path__)):
        family = importlib.import_module(f"walt.configs.{module}")
        table.update({f"{module}.{name}": recipe for name, recipe in getattr(family, "RECIPES", {}).items()})
    return table


def load_job(name: str, overrides: Sequence[str] = ()) -> Job:
    """The recipe `name` with `field=value` overrides (dotted fields, YAML values) applied and checked."""
    table = recipes()
    if name not in table:
        raise WaltError(f"unknown recipe {name!r}{suggest(name, table)}; known: {', '.join(sorted(table))}")
    job = table[name]()
    values = job.model_dump()
    # Another kind of data has other fields: it comes first, with its own defaults.
    for override in sorted(overrides, key=lambda text: not text.startswith("data.kind=")):
        field, found, text = override.partition("=")
        if not found:
            raise WaltError(f"an override is field=value, got {override!r}")
        if field == "data.kind" and text in DATA_KINDS and text != values["data"]["kind"]:
            values["data"] = DATA_KINDS[text]().model_dump()
        _set(values, field, text)
    try:
        return type(job).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WaltError(f"{name}: {where}: {first['msg'].lower()}, got {first['input']!r}") from None


def read_job(values: Any) -> Job:
    """The recipe that a checkpoint holds (`model_dump` as JSON); a WaltError where it is none of this walt's."""
    kinds: dict[str, type[Job]] = {
        cls.model_fields["kind"].default: cls for cls in (TokenizerJob, DenoiserJob, NuwaJob)
    }
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise WaltError(f"the recipe is of kind {kind!r}; known: {', '.join(kinds)}")
    try:
        return kinds[kind].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WaltError(
            f"the recipe is of another walt: {where}: {first['msg'].lower()}, got {first['input']!r}"
        ) from None


def _set(values: dict[str, Any], field: str, text: str) -> None:
    """Sets values["a"]["b"] for field "a.b"; only free-form tables (model) take names that the recipe did not set."""
    *path, last = field.split(".")
    here: Any = values
    for part in path:
        if not isinstance(here, dict) or part not in here:
            known = here if isinstance(here, dict) else ()
            raise WaltError(f"unknown field {field!r}: no {part!r}{suggest(part, known)}; known: {_names(known)}")
        if part in ("lora", "pixels") and here[part] is None:
            here[part] = (LoraJob() if part == "lora" else PixelJob()).model_dump()
        here = here[part]
    free = path[-1:] == ["model"]
    if not isinstance(here, dict) or (last not in here and not free):
        known = here if isinstance(here, dict) else ()
        raise WaltError(f"unknown field {field!r}{suggest(last, known)}; known: {_names(known)}")
    try:
        here[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise WaltError(f"the value of {field} is not valid YAML: {text!r}") from None
    if isinstance(here[last], str):
        # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            here[last] = float(text)


def _names(known: Any) -> str:
    return ", ".join(sorted(known)) or "nothing below it"


def job_kinds() -> tuple[type[BaseModel], ...]:
    return get_args(Job)
