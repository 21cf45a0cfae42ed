"""DiT (arXiv 2212.09748): full attention over all patches of a sample, for images and video latents, on packs.

B samples, C channels, t h w latent frames and size, p patch, L tokens of the pack, D width, N heads, S text states.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from walt.attention import context_attention
from walt.card import HubCardMixin
from walt.dropping import dropped_lengths, kept_tokens
from walt.errors import WaltError
from walt.fused import gated_add, modulate
from walt.latents import Grid, pack_beside, positions, unpack
from walt.models.backbone import (
    Samples,
    check_labels,
    check_latents,
    condition_channels,
    conditions,
    one_of,
    pack_text,
    per_sample,
)
from walt.models.full_attention import FullLayout, full_layout
from walt.models.transformer_walt import WaltAttention

CONDITIONINGS = ("adaln_zero", "cross_attention", "in_context")
POSITIONS = ("2d", "factorised", "spatiotemporal")


class DiTCrossAttnProcessor:
    """Projects, and hands samples to `walt.attention.context_attention`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: DiTCrossAttention, hidden_states: Tensor, context: Tensor, layout: FullLayout) -> Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        if attn.fused_projections:
            key, value = (x.unflatten(-1, (attn.heads, -1)) for x in attn.to_kv(context).chunk(2, dim=-1))
        else:
            key, value = (f(context).unflatten(-1, (attn.heads, -1)) for f in (attn.to_k, attn.to_v))
        out = context_attention(
            query,
            key,
            value,
            layout.lengths,
            layout.contexts,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(1))


class DiTCrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of the tokens of a sample to its conditioning states alone."""

    to_kv: nn.Linear  # made by diffusers' fuse_projections
    _default_processor_cls = DiTCrossAttnProcessor
    _available_processors = [DiTCrossAttnProcessor]

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.use_bias = True  # read by diffusers' fuse_projections
        self.is_cross_attention = True
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.processor: Any = self._default_processor_cls()

    def forward(self, hidden_states: Tensor, context: Tensor, layout: FullLayout) -> Tensor:
        return self.processor(self, hidden_states, context, layout)


class DiTBlock(nn.Module):
    """Attention and MLP. With adaLN-Zero the condition scales, shifts and gates both (section 3.2); else it is a plain
    pre-norm block, with cross-attention between the two in that variant."""

    def __init__(self, width: int, heads: int, ffn_dim: int, conditioning: str) -> None:
        super().__init__()
        adaptive = conditioning == "adaln_zero"
        cross = conditioning == "cross_attention"
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not adaptive)
        self.attn = WaltAttention(width, heads, False, False, None)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if cross else None
        self.cross_attn = DiTCrossAttention(width, heads) if cross else None
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not adaptive)
        self.ff = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.adaln = nn.Linear(width, 6 * width) if adaptive else None

    def forward(
        self, hidden_states: Tensor, context: Tensor | None, embedding: Tensor | None, layout: FullLayout
    ) -> Tensor:
        """One layer: `(L, D)`, cross-attended states end to end `(S, D)`, SiLU of the condition `(B, D)` by place."""
        x, lengths = hidden_states, layout.lengths
        if self.adaln is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(embedding).chunk(6, dim=-1)
            y = modulate(self.norm1(x), scale1, shift1, lengths)
            x = gated_add(x, self.attn(y, None, layout.plan), gate1, lengths)
            y = modulate(self.norm2(x), scale2, shift2, lengths)
            return gated_add(x, self.ff(y), gate2, lengths)
        x = x + self.attn(self.norm1(x), None, layout.plan)
        if self.cross_attn is not None and self.norm_cross is not None:
            x = x + self.cross_attn(self.norm_cross(x), context, layout)
        return x + self.ff(self.norm2(x))


class DiTTransformer3DModel(HubCardMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Predicts v of noisy latents by full attention over every sample; an image is a one-frame video.

    The paper's networks (S, B, L, XL) are in `walt.configs.zoo`. What is told is the timestep, a class and text: in
    "adaln_zero" their sum (of text the mean state) modulates every layer; in "in_context" they are extra tokens; in
    "cross_attention" every layer attends to them.

    Args:
        in_channels: C of the latents.
        out_channels: C of the prediction; None for `in_channels`.
        patch_size: p; h and w of every sample must be multiples of it. Frames are never merged.
        num_layers: blocks.
        num_attention_heads: N; the width D is N * attention_head_dim.
        attention_head_dim: head size.
        ffn_dim: MLP width, None for 4 D.
        text_dim: width of the text states; None for a model without text.
        num_classes: classes; index num_classes is the null label of guidance. None for no class conditioning.
        sample_size: (t, h, w) of the latents it is made for: the pipelines' default. Fixed positions fit any size.
        conditioning: "adaln_zero", "cross_attention" or "in_context".
        positions: fixed sine and cosine of the absolute place. "2d": of row and column (the paper; frames look alike);
            "factorised": the same plus those of the frame over the whole width; "spatiotemporal": a quarter of the
            width for the frame, the rest for row and column.
        learned_variance: C more output channels, the paper's interpolation of the variance. They are no part of v:
            pipelines leave them out, and training adds the variational bound (`walt.diffusion.variance_bound`).
        time_frequency_shift: 0 as in the paper's code; 1 for checkpoints in diffusers' format.
        self_conditioning: C more input channels for the previous estimate of the clean latents.
        frame_conditioning: C + 1 more input channels for given clean frames and their mask.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embedder", "class_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int | None = None,
        patch_size: int = 2,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        ffn_dim: int | None = None,
        text_dim: int | None = None,
        num_classes: int | None = None,
        sample_size: tuple[int, int, int] = (5, 16, 16),
        conditioning: str = "adaln_zero",
        positions: str = "factorised",
        learned_variance: bool = False,
        time_frequency_shift: float = 0.0,
        self_conditioning: bool = False,
        frame_conditioning: bool = False,
    ) -> None:
        super().__init__()
        one_of("conditioning", conditioning, CONDITIONINGS)
        one_of("positions", positions, POSITIONS)
        for name, value in (("num_layers", num_layers), ("patch_size", patch_size)):
            if value < 1:
                raise WaltError(f"{name}: {value} given, at least 1 needed")
        width = num_attention_heads * attention_head_dim
        needed = 4 if positions != "spatiotemporal" else 16
        if width % needed:
            raise WaltError(f"positions: {positions!r} needs a width that {needed} divides, got {width}")
        out = out_channels or in_channels
        self.patch_embed = nn.Linear((in_channels + condition_channels(self.config)) * patch_size**2, width)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=time_frequency_shift)
        self.time_embedder = TimestepEmbedding(256, width)
        self.class_embedder = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.text_embedder = nn.Linear(text_dim, width) if text_dim is not None else None
        self.text_norm = nn.LayerNorm(width, eps=1e-6) if text_dim is not None else None
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(width, num_attention_heads, ffn_dim or 4 * width, conditioning) for _ in range(num_layers)
        )
        adaptive = conditioning == "adaln_zero"
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not adaptive)
        self.adaln_out = nn.Linear(width, 2 * width) if adaptive else None
        self.proj_out = nn.Linear(width, out * (1 + learned_variance) * patch_size**2)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linear layers Xavier uniform with zero bias, classes normal 0.02. The timestep embedder keeps Xavier too (see
        WaltTransformer3DModel)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)

    def close_branches(self) -> None:
        """Zeroes modulation and prediction, so that adaLN-Zero trains from the identity (see WaltTransformer3DModel)."""
        for linear in (self.adaln_out, self.proj_out, *(block.adaln for block in self.transformer_blocks)):
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

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
        """Predicts v, and after it the variance's channels where it learns them; see `Backbone` for the arguments."""
        noisy, config = list(hidden_states), self.config
        check_latents(noisy, config.in_channels, config.patch_size)
        batch, dtype, device = len(noisy), noisy[0].dtype, noisy[0].device
        pieces = [noisy, *conditions(config, noisy, frame_latents, frame_mask, self_conditioning)]
        tokens, grids = pack_beside(pieces, config.patch_size)
        place = _place(grids, self.patch_embed.out_features, config.positions, device)
        dropped = kept_tokens(grids, kept, device)
        if dropped is not None:
            tokens, place = dropped.take(tokens), dropped.take(place)
        x = self.patch_embed(tokens) + place.to(dtype)

        told = [self.time_embedder(self.time_proj(per_sample("timestep", timestep, batch, device)).to(dtype))]
        labels = check_labels(class_labels, config.num_classes, batch, device)
        if self.class_embedder is not None:
            told.append(self.class_embedder(labels))
        flat, lengths = pack_text(encoder_hidden_states, encoder_attention_mask, config.text_dim, batch)
        text: Sequence[Tensor] | None = None
        if flat is not None and self.text_embedder is not None and self.text_norm is not None:
            text = self.text_norm(self.text_embedder(flat.to(dtype))).split(list(lengths or ()))
        counts = dropped_lengths(grids, dropped)
        none = [0] * batch
        if config.conditioning == "adaln_zero":
            layout = full_layout(counts, none, none, device)
            embedding = torch.stack(told).sum(0)
            if text is not None:
                embedding = embedding + torch.stack([part.sum(0) / max(1, len(part)) for part in text])
            embedding, context = F.silu(layout.arrange(embedding)), None
            x = layout.join(x)
        else:
            # One row per thing that is told: the timestep, the class, the words.
            rows = torch.stack(told, dim=1)
            states = [row if text is None else torch.cat([row, text[i]]) for i, row in enumerate(rows)]
            sizes = [len(state) for state in states]
            embedding, context = None, None
            if config.conditioning == "in_context":
                layout = full_layout(counts, sizes, none, device)
                x = layout.join(x, states)
            else:
                layout = full_layout(counts, none, sizes, device)
                x, context = layout.join(x), layout.join_contexts(states)

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, context, embedding, layout)
            else:
                x = block(x, context, embedding, layout)

        x = self.norm_out(x)
        if self.adaln_out is not None:
            shift, scale = self.adaln_out(embedding).chunk(2, dim=-1)
            x = modulate(x, scale, shift, layout.lengths)
        x = self.proj_out(layout.patches(x)).to(dtype)
        out = unpack(x if dropped is None else dropped.put_back(x), grids, config.patch_size)
        sample: Samples = torch.stack(out) if isinstance(hidden_states, Tensor) else out
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _place(grids: tuple[Grid, ...], width: int, kind: str, device: torch.device) -> Tensor:
    """Position embeddings of a pack, `(L, D)` float32."""
    return torch.cat([_grid_place(grid, width, kind, device) for grid in grids])


@lru_cache(maxsize=128)
def _grid_place(grid: Grid, width: int, kind: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        frame, row, column = positions([grid]).double().unbind(1)
        spatial = 3 * width // 4 if kind == "spatiotemporal" else width

        def waves(size: int, place: Tensor) -> Tensor:
            return get_1d_sincos_pos_embed_from_grid(size, place)

        # Columns first, as DiT's code has it.
        space = torch.cat([waves(spatial // 2, column), waves(spatial // 2, row)], dim=1)
        if kind == "spatiotemporal":
            space = torch.cat([waves(width - spatial, frame), space], dim=1)
        elif kind == "factorised":
            space = space + waves(width, frame)
        return space.float().to(device)
