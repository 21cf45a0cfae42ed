"""Sketches are exactly what the alpha says, and survive their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from walt.data.emoji import EmojiTheatre, backdrop
from walt.data.sketches import (
    classes,
    colour,
    draw_sketch,
    from_colours,
    read_sketch,
    render_with_sketch,
    to_colours,
    write_sketch,
)
from walt.errors import WaltError

SPRITES = Path(__file__).parents[1] / "sprites"
SUBJECTS = ("rocket", "frog", "sun")
NAMES = classes(SUBJECTS)


@pytest.fixture(scope="module")
def theatre() -> EmojiTheatre:
    return EmojiTheatre(SPRITES, subjects=SUBJECTS, split="all")


@pytest.mark.parametrize("size", [(64, 112), (50, 33), (128, 128)])
def test_one_subject_is_where_its_alpha_is(theatre: EmojiTheatre, size: tuple[int, int]) -> None:
    scene = theatre.compose("frog", "purple", "circles", seed=3)
    video, sketch = render_with_sketch(theatre, scene, *size, start=4, frames=5)
    real, alpha = theatre.render(scene, *size, start=4, frames=5)
    assert np.array_equal(video, real)
    assert np.array_equal(sketch, np.where(alpha >= 128, 2, 0))
    assert sketch.shape == (5, *size) and (sketch == 2).any(axis=(1, 2)).all()


def test_background_pixels_show_the_background(theatre: EmojiTheatre) -> None:
    scene = theatre.compose("sun", "navy blue", "stays", seed=1)
    video, sketch = render_with_sketch(theatre, scene, 64, 64, frames=2)
    ground = np.broadcast_to(backdrop("navy blue", 64)[None, :, None], video.shape)
    far = np.abs(video.astype(int) - ground).max(axis=-1)
    # where the sketch says background, at least half of the ground's colour shows through
    assert far[sketch == 0].max() <= 128 and np.median(far[sketch == 3]) > 128


def test_two_subjects_have_their_own_classes_on_their_sides(theatre: EmojiTheatre) -> None:
    scene = theatre.compose(("frog", "rocket"), "white", "stays", seed=5, relation="left of")
    sketch = draw_sketch(theatre, scene, 64, 128, frames=1)[0]
    assert set(np.unique(sketch)) == {0, 1, 2}
    assert np.flatnonzero((sketch == 2).any(0)).max() < 64 <= np.flatnonzero((sketch == 1).any(0)).min()


def test_the_later_subject_hides_the_earlier(theatre: EmojiTheatre) -> None:
    frog = theatre.compose("frog", "white", seed=1).actors[0]
    scene = theatre.compose(("rocket", "frog"), "white", seed=1)
    stacked = replace(scene, actors=(replace(frog, subject="rocket"), frog))
    alone = draw_sketch(theatre, replace(scene, actors=(frog,)), 64, 64, frames=1)
    both = draw_sketch(theatre, stacked, 64, 64, frames=1)
    assert np.array_equal(both == 2, alone == 2) and (both == 1).any()


def test_crop_is_the_part_of_the_whole(theatre: EmojiTheatre) -> None:
    scene = theatre.compose("rocket", "pink", "rises", seed=2)
    whole = draw_sketch(theatre, scene, 64, 112, frames=3)
    part = draw_sketch(theatre, scene, 64, 112, frames=3, crop=(16, 8, 80, 64))
    assert np.array_equal(part, whole[:, 8:64, 16:80])


def test_colours_are_distinct_and_come_back() -> None:
    names = classes([f"thing {i}" for i in range(999)])
    assert len({colour(i) for i in range(1000)}) == 1000 and colour(0) == (0, 0, 0)
    sketch = np.arange(1000, dtype=np.uint16).reshape(2, 20, 25)
    assert np.array_equal(from_colours(to_colours(sketch, names), names), sketch)


def test_files_come_back_exactly(theatre: EmojiTheatre, tmp_path: Path) -> None:
    scene = theatre.compose("frog", "white", "bounces", seed=4)
    sketch = draw_sketch(theatre, scene, 48, 40, frames=4)
    sketch[1] = sketch[0]  # equal frames stay two frames
    write_sketch(sketch, tmp_path / "clip", NAMES)
    write_sketch(sketch[0], tmp_path / "still.png", NAMES)
    assert np.array_equal(read_sketch(tmp_path / "clip", NAMES), sketch)
    assert np.array_equal(read_sketch(tmp_path / "still.png", NAMES), sketch[:1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "still.png"]
    # a PNG with a palette is read by its colours
    Image.open(tmp_path / "still.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(tmp_path / "p.png")
    assert np.array_equal(read_sketch(tmp_path / "p.png", NAMES), sketch[:1])


def test_faults_are_named(tmp_path: Path) -> None:
    ok = np.zeros((8, 8), np.uint16)
    with pytest.raises(WaltError, match="class 4 is not known; there are 0 to 3"):
        to_colours(ok + 4, NAMES)
    with pytest.raises(WaltError, match=r"1 pixels are of no known class, the first is #010203; known: background #0"):
        pixels = to_colours(ok, NAMES)
        pixels[2, 3] = (1, 2, 3)
        from_colours(pixels, NAMES)
    with pytest.raises(WaltError, match="a folder without PNG"):
        read_sketch(tmp_path, NAMES)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    with pytest.raises(WaltError, match="must be a PNG"):
        read_sketch(tmp_path / "x.jpg", NAMES)
    with pytest.raises(WaltError, match="there is no file"):
        read_sketch(tmp_path / "none.png", NAMES)
    with pytest.raises(WaltError, match="it exists"):
        write_sketch(np.stack([ok, ok]), tmp_path, NAMES)
    (tmp_path / "mixed").mkdir()
    write_sketch(ok, tmp_path / "mixed/0.png", NAMES)
    write_sketch(ok[:4], tmp_path / "mixed/1.png", NAMES)
    with pytest.raises(WaltError, match="different sizes"):
        read_sketch(tmp_path / "mixed", NAMES)
