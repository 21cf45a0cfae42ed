"""What the experiments share: the prompt judge and KVD on clips of the emoji theatre, both with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from walt.commands import _image_network
from walt.data.emoji import EmojiTheatre, Scene
from walt.data.scenes import to_video
from walt.evaluation.distances import Interval, mmd_interval
from walt.evaluation.features import load_feature_network
from walt.evaluation.prompts import Judge, Score, asked, score
from walt.evaluation.video import KeptFeatures
from walt.media import Pixels

FEATURES = "mc3-18"


@dataclass(frozen=True)
class Verdict:
    """How often clips show what was asked, and their kernel distance from real clips of other scenes."""

    scores: dict[str, Score]  # background, motion, subject, and all three at once
    kvd: Interval

    def lines(self) -> list[str]:
        rows = [
            f"{name} {one.share:.1%} ({one.interval[0]:.1%} to {one.interval[1]:.1%}; chance {one.chance:.1%})"
            for name, one in self.scores.items()
        ]
        return [*rows, f"KVD {self.kvd.estimate:.4f} ({self.kvd.low:.4f} to {self.kvd.high:.4f})"]


class Bench:
    """Judges sets of clips of the same scenes: each uint8 `(T, H, W, 3)`.

    Args:
        known: the theatre whose subjects the judge can name.
        scenes: what was asked for, one subject each.
        frames, height, width, step: of the clips; `step` frames of a scene apart.
        work: folder where features are kept.
        image_network: of the judge, of `walt.evaluation.features`.
    """

    def __init__(
        self,
        known: EmojiTheatre,
        scenes: Sequence[Scene],
        frames: int,
        height: int,
        width: int,
        work: Path,
        step: int = 1,
        image_network: str = "efficientnet-lite2",
    ) -> None:
        self.scenes, self.world = list(scenes), known.world
        self.shape = (frames, height, width, step)
        self.judge = Judge.learn(known, _image_network(image_network), height, width)
        self.features = KeptFeatures(load_feature_network(FEATURES), work)
        self.reference = torch.stack([self._seen(clip) for clip in self.real(known, 500_000)])

    def real(self, theatre: EmojiTheatre, offset: int = 0) -> list[Pixels]:
        """The real clips of the scenes; with an offset those of other seeds, of the same subjects."""
        frames, height, width, step = self.shape
        clips = []
        for scene in self.scenes:
            shown = scene
            if offset:
                shown = theatre.compose(
                    scene.subjects, scene.background, scene.motion, seed=scene.seed + offset, frames=29
                )
            whole, _ = theatre.render(shown, height, width, frames=(frames - 1) * step + 1)
            clips.append(np.ascontiguousarray(whole[::step]))
        return clips

    def _seen(self, clip: Pixels) -> torch.Tensor:
        return self.features(to_video(clip)[None]).double()

    def __call__(self, clips: Sequence[Pixels]) -> Verdict:
        shown = [self.judge(clip) for clip in clips]
        wanted = [asked(scene) for scene in self.scenes]
        seen = torch.stack([self._seen(clip) for clip in clips])
        scores = score(shown, wanted, self.world)
        right = sum(
            all(vars(one)[name] == vars(asks)[name] for name in scores) for one, asks in zip(shown, wanted, strict=True)
        )
        chance = math.prod(one.chance for one in scores.values())
        scores["all"] = Score(right, len(clips), math.nan, chance)
        return Verdict(scores, mmd_interval(seen, self.reference))
