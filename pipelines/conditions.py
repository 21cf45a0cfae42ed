"""What a user gives of a video (frames, regions, clips) as latents that the denoiser is told (W.A.L.T. section 3.4).

A latent stands for 8 x 8 pixels of one frame (the first) or of four; it is given where every pixel of it is. Frames of a
long video lie on one grid of latents, whichever chunk they are in: frame 0, then 1-4, 5-8, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from walt.errors import WaltError
from walt.fidelity import blur
from walt.media import cover

# It takes the many forms of a video apart. To [-1, 1] it is brought here: of values slightly below 0, as scaling leaves
# them, diffusers believes that they are in [-1, 1] already.
_READER = VideoProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True)


@dataclass(frozen=True)
class WaltCondition:
    """A picture or a clip that a video has at a place of its own, as diffusers' LTXVideoCondition.

    Attributes:
        image: a PIL image, an array `(H, W, 3)` or a tensor `(3, H, W)` in [0, 1]; or a list with one per prompt.
        video: a clip in any form that WaltConditionPipeline's `video` has. Give one of the two.
        frame_index: the frame at which it is, or starts; negative ones count from the end. Latents hold four frames, so a
            picture inside a video stands for the whole of its latent while the denoiser works; it is shown at its own
            frame alone. A clip is at 0, or starts and ends with a latent: frames 1-4, 5-12, ...
    """

    image: Any = None
    video: Any = None
    frame_index: int = 0


@dataclass(frozen=True)
class Known:
    """The given pixels of a video.

    Attributes:
        video: `(B, 3, T, H, W)` in [-1, 1]; anything where nothing is given.
        mask: `(B, 1, T, H, W)` bool: what the denoiser is told.
        shown: the same: where the result shows the given pixels. A part of `mask`.
    """

    video: Tensor
    mask: Tensor
    shown: Tensor

    @classmethod
    def nothing(cls, batch: int, frames: int, height: int, width: int) -> Known:
        """A video of which nothing is given."""
        mask = torch.zeros(batch, 1, frames, height, width, dtype=torch.bool)
        return cls(torch.zeros(batch, 3, frames, height, width), mask, mask)

    @classmethod
    def ending(cls, frame: Tensor, frames: int, ratio: int) -> Known:
        """A clip whose last latent holds one frame `(B, 3, 1, H, W)`, which is not shown as such."""
        batch, _, _, height, width = frame.shape
        nothing = cls.nothing(batch, frames, height, width)
        mask = nothing.mask.clone()
        mask[:, :, -ratio:] = True
        return cls(frame.cpu().expand(-1, -1, frames, -1, -1), mask, nothing.shown)

    def window(self, start: int, length: int) -> Known:
        """Frames `start` to `start + length`."""
        part = slice(start, start + length)
        return Known(self.video[:, :, part], self.mask[:, :, part], self.shown[:, :, part])

    def after(self, past: Tensor) -> Known:
        """The same with the first frames replaced by `past` `(B, 3, n, H, W)`, all of them given."""
        count, video = past.shape[2], self.video.expand(len(past), -1, -1, -1, -1).clone()
        mask = self.mask.expand(len(past), -1, -1, -1, -1).clone()
        shown = self.shown.expand(len(past), -1, -1, -1, -1).clone()
        video[:, :, :count], mask[:, :, :count], shown[:, :, :count] = past.to(video), True, False
        return Known(video, mask, shown)


def close_seams(video: Tensor, truth: Tensor, shown: Tensor, frames: int = 8) -> None:
    """Puts `truth` into `video`, in place, and spreads what would be seen as a seam over what was made.

    In time: where the picture would change by more from a given clip to the frame beside it than it does around, that frame
    is drawn towards the clip, and the next ones ever less, so that no step is much larger than the others; at worst, between
    clips of which nothing leads to the other, this is a dissolve. A lone picture is no clip. In space, within frames of which a
    part is given, what given and made pixels differ by near the border goes on beyond it.

    Args:
        video: `(B, 3, T, H, W)`, what was made.
        truth: the same, where `shown`.
        shown: `(B or 1, 1, T, H, W)` bool.
        frames: within so many frames a jump is spread.
    """
    if len(shown) > 1:  # what is given may differ from video to video
        for i in range(len(shown)):
            close_seams(video[i : i + 1], truth.expand_as(video)[i : i + 1], shown[i : i + 1], frames)
        return
    shown, truth = shown.to(video.device), truth.to(video)
    partly = shown.flatten(3).any(dim=3)[0, 0].tolist()
    whole = shown.flatten(3).all(dim=3)[0, 0].tolist()
    for t in range(video.shape[2]):
        if partly[t] and not whole[t]:
            mask, made = shown[:, :, t], video[:, :, t]
            for sigma in (8.0, 4.0, 2.0, 1.0):  # what differs coarsely goes over far, what differs finely not
                gap = torch.where(mask, truth[:, :, t] - made, 0.0).float()
                near = blur(mask.float(), sigma).clamp_min(0.5)  # half at a straight border, and less beyond it
                made += (blur(gap, sigma) / near).to(video)
    torch.where(shown, truth, video, out=video)
    for known in range(video.shape[2]):
        for step in (1, -1):
            _spread_jump(video, whole, known, step, frames)
    torch.where(shown, truth, video.clamp_(-1, 1), out=video)  # a part of these frames may be given too


def _spread_jump(video: Tensor, whole: list[bool], known: int, step: int, frames: int) -> None:
    """Of the change from the given frame `known` to the next one in direction `step`, what exceeds the changes around."""

    def given(t: int) -> bool | None:
        return whole[t] if 0 <= t < len(whole) else None

    if not given(known) or not given(known - step) or given(known + step) is not False:
        return
    span = 1
    while span < frames and given(known + step * (span + 1)) is False:
        span += 1
    around = [range(known, known - 4 * step, -step), range(known + step, known + (span - 1) * step, step)]
    places = [(t, t - step) for t in around[0] if given(t) and given(t - step)]
    places += [(t, t + step) for t in list(around[1])[:4] if given(t + step) is False]
    usual = torch.stack([_change(video, *pair) for pair in places]).median(dim=0).values
    jump = video[:, :, known] - video[:, :, known + step]
    share = usual / _change(video, known, known + step).clamp_min(1e-8)
    start = (1 - share).clamp_min(0)
    length = (start / (0.2 * share.clamp_min(1e-8))).clamp(1, span)  # steps of a fifth more than the usual are not seen
    for k in range(span):
        weight = start * (1 + torch.cos(math.pi * (k / length).clamp_max(1))) / 2
        video[:, :, known + step * (k + 1)] += weight.to(video).view(-1, 1, 1, 1) * jump


def _change(video: Tensor, one: int, other: int) -> Tensor:
    """Mean absolute difference `(B,)` of two frames."""
    return (video[:, :, one] - video[:, :, other]).float().abs().mean(dim=(1, 2, 3))


def read_video(video: Any, name: str = "video") -> Tensor:
    """`(B, 3, T, H, W)` float32 in [-1, 1], on the CPU, of whatever diffusers' VideoProcessor takes.

    Args:
        video: floats in [0, 1] or uint8: a tensor `(B, T, 3, H, W)` or `(T, 3, H, W)`, an array `(B, T, H, W, 3)` or
            `(T, H, W, 3)`, PIL images of any mode, or a list of frames or of videos of one size.
        name: of the argument, for errors.

    Raises:
        WaltError: another form, another number of channels, or values outside of [0, 1].
    """
    try:
        pixels: Tensor = _READER.preprocess_video(as_floats(video)).float().cpu()
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise WaltError(
            f"{name} must be a tensor (B, T, 3, H, W) or (T, 3, H, W), an array (B, T, H, W, 3) or (T, H, W, 3), "
            f"or a list of PIL images or of videos of one size: {error}"
        ) from error
    if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.numel():
        raise WaltError(f"{name} must have 3 colour channels, got (B, C, T, H, W) = {tuple(pixels.shape)}")
    low, high = (float(value) for value in pixels.aminmax())
    if not (low > -1e-3 and high < 1 + 1e-3):
        raise WaltError(f"{name} must be in [0, 1] (or uint8), got values from {low:g} to {high:g}")
    return pixels.clamp(0, 1) * 2 - 1


def read_image(image: Any, name: str = "image") -> Tensor:
    """`(B, 3, 1, H, W)` in [-1, 1] of a PIL image, an array `([B,] H, W, 3)`, a tensor `([B,] 3, H, W)`, or a list of such.

    Raises:
        WaltError: as of `read_video`.
    """
    if isinstance(image, np.ndarray | Tensor):
        return read_video(image[None] if image.ndim == 3 else image[:, None], name)
    return read_video([[one] for one in image] if isinstance(image, list | tuple) else [[image]], name)


def as_floats(video: Any) -> Any:
    """The same with uint8 as floats in [0, 1], also inside of lists."""
    if isinstance(video, Image.Image):
        return [video]
    if isinstance(video, list | tuple):
        return [one if isinstance(one, Image.Image) else as_floats(one) for one in video]
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    return video / 255 if isinstance(video, Tensor) and video.dtype == torch.uint8 else video


def place(known: Known, clip: Tensor, frame_index: int, still: bool, ratio: int) -> Known:
    """`known` with a clip `(B, 3, n, H, W)` at `frame_index`; a WaltError where it does not fit latents.

    Args:
        still: whether it is one picture, which is held for all frames of its latent.
    """
    frames, count = known.video.shape[2], clip.shape[2]
    if isinstance(frame_index, bool) or not isinstance(frame_index, int):
        raise WaltError(f"frame_index must be a whole number, got {frame_index!r}")
    if len(known.video) > 1 and len(clip) not in (1, len(known.video)):
        raise WaltError(
            f"what is given has {len(known.video)} and {len(clip)} rows: give one of each, or one per prompt"
        )
    start = frame_index + frames if frame_index < 0 else frame_index
    if not 0 <= start < frames or start + count > frames:
        raise WaltError(
            f"a condition of {count} frame{'s' * (count != 1)} at frame_index={frame_index} does not lie in the "
            f"{frames} frames of the video: give it an earlier place, or make num_frames larger"
        )
    video, mask, shown = (
        x.expand(max(len(x), len(clip)), *x.shape[1:]).clone() for x in (known.video, known.mask, known.shown)
    )
    first, end = start, start + count
    if still and start:
        first = 1 + (start - 1) // ratio * ratio
        end = first + ratio
        video[:, :, first:end] = torch.where(shown[:, :, first:end], video[:, :, first:end], clip)
    elif (start and start % ratio != 1 % ratio) or (end - 1) % ratio:
        raise WaltError(
            f"a clip of {count} frames at frame_index={frame_index} does not fill latents of {ratio} frames: at 0 give "
            f"{1 + ratio} or {1 + 2 * ratio} frames, later start at 1, {1 + ratio}, {1 + 2 * ratio}, ... with a multiple "
            f"of {ratio} frames"
        )
    video[:, :, start : start + count] = clip
    mask[:, :, first:end] = True
    shown[:, :, start : start + count] = True
    return Known(video, mask, shown)


def known_latents(
    known: Known, encode: Callable[[Tensor], Tensor], shape: Sequence[int], ratio: int
) -> tuple[Tensor, Tensor]:
    """Latents of a chunk's given pixels, and where they are given.

    Unknown pixels are filled smoothly before encoding, from the nearest frame and then from around, so that the latents
    next to them are as undisturbed as can be.

    Args:
        known: of one chunk of 1 + ratio * k frames.
        encode: pixels `(B, 3, T, H, W)` to latents `(B, C, t, h, w)`.
        shape: (C, t, h, w).

    Returns:
        Latents like `shape` with B in front, and a mask `(B, 1, t, h, w)`, 1 where all pixels of a latent are given.
    """
    latents = encode(fill(known.video, known.mask))
    unknown = (~known.mask).float()
    # The first frame has a latent of its own: four copies of it make all latents alike.
    unknown = torch.cat([unknown[:, :, :1].expand(-1, -1, ratio - 1, -1, -1), unknown], dim=2)
    space = known.video.shape[-1] // shape[-1]
    mask = F.max_pool3d(unknown, (ratio, space, space)) == 0
    return latents, mask.to(latents)


def fill(video: Tensor, mask: Tensor) -> Tensor:
    """`(B, 3, T, H, W)` with values everywhere: a pixel that is unknown takes its nearest known frame, else its surroundings.

    Args:
        mask: `(B, 1, T, H, W)` bool, true where `video` counts.
    """
    frames = video.shape[2]
    if bool(mask.all()):
        return video
    index = torch.arange(frames).view(1, 1, -1, 1, 1)
    before = torch.where(mask, index, -frames).cummax(dim=2).values
    after = torch.where(mask, index, 2 * frames).flip(2).cummin(dim=2).values.flip(2)
    nearest = torch.where(index - before <= after - index, before, after)
    ever = (nearest >= 0) & (nearest < frames)
    chosen = video.gather(2, nearest.clamp(0, frames - 1).expand_as(video))
    if bool(ever.all()):
        return chosen
    flat = chosen.transpose(1, 2).flatten(0, 1)
    filled = _fill_around(flat, ever.transpose(1, 2).flatten(0, 1))
    return filled.unflatten(0, (len(video), frames)).transpose(1, 2)


def _fill_around(images: Tensor, mask: Tensor) -> Tensor:
    """`(N, 3, H, W)`: unknown pixels become smooth means of known ones, by a pyramid of halves; grey where there is none."""
    if bool(mask.all()):
        return images
    weight = mask.float()
    if max(images.shape[-2:]) == 1:
        return images * weight
    half, known = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (images * weight, weight))
    coarse = _fill_around(half / known.clamp_min(1e-6), known > 0)
    size = [images.shape[-2], images.shape[-1]]
    return torch.where(mask, images, F.interpolate(coarse, size=size, mode="bilinear", align_corners=False))


def fit(video: Tensor, height: int, width: int) -> Tensor:
    """`(B, C, T, H', W')` scaled to cover height x width with its shape kept, and cut at the centre."""
    batch, _, frames, h, w = video.shape
    if (h, w) == (height, width):
        return video
    size, rows, columns = cover(h, w, (height, width))
    flat = video.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, size=size, mode="bilinear", antialias=True, align_corners=False)
    return flat[..., rows, columns].unflatten(0, (batch, frames)).transpose(1, 2)
