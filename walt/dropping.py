"""Token dropping (NaViT, arXiv 2307.06304 section 3.3): a denoiser computes some tokens of a sample and leaves the rest.

The windows stay those of the whole sample; what was dropped is missing from them, so windows become shorter and those
of one length are again one attention call, without a mask. Training only: to sample with fewer tokens, sample smaller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from walt.attention import WindowGroup, WindowPlan
from walt.errors import WaltError
from walt.latents import Grid, to_device, token_counts

_RECENT: deque[WindowPlan] = deque(maxlen=64)
"""The last plans, those of eight forward passes or so. No cache holds them, and a compiled backward pass finds its plan by
a number alone, when the forward pass has let go of it."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Which tokens of a pack are computed.

    Attributes:
        mask: `(L,)` bool on the CPU, in pack order.
        index: `(K,)` int64, their places in the pack, on the device of the tensors.
        lengths: how many of each sample.
    """

    mask: Tensor
    index: Tensor
    lengths: tuple[int, ...]

    def take(self, x: Tensor) -> Tensor:
        """`(L, ...)` to the kept `(K, ...)`."""
        return x.index_select(0, self.index)

    def put_back(self, x: Tensor) -> Tensor:
        """`(K, ...)` to `(L, ...)`, zeros where tokens were dropped."""
        return x.new_zeros(len(self.mask), *x.shape[1:]).index_copy(0, self.index, x)


def kept_tokens(grids: Sequence[Grid], kept: Sequence[Tensor | None] | None, device: torch.device) -> Kept | None:
    """The kept tokens of a pack, or None when that is all of them.

    Args:
        grids: the samples in tokens.
        kept: per sample bool of its grid `(t, h, w)` on the CPU, or None for all its tokens.
        device: of the tokens.

    Raises:
        WaltError: another number of samples, shape or dtype, or a sample without tokens.
    """
    if kept is None:
        return None
    if len(kept) != len(grids):
        raise WaltError(f"kept: {len(kept)} samples given for {len(grids)} latents")
    if all(mask is None for mask in kept):
        return None
    parts = []
    for i, (mask, grid) in enumerate(zip(kept, grids, strict=True)):
        if mask is None:
            mask = torch.ones(grid, dtype=torch.bool)
        if tuple(mask.shape) != tuple(grid) or mask.dtype != torch.bool:
            raise WaltError(f"kept: sample {i} is {mask.dtype} {tuple(mask.shape)}, bool {tuple(grid)} needed")
        parts.append(mask.cpu().reshape(-1))
        if not bool(parts[-1].any()):
            raise WaltError(f"kept: sample {i} keeps no token, at least one needed")
    whole = torch.cat(parts)
    index = whole.nonzero()[:, 0]
    return Kept(whole, to_device(index, device), tuple(int(part.sum()) for part in parts))


def drop_from_plan(plan: WindowPlan, mask: Tensor, device: torch.device) -> WindowPlan:
    """The plan of the kept tokens: the same windows with what was dropped missing.

    Args:
        plan: of all tokens, on the CPU.
        mask: `(L,)` bool on the CPU, in pack order.
        device: where the indices of the result go.

    Returns:
        A plan of the `(K,)` kept tokens in their pack order. Lone tokens without text are `singles`, and windows planned
        by shape keep their shape and the offsets of the tokens that are left, one group per pattern.
    """
    place = mask.cumsum(0) - 1  # among the kept tokens
    order = plan.order if plan.order is not None else torch.arange(plan.tokens)
    lone = order[: plan.singles]
    found: dict[tuple[int, int, Grid, bytes], tuple[list[Tensor], list[Tensor], Tensor | None, Grid | None]] = {}
    singles = [place[lone[mask[lone]]]]
    for number, group in enumerate(plan.groups):
        rows = order[group.start :][: group.windows * group.length].view(group.windows, group.length)
        stays = mask[rows]
        text = None
        if group.context_length:
            assert plan.context_index is not None
            text = plan.context_index[group.context_start :][: group.windows * group.context_length]
            text = text.view(group.windows, group.context_length)
        if group.shape is None:
            # Windows of one length are one call, whichever tokens they kept.
            counts = stays.sum(1)
            kinds = [(int(n), counts == n, b"") for n in counts.unique() if n]
        else:
            patterns, which = stays.unique(dim=0, return_inverse=True)
            kinds = [(int(p.sum()), which == k, p.numpy().tobytes()) for k, p in enumerate(patterns) if bool(p.any())]
        for length, windows, pattern in kinds:
            tokens = place[rows[windows][stays[windows]]]
            if length == 1 and text is None:
                singles.append(tokens)
                continue
            offsets = None
            if group.shape is not None:
                keep = torch.frombuffer(bytearray(pattern), dtype=torch.bool)
                offsets = plan.offsets[number].view(group.length, group.length)[keep][:, keep].reshape(-1)
            key = (length, group.context_length, group.shape or (0, 0, 0), pattern)
            entry = found.setdefault(key, ([], [], offsets, group.shape))
            entry[0].append(tokens)
            if text is not None:
                entry[1].append(text[windows].reshape(-1))
    groups, places, context, tables = [], singles, [], []
    start, context_start = sum(len(part) for part in singles), 0
    lone_tokens = start
    for (length, text_length, _, _), (tokens_of, text_of, offsets, shape) in sorted(
        found.items(), key=lambda pair: pair[0]
    ):
        count = sum(len(part) for part in tokens_of) // length
        groups.append(WindowGroup(start, count, length, text_length, context_start, shape))
        places += tokens_of
        context += text_of
        tables += [] if offsets is None else [to_device(offsets, device)]
        start += count * length
        context_start += count * text_length
    permutation = torch.cat(places)
    identity = bool((permutation == torch.arange(len(permutation))).all())
    dropped = WindowPlan(
        start,
        tuple(groups),
        lone_tokens,
        None if identity else to_device(permutation, device),
        None if identity else to_device(torch.argsort(permutation), device),
        to_device(torch.cat(context), device) if context else None,
        tuple(tables),
    )
    _RECENT.append(dropped)
    return dropped


def dropped_lengths(grids: Sequence[Grid], kept: Kept | None) -> tuple[int, ...]:
    """Tokens that are computed, per sample."""
    return tuple(token_counts(grids)) if kept is None else kept.lengths
