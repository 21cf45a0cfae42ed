"""The NUWA encoder-decoder (arXiv 2111.12417, section 3.3): discrete video tokens, one after the other, by 3DNA.

B batch, s h w frames, rows, columns of tokens, L = s h w, S sub-codes, V words of one sub-code's vocabulary, D width,
N heads, d head size; R rows that decode together (with guidance, twice the videos).

Where this departs from the paper's decoder. There the input is the token sequence moved on by one in raster order
behind a <bos>: a position reads its predecessor, the first column the last of the previous row, and what is nearby is
nearby in the shifted raster. Here nothing is shifted. Every position has two states (as in XLNet, arXiv 1906.08237):
its content `h`, which knows its own token and sees itself and its preceding neighbours, and its query `g`, which starts
from the same learned <bos> everywhere, knows its place only, and sees the contents of the preceding neighbours. The
token is predicted from `g`. Both pass the same layers. So all dependencies are steps to neighbours, nothing ties the
start of a row to the end of the one before, and positions of one wave (`walt.nearby.waves`) can be decoded at once.
Decoding runs the contents of one wave beside the queries of the next: as many passes as a shifted decoder needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from walt.card import HubCardMixin
from walt.errors import WaltError, suggest
from walt.latents import Grid
from walt.nearby import EVERYTHING, Extent, Rule, attend_gathered, nearby_attention, neighbours, radii, waves

ATTENTIONS = ("nearby", "full", "axial")


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded conditions of B samples. A sample may have text, a sketch or both; the decoder adds up what it gets.

    Attributes:
        text: `(B, T, D)` states of the words, padded to the longest; None when no sample has any.
        text_mask: `(B, T)` bool, True at words.
        sketch: `(B, s, h, w, D)` states of the sketches; None when no sample has one.
        sketch_mask: `(B,)` bool, True where a sample has a sketch.
    """

    text: Tensor | None
    text_mask: Tensor | None
    sketch: Tensor | None = None
    sketch_mask: Tensor | None = None

    def __len__(self) -> int:
        states = self.text if self.text is not None else self.sketch
        assert states is not None
        return len(states)

    def __getitem__(self, index: slice | list[int]) -> Condition:
        """Some of the samples."""
        return self._each(lambda x: x[index])

    def expand(self, batch: int) -> Condition:
        """One sample as `batch` of them, without a copy."""
        return self._each(lambda x: x.expand(batch, *x.shape[1:]))

    def to(self, device: torch.device | str) -> Condition:
        """On `device`."""
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Condition(**{name: None if x is None else change(x) for name, x in values.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """The samples of all `conditions`, in order; their sketches must be of one size."""
        words = max(0 if c.text is None else c.text.shape[1] for c in conditions)
        sizes = {tuple(c.sketch.shape[1:]) for c in conditions if c.sketch is not None}
        if len(sizes) > 1:
            raise WaltError(f"sketch: sizes {sorted(sizes)} given, one size in a batch needed")
        some = next(x for c in conditions for x in (c.text, c.sketch) if x is not None)
        texts, text_masks, sketches, sketch_masks = [], [], [], []
        for c in conditions:
            text, mask = c.text, c.text_mask
            if text is None or mask is None:
                text, mask = some.new_zeros(len(c), 0, some.shape[-1]), some.new_zeros(len(c), 0, dtype=torch.bool)
            texts.append(F.pad(text, (0, 0, 0, words - text.shape[1])))
            text_masks.append(F.pad(mask, (0, words - mask.shape[1])))
            if sizes:
                (size,) = sizes
                sketches.append(some.new_zeros(len(c), *size) if c.sketch is None else c.sketch)
                absent = some.new_zeros(len(c), dtype=torch.bool)
                sketch_masks.append(absent if c.sketch_mask is None else c.sketch_mask)
        return Condition(
            torch.cat(texts) if words else None,
            torch.cat(text_masks) if words else None,
            torch.cat(sketches) if sizes else None,
            torch.cat(sketch_masks) if sizes else None,
        )


class NuwaPositionEmbedding(nn.Module):
    """Three learned tables, of frames, rows and columns, whose entries add up.

    A sample that is larger than a table, or of another height or width, reads it by linear interpolation; fewer frames
    read its beginning, so that an image lies at time 0.
    """

    def __init__(self, size: Grid, width: int) -> None:
        super().__init__()
        self.frames, self.rows, self.columns = (nn.Parameter(torch.zeros(n, width)) for n in size)

    def forward(self, size: Grid) -> Tensor:
        """`(s, h, w, D)`."""
        s, h, w = size
        frames = self.frames[:s] if s <= len(self.frames) else _stretch(self.frames, s)
        rows, columns = _stretch(self.rows, h), _stretch(self.columns, w)
        return frames[:, None, None] + rows[:, None] + columns


def _stretch(table: Tensor, size: int) -> Tensor:
    if len(table) == size:
        return table
    return F.interpolate(table.float().T[None], size=size, mode="linear")[0].T.to(table.dtype)


class NuwaAttention(nn.Module):
    """The projections of one attention; who sees whom is up to the caller."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., N, d)`."""
        return x.unflatten(-1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., N, d)`."""
        return self.split_heads(self.to_q(x))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(..., D)` to two of `(..., N, d)`."""
        return self.split_heads(self.to_k(x)), self.split_heads(self.to_v(x))

    def out(self, x: Tensor) -> Tensor:
        """`(..., N, d)` to `(..., D)`."""
        return cast(Tensor, self.to_out(x.flatten(-2)))


@dataclass(frozen=True)
class Nearness:
    """How a kind of representation is seen: its extent and the backend of `nearby_attention`."""

    extent: Extent
    backend: str | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        """`nearby_attention`; where a gradient is kept, a few megabytes more are nothing beside what that takes."""
        workspace = 1 << 19 if torch.is_grad_enabled() and query.device.type == "cpu" else None
        return nearby_attention(query, key, value, self.extent, backend=self.backend, workspace=workspace, **more)


class NuwaEncoderBlock(nn.Module):
    """3DNA of a condition on itself, then an MLP."""

    def __init__(self, width: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = NuwaAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.ff = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor, nearness: Nearness, mask: Tensor | None) -> Tensor:
        """`(B, s, h, w, D)`; `mask (B, s, h, w)` bool or None."""
        y = self.norm1(hidden_states)
        y = nearness.attend(self.attn.query(y), *self.attn.key_value(y), key_mask=mask)
        x = hidden_states + self.attn.out(y)
        return cast(Tensor, x + self.ff(self.norm2(x)))


class NuwaDecoderBlock(nn.Module):
    """The sum of 3DNA on preceding neighbours and 3DNA on the condition, then an MLP."""

    def __init__(self, width: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = NuwaAttention(width, heads)
        self.cross_attn = NuwaAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.ff = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")

    def forward(
        self, content: Tensor, query: Tensor, condition: Condition, nearness: Nearness, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Both states of all positions, `(B, s, h, w, D)` each. The `last` block leaves the contents as they are."""
        own = self.norm1(content)
        key, value = self.attn.key_value(own)
        streams = [(self.norm1(query), False)] if last else [(own, True), (self.norm1(query), False)]
        near = [
            nearness.attend(self.attn.query(y), key, value, causal=True, include_self=include_self)
            for y, include_self in streams
        ]
        y = torch.cat([y for y, _ in streams])
        x = query if last else torch.cat([content, query])
        x = x + self.attn.out(torch.cat(near)) + self.cross(y, condition, nearness, len(streams))
        x = x + self.ff(self.norm2(x))
        if last:
            return content, x
        content, query = x.chunk(2)
        return content, query

    def cross(self, y: Tensor, condition: Condition, nearness: Nearness, streams: int) -> Tensor:
        """Attention of `(streams * B, s, h, w, D)` to the conditions of the B samples."""
        q = self.cross_attn.query(y)
        total: Tensor | None = None
        if condition.text is not None and condition.text_mask is not None:
            key, value = (x[:, :, None, None] for x in self.cross_attn.key_value(condition.text))
            key, value = (x.repeat(streams, 1, 1, 1, 1, 1) for x in (key, value))
            mask = condition.text_mask[:, :, None, None].repeat(streams, 1, 1, 1)
            total = nearby_attention(q, key, value, EVERYTHING, key_mask=mask)
        if condition.sketch is not None and condition.sketch_mask is not None:
            key, value = (x.repeat(streams, 1, 1, 1, 1, 1) for x in self.cross_attn.key_value(condition.sketch))
            seen = nearness.attend(q, key, value)
            seen = seen * condition.sketch_mask.repeat(streams)[:, None, None, None, None, None]
            total = seen if total is None else total + seen
        assert total is not None
        return self.cross_attn.out(total)


class NuwaHead(nn.Module):
    """Words of a position from its query state, one sub-code after the other.

    A sub-code is predicted from the position's state and the sub-codes before it, by a small MLP of its own width.
    """

    def __init__(self, width: int, inner: int, subcodes: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, inner)
        self.previous = nn.Parameter(torch.zeros(subcodes - 1, vocab_size, inner)) if subcodes > 1 else None
        self.place = nn.Parameter(torch.zeros(subcodes, inner)) if subcodes > 1 else None
        self.ff = FeedForward(inner, inner_dim=4 * inner, activation_fn="gelu-approximate") if subcodes > 1 else None
        self.norm2 = nn.LayerNorm(inner, eps=1e-6) if subcodes > 1 else None
        self.weight = nn.Parameter(torch.zeros(subcodes, vocab_size, inner))
        self.bias = nn.Parameter(torch.zeros(subcodes, vocab_size))

    def state(self, query: Tensor) -> Tensor:
        """`(..., D)` to `(..., inner)`: what all sub-codes share."""
        return cast(Tensor, self.proj(self.norm(query)))

    def logits(self, state: Tensor, subcode: int) -> Tensor:
        """Logits `(..., V)` of a sub-code, given the state with the sub-codes before it added (`told`)."""
        if self.place is not None and self.ff is not None and self.norm2 is not None:
            state = state + self.place[subcode]
            state = state + self.ff(self.norm2(state))
        return F.linear(state, self.weight[subcode], self.bias[subcode])

    def told(self, state: Tensor, subcode: int, tokens: Tensor) -> Tensor:
        """The state after sub-code number `subcode` is known to be `tokens (...)`."""
        assert self.previous is not None
        return state + F.embedding(tokens, self.previous[subcode])


class NuwaTransformer3DModel(HubCardMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts video tokens from preceding neighbours and a condition. The module's docstring says how.

    Args:
        vocab_size: V, words of one sub-code: the codebook of a VQ-GAN, or one factor of LFQ's or FSQ's.
        num_subcodes: S, sub-codes of a token, predicted in turn within their position.
        text_dim: width of a frozen text encoder's states; None for a model without text.
        sketch_vocab_size: words of the sketches' tokenizer; None for a model without sketches.
        num_layers_encoder: layers over the condition.
        num_layers_decoder: layers over the video.
        num_attention_heads: N; the width D is N * attention_head_dim.
        attention_head_dim: d.
        ffn_ratio: MLP width over D.
        code_dim: width in which codes are embedded and predicted, the code width of the paper's VQ-GAN, 256; None for D.
        sample_size: (s, h, w) of the position tables of video and sketch; other sizes interpolate.
        text_length: words in the position table of text; more are an error.
        extent: width of the neighbourhood in (frames, rows, columns), of video and sketch, for self and cross.
        text_extent: the same among the words of a text; the decoder sees all words.
        attention: "nearby", or the "full" and "axial" of the paper's Table 6.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["NuwaEncoderBlock", "NuwaDecoderBlock"]
    _repeated_blocks = ["NuwaEncoderBlock", "NuwaDecoderBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "embed", "bos", "none_word", "norm", "head"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 12288,
        num_subcodes: int = 1,
        text_dim: int | None = None,
        sketch_vocab_size: int | None = None,
        num_layers_encoder: int = 12,
        num_layers_decoder: int = 24,
        num_attention_heads: int = 20,
        attention_head_dim: int = 64,
        ffn_ratio: float = 4.0,
        code_dim: int | None = 256,
        sample_size: tuple[int, int, int] = (10, 21, 21),
        text_length: int = 77,
        extent: tuple[int | str, int | str, int | str] = (3, 3, 3),
        text_extent: tuple[int | str, int | str, int | str] = ("all", 1, 1),
        attention: str = "nearby",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise WaltError(
                f"attention: {attention!r} given, one of {', '.join(ATTENTIONS)} needed{suggest(attention, ATTENTIONS)}"
            )
        counts = {
            "vocab_size": vocab_size,
            "num_subcodes": num_subcodes,
            "num_layers_decoder": num_layers_decoder,
            "num_attention_heads": num_attention_heads,
            "text_length": text_length,
            "sample_size": min(sample_size),
        }
        for name, value in counts.items():
            if value < 1:
                raise WaltError(f"{name}: {value} given, at least 1 needed")
        if num_layers_encoder < 0:
            raise WaltError(f"num_layers_encoder: {num_layers_encoder} given, at least 0 needed")
        for wanted in (extent, text_extent):
            radii(cast(Extent, tuple(wanted)), sample_size)
        self._extent = cast(Extent, tuple(extent))
        self._text_extent = cast(Extent, tuple(text_extent))

        width = num_attention_heads * attention_head_dim
        ffn_dim = round(ffn_ratio * width)
        inner = code_dim or width
        self.code_embed = nn.Parameter(torch.zeros(num_subcodes, vocab_size, inner))
        self.code_proj = nn.Linear(inner, width)
        self.bos = nn.Parameter(torch.zeros(width))
        self.none_word = nn.Parameter(torch.zeros(width))
        self.pos_embed = NuwaPositionEmbedding(sample_size, width)
        self.text_pos_embed = NuwaPositionEmbedding((text_length, 1, 1), width)
        self.text_embed = nn.Linear(text_dim, width) if text_dim is not None else None
        self.text_norm = nn.LayerNorm(width, eps=1e-6) if text_dim is not None else None
        self.sketch_embed = nn.Embedding(sketch_vocab_size, inner) if sketch_vocab_size is not None else None
        self.sketch_proj = nn.Linear(inner, width) if sketch_vocab_size is not None else None
        self.sketch_pos_embed = NuwaPositionEmbedding(sample_size, width) if sketch_vocab_size is not None else None
        self.encoder_blocks = nn.ModuleList(
            NuwaEncoderBlock(width, num_attention_heads, ffn_dim) for _ in range(num_layers_encoder)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            NuwaDecoderBlock(width, num_attention_heads, ffn_dim) for _ in range(num_layers_decoder)
        )
        self.head = NuwaHead(width, inner, num_subcodes, vocab_size)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """All initial values, in one place. Draws nothing on the meta device.

        Linear layers are Xavier uniform with zero bias; a residual branch ends smaller the deeper the stack; embeddings
        of codes enter the layers with variance 1 and positions with a little less.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        inner = self.code_embed.shape[-1]
        nn.init.normal_(self.code_embed)
        nn.init.normal_(self.code_proj.weight, std=(inner * self.config.num_subcodes) ** -0.5)
        if self.sketch_embed is not None and self.sketch_proj is not None:
            nn.init.normal_(self.sketch_embed.weight)
            nn.init.normal_(self.sketch_proj.weight, std=inner**-0.5)
        for positions in (self.pos_embed, self.text_pos_embed, self.sketch_pos_embed):
            if positions is not None:
                for parameter in positions.parameters():
                    nn.init.normal_(parameter, std=0.3)
        nn.init.normal_(self.bos, std=0.02)
        nn.init.normal_(self.none_word, std=1.0)
        head = self.head
        nn.init.normal_(head.weight, std=0.02)
        if head.previous is not None and head.place is not None:
            nn.init.normal_(head.previous, std=0.3)
            nn.init.normal_(head.place, std=0.3)
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            assert isinstance(block, NuwaEncoderBlock | NuwaDecoderBlock)
            depth = len(self.encoder_blocks if isinstance(block, NuwaEncoderBlock) else self.decoder_blocks)
            ends = [block.attn.to_out, block.ff.net[2]]
            if isinstance(block, NuwaDecoderBlock):
                ends.append(block.cross_attn.to_out)
            for linear in ends:
                linear.weight.data.mul_((2 * depth) ** -0.5)

    # Conditions.

    def encode_condition(
        self, text: Sequence[Tensor | None] | None = None, sketch: Tensor | None = None, *, batch: int = 1
    ) -> Condition:
        """Runs the encoder.

        Args:
            text: for each sample the states of its words `(T, text_dim)`, of any length, or None for the constant word
                "None".
            sketch: tokens of the sketches, `(B, s, h, w)` integers.
            batch: samples, where neither text nor sketch is given: each gets the word "None".

        Raises:
            WaltError: an input that the model was not made for, shapes that do not fit, tokens outside the vocabulary.
        """
        text_states = text_mask = sketch_states = sketch_mask = None
        if text is None and sketch is None:
            text = [None] * batch
        if text is not None:
            text_states, text_mask = self._embed_text(text)
        if sketch is not None:
            if text is not None and len(text) != len(sketch):
                raise WaltError(f"sketch: {len(sketch)} samples given for {len(text)} texts")
            sketch_states = self._embed_sketch(sketch)
            sketch_mask = torch.ones(len(sketch), dtype=torch.bool, device=sketch_states.device)
        for block in self.encoder_blocks:
            if text_states is not None:
                text_states = self._run(block, text_states, Nearness(self._text_extent, None), text_mask)
            if sketch_states is not None:
                sketch_states = self._run(block, sketch_states, self._nearness(), None)
        if text_states is not None and text_mask is not None:
            text_states, text_mask = self.encoder_norm(text_states)[:, :, 0, 0], text_mask[:, :, 0, 0]
        if sketch_states is not None:
            sketch_states = self.encoder_norm(sketch_states)
        return Condition(text_states, text_mask, sketch_states, sketch_mask)

    def _embed_text(self, text: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """`(B, T, 1, 1, D)` and its mask."""
        if not len(text):
            raise WaltError("text: empty, at least one sample needed")
        if self.text_embed is None and any(states is not None for states in text):
            raise WaltError("text: given, but the model was built with text_dim=None")
        limit, width = self.config.text_length, self.config.text_dim
        for i, states in enumerate(text):
            if states is not None and (states.ndim != 2 or states.shape[1] != width or not 0 < len(states) <= limit):
                raise WaltError(
                    f"text: sample {i} has shape {tuple(states.shape)}, (1..{limit} words, {width}) or None needed"
                )
        words = []
        for states in text:
            if states is None or self.text_embed is None or self.text_norm is None:
                words.append(self.none_word[None])
            else:
                words.append(self.text_norm(self.text_embed(states.to(self.bos))))
        padded = nn.utils.rnn.pad_sequence(words, batch_first=True)
        lengths = torch.tensor([len(x) for x in words], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        x = padded[:, :, None, None] + self.text_pos_embed((padded.shape[1], 1, 1))
        return x, mask[:, :, None, None]

    def _embed_sketch(self, sketch: Tensor) -> Tensor:
        if self.sketch_embed is None or self.sketch_proj is None or self.sketch_pos_embed is None:
            raise WaltError("sketch: given, but the model was built with sketch_vocab_size=None")
        _check_tokens("sketch", sketch, 1, int(self.config.sketch_vocab_size))
        s, h, w = sketch.shape[1:]
        return self.sketch_proj(self.sketch_embed(sketch.to(self.bos.device))) + self.sketch_pos_embed((s, h, w))

    def _nearness(self) -> Nearness:
        kind = self.config.attention
        if kind == "nearby":
            return Nearness(self._extent, None)
        return Nearness(EVERYTHING, kind)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    # Teacher forcing.

    def forward(
        self,
        tokens: Tensor,
        condition: Condition | None = None,
        *,
        text: Sequence[Tensor | None] | None = None,
        sketch: Tensor | None = None,
    ) -> Tensor:
        """Logits of all tokens in one pass, each given the tokens that it may see.

        Args:
            tokens: `(B, s, h, w)` integers, or `(B, s, h, w, S)` with more than one sub-code.
            condition: of `encode_condition`, for B samples.
            text: instead of `condition`, encoded here (so that wrappers of `forward` see the encoder too).
            sketch: likewise.

        Returns:
            `(B, s, h, w, V)` or `(B, s, h, w, S, V)`.
        """
        tokens = tokens.to(self.bos.device)
        _check_tokens("tokens", tokens, self.config.num_subcodes, self.config.vocab_size)
        if condition is None:
            condition = self.encode_condition(text, sketch, batch=len(tokens))
        elif text is not None or sketch is not None:
            raise WaltError("condition: given together with text or sketch, one of the two needed")
        if len(condition) != len(tokens):
            raise WaltError(f"condition: {len(condition)} samples given for {len(tokens)} of tokens")
        s, h, w = tokens.shape[1:4]
        positions = self.pos_embed((s, h, w))
        content = self._embed_codes(tokens) + positions
        query = (self.bos + positions).expand_as(content)
        for i, block in enumerate(self.decoder_blocks):
            last = i + 1 == len(self.decoder_blocks)
            content, query = self._run(block, content, query, condition, self._nearness(), last)
        state = self.head.state(query)
        if self.config.num_subcodes == 1:
            return self.head.logits(state, 0)
        logits = []
        for i in range(self.config.num_subcodes):
            logits.append(self.head.logits(state, i))
            if i + 1 < self.config.num_subcodes:
                state = self.head.told(state, i, tokens[..., i])
        return torch.stack(logits, -2)

    def _embed_codes(self, tokens: Tensor) -> Tensor:
        """`(...)` or `(..., S)` tokens to `(..., D)`."""
        if self.config.num_subcodes == 1:
            return cast(Tensor, self.code_proj(F.embedding(tokens, self.code_embed[0])))
        codes = [F.embedding(tokens[..., i], self.code_embed[i]) for i in range(self.config.num_subcodes)]
        return cast(Tensor, self.code_proj(torch.stack(codes).sum(0)))

    # Decoding.

    @torch.no_grad()
    def generate(
        self,
        shape: Grid,
        condition: Condition,
        *,
        null_condition: Condition | None = None,
        guidance_scale: float = 1.0,
        context_guidance_scale: float = 1.0,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        samples_per_condition: int = 1,
        wavefront: bool = True,
        callback: Callable[[int, int], bool | None] | None = None,
    ) -> Tensor:
        """Decodes videos of tokens.

        Keys and values are kept of exactly the contents that a later position can still see, in a ring over the order
        of decoding: one frame, one row and one token of them in raster order with an extent of 3x3x3, or seven waves. So
        neither time per token nor memory of the cache grows with the video. What a token becomes depends on its own
        noise only, drawn before decoding starts: whichever the order and the batch, the tokens are the same (but for
        rounding, where two words are equally likely to the last digits).

        Args:
            shape: (s, h, w).
            condition: of `encode_condition`, for B conditions.
            null_condition: what guidance leads away from, for B conditions or one; usually `encode_condition()`.
            guidance_scale: logits are null + scale * (given - null); 1 decodes without the null condition.
            context_guidance_scale: how hard frames follow those before them; 1 for no more than the model says. Where
                both scales are used, logits are alone + context scale * (null - alone) + scale * (given - null); alone is
                the model that takes every frame for a still, under the null condition, or under the given one where
                guidance does not use the null one.
            known: tokens to keep, `(B, s, h, w)` or `(B, s, h, w, S)`; also for B * samples_per_condition.
            known_mask: `(B, s, h, w)` bool, True where `known` holds. Known tokens are contents like any others: what
                comes after them in raster order and near them sees them.
            temperature: logits are divided by it; 0 takes the likeliest word.
            top_k: only that many likeliest words.
            top_p: only the likeliest words that together reach this probability.
            generator: one, or one per video, whose noise then is that of the video decoded alone.
            samples_per_condition: videos per condition; they share its encoding.
            wavefront: decode all positions of a wave at once (`walt.nearby.waves`) instead of one after the other.
            callback: called with the number of positions done, and of all, after every step; True ends the decoding, and
                positions that have not been made are 0.

        Returns:
            `(B * samples_per_condition, s, h, w)` int64, with S as last axis if there is more than one sub-code; videos
            of one condition lie side by side.

        Raises:
            WaltError: an argument out of its range, or one that does not fit the model.
        """
        if not 0 <= context_guidance_scale < math.inf:
            raise WaltError(f"context_guidance_scale: {context_guidance_scale} given, 0 or more needed")
        _check_sampling(shape, guidance_scale, null_condition, temperature, top_k, top_p, samples_per_condition)
        batch, device, length = len(condition), self.bos.device, math.prod(shape)
        videos = batch * samples_per_condition
        subcodes = int(self.config.num_subcodes)
        tokens, fixed = self._known(known, known_mask, batch, samples_per_condition, shape)
        noise = _noise(generator, (videos, length, subcodes)).to(device)
        guided = guidance_scale != 1.0 and null_condition is not None
        if guided:
            assert null_condition is not None
            if len(null_condition) not in (1, batch):
                raise WaltError(
                    f"null_condition: {len(null_condition)} samples given for {batch} conditions, 1 or as many"
                )
            null = null_condition if len(null_condition) == batch else null_condition.expand(batch)
            branches = [condition, null]
        else:
            branches = [condition]
        led = context_guidance_scale != 1.0 and shape[0] > 1
        if led:
            branches.append(branches[-1])
        condition = Condition.cat(branches) if len(branches) > 1 else condition
        scales = [guidance_scale] * guided + [context_guidance_scale] * led

        rule = Rule(shape, shape, radii(self._nearness().extent, shape), causal=True, axial=self._axial())
        plan = _DecodePlan.make(rule, ~fixed.all(0).cpu(), wavefront, device)
        state = _Decoding(self, plan, condition, samples_per_condition, shape, videos if led else 0)
        positions = self.pos_embed(shape).flatten(0, 2)[None].expand(videos * len(branches), -1, -1)
        if led:
            still = self.pos_embed((1, *shape[1:])).flatten(0, 2).repeat(shape[0], 1)
            positions = torch.cat([positions[videos:], still.expand(videos, -1, -1)])
        some_fixed = bool(fixed.any())
        for step in plan.steps:
            content = self._embed_codes(
                tokens.index_select(1, step.content)[..., 0] if subcodes == 1 else tokens.index_select(1, step.content)
            )
            content = content.repeat(len(branches), 1, 1) + positions.index_select(1, step.content)
            query = self.bos + positions.index_select(1, step.query)
            hidden = self.head.state(state.run(torch.cat([content, query], 1), step))
            for i in range(subcodes):
                if not len(step.query):
                    break
                logits = self.head.logits(hidden, i).float()
                *better, less = logits.chunk(len(branches))
                logits = less
                for scale, one in zip(reversed(scales), reversed(better), strict=True):
                    logits, less = logits + scale * (one - less), one
                chosen = _choose(logits, noise[:, :, i].index_select(1, step.query), temperature, top_k, top_p)
                if some_fixed:
                    old = tokens[:, :, i].index_select(1, step.query)
                    chosen = torch.where(fixed.index_select(1, step.query), old, chosen)
                tokens[:, :, i].index_copy_(1, step.query, chosen)
                if i + 1 < subcodes:
                    hidden = self.head.told(hidden, i, chosen.repeat(len(branches), 1))
            if callback is not None and callback(step.done, length):
                break
        out = tokens.unflatten(1, shape)
        return out[..., 0] if subcodes == 1 else out

    def _axial(self) -> bool:
        return bool(self.config.attention == "axial")

    def _known(
        self, known: Tensor | None, mask: Tensor | None, batch: int, samples: int, shape: Grid
    ) -> tuple[Tensor, Tensor]:
        """Tokens `(videos, L, S)`, zeros where they are to be made, and which are fixed `(videos, L)`."""
        videos, subcodes, device = batch * samples, int(self.config.num_subcodes), self.bos.device
        tokens = torch.zeros(videos, math.prod(shape), subcodes, dtype=torch.long, device=device)
        fixed = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
        if known is None and mask is None:
            return tokens, fixed
        if known is None or mask is None:
            raise WaltError("known and known_mask: only one given, both or neither needed")
        if mask.dtype != torch.bool or mask.shape[1:] != shape or len(mask) not in (batch, videos):
            raise WaltError(
                f"known_mask: {mask.dtype} {tuple(mask.shape)} given, bool {(batch, *shape)} or {(videos, *shape)} needed"
            )
        if known.shape[: mask.ndim] != mask.shape:
            raise WaltError(f"known: shape {tuple(known.shape)} given, that of known_mask {tuple(mask.shape)} needed")
        full = known if subcodes > 1 else known[..., None]
        seen = torch.where(mask[..., None], full, 0) if full.ndim == 5 else known
        _check_tokens("known", seen if subcodes > 1 else seen[..., 0], subcodes, self.config.vocab_size)
        each = 1 if len(mask) == videos else samples
        fixed = mask.flatten(1).repeat_interleave(each, 0).to(device)
        return seen.flatten(1, 3).repeat_interleave(each, 0).to(device).long().contiguous(), fixed


@dataclass(frozen=True, eq=False)
class _Step:
    """One pass of the decoder: contents of the positions just made, queries of those made next; W of both together."""

    content: Tensor  # (Wc,) positions
    query: Tensor  # (Wq,) positions
    slots: Tensor  # (Wc,) where in the ring their keys and values go
    index: Tensor  # (W, K) slots of what each of them sees
    seen: Tensor  # (W, K) bool
    same: Tensor  # (W, K) bool: seen, and of its own frame
    done: int  # positions that are known after this step


@dataclass(frozen=True, eq=False)
class _DecodePlan:
    """The order of decoding and the table of slots, made on the host before it starts."""

    rule: Rule
    ring: int
    steps: tuple[_Step, ...]

    @staticmethod
    def make(rule: Rule, wanted: Tensor, wavefront: bool, device: torch.device) -> _DecodePlan:
        """`wanted (L,)` bool: positions that must be made; the others are known in every video."""
        length = len(wanted)
        order = waves(rule) if wavefront else list(torch.arange(length).split(1))
        number = torch.empty(length, dtype=torch.long)
        number[torch.cat(order)] = torch.arange(length)
        ends = torch.empty(length, dtype=torch.long)
        done = 0
        for wave in order:
            done += len(wave)
            ends[wave] = done
        table = neighbours(rule)
        seen = table >= 0
        # A content must stay until the last of those who see it has been written itself.
        ring = int(torch.where(seen, ends[:, None] - number[table.clamp(min=0)], 1).max())
        slots = number % ring
        near = torch.where(seen, slots[table.clamp(min=0)], 0)
        places = torch.arange(length)[:, None]
        strictly = seen & (table != places)
        frame = rule.size[1] * rule.size[2]
        same = table // frame == places // frame

        steps = []
        content = order[0][:0]
        last = max((i for i, wave in enumerate(order) if bool(wanted[wave].any())), default=-1)
        for i, wave in enumerate(order[: last + 1]):
            query = wave[wanted[wave]]
            # Nothing is decoded in a wave that is all known, but its contents must enter the ring.
            if len(query) or len(content):
                steps.append(
                    _Step(
                        content.to(device),
                        query.to(device),
                        slots[content].to(device),
                        torch.cat([near[content], near[query]]).to(device),
                        torch.cat([seen[content], strictly[query]]).to(device),
                        torch.cat([seen[content] & same[content], strictly[query] & same[query]]).to(device),
                        int(ends[wave[0]]) if i < last else length,
                    )
                )
            content = wave
        return _DecodePlan(rule, ring, tuple(steps))


class _Decoding:
    """The caches of one call of `generate`: a ring of the contents' keys and values, and those of the conditions."""

    def __init__(
        self,
        model: NuwaTransformer3DModel,
        plan: _DecodePlan,
        condition: Condition,
        samples: int,
        shape: Grid,
        alone: int = 0,
    ) -> None:
        """The last `alone` rows see nothing of other frames."""
        self.blocks = cast(list[NuwaDecoderBlock], list(model.decoder_blocks))
        self.conditions, self.samples = len(condition), samples
        self.rows, self.alone = self.conditions * samples, alone
        heads, like = model.config.num_attention_heads, model.bos
        size = (self.rows, plan.ring, 2, heads, model.config.attention_head_dim)
        self.ring = [like.new_zeros(size) for _ in self.blocks]
        self.text: list[tuple[Tensor, Tensor]] = []
        self.sketch: list[Tensor] = []
        self.text_mask = self.text_some = self.sketch_some = None
        if condition.text is not None and condition.text_mask is not None:
            for block in self.blocks:
                key, value = block.cross_attn.key_value(condition.text)
                self.text.append((key.transpose(1, 2), value.transpose(1, 2)))
            if not bool(condition.text_mask.all()):
                some = condition.text_mask.any(1)
                self.text_mask = (condition.text_mask | ~some[:, None])[:, None, None]
                self.text_some = some[:, None, None, None]
        if condition.sketch is not None and condition.sketch_mask is not None:
            self.sketch = [
                torch.stack(block.cross_attn.key_value(condition.sketch.flatten(1, 3)), 2) for block in self.blocks
            ]
            s, h, w = condition.sketch.shape[1:4]
            grid = (s, h, w)
            table = neighbours(Rule(shape, grid, radii(model._nearness().extent, grid), axial=model._axial()))
            self.sketch_table = table.to(like.device)
            if not bool(condition.sketch_mask.all()):
                self.sketch_some = condition.sketch_mask[:, None, None, None, None]

    def run(self, x: Tensor, step: _Step) -> Tensor:
        """Contents and queries `(R, Wc + Wq, D)` through all layers; returns the queries `(R, Wq, D)`."""
        contents = len(step.content)
        both = _Seen(self, step, slice(None))
        queries = _Seen(self, step, slice(contents, None))
        for i, block in enumerate(self.blocks):
            y = block.norm1(x)
            if contents:
                pair = torch.stack(block.attn.key_value(y[:, :contents]), 2)
                self.ring[i].index_copy_(1, step.slots, pair)
            seen = both
            if i + 1 == len(self.blocks):  # no layer reads the contents any more
                x, y, seen = x[:, contents:], y[:, contents:], queries
                if not x.shape[1]:
                    break
            near = attend_gathered(block.attn.query(y), self.ring[i], seen.index, seen.mask, seen.some)
            x = x + block.attn.out(near) + block.cross_attn.out(self._cross(i, block, y, seen))
            x = x + block.ff(block.norm2(x))
        return x

    def _cross(self, layer: int, block: NuwaDecoderBlock, y: Tensor, seen: _Seen) -> Tensor:
        """`(R, W, D)` to `(R, W, N, d)`. Videos of one condition read one copy of its keys and values."""
        width = y.shape[1]
        q = block.cross_attn.query(y)
        total: Tensor | None = None
        if self.text:
            key, value = self.text[layer]
            grouped = q.reshape(self.conditions, self.samples * width, *q.shape[2:]).transpose(1, 2)
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.text_mask)
            if self.text_some is not None:
                out = out * self.text_some
            total = out.transpose(1, 2).reshape(q.shape)
        if self.sketch:
            grouped = q.unflatten(0, (self.conditions, self.samples)).transpose(1, 2)
            out = attend_gathered(grouped, self.sketch[layer], seen.sketch_index, seen.sketch_mask, None)
            if self.sketch_some is not None:
                out = out * self.sketch_some
            out = out.transpose(1, 2).reshape(q.shape)
            total = out if total is None else total + out
        assert total is not None
        return total


class _Seen:
    """Index and mask of the neighbours of some positions, in the form that attention takes: the same in every layer."""

    def __init__(self, state: _Decoding, step: _Step, part: slice) -> None:
        self.index = step.index[part].flatten()
        parts = [(step.seen[part], state.rows - state.alone), (step.same[part], state.alone)]
        seen = torch.cat([mask[None].expand(rows, -1, -1) for mask, rows in parts if rows])
        some = seen.any(2, keepdim=True)
        self.mask = (seen | ~some).flatten(0, 1)[:, None, None]
        self.some = some[..., None]
        if state.sketch:
            positions = torch.cat([step.content, step.query])[part]
            table = state.sketch_table.index_select(0, positions)
            self.sketch_index = table.clamp(min=0).flatten()
            self.sketch_mask = (table >= 0).repeat(state.conditions, 1)[:, None, None]


def _choose(logits: Tensor, noise: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Words `(...)` from logits `(..., V)` by one uniform number `(...)` each: where the summed probability passes it."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    probability = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probability.sort(stable=True, dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probability = probability.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    total = probability.cumsum(-1)
    target = noise[..., None] * total[..., -1:]
    return torch.searchsorted(total, target, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def _noise(generator: torch.Generator | Sequence[torch.Generator] | None, shape: tuple[int, int, int]) -> Tensor:
    """Uniform numbers in [0, 1), float64 `(videos, L, S)`."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise WaltError(f"generator: {len(generator)} given for {shape[0]} videos, one or one each needed")
    return torch.stack([torch.rand(shape[1:], dtype=torch.float64, generator=g, device=g.device) for g in generator])


def _check_sampling(
    shape: Grid,
    guidance_scale: float,
    null_condition: Condition | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    samples: int,
) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise WaltError(f"shape: {tuple(shape)} given, positive (frames, rows, columns) needed")
    if guidance_scale != 1.0 and null_condition is None:
        raise WaltError(f"guidance_scale: {guidance_scale} given without null_condition")
    if temperature < 0:
        raise WaltError(f"temperature: {temperature} given, 0 or more needed")
    if top_k is not None and top_k < 1:
        raise WaltError(f"top_k: {top_k} given, at least 1 needed, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise WaltError(f"top_p: {top_p} given, a number in (0, 1] needed, or None")
    if samples < 1:
        raise WaltError(f"samples_per_condition: {samples} given, at least 1 needed")


def _check_tokens(name: str, tokens: Tensor, subcodes: int, vocab_size: int) -> None:
    """`(B, s, h, w)` or `(B, s, h, w, subcodes)` integers in the vocabulary."""
    more = (subcodes,) if subcodes > 1 else ()
    if tokens.ndim != 4 + len(more) or (more and tokens.shape[-1] != subcodes) or not tokens.numel():
        wanted = "(B, s, h, w" + "".join(f", {n}" for n in more) + ")"
        raise WaltError(f"{name}: shape {tuple(tokens.shape)} given, {wanted} needed")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise WaltError(f"{name}: {tokens.dtype} given, integers needed")
    # On an accelerator the check would wait for the device.
    if tokens.device.type == "cpu" and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise WaltError(f"{name}: {int(tokens.min())}..{int(tokens.max())} given, 0..{vocab_size - 1} allowed")
