"""Layers through oneDNN equal the plain ones, and whatever is no plain layer goes its own way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from walt import fused, linear


def layer(inner: int, outer: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, outer, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_is_the_layer_with_its_gradients(dtype: torch.dtype, bias: bool) -> None:
    plain = layer(24, 40, dtype, bias)
    x = torch.randn(3, 50, 24, dtype=dtype, requires_grad=True)
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    results = []
    for call in (plain, lambda y: linear.project(plain, y)):
        out = call(x)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.square().mean(), [x, *plain.parameters()])])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= limit * max(1.0, float(a.detach().abs().max()))
    with torch.no_grad():
        assert (linear.project(plain, x) - results[0][0]).abs().max() <= limit * float(results[0][0].abs().max())


def test_second_derivatives_are_there() -> None:
    plain, x = layer(24, 20), torch.randn(30, 24, requires_grad=True)

    def penalty(out: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return slope.square().sum()

    ours, theirs = (
        torch.autograd.grad(penalty(call), plain.weight)[0] for call in (linear.project(plain, x), plain(x))
    )
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_layer_that_is_adapted_or_hooked_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, plain = torch.randn(40, 24), layer(24, 24)
    expected = plain(x)
    doubled = Doubled(24, 24)
    doubled.load_state_dict(plain.state_dict())
    assert torch.allclose(linear.project(doubled, x), 2 * expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(
            linear.mlp(doubled, nn.Identity(), x), F.gelu(2 * expected, approximate="tanh"), atol=1e-5
        )
    plain.register_forward_hook(lambda module, given, out: out + 1)
    assert torch.allclose(linear.project(plain, x), expected + 1, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.project(layer(24, 24), x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_in_blocks_of_rows_is_the_mlp(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_WIDE_BYTES", 1)  # 16 rows at a time, and a rest
    up, down, norm = layer(24, 96, dtype), layer(96, 24, dtype), nn.RMSNorm(24).to(dtype)
    x = torch.randn(75, 24, dtype=dtype)
    with torch.no_grad():
        expected = down(F.gelu(up(norm(x)), approximate="tanh"))
        found = linear.mlp(up, down, x, norm)
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert (linear.mlp(up, down, x, norm) - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_rows_cut_out_of_a_larger_matrix() -> None:
    x, wide = torch.randn(40, 16), torch.randn(30, 48)
    for weight in (wide[:, 16:32], wide[:16].t()[:30], wide[::2, :16]):
        assert torch.allclose(linear.product(x, weight), x @ weight.t(), atol=1e-4)


def test_its_operations_are_counted() -> None:
    plain = layer(24, 40)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear.project(plain, torch.randn(50, 24))
    assert counter.get_total_flops() == 2 * 50 * 24 * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_norms_and_rotation_in_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK", 5 * 2 * 12)
    torch.manual_seed(0)
    norm = nn.LayerNorm(12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, angle = torch.randn(23, 2, 12), torch.rand(23, 1, 6) * 6
    exact = fused.rotate(norm(x), angle.cos(), angle.sin())
    norm, x = norm.to(dtype), x.to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        found = fused.norm_rotate(norm, x, angle.cos(), angle.sin())
    traced = fused.norm_rotate(norm, x, angle.cos(), angle.sin())  # with gradients: the plain formula
    assert found.dtype == traced.dtype == dtype and traced.requires_grad
    assert (found - exact).abs().max() < limit and (traced - exact).abs().max() < limit


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("swish", [False, True])
def test_rms_norm_by_rows_is_torchs(
    dtype: torch.dtype, close: float, swish: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that do not fill the last part, of axes in another order, with weights and without, and with gradients."""
    monkeypatch.setattr(fused, "_CHUNK", 200)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 24, 7, 5, generator=generator).to(dtype)
    for weight in (None, torch.rand(24, generator=generator).to(dtype)):
        wide = None if weight is None else weight.double()
        true = F.rms_norm(x.movedim(1, -1).double(), (24,), wide, 1e-6)
        true = F.silu(true) if swish else true
        with torch.no_grad():
            found = fused.rms_norm(x.movedim(1, -1), weight, 1e-6, swish)
            assert found.dtype == dtype and found.is_contiguous()
            assert fused.rms_norm(x[:0].movedim(1, -1), weight, 1e-6, swish).shape == (0, 7, 5, 24)
        torch.testing.assert_close(found.double(), true, rtol=close, atol=close)
        traced = fused.rms_norm(x.movedim(1, -1).requires_grad_(), weight, 1e-6, swish)
        assert traced.requires_grad
        torch.testing.assert_close(traced.double(), true, rtol=close, atol=close)


def test_norm_and_modulation_in_one() -> None:
    norm, x, lengths = nn.LayerNorm(12, elementwise_affine=False), torch.randn(9, 12), (4, 5)
    scale, shift = torch.randn(2, 2, 12)
    expected = fused.modulate(norm(x), scale, shift, lengths)
    with torch.no_grad():
        assert torch.allclose(fused.norm_modulate(norm, x, scale, shift, lengths), expected, atol=1e-5)
