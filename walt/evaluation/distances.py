"""Distances between sets of features: Frechet, unbiased kernel MMD^2, Inception Score, CLIPSIM, and their intervals.

Letters: N and M samples, d features, R resamples. Everything is computed in float64 on the device of its input.

A Frechet distance is biased upwards, the more so the smaller N is against d: compare only equal N. The kernel distance
is unbiased at every N, and may therefore come out a little below zero where two sets are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from walt.data.latents import save_file
from walt.errors import WaltError
from walt.media import replacing


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean `(d,)` and scatter `(d, d)` (summed outer products of the deviations) of features, float64.

    `a + b` are the statistics of both sets together (Chan, Golub and LeVeque 1979), so that a set too large for memory
    is read piece by piece: `total = total + FeatureStatistics.of(piece)`.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of features `(N, d)`, N at least 1."""
        features = _features(features, "features")
        mean = features.mean(dim=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        if self.mean.shape != other.mean.shape:
            raise WaltError(f"other: expected {len(self.mean)} features, got {len(other.mean)}")
        count = self.count + other.count
        step = other.mean - self.mean
        between = torch.outer(step, step) * (self.count * other.count / count)
        return FeatureStatistics(
            count, self.mean + step * (other.count / count), self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> Tensor:
        """`(d, d)`, divided by N - 1."""
        if self.count < 2:
            raise WaltError(f"features: a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, which is there as a whole or not at all."""
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        with replacing(Path(path)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """What `save` wrote; WaltError when the file is missing, damaged or something else."""
        try:
            tensors = load_file(path)
            return cls(int(tensors["count"]), tensors["mean"], tensors["scatter"])
        except (OSError, SafetensorError, KeyError) as error:
            raise WaltError(f'path: "{path}" holds no feature statistics ({error})') from error


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), the squared Frechet distance of two Gaussians.

    With A A^T = S_a and B B^T = S_b from symmetric eigendecompositions, the last trace is the sum of the singular
    values of A^T B. No matrix root of a singular product is taken, so covariances of low rank (N <= d) do no harm.

    Raises:
        WaltError: different d, or fewer than 2 samples.
    """
    if first.mean.shape != second.mean.shape:
        raise WaltError(f"second: expected {len(first.mean)} features, got {len(second.mean)}")
    a, b = first.covariance, second.covariance
    shared = torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()
    return float((first.mean - second.mean).square().sum() + a.trace() + b.trace() - 2 * shared)


def _factor(covariance: Tensor) -> Tensor:
    """`(d, r)` whose product with its transpose is the covariance of rank r; rounding noise is left out of the rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its bootstrap percentile interval."""

    estimate: float
    low: float
    high: float


def polynomial_mmd(x: Tensor, y: Tensor, block: int = 1024) -> float:
    """The unbiased estimate of MMD^2 with kernel k(x, y) = (x.y / d + 1)^3, over all samples: KID, KVD.

    Binkowski et al. 2018 (arXiv 1801.01401), eq. 4: pairs of a sample with itself are left out.

    Args:
        x: features `(N, d)`, y: `(M, d)`; N and M at least 2.
        block: rows of the kernel matrix held at a time; memory grows with block * max(N, M).
    """
    x, y = _pair(x, y)
    return float(_weighted_mmd(x, y, x.new_ones(1, len(x)), y.new_ones(1, len(y)), block))


def subset_mmd(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0, block: int = 1024
) -> tuple[float, float]:
    """Mean and standard deviation of `polynomial_mmd` over random subsets, as KID is commonly reported.

    Args:
        size: samples of each subset, drawn without replacement from x and y apart; at most min(N, M).
    """
    x, y = _pair(x, y)
    if not 2 <= size <= min(len(x), len(y)) or subsets < 1:
        raise WaltError(
            f"subsets and size: expected at least 1 subset of 2 to {min(len(x), len(y))} samples, got {subsets} of {size}"
        )
    generator = torch.Generator().manual_seed(seed)

    def choose(features: Tensor) -> Tensor:
        chosen = torch.rand(subsets, len(features), generator=generator).argsort(dim=1)[:, :size]
        return torch.zeros(subsets, len(features), dtype=torch.float64).scatter_(1, chosen, 1.0).to(features.device)

    values = _weighted_mmd(x, y, choose(x), choose(y), block)
    return float(values.mean()), float(values.std(correction=0))


def mmd_interval(
    x: Tensor, y: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0, block: int = 1024
) -> Interval:
    """`polynomial_mmd` with its bootstrap percentile interval.

    Drawing with replacement repeats samples, and the kernel of a sample with its own copy is no kernel of independent
    samples: plugged into the unbiased estimate it would bias every resample upwards. So a resample is kept as how
    often each sample was drawn, w; a pair i != j counts w_i w_j times, and pairs of one sample with its own copies
    are left out as the sample with itself is. The resamples then centre on the estimate.

    Raises:
        WaltError: shapes that do not fit, a level outside 0 to 1, fewer than 1 resample.
    """
    x, y = _pair(x, y)
    _check_bootstrap(level, resamples)
    generator = torch.Generator().manual_seed(seed)
    values = _weighted_mmd(x, y, _draw(x, resamples, generator), _draw(y, resamples, generator), block)
    # A resample of one sample alone has no pairs (0 / 0); it can happen only with very few samples.
    return _interval(polynomial_mmd(x, y, block), values[values.isfinite()], level)


def _weighted_mmd(x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor, block: int) -> Tensor:
    """`(R,)`: MMD^2 where sample i of resample r counts `weights[r, i]` times and never pairs with itself."""

    def within(z: Tensor, weights: Tensor) -> Tensor:
        own = (z.square().sum(dim=1) / z.shape[1] + 1) ** 3
        pairs = _kernel_sum(z, z, weights, weights, block) - weights.square() @ own
        return pairs / (weights.sum(dim=1).square() - weights.square().sum(dim=1))

    across = _kernel_sum(x, y, x_weights, y_weights, block) / (x_weights.sum(dim=1) * y_weights.sum(dim=1))
    return within(x, x_weights) + within(y, y_weights) - 2 * across


def _kernel_sum(x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor, block: int) -> Tensor:
    """`(R,)`: sum over i, j of x_weights[r, i] k(x_i, y_j) y_weights[r, j], a block of rows at a time."""
    total = x.new_zeros(len(x_weights))
    for rows, weights in zip(x.split(block), x_weights.split(block, dim=1), strict=True):
        kernel = (rows @ y.T / y.shape[1] + 1) ** 3
        total += ((weights @ kernel) * y_weights).sum(dim=1)
    return total


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, arXiv 1606.03498).

    Args:
        probabilities: `(N, K)` of a classifier, rows summing to 1; 1 (no information) to K is the range of the score.
        splits: consecutive parts of as equal size as N allows; at most N.
    """
    probabilities = _features(probabilities, "probabilities")
    if bool((probabilities < 0).any()) or not torch.allclose(
        probabilities.sum(dim=1), probabilities.new_ones(()), atol=1e-4
    ):
        raise WaltError("probabilities: expected rows of numbers from 0 that sum to 1 (is a softmax missing?)")
    if not 1 <= splits <= len(probabilities):
        raise WaltError(f"splits: expected 1 to {len(probabilities)}, got {splits}")
    scores = []
    for part in torch.tensor_split(probabilities, splits):
        marginal = part.mean(dim=0)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(dim=1)
        scores.append(math.exp(float(divergence.mean())))
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def clipsim(frames: Tensor, texts: Tensor) -> Tensor:
    """`(B,)`: cosine of each video's frames with its text, averaged over its frames (GODIVA, arXiv 2104.14806).

    Args:
        frames: image features `(B, T, d)`, texts: `(B, d)` of the same joint space; neither needs unit length.
    """
    if frames.ndim != 3 or texts.shape != (frames.shape[0], frames.shape[2]):
        raise WaltError(
            f"frames and texts: expected (B, T, d) and (B, d), got {tuple(frames.shape)} and {tuple(texts.shape)}"
        )
    return F.cosine_similarity(frames.double(), texts.double()[:, None], dim=-1).mean(dim=1)


def mean_interval(values: Tensor, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of one number per clip, `(N,)`, with its bootstrap percentile interval."""
    if values.ndim != 1 or len(values) < 2:
        raise WaltError(f"values: expected (N,) with N of at least 2, got {tuple(values.shape)}")
    _check_bootstrap(level, resamples)
    values = values.double()
    weights = _draw(values, resamples, torch.Generator().manual_seed(seed))
    return _interval(float(values.mean()), weights @ values / len(values), level)


def _draw(samples: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """`(R, N)`: how often each sample is drawn in N draws with replacement."""
    number = len(samples)
    draws = torch.randint(number, (resamples, number), generator=generator)
    ones = torch.ones(resamples, number, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, draws, ones).to(samples.device)


def _interval(estimate: float, values: Tensor, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = torch.quantile(values, values.new_tensor([tail, 1 - tail])).tolist()
    return Interval(estimate, low, high)


def _check_bootstrap(level: float, resamples: int) -> None:
    if not 0 < level < 1 or resamples < 1:
        raise WaltError(f"level and resamples: expected 0 to 1 and at least 1, got {level} and {resamples}")


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _features(x, "x"), _features(y, "y")
    if len(x) < 2 or len(y) < 2 or x.shape[1] != y.shape[1]:
        raise WaltError(
            f"x and y: expected (N, d) and (M, d), N and M at least 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x, y


def _features(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or not features.numel():
        raise WaltError(f"{name}: expected (N, d), not empty, got {tuple(features.shape)}")
    if not bool(features.isfinite().all()):
        raise WaltError(f"{name}: expected finite numbers, got nan or inf")
    return features.double()
