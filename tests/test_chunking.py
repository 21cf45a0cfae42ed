"""Chunk arithmetic."""

from __future__ import annotations

import pytest
import torch

from walt.chunking import CHUNK_FRAMES, OVERLAP_LATENTS, chunk_length, chunk_starts, join_chunks, latent_frames
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
    assert torch.equal(join_chunks(chunks), video)


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


def test_join_keeps_the_first_copy_of_the_overlap() -> None:
    first, second = torch.zeros(1, 1, 17, 2, 2), torch.ones(1, 1, 17, 2, 2)
    joined = join_chunks([first, second])
    assert joined.shape[2] == 29 and joined[:, :, :17].sum() == 0 and joined[:, :, 17:].min() == 1
    with pytest.raises(WaltError, match="more than 5 frames"):
        join_chunks([first, first[:, :, :5]])
    with pytest.raises(WaltError, match="at least one"):
        join_chunks([])
