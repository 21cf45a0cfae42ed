"""The tasks of a base denoiser on tiny random models: what is given stays, exactly, and what cannot be done is said."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from tests import tiny
from walt.errors import WaltError
from walt.evaluation.metrics import join_ratio
from walt.pipelines.conditions import (
    Known,
    WaltCondition,
    close_seams,
    fill,
    fit,
    known_latents,
    place,
    read_image,
    read_video,
)
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.pipeline_walt_condition import WaltConditionPipeline
from walt.pipelines.sampling import decode_latents, encode_video

PROMPT = "a rocket flies up on the purple background"
FAST: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> WaltConditionPipeline:
    return tiny.condition_pipeline()


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """(29, 3, 16, 16) in whole steps of 1 / 255."""
    return clip_of(29, 1)


def clip_of(frames: int, seed: int, height: int = 16, width: int = 16) -> Tensor:
    noise = torch.rand(frames, 3, height, width, generator=tiny.seeded(seed))
    return (noise * 255).round() / 255


def run(method: Any, *args: Any, seed: int = 0, **changes: Any) -> Tensor:
    result: Tensor = method(*args, **{**FAST, "generator": tiny.seeded(seed), **changes}).frames
    return result


def shown(pipe: WaltConditionPipeline, frames: Tensor) -> Tensor:
    """A clip (T, 3, H, W) in [0, 1] as the tokenizer shows it."""
    video = frames.transpose(0, 1)[None] * 2 - 1
    return decode_latents(pipe.vae, encode_video(pipe.vae, video))[0].transpose(0, 1) / 2 + 0.5


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < limit)


# -- given frames ------------------------------------------------------------------------------------------------------


def test_without_conditions_it_is_the_base(pipe: WaltConditionPipeline) -> None:
    base = tiny.quiet(WaltPipeline(**pipe.components))
    assert torch.equal(run(pipe, PROMPT), run(base, PROMPT, num_frames=17))


def test_first_frame_and_frame_prediction(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """One picture, or the five frames of the K600 benchmark, are kept as the tokenizer shows them."""
    cases: list[tuple[int, dict[str, Any]]] = [(1, {"image": clip[0]}), (5, {"video": clip[:5]})]
    for count, given in cases:
        made = run(pipe, PROMPT, **given)[0]
        assert made.shape == (17, 3, 16, 16)
        assert close(made[:count], shown(pipe, clip[:count])), count
        assert not close(made, run(pipe, PROMPT)[0], 1e-2)
        assert not close(made[count:], run(pipe, PROMPT, seed=1, **given)[0, count:], 1e-2)
        assert close(run(pipe, PROMPT, composite=True, **given)[0, :count], clip[:count], 1e-6)
    picture = Image.fromarray((clip[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert close(run(pipe, PROMPT, image=picture), run(pipe, PROMPT, image=clip[0]))
    assert close(run(pipe, PROMPT, image=np.asarray(picture)), run(pipe, PROMPT, image=clip[0]))


def test_first_and_last_frame(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    made = run(pipe, PROMPT, image=clip[0], last_image=clip[1])[0]
    assert close(made[:1], shown(pipe, clip[:1]))
    # A last picture is encoded as a still of its latent's four frames.
    still = shown(pipe, torch.cat([clip[:1].expand(7, -1, -1, -1), clip[1:2].expand(10, -1, -1, -1)]))
    assert close(made[-1], still[-1])
    assert close(run(pipe, PROMPT, last_image=clip[1], composite=True)[0, -1], clip[1], 1e-6)


def test_conditions_anywhere_in_a_long_video(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    conditions = [
        WaltCondition(image=clip[0]),
        WaltCondition(video=clip[4:12], frame_index=9),
        WaltCondition(image=clip[20], frame_index=22),
    ]
    made = run(pipe, PROMPT, conditions=conditions, num_frames=29, composite=True)[0]
    assert made.shape[0] == 29
    for at, frames in ((0, clip[:1]), (9, clip[4:12]), (22, clip[20:21])):
        assert close(made[at : at + len(frames)], frames, 1e-6), at
    assert not close(made[23:24], clip[20:21], 1e-2), "held while denoising, shown once"


def test_the_denoiser_is_told_whole_latents_alone(
    pipe: WaltConditionPipeline, clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    forward = type(pipe.transformer).forward

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("frame_mask"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", record)
    run(pipe, PROMPT, conditions=WaltCondition(image=clip[0], frame_index=6))
    assert [mask[0].mean().item() for mask in seen] == pytest.approx([1 / 5] * 2)
    assert seen[0][0][0, 2].min() == 1
    seen.clear()
    mask = torch.zeros(17, 16, 16)
    mask[3:, :9, :] = 1  # a row of pixels into the second row of latents, from the fourth frame on
    run(pipe, PROMPT, video=clip[:17], mask_video=mask)
    assert seen[0][0][0].amin(dim=(1, 2)).tolist() == [1, 0, 0, 0, 0]
    assert seen[0][0].sum() == 4
    seen.clear()
    run(pipe, PROMPT, image=clip[0], last_image=clip[1], conditioning="repaint")
    assert seen[0][0][0].mean(dim=(1, 2)).tolist() == [1, 0, 0, 0, 0], "what every base has learnt"


# -- regions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["model", "repaint"])
@pytest.mark.parametrize("frames", [7, 22])
def test_fill_changes_nothing_outside_the_mask(
    pipe: WaltConditionPipeline, clip: Tensor, frames: int, conditioning: str
) -> None:
    mask = torch.zeros(frames, 16, 16)
    mask[2:, 3:12, 5:13] = 1
    made = run(pipe, PROMPT, video=clip[:frames], mask_video=mask, conditioning=conditioning)[0]
    changed = mask[:, None].expand(-1, 3, -1, -1).bool()
    assert made.shape == clip[:frames].shape
    assert torch.equal((made * 255).round()[~changed], (clip[:frames] * 255).round()[~changed])
    assert (made - clip[:frames])[changed].abs().mean() > 0.1
    assert not close(made, run(pipe, PROMPT, seed=1, video=clip[:frames], mask_video=mask)[0], 1e-2)


def test_masks_in_any_form(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    mask = torch.zeros(5, 16, 16)
    mask[:, 8:] = 1
    one = run(pipe, PROMPT, video=clip[:5], mask_video=mask)
    pictures = [Image.fromarray((m * 255).byte().numpy()).convert("RGB") for m in mask]
    forms = (
        mask[0],
        mask.bool(),
        mask.numpy(),
        (mask * 255).byte().numpy(),
        pictures,
        pictures[0],
        mask[:, None].expand(-1, 3, -1, -1),
        mask[None, :, None],
        (mask * 155 + 100).byte().numpy(),  # dark grey and white
        (mask * 155 + 100).byte(),
    )
    for form in forms:
        assert torch.equal(one, run(pipe, PROMPT, video=clip[:5], mask_video=form))


def test_outpaint(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    made = run(pipe.outpaint, clip[:5], PROMPT, left=8, right=16, bottom=8)[0]
    assert made.shape == (5, 3, 24, 40)
    assert torch.equal((made[:, :, :16, 8:24] * 255).round(), (clip[:5] * 255).round())
    picture = Image.fromarray((clip[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert run(pipe.outpaint, picture, PROMPT, top=8).shape == (1, 1, 3, 24, 16)


def test_repaint_resampling_runs_every_step_again(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    mask = torch.zeros(16, 16)
    mask[8:] = 1
    steps: list[int] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(int(t))
        return {}

    arguments: dict[str, Any] = {"video": clip[:5], "mask_video": mask, "conditioning": "repaint"}
    twice = run(pipe, PROMPT, resample_steps=2, num_inference_steps=3, callback_on_step_end=look, **arguments)
    assert steps == [999, 999, 666, 666, 332]
    assert pipe.num_timesteps == 5
    assert not close(twice, run(pipe, PROMPT, num_inference_steps=3, **arguments), 1e-3)
    other = WaltConditionPipeline(
        **{**pipe.components, "scheduler": DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)}
    )
    with pytest.raises(WaltError, match="resample_steps above 1 needs"):
        run(other, PROMPT, resample_steps=2, **arguments)


# -- edits -------------------------------------------------------------------------------------------------------------


def test_edit_by_strength(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """SDEdit: little strength changes little, all of it forgets the video, and a mask bounds it."""
    near = shown(pipe, clip[:5])
    arguments: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 1.0}
    distance = [
        float((run(pipe, PROMPT, video=clip[:5], strength=s, **arguments)[0] - near).abs().mean())
        for s in (0.1, 0.5, 0.9)
    ]
    assert distance[0] < distance[1] < distance[2]
    whole = run(pipe, PROMPT, video=clip[:5], strength=1.0, **arguments)
    assert close(whole, run(pipe, PROMPT, num_frames=5, **arguments), 1e-4)
    assert not close(
        run(pipe, "a cat", video=clip[:5], strength=0.9, **arguments),
        run(pipe, PROMPT, video=clip[:5], strength=0.9, **arguments),
        1e-4,
    )
    steps: list[int] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(int(t))
        return {}

    run(pipe, PROMPT, video=clip[:5], strength=0.3, callback_on_step_end=look, **arguments)
    assert steps == [299, 199, 99] and pipe.num_timesteps == 3
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1
    part = run(pipe, PROMPT, video=clip[:5], mask_video=mask, strength=0.5, **arguments)[0]
    assert close(part[..., :8], clip[:5, ..., :8], 1e-6)
    assert not close(part, run(pipe, PROMPT, video=clip[:5], mask_video=mask, **arguments)[0], 1e-3)
    assert run(pipe, PROMPT, video=clip[:20], strength=0.5).shape[1] == 20, "any length"


def test_edit_with_a_multistep_scheduler(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    other = tiny.quiet(WaltConditionPipeline(**{**pipe.components, "scheduler": scheduler}))
    arguments: dict[str, Any] = {"video": clip[:5], "strength": 0.5, "num_inference_steps": 40, "guidance_scale": 1.0}
    one, same = run(pipe, PROMPT, **arguments), run(other, PROMPT, **arguments)
    assert (one - same).abs().mean() < 0.1 * one.std()


# -- tasks by name -----------------------------------------------------------------------------------------------------


def test_extend_forward(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    for new in (3, 12, 20):
        made = run(pipe.extend, clip[:9], PROMPT, new, composite=True)[0]
        assert made.shape[0] == 9 + new and close(made[:9], clip[:9], 1e-6)
    kept = run(pipe.extend, clip[:9], PROMPT)[0]
    assert close(kept[:4], clip[:4], 1e-6) and close(kept[4:9], shown(pipe, clip[4:9]))
    from_one = run(pipe.extend, clip[:2], PROMPT, 4)[0]
    assert from_one.shape[0] == 6 and close(from_one[1:2], shown(pipe, clip[1:2]))


def test_backward_is_forward_played_backwards(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    back = run(pipe.extend, clip[:9], PROMPT, 12, direction="backward")
    forth = run(pipe.extend, clip[:9].flip(0), PROMPT, 12)
    assert close(back, forth.flip(1), 1e-6)


def test_backward_by_the_model(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    for new in (4, 20):
        made = run(pipe.extend, clip[:10], PROMPT, new, direction="backward", reverse=False, num_videos_per_prompt=2)
        assert made.shape[:2] == (2, 10 + new)
        assert close(made[0, -2:], clip[8:10], 1e-6)
        held = clip[:1].expand(5 if new == 4 else 9, -1, -1, -1)  # what is not known before them
        assert close(made[0, new : new + 8], shown(pipe, torch.cat([held, clip[:8]]))[-8:])
        assert not close(made[0, :new], made[1, :new], 1e-2)


def test_connect(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """Both videos are told to the denoiser where they meet the new frames, and are kept."""
    one, two = clip[:13], clip_of(12, 2)
    for new in (4, 8, 16):
        made = run(pipe.connect, one, two, PROMPT, new, composite=True)[0]
        assert made.shape[0] == 25 + new
        assert close(made[:13], one, 1e-6) and close(made[13 + new :], two, 1e-6)
    other = run(pipe.connect, one, clip_of(12, 3), PROMPT, 8)[0]
    plain = run(pipe.connect, one, two, PROMPT, 8)[0]
    assert not close(other[13:21], plain[13:21], 1e-4), "what comes after matters"
    assert not close(run(pipe.connect, clip_of(13, 4), two, PROMPT, 8)[0, 13:21], plain[13:21], 1e-4), "and before"


def test_loop(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    made = run(pipe.loop, clip[:17], PROMPT, 8, composite=True)[0]
    assert made.shape[0] == 25 and close(made[:17], clip[:17], 1e-6)
    # The new frames are those between the video and itself.
    joined = run(pipe.connect, clip[:17], clip[:17], PROMPT, 8, composite=True)[0]
    assert close(made[17:], joined[17:25], 1e-6)


class Elsewhere(Tensor):
    """Goes together with no other tensor until it is brought to the CPU, as one of a GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        assert func is not torch.cat or len({type(part) for part in args[0]}) == 1, "tensors of two devices"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_video_may_lie_on_another_device(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """What a call with output_type="pt" gives goes into the next task, wherever it is."""
    tasks: list[Any] = [
        lambda x: run(pipe.extend, x, PROMPT, 4),
        lambda x: run(pipe.extend, x, PROMPT, 4, direction="backward", reverse=False),
        lambda x: run(pipe.loop, x, PROMPT, 4),
        lambda x: run(pipe.connect, x, x, PROMPT, 4),
        lambda x: run(pipe.interpolate, {0: x[0], 5: x[1]}, PROMPT),
        lambda x: run(pipe.outpaint, x[:5], PROMPT, left=8),
    ]
    for task in tasks:
        assert torch.equal(task(clip[:9].as_subclass(Elsewhere)), task(clip[:9]))


def test_an_interrupt_ends_tasks_of_several_calls(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """At the step that it comes at, also where the task would begin further calls."""
    steps: list[int] = []

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(index)
        pipe._interrupt = len(steps) == last
        return {}

    back: dict[str, Any] = {"direction": "backward", "reverse": False}
    cases: list[tuple[int, Any, int]] = [
        (1, lambda **call: pipe.interpolate({0: clip[0], 40: clip[1]}, PROMPT, **call), 1),  # far pictures between
        (5, lambda **call: pipe.interpolate({0: clip[0], 40: clip[1]}, PROMPT, **call), 16),  # after one gap of them
        (3, lambda **call: pipe.interpolate({0: clip[0], 5: clip[1], 10: clip[2], 15: clip[3]}, PROMPT, **call), 10),
        (2, lambda **call: pipe.extend(clip[:9], PROMPT, 24, **back, **call), 18),
        (1, lambda **call: pipe.loop(clip[:21], PROMPT, 12, **call), 25),  # in the first of two chunks
        (1, lambda **call: pipe.connect(clip[:21], clip[:21], PROMPT, 12, **call), 25),
    ]
    for last, make, frames in cases:
        steps.clear()
        made = run(make, callback_on_step_end=stop)[0]
        assert len(made) == frames and len(steps) == last
        if frames == 25:
            assert close(made[:8], clip[:8], 1e-6), "as far as it came, from the beginning on"
    assert run(pipe.interpolate, {0: clip[0], 1: clip[1], 6: clip[2]}, PROMPT).shape[1] == 7  # what was is over


def test_interpolate(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """Pictures at any distance, recursively; every one is kept at its place."""
    places = {0: clip[0], 1: clip[1], 7: clip[2], 40: clip[3]}
    made = run(pipe.interpolate, places, PROMPT, num_inference_steps=1)[0]
    assert made.shape[0] == 41
    for at, picture in places.items():
        assert close(made[at], picture, 1e-6), at
    assert all(not close(a, b, 1e-3) for a, b in itertools.pairwise(made)), "nothing stands still"
    two = run(pipe.interpolate, [clip[0], clip[1]], PROMPT, num_videos_per_prompt=2)
    assert two.shape[:2] == (2, 14) and not close(two[0, 1:13], two[1, 1:13], 1e-2)


def test_interpolation_where_latents_hold_eight_frames(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    other = tiny.quiet(WaltConditionPipeline(**{**pipe.components, "vae": tiny.vae((True,))}))
    places = {0: clip[0], 3: clip[1], 14: clip[2], 60: clip[3]}
    made = run(other.interpolate, places, PROMPT, num_inference_steps=1)[0]
    assert len(made) == 61
    for at, picture in places.items():
        assert close(made[at], picture, 1e-6), at
    assert run(other.interpolate, [clip[0], clip[1]], PROMPT).shape[1] == 1 + 3 * 8 + 1


def test_pictures_of_one_latent_are_each_shown_at_their_own_frame(pipe: WaltConditionPipeline) -> None:
    black, white = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    pictures = [WaltCondition(image=black, frame_index=6), WaltCondition(image=white, frame_index=7)]
    made = run(pipe, PROMPT, conditions=pictures, composite=True)[0]
    assert close(made[6], black, 1e-6) and close(made[7], white, 1e-6)
    last = [
        WaltCondition(video=black.expand(4, -1, -1, -1), frame_index=13),
        WaltCondition(image=white, frame_index=-1),
    ]
    made = run(pipe, PROMPT, conditions=last, composite=True)[0]
    assert close(made[13:16], black.expand(3, -1, -1, -1), 1e-6) and close(made[16], white, 1e-6)


def test_the_end_of_an_edited_video_is_its_own(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    """Also where it is padded to whole latents."""
    white = torch.ones(3, 16, 16)
    for frames in (16, 17):
        made = run(pipe, PROMPT, video=clip[:frames], strength=1.0, last_image=white, composite=True)[0]
        assert len(made) == frames and close(made[-1], white, 1e-6), frames


@pytest.mark.parametrize("conditioning", ["model", "repaint"])
def test_masks_of_a_batch_do_not_touch_each_other(pipe: WaltConditionPipeline, clip: Tensor, conditioning: str) -> None:
    """One video keeps its first frames, the other one a border: each is made as alone."""
    masks = torch.zeros(2, 17, 1, 16, 16)
    masks[0, 9:], masks[1, ..., 4:12, 4:12] = 1, 1
    videos = torch.stack([clip[:17], clip[12:29]])
    told: dict[str, Any] = {"conditioning": conditioning, "composite": True}
    both = run(
        pipe,
        [PROMPT, PROMPT],
        video=videos,
        mask_video=masks,
        generator=[tiny.seeded(0), tiny.seeded(1)],
        **told,
    )
    for i in range(2):
        assert close(both[i], run(pipe, PROMPT, seed=i, video=videos[i], mask_video=masks[i], **told)[0]), i


def test_sizes(pipe: WaltConditionPipeline) -> None:
    """Portrait, landscape and square from one model, by default in the shape of what is given."""
    for height, width in ((24, 8), (8, 24), (16, 16)):
        assert run(pipe, PROMPT, height=height, width=width, num_frames=5).shape[-2:] == (height, width)
    tall = clip_of(1, 5, 64, 32)[0]
    assert run(pipe, PROMPT, image=tall, num_frames=1).shape[-2:] == (24, 8)
    assert run(pipe, PROMPT, image=tall, height=32, num_frames=1).shape[-2:] == (32, 16)
    assert run(pipe, PROMPT, image=tall, height=16, width=16, num_frames=1).shape[-2:] == (16, 16)


def test_batch_equals_single(pipe: WaltConditionPipeline, clip: Tensor) -> None:
    prompts, pictures = [PROMPT, "a cat"], [clip[0], clip[1]]
    both = run(pipe, prompts, image=torch.stack(pictures), generator=[tiny.seeded(0), tiny.seeded(1)], num_frames=5)
    for i in range(2):
        assert close(both[i], run(pipe, prompts[i], seed=i, image=pictures[i], num_frames=5)[0]), i
    mask = torch.zeros(2, 5, 1, 16, 16)
    mask[0, ..., 8:], mask[1, ..., :8] = 1, 1
    videos = torch.stack([clip[:5], clip[5:10]])
    generators = [tiny.seeded(i) for i in range(4)]
    four = run(pipe, prompts, video=videos, mask_video=mask, generator=generators, num_videos_per_prompt=2)
    for i in range(4):
        alone = run(pipe, prompts[i // 2], seed=i, video=videos[i // 2], mask_video=mask[i // 2].squeeze(1))
        assert close(four[i], alone[0]), i


def test_class_conditional_models_do_the_same(clip: Tensor) -> None:
    parts = tiny.class_pipeline().components
    pipe = tiny.quiet(WaltConditionPipeline(**parts))
    made = run(pipe, class_labels=[1, 3], image=clip[0], generator=[tiny.seeded(0)] * 2, num_frames=5)
    assert made.shape[:2] == (2, 5) and close(made[0, 0], made[1, 0], 1e-6)


def test_repaint_needs_no_frame_conditioning(clip: Tensor) -> None:
    pipe = tiny.condition_pipeline(frame_conditioning=False)
    made = run(pipe, PROMPT, image=clip[0], last_image=clip[1], conditioning="repaint", resample_steps=2)[0]
    assert close(made[:1], shown(pipe, clip[:1]))
    with pytest.raises(WaltError, match=r'built with frame_conditioning=False .* pass conditioning="repaint"'):
        run(pipe, PROMPT, image=clip[0])
    with pytest.raises(WaltError, match=r'pass conditioning="repaint"'):
        run(pipe, PROMPT, video=clip[:5], strength=0.5, mask_video=torch.ones(16, 16))
    assert run(pipe, PROMPT, video=clip[:5], strength=0.5).shape[1] == 5, "an edit needs none"


def test_from_pipe_shares_the_components(clip: Tensor) -> None:
    cascade = tiny.cascade()
    pipe = tiny.quiet(WaltConditionPipeline.from_pipe(cascade))
    assert pipe.transformer is cascade.transformer and pipe.vae is cascade.vae
    assert run(pipe, PROMPT, image=clip[0], num_frames=5).shape == (1, 5, 3, 16, 16)


# -- what cannot be done -----------------------------------------------------------------------------------------------

FIVE, LARGE = clip_of(5, 1), clip_of(5, 1, 24, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": FIVE[0], "last_image": LARGE[0]}, "has the sizes 16x16 and 24x24: scale it to one size"),
        ({"video": FIVE, "mask_video": LARGE[:, 0]}, "mask_video is 24x24 and the video 16x16"),
        ({"video": FIVE, "mask_video": torch.ones(3, 16, 16)}, "mask_video has 3 frames and the video 5"),
        ({"video": FIVE, "mask_video": torch.zeros(16, 16)}, "black everywhere"),
        ({"video": FIVE, "mask_video": torch.ones(1, 1, 1, 1, 16, 16)}, "mask_video must be"),
        ({"video": FIVE, "mask_video": torch.ones(5, 2, 16, 16)}, "1 or 3 colour channels"),
        ({"mask_video": torch.ones(16, 16)}, "give the video too"),
        ({"strength": 0.5}, "give the video too"),
        ({"video": FIVE, "strength": 0.0}, "leaves none of the 2 steps"),
        ({"video": FIVE, "strength": 1.5}, "strength must be a number from 0 to 1"),
        ({"video": FIVE, "strength": 0.5, "num_frames": 9}, "but the video has 5 frames"),
        ({"video": FIVE[:3]}, "does not fill latents of 4 frames: at 0 give 5 or 9"),
        ({"video": FIVE, "num_frames": 1}, "does not lie in the 1 frames"),
        ({"video": FIVE, "image": FIVE[0]}, "both the first frames"),
        ({"video": FIVE, "mask_video": torch.ones(16, 16), "image": FIVE[0]}, "put them into the video"),
        ({"image": FIVE[0], "num_frames": 18}, "nearest are 17 and 29"),
        ({"last_image": FIVE[0], "num_frames": 1}, "last_image needs a video"),
        ({"image": FIVE[0], "height": 20}, "height=20 does not fit"),
        ({"image": "x.png"}, "image must be a tensor"),
        ({"conditions": [FIVE]}, "conditions must be WaltConditions"),
        ({"conditions": WaltCondition()}, "each with an image or a video"),
        ({"conditions": WaltCondition(image=FIVE[0], frame_index=17)}, "does not lie in the 17 frames"),
        ({"conditions": WaltCondition(video=FIVE[:4], frame_index=2)}, "later start at 1, 5, 9"),
        ({"image": torch.stack([FIVE[0]] * 3)}, "3 videos or pictures for 1 prompts"),
        ({"image": FIVE[:2], "last_image": FIVE[:3]}, "what is given has 2 and 3 rows"),
        ({"conditions": WaltCondition(image=FIVE[0], frame_index=6.0)}, "frame_index must be a whole number, got 6.0"),  # type: ignore[arg-type]
        ({"max_sequence_length": -1}, "max_sequence_length must be an integer of at least 2, got -1"),
        ({"max_sequence_length": None}, "max_sequence_length must be"),
        ({"conditioning": "mask"}, 'conditioning must be "model" or "repaint"'),
        ({"resample_steps": 2}, "resample_steps above 1 needs"),
        ({"anchor_every": -1}, "anchor_every must be"),
        ({"context_guidance_scale": -1}, "context_guidance_scale must be"),
    ],
)
def test_bad_arguments(pipe: WaltConditionPipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message):
        run(pipe, PROMPT, **changes)


def test_bad_tasks(pipe: WaltConditionPipeline) -> None:
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
        (pipe.extend, (FIVE,), {"direction": "up"}, 'direction must be "forward" or "backward"'),
        (pipe.extend, (FIVE, PROMPT, 0), {}, "num_frames must be an integer of at least 1"),
        (pipe.extend, (FIVE[:3],), {"direction": "backward", "reverse": False}, "at least 4 frames, got 3"),
        (pipe.extend, (FIVE,), {"output_type": "latent"}, "output_type must be one of pil, np, pt here"),
        (pipe.connect, (FIVE, LARGE), {}, "video is 16x16 and next_video 24x24"),
        (pipe.connect, (FIVE, FIVE[:2]), {}, "next_video must have at least 4 frames, got 2"),
        (pipe.connect, (FIVE, FIVE, PROMPT, 6), {}, "must be a multiple of 4, such as 8"),
        (pipe.connect, (FIVE, FIVE, PROMPT, 12), {}, "make no length of whole chunks: try 8 or 16"),
        (pipe.loop, (FIVE,), {}, "at least 9 frames, got 5"),
        (pipe.interpolate, ([FIVE[0]],), {}, "two pictures or more"),
        (pipe.interpolate, ([FIVE[0], LARGE[0]],), {}, "the keyframes have the sizes"),
        (pipe.interpolate, ([FIVE[0], FIVE[1]],), {"num_frames": 5}, "takes no num_frames"),
        (pipe.outpaint, (FIVE,), {}, "needs pixels to add"),
        (pipe.outpaint, (FIVE,), {"left": -1}, "left must be"),
        (pipe.outpaint, (FIVE,), {"left": 3}, "width=19 does not fit"),
        (pipe.outpaint, (FIVE,), {"left": 8, "width": 24}, "takes no width"),
    ]
    for method, args, changes, message in cases:
        named: dict[str, Any] = {} if len(args) > 1 and any(a is PROMPT for a in args) else {"prompt": PROMPT}
        with pytest.raises(WaltError, match=message):
            run(method, *args, **named, **changes)


def test_a_super_resolution_stage_cannot_animate() -> None:
    parts = tiny.super_resolution_pipeline().components
    pipe = WaltConditionPipeline(**parts)
    cases: list[dict[str, Any]] = [{"image": FIVE[0]}, {"video": FIVE, "strength": 0.5}, {}]
    for given in cases:
        with pytest.raises(WaltError, match=r"only enlarges: use WaltSuperResolutionPipeline .* a base transformer"):
            run(pipe, PROMPT, **given)


# -- pixels and latents ------------------------------------------------------------------------------------------------


def test_filling_is_nearest_in_time_then_smooth_in_space() -> None:
    video, mask = torch.zeros(1, 3, 6, 4, 4), torch.zeros(1, 1, 6, 4, 4, dtype=torch.bool)
    video[:, :, 1], video[:, :, 4] = 1, 2
    mask[:, :, 1, :, :2], mask[:, :, 4, :, :2] = True, True
    filled = fill(video, mask)
    assert filled[0, 0, :, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert close(filled[..., 2:], filled[..., :2])
    assert torch.equal(fill(video, torch.ones_like(mask)), video)
    assert fill(video, torch.zeros_like(mask)).abs().sum() == 0


def test_latents_are_those_of_the_whole_clip_where_all_before_is_given() -> None:
    """The tokenizer is causal: first frames encode as they would in any clip."""
    vae, video = tiny.vae(), torch.rand(1, 3, 17, 16, 16) * 2 - 1
    known = place(Known.nothing(1, 17, 16, 16), video[:, :, :9], 0, False, 4)
    latents, mask = known_latents(known, lambda x: encode_video(vae, x), (8, 5, 2, 2), 4)
    assert mask.mean(dim=(0, 1, 3, 4)).tolist() == [1, 1, 1, 0, 0]
    assert close(latents[:, :, :3], encode_video(vae, video)[:, :, :3])


def drift(frames: int, seed: int, ground: float = 0.0) -> Tensor:
    """`(1, 3, frames, 16, 16)`: a soft pattern that moves evenly, one pixel a frame."""
    row = ground + 0.3 * torch.sin(torch.arange(64) / 4 + seed)
    return torch.stack([row[t : t + 16].expand(1, 3, 16, 16) for t in range(frames)], dim=2)


def marked(frames: int, *given: int) -> Tensor:
    """`(1, 1, frames, 16, 16)` with `given` frames shown."""
    mask = torch.zeros(1, 1, frames, 16, 16, dtype=torch.bool)
    mask[:, :, list(given)] = True
    return mask


def test_a_step_in_time_is_spread_over_the_frames_made() -> None:
    truth = drift(17, 0)
    seen = marked(17, *range(5))
    made = truth + 0.2
    before = torch.where(seen, truth, made)
    after = made.clone()
    close_seams(after, truth, seen)
    assert join_ratio(before, 5) > 3 and join_ratio(after, 5) < 1.2
    assert torch.equal(after[:, :, :5], truth[:, :, :5]) and torch.equal(after[:, :, 13:], made[:, :, 13:])
    rest = (after - truth).abs().mean(dim=(0, 1, 3, 4))[5:13]
    assert (rest.diff() > 0).all(), "ever less of the step is taken off"
    # Backwards it is the mirror of forwards.
    mirror = made.flip(2).clone()
    close_seams(mirror, truth.flip(2), seen.flip(2))
    torch.testing.assert_close(mirror.flip(2), after)


def test_without_a_step_nothing_is_changed() -> None:
    truth = drift(17, 0)
    made = truth + 1e-3 * torch.randn(truth.shape, generator=tiny.seeded(0))
    for seen in (marked(17, *range(5)), marked(17, 0), marked(17, 0, 16)):
        after = made.clone()
        close_seams(after, truth + (0.5 if seen[0, 0, 1, 0, 0] == 0 else 0), seen)  # a lone picture is no clip
        assert (after - made)[seen.logical_not().expand_as(made)].abs().max() < 0.02
        assert torch.equal(
            after[seen.expand_as(made)],
            (truth + (0.5 if not seen[0, 0, 1, 0, 0] else 0)).clamp(-1, 1)[seen.expand_as(made)],
        )


def test_unlike_clips_dissolve() -> None:
    one, two = drift(9, 0, -0.5), drift(8, 2, 0.5)
    made = torch.cat(
        [one, drift(17, 0, -0.5)[:, :, 9:], two], dim=2
    )  # goes on as the first and does not lead to the second
    seen = marked(25, *range(9), *range(17, 25))
    after = made.clone()
    close_seams(after, made, seen)
    assert join_ratio(made, 17) > 10
    assert join_ratio(after, 9) < 1.2 and join_ratio(after, 17) < 1.2
    assert torch.equal(after[seen.expand_as(made)], made[seen.expand_as(made)])
    both = torch.cat([made, drift(25, 5)])
    close_seams(both, both.clone(), seen)
    torch.testing.assert_close(both[:1], after)  # each sample by itself


def test_a_border_in_space_is_closed() -> None:
    truth = drift(5, 0)
    seen = torch.zeros(1, 1, 5, 16, 16, dtype=torch.bool)
    seen[..., :8] = True
    after = truth - 0.2
    close_seams(after, truth, seen)
    gap = (after - truth).abs()
    assert gap[..., :8].max() == 0 and gap[..., 8].max() < 0.02
    assert 0.05 < gap[..., 15].mean() < 0.2  # further in the picture is more as it was made


def test_fit_covers_and_cuts_at_the_centre() -> None:
    video = torch.zeros(1, 3, 1, 8, 16)
    video[..., 4:12] = 1
    assert fit(video, 8, 8).min() == 1 and fit(video, 8, 16) is video
    assert fit(video, 16, 16).shape == (1, 3, 1, 16, 16)


# -- reading what is given ---------------------------------------------------------------------------------------------


def test_every_form_of_a_video_is_the_same_pixels() -> None:
    """uint8 in lists and tensors, whose values were once taken for [0, 1], among them."""
    pixels = (clip_of(3, 5) * 255).byte()
    array = pixels.permute(0, 2, 3, 1).numpy()
    wanted = pixels.float().transpose(0, 1)[None] / 255 * 2 - 1
    forms: list[Any] = [
        pixels,
        list(pixels),
        array,
        list(array),
        tuple(array),
        pixels / 255,
        [Image.fromarray(x) for x in array],
    ]
    for form in forms:
        assert close(read_video(form), wanted), type(form)
    assert close(read_video([array, array]), wanted.expand(2, -1, -1, -1, -1))
    assert close(read_image(list(array)), wanted[0].transpose(0, 1)[:, :, None])
    for wrong in (array.astype(np.float32), pixels / 255 - 0.5, array.astype(np.int64)):
        with pytest.raises(WaltError, match=r"clip must be in \[0, 1\] \(or uint8\), got values from"):
            read_video(wrong, "clip")


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA"])
def test_pictures_of_any_mode_are_read(mode: str) -> None:
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 8, 16))
    seen = read_image(picture.convert(mode))
    assert seen.shape == (1, 3, 1, 16, 16)
    assert bool((seen[..., :8] == 1).all()) and bool((seen[..., 8:] == -1).all())


def test_black_stays_black_when_it_is_scaled() -> None:
    """Scaling leaves values a rounding below 0, by which diffusers takes all pixels for [-1, 1]."""
    black = torch.full((1, 3, 1, 16, 16), -1.0)
    assert close(read_video(torch.full((1, 1, 3, 16, 16), -6e-8)), black)
    for size in [(480, 640), (37, 53), (33, 47), (90, 160), (120, 200)]:
        scaled = fit(torch.full((1, 3, 1, *size), -1.0), 16, 16)
        assert close(read_video(scaled.transpose(1, 2) / 2 + 0.5), black)


def test_pictures_per_prompt_and_several_videos_of_each(pipe: WaltConditionPipeline) -> None:
    first = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    call = {"num_videos_per_prompt": 2, "num_inference_steps": 1}
    made = run(pipe.interpolate, {0: first, 5: Image.new("RGB", (16, 16))}, [PROMPT, "a cat"], **call)
    assert made.shape == (4, 6, 3, 16, 16)
    assert [int(row[0].mean(dim=(1, 2)).argmax()) for row in made] == [0, 0, 2, 2]
