"""docs/diffusers.md is run, on a tiny model and a CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import walt
from tests import tiny

GUIDE = Path(__file__).parents[2] / "docs" / "diffusers.md"


@pytest.mark.slow
def test_every_block_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.cascade_folder(tmp_path / "model")
    for name, model in (("style/final", tiny.transformer()), ("sharp", tiny.super_resolution_transformer(4, 2))):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        model.save_lora_adapter(tmp_path / name)
    monkeypatch.setattr(walt, "embedded_model", lambda: str(folder))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    scope: dict[str, Any] = {}
    for block in blocks:
        # Without a GPU, and without a compiler's minutes.
        block = block.replace('"cuda"', '"cpu"').replace("fullgraph=True", 'fullgraph=True, backend="eager"')
        exec(block, scope)
    assert len(scope["frames"]) == 5 and len(scope["videos"][0]) == 5
    assert type(scope["denoiser"]) is walt.WaltTransformer3DModel
    torch._dynamo.reset()
