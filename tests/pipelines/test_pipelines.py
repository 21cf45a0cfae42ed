"""The pipelines on tiny real components: diffusers' conventions, chunks, guidance and exact per-sample behaviour."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests import tiny
from walt.conditioning import TEXT_TOKENS
from walt.diffusion import make_scheduler
from walt.errors import WaltError
from walt.fidelity import back_project
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline
from walt.pipelines.sampling import decode_latents, encode_video, set_timesteps
from walt.tokenizers.text import CompactTextEncoder, quantize_text_encoder
from walt.training.objectives import TextStates

PROMPT = "a rocket flies up on the purple background"
FAST: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def base() -> WaltPipeline:
    return tiny.base_pipeline()


@pytest.fixture(scope="module")
def enlarge() -> WaltSuperResolutionPipeline:
    return tiny.super_resolution_pipeline()


@pytest.fixture(scope="module")
def cascade() -> WaltCascadePipeline:
    return tiny.cascade()


def make(pipe: Any, prompt: Any = PROMPT, seed: int = 0, **changes: Any) -> torch.Tensor:
    arguments = {**FAST, "num_frames": 5, "generator": tiny.seeded(seed), **changes}
    result: torch.Tensor = pipe(prompt, **arguments).frames
    return result


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-4) -> bool:
    return bool((a - b).abs().max() < limit)


# -- the base pipeline -------------------------------------------------------------------------------------------------


def test_seed_prompt_and_guidance_matter_and_nothing_else(base: WaltPipeline) -> None:
    one = make(base)
    assert one.shape == (1, 5, 3, 16, 16) and one.min() >= 0 and one.max() <= 1 and one.std() > 0.01
    assert torch.equal(one, make(base))
    assert not close(one, make(base, seed=1), 1e-2)
    assert not close(one, make(base, "a cat"), 1e-3)
    assert not close(one, make(base, guidance_scale=1.0), 1e-3)
    assert not close(one, make(base, guidance_rescale=0.7), 1e-4)
    assert not close(one, make(base, negative_prompt="a dog jumps"), 1e-4)


def test_batch_equals_single(base: WaltPipeline) -> None:
    """Prompts of different lengths, negative prompts, several videos each, one generator per video."""
    prompts, negatives = [PROMPT, "cat"], ["a dog", "very long very long very long"]
    batch = make(base, prompts, negative_prompt=negatives, generator=[tiny.seeded(i) for i in range(4)],
                 num_videos_per_prompt=2)  # fmt: skip
    for i in range(4):
        alone = make(base, prompts[i // 2], seed=i, negative_prompt=negatives[i // 2])
        assert close(batch[i], alone[0], 1e-5), i


def test_one_generator_serves_a_batch_in_turn(base: WaltPipeline) -> None:
    batch = make(base, [PROMPT, PROMPT])
    assert close(batch[0], make(base)[0], 1e-5)
    assert not close(batch[0], batch[1], 1e-2)


def test_guidance_of_one_is_the_conditional_branch(base: WaltPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = type(base.transformer).forward

    def count(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(base.transformer), "forward", count)
    plain = make(base, guidance_scale=1.0)
    assert sizes == [1, 1]
    assert close(plain, make(base, guidance_scale=1.0, negative_prompt="a dog"), 1e-7)
    make(base, guidance_scale=2.0)
    assert sizes[4:] == [2, 2], "guidance is one packed forward"
    # Guidance is linear: with the prompt as its own negative it changes nothing.
    assert close(plain, make(base, guidance_scale=5.0, negative_prompt=PROMPT), 1e-4)


def test_small_packs_give_the_same(base: WaltPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(base, ["a cat", PROMPT])
    monkeypatch.setattr("walt.pipelines.sampling.MAX_PACK_TOKENS", 1)
    assert close(one, make(base, ["a cat", PROMPT]), 1e-5)


def test_embeddings_in_place_of_prompts(base: WaltPipeline) -> None:
    embeds, negative, mask, negative_mask = base.encode_prompt([PROMPT, "cat"], ["", "a dog jumps"])
    assert embeds is not None and mask is not None and mask.sum(1).tolist() == [10, 3]
    without = tiny.quiet(WaltPipeline(None, None, base.vae, base.transformer, base.scheduler))
    generators = [tiny.seeded(0), tiny.seeded(1)]
    given = without(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        num_frames=5,
        generator=generators,
        **FAST,
    ).frames
    generators = [tiny.seeded(0), tiny.seeded(1)]
    assert close(given, make(base, [PROMPT, "cat"], negative_prompt=["", "a dog jumps"], generator=generators), 1e-5)
    with pytest.raises(WaltError, match="needs negative_prompt_embeds"):
        without(prompt_embeds=embeds, prompt_embeds_mask=mask, num_frames=1, **FAST)
    with pytest.raises(WaltError, match="no text encoder"):
        without("a cat", num_frames=1, **FAST)


def test_t5_encoder() -> None:
    pipe = tiny.quiet(WaltPipeline(tiny.tokenizer(), tiny.t5(), tiny.vae(), tiny.transformer(), tiny.make_scheduler()))
    assert make(pipe, [PROMPT, "cat"], num_frames=1).shape == (2, 1, 3, 16, 16)


def test_output_types(base: WaltPipeline) -> None:
    pt = make(base)
    array: Any = make(base, output_type="np")
    assert isinstance(array, np.ndarray) and array.shape == (1, 5, 16, 16, 3)
    assert np.allclose(array, pt.permute(0, 1, 3, 4, 2).numpy())
    pil: Any = make(base, output_type="pil")
    assert len(pil) == 1 and len(pil[0]) == 5 and isinstance(pil[0][0], Image.Image) and pil[0][0].size == (16, 16)
    latent = make(base, output_type="latent")
    assert latent.shape == (1, 8, 2, 2, 2)
    with torch.no_grad():  # as the pipeline does: with gradients other kernels convolve
        video = decode_latents(base.vae, latent).transpose(1, 2)
    assert close(video / 2 + 0.5, pt, 1e-6)
    assert torch.equal(base(PROMPT, num_frames=5, generator=tiny.seeded(0), return_dict=False, **FAST)[0], pt)
    with pytest.raises(WaltError, match="output_type must be one of pil, np, pt, latent, got 'gif'"):
        make(base, output_type="gif")


def test_start_latents(base: WaltPipeline) -> None:
    noise = torch.randn(1, 8, 2, 2, 2, generator=tiny.seeded(5))
    assert torch.equal(make(base, latents=noise, seed=1), make(base, latents=noise, seed=2))
    with pytest.raises(WaltError, match=r"latents must have the shape \(1, 8, 2, 2, 2\)"):
        make(base, latents=noise[:, :, :1])


def test_size_and_image(base: WaltPipeline) -> None:
    assert make(base, height=24, width=40, num_frames=1).shape == (1, 1, 3, 24, 40)


def test_callback_sees_and_changes(base: WaltPipeline) -> None:
    steps = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((i, int(t), pipe.num_timesteps, sorted(tensors)))
        pipe._guidance_scale += 1
        if i == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    out = make(base, guidance_scale=2.0, output_type="latent", callback_on_step_end=look,
               callback_on_step_end_tensor_inputs=base._callback_tensor_inputs)  # fmt: skip
    names = ["latents", "negative_prompt_embeds", "prompt_embeds"]
    assert steps == [(0, 999, 2, names), (1, 499, 2, names)]
    assert base.guidance_scale == 4.0 and out.abs().sum() == 0
    with pytest.raises(WaltError, match="callback_on_step_end_tensor_inputs has"):
        make(base, callback_on_step_end_tensor_inputs=["images"])


def test_interrupt_stops_the_loop(base: WaltPipeline) -> None:
    seen = []

    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        pipe._interrupt = True
        return {}

    assert make(base, num_inference_steps=5, callback_on_step_end=stop).shape[1] == 5
    assert seen == [0]
    make(base)
    assert not base.interrupt


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers_reach_the_same_video(base: WaltPipeline, scheduler: Any) -> None:
    """Made from DDIM's config they solve the same equation, also from given frames."""
    other = tiny.quiet(WaltPipeline(**{**base.components, "scheduler": scheduler.from_config(base.scheduler.config)}))
    arguments: dict[str, Any] = {"guidance_scale": 1.0, "output_type": "latent", "num_frames": 29}
    few = make(base, num_inference_steps=50, **arguments)
    same = make(other, num_inference_steps=50, **arguments)
    assert (few - same).abs().mean() < 0.1 * few.std()


@pytest.mark.parametrize("steps", [2, 3, 9, 30, 500])
def test_the_least_strength_that_is_advised_is_taken(steps: int) -> None:
    with pytest.raises(WaltError, match="use at least") as error:
        set_timesteps(make_scheduler(), steps, 1e-4)
    least = float(str(error.value).split("use at least ")[1].split(",")[0])
    assert least < 1 / steps + 0.002 and len(set_timesteps(make_scheduler(), steps, least)) == 1


def test_class_conditional() -> None:
    pipe = tiny.class_pipeline()
    arguments: dict[str, Any] = {"num_frames": 1, "guidance_scale": 4.0, **FAST}
    both = pipe(class_labels=[1, 4], generator=[tiny.seeded(0), tiny.seeded(0)], **arguments).frames
    assert both.shape == (2, 1, 3, 16, 16) and not close(both[0], both[1], 1e-3)
    assert close(both[1], pipe(class_labels=4, generator=tiny.seeded(0), **arguments).frames[0], 1e-5)
    with pytest.raises(WaltError, match="takes no text"):
        pipe("a cat", **arguments)
    with pytest.raises(WaltError, match="from 0 to 4"):
        pipe(class_labels=7, **arguments)
    with pytest.raises(WaltError, match="give class_labels"):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 20}, "height=20 does not fit: it must be a multiple of 8"),
        ({"width": 0}, "width=0 does not fit"),
        ({"num_frames": 30}, "nearest are 29 and 41"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"guidance_scale": -1}, "guidance_scale must be a number of at least 0"),
        ({"guidance_rescale": 2}, "guidance_rescale must be a number from 0 to 1"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"prompt": None}, "give a prompt"),
        ({"prompt": []}, "prompt must be a str or a non-empty list"),
        ({"prompt": 3}, "prompt must be a str"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"generator": [torch.Generator()] * 3}, "generator is a list of 3, but 1 samples"),
        ({"class_labels": 1}, "takes no classes"),
        ({"prompt_embeds": torch.zeros(1, 2, 16)}, "not both"),
    ],
)
def test_bad_arguments(base: WaltPipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message):
        make(base, **{"prompt": PROMPT, **changes})


# -- long videos -------------------------------------------------------------------------------------------------------


def test_long_video_starts_as_the_short_one_and_continues_it(base: WaltPipeline) -> None:
    short, long = make(base, num_frames=17), make(base, num_frames=29)
    assert long.shape[1] == 29 and close(long[:, :17], short, 1e-6)
    latents = make(base, num_frames=29, output_type="latent")
    assert latents.shape[2] == 10
    # The second chunk begins with the first one's last five frames, encoded on their own.
    given = encode_video(base.vae, (short[:, 12:] * 2 - 1).transpose(1, 2))
    assert close(latents[:, :, 5:7], given, 1e-4)
    assert not close(latents[:, :, 7:], make(base, num_frames=29, seed=3, output_type="latent")[:, :, 7:], 1e-2)


def test_given_frames_enter_every_step_at_its_noise(base: WaltPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training: the noisy frames that are given are the clean ones at that timestep, in both branches."""
    seen: list[tuple[float, torch.Tensor, Any, Any]] = []
    forward = type(base.transformer).forward

    def record(self: Any, hidden_states: Any, timestep: Any, **kwargs: Any) -> Any:
        seen.append((float(timestep[0]), hidden_states[0], kwargs.get("frame_mask"), kwargs.get("frame_latents")))
        return forward(self, hidden_states, timestep, **kwargs)

    monkeypatch.setattr(type(base.transformer), "forward", record)
    make(base, num_frames=29)
    assert [mask is None for _, _, mask, _ in seen] == [True, True, False, False]
    (_, first, masks, clean), (t, second, _, _) = seen[2:]
    assert len(masks) == 2 and all(mask[:, :2].min() == 1 and mask[:, 2:].max() == 0 for mask in masks)
    alpha = base.scheduler.alphas_cumprod[int(t)]
    expected = alpha.sqrt() * clean[0][:, :2] + (1 - alpha).sqrt() * first[:, :2]  # at t = 999, x_t is the noise
    assert close(second[:, :2], expected, 1e-5)


def test_long_video_needs_frame_conditioning() -> None:
    pipe = tiny.base_pipeline(frame_conditioning=False)
    assert make(pipe, num_frames=17).shape[1] == 17
    with pytest.raises(WaltError, match="num_frames=29 needs a transformer with frame_conditioning"):
        make(pipe, num_frames=29)


# -- super-resolution --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    return torch.rand(2, 5, 3, 16, 16, generator=tiny.seeded(9))


def test_doubles_any_form_of_video(enlarge: WaltSuperResolutionPipeline, small: torch.Tensor) -> None:
    def run(video: Any, **changes: Any) -> torch.Tensor:
        generator = [tiny.seeded(0), tiny.seeded(1)][: changes.pop("count", 2)]
        prompt = changes.pop("prompt", ["a cat", PROMPT])
        result: torch.Tensor = enlarge(video, prompt, generator=generator, **{**FAST, **changes}).frames
        return result

    small = (small * 255).round() / 255
    whole = run(small)
    assert whole.shape == (2, 5, 3, 32, 32)
    assert close(whole[0], run(small[0], prompt="a cat", count=1)[0], 1e-5), "batch = single"
    array = small.permute(0, 1, 3, 4, 2).numpy()
    assert close(whole, run(array), 1e-5)
    assert close(whole, run((array * 255).round().astype(np.uint8)), 1e-5)
    pictures = [[Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in video] for video in array]
    assert close(whole, run(pictures), 1e-5)
    assert not close(whole, run(small.flip(0)), 1e-2), "the low resolution matters"
    assert not close(whole, run(small, noise_level=900), 1e-3), "and so does its noise"


def test_long_super_resolution(enlarge: WaltSuperResolutionPipeline) -> None:
    video = torch.rand(1, 29, 3, 16, 16, generator=tiny.seeded(2))
    long = enlarge(video, PROMPT, generator=tiny.seeded(0), **FAST).frames
    short = enlarge(video[:, :17], PROMPT, generator=tiny.seeded(0), **FAST).frames
    assert long.shape == (1, 29, 3, 32, 32) and close(long[:, :17], short, 1e-6)


def test_super_resolution_refuses(
    enlarge: WaltSuperResolutionPipeline, base: WaltPipeline, small: torch.Tensor
) -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (small, "a cat", {}, "1 prompts for 2 videos"),
        (small, None, {}, "give the prompt"),
        (None, "a", {}, "give a video"),
        ("x.mp4", "a", {}, "video must be"),
        (small, ["a", "b"], {"noise_level": 1000}, "noise_level must be an integer from 0 to 999"),
        (small, ["a", "b"], {"fidelity": 1.5}, "fidelity must be"),
        (small, ["a", "b"], {"fidelity": "all"}, "fidelity must be"),
    ]
    for video, prompt, changes, message in cases:
        with pytest.raises(WaltError, match=message):
            enlarge(video, prompt, **{**FAST, **changes})
    with pytest.raises(WaltError, match="no super-resolution stage"):
        WaltSuperResolutionPipeline(base.vae, base.transformer, base.scheduler)(small)
    with pytest.raises(WaltError, match="use WaltSuperResolutionPipeline"):
        WaltPipeline(base.tokenizer, base.text_encoder, base.vae, enlarge.transformer, base.scheduler)("a cat")


def small_again(video: torch.Tensor) -> torch.Tensor:
    """Means of two by two pixels."""
    return video.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3))


def test_back_projection_corrects_the_band_it_is_told() -> None:
    """A wave at `fidelity` of the small video's highest frequency is made up for by half; slower ones in full, and only
    at fidelity 1 the fastest at all. Bicubic enlarging and averaging pass a wave of frequency f by a known share."""
    x = torch.arange(64, dtype=torch.float32)

    def corrected(frequency: float, fidelity: float) -> float:
        wave = 0.2 * torch.cos(2 * math.pi * frequency * x + 1.0)
        low = wave.expand(1, 3, 2, 8, 64)
        video = torch.zeros(1, 3, 2, 16, 128)
        back_project(video, low, fidelity)
        inner = small_again(video)[..., 16:48]
        return float((inner * low[..., 16:48]).sum() / low[..., 16:48].square().sum())

    full = {f: corrected(f, 1.0) for f in (0.0, 0.125, 0.25, 0.3)}
    assert full[0.0] == pytest.approx(1, abs=1e-5) and all(0.95 < share < 1.05 for share in full.values())
    passed = {f: 1 - (1 - share) ** (1 / 3) for f, share in full.items()}  # three times over: this much each time
    for fidelity in (0.5, 0.6):
        assert corrected(fidelity / 2, fidelity) / passed[fidelity / 2] == pytest.approx(0.5, abs=0.03)
        assert corrected(0.0, fidelity) == pytest.approx(1, abs=1e-5)
        assert corrected(0.05, fidelity) > 0.95
        assert abs(corrected(0.5, fidelity)) < 0.25
    for sides in ((1, 1), (2, 9)):  # and however small the frame and weak the hold
        video = torch.zeros(1, 3, 1, 2 * sides[0], 2 * sides[1], dtype=torch.bfloat16)
        back_project(video, torch.full((1, 3, 1, *sides), 0.5), 1e-3)
        assert (video == 0.5).all()


def test_back_projection_brings_the_small_video_along() -> None:
    """What a user gives stays on the CPU; here a pretended GPU computes."""
    for fidelity in (0.6, 1.0):
        with FakeTensorMode():
            video, small = torch.empty(1, 3, 2, 32, 32, device="cuda"), torch.empty(1, 3, 2, 16, 16)
            back_project(video, small, fidelity)
            assert video.device.type == "cuda"


def test_full_fidelity_keeps_detail_where_the_input_has_some() -> None:
    """Noise finer than the small video's pixels goes where that is plain; beside an edge half of it stays at most."""
    low = torch.full((1, 3, 1, 16, 64), -0.5)
    low[..., 32:] = 0.5
    noise = 0.02 * (torch.rand(1, 3, 1, 32, 128, generator=tiny.seeded(0)) - 0.5)
    fine = noise - F.interpolate(small_again(noise)[:, :, 0], scale_factor=2)[:, :, None]
    clean, noisy = F.interpolate(low[:, :, 0], scale_factor=2)[:, :, None], torch.empty(0)
    noisy = clean + fine
    for video in (clean, noisy):
        back_project(video, low, 1.0)
    left = (noisy - clean).square().mean((0, 1, 2, 3)).sqrt() / fine.square().mean((0, 1, 2, 3)).sqrt()
    assert left[4:48].max() < 0.02 and left[-48:-4].max() < 0.02
    assert 0.3 < left[62:66].mean() < 0.7


def test_fidelity_holds_the_result_to_its_input(enlarge: WaltSuperResolutionPipeline) -> None:
    video = F.interpolate(torch.rand(29, 3, 8, 8, generator=tiny.seeded(2)), size=(16, 20), mode="bicubic").clamp(0, 1)

    def run(fidelity: float | None) -> torch.Tensor:
        frames: torch.Tensor = enlarge(video, PROMPT, fidelity=fidelity, generator=tiny.seeded(0), **FAST).frames
        return frames

    free, held, full = run(0.0), run(0.5), run(1.0)
    assert torch.equal(run(None), free)
    errors = [float((small_again(made[0]) - video).abs().mean()) for made in (free, held, full)]
    assert errors[2] < 0.7 * errors[1] and errors[1] < 0.7 * errors[0]
    states, _, mask, _ = enlarge.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    told: dict[str, Any] = {"prompt_embeds": states, "prompt_embeds_mask": mask, "fidelity": 0.5}
    stream = enlarge.stream(iter(video[None].split(7, dim=1)), generator=tiny.seeded(0), num_inference_steps=2, **told)
    assert close(torch.cat(list(stream), dim=1), held, 1e-5)


# -- the cascade -------------------------------------------------------------------------------------------------------


def test_cascade_is_the_stages_one_after_another(cascade: WaltCascadePipeline) -> None:
    sizes = {stages: make(cascade, stages=stages, num_inference_steps=None) for stages in (1, 2, 3)}
    assert [tuple(out.shape[-2:]) for out in sizes.values()] == [(16, 16), (32, 32), (64, 64)]
    assert make(cascade, num_frames=1).shape == (1, 1, 3, 64, 64)
    # By hand: the same numbers from the parts, each sample's seed drawn once.
    seed = int(torch.randint(2**63 - 1, (), generator=tiny.seeded(0)))
    source = tiny.seeded(seed)
    base = tiny.quiet(WaltPipeline(*[getattr(cascade, name) for name in
                                     ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")]))  # fmt: skip
    frames = base(
        PROMPT, num_frames=5, num_inference_steps=3, guidance_scale=3.0, generator=source, output_type="pt"
    ).frames
    assert close(frames, sizes[1], 1e-6)
    embeds, _, mask, _ = base.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    second = tiny.quiet(WaltSuperResolutionPipeline(cascade.vae, cascade.transformer_2, cascade.scheduler))
    frames = second(frames, prompt_embeds=embeds, prompt_embeds_mask=mask, generator=source, **FAST).frames
    assert close(frames, sizes[2], 1e-5)


def test_cascade_tells_each_stage_its_fidelity(cascade: WaltCascadePipeline) -> None:
    first = make(cascade, stages=2)
    both, one, none = (make(cascade, fidelity=fidelity) for fidelity in (1.0, [1.0, 0.0], None))
    assert close(make(cascade, fidelity=0.0), none, 1e-6) and not close(one, none, 1e-3) and not close(one, both, 1e-3)
    held = make(cascade, stages=2, fidelity=1.0)
    assert not close(held, first, 1e-3)

    def gap(large: torch.Tensor) -> float:
        return float((small_again(large) - held).abs().mean())

    assert gap(both) < 0.5 * gap(one)
    pieces = cascade.stream(PROMPT, num_frames=5, generator=tiny.seeded(0), fidelity=[1.0, 0.0])
    assert close(torch.cat(list(pieces), dim=1), make(cascade, num_inference_steps=None, fidelity=[1.0, 0.0]))
    video = torch.rand(1, 5, 3, 16, 16, generator=tiny.seeded(4))
    call: dict[str, Any] = {"scale": 2, "num_inference_steps": 1, "output_type": "pt"}
    told: list[dict[str, Any]] = [{}, {"fidelity": 1.0}, {"fidelity": 0.0}]
    given, full, free = (
        cascade.upscale(video, PROMPT, generator=tiny.seeded(0), **call, **more).frames for more in told
    )
    assert torch.equal(given, full) and not close(given, free, 1e-3), "a given video is kept to in full"


def test_cascade_batch_equals_single(cascade: WaltCascadePipeline) -> None:
    batch = make(cascade, ["a cat", PROMPT], num_frames=1, generator=[tiny.seeded(0), tiny.seeded(1)])
    assert close(batch[1], make(cascade, seed=1, num_frames=1)[0], 1e-4)
    assert close(make(cascade, ["a cat", PROMPT], num_frames=1)[0], batch[0], 1e-4)


def test_cascade_steps_guidance_and_callbacks_per_stage(cascade: WaltCascadePipeline) -> None:
    seen = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, pipe.current_stage, pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt))
        return tensors

    make(cascade, num_inference_steps=(3, 2, 1), guidance_scale=[4.0, 2.0, 1.0], callback_on_step_end=look)
    stages = [(1, 4.0)] * 3 + [(2, 2.0)] * 2 + [(3, 1.0)]
    assert seen == [(i, stage, scale, 6, False) for i, (stage, scale) in enumerate(stages)]
    assert cascade.current_stage == 0


def test_cascade_interrupt_returns_the_stage_it_was_in(cascade: WaltCascadePipeline) -> None:
    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = pipe.current_stage == 2
        return tensors

    assert make(cascade, callback_on_step_end=stop).shape == (1, 5, 3, 32, 32)
    assert make(cascade, callback_on_step_end=stop, output_type="np").shape == (1, 5, 32, 32, 3)
    assert make(cascade, callback_on_step_end=stop, output_type="latent").shape == (1, 8, 2, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 4}, "stages=4, but this model has 3"),
        ({"height": 40}, "height=40 does not fit: it must be a multiple of 32, for instance 32"),
        ({"num_inference_steps": (3, 2)}, "num_inference_steps has 2 values, expected one or 3"),
        ({"noise_level": (1, 2, 3)}, "noise_level has 3 values, expected one or 2"),
        ({"fidelity": (1, 0, 1)}, "fidelity has 3 values, expected one or 2"),
        ({"fidelity": -0.1}, "fidelity must be"),
        ({"noise_level": 5000}, "noise_level must be an integer from 0 to 999, got 5000"),
        ({"guidance_scale": (1, 2, -3)}, "guidance_scale must be"),
        ({"num_frames": 18}, "nearest are 17 and 29"),
        ({"prompt": None}, "give a prompt"),
    ],
)
def test_cascade_bad_arguments(cascade: WaltCascadePipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message):
        make(cascade, **{"prompt": PROMPT, **changes})


# -- folders -----------------------------------------------------------------------------------------------------------


def test_saved_folder_opens_in_a_fresh_process(cascade: WaltCascadePipeline, tmp_path: Path) -> None:
    """`import walt` is all it takes, before diffusers or after, and it stays light."""
    cascade.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "WaltCascadePipeline" and index["base_steps"] == 3
    assert index["vae"] == ["walt", "AutoencoderKLWalt"] and index["transformer_3"] == [
        "walt",
        "WaltTransformer3DModel",
    ]
    code = """
import sys
import walt
assert not {"torch", "diffusers", "transformers"} & set(sys.modules), "import walt must be light"
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is walt.WaltCascadePipeline
import numpy, torch
from diffusers.hooks._helpers import TransformerBlockRegistry
for block in pipe.transformer.transformer_blocks:
    TransformerBlockRegistry.get(type(block))
pipe.set_progress_bar_config(disable=True)
out = pipe("a rocket", num_frames=1, generator=torch.Generator().manual_seed(0), output_type="np").frames
numpy.save(sys.argv[2], out)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr, done.stderr
    here = make(cascade, "a rocket", num_frames=1, num_inference_steps=None, output_type="np")
    assert np.abs(np.load(tmp_path / "out.npy") - here).max() < 1e-5


def test_partial_pipelines_save_and_load(tmp_path: Path) -> None:
    class_pipe = tiny.class_pipeline()
    class_pipe.save_pretrained(tmp_path / "classes")
    again = tiny.quiet(WaltPipeline.from_pretrained(tmp_path / "classes"))
    assert again.tokenizer is None and again.text_encoder is None
    arguments: dict[str, Any] = {"class_labels": 1, "num_frames": 1, **FAST}
    both = [pipe(generator=tiny.seeded(0), **arguments).frames for pipe in (class_pipe, again)]
    assert torch.equal(*both)
    enlarge = tiny.super_resolution_pipeline()
    enlarge.register_to_config(noise_level=123, fidelity=0.5)
    enlarge.save_pretrained(tmp_path / "large")
    assert WaltSuperResolutionPipeline.from_pretrained(tmp_path / "large").config.noise_level == 123
    assert WaltSuperResolutionPipeline.from_pretrained(tmp_path / "large").config.fidelity == 0.5


def test_int8_text_encoder_is_a_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.bert().save_pretrained(tmp_path / "bert")
    base = tiny.base_pipeline()
    base.text_encoder = quantize_text_encoder(tmp_path / "bert", tmp_path / "int8")
    WaltPipeline(**base.components).save_pretrained(tmp_path / "model")
    again = tiny.quiet(WaltPipeline.from_pretrained(tmp_path / "model"))
    assert type(again.text_encoder) is CompactTextEncoder and "Expected types" not in capsys.readouterr().err
    assert torch.equal(make(base, 30 * PROMPT), make(again, 30 * PROMPT))  # cut to the encoder's 32 positions
    exact = make(tiny.base_pipeline())
    assert (make(base) - exact).abs().mean() < 0.2 * (make(base, "a cat") - exact).abs().mean(), (
        "rounding, no new words"
    )


def test_long_prompts_are_cut_as_in_training(base: WaltPipeline, caplog: pytest.LogCaptureFixture) -> None:
    """With a line that names what is left out; training, whose captions have no end, says it once."""
    tokenizer, encoder = tiny.tokenizer(), tiny.t5()
    tokenizer.model_max_length = 1000
    pipe = WaltPipeline(**{**base.components, "tokenizer": tokenizer, "text_encoder": encoder})
    fits, long = " ".join(["cat"] * (TEXT_TOKENS - 2)), " ".join(["cat"] * (TEXT_TOKENS - 2) + ["red", "rocket"])
    states, _, mask, _ = pipe.encode_prompt([fits, long], do_classifier_free_guidance=False)
    assert states is not None and mask is not None and states.shape[1] == TEXT_TOKENS and bool(mask.all())

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("walt.")]

    (line,) = said()
    assert f'{TEXT_TOKENS + 2} tokens is cut to {TEXT_TOKENS}; what is left out: "red rocket"' in line
    caplog.clear()
    words = TextStates(tokenizer, encoder)
    for _ in range(2):
        words.cache.clear()
        for trained, sampled in zip(words([fits, long]), states, strict=True):
            assert torch.allclose(trained, sampled, atol=1e-6)
    assert ["red rocket" in line for line in said()] == [True]


def test_text_components_alone(base: WaltPipeline) -> None:
    """diffusers' testers build pipelines of text components only, and encode there."""
    alone = WaltPipeline(base.tokenizer, base.text_encoder, None, None, None)  # type: ignore[arg-type]
    assert torch.equal(alone.encode_prompt("a cat")[0], base.encode_prompt("a cat")[0])  # type: ignore[arg-type]


def test_text_is_projected_once_per_prompt_whoever_watches(
    base: WaltPipeline, cascade: WaltCascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback must not make every step project the text anew, unless it changes the text."""
    projected: list[object] = []
    plain = WaltTransformer3DModel._text

    def count(self: Any, *args: Any) -> Any:
        projected.append(self)
        return plain(self, *args)

    def scaled(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.1}

    def in_place(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["prompt_embeds"].mul_(1.1)
        return {}

    monkeypatch.setattr(WaltTransformer3DModel, "_text", count)
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "num_frames": 5}
    cascade(PROMPT, stages=2, generator=tiny.seeded(0), **call)
    assert len(projected) == 2  # once for each stage
    results = []
    for change in (scaled, in_place):
        projected.clear()
        watched: dict[str, Any] = {
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }
        results.append(base(PROMPT, generator=tiny.seeded(0), **watched, **call).frames)
        assert len(projected) == 3
    assert torch.equal(*results)


def test_a_base_without_text_or_class_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.quiet(WaltPipeline(None, None, tiny.vae(), tiny.transformer(text_dim=None), make_scheduler()))
    rows: list[int] = []
    plain = pipe.transformer.forward

    def count(samples: Any, *args: Any, **told: Any) -> Any:
        rows.append(len(samples))
        return plain(samples, *args, **told)

    monkeypatch.setattr(pipe.transformer, "forward", count)
    pipe(num_frames=1, generator=tiny.seeded(0), **FAST)
    assert rows == [1, 1]


def test_one_sentence_where_prompts_and_sizes_do_not_fit(
    base: WaltPipeline, enlarge: WaltSuperResolutionPipeline
) -> None:
    def turn_on(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 3.0
        return {}

    states, small = torch.zeros(1, 3, tiny.TEXT_DIM), torch.rand(1, 5, 3, 16, 16)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ["a cat", "a dog"], "negative_prompt_embeds": states}, "are of 1 prompts, there are 2"),
        ({"negative_prompt_embeds": states.repeat(2, 1, 1)}, "are of 2 prompts, there are 1"),
        ({"height": "16"}, "height must be an integer, a multiple of 8, got '16'"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number of at least 0, got inf"),
        ({"generator": (tiny.seeded(0),)}, "generator must be a torch.Generator, a list"),
        ({"guidance_scale": 1.0, "callback_on_step_end": turn_on}, "guidance needs text states to steer away from"),
    ]
    for changes, message in wrong:
        with pytest.raises(WaltError, match=message):
            base(**{"prompt": "a cat", "num_frames": 1, **FAST, **changes})
    streams: list[tuple[dict[str, Any], str]] = [
        ({"guidance_scale": 3.0}, "needs negative_prompt_embeds"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"prompt_embeds": states.repeat(2, 1, 1)}, "prompt_embeds of 2 prompts for 1 videos"),
    ]
    for changes, message in streams:
        with pytest.raises(WaltError, match=message):
            next(enlarge.stream(iter([small]), **{"prompt_embeds": states, **changes}))
