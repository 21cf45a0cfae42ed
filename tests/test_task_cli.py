"""`walt animate`, `extend`, `fill`, ...: files, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import inspect
import os
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from walt import cli
from walt.diffusion import GuidanceOptions, ScaleSchedule
from walt.media import read_image, read_video, write_image, write_video
from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.cascade_folder(tmp_path_factory.mktemp("model") / "cascade")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Pictures, a video of 9 frames at 6 a second and masks, 16 x 16."""
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (9, 2, 2, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_image(clip[0], tmp_path / "a.png")
    write_image(clip[1], tmp_path / "b.png")
    write_image(clip[0].repeat(2, 0), tmp_path / "tall.png")
    write_video(clip, tmp_path / "clip.mp4", 6)
    write_video(clip[:1], tmp_path / "one.mp4", 6)
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 9)
    Image.fromarray(clip[0]).save(tmp_path / "still.gif")
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:, 8:] = 255
    write_image(mask, tmp_path / "mask.png")
    return tmp_path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("walt: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_every_task_writes_its_file(model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, a, b = inputs / "clip.mp4", inputs / "a.png", inputs / "b.png"
    tasks: dict[str, tuple[tuple[object, ...], int]] = {
        "animate": ((a, "--last", b, "--frames", 9), 9),
        "interpolate": ((a, b, a, "--at", 0, 1, 6), 7),
        "predict": ((clip, "--frames", 9), 9),
        "extend": ((clip, "--frames", 3), 12),
        "loop": ((clip, "--frames", 4), 13),
        "connect": ((clip, clip, "--frames", 4), 22),
        "fill": ((clip, "--box", "0,0,8,8", "--time", "2,5"), 9),
        "outpaint": ((clip, "--left", 8), 9),
        "edit": ((clip, "--strength", 1, "--mask", inputs / "mask.png"), 9),
    }
    for name, (arguments, frames) in tasks.items():
        output = inputs / f"{name}.mp4"
        code = run(name, "a cat", *arguments, "-o", output, "--model", model, "--stages", 1, "--steps", 1)
        assert code == 0, (name, capsys.readouterr().err)
        made, fps = read_video(output)
        assert made.shape == (frames, 16, 24 if name == "outpaint" else 16, 3), name
        assert fps == (8 if name in ("animate", "interpolate") else 6), name
    assert "edit.mp4: 9 frames of 16x16, seed 0" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["fill", "edit"])
def test_a_region_keeps_the_rest_through_all_stages(task: str, model: Path, inputs: Path) -> None:
    """The picture has the size of the last stage: outside the box its own pixels come back."""
    large = np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8)
    write_image(large, inputs / "large.png")
    arguments = ("large.png", "--box", "8,8,24,24", "-o", "filled.png", "--model", model, "--stages", 2, "--steps", 2)
    code = run(task, "a cat", *(inputs / str(a) if str(a).endswith(".png") else a for a in arguments))
    assert code == 0
    made = read_image(inputs / "filled.png")
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    assert np.array_equal(made[outside], large[outside]) and not np.array_equal(made, large)


def test_upscale(model: Path, inputs: Path) -> None:
    for arguments, size in ((("--scale", 2), 32), ((), 64)):
        code = run(
            "upscale", inputs / "clip.mp4", "-o", inputs / "x.mp4", "--prompt", "a cat", "--model", model, *arguments
        )
        made, fps = read_video(inputs / "x.mp4")
        assert code == 0 and made.shape == (9, size, size, 3) and fps == 6
    code = run("upscale", inputs / "tall.png", "-o", inputs / "x.png", "--prompt", "a", "--scale", 2, "--model", model)
    assert code == 0 and read_image(inputs / "x.png").shape == (64, 32, 3)


def test_negative_prompts_reach_all_stages(model: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stream = WaltCascadePipeline.upscale_stream

    def note(self: Any, *args: Any, **call: Any) -> Any:
        seen.append(inspect.signature(stream).bind(self, *args, **call).arguments.get("negative_prompt"))
        return stream(self, *args, **call)

    monkeypatch.setattr(WaltCascadePipeline, "upscale_stream", note)
    common = ("--model", model, "--stages", 2, "--steps", 1, "--negative-prompt", "a dog", "-o", inputs / "x.mp4")
    assert run("animate", "a cat", inputs / "a.png", "--frames", 5, *common) == 0
    assert seen == ["a dog"]


def test_directions_differ(model: Path, inputs: Path) -> None:
    made = []
    for option in ((), ("--backward",), ("--before",), ("--conditioning", "repaint")):
        output = inputs / "x.mp4"
        common = ("-o", output, "--model", model, "--stages", 1, "--steps", 1, "--frames", 4)
        assert run("extend", "a cat", inputs / "clip.mp4", *common, *option) == 0
        made.append(read_video(output)[0])
    assert all(not np.array_equal(made[i], made[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("stages", [1, 2])
def test_guidance_is_spread_and_bounded_in_every_task(stages: int, model: Path, inputs: Path) -> None:
    """`--guidance-low 0` right away leads every other step away from the prompt; a threshold bounds what is made."""
    clip, picture = inputs / "clip.mp4", inputs / "a.png"
    tasks: dict[str, tuple[object, ...]] = {
        "animate": ("a cat", picture, "--frames", 5),
        "interpolate": ("a cat", picture, inputs / "b.png"),
        "predict": ("a cat", clip, "--frames", 9),
        "extend": ("a cat", clip, "--frames", 4),
        "loop": ("a cat", clip, "--frames", 4),
        "connect": ("a cat", clip, clip, "--frames", 4),
        "fill": ("a cat", clip, "--box", "0,0,8,8"),
        "outpaint": ("a cat", clip, "--left", 8),
        "edit": ("a cat", clip, "--strength", 1),
        "upscale": (clip, "--prompt", "a cat", "--scale", 2),
    }
    options: tuple[tuple[object, ...], ...] = (
        (),
        ("--guidance-schedule", "oscillating", "--guidance-hold", 0, "--guidance-low", 0),
        ("--guidance-schedule", "power-cosine"),
        ("--guidance-start", 0.4),
        ("--threshold", 0.3),
        ("--threshold", 0.01, "--threshold-percentile", 0.5),
    )
    output = inputs / "x.mp4"
    for name in tasks if stages == 1 else ("edit",):
        made = []
        for option in options if name == "edit" else options[:2]:
            common: tuple[object, ...] = ("-o", output, "--model", model, "--steps", 2, "--guidance", 20)
            common += () if name == "upscale" else ("--stages", stages)
            assert run(name, *tasks[name], *common, *option) == 0, (name, option)
            made.append(read_video(output)[0])
        assert all(not np.array_equal(*pair) for pair in combinations(made, 2)), name


@pytest.mark.parametrize("stages", [1, 2])
def test_a_model_may_say_where_its_base_is_guided(stages: int, model: Path, inputs: Path) -> None:
    tiny.cascade(base_guidance_start=0.2, base_guidance_stop=0.7).save_pretrained(inputs / "part")
    part = ("--guidance-start", 0.2, "--guidance-stop", 0.7)
    made = []
    for folder, options in (
        (model, ()),
        (model, part),
        (inputs / "part", ()),
        (inputs / "part", ("--guidance-start", 0)),
    ):
        common = ("-o", inputs / "x.mp4", "--model", folder, "--steps", 5, "--guidance", 20, "--stages", stages)
        assert run("animate", "a cat", inputs / "a.png", "--frames", 5, *common, *options) == 0
        made.append(read_video(inputs / "x.mp4")[0].astype(int))
    off = [[float(np.abs(one - other).mean()) for other in made] for one in made]
    assert max(off[1][2], off[0][3]) < 1 < 2 < off[0][1]  # the last bits of pixels, and what a video file makes of them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("animate", "a", "a.png"), 'animate makes a video and "'),
        (("interpolate", "a", "a.png", "b.png"), 'interpolate makes a video and "'),
        (("predict", "a", "clip.mp4"), 'predict makes a video and "'),
        (("extend", "a", "clip.mp4"), 'extend makes a video and "'),
        (("loop", "a", "clip.mp4"), 'loop makes a video and "'),
        (("connect", "a", "clip.mp4", "clip.mp4"), 'connect makes a video and "'),
        (("fill", "a", "clip.mp4", "--box", "0,0,8,8"), "the video has 9 frames and "),
        (("outpaint", "a", "clip.mp4", "--left", 8), "the video has 9 frames and "),
        (("edit", "a", "clip.mp4"), "the video has 9 frames and "),
    ],
)
def test_a_picture_for_a_video_is_refused_before_a_model_is_loaded(
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr(cli, "load_cascade", lambda *_: pytest.fail("a model was loaded"))
    files = (inputs / str(a) if str(a).endswith((".png", ".mp4")) else a for a in arguments)
    assert run(*files, "-o", inputs / "out.png", "--model", inputs) == 2
    told = error_of(capsys)
    assert message in told and 'out.png" is a picture: write an .mp4' in told


def test_guidance_options_are_those_of_the_pipelines() -> None:
    """The parser names the schedules itself, without torch."""
    parser = argparse.ArgumentParser()
    cli.add_guidance(parser.add_argument)
    assert parser.parse_args([]).guidance_schedule == "constant"
    assert cli.guidance_options(parser.parse_args([])) == GuidanceOptions()
    (schedule,) = (action for action in parser._actions if action.dest == "guidance_schedule")
    assert schedule.choices == get_args(ScaleSchedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("animate", "a", "no.png"), 'there is no file "'),
        (("animate", " ", "a.png"), "the prompt is empty"),
        (("animate", "a", "clip.mp4"), "a picture is needed, not a video of 9 frames"),
        (("animate", "a", "a.png", "--last", "tall.png"), "has the sizes 16x16 and 32x16"),
        (("animate", "a", "a.png", "--frames", 18), "nearest are 17 and 29"),
        (("animate", "a", "a.png", "--height", 17, "--stages", 2), "must be a multiple of 2"),
        (("animate", "a", "a.png", "--stages", 2, "--resample-steps", 3), "resample_steps above 1 needs"),
        (("interpolate", "a", "a.png", "b.png", "--at", 0), "one frame for each of the 2 pictures"),
        (("predict", "a", "clip.mp4", "--given", 10), "--given must be from 1 to the video's 9 frames"),
        (("predict", "a", "clip.mp4", "--given", 4), "does not fill latents"),
        (("extend", "a", "clip.mp4", "--backward", "--before"), "give one"),
        (("loop", "a", "clip.mp4", "--frames", 6), "must be a multiple of 4"),
        (("fill", "a", "clip.mp4"), "give --mask or --box"),
        (("fill", "a", "clip.mp4", "--box", "0,0,99,8"), "does not lie in the 16x16 pixels"),
        (("fill", "a", "clip.mp4", "--box", "1,2"), "takes 4 whole numbers"),
        (("fill", "a", "clip.mp4", "--mask", "mask.png", "--time", "5,9"), "does not lie in the 9 frames"),
        (("fill", "a", "clip.mp4", "--mask", "tall.png"), "of the same size"),
        (("outpaint", "a", "clip.mp4"), "needs pixels to add"),
        (("edit", "a", "clip.mp4", "--strength", 2), "strength must be a number from 0 to 1"),
        (("edit", "a", "clip.mp4", "--fps", 0), "--fps must be positive"),
        (("edit", "a", "clip.mp4", "--fps", "inf"), "--fps must be positive and at most 1000, got inf"),
        (("edit", "a", "clip.mp4", "--fps", 1e9), "--fps must be positive and at most 1000, got 1000000000.0"),
        (("edit", "a", "clip.mp4", "--guidance", "inf"), "--guidance must be at least 0 and finite, got inf"),
        (("edit", "a", "clip.mp4", "--time", "0,3"), "give --mask or --box"),
        (("fill", "a", "clip.mp4", "--mask", "mask.png", "--box", "0,0,8,8"), "give --mask or --box, one of them"),
        (("animate", "a", "a.png", "--height", -16), "--height must be at least 1 pixel, got -16"),
        (("animate", "a", "a.png", "--width", 0), "--width must be at least 1 pixel, got 0"),
        (("loop", "a", "one.mp4"), "needs a video of at least 9 frames, got 1: extend it first"),
        (("predict", "a", "junk.mp4"), 'junk.mp4" as a video'),
        (("upscale", "junk.mp4", "--prompt", "a"), 'junk.mp4": '),
        (("upscale", "clip.mp4", "--prompt", " "), "--prompt is empty"),
        (("loop", "a", "clip.mp4", "--guidance-schedule", "cosine"), "invalid choice: 'cosine'"),
        (
            ("loop", "a", "clip.mp4", "--guidance-schedule", "oscillating", "--guidance", 1),
            "--guidance-schedule oscillating does nothing without guidance",
        ),
        (
            ("upscale", "clip.mp4", "--prompt", "a", "--guidance-schedule", "power-cosine", "--guidance", 0.5),
            "--guidance-schedule power-cosine does nothing without guidance",
        ),
        (("loop", "a", "clip.mp4", "--guidance-hold", -1), "hold and low of oscillating guidance must be at least 0"),
        (("loop", "a", "clip.mp4", "--guidance-low", "nan"), "hold and low of oscillating guidance must be at least 0"),
        (("fill", "a", "clip.mp4", "--guidance-power", 0), "power of power-cosine guidance must be positive, got 0.0"),
        (
            ("fill", "a", "clip.mp4", "--guidance-start", 0.5, "--guidance-stop", 0.5),
            "guidance must start and stop between 0 and 1, in this order, got 0.5 and 0.5",
        ),
        (
            ("loop", "a", "clip.mp4", "--guidance-stop", 0.5, "--guidance", 1),
            "--guidance-stop 0.5 does nothing without guidance",
        ),
        (("edit", "a", "clip.mp4", "--threshold", -2), "threshold of predicted latents must be positive, got -2.0"),
        (("edit", "a", "clip.mp4", "--threshold-percentile", 0.9), "go with a threshold"),
        (("edit", "a", "clip.mp4", "--guidance", "nan"), "--guidance must be at least 0 and finite, got nan"),
        (("upscale", "clip.mp4", "--threshold", 0), "threshold of predicted latents must be positive"),
        (("upscale", "clip.mp4", "--fidelity", 1.1), "--fidelity must be from 0 to 1, got 1.1"),
        (("upscale", "clip.mp4", "--fidelity", "nan"), "--fidelity must be from 0 to 1, got nan"),
        (("upscale", "no.mp4"), "there is no file"),
        (("upscale", "a.png"), "must both be videos, or both pictures"),
        (("upscale", "still.gif", "--fps", 4), "holds a single picture: give it as .png"),
        (("upscale", "clip.mp4", "--scale", 3, "--prompt", "a"), "scale must be 2, 4"),
        (("upscale", "clip.mp4"), "give the prompt of the video"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    model: Path, inputs: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    before = sorted(os.listdir(inputs))
    files = (inputs / str(a) if str(a).endswith((".png", ".mp4", ".gif")) else a for a in arguments)
    steps = () if arguments[0] == "upscale" else ("--steps", 1)
    assert run(*files, "-o", inputs / "out.mp4", "--model", model, *steps) in (1, 2)
    assert message in error_of(capsys)
    assert sorted(os.listdir(inputs)) == before
