"""Loading a user's media: walt's packs against bare webdataset + PyAV, and how long training waits for latents.

Makes its own 480p shards. Both sides read the same windows of the same videos into clips of the same size, in two worker
processes; the bare side does nothing else: no index, captions, mixture, packs, checks or account. They are compared in
CPU seconds of the process and its workers, in turns, so that other load on the machine does not count.

    python benchmarks/data.py [--clips 48] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measure import Goal, finish, interleaved
from torch.utils.data import DataLoader

from walt.commands import build_objective
from walt.data.clips import Clips
from walt.data.precompute import encode_media
from walt.data.scenes import to_video
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.training.job import DenoiserJob, MediaJob, OptimizerJob, RunJob, Shape, SourceJob
from walt.training.loop import _loader, train

RATE, FPS, SECONDS = 24, 8, 4.0
FRAMES, HEIGHT, WIDTH = 17, 144, 256
WORKERS = 2


def make_shards(folder: Path, clips: int, shards: int = 4) -> None:
    """H.264 clips of 854x480: a drifting pattern with grain, about 1.5 Mbit/s."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:854].astype(np.float32)
    grain = rng.integers(-6, 6, (8, 480, 854, 1), dtype=np.int16)
    for shard in range(shards):
        with tarfile.open(folder / f"clips-{shard:03d}.tar", "w") as archive:
            for number in range(shard, clips, shards):
                out = io.BytesIO()
                with av.open(out, "w", format="mp4") as container:
                    stream = container.add_stream("libx264", rate=RATE)
                    stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
                    stream.options = {"crf": "27", "preset": "veryfast"}
                    for i in range(int(SECONDS * RATE)):
                        wave = np.sin((x + 3 * i * (1 + number % 3)) / 41) + np.cos((y - 2 * i + 50 * number) / 29)
                        pixels = np.stack([128 + 50 * wave, 120 + 30 * wave, 90 - 40 * wave], -1).astype(np.int16)
                        pixels = np.clip(pixels + grain[i % 8], 0, 255).astype(np.uint8)
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                    container.mux(stream.encode())
                for name, content in (
                    (f"{number:05d}.mp4", out.getvalue()),
                    (f"{number:05d}.txt", b"a pattern drifts"),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def bare_clip(starts: dict[str, int], sample: dict[str, Any]) -> torch.Tensor:
    """What a plain loader does with one video: decode on, keep every third frame of its window, scale."""
    wanted = [(starts[sample["__key__"]] + i) * RATE // FPS for i in range(FRAMES)]
    chosen = []
    with av.open(io.BytesIO(sample["mp4"])) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number == wanted[len(chosen)]:
                chosen.append(frame.reformat(width=WIDTH, height=HEIGHT, format="rgb24").to_ndarray())
                if len(chosen) == FRAMES:
                    break
    return to_video(np.stack(chosen))


class Lanes:
    """What the training loop asks for its packs."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def batch(self, step: int, lane: int) -> Any:
        return [(clip.video, clip.caption) for clip in self.clips.pack(step, lane)]


def media(folder: Path, **fields: Any) -> MediaJob:
    sources = (SourceJob(path=str(folder / "shards")),)
    return MediaJob(sources=sources, index=str(folder / "index"), fps=FPS, max_clips=1, variants=1000, **fields)


def spent() -> float:
    """CPU seconds of this process and of the workers that it has waited for."""
    return sum(os.times()[:4])


def loading(folder: Path, count: int, repeats: int) -> dict[str, float]:
    """Clips per CPU second of both."""
    import webdataset

    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    shapes = (Shape(frames=FRAMES, height=HEIGHT, width=WIDTH),)
    tokens = 5 * (HEIGHT // 8) * (WIDTH // 8)
    clips = Clips(
        media(folder, max_broken=0.0),
        shapes,
        multiple=16,
        cost=lambda frames, height, width: (1 + (frames - 1) // 4) * (height // 8) * (width // 8),
        budget=4 * tokens,
        captions=True,
    )

    drawn = [draw for step in range(count // 4) for draw in clips.plan.pack(step, 0)]
    items = [(draw, clips.item(draw)) for draw in drawn]
    starts = {Path(item.key).stem: clips.window(draw, item).first for draw, item in items}
    assert len(starts) == count, f"{len(starts)} of {count} videos in the first packs"

    def ours() -> None:
        seen = 0
        for pack in _loader(Lanes(clips), 0, count // 4, range(1), WORKERS):  # type: ignore[arg-type]
            seen += len(pack)
            assert all(video.shape == (3, FRAMES, HEIGHT, WIDTH) for video, _ in pack)
        assert seen == count, f"{seen} of {count} clips"

    def bare() -> None:
        dataset = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).map(partial(bare_clip, starts))
        loader: Iterator[Any] = iter(DataLoader(dataset, batch_size=None, num_workers=WORKERS))
        seen = sum(video.shape == (3, FRAMES, HEIGHT, WIDTH) for video in loader)
        assert seen == count, f"{seen} of {count} clips"

    seconds = interleaved({"walt": ours, "bare": bare}, repeats, clock=spent)
    return {name: count / value for name, value in seconds.items()}


def waiting(folder: Path) -> float:
    """Share of a training run from precomputed latents that waits for data."""
    AutoencoderKLWalt(
        encoder_widths=(8, 8),
        decoder_widths=(8, 8),
        temporal_downsample=(False,),
        layers_per_block=1,
        patch_size=4,
        latents_mean=(0.0,) * 8,
        latents_std=(1.0,) * 8,
    ).save_pretrained(folder / "vae")
    job = DenoiserJob(
        model={
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "patch_size": 2,
            "sample_size": (5, HEIGHT // 8, WIDTH // 8),
            "relative_positions": "rope",
        },
        tokenizer=str(folder / "vae"),
        data=media(folder).model_copy(update={"variants": 1}),
        shapes=(Shape(frames=FRAMES, height=HEIGHT, width=WIDTH), Shape(frames=1, height=HEIGHT, width=WIDTH)),
        batch_tokens=4 * 5 * (HEIGHT // 16) * (WIDTH // 16),
        optimizer=OptimizerJob(lr=1e-3),
        run=RunJob(output=str(folder / "run"), steps=24, wandb=False, log_every=24, checkpoint_every=1000, workers=1),
    )
    objective = build_objective(job)
    with torch.no_grad():
        encode_media(job, objective.clips, folder / "latents", lambda x: objective.vae.encode(x).latent_dist.mode())
    stored = job.model_copy(update={"data": job.data.model_copy(update={"latents": str(folder / "latents")})})
    train(stored, build_objective(stored))
    row = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])
    return float(row["data_wait"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=48, help="videos in the shards, a multiple of 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        make_shards(folder / "shards", args.clips)
        rates = loading(folder, args.clips, args.repeats)
        for kind, rate in rates.items():
            print(
                f"{kind}: {rate:.1f} clips per CPU second, {rate * FRAMES:.0f} frames of {WIDTH}x{HEIGHT} from 854x480"
            )
        share = waiting(folder)
    return finish(
        [
            Goal("clips per CPU second, walt / bare", rates["walt"] / rates["bare"], 0.85),
            Goal("data-wait share from latents", share, 0.05, at_least=False),
        ],
        args.json,
    )


if __name__ == "__main__":
    raise SystemExit(main())
