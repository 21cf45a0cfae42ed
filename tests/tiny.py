"""Tiny complete components, real ones with random weights, so that pipeline tests need no files and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from walt.diffusion import make_scheduler
from walt.models.transformer_nuwa import NuwaTransformer3DModel
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_nuwa import NuwaPipeline
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
from walt.pipelines.pipeline_walt_condition import WaltConditionPipeline
from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.vq_model_walt import WaltVQModel

WORDS = [
    "a",
    "the",
    "on",
    "in",
    "rocket",
    "cat",
    "dog",
    "flies",
    "jumps",
    "up",
    "down",
    "left",
    "right",
    "purple",
    "red",
    "green",
    "blue",
    "background",
    "very",
    "long",
]
TEXT_DIM = 16
BASE_LATENT = (5, 2, 2)  # frames of 16 x 16 pixels
NUWA: dict[str, Any] = {
    "vocab_size": 16,
    "text_dim": TEXT_DIM,
    "sketch_vocab_size": 8,
    "num_layers_encoder": 1,
    "num_layers_decoder": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "code_dim": None,
    "sample_size": (4, 4, 4),  # frames of 32 x 32 pixels
    "text_length": 32,
}
NUWA_CLASSES = ("background", "rocket", "frog", "sun")


def randomize(model: nn.Module, seed: int) -> Any:
    """Gives every parameter noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval().requires_grad_(False)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; a text is [CLS] words [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )


def bert() -> BertModel:
    """An encoder with learned positions (32 of them)."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,  # words must differ enough for a tiny denoiser to see it
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def t5() -> T5EncoderModel:
    """The paper's kind of encoder, with relative positions."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(WORDS) + 4, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, initializer_factor=1.0
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def vae(temporal_downsample: tuple[bool, ...] = (False,)) -> AutoencoderKLWalt:
    """8x in space and 4x in time (8x with True) with a lossless front end of 4: cheap."""
    torch.manual_seed(2)
    model = AutoencoderKLWalt(
        encoder_widths=(8, 8),
        decoder_widths=(8, 8),
        temporal_downsample=temporal_downsample,
        layers_per_block=1,
        patch_size=4,
        latents_mean=tuple(0.01 * i for i in range(8)),
        latents_std=tuple(0.5 + 0.05 * i for i in range(8)),
    )
    return randomize(model, 2)


def transformer(seed: int = 3, **fields: Any) -> WaltTransformer3DModel:
    """A text-conditional base denoiser; `fields` change its config."""
    config: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_dim": TEXT_DIM,
        "sample_size": BASE_LATENT,
        "spatiotemporal_window": (2, 2),
    }
    torch.manual_seed(seed)
    model = WaltTransformer3DModel(**{**config, **fields})
    model.close_branches()  # nearly a residual stream alone, so that few layers of noise stay tame
    return randomize(model, seed)


def super_resolution_transformer(seed: int = 4, scale: int = 2, **fields: Any) -> WaltTransformer3DModel:
    """The denoiser of a stage that makes `scale` times the base size."""
    size = (BASE_LATENT[0], BASE_LATENT[1] * scale, BASE_LATENT[2] * scale)
    return transformer(seed, **{"low_res_channels": 8, "patch_size": scale, "sample_size": size, **fields})


def base_pipeline(**fields: Any) -> WaltPipeline:
    """Text to video of 16 x 16."""
    return quiet(WaltPipeline(tokenizer(), bert(), vae(), transformer(**fields), make_scheduler()))


def condition_pipeline(**fields: Any) -> WaltConditionPipeline:
    """Every task of a base at 16 x 16."""
    return quiet(WaltConditionPipeline(tokenizer(), bert(), vae(), transformer(**fields), make_scheduler()))


def class_pipeline() -> WaltPipeline:
    """Class to video, without any text encoder."""
    return quiet(WaltPipeline(None, None, vae(), transformer(text_dim=None, num_classes=5), make_scheduler()))


def super_resolution_pipeline(**fields: Any) -> WaltSuperResolutionPipeline:
    """Video to twice its size."""
    model = super_resolution_transformer(**fields)
    return quiet(WaltSuperResolutionPipeline(vae(), model, make_scheduler(), tokenizer(), bert()))


def cascade(**settings: Any) -> WaltCascadePipeline:
    """Three stages: 16, 32 and 64 pixels."""
    settings = {"base_steps": 3, "super_resolution_steps": 2, "base_guidance_scale": 3.0, **settings}
    return quiet(
        WaltCascadePipeline(
            tokenizer(),
            bert(),
            vae(),
            transformer(),
            super_resolution_transformer(4, 2),
            super_resolution_transformer(5, 4),
            make_scheduler(),
            **settings,
        )
    )


def cascade_folder(folder: Path) -> Path:
    """Saves the cascade as a diffusers folder."""
    cascade().save_pretrained(folder)
    return folder


def quiet(pipe: Any) -> Any:
    """Without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    """A generator at `seed`."""
    return torch.Generator().manual_seed(seed)


def vq(seed: int = 5, **fields: Any) -> WaltVQModel:
    """8x in space, 16 codes; codes differ enough for decoded tokens to differ."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "num_vq_embeddings": 16,
        "vq_embed_dim": 4,
        "encoder_widths": (8, 8),
        "decoder_widths": (8, 8),
        "layers_per_block": 1,
        "patch_size": 4,
    }
    return randomize(WaltVQModel(**{**config, **fields}), seed)


def vq_seg(classes: int = 4) -> WaltVQModel:
    """The same for class maps."""
    return vq(6, in_channels=classes, segmentation=True, num_vq_embeddings=8)


def nuwa_transformer(seed: int = 7, **fields: Any) -> NuwaTransformer3DModel:
    """Takes text and sketches; its words differ by their neighbours and conditions."""
    torch.manual_seed(seed)
    return randomize(NuwaTransformer3DModel(**{**NUWA, **fields}), seed)


def nuwa_pipeline(**fields: Any) -> NuwaPipeline:
    """All eight tasks at 32 x 32, up to 4 frames."""
    return quiet(
        NuwaPipeline(
            vq(), vq_seg(), nuwa_transformer(**fields), bert(), tokenizer(), NUWA_CLASSES, num_frames=3, frame_rate=2.0
        )
    )
