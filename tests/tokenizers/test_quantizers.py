"""Quantizers against their definitions written as loops, their gradients, their indices, and what keeps them alive."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from walt.errors import WaltError
from walt.tokenizers.quantizers import (
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    VectorQuantizer,
    bit_entropy,
    codebook_metrics,
    make_quantizer,
)

KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vq": ("vq", 5, {"size": 12}),
    "vq gradient": ("vq", 5, {"size": 12, "codebook": "gradient"}),
    "vq directions": ("vq", 5, {"size": 12, "normalize": True}),
    "lfq": ("lfq", 6, {}),
    "lfq groups": ("lfq", 6, {"groups": 3}),
    "lfq 2^18": ("lfq", 18, {"groups": 2}),
    "fsq": ("fsq", 3, {"levels": [8, 5, 3]}),
    "fsq groups": ("fsq", 4, {"levels": [4, 5, 3, 2], "groups": 2}),
}


def latents(channels: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(2, channels, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(params=KINDS)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return make_quantizer(*KINDS[request.param])


def test_round_trips(quantizer: Quantizer) -> None:
    every = torch.arange(quantizer.size)[-4096:].reshape(1, 1, 1, -1)
    codes = quantizer.indices_to_codes(every)
    assert codes.shape == (1, quantizer.channels, 1, 1, every.numel())
    assert torch.equal(quantizer.codes_to_indices(codes), every)
    digits = quantizer.split_indices(every)
    assert digits.shape == (*every.shape, len(quantizer.sub_sizes))
    assert torch.equal(quantizer.join_indices(digits), every)
    assert all(
        int(digits[..., i].min()) >= 0 and int(digits[..., i].max()) < s for i, s in enumerate(quantizer.sub_sizes)
    )
    assert math.prod(quantizer.sub_sizes) == quantizer.size


def test_forward_agrees_with_the_translations(quantizer: Quantizer) -> None:
    z = latents(quantizer.channels)
    out = quantizer.eval()(z)
    assert out.z.shape == z.shape and out.indices.shape == (2, 3, 4, 5) and out.indices.dtype == torch.int64
    assert torch.equal(out.z, quantizer.indices_to_codes(out.indices))
    assert torch.equal(out.indices, quantizer.latents_to_indices(z))
    assert torch.equal(out.indices, quantizer.codes_to_indices(out.z))
    half = quantizer(z.bfloat16())
    assert half.z.dtype == torch.bfloat16


def test_gradients_pass_straight_through(quantizer: Quantizer) -> None:
    quantizer.eval()
    z = latents(quantizer.channels).requires_grad_()
    wish = latents(quantizer.channels, seed=1)
    (quantizer(z).z * wish).sum().backward()
    assert z.grad is not None
    if isinstance(quantizer, FiniteScalarQuantizer):  # through the bounding tanh, not through the rounding
        half = torch.tensor([level // 2 for level in quantizer.levels]).view(1, -1, 1, 1, 1)
        x = z.detach().clone().requires_grad_()
        bounded = quantizer._bound(x.movedim(1, -1)).movedim(-1, 1)
        (bounded / half * wish).sum().backward()
        assert x.grad is not None and torch.allclose(z.grad, x.grad)
    elif getattr(quantizer, "normalize", False):
        assert torch.isfinite(z.grad).all() and (z.grad * z.detach()).sum(dim=1).abs().max() < 1e-5  # along the sphere
    else:
        assert torch.allclose(z.grad, wish)


# -- VQ


def test_vq_takes_the_nearest_code_and_its_losses_are_the_papers() -> None:
    torch.manual_seed(0)
    vq = VectorQuantizer(7, 4, codebook="gradient").eval()
    z = latents(4).requires_grad_()
    out = vq(z)
    rows, picked = z.detach().permute(0, 2, 3, 4, 1).reshape(-1, 4), out.indices.reshape(-1)
    total = 0.0
    for row, index in zip(rows, picked, strict=True):
        distances = [float((row - code).square().sum()) for code in vq.weight.detach()]
        assert distances[int(index)] == pytest.approx(min(distances), rel=1e-5)
        total += min(distances)
    mean = total / rows.numel()
    assert out.losses["commitment"].item() == pytest.approx(mean, rel=1e-5)
    assert out.losses["codebook"].item() == pytest.approx(mean, rel=1e-5)
    # |sg[z] - e|^2 pulls codes alone, |z - sg[e]|^2 pulls latents alone.
    out.losses["codebook"].backward(retain_graph=True)
    assert z.grad is None or z.grad.abs().max() == 0
    expected = torch.zeros_like(vq.weight)
    for row, index in zip(rows, picked, strict=True):
        expected[index] += 2 * (vq.weight.detach()[index] - row) / rows.numel()
    assert vq.weight.grad is not None and torch.allclose(vq.weight.grad, expected, atol=1e-6)
    vq.zero_grad()
    out.losses["commitment"].backward()
    assert vq.weight.grad is None or vq.weight.grad.abs().max() == 0
    assert z.grad is not None
    codes = vq.weight.detach()[picked]
    assert torch.allclose(z.grad.permute(0, 2, 3, 4, 1).reshape(-1, 4), 2 * (rows - codes) / rows.numel(), atol=1e-6)


def test_ema_codebook_is_the_running_mean_of_its_latents() -> None:
    torch.manual_seed(0)
    vq = VectorQuantizer(3, 2, decay=0.9, restart_below=0.0).train()
    vq.step += 1  # begun: the codebook stays as it is set here
    vq.weight.copy_(torch.tensor([[0.0, 1.0], [4.0, 0.0], [-4.0, 0.0]]))
    vq.sums.copy_(vq.weight)
    counts, sums = vq.counts.clone(), vq.sums.clone()
    for seed in range(3):
        z = latents(2, seed, scale=3.0)
        out = vq(z)
        rows, picked = z.permute(0, 2, 3, 4, 1).reshape(-1, 2), out.indices.reshape(-1)
        for code in range(3):
            mine = rows[picked == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(dim=0)
        assert torch.allclose(vq.weight, sums / counts[:, None], atol=1e-5)
    before = vq.weight.clone()
    vq.eval()(latents(2))
    vq.train()
    vq.frozen = True
    vq(latents(2))
    assert torch.equal(vq.weight, before)  # neither in eval nor frozen does it learn


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dead_codes_are_restarted(codebook: str) -> None:
    torch.manual_seed(0)
    used = []
    for restart in (0.0, 0.2):
        vq = VectorQuantizer(32, 4, codebook=codebook, decay=0.8, restart_below=restart).train()
        vq.step += 1  # not begun on the data, but on far away codes: all but one are dead
        with torch.no_grad():
            vq.weight.copy_(torch.randn(32, 4) * 0.1 + 50.0)
            if codebook == "ema":
                vq.sums.copy_(vq.weight)
        for seed in range(40):
            vq(latents(4, seed))
        used.append(float(vq.eval()(latents(4, 99)).metrics["usage"]))
    assert used[0] < 0.1 and used[1] > 0.7


def test_vq_begins_on_the_data_and_draws_are_functions_of_its_state() -> None:
    torch.manual_seed(0)
    first = VectorQuantizer(16, 4, restart_below=0.3, decay=0.5).train()
    z = latents(4)
    rows = z.permute(0, 2, 3, 4, 1).reshape(-1, 4)
    first(z)
    for seed in range(4):
        first(latents(4, seed))
    torch.manual_seed(123)  # the global generator plays no part
    second = VectorQuantizer(16, 4, restart_below=0.3, decay=0.5).train()
    second(z)
    assert float(torch.cdist(second.weight, rows).min(dim=1).values.mean()) < 1.0
    state = {k: v.clone() for k, v in second.state_dict().items()}
    second(latents(4, 0))
    third = VectorQuantizer(16, 4, restart_below=0.3, decay=0.5).train()
    third.load_state_dict(state)
    third(latents(4, 0))
    for seed in range(1, 4):
        second(latents(4, seed))
        third(latents(4, seed))
    for name, value in second.state_dict().items():
        assert torch.equal(value, third.state_dict()[name]), name
        assert torch.equal(value, first.state_dict()[name]), name


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_latents_that_are_not_finite_leave_nothing_in_the_codebook(codebook: str) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(12, 5, codebook)
    quantizer(latents(5) * math.nan)  # even as the first batch
    quantizer(latents(5))
    known = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert all(value.isfinite().all() for value in known.values()) and int(known["step"]) == 1
    quantizer(latents(5, seed=1) * math.nan)
    assert all(torch.equal(value, known[name]) for name, value in quantizer.state_dict().items())


def test_fit_is_the_means_of_clusters_and_leaves_no_code_unused() -> None:
    centres = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 10
    rows = centres.repeat_interleave(20, 0)
    rows = rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    vq = VectorQuantizer(6, 3)
    vq.fit(rows)
    means = rows.reshape(6, 20, 3).mean(dim=1)
    assert torch.cdist(means, vq.weight).min(dim=1).values.max() < 1e-4
    indices = vq.latents_to_indices(rows.T.reshape(1, 3, 1, 6, 20))
    assert len(indices.unique()) == 6
    before = vq.weight.clone()
    vq.train()(rows.T.reshape(1, 3, 1, 6, 20))  # begun: a first batch does not overwrite what was fitted
    assert torch.allclose(vq.weight, before, atol=0.1)
    with pytest.raises(WaltError, match="a codebook of 6 is fitted to as many latents of 3"):
        vq.fit(rows[:5])


@pytest.mark.parametrize("kind", ["vq", "lfq", "fsq"])
def test_open_lets_the_first_samples_of_a_training_batch_pass(kind: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, dict[str, Any]] = {"vq": {"size": 12}, "lfq": {}, "fsq": {"levels": [8, 5, 5]}}
    quantizer = make_quantizer(kind, 3, settings[kind])
    z = latents(3).requires_grad_()
    if isinstance(quantizer, VectorQuantizer):
        quantizer.frozen = True  # compare with the codes of this batch, not with those learned from it
    quantizer.open = 0.5
    passed = quantizer.train()(z)
    codes = quantizer.indices_to_codes(passed.indices)
    assert torch.allclose(passed.z[1], codes[1], atol=1e-6) and not torch.allclose(passed.z[0], codes[0], atol=1e-3)
    if kind != "fsq":  # whose unrounded latents are bounded all the same
        assert torch.equal(passed.z[0], z[0])
    assert torch.equal(quantizer.eval()(z.detach()).z, quantizer.indices_to_codes(quantizer.latents_to_indices(z)))
    if kind == "vq":
        fresh = make_quantizer(kind, 3, settings[kind]).train()
        assert isinstance(fresh, VectorQuantizer)
        fresh.open = 1.0
        assert isinstance(fresh, VectorQuantizer)
        before = fresh.weight.clone()
        out = fresh(z)
        assert torch.equal(out.z, z) and torch.equal(fresh.weight, before) and not out.losses["commitment"]


# -- LFQ


def brute_entropies(z: Tensor, temperature: float) -> tuple[float, float]:
    """The two entropies by a loop over tokens and codes."""
    codes = list(itertools.product([-1.0, 1.0], repeat=z.shape[1]))
    mean = [0.0] * len(codes)
    single = 0.0
    for row in z.tolist():
        scores = [math.exp(-sum((a - b) ** 2 for a, b in zip(row, code, strict=True)) / temperature) for code in codes]
        probabilities = [score / sum(scores) for score in scores]
        single -= sum(p * math.log(p) for p in probabilities) / len(z)
        mean = [m + p / len(z) for m, p in zip(mean, probabilities, strict=True)]
    return single, -sum(m * math.log(m) for m in mean)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_lfq_entropies_against_a_double_loop(temperature: float) -> None:
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double() * 0.5
    lfq = LookupFreeQuantizer(4, temperature=temperature)
    one, mean = lfq.entropies(z)
    assert (float(one), float(mean)) == pytest.approx(brute_entropies(z, temperature), rel=1e-9)
    _, grouped = LookupFreeQuantizer(4, groups=2, temperature=temperature).entropies(z)
    parts = [brute_entropies(z[:, i : i + 2], temperature)[1] for i in (0, 2)]
    assert float(grouped) == pytest.approx(sum(parts), rel=1e-9)
    assert float(grouped) >= float(mean)  # the bound that groups give
    loss = lfq(z.float().reshape(9, 4, 1, 1, 1)).losses["entropy"]
    assert float(loss) == pytest.approx(float(one - mean), rel=1e-4)


def test_lfq_bits_are_signs_and_the_first_is_the_lowest() -> None:
    lfq = LookupFreeQuantizer(3)
    z = torch.tensor([[-0.1, 2.0, -5.0], [0.3, -0.2, 0.0], [1.0, 1.0, 1.0]]).reshape(3, 3, 1, 1, 1)
    out = lfq(z)
    assert out.indices.flatten().tolist() == [2, 1, 7]  # 0 is not above 0
    assert out.z.reshape(3, 3).tolist() == [[-1, 1, -1], [1, -1, -1], [1, 1, 1]]


def test_lfq_entropy_penalty_spreads_codes_that_had_collapsed() -> None:
    """Latents that all sit at one code are driven to use every bit evenly, and away from the borders."""
    torch.manual_seed(0)
    z = torch.nn.Parameter(torch.randn(256, 8, 1, 1, 1) * 0.3 + 0.6)
    lfq = LookupFreeQuantizer(8, temperature=3.0)
    optimizer = torch.optim.Adam([z], lr=0.02)
    before = bit_entropy(lfq(z).indices, 8).mean()
    for _ in range(150):
        out = lfq(z)
        optimizer.zero_grad()
        (out.losses["entropy"] + 0.25 * out.losses["commitment"]).backward()
        optimizer.step()
    out = lfq(z)
    assert before < 0.3 and bit_entropy(out.indices, 8).min() > 0.9
    assert float(out.metrics["bit_entropy"]) > 0.93 and float(out.metrics["usage"]) > 0.5


def test_eighteen_bits_are_cheap_in_groups() -> None:
    z = latents(18).requires_grad_()
    out = LookupFreeQuantizer(18, groups=2)(z)
    out.losses["entropy"].backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()
    assert int(out.indices.max()) < 2**18


# -- FSQ


def test_fsq_against_a_naive_implementation() -> None:
    levels = [8, 5, 4, 3]
    fsq = FiniteScalarQuantizer(levels)
    z = latents(4, scale=2.0)
    out = fsq(z)
    for b, t, h, w in itertools.product(range(2), range(3), range(4), range(5)):
        index, place = 0, 1
        for channel, level in enumerate(levels):
            half = (level - 1) * (1 - 1e-3) / 2
            offset = 0.0 if level % 2 else 0.5
            bounded = math.tanh(float(z[b, channel, t, h, w]) + math.tan(offset / half)) * half - offset
            digit = round(bounded)
            assert float(out.z[b, channel, t, h, w]) == pytest.approx(digit / (level // 2))
            index += (digit + level // 2) * place
            place *= level
        assert int(out.indices[b, t, h, w]) == index
    assert int(fsq(torch.full((1, 4, 1, 1, 1), 50.0)).indices) == fsq.size - 1  # every level can be reached
    assert int(fsq(torch.full((1, 4, 1, 1, 1), -50.0)).indices) == 0


# -- metrics


def test_metrics() -> None:
    even = codebook_metrics(torch.arange(64).repeat(3), 64)
    assert float(even["usage"]) == 1.0 and float(even["perplexity"]) == pytest.approx(64.0)
    one = codebook_metrics(torch.zeros(100, dtype=torch.int64), 64)
    assert float(one["usage"]) == pytest.approx(1 / 64) and float(one["perplexity"]) == pytest.approx(1.0)
    few = codebook_metrics(torch.arange(10), 2**18)  # ten tokens can show ten codes
    assert float(few["usage"]) == 1.0
    assert bit_entropy(torch.tensor([0, 1, 1, 1]), 2).tolist() == pytest.approx([0.811278, 0.0], abs=1e-5)


# -- bad input


@pytest.mark.parametrize(
    "kind, channels, settings, words",
    [
        ("vqq", 4, {}, 'did you mean "vq"'),
        ("vq", 4, {}, "needs 'size'"),
        ("vq", 4, {"size": 0}, "size must be a positive integer, got 0"),
        ("vq", 4, {"size": 8, "code_book": "ema"}, 'did you mean "codebook"'),
        ("vq", 4, {"size": 8, "codebook": "mean"}, 'codebook must be "ema" or "gradient"'),
        ("vq", 4, {"size": 8, "decay": 1.0}, "decay must be in"),
        ("lfq", 18, {}, "use more groups"),
        ("lfq", 18, {"groups": 4}, "groups must divide the 18 bits, got 4"),
        ("lfq", 8, {"temperature": 0.0}, "temperature must be above 0"),
        ("fsq", 3, {"levels": [8, 5]}, "levels: 2 given, the latent has 3 channels"),
        ("fsq", 2, {"levels": [8, 1]}, "levels must be integers of at least 2"),
    ],
)
def test_bad_settings(kind: str, channels: int, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(WaltError, match=words):
        make_quantizer(kind, channels, settings)


def test_bad_latents_and_indices(quantizer: Quantizer) -> None:
    with pytest.raises(WaltError, match=rf"latents must be \(B, {quantizer.channels}, t, h, w\)"):
        quantizer(torch.zeros(1, quantizer.channels + 1, 1, 2, 2))
    with pytest.raises(WaltError, match=rf"indices must be in 0..{quantizer.size - 1}, got {quantizer.size}"):
        quantizer.indices_to_codes(torch.full((1, 1, 1, 1), quantizer.size))
    with pytest.raises(WaltError, match="got -1"):
        quantizer.indices_to_codes(torch.full((1, 1, 1, 1), -1))
    with pytest.raises(WaltError, match="indices must be integers"):
        quantizer.split_indices(torch.zeros(2))
    with pytest.raises(WaltError, match="sub-codes"):
        quantizer.join_indices(torch.zeros(2, len(quantizer.sub_sizes) + 1, dtype=torch.int64))
