"""Long videos chunk by chunk: the same frames as in one piece, in the memory of a short one, also from a user's video."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from walt.errors import WaltError
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
from walt.pipelines.sampling import Prompt

PROMPT = "a rocket flies up on the purple background"


@pytest.fixture(scope="module")
def base() -> WaltPipeline:
    return tiny.base_pipeline()


@pytest.fixture(scope="module")
def cascade() -> WaltCascadePipeline:
    return tiny.cascade()


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < limit)


def base_call(frames: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "num_frames": frames,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "generator": tiny.seeded(0),
        **changes,
    }


def test_stream_is_the_call(base: WaltPipeline) -> None:
    pieces = list(base.stream(**base_call(41)))
    assert [piece.shape[1] for piece in pieces] == [17, 12, 12]
    assert torch.equal(torch.cat(pieces, dim=1), base(**base_call(41), output_type="pt").frames)


def test_cascade_streams_through_all_stages(cascade: WaltCascadePipeline) -> None:
    """Every stage is at most a chunk ahead of the next, and all give what a call gives."""
    seen: list[int] = []

    def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipe.current_stage)
        return {}

    call: dict[str, Any] = {"num_frames": 41, "stages": 3, "num_inference_steps": 1, "guidance_scale": (2.0, 1.0, 1.0)}
    pieces = cascade.stream(PROMPT, generator=tiny.seeded(0), callback_on_step_end=look, **call)
    first = next(pieces)
    assert first.shape == (1, 17, 3, 64, 64) and seen[-1] == 3 and seen.count(3) == 1
    made = torch.cat([first, *pieces], dim=1)
    assert sorted(seen) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(made, cascade(PROMPT, generator=tiny.seeded(0), output_type="pt", **call).frames)
    assert cascade.current_stage == 0


def test_guidance_outlives_a_stage_without_text() -> None:
    pipe = tiny.cascade()
    pipe.register_modules(transformer_2=tiny.super_resolution_transformer(4, 2, text_dim=None))
    call: dict[str, Any] = {"num_frames": 1, "num_inference_steps": 1, "guidance_scale": 3.0}
    made = pipe(PROMPT, generator=tiny.seeded(0), output_type="pt", **call).frames
    assert torch.equal(torch.cat(list(pipe.stream(PROMPT, generator=tiny.seeded(0), **call)), dim=1), made)


def held() -> int:
    """Bytes of all tensors that Python holds, save those without memory that compiling leaves behind."""
    gc.collect()
    storages = (x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_stream_holds_no_more_however_long_it_is(cascade: WaltCascadePipeline) -> None:
    """And of a chunk of the last stage, once it is given away, nothing but the frames that the next one sees."""
    before, seen = held(), []
    pieces = cascade.stream(PROMPT, num_frames=101, num_inference_steps=1, guidance_scale=1.0)
    for _ in map(id, pieces):
        seen.append(held() - before)
    assert len(seen) == 8 and len(set(seen[1:6])) == 1
    chunk, overlap = (frames * 3 * 64 * 64 * 4 for frames in (17, 5))
    lower = sum(frames * 3 * side**2 * 4 for side in (16, 32) for frames in (29, 12, 12, 5))
    assert max(seen) < overlap + lower + chunk // 2


def test_interrupt_ends_a_stream(cascade: WaltCascadePipeline) -> None:
    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 2
        return {}

    made = list(
        cascade.stream(
            PROMPT, num_frames=485, stages=1, num_inference_steps=1, guidance_scale=1.0, callback_on_step_end=stop
        )
    )
    assert [piece.shape[1] for piece in made] == [17, 12, 12]


def test_arguments_are_checked_at_the_call(base: WaltPipeline, cascade: WaltCascadePipeline) -> None:
    """Not only when the first chunk is asked for."""
    enlarge, video = tiny.super_resolution_pipeline(), torch.rand(1, 1, 3, 16, 16)
    states = torch.zeros(1, 3, tiny.TEXT_DIM)
    cases: list[tuple[Any, str]] = [
        (lambda: base.stream(PROMPT, num_frames=18), "num_frames"),
        (lambda: base.stream(PROMPT, guidance_scale=-1.0), "guidance_scale must be"),
        (lambda: base.stream(PROMPT, callback_on_step_end_tensor_inputs=["x"]), r"has \['x'\]; allowed are"),
        (lambda: base.stream(PROMPT, negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts"),
        (lambda: base.stream(PROMPT, generator="seed"), "generator must be"),
        (lambda: cascade.stream(PROMPT, stages=4), "stages=4, but this model has 3"),
        (lambda: cascade.stream(PROMPT, noise_level=[1, 2, 3]), "noise_level has 3 values"),
        (lambda: cascade.stream(PROMPT, noise_level=1000), "noise_level must be"),
        (lambda: cascade.stream(PROMPT, context_noise_level=-1), "context_noise_level must be"),
        (lambda: cascade.upscale_stream(video, PROMPT, scale=3), "scale must be 2, 4 or a higher power of 2"),
        (lambda: cascade.upscale_stream(iter([video]), PROMPT, noise_level=1000), "noise_level must be"),
        (lambda: enlarge.stream(iter([video]), states, num_inference_steps=0), "num_inference_steps must be"),
    ]
    for make, message in cases:
        with pytest.raises(WaltError, match=message):
            make()
    pipes: list[Any] = [base, cascade]
    for pipe in pipes:  # they give tensors
        with pytest.raises(TypeError, match="output_type"):
            pipe.stream(PROMPT, output_type="np")


def test_streams_made_beforehand_have_their_own_arguments(base: WaltPipeline) -> None:
    scales = (1.0, 4.0)
    streams = [base.stream(**base_call(5, guidance_scale=scale)) for scale in scales]
    for scale, stream in zip(scales, streams, strict=True):
        made = base(**base_call(5, guidance_scale=scale), output_type="pt").frames
        assert torch.equal(torch.cat(list(stream), dim=1), made)


# -- how chunks see what was before ------------------------------------------------------------------------------------


def test_context_options_change_later_chunks_alone(base: WaltPipeline) -> None:
    def run(**changes: Any) -> Tensor:
        made: Tensor = base(**base_call(53, num_inference_steps=3, **changes), output_type="pt").frames
        return made

    plain = run()
    for change in ({"context_guidance_scale": 2.0}, {"context_noise_level": 300}):
        made = run(**change)
        assert close(made[:, :17], plain[:, :17]) and not close(made[:, 17:], plain[:, 17:], 1e-3)
    anchored = run(anchor_every=2)
    assert close(anchored[:, :29], plain[:, :29]) and not close(anchored[:, 29:], plain[:, 29:], 1e-3)


def test_anchored_chunks_end_on_the_first_frame(base: WaltPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = type(base.transformer).forward

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("frame_mask")
        seen.append(torch.zeros(5) if mask is None else mask[0][0].amin(dim=(1, 2)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(base.transformer), "forward", record)
    base(**base_call(53, anchor_every=2))
    assert [mask.tolist() for mask in seen] == [[0] * 5, [1, 1, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 0, 0, 0]]


def test_context_guidance_is_linear(base: WaltPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the context tells the denoiser nothing, guidance towards it changes nothing."""
    table = base.transformer.state_dict()
    plain = base(**base_call(29), output_type="pt").frames
    assert not close(plain, base(**base_call(29, context_guidance_scale=3.0), output_type="pt").frames, 1e-3)
    forward = type(base.transformer).forward

    def deaf(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "frame_mask": None, "frame_latents": None})

    monkeypatch.setattr(type(base.transformer), "forward", deaf)
    plain = base(**base_call(29), output_type="pt").frames
    assert close(plain, base(**base_call(29, context_guidance_scale=3.0), output_type="pt").frames, 1e-4)
    assert table.keys() == base.transformer.state_dict().keys()


# -- a user's video ----------------------------------------------------------------------------------------------------


def pieces_of(video: Tensor, count: int) -> Iterator[Tensor]:
    yield from video.split(count, dim=1)


@pytest.mark.parametrize(("frames", "size"), [(3, (12, 20)), (20, (16, 16)), (30, (9, 7))])
def test_upscale_any_length_and_size(cascade: WaltCascadePipeline, frames: int, size: tuple[int, int]) -> None:
    video = torch.rand(1, frames, 3, *size, generator=tiny.seeded(3))
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
    made = cascade.upscale(video, PROMPT, scale=2, generator=tiny.seeded(0), **call).frames
    assert made.shape == (1, frames, 3, 2 * size[0], 2 * size[1])
    del call["output_type"]
    stream = cascade.upscale_stream(pieces_of(video, 7), PROMPT, scale=2, generator=tiny.seeded(0), **call)
    assert torch.equal(made, torch.cat(list(stream), dim=1))
    assert cascade.num_timesteps == 0  # pieces may come without end
    list(cascade.upscale_stream(video, PROMPT, scale=2, **call))
    assert cascade.num_timesteps == cascade._step_index == 1 + (frames > 17) + (frames > 29)


def test_given_states_go_to_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call and of a stream alike; the meta device stands in for an accelerator."""
    pipe, video = tiny.super_resolution_pipeline(), torch.rand(1, 1, 3, 16, 16)
    seen: list[Prompt] = []

    def denoised(_: Any, __: Any, prompt: Prompt, **___: Any) -> Iterator[Tensor]:
        seen.append(prompt)
        yield torch.zeros(1, 3, 1, 32, 32)

    monkeypatch.setattr("walt.pipelines.pipeline_walt_super_resolution.denoise_stream", denoised)
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("meta"))
    states, mask = torch.zeros(1, 3, tiny.TEXT_DIM), torch.ones(1, 3)
    told: dict[str, Any] = {
        "prompt_embeds": states,
        "negative_prompt_embeds": states + 1,
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask,
        "guidance_scale": 2.0,
    }
    pipe(video, **told, output_type="pt")
    list(pipe.stream(iter([video]), **told))
    assert len(seen) == 2
    for prompt in seen:
        for given in (prompt.embeds, prompt.mask, prompt.negative_embeds, prompt.negative_mask):
            assert given is not None and given.device.type == "meta"


def test_upscale_chooses_stages_by_size(cascade: WaltCascadePipeline) -> None:
    """Stage 2 is made for 16 x 16 pixels, stage 3 for 32 x 32."""
    chosen = cascade._enlargers
    assert chosen(16, 16, None) == [1, 2] and chosen(12, 20, 2) == [1]
    assert chosen(32, 32, None) == [2] and chosen(200, 200, None) == [2] and chosen(16, 16, 8) == [1, 2, 2]
    video = torch.rand(1, 1, 3, 16, 16, generator=tiny.seeded(3))
    assert cascade.upscale(video, PROMPT, num_inference_steps=1, output_type="pt").frames.shape[-2:] == (64, 64)
    seeds = [tiny.seeded(0), tiny.seeded(1)]
    both = cascade.upscale(
        torch.cat([video, video]), [PROMPT, "a cat"], 2, num_inference_steps=1, generator=seeds, output_type="pt"
    ).frames
    alone = cascade.upscale(video, "a cat", 2, num_inference_steps=1, generator=tiny.seeded(1), output_type="pt").frames
    assert close(both[1:], alone)


def test_enlarging_has_no_seams(cascade: WaltCascadePipeline) -> None:
    """A piece of a stream changes nothing but where later chunks see it: the first chunk is that of the short video."""
    video = torch.rand(1, 29, 3, 16, 16, generator=tiny.seeded(3))
    long = cascade.upscale(video, PROMPT, 2, num_inference_steps=1, generator=tiny.seeded(0), output_type="pt").frames
    short = cascade.upscale(
        video[:, :17], PROMPT, 2, num_inference_steps=1, generator=tiny.seeded(0), output_type="pt"
    ).frames
    assert close(long[:, :17], short)


def test_upscale_refuses(cascade: WaltCascadePipeline) -> None:
    video = torch.rand(1, 1, 3, 16, 16)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (video, {"scale": 3}, "scale must be 2, 4 or a higher power of 2, got 3"),
        (video, {"scale": 1}, "scale must be"),
        (video, {"prompt": None}, "give the prompt of the video"),
        (video, {"prompt": ["a", "b"]}, "2 prompts for 1 videos"),
        (video, {"noise_level": 1000}, "noise_level must be"),
        (video, {"fidelity": 2}, "fidelity must be"),
        (video, {"output_type": "latent"}, "output_type must be one of pil, np, pt here"),
        (iter(()), {}, "at least one frame"),
        (iter([video, video[..., :8]]), {}, "changes its size from 16x16 to 16x8"),
        ("x.mp4", {}, "video must be"),
    ]
    for given, changes, message in cases:
        with pytest.raises(WaltError, match=message):
            cascade.upscale(given, **{"prompt": PROMPT, "num_inference_steps": 1, "output_type": "pt", **changes})
    alone = tiny.quiet(WaltCascadePipeline(**{**cascade.components, "transformer_2": None, "transformer_3": None}))
    with pytest.raises(WaltError, match="no super-resolution stage: a cascade of two or three stages enlarges"):
        alone.upscale(video, PROMPT)
    rigid = tiny.super_resolution_pipeline(frame_conditioning=False)
    with pytest.raises(
        WaltError, match="30 frames needs a transformer with frame_conditioning; this one enlarges up to 17"
    ):
        rigid(video.expand(-1, 30, -1, -1, -1), PROMPT)
    states = rigid.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0]
    with pytest.raises(WaltError, match="a video of more than 17 frames needs a transformer with frame_conditioning"):
        list(rigid.stream(iter([video.expand(-1, 20, -1, -1, -1)]), states, num_inference_steps=1))
    parts = {**cascade.components, "transformer_2": rigid.transformer, "transformer_3": None}
    with pytest.raises(WaltError, match="a video of 20 frames needs stages with frame_conditioning"):
        tiny.quiet(WaltCascadePipeline(**parts)).upscale(
            video.expand(-1, 20, -1, -1, -1), PROMPT, callback_on_step_end=lambda *_: pytest.fail("a stage ran")
        )


# -- memory ------------------------------------------------------------------------------------------------------------

PEAK = """
import json, resource, sys, torch
from pathlib import Path
from tests import tiny
from walt.media import VideoWriter
torch.set_num_threads(1)
pipe = tiny.cascade()
call = dict(stages=2, height=128, width=128, num_inference_steps=1, guidance_scale=1.0)

def run(frames):
    with VideoWriter(Path(sys.argv[1]) / f"{frames}.mp4") as writer:
        for piece in pipe.stream("a cat", num_frames=frames, generator=tiny.seeded(0), **call):
            writer.add((piece[0] * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(json.dumps([run(29), run(485)]))
"""


@pytest.mark.slow
def test_a_minute_takes_the_memory_of_a_short_video(tmp_path: Any) -> None:
    """Peak resident memory of 485 frames, written to a file as they are made, within a tenth of that of 29."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr
    short, long = json.loads(done.stdout.splitlines()[-1])
    assert long < 1.1 * short, (short, long)
    from walt.media import read_video

    assert len(read_video(tmp_path / "485.mp4")[0]) == 485


def test_callbacks_of_all_stages_get_what_was_asked_for(cascade: WaltCascadePipeline) -> None:
    seen: list[tuple[int, list[str]]] = []

    def look(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.current_stage, list(tensors)))
        return {}

    call: dict[str, Any] = {"num_frames": 5, "stages": 2, "num_inference_steps": 1, "generator": tiny.seeded(0)}
    list(
        cascade.stream(PROMPT, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"], **call)
    )
    assert seen == [(1, ["prompt_embeds"]), (2, ["prompt_embeds"])]
