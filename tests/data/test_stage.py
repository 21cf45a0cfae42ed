"""Scenes drawn on the device: the pictures that Pillow draws on the host."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import jobs
from tests.training.test_tokenizers import seg_job
from walt.commands import build_objective, plan_job
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre, World
from walt.data.latents import LatentShards, write_latents
from walt.data.scenes import Scenes
from walt.data.stage import Stage, lay_out
from walt.errors import WaltError
from walt.training.job import Shape
from walt.training.loop import train

SPRITES = Path(__file__).parents[1] / "sprites"
SUBJECTS = ("rocket", "frog", "sun")
WORLDS = {"full": World(p_two=0.5, p_gradient=0.5), "grid": replace(EMBEDDED_WORLD, subjects=SUBJECTS)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("size", "start", "frames", "crop", "rate"),
    [
        ((128, 224), 0, 5, None, 1),
        ((64, 112), 12, 4, None, 1),
        ((512, 896), 3, 1, (384, 96, 576, 288), 1),
        ((256, 448), 0, 2, (64, 64, 160, 160), 1),
        ((96, 64), 5, 6, None, 2),
    ],
)
def test_the_device_draws_what_pillow_draws(
    world: str, size: tuple[int, int], start: int, frames: int, crop: tuple[int, int, int, int] | None, rate: int
) -> None:
    theatre = EmojiTheatre(SPRITES, subjects=SUBJECTS, world=WORLDS[world])
    scenes = [theatre.scene(seed) for seed in range(5)]
    drawn = Stage(theatre, "cpu").draw([lay_out(theatre, s, *size, start, frames, crop, rate) for s in scenes])
    levels = ((drawn + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(levels - levels.round()).max() < 1e-4
    host = np.stack([theatre.render(s, *size, start, frames, crop, rate)[0] for s in scenes])
    wrong = np.abs(levels.round() - host)
    # Pillow's filters are fixed-point numbers: now and then it rounds the other way.
    assert wrong.max() <= 2 and (wrong > 0).mean() < 1e-3
    assert host.std() > 10


@pytest.mark.parametrize(
    ("height", "width", "start", "frames", "crop", "message"),
    [
        (64, 112, 25, 9, None, r"frames 25\.\.34 are not in the scene"),
        (64, 112, 0, 60, None, r"frames 0\.\.60 are not in the scene"),
        (64, 112, 0, 5, (0, 0, 96, 96), "is not inside the 64 x 112 picture"),
        (16, 112, 0, 5, None, "at least 32 pixels"),
    ],
)
def test_what_pillow_refuses_the_device_refuses(
    height: int, width: int, start: int, frames: int, crop: tuple[int, int, int, int] | None, message: str
) -> None:
    theatre = EmojiTheatre(SPRITES, subjects=SUBJECTS, world=WORLDS["grid"])
    scene = theatre.scene(1)
    for draw in (theatre.render, partial(lay_out, theatre)):
        with pytest.raises(WaltError, match=message):
            draw(scene, height, width, start, frames, crop)


def test_clips_of_other_subjects_than_stills() -> None:
    scenes = Scenes(jobs.data(subjects=("frog",), clip_subjects=("sun", "rocket")))
    stage = Stage(scenes.cast, "cpu")
    for shape in (Shape(frames=5, height=64, width=112), Shape(frames=1, height=64, width=112)):
        for number in range(4):
            clip, laid = scenes.clip(number, shape), scenes.layout(number, shape)
            assert ("frog" in clip.caption) == (shape.frames == 1)
            assert (stage.draw([laid.video])[0] - clip.video).abs().max() < 2.01 / 127.5


def test_stills_and_chunks_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """More frames than are drawn at a time, and pictures of one frame."""
    theatre = EmojiTheatre(SPRITES, subjects=SUBJECTS, world=WORLDS["grid"])
    stage = Stage(theatre, "cpu")
    layouts = [lay_out(theatre, theatre.scene(seed, 9), 64, 112, 0, 9) for seed in range(3)]
    whole = stage.draw(layouts)
    monkeypatch.setattr("walt.data.stage.FRAMES", 7)
    assert torch.equal(stage.draw(layouts), whole)
    still = theatre.scene(4, 1)
    one = stage.draw([lay_out(theatre, still, 64, 112, 0, 1)])
    assert one.shape == (1, 3, 1, 64, 112)
    host = theatre.render(still, 64, 112, 0, 1)[0]
    levels = ((one[0, :, 0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(levels - host[0]).max() < 2.01


def test_layouts_of_a_recipe_are_its_clips() -> None:
    scenes = Scenes(jobs.data())
    stage = Stage(scenes.theatre, "cpu")
    for shape in (Shape(frames=5, height=128, width=224, cut=64), Shape(frames=4, height=64, width=112, start=12)):
        for number in range(4):
            clip, laid = scenes.clip(number, shape, low_res=True), scenes.layout(number, shape, low_res=True)
            assert laid.caption == clip.caption
            for layout, video in ((laid.video, clip.video), (laid.low_res, clip.low_res)):
                assert tuple(layout.shape) == tuple(video.shape)  # type: ignore[union-attr]
                assert (stage.draw([layout])[0] - video).abs().max() < 2.01 / 127.5  # type: ignore[list-item,operator]


@pytest.mark.parametrize("kind", ["tokenizer", "denoiser", "super_resolution"])
def test_a_job_learns_alike_whoever_draws(tmp_path: Path, kind: str) -> None:
    vae = jobs.save_tokenizer(tmp_path / "vae", seed=0)

    def curve(draw: str) -> list[float]:
        output = tmp_path / draw
        if kind == "tokenizer":
            job = jobs.tokenizer_job(output, steps=3)
        else:
            job = jobs.small_job(vae, output, steps=3)  # type: ignore[assignment]
            if kind == "super_resolution":
                job = jobs.denoiser_job(vae, output, steps=3)  # type: ignore[assignment]
                model = {**job.model, "low_res_channels": 8}
                job = job.model_copy(update={"model": model, "shapes": job.shapes[:5]})
        job = job.model_copy(update={"data": jobs.data(draw=draw)})
        train(job, build_objective(job))
        return list(jobs.losses(output).values())

    host, device = curve("host"), curve("device")
    assert len(host) == 3 and device == pytest.approx(host, rel=2e-3)


def test_latents_are_the_same_whoever_draws(tmp_path: Path) -> None:
    job = jobs.small_job(jobs.save_tokenizer(tmp_path / "vae", seed=0), tmp_path / "run")
    vae = jobs.AutoencoderKLWalt.from_pretrained(tmp_path / "vae").eval()
    found = []
    for draw in ("host", "device"):
        here = job.model_copy(update={"data": jobs.data(draw=draw)})
        with torch.no_grad():
            write_latents(here, tmp_path / draw, [3] * len(job.shapes), lambda x: vae.encode(x).latent_dist.mode())
        found.append(LatentShards(tmp_path / draw, here))
    for shape in range(len(job.shapes)):
        (first, _, caption), (second, _, same) = (shards.get(shape, 2) for shards in found)
        assert caption == same and (first - second).abs().max() < 0.05 * first.std() + 1e-2


def test_class_maps_and_nuwa_are_drawn_on_the_host(tmp_path: Path) -> None:
    maps = seg_job(tmp_path / "run").model_copy(update={"data": jobs.data(draw="device")})
    tokens = jobs.nuwa_job(tmp_path, tmp_path / "run", data=jobs.data(draw="device"))
    jobs.save_nuwa_parts(tmp_path)
    for job in (maps, tokens):
        with pytest.raises(WaltError, match=r"data\.draw: .* on the host"):
            build_objective(job)
    with pytest.raises(WaltError, match=r"data\.draw: .* on the host"):
        plan_job(tokens, rate=1e9)
