"""Every task of a base denoiser on clips of the emoji theatre, with a number for each, and a sheet of what was made.

Kept frames are compared with the tokenizer's reconstruction of them. A join is the frame difference across it over the
median of the differences around it, once of all of them, and once of those where one latent of four frames also ends: a
small model's errors differ from latent to latent, so the picture moves there everywhere, joins or not. Filled regions: the
largest change outside the mask, and the jump of brightness across its border, against that of the real clip and against
that of the tokenizer's reconstruction of the real clip put there in the same way, which is the best a model of its latents
can do. Edits: whether the ground has the new colour, and how the subject's path goes with the old one (correlation).

Run: python benchmarks/tasks.py [--clips 2] [--model FOLDER] [--sheet FILE.png] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Goal, finish
from walt.cli import load_cascade, model_folder
from walt.data.emoji import COLOURS
from walt.data.scenes import Scenes
from walt.evaluation.metrics import join_ratio
from walt.evaluation.tracks import find_subject, nearest_colour
from walt.media import write_image
from walt.pipelines.conditions import close_seams
from walt.pipelines.pipeline_walt_condition import WaltConditionPipeline
from walt.pipelines.sampling import decode_latents, encode_video
from walt.training.job import DataJob, Shape

SEED = 9_000_000  # scenes that no recipe trains on


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels of frames in [0, 1], at most 99."""
    return min(99.0, float(-10 * torch.log10((a - b).square().mean().clamp_min(1e-12))))


def joins(video: Tensor, places: list[int]) -> tuple[float, float]:
    """The largest ratio over `places` (first frames after a join) of `(T, 3, H, W)`: to all differences around, and to those
    where latents end."""
    batch = video.transpose(0, 1)[None]
    ratios = [[float(join_ratio(batch, place, 4, period)) for place in places] for period in (1, 4)]
    return max(ratios[0]), max(ratios[1])


def border_jump(video: Tensor, box: tuple[int, int, int, int]) -> float:
    """Mean absolute step of `(T, 3, H, W)` across the border of a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    steps = [
        video[..., top:bottom, left] - video[..., top:bottom, left - 1],
        video[..., top:bottom, right] - video[..., top:bottom, right - 1],
        video[..., top, left:right] - video[..., top - 1, left:right],
        video[..., bottom, left:right] - video[..., bottom - 1, left:right],
    ]
    return float(torch.cat([step.abs().flatten() for step in steps]).mean())


def put(made: Tensor, real: Tensor, shown: Tensor) -> Tensor:
    """`made` `(T, 3, H, W)` in [0, 1] with `real` where `shown` `(1, 1, T, H, W)`, as the pipelines put it there."""
    video = made.transpose(0, 1)[None] * 2 - 1
    close_seams(video, real.transpose(0, 1)[None] * 2 - 1, shown)
    return video[0].transpose(0, 1) / 2 + 0.5


def path(video: Tensor) -> np.ndarray:
    """Where the subject is, `(T, 2)`."""
    track = find_subject((video * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return np.stack([track.x, track.y], axis=1)


def follows(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two paths, of the axis on which the second moves more."""
    both = ~np.isnan(one[:, 0]) & ~np.isnan(other[:, 0])
    if both.sum() < 3:
        return 0.0
    one, other = one[both], other[both]
    axis = int(other.std(axis=0).argmax())
    deviation = one[:, axis].std() * other[:, axis].std()
    covariance = ((one[:, axis] - one[:, axis].mean()) * (other[:, axis] - other[:, axis].mean())).mean()
    return float(covariance / deviation) if deviation > 1e-9 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--source", help="sprites of the theatre (default: what walt data emoji fetched)")
    parser.add_argument("--sheet", help="a PNG: six frames of every task's result of the first clip")
    parser.add_argument("--json")
    args = parser.parse_args()
    cascade = load_cascade(model_folder(args.model), torch.float32, torch.device("cpu"))
    torch.set_grad_enabled(False)
    parts = [getattr(cascade, name) for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")]
    pipe = WaltConditionPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_guidance(cascade.base_guidance_options)
    data = DataJob(seed=SEED) if args.source is None else DataJob(seed=SEED, source=args.source)
    scenes = Scenes(data)
    found: dict[str, list[float]] = defaultdict(list)
    rows: list[tuple[str, Tensor]] = []

    for number in range(args.clips):
        clip = scenes.clip(number, Shape(frames=29, height=128, width=224), False)
        real, caption = clip.video.transpose(0, 1) / 2 + 0.5, clip.caption
        print(f"clip {number}: {caption}", flush=True)
        call: dict[str, Any] = {
            "num_inference_steps": args.steps,
            "guidance_scale": cascade.config.base_guidance_scale,
            "output_type": "pt",
        }

        def run(name: str, method: Any, *given: Any, shown: bool = number == 0, **changes: Any) -> Tensor:
            generator = torch.Generator().manual_seed(number)  # noqa: B023 - called within the same turn
            made: Tensor = method(*given, **{**call, "generator": generator, **changes}).frames[0].cpu()  # noqa: B023
            if shown:
                rows.append((name, made))
            print(f"  {name}: {len(made)} frames", flush=True)
            return made

        def again(frames: Tensor) -> Tensor:
            video = frames.transpose(0, 1)[None] * 2 - 1
            return decode_latents(pipe.vae, encode_video(pipe.vae, video))[0].transpose(0, 1) / 2 + 0.5

        if number == 0:
            rows.append(("real", real))
        made = run("animate", pipe, caption, image=real[0])
        found["animate: kept frame, dB"].append(psnr(made[:1], again(real[:1])))
        found["animate: moves as the real clip"].append(follows(path(made), path(real[:17])))
        made = run("predict", pipe, caption, video=real[:5])
        found["predict: kept frames, dB"].append(psnr(made[:5], again(real[:5])))
        still, truth = real[4:5].expand(12, -1, -1, -1), real[5:17]
        found["predict: error over that of a still"].append(
            float((made[5:] - truth).abs().mean() / (still - truth).abs().mean())
        )
        made = run("first and last", pipe, caption, image=real[0], last_image=real[16])
        held = again(torch.cat([real[:1].expand(7, -1, -1, -1), real[16:17].expand(10, -1, -1, -1)]))
        found["first and last: kept frames, dB"].append(psnr(made[[0, -1]], held[[0, -1]]))
        made = run("keyframes", pipe.interpolate, {0: real[0], 13: real[13], 26: real[26]}, caption)
        found["keyframes: kept frames, dB"].append(psnr(made[[0, 13, 26]], real[[0, 13, 26]]))
        found["keyframes: follows the real path"].append(follows(path(made), path(real[:27])))
        made = run("forward", pipe.extend, real[:17], caption, 12)
        found["extend: kept frames, dB"].append(psnr(made[12:17], again(real[12:17])))
        forward = joins(made, [17])
        found["extend: join"].append(forward[0])
        found["extend: join to latent borders"].append(forward[1])
        made = run("backward", pipe.extend, real[:17], caption, 12, direction="backward")
        mirrored = pipe.extend(
            real[:17].flip(0), caption, 12, **{**call, "generator": torch.Generator().manual_seed(number)}
        ).frames[0]
        found["backward: as forward played backwards, dB"].append(psnr(made, mirrored.flip(0)))
        made = run("loop", pipe.loop, real[:17], caption, 8)
        turned = torch.cat([made, made[:17]])
        every, borders = joins(turned, [len(made)])
        found["loop: last to first"].append(every)
        found["loop: last to first to latent borders"].append(borders)
        other = (
            scenes.clip(number + 100, Shape(frames=17, height=128, width=224), False).video.transpose(0, 1) / 2 + 0.5
        )
        made = run("connect", pipe.connect, real[:17], other[:16], caption, 8)
        every, borders = joins(made, [17, 25])
        found["connect: joins"].append(every)
        found["connect: joins to latent borders"].append(borders)
        box = (64, 32, 160, 96)
        mask = torch.zeros(17, 128, 224)
        mask[:, box[1] : box[3], box[0] : box[2]] = 1
        best = put(again(real[:17]), real[:17], mask[None, None] == 0)
        for conditioning in ("model", "repaint"):
            made = run(
                f"fill ({conditioning})", pipe, caption, video=real[:17], mask_video=mask, conditioning=conditioning
            )
            outside = (made - real[:17]).abs() * (1 - mask[:, None])
            found[f"fill ({conditioning}): largest change outside"].append(float(outside.max()))
            step = border_jump(made, box)
            found[f"fill ({conditioning}): border step to the real one"].append(step / border_jump(real[:17], box))
            found[f"fill ({conditioning}): border step to the tokenizer's"].append(step / border_jump(best, box))
        made = run("outpaint", pipe.outpaint, real[:17, :, :, 48:176], caption, left=48, right=48)
        found["outpaint: largest change inside"].append(
            float((made[..., 48:176] - real[:17, :, :, 48:176]).abs().max())
        )
        old = nearest_colour(find_subject((real * 255).byte().permute(0, 2, 3, 1).numpy()).ground, dict(COLOURS))
        new = next(name for name in ("purple", "yellow", "pink") if name in COLOURS and name != old)
        if old in caption:
            made = run("edit", pipe, caption.replace(old, new), video=real[:17], strength=0.8)
            pixels = (made * 255).byte().permute(0, 2, 3, 1).numpy()
            found["edit: ground as asked"].append(
                float(nearest_colour(find_subject(pixels).ground, dict(COLOURS)) == new)
            )
            found["edit: motion kept"].append(follows(path(made), path(real[:17])))

    if args.sheet:
        strips = []
        for _, video in rows:
            chosen = video[torch.linspace(0, len(video) - 1, 6).round().long()]
            strip = torch.nn.functional.interpolate(chosen, size=(128, 224), mode="area")
            strips.append(torch.cat(list(strip), dim=2))
        sheet = torch.cat(strips, dim=1)
        write_image((sheet * 255).round().byte().permute(1, 2, 0).numpy(), args.sheet)
        print(f"{args.sheet}: rows are " + ", ".join(name for name, _ in rows))
    goals = []
    for name, values in found.items():
        value = sum(values) / len(values)
        if "latent borders" in name:
            print(f"{name}: {value:.4g}")  # no goal of its own: it says what a join is beside those
        elif name.endswith("dB"):
            goals.append(Goal(name, value, 35.0))
        elif "largest change" in name:
            goals.append(Goal(name, value, 1e-6, at_least=False))
        elif "join" in name or "last to first" in name:
            goals.append(Goal(name, value, 1.2, at_least=False))
        elif "border step" in name:
            if "tokenizer" in name and "(model)" in name:
                goals.append(Goal(name, value, 1.2, at_least=False))
            else:  # repainting asks nothing of the model, and its regions agree less
                print(f"{name}: {value:.4g}")
        elif "error" in name:
            goals.append(Goal(name, value, 1.0, at_least=False))
        else:
            goals.append(Goal(name, value, 0.5))
    return finish(goals, args.json)


if __name__ == "__main__":
    sys.exit(main())
