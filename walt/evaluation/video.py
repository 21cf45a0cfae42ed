"""A folder of generated clips against real ones, with the same distances of corrupted real clips printed beside.

The real clips are two halves. The first is the reference of every row; the second stands in for a perfect model ("real")
and, corrupted, for imperfect ones. So every row compares unlike clips, and a score means something between its
neighbours: at best "real", and below every control that shows a fault the clips should not have.

Letters: B batch, T frames, H W pixels, N clips, d features.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from walt.data.emoji import EmojiTheatre
from walt.data.latents import save_file
from walt.data.scenes import SCENE_FRAMES, to_video
from walt.errors import WaltError
from walt.evaluation.controls import CONTROLS, corrupt
from walt.evaluation.distances import (
    FeatureStatistics,
    Interval,
    frechet_distance,
    inception_score,
    mmd_interval,
)
from walt.evaluation.features import FeatureNetwork
from walt.evaluation.prompts import CLIP_SUFFIX
from walt.evaluation.prompts import read_clip as read_judged
from walt.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Pixels,
    is_image_path,
    read_image,
    read_video,
    replacing,
    write_image,
    write_video,
)


@dataclass(frozen=True)
class Row:
    """The distances of one set of clips from the reference.

    `kernel` is unbiased, with its 95 % interval. `frechet` has none: repeating clips, as a bootstrap does, lowers the
    rank of a covariance and biases the distance further upwards. `score` is the Inception Score of the set alone, mean
    and standard deviation over `score_splits`; it too is biased, downwards, where clips are few.
    """

    clips: str
    count: int
    frechet: float
    kernel: Interval
    score: tuple[float, float] | None = None


def score_splits(count: int) -> int:
    """Into how many parts so many clips are split for an Inception Score: ten as in publications, of at least 1,000."""
    return max(1, min(10, count // 1000))


def clip_files(folder: str | Path, argument: str, least: int = 2) -> list[Path]:
    """The clips of a folder by name: videos, images, or what the prompt judge keeps (`walt.evaluation.prompts`).

    A WaltError names the argument when there are too few, or when the judge keeps clips of several models or settings there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WaltError(f'{argument}: there is no folder "{folder}"')
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, CLIP_SUFFIX)
    )
    judged = Counter(path.name.split("-")[0] for path in paths if path.suffix.lower() == CLIP_SUFFIX)
    if judged and max(judged.values()) > 1:
        raise WaltError(
            f'{argument}: "{folder}" holds clip {judged.most_common(1)[0][0]} of several models or settings: give '
            "`walt evaluate prompts` a --work folder for each"
        )
    if len(paths) < least:
        raise WaltError(f'{argument}: expected at least {least} videos or images in "{folder}", got {len(paths)}')
    return paths


def read_clip(path: Path) -> Pixels:
    """uint8 `(T, H, W, 3)`; an image is a clip of one frame."""
    if path.suffix.lower() == CLIP_SUFFIX:
        return read_judged(path)
    return read_image(path)[None] if is_image_path(path) else read_video(path)[0]


def read_clips(paths: Sequence[Path], shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Clips `(1, 3, T, H, W)` in [-1, 1], one at a time; WaltError for one that is not of `shape` `(T, H, W, 3)`."""
    for path in paths:
        pixels = read_clip(path)
        if pixels.shape != shape:
            raise WaltError(f'"{path}": expected {_size(shape)} as the first generated clip, got {_size(pixels.shape)}')
        yield to_video(pixels)[None]


def render_clips(theatre: EmojiTheatre, seeds: Iterable[int], like: Path, folder: Path) -> Iterator[Tensor]:
    """The theatre's clips `(1, 3, T, H, W)` of the shape of the clip `like`, written as the same kind of file.

    They pass through the file format as the generated ones did, so that its traces count for neither side.
    """
    frames, height, width, _ = read_clip(like).shape
    file = folder / f"real{like.suffix.lower()}"
    lossy_image = file.suffix in IMAGE_SUFFIXES and file.suffix != ".png"
    for seed in seeds:
        scene = theatre.scene(seed, SCENE_FRAMES if frames > 1 else 1)
        pixels, _ = theatre.render(scene, height, width, frames=frames)
        if file.suffix in VIDEO_SUFFIXES:
            write_video(pixels, file)
            pixels = read_video(file)[0]
            file.unlink()
        elif lossy_image:
            write_image(pixels[0], file)
            pixels = read_image(file)[None]
            file.unlink()
        yield to_video(pixels)[None]


class KeptFeatures:
    """Features by the clip's pixels and the network's fingerprint, kept in one small file per clip of a folder.

    A rerun finds what an interrupted run made, and nothing else: another clip or network has another name.
    """

    def __init__(self, network: FeatureNetwork, folder: str | Path) -> None:
        self.network = network
        self.folder = Path(folder) / f"{network.name.lower()}-{network.fingerprint[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, video: Tensor) -> Tensor:
        """`(d,)` of a clip `(1, 3, T, H, W)`."""
        return self._kept(video, "features", self.network.features)

    def probabilities(self, video: Tensor) -> Tensor:
        """`(K,)` of the network's classes, of a clip `(1, 3, T, H, W)`."""
        return self._kept(video, "classes", self.network.probabilities)

    def _kept(self, video: Tensor, kind: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = np.ascontiguousarray(video.numpy())
        digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
        digest.update(pixels.data)
        ending = "" if kind == "features" else f".{kind}"
        path = self.folder / f"{digest.hexdigest()[:32]}{ending}.safetensors"
        if path.is_file():
            try:
                return load_file(path)[kind]
            except (SafetensorError, KeyError) as error:
                raise WaltError(f'"{path}" is damaged ({error}): remove it') from error
        made = make(video)[0]
        with replacing(path) as temporary:
            save_file({kind: made.contiguous()}, temporary)
        return made


def compare_clips(
    network: FeatureNetwork,
    generated: Iterable[Tensor],
    reference: Iterable[Tensor],
    others: Iterable[Tensor],
    folder: str | Path,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """The rows "generated", "real" and each control, as distances from the reference clips.

    Args:
        generated, reference, others: clips `(1, 3, T, H, W)` in [-1, 1], read once; at least 2 each. `others` are real
            and none of the reference's.
        folder: where features are kept.
        seed: of the controls (clip i gets seed + i) and of the intervals.
        progress: called with the row's name after each clip.
    """
    kept = KeptFeatures(network, folder)
    seen: dict[str, list[Tensor]] = {name: [] for name in ("generated", "reference", "real", *CONTROLS)}
    classes: dict[str, list[Tensor]] = {name: [] for name in seen}

    def look(name: str, clip: Tensor) -> None:
        seen[name].append(kept(clip))
        if network.score is not None and name != "reference":
            classes[name].append(kept.probabilities(clip))
        progress(name)

    for name, clips in (("generated", generated), ("reference", reference), ("others", others)):
        number = -1
        for number, clip in enumerate(clips):
            if name != "others":
                look(name, clip)
                continue
            for control in ("real", *CONTROLS):
                look(control, clip if control == "real" else corrupt(clip, control, seed + number))
        if number < 1:
            raise WaltError(f"{name}: expected at least 2 clips, got {number + 1}")
    real = torch.stack(seen.pop("reference")).double()
    known = FeatureStatistics.of(real)
    rows = []
    for name, column in seen.items():
        features = torch.stack(column).double()
        frechet = frechet_distance(FeatureStatistics.of(features), known)
        score = None
        if network.score is not None:
            score = inception_score(torch.stack(classes[name]), score_splits(len(column)))
        rows.append(Row(name, len(column), frechet, mmd_interval(features, real, seed=seed), score))
    return rows


def write_report(path: Path, network: FeatureNetwork, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Writes the rows as JSON, with the network's names and fingerprint and the settings given."""
    report = {
        "network": network.name,
        "fingerprint": network.fingerprint,
        "frechet": network.frechet,
        "kernel": network.kernel,
        "score": network.score,
        **settings,
        "rows": [asdict(row) for row in rows],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frames of {shape[1]}x{shape[2]}"
