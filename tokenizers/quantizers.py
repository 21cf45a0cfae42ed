"""Quantizers between an encoder and a decoder: VQ (a learned codebook), LFQ (signs) and FSQ (rounded levels).

One interface: `forward(z)` gives a `Quantized`, `indices_to_codes` and `codes_to_indices` translate, and `split_indices`
and `join_indices` cut an index into the sub-codes that an autoregressive model predicts with separate heads.
Letters: B batch, C channels, t h w latent grid, K bits of an LFQ code, N tokens (B t h w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from walt.errors import WaltError, suggest

LARGEST_GROUP = 14  # bits of one LFQ group: its entropy looks at 2^bits codes for every token


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a latent.

    z: the codes `(B, C, t, h, w)`, with the gradient of the input (straight through). indices: int64 `(B, t, h, w)`.
    losses: unweighted scalars to be minimised ("commitment", "codebook", "entropy"), those the quantizer has.
    metrics: detached scalars for the log, see `codebook_metrics`.
    """

    z: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Quantizer(nn.Module):
    """What all three have in common. `channels` is C, `size` the number of codes, `sub_sizes` those of the sub-codes."""

    def __init__(self, channels: int, sub_sizes: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.sub_sizes = tuple(sub_sizes)
        self.size = math.prod(sub_sizes)
        self.open = 0.0  # in training: the share of a batch's samples, the first ones, that pass unquantized

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes `(B, C, t, h, w)`."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes `(B, C, t, h, w)` of integer `indices` `(B, t, h, w)`; an index out of range is a WaltError."""
        self._check_indices(indices)
        return rearrange(self._lookup(indices), "b t h w c -> b c t h w")

    def latents_to_indices(self, z: Tensor) -> Tensor:
        """Indices int64 `(B, t, h, w)` of an encoder's latents `(B, C, t, h, w)`; nothing is learned from them."""
        self._check_latent(z)
        return self._nearest(rearrange(z, "b c t h w -> b t h w c"))

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Indices int64 `(B, t, h, w)` of codes `(B, C, t, h, w)`: the inverse of `indices_to_codes`."""
        return self.latents_to_indices(codes)

    def split_indices(self, indices: Tensor) -> Tensor:
        """Sub-codes int64 `(..., G)` of indices `(...)`: digits in mixed radix `sub_sizes`, the lowest first.

        MAGVIT-v2 (arXiv 2310.05737, section 3) predicts a code of 2^18 as two of 2^9.
        """
        self._check_indices(indices)
        digits = []
        for size in self.sub_sizes:
            digits.append(indices % size)
            indices = indices // size
        return torch.stack(digits, dim=-1)

    def join_indices(self, digits: Tensor) -> Tensor:
        """The inverse of `split_indices`."""
        if digits.shape[-1] != len(self.sub_sizes):
            raise WaltError(f"sub-codes: the last axis must be {len(self.sub_sizes)}, got shape {tuple(digits.shape)}")
        index = torch.zeros_like(digits[..., 0])
        for place, size in reversed(list(enumerate(self.sub_sizes))):
            if bool((digits[..., place] < 0).any() | (digits[..., place] >= size).any()):
                raise WaltError(f"sub-codes: number {place} must be in 0..{size - 1}")
            index = index * size + digits[..., place]
        return index

    def _passed(self, z: Tensor, codes: Tensor) -> Tensor:
        """What goes on to the decoder of latents `(B, C, t, h, w)` and their codes: straight through, less `open`."""
        count = round(self.open * len(z)) if self.training else 0
        closed = _straight_through(z[count:], codes[count:]).to(z.dtype)
        return torch.cat([z[:count], closed]) if count else closed

    def extra_repr(self) -> str:
        return f"channels={self.channels}, size={self.size}, sub_sizes={self.sub_sizes}"

    def _lookup(self, indices: Tensor) -> Tensor:
        """Codes `(..., C)` of valid indices `(...)`."""
        raise NotImplementedError

    def _nearest(self, z: Tensor) -> Tensor:
        """Indices `(...)` of latents `(..., C)`."""
        raise NotImplementedError

    def _check_latent(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[1] != self.channels or 0 in z.shape:
            raise WaltError(f"latents must be (B, {self.channels}, t, h, w), got shape {tuple(z.shape)}")

    def _check_indices(self, indices: Tensor) -> None:
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise WaltError(f"indices must be integers, got {indices.dtype}")
        if indices.numel():
            low, high = (int(v) for v in torch.aminmax(indices))
            if low < 0 or high >= self.size:
                raise WaltError(f"indices must be in 0..{self.size - 1}, got {low if low < 0 else high}")


# ---------------------------------------------------------------------------------------------------------------------
# VQ


class VectorQuantizer(Quantizer):
    """A learned codebook: the nearest vector (van den Oord et al. 2017, eq. 1-3; NUWA section 3.1).

    losses: "commitment" `mean |z - sg[e]|^2` and, with a "gradient" codebook, "codebook" `mean |sg[z] - e|^2`. With an
    "ema" codebook (their appendix A.1) each code is the running mean of the latents it stands for, and has no gradient.
    The codebook begins as latents of the first training batch. A code that stood for fewer than `restart_below` tokens
    a batch on average is put on a random latent of the batch, unless the batch is that small for all of them.

    Args:
        size, dim: of the codebook.
        codebook: "ema" or "gradient".
        decay: of the running counts and means.
        restart_below: mean tokens a batch below which a code starts anew; 0: never.
        normalize: compare directions only: latents and codes are scaled to norm 1 (Yu et al. 2022, ViT-VQGAN).
    """

    weight: Tensor
    counts: Tensor
    sums: Tensor
    step: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        codebook: str = "ema",
        decay: float = 0.99,
        restart_below: float = 0.03,
        normalize: bool = False,
    ) -> None:
        _positive(size=size, dim=dim)
        if codebook not in ("ema", "gradient"):
            raise WaltError(f'codebook must be "ema" or "gradient", got {codebook!r}')
        if not 0 <= decay < 1 or restart_below < 0:
            raise WaltError(f"decay must be in [0, 1) and restart_below at least 0, got {decay} and {restart_below}")
        super().__init__(dim, (size,))
        self.codebook, self.decay, self.restart_below, self.normalize = codebook, decay, restart_below, normalize
        self.frozen = False  # set to keep the codebook as it is, whatever the training mode
        weight = F.normalize(torch.randn(size, dim), dim=-1) if normalize else torch.randn(size, dim) / dim**0.5
        if codebook == "gradient":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("sums", weight.clone())
        self.register_buffer("counts", torch.ones(size))
        # Counts training batches: the seed of every draw, so that a resumed run draws what an unbroken one does.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        self._check_latent(z)
        rows = rearrange(z, "b c t h w -> (b t h w) c")
        rows = self._scaled(rows.float())
        # Fully open, the codebook waits for latents worth learning.
        learn = self.training and not self.frozen and self.open < 1.0
        if learn and int(self.step) == 0:
            self._begin(rows.detach())
        indices = self._nearest(rows)
        codes = self._lookup(indices)
        losses = {"commitment": (rows - codes.detach()).square().mean()}
        if self.training and self.open >= 1.0:
            losses["commitment"] = rows.new_zeros(())  # there is no codebook yet
        if self.codebook == "gradient":
            losses["codebook"] = (rows.detach() - codes).square().mean()
        metrics = codebook_metrics(indices, self.size)
        if learn:
            metrics["restarted"] = self._update(rows.detach(), indices)
        b, _, t, h, w = z.shape
        shape = {"b": b, "t": t, "h": h, "w": w}
        return Quantized(
            self._passed(*(rearrange(x, "(b t h w) c -> b c t h w", **shape) for x in (rows, codes))).to(z.dtype),
            rearrange(indices, "(b t h w) -> b t h w", **shape),
            losses,
            metrics,
        )

    @torch.no_grad()
    def fit(self, rows: Tensor, iterations: int = 15) -> None:
        """Puts the codebook on the k-means of latents `(N, dim)`, N at least `size` (Lloyd's iterations).

        A code that stands for none of them goes to the one that is worst represented.
        """
        if rows.ndim != 2 or rows.shape[1] != self.channels or len(rows) < self.size:
            raise WaltError(
                f"rows: a codebook of {self.size} is fitted to as many latents of {self.channels} or more, "
                f"got shape {tuple(rows.shape)}"
            )
        rows = self._scaled(rows.float())
        self.step.zero_()
        self._place(torch.ones(self.size, dtype=torch.bool, device=rows.device), rows)
        for _ in range(iterations):
            indices = self._nearest(rows)
            counts = torch.bincount(indices, minlength=self.size)
            sums = torch.zeros_like(self.weight).index_add_(0, indices, rows)
            self.weight.copy_(torch.where(counts[:, None] > 0, self._scaled(sums / counts[:, None]), self.weight))
            if empty := int((counts == 0).sum()):
                worst = (rows - self._lookup(indices)).square().sum(dim=-1).topk(empty).indices
                self.weight[counts == 0] = rows[worst]
        self.counts.fill_(1.0)
        if self.codebook == "ema":
            self.sums.copy_(self.weight)
        self.step += 1

    def _scaled(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.normalize else rows

    def _lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self._scaled(self.weight))

    def _nearest(self, z: Tensor) -> Tensor:
        weight = self._scaled(self.weight.detach()).to(torch.promote_types(self.weight.dtype, torch.float32))
        rows = self._scaled(z.detach().to(weight.dtype)).flatten(0, -2)
        half = 0.5 * weight.square().sum(dim=-1)
        # |z|^2 is the same for all codes; parts bound the memory of N x size distances.
        found = [(half - part @ weight.T).argmin(dim=-1) for part in rows.split(max(1, 2**24 // len(weight)))]
        return torch.cat(found).reshape(z.shape[:-1])

    @torch.no_grad()
    def _begin(self, rows: Tensor) -> None:
        self._place(torch.ones(self.size, dtype=torch.bool, device=rows.device), rows)

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor) -> Tensor:
        counts = torch.bincount(indices, minlength=self.size).to(rows.dtype)
        sums = torch.zeros(self.size, self.channels, dtype=rows.dtype, device=rows.device).index_add_(0, indices, rows)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        if not bool(sums.isfinite().all()):  # such a step is refused, and must leave nothing behind
            return counts.new_zeros(())
        self.counts.lerp_(counts, 1 - self.decay)
        if self.codebook == "ema":
            self.sums.lerp_(sums, 1 - self.decay)
            live = self.counts[:, None] > 1e-5  # a code that nothing comes near stays where it is
            self.weight.copy_(torch.where(live, self._scaled(self.sums / self.counts[:, None]), self.weight))
        self.step += 1
        # A batch smaller than the codebook cannot keep every code busy.
        threshold = min(self.restart_below, 0.5 * float(counts.sum()) / self.size)
        dead = self.counts < threshold
        self._place(dead, rows)
        return dead.sum().to(rows.dtype)

    @torch.no_grad()
    def _place(self, which: Tensor, rows: Tensor) -> None:
        """Puts the codes of `which` on random rows, a little apart where a row is used twice."""
        number = int(which.sum())
        if not number:
            return
        generator = torch.Generator().manual_seed(int(self.step))
        order = torch.randperm(len(rows), generator=generator)
        order = order.repeat(-(-number // len(order)))[:number].to(rows.device)
        noise = torch.randn(number, self.channels, generator=generator).to(rows)
        fresh = self._scaled(rows[order] + 0.01 * rows.std() * noise)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(fresh, 0)
        # As busy as a code of even use, so that it is not restarted before it is found.
        alive = 0.5 * (self.counts.mean() if self.step else torch.ones((), device=rows.device))
        self.weight[which] = fresh.to(self.weight.dtype)
        self.counts[which] = alive
        if self.codebook == "ema":
            self.sums[which] = fresh * alive


# ---------------------------------------------------------------------------------------------------------------------
# LFQ


class LookupFreeQuantizer(Quantizer):
    """The sign of every channel is a bit (MAGVIT-v2, arXiv 2310.05737, section 3.1): C = `bits`, codes in {-1, 1}^C.

    index = sum of 2^i [z_i > 0]. losses: "commitment" `mean |z - sg[q]|^2` and "entropy" `E[H(q(z))] - H(E[q(z)])`
    in nats, which makes single codes certain and all codes used; q(z) is the softmax of `-|z - code|^2 / temperature`.
    Over independent bits the first term is a sum of binary entropies. The second looks at all codes of a group of
    `bits / groups` bits and is summed over groups: exact for one group, an upper bound (bits of different groups taken
    as independent) for more, which is what makes 2^18 codes cheap. The groups are the sub-codes too.

    Args:
        bits: 1 to 18 and more. groups: a divisor of `bits`.
        temperature: of the softmax; small ones see only latents close to a border.
        diversity: weight of the second entropy.
    """

    def __init__(self, bits: int, groups: int = 1, temperature: float = 1.0, diversity: float = 1.0) -> None:
        _positive(bits=bits, groups=groups)
        if bits % groups:
            raise WaltError(f"groups must divide the {bits} bits, got {groups}")
        if bits // groups > LARGEST_GROUP:
            raise WaltError(
                f"groups: {bits} bits in {groups} group(s) would need the entropy over 2^{bits // groups} codes for "
                f"every token; at most 2^{LARGEST_GROUP}: use more groups"
            )
        if not temperature > 0 or diversity < 0:
            raise WaltError(f"temperature must be above 0 and diversity at least 0, got {temperature} and {diversity}")
        super().__init__(bits, (2 ** (bits // groups),) * groups)
        self.groups, self.temperature, self.diversity = groups, temperature, diversity

    def forward(self, z: Tensor) -> Quantized:
        self._check_latent(z)
        latent = z.float()
        codes = torch.where(latent > 0, 1.0, -1.0)
        indices = self.latents_to_indices(z)
        one, mean = self.entropies(rearrange(latent, "b c t h w -> (b t h w) c"))
        losses = {
            "commitment": (latent - codes).square().mean(),
            "entropy": one - self.diversity * mean,
        }
        metrics = codebook_metrics(indices, self.size)
        metrics["bit_entropy"] = bit_entropy(indices, self.channels).mean()
        return Quantized(self._passed(latent, codes).to(z.dtype), indices, losses, metrics)

    def entropies(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`E[H(q(z))]` and `H(E[q(z)])` in nats (the latter by groups) of latents `(N, C)`."""
        # -|z - 1|^2 + |z + 1|^2 = 4 z: the odds of a bit
        odds = 4.0 * rows / self.temperature
        yes, no = torch.sigmoid(odds), torch.sigmoid(-odds)
        one = -(yes * F.logsigmoid(odds) + no * F.logsigmoid(-odds)).sum(dim=-1).mean()
        width = self.channels // self.groups
        mean = rows.new_zeros(())
        for group in range(self.groups):
            codes = rows.new_ones(len(rows), 1)  # probabilities of the codes of the bits so far
            for bit in range(group * width, (group + 1) * width):
                codes = torch.cat([codes * no[:, bit : bit + 1], codes * yes[:, bit : bit + 1]], dim=1)
            mean = mean + torch.special.entr(codes.mean(dim=0).clamp_min(1e-30)).sum()
        return one, mean

    def _lookup(self, indices: Tensor) -> Tensor:
        return self._bits(indices).to(torch.get_default_dtype()) * 2 - 1

    def _nearest(self, z: Tensor) -> Tensor:
        places = 2 ** torch.arange(self.channels, device=z.device)
        return ((z > 0) * places).sum(dim=-1)

    def _bits(self, indices: Tensor) -> Tensor:
        return indices.unsqueeze(-1) >> torch.arange(self.channels, device=indices.device) & 1


# ---------------------------------------------------------------------------------------------------------------------
# FSQ


class FiniteScalarQuantizer(Quantizer):
    """Every channel is bounded and rounded to one of L levels (Mentzer et al. 2023, arXiv 2309.15505, section 3).

    Codes are scaled to [-1, 1]; an index counts in mixed radix `levels`, the first channel lowest. No losses: nothing
    can collapse. Level counts are best at least 5.

    Args:
        levels: per channel, at least 2 each. groups: sub-codes; neighbouring channels go together, evenly.
    """

    def __init__(self, levels: Sequence[int], groups: int = 1) -> None:
        levels = tuple(levels)
        if not levels or any(not isinstance(level, int) or level < 2 for level in levels):
            raise WaltError(f"levels must be integers of at least 2, got {levels}")
        _positive(groups=groups)
        if len(levels) % groups:
            raise WaltError(f"groups must divide the {len(levels)} channels, got {groups}")
        width = len(levels) // groups
        super().__init__(len(levels), [math.prod(levels[i : i + width]) for i in range(0, len(levels), width)])
        self.levels = levels

    def forward(self, z: Tensor) -> Quantized:
        self._check_latent(z)
        bounded = self._bound(rearrange(z.float(), "b c t h w -> b t h w c"))
        half = self._half(z.device)
        indices = self._index(bounded.round())
        levels = (rearrange(x / half, "b t h w c -> b c t h w") for x in (bounded, bounded.round()))
        return Quantized(self._passed(*levels).to(z.dtype), indices, {}, codebook_metrics(indices, self.size))

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        self._check_latent(codes)
        levels = rearrange(codes.float(), "b c t h w -> b t h w c") * self._half(codes.device)
        return self._index(levels.round())

    def _lookup(self, indices: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=indices.device)
        places = torch.tensor([math.prod(self.levels[:i]) for i in range(self.channels)], device=indices.device)
        digits = indices.unsqueeze(-1) // places % levels
        return (digits - levels // 2).to(torch.get_default_dtype()) / self._half(indices.device)

    def _nearest(self, z: Tensor) -> Tensor:
        return self._index(self._bound(z.float()).round())

    def _index(self, levels: Tensor) -> Tensor:
        sizes = torch.tensor(self.levels, device=levels.device)
        places = torch.tensor([math.prod(self.levels[:i]) for i in range(self.channels)], device=levels.device)
        return ((levels.long() + sizes // 2).clamp(min=torch.zeros_like(sizes), max=sizes - 1) * places).sum(dim=-1)

    def _half(self, device: torch.device) -> Tensor:
        return torch.tensor([level // 2 for level in self.levels], device=device, dtype=torch.float32)

    def _bound(self, z: Tensor) -> Tensor:
        """Their `f`: tanh to just below the outermost rounding borders; an even L is shifted by a half."""
        levels = torch.tensor(self.levels, device=z.device)
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = torch.where(levels % 2 == 1, 0.0, 0.5)
        shift = torch.tan(offset / half)
        return torch.tanh(z + shift) * half - offset


# ---------------------------------------------------------------------------------------------------------------------
# metrics


@torch.no_grad()
def codebook_metrics(indices: Tensor, size: int) -> dict[str, Tensor]:
    """How a codebook of `size` is used by `indices` (any shape): scalars, float32.

    "usage": share of the codes that occur, of those that could (N tokens show at most N). "perplexity": exp of the
    entropy of the codes' frequencies.
    """
    _, counts = torch.unique(indices, return_counts=True)
    share = counts.float() / max(1, indices.numel())
    usage = len(counts) / max(1, min(size, indices.numel()))
    return {
        "usage": torch.tensor(usage, device=indices.device),
        "perplexity": torch.special.entr(share).sum().exp(),
    }


@torch.no_grad()
def bit_entropy(indices: Tensor, bits: int) -> Tensor:
    """Entropy in bits of each bit of `indices` (any shape) over all of them, `(bits,)`: 1 for one that is even."""
    yes = (indices.reshape(-1, 1) >> torch.arange(bits, device=indices.device) & 1).double().mean(dim=0)
    return ((torch.special.entr(yes) + torch.special.entr(1 - yes)) / math.log(2)).float()


# ---------------------------------------------------------------------------------------------------------------------
# by name

KINDS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "fsq": FiniteScalarQuantizer,
}


def make_quantizer(kind: str, channels: int, settings: Mapping[str, Any] | None = None) -> Quantizer:
    """The quantizer `kind` ("vq", "lfq", "fsq") for latents of `channels`, with the class's arguments in `settings`.

    VQ's dim and LFQ's bits are the channels; FSQ's levels (as many as channels) must be given.

    Raises:
        WaltError: unknown kind or setting, settings that contradict the channels.
    """
    import inspect

    if kind not in KINDS:
        raise WaltError(f"quantizer must be one of {', '.join(KINDS)}, got {kind!r}{suggest(kind, KINDS)}")
    cls = KINDS[kind]
    implied: dict[str, Any] = {"vq": {"dim": channels}, "lfq": {"bits": channels}, "fsq": {}}[kind]
    given: dict[str, Any] = {**(settings or {})}
    parameters = inspect.signature(cls.__init__).parameters
    known = [name for name in parameters if name not in ("self", *implied)]
    for name in given:
        if name not in known:
            raise WaltError(f"quantizer {kind!r} has no {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            raise WaltError(f"quantizer {kind!r} needs {name!r}")
    quantizer = cls(**implied, **given)
    if quantizer.channels != channels:
        raise WaltError(f"levels: {quantizer.channels} given, the latent has {channels} channels")
    return quantizer


def _straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The codes with the gradient of the latent; the very codes where no gradient is asked for."""
    return z + (codes - z).detach() if z.requires_grad else codes


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise WaltError(f"{name} must be a positive integer, got {value!r}")
