"""Compact text encoders: int8 rows, round trips through folders, pruned vocabularies that cut words the same way."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config, T5EncoderModel

from walt.errors import WaltError
from walt.tokenizers.text import (
    CompactTextEncoder,
    Int8Embedding,
    Int8Linear,
    emoji_words,
    load_text_encoder,
    prune_tokenizer,
    quantize_rows,
    quantize_text_encoder,
)

WORDS = ["the", "cat", "dog", "rocket", "rock", "##et", "##ing", "jump", "purple", "background", "banana"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a WordPiece tokenizer, as a transformers folder."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *WORDS]
    vocabulary = {token: index for index, token in enumerate([*tokens, "日"])}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": {
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [
            {"id": vocabulary[token], "content": token, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for token in special
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names})
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    model = BertModel(config)
    for parameter in model.parameters():  # layer norms and biases that are not ones and zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def test_rows_round_to_half_a_step() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and scale.shape == (7,)
    assert ((q.float() * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert (q.abs().amax(dim=1) == torch.tensor([127, 127, 127, 0, 127, 127, 127])).all()


def test_int8_modules_equal_their_dequantised_twins() -> None:
    q, scale = quantize_rows(torch.randn(6, 5))
    linear, embedding = Int8Linear(5, 6), Int8Embedding(6, 5)
    for module in (linear, embedding):
        module.weight_int8.copy_(q)
        module.weight_scale.copy_(scale)
        assert torch.equal(module.weight, q.float() * scale[:, None])
    linear.get_parameter("bias").data.copy_(torch.randn(6))
    x, ids = torch.randn(2, 3, 5), torch.tensor([[0, 5], [3, 3]])
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.get_parameter("bias")))
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, embedding.weight))


def test_folder_round_trip_and_fidelity(source: Path, tmp_path: Path) -> None:
    written = quantize_text_encoder(source, tmp_path / "text_encoder")
    loaded = CompactTextEncoder.from_pretrained(tmp_path / "text_encoder")
    state = written.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not any("pooler" in name for name in state) and loaded.hidden_size == 64
    assert {v.dtype for k, v in state.items() if k.endswith("weight_int8")} == {torch.int8}
    # Whatever is not int8 is a vector: biases, norms, scales.
    assert all(v.ndim == 1 for v in state.values() if v.is_floating_point())

    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    original = BertModel.from_pretrained(source).eval()
    with torch.no_grad():
        ours = loaded(ids, mask).last_hidden_state
        theirs = original(ids, attention_mask=mask).last_hidden_state
        other = loaded(ids.masked_fill(mask == 0, 7), mask).last_hidden_state
    assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.999
    torch.testing.assert_close(ours[1, :6], other[1, :6])  # what is masked is not attended

    assert isinstance(load_text_encoder(tmp_path / "text_encoder"), CompactTextEncoder)
    plain = load_text_encoder(source)
    assert isinstance(plain, BertModel) and not plain.training and not any(p.requires_grad for p in plain.parameters())

    half = CompactTextEncoder.from_pretrained(tmp_path / "text_encoder", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        states = half(ids, mask).last_hidden_state
    assert states.dtype == torch.bfloat16
    assert torch.cosine_similarity(states.float(), theirs, dim=-1).min() > 0.99


def test_another_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_encoder_decoder=False)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    quantize_text_encoder(tmp_path / "t5", tmp_path / "compact")
    loaded = CompactTextEncoder.from_pretrained(tmp_path / "compact")
    original = T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    ids, mask = torch.arange(8).view(2, 4), torch.ones(2, 4)
    with torch.no_grad():
        ours, theirs = loaded(ids, mask).last_hidden_state, original(ids, mask).last_hidden_state
    assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.999


def test_pruning_keeps_pieces_and_states(source: Path, tmp_path: Path) -> None:
    texts = ["the rockets jump", "purple cats"]
    kept = prune_tokenizer(source, tmp_path / "tokenizer", texts, max_length=12)
    quantize_text_encoder(source, tmp_path / "small", kept)
    quantize_text_encoder(source, tmp_path / "large")
    small = CompactTextEncoder.from_pretrained(tmp_path / "small").eval()
    large = CompactTextEncoder.from_pretrained(tmp_path / "large").eval()
    new, old = AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), AutoTokenizer.from_pretrained(source)
    assert len(new) == len(kept) == 5 + 52 + 5  # special, letters (##s among them), the/rocket/jump/purple/cat
    assert new.model_max_length == 12 and new.pad_token_id == 0
    for text in texts:
        a, b = new(text, return_tensors="pt"), old(text, return_tensors="pt", padding=False)
        assert new.convert_ids_to_tokens(a.input_ids[0]) == old.convert_ids_to_tokens(b.input_ids[0])
        assert [kept[index] for index in a.input_ids[0]] == b.input_ids[0].tolist()
        with torch.no_grad():
            states = small(a.input_ids, a.attention_mask).last_hidden_state
            expected = large(b.input_ids, b.attention_mask).last_hidden_state
        torch.testing.assert_close(states, expected)
    # A word whose piece is gone is spelled, never unknown.
    assert new.tokenize("banana") == ["b", "##a", "##n", "##a", "##n", "##a"] and old.tokenize("banana") == ["banana"]
    batch = new(["the cat", "purple rockets jump"], padding="max_length", truncation=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"} and batch.input_ids.shape == (2, 12)


def test_pruning_fills_by_frequency(source: Path, tmp_path: Path) -> None:
    kept = prune_tokenizer(source, tmp_path / "tokenizer", ["banana"], size=5 + 52 + 3)
    tokens = set(AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab())
    assert len(kept) == 60 and {"the", "cat", "banana"} <= tokens and not {"dog", "[unused0]", "日"} & tokens


def test_bad_input_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WaltError, match=r"source_folder: .* has no config\.json"):
        quantize_text_encoder(tmp_path, tmp_path / "out")
    with pytest.raises(WaltError, match=r"text_encoder: .* has no config\.json"):
        load_text_encoder(tmp_path)
    with pytest.raises(WaltError, match="keep_tokens: expected ids between 0 and"):
        quantize_text_encoder(source, tmp_path / "out", [0, 10_000])
    with pytest.raises(WaltError, match="size: 58 entries must be kept"):
        prune_tokenizer(source, tmp_path / "out", ["banana"], size=10)
    with pytest.raises(WaltError, match="model_type"):
        CompactTextEncoder(encoder={"hidden_size": 3})
    (tmp_path / "not.tgz").write_bytes(b"nonsense")
    with pytest.raises(WaltError, match="not an emojibase-data package"):
        emoji_words(tmp_path / "not.tgz")
    quantize_text_encoder(source, tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WaltError, match=r"text_encoder: .* cannot be loaded"):
        load_text_encoder(tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "not.tgz"]


def test_emoji_words(tmp_path: Path) -> None:
    entries = [{"label": "waving hand", "tags": ["wave"], "skins": [{"label": "waving hand: dark"}]}, {"label": "fox"}]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(tmp_path / "data.json", "package/en/data.json")
    assert emoji_words(tmp_path / "package.tgz") == ["fox", "wave", "waving hand", "waving hand: dark"]
