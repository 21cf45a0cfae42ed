"""The diffusion process as pure functions over diffusers' schedulers: schedule, noising, velocity targets, guidance.

W.A.L.T. (arXiv 2312.06662 section 4.1): x_t = signal x0 + sigma eps with signal^2 + sigma^2 = 1, 1000
steps of a linear beta schedule rescaled to zero terminal SNR (Lin et al., arXiv 2305.08891), velocity prediction
(Salimans and Ho, arXiv 2202.00512): v = signal eps - sigma x0, hence x0 = signal x_t - sigma v and
eps = sigma x_t + signal v.

Every function takes `timestep` as integers 0..999, either `(B,)` for tensors `(B, ...)` or a single one for a tensor of
any shape, and works in the dtype of its tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from walt.errors import WaltError


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


ScaleSchedule = Literal["constant", "oscillating", "power-cosine"]


@dataclass(frozen=True)
class GuidanceOptions:
    """How guidance is spread over the steps, and how the clean latents it predicts are kept in bounds.

    Attributes:
        schedule: "constant"; "oscillating" (`oscillating_scale`); "power-cosine" (`power_cosine_scale`).
        hold: oscillating: steps at the full scale before it alternates, counted from the first one, guided or not.
        low: oscillating: the scale of every other step after them; 1 is no guidance, and half the work.
        power: power-cosine: larger stays weak for longer.
        start, stop: shares of the whole way from noise to clean between which guidance acts, whatever the schedule; outside
            them the scale is 1, at half the work (Kynkaanniemi et al. 2024, arXiv 2404.07724). An edit of strength s begins
            at 1 - s. With evenly spaced steps, up to one step, what they are of diffusers' guiders. None: 0 and 1, but where
            neither is given a cascade's base takes its model's (`within`).
        threshold: bound on predicted clean latents, in units of their standard deviation; None for none.
        percentile: None for a static bound, or the share of a sample's values that the dynamic one keeps (`threshold_x0`).

    Raises:
        WaltError: a value that does not fit.
    """

    schedule: ScaleSchedule = "constant"
    hold: int = 5
    low: float = 1.0
    power: float = 4.0
    start: float | None = None
    stop: float | None = None
    threshold: float | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in get_args(ScaleSchedule):
            known = ", ".join(get_args(ScaleSchedule))
            raise WaltError(f"guidance schedule must be one of {known}, got {self.schedule!r}")
        if not (self.hold >= 0 and self.low >= 0):
            raise WaltError(f"hold and low of oscillating guidance must be at least 0, got {self.hold} and {self.low}")
        if not self.power > 0:
            raise WaltError(f"power of power-cosine guidance must be positive, got {self.power}")
        check_part(*self.part)
        if self.threshold is not None and not self.threshold > 0:
            raise WaltError(f"threshold of predicted latents must be positive, got {self.threshold}")
        if self.percentile is not None and (self.threshold is None or not 0 < self.percentile < 1):
            raise WaltError(
                f"percentile must be between 0 and 1 and go with a threshold, got {self.percentile} and "
                f"threshold {self.threshold}"
            )

    @property
    def part(self) -> tuple[float, float]:
        """`start` and `stop`, or the whole way where they are None."""
        return 0.0 if self.start is None else self.start, 1.0 if self.stop is None else self.stop

    def within(self, start: float, stop: float) -> GuidanceOptions:
        """These options, acting from `start` to `stop` unless they say themselves where they act."""
        return replace(self, start=start, stop=stop) if self.start is None and self.stop is None else self

    def scale(self, scale: float, step: int, timestep: float, last: float = 999.0) -> float:
        """The guidance scale of one step, where the call asks for `scale`.

        Args:
            step: 0, 1, ... of the steps that run.
            timestep: of that step, `last` at pure noise to 0.
        """
        way = 1 - timestep / last
        start, stop = self.part
        if way < start or (way >= stop and stop < 1):
            return 1.0
        if self.schedule == "oscillating":
            return oscillating_scale(scale, step, self.hold, self.low)
        if self.schedule == "power-cosine":
            return power_cosine_scale(scale, timestep / last, self.power)
        return scale

    def bound(self, scheduler: Schedule, v: Tensor, x_t: Tensor, timestep: Tensor | int) -> Tensor:
        """The prediction `v` whose clean latents are `threshold_x0` of those of `v`; the same `v` without a threshold."""
        if self.threshold is None:
            return v
        x0 = x0_from_velocity(scheduler, v, x_t, timestep)
        _, sigma = coefficients(scheduler, timestep, x_t)
        # x_t stays: x0 = signal x_t - sigma v. Written as a difference, so that what is in bounds does not change.
        return v + (x0 - threshold_x0(x0, self.threshold, self.percentile)) / sigma


def check_part(start: Any, stop: Any, what: str = "guidance must start and stop") -> None:
    """Raises a WaltError unless `start` and `stop` are shares of the way, in this order."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (start, stop))
    if not numbers or not 0 <= start < stop <= 1:
        raise WaltError(f"{what} between 0 and 1, in this order, got {start!r} and {stop!r}")


def oscillating_scale(scale: float, step: int, hold: int, low: float = 1.0) -> float:
    """Imagen Video's oscillating guidance (arXiv 2210.02303, section 2.5): high at first, then low and high in turn.

    It keeps the composition that strong guidance gives without the saturation of guiding every step. In walt's scale
    1 is no guidance.
    """
    return scale if step < hold or (step - hold) % 2 else low


def power_cosine_scale(scale: float, noise: float, power: float = 4.0) -> float:
    """1 + (scale - 1) (1 - cos(pi (1 - noise)^power)) / 2: none at pure noise, all of `scale` at the end.

    The schedule of MDT (arXiv 2303.14389) that W.A.L.T. uses on ImageNet: early steps, which decide the layout, stay
    diverse.

    Args:
        noise: timestep / last timestep, 1 at pure noise.
    """
    return 1 + (scale - 1) * 0.5 * (1 - math.cos(math.pi * (1 - noise) ** power))


def threshold_x0(x0: Tensor, bound: float, percentile: float | None = None) -> Tensor:
    """Thresholding of predicted clean data (Imagen, arXiv 2205.11487, section 2.3), here of latents `(B, ...)`.

    Strong guidance drives predictions out of the range of real data. Static: values beyond `bound` are clipped. Dynamic:
    with s the `percentile` of a sample's magnitudes, and at least `bound`, values are clipped at s and divided by
    s / bound, so that the whole sample comes back and few values lie at the bound.

    Args:
        bound: in units of x0; 1 for Imagen's pixels, some standard deviations for normalised latents.
        percentile: None for static, else in (0, 1), such as 0.995.
    """
    if percentile is None:
        return x0.clamp(-bound, bound)
    sizes = torch.quantile(x0.flatten(1).abs().double(), percentile, dim=1).clamp_min(bound).to(x0)
    sizes = sizes.reshape(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -sizes), sizes) * (bound / sizes)
