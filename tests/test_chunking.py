"""Chunk arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from walt.chunking import (
    CHUNK_FRAMES,
    OVERLAP_LATENTS,
    chunk_count,
    chunk_joins,
    chunk_length,
    chunk_starts,
    fitting_frames,
    latent_frames,
    windows,
)
from walt.errors import WaltError


@pytest.mark.parametrize(
    ("frames", "starts"),
    [(1, [0]), (5, [0]), (9, [0]), (13, [0]), (17, [0]), (29, [0, 12]), (41, [0, 12, 24]), (53, [0, 12, 24, 36])],
)
def test_starts_cover_the_video_exactly(frames: int, starts: list[int]) -> None:
    assert chunk_starts(frames) == starts
    length = chunk_length(frames)
    video = torch.arange(frames).view(1, 1, -1, 1, 1)
    chunks = [video[:, :, start : start + length] for start in starts]
    assert all(chunk.shape[2] == length for chunk in chunks)
    assert torch.equal(torch.cat([chunks[0], *(chunk[:, :, 5:] for chunk in chunks[1:])], dim=2), video)
    assert chunk_count(frames) == len(starts) and fitting_frames(frames) == frames


def test_joins_are_where_later_chunks_add_frames() -> None:
    assert [chunk_joins(frames) for frames in (17, 29, 41)] == [[], [17], [17, 29]]
    assert chunk_joins(57, ratio=8) == [33]


def test_latent_counts() -> None:
    assert [latent_frames(n) for n in (1, 5, 9, 13, CHUNK_FRAMES)] == [1, 2, 3, 4, 5]
    assert OVERLAP_LATENTS == 2


@pytest.mark.parametrize(
    ("frames", "near"), [(2, "1 and 5"), (16, "13 and 17"), (18, "17 and 29"), (30, "29 and 41"), (40, "29 and 41")]
)
def test_unfit_numbers_name_the_nearest(frames: int, near: str) -> None:
    with pytest.raises(WaltError, match=rf"num_frames={frames} .*nearest are {near}"):
        chunk_starts(frames)


@pytest.mark.parametrize("frames", [0, -3, 17.0, True, "17", None])
def test_what_is_no_positive_integer_is_refused(frames: object) -> None:
    with pytest.raises(WaltError, match="num_frames must be a positive integer"):
        chunk_starts(frames)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 16, 17, 18, 21, 28, 29, 30, 60])
@pytest.mark.parametrize("piece", [1, 5, 12, 100])
def test_any_length_in_any_pieces_is_covered(frames: int, piece: int) -> None:
    video = torch.arange(frames).view(1, 1, -1, 1, 1)
    chunks = list(windows(iter(video.split(piece, dim=2))))
    assert [last for *_, last in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) == chunk_count(frames)
    for start, chunk, valid, last in chunks:
        assert torch.equal(chunk[:, :, :valid], video[:, :, start : start + valid])
        assert chunk.shape[2] % 4 == 1 and (chunk.shape[2] == 17 or last)
        assert 0 <= chunk.shape[2] - valid < 4 and bool((chunk[:, :, valid:] == frames - 1).all())
    joined = torch.cat([chunk[:, :, (5 if start else 0) : valid] for start, chunk, valid, _ in chunks], dim=2)
    assert torch.equal(joined, video)


def test_windows_hold_no_more_than_a_chunk_and_a_piece() -> None:
    asked = 0

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal asked
        while True:
            asked += 1
            yield torch.zeros(1, 1, 6, 1, 1)

    stream = windows(pieces())
    for _ in range(5):
        start, *_ = next(stream)
        assert asked * 6 <= start + 17 + 6
    with pytest.raises(WaltError, match="at least one frame"):
        next(windows([]))


@pytest.mark.parametrize(("frames", "fitting"), [(1, 1), (2, 5), (17, 17), (18, 29), (29, 29), (30, 41)])
def test_fitting_frames(frames: int, fitting: int) -> None:
    assert fitting_frames(frames) == fitting
