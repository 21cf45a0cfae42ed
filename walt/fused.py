"""Element-wise chains of the networks, some with their gradients written out: fewer passes over memory, no copies per token.

Values per sample (AdaLN) are applied sample by sample, never spread to tokens. Under `torch.compile` the plain formulas
are used, which the compiler fuses by itself. Letters: B samples, L tokens of the pack, D width, N heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from walt.linear import unhooked

Lengths = tuple[int, ...]
"""Tokens of each sample of a pack; they sum to L."""


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

    Without gradients on a CPU it is computed in float32, some rows at a time: torch's LayerNorm is slow on rows as short
    as a head.
    """
    known = x.dtype in (torch.float32, torch.bfloat16) and cos.dtype == torch.float32
    ours = not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()
    ours = known and ours and unhooked(norm)
    if not (ours and type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.bias is not None):
        return rotate(norm(x), cos, sin).to(x.dtype)
    weight, bias = norm.weight.float(), norm.bias.float()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[2] // 2
    step = max(1, _CHUNK // (x.shape[1] * x.shape[2]))
    # Three halves: the first and second, and the first again, so that the last two are the partners of the first two.
    halves = cos.new_empty(min(step, len(x)), x.shape[1], 3 * half)
    turned = cos.new_empty(min(step, len(x)), *x.shape[1:])
    for rows, o, c, s in zip(*(t.split(step) for t in (x, out, cos, sin)), strict=True):
        three, two = halves[: len(rows)], o if o.dtype == turned.dtype else turned[: len(rows)]
        y = three[..., : 2 * half]
        y.copy_(rows)
        y.sub_(y.mean(-1, keepdim=True))
        spread = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[2])
        y.mul_(spread.add_(norm.eps).rsqrt_())
        torch.addcmul(bias, y, weight, out=y)
        three[..., 2 * half :] = y[..., :half]
        torch.mul(y, c, out=two).addcmul_(three[..., half:], s)
        if two is not o:
            o.copy_(two)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, swish: bool = False) -> Tensor:
    """`F.rms_norm` over the last axis of `x`, then SiLU where `swish`.

    Without gradients on a CPU it is computed in float32, some rows at a time: torch composes it of passes over memory, in
    bfloat16 seven of them.
    """
    ours = not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()
    ours = ours and x.dtype in (torch.float32, torch.bfloat16) and not torch.is_autocast_enabled("cpu")
    if not (ours and type(x) is Tensor and (weight is None or weight.dtype == x.dtype)):
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.silu(y, inplace=not torch.is_grad_enabled()) if swish else y
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    wide = rows.dtype != torch.float32
    step = max(1, _CHUNK // rows.shape[1])
    buffer = rows.new_empty(min(step, len(rows)), rows.shape[1], dtype=torch.float32) if wide else out
    for part, o in zip(rows.split(step), out.split(step), strict=True):
        y = buffer[: len(part)].copy_(part) if wide else part
        scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        y = torch.mul(y, scale, out=y if wide else o)
        if weight is not None:
            y.mul_(weight)
        if swish:
            F.silu(y, inplace=True)
        if wide:
            o.copy_(y)
    return out.view(x.shape)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, lengths: Lengths, samples: Tensor | None = None) -> Tensor:
    """`x (L, D)` times 1 + scale plus shift, each `(B, D)`; the result has the widest dtype of the three.

    `samples` (of `sample_index`) is what a compiled graph uses in place of `lengths`: it is data. So does an accelerator,
    where samples differ in length: a launch for each would cost more.
    """
    if samples is not None and _by_index(x, lengths):
        rows, gain, shifts = _spread(samples, x, scale, shift)
        return (rows * (1 + gain) + shifts).to(_widest(x, scale, shift)).reshape(x.shape)
    x, scale, shift = _promoted(x, scale, shift)
    result: Tensor = _Modulate.apply(x, scale, shift, lengths)
    return result


def gated_add(x: Tensor, y: Tensor, gate: Tensor, lengths: Lengths, samples: Tensor | None = None) -> Tensor:
    """`x + gate * y` with `x`, `y` `(L, D)` and `gate (B, D)`; the result has the widest dtype of the three."""
    if samples is not None and _by_index(x, lengths):
        rows, gates = _spread(samples, y, gate)
        return (x.reshape(rows.shape) + gates * rows).to(_widest(x, y, gate)).reshape(x.shape)
    x, y, gate = _promoted(x, y, gate)
    result: Tensor = _GatedAdd.apply(x, y, gate, lengths)
    return result


STEP = 16
"""Tokens that share a row of `sample_index`, where all samples are multiples of it."""


def sample_index(lengths: Lengths) -> Tensor:
    """The sample of every token, `(L,)` int64 on the CPU; where no sample ends between them, of every `STEP`: `(L / STEP, 1)`.

    The gradient of what is spread by it is then a sum within the steps and a sixteenth of the scattered additions.
    """
    step = STEP if all(n % STEP == 0 for n in lengths) else 1
    counts = torch.tensor([n // step for n in lengths], device="cpu")
    index = torch.arange(len(lengths), device="cpu").repeat_interleave(counts)
    return index[:, None] if step > 1 else index


def _by_index(x: Tensor, lengths: Lengths) -> bool:
    return torch.compiler.is_compiling() or (x.device.type not in ("cpu", "meta") and len(set(lengths)) > 1)


def _spread(samples: Tensor, x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """`x` and for its rows the `(B, D)` vectors of their samples, at least in float32: their gradients are long sums."""
    index = samples.flatten()
    wide = [v.to(torch.promote_types(v.dtype, torch.float32)).index_select(0, index) for v in vectors]
    if samples.ndim == 1:
        return x, *wide
    return x.unflatten(0, (samples.shape[0], STEP)), *(v[:, None] for v in wide)


def _widest(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


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


_CHUNK = 2**17
"""Numbers of a chain at a time, in float32 half a megabyte: they stay in the cache."""


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = _widest(*tensors)
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
