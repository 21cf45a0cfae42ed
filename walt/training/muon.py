"""Muon (Jordan et al. 2024, scaled as Liu et al., arXiv 2502.16982, section 2.2) on whole or sharded weights.

torch.optim.Muon takes matrices only; here a convolution's kernel counts as the matrix (out, in x taps), and what is no
matrix goes by AdamW in the same optimizer, so that a recipe only changes `optimizer.kind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from walt.linear import has_bfloat16_units

# Of the quintic iteration that brings singular values near 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5, half: bool = False) -> Tensor:
    """The nearest orthogonal matrix, roughly: `(m, n)` with singular values in about 0.7 .. 1.2. Zero stays zero.

    Of `(k, m, n)` each matrix for itself. In bfloat16 on a GPU, or with `half`; else in the matrix's own type.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16) if half or matrix.is_cuda else matrix
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrix.dtype)


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
        batched: whole weights of one shape as one batch, the rest list by list; None: on a GPU, where a step is otherwise
            thousands of small launches.
        ranks: processes that hold the same whole weights and gradients (DDP): of the matrices of one shape each
            orthogonalizes its share, and gets the others' from the others. All end with the same weights, equal up to
            rounding to those of one process.
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
        batched: bool | None = None,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        self.half, self.batched = half, batched
        self.ranks, self.world = ranks, 1 if ranks is None else dist.get_world_size(ranks)
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            together: list[Tensor] = []
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not isinstance(weight, DTensor) and (self._batched(weight) or self.world > 1):
                    together.append(weight)
                    continue
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                update = self._matrix if weight.ndim > 1 else self._vector
                weight.sub_(update(weight, weight.grad, group) * group["lr"])
            if together:
                if group["weight_decay"]:
                    torch._foreach_mul_(together, 1.0 - group["lr"] * group["weight_decay"])
                self._matrices([weight for weight in together if weight.ndim > 1], group)
                self._vectors([weight for weight in together if weight.ndim < 2], group)

    def _batched(self, weight: Tensor) -> bool:
        return weight.is_cuda if self.batched is None else self.batched

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight, zeros at first."""
        state = cast(dict[str, Tensor], self.state[weight])
        if not state and weight.ndim > 1:
            state["momentum"] = torch.zeros_like(weight)
        elif not state:
            # The count stays on the host, which needs it.
            state["step"] = torch.tensor(0.0)
            state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state

    def _matrix(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        momentum = self._state(weight)["momentum"].lerp_(grad, 1.0 - group["momentum"])
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
        state = self._state(weight)
        state["step"] += 1
        count, (first, second) = float(state["step"]), group["betas"]
        mean = state["mean"].lerp_(grad, 1.0 - first)
        square = state["square"].lerp_(grad.square(), 1.0 - second)
        return mean / (1.0 - first**count) / ((square / (1.0 - second**count)).sqrt() + group["eps"])

    def _matrices(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        """What `_matrix` gives, taken from all the weights: those of one flattened shape `(m, n)` are one `(k, m, n)`."""
        if not weights:
            return
        grads = [cast(Tensor, weight.grad) for weight in weights]
        momenta = [self._state(weight)["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, grads, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
        shapes: dict[tuple[Any, ...], list[int]] = {}
        for i, weight in enumerate(weights):
            shape = (weight.shape[0], weight[0].numel(), weight.dtype, weight.device)
            shapes.setdefault(shape, []).append(i)
        for (m, n, _, _), members in shapes.items():
            flat = [ahead[i].reshape(m, n) for i in members]
            rows = self._orthogonal(flat).mul_(0.2 * max(m, n) ** 0.5 * group["lr"]).unbind()
            updates = [row.reshape(weights[i].shape) for i, row in zip(members, rows, strict=True)]
            torch._foreach_sub_([weights[i] for i in members], updates)

    def _orthogonal(self, matrices: Sequence[Tensor]) -> Tensor:
        """`orthogonalize` of each `(m, n)`, as `(k, m, n)`; every rank makes every `world`-th, or all if they are fewer."""
        shared = len(matrices) >= self.world > 1
        mine = matrices[dist.get_rank(self.ranks) :: self.world] if shared else matrices
        half = self.half and has_bfloat16_units(mine[0].device)
        if self._batched(mine[0]):
            made = orthogonalize(torch.stack(list(mine)), half=half)
        else:
            made = torch.stack([orthogonalize(matrix, half=half) for matrix in mine])
        if not shared:
            return made
        # Those without a last one send zeros in its place.
        sent = made.new_zeros(math.ceil(len(matrices) / self.world), *made.shape[1:])
        sent[: len(made)] = made
        got = sent.new_empty(self.world, *sent.shape)
        dist.all_gather(list(got.unbind()), sent, group=self.ranks)
        return got.transpose(0, 1).flatten(0, 1)[: len(matrices)]

    def _vectors(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        """What `_vector` gives, taken from all the weights: those with as many steps behind them at once."""
        counts: dict[float, list[Tensor]] = {}
        for weight in weights:
            state = self._state(weight)
            state["step"] += 1
            counts.setdefault(float(state["step"]), []).append(weight)
        first, second = group["betas"]
        for count, members in counts.items():
            grads = [cast(Tensor, weight.grad) for weight in members]
            means = [self._state(weight)["mean"] for weight in members]
            squares = [self._state(weight)["square"] for weight in members]
            torch._foreach_lerp_(means, grads, 1.0 - first)
            torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1.0 - second)
            sizes = torch._foreach_div(squares, 1.0 - second**count)
            torch._foreach_sqrt_(sizes)
            torch._foreach_add_(sizes, group["eps"])
            updates = torch._foreach_mul(means, group["lr"] / (1.0 - first**count))
            torch._foreach_div_(updates, sizes)
            torch._foreach_sub_(members, updates)
