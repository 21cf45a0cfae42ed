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
