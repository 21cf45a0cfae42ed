"""Processes that train one model together: who they are, how gradients meet, where weights lie.

Launched by `torchrun` or `accelerate launch`; one process alone is a world of one and pays nothing. DDP averages whole
gradients; FSDP2 (`torch.distributed.fsdp.fully_shard`) cuts weights, gradients, moments and averages across ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from walt.errors import WaltError
from walt.training.job import RunJob


class Ranks:
    """The processes of a run, and this one's place among them.

    Raises:
        WaltError: `run.packs` does not divide among the ranks, or sharding is asked of a single process or CPU offload
            of a run without an accelerator.
    """

    def __init__(self, run: RunJob) -> None:
        cuda = torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            # Both, as checkpoints are written from a thread over gloo while the accelerator's backend trains.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        state = PartialState(cpu=not cuda)
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.device: torch.device = state.device
        self.main = self.rank == 0
        self.run = run
        self.packs = run.packs or self.world
        if self.packs % self.world:
            raise WaltError(f"run.packs: {self.packs} packs per step do not divide among {self.world} ranks")
        self.sharded = run.parallel == "fsdp"
        if self.sharded and self.world == 1:
            raise WaltError("run.parallel: fsdp needs several ranks (torchrun --nproc-per-node N); one has ddp")
        if run.cpu_offload and not (self.sharded and cuda):
            raise WaltError("run.cpu_offload: needs run.parallel=fsdp and an accelerator to offload from")
        # Collectives of the checkpoint thread must not mix with those of the steps.
        self.control, self.writers = (
            cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if self.world > 1 else None for _ in range(2)
        )

    @property
    def lanes(self) -> range:
        """This rank's packs of every step: numbers below `packs`, so that the packs do not depend on who trains them."""
        return range(self.rank, self.packs, self.world)

    @property
    def twins(self) -> dist.ProcessGroup | None:
        """The ranks, where each holds all weights (DDP) and takes the same step."""
        return dist.group.WORLD if self.world > 1 and not self.sharded else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in bfloat16 where the recipe says so; weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16")

    def place(self, module: nn.Module) -> nn.Module:
        """`module` on this rank's device: whole, or (FSDP2) its share of every block's parameters."""
        module.to(self.device)
        if not self.sharded:
            return module
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        half = torch.bfloat16 if self.run.precision == "bf16" else None
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.world,)),
            # Autocast decides what is computed in which type; here only what travels is made small.
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self.run.cpu_offload else OffloadPolicy(),
        }
        blocks = set(getattr(module, "_no_split_modules", None) or ())
        for child in module.modules():
            if type(child).__name__ in blocks:
                fully_shard(child, **settings)
        return cast(nn.Module, fully_shard(module, **settings))

    def reducer(self, module: nn.Module) -> Reducer:
        """What makes the gradients of `module` meet."""
        if self.sharded:
            return ShardedReducer(module)
        return DataParallelReducer(module) if self.world > 1 else Reducer()

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over ranks of each number, the same on every rank."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(v) for v in total]

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def whole(self, module: nn.Module) -> dict[str, Tensor] | None:
        """All weights of a sharded module on the host of rank 0; None on the others."""
        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return cast(dict[str, Tensor], state) if self.main else None


class Reducer:
    """One process: nothing to meet."""

    def __call__(self, total: Tensor) -> Tensor:
        """Announces the backward pass of `total`."""
        return total

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Gradients of backward passes inside stay on their rank: those of all but the last pack of a step."""
        yield


class DataParallelReducer(Reducer):
    """DDP around the loss, not the network: a loss may call its networks several times, or only parts of them."""

    def __init__(self, module: nn.Module) -> None:
        self.ddp = nn.parallel.DistributedDataParallel(
            _Passing(module), forward_sync_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def __call__(self, total: Tensor) -> Tensor:
        result: Tensor = self.ddp(total)
        return result

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        with self.ddp.no_sync():
            yield


class ShardedReducer(Reducer):
    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.module.set_requires_gradient_sync(False)
        yield
        self.module.set_requires_gradient_sync(True)


class _Passing(nn.Module):
    """Owns the parameters DDP shall watch; the loss passes through, and DDP finds in its graph which of them it used."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, total: Tensor) -> Tensor:
        return total


def scalar(value: Any) -> float:
    """A Python number of a tensor, whole or sharded, or of a number."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return float(value)
