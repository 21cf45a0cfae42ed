"""Packs: samples of any size share one token budget, with no padding (NaViT, arXiv 2307.06304).

`Packer` packs a stream of samples as it comes; `fill_budget` draws shapes for the synthetic theatre. NaViT's resolution
sampling (`draw_size`) and token dropping (`draw_kept`) are options of a recipe, off by default.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from walt.attention import Window, plan_windows
from walt.errors import WaltError, suggest
from walt.latents import Grid

logger = logging.getLogger(__name__)


def fill_budget(
    budget: int,
    sizes: Sequence[int],
    weights: Sequence[float],
    rng: np.random.Generator,
    name: str = "batch_tokens",
) -> list[int]:
    """Draws shape indices by weight until none fits what is left of the budget.

    Args:
        budget: tokens (or pixels) in the pack.
        sizes: those of each shape.
        weights: how often each shape is drawn while it still fits.
        rng: the source of the draw; the pack is a pure function of it.
        name: the recipe's field that the budget is, for the error.

    Returns:
        Indices into `sizes` whose sizes sum to at most `budget`. What is left over is smaller than the smallest shape.

    Raises:
        WaltError: when not even the smallest shape fits.
    """
    if min(sizes) > budget:
        raise WaltError(f"{name} is {budget}, but the smallest shape of the recipe has {min(sizes)}")
    size, weight = np.asarray(sizes), np.asarray(weights, dtype=np.float64)
    chosen: list[int] = []
    left = budget
    while True:
        fits = size <= left
        if not fits.any():
            return chosen
        p = np.where(fits, weight, 0.0)
        index = int(rng.choice(len(sizes), p=p / p.sum()))
        chosen.append(index)
        left -= int(size[index])


# ---------------------------------------------------------------------------------------------------------------------
# Packing a stream


class Item(NamedTuple):
    """A sample to be packed.

    Attributes:
        tokens: its size, at least 1.
        payload: what finds it again, such as a key or a row of an index: a JSON value wherever the packer's state is
            saved. Not its pixels: every rank packs the whole stream and loads its own packs alone.
        cost: what its attention costs (`attention_cost`); None for whole-sample attention, tokens squared.
    """

    tokens: int
    payload: Any
    cost: float | None = None


@dataclass(frozen=True)
class Pack:
    """Samples of one rank and step; `items` in the order they came.

    Packs come out in rounds of one per rank, ranks ascending. Only in the last round of `flush` may a rank's be empty,
    when fewer samples were left than ranks.
    """

    round: int
    rank: int
    budget: int
    items: tuple[Item, ...]

    @property
    def payloads(self) -> tuple[Any, ...]:
        """What the samples were given with."""
        return tuple(item.payload for item in self.items)

    @property
    def tokens(self) -> int:
        """Tokens of all samples; there are no others."""
        return sum(item.tokens for item in self.items)

    @property
    def cost(self) -> float:
        """Attention cost of all samples."""
        return sum(_cost(item) for item in self.items)

    @property
    def fill(self) -> float:
        """Share of the budget that is used."""
        return self.tokens / self.budget


class Packer:
    """Packs a stream of samples of unknown sizes into a token budget per rank, looking some samples ahead.

    Samples wait until `look_ahead` of them are there and a round (one pack per rank) can be filled. It is made of

    - "first_fit": the samples in the order they came, each into the first pack with room (NaViT, appendix A.3);
    - "best_fit" (the default): the oldest samples that a round holds, dearest first, each into the pack with the least
      attention cost that has room; then all others, largest first, each where it leaves the least room. Which samples
      a pack holds hence follows the stream, not their size, and the samples behind fill the gaps.

    Then gaps are closed, costs evened out and token counts made round by exchanging samples, among packs and with those
    that wait. The oldest
    sample always goes with the next round, so that none waits for more than `look_ahead` rounds.

    The packs are a pure function of the settings and the stream, and the state between two samples is a JSON value:
    a restored packer that is given the rest of the stream gives the rest of the packs. Give the same stream on every
    rank and take the packs of your own; no communication is needed.

    Args:
        budget: tokens of a pack.
        ranks: packs of a round.
        look_ahead: samples that wait before a round is made; None for 64, or 16 per rank where that is more. The more,
            the fuller the packs and the more even the costs; a mix of images and clips passes 99 % with these.
        method: "best_fit" or "first_fit".
        oversize: a sample larger than the budget is an error ("error"), or is left out, logged and counted ("report").
        multiple: packs hold a multiple of so many tokens where that can be had by an exchange: matrix products of other
            row counts are slower, by up to 5 % in float32 and 9 % in bfloat16 on a CPU with AVX-512. 1: any number.

    Raises:
        WaltError: a setting out of range.
    """

    METHODS = ("best_fit", "first_fit")

    def __init__(
        self,
        budget: int,
        *,
        ranks: int = 1,
        look_ahead: int | None = None,
        method: Literal["best_fit", "first_fit"] = "best_fit",
        oversize: Literal["error", "report"] = "error",
        multiple: int = 8,
    ) -> None:
        if look_ahead is None and isinstance(ranks, int):
            look_ahead = max(64, 16 * ranks)
        for name, value in (("budget", budget), ("ranks", ranks), ("look_ahead", look_ahead), ("multiple", multiple)):
            if not isinstance(value, int) or value < 1:
                raise WaltError(f"{name}: {value!r} given, an integer of at least 1 needed")
        for name, choice, allowed in (("method", method, self.METHODS), ("oversize", oversize, ("error", "report"))):
            if choice not in allowed:
                raise WaltError(
                    f"{name}: {choice!r} given, one of {', '.join(allowed)} needed{suggest(choice, allowed)}"
                )
        self.settings = {
            "budget": budget,
            "ranks": ranks,
            "look_ahead": look_ahead,
            "method": method,
            "oversize": oversize,
            "multiple": multiple,
        }
        assert look_ahead is not None
        self.budget, self.ranks, self.look_ahead, self.method = budget, ranks, look_ahead, method
        self.multiple = multiple
        self.report_oversize = oversize == "report"
        self._waiting: list[Item] = []
        self._tokens = 0  # of all that wait
        self._round = 0
        self._totals = {
            "items": 0,
            "tokens": 0,
            "oversize": 0,
            "fill_min": 1.0,
            "token_spread": 0.0,
            "cost_spread": 0.0,
        }

    def add(self, item: Item | tuple[int, Any]) -> list[Pack]:
        """Takes one sample; returns the packs that are ready, whole rounds in order, mostly none.

        Raises:
            WaltError: a size below 1, or above the budget where that is an error.
        """
        item = Item(*item)
        if not isinstance(item.tokens, int | np.integer) or item.tokens < 1:
            raise WaltError(f"tokens: {item.tokens!r} given for {item.payload!r}, an integer of at least 1 needed")
        item = item._replace(tokens=int(item.tokens))
        if item.tokens > self.budget:
            text = f"{item.payload!r} has {item.tokens} tokens, the budget of a pack is {self.budget}"
            if not self.report_oversize:
                raise WaltError(f"{text}: cut or resize it, or raise the budget")
            logger.warning("left out: %s", text)
            self._totals["oversize"] += 1
            return []
        self._waiting.append(item)
        self._tokens += item.tokens
        packs: list[Pack] = []
        while len(self._waiting) >= self.look_ahead and self._tokens >= self.ranks * self.budget:
            packs += self._make_round()
        return packs

    def flush(self) -> list[Pack]:
        """Packs all that waits, however full; the last round is spread evenly over the ranks."""
        packs: list[Pack] = []
        while self._waiting:
            packs += self._make_round()
        if self._round:
            logger.info("packing: %s", self.utilisation())
        return packs

    def utilisation(self) -> dict[str, float]:
        """Figures of all packs so far, for the log.

        `fill` and `fill_min`: share of the budget used, mean and least; `padding`: tokens computed that belong to no
        sample, 0 as a pack holds nothing else; `token_spread` and `cost_spread`: largest minus smallest over mean among
        the ranks of a round, mean of rounds; `oversize`: samples left out; `waiting`: samples held.
        """
        rounds, totals = max(1, self._round), self._totals
        packs = rounds * self.ranks
        return {
            "packs": self._round * self.ranks,
            "items": totals["items"],
            "tokens": totals["tokens"],
            "fill": totals["tokens"] / (packs * self.budget),
            "fill_min": totals["fill_min"] if self._round else 0.0,
            "padding": 0.0,
            "token_spread": totals["token_spread"] / rounds,
            "cost_spread": totals["cost_spread"] / rounds,
            "oversize": totals["oversize"],
            "waiting": len(self._waiting),
        }

    def state_dict(self) -> dict[str, Any]:
        """Settings, waiting samples and figures, as a JSON value.

        Raises:
            WaltError: a payload is no JSON value.
        """
        state = {
            "settings": self.settings,
            "round": self._round,
            "waiting": [list(item) for item in self._waiting],
            "totals": dict(self._totals),
        }
        try:
            return dict(json.loads(json.dumps(state)))
        except (TypeError, ValueError) as error:
            raise WaltError(f"payload: the packer's state can only be saved with JSON payloads ({error})") from None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            WaltError: the state is none, or of other settings: the packs would not be those of an uninterrupted run.
        """
        try:
            settings, waiting = dict(state["settings"]), [Item(*row) for row in state["waiting"]]
            number, totals = int(state["round"]), {name: state["totals"][name] for name in self._totals}
        except (KeyError, TypeError, ValueError) as error:
            raise WaltError(f"packer state: not one of Packer.state_dict ({error!r})") from None
        changed = [f"{k} {settings.get(k)!r} -> {v!r}" for k, v in self.settings.items() if settings.get(k) != v]
        if changed:
            raise WaltError(f"packer state: saved with other settings ({', '.join(changed)})")
        self._waiting, self._round, self._totals = waiting, number, totals
        self._tokens = sum(item.tokens for item in waiting)

    # -- one round

    def _make_round(self) -> list[Pack]:
        waiting = dict(enumerate(self._waiting))
        draft = _Draft(self.budget, [{} for _ in range(self.ranks)], waiting)
        if self.method == "first_fit" and self._tokens > self.ranks * self.budget:
            for i in list(waiting):
                draft.put(i, draft.first_with_room(i))
        else:
            total, oldest = 0, []
            for i, item in waiting.items():
                total += item.tokens
                if total > self.ranks * self.budget:
                    break
                oldest.append(i)
            by_cost = sorted(oldest[1:], key=lambda i: (-_cost(waiting[i]), -waiting[i].tokens, i))
            for i in [0, *by_cost]:
                draft.put(i, draft.cheapest_with_room(i))
            for i in sorted(waiting, key=lambda i: (-waiting[i].tokens, i)):
                draft.put(i, draft.tightest_with_room(i))
        draft.close_gaps()
        draft.even_costs()
        draft.align(self.multiple)
        draft.even_costs(self.multiple)
        taken = {i for pack in draft.packs for i in pack}
        self._waiting = [item for i, item in enumerate(self._waiting) if i not in taken]
        packs = [
            Pack(self._round, rank, self.budget, tuple(items[i] for i in sorted(items)))
            for rank, items in enumerate(draft.packs)
        ]
        self._count(packs)
        return packs

    def _count(self, packs: list[Pack]) -> None:
        tokens, costs, totals = [p.tokens for p in packs], [p.cost for p in packs], self._totals
        self._tokens -= sum(tokens)
        self._round += 1
        totals["items"] += sum(len(pack.items) for pack in packs)
        totals["tokens"] += sum(tokens)
        totals["fill_min"] = min(totals["fill_min"], min(tokens) / self.budget)
        totals["token_spread"] += (max(tokens) - min(tokens)) * len(packs) / sum(tokens)
        totals["cost_spread"] += (max(costs) - min(costs)) * len(packs) / sum(costs) if sum(costs) else 0.0
        if self._round % 100 == 0:
            logger.info("packing: %s", self.utilisation())


class _Draft:
    """A round in the making: packs of {place in the window: item}, and what still waits."""

    HELD = -1  # in the hand, during an exchange

    def __init__(self, budget: int, packs: list[dict[int, Item]], waiting: dict[int, Item]) -> None:
        self.budget, self.packs, self.waiting = budget, packs, waiting
        self.room = [budget for _ in packs]
        self.costs = [0.0 for _ in packs]
        self.held: dict[int, Item] = {}

    def put(self, i: int, rank: int | None) -> None:
        """Moves a waiting item into a pack; None leaves it."""
        if rank is not None:
            self._move(i, None, rank)

    def first_with_room(self, i: int) -> int | None:
        return next((r for r, room in enumerate(self.room) if room >= self.waiting[i].tokens), None)

    def cheapest_with_room(self, i: int) -> int | None:
        fits = [r for r, room in enumerate(self.room) if room >= self.waiting[i].tokens]
        return min(fits, key=lambda r: (self.costs[r], -self.room[r], r), default=None)

    def tightest_with_room(self, i: int) -> int | None:
        fits = [r for r, room in enumerate(self.room) if room >= self.waiting[i].tokens]
        return min(fits, key=lambda r: (self.room[r], self.costs[r], r), default=None)

    def close_gaps(self) -> None:
        """Exchanges an item of a pack for a larger one that waits, as long as that leaves less room."""
        for rank, pack in enumerate(self.packs):
            while self.room[rank]:
                best: tuple[int, int, int] | None = None
                for old, item in pack.items():
                    if old == 0:
                        continue  # the oldest goes with this round
                    for new, other in self.waiting.items():
                        gain = other.tokens - item.tokens
                        if 0 < gain <= self.room[rank] and (best is None or gain > best[0]):
                            best = (gain, old, new)
                    if best is not None and best[0] == self.room[rank]:
                        break
                if best is None:
                    break
                self._move(best[1], rank, None)
                self._move(best[2], None, rank)

    def even_costs(self, multiple: int = 1) -> None:
        """Exchanges one dear sample for cheaper ones of about as many tokens, a `multiple` more or fewer, while that brings
        the costs together.

        From the costliest pack to the cheapest, from the costliest to those that wait, or from those to the cheapest;
        packs stay as full as they are, up to 1/256 of the budget.
        """
        for _ in range(8 * len(self.packs)):
            mean = sum(self.costs) / len(self.packs)
            ranks = sorted(range(len(self.packs)), key=lambda r: (self.costs[r], r))
            low, high = ranks[0], ranks[-1]
            if self.costs[high] - self.costs[low] <= 0.005 * mean:
                return
            # The costliest with those that wait and the cheapest few; the cheapest with those and the costliest few.
            pairs: list[tuple[int | None, int | None]] = [(high, None), (None, low), (high, low)]
            pairs += [(high, r) for r in ranks[1:4] if r != high] + [(r, low) for r in ranks[-4:-1] if r != low]
            exchanges = [
                found for here, there in pairs if (found := self._exchange(here, there, mean, multiple)) is not None
            ]
            if not exchanges:
                return
            _, here, there, a, group = min(exchanges, key=lambda found: found[0])
            for b in group:
                self._move(b, there, self.HELD)
            self._move(a, here, there)
            for b in group:
                self._move(b, self.HELD, here)

    def align(self, multiple: int) -> None:
        """Exchanges samples with those that wait until each pack's tokens are a multiple, where one for one, one for two or
        two for one will do; it may cost 1/256 of the budget. Of several ways the one that leaves the costs most even."""
        for rank, room in enumerate(self.room):
            over = (self.budget - room) % multiple
            gains = [gain for gain in range(room, -self._few - 1, -1) if (over + gain) % multiple == 0]
            ways = self._swaps(rank, gains) if over else []
            if not ways:
                continue
            mean = sum(self.costs) / len(self.packs)

            def uneven(way: tuple[list[int], list[int]], rank: int = rank, mean: float = mean) -> float:
                gone, come = way
                change = sum(_cost(self.waiting[i]) for i in come) - sum(_cost(self.packs[rank][i]) for i in gone)
                return abs(self.costs[rank] + change - mean)

            gone, come = min(ways, key=uneven)
            for i in come:
                self._move(i, None, self.HELD)
            for i in gone:
                self._move(i, rank, None)
            for i in come:
                self._move(i, self.HELD, rank)

    def _swaps(self, rank: int, gains: list[int]) -> list[tuple[list[int], list[int]]]:
        """Samples of a pack and of those that wait, whose exchange adds one of the `gains` to the pack's tokens."""
        oldest = 0  # goes with this round
        mine = _distinct({i: item for i, item in self.packs[rank].items() if i != oldest})
        others = _distinct(self.waiting)
        sizes: dict[int, list[int]] = {}
        for i, item in others.items():
            sizes.setdefault(item.tokens, []).append(i)
        ways = [([a], [b]) for a in mine for gain in gains for b in sizes.get(mine[a].tokens + gain, [])]
        if ways:
            return ways
        for a, gain in itertools.product(mine, gains):
            whole = mine[a].tokens + gain
            ways += [([a], [b, c]) for b in others for c in sizes.get(whole - others[b].tokens, []) if b < c]
        for a, b in itertools.combinations(mine, 2):
            whole = mine[a].tokens + mine[b].tokens
            ways += [([a, b], [c]) for gain in gains for c in sizes.get(whole + gain, [])]
        return ways

    def _exchange(
        self, here: int | None, there: int | None, mean: float, multiple: int
    ) -> tuple[float, int | None, int | None, int, list[int]] | None:
        """The best item to take from here for a group from there; None when none brings the costs together.

        Returns (change of the sum of squared distances from the mean, here, there, item, group).
        """
        best: tuple[float, int | None, int | None, int, list[int]] | None = None
        seen: set[tuple[int, float]] = set()
        for a, dear in self._side(here).items():
            if (there is None and a == 0) or (dear.tokens, _cost(dear)) in seen:
                continue  # the oldest goes with this round
            seen.add((dear.tokens, _cost(dear)))
            group = self._cheaper(there, dear, self._slack(here))
            items = [self._side(there)[b] for b in group]
            less = dear.tokens - sum(item.tokens for item in items)
            if less > self._slack(there) or less % multiple:
                continue
            gain = _cost(dear) - sum(_cost(item) for item in items)
            total = change = 0.0
            for rank, sign in ((here, -1), (there, 1)):
                if rank is not None:
                    total += sign * gain
                    change += (2 * self.costs[rank] + sign * gain) * sign * gain
            change -= (2 * mean * len(self.packs) + total) * total / len(self.packs)
            if change < -1e-6 * mean**2 and (best is None or change < best[0]):
                best = (change, here, there, a, group)
        return best

    @property
    def _few(self) -> int:
        return self.budget // 256

    def _side(self, rank: int | None) -> dict[int, Item]:
        return self.waiting if rank is None else self.packs[rank]

    def _slack(self, rank: int | None) -> int:
        """Tokens that may be added to a pack; to those that wait as few as leave the other pack full."""
        return self._few if rank is None else self.room[rank]

    def _cheaper(self, rank: int | None, dear: Item, slack: int) -> list[int]:
        """Items that cost less per token than `dear`, largest first, together at most its size and `slack`."""
        rate, left, chosen = _cost(dear) / dear.tokens, dear.tokens + slack, []
        for i, item in sorted(self._side(rank).items(), key=lambda pair: (-pair[1].tokens, pair[0])):
            if i and item.tokens <= left and _cost(item) / item.tokens < rate:
                chosen.append(i)
                left -= item.tokens
        return chosen

    def _move(self, i: int, source: int | None, target: int | None) -> None:
        """An item from one place to another: the rank of a pack, None for those that wait."""
        item = self._at(source).pop(i)
        self._at(target)[i] = item
        for rank, sign in ((source, -1), (target, 1)):
            if rank is not None and rank != self.HELD:
                self.room[rank] -= sign * item.tokens
                self.costs[rank] += sign * _cost(item)

    def _at(self, rank: int | None) -> dict[int, Item]:
        return self.held if rank == self.HELD else self._side(rank)


def _distinct(items: dict[int, Item]) -> dict[int, Item]:
    """The first of every size and cost."""
    first: dict[tuple[int, float], int] = {}
    for i in sorted(items):
        first.setdefault((items[i].tokens, _cost(items[i])), i)
    return {i: items[i] for i in first.values()}


def _cost(item: Item) -> float:
    return float(item.tokens) ** 2 if item.cost is None else item.cost


def attention_cost(grid: Grid, windows: Sequence[Window], identity_images: bool = False) -> float:
    """Query-key pairs of one sample over the window kinds of a model, for `Item.cost`.

    Args:
        grid: frames, rows and columns in tokens.
        windows: one (t, h, w) per kind of layer, as `walt.attention.plan_windows` reads them; [(None, None, None)] for
            whole-sample attention.
        identity_images: an image costs nothing in windows that span frames.
    """
    pairs = 0
    for window in windows:
        plan = plan_windows((grid,), window, identity_images=identity_images and window[0] != 1)
        pairs += sum(group.windows * group.length**2 for group in plan.groups)
    return float(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# NaViT's options: resolution sampling and token dropping


def draw_size(
    height: int,
    width: int,
    multiple: int,
    *,
    low: int,
    high: int,
    distribution: Literal["uniform", "normal"],
    mean: float,
    by: Literal["side", "area"],
    rng: np.random.Generator,
) -> tuple[int, int]:
    """A random size of the given aspect ratio (NaViT, section 4.4).

    u in [-1, 1], uniform or normal around `mean` with deviation 1 and cut at the ends, is mapped to a side R in
    [low, high] linearly, or so that the area R^2 is linear in u ("area").

    Returns:
        Height and width with height * width about R^2, rounded to multiples of `multiple`, each at least one.
    """
    u = float(rng.uniform(-1.0, 1.0))
    if distribution == "normal":
        u = 2.0
        while abs(u) > 1.0:
            u = float(rng.normal(mean, 1.0))
    share = (u + 1.0) / 2.0
    side = low + share * (high - low) if by == "side" else math.sqrt(low**2 + share * (high**2 - low**2))
    ratio = math.sqrt(height / width)
    return (
        max(1, round(side * ratio / multiple)) * multiple,
        max(1, round(side / ratio / multiple)) * multiple,
    )


def draw_drop_rate(
    schedule: Literal["constant", "beta", "resolution", "sigmoid"],
    low: float,
    high: float,
    *,
    mean: float = 0.5,
    tokens: tuple[int, int, int] = (1, 1, 1),
    step: int = 0,
    middle: float = 0.0,
    scale: float = -1.0,
    rng: np.random.Generator,
) -> float:
    """The share of a sample's tokens to drop (NaViT, section 3.3 and appendix).

    Args:
        schedule: "constant": `high`. "beta": u * high, u Beta with mean `mean` and variance 0.3 mean (1 - mean).
            "resolution": normal with deviation 0.02, cut at two of them, around a mean that grows linearly with the
            sample's tokens from `low` (the shortest) to `high` (the longest). "sigmoid": low + (high - low) *
            sigmoid((step - middle) / scale), the same for all; scale < 0 falls, which the paper found best.
        low, high: bounds in [0, 1).
        tokens: of this sample, of the shortest and of the longest ("resolution").
        step: training step; the samples seen are proportional to it, as the budget is constant.
        rng: the source of the draw.
    """
    if schedule == "constant":
        return high
    if schedule == "beta":
        count = 1 / 0.3 - 1  # a + b of a Beta whose variance is 0.3 mean (1 - mean)
        return high * float(rng.beta(mean * count, (1 - mean) * count))
    if schedule == "resolution":
        here, shortest, longest = tokens
        share = (here - shortest) / max(1, longest - shortest)
        z = 3.0
        while abs(z) > 2.0:
            z = float(rng.normal())
        return min(max(low + share * (high - low) + 0.02 * z, 0.0), 0.99)
    x = (step - middle) / scale
    return low + (high - low) * (1 / (1 + math.exp(-x)) if x > -700 else 0.0)


def draw_kept(grid: Grid, rate: float, rng: np.random.Generator) -> Tensor | None:
    """Which tokens of a sample stay, bool `(t, h, w)`; None when all do.

    The same places of every frame go (tubes), round(rate * h * w) of them but never all: a moving thing cannot be read
    off the frame beside it, and windows over whole frames keep one length.
    """
    t, h, w = grid
    dropped = min(round(rate * h * w), h * w - 1)
    if not dropped:
        return None
    kept = np.ones(h * w, dtype=bool)
    kept[rng.choice(h * w, dropped, replace=False)] = False
    return torch.from_numpy(kept).view(1, h, w).expand(t, h, w)
