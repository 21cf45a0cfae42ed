"""Latents and text states of a user's media, encoded once (`walt encode`) and read back by training in any order.

A folder holds

    index.json                  what the latents were made with: tokenizer, text encoder, and the recipe's fields
    UNIT-0000-DIGEST.safetensors  a part: per sample `SAMPLE` `(8, t, h, w)` and `SAMPLE.low`, raw latents; per caption
                                `text.CAPTION` `(S, D)`; all float16. Its rows and broken items stand in the metadata
    UNIT.json                   the parts of a unit (a shard, a part of a folder), written when all of them are there

SAMPLE is a hash of the media's bytes and of all that shapes the latent; DIGEST one of the part's samples and captions.
So a rerun keeps what is right and makes what is missing, whatever happened in between, and every file is a pure
function of the media and the recipe. Units are shared out among the ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from walt.data.clips import Clips, Draw, MediaClip
from walt.data.index import Broken, Item
from walt.data.latents import fingerprint, save_file
from walt.data.sources import Where, content_hash
from walt.errors import WaltError
from walt.media import MediaError, replacing
from walt.training.job import DenoiserJob, MediaJob

PART = 32
"""Samples per file, the most that are in memory at a time."""

Words = Callable[[list[str]], list[Tensor]]


@dataclasses.dataclass
class Tally:
    """What a rank did: samples encoded now, kept from before, and left out because their item is broken."""

    total: int = 0
    encoded: int = 0
    kept: int = 0
    skipped: int = 0

    @property
    def done(self) -> int:
        """Samples that need no more work."""
        return self.encoded + self.kept + self.skipped


def recipe_identity(job: DenoiserJob) -> dict[str, Any]:
    """What decides a latent beside the media: compared when a folder is written to again and when it is read."""
    assert isinstance(job.data, MediaJob)
    fields = (
        "seed",
        "fps",
        "aspect",
        "enlarge",
        "variants",
        "max_clips",
        "video_stills",
        "captions",
        "min_size",
        "max_size",
    )
    identity = {
        "tokenizer": fingerprint(Path(job.tokenizer)),
        "text_encoder": fingerprint(Path(job.text_encoder)) if job.text_encoder else None,
        "patch_size": job.model.get("patch_size", 1),
        "low_res": job.model.get("low_res_channels") is not None,
        "shapes": [shape.model_dump(exclude={"weight"}) for shape in job.shapes],
        "data": job.data.model_dump(mode="json", include=set(fields)),
    }
    return dict(json.loads(json.dumps(identity)))


def encode_media(
    job: DenoiserJob,
    clips: Clips,
    output: Path,
    encode: Callable[[Tensor], Tensor],
    words: Words | None = None,
    workers: int = 0,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Encodes this rank's units into `output`; parts that are there already are kept.

    Args:
        job: the recipe, with `data.kind=media`.
        clips: the recipe's clips (`DenoiserObjective.clips`).
        output: target folder.
        encode: raw latents `(B, 8, t, h, w)` of video `(B, 3, T, H, W)`.
        words: text states of captions; None: a model without text.
        workers: threads that decode ahead.
        progress: told the tally after every sample.

    Raises:
        WaltError: the folder holds another recipe's latents, a mostly broken source, a full disk.
    """
    output.mkdir(parents=True, exist_ok=True)
    identity = recipe_identity(job)
    head = output / "index.json"
    if head.exists():
        _same(_read_json(head), identity, output, "choose another folder")
    else:
        _write_json(head, identity)
    units = [(s, u) for s, table in enumerate(clips.tables) for u in range(len(table.index.units))]
    mine = units[clips.rank :: clips.world]
    tally = Tally()
    plans = [(s, u, _draws(clips, s, u)) for s, u in mine]
    tally.total = sum(len(draws) for *_, draws in plans)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for source, unit, draws in plans:
            _encode_unit(_Work(job, clips, output, encode, words, pool, workers, tally, progress), source, unit, draws)
    if words is not None:
        # What a dropped caption becomes; the same file whoever writes it.
        path = output / "empty.safetensors"
        if not path.exists():
            with replacing(path) as temporary:
                save_file({_text_key(""): words([""])[0].half().cpu().contiguous()}, temporary)
    return tally


def _draws(clips: Clips, source: int, unit: int) -> list[Draw]:
    table = clips.tables[source]
    items = np.unique(table.clip_items)
    return [
        draw for item in items[table.index.items["unit"][items] == unit] for draw in clips.windows(source, int(item))
    ]


@dataclasses.dataclass
class _Work:
    job: DenoiserJob
    clips: Clips
    output: Path
    encode: Callable[[Tensor], Tensor]
    words: Words | None
    pool: ThreadPoolExecutor
    workers: int
    tally: Tally
    progress: Callable[[Tally], None] | None

    def told(self) -> None:
        if self.progress is not None:
            self.progress(self.tally)


def _encode_unit(work: _Work, source: int, unit: int, draws: Sequence[Draw]) -> None:
    clips = work.clips
    index = clips.tables[source].index
    name = unit_key(index.source.where, index.units[unit])
    for left in work.output.glob(f".{name}*"):  # of a killed run
        left.unlink(missing_ok=True)
    stamp = index.source.stamp(index.units[unit])
    hashes: dict[int, str] = {}
    parts: list[str] = []
    for number, start in enumerate(range(0, len(draws), PART)):
        parts.append(_encode_part(work, f"{name}-{number:04d}", source, draws[start : start + PART], hashes))
    manifest = {
        "source": index.source.name,
        "unit": index.units[unit],
        "stamp": stamp,
        "parts": parts,
        "samples": len(draws),
    }
    path = work.output / f"{name}.json"
    if not path.exists() or _read_json(path) != manifest:
        _write_json(path, manifest)
    for old in work.output.glob(f"{name}-*.safetensors"):  # of media or captions that have changed since
        if old.name not in parts:
            old.unlink()


def _encode_part(work: _Work, name: str, source: int, draws: Sequence[Draw], hashes: dict[int, str]) -> str:
    """Makes one part unless it is there; returns its file name."""
    clips, where = work.clips, work.clips.data.sources[source].path
    items = {draw.item: clips.item(draw) for draw in draws}
    broken: dict[int, Broken] = {}
    for number, item in items.items():
        if number not in hashes:
            try:
                hashes[number] = content_hash(clips.tables[source].index.open(item))
            except (OSError, MediaError) as error:
                hashes[number] = "unreadable"
                broken[number] = Broken(item.key, getattr(error, "reason", "unreadable"), str(error))
    keys = [_sample_key(work, draw, items[draw.item], hashes[draw.item]) for draw in draws]
    captions = sorted({caption for item in items.values() for caption in item.captions}) if work.words else []
    digest = hashlib.sha256(json.dumps([keys, captions]).encode()).hexdigest()[:16]
    path = work.output / f"{name}-{digest}.safetensors"
    if path.exists():
        with contextlib.suppress(WaltError):  # a damaged part is made again
            rows, lost = _read_rows(path)
            for key in {row[0] for row in rows}:
                clips.account.used(where) if key else None
            for found in lost:
                clips.account.skip(where, found)
            work.tally.kept += len(rows)
            work.tally.skipped += len(draws) - len(rows)
            work.told()
            return path.name
    tensors: dict[str, Tensor] = {}
    rows = []
    for (draw, key), clip in zip(zip(draws, keys, strict=True), _ahead(work, source, draws, items), strict=True):
        if isinstance(clip, MediaError):
            # Other windows of the item may be whole: they are used, as they are on the fly.
            broken.setdefault(draw.item, Broken(items[draw.item].key, clip.reason, str(clip)))
            work.tally.skipped += 1
        else:
            tensors[key] = work.encode(clip.video[None])[0].half().cpu().contiguous()
            if clip.low_res is not None:
                tensors[f"{key}.low"] = work.encode(clip.low_res[None])[0].half().cpu().contiguous()
            rows.append([items[draw.item].key, draw.part, draw.shape, draw.variant, key])
            work.tally.encoded += 1
        work.told()
    for number in items:
        if number in broken:
            clips.account.skip(where, broken[number])
        else:
            clips.account.used(where)
    if work.words is not None and captions:
        for caption, states in zip(captions, work.words(captions), strict=True):
            tensors[_text_key(caption)] = states.half().cpu().contiguous()
    named = [[found.key, found.reason, found.detail] for _, found in sorted(broken.items())]
    with replacing(path) as temporary:
        # safetensors refuses an empty file: a part of broken items still says so.
        # And writes several metadata fields in any order: this is one.
        save_file(tensors or {"none": torch.zeros(1)}, temporary, {"part": json.dumps({"rows": rows, "broken": named})})
    return path.name


def _ahead(work: _Work, source: int, draws: Sequence[Draw], items: dict[int, Item]) -> Iterator[MediaClip | MediaError]:
    """The samples in order, decoded by threads a little ahead of their use."""
    clips = work.clips

    def read(draw: Draw) -> MediaClip | MediaError:
        try:
            return clips.load(draw)
        except MediaError as error:
            return error

    if not work.workers:
        yield from map(read, draws)
        return
    waiting: list[Future[MediaClip | MediaError]] = []
    coming = iter(draws)
    for draw in coming:
        waiting.append(work.pool.submit(read, draw))
        if len(waiting) > 2 * work.workers:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _sample_key(work: _Work, draw: Draw, item: Item, content: str) -> str:
    window = dataclasses.astuple(work.clips.window(draw, item))
    fields = [content, item.suffix, work.clips.data.fps, window, work.clips.low_res]
    return hashlib.sha256(json.dumps([*fields, draw.shape, draw.part, draw.variant]).encode()).hexdigest()[:24]


def _text_key(caption: str) -> str:
    return f"text.{hashlib.sha256(caption.encode()).hexdigest()[:24]}"


def unit_key(source: Where, unit: str) -> str:
    """The name that a unit's files begin with. A recipe may read one place twice, with other captions or another split."""
    named = [
        f"{key}={value}" for key, value in dataclasses.asdict(source).items() if value != getattr(Where, key, None)
    ]
    own = [text for text in named if not text.startswith(("path=", "kind="))]
    return hashlib.sha256(os.fsencode("\n".join([source.path, unit, *own]))).hexdigest()[:12]


class MediaLatents:
    """Reads what `encode_media` wrote, sample by sample.

    Raises:
        WaltError: latents of another recipe, tokenizer or text encoder; a unit that is missing or has changed since.
    """

    def __init__(self, folder: Path, job: DenoiserJob, clips: Clips) -> None:
        self.folder, self.clips = folder, clips
        _same(_read_json(folder / "index.json"), recipe_identity(job), folder, "run `walt encode` with this recipe")
        self.places: dict[tuple[int, str, int, int, int], tuple[str, str]] = {}
        self.broken: dict[tuple[int, str], Broken] = {}
        self.texts: dict[str, str] = {}
        for source, table in enumerate(clips.tables):
            used = set(np.unique(table.index.items["unit"][table.clip_items]).tolist())
            for number, unit in enumerate(table.index.units):
                if number not in used:
                    continue
                path = folder / f"{unit_key(table.index.source.where, unit)}.json"
                manifest = _read_json(path) if path.exists() else {}
                if manifest.get("stamp") != table.index.source.stamp(unit):
                    why = "has changed since" if manifest else "is missing"
                    raise WaltError(f"{folder}: {unit} of {table.index.source.name} {why}; run `walt encode` again")
                for part in manifest["parts"]:
                    self._add(source, part)
        if (folder / "empty.safetensors").exists():
            self.texts[_text_key("")] = "empty.safetensors"

    def _add(self, source: int, part: str) -> None:
        rows, broken = _read_rows(self.folder / part)
        for item, piece, shape, variant, key in rows:
            self.places[source, item, piece, shape, variant] = (part, key)
        for found in broken:
            self.broken[source, found.key] = found
        with safe_open(self.folder / part, "pt") as file:
            self.texts.update({name: part for name in file.keys() if name.startswith("text.")})  # noqa: SIM118

    def get(self, draw: Draw) -> tuple[Tensor, Tensor | None, str, Tensor | None]:
        """Raw latent `(8, t, h, w)`, low-resolution latent or None, caption, and its text states `(S, D)` or None.

        Raises:
            MediaError: the item was found broken when it was encoded.
        """
        item = self.clips.item(draw)
        place = self.places.get((draw.source, item.key, draw.part, draw.shape, draw.variant))
        if place is None:
            found = self.broken.get((draw.source, item.key))
            raise MediaError(
                found.reason if found else "damaged", found.detail if found else f"no latent in {self.folder}"
            )
        part, key = place
        file = _open_part(self.folder / part)
        low = file.get_tensor(f"{key}.low").float() if self.clips.low_res else None
        caption = self.clips.caption(draw, item)
        return file.get_tensor(key).float(), low, caption, self.states(caption)

    def states(self, caption: str) -> Tensor | None:
        """Text states `(S, D)` of a caption, or None when the recipe has no text."""
        key = _text_key(caption)
        part = self.texts.get(key)
        return None if part is None else _open_part(self.folder / part).get_tensor(key).float()


@functools.lru_cache(maxsize=64)
def _open_part(path: Path) -> Any:
    return safe_open(path, "pt").__enter__()


def _read_rows(path: Path) -> tuple[list[list[Any]], list[Broken]]:
    try:
        with safe_open(path, "pt") as file:
            part = json.loads(file.metadata()["part"])
        return part["rows"], [Broken(*row) for row in part["broken"]]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WaltError(f"latent part {path} is damaged ({error}); run `walt encode` again") from None


def _same(found: dict[str, Any], wanted: dict[str, Any], folder: Path, advice: str) -> None:
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise WaltError(f"{folder} holds latents of another recipe ({', '.join(changed)} differ); {advice}")


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise WaltError(f"{path} cannot be read ({error}); run `walt encode` again") from None
