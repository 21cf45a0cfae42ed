"""Kills training and `walt encode` at random moments, also inside their writes, and compares with runs left alone.

    python benchmarks/kill.py --kills 30 [--only train media theatre]

Each attempt is a process of its own that gets SIGKILL; the next one resumes. Of training the newest checkpoint must be
whole at every kill, and at the end losses, weights, moments and averages must equal those of the uninterrupted run bit
for bit. Of encoding (a user's media; the emoji theatre) every part must be whole at every kill, a rerun must keep what
was done, and at the end all files must equal those of the uninterrupted run byte for byte.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import Goal, finish
from safetensors.torch import load_file, save

from tests.data import media
from tests.training.jobs import data, denoiser_job, losses, save_tokenizer, saved, small_job
from walt.commands import build_objective
from walt.data import latents, precompute
from walt.data.latents import write_latents
from walt.data.precompute import encode_media
from walt.training import checkpoint
from walt.training.job import MediaJob, Shape, SourceJob
from walt.training.loop import train


def spawn(work: Callable[[], object]) -> int:
    """A forked process that does the work; its output goes nowhere."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        torch.set_num_threads(1)  # the parent's OpenMP threads are not here, and would be waited for
        work()
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


def kill_training(folder: Path, kills: int, seed: int, steps: int = 0) -> dict[str, int]:
    """Kills a run `kills` times; returns what happened. Raises AssertionError where the result differs."""
    rng = random.Random(seed)
    vae = save_tokenizer(folder / "vae")
    steps = steps or 4 * kills
    alone, killed = (
        small_job(vae, folder / name, steps, checkpoint_every=2, log_every=1) for name in ("alone", "killed")
    )
    child = spawn(lambda: train(alone, build_objective(alone)))
    assert os.waitpid(child, 0)[1] == 0, "the uninterrupted run failed"
    output = folder / "killed"
    done = {"kills": 0, "inside a write": 0, "restarts": 0}
    while True:
        child = spawn(lambda: train(killed, build_objective(killed)))
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


def kill_encoding(folder: Path, kills: int, seed: int, kind: str) -> dict[str, int]:
    """Kills `walt encode` of a small folder of `kind` (media, theatre) `kills` times; returns what happened.

    Raises AssertionError where a file is not whole, where work is lost, or where the files differ in the end.
    """
    rng = random.Random(seed)
    vae = save_tokenizer(folder / "vae", seed=0)
    encode = {"media": _media_encoder, "theatre": _theatre_encoder}[kind](folder, vae, kills)
    child = spawn(partial(encode, folder / "alone"))
    assert os.waitpid(child, 0)[1] == 0, "the uninterrupted run failed"
    output = folder / "killed"
    done = {"kills": 0, "inside a write": 0, "restarts": 0}

    def parts() -> set[Path]:
        return set(output.glob("[!.]*.safetensors"))

    def writing() -> bool:
        return bool([*output.glob(".*.safetensors"), *output.glob("*.tmp")])

    kept: dict[Path, bytes] = {}
    while done["kills"] < kills:
        child = spawn(partial(encode, output))
        done["restarts"] += 1
        inside, before, moment = rng.random() < 0.5, parts(), rng.uniform(0.0, 0.03)
        # A new part first, or the run would never end; half of the kills then wait for the next write.
        while not (over := os.waitpid(child, os.WNOHANG)[0]) and parts() == before:
            time.sleep(0.0005)
        while inside and not over and not writing():
            over = os.waitpid(child, os.WNOHANG)[0]
        assert not over, f"encoding ended after {done['kills']} kills; more media are needed"
        time.sleep(0.0 if inside else moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended before its kill"
        done["kills"] += 1
        done["inside a write"] += writing()
        for path, content in kept.items():
            assert path.read_bytes() == content, f"kill {done['kills']}: {path} was made again"
        for path in parts() - set(kept):
            assert load_file(path), f"kill {done['kills']}: {path} is not whole"
            kept[path] = path.read_bytes()
    child = spawn(partial(encode, output))
    assert os.waitpid(child, 0)[1] == 0, "the run did not finish after its kills"
    # The account of broken items is of one run each.
    alone, killed = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir() if path.suffix != ".jsonl"}
        for name in ("alone", "killed")
    )
    assert alone == killed, f"these files differ: {[name for name in alone if alone[name] != killed.get(name)]}"
    return done


def _slow_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file` with a rest half-way, as these files are too small for a kill to hit their write."""
    content = save(tensors, metadata)
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(0.02)
        file.write(content[len(content) // 2 :])


def _media_encoder(folder: Path, vae: Path, kills: int) -> Callable[[Path], object]:
    """`walt encode` of shards with a broken item each, in parts of 4 samples, three parts for each kill."""
    (folder / "media").mkdir()
    per_shard = 24
    for shard in range(max(1, -(-12 * kills // per_shard))):
        suffix, content = media.broken("damaged frames" if shard % 2 else "zero bytes")
        members = media.good_members(per_shard, first=per_shard * shard)
        members += [(f"bad-{shard}{suffix}", content), (f"bad-{shard}.txt", b"broken")]
        media.write_shard(folder / "media" / f"part-{shard:03d}.tar", members)
    source = SourceJob(path=str(folder / "media"))
    job = denoiser_job(vae, folder / "run").model_copy(
        update={
            "data": MediaJob(sources=(source,), index=str(folder / "index"), min_size=16),
            "shapes": (Shape(frames=9, height=32, width=64), Shape(frames=1, height=48, width=64)),
        }
    )
    objective = build_objective(job)

    def encode(output: Path) -> None:  # in a forked process: these names stay as they are elsewhere
        precompute.PART, precompute.save_file = 4, _slow_save
        with torch.no_grad():
            encode_media(job, objective.clips, output, lambda x: objective.vae.encode(x).latent_dist.mode())

    return encode


def _theatre_encoder(folder: Path, vae: Path, kills: int) -> Callable[[Path], object]:
    """`walt encode` of the theatre in shards of 4 clips, three shards for each kill."""
    job = small_job(vae, folder / "run")
    counts = [-(-3 * kills // len(job.shapes)) * 4 for _ in job.shapes]
    job = job.model_copy(update={"data": data(scenes=sum(counts))})
    objective = build_objective(job)

    def encode(output: Path) -> None:
        latents.SHARD, latents.save_file = 4, _slow_save
        with torch.no_grad():
            write_latents(job, output, counts, lambda x: objective.vae.encode(x).latent_dist.mode())

    return encode


KINDS: dict[str, Callable[[Path, int, int], dict[str, int]]] = {
    "train": kill_training,
    "media": partial(kill_encoding, kind="media"),
    "theatre": partial(kill_encoding, kind="theatre"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child cannot use the parent's threads
    goals = []
    for kind in args.only:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            done = KINDS[kind](Path(folder), args.kills, args.seed)
            told = ", ".join(f"{name} {count}" for name, count in done.items())
            print(f"{kind}: {told}, in {time.monotonic() - begun:.0f} s", flush=True)
        goals.append(Goal(f"{kind}: kills survived", done["kills"], args.kills))
    return finish(goals, None)


if __name__ == "__main__":
    sys.exit(main())
