"""Does a super-resolution stage beat bicubic upsampling of its own input? Clip by clip, in LPIPS and in detail.

The stage is any function from a low-resolution video to a high-resolution one; the low-resolution videos may be real
(the art rendered small) or generated (what the stage before made). A generated video has no true high resolution, so
its reference is a real clip of the same caption: then LPIPS says which of the two looks more like the real thing, and
means something only as a difference between them.

A temporal stage is compared with showing frames twice and with blending neighbours, on the frames that were not given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from walt.conditioning import frames_twice
from walt.errors import WaltError
from walt.evaluation.distances import Interval, mean_interval
from walt.evaluation.metrics import high_frequency_energy, lpips, masked_psnr, psnr
from walt.media import replacing


@dataclass(frozen=True)
class Comparison:
    """Means over clips: the stage, bicubic upsampling of the same input, and the references.

    `high_frequency*` is the energy above the input's own band (see `high_frequency_energy`); `consistency` is the PSNR
    in dB of the stage's output, scaled down again, against its input: detail may be invented, content may not.
    `lpips_gain` is the mean, over clips, of bicubic's LPIPS less the stage's, with its 95 % interval.
    """

    source: str
    clips: int
    lpips_gain: Interval
    lpips: float
    lpips_bicubic: float
    high_frequency: float
    high_frequency_bicubic: float
    high_frequency_reference: float
    consistency: float

    @property
    def better(self) -> bool:
        """Closer to the reference in LPIPS, and nearer to its high-frequency energy (as a ratio)."""

        def gap(energy: float) -> float:
            tiny = 1e-12  # a flat clip has no energy, and log 0 is no number
            return abs(math.log((energy + tiny) / (self.high_frequency_reference + tiny)))

        return self.lpips < self.lpips_bicubic and gap(self.high_frequency) < gap(self.high_frequency_bicubic)


def bicubic(video: Tensor, height: int, width: int) -> Tensor:
    """Returns `(B, C, T, h, w)` scaled to `(B, C, T, height, width)` frame by frame, within [-1, 1]; antialiased."""
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    scaled = F.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return rearrange(scaled.clamp(-1, 1), "(b t) c h w -> b c t h w", b=len(video))


def compare_with_bicubic(
    stage: Callable[[Tensor], Tensor],
    clips: Iterable[tuple[Tensor, Tensor]],
    perceptual: Callable[[Tensor, Tensor], Tensor],
    source: str = "real",
) -> Comparison:
    """Runs a stage over (low resolution, reference) pairs and compares it with bicubic upsampling.

    Args:
        stage: maps `(1, 3, T, h, w)` to `(1, 3, T, H, W)`, both in [-1, 1].
        clips: pairs of such an input and a reference of the output's size; read one at a time.
        perceptual: LPIPS, see `walt.evaluation.metrics.lpips`.
        source: a name for these inputs: "real", "generated".

    Raises:
        WaltError: no clips, or the stage's output has another shape than its reference.
    """
    rows: list[list[float]] = []
    for low, reference in clips:
        with torch.no_grad():
            output = stage(low)
        if output.shape != reference.shape:
            raise WaltError(f"stage: expected output {tuple(reference.shape)}, got {tuple(output.shape)}")
        plain = bicubic(low, *reference.shape[-2:])
        cutoff = 0.5 * low.shape[-1] / reference.shape[-1]
        rows.append(
            [
                float(lpips(output, reference, perceptual).mean()),
                float(lpips(plain, reference, perceptual).mean()),
                float(high_frequency_energy(output, cutoff).mean()),
                float(high_frequency_energy(plain, cutoff).mean()),
                float(high_frequency_energy(reference, cutoff).mean()),
                float(psnr(bicubic(output, *low.shape[-2:]), low).mean()),
            ]
        )
    if not rows:
        raise WaltError(f"clips: expected at least one {source} clip, got none")
    gain = _gain([row[1] - row[0] for row in rows])
    return Comparison(source, len(rows), gain, *(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def _gain(values: list[float]) -> Interval:
    """Of no width for a single clip."""
    return mean_interval(torch.tensor(values)) if len(values) > 1 else Interval(*values * 3)


def table(comparisons: Sequence[Comparison]) -> str:
    """Returns the comparisons as a Markdown table."""
    lines = [
        "| input | clips | LPIPS | LPIPS bicubic | gain, 95 % | HF energy | HF bicubic | HF reference | consistency "
        "| better |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        gain = row.lpips_gain
        lines.append(
            f"| {row.source} | {row.clips} | {row.lpips:.4f} | {row.lpips_bicubic:.4f} | {gain.estimate:.4f} "
            f"({gain.low:.4f} to {gain.high:.4f}) | {row.high_frequency:.2e} "
            f"| {row.high_frequency_bicubic:.2e} | {row.high_frequency_reference:.2e} | {row.consistency:.1f} dB "
            f"| {'yes' if row.better else 'no'} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class NewFrames:
    """Means over clips, of the frames between the given ones: as a temporal stage makes them, as copies of the frame before,
    and as blends of both neighbours. PSNR in dB where the subject is then or in a neighbour, and LPIPS of whole frames."""

    source: str
    clips: int
    psnr: float
    psnr_repeated: float
    psnr_blended: float
    lpips: float
    lpips_repeated: float
    lpips_blended: float

    @property
    def better(self) -> bool:
        """Nearer to the true frames than either, in both measures."""
        return self.psnr > max(self.psnr_repeated, self.psnr_blended) and self.lpips < min(
            self.lpips_repeated, self.lpips_blended
        )


def compare_new_frames(
    stage: Callable[[Tensor], Tensor],
    clips: Iterable[tuple[Tensor, Tensor, Tensor]],
    perceptual: Callable[[Tensor, Tensor], Tensor],
    source: str = "real",
) -> NewFrames:
    """Runs a temporal stage over (video, reference, alpha) and judges the new frames.

    Args:
        stage: maps `(1, 3, n, H, W)` to `(1, 3, 2n - 1, H, W)`, both in [-1, 1].
        clips: such an input, the true clip of 2n - 1 frames, and weights `(1, 1, 2n - 1, H, W)` of the subject.
        perceptual: LPIPS, see `walt.evaluation.metrics.lpips`.
        source: a name for these inputs.

    Raises:
        WaltError: no clips, a clip of one frame, or the stage's output has another shape than its reference.
    """
    rows: list[list[float]] = []
    for low, reference, alpha in clips:
        if low.shape[2] < 2:
            raise WaltError(f"frames: at least 2 are needed for one between them, got {low.shape[2]}")
        with torch.no_grad():
            output = stage(low)
        if output.shape != reference.shape:
            raise WaltError(f"stage: expected output {tuple(reference.shape)}, got {tuple(output.shape)}")
        candidates = (
            output[:, :, 1::2],
            frames_twice(low)[:, :, 1::2],
            (low[:, :, 1:] + low[:, :, :-1]) / 2,
        )
        truth = reference[:, :, 1::2]
        # Where the subject is in one of three frames: a copy is wrong too where it was, and is no longer.
        weight = torch.stack([alpha[:, :, :-1:2], alpha[:, :, 1::2], alpha[:, :, 2::2]]).amax(dim=0)
        rows.append(
            [float(masked_psnr(frames, truth, weight).mean()) for frames in candidates]
            + [float(lpips(frames, truth, perceptual).mean()) for frames in candidates]
        )
    if not rows:
        raise WaltError(f"clips: expected at least one {source} clip, got none")
    return NewFrames(source, len(rows), *(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def new_frames_table(comparisons: Sequence[NewFrames]) -> str:
    """Returns the comparisons as a Markdown table."""
    lines = [
        "| input | clips | PSNR | repeated | blended | LPIPS | repeated | blended | better |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        lines.append(
            f"| {row.source} | {row.clips} | {row.psnr:.2f} dB | {row.psnr_repeated:.2f} dB | {row.psnr_blended:.2f} dB "
            f"| {row.lpips:.4f} | {row.lpips_repeated:.4f} | {row.lpips_blended:.4f} | {'yes' if row.better else 'no'} |"
        )
    return "\n".join(lines)


def write_report(path: Path, stages: dict[str, Sequence[Comparison | NewFrames]], settings: dict[str, Any]) -> None:
    """Writes the settings given and every stage's rows as JSON."""
    rows = {name: [{**asdict(row), "better": row.better} for row in found] for name, found in stages.items()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**settings, "stages": rows}, indent=1) + "\n")
