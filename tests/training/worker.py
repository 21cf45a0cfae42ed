"""A training process of the tests, alone or under torchrun: `python -m tests.training.worker JOB.json [JOB.json ...]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from walt.commands import build_objective
from walt.errors import Terminated, WaltError
from walt.training.job import DenoiserJob, TokenizerJob
from walt.training.loop import train


def main() -> int:
    for path in sys.argv[1:]:
        values = json.loads(Path(path).read_text())
        job = (TokenizerJob if values["kind"] == "tokenizer" else DenoiserJob).model_validate(values)
        try:
            train(job, build_objective(job))
        except Terminated:
            return 143
        except WaltError as error:
            # Several jobs in one launch: what one refuses does not stop the next.
            print(f"refused: {error}", flush=True)
            if len(sys.argv) == 2:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
