"""NuwaPipeline: the eight tasks, what is given stays, and diffusers' conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from tests import tiny
from walt.data.sketches import to_colours
from walt.errors import WaltError
from walt.pipelines.pipeline_nuwa import NuwaPipeline, Told, log_likelihood


@pytest.fixture(scope="module")
def pipe() -> NuwaPipeline:
    return tiny.nuwa_pipeline()


def picture(seed: int = 0, frames: int | None = None) -> Tensor:
    """`(T, 3, 32, 32)` (or without T) in [0, 1], the same on blocks of 8 x 8."""
    small = torch.rand(frames or 1, 3, 4, 4, generator=tiny.seeded(seed))
    large = small.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return large if frames else large[0]


def drawing(frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (frames, 4, 4)).repeat(8, 1).repeat(8, 2)


def right_half() -> np.ndarray:
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    return mask


def tokens_of(pipe: NuwaPipeline, **call: Any) -> Tensor:
    tokens: Tensor = pipe(**{"generator": tiny.seeded(0), **call}, output_type="latent").frames
    return tokens


def states_of(pipe: Any, prompt: str) -> Tensor:
    """Text states `(S, D)`."""
    words = pipe.tokenizer(prompt, return_tensors="pt")
    states: Tensor = pipe.text_encoder(words["input_ids"], words["attention_mask"]).last_hidden_state[0]
    return states


TASKS: dict[str, tuple[dict[str, Any], int]] = {
    "text to image": ({"prompt": "a rocket", "num_frames": 1}, 1),
    "text to video": ({"prompt": "a rocket flies up"}, 3),
    "sketch to image": ({"sketch": drawing(1)[0]}, 1),
    "sketch to video": ({"sketch": drawing(4)}, 4),
    "completion": ({"image": picture(), "mask": right_half()}, 1),
    "prediction": ({"video": picture(1, 1), "num_frames": 4}, 4),
    "image manipulation": ({"prompt": "a cat", "image": picture(), "mask": right_half()}, 1),
    "video manipulation": ({"prompt": "a cat", "video": picture(2, 3), "edit_from": 2}, 3),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_pictures_and_tokens_that_agree(pipe: NuwaPipeline, task: str) -> None:
    call, frames = TASKS[task]
    output = pipe(**call, generator=tiny.seeded(0), output_type="np")
    assert output.frames.shape == (1, frames, 32, 32, 3) and output.scores is None
    assert (output.images is not None) == (frames == 1)
    if frames == 1:
        assert np.array_equal(output.images[0], output.frames[0, 0])
    tokens = tokens_of(pipe, **call)
    assert tokens.shape == (1, frames, 4, 4)
    decoded = (pipe.decode(tokens)[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
    assert np.allclose(decoded, output.frames[0], atol=1e-6)
    assert not torch.equal(tokens, tokens_of(pipe, **call, generator=tiny.seeded(1)))


@pytest.mark.parametrize("task", ["completion", "prediction", "image manipulation", "video manipulation"])
def test_what_is_given_stays(pipe: NuwaPipeline, task: str) -> None:
    call, frames = TASKS[task]
    given = pipe.prepare_given(call.get("image"), call.get("video"), call.get("mask"), call.get("edit_from"))
    assert given is not None
    kept = torch.zeros(1, frames, 4, 4, dtype=torch.bool)
    kept[:, : given.mask.shape[1]] = given.mask
    expected = {"completion": 8, "prediction": 16, "image manipulation": 8, "video manipulation": 32}[task]
    assert int(kept.sum()) == expected
    for seed in range(3):
        tokens = tokens_of(pipe, **call, generator=tiny.seeded(seed), temperature=5.0)
        assert torch.equal(tokens[:, : given.tokens.shape[1]][given.mask], given.tokens[given.mask])


def test_a_token_is_made_anew_when_any_of_its_pixels_is(pipe: NuwaPipeline) -> None:
    mask = np.zeros((32, 32), np.float32)
    mask[15, 8] = 1
    given = pipe.prepare_given(picture(), None, mask, None)
    assert given is not None and (~given.mask).nonzero().tolist() == [[0, 0, 1, 1]]
    moving = np.zeros((2, 32, 32))
    moving[1, :8] = 1
    given = pipe.prepare_given(None, picture(0, 2), moving, None)
    assert given is not None and given.mask.sum(dim=(2, 3)).tolist() == [[16, 12]]


def test_conditions_count(pipe: NuwaPipeline) -> None:
    text = [tokens_of(pipe, prompt=prompt, temperature=0, guidance_scale=8.0) for prompt in ("a cat", "red background")]
    drawn = [tokens_of(pipe, sketch=drawing(3, seed), temperature=0, guidance_scale=8.0) for seed in range(2)]
    assert not torch.equal(*text) and not torch.equal(*drawn)
    assert torch.equal(text[0], tokens_of(pipe, prompt="a cat", temperature=0, guidance_scale=8.0))


def test_images_may_have_a_guidance_of_their_own(pipe: NuwaPipeline) -> None:
    both = [tokens_of(pipe, prompt="a cat", num_frames=frames) for frames in (1, 3)]
    strong = [tokens_of(pipe, prompt="a cat", num_frames=frames, guidance_scale=30.0) for frames in (1, 3)]
    pipe.register_to_config(default_image_guidance_scale=30.0)
    try:
        assert torch.equal(tokens_of(pipe, prompt="a cat", num_frames=1), strong[0])
        assert torch.equal(tokens_of(pipe, prompt="a cat", num_frames=3), both[1])
    finally:
        pipe.register_to_config(default_image_guidance_scale=None)
    assert torch.equal(tokens_of(pipe, prompt="a cat", num_frames=1), both[0]) and not torch.equal(both[0], strong[0])


def test_sketches_may_have_a_top_p_of_their_own(pipe: NuwaPipeline) -> None:
    asked: tuple[dict[str, Any], ...] = ({"sketch": drawing(3, 0)}, {"prompt": "a cat"})
    drawn, told = (tokens_of(pipe, **one) for one in asked)
    likeliest = tokens_of(pipe, **asked[0], top_p=1e-6)
    assert not torch.equal(likeliest, drawn)
    pipe.register_to_config(default_sketch_top_p=1e-6)
    try:
        assert torch.equal(tokens_of(pipe, **asked[0]), likeliest)
        assert torch.equal(tokens_of(pipe, **asked[1]), told)
    finally:
        pipe.register_to_config(default_sketch_top_p=None)


def test_predictions_may_follow_what_is_given_harder(pipe: NuwaPipeline) -> None:
    """The model's context guidance is of videos that go on, unless a prompt says how."""
    asked: tuple[dict[str, Any], ...] = ({"video": picture(0, 1)}, {"video": picture(0, 1), "prompt": "a cat"})
    plain, told = (tokens_of(pipe, **one) for one in asked)
    hard = tokens_of(pipe, **asked[0], context_guidance_scale=20.0)
    assert not torch.equal(hard, plain) and torch.equal(hard[:, 0], plain[:, 0])
    pipe.register_to_config(default_context_guidance_scale=20.0)
    try:
        assert torch.equal(tokens_of(pipe, **asked[0]), hard)
        assert torch.equal(tokens_of(pipe, **asked[0], context_guidance_scale=1.0), plain)
        assert torch.equal(tokens_of(pipe, **asked[1]), told)
        pipe.register_to_config(default_prediction_top_p=1e-6)
        assert torch.equal(tokens_of(pipe, **asked[0]), tokens_of(pipe, **asked[0], top_p=1e-6))
        assert torch.equal(tokens_of(pipe, **asked[1]), told)
    finally:
        pipe.register_to_config(default_context_guidance_scale=1.0, default_prediction_top_p=None)


def test_a_sample_depends_on_its_own_generator_alone(pipe: NuwaPipeline) -> None:
    prompts = ["a cat", "a dog jumps up", "red"]
    generators = [tiny.seeded(seed) for seed in (5, 6, 7)]
    together = tokens_of(pipe, prompt=prompts, generator=generators)
    for prompt, seed, row in zip(prompts, (5, 6, 7), together, strict=True):
        assert torch.equal(tokens_of(pipe, prompt=prompt, generator=tiny.seeded(seed))[0], row)
    twice = tokens_of(pipe, prompt=prompts[:2], num_videos_per_prompt=2, generator=tiny.seeded(1))
    one = tiny.seeded(1)
    singles = [tokens_of(pipe, prompt=prompts[i // 2], generator=one)[0] for i in range(4)]
    assert torch.equal(twice, torch.stack(singles))
    shared = tokens_of(pipe, video=picture(1, 1), prompt=prompts, generator=[tiny.seeded(5) for _ in prompts])
    assert shared.shape[0] == 3 and bool((shared[:, 0] == shared[:1, 0]).all())


def test_pipeline_equals_the_transformer(pipe: NuwaPipeline) -> None:
    """Guidance is between the prompt's states and the constant condition."""
    states = states_of(pipe, "a cat")
    from walt.pipelines.sampling import sample_seeds

    (seed,) = sample_seeds(tiny.seeded(3), 1)
    expected = pipe.transformer.generate(
        (3, 4, 4),
        pipe.transformer.encode_condition(text=[states]),
        null_condition=pipe.transformer.encode_condition(text=[None]),
        guidance_scale=3.0,
        generator=tiny.seeded(seed),
    )
    assert torch.equal(tokens_of(pipe, prompt="a cat", guidance_scale=3.0, generator=tiny.seeded(3)), expected)
    embeds = tokens_of(pipe, prompt_embeds=states[None], guidance_scale=3.0, generator=tiny.seeded(3))
    assert torch.equal(embeds, expected)
    other = tokens_of(pipe, prompt="a cat", negative_prompt="red dog", guidance_scale=3.0, generator=tiny.seeded(3))
    assert not torch.equal(other, expected)


def test_candidates_are_ranked(pipe: NuwaPipeline) -> None:
    seen: list[list[str]] = []

    def brightest(prompts: list[str], frames: Tensor) -> Tensor:
        seen.append(prompts)
        return frames.mean(dim=(1, 2, 3, 4))

    call: dict[str, Any] = {
        "prompt": ["a cat", "a dog"],
        "generator": [tiny.seeded(1), tiny.seeded(2)],
        "output_type": "pt",
    }
    first = pipe(**call).frames
    best = pipe(**{**call, "generator": [tiny.seeded(1), tiny.seeded(2)]}, num_candidates=4, ranker=brightest)
    assert seen == [["a cat"] * 4 + ["a dog"] * 4]
    assert bool((best.frames.mean(dim=(1, 2, 3, 4)) >= first.mean(dim=(1, 2, 3, 4)) - 1e-6).all())
    assert torch.allclose(best.scores, best.frames.mean(dim=(1, 2, 3, 4)) * 2 - 1, atol=1e-5)
    # one candidate that always wins: what is made without candidates
    worst = pipe(
        **{**call, "generator": [tiny.seeded(1), tiny.seeded(2)]},
        num_candidates=3,
        ranker=lambda prompts, frames: -torch.arange(6.0),
    )
    assert torch.equal(worst.frames, first)


def test_default_score_is_the_gain_of_likelihood_on_made_tokens(pipe: NuwaPipeline) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "image": picture(), "mask": right_half()}
    output = pipe(**call, num_candidates=3, generator=tiny.seeded(4), output_type="latent")
    tokens = output.frames
    states = states_of(pipe, "a cat")
    values = []
    for text in ([states], [None]):
        logits = pipe.transformer(tokens, pipe.transformer.encode_condition(text=text))[0, 0].log_softmax(-1)
        values.append(sum(float(logits[i, j, tokens[0, 0, i, j]]) for i in range(4) for j in range(2, 4)))
    assert float(output.scores[0]) == pytest.approx((values[0] - values[1]) / 8, abs=1e-4)
    told, null = Told(text=[states]), Told(text=[None])
    assert float(pipe.score(tokens, null, null)[0]) == 0.0 and float(pipe.score(tokens, told, null)[0]) != 0.0
    assert log_likelihood(
        torch.zeros(1, 1, 2, 2, 16), torch.zeros(1, 1, 2, 2, dtype=torch.long)
    ).sum() == pytest.approx(4 * np.log(1 / 16))


def test_sketches_in_colours_are_the_same(pipe: NuwaPipeline) -> None:
    sketch = drawing(2)
    images = [Image.fromarray(frame) for frame in to_colours(sketch, tiny.NUWA_CLASSES)]
    assert torch.equal(tokens_of(pipe, sketch=images), tokens_of(pipe, sketch=sketch))
    assert torch.equal(tokens_of(pipe, sketch=torch.from_numpy(sketch)), tokens_of(pipe, sketch=sketch))


def test_a_callback_interrupts(pipe: NuwaPipeline) -> None:
    """What had been made stands as in an uninterrupted call; what had not is code 0; the next call is whole again."""
    whole = tokens_of(pipe, prompt="a cat").flatten()
    seen: list[int] = []

    def stop(p: Any, step: int, done: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(done)
        p._interrupt = done >= 20
        return tensors

    part = tokens_of(pipe, prompt="a cat", callback_on_step_end=stop).flatten()
    assert 20 <= seen[-1] < len(whole) and len(seen) == len(set(seen))
    made = part != 0
    assert torch.equal(part[made], whole[made]) and int(made.sum()) <= seen[-1]
    best = pipe("a cat", num_candidates=3, generator=tiny.seeded(0), callback_on_step_end=stop)
    assert len(best.frames) == 1 and best.scores is None
    assert torch.equal(tokens_of(pipe, prompt="a cat").flatten(), whole)


def test_conventions(pipe: NuwaPipeline, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    def callback(p: Any, step: int, done: int, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, done))
        assert p is pipe and tensors == {} and p.num_timesteps == 48
        return tensors

    frames = pipe("a cat", generator=tiny.seeded(0), callback_on_step_end=callback).frames
    assert [step for step, _ in steps] == list(range(len(steps))) and steps[-1][1] == 48
    assert isinstance(frames[0][0], Image.Image) and len(frames[0]) == 3
    (same,) = pipe("a cat", generator=tiny.seeded(0), return_dict=False)
    assert np.array_equal(np.asarray(same[0][2]), np.asarray(frames[0][2]))
    pipe.save_pretrained(tmp_path / "nuwa")
    again = DiffusionPipeline.from_pretrained(tmp_path / "nuwa")
    again.set_progress_bar_config(disable=True)
    assert isinstance(again, NuwaPipeline) and list(again.config.classes) == list(tiny.NUWA_CLASSES)
    for call in ({"prompt": "a cat"}, {"sketch": drawing(2)}):
        assert torch.equal(tokens_of(again, **call), tokens_of(pipe, **call))
    bare = tiny.quiet(NuwaPipeline(tiny.vq(), None, tiny.nuwa_transformer(), None, None))
    assert tokens_of(bare, video=picture(1, 1), num_frames=2).shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give a prompt, a sketch, an image with a mask or the first frames"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": ["a cat", ""]}, "prompt is empty"),
        ({"prompt": "a", "sketch": drawing(1)}, "a prompt or a sketch, not both"),
        ({"sketch": drawing(1) + 4}, "class 7 is not known; there are 0 to 3"),
        ({"sketch": drawing(1).astype(float)}, "must be integers"),
        ({"sketch": drawing(1)[:, :30]}, "height=30 does not fit: it must be a multiple of 8"),
        ({"sketch": Image.new("RGB", (32, 32), (1, 2, 3))}, "of no known class, the first is #010203"),
        ({"sketch": drawing(5)}, "5 frames of 32x32 are more than this model makes: 4 of 32x32"),
        ({"sketch": drawing(2), "num_frames": 3}, "num_frames=3 does not fit the sketch of 2 frame"),
        ({"prompt": "a", "height": 33}, "height=33 does not fit: it must be a multiple of 8"),
        ({"prompt": "a", "width": 64}, "3 frames of 32x64 are more than"),
        ({"prompt": "a", "num_frames": 0}, "num_frames must be an integer of at least 1"),
        ({"image": picture()}, "mask: say which part"),
        ({"image": picture(), "mask": np.zeros((32, 32))}, "nothing in it is white"),
        ({"image": picture(), "mask": np.ones((16, 32))}, r"must be \(H, W\) or \(T, H, W\) with 32x32 pixels"),
        ({"image": picture()[:, :20], "mask": np.ones((20, 32))}, "height=20 does not fit"),
        ({"image": picture(), "video": picture(0, 2)}, "an image or a video, not both"),
        ({"mask": np.ones((32, 32)), "prompt": "a"}, "mask needs an image or a video"),
        ({"video": picture(0, 3), "edit_from": 3}, "a frame from 1 to 2 of the 3 given, got 3"),
        ({"video": picture(0, 3), "edit_from": 0}, "a frame from 1 to 2 of the 3 given, got 0"),
        ({"video": picture(0, 1), "edit_from": 1}, "needs a video of at least two frames"),
        ({"video": picture(0, 3), "num_frames": 3}, "nothing is left to make"),
        ({"video": picture(0, 3), "num_frames": 2}, "num_frames=2 is less than the 3 frames given"),
        ({"prompt": "a", "temperature": -1}, "temperature must be"),
        ({"prompt": "a", "top_p": 0}, "top_p must be"),
        ({"prompt": "a", "context_guidance_scale": -0.5}, "context_guidance_scale must be"),
        ({"prompt": "a", "top_k": 0}, "top_k must be"),
        ({"prompt": ["a", "b"], "sketch": None, "video": torch.stack([picture(0, 1)] * 3)}, "2 prompts and 3 images or vid"),
        ({"prompt": "a", "output_type": "gif"}, "output_type must be one of"),
        ({"prompt": "a", "generator": [tiny.seeded(0)] * 2}, "generator is a list of 2, but 1"),
        ({"prompt": "a", "num_candidates": 2, "ranker": lambda p, f: torch.zeros(3)}, "expected 2 scores"),
    ],
)  # fmt: skip
def test_faults(pipe: NuwaPipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message):
        pipe(**call)


def test_candidates_need_something_to_fit(pipe: NuwaPipeline) -> None:
    with pytest.raises(WaltError, match="num_candidates=2: candidates are scored by how well they fit"):
        pipe(video=torch.zeros(2, 3, 32, 32), num_candidates=2)


def test_a_ranker_without_prompts_is_refused_before_anything_is_made(pipe: NuwaPipeline) -> None:
    steps: list[int] = []

    def note(pipe: Any, index: int, made: int, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(index)
        return {}

    with pytest.raises(WaltError, match="ranker: it scores prompts, and there are none"):
        pipe(sketch=drawing(1), num_candidates=2, ranker=lambda p, f: torch.zeros(2), callback_on_step_end=note)
    assert not steps


def test_offloaded_parts_are_brought_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what is called is not `forward`, which is all that offloading hooks watch."""
    pipe, moved = tiny.nuwa_pipeline(), list[Any]()
    call: dict[str, Any] = {"sketch": drawing(3), "video": picture(3, 2), "num_frames": 3}
    expected = tokens_of(pipe, **call)
    plain = CpuOffload.pre_forward

    def note(hook: CpuOffload, module: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(module)
        return plain(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", note)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tokens_of(pipe, **call), expected)
    assert all(part in moved for part in (pipe.vq_seg, pipe.vq, pipe.transformer))
    moved.clear()
    pipe(**call, output_type="pt")
    assert moved[-1] is pipe.vq


def test_a_negative_prompt_needs_a_prompt(pipe: NuwaPipeline) -> None:
    with pytest.raises(WaltError, match="negative_prompt goes with a prompt"):
        pipe(sketch=drawing(1), negative_prompt="a dog")


def test_masks_may_be_bfloat16_and_pictures_grey(pipe: NuwaPipeline) -> None:
    mask, picture = torch.from_numpy(right_half() / 255), Image.new("L", (32, 32))
    made = [
        pipe(image=picture, mask=mask.to(dtype), generator=tiny.seeded(0), output_type="latent").frames
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(*made)
