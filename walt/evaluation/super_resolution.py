"""Does a super-resolution stage beat bicubic upsampling of its own input? Clip by clip, in LPIPS and in detail.

The stage is any function from a low-resolution video to a high-resolution one; the low-resolution videos may be real
(the art rendered small) or generated (what the stage before made). A generated video has no true high resolution, so
its reference is a real clip of the same caption: then LPIPS says which of the two looks more like the real thing, and
means something only as a difference between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from walt.errors import WaltError
from walt.evaluation.metrics import high_frequency_energy, lpips, psnr


@dataclass(frozen=True)
class Comparison:
    """Means over clips: the stage, bicubic upsampling of the same input, and the references.

    `high_frequency*` is the energy above the input's own band (see `high_frequency_energy`); `consistency` is the PSNR
    in dB of the stage's output, scaled down again, against its input: detail may be invented, content may not.
    """

    source: str
    clips: int
    lpips: float
    lpips_bicubic: float
    high_frequency: float
    high_frequency_bicubic: float
    high_frequency_reference: float
    consistency: float

    @property
    def beats_bicubic(self) -> bool:
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
    return Comparison(source, len(rows), *(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def table(comparisons: Sequence[Comparison]) -> str:
    """Returns the comparisons as a Markdown table."""
    lines = [
        "| input | clips | LPIPS | LPIPS bicubic | HF energy | HF bicubic | HF reference | consistency | better |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        lines.append(
            f"| {row.source} | {row.clips} | {row.lpips:.3f} | {row.lpips_bicubic:.3f} | {row.high_frequency:.2e} "
            f"| {row.high_frequency_bicubic:.2e} | {row.high_frequency_reference:.2e} | {row.consistency:.1f} dB "
            f"| {'yes' if row.beats_bicubic else 'no'} |"
        )
    return "\n".join(lines)
