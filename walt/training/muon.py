"""Muon (Jordan et al. 2024, scaled as Liu et al., arXiv 2502.16982, section 2.2) on whole or sharded weights.

torch.optim.Muon takes matrices only; here a convolution's kernel counts as the matrix (out, in x taps), and what is no
matrix goes by AdamW in the same optimizer, so that a recipe only changes `optimizer.kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from walt.linear import has_bfloat16_units

# Of the quintic iteration that brings singular values near 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5, half: bool = False) -> Tensor:
    """The nearest orthogonal matrix, roughly: `(m, n)` with singular values in about 0.7 .. 1.2. Zero stays zero.

    In bfloat16 on a GPU, or with `half`; else in the matrix's own type.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16) if half or matrix.is_cuda else matrix
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalized: every direction of a weight moves equally far.

    A step has the root mean square of AdamW's usual one (0.2 x lr), so AdamW's learning rates and decay carry over.

    Args:
        parameters: tensors, or DTensors sharded along their first axis (gathered to be orthogonalized).
        lr: step size, of AdamW too.
        momentum: of the matrices, with Nesterov's look ahead.
        betas: of AdamW, for weights of fewer than two axes.
        weight_decay: decoupled, times lr.
        eps: of AdamW.
        half: orthogonalize in bfloat16 on a CPU too if it has units for that: a third of the time. What sums gradients in
            another order, as more ranks do, then differs by bfloat16's rounding.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        half: bool = False,
    ) -> None:
        self.half = half
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                    update = self._matrix if weight.ndim > 1 else self._vector
                    weight.sub_(update(weight, weight.grad, group) * group["lr"])

    def _matrix(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(grad, 1.0 - group["momentum"])
        ahead = grad.lerp(momentum, group["momentum"])
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        flat = whole.flatten(1)
        update = (
            orthogonalize(flat, half=self.half and has_bfloat16_units(flat.device)) * 0.2 * max(flat.shape) ** 0.5
        ).view_as(whole)
        if isinstance(ahead, DTensor):
            return cast(Tensor, distribute_tensor(update, ahead.device_mesh, ahead.placements, src_data_rank=None))
        return update

    def _vector(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        count, (first, second) = float(state["step"]), group["betas"]
        mean = state["mean"].lerp_(grad, 1.0 - first)
        square = state["square"].lerp_(grad.square(), 1.0 - second)
        return mean / (1.0 - first**count) / ((square / (1.0 - second**count)).sqrt() + group["eps"])
