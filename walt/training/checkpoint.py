"""Atomic checkpoints in safetensors and JSON: a folder appears whole under its name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from walt.errors import WaltError

PREFIX = "checkpoint-"


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor],
    state: Mapping[str, Any],
    adversary: dict[str, Tensor] | None = None,
) -> Path:
    """Writes model, optimizer, EMA weights, `state` (JSON) and the adversary's state, if there is one, as
    `run/checkpoint-STEP`; returns that folder.
    """
    target = run / f"{PREFIX}{step:08d}"
    temporary = run / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(
            {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}, temporary / "model.safetensors"
        )
        save_file(flat_optimizer(optimizer), temporary / "optimizer.safetensors")
        save_file({str(i): p.detach().contiguous().clone() for i, p in enumerate(ema)}, temporary / "ema.safetensors")
        if adversary is not None:
            save_file(adversary, temporary / "adversary.safetensors")
        (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WaltError(
            f"cannot write checkpoint {target}: {error.strerror or error}; the last one is untouched"
        ) from error
    return target


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: list[Tensor]) -> dict[str, Any]:
    """Restores everything `save` wrote, in place; returns the JSON state.

    Raises:
        WaltError: a file is missing, truncated or of another model; names the file and what to do.
    """
    weights, moments, averages = (_read(folder / f"{name}.safetensors") for name in ("model", "optimizer", "ema"))
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise WaltError(f"{folder / 'state.json'} cannot be read ({error}); {_advice(folder)}") from None
    missing = set(model.state_dict()) ^ set(weights)
    if missing or len(averages) != len(ema):
        raise WaltError(
            f"{folder} belongs to another model (parameter {sorted(missing)[:1]} differs); change run.output"
        )
    model.load_state_dict(weights)
    with torch.no_grad():
        for i, parameter in enumerate(ema):
            parameter.copy_(averages[str(i)])
    restore_optimizer(optimizer, moments)
    return state


def load_adversary(folder: Path) -> dict[str, Tensor]:
    """The adversary's state that `save` wrote; a WaltError when it is missing or damaged."""
    return _read(folder / "adversary.safetensors")


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint folder of a run, or None."""
    found = sorted(path for path in run.glob(f"{PREFIX}*") if path.is_dir())
    return found[-1] if found else None


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and leftovers of interrupted writes."""
    for path in sorted(path for path in run.glob(f"{PREFIX}*") if path.is_dir())[:-keep]:
        shutil.rmtree(path)
    for path in run.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WaltError(f"{path} is missing or damaged ({error}); {_advice(path.parent)}") from None


def _advice(folder: Path) -> str:
    others = sorted(path.name for path in folder.parent.glob(f"{PREFIX}*") if path.is_dir() and path != folder)
    if others:
        return f"delete {folder} to resume from {others[-1]}"
    return f"delete {folder} to start over"


def flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": v.detach().contiguous().clone() for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Restores what `flat_optimizer` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
