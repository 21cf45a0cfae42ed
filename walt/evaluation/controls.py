"""Corruptions whose scores are printed beside every score: they say what a feature network sees and what it misses.

Letters: B batch, C channels, T frames, H W pixels. A control maps videos `(B, C, T, H, W)` in [-1, 1] to the same shape
and range and is a function of its input and seed alone.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from walt.errors import WaltError, suggest

CONTROLS = ("shuffled", "frozen", "blurred", "noisy")
BLUR = 0.02  # standard deviation of the blur, in heights of the picture
NOISE = 0.2  # standard deviation of the noise, in the units of [-1, 1]: a tenth of the range


def corrupt(video: Tensor, control: str, seed: int = 0) -> Tensor:
    """Applies a control of CONTROLS.

    "shuffled" puts the frames in one random order, "frozen" repeats the first frame, "blurred" is a Gaussian blur of
    each frame (its edges mirrored), "noisy" adds white Gaussian noise and clips.

    Raises:
        WaltError: an unknown control, or not a video.
    """
    if video.ndim != 5:
        raise WaltError(f"video: expected (B, C, T, H, W), got {tuple(video.shape)}")
    frames, height = video.shape[2], video.shape[3]
    generator = torch.Generator().manual_seed(seed)
    match control:
        case "shuffled":
            return video[:, :, torch.randperm(frames, generator=generator).to(video.device)]
        case "frozen":
            return video[:, :, :1].expand_as(video).contiguous()
        case "blurred":
            sigma = BLUR * height
            size = 2 * math.ceil(3 * sigma) + 1
            pictures = gaussian_blur(rearrange(video, "b c t h w -> (b t) c h w"), [size, size], [sigma, sigma])
            return rearrange(pictures, "(b t) c h w -> b c t h w", b=len(video))
        case "noisy":
            noise = torch.randn(video.shape, generator=generator).to(video)
            return (video + NOISE * noise).clamp(-1, 1)
    raise WaltError(f"control: {control!r} is none of {', '.join(CONTROLS)}{suggest(control, CONTROLS)}")
