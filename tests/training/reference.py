"""Writes reference_curves.json: the losses of the small recipes, with their seeds.

python tests/training/reference.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training.jobs import losses, save_tokenizer, small_job, tokenizer_job
from walt.commands import build_objective
from walt.training.job import Job
from walt.training.loop import train


def main() -> None:
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        vae = save_tokenizer(Path(folder) / "vae", seed=0)
        jobs: dict[str, Job] = {
            "denoiser": small_job(vae, Path(folder) / "denoiser", 20),
            "tokenizer": tokenizer_job(Path(folder) / "tokenizer"),
        }
        for name, job in jobs.items():
            train(job, build_objective(job))
            curve = losses(Path(job.run.output))
            curves[name] = {"seed": job.run.seed, "loss": [round(curve[step], 6) for step in range(1, 21)]}
    Path(__file__).with_name("reference_curves.json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
