"""`run.compile`: the blocks of a network go through torch.compile, in place, so that nothing in it has another name."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

# A block has graphs for windows of one kind or several, for images that attend to nothing, and with and without gradients.
RECOMPILE_LIMIT = 64


def compile_network(model: nn.Module) -> None:
    """Compiles the repeated blocks of a denoiser, encoder and decoder of a tokenizer (what lies between them depends on
    values), or else all of `model`. The first call of each compiles it, and so do later ones on packs of another kind."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Tokenizers with a discriminator may go through a graph twice (the adaptive weight), which its memory must survive.
    torch._functorch.config.donated_buffer = False
    compile_parts(model)
    names = set(getattr(model, "_repeated_blocks", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        block.compile(dynamic=True)  # packs have their own sizes: no graph of the first one's
    if not blocks:
        for network in [child for name, child in model.named_children() if name in ("encoder", "decoder")] or [model]:
            network.compile()


def compile_parts(model: nn.Module) -> None:
    """Compiles only what has a `compile_apart`: layers whose plain operations are slow on a GPU."""
    for module in model.modules():
        compile_apart: Any = getattr(module, "compile_apart", None)
        if compile_apart is not None:
            compile_apart()


def eager(compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Context: compiled networks run as they are, as for what happens now and then graphs are not worth their time."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
