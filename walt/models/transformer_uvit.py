"""U-ViT (arXiv 2209.12152): all inputs are tokens of one sequence, with long skip connections, on packs.

B samples, C channels, t h w latent frames and size, p patch, L tokens of the pack, D width, N heads, S text states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from walt.card import HubCardMixin
from walt.dropping import dropped_lengths, kept_tokens
from walt.errors import WaltError
from walt.latents import Grid, pack_beside, unpack
from walt.models.backbone import (
    Samples,
    check_labels,
    check_latents,
    condition_channels,
    conditions,
    pack_text,
    per_sample,
)
from walt.models.full_attention import FullLayout, full_layout
from walt.models.transformer_walt import WaltAttention


class UViTBlock(nn.Module):
    """A plain pre-norm block; with `skip` it first joins the tokens of an earlier block, concat -> Linear(2 D -> D)."""

    def __init__(self, width: int, heads: int, ffn_dim: int, skip: bool) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = WaltAttention(width, heads, False, False, None)
        # Queries, keys and values have no bias.
        for name in ("to_q", "to_k", "to_v"):
            setattr(self.attn, name, nn.Linear(width, width, bias=False))
        self.attn.use_bias = False
        self.norm2 = nn.LayerNorm(width)
        self.ff = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu")

    def forward(self, hidden_states: Tensor, skip: Tensor | None, layout: FullLayout) -> Tensor:
        """One layer, `(L, D)`; `skip` likewise, from the block that mirrors this one."""
        x = hidden_states
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), None, layout.plan)
        return x + self.ff(self.norm2(x))


class UViTTransformer3DModel(HubCardMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Predicts v of noisy latents from one sequence: the time, the class, the words, the patches.

    The paper's networks are in `walt.configs.zoo`. Nothing is modulated. Positions are learned, one table over the whole
    sequence: its part of patches is the raster of `sample_size`. Another size reads it by bilinear interpolation, a
    longer clip by linear interpolation in time; the first frame, and so an image, is always the table's first frame.

    Args:
        in_channels: C of the latents.
        out_channels: C of the prediction; None for `in_channels`.
        patch_size: p; h and w of every sample must be multiples of it. Frames are never merged.
        num_layers: blocks beside the middle one, an even number: half before it, half after it with skips.
        num_attention_heads: N; the width D is N * attention_head_dim.
        attention_head_dim: head size.
        ffn_dim: MLP width, None for 4 D.
        text_dim: width of the text states; None for a model without text.
        text_length: the most text states of a sample (the paper: CLIP's 77).
        num_classes: classes; index num_classes is the null label of guidance. None for no class conditioning.
        sample_size: (t, h, w) of the latents that the position table is made for.
        mlp_time_embed: an MLP on the sinusoids of the timestep; without it they are the time's token.
        final_conv: a 3x3 convolution on every frame of the prediction, smoothing the borders of patches.
        self_conditioning: C more input channels for the previous estimate of the clean latents.
        frame_conditioning: C + 1 more input channels for given clean frames and their mask.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UViTBlock"]
    _repeated_blocks = ["UViTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "class_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int | None = None,
        patch_size: int = 2,
        num_layers: int = 20,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        ffn_dim: int | None = None,
        text_dim: int | None = None,
        text_length: int = 77,
        num_classes: int | None = None,
        sample_size: tuple[int, int, int] = (5, 16, 16),
        mlp_time_embed: bool = False,
        final_conv: bool = True,
        self_conditioning: bool = False,
        frame_conditioning: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 2 or num_layers % 2:
            raise WaltError(f"num_layers: {num_layers} given, an even number of at least 2 needed")
        if patch_size < 1 or text_length < 1:
            raise WaltError(f"patch_size, text_length: {patch_size}, {text_length} given, at least 1 needed")
        t, h, w = sample_size
        if h % patch_size or w % patch_size:
            raise WaltError(f"sample_size: {h}x{w} given, multiples of patch_size {patch_size} needed")
        width = num_attention_heads * attention_head_dim
        if width % 2:
            raise WaltError(f"attention_head_dim: the width {width} is odd, the sinusoids of time need an even one")
        ffn_dim, heads = ffn_dim or 4 * width, num_attention_heads
        self.grid: Grid = (t, h // patch_size, w // patch_size)
        self.extras = 1 + (num_classes is not None) + (text_length if text_dim is not None else 0)
        out = out_channels or in_channels
        self.patch_embed = nn.Linear((in_channels + condition_channels(self.config)) * patch_size**2, width)
        self.pos_embed = nn.Parameter(torch.zeros(self.extras + self.grid[0] * self.grid[1] * self.grid[2], width))
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(width, 4 * width, out_dim=width) if mlp_time_embed else None
        self.class_embedder = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.text_embedder = nn.Linear(text_dim, width) if text_dim is not None else None
        half = num_layers // 2
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, ffn_dim, False) for _ in range(half))
        self.mid_block = UViTBlock(width, heads, ffn_dim, False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, ffn_dim, True) for _ in range(half))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, out * patch_size**2)
        self.smooth = nn.Conv2d(out, out, 3, padding=1) if final_conv else None
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Normal 0.02 cut at two deviations for linear layers and positions, zero bias; the convolution is torch's."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Samples,
        timestep: Tensor,
        encoder_hidden_states: Samples | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        frame_latents: Samples | None = None,
        frame_mask: Samples | None = None,
        self_conditioning: Samples | None = None,
        kept: Sequence[Tensor | None] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Samples]:
        """Predicts v; see `Backbone` for the arguments."""
        noisy, config = list(hidden_states), self.config
        check_latents(noisy, config.in_channels, config.patch_size)
        batch, dtype, device = len(noisy), noisy[0].dtype, noisy[0].device
        pieces = [noisy, *conditions(config, noisy, frame_latents, frame_mask, self_conditioning)]
        tokens, grids = pack_beside(pieces, config.patch_size)
        tables = {grid: self._table(grid) for grid in dict.fromkeys(grids)}
        place = torch.cat([tables[grid] for grid in grids])
        dropped = kept_tokens(grids, kept, device)
        if dropped is not None:
            if self.smooth is not None:
                raise WaltError("kept: given, but the final convolution needs all tokens; build with final_conv=False")
            tokens, place = dropped.take(tokens), dropped.take(place)
        x = self.patch_embed(tokens) + place

        time = self.time_proj(per_sample("timestep", timestep, batch, device)).to(dtype)
        told = [time if self.time_embedder is None else self.time_embedder(time)]
        labels = check_labels(class_labels, config.num_classes, batch, device)
        if self.class_embedder is not None:
            told.append(self.class_embedder(labels))
        rows = torch.stack(told, dim=1) + self.pos_embed[: len(told)]
        states = list(rows)
        flat, lengths = pack_text(encoder_hidden_states, encoder_attention_mask, config.text_dim, batch)
        if flat is not None and lengths is not None and self.text_embedder is not None:
            if max(lengths) > config.text_length:
                raise WaltError(
                    f"encoder_hidden_states: {max(lengths)} states given, at most {config.text_length} allowed"
                )
            words = self.text_embedder(flat.to(dtype)).split(list(lengths))
            states = [
                torch.cat([row, text + self.pos_embed[len(told) :][: len(text)]])
                for row, text in zip(rows, words, strict=True)
            ]
        counts = dropped_lengths(grids, dropped)
        layout = full_layout(counts, [len(state) for state in states], [0] * batch, device)
        x = layout.join(x, states)

        skips: list[Tensor] = []
        for block in self.in_blocks:
            x = self._run(block, x, None, layout)
            skips.append(x)
        x = self._run(self.mid_block, x, None, layout)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop(), layout)

        x = self.proj_out(self.norm_out(layout.patches(x))).to(dtype)
        out = unpack(x if dropped is None else dropped.put_back(x), grids, config.patch_size)
        if self.smooth is not None:
            out = self._smoothed(out)
        sample: Samples = torch.stack(out) if isinstance(hidden_states, Tensor) else out
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, x: Tensor, skip: Tensor | None, layout: FullLayout) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, x, skip, layout)
        return block(x, skip, layout)

    def _table(self, grid: Grid) -> Tensor:
        """Positions of the patches of a sample, `(t h w, D)`."""
        (frames, rows, columns), (t, h, w) = self.grid, grid
        table = self.pos_embed[self.extras :].unflatten(0, self.grid)
        if (h, w) != (rows, columns):
            images = F.interpolate(table.float().permute(0, 3, 1, 2), size=(h, w), mode="bilinear")
            table = images.permute(0, 2, 3, 1).to(table.dtype)
        if t > frames:
            lines = F.interpolate(table.float().flatten(1).T[None], size=t, mode="linear", align_corners=True)[0]
            table = lines.T.to(table.dtype).unflatten(1, (h, w, -1))
        return table[:t].flatten(0, 2)

    def _smoothed(self, out: list[Tensor]) -> list[Tensor]:
        """The final convolution; frames of one size are one call."""
        assert self.smooth is not None
        result = list(out)
        for size in dict.fromkeys(z.shape[2:] for z in out):
            places = [i for i, z in enumerate(out) if z.shape[2:] == size]
            frames = self.smooth(torch.cat([out[i].transpose(0, 1) for i in places]))
            for i, part in zip(places, frames.split([out[i].shape[1] for i in places]), strict=True):
                result[i] = part.transpose(0, 1)
        return result
