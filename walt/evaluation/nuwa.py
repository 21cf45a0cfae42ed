"""Numbers that prove each of NUWA's eight tasks (walt evaluate nuwa), on held-out scenes of the emoji theatre.

Every number stands beside that of real clips, the best there is, and of a control that shows what it is without the
task: shuffled conditions, the input unchanged, the last frame copied. Frames are those of training, `step` apart.
Letters: N scenes, T frames, H W pixels, h w tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor

from walt.data.emoji import OPPOSITES, EmojiTheatre, Scene, describe
from walt.data.scenes import SCENE_FRAMES
from walt.data.sketches import Sketch, classes, sample_frames, to_colours
from walt.errors import WaltError
from walt.evaluation.distances import Interval, mean_interval, mmd_interval
from walt.evaluation.features import FeatureNetwork
from walt.evaluation.prompts import Judge, wilson
from walt.evaluation.tracks import LINES, Pixels, Track, find_subject, name_motion
from walt.media import replacing, to_pixels, write_image

STRAIGHT = ("moves left to right", "moves right to left", "rises", "falls")


@dataclass(frozen=True)
class Figure:
    """One line of the table: a number of what was made, of real clips, and of a control that `against` names."""

    task: str
    measure: str
    count: int
    made: Interval
    real: float | None
    control: float | None
    against: str


@dataclass(frozen=True)
class Example:
    """One row of the sheet: what was asked and given, and what was made; uint8 `(T, H, W, 3)` each."""

    label: str
    given: Pixels | None
    made: Pixels


@dataclass(frozen=True)
class Result:
    figures: list[Figure]
    examples: list[Example]


@dataclass(frozen=True)
class Stage:
    """What the tasks are played on.

    pipe: a NuwaPipeline. theatre: of the split "heldout". judge: of that theatre, at the model's size. network: of the
    kernel distance; None leaves it out. count: scenes per task. guidance, top_p: of sampling, None: the model's. first: the
    number of the first scene. step: frames between two of a clip's.
    """

    pipe: Any
    theatre: EmojiTheatre
    judge: Judge
    network: FeatureNetwork | None
    count: int
    guidance: float | None = None
    top_p: float | None = None
    first: int = 0
    step: int = 4
    batch: int = 8

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        most, ratio = self.pipe.transformer.config.sample_size, self.pipe.vae_scale_factor_spatial
        return most[1] * ratio, most[2] * ratio

    def scenes(self, still: bool = False) -> list[Scene]:
        seeds = range(self.first, self.first + self.count)
        return [self.theatre.scene(seed, 1 if still else SCENE_FRAMES) for seed in seeds]

    def show(self, scene: Scene) -> tuple[Pixels, Sketch]:
        """A scene's frames and sketches as in training."""
        frames = 1 if scene.frames == 1 else self.pipe.config.num_frames
        return sample_frames(self.theatre, scene, *self.size, 0, frames, self.step)

    def run(self, calls: Sequence[dict[str, Any]]) -> Iterator[tuple[Pixels, Tensor]]:
        """One result per call, with seeds 0, 1, ...: frames uint8 `(T, H, W, 3)` and tokens `(T, h, w)`."""
        for start in range(0, len(calls), self.batch):
            part = calls[start : start + self.batch]
            joined = {name: _join([call[name] for call in part]) for name in part[0]}
            tokens = self.pipe(
                **joined,
                guidance_scale=self.guidance,
                top_p=self.top_p,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
                output_type="latent",
            ).frames
            for one in tokens:
                yield self.pixels(one), one.cpu()

    def pixels(self, tokens: Tensor) -> Pixels:
        return to_pixels(self.pipe.decode(tokens[None])[0].transpose(0, 1) / 2 + 0.5)

    def tokens(self, clip: Pixels) -> Tensor:
        """`(T, h, w)` of uint8 `(T, H, W, 3)`."""
        codes: Tensor = self.pipe.prepare_given(None, clip, None, None).tokens[0].cpu()
        return codes

    def motion(self, clip: Pixels) -> str:
        return name_motion(stretch(find_subject(clip), self.step), self.theatre.world.motions)


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray) and first.dtype == np.uint8 and first.ndim == 4:  # a video: (T, H, W, 3)
        return torch.from_numpy(np.stack(values)).permute(0, 1, 4, 2, 3).float() / 255
    if isinstance(first, np.ndarray):
        return np.stack(values)
    if isinstance(first, str):
        return values
    if any(value != first for value in values):
        raise WaltError(f"calls of one batch differ: {values}")
    return first


def stretch(track: Track, step: int) -> Track:
    """A track of frames `step` apart as one of every frame, by straight lines between them; the mask stays."""
    old = np.arange(len(track.x)) * step
    new = np.arange(old[-1] + 1)

    def fill(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.interp(new, old, values)  # what is not a number stays so around it

    box = np.stack([fill(side) for side in track.box.T], axis=1)
    return replace(track, x=fill(track.x), y=fill(track.y), size=fill(track.size), box=box)


# ------------------------------------------------------------------------------------------------------------ measures


def share(right: Sequence[bool]) -> Interval:
    """The share of true ones with Wilson's interval."""
    return Interval(sum(right) / len(right), *wilson(sum(right), len(right)))


def detect(clip: Pixels, judge: Judge, subjects: Sequence[str]) -> Sketch:
    """The clip's segmentation as the judge sees it, `(T, h, w)` on about 64 lines: the pixels that stand out from the
    ground are of the class of the subject that the whole clip shows."""
    track, subject = find_subject(clip), judge(clip).subject
    number = 1 + list(subjects).index(subject) if subject else 0
    return np.where(track.mask, number, 0).astype(np.uint16)


def pixel_accuracy(detected: Sketch, sketch: Sketch) -> float:
    """The share of `detected`'s pixels `(T, h, w)` whose class the sketch `(T, H, W)` has at their middle."""
    return float((detected == _at_lines(sketch, detected)).mean())


def overlap(detected: Sketch, sketch: Sketch) -> float:
    """Intersection over union of what is no ground in `detected` `(T, h, w)` and in the sketch `(T, H, W)`, of whatever class.

    An empty ground has 0, however small the subject is; where both are empty it is 1.
    """
    ours, wanted = detected > 0, _at_lines(sketch, detected) > 0
    union = float((ours | wanted).sum())
    return float((ours & wanted).sum()) / union if union else 1.0


def _at_lines(sketch: Sketch, like: Sketch) -> Sketch:
    """The sketch `(T, H, W)` at the middles of the pixels `(T, h, w)` of `like`."""
    step = max(1, sketch.shape[1] // LINES)
    h, w = like.shape[1:]
    return sketch[:, step // 2 :: step, step // 2 :: step][:, :h, :w]


def psnr(first: Pixels, second: Pixels, where: NDArray[np.bool_] | None = None) -> float:
    """dB between uint8 `(T, H, W, 3)`, inside the mask `(T, H, W)` if there is one; at most 100."""
    error = (first.astype(np.float64) - second) ** 2
    mean = float(error.mean() if where is None else error[where].mean())
    return 100.0 if mean < 255**2 / 1e10 else 10 * float(np.log10(255**2 / mean))


def _mean(values: Sequence[float]) -> Interval:
    return mean_interval(torch.tensor(values, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------- tasks


def text(stage: Stage, still: bool) -> Result:
    """Subject, background (and motion) of what a held-out caption makes; the control deals the captions anew."""
    task = "text to image" if still else "text to video"
    scenes = stage.scenes(still)
    calls = [{"prompt": scene.caption, "num_frames": 1 if still else stage.pipe.config.num_frames} for scene in scenes]
    made = [clip for clip, _ in stage.run(calls)]
    real = [stage.show(scene)[0] for scene in scenes]
    shown, truth = ([stage.judge(clip) for clip in clips] for clips in (made, real))
    wanted = {"subject": [s.subjects[0] for s in scenes], "background": [s.background for s in scenes]}
    named = {
        name: tuple([getattr(one, name) for one in many] for many in (shown, truth))
        for name in ("subject", "background")
    }
    if not still:
        wanted["motion"] = [scene.motion for scene in scenes]
        named["motion"] = tuple([stage.motion(clip) for clip in clips] for clips in (made, real))
    figures = []
    for name, (ours, theirs) in named.items():
        asked = wanted[name]
        figures.append(
            Figure(
                task,
                f"{name} as asked",
                len(asked),
                share([a == b for a, b in zip(ours, asked, strict=True)]),
                share([a == b for a, b in zip(theirs, asked, strict=True)]).estimate,
                share([a == b for a, b in zip(ours, _dealt(asked), strict=True)]).estimate,
                "captions shuffled",
            )
        )
    return Result(figures, [Example(f"{task}: {s.caption}", None, m) for s, m in zip(scenes, made, strict=True)])


def _dealt(values: Sequence[Any]) -> list[Any]:
    """Each value one place further: a fixed deal in which none keeps its own place."""
    return [*values[1:], values[0]]


def sketch(stage: Stage, still: bool) -> Result:
    """Detected pixel accuracy: what is made, segmented again, against its sketch. As small subjects on a large ground flatter
    that, also where the subject is, and which."""
    task = "sketch to image" if still else "sketch to video"
    pairs = [stage.show(scene) for scene in stage.scenes(still)]
    made = [clip for clip, _ in stage.run([{"sketch": one} for _, one in pairs])]
    subjects = stage.theatre.subjects
    found = [detect(clip, stage.judge, subjects) for clip in made]
    true = [detect(clip, stage.judge, subjects) for clip, _ in pairs]
    sketches = [one for _, one in pairs]
    empty = _mean([float((one == 0).mean()) for one in sketches]).estimate
    figures = []
    for measure, name, ground in (
        (pixel_accuracy, "detected pixel accuracy", f"{empty:.3f}"),
        (overlap, "subject's place, IoU", "0"),
    ):
        ours, theirs, control = (
            _mean([measure(a, b) for a, b in zip(first, second, strict=True)])
            for first, second in ((found, sketches), (true, sketches), (found, _dealt(sketches)))
        )
        against = f"sketches shuffled (nothing but ground: {ground})"
        figures.append(Figure(task, name, len(made), ours, theirs.estimate, control.estimate, against))
    drawn = [int(one.max()) for one in sketches]
    named, best, control = (
        share([int(a.max()) == b for a, b in zip(maps, wanted, strict=True)])
        for maps, wanted in ((found, drawn), (true, drawn), (found, _dealt(drawn)))
    )
    figures.append(
        Figure(task, "subject as drawn", len(made), named, best.estimate, control.estimate, "sketches shuffled")
    )
    names = classes(subjects)
    examples = [Example(task, to_colours(one, names), clip) for one, clip in zip(sketches, made, strict=True)]
    return Result(figures, examples)


def completion(stage: Stage) -> Result:
    """The right half of an image from its left one: given tokens stay, and the new half is nearer than the ground."""
    real = [stage.show(scene)[0] for scene in stage.scenes(still=True)]
    height, width = stage.size
    mask = np.zeros((height, width), np.float32)
    mask[:, width // 2 :] = 1
    masks = np.broadcast_to(mask > 0, (1, height, width))
    kept, ours, flat, shown = [], [], [], []
    for clip, (made, tokens) in zip(real, _masked(stage, real, mask, None), strict=True):
        kept.append(_kept(stage, clip, tokens, mask))
        ground = np.broadcast_to(np.median(clip.reshape(-1, 3), axis=0), clip.shape).astype(np.uint8)
        ours.append(psnr(made, clip, masks))
        flat.append(psnr(ground, clip, masks))
        shown.append(made)
    figures = [
        Figure("image completion", "given tokens kept", len(real), _mean(kept), 1.0, None, ""),
        Figure("image completion", "PSNR of the new half, dB", len(real), _mean(ours), None, _mean(flat).estimate,
               "the ground's colour alone"),
    ]  # fmt: skip
    hidden = [np.where(masks[..., None], np.uint8(128), clip) for clip in real]
    return Result(figures, [Example("image completion", a, b) for a, b in zip(hidden, shown, strict=True)])


def _masked(
    stage: Stage, images: Sequence[Pixels], mask: NDArray[np.float32] | Sequence[NDArray[np.float32]], prompts: Any
) -> Iterator[tuple[Pixels, Tensor]]:
    """Images one by one, since each may have a mask of its own; seeds 0, 1, ..."""
    for number, image in enumerate(images):
        tokens = stage.pipe(
            prompt=None if prompts is None else prompts[number],
            image=image[0],
            mask=mask if isinstance(mask, np.ndarray) else mask[number],
            guidance_scale=stage.guidance,
            top_p=stage.top_p,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
        ).frames[0]
        yield stage.pixels(tokens), tokens.cpu()


def _kept(stage: Stage, clip: Pixels, tokens: Tensor, mask: NDArray[np.float32]) -> float:
    """The share of given tokens that the result has."""
    ratio = stage.pipe.vae_scale_factor_spatial
    anew = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None, None], ratio)[0, 0] > 0.5
    same = (stage.tokens(clip) == tokens)[0][~anew]
    return float(same.float().mean())


def prediction(stage: Stage) -> Result:
    """The frames after the first two: against the real ones, beside the last given frame copied."""
    given = 2
    frames = stage.pipe.config.num_frames
    real = [stage.show(scene)[0] for scene in stage.scenes()]
    made = [clip for clip, _ in stage.run([{"video": clip[:given], "num_frames": frames} for clip in real])]
    through = [stage.pixels(stage.tokens(clip)) for clip in real]  # what the tokenizer keeps of the real frames
    copied = [np.concatenate([clip[:given], np.repeat(clip[given - 1 : given], frames - given, 0)]) for clip in through]
    ours, best, copies = (
        [psnr(a[given:], b[given:]) for a, b in zip(clips, real, strict=True)] for clips in (made, through, copied)
    )
    name = "video prediction"
    figures = [
        Figure(name, "PSNR of new frames, dB", len(real), _mean(ours), _mean(best).estimate, _mean(copies).estimate,
               "last given frame copied; real: through the tokenizer")
    ]  # fmt: skip
    moved = [_displacement(clip[given - 1 :]) for clip in made]
    truth = [_displacement(clip[given - 1 :]) for clip in real]
    far = [i for i, step in enumerate(truth) if np.hypot(*step) > 0.08]
    if far:
        cosine = [_cosine(moved[i], truth[i]) for i in far]
        figures.append(
            Figure(name, "goes on in the same direction", len(far), share([c > 0.5 for c in cosine]), 1.0, 0.0,
                   "last given frame copied")
        )  # fmt: skip
    if stage.network is not None and len(real) >= 8:
        true, new, tokens, still = (_features(stage.network, clips) for clips in (real, made, through, copied))
        kernel = f"{stage.network.kernel} (lower is better)"
        flat = mmd_interval(still, tokens)
        figures += [
            Figure(name, kernel, len(real), mmd_interval(new, true), mmd_interval(tokens, true).estimate,
                   mmd_interval(still, true).estimate, "last given frame copied; real: through the tokenizer"),
            # A tokenizer of single frames flickers: what it does to real clips is no fault of what predicts its tokens.
            Figure(name, f"{kernel}, both through the tokenizer", len(real), mmd_interval(new, tokens), None,
                   flat.estimate, f"last given frame copied ({flat.low:.3g} to {flat.high:.3g})"),
        ]  # fmt: skip
    return Result(figures, [Example(name, clip[:given], one) for clip, one in zip(real, made, strict=True)])


def _features(network: FeatureNetwork, clips: Sequence[Pixels]) -> Tensor:
    videos = (torch.from_numpy(clip).permute(3, 0, 1, 2).float()[None] / 127.5 - 1 for clip in clips)
    return torch.cat([network.features(video) for video in videos])


def _displacement(clip: Pixels) -> tuple[float, float]:
    """How far the subject goes from the first to the last frame, in heights; zero where it cannot be told."""
    track = find_subject(clip)
    if not (track.seen[0] and track.seen[-1]):
        return 0.0, 0.0
    return float(track.x[-1] - track.x[0]), float(track.y[-1] - track.y[0])


def _cosine(first: tuple[float, float], second: tuple[float, float]) -> float:
    lengths = float(np.hypot(*first) * np.hypot(*second))
    return float(np.dot(first, second)) / lengths if lengths > 1e-9 else 0.0


def image_manipulation(stage: Stage) -> Result:
    """The subject's place is made anew after a prompt of another subject; all around it stays."""
    scenes = stage.scenes(still=True)
    real = [stage.show(scene)[0] for scene in scenes]
    subjects = stage.theatre.subjects
    wanted = [subjects[(subjects.index(scene.subjects[0]) + 1 + i % (len(subjects) - 1)) % len(subjects)]
              for i, scene in enumerate(scenes)]  # fmt: skip
    prompts = [
        describe((name,), "stays", scene.background, still=True) for name, scene in zip(wanted, scenes, strict=True)
    ]
    masks = [_around(stage, scene) for scene in scenes]
    kept, around, shown = [], [], []
    for clip, mask, (made, tokens) in zip(real, masks, _masked(stage, real, masks, prompts), strict=True):
        kept.append(_kept(stage, clip, tokens, mask))
        through = stage.pixels(stage.tokens(clip))
        around.append(psnr(made, through, (mask <= 0.5)[None]))
        shown.append(made)
    named = [stage.judge(clip).subject for clip in shown]
    before = [scene.subjects[0] for scene in scenes]
    task = "image manipulation"
    figures = [
        Figure(task, "subject is the prompt's", len(real), share([a == b for a, b in zip(named, wanted, strict=True)]),
               None, share([stage.judge(clip).subject == b for clip, b in zip(real, wanted, strict=True)]).estimate,
               "the image unchanged"),
        Figure(task, "subject is still the old one", len(real),
               share([a == b for a, b in zip(named, before, strict=True)]), None,
               share([stage.judge(clip).subject == b for clip, b in zip(real, before, strict=True)]).estimate,
               "the image unchanged"),
        Figure(task, "given tokens kept", len(real), _mean(kept), 1.0, None, ""),
        Figure(task, "PSNR of the kept part, dB", len(real), _mean(around), None, None,
               "against the image through the tokenizer"),
    ]  # fmt: skip
    examples = [Example(f"{task}: {p}", clip, one) for p, clip, one in zip(prompts, real, shown, strict=True)]
    return Result(figures, examples)


def _around(stage: Stage, scene: Scene) -> NDArray[np.float32]:
    """`(H, W)`: 1 in the subject's box and half a token around it."""
    height, width = stage.size
    left, top, right, bottom = stage.theatre.box(scene, 0, height, width)
    more = stage.pipe.vae_scale_factor_spatial // 2
    mask = np.zeros((height, width), np.float32)
    mask[max(0, int(top) - more) : int(bottom) + more, max(0, int(left) - more) : int(right) + more] = 1
    return mask


def video_manipulation(stage: Stage) -> Result:
    """From its third frame on, a clip that goes one way is made anew after a prompt of the other way."""
    edit_from = 2
    scenes: list[Scene] = []
    seed = stage.first
    while len(scenes) < stage.count and seed < stage.first + 100 * stage.count:
        scene = stage.theatre.scene(seed, SCENE_FRAMES)
        scenes += [scene] if scene.motion in STRAIGHT else []
        seed += 1
    if not scenes:
        raise WaltError("theatre: none of its motions has an opposite")
    real = [stage.show(scene)[0] for scene in scenes]
    prompts = [describe(scene.subjects, OPPOSITES[scene.motion], scene.background) for scene in scenes]
    calls = [
        {"video": clip, "edit_from": edit_from, "prompt": prompt} for clip, prompt in zip(real, prompts, strict=True)
    ]
    made, kept = [], []
    for clip, (one, tokens) in zip(real, stage.run(calls), strict=True):
        made.append(one)
        kept.append(float((stage.tokens(clip) == tokens)[:edit_from].float().mean()))
    turned, before = (
        [_goes(clip[edit_from - 1 :], OPPOSITES[scene.motion]) for clip, scene in zip(clips, scenes, strict=True)]
        for clips in (made, real)
    )
    same = [stage.judge(clip).subject == scene.subjects[0] for clip, scene in zip(made, scenes, strict=True)]
    task = "video manipulation"
    figures = [
        Figure(task, "turns to the prompt's direction", len(real), share(turned), None, share(before).estimate,
               "the video unchanged"),
        Figure(task, "subject is still the same", len(real), share(same),
               share([stage.judge(c).subject == s.subjects[0] for c, s in zip(real, scenes, strict=True)]).estimate,
               None, ""),
        Figure(task, "given tokens kept", len(real), _mean(kept), 1.0, None, ""),
    ]  # fmt: skip
    examples = [Example(f"{task}: {p}", clip, one) for p, clip, one in zip(prompts, real, made, strict=True)]
    return Result(figures, examples)


def _goes(clip: Pixels, motion: str) -> bool:
    """Whether the subject's way has the sign of a straight motion."""
    x, y = _displacement(clip)
    return {"moves left to right": x, "moves right to left": -x, "falls": y, "rises": -y}[motion] > 0.02


TASKS: dict[str, Callable[[Stage], Result]] = {
    "text-to-image": lambda stage: text(stage, still=True),
    "text-to-video": lambda stage: text(stage, still=False),
    "sketch-to-image": lambda stage: sketch(stage, still=True),
    "sketch-to-video": lambda stage: sketch(stage, still=False),
    "complete": completion,
    "predict": prediction,
    "edit-image": image_manipulation,
    "edit-video": video_manipulation,
}


# -------------------------------------------------------------------------------------------------------------- report


def table(figures: Sequence[Figure]) -> Table:
    """One line per figure."""
    result = Table("task", "measure", "n", "made", "95 %", "real", "control", "control is")
    for one in figures:
        cells = ["-" if value is None else f"{value:.3g}" for value in (one.real, one.control)]
        span = f"{one.made.low:.3g} to {one.made.high:.3g}"
        result.add_row(one.task, one.measure, str(one.count), f"{one.made.estimate:.3g}", span, *cells, one.against)
    return result


def write_report(path: Path, figures: Sequence[Figure], settings: dict[str, Any]) -> None:
    """Every figure as JSON, in one stroke."""
    with replacing(path) as temporary:
        report = {"settings": settings, "figures": [asdict(one) for one in figures]}
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_sheet(path: Path, results: Sequence[Result], rows: int = 4) -> None:
    """The first examples of every task, nothing selected: what was given on the left, what was made on the right."""
    strips = [_row(example) for result in results for example in result.examples[:rows]]
    columns = 2 if len(strips) > 1 else 1
    lines = -(-len(strips) // columns)
    width, height = max(s.width for s in strips), strips[0].height
    sheet = Image.new("RGB", (columns * width + 8 * (columns - 1), lines * (height + 4)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (i // lines * (width + 8), i % lines * (height + 4)))
    write_image(np.asarray(sheet), path)


def _row(example: Example, side: int = 72) -> Image.Image:
    """Given and made frames at `side` lines, with the label above."""
    parts = [] if example.given is None else [example.given]
    images = [[_small(frame, side) for frame in clip] for clip in (*parts, example.made)]
    width = sum(image.width for strip in images for image in strip) + 12 * (len(images) - 1)
    row = Image.new("RGB", (max(width, 6 * len(example.label) + 8), side + 14), "white")
    ImageDraw.Draw(row).text((2, 1), example.label, fill="black")
    x = 0
    for strip in images:
        for image in strip:
            row.paste(image, (x, 14))
            x += image.width
        x += 12
    return row


def _small(frame: Pixels, side: int) -> Image.Image:
    return Image.fromarray(frame).resize((round(side * frame.shape[1] / frame.shape[0]), side), Image.Resampling.BOX)
