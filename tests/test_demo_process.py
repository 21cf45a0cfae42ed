"""`walt demo` as a process of its own: it answers on loopback alone, gives out no files, and Ctrl-C ends it cleanly."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the extra demo is not installed"),
]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def status(address: str) -> tuple[int, str]:
    try:
        with OPENER.open(address, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def listening(pid: int) -> set[tuple[str, int]]:
    """The addresses (hexadecimal, as Linux lists them) and ports that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(link))
        except OSError:
            continue  # closed meanwhile
    found = set()
    for name in ("tcp", "tcp6"):
        table = Path(f"/proc/{pid}/net/{name}")
        for line in table.read_text().splitlines()[1:] if table.is_file() else []:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    folder = tiny.cascade_folder(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "walt", "demo", "--port", "0", "--model", str(folder)],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell job ignores it
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/net/tcp").is_file(), reason="only Linux lists its sockets there")
@pytest.mark.parametrize(
    ("ending", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
)
def test_a_process_serves_loopback_alone_and_ends_cleanly(
    demo: subprocess.Popen[str], tmp_path: Path, ending: signal.Signals, code: int, message: str
) -> None:
    assert demo.stdout is not None
    line = demo.stdout.readline()  # it is printed once the page is served
    match = re.fullmatch(r"walt demo: (http://127\.0\.0\.1:(\d+)/) \(Ctrl-C ends it\)\n", line)
    assert match, (line, (tmp_path / "stderr").read_text())
    address, port = match[1], int(match[2])
    code_, page = status(address)
    assert code_ == 200 and "walt" in page
    assert listening(demo.pid) == {("0100007F", port)}  # 127.0.0.1
    for file in ("/etc/hostname", "/etc/passwd", tmp_path / "model" / "model_index.json", tmp_path / "stderr"):
        code_, text = status(f"{address}gradio_api/file={file}")
        assert code_ == 403 and "root:" not in text, file

    demo.send_signal(ending)
    rest = demo.stdout.read()
    assert demo.wait(60) == code
    assert rest == "" and (tmp_path / "stderr").read_text().strip().splitlines()[-1].startswith(
        f"walt: error: {message}"
    )
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert list((tmp_path / "temporary").iterdir()) == []  # uploads and results are gone
