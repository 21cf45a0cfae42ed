"""Packing against padding and against buckets: useful tokens per second of training steps (forward and backward).

A stream of images at 5 sizes and clips of 5 lengths and 3 shapes trains a small WaltTransformer3DModel in four ways, which all
get the same samples:

- packed: `walt.data.packing.Packer`, a token budget per rank, no padding; window plans are made anew for every pack.
- pad and mask: samples in stream order, padded to the longest of the batch, batches as large as the budget allows.
  Padding goes through every linear layer and norm; masks are not even made and padded attention is not computed beyond the
  padding itself, which is kinder than any implementation with masks.
- one-shape buckets, one device: batches of one of the 20 shapes, as many samples as fit the budget; nothing is trimmed
  and plans are cached.
- one-shape buckets on 2 ranks: each rank draws its bucket on its own, a step takes as long as its slower rank (times of
  all pairs of measured batches, weighted by how often they meet; no time for communication on either side). Counting
  trimmed frames: with buckets of 2 and 4 latent frames a longer clip is cut to the next shorter bucket, as trainers with
  buckets do, and what is cut is lost to training.

Run: python benchmarks/packing.py [--json FILE]; one thread, about three minutes of its time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

# Each way by itself has few row counts. The seventy steps that take turns here would push one another's kernels out of
# oneDNN's cache of 1,024, and each would be made anew at every turn. It is read at the first product.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = "16384"
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Goal, finish, peak_memory
from walt.attention import plan_windows, rotation
from walt.data.packing import Item, Packer, attention_cost
from walt.heap import keep_freed_memory
from walt.models.transformer_walt import WaltTransformer3DModel

Grid = tuple[int, int, int]
IMAGES: list[Grid] = [(1, 8, 8), (1, 8, 14), (1, 12, 20), (1, 16, 16), (1, 16, 28)]
CLIPS: list[Grid] = [(t, h, w) for t in (2, 3, 4, 5, 7) for h, w in ((8, 14), (14, 8), (10, 10))]
BUCKET_LENGTHS = (1, 2, 4)
WINDOWS = [(1, None, None), (None, 8, 8)]


def stream(count: int, seed: int = 0) -> list[Grid]:
    """Images and clips by halves, each of its sizes as often."""
    rng = np.random.default_rng(seed)
    return [IMAGES[rng.integers(5)] if rng.random() < 0.5 else CLIPS[rng.integers(15)] for _ in range(count)]


def size(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def trim(grid: Grid) -> Grid:
    return (max(n for n in BUCKET_LENGTHS if n <= grid[0]), grid[1], grid[2])


class Trainer:
    """A small denoiser and its training steps."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.model = WaltTransformer3DModel(
            num_layers=4,
            num_attention_heads=width // 64,
            attention_head_dim=64,
            sample_size=(5, 16, 28),
            absolute_positions=False,
            relative_positions="rope",
            spatiotemporal_window=(8, 8),
            self_conditioning=False,
            frame_conditioning=False,
        )
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        self.computed = 0
        self.model.patch_embed.register_forward_hook(self._count)

    def _count(self, module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.computed = len(output)

    def step(self, grids: Sequence[Grid], padding: Sequence[int] = (), fresh: bool = True) -> Callable[[], None]:
        """A training step on samples of these grids; `padding` tokens follow, a run for each sample that is short.

        `fresh`: the step plans its windows itself, as it must when every pack is another one.
        """
        samples = [torch.randn(8, *grid) for grid in grids] + [torch.zeros(8, 1, 1, n) for n in padding if n]
        times = torch.rand(len(samples)) * 999

        def run() -> None:
            if fresh:
                plan_windows.cache_clear()
                rotation.cache_clear()
            out = self.model(samples, times).sample[: len(grids)]
            torch.stack([v.square().sum() for v in out]).sum().backward()
            self.model.zero_grad()

        return run


def padded_batches(grids: Sequence[Grid], budget: int) -> list[list[Grid]]:
    """In stream order, as many samples as the budget holds once padded to the longest."""
    batches: list[list[Grid]] = [[]]
    for grid in grids:
        longer = [*batches[-1], grid]
        if len(longer) * max(map(size, longer)) > budget:
            batches.append([grid])
        else:
            batches[-1] = longer
    return batches


def cpu_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best processor time of each run, repeats interleaved, after one to warm up.

    The one thread's own time, not the clock's: on a quiet machine they are the same, and a neighbour does not stretch it.
    """
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat >= 0:
                best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many")
    parser.add_argument(
        "--rounds", type=int, default=6, help="how many of the packer's rounds are timed, two packs each"
    )
    parser.add_argument("--touched", type=int, default=4, help="GiB of memory to touch before the first step")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a step and rank, at least 784")
    parser.add_argument(
        "--width", type=int, default=512, help="of the denoiser, a multiple of 64; 256: the embedded base's"
    )
    args = parser.parse_args()
    if args.width < 64 or args.width % 64:
        parser.error(f"--width: {args.width} is not a multiple of 64")
    budget = args.budget
    torch.set_num_threads(1)
    # As `walt train` does, for every way alike; and as after many steps, all memory that they need has been touched.
    keep_freed_memory()
    torch.zeros(args.touched * 2**28)
    trainer, grids = Trainer(args.width), stream(4000)

    packer = Packer(budget, ranks=2)
    rounds: list[list[list[Grid]]] = []
    numbers: list[list[int]] = []
    for i, grid in enumerate(grids):
        packs = packer.add(Item(size(grid), i, attention_cost(grid, WINDOWS, identity_images=True)))
        if packs:
            # By frame size, as DenoiserObjective lays a pack out.
            rounds.append(
                [sorted((grids[n] for n in p.payloads), key=lambda g: (g[1] * g[2], g[1], g[0])) for p in packs]
            )
            numbers.append(sorted(n for pack in packs for n in pack.payloads))
    figures = packer.utilisation()
    print("packer over 4000 samples:", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    runs: dict[str, Callable[[], object]] = {}
    tokens: dict[str, int] = {}
    measured = rounds[20 : 20 + args.rounds]
    # The other ways get the very samples of these packs, in the order of the stream.
    same = [grids[n] for n in sorted(n for some in numbers[20 : 20 + args.rounds] for n in some)]
    for r, packs_of in enumerate(measured):
        for rank, pack in enumerate(packs_of):
            runs[f"pack {r} {rank}"] = trainer.step(pack)
            tokens[f"pack {r} {rank}"] = sum(map(size, pack))
    wasted = 0
    for r in range(len(measured)):
        for rank in range(2):
            runs[f"pack {r} {rank}"]()
            wasted += trainer.computed - tokens[f"pack {r} {rank}"]
    batches = padded_batches(same, budget)
    for i, batch in enumerate(batches):
        longest = max(map(size, batch))
        runs[f"padded {i}"] = trainer.step(batch, [longest - size(grid) for grid in batch])
        tokens[f"padded {i}"] = sum(map(size, batch))
    padded = 1 - sum(sum(map(size, b)) for b in batches) / sum(len(b) * max(map(size, b)) for b in batches)
    for grid in {*same, *map(trim, same)}:
        runs[f"bucket {grid}"] = trainer.step([grid] * (budget // size(grid)), fresh=False)
    seconds = cpu_seconds(runs, args.repeats)

    def rate(kind: str) -> float:
        """Useful tokens per second of the measured steps of a kind."""
        names = [name for name in runs if name.startswith(kind)]
        return sum(tokens[name] for name in names) / sum(seconds[name] for name in names)

    def bucket_rates(seen: Counter[Grid]) -> tuple[float, float]:
        """Useful tokens per second of one device, and of each of 2 ranks that wait for one another."""
        batch = {grid: budget // size(grid) for grid in seen}
        steps = {grid: count / batch[grid] for grid, count in seen.items()}
        total = sum(steps.values())
        share = {grid: n / total for grid, n in steps.items()}
        took = {grid: seconds[f"bucket {grid}"] for grid in seen}
        useful = sum(share[g] * batch[g] * size(g) for g in seen)
        alone = sum(share[g] * took[g] for g in seen)
        both = sum(share[a] * share[b] * max(took[a], took[b]) for a in seen for b in seen)
        return useful / alone, useful / both

    packed = rate("pack ")
    slower = [max(seconds[f"pack {r} {rank}"] for rank in range(2)) for r in range(len(measured))]
    packed_two = sum(tokens[f"pack {r} {k}"] for r in range(len(measured)) for k in range(2)) / 2 / sum(slower)
    one, two = bucket_rates(Counter(same))
    trimmed = Counter(map(trim, same))
    _, two_trimmed = bucket_rates(trimmed)
    cut = sum(size(trim(g)) for g in grids) / sum(map(size, grids))  # of the whole stream, less chance in it

    print(f"useful tokens/s, one device: packed {packed:.0f}, pad and mask {rate('padded '):.0f}, buckets {one:.0f}")
    print(f"useful tokens/s of each of 2 ranks: packed {packed_two:.0f}, buckets {two:.0f}, trimmed {two_trimmed:.0f}")
    print(
        f"padding of pad and mask {padded:.1%}; tokens lost to buckets of {BUCKET_LENGTHS} latent frames {1 - cut:.1%}"
    )
    print(f"waiting for the slower rank: packed {1 - packed_two / packed:.1%}, buckets {1 - two / one:.1%}")
    for name in ("pack 0 0", "padded 0"):
        print(f"peak memory of a step, {name}: {peak_memory(runs[name]) / 1e6:.0f} MB for {tokens[name]} useful tokens")
    goals = [
        Goal("packed over pad and mask", packed / rate("padded "), 1.3),
        Goal("packed over one-shape buckets, one device", packed / one, 0.97),
        Goal("packed over one-shape buckets, 2 ranks, stragglers alone", packed_two / two, 1.0),
        Goal(
            "packed over one-shape buckets, 2 ranks, stragglers and trimmed frames",
            packed_two / (two_trimmed * cut),
            1.2,
        ),
        Goal("tokens computed that belong to no sample", float(wasted), 0.0, at_least=False),
        Goal("budget fill", figures["fill"], 0.98),
    ]
    return finish(goals, args.json)


if __name__ == "__main__":
    sys.exit(main())
