"""Networks that a user supplies as TorchScript: how they are called, what they are called, what a bad file is told.

The official files are not here: their checksums are checked with the tests' own files in their place.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from walt.cli import main
from walt.data.fetch import sha256
from walt.errors import WaltError
from walt.evaluation import scripted
from walt.evaluation.features import load_feature_network
from walt.evaluation.scripted import INCEPTION, OFFICIAL, ScriptedNetwork
from walt.media import write_video


class Video(nn.Module):
    """Called as the I3D: mean, extremes and number of frames of what it is given, and its three switches."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.float32
        flat = x.flatten(1)
        on = float(rescale) + 2 * float(resize) + 4 * float(return_features)
        parts = [flat.mean(1), flat.amin(1), flat.amax(1)]
        return torch.stack(parts + [torch.full_like(parts[0], y) for y in (float(x.shape[2]), on)], dim=1)


class Image(nn.Module):
    """Called as NVIDIA's Inception, whose other arguments have defaults; where features are not asked for, two classes."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert img.dtype == torch.uint8 and img.dim() == 4
        features = img.float().flatten(2).mean(2)
        share = features[:, :1] / 255 if no_output_bias else features[:, :1]
        return features if return_features else torch.cat([share, 1 - share], dim=1)


class Plain(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


class Grid(nn.Module):
    """An image network that returns a map in place of features."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float()


class Broken(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float().mean((2, 3)) / 0 * 0


class Logits(nn.Module):
    """Its classes are not probabilities."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        return img.float().mean((2, 3)) + 1.0


def save(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(module).save(path)
    return path


def test_video_networks_get_every_frame_as_pixels(tmp_path: Path) -> None:
    network = ScriptedNetwork(save(Video(), tmp_path / "i3d.pt"))
    video = torch.full((2, 3, 17, 4, 6), -1.0)
    video[1] = 1
    video[1, :, 0] = 2 * 100 / 255 - 1
    features = network.features(video)
    assert features[0].tolist() == [0, 0, 0, 17, 7]
    assert features[1].tolist() == pytest.approx([(255 * 16 + 100) / 17, 100, 255, 17, 7])
    with pytest.raises(WaltError, match="at least 10 frames, got 9"):
        network.features(video[:, :, :9])
    with pytest.raises(WaltError, match=r"values in \[-1, 1\]"):
        network.features(2 * video)


def test_image_networks_get_the_middle_frame_in_whole_numbers(tmp_path: Path) -> None:
    network = load_feature_network(save(Image(), tmp_path / "inception.pt"))
    video = torch.arange(17.0).view(1, 1, 17, 1, 1).expand(2, 3, 17, 4, 6) * 2 / 255 - 1
    assert network.features(video).tolist() == [[8, 8, 8]] * 2
    assert network.features(video[:, :, 3:4]).tolist() == [[3, 3, 3]] * 2
    assert network.probabilities(video)[:, 0].tolist() == pytest.approx([8 / 255] * 2), "without the bias"


def test_only_the_official_files_bear_the_official_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, words in [(Video(), "FVD", ("FVD", "KVD")), (Image(), "FID", ("FID", "KID"))]:
        path = save(module, tmp_path / f"{name}.pt")
        checksum = sha256(path)
        network = ScriptedNetwork(path)
        assert network.fingerprint == checksum and network.name == f"{name}@{checksum[:8]}"
        assert (network.frechet, network.kernel) == tuple(f"{word}-{name}@{checksum[:8]}" for word in words)
        assert network.score == (f"IS-{name}@{checksum[:8]}" if name == "FID" else None)
    assert {signature.frechet for _, signature in OFFICIAL.values()} == {"FVD", "FID"}
    monkeypatch.setitem(scripted.OFFICIAL, checksum, ("Inception", INCEPTION))
    official = ScriptedNetwork(path)
    assert (official.name, official.frechet, official.kernel) == ("Inception", "FID", "KID")
    assert official.score == "IS"
    assert official.fingerprint == checksum


def test_bad_files_are_named_with_their_checksum(tmp_path: Path) -> None:
    whole = save(Video(), tmp_path / "whole.pt")
    damaged, empty, weights = (tmp_path / name for name in ("damaged.pt", "empty.pt", "weights.pt"))
    damaged.write_bytes(whole.read_bytes()[:1000])
    empty.touch()
    torch.save({"weight": torch.zeros(2)}, weights)
    for path in (damaged, empty, weights):
        with pytest.raises(WaltError, match="damaged or no TorchScript") as caught:
            load_feature_network(path)
        assert sha256(path) in str(caught.value) and "\n" not in str(caught.value)
    plain = save(Plain(), tmp_path / "plain.pt")
    with pytest.raises(WaltError, match=rf"sha256 {sha256(plain)}\) takes \(x, scale\), expected \(video, rescale"):
        load_feature_network(plain)
    with pytest.raises(WaltError, match="neither a file nor one of"):
        load_feature_network(tmp_path / "none.pt")


def test_what_a_network_gives_is_checked(tmp_path: Path) -> None:
    video = torch.zeros(2, 3, 10, 4, 6)
    with pytest.raises(WaltError, match=r"gives \(2, 3, 4, 6\), expected features \(2, d\)"):
        ScriptedNetwork(save(Grid(), tmp_path / "grid.pt")).features(video)
    with pytest.raises(WaltError, match="not finite"):
        ScriptedNetwork(save(Broken(), tmp_path / "broken.pt")).features(video)
    assert ScriptedNetwork(tmp_path / "grid.pt").score is None, "no argument that leaves out the bias"
    network = ScriptedNetwork(save(Logits(), tmp_path / "logits.pt"))
    with pytest.raises(WaltError, match="no probabilities: rows do not sum to 1"):
        network.probabilities(video)
    monster = ScriptedNetwork(save(Image(), tmp_path / "image.pt"))
    monster.signature = scripted.I3D  # called with arguments that it does not take
    with pytest.raises(WaltError, match=r'image.pt" fails on \(2, 3, 10, 4, 6\)') as caught:
        monster.features(video)
    assert "\n" not in str(caught.value)


def test_command_shows_the_checksum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, number in (("made", 2), ("real", 4)):
        (tmp_path / folder).mkdir()
        for index in range(number):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (10, 32, 56, 3), np.uint8)
            write_video(pixels, tmp_path / folder / f"{index}.mp4")
    path = save(Video(), tmp_path / "mine.pt")
    words = ["evaluate", "video", "--generated", str(tmp_path / "made"), "--reference", str(tmp_path / "real")]
    words += ["--network", str(path), "--work", str(tmp_path / "work"), "--json", str(tmp_path / "rows.json")]
    assert main(words) == 0
    name, shown = f"mine@{sha256(path)[:8]}", capsys.readouterr().out
    assert sha256(path) in shown and f"in {name}'s features" in shown
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["fingerprint"] == sha256(path) and report["network"] == name
    assert (report["frechet"], report["kernel"]) == (f"FVD-{name}", f"KVD-{name}")
    path.write_bytes(b"cut off")
    assert main(words) == 1
    assert "damaged or no TorchScript" in capsys.readouterr().err
