"""The one training loop: tokenizer, base and super-resolution stages differ only in their objective.

Every batch and every random number is a pure function of (seed, step, lane). The lanes of a step are its packs, counted
over ranks and accumulation alike: two ranks train on what one rank would accumulate, and the data order and the noise
after a resume, on any number of ranks, are exactly those of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from walt.errors import Terminated, WaltError
from walt.training import checkpoint
from walt.training.average import Average, PowerAverage, averaged, drop_snapshots, snapshot_path, write_snapshot
from walt.training.compiled import compile_network, compile_parts, eager
from walt.training.job import Job, OptimizerJob
from walt.training.optimizers import Guard, learning_rate, make_optimizer, warm
from walt.training.ranks import Ranks, Reducer, scalar
from walt.training.report import COUNTS, Report

__all__ = ["Loss", "Objective", "Part", "averaged", "learning_rate", "train"]


OPEN_FILES = 2**16

Number = float | Tensor


class Part(NamedTuple):
    """A network with an optimizer of its own."""

    module: nn.Module
    optimizer: OptimizerJob


class Loss(NamedTuple):
    """What one pack asks of one part.

    `total` is a sum (over tokens, pixels, samples) and `weight` what it is divided by: the loop divides the sum of all
    packs' totals by the sum of all their weights, so that accumulation and ranks change nothing.
    """

    total: Tensor
    weight: float | Tensor
    figures: dict[str, float | Tensor]


class Objective:
    """What a kind of job adds to the loop."""

    job: Any
    model: Any
    shardable = False  # may FSDP cut the model? Then every pack must call it equally often (see `shared`).

    def batch(self, step: int, rank: int) -> Any:
        """The host-side pack of a step's lane `rank`: a pure function of the job, the step and the lane."""
        raise NotImplementedError

    def to(self, device: torch.device) -> None:
        """Moves frozen parts (not `model`) to the device."""
        raise NotImplementedError

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator, shared: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The mean loss of one pack, and figures for the log.

        Of the figures, "weight" says over how much (tokens, pixels, samples) the mean goes, 1 if missing; those of
        `report.COUNTS` add up, the others are averaged.

        Args:
            model: the network.
            batch: what `batch` gave.
            generator: this pack's own.
            shared: the same for all packs of a step: for choices that all ranks must make alike; None: `generator`.
        """
        raise NotImplementedError

    def parts(self) -> dict[str, Part]:
        """The trained networks by name, in the order of `losses`; "model" is averaged and exported."""
        return {"model": Part(self.model, self.job.optimizer)}

    def losses(
        self, batch: Any, generator: torch.Generator, shared: torch.Generator, step: int
    ) -> Generator[Loss | None]:
        """One loss per part, in order; None for a part that rests, which must depend on `step` alone.

        The loop runs the backward pass of each before it asks for the next, for the parameters of that part alone.
        """
        value, figures = self.loss(self.model, batch, generator, shared)
        weight = figures.pop("weight", 1.0)
        yield Loss(value * weight, weight, figures)

    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Losses on data that is never trained on, the same every time; every rank computes all of them."""
        return {}

    def flops(self, batch: Any) -> float | None:
        """Floating-point operations of one forward pass of the model on a pack; None: not counted."""
        return None

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes the finished (averaged) model as a `from_pretrained` folder."""
        raise NotImplementedError


Sheet = Callable[[Objective, nn.Module, Path | None], None]


def train(job: Job, objective: Objective, sheet: Sheet | None = None, resume: bool = True) -> Path:
    """Runs a job to its last step and exports the averaged model; returns the exported folder.

    Args:
        job: the recipe.
        objective: model, data and loss of the recipe's kind.
        sheet: draws a sample sheet to a PNG path (None: draw, write nothing) from the averaged weights; None: no sheets.
        resume: continue from the newest checkpoint in `run.output` if there is one.

    Raises:
        WaltError: damaged checkpoint, a run folder of another recipe, `run.max_skips` steps in a row without a finite
            loss, a last checkpoint that cannot be written.
        Terminated: SIGTERM; a checkpoint was saved.
    """
    run, output = job.run, Path(job.run.output)
    ranks = Ranks(run)
    if ranks.sharded and not objective.shardable:
        raise WaltError(f"run.parallel: fsdp does not fit {type(objective).__name__}; use ddp")
    if ranks.main:
        output.mkdir(parents=True, exist_ok=True)
        if not resume:
            checkpoint.set_aside(output)
    torch.manual_seed(run.seed)
    if run.gradient_checkpointing:
        objective.model.enable_gradient_checkpointing()
    trainers = {name: _Trainer(part, ranks) for name, part in objective.parts().items()}
    model = trainers["model"].module
    if run.compile:
        compile_network(model)
    elif ranks.device.type == "cuda":
        compile_parts(model)
    objective.to(ranks.device)
    average = Average(run.ema_decay, trainers["model"].trained)
    powers = [PowerAverage(length, trainers["model"].trained) for length in run.ema_lengths]
    guard = Guard(run)
    start = 0
    found = ranks.agree(checkpoint.latest(output) if resume else None)
    if found is not None:
        state = checkpoint.read_state(found)
        _same_recipe(found, state, job, ranks.packs)
        held = checkpoint.names(found)
        for name, trainer in trainers.items():
            trainer.warm(name, held)
        checkpoint.load(found, _tensors(trainers, average, powers), ranks)
        start, average.updates = int(state["step"]), int(state["updates"])
        for power in powers:
            power.updates = int(state["power_updates"])
        guard.load(state["guard"])
    if ranks.main:
        drop_snapshots(output, after=start)
    rate = _rate(ranks.device, run.precision)
    report = Report(job, output, start, ranks.main, rate and rate * ranks.world)
    writer = checkpoint.Writer(output, ranks, run.keep_checkpoints, run.checkpoint_async, report.say)
    batches = _Batches(_loader(objective, start, run.steps, ranks.lanes, run.workers, ranks.device), ranks.device)
    for trainer in trainers.values():
        trainer.module.train()

    def save(done: int, last: bool) -> None:
        with report.time("checkpoint"):
            state = {
                "job": job.model_dump(),
                "packs": ranks.packs,
                "updates": average.updates,
                "guard": guard.state(),
            }
            if powers:
                state["power_updates"] = powers[0].updates
            writer.save(done, _tensors(trainers, average, powers), state, last)

    def keep(done: int) -> None:
        """Snapshots of the power-function averages; a run that is resumed before them writes the same ones again."""
        for number, power in enumerate(powers):
            state = None
            if not power.updates:
                continue
            if ranks.sharded:
                with averaged(power, model):
                    state = ranks.whole(model)
            if ranks.main:
                weights = power.weights if state is None else {name: state[name] for name in power.weights}
                try:
                    write_snapshot(snapshot_path(output, done, number), weights, power, done)
                except WaltError as error:  # the others do without
                    report.note(done, f"no snapshot of averages after step {done}: {error}")

    def look(done: int, resumed: bool = False) -> None:
        """Held-out loss and sample sheets, from the averaged weights; of a `resumed` step what it was stopped before."""
        last, path = done == run.steps, output / f"sheet-{done:08d}.png"
        held = bool(run.heldout_every) and (last or done % run.heldout_every == 0)
        drawn = sheet is not None and (last or (bool(run.sheet_every) and done % run.sheet_every == 0))
        if resumed:
            held, drawn = ranks.agree((held and done not in report.held, drawn and not path.exists()))
        if held:
            with report.time("other"), eager(run.compile), averaged(average, model), torch.no_grad(), ranks.autocast():
                figures = objective.heldout(model)
            report.heldout(done, figures)
        if sheet is not None and drawn:
            # Sharded weights are gathered by all ranks, so all of them draw.
            if ranks.main or ranks.sharded:
                with report.time("other"), eager(run.compile), averaged(average, model):
                    try:
                        sheet(objective, model, path if ranks.main else None)
                    except WaltError as error:  # what a pipeline cannot make is no reason to stop
                        report.note(done, f"no sheet after step {done}: {error}")
            if ranks.main and path.exists():
                report.sheet(path, done)

    stop = _Stop()
    try:
        with stop, _matrix_products(ranks.device, run.precision):
            if start:
                look(start, resumed=True)
            for step in range(start, run.steps):
                for trainer in trainers.values():
                    trainer.begin(step, run.steps)
                figures = _Figures()
                for lane in ranks.lanes:
                    with report.waiting(step):
                        batch = next(batches)
                    with report.time("compute"):
                        generator = torch.Generator().manual_seed(_seed(run.seed, step, lane))
                        shared = torch.Generator().manual_seed(_seed(run.seed, step, -1))
                        losses = objective.losses(batch, generator, shared, step)
                        for name, trainer in trainers.items():
                            trainer.backward(losses, lane == ranks.lanes[-1], figures, name == "model")
                        losses.close()
                        forward = objective.flops(batch)
                        if forward is not None:
                            # Backward costs two forwards; what a pack predicts beforehand comes on top.
                            figures.add({"flops": forward * (2 + figures.last.get("forwards", 1.0))}, 1.0)
                with report.time("compute"):
                    scaled = _scale(ranks, trainers)
                if step + 1 < run.steps:
                    batches.fetch(report, step + 1)
                with report.time("compute"):
                    means, norms, stopping = _meet(ranks, trainers, figures, scaled, stop.asked)
                refused = guard.refuses({name: trainer.loss for name, trainer in trainers.items()}, norms)
                with report.time("optimizer"):
                    if refused is None:
                        for trainer in trainers.values():
                            trainer.step()
                        average.step()
                        for power in powers:
                            power.step()
                means |= {"loss": trainers["model"].loss, "grad_norm": norms.get("model", 0.0)}
                for name, trainer in trainers.items():
                    if name != "model" and trainer.weight:
                        means |= {f"{name}_loss": trainer.loss, f"{name}_grad_norm": norms.get(name, 0.0)}
                done = step + 1
                if refused is not None:
                    report.note(done, f"step {done} skipped ({guard.skipped} in a row): {refused}")
                    if guard.skipped >= run.max_skips:
                        raise WaltError(
                            f"step {done}: {guard.skipped} updates in a row were refused ({refused}); resume from "
                            f"{checkpoint.latest(output) or 'the start'} with a lower optimizer.lr, or change "
                            "run.spike_factor or run.max_skips"
                        )
                    means = {name: value for name, value in means.items() if math.isfinite(value)}
                report.step(step, means | {"skipped": float(refused is not None)} | {"lr": trainers["model"].lr})
                last = done == run.steps
                if powers and (last or done % run.ema_every == 0):
                    with report.time("checkpoint"):
                        keep(done)
                if last or stopping or done % run.checkpoint_every == 0:
                    save(done, last or stopping)
                if stopping and not last:
                    report.flush()
                    raise Terminated(f"stopped by SIGTERM after step {done}; the same command resumes there")
                look(done)
        final, temporary = output / "final", output / ".final.tmp"
        try:
            with averaged(average, model):
                if ranks.main:
                    shutil.rmtree(temporary, ignore_errors=True)
                if ranks.sharded:
                    _export_whole(objective, model, temporary, ranks)
                elif ranks.main:
                    objective.export(model, temporary)
        except (OSError, SafetensorError) as error:
            raise WaltError(f"cannot write {final}: {error}; the same command tries again") from error
        if ranks.main:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        ranks.barrier()
        return final
    finally:
        report.close()


@contextlib.contextmanager
def _matrix_products(device: torch.device, precision: str) -> Iterator[None]:
    """Context: on a GPU, what a bfloat16 run leaves in float32 is multiplied in TF32, which is still finer."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and precision == "bf16":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Trainer:
    """One part of an objective with its optimizer, for one step at a time."""

    def __init__(self, part: Part, ranks: Ranks) -> None:
        self.job, self.ranks = part.optimizer, ranks
        self.module = ranks.place(part.module)
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise WaltError("there is nothing to train: every parameter is frozen")
        half = ranks.run.precision == "bf16"
        self.optimizer = make_optimizer(self.job, list(self.trained.values()), half, ranks.twins)
        self.reducer: Reducer = ranks.reducer(self.module)
        self.lr = self.job.lr
        self.packs: list[tuple[Number, Number]] = []  # total and weight of each pack of a step
        self.loss = self.weight = 0.0

    def warm(self, part: str, held: set[str]) -> None:
        """Gives the optimizer the state that a checkpoint holds for `part`: none for what had no gradient yet."""
        warm(self.optimizer)
        for name, parameter in self.trained.items():
            if not any(f"{part}.optimizer.{name}.{key}" in held for key in self.optimizer.state[parameter]):
                self.optimizer.state.pop(parameter)

    def begin(self, step: int, steps: int) -> None:
        self.lr = learning_rate(self.job, step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        self.packs = []

    def backward(self, losses: Iterator[Loss | None], last: bool, figures: _Figures, weighted: bool) -> None:
        """Forward and backward of this part on one pack; gradients meet after the last one."""
        with self.ranks.autocast():
            loss = next(losses)
        if loss is None:
            return
        with contextlib.nullcontext() if last else self.reducer.hold():
            total = self.reducer(loss.total)
            # FSDP's gathered parameters are not the trained ones; it has one part, whose backward pass is all there is.
            total.backward(inputs=None if self.ranks.sharded else list(self.trained.values()))
        weight = _unread(loss.weight)
        self.packs.append((_unread(loss.total), weight))
        figures.add(loss.figures, weight if weighted else 1.0)

    def clip(self, weight: Number) -> Number:
        """Divides the summed gradients by the weight of all packs, clips them, and returns their norm before that.

        One factor does both, and waits for the device only where ranks have met already.
        """
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        # DDP and FSDP take the mean over ranks of sums over packs.
        scale = self.ranks.world / weight
        norm: Number = torch.nn.utils.get_total_norm(grads)
        if self.ranks.world > 1:
            norm = scalar(norm)
        norm = norm * scale
        share = self.job.clip_norm / (norm + 1e-6)
        if isinstance(share, Tensor):
            torch._foreach_mul_(grads, (share.clamp(max=1.0) * scale).to(grads[0]))
        else:
            torch._foreach_mul_(grads, min(share, 1.0) * scale)
        return norm

    def step(self) -> None:
        if self.weight:
            self.optimizer.step()


class _Figures:
    """A step's figures on this rank: counts added up, the others averaged by the weight of their pack."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Number, Number]] = []  # name, value and weight; they stay where they are
        self.last: dict[str, Number] = {}

    def add(self, figures: dict[str, float | Tensor], weight: Number) -> None:
        for name, value in figures.items():
            self.last[name] = _unread(value)
            self.seen.append((name, self.last[name], weight))

    def sums(self, numbers: Iterator[float]) -> tuple[dict[str, float], dict[str, float]]:
        """Counts and means, once `numbers` gives the value and weight of each of `seen`."""
        counts: dict[str, float] = dict.fromkeys(COUNTS, 0.0)
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for name, _, _ in self.seen:
            value, weight = next(numbers), next(numbers)
            if name in counts:
                counts[name] += value
            else:
                sums[name] = sums.get(name, 0.0) + value * weight
                weights[name] = weights.get(name, 0.0) + weight
        return counts, {name: value / weights[name] for name, value in sums.items() if weights[name]}


def _unread(value: Number) -> Number:
    """A number of a pack to keep until the step ends: on a GPU, reading it would wait for all that is queued there."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value if value.is_cuda else float(value)
    return float(value)


def _read(values: Sequence[Number]) -> list[float]:
    """The numbers on the host, all that lie on the device in one transfer."""
    groups: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault(value.dtype, []).append(i)
    found = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    if groups:
        rows = [torch.stack([cast(Tensor, values[i]).reshape(()) for i in group]) for group in groups.values()]
        places = [i for group in groups.values() for i in group]
        for i, number in zip(places, torch.cat([row.double() for row in rows]).tolist(), strict=True):
            found[i] = number
    return found


def _scale(ranks: Ranks, trainers: dict[str, _Trainer]) -> dict[str, Number]:
    """Scales and clips the gradients of the parts that did not rest; returns their norms.

    Nothing here waits for the device. Several ranks must know all their weights first: `_meet` does it for them.
    """
    if ranks.world > 1:
        return {}
    weights: dict[str, Number] = {
        name: sum(weight for _, weight in trainer.packs) for name, trainer in trainers.items() if trainer.packs
    }
    return {name: trainers[name].clip(w) for name, w in weights.items() if isinstance(w, Tensor) or w}


def _meet(
    ranks: Ranks, trainers: dict[str, _Trainer], figures: _Figures, norms: dict[str, Number], stop: bool
) -> tuple[dict[str, float], dict[str, float], bool]:
    """Reads what the step has left on the device, and sums losses, weights and counts over ranks.

    Returns the figures of the step, the gradient norm of each part that did not rest, and whether any rank is to stop.
    """
    parts = {name: trainer for name, trainer in trainers.items() if trainer.packs}
    waiting: list[Number] = [*norms.values()]
    for trainer in parts.values():
        waiting += [number for pack in trainer.packs for number in pack]
    waiting += [number for _, value, weight in figures.seen for number in (value, weight)]
    numbers = iter(_read(waiting))
    found = {name: next(numbers) for name in norms}
    sums = dict.fromkeys(trainers, (0.0, 0.0))
    for name, trainer in parts.items():
        pairs = [(next(numbers), next(numbers)) for _ in trainer.packs]
        sums[name] = sum(total for total, _ in pairs), sum(weight for _, weight in pairs)
    counts, means = figures.sums(numbers)
    counted = [name for name in COUNTS if counts[name]] if ranks.world == 1 else list(COUNTS)
    stopped, *values = ranks.sum([float(stop), *(counts[name] for name in counted), *itertools.chain(*sums.values())])
    counts, rest = dict(zip(counted, values, strict=False)), iter(values[len(counted) :])
    for trainer in trainers.values():
        total, trainer.weight = next(rest), next(rest)
        trainer.loss = total / trainer.weight if trainer.weight else 0.0
    if ranks.world > 1:
        found = {name: scalar(trainer.clip(trainer.weight)) for name, trainer in parts.items() if trainer.weight}
    found = {name: norm for name, norm in found.items() if trainers[name].weight}
    return {**means, **{name: count for name, count in counts.items() if count}}, found, stopped > 0


class _Stop:
    """Context: SIGTERM asks the loop to save and stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None
        self.mine = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.mine:
            self.before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *exc: object) -> None:
        if self.mine:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tensors(trainers: dict[str, _Trainer], average: Average, powers: Sequence[PowerAverage] = ()) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name; reading into these tensors restores the run."""
    tensors: dict[str, Tensor] = {}
    for part, trainer in trainers.items():
        for name, value in own_state(trainer.module).items():
            tensors[f"{part}.model.{name}"] = value
        for name, parameter in trainer.trained.items():
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{part}.optimizer.{name}.{key}"] = value
    for name, value in average.weights.items():
        tensors[f"ema.{name}"] = value
    for number, power in enumerate(powers):
        for name, value in power.weights.items():
            tensors[f"power.{number}.{name}"] = value
    return tensors


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state; with LoRA the adapters alone, as the rest stands in the recipe's `init`."""
    state = module.state_dict()
    if getattr(module, "peft_config", None):
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        state = {name: value for name, value in state.items() if name in trained}
    return state


def _export_whole(objective: Objective, model: Any, folder: Path, ranks: Ranks) -> None:
    """Gathers a sharded model on rank 0 and exports a whole twin of it."""
    state = ranks.whole(model)
    if state is None:
        return
    twin = type(model).from_config(dict(model.config))
    if getattr(model, "peft_config", None):
        for name, adapter in model.peft_config.items():
            twin.add_adapter(adapter, adapter_name=name)
    twin.load_state_dict(state)
    objective.export(twin, folder)


def _seed(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


class _Packs(Dataset[Any]):
    """A rank's packs in the order in which it trains on them."""

    def __init__(self, objective: Objective, start: int, stop: int, lanes: range) -> None:
        self.objective, self.start, self.stop, self.lanes = objective, start, stop, lanes

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.lanes)

    def __getitem__(self, index: int) -> Any:
        step, part = divmod(index, len(self.lanes))
        try:
            return self.objective.batch(self.start + step, self.lanes[part])
        except WaltError as error:  # a worker's exception would arrive with its whole traceback as the message
            return error


def _loader(
    objective: Objective,
    start: int,
    stop: int,
    lanes: range,
    workers: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Iterator[Any]:
    packs = _Packs(objective, start, stop, lanes)
    if workers:
        _allow_open_files()
    cuda = device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        packs,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        worker_init_fn=_outlive_sigterm,
        prefetch_factor=4 if workers and cuda else None,  # steps are short and packs take unlike times
        pin_memory=bool(workers) and cuda,  # in a thread; of what is no tensor nothing is changed
    )
    for batch in loader:
        if isinstance(batch, WaltError):
            raise batch
        yield batch


class _Batches:
    """The packs in order. While a GPU computes the host would wait for it, and has the next pack ready instead."""

    def __init__(self, packs: Iterator[Any], device: torch.device) -> None:
        self.packs, self.device = packs, device
        self.ready: list[Callable[[], Any]] = []

    def __next__(self) -> Any:
        return self.ready.pop()() if self.ready else next(self.packs)

    def fetch(self, report: Report, step: int) -> None:
        """Has the first pack of `step` ready. What goes wrong with it is raised when its turn comes."""
        if self.device.type != "cuda":
            return
        queued = torch.cuda.Event()
        queued.record()
        # Time in which the GPU was busy to the end was no wait.
        with report.waiting(step, lambda: not queued.query()):
            try:
                pack = next(self.packs)
                self.ready.append(lambda: pack)
            except Exception as error:
                self.ready.append(partial(_throw, error))


def _throw(error: Exception) -> None:
    raise error


def _allow_open_files() -> None:
    """Every tensor that comes from a worker holds a file open, and the packs under way have thousands: more than the
    1,024 that a process may have by default, but may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _outlive_sigterm(worker: int) -> None:
    """A scheduler sends SIGTERM to all processes of a job, workers too, whose packs the loop needs for its last step.

    A second one ends the worker, as it ends the loop.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@lru_cache
def _rate(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one rank, for MFU: from the datasheet of a known accelerator, else of a timed matrix product."""
    from walt.training.plan import peak_rate

    return peak_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _same_recipe(folder: Path, state: dict[str, Any], job: Job, packs: int) -> None:
    """A run folder continues its own recipe; only how long, where and how it is watched may change."""
    free = {
        "steps",
        "packs",
        "parallel",
        "cpu_offload",
        "ema_every",
        "checkpoint_every",
        "checkpoint_async",
        "keep_checkpoints",
    }
    free |= {"log_every", "sheet_every", "heldout_every", "heldout_clips", "workers", "wandb", "tensorboard", "output"}
    free |= {
        "spike_factor",
        "max_skips",
        "gradient_checkpointing",
        "compile",
    }  # and optimizer.lr, as where steps diverge

    def fixed(values: dict[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps(values))
        watched, data = plain["run"], plain.get("data", {})
        plain["run"] = {key: value for key, value in watched.items() if key not in free}
        plain["optimizer"] = {key: value for key, value in plain.get("optimizer", {}).items() if key != "lr"}
        if data.get("kind") == "emoji" and data.get("latents"):
            # The last clips of a folder are held out, and which ones a step sees follows from how many are left.
            plain["run.heldout_clips"] = watched.get("heldout_clips") if watched.get("heldout_every") else 0
        return plain

    before = state["job"]
    with contextlib.suppress(ValueError):  # fields that are newer than the checkpoint have their defaults
        before = type(job).model_validate(before).model_dump()
    old, new = fixed(before), fixed(job.model_dump())
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        raise WaltError(
            f"{folder} was trained with another recipe ({', '.join(changed)} differ); choose another run.output or "
            "--no-resume"
        )
    if state["packs"] != packs:
        raise WaltError(
            f"{folder} was trained on {state['packs']} packs per step, these ranks make {packs}: "
            f"run.packs={state['packs']} keeps them, whatever the number of ranks"
        )
