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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from walt.chunking import chunk_starts
from walt.errors import WaltError

if TYPE_CHECKING:
    from torch import Tensor

    from walt.media import Pixels

EXTRA = "demo"
FPS = 8  # of every file that is read or written
MAX_SEED = 2**31 - 1  # a browser's numbers are exact up to 2**53


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    frames: int = 125
    side: int = 1024
    steps: int = 100
    upload_megabytes: int = 64


@dataclass(frozen=True)
class Request:
    """A checked request: `files` and `choices` hold what the task's own fields were given, by the field's name."""

    prompt: str
    negative_prompt: str | None
    stages: int
    height: int
    width: int
    frames: int
    seed: int
    steps: list[int]
    guidance: list[float]
    files: dict[str, Path] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)


class Field(NamedTuple):
    """One input that a task has for itself: what kind it is, its label, and whether the task needs it."""

    kind: str  # "image" or "video" (a file), "number" (low, high, default), "choice" (names)
    label: str
    needed: bool = True
    options: tuple[Any, ...] = ()


class Task(NamedTuple):
    """One tab.

    `lacks(pipe)` is why this model cannot do it, or None; `make(pipe, request, step)` returns frames
    `(T, 3, H, W)` in [0, 1], calling `step` after every denoising step as diffusers' `callback_on_step_end`.
    """

    title: str
    help: str
    fields: dict[str, Field]
    lacks: Callable[[Any], str | None]
    make: Callable[[Any, Request, Callable[..., Any]], Tensor]
    prompt: bool = True  # whether it is told in words
    size: bool = True  # whether frames, stages and shape are chosen


class Cancelled(Exception):
    """The person pressed the button."""


# -- tasks -------------------------------------------------------------------------------------------------------------


def _nothing(pipe: Any) -> str | None:
    return None


def _no_upscaling(pipe: Any) -> str | None:
    return None if len(pipe.transformers) > 1 else "this model has no super-resolution stage"


def _settings(request: Request, step: Callable[..., Any]) -> dict[str, Any]:
    """What every call is told."""
    import torch

    return {
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "pt",
        "callback_on_step_end": step,
    }


def _told(request: Request, step: Callable[..., Any]) -> dict[str, Any]:
    """`_settings` and what a cascade is told in words, sizes and numbers."""
    return {
        **_settings(request, step),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "stages": request.stages,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }


def _text(pipe: Any, request: Request, step: Callable[..., Any]) -> Tensor:
    frames: Tensor = pipe(**_told(request, step)).frames[0]
    return frames


def _upscale(pipe: Any, request: Request, step: Callable[..., Any]) -> Tensor:
    import torch

    from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline

    video = read_clip(request.files["video"], request.frames, None)
    times = int(request.choices["times"])
    frames = torch.from_numpy(video).permute(0, 3, 1, 2)[None].float() / 255
    for number in range(times):
        transformer = pipe.transformers[min(number + 1, len(pipe.transformers) - 1)]
        stage = WaltSuperResolutionPipeline(pipe.vae, transformer, pipe.scheduler)
        stage.set_progress_bar_config(disable=True)
        frames = stage(
            video=frames,
            noise_level=pipe.config.noise_level,
            num_inference_steps=pipe.config.super_resolution_steps,
            **_settings(request, step),
        ).frames
    return frames[0]


TASKS: dict[str, Task] = {
    "text": Task(
        "Text to video",
        "A prompt becomes a video, or a still when there is one frame.",
        {},
        _nothing,
        _text,
    ),
    "upscale": Task(
        "Upscale",
        "Your video, at twice the size per stage.",
        {"video": Field("video", "Video"), "times": Field("choice", "Doublings", options=(1, 2))},
        _no_upscaling,
        _upscale,
        prompt=False,
        size=False,
    ),
}


def read_clip(path: Path, frames: int, size: tuple[int, int] | None) -> Pixels:
    """The first `frames` frames at 8 per second (fewer, but an allowed number, where the video is shorter).

    Args:
        path: an upload.
        frames: at most.
        size: height and width it is scaled and cut to; None for its own, cut to multiples of 16.

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
        there = max(1, min(frames, int(facts.seconds * FPS)))
        return read_window(path, suffix, [k / FPS for k in range(allowed_frames(there)[-1])], size)
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
                    shape = "square" if high == wide else "portrait" if high > wide else "landscape"
                    result[f"{wide} x {high} {shape}"] = (stages, high, wide)
        return result

    def check(
        self,
        task: str,
        prompt: str,
        negative_prompt: str,
        size: str,
        frames: int,
        seed: float,
        steps: float,
        later_steps: float,
        guidance: float,
        given: dict[str, Any],
    ) -> Request:
        """A Request from the page's values. They may come from any program: a WaltError for what is not allowed."""
        limits = self.limits
        if task not in TASKS:
            raise WaltError(f'there is no task "{task}"')
        if lacks := TASKS[task].lacks(self.pipe):
            raise WaltError(f"{TASKS[task].title}: {lacks}")
        if not isinstance(prompt, str) or (TASKS[task].prompt and not prompt.strip()):
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
        files, choices = self._fields(TASKS[task], given)
        scale = float(self.pipe.config.super_resolution_guidance_scale)
        return Request(
            prompt=prompt.strip(),
            negative_prompt=(negative_prompt or "").strip() or None,
            stages=stages,
            height=height,
            width=width,
            frames=int(frames) if TASKS[task].size else limits.frames,
            seed=int(seed),
            steps=[int(steps)] + [int(later_steps)] * (stages - 1),
            guidance=[float(guidance)] + [scale] * (stages - 1),
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
                if value not in field_.options:
                    raise WaltError(f"{field_.label} must be one of {', '.join(map(str, field_.options))}, got {value}")
                choices[name] = value
            else:
                low, high, _ = field_.options
                if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                    raise WaltError(f"{field_.label} must be from {low} to {high}, got {value}")
                choices[name] = value
        return files, choices

    def run(self, session: str, task: str, request: Request, report: Callable[[int, int, str], None]) -> Result:
        """Makes what is asked for; raises Cancelled soon after `cancel(session)`."""
        from walt.media import write_image, write_video

        stop = self._stops[session] = threading.Event()

        def step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                raise Cancelled
            stage = getattr(pipe, "current_stage", 0)
            report(index + 1, max(pipe.num_timesteps, index + 1), f"stage {stage}" if stage else "")
            return tensors

        try:
            with self._one:
                if stop.is_set():
                    raise Cancelled
                start = time.perf_counter()
                frames = TASKS[task].make(self.pipe, request, step)
                report(1, 1, "writing the file")
                pixels = to_pixels(frames)
        finally:
            self._stops.pop(session, None)
        still = len(pixels) == 1
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        path = folder / f"walt-{task}-{request.seed}{'.png' if still else '.mp4'}"
        if still:
            write_image(pixels[0], path)
        else:
            write_video(pixels, path, FPS)
        seconds = time.perf_counter() - start
        count, height, width, _ = pixels.shape
        length = "a still" if still else f"{count} frames, {count / FPS:.1f} s,"
        caption = f"{length} of {width} x {height}, seed {request.seed}, made in {seconds:.1f} s"
        return Result(path, still, caption)

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


def to_pixels(frames: Tensor) -> Pixels:
    """`(T, 3, H, W)` in [0, 1] -> uint8 `(T, H, W, 3)`."""
    import torch

    pixels: Pixels = (frames.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


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


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
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
