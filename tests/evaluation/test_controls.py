"""Controls: what each keeps and what it breaks, and that the seed decides."""

from __future__ import annotations

import pytest
import torch

from walt.errors import WaltError
from walt.evaluation.controls import CONTROLS, NOISE, corrupt


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_keep_shape_and_range_and_follow_the_seed(control: str) -> None:
    video = torch.rand(2, 3, 6, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = video.clone()
    result = corrupt(video, control, seed=3)
    assert result.shape == video.shape and result.dtype == video.dtype and result.abs().max() <= 1
    assert result.equal(corrupt(video, control, seed=3)) and video.equal(before) and not result.equal(video)


def test_what_each_control_does() -> None:
    video = torch.rand(1, 3, 5, 40, 40, generator=torch.Generator().manual_seed(0)) - 0.5
    shuffled = corrupt(video, "shuffled", seed=1)
    assert shuffled.sum(dim=(1, 3, 4)).sort().values.equal(video.sum(dim=(1, 3, 4)).sort().values)
    assert not shuffled.equal(corrupt(video, "shuffled", seed=2))
    assert corrupt(video, "frozen").equal(video[:, :, :1].repeat(1, 1, 5, 1, 1))
    assert corrupt(video, "blurred").var() < 0.5 * video.var()
    flat = torch.full((1, 3, 2, 16, 16), 0.3)
    assert torch.allclose(corrupt(flat, "blurred"), flat)
    grey = torch.zeros(1, 3, 4, 64, 64)
    assert corrupt(grey, "noisy").std().item() == pytest.approx(NOISE, rel=0.02)


def test_bad_input_is_named() -> None:
    with pytest.raises(WaltError, match=r"control: 'blured' .*did you mean \"blurred\""):
        corrupt(torch.zeros(1, 3, 2, 8, 8), "blured")
    with pytest.raises(WaltError, match="video: expected"):
        corrupt(torch.zeros(3, 2, 8, 8), "frozen")
