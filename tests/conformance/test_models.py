"""The models behave as diffusers' models do: offloading, casting, caches, adapters, files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from diffusers import (
    AutoModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_layer_skip
from torch import Tensor, nn

import walt
from tests import tiny
from walt.models.transformer_dit import DiTTransformer3DModel
from walt.models.transformer_uvit import UViTTransformer3DModel

SMALL: dict[str, Any] = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": tiny.TEXT_DIM}


def full_attention(cls: type[Any]) -> Any:
    torch.manual_seed(0)
    return tiny.randomize(cls(**SMALL, sample_size=tiny.BASE_LATENT), 0)


MODELS: dict[str, Callable[[], Any]] = {
    "walt": lambda: tiny.transformer(num_layers=4, sigma_data=0.5),
    "walt rope, local mixing": lambda: tiny.transformer(relative_positions="rope", local_mixing=True),
    "super-resolution": lambda: tiny.super_resolution_transformer(sigma_data=0.5),
    "dit": lambda: full_attention(DiTTransformer3DModel),
    "uvit": lambda: full_attention(UViTTransformer3DModel),
    "tokenizer": tiny.vae,
}
CLOCK = [0]  # the timestep, for caches that ask for it


def inputs(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    if not hasattr(model, "transformer_blocks") and not hasattr(model, "time_embedder"):
        return {"sample": torch.rand(1, 3, 5, 16, 16, generator=g).to(dtype) * 2 - 1}
    out: dict[str, Any] = {
        "hidden_states": torch.randn(2, 8, 5, 4, 4, generator=g).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 4, tiny.TEXT_DIM, generator=g).to(dtype),
    }
    if model.config.get("low_res_channels") is not None:
        out["low_res_hidden_states"] = torch.randn(2, 8, 5, 2, 2, generator=g).to(dtype)
        out["low_res_noise_level"] = torch.tensor([30, 30])
    return out


@torch.no_grad()
def run(model: Any) -> Tensor:
    result: Tensor = model(**inputs(model), return_dict=False)[0]
    return result


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield MODELS[request.param]()


def test_what_the_attributes_name_is_there(model: Any) -> None:
    classes = {type(module).__name__ for module in model.modules()}
    # A tokenizer's decoder is of the one kind or the other.
    blocks_of = classes | ({"MixingBlock"} if "ResidualBlock" in classes else set())
    assert set(model._no_split_modules) <= blocks_of and set(model._repeated_blocks or ()) <= classes
    names = [name for name, _ in model.named_modules()]
    for pattern in model._skip_layerwise_casting_patterns:
        known = {"low_res_embed", "noise_level_embedder", "class_embedder", "relative_bias", "pos_embed"}
        assert pattern in known or any(pattern in name for name in names), pattern
    for name in getattr(model, "_group_offload_block_modules", ()):
        assert isinstance(getattr(model, name), nn.Module)
    device_map = infer_auto_device_map(
        model, {0: 40_000, "cpu": 10**9}, no_split_module_classes=model._no_split_modules
    )
    blocks = [name for name, part in model.named_modules() if type(part).__name__ in model._no_split_modules]
    assert blocks and all(not any(at.startswith(f"{name}.") for at in device_map) for name in blocks), "kept whole"


def test_weights_are_only_used_in_calls_of_their_module(model: Any, tmp_path: Path) -> None:
    """Sequential offloading (weights on meta between calls), and groups that come from disk.

    Equal within rounding: layers that are hooked go by torch's own products (walt.linear).
    """
    expected = run(model)
    for kind in ("leaf_level", "block_level"):
        other = type(model).from_config(model.config)
        other.load_state_dict(model.state_dict())
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        other.eval().enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            offload_to_disk_path=str(tmp_path / kind),
            **blocks,
        )
        assert any((tmp_path / kind).iterdir()) and torch.allclose(run(other), expected, atol=1e-5), kind
    cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.allclose(run(model), expected, atol=1e-5)


def test_layerwise_casting(model: Any) -> None:
    expected = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert len(stored) > 5 and not any(
        pattern in name for name in stored for pattern in model._skip_layerwise_casting_patterns
    )
    cast = run(model)
    assert cast.isfinite().all() and 0 < (cast - expected).abs().mean() < 0.3 * expected.std()


def test_files(model: Any, tmp_path: Path) -> None:
    """Shards, variants, half precision, AutoModel, and one file with the folder's config."""
    expected = run(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size, variant="fp16")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    again = AutoModel.from_pretrained(str(tmp_path), variant="fp16")
    assert type(again) is type(model) and torch.equal(run(again), expected)
    half = type(model).from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    out = half(**inputs(half, torch.bfloat16), return_dict=False)[0]
    assert out.dtype == torch.bfloat16 and (out.float() - expected).abs().mean() < 0.1 * expected.std()
    if hasattr(type(model), "from_single_file"):
        model.save_pretrained(tmp_path / "one")
        path = tmp_path / "one" / "diffusion_pytorch_model.safetensors"
        assert torch.equal(run(type(model).from_single_file(str(path), config=str(tmp_path / "one"))), expected)
        assert torch.equal(
            run(type(model).from_single_file(model.state_dict(), config=str(tmp_path / "one"))), expected
        )


@pytest.mark.parametrize("name", ["walt", "dit"])
@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=10.0),
        MagCacheConfig(threshold=10.0, num_inference_steps=4, mag_ratios=torch.ones(4), retention_ratio=0.0),
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: CLOCK[0],
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
        ),
    ],
    ids=lambda config: type(config).__name__,
)
@torch.no_grad()
def test_step_caches(name: str, config: Any) -> None:
    """On they reuse what an earlier step computed; off, and for another context, all is as before."""
    model = MODELS[name]()
    steps = [{**inputs(model), "hidden_states": inputs(model)["hidden_states"] * (1 + 0.2 * i)} for i in range(4)]

    def sample(context: str) -> list[Tensor]:
        out = []
        for i, given in enumerate(steps):
            CLOCK[0] = 999 - 200 * i
            with model.cache_context(context, step_index=i, num_inference_steps=4, timestep=500):
                out.append(model(**given, return_dict=False)[0])
        return out

    expected = sample("pack_0")
    model.enable_cache(config)
    assert model.is_cache_enabled
    cached = sample("pack_0")
    assert torch.equal(cached[0], expected[0]), "the first step has nothing to reuse"
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(cached, expected, strict=True))
    assert all(value.isfinite().all() for value in cached)
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
    assert torch.equal(sample("pack_0")[0], expected[0])
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(sample("pack_0"), expected, strict=True))


@pytest.mark.parametrize("skip", ["skip_attention", "skip_attention_scores", "skip_ff"])
def test_guiders_can_skip_parts_of_a_layer(skip: str) -> None:
    """What skipped-layer and perturbed-attention guidance do."""
    model = tiny.transformer(relative_positions="rope")
    expected = run(model)
    wanted = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False, skip: True}
    apply_layer_skip(model, LayerSkipConfig(indices=[1], **wanted))
    assert not torch.allclose(run(model), expected, atol=1e-5)


def test_attention_backends() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    model = tiny.transformer(relative_positions="rope")
    expected = run(model)
    for name in ("native", "_native_math", "walt_windows", "walt_blocked", "flex"):
        with attention_backend(name):
            assert torch.allclose(run(model), expected, atol=1e-5), name
        model.set_attention_backend(name)
        assert torch.allclose(run(model), expected, atol=1e-5), name
        model.reset_attention_backend()


def test_classes_are_diffusers_attributes() -> None:
    import diffusers
    import diffusers.models
    import diffusers.pipelines

    for module in (diffusers, diffusers.models, diffusers.pipelines):
        assert module.WaltTransformer3DModel is walt.WaltTransformer3DModel
        assert module.WaltPipeline is walt.WaltPipeline
        with pytest.raises(AttributeError):
            _ = module.NoSuchClass
