"""How a long video is cut into overlapping chunks (papers.md 1.5): every stage and the trainer use these numbers.

The first chunk has up to 17 frames. Every later chunk is a clip of 17 frames that starts 12 frames after the one
before: its first 5 frames are the last 5 of that chunk, re-encoded on their own into 2 latent frames that the denoiser
    is given, and 12
are new. Chunks are encoded and decoded each on its own; a join keeps the first copy of the overlap.

In latents that is 5, 2 and 3 frames. A tokenizer with another `ratio` of frames to latents than walt's 4 has chunks of the
same latents, so of 1 + 4 * ratio frames that overlap by 1 + ratio.
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
CHUNK_LATENTS = 1 + (CHUNK_FRAMES - 1) // TEMPORAL_RATIO


def latent_frames(frames: int, ratio: int = TEMPORAL_RATIO) -> int:
    """Latent frames of a clip of 1 + 4k frames encoded on its own: 1 + k."""
    return 1 + (frames - 1) // ratio


def overlap_frames(ratio: int = TEMPORAL_RATIO) -> int:
    """Frames that two chunks share."""
    return 1 + (OVERLAP_LATENTS - 1) * ratio


def chunk_starts(num_frames: int, ratio: int = TEMPORAL_RATIO) -> list[int]:
    """First frames of the chunks of a video: [0] for 1, 5, 9, 13, 17; [0, 12] for 29; [0, 12, 24] for 41; and so on.

    Raises:
        WaltError: for any other number, naming the nearest allowed ones.
    """
    chunk = 1 + (CHUNK_LATENTS - 1) * ratio
    new = chunk - overlap_frames(ratio)
    first = ", ".join(str(1 + k * ratio) for k in range(CHUNK_LATENTS))
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise WaltError(
            f"num_frames must be a positive integer ({first}, {chunk + new}, {chunk + 2 * new}, ...), got {num_frames!r}"
        )
    step, base = (ratio, 1) if num_frames <= chunk else (new, chunk)
    below = base + (num_frames - base) // step * step
    if below != num_frames:
        raise WaltError(
            f"num_frames={num_frames} does not fit: allowed are {first}, then {new} more each "
            f"({chunk + new}, {chunk + 2 * new}, ...); the nearest are {below} and {below + step}"
        )
    return list(range(0, max(num_frames - chunk, 0) + 1, new))


def chunk_length(num_frames: int, ratio: int = TEMPORAL_RATIO) -> int:
    """Frames of every chunk of a video of `num_frames`."""
    return min(num_frames, 1 + (CHUNK_LATENTS - 1) * ratio)


def join_chunks(chunks: Sequence[Tensor], ratio: int = TEMPORAL_RATIO) -> Tensor:
    """`(B, C, T_i, H, W)` chunks of one video -> `(B, C, T, H, W)`, keeping the first copy of every overlap."""
    if not chunks:
        raise WaltError("join_chunks needs at least one chunk, got none")
    overlap = overlap_frames(ratio)
    short = [chunk.shape[2] for chunk in chunks[1:] if chunk.shape[2] <= overlap]
    if short:
        raise WaltError(f"every chunk after the first must have more than {overlap} frames, got {short[0]}")
    return torch.cat([chunks[0], *(chunk[:, :, overlap:] for chunk in chunks[1:])], dim=2)
