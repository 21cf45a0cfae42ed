"""The W.A.L.T. denoiser (arXiv 2312.06662), on packed sequences of videos and images of any size.

B samples, C channels, t h w latent frames and size, p patch, L tokens of the pack, D width, N heads, S text states.
Inside, a pack is always `(L, D)`; a `(B, C, t, h, w)` batch is a pack of equal grids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from walt.attention import RelativeBias, Window, WindowPlan, plan_windows, rotation, share_plan, window_attention
from walt.card import HubCardMixin
from walt.diffusion import signal_level
from walt.dropping import Kept, drop_from_plan, dropped_lengths, kept_tokens
from walt.errors import WaltError
from walt.fused import add_frames, gated_add, norm_modulate, norm_rotate, sample_index
from walt.latents import Grid, by_runs, pack_beside, runs, runs_of, stacked, to_device, token_counts, unpack
from walt.linear import project
from walt.models.backbone import (
    MLP,
    Samples,
    check_labels,
    check_latents,
    conditions,
    one_of,
    pack_text,
    per_sample,
    samples,
)
from walt.register import context_group, context_parallel_plan, parallel_config_on_cpu


@dataclass(frozen=True, eq=False)
class Layout:
    """What a layer must know of the pack, all of it known on the host: token counts per sample, and window plans."""

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    plan: WindowPlan
    cross_plan: WindowPlan | None
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines in the order of `plan`
    dropped: Kept | None = None  # token dropping: which tokens of `grids` there are
    samples: Tensor | None = None  # the sample of every token, as `sample_index` has it
    padding: int = 0  # context parallelism: rows that the MLP's tokens lack to divide over the ranks


@dataclass(eq=False)
class TextCache:
    """What the text of a pack becomes, kept by the caller from step to step: a new one is empty, the first call fills it.

    It holds the embedded text, and for every layer the keys and values of cross-attention. It belongs to one model, one
    set of texts in one order, and one scale of adapters; make a new one when any of these changes.
    """

    states: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    layers: dict[int, list[Tensor]] = field(default_factory=dict)


class WaltAttnProcessor:
    """Projects, normalises, rotates, and hands windows to `walt.attention.window_attention`."""

    _attention_backend = None
    _parallel_config = (
        None  # set by `enable_parallelism`; a rank has whole windows, see `WaltTransformer3DModel._layout`
    )

    def __call__(
        self,
        attn: WaltAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        plan: WindowPlan,
        rotary: tuple[Tensor, Tensor] | None = None,
        text_pair: list[Tensor] | None = None,
    ) -> Tensor:
        x = plan.gather(hidden_states)
        first = plan.singles  # tokens alone in their window need no query and no key
        rest = x[first:] if first else x
        if not attn.fused_projections:
            query, key, value = project(attn.to_q, rest), project(attn.to_k, rest), project(attn.to_v, x)
        elif attn.is_cross_attention:
            key, value = project(attn.to_kv, x).chunk(2, dim=-1)
            query, key = project(attn.to_q, rest), key[first:]
        else:
            query, key, value = project(attn.to_qkv, x).chunk(3, dim=-1)
            query, key = query[first:], key[first:]
        value = attn.split_heads(value)
        query, key = attn.split_heads(query), attn.split_heads(key)
        if rotary is not None:
            cos, sin = rotary[0][first:], rotary[1][first:]
            query, key = norm_rotate(attn.norm_q, query, cos, sin), norm_rotate(attn.norm_k, key, cos, sin)
        else:
            query, key = attn.norm_q(query), attn.norm_k(key)

        context_key = context_value = None
        if text_pair:
            context_key, context_value = text_pair
        elif encoder_hidden_states is not None:
            if attn.fused_projections:
                context_key, context_value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            else:
                context_key, context_value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            context_key = attn.norm_k(attn.split_heads(context_key)).to(value.dtype)
            context_value = attn.split_heads(context_value)
            if text_pair is not None:
                text_pair += [context_key, context_value]

        out = window_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            plan,
            context_key=context_key,
            context_value=context_value,
            bias=attn.relative_bias,
            backend=self._attention_backend,
        )
        return plan.scatter(project(attn.to_out[0], out.flatten(1)))


class WaltAttention(nn.Module, AttentionModuleMixin):
    """Windowed attention over a pack `(L, D)`.

    With text `(S, D)` it is the paper's cross-attention: queries are the tokens of a window, keys and values the
    concatenation of the same tokens and the text of their sample, through one projection. Positions act on tokens
    against tokens of self-attention only: cross-attention has neither rotation nor bias, as text has no place.
    """

    to_qkv: nn.Linear  # made by diffusers' fuse_projections, as to_kv is
    to_kv: nn.Linear
    _default_processor_cls = WaltAttnProcessor
    _available_processors = [WaltAttnProcessor]

    def __init__(
        self, width: int, heads: int, qk_norm: bool, is_cross_attention: bool, relative_bias: RelativeBias | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.use_bias = True  # read by diffusers' fuse_projections
        self.is_cross_attention = is_cross_attention
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        # Per head (ViT-22B); LayerNorm, as the paper's reference has it.
        self.norm_q = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.relative_bias = relative_bias
        self.processor: Any = self._default_processor_cls()

    def split_heads(self, x: Tensor) -> Tensor:
        """`(rows, D)` to `(rows, N, D / N)`."""
        return x.unflatten(-1, (self.heads, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        plan: WindowPlan,
        rotary: tuple[Tensor, Tensor] | None = None,
        text_pair: list[Tensor] | None = None,
    ) -> Tensor:
        """Attention of `(L, D)`; `text_pair` is a layer of a TextCache, [] to be filled with the text's key and value."""
        return self.processor(self, hidden_states, encoder_hidden_states, plan, rotary, text_pair)


class LocalMixing(nn.Module):
    """Adds to every token a learned sum, channel by channel, of its neighbours: 3x3 in space, 3 in time.

    No token sees another sample. It starts as the identity.
    """

    _mixed: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.time = nn.Parameter(torch.zeros(2, width))  # from the frame before, from the frame after

    def forward(self, x: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """`(L, D)` of a pack of `grids` to `(L, D)`."""
        found = runs_of(grids)
        if len(found) == len(set(grids)):  # equal grids lie side by side
            sizes = [(run.stop - run.start) * math.prod(grids[run.start]) for run in found]
            mixed = [
                self._mix(part.view(run.stop - run.start, *grids[run.start], -1)).flatten(0, 3)
                for run, part in zip(found, x.split(sizes), strict=True)
            ]
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        parts: list[Tensor] = list(x.split(list(token_counts(grids))))
        for grid in dict.fromkeys(grids):
            places = [i for i, other in enumerate(grids) if other == grid]
            y = torch.stack([parts[i] for i in places]).unflatten(1, grid)
            for i, part in zip(places, self._mix(y).flatten(1, 3).unbind(), strict=True):
                parts[i] = part
        return torch.cat(parts)

    def among(self, x: Tensor, grids: tuple[Grid, ...], dropped: Kept) -> Tensor:
        """`(K, D)` of the kept tokens: a neighbour that was dropped adds nothing, as one beyond the border."""
        return dropped.take(self(dropped.put_back(x), grids))

    def _mix(self, y: Tensor) -> Tensor:
        """`(B, t, h, w, D)`."""
        if self._mixed is not None:
            return self._mixed(y, self.space.weight, self.time)
        mixed = self.space(y.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, y.shape[:2])
        # A lone frame has no neighbour in time, but `time` must have its gradient, of zeros: FSDP reduces it on all ranks.
        return add_frames(mixed, y, self.time)

    def compile_apart(self) -> None:
        """Compiles the mixing as graphs of its own: those of a block would be made anew for every set of grids.

        On a GPU as shifted sums, which become one kernel, where a depthwise convolution and its gradients are slow.
        """
        self._mixed = _compiled_neighbours()


def _neighbours(y: Tensor, weight: Tensor, time: Tensor) -> Tensor:
    """`LocalMixing._mix` of `(B, t, h, w, D)` with `weight` `(D, 1, 3, 3)` and `time` `(2, D)`, in plain sums."""
    _, _, h, w, _ = y.shape
    around = F.pad(y, (0, 0, 1, 1, 1, 1))
    mixed = torch.zeros_like(y)
    for row, column in itertools.product(range(3), range(3)):
        mixed = mixed + around[:, :, row : row + h, column : column + w] * weight[:, 0, row, column]
    return add_frames(mixed, y, time)


@lru_cache(maxsize=1)
def _compiled_neighbours() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(_neighbours)
    return compiled


@torch.compiler.disable
def _mix_apart(local: LocalMixing, x: Tensor, layout: Layout) -> Tensor:
    """`local` of a pack, outside of the graph that calls it: it needs the grids, which differ from pack to pack."""
    return local(x, layout.grids) if layout.dropped is None else local.among(x, layout.grids, layout.dropped)


class _WaltBlock(nn.Module):
    """Windowed self-attention, cross-attention to text, MLP; the two kinds differ in the windows of their layout.

    AdaLN gives six vectors per sample: scale and shift of the inputs of attention and MLP, and a gate on their
    outputs. Cross-attention has its own norm and, being outside the six, no gate: its output projection starts at 0.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_dim: int,
        qk_norm: bool,
        cross_attention: bool,
        relative_bias: RelativeBias | None,
        adaln: str,
        rank: int,
        local_mixing: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = WaltAttention(width, heads, qk_norm, False, relative_bias)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if cross_attention else None
        self.cross_attn = WaltAttention(width, heads, qk_norm, True, None) if cross_attention else None
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.local = LocalMixing(width) if local_mixing else None
        self.ff = MLP(width, ffn_dim)
        self.adaln = nn.Linear(width, 6 * width) if adaln == "full" else None
        self.adaln_down = nn.Linear(width, rank, bias=False) if adaln == "lora" else None
        self.adaln_up = nn.Linear(rank, 6 * width, bias=False) if adaln == "lora" else None

    def _layer(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        embedding: Tensor,
        modulation: Tensor | None,
        layout: Layout,
        text_pair: list[Tensor] | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            hidden_states: `(L, D)`.
            encoder_hidden_states: text of all samples end to end `(S, D)`, or None.
            embedding: `(B, D)`, the paper's c + t.
            modulation: `(B, 6 D)`, A_1 of AdaLN-LoRA; None when every layer has its own.
            layout: the windows.
            text_pair: this layer's entry of a TextCache, None for none.
        """
        if self.adaln is not None:
            modulation = self.adaln(F.silu(embedding))
        elif self.adaln_down is not None and self.adaln_up is not None:
            modulation = modulation + self.adaln_up(self.adaln_down(embedding))  # A_i = A_1 + W_b W_a (c + t)
        assert modulation is not None
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        x = hidden_states
        y = norm_modulate(self.norm1, x, scale1, shift1, layout.lengths, layout.samples)
        x = gated_add(x, self.attn(y, None, layout.plan, layout.rotation), gate1, layout.lengths, layout.samples)
        if self.cross_attn is not None and self.norm_cross is not None:
            x = x + self.cross_attn(self.norm_cross(x), encoder_hidden_states, layout.cross_plan, text_pair=text_pair)
        y = norm_modulate(self.norm2, x, scale2, shift2, layout.lengths, layout.samples)
        if self.local is not None and self.local._mixed is not None:
            y = _mix_apart(self.local, y, layout)
        elif self.local is not None:
            dropped = layout.dropped
            y = self.local(y, layout.grids) if dropped is None else self.local.among(y, layout.grids, dropped)
        y = self.ff(F.pad(y, (0, 0, 0, layout.padding)))[: len(y)] if layout.padding else self.ff(y)
        return gated_add(x, y, gate2, layout.lengths, layout.samples)


# Each kind has a `forward` of its own: torch.compile counts what it compiled by function, so of one they would use up
# each other's limit.


class WaltSpatialBlock(_WaltBlock):
    """Attends inside a frame: windows 1 x h' x w', the whole frame by default."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        embedding: Tensor,
        modulation: Tensor | None,
        layout: Layout,
        text_pair: list[Tensor] | None = None,
    ) -> Tensor:
        """As `_layer`."""
        return self._layer(hidden_states, encoder_hidden_states, embedding, modulation, layout, text_pair)


class WaltSpatioTemporalBlock(_WaltBlock):
    """Attends across frames: windows t x h' x w'; an image is passed by the identity rule."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        embedding: Tensor,
        modulation: Tensor | None,
        layout: Layout,
        text_pair: list[Tensor] | None = None,
    ) -> Tensor:
        """As `_layer`."""
        return self._layer(hidden_states, encoder_hidden_states, embedding, modulation, layout, text_pair)


class WaltPositionEmbedding(nn.Module):
    """Learned absolute positions: a space table plus a time table (papers 1.3).

    A frame of another size reads the space table by bilinear interpolation; a clip longer than the time table
    reads it by linear interpolation. The first frame, and so an image, always has time position 0.
    """

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.space = nn.Parameter(torch.zeros(grid[1] * grid[2], width))
        self.time = nn.Parameter(torch.zeros(grid[0], width))

    @torch.no_grad()
    def start(self) -> None:
        """Sine and cosine of column, row (of three quarters of the width, half each) and frame (of the rest).

        Frequencies go from half a wave over the table to half a wave from one entry to the next, evenly in octaves:
        those of language models (up to 10,000 entries a wave) hardly tell the few entries of a latent apart.
        """
        frames, rows, columns = self.grid
        width = self.space.shape[1]
        half = 3 * width // 16 * 2

        def waves(size: int, count: int) -> Tensor:
            place = torch.arange(count, device=self.space.device) + 0.5
            octaves = torch.linspace(1, 0, -(-size // 2), device=place.device)
            angle = place[:, None] * (math.pi * max(1, count) ** -octaves)
            return torch.cat([angle.cos(), angle.sin()], dim=1)[:, :size]

        self.space.zero_()
        self.space[:, :half] = waves(half, columns).repeat(rows, 1)
        self.space[:, half : 2 * half] = waves(half, rows).repeat_interleave(columns, 0)
        self.time.zero_()
        self.time[:, 2 * half :] = waves(width - 2 * half, frames)

    def forward(self, grids: tuple[Grid, ...]) -> Tensor:
        """Embeddings `(L, D)` of a pack."""
        tables = {grid: self._table(*grid) for grid in dict.fromkeys(grids)}
        return torch.cat([tables[grid] for grid in grids])

    def _table(self, t: int, h: int, w: int) -> Tensor:
        frames, rows, columns = self.grid
        space: Tensor = self.space
        time: Tensor = self.time
        if (h, w) != (rows, columns):
            image = space.float().T.reshape(1, -1, rows, columns)
            space = F.interpolate(image, size=(h, w), mode="bilinear").flatten(2)[0].T.to(space.dtype)
        if t > frames:
            time = F.interpolate(time.float().T[None], size=t, mode="linear", align_corners=True)[0].T.to(time.dtype)
        return (time[:t, None] + space[None]).flatten(0, 1)


class NearestConv2d(nn.Conv2d):
    """3x3 depth-to-space convolution whose taps sum to nearest-neighbour upsampling: flat latents stay as they are.

    A module of its own, so that what offloads or casts weights around module calls finds them used in one.
    """

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__(channels, channels * scale**2, 3, bias=False)
        self.scale = scale

    def forward(self, frames: Tensor) -> Tensor:
        """Frames `(B, C, h + 2, w + 2)`, padded by their neighbours, to `(B, C * scale^2, h, w)`."""
        nearest = torch.eye(self.in_channels, dtype=self.weight.dtype, device=self.weight.device)
        nearest = nearest.repeat_interleave(self.scale**2, dim=0)
        missing = nearest - self.weight.sum(dim=(2, 3))
        return F.conv2d(frames, self.weight + F.pad(missing[:, :, None, None], (1, 1, 1, 1)))


class WaltTransformer3DModel(
    HubCardMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin, AttentionMixin
):
    """Predicts v of noisy latents, layer by layer alternating spatial and spatiotemporal windows.

    Args:
        in_channels: C of the latents.
        out_channels: C of the prediction.
        patch_size: p; h and w of every sample must be multiples of it.
        num_layers: single layers, spatial first, then alternating (papers 1.7: "layers").
        num_attention_heads: N; the width D is N * attention_head_dim.
        attention_head_dim: head size (even for "rope").
        ffn_dim: MLP width, None for 4 D.
        text_dim: width of the text states; None for a model without cross-attention.
        num_classes: classes; index num_classes is the null label of guidance. None for no class conditioning.
        adaln_rank: r of AdaLN-LoRA; None for a full AdaLN per layer.
        qk_norm: LayerNorm on queries and keys, per head.
        sample_size: (t, h, w) of the latents the position tables are made for; other sizes interpolate.
        absolute_positions: learned space + time tables on the tokens.
        relative_positions: "bias" (Swin's table per layer; needs an attention backend that takes a mask), "rope"
            (3D axial, any backend) or None. Acts in self-attention only.
        spatial_window: (h, w) in tokens, None for the whole frame.
        spatiotemporal_window: (h, w) over the whole length, or (t, h, w), in tokens; None for everything.
        cross_attention_window: "spatial" (papers: joint image-video training) or "same" as the layer's own window.
        self_conditioning: C more input channels for the previous estimate of the clean latents.
        frame_conditioning: C + 1 more input channels for given clean frames and their mask.
        low_res_channels: channels of low-resolution latents (super-resolution), None for none.
        low_res_scale: how much smaller their h and w are.
        image_identity: one-frame samples pass spatiotemporal attention by the identity rule. False (an image-only
            model) gives them the spatial part of the window instead.
        pooled_text: the mean text state joins c + t as well (not in the paper). Without it a narrow model carries what
            all tokens share, such as a background, in the residual stream, where it drowns what tokens differ in.
        local_mixing: the MLP reads its token and a learned sum of the neighbours (not in the paper): what lies side by
            side agrees long before attention has learnt where things are.
        sigma_data: preconditioning (not in the paper; EDM, arXiv 2206.00364 section 5, written for v): the network
            estimates clean latents as if they spread `sigma_data` around its estimate, and v follows from that and the
            noisy latents, so that noise need not pass the layers. With low-resolution latents, their upsampled form is
            added to the estimate. None: the network gives v itself.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WaltSpatialBlock", "WaltSpatioTemporalBlock"]
    _repeated_blocks = ["WaltSpatialBlock", "WaltSpatioTemporalBlock"]
    _skip_keys = ["text_cache"]  # filled in place: offload hooks must not pass a copy
    # The MLP's tokens are split over the ranks by diffusers; the windows of attention by `_layout`, since a rank must
    # have whole ones, of any sizes.
    _cp_plan = context_parallel_plan("transformer_blocks.*.ff", "hidden_states", "transformer_blocks.*.ff.net.2")
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "pos_embed",
        "time_embedder",
        "noise_level_embedder",
        "class_embedder",
        "low_res_embed",
        "relative_bias",
        "norm",
    ]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 8,
        patch_size: int = 1,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        ffn_dim: int | None = None,
        text_dim: int | None = None,
        num_classes: int | None = None,
        adaln_rank: int | None = 2,
        qk_norm: bool = True,
        sample_size: tuple[int, int, int] = (5, 16, 16),
        absolute_positions: bool = True,
        relative_positions: str | None = "bias",
        spatial_window: tuple[int, int] | None = None,
        spatiotemporal_window: tuple[int, ...] | None = (8, 8),
        cross_attention_window: str = "spatial",
        self_conditioning: bool = True,
        frame_conditioning: bool = True,
        low_res_channels: int | None = None,
        low_res_scale: int = 2,
        image_identity: bool = True,
        pooled_text: bool = False,
        local_mixing: bool = False,
        sigma_data: float | None = None,
    ) -> None:
        super().__init__()
        one_of("relative_positions", relative_positions, ("bias", "rope", None))
        one_of("cross_attention_window", cross_attention_window, ("spatial", "same"))
        for name, value in (("num_layers", num_layers), ("patch_size", patch_size), ("low_res_scale", low_res_scale)):
            if value < 1:
                raise WaltError(f"{name}: {value} given, at least 1 needed")
        if adaln_rank is not None and adaln_rank < 1:
            raise WaltError(f"adaln_rank: {adaln_rank} given, at least 1 needed, or None for a full AdaLN per layer")
        if relative_positions == "rope" and attention_head_dim % 2:
            raise WaltError(f"attention_head_dim: {attention_head_dim} given, an even number needed for rope")
        frames, height, width_ = sample_size
        if height % patch_size or width_ % patch_size:
            raise WaltError(f"sample_size: {height}x{width_} given, multiples of patch_size {patch_size} needed")
        grid = (frames, height // patch_size, width_ // patch_size)
        self._spatial = _window("spatial_window", spatial_window, 1, (2,))
        self._spatiotemporal = _window("spatiotemporal_window", spatiotemporal_window, None, (2, 3))

        width = num_attention_heads * attention_head_dim
        ffn_dim = ffn_dim or 4 * width
        channels = in_channels * (1 + self_conditioning + frame_conditioning) + frame_conditioning
        self.low_res_embed: nn.Conv2d | None = None
        self.noise_level_embedder: TimestepEmbedding | None = None
        if low_res_channels is not None:
            channels += low_res_channels
            large = low_res_channels * low_res_scale**2
            if sigma_data is None:
                self.low_res_embed = nn.Conv2d(low_res_channels, large, 3, padding=1)
            else:
                self.low_res_embed = NearestConv2d(low_res_channels, low_res_scale)
                # A lone first frame's latent is of another kind than one of four frames.
                self.low_res_embed_first = NearestConv2d(low_res_channels, low_res_scale)
            self.noise_level_embedder = TimestepEmbedding(256, width)
        self.patch_embed = nn.Linear(channels * patch_size**2, width)
        self.pos_embed = WaltPositionEmbedding(grid, width) if absolute_positions else None
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, width)
        self.class_embedder = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.text_embedder = nn.Linear(text_dim, width) if text_dim is not None else None
        if sigma_data is not None and (sigma_data <= 0 or out_channels != in_channels):
            raise WaltError(
                f"sigma_data: {sigma_data} given with {in_channels} channels in and {out_channels} out, a positive number "
                "and equal channels needed, or None"
            )
        if sigma_data is not None and low_res_channels not in (None, out_channels):
            raise WaltError(
                f"sigma_data: low_res_channels must be out_channels ({out_channels}), got {low_res_channels}"
            )
        if pooled_text and text_dim is None:
            raise WaltError("pooled_text: True given, but text_dim is None")
        self.text_norm = nn.LayerNorm(width, eps=1e-6) if text_dim is not None else None
        self.adaln = nn.Linear(width, 6 * width) if adaln_rank is not None else None

        blocks: list[_WaltBlock] = []
        for i in range(num_layers):
            kind = WaltSpatioTemporalBlock if i % 2 else WaltSpatialBlock
            window = self._spatiotemporal if i % 2 else self._spatial
            bias = None
            if relative_positions == "bias":
                t, h, w = (size if n is None else n for n, size in zip(window, grid, strict=True))
                bias = RelativeBias(num_attention_heads, (t, h, w), resize=window[1] is None)
            adaln = "full" if adaln_rank is None else "lora" if i else "shared"
            blocks.append(
                kind(
                    width,
                    num_attention_heads,
                    ffn_dim,
                    qk_norm,
                    text_dim is not None,
                    bias,
                    adaln,
                    adaln_rank or 0,
                    local_mixing,
                )
            )
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaln_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, out_channels * patch_size**2)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Random initial values, in one place. Draws nothing on the meta device.

        Linear layers are Xavier uniform with zero bias; small embeddings normal 0.02. Positions start as sine and cosine,
        as large as the noisy latents beside them: at high noise, where it is decided what happens where, a token knows
        its place by them alone, and tables of order 0.02 grow too slowly to be heard.
        Not DiT's normal 0.02 for the timestep embedders: an embedding of order 0.02 makes the modulation learn the
        noise level some ten times slower, and v-prediction needs gains of 1 / sigma at low noise.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            self.pos_embed.start()
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)
        # Unit variance from the noisy latents alone: the other input channels are mostly zeros.
        nn.init.normal_(self.patch_embed.weight, std=(self.config.in_channels * self.config.patch_size**2) ** -0.5)
        for block in self.transformer_blocks:
            assert isinstance(block, _WaltBlock)
            if block.adaln_down is not None:
                nn.init.normal_(block.adaln_down.weight, std=0.02)
            if block.attn.relative_bias is not None:
                nn.init.normal_(block.attn.relative_bias.table, std=0.02)

    def close_branches(self) -> None:
        """Zeroes what ends a residual branch (gates, cross-attention output, mixing, prediction): the start of training.

        The model is then the identity with output 0 (adaLN-Zero), or nearest-neighbour upsampling where `sigma_data`
        estimates clean latents from low-resolution ones. `walt train` does this to a model it builds; a new model has
        open branches, as models of diffusers do, so that adapters and caches have an effect on it.
        """
        if self.config.sigma_data is not None and self.low_res_embed is not None:
            nn.init.zeros_(self.low_res_embed.weight)
            nn.init.zeros_(self.low_res_embed_first.weight)
        zero: list[nn.Module | None] = [self.adaln, self.adaln_out, self.proj_out]
        for block in self.transformer_blocks:
            assert isinstance(block, _WaltBlock)
            zero += [block.adaln, block.adaln_up]
            if block.cross_attn is not None:
                zero.append(block.cross_attn.to_out[0])
            if block.local is not None:
                nn.init.zeros_(block.local.space.weight)
                nn.init.zeros_(block.local.time)
        for linear in zero:
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def _resolve_parallel_config(self, config: Any) -> Any:
        return parallel_config_on_cpu(self, config) or super()._resolve_parallel_config(config)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Samples,
        timestep: Tensor,
        encoder_hidden_states: Samples | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        low_res_hidden_states: Samples | None = None,
        low_res_noise_level: Tensor | None = None,
        frame_latents: Samples | None = None,
        frame_mask: Samples | None = None,
        self_conditioning: Samples | None = None,
        kept: Sequence[Tensor | None] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        text_cache: TextCache | None = None,
    ) -> Transformer2DModelOutput | tuple[Samples]:
        """Predicts v.

        Args:
            hidden_states: noisy latents `(B, C, t, h, w)`, or a list of `(C, t, h, w)` of any sizes (a pack).
            timestep: `(B,)`, float or int, 0..999.
            encoder_hidden_states: text states `(B, S, text_dim)`, or a list of `(S_i, text_dim)`.
            encoder_attention_mask: `(B, S)` bool or int with a batch of text states; states at 0 are left out
                altogether. None when every state counts.
            class_labels: `(B,)` long in 0..num_classes; num_classes is the null label.
            low_res_hidden_states: `(B, low_res_channels, t, h / low_res_scale, w / low_res_scale)` or a list.
            low_res_noise_level: `(B,)`, the noise of the low-resolution latents, in units of `timestep`.
            frame_latents: clean latents like `hidden_states`, used where the mask is 1; None for no given frame.
            frame_mask: `(B, 1, t, h, w)` or a list of `(1, t, h, w)`, 1 where a latent is given.
            self_conditioning: the previous estimate of the clean latents, like `hidden_states`; None for zeros.
            kept: token dropping in training: per sample which tokens are computed, bool `(t, h / p, w / p)` on the CPU,
                or None for all; at dropped places the network's output is 0.
            attention_kwargs: {"scale": LoRA scale}.
            return_dict: `Transformer2DModelOutput(sample=)` or a 1-tuple.
            text_cache: with it the text is embedded and projected in the first of the calls that share it; the later
                ones do not look at `encoder_hidden_states`. For sampling: without gradients.

        Returns:
            v in the form and dtype of `hidden_states`, with `out_channels`.

        Raises:
            WaltError: an argument that the model needs is missing, one it cannot use is given, or shapes disagree.
        """
        noisy = list(hidden_states)
        check_latents(noisy, self.config.in_channels, self.config.patch_size)
        batch, dtype, device = len(noisy), noisy[0].dtype, noisy[0].device

        pieces = [noisy]
        pieces += conditions(self.config, noisy, frame_latents, frame_mask, self_conditioning)
        large = self._low_resolution(noisy, low_res_hidden_states)
        pieces += large
        tokens, grids = pack_beside(pieces, self.config.patch_size)
        dropped = kept_tokens(grids, kept, device)
        x = self.patch_embed(tokens if dropped is None else dropped.take(tokens))
        if self.pos_embed is not None:
            place = self.pos_embed(grids)
            x = x + (place if dropped is None else dropped.take(place))

        embedding = self._embedding(batch, dtype, device, timestep, class_labels, low_res_noise_level)
        if text_cache is not None and torch.is_grad_enabled():
            raise WaltError("text_cache: given with gradients enabled, it is for sampling (torch.no_grad)")
        text_lengths: tuple[int, ...] | None
        if text_cache is not None and text_cache.lengths is not None:
            if len(text_cache.lengths) != batch:
                raise WaltError(
                    f"text_cache: holds the text of {len(text_cache.lengths)} samples, {batch} latents given"
                )
            text, text_lengths = text_cache.states, text_cache.lengths
        else:
            text, text_lengths = self._text(batch, dtype, encoder_hidden_states, encoder_attention_mask)
            if text_cache is not None:
                text_cache.states, text_cache.lengths = text, text_lengths
        if self.config.pooled_text and text is not None and text_lengths is not None:
            embedding = embedding + _pooled(text, text_lengths)
        modulation = self.adaln(F.silu(embedding)) if self.adaln is not None else None

        layouts: dict[tuple[int, int], Layout] = {}
        for i, block in enumerate(self.transformer_blocks):
            kind = (i % 2, i // 2 % 2)  # spatial or spatiotemporal; successive layers of a kind alternate their shift
            if kind not in layouts:
                layouts[kind] = self._layout(grids, text_lengths, device, *kind, dropped)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, text, embedding, modulation, layouts[kind])
            else:
                pair = None if text_cache is None or text is None else text_cache.layers.setdefault(i, [])
                x = block(x, text, embedding, modulation, layouts[kind], pair)

        scale, shift = self.adaln_out(F.silu(embedding)).chunk(2, dim=-1)
        lengths = dropped_lengths(grids, dropped)
        x = norm_modulate(self.norm_out, x, scale, shift, lengths, _samples_of(lengths, device))
        x = self.proj_out(x).to(dtype)
        out = unpack(x if dropped is None else dropped.put_back(x), grids, self.config.patch_size)
        if self.config.sigma_data is not None:
            levels = per_sample("timestep", timestep, batch, device)
            out = self._precondition(out, noisy, large, low_res_hidden_states, levels)
        sample: Samples = torch.stack(out) if isinstance(hidden_states, Tensor) else out
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _layout(
        self,
        grids: tuple[Grid, ...],
        text_lengths: tuple[int, ...] | None,
        device: torch.device,
        temporal: int,
        odd: int,
        dropped: Kept | None,
    ) -> Layout:
        config = self.config
        identity = bool(temporal) and config.image_identity
        window = self._spatiotemporal if temporal else self._spatial
        by_shape = config.relative_positions == "bias"
        shift = _half(window) if odd else (0, 0, 0)
        group = context_group(self)
        place = partial(_place, kept=dropped, device=device, group=group)
        plan = place(plan_windows(grids, window, shift, identity_images=identity, by_shape=by_shape))
        cross_plan = None
        if text_lengths is not None:
            if config.cross_attention_window == "spatial":
                window, identity = self._spatial, False
                shift = _half(window) if odd else (0, 0, 0)
            cross_plan = place(plan_windows(grids, window, shift, identity_images=identity, contexts=text_lengths))
        rotary = None
        if config.relative_positions == "rope":
            cos, sin = rotation(grids, config.attention_head_dim, device)
            if dropped is not None:
                cos, sin = dropped.take(cos), dropped.take(sin)
            rotary = (plan.gather(cos), plan.gather(sin))
        lengths = dropped_lengths(grids, dropped)
        padding = 0 if group is None else -sum(lengths) % group.size()
        return Layout(lengths, grids, plan, cross_plan, rotary, dropped, _samples_of(lengths, device), padding)

    def _low_resolution(self, noisy: list[Tensor], low_res: Samples | None) -> list[list[Tensor]]:
        """Depth-to-space convolution of the low-resolution latents, frame by frame (papers 1.6)."""
        if self.low_res_embed is None:
            if low_res is not None:
                raise WaltError("low_res_hidden_states: given, but the model was built with low_res_channels=None")
            return []
        if low_res is None:
            raise WaltError("low_res_hidden_states: missing, this super-resolution model needs low-resolution latents")
        scale, channels = self.config.low_res_scale, self.config.low_res_channels
        for i, z in enumerate(noisy):
            if z.shape[2] % scale or z.shape[3] % scale:
                raise WaltError(
                    f"hidden_states: sample {i} is {z.shape[2]}x{z.shape[3]}, multiples of low_res_scale {scale} needed"
                )
        sizes = [(channels, z.shape[1], z.shape[2] // scale, z.shape[3] // scale) for z in noisy]
        small = samples("low_res_hidden_states", low_res, sizes, noisy)
        return [by_runs(self._upsample, small)]

    def _upsample(self, small: Tensor) -> Tensor:
        """`(B, C, t, h, w)` -> `(B, C, t, scale*h, scale*w)`."""
        assert self.low_res_embed is not None
        frames = small.transpose(1, 2)
        if self.config.sigma_data is None:
            large = self.low_res_embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        else:
            padded = F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate").unflatten(0, frames.shape[:2])
            first = self.low_res_embed_first(padded[:, 0])[:, None]
            later = self.low_res_embed(padded[:, 1:].flatten(0, 1))
            large = torch.cat([first, later.unflatten(0, padded[:, 1:].shape[:2])], dim=1)
        return F.pixel_shuffle(large, self.config.low_res_scale).transpose(1, 2)

    @torch.no_grad()
    def fit_low_res_embed(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Puts the least-squares map of low- to high-resolution latents into the depth-to-space convolutions.

        Training of a super-resolution model with `sigma_data` then starts from the best linear upsampler, and the network
        learns what is left. First frames have a map of their own.

        Args:
            pairs: normalised latents `(C, t, h, w)` and `(C, t, scale*h, scale*w)` of the same clips.

        Raises:
            WaltError: the model has no `low_res_channels` or no `sigma_data`.
        """
        if self.low_res_embed is None or self.config.sigma_data is None:
            raise WaltError("fit_low_res_embed needs a model with low_res_channels and sigma_data")
        sums: list[list[Any]] = [[0, 0.0, 0.0], [0, 0.0, 0.0]]
        scale = self.config.low_res_scale
        for low, high in pairs:
            frames = low.double().transpose(0, 1)
            rows = F.unfold(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).unflatten(2, (-1, 9))
            middle = rows[..., 4]
            # Differences from the middle alone, so that flat latents stay as they are.
            around = (rows[..., [0, 1, 2, 3, 5, 6, 7, 8]] - middle[..., None]).flatten(2)
            values = F.pixel_unshuffle(high.double().transpose(0, 1), scale).flatten(2).transpose(1, 2)
            missing = values - middle.repeat_interleave(scale**2, dim=2)
            for total, part in zip(sums, (slice(0, 1), slice(1, None)), strict=True):
                x, y = around[part].flatten(0, 1), missing[part].flatten(0, 1)
                total[0] += len(x)
                total[1] += x.T @ x
                total[2] += x.T @ y
        for conv, (count, square, cross) in zip((self.low_res_embed_first, self.low_res_embed), sums, strict=True):
            if count:
                ridge = 1e-4 * count * torch.eye(len(square), dtype=square.dtype, device=square.device)
                taps = torch.linalg.solve(square + ridge, cross).T.unflatten(1, (-1, 8))
                weight = torch.zeros(conv.weight.flatten(2).shape, dtype=taps.dtype, device=taps.device)
                weight[..., [0, 1, 2, 3, 5, 6, 7, 8]] = taps  # what the middle must be follows
                conv.weight.copy_(weight.reshape(conv.weight.shape))

    def _spread(self, small: Tensor) -> Tensor:
        """Expected distance of the clean latents from `_upsample`, `(B, C, t, h, w)` -> `(B, 1, t, scale*h, scale*w)`.

        It follows the low-resolution latents' own contrast, the root mean square difference from the eight neighbours:
        where they are flat nothing is missing, and neither the network nor the noise may disturb them.
        """
        frames = small.float().transpose(1, 2).flatten(0, 1)
        rows = F.unfold(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3).unflatten(1, (-1, 9))
        contrast = (rows - rows[:, :, 4:5]).square().sum(dim=2).div(8).mean(dim=1).sqrt()
        spread = float(self.config.sigma_data) * contrast.unflatten(1, small.shape[-2:]) + 0.01
        large = F.interpolate(spread[:, None], scale_factor=self.config.low_res_scale, mode="nearest")
        return large.unflatten(0, (len(small), -1)).transpose(1, 2)

    def _precondition(
        self,
        out: list[Tensor],
        noisy: list[Tensor],
        large: list[list[Tensor]],
        low_res: Samples | None,
        timestep: Tensor,
    ) -> list[Tensor]:
        """v of the Gaussian posterior of clean latents with mean m and spread s, given x = signal z + sigma noise.

        v = (signal sigma (1 - s^2) x - sigma m) / (sigma^2 + s^2 signal^2); at sigma = 1 it is -m. The network gives m,
        or with low-resolution latents (m - their upsampling) / s.
        """
        signal = signal_level(timestep.float())[:, None, None, None, None]
        sigma = (1 - signal.square()).sqrt()
        result: list[Tensor] = []
        for run in runs(noisy):
            m, x, a, b = stacked(out[run]), stacked(noisy[run]), signal[run], sigma[run]
            spread: Tensor | float = float(self.config.sigma_data)
            if low_res is not None:
                spread = self._spread(stacked(low_res[run]))
                m = stacked(large[0][run]) + spread.to(m.dtype) * m
            scale = b / (b.square() + spread**2 * a.square())
            result += ((a * (1 - spread**2) * scale).to(x.dtype) * x - scale.to(x.dtype) * m).unbind()
        return result

    def _embedding(
        self,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        timestep: Tensor,
        class_labels: Tensor | None,
        low_res_noise_level: Tensor | None,
    ) -> Tensor:
        """The paper's c + t, `(B, D)`: timestep, class and noise level."""
        t = per_sample("timestep", timestep, batch, device)
        embedding = self.time_embedder(self.time_proj(t).to(dtype))
        labels = check_labels(class_labels, self.config.num_classes, batch, device)
        if self.class_embedder is not None:
            embedding = embedding + self.class_embedder(labels)
        if self.noise_level_embedder is not None:
            if low_res_noise_level is None:
                raise WaltError("low_res_noise_level: missing, (B,) noise levels of the low-resolution latents needed")
            level = per_sample("low_res_noise_level", low_res_noise_level, batch, device)
            embedding = embedding + self.noise_level_embedder(self.time_proj(level).to(dtype))
        elif low_res_noise_level is not None:
            raise WaltError("low_res_noise_level: given, but the model was built with low_res_channels=None")
        return embedding

    def _text(
        self, batch: int, dtype: torch.dtype, states: Samples | None, mask: Tensor | None
    ) -> tuple[Tensor | None, tuple[int, ...] | None]:
        """Text of all samples end to end `(S, D)`, without padding, and the length of each."""
        flat, lengths = pack_text(states, mask, self.config.text_dim, batch)
        if flat is None or self.text_embedder is None or self.text_norm is None:
            return None, None
        return self.text_norm(self.text_embedder(flat.to(dtype))), lengths


def _place(plan: WindowPlan, kept: Kept | None, device: torch.device, group: Any) -> WindowPlan:
    """A plan on the device, of the kept tokens alone where some were dropped, and this rank's share of its windows."""
    plan = plan.to(device) if kept is None else drop_from_plan(plan, kept.mask, device)
    return plan if group is None else share_plan(plan, group)


@lru_cache(maxsize=512)
def _samples_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The sample of every token, made on the host and copied without blocking."""
    with torch.inference_mode(False):
        return to_device(sample_index(lengths), device)


def _pooled(text: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The mean text state of every sample, `(B, D)`, of `(S, D)`."""
    if text.device.type in ("cpu", "meta"):
        return torch.stack([part.sum(dim=0) / max(1, len(part)) for part in text.split(lengths)])
    # On an accelerator a product: not a launch per sample, and the same sum every time.
    share = torch.zeros(len(lengths), sum(lengths), device="cpu")
    for i, (end, length) in enumerate(zip(itertools.accumulate(lengths), lengths, strict=True)):
        share[i, end - length : end] = 1 / max(1, length)
    with torch.autocast(text.device.type, enabled=False):
        return (to_device(share, text.device) @ text.float()).to(text.dtype)


def _half(window: Window) -> Grid:
    t, h, w = (0 if n is None else n // 2 for n in window)
    return t, h, w


def _window(name: str, window: Sequence[int] | None, frames: int | None, allowed: tuple[int, ...]) -> Window:
    """A configured window as (t, h, w); `frames` is its length where the field gives (h, w) only."""
    if window is None:
        return (frames, None, None)
    if len(window) not in allowed or any(n < 1 for n in window):
        sizes = " or ".join("(h, w)" if n == 2 else "(t, h, w)" for n in allowed)
        raise WaltError(f"{name}: {tuple(window)} given, positive {sizes} in tokens or None needed")
    t, h, w = (frames, *window) if len(window) == 2 else window
    return (t, h, w)
