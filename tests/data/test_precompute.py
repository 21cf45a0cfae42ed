"""walt encode on a user's media: the same files whatever interrupts it, the same samples as on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests import tiny
from tests.data import media
from tests.training.jobs import benchmark, denoiser_job, save_tokenizer
from walt.cli import main
from walt.commands import build_objective
from walt.data import precompute
from walt.data.precompute import MediaLatents, encode_media
from walt.errors import WaltError
from walt.training.job import DenoiserJob, DiffusionJob, MediaJob, Shape, SourceJob
from walt.training.loop import train
from walt.training.objectives import TextStates

SHAPES = (Shape(frames=9, height=32, width=64), Shape(frames=1, height=48, width=64))


def source_folder(folder: Path, shards: int = 3, items: int = 8) -> Path:
    folder.mkdir()
    for i in range(shards):
        members = media.good_members(items, first=items * i)
        suffix, content = media.broken("damaged frames" if i % 2 else "zero bytes")
        members += [(f"bad-{i}{suffix}", content), (f"bad-{i}.txt", b"broken")]
        media.write_shard(folder / f"part-{i}.tar", members)
    return folder


def media_job(tmp_path: Path, shards: Path, **changes: Any) -> DenoiserJob:
    vae = tmp_path / "vae"
    if not vae.exists():
        torch.manual_seed(0)
        save_tokenizer(vae)
    data = MediaJob(sources=(SourceJob(path=str(shards)),), index=str(tmp_path / "index"), min_size=16)
    return denoiser_job(vae, tmp_path / "run", steps=4).model_copy(
        update={"data": data, "shapes": SHAPES, "batch_tokens": 200, **changes}
    )


def encode(job: DenoiserJob, output: Path, objective: Any = None) -> precompute.Tally:
    objective = objective or build_objective(job)
    with torch.no_grad():
        return encode_media(
            job, objective.clips, output, lambda x: objective.vae.encode(x).latent_dist.mode(), objective.words
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "skipped.jsonl"}


def test_precomputed_samples_equal_those_on_the_fly_and_train(tmp_path: Path) -> None:
    job = media_job(tmp_path, source_folder(tmp_path / "media"))
    job = job.model_copy(update={"model": {**job.model, "low_res_channels": 8, "patch_size": 2}})
    objective = build_objective(job)
    tally = encode(job, tmp_path / "latents", objective)
    # 12 clips of 20 frames in two parts for two shapes, 12 images; of the damaged video two parts for two shapes, one whole.
    assert (tally.total, tally.encoded, tally.skipped) == (12 * 4 + 12 + 4, 12 * 4 + 12 + 1, 3)
    stored = job.model_copy(update={"data": job.data.model_copy(update={"latents": str(tmp_path / "latents")})})
    reader = build_objective(stored)
    for step in range(4):
        live, read = objective.batch(step, 0), reader.batch(step, 0)
        assert [sample.caption for sample in live] == [sample.caption for sample in read]
        for a, b in zip(live, read, strict=True):
            assert (
                b.video is None
                and (objective._latent(a.video, None) - reader._latent(None, b.latent)).abs().max() < 2e-2
            )
            low = objective._latent(a.low_res_video, None)
            assert low.shape[2] == b.latent.shape[2] // 2
            assert (low - reader._latent(None, b.low_res)).abs().max() < 2e-2
    assert (train(stored, reader) / "config.json").exists()
    known = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["item"]: row["reason"] for row in known} == {
        "part-0.tar/bad-0.mp4": "empty",
        "part-1.tar/bad-1.mp4": "damaged",
        "part-2.tar/bad-2.mp4": "empty",
    }


def test_text_states_are_stored_once_per_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(media.image_bytes(media.noise(i)))
        (folder / f"{i}.txt").write_text("a cat\na red cat\n" if i else "a cat\n")
    job = media_job(tmp_path, folder)
    words = TextStates(tiny.tokenizer(), tiny.bert())
    objective = build_objective(job)
    objective.words = words
    assert encode(job, tmp_path / "latents", objective).encoded == 4
    stored = job.model_copy(update={"data": job.data.model_copy(update={"latents": str(tmp_path / "latents")})})
    store = MediaLatents(tmp_path / "latents", stored, objective.clips)
    assert len(store.texts) == 3
    for caption in ("a cat", "a red cat", ""):
        states = store.states(caption)
        assert states is not None and (states - words([caption])[0]).abs().max() < 1e-2
    objective.media_latents = store
    pack = objective.batch(0, 0)
    assert {sample.caption for sample in pack} == {"a cat", "a red cat"}
    known = objective._states(pack, [True] + [False] * (len(pack) - 1))
    assert torch.equal(known[0], words([""])[0]) and torch.equal(known[1], pack[1].states)
    # Captions that have lost words are encoded; the others' states stay those on disk.
    objective.job = stored.model_copy(update={"diffusion": DiffusionJob(partial_captions=0.5, condition_dropout=0.0)})
    told: list[list[Any]] = []

    def tell(batch: list[Any], *_: Any) -> None:
        told.append(batch)
        raise InterruptedError

    monkeypatch.setattr(objective, "_told", tell)
    for step in range(60):
        with pytest.raises(InterruptedError):
            objective.loss(objective.model, pack, torch.Generator().manual_seed(step))
    seen = [pair for batch in told for pair in zip(batch, pack, strict=True)]
    assert all((now.caption == before.caption) == (now.states is before.states) for now, before in seen)
    assert {now.caption for now, _ in seen} >= {"a cat", "a red cat", "a", "cat", "red"}
    assert all(torch.equal(now.latent, before.latent) for now, before in seen)


def test_reruns_do_only_what_changed(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(media.image_bytes(media.noise(i)))
    job = media_job(tmp_path, folder)
    latents = tmp_path / "latents"
    assert encode(job, latents).encoded == 5
    before = contents(latents)
    again = encode(job, latents)
    assert (again.encoded, again.kept) == (0, 5) and contents(latents) == before
    (folder / "2.png").write_bytes(media.image_bytes(media.noise(99)))
    stored = job.model_copy(update={"data": job.data.model_copy(update={"latents": str(latents)})})
    with pytest.raises(WaltError, match="has changed since; run `walt encode` again"):
        build_objective(stored)
    assert encode(job, latents).encoded == 5  # one part holds all five
    assert len([name for name in contents(latents) if name.endswith(".safetensors")]) == 1
    assert build_objective(stored).batch(0, 0)
    part = next(latents.glob("*.safetensors"))
    good = part.read_bytes()
    part.write_bytes(good[:40])
    with pytest.raises(WaltError, match="damaged"):
        build_objective(stored)
    assert encode(job, latents).encoded == 5 and part.read_bytes() == good
    other = job.model_copy(update={"data": job.data.model_copy(update={"fps": 12.0})})
    with pytest.raises(WaltError, match=r"another recipe \(data differ\); choose another folder"):
        encode(other, latents)
    save_tokenizer(tmp_path / "vae")
    with pytest.raises(WaltError, match="another recipe \\(tokenizer differ"):
        encode(job, latents)


def test_ranks_share_the_units_and_make_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = media_job(tmp_path, source_folder(tmp_path / "media"))
    encode(job, tmp_path / "alone")
    tallies = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        tallies.append(encode(job, tmp_path / "shared"))
    assert [tally.encoded > 0 for tally in tallies] == [True, True]
    assert contents(tmp_path / "alone") == contents(tmp_path / "shared")


def test_memory_is_bounded_by_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = media_job(tmp_path, source_folder(tmp_path / "media", shards=1, items=20))
    monkeypatch.setattr(precompute, "PART", 8)
    held: list[int] = []
    save = safetensors.torch.save_file

    def watched(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        held.append(len(tensors))
        save(tensors, *rest)

    monkeypatch.setattr(precompute, "save_file", watched)
    tally = encode(job, tmp_path / "latents")
    assert max(held) <= 8 and sum(held) == tally.encoded == 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["media", "theatre"])
def test_killed_at_any_moment_and_rerun_gives_the_same_files(tmp_path: Path, kind: str) -> None:
    """`benchmarks/kill.py` with 6 kills: SIGKILL at random moments, half of them while a part is being written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's threads
    try:
        done = benchmark("kill").kill_encoding(tmp_path, kills=6, seed=0, kind=kind)
    finally:
        torch.set_num_threads(threads)
    assert done["kills"] == 6 and done["inside a write"]


def test_the_command_encodes_and_accounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source_folder(tmp_path / "media", shards=2)
    torch.manual_seed(0)
    save_tokenizer(tmp_path / "vae")
    arguments = [
        "emoji.super_resolution_1",
        "data.kind=media",
        f"data.sources=[{{path: {folder}}}]",
        f"data.index={tmp_path / 'index'}",
        "data.min_size=16",
        f"tokenizer={tmp_path / 'vae'}",
    ]
    shapes = "shapes=[{frames: 9, height: 32, width: 64}, {frames: 1, height: 32, width: 64}]"
    assert main(["encode", *arguments, shapes, "-o", str(tmp_path / "latents")]) == 0
    told = capsys.readouterr().out
    assert "of 44 samples 41 were encoded, 0 were there, 3 left out" in told
    assert "18 items, 2 skipped (1 damaged, 1 empty)" in told and "skipped.jsonl" in told
    assert main(["encode", *arguments, shapes, "--dtype", "bfloat16", "-o", str(tmp_path / "rounded")]) == 0
    files = sorted(path.relative_to(tmp_path / "latents") for path in (tmp_path / "latents").rglob("*.safetensors"))
    assert files
    for file in files:
        exact, rounded = (
            safetensors.torch.load_file(tmp_path / "latents" / file),
            safetensors.torch.load_file(tmp_path / "rounded" / file),
        )
        assert exact.keys() == rounded.keys()
        for name, latents in exact.items():
            off = (rounded[name].float() - latents.float()).std() / latents.float().std()
            assert off < 0.02 and (off > 0 or "latents" not in name), f"{name} of {file}: {off}"
    capsys.readouterr()
    assert main(["encode", *arguments, shapes, "-n", "5", "-o", str(tmp_path / "x")]) == 2
    assert "--count goes with data.kind=emoji" in capsys.readouterr().err


def test_the_command_checks_media(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source_folder(tmp_path / "media", shards=2)
    index, report = ("--index", str(tmp_path / "index")), tmp_path / "report.jsonl"
    assert main(["data", "check", str(folder), *index]) == 0
    told = capsys.readouterr().out
    assert "9 videos, 32x64 to 64x96 pixels, 2.5 to 3.0 s, 0 without a caption" in told and "8 images" in told
    assert "18 items, 1 skipped (1 empty)" in told
    assert main(["data", "check", str(folder), *index, "--all", "--report", str(report)]) == 0
    assert "18 items, 2 skipped (1 damaged, 1 empty)" in capsys.readouterr().out
    assert len(report.read_text().splitlines()) == 2
    assert main(["data", "check", str(folder), *index, "--report", str(report)]) == 0  # without what decoding found
    assert "18 items, 1 skipped (1 empty)" in capsys.readouterr().out
    assert len(report.read_text().splitlines()) == 1
    assert main(["data", "check", str(tmp_path / "none"), *index]) == 1
    assert "there is no folder" in capsys.readouterr().err
