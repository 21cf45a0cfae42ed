"""What `walt train RECIPE --dry-run` foretells against what training then takes: seconds, tokens and memory of a step.

Of every recipe the plan is made and a few steps are trained, in turns, as the machine may have slow spells. The first
step of a run, which warms everything up, and checkpoints do not count. Seconds are CPU seconds of one thread on a CPU,
memory is what a process holds at most. The plan is to be within 25 % of the run.

    python benchmarks/plan.py [RECIPE ...] [--precision bf16] [--steps 6] [--repeats 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import Goal, finish

RECIPES = (
    "emoji.tokenizer",
    "emoji.base_images",
    "emoji.base",
    "emoji.super_resolution_1",
    "emoji.super_resolution_2",
    "zoo.dit",
    "zoo.uvit",
)
WITHIN = 0.25


def recipe(name: str, precision: str, output: Path, steps: int) -> Any:
    """The recipe on the embedded tokenizer, from its own start, for `steps` steps."""
    from walt.configs.media import EMBEDDED
    from walt.training.job import load_job

    run = ("log_every=1", "checkpoint_every=100000", "heldout_every=0", "wandb=false", f"precision={precision}")
    own = [f"run.{field}" for field in (*run, f"steps={steps}", f"output={output}")]
    job = load_job(name, own)
    if job.kind == "tokenizer":
        return job
    fields = ("init=null", f"tokenizer={EMBEDDED / 'vae'}") if job.kind == "denoiser" else ()
    return load_job(name, [*own, *fields])


def plan(job: Any) -> dict[str, float]:
    from walt.commands import plan_job

    made = plan_job(job)
    parts = {f"seconds {name}": value for name, value in made.seconds.items()}
    parts |= {f"memory {name}": value for name, value in made.memory.items()}
    return {"seconds": made.total_seconds, "tokens": made.tokens, "memory": made.total_memory, **parts}


def run(job: Any) -> dict[str, float]:
    from walt.commands import build_objective
    from walt.training.loop import train

    train(job, build_objective(job))
    log = (Path(job.run.output) / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if "seconds_per_step" in row][1:]

    def mean(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows) / len(rows)

    parts = {f"seconds {name}": mean(f"time_{name}") for name in ("data", "compute", "optimizer")}
    seconds = mean("seconds_per_step") - mean("time_checkpoint")
    return {"seconds": seconds, "tokens": mean("tokens"), "memory": rows[-1]["peak_memory_gb"] * 1e9, **parts}


def both(name: str, precision: str, folder: Path, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Plan and run in turns, the seconds of each the least of its turns; memory and tokens of the first plan."""
    found: dict[str, dict[str, float]] = {}
    for repeat in range(repeats):
        job = recipe(name, precision, folder / f"run-{repeat}", steps)
        for kind, take in (("plan", plan), ("run", run)):
            figures = take(job)
            before = found.setdefault(kind, figures)
            found[kind] = {k: min(v, figures[k]) if k.startswith("seconds") else v for k, v in before.items()}
    return found


def apart(name: str, *options: str) -> Any:
    """What this script measures in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, __file__, *options, "--json", str(out), name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: failed\n{done.stdout}")
        return json.loads(out.read_text())


def alone(args: argparse.Namespace) -> None:
    """The process of its own: `--only both`, or `--only run` for the memory of training alone."""
    if not torch.cuda.is_available():
        import walt.training.plan
        import walt.training.report

        # Other load on the machine must not count: CPU seconds, which on one thread are those of an idle machine.
        torch.set_num_threads(1)
        clock: Any = SimpleNamespace(perf_counter=time.process_time, monotonic=time.process_time)
        walt.training.plan.time = walt.training.report.time = clock
    with tempfile.TemporaryDirectory() as folder:
        name, path = args.recipes[0], Path(folder)
        figures: Any
        if args.only == "run":
            figures = run(recipe(name, args.precision, path / "run", args.steps))
        else:
            figures = both(name, args.precision, path, args.steps, args.repeats)
        Path(args.json).write_text(json.dumps(figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of all recipes (default: float32)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", choices=("both", "run"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        alone(args)
        return 0
    goals = []
    for name in args.recipes:
        options = (f"--steps={args.steps}", f"--precision={args.precision}")
        figures = apart(name, "--only=both", *options, f"--repeats={args.repeats}")
        foretold, found = figures["plan"], figures["run"] | {"memory": apart(name, "--only=run", *options)["memory"]}
        print(name)
        for key in dict.fromkeys((*foretold, *found)):
            unit, scale = (" GB", 1e9) if key.startswith("memory") else (" s" if key.startswith("seconds") else "", 1.0)
            pair = [f"{each[key] / scale:9.3f}{unit}" if key in each else "        -" for each in (foretold, found)]
            print(f"  {key:22s} plan {pair[0]}  run {pair[1]}", flush=True)
        for key in ("seconds", "tokens", "memory"):
            if found[key]:
                off = abs(foretold[key] / found[key] - 1.0)
                goals.append(Goal(f"{name}: {key}, plan off by", off, WITHIN, at_least=False))
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
