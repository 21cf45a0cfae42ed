"""A training process of the tests, alone or under torchrun: `python -m tests.training.worker JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from walt.commands import build_objective
from walt.training.job import DenoiserJob, TokenizerJob
from walt.training.loop import EXIT_TERMINATED, Terminated, train


def main() -> int:
    values = json.loads(Path(sys.argv[1]).read_text())
    job = (TokenizerJob if values["kind"] == "tokenizer" else DenoiserJob).model_validate(values)
    try:
        train(job, build_objective(job))
    except Terminated:
        return EXIT_TERMINATED
    return 0


if __name__ == "__main__":
    sys.exit(main())
