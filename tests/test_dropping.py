"""Token dropping: windows lose what was dropped and nothing else, and packed is still alone."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from walt.attention import WindowPlan, plan_windows
from walt.data.packing import draw_kept
from walt.dropping import drop_from_plan, kept_tokens
from walt.errors import WaltError
from walt.models.transformer_dit import DiTTransformer3DModel
from walt.models.transformer_uvit import UViTTransformer3DModel
from walt.models.transformer_walt import WaltTransformer3DModel

GRIDS = ((3, 4, 6), (1, 4, 4), (2, 5, 3), (1, 8, 2))
CPU = torch.device("cpu")


def arbitrary(grids: Any, seed: int = 0) -> list[Tensor | None]:
    """Any tokens at all, not tubes; the second sample keeps everything."""
    g = torch.Generator().manual_seed(seed)
    masks: list[Tensor | None] = [torch.rand(grid, generator=g) < 0.6 for grid in grids]
    masks[1] = None
    return masks


def partners(plan: WindowPlan) -> tuple[Tensor, Tensor]:
    """Who attends to whom, `(tokens, tokens)` bool, and the offset of each pair (-1 without)."""
    who = torch.eye(plan.tokens, dtype=torch.bool)
    offset = torch.full((plan.tokens, plan.tokens), -1)
    order = torch.arange(plan.tokens) if plan.order is None else plan.order
    for i, group in enumerate(plan.groups):
        for window in order[group.start :][: group.windows * group.length].view(group.windows, group.length):
            who[window[:, None], window[None]] = True
            if plan.offsets:
                offset[window[:, None], window[None]] = plan.offsets[i].view(group.length, -1).long()
    return who, offset


@pytest.mark.parametrize("by_shape", [False, True])
@pytest.mark.parametrize(
    ("window", "shift", "identity"),
    [((1, None, None), (0, 0, 0), False), ((None, 2, 3), (0, 1, 1), True), ((2, 3, 2), (1, 0, 0), False)],
)
def test_the_plan_of_kept_tokens_is_the_whole_plan_without_the_others(
    window: Any, shift: Any, identity: bool, by_shape: bool
) -> None:
    whole = plan_windows(GRIDS, window, shift, identity_images=identity, by_shape=by_shape)
    kept = kept_tokens(GRIDS, arbitrary(GRIDS), CPU)
    assert kept is not None
    plan = drop_from_plan(whole, kept.mask, CPU)
    assert plan.tokens == int(kept.mask.sum()) == sum(kept.lengths)
    if plan.order is not None and plan.inverse is not None:
        assert torch.equal(plan.order[plan.inverse], torch.arange(plan.tokens))
    who, offset = partners(plan)
    all_who, all_offset = partners(whole)
    assert torch.equal(who, all_who[kept.index][:, kept.index])
    lone = who.sum(1) == 1
    if by_shape:
        rest = ~lone
        assert torch.equal(offset[rest][:, rest], all_offset[kept.index[rest]][:, kept.index[rest]])
    assert plan.singles == int(lone.sum())


def test_windows_keep_the_text_of_their_sample() -> None:
    texts = (3, 0, 2, 5)
    whole = plan_windows(GRIDS, (1, 2, 3), contexts=texts)
    kept = kept_tokens(GRIDS, arbitrary(GRIDS), CPU)
    assert kept is not None
    plan = drop_from_plan(whole, kept.mask, CPU)
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(kept.lengths))
    rows = torch.arange(sum(texts)).split(list(texts))
    assert plan.order is not None and plan.context_index is not None
    seen = 0
    for group in plan.groups:
        windows = plan.order[group.start :][: group.windows * group.length].view(group.windows, -1)
        text = plan.context_index[group.context_start :][: group.windows * group.context_length]
        for window, states in zip(windows, text.view(group.windows, -1), strict=True):
            owner = sample[window].unique()
            assert len(owner) == 1 and torch.equal(states, rows[int(owner)])
            seen += 1
    assert seen > 20


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bias": (WaltTransformer3DModel, {"spatiotemporal_window": (2, 2), "text_dim": 6}),
    "rope, small windows": (
        WaltTransformer3DModel,
        {"relative_positions": "rope", "spatial_window": (3, 3), "spatiotemporal_window": (2, 3, 2), "text_dim": 6},
    ),
    "local mixing, preconditioned": (WaltTransformer3DModel, {"local_mixing": True, "sigma_data": 0.5}),
    "dit": (DiTTransformer3DModel, {"patch_size": 1, "text_dim": 6}),
    "dit in context": (DiTTransformer3DModel, {"patch_size": 1, "conditioning": "in_context", "text_dim": 6}),
    "dit cross": (DiTTransformer3DModel, {"patch_size": 1, "conditioning": "cross_attention", "text_dim": 6}),
    "uvit": (UViTTransformer3DModel, {"patch_size": 1, "final_conv": False, "text_dim": 6}),
}


def make(name: str) -> tuple[Any, dict[str, Any], list[Tensor | None]]:
    cls, fields = MODELS[name]
    torch.manual_seed(0)
    model = cls(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "sample_size": (3, 4, 6),
            **fields,
        }
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    arguments: dict[str, Any] = {
        "hidden_states": [torch.randn(4, *grid) for grid in GRIDS],
        "timestep": torch.rand(len(GRIDS)) * 999,
    }
    if model.config.text_dim:
        arguments["encoder_hidden_states"] = [torch.randn(n, 6) for n in (3, 1, 2, 4)]
    return model.double(), arguments, arbitrary(GRIDS, 3)


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: [z.double() for z in v] if isinstance(v, list) else v for name, v in arguments.items()}


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_alone_and_dropped_tokens_have_no_part(name: str) -> None:
    model, arguments, kept = make(name)
    arguments = double(arguments)
    noisy = [z.requires_grad_() for z in arguments["hidden_states"]]
    packed = model(**arguments, kept=kept).sample
    for i, mask in enumerate(kept):
        alone = model(**{k: v[i : i + 1] for k, v in arguments.items()}, kept=kept[i : i + 1]).sample[0]
        assert (alone - packed[i]).abs().max() < 1e-10
        if mask is None:
            continue
        if not getattr(model.config, "sigma_data", None):
            assert not packed[i][:, ~mask].any()
        grads = torch.autograd.grad(packed[i][:, mask].square().sum(), noisy, retain_graph=True, allow_unused=True)
        grad = grads[i]
        assert grad is not None and not grad[:, ~mask].any() and bool((grad[:, mask] != 0).all())
        assert all(g is None or not g.any() for j, g in enumerate(grads) if j != i)
    model(**arguments, kept=kept).sample[0].sum().backward()
    with torch.no_grad():
        whole = model(**arguments).sample
    everything = [torch.ones(grid, dtype=torch.bool) for grid in GRIDS]
    with torch.no_grad():
        same = model(**arguments, kept=everything).sample
    assert max(float((a - b).abs().max()) for a, b in zip(whole, same, strict=True)) < 1e-10
    assert (whole[0] - packed[0])[:, kept[0]].abs().max() > 1e-4  # what was dropped is missed


def test_tubes_keep_whole_frame_windows_in_one_call() -> None:
    grids = ((5, 6, 6),) * 4
    rng = np.random.default_rng(0)
    kept = kept_tokens(grids, [draw_kept(grid, 0.5, rng) for grid in grids], CPU)
    assert kept is not None and kept.lengths == (90,) * 4
    assert len(drop_from_plan(plan_windows(grids, (1, None, None)), kept.mask, CPU).groups) == 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([None], "1 samples given for 2"),
        ([torch.ones(1, 2, 2), None], "bool"),
        ([torch.ones(1, 2, 3, dtype=torch.bool), None], r"\(1, 2, 3\)"),
        ([None, torch.zeros(1, 2, 2, dtype=torch.bool)], "sample 1 keeps no token"),
    ],
)
def test_bad_masks(kept: Any, message: str) -> None:
    with pytest.raises(WaltError, match=message):
        kept_tokens(((1, 2, 2), (1, 2, 2)), kept, CPU)


def test_compiled_blocks_find_the_plan_in_the_backward_pass() -> None:
    """The plan of dropped tokens is in no cache, and the forward pass has let go of it by then."""
    model: Any = tiny.transformer(relative_positions="rope").train().requires_grad_(True)
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    text = [torch.randn(3, tiny.TEXT_DIM, generator=torch.Generator().manual_seed(1))]
    noisy = [torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(2))]
    gradients = []
    for compiled in (False, True):
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager")
        model.zero_grad()
        out = model(noisy, torch.tensor([500]), text, kept=[mask]).sample[0]
        gc.collect()
        out.square().sum().backward()
        gradients.append(model.transformer_blocks[0].attn.to_q.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5) and bool(gradients[0].any())
