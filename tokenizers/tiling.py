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
    def whole(self) -> bool:
        """Whether the clip is here whole, so that nothing is kept for a next chunk."""
        return self._past is None

    @property
    def present(self) -> Past:
        """The frames for the next chunk, complete after the last stripe."""
        return None if self._plane is None else (self._plane,)

    def window(self, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """The next rows `x` with all that the convolution sees of them, in one buffer.

        Before them in time the past, or zeros (none for a lone frame, whose convolution has one temporal tap); above
        them the rows held back, and the frame's zero border where it ends. Cut to whole steps of the kernel.

        Args:
            x: `(B, C, T, rows, W)`.
            kernel, stride: in time and height.
        """
        b, c, t, rows, w = x.shape
        border = (kernel[1] - 1) // 2
        held = 0 if self._held is None else self._held.shape[3]
        above = border if self.top == 0 else held
        below = border if self.top + rows == self.height else 0
        lead = kernel[0] - 1
        if self._past is not None and self._past:
            lead = self._past[0].shape[2]
        full = _empty((b, c, lead + t, above + rows + below, w), x)
        inner = full[:, :, :, above : above + rows]
        inner[:, :, lead:] = x
        if self._past:
            inner[:, :, :lead] = self._past[0][..., self.top : self.top + rows, :]
        else:
            inner[:, :, :lead] = 0
        if self.top == 0:
            full[..., :above, :] = 0
        elif self._held is not None:
            full[..., :above, :] = self._held
        full[..., above + rows :, :] = 0
        if self._past is not None:
            self._keep(inner[:, :, lead + t - (kernel[0] - stride[0]) :])
        self.top += rows
        steps = max(0, (full.shape[3] - kernel[1]) // stride[1] + 1)
        # A copy: a view would keep the whole stripe alive.
        self._held = full[..., steps * stride[1] :, :].clone() if self.top < self.height else None
        return full[..., : (steps - 1) * stride[1] + kernel[1] if steps else 0, :]

    def _keep(self, rows: Tensor) -> None:
        if self._plane is None:
            self._plane = _empty((*rows.shape[:3], self.height, rows.shape[4]), rows)
        self._plane[..., self.top : self.top + rows.shape[3], :] = rows


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor in the layout of the networks: channels last on a CPU."""
    layout = torch.channels_last_3d if like.device.type == "cpu" else torch.contiguous_format
    return torch.empty(*shape, dtype=like.dtype, device=like.device, memory_format=layout)


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
