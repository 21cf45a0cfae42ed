"""A decoder that learns from what a denoiser makes of noised latents (`denoised`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.training.jobs import TOKENIZER, save_tokenizer, tokenizer_job
from walt.commands import build_objective
from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.training.job import DenoisedJob, Shape, TokenizerJob, read_job
from walt.training.loop import train


def folders(path: Path, **fields: Any) -> Path:
    """A tokenizer whose latents have a mean and deviation, a base of them and a text encoder."""
    torch.manual_seed(0)
    save_tokenizer(path / "vae")
    vae = AutoencoderKLWalt.from_pretrained(path / "vae")
    vae.register_to_config(
        latents_mean=tuple(0.1 * i for i in range(8)), latents_std=tuple(0.5 + 0.1 * i for i in range(8))
    )
    vae.save_pretrained(path / "vae")
    base = tiny.transformer(**fields)
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    base.save_pretrained(path / "base")
    tiny.bert().save_pretrained(path / "text_encoder")
    tiny.tokenizer().save_pretrained(path / "tokenizer")
    return path


def job_of(path: Path, steps: int = 4, output: str = "run", **denoised: Any) -> TokenizerJob:
    given = {
        "denoiser": str(path / "base"),
        "text_encoder": str(path / "text_encoder"),
        "text_tokenizer": str(path / "tokenizer"),
        "sizes": ((32, 32),),
        "steps": 5,
        "last": 3,
        **denoised,
    }
    job = tokenizer_job(path / output, steps)
    loss = job.loss.model_copy(update={"latent_noise": 0.0})
    return job.model_copy(
        update={
            "init": str(path / "vae"),
            "freeze_encoder": True,
            "denoised": DenoisedJob.model_validate(given),
            "loss": loss,
        }
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_latents_are_those_of_the_last_steps_of_sampling(steps: int, tmp_path: Path) -> None:
    """By hand, in float64: DDIM's update written out, the network called with the empty prompt's states."""
    objective = build_objective(job_of(folders(tmp_path)))
    made, model = objective.denoised, objective.model
    video = torch.randn((2, 3, 5, 32, 32), generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    noise = torch.randn((2, 8, 2, 4, 4), generator=torch.Generator().manual_seed(2))
    found = made(model, video, noise, steps)

    config = model.config
    mean, std = (torch.tensor(v).double().view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        raw = model.encode(video).latent_dist.mode().double()
    clean = (raw - mean) / std
    table = made.noising.alphas_cumprod.double()
    grid = np.round(np.arange(1000, 0, -1000 / 5)).astype(int) - 1  # "trailing" spacing
    x, x0 = None, None
    (states,) = made.words([""])
    for t, then in zip(grid[-steps:], [*grid[1:], None][-steps:], strict=True):
        if x is None:
            x = table[t].sqrt() * clean + (1 - table[t]).sqrt() * noise.double()
        given: dict[str, Any] = {"encoder_hidden_states": [states, states]}
        if made.transformer.config.self_conditioning:
            given["self_conditioning"] = None if x0 is None else list(x0.float())
        with torch.no_grad():
            out = made.transformer(list(x.float()), torch.tensor([t, t]), return_dict=False, **given)[0]
        v = torch.stack(list(out)).double()
        x0 = table[t].sqrt() * x - (1 - table[t]).sqrt() * v
        eps = table[t].sqrt() * v + (1 - table[t]).sqrt() * x
        after = made.sampling.final_alpha_cumprod.double() if then is None else table[then]
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    assert x is not None
    expected = (x * std + mean - raw) / raw.std(dim=(0, 2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    # As the decoder adds it, it sees what sampling would have given it.
    torch.testing.assert_close(
        (raw + found * raw.std(dim=(0, 2, 3, 4), keepdim=True, correction=0)).double(),
        x * std + mean,
        rtol=0,
        atol=2e-3 * float(x.abs().max()),
    )


def test_only_the_sizes_named_are_denoised(tmp_path: Path) -> None:
    job = job_of(folders(tmp_path), last=1)
    shapes = (*job.shapes, Shape(frames=5, height=64, width=112, cut=48))
    objective = build_objective(job.model_copy(update={"shapes": shapes}))
    generator = torch.Generator().manual_seed(0)
    some = [objective._noise(torch.zeros(1, 3, 5, 32, 32), generator) for _ in range(40)]
    assert 8 < sum(one is None for one in some) < 32  # none to one step, drawn evenly
    assert all(objective._noise(torch.zeros(1, 3, 5, 48, 48), generator) is None for _ in range(9))
    noisy = job.model_copy(update={"shapes": shapes, "loss": job.loss.model_copy(update={"latent_noise": 0.1})})
    assert all(build_objective(noisy)._noise(torch.zeros(1, 3, 5, s, s), generator) is not None for s in (32, 32, 48))


def test_the_decoder_learns_what_the_denoiser_gets_wrong(tmp_path: Path) -> None:
    """Its pictures of denoised latents come nearer to the true ones, more so than by training on true latents."""
    folders(tmp_path)
    errors = {}
    for name in ("before", "true", "denoised"):
        job = job_of(tmp_path, 60, name, last=2)
        objective = build_objective(job if name == "denoised" else job.model_copy(update={"denoised": None}))
        if name != "before":
            train(objective.job, objective)
        judged = build_objective(
            job.model_copy(update={"init": str(tmp_path / name / "final")}) if name != "before" else job
        )
        error = []
        with torch.no_grad():
            for step in range(200, 206):
                generator = torch.Generator().manual_seed(step)
                for video in judged.batch(step, 0):
                    shape = (len(video), 8, 1 + (video.shape[2] - 1) // judged.model.temporal_compression_ratio, 4, 4)
                    off = judged.denoised(judged.model, video, torch.randn(shape, generator=generator), 2)
                    error.append(float((judged.model(video, noise=off, return_dict=False)[0] - video).abs().mean()))
        errors[name] = float(np.mean(error))
    assert errors["denoised"] < errors["true"] < errors["before"]
    # The encoder, and so every latent, is as it was.
    one, other = (AutoencoderKLWalt.from_pretrained(tmp_path / name) for name in ("vae", "denoised/final"))
    for name, value in one.encoder.state_dict().items():
        assert torch.equal(value, other.encoder.state_dict()[name]), name
    assert one.config.latents_std == other.config.latents_std


def test_a_denoiser_of_classes_is_told_none(tmp_path: Path) -> None:
    path = folders(tmp_path, text_dim=None, num_classes=4)
    made = build_objective(job_of(path, text_encoder=None, text_tokenizer=None)).denoised
    assert made.words is None
    assert made._nothing(3, torch.device("cpu"))["class_labels"].tolist() == [4, 4, 4]
    assert (
        made(build_objective(job_of(path)).model, torch.zeros(1, 3, 1, 32, 32), torch.zeros(1, 8, 1, 4, 4), 2)
        .isfinite()
        .all()
    )


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = folders(tmp_path)
    tiny.super_resolution_transformer(4, 2).save_pretrained(path / "sr")
    tiny.transformer(in_channels=6, out_channels=6).save_pretrained(path / "six")
    AutoencoderKLWalt(**TOKENIZER).save_pretrained(path / "fresh")
    tiny.transformer(text_dim=24).save_pretrained(path / "wide")
    job = job_of(path)
    cases: tuple[tuple[TokenizerJob, str], ...] = (
        (job_of(path, denoiser=str(path / "sr")), "a base is needed"),
        (job_of(path, denoiser=str(path / "none")), "denoised.denoiser: no model in"),
        (job_of(path, denoiser=str(path / "six")), "makes latents of 6 channels, the tokenizer has 8"),
        (job_of(path, text_encoder=None), "reads text: give text_encoder"),
        (job_of(path, sizes=((32, 32), (64, 64))), "no shape is 64x64; there are 32x32"),
        (job.model_copy(update={"freeze_encoder": False}), "set freeze_encoder=true"),
        (job.model_copy(update={"init": str(path / "fresh")}), "were never recorded"),
        (job_of(path, denoiser=str(path / "wide")), "gives states of 16, the denoiser reads 24"),
    )
    for wrong, message in cases:
        with pytest.raises(WaltError, match=message):
            build_objective(wrong)
    with pytest.raises(WaltError, match="less than or equal to 1000"):
        read_job({**job.model_dump(), "denoised": {**job.model_dump()["denoised"], "steps": 2000}})
    with pytest.raises(WaltError, match="last must be at most steps, got 6 of 5"):
        read_job({**job.model_dump(), "denoised": {**job.model_dump()["denoised"], "last": 6}})
