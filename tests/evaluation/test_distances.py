"""Distances against scipy, torchmetrics and double loops in float64; intervals against known distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import linalg
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from walt.errors import WaltError
from walt.evaluation.distances import (
    FeatureStatistics,
    clipsim,
    frechet_distance,
    inception_score,
    mean_interval,
    mmd_interval,
    polynomial_mmd,
    subset_mmd,
)


def samples(number: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(number, d, generator=generator, dtype=torch.float64) @ mixing / math.sqrt(d) + shift


def frechet(x: Tensor, y: Tensor) -> float:
    return frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))


class Same(torch.nn.Module):
    """Features that are the "images" themselves, for torchmetrics."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.num_features = d

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_statistics_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    x = samples(50, 6, 0, shift=100.0)
    total = FeatureStatistics.of(x[:1]) + FeatureStatistics.of(x[1:20]) + FeatureStatistics.of(x[20:])
    assert total.count == 50
    torch.testing.assert_close(total.mean, x.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-12)
    total.save(tmp_path / "statistics.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.count == 50 and loaded.mean.equal(total.mean) and loaded.scatter.equal(total.scatter)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


@pytest.mark.parametrize("n, m, d", [(60, 40, 5), (200, 300, 16)])
def test_frechet_distance_is_scipys(n: int, m: int, d: int) -> None:
    x, y = samples(n, d, 1), samples(m, d, 2, shift=0.3)
    a, b = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    root = linalg.sqrtm(a @ b).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + float((a + b - 2 * root).trace())
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_torchmetrics() -> None:
    x, y = samples(60, 5, 1), samples(40, 5, 2, shift=0.3)
    metric = FrechetInceptionDistance(feature=Same(5)).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert frechet(x, y) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_of_low_rank() -> None:
    # 8 samples in 64 dimensions: against the nuclear norm of the centred samples' product, which needs no covariance.
    x, y = samples(8, 64, 3), samples(8, 64, 4)
    centred = [(z - z.mean(0)) / math.sqrt(7) for z in (x, y)]
    shared = torch.linalg.matrix_norm(centred[0] @ centred[1].T, ord="nuc")
    expected = (x.mean(0) - y.mean(0)).square().sum() + sum(z.square().sum() for z in centred) - 2 * shared
    assert frechet(x, y) == pytest.approx(float(expected), rel=1e-10)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-10)
    assert frechet(x, x + 2.0) == pytest.approx(64 * 4.0, rel=1e-10)
    assert frechet(torch.zeros(3, 4), torch.ones(3, 4)) == pytest.approx(4.0)  # no spread at all


def naive_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def mean(pairs: list[float]) -> float:
        return sum(pairs) / len(pairs)

    within = [
        mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)
    ]  # fmt: skip
    return sum(within) - 2 * mean([kernel(a, b) for a in x for b in y])


@pytest.mark.parametrize("block", [1, 4, 1024])
def test_mmd_is_the_double_loop(block: int) -> None:
    x, y = samples(9, 4, 5), samples(7, 4, 6, shift=0.5)
    assert polynomial_mmd(x, y, block) == pytest.approx(naive_mmd(x, y), rel=1e-12)


def test_subset_mmd_of_everything_is_torchmetrics() -> None:
    x, y = samples(20, 6, 7), samples(20, 6, 8, shift=0.5)
    metric = KernelInceptionDistance(feature=Same(6), subsets=2, subset_size=20).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    mean, spread = subset_mmd(x, y, subsets=2, size=20)
    assert mean == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    assert mean == pytest.approx(polynomial_mmd(x, y), rel=1e-12) and spread == pytest.approx(0, abs=1e-12)


def test_subset_mmd_averages_subsets_to_the_whole() -> None:
    x, y = samples(12, 3, 9), samples(12, 3, 10, shift=0.5)
    mean, spread = subset_mmd(x, y, subsets=4000, size=6)
    assert mean == pytest.approx(polynomial_mmd(x, y), abs=5 * spread / math.sqrt(4000))
    assert subset_mmd(x, y, 3, 5, seed=1) == subset_mmd(x, y, 3, 5, seed=1) != subset_mmd(x, y, 3, 5, seed=2)


def test_mmd_interval_centres_on_the_unbiased_estimate() -> None:
    x, y = samples(20, 3, 11), samples(20, 3, 11)
    assert polynomial_mmd(x, y) < 0  # a set against itself: its own pairs count across but not within
    interval = mmd_interval(x, samples(20, 3, 12, shift=1.0), resamples=400)
    assert interval.low < interval.estimate < interval.high
    assert interval == mmd_interval(x, samples(20, 3, 12, shift=1.0), resamples=400)


def coverage(make: Callable[[int], Any], truth: float, trials: int) -> float:
    hits = [interval.low <= truth <= interval.high for interval in map(make, range(trials))]
    return sum(hits) / trials


def test_mean_interval_covers_a_gaussian() -> None:
    def make(trial: int) -> Any:
        values = torch.randn(60, generator=torch.Generator().manual_seed(trial)) + 3
        return mean_interval(values, level=0.9, resamples=300, seed=trial)

    assert 0.82 < coverage(make, 3.0, 300) < 0.95


def test_mmd_interval_covers_the_kernel_distance_of_two_gaussians() -> None:
    # d = 1, x ~ N(0, 1), y ~ N(1, 1): E (x y + 1)^3 = sum over k of C(3, k) E x^k E y^k.
    def kernel_mean(first: tuple[float, float, float], second: tuple[float, float, float]) -> float:
        return 1 + sum(math.comb(3, k) * first[k - 1] * second[k - 1] for k in (1, 2, 3))

    zero, one = (0.0, 1.0, 0.0), (1.0, 2.0, 4.0)  # E x, E x^2, E x^3
    truth = kernel_mean(zero, zero) + kernel_mean(one, one) - 2 * kernel_mean(zero, one)

    def make(trial: int) -> Any:
        noise = torch.randn(2, 80, 1, generator=torch.Generator().manual_seed(trial))
        return mmd_interval(noise[0], noise[1] + 1, level=0.9, resamples=200, seed=trial)

    assert 0.78 < coverage(make, truth, 200) < 0.97


def test_inception_score_of_known_distributions() -> None:
    assert inception_score(torch.eye(10).repeat(4, 1), splits=4) == pytest.approx((10.0, 0.0))
    assert inception_score(torch.full((20, 5), 0.2), splits=1) == pytest.approx((1.0, 0.0), abs=1e-6)
    halves = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    information = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert inception_score(halves, splits=1)[0] == pytest.approx(math.exp(information), rel=1e-6)


def test_clipsim_is_the_mean_cosine() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    frames = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 1.0]]])
    expected = torch.tensor([0.5, (math.sqrt(0.5) - 1) / 2], dtype=torch.float64)
    torch.testing.assert_close(clipsim(frames, text), expected)


def test_bad_input_is_named(tmp_path: Path) -> None:
    x = samples(5, 3, 0)
    one = FeatureStatistics.of(x)
    (tmp_path / "x").write_text("no")
    bad: list[tuple[str, Callable[[], Any]]] = [
        ("features: expected", lambda: FeatureStatistics.of(x[0])),
        ("features: expected finite", lambda: FeatureStatistics.of(x / 0)),
        ("at least 2 samples", lambda: FeatureStatistics.of(x[:1]).covariance),
        ("other: expected 3 features", lambda: one + FeatureStatistics.of(x[:, :2])),
        ("second: expected 3 features", lambda: frechet_distance(one, FeatureStatistics.of(x[:, :2]))),
        ("holds no feature statistics", lambda: FeatureStatistics.load(tmp_path / "x")),
        ("x and y: expected", lambda: polynomial_mmd(x, x[:1])),
        ("subsets and size", lambda: subset_mmd(x, x, size=6)),
        ("level and resamples", lambda: mmd_interval(x, x, level=1.0)),
        ("values: expected", lambda: mean_interval(x)),
        ("probabilities: expected rows", lambda: inception_score(x)),
        ("splits: expected 1 to 2", lambda: inception_score(torch.eye(2), splits=3)),
        ("frames and texts", lambda: clipsim(x, x)),
    ]
    for words, call in bad:
        with pytest.raises(WaltError, match=words):
            call()


def test_statistics_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    statistics = FeatureStatistics.of(torch.randn(3, 2))
    with pytest.raises(WaltError, match=r"cannot write .*none/x.safetensors"):
        statistics.save(tmp_path / "none" / "x.safetensors")
