"""DiT: the published network on shared weights and at its sizes, and packed equals alone in every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_3d_sincos_pos_embed
from torch import Tensor

from walt.configs.zoo import MODELS, PAPER_PARAMETERS
from walt.errors import WaltError
from walt.models.backbone import BACKBONES, backbone
from walt.models.transformer_dit import DiTTransformer3DModel, _grid_place

TINY: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 5,
    "text_dim": 6,
    "sample_size": (3, 4, 8),
    "self_conditioning": True,
    "frame_conditioning": True,
}
SIZES = ((3, 4, 6), (1, 4, 4), (4, 6, 8), (1, 8, 2), (3, 4, 6))


def make(**fields: Any) -> Any:
    """Every weight random, modulation too."""
    torch.manual_seed(0)
    model = DiTTransformer3DModel(**{**TINY, **fields})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(sizes: Any = SIZES) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "hidden_states": [draw(4, *s) for s in sizes],
        "timestep": torch.rand(len(sizes), generator=g) * 999,
        "encoder_hidden_states": [draw(k % 3 + 1, 6) for k in range(len(sizes))],
        "class_labels": torch.arange(len(sizes)) % 6,
        "frame_latents": [draw(4, *s) for s in sizes],
        "frame_mask": [(torch.arange(s[0]) < s[0] // 2).float()[None, :, None, None].expand(1, *s) for s in sizes],
        "self_conditioning": [draw(4, *s) for s in sizes],
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "adaln_zero": {},
    "cross_attention": {"conditioning": "cross_attention", "positions": "spatiotemporal"},
    "in_context": {"conditioning": "in_context", "positions": "2d", "learned_variance": True},
}


def test_diffusers_dit_on_shared_weights() -> None:
    """`DiTTransformer2DModel`, whose blocks each hold a copy of the embedders, and whose output features end in c."""
    torch.manual_seed(0)
    layers, width, p, c = 3, 32, 2, 4
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=c,
        out_channels=2 * c,
        num_layers=layers,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = DiTTransformer3DModel(
        in_channels=c,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        num_classes=10,
        sample_size=(1, 8, 8),
        positions="2d",
        learned_variance=True,
        time_frequency_shift=1,
    )
    source = theirs.state_dict()
    first = "transformer_blocks.0.norm1.emb."
    for i in range(1, layers):
        for name in [name for name in source if name.startswith(first)]:
            source[name.replace("blocks.0", f"blocks.{i}")].copy_(source[name])

    def features_first(x: Tensor) -> Tensor:
        return x.unflatten(0, (p, p, 2 * c)).movedim(2, 0).flatten(0, 2)

    target = {
        "patch_embed.weight": source["pos_embed.proj.weight"].flatten(1),
        "patch_embed.bias": source["pos_embed.proj.bias"],
        "class_embedder.weight": source[first + "class_embedder.embedding_table.weight"],
        "adaln_out.weight": source["proj_out_1.weight"],
        "adaln_out.bias": source["proj_out_1.bias"],
        "proj_out.weight": features_first(source["proj_out_2.weight"]),
        "proj_out.bias": features_first(source["proj_out_2.bias"]),
    }
    target |= {
        name.replace(first + "timestep_embedder", "time_embedder"): value
        for name, value in source.items()
        if name.startswith(first + "timestep_embedder")
    }
    for name, value in source.items():
        if name.startswith("transformer_blocks.") and ".emb." not in name:
            target[name.replace("attn1", "attn").replace("norm1.linear", "adaln")] = value
    ours.load_state_dict(target)
    x, t, y = torch.randn(3, c, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])
    with torch.no_grad():
        expected = theirs(x, t, y).sample
        found = ours(x[:, :, None], t, class_labels=y).sample[:, :, 0]
    assert found.shape == (3, 2 * c, 8, 8) and width == ours.patch_embed.out_features
    assert expected.std() > 1  # it computes something
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("conditioning", ["cross_attention", "in_context"])
def test_other_variants_against_plain_attention(conditioning: str) -> None:
    """One sample, written out with torch's own functions."""
    model = make(conditioning=conditioning, self_conditioning=False, frame_conditioning=False).double().eval()
    state, heads, width = model.state_dict(), 2, 32
    z, t = torch.randn(4, 3, 4, 6).double(), torch.tensor([321.0])
    words, label = torch.randn(4, 6).double(), torch.tensor([2])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), state[name + ".weight"], state[name + ".bias"], eps=1e-6)

    def attend(name: str, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            linear(f"{name}.to_{n}", s).view(len(s), heads, -1).transpose(0, 1)
            for n, s in (("q", x), ("k", y), ("v", y))
        )
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return linear(f"{name}.to_out.0", (weights @ v).transpose(0, 1).flatten(1))

    patches = z.unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5).flatten(0, 2).flatten(1)
    x = linear("patch_embed", patches) + _grid_place((3, 2, 3), width, "factorised", torch.device("cpu"))
    freqs = t.double() * torch.exp(-torch.arange(128).double() / 128 * torch.log(torch.tensor(10000.0).double()))
    time = linear("time_embedder.linear_1", torch.cat([freqs.cos(), freqs.sin()])[None])
    time = linear("time_embedder.linear_2", F.silu(time))
    told = torch.cat([time, state["class_embedder.weight"][label], norm("text_norm", linear("text_embedder", words))])
    if conditioning == "in_context":
        x = torch.cat([told, x])
    for i in range(3):
        block = f"transformer_blocks.{i}"
        y = norm(f"{block}.norm1", x)
        x = x + attend(f"{block}.attn", y, y)
        if conditioning == "cross_attention":
            x = x + attend(f"{block}.cross_attn", norm(f"{block}.norm_cross", x), told)
        hidden = F.gelu(linear(f"{block}.ff.net.0.proj", norm(f"{block}.norm2", x)), approximate="tanh")
        x = x + linear(f"{block}.ff.net.2", hidden)
    out = linear("proj_out", norm("norm_out", x[-18:]))
    expected = out.view(3, 2, 3, 4, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(4, 3, 4, 6)
    found = model([z], t, encoder_hidden_states=[words], class_labels=label).sample[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # sinusoids of time are float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_alone_with_gradients(variant: str) -> None:
    model, arguments = make(**VARIANTS[variant]), inputs()
    packed = model(**arguments).sample
    torch.stack([v.square().sum() for v in packed]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    for i, v in enumerate(packed):
        alone = model(**{name: value[i : i + 1] for name, value in arguments.items()}).sample[0]
        assert alone.shape[0] == (8 if model.config.learned_variance else 4)
        assert (alone - v).abs().max() < 1e-5 * v.abs().max()
        alone.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * max(1.0, float(gradients[name].abs().max())), (
            name
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_checkpointing_and_saving(variant: str, tmp_path: Path) -> None:
    model, arguments = make(**VARIANTS[variant]), inputs(((3, 4, 6),) * 3)
    text = arguments.pop("encoder_hidden_states")
    states = torch.nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=7.0)
    mask = torch.arange(states.shape[1])[None] < torch.tensor([len(t) for t in text])[:, None]
    batch = {name: torch.stack(value) if isinstance(value, list) else value for name, value in arguments.items()}
    out = model(**batch, encoder_hidden_states=states, encoder_attention_mask=mask).sample
    expected = model(**arguments, encoder_hidden_states=text, return_dict=False)[0]
    assert torch.equal(out, torch.stack(expected))
    model.enable_gradient_checkpointing()
    again = model(**arguments, encoder_hidden_states=text).sample
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer3DModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded(**arguments, encoder_hidden_states=text).sample, expected, strict=True)
    )
    model.fuse_qkv_projections()
    fused = model(**arguments, encoder_hidden_states=text).sample
    assert max(float((a - b).abs().max()) for a, b in zip(fused, expected, strict=True)) < 1e-3


def test_positions_are_the_published_tables() -> None:
    cpu = torch.device("cpu")
    expected = get_2d_sincos_pos_embed(32, (4, 6), base_size=4).float()  # rows at their index; columns are rescaled
    square = get_2d_sincos_pos_embed(32, 5, base_size=5).float()
    assert torch.allclose(_grid_place((1, 5, 5), 32, "2d", cpu), square, atol=1e-6)
    assert torch.allclose(_grid_place((1, 4, 6), 32, "2d", cpu)[:, 16:], expected[:, 16:], atol=1e-6)
    video = get_3d_sincos_pos_embed(32, (5, 4), 3).flatten(0, 1).float()
    assert torch.allclose(_grid_place((3, 4, 5), 32, "spatiotemporal", cpu), video, atol=1e-6)
    table = _grid_place((3, 4, 5), 32, "factorised", cpu).view(3, 20, 32)
    assert torch.allclose(table[1] - table[0], (table[1] - table[0])[:1].expand(20, 32), atol=1e-6)
    assert (table[1] - table[0]).abs().max() > 0.5


def test_training_starts_from_nothing_with_shut_gates() -> None:
    model = DiTTransformer3DModel(**TINY)
    model.close_branches()
    assert all(not v.any() for v in model(**inputs()).sample)
    torch.nn.init.normal_(model.proj_out.weight)
    x = inputs()
    a = model(**x).sample
    x["class_labels"] = (x["class_labels"] + 1) % 6
    assert all(torch.equal(v, w) for v, w in zip(a, model(**x).sample, strict=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("dit")])
def test_published_sizes(name: str) -> None:
    with init_empty_weights():
        model = DiTTransformer3DModel(**MODELS[name]())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PAPER_PARAMETERS[name], rel=0.005)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditioning": "adaln"}, "'adaln' given"),
        ({"positions": "learned"}, "positions"),
        ({"num_layers": 0}, "num_layers: 0"),
        ({"attention_head_dim": 9, "positions": "spatiotemporal"}, "width that 16 divides, got 18"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message):
        DiTTransformer3DModel(**{**TINY, **fields})


def test_backbones_by_name() -> None:
    assert backbone("dit") is DiTTransformer3DModel and set(BACKBONES) == {"walt", "dit", "uvit"}
    with pytest.raises(WaltError, match='did you mean "uvit"'):
        backbone("u-vit")
    model = make()
    for name in ("class_labels", "encoder_hidden_states"):
        with pytest.raises(WaltError, match=f"{name}: missing"):
            model(**{k: v for k, v in inputs().items() if k != name})
