"""NUWA's objective: the cross-entropy of five tasks on tokens (arXiv 2111.12417, section 3.4).

A task is a condition (text, the constant "None", or a sketch) and a target (a still or a clip); all tasks share the
model, and every step holds samples of each. Letters: B samples, T frames, h w tokens, S codes per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.conditioning import drop
from walt.data.clips import Clips
from walt.data.emoji import FPS
from walt.data.tokens import Kind, NuwaMedia, NuwaScenes, Pictures, TokenFolder, Tokens, encode
from walt.errors import WaltError
from walt.training.job import DataJob, MediaJob, NuwaJob, NuwaTask
from walt.training.loop import Objective
from walt.training.objectives import TextStates, build_model, start_from
from walt.training.plan import ForwardCounter


@dataclass(frozen=True)
class TaskKind:
    """What a task is told and what it makes."""

    condition: str  # "text", "none" or "sketch"
    target: Kind


TASKS: dict[str, TaskKind] = {
    "text_to_image": TaskKind("text", "still"),
    "video_to_video": TaskKind("none", "clip"),
    "text_to_video": TaskKind("text", "clip"),
    "sketch_to_image": TaskKind("sketch", "still"),
    "sketch_to_video": TaskKind("sketch", "clip"),
}


def trained_tasks(job: NuwaJob) -> dict[str, NuwaTask]:
    """The tasks of a recipe that have a batch; a WaltError where none has."""
    tasks = {name: task for name in TASKS if (task := getattr(job.tasks, name)).batch}
    if not tasks:
        raise WaltError("tasks: no task has a batch, so there is nothing to train")
    return tasks


def draw_tasks(tasks: dict[str, NuwaTask], rng: np.random.Generator) -> list[str]:
    """The task of every sample of a pack: `batch` of each, a fraction by chance; never none at all."""
    names: list[str] = []
    while not names:
        for name, task in tasks.items():
            names += [name] * (int(task.batch) + int(rng.random() < task.batch % 1))
    return names


def check_fields(job: NuwaJob) -> None:
    """A WaltError for a field that other jobs obey and this one would ignore."""
    if job.run.heldout_every:
        raise WaltError("run.heldout_every: NUWA has no held-out loss (walt evaluate nuwa measures it); set it to 0")
    if job.data.latents is not None:
        raise WaltError("data.latents: NUWA is trained on tokens, which tokens=FOLDER keeps; leave it out")
    if isinstance(job.data, DataJob) and job.data.draw != "host":
        raise WaltError('data.draw: scenes of NUWA are drawn on the host; set it to "host"')
    if job.turns and (not isinstance(job.data, DataJob) or job.tokens is not None):
        raise WaltError(
            "turns: the theatre alone knows what a clip shows backwards, and no token folder keeps it; set it to 0"
        )
    if job.turns and job.clip.frames < 3:
        raise WaltError(f"turns: a clip of {job.clip.frames} frames cannot turn, it needs 3")
    if job.continued and job.clip.frames < 2:
        raise WaltError(f"continued: a clip of {job.clip.frames} frame has none to go on with, it needs 2")
    if isinstance(job.data, DataJob) and (job.data.fps != FPS or job.data.clip_subjects):
        name = "clip_subjects" if job.data.clip_subjects else "fps"
        raise WaltError(f"data.{name}: NUWA's clips show the theatre's every subject, clip.frame_step sets their rate")


@dataclass(frozen=True)
class Sample:
    """One sample of a task: pixels, or tokens where the recipe keeps a token folder."""

    task: str
    data: Pictures | Tokens


def token_loss(logits: Tensor, tokens: Tensor, given: Sequence[int] | None = None) -> Tensor:
    """Mean cross-entropy (nats per code) of each sample: logits `(B, T, ..., V)` and long tokens `(B, T, ...)` give `(B,)`.

    Of a sample's first `given` frames there is no loss.
    """
    losses = F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten(), reduction="none").view(len(tokens), -1)
    if given is None or not any(given):
        return losses.mean(dim=1)
    frames = losses.unflatten(1, (tokens.shape[1], -1)).mean(dim=2)
    return torch.stack([row[skipped:].mean() for row, skipped in zip(frames, given, strict=True)])


def turn(frames: int, generator: torch.Generator) -> tuple[int, list[int]]:
    """A clip of so many frames that turns back: how many frames go forth, two at least, and which frames it shows."""
    forth = int(torch.randint(2, frames, (), generator=generator))
    back = frames - forth
    first = int(torch.randint(max(0, back - forth + 1), back + 1, (), generator=generator))
    last = first + forth - 1
    return forth, [*range(first, last + 1), *range(last - 1, last - 1 - back, -1)]


class NuwaObjective(Objective):
    """Weighted sum over tasks of the mean cross-entropy of their samples' tokens.

    The paper sums over tokens, here each task's loss is its mean, so that weights mean the same for stills and clips.
    A text or sketch is replaced by the constant condition "None" (the model's own word) with probability
    `condition_dropout`, so that the model without condition, which guidance and completion need, is learnt too.
    """

    model: Any
    clips: Clips | None = None  # of a user's media

    def __init__(self, job: NuwaJob, transformer: type[Any], vq: Any, vq_seg: Any, words: TextStates) -> None:
        self.job = job
        check_fields(job)
        self.tasks = trained_tasks(job)
        sketched = [name for name in self.tasks if TASKS[name].condition == "sketch"]
        if sketched and isinstance(job.data, MediaJob):
            raise WaltError(
                f"tasks.{sketched[0]}: the theatre alone draws sketches, a user's media have none; set its batch to 0"
            )
        if sketched and vq_seg is None:
            raise WaltError(f"sketch_tokenizer: {sketched[0]} needs the folder of a trained VQ-Seg")
        self.vq, self.vq_seg = vq.eval().requires_grad_(False), vq_seg
        if vq_seg is not None:
            vq_seg.eval().requires_grad_(False)
        for side in (job.clip.height, job.clip.width):
            if side % vq.spatial_compression_ratio:
                raise WaltError(f"clip: {side} pixels are not a multiple of {vq.spatial_compression_ratio} (tokenizer)")
        torch.manual_seed(job.run.seed)
        self.model = build_model(transformer, job.model)
        if job.init is not None:
            start_from(self.model, job.init)
        self.words, self.device = words, torch.device("cpu")
        self.last_seen: dict[str, Tensor] = {}
        self.kinds: tuple[Kind, ...] = tuple(sorted({TASKS[name].target for name in self.tasks}))
        self.scenes: NuwaScenes | NuwaMedia
        if isinstance(job.data, MediaJob):
            self.scenes = NuwaMedia(job, self.kinds, int(vq.spatial_compression_ratio))
            self.clips = self.scenes.clips
        else:
            self.scenes = NuwaScenes(job)
        self.folder = TokenFolder(job, self.kinds) if job.tokens is not None else None
        self.counter = ForwardCounter(transformer, dict(self.model.config))

    def to(self, device: torch.device) -> None:
        """Moves the frozen parts, and fills the token folder."""
        self.device = device
        self.vq.to(device)
        if self.vq_seg is not None:
            self.vq_seg.to(device)
        self.words.to(device)
        if self.folder is not None and not self.folder.rows:
            self.folder.fill(self._encode_video, None if self.vq_seg is None else self._encode_sketch)

    def batch(self, step: int, rank: int) -> list[Sample]:
        """`batch` samples of every task, a pure function of (recipe, step, rank); never none at all."""
        rng = np.random.default_rng((self.job.run.seed, step, rank))
        source = self.scenes if self.folder is None else self.folder
        names = draw_tasks(self.tasks, rng)
        if self.clips is not None:
            # Places of their own in the stream for every step and lane, so that an epoch shows each clip about once.
            most = sum(math.ceil(task.batch) for task in self.tasks.values())
            first = (step * self.clips.packs + rank) * most
            numbers = list(range(first, first + len(names)))
        else:
            assert isinstance(self.job.data, DataJob)
            numbers = [int(rng.integers(self.job.data.scenes)) for _ in names]
        return [Sample(name, source.get(TASKS[name].target, n)) for name, n in zip(names, numbers, strict=True)]

    def loss(
        self, model: nn.Module, batch: list[Sample], generator: torch.Generator, shared: Any = None
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        encoded = [self._tokens(sample.data, TASKS[sample.task].condition == "sketch") for sample in batch]
        lost = drop(len(batch), self.job.condition_dropout, generator)
        batch, encoded, given = self._begun(batch, encoded, lost, generator)
        seen: dict[str, float | Tensor] = {"samples": len(batch), "tokens": sum(row.video.numel() for row in encoded)}
        losses: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        groups: dict[tuple[str, Kind], list[int]] = {}
        for i, sample in enumerate(batch):
            kind = TASKS[sample.task]
            sketch = kind.condition == "sketch" and not lost[i]
            groups.setdefault(("sketch" if sketch else "text", kind.target), []).append(i)
        # One forward per kind of condition and size of target: nothing is padded.
        for (condition, _), members in sorted(groups.items()):
            rows = [encoded[i] for i in members]
            tokens = torch.stack([row.video for row in rows]).to(self.device)
            told: dict[str, Any] = {}
            if condition == "sketch":
                told["sketch"] = torch.stack([row.sketch for row in rows if row.sketch is not None])
            else:
                told["text"] = self._texts([(batch[i], lost[i]) for i in members])
            known = [given[i] for i in members]
            values = token_loss(model(self._noisy(tokens, known, generator), **told), tokens, known)
            for i, value in zip(members, values, strict=True):
                losses[batch[i].task].append(value)
        total = torch.zeros((), device=self.device)
        for name, parts in losses.items():
            if not parts:
                if name in self.last_seen:  # so that the log's means over steps are means of this task's losses
                    seen[name] = self.last_seen[name]
                continue
            mean = torch.stack(parts).mean()
            total = total + self.tasks[name].weight * mean
            seen[name] = self.last_seen[name] = mean.detach()
        return total, seen

    def _begun(
        self, batch: list[Sample], encoded: list[Tokens], lost: list[bool], generator: torch.Generator
    ) -> tuple[list[Sample], list[Tokens], list[int]]:
        """The samples with the number of first frames that each is given, for which there is no loss: `continued` of the
        clips without a text go on from some of theirs, `turns` of those with one turn back after them."""
        given = [0] * len(batch)
        if not (self.job.turns or self.job.continued):
            return batch, encoded, given
        batch, encoded = list(batch), list(encoded)
        for i, (sample, row) in enumerate(zip(batch, encoded, strict=True)):
            chance = float(torch.rand((), generator=generator))
            if sample.task == "video_to_video" and chance < self.job.continued:
                given[i] = int(torch.randint(1, len(row.video), (), generator=generator))
            elif sample.task == "text_to_video" and chance < self.job.turns and row.backwards and not lost[i]:
                given[i], order = turn(len(row.video), generator)
                encoded[i] = replace(row, video=row.video[order], caption=row.backwards)
                batch[i] = replace(sample, data=encoded[i])
        return batch, encoded, given

    def flops(self, batch: list[Sample]) -> float | None:
        """As if no condition were dropped: a sketch that is costs a little less."""
        total = 0.0
        for sample in batch:
            if isinstance(sample.data, Tokens):
                s, h, w = sample.data.video.shape[:3]
            else:
                space = self.vq.spatial_compression_ratio
                s, h, w = len(sample.data.video), *(side // space for side in sample.data.video.shape[-2:])
            total += self.counter((s, h, w, int(TASKS[sample.task].condition == "sketch")))
        return total

    def _noisy(self, tokens: Tensor, given: Sequence[int], generator: torch.Generator) -> Tensor:
        """What the model sees of `tokens` `(B, s, h, w[, S])`: of `token_noise` of the samples a part, from none to all
        of it, is random codes; frames that are `given` stay as they are.

        Neighbours foretell most tokens, so that the condition decides but a few of them: where a background begins, or a
        subject. Where neighbours say nothing, every token must be told from the condition.
        """
        if not self.job.token_noise:
            return tokens
        some, rate = torch.rand(2, len(tokens), generator=generator)
        rate = rate * (some < self.job.token_noise)
        places = torch.rand(tokens.shape[:4], generator=generator) < rate[:, None, None, None]
        places &= torch.arange(tokens.shape[1])[None, :, None, None] >= torch.tensor(given)[:, None, None, None]
        codes = torch.randint(int(self.model.config.vocab_size), tokens.shape, generator=generator)
        places = places if tokens.ndim == 4 else places[..., None]
        return torch.where(places.to(self.device), codes.to(self.device), tokens)

    def _texts(self, samples: list[tuple[Sample, bool]]) -> list[Tensor | None]:
        """The states of each sample's caption, None (the word "None") where there is to be no condition."""
        # A caption that is not there is no condition.
        said = [None if lost or TASKS[s.task].condition != "text" else s.data.caption or None for s, lost in samples]
        states = iter(self.words([caption for caption in said if caption is not None]))
        return [None if caption is None else next(states) for caption in said]

    def _tokens(self, data: Pictures | Tokens, sketched: bool) -> Tokens:
        if isinstance(data, Tokens):
            return data
        return encode(data, self._encode_video, self._encode_sketch if sketched else None)

    def _encode_video(self, frames: Tensor) -> Tensor:
        codes: Tensor = self.vq.encode_indices(frames.to(self.device))
        return codes

    def _encode_sketch(self, maps: Tensor) -> Tensor:
        codes: Tensor = self.vq_seg.encode_indices(maps.to(self.device))
        return codes

    def export(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
