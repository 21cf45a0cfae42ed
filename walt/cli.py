"""The command line: `walt sample | nuwa | demo | info | train | average | merge | encode | data | evaluate | export` and the
tasks of task_commands.py, one entry of COMMANDS each.

A command has three parts: its arguments, `prepare` (checks them: what it raises is a usage error, exit code 2) and
`run` (what it raises happens at run time, exit code 1). Every error is one line, "walt: error: ..."; Ctrl-C exits with
130, a training stopped by SIGTERM, its checkpoint saved, with 143. Heavy imports happen inside the functions, so that
`walt --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from walt import commands, demo, nuwa_commands, task_commands
from walt.errors import Terminated, WaltError, suggest

if TYPE_CHECKING:
    import torch

    from walt.diffusion import GuidanceOptions

STAGE_NAMES = ("base", "super-resolution 1", "super-resolution 2")


class Command(NamedTuple):
    """One subcommand."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    prepare: Callable[[argparse.Namespace], None]
    run: Callable[[argparse.Namespace], int | None]


class UsageError(WaltError):
    """An argument found not to fit after `prepare`, once the model is known: still exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 1 at run time, 2 for usage, 130 for Ctrl-C, 143 for SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(argv)
        command = COMMANDS[args.command]
        command.prepare(args)
    except WaltError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    try:
        return command.run(args) or 0
    except UsageError as error:
        return _fail(error, 2)
    except Terminated as error:
        return _fail(error, 143)
    except (WaltError, OSError) as error:
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        # torch reports an allocation that failed as a RuntimeError, in words that differ by device.
        words = ("out of memory", "allocate memory", "enough memory")
        if not isinstance(error, MemoryError) and not any(part in str(error).lower() for part in words):
            raise
        return _fail("out of memory: try fewer --stages, a smaller size or --dtype bfloat16", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(error: Exception | str, code: int) -> int:
    print("walt: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WaltError(f"{message} (see {self.prog} --help)")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="walt", description="Text to video with W.A.L.T.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if argv[:1] == [name]:  # only the command in use: the arguments of some need heavy imports
            command.arguments(subparser)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise WaltError(f'unknown command "{argv[0]}"{suggest(argv[0], COMMANDS)}: there are {known}')
    args, late = parser.parse_known_args(argv)
    if late and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in late):
        args.overrides += late  # argparse takes a list of words in one place only, before the options or after them
    elif late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    return args


# -- models and devices ------------------------------------------------------------------------------------------------


def model_folder(given: str | None, embedded: str = "embedded") -> Path:
    """The folder given, or the embedded model of that name; a WaltError when there is no model there."""
    if given is None:
        folder = Path(str(resources.files("walt") / embedded))
        if not (folder / "model_index.json").is_file():
            raise WaltError("this installation of walt has no embedded model: pass --model FOLDER")
        return folder
    folder = Path(given)
    if not folder.is_dir():
        raise WaltError(f'--model: there is no folder "{folder}"')
    return folder


def choose_device(name: str) -> torch.device:
    """For "auto" CUDA where there is one, else the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'--device "{name}" cannot be used here: {str(error).splitlines()[0]}') from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """For "auto" bfloat16 where the hardware computes in it (CUDA, AVX512-BF16, AMX), else float32."""
    import torch

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    from walt.linear import has_bfloat16_units

    return torch.bfloat16 if has_bfloat16_units(device) else torch.float32


def load_cascade(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in `folder` as a WaltCascadePipeline on `device`; a base alone becomes a cascade of one stage."""
    from walt.pipelines.loading import load_pipeline
    from walt.pipelines.pipeline_walt import WaltPipeline
    from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline

    quiet()
    pipe = load_pipeline(folder, dtype)
    if isinstance(pipe, WaltPipeline):
        if pipe.tokenizer is None or pipe.text_encoder is None:
            raise WaltError(f'the model "{folder}" takes classes, not prompts: use walt.WaltPipeline')
        parts = dict(pipe.components)
        pipe = WaltCascadePipeline(**parts, transformer_2=None, transformer_3=None)
    if not isinstance(pipe, WaltCascadePipeline):
        raise WaltError(f'the model "{folder}" is a {type(pipe).__name__}; a base or a cascade is needed')
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def quiet() -> None:
    """Keeps the libraries' bars and advice off the terminal."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


# -- walt sample -------------------------------------------------------------------------------------------------------


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to show; several make several files")
    add("--prompts-file", metavar="FILE", help="a text file with one prompt per line")
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="x.mp4 for a video, x.png for a still; numbered if several",
    )
    add("--model", metavar="FOLDER", help="a model folder (default: the embedded model)")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--stages", type=int, choices=(1, 2, 3), help="stages to run (default: all of the model)")
    add("--frames", type=int, metavar="N", help="1, 5, 9, 13, 17, 29, 41, ... (default: 29, or 1 for a still)")
    add("--height", type=int, metavar="PIXELS", help="of the last stage (default: the model's)")
    add("--width", type=int, metavar="PIXELS", help="of the last stage (default: the model's)")
    add(
        "--fps",
        type=float,
        default=8.0,
        help="16: the model's temporal stage doubles the frames; another rate plays the frames faster or slower "
        "(default: 8)",
    )
    add("--seed", type=int, default=0, help="the same seed gives the same video (default: 0)")
    add("--steps", type=int, nargs="+", metavar="N", help="inference steps: one number, or one per stage")
    add("--guidance", type=float, nargs="+", metavar="SCALE", help="guidance scale: one number, or one per stage")
    add("--guidance-rescale", type=float, default=0.0, metavar="PHI", help="0 to 1 (default: 0)")
    add_guidance(add)
    add("--noise-level", type=int, metavar="T", help="noise on the low-resolution input, 0 to 999")
    add("--fidelity", type=float, metavar="F", help="0 to 1: how closely a stage keeps to what it enlarges")
    add(
        "--context-guidance", type=float, default=1.0, metavar="SCALE", help="long videos: how hard later chunks follow"
    )
    add("--context-noise", type=int, default=0, metavar="T", help="long videos: noise on what they follow, 0 to 999")
    add("--anchor-every", type=int, default=0, metavar="N", help="long videos: every N chunks one ends on frame 0")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the fastest right one")


def add_guidance(add: Callable[..., Any]) -> None:
    """The options of `guidance_options`, for every verb that samples."""
    schedules = ("constant", "oscillating", "power-cosine")
    add("--guidance-schedule", choices=schedules, default="constant", help="over the steps (default: constant)")
    add("--guidance-hold", type=int, default=5, metavar="N", help="oscillating: steps at full scale first (default: 5)")
    add("--guidance-low", type=float, default=1.0, metavar="SCALE", help="oscillating: scale in turn (default: 1)")
    add("--guidance-power", type=float, default=4.0, metavar="S", help="power-cosine: weak for longer (default: 4)")
    add("--guidance-start", type=float, metavar="A", help="guide from this share of the way, 0 is noise")
    add("--guidance-stop", type=float, metavar="B", help="to this share, 1 is clean (default of neither: the model's)")
    add("--threshold", type=float, metavar="X", help="bound on predicted latents, in standard deviations")
    add("--threshold-percentile", type=float, metavar="P", help="makes the bound dynamic, such as 0.995")


def guidance_options(args: argparse.Namespace) -> GuidanceOptions:
    """What `add_guidance` read; a WaltError for values that do not fit."""
    from walt.diffusion import GuidanceOptions

    return GuidanceOptions(
        schedule=args.guidance_schedule,
        hold=args.guidance_hold,
        low=args.guidance_low,
        power=args.guidance_power,
        start=args.guidance_start,
        stop=args.guidance_stop,
        threshold=args.threshold,
        percentile=args.threshold_percentile,
    )


def check_schedule(options: GuidanceOptions, scales: Sequence[float]) -> None:
    """Raises a UsageError where a schedule or part of the steps is asked for and no stage is guided, so that it would do
    nothing."""
    if max(scales) > 1:
        return
    given = (
        ("--guidance-schedule", options.schedule, "constant"),
        ("--guidance-start", options.part[0], 0),
        ("--guidance-stop", options.part[1], 1),
    )
    for name, value, plain in given:
        if value != plain:
            raise UsageError(f"{name} {value} does nothing without guidance: give --guidance a scale above 1")


def _sample_prepare(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, so that nothing fails after the long part."""
    from walt.chunking import chunk_starts
    from walt.media import check_fps, check_output, is_image_path

    prompts = [prompt.strip() for prompt in args.prompts]
    if args.prompts_file is not None:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise WaltError(f'--prompts-file: cannot read "{args.prompts_file}": {error}') from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts or not all(prompts):
        raise WaltError('give a prompt: walt sample "a rocket flies up on a purple background" -o rocket.mp4')
    args.prompts = prompts
    args.output = check_output(args.output)
    still = is_image_path(args.output)
    args.frames = (1 if still else 29) if args.frames is None else args.frames
    chunk_starts(args.frames)
    if still and args.frames != 1:
        raise WaltError(
            f'--frames {args.frames} does not go with the still "{args.output}": leave it out or write an .mp4'
        )
    check_fps(args.fps, "--fps")
    if not 0 <= args.guidance_rescale <= 1:
        raise WaltError(f"--guidance-rescale must be from 0 to 1, got {args.guidance_rescale}")
    if not 0 <= args.context_guidance < math.inf:
        raise WaltError(f"--context-guidance must be at least 0 and finite, got {args.context_guidance}")
    if args.anchor_every < 0:
        raise WaltError(f"--anchor-every must be at least 0, got {args.anchor_every}")
    if not 0 <= args.context_noise <= 999:
        raise WaltError(f"--context-noise must be from 0 to 999, got {args.context_noise}")
    if args.noise_level is not None and not 0 <= args.noise_level <= 999:
        raise WaltError(f"--noise-level must be from 0 to 999, got {args.noise_level}")
    if args.fidelity is not None and not 0 <= args.fidelity <= 1:
        raise WaltError(f"--fidelity must be from 0 to 1, got {args.fidelity}")
    if not 0 <= args.seed < 2**63:
        raise WaltError(f"--seed must be from 0 to 2**63 - 1, got {args.seed}")
    for name, values, low in (("--steps", args.steps, 1), ("--guidance", args.guidance, 0)):
        if values is not None and (len(values) > 3 or not all(low <= value < math.inf for value in values)):
            raise WaltError(f"{name} takes one number, or one per stage, of at least {low}, got {values}")
    args.options = guidance_options(args)
    args.model = model_folder(args.model)


@task_commands.stoppable()
def _sample_run(args: argparse.Namespace) -> None:
    import torch

    from walt.data.emoji import FPS

    device = choose_device(args.device)
    pipe = load_cascade(args.model, choose_dtype(args.dtype, device), device)
    try:
        stages, height, width = pipe.check_inputs(args.stages, args.height, args.width, args.frames)
    except WaltError as error:
        raise UsageError(str(error)) from error
    pipe.set_guidance(args.options)
    double = args.fps == 2 * FPS and args.frames > 1
    if double and pipe.temporal_super_resolution is None:
        raise UsageError("--fps 16: this model has no temporal super-resolution stage, it makes 8 frames per second")
    steps = _spread("--steps", args.steps, pipe.default_steps(stages), stages)
    guidance = None if args.guidance is None else _spread("--guidance", args.guidance, None, stages)
    later = pipe.config.super_resolution_guidance_scale
    check_schedule(args.options, guidance or [pipe.config.base_guidance_scale, *[later] * (stages - 1)])
    for number, prompt in enumerate(args.prompts):
        path = args.output
        if len(args.prompts) > 1:
            digits = len(str(len(args.prompts) - 1))
            path = path.with_name(f"{path.stem}-{number:0{digits}d}{path.suffix}")
        call: dict[str, Any] = {
            "negative_prompt": args.negative_prompt,
            "height": height,
            "width": width,
            "num_frames": args.frames,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "guidance_rescale": args.guidance_rescale,
            "noise_level": args.noise_level,
            "fidelity": args.fidelity,
            "stages": stages,
            "generator": torch.Generator().manual_seed(args.seed),
            "double_frame_rate": double,
        }
        long = {
            "context_guidance_scale": args.context_guidance,
            "context_noise_level": args.context_noise,
            "anchor_every": args.anchor_every,
        }
        with _stage_bars(prompt, pipe, steps, args.frames, double) as step:
            pieces = pipe.stream(prompt, callback_on_step_end=step, **call, **long)
            count, _ = task_commands.write(pieces, path, args.fps)
        print(f"{path}: {count} frame{'s' * (count != 1)} of {width}x{height}, seed {args.seed}")


def _spread(name: str, given: list[Any] | None, default: Any, stages: int) -> list[Any]:
    if given is None:
        return list(default)
    if len(given) not in (1, stages):
        raise UsageError(f"{name} takes one number, or {stages} for {stages} stages, got {given}")
    return given * stages if len(given) == 1 else given


@contextmanager
def _stage_bars(prompt: str, pipe: Any, steps: list[int], frames: int, double: bool) -> Iterator[Callable[..., Any]]:
    """A bar per stage; yields what the pipeline takes as `callback_on_step_end`."""
    from walt.chunking import chunk_count

    later = chunk_count(2 * frames - 1 if double else frames)
    rows = [(i + 1, STAGE_NAMES[i], count * (later if i else chunk_count(frames))) for i, count in enumerate(steps)]
    if double:
        rows.insert(1, (0, "frame rate", pipe.config.super_resolution_steps * later))
    with task_commands.bars() as progress:
        progress.console.print(prompt, style="bold", markup=False, highlight=False)
        tasks = {stage: progress.add_task(name, total=total, start=stage == 1) for stage, name, total in rows}

        def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress.start_task(tasks[pipe.current_stage])
            progress.advance(tasks[pipe.current_stage])
            return tensors

        yield step


# -- walt info ---------------------------------------------------------------------------------------------------------


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder (default: the embedded model)")
    parser.add_argument(
        "--frames", type=int, metavar="N", help="of the video to estimate (default: 29, of a NUWA its own)"
    )


def _info_prepare(args: argparse.Namespace) -> None:
    from walt.chunking import chunk_starts

    args.model = model_folder(args.model)
    args.nuwa = nuwa_commands.is_nuwa(args.model)
    if not args.nuwa:
        args.frames = 29 if args.frames is None else args.frames
        chunk_starts(args.frames)


def _info_run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from walt.evaluation.cost import describe

    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    if args.nuwa:
        nuwa_commands.info(args.model, args.frames, dtype, device)
        return
    pipe = load_cascade(args.model, dtype, device)
    facts = describe(pipe, args.frames, device, dtype)
    console = Console()
    console.print(f"{args.model}", markup=False, highlight=False, soft_wrap=True)

    parts = Table("component", "class", "parameters", "size", title="components")
    for part in facts.components:
        parts.add_row(part.name, part.kind, f"{part.parameters:,}", f"{part.megabytes:.1f} MB")
    console.print(parts)

    stages = Table("stage", "frames", "pixels", "latents", "tokens", "layers", "steps", "TFLOP", title="stages")
    for stage in facts.stages:
        stages.add_row(
            stage.name,
            str(args.frames),
            f"{stage.height}x{stage.width}",
            "x".join(map(str, stage.latent)),
            str(stage.tokens),
            str(stage.layers),
            str(stage.steps),
            f"{stage.flops / 1e12:.3g}",
        )
    console.print(stages)

    world = args.model / "world.json"
    if world.is_file():
        from walt.pipelines.loading import read_json

        for key, words in read_json(world).items():
            if key in ("subjects", "backgrounds", "motions"):
                listed = ", ".join(word if isinstance(word, str) else json.dumps(word) for word in words)
                console.print(f"{key} ({len(words)}): {listed}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"estimate for {args.frames} frames on this machine ({device}, {str(dtype).removeprefix('torch.')}, "
        f"{facts.speed / 1e9:.0f} GFLOP/s measured): {facts.seconds:.0f} s, {facts.memory / 2**30:.2f} GiB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


COMMANDS: dict[str, Command] = {
    "sample": Command("Make videos or stills from prompts.", _sample_arguments, _sample_prepare, _sample_run),
    **task_commands.commands(Command),
    "nuwa": Command(
        "Text, sketches or parts of pictures to images and videos.",
        nuwa_commands.add,
        nuwa_commands.prepare,
        nuwa_commands.run,
    ),
    "demo": Command("A local web page over a model.", demo.add, demo.prepare, demo.run),
    "info": Command("Describe a model: shapes, parameters, words, cost.", _info_arguments, _info_prepare, _info_run),
    "train": Command("Run a training recipe.", commands.add_train, commands.load_recipe, commands.train),
    "average": Command(
        "Average a run's weights over another length (post-hoc EMA).",
        commands.add_average,
        commands.average_prepare,
        commands.average,
    ),
    "merge": Command("Average several models' weights.", commands.add_merge, commands.merge_prepare, commands.merge),
    "encode": Command("Precompute a recipe's latents.", commands.add_encode, commands.encode_prepare, commands.encode),
    "data": Command("Fetch and build what training needs.", commands.add_data, commands.nothing, commands.data),
    "evaluate": Command("Measure a model.", commands.add_evaluate, commands.evaluate_prepare, commands.evaluate),
    "export": Command(
        "Join trained parts into a model folder.", commands.add_export, commands.export_prepare, commands.export
    ),
}
