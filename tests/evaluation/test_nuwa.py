"""The measures of NUWA's tasks, and all of them on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre
from walt.data.sketches import sample_frames
from walt.evaluation.nuwa import (
    TASKS,
    Stage,
    detect,
    overlap,
    pixel_accuracy,
    psnr,
    stretch,
    table,
    write_report,
    write_sheet,
)
from walt.evaluation.prompts import Judge
from walt.evaluation.tracks import find_subject, name_motion
from walt.media import read_image

SPRITES = Path(__file__).parents[1] / "sprites"
SUBJECTS = ("rocket", "frog", "sun")


def colours(images: Tensor) -> Tensor:
    """Stands for a network: coarse colours tell three sprites apart."""
    return torch.nn.functional.avg_pool2d(images, 20).flatten(1)


@pytest.fixture(scope="module")
def theatre() -> EmojiTheatre:
    return EmojiTheatre(SPRITES, split="heldout", world=replace(EMBEDDED_WORLD, subjects=SUBJECTS))


@pytest.fixture(scope="module")
def judge(theatre: EmojiTheatre) -> Judge:
    return Judge.learn(theatre, colours, 64, 64)


def test_real_clips_are_detected_as_their_sketch_says(theatre: EmojiTheatre, judge: Judge) -> None:
    scores = []
    for seed in range(6):
        clip, sketch = sample_frames(theatre, theatre.scene(seed, 29), 128, 128)
        found = detect(clip, judge, SUBJECTS)
        scores.append(pixel_accuracy(found, sketch))
        wrong = np.where(sketch > 0, sketch % 3 + 1, 0)  # another subject in the same place
        assert pixel_accuracy(found, wrong) < scores[-1]
    assert np.mean(scores) > 0.93


def test_pixel_accuracy_reads_the_middle_of_each_cell() -> None:
    sketch = np.zeros((1, 128, 128), np.uint16)
    sketch[0, :64] = 2
    detected = np.zeros((1, 64, 64), np.uint16)
    assert pixel_accuracy(detected, sketch) == 0.5
    detected[0, :32] = 2
    assert pixel_accuracy(detected, sketch) == 1.0


def test_an_empty_ground_overlaps_nothing() -> None:
    sketch = np.zeros((1, 128, 128), np.uint16)
    sketch[0, :64] = 2
    detected = np.zeros((1, 64, 64), np.uint16)
    assert overlap(detected, sketch) == 0.0 and overlap(detected, np.zeros_like(sketch)) == 1.0
    detected[0, 16:48] = 1  # half of the subject and as much of the ground, and of another class
    assert overlap(detected, sketch) == pytest.approx(1 / 3)


def test_psnr_inside_a_mask() -> None:
    a = np.zeros((1, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0, 0] = 51  # a fifth of the range, in a quarter of the pixels
    assert psnr(a, b) == pytest.approx(10 * np.log10(25 * 4)) and psnr(a, a) == 100
    where = np.zeros((1, 4, 4), bool)
    where[0, 0] = True
    assert psnr(a, b, where) == pytest.approx(10 * np.log10(25))


@pytest.mark.parametrize("motion", ["moves left to right", "falls", "comes closer", "stays"])
def test_motion_is_told_from_every_fourth_frame(theatre: EmojiTheatre, motion: str) -> None:
    clip, _ = sample_frames(theatre, theatre.compose("frog", "white", motion, seed=2), 128, 128)
    track = stretch(find_subject(clip), 4)
    assert len(track.x) == 17 and name_motion(track, theatre.world.motions) == motion


def test_every_task_gives_its_figures(theatre: EmojiTheatre, judge: Judge, tmp_path: Path) -> None:
    pipe = tiny.nuwa_pipeline(sample_size=(4, 8, 8))
    stage = Stage(pipe, theatre, judge, None, count=2)
    assert replace(stage, first=1).scenes()[0] == stage.scenes()[1]
    results = {name: task(stage) for name, task in TASKS.items()}
    figures = [figure for result in results.values() for figure in result.figures]
    kept = [figure for figure in figures if figure.measure == "given tokens kept"]
    assert len(kept) == 3 and all(figure.made.estimate == 1.0 for figure in kept)
    for name, result in results.items():
        assert len(result.examples) == 2 and result.figures, name
    assert table(figures).row_count == len(figures)
    write_report(tmp_path / "x.json", figures, {"count": 2})
    report = json.loads((tmp_path / "x.json").read_text())
    assert len(report["figures"]) == len(figures)
    write_sheet(tmp_path / "x.png", list(results.values()))
    assert read_image(tmp_path / "x.png").shape[0] > 8 * 86
