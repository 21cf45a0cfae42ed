"""Two ranks on gloo train what one rank trains, and take over each other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.jobs import finish, losses, save_tokenizer, small_job, start, tokenizer_job

STEPS = 20


def same_curve(a: dict[int, float], b: dict[int, float], first: int = 1) -> None:
    assert set(a) == set(b) == set(range(1, STEPS + 1))
    for step in range(first, STEPS + 1):
        assert a[step] == pytest.approx(b[step], rel=1e-4), step


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_two_ranks_follow_one_and_take_over_its_checkpoints(tmp_path: Path, optimizer: str) -> None:
    """Packs of unlike weight, so that a mean of means would show; a class that FSDP must not split unevenly (r = 2)."""
    vae = save_tokenizer(tmp_path / "vae")

    def job(name: str, **run: object):  # type: ignore[no-untyped-def]
        made = small_job(vae, tmp_path / name, STEPS, checkpoint_every=10, packs=2, **run)
        return made.model_copy(update={"optimizer": made.optimizer.model_copy(update={"kind": optimizer})})

    finish(start(job("one")))
    one = losses(tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        output = tmp_path / parallel
        finish(start(job(parallel, parallel=parallel), ranks=2))
        same_curve(losses(output), one)
        assert (output / "final" / "config.json").exists()
        # Its checkpoint at step 10 goes on in one process, then in two of the other kind.
        for ranks, other in ((1, "ddp"), (2, "fsdp" if parallel == "ddp" else "ddp")):
            last = output / "checkpoint-00000020"
            last.rename(output / "gone")
            said = finish(start(job(parallel, parallel=other), ranks=ranks))
            assert "resuming after step 10" in said
            same_curve(losses(output), one)
            assert last.exists()
            (output / "gone").rename(output / f"aside-{ranks}")


@pytest.mark.slow
def test_two_ranks_train_a_tokenizer_as_one_does(tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        finish(start(tokenizer_job(tmp_path / name, STEPS, packs=2), ranks=ranks))
    same_curve(losses(tmp_path / "two"), losses(tmp_path / "one"))


@pytest.mark.slow
def test_ranks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    vae = save_tokenizer(tmp_path / "vae")
    said = finish(start(small_job(vae, tmp_path / "run", packs=3), ranks=2), code=1)
    assert "run.packs: 3 packs per step do not divide among 2 ranks" in said
    said = finish(start(tokenizer_job(tmp_path / "run", parallel="fsdp"), ranks=2), code=1)
    assert "fsdp does not fit TokenizerObjective" in said
