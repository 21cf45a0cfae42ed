"""Windows and their plan; the only file that calls an attention kernel.

Attention never sees a mask: a plan sorts the windows of a pack by length, windows of one length become the batch
dimension of one call, and a border that does not fill a window is a shorter window. Plans are built on the host, once
per set of grids, cached, and copied to the device without blocking.

Backends, by the names of diffusers' `set_attention_backend` and `attention_backend(...)`; none chosen is automatic:
any of diffusers' own (windows as the batch of its kernel), "walt_windows" (torch's SDPA so, even where the automatic
choice is another), "walt_blocked" (matrix products over a few windows at a time, so that the scores stay in the cache),
"walt_varlen" (one variable-length call for all windows of a pack, CUDA), "flash_varlen" (the same through flash-attn)
and "flex" (one FlexAttention call). A relative bias runs on those that take a mask, and is refused by the rest.
Letters: L tokens, N heads, d head size, W windows of a group, n tokens of a window, s text states of a window.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, library, nn

from walt.errors import WaltError
from walt.latents import Grid, positions, to_device, token_counts
from walt.linear import has_bfloat16_units, product, product_is_faster
from walt.register import active_attention_backend

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


_NUMBERS = itertools.count()
_PLANS: weakref.WeakValueDictionary[int, WindowPlan] = weakref.WeakValueDictionary()


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
        handle: `()` int64 on the CPU, by which a compiled graph finds this plan: a tensor, so that another plan is
            another input and not another graph.
    """

    tokens: int
    groups: tuple[WindowGroup, ...]
    singles: int
    order: Tensor | None
    inverse: Tensor | None
    context_index: Tensor | None
    offsets: tuple[Tensor, ...] = ()
    handle: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        number = next(_NUMBERS)
        _PLANS[number] = self
        object.__setattr__(self, "handle", torch.tensor(number, device="cpu"))

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
    order, inverse, context_index = plan.order, plan.inverse, plan.context_index
    with torch.inference_mode(False):
        return WindowPlan(
            plan.tokens,
            plan.groups,
            plan.singles,
            None if order is None else to_device(order, device),
            None if inverse is None else to_device(inverse, device),
            None if context_index is None else to_device(context_index, device),
            tuple(_offsets_on(g.shape, device) for g in plan.groups if g.shape is not None),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanShare(WindowPlan):
    """What one of several ranks has of a plan: whole windows, so that their attention needs nothing from other ranks.

    Attributes:
        order: `(own,)` int64, where its tokens are in the pack. `tokens`, `groups` and so on are likewise its own.
        back: `(L,)` int64, for every token of the pack its row among all ranks' results, `most` rows each.
        most: tokens of the rank that has most.
        group: the ranks.
    """

    back: Tensor
    most: int
    group: Any

    def gather(self, x: Tensor) -> Tensor:
        """`(L, ...)` in pack order to this rank's `(own, ...)` in window order."""
        assert self.order is not None
        return x.index_select(0, self.order)

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's results `(own, D)`, with everybody else's, in pack order `(L, D)`."""
        every: Tensor = _AllGather.apply(F.pad(x, (0, 0, 0, self.most - len(x))), self.group)
        return every.index_select(0, self.back)


class _AllGather(torch.autograd.Function):
    """Rows of all ranks one after another. The gradient is this rank's part of a loss that all ranks compute alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.rank, ctx.rows = dist.get_rank(group), len(x)
        every = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(every, x.contiguous(), group=group)
        return every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.rank * ctx.rows :][: ctx.rows], None


@lru_cache(maxsize=256)
def share_plan(plan: WindowPlan, group: Any) -> PlanShare:
    """This rank's windows of `plan`, dealt out group by group, so that ranks are one window of each apart at most.

    A rank may come away with nothing (a pack of one window).
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with torch.inference_mode(False):
        order = torch.arange(plan.tokens, device="cpu") if plan.order is None else plan.order.cpu()
        everyone = [_share(plan, r, ranks) for r in range(ranks)]
        most = max(len(places) for places, _ in everyone)
        back = torch.empty(plan.tokens, dtype=torch.int64, device="cpu")
        for r, (places, _) in enumerate(everyone):
            back[order[places]] = torch.arange(len(places), device="cpu") + r * most
        places, own = everyone[rank]
        device = next((x.device for x in (plan.order, plan.context_index, *plan.offsets) if x is not None), back.device)
        own = own.to(device)
        return PlanShare(
            own.tokens,
            own.groups,
            own.singles,
            order[places].to(device),
            None,
            own.context_index,
            own.offsets,
            back=back.to(device),
            most=most,
            group=group,
        )


def _share(plan: WindowPlan, rank: int, ranks: int) -> tuple[Tensor, WindowPlan]:
    """Where the tokens of a rank are in the planned order, and the plan of its windows, on the host."""

    def portion(count: int, turn: int) -> tuple[int, int]:
        return count * turn // ranks, count * (turn + 1) // ranks

    first, last = portion(plan.singles, rank)
    places, groups, contexts = [torch.arange(first, last, device="cpu")], [], []
    start, context_start = last - first, 0
    for i, group in enumerate(plan.groups):
        first, last = portion(group.windows, (rank + i) % ranks)  # what does not divide goes around
        if first == last:
            continue
        count = last - first
        places.append(torch.arange(first * group.length, last * group.length, device="cpu") + group.start)
        groups.append(group._replace(start=start, windows=count, context_start=context_start))
        if plan.context_index is not None and group.context_length:
            begin = group.context_start + first * group.context_length
            contexts.append(plan.context_index[begin : begin + count * group.context_length].cpu())
        start += count * group.length
        context_start += count * group.context_length
    index = torch.cat(contexts) if contexts else None
    offsets = tuple(_offsets(g.shape) for g in groups if g.shape is not None)
    return torch.cat(places), WindowPlan(start, tuple(groups), len(places[0]), None, None, index, offsets)


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
) -> Tensor:
    """Attention of every window of a pack, with no mask and no padding.

    Args:
        query: `(L - plan.singles, N, d)` in window order; key likewise. Lone tokens need neither.
        value: `(L, N, d)` in window order.
        plan: on the device of the tensors.
        context_key: text `(S, N, d)` of all samples end to end, when the plan has contexts; value likewise.
        bias: gives the additive float bias `(1, N, n, n)` of a window shape and its offsets (`RelativeBias`); the plan
            must be made `by_shape`.
        backend: as in the head of this file; None for the active one of diffusers, or the automatic choice.

    Returns:
        `(L, N, d)` in window order.

    Raises:
        WaltError: a bias on a backend that takes none, or a backend that cannot run here.
    """
    if torch.compiler.is_compiling() and bias is None and (backend is None or backend in _OPAQUE):
        given = "" if backend is None else str(AttentionBackendName(backend).value)
        result: Tensor = torch.ops.walt.window_attention(
            query, key, value, context_key, context_value, plan.handle, given
        )[0]
        return result
    # Split, not sliced: the gradient of a split is one concatenation, that of slices a sum of padded copies.
    lone, value = value.split([plan.singles, len(value) - plan.singles]) if plan.singles else (value[:0], value)
    out = [lone] if plan.singles else []
    if not plan.groups:
        # Nothing attends (images only): empty rows keep queries, keys and bias in the graph, so their gradients are
        # zero rather than absent and a data-parallel reducer does not wait for them.
        empty = query + key
        out.append((empty if bias is None else empty + bias((1, 1, 1))[0, :, 0]).to(value.dtype))
        return out[0] if len(out) == 1 else torch.cat(out)
    name = choose_backend(backend, query, plan, bias is not None)
    if name in _ONE_CALL:
        key, value, _ = _with_contexts(plan, key, value, context_key, context_value)
        out.append(_ONE_CALL[name](query, key, value, plan))
        return out[0] if len(out) == 1 else torch.cat(out)
    rows = [group.windows * group.length for group in plan.groups]
    parts = zip(plan.groups, query.split(rows), key.split(rows), value.split(rows), strict=True)
    for i, (group, q, k, v) in enumerate(parts):
        size = (group.windows, group.length)
        q, k, v = q.unflatten(0, size), k.unflatten(0, size), v.unflatten(0, size)
        if group.context_length:
            assert plan.context_index is not None and context_key is not None and context_value is not None
            size = (group.windows, group.context_length)
            index = plan.context_index[group.context_start :][: group.windows * group.context_length]
            k = torch.cat([k, context_key.index_select(0, index).unflatten(0, size)], dim=1)
            v = torch.cat([v, context_value.index_select(0, index).unflatten(0, size)], dim=1)
        mask = None
        if bias is not None and plan.offsets:
            mask = bias(group.shape, plan.offsets[i], group.length).to(q.dtype)
        own = choose_backend(backend, query, plan, bias is not None, group.length)
        y = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=own)
        out.append(y.flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    contexts: Sequence[int],
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Every token attends to the states of its sample alone; neighbouring samples of equal sizes are one call.

    Args:
        query: `(L, N, d)`, samples end to end.
        key: `(S, N, d)`, the states of all samples end to end, at least one each; value likewise.
        lengths: tokens of each sample; contexts: its states.

    Returns:
        `(L, N, d)`.
    """
    runs = [(n, s, len(list(run))) for (n, s), run in itertools.groupby(zip(lengths, contexts, strict=True))]
    queries = query.split([n * count for n, _, count in runs])
    keys, values = (x.split([s * count for _, s, count in runs]) for x in (key, value))
    name = active_attention_backend(backend)
    if name in _ONE_CALL:
        name = AttentionBackendName.NATIVE  # those take window plans
    out = []
    for (n, s, count), q, k, v in zip(runs, queries, keys, values, strict=True):
        q, k, v = q.unflatten(0, (count, n)), k.unflatten(0, (count, s)), v.unflatten(0, (count, s))
        out.append(dispatch_attention_fn(q, k, v, backend=name, parallel_config=parallel_config).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


# -- backends ----------------------------------------------------------------------------------------------------------

NO_BIAS = (
    "walt_varlen",
    "flash_varlen",
    "flex",
    "flash",
    "_flash_3",
    "_flash_varlen_3",
    "_native_flash",
    "sage",
    "aiter",
)
"""Backends that take no additive bias, so refuse a model with `relative_positions="bias"`."""


def choose_backend(
    backend: Any, query: Tensor, plan: WindowPlan, biased: bool, length: int = 0
) -> AttentionBackendName | None:
    """The backend of one call: the given one, else diffusers' active one, else the fastest that can run it.

    Automatic means: on CUDA in half precision one variable-length call where a pack has windows of several lengths;
    on a CPU the blocked form, in bfloat16 with matrix units for it, and in float32 for windows of a `length` for which
    `product` pays; torch's SDPA over windows otherwise.

    Raises:
        WaltError: a bias on a backend that takes none, or one that needs CUDA on another device.
    """
    active: AttentionBackendName = active_attention_backend(backend)
    if backend is None and active == AttentionBackendName.NATIVE:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if query.is_cuda and half and not biased and len(plan.groups) > 1 and _has_varlen():
            return AttentionBackendName("walt_varlen")
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and has_bfloat16_units(query.device):
            return AttentionBackendName("walt_blocked")
        pays = (400 if torch.is_grad_enabled() else 200) <= length <= _LONGEST
        if pays and not biased and product_is_faster(query):
            return AttentionBackendName("walt_blocked")
        return active
    if biased and active.value in NO_BIAS:
        raise WaltError(
            f'attention backend {active.value!r} takes no bias, which relative_positions="bias" needs; use "native", '
            '"walt_windows" or "walt_blocked", or a model with relative_positions="rope"'
        )
    if active.value in ("walt_varlen", "flash_varlen") and not query.is_cuda:
        raise WaltError(f"attention backend {active.value!r} runs on CUDA only, the tensors are on {query.device.type}")
    return active


_LONGEST = 2896
"""Tokens of a window whose float32 scores, of one head, are 32 MB. Longer ones' are mapped anew by glibc at every use, unless
it keeps what is freed (`walt.heap`), and would take gigabytes."""


@lru_cache(maxsize=1)
def _has_varlen() -> bool:
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return bool(torch.cuda.get_device_capability() >= (8, 0))


@lru_cache(maxsize=512)
def _bounds(plan: WindowPlan, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """First query and first key of every window and the end, int32 `(windows + 1,)`; and the largest counts."""
    queries = [g.length for g in plan.groups for _ in range(g.windows)]
    keys = [g.length + g.context_length for g in plan.groups for _ in range(g.windows)]
    with torch.inference_mode(False):
        starts = [
            torch.tensor(list(itertools.accumulate(n, initial=0)), dtype=torch.int32, device="cpu")
            for n in (queries, keys)
        ]
        if device.type == "cuda":
            starts = [to_device(start, device) for start in starts]
    return starts[0], starts[1], max(queries), max(keys)


def _varlen(query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    first_query, first_key, most_queries, most_keys = _bounds(plan, query.device)
    return cast(Tensor, varlen_attn(query, key, value, first_query, first_key, most_queries, most_keys))


def _flash_varlen(query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    first_query, first_key, most_queries, most_keys = _bounds(plan, query.device)
    out: Tensor = flash_attn_varlen_func(query, key, value, first_query, first_key, most_queries, most_keys)
    return out


def _flex(query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    call = _compiled_flex() if query.is_cuda else cast(Callable[..., Tensor], flex_attention)
    return call(q, k, v, block_mask=_block_mask(plan, query.device))[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


@lru_cache(maxsize=64)
def _block_mask(plan: WindowPlan, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    first_query, first_key, _, _ = _bounds(plan, torch.device("cpu"))
    with torch.inference_mode(False):
        ids = torch.arange(len(first_query) - 1, device="cpu")
        of_query = ids.repeat_interleave(first_query.diff()).to(device)
        of_key = ids.repeat_interleave(first_key.diff()).to(device)

        def same(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return of_query[i] == of_key[j]

        # Compiled it never holds the whole mask, of queries times keys.
        compiled = device.type == "cuda"
        return create_block_mask(same, None, None, len(of_query), len(of_key), device=str(device), _compile=compiled)


_ONE_CALL: dict[Any, Callable[[Tensor, Tensor, Tensor, WindowPlan], Tensor]] = {
    "walt_varlen": _varlen,
    "flash_varlen": _flash_varlen,
    "flex": _flex,
}


BLOCK_BYTES = 2**21
"""Scores of one block of `blocked_attention`: one or two second-level caches of a core; less costs more calls."""


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Attention as matrix products over a few windows and heads at a time.

    Args:
        query: `(W, n, N, d)`; key and value `(W, s, N, d)`.
        attn_mask: additive, broadcastable to `(W, N, n, s)`, float.
        scale: of the scores, None for `d ** -0.5`.
        block_bytes: most bytes of scores held at a time (at least one head of one window).

    Returns:
        `(W, n, N, d)`.
    """
    heads = query.shape[2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None
    if attn_mask is not None:
        # Per head (the same for all windows), or per window and head.
        mask = attn_mask.expand(attn_mask.shape[0], heads, query.shape[1], key.shape[1]).to(query.dtype)
    out: Tensor = _Blocked.apply(query, key, value, mask, factor, block_bytes)
    return out


class _Blocked(torch.autograd.Function):
    """Queries `(W, n, N, d)`; mask `(1 or W, N, n, s)`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, block_bytes: int
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for at in _blocks(q, k, block_bytes):
            weights, sums = _unscaled(_matrices(q, at), _matrices(k, at), mask, at, scale)
            part = _times(weights, _matrices(v, at).transpose(1, 2))
            _put(out, at, part if sums is None else part.div_(sums))
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.block_bytes = scale, block_bytes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        wanted = mask if ctx.needs_input_grad[3] else None
        found = _block_gradients(q, k, v, grad, mask, ctx.scale, ctx.block_bytes)
        return *found[:3], found[3] if wanted is not None else None, None, None


def _block_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None, scale: float, block_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value `(W, n or s, N, d)` and mask; the weights are computed again."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dmask = None if mask is None else torch.zeros_like(mask, memory_format=torch.contiguous_format)
    for at in _blocks(q, k, block_bytes):
        a, b, c, g = (_matrices(x, at) for x in (q, k, v, grad))
        weights = _scores(a, b, mask, at, scale).softmax(-1)
        _put(dv, at, _times(weights.transpose(1, 2), g.transpose(1, 2)))
        scores = _times(g, c).mul_(weights)
        scores.addcmul_(weights, scores.sum(-1, keepdim=True), value=-1)
        if dmask is not None:
            part = _mask_of(dmask, at)
            part += scores.unflatten(0, (-1, part.shape[1])).sum_to_size(part.shape)
        scores.mul_(scale)
        _put(dq, at, _times(scores, b.transpose(1, 2)))
        _put(dk, at, _times(scores.transpose(1, 2), a.transpose(1, 2)))
    return dq, dk, dv, dmask


Block = tuple[slice, slice]
"""Windows, and heads of each."""


def _blocks(q: Tensor, k: Tensor, block_bytes: int) -> list[Block]:
    """Whole windows whose scores take at most `block_bytes`, else some heads of one window, at least one."""
    windows, rows, heads, _ = q.shape
    step = block_bytes // (rows * k.shape[1] * q.element_size())
    if product_is_faster(q) and rows * k.shape[1] >= _ALONE:
        step = 1
    if step >= heads:
        step //= heads
        return [(slice(w, w + step), slice(0, heads)) for w in range(0, windows, step)]
    parts = -(-heads // max(1, step))
    edges = [heads * i // parts for i in range(parts + 1)]
    return [(slice(w, w + 1), slice(*pair)) for w in range(windows) for pair in itertools.pairwise(edges)]


def _matrices(x: Tensor, at: Block) -> Tensor:
    """`(windows * heads, n, d)` of a block of `(W, n, N, d)`, end to end: products are slow on rows that lie apart."""
    windows, heads = at
    return x[windows, :, heads].transpose(1, 2).contiguous().flatten(0, 1)


def _put(x: Tensor, at: Block, matrices: Tensor) -> None:
    """Writes what `_matrices` reads."""
    windows, heads = at
    part = x[windows, :, heads].transpose(1, 2)
    part.copy_(matrices.view(part.shape))


def _mask_of(mask: Tensor, at: Block) -> Tensor:
    windows, heads = at
    return mask[windows if len(mask) > 1 else slice(0, 1), heads]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, at: Block, scale: float) -> Tensor:
    scores = _times(q, k, scale)
    if mask is not None:
        part = _mask_of(mask, at)
        scores.unflatten(0, (-1, part.shape[1])).add_(part)
    return scores


def _unscaled(q: Tensor, k: Tensor, mask: Tensor | None, at: Block, scale: float) -> tuple[Tensor, Tensor | None]:
    """Weights and by what to divide what they weigh: `(c, n, 1)`, or None where they sum to 1.

    torch's softmax of bfloat16 costs twice the exponential alone, whose range is that of float32: the largest score is
    subtracted only where a sum comes near the ends of it.
    """
    known = type(q) is Tensor and q.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and q.dtype == torch.bfloat16:
        weights = _scores(q, k, mask, at, scale).exp_()
        sums = weights.sum(-1, keepdim=True)
        low, high = (float(x) for x in sums.aminmax())
        if low > 1e-20 and high < 1e30:
            return weights, sums
    return _scores(q, k, mask, at, scale).softmax(-1), None


_ALONE = 2**14
"""Numbers in a product of one window and head from which `product` beats a share in a batch."""


def _times(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """`scale a b^T` of `(c, n, e)` and `(c, m, e)`: `(c, n, m)`."""
    if product_is_faster(a) and a.shape[1] * b.shape[1] >= _ALONE:
        products = [product(x if scale == 1.0 else x * scale, y) for x, y in zip(a, b, strict=True)]
        return products[0][None] if len(products) == 1 else torch.stack(products)
    if scale == 1.0:
        return torch.bmm(a, b.transpose(1, 2))
    # The factor is part of the product; what is added counts nothing.
    return torch.baddbmm(a.new_empty(()), a, b.transpose(1, 2), beta=0, alpha=scale)


# -- one operator for torch.compile ------------------------------------------------------------------------------------
# The windows of a pack are Python numbers; traced, each new pack would be a new graph. Behind an operator they are data.

_OPAQUE = ("native", "walt_windows", "walt_blocked", "flash_varlen", "walt_varlen")

library.define(
    "walt::window_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? context_key, Tensor? context_value, Tensor plan, str backend)"
    " -> (Tensor, Tensor)",
)
library.define(
    "walt::window_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? context_key, Tensor? context_value, Tensor plan,"
    " Tensor out, Tensor sums) -> Tensor[]",
)


def _flash_runs(query: Tensor, backend: str) -> bool:
    """Whether the operator is flash attention's forward and backward pass. Known when a graph is traced, so not by the active
    backend: where that is another at last, the result is its own and the gradient still flash attention's."""
    half, size = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    known = query.is_cuda and half and size % 8 == 0 and size <= 256 and backend in ("", "native", "walt_varlen")
    return known and _has_varlen()


@library.impl("walt::window_attention", "CompositeExplicitAutograd")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor | None,
    context_value: Tensor | None,
    plan: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The result and, of flash attention, the logarithms of the sums of its weights `(N, queries)`."""
    windows = _PLANS[int(plan)]
    flash = _flash_runs(query, backend)
    if flash and windows.groups:
        keys, values, _ = _with_contexts(windows, key, value[windows.singles :], context_key, context_value)
        first_query, first_key, most_queries, most_keys = _bounds(windows, query.device)
        found, sums, *_ = torch.ops.aten._flash_attention_forward(
            query.contiguous(), keys, values, first_query, first_key, most_queries, most_keys, 0.0, False, False
        )
        if choose_backend(backend or None, query, windows, False) in (AttentionBackendName.NATIVE, "walt_varlen"):
            return torch.cat([value[: windows.singles], found]) if windows.singles else found, sums
    else:
        sums = query.new_empty((query.shape[1], query.shape[0]) if flash else 0, dtype=torch.float32)
    out = window_attention(
        query, key, value, windows, context_key=context_key, context_value=context_value, backend=backend or None
    )
    # An operator may not return its input, which a pack of images alone would.
    return (out.clone() if out.data_ptr() == value.data_ptr() else out.contiguous()), sums


@library.register_fake("walt::window_attention")
def _attend_fake(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (query.shape[1], query.shape[0]) if _flash_runs(query, others[-1]) else 0
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    return out, query.new_empty(shape, dtype=torch.float32)


def _with_contexts(
    plan: WindowPlan, key: Tensor, value: Tensor, context_key: Tensor | None, context_value: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Keys and values of the windows of all groups end to end, each window's text behind its tokens; and, with texts, where in
    `[tokens, texts]` each of them is from."""
    if not any(group.context_length for group in plan.groups):
        return key.contiguous(), value.contiguous(), []
    assert plan.context_index is not None and context_key is not None and context_value is not None
    index = _key_index(plan, key.device)
    keys, values = torch.cat([key, context_key]), torch.cat([value, context_value])
    return keys.index_select(0, index), values.index_select(0, index), [index]


@lru_cache(maxsize=64)
def _key_index(plan: WindowPlan, device: torch.device) -> Tensor:
    """`(keys,)`: the place of every key in tokens that attend and texts, end to end."""
    assert plan.context_index is not None
    tokens = plan.tokens - plan.singles
    with torch.inference_mode(False):
        own = torch.arange(tokens, device=device)
        texts = plan.context_index + tokens
        parts = []
        for group in plan.groups:
            start = group.start - plan.singles
            rows = own[start : start + group.windows * group.length].view(group.windows, -1)
            if group.context_length:
                text = texts[group.context_start :][: group.windows * group.context_length]
                rows = torch.cat([rows, text.view(group.windows, -1)], dim=1)
            parts.append(rows.flatten())
        return torch.cat(parts)


@library.impl("walt::window_attention_backward", "CompositeExplicitAutograd")
def _attend_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor | None,
    context_value: Tensor | None,
    plan: Tensor,
    out: Tensor,
    sums: Tensor,
) -> list[Tensor]:
    """Of query, key, value (and context key, value): flash attention's, else by matrix products over a few windows at a
    time."""
    windows = _PLANS[int(plan)]
    if sums.numel() and windows.groups:
        return _flash_gradients(grad, query, key, value, context_key, context_value, windows, out, sums)
    block_bytes = 2**28 if query.is_cuda else BLOCK_BYTES  # launches cost more there than what leaves the cache
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), grad.clone(memory_format=torch.contiguous_format)
    contexts = [torch.zeros_like(x) for x in (context_key, context_value) if x is not None]
    at = 0
    for group in windows.groups:
        count = group.windows * group.length
        here, there = slice(at, at + count), slice(windows.singles + at, windows.singles + at + count)
        size = (group.windows, group.length)
        q, k, v, g = (x.unflatten(0, size) for x in (query[here], key[here], value[there], grad[there]))
        index = None
        if group.context_length:
            assert windows.context_index is not None and context_key is not None and context_value is not None
            index = windows.context_index[group.context_start :][: group.windows * group.context_length]
            wide = (group.windows, group.context_length)
            k = torch.cat([k, context_key.index_select(0, index).unflatten(0, wide)], dim=1)
            v = torch.cat([v, context_value.index_select(0, index).unflatten(0, wide)], dim=1)
        one, two, three, _ = _block_gradients(q, k, v, g, None, query.shape[-1] ** -0.5, block_bytes)
        dq[here], dk[here], dv[there] = (x[:, : group.length].flatten(0, 1) for x in (one, two, three))
        if index is not None:
            for total, part in zip(contexts, (two, three), strict=True):
                total.index_add_(0, index, part[:, group.length :].flatten(0, 1))
        at += count
    return [dq, dk, dv, *contexts]


def _flash_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor | None,
    context_value: Tensor | None,
    plan: WindowPlan,
    out: Tensor,
    sums: Tensor,
) -> list[Tensor]:
    first = plan.singles
    keys, values, index = _with_contexts(plan, key, value[first:], context_key, context_value)
    first_query, first_key, most_queries, most_keys = _bounds(plan, query.device)
    state = torch.empty(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad[first:].contiguous(), query.contiguous(), keys, values, out[first:], sums,
        first_query, first_key, most_queries, most_keys, 0.0, False, state, query.new_empty(0),
    )  # fmt: skip
    contexts: list[Tensor] = []
    if context_key is not None and context_value is not None:
        tokens, sizes = len(key), [len(key), len(context_key)]
        wide = [torch.zeros(sum(sizes), *x.shape[1:], dtype=torch.float32, device=x.device) for x in (key, value)]
        if index:  # a text is in many windows
            found = [x.index_add_(0, index[0], y.float()).to(query.dtype) for x, y in zip(wide, (dk, dv), strict=True)]
            (dk, one), (dv, two) = (x.split(sizes) for x in found)
        else:
            one, two = (x[tokens:].to(query.dtype) for x in wide)
        # Operators may return no two views of one tensor.
        dk, dv, contexts = dk.clone(), dv.clone(), [one.clone(), two.clone()]
    return [dq, dk, torch.cat([grad[:first], dv]) if first else dv, *contexts]


@library.register_fake("walt::window_attention_backward")
def _attend_gradients_fake(grad: Tensor, *inputs: Any) -> list[Tensor]:
    query, key, value, context_key, context_value, *_ = inputs
    own = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    return own + [torch.empty_like(x) for x in (context_key, context_value) if x is not None]


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    sums = output[1]
    ctx.mark_non_differentiable(sums)
    # Where they are not used they are not kept either.
    kept = output if _flash_runs(inputs[0], inputs[6]) else (sums, sums)
    ctx.save_for_backward(*inputs[:6], *kept)


def _attend_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.walt.window_attention_backward(grad, *ctx.saved_tensors)
    contexts = found[3:] if len(found) > 3 else (None, None)
    return found[0], found[1], found[2], contexts[0], contexts[1], None, None


library.register_autograd("walt::window_attention", _attend_backward, setup_context=_attend_setup)


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

    def forward(self, shape: Grid, offsets: Tensor | None = None, length: int | None = None) -> Tensor:
        """Bias `(1, N, n, n)` of queries against keys, both in the raster order of a window of `shape`.

        `offsets` are the plan's for that shape; None for a single token. `length` is n, fewer than the window's tokens
        where some were dropped; None: found from `offsets`, which a compiler cannot.
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
        entries = table.flatten(1)
        if offsets is not None:
            entries = entries.index_select(1, offsets)
        n = math.isqrt(entries.shape[1]) if length is None else length
        return entries.view(1, -1, n, n)


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
        return to_device(_offsets(shape), device)


@lru_cache(maxsize=64)
def rotation(
    grids: tuple[Grid, ...], head_dim: int, device: torch.device, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 3D axial RoPE, each `(L, 1, head_dim / 2)` float32 in pack order.

    The pairs of a head are divided among frame, row and column (what three does not divide goes to the frame);
    positions are absolute in the token's own sample.
    """
    tables = [_rotation_of(grid, head_dim, device, theta) for grid in grids]
    with torch.inference_mode(False):
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
    return cos, sin


@lru_cache(maxsize=256)
def _rotation_of(grid: Grid, head_dim: int, device: torch.device, theta: float) -> tuple[Tensor, Tensor]:
    """The rows of one sample: packs differ, their samples' sizes come again."""
    with torch.inference_mode(False):
        pairs = head_dim // 2
        share = pairs // 3
        place = positions([grid]).to(torch.float32)
        angles = []
        for axis, n in enumerate((pairs - 2 * share, share, share)):
            frequency = theta ** -(torch.arange(n, dtype=torch.float32, device="cpu") / max(n, 1))
            angles.append(place[:, axis, None] * frequency)
        angle = torch.cat(angles, dim=1)[:, None]
        return to_device(angle.cos(), device), to_device(angle.sin(), device)
