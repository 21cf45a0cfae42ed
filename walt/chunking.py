"""How a long video is cut into overlapping chunks (W.A.L.T. section 3.4): every stage and the trainer use these numbers.

The first chunk has up to 17 frames. Every later chunk is a clip of 17 frames that starts 12 frames after the one
before: its first 5 frames are the last 5 of that chunk, re-encoded on their own into 2 latent frames that the denoiser
is given, and 12 are new. Chunks are encoded and decoded each on its own; a join keeps the first copy of the overlap.

In latents that is 5, 2 and 3 frames. A tokenizer with another `ratio` of frames to latents than walt's 4 has chunks of the
same latents, so of 1 + 4 * ratio frames that overlap by 1 + ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def chunk_joins(num_frames: int, ratio: int = TEMPORAL_RATIO) -> list[int]:
    """First frames that the later chunks add: [17] for 29, [17, 29] for 41; none for one chunk.

    Raises:
        WaltError: as `chunk_starts`.
    """
    return [start + overlap_frames(ratio) for start in chunk_starts(num_frames, ratio)[1:]]


def chunk_length(num_frames: int, ratio: int = TEMPORAL_RATIO) -> int:
    """Frames of every chunk of a video of `num_frames`."""
    return min(num_frames, 1 + (CHUNK_LATENTS - 1) * ratio)


def chunk_count(num_frames: int, ratio: int = TEMPORAL_RATIO) -> int:
    """Chunks that a video of any number of frames takes; the last may be padded."""
    chunk = 1 + (CHUNK_LATENTS - 1) * ratio
    return 1 + -(-max(num_frames - chunk, 0) // (chunk - overlap_frames(ratio)))


def fitting_frames(num_frames: int, ratio: int = TEMPORAL_RATIO) -> int:
    """The smallest number of frames from `num_frames` on that `chunk_starts` allows."""
    chunk = 1 + (CHUNK_LATENTS - 1) * ratio
    if num_frames <= chunk:
        return 1 + -(-(num_frames - 1) // ratio) * ratio
    return chunk + (chunk_count(num_frames, ratio) - 1) * (chunk - overlap_frames(ratio))


def peek(pieces: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first piece of a video, and an iterator of all of them that holds none which it has given away.

    Raises:
        WaltError: there is no piece.
    """
    source = iter(pieces)
    first = next(source, None)
    if first is None:
        raise WaltError("a video needs at least one frame, got none")

    def again(held: list[Tensor]) -> Iterator[Tensor]:
        yield held.pop()
        yield from source

    return first, again([first])


def windows(pieces: Iterable[Tensor], ratio: int = TEMPORAL_RATIO) -> Iterator[tuple[int, Tensor, int, bool]]:
    """Chunks of a video of any length that comes in pieces `(B, C, n, H, W)`, holding no more than a chunk and a piece.

    The last chunk may be shorter than the others, and is filled up with copies of the last frame to 1 + 4k frames.

    Yields:
        (first frame, frames `(B, C, 1 + 4k, H, W)`, how many of them are no filling, whether it is the last).
    """
    chunk, overlap = 1 + (CHUNK_LATENTS - 1) * ratio, overlap_frames(ratio)
    source = peek(pieces)[1]
    start, held = 0, next(source)
    while True:
        # One frame more than the chunk: only so is it known not to be the last.
        while held.shape[2] <= chunk and (more := next(source, None)) is not None:
            held = torch.cat([held, more], dim=2)
        frames, valid = held[:, :, :chunk], min(held.shape[2], chunk)
        last = held.shape[2] <= chunk
        missing = -(valid - 1) % ratio
        if missing:
            frames = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        yield start, frames, valid, last
        if last:
            return
        held, start = held[:, :, chunk - overlap :], start + chunk - overlap
