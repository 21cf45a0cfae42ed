"""Adapters on pipelines, by diffusers' methods, and those that `walt train` and models write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from tests import tiny
from walt.errors import WaltError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]


def adapt(model: Any, seed: int, rank: int = 2) -> Any:
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False))
    return model


def make(pipe: Any, **changes: Any) -> Tensor:
    call = {"num_inference_steps": 2, "num_frames": 5, "output_type": "pt", "generator": tiny.seeded(0), **changes}
    result: Tensor = pipe("a cat jumps", **call).frames
    return result


def close(a: Tensor, b: Tensor, limit: float = 1e-4) -> bool:
    return bool((a - b).abs().max() < limit)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor, Tensor]:
    """Two adapters of the same base as `walt train` writes them, and the video with each."""
    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("lora")
        pipe = tiny.base_pipeline()
        adapt(pipe.transformer, seed).save_lora_adapter(folder)
        made.append((folder, make(pipe)))
    (one, first), (two, second) = made
    assert not close(first, second, 1e-3)
    return one, two, first, second


def test_mix_switch_and_drop(files: Any) -> None:
    one, two, first, second = files
    pipe = tiny.base_pipeline()
    plain = make(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    assert close(make(pipe), first) and not close(first, plain, 1e-3)
    assert close(make(pipe, attention_kwargs={"scale": 0.0}), plain)
    pipe.load_lora_weights(str(two / "pytorch_lora_weights.safetensors"), adapter_name="two")
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}
    pipe.set_adapters("two")
    assert pipe.get_active_adapters() == ["two"] and close(make(pipe), second)
    pipe.set_adapters(["one", "two"], adapter_weights=[1.0, 0.0])
    assert close(make(pipe), first)
    pipe.disable_lora()
    assert close(make(pipe), plain)
    pipe.enable_lora()
    pipe.delete_adapters("one")
    pipe.set_adapters("two")
    assert close(make(pipe), second)
    pipe.unload_lora_weights()
    assert close(make(pipe), plain) and not hasattr(pipe.transformer, "peft_config")


def test_fused_is_the_same(files: Any) -> None:
    one, _, first, _ = files
    pipe = tiny.base_pipeline()
    plain = make(pipe)
    pipe.load_lora_weights(one)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and close(make(pipe), first)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0 and close(make(pipe), first)
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # what stays is the fused model
    assert close(make(pipe), first) and not any("lora" in name for name in pipe.transformer.state_dict())
    other = tiny.base_pipeline()
    other.load_lora_weights(one)
    other.fuse_lora(lora_scale=0.0)
    assert close(make(other), plain)


def test_hotswap_changes_the_numbers_and_no_module(files: Any) -> None:
    one, two, _, second = files
    pipe = tiny.base_pipeline()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(one, adapter_name="style")
    modules = [id(module) for module in pipe.transformer.modules()]
    pipe.load_lora_weights(two, adapter_name="style", hotswap=True)
    assert close(make(pipe), second) and modules == [id(module) for module in pipe.transformer.modules()]


def test_saved_by_the_pipeline_with_settings(files: Any, tmp_path: Path) -> None:
    one, _, first, _ = files
    pipe = tiny.base_pipeline()
    pipe.load_lora_weights(one, adapter_name="default")
    pipe.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    again = tiny.base_pipeline()
    again.load_lora_weights(tmp_path)
    settings = next(iter(again.transformer.peft_config.values()))
    assert settings.lora_alpha == 4 and settings.r == 2 and close(make(again), first)


def test_stages_of_a_cascade_have_their_own(files: Any, tmp_path: Path) -> None:
    one = files[0]
    pipe = tiny.cascade()
    plain = {stages: make(pipe, stages=stages, num_inference_steps=1) for stages in (1, 2)}
    second = tiny.super_resolution_transformer(4, 2)
    adapt(second, 3).save_lora_adapter(tmp_path)
    pipe.load_lora_weights(tmp_path, component="transformer_2", adapter_name="sharp")
    assert pipe.get_list_adapters() == {"transformer_2": ["sharp"]}
    assert torch.equal(make(pipe, stages=1, num_inference_steps=1), plain[1])
    assert not close(make(pipe, stages=2, num_inference_steps=1), plain[2], 1e-3)
    pipe.load_lora_weights(one, adapter_name="sharp")
    both = make(pipe, stages=2, num_inference_steps=1)
    pipe.save_lora_weights(
        tmp_path / "both",
        get_peft_model_state_dict(pipe.transformer, adapter_name="sharp"),
        transformer_2_lora_layers=get_peft_model_state_dict(pipe.transformer_2, adapter_name="sharp"),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["sharp"].to_dict(),
        transformer_2_lora_adapter_metadata=pipe.transformer_2.peft_config["sharp"].to_dict(),
    )
    other = tiny.cascade()
    other.load_lora_weights(tmp_path / "both")
    assert close(make(other, stages=2, num_inference_steps=1), both)
    other.fuse_lora()
    assert close(make(other, stages=2, num_inference_steps=1), both)


def test_refusals(files: Any) -> None:
    one = files[0]
    pipe = tiny.cascade()
    with pytest.raises(WaltError, match=r"component: 'transfomer_2' given.*did you mean"):
        pipe.load_lora_weights(one, component="transfomer_2")
    pipe.transformer_3 = None
    with pytest.raises(WaltError, match="for transformer_3, which this pipeline has not"):
        pipe.load_lora_weights(one, component="transformer_3")
    with pytest.raises(
        WaltError, match=r"takes the layers of transformer, transformer_2, transformer_3, .*; got vae_lora"
    ):
        pipe.save_lora_weights("nowhere", vae_lora_layers={"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights({"transformer.x.weight": torch.zeros(1)})
