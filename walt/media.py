"""Reading and writing video and image files (PyAV, Pillow).

A file is written under a temporary name in its own folder and put in place by one `os.replace`; whatever goes wrong (a
full disk, Ctrl-C), nothing half-written stays behind. Pixels are uint8 RGB, `(T, H, W, 3)` or `(H, W, 3)`.

Training data are read in two steps: `probe` says what a file holds from its header and first frame, `read_window`
decodes just the frames that are shown at given times, at a given size. What they refuse they refuse with a `MediaError`,
whose `reason` is one of REASONS.
"""

from __future__ import annotations

import io
import os
import secrets
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from walt.errors import WaltError

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# What can be read as training data; a .gif or .webp of one frame is an image.
VIDEO_SOURCES = (*VIDEO_SUFFIXES, ".webm", ".mkv", ".avi")
ANIMATED_SOURCES = (".gif", ".webp")
MEDIA_SOURCES = (*VIDEO_SOURCES, *ANIMATED_SOURCES, ".png", ".jpg", ".jpeg")

MAX_FPS = 1000.0

MAX_PIXELS = 2**26
"""Width x height of the largest frame that is decoded (8K is half of it): a header may promise anything."""

REASONS = {
    "empty": "no bytes",
    "cut off": "the file ends early",
    "unreadable": "no such container or image",
    "no video": "no video stream",
    "codec": "no decoder",
    "damaged": "decoding fails",
    "too large": "more pixels than allowed",
    "too small": "fewer pixels than wanted",
    "too short": "fewer frames than the shortest clip",
    "no caption": "no caption",
}


class MediaError(WaltError):
    """A file that cannot be used; `reason` is one of REASONS, the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        """As it comes from another process: an exception is made again of what its message alone would not give."""
        return MediaError, (self.reason, str(self))


def to_pixels(frames: Tensor) -> Pixels:
    """`(..., 3, H, W)` in [0, 1], on any device, to uint8 `(..., H, W, 3)`; values outside are cut to it."""
    return (frames.float() * 255).round_().clamp_(0, 255).byte().movedim(-3, -1).cpu().numpy()


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


def check_fps(fps: float, name: str = "fps") -> None:
    """Raises a WaltError unless a video can be played at so many frames per second."""
    if not 0 < fps <= MAX_FPS:
        raise WaltError(f"{name} must be positive and at most {MAX_FPS:g}, got {fps}")


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
    _check_frames(frames)
    with VideoWriter(path, fps) as writer:
        writer.add(frames)


class VideoWriter:
    """Writes an H.264 file while its frames are made: `with VideoWriter(path, fps) as writer: writer.add(frames)`.

    It takes the memory of a few frames, whatever the length. The file is at `path` when the block ends well, and nothing
    is there when it does not.

    Args:
        path: ends in one of VIDEO_SUFFIXES.
        fps: frames per second, positive.

    Raises:
        WaltError: frames or name that do not fit, a folder that cannot be written, a full disk, no frame at all.
    """

    def __init__(self, path: str | Path, fps: float = 8) -> None:
        self.path = check_output(path, VIDEO_SUFFIXES)
        check_fps(fps)
        self.fps = fps
        self.count = 0
        self._size: tuple[int, int] | None = None
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            self._temporary = stack.enter_context(replacing(self.path))
            stack.push(self._check)
            options = {"movflags": "+faststart"}
            self._container = stack.enter_context(av.open(str(self._temporary), "w", format="mp4", options=options))
            stack.push(self._flush)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, frames: Pixels) -> None:
        """Appends uint8 `(n, H, W, 3)`, H and W even and always the same."""
        _check_frames(frames)
        height, width = frames.shape[1:3]
        if self._size not in (None, (height, width)):
            raise WaltError(f"the frames of a video must be of one size, got {self._size} and then {(height, width)}")
        if self._stream is None:
            self._size = height, width
            self._stream = self._container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            # x264 holds as many frames as it looks ahead, 1.5 MB each at 512x896; 40 unless told otherwise.
            self._stream.options = {"crf": "16", "preset": "medium", "rc-lookahead": "8"}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            self._container.mux(self._stream.encode(frame))
            self.count += 1

    def _flush(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())

    def _check(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closing a container can lose an error of its last write: counts what truly arrived."""
        if kind is not None:
            return
        if not self.count:
            raise WaltError(f'cannot write "{self.path}": a video needs at least one frame')
        with av.open(str(self._temporary)) as container:
            arrived = sum(1 for packet in container.demux(video=0) if packet.size)
        if arrived != self.count:
            raise OSError(None, f"only {arrived} of {self.count} frames reached the file (is the disk full?)")


def _check_frames(frames: Pixels) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise WaltError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise WaltError(f"H.264 needs an even height and width, got {height}x{width}")


def write_image(pixels: Pixels, path: str | Path) -> None:
    """Writes uint8 `(H, W, 3)` as the kind of image that the name of `path` says (one of IMAGE_SUFFIXES)."""
    path = check_output(path, IMAGE_SUFFIXES)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise WaltError(f"an image must be uint8 (H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary)


def read_video(path: str | Path) -> tuple[Pixels, float]:
    """All frames of the first video stream, uint8 `(T, H, W, 3)`, turned upright, and its frames per second.

    Raises:
        WaltError: the file is missing, is no video, or breaks off.
    """
    frames, rates = zip(*_decoded(path), strict=True)
    return np.stack(frames), rates[0]


def stream_video(path: str | Path, frames: int = 16) -> Iterator[Pixels]:
    """The frames of `read_video` in pieces of at most so many, decoded as they are asked for; the same errors."""
    decoded = _decoded(path)
    while held := [pixels for pixels, _ in islice(decoded, frames)]:
        yield np.stack(held)


def _decoded(path: str | Path) -> Iterator[tuple[Pixels, float]]:
    """Every frame of `read_video`, and the frames per second."""
    path = _existing(path)
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise WaltError(f'cannot read "{path}": it holds no video')
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                count += 1
                yield _upright_frame(frame), float(stream.average_rate or 0)
            promised = stream.frames
    except (OSError, av.error.FFmpegError) as error:
        raise WaltError(f'cannot read "{path}" as a video: {error.strerror or error}') from error
    if not count or count < promised:
        raise WaltError(f'cannot read "{path}": it breaks off after {count} of {promised} frames')


def read_image(path: str | Path) -> Pixels:
    """uint8 RGB `(H, W, 3)`, turned as its EXIF orientation asks; a missing or corrupt file is a WaltError."""
    path = _existing(path)
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise WaltError(f'cannot read "{path}" as an image: {error}') from error


# ---------------------------------------------------------------------------------------------------------------------
# Training data: what a file holds, and the frames of a window of it


@dataclass(frozen=True)
class Probe:
    """What a file holds. `height` and `width` are as shown (turned upright); an image has one frame and no `seconds`.

    `frames` of a container that does not count them is an estimate from its length.
    """

    kind: Literal["image", "video"]
    height: int
    width: int
    frames: int
    seconds: float


def probe(file: Path | bytes, suffix: str) -> Probe:
    """Reads the header and, of a video, the first frame; of a JPEG all. The file's end shows whether it is cut off.

    Args:
        file: a path, or the whole content.
        suffix: lower case, one of MEDIA_SOURCES: which reader to use.

    Raises:
        MediaError: empty, cut off, unreadable, no video, codec, damaged, too large.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if not size:
        raise MediaError("empty", "zero bytes")
    with _opened(file) as stream:
        _check_end(stream, size, suffix)
    if suffix in VIDEO_SOURCES:
        return _probe_video(file)
    with _image(file) as image:
        _check_size(image.width, image.height)
        count = getattr(image, "n_frames", 1) if suffix in ANIMATED_SOURCES else 1
        if count > 1:
            with _opened(file) as stream:
                durations = _webp_durations(stream) if suffix == ".webp" else _gif_durations(image)
            return Probe("video", image.height, image.width, count, sum(durations))
        if suffix in (".jpg", ".jpeg"):
            _check_jpeg(file)
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: stored lying on its side
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return Probe("image", height, width, 1, 0.0)


def read_window(file: Path | bytes, suffix: str, times: Sequence[float], size: tuple[int, int]) -> Pixels:
    """The frames shown at `times`, scaled to cover `size` with their shape kept, and cut to it at the centre.

    A frame is shown from its own time until that of the next one, so a change of the frame rate never blends frames.

    Args:
        file: a path, or the whole content.
        suffix: lower case, one of MEDIA_SOURCES.
        times: seconds from the first frame, ascending; of an image any one.
        size: height and width.

    Returns:
        uint8 `(len(times), H, W, 3)`; transparent pixels stand on white.

    Raises:
        MediaError: damaged data, or a video that breaks off before the last time.
    """
    if suffix in VIDEO_SOURCES:
        return _video_window(file, times, size)
    with _image(file) as image:
        try:
            if getattr(image, "n_frames", 1) > 1 and suffix in ANIMATED_SOURCES:
                return _animated_window(image, times, size)
            image.draft("RGB", (size[1], size[0]))  # JPEG decodes faster at a half, quarter or eighth
            return fit(_upright(image), size)[None]
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise MediaError("damaged", str(error) or type(error).__name__) from error


def _video_window(file: Path | bytes, times: Sequence[float], size: tuple[int, int]) -> Pixels:
    with _container(file) as (container, stream):
        base, rate = float(stream.time_base or 1), float(stream.average_rate or stream.guessed_rate or 1)
        zero = (stream.start_time or 0) * base
        slack = min(0.51 * base, 0.25 / rate)  # times are rounded to the time base (Matroska: milliseconds)
        chosen: list[Pixels] = []
        if times[0] > 1.0:  # from the last key frame before the window
            container.seek(int((times[0] + zero) / base), stream=stream, backward=True)
        before: av.VideoFrame | None = None
        shown, decoded, lasts = 0.0, 0, 0.0
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise MediaError("damaged", f"frame {decoded} of the window is damaged")
            now = (frame.time if frame.time is not None else decoded / rate) - zero
            if before is None and now > times[0] + slack and times[0] > 1.0:
                raise MediaError("damaged", f"no frame can be reached at {times[0]:.3f} s")
            while before is not None and len(chosen) < len(times) and now > times[len(chosen)] + slack:
                chosen.append(_scaled(before, size))
            if len(chosen) == len(times):
                break
            before, shown, decoded = frame, now, decoded + 1
            lasts = float(frame.duration * base) if frame.duration else 0.0
        while before is not None and len(chosen) < len(times):
            # The last frame stays for its own duration; after that the file owes more.
            if times[len(chosen)] > shown + max(1.5 / rate, lasts):
                raise MediaError("cut off", f"it breaks off after {shown:.3f} s, {times[-1]:.3f} s were promised")
            chosen.append(_scaled(before, size))
    if not chosen:
        raise MediaError("damaged", "no frame can be decoded")
    return np.stack(chosen)


def _animated_window(image: Image.Image, times: Sequence[float], size: tuple[int, int]) -> Pixels:
    chosen: list[Pixels] = []
    end = 0.0
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        end += _seconds(image.info.get("duration"))
        if len(chosen) < len(times) and times[len(chosen)] < end - 1e-6:
            fitted = fit(_upright(image), size)
            while len(chosen) < len(times) and times[len(chosen)] < end - 1e-6:
                chosen.append(fitted)
        if len(chosen) == len(times):
            return np.stack(chosen)
    raise MediaError("cut off", f"it breaks off after {end:.3f} s, {times[-1]:.3f} s were promised")


def _probe_video(file: Path | bytes) -> Probe:
    with _container(file) as (container, stream):
        _check_size(stream.width, stream.height)
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError("damaged", "no frame can be decoded")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = stream.frames / rate if stream.frames and rate else (container.duration or 0) / 1e6
        frames = stream.frames or round(seconds * rate)
        if not frames or not seconds:
            raise MediaError("unreadable", "neither a length nor a frame rate is given")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
        return Probe("video", height, width, frames, seconds)


@contextmanager
def _opened(file: Path | bytes) -> Iterator[BinaryIO]:
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
        yield stream


@contextmanager
def _container(file: Path | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The open container and its first video stream; FFmpeg's errors become MediaErrors."""
    opened = False
    try:
        with av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file), "r") as container:
            opened = True
            if not container.streams.video:
                raise MediaError("no video", "it holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise MediaError("codec", "there is no decoder for its codec")
            # Several files are decoded at a time, one per worker: threads inside one would only contend.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.error.DecoderNotFoundError as error:
        raise MediaError("codec", "there is no decoder for its codec") from error
    except (OSError, av.error.FFmpegError) as error:
        # What fails while frames are read is damage; what does not even open is no video.
        raise MediaError("damaged" if opened else "unreadable", getattr(error, "strerror", "") or str(error)) from error


@contextmanager
def _image(file: Path | bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except Image.DecompressionBombError as error:
        raise MediaError("too large", str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError("unreadable", "no image that Pillow can read") from error
    with image:
        yield image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or width < 1 or height < 1:
        raise MediaError("too large", f"{width}x{height}, at most {MAX_PIXELS} pixels are decoded")


def _check_end(stream: BinaryIO, size: int, suffix: str) -> None:
    """Raises when the file's own structure says that more bytes should follow."""
    head = stream.read(12)
    if head[4:8] == b"ftyp":
        place = 0
        while place + 8 <= size:
            stream.seek(place)
            length, box = struct.unpack(">I4s", stream.read(8))
            if length == 1:
                (length,) = struct.unpack(">Q", stream.read(8).ljust(8, b"\0"))
            if length == 0:  # up to the end of the file
                return
            if length < 8 or place + length > size:
                raise MediaError("cut off", f"its {box.decode('latin-1')} box of {length} bytes ends after the file")
            place += length
    elif head[:4] == b"RIFF":
        (length,) = struct.unpack("<I", head[4:8])
        if length + 8 > size:
            raise MediaError("cut off", f"{size} of {length + 8} bytes")
    else:
        ends = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PN": b"IEND", b"GIF": b";"}
        end = ends.get(head[:3])
        stream.seek(max(0, size - 1024))  # some writers leave a few bytes behind the end
        if end is not None and end not in stream.read():
            raise MediaError("cut off", "the mark of the image's end is missing")


def _check_jpeg(file: Path | bytes) -> None:
    """Decodes a JPEG strictly: Pillow's library paints over a hole without a word, FFmpeg reports it."""
    try:
        with av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1
            next(container.decode(stream), None)
    except av.error.InvalidDataError as error:
        raise MediaError("damaged", "the picture is incomplete") from error
    except (OSError, IndexError, av.error.FFmpegError):
        return  # a kind of JPEG that FFmpeg does not know; Pillow may


def _seconds(milliseconds: object) -> float:
    """The length of an animation's frame; 0 means "as browsers do it", a tenth of a second."""
    value = float(milliseconds) if isinstance(milliseconds, int | float) else 0.0
    return value / 1000 if value > 0 else 0.1


def _gif_durations(image: Image.Image) -> list[float]:
    durations = []
    try:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            durations.append(_seconds(image.info.get("duration")))
        image.seek(0)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError("damaged", str(error)) from error
    return durations


def _webp_durations(stream: BinaryIO) -> list[float]:
    """Frame lengths from the ANMF chunks, without decoding (WebP container specification: animation)."""
    stream.seek(12)
    durations = []
    while len(head := stream.read(8)) == 8:
        length = struct.unpack("<I", head[4:])[0]
        body = stream.read(16) if head[:4] == b"ANMF" else b""
        if body:
            durations.append(_seconds(int.from_bytes(body[12:15], "little")))
        stream.seek(length + length % 2 - len(body), 1)
    return durations


def _upright(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF orientation asks, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def cover(height: int, width: int, size: tuple[int, int]) -> tuple[tuple[int, int], slice, slice]:
    """The smallest height and width of the same shape that cover `size`, and the rows and columns of its middle."""
    scale = max(size[0] / height, size[1] / width)
    whole = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    top, left = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    return whole, slice(top, top + size[0]), slice(left, left + size[1])


def fit(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """`image` scaled to cover `size` (height, width) with its shape kept, and cut at the centre."""
    (height, width), rows, columns = cover(image.height, image.width, size)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image)[rows, columns]


def _upright_frame(frame: av.VideoFrame) -> Pixels:
    """A decoded frame in RGB, turned as its rotation says: telephones film lying on their side."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def _scaled(frame: av.VideoFrame, size: tuple[int, int]) -> Pixels:
    """A decoded frame, scaled and turned to RGB in one pass, then upright and cut to `size`."""
    turns = round(frame.rotation / 90) % 4
    upright = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    (height, width), rows, columns = cover(*upright, size)
    wide, high = (height, width) if turns % 2 else (width, height)
    # By name: PyAV converts its own enum objects more slowly.
    kernel = "AREA" if wide <= frame.width else "BICUBIC"
    pixels = frame.to_ndarray(format="rgb24", width=wide, height=high, interpolation=kernel)
    return np.rot90(np.asarray(pixels, np.uint8), turns)[rows, columns]


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise WaltError(f'there is no file "{path}"')
    return path
