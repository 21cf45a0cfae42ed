"""Small real media for tests: frames that carry their number, and broken files of every kind."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

BITS = 8


def numbered(count: int, height: int = 32, width: int = 64, first: int = 0) -> np.ndarray:
    """Frames `(T, H, W, 3)` whose number stands in them as black and white bars, one a bit."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        for bit in range(BITS):
            bar = slice(bit * width // BITS, (bit + 1) * width // BITS)
            frames[i, :, bar] = 255 * (((first + i) >> bit) & 1)
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers in frames, read at the middle of each bar, at any scale."""
    width = frames.shape[2]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    middle = frames.shape[1] // 2
    return [sum(int(frame[middle, x].mean() > 127) << bit for bit, x in enumerate(middles)) for frame in frames]


def video_bytes(
    frames: np.ndarray, rate: float | Fraction = 8, kind: str = "mp4", codec: str = "libx264", gop: int = 12
) -> bytes:
    """A video file as bytes; `kind` is a container of FFmpeg (mp4, webm, matroska), or gif or webp by Pillow."""
    out = io.BytesIO()
    if kind in ("gif", "webp"):
        pictures = [Image.fromarray(frame) for frame in frames]
        extra = {"lossless": True} if kind == "webp" else {}
        pictures[0].save(out, kind, save_all=True, append_images=pictures[1:], duration=round(1000 / rate), **extra)
        return out.getvalue()
    with av.open(out, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.gop_size = gop
        stream.options = {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def image_bytes(pixels: np.ndarray, kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def noise(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def audio_only() -> bytes:
    """An .mp4 whose only stream is sound."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def huge_png() -> bytes:
    """A PNG of 8x8 whose header promises 60000x60000."""
    data = bytearray(image_bytes(noise(0, 8, 8)))
    data[16:24] = struct.pack(">II", 60000, 60000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def corrupt_jpeg() -> bytes:
    """A JPEG with a good header and end, and no picture between: found only when it is decoded."""
    data = image_bytes(noise(1), "jpeg")
    scan = data.index(b"\xff\xda")
    return data[: scan + 20] + data[-2:]


def unknown_codec() -> bytes:
    """An .mp4 whose video stream names a codec that nobody has."""
    data = bytearray(video_bytes(numbered(20)))
    while (place := data.find(b"avc1", 32)) >= 0:
        data[place : place + 4] = b"zzzz"
    return bytes(data)


def damaged_middle() -> bytes:
    """An .mp4 whose picture data turn to noise after the first frames: found only when they are decoded."""
    frames = np.stack([noise(i, 64, 96) for i in range(24)])
    data = bytearray(video_bytes(frames, gop=100))
    start = data.index(b"mdat") - 4
    (length,) = struct.unpack(">I", data[start : start + 4])
    half, end = start + length * 2 // 3, start + length
    data[half:end] = np.random.default_rng(0).integers(0, 255, end - half, dtype=np.uint8).tobytes()
    return bytes(data)


def broken(kind: str) -> tuple[str, bytes]:
    """(suffix, content) of a broken item of one of KINDS."""
    good = video_bytes(numbered(20))
    table = {
        "truncated mp4": lambda: (".mp4", good[: len(good) // 2]),
        "zero bytes": lambda: (".mp4", b""),
        "text as mp4": lambda: (".mp4", b"this is no video at all, but a text\n" * 20),
        "sound only": lambda: (".mp4", audio_only()),
        "unknown codec": lambda: (".mp4", unknown_codec()),
        "corrupt jpeg": lambda: (".jpg", corrupt_jpeg()),
        "damaged frames": lambda: (".mp4", damaged_middle()),
        "huge header": lambda: (".png", huge_png()),
        "no caption": lambda: (".mp4", good),
        "too short": lambda: (".mp4", video_bytes(numbered(2))),
        "cut off webp": lambda: (".webp", video_bytes(numbered(12), kind="webp")[:-200]),
    }
    return table[kind]()


# Kind of damage, and the reason that the account must give.
KINDS = {
    "truncated mp4": "cut off",
    "zero bytes": "empty",
    "text as mp4": "unreadable",
    "sound only": "no video",
    "unknown codec": "codec",
    "corrupt jpeg": "damaged",
    "damaged frames": "damaged",
    "huge header": "too large",
    "no caption": "no caption",
    "too short": "too short",
    "cut off webp": "cut off",
}


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar file in WebDataset's layout."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def good_members(count: int, first: int = 0, frames: int = 20) -> list[tuple[str, bytes]]:
    """Captioned numbered clips and images, alternating, as members of a shard."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        if i % 2:
            members += [(f"{i:04d}.png", image_bytes(noise(i))), (f"{i:04d}.txt", f"image {i}".encode())]
        else:
            clip = video_bytes(numbered(frames, first=i))
            members += [(f"{i:04d}.mp4", clip), (f"{i:04d}.json", json.dumps({"caption": f"clip {i}"}).encode())]
    return members
