"""Where a user's captioned media come from: a folder, WebDataset shards, a Hugging Face dataset.

A source is cut into units (a shard; a part of a folder's files; a range of rows): the unit is what is indexed, cached,
and shared out among ranks. All three read any item at any time by where it lies, so the order of training is a choice
of the trainer and no reader has a state. This module imports no torch: indexing workers start at once.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from walt.errors import WaltError, suggest
from walt.media import MEDIA_SOURCES, MediaError

FOLDER_UNIT = 256
"""Files per unit of a folder, about."""
ROWS_UNIT = 512
CAPTION_FIELDS = ("caption", "captions", "text", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Entry:
    """One item as its source lists it, not yet opened.

    `key` names it inside its source (in valid UTF-8, as it is hashed, printed and written); `where` is what
    `Source.open` needs; `captions` are all of them; `fault` is the reason and the detail when the listing alone shows
    that the item is broken.
    """

    key: str
    suffix: str
    where: Any
    captions: tuple[str, ...]
    fault: tuple[str, str] | None = None


class Source(Protocol):
    """A place that holds captioned media."""

    name: str
    where: Where

    def units(self) -> Sequence[str]:
        """Names of the units, in a fixed order."""

    def stamp(self, unit: str) -> str:
        """Changes whenever the unit's content may have changed."""

    def entries(self, unit: str) -> Iterator[Entry]:
        """Every item of a unit, broken ones too, in a fixed order."""

    def open(self, unit: str, suffix: str, where: Any) -> Path | bytes:
        """The item's content, or the path where it lies."""


@dataclass(frozen=True)
class Where:
    """How a source is named on the command line and in a recipe; see `SourceJob` in walt.training.job."""

    path: str
    kind: str = "auto"
    caption: str | None = None
    media: str | None = None
    split: str = "train"
    caption_from: str = "files"

    @property
    def caption_key(self) -> str | None:
        """What the captions follow from: part of a unit's stamp."""
        return self.caption if self.caption_from == "files" else "/folder"


def open_source(where: Where) -> Source:
    """The source at `where.path`; a WaltError says what is missing there."""
    kind = where.kind if where.kind != "auto" else _guess(where.path)
    if kind == "datasets":
        if where.caption_from == "folder":
            raise WaltError(
                f'sources: "{where.path}" is a dataset and has no folders to name captions; caption=COLUMN reads a column'
            )
        return DatasetSource(where)
    if kind == "shards":
        return ShardSource(where)
    return FolderSource(where)


def _guess(path: str) -> str:
    folder = Path(path)
    if path.startswith("hf:"):
        return "datasets"
    if path.endswith((".tar", ".tar.gz", ".tgz")) or re.search(r"[*?{\[]", path):
        return "shards"
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "datasets"
    if folder.is_dir() and not any(os.scandir(folder)):
        return "folder"
    if folder.is_dir() and all(name.endswith(".tar") or name.startswith(".") for name in os.listdir(folder)):
        return "shards"
    return "folder"


# ---------------------------------------------------------------------------------------------------------------------
# captions


def pick_captions(record: Any, named: str | None) -> tuple[str, ...]:
    """The captions in a JSON or table record: the field `named`, else the first of CAPTION_FIELDS.

    A string is one caption, a list several; blank ones do not count.
    """
    if isinstance(record, str):
        found: Any = record
    elif isinstance(record, dict):
        fields = (named,) if named is not None else CAPTION_FIELDS
        found = next((record[name] for name in fields if record.get(name)), ())
    else:
        found = ()
    listed = [found] if isinstance(found, str) else found if isinstance(found, list | tuple) else []
    # JSON may hold half of a pair of surrogates, as of an emoji that was cut in two; no tokenizer takes that.
    texts = (text.encode("utf-8", "replace").decode() for text in listed if isinstance(text, str))
    return tuple(" ".join(text.split()) for text in texts if text.strip())


def folder_caption(path: str) -> tuple[str, ...]:
    """The name of the folder that an item lies in, of its path inside the source; none at the top."""
    parent = Path(path).parent.name
    return (readable(parent),) if parent else ()


def readable(name: str) -> str:
    """A file's name in valid UTF-8: bytes that are none stand as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _from_text(text: str) -> tuple[str, ...]:
    """Of a .txt: one caption a line."""
    return tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())


def _read_captions(name: str, content: bytes, named: str | None) -> tuple[str, ...]:
    """Captions of a .txt or .json beside the media; what cannot be read holds none."""
    try:
        text = content.decode("utf-8-sig")
        return _from_text(text) if name.endswith(".txt") else pick_captions(json.loads(text), named)
    except (ValueError, RecursionError):
        return ()


# ---------------------------------------------------------------------------------------------------------------------
# a folder


class FolderSource:
    """Media files anywhere below a folder; captions in NAME.txt or NAME.json beside them, or in metadata.jsonl/.csv.

    The metadata files are those of Hugging Face's folder datasets: `file_name` (relative to the metadata file) and a
    caption field. A file's unit follows from its name alone, so a new file changes one unit and leaves the others.
    """

    def __init__(self, where: Where) -> None:
        self.where, self.name = where, where.path
        self.root = Path(where.path)
        if not self.root.is_dir():
            raise WaltError(f'sources: there is no folder "{where.path}" (a folder, shards such as "x-*.tar", ...)')
        self.files: dict[str, list[str]] = {}
        self.tables: list[str] = []
        found: list[str] = []
        for folder, names, files in os.walk(self.root, followlinks=True):
            names[:] = sorted(name for name in names if not name.startswith("."))
            inside = os.path.relpath(folder, self.root)
            for file in sorted(files):
                path = file if inside == "." else f"{inside}/{file}"
                if file in METADATA:
                    self.tables.append(path)
                elif not file.startswith(".") and Path(file).suffix.lower() in MEDIA_SOURCES:
                    found.append(path)
        if not found:
            raise WaltError(f'sources: "{where.path}" holds no media ({", ".join(MEDIA_SOURCES)})')
        count = 1
        while count * FOLDER_UNIT < len(found):
            count *= 2
        for path in found:
            unit = f"{zlib.crc32(os.fsencode(path)) % count:05d}-of-{count:05d}"
            self.files.setdefault(unit, []).append(path)
        self._listed: dict[str, tuple[str, ...]] | None = None

    def units(self) -> Sequence[str]:
        return sorted(self.files)

    def stamp(self, unit: str) -> str:
        rows = []
        for path in (*self.tables, *self.files[unit]):
            stem = path[: -len(Path(path).suffix)]
            for name in (path, f"{stem}.txt", f"{stem}.json"):
                try:
                    found = os.stat(self.root / name)
                except OSError:
                    continue
                rows.append(f"{name} {found.st_size} {found.st_mtime_ns}")
        return _digest("\n".join(rows), self.where.caption_key)

    def entries(self, unit: str) -> Iterator[Entry]:
        for path in self.files[unit]:
            yield Entry(readable(path), Path(path).suffix.lower(), path, self._captions(path))

    def open(self, unit: str, suffix: str, where: Any) -> Path | bytes:
        return self.root / where

    def _captions(self, path: str) -> tuple[str, ...]:
        if self.where.caption_from == "folder":
            return folder_caption(path)
        stem = path[: -len(Path(path).suffix)]
        for name in (f"{stem}.txt", f"{stem}.json"):
            try:
                found = _read_captions(name, (self.root / name).read_bytes(), self.where.caption)
            except OSError:
                continue
            if found:
                return found
        if self._listed is None:
            self._listed = {}
            for table in self.tables:
                self._listed.update(self._table(table))
        return self._listed.get(path, ())

    def _table(self, table: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        folder = Path(table).parent
        try:
            with open(self.root / table, encoding="utf-8-sig", newline="") as file:
                if table.endswith(".csv"):
                    rows: list[Any] = list(csv.DictReader(file))
                else:
                    rows = [json.loads(line) for line in file if line.strip()]
        except (OSError, ValueError, csv.Error) as error:
            raise WaltError(f'sources: "{self.root / table}" cannot be read: {error}') from error
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or "file_name" not in row:
                seen = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)[:80]
                raise WaltError(f'sources: row {number} of "{self.root / table}" has no field file_name, only {seen}')
            yield (folder / str(row["file_name"])).as_posix(), pick_captions(row, self.where.caption)


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset shards


class ShardSource:
    """Tar files in WebDataset's layout: members KEY.mp4 and KEY.txt or KEY.json belong together.

    A name may hold * ? [..] and {000..127}. Shards are not unpacked or streamed: the index remembers where each member
    lies. Compressed shards have no such places and are refused.
    """

    def __init__(self, where: Where) -> None:
        self.where, self.name = where, where.path
        patterns = expand_braces(where.path)
        if Path(where.path).is_dir():
            patterns = [f"{glob.escape(where.path)}/*.tar"]
        found = [sorted(glob.glob(pattern)) for pattern in patterns]
        missing = [pattern for pattern, files in zip(patterns, found, strict=True) if not files]
        if missing:
            raise WaltError(f'sources: there is no shard "{missing[0]}"')
        self.shards = list(dict.fromkeys(itertools.chain.from_iterable(found)))
        packed = [shard for shard in self.shards if not shard.endswith(".tar")]
        if packed:
            raise WaltError(f'sources: "{packed[0]}" is no plain .tar; decompress it (media are compressed already)')

    def units(self) -> Sequence[str]:
        return self.shards

    def stamp(self, unit: str) -> str:
        found = os.stat(unit)
        return _digest(f"{found.st_size} {found.st_mtime_ns}", self.where.caption_key)

    def entries(self, unit: str) -> Iterator[Entry]:
        size, shard = os.stat(unit).st_size, Path(unit).name
        media: list[tuple[str, str, str, int, int]] = []
        captions: dict[str, tuple[str, ...]] = {}
        broken = ""
        try:
            with tarfile.open(unit, "r:") as archive:
                for member in archive:
                    key, suffix = split_key(member.name)
                    if not member.isfile():
                        continue
                    if suffix in MEDIA_SOURCES:
                        media.append((key, member.name, suffix, member.offset_data, member.size))
                    elif suffix in (".txt", ".json") and member.offset_data + member.size <= size:
                        stream = archive.extractfile(member)
                        assert stream is not None
                        read = _read_captions(member.name, stream.read(), self.where.caption)
                        captions[key] = captions.get(key) or read
                end = archive.offset
            with open(unit, "rb") as file:
                # tarfile takes a broken header for the end; the true end is a block of zeros.
                file.seek(end)
                if file.read(512) != bytes(512):
                    broken = f"no end mark after byte {end}"
        except tarfile.ReadError as error:
            broken = str(error)
        for key, name, suffix, start, length in media:
            fault = None
            if start + length > size:
                fault, broken = ("cut off", f"the shard ends {start + length - size} bytes before it does"), ""
            told = folder_caption(name) if self.where.caption_from == "folder" else captions.get(key, ())
            yield Entry(readable(f"{shard}/{name}"), suffix, (start, length), told, fault)
        if broken:
            # What is lost behind the break cannot be counted: it stands as one item.
            reason = "empty" if not size else "cut off" if media or captions else "unreadable"
            yield Entry(readable(f"{shard} (the rest)"), "", None, (), (reason, f"shard: {broken}"))

    def open(self, unit: str, suffix: str, where: Any) -> Path | bytes:
        start, length = where
        with open(unit, "rb") as file:
            file.seek(start)
            content = file.read(length)
        if len(content) < length:
            raise MediaError("cut off", f"{len(content)} of {length} bytes")
        return content


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last part of the path; the suffix is the last one."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    return key, (dot + extension.rpartition(".")[2]).lower()


def expand_braces(pattern: str) -> list[str]:
    """`x-{000..002}.tar` to its three names, as shells do it; several braces multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    return [
        text
        for number in numbers
        for text in expand_braces(f"{pattern[: found.start()]}{number:0{width}d}{pattern[found.end() :]}")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face datasets


@dataclass
class DatasetSource:
    """A Hugging Face dataset with an image or video column, local (`save_to_disk`) or by its hub name.

    Media stay encoded until they are drawn. Needs the package `datasets`.
    """

    where: Where
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.where.path
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise WaltError(f'sources: "{self.name}" needs the package datasets: pip install datasets') from None
        path = self.where.path.removeprefix("hf:")
        try:
            if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
                table: Any = datasets.load_from_disk(path)
            else:
                table = datasets.load_dataset(path, split=self.where.split)
        except (OSError, ValueError, RuntimeError) as error:
            raise WaltError(f'sources: "{self.name}" cannot be loaded: {str(error).splitlines()[0]}') from error
        if isinstance(table, dict):
            if self.where.split not in table:
                raise WaltError(f'sources: "{self.name}" has no split "{self.where.split}", only {", ".join(table)}')
            table = table[self.where.split]
        kinds = {"Image": datasets.Image, "Video": datasets.Video}
        media = [name for name, feature in table.features.items() if type(feature).__name__ in kinds]
        column = self.where.media or next(iter(media), "")
        if column not in media:
            known = f"{suggest(column, media)}; it has {', '.join(media) or 'none'}"
            raise WaltError(f'sources: "{self.name}" has no image or video column {column}{known}')
        kind = type(table.features[column]).__name__
        self.column: str = column
        self.table: Any = table.cast_column(column, kinds[kind](decode=False))
        self.texts: Any = table.remove_columns(media)
        # Columns of class numbers read as their names.
        self.classes: dict[str, list[str]] = {
            name: list(feature.names) for name, feature in table.features.items() if hasattr(feature, "int2str")
        }

    def units(self) -> Sequence[str]:
        return [f"{start:09d}" for start in range(0, len(self.table), ROWS_UNIT)]

    def stamp(self, unit: str) -> str:
        return _digest(f"{self.table._fingerprint} {self.column}", self.where.caption)

    def entries(self, unit: str) -> Iterator[Entry]:
        start = int(unit)
        for row in range(start, min(start + ROWS_UNIT, len(self.table))):
            content = self._content(row)
            record = dict(self.texts[row])
            for name, names in self.classes.items():
                if isinstance(record.get(name), int) and 0 <= record[name] < len(names):
                    record[name] = names[record[name]]
            captions = pick_captions(record, self.where.caption)
            head = b""
            if isinstance(content, Path):
                try:
                    with open(content, "rb") as file:
                        head = file.read(16)
                except OSError:
                    content = b""
            else:
                head = content[:16]
            suffix = sniff(head)
            fault = None if suffix or not content else ("unreadable", "no kind of media that is known")
            yield Entry(f"row {row}", suffix or ".mp4", row, captions, fault)

    def open(self, unit: str, suffix: str, where: Any) -> Path | bytes:
        return self._content(int(where))

    def _content(self, row: int) -> Path | bytes:
        cell = self.table[row][self.column] or {}
        content = cell.get("bytes")
        return content if content is not None else Path(cell["path"]) if cell.get("path") else b""


def sniff(head: bytes) -> str:
    """The suffix that fits a file's first bytes, or ''."""
    if head[4:8] == b"ftyp":
        return ".mp4"
    if head[:4] == b"RIFF":
        return {b"WEBP": ".webp", b"AVI ": ".avi"}.get(head[8:12], "")
    starts = {b"\x1aE\xdf\xa3": ".mkv", b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif"}
    return next((suffix for start, suffix in starts.items() if head.startswith(start)), "")


def content_hash(content: Path | bytes) -> str:
    """SHA-256 of the media's bytes."""
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*parts: str | None) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
