"""Opening a model folder: what is wrong with it is found by name before anything is built."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from walt.errors import WaltError


def check_folder(folder: str | Path) -> dict[str, Any]:
    """The contents of model_index.json of a complete, undamaged diffusers pipeline folder.

    Reads headers alone, so it takes milliseconds for any size.

    Raises:
        WaltError: naming the folder, component or file that is missing, cut off or corrupt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WaltError(f'there is no model folder "{folder}"')
    if not (folder / "model_index.json").is_file():
        raise WaltError(f'"{folder}" is no model folder: it has no model_index.json')
    index = read_json(folder / "model_index.json")
    for name, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or value[0] is None:
            continue
        if not (folder / name).is_dir():
            raise WaltError(f'the model "{folder}" lacks its component folder "{name}" ({value[1]})')
        for path in sorted((folder / name).glob("*.json")):
            read_json(path)
        weights = sorted((folder / name).glob("*.safetensors"))
        if not weights and name.startswith(("transformer", "vae", "text_encoder")):
            raise WaltError(f'the component "{folder / name}" has no weights (*.safetensors)')
        for path in weights:
            check_safetensors(path)
    return index


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a WaltError that names the file when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WaltError(f'cannot read "{path}": {error}') from error
    if not isinstance(value, dict):
        raise WaltError(f'cannot read "{path}": it must hold a JSON object')
    return value


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose length is exactly what the header promises, else a WaltError.

    The format: 8 bytes little-endian header length n, n bytes of JSON with `data_offsets`, then the data.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise WaltError(f'the weights "{path}" are cut off: copy or download the file again')
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise WaltError(f'the weights "{path}" are corrupt: their header is unreadable') from error
    promised = 8 + length + max(ends, default=0)
    if size != promised:
        state = "cut off" if size < promised else "corrupt"
        raise WaltError(f'the weights "{path}" are {state} ({size} bytes, {promised} expected): copy the file again')
    return dict(header)


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline in `folder`, any of walt's, ready on the CPU.

    Raises:
        WaltError: for a folder that `check_folder` rejects, one of another project, or one that does not load.
    """
    import diffusers

    import walt

    index = check_folder(folder)
    name = index.get("_class_name")
    if name not in walt.__all__:
        raise WaltError(f'"{folder}" holds a {name}, which is no pipeline of walt')
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtype)
    except WaltError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WaltError(f'cannot load the model "{folder}": {reason}') from error
