"""Diffusion against autoregression on the same tokenizer, data, number of parameters and training compute.

Both models see the same clips and stills of the emoji theatre, step by step, through the frame-wise VQ of the embedded
NUWA: NUWA as codes, W.A.L.T. as the latents before quantization (its result is quantized on decoding, as in latent
diffusion on a VQ). The MLP of the denoiser is as wide as makes the numbers of parameters equal, and it trains for as many
steps as make the counted operations of training equal (forward and backward, attention counted). Both then make clips of
held-out prompts with guidance: the prompt judge, KVD and CPU seconds a clip, with real clips beside.

    python benchmarks/autoregression.py [--steps 1500] [--count 96] [--work runs/autoregression] [--json FILE]

`--steps` are NUWA's. Prints the rows of a Markdown table. There is no goal but that the comparison is fair: parameters
within 2 %, operations within 2 %. Checkpoints and features are kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from judged import Bench, Verdict
from measure import Goal, finish
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from walt.commands import build_objective
from walt.configs.media import EMBEDDED
from walt.data.emoji import EMBEDDED_WORLD, EmojiTheatre, Scene
from walt.data.tokens import Pictures
from walt.diffusion import guide, make_scheduler
from walt.heap import keep_freed_memory
from walt.latents import denormalize
from walt.linear import has_bfloat16_units
from walt.media import Pixels
from walt.models.transformer_nuwa import NuwaTransformer3DModel
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_nuwa import NuwaPipeline
from walt.training.job import (
    DataJob,
    DenoiserJob,
    DiffusionJob,
    NuwaClip,
    NuwaJob,
    NuwaTask,
    NuwaTasks,
    OptimizerJob,
    RunJob,
    Shape,
)
from walt.training.loop import Objective, train
from walt.training.nuwa import NuwaObjective
from walt.training.objectives import DenoiserObjective, Sample, TextStates

FRAMES, SIDE, APART = 5, 128, 4  # 2 frames a second
NUWA: dict[str, Any] = {
    "vocab_size": 1024,
    "text_dim": 384,
    "num_layers_encoder": 1,
    "num_layers_decoder": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "ffn_ratio": 2.0,
    "code_dim": 64,
    "sample_size": (FRAMES, 16, 16),
    "text_length": 64,
    "extent": (3, 5, 5),
}
WALT: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "text_dim": 384,
    "sample_size": (FRAMES, 16, 16),
    "relative_positions": "rope",
    "spatiotemporal_window": (8, 8),
    "pooled_text": True,
    "local_mixing": True,
    "self_conditioning": False,
    "frame_conditioning": False,
}


class FrameLatents(nn.Module):
    """A frame-wise VQ as the continuous tokenizer that a denoiser asks for: 1 latent frame a frame."""

    temporal_compression_ratio = 1

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.vq = vq
        self.spatial_compression_ratio = int(vq.spatial_compression_ratio)
        self.config = SimpleNamespace(latents_mean=[0.0] * 32, latents_std=[1.0] * 32)

    def encode(self, video: Tensor) -> Any:
        latents = self.vq.encode(video).latents
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    @torch.no_grad()
    def measure(self, videos: list[Tensor]) -> None:
        """The statistics that normalise its latents."""
        z = torch.cat([self.encode(video[None]).latent_dist.mode()[0].flatten(1) for video in videos], dim=1).double()
        self.config.latents_mean = z.mean(1).tolist()
        self.config.latents_std = z.std(1).clamp_min(1e-4).tolist()


class SameClips(DenoiserObjective):
    """A denoiser on exactly the samples of NUWA's steps."""

    def __init__(self, job: DenoiserJob, latents: FrameLatents, words: TextStates, nuwa: NuwaObjective) -> None:
        super().__init__(job, WaltTransformer3DModel, latents, words)
        self.nuwa = nuwa

    def batch(self, step: int, rank: int) -> list[Sample]:
        pack = []
        for sample in self.nuwa.batch(step, rank):
            assert isinstance(sample.data, Pictures)
            pack.append(Sample(sample.data.video.transpose(0, 1), None, None, None, sample.data.caption, 0))
        return self._by_frame(pack)


def count(config: dict[str, Any], cls: Any) -> int:
    with init_empty_weights():
        return sum(p.numel() for p in cls(**config).parameters())


def equal_parameters() -> dict[str, Any]:
    """The denoiser's config with the MLP's width that makes it as large as NUWA (the count is linear in it)."""
    wanted = count(NUWA, NuwaTransformer3DModel)
    narrow, wide = (count({**WALT, "ffn_dim": width}, WaltTransformer3DModel) for width in (128, 256))
    width = 128 + round((wanted - narrow) * 128 / (wide - narrow))
    if width < 32:
        raise SystemExit("the denoiser is larger than NUWA without its MLP: give it fewer layers")
    return {**WALT, "ffn_dim": width}


def operations(objective: Objective, steps: int = 4) -> float:
    """Counted operations of a step of training, forward and backward, in the mean."""
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **kw: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    total = 0.0
    for step in range(steps):
        batch, generator = objective.batch(step, 0), torch.Generator().manual_seed(step)
        # The tokenizer is the same for both and left out: it is warmed into the batch first.
        with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
            loss, _ = objective.loss(objective.model, batch, generator, generator)
            loss.backward()
        total += counter.get_total_flops()
        objective.model.zero_grad()
    return total / steps


def clips_of_nuwa(model: Any, objective: NuwaObjective, scenes: list[Scene]) -> list[Pixels]:
    words = objective.words
    pipe = NuwaPipeline(objective.vq, None, model, words.encoder, words.tokenizer, num_frames=FRAMES)
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for scene in scenes:
        frames = pipe(
            scene.caption,
            guidance_scale=3.0,
            top_p=0.95,
            num_frames=FRAMES,
            generator=torch.Generator().manual_seed(scene.seed),
            output_type="pt",
        ).frames[0]
        clips.append(pixels(frames.float() * 2 - 1))
    return clips


@torch.no_grad()
def clips_of_walt(model: Any, objective: SameClips, scenes: list[Scene], steps: int) -> list[Pixels]:
    latents, words = objective.vae, objective.words
    assert words is not None
    clips = []
    for scene in scenes:
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(scene.seed)
        z = torch.randn(1, 32, *WALT["sample_size"], generator=generator)
        states = words([scene.caption, ""])
        for t in scheduler.timesteps:
            v = model([z[0], z[0]], torch.tensor([float(t)] * 2), encoder_hidden_states=states).sample
            z = scheduler.step(guide(v[0][None], v[1][None], 3.0), t, z).prev_sample
        z = denormalize(z, latents.config.latents_mean, latents.config.latents_std)
        clips.append(pixels(latents.vq.decode(z).sample[0].clamp(-1, 1).transpose(0, 1)))
    return clips


def pixels(frames: Tensor) -> Pixels:
    """`(T, 3, H, W)` in [-1, 1] to uint8 `(T, H, W, 3)`."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def recipes(args: argparse.Namespace) -> tuple[NuwaJob, DenoiserJob]:
    data = DataJob(source=args.source, seed=31)
    run = RunJob(
        output=str(args.work / f"nuwa-{args.steps}"),
        steps=args.steps,
        seed=args.seed,
        ema_decay=0.998,
        precision="bf16" if has_bfloat16_units(torch.device("cpu")) else "no",
        checkpoint_every=100,
        log_every=50,
        wandb=False,
    )
    # Each learns as its embedded sibling does (configs/nuwa.py, configs/emoji.py): its own rate and its own noise.
    optimizer = OptimizerJob(
        kind="muon", lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, final_lr_ratio=0.02
    )
    nothing = NuwaTask()
    nuwa = NuwaJob(
        model=NUWA,
        tokenizer=str(EMBEDDED.with_name("embedded_nuwa") / "vq"),
        text_encoder=str(EMBEDDED / "text_encoder"),
        text_tokenizer=str(EMBEDDED / "tokenizer"),
        data=data,
        clip=NuwaClip(frames=FRAMES, height=SIDE, width=SIDE, frame_step=APART),
        tasks=NuwaTasks(text_to_image=NuwaTask(batch=2), video_to_video=nothing, text_to_video=NuwaTask(batch=1)),
        token_noise=0.4,
        optimizer=optimizer,
        run=run,
    )
    shapes = tuple(Shape(frames=frames, height=SIDE, width=SIDE) for frames in (FRAMES, 1))
    walt = DenoiserJob(
        model=equal_parameters(),
        tokenizer=nuwa.tokenizer,
        text_encoder=nuwa.text_encoder,
        text_tokenizer=nuwa.text_tokenizer,
        data=data,
        shapes=shapes,
        batch_tokens=(FRAMES + 2) * 256,
        diffusion=DiffusionJob(self_conditioning_probability=0.0, timestep_logit_normal=(0.6, 1.5)),
        optimizer=optimizer.model_copy(update={"lr": 8e-4}),
        run=run,
    )
    return nuwa, walt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of NUWA's training")
    parser.add_argument("--count", type=int, default=96, help="clips to judge, of each")
    parser.add_argument("--sampling-steps", type=int, default=16, help="of the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument("--work", type=Path, default=Path("runs/autoregression"))
    parser.add_argument("--json", help="goals")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    nuwa_job, walt_job = recipes(args)
    nuwa = build_objective(nuwa_job)
    latents = FrameLatents(nuwa.vq)
    latents.measure([s.data.video.transpose(0, 1) for step in range(12) for s in nuwa.batch(step, 0)])
    first = SameClips(walt_job, latents, nuwa.words, nuwa)
    sizes = {name: sum(p.numel() for p in one.model.parameters()) for name, one in (("nuwa", nuwa), ("walt", first))}
    cost = {"nuwa": operations(nuwa), "walt": operations(first)}
    steps = {"nuwa": args.steps, "walt": max(1, round(args.steps * cost["nuwa"] / cost["walt"]))}
    run = walt_job.run.model_copy(
        update={"steps": steps["walt"], "output": str(args.work / f"walt-{steps['walt']}-of-{args.steps}")}
    )
    walt = SameClips(walt_job.model_copy(update={"run": run}), latents, nuwa.words, nuwa)

    theatre = EmojiTheatre(args.source, split="heldout", world=EMBEDDED_WORLD)
    scenes = [theatre.scene(number, 29) for number in range(args.count)]
    everyone = EmojiTheatre(args.source, split="all", world=EMBEDDED_WORLD)
    bench = Bench(everyone, scenes, FRAMES, SIDE, SIDE, args.work / "features", step=APART)
    rows: dict[str, tuple[Verdict, float]] = {"real clips": (bench(bench.real(everyone)), 0.0)}
    for name, objective, cls in (("nuwa", nuwa, NuwaTransformer3DModel), ("walt", walt, WaltTransformer3DModel)):
        model: Any = cls.from_pretrained(train(objective.job, objective)).eval()
        begun = time.process_time()
        made = (
            clips_of_nuwa(model, nuwa, scenes)
            if name == "nuwa"
            else clips_of_walt(model, walt, scenes, args.sampling_steps)
        )
        seconds = (time.process_time() - begun) / len(scenes)
        rows[name] = (bench(made), seconds)
    print("| | parameters | steps | TFLOP | background | motion | subject | KVD | s a clip |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (verdict, seconds) in rows.items():
        shares = [f"{one.share:.0%} ({one.interval[0]:.0%}-{one.interval[1]:.0%})" for one in verdict.scores.values()]
        kvd = f"{verdict.kvd.estimate:.3f} ({verdict.kvd.low:.3f}-{verdict.kvd.high:.3f})"
        made_by = ["", "", ""]
        if name in sizes:
            made_by = [f"{sizes[name] / 1e6:.2f}M", str(steps[name]), f"{steps[name] * cost[name] / 1e12:.3g}"]
        print("| " + " | ".join([name, *made_by, *shares, kvd, f"{seconds:.2f}" if seconds else ""]) + " |")
    if args.json:
        figures = {
            name: {"kvd": vars(v.kvd), **{k: [s.right, s.count] for k, s in v.scores.items()}, "seconds": seconds}
            for name, (v, seconds) in rows.items()
        }
        Path(args.json).with_suffix(".figures.json").write_text(json.dumps(figures, indent=1))
    spent = steps["walt"] * cost["walt"] / (steps["nuwa"] * cost["nuwa"])
    return finish(
        [
            Goal("parameters, largest difference", abs(sizes["walt"] / sizes["nuwa"] - 1), 0.02, at_least=False),
            Goal("operations of training, largest difference", abs(spent - 1), 0.02, at_least=False),
        ],
        args.json,
    )


if __name__ == "__main__":
    raise SystemExit(main())
