"""3D nearby attention, 3DNA (NUWA, arXiv 2111.12417, section 3.2), and the order in which it lets a video be decoded.

A target of `s` frames of `h` rows and `w` columns attends to a condition of `s' h' w'`. Position (k, i, j) maps to
(k s' // s, i h' // h, j w' // w), and its neighbours are the keys that lie, on every axis, within half of that axis'
extent of where it maps. The paper gives both |a - i'| <= e and a neighbourhood of e x e x e; here e is the width, as
its cost needs: 3 is one step to either side. At a border there are fewer neighbours. Text is 1 x 1 x s with the extent
"all" over its s words.

Causal means raster order (frame, row, column): a token sees exactly the neighbours that precede it, the right and lower
ones of earlier frames among them.
Letters: B batch, s h w frames, rows, columns, L = s h w tokens, N heads, d head size.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from walt.errors import WaltError, suggest
from walt.latents import Grid

Extent = tuple[int | Literal["all"], int | Literal["all"], int | Literal["all"]]
"""Width of the neighbourhood in frames, rows and columns, each odd, or "all" of that axis."""

BACKENDS = ("blocked", "flex", "natten", "full", "axial")
EVERYTHING: Extent = ("all", "all", "all")


def nearby_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extent: Extent = (3, 3, 3),
    causal: bool = False,
    backend: str | None = None,
    *,
    include_self: bool = True,
    key_mask: Tensor | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Attention of every position to its neighbours.

    Args:
        query: `(B, s, h, w, N, d)`.
        key: `(B, s', h', w', N, d)`; value likewise.
        extent: width of the neighbourhood in (frames, rows, columns).
        causal: only neighbours that precede in raster order; the sizes of query and key must be equal.
        backend: "blocked" (tiles of queries, each with the box of keys around it, as one batch: the fast one on CPU),
            "flex" (FlexAttention with a block mask; forward only on CPU), "natten" (where NATTEN is installed; not causal, equal
            sizes), "full" (full attention under a mask), "axial" (another neighbourhood: every key that shares two of
            the three mapped coordinates, the axial attention of the paper's Table 6; `extent` is not used). None takes
            "full" where the neighbourhood is everything or the condition is small, and "blocked" otherwise.
        include_self: whether a causal position is its own neighbour.
        key_mask: `(B, s', h', w')` bool, False for keys that nothing may see.
        workspace: "blocked": how many numbers of keys it fetches at once, a tile of one head at least. None: on a CPU so
            few that less memory is needed than by full attention; half a million takes a third of the time of many heads or
            samples, and some megabytes.

    Returns:
        `(B, s, h, w, N, d)`; zeros where a position has no neighbour.

    Raises:
        WaltError: shapes that do not fit, an even or negative extent, a backend that cannot do this or is not there.
    """
    size, condition = _sizes(query, key, value, key_mask)
    radius = radii(extent, condition)
    if causal and size != condition:
        raise WaltError(f"causal: query {size} and key {condition} given, equal sizes needed")
    if backend is None:
        few = math.prod(condition) <= 128
        backend = "full" if few or all(r >= n - 1 for r, n in zip(radius, condition, strict=True)) else "blocked"
    if backend not in BACKENDS:
        raise WaltError(
            f"backend: {backend!r} given, one of {', '.join(BACKENDS)} or None needed{suggest(backend, BACKENDS)}"
        )
    rule = Rule(size, condition, radius, causal, include_self, axial=backend == "axial")
    if workspace is not None and workspace < 1:
        raise WaltError(f"workspace: at least 1 number needed, got {workspace}")
    if backend == "blocked":
        return _blocked(query, key, value, rule, key_mask, workspace)
    return _RUN[backend](query, key, value, rule, key_mask)


@dataclass(frozen=True)
class Rule:
    """Which keys a position sees: everything that the backends, and the decoder's plan, must agree on."""

    size: Grid
    condition: Grid
    radius: Grid
    causal: bool = False
    include_self: bool = True
    axial: bool = False


def radii(extent: Extent, condition: Grid) -> Grid:
    """Steps to either side on every axis of `condition`; "all" reaches from anywhere to everywhere.

    Raises:
        WaltError: an extent that is neither a positive odd number nor "all".
    """
    if len(extent) != 3 or any(e != "all" and (not isinstance(e, int) or e < 1 or e % 2 == 0) for e in extent):
        raise WaltError(f'extent: {tuple(extent)} given, three positive odd widths or "all" needed')
    a, b, c = (n - 1 if e == "all" else min(e // 2, n - 1) for e, n in zip(extent, condition, strict=True))
    return a, b, c


@lru_cache(maxsize=8)
def neighbour_mask(rule: Rule) -> Tensor:
    """`(L, L')` bool: which keys each position sees."""
    with torch.inference_mode(False):
        near = [
            _map(n, m)[:, None].sub(torch.arange(m, device="cpu")).abs()
            for n, m in zip(rule.size, rule.condition, strict=True)
        ]
        axes = [x <= (0 if rule.axial else r) for x, r in zip(near, rule.radius, strict=True)]
        a, b, c = (x.view(*_place(i, n), *_place(i, m)) for i, (x, n, m) in enumerate(_numbered(axes, rule)))
        seen = (a & b) | (b & c) | (a & c) if rule.axial else a & b & c
        seen = seen.expand(*rule.size, *rule.condition).reshape(math.prod(rule.size), math.prod(rule.condition))
        if rule.causal:
            seen = seen.tril(0 if rule.include_self else -1)
        return seen


def _numbered(axes: list[Tensor], rule: Rule) -> list[tuple[Tensor, int, int]]:
    return list(zip(axes, rule.size, rule.condition, strict=True))


def _place(axis: int, size: int) -> list[int]:
    return [size if axis == i else 1 for i in range(3)]


def neighbours(rule: Rule) -> Tensor:
    """`(L, K)` int64: the keys each position sees, in raster order of their offsets, -1 where there is none.

    K is the largest neighbourhood, so a decoder that reads this table costs the same at every position.
    """
    with torch.inference_mode(False):
        if not rule.axial and all(r >= n - 1 for r, n in zip(rule.radius, rule.condition, strict=True)):
            everything = torch.arange(math.prod(rule.condition), device="cpu").expand(math.prod(rule.size), -1)
            return torch.where(neighbour_mask(rule), everything, -1) if rule.causal else everything
        coordinates = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in rule.size)).view(-1, 3)
        mapped = torch.stack(
            [_map(n, m)[coordinates[:, i]] for i, (n, m) in enumerate(zip(rule.size, rule.condition, strict=True))], 1
        )
        size = torch.tensor(rule.condition, device="cpu")
        offsets = torch.tensor(_offsets(rule), device="cpu").view(-1, 3)
        keys = mapped[:, None] + offsets
        inside = ((keys >= 0) & (keys < size)).all(-1)
        _, h, w = rule.condition
        index = (keys[..., 0] * h + keys[..., 1]) * w + keys[..., 2]
        return torch.where(inside, index, -1)


def _offsets(rule: Rule) -> list[tuple[int, int, int]]:
    if rule.axial:
        lines = set()
        for axis, n in enumerate(rule.condition):
            for step in range(1 - n, n):
                a, b, c = (step if i == axis else 0 for i in range(3))
                lines.add((a, b, c))
        offsets = sorted(lines)
    else:
        a, b, c = rule.radius
        offsets = list(itertools.product(range(-a, a + 1), range(-b, b + 1), range(-c, c + 1)))
    if rule.causal:
        last = (0, 0, 0) if rule.include_self else (0, 0, -1)
        offsets = [offset for offset in offsets if offset <= last]
    return offsets


def wave_steps(rule: Rule) -> tuple[int, int, int]:
    """Coefficients (b, a, c): positions of equal b k + a i + c j do not depend on each other and can be decoded at once.

    The step to any neighbour that a causal position sees must be negative. With radius r, the nearest neighbour in
    column is (0, 0, -1), the worst of an earlier row (0, -1, +r_w), and of an earlier frame (-1, +r_h, +r_w); so c = 1,
    a = 1 + c r_w and b = 1 + a r_h + c r_w, the smallest that do. An axis with radius 0 needs no step of its own.
    3x3x3 gives j + 2 i + 4 k.
    """
    frames, rows, columns = rule.radius
    if rule.axial:
        return 1, 1, 1
    c = 1 if columns else 0
    a = 1 + c * columns if rows else 0
    b = 1 + a * rows + c * columns if frames else 0
    return b, a, c


def waves(rule: Rule) -> list[Tensor]:
    """The positions (raster indices) of each wave, in the order of decoding."""
    with torch.inference_mode(False):
        b, a, c = wave_steps(rule)
        k, i, j = (torch.arange(n, device="cpu") for n in rule.size)
        number = (b * k[:, None, None] + a * i[:, None] + c * j).flatten()
        order = number.argsort(stable=True)
        return [wave for wave in order.split(number.bincount().tolist()) if len(wave)]


def attend_gathered(query: Tensor, pairs: Tensor, index: Tensor, mask: Tensor, some: Tensor | None) -> Tensor:
    """Attention of a few queries to the few keys that each picks.

    Args:
        query: `(R, W, N, d)`, or `(R, W, M, N, d)` for M queries that pick the same.
        pairs: keys and values `(R, slots, 2, N, d)`.
        index: `(W * K,)` the slots that each of the W positions picks.
        mask: `(R * W, 1, 1, K)` bool, not all False anywhere.
        some: `(R, W, 1, 1)` bool, False for a position whose result is zero; None for no such.

    Returns:
        As `query`.
    """
    rows, width = query.shape[:2]
    near = pairs.index_select(1, index).view(rows * width, -1, *pairs.shape[2:])
    key, value = (x.transpose(1, 2) for x in near.unbind(2))
    q = query.flatten(0, 1).unsqueeze(2) if query.ndim == 4 else query.flatten(0, 1).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2).reshape(query.shape)
    return out if some is None else out * some


# Full attention under a mask.


def _full(query: Tensor, key: Tensor, value: Tensor, rule: Rule, key_mask: Tensor | None) -> Tensor:
    everything = all(r >= n - 1 for r, n in zip(rule.radius, rule.condition, strict=True)) and not rule.axial
    mask, lower = None, False
    if rule.causal and everything and rule.include_self and key_mask is None:
        lower = True
    elif rule.causal or not everything:
        mask = neighbour_mask(rule).to(query.device)[None, None]
    if key_mask is not None:
        seen = key_mask.flatten(1)[:, None, None]
        mask = seen if mask is None else mask & seen
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (query, key, value))
    out = _attend(q, k, v, mask, lower)
    return out.transpose(1, 2).unflatten(1, rule.size)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lower: bool = False, sighted: bool = False) -> Tensor:
    """`(B, N, L, d)` under a bool mask `(B or 1, 1, L or 1, L')`; rows that see nothing give zeros, not NaN.

    `sighted`: it is known that every row sees something.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=lower)
    some = None if sighted else mask.any(-1, keepdim=True)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        # Two products and a softmax: of few keys in bfloat16 torch's fused kernel takes two to three times as long.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        out = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ v
        return out if some is None else out * some
    seen = mask if some is None else mask | ~some
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(-1, -1, q.shape[2], -1))
    return out if some is None else out * some


# Tiles with the box of keys around them.


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `(B, L, N, d)`: index_select, which of some heads of many would first copy every row."""
    return x.index_select(1, index) if x.is_contiguous() else x[:, index]


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some tiles that are computed together: `tiles` tiles of `queries` positions, each with a box of `keys` keys.

    Tiles that would stick out of the volume are moved inside, so there is no padding, but some queries are computed in
    two tiles: `own` are those whose result counts.
    """

    tiles: int
    queries: int
    keys: int
    query_index: Tensor  # (tiles * queries,) positions
    key_index: Tensor  # (tiles * keys,) keys
    own: Tensor | None  # rows of query_index that count; None for all
    mask: Tensor  # (tiles, queries, keys) bool
    sighted: bool  # whether every query sees a key
    rows: Tensor  # the different keys of key_index, whose gradients are sums over their places in it: of these,
    bag: Tensor  # ordered by key,
    offsets: Tensor  # and where each key's begin

    def places(self) -> Tensor:
        """Positions whose result counts."""
        return self.query_index if self.own is None else self.query_index[self.own]

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of `(B, L, N, d)` as `(B * tiles, N, queries or keys, d)`."""
        return _rows(x, index).view(len(x) * self.tiles, -1, *x.shape[2:]).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of the chunk's tiles, `(B * tiles, N, queries, d)`; `key_mask (B, L')`."""
        batch = len(q) // self.tiles
        mask = (self.mask if batch == 1 else self.mask.repeat(batch, 1, 1))[:, None]
        if key_mask is not None:
            mask = mask & key_mask.index_select(1, self.key_index).view(len(q), 1, 1, -1)
        return _attend(q, k, v, mask, sighted=self.sighted and key_mask is None)

    def give(self, x: Tensor) -> Tensor:
        """The inverse of `take` for queries: `(B, places, N, d)`."""
        rows = x.transpose(1, 2).reshape(len(x) // self.tiles, -1, x.shape[1], x.shape[3])
        return rows if self.own is None else rows.index_select(1, self.own)


def _blocked(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, key_mask: Tensor | None, workspace: int | None = None
) -> Tensor:
    if workspace is None:  # a GPU wants more to do
        workspace = 20_000 if query.device.type == "cpu" else 1 << 25
    heads = key.shape[4]
    budget = max(1, workspace // (len(query) * heads * key.shape[5]))
    chunks = _chunks_on(rule, budget, query.device)
    # One tile may be too much for all heads at once.
    few = max(1, min(heads, heads * budget // max(chunk.keys for chunk in chunks)))
    q, k, v = (x.flatten(1, 3) for x in (query, key, value))
    out = _Blocked.apply(q, k, v, None if key_mask is None else key_mask.flatten(1), chunks, few)
    return out.unflatten(1, rule.size)


class _Blocked(torch.autograd.Function):
    """Chunk after chunk, `few` heads at a time. Nothing of a chunk is kept for the gradient: it is computed once more, which
    costs less memory than full attention's output. Gradients of gathers are sums of gathers, as index_add is many times
    slower."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, chunks: tuple[_Chunk, ...], few: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, key_mask)
        ctx.chunks, ctx.few = chunks, few
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for c in chunks:
            for some_q, some_k, some_v, some_out in zip(*(x.split(few, 2) for x in (q, k, v, out)), strict=True):
                y = c.attend(
                    c.take(some_q, c.query_index), c.take(some_k, c.key_index), c.take(some_v, c.key_index), key_mask
                )
                some_out.index_copy_(1, c.places(), c.give(y))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, key_mask = ctx.saved_tensors
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        parts = [x.split(ctx.few, 2) for x in (q, k, v, grads[0], dq, dk, dv)]
        for c in ctx.chunks:
            for some in zip(*parts, strict=True):
                _Blocked._backward(c, key_mask, *some)
        return dq, dk, dv, None, None, None

    @staticmethod
    def _backward(
        c: _Chunk,
        key_mask: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Adds a chunk's gradients to dk and dv, and puts them into dq."""
        with torch.enable_grad():
            taken = [c.take(x, i).requires_grad_() for x, i in ((q, c.query_index), (k, c.key_index), (v, c.key_index))]
            y = c.give(c.attend(taken[0], taken[1], taken[2], key_mask))
        tiles = list(torch.autograd.grad(y, taken, _rows(grad, c.places())))
        del y, taken
        dq.index_copy_(1, c.places(), c.give(tiles[0]))
        for total in (dv, dk):
            parts = tiles.pop().transpose(1, 2).reshape(len(k), c.tiles * c.keys, -1)
            sums = torch.stack([F.embedding_bag(c.bag, x, c.offsets, mode="sum") for x in parts])
            del parts
            sums = sums.view(len(k), -1, *k.shape[2:]).add_(_rows(total, c.rows))
            total.index_copy_(1, c.rows, sums)


@lru_cache(maxsize=64)
def _chunks(rule: Rule, budget: int) -> tuple[_Chunk, ...]:
    """The chunks of at most `budget` fetched keys (but at least one tile)."""
    with torch.inference_mode(False):
        tile = _tile_size(rule)
        axes = [_axis(rule, axis, t) for axis, t in enumerate(tile)]
        q, k = (_boxes([axis[i] for axis in axes], size) for i, size in ((0, rule.size), (1, rule.condition)))
        # (tiles, queries, keys) on every axis, combined by broadcasting.
        near = torch.ones((), dtype=torch.bool, device="cpu")
        for i, (_, _, seen) in enumerate(axes):
            shape = [1] * 9
            shape[i], shape[3 + i], shape[6 + i] = seen.shape
            near = near & seen.view(shape)
        mask = near.reshape(len(q), q.shape[1], k.shape[1])
        if rule.causal:
            mask = mask & (k[:, None] <= q[:, :, None] if rule.include_self else k[:, None] < q[:, :, None])
        counts = torch.empty(math.prod(rule.size), dtype=torch.long, device="cpu")
        counts[q.flatten()] = torch.arange(q.numel(), device="cpu")  # of several, the last counts
        own = torch.zeros(q.numel(), dtype=torch.bool, device="cpu")
        own[counts] = True

        many = max(1, budget // k.shape[1])
        chunks = []
        for q_part, k_part, mask_part, own_part in zip(
            q.split(many), k.split(many), mask.split(many), own.view(q.shape).split(many), strict=True
        ):
            rows, place, number = k_part.flatten().unique(return_inverse=True, return_counts=True)
            chunks.append(
                _Chunk(
                    len(q_part),
                    q.shape[1],
                    k.shape[1],
                    q_part.flatten(),
                    k_part.flatten(),
                    None if bool(own_part.all()) else own_part.flatten().nonzero()[:, 0],
                    mask_part,
                    bool(mask_part.any(-1).all()),
                    rows,
                    place.argsort(stable=True),
                    F.pad(number.cumsum(0), (1, 0))[:-1],
                )
            )
        return tuple(chunks)


@lru_cache(maxsize=64)
def _chunks_on(rule: Rule, budget: int, device: torch.device) -> tuple[_Chunk, ...]:
    chunks = _chunks(rule, budget)
    if device.type == "cpu":
        return chunks
    with torch.inference_mode(False):
        moved = []
        for chunk in chunks:
            values = {field.name: getattr(chunk, field.name) for field in fields(chunk)}
            tensors: dict[str, Any] = {
                name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
            }
            moved.append(replace(chunk, **tensors))
        return tuple(moved)


def _axis(rule: Rule, axis: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """One axis cut into tiles: positions `(tiles, t)`, keys `(tiles, u)`, and which are near `(tiles, t, u)`."""
    n, m, r = rule.size[axis], rule.condition[axis], rule.radius[axis]
    starts = torch.arange(0, n, tile, device="cpu").clamp(max=n - tile)
    q = starts[:, None] + torch.arange(tile, device="cpu")
    mapped = _map(n, m)[q]
    low = mapped.amin(1) - r
    high = mapped.amax(1) + (0 if rule.causal and axis == 0 else r)  # no key of a later frame precedes
    low, high = low.clamp(min=0), high.clamp(max=m - 1)
    box = int((high - low).max()) + 1
    k = low.clamp(max=m - box)[:, None] + torch.arange(box, device="cpu")
    return q, k, (k[:, None] - mapped[:, :, None]).abs() <= r


def _boxes(axes: list[Tensor], size: Grid) -> Tensor:
    """Raster indices `(tiles, tokens)` of the boxes that three axes `(tiles, t)` span."""
    a, b, c = axes
    index = a[:, None, None, :, None, None] * size[1] + b[:, None, None, :, None]
    index = index * size[2] + c[:, None, None, :]
    return index.reshape(len(a) * len(b) * len(c), -1)


def _tile_size(rule: Rule) -> Grid:
    """The cheapest tile: pairs of query and key cost time, and so does fetching a key, as much as some 75 pairs."""
    axes: list[dict[int, tuple[int, int]]] = []
    for axis, n in enumerate(rule.size):
        sizes = {t: _axis(rule, axis, t)[1].shape for t in range(1, min(n, 16) + 1)}
        axes.append({t: (tiles, box) for t, (tiles, box) in sizes.items()})

    def cost(tile: tuple[int, ...]) -> int:
        keys = math.prod(math.prod(axes[axis][t]) for axis, t in enumerate(tile))
        return keys * (math.prod(tile) + 75)

    a, b, c = min(itertools.product(*axes), key=cost)
    return a, b, c


@lru_cache(maxsize=256)
def _map(size: int, condition: int) -> Tensor:
    """Where each of `size` positions falls among `condition`, rounded down."""
    with torch.inference_mode(False):
        return torch.arange(size, device="cpu") * condition // size


# Every key on the three lines through a position.


def _axial(query: Tensor, key: Tensor, value: Tensor, rule: Rule, key_mask: Tensor | None) -> Tensor:
    at = [_map(n, m).to(query.device) for n, m in zip(rule.size, rule.condition, strict=True)]
    steps = [torch.arange(n, device=query.device) for n in rule.size]

    def lines(x: Tensor, axis: int) -> Tensor:
        """Keys `(B, s', h', w', ...)` at the positions' places on the two axes other than `axis`."""
        for other in range(3):
            if other != axis:
                x = x.index_select(other + 1, at[other])
        return x

    letters = ("bzijnd,bkijnd->bkijnz", "bkzjnd,bkijnd->bkijnz", "bkiznd,bkijnd->bkijnz")
    back = ("bkijnz,bzijnd->bkijnd", "bkijnz,bkzjnd->bkijnd", "bkijnz,bkiznd->bkijnd")
    scores = []
    for axis, formula in enumerate(letters):
        score = torch.einsum(formula, lines(key, axis), query) / math.sqrt(query.shape[-1])
        keys = torch.arange(rule.condition[axis], device=query.device)
        seen = torch.ones(*rule.size, rule.condition[axis], dtype=torch.bool, device=query.device)
        here = (steps[axis][:, None] if rule.causal else at[axis][:, None]).view(*_place(axis, rule.size[axis]), 1)
        if axis:  # the crossing belongs to the first line alone
            seen = seen & (keys != here)
        if rule.causal:
            seen = seen & (keys <= here if rule.include_self else keys < here)
        seen = seen[None, :, :, :, None]
        if key_mask is not None:
            allowed = lines(key_mask, axis).movedim(axis + 1, -1).unsqueeze(axis + 1)
            seen = seen & allowed[..., None, :]
        scores.append(score.masked_fill(~seen, -math.inf))
    joined = torch.cat(scores, -1)
    some = joined.amax(-1, keepdim=True) > -math.inf
    weights = torch.where(some, joined, 0.0).softmax(-1) * some
    parts = weights.split(list(rule.condition), -1)
    return sum(
        (
            torch.einsum(formula, part, lines(value, axis))
            for axis, (formula, part) in enumerate(zip(back, parts, strict=True))
        ),
        torch.zeros((), dtype=query.dtype, device=query.device),
    )


# FlexAttention.


def _flex(query: Tensor, key: Tensor, value: Tensor, rule: Rule, key_mask: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    device = query.device
    maps = [_map(n, m).to(device) for n, m in zip(rule.size, rule.condition, strict=True)]
    (_, h, w), (_, hc, wc), radius = rule.size, rule.condition, rule.radius
    allowed = None if key_mask is None else key_mask.flatten(1)

    def seen(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = (maps[0][q // (h * w)], maps[1][q // w % h], maps[2][q % w])
        to = (k // (hc * wc), k // wc % hc, k % wc)
        near = (at[0] - to[0]).abs() <= radius[0]
        for axis in (1, 2):
            near = near & ((at[axis] - to[axis]).abs() <= radius[axis])
        if rule.causal:
            near = near & (k <= q if rule.include_self else k < q)
        return near if allowed is None else near & allowed[b, k]

    q, k, v = (x.flatten(1, 3).transpose(1, 2).contiguous() for x in (query, key, value))
    batch = None if allowed is None else len(q)
    block = create_block_mask(seen, batch, None, q.shape[2], k.shape[2], device=str(device))
    out = _compiled_flex()(q, k, v, block_mask=block)
    return out.transpose(1, 2).unflatten(1, rule.size)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# NATTEN.


def _natten(query: Tensor, key: Tensor, value: Tensor, rule: Rule, key_mask: Tensor | None) -> Tensor:
    """NATTEN moves the window inward at a border; so the volume gets a rim whose keys are pushed out of the softmax.

    One more channel does that: 1 in every query, a large negative number in the keys of the rim.
    """
    if importlib.util.find_spec("natten") is None:
        raise WaltError('backend: "natten" given, but NATTEN is not installed (pip install natten)')
    alone = any(r == 0 and n > 1 for r, n in zip(rule.radius, rule.size, strict=True))
    if rule.causal or key_mask is not None or rule.size != rule.condition or alone:
        raise WaltError(
            'backend: "natten" cannot do causal, masked or cross-attention, nor an extent of 1; use "blocked"'
        )
    radius = [max(1, r) for r in rule.radius]  # along an axis of one there is only the rim
    from natten.functional import na3d  # type: ignore[import-not-found]

    channels = query.shape[-1]
    scale = 1 / math.sqrt(channels)
    more = (1 << channels.bit_length()) - channels  # its kernels want a power of two
    rim = [r for r in reversed(radius) for _ in range(2)]
    sides = (0, more, 0, 0, *rim)
    q, k, v = (F.pad(x, sides) for x in (query, key, value))
    outside = F.pad(torch.zeros(rule.size, device=query.device, dtype=query.dtype), rim, value=-1e4)
    k = torch.cat([k[..., :-1], outside[None, ..., None, None].expand(*k.shape[:-1], 1)], -1)
    q = torch.cat([q[..., :-1], torch.full_like(q[..., :1], 1 / scale)], -1)
    out = na3d(q, k, v, kernel_size=tuple(2 * r + 1 for r in radius), scale=scale)
    (a, b, c), (s, h, w) = radius, rule.size
    return out[:, a : a + s, b : b + h, c : c + w, :, :channels]


_Run = Callable[[Tensor, Tensor, Tensor, Rule, Tensor | None], Tensor]
_RUN: dict[str, _Run] = {"blocked": _blocked, "flex": _flex, "natten": _natten, "full": _full, "axial": _axial}


def _sizes(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Grid, Grid]:
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 6 or not x.numel():
            raise WaltError(f"{name}: shape {tuple(x.shape)} given, a non-empty (B, s, h, w, N, d) needed")
    if key.shape != value.shape:
        raise WaltError(f"value: shape {tuple(value.shape)} given, that of the key {tuple(key.shape)} needed")
    if query.shape[0] != key.shape[0] or query.shape[4:] != key.shape[4:]:
        raise WaltError(
            f"key: shape {tuple(key.shape)} given, batch, heads and head size of the query {tuple(query.shape)} needed"
        )
    if key_mask is not None and (key_mask.shape != key.shape[:4] or key_mask.dtype != torch.bool):
        raise WaltError(f"key_mask: {key_mask.dtype} {tuple(key_mask.shape)} given, bool {tuple(key.shape[:4])} needed")
    s, h, w = query.shape[1:4]
    sc, hc, wc = key.shape[1:4]
    return (s, h, w), (sc, hc, wc)
