"""Exact spatial tiling: a frame goes through a network in stripes of rows, and every layer keeps the rows it still needs.

Tiles that are computed apart and blended show seams, and a halo wide enough to hide them would be some 24 latent cells
a side. Here a tile hands its border to the next one layer by layer, as a causal layer hands its last frames to the next
chunk: a 3x3 convolution keeps its last two input rows, so its output lags one row behind, and the last stripe brings up
what is behind. No row is computed twice, nothing is blended, and the result is that of the whole frame.

A stripe spans the full width: what is carried is as wide as the frame in any case, so narrower tiles would save nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Past = Any  # None | () | nested tuples of tensors, see autoencoder_kl_walt


class Carry:
    """What one convolution carries from stripe to stripe while a frame passes, and its place in the frame.

    Args:
        height: rows of the whole input.
        past: the convolution's frames of the chunk before, whole planes `(B, C, K, H, W)`: `(plane,)`, () or None.
        owned: the planes may be overwritten by the new ones (each row is read once, before it is written).
    """

    def __init__(self, height: int, past: Past, owned: bool = False) -> None:
        self.height, self.top, self.owned = height, 0, owned
        self._past, self._plane = past, None if past is None else past[0] if owned and past else None
        self._held: Tensor | None = None

    @property
    def present(self) -> Past:
        """The frames for the next chunk, complete after the last stripe."""
        return None if self._plane is None else (self._plane,)

    def past(self, rows: int) -> Past:
        """The earlier frames of the next `rows` rows."""
        if not self._past or not self._past[0].numel():
            return self._past
        return (self._past[0][..., self.top : self.top + rows, :],)

    def keep(self, present: Past) -> None:
        """Stores the frames that the rows at hand hand on to the next chunk."""
        if present is None:
            return
        (rows,) = present
        if not rows.numel():
            self._plane = rows
            return
        if self._plane is None:
            shape = (*rows.shape[:3], self.height, rows.shape[4])
            self._plane = rows.new_empty(shape)
        self._plane[..., self.top : self.top + rows.shape[3], :] = rows

    def window(self, x: Tensor, kernel: int = 1, stride: int = 1) -> Tensor:
        """The next rows `x` behind those held back, with the frame's zero border, cut to whole steps of the kernel."""
        border = (kernel - 1) // 2
        before = border if self.top == 0 else 0
        self.top += x.shape[3]
        after = border if self.top == self.height else 0
        if self._held is not None:
            x = torch.cat([self._held, x], dim=3)
        if before or after:
            x = F.pad(x, (0, 0, before, after))
        steps = max(0, (x.shape[3] - kernel) // stride + 1)
        # A copy: a view would keep the whole stripe alive.
        self._held = x[..., steps * stride :, :].clone() if self.top < self.height else None
        return x[..., : (steps - 1) * stride + kernel if steps else 0, :]


class Queue:
    """Rows that wait until others are ready: a shortcut around convolutions, or rows that must come in groups."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def put(self, x: Tensor) -> int:
        """Appends rows; returns how many wait."""
        self._rows = x if self._rows is None else torch.cat([self._rows, x], dim=3)
        return self._rows.shape[3]

    def take(self, rows: int) -> Tensor:
        """Removes the first rows."""
        assert self._rows is not None
        taken, rest = self._rows[..., :rows, :], self._rows[..., rows:, :]
        self._rows = rest.clone() if rest.shape[3] else None
        return taken


def run(
    steps: Sequence[Callable[[Tensor], Tensor]],
    limits: Sequence[int],
    stripes: Iterable[Tensor],
    emit: Callable[[Tensor], None],
) -> None:
    """Sends stripes through steps, each as far as it gets before the next is read.

    Args:
        steps: take the next rows `(B, C, T, rows, W)`, return the rows that are finished, possibly none.
        limits: most rows a step takes at once; more (the last stripe brings up all that lags behind) are split.
        stripes: from the top of the frame to its bottom.
        emit: takes what the last step returns.
    """
    for stripe in stripes:
        waiting: list[tuple[int, Tensor]] = [(0, stripe)]
        del stripe
        while waiting:
            index, x = waiting.pop()
            if index == len(steps):
                emit(x)
            elif x.shape[3] > limits[index]:
                waiting.extend((index, part) for part in reversed(x.split(limits[index], dim=3)))
            else:
                x = steps[index](x)
                if x.shape[3]:
                    waiting.append((index + 1, x))
            del x


class Canvas:
    """An output that is filled piece by piece, allocated with the first."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._tensor: Tensor | None = None

    def write(self, piece: Tensor, frame: int, top: int = 0) -> None:
        """Puts `(B, C, T, rows, W)` at that frame and row."""
        if self._tensor is None:
            self._tensor = piece.new_empty(self.shape)
        self._tensor[:, :, frame : frame + piece.shape[2], top : top + piece.shape[3]] = piece

    def read(self) -> Tensor:
        """The whole output."""
        assert self._tensor is not None
        return self._tensor
