"""Real video through tokenizers after equal training: walt's beside Wan's (diffusers' AutoencoderKLWan).

Both have 8 channels for 8x8 pixels and 4 frames and, within 15 %, as many parameters. Both are trained by
`walt.training.loop` for the same steps on the same crops in the same order: cuts of 64x64 of the emoji theatre, one clip
of 9 frames or 9 stills a step; mean absolute error and 0.1 LPIPS, no discriminator, no noise on the latents; AdamW with
one schedule, and an average of the weights. walt's runs at the learning rate of its recipe, 1e-3. Wan's is trained at
every one of `--peer-lrs`, and what counts is its best in each measure. It needs far more steps than 300 to get going:
there its PSNR on the crops rose from 10.2 to 11 dB at 3e-4 and not at all in 150 steps of 1e-3.
walt's encoder and decoder run beside a linear map that is fitted to the first 60 steps' crops before training
(`block_shortcut`); how far that goes alone has a row. Wan's decoder clamps its output, as diffusers has it.

Then all reconstruct windows of a real clip that no training has seen (`walt data clip`). LPIPS looks at every third
frame. Intervals are of 95 %, bootstrap over windows; windows differ far more than tokenizers do, so the differences,
window by window, have their own. Rows beside: walt's trained for as many seconds as the peer took, and the embedded
tokenizer as it is shipped (other training, with noise on its latents).

    python benchmarks/reconstruction.py [--steps 800] [--windows 12] [--work runs/reconstruction] [--json FILE]

What is there already is kept: a rerun goes on from the newest checkpoints. Needs `walt data emoji`, `lpips` and `clip`.
Seconds are CPU seconds of one thread where there is no GPU. The default size takes about an hour of a CPU core with units
for bfloat16.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from measure import Goal, finish, interleaved, own_clock
from torch import Tensor

from walt.cli import choose_device, choose_dtype, model_folder, quiet
from walt.configs.emoji import TOKENIZER
from walt.evaluation.distances import mean_interval
from walt.evaluation.reconstruction import CLIP, MEASURES, Score, Windows, interval, measure
from walt.media import replacing
from walt.tokenizers.adapter import load_vae
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.losses import PerceptualLoss
from walt.training.job import DataJob, OptimizerJob, RunJob, Shape, TokenizerJob, TokenizerLoss
from walt.training.loop import train
from walt.training.objectives import TokenizerObjective

SPREAD = 0.15  # how far parameter counts may lie apart
LEARNING_RATE = 1e-3  # of walt's recipe
FRAMES, SIZE = 17, (256, 448)


class AutoencoderKLWan(diffusers.AutoencoderKLWan):
    """Wan's tokenizer with what walt's training asks of one; what it saves is diffusers' own."""

    @property
    def config(self) -> Any:
        return FrozenDict(
            {**self._internal_dict, "latent_channels": self._internal_dict["z_dim"], "block_shortcut": False}
        )

    def forward(self, sample: Tensor, noise: Tensor | None = None, return_dict: bool = True) -> Any:  # type: ignore[override]
        """As `AutoencoderKLWalt.forward`."""
        z = self.encode(sample).latent_dist.mode()
        made = self.decode(z if noise is None else z + noise)
        return made if return_dict else (made.sample, z)


MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "walt": (AutoencoderKLWalt, TOKENIZER),
    "Wan": (AutoencoderKLWan, {"base_dim": 20, "z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}),
}


def recipe(kind: str, steps: int, lr: float, args: argparse.Namespace) -> TokenizerJob:
    """Runs differ in model, learning rate and steps alone."""
    return TokenizerJob(
        model=MODELS[kind][1],
        data=DataJob(source=args.source, seed=31),
        shapes=(
            Shape(frames=9, height=256, width=448, cut=64, weight=3),
            Shape(frames=9, height=512, width=896, cut=64, weight=3),
            Shape(frames=1, height=256, width=448, cut=64, weight=1),
            Shape(frames=1, height=512, width=896, cut=64, weight=1),
        ),
        batch_pixels=9 * 64 * 64,
        loss=TokenizerLoss(perceptual=0.1, perceptual_weights=args.weights, perceptual_frames=2),
        optimizer=OptimizerJob(lr=lr, betas=(0.9, 0.99), warmup_steps=50),
        run=RunJob(
            output=str(args.work / f"{kind.lower()}-{lr:g}-{steps}"),
            steps=steps,
            ema_decay=0.99,
            precision="bf16" if args.dtype == torch.bfloat16 else "no",
            checkpoint_every=100,
            log_every=50,
            wandb=False,
        ),
    )


class PeerObjective(TokenizerObjective):
    """Of a tokenizer whose work walt does not know how to count."""

    def flops(self, batch: list[Tensor]) -> None:
        """None."""


def objective(kind: str, job: TokenizerJob, perceptual: PerceptualLoss) -> TokenizerObjective:
    cls = TokenizerObjective if kind == "walt" else PeerObjective
    return cls(job, MODELS[kind][0], perceptual)


def step_seconds(args: argparse.Namespace, perceptual: PerceptualLoss) -> dict[str, float]:
    """Seconds of one training step of each, the best of three groups of four steps on the same crops, in turns."""
    runs, device = {}, choose_device("auto")
    for kind in MODELS:
        goal = objective(kind, recipe(kind, args.steps, LEARNING_RATE, args), perceptual)
        goal.to(device)
        model = goal.model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def run(goal: Any = goal, model: Any = model, optimizer: Any = optimizer) -> None:
            for step in range(4):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
                    loss, _ = goal.loss(model, goal.batch(step, 0), torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        runs[kind] = run
    return {kind: seconds / 4 for kind, seconds in interleaved(runs, repeats=3, clock=own_clock()).items()}


def start(job: TokenizerJob, perceptual: PerceptualLoss, folder: Path) -> float:
    """Writes walt's model as training starts with it; seconds that the fit of its linear map took."""
    clock = own_clock()
    begun = clock()
    goal = objective("walt", job, perceptual)
    seconds = clock() - begun
    goal.export(goal.model, folder)
    return seconds


def scores(folder: Path, kept: Path, args: argparse.Namespace, perceptual: PerceptualLoss) -> list[Score]:
    """Of the tokenizer in a folder on the real clip; kept in a file, and read from it if it is there."""
    height, width = SIZE
    path = kept / f"{args.clip.stem}-{args.windows}x{FRAMES}x{height}x{width}.json"
    if path.is_file():
        return [Score(**row) for row in json.loads(path.read_text())]
    vae = load_vae(str(folder)).eval().to(choose_device("auto"), args.dtype)
    found = measure(vae, Windows.of(args.clip, vae, FRAMES, SIZE, args.windows), perceptual, lpips_every=3)
    kept.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([asdict(score) for score in found], indent=1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of training, of each")
    parser.add_argument("--peer-lrs", type=float, nargs="+", default=[3e-4, 1e-4], help="learning rates of Wan's")
    parser.add_argument("--windows", type=int, default=12, help="of 17 frames of the real clip, spread evenly")
    parser.add_argument("--no-equal-seconds", action="store_true", help="leave out the run of as many seconds")
    parser.add_argument("--clip", type=Path, default=Path("cache/clip") / CLIP)
    parser.add_argument("--source", default="cache/emoji")
    parser.add_argument("--weights", default="cache/lpips_vgg.safetensors")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--work", type=Path, default=Path("runs/reconstruction"))
    parser.add_argument("--json", help="goals")
    parser.add_argument("--figures", help="every row's means, intervals, seconds and parameters")
    args = parser.parse_args()
    if args.windows < 2:
        raise SystemExit(f"--windows must be at least 2 for an interval, got {args.windows}")
    device = choose_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(1)
    args.dtype = choose_dtype(args.dtype, device)
    quiet()
    perceptual = PerceptualLoss(args.weights).to(device)
    counts = {kind: sum(p.numel() for p in cls(**config).parameters()) for kind, (cls, config) in MODELS.items()}
    if abs(counts["Wan"] / counts["walt"] - 1) > SPREAD:
        raise SystemExit(f"Wan's has {counts['Wan']} parameters, walt's {counts['walt']}: not comparable")

    first = recipe("walt", args.steps, LEARNING_RATE, args)
    linear, timed = args.work / "start", args.work / "seconds.json"
    if timed.is_file():  # the longer run's steps follow from it, so a rerun must not measure anew
        seconds = json.loads(timed.read_text())
    else:
        seconds = {**step_seconds(args, perceptual), "fit": start(first, perceptual, linear)}
        with replacing(timed) as temporary:
            temporary.write_text(json.dumps(seconds))
    print(
        f"a step: walt {seconds['walt']:.3f} s, {counts['walt'] / 1e6:.2f}M parameters, linear map before {seconds['fit']:.1f}"
        f" s; Wan {seconds['Wan']:.3f} s, {counts['Wan'] / 1e6:.2f}M; {str(args.dtype)[6:]}",
        flush=True,
    )
    embedded = model_folder(None) / "vae"
    ours = {f"walt, {args.steps} steps": first}
    peers = {f"Wan, {args.steps} steps, lr {lr:g}": recipe("Wan", args.steps, lr, args) for lr in args.peer_lrs}
    if not args.no_equal_seconds:
        steps = int((args.steps * seconds["Wan"] - seconds["fit"]) / seconds["walt"])
        ours[f"walt, {steps} steps, as many seconds"] = recipe("walt", steps, LEARNING_RATE, args)
    given = {"walt, linear map alone": (linear, linear), "walt, as shipped": (embedded, args.work / "shipped")}
    rows: dict[str, list[Score]] = {}
    for name in [*given, *list(ours)[:1], *peers, *list(ours)[1:]]:
        if name in given:
            folder, kept = given[name]
        else:
            job = {**ours, **peers}[name]
            folder = train(job, objective("Wan" if name in peers else "walt", job, perceptual))
            kept = Path(job.run.output)  # a finished run that is run again exports anew
        rows[name] = scores(folder, kept, args, perceptual)
        means = {key: interval(rows[name], key) for key in MEASURES}
        said = [f"{m} {means[m].estimate:.4g} ({means[m].low:.4g} to {means[m].high:.4g})" for m in MEASURES]
        print(f"{name}: {', '.join(said)}", flush=True)

    def gap(our: str, peer: str, key: str) -> float:
        pairs = zip(rows[our], rows[peer], strict=True)
        found = mean_interval(torch.tensor([getattr(a, key) - getattr(b, key) for a, b in pairs]))
        print(f"{key}, {our} minus {peer}: {found.estimate:.4g} ({found.low:.4g} to {found.high:.4g})")
        return found.estimate

    goals = []
    for our in ours:
        for key, at_least in (("psnr", True), ("ssim", True), ("lpips", False)):
            gaps = [gap(our, peer, key) for peer in peers]
            least = min(gaps) if at_least else max(gaps)
            goals.append(Goal(f"{key}, {our}, minus Wan's best", least, 0.0, at_least))
    if args.figures:
        figures = {name: {key: asdict(interval(found, key)) for key in MEASURES} for name, found in rows.items()}
        Path(args.figures).write_text(json.dumps({"seconds": seconds, "parameters": counts, "rows": figures}, indent=1))
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
