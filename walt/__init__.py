"""walt: W.A.L.T. latent video diffusion (arXiv 2312.06662) with diffusers' conventions.

`import walt` is light and registers walt with diffusers; the classes are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from walt import register as _register

if TYPE_CHECKING:
    from walt.errors import WaltError
    from walt.models.transformer_dit import DiTTransformer3DModel
    from walt.models.transformer_nuwa import NuwaTransformer3DModel
    from walt.models.transformer_uvit import UViTTransformer3DModel
    from walt.models.transformer_walt import WaltTransformer3DModel
    from walt.pipelines.conditions import WaltCondition
    from walt.pipelines.lora import WaltLoraLoaderMixin
    from walt.pipelines.modular_walt import WaltBlocks, WaltModularPipeline
    from walt.pipelines.pipeline_nuwa import NuwaPipeline
    from walt.pipelines.pipeline_walt import WaltPipeline
    from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
    from walt.pipelines.pipeline_walt_condition import WaltConditionPipeline
    from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline
    from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
    from walt.tokenizers.text import CompactTextEncoder
    from walt.tokenizers.vq_model_walt import WaltVQModel

__all__ = [
    "AutoencoderKLWalt",
    "CompactTextEncoder",
    "DiTTransformer3DModel",
    "NuwaPipeline",
    "NuwaTransformer3DModel",
    "UViTTransformer3DModel",
    "WaltBlocks",
    "WaltCascadePipeline",
    "WaltCondition",
    "WaltConditionPipeline",
    "WaltError",
    "WaltLoraLoaderMixin",
    "WaltModularPipeline",
    "WaltPipeline",
    "WaltSuperResolutionPipeline",
    "WaltTransformer3DModel",
    "WaltVQModel",
    "embedded_model",
]
__version__ = "0.1.0"

# Base classes by which diffusers recognises components of the library "walt"; resolved from diffusers on demand.
LOADABLE_BASES = ("ModelMixin", "SchedulerMixin")

_HOMES = {
    "AutoencoderKLWalt": "walt.tokenizers.autoencoder_kl_walt",
    "CompactTextEncoder": "walt.tokenizers.text",
    "DiTTransformer3DModel": "walt.models.transformer_dit",
    "NuwaPipeline": "walt.pipelines.pipeline_nuwa",
    "NuwaTransformer3DModel": "walt.models.transformer_nuwa",
    "UViTTransformer3DModel": "walt.models.transformer_uvit",
    "WaltBlocks": "walt.pipelines.modular_walt",
    "WaltModularPipeline": "walt.pipelines.modular_walt",
    "WaltLoraLoaderMixin": "walt.pipelines.lora",
    "WaltCascadePipeline": "walt.pipelines.pipeline_walt_cascade",
    "WaltCondition": "walt.pipelines.conditions",
    "WaltConditionPipeline": "walt.pipelines.pipeline_walt_condition",
    "WaltPipeline": "walt.pipelines.pipeline_walt",
    "WaltSuperResolutionPipeline": "walt.pipelines.pipeline_walt_super_resolution",
    "WaltTransformer3DModel": "walt.models.transformer_walt",
    "WaltVQModel": "walt.tokenizers.vq_model_walt",
    "WaltError": "walt.errors",
    **dict.fromkeys(LOADABLE_BASES, "diffusers"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module walt has no attribute {name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def embedded_model(name: str = "embedded") -> str:
    """The folder of an embedded model, for `from_pretrained`; a WaltError when this installation has none.

    "embedded" is the text-to-video cascade, "embedded_nuwa" the NUWA of eight tasks.
    """
    from walt.cli import model_folder

    return str(model_folder(None, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register.install()
