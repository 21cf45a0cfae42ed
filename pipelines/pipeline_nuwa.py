"""NuwaPipeline: eight tasks of one autoregressive model (NUWA, arXiv 2111.12417, section 3.5).

    text -> image          prompt, num_frames=1
    text -> video          prompt
    sketch -> image        sketch of one frame
    sketch -> video        sketch of several frames
    image completion       image, mask
    video prediction       video (its first frames)
    image manipulation     prompt, image, mask
    video manipulation     prompt, video, edit_from

What is given of an image or video stays as tokens where it is, and the decoder makes the rest around it. Letters: B
samples (conditions times videos per prompt), P conditions, T frames, H W pixels, h w tokens, S codes per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.conditioning import TEXT_TOKENS
from walt.data.sketches import check_classes, from_colours
from walt.errors import WaltError
from walt.models.transformer_nuwa import NuwaTransformer3DModel
from walt.pipelines.conditions import read_image, read_video
from walt.pipelines.pipeline_output import NuwaPipelineOutput
from walt.pipelines.sampling import (
    OUTPUT_TYPES,
    Generators,
    Prompt,
    SamplingPipeline,
    StepCallback,
    check_range,
    check_size,
    sample_seeds,
)
from walt.tokenizers.text import CompactTextEncoder
from walt.tokenizers.vq_model_walt import WaltVQModel

# (prompts, candidates (N, 3, T, H, W) in [-1, 1]) -> scores (N,), the higher the better
Ranker = Callable[[list[str], Tensor], Tensor]


@dataclass(frozen=True)
class Given:
    """What is given of the result: tokens `(P, T, h, w[, S])`, and which of them count, bool `(P, T, h, w)`."""

    tokens: Tensor
    mask: Tensor


class NuwaPipeline(SamplingPipeline):
    """Text, sketches and parts of images or videos become images and videos, token by token.

    Args:
        vq: the tokenizer of frames.
        vq_seg: the tokenizer of sketches (segmentation maps); None for a model without sketch tasks.
        transformer: the encoder-decoder.
        text_encoder, tokenizer: any transformers encoder with `last_hidden_state`, and its tokenizer; None to work
            from `prompt_embeds`.
        classes: names of a sketch's classes by number, the background first.
        num_frames: frames of a video unless a call says otherwise.
        frame_rate: frames per second that the model was trained on.
        default_guidance_scale, default_top_p: of sampling, unless a call says otherwise.
        default_image_guidance_scale: that of images, where they want another than videos; None: the same.
        default_context_guidance_scale: how hard new frames follow given ones in prediction, where nothing else says what to
            make.
        default_sketch_top_p: that of sketch tasks; None: the same. A sketch says where everything is, so that little is open
            but a ground whose colour must be one throughout.
        default_prediction_top_p: that of prediction; None: the same.
    """

    model_cpu_offload_seq = "text_encoder->vq_seg->transformer->vq"
    _optional_components = ["vq_seg", "text_encoder", "tokenizer"]
    _callback_tensor_inputs: list[str] = []
    vq: Any
    vq_seg: Any

    def __init__(
        self,
        vq: WaltVQModel,
        vq_seg: WaltVQModel | None,
        transformer: NuwaTransformer3DModel,
        text_encoder: PreTrainedModel | CompactTextEncoder | None,
        tokenizer: PreTrainedTokenizerBase | None,
        classes: list[str] | tuple[str, ...] = (),
        num_frames: int = 5,
        frame_rate: float = 2.0,
        default_guidance_scale: float = 2.0,
        default_top_p: float = 1.0,
        default_image_guidance_scale: float | None = None,
        default_sketch_top_p: float | None = None,
        default_context_guidance_scale: float = 1.0,
        default_prediction_top_p: float | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vq=vq, vq_seg=vq_seg, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            classes=list(classes),
            num_frames=num_frames,
            frame_rate=frame_rate,
            default_guidance_scale=default_guidance_scale,
            default_top_p=default_top_p,
            default_image_guidance_scale=default_image_guidance_scale,
            default_sketch_top_p=default_sketch_top_p,
            default_context_guidance_scale=default_context_guidance_scale,
            default_prediction_top_p=default_prediction_top_p,
        )
        self.vae_scale_factor_spatial = int(vq.spatial_compression_ratio) if vq is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial, do_resize=False)
        self._guidance_scale = 1.0
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: Any = None

    def default_guidance(self, still: bool) -> float:
        """The guidance scale of an image or a video when a call names none."""
        own = self.config.default_image_guidance_scale if still else None
        return float(self.config.default_guidance_scale if own is None else own)

    def default_nucleus(self, sketch: bool = False, prediction: bool = False) -> float:
        """The top-p of a call that names none: with a sketch, of a prediction, or of another task."""
        own = self.config.default_sketch_top_p if sketch else None
        own = self.config.default_prediction_top_p if prediction else own
        return float(self.config.default_top_p if own is None else own)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        sketch: Any = None,
        image: Any = None,
        video: Any = None,
        mask: Any = None,
        edit_from: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        context_guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_videos_per_prompt: int = 1,
        num_candidates: int = 1,
        ranker: Ranker | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = [],  # noqa: B006 - diffusers' signature; never changed
        max_sequence_length: int = TEXT_TOKENS,
    ) -> NuwaPipelineOutput | Any:
        """Makes images or videos; the module's table says which arguments make which task.

        Args:
            prompt: what to show, one or several. Not with a sketch.
            negative_prompt: what guidance steers away from, one or one per prompt; the constant condition "None" by
                default. Only with a prompt.
            sketch: classes, integers `(H, W)`, `(T, H, W)` or `(P, T, H, W)` (tensor or array), or a PIL image or a
                list of them (one video) in the colours of `walt.data.sketches`.
            image: a PIL image, an array `(H, W, 3)` or a tensor `(3, H, W)` or `(P, 3, H, W)` in [0, 1].
            video: as diffusers' VideoProcessor takes it: a list of PIL images, an array `(T, H, W, 3)` or a tensor
                `(T, 3, H, W)` or `(P, T, 3, H, W)` in [0, 1]; frames beyond its own, up to `num_frames`, are made.
            mask: what to make anew is white, or above 0.5: a PIL image, `(H, W)` for every frame, or `(T, H, W)`. A
                token is made anew when any of its pixels is.
            edit_from: the first frame of `video` to make anew, 1 to T - 1.
            height, width: pixels, multiples of the tokenizer's ratio; the transformer's `sample_size` by default, or
                those of what is given.
            num_frames: frames of the result, 1 for an image; `config.num_frames` by default.
            guidance_scale: 1 for no guidance; by default `config.default_guidance_scale`, of images
                `config.default_image_guidance_scale`.
            context_guidance_scale: of videos: how hard every frame follows those before it, as a guidance away from taking
                it for a still; 1 for no more than the model says. By default `config.default_context_guidance_scale` of a
                prediction (a video is given, and no prompt or sketch), else 1.
            temperature: of sampling, above 0; 0 takes the likeliest token.
            top_k, top_p: sampling among the k likeliest tokens, or the likeliest ones that sum to p;
                `config.default_top_p` by default, with a sketch `config.default_sketch_top_p`, of a prediction
                `config.default_prediction_top_p`.
            num_videos_per_prompt: results per condition.
            num_candidates: samples per result, of which the best by `ranker` is returned; the first candidate is what
                `num_candidates=1` gives.
            ranker: maps prompts and candidates `(N, 3, T, H, W)` in [-1, 1] to scores `(N,)`. Default: how much
                likelier the transformer finds the made tokens under the condition than under "None" (or under the negative
                prompt). One of both needs a prompt or a sketch.
            generator: one, or one per result. A result depends on its own generator only.
            prompt_embeds, negative_prompt_embeds: text states `(P, S, D)` in place of prompts.
            prompt_embeds_mask, negative_prompt_embeds_mask: `(P, S)`, 1 where a state counts.
            output_type: "pil", "np", "pt", or "latent" for the tokens `(B, T, h, w[, S])`.
            return_dict: whether to return a NuwaPipelineOutput or a tuple.
            callback_on_step_end: called as (pipe, step, positions made, {}) after every wave of tokens, of
                `pipe.num_timesteps` positions in all. One that sets `pipe._interrupt` ends the decoding: what has been
                made is returned, of several candidates the first, and positions that have not are code 0.
            callback_on_step_end_tensor_inputs: []: tokens are made where they lie, and not handed out.
            max_sequence_length: longer prompts are cut, with a warning.

        Returns:
            NuwaPipelineOutput, or `(frames,)`.

        Raises:
            WaltError: an argument that does not fit.
        """
        predicts = video is not None and prompt is None and prompt_embeds is None and sketch is None
        top_p = self.default_nucleus(sketch is not None, predicts) if top_p is None else top_p
        if context_guidance_scale is None:
            context_guidance_scale = float(self.config.default_context_guidance_scale) if predicts else 1.0
        check_range("context_guidance_scale", context_guidance_scale, 0)
        self._check(temperature, top_k, top_p, num_videos_per_prompt, num_candidates, output_type)
        prompts = self._check_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        maps = None if sketch is None else self.read_sketch(sketch)
        given = self.prepare_given(image, video, mask, edit_from)
        self._check_task(prompt, prompts, maps, given)
        if prompts is None and (negative_prompt is not None or negative_prompt_embeds is not None):
            raise WaltError("negative_prompt goes with a prompt, and there is none: leave it out")
        if num_candidates > 1 and prompts is None and maps is None:
            raise WaltError(
                f"num_candidates={num_candidates}: candidates are scored by how well they fit a prompt or a sketch; give one"
            )
        shape = self._shape(height, width, num_frames, maps, given, image is not None)
        if guidance_scale is None:
            guidance_scale = self.default_guidance(still=shape[0] == 1)
        count = self._count(prompts, maps, given)
        texts = self._texts(prompt, count) if ranker is not None and num_candidates > 1 else []
        self._prepare(guidance_scale, 0.0, None, callback_on_step_end, callback_on_step_end_tensor_inputs)()
        if prompts is None and maps is None:
            self._guidance_scale = 1.0  # nothing to steer towards
        device = self._execution_device
        seeds = sample_seeds(generator, count * num_videos_per_prompt)
        condition, null = self._conditions(
            self.encode_prompt(
                prompt,
                negative_prompt,
                negative_prompt is not None or negative_prompt_embeds is not None,
                1,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_embeds_mask,
                negative_prompt_embeds_mask,
                max_sequence_length,
                device,
            ),
            maps,
            count,
        )
        each = num_videos_per_prompt * num_candidates
        known, known_mask = self._known(given, shape, count, each, device)
        tokens = self._generate(
            shape,
            condition,
            null,
            known=known,
            known_mask=known_mask,
            generator=[_candidate(seed, number) for seed in seeds for number in range(num_candidates)],
            samples_per_condition=each,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            context_guidance_scale=context_guidance_scale,
        )
        frames = None if output_type == "latent" and (num_candidates == 1 or ranker is None) else self.decode(tokens)
        scores = None
        if num_candidates > 1 and self.interrupt:
            tokens = tokens[::num_candidates]
            frames = None if frames is None else frames[::num_candidates]
        elif num_candidates > 1:
            if ranker is not None:
                assert frames is not None
                scores = ranker([text for text in texts for _ in range(each)], frames)
                if tuple(scores.shape) != (len(tokens),):
                    raise WaltError(f"ranker: expected {len(tokens)} scores, got the shape {tuple(scores.shape)}")
            else:
                scores = self.score(tokens, condition, null, known_mask, each)
            scores = scores.float().cpu()
            best = scores.view(-1, num_candidates).argmax(dim=1) + torch.arange(len(seeds)) * num_candidates
            scores, tokens = scores[best], tokens[best.to(tokens.device)]
            frames = None if frames is None else frames[best.to(frames.device)]
        result = self._output(tokens if frames is None or output_type == "latent" else frames, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (result,)
        images = [one[0] for one in result] if shape[0] == 1 and output_type == "pil" else None
        if shape[0] == 1 and output_type != "pil":
            images = result[:, 0]
        return NuwaPipelineOutput(frames=result, images=images, scores=scores)

    # -- the parts of a call

    def read_sketch(self, sketch: Any) -> Tensor:
        """A sketch as `__call__` takes it, as classes long `(P, T, H, W)`; WaltError for unknown classes or shapes."""
        names = list(self.config.classes)
        if self.vq_seg is None or not names:
            raise WaltError("sketch: this pipeline has no vq_seg (or no classes): it takes no sketches")
        if isinstance(sketch, Image.Image):
            sketch = [sketch]
        if isinstance(sketch, list | tuple) and sketch and all(isinstance(one, Image.Image) for one in sketch):
            sketch = [from_colours(np.asarray(one.convert("RGB")), names) for one in sketch]
        try:
            array = sketch.cpu().numpy() if isinstance(sketch, Tensor) else np.asarray(sketch)
        except (ValueError, TypeError) as error:
            raise WaltError(f"sketch: its frames must have one size ({error})") from None
        check_classes(array, names)
        if array.ndim > 4:
            raise WaltError(f"sketch: must be (H, W), (T, H, W) or (P, T, H, W), got {array.shape}")
        maps = torch.from_numpy(array.astype(np.int64))
        while maps.ndim < 4:
            maps = maps[None]
        check_size(maps.shape[2], maps.shape[3], int(self.vq_seg.spatial_compression_ratio))
        return maps

    def prepare_given(self, image: Any, video: Any, mask: Any, edit_from: int | None) -> Given | None:
        """The tokens of what is given of an image or video, None when nothing is; WaltError for what does not fit."""
        if image is not None and video is not None:
            raise WaltError("give an image or a video, not both")
        if image is None and video is None:
            for name, value in (("mask", mask), ("edit_from", edit_from)):
                if value is not None:
                    raise WaltError(f"{name} needs an image or a video that it speaks of")
            return None
        if image is not None and mask is None:
            raise WaltError("mask: say which part of the image to make anew (white, or above 0.5)")
        if image is not None and edit_from is not None:
            raise WaltError("edit_from is a frame of a video; an image has a mask")
        pixels = read_video(video) if image is None else read_image(image)
        frames, height, width = pixels.shape[2:]
        check_size(height, width, self.vae_scale_factor_spatial)
        tokens = self._encode(pixels)
        keep = torch.ones(tokens.shape[:4], dtype=torch.bool, device=tokens.device)
        if mask is not None:
            anew = _read_mask(mask, frames, height, width).to(tokens.device)
            ratio = self.vae_scale_factor_spatial
            keep &= torch.nn.functional.max_pool2d(anew.float()[None], ratio)[0] <= 0.5
        if edit_from is not None:
            if isinstance(edit_from, bool) or not isinstance(edit_from, int) or not 1 <= edit_from < frames:
                raise WaltError(
                    f"edit_from must be a frame from 1 to {frames - 1} of the {frames} given, got {edit_from!r}"
                    if frames > 1
                    else "edit_from needs a video of at least two frames"
                )
            keep[:, edit_from:] = False
        return Given(tokens, keep)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, T, h, w[, S])` to frames `(B, 3, T, H, W)` in [-1, 1], clamped; one sample at a time."""
        videos = [_onload(self.vq).decode_indices(one).float().clamp(-1, 1).transpose(0, 1) for one in tokens]
        return torch.stack(videos)

    def score(
        self, tokens: Tensor, told: Told, null: Told, known_mask: Tensor | None = None, samples_per_condition: int = 1
    ) -> Tensor:
        """log p(made tokens | condition) - log p(made tokens | null) per made token, `(B,)`: how well they fit.

        Given tokens do not count. Two parallel passes per condition, no sampling.

        Args:
            tokens: `(B, T, h, w[, S])`, `samples_per_condition` after each other of each condition.
            told, null: what the B / samples_per_condition conditions are.
            known_mask: `(B, T, h, w)`, True where a token was given.
        """
        made = torch.ones(tokens.shape[:4], device=tokens.device) if known_mask is None else (~known_mask).float()
        scores = []
        for number, part in enumerate(tokens.split(samples_per_condition)):
            weight = made[number * samples_per_condition :][: len(part)].flatten(1)
            with_it, without = (
                log_likelihood(self.transformer(part, one.only(number, len(part)).encode(self.transformer)), part)
                for one in (told, null)
            )
            scores.append(((with_it - without).flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1))
        return torch.cat(scores)

    def _generate(self, shape: tuple[int, int, int], told: Told, null: Told, **settings: Any) -> Tensor:
        """Tokens `(B, T, h, w[, S])`, with a progress bar and the callback."""
        guided = self.guidance_scale != 1
        self._num_timesteps = shape[0] * shape[1] * shape[2]
        with self.progress_bar(total=self._num_timesteps) as bar:

            def step(done: int, total: int) -> bool:
                bar.update(done - bar.n)
                if self._callback is not None:
                    self._callback(self, self._step_index, done, {})
                self._step_index += 1
                return self.interrupt

            tokens: Tensor = _onload(self.transformer).generate(
                shape,
                told.encode(self.transformer),
                null_condition=null.encode(self.transformer) if guided else None,
                guidance_scale=self.guidance_scale,
                callback=step,
                **settings,
            )
        return tokens

    def _check(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float,
        num_videos_per_prompt: int,
        num_candidates: int,
        output_type: str,
    ) -> None:
        check_range("temperature", temperature, 0)
        if top_k is not None:
            check_range("top_k", top_k, 1, whole=True)
        check_range("top_p", top_p, 1e-6, 1)
        check_range("num_videos_per_prompt", num_videos_per_prompt, 1, whole=True)
        check_range("num_candidates", num_candidates, 1, whole=True)
        if output_type not in OUTPUT_TYPES:
            raise WaltError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def _check_task(
        self, prompt: str | list[str] | None, prompts: int | None, maps: Tensor | None, given: Given | None
    ) -> None:
        """A WaltError unless something says what to make."""
        if maps is not None and prompts is not None:
            raise WaltError("give a prompt or a sketch, not both: the model is told one of them")
        texts = [prompt] if isinstance(prompt, str) else prompt or []
        if any(not text.strip() for text in texts):
            raise WaltError("prompt is empty: say what to show")
        if prompts is None and maps is None and given is None:
            raise WaltError("give a prompt, a sketch, an image with a mask or the first frames of a video")

    def _shape(
        self,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        maps: Tensor | None,
        given: Given | None,
        still: bool,
    ) -> tuple[int, int, int]:
        """(T, h, w) of the tokens to make; a WaltError when the arguments contradict each other or the model."""
        ratio, most = self.vae_scale_factor_spatial, self.transformer.config.sample_size
        frames: int | None = None
        sides: list[int] = [most[1] * ratio, most[2] * ratio]
        what = ""
        if maps is not None:
            frames, sides, what = maps.shape[1], list(maps.shape[2:]), "the sketch"
        if given is not None:
            if maps is not None and sides != [side * ratio for side in given.mask.shape[2:]]:
                raise WaltError(
                    f"the sketch is {sides[0]}x{sides[1]}, but what is given is "
                    f"{given.mask.shape[2] * ratio}x{given.mask.shape[3] * ratio}"
                )
            sides, what = [side * ratio for side in given.mask.shape[2:]], "what is given"
            if still:
                frames = 1
        for name, asked, there in (("height", height, sides[0]), ("width", width, sides[1])):
            if asked is not None and what and asked != there:
                raise WaltError(f"{name}={asked} does not fit {what}, which is {sides[0]}x{sides[1]}")
        height, width = height or sides[0], width or sides[1]
        check_size(height, width, ratio)
        if frames is not None and num_frames not in (None, frames):
            raise WaltError(f"num_frames={num_frames} does not fit {what or 'the image'} of {frames} frame(s)")
        frames = frames or (self.config.num_frames if num_frames is None else num_frames)
        check_range("num_frames", frames, 1, whole=True)
        shape = (frames, height // ratio, width // ratio)
        if any(one > top for one, top in zip(shape, most, strict=True)):
            raise WaltError(
                f"{frames} frames of {height}x{width} are more than this model makes: {most[0]} of "
                f"{most[1] * ratio}x{most[2] * ratio}"
            )
        if given is not None:
            there = given.mask.shape[1]
            if there > frames:
                raise WaltError(f"num_frames={frames} is less than the {there} frames given")
            if there == frames and bool(given.mask.all()):
                raise WaltError(
                    f"nothing is left to make: all {there} frame(s) are given; ask for more num_frames, or say what to "
                    "make anew by mask or edit_from"
                )
        return shape

    def _count(self, prompts: int | None, maps: Tensor | None, given: Given | None) -> int:
        """The number of conditions P."""
        numbers = {
            "prompts": prompts,
            "sketches": None if maps is None else len(maps),
            "images or videos": None if given is None else len(given.tokens),
        }
        several = {name: number for name, number in numbers.items() if number is not None and number > 1}
        if len(set(several.values())) > 1:
            raise WaltError(" and ".join(f"{n} {name}" for name, n in several.items()) + ": give one or as many")
        return max(several.values(), default=1)

    def _conditions(
        self,
        embeds: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        maps: Tensor | None,
        count: int,
    ) -> tuple[Told, Told]:
        """What the P conditions are, and what guidance steers away from."""
        prompt = Prompt(embeds[0], embeds[2], embeds[1], embeds[3])
        none: list[Tensor | None] = [None]
        null = Told(text=_spread(prompt.rows(negative=True) or none, count))
        if maps is not None:
            sketch = self._encode_sketch(maps)
            return Told(sketch=sketch.expand(count, *sketch.shape[1:])), null
        return Told(text=_spread(prompt.rows(negative=False) or none, count)), null

    def _encode(self, pixels: Tensor) -> Tensor:
        """`(P, 3, T, H, W)` in [-1, 1] to tokens `(P, T, h, w[, S])`; one by one, so that no rounding depends on P."""
        frames = pixels.transpose(1, 2).to(self._execution_device, self.vq.dtype)
        return torch.stack([_onload(self.vq).encode_indices(video) for video in frames])

    def _encode_sketch(self, maps: Tensor) -> Tensor:
        return torch.stack([_onload(self.vq_seg).encode_indices(one.to(self._execution_device)) for one in maps])

    def _known(
        self, given: Given | None, shape: tuple[int, int, int], count: int, each: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is given of all samples: tokens `(B, T, h, w[, S])` and bool `(B, T, h, w)`, frames to make added."""
        if given is None:
            return None, None
        more = shape[0] - given.tokens.shape[1]
        tokens = torch.cat([given.tokens, given.tokens[:, :1].expand(-1, more, *given.tokens.shape[2:])], dim=1)
        mask = torch.cat([given.mask, given.mask.new_zeros(len(given.mask), more, *shape[1:])], dim=1)
        tokens, mask = (
            value.expand(count, *value.shape[1:]).repeat_interleave(each, dim=0) for value in (tokens, mask)
        )
        return tokens.to(device), mask.to(device)

    def _texts(self, prompt: str | list[str] | None, count: int) -> list[str]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if texts is None:
            raise WaltError("ranker: it scores prompts, and there are none")
        return _spread(texts, count)


@dataclass(frozen=True)
class Told:
    """P conditions before they are encoded: text states `(S_i, D)` or None ("None") each, or sketch tokens
    `(P, T, h, w)`."""

    text: list[Tensor | None] | None = None
    sketch: Tensor | None = None

    def encode(self, transformer: NuwaTransformer3DModel) -> Any:
        """The transformer's Condition."""
        text = None
        if self.text is not None:
            text = [None if states is None else states.to(transformer.dtype) for states in self.text]
        return _onload(transformer).encode_condition(text=text, sketch=self.sketch)

    def only(self, number: int, times: int) -> Told:
        """One of the conditions, `times` times."""
        text = None if self.text is None else [self.text[number]] * times
        sketch = None if self.sketch is None else self.sketch[number : number + 1].expand(times, *self.sketch.shape[1:])
        return Told(text, sketch)


def log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token, `(B, T, h, w)` (summed over sub-codes), from logits `(B, T, h, w[, S], V)`."""
    values = logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
    return values if values.ndim == 4 else values.sum(dim=-1)


def _onload(part: Any) -> Any:
    """The part where it computes: offloading brings it there for `forward`, these are other methods."""
    hook = getattr(part, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(part)
    return part


def _spread(rows: list[Any], count: int) -> list[Any]:
    return rows * count if len(rows) == 1 else rows


def _candidate(seed: int, number: int) -> torch.Generator:
    """The generator of a candidate: the first has its result's own seed, so more candidates do not change it."""
    if number:
        seed = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) & (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def _read_mask(mask: Any, frames: int, height: int, width: int) -> Tensor:
    """`(T, H, W)`, True where to make anew."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, Tensor):  # numpy has no bfloat16
        mask = (mask.float() if mask.is_floating_point() else mask).cpu().numpy()
    array = np.asarray(mask)
    if array.dtype == np.uint8:
        array = array / 255.0
    if array.dtype == object or array.ndim not in (2, 3) or array.shape[-2:] != (height, width):
        raise WaltError(f"mask: must be (H, W) or (T, H, W) with {height}x{width} pixels, got {array.shape}")
    anew = torch.from_numpy(np.asarray(array, np.float32)) > 0.5
    if anew.ndim == 3 and len(anew) != frames:
        raise WaltError(f"mask: has {len(anew)} frames, but {frames} are given")
    if not bool(anew.any()):
        raise WaltError("mask: nothing in it is white (above 0.5), so nothing would be made anew")
    return anew.expand(frames, height, width)
