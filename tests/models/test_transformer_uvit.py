"""U-ViT: the published network written out again, its sizes, and packed equals alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn

from walt.configs.zoo import MODELS, PAPER_PARAMETERS
from walt.errors import WaltError
from walt.models.transformer_uvit import UViTTransformer3DModel

TINY: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_classes": 5,
    "text_dim": 6,
    "text_length": 4,
    "sample_size": (3, 4, 6),
    "self_conditioning": True,
    "frame_conditioning": True,
}
SIZES = ((3, 4, 6), (1, 4, 4), (4, 6, 8), (1, 8, 2), (2, 4, 6), (3, 4, 6))


def make(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = UViTTransformer3DModel(**{**TINY, **fields})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
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


class NaiveUViT(nn.Module):
    """U-ViT for images of one size, written independently from the paper: dense batches, torch's own attention."""

    def __init__(self, c: int, p: int, d: int, depth: int, heads: int, classes: int, side: int, words: int) -> None:
        super().__init__()
        self.p, self.heads, self.d, self.classes = p, heads, d, classes
        self.embed = nn.Conv2d(c, d, p, stride=p)
        self.label = nn.Embedding(classes + 1, d)
        self.context = nn.Linear(words, d)
        self.positions = nn.Parameter(torch.randn(1, 2 + 3 + (side // p) ** 2, d))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d),
                    "qkv": nn.Linear(d, 3 * d, bias=False),
                    "proj": nn.Linear(d, d),
                    "norm2": nn.LayerNorm(d),
                    "fc1": nn.Linear(d, 4 * d),
                    "fc2": nn.Linear(4 * d, d),
                    **({"skip": nn.Linear(2 * d, d)} if i > depth // 2 else {}),
                }
            )
            for i in range(depth + 1)
        )
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(d, p * p * c)
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor, y: Tensor, words: Tensor) -> Tensor:
        b, c, side, _ = z.shape
        x = self.embed(z).flatten(2).transpose(1, 2)
        half = self.d // 2
        angles = t[:, None] * torch.exp(-torch.arange(half) / half * torch.log(torch.tensor(10000.0)))
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        x = torch.cat([time[:, None], self.label(y)[:, None], self.context(words), x], dim=1) + self.positions
        kept: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.ModuleDict)
            if i > len(self.layers) // 2:
                x = layer["skip"](torch.cat([x, kept.pop()], dim=-1))
            q, k, v = (
                layer["qkv"](layer["norm1"](x)).view(b, -1, 3, self.heads, self.d // self.heads).permute(2, 0, 3, 1, 4)
            )
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
            x = x + layer["proj"]((weights @ v).transpose(1, 2).flatten(2))
            x = x + layer["fc2"](F.gelu(layer["fc1"](layer["norm2"](x))))
            if i < len(self.layers) // 2:
                kept.append(x)
        x = self.out(self.norm(x))[:, 2 + words.shape[1] :]
        n = side // self.p
        x = x.view(b, n, n, self.p, self.p, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, side, side)
        return self.conv(x)


def test_a_naive_u_vit_on_shared_weights() -> None:
    torch.manual_seed(0)
    naive = NaiveUViT(c=4, p=2, d=24, depth=4, heads=2, classes=5, side=8, words=6)
    for parameter in naive.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = UViTTransformer3DModel(
        **{**TINY, "sample_size": (1, 8, 8), "text_length": 3, "self_conditioning": False, "frame_conditioning": False}
    )
    state = naive.state_dict()
    target = {
        "pos_embed": state["positions"][0],
        "patch_embed.weight": state["embed.weight"].flatten(1),
        "patch_embed.bias": state["embed.bias"],
        "class_embedder.weight": state["label.weight"],
        "text_embedder.weight": state["context.weight"],
        "text_embedder.bias": state["context.bias"],
        # Features of a patch: theirs (row, column, channel), walt's (channel, row, column).
        "proj_out.weight": state["out.weight"].unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1),
        "proj_out.bias": state["out.bias"].unflatten(0, (4, 4)).transpose(0, 1).flatten(),
        "norm_out.weight": state["norm.weight"],
        "norm_out.bias": state["norm.bias"],
        "smooth.weight": state["conv.weight"],
        "smooth.bias": state["conv.bias"],
    }
    places = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    names = {"proj": "attn.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2", "skip": "skip_linear"}
    for i, place in enumerate(places):
        for name, value in state.items():
            if not name.startswith(f"layers.{i}."):
                continue
            module, kind = name.split(".")[2:]
            if module == "qkv":
                for part, weight in zip("qkv", value.chunk(3), strict=True):
                    target[f"{place}.attn.to_{part}.weight"] = weight
            else:
                target[f"{place}.{names.get(module, module)}.{kind}"] = value
    model.load_state_dict(target)
    z, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 444.0, 999.0]), torch.tensor([0, 3, 5])
    words = torch.randn(3, 3, 6)
    with torch.no_grad():
        expected = naive(z, t, y, words)
        found = model(z[:, :, None], t, encoder_hidden_states=words, class_labels=y).sample[:, :, 0]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("fields", [{}, {"final_conv": False, "mlp_time_embed": True}])
def test_packed_equals_alone_with_gradients(fields: dict[str, Any]) -> None:
    model, arguments = make(**fields), inputs()
    packed = model(**arguments).sample
    torch.stack([v.square().sum() for v in packed]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    for i, v in enumerate(packed):
        alone = model(**{name: value[i : i + 1] for name, value in arguments.items()}).sample[0]
        assert alone.shape == v.shape == (4, *SIZES[i])
        assert (alone - v).abs().max() < 1e-5 * v.abs().max()
        alone.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * max(1.0, float(gradients[name].abs().max())), (
            name
        )


def test_batches_checkpointing_and_saving(tmp_path: Path) -> None:
    model, arguments = make(), inputs(((3, 4, 6),) * 3)
    text = arguments.pop("encoder_hidden_states")
    states = torch.nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=7.0)
    mask = torch.arange(states.shape[1])[None] < torch.tensor([len(t) for t in text])[:, None]
    batch = {name: torch.stack(value) if isinstance(value, list) else value for name, value in arguments.items()}
    out = model(**batch, encoder_hidden_states=states, encoder_attention_mask=mask).sample
    expected = model(**arguments, encoder_hidden_states=text, return_dict=False)[0]
    # Packs in another order of kernels: the final convolution may differ in the last bits.
    assert (out - torch.stack(expected)).abs().max() < 1e-5
    model.enable_gradient_checkpointing()
    again = model(**arguments, encoder_hidden_states=text).sample
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    model.save_pretrained(tmp_path)
    loaded = UViTTransformer3DModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded(**arguments, encoder_hidden_states=text).sample, expected, strict=True)
    )
    model.fuse_qkv_projections()
    fused = model(**arguments, encoder_hidden_states=text).sample
    assert max(float((a - b).abs().max()) for a, b in zip(fused, expected, strict=True)) < 1e-3


def test_an_image_sits_at_the_first_frame_of_the_table() -> None:
    model = make()
    whole = model._table((3, 2, 3))
    assert torch.equal(model._table((1, 2, 3)), whole[:6])
    assert torch.equal(whole, model.pos_embed[model.extras :])
    longer = model._table((5, 2, 3)).view(5, 6, -1)
    assert torch.allclose(longer[0], whole[:6], atol=1e-6) and torch.allclose(longer[2], whole[6:12], atol=1e-6)
    model.pos_embed.data[model.extras :] = 0.5
    assert torch.allclose(model._table((2, 7, 5)), torch.full((70, 24), 0.5))


def test_skips_carry_the_early_blocks_to_the_late_ones() -> None:
    """Without the middle, the input still reaches the output through the skips."""
    model, arguments = make(), inputs(SIZES[:1])
    for block in (model.mid_block, *model.out_blocks):
        if block.skip_linear is not None:
            nn.init.zeros_(block.skip_linear.weight[:, : block.norm1.normalized_shape[0]].data)
    noisy = arguments["hidden_states"][0].requires_grad_()
    model(**arguments).sample[0].square().sum().backward()
    assert bool((noisy.grad.abs().sum(0) > 0).all())
    for block in model.out_blocks:
        nn.init.zeros_(block.skip_linear.weight.data)
    noisy.grad = None
    model(**arguments).sample[0].square().sum().backward()
    assert not noisy.grad.any()


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("uvit")])
def test_published_sizes(name: str) -> None:
    with init_empty_weights():
        model = UViTTransformer3DModel(**MODELS[name]())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PAPER_PARAMETERS[name], rel=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 3}, "num_layers: 3 given, an even number"),
        ({"text_length": 0}, "at least 1"),
        ({"sample_size": (1, 5, 4)}, "multiples of patch_size 2"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message):
        UViTTransformer3DModel(**{**TINY, **fields})


def test_bad_arguments() -> None:
    model, arguments = make(), inputs(SIZES[:1])
    with pytest.raises(WaltError, match="5 states given, at most 4"):
        model(**{**arguments, "encoder_hidden_states": [torch.zeros(5, 6)]})
    with pytest.raises(WaltError, match="final convolution needs all tokens"):
        kept = torch.ones(3, 2, 3, dtype=torch.bool)
        kept[0, 0, 0] = False
        model(**arguments, kept=[kept])
