"""The packed layout: a pack is its samples end to end, and nothing is lost on the way."""

from __future__ import annotations

import pytest
import torch

from walt.errors import WaltError
from walt.latents import denormalize, normalize, pack, positions, token_counts, unpack


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpack_inverts_pack(patch: int) -> None:
    samples = [torch.randn(8, t, 4 * h, 4 * w) for t, h, w in ((5, 2, 3), (1, 1, 1), (2, 3, 2), (1, 2, 5))]
    tokens, grids = pack(samples, patch)
    assert grids[0] == (5, 8 // patch, 12 // patch)
    assert tokens.shape == (sum(token_counts(grids)), 8 * patch**2)
    for a, b in zip(samples, unpack(tokens, grids, patch), strict=True):
        assert torch.equal(a, b)


def test_token_and_feature_order() -> None:
    z = torch.arange(2 * 2 * 4 * 4).view(2, 2, 4, 4)
    tokens, grids = pack([z], 2)
    place = positions(grids)
    for row, (t, h, w) in enumerate(place.tolist()):
        assert torch.equal(tokens[row], z[:, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].reshape(-1))


def test_positions_are_raster_per_sample() -> None:
    place = positions([(2, 1, 2), (1, 2, 1)])
    assert place.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert place.dtype == torch.int64


def test_normalisation_is_per_channel_and_invertible() -> None:
    z = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    mean, std = (0.5, -1.0, 2.0), (2.0, 0.5, 1.5)
    out = normalize(z, mean, std)
    assert torch.allclose(out[:, 1], (z[:, 1] + 1) / 0.5)
    assert torch.allclose(denormalize(out, mean, std), z, atol=1e-12)
    assert torch.equal(normalize(z[0], mean, std), out[0])


def test_errors_name_the_argument() -> None:
    z = torch.randn(8, 1, 4, 6)
    with pytest.raises(WaltError, match="nothing to pack"):
        pack([], 1)
    with pytest.raises(WaltError, match=r"latents\[1\].*\(C, t, h, w\) needed"):
        pack([z, z[0]], 1)
    with pytest.raises(WaltError, match=r"4 channels, but latents\[0\] has 8"):
        pack([z, z[:4]], 1)
    with pytest.raises(WaltError, match="4x6 given, positive multiples of the patch size 4"):
        pack([z], 4)
    with pytest.raises(WaltError, match="tokens: shape"):
        unpack(torch.randn(23, 8), [(1, 4, 6)], 1)
    with pytest.raises(WaltError, match="3 means and 3 deviations"):
        normalize(z, (0.0,) * 3, (1.0,) * 3)
