"""The causal tokenizer: geometry, causality, prefix and streaming exactness, the front end, the paper's switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt, DetailShrinkage, MixingBlock, Patcher

CONFIGS: dict[str, dict[str, Any]] = {
    "paper": {"encoder_widths": (4, 4, 8, 8), "decoder_widths": (4, 4, 8, 8)},
    "patch2": {
        "encoder_widths": (4, 8, 8),
        "decoder_widths": (8, 4, 8),
        "temporal_downsample": (False, True),
        "patch_size": 2,
        "front_end": "space_to_depth",
    },
    "patch4": {"encoder_widths": (8, 8), "decoder_widths": (4, 8), "temporal_downsample": (False,), "patch_size": 4},
    "shortcut": {"encoder_widths": (4, 4, 8, 8), "decoder_widths": (4, 4, 8, 8), "block_shortcut": True},
    "lapped": {
        "encoder_widths": (8, 8),
        "decoder_widths": (4, 8),
        "temporal_downsample": (False,),
        "patch_size": 4,
        "block_shortcut": True,
        "shortcut_overlap": 1,
    },
    "shrinkage": {
        "encoder_widths": (8, 8),
        "decoder_widths": (4, 8),
        "temporal_downsample": (False,),
        "patch_size": 4,
        "detail_threshold": 0.05,
    },
    "mixing": {
        "encoder_widths": (8, 8),
        "decoder_widths": (12,),
        "decoder_mixers": 2,
        "temporal_downsample": (False,),
        "patch_size": 4,
        "block_shortcut": True,
        "shortcut_overlap": 1,
        "detail_threshold": 0.05,
    },
    "all_mixing": {
        "encoder_widths": (12,),
        "decoder_widths": (8,),
        "encoder_mixers": 2,
        "decoder_mixers": 1,
        "temporal_downsample": (False,),
        "patch_size": 4,
        "block_shortcut": True,
    },
}


def make(name: str, **changes: Any) -> AutoencoderKLWalt:
    torch.manual_seed(0)
    return AutoencoderKLWalt(**{"layers_per_block": 1, **CONFIGS[name], **changes}).double().eval()


def clip(frames: int = 17, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(1)).double() * 2 - 1


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> AutoencoderKLWalt:
    return make(request.param)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 17, 21])
def test_shapes(model: AutoencoderKLWalt, frames: int) -> None:
    x = clip(frames)
    z = model.encode(x).latent_dist.mode()
    assert z.shape == (1, 8, 1 + (frames - 1) // 4, 2, 3)
    assert model.decode(z).sample.shape == x.shape
    assert torch.equal(model.encode(x).latent_dist.sample(), z)  # no variance: sampling is the mode
    assert (model.spatial_compression_ratio, model.temporal_compression_ratio) == (8, 4)


@torch.no_grad()
def test_prefix_of_encoding_and_decoding(model: AutoencoderKLWalt) -> None:
    x = clip()
    z = model.encode(x).latent_dist.mode()
    y = model.decode(z).sample
    for k in (0, 1, 3):
        assert (model.encode(x[:, :, : 1 + 4 * k]).latent_dist.mode() - z[:, :, : 1 + k]).abs().max() < 1e-12
        assert (model.decode(z[:, :, : 1 + k]).sample - y[:, :, : 1 + 4 * k]).abs().max() < 1e-12


@torch.no_grad()
def test_first_frame_ignores_later_ones_and_later_latents_do_not(model: AutoencoderKLWalt) -> None:
    x = clip()
    changed = x.clone()
    changed[:, :, 9:] = -x[:, :, 9:]
    a, b = (model.encode(v).latent_dist.mode() for v in (x, changed))
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    assert (a[:, :, 3:] - b[:, :, 3:]).abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunks", [(1, 4, 4, 8), (5, 12), (17,), (9, 4, 4)])
def test_streaming_equals_whole(
    model: AutoencoderKLWalt, chunks: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    model = model.to(dtype)
    x = clip().to(dtype)
    z = model.encode(x).latent_dist.mode()
    cache, parts = None, []
    for part in x.split(chunks, dim=2):
        piece, cache = model.encode_chunk(part, cache)
        parts.append(piece)
    assert (torch.cat(parts, 2) - z).abs().max() < tolerance
    whole = model.decode(z).sample
    cache, parts = None, []
    for part in z.split([1] + [1] * 4, dim=2):
        piece, cache = model.decode_chunk(part, cache)
        parts.append(piece)
    assert (torch.cat(parts, 2) - whole).abs().max() < tolerance


@torch.no_grad()
def test_streams_interleave_and_a_cache_can_be_used_twice(model: AutoencoderKLWalt) -> None:
    x, y = clip(), clip().flip(2)
    _, cx = model.encode_chunk(x[:, :, :5])
    _, cy = model.encode_chunk(y[:, :, :5])
    first, _ = model.encode_chunk(x[:, :, 5:9], cx)
    model.encode_chunk(y[:, :, 5:9], cy)
    with pytest.raises(WaltError):
        model.encode_chunk(x[:, :, 5:8], cx)
    again, _ = model.encode_chunk(x[:, :, 5:9], cx)
    assert torch.equal(first, again)


def test_gradient_respects_causality(model: AutoencoderKLWalt) -> None:
    x = clip().requires_grad_()
    model.encode(x).latent_dist.mode()[:, :, 1].sum().backward()
    assert x.grad is not None
    per_frame = x.grad.abs().sum(dim=(0, 1, 3, 4))
    assert (per_frame[:5] > 0).all() and (per_frame[5:] == 0).all()


@pytest.mark.parametrize("transform", ["haar", "space_to_depth"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_front_end_is_lossless_and_causal(transform: str, patch: int) -> None:
    patcher, x = Patcher(patch, transform), clip(9)
    blocks = patcher.split(x, first=True)
    assert blocks.shape == (1, 3 * patch**3, 1 + 8 // patch, 16 // patch, 24 // patch)
    assert (patcher.join(blocks, first=True) - x).abs().max() < 1e-12
    assert torch.equal(patcher.split(x[:, :, :1], first=True), blocks[:, :, :1])


def test_haar_of_a_flat_clip_is_one_coefficient_per_colour() -> None:
    blocks = Patcher(4, "haar").split(torch.full((1, 3, 5, 8, 8), 0.5).double(), first=True)
    energy = blocks.reshape(3, 64, -1).abs().sum(dim=-1)
    assert (energy[:, 0] > 0).all() and energy[:, 1:].abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("change", [{"norm": "group"}, {"adaptation": "global"}])
def test_the_papers_switches_run_and_refuse_streaming(change: dict[str, str]) -> None:
    model = make("patch4", **change)
    z = model.encode(clip()).latent_dist.mode()
    assert model.decode(z).sample.shape == clip().shape
    with pytest.raises(WaltError, match="cannot stream"):
        model.decode_chunk(z)
    with pytest.raises(WaltError, match="cannot stream"):
        model.encode_chunk(clip())


def test_paper_size_on_meta() -> None:
    with torch.device("meta"):
        model = AutoencoderKLWalt()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 250 < millions < 310  # 4 blocks per level, both halves, widths 128 to 512
    assert (model.spatial_compression_ratio, model.temporal_compression_ratio) == (8, 4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = make("patch4")
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(clip()).sample.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(grads[0], grads[1], atol=1e-12)


@torch.no_grad()
def test_save_and_load_and_slicing(tmp_path: object) -> None:
    model = make("patch4", latents_mean=(0.5,) * 8, latents_std=(2.0,) * 8)
    model.save_pretrained(str(tmp_path))
    loaded = AutoencoderKLWalt.from_pretrained(str(tmp_path)).double().eval()
    x = torch.cat([clip(), clip().flip(3)])
    assert torch.allclose(loaded.encode(x).latent_dist.mode(), model.encode(x).latent_dist.mode(), atol=1e-6)
    assert list(loaded.config.latents_std) == [2.0] * 8
    whole = model.decode(model.encode(x).latent_dist.mode()).sample
    model.enable_slicing()
    assert (model.decode(model.encode(x).latent_dist.mode()).sample - whole).abs().max() < 1e-12


def test_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    model = AutoencoderKLWalt(
        encoder_widths=(16, 16), decoder_widths=(16, 16), temporal_downsample=(False,), patch_size=4, layers_per_block=1
    )
    x = torch.nn.functional.interpolate(clip(5, 4, 4).float(), size=(5, 16, 16), mode="trilinear")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for _ in range(120):
        error = (model(x).sample - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.05 * errors[0]


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3, 16, 16, 16), "1 \\+ 4k frames"),
        ((1, 3, 17, 20, 16), "multiples of 8, got 20x16"),
        ((1, 1, 17, 16, 16), r"\(B, 3, T, H, W\)"),
        ((3, 17, 16, 16), r"\(B, 3, T, H, W\)"),
    ],
)
def test_bad_videos(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(WaltError, match=words):
        make("patch4").encode(torch.zeros(shape).double())


def test_bad_latents_and_configs() -> None:
    with pytest.raises(WaltError, match=r"latents must be \(B, 8"):
        make("patch4").decode(torch.zeros(1, 4, 1, 2, 2).double())
    for change, words in (
        ({"patch_size": 3}, "1, 2 or 4"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"temporal_downsample": (True, True)}, r"encoder_widths needs 3 widths, .*\(True, True\)"),
        ({"latents_mean": (0.0,) * 4}, "8 channels"),
        ({"decoder_mixers": 2}, r"decoder_widths: one width with decoder_mixers=2, got \(4, 8\)"),
        ({"decoder_mixers": -1}, "decoder_mixers must be 0"),
        ({"decoder_mixers": 2, "decoder_widths": (8,), "norm": "group"}, "decoder_mixers must be 0"),
        ({"encoder_mixers": 2}, r"encoder_widths: one width with encoder_mixers=2, got \(8, 8\)"),
        ({"encoder_mixers": -1}, "encoder_mixers must be 0"),
        ({"encoder_mixers": 2, "encoder_widths": (8,), "adaptation": "global"}, "encoder_mixers must be 0"),
        ({"decoder_widths": (8,)}, r"decoder_widths needs 2 widths, .* got \(8,\)"),
        ({"detail_threshold": -0.1}, "detail_threshold must be 0"),
        ({"detail_threshold": 0.1, "front_end": "space_to_depth"}, "detail_threshold must be 0"),
    ):
        with pytest.raises(WaltError, match=words):
            make("patch4", **change)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "patch2", "patch4", "lapped"])
def test_fitted_shortcut_is_the_best_linear_block_code(name: str) -> None:
    # Smooth motion, so that the few components of a block mean something.
    g = torch.Generator().manual_seed(0)
    rough = torch.randn(24, 3, 4, 4, 5, generator=g).double()
    videos = torch.nn.functional.interpolate(rough, size=(9, 16, 24), mode="trilinear").clamp(-1, 1)
    model = make(name, block_shortcut=True)
    model.fit_block_shortcut(videos.split(6))
    z = model.encode(videos).latent_dist.mode()
    y = model.decode(z).sample

    def blocks(x: Tensor, time: int) -> Tensor:
        b, c, t, h, w = x.shape
        x = x.reshape(b, c, t // time, time, h // 8, 8, w // 8, 8).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(-1, c * time * 64)

    def best(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(dim=0)
        u, s, v = torch.linalg.svd(centred, full_matrices=False)
        return centred - (u[:, :8] * s[:8]) @ v[:8]

    for part, time in ((slice(0, 1), 1), (slice(1, None), 4)):
        error = blocks(y[:, :, part] - videos[:, :, part], time).square().mean()
        assert torch.isclose(error, best(blocks(videos[:, :, part], time)).square().mean(), rtol=1e-6)
    assert torch.allclose(z[:, :, 0].transpose(0, 1).flatten(1).std(dim=1, correction=0), torch.ones(8).double())
    # A still picture keeps (nearly) its latent over time.
    still = model.encode(videos[:, :, :1].expand(-1, -1, 9, -1, -1)).latent_dist.mode()
    assert (still[:, :, 1:] - still[:, :, :1]).abs().mean() < 0.3


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "patch4"])
def test_shrinkage_is_a_wiener_filter_of_haar_details(name: str) -> None:
    """Against Haar transforms in pixels, written as sums and differences: inside the blocks, then between them."""
    patch = CONFIGS[name].get("patch_size", 1)

    def haar(x: Tensor, dim: int) -> Tensor:
        coarse = x
        fine: list[Tensor] = []
        while coarse.shape[dim] > 1:
            even, odd = coarse.unflatten(dim, (-1, 2)).unbind(dim + 1)
            fine.insert(0, (even - odd) / 2**0.5)
            coarse = (even + odd) / 2**0.5
        return torch.cat([coarse, *fine], dim=dim)

    def cells(x: Tensor, time: int) -> Tensor:
        b, c, t, h, w = x.shape
        inner = (time // patch, patch, h // 8, 8 // patch, patch, w // 8, 8 // patch, patch)
        x = x.reshape(b, c, t // time, *inner).permute(0, 1, 2, 5, 8, 3, 6, 9, 4, 7, 10)
        for dim in range(5, 11):
            x = haar(x, dim)
        return x

    plain, model = make(name, front_end="haar"), make(name, front_end="haar", detail_threshold=0.05)
    z = torch.randn(1, 8, 3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    before, after = plain.decode(z).sample[:, :, 1:], model.decode(z).sample[:, :, 1:]
    y = cells(before, 4)
    threshold = 0.05 * plain.config.patch_size
    expected = y**3 / (y**2 + threshold**2)
    expected[..., 0, 0, 0, 0, 0, 0] = y[..., 0, 0, 0, 0, 0, 0]
    assert torch.allclose(cells(after, 4), expected, atol=1e-10)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_shrinkage_flattens_a_faint_pattern_and_leaves_edges() -> None:
    shrink = DetailShrinkage(colours=3, patch=4, time=1, space=2, threshold=0.03)
    patcher = Patcher(4, "haar")
    pattern = torch.randn(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 0.005
    flat = 0.7 + pattern.repeat(1, 1, 5, 2, 3)
    edges = flat.clone()
    edges[..., 3:13, 5:20] = -0.8
    for x, tolerance in ((flat, 5e-4), (edges, 0.05)):
        y = patcher.join(shrink(patcher.split(x, first=True), first=True), first=True)
        clean = torch.where(x < 0, -0.8, 0.7)
        assert (y - clean).abs().max() < tolerance + 0.005 * 0.5
        assert (y - clean).std() < (0.2 if x is flat else 1.5) * (x - clean).std()


def test_shortcut_fit_refuses_what_it_cannot_do() -> None:
    with pytest.raises(WaltError, match="block_shortcut=True"):
        make("patch4").fit_block_shortcut([clip()])
    with pytest.raises(WaltError, match="add a shape with more frames"):
        make("patch4", block_shortcut=True).fit_block_shortcut([clip(1)])


def test_lapped_shortcut_is_the_best_linear_decoder_of_a_neighbourhood() -> None:
    generator = torch.Generator().manual_seed(3)
    videos = torch.rand(40, 3, 9, 24, 16, generator=generator).double() * 2 - 1
    model = make("lapped")
    model.fit_decoder_shortcut(videos.split(10))
    z = model.encode(videos).latent_dist.mode().detach()
    fitted = model.decode(z).sample.detach()

    # Independently: one regression per part, over explicit loops, in pixels.
    padded = torch.nn.functional.pad(z, (1, 1, 1, 1, 0, 0), mode="replicate")
    first, later = [], []
    for i in range(z.shape[3]):
        for j in range(z.shape[4]):
            around = padded[..., i : i + 3, j : j + 3]
            cell = videos[..., 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            first += [(around[b, :, 0].flatten(), cell[b, :, 0].flatten()) for b in range(len(z))]
            later += [
                (around[b, :, t - 1 : t + 1].flatten(), cell[b, :, 4 * t - 3 : 4 * t + 1].flatten())
                for b in range(len(z))
                for t in (1, 2)
            ]
    for pairs, error in ((first, fitted[:, :, :1] - videos[:, :, :1]), (later, fitted[:, :, 1:] - videos[:, :, 1:])):
        x, y = (torch.stack(column) for column in zip(*pairs, strict=True))
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        best = (x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).square().mean()
        assert float(error.square().mean()) == pytest.approx(float(best), rel=1e-3)


def test_lapped_shortcut_keeps_flat_ground_flat_at_the_border() -> None:
    model = make("lapped")
    grey = torch.full((1, 3, 9, 32, 32), 0.3).double()
    y = model.decode(model.encode(grey).latent_dist.mode()).sample
    straight = model.decoder.shortcut
    assert straight is not None
    z = torch.ones(1, 8, 3, 4, 4).double()
    blocks = straight(z)[:, :, 1:]
    assert y.shape == grey.shape
    assert float((blocks - blocks[..., 2:4, 2:4].repeat(1, 1, 1, 4, 4)).abs().max()) < 1e-12


def test_lapped_shortcut_refuses_what_it_cannot_do() -> None:
    with pytest.raises(WaltError, match="shortcut_overlap"):
        make("patch4", shortcut_overlap=1)
    with pytest.raises(WaltError, match="shortcut_overlap of at least 1"):
        make("shortcut").fit_decoder_shortcut([clip()])
    with pytest.raises(WaltError, match="one frame"):
        make("lapped").fit_decoder_shortcut([clip(1)])


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "patch2", "patch4", "lapped"])
def test_held_keyframes_are_images(name: str) -> None:
    model = make(name, block_shortcut=True)
    x = clip(9)
    model.fit_block_shortcut([x, clip(5, 24, 16)])
    model.encoder.silence()
    model.hold_keyframes()
    z = model.encode(x).latent_dist.mode()
    images = [model.encode(x[:, :, frame : frame + 1]).latent_dist.mode() for frame in (0, 4, 8)]
    assert (z - torch.cat(images, dim=2)).abs().max() < 1e-12
    y = model.decode(z).sample
    for place, frames in ((1, y[:, :, 1:5]), (2, y[:, :, 5:])):
        assert (frames - model.decode(images[place]).sample).abs().max() < 1e-12
    with pytest.raises(WaltError, match="block_shortcut=True"):
        make("patch4").hold_keyframes()


@torch.no_grad()
def test_mixing_block_is_convnext_s_with_two_positions_before() -> None:
    torch.manual_seed(0)
    block, x = MixingBlock(6).double(), torch.randn(2, 6, 4, 7, 5).double()
    y = torch.empty_like(x)
    for t in range(4):
        mixed = torch.nn.functional.conv2d(x[:, :, t], block.space.weight, block.space.bias, padding=2, groups=6)
        for ago in (1, 2):
            if t >= ago:
                mixed = mixed + block.time[ago - 1].view(1, -1, 1, 1) * x[:, :, t - ago]
        rows = mixed.movedim(1, -1)
        rows = rows / (rows.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
        hidden = rows @ block.mlp_in.weight.T + block.mlp_in.bias
        hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        y[:, :, t] = x[:, :, t] + (hidden @ block.mlp_out.weight.T + block.mlp_out.bias).movedim(-1, 1)
    assert (block(x)[0] - y).abs().max() < 1e-12


def test_a_frozen_encoder_records_nothing() -> None:
    model = make("mixing")
    model.encoder.requires_grad_(False)
    video, latent = model(clip(5), noise=torch.zeros(1, 8, 2, 2, 3).double(), return_dict=False)
    assert video.requires_grad and not latent.requires_grad
    asked = clip(5).requires_grad_()
    assert model(asked, noise=torch.zeros(1, 8, 2, 2, 3).double(), return_dict=False)[1].requires_grad
