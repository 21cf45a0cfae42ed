"""The modular blocks make what WaltPipeline makes, and take diffusers' guiders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ModularPipeline, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from torch import Tensor

from tests import tiny
from walt.errors import WaltError
from walt.pipelines.modular_walt import WaltBlocks, WaltModularPipeline

CALL: dict[str, Any] = {
    "prompt": ["a cat", "a rocket flies up on the purple background"],
    "negative_prompt": "a dog",
    "num_frames": 5,
    "num_inference_steps": 3,
    "output_type": "pt",
    "num_videos_per_prompt": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modular") / "model"
    tiny.base_pipeline(relative_positions="rope").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    """From the folder of an ordinary pipeline."""
    made = ModularPipeline.from_pretrained(str(folder))
    assert type(made) is WaltModularPipeline and type(made.blocks) is WaltBlocks
    made.load_components()
    return tiny.quiet(made)


def make(pipe: Any, **changes: Any) -> Tensor:
    generators = [tiny.seeded(i) for i in range(4)]
    result: Tensor = pipe(**{**CALL, "generator": generators, **changes}, output="videos")
    return result


def test_same_as_the_pipeline(pipe: Any) -> None:
    ordinary = tiny.base_pipeline(relative_positions="rope")
    expected = ordinary(**CALL, generator=[tiny.seeded(i) for i in range(4)], guidance_scale=6.0).frames
    made = make(pipe)
    assert made.shape == (4, 5, 3, 16, 16) and (made - expected).abs().max() < 1e-4
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    plain = ordinary(**CALL, generator=[tiny.seeded(i) for i in range(4)], guidance_scale=1.0).frames
    assert (make(pipe) - plain).abs().max() < 1e-4
    assert make(pipe, output_type="latent").shape == (4, 8, 2, 2, 2)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=6.0))


def test_other_guiders(pipe: Any) -> None:
    expected = make(pipe)
    skip = LayerSkipConfig(indices=[1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    always = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    guiders = [
        AdaptiveProjectedGuidance(guidance_scale=6.0, eta=0.0),
        SkipLayerGuidance(guidance_scale=6.0, skip_layer_config=[skip], **always),
    ]
    for guider in guiders:
        pipe.update_components(guider=guider)
        made = make(pipe)
        assert made.isfinite().all() and not torch.allclose(made, expected, atol=1e-4), type(guider).__name__
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=6.0))
    assert torch.allclose(make(pipe), expected, atol=1e-6), "a guider leaves the model as it was"


def test_blocks_alone_and_refusals(pipe: Any, folder: Path) -> None:
    own = tiny.quiet(WaltBlocks().init_pipeline(str(folder)))
    own.load_components()
    assert torch.equal(make(own), make(pipe))
    with pytest.raises(WaltError, match="num_frames=29 takes several chunks: use WaltPipeline"):
        make(pipe, num_frames=29)
    with pytest.raises(WaltError, match="height=20 does not fit"):
        make(pipe, height=20)
    with pytest.raises(WaltError, match="num_inference_steps must be an integer from 1 to 1000, got 0"):
        make(pipe, num_inference_steps=0)
    with pytest.raises(WaltError, match="2 negative prompts for 1 prompts"):
        make(pipe, prompt="a", negative_prompt=["a", "b"])
    with pytest.raises(WaltError, match=r"latents must have the shape \(4, 8, 2, 2, 2\)"):
        make(pipe, latents=torch.zeros(1))
