"""Two ranks on gloo train what one rank trains, and take over each other's checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data import media
from tests.training.jobs import ROOT, SPRITES, finish, losses, save_tokenizer, small_job, start, tokenizer_job
from walt.commands import build_objective
from walt.training.average import snapshots
from walt.training.job import DenoiserJob, TokenizerJob
from walt.training.loop import train

STEPS = 20


def same_curve(a: Path, b: Path) -> None:
    left, right = losses(a), losses(b)
    assert set(left) == set(right) == set(range(1, STEPS + 1))
    for step in left:
        assert left[step] == pytest.approx(right[step], rel=1e-4), step


def same_model(a: Path, b: Path) -> None:
    left, right = (load_file(folder / "final" / "diffusion_pytorch_model.safetensors") for folder in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() < 1e-4, name
    kept, others = snapshots(a), snapshots(b)
    assert [(one.path.name, one.updates) for one in kept] == [(one.path.name, one.updates) for one in others]
    for one, other in zip(kept, others, strict=True):
        left, right = load_file(one.path), load_file(other.path)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_follow_one_and_checkpoints_go_from_any_number_to_any(tmp_path: Path) -> None:
    """Packs of unlike weight, so that a mean of means would show; one launch trains, a second one resumes."""
    vae = save_tokenizer(tmp_path / "vae")

    def job(name: str, optimizer: str, **run: Any) -> DenoiserJob:
        averages: dict[str, Any] = {"ema_lengths": (0.1,), "ema_every": 10}
        made = small_job(vae, tmp_path / name, STEPS, checkpoint_every=10, packs=2, **averages, **run)
        diffusion = made.diffusion.model_copy(update={"mask_probability": 0.3, "loss_weighting": "token"})
        kind = made.optimizer.model_copy(update={"kind": optimizer})
        return made.model_copy(update={"optimizer": kind, "diffusion": diffusion})

    def midway(name: str) -> str:
        """A copy of a run as it stood at step 10."""
        copy = f"{name}-midway"
        shutil.copytree(tmp_path / name, tmp_path / copy)
        shutil.rmtree(tmp_path / copy / "checkpoint-00000020")
        return copy

    kinds = ("adamw", "adafactor", "muon")
    names = {f"{parallel}-{kind}": (kind, parallel) for kind in kinds for parallel in ("ddp", "fsdp")}
    for kind in kinds:
        alone = job(f"one-{kind}", kind)
        train(alone, build_objective(alone))
    trained = [job(name, kind, parallel=parallel) for name, (kind, parallel) in names.items()]
    tokenizers = tokenizer_job(tmp_path / "tokenizer-two", STEPS, packs=2)
    misfits: list[TokenizerJob | DenoiserJob] = [
        small_job(vae, tmp_path / "misfit", packs=3),
        tokenizer_job(tmp_path / "misfit", parallel="fsdp"),
    ]
    said = finish(start(*trained, tokenizers, *misfits, ranks=2))
    assert "refused: run.packs: 3 packs per step do not divide among 2 ranks" in said
    assert "fsdp does not fit TokenizerObjective" in said
    for name, (kind, _) in names.items():
        same_curve(tmp_path / name, tmp_path / f"one-{kind}")
        same_model(tmp_path / name, tmp_path / f"one-{kind}")
    alone_tokenizer = tokenizer_job(tmp_path / "tokenizer-one", STEPS, packs=2)
    train(alone_tokenizer, build_objective(alone_tokenizer))
    same_curve(tmp_path / "tokenizer-two", tmp_path / "tokenizer-one")

    # From one rank to two, from two to one, and from whole copies to shards and back.
    onward = [
        job(midway("one-adamw"), "adamw", parallel="fsdp"),
        job(midway("one-adafactor"), "adafactor", parallel="ddp"),
        job(midway("ddp-adamw"), "adamw", parallel="fsdp"),
        job(midway("fsdp-adafactor"), "adafactor", parallel="fsdp"),
    ]
    alone_again = [job(midway("fsdp-adamw"), "adamw"), job(midway("ddp-adafactor"), "adafactor")]
    said = finish(start(*onward, ranks=2))
    assert said.count("resuming after step 10") == len(onward)
    for resumed in alone_again:
        train(resumed, build_objective(resumed))
    for resumed in [*onward, *alone_again]:
        same_curve(Path(resumed.run.output), tmp_path / f"one-{resumed.optimizer.kind}")
        same_model(Path(resumed.run.output), tmp_path / f"one-{resumed.optimizer.kind}")


@pytest.mark.slow
def test_a_rank_of_images_alone_does_not_stop_sharded_training(tmp_path: Path) -> None:
    """What only clips use (mixing over time, the bias of windows over time) has a gradient on every rank, of zeros."""
    vae = save_tokenizer(tmp_path / "vae")
    fields = {"local_mixing": True, "relative_positions": "bias"}

    def job(name: str, **run: Any) -> DenoiserJob:
        made = small_job(vae, tmp_path / name, 6, fields, packs=2, **run)
        # A pack is one clip or four stills: some steps have stills alone on one of the ranks, or on both.
        shapes = (made.shapes[0].model_copy(update={"weight": 0.2}), made.shapes[2])
        return made.model_copy(update={"shapes": shapes, "batch_tokens": 32})

    alone, sharded = job("one"), job("two", parallel="fsdp")
    objective = build_objective(alone)
    lengths = [
        [{sample.video.shape[1] for sample in objective.batch(step, lane)} for lane in (0, 1)] for step in range(6)
    ]
    assert any(({1} in pair) and ({1} != pair[0] or {1} != pair[1]) for pair in lengths), "a clip beside stills alone"
    train(alone, objective)
    finish(start(sharded, ranks=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["emoji", "media"])
def test_two_ranks_encode_what_one_does_and_make_only_what_is_missing(tmp_path: Path, kind: str) -> None:
    vae = save_tokenizer(tmp_path / "vae")
    size = "height: 64, width: 128" if kind == "emoji" else "height: 32, width: 64"
    shapes = f"shapes=[{{frames: 9, {size}}}, {{frames: 1, {size}}}]"
    fields = ["emoji.super_resolution_1", f"tokenizer={vae}", shapes]
    if kind == "emoji":
        fields += [f"data.source={SPRITES}", "data.subjects=[rocket, frog, sun]", "-n", "40,5"]
    else:
        folder = tmp_path / "media"
        folder.mkdir()
        for number in range(3):
            media.write_shard(folder / f"part-{number}.tar", media.good_members(4, first=4 * number))
        sources = (f"data.sources=[{{path: {folder}}}]", f"data.index={tmp_path / 'index'}")
        fields += ["data.kind=media", *sources, "data.min_size=16"]

    def encode(output: str, ranks: int) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "walt", "encode", *fields, "-o", str(tmp_path / output)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def contents(output: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / output).iterdir() if path.name != "skipped.jsonl"}

    encode("one", 1)
    encode("two", 2)
    assert contents("one") == contents("two")
    parts = sorted((tmp_path / "two").glob("*.safetensors"))
    assert len(parts) >= 3
    kept = parts[0].stat().st_mtime_ns
    parts[-1].unlink()
    encode("two", 2)
    assert contents("one") == contents("two") and parts[0].stat().st_mtime_ns == kept
