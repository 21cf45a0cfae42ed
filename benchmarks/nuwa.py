"""NUWA's decoding and its operator, timed beside nuwa-pytorch and full attention.

    python benchmarks/nuwa.py [--json goals.json] [--growth growth.json] [--plot docs/nuwa_growth.png]

The peer (pip install nuwa-pytorch; nothing of walt needs it) recomputes the whole prefix for every token, twice with
guidance, so its total is extrapolated: one step of its `generate` (both passes of the decoder and the logits) is timed
at a random prefix that ends in the middle of every frame, and counts for all tokens of that frame (it pads a prefix to
whole frames, so its cost is a staircase). walt's totals are of whole videos. Both have random weights, the same width,
depth, heads, vocabulary and words of text. Times of decoding are CPU seconds on a CPU, so that other load on the
machine does not count; the operator's likewise on one thread, interleaved, the best of several.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import Goal, finish, interleaved, own_clock, peak_memory, synchronize

from walt.models.transformer_nuwa import NuwaTransformer3DModel
from walt.nearby import EVERYTHING, nearby_attention

SIDE, WORDS, VOCABULARY = 16, 16, 1024


def clock() -> float:
    """Seconds of this process on the CPU; of the wall where a GPU does the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def walt_model(width: int, layers: int, frames: int, device: str) -> NuwaTransformer3DModel:
    """Random weights."""
    torch.manual_seed(0)
    return (
        NuwaTransformer3DModel(
            vocab_size=VOCABULARY,
            text_dim=width,
            num_layers_encoder=layers,
            num_layers_decoder=layers,
            num_attention_heads=width // 64,
            code_dim=None,
            sample_size=(frames, SIDE, SIDE),
            text_length=WORDS,
        )
        .eval()
        .to(device)
    )


class Peer:
    """nuwa-pytorch's model, and one step of its decoding with guidance."""

    def __init__(self, width: int, layers: int, frames: int, device: str) -> None:
        from nuwa_pytorch import NUWA

        torch.manual_seed(0)
        # Of the tokenizer it reads these sizes only, as no pixel is decoded here.
        sizes = SimpleNamespace(image_size=8 * SIDE, num_layers=3, codebook_size=VOCABULARY)
        sizes.copy_for_eval = lambda: sizes
        options = {"enc_depth": layers, "enc_heads": width // 64}
        self.model = (
            NUWA(
                vae=sizes,
                dim=width,
                max_video_frames=frames,
                text_num_tokens=VOCABULARY,
                text_max_seq_len=WORDS,
                enc_reversible=True,  # its other encoder does not take the positions that its own model gives
                dec_depth=layers,
                dec_heads=width // 64,
                **{f"text_{name}": value for name, value in options.items()},
            )
            .eval()
            .to(device)
        )
        self.mask = torch.ones(1, WORDS, dtype=torch.bool, device=device)
        with torch.no_grad():
            self.text = self.model.embed_text(torch.ones(1, WORDS, dtype=torch.long, device=device), mask=self.mask)

    @torch.no_grad()
    def step(self, prefix: int) -> Tensor:
        """Logits of the token after `prefix` random ones."""
        model = self.model
        tokens = torch.randint(0, VOCABULARY, (1, prefix), device=self.mask.device)
        x = model.image_embedding(tokens) + model.video_pos_emb()[:prefix]
        x = torch.cat([model.video_bos[None, None], x], 1)
        given = model.video_transformer(x, context=self.text, context_mask=self.mask)
        # Its generate feeds the second pass with the first one's output; the cost is that of a right one.
        nothing = model.video_transformer(given, context=self.text, context_mask=torch.zeros_like(self.mask))
        a, b = model.to_logits(given), model.to_logits(nothing)
        return (b + 2 * (a - b))[:, -1]


def peer_times(peer: Peer, frames: int) -> list[tuple[int, float]]:
    """(prefix, seconds of one token), in the middle of every frame."""
    times = []
    peer.step(SIDE * SIDE // 2)
    for frame in range(frames):
        prefix = frame * SIDE * SIDE + SIDE * SIDE // 2
        start = clock()
        peer.step(prefix)
        times.append((prefix, clock() - start))
    return times


def decode(model: NuwaTransformer3DModel, frames: int, wavefront: bool) -> list[tuple[int, float]]:
    """(tokens done, seconds so far) after every step of one video with guidance."""
    with torch.no_grad():
        text = torch.randn(WORDS, model.config.text_dim, generator=torch.Generator().manual_seed(0)).to(model.device)
        condition, null = model.encode_condition([text]), model.encode_condition()
        times = [(0, clock())]
        model.generate(
            (frames, SIDE, SIDE),
            condition,
            null_condition=null,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            wavefront=wavefront,
            callback=lambda done, _: times.append((done, clock())),
        )
    start = times[0][1]
    return [(done, at - start) for done, at in times]


def by_frame(times: list[tuple[int, float]], frames: int) -> list[float]:
    """Median seconds of a token, in every frame, of decoding token by token."""
    steps = [b - a for (_, a), (_, b) in itertools.pairwise(times)]
    size = SIDE * SIDE
    return [statistics.median(steps[i * size : (i + 1) * size]) for i in range(frames)]


def attention_call(near: bool, backward: bool, q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> None:
    """3DNA or full attention, forward, or forward and backward."""
    extent, backend = ((3, 3, 3), "blocked") if near else (EVERYTHING, "full")
    with torch.set_grad_enabled(backward):
        out = nearby_attention(q, k, v, extent, backend=backend)
    if backward:
        torch.autograd.grad(out, (q, k, v), seed)


def operator(heads: int, device: str, repeats: int) -> tuple[list[Goal], list[dict[str, Any]]]:
    """3DNA against full attention (PyTorch's fused kernel, which keeps no score) at 10x21x21, head size 64."""
    goals, rows = [], []
    for dtype, backward in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        shape = (1, 10, 21, 21, heads, 64)
        x = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(4)]
        # Large enough that all the code runs that the measured call runs: what a process maps of it counts as memory.
        small = [t[:, :2, :12, :12].detach().requires_grad_() for t in x]
        runs = {name: functools.partial(attention_call, name == "3DNA", backward, *x) for name in ("3DNA", "full")}
        code = {name: functools.partial(attention_call, name == "3DNA", backward, *small) for name in runs}
        seconds = interleaved(runs, repeats=repeats, clock=own_clock())
        for run in code.values():
            run()
        memory = {name: peak_memory(run, warm=code[name]) for name, run in runs.items()}
        kind = f"forward{' and backward' if backward else ''}, {str(dtype).removeprefix('torch.')}"
        goals.append(Goal(f"3DNA faster than full attention, {kind}", seconds["full"] / seconds["3DNA"], 3.0))
        goals.append(Goal(f"3DNA memory over full attention's, {kind}", memory["3DNA"] / memory["full"], 1.0, False))
        rows.append({"kind": kind, "seconds": seconds, "bytes": memory})
        print(
            f"  {kind}: 3DNA {seconds['3DNA'] * 1e3:.0f} ms, {memory['3DNA'] / 2**20:.1f} MiB; "
            f"full {seconds['full'] * 1e3:.0f} ms, {memory['full'] / 2**20:.1f} MiB",
            flush=True,
        )
    return goals, rows


def decoding(args: argparse.Namespace, device: str) -> tuple[list[Goal], dict[str, Any]]:
    """Whole videos of walt, prefixes of the peer."""
    goals: list[Goal] = []
    growth: dict[str, Any] = {}
    frames = max(args.frames)
    model = walt_model(args.width, args.layers, frames, device)
    print(
        f"walt: {model.num_parameters() / 1e6:.1f}M parameters, width {args.width}, {args.layers} + {args.layers} layers"
    )
    decode(model, 1, True)
    totals: dict[tuple[int, bool], float] = {}
    curves: list[list[float]] = []
    for _ in range(args.repeats):
        for length in args.frames:
            for wavefront in (True, False):
                if not wavefront and length != frames:
                    continue  # of the same curve, only shorter
                times = decode(model, length, wavefront)
                key = (length, wavefront)
                totals[key] = min(totals.get(key, math.inf), times[-1][1])
                if not wavefront:
                    curves.append(by_frame(times, length))
                    growth["walt, token by token"] = times[:: SIDE * SIDE // 8]
                elif length == frames:
                    growth["walt, waves"] = times
    per_frame = [min(values) for values in zip(*curves, strict=True)]
    growth["walt, seconds a token by frame"] = per_frame
    middle = statistics.mean(per_frame)
    flat = max(abs(value / middle - 1) for value in per_frame)
    for length in args.frames:
        if length != frames:
            totals[(length, False)] = totals[(frames, False)] * length / frames
        print(
            f"  {length}x{SIDE}x{SIDE} with guidance: waves {totals[(length, True)]:.2f} s, token by token "
            f"{totals[(length, False)]:.2f} s{'' if length == frames else ' (share of the longest)'}",
            flush=True,
        )
    print(f"  a token, by frame: {', '.join(f'{value * 1e3:.2f}' for value in per_frame)} ms")
    memory = {length: peak_memory(lambda n=length: decode(model, n, True)) for length in (*args.frames, 2 * frames)}
    growth["walt, bytes by frames"] = memory
    print("  memory: " + ", ".join(f"{n} frames {size / 2**20:.1f} MiB" for n, size in memory.items()))
    if not args.no_peer:
        peer = Peer(args.width, args.layers, frames, device)
        count = sum(p.numel() for p in peer.model.parameters())
        print(f"nuwa-pytorch: {count / 1e6:.1f}M parameters")
        times = peer_times(peer, frames)
        growth["nuwa-pytorch, (prefix, seconds a token)"] = times
        size = peak_memory(lambda: peer.step(times[-1][0]))
        print(
            f"  a token, by frame: {', '.join(f'{value:.2f}' for _, value in times)} s; memory {size / 2**20:.0f} MiB"
        )
        for length in args.frames:
            total = sum(seconds for _, seconds in times[:length]) * SIDE * SIDE
            print(
                f"  {length}x{SIDE}x{SIDE} with guidance: {total:.0f} s (extrapolated from {length} sampled prefixes)"
            )
            ratio = total / totals[(length, False)]
            name = f"cached faster than nuwa-pytorch, {length}x{SIDE}x{SIDE}"
            goals.append(Goal(name, ratio, 100.0 if length == frames else 1.0))
        goals.append(Goal("memory of decoding over nuwa-pytorch's", memory[frames] / size, 1.0, False))
    goals.append(
        Goal(
            f"waves faster than token by token, {frames}x{SIDE}x{SIDE}",
            totals[(frames, False)] / totals[(frames, True)],
            4.0,
        )
    )
    goals.append(Goal("seconds a token along the video, largest step from their mean", flat, 0.1, False))
    return goals, growth


def plot(path: Path, growth: dict[str, Any]) -> None:
    """Time per token along the video, and seconds of the whole so far; of the peer what its prefixes foretell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = SIDE * SIDE
    per_frame = growth["walt, seconds a token by frame"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    frames = range(1, len(per_frame) + 1)
    left.plot(frames, [1e3 * s for s in per_frame], marker="o", label="walt, token by token")
    waves = growth["walt, waves"]
    left.axhline(1e3 * waves[-1][1] / waves[-1][0], color="C2", label="walt, waves (mean)")
    right.plot(*zip(*growth["walt, token by token"][1:], strict=True), label="walt, token by token")
    right.plot(*zip(*waves[1:], strict=True), color="C2", label="walt, waves")
    peer = growth.get("nuwa-pytorch, (prefix, seconds a token)")
    if peer:
        left.plot(frames, [1e3 * s for _, s in peer], marker="s", color="C1", label="nuwa-pytorch")
        total = list(itertools.accumulate(s * size for _, s in peer))
        right.plot([size * n for n in frames], total, marker="s", color="C1", label="nuwa-pytorch (extrapolated)")
    left.set(xlabel=f"frame of {SIDE}x{SIDE} tokens", ylabel="ms a token", yscale="log")
    right.set(xlabel="tokens made", ylabel="seconds", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle("Decoding a video with guidance", fontsize=11)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def main() -> int:
    """Measures, prints, and returns 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of the encoder, and of the decoder")
    parser.add_argument("--frames", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--heads", type=int, default=4, help="of the operator alone")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true", help="without nuwa-pytorch")
    parser.add_argument("--only", choices=("decoding", "operator"), help="one of the two parts")
    parser.add_argument("--json", help="goals")
    parser.add_argument("--growth", help="what the growth plot shows: seconds against tokens")
    parser.add_argument("--plot", type=Path, help="the growth plot, a PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize()
    goals: list[Goal] = []
    growth: dict[str, Any] = {}
    if args.only != "operator":
        goals, growth = decoding(args, device)
    if args.only != "decoding":
        print(f"operator alone, 10x21x21, {args.heads} heads of 64:")
        more, growth["operator"] = operator(args.heads, device, args.repeats)
        goals += more
    if args.plot is not None:
        if args.only == "operator":
            parser.error("--plot needs the decoding part")
        plot(args.plot, growth)
    if args.growth:
        Path(args.growth).write_text(json.dumps(growth, indent=1) + "\n")
    return finish(goals, args.json)


if __name__ == "__main__":
    sys.exit(main())
