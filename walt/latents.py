"""Geometry: the one packed token layout of every denoiser.

A pack is the tokens of any number of samples, one after another, `(L, D)`, with no padding; an image is a one-frame
video. Letters: C channels, t h w latent frames and size (in tokens for a `Grid`), p patch size, L tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from walt.errors import WaltError

Grid = tuple[int, int, int]
"""Frames, rows and columns of one sample, in tokens."""


def pack(latents: Sequence[Tensor], patch: int) -> tuple[Tensor, tuple[Grid, ...]]:
    """Cuts each latent frame into `patch` x `patch` squares and lays all samples end to end.

    Args:
        latents: samples `(C, t, h, w)`, of one dtype, device and C; sizes and lengths may all differ.
        patch: side of a token in latent pixels (papers: p). Frames are never merged.

    Returns:
        Tokens `(L, C * patch**2)`, samples in order and t, h, w raster inside each, features ordered (c, row, column);
        and the grid of each sample.

    Raises:
        WaltError: nothing to pack, a sample that is not 4-dimensional, unequal C, or a size `patch` does not divide.
    """
    if not len(latents):
        raise WaltError("latents: nothing to pack, give at least one sample (C, t, h, w)")
    for i, z in enumerate(latents):
        if z.ndim != 4:
            raise WaltError(f"latents[{i}]: shape {tuple(z.shape)} given, (C, t, h, w) needed")
        if z.shape[0] != latents[0].shape[0]:
            raise WaltError(f"latents[{i}]: {z.shape[0]} channels, but latents[0] has {latents[0].shape[0]}")
        h, w = z.shape[2:]
        if h % patch or w % patch or not z.numel():
            raise WaltError(f"latents[{i}]: size {h}x{w} given, positive multiples of the patch size {patch} needed")
    return pack_beside([latents], patch)


def pack_beside(pieces: Sequence[Sequence[Tensor]], patch: int) -> tuple[Tensor, tuple[Grid, ...]]:
    """`pack` of samples whose channels come in pieces: `pieces[j][i]` is `(C_j, t, h, w)` of sample i, checked before."""
    first = pieces[0]
    parts = []
    for run in runs(first):
        stacks = [stacked(piece[run]) for piece in pieces]
        z = stacks[0] if len(stacks) == 1 else torch.cat(stacks, dim=1)
        parts.append(rearrange(z, "b c t (h p) (w q) -> (b t h w) (c p q)", p=patch, q=patch))
    grids = tuple((z.shape[1], z.shape[2] // patch, z.shape[3] // patch) for z in first)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)), grids


def unpack(tokens: Tensor, grids: Sequence[Grid], patch: int) -> list[Tensor]:
    """The inverse of `pack`: tokens `(L, C * patch**2)` to one `(C, t, h, w)` tensor per grid."""
    lengths = token_counts(grids)
    if tokens.shape[0] != sum(lengths) or tokens.shape[1] % patch**2:
        raise WaltError(
            f"tokens: shape {tuple(tokens.shape)} given, ({sum(lengths)}, multiple of {patch**2}) needed by the grids"
        )
    found = [(run, grids[run.start]) for run in runs_of(grids)]
    sizes = [(run.stop - run.start) * t * h * w for run, (t, h, w) in found]
    latents: list[Tensor] = []
    for x, (_, (t, h, w)) in zip(tokens.split(sizes), found, strict=True):
        z = rearrange(x, "(b t h w) (c p q) -> b c t (h p) (w q)", t=t, h=h, w=w, p=patch, q=patch)
        latents += z.unbind()
    return latents


def runs(samples: Sequence[Tensor]) -> list[slice]:
    """Neighbours of one shape: what is done to all of them at once costs an accelerator one launch, not one each."""
    return runs_of([tuple(x.shape) for x in samples])


def runs_of(keys: Sequence[tuple[int, ...]]) -> list[slice]:
    """Neighbours of one key."""
    edges = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1]), len(keys)]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]


def stacked(samples: Tensor | Sequence[Tensor]) -> Tensor:
    """`(B, ...)` of samples of one shape; of a single one a view."""
    return samples[0][None] if len(samples) == 1 else torch.stack(list(samples))


def by_runs(function: Callable[..., Tensor], *lists: Sequence[Tensor]) -> list[Tensor]:
    """`function` of samples, run by run: of `(B, ...)` stacks it gives a stack, of which every sample is a view.

    The lists have equal runs.
    """
    result: list[Tensor] = []
    for run in runs(lists[0]):
        result += function(*(stacked(values[run]) for values in lists)).unbind()
    return result


def token_counts(grids: Sequence[Grid]) -> list[int]:
    """Number of tokens of each sample."""
    return [t * h * w for t, h, w in grids]


def positions(grids: Sequence[Grid]) -> Tensor:
    """Frame, row and column of every token in its own sample, `(L, 3)` int64 on the CPU, in pack order."""
    axes = [torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in grid)).view(-1, 3) for grid in grids]
    return torch.cat(axes)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the host without waiting, which only pinned memory allows."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def normalize(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Raw tokenizer latents `(..., C, t, h, w)` to zero mean and unit deviation per channel (papers: 1.2).

    Args:
        latents: C at dimension -4; any float dtype, kept.
        mean: C numbers, as `latents_mean` of the tokenizer's config; `std` likewise, positive.
    """
    m, s = _statistics(latents, mean, std)
    return (latents - m) / s


def denormalize(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalize`."""
    m, s = _statistics(latents, mean, std)
    return latents * s + m


def _statistics(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    channels = latents.shape[-4] if latents.ndim >= 4 else 0
    if not channels == len(mean) == len(std):
        raise WaltError(
            f"latents: shape {tuple(latents.shape)} given with {len(mean)} means and {len(std)} deviations, "
            "(..., C, t, h, w) with C of each needed"
        )
    both = torch.tensor([[*mean], [*std]], dtype=latents.dtype, device="cpu").view(2, -1, 1, 1, 1)
    m, s = both.to(latents.device, non_blocking=True)
    return m, s
