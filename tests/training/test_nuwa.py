"""NUWA's objective: every task's loss is the cross-entropy it says, and a tiny model learns through the one loop."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data import media
from tests.training.jobs import data, nuwa_job, save_nuwa_parts, saved
from walt.commands import build_objective, draw_sheet, plan_job
from walt.errors import WaltError
from walt.training.job import MediaJob, NuwaClip, NuwaJob, NuwaTask, NuwaTasks, SourceJob, load_job
from walt.training.loop import train
from walt.training.nuwa import TASKS, NuwaObjective, Sample, turn


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nuwa_parts(tmp_path_factory.mktemp("parts"))


def objective(parts: Path, **changes: Any) -> NuwaObjective:
    made = build_objective(nuwa_job(parts, parts / "run", **changes))
    assert isinstance(made, NuwaObjective)
    return made


def by_hand(made: NuwaObjective, sample: Sample, condition: str) -> float:
    """-log p of a sample's tokens, one at a time, in nats per token."""
    tokens = made._tokens(sample.data, True)
    if condition == "sketch":
        assert tokens.sketch is not None
        told = made.model.encode_condition(sketch=tokens.sketch[None])
    else:
        told = made.model.encode_condition(text=made.words([sample.data.caption]) if condition == "text" else [None])
    logits = made.model(tokens.video[None], told)[0].double()
    total = 0.0
    for place, token in zip(
        torch.cartesian_prod(*map(torch.arange, tokens.video.shape)), tokens.video.flatten(), strict=True
    ):
        row = logits[tuple(place)]
        total += float(torch.logsumexp(row, 0) - row[token])
    return total / tokens.video.numel()


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_each_task_is_the_mean_cross_entropy_of_its_samples(parts: Path, dropout: float) -> None:
    weights = {name: 1.0 + 0.5 * i for i, name in enumerate(NuwaTasks.model_fields)}
    tasks = NuwaTasks(**{name: NuwaTask(batch=2, weight=weight) for name, weight in weights.items()})
    made = objective(parts, tasks=tasks, condition_dropout=dropout)
    made.model.eval()
    batch = made.batch(3, 0)
    assert [sample.task for sample in batch] == [name for name in TASKS for _ in range(2)]
    with torch.no_grad():
        total, seen = made.loss(made.model, batch, torch.Generator().manual_seed(0))
        expected = {}
        for name, kind in TASKS.items():
            told = "none" if dropout else kind.condition
            expected[name] = sum(by_hand(made, s, told) for s in batch if s.task == name) / 2
    for name, value in expected.items():
        assert float(seen[name]) == pytest.approx(value, rel=1e-4), name
    assert float(total) == pytest.approx(sum(weights[name] * value for name, value in expected.items()), rel=1e-4)
    assert seen["samples"] == 10 and seen["tokens"] == 2 * 16 * (1 + 2 + 2 + 1 + 2)
    if not dropout:
        assert abs(expected["text_to_image"] - expected["sketch_to_image"]) > 1e-3  # conditions and samples differ


def test_conditions_reach_the_loss_by_gradient(parts: Path) -> None:
    """Every parameter learns: the text's and the sketch's ways in, the encoder and the decoder."""
    made = objective(parts, condition_dropout=0.0)
    loss, _ = made.loss(made.model, made.batch(0, 0), torch.Generator().manual_seed(0))
    loss.backward()
    dead = [name for name, p in made.model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not dead


def test_batches_are_pure_and_kept_tokens_give_the_same_loss(parts: Path, tmp_path: Path) -> None:
    fly, kept = objective(parts), objective(parts, tokens=str(tmp_path / "tokens"))
    kept.to(torch.device("cpu"))
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 4  # 64 stills and 64 clips, 32 a file
    losses = []
    for made in (fly, fly, kept):
        with torch.no_grad():
            losses.append(float(made.loss(fly.model, made.batch(5, 1), torch.Generator().manual_seed(1))[0]))
    assert losses[0] == losses[1] == losses[2]
    captions = [[sample.data.caption for sample in fly.batch(step, 0)] for step in (1, 2)]
    assert captions[0] != captions[1]


def test_plan_counts_parameters_and_operations(parts: Path) -> None:
    made = objective(parts)
    plan = plan_job(made.job, rate=1e9)
    assert plan.parameters == plan.trained == sum(p.numel() for p in made.model.parameters())
    counted = [made.flops(made.batch(step, 0)) for step in range(4)]
    assert all(counted) and plan.flops > 2.5 * min(count for count in counted if count)
    assert plan.tokens > 0 and plan.memory["activations"] > 0


def test_token_noise_hides_neighbours_from_some_samples(parts: Path) -> None:
    made = objective(parts, token_noise=0.5)
    tokens = torch.zeros(400, 2, 4, 4, dtype=torch.long)
    seen = made._noisy(tokens, [0] * 400, torch.Generator().manual_seed(0))
    changed = (seen != tokens).flatten(1).float().mean(dim=1)
    assert 0.4 < float((changed == 0).float().mean()) < 0.62 and float(changed.max()) > 0.85
    assert int(seen.min()) == 0 and int(seen.max()) == made.model.config.vocab_size - 1
    clean = objective(parts)
    assert clean._noisy(tokens, [0] * 400, torch.Generator()) is tokens
    later = made._noisy(tokens, [1] * 400, torch.Generator().manual_seed(0))  # given frames stay as they are
    assert not later[:, 0].any() and torch.equal(later[:, 1], seen[:, 1])


def test_clips_that_turn_are_told_so_and_lose_only_after_the_turn(parts: Path) -> None:
    """Their loss is that of the frames from the turn on, after the caption of the way back."""
    tasks = NuwaTasks(**{name: NuwaTask(batch=8 * (name == "text_to_video")) for name in NuwaTasks.model_fields})
    clip = NuwaClip(frames=4, frame_step=2, height=32, width=32)
    made = objective(parts, turns=1.0, condition_dropout=0.0, tasks=tasks, clip=clip)
    made.model.eval()
    batch = made.batch(0, 0)
    rows = [made._tokens(sample.data, False) for sample in batch]
    turned, shown, given = made._begun(batch, rows, [False] * 8, torch.Generator().manual_seed(3))
    backwards = [row.backwards for row in rows]
    assert [bool(n) for n in given] == [bool(text) for text in backwards] and 0 < sum(map(bool, given)) < 8
    for old, new, told_so, text, n in zip(rows, shown, turned, backwards, given, strict=True):
        assert told_so.data.caption == new.caption == (text or old.caption)
        if n:
            assert len(new.video) == 4 and torch.equal(new.video[n], new.video[n - 2])
        else:
            assert new is old
    with torch.no_grad():
        _, seen = made.loss(made.model, batch, torch.Generator().manual_seed(3))
        # the loss drew which captions are lost before it drew the turns
        generator = torch.Generator().manual_seed(3)
        torch.rand(8, generator=generator)
        turned, shown, given = made._begun(batch, rows, [False] * 8, generator)
        expected = 0.0
        for sample, row, n in zip(turned, shown, given, strict=True):
            told = made.model.encode_condition(text=made.words([sample.data.caption]))
            logits = made.model(row.video[None], told)[0].double()
            picked = logits.log_softmax(-1).gather(-1, row.video[..., None])
            expected -= float(picked[n:].mean()) / 8
    assert float(seen["text_to_video"]) == pytest.approx(expected, rel=1e-4)


def test_clips_that_go_on_lose_only_after_what_is_given(parts: Path) -> None:
    """Of a clip without a text some first frames are given, one at least and never all; other tasks are as before."""
    tasks = NuwaTasks(
        **{name: NuwaTask(batch=8 * (name in ("video_to_video", "text_to_video"))) for name in NuwaTasks.model_fields}
    )
    clip = NuwaClip(frames=4, frame_step=2, height=32, width=32)
    made = objective(parts, continued=1.0, condition_dropout=0.0, tasks=tasks, clip=clip)
    made.model.eval()
    batch = made.batch(0, 0)
    with torch.no_grad():
        _, seen = made.loss(made.model, batch, torch.Generator().manual_seed(3))
        rows = [made._tokens(sample.data, False) for sample in batch]
        generator = torch.Generator().manual_seed(3)
        torch.rand(len(batch), generator=generator)  # which captions are lost was drawn first
        same, shown, given = made._begun(batch, rows, [False] * len(batch), generator)
        assert same == batch and shown == rows
        expected = 0.0
        for sample, row, n in zip(batch, rows, given, strict=True):
            assert (1 <= n < 4) if sample.task == "video_to_video" else n == 0
            if sample.task == "video_to_video":
                logits = made.model(row.video[None], made.model.encode_condition(text=[None]))[0].double()
                picked = logits.log_softmax(-1).gather(-1, row.video[..., None])
                expected -= float(picked[n:].mean()) / 8
    assert len(set(given)) > 2
    assert float(seen["video_to_video"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("frames", [3, 4, 5, 10])
def test_a_turn_goes_forth_and_back(frames: int) -> None:
    generator, forths = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        forth, order = turn(frames, generator)
        forths.add(forth)
        assert len(order) == frames and min(order) >= 0 and max(order) < frames
        steps = [b - a for a, b in itertools.pairwise(order)]
        assert steps == [1] * (forth - 1) + [-1] * (frames - forth)
    assert forths == set(range(2, frames))


def test_a_tiny_model_learns_and_is_exported(parts: Path, tmp_path: Path) -> None:
    from walt.models.transformer_nuwa import NuwaTransformer3DModel

    job = nuwa_job(parts, tmp_path / "run", steps=40, tokens=str(tmp_path / "tokens"))
    final = train(job, build_objective(job))
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    first, last = (sum(row["text_to_video"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first
    assert isinstance(NuwaTransformer3DModel.from_pretrained(final), NuwaTransformer3DModel)


def test_a_run_goes_on_whose_model_has_parts_that_no_task_has_trained_yet(parts: Path, tmp_path: Path) -> None:
    """Pre-training has no sketch task: the optimizer knows nothing of the sketch's way in, and so does a checkpoint."""
    tasks = NuwaTasks(
        text_to_image=NuwaTask(batch=1), video_to_video=NuwaTask(batch=0), text_to_video=NuwaTask(batch=0)
    )

    def run(folder: str, *steps: int) -> dict[str, torch.Tensor]:
        for count in steps:
            job = nuwa_job(parts, tmp_path / folder, tasks=tasks)
            settings = {"steps": count, "checkpoint_every": 2}
            job = job.model_copy(
                update={
                    "run": job.run.model_copy(update=settings),
                    "optimizer": job.optimizer.model_copy(update={"schedule": "constant"}),
                }
            )
            train(job, build_objective(job))
        return saved(tmp_path / folder / f"checkpoint-{count:08d}")

    whole, resumed = run("whole", 4), run("resumed", 2, 4)
    assert not any("sketch_embed" in name and "optimizer" in name for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_it_trains_on_a_folder_and_on_shards(parts: Path, tmp_path: Path) -> None:
    """Clips for the clips, stills of images and of videos for the stills; a broken item is named and passed over."""
    (tmp_path / "folder").mkdir()
    for name, content in media.good_members(4):
        (tmp_path / "folder" / name).write_bytes(content)
    suffix, content = media.broken("zero bytes")
    (tmp_path / "folder" / f"bad{suffix}").write_bytes(content)
    (tmp_path / "folder" / "bad.txt").write_text("broken")
    (tmp_path / "shards").mkdir()
    media.write_shard(tmp_path / "shards" / "x-0.tar", media.good_members(4, first=4))
    sources = tuple(SourceJob(path=str(tmp_path / name)) for name in ("folder", "shards"))
    data = MediaJob(sources=sources, index=str(tmp_path / "index"), min_size=16, fps=4.0)
    tasks = NuwaTasks(
        video_to_video=NuwaTask(batch=0.5), text_to_video=NuwaTask(batch=2), text_to_image=NuwaTask(batch=2)
    )
    job = nuwa_job(parts, tmp_path / "run", steps=3, data=data, tasks=tasks, sketch_tokenizer=None)
    made = build_objective(job)
    first, again = made.batch(1, 0), build_objective(job).batch(1, 0)
    assert [s.data.caption for s in first] == [s.data.caption for s in again]
    assert all(torch.equal(a.data.video, b.data.video) for a, b in zip(first, again, strict=True))
    assert {tuple(s.data.video.shape) for s in first} == {(2, 3, 32, 32), (1, 3, 32, 32)}
    seen = {s.data.caption for step in range(12) for s in made.batch(step, 0)}
    assert "broken" not in seen and {caption.split()[0] for caption in seen} == {"clip", "image"}
    assert any(int(c.split()[1]) < 4 for c in seen) and any(int(c.split()[1]) >= 4 for c in seen)  # both sources
    final = train(job, build_objective(job), sheet=draw_sheet)
    assert (final / "config.json").exists() and (tmp_path / "run" / "sheet-00000003.png").exists()
    sketched = job.model_copy(update={"tasks": NuwaTasks(sketch_to_image=NuwaTask(batch=1))})
    with pytest.raises(WaltError, match=r"tasks.sketch_to_image: the theatre alone draws sketches"):
        build_objective(sketched)
    long = job.model_copy(update={"clip": NuwaClip(frames=40, height=32, width=32)})
    with pytest.raises(WaltError, match=r"a task needs videos of 40 frames at 4 a second, and there are none"):
        build_objective(long)


def test_faults(parts: Path) -> None:
    none = NuwaTasks(**{name: NuwaTask() for name in NuwaTasks.model_fields})
    for changes, message in (
        ({"tasks": none}, "tasks: no task has a batch"),
        ({"sketch_tokenizer": None}, "sketch_tokenizer: sketch_to_image needs the folder"),
        ({"clip": NuwaClip(frames=2, height=36, width=32)}, "36 pixels are not a multiple of 8"),
        ({"tokenizer": "none"}, "tokenizer: no model in 'none'"),
        ({"turns": 0.5}, "turns: a clip of 2 frames cannot turn, it needs 3"),
        ({"turns": 0.5, "tokens": "somewhere"}, "turns: the theatre alone knows"),
        ({"continued": 0.5, "clip": NuwaClip(frames=1, height=32, width=32)}, "continued: a clip of 1 frame has none"),
        ({"data": data(fps=16)}, "data.fps: .*clip.frame_step"),
        ({"data": data(clip_subjects=("sun",))}, "data.clip_subjects: .*every subject"),
        ({"data": data(latents="x")}, "data.latents: NUWA is trained on tokens"),
        ({"run": nuwa_job(parts, parts).run.model_copy(update={"heldout_every": 5})}, "run.heldout_every: NUWA has no"),
    ):
        with pytest.raises(WaltError, match=message):
            objective(parts, **changes)


@pytest.mark.parametrize(
    "name",
    [
        "nuwa.nuwa_870m",
        "nuwa.nuwa_256",
        "nuwa.small",
        "nuwa.large",
        "nuwa.emoji",
        "nuwa.emoji_clips",
        "nuwa.emoji_turns",
        "nuwa.emoji_recall",
        "nuwa.emoji_predict",
        "nuwa.emoji_finish",
    ],
)
def test_recipes_are_complete(name: str) -> None:
    job = load_job(name, ["tasks.text_to_video.batch=3", "run.steps=7"])
    assert isinstance(job, NuwaJob) and job.tasks.text_to_video.batch == 3 and job.run.steps == 7
