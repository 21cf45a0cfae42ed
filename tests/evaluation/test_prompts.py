"""The prompt judge on real clips, whose truth is known, and the command around it on a sampler that remembers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from walt import cli
from walt.data.emoji import COLOURS, EMBEDDED_WORLD, WORLDS, EmojiTheatre, Scene
from walt.errors import WaltError
from walt.evaluation.prompts import (
    SIDE,
    Judge,
    Named,
    Score,
    asked,
    check_judge,
    cut_out,
    fingerprint,
    goals,
    held_out_scenes,
    make_clips,
    read_clip,
    score,
    wilson,
)
from walt.evaluation.tracks import Track, find_subject, lab, name_motion, nearest_colour

SPRITES = Path(__file__).parents[1] / "sprites"
WORLD = replace(EMBEDDED_WORLD, subjects=("rocket", "frog", "sun"))
SIZE = (64, 112)


def pooled(images: Tensor) -> Tensor:
    """A trivial image network: what colours are where."""
    return F.adaptive_avg_pool2d(images, 3).flatten(1)


@pytest.fixture(scope="module")
def theatre() -> EmojiTheatre:
    return EmojiTheatre(SPRITES, split="heldout", world=WORLD)


@pytest.fixture(scope="module")
def judge(theatre: EmojiTheatre) -> Judge:
    return Judge.learn(theatre, pooled, *SIZE)


@pytest.fixture(scope="module")
def scenes(theatre: EmojiTheatre) -> list[Scene]:
    return held_out_scenes(theatre, 24)


@pytest.fixture(scope="module")
def clips(theatre: EmojiTheatre, scenes: list[Scene]) -> list[NDArray[np.uint8]]:
    return [theatre.render(scene, *SIZE, frames=17)[0] for scene in scenes]


# -- colour, place and path


def test_lab_of_known_colours() -> None:
    known = {
        (0, 0, 0): (0, 0, 0),
        (1, 1, 1): (100, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 0, 1): (32.3, 79.2, -107.9),
    }
    for rgb, expected in known.items():
        assert np.allclose(lab(np.array(rgb, float)), expected, atol=0.1)


def test_every_colour_is_nearest_to_itself() -> None:
    assert all(nearest_colour(lab(np.array(rgb) / 255), COLOURS) == name for name, rgb in COLOURS.items())


def test_the_subject_is_found_where_it_is(theatre: EmojiTheatre) -> None:
    scene = theatre.compose("frog", "pink", "falls", seed=3)
    clip, alpha = theatre.render(scene, 128, 224, frames=9)
    clip[0, 20:22, 200:202] = 0  # a speck
    track = find_subject(clip)
    inside = alpha.reshape(9, 64, 2, 112, 2).mean(axis=(2, 4)) > 127
    assert track.seen.all()
    assert ((track.mask & inside).sum((1, 2)) > 0.9 * (track.mask | inside).sum((1, 2))).all()
    ys, xs = np.nonzero(inside[0])
    assert (track.x[0], track.y[0]) == pytest.approx(((xs.mean() + 0.5) / 64, (ys.mean() + 0.5) / 64), abs=0.02)


def test_an_empty_clip_shows_no_subject(judge: Judge) -> None:
    clip = np.full((17, *SIZE, 3), COLOURS["pink"], np.uint8)
    assert judge(clip) == Named("pink", "", "")


def test_paths_are_told_apart() -> None:
    t = np.arange(17) / 8
    still = 0 * t + 0.5
    box = np.tile([0.2, 0.2, 0.8, 0.8], (17, 1))
    turn = 0.15 * np.exp(2j * math.pi * 0.4 * t)
    beat = (t * 3 / 3.5) % 1.0
    paths = {
        "stays": (still, still, still),
        "moves left to right": (still + 0.3 * t, still, still),
        "moves right to left": (still - 0.3 * t, still, still),
        "rises": (still, still - 0.1 * t, still),
        "falls": (still, still + 0.1 * t, still),
        "comes closer": (still, still, still * np.exp(0.25 * t)),
        "goes away": (still, still, still * np.exp(-0.25 * t)),
        "circles": (still + turn.real, still + turn.imag, still),
        "bounces": (still + 0.03 * t, 0.7 - 0.3 * 4 * beat * (1 - beat), still),
    }
    for motion, (x, y, size) in paths.items():
        x = x.copy()
        track = Track(np.zeros(3), np.zeros((17, 1, 1), np.bool_), x, y, size, box)
        assert name_motion(track, paths) == motion
        x[[4, 9]] = np.nan  # frames that show nothing
        assert name_motion(track, paths) == motion
        x[:] = np.nan
        assert name_motion(track, paths) == ""


# -- the judge


def agreement(shown: Sequence[Named], scenes: Sequence[Scene]) -> dict[str, Score]:
    return score(shown, [asked(scene) for scene in scenes], WORLD)


def test_real_clips_are_judged_right(judge: Judge, scenes: list[Scene], clips: list[NDArray[np.uint8]]) -> None:
    scores = agreement([judge(clip) for clip in clips], scenes)
    assert scores["background"].share == 1.0
    assert scores["motion"].share > 0.9
    assert scores["subject"].share > 0.9
    assert all(one.shuffled < 0.55 for one in scores.values())
    assert all(aim.met for aim in goals(scores, scores).values())


def test_noise_does_not_mislead(judge: Judge, scenes: list[Scene], clips: list[NDArray[np.uint8]]) -> None:
    rng = np.random.default_rng(0)
    noisy = [np.clip(clip + rng.normal(0, 6, clip.shape), 0, 255).astype(np.uint8) for clip in clips[:12]]
    scores = agreement([judge(clip) for clip in noisy], scenes[:12])
    assert scores["background"].share == 1.0 and scores["motion"].share > 0.8 and scores["subject"].share > 0.8


def test_cut_outs_have_a_neutral_ground(theatre: EmojiTheatre) -> None:
    clip, _ = theatre.render(theatre.compose("sun", "black", "stays"), 128, 224, frames=5)
    crops = cut_out(clip, find_subject(clip), 3)
    assert crops.shape == (3, 3, SIDE, SIDE) and np.abs(crops).max() <= 1
    assert np.abs(crops[:, :, :3, :3]).max() < 0.02


# -- scores


def test_scores_by_hand() -> None:
    a, b, c = Named("pink", "rises", "frog"), Named("pink", "falls", "sun"), Named("black", "falls", "")
    scores = score([a, b, c], [a, a, b], WORLD)
    assert [scores[name].right for name in ("background", "motion", "subject")] == [2, 2, 1]
    # background: clips pink, pink, black against the prompts (pink, pink, pink) of the two others
    assert scores["background"].shuffled == pytest.approx(4 / 6)
    assert scores["motion"].shuffled == pytest.approx(2 / 6)
    assert scores["subject"].chance == pytest.approx(1 / 3)


def test_wilson() -> None:
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-3)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_goals_and_the_judges_own() -> None:
    good, poor = Score(9, 10, 0.1, 0.1), Score(8, 10, 0.1, 0.1)
    real = dict.fromkeys(("background", "motion", "subject"), good)
    aims = goals({"background": good, "motion": good, "subject": poor}, real, 0.9)
    assert [aims[name].met for name in ("background", "motion", "subject")] == [False, True, False]
    check_judge(real)
    with pytest.raises(WaltError, match=r"80\.0% of the real"):
        check_judge({**real, "subject": poor})


# -- clips on disk


def test_only_missing_clips_are_sampled(scenes: list[Scene], tmp_path: Path) -> None:
    asked_for: list[int] = []

    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        asked_for.extend(seeds)
        return np.stack([np.full((5, 16, 16, 3), seed, np.uint8) for seed in seeds])

    seeds = [scene.seed for scene in scenes[:5]]
    make_clips(scenes[:3], sampler, tmp_path, {"steps": 1}, batch=2)
    assert asked_for == seeds[:3]
    paths = make_clips(scenes[:5], sampler, tmp_path, {"steps": 1}, batch=2)
    assert asked_for == seeds
    assert [int(read_clip(path).max()) for path in paths] == seeds
    make_clips(scenes[:1], sampler, tmp_path, {"steps": 2})
    assert asked_for == [*seeds, seeds[0]]
    paths[0].write_bytes(b"PK")
    with pytest.raises(WaltError, match="cannot be read"):
        read_clip(paths[0])


def test_fingerprint_sees_bytes_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = fingerprint(tmp_path)
    (tmp_path / "a").write_text("2")
    second = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_bad_input_is_named(theatre: EmojiTheatre, scenes: list[Scene], judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(WaltError, match='the split "heldout"'):
        held_out_scenes(EmojiTheatre(SPRITES, world=WORLD), 1)
    with pytest.raises(WaltError, match="count must be"):
        held_out_scenes(theatre, 0)
    with pytest.raises(WaltError, match="one subject on one colour"):
        held_out_scenes(EmojiTheatre(SPRITES, split="heldout", world=replace(WORLD, p_two=0.5)), 1)
    with pytest.raises(WaltError, match="clip: expected"):
        judge(np.zeros((3, 64, 112), np.uint8))
    with pytest.raises(WaltError, match="no path for 'dances'"):
        name_motion(find_subject(np.zeros((3, 64, 64, 3), np.uint8)), ("dances",))
    with pytest.raises(WaltError, match="network: expected features"):
        replace(judge, network=lambda images: images)(theatre.render(scenes[0], *SIZE, frames=5)[0])
    with pytest.raises(WaltError, match="sampler: expected"):
        make_clips(scenes[:1], lambda p, s: np.zeros((2, 1, 16, 16, 3), np.uint8), tmp_path, {})
    with pytest.raises(WaltError, match="batch must be"):
        make_clips(scenes[:1], lambda p, s: np.zeros((1, 1, 16, 16, 3), np.uint8), tmp_path, {}, batch=0)
    with pytest.raises(WaltError, match="shown: expected"):
        score([], [], WORLD)


# -- the command


class Stage:
    """In a cascade's place: shows the scene that has the seed's prompt, or plain gray."""

    dtype = torch.float32

    def __init__(self, theatre: EmojiTheatre, scenes: Sequence[Scene], honest: bool) -> None:
        self.theatre, self.honest, self.calls = theatre, honest, 0
        self.guidance: list[list[float] | None] = []
        self.scenes = {scene.caption: scene for scene in scenes}

    transformers = (None, None, None)
    config = SimpleNamespace(super_resolution_guidance_scale=1.25)

    def default_steps(self, stages: int) -> list[int]:
        return [16, 1, 1][:stages]

    def check_inputs(self, stages: int, height: None, width: None, frames: int) -> tuple[int, int, int]:
        return stages, *SIZE

    def __call__(self, prompt: list[str], num_frames: int, **options: Any) -> SimpleNamespace:
        assert len(options["generator"]) == len(prompt)
        self.calls += 1
        self.guidance.append(options["guidance_scale"])
        clips = np.stack([self.theatre.render(self.scenes[one], *SIZE, frames=num_frames)[0] for one in prompt])
        frames = torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 255
        return SimpleNamespace(frames=frames if self.honest else torch.full_like(frames, 0.5))


def test_the_command(
    theatre: EmojiTheatre, scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORLDS, "embedded", WORLD)
    monkeypatch.setattr("walt.commands._image_network", lambda path: pooled)
    weights = tmp_path / "network.safetensors"
    weights.touch()

    def run(pipe: Stage, name: str, *more: Any) -> int:
        monkeypatch.setattr("walt.cli.load_cascade", lambda *_: pipe)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model").write_text(name)
        options = ("-n", 10, "--batch", 4, "--source", SPRITES, "--image-network", weights, "--model", tmp_path / name)
        files = ("--world", "embedded", "--work", tmp_path / "work", "--json", tmp_path / f"{name}.json")
        return cli.main(["evaluate", "prompts", *map(str, options + files + more)])

    honest, gray = (Stage(theatre, scenes, honest) for honest in (True, False))
    assert run(honest, "honest") == 0 and honest.calls == 3
    assert run(honest, "honest") == 0 and honest.calls == 3
    assert json.loads((tmp_path / "work" / "world.json").read_text())["subjects"] == list(WORLD.subjects)
    report = json.loads((tmp_path / "honest.json").read_text())
    assert len(report["clips"]) == 10 and report["scores"]["generated"] == report["scores"]["real"]
    assert run(gray, "gray") == 1 and gray.calls == 3
    report = json.loads((tmp_path / "gray.json").read_text())
    assert not any(goal["met"] for goal in report["goals"].values())

    # Other prompts, another guidance of the base: clips of their own.
    honest.calls, honest.guidance = 0, []
    assert run(honest, "honest", "--first", 4, "-n", 6) == 0 and honest.calls == 2 and honest.guidance == [None] * 2
    report = json.loads((tmp_path / "honest.json").read_text())
    assert [clip["prompt"] for clip in report["clips"]] == [scene.caption for scene in scenes[4:10]]
    honest.guidance = []
    assert run(honest, "honest", "--guidance", 3, "--stages", 2) == 0 and honest.guidance == [[3.0, 1.25]] * 3
    assert run(honest, "honest", "--guidance", 3, "--stages", 2) == 0 and len(honest.guidance) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (("--subject-share", "0"), "--subject-share must be"),
        (("--batch", "0"), "--batch must be"),
        (("--first", "-1"), "--first must be from 0 to"),
        (("--first", str(2**62)), "--first must be from 0 to"),
        (("--guidance", "nan"), "--guidance must be at least 0 and finite, got nan"),
        (("--frames", "1"), "--frames must be at least 5"),
        (("--json", "x.txt"), "must end in .json"),
        (("--source", "nowhere"), "no sprites in nowhere"),
        (("--source", str(SPRITES), "--image-network", "none"), 'network: "none" is neither'),
    ],
)
def test_bad_options_are_usage_errors(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = () if "--source" in options else ("--source", str(SPRITES))
    assert cli.main(["evaluate", "prompts", "--model", str(tmp_path), *source, *options]) == 2
    assert message in capsys.readouterr().err


def test_scenes_are_those_of_the_models_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "network.safetensors"
    weights.touch()
    asked: list[str] = []
    monkeypatch.setattr("walt.cli.load_cascade", lambda *_: None)
    monkeypatch.setattr("walt.commands._evaluate_prompts", lambda args, pipe: asked.append(args.world))
    monkeypatch.setattr("walt.data.emoji.read_index", lambda folder: dict.fromkeys(WORLDS["large"].subjects))
    call = ["evaluate", "prompts", "--model", str(tmp_path), "--image-network", str(weights)]
    for name, world in WORLDS.items():
        (tmp_path / "world.json").write_text(json.dumps(world.words()))
        assert cli.main(call) == 0 and cli.main([*call, "--world", "embedded"]) == 0
        assert asked[-2:] == [name, "embedded"]
    (tmp_path / "world.json").write_text('{"subjects": ["cat"]}')
    assert cli.main(call) == 2 and "say with --world" in capsys.readouterr().err
    assert cli.main([*call, "--world", "large"]) == 0 and asked[-1] == "large"

    # Clips that `prompts` made know whose they are; real ones need no world.
    monkeypatch.setattr("walt.commands._evaluate_video", lambda args: asked.append(args.world))
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    video = ["evaluate", "video", "--generated", str(tmp_path), "--network", str(weights)]
    for name, world in WORLDS.items():
        (tmp_path / "world.json").write_text(json.dumps(world.words()))
        assert cli.main(video) == 0 and asked[-1] == name
    (tmp_path / "world.json").write_text("{")
    assert cli.main(video) == 2 and "world.json" in capsys.readouterr().err
    assert cli.main([*video, "-n", "2", "--model", "nowhere"]) == 2 and "--model" in capsys.readouterr().err

    monkeypatch.undo()
    for name in WORLDS:
        assert cli.main([*call, "--source", str(SPRITES), "--world", name]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"--source: {SPRITES} lacks" in told and f"--world {name}" in told


def test_sheets_and_joins_ask_for_the_words_of_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Pipe:
        vae_scale_factor_temporal = 4

        def default_steps(self, stages: int) -> list[int]:
            return [1] * stages

        def __call__(self, prompt: str, num_frames: int, **call: Any) -> SimpleNamespace:
            asked.append(prompt)
            return SimpleNamespace(frames=torch.rand(1, num_frames, 3, 32, 32))

    monkeypatch.setattr("walt.cli.load_cascade", lambda *_: Pipe())
    for world, names in (("embedded", 8), ("large", 64)):
        for what in (("sheet", "-n", "40", "--frames", "1"), ("joins", "-n", "40")):
            asked.clear()
            output = ("-o", str(tmp_path / "x.png"))
            assert cli.main(["evaluate", *what, "--world", world, *output]) == 0
            shown = [name for prompt in asked for name in WORLDS["large"].subjects if f" {name} " in prompt]
            assert len(asked) == 40 and set(shown) <= set(WORLDS[world].subjects) and len(set(shown)) > names / 4
