"""The temporal super-resolution stage: twice the frames, in the objective, the pipelines and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from torch import Tensor

from tests import tiny
from tests.training.jobs import SPRITES, data, losses, save_tokenizer, small_job
from walt import cli
from walt.commands import build_objective, draw_sheet
from walt.conditioning import frames_twice, half_rate, low_res_kind, pieces_twice
from walt.configs import emoji
from walt.data.emoji import EmojiTheatre
from walt.data.scenes import Scenes
from walt.diffusion import make_scheduler
from walt.errors import WaltError
from walt.evaluation.metrics import psnr
from walt.media import read_image, read_video
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.loading import load_pipeline
from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline
from walt.tokenizers.adapter import adapt
from walt.training.job import DataJob, DenoiserJob, DiffusionJob, OptimizerJob, RunJob, Shape
from walt.training.loop import train
from walt.training.objectives import DenoiserObjective, Sample


def temporal_transformer() -> WaltTransformer3DModel:
    return tiny.super_resolution_transformer(6, 1, low_res_scale=1, text_dim=None)


def cascade() -> WaltCascadePipeline:
    """Base, temporal stage and one super-resolution stage."""
    return tiny.quiet(
        WaltCascadePipeline(
            tiny.tokenizer(),
            tiny.bert(),
            tiny.vae(),
            tiny.transformer(),
            tiny.super_resolution_transformer(4, 2),
            None,
            make_scheduler(),
            base_steps=3,
            super_resolution_steps=2,
            temporal_super_resolution=temporal_transformer(),
        )
    )


# -- frames ------------------------------------------------------------------------------------------------------------


def test_half_the_frames_twice() -> None:
    video = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(2, 3, 9, 2, 2)
    low = half_rate(video)
    assert low[0, 0, :, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert frames_twice(low)[0, 0, :, 0, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]
    assert torch.equal(half_rate(frames_twice(low)), low)
    for sizes in ([5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]):
        assert torch.equal(torch.cat(list(pieces_twice(low.split(sizes, dim=2))), dim=2), frames_twice(low))


def test_the_theatre_at_twice_the_rate_has_the_same_frames_and_some_between() -> None:
    theatre = EmojiTheatre(SPRITES, subjects=("rocket", "frog", "sun"))
    scene = theatre.scene(1, 9)
    whole, alpha = theatre.render(scene, 64, 112, frames=None)
    twice, alpha2 = theatre.render(scene, 64, 112, frames=None, rate=2)
    assert len(twice) == 17 and np.array_equal(twice[::2], whole) and np.array_equal(alpha2[::2], alpha)
    part, _ = theatre.render(scene, 64, 112, start=3, frames=5, rate=2)
    assert np.array_equal(part, twice[3:8])
    with pytest.raises(WaltError, match="which has 17"):
        theatre.render(scene, 64, 112, start=13, frames=5, rate=2)
    slow, fast = (Scenes(data(fps=fps)).clip(3, Shape(frames=17, height=64, width=112)) for fps in (8, 16))
    assert torch.equal(fast.video[:, ::2], slow.video[:, :9]) and fast.caption == slow.caption
    assert not torch.equal(fast.video, slow.video)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_the_stage_doubles_the_frames_of_any_video() -> None:
    pipe = tiny.quiet(WaltSuperResolutionPipeline(tiny.vae(), temporal_transformer(), make_scheduler()))
    assert pipe.temporal and low_res_kind(pipe.transformer.config) == "time"
    assert low_res_kind(tiny.super_resolution_transformer().config) == "space"
    assert low_res_kind(tiny.transformer().config) is None
    video = torch.rand(1, 11, 3, 16, 24, generator=tiny.seeded(0))
    call: dict[str, Any] = {"num_inference_steps": 2, "noise_level": 20}
    made = pipe(video=video, generator=tiny.seeded(1), output_type="pt", **call).frames
    assert made.shape == (1, 21, 3, 16, 24)  # 21 = 17 + 4: two chunks
    pieces = pipe.stream(iter(video.split([1, 6, 4], dim=1)), generator=tiny.seeded(1), **call)
    torch.testing.assert_close(torch.cat(list(pieces), dim=1), made, rtol=0, atol=1e-5)
    with pytest.raises(WaltError, match="fidelity is for stages that enlarge; this one doubles the frame rate"):
        pipe(video=video, fidelity=0.5, **call)


def test_the_stage_sees_every_frame_twice_at_the_noise_it_is_told() -> None:
    """With the low-resolution latents noised to nothing their content is lost: noise-conditioning augmentation."""
    pipe = tiny.quiet(WaltSuperResolutionPipeline(tiny.vae(), temporal_transformer(), make_scheduler()))
    video = torch.rand(1, 5, 3, 16, 16, generator=tiny.seeded(0))
    told: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True)
    pipe(video=video, num_inference_steps=1, noise_level=0, generator=tiny.seeded(1))
    (low,) = told[0]["low_res_hidden_states"]
    vae = tiny.vae()
    z = vae.encode(frames_twice(video.transpose(1, 2)) * 2 - 1).latent_dist.mode()[0]
    mean, std = (torch.tensor(x).reshape(-1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(low, (z - mean) / std, rtol=0, atol=0.1)  # sigma of timestep 0 is 0.01
    pipe(video=video, num_inference_steps=1, noise_level=999, generator=tiny.seeded(1))
    pipe(video=1 - video, num_inference_steps=1, noise_level=999, generator=tiny.seeded(1))
    assert torch.equal(told[1]["low_res_hidden_states"][0], told[2]["low_res_hidden_states"][0])
    assert int(told[1]["low_res_noise_level"]) == 999


def test_a_cascade_makes_twice_the_frames(tmp_path: Path) -> None:
    pipe = cascade()
    steps: list[tuple[int, int]] = []

    def count(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((pipe.current_stage, index))
        return {}

    call: dict[str, Any] = {"num_frames": 17, "output_type": "pt"}
    made = pipe("a rocket", double_frame_rate=True, generator=tiny.seeded(0), callback_on_step_end=count, **call).frames
    assert made.shape == (1, 33, 3, 32, 32)
    # Chunks of 33 frames: 17 + 12 + 4.
    assert [stage for stage, _ in steps] == [1] * 3 + [0] * 6 + [2] * 6
    assert [index for _, index in steps] == list(range(pipe.num_timesteps))
    streamed = torch.cat(
        list(pipe.stream("a rocket", num_frames=17, double_frame_rate=True, generator=tiny.seeded(0))), dim=1
    )
    torch.testing.assert_close(streamed, made, rtol=0, atol=1e-5)
    base = pipe("a rocket", double_frame_rate=True, stages=1, generator=tiny.seeded(0), **call).frames
    assert base.shape == (1, 33, 3, 16, 16)
    still = pipe("a rocket", double_frame_rate=True, generator=tiny.seeded(0), num_frames=1, output_type="pt").frames
    assert still.shape == (1, 1, 3, 32, 32)
    plain = pipe("a rocket", generator=tiny.seeded(0), **call).frames
    assert plain.shape == (1, 17, 3, 32, 32)
    pipe.save_pretrained(tmp_path / "model")
    again = tiny.quiet(load_pipeline(tmp_path / "model"))
    loaded = again("a rocket", double_frame_rate=True, generator=tiny.seeded(0), **call).frames
    assert torch.equal(loaded, made)


def test_too_many_frames_for_the_stage_are_refused_before_the_base_runs() -> None:
    pipe = cascade()
    rigid = tiny.super_resolution_transformer(6, 1, low_res_scale=1, text_dim=None, frame_conditioning=False)
    pipe.register_modules(temporal_super_resolution=rigid)
    with pytest.raises(WaltError, match="a video of 33 frames needs stages with frame_conditioning"):
        pipe("a rocket", double_frame_rate=True, callback_on_step_end=lambda *_: pytest.fail("a stage ran"))
    assert pipe("a rocket", num_frames=9, double_frame_rate=True, output_type="pt").frames.shape[1] == 17


def test_a_model_without_the_stage_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WaltError, match="has no temporal super-resolution stage: it makes 8 frames per second"):
        tiny.cascade()("a rocket", double_frame_rate=True)
    with pytest.raises(WaltError, match="needs a transformer with low_res_channels and low_res_scale=1"):
        tiny.cascade(temporal_super_resolution=tiny.transformer())
    tiny.cascade_folder(tmp_path / "without")
    cascade().save_pretrained(tmp_path / "with")
    common = ["sample", "a rocket", "--frames", "5", "--steps", "1", "--stages", "1"]
    output = ["-o", str(tmp_path / "x.mp4"), "--fps", "16"]
    assert cli.main([*common, *output, "--model", str(tmp_path / "without")]) == 2
    assert "--fps 16: this model has no temporal super-resolution stage" in capsys.readouterr().err
    assert cli.main([*common, *output, "--model", str(tmp_path / "with")]) == 0
    video, fps = read_video(tmp_path / "x.mp4")
    assert len(video) == 9 and fps == 16


# -- training ----------------------------------------------------------------------------------------------------------


class PatchVae(ModelMixin, ConfigMixin):
    """A tokenizer that loses nothing of a grey video: 4 frames of 4 x 4 pixels are the 64 channels of a latent."""

    @register_to_config
    def __init__(self, latent_channels: int = 64, spatial_compression_ratio: int = 4) -> None:
        super().__init__()
        self.temporal_compression_ratio = 4
        self.weight = torch.nn.Parameter(torch.ones(1))  # has a device and a dtype

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        grey = x.mean(dim=1)
        grey = torch.cat([grey[:, :1].expand(-1, 3, -1, -1), grey], dim=1)
        z = rearrange(grey, "b (t f) (h p) (w q) -> b (f p q) t h w", f=4, p=4, q=4)
        return (DiagonalGaussianDistribution(torch.cat([z, torch.full_like(z, -20.0)], dim=1)),)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        grey = rearrange(z, "b (f p q) t h w -> b 1 (t f) (h p) (w q)", f=4, p=4, q=4)
        first = grey[:, :, :4].mean(dim=2, keepdim=True)
        return (torch.cat([first, grey[:, :, 4:]], dim=2).expand(-1, 3, -1, -1, -1),)


def objective(tmp_path: Path, **changes: Any) -> DenoiserObjective:
    job = DenoiserJob(
        model={
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "ffn_dim": 128,
            "patch_size": 1,
            "sample_size": (3, 4, 4),
            "spatiotemporal_window": None,
            "self_conditioning": False,
            "frame_conditioning": False,
            "relative_positions": "rope",
            "local_mixing": True,
            "low_res_channels": 64,
            "low_res_scale": 1,
            "sigma_data": 0.5,
        },
        tokenizer="",
        data=data(fps=16, **changes),
        shapes=(Shape(frames=9, height=64, width=112, cut=32),),
        batch_tokens=400,
        low_res_batches=1,
        diffusion=DiffusionJob(self_conditioning_probability=0.0, max_noise_level=20, timestep_logit_normal=(2.0, 1.0)),
        optimizer=OptimizerJob(lr=2e-3),
        run=RunJob(output=str(tmp_path), steps=1),
    )
    return DenoiserObjective(job, WaltTransformer3DModel, adapt(PatchVae()), None)


def test_the_objective_tells_half_the_frames(tmp_path: Path) -> None:
    target = objective(tmp_path)
    (sample, *_) = target.batch(0, 0)
    assert sample.low_res_video is None and sample.video is not None
    low = target.vae.decode(target._low_res(sample)[None]).sample[0, 0]
    grey = sample.video.mean(dim=0)
    torch.testing.assert_close(low[::2], grey[::2])
    torch.testing.assert_close(low[1::2], grey[:-1:2])
    with pytest.raises(WaltError, match="it needs pixels"):
        objective(tmp_path, latents="somewhere")


def test_the_recipe_trains_and_draws_its_sheet(tmp_path: Path) -> None:
    recipe = emoji.temporal_super_resolution()
    assert low_res_kind(recipe.model) == "time" and isinstance(recipe.data, DataJob) and recipe.data.fps == 16
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", steps=2, model={"patch_size": 1})
    keys = ("low_res_channels", "low_res_scale", "sigma_data", "local_mixing", "self_conditioning")
    job = job.model_copy(
        update={
            "model": {**job.model, **{key: recipe.model[key] for key in keys}},
            "data": data(fps=16),
            "shapes": (Shape(frames=5, height=32, width=48, start=24), *job.shapes[:2]),
            "diffusion": recipe.diffusion,
            "low_res_batches": 1,
        }
    )
    built = build_objective(job)
    final = train(job, built, sheet=draw_sheet)
    assert (final / "config.json").exists() and all(np.isfinite(list(losses(tmp_path / "run").values())))
    sheet = tmp_path / "sheet.png"
    draw_sheet(built, built.model, sheet)
    assert read_image(sheet).any()


def dots(count: int, generator: torch.Generator) -> Tensor:
    """`(count, 3, 9, 16, 16)` in [-1, 1]: a bright dot moves up to 2 pixels a frame, 4 between frames of half the rate."""
    middle = 5 + 6 * torch.rand(count, 2, generator=generator)
    speed = 4 * torch.rand(count, 2, generator=generator) - 2
    place = middle[:, None] + speed[:, None] * (torch.arange(9.0)[None, :, None] - 4)
    axis = torch.arange(16.0)
    y, x = (torch.exp(-((axis - place[..., i, None]) ** 2) / (2 * 1.5**2)) for i in (0, 1))
    video = 2 * y[..., :, None] * x[..., None, :] - 1
    return video[:, None].expand(-1, 3, -1, -1, -1)


@pytest.mark.slow
def test_it_learns_where_a_dot_is_between_two_frames(tmp_path: Path) -> None:
    """Better than showing frames twice, and than blending neighbours, on the frames that were not given."""
    target = objective(tmp_path)
    model, generator, steps = target.model.train(), torch.Generator().manual_seed(0), 250
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        batch = [Sample(video, None, None, None, "", 0) for video in dots(16, generator)]
        loss, _ = target.loss(model, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    pipe = tiny.quiet(WaltSuperResolutionPipeline(target.vae, model.eval(), make_scheduler()))
    real = dots(32, torch.Generator().manual_seed(1))
    low = half_rate(real)
    call: dict[str, Any] = {"noise_level": 0, "generator": tiny.seeded(0), "output_type": "pt"}
    made = pipe(video=(low / 2 + 0.5).transpose(1, 2), num_inference_steps=1, **call).frames.transpose(1, 2) * 2 - 1

    def quality(frames: Tensor) -> float:
        """Over the new frames."""
        return float(psnr(frames, real[:, :, 1::2]).mean())

    repeated, blended = quality(low[:, :, :-1]), quality((low[:, :, 1:] + low[:, :, :-1]) / 2)
    found = quality(made[:, :, 1::2])
    print(f"repeated {repeated:.1f} dB, blended {blended:.1f} dB, temporal stage {found:.1f} dB")
    assert found > max(repeated, blended) + 1


def test_numbers_for_every_stage_are_the_temporal_stages_too() -> None:
    """Its guidance may be the only one: the text to steer away from is encoded all the same."""
    pipe = tiny.quiet(
        WaltCascadePipeline(
            tiny.tokenizer(),
            tiny.bert(),
            tiny.vae(),
            tiny.transformer(),
            None,
            None,
            make_scheduler(),
            super_resolution_steps=2,
            super_resolution_guidance_scale=2.0,
            temporal_super_resolution=tiny.super_resolution_transformer(6, 1, low_res_scale=1),
        )
    )
    call: dict[str, Any] = {"num_frames": 5, "double_frame_rate": True, "output_type": "pt"}
    for steps, scale, wanted in ((1, 1.0, 2), ([1], [1.0], 3)):
        made = pipe("a cat", num_inference_steps=steps, guidance_scale=scale, generator=tiny.seeded(0), **call)
        assert made.frames.shape[1] == 9 and pipe.num_timesteps == wanted
