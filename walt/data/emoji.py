"""The emoji theatre: Microsoft's animated 3D Fluent emoji (MIT), composed by seed into captioned moving scenes.

    build_cache   packages -> a folder of sprites (once)
    World         what a theatre may show: subjects, backgrounds, motions and how often the rare things happen
    EmojiTheatre  seed -> Scene (what is on stage, as numbers and as a caption) -> frames at any size

A scene holds positions as fractions of the free room and sizes as fractions of the short side, so rendering it at
another resolution gives the same picture. Frame i is at time i / 8 s. Everything is a pure function of its arguments.
Letters: T frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from walt.data.fetch import fetch
from walt.errors import WaltError, suggest

FPS = 8
ART = 256  # pixels of the native art
ANIMATIONS = tuple(f"@lobehub/fluent-emoji-anim-{i}" for i in range(1, 5))
NAMES = "emojibase-data"
GROUPS = ("smileys", "people", "components", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
SKIN = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
X = TypeVar("X")
Split = Literal["train", "heldout", "all"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 20),
    "white": (248, 248, 248),
    "gray": (140, 142, 148),
    "red": (205, 50, 55),
    "orange": (245, 145, 50),
    "yellow": (250, 215, 85),
    "mint green": (160, 232, 188),
    "green": (60, 150, 85),
    "sky blue": (140, 200, 248),
    "navy blue": (28, 42, 100),
    "purple": (160, 120, 225),
    "pink": (252, 165, 200),
    "brown": (125, 85, 60),
}

# motion -> (one subject, several subjects) phrasings; the motion's own name comes first and is the commonest
MOTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "stays": (("stays still", "stay still"), ("stays in place", "stay in place"), ("does not move", "do not move")),
    "moves left to right": (
        ("moves left to right", "move left to right"),
        ("moves from left to right", "move from left to right"),
        ("moves to the right", "move to the right"),
    ),
    "moves right to left": (
        ("moves right to left", "move right to left"),
        ("moves from right to left", "move from right to left"),
        ("moves to the left", "move to the left"),
    ),
    "rises": (("rises", "rise"), ("flies up", "fly up"), ("moves up", "move up"), ("floats up", "float up")),
    "falls": (("falls", "fall"), ("falls down", "fall down"), ("moves down", "move down"), ("drops", "drop")),
    "comes closer": (
        ("comes closer", "come closer"),
        ("moves closer", "move closer"),
        ("approaches the camera", "approach the camera"),
    ),
    "goes away": (
        ("goes away", "go away"),
        ("moves away", "move away"),
        ("goes away from the camera", "go away from the camera"),
    ),
    "circles": (
        ("circles", "circle"),
        ("moves in a circle", "move in circles"),
        ("goes around in a circle", "go around in circles"),
    ),
    "bounces": (("bounces", "bounce"), ("bounces up and down", "bounce up and down"), ("hops", "hop")),
}
# what a clip shows when it is played backwards, where that has a name
OPPOSITES = {
    "moves left to right": "moves right to left",
    "moves right to left": "moves left to right",
    "rises": "falls",
    "falls": "rises",
    "comes closer": "goes away",
    "goes away": "comes closer",
}
SIZES = {"small": (0.24, 0.30), "large": (0.54, 0.64)}
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
# templates: {s} subject(s), {m} moving, {b} background with its article; the first is the commonest
CLIP_TEMPLATES = (
    "{s} {m} on {b}",
    "{s} {m} in front of {b}",
    "on {b}, {s} {m}",
    "a video of {s} on {b}: {p} {m}",
)
STILL_TEMPLATES = ("{s} on {b}", "{s} in front of {b}", "on {b}, {s}", "a picture of {s} on {b}")

HELD_OUT_SHARE = 0.1
HELD_OUT_SALT = "walt-1940"  # one of many tried: the embedded world loses at most two pairs of a kind per name
HELD_OUT_RULE = f"sha256('{HELD_OUT_SALT}|subject|other') as a fraction (first 8 bytes) < {HELD_OUT_SHARE}"


# --------------------------------------------------------------------------------------------------- the world


def _known(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in names:
        if name not in known:
            some = ", ".join(repr(k) for k in known[:12]) + (f", ... ({len(known)})" if len(known) > 12 else "")
            raise WaltError(f"{argument}: {name!r} is not known{suggest(name, known)}; known: {some}")


@dataclass(frozen=True)
class World:
    """What a theatre may show. An empty `subjects` means every subject of the cache.

    `p_two`, `p_gradient`, `p_size` are the shares of scenes with two subjects, with a gradient background and with a
    size word in the caption. `size`, `near` and `far` are ranges of a lone subject's longest side over the short side of
    the frame: as it is when no word says otherwise, and where "comes closer" ends and begins.

    `grid` = 0 stages freely. Otherwise the short side has that many cells: a subject stands at a whole cell, moves a
    whole number of half cells in four frames (one latent frame), and what no word names (the frame its loop starts
    with, where a circle begins and how wide it is, how high it bounces, its size within the range) is always the same.
    With cells as large as a denoiser's tokens a small network has far fewer pictures to learn.
    """

    subjects: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = tuple(COLOURS)
    motions: tuple[str, ...] = tuple(MOTIONS)
    p_two: float = 0.15
    p_gradient: float = 0.10
    p_size: float = 0.20
    size: tuple[float, float] = (0.36, 0.44)
    near: tuple[float, float] = (0.62, 0.74)
    far: tuple[float, float] = (0.20, 0.26)
    grid: int = 0

    def __post_init__(self) -> None:
        _known("backgrounds", self.backgrounds, COLOURS)
        _known("motions", self.motions, MOTIONS)
        if not self.backgrounds or not self.motions:
            raise WaltError("World: backgrounds and motions need at least one name each")
        for name in ("p_two", "p_gradient", "p_size"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise WaltError(f"World: {name} must be in 0..1, got {getattr(self, name)}")
        for name in ("size", "near", "far"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise WaltError(f"World: {name} must be (low, high) in 0..1, got {getattr(self, name)}")
        if self.grid < 0:
            raise WaltError(f"World: grid must be 0 (free) or a number of cells, got {self.grid}")

    def words(self) -> dict[str, list[str]]:
        """The known words by kind: subjects, backgrounds, motions (every phrasing), sizes, relations."""
        return {
            "subjects": list(self.subjects),
            "backgrounds": list(self.backgrounds),
            "motions": [one for motion in self.motions for one, _ in MOTIONS[motion]],
            "sizes": list(SIZES) if self.p_size else [],
            "relations": list(RELATIONS.values()) if self.p_two else [],
        }


EMBEDDED_WORLD = World(
    subjects=("rocket", "frog", "penguin", "red heart", "ghost", "whale", "sun", "hatching chick"),
    backgrounds=("purple", "sky blue", "mint green", "black", "white", "pink", "orange", "yellow"),
    p_two=0.0,
    p_gradient=0.0,
    p_size=0.0,
    size=(0.5625, 0.5625),
    near=(0.8, 0.8),
    far=(0.34, 0.34),
    grid=8,
)
"""Of the eight subjects that the embedded models know."""

LEFT_OUT = (
    "sparkling heart",  # as red heart: the judge's features (walt/evaluation/prompts.py) have a cosine above 0.6
    "spouting whale",  # as whale
    "black flag",  # as white flag
    "nauseated face",  # as crying face, like the next four
    "face with tongue",
    "weary face",
    "smiling face",
    "worried face",
    "bomb",  # bursts: its size falls to a fifth within a loop
    "party popper",  # its confetti hides what it does
    "hourglass done",  # no plain noun
)
"""Names that came up in the draw of `LARGE_WORLD` and were passed over."""

LARGE_WORLD = replace(
    EMBEDDED_WORLD,
    subjects=(
        "rocket", "frog", "penguin", "red heart", "ghost", "whale", "sun", "hatching chick", "heart on fire",
        "zombie", "otter", "tropical drink", "hut", "crystal ball", "telephone receiver", "triangular flag",
        "clown face", "tongue", "blowfish", "tumbler glass", "flying saucer", "teddy bear", "spiral calendar",
        "white flag", "weary cat", "health worker", "pig nose", "teacup without handle", "monorail",
        "Christmas tree", "camera with flash", "chequered flag", "crying face", "man guard", "shrimp",
        "birthday cake", "alarm clock", "pirate flag", "crying cat", "man with veil", "panda", "beer mug",
        "taxi", "skull", "bone", "octopus", "cocktail glass", "umbrella", "poodle", "locomotive", "owl", "fire",
        "horse face", "closed umbrella", "bison", "articulated lorry", "guide dog", "snowman without snow",
        "bug", "tractor", "monkey", "cloud with snow", "sloth", "passenger ship",
    ),
)  # fmt: skip
"""Of 64 subjects over the emoji groups, by `draw_subjects(index, 64, seed=0, keep=EMBEDDED_WORLD.subjects, skip=LEFT_OUT)`
of a full cache."""

WORLDS = {"embedded": EMBEDDED_WORLD, "large": LARGE_WORLD}
"""By the names that options and recipes give them."""


def check_sprites(folder: str | Path, name: str, argument: str) -> None:
    """A WaltError that names the `argument` and says how to build them, when a folder lacks sprites of a world of `WORLDS`."""
    index = read_index(Path(folder))
    missing = [subject for subject in WORLDS[name].subjects if subject not in index] if name in WORLDS else []
    if missing:
        raise WaltError(
            f"{argument}: {folder} lacks {len(missing)} subjects of the {name} world, such as {missing[0]!r}: build them with "
            f"`walt data emoji {folder} --world {name}`"
        )


def held_out(subject: str, other: str) -> bool:
    """Whether the pair (subject, motion) or (subject, background colour) is kept from training: about one in ten."""
    digest = hashlib.sha256(f"{HELD_OUT_SALT}|{subject}|{other}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def held_out_pairs(world: World = EMBEDDED_WORLD) -> dict[str, list[list[str]]]:
    """The held-out pairs of a world with named subjects: {"motions": [[subject, motion]], "backgrounds": [...]}."""
    kinds = {"motions": world.motions, "backgrounds": world.backgrounds}
    return {kind: [[s, o] for s in world.subjects for o in names if held_out(s, o)] for kind, names in kinds.items()}


MOST_OF = {"smileys": 8, "people": 6}
"""Faces and people look much alike: of these groups no more subjects."""
MOST_HELD_OUT = 2
LEAST_FRAMES = 8


def draw_subjects(
    index: Mapping[str, Sprite],
    count: int,
    seed: int = 0,
    keep: Sequence[str] = (),
    skip: Collection[str] = (),
    world: World = EMBEDDED_WORLD,
) -> tuple[str, ...]:
    """`count` subjects of a full cache: `keep` first, then one of each emoji group in turn.

    A group's names are put in an order by `seed` (by `random()` alone) and taken from its beginning, without those

    - of which more than two motions or more than two backgrounds of `world` are held out;
    - that do not read as one plain thing, see `is_plain`;
    - whose loop has less than eight frames, or that are not animated;
    - in `skip`: names that look too much like one that is already there.

    Which other names are left out changes nothing about a group's order. `MOST_OF` bounds what some groups give, `keep`
    included.

    Raises:
        WaltError: `keep` or `skip` has a name that the index lacks; there are less than `count` subjects.
    """
    _known("keep", keep, index)
    _known("skip", skip, index)
    rng = random.Random(f"walt-subjects-{seed}")
    queues: dict[str, list[str]] = {group: [] for group in GROUPS}
    for label, sprite in sorted(index.items(), key=lambda item: item[1].hexcode):
        if sprite.group in queues:
            queues[sprite.group].append(label)
    for group, names in queues.items():
        left = [names.pop(int(rng.random() * len(names))) for _ in range(len(names))]
        queues[group] = [n for n in left if n not in keep and n not in skip and _fit(index[n], world)]
    chosen = list(keep)
    given = Counter(index[name].group for name in keep)
    while len(chosen) < count:
        ready = [g for g, names in queues.items() if names and given[g] < MOST_OF.get(g, count)]
        if not ready:
            raise WaltError(f"count: only {len(chosen)} subjects of the index fit, {count} are asked for")
        for group in ready[: count - len(chosen)]:
            chosen.append(queues[group].pop(0))
            given[group] += 1
    return tuple(chosen)


def is_plain(label: str) -> bool:
    """Whether a caption reads well with it: one thing, named by up to three words of plain letters, doing nothing.

    So neither "one o\u2019clock" nor "man: bald" nor "ZZZ", "musical notes", "people hugging" or "person running".
    """
    words = label.split(" ")
    if not re.fullmatch(r"[A-Za-z]?[a-z]+( [a-z]+){0,2}", label) or words[0] in ("people", "men", "women"):
        return False
    plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us", "os"))
    return not plural and not any(word.endswith("ing") for word in words[1:])


def _fit(sprite: Sprite, world: World) -> bool:
    lost = [sum(held_out(sprite.label, other) for other in names) for names in (world.motions, world.backgrounds)]
    return sprite.frames >= LEAST_FRAMES and max(lost) <= MOST_HELD_OUT and is_plain(sprite.label)


# --------------------------------------------------------------------------------------------------- the scene


@dataclass(frozen=True)
class Actor:
    """One subject on stage, as numbers.

    cell: the part of the frame it lives in, (left, top, right, bottom) as fractions. size: its longest side over the
    frame's short side at the first and the last frame. path: kind of path and its numbers, in units of the free room
    (-1 and 1 touch the cell's edges). phase: which frame of its loop it starts with, as a fraction. grid: see `World`.
    """

    subject: str
    motion: str
    cell: tuple[float, float, float, float]
    size: tuple[float, float]
    path: tuple[float, ...]
    phase: float
    grid: int = 0


@dataclass(frozen=True)
class Scene:
    """A captioned scene. `background` is a colour ("purple") or a gradient ("pink to orange", top to bottom).

    `negative` is a caption in the same words that is false of this scene in one property (for retrieval scores).
    """

    subjects: tuple[str, ...]
    background: str
    motion: str
    size: str
    relation: str
    seed: int
    frames: int
    caption: str
    negative: str
    actors: tuple[Actor, ...] = field(repr=False)

    def pairs(self) -> list[tuple[str, str]]:
        """Every (subject, motion) and (subject, colour) this scene shows; an image shows no motion."""
        colours = self.background.split(" to ")
        moving = [(a.subject, a.motion) for a in self.actors] if self.frames > 1 else []
        return moving + [(s, c) for s in self.subjects for c in colours]

    def held_out(self) -> bool:
        """Whether any of its pairs is held out from training."""
        return any(held_out(subject, other) for subject, other in self.pairs())


def noun(label: str) -> str:
    """An emoji's label with its article: "a rocket", "an octopus", "a man with blond hair"."""
    name = label
    if ": " in label:
        head, tail = label.split(": ", 1)
        name = f"{head} of {tail}" if head == "flag" else f"{head} with {tail}"
    vowel = name[0].lower() in "aeiou" and not re.match(r"(?i)(uni|one|ufo|euro|use)", name)
    return f"{'an' if vowel else 'a'} {name}"


def describe(
    subjects: Sequence[str],
    motion: str,
    background: str,
    size: str = "",
    relation: str = "",
    still: bool = False,
    words: tuple[int, int] = (0, 0),
) -> str:
    """The caption of a scene; `words` picks the template and the motion's phrasing (both wrap around).

    With a relation the first subject moves and the second stays where it is, which the caption need not say.
    """
    named = [f"a {size} {noun(s).split(' ', 1)[1]}" if size else noun(s) for s in subjects]
    plural = len(subjects) > 1 and not relation
    who = " and ".join(named) if plural or len(named) == 1 else named[0]
    where = f" {RELATIONS[relation]} {named[1]}" if relation else ""
    hues = background.split(" to ")
    kind = "gradient " if len(hues) == 2 else ""
    article = "an" if background[0] in "aeiou" else "a"
    phrases = MOTIONS[motion]
    moving = phrases[words[1] % len(phrases)][plural] + where
    templates = STILL_TEMPLATES if still else CLIP_TEMPLATES
    return templates[words[0] % len(templates)].format(
        s=who + (where if still else ""), m=moving, b=f"{article} {background} {kind}background",
        p="they" if plural else "it",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the theatre


class EmojiTheatre:
    """Scenes by seed from a folder of sprites (`build_cache` makes one; tests/sprites is one).

    Args:
        source: the folder of sprites.
        subjects: names to show (labels such as "red heart"); default: the world's, or all of the folder.
        split: "train" never shows a held-out pair, "heldout" shows at least one in every scene, "all" ignores them.
        world: what may be shown. Default: everything.

    Raises:
        WaltError: no sprites there, unknown subject, unknown split.
    """

    def __init__(
        self,
        source: str | Path,
        subjects: Sequence[str] | None = None,
        split: Split = "train",
        world: World | None = None,
    ) -> None:
        if split not in ("train", "heldout", "all"):
            raise WaltError(f"split: {split!r} is not one of train, heldout, all")
        self.folder = Path(source)
        self.split = split
        self.index = read_index(self.folder)
        world = world or World()
        chosen = tuple(subjects) if subjects is not None else world.subjects or tuple(self.index)
        if not chosen:
            raise WaltError("subjects: at least one is needed")
        _known("subjects", chosen, self.index)
        self.subjects = chosen
        self.world = replace(world, subjects=chosen)
        self._sprites: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._firsts: dict[str, int] | None = None  # of each subject's pictures, see `picture`

    # -- scenes

    def scene(self, seed: int, frames: int = 29) -> Scene:
        """The scene of a seed: subject(s), background, motion, caption. `frames` = 1 gives an image.

        Its motion spans all of `frames`; drawing is repeated until the split allows the scene (WaltError when the
        world has nothing for the split).
        """
        rng = random.Random(f"walt-emoji-{seed}")
        for _ in range(10_000):
            scene = self._draw(rng, seed, frames)
            if self.split == "all" or scene.held_out() == (self.split == "heldout"):
                return scene
        raise WaltError(f"split: no scene of these subjects, backgrounds and motions is in the {self.split} split")

    def compose(
        self,
        subject: str | Sequence[str],
        background: str,
        motion: str = "stays",
        seed: int = 0,
        frames: int = 29,
        size: str = "",
        relation: str = "",
        words: tuple[int, int] = (0, 0),
    ) -> Scene:
        """A scene of chosen properties, whatever the split; `seed` gives what the caption does not say.

        Args:
            subject: one name or two. background: a colour, or "pink to orange" for a gradient. motion: a key of
            `MOTIONS`. size: "", "small" or "large". relation: "" or a key of `RELATIONS` (two subjects only).
            words: which phrasing of the caption, see `describe`.
        """
        names = (subject,) if isinstance(subject, str) else tuple(subject)
        _known("subject", names, self.index)
        _known("background", background.split(" to "), COLOURS)
        _known("motion", (motion,), MOTIONS)
        _known("size", (size,), ("", *SIZES))
        _known("relation", (relation,), ("", *RELATIONS))
        if len(names) not in (1, 2) or len(background.split(" to ")) > 2:
            raise WaltError("compose: one or two subjects and one or two background colours")
        if relation and len(names) != 2:
            raise WaltError(f"relation: {relation!r} needs two subjects, got {len(names)}")
        return self._stage(random.Random(f"walt-pose-{seed}"), seed, frames, names, background, motion, size, relation,
                           words)  # fmt: skip

    def captions(self, scene: Scene) -> tuple[str, ...]:
        """Every phrasing of the scene's caption, the plainest first."""
        still = scene.frames == 1
        ways = [(t, 0) for t in range(len(STILL_TEMPLATES))] if still else [
            (t, m) for t in range(len(CLIP_TEMPLATES)) for m in range(len(MOTIONS[scene.motion]))
        ]  # fmt: skip
        return tuple(
            describe(scene.subjects, scene.motion, scene.background, scene.size, scene.relation, still, way)
            for way in ways
        )

    def backwards(self, scene: Scene) -> str:
        """A caption of the scene played backwards; "" where that has no name, or would be of a held-out pair."""
        motion = OPPOSITES.get(scene.motion)
        if motion is None or len(scene.subjects) > 1 or scene.frames == 1 or held_out(scene.subjects[0], motion):
            return ""
        ways = self.captions(replace(scene, motion=motion))
        # The plainest as often as scenes' own captions have it.
        return ways[0 if scene.seed % 3 == 0 else scene.seed % len(ways)]

    def _draw(self, rng: random.Random, seed: int, frames: int) -> Scene:
        world = self.world
        two = rng.random() < world.p_two and len(self.subjects) > 1
        first = _pick(rng, self.subjects)
        names: tuple[str, ...] = (first,)
        relation = ""
        if two:
            names = (first, _pick(rng, [s for s in self.subjects if s != first]))
            relation = _pick(rng, ["", *RELATIONS])
        background = _pick(rng, world.backgrounds)
        if rng.random() < world.p_gradient and len(world.backgrounds) > 1:
            background += " to " + _pick(rng, [b for b in world.backgrounds if b != background])
        motion = _pick(rng, world.motions)
        size = _pick(rng, list(SIZES)) if rng.random() < world.p_size else ""
        if size and (two or (frames > 1 and motion in ("comes closer", "goes away"))):
            size = ""  # two subjects share the frame, and a size that changes has no name
        template = 0 if rng.random() < 0.5 else int(rng.random() * len(CLIP_TEMPLATES))
        return self._stage(rng, seed, frames, names, background, motion, size, relation,
                           (template, int(rng.random() * 12)))  # fmt: skip

    def _stage(
        self,
        rng: random.Random,
        seed: int,
        frames: int,
        names: tuple[str, ...],
        background: str,
        motion: str,
        size: str,
        relation: str,
        words: tuple[int, int],
    ) -> Scene:
        if frames < 1:
            raise WaltError(f"frames must be at least 1, got {frames}")
        still = frames == 1
        actors: list[Actor] = []
        cells = _cells(relation or _pick(rng, ["left of", "right of"]), len(names))
        for place, (name, cell) in enumerate(zip(names, cells, strict=True)):
            acts = "stays" if still or (place == 1 and relation) else motion
            low, high = SIZES.get(size, self.world.size if len(names) == 1 else (0.32, 0.38))
            first = last = self._between(rng, low, high)
            if acts in ("comes closer", "goes away"):
                near, far = (self.world.near, self.world.far) if len(names) == 1 else ((0.40, 0.46), (0.20, 0.26))
                first, last = (self._between(rng, *ends) for ends in (far, near))
                if acts == "goes away":
                    first, last = last, first
            path = _path(rng, acts, (frames - 1) / FPS)
            phase = rng.random() if not (still or self.world.grid) else 0.0
            actors.append(Actor(name, acts, cell, (first, last), path, phase, self.world.grid))
        other = _differs(rng, names, background, motion, self.subjects, self.world, still)
        return Scene(
            subjects=names,
            background=background,
            motion=motion,
            size=size,
            relation=relation,
            seed=seed,
            frames=frames,
            caption=describe(names, motion, background, size, relation, still, words),
            negative=describe(*other, size, relation, still, words),
            actors=tuple(actors),
        )

    def _between(self, rng: random.Random, low: float, high: float) -> float:
        return low + (high - low) * (0.5 if self.world.grid else rng.random())

    # -- pictures

    def box(self, scene: Scene, t: int, height: int, width: int) -> tuple[float, float, float, float]:
        """Where the first subject is in frame t of a height x width picture: (left, top, right, bottom) in pixels."""
        strip = self.sprite(scene.actors[0].subject)
        return _place(scene.actors[0], t, scene.frames, strip.shape[1], strip.shape[2], height, width)

    def boxes(
        self, scene: Scene, actor: int, times: Sequence[float], height: int, width: int
    ) -> list[tuple[float, float, float, float]]:
        """Where an actor is at some times, in frames of the scene, whole or not, as in `box`."""
        one = scene.actors[actor]
        h, w = self.sprite(one.subject).shape[1:3]
        return [_place(one, t, scene.frames, h, w, height, width) for t in times]

    def picture(self, scene: Scene, actor: int, t: int) -> int:
        """Which picture of the theatre's an actor shows in frame t: the frames of all subjects' loops, end to end."""
        if self._firsts is None:
            lengths = [self.index[subject].frames for subject in self.subjects]
            self._firsts = dict(zip(self.subjects, itertools.accumulate([0, *lengths]), strict=False))
        one = scene.actors[actor]
        count = self.index[one.subject].frames
        return self._firsts[one.subject] + (int(one.phase * count) + t) % count

    def render(
        self,
        scene: Scene,
        height: int,
        width: int,
        start: int = 0,
        frames: int | None = 17,
        crop: tuple[int, int, int, int] | None = None,
        rate: int = 1,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Frames `start` .. `start + frames` of a scene as (RGB uint8 (T, H, W, 3), subject alpha uint8 (T, H, W)).

        `frames` = None renders to the scene's end. `crop` = (left, top, right, bottom) draws just that part of the
        height x width picture. With `rate` frames follow each other `rate` times as fast as 8 per second, and are counted
        so: frame `rate` x i is frame i of the scene; sprites still change 8 times per second. Frames outside the scene, or
        a side under 32 pixels: WaltError.
        A sprite file that is damaged is named in a WaltError.
        """
        left, top, right, bottom, stop = check_window(scene, height, width, start, frames, crop, rate)
        video = np.empty((stop - start, bottom - top, right - left, 3), np.uint8)
        video[:] = backdrop(scene.background, height)[None, top:bottom, None, :]
        alpha = np.zeros(video.shape[:3], np.uint8)
        for actor in scene.actors:
            strip = self.sprite(actor.subject)
            for t in range(start, stop):
                place = (strip.shape[1], strip.shape[2], height, width)
                x0, y0, x1, y1 = _place(actor, t / rate, scene.frames, *place)
                box = (x0 - left, y0 - top, x1 - left, y1 - top)
                turn = (int(actor.phase * len(strip)) + t // rate) % len(strip)
                _paste(strip[turn], box, video[t - start], alpha[t - start])
        return video, alpha

    def sprite(self, subject: str) -> NDArray[np.uint8]:
        """One loop of a subject at 8 frames per second, straight RGBA uint8 (T, h, w, 4), cropped to what it fills."""
        if subject not in self._sprites:
            _known("subject", (subject,), self.index)
            self._sprites[subject] = read_sprite(self.folder, self.index[subject])
            if len(self._sprites) > 128:
                self._sprites.popitem(last=False)
        self._sprites.move_to_end(subject)
        return self._sprites[subject]


def check_window(
    scene: Scene,
    height: int,
    width: int,
    start: int,
    frames: int | None,
    crop: tuple[int, int, int, int] | None,
    rate: int,
) -> tuple[int, int, int, int, int]:
    """Left, top, right and bottom of what `EmojiTheatre.render` draws, and the frame before which it ends; a WaltError for
    what is not in the scene."""
    length = (scene.frames - 1) * rate + 1
    stop = length if frames is None else start + frames
    if not 0 <= start < stop <= length:
        raise WaltError(f"frames {start}..{stop} are not in the scene, which has {length}")
    if min(height, width) < 32:
        raise WaltError(f"height, width must be at least 32 pixels, got {height} x {width}")
    left, top, right, bottom = crop or (0, 0, width, height)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise WaltError(f"crop {crop} is not inside the {height} x {width} picture")
    return left, top, right, bottom, stop


def backdrop(background: str, height: int) -> NDArray[np.uint8]:
    """Colour per row, uint8 (H, 3): one flat colour, or "a to b" from top to bottom."""
    hues = np.array([COLOURS[name] for name in background.split(" to ")], np.float64)
    mix = ((np.arange(height) + 0.5) / height)[:, None]
    return np.rint(hues[0] * (1 - mix) + hues[-1] * mix).astype(np.uint8)


def _cells(relation: str, count: int) -> list[tuple[float, float, float, float]]:
    """The part of the frame of each subject; the relation says where the first one is."""
    if count == 1:
        return [(0.0, 0.0, 1.0, 1.0)]
    halves = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    if relation in ("above", "below"):
        halves = [(0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)]
    return halves if relation in ("left of", "above") else halves[::-1]


def _path(rng: random.Random, motion: str, seconds: float) -> tuple[float, ...]:
    """The numbers of a path: (x0, y0, x1, y1), or (x, y, radius, angle, turns) or (x, drift, height, bounces)."""
    x, y = (rng.uniform(-0.75, 0.75) for _ in range(2))
    begin, end = -rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0)
    match motion:
        case "moves left to right":
            return begin, y, end, y
        case "moves right to left":
            return end, y, begin, y
        case "rises":
            return x, end, x, begin
        case "falls":
            return x, begin, x, end
        case "circles":
            turns = max(1.0, seconds / 2.5) * (1 if rng.random() < 0.5 else -1)
            return x, y, rng.uniform(0.75, 1.0), rng.uniform(0, 2 * math.pi), turns
        case "bounces":
            return x, rng.uniform(-0.2, 0.2), rng.uniform(0.7, 1.0), float(max(2, round(seconds / 1.1)))
        case "comes closer" | "goes away":
            return x * 0.5, y * 0.5, x * 0.5, y * 0.5
    return x, y, x, y


def _place(
    actor: Actor, t: float, frames: int, h: int, w: int, height: int, width: int
) -> tuple[float, float, float, float]:
    """Where an h x w sprite is in frame t of a scene's: (left, top, right, bottom) in pixels, inside its cell."""
    u = t / max(1, frames - 1)
    left, top = actor.cell[0] * width, actor.cell[1] * height
    room_w, room_h = actor.cell[2] * width - left, actor.cell[3] * height - top
    first, last = actor.size
    side = first * (last / first) ** u * min(height, width)  # geometric: steady approach
    scale = min(side / max(h, w), room_w / w, room_h / h)
    half_w, half_h = (room_w - w * scale) / 2, (room_h - h * scale) / 2  # free room on each side of the middle
    p = actor.path
    cell = min(height, width) / actor.grid if actor.grid else 0.0
    match actor.motion:
        case "circles":
            radius = (0.875 if cell else p[2]) * min(half_w, half_h)
            angle = (0.0 if cell else p[3]) + 2 * math.pi * p[4] * u
            x = _snap(p[0] * (half_w - radius), half_w - radius, cell) + radius * math.cos(angle)
            y = _snap(p[1] * (half_h - radius), half_h - radius, cell) + radius * math.sin(angle)
        case "bounces":
            beat = (u * p[3]) % 1.0
            drift, rise = (0.0, 0.85) if cell else p[1:3]
            x = _snap((p[0] + drift * u) * half_w, half_w, cell)
            y = half_h * (0.95 - 1.9 * rise * 4 * beat * (1 - beat))  # parabolas from the floor
        case "comes closer" | "goes away":
            # Snapped where it is largest: there the free room is smallest.
            scale_most = min(max(first, last) * min(height, width) / max(h, w), room_w / w, room_h / h)
            most_w, most_h = (room_w - w * scale_most) / 2, (room_h - h * scale_most) / 2
            x = _snap(p[0] * most_w, most_w, cell) if cell else p[0] * half_w
            y = _snap(p[1] * most_h, most_h, cell) if cell else p[1] * half_h
        case _:
            x = _along(p[0], p[2], u, (frames - 1) / 4, half_w, cell)
            y = _along(p[1], p[3], u, (frames - 1) / 4, half_h, cell)
    x0, y0 = left + half_w + x, top + half_h + y
    return x0, y0, x0 + w * scale, y0 + h * scale


def _snap(offset: float, half: float, cell: float) -> float:
    """An offset from the middle of the free room (`half` on each side), so that the sprite begins at a whole cell."""
    if not cell:
        return offset
    return min(max(round((half + offset) / cell), 0), math.floor(2 * half / cell + 1e-6)) * cell - half


def _along(begin: float, end: float, u: float, steps: float, half: float, cell: float) -> float:
    """The offset at fraction u of the way from `begin` to `end` (in halves of the free room), in `steps` of 4 frames."""
    if not cell:
        return (begin + (end - begin) * u) * half
    if begin == end:
        return _snap(begin * half, half, cell)
    way, unit = (end - begin) * half, cell / 2 * steps
    most = math.floor(2 * half / unit + 1e-6)
    if most:
        way = math.copysign(min(max(round(abs(way) / unit), 1), most) * unit, way)
    start = _snap(begin * half, half, cell / 2)
    # The way must end inside too.
    short = max(0.0, abs(start + way) - half)
    start -= math.copysign(math.ceil(short / (cell / 2) - 1e-6) * cell / 2 if most else short, way)
    return start + way * u


def _paste(
    sprite: NDArray[np.uint8], box: tuple[float, ...], frame: NDArray[np.uint8], alpha: NDArray[np.uint8]
) -> None:
    """Draws straight RGBA (h, w, 4) into the pixel box (fractions allowed) of a frame, in place."""
    h, w, _ = sprite.shape
    height, width = alpha.shape
    scale = (box[2] - box[0]) / w
    # whole output pixels around the box, one more for the filter's skirt
    x0, y0 = max(0, math.floor(box[0]) - 1), max(0, math.floor(box[1]) - 1)
    x1, y1 = min(width, math.ceil(box[2]) + 1), min(height, math.ceil(box[3]) + 1)
    if x0 >= x1 or y0 >= y1:
        return  # wholly outside
    pad = math.ceil(3 / scale)  # source pixels that those may reach beyond the sprite
    canvas = np.zeros((h + 2 * pad, w + 2 * pad, 4), np.uint8)
    canvas[pad : pad + h, pad : pad + w] = sprite
    reach = (pad + (x0 - box[0]) / scale, pad + (y0 - box[1]) / scale,
             pad + (x1 - box[0]) / scale, pad + (y1 - box[1]) / scale)  # fmt: skip
    # "RGBa" is premultiplied: transparent pixels bleed no colour; Pillow's bicubic widens when it shrinks (no aliasing)
    image = Image.fromarray(canvas).convert("RGBa")
    small = np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=reach)).astype(np.uint16)
    cover = small[..., 3:]
    under = frame[y0:y1, x0:x1].astype(np.uint16) * (255 - cover)
    # the filter's overshoot may leave more colour than cover; the cover decides, so that sum is at most 255
    frame[y0:y1, x0:x1] = np.minimum(small[..., :3], cover) + (under + 127) // 255
    below = alpha[y0:y1, x0:x1].astype(np.uint16) * (255 - cover[..., 0])
    alpha[y0:y1, x0:x1] = np.minimum(cover[..., 0] + (below + 127) // 255, 255)


def _differs(
    rng: random.Random,
    names: tuple[str, ...],
    background: str,
    motion: str,
    subjects: Sequence[str],
    world: World,
    still: bool,
) -> tuple[tuple[str, ...], str, str]:
    """(subjects, motion, background) with one of them changed to another of the world, when it has another."""
    options: list[tuple[tuple[str, ...], str, str]] = []
    if others := [s for s in subjects if s not in names]:
        options.append(((_pick(rng, others), *names[1:]), motion, background))
    if others := [b for b in world.backgrounds if b not in background.split(" to ")]:
        options.append((names, motion, _pick(rng, others)))
    if not still and (others := [m for m in world.motions if m != motion]):
        options.append((names, _pick(rng, others), background))
    return _pick(rng, options) if options else (names, motion, background)


def _pick(rng: random.Random, items: Sequence[X]) -> X:
    # by random() alone: the stream of choice() is not promised across Python versions
    return items[int(rng.random() * len(items))]


# --------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Sprite:
    """A line of a cache's index. `box`: the crop (left, top, right, bottom) in the art x art pixel canvas."""

    slug: str
    label: str
    hexcode: str
    tags: tuple[str, ...]
    group: str
    frames: int
    art: int
    box: tuple[int, int, int, int]
    sha256: str


def read_index(folder: str | Path) -> dict[str, Sprite]:
    """The sprites of a cache folder by label, in the order of their hexcode."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise WaltError(f"no sprites in {folder} (index.json is missing): build them with `walt data emoji {folder}`")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["sprites"]
        sprites = [Sprite(**{**row, "tags": tuple(row["tags"]), "box": tuple(row["box"])}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise WaltError(f"{path} is damaged ({error}): delete it and build the sprites again") from error
    return {sprite.label: sprite for sprite in sorted(sprites, key=lambda s: s.hexcode)}


def read_sprite(folder: str | Path, sprite: Sprite) -> NDArray[np.uint8]:
    """One loop of a sprite, straight RGBA uint8 (T, h, w, 4). WaltError names a file that is missing or damaged."""
    path = Path(folder) / f"{sprite.slug}.webp"
    help_ = f"delete it and run `walt data emoji {folder}` again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WaltError(f"sprite {path} cannot be read ({error.strerror}): {help_}") from error
    if hashlib.sha256(data).hexdigest() != sprite.sha256:
        raise WaltError(f"sprite {path} is damaged (its checksum is not the index's): {help_}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            strip: NDArray[np.uint8] = np.asarray(image.convert("RGBA"))
        width, height = sprite.box[2] - sprite.box[0], sprite.box[3] - sprite.box[1]
        return strip.reshape(sprite.frames, height, width, 4)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise WaltError(f"sprite {path} is damaged ({error}): {help_}") from error


def build_cache(
    folder: str | Path,
    source: str | Path | None = None,
    subjects: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    art: int = ART,
    frames: int | None = None,
    stills: bool = False,
) -> dict[str, Sprite]:
    """Decodes the animations of the Fluent packages once into a folder of sprites; returns its index.

    Each sprite is one loop at 8 frames per second as a vertical film strip, lossless WebP `<slug>.webp`, cropped to
    the union of its frames' alpha; `index.json` has a `Sprite` per line. Files that are already there and whole are
    kept, so an interrupted build continues. Skin-tone variants are left out.

    Args:
        folder: where the sprites go. source: a folder with the package files; default: fetched into `folder`/packages.
        subjects: labels; default: every animated concept (about 734). progress: called with (done, total, label).
        art: pixels of the canvas the art is shrunk to. frames: frames per loop; default: what 8 per second gives.
        stills: also the concepts that the packages hold as one picture.

    Raises:
        WaltError: a package or subject is missing; the folder cannot be written.
    """
    folder = Path(folder)
    if not 16 <= art <= ART:
        raise WaltError(f"art must be 16..{ART} pixels, got {art}")
    packages = folder / "packages"
    labels = _labels(fetch(NAMES, packages, source))
    by_name = {row["label"]: code for code, row in labels.items()}
    if subjects is not None:
        _known("subjects", subjects, by_name)
    wanted = set(labels) if subjects is None else {by_name[name] for name in subjects}
    done: dict[str, Sprite] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = {s.hexcode: s for s in read_index(folder).values()} if (folder / "index.json").is_file() else {}
        archives = [fetch(name, packages, source) for name in ANIMATIONS]
        todo = _members(archives, wanted)
        count = 0
        for archive in archives:
            here = {member: code for code, (where, member) in todo.items() if where == archive}
            for member, data in _read(archive, here):
                code = here[member]
                row = labels[code]
                count += 1
                sprite = old.get(code)
                if (
                    sprite is None
                    or sprite.art != art
                    or frames not in (None, sprite.frames)
                    or not _whole(folder, sprite)
                ):
                    sprite = _decode(folder, data, code, row, art, frames, stills or subjects is not None)
                if sprite is not None:
                    done[code] = sprite
                if count % 16 == 0:
                    _write_index(folder, {**old, **done})
                if progress is not None:
                    progress(count, len(todo), row["label"])
        _write_index(folder, {**old, **done})
        if subjects is not None and (missing := [labels[code]["label"] for code in sorted(wanted - set(done))]):
            raise WaltError(f"subjects: the packages have no picture of {', '.join(missing)}")
    except OSError as error:
        raise WaltError(f"cannot write the sprites to {folder}: {error.strerror or error}") from error
    return read_index(folder)


def slugify(label: str) -> str:
    """A label as a file name: "red heart" -> "red-heart"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("#", "hash").replace("*", "star")).strip("-") or "emoji"


def _code(name: str) -> str:
    """A hexcode without variation selectors, which packages and name tables write differently."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _labels(package: Path) -> dict[str, dict[str, Any]]:
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/en/data.json")
        if file is None:
            raise WaltError(f"{package} has no package/en/data.json")
        rows = json.load(file)
    return {_code(row["hexcode"]): row for row in rows if not SKIN & set(row["hexcode"].lower().split("-"))}


def _members(archives: Sequence[Path], wanted: set[str]) -> dict[str, tuple[Path, str]]:
    """hexcode -> (archive, member) of every wanted picture; a code that two archives hold counts once."""
    found: dict[str, tuple[Path, str]] = {}
    for archive in archives:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name)
                code = _code(name.stem)
                if name.suffix == ".webp" and code in wanted and code not in found:
                    found[code] = (archive, member.name)
        if len(found) == len(wanted):
            break
    return found


def _read(archive: Path, members: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    left = len(members)
    if left:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in members and (file := tar.extractfile(member)) is not None:
                    yield member.name, file.read()
                    left -= 1
                    if left == 0:
                        return


def _decode(
    folder: Path, data: bytes, code: str, row: dict[str, Any], art: int, frames: int | None, stills: bool
) -> Sprite | None:
    """One packaged picture to one film strip in the folder; None for an empty one, or a still that is not wanted."""
    pictures: list[Image.Image] = []
    seconds = 0.0
    with Image.open(io.BytesIO(data)) as image:
        count = getattr(image, "n_frames", 1)
        if count == 1 and not stills:
            return None
        for at in range(count):
            image.seek(at)
            pictures.append(image.convert("RGBA"))
            seconds += image.info.get("duration", 0) / 1000  # known only once the frame is decoded
    number = 1 if count == 1 else frames or max(1, round(seconds * FPS))
    # evenly through the loop, so that the last frame leads back to the first
    kept = [pictures[int(i * count / number)].convert("RGBa") for i in range(number)]
    kept = [p.resize((art, art), Image.Resampling.BICUBIC) if p.size != (art, art) else p for p in kept]
    strip = np.stack([np.asarray(p.convert("RGBA")) for p in kept])
    cover = strip[..., 3].max(axis=0) > 8
    ys, xs = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    if not len(ys):
        return None
    box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
    strip = np.where(strip[..., 3:] > 0, strip, 0).astype(np.uint8)[:, box[1] : box[3], box[0] : box[2]]
    buffer = io.BytesIO()
    Image.fromarray(strip.reshape(-1, strip.shape[2], 4)).save(
        buffer, "WEBP", lossless=True, quality=40, method=2, exact=True
    )
    slug = slugify(row["label"])
    _write(folder / f"{slug}.webp", buffer.getvalue())
    return Sprite(
        slug=slug,
        label=row["label"],
        hexcode=code,
        tags=tuple(row.get("tags", ())),
        group=GROUPS[row["group"]] if "group" in row else "",
        frames=number,
        art=art,
        box=box,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )


def _whole(folder: Path, sprite: Sprite) -> bool:
    path = folder / f"{sprite.slug}.webp"
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sprite.sha256


def _write_index(folder: Path, sprites: dict[str, Sprite]) -> None:
    rows = [json.dumps(asdict(sprites[code]), ensure_ascii=False) for code in sorted(sprites)]
    text = f'{{"fps": {FPS}, "sprites": [\n' + ",\n".join(rows) + "\n]}\n"
    _write(folder / "index.json", text.encode())


def _write(path: Path, data: bytes) -> None:
    room = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        room.write_bytes(data)
        os.replace(room, path)
    finally:
        room.unlink(missing_ok=True)
