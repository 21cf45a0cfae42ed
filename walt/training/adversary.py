"""The second player of adversarial training: a network with its own optimizer, stepped by the loop after the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor

from walt.errors import WaltError
from walt.training.checkpoint import flat_optimizer, restore_optimizer
from walt.training.job import OptimizerJob


@runtime_checkable
class Adversarial(Protocol):
    """An objective that trains a second network. `adversary` None: this job has none."""

    adversary: Any
    adversary_optimizer: OptimizerJob

    def adversary_loss(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The second network's loss on the batch that `loss` saw last, and figures for the log."""


class Adversary:
    """Network and optimizer of an `Adversarial` objective.

    The network is not wrapped for distribution: ranks hold equal copies, and `step` averages their gradients.
    """

    def __init__(self, objective: Adversarial, accelerator: Accelerator) -> None:
        assert objective.adversary is not None
        self.objective, self.accelerator, self.job = objective, accelerator, objective.adversary_optimizer
        self.network = objective.adversary.to(accelerator.device).train()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.job.lr, betas=self.job.betas, weight_decay=self.job.weight_decay
        )

    def backward(self, share: float) -> dict[str, float | Tensor]:
        """Adds `share` of the gradient on the batch that the objective saw last."""
        with self.accelerator.autocast():
            loss, figures = self.objective.adversary_loss()
        self.accelerator.backward(loss * share)
        return {**figures, "adversary_loss": loss.detach()}

    def step(self, step: int, lr: Callable[[OptimizerJob, int], float]) -> None:
        """One optimizer step; `lr` gives the rate of a step."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.job.clip_norm)
        if not bool(torch.isfinite(norm)):
            raise WaltError(
                f"step {step}: the adversary's gradient is not finite; lower loss.adversarial.optimizer.lr or "
                "loss.adversarial.r1"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr(self.job, step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors."""
        network = {f"network.{k}": v.detach().contiguous().clone() for k, v in self.network.state_dict().items()}
        return {**network, **{f"optimizer.{k}": v for k, v in flat_optimizer(self.optimizer).items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave."""

        def part(prefix: str) -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        try:
            self.network.load_state_dict(part("network."))
        except RuntimeError as error:
            raise WaltError("the checkpoint's adversary has another shape; choose another run.output") from error
        restore_optimizer(self.optimizer, part("optimizer."))
