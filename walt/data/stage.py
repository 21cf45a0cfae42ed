"""Scenes drawn by the device that trains on them, many at once: the pictures of `EmojiTheatre.render`.

A host core draws a hundred small clips a second, an accelerator thousands. What is drawn is laid out on the host
(`lay_out`: numbers alone, cheap to send from a worker), and `Stage.draw` makes pixels of it: Pillow's bicubic filter, which
widens when it shrinks, as one matrix per axis and frame. Within a level or two of 255 it is what Pillow draws.

Letters: B clips, T frames, H W pixels, K pictures (every frame of every sprite), A pixels of the art.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from walt.data.emoji import ART, EmojiTheatre, Scene, backdrop, check_window
from walt.latents import to_device

FRAMES = 512
"""Frames drawn at a time: their filters take about half a gigabyte at 128x224."""


@dataclass(frozen=True)
class Layout:
    """A clip as numbers. `boxes` `(actors, T, 4)` float32, where each sprite is, in pixels of the clip; `pictures`
    `(actors, T)` int64, which frame of which sprite (see `Stage`); `ground` `(H, 3)` uint8, the colour of every row."""

    boxes: NDArray[np.float32]
    pictures: NDArray[np.int64]
    ground: NDArray[np.uint8]
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its video: (3, T, H, W)."""
        return (3, self.boxes.shape[1], len(self.ground), self.width)


def lay_out(
    theatre: EmojiTheatre,
    scene: Scene,
    height: int,
    width: int,
    start: int,
    frames: int,
    crop: tuple[int, int, int, int] | None = None,
    rate: int = 1,
) -> Layout:
    """What `theatre.render` with these arguments would draw, as numbers; a WaltError where that raises one."""
    left, top, right, bottom, stop = check_window(scene, height, width, start, frames, crop, rate)
    times = range(start, stop)
    boxes = np.array(
        [theatre.boxes(scene, actor, [t / rate for t in times], height, width) for actor in range(len(scene.actors))],
        np.float32,
    ) - np.array([left, top, left, top], np.float32)
    pictures = np.array(
        [[theatre.picture(scene, actor, t // rate) for t in times] for actor in range(len(scene.actors))], np.int64
    )
    return Layout(boxes, pictures, backdrop(scene.background, height)[top:bottom], right - left)


class Stage:
    """A theatre's sprites on a device, and clips drawn there.

    Args:
        theatre: whose sprites; all of its subjects are read.
        device: where they lie and are drawn: K x 256 x 256 x 4 bytes.
    """

    def __init__(self, theatre: EmojiTheatre, device: torch.device | str) -> None:
        self.device = torch.device(device)
        strips = [theatre.sprite(subject) for subject in theatre.subjects]
        count = sum(map(len, strips))
        # Columns before rows: the filter along a row is then one product. Colours premultiplied, as Pillow resamples them.
        pictures = torch.zeros(count, ART, ART, 4, dtype=torch.uint8)
        place = 0
        for strip in strips:
            t, h, w, _ = strip.shape
            art = torch.tensor(strip).permute(0, 2, 1, 3).to(torch.int32)
            cover = art[..., 3:]
            colour = art[..., :3] * cover + 128
            pictures[place : place + t, :w, :h, :3] = ((colour + (colour >> 8)) >> 8).to(torch.uint8)
            pictures[place : place + t, :w, :h, 3:] = cover.to(torch.uint8)
            place += t
        self.pictures = pictures.to(self.device)
        self.sizes = torch.tensor([(s.shape[2], s.shape[1]) for s in strips for _ in s], dtype=torch.float32)

    @torch.no_grad()
    def draw(self, clips: Sequence[Layout]) -> Tensor:
        """Clips of one shape as `(B, 3, T, H, W)` float32 in [-1, 1] on the device, every value one of 256 levels."""
        with torch.autocast(self.device.type, enabled=False):
            return self._draw(clips)

    def _draw(self, clips: Sequence[Layout]) -> Tensor:
        _, frames, _, width = clips[0].shape
        ground = self._move(torch.from_numpy(np.stack([clip.ground for clip in clips]))).float()
        video = ground[:, None, :, None, :].repeat(1, frames, 1, width, 1).flatten(0, 1)  # (B T, H, W, 3)
        for actor in range(max(len(clip.boxes) for clip in clips)):
            on = [i for i, clip in enumerate(clips) if len(clip.boxes) > actor]
            boxes = torch.from_numpy(np.concatenate([clips[i].boxes[actor] for i in on]))
            pictures = torch.from_numpy(np.concatenate([clips[i].pictures[actor] for i in on]))
            rows = (torch.tensor(on)[:, None] * frames + torch.arange(frames)).flatten()
            for some, where, which in zip(*(x.split(FRAMES) for x in (rows, boxes, pictures)), strict=True):
                self._paste(video, some, where, which)
        return video.div_(127.5).sub_(1.0).unflatten(0, (len(clips), frames)).permute(0, 4, 1, 2, 3).contiguous()

    def _paste(self, video: Tensor, rows: Tensor, boxes: Tensor, pictures: Tensor) -> None:
        """Sprites `pictures` `(n,)` into the boxes `(n, 4)` of the frames `rows` `(n,)` of `video` `(N, H, W, 3)`."""
        _, height, width, _ = video.shape
        scale = (boxes[:, 2] - boxes[:, 0]) / self.sizes[pictures][:, 0]  # of the art
        across = self._filter(boxes[:, 0], boxes[:, 2], scale, width)
        down = self._filter(boxes[:, 1], boxes[:, 3], scale, height)
        art = self.pictures[self._move(pictures)].float()  # (n, A, A, 4): column, row
        wide = (across @ art.flatten(2)).round_().clamp_(0, 255)  # 8 bits between the passes, as in Pillow
        wide = wide.unflatten(2, (ART, 4)).transpose(1, 2).flatten(2)  # (n, A, W 4)
        small = (down @ wide).round_().clamp_(0, 255).unflatten(2, (width, 4))
        cover, place = small[..., 3:], self._move(rows)
        under = ((video[place] * (255 - cover) + 127) / 255).floor_()
        # The filter's overshoot may leave more colour than cover.
        video[place] = torch.minimum(small[..., :3], cover) + under

    def _filter(self, first: Tensor, last: Tensor, scale: Tensor, size: int) -> Tensor:
        """`(n, size, A)`: what each pixel of the art gives to each of `size` pixels, for a sprite from `first` to `last`."""
        reach = 2 * (1 / scale).clamp(min=1)
        margin = math.ceil(float(reach.max())) + 1  # of the art's transparent surroundings
        first, last, scale = self._move(torch.stack([first, last, scale]))[:, :, None, None]
        pixel = torch.arange(size, device=self.device, dtype=torch.float32)[None, :, None]
        source = torch.arange(-margin, ART + margin, device=self.device, dtype=torch.float32)
        x = (source + 0.5 - (pixel + 0.5 - first) / scale).abs_() * scale.clamp(max=1)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, far) * (x < 2)
        weight = weight / weight.sum(dim=2, keepdim=True).clamp_(min=1e-6)
        # Whole pixels around the sprite, and one more for the filter's skirt.
        inside = (pixel >= first.floor() - 1) & (pixel < last.ceil() + 1)
        return (weight * inside)[..., margin : margin + ART]

    def _move(self, value: Tensor) -> Tensor:
        return to_device(value, self.device)
