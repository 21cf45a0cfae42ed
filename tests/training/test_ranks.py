"""Two ranks on gloo train what one rank trains, and take over each other's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.jobs import finish, losses, save_tokenizer, small_job, start, tokenizer_job
from walt.commands import build_objective
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


@pytest.mark.slow
def test_two_ranks_follow_one_and_checkpoints_go_from_any_number_to_any(tmp_path: Path) -> None:
    """Packs of unlike weight, so that a mean of means would show; one launch trains, a second one resumes."""
    vae = save_tokenizer(tmp_path / "vae")

    def job(name: str, optimizer: str, **run: Any) -> DenoiserJob:
        made = small_job(vae, tmp_path / name, STEPS, checkpoint_every=10, packs=2, **run)
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
