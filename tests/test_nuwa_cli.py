"""`walt nuwa`: files, exit codes, one-line errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from walt import cli, nuwa_commands
from walt.data.sketches import write_sketch
from walt.errors import WaltError
from walt.media import read_image, read_video, write_image, write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "nuwa"
    tiny.nuwa_pipeline().save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of an error, which is the only one that is walt's."""
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("walt: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """An image, a video of 8 frames at 8 a second, sketches and a mask, 32 x 32."""
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (8, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    sketch = rng.integers(0, 4, (2, 4, 4)).astype(np.uint16).repeat(8, 1).repeat(8, 2)
    write_image(clip[0], tmp_path / "image.png")
    write_video(clip, tmp_path / "video.mp4", 8)
    write_sketch(sketch, tmp_path / "clip", tiny.NUWA_CLASSES)
    write_sketch(sketch[0], tmp_path / "sketch.png", tiny.NUWA_CLASSES)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, 16:] = 255
    write_image(mask, tmp_path / "mask.png")
    return tmp_path


def test_info_of_a_nuwa(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", model) == 0
    text = capsys.readouterr().out
    for words in ("NuwaTransformer3DModel", "tokens: 3x4x4 = 48", "sketch classes (4): ", "s of decoding", "32x32"):
        assert words in text, words
    assert run("info", model, "--frames", 2) == 0
    assert "tokens: 2x4x4 = 32" in capsys.readouterr().out
    assert run("info", model, "--frames", 9) == 1
    assert "--frames must be from 1 to 4" in error_of(capsys)


def test_all_eight_tasks_write_their_file(model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {
        "text-to-image": ("a cat",),
        "text-to-video": ("a cat", "--frames", 2),
        "sketch-to-image": (inputs / "sketch.png",),
        "sketch-to-video": (inputs / "clip",),
        "complete": (inputs / "image.png", "--mask", inputs / "mask.png"),
        "predict": (inputs / "video.mp4", "--given", 1, "--frames", 4),
        "edit-image": (inputs / "image.png", "a dog", "--box", "16,0,32,32"),
        "edit-video": (inputs / "video.mp4", "a dog", "--from", 1),
    }
    assert set(tasks) == set(nuwa_commands.TASKS)
    frames = {"text-to-video": 2, "sketch-to-video": 2, "predict": 4, "edit-video": 2}
    for name, arguments in tasks.items():
        still = nuwa_commands.TASKS[name].still
        path = inputs / f"out-{name}{'.png' if still else '.mp4'}"
        assert run("nuwa", name, *arguments, "-o", path, "--model", model, "--seed", 3) == 0, capsys.readouterr().err
        assert f"{frames.get(name, 1)} frame" in capsys.readouterr().out
        if still:
            assert read_image(path).shape == (32, 32, 3)
        else:
            video, fps = read_video(path)
            assert video.shape == (frames[name], 32, 32, 3) and fps == 2
    masked, boxed = (read_image(inputs / f"out-{name}.png") for name in ("complete", "edit-image"))
    assert not np.array_equal(masked, boxed)
    assert not [name for name in os.listdir(inputs) if name.startswith(".")]


def test_repeatable_and_strips(model: Path, tmp_path: Path) -> None:
    arguments = ("nuwa", "text-to-video", "a cat", "--model", model, "--candidates", 2, "--top-k", 4, "--guidance", 3)
    assert run(*arguments, "-o", tmp_path / "a.png") == 0 and run(*arguments, "-o", tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_image(tmp_path / "a.png").shape == (32, 96, 3)


def test_resize_takes_any_size(model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (70, 50), "red").save(inputs / "odd.png")
    common = ("nuwa", "predict", inputs / "odd.png", "--model", model, "-o", inputs / "x.mp4")
    assert run(*common) == 2
    assert "height=50 does not fit: it must be a multiple of 8" in error_of(capsys)
    assert run(*common, "--resize") == 0 and read_video(inputs / "x.mp4")[0].shape == (3, 32, 32, 3)


def test_upscale(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cascade = tiny.cascade_folder(tmp_path / "cascade")
    whole = cli.model_folder
    monkeypatch.setattr(
        cli, "model_folder", lambda given, name="embedded": cascade if given is None else whole(given, name)
    )
    common = ("nuwa", "text-to-video", "a cat", "--model", model, "-o", tmp_path / "x.mp4", "--upscale")
    load, asked = cli.load_cascade, list[object]()

    def note(folder: Path, dtype: torch.dtype, device: torch.device) -> object:
        asked.append(dtype)
        return load(folder, dtype, device)

    monkeypatch.setattr(cli, "load_cascade", note)
    assert run(*common, "128x224", "--dtype", "float32") == 0
    assert asked == [torch.float32]
    assert read_video(tmp_path / "x.mp4")[0].shape == (3, 128, 224, 3)
    assert run(*common, "100x224") == 2
    assert "the height must be 64 and the width a multiple of 16, or 128" in error_of(capsys)


def test_upscale_is_the_cascades(tmp_path: Path) -> None:
    frames = torch.rand(1, 3, 16, 16, generator=tiny.seeded(3))
    cascade = tiny.cascade(fidelity=0.5)
    cascade.save_pretrained(tmp_path)
    made = nuwa_commands.upscale(frames, 64, 64, tmp_path, "a cat", 5, "cpu", "float32")
    call: dict[str, Any] = {"generator": tiny.seeded(5), "output_type": "pt", "fidelity": 0.5}
    wanted = cascade.upscale(frames[None], "a cat", 4, **call).frames[0]
    assert made.shape == (1, 3, 64, 64) and torch.allclose(made, wanted, atol=1e-4)


def test_fitting_keeps_the_middle() -> None:
    frames = torch.arange(8.0).view(1, 1, 1, 8).expand(2, 3, 4, 8)
    assert nuwa_commands.frame_to_width(frames, 4)[0, 0, 0].tolist() == [2, 3, 4, 5]
    assert nuwa_commands.frame_to_width(frames, 11)[0, 0, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert nuwa_commands.frame_to_width(frames, 8) is frames


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: TASK"),
        (("text-to-imag", "a", "-o", "x.png"), "invalid choice"),
        (("text-to-image", "", "-o", "x.png"), "PROMPT is empty"),
        (("text-to-image", "a"), "required: -o/--output"),
        (("text-to-image", "a", "-o", "x.mp4"), "must end in .png"),
        (("text-to-video", "a", "-o", "x.mp4", "--frames", "0"), "--frames must be at least 1"),
        (("text-to-video", "a", "-o", "x.mp4", "--top-p", "0"), "--top-p must be above 0"),
        (("export", "x", "--sketch-top-p", "1.5"), "--sketch-top-p must be above 0 and at most 1, got 1.5"),
        (("export", "x", "--prediction-top-p", "0"), "--prediction-top-p must be above 0 and at most 1, got 0.0"),
        (("export", "x", "--context-guidance", "-1"), "--context-guidance must be at least 0 and finite, got -1.0"),
        (("predict", "v.mp4", "-o", "x.mp4", "--context-guidance", "-1"), "--context-guidance must be at least 0"),
        (("predict", "v.mp4", "-o", "x.mp4", "--context-guidance", "inf"), "at least 0 and finite, got inf"),
        (("text-to-video", "a", "-o", "x.mp4", "--fps", "inf"), "--fps must be positive and finite, got inf"),
        (("text-to-video", "a", "-o", "x.mp4", "--candidates", "0"), "--candidates must be at least 1"),
        (("text-to-video", "a", "-o", "x.mp4", "--clip", "x"), "say how many with --candidates"),
        (
            ("predict", "a.mp4", "-o", "x.mp4", "--candidates", "2"),
            "--candidates: they are scored by how well they fit",
        ),
        (("sketch-to-image", "s.png", "-o", "x.png", "--clip", "x"), "this task has none"),
        (("text-to-video", "a", "-o", "x.mp4", "--upscale", "512"), "--upscale must be HEIGHTxWIDTH"),
        (("complete", "i.png", "-o", "x.png"), "say what to make anew"),
        (("complete", "i.png", "-o", "x.png", "--box", "1,2,3"), "--box must be LEFT,TOP,RIGHT,BOTTOM"),
        (("edit-video", "v.mp4", "a", "-o", "x.mp4", "--from", "0"), "--from must be at least 1"),
        (("predict", "v.mp4", "-o", "x.mp4", "--given", "0"), "--given must be at least 1"),
        (("text-to-image", "a", "-o", "x.png", "--model", "none"), 'there is no folder "none"'),
    ],
)
def test_usage_errors(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("nuwa", *arguments) == 2
    assert message in error_of(capsys)
    assert os.listdir(tmp_path) == []


def test_what_does_not_fit_the_model(model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32), (7, 7, 7)).save(inputs / "unknown.png")
    Image.new("RGB", (30, 32)).save(inputs / "narrow.png")
    before = sorted(os.listdir(inputs))
    for task, arguments, message in [
        ("sketch-to-image", (inputs / "unknown.png",), "1024 pixels are of no known class, the first is #070707"),
        ("sketch-to-image", (inputs / "clip",), "holds 2 frames; sketch-to-image takes one"),
        ("sketch-to-image", (inputs / "narrow.png",), "width=30 does not fit: it must be a multiple of 8"),
        ("sketch-to-video", (inputs / "video.mp4",), "must be a PNG or a folder of PNGs"),
        ("sketch-to-image", (inputs / "none.png",), "there is no file"),
        ("complete", (inputs / "image.png", "--box", "0,0,40,8"), "is not inside the image of 32x32"),
        ("predict", (inputs / "video.mp4", "--given", 3), "--given 3, but the video has 2 frames"),
        ("predict", (inputs / "video.mp4", "--frames", 9), "9 frames of 32x32 are more than this model makes"),
        ("edit-video", (inputs / "video.mp4", "a", "--from", 2), "a frame from 1 to 1 of the 2 given, got 2"),
    ]:
        output = inputs / ("x.png" if nuwa_commands.TASKS[task].still else "x.mp4")
        assert run("nuwa", task, *arguments, "-o", output, "--model", model) == 2
        assert message in error_of(capsys)
    assert sorted(os.listdir(inputs)) == before


def test_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cascade = tiny.cascade_folder(tmp_path / "cascade")
    assert run("nuwa", "text-to-image", "a", "-o", tmp_path / "x.png", "--model", cascade) == 1
    assert "is a WaltCascadePipeline; a NuwaPipeline is needed" in error_of(capsys)


def test_clip_ranks_by_cosine(tmp_path: Path) -> None:
    """A tiny CLIP with random weights from a folder: scores are CLIPSIM of its own features."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "c": 3, "a": 4, "t</w>": 5}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    tokenizer = CLIPTokenizer(vocab=words, merges=[], pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path)
    frames = torch.rand(3, 3, 2, 32, 32, generator=tiny.seeded(0)) * 2 - 1
    scores = nuwa_commands.clip_ranker(tmp_path, torch.device("cpu"))(["a cat"] * 3, frames)
    assert scores.shape == (3,) and len(set(scores.tolist())) == 3 and bool((scores.abs() <= 1).all())
    alone = nuwa_commands.clip_ranker(tmp_path, torch.device("cpu"))(["a cat"], frames[1:2])
    assert float(alone[0]) == pytest.approx(float(scores[1]), abs=1e-5)
    with pytest.raises(WaltError, match="holds no CLIP model"):
        nuwa_commands.clip_ranker(tmp_path / "none", torch.device("cpu"))
