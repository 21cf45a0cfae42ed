"""A user's media: every kind of source and caption, exact frames, pure packs, and a great deal of dirt."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.data import media
from tests.training.jobs import denoiser_job, save_tokenizer, tokenizer_job
from walt.commands import build_objective
from walt.data import clips as clips_module
from walt.data.account import Account
from walt.data.clips import Clips, Draw, fit_size
from walt.data.index import Broken, build_index, decode_all
from walt.data.sources import Where, _guess, expand_braces, open_source, pick_captions, sniff, split_key
from walt.errors import WaltError
from walt.media import MediaError, probe, read_window
from walt.training.job import MediaJob, Shape, SourceJob, load_job
from walt.training.loop import train

SHAPES = (
    Shape(frames=9, height=32, width=64),
    Shape(frames=5, height=32, width=64),
    Shape(frames=1, height=48, width=64),
)


def open_clips(tmp_path: Path, *sources: SourceJob, shapes: tuple[Shape, ...] = SHAPES, **fields: Any) -> Clips:
    ways: dict[str, Any] = {
        name: fields.pop(name) for name in ("captions", "low_res", "packs", "budget", "report") if name in fields
    }
    data = MediaJob(sources=sources, index=str(tmp_path / "index"), **{"min_size": 16, **fields})
    settings: dict[str, Any] = {"captions": True, "budget": 120, "report": tmp_path / "run" / "skipped.jsonl"}
    settings.update(ways)
    return Clips(
        data,
        shapes,
        multiple=8,
        cost=lambda frames, height, width: (1 + (frames - 1) // 4) * (height // 8) * (width // 8),
        **settings,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 12 good items each."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(4):
        media.write_shard(folder / f"part-{i:03d}.tar", media.good_members(12, first=12 * i))
    return folder


# -- frames


@pytest.mark.parametrize(
    ("suffix", "kind", "codec", "rate"),
    [
        (".mp4", "mp4", "libx264", 24),
        (".mp4", "mp4", "libx264", Fraction(30000, 1001)),
        (".mp4", "mp4", "mpeg4", 25),
        (".webm", "webm", "libvpx-vp9", 30),
        (".mkv", "matroska", "libx264", 24),  # 23.976 would be ambiguous: its times are rounded
        (".gif", "gif", "", 10),
        (".webp", "webp", "", 20),
    ],
)
def test_resampling_takes_exactly_the_frame_that_is_shown(
    suffix: str, kind: str, codec: str, rate: float | Fraction
) -> None:
    content = media.video_bytes(media.numbered(60), rate, kind, codec)
    found = probe(content, suffix)
    assert (found.kind, found.height, found.width, found.frames) == ("video", 32, 64, 60)
    assert found.seconds == pytest.approx(60 / float(rate), abs=0.02)
    for fps in (8, 12.5, float(rate), 60):
        count = int(np.ceil(60 / float(rate) * fps - 1e-4))
        times = [i / fps for i in range(count)]
        shown = [math.floor(i * Fraction(rate) / Fraction(fps)) for i in range(count)]
        assert media.numbers(read_window(content, suffix, times, (32, 64))) == shown
        # A window in the middle starts at a key frame before it: the same frames, at another size too.
        middle = slice(count // 2, count // 2 + 5)
        assert media.numbers(read_window(content, suffix, times[middle], (16, 32))) == shown[middle]


def test_a_video_that_lies_on_its_side_is_turned_upright() -> None:
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, :32, 0] = 255  # stored: red on the left
    data = bytearray(media.video_bytes(frames))
    place = data.index(b"tkhd") + 4 + 40
    # What a phone held upright writes: shown turned clockwise by a quarter, so the left side comes on top.
    data[place : place + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    found = probe(bytes(data), ".mp4")
    assert (found.height, found.width) == (64, 32)
    shown = read_window(bytes(data), ".mp4", [0.0], (64, 32))[0]
    assert shown[4:28, 8:24, 0].min() > 200 and shown[36:60, 8:24, 0].max() < 50


def test_scaling_keeps_the_shape_and_cuts_the_centre() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48] = 255  # a band in the middle half
    content = media.image_bytes(pixels)
    assert read_window(content, ".png", [0.0], (16, 32))[0].min() > 230
    whole = read_window(content, ".png", [0.0], (32, 32))[0]
    assert whole[:6].max() < 5 and whole[10:22].min() > 250 and whole[26:].max() < 5


def test_transparent_pixels_stand_on_white_and_exif_turns() -> None:
    from PIL import Image

    picture = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    out = media.io.BytesIO()
    picture.save(out, "png")
    assert read_window(out.getvalue(), ".png", [0.0], (16, 32)).min() == 255
    turned = media.io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "blue").save(turned, "jpeg", exif=exif)
    assert (probe(turned.getvalue(), ".jpg").height, probe(turned.getvalue(), ".jpg").width) == (32, 16)
    assert read_window(turned.getvalue(), ".jpg", [0.0], (32, 16)).shape == (1, 32, 16, 3)


@pytest.mark.parametrize("size", [(480, 854), (854, 480), (64, 64), (37, 1000), (33, 40), (2160, 3840)])
@pytest.mark.parametrize("enlarge", [False, True])
def test_native_sizes_are_whole_multiples_within_the_area(size: tuple[int, int], enlarge: bool) -> None:
    height, width = fit_size(*size, 128 * 224, 16, enlarge)
    assert height % 16 == 0 and width % 16 == 0 and height * width <= 128 * 224
    if not enlarge:
        assert height <= size[0] and width <= size[1]
    if min(size) >= 256:  # enough to choose from: nearly the whole area, nearly the shape
        assert height * width > 0.85 * 128 * 224
        assert 0.85 < height / width * size[1] / size[0] < 1.18


# -- captions and sources


def test_captions_of_a_folder(tmp_path: Path) -> None:
    still = media.image_bytes(media.noise(0))
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "e.png", "f.PNG", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(still)
    (tmp_path / "a.txt").write_text("a red  cat\n\nthe same cat\n")
    (tmp_path / "b.json").write_text(json.dumps({"caption": ["one", "two"], "other": 3}))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "from a table"}\n')
    (tmp_path / "sub" / "metadata.csv").write_text('file_name,text\nd.png,"a, b"\n')
    (tmp_path / "e.json").write_text("{broken")
    source = open_source(Where(str(tmp_path)))
    found = {entry.key: entry.captions for unit in source.units() for entry in source.entries(unit)}
    assert found == {
        "a.png": ("a red cat", "the same cat"),
        "b.png": ("one", "two"),
        "c.png": ("from a table",),
        "sub/d.png": ("a, b",),
        "e.png": (),
        "f.PNG": (),
    }
    named = open_source(Where(str(tmp_path), caption="text"))
    assert {e.key: e.captions for u in named.units() for e in named.entries(u)}["b.png"] == ()
    (tmp_path / "metadata.jsonl").write_text('{"name": "c.png"}\n')
    with pytest.raises(WaltError, match="no field file_name, only name"):
        list(open_source(Where(str(tmp_path))).entries(source.units()[0]))


def test_small_rules() -> None:
    assert expand_braces("x-{008..010}-{1..2}.tar")[:3] == ["x-008-1.tar", "x-008-2.tar", "x-009-1.tar"]
    assert split_key("a/b.c/clip.left.MP4") == ("a/b.c/clip", ".mp4")
    assert pick_captions({"text": "b", "caption": "  a  c "}, None) == ("a c",)
    assert pick_captions({"x": ["p", 3, " "]}, "x") == ("p",) and pick_captions([1], None) == ()
    assert sniff(media.image_bytes(media.noise(0), "jpeg")[:16]) == ".jpg" and sniff(b"text") == ""


def test_names_on_the_hub_are_datasets() -> None:
    assert _guess("hf:owner/name") == "datasets"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (Where("{tmp}/none"), "there is no folder"),
        (Where("{tmp}/x-*.tar"), "there is no shard"),
        (Where("{tmp}"), "holds no media"),
    ],
)
def test_missing_sources(tmp_path: Path, where: Where, words: str) -> None:
    with pytest.raises(WaltError, match=words):
        open_source(Where(where.path.format(tmp=tmp_path)))
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(WaltError, match="decompress"):
        open_source(Where(f"{tmp_path}/x.tar.gz"))


def test_shards_are_read_where_they_lie_and_the_index_is_kept(shards: Path, tmp_path: Path) -> None:
    index = build_index(Where(f"{shards}/part-{{000..003}}.tar"), tmp_path)
    assert len(index.items) == 48 and not index.broken and sum(index.items["video"]) == 24
    item = index.item(14)
    assert item.key == "part-001.tar/0014.mp4" and item.captions == ("clip 14",)
    assert media.numbers(read_window(index.open(item), item.suffix, [0.0, 1.0], (32, 64))) == [14, 22]
    assert list(decode_all(index)) == [None] * 48
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = build_index(Where(f"{shards}/part-{{000..003}}.tar"), tmp_path, workers=2)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert again.items.tolist() == index.items.tolist()


def test_two_readings_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_bytes(media.image_bytes(media.noise(0)))
        (folder / f"{name}.json").write_text(json.dumps({"short": name, "long": f"a long caption of {name}"}))
    sources = [SourceJob(path=str(folder), caption=field) for field in ("short", "long")]
    clips = open_clips(tmp_path, *sources, shapes=SHAPES[2:], budget=48)
    captions = [[table.index.item(i).captions for i in range(3)] for table in clips.tables]
    assert sorted(captions[0]) == [("a",), ("b",), ("c",)]
    assert all(text.startswith("a long caption of") for (text,) in captions[1])
    # What another run finds after a change is not put under the feet of the one that is training.
    (folder / "a.json").write_text(json.dumps({"short": "something that is much longer than before"}))
    again = build_index(Where(str(folder), caption="short"), tmp_path / "index")
    assert [clips.tables[0].index.item(i).captions for i in range(3)] == captions[0]
    assert ("something that is much longer than before",) in [again.item(i).captions for i in range(3)]


def test_names_and_captions_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for number, name in enumerate((b"caf\xe9.png", b"line\xe2\x80\xa8feed.png", b"good.png", b"\xff.png")):
        path = folder / os.fsdecode(name)
        path.write_bytes(media.image_bytes(media.noise(number)) if number < 3 else b"no picture")
        path.with_suffix(".json").write_text('{"caption": "half an emoji \\ud83d"}')
    clips = open_clips(tmp_path, SourceJob(path=str(folder)), shapes=SHAPES[2:], budget=48, heldout_share=0.01)
    assert len(clips.tables[0].trained) == 3
    assert {clip.caption for step in range(3) for clip in clips.pack(step, 0)} == {"half an emoji ?"}
    names = {clips.tables[0].index.item(i).key for i in range(3)}
    assert names == {"caf\\xe9.png", "line\u2028feed.png", "good.png"}
    assert account(tmp_path / "run" / "skipped.jsonl") == {"\\xff.png": "unreadable"}
    clips.account.skip(str(folder), Broken("line\u2028feed.png", "damaged", "x"))
    with (tmp_path / "run" / "skipped.jsonl").open("ab") as file:
        file.write("{caf\u00e9".encode()[:-1])  # a full disk cut the line
    again = open_clips(tmp_path, SourceJob(path=str(folder)), shapes=SHAPES[2:], budget=48)
    assert again.account.summary()[str(folder)]["reasons"] == {"damaged": 1, "unreadable": 1}


def test_a_row_without_a_name_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(media.image_bytes(media.noise(0)))
    for second, words in (('{"text": "x"}', "only text"), ("[1]", r"only \[1\]")):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + second + "\n")
        source = open_source(Where(str(tmp_path)))
        with pytest.raises(WaltError, match=f"row 2 of .*no field file_name, {words}"):
            list(source.entries(source.units()[0]))


def test_processes_make_the_same_index(shards: Path, tmp_path: Path) -> None:
    one, two = (build_index(Where(str(shards)), tmp_path / str(n), workers=n) for n in (0, 2))
    assert one.items["height"].tolist() == two.items["height"].tolist()
    assert [one.item(i) for i in range(48)] == [two.item(i) for i in range(48)]


def test_a_shard_that_was_cut_off_keeps_what_is_whole(shards: Path, tmp_path: Path) -> None:
    content = (shards / "part-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    index = build_index(Where(f"{tmp_path}/cut.tar"), tmp_path / "index")
    whole = build_index(Where(f"{shards}/part-000.tar"), tmp_path / "index")
    assert 0 < len(index.items) < 12
    assert [index.item(i).key.split("/")[1] for i in range(len(index.items))] == [
        whole.item(i).key.split("/")[1] for i in range(len(index.items))
    ]
    (broken,) = index.broken
    assert broken.reason == "cut off" and "shard" in broken.detail
    # A shard that ends between two members, without the end mark, is told too; so is one that is none.
    (tmp_path / "ends.tar").write_bytes(content[: content.rindex(b"0011.txt") // 512 * 512])
    assert [b.reason for b in build_index(Where(f"{tmp_path}/ends.tar"), tmp_path / "index").broken] == ["cut off"]
    for name, content, reason in (("none.tar", b"", "empty"), ("text.tar", b"no tar" * 500, "unreadable")):
        (tmp_path / name).write_bytes(content)
        assert [b.reason for b in build_index(Where(f"{tmp_path}/{name}"), tmp_path / "index").broken] == [reason]


def test_hugging_face_dataset(tmp_path: Path) -> None:
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"bytes": media.image_bytes(media.noise(i)), "path": None} for i in range(5)]
    rows[3] = {"bytes": b"no picture", "path": None}
    table = datasets.Dataset.from_dict({"picture": rows, "text": [f"image {i}" for i in range(5)]}, features=features)
    table.save_to_disk(tmp_path / "set")
    index = build_index(Where(str(tmp_path / "set")), tmp_path / "index")
    assert [index.item(i).captions for i in range(4)] == [(f"image {i}",) for i in (0, 1, 2, 4)]
    assert [(b.key, b.reason) for b in index.broken] == [("row 3", "unreadable")]
    assert np.array_equal(read_window(index.open(index.item(3)), ".png", [0.0], (48, 64))[0], media.noise(4))
    with pytest.raises(WaltError, match='did you mean "picture"'):
        open_source(Where(str(tmp_path / "set"), media="pictur"))


# -- packs


def test_an_epoch_shows_every_clip_once_and_mixtures_keep_their_weights(shards: Path, tmp_path: Path) -> None:
    long = tmp_path / "long"
    long.mkdir()
    (long / "film.mp4").write_bytes(media.video_bytes(media.numbered(100)))
    (long / "film.txt").write_text("a film")
    both = (SourceJob(path=str(shards), weight=3), SourceJob(path=str(long)))
    clips = open_clips(tmp_path, *both, report=None)
    draws = [clips.draw(i) for i in range(4096)]
    assert Counter(draw.source for draw in draws) == {0: 3072, 1: 1024}
    first = [draw for draw in draws if draw.source == 0]
    length = len(clips.tables[0].clip_items)
    assert length == 24 + 2 * 24  # of 20 frames two clips of 9 each
    for epoch in range(3):
        seen = Counter((draw.item, draw.part) for draw in first[epoch * length : (epoch + 1) * length])
        assert len(seen) == length and set(seen.values()) == {1}
    assert [d[:3] for d in first[:length]] != [d[:3] for d in first[length : 2 * length]]
    # Of a long video every part comes once an epoch, and its windows lie inside it.
    parts = [draw for draw in draws if draw.source == 1]
    assert sorted(draw.part for draw in parts[:11]) == list(range(11))
    for draw in parts[:60]:
        item = clips.item(draw)
        window = clips.window(draw, item)
        assert draw.part * 100 // 11 <= window.first <= 100 - window.frames
        shown = media.numbers(clips.pixels(clips.tables[1].index.open(item), item, window))
        assert shown == list(range(window.first, window.first + window.frames))


def signature(pack: list[Any]) -> list[tuple[Any, ...]]:
    return [(clip.caption, tuple(clip.video.shape), float(clip.video.sum()), clip.start) for clip in pack]


def test_resume_gives_the_very_next_sample_with_any_number_of_workers(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips_module, "SNAPSHOT", 4)
    source = SourceJob(path=str(shards))
    straight = open_clips(tmp_path, source, report=None)
    packs = [signature(straight.pack(step, 0)) for step in range(16)]
    assert len({str(pack) for pack in packs}) == 16
    interrupted = open_clips(tmp_path, source)
    assert [signature(interrupted.pack(step, 0)) for step in range(10)] == packs[:10]
    assert len(list((tmp_path / "run" / "plan").glob("*.json"))) >= 2

    resumed = open_clips(tmp_path, source)
    drawn: list[int] = []
    draw = resumed.draw

    def watched(position: int) -> Draw:
        drawn.append(position)
        return draw(position)

    monkeypatch.setattr(resumed, "draw", watched)
    assert [signature(resumed.pack(step, 0)) for step in range(10, 16)] == packs[10:]
    assert min(drawn) > 0, "the plan started from its saved state"

    class Steps:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, step: int) -> Any:
            return signature(straight.pack(10 + step, 0))

    loader: Any = DataLoader(Steps(), batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert [[tuple(map(_tuple, row)) for row in pack] for pack in loader] == [
        [tuple(map(_tuple, row)) for row in pack] for pack in packs[10:]
    ]
    other = open_clips(tmp_path, source, seed=1)
    assert signature(other.pack(0, 0)) != packs[0]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_a_full_disk_ends_neither_plan_nor_account(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clips_module, "SNAPSHOT", 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan").write_text("in the way")
    clips = open_clips(tmp_path, SourceJob(path=str(shards)))
    free = open_clips(tmp_path, SourceJob(path=str(shards)), report=None)
    assert [clips.plan.pack(step, 0) for step in range(6)] == [free.plan.pack(step, 0) for step in range(6)]
    (tmp_path / "run" / "skipped.jsonl").mkdir()
    clips.account.skip(str(shards), Broken("a.mp4", "empty", ""))
    assert "left out a.mp4: empty" in capsys.readouterr().err


def test_ranks_share_no_item_and_packs_are_full_and_native(shards: Path, tmp_path: Path) -> None:
    clips = open_clips(tmp_path, SourceJob(path=str(shards)), packs=2, budget=150)
    shown: list[set[tuple[int, int]]] = [set(), set()]
    used = []
    for step in range(3):
        for rank in range(2):
            draws = clips.plan.pack(step, rank)
            shown[rank] |= {(draw.item, draw.part) for draw in draws}
            used.append(sum(clips.units(draw) for draw in draws))
            pixels = [clip.video.shape for clip in clips.pack(step, rank)]
            assert sum((1 + (t - 1) // 4) * h * w // 64 for _, t, h, w in pixels) == used[-1]
            assert {shape[2:] for shape in pixels} <= {(32, 64), (48, 64)}
    assert not shown[0] & shown[1] and len(shown[0] | shown[1]) > 15
    assert min(used) > 0.85 * 150 and max(used) <= 150


def test_windows_cuts_captions_and_twins(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "clip.mp4").write_bytes(media.video_bytes(media.numbered(40, 64, 128)))
    (folder / "clip.txt").write_text("first\nsecond\nthird\n")
    shapes = (Shape(frames=9, height=64, width=128, start=12), Shape(frames=9, height=64, width=128, cut=32))
    clips = open_clips(tmp_path, SourceJob(path=str(folder)), shapes=shapes, variants=40, low_res=True, budget=400)
    draws = [clips.draw(i) for i in range(300)]
    item = clips.item(draws[0])
    windows = {draw: clips.window(draw, item) for draw in draws}
    later = [window.first for draw, window in windows.items() if draw.shape == 0]
    assert min(later) >= 12 and max(later) <= 31 and len(set(later)) > 8
    cuts = {window.cut for draw, window in windows.items() if draw.shape == 1}
    assert all(cut is not None and cut[0] % 16 == cut[1] % 16 == 0 and cut[2:] == (32, 32) for cut in cuts)
    assert len(cuts) > 8
    assert {clips.caption(draw, item) for draw in draws} == {"first", "second", "third"}
    clip = clips.load(next(draw for draw in draws if draw.shape == 0))
    assert clip.start == 12 and clip.video.shape == (3, 9, 64, 128) and clip.low_res is not None
    mean = clip.video.reshape(3, 9, 32, 2, 64, 2).mean((3, 5))
    assert torch.allclose(clip.low_res, mean, atol=1e-6)


def test_what_does_not_fit_is_said(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(WaltError, match="do not fit the budget of 10"):
        open_clips(tmp_path, SourceJob(path=str(shards)), budget=10)
    with pytest.raises(WaltError, match=r"data\.sources: at least one"):
        open_clips(tmp_path)
    with pytest.raises(WaltError, match="24 too short"):
        long = (Shape(frames=17, height=32, width=64),)
        open_clips(tmp_path, SourceJob(path=str(shards)), shapes=long, max_broken=0.4, budget=200)
    clips = open_clips(tmp_path, SourceJob(path=str(shards)), heldout_share=0.3, report=None)
    held = {(0, int(item)) for item in clips.tables[0].held_out}
    assert 5 < len(held) < 25
    assert not held & {draw[:2] for draw in map(clips.draw, range(4096))}
    assert clips.held_out(2, 0).video.shape[1] == 1
    with pytest.raises(WaltError, match="heldout_share"):
        open_clips(tmp_path, SourceJob(path=str(shards)), report=None).held_out(0, 0)


# -- dirt


def dirty_shards(folder: Path) -> dict[str, str]:
    """64 items in three shards, a fifth of them broken in eleven kinds, and a fourth shard that was cut off.

    Returns what the account must say: item -> reason.
    """
    expected: dict[str, str] = {}
    members: list[list[tuple[str, bytes]]] = [media.good_members(17, first=17 * shard) for shard in range(3)]
    for number, (kind, reason) in enumerate(media.KINDS.items()):
        suffix, content = media.broken(kind)
        key, shard = f"bad-{number:02d}", number % 3
        rows = [(f"{key}{suffix}", content)]
        if kind != "no caption":
            rows.append((f"{key}.txt", b"a caption"))
        place = 2 * (5 * number % 15)
        members[shard][place:place] = rows
        expected[f"part-{shard}.tar/{key}{suffix}"] = reason
    for shard, rows in enumerate(members):
        media.write_shard(folder / f"part-{shard}.tar", rows)
    whole = media.write_shard(folder / "x.tar", media.good_members(5, first=60)).read_bytes()
    (folder / "x.tar").unlink()
    # In the middle of the third item: it is lost, and with it the rest.
    end = whole.index(b"0062.mp4") + 700
    (folder / "part-3.tar").write_bytes(whole[:end])
    expected["part-3.tar/0062.mp4"] = "cut off"
    return expected


def account(path: Path) -> dict[str, str]:
    return {row["item"]: row["reason"] for row in map(json.loads, path.read_text().splitlines())}


def test_training_goes_on_over_dirt_and_the_account_is_exact(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    expected = dirty_shards(tmp_path / "shards")
    total = 3 * 17 + len(media.KINDS) + 3
    assert 0.17 < len(expected) / total < 0.23 and len(set(media.KINDS)) >= 8
    vae = save_tokenizer(tmp_path / "vae")
    source = SourceJob(path=str(tmp_path / "shards"), kind="shards")
    job = denoiser_job(vae, tmp_path / "run", steps=12).model_copy(
        update={
            "data": MediaJob(
                sources=(source,),
                index=str(tmp_path / "index"),
                min_size=16,
            ),
            "shapes": SHAPES,
            "batch_tokens": 120,
        }
    )
    objective = build_objective(job)
    # A model without text does not ask for captions; this one is told to.
    objective.clips = open_clips(tmp_path, source, video_stills=False)
    assert train(job, objective).exists()
    draws = {draw[:2] for step in range(12) for draw in objective.clips.plan.pack(step, 0)}
    assert len(draws) > 15
    found = account(tmp_path / "run" / "skipped.jsonl")
    late = {name for name, reason in expected.items() if name not in found}
    assert late <= {name for name in expected if name.endswith("bad-06.mp4")}, "only damage inside is found by decoding"
    for clip in objective.clips.tables[0].clip_items:  # one epoch meets all of them
        for draw in objective.clips.windows(0, int(clip)):
            objective.clips._try(draw, objective.clips.load)
    assert account(tmp_path / "run" / "skipped.jsonl") == expected
    (row,) = objective.clips.account.summary().values()
    assert row["items"] == total and row["skipped"] == len(expected)
    assert row["reasons"] == dict(sorted(Counter(expected.values()).items()))
    assert f"{len(expected)} skipped" in objective.clips.account.lines()[0]
    # The same again, from what is known: nothing is counted twice.
    again = open_clips(tmp_path, source, video_stills=False)
    assert again.account.summary() == objective.clips.account.summary()
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == len(expected)


def test_a_broken_item_is_replaced_from_the_same_lane(shards: Path, tmp_path: Path) -> None:
    clips = open_clips(tmp_path, SourceJob(path=str(shards)), packs=2)
    step = next(step for step in range(9) if len(clips.plan.pack(step, 1)) > 1)
    planned = clips.plan.pack(step, 1)
    bad = max(planned, key=clips.units)
    load = clips.load

    def fails(draw: Draw) -> Any:
        if draw[:2] == bad[:2]:
            raise MediaError("damaged", "for the test")
        return draw

    pack = clips.pack(step, 1, fails)
    assert pack == clips.pack(step, 1, fails)
    kept = [draw for draw in planned if draw != bad]
    assert pack[: len(kept)] == kept
    coming = [draw for later in range(step + 1, step + 5) for draw in clips.plan.pack(later, 1)]
    assert pack[len(kept) :] and set(pack[len(kept) :]) <= set(coming)
    assert sum(map(clips.units, pack)) <= 120
    assert load(pack[0]).video.shape[0] == 3


def test_a_mostly_broken_source_stops_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.mp4").write_bytes(
            b"" if i < 3 else b"text" * 50 if i < 5 else media.video_bytes(media.numbered(20))
        )
        (folder / f"{i}.txt").write_text("x")
    source = SourceJob(path=str(folder))
    with pytest.raises(WaltError, match=r"5 of 8 items .*cannot be used \(3 empty, 2 unreadable\).*max_broken is 0.5"):
        open_clips(tmp_path, source)
    assert len(open_clips(tmp_path, source, max_broken=0.7).tables[0].trained) == 6
    # Damage that only decoding finds stops it as well, once there is enough to judge by.
    for i in range(20):
        data = media.damaged_middle() if i % 4 else media.video_bytes(media.numbered(24, 64, 96))
        (folder / f"{i}.mp4").write_bytes(data)
        (folder / f"{i}.txt").write_text("x")
    clips = open_clips(
        tmp_path,
        source,
        report=tmp_path / "other" / "skipped.jsonl",
        shapes=(Shape(frames=17, height=64, width=96),),
        budget=960,
    )
    with pytest.raises(WaltError, match=r"of .* items .*cannot be used \(.* damaged\)"):
        for step in range(40):
            clips.pack(step, 0)


def test_bad_luck_is_no_broken_source() -> None:
    lucky, broken = Account(None, 0.5), Account(None, 0.5)
    for _ in range(7):
        lucky.used("x")
    for number in range(9):  # 9 of the first 16: of three in ten that are broken one worker in forty meets as many
        lucky.skip("x", Broken(str(number), "damaged", ""))
    with pytest.raises(WaltError, match=r'16 of 16 items of "x" cannot be used \(16 damaged\)'):
        for number in range(40):
            broken.skip("x", Broken(str(number), "damaged", ""))


def test_recipes_take_media_from_the_command_line(tmp_path: Path) -> None:
    job = load_job("emoji.base", ["data.sources=[{path: videos, weight: 2}]", "data.kind=media", "data.fps=12"])
    assert isinstance(job.data, MediaJob) and job.data.fps == 12
    assert job.data.sources == (SourceJob(path="videos", weight=2),)
    with pytest.raises(WaltError, match=r"data\.media\.sources\.0\.path"):
        load_job("emoji.base", ["data.kind=media", "data.sources=[{pth: videos}]"])
    with pytest.raises(WaltError, match=r"fps: input should be 8 or 16, got 12"):
        load_job("emoji.base", ["data.fps=12"])


def test_tokenizer_trains_on_media_and_resumes_exactly(shards: Path, tmp_path: Path) -> None:
    def job(name: str, steps: int) -> Any:
        return tokenizer_job(tmp_path / name, steps=steps, checkpoint_every=3, workers=2).model_copy(
            update={
                "data": MediaJob(
                    sources=(SourceJob(path=str(shards)),), index=str(tmp_path / "index"), min_size=16, variants=8
                ),
                "shapes": (Shape(frames=5, height=32, width=64, cut=32), Shape(frames=1, height=48, width=64)),
            }
        )

    def run(name: str, steps: int) -> Path:
        return train(job(name, steps), build_objective(job(name, steps)))

    run("parts", 3)
    straight, resumed = run("straight", 6), run("parts", 6)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
