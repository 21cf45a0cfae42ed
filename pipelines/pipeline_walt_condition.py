"""WaltConditionPipeline: every task that a base denoiser does with given frames, clips and regions.

Animating a picture, keyframes, continuing, rewinding, looping, joining, filling, outpainting and editing are one call
with other arguments (W.A.L.T. section 3.4; SDEdit, arXiv 2108.01073); the methods with a verb's name are short forms of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from walt.chunking import chunk_starts, fitting_frames, overlap_frames
from walt.conditioning import TEXT_TOKENS
from walt.errors import WaltError
from walt.pipelines.conditions import Known, WaltCondition, as_floats, fit, place, read_image, read_video
from walt.pipelines.pipeline_output import WaltPipelineOutput
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.sampling import (
    Generators,
    Given,
    StepCallback,
    check_range,
    sample_seeds,
)


class WaltConditionPipeline(WaltPipeline):
    """Videos from given frames, clips and regions, by the same components as WaltPipeline.

    Any base with `frame_conditioning` starts and continues videos. Conditions elsewhere (last frames, keyframes, regions)
    are better followed by a base that was trained on such masks (`diffusion.mask_probability` and `mask_kinds` of a
    recipe); `conditioning="repaint"` does without.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        last_image: Any = None,
        conditions: WaltCondition | Sequence[WaltCondition] | None = None,
        video: Any = None,
        mask_video: Any = None,
        strength: float | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        guidance_rescale: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        conditioning: Literal["model", "repaint"] = "model",
        resample_steps: int = 1,
        composite: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature; never changed
        max_sequence_length: int = TEXT_TOKENS,
        context_guidance_scale: float = 1.0,
        context_noise_level: int = 0,
        anchor_every: int = 0,
    ) -> WaltPipelineOutput | Any:
        """Generates videos that keep what is given.

        Args:
            prompt: what to show, one or several.
            image, last_image: the first and the last frame: a PIL image, an array `(H, W, 3)`, a tensor `(3, H, W)`, or a
                list with one per prompt. Without conditions between them a video of up to 17 frames is made; `interpolate`
                makes longer ones.
            conditions: pictures and clips at places of their own.
            video: as WaltSuperResolutionPipeline takes it. Alone: the first frames (5 or 9, say: frame prediction). With
                `mask_video`: the rest of it stays. With `strength`: the video is changed (SDEdit), to the prompt.
            mask_video: white (1) where `video` is made anew: a picture for all frames, or a video of as many frames; as
                arrays or tensors also without the colour axis, `(T, H, W)`.
            strength: the share of the steps that an edit runs, above 0 to 1: more changes more. With `mask_video`
                inside the mask alone.
            height, width: pixels. By default the shape of what is given, at about the area of the transformer's
                `sample_size`; what is given is scaled to cover it and cut.
            num_frames: as for WaltPipeline; by default 17, and the length of a video that is filled or edited.
            conditioning: "model" tells the denoiser what is given; "repaint" only puts it in place at every step, for
                a denoiser that was not trained on such masks.
            resample_steps: with "repaint": how often every step runs (10 or so make regions agree better; DDIM only).
            composite: whether given pixels are shown as they were given (so that nothing outside a mask changes), or
                as the tokenizer shows them. By default true with `mask_video`, else false.
            negative_prompt, and all the rest: as for WaltPipeline.

        Returns:
            WaltPipelineOutput, or `(frames,)`.

        Raises:
            WaltError: an argument that does not fit.
        """
        given_conditions = self._conditions(image, last_image, conditions, video, mask_video, strength, num_frames)
        keeps = video is not None and (strength is None or mask_video is not None)
        self._check_task(bool(given_conditions) or keeps, conditioning)
        clip = None if video is None else read_video(video)
        whole = clip if mask_video is not None or strength is not None else None
        if whole is not None:
            if num_frames is not None and num_frames != whole.shape[2]:
                raise WaltError(
                    f"num_frames={num_frames}, but the video has {whole.shape[2]} frames: leave num_frames out to fill or "
                    "edit it, or use extend"
                )
            num_frames = whole.shape[2]
        elif clip is not None:
            given_conditions = [WaltCondition(video=video), *given_conditions]
        num_frames = 17 if num_frames is None else num_frames
        ratio = self.vae_scale_factor_temporal
        frames = num_frames if whole is None else fitting_frames(num_frames, ratio)
        chunk_starts(frames, ratio)
        clips = [self._clip(condition) for condition in given_conditions]
        sizes = {tuple(x.shape[-2:]) for x in (*clips, whole) if x is not None}
        if len(sizes) > 1:
            listed = " and ".join(f"{h}x{w}" for h, w in sorted(sizes))
            raise WaltError(f"what is given has the sizes {listed}: scale it to one size")
        size = self._size(height, width, next(iter(sizes), None))
        check_range("resample_steps", resample_steps, 1, whole=True)
        if resample_steps > 1 and (conditioning != "repaint" or not isinstance(self.scheduler, DDIMScheduler)):
            raise WaltError('resample_steps above 1 needs conditioning="repaint" and a DDIMScheduler')
        if strength is not None:
            check_range("strength", strength, 0, 1)

        known = Known.nothing(1, frames, *size)
        for condition, pixels in zip(given_conditions, clips, strict=True):
            still, index = condition.video is None, condition.frame_index
            if isinstance(index, int) and -num_frames <= index < 0:
                index += num_frames  # what is edited may be padded at its end
            known = place(known, fit(pixels, *size), index, still, ratio)
        start: Tensor | None = None
        if whole is not None:
            fitted = _hold(fit(whole, *size), frames)
            start = fitted if strength is not None else None
            if mask_video is not None:
                # Where a scaled mask is partly white, it is white.
                new = _hold(fit(self._mask(mask_video, whole).float(), *size) > 1e-3, frames)
                known = Known(fitted, ~new, ~new)
        if composite is None:
            composite = mask_video is not None
        count = _count(prompt, prompt_embeds, class_labels)
        told = Given(
            known=Known(*(_repeat(x, count, num_videos_per_prompt) for x in (known.video, known.mask, known.shown)))
            if bool(known.mask.any())
            else None,
            start=None if start is None else _repeat(start, count, num_videos_per_prompt),
            strength=1.0 if strength is None else float(strength),
            conditioning=conditioning,
            resample=resample_steps,
            composite=composite,
        )
        begun = self._start(
            prompt,
            negative_prompt,
            *size,
            frames,
            num_inference_steps,
            guidance_scale,
            guidance_rescale,
            num_videos_per_prompt,
            generator,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            class_labels,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
            context_guidance_scale,
            context_noise_level,
            anchor_every,
            told,
        )
        return self._finish(begun, output_type, return_dict, latents, num_frames)

    # -- tasks by name -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def extend(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        num_frames: int = 12,
        direction: Literal["forward", "backward"] = "forward",
        reverse: bool = True,
        **call: Any,
    ) -> WaltPipelineOutput | Any:
        """A video and what comes after it, or before.

        Args:
            video: of any length; its last 5 frames (or its last one, if it has fewer) are what the denoiser sees.
            num_frames: new frames, any number.
            direction: "backward" makes what comes before.
            reverse: backward only: whether the video is continued played backwards, which any model can that continues
                (the prompt then tells what is seen backwards); false asks the model for what comes before these
                frames, for which it must be trained on last frames.
            call: as of a call.

        Returns:
            The whole video, `len(video) + num_frames` frames; of `video` the frames that the denoiser saw are shown as
            `composite` says.
        """
        if direction not in ("forward", "backward"):
            raise WaltError(f'direction must be "forward" or "backward", got {direction!r}')
        check_range("num_frames", num_frames, 1, whole=True)
        old, kind = self._whole(video, call), _Kind.of(call)
        ratio = self.vae_scale_factor_temporal
        if direction == "backward" and not reverse:
            return self._give(self._backward(old, prompt, num_frames, call), kind)
        if direction == "backward":
            old = old.flip(2)
        context = overlap_frames(ratio) if old.shape[2] >= overlap_frames(ratio) else 1
        frames = fitting_frames(context + num_frames, ratio)
        made = self._pixels(prompt, [WaltCondition(video=_pt(old[:, :, -context:]))], frames, call)
        made = made[:, :, : context + num_frames]
        result = torch.cat([_like(old, made)[:, :, :-context], made], dim=2)
        return self._give(result.flip(2) if direction == "backward" else result, kind)

    @torch.no_grad()
    def connect(
        self,
        video: Any,
        next_video: Any,
        prompt: str | list[str] | None = None,
        num_frames: int = 8,
        **call: Any,
    ) -> WaltPipelineOutput | Any:
        """Two videos of one size with new frames between them.

        Args:
            num_frames: new frames, a multiple of 4.
            call: as of a call.

        Returns:
            `video`, the new frames and `next_video`; without it, to where it had come, if a callback interrupts it.
        """
        kind = _Kind.of(call)
        sizes = [tuple(read_video(x, name).shape[-2:]) for x, name in ((video, "video"), (next_video, "next_video"))]
        if sizes[0] != sizes[1] and not (call.get("height") and call.get("width")):
            (h, w), (h2, w2) = sizes
            raise WaltError(f"video is {h}x{w} and next_video {h2}x{w2}: give both in one size, or height and width")
        before, after = self._whole(video, call), self._whole(next_video, call, "next_video")
        made, tail, head = self._between(before, after, prompt, num_frames, call)
        whole = made.shape[2] == tail + num_frames + head
        parts = [_like(before, made)[:, :, :-tail], made] + [_like(after, made)[:, :, head:]] * whole
        return self._give(torch.cat(parts, dim=2), kind)

    @torch.no_grad()
    def loop(
        self, video: Any, prompt: str | list[str] | None = None, num_frames: int = 8, **call: Any
    ) -> WaltPipelineOutput | Any:
        """A video and new frames that lead from its end back to its beginning: it plays round without a seam.

        Args:
            video: at least 9 frames.
            num_frames: new frames, a multiple of 4.
            call: as of a call.

        Returns:
            `len(video) + num_frames` frames, the last of which is followed by the first; fewer if a callback interrupts it.
        """
        old, kind = self._whole(video, call), _Kind.of(call)
        least = 1 + 2 * self.vae_scale_factor_temporal
        if old.shape[2] < least:
            raise WaltError(f"a loop needs a video of at least {least} frames, got {old.shape[2]}: extend it first")
        made, tail, head = self._between(old, old, prompt, num_frames, call, most=old.shape[2])
        if made.shape[2] < tail + num_frames + head:  # interrupted: nothing came back to the beginning
            parts = [_like(old, made)[:, :, :-tail], made]
        else:
            parts = [made[:, :, -head:], _like(old, made)[:, :, head:-tail], made[:, :, :-head]]
        return self._give(torch.cat(parts, dim=2), kind)

    @torch.no_grad()
    def interpolate(
        self, keyframes: Mapping[int, Any] | Sequence[Any], prompt: str | list[str] | None = None, **call: Any
    ) -> WaltPipelineOutput | Any:
        """A video through pictures at given frames, of any length: distant ones are filled recursively.

        Between two pictures further apart than 13 frames a few frames in even steps are made first, which are then
        pictures themselves (Video LDM, arXiv 2304.08818). (13 where latents hold four frames: three latents and one frame.)

        Args:
            keyframes: pictures by frame, such as `{0: a, 40: b}`; a sequence puts them 13 frames apart.
            call: as of a call.

        Returns:
            The video from the first to the last keyframe; to where it had come, if a callback interrupts it.
        """
        if not isinstance(keyframes, Mapping):
            keyframes = {self._segments()[-1] * i: image for i, image in enumerate(keyframes)}
        places = sorted(keyframes)
        if len(places) < 2 or any(isinstance(p, bool) or not isinstance(p, int) for p in places):
            raise WaltError(f"keyframes must be two pictures or more by their frame, got {places}")
        if "num_frames" in call:
            raise WaltError("interpolate takes no num_frames: the last keyframe's place is the length")
        kind = _Kind.of(call)
        pictures = [self._clip(WaltCondition(image=keyframes[p])) for p in places]
        sizes = {tuple(x.shape[-2:]) for x in pictures}
        if len(sizes) > 1:
            raise WaltError(f"the keyframes have the sizes {sorted(sizes)}: scale them to one size")
        size = self._size(call.pop("height", None), call.pop("width", None), next(iter(sizes)))
        count, each = _count(prompt, call.get("prompt_embeds"), call.get("class_labels")), 1
        if "num_videos_per_prompt" in call:
            each = call["num_videos_per_prompt"]
            check_range("num_videos_per_prompt", each, 1, whole=True)
        pictures = [_repeat(fit(x, *size), count, each) for x in pictures]
        rows = count * each
        call["generator"] = [torch.Generator().manual_seed(s) for s in sample_seeds(call.pop("generator", None), rows)]
        parts = pictures[:1]
        self._interrupt = False  # of an earlier call: here each segment is one, and an interrupt ends them all
        for i in range(1, len(places)):
            parts.append(self._segment(pictures[i - 1], pictures[i], places[i] - places[i - 1], prompt, call))
            if self.interrupt:
                break
            parts.append(pictures[i])
        return self._give(torch.cat(parts, dim=2), kind)

    @torch.no_grad()
    def outpaint(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        **call: Any,
    ) -> WaltPipelineOutput | Any:
        """A video (or a picture) made larger: so many pixels are added on each side, what was there stays.

        Args:
            left, right, top, bottom: pixels of `video`; the new height and width are multiples of 8 x patch.
            call: as of a call.
        """
        for name, value in (("left", left), ("right", right), ("top", top), ("bottom", bottom)):
            check_range(name, value, 0, whole=True)
        if not left + right + top + bottom:
            raise WaltError("outpaint needs pixels to add: give left, right, top or bottom")
        for name in ("height", "width"):
            if name in call:
                raise WaltError(f"outpaint takes no {name}: the video's own and the added pixels make it")
        old = read_video(video)
        border = (left, right, top, bottom)
        larger = F.pad(old, (*border, 0, 0))
        new = F.pad(torch.zeros_like(old[:, :1]), (*border, 0, 0), value=1.0)
        call |= {"height": larger.shape[-2], "width": larger.shape[-1]}
        return self(prompt, video=_pt(larger), mask_video=new.transpose(1, 2), **call)

    def result_size(self, video: Any, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) that a call with this video makes by default, or with one or both of them given."""
        return self._size(height, width, tuple(read_video(video).shape[-2:]))

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _check_task(self, conditioned: bool, conditioning: str) -> None:
        """A WaltError where this transformer cannot do what is asked, saying what would work."""
        config = self.transformer.config
        if conditioning not in ("model", "repaint"):
            raise WaltError(f'conditioning must be "model" or "repaint", got {conditioning!r}')
        if config.get("low_res_channels") is not None:
            raise WaltError(
                "this transformer is a super-resolution stage, which only enlarges: use WaltSuperResolutionPipeline for "
                "that, and a base transformer to animate, fill or edit"
            )
        if conditioned and conditioning == "model" and not config.frame_conditioning:
            raise WaltError(
                "this transformer was built with frame_conditioning=False and cannot be told what is given: pass "
                'conditioning="repaint", or train a base with frame_conditioning'
            )

    def _conditions(
        self,
        image: Any,
        last_image: Any,
        conditions: WaltCondition | Sequence[WaltCondition] | None,
        video: Any,
        mask_video: Any,
        strength: float | None,
        num_frames: int | None,
    ) -> list[WaltCondition]:
        """Pictures and clips in one list; a WaltError where arguments contradict each other."""
        if mask_video is not None and video is None:
            raise WaltError("mask_video says where a video is made anew: give the video too")
        if strength is not None and video is None:
            raise WaltError("strength says how much a video is changed: give the video too")
        listed = [conditions] if isinstance(conditions, WaltCondition) else list(conditions or ())
        for condition in listed:
            if not isinstance(condition, WaltCondition) or (condition.image is None) == (condition.video is None):
                raise WaltError("conditions must be WaltConditions, each with an image or a video")
        if image is not None:
            listed.insert(0, WaltCondition(image=image))
        if last_image is not None:
            if num_frames == 1:
                raise WaltError("last_image needs a video: num_frames of 5 or more")
            listed.append(WaltCondition(image=last_image, frame_index=-1))
        if listed and mask_video is not None:
            raise WaltError("image, last_image and conditions do not go with mask_video: put them into the video")
        if image is not None and video is not None and strength is None:
            raise WaltError("image and video are both the first frames: give one of them")
        return listed

    def _clip(self, condition: WaltCondition) -> Tensor:
        """A condition's pixels `(B, 3, n, H, W)` in [-1, 1]."""
        return read_image(condition.image) if condition.video is None else read_video(condition.video)

    def _mask(self, mask: Any, clip: Tensor) -> Tensor:
        """`(B, 1, T, H, W)` bool, true where `clip` is made anew; a WaltError for another size or length."""
        channels_last = isinstance(mask, np.ndarray)
        mask = as_floats(mask)
        if isinstance(mask, np.ndarray):
            mask = torch.from_numpy(mask.astype(np.float32))
        if not isinstance(mask, Tensor):
            found = read_video(mask, "mask_video").mean(1, keepdim=True) / 2 + 0.5
        elif mask.ndim in (2, 3):
            found = mask.float().reshape(1, 1, -1, *mask.shape[-2:])
        elif mask.ndim in (4, 5):
            colours = -1 if channels_last else -3
            if mask.shape[colours] not in (1, 3):
                raise WaltError(
                    f"mask_video must have 1 or 3 colour channels, or no such axis, got {tuple(mask.shape)}"
                )
            found = mask.float().mean(colours)
            found = found[None, None] if found.ndim == 3 else found[:, None]
        else:
            raise WaltError(f"mask_video must be (H, W), (T, H, W) or a video, got the shape {tuple(mask.shape)}")
        if tuple(found.shape[-2:]) != tuple(clip.shape[-2:]):
            raise WaltError(
                f"mask_video is {found.shape[-2]}x{found.shape[-1]} and the video {clip.shape[-2]}x{clip.shape[-1]}: "
                "make them of one size"
            )
        if found.shape[2] not in (1, clip.shape[2]):
            raise WaltError(
                f"mask_video has {found.shape[2]} frames and the video {clip.shape[2]}: give one mask, or as many"
            )
        if not bool((found > 0.5).any()):
            raise WaltError(
                "mask_video is black everywhere, so nothing would be made anew: make white what is to change"
            )
        return (found > 0.5).cpu().expand(-1, -1, clip.shape[2], -1, -1)

    def _size(self, height: int | None, width: int | None, given: tuple[int, ...] | None) -> tuple[int, int]:
        """Height and width of a result: those asked for, else the given shape at about the transformer's own area."""
        sample, space = self.transformer.config.sample_size, self.vae_scale_factor_spatial
        own = sample[1] * space, sample[2] * space
        if given is None or (height is not None and width is not None):
            return height or own[0], width or own[1]
        multiple = space * int(self.transformer.config.patch_size)
        area = math.sqrt(own[0] * own[1] / (given[0] * given[1]))
        if area >= 1 and not any(side % multiple for side in given):
            area = 1.0  # fits as it is, and is not too large
        if height is not None or width is not None:
            area = height / given[0] if height is not None else (width or 0) / given[1]
        sides = [max(multiple, round(side * area / multiple) * multiple) for side in given]
        return height or sides[0], width or sides[1]

    def _whole(self, video: Any, call: dict[str, Any], name: str = "video") -> Tensor:
        """A video to go on from, `(B, 3, T, H, W)` in [-1, 1], at the size of the result."""
        pixels = read_video(video, name)
        return fit(pixels, *self._size(call.get("height"), call.get("width"), tuple(pixels.shape[-2:])))

    def _backward(self, old: Tensor, prompt: Any, num_frames: int, call: dict[str, Any]) -> Tensor:
        """`num_frames` frames that lead to `old`, and `old`: chunk by chunk, each ending with the first frames of the next."""
        ratio = self.vae_scale_factor_temporal
        if old.shape[2] < ratio:
            raise WaltError(f"reverse=False needs a video of at least {ratio} frames, got {old.shape[2]}")
        known = 2 * ratio if old.shape[2] >= 2 * ratio else ratio
        whole, missing = old, num_frames
        while missing > 0 and not (missing < num_frames and self.interrupt):
            frames = min(1 + 4 * ratio, fitting_frames(missing + known, ratio))
            clip = WaltCondition(video=_pt(whole[:, :, :known]), frame_index=-known)
            made = self._pixels(prompt, [clip], frames, call)
            # The first time what the denoiser saw is shown as it is said to be; later it is its own.
            whole = torch.cat([made, _like(whole, made)[:, :, known:]], dim=2)
            missing -= frames - known
        return whole[:, :, max(0, whole.shape[2] - old.shape[2] - num_frames) :]

    def _between(
        self,
        before: Tensor,
        after: Tensor,
        prompt: str | list[str] | None,
        num_frames: int,
        call: dict[str, Any],
        most: int | None = None,
    ) -> tuple[Tensor, int, int]:
        """The end of `before`, new frames and the beginning of `after`; and how many frames of each that is."""
        ratio = self.vae_scale_factor_temporal
        check_range("num_frames", num_frames, 1, whole=True)
        if num_frames % ratio:
            near = max(ratio, round(num_frames / ratio) * ratio)
            raise WaltError(f"num_frames={num_frames} between two videos must be a multiple of {ratio}, such as {near}")
        tails = [n for n in range(1, before.shape[2] + 1, ratio)]
        tails = [n for n in tails if n >= min(overlap_frames(ratio), max(tails))]
        heads = [n for n in range(ratio, after.shape[2] + 1, ratio)]
        if not heads:
            raise WaltError(f"next_video must have at least {ratio} frames, got {after.shape[2]}")
        # What the denoiser sees of both, as little as makes a length that chunks take.
        choices = [
            (tail + num_frames + head, head, tail)
            for tail in tails
            for head in heads
            if fitting_frames(tail + num_frames + head, ratio) == tail + num_frames + head
            and (most is None or tail + head <= most)
        ]
        if not choices:
            raise WaltError(
                f"num_frames={num_frames} new frames between videos of {before.shape[2]} and {after.shape[2]} frames make "
                f"no length of whole chunks: try {num_frames - ratio or ratio} or {num_frames + ratio}, or longer videos"
            )
        frames, head, tail = min(choices)
        conditions = [
            WaltCondition(video=_pt(before[:, :, -tail:])),
            WaltCondition(video=_pt(after[:, :, :head]), frame_index=-head),
        ]
        return self._pixels(prompt, conditions, frames, call), tail, head

    def _segments(self) -> tuple[int, int, int]:
        """Gaps between two pictures that need no still frame: a latent holds the second."""
        ratio = self.vae_scale_factor_temporal
        return 1 + ratio, 1 + 2 * ratio, 1 + 3 * ratio

    def _segment(
        self, first: Tensor, last: Tensor, gap: int, prompt: str | list[str] | None, call: dict[str, Any]
    ) -> Tensor:
        """The `gap - 1` frames between two pictures `(B, 3, 1, H, W)`, B videos."""
        if gap == 1:
            return first[:, :, :0]
        ratio = self.vae_scale_factor_temporal
        segments = self._segments()
        longest = segments[-1]
        steps = next((s for s in segments if s >= (gap if gap <= longest else -(-gap // longest))), longest)
        # `steps - 1` frames and the latent that holds the last picture.
        conditions = [WaltCondition(video=_pt(first)), WaltCondition(image=_pt(last)[:, 0], frame_index=-1)]
        made = self._pixels(prompt, conditions, steps + ratio, call)[:, :, 1:steps]
        if gap <= longest:
            return made[:, :, [round(i * steps / gap) - 1 for i in range(1, gap)]]
        places = [round(i * gap / steps) for i in range(steps + 1)]
        pictures = [first, *made.split(1, dim=2), last]
        parts = [first[:, :, :0]]
        for i in range(steps):
            if self.interrupt:
                break
            parts += pictures[i : i + 1] if i else []
            parts.append(self._segment(pictures[i], pictures[i + 1], places[i + 1] - places[i], prompt, call))
        return torch.cat(parts, dim=2)

    def _pixels(self, prompt: Any, conditions: list[WaltCondition], frames: int, call: dict[str, Any]) -> Tensor:
        """`(B, 3, T, H, W)` in [-1, 1] of a call with these conditions."""
        size = dict(zip(("height", "width"), self._clip(conditions[0]).shape[-2:], strict=True))
        call = {**call, **size, "output_type": "pt", "return_dict": True}
        made = self(prompt, conditions=conditions, num_frames=frames, **call).frames
        return made.cpu().float().transpose(1, 2) * 2 - 1

    def _give(self, result: Tensor, kind: _Kind) -> WaltPipelineOutput | Any:
        frames = self._output(result.clamp(-1, 1), kind.output_type)
        return WaltPipelineOutput(frames=frames) if kind.return_dict else (frames,)


class _Kind(NamedTuple):
    """What a call of a task returns."""

    output_type: str
    return_dict: bool

    @classmethod
    def of(cls, call: dict[str, Any]) -> _Kind:
        """Takes it out of the arguments of a call."""
        output_type = call.pop("output_type", "pil")
        if output_type not in ("pil", "np", "pt"):
            raise WaltError(f"output_type must be one of pil, np, pt here, got {output_type!r}")
        return cls(output_type, call.pop("return_dict", True))


def _count(prompt: Any, prompt_embeds: Tensor | None, class_labels: Any) -> int:
    """Prompts (or classes) of a call."""
    if prompt_embeds is not None:
        return len(prompt_embeds)
    if prompt is None and class_labels is not None:
        return int(torch.as_tensor(class_labels).numel())
    return len(prompt) if isinstance(prompt, list) else 1


def _repeat(given: Tensor, count: int, each: int) -> Tensor:
    """One row per video, from one row in all, one per prompt, or already one per video."""
    if len(given) not in (1, count, count * each):
        raise WaltError(f"{len(given)} videos or pictures for {count} prompts: give one, or one per prompt")
    return given.repeat_interleave(count * each // len(given), dim=0)


def _like(old: Tensor, made: Tensor) -> Tensor:
    """The rows of `old` beside those of `made`."""
    return old.repeat_interleave(len(made) // len(old), dim=0)


def _hold(video: Tensor, frames: int) -> Tensor:
    """`(B, C, T, H, W)` with its last frame held until it has so many."""
    missing = frames - video.shape[2]
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing else video


def _pt(video: Tensor) -> Tensor:
    """`(B, 3, T, H, W)` in [-1, 1] as `(B, T, 3, H, W)` in [0, 1]."""
    return video.transpose(1, 2) / 2 + 0.5
