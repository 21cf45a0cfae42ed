"""Training samples of the emoji theatre: which window and which cut of which scene, as pixels in [-1, 1]."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from walt.data.emoji import FPS, WORLDS, EmojiTheatre, Scene, World, check_sprites
from walt.data.sketches import draw_sketch
from walt.data.stage import Layout, lay_out
from walt.training.job import DataJob, Shape

SCENE_FRAMES = 29


@dataclass(frozen=True)
class Clip:
    """`video` `(3, T, H, W)` float in [-1, 1], its half-size twin if asked for, and what it shows."""

    video: Tensor
    low_res: Tensor | None
    caption: str


@dataclass(frozen=True)
class Laid:
    """A `Clip` that a `walt.data.stage.Stage` is to draw."""

    video: Layout
    low_res: Layout | None
    caption: str


def world(job: DataJob) -> World:
    """The world that a recipe names."""
    return {**WORLDS, "full": World()}[job.world]


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 `(T, H, W, 3)` to float32 `(3, T, H, W)` in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).to(torch.float32) / 127.5 - 1.0


class Scenes:
    """Clips by number: a pure function of the recipe, the shape and the number."""

    def __init__(self, job: DataJob) -> None:
        self.job = job
        self.rate = job.fps // FPS
        if not job.subjects:
            check_sprites(job.source, job.world, "data.source")
        self.theatre = EmojiTheatre(job.source, subjects=job.subjects or None, world=world(job))
        self.clips = self.cast = self.theatre
        if job.clip_subjects:
            self.clips = EmojiTheatre(job.source, subjects=job.clip_subjects, world=world(job))
            # Of both, for whoever draws all of them by number (`Stage`).
            both = dict.fromkeys((*self.theatre.subjects, *job.clip_subjects))
            self.cast = EmojiTheatre(job.source, subjects=tuple(both), world=world(job))

    def clip(self, number: int, shape: Shape, low_res: bool = False, align: int = 16) -> Clip:
        """The `number`-th clip of a shape; with `low_res` its half-size twin too.

        A `cut` is a square around the subject, placed at random within its reach and aligned to `align` pixels.
        """
        scene, crop = self._scene(number, shape, align)
        video = self._render(scene, shape, 1, crop)
        twin = self._render(scene, shape, 2, crop) if low_res else None
        return Clip(video, twin, scene.caption)

    def layout(self, number: int, shape: Shape, low_res: bool = False, align: int = 16) -> Laid:
        """`clip`, not drawn yet."""
        scene, crop = self._scene(number, shape, align)
        video = self._lay_out(scene, shape, 1, crop)
        twin = self._lay_out(scene, shape, 2, crop) if low_res else None
        return Laid(video, twin, scene.caption)

    def sketch(self, number: int, shape: Shape, align: int = 16) -> Tensor:
        """The class map int64 `(T, H, W)` of the `number`-th clip: 0 the background, then the theatre's subjects."""
        scene, crop = self._scene(number, shape, align)
        sketch = draw_sketch(self.theatre, scene, shape.height, shape.width, shape.start, shape.frames, crop)
        return torch.from_numpy(sketch.astype(np.int64))

    def _scene(self, number: int, shape: Shape, align: int) -> tuple[Scene, tuple[int, int, int, int] | None]:
        number = number % self.job.scenes
        # A lone frame from the start is a picture; a later one is a frame of a clip.
        frames = SCENE_FRAMES if shape.frames > 1 or shape.start else 1
        theatre = self.theatre if frames == 1 else self.clips
        scene = theatre.scene(self.job.seed * 1_000_003 + number, frames)
        return scene, self._cut(scene, number, shape, align) if shape.cut else None

    def _render(self, scene: Scene, shape: Shape, shrink: int, crop: tuple[int, int, int, int] | None) -> Tensor:
        return to_video(self.theatre.render(scene, **self._window(shape, shrink, crop))[0])

    def _lay_out(self, scene: Scene, shape: Shape, shrink: int, crop: tuple[int, int, int, int] | None) -> Layout:
        return lay_out(self.cast, scene, **self._window(shape, shrink, crop))

    def _window(self, shape: Shape, shrink: int, crop: tuple[int, int, int, int] | None) -> dict[str, Any]:
        return {
            "height": shape.height // shrink,
            "width": shape.width // shrink,
            "start": shape.start,
            "frames": shape.frames,
            "crop": None if crop is None else tuple(side // shrink for side in crop),
            "rate": self.rate,
        }

    def _cut(self, scene: Scene, number: int, shape: Shape, align: int) -> tuple[int, int, int, int]:
        rng = random.Random(number)
        middle = (shape.start + shape.frames // 2) // self.rate
        left, top, right, bottom = self.theatre.box(scene, middle, shape.height, shape.width)
        x, y = rng.uniform(left, right), rng.uniform(top, bottom)

        def begin(centre: float, side: int) -> int:
            return int(min(max(centre - shape.cut / 2, 0), side - shape.cut)) // align * align

        x0, y0 = begin(x, shape.width), begin(y, shape.height)
        return x0, y0, x0 + shape.cut, y0 + shape.cut
