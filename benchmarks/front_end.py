"""The Haar front end beside the paper's tokenizer, which begins with pixels: what both reconstruct, and how fast.

Both have 8 channels for 8x8 pixels and 4 frames and, within 15 %, as many parameters. Both are trained by
`walt.training.loop` from random weights for the same steps on the same crops in the same order: cuts of 64x64 of the emoji
theatre, one clip of 9 frames or 9 stills a step; mean absolute error and 0.1 LPIPS, no discriminator; AdamW with one
schedule, and an average of the weights. Neither has a linear map beside it (`block_shortcut`). Then both reconstruct
held-out scenes of 17 frames at 128x224; PSNR is of the pixels of the subject, as a flat ground flatters, with a 95 %
interval of the difference, clip by clip. Times are of encoding and decoding 17x128x128, in turns.

    python benchmarks/front_end.py [--steps 800] [--clips 16] [--work runs/front_end] [--json FILE]

What is there already is kept: a rerun goes on from the newest checkpoints. Needs `walt data emoji` and `lpips`. On one
thread of a CPU seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import Goal, finish, interleaved, own_clock
from reconstruction import LEARNING_RATE, SPREAD, recipe

from walt.cli import choose_device, choose_dtype, quiet
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre
from walt.data.scenes import to_video
from walt.evaluation.distances import mean_interval
from walt.evaluation.metrics import masked_psnr
from walt.tokenizers.adapter import load_vae
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.losses import PerceptualLoss
from walt.training.loop import train
from walt.training.objectives import TokenizerObjective

MODELS: dict[str, dict[str, Any]] = {  # the paper's widths, a sixth of them
    "paper": {"encoder_widths": (20, 40, 40, 80), "decoder_widths": (20, 40, 40, 80)},
    "Haar": {
        "encoder_widths": (44, 88),
        "decoder_widths": (44, 88),
        "temporal_downsample": (False,),
        "patch_size": 4,
        "front_end": "haar",
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of training, of each")
    parser.add_argument("--clips", type=int, default=16, help="held-out scenes of 17 frames")
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument("--weights", default="cache/lpips_vgg.safetensors")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/front_end"))
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.clips < 2:
        raise SystemExit(f"--clips must be at least 2 for an interval, got {args.clips}")
    device = choose_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(1)
    args.dtype = choose_dtype(args.dtype, device)
    quiet()
    counts = {kind: sum(p.numel() for p in AutoencoderKLWalt(**config).parameters()) for kind, config in MODELS.items()}
    if abs(counts["Haar"] / counts["paper"] - 1) > SPREAD:
        raise SystemExit(f"parameters: {counts}: not comparable")
    perceptual = PerceptualLoss(args.weights).to(device)
    theatre = EmojiTheatre(args.source, split="heldout", world=EMBEDDED_WORLD)
    clips = [theatre.render(theatre.scene(seed), 128, 224, frames=17) for seed in range(args.clips)]

    models, found = {}, {}
    for kind, config in MODELS.items():
        job = recipe("walt", args.steps, LEARNING_RATE, args)
        run = job.run.model_copy(update={"output": str(args.work / f"{kind.lower()}-{args.steps}")})
        job = job.model_copy(update={"model": config, "run": run})
        folder = train(job, TokenizerObjective(job, AutoencoderKLWalt, perceptual))
        vae: Any = load_vae(str(folder)).eval().to(device, args.dtype)
        models[kind], values = vae, []
        with torch.no_grad():
            for pixels, alpha in clips:
                video = to_video(pixels)[None]
                made = vae(video.to(device, args.dtype)).sample.float().clamp(-1, 1).cpu()
                values.append(float(masked_psnr(made, video, torch.from_numpy(alpha)[None, None] > 0)))
        found[kind] = torch.tensor(values)
        print(
            f"{kind}: {counts[kind] / 1e6:.2f}M parameters, {args.steps} steps, PSNR inside the subject "
            f"{found[kind].mean():.2f} dB ({args.clips} held-out clips, {str(args.dtype)[6:]})",
            flush=True,
        )
    gap = mean_interval(found["Haar"] - found["paper"])
    print(f"Haar minus paper: {gap.estimate:.2f} dB ({gap.low:.2f} to {gap.high:.2f})")
    goals = [Goal("PSNR of the Haar variant minus that of the paper's, dB", gap.estimate, 0.0)]
    with torch.no_grad():
        x = torch.rand(1, 3, 17, 128, 128, device=device, dtype=args.dtype) * 2 - 1
        z = torch.randn(1, 8, 5, 16, 16, device=device, dtype=args.dtype)
        for name, of in (
            ("encode", lambda vae: vae.encode(x).latent_dist.mode()),
            ("decode", lambda vae: vae.decode(z).sample),
        ):
            runs = {kind: lambda vae=vae, of=of: of(vae) for kind, vae in models.items()}  # type: ignore[misc]
            seconds = interleaved(runs, repeats=args.repeats, clock=own_clock())
            print(f"{name} 17x128x128: paper {seconds['paper']:.3f} s, Haar {seconds['Haar']:.3f} s")
            goals.append(
                Goal(f"{name} 17x128x128, Haar times as fast as the paper's", seconds["paper"] / seconds["Haar"], 5.0)
            )
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
