"""3x3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) in space, direct in time.

From Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308, section 4.3): a 6x6 tile of
the input and the 3x3 kernel are transformed, multiplied point by point (a matrix product over channels for each of 36
points), and transformed back to 4x4 outputs. For a CPU in float32 without gradients, whose convolutions otherwise run at
the limit of its matrix products; results differ from the direct form by rounding, about 1e-5 of their size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from walt.linear import product, product_is_faster

# The paper's matrices for outputs 4, taps 3, from the points 0, 1, -1, 2, -2 and infinity.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_BLOCK = 2**21  # transformed input values held at a time: 8 MB, so that they stay in the last-level cache


def fits(x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether `conv3d` can stand in for torch's and is faster: float32 on a CPU, no gradients, enough work."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and tuple(stride) == (1, 1, 1)
        and tuple(weight.shape[2:]) == (3, 3, 3)
        and min(weight.shape[:2]) >= 32
        and x.shape[-2] * x.shape[-1] >= 256
    )


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (1, 1), before: int = 0
) -> Tensor:
    """As `F.conv3d` for a 3x3x3 kernel, with zeros around: `padding` in space and `before` in time.

    Args:
        x: `(B, C, T, H, W)` float32.
        weight: `(O, C, 3, 3, 3)`.
        bias: `(O,)` or None.
        padding: rows and columns of zeros on each side.
        before: frames of zeros before the first, 0 to 2; they cost nothing.

    Returns:
        `(B, O, T + before - 2, H + 2 * padding[0] - 2, W + 2 * padding[1] - 2)` in channels-last layout.
    """
    batch, channels, frames, _, _ = x.shape
    out_channels, out_frames = weight.shape[0], frames + before - 2
    height, width = x.shape[3] + 2 * padding[0] - 2, x.shape[4] + 2 * padding[1] - 2
    rows, columns = -(-height // 4), -(-width // 4)  # of tiles

    kernel = torch.tensor(_KERNEL)
    kernel = torch.kron(kernel, kernel) @ weight.permute(3, 4, 2, 1, 0).reshape(9, -1)
    kernel = kernel.view(36, 3, channels, out_channels)
    forth = torch.tensor(_INPUT, dtype=torch.float32)
    forth = torch.kron(forth, forth)
    back = torch.tensor(_OUTPUT, dtype=torch.float32)
    back = torch.kron(back, back)

    # Channels last, padded to whole tiles.
    below, right = 4 * rows + 2 - x.shape[3] - padding[0], 4 * columns + 2 - x.shape[4] - padding[1]
    padded = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, padding[1], right, padding[0], below))
    out = x.new_empty(batch, out_frames, height, width, out_channels)
    single = product_is_faster(padded)  # than the 36 as one batch
    # Tiles of a block: whole rows of them, or where frames are many a part of one row.
    most = max(1, _BLOCK // (36 * frames * channels))
    high, wide = max(1, most // columns), min(most, columns)
    blocks = [(first, left) for first in range(0, rows, high) for left in range(0, columns, wide)]
    for sample, result in zip(padded, out, strict=True):
        for first, left in blocks:
            count, across = min(high, rows - first), min(wide, columns - left)
            part = sample[:, 4 * first : 4 * (first + count) + 2, 4 * left : 4 * (left + across) + 2]
            tiles = part.unfold(1, 6, 4).unfold(2, 6, 4)  # (T, rows, columns, C, 6, 6), a view
            points = forth @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
            points = points.view(36, frames, count * across, channels)
            sums = points.new_empty(36, out_frames, count * across, out_channels)
            for k in (2, 1, 0):  # output t reads input t + k - before
                skip = max(0, before - k)
                a = points[:, k + skip - before : out_frames + k - before].flatten(1, 2)
                place = sums[:, skip:].flatten(1, 2)
                if not single:
                    torch.baddbmm(place, a, kernel[:, k], beta=k < 2, out=place)
                elif k == 2:
                    for y, values, taps in zip(place, a, kernel[:, k], strict=True):
                        y.copy_(product(values, taps.t()))
                else:
                    for y, values, taps in zip(place, a, kernel[:, k], strict=True):
                        y.add_(product(values, taps.t()))
            y = (back @ sums.view(36, -1)).view(4, 4, out_frames, count, across, out_channels)
            y = y.permute(2, 3, 0, 4, 1, 5).reshape(out_frames, 4 * count, 4 * across, out_channels)
            place = result[:, 4 * first : 4 * (first + count), 4 * left : 4 * (left + across)]
            y = y[:, : place.shape[1], : place.shape[2]]
            if bias is None:
                place.copy_(y)
            else:
                torch.add(y, bias, out=place)
    return out.permute(0, 4, 1, 2, 3)
