"""How an enlarged video is held to the small one: in sampling (`fidelity`), and in training a stage on its frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def back_project(video: Tensor, low_res: Tensor, fidelity: float) -> None:
    """Brings `video` `(B, 3, T, H, W)`, in place, nearer to the video `(B, 3, T, h, w)` that it enlarges, in [-1, 1].

    What its pixels' means over the small pixels lack of `low_res` is added, bicubically enlarged (iterative back-projection,
    Irani and Peleg 1991; the range-space correction of DDNM, arXiv 2212.00490). A tokenizer blurs what the small video
    shows sharply, and so little of it that a denoiser cannot mend it. But where that video was itself decoded from latents
    its finest detail is false: below 1, `fidelity` is the share of the small video's band, from coarse to fine, in which
    at least half of the difference is made up for.

    At 1 the small video is true to its last pixel. Then detail finer than its pixels is kept by half (see `_trust_detail`),
    and the difference is made up for three times over, as a bicubic picture's means are not the picture.
    """
    for t in range(video.shape[2]):  # frame by frame, for memory's sake
        small = low_res[:, :, t].to(video.device, torch.float32)  # a user's video stays on the CPU
        frame = project_frames(video[:, :, t].float(), small, fidelity)
        video[:, :, t] = frame.clamp_(-1, 1).to(video)


def project_frames(frames: Tensor, small: Tensor, fidelity: float) -> Tensor:
    """`back_project` of frames `(B, 3, H, W)` to the small ones `(B, 3, h, w)`, not in place and not clipped, so that a
    stage can be trained through it."""
    scale = frames.shape[-1] // small.shape[-1]
    if fidelity == 1:
        frames = _trust_detail(frames, small, scale)
        for _ in range(3):
            frames = frames + _enlarge(small - F.avg_pool2d(frames, scale), frames)
        return frames
    sigma = math.sqrt(2 * math.log(2)) / (math.pi * fidelity)  # in small pixels
    return frames + _enlarge(blur(small - F.avg_pool2d(frames, scale), sigma), frames)


def _enlarge(small: Tensor, like: Tensor) -> Tensor:
    """`(B, 3, h, w)` bicubically to the `(B, 3, H, W)` of `like`."""
    return F.interpolate(small, size=like.shape[-2:], mode="bicubic", align_corners=False)


def _trust_detail(frame: Tensor, small: Tensor, scale: int) -> Tensor:
    """`frame` `(B, 3, H, W)` with half of its detail that `small` `(B, 3, h, w)` cannot show, and nowhere more than `small` has
    in its own last octave.

    A picture's edges go on from octave to octave; on a plain ground a decoder's texture is noise. Both amplitudes are over
    5x5 pixels and all channels. Half is where a Wiener filter ends when signal and error are as large.
    """
    detail = frame - _enlarge(F.avg_pool2d(frame, scale), frame)
    detail = detail - _enlarge(F.avg_pool2d(detail, scale), frame)
    octave = small - _enlarge(F.avg_pool2d(small, 2, ceil_mode=True), small)

    def amplitude(image: Tensor) -> Tensor:
        energy = F.avg_pool2d(image.square().mean(1, keepdim=True), 5, 1, padding=2, count_include_pad=False)
        energy = F.interpolate(energy, size=frame.shape[-2:], mode="bilinear", align_corners=False)
        return (energy + 1e-12).sqrt()  # of 0 the root has no gradient

    kept = 0.5 * (amplitude(octave) / amplitude(detail)).clamp(max=1)
    return frame - (1 - kept) * detail


def blur(images: Tensor, sigma: float) -> Tensor:
    """`(B, C, h, w)` float smoothed by a Gaussian of `sigma` pixels; beyond their edges images go on as they end."""
    radius = min(math.ceil(3 * sigma), max(images.shape[-2:]))
    kernel = torch.exp(
        -(torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype) ** 2) / (2 * sigma**2)
    )
    kernel = kernel / kernel.sum()
    flat = images.flatten(0, 1)[:, None]
    for shape, border in (((1, -1), [radius, radius, 0, 0]), ((-1, 1), [0, 0, radius, radius])):
        flat = F.conv2d(F.pad(flat, border, mode="replicate"), kernel.view(1, 1, *shape))
    return flat.view_as(images)
