"""The command line: files, exit codes, one-line errors, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from walt import cli
from walt.errors import WaltError
from walt.media import read_image, read_video
from walt.pipelines.loading import check_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.cascade_folder(tmp_path_factory.mktemp("model") / "tiny")
    words = {"subjects": ["rocket", "cat"], "backgrounds": ["purple"], "motions": ["flies up"], "seed": 1}
    (folder / "world.json").write_text(json.dumps(words))
    return folder


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error may take."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("walt: error: "), lines
    return lines[0]


def test_video_is_complete_and_repeatable(model: Path, tmp_path: Path) -> None:
    arguments = ("sample", "a rocket", "--model", model, "--steps", 1, "--seed", 3)
    assert run(*arguments, "-o", tmp_path / "a.mp4") == 0
    video, fps = read_video(tmp_path / "a.mp4")
    assert video.shape == (29, 64, 64, 3) and fps == 8
    assert run(*arguments, "-o", tmp_path / "b.mp4") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def test_stills_are_numbered_and_each_is_as_alone(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog jumps\n")
    common = ("--model", model, "--stages", 2, "--steps", 2, 1, "--guidance", 3)
    assert run("sample", "a rocket", "--prompts-file", prompts, "-o", tmp_path / "x.png", *common) == 0
    names = ["x-0.png", "x-1.png", "x-2.png"]
    assert sorted(os.listdir(tmp_path)) == ["prompts.txt", *names]
    images = [read_image(tmp_path / name) for name in names]
    assert images[0].shape == (32, 32, 3) and not np.array_equal(images[0], images[1])
    assert run("sample", "a dog jumps", "-o", tmp_path / "alone.png", *common) == 0
    assert np.array_equal(read_image(tmp_path / "alone.png"), images[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smple",), 'unknown command "smple" (did you mean "sample"?)'),
        ((), "required: COMMAND"),
        (("sample", "a cat"), "required: -o/--output"),
        (("sample", "-o", "x.mp4"), "give a prompt"),
        (("sample", "a", "-o", "x.gif"), "must end in .mp4"),
        (("sample", "a", "-o", "none/x.mp4"), "no folder"),
        (("sample", "a", "-o", "x.mp4", "--frames", "30"), "nearest are 29 and 41"),
        (("sample", "a", "-o", "x.png", "--frames", "17"), "does not go with the still"),
        (("sample", "a", "-o", "x.mp4", "--stages", "4"), "invalid choice"),
        (("sample", "a", "-o", "x.mp4", "--seed", "x"), "invalid int value"),
        (("sample", "a", "-o", "x.mp4", "--steps", "0"), "--steps takes one number"),
        (("sample", "a", "-o", "x.mp4", "--prompts-file", "none.txt"), "none.txt"),
        (("sample", "a", "-o", "x.mp4", "--model", "none"), 'there is no folder "none"'),
        (("info", "none"), 'there is no folder "none"'),
        (("info", "--frames", "18"), "nearest are 17 and 29"),
        (("info", "--frames", "0"), "num_frames must be a positive integer"),
        (("sample", "a", "-o", "x.mp4", "--guidance", "nan"), "--guidance takes one number"),
        (("sample", "a", "-o", "x.mp4", "--guidance", "inf"), "--guidance takes one number"),
        (
            ("sample", "a", "-o", "x.mp4", "--context-guidance", "inf"),
            "--context-guidance must be at least 0 and finite",
        ),
        (("train", "emoji.base", "--dry-run", "run.stepz=1"), "run.stepz"),
        (("encode", "emoji.base", "-o", "x", "-n", "1,2", "run.steps=0"), "run.steps"),
        (("encode", "emoji.base", "-o", "x", "extra"), "unrecognized arguments: extra"),
        (("sample", "a", "-o", "x.mp4", "a=b"), "unrecognized arguments: a=b"),
        (("sample", "a", "-o", "x.mp4", "--anchor-every", "-1"), "--anchor-every must be at least 0, got -1"),
    ],
)
def test_usage_errors(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in error_of(capsys)
    assert os.listdir(tmp_path) == []


def test_what_does_not_fit_the_model_is_usage_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("sample", "a", "-o", tmp_path / "x.mp4", "--model", model)
    for wrong, message in [
        (("--height", "100"), "height=100 does not fit: it must be a multiple of 32"),
        (("--steps", "2", "2"), "--steps takes one number, or 3 for 3 stages"),
        (("--device", "gpu9"), '--device "gpu9" cannot be used'),
    ]:
        assert run(*common, *wrong) == 2
        assert message in error_of(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("CUDA out of memory. Tried to allocate", True),
        ("an illegal memory access was encountered", False),
        ("unsupported memory format option Preserve", False),
    ],
)
def test_only_an_allocation_that_failed_is_out_of_memory(
    said: str, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other faults that have memory in their words keep their own."""

    def fail(args: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setitem(cli.COMMANDS, "info", cli.COMMANDS["info"]._replace(run=fail))
    if ours:
        assert run("info", tmp_path) == 1 and "out of memory: try fewer --stages" in error_of(capsys)
    else:
        with pytest.raises(RuntimeError, match=said):
            run("info", tmp_path)


def test_without_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    assert run("sample", "a", "-o", tmp_path / "x.mp4") == 2
    assert "no embedded model: pass --model FOLDER" in error_of(capsys)


def damage(folder: Path, kind: str) -> str:
    """Breaks a copy of the model and returns what the error must name."""
    weights = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "header":
        weights.write_bytes(weights.read_bytes()[:100])
    elif kind == "garbage":
        data = weights.read_bytes()
        weights.write_bytes(data[:8] + b"?" * 50 + data[58:])
    elif kind == "weights":
        weights.unlink()
        return "transformer_2"
    elif kind == "component":
        shutil.rmtree(folder / "vae")
        return '"vae"'
    elif kind == "json":
        (folder / "transformer" / "config.json").write_text("{")
        return "config.json"
    elif kind == "index":
        (folder / "model_index.json").unlink()
        return "model_index.json"
    elif kind == "foreign":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
        return "OtherPipeline"
    return weights.name


@pytest.mark.parametrize("kind", ["truncated", "header", "garbage", "weights", "component", "json", "index", "foreign"])
def test_damaged_models(kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    assert check_folder(folder)["_class_name"] == "WaltCascadePipeline"
    name = damage(folder, kind)
    assert run("sample", "a", "-o", tmp_path / "x.mp4", "--model", folder) == 1
    assert name in error_of(capsys)
    assert os.listdir(tmp_path) == ["copy"]


def test_full_disk_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    common = ("--model", model, "--stages", 1, "--steps", 1)
    assert run("sample", "a", "-o", tmp_path / "x.png", *common) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f'walt: error: cannot write "{tmp_path}/x.png": No space left on device')
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM: nothing was written")],
)
def test_a_signal_leaves_no_file(model: Path, tmp_path: Path, sent: signal.Signals, code: int, said: str) -> None:
    arguments = ["sample", "a", "-o", str(tmp_path / "x.mp4"), "--model", str(model), "--steps", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "walt", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell job ignores it
    )
    assert process.stderr is not None
    seen = process.stderr.readline()  # the prompt is printed when sampling begins
    time.sleep(1)
    process.send_signal(sent)
    _, rest = process.communicate(timeout=240)
    assert process.returncode == code, rest
    assert seen.strip() == "a" and rest.strip().splitlines()[-1] == f"walt: error: {said}" and "Traceback" not in rest
    assert os.listdir(tmp_path) == []


def test_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", model) == 0
    text = capsys.readouterr().out
    for words in ("transformer_3", "AutoencoderKLWalt", "64x64", "subjects (2): rocket, cat", "motions (1): flies up"):
        assert words in text
    assert "estimate for 29 frames" in text and "GiB" in text


def test_counted_operations_match_a_hand_count() -> None:
    """The linear layers of a denoiser without attention to count: 2 x weights x tokens, within the small rest."""
    from walt.evaluation.cost import _count_forward

    model = tiny.transformer(text_dim=None, num_layers=2)
    flops, largest = _count_forward(model, (8, 5, 2, 2))
    width, tokens = 16, 20
    blocks = 2 * (2 * 12 * width**2) * tokens
    assert blocks < flops < 2.5 * blocks and largest > 0


def test_only_guided_steps_cost_twice() -> None:
    import torch

    from walt.evaluation.cost import describe

    def base(**settings: Any) -> float:
        return describe(tiny.cascade(base_steps=10, **settings), 5, torch.device("cpu"), torch.float32).stages[0].flops

    one = base(base_guidance_scale=1.0)
    whole = base() - one
    assert base(base_guidance_start=0.25, base_guidance_stop=0.6) - one == pytest.approx(0.3 * whole)


def test_base_alone_is_a_cascade_of_one_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.base_pipeline().save_pretrained(tmp_path / "base")
    assert run("sample", "a cat", "-o", tmp_path / "x.png", "--model", tmp_path / "base", "--steps", 1) == 0
    assert read_image(tmp_path / "x.png").shape == (16, 16, 3)
    tiny.class_pipeline().save_pretrained(tmp_path / "classes")
    capsys.readouterr()
    assert run("sample", "a cat", "-o", tmp_path / "y.png", "--model", tmp_path / "classes") == 1
    assert "takes classes, not prompts" in error_of(capsys)


def test_bfloat16_is_chosen_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu = torch.device("cpu")
    for has, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert cli.choose_dtype("auto", cpu) == expected
    assert cli.choose_dtype("float32", cpu) == torch.float32
    with pytest.raises(WaltError):
        cli.choose_device("gpu9")
