"""The denoiser: packed equals alone, information flows where it should, and sizes are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from walt.configs.walt import MODELS, PAPER_PARAMETERS
from walt.diffusion import make_scheduler, x0_from_velocity
from walt.errors import WaltError
from walt.latents import Grid
from walt.models.transformer_walt import (
    LocalMixing,
    WaltAttention,
    WaltPositionEmbedding,
    WaltSpatioTemporalBlock,
    WaltTransformer3DModel,
    _neighbours,
)

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "sample_size": (3, 4, 6),
    "spatiotemporal_window": (2, 2),
}
SIZES = ((3, 4, 6), (1, 4, 4), (4, 6, 8), (1, 8, 2), (3, 4, 6))


def make(**fields: Any) -> WaltTransformer3DModel:
    """A tiny model with every weight random, small ones too."""
    torch.manual_seed(0)
    model = WaltTransformer3DModel(**{**TINY, **fields})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(
    model: WaltTransformer3DModel, sizes: tuple[tuple[int, int, int], ...] = SIZES, seed: int = 0
) -> dict[str, Any]:
    """A pack of every argument that the model takes, lists throughout."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    config, n = model.config, len(sizes)
    out: dict[str, Any] = {
        "hidden_states": [draw(config.in_channels, *s) for s in sizes],
        "timestep": torch.rand(n, generator=g) * 999,
    }
    if config.text_dim is not None:
        out["encoder_hidden_states"] = [draw(k % 4 + (k != 3), config.text_dim) for k in range(n)]
    if config.num_classes is not None:
        out["class_labels"] = torch.arange(n) % (config.num_classes + 1)
    if config.low_res_channels is not None:
        out["low_res_hidden_states"] = [draw(config.low_res_channels, t, h // 2, w // 2) for t, h, w in sizes]
        out["low_res_noise_level"] = torch.rand(n, generator=g) * 300
    if config.frame_conditioning:
        out["frame_latents"] = [draw(config.in_channels, *s) for s in sizes]
        out["frame_mask"] = [(torch.arange(s[0]) < s[0] // 2).float()[None, :, None, None].expand(1, *s) for s in sizes]
    if config.self_conditioning:
        out["self_conditioning"] = [draw(config.in_channels, *s) for s in sizes]
    return out


def sample(arguments: dict[str, Any], i: int) -> dict[str, Any]:
    """Sample i of a pack, alone."""
    return {name: value[i : i + 1] for name, value in arguments.items()}


FULL = {"text_dim": 10, "num_classes": 3, "low_res_channels": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "rope": {"relative_positions": "rope", "spatial_window": (3, 3)},
    "small windows": {"spatial_window": (3, 2), "spatiotemporal_window": (2, 3, 4), "cross_attention_window": "same"},
    "whole windows, patch 2": {"patch_size": 2, "spatiotemporal_window": None},
    "pooled text, preconditioned": {"pooled_text": True, "sigma_data": 0.5},
    "local mixing": {"local_mixing": True},
    "no positions, full AdaLN": {"relative_positions": None, "absolute_positions": False, "adaln_rank": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_alone_with_gradients(variant: str) -> None:
    model = make(**FULL, **VARIANTS[variant])
    arguments = inputs(model)
    targets = inputs(model, seed=1)["hidden_states"]

    packed = model(**arguments).sample
    torch.stack([F.mse_loss(a, b, reduction="sum") for a, b in zip(packed, targets, strict=True)]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, target in enumerate(targets):
        alone = model(**sample(arguments, i)).sample[0]
        assert (alone - packed[i]).abs().max() < 1e-5
        F.mse_loss(alone, target, reduction="sum").backward()
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - gradients[name]).abs().max()
        assert error < 1e-5 * max(1.0, float(gradients[name].abs().max())), name


@pytest.mark.parametrize("relative", ["bias", "rope"])
def test_batch_is_a_pack_of_equal_grids(relative: str) -> None:
    model = make(**FULL, relative_positions=relative)
    arguments = inputs(model, ((3, 4, 6),) * 3)
    text = arguments.pop("encoder_hidden_states")
    states = torch.nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=7.0)
    mask = torch.arange(states.shape[1])[None] < torch.tensor([len(t) for t in text])[:, None]
    batch = {name: torch.stack(value) if isinstance(value, list) else value for name, value in arguments.items()}
    with torch.no_grad():
        out = model(**batch, encoder_hidden_states=states, encoder_attention_mask=mask.long()).sample
        expected = model(**arguments, encoder_hidden_states=text, return_dict=False)[0]
    assert out.shape == (3, 4, 3, 4, 6)
    assert torch.equal(out, torch.stack(expected))  # padded text is not there, whatever it holds


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"spatial_window": (3, 3), "spatiotemporal_window": (2, 2)},
        {"spatial_window": (2, 3), "spatiotemporal_window": (2, 2, 2), "relative_positions": "rope"},
    ],
)
def test_every_output_depends_on_every_input_of_its_sample_only(fields: dict[str, Any]) -> None:
    model = make(num_layers=8, **fields).double()
    sizes = ((3, 4, 6), (1, 4, 4), (3, 4, 6))
    arguments = inputs(model, sizes)
    noisy = [z.double().requires_grad_() for z in arguments.pop("hidden_states")]
    v = model(noisy, **arguments).sample
    for i, (t, h, w) in enumerate(sizes):
        for frame, row, column in ((0, 0, 0), (t - 1, h - 1, w - 1), (0, h - 1, 0), (t - 1, h // 2, w // 2)):
            grads = torch.autograd.grad(v[i][:, frame, row, column].sum(), noisy, retain_graph=True, allow_unused=True)
            for j, grad in enumerate(grads):
                reached = torch.zeros(sizes[j]) if grad is None else grad.abs().sum(0)
                assert bool((reached > 0).all()) if i == j else not bool(reached.any())


def test_unshifted_windows_would_never_talk() -> None:
    """The gradient test above can fail: two layers of small windows, before any shift, do not connect a frame."""
    model = make(num_layers=2, spatial_window=(2, 3), spatiotemporal_window=(2, 3)).double()
    arguments = inputs(model, ((3, 4, 6),))
    noisy = arguments.pop("hidden_states")[0].double().requires_grad_()
    model([noisy], **arguments).sample[0][:, 0, 0, 0].sum().backward()
    assert noisy.grad is not None and not noisy.grad[:, :, 2:, :].any() and not noisy.grad[:, :, :, 3:].any()
    assert bool((noisy.grad[:, :, :2, :3].abs().sum(0) > 0).all())


def attention_of(model: WaltTransformer3DModel) -> WaltAttention:
    """The self-attention of the first spatiotemporal layer."""
    block = model.transformer_blocks[1]
    assert isinstance(block, WaltSpatioTemporalBlock)
    return block.attn


def test_identity_rule_skips_image_attention_only() -> None:
    """In a spatiotemporal layer an image's attention output is its own value: queries and keys do not matter."""
    model = make(num_layers=2)
    attn = attention_of(model)
    arguments = inputs(model, ((1, 4, 4), (3, 4, 6)))
    with torch.no_grad():
        before = model(**arguments).sample
        attn.to_q.weight.normal_()
        after = model(**arguments).sample
        assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
        attn.to_v.weight.normal_()
        assert not torch.allclose(model(**arguments).sample[0], after[0])
    attending = make(num_layers=2, image_identity=False)
    with torch.no_grad():
        before = attending(**arguments).sample
        attention_of(attending).to_q.weight.normal_()
        assert not torch.allclose(before[0], attending(**arguments).sample[0])


def test_image_batch_gives_every_parameter_a_gradient() -> None:
    model = make()
    torch.stack([v.square().sum() for v in model(**inputs(model, ((1, 4, 4), (1, 4, 6)))).sample]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_alone_are_the_same_without_gradients(variant: str) -> None:
    model = make(**FULL | VARIANTS[variant])  # no token of theirs attends in spatiotemporal layers
    arguments = inputs(model, ((1, 4, 4), (1, 4, 6)))
    learning = model(**arguments).sample
    with torch.no_grad():
        for found, expected in zip(model(**arguments).sample, learning, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_positions_start_as_loud_as_the_latents_and_all_different() -> None:
    table = WaltTransformer3DModel(**{**TINY, "attention_head_dim": 32, "sample_size": (5, 16, 28)}).pos_embed
    assert table is not None
    places = (table.space[None] + table.time[:, None]).flatten(0, 1)
    assert 0.5 < float(places.detach().square().mean().sqrt()) < 1.0
    assert float(torch.pdist(places.detach()).min()) > 0.5


def test_given_frames_are_masked_by_the_model() -> None:
    model = make()
    arguments = inputs(model, ((3, 4, 6),))
    with torch.no_grad():
        before = model(**arguments).sample[0]
        arguments["frame_latents"][0][:, 1:] += 5  # the mask is 1 on frame 0 only
        assert torch.equal(model(**arguments).sample[0], before)
        arguments["frame_latents"][0][:, 0] += 5
        assert not torch.allclose(model(**arguments).sample[0], before)
        nothing = {**arguments, "frame_latents": None, "frame_mask": None, "self_conditioning": None}
        zeros = {k: [torch.zeros_like(x) for x in arguments[k]] for k in nothing if nothing[k] is None}
        assert torch.equal(model(**nothing).sample[0], model(**{**arguments, **zeros}).sample[0])


def test_training_starts_from_the_zero_map_with_closed_branches() -> None:
    torch.manual_seed(0)
    model = WaltTransformer3DModel(**TINY, text_dim=10)
    arguments = inputs(model)
    assert all(v.std() > 0.01 for v in model(**arguments).sample), "a new model is open"
    model.close_branches()
    assert not any(v.any() for v in model(**arguments).sample)
    torch.nn.init.normal_(model.proj_out.weight)
    blocks, model.transformer_blocks = model.transformer_blocks, torch.nn.ModuleList()
    empty = model(**arguments).sample
    model.transformer_blocks = blocks
    assert all(torch.equal(a, b) for a, b in zip(empty, model(**arguments).sample, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_table_8_parameter_counts(name: str) -> None:
    """Within 1 % of the paper's figure; 3.5 % for the base, printed as "3B"."""
    with torch.device("meta"):
        model = WaltTransformer3DModel(**MODELS[name]())
    tolerance = 0.035 if name == "t2v_base_3b" else 0.01
    assert model.num_parameters() == pytest.approx(PAPER_PARAMETERS[name], rel=tolerance)


def test_adaln_lora_parameter_count() -> None:
    """Papers 1.8: 6.6M with r = 2 against 151M with a full AdaLN in each of L's 24 layers."""
    counts = {}
    for rank in (2, None):
        with torch.device("meta"):
            model = WaltTransformer3DModel(**{**MODELS["ucf101_l"](), "adaln_rank": rank})
        counts[rank] = sum(p.numel() for n, p in model.named_parameters() if "adaln" in n and "adaln_out" not in n)
    assert counts[2] == pytest.approx(6.6e6, rel=0.01)
    assert counts[None] == pytest.approx(151e6, rel=0.01)


def test_first_layer_has_no_low_rank_part_and_rank_0_correction_starts_at_zero() -> None:
    model = WaltTransformer3DModel(**TINY)
    model.close_branches()
    assert model.transformer_blocks[0].adaln_up is None
    assert all(not b.adaln_up.weight.any() and b.adaln_down.weight.any() for b in model.transformer_blocks[1:])


def test_save_and_load(tmp_path: Path) -> None:
    model = make(**FULL, relative_positions="rope")
    model.save_pretrained(tmp_path)
    loaded = WaltTransformer3DModel.from_pretrained(tmp_path)
    arguments = inputs(model)
    with torch.no_grad():
        for a, b in zip(model(**arguments).sample, loaded(**arguments).sample, strict=True):
            assert torch.equal(a, b)
    half = WaltTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    arguments["hidden_states"] = [z.bfloat16() for z in arguments["hidden_states"]]
    out = half(**arguments).sample
    assert all(v.dtype == torch.bfloat16 and v.isfinite().all() for v in out)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = make(**FULL)
    arguments = inputs(model)
    gradients = []
    for on in (False, True):
        if on:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.stack([v.square().sum() for v in model(**arguments).sample]).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert model.gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_size": 2, "spatial_window": (2, 2)},
        {"adaln_rank": 8},
        {"qk_norm": False},
        {"self_conditioning": False, "frame_conditioning": False},
        {"in_channels": 16, "out_channels": 16},
        {"absolute_positions": False},
        {"relative_positions": None},
        {"spatiotemporal_window": (4, 6)},
        {"ffn_dim": 40, "text_dim": 5},
        {"num_classes": 2, "num_layers": 3},
        {"low_res_channels": 4, "patch_size": 2},
    ],
)
def test_every_switch_builds_and_runs(fields: dict[str, Any]) -> None:
    model = make(**fields)
    arguments = inputs(model)
    out = model(**arguments).sample
    assert [tuple(v.shape) for v in out] == [tuple(z.shape) for z in arguments["hidden_states"]]
    torch.stack([v.square().sum() for v in out]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_position_tables_on_and_off_size() -> None:
    embed = WaltPositionEmbedding((3, 4, 6), 8)
    for parameter in embed.parameters():
        torch.nn.init.normal_(parameter)
    out = embed(((3, 4, 6), (1, 4, 6), (2, 4, 6))).view(6, 24, 8)
    for row, frame in enumerate((0, 1, 2, 0, 0, 1)):  # on-size: the table itself; an image is at time 0
        assert torch.equal(out[row], embed.space + embed.time[frame])
    image = embed.space.T.view(1, 8, 4, 6)
    larger = F.interpolate(image, size=(8, 3), mode="bilinear")[0].flatten(1).T
    assert torch.allclose(embed(((1, 8, 3),)), larger + embed.time[0], atol=1e-6)
    longer = embed(((5, 4, 6),)).view(5, 24, 8) - embed.space  # 5 frames over 3 entries: 0, 0.5, 1, 1.5, 2
    assert torch.allclose(longer[0, 0], embed.time[0], atol=1e-5)
    assert torch.allclose(longer[3, 0], (embed.time[1] + embed.time[2]) / 2, atol=1e-5)


def test_fused_projections_and_lora() -> None:
    from peft import LoraConfig

    model = make(**FULL)
    arguments = inputs(model)
    with torch.no_grad():
        before = model(**arguments).sample
        model.fuse_qkv_projections()
        fused = model(**arguments).sample
        model.unfuse_qkv_projections()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, fused, strict=True))
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
        changed = model(**arguments).sample
        off = model(**arguments, attention_kwargs={"scale": 0.0}).sample
    assert not torch.allclose(changed[0], before[0])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(off, before, strict=True))


@pytest.mark.slow
def test_blocks_compile_without_graph_breaks() -> None:
    model = make(num_layers=2, text_dim=10, relative_positions="rope")
    arguments = inputs(model, ((3, 4, 6), (1, 4, 6)))
    with torch.no_grad():
        before = model(**arguments).sample
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        after = model(**arguments).sample
    torch._dynamo.reset()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"relative_positions": "ropes"}, 'relative_positions: .ropes. given.*did you mean "rope"'),
        ({"cross_attention_window": "full"}, "cross_attention_window: .full. given"),
        ({"spatial_window": (0, 2)}, "spatial_window"),
        ({"spatiotemporal_window": (1, 2, 3, 4)}, "spatiotemporal_window"),
        ({"sample_size": (3, 5, 6), "patch_size": 2}, "sample_size: 5x6"),
        ({"adaln_rank": 0}, "adaln_rank: 0"),
        ({"num_layers": 0}, "num_layers: 0"),
        ({"attention_head_dim": 11, "relative_positions": "rope"}, "attention_head_dim: 11"),
    ],
)
def test_config_errors(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(WaltError, match=match):
        WaltTransformer3DModel(**{**TINY, **fields})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_states": []}, "hidden_states: empty"),
        ({"hidden_states": torch.zeros(5, 4, 3, 4)}, "hidden_states: sample 0 has shape"),
        ({"hidden_states": [torch.zeros(3, 1, 4, 4)] * 5}, "hidden_states: sample 0 has 3 channels, 4 needed"),
        ({"hidden_states": [torch.zeros(4, 1, 5, 4)] * 5}, "hidden_states: sample 0 is 5x4.*patch size 2"),
        ({"timestep": torch.zeros(2)}, r"timestep: shape \(2,\) given, \(5,\) needed"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states: missing"),
        ({"encoder_hidden_states": [torch.zeros(2, 10)]}, "encoder_hidden_states: 1 samples given for 5"),
        ({"encoder_hidden_states": [torch.zeros(2, 9)] * 5}, r"sample 0 has shape \(2, 9\), \(length, 10\) needed"),
        ({"encoder_attention_mask": torch.ones(5, 3)}, "encoder_attention_mask"),
        ({"class_labels": None}, "class_labels: missing.*null label is 3"),
        ({"class_labels": torch.full((5,), 4)}, r"class_labels: .*0\.\.3 allowed"),
        ({"class_labels": torch.zeros(5)}, "class_labels: torch.float32 given"),
        ({"low_res_hidden_states": None}, "low_res_hidden_states: missing"),
        ({"low_res_hidden_states": [torch.zeros(4, 3, 2, 2)] * 5}, "low_res_hidden_states: sample 0 has shape"),
        ({"low_res_noise_level": None}, "low_res_noise_level: missing"),
        ({"frame_mask": None}, "frame_latents and frame_mask: only one given"),
        ({"frame_mask": [torch.zeros(1, 2, 4, 6)] * 5}, "frame_mask: sample 0 has shape"),
        ({"self_conditioning": [torch.zeros(4, 3, 4, 6)]}, "self_conditioning: 1 samples given for 5"),
    ],
)
def test_call_errors(change: dict[str, Any], match: str) -> None:
    model = make(**FULL, patch_size=2)
    with pytest.raises(WaltError, match=match):
        model(**{**inputs(model), **change})


def test_conditions_the_model_cannot_use_are_refused() -> None:
    model = make(self_conditioning=False, frame_conditioning=False)
    arguments = inputs(model)
    like = arguments["hidden_states"]
    for name, value in {
        "self_conditioning": like,
        "frame_latents": like,
        "low_res_hidden_states": like,
        "low_res_noise_level": torch.zeros(5),
        "encoder_hidden_states": [torch.zeros(2, 3)] * 5,
        "class_labels": torch.zeros(5, dtype=torch.long),
    }.items():
        with pytest.raises(WaltError, match=f"{name}: given, but the model was built with"):
            model(**arguments, **{name: value})


def test_preconditioning_is_the_gaussian_posterior() -> None:
    """A silent network estimates zero: v is then known in closed form."""
    spread = 0.4
    model = WaltTransformer3DModel(**TINY, sigma_data=spread)
    model.close_branches()
    arguments = inputs(model)
    told = arguments["timestep"] = torch.tensor([0.0, 100.0, 400.0, 800.0, 999.0])
    for v, x, t in zip(model(**arguments).sample, arguments["hidden_states"], told, strict=True):
        assert torch.allclose(v.double(), _silent(x, torch.zeros(()), torch.tensor(spread), t), atol=0.02)


def _silent(x: Tensor, mean: Tensor, spread: Tensor, timestep: Tensor) -> Tensor:
    """v of a Gaussian prior: Kalman's gain, then v = signal eps - sigma x0 with eps from x."""
    alpha = make_scheduler().alphas_cumprod.double()[int(timestep)]
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    x = x.double()
    clean = mean + spread**2 * signal / (sigma**2 + spread**2 * signal**2) * (x - signal * mean)
    return signal * (x - signal * clean) / sigma - sigma * clean


def test_super_resolution_spreads_with_the_contrast_of_its_input() -> None:
    """A silent network estimates the enlarged low resolution; the trust in it falls with the contrast around a cell."""
    model = WaltTransformer3DModel(**TINY, low_res_channels=4, sigma_data=0.4)
    model.close_branches()
    arguments = inputs(model)
    told = arguments["timestep"] = torch.tensor([0.0, 100.0, 400.0, 800.0, 999.0])
    flat = arguments["low_res_hidden_states"][0][:, 1] = 0.3
    for i, v in enumerate(model(**arguments).sample):
        low = arguments["low_res_hidden_states"][i].double()
        contrast = torch.zeros(1, *low.shape[1:]).double()
        height, width = low.shape[2:]
        for y in range(height):
            for x in range(width):
                middle = low[:, :, y, x]
                for dy, dx in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                    other = low[:, :, min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                    contrast[0, :, y, x] += (other - middle).square().mean(dim=0) / 8
        spread = F.interpolate(0.4 * contrast.sqrt() + 0.01, scale_factor=2, mode="nearest")
        mean = F.interpolate(low, scale_factor=2, mode="nearest")
        expected = _silent(arguments["hidden_states"][i], mean, spread, told[i])
        assert torch.allclose(v.double(), expected, atol=0.02)
    # flat ground passes untouched, whatever the noise and the network say
    model = make(low_res_channels=4, sigma_data=0.4)
    fresh = WaltTransformer3DModel(**TINY, low_res_channels=4, sigma_data=0.4)
    fresh.close_branches()
    weights = {name: value for name, value in fresh.state_dict().items() if name.startswith("low_res_embed")}
    model.load_state_dict(weights, strict=False)
    arguments = inputs(model, ((3, 8, 12),)) | {"low_res_hidden_states": [torch.full((4, 3, 4, 6), flat)]}
    x = arguments["hidden_states"][0]
    for t in (300, 999):
        v = model(**arguments | {"timestep": torch.tensor([t])}).sample[0]
        clean = x0_from_velocity(make_scheduler(), v, x, t)
        assert (clean[:, 1:] - flat).abs().max() < 0.1


def test_low_res_start_is_the_least_squares_upsampler() -> None:
    """Pairs made by a known map per kind of frame: the fit finds both, and the silent network predicts the pair."""
    g = torch.Generator().manual_seed(0)
    truth = []
    for _ in range(2):  # maps that leave flat latents as they are: their taps sum to the identity
        conv = nn.Conv2d(4, 16, 3, padding=1, padding_mode="replicate", bias=False).double()
        with torch.no_grad():
            conv.weight[:, :, 1, 1] -= conv.weight.sum(dim=(2, 3))
            conv.weight[:, :, 1, 1] += torch.eye(4).double().repeat_interleave(4, dim=0)
        truth.append(conv)
    pairs = []
    for _ in range(8):
        low = torch.randn(4, 3, 4, 6, generator=g).double()
        frames = [truth[int(i > 0)](low[:, i]).detach() for i in range(3)]
        pairs.append((low, torch.stack([F.pixel_shuffle(frame, 2) for frame in frames], dim=1)))
    model = WaltTransformer3DModel(**TINY, low_res_channels=4, sigma_data=0.5).double()
    model.close_branches()
    model.fit_low_res_embed(pairs)
    low, high = pairs[0]
    arguments = inputs(model, ((3, 8, 12),))
    arguments |= {"low_res_hidden_states": [low], "timestep": torch.tensor([999])}
    arguments = {k: [x.double() for x in v] if isinstance(v, list) else v for k, v in arguments.items()}
    estimate = -model(**arguments).sample[0]  # at the last step of a zero-SNR schedule v is -x0
    assert (estimate - high).abs().max() < 0.02
    for fields in ({"sigma_data": 0.5}, {"low_res_channels": 4}):
        with pytest.raises(WaltError, match="low_res_channels and sigma_data"):
            WaltTransformer3DModel(**TINY, **fields).fit_low_res_embed(pairs)


@pytest.mark.parametrize("fields", [{"sigma_data": 0.0}, {"sigma_data": 0.5, "out_channels": 8}])
def test_preconditioning_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(WaltError, match="sigma_data"):
        WaltTransformer3DModel(**{**TINY, **fields})


@pytest.mark.parametrize(
    "grids", [((5, 4, 6),) * 3, ((5, 4, 6), (5, 4, 6), (1, 4, 6)), ((5, 4, 6), (1, 3, 3), (5, 4, 6))]
)
def test_local_mixing_as_shifted_sums(grids: tuple[Grid, ...]) -> None:
    """What is compiled for a GPU is the convolution, with its gradients."""
    torch.manual_seed(0)
    mixing = LocalMixing(16)
    torch.nn.init.normal_(mixing.space.weight)
    torch.nn.init.normal_(mixing.time)
    x = torch.randn(sum(t * h * w for t, h, w in grids), 16, requires_grad=True)
    leaves = (x, mixing.space.weight, mixing.time)
    found = []
    for mixed in (None, _neighbours):
        mixing._mixed = mixed
        y = mixing(x, grids)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
