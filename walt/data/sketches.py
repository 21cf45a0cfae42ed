"""Sketches: segmentation maps of the emoji theatre, exact because they come from the sprites' own alpha.

A sketch is uint16 `(T, H, W)`, one class per pixel: 0 is the background, then the theatre's subjects in the order of
`theatre.subjects`, from 1 (NUWA's "video sketch", arXiv 2111.12417 section 3.1, frame by frame). On disk it is a PNG,
or a folder of PNGs in the order of their names, in the colours of `colour`; both ways lose nothing.
Letters: T frames, H W pixels.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from walt.data.emoji import EmojiTheatre, Scene
from walt.errors import WaltError
from walt.media import Pixels, check_output, read_image, write_image

Sketch = npt.NDArray[np.uint16]

BACKGROUND = "background"
COVERED = 128  # alpha from which a pixel is the subject's: half covered


def classes(subjects: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes, by number: the background, then the subjects."""
    return (BACKGROUND, *subjects)


def render_with_sketch(
    theatre: EmojiTheatre,
    scene: Scene,
    height: int,
    width: int,
    start: int = 0,
    frames: int | None = 17,
    crop: tuple[int, int, int, int] | None = None,
) -> tuple[Pixels, Sketch]:
    """`theatre.render` with a sketch in place of the alpha: RGB uint8 `(T, H, W, 3)`, classes uint16 `(T, H, W)`.

    A pixel belongs to the subject on top that covers at least half of it. Arguments and errors are those of `render`.
    """
    video, alpha = theatre.render(scene, height, width, start, frames, crop)
    sketch = np.zeros(alpha.shape, np.uint16)
    for actor in scene.actors:  # drawn in this order, so a later one hides an earlier one
        if len(scene.actors) > 1:
            alone = replace(scene, actors=(actor,))
            _, alpha = theatre.render(alone, height, width, start, frames, crop)
        sketch[alpha >= COVERED] = 1 + theatre.subjects.index(actor.subject)
    return video, sketch


def draw_sketch(
    theatre: EmojiTheatre,
    scene: Scene,
    height: int,
    width: int,
    start: int = 0,
    frames: int | None = 17,
    crop: tuple[int, int, int, int] | None = None,
) -> Sketch:
    """The sketch alone of `render_with_sketch`."""
    return render_with_sketch(theatre, scene, height, width, start, frames, crop)[1]


def sample_frames(
    theatre: EmojiTheatre, scene: Scene, height: int, width: int, start: int = 0, frames: int = 5, step: int = 4
) -> tuple[Pixels, Sketch]:
    """`render_with_sketch` of every `step`-th frame: `start`, `start + step`, ..., `frames` of them."""
    parts = [render_with_sketch(theatre, scene, height, width, start + i * step, 1) for i in range(frames)]
    return np.concatenate([video for video, _ in parts]), np.concatenate([sketch for _, sketch in parts])


# ------------------------------------------------------------------------------------------------------------- colours


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class: its bits dealt to red, green and blue from the highest down (PASCAL VOC's palette).

    Class 0 is black; every number up to 2**24 has a colour of its own, and small numbers have clear ones.
    """
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def to_colours(sketch: npt.NDArray[np.integer], names: Sequence[str]) -> Pixels:
    """Classes `(..., H, W)` as colours uint8 `(..., H, W, 3)`; a class that `names` lacks is a WaltError."""
    check_classes(sketch, names)
    palette = np.array([colour(i) for i in range(len(names))], np.uint8)
    coloured: Pixels = palette[sketch]
    return coloured


def from_colours(pixels: Pixels, names: Sequence[str], argument: str = "sketch") -> Sketch:
    """Colours uint8 `(..., H, W, 3)` back as classes `(..., H, W)`; a colour of no class is a WaltError."""
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise WaltError(f"{argument}: pixels must be uint8 (..., H, W, 3), got {pixels.dtype} {pixels.shape}")
    palette = np.array([colour(i) for i in range(len(names))], np.int64) @ (65_536, 256, 1)
    codes = pixels.astype(np.int64) @ (65_536, 256, 1)
    order = np.argsort(palette)
    place = np.minimum(np.searchsorted(palette[order], codes), len(palette) - 1)
    found = order[place]
    wrong = codes != palette[found]
    if wrong.any():
        odd = int(codes[wrong][0])
        known = ", ".join(f"{name} #{int(code):06x}" for name, code in zip(names[:12], palette[:12], strict=True))
        more = f", ... ({len(names)})" if len(names) > 12 else ""
        raise WaltError(
            f"{argument}: {int(wrong.sum())} pixels are of no known class, the first is #{odd:06x}; "
            f"known: {known}{more}"
        )
    return found.astype(np.uint16)


def check_classes(sketch: npt.NDArray[np.integer], names: Sequence[str], argument: str = "sketch") -> None:
    """A WaltError unless `sketch` holds integers from 0 to `len(names) - 1` alone."""
    if not np.issubdtype(sketch.dtype, np.integer) or sketch.ndim < 2 or not sketch.size:
        raise WaltError(f"{argument}: must be integers (..., H, W), got {sketch.dtype} {sketch.shape}")
    low, high = int(sketch.min()), int(sketch.max())
    if low < 0 or high >= len(names):
        odd = low if low < 0 else high
        raise WaltError(f"{argument}: class {odd} is not known; there are 0 to {len(names) - 1} ({BACKGROUND} is 0)")


# --------------------------------------------------------------------------------------------------------------- files


def write_sketch(sketch: Sketch, path: str | Path, names: Sequence[str]) -> None:
    """Writes one frame `(H, W)` or `(1, H, W)` as a PNG, and `(T, H, W)` as a folder of PNGs that must not exist yet.

    Raises:
        WaltError: an unknown class, a name that cannot be written.
    """
    coloured = to_colours(sketch, names)
    if coloured.ndim == 3 or (len(coloured) == 1 and Path(path).suffix):
        write_image(coloured.reshape(coloured.shape[-3:]), check_output(path, (".png",)))
        return
    path = Path(path)
    if path.exists():
        raise WaltError(f'cannot write the sketch "{path}": it exists')
    if not path.parent.is_dir():
        raise WaltError(f'cannot write the sketch "{path}": there is no folder "{path.parent}"')
    room = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        room.mkdir()
        for number, frame in enumerate(coloured):
            write_image(frame, room / f"{number:04d}.png")
        os.replace(room, path)
    except OSError as error:
        raise WaltError(f'cannot write the sketch "{path}": {error.strerror or error}') from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def read_sketch(path: str | Path, names: Sequence[str]) -> Sketch:
    """The sketch `(T, H, W)` in a PNG (T = 1) or a folder of PNGs, frame by frame in the order of their names.

    Raises:
        WaltError: nothing there, frames of different sizes, a colour of no class, a format that loses colours.
    """
    path = Path(path)
    files = sorted(path.glob("*.png")) if path.is_dir() else [path]
    if not files:
        raise WaltError(f'the sketch "{path}" is a folder without PNG files')
    if files[0].suffix.lower() != ".png":
        raise WaltError(f'the sketch "{path}" must be a PNG or a folder of PNGs: other formats change its colours')
    frames = [from_colours(read_image(file), names, f'sketch "{file}"') for file in files]
    if any(frame.shape != frames[0].shape for frame in frames):
        raise WaltError(f'the sketch "{path}" has frames of different sizes')
    return np.stack(frames)
