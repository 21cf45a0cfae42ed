"""A discrete tokenizer's codes on held-out scenes: does it use its bits, and what do they buy beside H.264's?

Bits: the entropy of every bit over the tokens at least a quarter of whose cell the subject covers (the flat ground would
say nothing). Then every clip is coded at several sizes: by the tokenizer, whose tokens cost all their bits, and by libx264
(preset veryslow, yuv420p, packets alone, no container) at several quality factors. LPIPS of every third frame over log
bits is interpolated clip by clip to the tokenizer's own LPIPS; the ratio of bits has a bootstrap interval over clips.

    python benchmarks/codes.py --model runs/lfq-emoji/final [--clips 16] [--world full] [--json FILE]

Needs `walt data emoji --all` and `lpips`.
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
    """Bits at which a curve of (LPIPS, bits) reaches `distance`: its logarithm is interpolated, and continued at the ends."""
    points = sorted(curve)
    spans = [i for i in range(len(points) - 2) if points[i + 1][0] < distance]
    (x0, y0), (x1, y1) = points[(spans[-1] + 1 if spans else 0) :][:2]
    share = (distance - x0) / max(x1 - x0, 1e-9)
    return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))


def covered(alpha: Tensor) -> Tensor:
    """Which tokens have a cell at least a quarter of which a subject covers: alpha `(T, H, W)` in [0, 1] to `(t, h, w)`."""
    time = F.pad(
        alpha[None, None].float(), (0, 0, 0, 0, 3, 0), mode="replicate"
    )  # the first frame is a cell of its own
    return F.avg_pool3d(time, (4, 8, 8))[0, 0] >= 0.25


@torch.no_grad()
def main() -> int:
    """Runs the comparison; 1 where the bits are not even."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a tokenizer with bits as codes (LFQ)")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--heights", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument("--world", choices=("embedded", "full"), default="full", help="whose scenes; as it was trained")
    parser.add_argument("--weights", default="cache/lpips_vgg.safetensors")
    parser.add_argument("--json")
    args = parser.parse_args()
    quiet()
    vae = AutoencoderKLWalt.from_pretrained(str(args.model)).eval()
    if vae.config.quantizer != "lfq":
        raise SystemExit(f"--model: expected a tokenizer with quantizer lfq, this one has {vae.config.quantizer}")
    bits = vae.config.latent_channels
    world = EMBEDDED_WORLD if args.world == "embedded" else World()
    theatre = EmojiTheatre(args.source, split="heldout", world=world)
    perceptual = PerceptualLoss(args.weights)
    goals = []
    for height in args.heights:
        tokens, all_tokens, ratios, distances, inside, rates, spent = [], [], [], [], [], [], []
        for seed in range(args.clips):
            rendered, alpha = theatre.render(theatre.scene(seed), height, height * 7 // 4, frames=FRAMES)
            video, mask = to_video(rendered)[None], torch.from_numpy(alpha).float() / 255
            indices = vae.encode_indices(video)
            made = vae.decode_indices(indices).clamp(-1, 1)
            tokens.append(indices[0][covered(mask)])
            all_tokens.append(indices.flatten())

            def distance(found: Tensor, video: Tensor = video) -> float:
                return float(lpips(found[:, :, ::3], video[:, :, ::3], perceptual))

            own = distance(made)
            curve = [(distance(back), float(size)) for back, size in (h264(video, factor) for factor in FACTORS)]
            theirs = bits_at(own, curve)
            ratios.append(indices.numel() * bits / theirs)
            distances.append(own)
            inside.append(float(masked_psnr(made, video, mask[None, None])))
            rates.append(theirs)
            spent.append(indices.numel() * bits)
        front, every = torch.cat(tokens), torch.cat(all_tokens)
        even, codes = bit_entropy(front, bits), front.unique().numel()
        ratio = mean_interval(torch.tensor(ratios).log())
        print(
            f"{height} lines, {args.clips} clips: {front.numel():,} tokens on subjects of {every.numel():,}; bit entropy "
            f"{even.mean():.3f} (lowest {even.min():.3f}) on them, {bit_entropy(every, bits).mean():.3f} on all; "
            f"{codes:,} codes in use; LPIPS {np.mean(distances):.3f}, {np.mean(inside):.2f} dB inside the subject"
        )
        print(
            f"  {np.mean(spent) / 8192:.1f} KiB a clip, H.264 at the same LPIPS {np.mean(rates) / 8192:.1f} KiB: "
            f"{math.exp(ratio.estimate):.2f} of its bits, clip by clip ({math.exp(ratio.low):.2f} to {math.exp(ratio.high):.2f})"
        )
        goals.append(Goal(f"bit entropy on subjects, {height} lines", float(even.mean()), 0.95))
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
