"""What the benchmarks share: interleaved times, peak memory, the machine's own rate, goals."""

from __future__ import annotations

import itertools
import json as _json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from walt.heap import return_freed_memory


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def own_clock() -> Callable[[], float]:
    """The CPU seconds of this process where it computes on one thread of a CPU, so that other load on the machine does not
    count; else the wall clock. Not for runs that have worker processes."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


def interleaved(
    runs: dict[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Best seconds of each run; the repeats of all are interleaved, so that a slow spell of the machine hits all."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if repeat >= 0:
                best[name] = min(best[name], clock() - start)
    return best


def median_seconds(run: Callable[[], object], repeats: int = 10, warmup: int = 3, device: str = "cuda") -> float:
    """Median seconds of a run. On a GPU by its own events, so that the host may be ahead, as it is in training."""
    if not device.startswith("cuda"):
        times = []
        for repeat in range(-warmup, repeats):
            start = time.perf_counter()
            run()
            if repeat >= 0:
                times.append(time.perf_counter() - start)
        return statistics.median(times)
    for _ in range(warmup):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def peak_memory(run: Callable[[], object], warm: Callable[[], object] | None = None) -> int:
    """Most bytes that `run` holds above what there is before it: in a forked child on CPU, of the allocator on CUDA.

    The child computes on one thread, as a fork does not take the threads of OpenMP along. It maps code anew when it
    first runs it: `warm`, the same call on next to nothing, is run first and does not count.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_peak, args=(run, warm, send))
    child.start()
    send.close()
    try:
        value = receive.recv()
    except EOFError:
        value = "it was killed"
    child.join()
    if isinstance(value, str):
        raise RuntimeError(f"the measured run failed: {value}")
    return int(value)


def _peak(run: Callable[[], object], warm: Callable[[], object] | None, send: Any) -> None:
    try:
        torch.set_num_threads(1)
        if warm is not None:
            warm()
        # Give back what the parent had freed: memory that is reused would not count.
        return_freed_memory()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * resource.getpagesize()
        # Else the peak would be at least what there was at the fork, with what has just been given back.
        Path("/proc/self/clear_refs").write_text("5")
        run()
        status = Path("/proc/self/status").read_text()
        send.send(int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)
    except BaseException as error:  # the parent reports it
        send.send(f"{type(error).__name__}: {error}")


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """This machine's FLOP/s in a large matrix product of that type, of random numbers: on a GPU the median of ten, else the
    best of five by torch, and on a CPU by oneDNN, which in float32 may be twice as fast."""
    size = 8192 if device != "cpu" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    if device.startswith("cuda"):
        return 2.0 * size**3 / median_seconds(lambda: a @ a, repeats=10, warmup=5)
    runs: dict[str, Callable[[], object]] = {"torch": lambda: a @ a}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        runs["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], "")
    return 2.0 * size**3 / min(interleaved(runs, repeats=5, warmup=1, clock=own_clock()).values())


@dataclass
class Goal:
    """A measured value and what it should at least (or, not `at_least`, at most) be."""

    name: str
    value: float
    goal: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def finish(goals: list[Goal], json: str | None) -> int:
    """Prints one line a goal, writes them to a JSON file if asked, and returns the exit status: 1 where one is missed."""
    for goal in goals:
        sign = "" if goal.at_least else "at most "
        print(f"{goal.name}: {goal.value:.4g} (goal {sign}{goal.goal:g}){'' if goal.met else ' MISSED'}")
    if json is not None:
        rows = [{"name": g.name, "value": g.value, "goal": g.goal, "at_least": g.at_least, "met": g.met} for g in goals]
        path = Path(json)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(_json.dumps(rows, indent=2) + "\n")
        temporary.replace(path)
    return int(not all(goal.met for goal in goals))
