"""Packing: nothing is lost or padded, packs are full and even, and a restored packer goes on as if never stopped."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

import numpy as np
import pytest
import torch

from walt.data.packing import Item, Packer, attention_cost, draw_drop_rate, draw_kept, draw_size
from walt.errors import WaltError

IMAGES = [(1, 8, 8), (1, 8, 14), (1, 12, 20), (1, 16, 16), (1, 16, 28)]
CLIPS = [(t, *size) for t in (2, 3, 4, 5, 7) for size in ((8, 14), (14, 8), (10, 10))]
WINDOWS = [(1, None, None), (None, 4, 4)]


def stream(count: int, seed: int = 0, windows: Any = WINDOWS) -> list[Item]:
    """Images and clips of 20 sizes, as a data source would give them: payloads are their numbers."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(count):
        t, h, w = IMAGES[rng.integers(5)] if rng.random() < 0.6 else CLIPS[rng.integers(15)]
        items.append(Item(t * h * w, number, attention_cost((t, h, w), windows, identity_images=True)))
    return items


def pack_all(packer: Packer, items: list[Item]) -> list[Any]:
    return [pack for item in items for pack in packer.add(item)] + packer.flush()


@pytest.mark.parametrize("method", Packer.METHODS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_sample_is_packed_once_within_the_budget(method: Any, ranks: int) -> None:
    items = stream(500)
    packs = pack_all(Packer(2048, ranks=ranks, method=method), items)
    assert sorted(number for pack in packs for number in pack.payloads) == list(range(500))
    assert max(pack.tokens for pack in packs) <= 2048
    assert [(p.round, p.rank) for p in packs] == list(itertools.product(range(len(packs) // ranks), range(ranks)))
    for pack in packs:
        assert list(pack.payloads) == sorted(pack.payloads)
        assert all(items[item.payload] == item for item in pack.items)


@pytest.mark.parametrize("method", Packer.METHODS)
def test_packs_are_full_and_no_sample_waits_long(method: Any) -> None:
    packer = Packer(2048, ranks=2, method=method)
    packs = [pack for item in stream(3000) for pack in packer.add(item)]
    figures = packer.utilisation()
    assert figures["fill"] > 0.99 and figures["fill_min"] > 0.94 and figures["padding"] == 0
    assert figures["fill"] == pytest.approx(np.mean([pack.tokens / 2048 for pack in packs]))
    assert figures["items"] + figures["waiting"] == 3000 and figures["oversize"] == 0
    for a, b in zip(packs[::2], packs[1::2], strict=True):
        oldest = min(a.payloads + b.payloads)
        assert all(oldest <= n for pack in packs[2 * a.round :] for n in pack.payloads)  # the oldest always goes


def test_ranks_get_equal_tokens_and_equal_attention() -> None:
    even = Packer(2048, ranks=2)
    first = Packer(2048, ranks=2, method="first_fit")
    for item in stream(3000):
        even.add(item)
    assert even.utilisation()["token_spread"] < 0.01 and even.utilisation()["cost_spread"] < 0.05
    # Without balancing they are far from it: one rank draws the long clips.
    rng = np.random.default_rng(0)
    loose = [
        rng.permutation([item.cost or 0.0 for item in stream(30, seed)]).reshape(2, -1).sum(1) for seed in range(50)
    ]
    assert np.mean([(max(c) - min(c)) / np.mean(c) for c in loose]) > 0.15
    for item in stream(3000):
        first.add(item)
    assert first.utilisation()["token_spread"] < 0.01 and first.utilisation()["cost_spread"] < 0.08


@pytest.mark.parametrize("method", Packer.METHODS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_packs_hold_a_multiple_of_tokens(method: Any, ranks: int) -> None:
    """Nearly all do, at no cost in fill, though the sizes are no multiples: 10x10 frames have 100 tokens."""
    share = {}
    for multiple in (1, 8):
        packer = Packer(2048, ranks=ranks, method=method, multiple=multiple)
        packs = [pack for item in stream(3000) for pack in packer.add(item)]
        share[multiple] = np.mean([pack.tokens % 8 == 0 for pack in packs])
        assert packer.utilisation()["fill"] > 0.99
        assert max(pack.tokens for pack in packs) <= 2048
    assert share[1] < 0.8 and share[8] > 0.93


def test_the_mix_of_a_pack_follows_the_stream() -> None:
    """Best-fit-decreasing over the whole window would put all long clips into the first packs."""
    items = stream(4000)
    packer = Packer(4096)
    share = [
        sum(item.tokens for item in pack.items if item.tokens > 300) / pack.tokens
        for item in items
        for pack in packer.add(item)
    ]
    whole = sum(item.tokens for item in items if item.tokens > 300) / sum(item.tokens for item in items)
    assert abs(np.mean(share) - whole) < 0.02
    assert abs(np.mean(share[: len(share) // 4]) - np.mean(share[-len(share) // 4 :])) < 0.05


@pytest.mark.parametrize("method", Packer.METHODS)
@pytest.mark.parametrize("stop", [0, 63, 64, 201])
def test_a_restored_packer_goes_on_as_if_never_stopped(method: Any, stop: int) -> None:
    items = stream(400)
    whole = pack_all(Packer(1500, ranks=2, method=method), items)
    first = Packer(1500, ranks=2, method=method)
    before = [pack for item in items[:stop] for pack in first.add(item)]
    state = json.loads(json.dumps(first.state_dict()))
    second = Packer(1500, ranks=2, method=method)
    second.load_state_dict(state)
    after = pack_all(second, items[stop:])
    assert before + after == whole
    uninterrupted = Packer(1500, ranks=2, method=method)
    pack_all(uninterrupted, items)
    assert second.utilisation() == uninterrupted.utilisation()


def test_state_is_refused_where_it_would_not_go_on_exactly() -> None:
    state = Packer(100).state_dict()
    with pytest.raises(WaltError, match=r"other settings \(budget 100 -> 101\)"):
        Packer(101).load_state_dict(state)
    with pytest.raises(WaltError, match="not one of Packer"):
        Packer(100).load_state_dict({"round": 1})
    packer = Packer(100)
    packer.add((5, torch.zeros(2)))
    with pytest.raises(WaltError, match="JSON payloads"):
        packer.state_dict()


def test_a_sample_larger_than_the_budget_is_an_error_or_reported(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(WaltError, match="'clip 7' has 101 tokens, the budget of a pack is 100"):
        Packer(100).add((101, "clip 7"))
    packer = Packer(100, oversize="report")
    with caplog.at_level(logging.WARNING):
        assert packer.add((101, "clip 7")) == []
    assert "'clip 7' has 101 tokens" in caplog.text and packer.utilisation()["oversize"] == 1
    packer.add((100, "clip 8"))
    assert [pack.payloads for pack in packer.flush()] == [("clip 8",)]
    with pytest.raises(WaltError, match="at least 1"):
        packer.add((0, "nothing"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget: 0 given"),
        ({"ranks": 0}, "ranks: 0 given"),
        ({"look_ahead": -1}, "look_ahead: -1 given"),
        ({"multiple": 0}, "multiple: 0 given"),
        ({"method": "best-fit"}, 'did you mean "best_fit"'),
        ({"oversize": "drop"}, "one of error, report"),
    ],
)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(WaltError, match=message):
        Packer(**{"budget": 10, **settings})


def test_the_last_round_is_spread_over_the_ranks() -> None:
    packer = Packer(1000, ranks=4)
    for number in range(6):
        assert packer.add((100, number)) == []
    assert sorted(len(pack.items) for pack in packer.flush()) == [1, 1, 2, 2]
    packer.add((100, 6))
    assert sorted(len(pack.items) for pack in packer.flush()) == [0, 0, 0, 1]
    assert packer.flush() == []


def test_attention_cost_counts_the_pairs_of_windows() -> None:
    assert attention_cost((3, 4, 4), [(None, None, None)]) == 48**2
    assert attention_cost((3, 4, 4), [(1, None, None), (None, 2, 2)]) == 3 * 16**2 + 4 * 12**2
    assert attention_cost((1, 4, 4), [(1, None, None), (None, 2, 2)], identity_images=True) == 16**2
    assert attention_cost((3, 5, 4), [(None, 4, 4)]) == 48**2 + 12**2  # the border is a shorter window


# -- NaViT's options


@pytest.mark.parametrize("by", ["side", "area"])
def test_sizes_keep_the_aspect_ratio_within_bounds(by: Any) -> None:
    rng = np.random.default_rng(0)
    knobs: dict[str, Any] = {"low": 64, "high": 256, "distribution": "uniform", "mean": 0.0, "by": by, "rng": rng}
    sizes = np.array([draw_size(480, 640, 16, **knobs) for _ in range(2000)])
    assert (sizes % 16 == 0).all()
    areas = np.sqrt(sizes.prod(1))
    assert 56 <= areas.min() < 80 and 240 < areas.max() <= 264
    assert np.abs(sizes[:, 1] / sizes[:, 0] - 640 / 480).mean() < 0.06
    middle = np.mean(areas if by == "side" else areas**2)
    assert middle == pytest.approx(160 if by == "side" else (64**2 + 256**2) / 2, rel=0.03)


def test_low_biased_sizes_are_smaller() -> None:
    rng = np.random.default_rng(0)

    def mean(bias: float) -> float:
        draw = [
            draw_size(100, 100, 1, low=64, high=384, distribution="normal", mean=bias, by="side", rng=rng)[0]
            for _ in range(4000)
        ]
        assert min(draw) >= 64 and max(draw) <= 384
        return float(np.mean(draw))

    assert mean(-0.5) < mean(0.0) - 20 < mean(0.5) - 40


def test_drop_rates_follow_their_schedules() -> None:
    rng = np.random.default_rng(0)
    assert draw_drop_rate("constant", 0.0, 0.4, rng=rng) == 0.4
    beta = np.array([draw_drop_rate("beta", 0.0, 0.8, mean=0.6, rng=rng) for _ in range(20000)]) / 0.8
    assert beta.min() >= 0 and beta.max() <= 1
    assert beta.mean() == pytest.approx(0.6, abs=0.01) and beta.var() == pytest.approx(0.3 * 0.6 * 0.4, rel=0.05)
    for here, expected in ((100, 0.1), (550, 0.4), (1000, 0.7)):
        rates = [draw_drop_rate("resolution", 0.1, 0.7, tokens=(here, 100, 1000), rng=rng) for _ in range(500)]
        assert np.mean(rates) == pytest.approx(expected, abs=0.005)
        assert expected - 0.0401 <= min(rates) and max(rates) <= expected + 0.0401
    steps = [draw_drop_rate("sigmoid", 0.2, 0.8, step=n, middle=500, scale=-100, rng=rng) for n in (0, 500, 10**6)]
    assert steps[0] == pytest.approx(0.8, abs=0.01) and steps[1] == pytest.approx(0.5)
    assert steps[2] == pytest.approx(0.2)


def test_kept_tokens_are_tubes_and_never_none() -> None:
    rng = np.random.default_rng(0)
    kept = draw_kept((3, 4, 6), 0.5, rng)
    assert kept is not None and kept.shape == (3, 4, 6) and int(kept[0].sum()) == 12
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert draw_kept((3, 4, 6), 0.0, rng) is None
    least = draw_kept((2, 2, 2), 0.99, rng)
    assert least is not None and int(least.sum()) == 2
