"""What a run says: lines on the terminal, `log.jsonl` in the run folder, wandb (offline by default) and TensorBoard."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from walt.errors import WaltError
from walt.training.job import Job

# Figures that add up over packs, ranks and steps; the others are means over a step.
COUNTS = ("samples", "clips", "tokens", "pixels", "padding", "flops")
QUIET = {"samples", "tokens", "clips", "pixels", "forwards", "skipped", "time_checkpoint"}  # only in the log
STALL_SHARE = 0.2  # of a log window spent waiting for data: named
STALL_SECONDS = 60.0  # of one wait: named while it lasts


class Report:
    """Collects figures and times each step, and prints them every `run.log_every` steps.

    Times in a row, as seconds per step: `data` (waiting for it), `compute` (forward and backward), `optimizer`,
    `checkpoint`, and `other` (sheets, held-out loss). `mfu` is the share of `rate` that the model's own operations
    reach in the time that training itself takes: everything but sheets and held-out loss.

    Args:
        job: the recipe.
        output: the run folder; rows of its log after step `start` belong to work that is done again, and go; so do
            TensorBoard's.
        start: updates done.
        enabled: rank 0.
        rate: floating-point operations per second of all ranks together, for `mfu`.
    """

    def __init__(self, job: Job, output: Path, start: int, enabled: bool, rate: float | None = None) -> None:
        self.job, self.enabled, self.rate = job, enabled, rate
        self.console = Console(highlight=False)
        self.sums: dict[str, float] = {}
        self.seen: dict[str, int] = {}  # in how many steps: a figure may be missing in some
        self.times: dict[str, float] = {}
        self.count = 0
        self.begun = time.monotonic()
        self.left = job.run.steps - start
        self.at = start
        self.wandb: Any = None
        self.board: Any = None
        self.log: Any = None
        self.held: set[int] = set()  # steps before `start` whose held-out figures the log has
        if not enabled:
            return
        path = output / "log.jsonl"
        if path.exists():
            self.held = _cut(path, start)
        self.log = path.open("a")
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
        if job.run.tensorboard:
            from accelerate.tracking import TensorBoardTracker
            from accelerate.utils import is_tensorboard_available

            if not is_tensorboard_available():
                raise WaltError('run.tensorboard: needs the package tensorboard (pip install "walt[tensorboard]")')
            # Hides what an earlier process wrote after `start`, as the log's rows go.
            self.board = TensorBoardTracker("tensorboard", output, purge_step=start + 1)
            self.board.start()
        if start:
            self.say(f"resuming after step {start}")

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Counts the time inside as `what`."""
        begun = time.monotonic()
        yield
        self.times[what] = self.times.get(what, 0.0) + time.monotonic() - begun

    @contextmanager
    def waiting(self, step: int, busy: Callable[[], bool] | None = None) -> Iterator[None]:
        """The wait for a batch; a long one is named while it lasts. If the device is still `busy` then, it was none."""
        if not self.enabled:
            yield
            return
        begun = time.monotonic()

        def name() -> None:
            waited = time.monotonic() - begun
            self.say(f"step {step + 1}: loading stalls, waiting for data for {waited:.0f} s")

        timer = threading.Timer(STALL_SECONDS, name)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        what = "compute" if busy is not None and busy() else "data"
        self.times[what] = self.times.get(what, 0.0) + time.monotonic() - begun

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds one step's figures, already summed over packs and ranks; on logging steps prints and clears them."""
        if not self.enabled:
            return
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.seen[name] = self.seen.get(name, 0) + 1
        self.count += 1
        self.left -= 1
        self.at = step + 1
        if (step + 1) % self.job.run.log_every and step + 1 != self.job.run.steps:
            return
        self.flush()

    def flush(self) -> None:
        """Prints and writes what has been collected."""
        if not self.enabled or not self.count:
            return
        now = time.monotonic()
        whole = now - self.begun
        other = self.times.pop("other", 0.0)
        took = max(whole - other, 1e-9)
        # Of counts what a step has on average; of other figures the mean of those that there were: a step without a
        # finite loss has none, and a penalty may come every few steps.
        row = {
            name: value / (self.count if name in COUNTS else self.seen[name])
            for name, value in self.sums.items()
            if name != "flops"
        }
        row["seconds_per_step"] = took / self.count
        for name in ("samples", "tokens"):
            if name in self.sums:
                row[f"{name}_per_second"] = self.sums[name] / took
        if "tokens" in self.sums:
            padding = self.sums.get("padding", 0.0)
            row["padding"] = padding / max(padding + self.sums["tokens"], 1.0)
        for name in ("data", "compute", "optimizer", "checkpoint"):
            row[f"time_{name}"] = self.times.get(name, 0.0) / self.count
        row["data_wait"] = self.times.get("data", 0.0) / took
        if self.rate and self.sums.get("flops"):
            row["mfu"] = self.sums["flops"] / took / self.rate
        row["peak_memory_gb"] = _peak_memory() / 1e9
        eta = self.left * row["seconds_per_step"]
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in QUIET)
        self.say(f"step {self.at}/{self.job.run.steps}  {shown}  eta {eta / 60:.1f} min")
        if row["data_wait"] > STALL_SHARE and self.count > 1:
            self.say(
                f"loading stalls: {row['data_wait']:.0%} of the time went into waiting for data; raise run.workers, or "
                "precompute latents (walt encode)"
            )
        self._write({"step": self.at, **row})
        self.scalars(self.at, row)
        self.sums, self.seen, self.times, self.count, self.begun = {}, {}, {}, 0, now

    def heldout(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes held-out figures, a row of their own."""
        if not self.enabled:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"held out after step {step}  {shown}")
        self._write({"step": step, "heldout": dict(figures)})
        self.scalars(step, {f"heldout/{name}": value for name, value in figures.items()})

    def sheet(self, path: Path, step: int) -> None:
        """Shows a sample sheet, and the clips beside it, in wandb and TensorBoard."""
        if not self.enabled:
            return
        self.say(f"sheet {path}")
        clips = path.with_suffix(".mp4")
        if self.wandb is not None:
            import wandb

            shown: dict[str, Any] = {"sheet": wandb.Image(str(path))}
            if clips.exists():
                shown["clips"] = wandb.Video(str(clips), format="mp4")
            self.wandb.log(shown, step=step)
        if self.board is not None:
            import numpy as np
            from PIL import Image

            picture = np.asarray(Image.open(path).convert("RGB"))
            self.board.log_images({"sheet": picture[None]}, step, dataformats="NHWC")

    def say(self, line: str) -> None:
        """A line on the terminal."""
        if self.enabled:
            self.console.print(line, soft_wrap=True, markup=False)

    def note(self, step: int, words: str) -> None:
        """A line on the terminal and in the log: something that should not pass unseen."""
        if self.enabled:
            self.say(words)
            self._write({"step": step, "note": words})

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        if self.wandb is not None:
            self.wandb.log(dict(row), step=step)
        if self.board is not None:
            self.board.log(dict(row), step)

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()
        except OSError as error:
            # A full disk must not end a run that can go on without its log.
            self.say(f"cannot write log.jsonl: {error.strerror or error}")

    def close(self) -> None:
        if self.log is not None:
            try:
                self.log.close()
            except OSError as error:
                self.say(f"cannot write log.jsonl: {error.strerror or error}")
        if self.board is not None:
            self.board.finish()
        if self.wandb is not None:
            self.wandb.finish()


def _cut(path: Path, start: int) -> set[int]:
    """Drops the rows after step `start`, and a last line that a kill cut short; returns the steps with held-out figures."""
    kept: list[str] = []
    held: set[int] = set()
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= start:
                kept.append(line + "\n")
                if "heldout" in row:
                    held.add(int(row["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
    return held


def _peak_memory() -> float:
    """Bytes: of the accelerator where there is one, else the most this process ever had resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
