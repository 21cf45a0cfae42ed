"""Optimizers of a recipe, their schedule, and the guard that refuses bad updates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from walt.training.adafactor import Adafactor
from walt.training.job import OptimizerJob, RunJob
from walt.training.muon import Muon


def make_optimizer(
    job: OptimizerJob, parameters: Sequence[Tensor], half: bool = False, ranks: ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """AdamW, Adafactor or Muon; `betas` belong to AdamW, and to what Muon leaves to it.

    `half`: the run's products are bfloat16 (`run.precision`), and so are Muon's. `ranks`: who else takes the same step on
    whole weights, and may share Muon's work.
    """
    if job.kind == "adafactor":
        return Adafactor(parameters, lr=job.lr, weight_decay=job.weight_decay)
    if job.kind == "muon":
        return Muon(parameters, lr=job.lr, betas=job.betas, weight_decay=job.weight_decay, half=half, ranks=ranks)
    # One kernel for all weights; shards go by lists, as before.
    fused = all(weight.is_cuda and not isinstance(weight, DTensor) for weight in parameters)
    return torch.optim.AdamW(
        parameters, lr=job.lr, betas=job.betas, weight_decay=job.weight_decay, fused=True if fused else None
    )


def warm(optimizer: torch.optim.Optimizer) -> None:
    """Gives a new optimizer its state (zeros), so that a checkpoint has something to be read into."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def learning_rate(optimizer: OptimizerJob, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to `final_lr_ratio` of the peak, or constant: a function of the step alone."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    low = optimizer.final_lr_ratio
    return optimizer.lr * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress)))


class Guard:
    """Refuses an update whose loss or gradient is not finite, or whose gradient norm jumps away from the last ones.

    A discriminator's gradients grow from next to nothing and have penalties at some steps: of it, only what is not finite
    is refused.

    What it remembers is saved with a checkpoint, so that a resumed run refuses what the uninterrupted one does.
    """

    REMEMBERED = 64
    FIRST = 16  # norms to have seen before any is called a spike

    def __init__(self, run: RunJob) -> None:
        self.factor = run.spike_factor
        self.norms: dict[str, list[float]] = {}
        self.skipped = 0  # in a row
        self.total = 0

    def refuses(self, losses: dict[str, float], norms: dict[str, float]) -> str | None:
        """Why this update must not happen, or None; the numbers are the same on all ranks, and so is the answer."""
        reason = None
        for name in norms:
            usual = self.norms.setdefault(name, [])
            if not (math.isfinite(losses[name]) and math.isfinite(norms[name])):
                reason = f"{name}: loss {losses[name]:.4g}, gradient norm {norms[name]:.4g}"
            elif (
                name == "model"
                and self.factor
                and len(usual) >= self.FIRST
                and norms[name] > self.factor * (median := statistics.median(usual))
                and median  # after steps without a gradient none is a jump
            ):
                reason = (
                    f"{name}: gradient norm {norms[name]:.4g}, {norms[name] / median:.0f} times the usual {median:.3g}"
                )
        if reason is not None:
            self.skipped += 1
            self.total += 1
            return reason
        self.skipped = 0
        for name, norm in norms.items():
            self.norms[name] = [*self.norms[name], norm][-self.REMEMBERED :]
        return None

    def state(self) -> dict[str, Any]:
        return {"norms": self.norms, "skipped": self.skipped, "total": self.total}

    def load(self, state: dict[str, Any]) -> None:
        self.norms, self.skipped, self.total = state["norms"], state["skipped"], state["total"]
