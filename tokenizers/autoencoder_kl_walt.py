"""The causal 3D CNN tokenizer of W.A.L.T. (MAGVIT-v2's autoencoder without a quantizer) as a diffusers model.

Letters: B batch, C channels, T frames, H W pixels; t h w latent grid. A clip has T = 1 + 4k frames, an image T = 1.

Streaming: every layer takes a `past` and returns the `past` of the next chunk, so a stream is a value passed along:
`None` means "the whole clip is here, keep nothing", `()` means "first chunk of a stream", anything else is what the
layer returned for the chunk before. Nothing is stored on a module.

Tiling: every layer also takes a `carry`, by which a frame passes in stripes of rows (`walt.tokenizers.tiling`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from walt.errors import WaltError
from walt.fused import rms_norm
from walt.linear import mlp
from walt.tokenizers import winograd
from walt.tokenizers.quantizers import Quantizer, make_quantizer
from walt.tokenizers.tiling import Canvas, Carry, Queue, run

Past = Any  # None | () | nested tuples of tensors

START: tuple[()] = ()


def _begins(past: Past) -> bool:
    """Whether the chunk is the first. By length: torch.compile cannot trace `not` of nested tuples."""
    return past is None or len(past) == 0


# Beyond what resampling overshoots, and beyond what any denoiser makes of a channel, in its deviations.
PIXEL_LIMIT = 2.0
LATENT_LIMIT = 100.0
# Copies of a convolution's input and output that are alive at the busiest moment.
LIVE_INPUTS, LIVE_OUTPUTS = 5, 2
# Without any switch a long clip takes no more than one of so many latents (17 frames) at once, or so many bytes.
WHOLE_LATENTS, WHOLE_BYTES = 5, 2**28


# ---------------------------------------------------------------------------------------------------------------------
# The lossless front end


def haar_matrix(size: int) -> Tensor:
    """Orthonormal Haar basis of 1, 2, 4, ... samples, float64 `(size, size)`, one basis vector a row, coarsest first."""
    # Explicitly on the CPU: a model may be built under the meta device.
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    half = haar_matrix(size // 2)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    coarse = torch.kron(half, pair[:1])
    fine = torch.kron(torch.eye(size // 2, dtype=torch.float64, device="cpu"), pair[1:])
    return torch.cat([coarse, fine]) / math.sqrt(2.0)


class Patcher(nn.Module):
    """Pixels <-> blocks of `patch` frames x `patch` x `patch` pixels on channels: lossless, causal in time.

    The first frame stands alone: it is repeated `patch` times to fill its block, and only the last copy is kept on the
    way back, so `1 + patch*k` frames become `1 + k` blocks. `transform` is "space_to_depth" (raw pixels) or "haar"
    (a separable Haar basis, scaled so that neither coarse nor fine coefficients leave a few units).
    """

    def __init__(self, patch: int, transform: str) -> None:
        super().__init__()
        self.patch = patch
        basis = haar_matrix(patch)
        if transform == "space_to_depth":
            basis = torch.eye(patch, dtype=torch.float64, device="cpu")
        matrix = torch.kron(torch.kron(basis, basis), basis)
        scale = 1.0 / patch if transform == "haar" else 1.0
        # Kept as a python list: a buffer would follow .to(dtype) down to bf16 and lose the exact inverse.
        self._forward_rows = (matrix * scale).tolist()
        self._inverse_rows = (matrix.T / scale).tolist()

    def _matrix(self, rows: list[list[float]], like: Tensor) -> Tensor:
        return torch.tensor(rows, dtype=like.dtype, device=like.device)

    def split(self, video: Tensor, first: bool) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C*p^3, T', H/p, W/p)`; `first` when the chunk starts with the clip's frame 0."""
        p = self.patch
        if p == 1:
            return video
        if first:
            video = torch.cat([video[:, :, :1].expand(-1, -1, p - 1, -1, -1), video], dim=2)
        b, c, t, h, w = video.shape
        blocks = video.reshape(b, c, t // p, p, h // p, p, w // p, p)
        blocks = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c, p**3, -1)
        blocks = torch.matmul(self._matrix(self._forward_rows, video), blocks)
        return blocks.reshape(b, c * p**3, t // p, h // p, w // p)

    def join(self, blocks: Tensor, first: bool) -> Tensor:
        """The exact inverse of `split`."""
        p = self.patch
        if p == 1:
            return blocks
        b, c, t, h, w = blocks.shape
        video = torch.matmul(self._matrix(self._inverse_rows, blocks), blocks.reshape(b, c // p**3, p**3, -1))
        video = video.reshape(b, c // p**3, p, p, p, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        video = video.reshape(b, c // p**3, t * p, h * p, w * p)
        return video[:, :, p - 1 :] if first else video


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class CausalConv3d(nn.Conv3d):
    """3D convolution that pads `kernel - 1` zero frames before and none after (papers: MAGVIT-v2, section 3).

    Between chunks it hands on its last `kernel - stride` input frames.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        space = (kernel - 1) // 2
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=(0, space, space))

    def forward(  # type: ignore[override]
        self, x: Tensor, past: Past = None, carry: Carry | None = None
    ) -> tuple[Tensor, Past]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = cast(tuple[int, int, int], self.padding)
        lone = x.shape[2] == 1 and kernel > 1 and (past is None if carry is None else carry.whole)
        present: Past = None
        if carry is not None:
            # The rows above, the past and the borders in one copy.
            lead = 1 if lone else kernel
            x = carry.window(x, (lead, self.kernel_size[1]), (stride, self.stride[1]))
            padding = (0, 0, padding[2])
            if not x.shape[3]:
                return x, None
        else:
            if past is None and not lone and winograd.fits(x, self.weight, self.stride):
                return winograd.conv3d(x, self.weight, self.bias, padding[1:], before=kernel - 1), None
            if kernel > 1 and not lone:
                x = torch.cat([past[0], x], dim=2) if past else F.pad(x, (0, 0, 0, 0, kernel - 1, 0))
            if past is not None:
                present = (x[:, :, x.shape[2] - (kernel - stride) :].clone(),)
        if lone:
            # A lone frame meets zeros in all but the last temporal tap: a 2D convolution, a third of the work.
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding[1:])
            return y.unsqueeze(2), None
        if winograd.fits(x, self.weight, self.stride):
            return winograd.conv3d(x, self.weight, self.bias, padding[1:]), present
        if (
            carry is not None
            and _channels_last(x)
            and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            # For an input as small as a stripe torch would unfold it, 27 times its size.
            y = torch.mkldnn_convolution(x, self.weight, self.bias, padding, self.stride, self.dilation, 1)
            return y, present
        return F.conv3d(x, self.weight, self.bias, self.stride, padding), present

    def carry(self, height: int, past: Past, owned: bool) -> Carry:
        """For a frame of `height` rows that passes in stripes."""
        return Carry(height, past, owned)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position: no statistic crosses time or space."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor, swish: bool = False) -> Tensor:
        """`swish`: that of the result."""
        if _channels_last(x):
            return rms_norm(x.movedim(1, -1), self.weight, 1e-6, swish).movedim(-1, 1)
        y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
        y = y if self.weight is None else y * self.weight.view(1, -1, 1, 1, 1)
        return F.silu(y) if swish else y


def make_norm(kind: str, channels: int, affine: bool = True) -> nn.Module:
    """ "channel" (per position) or "group" (the paper's, over groups of channels, time and space)."""
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6, affine=affine)
    return ChannelNorm(channels, affine)


def _channels_last(x: Tensor) -> bool:
    """Whether a network runs in that layout: without gradients on a CPU, whose convolutions compute in it anyway.

    Their backward is slower in it; on a GPU it was not measured.
    """
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def _layout(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d) if _channels_last(x) else x


def _activate(norm: nn.Module, x: Tensor) -> Tensor:
    """Norm and swish; in place where no gradient needs the normed values."""
    if isinstance(norm, ChannelNorm):
        return cast(Tensor, norm(x, swish=True))
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResidualCarry:
    """The carries of a residual block's convolutions, and the rows of its shortcut that wait for them."""

    def __init__(self, height: int, past: Past, owned: bool) -> None:
        first, second = past if past else (past, past)
        self.first, self.second, self.straight = Carry(height, first, owned), Carry(height, second, owned), Queue()

    @property
    def present(self) -> Past:
        return None if self.first.present is None else (self.first.present, self.second.present)


class ResidualBlock(nn.Module):
    """norm, swish, causal conv, twice; a 1x1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = make_norm(norm, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, past: Past = None, carry: ResidualCarry | None = None) -> tuple[Tensor, Past]:
        if carry is not None:
            carry.straight.put(x)
            y, _ = self.conv1(_activate(self.norm1, x), None, carry.first)
            if y.shape[3]:
                y, _ = self.conv2(_activate(self.norm2, y), None, carry.second)
            return (self.shortcut(carry.straight.take(y.shape[3])) + y if y.shape[3] else y), None
        first, second = past if past else (past, past)
        y, first = self.conv1(_activate(self.norm1, x), first)
        y, second = self.conv2(_activate(self.norm2, y), second)
        return y.add_(self.shortcut(x)) if not torch.is_grad_enabled() else self.shortcut(x) + y, (
            None if past is None else (first, second)
        )

    def carry(self, height: int, past: Past, owned: bool) -> ResidualCarry:
        """For a frame of `height` rows that passes in stripes."""
        return ResidualCarry(height, past, owned)


class Upsample(nn.Module):
    """Causal convolution, then depth to space: 2x in space, `time`x in time less the first `time - 1` frames."""

    def __init__(self, in_channels: int, out_channels: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.conv = CausalConv3d(in_channels, out_channels * 4 * time)

    def forward(self, x: Tensor, past: Past = None, carry: Carry | None = None) -> tuple[Tensor, Past]:
        first = _begins(past)
        y, present = self.conv(x, past, carry)
        b, c, t, h, w = y.shape
        if not h:
            return y, None
        if _channels_last(y):
            y = y.movedim(1, -1).reshape(b, t, h, w, c // (4 * self.time), self.time, 2, 2)
            y = y.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * self.time, 2 * h, 2 * w, -1).movedim(-1, 1)
        else:
            y = y.reshape(b, c // (4 * self.time), self.time, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
            y = y.reshape(b, c // (4 * self.time), t * self.time, 2 * h, 2 * w)
        return (y[:, :, self.time - 1 :] if first else y), present

    def carry(self, height: int, past: Past, owned: bool) -> Carry:
        """For a frame of `height` rows that passes in stripes."""
        return Carry(height, past, owned)


class Adaptation(nn.Module):
    """Norm without affine, then scale and shift read from the latent (MAGVIT-v2's adaptive norm).

    `local`: a 1x1 map of the latent at the same place and time. `global` (the paper's reading in open code): linear
    maps of the latent's standard deviation and mean over the whole clip.
    """

    def __init__(self, channels: int, latent_channels: int, norm: str, kind: str, time: int, space: int) -> None:
        super().__init__()
        self.kind, self.time, self.space = kind, time, space
        self.norm = make_norm(norm, channels, affine=False)
        if kind == "local":
            self.affine = nn.Conv3d(latent_channels, 2 * channels, 1)
        else:
            self.scale = nn.Linear(latent_channels, channels)
            self.shift = nn.Linear(latent_channels, channels)

    def forward(self, x: Tensor, latent: Tensor, first: bool, top: int = 0) -> Tensor:
        """`x` may be rows from `top` on of a frame whose whole latent is given."""
        y = self.norm(x)
        if self.kind == "global":
            flat = latent.flatten(2)
            scale = self.scale(flat.std(dim=2, unbiased=False))[:, :, None, None, None]
            return y * (1.0 + scale) + self.shift(flat.mean(dim=2))[:, :, None, None, None]
        rows, skip = _covering(top, x.shape[3], self.space)
        affine = self.affine(latent[..., rows, :])
        fine = [_repeat(part, self.time, self.space) for part in affine.chunk(2, dim=1)]
        if first:
            fine = [part[:, :, self.time - 1 :] for part in fine]
        scale, shift = (part[..., skip : skip + x.shape[3], :] for part in fine)
        return torch.addcmul(y + shift, y, scale)


def _repeat(x: Tensor, time: int, space: int) -> Tensor:
    """Every value `time` x `space` x `space` times."""
    if time == space == 1:
        return x
    b, c, t, h, w = x.shape
    if not _channels_last(x):
        x = x[:, :, :, None, :, None, :, None].expand(b, c, t, time, h, space, w, space)
        return x.reshape(b, c, t * time, h * space, w * space)
    x = x.movedim(1, -1)[:, :, None, :, None, :, None].expand(b, t, time, h, space, w, space, c)
    return x.reshape(b, t * time, h * space, w * space, c).movedim(-1, 1)


def _covering(top: int, rows: int, scale: int) -> tuple[slice, int]:
    """The rows of a grid `scale` times coarser that cover `rows` rows from `top`, and how many fine ones lie before."""
    first = top // scale
    return slice(first, -(-(top + rows) // scale)), top - first * scale


def _pack(x: Tensor, time: int, space: int) -> Tensor:
    """`(B, C, T, H, W)` -> `(B, T/time, H/space, W/space, C*time*space^2)`."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // time, time, h // space, space, w // space, space)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unpack(x: Tensor, time: int, space: int) -> Tensor:
    """The inverse of `_pack`."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // (time * space**2), time, space, space)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, -1, t * time, h * space, w * space)


class DetailShrinkage(nn.Module):
    """Pulls faint Haar details of every latent cell to zero: y -> y^3 / (y^2 + threshold^2), the mean left as it is.

    A decoder's flat ground carries a faint pattern that repeats from cell to cell; its details are far below those of
    real edges, so this empirical Wiener shrinkage (Ghael, Sayeed and Baraniuk 1997) makes flat ground flat. Works on
    the coefficients of the "haar" front end, carried on over the cell's `time` x `space` x `space` blocks. Cells do not
    see each other, so streaming stays exact.
    """

    def __init__(self, colours: int, patch: int, time: int, space: int, threshold: float) -> None:
        super().__init__()
        self.colours, self.patch, self.time, self.space, self.threshold = colours, patch, time, space, threshold

    def forward(self, x: Tensor, first: bool) -> Tensor:
        """`(B, colours*patch^3, T', H', W')` -> the same; `first` when x starts with the clip's first position."""
        parts = [
            self._shrink(part, time)
            for time, part in ((1, x[:, :, : int(first)]), (self.time, x[:, :, int(first) :]))
            if part.shape[2]
        ]
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _shrink(self, x: Tensor, time: int) -> Tensor:
        plane = torch.kron(haar_matrix(self.space), haar_matrix(self.space))
        basis = torch.kron(haar_matrix(time), plane).to(x)
        packed = _pack(x, time, self.space)
        y = packed.unflatten(-1, (self.colours, self.patch**3, len(basis))) @ basis.T
        shrunk = y * (y * y / (y * y + self.threshold**2))
        mean = torch.zeros(self.patch**3, len(basis), dtype=torch.bool, device=x.device)
        mean[0, 0] = True
        y = torch.where(mean, y, shrunk) @ basis
        return _unpack(y.flatten(-3), time, self.space)


class BlockProjection(nn.Module):
    """One linear map per latent position: a block of `time` x `space` x `space` positions <-> `features` channels.

    The clip's first position in time stands alone and has its own map. Used as a shortcut around encoder and decoder
    (config `block_shortcut`): with a principal component analysis in it (`fit_block_shortcut`) training starts from the
    best linear tokenizer, and the networks learn what is left. No block sees another, so streaming stays exact.
    """

    def __init__(self, channels: int, features: int, time: int, space: int, expand: bool) -> None:
        super().__init__()
        self.time, self.space, self.expand = time, space, expand
        first, later = channels * space**2, channels * time * space**2
        self.first = nn.Linear(features, first) if expand else nn.Linear(first, features)
        self.later = nn.Linear(features, later) if expand else nn.Linear(later, features)

    def pack(self, x: Tensor, time: int) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, T/time, H/space, W/space, C*time*space^2)`."""
        return _pack(x, time, self.space)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        """`(B, channels, 1 + time*k, space*h, space*w)` -> `(B, features, 1 + k, h, w)`, or back with `expand`.

        `first` when x starts with the clip's first position; without it there is no 1.
        """
        parts = []
        for layer, time, part in (
            (self.first, 1, x[:, :, : int(first)]),
            (self.later, self.time, x[:, :, int(first) :]),
        ):
            if part.shape[2]:
                if self.expand:
                    parts.append(_unpack(layer(part.permute(0, 2, 3, 4, 1)), time, self.space))
                else:
                    parts.append(layer(self.pack(part, time)).permute(0, 4, 1, 2, 3))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


class LappedProjection(nn.Module):
    """`BlockProjection` back to blocks, reading neighbours too: `overlap` rings of latents around, and the latent before.

    Blocks that are made each from its own latent alone meet in visible edges; a linear map of the neighbourhood
    (a lapped transform: Malvar and Staelin 1989) takes them away. Beyond the frame the border latent goes on, so that
    flat ground stays flat. The clip's first position reads no earlier one and has its own map.
    """

    def __init__(self, channels: int, features: int, time: int, space: int, overlap: int) -> None:
        super().__init__()
        self.time, self.space, self.overlap = time, space, overlap
        kernel = 2 * overlap + 1
        self.first = nn.Conv3d(features, channels * space**2, (1, kernel, kernel))
        self.later = nn.Conv3d(features, channels * time * space**2, (2, kernel, kernel))

    def parts(self, z: Tensor, before: Tensor | None, rows: slice = slice(None)) -> list[tuple[nn.Conv3d, Tensor, int]]:
        """Both maps with what they read, bordered, and the time of their blocks; maps without positions are left out.

        Args:
            z: `(B, features, t, h, w)`.
            before: the latent before z `(B, features, 1, h, w)`; None when z starts with the clip's first position.
            rows: the rows of h that are wanted.
        """
        top, bottom, _ = rows.indices(z.shape[3])
        reach = range(top - self.overlap, bottom + self.overlap)
        above, below = max(0, -reach.start), max(0, reach.stop - z.shape[3])
        border = (self.overlap, self.overlap, above, below, 0, 0)

        def bordered(x: Tensor) -> Tensor:
            x = x[..., max(0, reach.start) : min(z.shape[3], reach.stop), :]
            return F.pad(x, border, mode="replicate") if self.overlap else x

        later = z if before is None else torch.cat([before, z], dim=2)
        found = [(self.first, bordered(z[:, :, :1]), 1)] if before is None else []
        return found + ([(self.later, bordered(later), self.time)] if later.shape[2] > 1 else [])

    def forward(self, z: Tensor, before: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """Blocks `(B, channels, 1 + time*k, space*h, space*w)`; see `parts`."""
        made = [
            _unpack(layer(x).permute(0, 2, 3, 4, 1), time, self.space) for layer, x, time in self.parts(z, before, rows)
        ]
        return torch.cat(made, dim=2) if len(made) > 1 else made[0]


class RowNorm(nn.RMSNorm):
    """torch's, faster without gradients on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, cast(float, self.eps))


class MixingBlock(nn.Module):
    """ConvNeXt's block (Liu et al. 2022, section 2), causal: a 5x5 depthwise convolution and the two positions before,
    then norm and a two-layer MLP over channels, added to its input: `(B, C, t, h, w)` to the same.

    It reaches as far as a convolution of that size, and nearly all of its work is matrix products.
    """

    SIDE = 5
    BEFORE = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, self.SIDE, padding=self.SIDE // 2, groups=channels)
        self.time = nn.Parameter(torch.randn(self.BEFORE, channels) * 0.2)
        self.norm = RowNorm(channels, eps=1e-6)
        self.mlp_in = nn.Linear(channels, 4 * channels)
        self.mlp_out = nn.Linear(4 * channels, channels)
        nn.init.normal_(self.mlp_out.weight, std=0.01)
        nn.init.zeros_(self.mlp_out.bias)

    def forward(self, x: Tensor, past: Past = None, carry: Carry | None = None) -> tuple[Tensor, Past]:
        present: Past = None
        border = self.SIDE // 2
        if carry is not None:
            x = carry.window(x, (1 + self.BEFORE, self.SIDE), (1, 1))
            if not x.shape[3]:
                return x, None
        else:
            before = past[0] if past else torch.zeros_like(x[:, :, :1]).expand(-1, -1, self.BEFORE, -1, -1)
            x = torch.cat([before, x], dim=2)
            if past is not None:
                present = (x[:, :, -self.BEFORE :].clone(),)
            border = 0
        # A position's channels side by side, also with gradients: most of the work is on them.
        x = x.contiguous(memory_format=torch.channels_last_3d)
        # With a carry the rows above and below are in x, else the convolution pads them.
        inner = x[..., border : x.shape[3] - border, :]
        now = inner[:, :, self.BEFORE :]
        frames = x[:, :, self.BEFORE :].transpose(1, 2)
        padding = (0 if carry is not None else self.SIDE // 2, self.SIDE // 2)
        y = F.conv2d(frames.flatten(0, 1), self.space.weight, self.space.bias, padding=padding, groups=x.shape[1])
        y = y.unflatten(0, frames.shape[:2]).transpose(1, 2)
        for ago, weight in enumerate(self.time, start=1):
            y = y + weight.view(1, -1, 1, 1, 1) * inner[:, :, self.BEFORE - ago : inner.shape[2] - ago]
        y = y.movedim(1, -1)
        made = mlp(self.mlp_in, self.mlp_out, y.flatten(0, -2), self.norm).view(y.shape)
        return now + made.movedim(-1, 1), present

    def carry(self, height: int, past: Past, owned: bool) -> Carry:
        """For a frame of `height` rows that passes in stripes."""
        return Carry(height, past, owned)


@dataclass(frozen=True)
class Stripes:
    """How a frame passes a network in stripes of rows.

    Args:
        height: rows of the network's input, a multiple of the decoder's or encoder's change of size.
        rows: latent rows of one stripe.
        read: rows of the input, `read(top, bottom)`.
        emit: takes the finished rows, from the top.
        owned: the past may be overwritten.
    """

    height: int
    rows: int
    read: Callable[[int, int], Tensor]
    emit: Callable[[Tensor], None]
    owned: bool = False


@dataclass(frozen=True)
class Plan:
    """How much of a clip is in a network at once: latent rows of a stripe and latent frames of a chunk, None for all."""

    rows: int | None
    frames: int | None

    def parts(self, count: int) -> list[int]:
        """The latent frames of each chunk of `count`."""
        size = self.frames or count
        return [min(size, count - start) for start in range(0, count, size)]


class _Stack(nn.Module):
    """Shared running of a list of layers that pass a `past`, with gradient checkpointing on request."""

    gradient_checkpointing = False

    def _run(self, layer: nn.Module, x: Tensor, past: Past) -> tuple[Tensor, Past]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return cast(tuple[Tensor, Past], self._gradient_checkpointing_func(layer, x, past))  # type: ignore[operator]
        return cast(tuple[Tensor, Past], layer(x, past))

    def _pasts(self, past: Past, count: int) -> list[Past]:
        """One past a layer. A list is its owner's: it is emptied on the way, so that old and new are never all held."""
        return past if isinstance(past, list) else list(past) if past else [past] * count

    @property
    def last(self) -> nn.Module:
        """What makes the output that is added to the shortcut's."""
        raise NotImplementedError

    def silence(self) -> None:
        """The network's output becomes zero: the shortcut alone speaks, until training changes that."""
        for weight in self.last.parameters():
            nn.init.zeros_(weight)


class _Way:
    """The steps of one frame's way through a stack, with the rows and the past of each."""

    def __init__(self, stripes: Stripes, unit: int) -> None:
        self.stripes, self.height, self.unit = stripes, stripes.height, unit
        self.steps: list[Callable[[Tensor], Tensor]] = []
        self.limits: list[int] = []
        self.carries: list[Any] = []

    def add(self, step: Callable[[Tensor], Tensor]) -> None:
        self.steps.append(step)
        self.limits.append(max(1, self.stripes.rows * self.unit))

    def layer(self, layer: Any, past: Past, before: Callable[[Tensor], Tensor] | None = None) -> None:
        """A layer with a past; `before` is applied to its input."""
        carry = layer.carry(self.height, past, self.stripes.owned)
        self.carries.append(carry)
        self.add(lambda x: layer(x if before is None else before(x), past, carry)[0])

    def scaled(self, numerator: int, denominator: int = 1) -> None:
        """Later steps see that many times the rows."""
        self.height = self.height * numerator // denominator
        self.unit = self.unit * numerator // denominator

    def counted(self, step: Callable[[Tensor, int], Tensor]) -> None:
        """A step without past that is told the frame row it begins at."""
        top = 0

        def counting(x: Tensor) -> Tensor:
            nonlocal top
            start, top = top, top + x.shape[3]
            return step(x, start)

        self.add(counting)

    def go(self, source_unit: int) -> None:
        read, height, size = self.stripes.read, self.stripes.height, self.stripes.rows * source_unit
        parts = (read(top, min(height, top + size)) for top in range(0, height, size))
        run(self.steps, self.limits, parts, self.stripes.emit)


class _Encoder(_Stack):
    """`(B, in_channels, T, H, W)` blocks of the front end -> `(B, out_channels, t, h, w)`.

    A network beside an optional linear shortcut.
    """

    layers: nn.ModuleList
    norm_out: nn.Module
    conv_out: CausalConv3d
    shortcut: BlockProjection | None
    space: int  # times finer than the latents the blocks are

    def forward(self, x: Tensor, past: Past = None, stripes: Stripes | None = None) -> tuple[Tensor, Past]:
        """The latents and the new past; with `stripes` their `emit` gets the latents, and x is only a sample of dtype."""
        first = _begins(past)
        pasts = self._pasts(past, len(self.layers) + 2)
        if stripes is not None:
            return x, self._in_stripes(pasts, stripes, first)
        straight = None if self.shortcut is None else self.shortcut(x, first)
        x, pasts[0] = self._begin(x, pasts[0], first)
        for i, layer in enumerate(self.layers):
            x, pasts[i + 1] = self._run(layer, x, pasts[i + 1])
        x, pasts[-1] = self.conv_out(_activate(self.norm_out, x), pasts[-1])
        return x if straight is None else x + straight, None if past is None else tuple(pasts)

    @property
    def last(self) -> nn.Module:
        return self.conv_out

    def _begin(self, x: Tensor, past: Past, first: bool) -> tuple[Tensor, Past]:
        """From blocks to the first layer's input."""
        raise NotImplementedError

    def _begin_in_stripes(self, way: _Way, past: Past, first: bool) -> None:
        raise NotImplementedError

    def _in_stripes(self, pasts: list[Past], stripes: Stripes, first: bool) -> Past:
        way = _Way(stripes, self.space)
        self._begin_in_stripes(way, pasts[0], first)
        for layer, past in zip(self.layers, pasts[1:-1], strict=True):
            way.layer(layer, past)
            if isinstance(layer, CausalConv3d):
                way.scaled(1, 2)
        way.layer(self.conv_out, pasts[-1], before=lambda x: _activate(self.norm_out, x))
        shortcut, space = self.shortcut, self.space
        if shortcut is not None:
            # Reads its rows of the input once more: they are not worth keeping.
            way.counted(lambda x, top: x + shortcut(stripes.read(top * space, (top + x.shape[3]) * space), first))
        way.go(space)
        return None if pasts[-1] is None else tuple(carry.present for carry in way.carries)


class Encoder3d(_Encoder):
    """The paper's: residual blocks level by level, strided convolutions between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        times: Sequence[int],
        depth: int,
        norm: str,
        shortcut: bool,
    ) -> None:
        super().__init__()
        self.space = 2 ** len(times)
        self.conv_in = CausalConv3d(in_channels, widths[0])
        layers: list[nn.Module] = []
        width = widths[0]
        for level, out in enumerate(widths):
            for _ in range(depth):
                layers.append(ResidualBlock(width, out, norm))
                width = out
            if level < len(widths) - 1:
                layers.append(CausalConv3d(width, width, stride=(times[level], 2, 2)))
        layers += [ResidualBlock(width, width, norm) for _ in range(max(1, depth // 2))]
        self.layers = nn.ModuleList(layers)
        self.norm_out = make_norm(norm, width)
        self.conv_out = CausalConv3d(width, out_channels, kernel=1)
        self.shortcut = _shortcut(in_channels, out_channels, times) if shortcut else None

    def _begin(self, x: Tensor, past: Past, first: bool) -> tuple[Tensor, Past]:
        return cast(tuple[Tensor, Past], self.conv_in(_layout(x), past))

    def _begin_in_stripes(self, way: _Way, past: Past, first: bool) -> None:
        way.layer(self.conv_in, past, before=_layout)


class MixingEncoder3d(_Encoder):
    """All work at the latent's own resolution: a linear map of each cell's blocks, then `MixingBlock`s.

    `MixingDecoder3d` the other way round: nearly all of it is matrix products, and a latent sees far around itself and,
    block by block, further into the past.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        times: Sequence[int],
        norm: str,
        shortcut: bool,
    ) -> None:
        super().__init__()
        self.space = 2 ** len(times)
        self.stem = _shortcut(in_channels, width, times)
        self.layers = nn.ModuleList([MixingBlock(width) for _ in range(depth)])
        self.norm_out = make_norm(norm, width)
        self.conv_out = CausalConv3d(width, out_channels, kernel=1)
        self.shortcut = _shortcut(in_channels, out_channels, times) if shortcut else None

    def _begin(self, x: Tensor, past: Past, first: bool) -> tuple[Tensor, Past]:
        return self.stem(x, first), past

    def _begin_in_stripes(self, way: _Way, past: Past, first: bool) -> None:
        way.carries.append(Carry(way.height, None))  # keeps the layers' places; has no past
        way.add(lambda x: self.stem(x, first))
        way.scaled(1, self.space)


class _Decoder(_Stack):
    """`(B, in_channels, t, h, w)` latents -> `(B, out_channels, T, H, W)` blocks of the front end.

    A network beside a linear shortcut, both optional in effect; the sum may be shrunk (`DetailShrinkage`).
    """

    conv_in: CausalConv3d
    layers: nn.ModuleList
    shortcut: BlockProjection | LappedProjection | None
    shrinkage: DetailShrinkage | None

    def forward(self, z: Tensor, past: Past = None, stripes: Stripes | None = None) -> tuple[Tensor, Past]:
        """The blocks and the new past; with `stripes` their `emit` gets the blocks."""
        first = _begins(past)
        pasts = self._pasts(past, len(self.layers) + 3)
        # The last past is a lapped shortcut's: the latent before.
        before = None if _begins(pasts[-1]) else pasts[-1][0]
        pasts[-1] = (z[:, :, -1:].clone(),) if isinstance(self.shortcut, LappedProjection) else ()
        pasts[-1] = None if past is None else pasts[-1]
        if stripes is not None:
            return z, self._in_stripes(z, pasts, stripes, first, before)
        x, pasts[0] = self.conv_in(_layout(z), pasts[0])
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Adaptation):
                x = layer(x, z, first)
            else:
                x, pasts[i + 1] = self._run(layer, x, pasts[i + 1])
        x, pasts[-2] = self._finish(x, pasts[-2], first)
        if self.shortcut is not None:
            x = x + self._straight(z, first, before)
        if self.shrinkage is not None:
            x = self.shrinkage(x, first)
        return x, None if past is None else tuple(pasts)

    @property
    def last_weight(self) -> Tensor:
        """The weight that every pixel's gradient passes (an adaptive GAN weight compares gradients there)."""
        raise NotImplementedError

    def _finish(self, x: Tensor, past: Past, first: bool) -> tuple[Tensor, Past]:
        """From the last layer's output to blocks."""
        raise NotImplementedError

    def _finish_in_stripes(self, way: _Way, past: Past, first: bool) -> None:
        raise NotImplementedError

    def _straight(self, z: Tensor, first: bool, before: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """What the shortcut makes of these latent rows."""
        if isinstance(self.shortcut, LappedProjection):
            return cast(Tensor, self.shortcut(z, before, rows))
        assert self.shortcut is not None
        return cast(Tensor, self.shortcut(z[..., rows, :], first))

    def _in_stripes(self, z: Tensor, pasts: list[Past], stripes: Stripes, first: bool, before: Tensor | None) -> Past:
        way = _Way(stripes, 1)
        way.layer(self.conv_in, pasts[0], before=_layout)
        for layer, past in zip(self.layers, pasts[1:-2], strict=True):
            if isinstance(layer, Adaptation):
                way.carries.append(Carry(way.height, None))  # keeps the layers' places; has no past
                way.counted(_adapting(layer, z, first))
                continue
            way.layer(layer, past)
            if isinstance(layer, Upsample):
                way.scaled(2)
        self._finish_in_stripes(way, pasts[-2], first)
        shortcut, shrinkage = self.shortcut, self.shrinkage
        if shortcut is not None:

            def straight(x: Tensor, top: int) -> Tensor:
                rows, skip = _covering(top, x.shape[3], shortcut.space)
                return x + self._straight(z, first, before, rows)[..., skip : skip + x.shape[3], :]

            way.counted(straight)
        if shrinkage is not None:
            cells = Queue()

            def shrink(x: Tensor) -> Tensor:
                ready = cells.put(x) // shrinkage.space * shrinkage.space
                return shrinkage(cells.take(ready), first) if ready else x[..., :0, :]

            way.add(shrink)
        way.go(1)
        return None if pasts[-1] is None else (*(carry.present for carry in way.carries), pasts[-1])


class Decoder3d(_Decoder):
    """The paper's: residual blocks level by level, depth to space between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        times: Sequence[int],
        depth: int,
        norm: str,
        adaptation: str,
        shortcut: bool,
        overlap: int,
        shrinkage: DetailShrinkage | None,
    ) -> None:
        super().__init__()
        width = widths[-1]
        self.conv_in = CausalConv3d(in_channels, width)
        layers: list[nn.Module] = [ResidualBlock(width, width, norm) for _ in range(max(1, depth // 2))]
        time = space = 1
        for level in reversed(range(len(widths))):
            layers.append(Adaptation(width, in_channels, norm, adaptation, time, space))
            for _ in range(depth):
                layers.append(ResidualBlock(width, widths[level], norm))
                width = widths[level]
            if level > 0:
                layers.append(Upsample(width, widths[level - 1], times[level - 1]))
                width = widths[level - 1]
                time, space = time * times[level - 1], space * 2
        self.layers = nn.ModuleList(layers)
        self.norm_out = make_norm(norm, width)
        self.conv_out = CausalConv3d(width, out_channels)
        self.shortcut = _decoder_shortcut(in_channels, out_channels, times, shortcut, overlap)
        self.shrinkage = shrinkage

    @property
    def last(self) -> nn.Module:
        return self.conv_out

    @property
    def last_weight(self) -> Tensor:
        return self.conv_out.weight

    def _finish(self, x: Tensor, past: Past, first: bool) -> tuple[Tensor, Past]:
        return cast(tuple[Tensor, Past], self.conv_out(_activate(self.norm_out, x), past))

    def _finish_in_stripes(self, way: _Way, past: Past, first: bool) -> None:
        way.layer(self.conv_out, past, before=lambda x: _activate(self.norm_out, x))


class MixingDecoder3d(_Decoder):
    """All work at the latent's own resolution: `MixingBlock`s, then a linear map of each position to its cell's blocks.

    A residual decoder spends most of its work on the finest level; here every multiplication is spent where a position
    sees most of the picture, which suits a small world, and a small machine.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        times: Sequence[int],
        norm: str,
        shortcut: bool,
        overlap: int,
        shrinkage: DetailShrinkage | None,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, width)
        self.layers = nn.ModuleList([MixingBlock(width) for _ in range(depth)])
        self.norm_out = make_norm(norm, width)
        self.head = BlockProjection(out_channels, width, math.prod(times), 2 ** len(times), expand=True)
        self.shortcut = _decoder_shortcut(in_channels, out_channels, times, shortcut, overlap)
        self.shrinkage = shrinkage

    @property
    def last(self) -> nn.Module:
        return self.head

    @property
    def last_weight(self) -> Tensor:
        return self.head.later.weight

    def _finish(self, x: Tensor, past: Past, first: bool) -> tuple[Tensor, Past]:
        return self.head(self.norm_out(x), first), past

    def _finish_in_stripes(self, way: _Way, past: Past, first: bool) -> None:
        way.carries.append(Carry(way.height, None))
        way.add(lambda x: self.head(self.norm_out(x), first))
        way.scaled(self.head.space)


def _set_map(layer: nn.Linear | nn.Conv3d, weight: Tensor, bias: Tensor) -> None:
    """The map of each latent alone: of a convolution the tap at its own place."""
    if isinstance(layer, nn.Conv3d):
        nn.init.zeros_(layer.weight)
        layer.weight[:, :, -1, layer.kernel_size[1] // 2, layer.kernel_size[2] // 2] = weight.to(layer.weight)
    else:
        layer.weight.copy_(weight)
    cast(Tensor, layer.bias).copy_(bias)


def _adapting(layer: Adaptation, z: Tensor, first: bool) -> Callable[[Tensor, int], Tensor]:
    return lambda x, top: cast(Tensor, layer(x, z, first, top))


def _decoder_shortcut(
    latent: int, blocks: int, times: Sequence[int], shortcut: bool, overlap: int
) -> BlockProjection | LappedProjection | None:
    cell = math.prod(times), 2 ** len(times)
    if shortcut and overlap:
        return LappedProjection(blocks, latent, *cell, overlap)
    return BlockProjection(blocks, latent, *cell, expand=True) if shortcut else None


def _shortcut(blocks: int, latent: int, times: Sequence[int]) -> BlockProjection:
    """From the blocks of each latent's cell."""
    return BlockProjection(blocks, latent, math.prod(times), 2 ** len(times), expand=False)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class AutoencoderKLWalt(ModelMixin, AutoencoderMixin, ConfigMixin, FromOriginalModelMixin):
    """Causal video tokenizer with continuous latents (W.A.L.T. section 3.1; MAGVIT-v2 section 3 and appendix A).

    `(B, 3, 1 + 4k, 8h, 8w)` in [-1, 1] <-> `(B, latent_channels, 1 + k, h, w)`. An image is a one-frame video through
    the same weights. With per-position norms ("channel") and local adaptation the encoding of a prefix is the prefix of
    the encoding, decoding likewise, and a stream of chunks equals the whole clip. There is no KL term and no sampling
    (the paper mentions none): `encode(x).latent_dist` is deterministic.

    Args:
        in_channels: colours of the video.
        latent_channels: c of the paper.
        encoder_widths, decoder_widths: channels per level, finest first. One level fewer per doubling of `patch_size`:
            4, 3, 2 levels for patch 1, 2, 4, so that space shrinks 8x in all.
        temporal_downsample: per step between levels, whether time is halved too; with the patch 4x in all.
        layers_per_block: residual blocks per level (MAGVIT-v2: 4).
        encoder_mixers: blocks of an encoder that works at the latent's resolution (`MixingEncoder3d`), in place of the
            paper's residual one; `encoder_widths` then has one width. 0: the paper's.
        decoder_mixers: blocks of a decoder that works at the latent's resolution (`MixingDecoder3d`), in place of the
            paper's residual one; `decoder_widths` then has one width. 0: the paper's.
        patch_size: 1 (the paper), 2 or 4: the lossless causal front end.
        front_end: "haar" or "space_to_depth".
        norm: "channel" (per position) or "group" (the paper's; refuses streaming).
        adaptation: "local" (1x1 map of the latent) or "global" (the paper's; refuses streaming).
        block_shortcut: a linear map per block beside the networks (`fit_block_shortcut`); not the paper's.
        shortcut_overlap: rings of neighbouring latents that the decoder's shortcut reads beside the block's own, and the
            latent before (`fit_decoder_shortcut`); 0 for the block's own alone.
        detail_threshold: size below which the decoder's Haar details fade (`DetailShrinkage`), in units of the front
            end's coefficients; 0 for none, as in the paper. Needs `front_end` "haar".
        latents_mean, latents_std: per-channel statistics of encoded training data; consumers normalise by them.
        quantizer: None (continuous latents, W.A.L.T.), "lfq" (MAGVIT-v2), "fsq" or "vq": latents become codes, which
            `encode` returns and `encode_indices` numbers.
        quantizer_config: arguments of the quantizer beside its channels (`walt.tokenizers.quantizers`).
        z_dim, scale_factor_temporal, scale_factor_spatial: latent channels and ratios under the names that pipelines for
            Wan's tokenizer read in the config. They follow from the fields above; leave them out.

    Memory, all without any change of the result: a clip longer than 17 frames passes in stripes or latent by latent where
    that keeps it, input and output aside, to what 17 frames take (not with gradients, in compiled networks, or with
    group norm or global adaptation). `enable_slicing()` (one clip of a batch at a time), `enable_tiling(...)` (stripes of
    a frame, or a memory budget), `use_framewise_encoding` / `use_framewise_decoding = True` (one latent at a time, as a
    stream) choose otherwise.

    Values are checked (finite, in range) where that costs no synchronisation, on the CPU; set `check_values` to True to
    check on any device, to False for never.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "MixingBlock"]
    _skip_layerwise_casting_patterns = ["norm"]
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        encoder_widths: tuple[int, ...] = (128, 256, 256, 512),
        decoder_widths: tuple[int, ...] = (128, 256, 256, 512),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        layers_per_block: int = 4,
        encoder_mixers: int = 0,
        decoder_mixers: int = 0,
        patch_size: int = 1,
        front_end: str = "haar",
        norm: str = "channel",
        adaptation: str = "local",
        block_shortcut: bool = False,
        shortcut_overlap: int = 0,
        detail_threshold: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        scaling_factor: float = 1.0,
        quantizer: str | None = None,
        quantizer_config: dict[str, Any] | None = None,
        z_dim: int | None = None,
        scale_factor_temporal: int | None = None,
        scale_factor_spatial: int | None = None,
    ) -> None:
        super().__init__()
        _check_config(
            patch_size,
            front_end,
            norm,
            adaptation,
            temporal_downsample,
            {"encoder": (encoder_widths, encoder_mixers), "decoder": (decoder_widths, decoder_mixers)},
        )
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise WaltError(f"{name} has {len(values)} values, the latent has {latent_channels} channels")
        times = [2 if down else 1 for down in temporal_downsample]
        if shortcut_overlap < 0 or (shortcut_overlap and not block_shortcut):
            raise WaltError(f"shortcut_overlap must be 0, or above 0 with block_shortcut=True, got {shortcut_overlap}")
        if detail_threshold < 0 or (detail_threshold and front_end != "haar"):
            raise WaltError(f'detail_threshold must be 0, or above 0 with front_end "haar", got {detail_threshold}')
        blocks = in_channels * patch_size**3
        self.spatial_compression_ratio = patch_size * 2 ** len(times)
        self.temporal_compression_ratio = patch_size * math.prod(times)
        derived = {
            "z_dim": (z_dim, latent_channels),
            "scale_factor_temporal": (scale_factor_temporal, self.temporal_compression_ratio),
            "scale_factor_spatial": (scale_factor_spatial, self.spatial_compression_ratio),
        }
        for name, (given, value) in derived.items():
            if given not in (None, value):
                raise WaltError(f"{name} follows from the other fields: {given} given, {value} is right")
        self.register_to_config(**{name: value for name, (_, value) in derived.items()})
        self.patcher = Patcher(patch_size, front_end)
        self.encoder: _Encoder
        if encoder_mixers:
            self.encoder = MixingEncoder3d(
                blocks, latent_channels, encoder_widths[0], encoder_mixers, times, norm, block_shortcut
            )
        else:
            self.encoder = Encoder3d(
                blocks, latent_channels, encoder_widths, times, layers_per_block, norm, block_shortcut
            )
        shrinkage = None
        if detail_threshold:
            space = 2 ** len(times)
            shrinkage = DetailShrinkage(in_channels, patch_size, math.prod(times), space, detail_threshold)
        self.quantize: Quantizer | None = None
        if quantizer is not None:
            self.quantize = make_quantizer(quantizer, latent_channels, quantizer_config)
        elif quantizer_config is not None:
            raise WaltError("quantizer_config: there is no quantizer to configure")
        self.decoder: _Decoder
        if decoder_mixers:
            self.decoder = MixingDecoder3d(
                latent_channels,
                blocks,
                decoder_widths[0],
                decoder_mixers,
                times,
                norm,
                block_shortcut,
                shortcut_overlap,
                shrinkage,
            )
        else:
            self.decoder = Decoder3d(
                latent_channels,
                blocks,
                decoder_widths,
                times,
                layers_per_block,
                norm,
                adaptation,
                block_shortcut,
                shortcut_overlap,
                shrinkage,
            )
        self.use_slicing = False
        self.use_tiling = False
        self.use_framewise_encoding = False
        self.use_framewise_decoding = False
        self.tile_sample_min_height = 256
        self.tile_sample_min_width = 256
        self.tile_sample_min_num_frames = self.temporal_compression_ratio
        self.memory_budget: int | None = None
        self.check_values: bool | None = None

    # -- whole clips -------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes whole clips `(B, 3, 1+4k, 8h, 8w)` in [-1, 1] to `latent_dist` over `(B, c, 1+k, h, w)`."""
        self._check_video(x, first=True)
        self._check_pixels(x)
        z = self._encode(x) if not self.use_slicing else _one_by_one(self._encode, x)
        z = self._codes(z)
        # A Gaussian of variance zero: `.mode()` and `.sample()` are both the latent itself.
        dist = DiagonalGaussianDistribution(torch.cat([z, torch.zeros_like(z)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decodes raw (not normalised) latents `(B, c, 1+k, h, w)` to video `(B, 3, 1+4k, 8h, 8w)`."""
        self._check_latent(z)
        self._check_scale(z)
        x = self._decode(z) if not self.use_slicing else _one_by_one(self._decode, z)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, sample: Tensor, noise: Tensor | None = None, return_dict: bool = True) -> Any:
        """Reconstructs `(B, 3, 1+4k, 8h, 8w)`.

        With `noise` (as the latent; zeros are fine), added before decoding in units of each channel's standard deviation
        over the batch, and `return_dict=False`, training gets `(reconstruction, latent)`, the latent without the noise;
        with a quantizer, which takes no noise, `(reconstruction, Quantized)`.
        """
        self._check_video(sample, first=True)
        self._check_pixels(sample)
        # A frozen encoder keeps nothing for a backward.
        learns = sample.requires_grad or any(weight.requires_grad for weight in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            z = self._encode(sample)
        if self.quantize is not None:
            if noise is not None:
                raise WaltError("noise: codes take none")
            quantized = self.quantize(z)
            x = self._decode(quantized.z)
            return DecoderOutput(sample=x) if return_dict else (x, quantized)
        if noise is None:
            return DecoderOutput(sample=self._decode(z)) if return_dict else (self._decode(z), z)
        x = self._decode(_with_noise(z, noise))
        return DecoderOutput(sample=x) if return_dict else (x, z)

    def _encode(self, x: Tensor) -> Tensor:
        count = 1 + (x.shape[2] - 1) // self.temporal_compression_ratio
        plan = self._plan(self.encoder, x.shape[0], count, x.shape[3:], x)
        if not plan.frames:
            return self._encode_part(x, None, True, plan.rows)[0]
        z, start, ratio = None, 0, self.temporal_compression_ratio
        cache: Past = START
        for size in plan.parts(count):
            # The first latent of a clip stands for one frame, each later one for `ratio`.
            part = x[:, :, max(0, 1 + (start - 1) * ratio) : 1 + (start + size - 1) * ratio]
            piece, cache = self._encode_part(part, cache, start == 0, plan.rows)
            cache = list(cache)  # the network's to empty
            z = z or Canvas((*piece.shape[:2], count, *piece.shape[3:]))
            z.write(piece, start)
            start += size
        assert z is not None
        return z.read()

    def _decode(self, z: Tensor) -> Tensor:
        s, t = self.spatial_compression_ratio, self.temporal_compression_ratio
        b, _, count, h, w = z.shape
        plan = self._plan(self.decoder, b, count, (h * s, w * s), z)
        if not plan.frames and not plan.rows:
            return self.patcher.join(self.decoder(z)[0], first=True)
        x, start = Canvas((b, self.config["in_channels"], 1 + (count - 1) * t, h * s, w * s)), 0
        cache: Past = START if plan.frames else None
        for part in z.split(plan.parts(count), dim=2):
            cache = self._decode_part(part, cache, start == 0, plan.rows, x, max(0, 1 + (start - 1) * t))
            cache = cache and list(cache)  # the network's to empty
            start += part.shape[2]
        return x.read()

    def _encode_part(self, x: Tensor, past: Past, first: bool, rows: int | None) -> tuple[Tensor, Past]:
        """Latents of a whole clip (past None) or of a chunk, in stripes of `rows` latent rows if given."""
        if not rows:
            return cast(tuple[Tensor, Past], self.encoder(self.patcher.split(x, first), past))
        p, s, t = self.patcher.patch, self.spatial_compression_ratio, self.temporal_compression_ratio
        count = (x.shape[2] - int(first)) // t + int(first)
        z, top = Canvas((x.shape[0], self.config["latent_channels"], count, x.shape[3] // s, x.shape[4] // s)), 0

        def read(upper: int, lower: int) -> Tensor:
            return self.patcher.split(x[..., upper * p : lower * p, :], first)

        def emit(piece: Tensor) -> None:
            nonlocal top
            z.write(piece, 0, top)
            top += piece.shape[3]

        _, present = self.encoder(x, past, Stripes(x.shape[3] // p, rows, read, emit, isinstance(past, list)))
        return z.read(), present

    def _decode_part(self, z: Tensor, past: Past, first: bool, rows: int | None, x: Canvas, frame: int) -> Past:
        """Puts the video of a whole clip (past None) or of a chunk into `x` from `frame` on; returns the new past."""
        if not rows:
            blocks, present = self.decoder(z, past)
            x.write(self.patcher.join(blocks, first), frame)
            return present
        top = 0

        def read(upper: int, lower: int) -> Tensor:
            return z[..., upper:lower, :]

        def emit(blocks: Tensor) -> None:
            nonlocal top
            piece = self.patcher.join(blocks, first)
            x.write(piece, frame, top)
            top += piece.shape[3]

        return self.decoder(z, past, Stripes(z.shape[3], rows, read, emit, isinstance(past, list)))[1]

    # -- codes -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_indices(self, x: Tensor) -> Tensor:
        """Codes int64 `(B, 1+k, h, w)` of whole clips `(B, 3, 1+4k, 8h, 8w)`; needs a quantizer."""
        self._check_video(x, first=True)
        return self._codebook().latents_to_indices(self._encode(x))

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Video `(B, 3, 1+4k, 8h, 8w)` in [-1, 1] of codes `(B, 1+k, h, w)`; needs a quantizer."""
        if indices.ndim != 4 or 0 in indices.shape:
            raise WaltError(f"indices must be (B, t, h, w), got shape {tuple(indices.shape)}")
        codes = self._codebook().indices_to_codes(indices)
        return self._decode(codes.to(self.dtype)).clamp(-1.0, 1.0)

    @property
    def vocab_size(self) -> int:
        """The number of codes; needs a quantizer."""
        return self._codebook().size

    def _codebook(self) -> Quantizer:
        if self.quantize is None:
            raise WaltError("this tokenizer has continuous latents: only one with a quantizer has codes")
        return self.quantize

    def _codes(self, z: Tensor) -> Tensor:
        """The codes of latents where there is a quantizer, the latents themselves where there is none."""
        if self.quantize is None:
            return z
        return self.quantize.indices_to_codes(self.quantize.latents_to_indices(z)).to(z.dtype)

    def to_json_string(self) -> str:
        """The config file: that of continuous latents says nothing of quantizers, as before there were any."""
        config = json.loads(super().to_json_string())
        if config.get("quantizer") is None:
            config.pop("quantizer", None)
            config.pop("quantizer_config", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # -- start of training -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_block_shortcut(self, videos: Iterable[Tensor]) -> None:
        """Puts the principal components of `videos` into the block shortcut and silences the networks around it.

        Afterwards the model is the best linear block tokenizer of these videos: c components per block, scaled so that
        every channel of a first frame has unit variance. The components of later frames are turned towards those of first
        frames (orthogonal Procrustes), so that a still picture has nearly the same latent at every time.

        Args:
            videos: batches `(B, 3, T, H, W)` in [-1, 1]; clips must be among them.

        Raises:
            WaltError: no block shortcut, no clips, or more latent channels than a block has values.
        """
        encode, decode = self.encoder.shortcut, self.decoder.shortcut
        if encode is None or decode is None:
            raise WaltError("fit_block_shortcut needs a model with block_shortcut=True")
        features, time = int(self.config["latent_channels"]), encode.time
        sums: list[list[Any]] = [[0, 0.0, 0.0], [0, 0.0, 0.0]]
        for video in videos:
            blocks = self.patcher.split(video, first=True).double()
            # The first frame as a still block, so that both kinds live in one space.
            still = blocks[:, :, :1].repeat_interleave(time, dim=2)
            for total, part in zip(sums, (still, blocks[:, :, 1:]), strict=True):
                if part.shape[2]:
                    rows = encode.pack(part, time).flatten(0, 3)
                    total[0] += len(rows)
                    total[1] += rows.sum(dim=0)
                    total[2] += rows.T @ rows
        if not sums[1][0]:
            raise WaltError(
                "block_shortcut is fitted to clips, but every video has one frame: add a shape with more frames, or train "
                "with model.block_shortcut=false"
            )
        values = min(encode.first.in_features, encode.later.in_features)
        if features > values:
            raise WaltError(
                f"latent_channels: {features} given, a block has {values} values, which block_shortcut allows"
            )

        def principal(total: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            mean = total[1] / total[0]
            covariance = total[2] / total[0] - torch.outer(mean, mean)
            values, vectors = torch.linalg.eigh(covariance)
            return mean, covariance, vectors[:, -features:].flip(1), values[-features:].flip(0).clamp_min(1e-12)

        mean, covariance, basis, variance = principal(sums[0])
        later_mean, _, later_basis, _ = principal(sums[1])
        scale = variance.sqrt()
        u, _, v = torch.linalg.svd(later_basis.T @ covariance @ basis)
        later_basis = later_basis @ (u @ v)
        # Rows of a still block hold each value `time` times: fold them for the map of the lone first frame.
        channels = encode.first.in_features // encode.space**2

        def fold(rows: Tensor) -> Tensor:
            return rows.reshape(-1, channels, time, encode.space**2).sum(dim=2).flatten(1)

        down, up = (basis / scale).T, basis * scale
        later_down, later_up = (later_basis / scale).T, later_basis * scale
        encode.first.weight.copy_(fold(down))
        encode.first.bias.copy_(-down @ mean)
        encode.later.weight.copy_(later_down)
        encode.later.bias.copy_(-later_down @ mean)
        _set_map(decode.first, fold(up.T).T / time, fold(mean[None])[0] / time)
        _set_map(decode.later, later_up, later_mean - later_basis @ (later_basis.T @ (later_mean - mean)))
        self.encoder.silence()
        self.decoder.silence()

    @torch.no_grad()
    def hold_keyframes(self) -> None:
        """Every later latent's shortcut reads the last of its frames alone, just as a clip's first frame is read.

        The latents of a clip are then those of its frames 0, 4, 8, ... as images, so that images teach a denoiser what
        clips look like; the frames between are the decoder's to find, and the encoder's network's to describe. The
        decoder's shortcut shows each of these frames as a still; one with `shortcut_overlap` can be fitted next
        (`fit_decoder_shortcut`).

        Raises:
            WaltError: no block shortcut.
        """
        encode, decode = self.encoder.shortcut, self.decoder.shortcut
        if encode is None or decode is None:
            raise WaltError("hold_keyframes needs a model with block_shortcut=True")
        time, space = encode.time, encode.space
        weight, bias = encode.first.weight, encode.first.bias
        # Row by row: what the last frame of a block of these values is, as a still.
        values = torch.eye(encode.later.in_features, dtype=torch.float64, device=weight.device)
        video = self.patcher.join(_unpack(values[:, None, None, None], time, space), first=False)
        still = encode.pack(self.patcher.split(video[:, :, -1:], first=True), 1).flatten(1)
        encode.later.weight.copy_((still @ weight.double().T).T)
        encode.later.bias.copy_(bias)
        # Of a lapped map what each latent does to its own place.
        rings = self.config["shortcut_overlap"]
        own = (
            decode.first.weight[:, :, 0, rings, rings] if isinstance(decode, LappedProjection) else decode.first.weight
        )
        maps = torch.cat([own, cast(Tensor, decode.first.bias)[:, None]], dim=1)
        picture = self.patcher.join(_unpack(maps.double().T[:, None, None, None], 1, space), first=True)
        frames = picture.expand(-1, -1, self.temporal_compression_ratio, -1, -1)
        later = encode.pack(self.patcher.split(frames, first=False), time).flatten(1)
        _set_map(decode.later, later[:-1].T, later[-1])

    @torch.no_grad()
    def fit_decoder_shortcut(
        self, videos: Iterable[Tensor], noise: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        """Fits a decoder shortcut with `shortcut_overlap` to `videos` by least squares, and silences the network beside it.

        The encoder stays as it is: the result is the best linear decoder of its latents that reads that neighbourhood.

        Args:
            videos: batches `(B, 3, T, H, W)` in [-1, 1]; clips must be among them.
            noise: the latents are read with Gaussian noise of a random std up to this, in units of each channel's, so that
                the map does not lean on differences that a denoiser will not get right.
            generator: where the noise comes from.

        Raises:
            WaltError: no `shortcut_overlap`, or no clips.
        """
        shortcut = self.decoder.shortcut
        if not isinstance(shortcut, LappedProjection):
            raise WaltError(
                "fit_decoder_shortcut needs a model with block_shortcut=True and shortcut_overlap of at least 1"
            )
        sums: dict[nn.Conv3d, list[Tensor]] = {}
        for video in videos:
            z = self._encode(video)
            if noise:
                strength = noise * torch.rand((len(z), 1, 1, 1, 1), generator=generator)
                z = _with_noise(z, (strength * torch.randn(z.shape, generator=generator)).to(z))
            blocks = self.patcher.split(video, first=True)
            for layer, x, time in shortcut.parts(z, None):
                part = blocks[:, :, :1] if time == 1 and layer is shortcut.first else blocks[:, :, 1:]
                wanted = _pack(part, time, shortcut.space).flatten(0, 3).double()
                kernel, read = layer.kernel_size, x
                for axis in range(3):
                    read = read.unfold(2 + axis, kernel[axis], 1)
                rows = read.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(0, 3).flatten(1).double()
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
                total = sums.setdefault(layer, [rows.new_zeros(()), rows.new_zeros(())])
                total[0], total[1] = total[0] + rows.T @ rows, total[1] + rows.T @ wanted
        if shortcut.later not in sums:
            raise WaltError("a decoder shortcut is fitted to clips, but every video has one frame")
        for layer, (square, cross) in sums.items():
            # A trace of ridge: latents that never vary must not divide by zero.
            square.diagonal().add_(1e-6 * square.diagonal().mean())
            solution = torch.linalg.solve(square, cross)
            layer.weight.copy_(solution[:-1].T.reshape(layer.weight.shape))
            cast(Tensor, layer.bias).copy_(solution[-1])
        self.decoder.silence()

    # -- streams -----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode_chunk(self, x: Tensor, cache: Past = None) -> tuple[Tensor, Past]:
        """Encodes the next frames of a stream.

        Args:
            x: `(B, 3, 1+4k, 8h, 8w)` for the first chunk (cache None), then `(B, 3, 4k, 8h, 8w)`.
            cache: None to begin, afterwards what the last call returned. A value: two streams may interleave.

        Returns:
            The latents of the new frames `(B, c, k (+1), h, w)` and the cache for the next call.
        """
        self._check_streaming()
        first = cache is None
        self._check_video(x, first)
        self._check_pixels(x)
        count = -(-x.shape[2] // self.temporal_compression_ratio)
        rows = self._plan(self.encoder, x.shape[0], count, x.shape[3:], x, stream=True).rows
        z, present = self._encode_part(x, START if first else cache, first, rows)
        return self._codes(z), present

    @apply_forward_hook
    def decode_chunk(self, z: Tensor, cache: Past = None) -> tuple[Tensor, Past]:
        """Decodes the next latents `(B, c, k, h, w)` of a stream: `1 + 4(k-1)` frames at first, then `4k`."""
        self._check_streaming()
        self._check_latent(z)
        self._check_scale(z)
        s, t, first = self.spatial_compression_ratio, self.temporal_compression_ratio, cache is None
        b, _, count, h, w = z.shape
        rows = self._plan(self.decoder, b, count, (h * s, w * s), z, stream=True).rows
        x = Canvas((b, self.config["in_channels"], count * t - (t - 1) * int(first), h * s, w * s))
        present = self._decode_part(z, START if first else cache, first, rows, x, 0)
        return x.read(), present

    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Decodes `(B, c, t, h, w)` piece by piece, for a writer that needs no more than the newest frames.

        Yields `(B, 3, 1, H, W)`, then `(B, 3, 4, H, W)` for every later latent (`tile_sample_min_num_frames` makes the
        pieces longer). Memory does not grow with t.
        """
        cache = None
        for part in z.split(Plan(None, self._framewise_latents()).parts(z.shape[2]), dim=2):
            piece, cache = self.decode_chunk(part, cache)
            cache = list(cache)
            yield piece
            del piece

    # -- memory ------------------------------------------------------------------------------------------------------

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        tile_sample_stride_num_frames: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        """Encodes and decodes frames in stripes, with the result of the whole frame (`walt.tokenizers.tiling`).

        Args:
            tile_sample_min_height, tile_sample_min_width: pixels of a tile (256 each until set). A stripe has the full
                width and as many rows as keep it to the pixels of such a tile, at least one latent row.
            tile_sample_min_num_frames: frames that `use_framewise_encoding` and `use_framewise_decoding` take at a time
                (default 4, one latent).
            tile_sample_stride_height, tile_sample_stride_width, tile_sample_stride_num_frames: accepted, without
                effect: in other models they set the overlap that is blended, and here nothing overlaps.
            memory_budget: bytes that an encode or decode may take beside its weights, input and output. The cheapest
                way that fits is chosen for each input, stripes first, then frame by frame; the other arguments and the
                framewise flags are then not looked at.

        Raises:
            WaltError: a value below 1, or a tokenizer with group norm or global adaptation, which needs whole clips.
        """
        self._check_streaming("tile")
        given = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
            "tile_sample_min_num_frames": tile_sample_min_num_frames,
            "tile_sample_stride_height": tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width,
            "tile_sample_stride_num_frames": tile_sample_stride_num_frames,
            "memory_budget": memory_budget,
        }
        for name, value in given.items():
            if value is not None and value < 1:
                raise WaltError(f"{name} must be at least 1, got {value}")
        for name in ("tile_sample_min_height", "tile_sample_min_width", "tile_sample_min_num_frames"):
            if given[name] is not None:
                setattr(self, name, given[name])
        self.memory_budget = memory_budget
        self.use_tiling = True

    def _framewise_latents(self) -> int:
        return max(1, self.tile_sample_min_num_frames // self.temporal_compression_ratio)

    def _plan(
        self, network: nn.Module, batch: int, count: int, size: Sequence[int], like: Tensor, stream: bool = False
    ) -> Plan:
        """How to run a clip of `count` latents and `size` pixels; a `stream` has its frames chosen by the caller."""
        framewise = self.use_framewise_encoding if network is self.encoder else self.use_framewise_decoding
        if framewise and not stream:
            self._check_streaming("encode or decode frame by frame")
        frames = self._framewise_latents() if framewise and not stream and count > 1 else None
        h, w = size[0] // self.spatial_compression_ratio, size[1] // self.spatial_compression_ratio
        if self.use_tiling and self.memory_budget is None:
            rows = (
                self.tile_sample_min_height * self.tile_sample_min_width // (size[1] * self.spatial_compression_ratio)
            )
            return Plan(max(1, rows) if rows < h else None, frames)

        def bytes_of(plan: Plan, latents: int = count) -> int:
            return self._need(network, plan, batch, latents, h, w, stream) * like.element_size()

        budget = self.memory_budget if self.use_tiling else None
        if budget is None:
            if frames or stream or count <= WHOLE_LATENTS or not self._may_cut(network):
                return Plan(None, frames)
            # Half: where Winograd's convolutions run, a whole clip takes less than its estimate, which a part does not.
            budget = max(WHOLE_BYTES, bytes_of(Plan(None, None), WHOLE_LATENTS) // 2)
        plans = [Plan(rows, None) for rows in (None, *_halves(h))]
        if not stream and count > 1:
            plans += [Plan(rows, 1) for rows in (None, *_halves(h))]
        needs = [bytes_of(plan) for plan in plans]
        for plan, need in zip(plans, needs, strict=True):
            if need <= budget:
                return plan
        if self.use_tiling:
            raise WaltError(
                f"memory_budget: {budget} bytes given, {count} latents of {size[0]}x{size[1]} pixels need at least about "
                f"{min(needs)}"
            )
        return min(zip(plans, needs, strict=True), key=lambda pair: pair[1])[0]

    def _may_cut(self, network: nn.Module) -> bool:
        """Whether a clip may pass in parts unasked: exactly, without a graph that holds all anyway, and without compiling
        every kind of part."""
        compiled = hasattr(network, "_orig_mod") or network._compiled_call_impl is not None
        return self._streams and not compiled and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _need(
        self, network: nn.Module, plan: Plan, batch: int, count: int, height: int, width: int, stream: bool
    ) -> int:
        """An estimate of the most numbers held at once, beside weights, input and output.

        Args:
            network: the encoder or the decoder.
            plan: how it is run.
            batch, count, height, width: of the latent.
            stream: whether the past is kept, as for a chunk.
        """
        times = [2 if down else 1 for down in self.config["temporal_downsample"]]
        at_once, streaming = min(count, plan.frames or count), stream or plan.frames is not None
        carried = past = busiest = weights = 0
        for narrow, wide, taps, space, time in _convolutions(cast(Any, network), times):
            frames = at_once * time + 2
            row, rows = width * space * frames, min(height, plan.rows or height) * space
            weights = max(weights, taps * narrow * wide)
            if plan.rows:
                carried += 4 * narrow * row  # two rows of its input, two of a shortcut
            if streaming:
                past += 2 * narrow * width * height * space**2
            # Input, normed input, padded input, each also in the layout of the convolution; output twice.
            busiest = max(busiest, (LIVE_INPUTS * narrow + LIVE_OUTPUTS * wide) * row * (rows + 4 * bool(plan.rows)))
        # The largest weights in the layouts of the convolution: measured, for a network of 128 channels.
        return batch * (carried + past + busiest) + 6 * weights

    @property
    def _streams(self) -> bool:
        """Whether no statistic crosses time or space."""
        return bool(self.config["norm"] == "channel" and self.config["adaptation"] == "local")

    # -- boundary ----------------------------------------------------------------------------------------------------

    def _check_streaming(self, what: str = "stream") -> None:
        if not self._streams:
            raise WaltError(
                f"this tokenizer cannot {what}: norm='group' and adaptation='global' take statistics over the whole "
                f"clip (config: norm={self.config['norm']!r}, adaptation={self.config['adaptation']!r}); encode or "
                "decode whole clips, or train with norm='channel', adaptation='local'"
            )

    def _check_video(self, x: Tensor, first: bool) -> None:
        s, t, c = self.spatial_compression_ratio, self.temporal_compression_ratio, self.config["in_channels"]
        if x.ndim != 5 or x.shape[1] != c:
            raise WaltError(f"video must be (B, {c}, T, H, W), got shape {tuple(x.shape)}")
        if x.shape[3] % s or x.shape[4] % s or 0 in x.shape:
            raise WaltError(f"video height and width must be multiples of {s}, got {x.shape[3]}x{x.shape[4]}")
        if first and x.shape[2] % t != 1 % t:
            raise WaltError(f"a clip has 1 + {t}k frames (1, {1 + t}, {1 + 2 * t}, ...), got {x.shape[2]}")
        if not first and x.shape[2] % t:
            raise WaltError(f"a later chunk of a stream has a multiple of {t} frames, got {x.shape[2]}")

    def _check_pixels(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise WaltError(f"video must be floating point in [-1, 1], got {x.dtype}: convert with x / 127.5 - 1")
        if not self._looks(x):
            return
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise WaltError("video must be finite, got NaN or infinite pixels")
        if max(-low, high) > PIXEL_LIMIT:
            raise WaltError(f"video must lie in [-1, 1], got {low:g} to {high:g}: convert 0..255 with x / 127.5 - 1")

    def _check_scale(self, z: Tensor) -> None:
        if not z.is_floating_point():
            raise WaltError(f"latents must be floating point, got {z.dtype}")
        if not self._looks(z):
            return
        low, high = (float(v) for v in torch.aminmax(z.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise WaltError("latents must be finite, got NaN or infinite values")
        mean, std = self.config["latents_mean"] or [0.0], self.config["latents_std"] or [1.0]
        limit = max(abs(m) for m in mean) + LATENT_LIMIT * max(std)
        if max(-low, high) > limit:
            raise WaltError(
                f"latents must be this tokenizer's own, within +-{limit:.4g}, got {low:g} to {high:g}: are they of "
                "another model, or scaled?"
            )

    def _looks(self, x: Tensor) -> bool:
        """Whether to read values: on a GPU that would wait for all queued work, in a compiled graph break it."""
        if torch.compiler.is_compiling() or x.device.type == "meta" or self.check_values is False:
            return False
        return x.device.type == "cpu" or self.check_values is True

    def _check_latent(self, z: Tensor) -> None:
        c = self.config["latent_channels"]
        if z.ndim != 5 or z.shape[1] != c or 0 in z.shape:
            raise WaltError(f"latents must be (B, {c}, t, h, w), got shape {tuple(z.shape)}")


def _one_by_one(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """`run` of each sample, all in one output; never all of them twice, as when they are joined afterwards."""
    first = run(batch[:1])
    if len(batch) == 1:
        return first
    whole = first.new_empty(len(batch), *first.shape[1:])
    whole[:1] = first
    del first
    for i in range(1, len(batch)):
        whole[i : i + 1] = run(batch[i : i + 1])
    return whole


def _convolutions(network: _Encoder | _Decoder, times: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """In order: channels in, channels out, taps, and how many times finer than the latent its output is in space and time."""
    levels = len(times)
    level = 0 if isinstance(network, Encoder3d) else levels

    def scales() -> tuple[int, int]:
        return 2 ** (levels - level), math.prod(times[level:])

    for layer in (getattr(network, "conv_in", None), *network.layers, getattr(network, "conv_out", None)):
        if isinstance(layer, MixingBlock):
            # The MLP's hidden values weigh most.
            yield layer.mlp_in.in_features, layer.mlp_in.out_features, 1, *scales()
        elif isinstance(layer, ResidualBlock):
            for conv in (layer.conv1, layer.conv2):
                yield conv.in_channels, conv.out_channels, 27, *scales()
        elif isinstance(layer, Upsample):
            yield layer.conv.in_channels, layer.conv.out_channels, 27, *scales()
            level -= 1
        elif isinstance(layer, CausalConv3d):
            yield layer.in_channels, layer.out_channels, 27, *scales()
            level += layer.stride[1] - 1


def _with_noise(z: Tensor, noise: Tensor) -> Tensor:
    """Latents `(B, c, t, h, w)` with noise in units of each channel's std: an encoder gains nothing by speaking louder."""
    return z + noise.to(z.dtype) * z.float().std(dim=(0, 2, 3, 4), keepdim=True, correction=0).to(z.dtype)


def _halves(rows: int) -> list[int]:
    """A half, a quarter, ... of so many rows, down to 1."""
    found = []
    while rows > 1:
        rows = -(-rows // 2)
        found.append(rows)
    return found or [1]


def _check_config(
    patch: int,
    front_end: str,
    norm: str,
    adaptation: str,
    temporal_downsample: Sequence[bool],
    halves: dict[str, tuple[Sequence[int], int]],
) -> None:
    """`halves`: the widths and the mixing blocks of encoder and decoder."""
    allowed = {"front_end": ("haar", "space_to_depth"), "norm": ("channel", "group"), "adaptation": ("local", "global")}
    for name, value in (("front_end", front_end), ("norm", norm), ("adaptation", adaptation)):
        if value not in allowed[name]:
            raise WaltError(f"{name} must be one of {allowed[name]}, got {value!r}")
    if patch not in (1, 2, 4):
        raise WaltError(f"patch_size must be 1, 2 or 4, got {patch}")
    for half, (widths, mixers) in halves.items():
        if mixers < 0 or (mixers and (norm != "channel" or adaptation != "local")):
            raise WaltError(
                f"{half}_mixers must be 0, or above 0 with norm='channel' and adaptation='local', got "
                f"{mixers} with {norm!r} and {adaptation!r}"
            )
        levels = 1 if mixers else len(temporal_downsample) + 1
        if mixers and len(widths) != 1:
            raise WaltError(f"{half}_widths: one width with {half}_mixers={mixers}, got {tuple(widths)}")
        if len(widths) != levels:
            raise WaltError(
                f"{half}_widths needs {levels} widths, one more than temporal_downsample={tuple(temporal_downsample)} has "
                f"entries, got {tuple(widths)}"
            )
