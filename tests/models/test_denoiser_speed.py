"""What makes the denoiser fast changes nothing: caches, chains, backends, quantised weights, offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from walt import embedded_model, fused, linear
from walt.errors import WaltError
from walt.models.transformer_walt import TextCache, WaltAttention, WaltTransformer3DModel
from walt.pipelines.pipeline_walt import WaltPipeline

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "sample_size": (3, 4, 6),
    "spatiotemporal_window": (2, 2),
    "self_conditioning": False,
    "frame_conditioning": False,
    "text_dim": 10,
}


def make(**fields: Any) -> WaltTransformer3DModel:
    torch.manual_seed(0)
    model = WaltTransformer3DModel(**{**TINY, **fields})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(
    sizes: tuple[tuple[int, int, int], ...] = ((3, 4, 6), (1, 4, 4), (3, 4, 6)), seed: int = 0
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": [torch.randn(4, *size, generator=g) for size in sizes],
        "timestep": torch.rand(len(sizes), generator=g) * 999,
        "encoder_hidden_states": [torch.randn(2 + i, 10, generator=g) for i in range(len(sizes))],
    }


def same(a: Any, b: Any, limit: float = 1e-5) -> bool:
    return all(bool((x - y).abs().max() < limit) for x, y in zip(a, b, strict=True))


# -- element-wise chains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 1, 6)])
def test_chains_have_the_gradients_of_their_formulas(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 12, 6, dtype=torch.float64).requires_grad_().unbind()
    scale, shift = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_().unbind()
    spread = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    assert torch.allclose(fused.modulate(x, scale, shift, lengths), x * (1 + scale[spread]) + shift[spread])
    assert torch.allclose(fused.gated_add(x, y, scale, lengths), x + scale[spread] * y)
    assert torch.autograd.gradcheck(lambda a, b, c: fused.modulate(a, b, c, lengths), (x, scale, shift))
    assert torch.autograd.gradcheck(lambda a, b, c: fused.gated_add(a, b, c, lengths), (x, y, scale))
    heads = x.unflatten(1, (1, 6))
    cos, sin = torch.randn(2, 12, 1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: fused.rotate(a, cos, sin), (heads,))
    frames, mixed = torch.randn(2, 2, 3, 2, 1, 4, dtype=torch.float64).requires_grad_().unbind()
    time = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fused.add_frames, (mixed, frames, time))


@pytest.mark.parametrize("lengths", [(16, 48, 32), (16, 30, 2)])
def test_compiled_chains_spread_by_index(lengths: tuple[int, ...]) -> None:
    """With and without steps of equal samples; in bfloat16 the gradients of the vectors are summed in float32."""
    torch.manual_seed(0)
    x, y = torch.randn(2, sum(lengths), 6, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, 6, dtype=torch.float64)
    index = fused.sample_index(lengths)
    assert (index.ndim == 2) == (lengths == (16, 48, 32))

    def chains(index: Tensor | None, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return fused.gated_add(x, fused.modulate(y, scale, shift, lengths, index), shift, lengths, index)

    compiled = torch.compile(chains, backend="aot_eager", fullgraph=True)
    for dtype, most in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        results = []
        for call, own, samples in ((chains, torch.float64, None), (compiled, dtype, index)):
            given = [z.to(dtype).to(own).requires_grad_() for z in (x, y, scale, shift)]
            out = call(samples, *given)
            assert out.dtype == own
            results.append([out, *torch.autograd.grad(out.sum(), given)])
        for exact, found in zip(*results, strict=True):
            assert float((found.double() - exact).norm() / exact.norm()) < most
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_gelu_is_the_tanh_form(dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's in float64; `most` is relative to the value where that is above 1."""
    monkeypatch.setattr(linear, "_CHUNK", 500)
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, 1e4, -1e4])]).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, expected = linear.gelu(x), torch.nn.functional.gelu(exact, approximate="tanh")
    assert ((out - expected).abs() / expected.abs().clamp(min=1)).max() < most
    ours, theirs = (torch.autograd.grad(y.sum(), z)[0] for y, z in ((out, x), (expected, exact)))
    assert ours.dtype == dtype and (ours - theirs).abs().max() < most
    columns = x[:2000].detach().view(40, 50).t()  # not contiguous
    assert torch.equal(linear.gelu(columns), linear.gelu(columns.contiguous()))


SAVED: dict[str, tuple[dict[str, Any], list[float], float]] = {  # computed before the chains were rewritten
    "base": (
        {
            "text_dim": 10,
            "relative_positions": "rope",
            "spatiotemporal_window": None,
            "pooled_text": True,
            "local_mixing": True,
            "sigma_data": 0.1,
        },
        [-0.626883, -1.796463, 0.252863, 0.351949, -2.138022, -3.992818],
        7.825466,
    ),
    "super-resolution": (
        {
            "absolute_positions": False,
            "relative_positions": "rope",
            "spatial_window": (2, 3),
            "spatiotemporal_window": (2, 2),
            "self_conditioning": False,
            "low_res_channels": 4,
            "local_mixing": True,
            "sigma_data": 0.4,
        },
        [-1.88289, -1.867346, 0.107099, 1.751275, 3.004992, 0.36704],
        3.042963,
    ),
    "paper": (
        {"text_dim": 10, "num_classes": 3, "low_res_channels": 4},
        [0.414169, 0.651334, 1.128503, 0.373962, 1.030976, -0.870296],
        0.579533,
    ),
}


@pytest.mark.parametrize("kind", SAVED)
def test_outputs_are_those_of_before(kind: str) -> None:
    from tests.models import test_transformer_walt as base

    fields, values, power = SAVED[kind]
    model = base.make(**fields)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    with torch.no_grad():
        flat = torch.cat([v.flatten() for v in model(**base.inputs(model)).sample])
    assert torch.allclose(flat[:: len(flat) // 6][:6], torch.tensor(values), rtol=1e-4, atol=1e-5)
    assert float(flat.square().mean()) == pytest.approx(power, rel=1e-4)


# -- text once per run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"relative_positions": "rope", "pooled_text": True}])
def test_text_is_projected_once(fields: dict[str, Any]) -> None:
    model = make(**fields)
    given, cache, rows = inputs(), TextCache(), []
    layer: Any = model.transformer_blocks[1].cross_attn
    layer.to_v.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        expected = model(**given).sample
        assert same(model(**given, text_cache=cache).sample, expected)
        first = list(rows)
        del rows[:]
        other = {**given, "encoder_hidden_states": [torch.zeros(1, 10)] * 3}  # not looked at any more
        assert same(model(**other, text_cache=cache).sample, expected)
    assert 9 in first  # the 2 + 3 + 4 states of the text, the first time
    assert 9 not in rows and rows  # and never again


def test_text_cache_errors() -> None:
    model, cache = make(), TextCache()
    with pytest.raises(WaltError, match="text_cache: given with gradients enabled"):
        model(**inputs(), text_cache=cache)
    with torch.no_grad():
        model(**inputs(), text_cache=cache)
        with pytest.raises(WaltError, match="text_cache: holds the text of 3 samples, 1 latents given"):
            model(**inputs(((3, 4, 6),)), text_cache=cache)


@pytest.fixture(scope="module")
def pipe() -> WaltPipeline:
    return tiny.base_pipeline()


def sample(pipe: WaltPipeline, steps: int = 3, **changes: Any) -> Tensor:
    given = {"num_frames": 5, "num_inference_steps": steps, "output_type": "latent", "generator": tiny.seeded(0)}
    result: Tensor = pipe("a rocket flies up", **{**given, **changes}).frames
    return result


def calls(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_a_run_projects_each_text_once_over_steps_and_chunks(pipe: WaltPipeline) -> None:
    cross = pipe.transformer.transformer_blocks[0].cross_attn
    rows: list[int] = []
    hook = cross.to_k.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    sample(pipe, num_frames=29, guidance_scale=2.0)
    hook.remove()
    tokens = max(rows)
    assert len([n for n in rows if n < tokens]) == 1 and rows.count(tokens) == 6  # 3 steps of 2 chunks


# -- step caches, quantised weights, offloading ------------------------------------------------------------------------


def step_caches() -> dict[str, Any]:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    return {
        "first block": FirstBlockCacheConfig(threshold=1e6),
        "mag": MagCacheConfig(
            threshold=10.0, max_skip_steps=2, retention_ratio=0.1, num_inference_steps=8, mag_ratios=[1.0] * 8
        ),
        "taylor": TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32
        ),
    }


@pytest.mark.parametrize("name", ["first block", "mag", "taylor"])
def test_step_caches_skip_work_and_leave_no_trace(name: str) -> None:
    pipe = tiny.base_pipeline()
    exact = sample(pipe, 8)
    last = pipe.transformer.transformer_blocks[-1].attn.to_out[0]
    seen = calls(last)
    pipe.transformer.enable_cache(step_caches()[name])
    cached, count = sample(pipe, 8), len(seen)
    assert 0 < count < 8
    assert cached.isfinite().all() and not torch.equal(cached, exact)
    assert torch.equal(sample(pipe, 8), cached)  # the second run starts anew
    pipe.transformer.disable_cache()
    assert same(sample(pipe, 8), exact)


def test_first_block_cache_of_threshold_zero_is_exact() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.base_pipeline()
    exact = sample(pipe, 4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert same(sample(pipe, 4), exact)


def test_bfloat16_and_int8_weights(pipe: WaltPipeline) -> None:
    model = make()
    with torch.no_grad():
        exact = torch.cat([v.flatten() for v in model(**inputs()).sample])
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        eight = torch.cat([v.flatten() for v in quantized(**inputs()).sample])
        model.bfloat16()
        given = inputs()
        given["hidden_states"] = [z.bfloat16() for z in given["hidden_states"]]
        half = torch.cat([v.flatten() for v in model(**given).sample])
    assert half.dtype == torch.bfloat16
    for other in (half.float(), eight):
        assert 0 < float((other - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(level: str, tmp_path: Path) -> None:
    pipe = tiny.base_pipeline()
    exact = sample(pipe)
    device = torch.device("cpu")
    options: dict[str, Any] = {"num_blocks_per_group": 1} if level == "block_level" else {}
    # From disk: on this device a group that is not loaded has no weights at all.
    pipe.transformer.enable_group_offload(
        device, device, offload_type=level, offload_to_disk_path=str(tmp_path), **options
    )
    assert same(sample(pipe), exact)


def test_attention_backends_by_model_and_by_context() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    model = make(relative_positions="rope")
    with torch.no_grad():
        exact = model(**inputs()).sample
        with attention_backend("walt_blocked"):
            assert same(model(**inputs()).sample, exact)
        model.set_attention_backend("walt_blocked")
        assert {m.processor._attention_backend for m in model.modules() if isinstance(m, WaltAttention)} == {
            "walt_blocked"
        }
        assert same(model(**inputs()).sample, exact)
        model.reset_attention_backend()
    biased = make()
    with torch.no_grad(), attention_backend("flex"), pytest.raises(WaltError, match="'flex' takes no bias"):
        biased(**inputs())


def test_checkpointing_holds_less_activation_memory() -> None:
    """Bytes that autograd saves between forward and backward."""

    def saved(on: bool) -> int:
        model = make(num_layers=8)
        if on:
            model.enable_gradient_checkpointing()
        storages: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(**inputs()).sample[0].sum()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in storages.items() if place not in weights)

    assert saved(True) < 0.4 * saved(False)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_new_packs_do_not_recompile_and_equal_eager() -> None:
    from torch._dynamo.utils import counters

    packs = [
        ((3, 4, 6), (1, 4, 4), (3, 4, 6)),
        ((2, 6, 4), (1, 4, 6)),
        ((3, 6, 6), (1, 2, 4), (2, 4, 4), (1, 6, 6)),
        ((4, 4, 4), (1, 4, 6), (1, 4, 6)),
        ((2, 4, 2), (3, 2, 6), (1, 4, 2), (1, 2, 2), (2, 4, 4)),
    ]

    def gradients(model: WaltTransformer3DModel, sizes: Any, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        out = model(**inputs(sizes, seed)).sample
        torch.stack([v.square().mean() for v in out]).sum().backward()
        return list(out), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = make(relative_positions="rope", absolute_positions=False, num_layers=2)
    model = make(relative_positions="rope", absolute_positions=False, num_layers=2)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    graphs = []
    for seed, sizes in enumerate(packs):
        expected, theirs = gradients(plain, sizes, seed)
        found, ours = gradients(model, sizes, seed)
        assert same(expected, found, 1e-4)
        assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(theirs, ours, strict=True))
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    # The first packs make sizes dynamic, and plans with and without an order or lone tokens are graphs of their own;
    # after that no pack compiles anything.
    assert graphs[2] == graphs[-1] <= 8
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "backend"),
    [
        ({"relative_positions": "bias"}, "aot_eager"),
        ({"relative_positions": "rope", "local_mixing": True}, "aot_eager"),
        ({"relative_positions": "bias", "local_mixing": True}, "aot_eager"),
        ({"relative_positions": "rope", "local_mixing": True}, "inductor"),
    ],
)
def test_a_training_step_compiles_whole_whatever_the_layers_hold(fields: dict[str, Any], backend: str) -> None:
    """Bias and local mixing are traced: no graph breaks, and the gradients of the eager step, packs of images too."""
    from torch._dynamo.utils import counters

    fields = {"absolute_positions": False, "num_layers": 2, **fields}
    plain, model = make(**fields), make(**fields)
    model.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for seed, sizes in enumerate((((3, 4, 6), (1, 4, 4)), ((1, 4, 6), (1, 4, 4)))[: 1 if backend == "inductor" else 2]):
        steps = []
        for one in (plain, model):
            one.zero_grad()
            out = one(**inputs(sizes, seed)).sample
            torch.stack([v.square().mean() for v in out]).sum().backward()
            steps.append((list(out), {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}))
        (expected, theirs), (found, ours) = steps
        assert same(expected, found, 1e-4)
        assert theirs.keys() == ours.keys()
        assert all(torch.allclose(theirs[n], ours[n], atol=1e-3, rtol=1e-3) for n in theirs)
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "transformer_3"])
def test_a_step_of_the_embedded_stages_in_bfloat16(part: str) -> None:
    """What `walt sample` computes where the processor has bfloat16: within the rounding of a few layers of float32."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = WaltTransformer3DModel.from_pretrained(embedded_model(), subfolder=part, torch_dtype=dtype)
        g = torch.Generator().manual_seed(0)
        given: dict[str, Any] = {
            "hidden_states": torch.randn(1, 8, 3, 16, 28, generator=g).to(dtype),
            "timestep": torch.tensor([600]),
        }
        if model.config.text_dim is not None:
            given["encoder_hidden_states"] = torch.randn(1, 12, model.config.text_dim, generator=g).to(dtype)
        if model.config.low_res_channels is not None:
            scale = model.config.low_res_scale
            small = torch.randn(1, model.config.low_res_channels, 3, 16 // scale, 28 // scale, generator=g)
            given |= {"low_res_hidden_states": small.to(dtype), "low_res_noise_level": torch.tensor([100])}
        with torch.no_grad():
            results.append(model(**given).sample.float())
    exact, half = results
    assert 0 < float((half - exact).norm() / exact.norm()) < 0.03
    assert float((half - exact).abs().max()) < 0.1 * float(exact.abs().max())
