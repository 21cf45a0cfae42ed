"""What walt's pipelines return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class WaltPipelineOutput(BaseOutput):
    """Generated videos; an image is a video of one frame.

    Attributes:
        frames: by `output_type`: "pil" a list of lists of PIL images; "np" float `(B, T, H, W, 3)` in [0, 1]; "pt"
            float `(B, T, 3, H, W)` in [0, 1]; "latent" the denoiser's normalised latents `(B, C, t, h, w)`, those of
            later chunks (5 latent frames each, their first 2 given) appended along t.
    """

    frames: Any


@dataclass
class NuwaPipelineOutput(BaseOutput):
    """What NUWA made.

    Attributes:
        frames: as of WaltPipelineOutput; "latent" gives the tokens, long `(B, T, h, w[, S])`.
        images: the same without the time axis when there is one frame: a list of PIL images, or `(B, ...)`; else None.
        scores: float32 `(B,)`, those of the candidates that were chosen; None without candidates.
    """

    frames: Any
    images: Any = None
    scores: Any = None
