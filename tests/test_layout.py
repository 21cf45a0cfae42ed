"""The house: links, packages, what a wheel holds, Hugging Face's tokenizers, and which way imports point."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("tokenizers", "pipelines", "configs")
# What joins the rooms, and may import all of them.
ENTRANCES = (
    "__main__",
    "cli",
    "commands",
    "demo",
    "demo_page",
    "nuwa_commands",
    "task_commands",
    "register",
    "__init__",
)
# The one door the other way: a recipe is found by its name, when asked for.
BY_NAME = {("training/job.py", "walt.configs")}


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("name", LINKED)
def test_links(name: str) -> None:
    link = ROOT / "walt" / name
    assert link.is_symlink(), f"walt/{name} is not a link; run: ln -sfn ../{name} walt/{name}"
    assert os.readlink(link) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would hide an installed package {name}"
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-s", f"walt/{name}")
        assert listed.startswith("120000 "), f"git does not track walt/{name} as a link: {listed!r}"


def test_hugging_faces_tokenizers_is_found_from_the_root() -> None:
    # `-c` puts the current folder first on the path, as `python script.py` at the root would.
    where = run(sys.executable, "-c", "import tokenizers; print(tokenizers.__file__); tokenizers.Tokenizer").strip()
    assert "site-packages" in where and not where.startswith(str(ROOT / "tokenizers"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing is left in the working tree."""
    copy, out = tmp_path_factory.mktemp("copy") / "walt", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    # Model weights would only take time; the embedded folder's other files stand for them.
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("walt", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", str(copy), *options, "--wheel-dir", str(out), PIP_NO_INDEX="1")
    (built,) = out.glob("walt-*.whl")
    return built


def test_the_wheel_holds_walt_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = archive.read(next(name for name in names if name.endswith("RECORD"))).decode()
    assert {re.sub(r"walt-[^/]*\.dist-info", "dist-info", name.split("/")[0]) for name in names} == {
        "walt",
        "dist-info",
    }
    assert not re.search(r"^(tokenizers|pipelines|configs|tests)/", record, re.MULTILINE)
    sources = {path.relative_to(ROOT).as_posix() for path in _walt_files("*.py")}
    assert sources <= set(names), f"not in the wheel: {sorted(sources - set(names))[:5]}"
    data = {"walt/py.typed"} | {path.relative_to(ROOT).as_posix() for path in (ROOT / "walt/data").glob("*.json")}
    embedded = (path for path in _walt_files("*") if path.relative_to(ROOT).parts[1].startswith("embedded"))
    data |= {path.relative_to(ROOT).as_posix() for path in embedded if path.suffix != ".safetensors"}
    assert data <= set(names), f"not in the wheel: {sorted(data - set(names))[:5]}"
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}


def test_installing_and_removing_leaves_tokenizers_alone(wheel: Path, tmp_path: Path) -> None:
    """Into a folder that already holds a package `tokenizers`, as site-packages does."""
    theirs = tmp_path / "tokenizers" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("mine = False\n")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    code = "import tokenizers, walt.tokenizers.losses as ours; print(tokenizers.mine, ours.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path)
    assert printed.split() == ["False", str(tmp_path / "walt/tokenizers/losses.py")]
    for name in names:  # what pip uninstall does: the files of RECORD
        (tmp_path / name).unlink(missing_ok=True)
    assert theirs.read_text() == "mine = False\n"


def test_imports_point_one_way() -> None:
    """configs -> pipelines -> {tokenizers, core}; tokenizers know of walt only its errors and arithmetic."""
    wrong: list[str] = []
    for path in _walt_files("*.py"):
        parts = path.relative_to(ROOT / "walt").parts
        room = parts[0] if len(parts) > 1 else path.stem
        for imported in _imports(path):
            target = imported.split(".")
            if target[0] in LINKED and target[0] != "tokenizers":
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}, not walt.{imported}")
            if target[0] != "walt":
                continue
            goal = target[1] if len(target) > 1 else ""
            if room == "tokenizers":
                allowed = goal in {"errors", "fused", "linear", "tokenizers"}
            elif room == "pipelines":
                allowed = goal not in {"configs", "cli", "commands", "nuwa_commands", "task_commands"}
            elif room == "configs" or room in ENTRANCES:
                allowed = True
            else:  # the core
                allowed = goal not in {
                    "pipelines",
                    "configs",
                    "cli",
                    "commands",
                    "nuwa_commands",
                    "task_commands",
                    "tokenizers",
                }
            if not allowed and ("/".join(parts), imported) not in BY_NAME:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_build_files_name_no_registry() -> None:
    for name in ("pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        found = re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text)
        assert found is None, f"{name}: {found.group() if found else ''}"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def _walt_files(pattern: str) -> Iterator[Path]:
    """Files of the package, those behind the links under their walt/ name."""
    for folder, _, names in os.walk(ROOT / "walt", followlinks=True):
        for name in names:
            path = Path(folder, name)
            if path.match(pattern) and "__pycache__" not in path.parts:
                yield path


def _imports(path: Path) -> Iterator[str]:
    """Every absolute import, wherever it stands in the file; those for types alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write walt.X"
            module = node.module or ""
            if module == "walt":
                yield from (f"walt.{alias.name}" for alias in node.names)
            else:
                yield module
