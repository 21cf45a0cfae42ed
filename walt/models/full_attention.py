"""Packs for backbones whose attention spans the whole sample: tokens of any kind end to end, no mask, no padding.

Samples are laid out by length, so that equal ones are one attention call and no layer permutes anything.
Letters: B samples, L tokens of the pack (extra tokens included), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from walt.attention import WindowPlan, plan_windows


@dataclass(frozen=True, eq=False)
class FullLayout:
    """How the samples of a pack lie, all of it known on the host.

    Attributes:
        order: which sample lies at each place.
        lengths: tokens at each place, extra ones first.
        extras: how many of them are extra (time, label, text).
        contexts: cross-attended states at each place.
        plan: whole-sample windows.
    """

    order: tuple[int, ...]
    lengths: tuple[int, ...]
    extras: tuple[int, ...]
    contexts: tuple[int, ...]
    plan: WindowPlan

    def arrange(self, values: Tensor) -> Tensor:
        """One row per sample `(B, ...)`, to the order of places."""
        if self.order == tuple(range(len(self.order))):
            return values
        return values[torch.tensor(self.order, device=values.device)]

    def join(self, patches: Tensor, extras: Sequence[Tensor] | None = None) -> Tensor:
        """`(L', D)` patches in sample order, and per sample extra tokens `(e, D)`, to the pack `(L, D)`."""
        counts = [0] * len(self.order)
        for place, i in enumerate(self.order):
            counts[i] = self.lengths[place] - self.extras[place]
        parts = patches.split(counts)
        return torch.cat([x for i in self.order for x in ((parts[i],) if extras is None else (extras[i], parts[i]))])

    def join_contexts(self, contexts: Sequence[Tensor]) -> Tensor:
        """Per sample states `(s, D)`, to places, end to end."""
        return torch.cat([contexts[i] for i in self.order])

    def patches(self, x: Tensor) -> Tensor:
        """The inverse of `join`: `(L, D)` to the patches `(L', D)` in sample order, without extra tokens."""
        found = {
            i: part[extra:] for i, part, extra in zip(self.order, x.split(list(self.lengths)), self.extras, strict=True)
        }
        return torch.cat([found[i] for i in range(len(self.order))])


def full_layout(
    counts: Sequence[int], extras: Sequence[int], contexts: Sequence[int], device: torch.device
) -> FullLayout:
    """Lays samples out by length, then context, then as they came.

    Args:
        counts: patches of each sample.
        extras: extra tokens of each sample.
        contexts: cross-attended states of each sample, 0 for none.
    """
    totals = [n + e for n, e in zip(counts, extras, strict=True)]
    order = tuple(sorted(range(len(totals)), key=lambda i: (totals[i], contexts[i])))
    lengths = tuple(totals[i] for i in order)
    plan = plan_windows(tuple((1, 1, n) for n in lengths)).to(device)
    return FullLayout(order, lengths, tuple(extras[i] for i in order), tuple(contexts[i] for i in order), plan)
