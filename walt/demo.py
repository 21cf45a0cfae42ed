"""`walt demo`: a local web page over a model folder (Gradio), one entry of TASKS per tab.

The page has three parts. TASKS says what each tab asks for and how it is made; `Studio` checks a request, runs it and
keeps its files, knowing nothing of Gradio; demo_page.py lays the page out. Like cli.py these files may import anything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from walt.chunking import chunk_starts
from walt.errors import WaltError
from walt.task_commands import stoppable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from walt.diffusion import GuidanceOptions
    from walt.media import Pixels

EXTRA = "demo"
FPS = 8  # of every file that is read or written
MAX_SEED = 2**31 - 1  # a browser's numbers are exact up to 2**53


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    frames: int = 480
    side: int = 1024
    steps: int = 100
    upload_megabytes: int = 64


@dataclass(frozen=True)
class Request:
    """A checked request: `files` and `choices` hold what the task's own fields were given, by the field's name.

    `height` and `width` are those of the last of `stages`; `steps` and `guidance` have one number per stage, `later_steps`
    is that of every super-resolution stage. `most` and `side` are the limits on frames and pixels a side; `options` say
    how guidance is spread over the steps and bounded.
    """

    prompt: str
    negative_prompt: str | None
    stages: int
    height: int
    width: int
    frames: int
    seed: int
    steps: list[int]
    later_steps: int
    guidance: list[float]
    options: GuidanceOptions
    most: int
    side: int
    files: dict[str, Path] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def base_size(self) -> tuple[int, int]:
        """Height and width of the first stage."""
        down = 2 ** (self.stages - 1)
        return self.height // down, self.width // down

    @property
    def fps(self) -> int:
        """Frames per second of the result."""
        return int(self.choices.get("fps", FPS))

    def clip(self, name: str) -> Pixels:
        """The upload of a field, at the size of the first stage: uint8 `(T, H, W, 3)`."""
        return read_clip(self.files[name], self.most, self.base_size)


Step = Callable[..., Any]
Make = Callable[[Any, Request, Step], "Iterator[Tensor]"]


class Field(NamedTuple):
    """One input that a task has for itself."""

    kind: str  # "image" or "video" (a file), "number" (low, high, default, step), "choice" (values)
    label: str
    needed: bool = True  # whether the task must be given it
    options: tuple[Any, ...] = ()
    lacks: Callable[[Any], str | None] | None = None  # why a model has no choice here: its first option holds


def _always(pipe: Any) -> bool:
    return True


class Task(NamedTuple):
    """One tab.

    `lacks(pipe)` is why this model cannot do it, or None; `make(cascade, request, step)` yields the frames in pieces
    `(n, 3, H, W)` in [0, 1], calling `step` after every denoising step as diffusers' `callback_on_step_end`.
    """

    title: str
    help: str
    fields: dict[str, Field]
    lacks: Callable[[Any], str | None]
    make: Make
    told: Callable[[Any], bool] = _always  # whether this model is told in words
    length: bool = True  # whether the number of frames is chosen
    size: bool = True  # whether the size is chosen


class Cancelled(Exception):
    """The person pressed the button."""


# -- tasks -------------------------------------------------------------------------------------------------------------


def _nothing(pipe: Any) -> str | None:
    return None


def _no_upscaling(pipe: Any) -> str | None:
    return None if len(pipe.transformers) > 1 else "this model has no super-resolution stage"


def _stages_take_text(pipe: Any) -> bool:
    return any(model.config.text_dim is not None for model in pipe.transformers[1:])


def _no_frames(pipe: Any) -> str | None:
    if pipe.transformer.config.frame_conditioning:
        return None
    return "this model's base was built with frame_conditioning=False and cannot be told what is given"


def _no_doubling(pipe: Any) -> str | None:
    return None if pipe.temporal_super_resolution is not None else "this model has no temporal super-resolution stage"


def _text(pipe: Any, request: Request, step: Step) -> Iterator[Tensor]:
    yield from _stream(pipe, request, step, request.frames)


def _long(pipe: Any, request: Request, step: Step) -> Iterator[Tensor]:
    from walt.chunking import fitting_frames

    frames = int(request.choices["seconds"] * FPS)
    if frames > request.most:
        raise WaltError(f"at most {request.most} frames ({request.most / FPS:.0f} s) are made here, got {frames}")
    context = {"context_noise_level": int(request.choices["noise"])}
    left = int(request.choices["seconds"] * request.fps)
    for piece in _stream(pipe, request, step, fitting_frames(frames), **context):
        if left > 0:
            yield piece[:left]
        left -= len(piece)


def _stream(pipe: Any, request: Request, step: Step, frames: int, **context: Any) -> Iterator[Tensor]:
    pieces = pipe.stream(
        request.prompt,
        num_frames=frames,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        stages=request.stages,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=_generator(request),
        callback_on_step_end=step,
        double_frame_rate=request.fps > FPS,
        **context,
    )
    for piece in pieces:
        yield piece[0]


def _generator(request: Request) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(request.seed)


def _conditioned(make: Callable[[Any, Request, dict[str, Any]], Any]) -> Make:
    """A task of the base pipeline (`make(pipeline, request, arguments)`), enlarged to the size asked for."""

    def whole(pipe: Any, request: Request, step: Step) -> Iterator[Tensor]:
        from walt.pipelines.pipeline_walt_condition import WaltConditionPipeline

        base = WaltConditionPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.transformer, pipe.scheduler)
        base.set_progress_bar_config(disable=True)
        base.set_guidance(pipe.base_guidance_options)
        call = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.base_size[0],
            "width": request.base_size[1],
            "num_inference_steps": request.steps[0],
            "guidance_scale": request.guidance[0],
            "generator": _generator(request),
            "callback_on_step_end": step,
            "output_type": "pt",
        }
        frames = make(base, request, call).frames
        if request.stages == 1:
            yield frames[0]
            return
        yield from _enlarge(pipe, request, step, frames, 2 ** (request.stages - 1), pipe.config.fidelity)

    return whole


def _enlarge(
    pipe: Any, request: Request, step: Step, video: Any, scale: int, fidelity: float = 1.0
) -> Iterator[Tensor]:
    pieces = pipe.upscale_stream(
        video,
        request.prompt or None,
        scale=scale,
        fidelity=fidelity,
        num_inference_steps=request.later_steps,
        generator=_generator(request),
        callback_on_step_end=step,
    )
    for piece in pieces:
        yield piece[0]


def _image(base: Any, request: Request, call: dict[str, Any]) -> Any:
    return base(image=request.clip("image")[0], num_frames=request.frames, **call)


def _keyframes(base: Any, request: Request, call: dict[str, Any]) -> Any:
    last = request.frames - 1
    if last < 2:
        raise WaltError("keyframes need a longer video: choose at least 5 frames")
    places = {0: request.clip("first")[0], last: request.clip("last")[0]}
    if "middle" in request.files:
        places[last // 2] = request.clip("middle")[0]
    return base.interpolate(places, **call)


def _continue(base: Any, request: Request, call: dict[str, Any]) -> Any:
    video, new, how = request.clip("video"), int(request.choices["new"]), request.choices["how"]
    if how == "Loop":
        return base.loop(video, num_frames=new, **call)
    if how == "Connect":
        if "next" not in request.files:
            raise WaltError("Connect: give the second video too")
        return base.connect(video, request.clip("next"), num_frames=new, **call)
    return base.extend(video, num_frames=new, direction=how.lower(), **call)


def _fill(base: Any, request: Request, call: dict[str, Any]) -> Any:
    import numpy as np

    video = request.clip("video")
    if "mask" in request.files:
        mask = request.clip("mask")[0].mean(axis=-1) > 127
    else:
        left, right, top, bottom = (request.choices[side] / 100 for side in ("left", "right", "top", "bottom"))
        if not (left < right and top < bottom):
            raise WaltError("the box is empty: its left must be below its right, and its top below its bottom")
        height, width = request.base_size
        mask = np.zeros((height, width), bool)
        mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    if request.choices["where"] == "outside":
        mask = ~mask
    return base(video=video, mask_video=mask, **call)


def _edit(base: Any, request: Request, call: dict[str, Any]) -> Any:
    return base(video=request.clip("video"), strength=float(request.choices["strength"]), **call)


def _upscale(pipe: Any, request: Request, step: Step) -> Iterator[Tensor]:
    scale = int(request.choices["scale"])
    video = read_clip(request.files["video"], request.most, None, request.side // scale)
    yield from _enlarge(pipe, request, step, video, scale)


RATE = Field("choice", "Frames per second", options=(FPS, 2 * FPS), lacks=_no_doubling)

TASKS: dict[str, Task] = {
    "text": Task(
        "Text",
        "A prompt becomes a video, or a still when its length is one frame.",
        {"fps": RATE},
        _nothing,
        _text,
    ),
    "image": Task(
        "Image",
        "A picture is the first frame; the prompt says what happens.",
        {"image": Field("image", "Picture")},
        _no_frames,
        _conditioned(_image),
    ),
    "keyframes": Task(
        "Keyframes",
        "A video through your pictures: at its start, in the middle if you like, and at its end.",
        {
            "first": Field("image", "First frame"),
            "middle": Field("image", "Middle frame", needed=False),
            "last": Field("image", "Last frame"),
        },
        _no_frames,
        _conditioned(_keyframes),
    ),
    "continue": Task(
        "Continue",
        "What comes after your video, or before it; back to its beginning as a seamless loop; or on to a second video.",
        {
            "video": Field("video", "Video"),
            "next": Field("video", "Second video, to connect to", needed=False),
            "how": Field("choice", "How", options=("Forward", "Backward", "Loop", "Connect")),
            "new": Field("number", "New frames", options=(4, 48, 12, 4)),
        },
        _no_frames,
        _conditioned(_continue),
        length=False,
    ),
    "fill": Task(
        "Fill",
        "A region of your video is made anew: a box in percent of the frame, or the white part of a mask.",
        {
            "video": Field("video", "Video"),
            "mask": Field("image", "Mask", needed=False),
            "left": Field("number", "Left %", options=(0, 100, 25, 1)),
            "right": Field("number", "Right %", options=(0, 100, 75, 1)),
            "top": Field("number", "Top %", options=(0, 100, 25, 1)),
            "bottom": Field("number", "Bottom %", options=(0, 100, 75, 1)),
            "where": Field("choice", "Made anew", options=("inside", "outside")),
        },
        _no_frames,
        _conditioned(_fill),
        length=False,
    ),
    "edit": Task(
        "Edit",
        "Your video is changed towards the prompt: a higher strength changes more.",
        {"video": Field("video", "Video"), "strength": Field("number", "Strength", options=(0.05, 1.0, 0.6, 0.05))},
        _nothing,
        _conditioned(_edit),
        length=False,
    ),
    "upscale": Task(
        "Upscale",
        "Your video at a larger size, without tiles or seams.",
        {"video": Field("video", "Video"), "scale": Field("choice", "Times", options=(2, 4))},
        _no_upscaling,
        _upscale,
        told=_stages_take_text,
        length=False,
        size=False,
    ),
    "long": Task(
        "Long",
        "A long video, each part seeing the end of the one before. Noise on what it sees slows drift.",
        {
            "seconds": Field("number", "Seconds", options=(2, 60, 10, 1)),
            "noise": Field("number", "Noise on the context", options=(0, 500, 0, 10)),
            "fps": RATE,
        },
        _no_frames,
        _long,
        length=False,
    ),
}


def read_clip(path: Path, frames: int, size: tuple[int, int] | None, side: int = 0) -> Pixels:
    """The first `frames` frames of an upload at 8 per second; all of a shorter video, and the one of a picture.

    Args:
        size: height and width it is scaled and cut to; None for its own, cut to multiples of 16.
        side: with `size` None the longest side it may have, 0 for any.

    Returns:
        uint8 `(T, H, W, 3)`.
    """
    from walt.media import MEDIA_SOURCES, probe, read_window

    suffix = path.suffix.lower()
    if suffix not in MEDIA_SOURCES:
        raise WaltError(f'cannot read "{path.name}": its name must end in {", ".join(MEDIA_SOURCES)}')
    try:
        facts = probe(path, suffix)
        if size is None:
            size = (facts.height // 16 * 16, facts.width // 16 * 16)
            if 0 in size:
                raise WaltError(f"{facts.width}x{facts.height} pixels are too few: at least 16x16 are needed")
            if side and max(size) > side:
                raise WaltError(
                    f"{facts.width}x{facts.height} pixels are too many: up to {side} a side are enlarged here"
                )
        count = max(1, min(frames, int(facts.seconds * FPS + 1e-6)))
        return read_window(path, suffix, [k / FPS for k in range(count)], size)
    except WaltError as error:
        raise WaltError(f'cannot use "{path.name}": {error}') from error


def allowed_frames(most: int) -> list[int]:
    """Every number of frames that a video can have, up to `most`."""

    def fits(count: int) -> bool:
        try:
            return bool(chunk_starts(count))
        except WaltError:
            return False

    return [count for count in range(1, most + 1) if fits(count)]


def example_prompts(words: dict[str, Any], count: int = 6) -> list[str]:
    """Sentences of the world that a model knows; none for a model without world.json."""
    lists = [
        [word for word in words.get(key, []) if isinstance(word, str)] for key in ("subjects", "motions", "backgrounds")
    ]
    subjects, motions, backgrounds = lists
    if not (subjects and motions and backgrounds):
        return []

    def pick(words: list[str], i: int, stride: int) -> str:
        return words[(1 + i * stride) % len(words)]

    return [
        f"a {pick(subjects, i, 1)} {pick(motions, i, 5)} on a {pick(backgrounds, i, 3)} background"
        for i in range(count)
    ]


# -- the studio --------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """A finished file and what is said about it."""

    path: Path
    still: bool
    caption: str


class Studio:
    """Runs requests one at a time, within `limits`; results are files in `folder`."""

    def __init__(self, pipe: Any, limits: Limits, folder: Path) -> None:
        self.pipe = pipe
        self.limits = limits
        self.folder = folder
        self._one = threading.Lock()  # a pipeline keeps the state of its call on itself
        self._stops: dict[str, threading.Event] = {}

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """By label (stages, height, width): every stage as landscape, square and portrait, where it fits."""
        result = {}
        for stages in range(len(self.pipe.transformers), 0, -1):
            height, width = self.pipe.default_size(stages)
            multiple = self.pipe.size_multiple(stages)
            for high, wide in dict.fromkeys(((height, width), (height, height), (width, height))):
                if max(high, wide) <= self.limits.side and not (high % multiple or wide % multiple):
                    result[f"{wide} x {high}"] = (stages, high, wide)
        return result

    def check(
        self,
        task: str,
        given: dict[str, Any],
        prompt: str,
        negative_prompt: str,
        size: str,
        frames: int,
        seed: float,
        steps: float,
        later_steps: float,
        guidance: float,
        schedule: str = "constant",
        hold: float = 5,
        low: float = 1.0,
        power: float = 4.0,
        start: float | None = None,
        stop: float | None = None,
        threshold: float = 0.0,
        percentile: float = 0.0,
    ) -> Request:
        """A Request from the page's values, `given` those of the task's own fields.

        Those from `schedule` on are the fields of a `GuidanceOptions`; 0 is no threshold, and no percentile, and the
        model's own start and stop are those of its base alone, as None. They may come from any program: a WaltError for
        what is not allowed.
        """
        from walt.diffusion import GuidanceOptions

        limits = self.limits
        if task not in TASKS:
            raise WaltError(f'there is no task "{task}"')
        if lacks := TASKS[task].lacks(self.pipe):
            raise WaltError(f"{TASKS[task].title}: {lacks}")
        if not isinstance(prompt, str) or (TASKS[task].told(self.pipe) and not prompt.strip()):
            raise WaltError("write a prompt first")
        if size not in self.sizes:
            raise WaltError(f'there is no size "{size}"; there are {", ".join(self.sizes)}')
        stages, height, width = self.sizes[size]
        whole("frames", frames, 1, limits.frames)
        chunk_starts(int(frames))
        whole("seed", seed, 0, MAX_SEED)
        for name, value in (("steps", steps), ("super-resolution steps", later_steps)):
            whole(name, value, 1, limits.steps)
        if not isinstance(guidance, int | float) or not 0 <= guidance <= 30:
            raise WaltError(f"guidance must be from 0 to 30, got {guidance}")
        whole("steps at full guidance", hold, 0, limits.steps)
        for name, value, most in (
            ("low guidance", low, 30),
            ("power", power, 100),
            ("start", 0 if start is None else start, 1),
            ("stop", 1 if stop is None else stop, 1),
            ("threshold", threshold, 100),
            ("percentile", percentile, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise WaltError(f"{name} must be from 0 to {most}, got {value}")
        if (start, stop) == (self.pipe.config.base_guidance_start, self.pipe.config.base_guidance_stop):
            start = stop = None
        bounds = {"threshold": threshold or None, "percentile": percentile or None}
        options = GuidanceOptions(schedule, int(hold), low, power, start, stop, **bounds)  # type: ignore[arg-type]
        files, choices = self._fields(TASKS[task], given)
        scale = float(self.pipe.config.super_resolution_guidance_scale)
        return Request(
            prompt=prompt.strip(),
            negative_prompt=(negative_prompt or "").strip() or None,
            stages=stages,
            height=height,
            width=width,
            frames=int(frames),
            seed=int(seed),
            steps=[int(steps)] + [int(later_steps)] * (stages - 1),
            later_steps=int(later_steps),
            guidance=[float(guidance)] + [scale] * (stages - 1),
            options=options,
            most=limits.frames,
            side=limits.side,
            files=files,
            choices=choices,
        )

    def _fields(self, task: Task, given: dict[str, Any]) -> tuple[dict[str, Path], dict[str, Any]]:
        files: dict[str, Path] = {}
        choices: dict[str, Any] = {}
        for name, field_ in task.fields.items():
            value = given.get(name)
            if field_.kind in ("image", "video"):
                if value is not None:
                    files[name] = Path(value)
                elif field_.needed:
                    raise WaltError(f"{task.title}: give the {field_.label.lower()} first")
            elif field_.kind == "choice":
                if field_.lacks is not None and value != field_.options[0] and (lacks := field_.lacks(self.pipe)):
                    raise WaltError(f"{field_.label}: {lacks}")
                if value not in field_.options:
                    raise WaltError(f"{field_.label} must be one of {', '.join(map(str, field_.options))}, got {value}")
                choices[name] = value
            else:
                low, high, _, _ = field_.options
                if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                    raise WaltError(f"{field_.label} must be from {low} to {high}, got {value}")
                choices[name] = value
        return files, choices

    def run(self, session: str, task: str, request: Request, report: Callable[[int, int, str], None]) -> Result:
        """Makes what is asked for; raises Cancelled soon after `cancel(session)`."""
        from walt.media import VideoWriter, to_pixels, write_image

        stop = self._stops[session] = threading.Event()

        def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                raise Cancelled
            stage = getattr(pipe, "current_stage", None)
            name = {None: "base", 0: "frame rate"}.get(stage, f"stage {stage}")
            report(index + 1, max(pipe.num_timesteps, index + 1), name)
            return tensors

        folder = self.folder / secrets.token_hex(16)
        try:
            with self._one:
                if stop.is_set():
                    raise Cancelled
                start = time.perf_counter()
                self.pipe.set_guidance(request.options)
                pieces = map(to_pixels, TASKS[task].make(self.pipe, request, step))
                first, second = next(pieces), next(pieces, None)
                still = len(first) == 1 and second is None
                height, width = first.shape[1:3]
                path = folder / f"walt-{task}-{request.seed}{'.png' if still else '.mp4'}"
                folder.mkdir(parents=True)
                if still:
                    write_image(first[0], path)
                    length = "a still of"
                else:
                    with VideoWriter(path, request.fps) as writer:
                        for piece in chain([first], [] if second is None else [second], pieces):
                            writer.add(piece)
                    length = f"{writer.count} frames, {writer.count / request.fps:.1f} s, of"
                seconds = time.perf_counter() - start
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]
        return Result(path, still, f"{length} {width} x {height}, seed {request.seed}, made in {seconds:.1f} s")

    def cancel(self, session: str) -> bool:
        """Stops the running request of a session at its next step; whether there was one."""
        stop = self._stops.get(session)
        if stop is not None:
            stop.set()
        return stop is not None


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Raises a WaltError unless `value` is a whole number from `low` to `high` (a browser may send 3.0 for 3)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        raise WaltError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


# -- walt demo ---------------------------------------------------------------------------------------------------------


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `walt demo`."""
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a model folder (default: the embedded model)")
    add(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network (default: 127.0.0.1)"
    )
    add("--port", type=int, default=7860, help="port to listen on; 0 picks a free one (default: 7860)")
    add("--max-frames", type=int, default=Limits.frames, metavar="N", help=f"per video (default: {Limits.frames})")
    add("--max-side", type=int, default=Limits.side, metavar="PIXELS", help=f"(default: {Limits.side})")
    add("--max-steps", type=int, default=Limits.steps, metavar="N", help=f"per stage (default: {Limits.steps})")
    add(
        "--max-upload",
        type=int,
        default=Limits.upload_megabytes,
        metavar="MB",
        help=f"per file (default: {Limits.upload_megabytes})",
    )
    add("--open", action="store_true", help="open the page in a browser")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the fastest right one")


def prepare(args: argparse.Namespace) -> None:
    """Checks what needs no weights."""
    from importlib.util import find_spec

    from walt.cli import model_folder

    if find_spec("gradio") is None:
        raise WaltError(f'walt demo needs the extra "{EXTRA}": pip install "walt[{EXTRA}]"')
    for name, value in (
        ("--max-frames", args.max_frames),
        ("--max-side", args.max_side),
        ("--max-steps", args.max_steps),
        ("--max-upload", args.max_upload),
    ):
        if value < 1:
            raise WaltError(f"{name} must be at least 1, got {value}")
    if not 0 <= args.port < 2**16:
        raise WaltError(f"--port must be from 0 to 65535, got {args.port}")
    args.model = model_folder(args.model)


@stoppable("stopped by SIGTERM")
def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C or SIGTERM; what was uploaded and made is removed either way."""
    from walt.cli import choose_device, choose_dtype, load_cascade

    device = choose_device(args.device)
    pipe = load_cascade(args.model, choose_dtype(args.dtype, device), device)
    limits = Limits(args.max_frames, args.max_side, args.max_steps, args.max_upload)
    with serving(pipe, args.model, limits, args.host, args.port, browser=args.open) as address:
        print(f"walt demo: {address} (Ctrl-C ends it)", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"anyone who reaches {args.host} can use it: there is no password", flush=True)
        threading.Event().wait()


@contextlib.contextmanager
def serving(
    pipe: Any, model: Path, limits: Limits, host: str = "127.0.0.1", port: int = 0, browser: bool = False
) -> Iterator[str]:
    """Serves a page for `pipe`, whose files are in `model`; yields its address, and cleans up at the end."""
    from walt.pipelines.loading import read_json

    with tempfile.TemporaryDirectory(prefix="walt-demo-") as temporary, _environment(temporary):
        from walt.demo_page import build_page, launch

        words = read_json(model / "world.json") if (model / "world.json").is_file() else {}
        page = build_page(Studio(pipe, limits, Path(temporary) / "made"), words)
        try:
            yield launch(page, model, Path(temporary), limits, host, port, browser)
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Gradio reads these: where uploads and results go, and that nothing is reported."""
    values = {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_EXAMPLES_CACHE": str(Path(folder) / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
