"""The NUWA encoder-decoder: what a logit depends on, decoding in every order and batch, guidance, learning."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import randomize
from walt.errors import WaltError
from walt.latents import Grid
from walt.models.transformer_nuwa import Condition, NuwaTransformer3DModel, _choose, _DecodePlan
from walt.nearby import Rule, waves

SIZE: Grid = (3, 4, 5)
VOCABULARY, SKETCHES, TEXT_DIM = 11, 7, 6


def model(seed: int = 0, **fields: Any) -> NuwaTransformer3DModel:
    """A small one with random weights; `fields` change its config."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "text_dim": TEXT_DIM,
        "sketch_vocab_size": SKETCHES,
        "num_layers_encoder": 1,
        "num_layers_decoder": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "code_dim": 8,
        "sample_size": SIZE,
        "text_length": 9,
    }
    torch.manual_seed(seed)
    built: NuwaTransformer3DModel = randomize(NuwaTransformer3DModel(**{**config, **fields}), seed)
    with torch.no_grad():
        built.head.weight.mul_(8)  # far from uniform, so that a wrong state gives another token
    return built


def words(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, TEXT_DIM, generator=generator) for n in lengths]


def sketches(batch: int, size: Grid = SIZE) -> Tensor:
    return torch.randint(0, SKETCHES, (batch, *size), generator=torch.Generator().manual_seed(6))


def videos(batch: int, size: Grid = SIZE, subcodes: int = 1) -> Tensor:
    more = (subcodes,) if subcodes > 1 else ()
    return torch.randint(0, VOCABULARY, (batch, *size, *more), generator=torch.Generator().manual_seed(7))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def uncached(net: NuwaTransformer3DModel, condition: Condition, shape: Grid, generator: torch.Generator) -> Tensor:
    """Decoding by a full forward pass per token and sub-code, in raster order, of one video."""
    subcodes = net.config.num_subcodes
    noise = torch.rand(math.prod(shape), subcodes, dtype=torch.float64, generator=generator)
    tokens = torch.zeros(1, *shape, subcodes, dtype=torch.long)
    for n, place in enumerate(itertools.product(*map(range, shape))):
        for c in range(subcodes):
            given = tokens if subcodes > 1 else tokens[..., 0]
            logits = net(given, condition)[(0, *place)]
            choice = _choose(logits[c] if subcodes > 1 else logits, noise[n, c], 1.0, None, None)
            tokens[(0, *place, c)] = choice
    return tokens if subcodes > 1 else tokens[..., 0]


def test_parameters_of_the_paper() -> None:
    """870M: 12 encoder and 24 decoder layers of width 1280, codes of 256 (papers 3.1, 3.3)."""
    with torch.device("meta"):
        net = NuwaTransformer3DModel(text_dim=512)
    layers = sum(p.numel() for p in [*net.encoder_blocks.parameters(), *net.decoder_blocks.parameters()])
    assert abs(layers - (12 * 12 + 24 * 16) * 1280**2) < 1e-3 * layers  # and biases and norms
    assert abs(net.num_parameters() / 870e6 - 1) < 0.005


@pytest.mark.parametrize("attention", ["nearby", "full", "axial"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_logit_depends_on_preceding_neighbours_only(attention: str, layers: int) -> None:
    """By its gradient, with one layer on the neighbours, with n on what n steps reach; never on itself or later."""
    net = model(num_layers_decoder=layers, attention=attention)
    embedded: list[Tensor] = []
    embed = net._embed_codes
    net._embed_codes = lambda tokens: embedded.append(embed(tokens).requires_grad_()) or embedded[-1]  # type: ignore
    logits = net(videos(1), net.encode_condition())
    all_places: list[Grid] = [(k, i, j) for k, i, j in itertools.product(*map(range, SIZE))]

    def steps(p: Grid) -> set[Grid]:
        before = {q for q in all_places if q < p}
        if attention == "nearby":
            return {q for q in before if all(abs(a - b) <= 1 for a, b in zip(p, q, strict=True))}
        return (
            before
            if attention == "full"
            else {q for q in before if sum(a == b for a, b in zip(p, q, strict=True)) == 2}
        )

    for place in [(0, 0, 0), (0, 1, 4), (1, 2, 2), (2, 3, 0)]:
        (gradient,) = torch.autograd.grad(logits[(0, *place)].square().sum(), embedded[0], retain_graph=True)
        depends = {p for p in all_places if gradient[(0, *p)].abs().sum() > 0}
        reached: set[Grid] = steps(place)
        for _ in range(layers - 1):
            reached |= {q for p in reached for q in steps(p)}
        assert depends == reached


def test_a_row_is_not_tied_to_the_end_of_the_one_before() -> None:
    net = model(num_layers_decoder=1)
    tokens, condition = videos(1, (1, 4, 5)), net.encode_condition()
    changed = tokens.clone()
    changed[0, 0, 0, 4] = (changed[0, 0, 0, 4] + 1) % VOCABULARY
    difference = (net(tokens, condition) - net(changed, condition)).abs().amax(-1)[0, 0]
    assert not difference[1, 0] and difference[1, 4] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_subcodes": 3},
        {"extent": (3, 5, 1)},
        {"extent": (1, 3, 5)},
        {"attention": "full"},
        {"attention": "axial"},
        {"code_dim": None, "text_extent": (3, 1, 1)},
    ],
    ids=str,
)
def test_cached_is_uncached_is_wavefront(fields: dict[str, Any]) -> None:
    net = model(**fields)
    condition = net.encode_condition(words(4), sketches(1, (2, 2, 3)))
    expected = uncached(net, condition, SIZE, *seeds(3))
    for wavefront in (True, False):
        got = net.generate(SIZE, condition, generator=seeds(3), wavefront=wavefront)
        assert torch.equal(got, expected)
    assert len(expected.unique()) > 3


def test_logits_of_decoding_are_those_of_training() -> None:
    """Not only the tokens: the query states of every step, in float64, against the one pass of `forward`."""
    net = model(num_subcodes=2).double()
    condition = net.encode_condition([x.double() for x in words(4, 2)], sketches(2))
    tokens = videos(2, subcodes=2)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    logits_of = net.head.logits

    def logits(state: Tensor, subcode: int) -> Tensor:
        seen[subcode].append(logits_of(state, subcode))
        return seen[subcode][-1]

    net.head.logits = logits
    net(tokens, condition)
    expected = [seen[c].pop()[0].flatten(0, 2) for c in range(2)]
    # The first video is known, the second is not: so the first is queried everywhere, and knows its own tokens.
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, *SIZE)
    net.generate(SIZE, condition, known=tokens, known_mask=mask, temperature=0)
    order = torch.cat(waves(Rule(SIZE, SIZE, (1, 1, 1), causal=True)))
    for c in range(2):
        torch.testing.assert_close(torch.cat(seen[c], 1)[0], expected[c][order], rtol=1e-9, atol=1e-9)


def test_batch_is_alone_and_samples_share_their_encoding() -> None:
    """Conditions of different lengths and kinds, with guidance, each video by its own generator."""
    net = model()
    text = [words(3, 7)[0], None, words(3, 7)[1]]
    condition, null = net.encode_condition(text), net.encode_condition()
    options: dict[str, Any] = {"guidance_scale": 2.5, "top_k": 6, "top_p": 0.9, "temperature": 0.8}
    together = net.generate(
        SIZE, condition, null_condition=null, generator=seeds(*range(6)), samples_per_condition=2, **options
    )
    assert together.shape == (6, *SIZE)
    for i in range(6):
        alone = net.encode_condition([text[i // 2]])
        assert torch.equal(
            net.generate(SIZE, alone, null_condition=null, generator=seeds(i), **options)[0], together[i]
        )
    assert not torch.equal(together[0], together[1])
    repeated = net.generate(
        SIZE, condition[[0, 0, 1, 1, 2, 2]], null_condition=null, generator=seeds(*range(6)), **options
    )
    assert torch.equal(repeated, together)


def test_a_text_does_not_see_the_padding_of_another() -> None:
    net = model(text_extent=(3, 1, 1))
    together, alone = net.encode_condition(words(3, 8)), net.encode_condition(words(3))
    assert together.text is not None and alone.text is not None
    torch.testing.assert_close(together.text[:1, :3], alone.text)
    tokens = videos(2)
    torch.testing.assert_close(net(tokens, together)[:1], net(tokens[:1], alone), rtol=1e-5, atol=1e-5)


def test_conditions_of_different_kinds_in_one_batch() -> None:
    """A text, a sketch and the word "None", each as it is alone."""
    net = model()
    parts = [net.encode_condition(words(4)), net.encode_condition(sketch=sketches(1)), net.encode_condition()]
    joined, tokens = Condition.cat(parts), videos(3)
    assert len(joined) == 3
    for i, part in enumerate(parts):
        torch.testing.assert_close(net(tokens, joined)[i], net(tokens[i : i + 1], part)[0], rtol=1e-5, atol=1e-5)
    got = net.generate(SIZE, joined, generator=seeds(0, 1, 2))
    for i, part in enumerate(parts):
        assert torch.equal(got[i], net.generate(SIZE, part, generator=seeds(i))[0])


def test_a_sketch_acts_where_it_lies() -> None:
    """Sketch of half the size: a changed corner changes the logits of the corner, with one layer of everything."""
    net = model(num_layers_decoder=1)
    sketch = sketches(1, (1, 4, 4))
    changed = sketch.clone()
    changed[0, 0, 0, 0] = (changed[0, 0, 0, 0] + 1) % SKETCHES
    tokens = videos(1, (1, 8, 8))
    a, b = (net(tokens, net.encode_condition(sketch=s)) for s in (sketch, changed))
    moved = (a - b).abs().amax(-1)[0, 0] > 0
    # Encoder one step, cross-attention one step: sketch cells 0..2, video cells 0..5.
    assert moved[:6, :6].all() and not moved[6:].any() and not moved[:, 6:].any()


def test_guidance() -> None:
    net = model()
    condition, null = net.encode_condition(words(5)), net.encode_condition()
    options: dict[str, Any] = {"temperature": 0}
    plain = net.generate(SIZE, condition, **options)
    assert torch.equal(net.generate(SIZE, condition, null_condition=null, guidance_scale=1.0, **options), plain)
    nothing = net.generate(SIZE, condition, null_condition=null, guidance_scale=0.0, **options)
    assert torch.equal(nothing, net.generate(SIZE, null, **options)) and not torch.equal(nothing, plain)
    strong = net.generate(SIZE, condition, null_condition=null, guidance_scale=4.0, **options)
    given, unguided = net(strong, condition), net(strong, null)
    assert torch.equal((unguided + 4.0 * (given - unguided)).argmax(-1), strong)


def test_context_guidance_leads_away_from_stills() -> None:
    """Greedy tokens are the likeliest of alone + c (null - alone) + g (given - null), alone being every frame by itself."""
    net = model()
    condition, null = net.encode_condition(words(5)), net.encode_condition()
    options: dict[str, Any] = {"temperature": 0, "samples_per_condition": 2}
    plain = net.generate(SIZE, condition, **options)
    assert torch.equal(net.generate(SIZE, condition, context_guidance_scale=1.0, **options), plain)

    def alone(tokens: Tensor, told: Condition) -> Tensor:
        return torch.cat([net(frame, told) for frame in tokens.split(1, dim=1)], dim=1)

    for wavefront in (True, False):
        led = net.generate(SIZE, condition, context_guidance_scale=3.0, wavefront=wavefront, **options)[:1]
        still = alone(led, condition)
        assert torch.equal((still + 3.0 * (net(led, condition) - still)).argmax(-1), led)
        assert not torch.equal(led, plain[:1])
        both: dict[str, Any] = {"null_condition": null, "guidance_scale": 4.0, "context_guidance_scale": 2.0}
        led = net.generate(SIZE, condition, wavefront=wavefront, **both, **options)[1:]
        still, unguided, given = alone(led, null), net(led, null), net(led, condition)
        assert torch.equal((still + 2.0 * (unguided - still) + 4.0 * (given - unguided)).argmax(-1), led)
    stills = net.generate(SIZE, condition, context_guidance_scale=0.0, **options)
    assert torch.equal(stills[:1], net.generate((1, *SIZE[1:]), condition, temperature=0).repeat(1, SIZE[0], 1, 1))
    image = net.generate((1, *SIZE[1:]), condition, context_guidance_scale=3.0, **options)
    assert torch.equal(image, net.generate((1, *SIZE[1:]), condition, **options))  # nothing comes before it


def test_known_tokens_are_kept_and_seen() -> None:
    net = model()
    condition = net.encode_condition(words(4, 4))
    known, mask = videos(2), torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[:, 0] = True  # prediction: the first frame of both
    mask[0, 1:, :, :2] = True  # completion: more of the first
    a = net.generate(SIZE, condition, known=known, known_mask=mask, generator=seeds(0, 1))
    b = net.generate(SIZE, condition, known=known, known_mask=mask, generator=seeds(0, 1), wavefront=False)
    assert torch.equal(a, b) and torch.equal(a[mask], known[mask])
    greedy = net.generate(SIZE, condition, known=known, known_mask=mask, temperature=0)
    best = net(greedy, condition).argmax(-1)
    assert torch.equal(greedy[~mask], best[~mask]) and not torch.equal(greedy[mask], best[mask])
    steps: list[int] = []
    net.generate(
        SIZE, condition, known=known, known_mask=mask.clone().fill_(True), callback=lambda n, _: steps.append(n)
    )
    assert not steps  # nothing to make, nothing run
    more = net.generate(SIZE, condition, known=known, known_mask=mask, samples_per_condition=3)
    assert torch.equal(more[mask.repeat_interleave(3, 0)], known.repeat_interleave(3, 0)[mask.repeat_interleave(3, 0)])


def test_the_cache_is_the_live_neighbourhood() -> None:
    """Its size follows the frame, not the length: a frame, a row, a token and the one being made."""
    for frames in (2, 5, 20):
        size = (frames, 16, 16)
        rule = Rule(size, size, (1, 1, 1), causal=True)
        wanted = torch.ones(math.prod(size), dtype=torch.bool)
        one_by_one, by_waves = (_DecodePlan.make(rule, wanted, w, torch.device("cpu")) for w in (False, True))
        assert one_by_one.ring == 16 * 16 + 16 + 1 + 1
        # Eight waves, of at most a quarter of a frame: in every row i, every fourth frame's column.
        assert by_waves.ring <= 8 * 64
        assert len(one_by_one.steps) == math.prod(size) and len(by_waves.steps) == 4 * (frames - 1) + 46
        assert {step.index.shape[1] for plan in (one_by_one, by_waves) for step in plan.steps} == {14}


def test_other_sizes_than_the_tables() -> None:
    net = model()
    for shape in ((1, 4, 5), (7, 4, 5), (2, 6, 3)):
        got = net.generate(shape, net.encode_condition(), generator=seeds(1))
        assert got.shape == (1, *shape)
        assert net(got, net.encode_condition()).shape == (1, *shape, VOCABULARY)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    noise = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def shares(**options: Any) -> Tensor:
        chosen = _choose(logits.expand(4000, 4), noise, **{"temperature": 1.0, "top_k": None, "top_p": None, **options})
        return chosen.bincount(minlength=4) / 4000

    p = logits.softmax(-1)
    torch.testing.assert_close(shares(), p, rtol=0, atol=1e-3)
    torch.testing.assert_close(shares(temperature=0.5), (logits / 0.5).softmax(-1), rtol=0, atol=1e-3)
    top = torch.tensor([0.0, 1.0, 1.0, 0.0]) * p
    torch.testing.assert_close(shares(top_k=2), top / top.sum(), rtol=0, atol=1e-3)
    torch.testing.assert_close(shares(top_p=0.7), top / top.sum(), rtol=0, atol=1e-3)
    torch.testing.assert_close(shares(top_p=1e-6), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(shares(temperature=0), torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_save_and_load(tmp_path: Path) -> None:
    net = model(num_subcodes=2, extent=(3, "all", 3))
    net.save_pretrained(tmp_path)
    loaded = NuwaTransformer3DModel.from_pretrained(tmp_path)
    tokens = videos(1, subcodes=2)
    text = words(4)
    assert torch.equal(net(tokens, text=text), loaded(tokens, text=text))
    import walt

    assert walt.NuwaTransformer3DModel is NuwaTransformer3DModel


def test_gradient_checkpointing() -> None:
    results = []
    for checkpointing in (False, True):
        net = model().requires_grad_(True).train()
        if checkpointing:
            net.enable_gradient_checkpointing()
        net(videos(2), text=words(3, 5), sketch=sketches(2)).square().mean().backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
    assert set(results[0]) == set(results[1])
    for name, gradient in results[0].items():
        # Every parameter is used: "None" alone is not, as both samples have a text.
        assert (gradient is None) == (name == "none_word"), name
        if gradient is not None:
            torch.testing.assert_close(gradient, results[1][name])


def test_lora() -> None:
    from peft import LoraConfig

    net = model()
    tokens, condition = videos(1), net.encode_condition(words(4))
    before = net(tokens, condition)
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(net(tokens, condition), before)
    greedy = net.generate(SIZE, condition, temperature=0)
    assert torch.equal(net(greedy, condition).argmax(-1), greedy)


@pytest.mark.parametrize("subcodes", [1, 2])
def test_it_fits_a_few_videos(subcodes: int) -> None:
    """Four random videos by their words: the loss goes to nearly zero, and decoding gives each back exactly."""
    torch.manual_seed(0)
    net = NuwaTransformer3DModel(
        vocab_size=VOCABULARY,
        num_subcodes=subcodes,
        text_dim=TEXT_DIM,
        num_layers_encoder=1,
        num_layers_decoder=2,
        num_attention_heads=4,
        attention_head_dim=16,
        code_dim=32,
        sample_size=SIZE,
        text_length=9,
    )
    text, tokens = words(3, 4, 5, 6), videos(4, subcodes=subcodes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = F.cross_entropy(net(tokens, text=text).flatten(0, -2), tokens.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(losses[0] - math.log(VOCABULARY)) < 0.5 and losses[-1] < 0.02
    net.eval()
    assert torch.equal(net.generate(SIZE, net.encode_condition(text), temperature=0), tokens)


def test_bad_input() -> None:
    net, blind = model(), model(text_dim=None, sketch_vocab_size=None)
    condition, tokens = net.encode_condition(words(4)), videos(1)
    for message, call in {
        "attention: ": lambda: model(attention="nearbye"),
        "extent: ": lambda: model(extent=(3, 4, 3)),
        "vocab_size: 0": lambda: model(vocab_size=0),
        "text: given, but": lambda: blind.encode_condition(words(3)),
        "sketch: given, but": lambda: blind.encode_condition(sketch=sketches(1)),
        "text: sample 0 has shape": lambda: net.encode_condition(words(10)),
        r"text: sample 1 has shape \(0, 6\)": lambda: net.encode_condition(words(2, 0)),
        "sketch: 0..7 given, 0..6 allowed": lambda: net.encode_condition(sketch=torch.arange(8).view(1, 1, 2, 4)),
        "sketch: 2 samples given for 1": lambda: net.encode_condition(words(2), sketches(2)),
        "tokens: 3..11 given": lambda: net(torch.tensor([3, 11]).view(1, 1, 1, 2), condition),
        "tokens: torch.float32": lambda: net(tokens.float(), condition),
        r"tokens: shape \(3, 4, 5\)": lambda: net(tokens[0], condition),
        "condition: 1 samples given for 2": lambda: net(videos(2), condition),
        "condition: given together": lambda: net(tokens, condition, text=words(4)),
        "shape: ": lambda: net.generate((0, 4, 5), condition),
        "guidance_scale: 2.0 given without": lambda: net.generate(SIZE, condition, guidance_scale=2.0),
        "null_condition: 2 samples": lambda: net.generate(
            SIZE, condition, guidance_scale=2.0, null_condition=net.encode_condition(batch=2)
        ),
        "temperature: ": lambda: net.generate(SIZE, condition, temperature=-1.0),
        "top_k: ": lambda: net.generate(SIZE, condition, top_k=0),
        "context_guidance_scale: -1": lambda: net.generate(SIZE, condition, context_guidance_scale=-1.0),
        "top_p: ": lambda: net.generate(SIZE, condition, top_p=1.5),
        "samples_per_condition: ": lambda: net.generate(SIZE, condition, samples_per_condition=0),
        "known and known_mask": lambda: net.generate(SIZE, condition, known=tokens),
        "known_mask: ": lambda: net.generate(SIZE, condition, known=tokens, known_mask=torch.ones(1, 3, 4, 5)),
        "known: 11..11 given": lambda: net.generate(
            SIZE, condition, known=tokens * 0 + 11, known_mask=torch.ones(1, *SIZE, dtype=torch.bool)
        ),
        "generator: 2 given for 1": lambda: net.generate(SIZE, condition, generator=seeds(1, 2)),
    }.items():
        with pytest.raises(WaltError, match=message):
            call()
