"""Other people's tokenizers behind walt's interface: which are accepted, with which numbers, and why others are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests import tiny
from walt.diffusion import make_scheduler
from walt.errors import WaltError
from walt.latents import denormalize, normalize
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.sampling import decode_latents, encode_video
from walt.tokenizers.adapter import CausalVAE, adapt, load_vae


def wan(**changes: Any) -> Any:
    config = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [2.0, 1.0, 0.5, 1.5],
    }
    return diffusers.AutoencoderKLWan(**{**config, **changes})


def hunyuan15() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        scaling_factor=1.25,
    )


def cosmos() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        latents_mean=[0.5, 1.5, 0.0, 0.0, 1.0, 1.0, 2.0, 4.0],
        latents_std=[1.0] * 8,
    )


def magvit() -> Any:
    return diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def mochi() -> Any:
    return diffusers.AutoencoderKLMochi(
        latent_channels=4,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scaling_factor=2.0,
    )


CAUSAL: dict[str, tuple[Callable[[], Any], int, int]] = {
    "wan": (wan, 8, 4),
    "hunyuan15": (hunyuan15, 8, 4),
    "cosmos": (cosmos, 8, 4),
    "magvit": (magvit, 8, 4),
    "mochi": (mochi, 8, 6),
}


def build(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


def clip(frames: int, side: int) -> Tensor:
    return torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_ones_are_accepted_with_their_ratios_and_normalisation(name: str) -> None:
    make, space, time = CAUSAL[name]
    model = build(make)
    vae = adapt(model)
    assert isinstance(vae, CausalVAE) and vae.vae is model
    assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (space, time)
    assert vae.config.latent_channels == len(vae.config.latents_mean) == len(vae.config.latents_std) == 4
    x = clip(1 + time, 4 * space)
    z = vae.encode(x).latent_dist.mode()
    assert torch.equal(z, model.encode(x).latent_dist.mode())  # raw
    # The model's own formula, written out.
    config = model.config
    mean = torch.tensor(config.get("latents_mean") or [0.0] * 4).view(1, 4, -1, 1, 1).mean(dim=2, keepdim=True)
    std = torch.tensor(config.get("latents_std") or [1.0] * 4).view(1, 4, -1, 1, 1).mean(dim=2, keepdim=True)
    ours = normalize(z, vae.config.latents_mean, vae.config.latents_std)
    assert torch.allclose(ours, (z - mean) / std * config.get("scaling_factor", 1.0), atol=1e-5)
    assert torch.allclose(denormalize(ours, vae.config.latents_mean, vae.config.latents_std), z, atol=1e-5)
    assert vae.decode(z).sample.shape == x.shape
    assert torch.allclose(decode_latents(model, encode_video(model, x)), vae.decode(z).sample.clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=4,
            ),
            "encoder is not prefix-causal",
        ),
        (
            lambda: diffusers.AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1, 1),
                patch_size=1,
                patch_size_t=1,
            ),
            "decoder is not prefix-causal",
        ),
        (
            lambda: diffusers.AutoencoderKLCogVideoX(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=2,
            ),
            "AutoencoderKLCogVideoX",
        ),
        (lambda: diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=4), "AutoencoderKL"),
        (lambda: torch.nn.Linear(2, 2), "Linear given, a video tokenizer"),
    ],
)
def test_others_are_refused_with_the_property_that_failed(make: Callable[[], Any], words: str) -> None:
    model = build(make)
    for _ in range(2):  # the second time from memory
        with pytest.raises(WaltError, match=words):
            adapt(model)


def test_ours_and_none_pass_through() -> None:
    ours = tiny.vae()
    assert adapt(ours) is ours
    assert adapt(None) is None


def test_bad_input_is_answered_and_does_not_spoil_the_model() -> None:
    model = build(magvit)
    vae = adapt(model)
    x = clip(5, 32)
    z = vae.encode(x).latent_dist.mode()
    for bad, words in (
        (clip(4, 32), r"1 \+ 4k frames"),
        (clip(5, 36), "multiples of 8"),
        (x[:, :1], r"\(B, 3, T, H, W\)"),
    ):
        with pytest.raises(WaltError, match=words):
            vae.encode(bad)
    with pytest.raises(WaltError, match=r"latents must be \(B, 4"):
        vae.decode(torch.zeros(1, 5, 1, 4, 4))
    # Left to itself this class keeps half a clip after an exception in the middle of it.
    handle = model.encoder.conv_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        vae.encode(-x)
    handle.remove()
    assert torch.equal(vae.encode(x).latent_dist.mode(), z)


def test_from_a_folder(tmp_path: Path) -> None:
    model = build(wan)
    model.save_pretrained(tmp_path / "wan")
    tiny.vae().save_pretrained(tmp_path / "ours")
    vae = load_vae(str(tmp_path / "wan"))
    x = clip(5, 32)
    assert torch.equal(vae.encode(x).latent_dist.mode(), model.encode(x).latent_dist.mode())
    assert type(load_vae(str(tmp_path / "ours"))).__name__ == "AutoencoderKLWalt"
    with pytest.raises(WaltError, match=r"config\.json is missing"):
        load_vae(str(tmp_path))
    (tmp_path / "wan" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(WaltError, match="UNet2DModel, which is no tokenizer"):
        load_vae(str(tmp_path / "wan"))


def test_walts_pipeline_runs_with_a_wan_tokenizer(tmp_path: Path) -> None:
    """From text to video, and on from a given image; and again after saving and loading."""
    transformer = tiny.transformer(in_channels=4, out_channels=4)
    pipe = tiny.quiet(WaltPipeline(tiny.tokenizer(), tiny.bert(), build(wan), transformer, make_scheduler()))
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    video = pipe("a rocket flies", generator=tiny.seeded(0), **call).frames
    assert video.shape[0] == 1 and video.shape[2:] == (3, 16, 16) and torch.isfinite(video).all()
    pipe.save_pretrained(tmp_path)
    loaded = tiny.quiet(diffusers.DiffusionPipeline.from_pretrained(str(tmp_path)))
    assert type(loaded.vae).__name__ == "AutoencoderKLWan"
    assert torch.allclose(loaded("a rocket flies", generator=tiny.seeded(0), **call).frames, video, atol=1e-4)


def test_wans_pipeline_runs_with_our_tokenizer(tmp_path: Path) -> None:
    """The other way round: diffusers' pipeline with AutoencoderKLWalt in the place of its own; saved and loaded too."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    states = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=8,
        out_channels=8,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    ours = tiny.vae()
    pipe = diffusers.WanPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=UMT5EncoderModel(states).eval(),
        vae=ours,
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    call: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 2}
    call |= {"output_type": "pt", "max_sequence_length": 8}
    video = tiny.quiet(pipe)("a rocket flies", generator=tiny.seeded(0), **call).frames
    assert video.shape == (1, 9, 3, 32, 48) and torch.isfinite(video).all()
    # The pipeline's latents, decoded by hand.
    latents = pipe("a rocket flies", generator=tiny.seeded(0), **{**call, "output_type": "latent"}).frames
    raw = denormalize(latents, ours.config.latents_mean, ours.config.latents_std)
    assert torch.allclose(ours.decode(raw).sample[0].transpose(0, 1).mul(0.5).add(0.5).clamp(0, 1), video[0], atol=1e-5)
    pipe.vae.enable_tiling(16, 16)
    assert torch.allclose(pipe("a rocket flies", generator=tiny.seeded(0), **call).frames, video, atol=1e-4)
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(str(tmp_path))
    assert (loaded.config.z_dim, loaded.config.scale_factor_temporal, loaded.config.scale_factor_spatial) == (8, 4, 8)
    with pytest.raises(WaltError, match="scale_factor_spatial follows from the other fields: 16 given, 8 is right"):
        type(ours).from_config({**ours.config, "scale_factor_spatial": 16, "_use_default_values": []})


def test_chunks_of_a_tokenizer_with_six_frames_a_latent() -> None:
    """Mochi's: chunks of 25 frames that overlap by 7, where walt's own have 17 and 5."""
    pipe = tiny.quiet(
        WaltPipeline(
            tiny.tokenizer(),
            tiny.bert(),
            build(mochi),
            tiny.transformer(in_channels=4, out_channels=4),
            make_scheduler(),
        )
    )
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16}
    for frames in (7, 43):
        video = pipe("a rocket flies", num_frames=frames, generator=tiny.seeded(0), **call).frames
        assert video.shape == (1, frames, 3, 16, 16)
    with pytest.raises(WaltError, match="allowed are 1, 7, 13, 19, 25, then 18 more each"):
        pipe("a rocket flies", num_frames=17, **call)
