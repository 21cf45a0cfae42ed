"""Preprocessing pinned by values worked out by hand, the Inception graph, and what a bad weights file is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from walt.data.fetch import PINS, sha256
from walt.errors import WaltError
from walt.evaluation.features import RECIPES, Preparation, _Block, convert_features, load_feature_network


def gradient(height: int, width: int) -> Tensor:
    """From -1 at the left border to 1 at the right, `(1, 3, 1, H, W)`."""
    centres = (torch.arange(width) + 0.5) / width * 2 - 1
    return centres.expand(1, 3, 1, height, width)


def test_frames_are_evenly_spaced_and_one_is_the_middle() -> None:
    video = (torch.arange(17.0) / 17).view(1, 1, 17, 1, 1).expand(1, 3, 17, 8, 8)

    def chosen(frames: int, length: int) -> list[int]:
        unit = Preparation(frames, 4, "bilinear", (0.5,) * 3, (0.5,) * 3)
        return [round(float(x) * 17) for x in unit(video[:, :, :length])[0, 0, :, 0, 0]]

    assert chosen(16, 17) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16]
    assert chosen(16, 16) == list(range(16))
    assert chosen(1, 17) == [8] and chosen(1, 1) == [0]
    assert chosen(4, 2) == [0, 0, 1, 1]


def test_a_gradient_stays_a_gradient() -> None:
    half = Preparation(1, 8, "bilinear")(gradient(16, 16))[0, 0, 0]
    # A triangle filter of 4 pixels reproduces a line away from the border.
    assert torch.allclose(half[4, 1:-1], gradient(1, 8).flatten()[:8][1:-1], atol=1e-6)
    assert torch.allclose(Preparation(1, 8, "bicubic")(gradient(8, 8)), gradient(8, 8), atol=1e-6)


def test_scaling_is_antialiased_and_crops_nothing() -> None:
    stripes = torch.ones(1, 3, 1, 32, 64)
    stripes[..., ::2] = -1
    grey = Preparation(1, 8, "bilinear")(stripes)[0, 0, 0, :, 2:-2]
    assert grey.abs().max() < 0.1  # without antialiasing, pixels of one stripe: -1 or 1
    border = torch.full((1, 3, 1, 32, 64), -1.0)
    border[..., -8:] = 1
    assert Preparation(1, 8, "bilinear")(border)[..., -1].min() > 0.5


def test_values_are_normalised_per_colour() -> None:
    unit = RECIPES["mc3-18"].preparation
    white = unit(torch.ones(1, 3, 1, 8, 8))[0, :, 0, 0, 0]
    assert white.tolist() == pytest.approx(
        [(1 - 0.43216) / 0.22803, (1 - 0.394666) / 0.22145, (1 - 0.37645) / 0.216989], rel=1e-5
    )
    extremes = RECIPES["inception-2015"].preparation(gradient(16, 16).sign())
    assert extremes.shape == (1, 3, 1, 299, 299) and [float(x) for x in extremes.aminmax()] == [-1, 1]


@pytest.mark.parametrize("name, d, count", [("MC3-18", 512, 11_490_240), ("Inception-2015", 2048, 21_785_568),
                                            ("EfficientNet-lite2", 1280, 4_811_072)])  # fmt: skip
def test_networks_build_and_have_the_published_size(name: str, d: int, count: int) -> None:
    recipe = RECIPES[name.lower()]
    with torch.device("meta"):
        module = recipe.build().eval()
        size = recipe.preparation.size
        frames = (recipe.preparation.frames,) if recipe.preparation.frames > 1 else ()
        assert module(torch.empty(1, 3, *frames, size, size)).shape == (1, d)
    assert sum(p.numel() for p in module.parameters()) == count
    assert recipe.package in PINS


def test_classes_are_a_layer_of_the_file_and_an_older_file_has_none(tmp_path: Path) -> None:
    recipe = RECIPES["efficientnet-lite2"]
    tensors = recipe.build().state_dict()
    generator = torch.Generator().manual_seed(0)
    classes = {"classes.weight": torch.randn(1000, 1280, generator=generator), "classes.bias": torch.zeros(1000)}
    video = gradient(32, 32).expand(2, -1, 1, -1, -1)
    for extra, score in ({}, None), (classes, "IS-EfficientNet-lite2"):
        save_file(tensors | extra, tmp_path / "file.safetensors", metadata={"network": "EfficientNet-lite2"})
        network = load_feature_network(tmp_path / "file.safetensors")
        assert network.score == score and network.features(video).shape == (2, 1280)
    wanted = (network.features(video) @ classes["classes.weight"].T).softmax(dim=1)
    assert torch.allclose(network.probabilities(video), wanted, atol=1e-6) and wanted.std(dim=1).min() > 0


def test_a_block_pools_before_its_last_branch() -> None:
    class Branches(nn.Module):
        def branch_pool(self, x: Tensor) -> Tensor:
            return 2 * x

        def _forward(self, x: Tensor) -> list[Tensor]:
            return [x, torch.zeros_like(x)]

    x = torch.arange(9.0).view(1, 1, 3, 3)
    result = _Block(Branches(), nn.AvgPool2d(3, 1, 1, count_include_pad=False))(x)
    assert result[:, :1].equal(x)
    assert result[0, 1, 0, 0] == 2 * (0 + 1 + 3 + 4) / 4  # the corner's four true neighbours, no padding


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(WaltError, match=r"values in \[-1, 1\]"):
        Preparation(1, 8, "bilinear")(torch.full((1, 3, 1, 8, 8), 2.0))
    with pytest.raises(WaltError, match="video: expected"):
        Preparation(1, 8, "bilinear")(torch.zeros(1, 1, 1, 8, 8))
    with pytest.raises(WaltError, match="neither a file nor one of MC3-18"):
        load_feature_network("MC3", tmp_path)
    with pytest.raises(WaltError, match="walt data features"):
        load_feature_network("MC3-18", tmp_path)
    with pytest.raises(WaltError, match="is none of MC3-18"):
        convert_features("I3D", tmp_path)
    other = tmp_path / "other.whl"
    other.write_bytes(b"no package")
    with pytest.raises(WaltError, match=f"sha256 of .* is {sha256(other)}"):
        convert_features("MC3-18", other, tmp_path)
    with pytest.raises(WaltError, match=f"no safetensors file .*{sha256(other)}"):
        load_feature_network(other)
    unnamed = tmp_path / "unnamed.safetensors"
    save_file({"x": torch.zeros(1)}, unnamed)
    with pytest.raises(WaltError, match=f"{sha256(unnamed)}.*does not say which network"):
        load_feature_network(unnamed)
    wrong = tmp_path / "mc3-18.safetensors"
    save_file({"x": torch.zeros(1)}, wrong, metadata={"network": "MC3-18"})
    with pytest.raises(WaltError, match="do not fit MC3-18"):
        load_feature_network("mc3-18", tmp_path)
