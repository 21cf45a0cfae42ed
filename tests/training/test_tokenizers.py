"""Tokenizer jobs beyond the continuous one: codes, class maps, a discriminator, and their exact resume."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import TOKENIZER, losses, saved, start, tokenizer_job
from walt.commands import build_objective, plan_job
from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.vq_model_walt import WaltVQModel
from walt.training.job import AdversarialJob, OptimizerJob, Shape, TokenizerJob, TokenizerLoss, load_job
from walt.training.loop import train
from walt.training.plan import ForwardCounter

FRAMES: dict[str, Any] = {
    "num_vq_embeddings": 16,
    "vq_embed_dim": 8,
    "encoder_widths": (8, 8),
    "decoder_widths": (8, 8),
    "layers_per_block": 1,
    "patch_size": 4,
    "norm": "channel",
    "block_shortcut": True,
}


def adversarial(**changes: Any) -> AdversarialJob:
    return AdversarialJob(
        model={"base": 4, "multipliers": (2, 2)}, r1=1.0, r1_every=2, optimizer=OptimizerJob(lr=1e-3, betas=(0.0, 0.99))
    ).model_copy(update=changes)


def frames_job(output: Path, steps: int = 20, **changes: Any) -> TokenizerJob:
    job = tokenizer_job(output, steps)
    return job.model_copy(
        update={
            "architecture": "frames",
            "model": FRAMES,
            "shortcut_batches": 3,
            "loss": TokenizerLoss(),
            **changes,
        }
    )


def seg_job(output: Path, steps: int = 20) -> TokenizerJob:
    model = {**FRAMES, "in_channels": 4, "segmentation": True, "num_vq_embeddings": 48}
    shape = Shape(frames=1, height=32, width=32)
    return frames_job(output, steps, model=model, shapes=(shape,), batch_pixels=8 * 32 * 32)


def run(job: TokenizerJob) -> Path:
    return train(job, build_objective(job))


# -- inflation

IMAGE: dict[str, Any] = {"encoder_widths": (4, 8), "decoder_widths": (8, 4), "layers_per_block": 1, "patch_size": 1}


@pytest.mark.parametrize("kind", ["causal", "frames"])
def test_a_recipe_inflates_an_image_tokenizer(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    if kind == "causal":
        image: Any = AutoencoderKLWalt(**IMAGE, latent_channels=6, temporal_downsample=(False,))
    else:
        image = WaltVQModel(**IMAGE, vq_embed_dim=6, num_vq_embeddings=16, norm="channel")
    image.save_pretrained(tmp_path / "image")
    codes = {"quantizer": "vq", "quantizer_config": {"size": 16}} if kind == "frames" else {}
    fields: dict[str, Any] = {
        "model": {**IMAGE, "latent_channels": 6, "temporal_downsample": (True,), **codes},
        "loss": TokenizerLoss(),
        "inflate": str(tmp_path / "image"),
    }
    job = tokenizer_job(tmp_path / "run").model_copy(update=fields)
    model = build_objective(job).model.eval()
    video = torch.rand(1, 3, 3, 8, 12, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        made, alone = model(video).sample, image.eval()(video[:, :, :1]).sample
    assert made.shape == video.shape and torch.allclose(made[:, :, :1], alone, atol=1e-5)
    for changes, message in (
        ({"inflate": str(tmp_path / "none")}, "inflate: no model in .*none"),
        ({"init": str(tmp_path / "image")}, "leave init or inflate out"),
        ({"architecture": "frames", "model": FRAMES}, "inflate: makes a causal tokenizer, got architecture=frames"),
        (
            {"model": {**job.model, "encoder_widths": (4, 4)}},
            "inflate: .*image' does not fit the recipe's model: video",
        ),
    ):
        with pytest.raises(WaltError, match=message):
            build_objective(job.model_copy(update=changes))
    named = load_job("tokenizers.lfq_small", ["inflate=runs/image/final"])
    assert isinstance(named, TokenizerJob) and named.inflate == "runs/image/final"


# -- plan


@pytest.mark.parametrize("kind", ["pictures", "class maps"])
def test_a_frame_wise_tokenizer_is_planned(tmp_path: Path, kind: str) -> None:
    job = frames_job(tmp_path / "run") if kind == "pictures" else seg_job(tmp_path / "run")
    plan = plan_job(job)
    model = WaltVQModel(**job.model)
    assert plan.parameters == plan.trained == sum(p.numel() for p in model.parameters())
    assert plan.memory["weights"] == 4 * plan.parameters and plan.memory["optimizer"] == 8 * plan.parameters
    # Codes and their running sums are buffers, a float32 each, and so are the counts; and the step, an int64.
    codes, width = job.model["num_vq_embeddings"], job.model["vq_embed_dim"]
    assert plan.memory["codebook"] >= 4 * codes * (2 * width + 1)
    numbers = [plan.flops, plan.rate, plan.samples, plan.memory["activations"], *plan.seconds.values()]
    assert all(0 < number < math.inf for number in numbers)
    counter = ForwardCounter(WaltVQModel, dict(model.config))
    assert counter((5, 32, 32)) == 5 * counter((1, 32, 32)) > 0
    assert plan.flops == pytest.approx(3 * job.batch_pixels / 32**2 * counter((1, 32, 32)))
    given = plan_job(job.model_copy(update={"freeze_encoder": True}), rate=1e9)
    assert given.trained == sum(p.numel() for p in model.decoder.parameters())
    assert given.seconds["compute"] == pytest.approx(given.flops / 1e9)


# -- codes


@pytest.mark.parametrize(
    "quantizer",
    [
        {"latent_channels": 6, "quantizer": "lfq"},
        {"latent_channels": 4, "quantizer": "fsq", "quantizer_config": {"levels": [8, 5, 5, 5]}},
        {"latent_channels": 8, "quantizer": "vq", "quantizer_config": {"size": 32}},
    ],
)
def test_causal_tokenizers_learn_with_every_quantizer(tmp_path: Path, quantizer: dict[str, Any]) -> None:
    loss = TokenizerLoss(entropy_steps=20, quantizer_warmup=5)
    job = tokenizer_job(tmp_path / "run", steps=50)
    job = job.model_copy(update={"model": {**TOKENIZER, **quantizer}, "loss": loss})
    final = run(job)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "psnr" in row]
    assert np.mean([row["psnr"] for row in rows[-10:]]) > rows[0]["psnr"] + 3
    assert {"usage", "perplexity"} <= set(rows[-1])
    model = AutoencoderKLWalt.from_pretrained(final)
    assert model.config.latents_mean is None  # codes have no statistics to normalise by
    video = build_objective(job).batch(0, 0)[0]
    assert len(model.encode_indices(video).unique()) > 3


def test_entropy_weight_falls_linearly_and_the_quantizer_closes(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path / "run")
    loss = TokenizerLoss(entropy=0.1, entropy_start=3.0, entropy_steps=100, commitment=0.0, quantizer_warmup=10)
    job = job.model_copy(update={"model": {**TOKENIZER, "latent_channels": 6, "quantizer": "lfq"}, "loss": loss})
    objective = build_objective(job)
    quantized = objective.quantizer(torch.randn(2, 6, 1, 2, 2))
    for step, weight in ((0, 0.3), (50, 0.2), (100, 0.1), (1000, 0.1)):
        value = objective._quantization(quantized, step, 1.0, {})
        assert float(value) == pytest.approx(weight * float(quantized.losses["entropy"]), rel=1e-5)
    assert [objective._open(step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_fitted_codes_stay_and_the_decoder_learns(tmp_path: Path) -> None:
    fitted = build_objective(frames_job(tmp_path / "run", freeze_encoder=True))
    before = {k: v.clone() for k, v in fitted.model.state_dict().items()}
    final = run(frames_job(tmp_path / "run", steps=30, freeze_encoder=True))
    after = load_file(final / "diffusion_pytorch_model.safetensors")
    kept = [name for name in before if name.startswith(("encoder.", "quantize."))]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    model = WaltVQModel.from_pretrained(final).eval()
    video = fitted.batch(99, 0)[0]
    with torch.no_grad():
        errors = [float((m(video).sample - video).abs().mean()) for m in (fitted.model.eval(), model)]
    assert errors[1] < 0.97 * errors[0]
    assert torch.equal(model.encode_indices(video), fitted.model.eval().encode_indices(video))


def test_class_maps_are_learned(tmp_path: Path) -> None:
    job = seg_job(tmp_path / "run", steps=40)
    objective = build_objective(job)
    (maps,) = objective.batch(0, 0)
    assert maps.dtype == torch.int64 and maps.shape == (8, 1, 32, 32) and set(maps.unique().tolist()) == {0, 1, 2, 3}
    final = run(job)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    accuracy = [row["pixel_accuracy"] for row in rows if "pixel_accuracy" in row]
    curve = losses(tmp_path / "run")
    assert np.mean(accuracy[-10:]) > 0.93
    assert np.mean([curve[i] for i in range(31, 41)]) < 0.5 * np.mean([curve[i] for i in range(1, 4)])
    assert WaltVQModel.from_pretrained(final).config.segmentation
    from walt.commands import draw_sheet

    draw_sheet(objective, objective.model.eval(), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


# -- a discriminator


def test_adversarial_step_trains_both_and_each_alone(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path / "run", steps=4)
    job = job.model_copy(update={"loss": TokenizerLoss(adversarial=adversarial(start=2))})
    objective = build_objective(job)
    first = {k: v.clone() for k, v in objective.adversary.state_dict().items()}
    parts = objective.parts()
    assert list(parts) == ["model", "adversary"] and parts["adversary"].optimizer.lr == 1e-3
    generator = torch.Generator()
    weightless = objective.losses(objective.batch(0, 0), generator, generator, 0)
    assert "generator_loss" not in next(weightless).figures  # before `start` the discriminator learns alone
    assert {"real", "fake", "lecam", "r1"} <= set(next(weightless).figures)
    later = objective.losses(objective.batch(0, 0), generator, generator, 2)
    assert "generator_loss" in next(later).figures
    run(job)
    state = saved(tmp_path / "run" / "checkpoint-00000004")
    moved = {k: v for k, v in state.items() if k.startswith("adversary") and k.endswith("conv_in.weight")}
    assert moved and all(not torch.equal(v, first["discriminator.conv_in.weight"]) for v in moved.values())


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_resume_of_both_players_after_sigkill_is_exact(tmp_path: Path, adaptive: bool) -> None:
    loss = TokenizerLoss(adversarial=adversarial(adaptive=adaptive, loss="hinge" if adaptive else "non_saturating"))

    def job(name: str) -> TokenizerJob:
        if adaptive:
            return frames_job(tmp_path / name, loss=loss, model={**FRAMES, "block_shortcut": False})
        return tokenizer_job(tmp_path / name).model_copy(update={"loss": loss})

    straight, process = start(job("straight")), start(job("killed"))
    kept = tmp_path / "killed" / "checkpoint-00000010"
    while process.poll() is None and not kept.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert straight.wait() == 0 and kept.exists()
    assert start(job("killed")).wait() == 0
    left, right = (saved(tmp_path / name / "checkpoint-00000020") for name in ("straight", "killed"))
    assert left.keys() == right.keys() and any("mean_real" in name for name in left)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")


# -- mistakes


def test_contradictions_are_named(tmp_path: Path) -> None:
    job = frames_job(tmp_path / "run")
    seg = seg_job(tmp_path / "run")
    for wrong, words in (
        (job.model_copy(update={"loss": TokenizerLoss(latent_noise=0.1)}), "codes take no noise"),
        (
            job.model_copy(update={"model": {**FRAMES, "block_shortcut": False}, "freeze_encoder": True}),
            "an untrained encoder cannot be frozen",
        ),
        (
            seg.model_copy(update={"loss": TokenizerLoss(adversarial=adversarial())}),
            "class maps have neither a perceptual nor an adversarial loss",
        ),
        (seg.model_copy(update={"model": {**seg.model, "in_channels": 9}}), "are 4 classes, got 9"),
        (
            job.model_copy(update={"loss": TokenizerLoss(adversarial=adversarial(model={"bass": 4}))}),
            "no 'bass' \\(did you mean \"base\"",
        ),
    ):
        with pytest.raises(WaltError, match=words):
            build_objective(wrong)
