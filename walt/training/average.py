"""Averages of the trained weights: the exponential one that a run exports, power-function ones, from whose snapshots an
average of any length is made afterwards (Karras et al. 2024, arXiv 2312.02696, section 3), and means of several models.

A length is sigma_rel, the standard deviation of the average's weight profile over time, as a share of the time trained: at
0.1 the first half of a run counts 0.4 %, at 0.05 0.0004 %. Time is counted in updates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from walt.data.latents import save_file
from walt.errors import WaltError
from walt.media import replacing

FOLDER = "averages"
_NAME = re.compile(r"(\d{8,})-\d+\.safetensors")
ROUNDING = 2.0**-12  # of float16
LEAST_SHARE = 1e-7  # of a snapshot that is read
LONGEST = 0.28  # a mean of everything since the first update has 0.289


class Average:
    """The running average of trained weights, whole or sharded; without one (`run.ema_decay` 0) the weights themselves.

    The decay of update n is min(ema_decay, 1 - n^-0.75): early updates forget the random start.
    """

    def __init__(self, decay: float, trained: dict[str, nn.Parameter]) -> None:
        self.trained = trained
        self.ema = None
        if decay:
            self.ema = EMAModel(
                trained.values(), decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
            )

    @property
    def weights(self) -> dict[str, Tensor]:
        return {} if self.ema is None else dict(zip(self.trained, self.ema.shadow_params, strict=True))

    @property
    def updates(self) -> int:
        return 0 if self.ema is None else int(self.ema.optimization_step)

    @updates.setter
    def updates(self, count: int) -> None:
        if self.ema is not None:
            self.ema.optimization_step = count

    def step(self) -> None:
        if self.ema is not None:
            self.ema.step(self.trained.values())


class PowerAverage:
    """The average whose weight profile grows as a power of time, so that it keeps its length relative to the run's.

    After update t the weights after updates i = 1 ... t count about as i^gamma (section 3.1).

    Args:
        length: sigma_rel.
        trained: as for `Average`.
    """

    def __init__(self, length: float, trained: dict[str, nn.Parameter]) -> None:
        self.length, self.gamma, self.trained = length, exponent(length), trained
        self.updates = 0
        self.shadow = [parameter.detach().clone() for parameter in trained.values()]

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(zip(self.trained, self.shadow, strict=True))

    @torch.no_grad()
    def step(self) -> None:
        self.updates += 1
        share = -math.expm1((self.gamma + 1) * math.log1p(-1 / self.updates)) if self.updates > 1 else 1.0
        torch._foreach_lerp_(self.shadow, [parameter.detach() for parameter in self.trained.values()], share)


class averaged:
    """Context: the model carries its averaged weights (and is in eval mode) inside, its own again afterwards."""

    def __init__(self, average: Average | PowerAverage, model: nn.Module) -> None:
        self.average, self.model = average, model
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, weight in self.average.weights.items():
            parameter = self.average.trained[name]
            self.kept.append(parameter.detach().clone())
            parameter.copy_(weight)
        self.model.eval()

    @torch.no_grad()
    def __exit__(self, *exc: object) -> None:
        for name, weight in zip(self.average.weights, self.kept, strict=True):
            self.average.trained[name].copy_(weight)
        self.kept = []
        self.model.train()


# ------------------------------------------------------------------------------------------------------- any length


def exponent(length: float) -> float:
    """gamma of the power function whose profile has the standard deviation `length`, relative to the time trained.

    The root of sigma^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (appendix C).

    Raises:
        WaltError: a length that is not in (0, `LONGEST`].
    """
    if not 0 < length <= LONGEST:
        raise WaltError(f"the length of an average must be above 0 and at most {LONGEST}, got {length}")
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


@dataclass(frozen=True)
class Snapshot:
    """A power-function average on disk: of `length` (sigma_rel), after so many updates."""

    path: Path
    step: int
    updates: int
    length: float


def snapshot_path(run: Path, step: int, number: int) -> Path:
    """Where the average `number` (its place in `run.ema_lengths`) after `step` steps is kept."""
    return run / FOLDER / f"{step:08d}-{number}.safetensors"


def write_snapshot(path: Path, weights: Mapping[str, Tensor], average: PowerAverage, step: int) -> None:
    """Writes the weights in float16 (as the paper keeps them; what would overflow in float32), whole or not at all."""
    small = {}
    for name, weight in weights.items():
        half = weight.detach().half().cpu()
        small[name] = (half if half.isfinite().all() else weight.detach().float().cpu()).contiguous()
    told = {"length": repr(average.length), "updates": str(average.updates), "step": str(step)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WaltError(f'cannot write "{path}": {error}') from error
    with replacing(path) as temporary:
        save_file(small, temporary, told)


def drop_snapshots(run: Path, after: int) -> None:
    """Deletes the snapshots of later steps, of a run that was continued otherwise or will write them again, and what
    killed writes left."""
    for path in (*(run / FOLDER).glob("*.safetensors"), *(run / FOLDER).glob(".*.safetensors")):
        found = _NAME.fullmatch(path.name)
        if path.name.startswith(".") or (found and int(found[1]) > after):
            path.unlink(missing_ok=True)


def snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run folder, in the order of their steps.

    Raises:
        WaltError: there are none, or one cannot be read.
    """
    found = []
    for path in sorted((run / FOLDER).glob("*.safetensors")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
            found.append(Snapshot(path, int(told["step"]), int(told["updates"]), float(told["length"])))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise WaltError(f'"{path}" is damaged ({error}): remove it, the others do without') from error
    if not found:
        raise WaltError(
            f'"{run}" holds no snapshots of averages: train with run.ema_lengths=[0.05,0.1], which keeps them in '
            f"{FOLDER}/"
        )
    return sorted(found, key=lambda one: (one.step, one.path.name))


def combination(kept: Sequence[tuple[int, float]], updates: int, length: float) -> tuple[NDArray[np.float64], float]:
    """By how much each kept average counts in the one of `length` after `updates` (section 3.2 and appendix C).

    The sum of profiles nearest to the profile asked for, by least squares; the shares sum to 1, which the paper leaves to
    the fit.

    Args:
        kept: updates and gamma of each.

    Returns:
        Shares `(K,)`, and how far their profile is from the one asked for, as a share of its norm.
    """
    times, gammas = (np.array(column, dtype=np.float64) for column in zip(*kept, strict=True))
    gamma = exponent(length)
    wanted = np.array([float(updates)]), np.array([gamma])
    gram = profile_product(times[:, None], gammas[:, None], times[None], gammas[None])
    towards = profile_product(times, gammas, *wanted)
    norm = float(profile_product(*wanted, *wanted)[0])
    # Lagrange's multiplier holds the sum at 1. Large shares of opposite sign would fit a little better and add up the
    # snapshots' rounding: each counts as that far off.
    count = len(times)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram / norm + ROUNDING**2 * np.eye(count)
    system[:count, count] = system[count, :count] = 1
    shares = np.linalg.solve(system, np.append(towards / norm, 1.0))[:count]
    left = shares @ gram @ shares - 2 * shares @ towards + norm
    return shares, math.sqrt(max(0.0, float(left)) / norm)


def profile_product(
    time: NDArray[np.float64], gamma: NDArray[np.float64], other: NDArray[np.float64], exponent: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Integral of two power profiles' product (appendix C): `(g + 1) / t^(g + 1) x^g` on [0, t] each."""
    first = time < other
    short, long = np.where(first, time, other), np.where(first, other, time)
    of_long = np.where(first, exponent, gamma)
    return (gamma + 1) * (exponent + 1) * (short / long) ** of_long / ((gamma + exponent + 1) * long)


def mixed(kept: Iterable[Snapshot], shares: Sequence[float]) -> dict[str, Tensor]:
    """The sum of snapshots times their shares, float32, one file at a time.

    Raises:
        WaltError: a file that is damaged, or of another model than the first.
    """
    total: dict[str, Tensor] = {}
    for snapshot, share in zip(kept, shares, strict=True):
        if abs(share) < LEAST_SHARE:
            continue
        held = dict(_read(snapshot.path))
        if total and {name: t.shape for name, t in held.items()} != {name: t.shape for name, t in total.items()}:
            raise WaltError(f'"{snapshot.path}" is of another model than the snapshots before it')
        for name, tensor in held.items():
            if name in total:
                total[name].add_(tensor.double(), alpha=share)
            else:
                total[name] = tensor.double() * share
    return {name: tensor.float() for name, tensor in total.items()}


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise WaltError(f'"{path}" is damaged ({error}): remove it, the others do without') from error


def soup(models: Sequence[nn.Module], shares: Sequence[float], names: Sequence[str]) -> nn.Module:
    """The first model with the mean of all models' weights (a model soup, Wortsman et al. 2022, arXiv 2203.05482).

    Args:
        models: of one architecture, trained from one start; the first one is changed.
        shares: of each model, adding up to 1.
        names: of each model, for errors.

    Raises:
        WaltError: models of another class, config or shape than the first one; models with a codebook, whose codes have no
            mean; numbers that are not finite.

    Sums are float32, whatever the weights are.
    """
    if getattr(models[0], "quantize", None) is not None:
        raise WaltError(f'"{names[0]}" has a codebook: codes of two of them mean other things, and have no mean')
    first = models[0].state_dict()
    for model, name in zip(models[1:], names[1:], strict=True):
        for key, value in _config(models[0]).items():
            if type(model) is type(models[0]) and _config(model).get(key) != value:
                raise WaltError(
                    f'"{name}" has {key}={_config(model).get(key)} and "{names[0]}" has {value}: no mean of them'
                )
        other = model.state_dict()
        ours, theirs = ({key: tuple(value.shape) for key, value in state.items()} for state in (first, other))
        if type(model) is not type(models[0]) or ours != theirs:
            wrong = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
            where = (
                f": {wrong[0]} is {theirs.get(wrong[0], 'absent')}, not {ours.get(wrong[0], 'there')}" if wrong else ""
            )
            raise WaltError(f'"{name}" is no model of the same shape as "{names[0]}"{where}')
        for key, value in first.items():
            if not value.is_floating_point() and not torch.equal(value, other[key]):
                raise WaltError(f'"{name}" has other {key} than "{names[0]}": whole numbers have no mean')
    states = [model.state_dict() for model in models]
    mean = {
        key: sum(share * state[key].float() for share, state in zip(shares, states, strict=True)).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in first.items()
    }
    for key, value in mean.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise WaltError(f"the mean's {key} holds numbers that are not finite")
    models[0].load_state_dict(mean)
    return models[0]


def _config(model: nn.Module) -> dict[str, Any]:
    """What a model is built from, without where it came from."""
    return {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
