"""A discrete tokenizer's codes on held-out scenes: does it use its bits, and what do they buy beside H.264's?

Bits: the entropy of every bit over the tokens at least a quarter of whose cell the subject covers (the flat ground would
say nothing), of `--even` clips, as of few subjects no bit is even. Then `--clips` of them are coded by the tokenizer, whose
tokens cost all their bits, and by libx264 (preset veryslow, yuv420p, packets alone, no container) at several quality
factors. LPIPS of every third frame over log bits is interpolated clip by clip to the tokenizer's own LPIPS; the ratio of
bits has a bootstrap interval over clips.

    python benchmarks/codes.py --model runs/lfq-emoji-even/final [--clips 16] [--world embedded] [--json FILE]

Needs `walt data emoji` and `lpips`.
"""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from measure import Goal, finish
from torch import Tensor
from torch.nn import functional as F

from walt.cli import quiet
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre, World
from walt.data.scenes import to_video
from walt.evaluation.distances import mean_interval
from walt.evaluation.metrics import lpips, masked_psnr
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.losses import PerceptualLoss
from walt.tokenizers.quantizers import bit_entropy

FACTORS = (20, 26, 32, 38, 44, 50)
FRAMES, RATE = 17, 8


def h264(video: Tensor, factor: int) -> tuple[Tensor, int]:
    """`(1, 3, T, H, W)` in [-1, 1] as libx264 gives it back, and the bits of its packets."""
    frames = ((video[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    coder = av.CodecContext.create("libx264", "w")
    coder.height, coder.width, coder.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
    coder.framerate, coder.time_base = RATE, Fraction(1, RATE)
    coder.options = {"crf": str(factor), "preset": "veryslow"}
    packets = [p for frame in frames for p in coder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))]
    packets += coder.encode(None)
    decoder = av.CodecContext.create("h264", "r")
    shown = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in shown])
    back = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return back, 8 * sum(packet.size for packet in packets)


def bits_at(distance: float, curve: list[tuple[float, float]]) -> float:
    """Bits at which a curve of (LPIPS, bits) reaches `distance`, their logarithm interpolated; beyond an end those there."""
    distances, bits = zip(*sorted(curve), strict=True)
    return float(np.exp(np.interp(distance, distances, np.log(bits))))


def covered(alpha: Tensor) -> Tensor:
    """Which tokens have a cell at least a quarter of which a subject covers: alpha `(T, H, W)` in [0, 1] to `(t, h, w)`."""
    # The first frame is a cell of its own.
    time = F.pad(alpha[None, None].float(), (0, 0, 0, 0, 3, 0), mode="replicate")
    return F.avg_pool3d(time, (4, 8, 8))[0, 0] >= 0.25


def evenness(vae: AutoencoderKLWalt, theatre: EmojiTheatre, height: int, clips: int) -> Goal:
    """Prints how the bits are used; the goal for their mean entropy."""
    bits = vae.config.latent_channels
    tokens, every = [], []
    for seed in range(clips):
        video, alpha = clip(theatre, seed, height)
        indices = vae.encode_indices(video)
        tokens.append(indices[0][covered(alpha)])
        every.append(indices.flatten())
    front, whole = torch.cat(tokens), torch.cat(every)
    even = bit_entropy(front, bits)
    print(
        f"{height} lines, {clips} clips: {front.numel():,} tokens on subjects of {whole.numel():,}; bit entropy "
        f"{even.mean():.3f} (lowest {even.min():.3f}) on them, {bit_entropy(whole, bits).mean():.3f} on all; "
        f"{front.unique().numel():,} codes on subjects",
        flush=True,
    )
    return Goal(f"bit entropy on subjects, {height} lines", float(even.mean()), 0.95)


def beside_h264(
    vae: AutoencoderKLWalt, theatre: EmojiTheatre, height: int, clips: int, perceptual: PerceptualLoss
) -> None:
    """Prints the bits of a clip and those of H.264 at the same LPIPS."""
    ratios, distances, inside, theirs, ours = [], [], [], [], []
    for seed in range(clips):
        video, alpha = clip(theatre, seed, height)
        indices = vae.encode_indices(video)
        made = vae.decode_indices(indices).clamp(-1, 1)

        def distance(found: Tensor, video: Tensor = video) -> float:
            return float(lpips(found[:, :, ::3], video[:, :, ::3], perceptual))

        curve = [(distance(back), float(size)) for back, size in (h264(video, factor) for factor in FACTORS)]
        distances.append(distance(made))
        inside.append(float(masked_psnr(made, video, alpha[None, None])))
        ours.append(indices.numel() * vae.config.latent_channels)
        theirs.append(bits_at(distances[-1], curve))
        ratios.append(ours[-1] / theirs[-1])
    ratio = mean_interval(torch.tensor(ratios).log())
    own, other = (np.mean(sizes) / 8192 for sizes in (ours, theirs))
    low, middle, high = (math.exp(value) for value in (ratio.low, ratio.estimate, ratio.high))
    print(
        f"  {clips} clips: LPIPS {np.mean(distances):.3f}, {np.mean(inside):.2f} dB inside the subject, {own:.1f} KiB; H.264 at "
        f"the same LPIPS {other:.1f} KiB, so {middle:.2f} of its bits clip by clip ({low:.2f} to {high:.2f})",
        flush=True,
    )


def clip(theatre: EmojiTheatre, seed: int, height: int) -> tuple[Tensor, Tensor]:
    """A held-out scene `(1, 3, T, H, W)` in [-1, 1] and its subject's alpha `(T, H, W)` in [0, 1]."""
    rendered, alpha = theatre.render(theatre.scene(seed), height, height * 7 // 4, frames=FRAMES)
    return to_video(rendered)[None], torch.from_numpy(alpha).float() / 255


@torch.no_grad()
def main() -> int:
    """Runs the comparison; 1 where the bits are not even."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a tokenizer with bits as codes (LFQ)")
    parser.add_argument("--even", type=int, default=96, metavar="CLIPS", help="clips whose bits are counted")
    parser.add_argument("--clips", type=int, default=16, help="clips beside H.264")
    parser.add_argument("--heights", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument(
        "--world", choices=("embedded", "full"), default="embedded", help="whose scenes; as it was trained"
    )
    parser.add_argument("--weights", default="cache/lpips_vgg.safetensors")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.even < 1 or args.clips < 2:
        raise SystemExit(f"--even must be at least 1 and --clips 2, got {args.even} and {args.clips}")
    quiet()
    vae = AutoencoderKLWalt.from_pretrained(str(args.model)).eval()
    if vae.config.quantizer != "lfq":
        raise SystemExit(f"--model: expected a tokenizer with quantizer lfq, this one has {vae.config.quantizer}")
    theatre = EmojiTheatre(args.source, split="heldout", world=EMBEDDED_WORLD if args.world == "embedded" else World())
    perceptual, goals = PerceptualLoss(args.weights), []
    for height in args.heights:
        goals.append(evenness(vae, theatre, height, args.even))
        beside_h264(vae, theatre, height, args.clips, perceptual)
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
