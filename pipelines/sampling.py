"""What walt's pipelines share: text encoding, guided prediction, the denoising loop, chunks, and diffusers'
conventions.

Letters: B samples (prompts times videos per prompt), C channels, t h w latent grid, T H W frames and pixels.
Each sample is its own entry of a packed forward with its text at its true length, and draws its noise from its own
seed, so a sample never depends on the rest of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import repeat
from typing import Any, Literal, ParamSpec

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.card import HubCardMixin
from walt.chunking import (
    OVERLAP_LATENTS,
    TEMPORAL_RATIO,
    chunk_length,
    chunk_starts,
    latent_frames,
    overlap_frames,
    windows,
)
from walt.conditioning import TEXT_TOKENS, encode_text
from walt.diffusion import GuidanceOptions, add_noise, guide, x0_from_velocity
from walt.errors import WaltError, suggest
from walt.fidelity import back_project
from walt.heap import return_freed_memory
from walt.latents import denormalize, normalize
from walt.models.transformer_walt import TextCache, WaltTransformer3DModel
from walt.pipelines.conditions import Known, close_seams, known_latents
from walt.pipelines.lora import WaltLoraLoaderMixin
from walt.register import refuse_cache
from walt.tokenizers.adapter import adapt
from walt.tokenizers.text import CompactTextEncoder

Generators = torch.Generator | list[torch.Generator] | None
P = ParamSpec("P")
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]

MAX_PACK_TOKENS = 2**17  # a pack larger than this is split over several forwards (memory; the result is the same)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What a number drawn from a sample's seed is for.
START_NOISE, LOW_RES_NOISE, CONTEXT_NOISE, RESAMPLE_NOISE = 0, 1, 2, 3


@dataclass(frozen=True)
class Prompt:
    """Text states `(B, S, D)` with masks `(B, S)` (1 = counts), and those that guidance steers away from."""

    embeds: Tensor | None = None
    mask: Tensor | None = None
    negative_embeds: Tensor | None = None
    negative_mask: Tensor | None = None

    def rows(self, negative: bool) -> list[Tensor] | None:
        """Per sample its states `(S_i, D)` alone, without padding."""
        embeds, mask = (self.negative_embeds, self.negative_mask) if negative else (self.embeds, self.mask)
        if embeds is None:
            return None
        if mask is None:
            return list(embeds)
        return [states[keep.bool()] for states, keep in zip(embeds, mask, strict=True)]


@dataclass(frozen=True)
class Conditions:
    """What else the denoiser is told about one chunk; every tensor starts with B."""

    class_labels: Tensor | None = None  # (B,) long
    frame_latents: Tensor | None = None  # (B, C, t, h, w), told to the denoiser where frame_mask is 1
    frame_mask: Tensor | None = None  # (B, 1, t, h, w)
    kept_latents: Tensor | None = None  # the same, put in place at every step; None: what is told
    kept_mask: Tensor | None = None
    low_res: Tensor | None = None  # (B, C, t, h/2, w/2), noised
    noise_level: int = 0  # timestep of that noise


@dataclass(frozen=True)
class Given:
    """What a whole video starts from, beside its prompt.

    Attributes:
        known: pixels that stay.
        start: a video `(B, 3, T, H, W)` in [-1, 1] to change (SDEdit), None for pure noise.
        strength: the share of the steps that run from `start`, above 0 to 1.
        conditioning: "model" tells the denoiser what is known, as it was trained with masks; "repaint" only puts it in
            place at every step (RePaint, arXiv 2201.09865), and tells it no more than leading frames.
        resample: how often every step runs in all, noised again in between (RePaint's jumps of one step).
        composite: whether known pixels are shown as they were given, or as the tokenizer shows them.
    """

    known: Known | None = None
    start: Tensor | None = None
    strength: float = 1.0
    conditioning: Literal["model", "repaint"] = "model"
    resample: int = 1
    composite: bool = False


@dataclass(frozen=True)
class Context:
    """How later chunks of a long video see the one before.

    Attributes:
        guidance_scale: of the context, beside that of the text (Video LDM, arXiv 2304.08818, section 3.2); 1 for none.
        noise_level: timestep to which the context is noised before it is told, 0 for clean.
        anchor_every: every so many chunks one ends on the video's first frame, 0 for never.
    """

    guidance_scale: float = 1.0
    noise_level: int = 0
    anchor_every: int = 0


# -- randomness --------------------------------------------------------------------------------------------------------


def sample_seeds(generator: Generators, batch: int) -> list[int]:
    """One seed per sample: from its own generator (a list), from the one in turn, or from torch's global one."""
    listed = isinstance(generator, list) and all(isinstance(one, torch.Generator) for one in generator)
    if not (generator is None or listed or isinstance(generator, torch.Generator)):
        raise WaltError(f"generator must be a torch.Generator, a list of one per sample, or None, got {generator!r}")
    if isinstance(generator, list) and len(generator) != batch:
        raise WaltError(f"generator is a list of {len(generator)}, but {batch} samples are made: give one per sample")
    sources = generator if isinstance(generator, list) else [generator] * batch
    return [
        int(torch.randint(2**63 - 1, (), generator=source, device=source.device if source else "cpu"))
        for source in sources
    ]


def seeded_noise(
    seeds: Sequence[int], chunk: int, purpose: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Float32 noise `(B, *shape)`: row i depends on seeds[i], the chunk and the purpose alone, not on what ran before.

    So the first 17 frames of a long video start from the noise of the short one, on every device.
    """
    rows = []
    for seed in seeds:
        state = np.random.SeedSequence([seed, chunk, purpose]).generate_state(1, np.uint64)[0]
        source = torch.Generator().manual_seed(int(state) & (2**63 - 1))
        rows.append(torch.randn(shape, generator=source))
    return torch.stack(rows).to(device)


def _version(states: Tensor | None) -> tuple[int, int]:
    """Changes when a tensor is replaced or written to (one of inference mode does not count what is written)."""
    return id(states), 0 if states is None or states.is_inference() else states._version


# -- pixels and latents ------------------------------------------------------------------------------------------------


def encode_video(vae: Any, video: Tensor) -> Tensor:
    """`(B, 3, 1+4k, H, W)` in [-1, 1] -> normalised float32 latents `(B, C, 1+k, H/8, W/8)`."""
    vae = adapt(vae)
    latents = vae.encode(video.to(get_module_execution_device(vae), vae.dtype)).latent_dist.mode().float()
    return normalize(latents, *_statistics(vae, latents.shape[1]))


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """The inverse: normalised latents of one chunk -> float32 video in [-1, 1], clamped; one sample at a time."""
    vae = adapt(vae)
    raw = denormalize(latents, *_statistics(vae, latents.shape[1])).to(get_module_execution_device(vae), vae.dtype)
    parts = [vae.decode(z).sample.float().clamp(-1, 1) for z in raw.split(1)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _statistics(vae: Any, channels: int) -> tuple[list[float], list[float]]:
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return list(mean or [0.0] * channels), list(std or [1.0] * channels)


# -- one prediction, one chunk, all chunks -----------------------------------------------------------------------------


def predict(
    transformer: Any,
    x: Tensor,
    timestep: Tensor,
    prompt: Prompt,
    conditions: Conditions,
    x0: Tensor | None,
    guided: bool,
    attention_kwargs: dict[str, Any] | None = None,
    texts: dict[Any, Any] | None = None,
    progress: dict[str, Any] | None = None,
    without_frames: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """v of every sample, and without its text or class where `guided`: all of it in one packed forward if it fits.

    Args:
        x: noisy latents `(B, C, t, h, w)`.
        timestep: one number, the same for all.
        x0: the previous estimate of the clean latents (self-conditioning), None for zeros.
        texts: one dictionary for all calls with this transformer and `attention_kwargs`: holds the prompt's rows and what
            they become, so that the text is cut and projected once per prompt and not once per step.
        progress: where the loop stands, for diffusers' step caches (fields of their `cache_context`).
        without_frames: whether to predict with the text but without the given frames too.

    Returns:
        (conditional, unconditional or None, without frames or None), float32 `(B, C, t, h, w)`.
    """
    config, dtype, batch = transformer.config, transformer.dtype, len(x)
    branches = [(False, True)] + [(True, True)] * guided + [(False, False)] * without_frames
    rows = [(i, negative, framed) for negative, framed in branches for i in range(batch)]
    if texts is not None and texts.get("prompt") is not prompt:
        texts.clear()
        texts["prompt"] = prompt
    text: dict[bool, list[Tensor] | None] = {} if texts is None else texts.setdefault("rows", {})
    for negative, _ in branches:
        if negative not in text:
            text[negative] = prompt.rows(negative)

    def rows_of(negative: bool) -> list[Tensor]:
        found = text[negative]
        if found is None:
            raise WaltError(
                "guidance needs text states to steer away from: begin the call with guidance_scale above 1, or give "
                "negative_prompt_embeds"
            )
        return found

    def pick(values: Tensor | None, part: list[tuple[int, bool, bool]]) -> list[Tensor] | None:
        return None if values is None else [values[i].to(dtype) for i, _, _ in part]

    def forward(part: list[tuple[int, bool, bool]]) -> list[Tensor]:
        given: dict[str, Any] = {"self_conditioning": pick(x0, part)} if config.self_conditioning else {}
        if config.text_dim is not None:
            given["encoder_hidden_states"] = [rows_of(negative)[i].to(dtype) for i, negative, _ in part]
            if texts is not None and isinstance(transformer, WaltTransformer3DModel):
                given["text_cache"] = texts.setdefault(tuple(part), TextCache())
        if conditions.class_labels is not None:
            null = torch.full_like(conditions.class_labels[0], config.num_classes)
            given["class_labels"] = torch.stack([null if neg else conditions.class_labels[i] for i, neg, _ in part])
        if conditions.frame_mask is not None:
            # Given frames stay in both branches: guidance is about the text.
            given["frame_latents"] = pick(conditions.frame_latents, part)
            masks = [conditions.frame_mask[i].to(dtype) for i, _, _ in part]
            given["frame_mask"] = [m if framed else m * 0 for m, (_, _, framed) in zip(masks, part, strict=True)]
        if conditions.low_res is not None:
            given["low_res_hidden_states"] = pick(conditions.low_res, part)
            given["low_res_noise_level"] = torch.full((len(part),), conditions.noise_level, device=x.device)
        times = timestep.to(x.device).expand(len(part))
        out = transformer(pick(x, part), times, attention_kwargs=attention_kwargs, return_dict=False, **given)
        return list(out[0])

    tokens = x[0, 0].numel() // config.patch_size**2
    size = max(1, MAX_PACK_TOKENS // tokens)
    out: list[Tensor] = []
    for start in range(0, len(rows), size):
        with transformer.cache_context(f"pack_{start}", **(progress or {})):
            out += forward(rows[start : start + size])
    v = torch.stack(out)[:, : x.shape[1]].float()  # a learned variance beside it is not used
    parts = list(v.split(batch))
    return parts[0], parts[1] if guided else None, parts[-1] if without_frames else None


def denoise(
    pipe: SamplingPipeline,
    transformer: Any,
    noise: Tensor,
    steps: int,
    prompt: Prompt,
    conditions: Conditions,
    texts: dict[Any, Any] | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
    again: Sequence[Tensor] | None = None,
    context_scale: float = 1.0,
) -> tuple[Tensor, Prompt]:
    """One chunk from noise to clean latents with the pipeline's scheduler.

    Given frames enter every step exactly as in training (the clean latents at that step's noise), and are returned as
    given.

    Args:
        noise: standard normal `(B, C, t, h, w)`.
        steps: inference steps.
        texts: as for `predict`, to share the text of one chunk with the next.
        start: clean latents to begin from at the noise of `strength` (SDEdit, arXiv 2108.01073).
        again: a list of noises, one for every further time that each step runs (RePaint).
        context_scale: guidance towards the given frames.

    Returns:
        Clean normalised latents like `noise`, and the prompt (a callback may have changed it).
    """
    scheduler = pipe.scheduler
    texts = {} if texts is None else texts
    # Anew for every chunk: multistep schedulers remember past predictions.
    timesteps = set_timesteps(scheduler, steps, strength, noise.device)
    options, cached = pipe.guidance_options, bool(getattr(transformer, "is_cache_enabled", False))
    if cached:
        transformer._reset_stateful_cache()  # what a step cache remembers is of another chunk or run
    kept, mask = conditions.kept_latents, conditions.kept_mask
    if mask is None:
        kept, mask = conditions.frame_latents, conditions.frame_mask
    keep = None if mask is None else mask.bool()
    x = noise * scheduler.init_noise_sigma if start is None else scheduler.add_noise(start, noise, timesteps[:1])
    x0: Tensor | None = None
    contextual = context_scale != 1 and conditions.frame_mask is not None
    # Without text or class there is nothing to leave out.
    conditional = transformer.config.text_dim is not None or conditions.class_labels is not None
    for i, t in enumerate(timesteps):
        for renewed in (None, *(again or ())):
            if pipe.interrupt:
                break
            pipe._current_timestep = t
            step = t.round().long()
            if renewed is not None:
                if i + 1 == len(timesteps):
                    break
                x = noise_again(scheduler, x, renewed, timesteps[i + 1], t)
            x_t = scheduler.scale_model_input(x, t)
            if keep is not None and kept is not None:
                x_t = torch.where(keep, add_noise(scheduler, kept, noise, step), x_t)
            scale = options.scale(pipe.guidance_scale, i, float(t), scheduler.config.num_train_timesteps - 1)
            # Step caches remember by row, so under them every step has the same rows.
            guided = conditional and pipe.do_classifier_free_guidance and (scale != 1 or cached)
            at = {"step_index": i, "num_inference_steps": len(timesteps), "timestep": t}
            cond, uncond, free = predict(
                transformer, x_t, t, prompt, conditions, x0, guided, pipe.attention_kwargs, texts, at, contextual
            )
            v = cond if uncond is None else guide(cond, uncond, scale, pipe.guidance_rescale)
            if free is not None:
                v = v + (context_scale - 1) * (cond - free)
            v = options.bound(scheduler, v, x_t, step)
            x0 = x0_from_velocity(scheduler, v, x_t, step)
            x = scheduler.step(v, t, x, return_dict=False)[0]
            x, prompt = pipe._end_step(t, x, prompt)
    pipe._current_timestep = None
    if keep is not None and kept is not None:
        x = torch.where(keep, kept, x)
    return x, prompt


def set_timesteps(scheduler: Any, steps: int, strength: float = 1.0, device: Any = None) -> Tensor:
    """The timesteps of a run: all of them, or from an edit's `strength` on the last ones."""
    scheduler.set_timesteps(steps, device=device)
    timesteps: Tensor = scheduler.timesteps
    if strength == 1:
        return timesteps
    first = len(timesteps) - int(len(timesteps) * strength)
    if first == len(timesteps):
        raise WaltError(
            f"strength={strength} leaves none of the {steps} steps: use at least {math.ceil(1000 / steps) / 1000}, "
            "or more steps"
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return timesteps[first:]


def noise_again(scheduler: Any, x: Tensor, noise: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Latents at timestep `now` noised up to the larger `then`: one step of the forward process."""
    table = scheduler.alphas_cumprod
    ratio = (table[then.round().long().cpu()] / table[now.round().long().cpu()]).to(x)
    return ratio.sqrt() * x + (1 - ratio).sqrt() * noise


def denoise_stream(
    pipe: SamplingPipeline,
    transformer: Any,
    prompt: Prompt,
    *,
    seeds: Sequence[int],
    num_frames: int | None,
    size: tuple[int, int],
    steps: int,
    decode: bool,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    low_res_video: Tensor | Iterable[Tensor] | None = None,
    noise_level: int | None = None,
    fidelity: float = 0.0,
    given: Given = Given(),
    context: Context = Context(),
) -> Iterator[Tensor]:
    """A whole video, chunk by chunk, in memory that does not depend on its length.

    Each later chunk is given the last frames of the one before, re-encoded.

    Args:
        seeds: one per sample.
        num_frames: as `chunk_starts` allows; None for as many as `low_res_video` has, whatever that is.
        size: (h, w) of the latents.
        decode: whether to give frames or latents.
        latents: start noise `(B, C, t, h, w)` in place of the seeds', t counting the latent frames of all chunks.
        low_res_video: for super-resolution, `(B, 3, T, H/2, W/2)` in [-1, 1], or pieces of it one after another; cut
            into the same chunks.
        noise_level: timestep of the noise that the low-resolution latents get.
        fidelity: how closely the frames, made small again, are held to `low_res_video`; see `back_project`.
        given: what stays of a video, or is changed.
        context: how later chunks see the one before.

    Yields:
        For every chunk its new frames `(B, 3, n, H, W)` in [-1, 1], or all its normalised latents `(B, C, t, h, w)`.
        An interrupt ends it with the chunk that runs.
    """
    vae, device, ratio = pipe.vae, pipe._execution_device, pipe.vae_scale_factor_temporal
    overlap = overlap_frames(ratio)
    channels = int(transformer.config.in_channels)
    texts: dict[Any, Any] = {}
    past: Tensor | None = None
    first: Tensor | None = None

    # A function, so that a chunk's pixels are held by nobody here once they are given away.
    def chunk(k: int, window: _Window) -> Tensor:
        nonlocal past, first, prompt
        if k and not transformer.config.frame_conditioning:  # a stream's length is not known before
            raise WaltError(
                f"a video of more than {1 + 4 * ratio} frames needs a transformer with frame_conditioning; this one has none"
            )
        shape = (channels, latent_frames(window.length, ratio), *size)
        conditions = Conditions(class_labels=class_labels)
        if window.low_res is not None and noise_level is not None:
            small = encode_video(vae, window.low_res.to(device)).to(device)
            noise = seeded_noise(seeds, k, LOW_RES_NOISE, tuple(small.shape[1:]), device)
            conditions = replace(
                conditions, low_res=add_noise(pipe.scheduler, small, noise, noise_level), noise_level=noise_level
            )
        known = None if given.known is None else given.known.window(window.start, window.length)
        anchored = context.anchor_every > 0 and k % context.anchor_every == 0
        if first is not None and anchored and (known is None or not bool(known.mask.any())):
            known = Known.ending(first, window.length, ratio)
        if known is not None and past is not None:
            known = known.after(past)
        source: Tensor | None = None
        if known is not None and bool(known.mask.any()):
            source, mask = known_latents(known, lambda video: encode_video(vae, video).to(device), shape, ratio)
            conditions = tell(conditions, transformer, source, mask, given.conditioning)
        elif past is not None:
            clean = encode_video(vae, past).to(device)
            source, mask = clean.new_zeros(len(seeds), *shape), clean.new_zeros(len(seeds), 1, *shape[1:])
            source[:, :, :OVERLAP_LATENTS], mask[:, :, :OVERLAP_LATENTS] = clean, 1
            conditions = replace(conditions, frame_latents=source, frame_mask=mask)
        if k and context.noise_level and conditions.frame_latents is not None:
            noise = seeded_noise(seeds, k, CONTEXT_NOISE, shape, device)
            told = conditions.frame_latents
            if conditions.kept_mask is None:
                conditions = replace(conditions, kept_latents=told, kept_mask=conditions.frame_mask)
            told = add_noise(pipe.scheduler, told, noise, context.noise_level)
            conditions = replace(conditions, frame_latents=told)
        if latents is None:
            noise = seeded_noise(seeds, k, START_NOISE, shape, device)
        else:
            noise = latents[:, :, k * shape[1] : (k + 1) * shape[1]].to(device, torch.float32)
        again = [seeded_noise(seeds, k, RESAMPLE_NOISE + i, shape, device) for i in range(given.resample - 1)]
        begin = None
        if given.start is not None:
            begin = encode_video(vae, given.start[:, :, window.start : window.start + window.length]).to(device)
        scale = context.guidance_scale if k else 1.0
        x, prompt = denoise(
            pipe, transformer, noise, steps, prompt, conditions, texts, begin, given.strength, again, scale
        )
        if not decode and window.last:
            return x
        if k:
            return_freed_memory()  # over the first chunks of a long video the gaps grow (at 512x896 by 160 MB)
        video = decode_latents(vae, x)
        if window.low_res is not None and fidelity:
            back_project(video, window.low_res, fidelity)
        truth, shown = video, torch.zeros(1, 1, video.shape[2], *video.shape[3:], dtype=torch.bool)
        if known is not None and bool(known.shown.any()):
            truth = known.video if given.composite or source is None else decode_latents(vae, source)
            shown = known.shown
        if past is not None:
            truth, shown = truth.to(video).expand_as(video).clone(), shown.clone()
            truth[:, :, :overlap], shown[:, :, :overlap] = past, True
        if bool(shown.any()):
            close_seams(video, truth, shown)
        if context.anchor_every and first is None:
            first = video[:, :, :1].clone()
        past = video[:, :, -overlap:].clone()
        return video[:, :, overlap if k else 0 : window.valid] if decode else x

    for k, window in enumerate(_windows(num_frames, low_res_video, latents, (len(seeds), channels, *size), ratio)):
        yield chunk(k, window)
        if pipe.interrupt:
            return


def stream_without_grad(stream: Callable[P, Iterator[Tensor]]) -> Callable[P, Iterator[Tensor]]:
    """`torch.no_grad()` for a function that checks its arguments and returns a generator, and for what that makes.

    torch's own, for generator functions, holds every value until the next one is there.
    """
    advance = torch.no_grad()(next)

    def run(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        yield from map(advance, repeat(pieces))

    @wraps(stream)
    @torch.no_grad()
    def checked(*args: P.args, **kwargs: P.kwargs) -> Iterator[Tensor]:
        return run(stream(*args, **kwargs))

    return checked


@dataclass(frozen=True)
class _Window:
    start: int
    length: int  # frames of the chunk
    valid: int  # of them, those that are not padding
    last: bool
    low_res: Tensor | None = None


def _windows(
    num_frames: int | None,
    low_res_video: Tensor | Iterable[Tensor] | None,
    latents: Tensor | None,
    expected: tuple[int, int, int, int],
    ratio: int,
) -> Iterator[_Window]:
    """The chunks of a video, with their low resolution where there is one; a WaltError for start noise of another shape."""
    batch, channels, h, w = expected
    if num_frames is not None:
        starts, length = chunk_starts(num_frames, ratio), chunk_length(num_frames, ratio)
        shape = (batch, channels, latent_frames(length, ratio) * len(starts), h, w)
        if latents is not None and tuple(latents.shape) != shape:
            raise WaltError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        if low_res_video is None:
            for start in starts:
                yield _Window(start, length, length, start == starts[-1])
            return
    elif latents is not None:
        raise WaltError("latents go with a video of as many frames as chunks take: leave them out for other lengths")
    pieces = [low_res_video] if isinstance(low_res_video, Tensor) else low_res_video
    for start, frames, valid, last in windows(pieces or (), ratio):
        yield _Window(start, frames.shape[2], valid, last, frames)


def tell(conditions: Conditions, transformer: Any, latents: Tensor, mask: Tensor, conditioning: str) -> Conditions:
    """`conditions` with known `latents` (where `mask` is 1), told to the denoiser or put in place alone."""
    if conditioning == "model":
        return replace(conditions, frame_latents=latents, frame_mask=mask)
    kept = replace(conditions, kept_latents=latents, kept_mask=mask)
    # What every denoiser with frame_conditioning has learnt: one or two whole frames at the beginning.
    leading = torch.zeros_like(mask)
    leading[:, :, :OVERLAP_LATENTS] = mask[:, :, :OVERLAP_LATENTS].amin(dim=(1, 3, 4), keepdim=True).cumprod(2)
    if not transformer.config.frame_conditioning or not bool(leading.any()):
        return kept
    return replace(kept, frame_latents=latents * leading, frame_mask=leading)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_frames(num_frames: int, transformer: Any, ratio: int = TEMPORAL_RATIO) -> None:
    """Raises a WaltError when `num_frames` fits no chunks, or needs several and the denoiser takes no given frames."""
    if len(chunk_starts(num_frames, ratio)) > 1 and not transformer.config.frame_conditioning:
        raise WaltError(
            f"num_frames={num_frames} needs a transformer with frame_conditioning; this one makes up to {1 + 4 * ratio}"
        )


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises a WaltError unless both are positive multiples of `multiple`, naming the nearest that are."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int):
            raise WaltError(f"{name} must be an integer, a multiple of {multiple}, got {value!r}")
        if value < 1 or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise WaltError(f"{name}={value} does not fit: it must be a multiple of {multiple}, for instance {near}")


def check_range(name: str, value: float, low: float, high: float = float("inf"), whole: bool = False) -> None:
    """Raises a WaltError unless low <= value <= high (and value is an integer where `whole`)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
    if not number or not low <= value <= high or (whole and not isinstance(value, int)):
        kind = "an integer" if whole else "a number"
        bounds = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise WaltError(f"{name} must be {kind} {bounds}, got {value!r}")


# -- diffusers' conventions --------------------------------------------------------------------------------------------


class SamplingPipeline(HubCardMixin, DiffusionPipeline, WaltLoraLoaderMixin):
    """Base of walt's pipelines: properties, text encoding and callbacks as every diffusers pipeline has them."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    tokenizer: PreTrainedTokenizerBase | None
    text_encoder: PreTrainedModel | CompactTextEncoder | None
    vae: Any
    transformer: Any
    scheduler: Any

    def _set_up(self) -> None:
        """Values derived from components, each of which may be absent."""
        vae = adapt(getattr(self, "vae", None))
        self.vae_scale_factor_spatial = int(vae.spatial_compression_ratio) if vae is not None else 8
        self.vae_scale_factor_temporal = int(vae.temporal_compression_ratio) if vae is not None else TEMPORAL_RATIO
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial, do_resize=False)
        self._guidance_scale = 1.0
        self._guidance_rescale = 0.0
        self._guidance_options = GuidanceOptions()
        self._attention_kwargs: dict[str, Any] | None = None
        self._num_timesteps = 0
        self._current_timestep: Any = None
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Scale of the guidance of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """phi of `walt.diffusion.guide`."""
        return self._guidance_rescale

    @property
    def guidance_options(self) -> GuidanceOptions:
        """How guidance is spread over the steps and bounded; see `set_guidance`."""
        return self._guidance_options

    def set_guidance(self, options: GuidanceOptions | None = None, **fields: Any) -> None:
        """Sets where and how guidance acts, and thresholding, for all calls from here on; nothing: back to plain.

        Args:
            options, fields: a `walt.diffusion.GuidanceOptions`, or its fields:
                `pipe.set_guidance(schedule="oscillating", hold=10, threshold=3.0, percentile=0.995)`.

        Raises:
            WaltError: a field or value that does not fit.
        """
        known = GuidanceOptions.__dataclass_fields__
        for name in fields:
            if name not in known:
                raise WaltError(f'set_guidance has no "{name}"{suggest(name, known)}: there are {", ".join(known)}')
        self._guidance_options = replace(options or GuidanceOptions(), **fields)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional branch is computed too."""
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Passed on to the transformer."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the whole call, over all its chunks (and stages)."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep being computed, None outside the loop."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` ends the denoising; what there is is decoded."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = TEXT_TOKENS,
        device: torch.device | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Text states of prompts, or the given ones, repeated for every video.

        Args:
            prompt: P prompts (or one), None when `prompt_embeds` are given.
            negative_prompt: what to steer away from, one for all or one per prompt; None for the empty text.
            do_classifier_free_guidance: whether negative states are needed.
            num_videos_per_prompt: videos per prompt n.
            prompt_embeds, negative_prompt_embeds: `(P, S, D)`.
            prompt_embeds_mask, negative_prompt_embeds_mask: `(P, S)`, 1 where a state counts; None where all do.
            max_sequence_length: longer texts are cut (with a warning).
            device: of the results.

        Returns:
            prompt_embeds, negative_prompt_embeds `(P * n, S, D)`, and their masks `(P * n, S)`.
        """
        check_range("max_sequence_length", max_sequence_length, 2, whole=True)
        device = device or self._execution_device
        if prompt_embeds is None and prompt is not None:
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt_embeds, prompt_embeds_mask = self._encode_text(texts, max_sequence_length, device)
        if negative_prompt_embeds is None and do_classifier_free_guidance and prompt_embeds is not None:
            if self.text_encoder is None:
                raise WaltError(
                    "guidance_scale > 1 needs negative_prompt_embeds when the pipeline has no text encoder "
                    "(or set guidance_scale=1)"
                )
            negative = negative_prompt if negative_prompt is not None else ""
            texts = [negative] * len(prompt_embeds) if isinstance(negative, str) else list(negative)
            if len(texts) != len(prompt_embeds):
                raise WaltError(f"{len(texts)} negative prompts for {len(prompt_embeds)} prompts: give one or as many")
            negative_prompt_embeds, negative_prompt_embeds_mask = self._encode_text(texts, max_sequence_length, device)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds_mask = None
        prompt_embeds, negative_prompt_embeds, prompt_embeds_mask, negative_prompt_embeds_mask = (
            None if value is None else value.to(device).repeat_interleave(num_videos_per_prompt, dim=0)
            for value in (prompt_embeds, negative_prompt_embeds, prompt_embeds_mask, negative_prompt_embeds_mask)
        )
        return prompt_embeds, negative_prompt_embeds, prompt_embeds_mask, negative_prompt_embeds_mask

    def _encode_text(self, texts: list[str], max_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None or self.text_encoder is None:
            raise WaltError("this pipeline has no text encoder: give prompt_embeds instead of a prompt")
        return encode_text(self.tokenizer, self.text_encoder, texts, device, max_length)

    def _check_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        prompt_embeds_mask: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_prompt_embeds_mask: Tensor | None,
    ) -> int | None:
        """Number of prompts, or None when neither a prompt nor embeddings are given."""
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = value if isinstance(value, list) else [value]
            if value is not None and not (texts and all(isinstance(text, str) for text in texts)):
                raise WaltError(f"{name} must be a str or a non-empty list of str, got {value!r}")
        pairs = (
            ("prompt", prompt, prompt_embeds, prompt_embeds_mask),
            ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask),
        )
        for name, text, embeds, mask in pairs:
            if text is not None and embeds is not None:
                raise WaltError(f"give {name} or {name}_embeds, not both")
            if embeds is not None and embeds.ndim != 3:
                raise WaltError(f"{name}_embeds must be (B, S, D), got shape {tuple(embeds.shape)}")
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                raise WaltError(f"{name}_embeds_mask must be (B, S) like {name}_embeds, got shape {tuple(mask.shape)}")
        if prompt_embeds is None and prompt is None:
            return None
        count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt or ())
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != count:
            raise WaltError(f"negative_prompt_embeds are of {len(negative_prompt_embeds)} prompts, there are {count}")
        return count

    def _check_common(self, steps: int, num_videos_per_prompt: int, rescale: float, output_type: str) -> None:
        check_range("num_inference_steps", steps, 1, 1000, whole=True)
        check_range("num_videos_per_prompt", num_videos_per_prompt, 1, whole=True)
        check_range("guidance_rescale", rescale, 0, 1)
        if output_type not in OUTPUT_TYPES:
            raise WaltError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def _prepare(
        self,
        guidance_scale: float,
        guidance_rescale: float,
        attention_kwargs: dict[str, Any] | None,
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
        num_timesteps: int = 0,
    ) -> Callable[[], None]:
        """Checks the state of a call, which diffusers' pipelines keep on themselves for callbacks to see and change.

        Returns:
            What sets it, when the call begins: a stream does so at its first chunk.
        """
        check_range("guidance_scale", guidance_scale, 0)
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise WaltError(
                f"callback_on_step_end_tensor_inputs has {unknown}; allowed are {self._callback_tensor_inputs}"
            )
        refuse_cache(self.transformer, guidance_scale > 1)

        def begin() -> None:
            self._guidance_scale = guidance_scale
            self._guidance_rescale = guidance_rescale
            self._attention_kwargs = attention_kwargs
            self._interrupt = False
            self._current_timestep = None
            self._num_timesteps = num_timesteps
            self._callback = callback
            self._callback_inputs = list(callback_inputs)
            self._step_index = 0

        return begin

    def _count_steps(self, steps: int, chunks: int, strength: float = 1.0, resample: int = 1) -> int:
        """Calls of the scheduler that a video of so many chunks takes."""
        return ((len(set_timesteps(self.scheduler, steps, strength)) - 1) * resample + 1) * chunks

    def _end_step(self, t: Any, latents: Tensor, prompt: Prompt) -> tuple[Tensor, Prompt]:
        if self._callback is not None:
            values = {
                "latents": latents,
                "prompt_embeds": prompt.embeds,
                "negative_prompt_embeds": prompt.negative_embeds,
            }
            given = {name: values[name] for name in self._callback_inputs}
            before = [_version(prompt.embeds), _version(prompt.negative_embeds)]
            changed = {**values, **(self._callback(self, self._step_index, t, given) or {})}
            latents, embeds, negative = (changed[name] for name in values)
            # The same prompt where nothing changed: what has become of its text is kept by it.
            if before != [_version(embeds), _version(negative)]:
                prompt = replace(prompt, embeds=embeds, negative_embeds=negative)
        self._step_index += 1
        self._bar.update()
        return latents, prompt

    def _output(self, result: Tensor, output_type: str) -> Any:
        """Latents as they are; a video in [-1, 1] as `output_type` says."""
        if output_type == "latent":
            return result
        return self.video_processor.postprocess_video(result, output_type=output_type)

    def _outputs(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Chunks in [-1, 1] as `_output` gives them in "pt", none of which is held while the next one is made."""
        return map(partial(self._output, output_type="pt"), chunks)
