"""What the sources hold, probed once: one JSON-lines file per unit, made in parallel and reused until the unit changes.

A row is a good item (kind, size, length, captions, where it lies) or a broken one (reason, detail). Rows stay on disk;
in memory an item is a few numbers. Files are put in place whole, so that ranks and runs may share a folder and an
interrupted indexing goes on. A unit that has changed, or is read with another caption field, gets another file: the one
that a run has open in its memory stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from walt.data.sources import Entry, Source, Where, open_source
from walt.errors import WaltError
from walt.media import MediaError, probe, read_window

VERSION = 1
FIELDS = np.dtype(
    [
        ("unit", np.int32),
        ("line", np.int64),  # byte offset of the row in its unit's file
        ("video", np.bool_),
        ("height", np.int32),
        ("width", np.int32),
        ("seconds", np.float64),
        ("captions", np.int32),
    ]
)


@dataclass(frozen=True)
class Item:
    """One good item, read back from the index."""

    unit: str
    key: str
    suffix: str
    where: Any
    captions: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Broken:
    """One item that cannot be used, and why (`reason` is one of walt.media.REASONS)."""

    key: str
    reason: str
    detail: str


class Index:
    """The items of one source.

    Attributes:
        items: one row of FIELDS per good item, units and items in the source's order.
        broken: the others.
        labels: the captions there are, of a source whose folders name its items.
    """

    def __init__(self, source: Source, folder: Path, stamps: Mapping[str, str]) -> None:
        self.source = source
        self.units = list(stamps)
        self.files = [_file(folder, source, unit, stamp) for unit, stamp in stamps.items()]
        rows: list[tuple[Any, ...]] = []
        self.broken: list[Broken] = []
        self.labels: set[str] = set()
        labelled = source.where.caption_from == "folder"
        for number, path in enumerate(self.files):
            with open(path, "rb") as file:
                place = len(file.readline())
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        raise WaltError(f"data.index: {path} is damaged; delete it, and it is made again") from None
                    if "reason" in row:
                        self.broken.append(Broken(row["key"], row["reason"], row["detail"]))
                    else:
                        if labelled:
                            self.labels.update(row["captions"])
                        size = (row["height"], row["width"], row["seconds"], len(row["captions"]))
                        rows.append((number, place, row["kind"] == "video", *size))
                    place += len(line)
        self.items = np.array(rows, dtype=FIELDS)

    def item(self, number: int) -> Item:
        """Item `number` with its name, captions and place."""
        row = self.items[number]
        with open(self.files[row["unit"]], "rb") as file:
            file.seek(int(row["line"]))
            found = json.loads(file.readline())
        return Item(
            self.units[row["unit"]],
            found["key"],
            found["suffix"],
            found["where"],
            tuple(found["captions"]),
            float(found["seconds"]),
        )

    def open(self, item: Item) -> Path | bytes:
        """The item's content, or its path."""
        return self.source.open(item.unit, item.suffix, item.where)


def build_index(
    where: Where,
    folder: Path,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Probes every unit of a source that the folder does not know yet, and returns the whole index.

    Args:
        where: the source.
        folder: the index folder; sources and runs may share it.
        workers: processes that probe; 0: this one.
        share: (rank, ranks): each rank begins with its own units and leaves out what others have done meanwhile.
        progress: called with (done, total) units.

    Raises:
        WaltError: there is no such source.
    """
    source = open_source(where)
    folder.mkdir(parents=True, exist_ok=True)
    units, (rank, ranks) = list(source.units()), share
    stamps = {unit: source.stamp(unit) for unit in units}
    order = sorted(range(len(units)), key=lambda i: ((i - rank) % ranks, i))
    missing = [units[i] for i in order if not _known(folder, source, units[i], stamps[units[i]])]
    done = len(units) - len(missing)
    if progress is not None:
        progress(done, len(units))
    if workers > 1 and len(missing) > 1:
        # Not forked: the parent may hold threads of torch.
        context = get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(missing)), context, _start, (where, folder)) as pool:
            for future in as_completed([pool.submit(_probe_unit, unit, stamps[unit]) for unit in missing]):
                future.result()
                done += 1
                if progress is not None:
                    progress(done, len(units))
    else:
        for unit in missing:
            _index_unit(folder, source, unit, stamps[unit])
            done += 1
            if progress is not None:
                progress(done, len(units))
    return Index(source, folder, stamps)


_worker: tuple[Path, Source] | None = None


def _start(where: Where, folder: Path) -> None:
    global _worker
    _worker = (folder, open_source(where))


def _probe_unit(unit: str, stamp: str) -> None:
    assert _worker is not None
    _index_unit(_worker[0], _worker[1], unit, stamp)


def _index_unit(folder: Path, source: Source, unit: str, stamp: str) -> None:
    if _known(folder, source, unit, stamp):  # another rank was here
        return
    head = {"version": VERSION, "source": source.name, "unit": unit, "stamp": stamp, "at": time.time()}
    path = _file(folder, source, unit, stamp)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(head) + "\n")
            for entry in source.entries(unit):
                file.write(json.dumps(_row(source, unit, entry)) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _row(source: Source, unit: str, entry: Entry) -> dict[str, Any]:
    if entry.fault is not None:
        return {"key": entry.key, "reason": entry.fault[0], "detail": entry.fault[1]}
    try:
        found = probe(source.open(unit, entry.suffix, entry.where), entry.suffix)
    except MediaError as error:
        return {"key": entry.key, "reason": error.reason, "detail": str(error)}
    except (OSError, ValueError) as error:
        return {"key": entry.key, "reason": "unreadable", "detail": str(error)}
    return {
        "key": entry.key,
        "suffix": entry.suffix,
        "where": entry.where,
        "kind": found.kind,
        "height": found.height,
        "width": found.width,
        "seconds": found.seconds,
        "captions": entry.captions,
    }


def _known(folder: Path, source: Source, unit: str, stamp: str) -> bool:
    try:
        with open(_file(folder, source, unit, stamp)) as file:
            head = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return head.get("version") == VERSION and head.get("stamp") == stamp


def _file(folder: Path, source: Source, unit: str, stamp: str) -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(f'{source.name} {unit} {stamp}')).hexdigest()[:24]}.jsonl"


def decode_all(index: Index) -> Iterator[Broken | None]:
    """Decodes every good item to its end; per item None, or what is wrong with it after all."""
    for number in range(len(index.items)):
        item = index.item(number)
        size = (32, 32)
        last = max(0.0, item.seconds - 1e-3)
        try:
            read_window(index.open(item), item.suffix, [0.0, last] if index.items["video"][number] else [0.0], size)
        except (MediaError, OSError) as error:
            yield Broken(item.key, getattr(error, "reason", "unreadable"), str(error))
        else:
            yield None
