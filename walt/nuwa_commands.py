"""`walt nuwa TASK ...`: the eight tasks of NuwaPipeline as commands, one entry of TASKS each; and `walt nuwa export`.

Like cli.py this file may import anything.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from walt.errors import WaltError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from walt.media import Pixels

Add = Callable[..., Any]


class Task(NamedTuple):
    """One task: its help, its own arguments, whether it makes a still, and what it tells the pipeline."""

    help: str
    arguments: Callable[[Add], None]
    still: bool
    inputs: Callable[[argparse.Namespace, Any], dict[str, Any]]


# -- arguments ---------------------------------------------------------------------------------------------------------


def add(parser: argparse.ArgumentParser) -> None:
    """One subparser per task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        subparser = tasks.add_parser(name, help=task.help, description=task.help)
        task.arguments(subparser.add_argument)
        _common(subparser.add_argument, task.still)
    help_ = "Join trained parts into a NUWA folder, weights in float16."
    _export_arguments(tasks.add_parser("export", help=help_, description=help_).add_argument)


def _common(add: Add, still: bool) -> None:
    kind = "x.png" if still else "x.mp4, or x.png for a strip of the frames"
    add("-o", "--output", required=True, metavar="FILE", help=kind)
    add("--model", metavar="FOLDER", help="a NUWA folder (default: the embedded one)")
    add("--seed", type=int, default=0, help="the same seed gives the same result (default: 0)")
    add("--guidance", type=float, metavar="SCALE", help="1 for none (default: the model's)")
    if not still:
        help_ = "how hard frames follow those before them (default: the model's, without a prompt or sketch, else 1)"
        add("--context-guidance", type=float, metavar="SCALE", help=help_)
    add("--temperature", type=float, default=1.0, help="of sampling; 0 takes the likeliest token (default: 1)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens (default: all)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens that sum to P (default: the model's)",
    )
    add("--candidates", type=int, default=1, metavar="N", help="make N and keep the best (default: 1)")
    add("--clip", metavar="FOLDER", help="a CLIP model that picks the best (default: the model's own likelihood)")
    add("--upscale", metavar="HxW", help="enlarge with the embedded super-resolution, such as 512x896")
    add("--fps", type=float, help="frames per second of the file (default: the model's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: the fastest right one")


def _check_top_p(args: argparse.Namespace, *names: str) -> None:
    """A WaltError for one of these options that is no share of the tokens."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            raise WaltError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {value}")


def _export_arguments(add: Add) -> None:
    add("output", help="the folder to write")
    add("--transformer", default="runs/nuwa-emoji-finish/final", help="trained NUWA folder")
    add("--vq", default="runs/emoji-vq/final", help="VQ folder")
    add("--vq-seg", default="runs/emoji-vq-seg/final", help="VQ-Seg folder")
    add("--text", default="cache", help="folder with text_encoder/ and tokenizer/")
    add("--guidance", type=float, default=2.0, help="default guidance scale of the model")
    add("--image-guidance", type=float, help="that of images, where they want another (default: the same)")
    add("--context-guidance", type=float, default=1.0, help="default of how hard predicted frames follow given ones")
    add("--top-p", type=float, default=1.0, help="default top-p of the model")
    add("--sketch-top-p", type=float, help="that of sketch tasks, where they want another (default: the same)")
    add("--prediction-top-p", type=float, help="that of prediction, where it wants another (default: the same)")
    add(
        "--link-text", metavar="FOLDER", help="a model folder beside the output whose text parts are linked, not copied"
    )


def _prompt(add: Add) -> None:
    add("prompt", metavar="PROMPT", help="what to show")


def _text_to_video(add: Add) -> None:
    _prompt(add)
    add("--frames", type=int, metavar="N", help="frames (default: the model's)")


def _sketch_still(add: Add) -> None:
    add("sketch", metavar="SKETCH", help="a segmentation map as PNG in walt's colours")


def _sketch_clip(add: Add) -> None:
    add("sketch", metavar="SKETCH", help="a folder of PNGs, a segmentation map each, in the order of their names")


def _region(add: Add) -> None:
    add("--mask", metavar="FILE", help="an image of the same size; what is white in it is made anew")
    add("--box", metavar="L,T,R,B", help="instead of a mask: pixels left, top, right, bottom of what is made anew")
    add("--resize", action="store_true", help="crop and resize the input to the model's size")


def _complete(add: Add) -> None:
    add("image", metavar="IMAGE", help="the image of which a part is kept")
    _region(add)


def _edit_image(add: Add) -> None:
    add("image", metavar="IMAGE", help="the image to change")
    _prompt(add)
    _region(add)


def _predict(add: Add) -> None:
    add("video", metavar="VIDEO", help="a video, or an image as its only frame")
    add("--given", type=int, default=1, metavar="N", help="how many of its first frames are given (default: 1)")
    add("--frames", type=int, metavar="N", help="frames of the result (default: the model's)")
    add("--resize", action="store_true", help="crop and resize the input to the model's size")


def _edit_video(add: Add) -> None:
    add("video", metavar="VIDEO", help="the video to change; its first frames, as many as the model makes, are used")
    _prompt(add)
    add("--from", dest="edit_from", type=int, default=1, metavar="FRAME", help="first frame made anew (default: 1)")
    add("--resize", action="store_true", help="crop and resize the input to the model's size")


# -- checks ------------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights."""
    from walt.cli import model_folder

    if args.task == "export":
        _check_top_p(args, "top_p", "sketch_top_p", "prediction_top_p")
        if not 0 <= args.context_guidance < math.inf:
            raise WaltError(f"--context-guidance must be at least 0 and finite, got {args.context_guidance}")
        return
    from walt.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_output

    still = TASKS[args.task].still
    args.output = check_output(args.output, IMAGE_SUFFIXES if still else VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    if hasattr(args, "prompt") and not args.prompt.strip():
        raise WaltError("PROMPT is empty: say what to show")
    if not 0 <= args.seed < 2**63:
        raise WaltError(f"--seed must be from 0 to 2**63 - 1, got {args.seed}")
    for name, value, low in (
        ("--candidates", args.candidates, 1),
        ("--frames", getattr(args, "frames", None), 1),
        ("--given", getattr(args, "given", None), 1),
        ("--from", getattr(args, "edit_from", None), 1),
        ("--top-k", args.top_k, 1),
        ("--guidance", args.guidance, 0),
        ("--context-guidance", getattr(args, "context_guidance", None), 0),
        ("--temperature", args.temperature, 0),
    ):
        if value is not None and not low <= value < math.inf:
            raise WaltError(f"{name} must be at least {low} and finite, got {value}")
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise WaltError(f"--fps must be positive and finite, got {args.fps}")
    _check_top_p(args, "top_p")
    if args.clip is not None and not hasattr(args, "prompt"):
        raise WaltError("--clip scores a prompt, and this task has none")
    if args.candidates > 1 and not (hasattr(args, "prompt") or hasattr(args, "sketch")):
        raise WaltError(
            "--candidates: they are scored by how well they fit a prompt or a sketch, and this task has none"
        )
    if args.clip is not None and args.candidates == 1:
        raise WaltError("--clip chooses among candidates: say how many with --candidates")
    if hasattr(args, "mask") and (args.mask is None) == (args.box is None):
        raise WaltError("say what to make anew, with --mask FILE or --box LEFT,TOP,RIGHT,BOTTOM")
    if getattr(args, "box", None) is not None:
        args.box = _numbers("--box", args.box, ",", 4, "LEFT,TOP,RIGHT,BOTTOM in pixels")
    if args.upscale is not None:
        args.upscale = _numbers("--upscale", args.upscale, "x", 2, "HEIGHTxWIDTH in pixels")
        args.cascade = model_folder(None)
    args.model = model_folder(args.model, "embedded_nuwa")


def _numbers(name: str, text: str, separator: str, count: int, form: str) -> list[int]:
    parts = [part.strip() for part in text.split(separator)]
    if len(parts) != count or not all(part.isdigit() for part in parts):
        raise WaltError(f"{name} must be {form}, got {text!r}")
    return [int(part) for part in parts]


# -- what each task tells the pipeline ---------------------------------------------------------------------------------


def _text(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    return {"prompt": args.prompt, "num_frames": 1 if TASKS[args.task].still else args.frames}


def _drawn(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    from walt.data.sketches import read_sketch

    sketch = read_sketch(args.sketch, pipe.config.classes)
    if TASKS[args.task].still and len(sketch) != 1:
        raise WaltError(f'"{args.sketch}" holds {len(sketch)} frames; sketch-to-image takes one')
    return {"sketch": sketch}


def _masked(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    import numpy as np

    from walt.media import read_image

    image = read_image(args.image)
    if args.resize:
        image = _fit(image[None], pipe)[0]
    if args.box is not None:
        left, top, right, bottom = args.box
        if not (left < right <= image.shape[1] and top < bottom <= image.shape[0]):
            raise WaltError(f"--box {args.box} is not inside the image of {image.shape[1]}x{image.shape[0]} (WxH)")
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[top:bottom, left:right] = 255
    else:
        mask = read_image(args.mask)
        mask = (_fit(mask[None], pipe)[0] if args.resize else mask)[..., 0]
    return {"image": image, "mask": mask, "prompt": getattr(args, "prompt", None)}


def _continued(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    video = _read_frames(args, pipe)
    if args.given > len(video):
        raise WaltError(f"--given {args.given}, but the video has {len(video)} frames")
    return {"video": video[: args.given], "num_frames": args.frames}


def _changed(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    video = _read_frames(args, pipe)[: pipe.config.num_frames]
    return {"video": video, "edit_from": args.edit_from, "prompt": args.prompt, "num_frames": len(video)}


def _read_frames(args: argparse.Namespace, pipe: Any) -> Pixels:
    """The frames of the video file at the model's pace, uint8 `(T, H, W, 3)`."""
    from walt.media import is_image_path, read_image, read_video

    if is_image_path(args.video):
        frames, rate = read_image(args.video)[None], 0.0
    else:
        frames, rate = read_video(args.video)
    pace = max(1, round(rate / pipe.config.frame_rate)) if rate else 1
    frames = frames[::pace]
    return _fit(frames, pipe) if args.resize else frames


TASKS: dict[str, Task] = {
    "text-to-image": Task("An image of a prompt.", _prompt, True, _text),
    "text-to-video": Task("A video of a prompt.", _text_to_video, False, _text),
    "sketch-to-image": Task("An image of a segmentation map.", _sketch_still, True, _drawn),
    "sketch-to-video": Task("A video of a sequence of segmentation maps.", _sketch_clip, False, _drawn),
    "complete": Task("Make a part of an image anew, so that it fits the rest.", _complete, True, _masked),
    "predict": Task("Go on with a video from its first frames.", _predict, False, _continued),
    "edit-image": Task("Make a part of an image anew, after a prompt.", _edit_image, True, _masked),
    "edit-video": Task("Make a video anew from a frame on, after a prompt.", _edit_video, False, _changed),
}


# -- running -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Makes one result and writes it."""
    if args.task == "export":
        return export(args)
    import numpy as np
    import torch

    from walt.cli import UsageError, choose_device, choose_dtype
    from walt.media import is_image_path, to_pixels, write_image, write_video
    from walt.task_commands import bars

    device = choose_device(args.device)
    pipe = load_nuwa(args.model, choose_dtype(args.dtype, device), device)
    task = TASKS[args.task]
    try:
        inputs = task.inputs(args, pipe)
        with bars() as progress:
            bar = progress.add_task(args.task, total=None)

            def step(pipe: Any, index: int, made: int, tensors: dict[str, Any]) -> dict[str, Any]:
                progress.update(bar, completed=made, total=pipe.num_timesteps)
                return tensors

            output = pipe(
                **inputs,
                guidance_scale=args.guidance,
                context_guidance_scale=getattr(args, "context_guidance", None),
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                num_candidates=args.candidates,
                ranker=None if args.clip is None else clip_ranker(args.clip, device),
                generator=torch.Generator().manual_seed(args.seed),
                output_type="pt",
                callback_on_step_end=step,
                callback_on_step_end_tensor_inputs=[],
            )
        frames = output.frames[0]
        if args.upscale is not None:
            _factor(frames.shape[2], *args.upscale)
    except WaltError as error:
        raise UsageError(str(error)) from error
    if args.upscale is not None:
        prompt = getattr(args, "prompt", "")
        frames = upscale(
            frames, args.upscale[0], args.upscale[1], args.cascade, prompt, args.seed, args.device, args.dtype
        )
    pixels = to_pixels(frames)
    if is_image_path(args.output):
        write_image(np.concatenate(list(pixels), axis=1), args.output)
    else:
        write_video(pixels, args.output, args.fps or pipe.config.frame_rate)
    score = "" if output.scores is None else f", score {float(output.scores[0]):.3f} (best of {args.candidates})"
    count, height, width, _ = pixels.shape
    print(f"{args.output}: {count} frame{'s' * (count != 1)} of {width}x{height}, seed {args.seed}{score}")


def export(args: argparse.Namespace) -> None:
    """Writes the whole folder under a temporary name and puts it in place; a model card that is there stays."""
    import os
    import shutil

    from transformers import AutoTokenizer

    from walt.commands import save_parts
    from walt.data.emoji import EMBEDDED_WORLD
    from walt.data.sketches import classes
    from walt.models.transformer_nuwa import NuwaTransformer3DModel
    from walt.pipelines.pipeline_nuwa import NuwaPipeline
    from walt.tokenizers.text import load_text_encoder
    from walt.tokenizers.vq_model_walt import WaltVQModel
    from walt.training.objectives import load_folder

    transformer = load_folder(NuwaTransformer3DModel, args.transformer, "--transformer")
    pipe = NuwaPipeline(
        vq=load_folder(WaltVQModel, args.vq, "--vq").half(),
        vq_seg=load_folder(WaltVQModel, args.vq_seg, "--vq-seg").half(),
        transformer=transformer.half(),
        text_encoder=load_text_encoder(f"{args.text}/text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(f"{args.text}/tokenizer"),
        classes=classes(EMBEDDED_WORLD.subjects),
        num_frames=transformer.config.sample_size[0],
        default_guidance_scale=args.guidance,
        default_top_p=args.top_p,
        default_image_guidance_scale=args.image_guidance,
        default_sketch_top_p=args.sketch_top_p,
        default_context_guidance_scale=args.context_guidance,
        default_prediction_top_p=args.prediction_top_p,
    )
    output = Path(args.output)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_parts(pipe, temporary)
    if args.link_text is not None:
        for name in ("text_encoder", "tokenizer"):
            shutil.rmtree(temporary / name)
            (temporary / name).symlink_to(os.path.relpath(Path(args.link_text) / name, output))
    (temporary / "world.json").write_text(json.dumps(EMBEDDED_WORLD.words(), indent=1))
    if (output / "README.md").exists():
        shutil.copy(output / "README.md", temporary / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    temporary.replace(output)
    files = [path for path in output.rglob("*") if path.is_file() and not path.is_symlink()]
    own = [path for path in files if not any(parent.is_symlink() for parent in path.parents)]
    print(f"wrote {output}, {sum(path.stat().st_size for path in own) / 1e6:.1f} MB")


def evaluate_prepare(args: argparse.Namespace) -> None:
    """Checks `walt evaluate nuwa` before anything is loaded."""
    from walt.cli import model_folder
    from walt.data.emoji import read_index
    from walt.evaluation.features import feature_file
    from walt.evaluation.nuwa import TASKS
    from walt.media import check_output

    args.count = 16 if args.count is None else args.count
    if args.count < 2:
        raise WaltError(f"--count must be at least 2, got {args.count}")
    names = list(TASKS) if args.tasks is None else [name.strip() for name in args.tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise WaltError(f"--tasks: {name!r} is not known{suggest(name, TASKS)}; known: {', '.join(TASKS)}")
    args.tasks = names
    args.output = check_output(args.output, (".png",))
    if args.json is not None:
        args.json = check_output(args.json, (".json",))
    read_index(args.source)
    feature_file(args.image_network)
    feature_file(args.network, args.features)
    args.model = model_folder(args.model, "embedded_nuwa")


def evaluate(args: argparse.Namespace, theatre: Any, image_network: Any) -> None:
    """Plays every task on held-out scenes, prints the table and writes the sheet."""
    from rich.console import Console

    from walt.cli import choose_device
    from walt.evaluation.features import load_feature_network
    from walt.evaluation.nuwa import TASKS, Stage, table, write_report, write_sheet
    from walt.evaluation.prompts import Judge, fingerprint

    console = Console()
    pipe = load_nuwa(args.model, None, choose_device("auto"))
    judge = Judge.learn(theatre, image_network, *model_size(pipe))
    network = load_feature_network(args.network, args.features)
    stage = Stage(pipe, theatre, judge, network, args.count, args.guidance, args.top_p, args.first)
    results = []
    for name in args.tasks:
        console.print(name, style="dim")
        results.append(TASKS[name](stage))
    figures = [figure for result in results for figure in result.figures]
    console.print(table(figures))
    console.print(f"distances in {network.name}'s features; sha256 of its file: {network.fingerprint}", soft_wrap=True)
    write_sheet(args.output, results)
    if args.json is not None:
        scales = {
            name: pipe.default_guidance(still) if args.guidance is None else args.guidance
            for name, still in (("guidance", False), ("image_guidance", True))
        }
        tasks: tuple[tuple[str, dict[str, bool]], ...] = (
            ("top_p", {}),
            ("sketch_top_p", {"sketch": True}),
            ("prediction_top_p", {"prediction": True}),
        )
        chances = {name: pipe.default_nucleus(**of) if args.top_p is None else args.top_p for name, of in tasks}
        scales["context_guidance"] = pipe.config.default_context_guidance_scale
        settings = {"model": fingerprint(args.model), "count": args.count, "first": args.first, **scales, **chances}
        settings |= {"network": network.name, "network_sha256": network.fingerprint}
        write_report(args.json, figures, settings)


def load_nuwa(folder: Path, dtype: Any, device: Any) -> Any:
    """The NuwaPipeline in `folder`, without bars (dtype None: the fastest right one); a WaltError for another."""
    from walt.cli import choose_dtype, quiet
    from walt.pipelines.loading import load_pipeline
    from walt.pipelines.pipeline_nuwa import NuwaPipeline

    quiet()
    pipe = load_pipeline(folder, dtype or choose_dtype("auto", device))
    if not isinstance(pipe, NuwaPipeline):
        raise WaltError(f'the model "{folder}" is a {type(pipe).__name__}; a NuwaPipeline is needed')
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def is_nuwa(folder: Path) -> bool:
    """Whether the model in a folder is a NUWA."""
    from walt.pipelines.loading import read_json

    index = folder / "model_index.json"
    return index.is_file() and read_json(index).get("_class_name") == "NuwaPipeline"


def info(folder: Path, frames: int | None, dtype: Any, device: Any) -> None:
    """`walt info FOLDER` of a NUWA: parts, tokens and waves, what it knows, and the time of a video.

    The time is that of a second or so of decoding, by the share of positions that it made.
    """
    import time

    import torch
    from rich.console import Console
    from rich.table import Table

    from walt.evaluation.cost import components
    from walt.nearby import Rule, radii, waves

    pipe = load_nuwa(folder, dtype, device)
    config, ratio = pipe.transformer.config, pipe.vae_scale_factor_spatial
    frames = int(pipe.config.num_frames) if frames is None else frames
    if not 1 <= frames <= config.sample_size[0]:
        raise WaltError(f"--frames must be from 1 to {config.sample_size[0]} for this model, got {frames}")
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"{folder}")
    parts = Table("component", "class", "parameters", "size", title="components")
    for part in components(pipe):
        parts.add_row(part.name, part.kind, f"{part.parameters:,}", f"{part.megabytes:.1f} MB")
    console.print(parts)
    shape = (frames, config.sample_size[1], config.sample_size[2])
    rule = Rule(shape, shape, radii(tuple(config.extent), shape), causal=True, axial=config.attention == "axial")
    order = waves(rule)
    made = math.prod(shape)
    height, width = shape[1] * ratio, shape[2] * ratio
    fps = float(pipe.config.frame_rate)
    say(f"makes: {frames} frames of {height}x{width} at {fps:g} a second, an image as a video of one frame")
    codes = "" if config.num_subcodes == 1 else f" of {config.num_subcodes} codes each"
    say(f"tokens: {'x'.join(map(str, shape))} = {made}{codes}, among {config.vocab_size}, in {len(order)} waves")
    width = config.num_attention_heads * config.attention_head_dim
    say(
        f"layers: {config.num_layers_encoder} of the encoder, {config.num_layers_decoder} of the decoder, width {width}; "
        f"each token sees {'x'.join(map(str, config.extent))} around it"
    )
    classes = list(pipe.config.classes)
    say(f"sketch classes ({len(classes)}): {', '.join(classes)}" if classes else "takes no sketches")
    guidance, of_images = (pipe.default_guidance(still) for still in (False, True))
    images = f" ({of_images:g} of images)" if of_images != guidance else ""
    top_p, of_sketches = pipe.default_nucleus(), pipe.default_nucleus(sketch=True)
    sketches = f" ({of_sketches:g} with a sketch)" if of_sketches != top_p else ""
    context, ahead = pipe.config.default_context_guidance_scale, pipe.default_nucleus(prediction=True)
    say(f"guidance {guidance:g}{images}, top-p {top_p:g}{sketches} unless told otherwise")
    say(f"of predictions: context guidance {context:g}, top-p {ahead:g}")

    begun = time.perf_counter()
    seen = {"done": 0}

    def watch(done: int, total: int) -> bool:
        seen["done"] = done
        return time.perf_counter() - begun > 1.0

    with torch.no_grad():
        condition = pipe.transformer.encode_condition()
        pipe.transformer.generate(
            shape, condition, null_condition=condition, guidance_scale=2.0 if guidance != 1 else 1.0, callback=watch
        )
    seconds = (time.perf_counter() - begun) * made / seen["done"]
    name = str(dtype).removeprefix("torch.")
    say(f"estimate for {frames} frames on this machine ({device}, {name}): {seconds:.1f} s of decoding")


def model_size(pipe: Any) -> tuple[int, int]:
    """(height, width) in pixels that the model makes by default."""
    size, ratio = pipe.transformer.config.sample_size, pipe.vae_scale_factor_spatial
    return size[1] * ratio, size[2] * ratio


def _fit(frames: Pixels, pipe: Any) -> Pixels:
    """uint8 `(T, H, W, 3)` at the size that the model makes by default."""
    import numpy as np
    from PIL import Image

    from walt.media import fit

    return np.stack([fit(Image.fromarray(frame), model_size(pipe)) for frame in frames])


def upscale(
    frames: Tensor,
    height: int,
    width: int,
    folder: Path,
    prompt: str = "",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> Tensor:
    """Frames `(T, 3, H, W)` in [0, 1] to height x width by the super-resolution stages of a cascade folder.

    `height` is twice or four times H. To the wanted shape the frames are cropped in the middle, or go on with the colours
    of their edges; then `WaltCascadePipeline.upscale` enlarges them. `device` and `dtype` as of the commands.

    Raises:
        WaltError: a size or model that does not allow it.
    """
    import torch

    from walt.cli import choose_device, choose_dtype, load_cascade

    scale = _factor(frames.shape[2], height, width)
    place = choose_device(device)
    cascade = load_cascade(folder, choose_dtype(dtype, place), place)
    video = frame_to_width(frames.float(), width // scale)[None]
    source = torch.Generator().manual_seed(seed)
    held = cascade.config.fidelity
    made: Tensor = cascade.upscale(video, prompt, scale, generator=source, output_type="pt", fidelity=held).frames[0]
    return made


def _factor(lines: int, height: int, width: int) -> int:
    """2 or 4, by which `lines` grow to `height`; a WaltError for anything else."""
    scale = height // lines
    if scale not in (2, 4) or height != scale * lines or width % (8 * scale):
        raise WaltError(
            f"--upscale {height}x{width} does not fit frames of {lines} lines: the height must be {2 * lines} and the "
            f"width a multiple of 16, or {4 * lines} and a multiple of 32"
        )
    return scale


def frame_to_width(frames: Tensor, width: int) -> Tensor:
    """`(T, 3, H, W)` cropped in the middle, or widened with the colours of its edges, to `width`."""
    import torch

    more = width - frames.shape[3]
    if more == 0:
        return frames
    if more < 0:
        return frames[..., -more // 2 : -more // 2 + width]
    return torch.nn.functional.pad(frames, (more // 2, more - more // 2, 0, 0), mode="replicate")


def clip_ranker(folder: str | Path, device: Any) -> Callable[[list[str], Tensor], Tensor]:
    """A ranker by the cosine of CLIP's features of prompt and frames (CLIPSIM), from a transformers folder."""
    import torch
    from transformers import AutoProcessor, CLIPModel

    from walt.evaluation.distances import clipsim
    from walt.media import to_pixels

    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True).eval().to(device)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WaltError(f'--clip: "{folder}" holds no CLIP model: {str(error).splitlines()[0]}') from error

    def rank(prompts: list[str], frames: Tensor) -> Tensor:
        pixels = to_pixels(frames.transpose(1, 2) / 2 + 0.5)
        texts = processor(text=prompts, return_tensors="pt", padding=True, truncation=True).to(device)
        images = processor(images=list(pixels.reshape(-1, *pixels.shape[2:])), return_tensors="pt").to(device)
        with torch.no_grad():
            words = _features(model.get_text_features(**texts))
            looks = _features(model.get_image_features(**images))
        return clipsim(looks.view(len(frames), -1, looks.shape[-1]), words)

    return rank


def _features(output: Any) -> Tensor:
    features: Tensor = getattr(output, "pooler_output", output)  # transformers 5 returns it inside an output
    return features
