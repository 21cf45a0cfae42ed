"""Winograd's convolution is torch's, to the rounding that its larger constants cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from walt.tokenizers import winograd


@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("size", [(3, 16, 16), (5, 17, 22), (4, 6, 43), (3, 3, 3)])
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("block", [1, 4320, 2**21])
def test_equals_the_direct_convolution(
    padding: tuple[int, int], size: tuple[int, int, int], before: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_BLOCK", block)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, *size), torch.randn(6, 8, 3, 3, 3) / 15, torch.randn(6)
    for taken in (bias, None):
        out = winograd.conv3d(x, weight, taken, padding, before)
        exact = F.conv3d(
            F.pad(x, (0, 0, 0, 0, before, 0)).double(),
            weight.double(),
            None if taken is None else taken.double(),
            padding=(0, *padding),
        )
        assert out.shape == exact.shape
        assert (out - exact).abs().max() < 2e-5 * exact.abs().max()


def test_used_only_where_it_fits() -> None:
    x, weight = torch.zeros(1, 32, 3, 16, 16), torch.zeros(32, 32, 3, 3, 3)
    with torch.no_grad():
        assert winograd.fits(x, weight, (1, 1, 1))
        assert not winograd.fits(x, weight, (1, 2, 2))
        assert not winograd.fits(x.bfloat16(), weight.bfloat16(), (1, 1, 1))
        assert not winograd.fits(x, torch.zeros(32, 32, 1, 1, 1), (1, 1, 1))
        assert not winograd.fits(x[:, :8], weight[:, :8], (1, 1, 1))
        assert not winograd.fits(x[..., :4], weight, (1, 1, 1))
    assert not winograd.fits(x, weight, (1, 1, 1))  # with gradients
