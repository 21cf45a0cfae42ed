"""A super-resolution stage scored on its frames (`pixels`): what it is scored on, that it learns by it, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import walt
from tests.training.jobs import data, denoiser_job
from walt.commands import build_objective
from walt.errors import WaltError
from walt.fidelity import back_project, project_frames
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.sampling import decode_latents
from walt.tokenizers.adapter import load_vae
from walt.tokenizers.losses import PerceptualLoss, lpips_shapes
from walt.training.job import DenoiserJob, DiffusionJob, OptimizerJob, PixelJob, Shape, load_job
from walt.training.objectives import DenoiserObjective

WIDTHS = ((4,), (4,))


def tiny_lpips() -> PerceptualLoss:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in lpips_shapes(WIDTHS).items()}
    return PerceptualLoss(tensors, WIDTHS)


def job(tmp_path: Path, frames: int = 1, **pixels: Any) -> DenoiserJob:
    """A small stage on the embedded tokenizer, that is made in one step from pure noise."""
    base = denoiser_job(Path(walt.embedded_model()) / "vae", tmp_path)
    knobs = PixelJob(**{"perceptual": 0.0, "latent_noise": 0.0, **pixels})
    model = {
        "low_res_channels": 8,
        "sigma_data": 0.4,
        "self_conditioning": False,
        "local_mixing": True,
        "sample_size": (2, 8, 8),
    }
    return base.model_copy(
        update={
            "model": {**base.model, **model},
            "data": data(),
            "shapes": (Shape(frames=frames, height=128, width=224, cut=64),),
            "batch_tokens": 128,
            "low_res_batches": 2,
            "diffusion": DiffusionJob(
                self_conditioning_probability=0.0, max_noise_level=0, timestep_logit_normal=(20.0, 0.0)
            ),
            "pixels": knobs,
            "optimizer": OptimizerJob(lr=1e-3),
        }
    )


def built(given: DenoiserJob, perceptual: nn.Module | None = None) -> DenoiserObjective:
    return DenoiserObjective(given, WaltTransformer3DModel, load_vae(given.tokenizer, "tokenizer"), None, perceptual)


def psnr(objective: DenoiserObjective, batch: list[Any]) -> float:
    with torch.no_grad():
        return float(objective.loss(objective.model, batch, torch.Generator().manual_seed(2))[1]["psnr"])


def test_frames_are_scored_as_sampling_makes_them(tmp_path: Path) -> None:
    """Decoded and held to the small video by the functions of the pipelines, in whose place `_pixel_loss` stands."""
    objective = built(job(tmp_path, frames=5, passes=1.0))
    batch = objective.batch(0, 0)
    made = [objective._latent(sample.video, None) for sample in batch]
    figures: dict[str, float | Tensor] = {}
    loss = objective._pixel_loss(made, batch, [True] * len(batch), torch.Generator(), figures)
    errors, squares = [], []
    for latent, sample in zip(made, batch, strict=True):
        frames = decode_latents(objective.vae, latent[None])
        assert sample.video is not None and sample.low_res_video is not None
        back_project(frames, sample.low_res_video[None], 0.6)
        errors.append((frames - sample.video).abs().mean())
        squares.append((frames - sample.video).square().mean())
    # Sampling clips what lies beyond white; training must not, or no gradient would bring it back.
    assert float(loss) == pytest.approx(float(torch.stack(errors).mean()), rel=0.02)
    expected = float(-10 * torch.log10(torch.stack(squares).mean() / 4))
    assert float(torch.as_tensor(figures["psnr"])) == pytest.approx(expected, abs=0.1)


def test_a_small_video_passes_the_tokenizer(tmp_path: Path) -> None:
    objective = built(job(tmp_path))
    (sample, *_) = objective.batch(0, 0)
    passed = objective._pass(sample, torch.Generator().manual_seed(0))
    assert sample.low_res_video is not None and passed.low_res_video is not None
    seen = objective.vae(sample.low_res_video[None]).sample[0].clamp(-1, 1)
    assert (passed.low_res_video - seen).abs().max() < 1e-4
    assert (seen - sample.low_res_video).abs().max() > 0.01
    noisy = built(job(tmp_path, latent_noise=0.5))._pass(sample, torch.Generator().manual_seed(0))
    assert noisy.low_res_video is not None and (noisy.low_res_video - seen).abs().max() > 0.01


def test_a_stage_learns_from_its_frames_alone(tmp_path: Path) -> None:
    objective = built(job(tmp_path, reconstruction=10.0, perceptual=1.0, fidelity=0.0), tiny_lpips())
    batch = objective.batch(0, 0)
    before = psnr(objective, batch)
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=1e-3)
    for step in range(30):
        optimizer.zero_grad()
        loss, figures = objective.loss(objective.model, batch, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
    assert {"psnr", "lpips"} <= figures.keys()
    assert psnr(objective, batch) > before + 1.0
    assert not any(p.grad is not None for p in objective.vae.parameters())


@pytest.mark.parametrize("fidelity", [0.6, 1.0])
def test_a_flat_picture_has_a_gradient(fidelity: float) -> None:
    frames = torch.zeros(1, 3, 16, 16, requires_grad=True)
    project_frames(frames, torch.zeros(1, 3, 8, 8), fidelity).square().sum().backward()
    assert frames.grad is not None and bool(frames.grad.isfinite().all())


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    base = denoiser_job(Path(walt.embedded_model()) / "vae", tmp_path).model_copy(update={"pixels": PixelJob()})
    with pytest.raises(WaltError, match="pixels: for super-resolution stages"):
        build_objective(base)
    stage = job(tmp_path)
    latents = stage.model_copy(update={"data": data(latents="somewhere")})
    with pytest.raises(WaltError, match=r"leave data\.latents out"):
        built(latents)
    with pytest.raises(WaltError, match=r"pixels\.perceptual_weights"):
        built(job(tmp_path, perceptual=0.5))
    with pytest.raises(WaltError, match=r"pixels\.passes: .*less than or equal to 1, got 2"):
        load_job("emoji.super_resolution_2", ["pixels.passes=2"])
    assert load_job("emoji.super_resolution_2", ["pixels.perceptual=0"]).pixels is not None  # type: ignore[union-attr]
