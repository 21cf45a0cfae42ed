"""Joint batches by token budget: samples of mixed size are drawn until the budget is full, with no padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from walt.errors import WaltError


def fill_budget(budget: int, sizes: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> list[int]:
    """Draws shape indices by weight until none fits what is left of the budget.

    Args:
        budget: tokens in the pack.
        sizes: tokens of each shape.
        weights: how often each shape is drawn while it still fits.
        rng: the source of the draw; the pack is a pure function of it.

    Returns:
        Indices into `sizes` whose sizes sum to at most `budget`. What is left over is smaller than the smallest shape.

    Raises:
        WaltError: when not even the smallest shape fits.
    """
    if min(sizes) > budget:
        raise WaltError(f"batch_tokens is {budget}, but the smallest shape of the recipe has {min(sizes)} tokens")
    size, weight = np.asarray(sizes), np.asarray(weights, dtype=np.float64)
    chosen: list[int] = []
    left = budget
    while True:
        fits = size <= left
        if not fits.any():
            return chosen
        p = np.where(fits, weight, 0.0)
        index = int(rng.choice(len(sizes), p=p / p.sum()))
        chosen.append(index)
        left -= int(size[index])
