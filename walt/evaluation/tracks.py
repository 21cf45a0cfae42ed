"""What a clip's plain ground looks like and where its one subject is, frame by frame: by colour alone, no network.

    find_subject   the ground's colour, the pixels that stand out from it, and their track
    name_motion    the motion whose path is nearest to a track

Letters: T frames, H W pixels of the clip, h w pixels of its reduction to about 64 lines, on which everything is
measured. Lengths are fractions of the clip's height, y points down, times are seconds of 8 frames each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from walt.data.emoji import FPS
from walt.errors import WaltError

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

LINES = 64
RING = 3  # pixels of the reduced frame's border that tell the ground
CONTRAST = 6.0  # least difference from the ground (CIE 1976) of a subject's pixel
SPECK = 0.004  # of the frame: smaller patches are no subject

# The least a motion does in a whole scene, to be told from staying: below half of it a clip "stays". A room is the free
# space above and below the subject, halved, in which the theatre measures its paths; real scenes do a little more.
ACROSS = 0.56  # heights, sideways
UP_DOWN = 1.4  # rooms
GROWTH = 0.84  # natural logarithm of the size
RADIUS = 0.7  # rooms, of a circle
HOP = 1.2  # rooms, of a bounce
LEAST_ROOM = 0.1  # heights
SIZE_WEIGHT = 0.5  # heights that the natural logarithm of the size counts for
TURNING = (0.9, 1.0, 1.1)  # paces of circles, times the theatre's
HOPPING = (0.75, 1.0, 1.25)  # and of bounces
SCENE_SECONDS = 28 / FPS  # a scene of the theatre, of which a shorter clip shows the beginning


def lab(rgb: NDArray[np.floating]) -> Floats:
    """sRGB in 0..1 to CIELAB (white D65), `(..., 3)`; a difference of about 2 is just visible."""
    rgb = np.asarray(rgb, np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192,
                       0.9503041]])  # fmt: skip
    xyz = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def nearest_colour(ground: Floats, colours: dict[str, tuple[int, int, int]]) -> str:
    """The name of the sRGB colour (0..255) with the least CIELAB distance from `ground` `(3,)`."""
    distances = {name: float(np.linalg.norm(lab(np.array(rgb) / 255) - ground)) for name, rgb in colours.items()}
    return min(distances, key=distances.__getitem__)


# ------------------------------------------------------------------------------------------------------ the subject


@dataclass(frozen=True)
class Track:
    """A clip's ground and the subject on it.

    ground: CIELAB, `(3,)`. mask: the subject's pixels, `(T, h, w)`. x, y, size: its middle and the root of its area,
    `(T,)`; box: left, top, right, bottom, `(T, 4)`; not a number in frames where no subject stands out.
    """

    ground: Floats
    mask: Mask
    x: Floats
    y: Floats
    size: Floats
    box: Floats

    @property
    def seen(self) -> Mask:
        """The frames that show a subject, `(T,)`."""
        return ~np.isnan(self.x)


def find_subject(clip: Pixels) -> Track:
    """The ground is the median colour of the border; the subject is the patch around the densest place that differs.

    Args:
        clip: uint8 RGB `(T, H, W, 3)`.

    Raises:
        WaltError: another shape or dtype, or a side under 16 pixels.
    """
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8:
        raise WaltError(f"clip: expected uint8 (T, H, W, 3), got {clip.dtype} {clip.shape}")
    if len(clip) < 1 or min(clip.shape[1:3]) < 16:
        raise WaltError(f"clip: expected at least one frame of 16 x 16 pixels, got {clip.shape}")
    colours = lab(_reduce(clip))
    ring = np.ones(colours.shape[1:3], np.bool_)
    ring[RING:-RING, RING:-RING] = False
    border = colours[:, ring]  # (T, pixels of the ring, 3)
    grounds = np.median(border, axis=1)
    noise = np.median(np.linalg.norm(border - grounds[:, None], axis=-1), axis=1)
    away = np.linalg.norm(colours - grounds[:, None, None], axis=-1)
    mask = _main_patch(_open(away > np.maximum(CONTRAST, 3 * noise)[:, None, None]))
    middles, sizes, boxes = zip(*(_measure(frame) for frame in mask), strict=True)
    x, y = np.array(middles).T
    return Track(np.median(border.reshape(-1, 3), axis=0), mask, x, y, np.array(sizes), np.array(boxes))


def _reduce(clip: Pixels) -> NDArray[np.float32]:
    """`(T, H, W, 3)` in 0..255 to `(T, h, w, 3)` in 0..1: means over whole squares, what is left over is cut off."""
    step = max(1, clip.shape[1] // LINES)
    h, w = clip.shape[1] // step, clip.shape[2] // step
    squares = clip[:, : h * step, : w * step].reshape(len(clip), h, step, w, step, 3)
    return squares.mean(axis=(2, 4), dtype=np.float32) / np.float32(255)


def _grow(mask: Mask, by: int = 1) -> Mask:
    """True within `by` pixels, along both axes, of a true pixel of `(T, h, w)`."""
    for axis in (1, 2):
        padded = np.pad(mask, [(by, by) if i == axis else (0, 0) for i in range(3)])
        length = mask.shape[axis]
        mask = np.logical_or.reduce([padded.take(range(i, i + length), axis) for i in range(2 * by + 1)])
    return mask


def _open(mask: Mask) -> Mask:
    """Without what a square of 3 x 3 does not fit into: specks go, edges stay."""
    return _grow(~_grow(~mask))


def _main_patch(mask: Mask) -> Mask:
    """In each frame the pixels that hang together with its densest 17 x 17; gaps of up to four do not part them."""
    frames, h, w = mask.shape
    sums = np.pad(mask, ((0, 0), (9, 8), (9, 8))).cumsum(1, dtype=np.int32).cumsum(2)
    density = (sums[:, 17:, 17:] - sums[:, :-17, 17:] - sums[:, 17:, :-17] + sums[:, :-17, :-17]) * mask
    seed = np.zeros((frames, h * w), np.bool_)
    seed[np.arange(frames), density.reshape(frames, -1).argmax(axis=1)] = True
    joined = _grow(mask, 2)
    patch = seed.reshape(mask.shape) & mask
    while True:
        wider = _grow(patch, 2) & joined
        if (wider == patch).all():
            return patch & mask
        patch = wider


def _measure(mask: Mask) -> tuple[tuple[float, float], float, tuple[float, float, float, float]]:
    """Middle, size and box of the true pixels of `(h, w)`, in heights; not a number if they are but a speck."""
    lines = len(mask)
    ys, xs = np.nonzero(mask)
    if len(ys) < SPECK * mask.size:
        none = math.nan
        return (none, none), none, (none, none, none, none)
    left, right = (float(x) / lines for x in np.add(np.quantile(xs, (0.005, 0.995)), (0, 1)))
    top, bottom = (float(y) / lines for y in np.add(np.quantile(ys, (0.005, 0.995)), (0, 1)))
    middle = (float(xs.mean() + 0.5) / lines, float(ys.mean() + 0.5) / lines)
    return middle, math.sqrt(len(ys)) / lines, (left, top, right, bottom)


# ------------------------------------------------------------------------------------------------------- the motion


def name_motion(track: Track, motions: Iterable[str], seconds: float = SCENE_SECONDS) -> str:
    """The motion whose nearest path has the least mean square distance from the track, "" when too little is seen.

    A motion's paths are all that theatre's scenes could show of it, of any place, direction and extent from the
    constants above on; log size is a third coordinate. So nothing here is trained.

    Args:
        motions: names to choose from, keys of `walt.data.emoji.MOTIONS`.
        seconds: length of the whole scene (or of the clip, if longer): it sets the pace of circles and bounces.

    Raises:
        WaltError: a motion without a path here.
    """
    paths = {name: _path_distance(name) for name in motions}
    seen = track.seen
    if seen.sum() < max(3, len(seen) / 2):
        return ""
    seconds = max(seconds, (len(seen) - 1) / FPS)
    tall = float(np.median(track.box[seen, 3] - track.box[seen, 1]))
    walk = Walk(
        times=np.flatnonzero(seen) / FPS / seconds,
        place=track.x[seen] + 1j * track.y[seen],
        size=SIZE_WEIGHT * np.log(track.size[seen]),
        room=max(LEAST_ROOM, (1 - tall) / 2),
        seconds=seconds,
    )
    distances = {name: distance(walk) for name, distance in paths.items()}
    return min(distances, key=distances.__getitem__)


@dataclass(frozen=True)
class Walk:
    """The frames of a track that show a subject.

    times: fractions of the scene, `(n,)`. place: x + iy, `(n,)`. size: its weighted logarithm, `(n,)`. room: heights.
    seconds: of the whole scene.
    """

    times: Floats
    place: NDArray[np.complex128]
    size: Floats
    room: float
    seconds: float


Distance = Callable[[Walk], float]  # the mean square distance from the nearest path of a motion


def _path_distance(motion: str) -> Distance:
    if motion not in _PATHS:
        raise WaltError(f"motions: there is no path for {motion!r}; known: {', '.join(_PATHS)}")
    return _PATHS[motion]


def _left(values: NDArray[Any], pattern: NDArray[Any] | None = None, least: float = -math.inf) -> float:
    """Mean square of what a constant plus a multiple of the pattern, of at least `least`, leaves of the values.

    For complex numbers the multiple turns and scales, and `least` is its magnitude.
    """
    values = values - values.mean()
    if pattern is not None:
        pattern = pattern - pattern.mean()
        factor = np.vdot(pattern, values) / np.vdot(pattern, pattern).real
        if np.iscomplexobj(pattern):
            factor *= max(1.0, least / max(abs(factor), 1e-9))
        else:
            factor = max(factor, least)
        values = values - factor * pattern
    return float(np.mean(np.abs(values) ** 2))


def _stays(walk: Walk) -> float:
    return _left(walk.place) + _left(walk.size)


def _moves_across(sign: int) -> Distance:
    return lambda walk: _left(walk.place.real, sign * walk.times, ACROSS) + _left(walk.place.imag) + _left(walk.size)


def _moves_up_down(sign: int) -> Distance:
    return lambda walk: (
        _left(walk.place.imag, sign * walk.times, UP_DOWN * walk.room) + _left(walk.place.real) + _left(walk.size)
    )


def _grows(sign: int) -> Distance:
    return lambda walk: _left(walk.place) + _left(walk.size, sign * walk.times, SIZE_WEIGHT * GROWTH)


def _circles(walk: Walk) -> float:
    turns = max(1.0, walk.seconds / 2.5)
    circles = (np.exp(2j * math.pi * sign * tempo * turns * walk.times) for sign in (1, -1) for tempo in TURNING)
    return min(_left(walk.place, circle, RADIUS * walk.room) for circle in circles) + _left(walk.size)


def _bounces(walk: Walk) -> float:
    hops = max(2, round(walk.seconds / 1.1))
    beats = ((hops * tempo * walk.times + shift) % 1.0 for tempo in HOPPING for shift in (0.0, 0.25, 0.5, 0.75))
    vertical = min(_left(walk.place.imag, -4 * beat * (1 - beat), HOP * walk.room) for beat in beats)
    return vertical + _left(walk.place.real, walk.times) + _left(walk.size)


_PATHS: dict[str, Distance] = {
    "stays": _stays,
    "moves left to right": _moves_across(1),
    "moves right to left": _moves_across(-1),
    "rises": _moves_up_down(-1),
    "falls": _moves_up_down(1),
    "comes closer": _grows(1),
    "goes away": _grows(-1),
    "circles": _circles,
    "bounces": _bounces,
}
