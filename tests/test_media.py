"""Files: what is written reads back, opens everywhere, and never stays half-written."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from walt.errors import WaltError
from walt.media import (
    MediaError,
    VideoWriter,
    read_image,
    read_video,
    stream_video,
    to_pixels,
    write_image,
    write_video,
)


@pytest.fixture
def frames() -> np.ndarray:
    """A smooth moving pattern, uint8 (9, 48, 64, 3)."""
    y, x = np.mgrid[0:48, 0:64]
    shapes = [np.sin((x + 4 * t) / 9.0) + np.cos((y - 2 * t) / 7.0) for t in range(9)]
    return np.stack([np.stack([60 * s + 128, 40 * s + 100, 90 - 30 * s], -1) for s in shapes]).astype(np.uint8)


def test_video_round_trip_and_format(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "x.mp4"
    write_video(frames, path, fps=8)
    back, fps = read_video(path)
    assert back.shape == frames.shape and fps == 8
    assert np.abs(back.astype(int) - frames).mean() < 6
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first (faststart)"
    assert os.listdir(tmp_path) == ["x.mp4"]


def test_image_round_trip(tmp_path: Path, frames: np.ndarray) -> None:
    write_image(frames[0], tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png"), frames[0])
    assert os.listdir(tmp_path) == ["x.png"]


def test_tensors_become_pixels() -> None:
    """Rounded to the nearest, cut to [0, 1], channels last."""
    values = torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.1], dtype=torch.float64)
    video = values.view(1, 1, 6, 1).expand(2, 3, 6, 4)
    assert to_pixels(video).dtype == np.uint8 and to_pixels(video).shape == (2, 6, 4, 3)
    assert to_pixels(video)[1, :, 3, 2].tolist() == [0, 0, 0, 1, 255, 255]
    every = torch.arange(256).view(1, 256, 1).expand(3, -1, 2)
    for dtype in (torch.float32, torch.float16):
        assert np.array_equal(to_pixels((every / 255).to(dtype))[..., 0], every[0].numpy())


def test_streamed_file_is_the_same(tmp_path: Path, frames: np.ndarray) -> None:
    write_video(frames, tmp_path / "whole.mp4", fps=8)
    with VideoWriter(tmp_path / "pieces.mp4", fps=8) as writer:
        for piece in (frames[:4], frames[4:5], frames[5:]):
            writer.add(piece)
        assert not (tmp_path / "pieces.mp4").exists(), "only whole files appear"
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    pieces = list(stream_video(tmp_path / "pieces.mp4", 4))
    assert [len(piece) for piece in pieces] == [4, 4, 1]
    assert np.array_equal(np.concatenate(pieces), read_video(tmp_path / "whole.mp4")[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_a_stream_that_breaks_off_leaves_nothing(
    tmp_path: Path, frames: np.ndarray, error: type[BaseException]
) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"the old file")
    with pytest.raises(error), VideoWriter(path) as writer:
        writer.add(frames)
        raise error
    assert os.listdir(tmp_path) == ["x.mp4"] and path.read_bytes() == b"the old file"


def test_streams_refuse(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "x.mp4"
    with pytest.raises(WaltError, match="at least one frame"), VideoWriter(path):
        pass
    with pytest.raises(WaltError, match="must be of one size"), VideoWriter(path) as writer:
        writer.add(frames)
        writer.add(frames[:, :24])
    with pytest.raises(WaltError, match="even height and width"), VideoWriter(path) as writer:
        writer.add(frames[:, 1:])
    with pytest.raises(WaltError, match="fps must be positive"):
        VideoWriter(path, 0)
    with pytest.raises(WaltError, match="there is no folder"):
        VideoWriter(tmp_path / "no" / "x.mp4")
    assert os.listdir(tmp_path) == []
    with pytest.raises(WaltError, match="there is no file"):
        next(stream_video(path))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_stays_when_writing_breaks_off(
    tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"the old file")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else WaltError
    with pytest.raises(expected) as caught:
        write_video(frames, path)
    if expected is WaltError:
        assert "x.mp4" in str(caught.value) and "No space left" in str(caught.value)
    assert os.listdir(tmp_path) == ["x.mp4"] and path.read_bytes() == b"the old file"


def test_interrupted_in_the_middle_of_encoding(
    tmp_path: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def slow(array: np.ndarray) -> np.ndarray:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return array

    monkeypatch.setattr(np, "ascontiguousarray", slow)
    with pytest.raises(KeyboardInterrupt):
        write_video(frames, tmp_path / "x.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "limit"), [("x.mp4", 4096), ("x.png", 2048)])
def test_full_disk(tmp_path: Path, name: str, limit: int) -> None:
    """A file size limit makes the system refuse the write, as a full disk does."""
    code = f"""
import numpy as np
from walt.errors import WaltError
from walt.media import write_image, write_video
noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
path = {str(tmp_path / name)!r}
try:
    write_video(noise, path) if path.endswith("mp4") else write_image(noise[0], path)
except WaltError as error:
    print("WaltError:", error)
"""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=restrict, env=env)
    assert done.stdout.startswith("WaltError: cannot write") and name in done.stdout, done.stdout + done.stderr
    assert os.listdir(tmp_path) == []


def test_bad_targets_and_frames(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(WaltError, match=r'x\.gif".*must end in \.mp4'):
        write_video(frames, tmp_path / "x.gif")
    with pytest.raises(WaltError, match="no folder"):
        write_video(frames, tmp_path / "none" / "x.mp4")
    with pytest.raises(WaltError, match="it is a folder"):
        (tmp_path / "dir.mp4").mkdir()
        write_video(frames, tmp_path / "dir.mp4")
    with pytest.raises(WaltError, match="even height and width, got 47x64"):
        write_video(frames[:, :47], tmp_path / "x.mp4")
    with pytest.raises(WaltError, match=r"uint8 \(T, H, W, 3\), got float64"):
        write_video(frames / 255.0, tmp_path / "x.mp4")  # type: ignore[arg-type]
    with pytest.raises(WaltError, match="fps must be positive"):
        write_video(frames, tmp_path / "x.mp4", fps=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path, frames: np.ndarray) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WaltError, match="not writable"):
            write_video(frames, tmp_path / "x.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_corrupt_and_missing_input(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(WaltError, match="there is no file"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(WaltError, match=r'cannot read ".*junk\.mp4" as a video'):
        read_video(tmp_path / "junk.mp4")
    (tmp_path / "junk.png").write_bytes(b"junk" * 100)
    with pytest.raises(WaltError, match=r'cannot read ".*junk\.png" as an image'):
        read_image(tmp_path / "junk.png")
    write_video(frames, tmp_path / "x.mp4")
    data = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(WaltError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4")


def test_pictures_and_videos_are_read_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As telephones store them: a picture with an orientation, a film with a rotation."""
    picture, exif = Image.new("RGB", (32, 16), "blue"), Image.Exif()
    picture.paste("red", (0, 0, 16, 16))
    exif[0x0112] = 6
    picture.save(tmp_path / "x.png", exif=exif)
    upright = read_image(tmp_path / "x.png")
    assert upright.flags.writeable  # so that torch shares its memory without a warning
    assert (
        upright.shape == (32, 16, 3)
        and upright[0, 0].tolist() == [255, 0, 0]
        and upright[-1, 0].tolist() == [0, 0, 255]
    )

    lying = np.zeros((3, 32, 64, 3), np.uint8)
    lying[:, :, :32] = 255
    write_video(lying, tmp_path / "x.mp4", fps=8)
    box = (tmp_path / "x.mp4").read_bytes()
    place = box.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layer, volume: then the matrix
    plain = np.frombuffer(box[place : place + 36], ">i4").tolist()
    assert plain == [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "turned.mp4").write_bytes(box[:place] + turned + box[place + 36 :])
    whole, _ = read_video(tmp_path / "turned.mp4")
    assert whole.shape == (3, 64, 32, 3)
    assert whole[:, :16].min() > 200 and whole[:, -16:].max() < 50  # a quarter turn clockwise: left is above
    assert np.array_equal(np.concatenate(list(stream_video(tmp_path / "turned.mp4", 2))), whole)


def test_errors_of_media_come_whole_from_other_processes() -> None:
    error = pickle.loads(pickle.dumps(MediaError("damaged", "frame 3")))
    assert isinstance(error, MediaError) and (error.reason, str(error)) == ("damaged", "frame 3")
