"""Every snippet of the README's three uses runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_three_uses_are_shown() -> None:
    assert [language for language, _ in SNIPPETS] == ["python", "bash", "bash"]


@pytest.mark.slow
@pytest.mark.parametrize("language, code", SNIPPETS, ids=["pipeline", "command line", "training"])
def test_snippet_runs(language: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code + "\nassert len(video) == 17 and video[0].size == (224, 128)"]
    if language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in re.findall(r"-o (\S+)", code if language == "bash" else ""):
        assert (tmp_path / name).stat().st_size > 500
