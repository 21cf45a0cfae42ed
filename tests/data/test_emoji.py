"""The emoji theatre: scenes are pure functions of their seed, stay in the frame, and look the same at any size."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import walt.data
from walt.cli import main
from walt.data.emoji import (
    ANIMATIONS,
    COLOURS,
    EMBEDDED_WORLD,
    GROUPS,
    LARGE_WORLD,
    LEFT_OUT,
    MOST_OF,
    MOTIONS,
    NAMES,
    OPPOSITES,
    EmojiTheatre,
    Sprite,
    World,
    _place,
    build_cache,
    describe,
    draw_subjects,
    held_out,
    held_out_pairs,
    is_plain,
    noun,
    read_index,
)
from walt.data.fetch import PINS
from walt.data.scenes import Scenes
from walt.data.scenes import world as world_of
from walt.errors import WaltError
from walt.training.job import DataJob, Shape

SPRITES = Path(__file__).parents[1] / "sprites"
SMALL = ("rocket", "frog", "sun")
WORLD = replace(EMBEDDED_WORLD, subjects=SMALL)
RICH = World(subjects=SMALL, p_two=0.5, p_gradient=0.5, p_size=0.5)


@pytest.fixture(scope="module")
def theatre() -> EmojiTheatre:
    return EmojiTheatre(SPRITES, split="all", world=WORLD)


@pytest.fixture
def disc() -> EmojiTheatre:
    """A theatre whose rocket is one white disc that never changes: what moves is the path alone."""
    stage = EmojiTheatre(SPRITES, split="all", world=WORLD)
    y, x = np.mgrid[:96, :96] - 47.5
    cover = np.clip(47.0 - np.hypot(x, y) + 0.5, 0, 1)
    white = np.where(cover > 0, 255, 0)  # transparent pixels are black, as in the packages: they must not bleed
    art = np.stack([white, white, white, np.rint(cover * 255)], -1).astype(np.uint8)
    stage._sprites["rocket"] = art[None]
    return stage


def centres(alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(T, 2): y and x of the middle of the cover of each frame."""
    cover = alpha.astype(np.float64)
    total = cover.sum((1, 2))
    y = (cover.sum(2) * (np.arange(cover.shape[1]) + 0.5)).sum(1) / total
    x = (cover.sum(1) * (np.arange(cover.shape[2]) + 0.5)).sum(1) / total
    return np.stack([y, x], 1)


# ----------------------------------------------------------------------------------------------------- scenes


def test_a_scene_is_a_function_of_its_seed() -> None:
    one, two = (EmojiTheatre(SPRITES, world=RICH) for _ in range(2))
    scenes = [one.scene(seed) for seed in range(60)]
    assert [two.scene(seed) for seed in reversed(range(60))] == scenes[::-1]
    assert len({s.actors for s in scenes}) == 60


def test_the_stream_is_pinned(theatre: EmojiTheatre) -> None:
    # a tripwire: training and evaluation of a released model rest on these draws
    assert [theatre.scene(seed).caption for seed in range(3)] == [
        "a sun moves in a circle on a mint green background",
        "a frog bounces in front of a purple background",
        "a rocket goes away from the camera on a pink background",
    ]


def test_a_window_is_part_of_the_whole(theatre: EmojiTheatre) -> None:
    scene = theatre.scene(5)
    video, alpha = theatre.render(scene, 64, 112, frames=None)
    assert video.shape == (29, 64, 112, 3)
    assert video.dtype == alpha.dtype == np.uint8
    part, cover = theatre.render(scene, 64, 112, start=12)
    assert np.array_equal(part, video[12:])
    assert np.array_equal(cover, alpha[12:])


def test_captions_name_what_is_seen() -> None:
    stage = EmojiTheatre(SPRITES, split="all", world=RICH)
    for seed in range(200):
        scene = stage.scene(seed, frames=1 if seed % 4 == 0 else 29)
        assert scene.caption in stage.captions(scene)
        assert scene.negative != scene.caption
        for word in (*scene.subjects, scene.background, scene.size):
            assert word in scene.caption
        phrases = [p for pair in MOTIONS[scene.motion] for p in pair]
        assert any(p in scene.caption for p in phrases) == (scene.frames > 1)
        assert ("gradient" in scene.caption) == (" to " in scene.background)


def test_a_scene_backwards_has_the_opposite_motions_caption() -> None:
    stage = EmojiTheatre(SPRITES, split="train", world=RICH)
    named = 0
    for seed in range(300):
        scene = stage.scene(seed)
        caption, opposite = stage.backwards(scene), OPPOSITES.get(scene.motion, "")
        if not opposite or len(scene.subjects) > 1 or held_out(scene.subjects[0], opposite):
            assert caption == ""
            continue
        named += 1
        assert caption in stage.captions(replace(scene, motion=opposite))
    assert named > 50
    assert all(OPPOSITES[OPPOSITES[motion]] == motion for motion in OPPOSITES)
    assert stage.backwards(stage.scene(0, frames=1)) == ""


def test_captions_read_as_english() -> None:
    two = ["rocket", "octopus"]
    assert describe(["rocket"], "rises", "purple", words=(0, 1)) == "a rocket flies up on a purple background"
    assert describe(two, "falls", "orange") == "a rocket and an octopus fall on an orange background"
    assert describe(two, "circles", "pink to orange", relation="left of", words=(1, 0)) == (
        "a rocket circles to the left of an octopus in front of a pink to orange gradient background"
    )
    assert describe(["octopus"], "stays", "black", "large", still=True) == "a large octopus on a black background"
    assert describe(two, "stays", "white", relation="above", still=True, words=(2, 0)) == (
        "on a white background, a rocket above an octopus"
    )
    assert noun("man: blond hair") == "a man with blond hair"
    assert noun("unicorn") == "a unicorn"


def test_shares_of_the_rare_things() -> None:
    stage = EmojiTheatre(SPRITES, split="all", world=World(subjects=SMALL))
    scenes = [stage.scene(seed) for seed in range(2000)]
    two = sum(len(s.subjects) == 2 for s in scenes) / 2000
    gradient = sum(" to " in s.background for s in scenes) / 2000
    assert two == pytest.approx(0.15, abs=0.03)
    assert gradient == pytest.approx(0.10, abs=0.03)
    counts = Counter(s.motion for s in scenes)
    assert set(counts) == set(MOTIONS)
    assert min(counts.values()) > 2000 / len(MOTIONS) * 0.75


def test_the_embedded_world_is_plain(theatre: EmojiTheatre) -> None:
    for seed in range(100):
        scene = theatre.scene(seed)
        assert (len(scene.subjects), scene.size, scene.relation) == (1, "", "")
        assert scene.background in EMBEDDED_WORLD.backgrounds
    words = theatre.world.words()
    assert words["subjects"] == list(SMALL)
    assert "flies up" in words["motions"]
    assert words["sizes"] == words["relations"] == []


# --------------------------------------------------------------------------------------------------- subjects


def test_the_subjects_of_the_large_world() -> None:
    names = LARGE_WORLD.subjects
    assert len(names) == len(set(names)) == 64
    assert names[:8] == EMBEDDED_WORLD.subjects
    assert replace(LARGE_WORLD, subjects=names[:8]) == EMBEDDED_WORLD
    assert all(map(is_plain, names)) and not set(names) & set(LEFT_OUT)
    for kind, others in (("motions", LARGE_WORLD.motions), ("backgrounds", LARGE_WORLD.backgrounds)):
        pairs = held_out_pairs(LARGE_WORLD)[kind]
        assert max(Counter(subject for subject, _ in pairs).values()) <= 2
        share = Counter(other for _, other in pairs)
        assert all(0 < share[other] < len(names) / 4 for other in others)


@pytest.mark.parametrize(("flags", "count"), [([], 64), (["--world", "embedded"], 8), (["--all"], None)])
def test_the_command_builds_the_world_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], count: int | None
) -> None:
    built: list[Any] = []
    monkeypatch.setattr("walt.data.emoji.build_cache", lambda folder, **told: built.append(told["subjects"]))
    assert main(["data", "emoji", str(tmp_path), *flags]) == 0
    assert [None if subjects is None else len(subjects) for subjects in built] == [count]


def test_a_recipe_names_its_world() -> None:
    assert world_of(DataJob()) == EMBEDDED_WORLD
    assert world_of(DataJob(world="large")) == LARGE_WORLD
    assert world_of(DataJob(world="full")) == World()


@pytest.mark.parametrize(
    "label", ["rocket", "red heart", "octopus", "Christmas tree", "grinning cat", "cloud with rain"]
)
def test_plain_names(label: str) -> None:
    assert is_plain(label)


@pytest.mark.parametrize(
    "label",
    ["one o\u2019clock", "one-thirty", "man: bald", "waving hand: dark skin tone", "ZZZ", "OK hand", "musical notes",
     "people hugging", "person running", "face with open mouth", "T-Rex", "keycap: 1"],
)  # fmt: skip
def test_names_that_read_badly(label: str) -> None:
    assert not is_plain(label)


def named(count: int, **changes: Any) -> dict[str, Sprite]:
    """An index of `count` names in each of five groups, "<group> a", "<group> b", ...; and "sun" and "frog"."""
    one = Sprite("", "", "", (), "", 24, 96, (0, 0, 96, 96), "")
    groups = ("smileys", "people", "animals", "food", "flags")
    labels = {f"{group[:-1]} {chr(97 + i) * 2}": group for group in groups for i in range(count)}
    rows = {**labels, "sun": "food", "frog": "animals"}
    return {
        label: replace(one, label=label, hexcode=f"{i:04x}", group=group, **changes)
        for i, (label, group) in enumerate(rows.items())
    }


def test_subjects_are_drawn_by_seed_from_every_group() -> None:
    index = named(20)
    drawn = draw_subjects(index, 40, seed=3, keep=("sun", "frog"))
    assert drawn[:2] == ("sun", "frog") and len(set(drawn)) == 40
    assert drawn == draw_subjects(dict(reversed(index.items())), 40, seed=3, keep=("sun", "frog"))
    assert drawn[:20] == draw_subjects(index, 20, seed=3, keep=("sun", "frog"))
    assert drawn != draw_subjects(index, 40, seed=4, keep=("sun", "frog"))
    assert [index[name].group for name in drawn[2:12]] == sorted(
        ("smileys", "people", "animals", "food", "flags"), key=GROUPS.index
    ) * 2  # fmt: skip
    counts = Counter(index[name].group for name in drawn)
    assert {group: counts[group] for group in MOST_OF} == MOST_OF
    for kind in (EMBEDDED_WORLD.motions, EMBEDDED_WORLD.backgrounds):
        assert all(sum(held_out(name, other) for other in kind) <= 2 for name in drawn)


def test_a_skipped_name_leaves_the_others_in_their_order() -> None:
    index = named(20)
    drawn = draw_subjects(index, 30)
    left = draw_subjects(index, 30, skip=drawn[3:4])
    group = index[drawn[3]].group
    assert drawn[3] not in left
    for other in GROUPS:
        before, after = ([name for name in names if index[name].group == other] for names in (drawn, left))
        if other == group:
            before.remove(drawn[3])
        assert before == after[: len(before)]


def test_subjects_that_are_never_drawn() -> None:
    index = named(6)
    held = {name for name in index if sum(held_out(name, motion) for motion in MOTIONS) > 2}
    short = {**index, "animal aa": replace(index["animal aa"], frames=7)}
    odd = {**short, "twelve o\u2019clock": replace(index["sun"], label="twelve o\u2019clock", hexcode="ffff")}
    fit = len(index) - 1 - len(held)
    drawn = draw_subjects(odd, fit)
    assert not set(drawn) & {"animal aa", "twelve o\u2019clock", *held}
    with pytest.raises(WaltError, match=f"count: only {fit} subjects of the index fit, {fit + 1} are asked for"):
        draw_subjects(odd, fit + 1)
    with pytest.raises(WaltError, match="keep: 'son' is not known"):
        draw_subjects(index, 4, keep=("son",))
    with pytest.raises(WaltError, match="skip: 'son' is not known"):
        draw_subjects(index, 4, skip=("son",))


# --------------------------------------------------------------------------------------------------- held out


def test_the_list_is_the_rule() -> None:
    listed = json.loads((Path(walt.data.__path__[0]) / "heldout.json").read_text())
    assert {kind: listed[kind] for kind in ("motions", "backgrounds")} == held_out_pairs(EMBEDDED_WORLD)
    assert len(listed["motions"]) == 7
    assert len(listed["backgrounds"]) == 7
    names = [f"name {i}" for i in range(4000)]
    assert sum(held_out(n, "rises") for n in names) / 4000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("frames", [1, 29])
@pytest.mark.parametrize("world", [WORLD, RICH], ids=["embedded", "rich"])
def test_training_never_shows_a_held_out_pair(world: World, frames: int) -> None:
    train = EmojiTheatre(SPRITES, split="train", world=world)
    test = EmojiTheatre(SPRITES, split="heldout", world=world)
    for seed in range(300):
        assert not any(held_out(*pair) for pair in train.scene(seed, frames).pairs())
        assert any(held_out(*pair) for pair in test.scene(seed, frames).pairs())


def test_training_shows_every_other_pair() -> None:
    train = EmojiTheatre(SPRITES, split="train", world=WORLD)
    seen = {pair for seed in range(1500) for pair in train.scene(seed).pairs()}
    every = {(s, o) for s in SMALL for o in (*WORLD.motions, *WORLD.backgrounds)}
    assert seen == {pair for pair in every if not held_out(*pair)}


def test_a_world_without_held_out_pairs() -> None:
    world = replace(WORLD, subjects=("sun",), backgrounds=("black",), motions=("rises",))
    assert EmojiTheatre(SPRITES, world=world).scene(0).background == "black"
    with pytest.raises(WaltError, match="heldout split"):
        EmojiTheatre(SPRITES, split="heldout", world=world).scene(0)


# --------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("grid", [0, 8])
@pytest.mark.parametrize(("height", "width"), [(128, 224), (224, 128), (128, 128)])
def test_everything_stays_in_the_frame(theatre: EmojiTheatre, height: int, width: int, grid: int) -> None:
    stage = EmojiTheatre(SPRITES, split="all", world=replace(RICH, grid=grid))
    for seed in range(150):
        scene = stage.scene(seed)
        for actor in scene.actors:
            for t in range(29):
                left, top, right, bottom = _place(actor, t, 29, 240, 200, height, width)
                x0, y0, x1, y1 = (c * s for c, s in zip(actor.cell, (width, height) * 2, strict=True))
                assert x0 - 1e-6 <= left < right <= x1 + 1e-6
                assert y0 - 1e-6 <= top < bottom <= y1 + 1e-6


def test_on_a_grid_places_are_cells_and_steps_are_half_cells_in_four_frames() -> None:
    stage = EmojiTheatre(SPRITES, split="all", world=replace(WORLD, grid=8))
    for seed in range(12):
        assert stage.scene(seed).actors[0].phase == 0.0
        still = stage.box(stage.compose("frog", "pink", seed=seed, frames=1), 0, 128, 224)
        assert [c % 16 for c in still[:2]] == pytest.approx([0, 0])
        for motion, axis in (("moves left to right", 0), ("rises", 1)):
            scene = stage.compose("frog", "pink", motion, seed=seed)
            path = [stage.box(scene, t, 128, 224) for t in range(0, 29, 4)]
            assert path[0][1 - axis] % 16 == pytest.approx(0)
            steps = np.diff([box[axis] for box in path])
            assert steps == pytest.approx([steps[0]] * 7)
            assert abs(steps[0]) >= 8
            assert steps[0] % 8 == pytest.approx(0)
    with pytest.raises(WaltError, match="grid"):
        World(grid=-1)


def test_default_size_is_the_worlds(theatre: EmojiTheatre) -> None:
    low, high = theatre.world.size
    for seed in range(20):
        left, top, right, bottom = _place(
            theatre.compose("frog", "pink", seed=seed).actors[0], 0, 29, 100, 90, 128, 224
        )
        assert low * 128 - 1 <= bottom - top <= high * 128 + 1
        assert (right - left) / (bottom - top) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moves left to right", 1, 1), ("moves right to left", 1, -1), ("rises", 0, -1), ("falls", 0, 1)],
)
def test_motions_go_where_they_say(disc: EmojiTheatre, motion: str, axis: int, sign: int) -> None:
    scene = disc.compose("rocket", "black", motion, seed=3)
    at = centres(disc.render(scene, 128, 224, frames=None)[1])
    assert sign * (at[-1] - at[0])[axis] > 0.3 * (128, 224)[axis]
    # steady to a twentieth of a pixel: positions are not rounded
    assert np.abs(np.diff(at[:, axis], n=2)).max() < 0.05
    assert np.ptp(at[:, 1 - axis]) < 0.05


def test_the_other_motions(disc: EmojiTheatre) -> None:
    def show(motion: str) -> NDArray[np.uint8]:
        return disc.render(disc.compose("rocket", "black", motion, seed=4), 128, 224, frames=None)[1]

    assert np.ptp(centres(show("stays")), axis=0).max() < 0.01
    for motion, sign in (("comes closer", 1), ("goes away", -1)):
        area = show(motion).sum((1, 2), dtype=np.int64) / 255
        assert (sign * np.diff(area) > 0).all()
        assert max(area[-1] / area[0], area[0] / area[-1]) > 4
    at = centres(show("circles"))
    radius = np.hypot(*(at - (at.max(0) + at.min(0)) / 2).T)
    assert radius.min() > 12
    assert np.ptp(radius) < 2.5
    y = centres(show("bounces"))[:, 0]
    turns = np.sign(np.diff(y))
    assert (turns[1:] != turns[:-1]).sum() >= 4
    assert np.ptp(y) > 25


def test_the_same_picture_at_every_size(theatre: EmojiTheatre) -> None:
    for seed, motion in enumerate(("circles", "comes closer", "bounces")):
        scene = theatre.compose(SMALL[seed], "sky blue", motion, seed)
        small, large = (theatre.render(scene, 64 * k, 112 * k, 3, 4)[0].astype(np.float64) for k in (1, 4))
        shrunk = large.reshape(4, 64, 4, 112, 4, 3).mean((2, 4))
        assert np.abs(shrunk - small).mean() < 1.0
        assert np.abs(shrunk - small).max() < 80  # edges: two good filters differ there, a shifted sprite would too
        shifted = np.roll(small, 1, axis=2)
        assert np.abs(shrunk - small).mean() < 0.3 * np.abs(shrunk - shifted).mean()


def test_flat_is_flat_and_edges_are_clean(disc: EmojiTheatre, theatre: EmojiTheatre) -> None:
    for name, colour in COLOURS.items():
        video, alpha = theatre.render(theatre.compose("frog", name, seed=1), 64, 112, frames=2)
        assert (video[alpha == 0] == colour).all()
        assert 0.02 < (alpha > 127).mean() < 0.4
    # a gray disc on black: every pixel is the mix that its alpha says; black under transparent pixels does not bleed
    disc._sprites["rocket"][..., :3] //= 2
    video, alpha = disc.render(disc.compose("rocket", "black", "falls", seed=1), 64, 112, frames=5)
    cover = alpha[..., None] / 255
    assert (
        np.abs(video - (127 * cover + np.array(COLOURS["black"]) * (1 - cover))).max() < 8
    )  # bicubic overshoots a little
    assert 0.005 < ((alpha > 20) & (alpha < 235)).mean() < 0.1  # edges are soft, and not blurred
    assert alpha.max() == 255


def test_a_crop_is_a_part_of_the_picture(theatre: EmojiTheatre) -> None:
    scene = theatre.compose("frog", "pink", "circles", seed=2)
    video, alpha = theatre.render(scene, 64, 112, frames=29)
    for left, top, right, bottom in ((40, 16, 72, 48), (0, 0, 8, 8), (100, 30, 112, 64)):
        part, cover = theatre.render(scene, 64, 112, frames=29, crop=(left, top, right, bottom))
        assert np.abs(part.astype(int) - video[:, top:bottom, left:right]).max() <= 1
        assert np.abs(cover.astype(int) - alpha[:, top:bottom, left:right]).max() <= 1


def test_gradients_go_from_top_to_bottom(theatre: EmojiTheatre) -> None:
    video, alpha = theatre.render(theatre.compose("frog", "black to white", seed=1, frames=1), 64, 112, frames=1)
    column = video[0, :, 111 if not alpha[0, :, 111].any() else 0, 0].astype(int)
    assert column[0] < 20
    assert column[-1] > 243
    assert (np.diff(column) >= 0).all()


def test_a_still_is_the_first_frame(theatre: EmojiTheatre) -> None:
    scene = theatre.scene(7, frames=1)
    assert scene.actors[0].phase == 0.0
    video, _ = theatre.render(scene, 64, 112, frames=1)
    again, _ = theatre.render(scene, 64, 112, frames=None)
    assert video.shape == (1, 64, 112, 3)
    assert np.array_equal(video, again)


def test_two_subjects_keep_their_relation(theatre: EmojiTheatre) -> None:
    scene = theatre.compose(("rocket", "frog"), "black", "circles", seed=2, relation="right of")
    assert [a.motion for a in scene.actors] == ["circles", "stays"]
    assert scene.actors[0].cell[0] == 0.5
    assert scene.actors[1].cell[2] == 0.5
    _, alpha = theatre.render(scene, 64, 112, frames=4)
    assert alpha[:, :, :56].any()
    assert alpha[:, :, 56:].any()


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"subject": "roket"}, r"subject: 'roket' is not known \(did you mean \"rocket\"\?\); known: 'frog'"),
        ({"background": "purpel"}, 'background: .*did you mean "purple"'),
        ({"background": "pink to"}, "background"),
        ({"background": "pink to red to black"}, "one or two background colours"),
        ({"motion": "rise"}, 'motion: .*did you mean "rises"'),
        ({"size": "huge"}, "size: 'huge'"),
        ({"relation": "above"}, "relation: 'above' needs two subjects"),
        ({"subject": ("sun", "frog", "rocket")}, "one or two subjects"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
    ],
)
def test_compose_says_what_is_wrong(theatre: EmojiTheatre, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(WaltError, match=says):
        theatre.compose(**{"subject": "rocket", "background": "black", **arguments})


def test_render_says_what_is_wrong(theatre: EmojiTheatre) -> None:
    scene = theatre.scene(0, frames=17)
    for start, frames in ((1, 17), (-1, 17), (0, 0)):
        with pytest.raises(WaltError, match="not in the scene, which has 17"):
            theatre.render(scene, 64, 112, start, frames)
    for crop in ((0, 0, 113, 64), (5, 0, 5, 64), (-1, 0, 5, 64)):
        with pytest.raises(WaltError, match=r"crop .* is not inside the 64 x 112 picture"):
            theatre.render(scene, 64, 112, crop=crop)
    with pytest.raises(WaltError, match="at least 32 pixels, got 16 x 112"):
        theatre.render(scene, 16, 112)


def test_theatre_and_world_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(WaltError, match=r"no sprites in .*walt data emoji"):
        EmojiTheatre(tmp_path)
    with pytest.raises(WaltError, match=r'subjects: .*did you mean "frog"'):
        EmojiTheatre(SPRITES, subjects=["frogs"])
    with pytest.raises(WaltError, match="split: 'test' is not one of"):
        EmojiTheatre(SPRITES, split="test")  # type: ignore[arg-type]
    with pytest.raises(WaltError, match=r"p_two must be in 0\.\.1, got 2"):
        World(p_two=2)
    with pytest.raises(WaltError, match=r"size must be \(low, high\) in 0\.\.1, got \(0\.9, 0\.5\)"):
        World(size=(0.9, 0.5))
    with pytest.raises(WaltError, match="motions: 'walks'"):
        World(motions=("walks",))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "not an image"])
def test_a_damaged_sprite_is_named_when_it_is_asked_for(tmp_path: Path, damage: str) -> None:
    shutil.copytree(SPRITES, tmp_path / "s")
    path = tmp_path / "s" / "frog.webp"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "not an image":  # even when the index agrees with the bytes
        path.write_bytes(b"nonsense")
        index = tmp_path / "s" / "index.json"
        good, bad = (hashlib.sha256(d).hexdigest() for d in (data, b"nonsense"))
        index.write_text(index.read_text().replace(good, bad))
    else:
        path.write_bytes(data[:-100] if damage == "cut" else data[:500] + bytes([data[500] ^ 1]) + data[501:])
    stage = EmojiTheatre(tmp_path / "s", split="all")
    stage.render(stage.compose("rocket", "black"), 32, 56)
    with pytest.raises(WaltError, match=r"sprite .*frog\.webp (is damaged|cannot be read).*walt data emoji"):
        stage.render(stage.compose("frog", "black"), 32, 56)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    for text in ('{"sprites": [', '{"sprites": [{}]}', "[]"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(WaltError, match=r"index\.json is damaged"):
            read_index(tmp_path)


# ------------------------------------------------------------------------------------------------------ cache


def test_the_sprites_of_the_tests() -> None:
    index = read_index(SPRITES)
    assert sorted(index) == sorted(SMALL)
    assert all((s.art, s.frames) == (96, 8) for s in index.values())
    assert sum(p.stat().st_size for p in SPRITES.iterdir()) < 300_000


def tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blink(frames: int) -> bytes:
    """A square on a transparent 256 x 256 canvas whose left edge is at 40 + its frame number; 42 ms a frame."""
    pictures = []
    for at in range(frames):
        art = np.zeros((256, 256, 4), np.uint8)
        art[50:200, 40 + at : 180] = (200, 40, 90, 255)
        pictures.append(Image.fromarray(art))
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "WEBP", save_all=frames > 1, append_images=pictures[1:], duration=42, lossless=True, minimize_size=False
    )
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "npm"
    folder.mkdir()
    names = [
        {"hexcode": "1F680", "label": "rocket", "tags": ["space"], "group": 5},
        {"hexcode": "2764", "label": "red heart", "tags": [], "group": 0},
        {"hexcode": "1F44B", "label": "waving hand", "tags": [], "group": 1, "skins": [{"hexcode": "1F44B-1F3FB"}]},
        {"hexcode": "1F30D", "label": "globe", "tags": [], "group": 5},
        {"hexcode": "1F9FF", "label": "lost", "tags": [], "group": 7},
    ]
    art = {
        ANIMATIONS[0]: {"1f680": blink(24), "1f44b-1f3fb": blink(24)},
        ANIMATIONS[1]: {"2764-fe0f": blink(12), "1f30d": blink(1)},
        ANIMATIONS[2]: {"1f44b": blink(24)},
        ANIMATIONS[3]: {},
    }
    for name in (*ANIMATIONS, NAMES):
        files = {f"package/assets/{code}.webp": data for code, data in art.get(name, {}).items()}
        if name == NAMES:
            files = {"package/en/data.json": json.dumps(names).encode()}
        monkeypatch.setitem(PINS, name, replace(PINS[name], sha256=tar(folder / PINS[name].file, files)))
    return folder


def test_build_decodes_at_eight_frames_a_second(tmp_path: Path, packages: Path) -> None:
    told: list[tuple[int, int, str]] = []
    index = build_cache(tmp_path / "c", packages, progress=lambda *a: told.append(a))
    assert sorted(index) == ["red heart", "rocket", "waving hand"]  # no skin tone, no still
    assert [n for n, _, _ in told] == [1, 2, 3, 4]
    rocket = index["rocket"]
    assert (rocket.frames, rocket.box, rocket.tags, rocket.group) == (8, (40, 50, 180, 200), ("space",), "travel")
    strip = EmojiTheatre(tmp_path / "c").sprite("rocket")
    assert strip.shape == (8, 150, 140, 4)
    edges = [int(np.argmax(frame[75, :, 3] > 0)) for frame in strip]
    assert edges == [0, 3, 6, 9, 12, 15, 18, 21]  # every third of 24 per second
    assert (strip[0, 75, 70] == (200, 40, 90, 255)).all()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "index.json",
        "red-heart.webp",
        "rocket.webp",
        "waving-hand.webp",
    ]


def test_build_continues_and_repairs(tmp_path: Path, packages: Path) -> None:
    cache = tmp_path / "c"
    build_cache(cache, packages, ["rocket"])
    kept = (cache / "rocket.webp").stat().st_mtime_ns
    build_cache(cache, packages)
    assert (cache / "rocket.webp").stat().st_mtime_ns == kept
    before = {p.name: p.read_bytes() for p in cache.iterdir()}
    (cache / "red-heart.webp").write_bytes(b"cut short")
    build_cache(cache, packages)
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == before
    assert (cache / "rocket.webp").stat().st_mtime_ns == kept


def test_build_of_chosen_subjects_and_sizes(tmp_path: Path, packages: Path) -> None:
    index = build_cache(tmp_path / "c", packages, ["rocket", "globe"], art=64, frames=4)
    assert {(s.label, s.frames, s.art) for s in index.values()} == {("rocket", 4, 64), ("globe", 1, 64)}
    stage = EmojiTheatre(tmp_path / "c", split="all")
    assert stage.render(stage.compose("globe", "red", "rises"), 32, 56)[1].any()
    assert "globe" in build_cache(tmp_path / "d", packages, stills=True)


def test_build_says_what_is_wrong(tmp_path: Path, packages: Path) -> None:
    with pytest.raises(WaltError, match=r'subjects: .*did you mean "rocket"'):
        build_cache(tmp_path / "c", packages, ["rockets"])
    with pytest.raises(WaltError, match=r"art must be 16\.\.256"):
        build_cache(tmp_path / "c", packages, art=4)
    with pytest.raises(WaltError, match="the packages have no picture of lost"):
        build_cache(tmp_path / "c", packages, ["rocket", "lost"])
    (tmp_path / "file").write_text("")
    with pytest.raises(WaltError, match="cannot write the sprites"):
        build_cache(tmp_path / "file", packages)
    (packages / PINS[ANIMATIONS[2]].file).unlink()
    with pytest.raises(WaltError, match=r"anim-3-1\.0\.0\.tgz is not in"):
        build_cache(tmp_path / "e", packages)
    assert not list((tmp_path / "e").glob("*.webp"))


def test_clips_may_show_fewer_subjects_than_stills() -> None:
    scenes = Scenes(DataJob(source=str(SPRITES), subjects=("rocket", "frog", "sun"), clip_subjects=("frog",)))
    clip, still = Shape(frames=5, height=32, width=32), Shape(frames=1, height=32, width=32)
    assert all("frog" in scenes.clip(number, clip).caption for number in range(12))
    shown = {
        word for number in range(40) for word in ("rocket", "frog", "sun") if word in scenes.clip(number, still).caption
    }
    assert shown == {"rocket", "frog", "sun"}


@pytest.mark.parametrize(("name", "count"), [("embedded", 5), ("large", 61)])
def test_sprites_that_a_world_lacks_are_named_with_the_command(name: Any, count: int) -> None:
    with pytest.raises(WaltError, match=rf"lacks {count} subjects of the {name} world, .* --world {name}`"):
        Scenes(DataJob(source=str(SPRITES), world=name))
    assert Scenes(DataJob(source=str(SPRITES), world="full")).theatre.subjects
