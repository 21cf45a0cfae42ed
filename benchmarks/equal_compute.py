"""What pays at equal compute? Width against steps, a curriculum over resolution, representation alignment.

Small denoisers of the emoji theatre, from nothing, on packs of clips and stills. Each run gets as many floating-point
operations (forward passes, counted) as `--steps` steps of the first one:

    plain       width 192
    narrow      width 128, more steps
    wide        width 288, fewer steps
    curriculum  half of the operations at 64x64, in packs of as many tokens, then at 128x128
    alignment   REPA (arXiv 2410.06940): what the third block of six says of every token, through a small network that is
                trained along, is held to the features that VGG16 sees there in the clean picture (cosine, weight 0.5)

VGG is neither the judge's network nor that of KVD. Its features are computed once and not counted; the small network is.

    python benchmarks/equal_compute.py [--steps 1500] [--runs plain,wide] [--count 96] [--work runs/equal-compute] [--json FILE]

Printed for every run: the error of v on scenes that no run trains on, less that of the plain run (the same noise; 95 %
intervals over scenes), the prompt judge on pairs that are never shown, and KVD. What is there already is kept: latents,
features, checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from joint import CLIP, FRAMES, MODEL, SIDE, STILL, encode, sample
from judged import Bench
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from walt.commands import build_objective
from walt.configs.media import EMBEDDED
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre
from walt.data.scenes import Scenes
from walt.evaluation.distances import mean_interval
from walt.evaluation.prompts import held_out_scenes
from walt.linear import has_bfloat16_units
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.tokenizers.losses import PerceptualLoss
from walt.training.job import DataJob, DenoiserJob, DiffusionJob, OptimizerJob, RunJob, Shape
from walt.training.loop import train
from walt.training.objectives import DenoiserObjective, Sample

TOKENS = 3 * 64 * 4 + 64 * 6  # four clips and six stills, more or less
SMALL = tuple(shape.model_copy(update={"height": SIDE // 2, "width": SIDE // 2}) for shape in (CLIP, STILL))
WIDTHS: dict[str, dict[str, Any]] = {
    "narrow": {"attention_head_dim": 32, "ffn_dim": 256},
    "wide": {"num_attention_heads": 6, "ffn_dim": 576},
}
RUNS = ("plain", "narrow", "wide", "curriculum", "alignment")
LEVELS = (100, 300, 500, 700, 900)
DEPTH, WEIGHT, HIDDEN, SEEN = 3, 0.5, 384, 512  # of alignment: blocks, share of the loss, widths


def recipe(name: str, args: argparse.Namespace, latents: Path, shapes: Sequence[Shape] = (CLIP, STILL)) -> DenoiserJob:
    return DenoiserJob(
        model={**MODEL, **WIDTHS.get(name, {})},
        tokenizer=str(EMBEDDED / "vae"),
        text_encoder=str(EMBEDDED / "text_encoder"),
        text_tokenizer=str(EMBEDDED / "tokenizer"),
        data=DataJob(source=args.source, seed=31, latents=str(latents)),
        shapes=tuple(shapes),
        batch_tokens=TOKENS,
        # As the embedded base is trained: what moves where is decided at high noise.
        diffusion=DiffusionJob(self_conditioning_probability=0.0, timestep_logit_normal=(1.0, 1.4)),
        optimizer=OptimizerJob(
            kind="muon", lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.02
        ),
        run=RunJob(
            output=str(args.work / f"{name}-{args.steps}"),
            steps=args.steps,
            seed=args.seed,
            ema_decay=0.995,
            precision="bf16" if has_bfloat16_units(torch.device("cpu")) else "no",
            checkpoint_every=200,
            log_every=50,
            wandb=False,
        ),
    )


class Aligned(DenoiserObjective):
    """The usual loss, and how unlike the network's view of every token is to VGG's. `targets`: by `key` of the latent."""

    targets: dict[bytes, Tensor]

    def align(self, targets: dict[bytes, Tensor]) -> Aligned:
        self.targets = targets
        width = self.model.config.num_attention_heads * self.model.config.attention_head_dim
        self.model.alignment = nn.Sequential(nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, SEEN))
        return self

    def loss(
        self,
        model: nn.Module,
        batch: list[Sample],
        generator: torch.Generator,
        shared: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        said: list[Tensor] = []
        hook = self.model.transformer_blocks[DEPTH - 1].register_forward_hook(lambda *call: said.append(call[2]))
        try:
            loss, figures = super().loss(model, batch, generator, shared)
        finally:
            hook.remove()
        target = torch.cat([self.targets[key(s.latent)].float() for s in batch if s.latent is not None])
        alike = torch.cosine_similarity(self.model.alignment(said[-1]).float(), target, dim=-1).mean()
        return loss - WEIGHT * alike, {**figures, "alike": alike.detach()}

    def export(self, model: Any, folder: Path) -> None:
        """What aligned it is not part of the network."""
        projector = model.alignment
        del model.alignment
        super().export(model, folder)
        model.alignment = projector


def key(latent: Tensor) -> bytes:
    return hashlib.blake2b(latent.float().numpy().tobytes(), digest_size=16).digest()


@torch.no_grad()
def vgg_features(job: DenoiserJob, counts: Sequence[int], weights: str, folder: Path) -> dict[bytes, Tensor]:
    """VGG16's last convolution at every token of every latent, `(t h w, 512)` float16: of a latent's last frame."""
    assert isinstance(job.data, DataJob)
    network, scenes = PerceptualLoss(weights).to(torch.bfloat16), Scenes(job.data.model_copy(update={"latents": None}))
    sets = build_objective(job).shards.sets
    targets: dict[bytes, Tensor] = {}
    for number, (shape, count) in enumerate(zip(job.shapes, counts, strict=True)):
        for start in range(0, count, 64):
            file = folder / f"vgg-{number}-{start:06d}.safetensors"
            if not file.exists():
                rows = []
                for index in range(start, min(count, start + 64)):
                    frames = scenes.clip(index, shape).video[:, ::4].movedim(1, 0)
                    rows.append(network.features(frames.to(torch.bfloat16))[-1].movedim(1, -1).flatten(0, 2))
                part = file.with_suffix(".part")
                save_file({"features": torch.stack(rows).half()}, part)
                part.rename(file)
            features = load_file(file)["features"]
            for index, row in enumerate(features, start):
                targets[key(sets[number].row(index)[0])] = row
    return targets


def operations(objective: DenoiserObjective, batches: int = 16) -> float:
    """Of the forward pass of a step, on average."""
    packs = [objective.batch(step, 0) for step in range(batches)]
    count = sum(float(objective.flops(pack) or 0) for pack in packs)
    if isinstance(objective, Aligned):
        width = objective.model.config.num_attention_heads * objective.model.config.attention_head_dim
        count += 2 * (width * HIDDEN + HIDDEN * SEEN) * TOKENS * batches
    return count / batches


@torch.no_grad()
def errors(objective: DenoiserObjective, model: WaltTransformer3DModel, clips: int = 48) -> Tensor:
    """Mean squared error of v of every held-out scene `(2 clips, levels)`, each with noise of its own."""
    rows = []
    for shape in range(len(objective.job.shapes)):
        batch = [objective.held_out(shape, number) for number in range(clips)]
        clean = objective._latents([s.video for s in batch], [s.latent for s in batch])
        masks = [torch.zeros_like(z[:1]) for z in clean]
        told = objective._told(batch, clean, masks, [False] * len(batch), None, torch.Generator())
        found = []
        for level in LEVELS:
            noise = objective._normal(clean, torch.Generator().manual_seed(level))
            steps = torch.full((len(batch),), level)
            squares, sizes, _ = objective._errors(model, clean, noise, steps, masks, told, False)
            found.append(squares / sizes)
        rows.append(torch.stack(found, 1))
    return torch.cat(rows).double()


def run(
    name: str, args: argparse.Namespace, plain: float, targets: dict[bytes, Tensor]
) -> tuple[Path, float, list[int]]:
    """Trains one; returns its folder, its operations over the plain run's, and its steps."""
    job = recipe(name, args, args.work / "latents")
    budget = plain * args.steps
    if name == "curriculum":
        small = recipe(name, args, args.work / "small", SMALL)
        first = int(budget / 2 / operations(build_objective(small)))
        optimizer = small.optimizer.model_copy(update={"final_lr_ratio": 1.0})
        settings = small.run.model_copy(update={"output": f"{small.run.output}-small", "steps": first})
        small = small.model_copy(update={"optimizer": optimizer, "run": settings})
        objective = build_objective(small)
        done = operations(objective) * first
        begun = train(small, objective)
        rest = int((budget - done) / plain)
        job = job.model_copy(
            update={"init": str(begun), "run": job.run.model_copy(update={"steps": rest, "seed": args.seed + 1})}
        )
        return train(job, build_objective(job)), (done + rest * plain) / budget, [first, rest]
    objective = build_objective(job)
    if name == "alignment":
        objective.__class__ = Aligned
        objective.align(targets)
    each = operations(objective)
    steps = int(budget / each)
    job = job.model_copy(update={"run": job.run.model_copy(update={"steps": steps})})
    objective.job = job
    return train(job, objective), each * steps / budget, [steps]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of the plain run")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--count", type=int, default=96, help="clips to judge, of each run")
    parser.add_argument("--latents", default="1536,1024", help="clips and stills to encode, once for each size")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument("--lpips", default="cache/lpips_vgg.safetensors", help="VGG16 (walt data lpips)")
    parser.add_argument("--work", type=Path, default=Path("runs/equal-compute"))
    parser.add_argument("--json", help="what is printed, as numbers")
    args = parser.parse_args()
    names = args.runs.split(",")
    if not set(names) <= set(RUNS):
        parser.error(f"--runs: expected some of {', '.join(RUNS)}, got {args.runs}")
    torch.set_num_threads(1)
    counts = [int(count) for count in args.latents.split(",")]
    plain = recipe("plain", args, args.work / "latents")
    encode(
        plain.model_copy(update={"data": plain.data.model_copy(update={"latents": None})}),
        counts,
        args.work / "latents",
    )
    if "curriculum" in names:
        small = recipe("curriculum", args, args.work / "small", SMALL)
        small = small.model_copy(update={"data": small.data.model_copy(update={"latents": None})})
        encode(small, counts, args.work / "small")
    targets = vgg_features(plain, counts, args.lpips, args.work) if "alignment" in names else {}
    each = operations(build_objective(plain))

    theatre = EmojiTheatre(args.source, split="heldout", world=EMBEDDED_WORLD)
    scenes = held_out_scenes(theatre, args.count, frames=FRAMES)
    bench = Bench(theatre, scenes, FRAMES, SIDE, SIDE, args.work / "features")
    print("real clips: " + "; ".join(bench(bench.real(theatre)).lines()), flush=True)
    unseen = plain.model_copy(update={"data": plain.data.model_copy(update={"latents": None})})
    judge = build_objective(unseen)
    rows: dict[str, Any] = {}
    first: Tensor | None = None
    for name in names:
        begun = time.process_time()
        folder, share, steps = run(name, args, each, targets)
        seconds = time.process_time() - begun
        model = WaltTransformer3DModel.from_pretrained(folder).eval()
        seen = errors(judge, model)
        first = seen if first is None else first
        levels = [round(float(value), 4) for value in seen.mean(0)]
        gap = mean_interval((seen - first).mean(1))
        verdict = bench(sample(model, unseen, scenes, 16))
        size = sum(p.numel() for p in model.parameters())
        rows[name] = {
            "parameters": size, "steps": steps, "operations": share, "seconds": seconds, "levels": levels,
            "error": float(seen.mean()), "gap": [gap.estimate, gap.low, gap.high],
            **{kind: [one.share, *one.interval] for kind, one in verdict.scores.items()},
            "kvd": [verdict.kvd.estimate, verdict.kvd.low, verdict.kvd.high],
        }  # fmt: skip
        print(
            f"{name}: {size / 1e6:.2f}M parameters, {' + '.join(map(str, steps))} steps, {share:.3f} of the operations, "
            f"{seconds:.0f} s of a core; error of v at {', '.join(map(str, LEVELS))}: {levels}, mean {seen.mean():.4f}, "
            f"less {names[0]}'s {gap.estimate:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}); " + "; ".join(verdict.lines()),
            flush=True,
        )
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
