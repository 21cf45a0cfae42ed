"""What a denoiser is told, and how that is dropped in training for guidance (papers: W.A.L.T. sections 3.3-3.4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TEXT_TOKENS = 64
"""Most tokens of a prompt, special ones included, in training and (unless a call says otherwise) in sampling."""


def encode_text(
    tokenizer: Any,
    encoder: Any,
    texts: list[str],
    device: torch.device,
    max_length: int = TEXT_TOKENS,
    warn: Callable[[str], None] = logger.warning,
) -> tuple[Tensor, Tensor]:
    """Text states `(P, S, D)` of a transformers encoder and their mask `(P, S)`.

    Texts of more than `max_length` tokens, or than encoder or tokenizer take, are cut; `warn` is told what of each.
    """
    config = getattr(encoder, "model", encoder).config  # that of the encoder inside a CompactTextEncoder
    limit = getattr(config, "max_position_embeddings", None) or max_length  # none where relative (T5)
    max_length = min(max_length, tokenizer.model_max_length, limit)
    for ids in tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]:
        if len(ids) > max_length:
            lost = tokenizer.decode(ids[max_length - 1 : -1])  # the last token is a special one, and stays
            warn(f'a prompt of {len(ids)} tokens is cut to {max_length}; what is left out: "{lost}"')
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask


def frame_mask(latent: Tensor, given: int) -> Tensor:
    """`(1, t, h, w)` with ones on the first `given` latent frames of a `(C, t, h, w)` latent."""
    mask = latent.new_zeros(1, *latent.shape[1:])
    mask[:, :given] = 1.0
    return mask


def draw_given_frames(
    frames: Sequence[int],
    starts: Sequence[int],
    probability: float,
    dropout: float,
    generator: torch.Generator,
    choices: Sequence[int] = (1, 2),
) -> list[int]:
    """How many clean latent frames each sample is given: 0, or one of `choices`.

    Args:
        frames: latent frames of each sample; an image (1) is never given any.
        starts: first pixel frame of each sample in its scene; a later chunk (start > 0) is given 2, as in sampling.
        probability: p_fp, the chance that a first chunk is given frames.
        dropout: the chance that a later chunk goes without all the same.
        generator: CPU generator.
        choices: how many frames a first chunk is given, evenly: 1 is image to video, 2 continuation.
    """
    given: list[int] = []
    for length, start in zip(frames, starts, strict=True):
        chance, count = torch.rand(2, generator=generator).tolist()
        if length == 1:
            given.append(0)
        elif start > 0:
            given.append(0 if chance < dropout else min(2, length - 1))
        else:
            given.append(0 if chance >= probability else min(choices[-1 - int(count * len(choices))], length - 1))
    return given


MASK_KINDS = ("frames", "first", "last", "both", "box", "moment", "inside")


def random_mask(mask: Tensor, generator: torch.Generator, kinds: Sequence[str] = ("box", "frames")) -> Tensor:
    """An arbitrary mask in place of `mask` `(1, t, h, w)`, of one of `kinds`, drawn evenly.

    Ones are given; something always is and something never. Given are, by kind (and the tasks that need it):
    - "frames": random frames (keyframes);
    - "first", "last", "both": frames at the beginning, the end, or both (continue, rewind, loop and connect);
    - "box": everything but a random box through all frames (fill);
    - "moment": everything but a random box in a random span of frames (fill in space and time);
    - "inside": a random box through all frames (outpaint).
    An image has only boxes; where a kind is impossible another one of its sort is taken.
    """
    t, h, w = mask.shape[1:]
    result = torch.zeros_like(mask)

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    kind = kinds[below(len(kinds))]
    spatial = kind in ("box", "moment", "inside")
    if t == 1 and h * w == 1:
        return result
    if h * w == 1 and spatial:
        kind, spatial = "frames", False
    if t == 1 and not spatial:
        kind, spatial = "box", True
    if not spatial:
        order = torch.randperm(t, generator=generator) if kind == "frames" else torch.arange(t)
        least = 2 if kind == "both" and t > 2 else 1
        count = least + below(t - least)
        if kind == "both" and count > 1:
            order = order.roll(1 + below(count - 1))  # so many of them are the last frames
        result[:, (order[-count:] if kind == "last" else order[:count])] = 1.0
        return result
    while True:
        height, width = 1 + below(h), 1 + below(w)
        if height * width < h * w:
            break
    top, left = below(h - height + 1), below(w - width + 1)
    start, end = 0, t
    if kind == "moment":
        length = 1 + below(t)
        start = below(t - length + 1)
        end = start + length
    inside = kind == "inside"
    result.fill_(0.0 if inside else 1.0)
    result[:, start:end, top : top + height, left : left + width] = 1.0 if inside else 0.0
    return result


def drop(count: int, probability: float, generator: torch.Generator) -> list[bool]:
    """Which of `count` samples lose their text (or class) so that the unconditional model is learnt too."""
    return (torch.rand(count, generator=generator) < probability).tolist()


def partial_captions(captions: Sequence[str], probability: float, generator: torch.Generator) -> list[str]:
    """`captions`, of which a share has lost words, each at even odds (one at least stays).

    What a word means is then learnt apart from the words that it stands beside in training.
    """
    result = []
    for caption, chosen in zip(captions, drop(len(captions), probability, generator), strict=True):
        words = caption.split()
        if chosen and len(words) > 1:
            stays = drop(len(words), 0.5, generator)
            always = int(torch.randint(len(words), (), generator=generator))
            caption = " ".join(word for i, word in enumerate(words) if stays[i] or i == always)
        result.append(caption)
    return result


def low_res_kind(config: Mapping[str, Any]) -> Literal["space", "time"] | None:
    """What a denoiser of this config is told of a video of less resolution: half the size, or half the frames.

    A temporal stage (Imagen Video, arXiv 2210.02303, section 2.3) is a super-resolution denoiser with `low_res_scale` 1:
    its low-resolution video has the same size, and every frame is shown twice.
    """
    if config.get("low_res_channels") is None:
        return None
    return "time" if config.get("low_res_scale", 2) == 1 else "space"


def half_rate(video: Tensor) -> Tensor:
    """Every second frame of `(..., T, H, W)`, the first among them: 1 + 2k frames become 1 + k."""
    return video[..., ::2, :, :]


def frames_twice(video: Tensor) -> Tensor:
    """Every frame of `(..., n, H, W)` twice and the last one once: 2n - 1 frames, frame 2i of which is frame i."""
    return video.repeat_interleave(2, dim=-3)[..., :-1, :, :]


def pieces_twice(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """`frames_twice` of a video that comes in pieces."""
    last: Tensor | None = None
    for piece in pieces:
        twice = frames_twice(piece)
        yield twice if last is None else torch.cat([last, twice], dim=-3)
        last = piece[..., -1:, :, :]
