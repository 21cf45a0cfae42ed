"""Averages of any length: the power-function profile, its snapshots, and `walt average`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.training.jobs import denoiser_job, save_tokenizer, saved, small_job, tokenizer_job
from walt.cli import main
from walt.commands import build_objective
from walt.errors import WaltError
from walt.training.average import (
    PowerAverage,
    combination,
    drop_snapshots,
    exponent,
    mixed,
    profile_product,
    snapshot_path,
    snapshots,
    write_snapshot,
)
from walt.training.job import TokenizerLoss, read_job
from walt.training.loop import train
from walt.training.objectives import DenoiserObjective


def profile(length: float, time: float, at: Any) -> Any:
    """The power function's density over [0, time], zero outside."""
    gamma = exponent(length)
    return np.where(at <= time, (gamma + 1) / time ** (gamma + 1) * at**gamma, 0.0)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_the_profile_has_the_length_asked_for(length: float) -> None:
    at = np.linspace(0, 1, 400_001)
    density = profile(length, 1.0, at)
    mean = np.trapezoid(density * at, at)
    assert np.trapezoid(density, at) == pytest.approx(1, abs=1e-6)
    assert np.sqrt(np.trapezoid(density * (at - mean) ** 2, at)) == pytest.approx(length, rel=1e-5)


def test_the_exponents_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for wrong in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(WaltError, match=r"length of an average must be above 0 and at most 0\.28"):
            exponent(wrong)


def test_products_of_profiles_are_their_integrals() -> None:
    at = np.linspace(0, 30, 600_001)
    for a, s, b, t in ((0.1, 20.0, 0.1, 20.0), (0.05, 30.0, 0.15, 12.0), (0.2, 7.0, 0.05, 25.0)):
        expected = np.trapezoid(profile(a, s, at) * profile(b, t, at), at)
        found = profile_product(*(np.array([v]) for v in (s, exponent(a), t, exponent(b))))
        assert float(found[0]) == pytest.approx(expected, rel=1e-3)


def walk(steps: int, lengths: list[float], every: int, run: Path) -> dict[float, torch.Tensor]:
    """A weight's path, a wave with noise on it, and its averages: snapshots on disk of `lengths`, all of them returned."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(500))
    kept = [PowerAverage(length, {"weight": weight}) for length in (*lengths, 0.03, 0.08, 0.14)]
    drift = torch.randn(500)
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(drift * np.sin(5 * step / steps) + 0.3 * torch.randn(500))
        for number, average in enumerate(kept):
            average.step()
            if number < len(lengths) and step % every == 0:
                write_snapshot(snapshot_path(run, step, number), average.weights, average, step)
    return {average.length: average.weights["weight"].detach().double() for average in kept}


def test_running_average_is_the_sum_of_its_profile(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weight, path = nn.Parameter(torch.zeros(3)), []
    average = PowerAverage(0.1, {"weight": weight})
    expected = torch.zeros(3, dtype=torch.float64)
    for update in range(1, 201):
        with torch.no_grad():
            weight.copy_(torch.randn(3))
        path.append(weight.detach().double())
        average.step()
        beta = (1 - 1 / update) ** (exponent(0.1) + 1)
        expected = beta * expected + (1 - beta) * path[-1]
        torch.testing.assert_close(average.weights["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    edges = np.linspace(0, 1, 201) ** (exponent(0.1) + 1)  # the profile's integral up to each update
    by_profile = sum(p * (b - a) for p, a, b in zip(path, edges[:-1], edges[1:], strict=True))
    torch.testing.assert_close(average.weights["weight"].double(), by_profile, rtol=1e-5, atol=1e-6)


def test_snapshots_of_two_lengths_make_those_between_and_around(tmp_path: Path) -> None:
    followed = walk(1000, [0.05, 0.1], 50, tmp_path)
    kept = snapshots(tmp_path)
    assert [(one.step, one.length) for one in kept[:3]] == [(50, 0.05), (50, 0.1), (100, 0.05)] and len(kept) == 40
    profiles = [(one.updates, exponent(one.length)) for one in kept]
    nearest = {}
    for length in (0.03, 0.05, 0.08, 0.1, 0.14):
        shares, missed = combination(profiles, 1000, length)
        assert sum(shares) == pytest.approx(1, abs=1e-8)
        made = mixed(kept, list(shares))["weight"].double()
        off = {other: float((made - weights).norm()) for other, weights in followed.items()}
        nearest[length] = min(off, key=lambda other: off[other])
        apart = sorted(float((followed[length] - weights).norm()) for weights in followed.values())[1]
        assert off[length] < 0.15 * apart, (length, off)
        assert missed < (1e-3 if length in (0.05, 0.1) else 0.1)
    assert all(a == b for a, b in nearest.items())
    shares, _ = combination(profiles, 1000, 0.1)
    assert shares[-1] == pytest.approx(1, abs=1e-4) and abs(shares[:-1]).max() < 1e-4


def test_what_snapshots_cannot_make_is_said_in_a_number() -> None:
    _, missed = combination([(1000, exponent(0.1))], 1000, 0.02)
    assert missed > 0.4


def test_snapshots_are_float16_but_for_what_would_overflow(tmp_path: Path) -> None:
    weights = {"small": torch.randn(4), "large": torch.tensor([1e6, 1.0])}
    average = PowerAverage(0.1, {"small": nn.Parameter(weights["small"])})
    write_snapshot(tmp_path / "00000001-0.safetensors", weights, average, 1)
    held = load_file(tmp_path / "00000001-0.safetensors")
    assert held["small"].dtype == torch.float16 and torch.equal(held["small"], weights["small"].half())
    assert held["large"].dtype == torch.float32 and torch.equal(held["large"], weights["large"])


def test_damaged_and_foreign_snapshots_are_named(tmp_path: Path) -> None:
    walk(100, [0.05], 50, tmp_path)
    first, last = (one.path for one in snapshots(tmp_path))
    whole = last.read_bytes()
    last.write_bytes(whole[:40])
    with pytest.raises(WaltError, match=r"00000100-0\.safetensors\" is damaged"):
        snapshots(tmp_path)
    last.write_bytes(whole)
    other = PowerAverage(0.05, {"other": nn.Parameter(torch.zeros(2))})
    write_snapshot(last, other.weights, other, 100)
    with pytest.raises(WaltError, match="is of another model than the snapshots before it"):
        mixed(snapshots(tmp_path), [0.5, 0.5])
    drop_snapshots(tmp_path, after=50)
    assert [one.path for one in snapshots(tmp_path)] == [first]
    with pytest.raises(WaltError, match=r"holds no snapshots of averages: train with run\.ema_lengths"):
        snapshots(tmp_path / "elsewhere")


# ---------------------------------------------------------------------------------------------------------------- runs


def recipe(folder: Path, name: str, steps: int = 12, **run: Any) -> Any:
    vae = folder / "vae"
    if not vae.exists():
        save_tokenizer(vae, seed=0)
    told = {"ema_lengths": (0.1, 0.2), "ema_every": 4, "checkpoint_every": 6, "heldout_every": 12, "heldout_clips": 2}
    return small_job(vae, folder / name, steps, **{**told, **run})


def test_a_run_keeps_snapshots_and_a_resumed_one_keeps_the_same(tmp_path: Path) -> None:
    job = recipe(tmp_path, "straight")
    train(job, build_objective(job))
    kept = snapshots(tmp_path / "straight")
    assert [(one.step, one.updates, one.length) for one in kept] == [
        (step, step, length) for step in (4, 8, 12) for length in (0.1, 0.2)
    ]
    # A checkpoint of the last step holds what the last snapshots are made of, and the raw weights.
    state = saved(tmp_path / "straight" / "checkpoint-00000012")
    for number, snapshot in enumerate(kept[-2:]):
        held = load_file(snapshot.path)
        assert held
        for name, weight in held.items():
            assert torch.equal(weight, state[f"power.{number}.{name}"].half()), name
            assert not torch.equal(weight, state[f"model.model.{name}"].half()) or not weight.any()

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-00000012")
    shutil.rmtree(tmp_path / "resumed" / "final")
    for path in (tmp_path / "resumed" / "averages").glob("0000001*"):
        path.unlink()
    stale = tmp_path / "resumed" / "averages" / "00000010-0.safetensors"  # of steps that the run goes again
    shutil.copy(kept[0].path, stale)
    again = recipe(tmp_path, "resumed")
    train(again, build_objective(again))
    assert not stale.exists()
    for one, other in zip(kept, snapshots(tmp_path / "resumed"), strict=True):
        assert (one.path.name, one.updates, one.length) == (other.path.name, other.updates, other.length)
        left, right = load_file(one.path), load_file(other.path)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    other_lengths = recipe(tmp_path, "resumed", ema_lengths=(0.1,))
    with pytest.raises(WaltError, match=r"was trained with another recipe \(run differ\)"):
        train(other_lengths, build_objective(other_lengths))
    short = recipe(tmp_path, "resumed", steps=4)
    train(short, build_objective(short), resume=False)
    assert (tmp_path / "resumed" / "replaced-averages" / "00000012-0.safetensors").is_file()
    assert {one.step for one in snapshots(tmp_path / "resumed")} == {4}


def test_the_command_writes_what_was_followed_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = recipe(tmp_path, "run", ema_every=1)
    train(job, build_objective(job))
    run, out = str(tmp_path / "run"), tmp_path / "models" / "kept"
    assert main(["average", run, "--lengths", "0.2", "-o", str(out)]) == 0
    made = load_file(out / "diffusion_pytorch_model.safetensors")
    state = saved(tmp_path / "run" / "checkpoint-00000012")
    for name, weight in made.items():
        if f"power.1.{name}" in state:
            torch.testing.assert_close(weight, state[f"power.1.{name}"], rtol=2e-3, atol=1e-4)
    assert json.loads((out / "config.json").read_text())["num_layers"] == 2
    capsys.readouterr()

    # Of a sharded run, too, one process makes them.
    at = tmp_path / "run" / "checkpoint-00000012" / "state.json"
    told = json.loads(at.read_text())
    told["job"]["run"] |= {"parallel": "fsdp", "cpu_offload": True, "packs": 8}
    at.write_text(json.dumps(told))

    best = tmp_path / "best"
    assert main(["average", run, "--lengths", "0.08", "0.15", "0.25", "-o", str(best)]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if "%" in line]
    losses = {float(row[1]): float(row[3]) for row in rows}
    assert set(losses) == {0.08, 0.15, 0.25} and len(set(losses.values())) == 3
    chosen = min(losses, key=lambda length: losses[length])
    assert f"of length {chosen:g}" in said and "of 24 snapshots, after step 12" in said
    # The written model has the held-out loss that was shown.
    objective = build_objective(job.model_copy(update={"init": str(best)}))
    with torch.no_grad():
        assert objective.heldout(objective.model.eval())["loss"] == pytest.approx(losses[chosen], abs=2e-5)


def test_what_is_not_averaged_is_the_runs_own(tmp_path: Path) -> None:
    """A codebook of running means is no parameter."""
    job = tokenizer_job(tmp_path / "run", 6, ema_lengths=(0.1,), ema_every=2)
    model = {**job.model, "quantizer": "vq", "quantizer_config": {"size": 16}}
    job = job.model_copy(update={"model": model, "loss": TokenizerLoss(latent_noise=0.0)})
    train(job, build_objective(job))
    out = tmp_path / "out"
    assert main(["average", str(tmp_path / "run"), "--lengths", "0.1", "-o", str(out)]) == 0
    made, state = (
        load_file(out / "diffusion_pytorch_model.safetensors"),
        saved(tmp_path / "run" / "checkpoint-00000006"),
    )
    books = [name for name in made if name.startswith("quantize.") and f"power.0.{name}" not in state]
    assert books
    for name in books:
        assert torch.equal(made[name].reshape(-1), state[f"model.model.{name}"].reshape(-1)), name


def test_snapshots_that_cannot_be_written_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = recipe(tmp_path, "run", steps=4, ema_every=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "averages").write_text("in the way")
    train(job, build_objective(job))
    assert capsys.readouterr().out.count("no snapshot of averages after step") == 4
    assert (tmp_path / "run" / "final").is_dir()


def test_a_loss_that_is_no_number_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = recipe(tmp_path, "run", steps=4, ema_every=2)
    train(job, build_objective(job))
    losses = iter([float("nan"), 0.3, 0.4])
    monkeypatch.setattr(DenoiserObjective, "heldout", lambda objective, model: {"loss": next(losses)})
    out = str(tmp_path / "out")
    assert main(["average", str(tmp_path / "run"), "--lengths", "0.05", "0.1", "0.2", "-o", out]) == 0
    assert "of length 0.1" in capsys.readouterr().out


def test_the_averages_of_a_run_that_begins_anew_are_not_taken_for_its_own(tmp_path: Path) -> None:
    job = recipe(tmp_path, "run", steps=4)
    train(job, build_objective(job))
    left = tmp_path / "run" / "averages" / ".00000004-0.abcdef.safetensors"
    left.write_bytes(b"of a killed write")
    for path in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    plain = recipe(tmp_path, "run", steps=2, ema_lengths=())
    train(plain, build_objective(plain))
    assert not list((tmp_path / "run" / "averages").iterdir())


def test_the_command_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["average", *words]) == 2
        return capsys.readouterr().err

    run = str(tmp_path / "run")
    assert "RUN: there is no folder" in refused(run, "--lengths", "0.1")
    job = recipe(tmp_path, "run", steps=4, heldout_every=0)
    train(job, build_objective(job))
    capsys.readouterr()
    assert "--lengths must be above 0 and at most 0.28, got 0.5" in refused(run, "--lengths", "0.1", "0.5")
    assert "run.heldout_every=0): give one of --lengths, and -o" in refused(run, "--lengths", "0.1", "0.2", "-o", "x")
    assert "give one of --lengths, and -o" in refused(run, "--lengths", "0.1")
    assert "is there already" in refused(run, "--lengths", "0.1", "-o", str(tmp_path))
    assert main(["average", run, "--lengths", "0.1", "-o", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "config.json").is_file()
    plain = recipe(tmp_path, "plain", steps=2, ema_lengths=())
    train(plain, build_objective(plain))
    capsys.readouterr()
    assert "holds no snapshots of averages" in refused(str(tmp_path / "plain"), "--lengths", "0.1", "-o", "x")
    for path in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    assert "has no checkpoint, which says of what recipe" in refused(run, "--lengths", "0.1", "-o", "x")
    for kind in ("cascade", ["denoiser"], None):
        with pytest.raises(WaltError, match=r"the recipe is of kind .*; known: tokenizer, denoiser, nuwa"):
            read_job({"kind": kind})
    with pytest.raises(WaltError, match=r"the recipe is of another walt: run\.stepps: .*, got 3"):
        values = denoiser_job(tmp_path, tmp_path).model_dump()
        read_job({**values, "run": {**values["run"], "stepps": 3}})
