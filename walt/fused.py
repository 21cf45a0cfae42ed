"""What the denoisers compute between attentions: linear layers, and element-wise chains with their gradients written out.

Values per sample (AdaLN) are applied sample by sample, never spread to tokens. Under `torch.compile` the plain formulas
are used, which the compiler fuses by itself. Letters: B samples, L tokens of the pack, D width, N heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

Lengths = tuple[int, ...]
"""Tokens of each sample of a pack; they sum to L."""


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; of a plain linear layer on a CPU by oneDNN, which torch itself asks in few cases only.

    Measured on one core of an AMD EPYC (`benchmarks/denoiser.py` prints both rates): float32 with AVX-512 215 GFLOP/s
    where torch's own product has 100, with AVX2 112 and 100, bfloat16 470 and 430.
    """
    if not _plain(layer, x):
        return cast(Tensor, layer(x))
    assert isinstance(layer, nn.Linear)
    if torch.is_grad_enabled():
        return cast(Tensor, _Linear.apply(x, layer.weight, layer.bias))
    return product(x, layer.weight, layer.bias)


def mlp(up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    """`down(gelu(up(x)))` of `(L, D)`, GELU in its tanh form.

    Without gradients on a CPU it is computed some rows at a time, so that the wide rows between stay in the cache.
    """
    if torch.is_grad_enabled() or not _plain(up, x):
        return project(down, gelu(project(up, x)))
    assert isinstance(up, nn.Linear)
    step = max(_ROWS, _WIDE_BYTES // (up.out_features * x.element_size()))
    out = []
    for rows in x.split(step):
        if _fuses_gelu():
            wide = product(rows, up.weight, up.bias, "gelu", "tanh")
        else:
            wide = gelu(product(rows, up.weight, up.bias))
        out.append(project(down, wide))
    return out[0] if len(out) == 1 else torch.cat(out)


def norm_modulate(
    norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor, lengths: Lengths, samples: Tensor | None = None
) -> Tensor:
    """`modulate(norm(x), ...)` of a norm without weights; one pass without gradients on a CPU."""
    ours = not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not ours or not x.dtype == scale.dtype == shift.dtype:
        return modulate(norm(x), scale, shift, lengths, samples)
    gain = 1 + scale
    parts = [
        F.layer_norm(part, norm.normalized_shape, gain[i], shift[i], norm.eps)
        for i, part in enumerate(x.split(lengths) if len(lengths) > 1 else (x,))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def norm_rotate(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate(norm(x), cos, sin)` in the dtype of `x`: the norm over each head of `(L, N, d)`, then the rotation.

    Without gradients on a CPU it is computed in float32, some rows at a time, the norm's weights put into the rotation:
    torch's LayerNorm is slow on rows as short as a head.
    """
    half = x.dtype in (torch.float32, torch.bfloat16) and cos.dtype == torch.float32
    ours = not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (half and ours and type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.bias is not None):
        return rotate(norm(x), cos, sin).to(x.dtype)
    w1, w2 = norm.weight.float().chunk(2)
    b1, b2 = norm.bias.float().chunk(2)
    tables = (w1 * cos, w2 * sin, w2 * cos, w1 * sin, b1 * cos - b2 * sin, b2 * cos + b1 * sin)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, 2 * _CHUNK // x[0].numel())
    for rows, o, *parts in zip(*(t.split(step) for t in (x, out, *tables)), strict=True):
        y = rows.float()
        y = y - y.mean(-1, keepdim=True)
        spread = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        y.mul_(spread.add_(norm.eps).rsqrt_())
        turned = o if o.dtype == y.dtype else torch.empty_like(y)
        (a, b), (first, second) = y.chunk(2, dim=-1), turned.chunk(2, dim=-1)
        torch.addcmul(parts[4], a, parts[0], out=first).addcmul_(b, parts[1], value=-1)
        torch.addcmul(parts[5], b, parts[2], out=second).addcmul_(a, parts[3])
        if turned is not o:
            o.copy_(turned)
    return out


def modulate(x: Tensor, scale: Tensor, shift: Tensor, lengths: Lengths, samples: Tensor | None = None) -> Tensor:
    """`x (L, D)` times 1 + scale plus shift, each `(B, D)`; the result has the widest dtype of the three.

    `samples (L,)`, the sample of every token, is what a compiled graph uses in place of `lengths`: it is data.
    """
    if samples is not None and torch.compiler.is_compiling():
        return x * (1 + scale.index_select(0, samples)) + shift.index_select(0, samples)
    x, scale, shift = _promoted(x, scale, shift)
    result: Tensor = _Modulate.apply(x, scale, shift, lengths)
    return result


def gated_add(x: Tensor, y: Tensor, gate: Tensor, lengths: Lengths, samples: Tensor | None = None) -> Tensor:
    """`x + gate * y` with `x`, `y` `(L, D)` and `gate (B, D)`; the result has the widest dtype of the three."""
    if samples is not None and torch.compiler.is_compiling():
        return x + gate.index_select(0, samples) * y
    x, y, gate = _promoted(x, y, gate)
    result: Tensor = _GatedAdd.apply(x, y, gate, lengths)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + d/2) of `x` `(L, N, d)` by `(L, 1, d/2)`; the result has the wider dtype of `x` and those."""
    if torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    dtype = torch.promote_types(x.dtype, cos.dtype)
    result: Tensor = _Rotate.apply(x.to(dtype), cos, sin)
    return result


def add_frames(mixed: Tensor, y: Tensor, time: Tensor) -> Tensor:
    """`mixed + y`, plus for each token the frame before and the frame after, weighted by `time (2, D)`.

    `mixed` and `y` are `(B, t, h, w, D)`.
    """
    mixed, y, time = _promoted(mixed, y, time)
    if torch.compiler.is_compiling():
        none = torch.zeros_like(y[:, :1])
        before, after = torch.cat([none, y[:, :-1]], dim=1), torch.cat([y[:, 1:], none], dim=1)
        return mixed + y + before * time[0] + after * time[1]
    result: Tensor = _AddFrames.apply(mixed, y, time)
    return result


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, equal to torch's within rounding; on a CPU in float32 about twice as fast."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    result: Tensor = _Gelu.apply(x)
    return result


_ROWS = 16
"""Fewer rows are left to torch, as its call costs less."""
_WIDE_BYTES = 2**22
"""Of the wide rows of an MLP: they stay in the last-level cache."""


def _plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN can stand in for a layer: an ordinary one, not adapted, quantised or hooked, and rows enough."""
    if torch.compiler.is_compiling() or type(layer) is not nn.Linear or type(x) is not Tensor or x.device.type != "cpu":
        return False
    hooked = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    hooked = hooked or layer._backward_hooks or layer._backward_pre_hooks or layer._compiled_call_impl
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


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)  # type: ignore[untyped-decorator]
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


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def _rows(lengths: Lengths, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The samples of `(L, D)` tensors: all at once `(B, n, D)` where they are equally long."""
    if len(set(lengths)) == 1:
        yield tuple(x.unflatten(0, (len(lengths), lengths[0])) for x in tensors)
    else:
        yield from zip(*(x.split(lengths) for x in tensors), strict=True)


def _per(lengths: Lengths, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The `(B, D)` values that go with `_rows`."""
    if len(set(lengths)) == 1:
        yield tuple(v[:, None] for v in vectors)
    else:
        yield from zip(*vectors, strict=True)


def _sums(x: Tensor, lengths: Lengths) -> Tensor:
    """`(L, D)` summed over the tokens of each sample: `(B, D)`."""
    if len(set(lengths)) == 1:
        return x.unflatten(0, (len(lengths), lengths[0])).sum(1)
    return torch.stack([part.sum(0) for part in x.split(lengths)])


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, lengths: Lengths) -> Tensor:
        gain = 1 + scale
        ctx.save_for_backward(x, gain)
        ctx.lengths = lengths
        out = torch.empty_like(x)
        for (a, o), (g, s) in zip(_rows(lengths, x, out), _per(lengths, gain, shift), strict=True):
            torch.addcmul(s, a, g, out=o)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        dx = torch.empty_like(x)
        for (g, o), (m,) in zip(_rows(ctx.lengths, grad, dx), _per(ctx.lengths, gain), strict=True):
            torch.mul(g, m, out=o)
        return dx, _sums(grad * x, ctx.lengths), _sums(grad, ctx.lengths), None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, lengths: Lengths) -> Tensor:
        ctx.save_for_backward(y, gate)
        ctx.lengths = lengths
        out = torch.empty_like(x)
        for (a, b, o), (g,) in zip(_rows(lengths, x, y, out), _per(lengths, gate), strict=True):
            torch.addcmul(a, b, g, out=o)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gate = ctx.saved_tensors
        dy = torch.empty_like(y)
        for (g, o), (m,) in zip(_rows(ctx.lengths, grad, dy), _per(ctx.lengths, gate), strict=True):
            torch.mul(g, m, out=o)
        return grad, dy, _sums(grad * y, ctx.lengths), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: float = 1.0) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-back)
        torch.mul(b, cos, out=second).addcmul_(a, sin, value=back)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotate.apply(grads[0], *ctx.saved_tensors, -ctx.back), None, None, None


class _AddFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, y: Tensor, time: Tensor) -> Tensor:
        ctx.save_for_backward(y, time)
        out = mixed + y
        out[:, 1:].addcmul_(y[:, :-1], time[0])
        out[:, :-1].addcmul_(y[:, 1:], time[1])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, time = ctx.saved_tensors
        dy = grad.clone()
        dy[:, :-1].addcmul_(grad[:, 1:], time[0])
        dy[:, 1:].addcmul_(grad[:, :-1], time[1])
        before = (grad[:, 1:] * y[:, :-1]).flatten(0, 3).sum(0)
        after = (grad[:, :-1] * y[:, 1:]).flatten(0, 3).sum(0)
        return grad, dy, torch.stack([before, after])


_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _SLOPE
_CHUNK = 2**17  # elements: half a megabyte, the working set of a chain stays in the cache


class _Gelu(torch.autograd.Function):
    """x sigmoid(u) with u = x p and p = _SLOPE + _CUBE x^2, since (1 + tanh(u / 2)) / 2 = sigmoid(u)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        slope = x.new_tensor(_SLOPE)
        for a, o in zip(x.reshape(-1).split(_CHUNK), out.view(-1).split(_CHUNK), strict=True):
            p = torch.addcmul(slope, a, a, value=_CUBE)
            torch.mul(a, p, out=o)
            F.silu(o, inplace=True)  # u sigmoid(u) = p x sigmoid(u)
            o.div_(p)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        slope = x.new_tensor(_SLOPE)
        parts = (t.reshape(-1).split(_CHUNK) for t in (x, grad, out))
        for a, g, o in zip(*parts, strict=True):
            p = torch.addcmul(slope, a, a, value=_CUBE)
            s = torch.mul(a, p).sigmoid_()
            torch.addcmul(s, s, s, value=-1, out=o)  # s' = s (1 - s)
            o.mul_(a)
            p.mul_(3).sub_(2 * _SLOPE)  # u'
            torch.addcmul(s, o, p, out=o).mul_(g)
        return out
