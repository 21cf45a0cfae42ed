"""`walt animate | interpolate | predict | extend | loop | connect | fill | outpaint | edit | upscale`: the tasks of a base
denoiser as commands, one entry of TASKS each.

Like cli.py this file may import anything.
"""

from __future__ import annotations

import argparse
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from walt.errors import Terminated, WaltError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from walt.media import Pixels

Add = Callable[..., Any]


class Task(NamedTuple):
    """One task: its help, its own arguments, whether a picture gives a picture, and what makes its frames at the base
    size."""

    help: str
    arguments: Callable[[Add], None]
    still: bool
    make: Callable[[argparse.Namespace, Any, dict[str, Any]], Any]


class Input(NamedTuple):
    """A file that was read: uint8 `(T, H, W, 3)`, frames per second (None of a picture)."""

    frames: Pixels
    fps: float | None


# -- arguments ---------------------------------------------------------------------------------------------------------


def add(task: str, parser: argparse.ArgumentParser) -> None:
    """The arguments of `walt TASK`."""
    from walt.cli import add_guidance

    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what to show")
    TASKS[task].arguments(add)
    kind = "x.mp4, or x.png of a picture" if TASKS[task].still else "x.mp4"
    add("-o", "--output", required=True, metavar="FILE", help=kind)
    add("--model", metavar="FOLDER", help="a model folder (default: the embedded model)")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--stages", type=int, choices=(1, 2, 3), help="stages to run (default: all of the model)")
    size = (
        f"of the last stage{', before what is added' * (task == 'outpaint')} (default: by the shape of what is given)"
    )
    add("--height", type=int, metavar="PIXELS", help=size)
    add("--width", type=int, metavar="PIXELS", help=size)
    add("--fps", type=float, help="frames per second of the file (default: the video's, or 8)")
    add("--seed", type=int, default=0, help="the same seed gives the same video (default: 0)")
    add("--steps", type=int, metavar="N", help="inference steps of the base stage (default: the model's)")
    add("--guidance", type=float, metavar="SCALE", help="guidance scale of the base stage (default: the model's)")
    add_guidance(add)
    add(
        "--conditioning",
        choices=("model", "repaint"),
        default="model",
        help="model: the denoiser is told what is given; repaint: it is only put in place (default: model)",
    )
    add("--resample-steps", type=int, default=1, metavar="N", help="with repaint: how often a step runs (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the fastest right one")


def add_upscale(parser: argparse.ArgumentParser) -> None:
    """The arguments of `walt upscale`."""
    from walt.cli import add_guidance

    add = parser.add_argument
    add("video", metavar="FILE", help="a video of any length and size, or a picture")
    add("-o", "--output", required=True, metavar="FILE", help="x.mp4, or x.png for a still")
    add("--prompt", metavar="TEXT", help="what it shows, for models whose stages take text")
    add("--scale", type=int, metavar="N", help="2, 4, ... (default: to about the model's own size)")
    add("--model", metavar="FOLDER", help="a model folder (default: the embedded model)")
    add("--noise-level", type=int, metavar="T", help="0 to 999: more trusts the video less (default: the model's)")
    add("--fidelity", type=float, default=1.0, metavar="F", help="0 to 1: less for a noisy or compressed video")
    add("--steps", type=int, metavar="N", help="inference steps of each stage (default: the model's)")
    add("--guidance", type=float, metavar="SCALE", help="guidance scale of each stage (default: the model's)")
    add_guidance(add)
    add("--seed", type=int, default=0, help="the same seed gives the same video (default: 0)")
    add("--fps", type=float, help="frames per second of the file (default: the video's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the fastest right one")


def _video(add: Add) -> None:
    add("video", metavar="FILE", help="a video")


def _animate(add: Add) -> None:
    add("image", metavar="IMAGE", help="the first frame")
    add("--last", metavar="IMAGE", help="the last frame")
    add("--frames", type=int, default=17, metavar="N", help="5, 9, 13, 17, 29, 41, ... (default: 17)")


def _interpolate(add: Add) -> None:
    add("images", nargs="+", metavar="IMAGE", help="two pictures or more, in order")
    add("--at", type=int, nargs="+", metavar="FRAME", help="the frame of each, from 0 on (default: 13 apart)")


def _predict(add: Add) -> None:
    _video(add)
    add("--given", type=int, default=5, metavar="N", help="first frames that are kept: 1, 5, 9 or 13 (default: 5)")
    add("--frames", type=int, default=17, metavar="N", help="of the result: 9, 13, 17, 29, ... (default: 17)")


def _extend(add: Add) -> None:
    _video(add)
    add("--frames", type=int, default=12, metavar="N", help="new frames, any number (default: 12)")
    add("--backward", action="store_true", help="make what comes before, by playing backwards")
    add("--before", action="store_true", help="make what comes before, by a model trained on last frames")


def _loop(add: Add) -> None:
    _video(add)
    add("--frames", type=int, default=8, metavar="N", help="new frames, a multiple of 4 (default: 8)")


def _connect(add: Add) -> None:
    _video(add)
    add("next", metavar="NEXT", help="the video that follows")
    add("--frames", type=int, default=8, metavar="N", help="new frames between, a multiple of 4 (default: 8)")


def _region(add: Add) -> None:
    add("--mask", metavar="FILE", help="a picture or a video of the same size: what is white in it is made anew")
    add("--box", metavar="L,T,R,B", help="instead of a mask: pixels left, top, right, bottom of what is made anew")
    add("--time", metavar="FIRST,LAST", help="only these frames of the mask or box (default: all)")


def _fill(add: Add) -> None:
    add("video", metavar="FILE", help="a video or a picture")
    _region(add)


def _outpaint(add: Add) -> None:
    add("video", metavar="FILE", help="a video or a picture, which is first scaled to the base stage's size")
    for side in ("left", "right", "top", "bottom"):
        add(f"--{side}", type=int, default=0, metavar="PIXELS", help="added there, of the base stage (default: 0)")


def _edit(add: Add) -> None:
    _fill(add)
    add("--strength", type=float, default=0.6, metavar="S", help="0 to 1: more changes more (default: 0.6)")


# -- running -----------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights and reads the inputs."""
    from walt.cli import guidance_options, model_folder
    from walt.media import check_fps, check_output, is_image_path

    args.output = check_output(args.output)
    picture = is_image_path(args.output)
    if picture and args.command in TASKS and not TASKS[args.command].still:
        raise WaltError(f'{args.command} makes a video and "{args.output}" is a picture: write an .mp4')
    if args.fps is not None:
        check_fps(args.fps, "--fps")
    if not 0 <= args.seed < 2**63:
        raise WaltError(f"--seed must be from 0 to 2**63 - 1, got {args.seed}")
    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise WaltError(f"--steps must be from 1 to 1000, got {args.steps}")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise WaltError(f"--guidance must be at least 0 and finite, got {args.guidance}")
    for name in ("height", "width"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise WaltError(f"--{name} must be at least 1 pixel, got {getattr(args, name)}")
    args.options = guidance_options(args)
    if args.command == "upscale":
        from walt.media import probe

        if not 0 <= args.fidelity <= 1:
            raise WaltError(f"--fidelity must be from 0 to 1, got {args.fidelity}")

        if not Path(args.video).is_file():
            raise WaltError(f'there is no file "{args.video}"')
        if args.prompt is not None and not args.prompt.strip():
            raise WaltError("--prompt is empty: say what the video shows, or leave it out for stages that take no text")
        if is_image_path(args.video) != picture:
            raise WaltError(f'"{args.video}" and "{args.output}" must both be videos, or both pictures')
        try:
            args.facts = probe(Path(args.video), Path(args.video).suffix.lower())
        except WaltError as error:
            raise WaltError(f'cannot read "{args.video}": {error}') from error
        if args.facts.kind == "image" and not picture:
            raise WaltError(f'"{args.video}" holds a single picture: give it as .png, .jpg or .webp, and write one')
    else:
        if not args.prompt.strip():
            raise WaltError("the prompt is empty: say what to show")
        for name in ("image", "video", "next", "last", "mask"):
            if getattr(args, name, None) is not None:
                setattr(args, name, _read(getattr(args, name)))
        if picture and len(args.video.frames) > 1:
            raise WaltError(
                f'the video has {len(args.video.frames)} frames and "{args.output}" is a picture: write an .mp4'
            )
        if args.command == "interpolate":
            args.images = [_read(path) for path in args.images]
            places = args.at if args.at is not None else [13 * i for i in range(len(args.images))]
            if len(places) != len(args.images) or places[0] != 0 or sorted(set(places)) != places:
                raise WaltError(
                    f"--at needs one frame for each of the {len(args.images)} pictures, rising from 0, got {places}"
                )
            args.at = places
    args.model = model_folder(args.model)


def _read(path: str) -> Input:
    from walt.media import is_image_path, read_image, read_video

    return Input(read_image(path)[None], None) if is_image_path(path) else Input(*read_video(path))


@contextmanager
def stoppable(message: str = "stopped by SIGTERM: nothing was written") -> Iterator[None]:
    """SIGTERM raises Terminated inside, as Ctrl-C raises KeyboardInterrupt, so that what is half written is removed."""

    def stop(*_: object) -> None:
        raise Terminated(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@stoppable()
def run(args: argparse.Namespace) -> None:
    """Makes the frames with the base stage, enlarges them, and writes them as they come."""
    import torch

    from walt.cli import UsageError, check_schedule, choose_device, choose_dtype, load_cascade
    from walt.pipelines.pipeline_walt_condition import WaltConditionPipeline

    device = choose_device(args.device)
    cascade = load_cascade(args.model, choose_dtype(args.dtype, device), device)
    stages = args.stages or len(cascade.transformers)
    if stages > len(cascade.transformers):
        raise UsageError(f"--stages {stages}: this model has {len(cascade.transformers)}")
    scale = 2 ** (stages - 1)
    pipe = WaltConditionPipeline(
        cascade.tokenizer, cascade.text_encoder, cascade.vae, cascade.transformer, cascade.scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    cascade.set_guidance(args.options)
    pipe.set_guidance(cascade.base_guidance_options)
    call: dict[str, Any] = {
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.steps or cascade.config.base_steps,
        "guidance_scale": cascade.config.base_guidance_scale if args.guidance is None else args.guidance,
        "conditioning": args.conditioning,
        "resample_steps": args.resample_steps,
        "generator": torch.Generator().manual_seed(args.seed),
        "output_type": "pt",
    }
    for name in ("height", "width"):
        side = getattr(args, name)
        if side is not None and side % scale:
            raise UsageError(f"--{name} {side} does not fit {stages} stages: it must be a multiple of {scale}")
        if side is not None:
            call[name] = side // scale
    check_schedule(args.options, [call["guidance_scale"]])
    with _counting(args.command) as step:
        call["callback_on_step_end"] = step
        frames: Tensor = TASKS[args.command].make(args, pipe, call).frames.float().cpu()
        pieces: Iterator[Tensor] = iter([frames])
        if scale > 1:
            pieces = cascade.upscale_stream(
                frames,
                args.prompt,
                scale,
                args.negative_prompt,
                fidelity=cascade.config.fidelity,
                generator=torch.Generator().manual_seed(args.seed),
                callback_on_step_end=step,
            )
        given = getattr(args, "video", None)
        if args.command == "fill" or (args.command == "edit" and _has_region(args)):
            pieces = _keep(args, pieces)
        fps = args.fps or (given.fps if given is not None and given.fps else 8.0)
        count, size = write(pieces, args.output, fps)
    print(f"{args.output}: {count} frame{'s' * (count != 1)} of {size[1]}x{size[0]}, seed {args.seed}")


@stoppable()
def run_upscale(args: argparse.Namespace) -> None:
    """Enlarges a file chunk by chunk: neither the video nor the result is ever held as a whole."""
    import torch

    from walt.cli import check_schedule, choose_device, choose_dtype, load_cascade
    from walt.media import is_image_path, read_image, stream_video

    device = choose_device(args.device)
    cascade = load_cascade(args.model, choose_dtype(args.dtype, device), device)
    cascade.set_guidance(args.options)
    default = cascade.config.super_resolution_guidance_scale
    check_schedule(args.options, [default if args.guidance is None else args.guidance])
    if is_image_path(args.video):
        pieces, fps = iter([read_image(args.video)[None]]), 8.0
    else:
        pieces, fps = stream_video(args.video), args.facts.frames / args.facts.seconds
    with _counting("upscale") as step:
        made = cascade.upscale_stream(
            (_tensor(piece) for piece in pieces),
            args.prompt,
            args.scale,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            noise_level=args.noise_level,
            fidelity=args.fidelity,
            generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=step,
        )
        count, size = write(made, args.output, args.fps or round(fps, 3))
    print(f"{args.output}: {count} frame{'s' * (count != 1)} of {size[1]}x{size[0]}, seed {args.seed}")


def write(pieces: Iterator[Tensor], path: Path, fps: float) -> tuple[int, tuple[int, int]]:
    """Writes `(1, n, 3, H, W)` in [0, 1] as they come; the number of frames and (height, width)."""
    from walt.media import VideoWriter, is_image_path, to_pixels, write_image

    if is_image_path(path):
        image = to_pixels(next(pieces)[0])
        write_image(image[0], path)
        return 1, image.shape[1:3]
    size = (0, 0)
    with VideoWriter(path, fps) as writer:
        for (frames,) in map(to_pixels, pieces):  # no piece is held while the next one is made
            size = frames.shape[1:3]
            writer.add(frames)
    return writer.count, size


def _tensor(frames: Pixels) -> Tensor:
    import torch

    return torch.tensor(frames).permute(0, 3, 1, 2)[None].float() / 255


def _mask(args: argparse.Namespace) -> Any:
    """`(T, H, W)` float, 1 where the video is made anew."""
    import torch

    frames, height, width = args.video.frames.shape[:3]
    if (args.mask is None) == (args.box is None):
        raise WaltError("say what is made anew: give --mask or --box, one of them")
    if args.box is not None:
        numbers = _numbers("--box", args.box, 4)
        left, top, right, bottom = numbers
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise WaltError(f"--box {args.box} does not lie in the {width}x{height} pixels of the video")
        mask = torch.zeros(frames, height, width)
        mask[:, top:bottom, left:right] = 1
    else:
        mask = _tensor(args.mask.frames)[0].mean(1)
        if tuple(mask.shape[1:]) != (height, width) or len(mask) not in (1, frames):
            raise WaltError(
                f"--mask has {len(mask)} frames of {mask.shape[2]}x{mask.shape[1]}, the video {frames} of {width}x{height}: "
                "give one picture or as many frames, of the same size"
            )
        mask = mask.expand(frames, -1, -1).clone()
    if args.time is not None:
        first, last = _numbers("--time", args.time, 2)
        if not 0 <= first <= last < frames:
            raise WaltError(f"--time {args.time} does not lie in the {frames} frames of the video (0 to {frames - 1})")
        mask[:first], mask[last + 1 :] = 0, 0
    return mask


def _has_region(args: argparse.Namespace) -> bool:
    """Whether an edit has a region; for --time alone `_mask` asks for more."""
    return any(value is not None for value in (args.mask, args.box, args.time))


def _numbers(name: str, text: str, count: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise WaltError(f"{name} takes {count} whole numbers with commas between, got {text!r}")
    return numbers


def _keep(args: argparse.Namespace, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """The pieces with the given pixels, at their size, wherever nothing is made anew."""
    import torch

    from walt.pipelines.conditions import fit

    start, mask = 0, _mask(args)
    for piece in pieces:
        end, (height, width) = start + piece.shape[1], piece.shape[-2:]
        given = fit(_tensor(args.video.frames[start:end]).transpose(1, 2), height, width).transpose(1, 2)
        new = fit((mask[None, None, start:end] > 0.5).float(), height, width).transpose(1, 2) > 1e-3
        start = end
        yield torch.where(new, piece.cpu().float(), given)


def bars() -> Progress:
    """Progress bars on the terminal (stderr), for a `with` block."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _counting(name: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """A bar that counts denoising steps; yields what a pipeline takes as `callback_on_step_end`."""
    with bars() as progress:
        task = progress.add_task(name, total=None)

        def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress.advance(task)
            return {}

        yield step


def _image(given: Input) -> Any:
    if given.fps is not None:
        raise WaltError(f"a picture is needed, not a video of {len(given.frames)} frames")
    return given.frames[0]


def _make_animate(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    last = None if args.last is None else _image(args.last)
    return pipe(args.prompt, image=_image(args.image), last_image=last, num_frames=args.frames, **call)


def _make_interpolate(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    keyframes = {place: _image(given) for place, given in zip(args.at, args.images, strict=True)}
    return pipe.interpolate(keyframes, args.prompt, **call)


def _make_predict(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    if not 1 <= args.given <= len(args.video.frames):
        raise WaltError(f"--given must be from 1 to the video's {len(args.video.frames)} frames, got {args.given}")
    return pipe(args.prompt, video=args.video.frames[: args.given], num_frames=args.frames, **call)


def _make_extend(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    if args.backward and args.before:
        raise WaltError("--backward and --before are two ways to make what comes before: give one")
    direction = "backward" if args.backward or args.before else "forward"
    return pipe.extend(
        args.video.frames, args.prompt, args.frames, direction=direction, reverse=not args.before, **call
    )


def _make_loop(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    return pipe.loop(args.video.frames, args.prompt, args.frames, **call)


def _make_connect(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    return pipe.connect(args.video.frames, args.next.frames, args.prompt, args.frames, **call)


def _make_fill(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    return pipe(args.prompt, video=args.video.frames, mask_video=_mask(args), **call)


def _make_outpaint(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    size = pipe.result_size(args.video.frames, call.pop("height", None), call.pop("width", None))
    sides = {side: getattr(args, side) for side in ("left", "right", "top", "bottom")}
    from walt.pipelines.conditions import fit

    video = fit(_tensor(args.video.frames).transpose(1, 2), *size).transpose(1, 2)
    return pipe.outpaint(video, args.prompt, **sides, **call)


def _make_edit(args: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> Any:
    mask = _mask(args) if _has_region(args) else None
    return pipe(args.prompt, video=args.video.frames, mask_video=mask, strength=args.strength, **call)


TASKS: dict[str, Task] = {
    "animate": Task("Make a picture move; with --last, towards another one.", _animate, False, _make_animate),
    "interpolate": Task("Make a video through pictures.", _interpolate, False, _make_interpolate),
    "predict": Task("Keep the first frames of a video and make the others anew.", _predict, False, _make_predict),
    "extend": Task("Make what comes after a video, or before it.", _extend, False, _make_extend),
    "loop": Task("Lead a video from its end back to its beginning.", _loop, False, _make_loop),
    "connect": Task("Lead from one video to another.", _connect, False, _make_connect),
    "fill": Task("Make a region of a video or picture anew.", _fill, True, _make_fill),
    "outpaint": Task("Make a video or picture larger than its frame.", _outpaint, True, _make_outpaint),
    "edit": Task("Change a video or picture to a new prompt.", _edit, True, _make_edit),
}


def commands(command: Callable[..., Any]) -> dict[str, Any]:
    """The entries of walt's COMMANDS, made by its type `command`."""
    entries = {name: command(task.help, partial(add, name), prepare, run) for name, task in TASKS.items()}
    help_ = "Enlarge a video of any length and size."
    return {**entries, "upscale": command(help_, add_upscale, prepare, run_upscale)}
