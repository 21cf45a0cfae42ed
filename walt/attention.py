"""Windows and their plan; the only file that calls an attention kernel.

Attention never sees a mask: a plan sorts the windows of a pack by length, windows of one length become the batch
dimension of one call, and a border that does not fill a window is a shorter window. Plans are built on the host, once
per set of grids, cached, and copied to the device without blocking.
Letters: L tokens, N heads, d head size, W windows of a group, n tokens of a window, s text states of a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from walt.errors import WaltError
from walt.latents import Grid, positions, token_counts

Window = tuple[int | None, int | None, int | None]
"""Frames, rows and columns of a window in tokens; None is the sample's whole extent."""


class WindowGroup(NamedTuple):
    """`windows` windows of `length` tokens that lie end to end from token `start` of the planned order."""

    start: int
    windows: int
    length: int
    context_length: int = 0
    context_start: int = 0
    shape: Grid | None = None


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """How a pack is read window by window.

    Attributes:
        tokens: L.
        groups: windows that attend, ordered by length (then text length, then shape).
        singles: how many tokens, first in the order, are alone in their window without text: the output of their
            attention is their own value, so no score is computed (the paper's identity mask for images).
        order: `(L,)` int64, the pack index of each planned place; None when the pack is in that order already.
        inverse: the inverse permutation, or None.
        offsets: for every group, when planned by shape, `(n * n,)` int32: the entry of each query-key pair in the
            flattened relative table of the group's shape.
        context_index: for every window of every group, in order, the rows of its sample's packed text states.
    """

    tokens: int
    groups: tuple[WindowGroup, ...]
    singles: int
    order: Tensor | None
    inverse: Tensor | None
    context_index: Tensor | None
    offsets: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> WindowPlan:
        """The plan with its indices on `device`, copied once per device."""
        device = torch.device(device)
        return self if device.type == "cpu" else _plan_on(self, device)

    def gather(self, x: Tensor) -> Tensor:
        """`(L, ...)` from pack order to window order."""
        if self.order is None or self.inverse is None:
            return x
        return _Permute.apply(x, self.order, self.inverse)

    def scatter(self, x: Tensor) -> Tensor:
        """`(L, ...)` from window order back to pack order."""
        if self.order is None or self.inverse is None:
            return x
        return _Permute.apply(x, self.inverse, self.order)


@lru_cache(maxsize=512)
def plan_windows(
    grids: tuple[Grid, ...],
    window: Window = (None, None, None),
    shift: Grid = (0, 0, 0),
    *,
    identity_images: bool = False,
    contexts: tuple[int, ...] | None = None,
    by_shape: bool = False,
) -> WindowPlan:
    """Plans the windows of every sample of a pack, on the host.

    Args:
        grids: the samples, in pack order.
        window: its size; an axis that is None or not shorter than the sample is one whole window.
        shift: length of the first window of each axis (less than the window's, 0 = unshifted). Layers alternate
            between 0 and half a window, so that windows talk to each other; whole axes have nothing to shift.
        identity_images: a one-frame sample has windows of one token (papers 1.3: images in spatiotemporal layers
            attend by the identity mask).
        contexts: text length of each sample; a window then also attends to the text of its sample.
        by_shape: also keep windows of equal length but different shape apart (a relative bias needs that).

    Raises:
        WaltError: an empty pack, a window below 1, a shift outside [0, window), or `contexts` of another length.
    """
    if not grids:
        raise WaltError("grids: empty, at least one sample needed")
    if any(n is not None and n < 1 for n in window):
        raise WaltError(f"window: {window} given, positive sizes or None needed")
    if any(s < 0 or (s and (n is None or s >= n)) for s, n in zip(shift, window, strict=True)):
        raise WaltError(f"shift: {shift} given, 0 or less than the window {window} needed on every axis")
    if contexts is not None and len(contexts) != len(grids):
        raise WaltError(f"contexts: {len(contexts)} text lengths given for {len(grids)} samples")

    lengths = token_counts(grids)
    texts = contexts if contexts is not None else (0,) * len(grids)
    token_starts, text_starts = (
        list(itertools.accumulate(lengths, initial=0)),
        list(itertools.accumulate(texts, initial=0)),
    )
    # An inference tensor in the cache could not be used for training later.
    with torch.inference_mode(False):
        found: dict[tuple[int, int, Grid], list[tuple[int, _Piece]]] = {}
        for i, (grid, text) in enumerate(zip(grids, texts, strict=True)):
            size = (1, 1, 1) if identity_images and grid[0] == 1 else window
            for piece in _cut(grid, size, (0, 0, 0) if size == (1, 1, 1) else shift):
                length = piece.shape[0] * piece.shape[1] * piece.shape[2]
                key = (length, text, piece.shape if by_shape else (0, 0, 0))
                found.setdefault(key, []).append((i, piece))

        groups, order, context_index = [], [], []
        start = context_start = singles = 0
        identity = True
        for (length, text, shape), windows in sorted(found.items(), key=lambda item: item[0]):
            count = 0
            for i, piece in windows:
                identity &= piece.first is not None and token_starts[i] + piece.first == start + count * length
                order.append(piece.tokens + token_starts[i])
                count += piece.windows
            if length == 1 and not text:
                singles += count
            else:
                if text:
                    context_index += [
                        torch.arange(text, device="cpu").add(text_starts[i]).repeat(piece.windows)
                        for i, piece in windows
                    ]
                groups.append(WindowGroup(start, count, length, text, context_start, shape if by_shape else None))
                context_start += count * text
            start += count * length

        permutation = torch.cat(order)
        return WindowPlan(
            start,
            tuple(groups),
            singles,
            None if identity else permutation,
            None if identity else torch.argsort(permutation),
            torch.cat(context_index) if context_index else None,
            tuple(_offsets(g.shape) for g in groups if g.shape is not None),
        )


class _Piece(NamedTuple):
    """`windows` windows of one shape in one sample, their token indices end to end, each window in raster order."""

    shape: Grid
    windows: int
    tokens: Tensor
    first: int | None  # the first index when they are consecutive: known without looking, so plans can be traced


@lru_cache(maxsize=512)
def _cut(grid: Grid, window: Window, shift: Grid) -> tuple[_Piece, ...]:
    t, h, w = grid
    index = torch.arange(t * h * w, device="cpu")
    if window == (1, 1, 1):
        return (_Piece((1, 1, 1), t * h * w, index, 0),)
    raster = index.view(grid)
    pieces = []
    for (t0, t1), (h0, h1), (w0, w1) in itertools.product(*map(_edges, grid, window, shift)):
        shape = (t1 - t0, h1 - h0, w1 - w0)
        consecutive = shape[1:] == (h, w) or (shape[0] == 1 and (shape[2] == w or shape[1] == 1))
        first = (t0 * h + h0) * w + w0 if consecutive else None
        pieces.append(_Piece(shape, 1, raster[t0:t1, h0:h1, w0:w1].reshape(-1), first))
    return tuple(pieces)


def _edges(size: int, window: int | None, shift: int) -> list[tuple[int, int]]:
    if window is None or window >= size:
        return [(0, size)]
    return list(itertools.pairwise([0, *range(shift or window, size, window), size]))


@lru_cache(maxsize=512)
def _plan_on(plan: WindowPlan, device: torch.device) -> WindowPlan:
    def move(index: Tensor | None) -> Tensor | None:
        if index is None:
            return None
        if device.type == "cuda":
            index = index.pin_memory()  # only from pinned memory does the copy not block
        return index.to(device, non_blocking=True)

    with torch.inference_mode(False):
        return WindowPlan(
            plan.tokens,
            plan.groups,
            plan.singles,
            move(plan.order),
            move(plan.inverse),
            move(plan.context_index),
            tuple(_offsets_on(g.shape, device) for g in plan.groups if g.shape is not None),
        )


class _Permute(torch.autograd.Function):
    """Rows by a permutation; its gradient is the inverse gather, where index_select's would be a slow scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grads[0], inverse, order), None, None


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: WindowPlan,
    *,
    context_key: Tensor | None = None,
    context_value: Tensor | None = None,
    bias: Callable[..., Tensor] | None = None,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Attention of every window of a pack, one kernel call per group of equal windows, no mask and no padding.

    Args:
        query: `(L - plan.singles, N, d)` in window order; key likewise. Lone tokens need neither.
        value: `(L, N, d)` in window order.
        plan: on the device of the tensors.
        context_key: text `(S, N, d)` of all samples end to end, when the plan has contexts; value likewise.
        bias: gives the additive float bias `(1, N, n, n)` of a window shape and its offsets (`RelativeBias`); the plan
            must be made `by_shape`.
        backend: diffusers attention backend, None for the active one. A bias needs one that takes a mask.

    Returns:
        `(L, N, d)` in window order.
    """
    # Split, not sliced: the gradient of a split is one concatenation, that of slices a sum of padded copies.
    rows = [group.windows * group.length for group in plan.groups]
    queries, keys = query.split(rows), key.split(rows)
    values = value.split([plan.singles, *rows])
    out = [values[0]] if plan.singles else []
    for i, group in enumerate(plan.groups):
        q, k, v = (x.unflatten(0, (group.windows, group.length)) for x in (queries[i], keys[i], values[i + 1]))
        if group.context_length:
            assert plan.context_index is not None and context_key is not None and context_value is not None
            size = (group.windows, group.context_length)
            index = plan.context_index[group.context_start :][: group.windows * group.context_length]
            k = torch.cat([k, context_key.index_select(0, index).unflatten(0, size)], dim=1)
            v = torch.cat([v, context_value.index_select(0, index).unflatten(0, size)], dim=1)
        mask = bias(group.shape, plan.offsets[i]).to(q.dtype) if bias is not None and plan.offsets else None
        y = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel_config)
        out.append(y.flatten(0, 1))
    if not plan.groups:
        # Nothing attends (images only): empty rows keep queries, keys and bias in the graph, so their gradients are
        # zero rather than absent and a data-parallel reducer does not wait for them.
        empty = query + key
        out.append((empty if bias is None else empty + bias((1, 1, 1))[0, :, 0]).to(value.dtype))
    return out[0] if len(out) == 1 else torch.cat(out)


class RelativeBias(nn.Module):
    """Swin's relative position bias: one learned number per head and offset inside the window (papers 1.3).

    Args:
        heads: N.
        window: the shape the table is made for, in tokens.
        resize: interpolate the table in space when a window of another size is the whole frame; otherwise another
            size is a border piece and reads the same offsets. More frames than the table's are always interpolated.
    """

    def __init__(self, heads: int, window: Grid, resize: bool) -> None:
        super().__init__()
        self.window = window
        self.resize = resize
        self.table = nn.Parameter(torch.zeros(heads, *(2 * n - 1 for n in window)))

    def forward(self, shape: Grid, offsets: Tensor | None = None) -> Tensor:
        """Bias `(1, N, n, n)` of queries against keys, both in the raster order of a window of `shape`.

        `offsets` are the plan's for that shape; None for a single token.
        """
        table: Tensor = self.table
        target = []
        for axis, (n, size) in enumerate(zip(shape, self.window, strict=True), start=1):
            # A resized axis keeps its table for interpolation, but one row cannot be interpolated: take offset 0.
            stretch = n > size or (axis > 1 and self.resize and n != size and n > 1)
            if not stretch:
                table = table.narrow(axis, size - n, 2 * n - 1)
            target.append(2 * n - 1)
        if table.shape[1:] != torch.Size(target):
            table = F.interpolate(table[None].float(), size=target, mode="trilinear", align_corners=True)[0]
        n = shape[0] * shape[1] * shape[2]
        entries = table.flatten(1)
        return (entries if offsets is None else entries.index_select(1, offsets)).view(1, -1, n, n)


@lru_cache(maxsize=64)
def _offsets(shape: Grid) -> Tensor:
    """`(n * n,)` int32: place of every query-key offset in a flattened table of `2 * shape - 1` entries."""
    with torch.inference_mode(False):
        place = positions([shape])
        offset = place[:, None] - place[None] + torch.tensor(shape, device="cpu") - 1
        index = (offset[..., 0] * (2 * shape[1] - 1) + offset[..., 1]) * (2 * shape[2] - 1) + offset[..., 2]
        return index.flatten().to(torch.int32)


@lru_cache(maxsize=64)
def _offsets_on(shape: Grid, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _offsets(shape).to(device)


@lru_cache(maxsize=64)
def rotation(
    grids: tuple[Grid, ...], head_dim: int, device: torch.device, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 3D axial RoPE, each `(L, 1, head_dim / 2)` float32 in pack order.

    The pairs of a head are divided among frame, row and column (what three does not divide goes to the frame);
    positions are absolute in the token's own sample.
    """
    with torch.inference_mode(False):
        pairs = head_dim // 2
        share = pairs // 3
        place = positions(grids).to(torch.float32)
        angles = []
        for axis, n in enumerate((pairs - 2 * share, share, share)):
            frequency = theta ** -(torch.arange(n, dtype=torch.float32, device="cpu") / max(n, 1))
            angles.append(place[:, axis, None] * frequency)
        angle = torch.cat(angles, dim=1)[:, None]
        return angle.cos().to(device), angle.sin().to(device)
