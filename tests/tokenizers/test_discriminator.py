"""The discriminator: shapes, pictures as lone frames, anti-aliasing, and that it tells things apart."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from walt.errors import WaltError
from walt.tokenizers.discriminator import BLUR, Discriminator, DiscriminatorBlock, blur_pool


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames, height, width", [(17, 32, 32), (5, 32, 48), (1, 32, 32), (1, 20, 36)])
def test_shapes(frames: int, height: int, width: int) -> None:
    model = Discriminator(base=4, multipliers=(2, 4, 4))
    logits = model(noise(2, 3, frames, height, width))
    assert logits.shape == (2, math.ceil(frames / 8) * math.ceil(height / 8) * math.ceil(width / 8))
    whole = Discriminator(base=4, multipliers=(2, 4), sample_size=(frames, height, width))
    assert whole(noise(2, 3, frames, height, width)).shape == (2, 1)


def test_paper_size_on_meta() -> None:
    with torch.device("meta"):
        model = Discriminator(sample_size=(17, 128, 128))
        assert model(torch.zeros(2, 3, 17, 128, 128)).shape == (2, 1)
    assert [cast(DiscriminatorBlock, block).conv2.out_channels for block in model.blocks] == [256, 512, 512, 512, 512]


def test_a_picture_is_a_lone_frame_of_the_same_weights() -> None:
    """The 2D path of T = 1 equals the 3D convolution with zeros around the frame."""
    model = Discriminator(base=4, multipliers=(2, 4)).double()
    x = noise(2, 3, 1, 16, 16).double()
    by_hand = F.leaky_relu(model.conv_in(x), 0.2)
    for module in model.blocks:
        block = cast(DiscriminatorBlock, module)
        y = blur_pool(F.leaky_relu(block.conv1(by_hand), 0.2))
        y = F.leaky_relu(block.conv2(y), 0.2)
        by_hand = (y + block.shortcut(blur_pool(by_hand))) / 2**0.5
    by_hand = model.head(F.leaky_relu(model.conv_out(by_hand), 0.2)).flatten(1)
    assert torch.allclose(model(x), by_hand, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 17])
def test_blur_pool_against_a_strided_convolution(size: int) -> None:
    x = noise(2, 3, size, size + 3, 8).double()
    kernel = torch.tensor(BLUR).double() / 8
    y = x
    for axis in (2, 3, 4):
        row = y.movedim(axis, -1)
        length = row.shape[-1]
        padded = F.pad(row.reshape(1, -1, length), (1, 1 + length % 2), mode="replicate")
        weight = kernel.view(1, 1, 4).expand(padded.shape[1], 1, 4)
        row = F.conv1d(padded, weight, stride=2, groups=padded.shape[1]).reshape(*row.shape[:-1], -1)
        y = row.movedim(-1, axis)
    assert y.shape[2:] == tuple(math.ceil(n / 2) for n in x.shape[2:])
    assert torch.allclose(blur_pool(x), y, atol=1e-12)
    assert blur_pool(x, time=False).shape[2] == size
    assert torch.allclose(blur_pool(torch.ones(1, 1, size, 4, 4)), torch.ones(1, 1, math.ceil(size / 2), 2, 2))


def test_blur_pool_moves_little_with_its_input() -> None:
    """Anti-aliasing: what a shift by one pixel changes beyond a half-pixel move is far less than without the filter."""
    x = noise(1, 1, 1, 64, 64).cumsum(-1)
    x = x - x.mean(-1, keepdim=True)
    wave = torch.cos(math.pi * 0.9 * torch.arange(64.0)).expand(1, 1, 1, 64, 64)  # near Nyquist: only aliases remain
    assert blur_pool(wave, time=False)[..., 2:-2].abs().max() < 0.25 * wave[..., ::2, ::2].abs().max()
    slow = torch.cos(math.pi * 0.1 * torch.arange(64.0)).expand(1, 1, 1, 64, 64)
    assert blur_pool(slow, time=False)[..., 2:-2].abs().max() > 0.9
    plain = (x[..., ::2, ::2] - x.roll(1, -1)[..., ::2, ::2])[..., 2:-2].abs().mean()
    blurred = (blur_pool(x, time=False) - blur_pool(x.roll(1, -1), time=False))[..., 2:-2].abs().mean()
    assert blurred < 0.7 * plain


def test_learns_to_tell_moving_from_still() -> None:
    torch.manual_seed(0)
    model = Discriminator(base=4, multipliers=(2, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for seed in range(60):
        moving = noise(4, 3, 5, 8, 8, seed=seed)
        still = noise(4, 3, 1, 8, 8, seed=1000 + seed).expand(-1, -1, 5, -1, -1)
        loss = F.softplus(-model(moving)).mean() + F.softplus(model(still)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * 2 * math.log(2)


def test_bad_input() -> None:
    with pytest.raises(WaltError, match=r"\(B, 3, T, H, W\), got shape \(1, 3, 8, 8\)"):
        Discriminator(base=4, multipliers=(2,))(torch.zeros(1, 3, 8, 8))
    with pytest.raises(WaltError, match="without sample_size for mixed sizes"):
        Discriminator(base=4, multipliers=(2,), sample_size=(1, 8, 8))(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(WaltError, match=r"one entry per block \(2\)"):
        Discriminator(base=4, multipliers=(2, 2), temporal=(True,))
