"""The measures against values that can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from walt.cli import main
from walt.conditioning import frames_twice, half_rate
from walt.errors import WaltError
from walt.evaluation.distances import Interval
from walt.evaluation.metrics import high_frequency_energy, join_ratio, lpips, masked_psnr, psnr, ssim
from walt.evaluation.super_resolution import (
    bicubic,
    compare_new_frames,
    compare_with_bicubic,
    new_frames_table,
    table,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_psnr_of_a_constant_error() -> None:
    video = torch.zeros(2, 3, 2, 4, 4)
    target = video.clone()
    target[1] += 0.2  # mean square 0.04, peak 2: 10 log10(4 / 0.04) = 20 dB
    result = psnr(video, target)
    assert math.isinf(result[0]) and result[1].item() == pytest.approx(20.0, abs=1e-4)


def test_ssim_is_torchmetrics_where_the_window_fits() -> None:
    video, target = noise(2, 3, 2, 16, 20), noise(2, 3, 2, 16, 20, seed=1)
    target = (target + video) / 2
    ours, theirs = (z.transpose(1, 2).flatten(0, 1) for z in (video, target))
    # torchmetrics mirrors the borders; without those 5 pixels its map is that of the places where the window fits.
    _, places = structural_similarity_index_measure(ours, theirs, data_range=2.0, return_full_image=True)
    expected = places[..., 5:-5, 5:-5].reshape(2, -1).mean(dim=1)
    assert torch.allclose(ssim(video, target), expected, rtol=1e-9)


def test_ssim_of_equal_and_of_constant_videos() -> None:
    video = noise(1, 3, 1, 11, 11)
    assert ssim(video, video).item() == pytest.approx(1.0)
    # Two constants have no variance: only the luminance term is left, with c1 = (0.01 * 2)^2.
    flat = torch.zeros(1, 3, 1, 11, 12)
    assert ssim(flat, flat + 0.5).item() == pytest.approx(4e-4 / (0.25 + 4e-4), rel=1e-4)
    with pytest.raises(WaltError, match="at least 11"):
        ssim(video[..., :10], video[..., :10])


def test_masked_psnr_sees_only_the_mask() -> None:
    video, alpha = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
    alpha[..., :2] = 255
    target = video.clone()
    target[..., :2] += 0.2
    target[..., 2:] += 1.0
    assert masked_psnr(video, target, alpha).item() == pytest.approx(20.0, abs=1e-4)
    everything = torch.ones_like(alpha)
    assert torch.allclose(masked_psnr(video, target, everything), psnr(video, target))
    with pytest.raises(WaltError, match="alpha: the mask"):
        masked_psnr(video, target, torch.zeros_like(alpha))


def test_high_frequency_energy_is_all_variance_at_cutoff_zero() -> None:
    video = noise(2, 3, 2, 10, 14)
    variance = video.var(dim=(-2, -1), correction=0).mean(dim=(1, 2))
    assert torch.allclose(high_frequency_energy(video, 0.0), variance, rtol=1e-6)


@pytest.mark.parametrize("period, expected", [(3, 0.5), (8, 0.0)])
def test_high_frequency_energy_of_a_wave(period: int, expected: float) -> None:
    # A half-sample cosine is an eigenvector of the mirrored frame: its energy sits at exactly 1 / period.
    wave = torch.cos(2 * math.pi * (torch.arange(24, dtype=torch.float64) + 0.5) / period)
    video = wave.expand(1, 3, 2, 16, 24)
    assert high_frequency_energy(video).item() == pytest.approx(expected, abs=1e-6)
    assert high_frequency_energy(video.transpose(-1, -2)).item() == pytest.approx(expected, abs=1e-6)


def test_lpips_averages_frames() -> None:
    video, target = noise(2, 3, 4, 8, 8), noise(2, 3, 4, 8, 8, seed=1)
    result = lpips(video, target, lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    assert torch.allclose(result, (video - target).abs().mean(dim=(1, 2, 3, 4)))


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


def test_a_perfect_stage_is_better_than_bicubic_and_bicubic_does_not() -> None:
    reference = noise(1, 3, 2, 32, 32).float() * 0.5
    low = bicubic(reference, 16, 16)
    perfect = compare_with_bicubic(lambda _: reference, [(low, reference)] * 2, distance)
    assert perfect.better and perfect.clips == 2 and perfect.lpips == 0
    assert perfect.high_frequency == perfect.high_frequency_reference > perfect.high_frequency_bicubic
    assert math.isinf(perfect.consistency)
    same = compare_with_bicubic(lambda x: bicubic(x, 32, 32), [(low, reference)], distance, "generated")
    assert not same.better and same.lpips == same.lpips_bicubic and same.lpips_gain == Interval(0.0, 0.0, 0.0)
    assert perfect.lpips_gain.estimate == pytest.approx(perfect.lpips_bicubic)
    assert "| generated | 1 |" in table([perfect, same])


def test_new_frames_are_judged_beside_copies_and_blends() -> None:
    """A square moves 1 pixel a frame: the true frames win, a stage that copies or blends is exactly as good as that."""
    video = torch.full((1, 3, 9, 16, 16), -1.0)
    for t in range(9):
        video[:, :, t, 4:10, t : t + 6] = 1
    alpha, low = (video[:, :1] > 0).float(), half_rate(video)
    perfect = compare_new_frames(lambda _: video, [(low, video, alpha)] * 2, distance)
    assert perfect.better and perfect.clips == 2 and math.isinf(perfect.psnr) and perfect.lpips == 0
    # Of the 8 columns where the subject is in three frames 2 are wrong by 2; blended, 4 by 1.
    assert perfect.psnr_repeated == pytest.approx(10 * math.log10(4 / (4 * 2 / 8)), abs=1e-4)
    assert perfect.psnr_blended == pytest.approx(10 * math.log10(4 / (1 * 4 / 8)), abs=1e-4)
    copies = compare_new_frames(frames_twice, [(low, video, alpha)], distance, "seen")
    assert not copies.better and copies.psnr == copies.psnr_repeated and copies.lpips == copies.lpips_repeated
    assert "| seen | 1 |" in new_frames_table([perfect, copies])
    with pytest.raises(WaltError, match="at least one real clip"):
        compare_new_frames(frames_twice, [], distance)
    with pytest.raises(WaltError, match="at least 2 are needed"):
        compare_new_frames(frames_twice, [(low[:, :, :1], video[:, :, :1], alpha[:, :, :1])], distance)
    with pytest.raises(WaltError, match="stage: expected output"):
        compare_new_frames(lambda x: x, [(low, video, alpha)], distance)


def test_bad_input_is_named() -> None:
    video = torch.zeros(1, 3, 2, 8, 8)
    with pytest.raises(WaltError, match="target: expected"):
        psnr(video, video[:, :, :1])
    with pytest.raises(WaltError, match="video: expected"):
        high_frequency_energy(video[0])
    with pytest.raises(WaltError, match="cutoff"):
        high_frequency_energy(video, 0.5)
    with pytest.raises(WaltError, match="at least one real clip"):
        compare_with_bicubic(lambda x: x, [], distance)
    with pytest.raises(WaltError, match="stage: expected output"):
        compare_with_bicubic(lambda x: x, [(video, torch.zeros(1, 3, 2, 16, 16))], distance)


def test_join_ratio_is_one_for_steady_motion_and_grows_with_a_jump() -> None:
    steady = torch.arange(29.0).view(1, 1, 29, 1, 1).expand(1, 3, 29, 4, 4) / 100
    assert join_ratio(steady, 17).item() == pytest.approx(1.0, rel=1e-4)
    jump = steady.clone()
    jump[:, :, 17:] += 0.02
    assert join_ratio(jump, 17).item() == pytest.approx(3.0, rel=1e-3)
    for border in range(5, 29, 4):
        if border != 17:
            jump[:, :, border:] += 0.02
    assert join_ratio(jump, 17).item() == pytest.approx(3.0, rel=1e-3)
    assert join_ratio(jump, 17, period=4).item() == pytest.approx(1.0, rel=1e-3), (
        "no more than other borders of latents"
    )
    with pytest.raises(WaltError, match="join must be from 2 to 27"):
        join_ratio(steady, 28)
    with pytest.raises(WaltError, match="join must be from 5 to 24"):
        join_ratio(steady, 4, period=4)


def staircase(differences: list[float]) -> Tensor:
    """A video `(1, 3, T, 4, 4)` whose frames differ from the one before by these numbers."""
    frames = torch.tensor([0.0, *differences]).cumsum(0)
    return frames.view(1, 1, -1, 1, 1).expand(1, 3, len(frames), 4, 4)


def test_join_ratio_takes_the_mean_of_the_two_middle_neighbours() -> None:
    around = staircase([0.01] * 4 + [0.02] + [0.03] * 4)
    assert join_ratio(around, 5).item() == pytest.approx(1.0, rel=1e-4)


def test_joins_are_judged_at_every_join_of_the_frames_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pipe(prompt: str, num_frames: int, **_: Any) -> SimpleNamespace:
        steps = [0.01] * (num_frames - 1)
        steps[16], steps[28] = 0.02, 0.03  # into frame 17 and into frame 29
        return SimpleNamespace(frames=staircase(steps).transpose(1, 2))

    def loaded(*_: object) -> Any:
        return type(
            "Cascade",
            (),
            {
                "vae_scale_factor_temporal": 4,
                "default_steps": lambda _, stages: [1] * stages,
                "__call__": staticmethod(pipe),
            },
        )()

    monkeypatch.setattr("walt.cli.load_cascade", loaded)
    words = ["evaluate", "joins", "--model", str(tmp_path), "-n", "1", "--frames"]
    assert main([*words, "41"]) == 0
    assert "neighbours: 2.00, 3.00 (median 2.50); where one latent ends inside a chunk: 1.00" in capsys.readouterr().out
    assert main([*words, "17"]) == 2
    assert "--frames 17 is one chunk, which has no join: give 29, 41, 53" in capsys.readouterr().err
