"""NUWA's frame-wise VQ-GAN and VQ-GAN-Seg, and codes in the causal tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import walt
from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.vq_model_walt import FramePatcher, WaltVQModel

TINY: dict[str, Any] = {
    "num_vq_embeddings": 24,
    "vq_embed_dim": 6,
    "encoder_widths": (8, 12),
    "decoder_widths": (8, 12),
    "layers_per_block": 1,
    "patch_size": 4,
    "norm": "channel",
}


def make(**changes: Any) -> WaltVQModel:
    torch.manual_seed(0)
    return WaltVQModel(**{**TINY, **changes}).eval()


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("norm, adaptation", [("channel", "local"), ("group", "local"), ("group", "global")])
@pytest.mark.parametrize("widths, patch, factor", [((8,) * 4, 1, 8), ((8,) * 5, 1, 16), ((8, 8), 4, 8), ((8,), 16, 16)])
def test_shapes_and_that_a_video_is_its_frames(
    norm: str, adaptation: str, widths: tuple[int, ...], patch: int, factor: int
) -> None:
    model = make(encoder_widths=widths, decoder_widths=widths, patch_size=patch, norm=norm, adaptation=adaptation)
    assert (model.spatial_compression_ratio, model.vocab_size) == (factor, 24)
    video = picture(2, 3, 3, 32, 48)
    codes = model.encode_indices(video)
    assert codes.shape == (2, 3, 32 // factor, 48 // factor) and codes.dtype == torch.int64
    pixels = model.decode_indices(codes)
    assert pixels.shape == video.shape and pixels.abs().max() <= 1
    for t in range(3):
        assert torch.equal(model.encode_indices(video[:, :, t]), codes[:, t])
        assert torch.allclose(model.decode_indices(codes[:, t]), pixels[:, :, t], atol=1e-5)


@torch.no_grad()
def test_diffusers_conventions() -> None:
    model, x = make(), picture(2, 3, 16, 24)
    latents = model.encode(x).latents
    assert latents.shape == (2, 6, 2, 3) and torch.equal(model.encode(x, return_dict=False)[0], latents)
    whole = model(x)
    assert torch.equal(model.decode(latents).sample, whole.sample)
    assert whole.commit_loss.ndim == 0 and float(whole.commit_loss) > 0
    sample, loss = model.decode(latents, return_dict=False)
    assert torch.equal(sample, whole.sample) and torch.equal(loss, whole.commit_loss)
    # Unquantized latents decode to something else, codes to the same.
    assert not torch.equal(model.decode(latents, force_not_quantize=True).sample, whole.sample)
    indices = model.encode_indices(x)
    codes = model.quantize.indices_to_codes(indices[:, None])[:, :, 0]
    assert torch.allclose(model.decode(codes, force_not_quantize=True).sample, whole.sample, atol=1e-6)
    assert torch.allclose(model.decode_indices(indices), whole.sample.clamp(-1, 1), atol=1e-6)


@torch.no_grad()
def test_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    model, x = make(), picture(1, 3, 16, 16)
    model.quantize.train()(model.encode(x).latents[:, :, None])  # a codebook that moved
    model.eval().save_pretrained(tmp_path / "vq")
    loaded = walt.WaltVQModel.from_pretrained(tmp_path / "vq").eval()
    assert torch.equal(loaded.encode_indices(x), model.encode_indices(x))
    assert torch.equal(loaded.quantize.weight, model.quantize.weight)

    class Pipeline(DiffusionPipeline):
        def __init__(self, vq: WaltVQModel) -> None:
            super().__init__()
            self.register_modules(vq=vq)

    Pipeline(model).save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["vq"] == ["walt", "WaltVQModel"]
    again = Pipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(again.vq.eval().encode_indices(x), model.encode_indices(x))


def test_default_is_nuwas_and_builds_on_meta() -> None:
    with torch.device("meta"):
        model = WaltVQModel()
    assert model.vocab_size == 12_288 and tuple(model.quantize.weight.shape) == (12_288, 256)
    assert model.spatial_compression_ratio == 16
    # Frames only: no weight has a temporal extent.
    assert all(p.shape[2] == 1 for p in model.parameters() if p.ndim == 5)


@torch.no_grad()
def test_its_networks_are_the_causal_tokenizers_on_a_lone_frame() -> None:
    """The causal model given the frame model's weights in its last temporal taps says the same of one frame."""
    frames = make(encoder_widths=(8, 8, 12), decoder_widths=(8, 12, 12), patch_size=1)
    torch.manual_seed(1)
    causal = AutoencoderKLWalt(
        latent_channels=6,
        encoder_widths=(8, 8, 12),
        decoder_widths=(8, 12, 12),
        temporal_downsample=(False, False),
        layers_per_block=1,
    ).eval()
    for name, target in (*causal.encoder.named_parameters("encoder"), *causal.decoder.named_parameters("decoder")):
        source = frames.get_parameter(name)
        (target[:, :, -1:] if target.ndim == 5 else target).copy_(source)
    x = picture(1, 3, 1, 16, 16)
    assert torch.allclose(causal.encode(x).latent_dist.mode(), frames.encode(x).latents, atol=1e-5)
    z = picture(1, 6, 1, 4, 4)
    assert torch.allclose(causal.decode(z).sample, frames.decode(z, force_not_quantize=True).sample, atol=1e-5)


@pytest.mark.parametrize("transform", ["haar", "space_to_depth"])
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_front_end_is_lossless(transform: str, patch: int) -> None:
    patcher, x = FramePatcher(patch, transform), picture(2, 3, 16, 24).double()
    blocks = patcher.split(x)
    assert blocks.shape == (2, 3 * patch**2, 16 // patch, 24 // patch)
    assert (patcher.join(blocks) - x).abs().max() < 1e-12
    if transform == "haar":  # the first coefficient of a colour is its mean
        mean = torch.nn.functional.avg_pool2d(x, patch)
        assert torch.allclose(blocks.unflatten(1, (3, patch**2))[:, :, 0], mean)


# -- segmentation


def seg(**changes: Any) -> WaltVQModel:
    return make(**{"in_channels": 5, "segmentation": True, **changes})


@torch.no_grad()
def test_class_maps_and_one_hot_maps_are_the_same() -> None:
    model = seg()
    maps = torch.randint(0, 5, (2, 3, 16, 24), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(maps, 5).movedim(-1, 1).float()
    codes = model.encode_indices(maps)
    assert codes.shape == (2, 3, 2, 3)
    assert torch.equal(model.encode_indices(one_hot), codes)
    assert torch.equal(model.encode_indices(maps[:, 0]), codes[:, 0])
    assert torch.equal(model.encode_indices(one_hot[:, :, 0]), codes[:, 0])
    assert torch.equal(model.encode_indices(maps.to(torch.uint8)), codes)
    assert model.decode_indices(codes).shape == (2, 5, 3, 16, 24)
    assert torch.equal(model(maps).sample, model(one_hot).sample)


def test_small_models_learn() -> None:
    """Pictures of a few tiles, and maps of a few classes: both are learned through a codebook."""
    generator = torch.Generator().manual_seed(0)
    # One level of widths: a tile is a token.
    tiles = torch.rand(6, 3, 4, 4, generator=generator) * 2 - 1
    layout = torch.randint(0, 6, (8, 4, 4), generator=generator)
    pictures = tiles[layout].permute(0, 3, 1, 4, 2, 5).reshape(8, 3, 16, 16)
    maps = layout.repeat_interleave(4, 1).repeat_interleave(4, 2) % 5
    shape = {"encoder_widths": (24,), "decoder_widths": (24,), "num_vq_embeddings": 16}
    for model, x in ((make(**shape), pictures), (seg(**shape), maps)):
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        errors = []
        for _ in range(150):
            y, quantized = model(x, return_dict=False)
            error = (y - x).abs().mean() if x is pictures else torch.nn.functional.cross_entropy(y, x)
            optimizer.zero_grad()
            (error + 0.25 * quantized.losses["commitment"]).backward()
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < 0.25 * errors[0], errors[::30]
        if x is maps:
            decoded = model.eval().decode_indices(model.encode_indices(x)).argmax(dim=1)
            assert (decoded == x).float().mean() > 0.95


@torch.no_grad()
def test_fitted_shortcut_is_k_means_of_the_best_linear_block_code() -> None:
    rough = torch.randn(40, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    pictures = torch.nn.functional.interpolate(rough, size=(16, 24), mode="bilinear").clamp(-1, 1)[:, :, None]
    model = make(block_shortcut=True)
    model.fit_block_shortcut(pictures.split(8))
    z = model.encode(pictures).latents
    linear = model.decode(z, force_not_quantize=True).sample
    coded = model.decode_indices(model.encode_indices(pictures))

    def blocks(x: Tensor) -> Tensor:
        return x.reshape(40, 3, 2, 8, 3, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192)

    rows = blocks(pictures)
    centred = rows - rows.mean(dim=0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    best = (centred - (u[:, :6] * s[:6]) @ v[:6]).square().mean()
    assert torch.isclose((blocks(linear) - rows).square().mean(), best, rtol=1e-4)
    # Distances between latents are distances between pixels, so Lloyd's fixed point is one in pixels: every decoded
    # block is the mean of the (linearly coded) blocks that share its code.
    codes, shown, coded_linear = model.encode_indices(pictures).flatten(), blocks(coded), blocks(linear)
    for code in codes.unique():
        mine = codes == code
        assert torch.allclose(shown[mine][0], coded_linear[mine].mean(dim=0).clamp(-1, 1), atol=0.05)
    assert len(codes.unique()) == 24
    # With neighbours the decoder's map is the least-squares one of 3x3 codes: the same codes, a smaller error.
    lapped = make(block_shortcut=True, shortcut_overlap=1)
    lapped.fit_block_shortcut(pictures.split(8))
    indices = lapped.encode_indices(pictures)
    read = lapped.quantize.indices_to_codes(indices)[:, :, 0]
    read = torch.nn.functional.pad(read, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    read = read.permute(0, 2, 3, 1, 4, 5).reshape(-1, 54).double()
    read = torch.cat([read, torch.ones(len(read), 1)], dim=1)
    predicted = read @ torch.linalg.lstsq(read, rows.double()).solution
    shown = blocks(lapped.decode(lapped.encode(pictures).latents).sample)
    error = (shown - rows).square().mean()
    assert torch.isclose(error, (predicted - rows).square().mean().float(), rtol=1e-2)
    assert error < 0.9 * (blocks(coded) - rows).square().mean()
    maps = torch.randint(0, 5, (40, 2, 3), generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 1)
    maps = maps.repeat_interleave(8, 2)[:, None]
    segmenter = seg(block_shortcut=True, vq_embed_dim=4)
    segmenter.fit_block_shortcut([maps])
    assert torch.equal(segmenter.decode_indices(segmenter.encode_indices(maps)).argmax(dim=1), maps)
    with pytest.raises(WaltError, match="block_shortcut=True"):
        make().fit_block_shortcut([pictures])


# -- bad input


@pytest.mark.parametrize(
    "x, words",
    [
        (torch.rand(1, 3, 16, 20), "multiples of 8, got 16x20"),
        (torch.rand(1, 4, 16, 16), r"\(B, 3, H, W\)"),
        (torch.rand(3, 16, 16), r"\(B, 3, H, W\)"),
        (torch.linspace(0, 255, 768).view(1, 3, 16, 16), r"\[-1, 1\], got 0.*\.\.255"),
        (torch.full((1, 3, 16, 16), float("nan")), r"\[-1, 1\], got nan"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floats"),
    ],
)
def test_bad_pictures(x: Tensor, words: str) -> None:
    with pytest.raises(WaltError, match=words):
        make().encode_indices(x)
    with pytest.raises(WaltError, match=words):
        make().encode(x)


def test_bad_maps_codes_and_configs() -> None:
    with pytest.raises(WaltError, match="class 5 is not known; there are 0 to 4"):
        seg().encode_indices(torch.full((1, 16, 16), 5))
    with pytest.raises(WaltError, match="class -1 is not known"):
        seg().encode_indices(torch.full((1, 16, 16), -1))
    with pytest.raises(WaltError, match="multiples of 8, got 16x20"):
        seg().encode_indices(torch.zeros(1, 16, 20, dtype=torch.int64))
    with pytest.raises(WaltError, match=r"0\.\.23, got 24"):
        make().decode_indices(torch.full((1, 2, 2), 24))
    with pytest.raises(WaltError, match=r"\(B, h, w\) or \(B, T, h, w\)"):
        make().decode_indices(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(WaltError, match=r"latents must be \(B, 6, h, w\)"):
        make().decode(torch.zeros(1, 5, 2, 2))
    for change, words in (
        ({"patch_size": 3}, "power of two"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"encoder_widths": (8,)}, "one entry per level"),
        ({"codebook": "mean"}, 'codebook must be "ema"'),
    ):
        with pytest.raises(WaltError, match=words):
            make(**change)


# -- codes in the causal tokenizer

CAUSAL: dict[str, Any] = {
    "encoder_widths": (8, 8),
    "decoder_widths": (8, 8),
    "temporal_downsample": (False,),
    "layers_per_block": 1,
    "patch_size": 4,
}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "lfq": {"latent_channels": 18, "quantizer": "lfq", "quantizer_config": {"groups": 2}},
    "fsq": {"latent_channels": 4, "quantizer": "fsq", "quantizer_config": {"levels": [8, 5, 5, 5]}},
    "vq": {"latent_channels": 8, "quantizer": "vq", "quantizer_config": {"size": 32}},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_causal_tokenizer_with_codes(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoencoderKLWalt(**CAUSAL, **QUANTIZERS[kind]).eval()
    x = picture(1, 3, 9, 16, 24)
    indices = model.encode_indices(x)
    assert indices.shape == (1, 3, 2, 3) and int(indices.max()) < model.vocab_size
    codes = model.encode(x).latent_dist.mode()
    assert model.quantize is not None
    assert torch.equal(codes, model.quantize.indices_to_codes(indices))
    assert torch.equal(model.decode_indices(indices), model.decode(codes).sample.clamp(-1, 1))
    assert torch.allclose(model(x).sample, model.decode(codes).sample, atol=1e-5)
    # A stream of chunks gives the same codes.
    first, cache = model.encode_chunk(x[:, :, :5])
    rest, _ = model.encode_chunk(x[:, :, 5:], cache)
    assert torch.equal(torch.cat([first, rest], dim=2), codes)
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLWalt.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encode_indices(x), indices)


def test_continuous_configs_do_not_name_a_quantizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoencoderKLWalt(**CAUSAL)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantizer", "quantizer_config"} & set(config)
    assert model.quantize is None and AutoencoderKLWalt.from_pretrained(tmp_path).quantize is None
    with pytest.raises(WaltError, match="continuous latents"):
        model.encode_indices(picture(1, 3, 1, 16, 16))
    with pytest.raises(WaltError, match="quantizer must be one of"):
        AutoencoderKLWalt(**CAUSAL, quantizer="rvq")
    with pytest.raises(WaltError, match="no quantizer to configure"):
        AutoencoderKLWalt(**CAUSAL, quantizer_config={"levels": [5]})
    with pytest.raises(WaltError, match="codes take none"):
        AutoencoderKLWalt(**CAUSAL, **QUANTIZERS["vq"])(picture(1, 3, 1, 16, 16), noise=torch.zeros(1))
