"""The engine on one rank: weighting, guard, averages, faults, SIGTERM, LoRA, positions, held-out loss, plan."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.data import media
from tests.training.jobs import benchmark, losses, save_tokenizer, saved, small_job, tokenizer_job
from walt.commands import build_objective, draw_sheet, plan_job
from walt.conditioning import MASK_KINDS, draw_given_frames, partial_captions, random_mask
from walt.errors import Terminated, WaltError
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.discriminator import Discriminator
from walt.training import checkpoint
from walt.training.adafactor import Adafactor
from walt.training.job import (
    AdversarialJob,
    DenoiserJob,
    DiffusionJob,
    Job,
    LoraJob,
    MediaJob,
    OptimizerJob,
    SourceJob,
    TokenizerJob,
    load_job,
    recipes,
)
from walt.training.loop import Loss, Objective, Part, _same_recipe, train
from walt.training.muon import Muon, orthogonalize
from walt.training.objectives import TextStates, interpolated_positions
from walt.training.optimizers import Guard, make_optimizer, warm
from walt.training.report import Report


def run(job: Job, **arguments: Any) -> Path:
    return train(job, build_objective(job), **arguments)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


class Line(Objective):
    """Fits w to numbers: packs of unlike size, with poison where a test wants it. Two parts if `second`."""

    def __init__(self, job: DenoiserJob, poison: dict[int, float] | None = None, second: bool = False) -> None:
        self.job, self.poison, self.second = job, poison or {}, second
        torch.manual_seed(0)
        self.model, self.other = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(1, 1)

    def batch(self, step: int, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        return torch.randn(2 + 3 * rank, 3, generator=generator) * self.poison.get(step, 1.0)

    def to(self, device: torch.device) -> None:
        pass

    def loss(self, model, batch, generator, shared=None):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean(), {
            "weight": len(batch),
            "samples": len(batch),
        }

    def parts(self) -> dict[str, Part]:
        parts = super().parts()
        return {**parts, "other": Part(self.other, OptimizerJob(lr=1e-2))} if self.second else parts

    def losses(self, batch, generator, shared, step):
        if not self.second:
            yield from super().losses(batch, generator, shared, step)
            return
        made = self.model(batch)
        # The first part is pulled through the second, which must not learn from that.
        yield Loss(self.other(made).square().sum(), len(batch), {})
        yield None if step % 2 else Loss((self.other(made.detach()) - 1).square().sum(), len(batch), {})

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        folder.mkdir()


def line_job(output: Path, steps: int, **run: Any) -> DenoiserJob:
    job = small_job(output, output, steps, **run)
    return job.model_copy(update={"optimizer": OptimizerJob(lr=1e-2, schedule="constant", clip_norm=1e9)})


def test_accumulated_packs_weigh_by_what_they_hold(tmp_path: Path) -> None:
    """One step on packs of 2, 5 and 8 rows is one step on their 15 rows."""
    objective = Line(line_job(tmp_path, 1, packs=3))
    weight = torch.nn.Parameter(objective.model.weight.detach().clone())
    x = torch.cat([objective.batch(0, lane) for lane in range(3)])
    loss = (x @ weight.T - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0).step()
    train(objective.job, objective)
    assert losses(tmp_path)[1] == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(objective.model.weight, weight, atol=1e-7)
    assert rows(tmp_path)[0]["samples"] == 15


def test_parts_learn_only_from_their_own_loss_and_rest_when_told(tmp_path: Path) -> None:
    objective = Line(line_job(tmp_path, 2, checkpoint_every=1), second=True)
    train(objective.job, objective)
    first, second = (saved(tmp_path / f"checkpoint-{step:08d}") for step in (1, 2))
    assert torch.equal(first["other.model.weight"], second["other.model.weight"])  # it rested in step 2
    assert not torch.equal(first["model.model.weight"], second["model.model.weight"])
    # Step 1: AdamW moves by lr in the sign of the gradient of its own loss, not of the first part's.
    fresh = Line(objective.job, second=True)
    made = fresh.model(fresh.batch(0, 0)).detach()
    (fresh.other(made) - 1).square().sum().backward()
    moved = first["other.model.weight"] - fresh.other.weight.detach()
    assert torch.allclose(moved, -1e-2 * fresh.other.weight.grad.sign(), atol=1e-4)  # type: ignore[union-attr]


def test_average_follows_its_formula(tmp_path: Path) -> None:
    job = line_job(tmp_path, 6, checkpoint_every=1, keep_checkpoints=9, ema_decay=0.6)
    train(job, Line(job))
    average = None
    for step in range(1, 7):
        state = saved(tmp_path / f"checkpoint-{step:08d}")
        weight = state["model.model.weight"].double()
        decay = 0.0 if step == 1 else min(0.6, 1 - step**-0.75)
        average = weight if average is None else decay * average + (1 - decay) * weight
        assert torch.allclose(state["ema.weight"].double(), average, atol=1e-6), step
    job = line_job(tmp_path / "off", 1, ema_decay=0.0)
    train(job, Line(job))
    assert not any(name.startswith("ema.") for name in saved(tmp_path / "off" / "checkpoint-00000001"))


def test_adafactor_is_that_of_torch() -> None:
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (5,), (3, 2, 3, 3))]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    settings: dict[str, Any] = {"lr": 3e-2, "weight_decay": 0.1}
    ours, theirs = Adafactor(first, **settings), torch.optim.Adafactor(second, **settings)
    for step in range(30):
        for a, b in zip(first, second, strict=True):
            a.grad = torch.randn(a.shape) * 10 ** (step % 5 - 2)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, second, strict=True))
    assert sum(v.numel() for k, v in ours.state[first[0]].items() if k != "step") == 6 + 4


def test_muon_is_that_of_torch_on_matrices_and_adamw_on_the_rest() -> None:
    torch.manual_seed(0)
    shapes = ((6, 40), (40, 6), (16, 16), (7,))
    first = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    ours = Muon(first, lr=3e-2, weight_decay=0.1, betas=(0.9, 0.95))
    theirs = torch.optim.Muon(second[:3], lr=3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(second[3:], lr=3e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(20):
        for a, b in zip(first, second, strict=True):
            a.grad = torch.randn(a.shape) * 10 ** (step % 5 - 2)
            b.grad = a.grad.clone()
        for optimizer in (ours, theirs, rest):
            optimizer.step()
    assert torch.allclose(first[3], second[3], atol=1e-6)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.allclose(a, b, atol=2e-3)  # theirs iterates in bfloat16
    # A convolution's kernel is the matrix (out, in x taps).
    kernel, flat = torch.nn.Parameter(torch.randn(6, 4, 3, 3)), torch.randn(6, 36)
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad, matrix.grad = flat.view_as(kernel), flat
    Muon([kernel]).step()
    Muon([matrix]).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_muon_in_bfloat16_goes_nearly_the_same_way() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(24, 60)
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix, half=True)
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999
    job = OptimizerJob(kind="muon", lr=1e-2)
    parameters = [torch.nn.Parameter(matrix)]
    assert [cast(Muon, make_optimizer(job, parameters, half)).half for half in (True, False)] == [True, False]


# -- guard


def test_guard_skips_what_is_not_finite_and_what_jumps(tmp_path: Path) -> None:
    job = line_job(tmp_path, 24, checkpoint_every=1, keep_checkpoints=99)
    objective = Line(job, {3: math.nan, 20: 1e3})
    train(job, objective)
    notes = {row["step"]: row["note"] for row in rows(tmp_path) if "note" in row}
    assert set(notes) == {4, 21}
    assert "loss nan" in notes[4] and "times the usual" in notes[21]
    for step in (4, 21):
        before, after = (saved(tmp_path / f"checkpoint-{n:08d}") for n in (step - 1, step))
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["skipped"] for row in rows(tmp_path) if row["step"] in (4, 5) and "skipped" in row] == [1.0, 0.0]
    # What the guard remembers survives a resume: the same step is refused again.
    for step in range(18, 25):
        (tmp_path / f"checkpoint-{step:08d}").rename(tmp_path / f"was-{step}")
    train(job, Line(job, {20: 1e3}))
    a, b = saved(tmp_path / "was-24"), saved(tmp_path / "checkpoint-00000024")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_guard_lets_a_discriminator_grow(tmp_path: Path) -> None:
    """Its gradients begin next to nothing; only what is not finite is refused."""
    guard = Guard(line_job(tmp_path, 24).run)
    losses = {"model": 1.0, "adversary": 2.0}
    for _ in range(2 * Guard.FIRST):
        assert guard.refuses(losses, {"model": 1.0, "adversary": 1e-4}) is None
    assert guard.refuses(losses, {"model": 1.0, "adversary": 5.0}) is None
    assert "adversary" in (guard.refuses(losses, {"model": 1.0, "adversary": math.inf}) or "")
    assert "model" in (guard.refuses(losses, {"model": 1e3, "adversary": 5.0}) or "")


def test_a_skipped_step_has_no_share_in_the_mean_loss(tmp_path: Path) -> None:
    for every in (1, 4):
        job = line_job(tmp_path / str(every), 4, log_every=every)
        train(job, Line(job, {2: math.nan}))
    found = [row["loss"] for row in rows(tmp_path / "1") if "loss" in row]
    assert len(found) == 3
    (mean,) = (row["loss"] for row in rows(tmp_path / "4") if "loss" in row)
    assert mean == pytest.approx(sum(found) / 3)
    assert [row["samples"] for row in rows(tmp_path / "4") if "samples" in row] == [2.0]


def test_a_gradient_after_none_is_no_jump(tmp_path: Path) -> None:
    guard = Guard(line_job(tmp_path, 1).run)
    for _ in range(Guard.FIRST):
        assert guard.refuses({"model": 1.0}, {"model": 0.0}) is None
    assert guard.refuses({"model": 1.0}, {"model": 0.5}) is None


def test_guard_gives_up_after_enough_in_a_row(tmp_path: Path) -> None:
    job = line_job(tmp_path, 20, max_skips=3)
    with pytest.raises(WaltError, match=r"step 7: 3 updates in a row were refused .*nan.* lower optimizer.lr"):
        train(job, Line(job, dict.fromkeys(range(4, 20), math.nan)))


# -- checkpoints


def test_full_disk_keeps_the_last_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writes fail from step 4 to 6; training goes on, and step 8 is whole again."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    write, failing = HuggingFaceStorageWriter.write_data, {4, 6}

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if int(str(self.path).split("-")[-1].split(".")[0]) in failing:
            (Path(self.path) / "half.safetensors").write_bytes(b"x" * 100)
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    job = line_job(tmp_path / "a", 8, checkpoint_every=2, keep_checkpoints=9)
    train(job, Line(job))
    said = " ".join(capsys.readouterr().out.split())
    assert "No space left on device; the last one, checkpoint-00000002, is untouched; training goes on" in said
    kept = sorted(path.name for path in (tmp_path / "a").glob("*checkpoint*"))
    assert kept == ["checkpoint-00000002", "checkpoint-00000008"]
    failing.add(8)
    job = line_job(tmp_path / "b", 8, checkpoint_every=8)
    with pytest.raises(WaltError, match=r"cannot write checkpoint .*00000008: No space left.*no earlier one"):
        train(job, Line(job))
    failing |= {2}
    job = line_job(tmp_path / "c", 20, checkpoint_every=2)
    with pytest.raises(WaltError, match="No space left"):  # the third in a row
        train(job, Line(job))


def test_checkpoint_holds_the_step_it_names_while_training_goes_on(tmp_path: Path) -> None:
    """Written in the background or not: the same tensors."""
    for name, background in (("a", True), ("b", False)):
        job = line_job(tmp_path / name, 9, checkpoint_every=1, keep_checkpoints=9, checkpoint_async=background)
        train(job, Line(job))
    for step in range(1, 10):
        a, b = (saved(tmp_path / name / f"checkpoint-{step:08d}") for name in ("a", "b"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_export_that_cannot_be_written_is_said_and_tried_again(tmp_path: Path) -> None:
    class Full(Line):
        def export(self, model: torch.nn.Module, folder: Path) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    job = line_job(tmp_path, 2)
    with pytest.raises(WaltError, match=r"cannot write .*final: .*No space left.*the same command tries again"):
        train(job, Full(job))
    assert train(job, Line(job)).is_dir()


def test_starting_over_keeps_old_checkpoints_aside(tmp_path: Path) -> None:
    job = line_job(tmp_path, 4)
    train(job, Line(job))
    train(line_job(tmp_path, 2), Line(line_job(tmp_path, 2)), resume=False)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-00000002"
    assert (tmp_path / "replaced-checkpoint-00000004").is_dir()
    assert len((tmp_path / "replaced-log.jsonl").read_text().splitlines()) == 4
    assert sorted(losses(tmp_path)) == [1, 2]


def test_other_number_of_packs_is_refused_with_the_way_out(tmp_path: Path) -> None:
    job = line_job(tmp_path, 2, packs=2)
    train(job, Line(job))
    with pytest.raises(WaltError, match=r"2 packs per step, these ranks make 1: run.packs=2"):
        train(line_job(tmp_path, 4), Line(line_job(tmp_path, 4)))


def test_sigterm_saves_and_resume_is_exact(tmp_path: Path) -> None:
    class Stopping(Line):
        def batch(self, step: int, rank: int) -> torch.Tensor:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step, rank)

    before = signal.getsignal(signal.SIGTERM)
    job = line_job(tmp_path / "stopped", 10, checkpoint_every=100)
    with pytest.raises(Terminated, match="SIGTERM after step 6"):
        train(job, Stopping(job))
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.latest(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-00000006"
    train(job, Line(job))
    straight = line_job(tmp_path / "straight", 10, checkpoint_every=100)
    train(straight, Line(straight))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_sigterm_to_the_workers_too_is_no_crash(tmp_path: Path) -> None:
    """A scheduler signals every process of a job."""

    class Stopping(Line):
        def batch(self, step: int, rank: int) -> torch.Tensor:
            if step == 5:
                for process in (os.getppid(), os.getpid()):
                    os.kill(process, signal.SIGTERM)
            return super().batch(step, rank)

    job = line_job(tmp_path / "stopped", 30, checkpoint_every=100, workers=1)
    with pytest.raises(Terminated):
        train(job, Stopping(job))
    assert checkpoint.latest(tmp_path / "stopped") is not None
    train(job, Line(job))
    straight = line_job(tmp_path / "straight", 30, checkpoint_every=100)
    train(straight, Line(straight))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_packs_of_many_tensors_come_from_workers(tmp_path: Path) -> None:
    class Many(Line):
        def batch(self, step: int, rank: int) -> Any:
            return [row.clone() for row in super().batch(step, rank).repeat(100, 1)]

        def loss(self, model, batch, generator, shared=None):
            return super().loss(model, torch.stack(batch), generator, shared)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        job = line_job(tmp_path, 3, workers=1)
        train(job, Many(job))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(losses(tmp_path)) == 3


def test_what_a_stopped_run_did_not_come_to_look_at_is_looked_at(tmp_path: Path) -> None:
    class Watched(Line):
        stop = False

        def heldout(self, model: torch.nn.Module) -> dict[str, float]:
            if self.stop:
                raise KeyboardInterrupt  # after the checkpoint of the same step
            return {"loss": 1.0}

    def draw(objective: Objective, model: torch.nn.Module, path: Path | None) -> None:
        assert path is not None
        path.write_bytes(b"sheet")

    job = line_job(tmp_path, 4, checkpoint_every=2, heldout_every=2, sheet_every=2, checkpoint_async=False)
    stopped = Watched(job)
    stopped.stop = True
    with pytest.raises(KeyboardInterrupt):
        train(job, stopped, draw)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-00000002"
    for _ in range(2):  # the second time there is nothing left to do
        train(job, Watched(job), draw)
        assert [row["step"] for row in rows(tmp_path) if "heldout" in row] == [2, 4]
        assert sorted(path.name for path in tmp_path.glob("sheet-*")) == ["sheet-00000002.png", "sheet-00000004.png"]


def test_cli_exit_code_of_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from walt import cli, commands

    def killed(job: DenoiserJob) -> Line:
        os.kill(os.getpid(), signal.SIGTERM)
        return Line(job)

    monkeypatch.setattr(commands, "build_objective", killed)
    raised = Terminated("stopped by SIGTERM after step 3; the same command resumes there")

    def stopped(args: Any) -> None:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=stopped))
    assert cli.main(["train", "emoji.base"]) == 143
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().err


def test_a_stall_in_loading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from walt.training import report

    monkeypatch.setattr(report, "STALL_SECONDS", 0.05)
    free = threading.Event()

    class Slow(Line):
        def batch(self, step: int, rank: int) -> torch.Tensor:
            free.wait(0.3)
            return super().batch(step, rank)

    job = line_job(tmp_path, 3, log_every=3)
    train(job, Slow(job))
    said = " ".join(capsys.readouterr().out.split())
    assert "loading stalls, waiting for data" in said and "of the time went into waiting for data" in said
    row = rows(tmp_path)[0]
    assert row["data_wait"] > 0.5 and row["time_data"] > 0.2 and row["peak_memory_gb"] > 0.01


# -- stages


def test_arbitrary_masks_give_something_and_leave_something() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = set()
    for t in (1, 5):
        for _ in range(200):
            mask = random_mask(torch.zeros(1, t, 4, 6), generator)
            assert set(mask.unique().tolist()) == {0.0, 1.0}
            frames = bool((mask == mask[:, :, :1, :1]).all())
            kinds.add((t, frames))
            if not frames:
                assert bool((mask == mask[:, :1]).all())  # a box reaches over all frames
    assert kinds == {(1, False), (5, True), (5, False)}


def test_mask_kinds_give_what_their_tasks_need() -> None:
    """Every kind by what is given of 5 frames of 4 x 6, and that no kind breaks on images or single latents."""
    generator = torch.Generator().manual_seed(0)

    def draw(kind: str, shape: tuple[int, ...] = (5, 4, 6)) -> list[torch.Tensor]:
        return [random_mask(torch.zeros(1, *shape), generator, (kind,))[0] for _ in range(200)]

    def frames(mask: torch.Tensor) -> list[int]:
        assert bool((mask == mask[:, :1, :1]).all()), "whole frames"
        return mask[:, 0, 0].int().tolist()

    assert {tuple(frames(m)) for m in draw("first")} == {(1,) * n + (0,) * (5 - n) for n in range(1, 5)}
    assert {tuple(frames(m)) for m in draw("last")} == {(0,) * (5 - n) + (1,) * n for n in range(1, 5)}
    assert {tuple(frames(m)) for m in draw("both")} == {
        (1,) * a + (0,) * (5 - a - b) + (1,) * b for a in range(1, 4) for b in range(1, 4) if a + b < 5
    }
    assert len({tuple(frames(m)) for m in draw("frames")}) > 20
    for kind, inner in (("box", 0.0), ("inside", 1.0)):
        for mask in draw(kind):
            assert bool((mask == mask[:1]).all()), "through all frames"
            rows, columns = (mask[0] == inner).nonzero().T
            box = mask[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert bool((box == inner).all()) and box.numel() == len(rows) < 24
    moments = draw("moment")
    assert any(bool((m != m[:1]).any()) for m in moments)
    for mask in moments:
        touched = [i for i in range(5) if mask[i].min() == 0]
        assert touched == list(range(touched[0], touched[-1] + 1)), "a span of frames"
    for kind in MASK_KINDS:
        for shape in ((1, 4, 6), (5, 1, 1), (2, 1, 2)):
            assert all(set(m.unique().tolist()) == {0.0, 1.0} for m in draw(kind, shape)), (kind, shape)
        assert random_mask(torch.zeros(1, 1, 1, 1), generator, (kind,)).sum() == 0


def test_the_recipe_of_all_tasks_trains_on_all_masks(tmp_path: Path) -> None:
    """emoji.base_tasks changes what is told and nothing of the network; given latents carry no loss."""
    first, tasks = load_job("emoji.base", []), load_job("emoji.base_tasks", [])
    assert isinstance(first, DenoiserJob) and isinstance(tasks, DenoiserJob)
    assert (
        tasks.model == first.model
        and tasks.shapes == first.shapes
        and set(tasks.diffusion.mask_kinds) == set(MASK_KINDS)
    )
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", 2)
    knobs = tasks.diffusion.model_copy(update={"mask_probability": 1.0, "self_conditioning_probability": 0.0})
    objective = build_objective(job.model_copy(update={"diffusion": knobs}))
    seen: list[torch.Tensor] = []
    inner = objective._errors

    def watch(model: Any, clean: Any, noise: Any, steps: Any, masks: Any, told: Any, twice: bool) -> Any:
        errors, sizes, made = inner(model, clean, noise, steps, masks, told, twice)
        seen.extend(masks)
        assert [float(s) for s in sizes] == [float((1 - m).sum()) for m in masks]
        assert all(m is n for m, n in zip(masks, told["frame_mask"], strict=True))
        return errors, sizes, made

    objective._errors = watch
    for step in range(8):
        loss, _ = objective.loss(objective.model, objective.batch(step, 0), torch.Generator().manual_seed(step))
        assert bool(loss.isfinite())
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in seen if mask.numel() > 1)


def test_partial_captions_lose_words_at_even_odds() -> None:
    caption, generator = "a frog comes closer on a purple background", torch.Generator().manual_seed(0)
    words = caption.split()
    drawn = partial_captions([caption] * 2000, 0.5, generator)
    cut = [text.split() for text in drawn if text != caption]
    assert 850 < len(cut) < 1050  # half of them, less the few that lost nothing
    for text in cut:
        rest = iter(words)
        assert text and all(word in rest for word in text), "words in their order"
    kept = sum(map(len, cut)) / len(cut) / len(words)
    assert 0.5 < kept < 0.62  # each at even odds, but for the one that always stays
    assert sum("frog" in text and "closer" not in text for text in cut) > 150
    assert partial_captions([caption, "", "sun"], 1.0, generator)[1:] == ["", "sun"]
    assert partial_captions([caption] * 20, 0.0, generator) == [caption] * 20


def test_given_frames_are_drawn_from_their_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = draw_given_frames([5] * 300, [0] * 300, 0.9, 0.1, generator, (2,))
    assert set(drawn) == {0, 2} and 0.85 < sum(n == 2 for n in drawn) / 300 < 0.95
    drawn = draw_given_frames([5] * 300, [0] * 300, 1.0, 0.0, generator)
    assert set(drawn) == {1, 2} and 110 < sum(n == 1 for n in drawn) < 190


def test_a_checkpoint_older_than_a_field_is_still_of_its_recipe(tmp_path: Path) -> None:
    job = small_job(tmp_path / "vae", tmp_path / "run")
    before = job.model_dump()
    del before["data"]["clip_subjects"]
    _same_recipe(tmp_path, {"job": before, "packs": 1}, job, 1)
    before["data"]["seed"] = 5
    with pytest.raises(WaltError, match=r"another recipe \(data differ\)"):
        _same_recipe(tmp_path, {"job": before, "packs": 1}, job, 1)


def test_held_out_clips_of_a_latent_folder_stay_held_out(tmp_path: Path) -> None:
    """A step sees other clips when others are held out: no resume would be exact."""
    job = small_job(tmp_path / "vae", tmp_path / "run")
    watched = {"run": job.run.model_copy(update={"heldout_every": 5, "heldout_clips": 2})}
    _same_recipe(tmp_path, {"job": job.model_dump(), "packs": 1}, job.model_copy(update=watched), 1)
    job = job.model_copy(update={"data": job.data.model_copy(update={"latents": "folder"})})
    with pytest.raises(WaltError, match=r"another recipe \(run.heldout_clips differ\)"):
        _same_recipe(tmp_path, {"job": job.model_dump(), "packs": 1}, job.model_copy(update=watched), 1)


def test_a_state_that_is_no_state_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001").mkdir()
    (tmp_path / "checkpoint-00000001" / "state.json").write_text("[]")
    with pytest.raises(WaltError, match=r"state.json cannot be read .*delete .* to start over"):
        checkpoint.read_state(tmp_path / "checkpoint-00000001")


def test_tensorboard_shows_figures_and_sheets(tmp_path: Path) -> None:
    run(small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", 3, tensorboard=True), sheet=draw_sheet)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    curve = losses(tmp_path / "run")
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == pytest.approx(curve, rel=1e-5)
    assert [event.step for event in board.Images("sheet/0" if "sheet/0" in board.Tags()["images"] else "sheet")] == [3]


def test_tensorboard_shows_steps_that_are_redone_once(tmp_path: Path) -> None:
    """A run that is killed after step 5 goes on from its checkpoint at step 3; the writers see what a report says."""
    (tmp_path / "run").mkdir()
    job = small_job(tmp_path / "vae", tmp_path / "run", 6, tensorboard=True)
    for start, stop in ((0, 5), (3, 6)):
        report = Report(job, tmp_path / "run", start, enabled=True)
        for step in range(start, stop):
            report.step(step, {"loss": 10.0 * start + step})
        report.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 33.0), (5, 34.0), (6, 35.0)]
    assert dict(shown) == losses(tmp_path / "run")


def test_tensorboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(WaltError, match=r"run.tensorboard: needs the package tensorboard \(pip install"):
        run(small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", 1, tensorboard=True))


def test_folders_name_the_classes(tmp_path: Path) -> None:
    """A tree of folders, end to end: labels by name, shards alike, the exported model says which number is which."""
    rng = np.random.default_rng(0)
    members = []
    for name, low in (("dark", 0), ("bright", 200)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(4):
            picture = media.image_bytes(rng.integers(low, low + 50, (32, 32, 3), dtype=np.uint8))
            (tmp_path / "tree" / name / f"{number}.png").write_bytes(picture)
            members.append((f"{name}/{number}.png", picture))
    (tmp_path / "shards").mkdir()
    media.write_shard(tmp_path / "shards" / "x-0.tar", members)
    base = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", 2, model={"num_classes": 2}, tensorboard=False)

    def job(*paths: str, **fields: Any) -> DenoiserJob:
        sources = tuple(SourceJob(path=str(tmp_path / path), caption_from="folder", **fields) for path in paths)
        data = MediaJob(sources=sources, index=str(tmp_path / "index"), min_size=16)
        return base.model_copy(update={"data": data, "shapes": base.shapes[2:]})

    both = job("tree", "shards")
    objective = build_objective(both)
    assert objective.classes == {"bright": 0, "dark": 1}
    for sample in (sample for step in range(3) for sample in objective.batch(step, 0)):
        assert sample.video is not None
        assert objective._label(sample) == (0 if float(sample.video.mean()) > 0 else 1)
    final = train(both, objective)
    assert (final / "classes.txt").read_text() == "bright\ndark\n"
    again = both.model_copy(update={"classes": str(final / "classes.txt")})
    assert build_objective(again).classes == objective.classes
    wrong = both.model_copy(update={"model": {**both.model, "num_classes": 3}})
    with pytest.raises(WaltError, match="the sources have 2 folders of media, got 3"):
        build_objective(wrong)
    # Both would come out in the middle of a run.
    (tmp_path / "other.txt").write_text("bright\nlight\n")
    with pytest.raises(WaltError, match=r"other\.txt has no .dark., a folder of the sources"):
        build_objective(both.model_copy(update={"classes": str(tmp_path / "other.txt")}))
    with pytest.raises(WaltError, match="heldout_share: no item that can fill shape 0 is held out"):
        build_objective(both.model_copy(update={"run": both.run.model_copy(update={"heldout_every": 2})}))
    (tmp_path / "tree" / "stray.png").write_bytes(members[0][1])  # in no folder: it has no class and is left out
    left_out = build_objective(job("tree"))
    assert "no caption" in " ".join(left_out.clips.account.lines())


def test_classes_are_told_and_dropped(tmp_path: Path) -> None:
    """The label comes from the sample, or by its caption from the file; a tenth sees the null label."""

    names = tmp_path / "classes.txt"
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", model={"num_classes": 2})
    job = job.model_copy(update={"classes": str(names), "diffusion": DiffusionJob(condition_dropout=0.5)})
    names.write_text("cat\n")
    with pytest.raises(WaltError, match="lists 1 classes, the model has num_classes=2"):
        build_objective(job)
    for lines in ("cat\ndog\ncat\n", "cat\ncat\n"):
        names.write_text(lines)
        with pytest.raises(WaltError, match="lists 'cat' more than once"):
            build_objective(job)
    names.write_text("cat\ndog\n")
    objective = build_objective(job)
    pack = [dataclasses.replace(sample, caption="dog") for sample in objective.batch(0, 0)]
    told = objective._told(pack, [], [], [False] * (len(pack) - 1) + [True], None, torch.Generator())
    assert told["class_labels"].tolist() == [1] * (len(pack) - 1) + [2]
    told = objective._told([dataclasses.replace(pack[0], label=0)], [], [], [False], None, torch.Generator())
    assert told["class_labels"].tolist() == [0]
    loss, _ = objective.loss(objective.model, pack, torch.Generator().manual_seed(0))
    assert math.isfinite(float(loss))
    with pytest.raises(WaltError, match=r"classes: .* has no 'dgo' .*dog"):
        objective._label(dataclasses.replace(pack[0], caption="dgo"))


@pytest.mark.parametrize("spatiotemporal", [None, (2, 2)])
def test_interpolated_model_does_what_the_trained_one_does_at_the_new_size(spatiotemporal: Any) -> None:
    """Whole-frame windows read tables of any size, so both must agree; smaller windows only change their tables."""
    config: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    config |= {"sample_size": (2, 4, 4), "relative_positions": "bias", "spatiotemporal_window": spatiotemporal}
    torch.manual_seed(0)
    old = WaltTransformer3DModel(**config).eval()
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    window = None if spatiotemporal is None else (2, 4)
    new = WaltTransformer3DModel(**{**config, "sample_size": (2, 4, 6), "spatiotemporal_window": window}).eval()
    new.load_state_dict(interpolated_positions(old, new))
    latents, level = torch.randn(1, 8, 2, 4, 6), torch.tensor([500])
    with torch.no_grad():
        a, b = old(latents, level).sample, new(latents, level).sample
    assert new.pos_embed.space.shape[0] == 24
    if spatiotemporal is None:
        assert (a - b).abs().max() < 1e-4 * a.abs().max()
    else:
        table = new.transformer_blocks[1].attn.relative_bias.table
        before = old.transformer_blocks[1].attn.relative_bias.table
        assert table.shape[1:] == (3, 3, 7)
        assert torch.equal(table[..., 0], before[..., 0]) and torch.equal(table[..., 3], before[..., 1])


def test_init_of_another_size_needs_the_word(tmp_path: Path) -> None:
    vae = save_tokenizer(tmp_path / "vae")
    job = small_job(vae, tmp_path / "run", model={"relative_positions": "bias"})
    build_objective(job).model.save_pretrained(tmp_path / "square")
    wide = job.model_copy(update={"model": {**job.model, "sample_size": (2, 4, 6)}, "init": str(tmp_path / "square")})
    with pytest.raises(WaltError, match="interpolate_positions=true"):
        build_objective(wide)
    build_objective(wide.model_copy(update={"interpolate_positions": True}))


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_lora_trains_adapters_alone_and_comes_back(tmp_path: Path, export: str) -> None:
    vae = save_tokenizer(tmp_path / "vae")
    first = small_job(vae, tmp_path / "base", 2)
    base = run(first)
    with pytest.raises(WaltError, match=r"lora: .* give init"):
        build_objective(first.model_copy(update={"lora": LoraJob()}))
    with pytest.raises(WaltError, match=r"lora.targets: no linear layer ends in 'to_z'"):
        build_objective(first.model_copy(update={"init": str(base), "lora": LoraJob(targets=("to_z",))}))
    job = small_job(vae, tmp_path / "lora", 6, checkpoint_every=3).model_copy(
        update={
            "init": str(base),
            "lora": LoraJob.model_validate({"rank": 2, "export": export, "targets": ("to_v", "to_out.0", "proj_out")}),
            "optimizer": OptimizerJob(lr=3e-2),
        }
    )
    objective = build_objective(job)
    final = train(job, objective)
    state = saved(tmp_path / "lora" / "checkpoint-00000006")
    assert all("lora_" in name for name in state) and any(state[n].abs().max() > 0 for n in state if "lora_B" in n)
    # The exported adapter on the base, or the merged model, is the averaged model.
    model = build_objective(job).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"ema.{name}" in state:
                parameter.copy_(state[f"ema.{name}"])
    if export == "adapter":
        loaded = WaltTransformer3DModel.from_pretrained(base)
        pipe = WaltPipeline(None, None, None, loaded, None)  # type: ignore[arg-type]
        pipe.load_lora_weights(final)
    else:
        loaded = WaltTransformer3DModel.from_pretrained(final)
        assert not any("lora" in name for name in loaded.state_dict())
    latents, level = torch.randn(1, 8, 2, 4, 4), torch.tensor([500])
    with torch.no_grad():
        wanted, made, plain = (
            m.eval()(latents, level).sample for m in (model, loaded, WaltTransformer3DModel.from_pretrained(base))
        )
    assert (wanted - made).abs().max() < 1e-5 and (wanted - plain).abs().max() > 1e-3
    # And training goes on from its checkpoint.
    run(job.model_copy(update={"run": job.run.model_copy(update={"steps": 7})}))


def test_lora_fields_can_be_set_on_the_command_line() -> None:
    job = load_job("emoji.base", ["lora.rank=4", "init=somewhere"])
    assert job.lora == LoraJob(rank=4)  # type: ignore[union-attr]


# -- looking on


def test_held_out_loss_is_fixed_named_and_logged(tmp_path: Path) -> None:
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", 4, heldout_every=2, heldout_clips=2)
    run(job, sheet=draw_sheet)
    found = {row["step"]: row["heldout"] for row in rows(tmp_path / "run") if "heldout" in row}
    assert set(found) == {2, 4} and found[2].keys() == found[4].keys()
    assert "base/5x32x48/t0-199" in found[2] and "base/1x32x32/t800-999" in found[2]
    assert len(found[2]) == 3 * 5 + 1 and found[2]["loss"] != found[4]["loss"]
    objective = build_objective(job)
    objective.model.load_state_dict(load_file(tmp_path / "run" / "final" / "diffusion_pytorch_model.safetensors"))
    assert objective.heldout(objective.model.eval()) == pytest.approx(found[4], rel=1e-5)
    # Clips that are held out are none that training sees.
    seen = objective.scenes.clip(0, job.shapes[0]).video
    assert not torch.equal(objective.held_out(0, 0).video, seen)
    assert (tmp_path / "run" / "sheet-00000004.png").exists() and (tmp_path / "run" / "sheet-00000004.mp4").exists()


def test_tokenizer_held_out_figures(tmp_path: Path) -> None:
    run(tokenizer_job(tmp_path / "run", 2, heldout_every=2, heldout_clips=1))
    (figures,) = [row["heldout"] for row in rows(tmp_path / "run") if "heldout" in row]
    assert {"tokenizer/5x32x32@64/psnr", "tokenizer/1x32x32@64/loss", "loss"} <= figures.keys()


def test_operations_of_a_pack_are_those_of_its_samples(tmp_path: Path) -> None:
    """Counted per size on the meta device, or on the real pack: the same."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    objective = build_objective(small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run"))
    pack = objective.batch(0, 0)
    noisy = [objective._latent(sample.video, sample.latent) for sample in pack]
    # The CPU's own attention kernel is not counted; plain products are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.model.requires_grad_(False)(noisy, torch.zeros(len(pack)))
    assert objective.flops(pack) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    kept = [torch.arange(z[0].numel()).reshape(z.shape[1:]) % 4 == 0 for z in noisy]  # patches of one latent pixel
    dropped = [dataclasses.replace(sample, kept=mask) for sample, mask in zip(pack, kept, strict=True)]
    assert objective.flops(dropped) == pytest.approx(counter.get_total_flops() / 4, rel=1e-9)


REFERENCE = Path(__file__).with_name("reference_curves.json")


@pytest.mark.parametrize("name", ["denoiser", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_new_runs_stay_on_the_reference_curves(tmp_path: Path, name: str) -> None:
    """Seeds and losses of the small recipes as committed; `python tests/training/reference.py` writes them anew."""
    reference = json.loads(REFERENCE.read_text())[name]
    vae = save_tokenizer(tmp_path / "vae", seed=reference["seed"])
    make: dict[str, Callable[[], Job]] = {
        "denoiser": lambda: small_job(vae, tmp_path / "run", 20),
        "tokenizer": lambda: tokenizer_job(tmp_path / "run"),
    }
    job = make[name]()
    assert job.run.seed == reference["seed"]
    run(job)
    curve = losses(tmp_path / "run")
    assert [curve[step] for step in range(1, 21)] == pytest.approx(reference["loss"], rel=2e-2)


# -- plan


def test_plan_counts_what_the_run_will_hold(tmp_path: Path) -> None:
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", 2, packs=2, ema_decay=0.9)
    plan = plan_job(job, rate=1e9)
    objective = build_objective(job)
    count = sum(p.numel() for p in objective.model.parameters())
    assert plan.parameters == plan.trained == count
    assert plan.memory["weights"] == plan.memory["gradients"] == plan.memory["average"] == 4 * count
    assert plan.memory["optimizer"] == 8 * count
    more = job.model_copy(update={"run": job.run.model_copy(update={"ema_lengths": (0.05, 0.1)})})
    assert plan_job(more, rate=1e9).memory["average"] == 3 * 4 * count
    run(job)
    logged = [row for row in rows(tmp_path / "run") if "tokens" in row]
    assert plan.tokens == pytest.approx(sum(row["tokens"] for row in logged) / len(logged), rel=0.1)
    halves = job.model_copy(update={"run": job.run.model_copy(update={"parallel": "fsdp"})})
    sharded = plan_job(halves, ranks=2, rate=1e9)
    assert sharded.memory["optimizer"] == 4 * count and sum(size for name, size, _ in sharded.shards[-1:]) < count
    with pytest.raises(WaltError, match=r"2 packs per step do not divide among 3"):
        plan_job(job, ranks=3, rate=1e9)
    adafactor = job.model_copy(update={"optimizer": OptimizerJob(kind="adafactor", lr=1e-3)})
    state = Adafactor(objective.model.parameters(), lr=1e-3)
    warm(state)
    held = sum(v.numel() for entry in state.state.values() for k, v in entry.items() if k != "step")
    assert plan_job(adafactor, rate=1e9).memory["optimizer"] == 4 * held
    muon = job.model_copy(update={"optimizer": OptimizerJob(kind="muon", lr=1e-3)})
    moved = Muon(objective.model.parameters(), lr=1e-3)
    warm(moved)
    held = sum(v.numel() for entry in moved.state.values() for k, v in entry.items() if k != "step")
    assert plan_job(muon, rate=1e9).memory["optimizer"] == 4 * held


def test_a_tokenizer_with_codes_and_a_discriminator_is_planned(tmp_path: Path) -> None:
    job = load_job("tokenizers.lfq_small")
    plain = job.model_copy(update={"model": {**job.model, "quantizer": None, "quantizer_config": None}})
    plan = plan_job(job, rate=1e12)
    assert plan.flops == plan_job(plain, rate=1e12).flops > 0
    assert isinstance(job, TokenizerJob) and "adversary" not in plan.memory
    gan = AdversarialJob(model={"base": 4, "multipliers": (1, 2)})
    plan = plan_job(job.model_copy(update={"loss": job.loss.model_copy(update={"adversarial": gan})}), rate=1e12)
    count = sum(p.numel() for p in Discriminator(**gan.model).parameters())
    assert plan.memory["adversary"] == 16 * count  # float32 weights, gradients and two moments


def test_planned_activations_are_what_autograd_keeps(tmp_path: Path) -> None:
    """Counted on the meta device, and on a real forward pass of the same sample."""
    job = small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run")
    job = job.model_copy(update={"shapes": job.shapes[:1], "batch_tokens": 32})
    model = build_objective(job).model
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model([torch.randn(8, 2, 4, 4)], torch.zeros(1)).sample
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert out[0].requires_grad
    assert plan_job(job, rate=1e9).memory["activations"] == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("recipe", ["imagenet", "ucf101", "k600", "t2v_base", "t2v_base_wide", "t2v_sr1", "t2v_sr2"])
def test_recipes_of_table_8(recipe: str) -> None:
    """What the paper discloses stands in the recipe: the batch in samples, and the model's reported size."""
    job = load_job(f"walt.{recipe}")
    assert isinstance(job, DenoiserJob)
    batch = {"imagenet": 1024, "ucf101": 256}.get(recipe, 512)
    t, h, w = job.model["sample_size"]
    assert job.run.packs is not None
    assert job.run.packs * job.batch_tokens == batch * t * h * w // job.model["patch_size"] ** 2
    rates = {"t2v_base": 2e-4, "t2v_base_wide": 5e-5}
    assert job.optimizer.lr == rates.get(recipe, 5e-4)
    assert job.optimizer.kind == ("adafactor" if "t2v" in recipe else "adamw")
    assert (job.run.ema_decay == 0) == ("t2v" in recipe)
    assert job.optimizer.schedule == ("constant" if recipe == "t2v_base_wide" else "cosine")
    steps = {"imagenet": 437_898, "ucf101": 60_000, "k600": 276_062, "t2v_base": 550_000, "t2v_base_wide": 250_000}
    assert job.run.steps == {**steps, "t2v_sr1": 675_000, "t2v_sr2": 275_000}[recipe]


@pytest.mark.parametrize("kind", ["denoiser", "tokenizer"])
def test_a_small_recipe_is_rehearsed_on_its_own_data(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that counts operations instead of seconds, the plan's seconds are those of the run.

    The clock goes by the model's own operations alone, so nothing here depends on the machine.
    """
    vae = save_tokenizer(tmp_path / "vae")
    job = small_job(vae, tmp_path / "run", 12) if kind == "denoiser" else tokenizer_job(tmp_path / "run", 12)
    objective = build_objective(job)
    clock = {"now": 0.0}
    monkeypatch.setattr("walt.training.plan.time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    losses, batch = type(objective).losses, type(objective).batch

    def counted(self: Any, pack: Any, *arguments: Any) -> Any:
        for loss in losses(self, pack, *arguments):
            clock["now"] += self.flops(pack) * (2 + loss.figures.get("forwards", 1.0)) / 1e9
            yield loss

    def slow(self: Any, step: int, rank: int) -> Any:
        clock["now"] += 5.0
        return batch(self, step, rank)

    monkeypatch.setattr(type(objective), "losses", counted)
    monkeypatch.setattr(type(objective), "batch", slow)
    plan = plan_job(job)
    assert plan.seconds["data"] == pytest.approx(5.0)
    assert plan.rate == pytest.approx(1e9)
    assert plan.seconds["compute"] == pytest.approx(plan.flops / 1e9)
    assert plan.memory["process"] > 50e6  # Python and torch at least
    workers = job.model_copy(update={"run": job.run.model_copy(update={"workers": 1})})
    late = plan_job(workers)
    assert late.seconds["data"] == pytest.approx(5.0 - late.seconds["compute"], rel=0.05)
    far = plan_job(job, rate=2e9)
    assert "data" not in far.seconds and far.seconds["compute"] == pytest.approx(plan.flops / 2e9)
    monkeypatch.undo()
    gone = job.model_copy(update={"data": job.data.model_copy(update={"source": str(tmp_path / "nothing")})})
    assert "data" not in plan_job(gone).seconds  # the model alone


def test_recipes_lead_to_each_other() -> None:
    """A recipe's tokenizer, and what it goes on from, is a folder of the package or where another recipe puts its own."""
    table = {name: recipe() for name, recipe in recipes().items()}
    made = {f"{job.run.output}/final": job for job in table.values()}
    for name, job in table.items():
        for field in ("tokenizer", "sketch_tokenizer", "init"):
            folder = getattr(job, field, None)
            if folder is None or (Path(folder) / "config.json").is_file():
                continue
            assert folder in made, f"{name}: {field}={folder}"
            if field != "init":
                assert isinstance(made[folder], TokenizerJob)


@pytest.mark.parametrize("recipe", ["imagenet", "ucf101", "k600", "t2v"])
def test_first_stages_of_table_8(recipe: str) -> None:
    """Batches of 256 clips or images, 8 channels, 8 times smaller; the denoisers take the latents as they come."""
    job = load_job(f"walt.{recipe}_tokenizer")
    assert isinstance(job, TokenizerJob) and job.run.packs is not None
    shape = job.shapes[0]
    pixels = shape.frames * (shape.cut or shape.height) * (shape.cut or shape.width)
    assert job.run.packs * job.batch_pixels == 256 * pixels
    plan = plan_job(job, rate=1e12)
    assert 50e6 < plan.parameters < 400e6
    with init_empty_weights():
        vae = AutoencoderKLWalt(**job.model)
    assert (vae.spatial_compression_ratio, vae.config.latent_channels) == (8, 8)
    assert vae.temporal_compression_ratio == (1 if recipe == "imagenet" else 4)


def test_a_few_kills_change_nothing(tmp_path: Path) -> None:
    """`benchmarks/kill.py` with 3 kills: SIGKILL at random moments, also inside a checkpoint write."""
    assert benchmark("kill").kill_training(tmp_path, kills=3, seed=1)["kills"] == 3


def test_states_of_captions_take_bounded_memory() -> None:
    """A user's media have captions without end, each of which was once kept for the whole run."""
    limit = 3 * 5 * tiny.TEXT_DIM * 4  # three captions of five tokens
    words = TextStates(tiny.tokenizer(), tiny.bert(), kept_bytes=limit)
    captions = [f"a {word} cat" for word in ("red", "green", "blue", "purple", "long")]
    first = words(captions)
    assert len(first) == 5 and sum(states.nbytes for states in words.cache.values()) <= limit
    for _ in range(2):  # those that are kept, and those that are made again
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(words(captions), first, strict=True))
