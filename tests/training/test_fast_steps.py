"""What makes steps of small networks fast changes nothing: Muon in batches, one reading per step, compiled blocks."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn

from tests.training.jobs import losses, save_tokenizer, saved, small_job, tokenizer_job
from tests.training.test_engine import Line, line_job, rows
from walt.commands import build_objective
from walt.latents import to_device
from walt.models.transformer_walt import LocalMixing
from walt.training import loop
from walt.training.compiled import compile_network
from walt.training.job import DenoiserJob, Job, OptimizerJob, RunJob
from walt.training.loop import train
from walt.training.muon import Muon, orthogonalize
from walt.training.optimizers import make_optimizer, warm
from walt.training.ranks import Ranks

SHAPES: tuple[tuple[int, ...], ...] = (
    *(3 * [(6, 40)] + 3 * [(40, 6)] + 2 * [(16, 16)]),
    *((6, 4, 10), (8, 1, 3, 3), (8, 9), (2, 8), (7,), (7,), (), (12,)),
)


def gradients(step: int) -> list[Tensor | None]:
    """Of very unlike size; some are zero, some missing, and not the same ones in every step."""
    generator = torch.Generator().manual_seed(step)
    found: list[Tensor | None] = []
    for i, shape in enumerate(SHAPES):
        grad = torch.randn(shape, generator=generator) * 10 ** ((step + i) % 5 - 2)
        found.append(None if (step + i) % 7 == 3 else torch.zeros(shape) if (step + i) % 5 == 1 else grad)
    return found


def muon(batched: bool, half: bool = False, ranks: dist.ProcessGroup | None = None) -> tuple[list[nn.Parameter], Muon]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return weights, Muon(weights, lr=3e-2, weight_decay=0.1, half=half, batched=batched, ranks=ranks)


def advance(weights: list[nn.Parameter], optimizer: Muon, steps: range) -> None:
    for step in steps:
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = grad
        optimizer.step()


def test_muon_in_batches_is_muon_one_by_one() -> None:
    (one, alone), (many, together) = muon(False), muon(True)
    advance(one, alone, range(12))
    advance(many, together, range(12))
    for a, b in zip(one, many, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), tuple(a.shape)
        assert alone.state[a].keys() == together.state[b].keys()
        for key, value in alone.state[a].items():
            assert torch.allclose(value, together.state[b][key], rtol=1e-5, atol=1e-6), key
    # The state of the one is the other's, and so are old checkpoints.
    weights, resumed = muon(True)
    with torch.no_grad():
        for new, old in zip(weights, one, strict=True):
            new.copy_(old)
    resumed.load_state_dict(copy.deepcopy(alone.state_dict()))  # whose tensors it would share
    advance(weights, resumed, range(12, 16))
    advance(one, alone, range(12, 16))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(one, weights, strict=True))


def _one_of_two(rank: int, folder: str, batched: bool) -> None:
    """A process of the next test: leaves its weights and how many matrices it has orthogonalized."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = RunJob(output=folder, steps=1)
    assert Ranks(run.model_copy(update={"parallel": "fsdp"})).twins is None
    weights, optimizer = muon(batched, ranks=Ranks(run).twins)
    made: list[int] = []

    def count(matrix: Tensor, **kwargs: Any) -> Tensor:
        made.append(math.prod(matrix.shape[:-2]))
        return orthogonalize(matrix, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("walt.training.muon.orthogonalize", count)
        advance(weights, optimizer, range(12))
    moved = {f"weight.{i}": weight.detach() for i, weight in enumerate(weights)}
    momenta = {f"momentum.{i}": optimizer.state[w]["momentum"] for i, w in enumerate(weights) if w.ndim > 1}
    save_file({**moved, **momenta, "made": torch.tensor(sum(made))}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("batched", [False, True])
def test_two_ranks_share_the_work_of_muon_and_end_with_the_same_weights(tmp_path: Path, batched: bool) -> None:
    multiprocessing.spawn(_one_of_two, (str(tmp_path), batched), nprocs=2)
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    weights, optimizer = muon(batched)
    advance(weights, optimizer, range(12))
    for i, weight in enumerate(weights):
        assert torch.equal(left[f"weight.{i}"], right[f"weight.{i}"]), i
        assert torch.allclose(left[f"weight.{i}"], weight, rtol=1e-5, atol=1e-5), i
        if weight.ndim > 1:
            assert torch.equal(left[f"momentum.{i}"], optimizer.state[weight]["momentum"]), i
    # A matrix alone of its shape is done by both, and no other.
    whole = sum(grad is not None and grad.ndim > 1 for step in range(12) for grad in gradients(step))
    made = [int(found["made"]) for found in (left, right)]
    assert sum(made) < 1.25 * whole and abs(made[0] - made[1]) < 0.2 * whole, (made, whole)


def test_a_warm_muon_has_moved_nothing() -> None:
    for batched in (False, True):
        weights, optimizer = muon(batched)
        before = [weight.detach().clone() for weight in weights]
        warm(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        assert set(optimizer.state[weights[0]]) == {"momentum"}
        assert set(optimizer.state[weights[-1]]) == {"step", "mean", "square"}


def test_matrices_of_a_batch_do_not_meet() -> None:
    torch.manual_seed(0)
    for shape in ((5, 12), (12, 5), (7, 7)):
        batch = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
        batch[1] = 0.0
        for half in (False, True):
            found = orthogonalize(batch, half=half)
            for one, other in zip(batch, found, strict=True):
                assert torch.allclose(orthogonalize(one, half=half), other, atol=2e-2 if half else 1e-5)
            assert not found[1].any()


def test_batched_muon_needs_few_operations() -> None:
    """What a GPU would launch: of eight layers alike a few dozen for each shape, not for each matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            views = ("view", "unbind", "transpose", "detach", "permute", "expand", "item", "_local_scalar")
            self.number += not any(name in str(func) for name in views)
            return func(*args, **(kwargs or {}))

    counts = []
    for batched in (False, True):
        weights = [nn.Parameter(torch.randn(shape)) for _ in range(8) for shape in ((16, 16), (16, 48), (48, 16))]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = Muon(weights, weight_decay=0.1, batched=batched)
        optimizer.step()
        with Count() as count:
            optimizer.step()
        counts.append(count.number)
    assert counts[1] < 3 * 30 + 10 and counts[0] > 5 * counts[1]


def test_adamw_is_fused_on_a_gpu_alone() -> None:
    optimizer = make_optimizer(OptimizerJob(lr=1e-3), [nn.Parameter(torch.zeros(2))])
    assert not optimizer.param_groups[0]["fused"]


# -- one reading per step


@pytest.fixture
def deferring(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As on a GPU: numbers of a step stay tensors until all are read at once. Gives how many each reading was of."""
    read: list[int] = []
    plain = loop._read

    def counted(values: Any) -> list[float]:
        read.append(sum(isinstance(value, Tensor) for value in values))
        return plain(values)

    monkeypatch.setattr(loop, "_unread", lambda v: v.detach() if isinstance(v, Tensor) else float(v))
    monkeypatch.setattr(loop, "_read", counted)
    yield read


@pytest.mark.parametrize("kind", ["denoiser", "tokenizer"])
def test_numbers_are_read_once_a_step(tmp_path: Path, deferring: list[int], kind: str) -> None:
    vae = save_tokenizer(tmp_path / "vae", seed=0)

    def job(name: str) -> Job:
        if kind == "tokenizer":
            return tokenizer_job(tmp_path / name, 3, packs=2)
        return small_job(vae, tmp_path / name, 4, packs=2)

    run = job("deferred")
    train(run, build_objective(run))
    assert len(deferring) == run.run.steps and min(deferring) >= 3  # a loss of each pack and the norm at least
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_unread", lambda v: float(v.detach()) if isinstance(v, Tensor) else float(v))
        other = job("at-once")
        train(other, build_objective(other))
    one, two = (tmp_path / name / "log.jsonl" for name in ("deferred", "at-once"))
    assert losses(one.parent) == pytest.approx(losses(two.parent), rel=1e-5)


class Moved(Line):
    """A line on the device that trains."""

    device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.device = device

    def loss(self, model: Any, batch: Tensor, generator: Any, shared: Any = None) -> Any:
        value, figures = super().loss(model, to_device(batch, self.device), generator, shared)
        weight = to_device(torch.tensor(float(figures["weight"])), self.device)
        return value, {**figures, "weight": weight, "value": value.detach()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_on_a_gpu_waits_once(tmp_path: Path, kind: Any) -> None:
    waits = []
    for steps in (5, 15):
        job = line_job(tmp_path / str(steps), steps, packs=2, log_every=100)
        job = job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"kind": kind})})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(job, Moved(job))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in said))
    assert waits[1] - waits[0] == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_muon_on_a_gpu_goes_in_batches_and_nearly_the_same_way() -> None:
    results = []
    for batched in (False, None):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
        optimizer = Muon(weights, lr=3e-2, weight_decay=0.1, batched=batched)
        for step in range(8):
            for weight, grad in zip(weights, gradients(step), strict=True):
                weight.grad = None if grad is None else grad.cuda()
            optimizer.step()
        results.append(weights)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=5e-3)  # in bfloat16


# -- compiled


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Nothing compiled before or after, and the limits as they were."""
    limit, donated = torch._dynamo.config.recompile_limit, torch._functorch.config.donated_buffer
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit, torch._functorch.config.donated_buffer = limit, donated


def run_steps(job: Job, steps: int, compiled: bool) -> dict[int, float]:
    job = job.model_copy(update={"run": job.run.model_copy(update={"steps": steps, "compile": compiled})})
    train(job, build_objective(job))
    return losses(Path(job.run.output))


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run_and_each_resumes_the_other(tmp_path: Path) -> None:
    vae = save_tokenizer(tmp_path / "vae", seed=0)

    def job(name: str) -> DenoiserJob:
        made = small_job(
            vae, tmp_path / name, 6, {"local_mixing": True}, checkpoint_every=3, heldout_every=3, heldout_clips=1
        )
        constant = made.optimizer.model_copy(update={"schedule": "constant", "kind": "muon"})
        return made.model_copy(update={"optimizer": constant})

    eager = run_steps(job("eager"), 6, False)
    with fresh():
        assert run_steps(job("compiled"), 6, True) == pytest.approx(eager, rel=1e-4)
        for name, first in (("there", True), ("back", False)):
            run_steps(job(name), 3, first)
            assert run_steps(job(name), 6, not first) == pytest.approx(eager, rel=1e-4)
    ends = [saved(tmp_path / name / "checkpoint-00000006") for name in ("eager", "compiled", "there", "back")]
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        assert all(torch.allclose(end[name], ends[0][name], atol=1e-3) for name in end)
    files = [{path.name for path in (tmp_path / name / "final").iterdir()} for name in ("eager", "compiled")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_compiled_tokenizer_trains_as_the_eager_one(tmp_path: Path) -> None:
    eager = run_steps(tokenizer_job(tmp_path / "eager"), 4, False)
    with fresh():
        assert run_steps(tokenizer_job(tmp_path / "compiled"), 4, True) == pytest.approx(eager, rel=1e-3)


def test_compiling_keeps_names_and_classes(tmp_path: Path) -> None:
    model = build_objective(
        small_job(save_tokenizer(tmp_path / "vae"), tmp_path / "run", model={"local_mixing": True})
    ).model
    names, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    with fresh():
        compile_network(model)
    assert list(model.state_dict()) == names and [name for name, _ in model.named_parameters()] == parameters
    blocks = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert len(blocks) == 2 and {type(block).__name__ for block in blocks} <= set(model._repeated_blocks)
    mixing = [module for module in model.modules() if isinstance(module, LocalMixing)]
    assert len(mixing) == 2 and all(module._mixed is not None for module in mixing)


def test_a_loss_that_is_not_finite_is_refused_before_the_step(tmp_path: Path, deferring: list[int]) -> None:
    job = line_job(tmp_path, 6, checkpoint_every=1, keep_checkpoints=9)
    train(job, Line(job, {3: math.nan}))
    assert [row["step"] for row in rows(tmp_path) if "note" in row] == [4]
    before, after = (saved(tmp_path / f"checkpoint-{step:08d}") for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(deferring) == 6
