"""The diffusion process as pure functions over diffusers' schedulers: schedule, noising, velocity targets, guidance.

W.A.L.T. (papers.md 1.4; arXiv 2312.06662 section 4.1): x_t = signal x0 + sigma eps with signal^2 + sigma^2 = 1, 1000
steps of a linear beta schedule rescaled to zero terminal SNR (Lin et al., arXiv 2305.08891), velocity prediction
(Salimans and Ho, arXiv 2202.00512): v = signal eps - sigma x0, hence x0 = signal x_t - sigma v and
eps = sigma x_t + signal v.

Every function takes `timestep` as integers 0..999, either `(B,)` for tensors `(B, ...)` or a single one for a tensor of
any shape, and works in the dtype of its tensors.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Schedule(Protocol):
    """What the functions here need of a diffusers scheduler: `alphas_cumprod`, float `(1000,)`, abar_t in [0, 1]."""

    alphas_cumprod: Tensor


def make_scheduler(zero_snr: bool = True) -> DDIMScheduler:
    """The sampler and schedule of every W.A.L.T. stage (Table 8).

    Trailing spacing makes sampling start at the last timestep, where x_t is pure noise when `zero_snr` is on; clipping
    is off because latents are not bounded.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def signal_level(timestep: Tensor) -> Tensor:
    """sqrt(abar_t) of the zero-SNR schedule in closed form, `(B,)` float timesteps 0..999, whole or not.

    Within 1e-3 of `make_scheduler()`'s table: enough for a network's preconditioning, which must be smooth and the same
    everywhere rather than exact.
    """

    def root(steps: Tensor | float) -> Tensor:
        # sqrt of the product of 1 - beta: the integral of -beta / 2 (1 + beta / 2), beta linear in the step.
        low, slope = 1e-4, (0.02 - 1e-4) / 999
        mean = low * steps + slope * steps * (steps - 1) / 2
        return torch.exp(torch.as_tensor(-0.5 * mean * 1.005))

    last, first = root(1000.0), root(1.0)
    return ((root(timestep + 1) - last) / (first - last) * first).clamp(0.0, 1.0)


def coefficients(scheduler: Schedule, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, sigma) = (sqrt(abar_t), sqrt(1 - abar_t)), in the dtype of `like` and shaped to broadcast with it."""
    index = torch.as_tensor(timestep, device=scheduler.alphas_cumprod.device).long()
    alpha_bar = scheduler.alphas_cumprod[index].double()
    if alpha_bar.ndim:
        alpha_bar = alpha_bar.reshape(-1, *[1] * (like.ndim - 1))
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


def draw_timesteps(
    count: int, length: int, logit_normal: tuple[float, float] | None, generator: torch.Generator
) -> Tensor:
    """`(count,)` training timesteps in [0, length): uniform, or with logit(t / length) normal of (mean, std).

    Nine tenths follow the normal; the rest stay uniform, so that both ends are learnt too.
    """
    steps = torch.randint(length, (count,), generator=generator)
    if logit_normal is None:
        return steps
    mean, std = logit_normal
    inner = (torch.sigmoid(mean + std * torch.randn(count, generator=generator)) * length).long()
    ends = torch.rand(count, generator=generator) < 0.1
    return torch.where(ends, steps, inner.clamp_(max=length - 1))


def add_noise(scheduler: Schedule, x0: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
    """x_t = signal x0 + sigma eps."""
    signal, sigma = coefficients(scheduler, timestep, x0)
    return signal * x0 + sigma * noise


def velocity(scheduler: Schedule, x0: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
    """The training target v = signal eps - sigma x0 (at the last step of a zero-SNR schedule: -x0)."""
    signal, sigma = coefficients(scheduler, timestep, x0)
    return signal * noise - sigma * x0


def x0_from_velocity(scheduler: Schedule, v: Tensor, x_t: Tensor, timestep: Tensor | int) -> Tensor:
    """x0 = signal x_t - sigma v."""
    signal, sigma = coefficients(scheduler, timestep, x_t)
    return signal * x_t - sigma * v


def noise_from_velocity(scheduler: Schedule, v: Tensor, x_t: Tensor, timestep: Tensor | int) -> Tensor:
    """eps = sigma x_t + signal v."""
    signal, sigma = coefficients(scheduler, timestep, x_t)
    return sigma * x_t + signal * v


def variance_bound(scheduler: Schedule, v: Tensor, fraction: Tensor, x0: Tensor, x_t: Tensor, timestep: int) -> Tensor:
    """The step's term of the variational bound, bits per element, that a learned variance is trained by.

    Nichol and Dhariwal (arXiv 2102.09672, sections 3.1 and 3.3, as DiT uses it): log variance between that of the
    posterior (`fraction` -1) and beta (`fraction` 1); the mean that `v` predicts takes no gradient. At step 0 the negative
    log density of the clean latents, which are continuous.

    Args:
        v, fraction: prediction and its extra channels, like `x0`.
        timestep: one step, 0..999.
    """
    table = [1.0, *scheduler.alphas_cumprod.double().tolist()]

    def variances(step: int) -> tuple[float, float]:
        beta = 1 - table[step + 1] / table[step]
        return beta, beta * (1 - table[step]) / (1 - table[step + 1])

    (beta, _), (_, posterior) = variances(timestep), variances(max(timestep, 1))  # that of step 0 is 0
    before, now = table[timestep], table[timestep + 1]
    share = (fraction + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(posterior)

    def mean(clean: Tensor) -> Tensor:
        return (math.sqrt(before) * beta * clean + math.sqrt(now / before) * (1 - before) * x_t) / (1 - now)

    predicted = mean(x0_from_velocity(scheduler, v.detach(), x_t, timestep))
    if timestep == 0:
        nats = math.log(2 * math.pi) + log_variance + (x0 - predicted).square() * torch.exp(-log_variance)
    else:
        ratio = math.log(posterior) - log_variance
        nats = torch.exp(ratio) - ratio - 1 + (mean(x0) - predicted).square() * torch.exp(-log_variance)
    return 0.5 * nats / math.log(2)


def guide(cond: Tensor, uncond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance, then the standard-deviation rescaling of Lin et al. (equations 14-16), per sample.

    Args:
        cond, uncond: predictions `(B, ...)` with and without the condition.
        scale: 1 gives `cond` exactly; larger follows the condition harder.
        rescale: phi in [0, 1]; 1 gives every sample the standard deviation of its conditional prediction.
    """
    if scale == 1:
        return cond
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    dims = tuple(range(1, cond.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True).clamp_min(1e-8)
    return guided * (rescale * ratio + (1 - rescale))
