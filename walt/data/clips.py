"""A user's media as training packs: every sample, window and caption is a pure function of (recipe, step, rank).

From the index alone, without decoding, a plan is made: an endless mixed stream of draws (which item, which window,
which shape), packed to the token budget. A rank then reads just its own packs. So a resumed run goes on with the very
next sample, any number of workers gives the same order, and ranks never share an item within an epoch.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from walt.data.account import Account
from walt.data.index import Broken, Index, Item, build_index
from walt.data.packing import Packer
from walt.data.scenes import to_video
from walt.data.sources import Where
from walt.errors import WaltError
from walt.media import MediaError, Pixels, read_window
from walt.training.job import MediaJob, Shape

BLOCK = 4096
"""Draws of the stream that are laid out together: each source has its exact share of every block."""

SNAPSHOT = 256
"""Rounds between two saved states of the plan: a resume replays at most as many."""

REPLACEMENTS = 4
"""Coming rounds of the same rank that are looked through for a stand-in for an item that turns out to be broken."""


class Draw(NamedTuple):
    """One sample, by numbers: source, item of its index, part of the video, shape of the recipe, variant."""

    source: int
    item: int
    part: int
    shape: int
    variant: int


@dataclass(frozen=True)
class Window:
    """Where a sample lies: first frame (at the recipe's rate), size (H, W) of the scaled frame, and what is cut out."""

    first: int
    frames: int
    size: tuple[int, int]
    cut: tuple[int, int, int, int] | None  # top, left, height, width

    @property
    def shown(self) -> tuple[int, int]:
        """Height and width of the sample."""
        return self.size if self.cut is None else self.cut[2:]


@dataclass(frozen=True)
class MediaClip:
    """`video` `(3, T, H, W)` float in [-1, 1], its half-size twin if asked for, and what it shows."""

    video: Tensor
    low_res: Tensor | None
    caption: str
    start: int


def fit_size(height: int, width: int, area: int, multiple: int, enlarge: bool = False) -> tuple[int, int]:
    """The size of whole multiples within `area` pixels that is nearest to `height` x `width` in shape.

    Without `enlarge` neither side grows, but each is at least one multiple.
    """
    scale = math.sqrt(area / (height * width))
    if not enlarge:
        scale = min(scale, 1.0)
    ratio = height / width
    rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
    if not enlarge:
        rows, columns = (max(1, min(n, side // multiple)) for n, side in ((rows, height), (columns, width)))
    while rows * columns * multiple**2 > area and max(rows, columns) > 1:
        fewer = [(r, c) for r, c in ((rows - 1, columns), (rows, columns - 1)) if r and c]
        rows, columns = min(fewer, key=lambda pair: abs(math.log(pair[0] / pair[1] / ratio)))
    return rows * multiple, columns * multiple


class _Table:
    """The usable items of one source and its clips: arrays, so that millions of them fit."""

    def __init__(self, index: Index, data: MediaJob, shapes: Sequence[Shape], captions: bool) -> None:
        self.index = index
        rows = index.items
        video = rows["video"]
        self.frames = np.where(video, np.ceil(rows["seconds"] * data.fps - 1e-4), 1).astype(np.int64)
        need = np.array([shape.frames + shape.start for shape in shapes])
        length = np.array([shape.frames for shape in shapes])
        still = length == 1
        fits = (self.frames[:, None] >= need) & np.where(video[:, None], ~still | data.video_stills, still)
        self.video_stills = data.video_stills
        short, long = np.minimum(rows["height"], rows["width"]), np.maximum(rows["height"], rows["width"])
        checks = (
            ("too small", short < data.min_size, f"the shorter side is below data.min_size={data.min_size}"),
            ("too large", long > data.max_size, f"the longer side is above data.max_size={data.max_size}"),
            ("no caption", (rows["captions"] == 0) & captions, "no caption beside it"),
            ("too short", ~fits.any(axis=1), "no shape of the recipe is that short"),
        )
        refused = np.zeros(len(rows), dtype=bool)
        self.refused: list[Broken] = []
        for reason, mask, detail in checks:
            for number in np.flatnonzero(mask & ~refused):
                seen = f"{rows['height'][number]}x{rows['width'][number]}, {self.frames[number]} frames"
                self.refused.append(Broken(index.item(int(number)).key, reason, f"{detail} ({seen})"))
            refused |= mask
        good = np.flatnonzero(~refused)
        longest = np.where(fits[good], length, 1).max(axis=1, initial=1)
        self.parts = np.ones(len(rows), dtype=np.int64)
        self.parts[good] = np.clip(self.frames[good] // longest, 1, data.max_clips)
        # One row per clip: the item, and which part of it.
        self.clip_items = np.repeat(good, self.parts[good])
        ends = np.cumsum(self.parts[good])
        self.clip_parts = np.arange(len(self.clip_items)) - np.repeat(ends - self.parts[good], self.parts[good])
        held = np.zeros(len(rows), dtype=bool)
        if data.heldout_share:
            held[good] = [_chance(index.item(int(item)).key) < data.heldout_share for item in good]
        self.trained = np.flatnonzero(~held[self.clip_items])
        self.held_out = np.flatnonzero(held)

    def allowed(self, item: int, shapes: Sequence[Shape]) -> tuple[int, ...]:
        """The shapes that an item can fill."""
        video, frames = bool(self.index.items["video"][item]), int(self.frames[item])
        most = max(shape.frames + shape.start for shape in shapes)
        return _allowed(video, min(frames, most), tuple(shapes), self.video_stills)


def _chance(key: str) -> float:
    """A number in [0, 1) that follows from the name alone: an item stays held out whatever is added beside it."""
    return zlib.crc32(f"held out {key}".encode()) / 2**32


@functools.lru_cache(maxsize=4096)
def _allowed(video: bool, frames: int, shapes: tuple[Shape, ...], video_stills: bool) -> tuple[int, ...]:
    return tuple(
        i
        for i, shape in enumerate(shapes)
        if frames >= shape.frames + shape.start and ((video_stills or shape.frames > 1) if video else shape.frames == 1)
    )


class Clips:
    """Samples of a media recipe: by number, and as packs.

    Args:
        data: sources and how they are read.
        shapes: of the recipe; `height` x `width` is an area (`data.aspect`), `weight` how often an item takes it.
        multiple: sides of a sample are multiples of it (tokenizer x patch).
        cost: of a sample (T, H, W), in the unit of `budget`.
        budget: of a pack.
        captions: whether an item without one is left out (unless the recipe says "optional").
        low_res: whether samples come with a half-size twin (mean over 2 x 2 pixels).
        report: the account's file; None: none.
        packs: of a step, over all ranks; None: one per rank (torchrun's WORLD_SIZE).
        workers: processes that probe new sources.

    Raises:
        WaltError: no source, nothing usable in one, a mostly broken one, a shape above the budget.
    """

    def __init__(
        self,
        data: MediaJob,
        shapes: Sequence[Shape],
        *,
        multiple: int,
        cost: Callable[[int, int, int], int],
        budget: int,
        captions: bool,
        low_res: bool = False,
        report: Path | None = None,
        packs: int | None = None,
        workers: int = 0,
    ) -> None:
        if not data.sources:
            raise WaltError("data.sources: at least one is needed, such as data.sources=[{path: videos}]")
        self.data, self.shapes, self.multiple, self.low_res = data, tuple(shapes), multiple, low_res
        self.cost, self.budget = cost, budget
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.packs = packs or self.world
        for shape in self.shapes:
            height, width = (shape.cut or shape.height), (shape.cut or shape.width)
            if cost(shape.frames, height, width) > budget:
                raise WaltError(f"shapes: {shape.frames} frames of {height}x{width} do not fit the budget of {budget}")
        captions = captions and data.captions == "required"
        self.account = Account(report, data.max_broken)
        self.tables: list[_Table] = []
        for source in data.sources:
            where = Where(source.path, source.kind, source.caption, source.media, source.split, source.caption_from)
            index = build_index(where, Path(data.index), workers, (self.rank, self.world), _Teller(source.path))
            table = _Table(index, data, self.shapes, captions)
            broken = [*index.broken, *table.refused]
            self.account.listed(source.path, len(index.items) + len(index.broken), broken, write=self.rank == 0)
            if not len(table.trained):
                raise WaltError(f'sources: nothing in "{source.path}" can be used: {"; ".join(self.account.lines())}')
            self.tables.append(table)
        self.quotas = _quotas([source.weight for source in data.sources])
        self.plan = Plan(self, None if report is None else report.parent / "plan")

    # -- the stream of draws

    def draw(self, position: int) -> Draw:
        """The draw at a position of the stream."""
        block, place = divmod(position, BLOCK)
        order, counts, chance = self._block(block)
        source = int(order[place])
        table = self.tables[source]
        epoch, row = divmod(block * self.quotas[source] + int(counts[place]), len(table.trained))
        clip = int(table.trained[self._permutation(source, epoch)[row]])
        item = int(table.clip_items[clip])
        allowed = table.allowed(item, self.shapes)
        steps = _cumulative(tuple(self.shapes[i].weight for i in allowed))
        shape = allowed[min(int(np.searchsorted(steps, chance[place], side="right")), len(allowed) - 1)]
        return Draw(source, item, int(table.clip_parts[clip]), shape, epoch % self.data.variants)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.data.seed, 1, block))
        order = rng.permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
        counts = np.zeros(BLOCK, dtype=np.int64)
        for source in range(len(self.quotas)):
            mask = order == source
            counts[mask] = np.arange(mask.sum())
        return order, counts, rng.random(BLOCK)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.data.seed, 2, source, epoch))
        return rng.permutation(len(self.tables[source].trained))

    def windows(self, source: int, item: int) -> Iterator[Draw]:
        """Every draw that any epoch can make of an item, in order."""
        table = self.tables[source]
        for part in range(int(table.parts[item])):
            for shape in table.allowed(item, self.shapes):
                for variant in range(self.data.variants):
                    yield Draw(source, item, part, shape, variant)

    def window(self, draw: Draw, item: Item) -> Window:
        """Where a draw lies in its item."""
        table, shape = self.tables[draw.source], self.shapes[draw.shape]
        row, frames = table.index.items[draw.item], int(table.frames[draw.item])
        size = self._size(int(row["height"]), int(row["width"]), draw.shape)
        named = f"{item.key} {shape.frames} {shape.height} {shape.width} {shape.start} {shape.cut}"
        rng = np.random.default_rng((self.data.seed, 3, zlib.crc32(named.encode()), draw.part, draw.variant))
        last, parts = frames - shape.frames, int(table.parts[draw.item])
        low = min(max(draw.part * frames // parts, shape.start), last)
        high = min(max((draw.part + 1) * frames // parts - 1, low), last)  # begins in its part, may reach into the next
        first = int(rng.integers(low, high + 1))
        cut = None
        if shape.cut:
            sides = [min(shape.cut, side) for side in size]
            top, left = (
                int(rng.integers((side - small) // 16 + 1)) * 16 for side, small in zip(size, sides, strict=True)
            )
            cut = (top, left, sides[0], sides[1])
        return Window(first, shape.frames, size, cut)

    def units(self, draw: Draw) -> int:
        """The cost of a draw, known without opening the item."""
        shape, row = self.shapes[draw.shape], self.tables[draw.source].index.items[draw.item]
        height, width = self._size(int(row["height"]), int(row["width"]), draw.shape)
        if shape.cut:
            height, width = min(shape.cut, height), min(shape.cut, width)
        return self.cost(shape.frames, height, width)

    @functools.lru_cache(maxsize=65536)  # noqa: B019
    def _size(self, height: int, width: int, shape: int) -> tuple[int, int]:
        wanted = self.shapes[shape]
        if self.data.aspect == "shape":
            return wanted.height, wanted.width
        return fit_size(height, width, wanted.height * wanted.width, self.multiple, self.data.enlarge)

    # -- reading

    def item(self, draw: Draw) -> Item:
        """The item of a draw."""
        return self.tables[draw.source].index.item(draw.item)

    def caption(self, draw: Draw, item: Item) -> str:
        """One of the item's captions; '' when it has none."""
        if not item.captions:
            return ""
        rng = np.random.default_rng((self.data.seed, 4, zlib.crc32(item.key.encode()), *draw[2:]))
        return item.captions[int(rng.integers(len(item.captions)))]

    def pixels(self, content: Path | bytes, item: Item, window: Window) -> Pixels:
        """The window's frames, uint8 `(T, H, W, 3)`; a MediaError when they cannot be read."""
        times = [(window.first + i) / self.data.fps for i in range(window.frames)]
        frames = read_window(content, item.suffix, times, window.size)
        if window.cut is not None:
            top, left, height, width = window.cut
            frames = frames[:, top : top + height, left : left + width]
        return frames

    def load(self, draw: Draw) -> MediaClip:
        """Reads one sample.

        Raises:
            MediaError: the item cannot be read after all.
        """
        item, index = self.item(draw), self.tables[draw.source].index
        window = self.window(draw, item)
        try:
            frames = self.pixels(index.open(item), item, window)
        except OSError as error:
            raise MediaError("unreadable", str(error)) from error
        return self.clip(draw, item, frames)

    def clip(self, draw: Draw, item: Item, frames: Pixels) -> MediaClip:
        """A sample of frames that were read."""
        video = to_video(np.ascontiguousarray(frames))
        low = F.avg_pool2d(video, 2) if self.low_res else None
        return MediaClip(video, low, self.caption(draw, item), self.shapes[draw.shape].start)

    def held_out(self, shape: int, number: int, load: Callable[[Draw], Any] | None = None) -> Any:
        """The `number`-th held-out sample of a shape, cycled; broken items are passed over.

        Raises:
            WaltError: the recipe holds out no item that can fill the shape.
        """
        found = self._held_out(shape)
        for place in range(len(found)):
            clip = self._try(found[(number + place) % len(found)], load or self.load)
            if clip is not None:
                return clip
        raise WaltError(f"data.heldout_share: no held-out item of shape {shape} can be read; see {self.account.path}")

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _held_out(self, shape: int) -> list[Draw]:
        found = [
            Draw(source, int(item), 0, shape, 0)
            for source, table in enumerate(self.tables)
            for item in table.held_out
            if shape in table.allowed(int(item), self.shapes)
        ]
        if not found:
            raise WaltError(
                f"data.heldout_share: no item that can fill shape {shape} is held out (run.heldout_every needs some), "
                f"got {self.data.heldout_share:g}"
            )
        return found

    def check_held_out(self) -> None:
        """A WaltError where a shape has no held-out item: better now than after hours."""
        for shape in range(len(self.shapes)):
            self._held_out(shape)

    def sample(self, position: int, shape: int) -> MediaClip:
        """A sample of one shape, at or after a position of the stream: for trainers that need no packs.

        Items that cannot fill the shape are passed over, broken ones accounted for.

        Raises:
            WaltError: nothing that fits was found, or a mostly broken source.
        """
        for attempt in range(BLOCK):
            # Far apart, so that the stand-in of one position is not the sample of the next.
            draw = self.draw(position + attempt * 7919)
            if shape in self.tables[draw.source].allowed(draw.item, self.shapes):
                clip: MediaClip | None = self._try(draw._replace(shape=shape), self.load)
                if clip is not None:
                    return clip
        wanted = self.shapes[shape]
        kind = f"a clip of {wanted.frames} frames" if wanted.frames > 1 else "a still"
        raise WaltError(f"sources: {kind} cannot be had from them; see {self.account.path}")

    def pack(self, step: int, rank: int, load: Callable[[Draw], Any] | None = None) -> list[Any]:
        """The samples of one step and lane; one that turns out to be broken is accounted for and replaced.

        The stand-in is the largest sample that fits from the same lane of coming steps, so ranks stay disjoint.

        Args:
            load: how a draw is read; None: `self.load`.

        Raises:
            WaltError: a mostly broken source, or a pack of nothing but broken items.
        """
        load = load or self.load
        loaded, room = [], self.budget
        planned = list(self.plan.pack(step, rank))
        for draw in planned:
            if (clip := self._try(draw, load)) is not None:
                loaded.append(clip)
                room -= self.units(draw)
        for later in range(step + 1, step + 1 + REPLACEMENTS) if len(loaded) < len(planned) else ():
            for draw in sorted(self.plan.pack(later, rank), key=lambda draw: (-self.units(draw), draw)):
                if self.units(draw) <= room and (clip := self._try(draw, load)) is not None:
                    loaded.append(clip)
                    room -= self.units(draw)
        if not loaded:
            raise WaltError(f"step {step}: no item of the pack can be read; see {self.account.path}")
        return loaded

    def _try(self, draw: Draw, load: Callable[[Draw], Any]) -> Any:
        source = self.data.sources[draw.source].path
        try:
            clip = load(draw)
        except MediaError as error:
            self.account.skip(source, Broken(self.item(draw).key, error.reason, str(error)))
            return None
        self.account.used(source)
        return clip

    def classes(self) -> dict[str, int]:
        """The classes of sources whose folders name them, in alphabetical order; {} where one names its items otherwise."""
        if any(source.caption_from != "folder" for source in self.data.sources):
            return {}
        names = sorted({name for table in self.tables for name in table.index.labels})
        return {name: label for label, name in enumerate(names)}

    def identity(self) -> str:
        """Changes with all that the order of samples depends on."""
        known = [(table, table.index.items) for table in self.tables]
        counts = [(len(table.trained), int(table.trained.sum()), len(rows)) for table, rows in known]
        sizes = [
            zlib.crc32(rows[name].tobytes()) for _, rows in known for name in ("video", "height", "width", "seconds")
        ]
        fields = self.data.model_dump(mode="json", exclude={"index", "latents", "max_broken"})
        rows = [shape.model_dump() for shape in self.shapes]
        text = json.dumps(
            [fields, rows, counts, sizes, self.budget, self.multiple, self.packs, self.low_res], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Plan:
    """Which draws make up which pack: the stream through the packer, round by round.

    Every SNAPSHOT rounds the state is written to `folder`, so that a resume starts there and not at the first sample.
    The files only save time: without them the same packs are planned again from the start.
    """

    def __init__(self, clips: Clips, folder: Path | None) -> None:
        self.clips, self.folder = clips, folder
        self.name = clips.identity() if folder is not None else ""
        self.first = self.next = self.position = 0
        self._begin(0)

    def pack(self, step: int, rank: int) -> list[Draw]:
        """The draws of one step and rank."""
        if step < self.first or step - self.next > SNAPSHOT:
            self._begin(step)
        while self.next <= step:
            self._round()
        for old in [number for number in self.rounds if number < step - REPLACEMENTS]:
            del self.rounds[old]
            self.first = old + 1
        return self.rounds[step][rank]

    def _begin(self, step: int) -> None:
        self.packer = Packer(self.clips.budget, ranks=self.clips.packs)
        self.position, self.next, self.first = 0, 0, 0
        self.rounds: dict[int, list[list[Draw]]] = {}
        self.ready: list[list[Draw]] = []
        for number in range(step // SNAPSHOT * SNAPSHOT, 0, -SNAPSHOT):
            path = self._path(number)
            if path is not None and path.exists():
                try:
                    state = json.loads(path.read_text())
                    self.packer.load_state_dict(state["packer"])
                    self.ready = [[Draw(*draw) for draw in pack] for pack in state["ready"]]
                except (OSError, ValueError, KeyError):
                    continue
                self.position, self.next, self.first = int(state["position"]), number, number
                return

    def _round(self) -> None:
        while len(self.ready) < self.clips.packs:
            draw = self.clips.draw(self.position)
            self.position += 1
            packs = self.packer.add((self.clips.units(draw), list(draw)))
            self.ready += [[Draw(*payload) for payload in pack.payloads] for pack in packs]
        self.rounds[self.next], self.ready = self.ready[: self.clips.packs], self.ready[self.clips.packs :]
        self.next += 1
        path = self._path(self.next) if self.next % SNAPSHOT == 0 else None
        if path is not None and not path.exists():
            state = {"packer": self.packer.state_dict(), "position": self.position, "ready": self.ready}
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            # It only saves time: a full disk must not end a run that can do without.
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    temporary.write_text(json.dumps(state))
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)

    def _path(self, step: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.name}-{step:08d}.json"


class _Teller:
    """Says every few seconds how far a long probing of a source has come, on stderr."""

    def __init__(self, source: str) -> None:
        self.source, self.last = source, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= 5:
            self.last = now
            print(f"looking through {self.source}: {done} of {total} units", file=sys.stderr, flush=True)


def _quotas(weights: Sequence[float]) -> list[int]:
    """How many of BLOCK draws each source has: largest remainders, at least one."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.maximum(1, np.floor(exact).astype(int))
    for source in np.argsort(counts - exact):
        if counts.sum() < BLOCK:
            counts[source] += 1
    counts[int(np.argmax(counts))] += BLOCK - int(counts.sum())
    return [int(count) for count in counts]


@functools.lru_cache(maxsize=4096)
def _cumulative(weights: tuple[float, ...]) -> np.ndarray:
    steps = np.cumsum(weights)
    return steps / steps[-1]


def stack_equal(clips: Sequence[MediaClip]) -> list[Tensor]:
    """Videos grouped by size, each group `(N, 3, T, H, W)`."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for clip in clips:
        groups.setdefault(tuple(clip.video.shape), []).append(clip.video)
    return [torch.stack(videos) for _, videos in sorted(groups.items())]
