"""Adafactor (Shazeer and Stern, arXiv 1804.04235) on whole or sharded weights.

The same update as torch.optim.Adafactor, which does not take the DTensors of FSDP2: what spans shards is summed over
ranks here. Row factors lie with their shard, column factors and norms are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


class Adafactor(torch.optim.Optimizer):
    """Factored second moments, updates clipped by their RMS, steps relative to the RMS of the weight.

    Args:
        parameters: tensors, or DTensors sharded along their first axis.
        lr: the largest relative step; the step of update n is min(lr, n^-0.5) x max(eps, RMS of the weight).
        weight_decay: decoupled, times lr.
        beta2_decay: the second moments of update n forget at the rate n^beta2_decay.
        eps: smallest RMS of a weight that steps are relative to.
        clip: largest RMS of an update before the step is taken.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        beta2_decay: float = -0.8,
        eps: float = 1e-3,
        clip: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "beta2_decay": beta2_decay, "eps": eps, "clip": clip}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            if grad.ndim > 1:
                state["row"] = torch.zeros_like(_mean(grad, -1))
                state["column"] = torch.zeros_like(_mean(grad, -2))
            else:
                state["square"] = torch.zeros_like(grad)
        state["step"] += 1
        count = float(state["step"])
        fresh = count ** group["beta2_decay"]
        rate = min(group["lr"], count**-0.5)
        tiny = torch.finfo(weight.dtype).eps
        size = _rms(weight).clamp(min=group["eps"])
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        square = grad * grad
        if grad.ndim > 1:
            row = state["row"].mul_(1 - fresh).add_(_mean(square, -1) * fresh)
            column = state["column"].mul_(1 - fresh).add_(_mean(square, -2) * fresh)
            moment = row * column / _mean(row, -2).clamp(min=tiny)
        else:
            moment = state["square"].mul_(1 - fresh).add_(square * fresh)
        update = grad * moment.clamp(min=tiny * tiny).rsqrt()
        update = update / (_rms(update) / group["clip"]).clamp(min=1.0)
        weight.sub_(update * (size * rate))


def _mean(x: Tensor, axis: int) -> Tensor:
    """The mean along an axis, kept; along a sharded axis over all shards. (A mean of unequal shards' means is none.)"""
    total = x.sum(dim=axis, keepdim=True)
    if isinstance(total, DTensor) and total.placements[0].is_partial():
        total = total.redistribute(placements=[Replicate()])
    return total / x.shape[axis]


def _rms(x: Tensor) -> Tensor:
    total = (x * x).sum()
    if isinstance(total, DTensor):
        total = total.redistribute(placements=[Replicate()])
    return (total / x.numel()).sqrt()
