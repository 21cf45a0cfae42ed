"""Makes walt known to diffusers. The only file that touches diffusers' private surfaces.

After `import walt`, `DiffusionPipeline.from_pretrained(folder)` finds walt's classes without `trust_remote_code`, saved
folders name them `["walt", Class]`, and the step caches and guiders know walt's blocks. Importing diffusers takes
seconds, so `install` only leaves hooks: each part is registered right after the module it concerns is imported, or at
once if it already is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_TESTED = ((0, 42), (0, 44))  # from, and below: those of pyproject.toml
_LOADING = "diffusers.pipelines.pipeline_loading_utils"
# Not U-ViT: what its later blocks take from earlier ones is no part of a step cache.
_TRANSFORMERS = {
    "walt.models.transformer_walt": "WaltTransformer3DModel",
    "walt.models.transformer_dit": "DiTTransformer3DModel",
}
_DISPATCH = "diffusers.models.attention_dispatch"
_MODULAR = "diffusers.modular_pipelines.modular_pipeline"
_AUTO = "diffusers.pipelines.auto_pipeline"
_PIPELINE = "walt.pipelines.pipeline_walt"
_SINGLE_FILE = "diffusers.loaders.single_file_model"
_SINGLE_FILES = {"WaltTransformer3DModel": "transformer", "AutoencoderKLWalt": "vae"}
_METHODS = ["save_pretrained", "from_pretrained"]


def install() -> None:
    """Registers walt now where diffusers is already imported, and otherwise when it is. Safe to call again."""
    _after_import(_LOADING, _register_classes)
    for name in _TRANSFORMERS:
        _after_import(name, _register_blocks)
    _after_import(_DISPATCH, _register_attention)
    _after_import(_SINGLE_FILE, _register_single_files)
    _after_import(_MODULAR, _register_modular)
    for name in (_AUTO, _PIPELINE):
        _after_import(name, _register_task)


def diffusers_cli() -> None:
    """diffusers' own command line with walt's classes known to it (console script `walt-cli`)."""
    from diffusers.commands.diffusers_cli import main

    import walt  # noqa: F401 - registers

    main()


def _register_classes(loading: ModuleType) -> None:
    """(a) walt is a library that components may come from; (b) walt's class names resolve on the diffusers module.

    The loader picks load methods by `issubclass(Class, getattr(walt, "ModelMixin"))`; `walt.__getattr__` supplies the
    bases.
    """
    import walt

    _check_version(importlib.import_module("diffusers"))
    bases: dict[str, list[str]] = {name: _METHODS for name in walt.LOADABLE_BASES}
    loading.LOADABLE_CLASSES["walt"] = bases
    loading.ALL_IMPORTABLE_CLASSES.update(bases)

    for name in ("diffusers", "diffusers.pipelines", "diffusers.models"):
        _find_here(importlib.import_module(name))


def _check_version(diffusers: ModuleType) -> None:
    """Private surfaces change without notice: says so where this version of diffusers is not one of those tested."""
    version = diffusers.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _TESTED[0] <= (major, minor) < _TESTED[1]:
        tested = f"{_TESTED[0][0]}.{_TESTED[0][1]} to {_TESTED[1][0]}.{_TESTED[1][1] - 1}"
        warnings.warn(f"walt is not tested with diffusers {version}; tested are {tested}", stacklevel=2)


def refuse_cache(model: Any, guided: bool) -> None:
    """A WaltError for a step cache that cannot work in walt's loop: FasterCache, where there is guidance.

    It drops the second half of a batch and puts it back; walt's conditional and unconditional branches are one pack.
    """
    from diffusers import FasterCacheConfig

    from walt.errors import WaltError

    config = getattr(model, "_cache_config", None)
    if guided and isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise WaltError(
            "FasterCache cannot skip a branch of walt's guidance, whose branches are one pack: give it "
            "is_guidance_distilled=True (attention alone), or use FirstBlockCache, MagCache, TaylorSeer or PAB"
        )


def _find_here(module: ModuleType) -> None:
    """Makes walt's classes attributes of a module of diffusers, lazily: setting them would import all of walt."""
    import walt

    previous: Callable[[str], Any] | None = vars(module).get("__getattr__")
    if getattr(previous, "walt", False):
        return

    def lookup(name: str) -> Any:
        """Module `__getattr__` (PEP 562)."""
        if name in walt.__all__:
            return getattr(walt, name)
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module {module.__name__} has no attribute {name}")

    lookup.walt = True  # type: ignore[attr-defined]
    vars(module)["__getattr__"] = lookup


def _register_single_files(loading: ModuleType) -> None:
    """`from_single_file(path, config=folder, subfolder=...)`: files hold the keys of the model, so nothing is mapped."""
    for name, subfolder in _SINGLE_FILES.items():
        loading.SINGLE_FILE_LOADABLE_CLASSES[name] = {
            "checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint,
            "default_subfolder": subfolder,
        }


def _register_modular(modular: ModuleType) -> None:
    """`ModularPipeline.from_pretrained(folder)` for a folder of WaltPipeline or of walt's blocks."""
    modular.MODULAR_PIPELINE_MAPPING["walt"] = lambda config=None: "WaltModularPipeline"


def _register_task(_: ModuleType) -> None:
    """By this a folder of a WaltPipeline is known to be a model "walt"; when both modules are there."""
    auto: Any = sys.modules.get(_AUTO)
    ours: Any = sys.modules.get(_PIPELINE)
    if hasattr(auto, "SUPPORTED_TASKS_MAPPINGS") and hasattr(ours, "WaltPipeline"):
        auto.AUTO_TEXT2VIDEO_PIPELINES_MAPPING["walt"] = ours.WaltPipeline


def _register_blocks(module: ModuleType) -> None:
    """Tells diffusers' step caches and guiders which value walt's blocks return and take, and skipped attention gives."""
    from diffusers.hooks._helpers import (
        AttentionProcessorMetadata,
        AttentionProcessorRegistry,
        TransformerBlockMetadata,
        TransformerBlockRegistry,
    )

    def skipped(attention: Any, *args: Any, **kwargs: Any) -> Any:
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    for name, value in vars(module).items():
        if name.endswith("AttnProcessor") and value.__module__ == module.__name__:
            AttentionProcessorRegistry.register(value, AttentionProcessorMetadata(skip_processor_output_fn=skipped))
    for name in getattr(module, _TRANSFORMERS[module.__name__])._repeated_blocks or ():
        TransformerBlockRegistry.register(
            model_class=getattr(module, name),
            metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
        )


def _register_attention(dispatch: ModuleType) -> None:
    """Adds walt's attention backends to diffusers' names, so `set_attention_backend` and the context manager take them.

    The names are an enumeration, which has no public way to grow.
    """
    names = dispatch.AttentionBackendName

    def windows(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        more = (dropout_p, is_causal, scale, enable_gqa)
        return dispatch.dispatch_attention_fn(query, key, value, attn_mask, *more, backend=names.NATIVE)

    def blocked(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        from walt.attention import blocked_attention

        # What walt's models never ask for, and others may.
        foreign = attn_mask is not None and not (attn_mask.ndim == 4 and attn_mask.is_floating_point())
        if foreign or dropout_p or is_causal or key.shape[2] != query.shape[2]:
            return windows(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return blocked_attention(query, key, value, attn_mask, scale)

    def varlen(query: Any, key: Any, value: Any) -> Any:
        from walt.errors import WaltError

        raise WaltError("attention backend 'walt_varlen' works on walt's window plans, not in other models")

    for value, function in (("walt_windows", windows), ("walt_blocked", blocked), ("walt_varlen", varlen)):
        if value not in names._value2member_map_:
            member = str.__new__(names, value)
            member._name_, member._value_ = value.upper(), value
            names._member_map_[member._name_] = names._value2member_map_[value] = member
            names._member_names_.append(member._name_)
        # Context parallelism too: a rank has whole windows, whose attention is complete.
        dispatch._AttentionBackendRegistry.register(names(value), supports_context_parallel=True)(function)


def active_attention_backend(backend: Any = None) -> Any:
    """The member of `AttentionBackendName` of that name, or the active one (of `attention_backend(...)`, or set)."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    return _AttentionBackendRegistry._active_backend if backend is None else AttentionBackendName(backend)


# -- context parallelism: `models._modeling_parallel`, "experimental" --------------------------------------------------


def context_parallel_plan(module: str, argument: str, last: str) -> dict[str, Any]:
    """A `_cp_plan`: `argument` of `module` is split over the ranks by rows, the output of `last` put together again."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    return {
        module: {argument: ContextParallelInput(split_dim=0, expected_dims=2)},
        last: ContextParallelOutput(gather_dim=0, expected_dims=2),
    }


def context_group(model: Any) -> Any:
    """The process group over which `model.enable_parallelism` split the context, None without."""
    config = getattr(model, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    return None if context is None else context._flattened_mesh.get_group()


def parallel_config_on_cpu(model: Any, config: Any) -> Any:
    """diffusers' set-up of context parallelism for ranks on CPUs (gloo); None where its own serves.

    Its own divides by the number of accelerators.
    """
    import torch
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    if torch.accelerator.is_available() or not torch.distributed.is_initialized():
        return None
    if isinstance(config, ContextParallelConfig):
        config = ParallelConfig(context_parallel_config=config)
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return None
    mesh = context.mesh or torch.distributed.init_device_mesh(
        "cpu", mesh_shape=context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    config.setup(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    return config


def _after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Hook) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook(name, action))


class _Hook(importlib.abc.MetaPathFinder):
    """Calls `action` with module `name` right after its code has run, once, then steps aside."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_act(module: ModuleType) -> None:
            run(module)
            self.action(module)

        setattr(spec.loader, "exec_module", run_then_act)  # noqa: B010 - a method of this one loader object
        return spec
