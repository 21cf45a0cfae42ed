"""Linear layers, the MLP and its GELU on a CPU: by oneDNN, which torch itself asks in few cases only.

Measured on one core of an AMD EPYC, products of 1,280 and more rows: float32 with AVX-512 215 GFLOP/s where torch's own
has 100, with AVX2 112 and 100, bfloat16 470 and 430. Elsewhere, under `torch.compile`, and for layers that are adapted,
quantised or hooked, everything here is what torch does.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`."""
    if not _plain(layer, x):
        return cast(Tensor, layer(x))
    assert isinstance(layer, nn.Linear)
    if torch.is_grad_enabled():
        return cast(Tensor, _Linear.apply(x, layer.weight, layer.bias))
    return product(x, layer.weight, layer.bias)


def mlp(up: nn.Module, down: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """`down(gelu(up(norm(x))))` of `(L, D)`, GELU in its tanh form; `norm` is one over D.

    Without gradients on a CPU it is computed some rows at a time, so that what lies between stays in the cache.
    """
    if torch.is_grad_enabled() or not _plain(up, x):
        return project(down, gelu(project(up, x if norm is None else norm(x))))
    assert isinstance(up, nn.Linear)
    most = max(_ROWS, _WIDE_BYTES // (up.out_features * x.element_size()))
    parts = max(1, round(len(x) / most))  # of equal length: products of a small rest are slower
    out = []
    for rows in x.tensor_split(parts):
        if norm is not None:
            rows = norm(rows)
        if _fuses_gelu():
            wide = product(rows, up.weight, up.bias, "gelu", "tanh")
        else:
            wide = gelu(product(rows, up.weight, up.bias))
        out.append(project(down, wide))
    return out[0] if len(out) == 1 else torch.cat(out)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, equal to torch's within rounding; on a CPU with its gradient about twice as fast."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    result: Tensor = _Gelu.apply(x)
    return result


_ROWS = 16
"""Fewer rows are left to torch, as its call costs less."""
_WIDE_BYTES = 2**22
"""Of the wide rows of an MLP: they stay in the last-level cache."""


def unhooked(module: nn.Module) -> bool:
    """Whether nothing happens at a call of `module` beside its own: offloading, for one, brings weights only then."""
    return not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
    )


def _plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can stand in for a layer: an ordinary one, not adapted, quantised or hooked, and rows enough."""
    if torch.compiler.is_compiling() or type(layer) is not nn.Linear or type(x) is not Tensor or x.device.type != "cpu":
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    hooked = "forward" in layer.__dict__ or layer._compiled_call_impl is not None or any(hooks)
    weight = layer.weight
    return (
        not hooked
        and type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _onednn_types()
        and x.numel() >= _ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


@torch.compiler.assume_constant_result
def has_bfloat16_units(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 (CUDA, AVX512-BF16, AMX). Others emulate it, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


@lru_cache(maxsize=1)
def _onednn_types() -> tuple[torch.dtype, ...]:
    """The types in which oneDNN multiplies at least as fast as torch by itself."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.cpu._is_avx512_bf16_supported() else (torch.float32,)


@lru_cache(maxsize=1)
def _fuses_gelu() -> bool:
    """With AVX-512 GELU costs next to nothing inside the product, with AVX2 more than by itself."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")


def product_is_faster(x: Tensor) -> bool:
    """Whether `product` beats torch's own products of several small matrices: float32 with AVX-512, on few threads, as
    each of them is one call."""
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and _fuses_gelu()
        and torch.float32 in _onednn_types()
        and torch.get_num_threads() <= 4
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", form: str = "") -> Tensor:
    """`x weight^T + bias` by oneDNN, and an activation of its result. It knows no gradient."""
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()  # rows cut out of a larger matrix would go to a slow reference form
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)
    return out


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _product_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of shapes, as torch counts those of its own products."""
    return 2 * math.prod(x) * int(weight[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, grad = x.flatten(0, -2), grads[0].flatten(0, -2)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _transposed_product(grad, weight).view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dweight = _transposed_product(grad.t(), x)
        return dx, dweight, grad.sum(0) if ctx.needs_input_grad[2] else None


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, differentiable; in bfloat16 torch asks oneDNN by itself."""
    return cast(Tensor, _Linear.apply(a, b.t(), None)) if a.dtype == torch.float32 else a @ b


_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _SLOPE
_CHUNK = 2**17  # numbers, in float32 half a megabyte: what a chain reads and writes stays in the cache


class _Gelu(torch.autograd.Function):
    """x sigmoid(u) with u = x p and p = _SLOPE + _CUBE x^2, since (1 + tanh(u / 2)) / 2 = sigmoid(u).

    With y the result and s = sigmoid(u) the derivative is s + y (1 - s) u', u' = 3 p - 2 _SLOPE: made along with the
    result, while all of it is in the cache, and kept in place of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        derivative = torch.empty_like(out) if ctx.needs_input_grad[0] else out
        slope = torch.tensor(_SLOPE)
        parts = (t.view(-1).split(_CHUNK) for t in (x.contiguous(), out, derivative))
        for a, o, d in zip(*parts, strict=True):
            a = a.float()
            p = torch.addcmul(slope, a, a, value=_CUBE)
            s = torch.mul(a, p).sigmoid_()
            y = torch.mul(a, s)
            o.copy_(y)
            if derivative is not out:
                y.addcmul_(y, s, value=-1)
                d.copy_(s.addcmul_(y, p.sub_(2 / 3 * _SLOPE), value=3))
        if derivative is not out:
            ctx.save_for_backward(derivative)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return grad * derivative
