"""Atomic checkpoints in safetensors and JSON: a folder appears whole under its name, or not at all.

torch.distributed.checkpoint writes one safetensors file per rank, in a thread, and reads them on any number of ranks.
Tensors are named `PART.model.NAME`, `PART.optimizer.NAME.KEY`, `ema.NAME` and `power.NUMBER.NAME`; `state.json`, written
last, holds the step, the recipe, the guard's memory and the size of every file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from walt.errors import WaltError
from walt.training import average
from walt.training.ranks import Ranks

# A single process is not a mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")

PREFIX = "checkpoint-"
FAILURES = 3  # checkpoints in a row that could not be written before a run gives up


class Writer:
    """Writes the checkpoints of a run, one at a time.

    Args:
        run: the run folder.
        ranks: all of them take part in every call.
        keep: how many whole checkpoints stay.
        background: return as soon as the tensors are copied, and write in a thread.
        say: told, on rank 0, what went wrong.
    """

    def __init__(self, run: Path, ranks: Ranks, keep: int, background: bool, say: Callable[[str], None]) -> None:
        self.run, self.ranks, self.keep, self.background, self.say = run, ranks, keep, background, say
        self.threads = concurrent.futures.ThreadPoolExecutor(1)
        self.pending: concurrent.futures.Future[str | None] | None = None
        self.failures = 0

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], last: bool = False) -> None:
        """Writes `tensors` and `state` as `run/checkpoint-STEP`; when that fails the older ones stay, and it is said.

        Args:
            step: updates done.
            tensors: whole tensors (the same on all ranks) or DTensors.
            state: JSON.
            last: wait, and fail rather than go on without the checkpoint.

        Raises:
            WaltError: the last checkpoint, or FAILURES in a row, could not be written.
        """
        self.wait()
        target = self.run / f"{PREFIX}{step:08d}"
        temporary = self.run / f".{target.name}.tmp"
        problem = None
        if self.ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = self._problem(target, error)
        if (problem := self.ranks.agree(problem)) is None:
            storage = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            written = dcp.async_save(
                {name: _rowed(tensor) for name, tensor in tensors.items()},
                storage_writer=storage,
                process_group=self.ranks.writers,
                no_dist=self.ranks.world == 1,
            )
            assert isinstance(written, concurrent.futures.Future)
            self.pending = self.threads.submit(self._finish, written, temporary, target, {**state, "step": step})
            if self.background and not last:
                return
            problem = self._result()
        self._judge(problem, last)

    def wait(self) -> None:
        """Until the last save is done; raises as `save` does."""
        if self.pending is not None:
            self._judge(self._result(), False)

    def _result(self) -> str | None:
        assert self.pending is not None
        problem, self.pending = self.pending.result(), None
        # Only rank 0 names and renames the folder: whether that went well is its to say.
        result: str | None = self.ranks.agree(problem)
        return result

    def _judge(self, problem: str | None, last: bool) -> None:
        if problem is None:
            self.failures = 0
            return
        self.failures += 1
        if last or self.failures >= FAILURES:
            raise WaltError(problem)
        self.say(f"{problem}; training goes on")

    def _finish(
        self, written: concurrent.futures.Future[Any], temporary: Path, target: Path, state: dict[str, Any]
    ) -> str | None:
        try:
            written.result()
            if self.ranks.main:
                files = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.safetensors"))}
                text = json.dumps({**state, "files": files}, indent=1)
                with (temporary / "state.json").open("w") as handle:
                    handle.write(text)
                    handle.flush()
                    os.fsync(handle.fileno())
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
                # It is there. Older ones that cannot be deleted now are tried again after the next.
                with contextlib.suppress(OSError):
                    prune(self.run, self.keep)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return self._problem(target, error)
        except CheckpointException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return self._problem(target, next(iter(error.failures.values()))[0])
        return None

    def _problem(self, target: Path, error: BaseException) -> str:
        last = latest(self.run)
        kept = "there is no earlier one" if last is None else f"the last one, {last.name}, is untouched"
        words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return f"cannot write checkpoint {target}: {words.splitlines()[-1]}; {kept}"


def load(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks, all_of_it: bool = True) -> dict[str, Any]:
    """Reads what `Writer.save` wrote into `tensors`, in place, on any number of ranks; returns the JSON state.

    Without `all_of_it` the checkpoint may hold more than `tensors`.

    Raises:
        WaltError: a file is missing, truncated or of another model; names the file and what to do.
    """
    state = _whole(folder)
    try:
        storage = dcp.HuggingFaceStorageReader(str(folder))
        found = _sizes(storage)
        rowed = {name: _rowed(tensor) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in rowed.items()}
        compared = found.keys() | wanted.keys() if all_of_it else wanted.keys()
        differ = sorted(name for name in compared if found.get(name) != wanted.get(name))
        if differ:
            raise WaltError(f"{folder} belongs to another model ({differ[0]} differs); change run.output")
        dcp.load(rowed, storage_reader=storage, process_group=ranks.writers, no_dist=ranks.world == 1)
    except (OSError, SafetensorError) as error:
        raise WaltError(f"{folder} is damaged ({error}); {_advice(folder)}") from None
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise WaltError(f"{folder} is damaged ({first}); {_advice(folder)}") from None
    return state


def names(folder: Path) -> set[str]:
    """The tensors that a checkpoint holds; a WaltError where its files cannot be read."""
    _whole(folder)
    try:
        return set(_sizes(dcp.HuggingFaceStorageReader(str(folder))))
    except (OSError, SafetensorError, ValueError) as error:
        raise WaltError(f"{folder} is damaged ({error}); {_advice(folder)}") from None


def _whole(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint whose files have the size that it says; else a WaltError."""
    state = read_state(folder)
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise WaltError(f"{path} is missing or damaged; {_advice(folder)}")
    return state


def _sizes(storage: dcp.HuggingFaceStorageReader) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.size) for name, entry in storage.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    path = folder / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise ValueError("it is of an older walt")
    except (OSError, ValueError) as error:
        raise WaltError(f"{path} cannot be read ({error}); {_advice(folder)}") from None
    return state


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run, or None."""
    found = sorted(path for path in run.glob(f"{PREFIX}*") if path.is_dir())
    return found[-1] if found else None


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and leftovers of interrupted writes."""
    for path in sorted(path for path in run.glob(f"{PREFIX}*") if path.is_dir())[:-keep]:
        # Renamed first: a deletion that is interrupted must not leave half a checkpoint under a whole one's name.
        gone = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
    for path in run.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(run: Path) -> None:
    """Renames the checkpoints, the log and the averages of a run that is started over: they are kept, and never resumed
    from."""
    log = run / "log.jsonl"
    if log.exists():
        os.replace(log, log.with_name(f"replaced-{log.name}"))
    for path in (*run.glob(f"{PREFIX}*"), run / average.FOLDER):
        if path.is_dir():
            old = path.with_name(f"replaced-{path.name}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)


def _rowed(tensor: Tensor) -> Tensor:
    """A view with at least one axis: the safetensors reader slices along axes."""
    return tensor.detach().view(1) if tensor.ndim == 0 else tensor.detach()


def _advice(folder: Path) -> str:
    others = sorted(path.name for path in folder.parent.glob(f"{PREFIX}*") if path.is_dir() and path != folder)
    if others:
        return f"delete {folder} to resume from {others[-1]}"
    return f"delete {folder} to start over"
