"""The prompt judge: does a clip show the background, the motion and the subject that its prompt names?

    held_out_scenes   prompts that training never saw, each with the real scene that it describes
    make_clips        one file per prompt; what is there already is not sampled again
    Judge             clip -> Named: colour for the ground, the track for the motion, a given image network for the subject
    score             accuracy per property, with its interval, and the same with the prompts shuffled
    goals             what the scores have to reach

Letters: T frames, H W pixels; clips are uint8 RGB `(T, H, W, 3)`.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from walt.data.emoji import COLOURS, EmojiTheatre, Scene, World, held_out
from walt.errors import WaltError
from walt.evaluation.tracks import Floats, Mask, Pixels, Track, find_subject, name_motion, nearest_colour
from walt.media import replacing

if TYPE_CHECKING:
    from torch import Tensor

PROPERTIES = ("background", "motion", "subject")
GOALS = {"background": 0.95, "motion": 0.90}
JUDGE_GOAL = 0.85  # a judge that names fewer of the real subjects has to be mended first
SCENE_FRAMES = 29  # of the scenes of which training shows the beginning, or the end
VIEWS = 3  # frames of a clip that the image network sees
SIDE = 160  # pixels of its crops
NEUTRAL = 128  # the gray behind a cut-out subject

ImageNetwork = Callable[["Tensor"], "Tensor"]
Sampler = Callable[[Sequence[str], Sequence[int]], Pixels]


@dataclass(frozen=True)
class Named:
    """What a clip shows, or what a prompt asks for; "" where nothing can be told."""

    background: str
    motion: str
    subject: str


# --------------------------------------------------------------------------------------------------- prompts and clips


def held_out_scenes(theatre: EmojiTheatre, count: int, seed: int = 0, frames: int = 17) -> list[Scene]:
    """The `count` scenes from `seed` on; the shorter list is always the beginning of the longer one.

    Args:
        theatre: of the split "heldout", so that every scene has a pair that training never saw.
        frames: of the clips; the scenes last at least `SCENE_FRAMES`, as in training.

    Raises:
        WaltError: another split; a count below 1; a world with several subjects or gradients in a scene.
    """
    if theatre.split != "heldout":
        raise WaltError(f'theatre: expected the split "heldout", got "{theatre.split}"')
    if count < 1:
        raise WaltError(f"count must be at least 1, got {count}")
    _check_world(theatre.world)
    return [theatre.scene(seed + number, max(SCENE_FRAMES, frames)) for number in range(count)]


def asked(scene: Scene) -> Named:
    """What the caption of a scene names."""
    return Named(scene.background, scene.motion, scene.subjects[0])


def _check_world(world: World) -> None:
    if world.p_two or world.p_gradient:
        raise WaltError(
            "theatre: the judge knows scenes of one subject on one colour, but this world has p_two="
            f"{world.p_two} and p_gradient={world.p_gradient}"
        )


CLIP_SUFFIX = ".npz"
"""Of the files that hold a clip's frames as they are."""


def make_clips(
    scenes: Sequence[Scene],
    sampler: Sampler,
    work: Path,
    settings: Mapping[str, Any],
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """The clips' files in order; those that `work` lacks are sampled, `batch` at a time, and written at once.

    A file's name holds a hash of its prompt, its seed (the scene's) and the settings, so a rerun goes on where the
    last one stopped, and another model never meets this one's clips.

    Args:
        sampler: maps B prompts and B seeds to `(B, T, H, W, 3)`; a clip may not depend on the rest of its batch.
        settings: all that decides about a clip besides prompt and seed, as JSON can hold it.
        progress: called with the number of clips there are.

    Raises:
        WaltError: a batch below 1; a sampler that returns something else; a folder that cannot be written.
    """
    if batch < 1:
        raise WaltError(f"batch must be at least 1, got {batch}")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WaltError(f'work: cannot make the folder "{work}": {error.strerror or error}') from error
    paths = [work / f"{number:04d}-{_key(scene, settings)}{CLIP_SUFFIX}" for number, scene in enumerate(scenes)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    for start in range(0, len(missing), batch):
        if progress is not None:
            progress(len(paths) - len(missing) + start)
        numbers = missing[start : start + batch]
        chosen = [scenes[number] for number in numbers]
        clips = sampler([scene.caption for scene in chosen], [scene.seed for scene in chosen])
        if clips.dtype != np.uint8 or clips.ndim != 5 or len(clips) != len(chosen) or clips.shape[-1] != 3:
            raise WaltError(
                f"sampler: expected uint8 ({len(chosen)}, T, H, W, 3), got {clips.dtype} {tuple(clips.shape)}"
            )
        for number, clip in zip(numbers, clips, strict=True):
            with replacing(paths[number]) as temporary:
                np.savez_compressed(temporary, frames=clip, prompt=np.array(scenes[number].caption))
    if progress is not None:
        progress(len(paths))
    return paths


def _key(scene: Scene, settings: Mapping[str, Any]) -> str:
    text = json.dumps({"prompt": scene.caption, "seed": scene.seed, "settings": dict(settings)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_clip(path: Path) -> Pixels:
    """The clip that `make_clips` wrote, uint8 `(T, H, W, 3)`; a WaltError names a file that is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            frames: Pixels = file["frames"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WaltError(f'the clip "{path}" cannot be read ({error}): delete it and run again') from error
    return frames


def fingerprint(folder: Path) -> str:
    """A hash of every file in a model folder, names and bytes: the same weights, the same clips."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class Judge:
    """Names what a clip shows, among what a world knows.

    world: of one subject on one colour. subjects: names, in the order of `centroids` `(subjects, d)`, unit vectors
    about `middle` `(d,)`, the mean of all examples. Make one with `learn`.
    """

    world: World
    network: ImageNetwork = field(repr=False)
    subjects: tuple[str, ...]
    centroids: Floats = field(repr=False)
    middle: Floats = field(repr=False)

    @classmethod
    def learn(
        cls, theatre: EmojiTheatre, network: ImageNetwork, height: int = 128, width: int = 224, views: int = 2
    ) -> Judge:
        """The mean features of each subject as training shows it: on every background it may stand on, at the sizes
        and in the phases of many motions.

        Args:
            theatre: whose sprites and world to know; its split does not matter, held-out pairs are never drawn.
            network: maps crops `(N, 3, 160, 160)` in [-1, 1] to features `(N, d)`. The generator has not seen it.
            height, width: pixels of the clips to judge. views: frames of each example, each of another motion.

        Raises:
            WaltError: a world of several subjects or gradients; a network that returns something else.
        """
        world = theatre.world
        _check_world(world)
        means = []
        for subject in world.subjects:
            crops = _example_crops(theatre, subject, height, width, views)
            if not len(crops):
                raise WaltError(f"theatre: no pair of {subject!r} with a background and a motion is in training")
            means.append(_features(network, crops).mean(axis=0))
        middle = np.mean(means, axis=0)
        return cls(world, network, tuple(world.subjects), np.stack([_unit(mean - middle) for mean in means]), middle)

    def __call__(self, clip: Pixels) -> Named:
        """What a uint8 `(T, H, W, 3)` clip shows; motion and subject are "" where nothing stands out.

        Raises:
            WaltError: not such a clip.
        """
        track = find_subject(clip)
        background = nearest_colour(track.ground, {name: COLOURS[name] for name in self.world.backgrounds})
        motion = name_motion(track, self.world.motions) if len(clip) > 1 else "stays"
        crops = cut_out(clip, track, VIEWS)
        subject = ""
        if len(crops):
            towards = _unit(_features(self.network, crops).mean(axis=0) - self.middle)
            subject = self.subjects[int((self.centroids @ towards).argmax())]
        return Named(background, motion, subject)


def _example_crops(theatre: EmojiTheatre, subject: str, height: int, width: int, views: int) -> NDArray[np.float32]:
    backgrounds = [name for name in theatre.world.backgrounds if not held_out(subject, name)]
    motions = [name for name in theatre.world.motions if not held_out(subject, name)]
    crops = []
    for number in range(len(backgrounds) * views if motions else 0):
        background, motion = backgrounds[number // views], motions[number % len(motions)]
        scene = theatre.compose(subject, background, motion, seed=number, frames=SCENE_FRAMES)
        clip, _ = theatre.render(scene, height, width, start=5 * number % SCENE_FRAMES, frames=1)
        crops.append(cut_out(clip, find_subject(clip), 1))
    return np.concatenate(crops) if crops else np.zeros((0, 3, SIDE, SIDE), np.float32)


def cut_out(clip: Pixels, track: Track, views: int) -> NDArray[np.float32]:
    """The subject before a neutral gray, in up to `views` frames spread over those that show it.

    Returns:
        `(views, 3, SIDE, SIDE)` in [-1, 1], the subject's box with a margin; fewer where fewer frames show it.
    """
    seen = np.flatnonzero(track.seen)
    count = min(views, len(seen))
    chosen = seen[((np.arange(count) + 0.5) * len(seen) / max(1, count)).astype(int)]
    crops = np.zeros((count, SIDE, SIDE, 3), np.float32)
    for number, t in enumerate(chosen):
        height, width = clip.shape[1:3]
        matte = Image.fromarray(_filled(track.mask[t]).astype(np.uint8) * 255)
        matte = matte.resize((width, height), Image.Resampling.BILINEAR)
        left, top, right, bottom = (float(edge) * height for edge in track.box[t])
        half = 0.55 * max(right - left, bottom - top)
        box = (round((left + right) / 2 - half), round((top + bottom) / 2 - half))
        side = max(1, round(2 * half))
        canvas = Image.new("RGB", (side, side), (NEUTRAL, NEUTRAL, NEUTRAL))
        canvas.paste(Image.fromarray(clip[t]), (-box[0], -box[1]), matte)
        crops[number] = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    return np.ascontiguousarray(crops.transpose(0, 3, 1, 2))


def _filled(mask: Mask) -> Mask:
    """`(h, w)` with all pixels that have true ones above, below, left and right: parts of the ground's own colour."""
    sides = [np.maximum.accumulate(mask, axis=axis) for axis in (0, 1)]
    sides += [np.flip(np.maximum.accumulate(np.flip(mask, axis), axis=axis), axis) for axis in (0, 1)]
    filled: Mask = np.logical_and.reduce(sides)
    return filled


def _features(network: ImageNetwork, crops: NDArray[np.float32]) -> Floats:
    """Unit vectors `(N, d)`."""
    import torch

    with torch.no_grad():
        features = torch.cat([network(part) for part in torch.from_numpy(crops).split(16)])
    if features.ndim != 2 or len(features) != len(crops):
        raise WaltError(f"network: expected features ({len(crops)}, d), got {tuple(features.shape)}")
    return _unit(features.double().cpu().numpy())


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit


# ------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """How many clips show what was asked; `shuffled` is the expected share when prompts are dealt anew, none to its own
    clip, and `chance` that of a guess among the world's names."""

    right: int
    count: int
    shuffled: float
    chance: float

    @property
    def share(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson(self.right, self.count)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval (low, high) of a share of `right` in `count` (Wilson 1927), z standard errors to each side."""
    if not 0 <= right <= count or count < 1:
        raise WaltError(f"right must be from 0 to count, and count at least 1, got {right} and {count}")
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def score(shown: Sequence[Named], wanted: Sequence[Named], world: World) -> dict[str, Score]:
    """Per property, how often the two agree; a WaltError unless they are equally many and at least one."""
    if len(shown) != len(wanted) or not shown:
        raise WaltError(f"shown: expected as many as prompts and at least one, got {len(shown)} for {len(wanted)}")
    known = {"background": world.backgrounds, "motion": world.motions, "subject": world.subjects}
    scores = {}
    for name in PROPERTIES:
        ours, theirs = ([getattr(one, name) for one in many] for many in (shown, wanted))
        right, count = sum(a == b for a, b in zip(ours, theirs, strict=True)), len(ours)
        there, here = Counter(ours), Counter(theirs)
        pairs = sum(there[word] * here[word] for word in here) - right  # clips and the prompts of others that agree
        shuffled = pairs / (count * (count - 1)) if count > 1 else math.nan
        scores[name] = Score(right, count, shuffled, 1 / len(known[name]))
    return scores


@dataclass(frozen=True)
class Goal:
    """The share that a property has to reach."""

    share: float
    least: float

    @property
    def met(self) -> bool:
        return self.share >= self.least


def goals(made: Mapping[str, Score], real: Mapping[str, Score], subject_share: float = 0.75) -> dict[str, Goal]:
    """Background and motion have fixed goals; the subject's is `subject_share` of the score of real clips."""
    least = {**GOALS, "subject": subject_share * real["subject"].share}
    return {name: Goal(made[name].share, least[name]) for name in PROPERTIES}


def check_judge(real: Mapping[str, Score]) -> None:
    """A WaltError when the judge knows too few subjects of real clips: its word on made ones is worth nothing then."""
    if real["subject"].share < JUDGE_GOAL:
        raise WaltError(
            f"the judge names only {real['subject'].share:.1%} of the real clips' subjects right, {JUDGE_GOAL:.0%} are "
            "needed: mend it, or its image network, before judging a model"
        )


def table(made: Mapping[str, Score], real: Mapping[str, Score], aims: Mapping[str, Goal]) -> Table:
    """One line per property: made and real clips with their intervals, and the controls beside them."""
    result = Table("property", "generated", "95 %", "real", "95 %", "shuffled", "chance", "goal", "met")
    for name in PROPERTIES:
        cells = [f"{share:.1%}" for share in (made[name].share, real[name].share)]
        spans = ["{:.1%} to {:.1%}".format(*one[name].interval) for one in (made, real)]
        floors = (f"{made[name].shuffled:.1%}", f"{made[name].chance:.1%}")
        goal = aims[name]
        result.add_row(
            name, cells[0], spans[0], cells[1], spans[1], *floors, f"{goal.least:.1%}", "yes" if goal.met else "no"
        )
    return result


def write_report(
    path: Path,
    settings: Mapping[str, Any],
    scenes: Sequence[Scene],
    shown: Sequence[Named],
    real: Sequence[Named],
    world: World,
    subject_share: float,
) -> None:
    """Writes every verdict and score as JSON, in one stroke; a WaltError when the file cannot be written."""
    wanted = [asked(scene) for scene in scenes]
    scores = {"generated": score(shown, wanted, world), "real": score(real, wanted, world)}
    aims = goals(scores["generated"], scores["real"], subject_share)
    report = {
        "settings": dict(settings),
        "goals": {name: {"share": aim.share, "least": aim.least, "met": aim.met} for name, aim in aims.items()},
        "scores": {
            source: {
                name: {
                    "right": one.right,
                    "count": one.count,
                    "share": one.share,
                    "interval": one.interval,
                    "shuffled": None if math.isnan(one.shuffled) else one.shuffled,
                    "chance": one.chance,
                }
                for name, one in parts.items()
            }
            for source, parts in scores.items()
        },
        "clips": [
            {"prompt": scene.caption, "seed": scene.seed, "asked": vars(a), "generated": vars(b), "real": vars(c)}
            for scene, a, b, c in zip(scenes, wanted, shown, real, strict=True)
        ],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
