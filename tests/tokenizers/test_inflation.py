"""An inflated video tokenizer is its image tokenizer, frame by frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.inflation import inflate
from walt.tokenizers.vq_model_walt import WaltVQModel

SHAPE: dict[str, Any] = {"encoder_widths": (4, 8, 8), "decoder_widths": (8, 4, 8), "layers_per_block": 1}


def causal(temporal: tuple[bool, bool], seed: int, **changes: Any) -> AutoencoderKLWalt:
    torch.manual_seed(seed)
    fields = {**SHAPE, "latent_channels": 6, "temporal_downsample": temporal, **changes}
    return AutoencoderKLWalt(**fields).double().eval()


def frames_model() -> WaltVQModel:
    torch.manual_seed(0)
    model = WaltVQModel(**SHAPE, vq_embed_dim=6, num_vq_embeddings=16, patch_size=1, norm="channel")
    return model.double().eval()


def encode(model: nn.Module, x: Tensor) -> Tensor:
    out: Any = model.encode(x)  # type: ignore[operator]
    return out.latents if isinstance(model, WaltVQModel) else out.latent_dist.mode()


@torch.no_grad()
@pytest.mark.parametrize("temporal", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["causal", "frames"])
def test_inflated_is_the_image_tokenizer_of_every_last_frame(kind: str, temporal: tuple[bool, bool]) -> None:
    image = causal((False, False), 0) if kind == "causal" else frames_model()
    extra: dict[str, Any] = {}
    if kind == "frames":
        extra = {"quantizer": "vq", "quantizer_config": {"size": 16}}
    video = causal(temporal, 1, **extra)
    inflate(image, video)
    ratio = video.temporal_compression_ratio
    x = torch.rand(1, 3, 1 + 2 * ratio, 8, 12, generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    lone = torch.cat([encode(image, x[:, :, t : t + 1]) for t in range(0, x.shape[2], ratio)], dim=2)
    latents = video._encode(x)  # before a quantizer
    assert torch.allclose(latents, lone, atol=1e-12)
    decoded = video._decode(latents)
    for t in range(x.shape[2]):  # every frame is decoded from the latent of its own step
        step = latents[:, :, -(-t // ratio) : -(-t // ratio) + 1]
        alone = image._decode(step)
        assert torch.allclose(decoded[:, :, t : t + 1], alone, atol=1e-12)
    if kind == "frames":
        assert torch.equal(video.encode_indices(x), image.encode_indices(x[:, :, ::ratio]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(WaltError, match="patch_size 1 can be inflated, got 2"):
        inflate(causal((False, False), 0), causal((False, False), 1, patch_size=2))
    with pytest.raises(WaltError, match="other parts"):
        inflate(causal((False, False), 0), causal((False, False), 1, layers_per_block=2))
    with pytest.raises(WaltError, match=r"video: .* is \("):
        inflate(causal((False, False), 0), causal((False, False), 1, latent_channels=8))
