"""Clips and stills as NUWA is trained on them: of the emoji theatre with sketches, or their tokens made once; of a
user's media.

A token folder holds `index.json` (which recipe and tokenizers made it) and one safetensors file per block of 32
scenes: `tokens` `(N, T, h, w)` int32, `sketch` likewise where there is a sketch tokenizer, captions in the metadata.
Letters: N scenes, T frames, H W pixels, h w tokens; S codes per token where a tokenizer's codes are factorised.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from walt.data.clips import Clips
from walt.data.latents import fingerprint, save_file
from walt.data.scenes import SCENE_FRAMES, Scenes, to_video, world
from walt.data.sketches import classes, sample_frames
from walt.errors import WaltError
from walt.training.job import DataJob, MediaJob, NuwaJob, Shape

BLOCK = 32
Kind = Literal["still", "clip"]


@dataclass(frozen=True)
class Pictures:
    """One clip or still: `video` `(T, 3, H, W)` in [-1, 1], `sketch` long `(T, H, W)`, and what it shows."""

    video: Tensor
    sketch: Tensor | None  # None: a user's media have none
    caption: str
    backwards: str = ""  # a caption of it played backwards, where there is one


@dataclass(frozen=True)
class Tokens:
    """The same, encoded: long `(T, h, w[, S])`; `sketch` None without a sketch tokenizer."""

    video: Tensor
    sketch: Tensor | None
    caption: str
    backwards: str = ""


class NuwaScenes:
    """Clips and stills by number: a pure function of the recipe and the number. Stills are scenes of their own."""

    def __init__(self, job: NuwaJob) -> None:
        assert isinstance(job.data, DataJob)
        self.data, self.job, self.theatre = job.data, job, Scenes(job.data).theatre
        self.classes = classes(self.theatre.subjects)
        clip = job.clip
        last = clip.start + (clip.frames - 1) * clip.frame_step
        if last >= SCENE_FRAMES:
            raise WaltError(
                f"clip: {clip.frames} frames, {clip.frame_step} apart from {clip.start} on, end at frame {last}, but a "
                f"scene has {SCENE_FRAMES}"
            )

    def get(self, kind: Kind, number: int) -> Pictures:
        """The `number`-th still or clip."""
        clip, frames = self.job.clip, 1 if kind == "still" else SCENE_FRAMES
        scene = self.theatre.scene(self.data.seed * 1_000_003 + number, frames)
        chosen = (0, 1, 1) if kind == "still" else (clip.start, clip.frames, clip.frame_step)
        pixels, sketch = sample_frames(self.theatre, scene, clip.height, clip.width, *chosen)
        video, drawn = to_video(pixels).transpose(0, 1), torch.from_numpy(sketch.astype("int64"))
        return Pictures(video, drawn, scene.caption, self.theatre.backwards(scene))


class NuwaMedia:
    """Clips and stills of a user's media by number: the stream of `walt.data.clips`, of which every epoch is an order
    of its own.

    Raises:
        WaltError: no source, or none that can fill the kinds wanted.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, job: NuwaJob, kinds: tuple[Kind, ...], multiple: int) -> None:
        assert isinstance(job.data, MediaJob)
        clip = job.clip
        self.places: dict[Kind, int] = {kind: place for place, kind in enumerate(kinds)}
        shapes = [
            Shape(frames=clip.frames if kind == "clip" else 1, height=clip.height, width=clip.width) for kind in kinds
        ]
        self.clips = Clips(
            # All samples of a kind are one batch, so they have one size.
            job.data.model_copy(update={"aspect": "shape"}),
            shapes,
            multiple=multiple,
            cost=lambda *_: 1,
            budget=1,
            captions=True,
            report=Path(job.run.output) / "skipped.jsonl",
            packs=job.run.packs,
            workers=job.run.workers,
        )
        for kind, place in self.places.items():
            tables = self.clips.tables
            if not any(place in t.allowed(int(item), shapes) for t in tables for item in t.clip_items[t.trained]):
                need = f"videos of {clip.frames} frames at {job.data.fps:g} a second" if kind == "clip" else "images"
                raise WaltError(f"data.sources: a task needs {need}, and there are none")

    def get(self, kind: Kind, number: int) -> Pictures:
        """The `number`-th still or clip."""
        found = self.clips.sample(number, self.places[kind])
        return Pictures(found.video.transpose(0, 1), None, found.caption)


Encode = Callable[[Tensor], Tensor]


def encode(pictures: Pictures, encode_video: Encode, encode_sketch: Encode | None) -> Tokens:
    """The tokens of one clip or still; the encoders map frames `(T, 3, H, W)` and maps `(T, H, W)` to `(T, h, w)`."""
    with torch.no_grad():
        drawn = pictures.sketch
        sketch = None if encode_sketch is None or drawn is None else encode_sketch(drawn).cpu()
        return Tokens(encode_video(pictures.video).cpu(), sketch, pictures.caption, pictures.backwards)


class TokenFolder:
    """All clips and stills of a recipe as tokens, in a folder; what it lacks is made by `fill`, block by block."""

    def __init__(self, job: NuwaJob, kinds: tuple[Kind, ...]) -> None:
        if job.tokens is None:
            raise WaltError("tokens: the recipe names no token folder")
        if not isinstance(job.data, DataJob):
            raise WaltError("tokens: a token folder keeps the theatre's scenes; a user's media are encoded on the fly")
        self.data = job.data
        self.job, self.kinds, self.folder = job, kinds, Path(job.tokens)
        self.rows: dict[Kind, list[Tokens]] = {}
        known = {
            "tokenizer": fingerprint(Path(job.tokenizer)),
            "sketch_tokenizer": job.sketch_tokenizer and fingerprint(Path(job.sketch_tokenizer)),
            "data": job.data.model_dump(mode="json", exclude={"latents", "source", "scenes", "clip_subjects", "draw"}),
            "world": json.loads(json.dumps(asdict(world(job.data)))),
            "clip": job.clip.model_dump(mode="json"),
        }
        index = self.folder / "index.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not index.exists():
                temporary = index.with_suffix(f".{os.getpid()}.tmp")  # several ranks may write it at once
                temporary.write_text(json.dumps(known, indent=1))
                os.replace(temporary, index)
            old = json.loads(index.read_text())
            if not isinstance(old, dict) or not isinstance(old.get("data"), dict):
                raise ValueError("index.json does not say what it holds")
            old["data"].pop("draw", None)  # some folders have it, though it makes no other tokens
        except (OSError, ValueError) as error:
            raise WaltError(f"tokens: the folder {self.folder} cannot be used ({error})") from error
        if old != known:
            changed = ", ".join(name for name in known if old.get(name) != known[name])
            raise WaltError(f"tokens: {self.folder} holds tokens of another {changed}; choose another folder")

    def fill(
        self,
        encode_video: Encode,
        encode_sketch: Encode | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Reads every block, making those that are not there; `progress` is called with (done, total) scenes."""
        scenes, count = NuwaScenes(self.job), self.data.scenes
        done, total = 0, count * len(self.kinds)
        for kind in self.kinds:
            rows = self.rows[kind] = []
            for start in range(0, count, BLOCK):
                # whole blocks, so that a larger `scenes` goes on with the same files
                path = self.folder / f"{kind}-{start:07d}.safetensors"
                if not path.exists():
                    block = [encode(scenes.get(kind, start + i), encode_video, encode_sketch) for i in range(BLOCK)]
                    _write(path, block)
                rows += _read(path)
                done = min(done + BLOCK, total)
                if progress is not None:
                    progress(done, total)

    def get(self, kind: Kind, number: int) -> Tokens:
        """The `number`-th still or clip, after `fill`."""
        return self.rows[kind][number]


def _write(path: Path, block: list[Tokens]) -> None:
    tensors = {"tokens": torch.stack([row.video for row in block]).to(torch.int32)}
    sketches = [row.sketch for row in block if row.sketch is not None]
    if sketches:
        tensors["sketch"] = torch.stack(sketches).to(torch.int32)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {"captions": json.dumps([row.caption for row in block])})
        os.replace(temporary, path)
    except OSError as error:
        raise WaltError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> list[Tokens]:
    try:
        with safe_open(path, "pt") as handle:
            captions = json.loads(handle.metadata()["captions"])
        tensors: dict[str, Any] = load_file(path)
        sketches = tensors["sketch"].long() if "sketch" in tensors else [None] * len(captions)
        return [Tokens(*row) for row in zip(tensors["tokens"].long(), sketches, captions, strict=True)]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WaltError(f"the tokens {path} are damaged ({error}): delete the file and run again") from None
