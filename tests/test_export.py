"""`walt export`: trained parts become one folder that samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from walt import cli
from walt.media import read_video


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a cascade with a temporal stage is exported from."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.vae().save_pretrained(folder / "vae")
    tiny.transformer().save_pretrained(folder / "base")
    tiny.super_resolution_transformer(4, 2).save_pretrained(folder / "sr1")
    tiny.super_resolution_transformer(5, 4).save_pretrained(folder / "sr2")
    tiny.super_resolution_transformer(6, 1, low_res_scale=1, text_dim=None).save_pretrained(folder / "temporal")
    tiny.bert().save_pretrained(folder / "text_encoder")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def export(parts: Path, output: Path, **changes: Path | str) -> int:
    folders = {name: parts / name for name in ("vae", "base", "sr1", "sr2", "temporal")} | {"text": parts} | changes
    options = [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]
    settings = ("--base-steps", "2", "--sr-steps", "1", "--guidance-start", "0.25", "--guidance-stop", "0.6")
    return cli.main(["export", str(output), *options, *settings])


def test_a_temporal_stage_is_exported_and_makes_16_frames_per_second(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert export(parts, folder) == 0
    assert json.loads((folder / "model_index.json").read_text())["temporal_super_resolution"][1]
    assert not list(tmp_path.glob(".*")) and (folder / "world.json").is_file()

    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(folder))
    assert pipe.base_guidance_options.part == (0.25, 0.6)
    temporal = tiny.super_resolution_transformer(6, 1, low_res_scale=1, text_dim=None)
    for name, value in temporal.state_dict().items():
        torch.testing.assert_close(
            pipe.temporal_super_resolution.state_dict()[name], value.half().float(), rtol=0, atol=0
        )
    call = {"num_frames": 9, "stages": 2, "output_type": "pt"}
    doubled = pipe("a cat", generator=tiny.seeded(0), double_frame_rate=True, **call).frames
    plain = pipe("a cat", generator=tiny.seeded(0), **call).frames
    assert doubled.shape == (1, 17, 3, 32, 32) and plain.shape == (1, 9, 3, 32, 32)

    video = tmp_path / "x.mp4"
    arguments = (
        "a cat",
        "-o",
        video,
        "--model",
        folder,
        "--frames",
        9,
        "--stages",
        2,
        "--fps",
        16,
        "--dtype",
        "float32",
    )
    assert cli.main(["sample", *map(str, arguments)]) == 0
    made, fps = read_video(video)
    assert made.shape == (17, 32, 32, 3) and fps == 16

    # A second export takes the first one's place.
    (folder / "README.md").write_text("card")
    (folder / "old").mkdir()
    assert len(json.loads((folder / "world.json").read_text())["subjects"]) == 8
    assert export(parts, folder, world="large") == 0
    assert (folder / "README.md").read_text() == "card" and not (folder / "old").exists()
    words = json.loads((folder / "world.json").read_text())
    assert len(words["subjects"]) == 64 and "locomotive" in words["subjects"]


def test_export_errors_are_one_line_and_delete_nothing(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, changes, message in (
        ("new", {"temporal": parts / "sr1"}, "temporal_super_resolution needs a transformer with low_res_channels and"),
        ("new", {"temporal": parts / "none"}, "temporal_super_resolution: no model in"),
        ("new", {"temporal": parts / "vae"}, "is of class AutoencoderKLWalt, WaltTransformer3DModel is needed"),
        ("new", {"base": parts / "sr1"}, "transformer must be a base, without low_res_channels"),
        ("new", {"sr1": parts / "temporal"}, "transformer_2 needs a super-resolution transformer"),
        ("new", {"text": parts / "none"}, "tokenizer"),
        ("mine", {}, "holds other files than a model"),
        ("file", {}, "is a file"),
    ):
        assert export(parts, tmp_path / name, **changes) in (1, 2), changes
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("walt: error: ")]
        assert len(errors) == 1 and message in errors[0], (changes, lines)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    assert (tmp_path / "mine" / "photo.txt").read_text() == (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--base-steps", "0"),
        ("--sr-steps", "-1"),
        ("--guidance", "nan"),
        ("--guidance-start", "1"),
        ("--guidance-stop", "1.5"),
        ("--guidance-stop", "nan"),
        ("--noise-level", "1000"),
        ("--fidelity", "2"),
    ],
)
def test_defaults_that_no_sampler_takes_are_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert cli.main(["export", str(tmp_path / "new"), option, value]) == 2
    assert option in capsys.readouterr().err and not (tmp_path / "new").exists()
