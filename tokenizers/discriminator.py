"""The discriminator of MAGVIT-v2 (arXiv 2310.05737, section 3 and appendix A): 3D residual, with blurred subsampling.

A picture is T = 1 through the same weights. Letters: B batch, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from walt.errors import WaltError

BLUR = (1.0, 3.0, 3.0, 1.0)
_DEPTHS = (2, 4, 4, 4, 4)


def blur_pool(x: Tensor, time: bool = True) -> Tensor:
    """Halves H and W, and T with `time`, of `(B, C, T, H, W)` after a binomial low-pass filter (Zhang 2019).

    An odd axis rounds up, so that one of length 1 stays as it is. Borders are repeated.
    """
    for axis in (2, 3, 4) if time else (3, 4):
        size = x.shape[axis]
        # Tap k of output i is input 2i + k - 1.
        where = torch.arange(-1, size + 1 + size % 2 + 1, device=x.device).clamp(0, size - 1)
        wide = x.index_select(axis, where)
        count = (size + 1) // 2
        even = torch.arange(0, 2 * count - 1, 2, device=x.device)
        taps = [wide.narrow(axis, tap, 2 * count - 1).index_select(axis, even) for tap in range(len(BLUR))]
        x = torch.stack([tap * (weight / sum(BLUR)) for tap, weight in zip(taps, BLUR, strict=True)]).sum(dim=0)
    return x


class DiscriminatorBlock(nn.Module):
    """Two 3x3x3 convolutions with a blurred halving between them, beside a blurred 1x1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv1 = nn.Conv3d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = blur_pool(F.leaky_relu(_conv(self.conv1, x), 0.2), self.time)
        y = F.leaky_relu(_conv(self.conv2, y), 0.2)
        return (y + self.shortcut(blur_pool(x, self.time))) / math.sqrt(2.0)


class Discriminator(nn.Module):
    """`(B, C, T, H, W)` in [-1, 1] -> logits `(B, n)`, high for real.

    Args:
        in_channels: colours.
        base: channels after the first convolution; the paper's is the tokenizer's.
        multipliers: channels of the blocks over `base`; every block halves space.
        temporal: per block, whether it halves time too; (): all do.
        sample_size: (T, H, W) of every sample, for the paper's head: flatten, two linear layers, n = 1. Without it the
            head is a 1x1x1 convolution, n logits of places, for samples of any size.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base: int = 128,
        multipliers: Sequence[int] = _DEPTHS,
        temporal: Sequence[bool] = (),
        sample_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        temporal = tuple(temporal) or (True,) * len(multipliers)
        if not multipliers or len(temporal) != len(multipliers):
            raise WaltError(f"temporal needs one entry per block ({len(multipliers)}), got {tuple(temporal)}")
        widths = [base, *(base * multiplier for multiplier in multipliers)]
        self.in_channels = in_channels
        self.sample_size = None if sample_size is None else tuple(sample_size)
        self.conv_in = nn.Conv3d(in_channels, base, 3, padding=1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(a, b, time) for a, b, time in zip(widths[:-1], widths[1:], temporal, strict=True)
        )
        self.conv_out = nn.Conv3d(widths[-1], widths[-1], 3, padding=1)
        self.head: nn.Module
        if self.sample_size is None:
            self.head = nn.Conv3d(widths[-1], 1, 1)
        else:
            t, h, w = self.sample_size
            for time in temporal:
                t, h, w = (t + 1) // 2 if time else t, (h + 1) // 2, (w + 1) // 2
            self.head = nn.Sequential(
                nn.Flatten(), nn.Linear(widths[-1] * t * h * w, widths[-1]), nn.LeakyReLU(0.2), nn.Linear(widths[-1], 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != self.in_channels or 0 in x.shape:
            raise WaltError(f"samples must be (B, {self.in_channels}, T, H, W), got shape {tuple(x.shape)}")
        if self.sample_size is not None and tuple(x.shape[2:]) != self.sample_size:
            raise WaltError(
                f"this discriminator judges samples of {self.sample_size} (T, H, W), got {tuple(x.shape[2:])}; "
                "build it without sample_size for mixed sizes"
            )
        x = F.leaky_relu(_conv(self.conv_in, x), 0.2)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(_conv(self.conv_out, x), 0.2)
        return self.head(x).flatten(1)


def _conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(x)`; a lone frame meets padding in all but the middle temporal tap: a 2D convolution."""
    if x.shape[2] > 1:
        return conv(x)
    return F.conv2d(x[:, :, 0], conv.weight[:, :, 1], conv.bias, padding=1).unsqueeze(2)
