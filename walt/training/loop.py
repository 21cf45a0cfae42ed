"""The one training loop: tokenizer, base and super-resolution stages differ only in their objective.

Every batch and every random number is a pure function of (seed, step, rank), so the data order and the noise after a
resume are exactly those of a run that was never interrupted; no sampler or generator state needs saving.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from walt.errors import WaltError
from walt.training import checkpoint
from walt.training.adversary import Adversarial, Adversary
from walt.training.job import Job, OptimizerJob
from walt.training.report import Report


class Objective(Protocol):
    """What a kind of job adds to the loop."""

    model: nn.Module

    def batch(self, step: int, rank: int) -> Any:
        """The host-side batch of one step: a pure function of the job, the step and the rank."""

    def to(self, device: torch.device) -> None:
        """Moves frozen parts (not `model`) to the device."""

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The scalar loss of one batch and figures for the log ("tokens" and "samples" among them)."""

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the finished (EMA) model as a `from_pretrained` folder."""


Sheet = Callable[[Objective, nn.Module, Path], None]


def train(job: Job, objective: Objective, sheet: Sheet | None = None, resume: bool = True) -> Path:
    """Runs a job to its last step and exports the EMA model; returns the exported folder.

    Args:
        job: the recipe.
        objective: model, data and loss of the recipe's kind.
        sheet: draws a sample sheet to a PNG path from the EMA weights; None: no sheets.
        resume: continue from the newest checkpoint in `run.output` if there is one.

    Raises:
        WaltError: damaged checkpoint, a run folder of another recipe, a loss that is not finite.
    """
    run, output = job.run, Path(job.run.output)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=run.precision, gradient_accumulation_steps=1, cpu=not torch.cuda.is_available()
    )
    rank = accelerator.process_index
    torch.manual_seed(run.seed)
    model = objective.model
    if run.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=job.optimizer.lr, betas=job.optimizer.betas, weight_decay=job.optimizer.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    objective.to(accelerator.device)
    ema = EMAModel(bare.parameters(), decay=run.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    rival = None
    if isinstance(objective, Adversarial) and objective.adversary is not None:
        rival = Adversary(objective, accelerator)
    start = 0
    found = checkpoint.latest(output) if resume else None
    if found is not None:
        state = checkpoint.load(found, bare, optimizer, ema.shadow_params)
        start = int(state["step"])
        ema.optimization_step = start
        _same_recipe(found, state["job"], job)
        if rival is not None:
            rival.load(checkpoint.load_adversary(found))
    report = Report(job, output, start, enabled=accelerator.is_main_process)
    batches = iter(_loader(objective, start * run.accumulate, run.steps * run.accumulate, rank, run.workers))
    model.train()
    try:
        for step in range(start, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(job.optimizer, step, run.steps)
            figures: dict[str, float | Tensor] = {}
            for part in range(run.accumulate):
                micro = step * run.accumulate + part
                generator = torch.Generator().manual_seed(_seed(run.seed, micro, rank))
                with accelerator.autocast():
                    loss, figures = objective.loss(model, next(batches), generator)
                accelerator.backward(loss / run.accumulate)
                if rival is not None:
                    figures = {**figures, **rival.backward(1 / run.accumulate)}
            norm = accelerator.clip_grad_norm_(trained, job.optimizer.clip_norm)
            if not bool(torch.isfinite(norm)):
                raise WaltError(
                    f"step {step}: the gradient is not finite; resume from {checkpoint.latest(output) or 'the start'} "
                    "with a lower optimizer.lr"
                )
            optimizer.step()
            optimizer.zero_grad()
            if rival is not None:
                rival.step(step, lambda optimizer, step: learning_rate(optimizer, step, run.steps))
            ema.step(bare.parameters())
            report.step(
                step, {**figures, "loss": loss.detach(), "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
            )
            done = step + 1
            if accelerator.is_main_process:
                if done % run.checkpoint_every == 0 or done == run.steps:
                    with report.pause():
                        checkpoint.save(
                            output,
                            done,
                            bare,
                            optimizer,
                            ema.shadow_params,
                            {"job": job.model_dump()},
                            rival.state() if rival is not None else None,
                        )
                        checkpoint.prune(output, run.keep_checkpoints)
                if sheet is not None and (done == run.steps or (run.sheet_every and done % run.sheet_every == 0)):
                    with report.pause(), averaged(ema, bare):
                        path = output / f"sheet-{done:08d}.png"
                        sheet(objective, bare, path)
                        report.sheet(path, done)
        final = output / "final"
        if accelerator.is_main_process:
            with averaged(ema, bare):
                objective.export(bare, final)
        accelerator.wait_for_everyone()
        return final
    finally:
        report.close()


class averaged:
    """Context: the model carries its EMA weights (and is in eval mode) inside, its own again afterwards."""

    def __init__(self, ema: EMAModel, model: nn.Module) -> None:
        self.ema, self.model = ema, model

    def __enter__(self) -> None:
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        self.ema.restore(self.model.parameters())
        self.model.train()


def learning_rate(optimizer: OptimizerJob, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to `final_lr_ratio` of the peak, or constant: a function of the step alone."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    low = optimizer.final_lr_ratio
    return optimizer.lr * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _seed(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


class _Steps(Dataset[Any]):
    def __init__(self, objective: Objective, start: int, stop: int, rank: int) -> None:
        self.objective, self.start, self.stop, self.rank = objective, start, stop, rank

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.objective.batch(self.start + index, self.rank)


def _loader(objective: Objective, start: int, stop: int, rank: int, workers: int) -> Iterator[Any]:
    steps = _Steps(objective, start, stop, rank)
    loader: DataLoader[Any] = DataLoader(steps, batch_size=None, shuffle=False, num_workers=workers)
    yield from loader


def _same_recipe(folder: Path, saved: dict[str, Any], job: Job) -> None:
    """A run folder continues its own recipe; only how long and how it is watched may change."""
    free = {"steps", "checkpoint_every", "keep_checkpoints", "log_every", "sheet_every", "workers", "wandb", "output"}

    def fixed(values: dict[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps(values))
        plain["run"] = {key: value for key, value in plain["run"].items() if key not in free}
        return plain

    old, new = fixed(saved), fixed(job.model_dump())
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise WaltError(
            f"{folder} was trained with another recipe ({', '.join(changed)} differ); choose another run.output or "
            "--no-resume"
        )
