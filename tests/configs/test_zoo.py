"""Other backbones go through the machinery of `walt train` and come out of WaltPipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests import tiny
from tests.training.jobs import denoiser_job, save_tokenizer
from walt.commands import build_objective
from walt.configs.zoo import KINDS, MODELS, RECIPES
from walt.diffusion import add_noise, make_scheduler, variance_bound, velocity
from walt.errors import WaltError
from walt.models.backbone import backbone
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.training.job import DenoiserJob, ResolutionJob, TokenDropJob, load_job
from walt.training.loop import train

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": tiny.TEXT_DIM,
    "sample_size": (5, 8, 14),
    "frame_conditioning": True,
}
KINDS_TRAINED = {
    "dit": {**SMALL, "self_conditioning": True},
    "dit, in context, learned variance": {**SMALL, "conditioning": "in_context", "learned_variance": True},
    "dit, cross-attention": {**SMALL, "conditioning": "cross_attention", "positions": "spatiotemporal"},
    "uvit": {**SMALL, "text_length": 32},
}


def job(tmp_path: Path, name: str, steps: int, **changes: Any) -> DenoiserJob:
    if not (tmp_path / "vae").exists():
        save_tokenizer(tmp_path / "vae")
        tiny.tokenizer().save_pretrained(tmp_path / "words")
        tiny.bert().save_pretrained(tmp_path / "bert")
    told = {
        "backbone": name.partition(",")[0],
        "model": KINDS_TRAINED[name],
        "text_encoder": str(tmp_path / "bert"),
        "text_tokenizer": str(tmp_path / "words"),
        "batch_tokens": 600,
    }
    return denoiser_job(tmp_path / "vae", tmp_path / "run", steps=steps, **{**told, **changes})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", KINDS_TRAINED)
def test_train_and_sample(name: str, tmp_path: Path) -> None:
    objective = build_objective(job(tmp_path, name, 8))
    assert type(objective.model) is backbone(name.partition(",")[0])
    final = train(objective.job, objective)
    found = losses(tmp_path / "run")
    assert len(found) == 8 and all(np.isfinite(found)) and np.mean(found[-3:]) < np.mean(found[:2])
    transformer = type(objective.model).from_pretrained(final)
    pipe = tiny.quiet(WaltPipeline(tiny.tokenizer(), tiny.bert(), tiny.vae(), transformer, make_scheduler()))
    arguments: dict[str, Any] = {"prompt": "a purple cat", "num_inference_steps": 2, "output_type": "np"}
    frames = pipe(**arguments, num_frames=29, height=32, width=48, generator=tiny.seeded(1)).frames
    assert frames.shape == (1, 29, 32, 48, 3) and np.isfinite(frames).all()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = tiny.quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded.transformer) is type(transformer)
    again = loaded(**arguments, num_frames=29, height=32, width=48, generator=tiny.seeded(1)).frames
    assert np.array_equal(frames, again)


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_classes_are_sampled(name: str) -> None:
    fields = {**SMALL, "text_dim": None, "num_classes": 5, "sample_size": tiny.BASE_LATENT, "frame_conditioning": False}
    model = tiny.randomize(backbone(name)(**fields), 3)
    pipe = tiny.quiet(WaltPipeline(None, None, tiny.vae(), model, make_scheduler()))
    frames = pipe(
        class_labels=[1, 2], num_inference_steps=2, num_frames=5, generator=tiny.seeded(1), output_type="np"
    ).frames
    assert frames.shape == (2, 5, 16, 16, 3)
    with pytest.raises(WaltError, match="takes no text"):
        pipe("a cat")


def test_recipes_and_sizes_fit_their_backbones() -> None:
    for name, recipe in RECIPES.items():
        found = load_job(f"zoo.{name}")
        assert found == recipe() and isinstance(found, DenoiserJob)
        model = backbone(found.backbone)(**found.model)
        assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e7
    assert set(KINDS.values()) == {"dit", "uvit"} and set(KINDS) == set(MODELS)
    with pytest.raises(WaltError, match=r"backbone.*one of walt, dit, uvit"):
        load_job("zoo.dit", ["backbone=vit"])


# -- NaViT's options in a recipe


def test_token_dropping_scores_kept_tokens_only(tmp_path: Path) -> None:
    drop = TokenDropJob(schedule="constant", high=0.5)
    objective = build_objective(job(tmp_path, "dit", 1, token_drop=drop))
    pack = objective.batch(3, 0)
    assert all(sample.kept is not None for sample in pack) and len({s.kept.shape for s in pack}) > 2
    assert [torch.equal(a.kept, b.kept) for a, b in zip(pack, objective.batch(3, 0), strict=True)]
    model = objective.model
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)

    def loss(samples: Any) -> tuple[float, dict[str, Any]]:
        value, figures = objective.loss(model, samples, torch.Generator().manual_seed(0))[:2]
        return float(value.detach()), figures

    plain, figures = loss(pack)
    kept = sum(int(sample.kept.sum()) for sample in pack)
    assert figures["tokens"] == kept and 0.9 < figures["fill"] <= 1
    # A latent changes where its tokens were dropped: neither the network nor the loss sees it.
    encoded = [objective._latent(sample.video, None) for sample in pack]
    mean, std = (
        torch.tensor(v).view(-1, 1, 1, 1) for v in (objective.vae.config.latents_mean, objective.vae.config.latents_std)
    )
    changed = []
    for sample, z in zip(pack, encoded, strict=True):
        gone = (~sample.kept).repeat_interleave(2, 1).repeat_interleave(2, 2)
        raw = (z + 100 * gone) * std + mean
        changed.append(type(sample)(**{**vars(sample), "video": None, "latent": raw}))
    assert loss(changed)[0] == pytest.approx(plain, rel=1e-5)
    changed[0] = type(pack[0])(**{**vars(changed[0]), "kept": None})
    assert loss(changed)[0] > 2 * plain


def test_dropped_packs_hold_more_samples_and_train(tmp_path: Path) -> None:
    drop = TokenDropJob(schedule="sigmoid", low=0.0, high=0.7, middle=50, scale=-5)
    objective = build_objective(job(tmp_path, "dit", 3, token_drop=drop))
    rng = np.random.default_rng(0)
    early, late = (np.mean([len(objective._draw(step + k, rng)) for k in range(10)]) for step in (0, 100))
    assert early > 1.5 * late  # the rate falls with the steps
    train(objective.job, objective)
    assert all(np.isfinite(losses(tmp_path / "run")))
    again = TokenDropJob(schedule="beta", high=0.6)
    walt = build_objective(
        denoiser_job(tmp_path / "vae", tmp_path / "walt", steps=2, batch_tokens=600, token_drop=again)
    )
    train(walt.job, walt)
    assert all(np.isfinite(losses(tmp_path / "walt")))


def test_resolution_sampling_gives_every_sample_its_size(tmp_path: Path) -> None:
    objective = build_objective(job(tmp_path, "dit", 1, resolution=ResolutionJob(low=32, high=96)))
    packs = [objective.batch(step, 0) for step in range(4)]
    sizes = {tuple(sample.video.shape[1:]) for pack in packs for sample in pack}
    assert len(sizes) > 8 and all(h % 16 == 0 and w % 16 == 0 for _, h, w in sizes)
    assert min(h * w for _, h, w in sizes) < 48**2 and max(h * w for _, h, w in sizes) > 70**2
    for pack in packs:
        loss, figures = objective.loss(objective.model, pack, torch.Generator().manual_seed(0))[:2]
        assert bool(torch.isfinite(loss)) and 0.9 < figures["fill"] <= 1
    with pytest.raises(WaltError, match="low 96 is above high 32"):
        build_objective(job(tmp_path, "dit", 1, resolution=ResolutionJob(low=96, high=32)))


# -- the learned variance


@pytest.mark.parametrize("step", [1, 500, 999])
def test_the_bound_is_least_at_the_true_posterior(step: int) -> None:
    """With the true clean latents the bound is 0 at the posterior's variance; a wrong mean wants a larger one."""
    scheduler = make_scheduler()
    x0, noise = torch.randn(2, 4, 1, 4, 4, generator=tiny.seeded(0)).double().unbind(0)
    x_t, v = add_noise(scheduler, x0, noise, step), velocity(scheduler, x0, noise, step)
    fractions = torch.linspace(-1, 1, 21).double()
    exact = torch.stack([variance_bound(scheduler, v, f.expand_as(v), x0, x_t, step).mean() for f in fractions])
    assert float(exact[0]) == pytest.approx(0, abs=1e-6) and bool((exact[1:] >= exact[:-1] - 1e-9).all())
    wrong = v + 0.5 if step > 1 else v + 3
    far = torch.stack([variance_bound(scheduler, wrong, f.expand_as(v), x0, x_t, step).mean() for f in fractions])
    assert bool((far >= exact).all())
    fraction = torch.zeros_like(v, requires_grad=True)
    leaf = v.clone().requires_grad_()
    variance_bound(scheduler, leaf, fraction, x0, x_t, step).sum().backward()
    assert fraction.grad is not None and fraction.grad.abs().sum() > 0 and leaf.grad is None


def test_the_bound_of_step_0_is_a_density() -> None:
    scheduler = make_scheduler()
    x0, noise = torch.randn(2, 4, 1, 4, 4, generator=tiny.seeded(0)).double().unbind(0)
    x_t, v = add_noise(scheduler, x0, noise, 0), velocity(scheduler, x0, noise, 0)
    bits = variance_bound(scheduler, v, torch.ones_like(v), x0, x_t, 0)
    beta = 1 - float(scheduler.alphas_cumprod[0])
    expected = -torch.distributions.Normal(0.0, beta**0.5).log_prob(torch.tensor(0.0)) / np.log(2)
    assert torch.allclose(bits, expected.double().expand_as(bits), atol=1e-4)
