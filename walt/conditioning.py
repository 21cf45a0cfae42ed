"""What a denoiser is told in training, and how it is dropped for guidance (papers: W.A.L.T. sections 3.3-3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frame_mask(latent: Tensor, given: int) -> Tensor:
    """`(1, t, h, w)` with ones on the first `given` latent frames of a `(C, t, h, w)` latent."""
    mask = latent.new_zeros(1, *latent.shape[1:])
    mask[:, :given] = 1.0
    return mask


def draw_given_frames(
    frames: Sequence[int], starts: Sequence[int], probability: float, dropout: float, generator: torch.Generator
) -> list[int]:
    """How many clean latent frames each sample is given: 0, 1 (image to video) or 2 (continuation).

    Args:
        frames: latent frames of each sample; an image (1) is never given any.
        starts: first pixel frame of each sample in its scene; a later chunk (start > 0) is given 2, as in sampling.
        probability: p_fp, the chance that a first chunk is given 1 or 2 frames, evenly.
        dropout: the chance that a later chunk goes without all the same.
        generator: CPU generator.
    """
    given: list[int] = []
    for length, start in zip(frames, starts, strict=True):
        chance, count = torch.rand(2, generator=generator).tolist()
        if length == 1:
            given.append(0)
        elif start > 0:
            given.append(0 if chance < dropout else min(2, length - 1))
        else:
            given.append(0 if chance >= probability else min(1 + int(count < 0.5), length - 1))
    return given


def drop(count: int, probability: float, generator: torch.Generator) -> list[bool]:
    """Which of `count` samples lose their text (or class) so that the unconditional model is learnt too."""
    return (torch.rand(count, generator=generator) < probability).tolist()
