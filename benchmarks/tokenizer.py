"""The tokenizer beside those of diffusers, in one run: time, GFLOP/s, share of this machine's rate, peak memory.

Every model has random weights and about as many parameters (within 15 %) as the others. FLOPs are those of the layers as
they are defined, counted by torch with every convolution direct: where walt multiplies less (Winograd), what counts is the
work that was asked for, so that a faster form of the same layer counts as faster. The machine's rate is that of one plain
3D convolution, measured in the same run. On one thread of a CPU seconds are CPU seconds. A peer that would need more memory
than there is, by what it takes for a sixteenth of the frame, is left out of that row, which says so.

    python benchmarks/tokenizer.py --quick            17x128x128 alone, fewer repeats
    python benchmarks/tokenizer.py                    17x128x128, 17x256x448, decode of 17x512x896
    python benchmarks/tokenizer.py --dtypes float32 bfloat16 --repeats 5 --json tokenizer.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from measure import Goal, finish, interleaved, own_clock, peak_memory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from walt.tokenizers import winograd
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt

SPREAD = 0.15  # how far parameter counts may lie apart


@dataclass
class Entry:
    """A model with its name in the table."""

    name: str
    model: Any
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def entries(dtype: torch.dtype) -> list[Entry]:
    """Ours and the peers, about 60 million parameters each."""
    torch.manual_seed(0)
    widths = (64, 128, 128, 224)
    models: dict[str, Any] = {
        "walt": AutoencoderKLWalt(encoder_widths=widths, decoder_widths=widths),
        "Wan": diffusers.AutoencoderKLWan(base_dim=64),
        "CogVideoX": diffusers.AutoencoderKLCogVideoX(block_out_channels=(64, 128, 256, 256), layers_per_block=2),
        "Magvit": diffusers.AutoencoderKLMagvit(block_out_channels=(64, 128, 256, 256), layers_per_block=2),
    }
    found = [
        Entry(
            name,
            model.to(dtype).eval().requires_grad_(False),
            lambda x, model=model: model.encode(x, return_dict=False)[0].mode(),
            lambda z, model=model: model.decode(z, return_dict=False)[0],
        )
        for name, model in models.items()
    ]
    return found


def haar(dtype: torch.dtype) -> Entry:
    """Our variant with the Haar front end, with the paper's widths for its two levels."""
    torch.manual_seed(0)
    model: Any = AutoencoderKLWalt(
        encoder_widths=(120, 240), decoder_widths=(120, 240), temporal_downsample=(False,), patch_size=4
    )
    model.to(dtype).eval().requires_grad_(False)
    return Entry(
        "walt, Haar",
        model,
        lambda x: model.encode(x, return_dict=False)[0].mode(),
        lambda z: model.decode(z, return_dict=False)[0],
    )


def parameters(model: Any) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def convolution_rate(dtype: torch.dtype, device: str) -> float:
    """This machine's FLOP/s in a causal 3x3x3 convolution of 128 channels on 17x64x64."""
    conv = torch.nn.Conv3d(128, 128, 3, padding=(0, 1, 1)).to(device, dtype)
    x = torch.randn(1, 128, 19, 64, 64).to(device, dtype)
    seconds = interleaved({"conv": lambda: conv(x)}, repeats=5, clock=own_clock())["conv"]
    return 2.0 * 27 * 128 * 128 * 17 * 64 * 64 / seconds


def flops(run: Callable[[], object]) -> int:
    """FLOPs that torch counts in one run, all convolutions direct."""
    fits, winograd.fits = winograd.fits, lambda *_: False
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        winograd.fits = fits
    return int(counter.get_total_flops())


def prepared(
    kind: str, size: tuple[int, int, int], entry: Entry, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """The run that is measured, with its input."""
    frames, height, width = size
    if kind == "encode":
        video = (torch.rand(1, 3, frames, height, width) * 2 - 1).to(device, dtype)
        return lambda: entry.encode(video)
    latent = torch.randn(1, latent_channels(entry), 1 + (frames - 1) // 4, height // 8, width // 8).to(device, dtype)
    return lambda: entry.decode(latent)


def measure(
    kind: str,
    size: tuple[int, int, int],
    found: list[Entry],
    dtype: torch.dtype,
    device: str,
    options: Any,
    rate: float,
) -> dict[str, tuple[float, float, int]]:
    """Seconds, FLOP/s and peak bytes by name; prints a row each."""
    frames, height, width = size
    runs = {entry.name: prepared(kind, size, entry, dtype, device) for entry in found}
    counts = {name: flops(run) for name, run in runs.items()}  # also the warm-up
    times = interleaved(runs, repeats=options.repeats, warmup=0, clock=own_clock())
    rows = {}
    for entry in found:
        seconds, count = times[entry.name], counts[entry.name]
        memory = 0 if options.no_memory else peak_memory(runs[entry.name])
        rows[entry.name] = (seconds, count / seconds, memory)
        print(
            f"{str(dtype)[6:]:9s} {kind} {frames}x{height}x{width}  {entry.name:16s} {parameters(entry.model) / 1e6:6.1f}M "
            f"{1e3 * seconds:9.0f} ms {count / 1e9:8.0f} GFLOP {count / seconds / 1e9:7.1f} GFLOP/s "
            f"{100 * count / seconds / rate:5.1f} % {memory / 2**20:7.0f} MiB",
            flush=True,
        )
    return rows


def room() -> float:
    """Bytes that a CPU run may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def that_fit(kind: str, size: tuple[int, int, int], found: list[Entry], dtype: torch.dtype) -> list[Entry]:
    """Of large frames on a CPU, those that need no more memory than there is; prints a row for each of the others."""
    frames, height, width = size
    if height * width < 512 * 512:
        return found
    small = (frames, height // 4, width // 4)
    fitting = []
    for entry in found:
        need, there = 16 * peak_memory(prepared(kind, small, entry, dtype, "cpu")), room()
        if need > there:
            print(
                f"{str(dtype)[6:]:9s} {kind} {frames}x{height}x{width}  {entry.name:16s} left out: about "
                f"{need / 2**20:.0f} MiB needed, {there / 2**20:.0f} MiB there",
                flush=True,
            )
        else:
            fitting.append(entry)
    return fitting


def latent_channels(entry: Entry) -> int:
    """Channels of a model's latent."""
    config = entry.model.config
    return int(config.get("latent_channels") or config["z_dim"])


def memory_of_frames(model: Any, height: int, width: int) -> tuple[int, int]:
    """Peak bytes, output aside, of decoding 65 frames and of 17, as the model does it by itself."""
    dtype = next(model.parameters()).dtype
    sizes = []
    for latents in (17, 5):
        z = torch.randn(1, 8, latents, height // 8, width // 8, dtype=dtype)
        output = 3 * (4 * latents - 3) * height * width * z.element_size()
        warm = z[:, :, :2, :4, :4]
        sizes.append(peak_memory(lambda z=z: model.decode(z).sample, lambda z=warm: model.decode(z).sample) - output)  # type: ignore[misc]
    return sizes[0], sizes[1]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size, two repeats")
    parser.add_argument("--size", type=int, nargs=3, metavar=("T", "H", "W"), help="this size alone")
    parser.add_argument("--kinds", nargs="+", choices=["encode", "decode"], help="of a --size; else both")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a run more, on one thread)")
    parser.add_argument("--json", help="also write the goals there")
    options = parser.parse_args(arguments)
    if options.kinds and not options.size:
        parser.error("--kinds goes with --size")
    options.repeats = options.repeats or (2 if options.quick else 5)
    both = ("encode", "decode")
    sizes = [((17, 128, 128), both), ((17, 256, 448), both), ((17, 512, 896), ("decode",))]
    if options.size:
        sizes = [(tuple(options.size), tuple(options.kinds or both))]
    elif options.quick:
        sizes = sizes[:1]
    goals = []
    with torch.no_grad():
        for name in options.dtypes:
            dtype = getattr(torch, name)
            rate = convolution_rate(dtype, options.device)
            print(f"{name}: one convolution runs at {rate / 1e9:.1f} GFLOP/s", flush=True)
            found = entries(dtype)
            ours = parameters(found[0].model)
            for entry in found[1:]:
                if abs(parameters(entry.model) / ours - 1) > SPREAD:
                    raise SystemExit(
                        f"{entry.name} has {parameters(entry.model)} parameters, ours {ours}: not comparable"
                    )
            found.append(haar(dtype))
            for entry in found:
                entry.model.to(options.device)
            for size, kinds in sizes:
                shape = "x".join(map(str, size))
                for kind in kinds:
                    fitting = found
                    if options.device == "cpu" and not options.no_memory:
                        fitting = that_fit(kind, size, found, dtype)
                    rows = measure(kind, size, fitting, dtype, options.device, options, rate)
                    if not {"walt", "walt, Haar"} < set(rows):
                        raise SystemExit(f"{shape}: walt, or every peer, needs more memory than there is")
                    peers = {n: row[1] for n, row in rows.items() if not n.startswith("walt")}
                    ratio = rows["walt"][1] / max(peers.values())
                    goals.append(Goal(f"{name} {kind} {shape}, GFLOP/s over the best peer's", ratio, 0.95))
                    faster = rows["walt"][0] / rows["walt, Haar"][0]
                    goals.append(Goal(f"{name} {kind} {shape}, Haar variant times as fast as the paper's", faster, 5.0))
        if options.device == "cpu" and not options.no_memory and not options.size:
            # What is asked for is a ratio, and the paper's architecture at 512x896 would need 10 GB and 20 minutes.
            for name, model, size in (
                ("the paper's, 128x224", entries(torch.float32)[0].model, (128, 224)),
                ("Haar", haar(torch.float32).model, (128, 224) if options.quick else (512, 896)),
            ):
                many, few = memory_of_frames(model, *size)
                print(f"{name}: 65 frames {many / 2**20:.0f} MiB, 17 frames {few / 2**20:.0f} MiB beside the output")
                title = f"memory of decoding 65 frames over that of 17, {name}"
                goals.append(Goal(title, many / few, 1.0, at_least=False))
    return finish(goals, options.json)


if __name__ == "__main__":
    sys.exit(main())
