"""What a run says: lines on the terminal, `log.jsonl` in the run folder, and wandb (offline by default)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from walt.training.job import Job


class Report:
    """Collects figures each step and prints their mean every `run.log_every` steps."""

    def __init__(self, job: Job, output: Path, start: int, enabled: bool) -> None:
        self.job, self.enabled = job, enabled
        self.console = Console(highlight=False)
        self.sums: dict[str, float] = {}
        self.count = 0
        self.begun = time.monotonic()
        self.paused = 0.0
        self.left = job.run.steps - start
        self.wandb: Any = None
        self.log: Any = None
        if not enabled:
            return
        self.log = (output / "log.jsonl").open("a")
        if job.run.wandb:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE", "offline")
            self.wandb = wandb.init(
                project="walt",
                dir=str(output),
                config=job.model_dump(),
                mode=mode,
                settings=wandb.Settings(silent=True),
            )
        if start:
            self.console.print(f"resuming after step {start}")

    def step(self, step: int, figures: Mapping[str, float | Tensor]) -> None:
        """Adds one step's figures; on logging steps prints, writes and clears them."""
        if not self.enabled:
            return
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.count += 1
        self.left -= 1
        if (step + 1) % self.job.run.log_every and step + 1 != self.job.run.steps:
            return
        took = time.monotonic() - self.begun - self.paused
        row = {name: value / self.count for name, value in self.sums.items()}
        row["seconds_per_step"] = took / self.count
        for name in ("tokens", "samples"):
            if name in row:
                row[f"{name}_per_second"] = self.sums[name] / took
        eta = self.left * row["seconds_per_step"]
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        self.console.print(f"step {step + 1}/{self.job.run.steps}  {shown}  eta {eta / 60:.1f} min", soft_wrap=True)
        self.log.write(json.dumps({"step": step + 1, **row}) + "\n")
        self.log.flush()
        if self.wandb is not None:
            self.wandb.log(row, step=step + 1)
        self.sums, self.count, self.begun, self.paused = {}, 0, time.monotonic(), 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside (checkpoints, sheets) does not count as training."""
        begun = time.monotonic()
        yield
        self.paused += time.monotonic() - begun

    def sheet(self, path: Path, step: int) -> None:
        """Shows a sample sheet in wandb."""
        if self.enabled:
            self.console.print(f"sheet {path}")
            if self.wandb is not None:
                import wandb

                self.wandb.log({"sheet": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.wandb is not None:
            self.wandb.finish()
