"""Precomputed latents: encoded once by `walt encode`, read back by training in any order.

A folder holds `index.json` and one safetensors file per shard: `latents` `(N, 8, t, h, w)` float16, raw (not
normalised) as the tokenizer gives them, and for a super-resolution stage `low_res` `(N, 8, t, h/2, w/2)`. Captions
stand in each file's metadata.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from walt.conditioning import low_res_kind
from walt.data.emoji import FPS
from walt.data.scenes import Scenes, world
from walt.data.stage import Stage
from walt.errors import WaltError
from walt.training.job import DataJob, DenoiserJob, Shape

SHARD = 32
GOLDEN = (5**0.5 - 1) / 2


def fingerprint(tokenizer: Path) -> str:
    """Hash of a tokenizer folder's weights and config: latents of another tokenizer are refused."""
    digest = hashlib.sha256()
    files = sorted(tokenizer.glob("*.safetensors")) + sorted(tokenizer.glob("config.json"))
    if not files:
        raise WaltError(f"no tokenizer in {tokenizer}: train one with `walt train emoji.tokenizer`")
    for path in files:
        with open(path, "rb") as file:  # a text encoder may be larger than memory
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """As that of safetensors, for files that fit into memory twice.

    Its own gives errors that are no OSErrors, files that nobody else may read, and, killed, a temporary file under a name
    that nobody knows.
    """
    path.write_bytes(safetensors.torch.save(dict(tensors), metadata))


def write_latents(
    job: DenoiserJob,
    output: Path,
    counts: Sequence[int],
    encode: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Encodes `counts[i]` clips of the recipe's i-th shape into `output`; shards that are there are kept.

    Args:
        job: the recipe whose scenes, shapes and (for super-resolution) half-size twins are encoded.
        output: target folder; files appear under their name only when whole.
        counts: clips per shape.
        encode: raw latents `(B, 8, t, h, w)` of video `(B, 3, T, H, W)`.
        progress: called with (done, total) clips of this rank.
        device: draws the scenes of a recipe with `data.draw` "device", a shard at once.

    Under torchrun the ranks share the shards out; whoever finds all of them there writes the index.

    Raises:
        WaltError: counts that are not one per shape or more than there are scenes, a shape given twice, a folder of another
            recipe (tokenizer, data, world, shapes, twins), a damaged index.
    """
    if len(counts) != len(job.shapes):
        raise WaltError(f"count: {len(job.shapes)} numbers needed, one per shape of the recipe, got {len(counts)}")
    data = _theatre(job)
    names = [shape.model_dump(exclude={"weight"}) for shape in job.shapes]
    for place, (name, count) in enumerate(zip(names, counts, strict=True)):
        if name in names[:place]:
            raise WaltError(f"shapes: {name} stands there twice; give it once, with the sum of the weights")
        if count > data.scenes // len(names):
            raise WaltError(
                f"count: {count} clips of shape {name}, but data.scenes={data.scenes} has {data.scenes // len(names)} scenes "
                f"for each of {len(names)} shapes"
            )
    scenes = Scenes(data)
    stage = Stage(scenes.cast, device) if data.draw == "device" else None
    twins = low_res_kind(job.model) == "space"
    output.mkdir(parents=True, exist_ok=True)
    index = output / "index.json"
    recipe = data.model_dump(mode="json", exclude={"kind", "latents", "source", "draw"})
    if data.fps == FPS:
        del recipe["fps"]  # folders that are older than the field hold this rate
    if not data.clip_subjects:
        del recipe["clip_subjects"]  # so that folders made before there was such a field are still known
    known = {
        "tokenizer": fingerprint(Path(job.tokenizer)),
        "data": recipe,
        "world": _world(data),
        # Which scenes a shape has depends on all of them (see below).
        "shapes": names,
        "twins": twins,
    }
    if index.exists():
        old = _read_index(index)
        # Older folders do not say the last two: their shards show one, and reading finds out about the other.
        rows_of = [row["shape"] for row in old["shards"]]
        old = {
            "shapes": [name for i, name in enumerate(rows_of) if name not in rows_of[:i]] or names,
            "twins": twins,
            **old,
        }
        changed = [key for key in known if old[key] != known[key]]
        if changed:
            raise WaltError(f"{output} holds latents of another recipe ({', '.join(changed)}); choose another folder")
    else:
        # Before the first shard: what an interrupted run leaves behind must be known by what it was made of.
        _write_index(index, {**known, "shards": []})
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rows: list[dict[str, Any]] = []
    parts: list[tuple[int, Shape, range, Path]] = []
    for place, (shape, name, count) in enumerate(zip(job.shapes, names, counts, strict=True)):
        for start in range(0, count, SHARD):
            numbers = range(start, min(start + SHARD, count))
            path = output / f"{_key(name)}-{start:06d}-{len(numbers)}.safetensors"
            rows.append({"file": path.name, "shape": name})
            parts.append((place, shape, numbers, path))
    mine = parts[rank::world]
    done, total = 0, sum(len(numbers) for *_, numbers, _ in mine)
    for place, shape, numbers, path in mine:
        if not path.exists():
            # Each shape has a part of the scenes for itself, so that stills and clips together show more of the world,
            # and no held-out clip of one shape is trained on as another.
            first = place * (data.scenes // len(job.shapes))
            make = scenes.clip if stage is None else scenes.layout
            clips = [make(first + number, shape, twins) for number in numbers]
            tensors = {"latents": _encoded([clip.video for clip in clips], encode, stage)}
            if twins:
                low = [clip.low_res for clip in clips if clip.low_res is not None]
                tensors["low_res"] = _encoded(low, encode, stage)
            captions = [clip.caption for clip in clips]
            temporary = path.with_suffix(".tmp")
            save_file(tensors, temporary, {"captions": json.dumps(captions)})
            os.replace(temporary, path)
        done += len(numbers)
        if progress is not None:
            progress(done, total)
    if all(path.exists() for *_, path in parts):
        _write_index(index, {**known, "shards": rows})


def _encoded(clips: Sequence[Any], encode: Callable[[Tensor], Tensor], stage: Stage | None) -> Tensor:
    """Raw latents `(N, 8, t, h, w)` float16 of clips of one shape; drawn on a device they are encoded together."""
    videos = [clip[None] for clip in clips] if stage is None else [stage.draw(clips)]
    return torch.cat([encode(video).half().cpu() for video in videos]).contiguous()


class LatentShards:
    """The latents of one folder in memory, per shape of a recipe; the last `held` of each shape are not for training.

    Those of `data.mixed_latents` come in between, of the shapes that are there; they are never held out.

    A WaltError for latents of another tokenizer, world, subjects or rate, for shapes that are not there, for shards without the
    small videos that a super-resolution recipe needs, and for damaged files.
    """

    def __init__(self, folder: Path, job: DenoiserJob, held: int = 0) -> None:
        self.held = held
        data, index = _theatre(job), _read_index_of(folder, job)
        stored = index["data"]
        if index["world"] != _world(data):
            raise WaltError(f"{folder} holds latents of another world (subjects, sizes, ...); run `walt encode` again")
        held_fields = {"subjects": [*data.subjects], "clip_subjects": [*data.clip_subjects], "fps": data.fps}
        for field, value in held_fields.items():
            was = stored.get(field, FPS if field == "fps" else [])
            if was != value:
                raise WaltError(
                    f"data.{field}: {value} given, but {folder} holds latents of {was}; run `walt encode` again"
                )
        twins = low_res_kind(job.model) == "space"
        self.sets: list[_Set] = []
        for shape in job.shapes:
            found = _read_set(folder, index, shape, twins)
            if found is None:
                name = shape.model_dump(exclude={"weight"})
                raise WaltError(f"{folder} has no latents of shape {name}; run `walt encode` with this recipe")
            if len(found) <= held:
                raise WaltError(
                    f"{folder} has {len(found)} clips of shape {shape.model_dump(exclude={'weight'})}, and "
                    f"run.heldout_clips={held} of them are not for training; encode more"
                )
            self.sets.append(found)
        self.share = data.mixed_share
        self.mixed: list[_Set | None] = [None] * len(job.shapes)
        if data.mixed_latents is not None:
            other = Path(data.mixed_latents)
            mixed_index = _read_index_of(other, job)
            self.mixed = [_read_set(other, mixed_index, shape, twins) for shape in job.shapes]
            if not any(self.mixed):
                raise WaltError(f"data.mixed_latents: {other} has no latents of any shape of this recipe")

    def get(self, shape: int, number: int) -> tuple[Tensor, Tensor | None, str]:
        """Clip `number` (cycled) of a shape: raw latent `(8, t, h, w)`, low-resolution latent or None, caption."""
        mixed = self.mixed[shape]
        # The golden ratio spreads the numbers of every clip evenly over both folders.
        if mixed is not None and number * GOLDEN % 1 < self.share:
            return mixed.row(number % len(mixed))
        return self.sets[shape].row(number % (len(self.sets[shape]) - self.held))

    def held_out(self, shape: int, number: int) -> tuple[Tensor, Tensor | None, str]:
        """Clip `number` (below `held`) of those that `get` never gives."""
        return self.sets[shape].row(len(self.sets[shape]) - 1 - number % self.held)


@dataclasses.dataclass(frozen=True)
class _Set:
    """All clips of one shape of a folder."""

    latents: Tensor
    low_res: Tensor | None
    captions: list[str]

    def __len__(self) -> int:
        return len(self.latents)

    def row(self, number: int) -> tuple[Tensor, Tensor | None, str]:
        low = None if self.low_res is None else self.low_res[number].float()
        return self.latents[number].float(), low, self.captions[number]


def _read_set(folder: Path, index: dict[str, Any], shape: Shape, twins: bool) -> _Set | None:
    name = shape.model_dump(exclude={"weight"})
    files = [folder / row["file"] for row in index["shards"] if row["shape"] == name]
    if not files:
        return None
    parts = [_read_shard(path) for path in files]
    low = [tensors["low_res"] for tensors, _ in parts if "low_res" in tensors] if twins else []
    if twins and len(low) < len(parts):
        raise WaltError(
            f"{folder}: {len(parts) - len(low)} of {len(parts)} shards of shape {name} were encoded without the "
            "half-size videos that a super-resolution stage is told; encode this recipe into a folder of its own"
        )
    captions = [caption for _, captions in parts for caption in captions]
    return _Set(torch.cat([tensors["latents"] for tensors, _ in parts]), torch.cat(low) if low else None, captions)


def _theatre(job: DenoiserJob) -> DataJob:
    if not isinstance(job.data, DataJob):
        raise WaltError(f"data.kind: {job.data.kind} has latents of its own (walt.data.precompute)")
    return job.data


def _key(shape: dict[str, Any]) -> str:
    return "f{frames}-{height}x{width}-s{start}-c{cut}".format(**shape)


def _world(data: DataJob) -> dict[str, Any]:
    """The world as JSON gives it back: a changed size or subject makes other scenes of the same seed."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(world(data))))
    return values


def _write_index(path: Path, index: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # several ranks may write it at once
    temporary.write_text(json.dumps(index, indent=1))
    os.replace(temporary, path)


def _read_index_of(folder: Path, job: DenoiserJob) -> dict[str, Any]:
    """The index of a folder of latents; a WaltError for those of another tokenizer."""
    index = _read_index(folder / "index.json")
    if index["tokenizer"] != fingerprint(Path(job.tokenizer)):
        raise WaltError(f"{folder} holds latents of another tokenizer than {job.tokenizer}; encode them again")
    return index


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WaltError(f"{path} cannot be read ({error}); run `walt encode` into another folder") from None
    kinds = {"tokenizer": str, "data": dict, "world": dict, "shards": list}
    if not isinstance(index, dict) or not all(isinstance(index.get(key), kind) for key, kind in kinds.items()):
        raise WaltError(f"{path} does not say what latents are there; run `walt encode` into another folder")
    for row in index["shards"]:
        if not (isinstance(row, dict) and isinstance(row.get("file"), str) and isinstance(row.get("shape"), dict)):
            raise WaltError(
                f"{path}: shards holds {row!r}, no file with its shape; run `walt encode` into another folder"
            )
    return index


def _read_shard(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as handle:
            captions = json.loads(handle.metadata()["captions"])
        return load_file(path), captions
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WaltError(f"latent shard {path} is damaged ({error}); delete it and run `walt encode` again") from None
