"""`walt merge`: the mean of several models' weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from walt.cli import main
from walt.models.transformer_walt import WaltTransformer3DModel


def save(path: Path, seed: int, **fields: Any) -> Path:
    """A transformer's folder with random weights of its own."""
    model = tiny.transformer(**fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_the_mean_is_that_of_the_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [save(tmp_path / name, seed) for seed, name in enumerate("abc")]
    out = tmp_path / "deep" / "out"
    assert main(["merge", *map(str, folders), "--shares", "2", "1", "1", "-o", str(out)]) == 0
    assert "0.5 " in capsys.readouterr().out
    one, two, three = map(weights, folders)
    for name, value in weights(out).items():
        expected = 0.5 * one[name].double() + 0.25 * two[name].double() + 0.25 * three[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    assert (out / "config.json").read_text() == (folders[0] / "config.json").read_text()
    assert isinstance(WaltTransformer3DModel.from_pretrained(out), WaltTransformer3DModel)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_of_a_model_and_itself_nothing_changes(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", 0)
    half = WaltTransformer3DModel.from_pretrained(folder).half()
    half.save_pretrained(folder)
    assert main(["merge", str(folder), str(folder), "-o", str(tmp_path / "out")]) == 0
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value.half(), weights(folder)[name]), name


def test_class_names_stay_beside_the_weights(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name, 0)
        (tmp_path / name / "classes.txt").write_text("cat\ndog\n")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"


def test_tokenizers_can_be_merged(tmp_path: Path) -> None:
    tiny.vae().save_pretrained(tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "a"), "-o", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "AutoencoderKLWalt"


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a", 0)
    save(tmp_path / "wide", 0, num_layers=6)
    tiny.vae().save_pretrained(tmp_path / "vae")
    shutil.copytree(a, tmp_path / "damaged")
    (tmp_path / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    shutil.copytree(a, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    shutil.copytree(a, tmp_path / "short")
    kept = dict(list(weights(a).items())[:-1])
    rest = {"long": weights(a) | {"more": torch.zeros(1)}, "broken": {k: v * math.nan for k, v in weights(a).items()}}
    for name, tensors in {"short": kept, **rest}.items():
        shutil.copytree(a, tmp_path / name, dirs_exist_ok=True)
        save_file(tensors, tmp_path / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    save(tmp_path / "other", 0, sigma_data=0.5)
    for name in ("classes", "pickled", "list", "odd", "words"):
        shutil.copytree(a, tmp_path / name)
    (tmp_path / "classes" / "classes.txt").write_text("cat\n")
    torch.save(weights(a), tmp_path / "pickled" / "diffusion_pytorch_model.bin")
    (tmp_path / "pickled" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "odd" / "config.json").write_text('{"_class_name": ["x"]}')
    config = json.loads((a / "config.json").read_text())
    (tmp_path / "words" / "config.json").write_text(json.dumps({**config, "num_layers": "x"}))
    tiny.vq().save_pretrained(tmp_path / "codes")
    before = sorted(path.name for path in tmp_path.iterdir())
    cases = (
        (("a",), 2, "two models or more, got 1"),
        (("a", "none"), 2, "there is no model in"),
        (("a", "a", "--shares", "1"), 2, "--shares takes 2 numbers of at least 0"),
        (("a", "a", "--shares", "1", "-1"), 2, "--shares takes 2 numbers of at least 0"),
        (("a", "a", "--shares", "0", "0"), 2, "--shares takes 2 numbers of at least 0"),
        (("a", "a", "--shares", "nan", "1"), 2, "--shares takes 2 numbers of at least 0"),
        (("a", "wide"), 1, "has num_layers=6 and "),
        (("a", "vae"), 1, "is of class AutoencoderKLWalt, WaltTransformer3DModel is needed"),
        (("a", "damaged"), 1, "cannot be loaded"),
        (("foreign", "a"), 1, "is of class UNet2DModel"),
        (("a", "short"), 1, "has missing weights, 1 of them"),
        (("a", "long"), 1, "has unexpected weights, 1 of them, such as more"),
        (("a", "other"), 1, "no mean of them"),
        (("a", "classes"), 1, "has other classes than"),
        (("a", "pickled"), 1, "cannot be loaded"),
        (("a", "list"), 1, "config.json"),
        (("odd", "a"), 1, "which is no model of walt's"),
        (("a", "words"), 1, "cannot be loaded"),
        (("codes", "codes"), 1, "codes of two of them mean other things"),
        (("a", "broken"), 1, "numbers that are not finite"),
        (("a", "a", "--shares", "1e308", "1e308"), 2, "--shares takes 2 numbers of at least 0"),
    )
    for (*arguments,), code, message in cases:
        given = [str(tmp_path / a) if (tmp_path / a).exists() or a == "none" else a for a in arguments]
        assert main(["merge", *given, "-o", str(tmp_path / "out")]) == code, arguments
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("walt: error: ")]
        assert len(said) == 1 and message in said[0], (arguments, said)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert main(["merge", str(a), str(a), "-o", str(tmp_path / "dangling")]) == 2
    (tmp_path / "dangling").unlink()
    assert main(["merge", str(a), str(a), "-o", str(tmp_path / "wide")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
