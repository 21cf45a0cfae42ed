"""Windows: their plan is a partition of each sample, and attention over them is masked full attention, exactly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import Tensor

from walt.attention import (
    RelativeBias,
    WindowPlan,
    blocked_attention,
    choose_backend,
    plan_windows,
    rotation,
    window_attention,
)
from walt.errors import WaltError
from walt.fused import rotate
from walt.latents import Grid, positions, token_counts

GRIDS: tuple[Grid, ...] = ((3, 4, 5), (1, 4, 4), (2, 7, 3), (1, 2, 6), (3, 4, 5))
CASES = list(
    itertools.product([((None, None, None), (0, 0, 0)), ((1, None, None), (0, 0, 0)), ((1, 3, 2), (0, 1, 1))], [False])
) + list(
    itertools.product([((None, 2, 2), (0, 0, 0)), ((None, 3, 3), (0, 1, 1)), ((2, 2, 4), (1, 1, 2))], [False, True])
)


def window_ids(
    grids: tuple[Grid, ...], window: tuple[int | None, ...], shift: Grid, identity_images: bool
) -> tuple[Tensor, Tensor]:
    """A name for the window of every token, by arithmetic on its position; and its sample."""
    sample = torch.cat([torch.full((n,), i) for i, n in enumerate(token_counts(grids))])
    place = positions(grids)
    ids = sample.clone()
    for axis in range(3):
        for i, grid in enumerate(grids):
            rows = sample == i
            n, s = window[axis], shift[axis]
            if identity_images and grid[0] == 1:
                piece = place[rows, axis]
            elif n is None or n >= grid[axis]:
                piece = torch.zeros(int(rows.sum()), dtype=torch.int64)
            else:
                piece = (place[rows, axis] + (n - s if s else 0)) // n
            ids[rows] = ids[rows] * 100 + piece
    return ids, sample


def planned_order(grids: tuple[Grid, ...], window: tuple[int | None, ...]) -> list[int]:
    """Tokens sorted by length of their window, then window, then place: written out."""
    ids = window_ids(grids, window, (0, 0, 0), False)[0].tolist()
    return sorted(range(len(ids)), key=lambda i: (ids.count(ids[i]), ids[i], i))


def naive(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Full attention `(L, N, d)` with a mask `(L, keys)`."""
    scores = torch.einsum("lnd,snd->nls", q, k) * q.shape[-1] ** -0.5 + bias
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("nls,snd->lnd", weights, v)


def planned(plan: WindowPlan, q: Tensor, k: Tensor, v: Tensor, **kwargs: Tensor | RelativeBias | None) -> Tensor:
    q, k, v = plan.gather(q), plan.gather(k), plan.gather(v)
    return plan.scatter(window_attention(q[plan.singles :], k[plan.singles :], v, plan, **kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize(("windows", "identity"), CASES)
def test_windows_equal_masked_full_attention(
    windows: tuple[tuple[int | None, int | None, int | None], Grid], identity: bool
) -> None:
    torch.manual_seed(0)
    window, shift = windows
    plan = plan_windows(GRIDS, window, shift, identity_images=identity)
    q, k, v = torch.randn(3, plan.tokens, 2, 4, dtype=torch.float64)
    ids, _ = window_ids(GRIDS, window, shift, identity)
    expected = naive(q, k, v, ids[:, None] == ids[None])
    assert torch.allclose(planned(plan, q, k, v), expected, atol=1e-12)
    assert sum(g.windows * g.length for g in plan.groups) + plan.singles == plan.tokens
    assert [g.length for g in plan.groups] == sorted({g.length for g in plan.groups})


@pytest.mark.parametrize("identity", [False, True])
def test_text_of_each_sample_is_attended_without_padding(identity: bool) -> None:
    torch.manual_seed(0)
    lengths = (3, 2, 0, 3, 1)
    plan = plan_windows(GRIDS, (None, 3, 3), (0, 1, 1), identity_images=identity, contexts=lengths)
    q, k, v = torch.randn(3, plan.tokens, 2, 4, dtype=torch.float64)
    ck, cv = torch.randn(2, sum(lengths), 2, 4, dtype=torch.float64)
    ids, sample = window_ids(GRIDS, (None, 3, 3), (0, 1, 1), identity)
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    allowed = torch.cat([ids[:, None] == ids[None], sample[:, None] == owner[None]], dim=1)
    expected = naive(q, torch.cat([k, ck]), torch.cat([v, cv]), allowed)
    out = planned(plan, q, k, v, context_key=ck, context_value=cv)
    assert torch.allclose(out, expected, atol=1e-12)


def test_identity_rule_is_the_diagonal_mask() -> None:
    torch.manual_seed(0)
    grids: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 3))
    plan = plan_windows(grids, (None, 2, 2), identity_images=True)
    assert plan.groups == () and plan.singles == plan.tokens == 22  # no score is computed
    q, k, v = torch.randn(3, plan.tokens, 2, 4, dtype=torch.float64)
    expected = naive(q, k, v, torch.eye(22, dtype=torch.bool))
    assert torch.equal(planned(plan, q, k, v), v)
    assert torch.allclose(expected, v, atol=1e-14)


def test_images_alone_leave_zero_not_absent_gradients() -> None:
    plan = plan_windows(((1, 2, 2),), identity_images=True)
    q, k, v = (torch.randn(4, 2, 4, requires_grad=True) for _ in range(3))
    planned(plan, q, k, v, bias=RelativeBias(2, (1, 2, 2), True)).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    assert not q.grad.any() and not k.grad.any() and torch.equal(v.grad, torch.ones_like(v))


def test_raster_windows_need_no_gather() -> None:
    assert plan_windows(((5, 4, 4), (5, 4, 4)), (1, None, None)).order is None
    assert plan_windows(((5, 4, 4), (5, 4, 4)), (None, None, None)).order is None
    assert plan_windows(((5, 4, 4),), (None, 2, 2)).order is not None
    for grids, window in itertools.product(
        [((2, 3, 4),), ((1, 3, 4),), ((1, 1, 4), (2, 3, 1)), ((2, 1, 1), (1, 3, 4))],
        itertools.product((1, 2, None), repeat=3),
    ):  # skipped if and only if the order is the pack's own
        plan = plan_windows(grids, window)
        order = planned_order(grids, window)
        assert (plan.order is None) == (order == sorted(order))
        assert plan.order is None or plan.order.tolist() == order


def test_one_kernel_call_per_length(monkeypatch: pytest.MonkeyPatch) -> None:
    import walt.attention as attention

    shapes = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> Tensor:
        assert kwargs["attn_mask"] is None
        shapes.append(tuple(q.shape[:2]))
        return v

    monkeypatch.setattr(attention, "dispatch_attention_fn", spy)
    plan = plan_windows(((2, 4, 5), (1, 4, 4), (2, 2, 5)), (1, 4, 4), identity_images=False)
    v = torch.randn(plan.tokens, 1, 2)
    window_attention(v, v, v, plan)
    assert shapes == [(2, 2), (2, 4), (2, 8), (3, 16)]


def test_plans_are_cached_and_built_on_the_host() -> None:
    assert plan_windows(GRIDS, (None, 2, 2)) is plan_windows(GRIDS, (None, 2, 2))
    with torch.inference_mode():
        plan = plan_windows(((2, 9, 9),), (None, 2, 2))
    assert plan.order is not None and not plan.order.is_inference() and plan.order.device.type == "cpu"
    assert plan.to("meta") is plan.to("meta")


def test_gather_and_scatter_are_inverse_with_inverse_gradients() -> None:
    plan = plan_windows(((2, 3, 2), (1, 2, 3)), (None, 2, 1))
    x = torch.randn(plan.tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(plan.scatter(plan.gather(x)), x)
    assert torch.autograd.gradcheck(plan.gather, (x,)) and torch.autograd.gradcheck(plan.scatter, (x,))


def test_relative_bias_reads_the_offset_between_tokens() -> None:
    torch.manual_seed(0)
    window: Grid = (2, 3, 4)
    bias = RelativeBias(2, window, resize=False).double()
    torch.nn.init.normal_(bias.table)
    for shape in (window, (1, 2, 4), (2, 1, 1)):  # border pieces read the same offsets
        plan = plan_windows((shape,), by_shape=True)
        place = positions([shape])
        out = bias(shape, plan.offsets[0])
        for i, j in itertools.product(range(len(place)), repeat=2):
            t, h, w = (place[i] - place[j] + torch.tensor(window) - 1).tolist()
            assert torch.equal(out[0, :, i, j], bias.table[:, t, h, w])


def test_relative_bias_off_size() -> None:
    bias = RelativeBias(1, (1, 3, 3), resize=True)
    torch.nn.init.normal_(bias.table)
    table = bias.table.detach()[0, 0]
    out = bias((1, 5, 3), plan_windows(((1, 5, 3),), by_shape=True).offsets[0])[0, 0]
    assert torch.allclose(out.diagonal(), table[2, 2].expand(15))  # offset 0 stays offset 0
    assert torch.allclose(out[0, 12], table[0, 2])  # and the largest the largest: rows -4 of 5 is -2 of 3
    assert torch.allclose(out[0, 6], table[1, 2])  # rows -2 of 5 is -1 of 3
    one = bias((1, 1, 1))
    assert torch.equal(one.flatten(), table[2, 2].flatten())
    longer = bias((2, 3, 3), plan_windows(((2, 3, 3),), by_shape=True).offsets[0])
    assert longer.shape == (1, 1, 18, 18)


def test_bias_in_windows_equals_masked_full_attention() -> None:
    torch.manual_seed(0)
    grids: tuple[Grid, ...] = ((2, 4, 5), (1, 5, 2))
    bias = RelativeBias(2, (2, 3, 3), resize=False).double()
    torch.nn.init.normal_(bias.table)
    plan = plan_windows(grids, (None, 3, 3), (0, 1, 1), by_shape=True)
    q, k, v = torch.randn(3, plan.tokens, 2, 4, dtype=torch.float64)
    ids, _ = window_ids(grids, (None, 3, 3), (0, 1, 1), False)
    place = positions(grids)
    offset = (place[:, None] - place[None]).clamp(-2, 2) + torch.tensor([1, 2, 2])
    offset[..., 0].clamp_(0, 2)
    full = bias.table[:, offset[..., 0], offset[..., 1], offset[..., 2]]
    expected = naive(q, k, v, ids[:, None] == ids[None], full)
    assert torch.allclose(planned(plan, q, k, v, bias=bias), expected, atol=1e-12)


def test_rotation_depends_on_offsets_only() -> None:
    torch.manual_seed(0)
    cos, sin = rotation(((4, 5, 6),), 12, torch.device("cpu"))
    assert cos.dtype == torch.float32 and cos.shape == (120, 1, 6)
    q, k = torch.randn(2, 1, 1, 12, dtype=torch.float64).expand(2, 120, 1, 12)
    scores = (rotate(q, cos, sin)[:, 0]) @ (rotate(k, cos, sin)[:, 0]).T
    place = positions([(4, 5, 6)]).tolist()
    at = {tuple(p): i for i, p in enumerate(place)}
    first, second = scores[at[0, 1, 2], at[1, 3, 3]], scores[at[2, 2, 4], at[3, 4, 5]]
    assert abs(first - second) < 1e-5 and abs(first - scores[at[0, 0, 0], at[0, 0, 1]]) > 1e-3
    for axis in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):  # every axis turns something
        assert abs(scores[0, 0] - scores[0, at[axis]]) > 1e-4


def test_errors_name_the_argument() -> None:
    with pytest.raises(WaltError, match="grids: empty"):
        plan_windows(())
    with pytest.raises(WaltError, match=r"window: .* positive"):
        plan_windows(GRIDS, (None, 0, 2))
    with pytest.raises(WaltError, match=r"shift: .* less than the window"):
        plan_windows(GRIDS, (None, 2, 2), (0, 2, 0))
    with pytest.raises(WaltError, match="2 text lengths given for 5 samples"):
        plan_windows(GRIDS, contexts=(1, 2))


BACKENDS = ("walt_windows", "walt_blocked", "flex", "_native_math")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("windows", "identity"), CASES)
def test_every_backend_is_masked_full_attention(
    backend: str, windows: tuple[tuple[int | None, int | None, int | None], Grid], identity: bool
) -> None:
    torch.manual_seed(0)
    lengths = (3, 2, 0, 3, 1)
    dtype = torch.float32 if backend == "flex" else torch.float64
    for contexts in (None, lengths):
        plan = plan_windows(GRIDS, *windows, identity_images=identity, contexts=contexts)
        q, k, v = torch.randn(3, plan.tokens, 2, 16, dtype=dtype)
        ck, cv = torch.randn(2, sum(lengths), 2, 16, dtype=dtype)
        ids, sample = window_ids(GRIDS, *windows, identity)
        allowed, keys, values = ids[:, None] == ids[None], k, v
        if contexts:
            owner = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
            allowed = torch.cat([allowed, sample[:, None] == owner[None]], dim=1)
            keys, values = torch.cat([k, ck]), torch.cat([v, cv])
        with attention_backend(backend):
            out = planned(plan, q, k, v, context_key=ck, context_value=cv)
        assert torch.allclose(out, naive(q, keys, values, allowed), atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("block_bytes", [1, 2000, 2**20])
def test_blocked_attention_and_its_gradients(block_bytes: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(5, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(5, 7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for shape in (None, (1, 2, 6, 7), (5, 2, 6, 7)):
        mask = None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        grads = []
        for own in (True, False):
            if own:
                y = blocked_attention(q, k, v, mask, block_bytes=block_bytes)
            else:
                a, b, c = (x.transpose(1, 2) for x in (q, k, v))
                y = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=mask).transpose(1, 2)
            grads.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("block_bytes", [1, 2**21])
@pytest.mark.parametrize(("size", "shift"), [(1.0, 0.0), (60.0, 0.0), (1.0, 300.0), (1.0, -300.0)])
def test_blocked_attention_in_bfloat16_at_any_size_of_scores(size: float, shift: float, block_bytes: int) -> None:
    """Sums of exponentials that overflow, and that vanish, are those of softmax still."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 24, 3, 16).to(torch.bfloat16)
    q = q * size
    mask = torch.full((1, 3, 24, 24), shift, dtype=torch.bfloat16)
    mask[..., 7] = -math.inf
    mask[:, 1, 3] = -500.0  # a row that is low as a whole
    scores = torch.einsum("wnhd,wshd->whns", q.double(), k.double()).div(4).to(torch.bfloat16) + mask
    exact = torch.einsum("whns,wshd->wnhd", scores.double().softmax(-1), v.double())
    found = blocked_attention(q, k, v, mask, block_bytes=block_bytes)
    assert found.isfinite().all()
    assert (found - exact).abs().mean() < 0.01


def test_bias_runs_blocked_with_its_gradient_and_is_refused_by_one_call_backends() -> None:
    torch.manual_seed(0)
    bias = RelativeBias(2, (2, 3, 3), resize=False)
    torch.nn.init.normal_(bias.table)
    plan = plan_windows(((2, 4, 5), (1, 5, 2)), (None, 3, 3), (0, 1, 1), by_shape=True)
    q, k, v = torch.randn(3, plan.tokens, 2, 4)
    outs = []
    for backend in ("walt_windows", "walt_blocked"):
        bias.zero_grad()
        with attention_backend(backend):
            y = planned(plan, q, k, v, bias=bias)
        y.square().sum().backward()
        assert bias.table.grad is not None
        outs.append((y, bias.table.grad.clone()))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outs, strict=True))
    for backend in ("flex", "walt_varlen"):
        with attention_backend(backend), pytest.raises(WaltError, match=f"{backend}' takes no bias"):
            planned(plan, q, k, v, bias=bias)
    with attention_backend("walt_varlen"), pytest.raises(WaltError, match="runs on CUDA only, the tensors are on cpu"):
        planned(plan, q, k, v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention exists on CUDA only")
@pytest.mark.parametrize("lengths", [None, (3, 2, 0, 3, 1)])
def test_the_compiled_operator_has_the_gradients_of_flash_attention(lengths: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    plan = plan_windows(GRIDS, (None, 3, 3), (0, 1, 1), identity_images=True, contexts=lengths)
    first, texts = plan.singles, sum(lengths or ())
    sizes = [plan.tokens - first] * 2 + [plan.tokens] + [texts] * (2 if texts else 0)
    values = [torch.randn(n, 2, 64).to(torch.bfloat16) for n in sizes]
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        placed = plan.to(device)

        def attend(*x: Tensor, placed: WindowPlan = placed) -> Tensor:
            keys, values = x[3:] if len(x) > 3 else (None, None)
            return window_attention(x[0], x[1], x[2], placed, context_key=keys, context_value=values)

        call = torch.compile(attend, backend="aot_eager", fullgraph=True) if device == "cuda" else attend
        given = [x.to(device, dtype).requires_grad_() for x in values]
        out = call(*given)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for exact, found in zip(*results, strict=True):
        assert float((found.double().cpu() - exact).norm() / exact.norm()) < 2e-2
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length kernels exist on CUDA only")
@pytest.mark.parametrize("backend", ["walt_varlen", "flex", None])
def test_one_call_backends_on_cuda(backend: str | None) -> None:
    torch.manual_seed(0)
    lengths = (3, 2, 0, 3, 1)
    plan = plan_windows(GRIDS, (None, 3, 3), (0, 1, 1), identity_images=True, contexts=lengths)
    q, k, v = torch.randn(3, plan.tokens, 2, 64, device="cuda", dtype=torch.bfloat16)
    ck, cv = torch.randn(2, sum(lengths), 2, 64, device="cuda", dtype=torch.bfloat16)
    with attention_backend("walt_windows"):
        expected = planned(plan.to("cuda"), q, k, v, context_key=ck, context_value=cv)
    first = plan.singles
    turned = [plan.to("cuda").gather(x) for x in (q, k, v)]
    out = window_attention(
        turned[0][first:], turned[1][first:], turned[2], plan.to("cuda"), context_key=ck, context_value=cv,
        backend=backend,
    )  # fmt: skip
    assert torch.allclose(plan.to("cuda").scatter(out).float(), expected.float(), atol=2e-2)


def test_images_cost_no_attention_in_spatiotemporal_layers() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(grids: tuple[Grid, ...]) -> int:
        plan = plan_windows(grids, (None, 2, 2), identity_images=True)
        v = torch.randn(plan.tokens, 2, 8)
        # torch counts the products of this backend, not those inside its CPU kernel
        with FlopCounterMode(display=False) as counter, attention_backend("walt_blocked"):
            window_attention(v[plan.singles :], v[plan.singles :], v, plan)
        return int(counter.get_total_flops())

    clip = flops(((3, 4, 4),))
    assert clip == 4 * 4 * 2 * 12 * 12 * 8  # 4 windows, 2 heads, 12 x 12 scores of 8, two products
    assert flops(((1, 8, 8), (3, 4, 4), (1, 4, 6))) == clip and flops(((1, 8, 8),)) == 0


def test_automatic_choice() -> None:
    plan = plan_windows(GRIDS, (None, 2, 2))
    assert choose_backend(None, torch.zeros(1), plan, False) == "native"
    with attention_backend("walt_blocked"):
        assert choose_backend(None, torch.zeros(1), plan, True) == "walt_blocked"
    assert choose_backend("flex", torch.zeros(1), plan, False) == "flex"


def test_blocked_products_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: windows long enough for a product by itself, and not so long that their scores take gigabytes."""
    monkeypatch.setattr("walt.attention.product_is_faster", lambda x: True)
    plan = plan_windows(GRIDS, (None, 2, 2))
    with torch.no_grad():
        chosen = [choose_backend(None, torch.zeros(1), plan, False, length) for length in (100, 300, 2240, 8960)]
    assert chosen == ["native", "walt_blocked", "walt_blocked", "native"]
    assert choose_backend(None, torch.zeros(1), plan, False, 300) == "native"  # with gradients it pays later


@pytest.mark.parametrize("backend", ["walt_windows", "walt_blocked"])
@pytest.mark.parametrize("call", ["bool", "2d", "causal", "grouped", "float"])
def test_the_dense_backends_serve_other_models(backend: str, call: str) -> None:
    """Masks of any kind, causal attention and shared keys, which walt's models have no use for."""
    q, k, v = torch.randn(3, 2, 7, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    seen |= torch.eye(7, dtype=torch.bool)
    cases: dict[str, dict[str, Any]] = {
        "bool": {"attn_mask": seen},
        "2d": {"attn_mask": torch.where(seen[0, 0], 0.0, -1e9)},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
        "float": {"attn_mask": torch.where(seen, 0.5, -2.0)},
    }
    told = cases[call]
    if call == "grouped":
        k, v = k[:, :, :2], v[:, :, :2]
    wanted = dispatch_attention_fn(q, k, v, backend="native", **told)
    assert torch.allclose(dispatch_attention_fn(q, k, v, backend=backend, **told), wanted, atol=1e-5)
