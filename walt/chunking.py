"""How a long video is cut into overlapping chunks (papers.md 1.5): every stage and the trainer use these numbers.

The first chunk has up to 17 frames. Every later chunk is a clip of 17 frames that starts 12 frames after the one
before: its first 5 frames are the last 5 of that chunk, re-encoded on their own into 2 latent frames that the denoiser
    is given, and 12
are new. Chunks are encoded and decoded each on its own; a join keeps the first copy of the overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from walt.errors import WaltError

CHUNK_FRAMES = 17
OVERLAP_FRAMES = 5
NEW_FRAMES = CHUNK_FRAMES - OVERLAP_FRAMES
TEMPORAL_RATIO = 4  # frames per latent frame after the first
OVERLAP_LATENTS = 1 + (OVERLAP_FRAMES - 1) // TEMPORAL_RATIO


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 1 + 4k frames encoded on its own: 1 + k."""
    return 1 + (frames - 1) // TEMPORAL_RATIO


def chunk_starts(num_frames: int) -> list[int]:
    """First frames of the chunks of a video: [0] for 1, 5, 9, 13, 17; [0, 12] for 29; [0, 12, 24] for 41; and so on.

    Raises:
        WaltError: for any other number, naming the nearest allowed ones.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise WaltError(f"num_frames must be a positive integer (1, 5, 9, 13, 17, 29, 41, ...), got {num_frames!r}")
    step, base = (TEMPORAL_RATIO, 1) if num_frames <= CHUNK_FRAMES else (NEW_FRAMES, CHUNK_FRAMES)
    below = base + (num_frames - base) // step * step
    if below != num_frames:
        raise WaltError(
            f"num_frames={num_frames} does not fit: allowed are 1, 5, 9, 13, 17, then 12 more each (29, 41, ...); "
            f"the nearest are {below} and {below + step}"
        )
    return list(range(0, max(num_frames - CHUNK_FRAMES, 0) + 1, NEW_FRAMES))


def chunk_length(num_frames: int) -> int:
    """Frames of every chunk of a video of `num_frames`."""
    return min(num_frames, CHUNK_FRAMES)


def join_chunks(chunks: Sequence[Tensor]) -> Tensor:
    """`(B, C, T_i, H, W)` chunks of one video -> `(B, C, T, H, W)`, keeping the first copy of every overlap."""
    if not chunks:
        raise WaltError("join_chunks needs at least one chunk, got none")
    short = [chunk.shape[2] for chunk in chunks[1:] if chunk.shape[2] <= OVERLAP_FRAMES]
    if short:
        raise WaltError(f"every chunk after the first must have more than {OVERLAP_FRAMES} frames, got {short[0]}")
    return torch.cat([chunks[0], *(chunk[:, :, OVERLAP_FRAMES:] for chunk in chunks[1:])], dim=2)
