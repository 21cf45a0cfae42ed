"""Tiny jobs on the sprites of tests/: the real recipes, made small."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.training.job import (
    DataJob,
    DenoiserJob,
    DiffusionJob,
    NuwaClip,
    NuwaJob,
    NuwaTask,
    NuwaTasks,
    OptimizerJob,
    RunJob,
    Shape,
    TokenizerJob,
    TokenizerLoss,
)

ROOT = Path(__file__).parents[2]
SPRITES = str(Path(__file__).parents[1] / "sprites")
TOKENIZER = {
    "encoder_widths": (8, 8),
    "decoder_widths": (8, 8),
    "temporal_downsample": (False,),
    "layers_per_block": 1,
    "patch_size": 4,
}


def data(**changes: object) -> DataJob:
    return DataJob(source=SPRITES, subjects=("rocket", "frog", "sun"), scenes=64).model_copy(update=changes)


def tokenizer_job(output: Path, steps: int = 20, **run: object) -> TokenizerJob:
    return TokenizerJob(
        model=TOKENIZER,
        data=data(),
        shapes=(Shape(frames=5, height=64, width=112, cut=32), Shape(frames=1, height=64, width=112, cut=32)),
        batch_pixels=4 * 5 * 32 * 32,
        loss=TokenizerLoss(latent_noise=0.1),
        optimizer=OptimizerJob(lr=2e-3, warmup_steps=2),
        run=RunJob(output=str(output), steps=steps, wandb=False, checkpoint_every=10, log_every=1).model_copy(
            update=run
        ),
    )


def save_tokenizer(folder: Path, seed: int | None = None) -> Path:
    """An untrained but complete tokenizer folder."""
    if seed is not None:
        torch.manual_seed(seed)
    AutoencoderKLWalt(**TOKENIZER, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8).save_pretrained(folder)
    return folder


def denoiser_job(tokenizer: Path, output: Path, steps: int = 20, **changes: object) -> DenoiserJob:
    return DenoiserJob(
        model={
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "sample_size": (5, 8, 14),
            "relative_positions": "rope",
        },
        tokenizer=str(tokenizer),
        data=data(),
        shapes=(
            Shape(frames=17, height=64, width=112),
            Shape(frames=9, height=64, width=64),
            Shape(frames=17, height=64, width=64, start=12),
            Shape(frames=1, height=64, width=112, weight=2),
            Shape(frames=1, height=64, width=64, weight=2),
            Shape(frames=1, height=32, width=32, weight=0.5),
        ),
        batch_tokens=1600,
        diffusion=DiffusionJob(self_conditioning_probability=0.5),
        optimizer=OptimizerJob(lr=2e-3, warmup_steps=2),
        run=RunJob(output=str(output), steps=steps, wandb=False, checkpoint_every=10, log_every=1),
    ).model_copy(update=changes)


def losses(output: Path) -> dict[int, float]:
    """The loss of every step that a run has logged."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that one rank wrote."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def small_job(
    tokenizer: Path, output: Path, steps: int = 20, model: dict[str, object] | None = None, **run: object
) -> DenoiserJob:
    """A denoiser job whose steps take a few hundredths of a second: small packs of stills and short clips."""
    job = denoiser_job(tokenizer, output, steps)
    return job.model_copy(
        update={
            "model": {**job.model, "sample_size": (2, 4, 4), **(model or {})},
            "shapes": (
                Shape(frames=5, height=32, width=32),
                Shape(frames=5, height=32, width=48),
                Shape(frames=1, height=32, width=32),
            ),
            "batch_tokens": 128,
            "run": job.run.model_copy(update=run),
        }
    )


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module, so that tests can run it in miniature."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(*jobs: TokenizerJob | DenoiserJob, ranks: int = 1) -> subprocess.Popen[str]:
    """Starts jobs, one after the other, in processes of their own; more than one rank through torchrun on gloo."""
    paths: list[str] = []
    for job in jobs:
        path = Path(job.run.output).with_suffix(f".{len(paths)}.job.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job.model_dump_json())
        paths.append(str(path))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.training.worker", *paths],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for a job; returns what it said, which is shown when it ends otherwise than with `code`."""
    said, _ = process.communicate()
    assert process.returncode == code, said
    return said


def nuwa_job(folder: Path, output: Path, steps: int = 20, **changes: Any) -> NuwaJob:
    """All five tasks at 32 x 32, two frames; `folder` holds vq, vq_seg, text_encoder and tokenizer."""
    return NuwaJob(
        model=tiny.NUWA,
        tokenizer=str(folder / "vq"),
        sketch_tokenizer=str(folder / "vq_seg"),
        text_encoder=str(folder / "text_encoder"),
        text_tokenizer=str(folder / "tokenizer"),
        data=data(),
        clip=NuwaClip(frames=2, height=32, width=32),
        tasks=NuwaTasks(**{name: NuwaTask(batch=2) for name in NuwaTasks.model_fields}),
        optimizer=OptimizerJob(lr=3e-3, warmup_steps=2),
        run=RunJob(output=str(output), steps=steps, wandb=False, checkpoint_every=10, log_every=1),
    ).model_copy(update=changes)


def save_nuwa_parts(folder: Path) -> Path:
    """Untrained but complete tokenizers and text encoder, as `nuwa_job` needs them."""
    parts = {"vq": tiny.vq(), "vq_seg": tiny.vq_seg(), "text_encoder": tiny.bert(), "tokenizer": tiny.tokenizer()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder
