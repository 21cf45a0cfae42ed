"""Guidance schedules and thresholds in the pipelines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from walt.errors import WaltError


def test_guidance_options_of_a_pipeline() -> None:
    """Oscillating guidance is a call whose scale a callback changes; its unguided steps compute half the samples."""
    pipe = tiny.base_pipeline()
    call: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 7.0, "output_type": "pt", "num_frames": 5}
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])) if args else None)
    pipe.set_guidance(schedule="oscillating", hold=2)
    oscillating = pipe("a rocket", generator=tiny.seeded(0), **call).frames
    hook.remove()
    assert rows == [2, 2, 1, 2, 1, 2]

    def by_hand(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 7.0 if step + 1 < 2 or (step + 1 - 2) % 2 else 1.0
        return {}

    pipe.set_guidance()
    expected = pipe("a rocket", generator=tiny.seeded(0), callback_on_step_end=by_hand, **call).frames
    torch.testing.assert_close(oscillating, expected, rtol=0, atol=1e-5)
    plain = pipe("a rocket", generator=tiny.seeded(0), **call).frames
    assert not torch.allclose(oscillating, plain, atol=1e-3)
    with pytest.raises(WaltError, match=r'set_guidance has no "powr" \(did you mean "power"\?\)'):
        pipe.set_guidance(powr=3)


def test_steps_outside_of_the_guided_part_compute_no_second_branch() -> None:
    """And are those of a call whose scale a callback sets to 1 there."""
    pipe = tiny.base_pipeline()
    call: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 7.0, "output_type": "pt", "num_frames": 5}
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])) if args else None)
    pipe.set_guidance(start=0.2, stop=0.7)
    part = pipe("a rocket", generator=tiny.seeded(0), **call).frames
    hook.remove()
    ways = [1 - float(t) / 999 for t in pipe.scheduler.timesteps]
    assert rows == [2 if 0.2 <= way < 0.7 else 1 for way in ways] and 1 < sum(rows) - 5 < 4

    def by_hand(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 7.0 if step + 1 < 5 and rows[step + 1] == 2 else 1.0
        return {}

    pipe.set_guidance(start=0.2)  # the first step is not guided, the callback decides about the others
    expected = pipe("a rocket", generator=tiny.seeded(0), callback_on_step_end=by_hand, **call).frames
    torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_a_model_may_say_where_its_base_is_guided(tmp_path: Path) -> None:
    """As if asked for, but for the base alone; what a caller asks for comes first, and it is saved with the model."""
    part = {"base_guidance_start": 0.2, "base_guidance_stop": 0.7}
    call: dict[str, Any] = {"num_frames": 5, "num_inference_steps": [5, 2], "guidance_scale": 7.0, "stages": 2}
    rows: dict[str, list[int]] = {}

    def made(pipe: Any, name: str, **guidance: float) -> torch.Tensor:
        seen: list[int] = []
        hooks = [
            model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])) if args else None)
            for model in (pipe.transformer, pipe.transformer_2)
        ]
        pipe.set_guidance(**guidance)
        frames: torch.Tensor = pipe("a rocket", generator=tiny.seeded(0), output_type="pt", **call).frames
        for hook in hooks:
            hook.remove()
        rows[name] = seen
        return frames

    pipe = tiny.cascade(**part)
    default = made(pipe, "default")
    asked = made(tiny.cascade(), "asked", start=0.2, stop=0.7)
    whole = made(pipe, "whole", start=0.0)
    plain = made(tiny.cascade(), "plain")
    assert rows["default"] == [*rows["asked"][:5], 2, 2] and 1 < sum(rows["asked"][:5]) - 5 < 4
    assert rows["whole"] == rows["plain"] == [2] * 7
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-5)
    assert not torch.allclose(default, plain, atol=1e-3) and not torch.allclose(default, asked, atol=1e-3)
    assert pipe.base_guidance_options.part == (0.0, 1.0)  # as was asked for last
    pipe.save_pretrained(tmp_path)
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert again.base_guidance_options.part == (0.2, 0.7) and again.guidance_options.part == (0.0, 1.0)
    torch.testing.assert_close(made(again, "again"), default, rtol=0, atol=1e-5)
    for start, stop in ((0.7, 0.2), ("0.2", 1.0), (None, 1.0), (False, True), (0.5, 0.5), (math.nan, 1.0)):
        with pytest.raises(WaltError, match="base_guidance_start and base_guidance_stop must lie between 0 and 1"):
            tiny.cascade(base_guidance_start=start, base_guidance_stop=stop)


def test_thresholds_bound_the_latents_of_every_stage() -> None:
    pipe = tiny.cascade()
    call: dict[str, Any] = {"num_frames": 5, "output_type": "latent", "guidance_scale": 8.0, "stages": 2}
    free = pipe("a rocket", generator=tiny.seeded(0), **call).frames
    pipe.set_guidance(threshold=0.4)
    bounded = pipe("a rocket", generator=tiny.seeded(0), **call).frames
    # The last step of a zero-SNR schedule gives its predicted clean latents, but for the noise that is left (sigma 0.01).
    assert float(free.abs().max()) > 0.6 and float(bounded.abs().max()) < 0.45
