"""Does joint training on images and videos matter? (W.A.L.T., arXiv 2312.06662, Table 3: FVD 598.8 -> 344.5.)

In the emoji theatre clips show a third of the subjects, stills show all. Two small models of the same seed are trained
for equally many steps on packs of equally many clips: one on the clips alone, one with stills put on top of them, as the
paper appends images to its videos, which makes its packs half as long again. Both then make clips of the subjects that
only stills show, and the prompt judge says whether subject, motion and background are those of the prompt; KVD is the
distance from real clips of these subjects. Real clips and a model's first weights stand beside.

    python benchmarks/joint.py [--steps 8000] [--count 96] [--work runs/joint] [--json FILE]

What is there already is kept: latents, checkpoints, features. A run of the default size takes about two hours of a CPU
core with units for bfloat16. The goals: after joint training a subject is named more often, the intervals apart, a prompt's
subject does the prompt's motion more often, and KVD is lower.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from judged import Bench, Verdict
from measure import Goal, finish

from walt.commands import _encoders, build_objective
from walt.configs.media import EMBEDDED
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre, Scene
from walt.data.latents import write_latents
from walt.diffusion import make_scheduler
from walt.linear import has_bfloat16_units
from walt.media import Pixels
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.training.job import DataJob, DenoiserJob, DiffusionJob, OptimizerJob, RunJob, Shape
from walt.training.loop import train

FRAMES, SIDE = 9, 128
CLIPS = ("rocket", "penguin", "sun")  # of 8 subjects
CLIP, STILL = Shape(frames=FRAMES, height=SIDE, width=SIDE), Shape(frames=1, height=SIDE, width=SIDE, weight=1.5)
CLIP_TOKENS, STILL_TOKENS = 3 * 64, 64  # a still is drawn 1.5 times as often as a clip
MODEL: dict[str, Any] = {
    "patch_size": 2,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "ffn_dim": 384,
    "text_dim": 384,
    "sample_size": (3, 16, 16),
    "relative_positions": "rope",
    "spatiotemporal_window": None,
    "pooled_text": True,
    "local_mixing": True,
    "sigma_data": 0.1,
    "self_conditioning": False,
    "frame_conditioning": False,
}


def recipe(name: str, shapes: tuple[Shape, ...], args: argparse.Namespace, latents: Path | None) -> DenoiserJob:
    """One of the two runs: they differ in their shapes alone."""
    return DenoiserJob(
        model=MODEL,
        tokenizer=str(EMBEDDED / "vae"),
        text_encoder=str(EMBEDDED / "text_encoder"),
        text_tokenizer=str(EMBEDDED / "tokenizer"),
        data=DataJob(
            source=args.source, seed=21, clip_subjects=CLIPS, latents=None if latents is None else str(latents)
        ),
        shapes=shapes,
        batch_tokens=CLIP_TOKENS * 8 + (STILL_TOKENS * 12 if STILL in shapes else 0),
        # As the embedded base is trained: what moves where is decided at high noise.
        diffusion=DiffusionJob(self_conditioning_probability=0.0, timestep_logit_normal=(1.5, 1.2)),
        optimizer=OptimizerJob(
            kind="muon", lr=8e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.02
        ),
        run=RunJob(
            output=str(args.work / f"{name}-{args.steps}"),
            steps=args.steps,
            seed=args.seed,
            ema_decay=0.998,
            precision="bf16" if has_bfloat16_units(torch.device("cpu")) else "no",
            checkpoint_every=200,
            log_every=50,
            wandb=False,
        ),
    )


def encode(job: DenoiserJob, counts: Sequence[int], folder: Path) -> None:
    vae, _ = _encoders(job)
    with torch.no_grad():
        write_latents(job, folder, counts, lambda video: vae.encode(video).latent_dist.mode())


def sample(model: WaltTransformer3DModel, job: DenoiserJob, scenes: Sequence[Scene], steps: int) -> list[Pixels]:
    vae, words = _encoders(job)
    pipe = WaltPipeline(
        tokenizer=words.tokenizer, text_encoder=words.encoder, vae=vae, transformer=model, scheduler=make_scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    clips: list[Pixels] = []
    for start in range(0, len(scenes), 8):
        part = scenes[start : start + 8]
        frames = pipe(
            prompt=[scene.caption for scene in part],
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(scene.seed) for scene in part],
            output_type="pt",
        ).frames
        pixels = (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)
        clips += list(pixels.permute(0, 1, 3, 4, 2).numpy())
    return clips


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000, help="of training, of each run")
    parser.add_argument("--count", type=int, default=96, help="clips to judge, of each run")
    parser.add_argument("--sampling-steps", type=int, default=16)
    parser.add_argument("--latents", default="3072,4096", help="clips and stills to encode, once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument("--work", type=Path, default=Path("runs/joint"))
    parser.add_argument("--json", help="goals")
    parser.add_argument("--figures", help="scores, intervals and seconds of both runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {"video": (CLIP,), "joint": (CLIP, STILL)}
    both = recipe("joint", runs["joint"], args, None)
    folder = args.work / "latents"
    encode(both, [int(n) for n in args.latents.split(",")], folder)

    unseen = tuple(name for name in EMBEDDED_WORLD.subjects if name not in CLIPS)
    theatre = EmojiTheatre(args.source, subjects=unseen, split="all", world=EMBEDDED_WORLD)
    scenes = [theatre.scene(900_000 + number, 29) for number in range(args.count)]
    everyone = EmojiTheatre(args.source, world=EMBEDDED_WORLD, split="all")
    bench = Bench(everyone, scenes, FRAMES, SIDE, SIDE, args.work / "features")
    verdicts: dict[str, Verdict] = {"real clips": bench(bench.real(everyone))}
    seconds: dict[str, float] = {}
    for name, shapes in runs.items():
        job = recipe(name, shapes, args, folder)
        begun = time.perf_counter()
        final = train(job, build_objective(job))
        seconds[name] = time.perf_counter() - begun
        model = WaltTransformer3DModel.from_pretrained(final).eval()
        verdicts[name] = bench(sample(model, job, scenes, args.sampling_steps))
    torch.manual_seed(args.seed)
    verdicts["untrained"] = bench(sample(WaltTransformer3DModel(**MODEL).eval(), both, scenes, args.sampling_steps))
    print(
        f"clips of {', '.join(CLIPS)}; stills of all; {args.steps} steps, {args.count} prompts of {', '.join(unseen)}"
    )
    for name, verdict in verdicts.items():
        print(f"{name}: " + "; ".join(verdict.lines()))
    if args.figures:
        rows = {
            name: {
                **{kind: [one.share, *one.interval] for kind, one in verdict.scores.items()},
                "kvd": [verdict.kvd.estimate, verdict.kvd.low, verdict.kvd.high],
            }
            for name, verdict in verdicts.items()
        }
        Path(args.figures).write_text(json.dumps({"steps": args.steps, "rows": rows, "seconds": seconds}, indent=1))
    video, joint = verdicts["video"], verdicts["joint"]
    apart = joint.scores["subject"].interval[0] - video.scores["subject"].interval[1]
    return finish(
        [
            Goal("subject named right, joint minus video alone", _gap(joint, video, "subject"), 0.0),
            Goal("gap between the intervals of the subject", apart, 0.0),
            Goal(
                "prompt fulfilled (subject, motion and background right), joint minus video",
                _gap(joint, video, "all"),
                0.0,
            ),
            Goal("KVD, joint over video alone", joint.kvd.estimate / video.kvd.estimate, 1.0, at_least=False),
        ],
        args.json,
    )


def _gap(a: Verdict, b: Verdict, name: str) -> float:
    return a.scores[name].share - b.scores[name].share


if __name__ == "__main__":
    raise SystemExit(main())
