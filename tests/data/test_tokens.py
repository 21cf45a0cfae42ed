"""Clips, stills and their tokens: the frames of the recipe, kept once, never another recipe's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.jobs import data, nuwa_job
from walt.data.scenes import to_video
from walt.data.sketches import draw_sketch
from walt.data.tokens import NuwaScenes, TokenFolder, encode
from walt.errors import WaltError
from walt.training.job import NuwaClip, NuwaJob


def make(tmp_path: Path, **changes: Any) -> NuwaJob:
    for name in ("vq", "vq_seg"):
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "config.json").exists():
            (tmp_path / name / "config.json").write_text(name)
    changes = {"data": data(scenes=40), "tokens": str(tmp_path / "tokens"), **changes}
    return nuwa_job(tmp_path, tmp_path / "run", **changes)


def codes(video: Tensor) -> Tensor:
    """Stands for a tokenizer: one number per block of 8 x 8."""
    value = video.float() if video.ndim == 3 else video.mean(dim=1)
    return (torch.nn.functional.avg_pool2d(value[:, None], 8)[:, 0] * 100).long()


def test_frames_are_those_of_the_recipe(tmp_path: Path) -> None:
    scenes = NuwaScenes(make(tmp_path, clip=NuwaClip(frames=3, height=48, width=40, start=2, frame_step=5)))
    clip = scenes.get("clip", 7)
    assert clip.sketch is not None
    scene = scenes.theatre.scene(7, 29)
    video = to_video(scenes.theatre.render(scene, 48, 40, 2, 11)[0])[:, ::5].transpose(0, 1)
    assert torch.equal(clip.video, video) and clip.caption == scene.caption
    assert torch.equal(
        clip.sketch, torch.from_numpy(draw_sketch(scenes.theatre, scene, 48, 40, 2, 11)[::5].astype(int))
    )
    still = scenes.get("still", 7)
    assert still.sketch is not None
    assert still.video.shape == (1, 3, 48, 40) and still.sketch.shape == (1, 48, 40)
    with pytest.raises(WaltError, match="end at frame 32, but a scene has 29"):
        NuwaScenes(make(tmp_path, clip=NuwaClip(frames=9)))


def test_folder_is_filled_once_and_gives_what_encoding_gives(tmp_path: Path) -> None:
    job, calls = make(tmp_path), []

    def counted(video: Tensor) -> Tensor:
        calls.append(len(video))
        return codes(video)

    folder = TokenFolder(job, ("clip", "still"))
    seen: list[tuple[int, int]] = []
    folder.fill(counted, codes, lambda done, total: seen.append((done, total)))
    assert len(calls) == 2 * 64 and seen[-1] == (80, 80)  # whole blocks of 32
    direct = encode(NuwaScenes(job).get("clip", 33), codes, codes)
    kept = folder.get("clip", 33)
    assert torch.equal(kept.video, direct.video) and kept.caption == direct.caption
    assert kept.sketch is not None and direct.sketch is not None and torch.equal(kept.sketch, direct.sketch)
    (tmp_path / "tokens/clip-0000032.safetensors").unlink()
    again = TokenFolder(job, ("clip", "still"))
    again.fill(counted, codes)
    assert len(calls) == 3 * 32 + 64 and torch.equal(again.get("clip", 33).video, kept.video)
    more = TokenFolder(make(tmp_path, data=data(scenes=64)), ("clip",))
    more.fill(counted, codes)
    assert len(calls) == 3 * 32 + 64 and torch.equal(more.get("clip", 33).video, kept.video)


def test_another_recipe_or_tokenizer_is_refused(tmp_path: Path) -> None:
    TokenFolder(make(tmp_path), ("clip",))
    with pytest.raises(WaltError, match="tokens of another clip; choose another folder"):
        TokenFolder(make(tmp_path, clip=NuwaClip(frames=3, height=32, width=32)), ("clip",))
    (tmp_path / "vq/config.json").write_text("another")
    with pytest.raises(WaltError, match="tokens of another tokenizer"):
        TokenFolder(make(tmp_path), ("clip",))


def test_who_draws_makes_no_other_tokens(tmp_path: Path) -> None:
    TokenFolder(make(tmp_path), ("clip",))
    path = tmp_path / "tokens/index.json"
    index = json.loads(path.read_text())
    assert "draw" not in index["data"]
    path.write_text(json.dumps({**index, "data": {**index["data"], "draw": "host"}}))
    TokenFolder(make(tmp_path), ("clip",))
    path.write_text("[]")
    with pytest.raises(WaltError, match="cannot be used"):
        TokenFolder(make(tmp_path), ("clip",))


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    folder = TokenFolder(make(tmp_path), ("still",))
    folder.fill(codes, codes)
    path = tmp_path / "tokens/still-0000000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WaltError, match=r"0000000\.safetensors are damaged"):
        TokenFolder(make(tmp_path), ("still",)).fill(codes, codes)
