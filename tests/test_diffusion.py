"""The schedule, the velocity algebra and guidance against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from walt.diffusion import (
    GuidanceOptions,
    add_noise,
    coefficients,
    draw_timesteps,
    guide,
    make_scheduler,
    noise_from_velocity,
    oscillating_scale,
    power_cosine_scale,
    signal_level,
    threshold_x0,
    velocity,
    x0_from_velocity,
)
from walt.errors import WaltError


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 8, 3, 5, 5, generator=generator, dtype=torch.float64)
    return x0, noise


def test_zero_snr_schedule_is_lin_et_al_rescaling_of_the_linear_one() -> None:
    """Algorithm 1 of arXiv 2305.08891, in float64."""
    root = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alpha_bar = make_scheduler().alphas_cumprod
    assert alpha_bar[-1] == 0
    torch.testing.assert_close(alpha_bar.double(), expected, atol=2e-6, rtol=0)
    plain = make_scheduler(zero_snr=False).alphas_cumprod
    torch.testing.assert_close(plain.double(), root**2, atol=2e-6, rtol=0)
    assert plain[-1] == pytest.approx(4.04e-5, rel=1e-2)


def test_sampling_starts_at_the_last_step() -> None:
    for steps in (1, 20, 50):
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == steps


def test_target_at_the_last_step_is_minus_x0(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    scheduler = make_scheduler()
    assert torch.equal(velocity(scheduler, x0, noise, 999), -x0)
    assert torch.equal(add_noise(scheduler, x0, noise, 999), noise)


def test_velocity_inverts(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    scheduler, t = make_scheduler(), torch.tensor([0, 10, 500, 999])
    signal, sigma = coefficients(scheduler, t, x0)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones_like(signal))
    x_t, v = add_noise(scheduler, x0, noise, t), velocity(scheduler, x0, noise, t)
    torch.testing.assert_close(x0_from_velocity(scheduler, v, x_t, t), x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(noise_from_velocity(scheduler, v, x_t, t), noise, atol=1e-12, rtol=0)


def test_agrees_with_diffusers_and_takes_one_timestep_for_any_shape(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = (value.float() for value in pair)
    scheduler, t = make_scheduler(), torch.tensor([3, 250, 600, 998])
    torch.testing.assert_close(add_noise(scheduler, x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        velocity(scheduler, x0, noise, t), scheduler.get_velocity(x0, noise, t), atol=1e-5, rtol=0
    )
    one = velocity(scheduler, x0[1], noise[1], 250)
    torch.testing.assert_close(one, velocity(scheduler, x0, noise, t)[1])


def test_ddim_with_an_oracle_recovers_x0(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Exact velocities lead from pure noise to x0, whatever the number of steps."""
    x0, noise = pair
    scheduler: DDIMScheduler = make_scheduler()
    for steps in (1, 4, 20):
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            signal, sigma = coefficients(scheduler, t, x)
            v = signal * (x - signal * x0) / sigma - sigma * x0  # the velocity at x whose x0 is known
            x = scheduler.step(v, t, x).prev_sample
        torch.testing.assert_close(x, x0, atol=1e-6, rtol=0)


def test_guidance_formula_in_float64(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    cond, uncond = pair
    assert guide(cond, uncond, 1.0, 0.7) is cond
    torch.testing.assert_close(guide(cond, uncond, 6.0), uncond + 6 * (cond - uncond))
    out = guide(cond, uncond, 6.0, 0.7)
    for i in range(len(cond)):  # Lin et al. equations 14 to 16, sample by sample
        guided = uncond[i] + 6 * (cond[i] - uncond[i])
        rescaled = guided * cond[i].flatten().std() / guided.flatten().std()
        torch.testing.assert_close(out[i], 0.7 * rescaled + 0.3 * guided, atol=1e-12, rtol=0)
    single = guide(cond.float(), uncond.float(), 6.0, 0.7)
    torch.testing.assert_close(single.double(), out, atol=1e-5, rtol=0)
    full = guide(cond, uncond, 6.0, 1.0)
    torch.testing.assert_close(full[2].std(), cond[2].std())


def test_closed_form_signal_level_follows_the_schedule() -> None:
    steps = torch.arange(1000)
    level = signal_level(steps.float())
    assert (level - make_scheduler().alphas_cumprod.sqrt()).abs().max() < 1e-3
    assert level[-1] == 0
    assert (level.diff() < 0).all()


def test_timesteps_are_uniform_or_mostly_logit_normal() -> None:
    uniform = draw_timesteps(20_000, 1000, None, torch.Generator().manual_seed(0))
    assert (int(uniform.min()), int(uniform.max())) == (0, 999)
    assert abs(float(uniform.float().mean()) - 499.5) < 6
    normal = draw_timesteps(20_000, 1000, (-0.8, 0.5), torch.Generator().manual_seed(0))
    assert int(normal.min()) >= 0 and int(normal.max()) <= 999
    # sigmoid of the 16 % and 84 % points of the normal, mixed with a tenth of uniform
    inside = ((normal >= 214) & (normal < 426)).float().mean()
    assert abs(float(inside) - (0.9 * 0.683 + 0.1 * 0.212)) < 0.02
    assert 0.02 < float((normal >= 700).float().mean()) < 0.05


def test_oscillating_guidance_holds_and_then_alternates() -> None:
    assert [oscillating_scale(15, step, 4) for step in range(10)] == [15, 15, 15, 15, 1, 15, 1, 15, 1, 15]
    assert [oscillating_scale(15, step, 0, 3) for step in range(3)] == [3, 15, 3]


def test_power_cosine_guidance_is_its_formula_and_rises() -> None:
    """1 + (w - 1) (1 - cos(pi (1 - t/T)^s)) / 2 in float64, with the values that can be had by hand."""
    noise = np.linspace(1, 0, 101)
    for power in (1.0, 4.0):
        expected = 1 + (3.8 - 1) * (1 - np.cos(np.pi * (1 - noise) ** power)) / 2
        found = [power_cosine_scale(3.8, float(x), power) for x in noise]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        assert np.all(np.diff(found) >= 0)
        assert found[0] == 1 and found[-1] == pytest.approx(3.8, abs=1e-12)
    assert power_cosine_scale(5, 0.5, 1.0) == pytest.approx(3)  # half way of the plain cosine
    assert power_cosine_scale(5, 1 - 0.5**0.25, 4.0) == pytest.approx(3)


def test_options_give_the_scale_of_a_step() -> None:
    assert GuidanceOptions().scale(6, 3, 500) == 6
    assert GuidanceOptions("oscillating", hold=1).scale(6, 1, 500) == 1
    assert GuidanceOptions("power-cosine", power=1.0).scale(6, 0, 999) == 1
    assert GuidanceOptions("power-cosine", power=1.0).scale(6, 0, 0) == pytest.approx(6)


def test_guidance_may_act_in_a_part_of_the_way() -> None:
    options = GuidanceOptions(start=0.25, stop=0.75)
    found = [options.scale(6, step, 999 * (1 - way)) for step, way in enumerate((0.0, 0.2, 0.25, 0.5, 0.7, 0.75, 1.0))]
    assert found == [1, 1, 6, 6, 6, 1, 1]
    assert [GuidanceOptions(start=0.5).scale(6, 0, t) for t in (999, 500, 499, 0)] == [1, 1, 6, 6]
    assert [GuidanceOptions(stop=0.5).scale(6, 0, t) for t in (999, 500, 499, 0)] == [6, 6, 1, 1]
    # Inside it is the schedule's.
    assert GuidanceOptions("oscillating", hold=0, low=2.0, stop=0.5).scale(6, 0, 900) == 2
    assert GuidanceOptions("oscillating", hold=0, low=2.0, stop=0.5).scale(6, 1, 900) == 6


def test_a_default_part_of_the_way_gives_way_to_either_end() -> None:
    assert GuidanceOptions("oscillating", low=2.0).within(0.25, 0.6) == GuidanceOptions(
        "oscillating", low=2.0, start=0.25, stop=0.6
    )
    for given in (GuidanceOptions(start=0.0), GuidanceOptions(stop=0.2), GuidanceOptions(start=0.7)):
        assert given.within(0.25, 0.6) is given
    assert GuidanceOptions(start=0.7).part == (0.7, 1.0) and GuidanceOptions(stop=0.2).part == (0.0, 0.2)


def test_thresholds_are_imagens(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Section 2.3 of arXiv 2205.11487, in numpy and float64."""
    x0 = pair[0] * torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    assert torch.equal(threshold_x0(x0, 1.5), torch.from_numpy(np.clip(x0.numpy(), -1.5, 1.5)))
    found = threshold_x0(x0, 1.5, 0.9)
    for row, out in zip(x0.numpy(), found.numpy(), strict=True):
        s = max(np.quantile(np.abs(row), 0.9), 1.5)
        np.testing.assert_allclose(out, np.clip(row, -s, s) / s * 1.5, rtol=1e-12)
    assert torch.equal(found[0], x0[0])  # within the bound nothing changes
    assert float(found.abs().max()) == pytest.approx(1.5)
    # A sample does not depend on its batch.
    torch.testing.assert_close(threshold_x0(x0[2:3], 1.5, 0.9), found[2:3], rtol=0, atol=0)


def test_a_bounded_prediction_has_the_thresholded_latents(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, noise = pair
    scheduler = make_scheduler()
    for t in (0, 400, 999):
        x_t, v = add_noise(scheduler, x0, noise, t), velocity(scheduler, x0, noise, t)
        assert GuidanceOptions().bound(scheduler, v, x_t, t) is v
        assert torch.equal(GuidanceOptions(threshold=100.0).bound(scheduler, v, x_t, t), v)
        for percentile in (None, 0.8):
            out = GuidanceOptions(threshold=0.7, percentile=percentile).bound(scheduler, v, x_t, t)
            expected = threshold_x0(x0, 0.7, percentile)
            torch.testing.assert_close(x0_from_velocity(scheduler, out, x_t, t), expected, rtol=0, atol=1e-9)
            # The noise follows: eps = (x_t - signal x0) / sigma.
            signal, sigma = coefficients(scheduler, t, x0)
            eps = (x_t - signal * expected) / sigma
            torch.testing.assert_close(noise_from_velocity(scheduler, out, x_t, t), eps, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine"}, "must be one of constant, oscillating, power-cosine, got 'cosine'"),
        ({"hold": -1}, "at least 0"),
        ({"power": 0}, "must be positive, got 0"),
        ({"start": 0.5, "stop": 0.5}, "in this order, got 0.5 and 0.5"),
        ({"stop": 1.1}, "between 0 and 1"),
        ({"start": math.nan}, "between 0 and 1"),
        ({"threshold": 0.0}, "must be positive, got 0.0"),
        ({"percentile": 0.9}, "go with a threshold"),
        ({"threshold": 1.0, "percentile": 1.0}, "between 0 and 1"),
        ({"power": math.nan}, "must be positive"),
    ],
)
def test_options_that_do_not_fit(fields: dict, message: str) -> None:
    with pytest.raises(WaltError, match=message):
        GuidanceOptions(**fields)
