"""docs/tutorial.md is run, every block of it, in miniature: tiny videos, tiny models, a few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from walt import commands
from walt.cli import main
from walt.media import read_video, write_image, write_video

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
SMALL = {
    "media.tokenizer": [
        "model.encoder_widths=[8, 8]",
        "model.decoder_widths=[8, 8]",
        "model.layers_per_block=1",
        "loss.perceptual_weights=null",
        "shapes=[{frames: 5, height: 32, width: 64, cut: 32}, {frames: 1, height: 32, width: 64}]",
        "batch_pixels=20480",
        "shortcut_batches=2",
        "run.steps=3",
    ],
    "media.base": [
        "model.num_layers=2",
        "model.attention_head_dim=8",
        "model.ffn_dim=32",
        "model.sample_size=[2, 4, 8]",
        "shapes=[{frames: 5, height: 32, width: 64}, {frames: 1, height: 32, width: 64}]",
        "batch_tokens=64",
        "run.steps=3",
    ],
}
LATER = ["run.wandb=false", "data.index=index"]


def make_videos(folder: Path) -> None:
    """A user's folder: moving squares, one file of them broken, one portrait, and a still."""
    folder.mkdir()
    for number, (height, width) in enumerate([(48, 96), (96, 48), (64, 64), (48, 96)]):
        frames = np.full((20, height, width, 3), 40 * number, np.uint8)
        for i in range(20):
            frames[i, 8:24, i : i + 16] = (220, 30, 30)
        write_video(frames, folder / f"clip{number}.mp4", fps=12)
        (folder / f"clip{number}.txt").write_text("a red ball rolls to the right\na ball\n")
    (folder / "broken.mp4").write_bytes((folder / "clip0.mp4").read_bytes()[:700])
    (folder / "broken.txt").write_text("lost")
    write_image(np.full((64, 64, 3), 128, np.uint8), folder / "still.png")
    (folder / "still.txt").write_text("a gray square")


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"```(sh|python)\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)


@pytest.mark.slow
def test_every_step_of_the_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_videos(tmp_path / "videos")
    # The weights of the perceptual loss are fetched, which a test does not do; their recipe goes without them.
    monkeypatch.setattr(commands, "_lpips", lambda args, console: Path("cache/lpips_vgg.safetensors"))
    ran = []
    for kind, text in blocks():
        if kind == "python":
            exec(compile(text, str(TUTORIAL), "exec"), {})
            continue
        for line in text.strip().splitlines():
            program, command, *arguments = shlex.split(line)
            assert program == "walt"
            ran.append(command)
            if command in ("train", "encode"):
                arguments[1:1] = SMALL[arguments[0]] + LATER
            if command == "data" and arguments[0] == "check":
                arguments += ["--index", "index"]
            if command == "sample":
                arguments += ["--frames", "5", "--height", "32", "--width", "64", "--steps", "2"]
            assert main([command, *arguments]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert ran == ["data", "data", "train", "encode", "train", "sample"]
    assert "broken.mp4: cut off" in told and "6 items, 1 skipped (1 cut off)" in told
    assert {json.loads(line)["item"] for line in Path("runs/my-base/skipped.jsonl").read_text().splitlines()} == {
        "broken.mp4"
    }
    assert len((tmp_path / "runs/my-base/log.jsonl").read_text().splitlines()) >= 1
    frames, _ = read_video("ball.mp4")
    assert frames.shape == (5, 32, 64, 3)


def test_the_tutorial_names_every_reason() -> None:
    from walt.media import REASONS

    text = TUTORIAL.read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []
