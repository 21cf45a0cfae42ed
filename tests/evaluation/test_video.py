"""`walt evaluate video` with a tiny random network on the test sprites: table, report, resume, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from walt.cli import main
from walt.data.emoji import EmojiTheatre
from walt.data.scenes import to_video
from walt.errors import WaltError
from walt.evaluation import features
from walt.evaluation.controls import CONTROLS
from walt.evaluation.distances import inception_score
from walt.evaluation.prompts import make_clips
from walt.evaluation.video import KeptFeatures, clip_files, compare_clips, read_clips, render_clips, score_splits
from walt.media import write_image, write_video

SPRITES = Path(__file__).parents[1] / "sprites"


class Tiny:
    """A fixed random projection of a coarse video and of its coarse frame differences."""

    name, fingerprint, frechet, kernel = "Tiny", "0123456789abcdef", "FD-Tiny", "KD-Tiny"

    def __init__(self, score: str | None = None) -> None:
        self.calls = 0
        self.score = score
        self.weight = torch.randn(8, 6 * 16, generator=torch.Generator().manual_seed(0))

    def features(self, video: Tensor) -> Tensor:
        self.calls += 1
        motion = video.diff(dim=2).abs().mean(dim=2) if video.shape[2] > 1 else 0 * video[:, :, 0]
        coarse = torch.nn.functional.adaptive_avg_pool2d(torch.cat([video.mean(dim=2), motion], dim=1), 4)
        return coarse.flatten(1) @ self.weight.T

    def probabilities(self, video: Tensor) -> Tensor:
        assert self.score is not None, "never asked where there is no score"
        return (100 * self.features(video)).softmax(dim=1)


def clips(number: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(number, 1, 3, 1, 16, 16, generator=generator) - 0.5
    return list(base + torch.linspace(-0.4, 0.4, 5).view(1, 1, 1, 5, 1, 1))


def write_clips(folder: Path, number: int, seed: int, frames: int = 5) -> Path:
    folder.mkdir()
    for index in range(number):
        pixels = np.random.default_rng([seed, index]).integers(0, 256, (frames, 32, 56, 3), np.uint8)
        write_video(pixels, folder / f"{index}.mp4")
    return folder


def test_rows_rerun_without_the_network_and_rank_the_controls(tmp_path: Path) -> None:
    network = Tiny()
    generated, reference, others = clips(12, 0), clips(12, 1), clips(12, 2)
    rows = compare_clips(network, generated, reference, others, tmp_path)
    assert [row.clips for row in rows] == ["generated", "real", *CONTROLS] and {row.count for row in rows} == {12}
    assert network.calls == 12 * (3 + len(CONTROLS))
    by_name = {row.clips: row for row in rows}
    assert by_name["frozen"].kernel.estimate > by_name["real"].kernel.high
    assert by_name["frozen"].frechet > by_name["real"].frechet
    again = Tiny()
    assert compare_clips(again, generated, reference, others, tmp_path) == rows and again.calls == 0


def test_the_score_is_of_each_set_alone(tmp_path: Path) -> None:
    """A network with classes adds it, from its own probabilities; the distances stay as they were."""
    sets = clips(6, 0), clips(6, 1), clips(6, 2)
    plain = compare_clips(Tiny(), *sets, tmp_path)
    network = Tiny("IS-Tiny")
    rows = compare_clips(network, *sets, tmp_path)
    assert network.calls == 6 * (2 + len(CONTROLS)), "features are kept, classes are not asked of the reference"
    assert [replace(row, score=None) for row in rows] == plain
    for number, row in ((0, rows[0]), (2, rows[1])):
        seen = torch.cat([network.probabilities(clip) for clip in sets[number]])
        assert row.score == inception_score(seen, 1) and 1 < row.score[0] < 8
    assert compare_clips(again := Tiny("IS-Tiny"), *sets, tmp_path) == rows and again.calls == 0
    assert [score_splits(count) for count in (2, 1999, 2000, 10_000, 50_000)] == [1, 1, 2, 10, 10]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    class Stops(Tiny):
        def features(self, video: Tensor) -> Tensor:
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().features(video)

    with pytest.raises(KeyboardInterrupt):
        compare_clips(Stops(), clips(4, 0), clips(4, 1), clips(4, 2), tmp_path)
    network = Tiny()
    rows = compare_clips(network, clips(4, 0), clips(4, 1), clips(4, 2), tmp_path)
    assert network.calls == 4 * 7 - 5
    assert rows == compare_clips(Tiny(), clips(4, 0), clips(4, 1), clips(4, 2), tmp_path / "afresh")


def test_kept_features_belong_to_one_clip_and_one_network(tmp_path: Path) -> None:
    first, other = clips(2, 0)
    network = Tiny()
    kept = KeptFeatures(network, tmp_path)
    assert kept(first).equal(kept(first)) and network.calls == 1
    kept(other)
    network.fingerprint = "fedcba9876543210"
    KeptFeatures(network, tmp_path)(first)
    assert network.calls == 3
    for path in tmp_path.rglob("*.safetensors"):
        path.write_text("cut off")
    with pytest.raises(WaltError, match="is damaged"):
        kept(first)


@pytest.mark.parametrize("suffix", [".mp4", ".png", ".jpg", ".webp"])
def test_rendered_clips_take_the_shape_and_kind_of_the_generated(tmp_path: Path, suffix: str) -> None:
    like = tmp_path / f"generated{suffix}"
    if suffix == ".mp4":
        write_video(np.zeros((5, 32, 56, 3), np.uint8), like)
    else:
        write_image(np.zeros((32, 56, 3), np.uint8), like)
    theatre = EmojiTheatre(SPRITES, split="all")
    rendered = list(render_clips(theatre, range(2), like, tmp_path))
    assert [tuple(x.shape) for x in rendered] == [(1, 3, 5 if suffix == ".mp4" else 1, 32, 56)] * 2
    assert not rendered[0].equal(rendered[1])
    itself = to_video(theatre.render(theatre.scene(0, 1), 32, 56, frames=1)[0])[None]
    assert suffix == ".mp4" or rendered[0].equal(itself) == (suffix == ".png"), "the format's traces"
    assert [path.name for path in tmp_path.iterdir()] == [like.name]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    network = Tiny()
    monkeypatch.setattr(features, "load_feature_network", lambda name, folder: network)
    generated, reference = write_clips(tmp_path / "generated", 3, 0), write_clips(tmp_path / "reference", 6, 1)
    (tmp_path / "mc3-18.safetensors").touch()
    words = ["evaluate", "video", "--generated", str(generated), "--reference", str(reference)]
    words += ["--features", str(tmp_path), "--work", str(tmp_path / "work"), "--json", str(tmp_path / "rows.json")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("generated", "real", *CONTROLS, "FD-Tiny", "KD-Tiny"))
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["network"] == "Tiny" and (report["frames"], report["height"], report["width"]) == (5, 32, 56)
    assert [row["clips"] for row in report["rows"]] == ["generated", "real", *CONTROLS]
    assert report["score"] is None and report["rows"][0]["score"] is None
    calls = network.calls
    assert calls == 3 * 7 and main(words) == 0 and network.calls == calls
    network.score = "IS-Tiny"
    assert main(words) == 0 and "IS-Tiny" in capsys.readouterr().out
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["score"] == "IS-Tiny" and 1 <= report["rows"][0]["score"][0] <= 3


def test_what_the_prompt_judge_kept_is_read(tmp_path: Path) -> None:
    theatre = EmojiTheatre(SPRITES, split="all")
    scenes = [theatre.scene(seed, 5) for seed in range(3)]
    made = np.random.default_rng(0).integers(0, 256, (3, 5, 32, 56, 3), np.uint8)
    make_clips(scenes, lambda prompts, seeds: made, tmp_path / "work", {})
    paths = clip_files(tmp_path / "work", "--generated")
    read = torch.cat(list(read_clips(paths, (5, 32, 56, 3))))
    assert read.equal(torch.stack([to_video(clip) for clip in made]))
    real = list(render_clips(theatre, range(2), paths[0], tmp_path / "work"))
    assert [tuple(x.shape) for x in real] == [(1, 3, 5, 32, 56)] * 2
    make_clips(scenes, lambda prompts, seeds: made, tmp_path / "work", {"guidance": 2})
    with pytest.raises(WaltError, match=r"--generated: .* holds clip 000. of several models or settings"):
        clip_files(tmp_path / "work", "--generated")
    paths[1].write_bytes(paths[1].read_bytes()[:99])
    with pytest.raises(WaltError, match=f"{paths[1].name}.* cannot be read"):
        list(read_clips(paths, (5, 32, 56, 3)))


def test_bad_input_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated, reference = write_clips(tmp_path / "generated", 2, 0), write_clips(tmp_path / "reference", 3, 1)
    (tmp_path / "empty").mkdir()
    made, real = ["--generated", str(generated)], ["--reference", str(reference)]
    for words, error in [
        ([], "--generated: the folder"),
        (["--generated", str(tmp_path / "none")], "--generated: there is no folder"),
        (["--generated", str(tmp_path / "empty")], "--generated: expected at least 2"),
        ([*made, *real], "--reference: expected at least 4"),
        ([*made, *real, "-n", "1"], "--count must be at least 2"),
        ([*made, "--source", str(tmp_path / "empty")], "empty"),
        ([*made, "--source", str(SPRITES), "--json", "x.txt"], "must end in .json"),
        ([*made, "--source", str(SPRITES), "--network", "I3D"], "neither a file nor one of"),
        ([*made, "--source", str(SPRITES), "--features", str(tmp_path)], "walt data features"),
    ]:
        assert main(["evaluate", "video", *words]) == 2
        assert error in capsys.readouterr().err


def test_clips_of_another_size_are_named(tmp_path: Path) -> None:
    paths = clip_files(write_clips(tmp_path / "clips", 2, 0), "--generated")
    with pytest.raises(WaltError, match=r"0\.mp4.*expected 9 frames of 32x56.*got 5 frames of 32x56"):
        list(read_clips(paths, (9, 32, 56, 3)))
    with pytest.raises(WaltError, match="reference: expected at least 2 clips, got 0"):
        compare_clips(Tiny(), clips(2, 0), [], [], tmp_path)
