"""3D nearby attention: every backend against a loop over positions, and the order of decoding."""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from torch import Tensor

from walt.errors import WaltError
from walt.latents import Grid
from walt.nearby import (
    EVERYTHING,
    Extent,
    Rule,
    nearby_attention,
    neighbour_mask,
    neighbours,
    radii,
    wave_steps,
    waves,
)

# size of the target, size of the condition, extent
CASES: list[tuple[Grid, Grid, Extent]] = [
    ((3, 4, 5), (3, 4, 5), (3, 3, 3)),
    ((3, 4, 5), (3, 4, 5), (1, 5, 3)),
    ((2, 9, 7), (2, 9, 7), (3, 3, 3)),
    ((4, 5, 3), (4, 5, 3), (3, "all", 1)),
    ((1, 1, 9), (1, 1, 9), (1, 1, 3)),
    ((2, 4, 4), (3, 3, 6), (3, 3, 3)),  # a sketch of another size
    ((4, 6, 6), (2, 3, 3), (3, 3, 1)),
    ((3, 4, 4), (5, 1, 1), ("all", 1, 1)),  # text
]

CASES_OF_NATTEN: list[tuple[Grid, Extent]] = [((4, 7, 6), (3, 3, 5)), ((1, 7, 6), (3, 3, 3))]


def sees(place: Grid, key: Grid, rule: Rule) -> bool:
    """The definition, word for word."""
    mapped = [p * m // n for p, n, m in zip(place, rule.size, rule.condition, strict=True)]
    steps = [abs(k - p) for k, p in zip(key, mapped, strict=True)]
    near = (
        sum(step == 0 for step in steps) >= 2
        if rule.axial
        else all(s <= r for s, r in zip(steps, rule.radius, strict=True))
    )
    before = key < place or (rule.include_self and key == place)
    return near and (before or not rule.causal)


def places(size: Grid) -> list[Grid]:
    return [(k, i, j) for k, i, j in itertools.product(*map(range, size))]


def naive(query: Tensor, key: Tensor, value: Tensor, rule: Rule, key_mask: Tensor | None) -> Tensor:
    """One softmax per position over a list of keys."""
    out = []
    for b in range(len(query)):
        for place in places(rule.size):
            seen = [
                k for k in places(rule.condition) if sees(place, k, rule) and (key_mask is None or key_mask[(b, *k)])
            ]
            if not seen:
                out.append(torch.zeros_like(query[(b, *place)]))
                continue
            keys = torch.stack([key[(b, *k)] for k in seen])
            values = torch.stack([value[(b, *k)] for k in seen])
            score = torch.einsum("nd,knd->nk", query[(b, *place)], keys) / math.sqrt(query.shape[-1])
            out.append(torch.einsum("nk,knd->nd", score.softmax(-1), values))
    return torch.stack(out).view(query.shape)


def inputs(
    size: Grid, condition: Grid, dtype: torch.dtype = torch.float64, d: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, *grid, 2, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for grid in (size, condition, condition)
    )
    return query, key, value


def variants(size: Grid, condition: Grid) -> list[tuple[bool, bool]]:
    """(causal, include_self) that make sense."""
    return [(False, True), (True, True), (True, False)] if size == condition else [(False, True)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "condition", "extent"), CASES)
def test_backends_equal_the_definition(size: Grid, condition: Grid, extent: Extent, masked: bool) -> None:
    """Outputs and gradients, in float64."""
    key_mask = torch.rand(2, *condition, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    for causal, include_self in variants(size, condition):
        for backends in ((None, "blocked", "full"), ("axial",)):
            rule = Rule(size, condition, radii(extent, condition), causal, include_self, axial=backends[0] == "axial")
            x = inputs(size, condition)
            expected = naive(*x, rule, key_mask)
            weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            gradients = torch.autograd.grad(expected, x, weight)
            for backend in backends:
                got = nearby_attention(*x, extent, causal, backend, include_self=include_self, key_mask=key_mask)
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
                for mine, theirs in zip(torch.autograd.grad(got, x, weight), gradients, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_heads_that_take_turns_equal_full_attention() -> None:
    """Wide heads and many samples: less than one tile fits at once, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, seed = (torch.randn(4, 3, 6, 6, 5, 48, generator=generator).double().requires_grad_() for _ in range(4))
    key_mask = torch.rand(4, 3, 6, 6, generator=generator) < 0.8
    results = []
    for backend in ("blocked", "full"):
        out = nearby_attention(q, k, v, (3, 3, 3), causal=True, backend=backend, key_mask=key_mask)
        results.append([out, *torch.autograd.grad(out, (q, k, v), seed)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("include_self", [True, False])
def test_causality_is_raster_order(include_self: bool) -> None:
    """Which values an output depends on, by its gradient: right and lower neighbours of the earlier frame among them."""
    size: Grid = (3, 4, 5)
    q, k, v = inputs(size, size)
    out = nearby_attention(q, k, v, (3, 3, 3), causal=True, backend="blocked", include_self=include_self)
    place = (1, 2, 2)
    (gradient,) = torch.autograd.grad(out[(0, *place)].sum(), v)
    depends = {p for p in places(size) if bool(gradient[(0, *p)].abs().sum() > 0)}
    cube = {(place[0] + a, place[1] + b, place[2] + c) for a, b, c in itertools.product((-1, 0, 1), repeat=3)}
    assert depends == {p for p in cube if p < place or (include_self and p == place)}
    assert (0, 3, 3) in depends and len(depends) == 13 + include_self
    assert not gradient[1].any()


@pytest.mark.parametrize("backend", ["blocked", "full", "axial"])
def test_reduced_precision(backend: str) -> None:
    size: Grid = (3, 6, 5)
    exact = nearby_attention(*inputs(size, size), (3, 3, 3), True, backend)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        got = nearby_attention(*inputs(size, size, dtype), (3, 3, 3), True, backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=error)


@pytest.mark.slow
def test_flex_equals_the_definition() -> None:
    """FlexAttention has no backward on CPU and is compiled, hence slow to start."""
    size: Grid = (3, 7, 6)
    key_mask = torch.rand(2, *size, generator=torch.Generator().manual_seed(1)) > 0.3
    with torch.no_grad():
        for causal, include_self, mask in (
            (False, True, None),
            (True, True, None),
            (True, False, None),
            (False, True, key_mask),
        ):
            x = inputs(size, size, torch.float32, 16)
            got = nearby_attention(*x, (3, 3, 3), causal, "flex", include_self=include_self, key_mask=mask)
            rule = Rule(size, size, (1, 1, 1), causal, include_self)
            torch.testing.assert_close(got, naive(*x, rule, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="NATTEN is not installed")
def test_natten_equals_the_definition() -> None:
    """Forward only: on CPU NATTEN has no backward."""
    with torch.no_grad():
        for size, extent in CASES_OF_NATTEN:
            x = inputs(size, size, torch.float32, 16)
            got = nearby_attention(*x, extent, backend="natten")
            torch.testing.assert_close(
                got, naive(*x, Rule(size, size, radii(extent, size)), None), rtol=1e-4, atol=1e-5
            )
    with pytest.raises(WaltError, match="cannot do causal"):
        nearby_attention(*x, causal=True, backend="natten")


@pytest.mark.parametrize(("size", "condition", "extent"), CASES)
def test_tables_and_masks_are_the_definition(size: Grid, condition: Grid, extent: Extent) -> None:
    numbered = {p: n for n, p in enumerate(places(condition))}
    for (causal, include_self), axial in itertools.product(variants(size, condition), (False, True)):
        rule = Rule(size, condition, radii(extent, condition), causal, include_self, axial)
        table, mask = neighbours(rule), neighbour_mask(rule)
        for n, place in enumerate(places(size)):
            seen = {numbered[k] for k in places(condition) if sees(place, k, rule)}
            listed = [k for k in table[n].tolist() if k >= 0]
            assert len(listed) == len(set(listed)) and set(listed) == seen
            assert set(mask[n].nonzero()[:, 0].tolist()) == seen


@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize(
    "extent", [(3, 3, 3), (1, 3, 3), (3, 1, 3), (3, 3, 1), (1, 1, 3), (5, 3, 7), (3, "all", 1), EVERYTHING]
)
def test_waves(extent: Extent, axial: bool) -> None:
    """No position depends on its own wave or a later one, and there are no more waves than the longest chain needs."""
    size: Grid = (3, 4, 5)
    rule = Rule(size, size, radii(extent, size), causal=True, include_self=False, axial=axial)
    order = waves(rule)
    number = {int(p): i for i, wave in enumerate(order) for p in wave}
    assert sorted(number) == list(range(math.prod(size)))
    chain: dict[int, int] = {}
    for place, row in enumerate(neighbours(rule).tolist()):
        before = [p for p in row if p >= 0]
        assert all(number[p] < number[place] for p in before)
        chain[place] = 1 + max((chain[p] for p in before), default=0)
    assert len(order) == max(chain.values())


def test_waves_of_the_paper() -> None:
    size: Grid = (10, 16, 16)
    rule = Rule(size, size, (1, 1, 1), causal=True)
    assert wave_steps(rule) == (4, 2, 1)
    assert len(waves(rule)) == 82


def test_an_axis_of_one_needs_no_step() -> None:
    """An image is decoded in j + 2 i, a line of text one by one."""
    for size, steps in (((1, 16, 16), (0, 2, 1)), ((1, 1, 9), (0, 0, 1)), ((5, 1, 1), (1, 0, 0))):
        assert wave_steps(Rule(size, size, radii((3, 3, 3), size), causal=True)) == steps


def test_any_workspace_gives_the_same() -> None:
    """One head of one tile at a time or everything at once, the gradients too."""
    size: Grid = (3, 6, 7)
    q, k, v = (t.requires_grad_() for t in inputs(size, size))
    found = []
    for workspace in (1, 400, 1 << 19, None):
        out = nearby_attention(q, k, v, (3, 3, 3), causal=True, backend="blocked", workspace=workspace)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).abs().max() < 1e-12


def test_bad_input() -> None:
    q, k, v = inputs((2, 3, 3), (2, 3, 3))
    with pytest.raises(WaltError, match="extent: "):
        nearby_attention(q, k, v, (3, 2, 3))
    with pytest.raises(WaltError, match="extent: "):
        nearby_attention(q, k, v, (3, 3, "every"))  # type: ignore[arg-type]
    with pytest.raises(WaltError, match=r'backend: .*did you mean "blocked"'):
        nearby_attention(q, k, v, backend="blokced")
    with pytest.raises(WaltError, match="causal: "):
        nearby_attention(q[:, :1], k, v, causal=True)
    with pytest.raises(WaltError, match="value: "):
        nearby_attention(q, k, v[:, :1])
    with pytest.raises(WaltError, match="key: "):
        nearby_attention(q, k[:1], v[:1])
    with pytest.raises(WaltError, match="workspace: at least 1 number needed, got 0"):
        nearby_attention(q, k, v, workspace=0)
    with pytest.raises(WaltError, match="query: "):
        nearby_attention(q[0], k, v)
    with pytest.raises(WaltError, match="key_mask: "):
        nearby_attention(q, k, v, key_mask=torch.ones(2, 3, 3, dtype=torch.bool))
    if importlib.util.find_spec("natten") is None:
        with pytest.raises(WaltError, match="NATTEN is not installed"):
            nearby_attention(q, k, v, backend="natten")
