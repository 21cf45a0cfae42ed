"""The training job: packs, exact resume after a kill, learning, faults."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.training.jobs import data, denoiser_job, losses, save_tokenizer, saved, small_job, tokenizer_job
from walt.commands import build_objective, draw_sheet
from walt.data.latents import LatentShards, write_latents
from walt.data.packing import fill_budget
from walt.data.scenes import Clip, Scenes, world
from walt.errors import WaltError
from walt.media import read_image
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.training.job import DataJob, DiffusionJob, Job, OptimizerJob, Shape, load_job, recipes
from walt.training.loop import learning_rate, train

ROOT = Path(__file__).parents[2]


def run(job: Job) -> Path:
    return train(job, build_objective(job))


def same_run(a: Path, b: Path, step: int) -> None:
    """Weights, optimizer, EMA and losses of two runs are bit-equal."""
    left, right = (saved(run / f"checkpoint-{step:08d}") for run in (a, b))
    assert left.keys() == right.keys()
    assert {name.split(".")[0] for name in left} == {"model", "ema"} and any(".optimizer." in name for name in left)
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert losses(a) == losses(b)


# -- packs


def test_budget_is_filled_to_less_than_the_smallest_shape() -> None:
    sizes, weights = [560, 112, 320, 64, 16], [1.0, 2.0, 1.0, 1.0, 0.2]
    for step in range(200):
        chosen = fill_budget(2240, sizes, weights, np.random.default_rng((0, step)))
        used = sum(sizes[i] for i in chosen)
        assert 2240 - 16 < used <= 2240
        assert chosen == fill_budget(2240, sizes, weights, np.random.default_rng((0, step)))
    with pytest.raises(WaltError, match="smallest shape of the recipe has 16"):
        fill_budget(8, sizes, weights, np.random.default_rng(0))
    with pytest.raises(WaltError, match="batch_pixels is 8"):
        fill_budget(8, sizes, weights, np.random.default_rng(0), "batch_pixels")


def test_packs_hold_images_and_clips_with_constant_tokens_and_no_padding(tmp_path: Path) -> None:
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    objective = build_objective(job)
    counts, shapes = [], set()
    for step in range(6):
        pack = objective.batch(step, 0)
        videos = [tuple(sample.video.shape[1:]) for sample in pack if sample.video is not None]
        shapes |= set(videos)
        tokens = sum((1 + (t - 1) // 4) * (h // 8) * (w // 8) for t, h, w in videos)
        counts.append(tokens)
        _, figures = objective.loss(objective.model, pack, torch.Generator().manual_seed(0))
        assert figures["tokens"] == tokens  # every token of the pack is a token of a sample
    assert min(counts) > 0.98 * job.batch_tokens and max(counts) <= job.batch_tokens
    assert len({s for s in shapes if s[0] > 1}) >= 3 and len({s for s in shapes if s[0] == 1}) >= 3


def test_pack_loss_is_the_token_weighted_mean_of_its_samples_alone(tmp_path: Path) -> None:
    """Packed = alone: the loss of a pack, and its gradient, from samples predicted one by one."""
    knobs = DiffusionJob(self_conditioning_probability=0.0, frame_prediction_probability=0.0, condition_dropout=1.0)
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", diffusion=knobs)
    objective = build_objective(job)
    for p in objective.model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    batch = objective.batch(0, 0)
    forward = objective.model.forward

    def one_by_one(noisy, timestep, frame_latents=None, frame_mask=None):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        parts = [
            forward([x], timestep[i : i + 1], frame_latents=[frame_latents[i]], frame_mask=[frame_mask[i]]).sample[0]
            for i, x in enumerate(noisy)
        ]
        return Transformer2DModelOutput(sample=parts)

    grads = []
    values = []
    for model in (objective.model, one_by_one):
        objective.model.zero_grad()
        loss, _ = objective.loss(model, batch, torch.Generator().manual_seed(3))
        loss.backward()
        values.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in objective.model.parameters() if p.grad is not None]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert (grads[0] - grads[1]).abs().max() < 1e-5


# -- resume


SCRIPT = """
import sys
from pathlib import Path
from tests.training.jobs import denoiser_job, tokenizer_job
from walt.commands import build_objective
from walt.training.loop import train
kind, vae, output = sys.argv[1:]
job = denoiser_job(Path(vae), Path(output)) if kind == "denoiser" else tokenizer_job(Path(output))
train(job, build_objective(job))
"""


def start(kind: str, vae: Path, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, kind, str(vae), str(output)], cwd=ROOT, env=environment)


@pytest.mark.parametrize("kind", ["denoiser", "tokenizer"])
def test_resume_after_sigkill_is_exact(tmp_path: Path, kind: str) -> None:
    vae = save_tokenizer(tmp_path / "vae")
    assert start(kind, vae, tmp_path / "straight").wait() == 0
    process = start(kind, vae, tmp_path / "killed")
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-00000010").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = tmp_path / "killed" / "checkpoint-00000010"
    assert kept.exists()
    assert start(kind, vae, tmp_path / "killed").wait() == 0
    same_run(tmp_path / "straight", tmp_path / "killed", 20)


def test_damaged_checkpoint_is_named_and_the_way_out_given(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path / "run", steps=4, checkpoint_every=2)
    run(job)
    weights = next((tmp_path / "run" / "checkpoint-00000004").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WaltError, match=r"checkpoint-00000004.*damaged.*resume from checkpoint-00000002"):
        run(tokenizer_job(tmp_path / "run", steps=6, checkpoint_every=2))


def test_run_folder_refuses_another_recipe(tmp_path: Path) -> None:
    run(tokenizer_job(tmp_path / "run", steps=2))
    other = tokenizer_job(tmp_path / "run", steps=4).model_copy(update={"batch_pixels": 9 * 5 * 32 * 32})
    with pytest.raises(WaltError, match="another recipe \\(batch_pixels differ"):
        run(other)
    slower = tokenizer_job(tmp_path / "run", steps=4)
    slower = slower.model_copy(update={"optimizer": slower.optimizer.model_copy(update={"lr": 1e-4})})
    run(slower)  # as is advised where steps diverge
    assert len(losses(tmp_path / "run")) == 4


def test_a_sheet_that_cannot_be_drawn_costs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tokenizer_job(tmp_path / "run", steps=2)
    job = job.model_copy(update={"run": job.run.model_copy(update={"sheet_every": 1})})

    def sheet(objective: object, model: object, path: Path | None) -> None:
        raise WaltError("num_frames=21 does not fit")

    final = train(job, build_objective(job), sheet=sheet)
    assert (final / "config.json").exists()
    assert capsys.readouterr().out.count("num_frames=21 does not fit") == 2


@pytest.mark.parametrize(
    "model", [{"low_res_channels": 8}, {}, {"frame_conditioning": False}], ids=["super-resolution", "base", "one chunk"]
)
def test_sheets_of_models_with_text_and_clips_of_any_length(tmp_path: Path, model: dict[str, object]) -> None:
    """21 frames are no chunk's length."""
    tiny.bert().save_pretrained(tmp_path / "text_encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", model={**model, "text_dim": tiny.TEXT_DIM})
    job = job.model_copy(
        update={
            "text_encoder": str(tmp_path / "text_encoder"),
            "text_tokenizer": str(tmp_path / "tokenizer"),
            "shapes": (Shape(frames=21, height=64, width=64),),
            "batch_tokens": 800,
        }
    )
    objective = build_objective(job)
    draw_sheet(objective, objective.model, tmp_path / "sheet.png")
    assert read_image(tmp_path / "sheet.png").any()


# -- learning


def test_tokenizer_job_learns_and_records_statistics(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path / "run", steps=60)
    final = run(job)
    curve = losses(tmp_path / "run")
    assert np.mean([curve[i] for i in range(50, 61)]) < 0.5 * curve[1]
    config = json.loads((final / "config.json").read_text())
    assert len(config["latents_mean"]) == 8 and min(config["latents_std"]) > 0
    from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt

    objective = build_objective(job)
    model = AutoencoderKLWalt.from_pretrained(final).eval()
    z = torch.cat(
        [model.encode(v).latent_dist.mode().flatten(2).transpose(0, 1).flatten(1) for v in objective.batch(0, 0)],
        1,
    )
    assert torch.allclose(z.mean(1), torch.tensor(config["latents_mean"]), atol=3 * max(config["latents_std"]))


def test_frozen_encoder_keeps_latents_and_changes_the_decoder(tmp_path: Path) -> None:
    first = run(tokenizer_job(tmp_path / "a", steps=2))
    job = tokenizer_job(tmp_path / "b", steps=2).model_copy(update={"init": str(first), "freeze_encoder": True})
    second = run(job)
    a, b = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("encoder."))
    assert any(not torch.equal(a[k], b[k]) for k in a if k.startswith("decoder."))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0]["latents_std"] == configs[1]["latents_std"]


def test_another_encoder_starts_as_the_shortcut_of_the_trained_one(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path / "a", steps=2)
    first = run(job.model_copy(update={"model": {**job.model, "block_shortcut": True}}))
    mixing = {**job.model, "block_shortcut": True, "encoder_widths": (8,), "encoder_mixers": 2}
    then = tokenizer_job(tmp_path / "b", steps=2).model_copy(update={"init": str(first), "model": mixing})
    started = build_objective(then)
    trained = AutoencoderKLWalt.from_pretrained(first)
    video = started.batch(0, 0)[0]
    with torch.no_grad():
        straight = trained.encoder.shortcut(trained.patcher.split(video, True), True)
        assert torch.equal(started.model.encode(video).latent_dist.mode(), straight)
    for name, value in started.model.decoder.state_dict().items():
        assert torch.equal(value, trained.decoder.state_dict()[name]), name
    learnt = AutoencoderKLWalt.from_pretrained(run(then))
    assert learnt.encoder.conv_out.weight.any()
    with pytest.raises(WaltError, match=r"freeze_encoder: the encoder of .* is of another kind"):
        build_objective(then.model_copy(update={"freeze_encoder": True}))


def test_latents_start_as_held_keyframes_and_first_frames_as_they_were(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path / "a", steps=2)
    shape = {**job.model, "block_shortcut": True, "shortcut_overlap": 1, "decoder_widths": (8,), "decoder_mixers": 1}
    first = run(job.model_copy(update={"model": shape}))
    mixing = {**shape, "encoder_widths": (8,), "encoder_mixers": 1}
    then = tokenizer_job(tmp_path / "b", steps=1).model_copy(
        update={"init": str(first), "model": mixing, "hold_keyframes": True, "shortcut_batches": 2}
    )
    model = build_objective(then).model
    trained = AutoencoderKLWalt.from_pretrained(first)
    video = next(v for v in build_objective(then).batch(0, 0) if v.shape[2] > 1)
    with torch.no_grad():
        z = model.encode(video).latent_dist.mode()
        for k in range(z.shape[2]):
            image = model.encode(video[:, :, 4 * k : 4 * k + 1]).latent_dist.mode()[:, :, 0]
            assert (z[:, :, k] - image).abs().max() < 1e-4
        z = trained.encoder.shortcut(trained.patcher.split(video[:, :, :1], True), True)
        assert torch.allclose(model.decode(z).sample, trained.decode(z).sample, atol=1e-5)
    run(then)
    for change in (
        {"freeze_encoder": True},
        {"inflate": str(first), "init": None},
        {"model": {**mixing, "block_shortcut": False, "shortcut_overlap": 0}},
    ):
        with pytest.raises(WaltError, match="hold_keyframes: needs"):
            build_objective(then.model_copy(update=change))


def test_flicker_of_the_reconstruction_counts(tmp_path: Path) -> None:
    job = tokenizer_job(tmp_path)
    job = job.model_copy(update={"loss": job.loss.model_copy(update={"latent_noise": 0.0})})
    loss = job.loss.model_copy(update={"frame_difference": 2.0})
    plain, flickering = build_objective(job), build_objective(job.model_copy(update={"loss": loss}))
    batch = plain.batch(0, 0)
    values = []
    for objective in (plain, flickering):
        value, figures = objective.loss(objective.model, batch, torch.Generator().manual_seed(0))
        values.append(float(value))
    total = sum(video.numel() for video in batch)
    flicker = 0.0
    with torch.no_grad():
        for video in batch:
            if video.shape[2] > 1:
                error = plain.model(video, return_dict=False)[0] - video
                flicker += video.numel() / total * float(error.diff(dim=2).abs().mean())
    assert flicker > 0
    assert float(figures["frame_difference"]) == pytest.approx(flicker, rel=1e-4)
    assert values[1] - values[0] == pytest.approx(2 * flicker, rel=1e-3)


def test_another_decoder_takes_over_encoder_and_shortcut(tmp_path: Path) -> None:
    shape = {"block_shortcut": True}
    job = tokenizer_job(tmp_path / "a", steps=2)
    first = run(job.model_copy(update={"model": {**job.model, **shape}}))
    mixing = {**job.model, **shape, "decoder_widths": (8,), "decoder_mixers": 1}
    then = tokenizer_job(tmp_path / "b", steps=1).model_copy(
        update={"init": str(first), "freeze_encoder": True, "model": mixing}
    )
    start = build_objective(then).model.state_dict()
    trained = load_file(first / "diffusion_pytorch_model.safetensors")
    for name, value in start.items():
        if name.startswith(("encoder.", "decoder.shortcut.")):
            assert torch.equal(value, trained[name]), name
        elif name.startswith("decoder.head."):
            # It starts as the shortcut alone.
            assert not value.any(), name
    run(then)


def test_denoiser_job_learns(tmp_path: Path) -> None:
    knobs = DiffusionJob(self_conditioning_probability=0.0)
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", steps=60, diffusion=knobs)
    run(job)
    curve = losses(tmp_path / "run")
    assert np.mean([curve[i] for i in range(50, 61)]) < 0.6 * np.mean([curve[i] for i in range(1, 6)])


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_super_resolution_job_runs_from_precomputed_latents(tmp_path: Path, weighting: str) -> None:
    vae = save_tokenizer(tmp_path / "vae")
    base = denoiser_job(vae, tmp_path / "run", steps=2)
    job = base.model_copy(
        update={
            "model": {**base.model, "low_res_channels": 8},
            "shapes": base.shapes[:4],
            "diffusion": DiffusionJob(loss_weighting=weighting),  # type: ignore[arg-type]
        }
    )
    model = AutoencoderKLWalt.from_pretrained(vae).eval()
    with torch.no_grad():
        write_latents(job, tmp_path / "latents", [3] * 4, lambda x: model.encode(x).latent_dist.mode())
    stored = job.model_copy(update={"data": job.data.model_copy(update={"latents": str(tmp_path / "latents")})})
    shards = LatentShards(tmp_path / "latents", stored)
    latent, low, caption = shards.get(0, 4)
    assert latent.shape == (8, 5, 8, 14) and low is not None and low.shape == (8, 5, 4, 7) and caption
    assert (run(stored) / "config.json").exists()
    shard = next((tmp_path / "latents").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(WaltError, match=f"{shard.name} is damaged"):
        LatentShards(tmp_path / "latents", stored)


def test_precomputed_latents_equal_encoding_on_the_fly(tmp_path: Path) -> None:
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    objective = build_objective(job)
    write_latents(job, tmp_path / "latents", [2] * 6, lambda x: objective.vae.encode(x).latent_dist.mode().detach())
    clip = objective.scenes.clip(1, job.shapes[0])
    latent, _, caption = LatentShards(tmp_path / "latents", job).get(0, 1)
    assert caption == clip.caption
    assert (latent - objective.vae.encode(clip.video[None]).latent_dist.mode()[0]).abs().max() < 1e-2  # stored float16
    save_tokenizer(tmp_path / "vae")  # other random weights
    with pytest.raises(WaltError, match="another tokenizer"):
        LatentShards(tmp_path / "latents", job)


def test_no_scene_is_encoded_for_two_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    job = job.model_copy(update={"data": job.data.model_copy(update={"scenes": DataJob().scenes})})
    seen: dict[int, set[int]] = {}
    whole = Scenes.clip

    def watched(self: Scenes, number: int, shape: Shape, *rest: bool) -> Clip:
        seen.setdefault(job.shapes.index(shape), set()).add(number % self.job.scenes)
        return whole(self, number, shape, *rest)

    monkeypatch.setattr(Scenes, "clip", watched)
    write_latents(job, tmp_path / "latents", [5] * len(job.shapes), lambda video: torch.zeros(1, 8, 1, 1, 1))
    assert len(seen) == len(job.shapes) and len(set().union(*seen.values())) == 5 * len(job.shapes)


def test_latents_of_another_world_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    encode = build_objective(job).vae.encode
    left = iter(range(2))

    def interrupted(video: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(video).latent_dist.mode().detach()

    with pytest.raises(KeyboardInterrupt):
        write_latents(job, tmp_path / "latents", [1] * 6, interrupted)
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 2
    with pytest.raises(WaltError, match="has no latents of shape"):  # not taken for a whole folder
        LatentShards(tmp_path / "latents", job)

    assert isinstance(job.data, DataJob)
    changed = dataclasses.replace(world(job.data), size=(0.1, 0.2))
    monkeypatch.setattr("walt.data.latents.world", lambda data: changed)
    with pytest.raises(WaltError, match=r"latents of another recipe \(world\)"):
        write_latents(job, tmp_path / "latents", [1] * 6, interrupted)
    with pytest.raises(WaltError, match="another world"):
        LatentShards(tmp_path / "latents", job)
    monkeypatch.undo()
    write_latents(job, tmp_path / "latents", [1] * 6, lambda x: encode(x).latent_dist.mode().detach())
    assert LatentShards(tmp_path / "latents", job).get(0, 0)[2]


def zeros(video: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 8, 1, 1, 1)


def test_latents_go_with_their_recipe_alone(tmp_path: Path) -> None:
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    job = job.model_copy(update={"shapes": job.shapes[:2]})
    enlarging = job.model_copy(update={"model": {**job.model, "low_res_channels": 8}})
    folder = tmp_path / "latents"
    write_latents(job, folder, [2, 2], zeros)
    with pytest.raises(WaltError, match=r"another recipe \(twins\)"):
        write_latents(enlarging, folder, [32, 2], zeros)
    with pytest.raises(WaltError, match=r"another recipe \(shapes\)"):
        write_latents(job.model_copy(update={"shapes": job.shapes[:1]}), folder, [2], zeros)
    with pytest.raises(WaltError, match=r"1 of 1 shards of shape .* were encoded without the half-size videos"):
        LatentShards(folder, enlarging)
    for changes, named in (
        ({"subjects": ("sun",)}, "subjects"),
        ({"clip_subjects": ("sun",)}, "clip_subjects"),
        ({"fps": 16}, "fps"),
    ):
        with pytest.raises(WaltError, match=rf"data\.{named}: .* given, but"):
            LatentShards(folder, job.model_copy(update={"data": job.data.model_copy(update=changes)}))

    # A folder that is older than the last two entries of its index.
    index = json.loads((folder / "index.json").read_text())
    del index["shapes"], index["twins"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(WaltError, match=r"another recipe \(shapes\)"):
        write_latents(job.model_copy(update={"shapes": job.shapes[::-1]}), folder, [2, 2], zeros)
    write_latents(job, folder, [2, 3], zeros)
    assert len(LatentShards(folder, job).sets[1]) == 3
    whole = json.loads((folder / "index.json").read_text())
    rowless = [json.dumps({**whole, "shards": [row]}) for row in ("x", {}, {"file": 1, "shape": {}}, {"file": "x"})]
    for damaged in ("[]", "{}", '{"tokenizer": "x", "data": {}, "world": {}}', *rowless):
        (folder / "index.json").write_text(damaged)
        told = (
            r"index\.json: shards holds .* no file with its shape"
            if damaged in rowless
            else r"index\.json does not say"
        )
        for use in (lambda: LatentShards(folder, job), lambda: write_latents(job, folder, [2, 2], zeros)):
            with pytest.raises(WaltError, match=told):
                use()


def test_latents_of_another_world_may_be_mixed_in(tmp_path: Path) -> None:
    """At their share, of the shapes that they have; those of another tokenizer are refused."""
    vae = save_tokenizer(tmp_path / "vae")
    model = AutoencoderKLWalt.from_pretrained(vae).eval()
    job = small_job(vae, tmp_path / "run", steps=2)
    job = job.model_copy(update={"data": data(subjects=("rocket", "frog"))})
    other = job.model_copy(update={"data": data(subjects=("sun",)), "shapes": job.shapes[:2]})
    with torch.no_grad():
        write_latents(job, tmp_path / "main", [4] * 3, lambda x: model.encode(x).latent_dist.mode())
        write_latents(other, tmp_path / "other", [5] * 2, lambda x: model.encode(x).latent_dist.mode())
    told = {"latents": str(tmp_path / "main"), "mixed_latents": str(tmp_path / "other"), "mixed_share": 0.25}
    mixed = job.model_copy(update={"data": job.data.model_copy(update=told)})
    shards = LatentShards(tmp_path / "main", mixed, held=1)
    for shape in (0, 1):
        captions = [shards.get(shape, number)[2] for number in range(2000)]
        assert sum("sun" in caption for caption in captions) / 2000 == pytest.approx(0.25, abs=0.005)
        latents = {shards.get(shape, number)[0].sum().item() for number in range(2000)}
        assert len(latents) == 3 + 5, "all but the clip that is held out"
    assert not any("sun" in shards.get(2, number)[2] for number in range(200))
    assert "sun" not in shards.held_out(0, 0)[2]
    assert (run(mixed) / "config.json").exists()
    save_tokenizer(tmp_path / "vae2", seed=5)
    with torch.no_grad():
        strange = other.model_copy(update={"tokenizer": str(tmp_path / "vae2")})
        write_latents(strange, tmp_path / "strange", [1] * 2, lambda x: model.encode(x).latent_dist.mode())
    told["mixed_latents"] = str(tmp_path / "strange")
    with pytest.raises(WaltError, match="strange holds latents of another tokenizer"):
        LatentShards(tmp_path / "main", job.model_copy(update={"data": job.data.model_copy(update=told)}))
    with pytest.raises(WaltError, match="mixed_latents are drawn among those of latents"):
        load_job("emoji.base", ["data.mixed_latents=x"])


def test_no_more_latents_than_scenes(tmp_path: Path) -> None:
    job = denoiser_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    job = job.model_copy(update={"shapes": job.shapes[:2]})
    with pytest.raises(WaltError, match=r"33 clips of shape .* data\.scenes=64 has 32 scenes for each of 2 shapes"):
        write_latents(job, tmp_path / "latents", [1, 33], zeros)
    with pytest.raises(WaltError, match="stands there twice"):
        write_latents(job.model_copy(update={"shapes": job.shapes[:1] * 2}), tmp_path / "latents", [1, 1], zeros)
    assert not (tmp_path / "latents").exists()


# -- recipes


def test_every_recipe_builds() -> None:
    assert {"emoji.tokenizer", "emoji.base", "emoji.super_resolution_1", "emoji.super_resolution_2"} <= set(recipes())
    for name in recipes():
        assert load_job(name, ["run.steps=7"]).run.steps == 7


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precision_is_set_as_it_is_written(precision: str) -> None:
    assert load_job("zoo.dit", [f"run.precision={precision}"]).run.precision == precision


@pytest.mark.parametrize(
    "recipe, override, words",
    [
        ("emoji.bas", [], 'did you mean "emoji.base"'),
        ("emoji.base", ["run.stps=3"], 'did you mean "steps"'),
        ("emoji.base", ["rum.steps=3"], 'did you mean "run"'),
        ("emoji.base", ["run.steps=-3"], "run.steps: .*greater than 0, got -3"),
        ("emoji.base", ["run.steps=many"], "run.steps: .*integer"),
        ("emoji.base", ["run.steps"], "field=value"),
        ("emoji.base", ["diffusion.loss_weighting=pixel"], "'token' or 'sample'"),
        # Each of these was found out deep inside, or never: no frames made a pack that had always room for more.
        ("emoji.base", ["shapes=[{frames: 0, height: 128, width: 128}]"], "shapes.0.frames: .*greater than 0, got 0"),
        ("emoji.base", ["shapes=[]"], "shapes: .*at least 1 item"),
        ("emoji.base", ["optimizer.lr=inf"], "optimizer.lr: .*finite number"),
        ("emoji.base", ["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1: .*less than 1, got 1"),
        ("emoji.base", ["run.seed=-1"], "run.seed: .*greater than or equal to 0, got -1"),
        ("emoji.base", ["data.seed=-1"], "data.*seed: .*greater than or equal to 0, got -1"),
        ("emoji.base", ["diffusion.given_frames=[0]"], "given_frames.0: .*greater than 0, got 0"),
        ("emoji.base", ["diffusion.timestep_logit_normal=[0, -1]"], "timestep_logit_normal.1: .*got -1"),
        ("emoji.base", ["token_drop={high: 0.5, schedule: sigmoid, scale: 0}"], "token_drop.scale: .*slope"),
    ],
)
def test_recipe_errors(recipe: str, override: list[str], words: str) -> None:
    with pytest.raises(WaltError, match=words):
        load_job(recipe, override)


def test_the_discriminators_own_arguments_can_be_set() -> None:
    job = load_job("emoji.decoder_finish", ["loss.adversarial.model.base=24"])
    assert job.loss.adversarial.model["base"] == 24  # type: ignore[union-attr]


def test_missing_folders_and_unknown_model_fields(tmp_path: Path) -> None:
    with pytest.raises(WaltError, match="tokenizer: no model in"):
        build_objective(denoiser_job(tmp_path / "nothing", tmp_path / "run"))
    vae = save_tokenizer(tmp_path / "vae")
    job = denoiser_job(vae, tmp_path / "run")
    with pytest.raises(WaltError, match="no 'num_layer' \\(did you mean \"num_layers\""):
        build_objective(job.model_copy(update={"model": {**job.model, "num_layer": 2}}))
    with pytest.raises(WaltError, match="text_encoder"):
        build_objective(job.model_copy(update={"model": {**job.model, "text_dim": 8}}))
    for wrong in ({"num_layers": "two"}, {"num_attention_heads": 0}, {"sample_size": 5}):
        with pytest.raises(WaltError, match="model: WaltTransformer3DModel cannot be built of these values"):
            build_objective(job.model_copy(update={"model": {**job.model, **wrong}}))


def test_learning_rate_warms_up_and_decays() -> None:
    job = OptimizerJob(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(job, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.101
    assert sorted(rates[10:], reverse=True) == rates[10:]
