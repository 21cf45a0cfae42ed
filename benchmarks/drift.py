"""How the quality of a long video decays, chunk after chunk, and what holds it: a table of what was tried.

A base model makes videos of `--frames` frames by rolling context, once for each setting. Every chunk's own frames are
compared with the first chunk of the same video: the difference of their means and of their standard deviations per colour
(a drift to grey or to one colour), the share of detail they keep (high-frequency energy), how far the ground's colour has
gone from the first chunk's (CIE 1976: about 2 is just visible), whether a subject is still seen, and how much neighbouring
frames differ. The figures of a setting are means over prompts of the last quarter of the video.

Run: python benchmarks/drift.py [--frames 125] [--prompts 2] [--model FOLDER] [--json FILE]; about half a second per step and
chunk of a small model on one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from walt.cli import load_cascade, model_folder
from walt.evaluation.metrics import high_frequency_energy
from walt.evaluation.tracks import find_subject
from walt.pipelines.pipeline_walt import WaltPipeline

PROMPTS = (
    "a rocket flies up on a purple background",
    "a frog bounces on a pink background",
    "a whale moves left to right on a yellow background",
    "a penguin goes around in a circle on a sky blue background",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "context guidance 1.5": {"context_guidance_scale": 1.5},
    "context guidance 2": {"context_guidance_scale": 2.0},
    "context noise 50": {"context_noise_level": 50},
    "context noise 150": {"context_noise_level": 150},
    "anchor every 2": {"anchor_every": 2},
    "anchor every 4": {"anchor_every": 4},
    "anchor every 4, noise 50": {"anchor_every": 4, "context_noise_level": 50},
}
COLUMNS = ("mean", "contrast", "detail", "ground", "subject", "motion")


def describe(frames: Tensor, first: Tensor) -> dict[str, float]:
    """Figures of a chunk's frames `(n, 3, H, W)` in [0, 1] against the first chunk of the video."""
    tracks = [find_subject((x * 255).round().byte().permute(0, 2, 3, 1).numpy()) for x in (frames, first)]
    energy = [float(high_frequency_energy((x * 2 - 1).transpose(0, 1)[None]).mean()) for x in (frames, first)]
    deviation = [x.std(dim=(0, 2, 3)).mean().item() for x in (frames, first)]
    means = [x.mean(dim=(0, 2, 3)) for x in (frames, first)]
    return {
        "mean": float((means[0] - means[1]).abs().mean()),
        "contrast": deviation[0] / max(deviation[1], 1e-6),
        "detail": energy[0] / max(energy[1], 1e-9),
        "ground": float(np.linalg.norm(tracks[0].ground - tracks[1].ground)),
        "subject": float(tracks[0].seen.mean()),
        "motion": float(frames.diff(dim=0).abs().mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: the embedded one)")
    parser.add_argument("--frames", type=int, default=125, help="17 + 12 n; 485 is a minute at 8 frames per second")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", help="write the figures of every chunk there")
    args = parser.parse_args()
    cascade = load_cascade(model_folder(args.model), torch.float32, torch.device("cpu"))
    parts = [getattr(cascade, name) for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")]
    pipe = WaltPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_guidance(cascade.base_guidance_options)
    print(f"{args.frames} frames ({args.frames / 8:.1f} s), {args.steps} steps, {args.prompts} prompts")
    print(f"{'setting':<26}" + "".join(f"{name:>10}" for name in COLUMNS), flush=True)
    rows: dict[str, list[list[dict[str, float]]]] = {}
    for name in args.settings:
        rows[name] = []
        for number, prompt in enumerate(PROMPTS[: args.prompts]):
            pieces = pipe.stream(
                prompt,
                num_frames=args.frames,
                num_inference_steps=args.steps,
                guidance_scale=cascade.config.base_guidance_scale,
                generator=torch.Generator().manual_seed(number),
                **SETTINGS[name],
            )
            first = next(pieces)[0]
            rows[name].append([describe(first, first), *(describe(piece[0], first) for piece in pieces)])
        chunks = [figures for video in rows[name] for figures in video[-max(1, len(video) // 4) :]]
        means = [sum(figures[column] for figures in chunks) / len(chunks) for column in COLUMNS]
        print(f"{name:<26}" + "".join(f"{value:>10.3f}" for value in means), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
