"""Reading and writing video and image files (PyAV, Pillow).

A file is written under a temporary name in its own folder and put in place by one `os.replace`; whatever goes wrong (a
full disk, Ctrl-C), nothing half-written stays behind. Pixels are uint8 RGB, `(T, H, W, 3)` or `(H, W, 3)`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from walt.errors import WaltError

Pixels = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def is_image_path(path: str | Path) -> bool:
    """Whether `path` ends in one of IMAGE_SUFFIXES."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def check_output(path: str | Path, suffixes: tuple[str, ...] = VIDEO_SUFFIXES + IMAGE_SUFFIXES) -> Path:
    """`path` as a Path when a file of a known kind can be written there; otherwise a WaltError that says why not."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise WaltError(f'cannot write "{path}": the name must end in {", ".join(suffixes)}')
    if path.is_dir():
        raise WaltError(f'cannot write "{path}": it is a folder')
    if not path.parent.is_dir():
        raise WaltError(f'cannot write "{path}": there is no folder "{path.parent}"')
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise WaltError(f'cannot write "{path}": folder "{path.parent}" is not writable')
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: it becomes `path` when the block ends well and is removed when it does not.

    Raises:
        WaltError: in place of an OSError or a PyAV error of the block, naming `path` and the cause.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, av.error.FFmpegError) as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise WaltError(f'cannot write "{path}": {reason}') from error
    finally:
        temporary.unlink(missing_ok=True)


def write_video(frames: Pixels, path: str | Path, fps: float = 8) -> None:
    """Writes H.264 (yuv420p, index first), which every player opens.

    Args:
        frames: uint8 `(T, H, W, 3)`, H and W even (4:2:0 colour).
        path: ends in one of VIDEO_SUFFIXES.
        fps: frames per second, positive.

    Raises:
        WaltError: frames or name that do not fit, a folder that cannot be written, a full disk.
    """
    path = check_output(path, VIDEO_SUFFIXES)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise WaltError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    count, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise WaltError(f"H.264 needs an even height and width, got {height}x{width}")
    if not fps > 0:
        raise WaltError(f"fps must be positive, got {fps}")
    with replacing(path) as temporary:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "16", "preset": "medium"}
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
            container.mux(stream.encode())
        # Closing a container can lose an error of its last write: count what truly arrived.
        with av.open(str(temporary)) as container:
            arrived = sum(1 for packet in container.demux(video=0) if packet.size)
        if arrived != count:
            raise OSError(None, f"only {arrived} of {count} frames reached the file (is the disk full?)")


def write_image(pixels: Pixels, path: str | Path) -> None:
    """Writes uint8 `(H, W, 3)` as the kind of image that the name of `path` says (one of IMAGE_SUFFIXES)."""
    path = check_output(path, IMAGE_SUFFIXES)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise WaltError(f"an image must be uint8 (H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary)


def read_video(path: str | Path) -> tuple[Pixels, float]:
    """All frames of the first video stream, uint8 `(T, H, W, 3)`, and its frames per second.

    Raises:
        WaltError: the file is missing, is no video, or breaks off.
    """
    path = _existing(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise WaltError(f'cannot read "{path}": it holds no video')
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps, promised = float(stream.average_rate or 0), stream.frames
    except (OSError, av.error.FFmpegError) as error:
        raise WaltError(f'cannot read "{path}" as a video: {error.strerror or error}') from error
    if not frames or len(frames) < promised:
        raise WaltError(f'cannot read "{path}": it breaks off after {len(frames)} of {promised} frames')
    return np.stack(frames), fps


def read_image(path: str | Path) -> Pixels:
    """uint8 RGB `(H, W, 3)`; a missing or corrupt file is a WaltError."""
    path = _existing(path)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise WaltError(f'cannot read "{path}" as an image: {error}') from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise WaltError(f'there is no file "{path}"')
    return path
