"""Kills a small training run at random moments, also inside checkpoint writes, and compares it with one left alone.

    python benchmarks/kill.py --kills 30

Each attempt is a process of its own that gets SIGKILL; the next one resumes. At every kill the newest checkpoint must be
whole, and at the end losses, weights, moments and averages must equal those of the uninterrupted run bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file

from tests.training.jobs import losses, save_tokenizer, saved, small_job
from walt.commands import build_objective
from walt.training import checkpoint
from walt.training.job import DenoiserJob
from walt.training.loop import train


def spawn(job: DenoiserJob) -> int:
    """A forked process that trains; its output goes nowhere."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        train(job, build_objective(job))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def whole(folder: Path) -> bool:
    """Every file of a checkpoint opens and has the size that its state.json says."""
    state = json.loads((folder / "state.json").read_text())
    return all(
        (folder / name).stat().st_size == size and bool(load_file(folder / name))
        for name, size in state["files"].items()
    )


def run(folder: Path, kills: int, seed: int, steps: int = 0) -> dict[str, int]:
    """Kills a run `kills` times; returns what happened. Raises AssertionError where the result differs."""
    rng = random.Random(seed)
    vae = save_tokenizer(folder / "vae")
    steps = steps or 4 * kills
    alone, killed = (
        small_job(vae, folder / name, steps, checkpoint_every=2, log_every=1) for name in ("alone", "killed")
    )
    child = spawn(alone)
    assert os.waitpid(child, 0)[1] == 0, "the uninterrupted run failed"
    output = folder / "killed"
    done = {"kills": 0, "inside a write": 0, "restarts": 0}
    while True:
        child = spawn(killed)
        done["restarts"] += 1
        if done["kills"] < kills:
            inside = rng.random() < 0.5
            before = checkpoint.latest(output)
            # Some progress each time, or the run would never end: a new checkpoint, then on to the moment of the kill.
            while os.waitpid(child, os.WNOHANG)[0] == 0 and checkpoint.latest(output) == before:
                time.sleep(0.002)
            deadline = time.monotonic() + (5.0 if inside else rng.uniform(0.0, 0.3))
            while time.monotonic() < deadline and not (inside and list(output.glob(".checkpoint-*.tmp"))):
                time.sleep(0.0005)
            if inside:
                time.sleep(rng.uniform(0.0, 0.01))
            writing = bool(list(output.glob(".checkpoint-*.tmp")))
            try:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            except (ProcessLookupError, ChildProcessError):
                break  # it had finished
            if not os.WIFSIGNALED(status):
                break
            done["kills"] += 1
            done["inside a write"] += writing
            newest = checkpoint.latest(output)
            assert newest is not None and whole(newest), f"kill {done['kills']}: {newest} is not whole"
        else:
            assert os.waitpid(child, 0)[1] == 0, "the run did not finish after its kills"
            break
    assert losses(folder / "alone") == losses(output), "the loss curves differ"
    a, b = (saved(folder / name / f"checkpoint-{steps:08d}") for name in ("alone", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), "the weights differ"
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        done = run(Path(folder), args.kills, args.seed)
        print(", ".join(f"{name} {count}" for name, count in done.items()), f"in {time.monotonic() - begun:.0f} s")
    print(f"kills survived: {done['kills']} (goal {args.kills})")
    return int(done["kills"] < args.kills)


if __name__ == "__main__":
    sys.exit(main())
