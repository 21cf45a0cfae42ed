"""The causal 3D CNN tokenizer of W.A.L.T. (MAGVIT-v2's autoencoder without a quantizer) as a diffusers model.

Letters: B batch, C channels, T frames, H W pixels; t h w latent grid. A clip has T = 1 + 4k frames, an image T = 1.

Streaming: every layer takes a `past` and returns the `past` of the next chunk, so a stream is a value passed along:
`None` means "the whole clip is here, keep nothing", `()` means "first chunk of a stream", anything else is what the
layer returned for the chunk before. Nothing is stored on a module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from walt.errors import WaltError
from walt.tokenizers import winograd

Past = Any  # None | () | nested tuples of tensors

START: tuple[()] = ()


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

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:  # type: ignore[override]
        kernel, stride = self.kernel_size[0], self.stride[0]
        if past is None and x.shape[2] == 1 and kernel > 1:
            # A lone frame meets zeros in all but the last temporal tap: a 2D convolution, a third of the work.
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self.padding[1:])
            return y.unsqueeze(2), None
        keep = kernel - stride
        if past is None and winograd.fits(x, self.weight, self.stride):
            return winograd.conv3d(x, self.weight, self.bias, self.padding[1:], before=2), None
        if kernel > 1:
            if past:
                x = torch.cat([past[0], x], dim=2)
            else:
                x = F.pad(x, (0, 0, 0, 0, kernel - 1, 0))
        present: Past = None
        if past is not None:
            present = (x[:, :, x.shape[2] - keep :].clone(),) if kernel > 1 else (x.new_zeros(0),)
        if winograd.fits(x, self.weight, self.stride):
            return winograd.conv3d(x, self.weight, self.bias, self.padding[1:]), present
        return super().forward(x), present


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position: no statistic crosses time or space."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
        return y if self.weight is None else y * self.weight.view(1, -1, 1, 1, 1)


def make_norm(kind: str, channels: int, affine: bool = True) -> nn.Module:
    """ "channel" (per position) or "group" (the paper's, over groups of channels, time and space)."""
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6, affine=affine)
    return ChannelNorm(channels, affine)


class ResidualBlock(nn.Module):
    """norm, swish, causal conv, twice; a 1x1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = make_norm(norm, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        first, second = past if past else (past, past)
        y, first = self.conv1(F.silu(self.norm1(x)), first)
        y, second = self.conv2(F.silu(self.norm2(y)), second)
        return self.shortcut(x) + y, None if past is None else (first, second)


class Upsample(nn.Module):
    """Causal convolution, then depth to space: 2x in space, `time`x in time less the first `time - 1` frames."""

    def __init__(self, in_channels: int, out_channels: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.conv = CausalConv3d(in_channels, out_channels * 4 * time)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        first = not past
        y, present = self.conv(x, past)
        b, c, t, h, w = y.shape
        y = y.reshape(b, c // (4 * self.time), self.time, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        y = y.reshape(b, c // (4 * self.time), t * self.time, 2 * h, 2 * w)
        return (y[:, :, self.time - 1 :] if first else y), present


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

    def forward(self, x: Tensor, latent: Tensor, first: bool) -> Tensor:
        y = self.norm(x)
        if self.kind == "global":
            flat = latent.flatten(2)
            scale = self.scale(flat.std(dim=2, unbiased=False))[:, :, None, None, None]
            return y * (1.0 + scale) + self.shift(flat.mean(dim=2))[:, :, None, None, None]
        affine = self.affine(latent)
        if self.time > 1:
            affine = affine.repeat_interleave(self.time, dim=2)
            affine = affine[:, :, self.time - 1 :] if first else affine
        if self.space > 1:
            affine = affine.repeat_interleave(self.space, dim=3).repeat_interleave(self.space, dim=4)
        scale, shift = affine.chunk(2, dim=1)
        return y * (1.0 + scale) + shift


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


class _Stack(nn.Module):
    """Shared running of a list of layers that pass a `past`, with gradient checkpointing on request."""

    gradient_checkpointing = False

    def _run(self, layer: nn.Module, x: Tensor, past: Past) -> tuple[Tensor, Past]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return cast(tuple[Tensor, Past], self._gradient_checkpointing_func(layer, x, past))  # type: ignore[operator]
        return cast(tuple[Tensor, Past], layer(x, past))


class Encoder3d(_Stack):
    """`(B, in_channels, T, H, W)` blocks of the front end -> `(B, out_channels, t, h, w)`."""

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
        self.shortcut = _shortcut(in_channels, out_channels, widths, times, expand=False) if shortcut else None

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        pasts = list(past) if past else [past] * (len(self.layers) + 2)
        straight = None if self.shortcut is None else self.shortcut(x, first=not past)
        x, pasts[0] = self.conv_in(x, pasts[0])
        for i, layer in enumerate(self.layers):
            x, pasts[i + 1] = self._run(layer, x, pasts[i + 1])
        x, pasts[-1] = self.conv_out(F.silu(self.norm_out(x)), pasts[-1])
        return x if straight is None else x + straight, None if past is None else tuple(pasts)


class Decoder3d(_Stack):
    """`(B, in_channels, t, h, w)` latents -> `(B, out_channels, T, H, W)` blocks of the front end."""

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
        self.shortcut = _shortcut(out_channels, in_channels, widths, times, expand=True) if shortcut else None
        self.shrinkage = shrinkage

    def forward(self, z: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        first = not past
        pasts = list(past) if past else [past] * (len(self.layers) + 2)
        x, pasts[0] = self.conv_in(z, pasts[0])
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Adaptation):
                x = layer(x, z, first)
            else:
                x, pasts[i + 1] = self._run(layer, x, pasts[i + 1])
        x, pasts[-1] = self.conv_out(F.silu(self.norm_out(x)), pasts[-1])
        if self.shortcut is not None:
            x = x + self.shortcut(z, first)
        if self.shrinkage is not None:
            x = self.shrinkage(x, first)
        return x, None if past is None else tuple(pasts)


def _shortcut(blocks: int, latent: int, widths: Sequence[int], times: Sequence[int], expand: bool) -> BlockProjection:
    return BlockProjection(blocks, latent, math.prod(times), 2 ** (len(widths) - 1), expand)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class AutoencoderKLWalt(ModelMixin, AutoencoderMixin, ConfigMixin):
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
        patch_size: 1 (the paper), 2 or 4: the lossless causal front end.
        front_end: "haar" or "space_to_depth".
        norm: "channel" (per position) or "group" (the paper's; refuses streaming).
        adaptation: "local" (1x1 map of the latent) or "global" (the paper's; refuses streaming).
        block_shortcut: a linear map per block beside the networks (`fit_block_shortcut`); not the paper's.
        detail_threshold: size below which the decoder's Haar details fade (`DetailShrinkage`), in units of the front
            end's coefficients; 0 for none, as in the paper. Needs `front_end` "haar".
        latents_mean, latents_std: per-channel statistics of encoded training data; consumers normalise by them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
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
        patch_size: int = 1,
        front_end: str = "haar",
        norm: str = "channel",
        adaptation: str = "local",
        block_shortcut: bool = False,
        detail_threshold: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        _check_config(patch_size, front_end, norm, adaptation, encoder_widths, decoder_widths, temporal_downsample)
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise WaltError(f"{name} has {len(values)} values, the latent has {latent_channels} channels")
        times = [2 if down else 1 for down in temporal_downsample]
        if detail_threshold < 0 or (detail_threshold and front_end != "haar"):
            raise WaltError(f'detail_threshold must be 0, or above 0 with front_end "haar", got {detail_threshold}')
        blocks = in_channels * patch_size**3
        self.spatial_compression_ratio = patch_size * 2 ** (len(encoder_widths) - 1)
        self.temporal_compression_ratio = patch_size * math.prod(times)
        self.patcher = Patcher(patch_size, front_end)
        self.encoder = Encoder3d(blocks, latent_channels, encoder_widths, times, layers_per_block, norm, block_shortcut)
        shrinkage = None
        if detail_threshold:
            space = 2 ** (len(decoder_widths) - 1)
            shrinkage = DetailShrinkage(in_channels, patch_size, math.prod(times), space, detail_threshold)
        self.decoder = Decoder3d(
            latent_channels,
            blocks,
            decoder_widths,
            times,
            layers_per_block,
            norm,
            adaptation,
            block_shortcut,
            shrinkage,
        )
        self.use_slicing = False
        self.use_tiling = False

    # -- whole clips -------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes whole clips `(B, 3, 1+4k, 8h, 8w)` in [-1, 1] to `latent_dist` over `(B, c, 1+k, h, w)`."""
        self._check_video(x, first=True)
        if self.use_slicing and x.shape[0] > 1:
            z = torch.cat([self._encode(part) for part in x.split(1)])
        else:
            z = self._encode(x)
        # A Gaussian of variance zero: `.mode()` and `.sample()` are both the latent itself.
        dist = DiagonalGaussianDistribution(torch.cat([z, torch.zeros_like(z)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decodes raw (not normalised) latents `(B, c, 1+k, h, w)` to video `(B, 3, 1+4k, 8h, 8w)`."""
        self._check_latent(z)
        if self.use_slicing and z.shape[0] > 1:
            x = torch.cat([self._decode(part) for part in z.split(1)])
        else:
            x = self._decode(z)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, sample: Tensor, noise: Tensor | None = None, return_dict: bool = True) -> Any:
        """Reconstructs `(B, 3, 1+4k, 8h, 8w)`.

        With `noise` (as the latent; zeros are fine), added before decoding, and `return_dict=False`, training gets
        `(reconstruction, latent)`, the latent without the noise.
        """
        self._check_video(sample, first=True)
        z = self._encode(sample)
        x = self._decode(z if noise is None else z + noise.to(z.dtype))
        return DecoderOutput(sample=x) if return_dict else (x, z)

    def _encode(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(self.patcher.split(x, first=True))[0])

    def _decode(self, z: Tensor) -> Tensor:
        return self.patcher.join(self.decoder(z)[0], first=True)

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
        decode.first.weight.copy_(fold(up.T).T / time)
        decode.first.bias.copy_(fold(mean[None])[0] / time)
        decode.later.weight.copy_(later_up)
        decode.later.bias.copy_(later_mean - later_basis @ (later_basis.T @ (later_mean - mean)))
        for layer in (self.encoder.conv_out, self.decoder.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

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
        return cast(tuple[Tensor, Past], self.encoder(self.patcher.split(x, first), START if first else cache))

    @apply_forward_hook
    def decode_chunk(self, z: Tensor, cache: Past = None) -> tuple[Tensor, Past]:
        """Decodes the next latents `(B, c, k, h, w)` of a stream: `1 + 4(k-1)` frames at first, then `4k`."""
        self._check_streaming()
        self._check_latent(z)
        first = cache is None
        x, present = self.decoder(z, START if first else cache)
        return self.patcher.join(x, first), present

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        """Spatial tiling is not part of this model yet: use `encode_chunk` / `decode_chunk` to save memory."""
        raise WaltError("spatial tiling is not available for AutoencoderKLWalt; stream with decode_chunk instead")

    # -- boundary ----------------------------------------------------------------------------------------------------

    def _check_streaming(self) -> None:
        if self.config["norm"] == "group" or self.config["adaptation"] == "global":
            raise WaltError(
                "this tokenizer cannot stream: norm='group' and adaptation='global' take statistics over the whole "
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

    def _check_latent(self, z: Tensor) -> None:
        c = self.config["latent_channels"]
        if z.ndim != 5 or z.shape[1] != c or 0 in z.shape:
            raise WaltError(f"latents must be (B, {c}, t, h, w), got shape {tuple(z.shape)}")


def _check_config(
    patch: int,
    front_end: str,
    norm: str,
    adaptation: str,
    encoder_widths: Sequence[int],
    decoder_widths: Sequence[int],
    temporal_downsample: Sequence[bool],
) -> None:
    allowed = {"front_end": ("haar", "space_to_depth"), "norm": ("channel", "group"), "adaptation": ("local", "global")}
    for name, value in (("front_end", front_end), ("norm", norm), ("adaptation", adaptation)):
        if value not in allowed[name]:
            raise WaltError(f"{name} must be one of {allowed[name]}, got {value!r}")
    if patch not in (1, 2, 4):
        raise WaltError(f"patch_size must be 1, 2 or 4, got {patch}")
    if len(encoder_widths) != len(decoder_widths):
        raise WaltError(f"encoder_widths and decoder_widths differ in length: {encoder_widths}, {decoder_widths}")
    if len(temporal_downsample) != len(encoder_widths) - 1:
        raise WaltError(
            f"temporal_downsample needs one entry per step between levels ({len(encoder_widths) - 1}), "
            f"got {tuple(temporal_downsample)}"
        )
