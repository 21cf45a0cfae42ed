"""WaltLoraLoaderMixin: adapters of walt's denoisers, loaded, saved, mixed and fused as every diffusers pipeline does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import logging
from torch import Tensor

from walt.errors import WaltError, suggest

logger = logging.get_logger(__name__)


class WaltLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """LoRA on the denoisers that `_lora_loadable_modules` names.

    diffusers' loader for a single `transformer` gives everything but files and several denoisers: here a file may hold
    one part per denoiser (`transformer.`, `transformer_2.`, ... before its keys), or no such prefix, as `walt train`
    and a model's `save_lora_adapter` write it.
    """

    _lora_loadable_modules = ["transformer"]

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """As in diffusers; keys without the name of a denoiser before them get that of the argument `component`.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a Hub name, or the tensors.
            kwargs: `component` (default "transformer"), `return_lora_metadata`, and what selects the file.

        Returns:
            `{key: tensor}`, and the adapters' settings with `return_lora_metadata`.
        """
        component = kwargs.pop("component", "transformer")
        wanted = kwargs.pop("return_lora_metadata", False)
        if component not in cls._lora_loadable_modules:
            known = cls._lora_loadable_modules
            raise WaltError(f"component: {component!r} given{suggest(component, known)}; one of {', '.join(known)}")
        state, metadata = super().lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        prefixes = tuple(f"{name}." for name in cls._lora_loadable_modules)
        if not any(key.startswith(prefixes) for key in state) and all(".lora_" in key for key in state):
            state = {f"{component}.{key}": value for key, value in state.items()}
            metadata = None if metadata is None else {f"{component}.{key}": value for key, value in metadata.items()}
        elif component != "transformer":
            # A file of one denoiser, trained as the `transformer` of its own pipeline, for another place in this one.
            state, metadata = (
                part
                and {
                    f"{component}.{key.removeprefix('transformer.')}" if key.startswith("transformer.") else key: value
                    for key, value in part.items()
                }
                for part in (state, metadata)
            )
        return (state, metadata) if wanted else state

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads adapters into the denoisers that the file has parts for.

        Args:
            pretrained_model_name_or_path_or_dict: a folder (of `walt train` with `lora`, of `save_lora_weights`), a
                file, a Hub name, or the tensors.
            adapter_name: by which `set_adapters` knows it; "default_0" and so on where none is given.
            hotswap: whether to replace the weights of the adapter of that name in place (no recompilation).
            kwargs: `component`, the denoiser that a file without prefixes is for; `low_cpu_mem_usage`; and what
                selects the file (`weight_name`, `revision`, ...).

        Raises:
            ValueError: the file is no LoRA.
            WaltError: it is for a denoiser that this pipeline could have and has not.
        """
        low_memory = kwargs.pop("low_cpu_mem_usage", True)
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            pretrained_model_name_or_path_or_dict = dict(pretrained_model_name_or_path_or_dict)
        state, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if not state or not all("lora" in key for key in state):
            raise ValueError("Invalid LoRA checkpoint: every key must contain 'lora'")
        known = self._lora_loadable_modules
        stray = sorted({key.split(".", 1)[0] for key in state} - set(known))
        if stray:
            logger.warning(f"left out parts of the LoRA that are for {', '.join(stray)}; denoisers: {', '.join(known)}")
        # Where there is nothing, diffusers' own warning says so.
        for name in [name for name in known if any(key.startswith(f"{name}.") for key in state)] or ["transformer"]:
            model = getattr(self, name, None)
            if model is None:
                raise WaltError(f"the LoRA is for {name}, which this pipeline has not")
            model.load_lora_adapter(
                state,
                prefix=name,
                adapter_name=adapter_name,
                metadata=metadata,
                low_cpu_mem_usage=low_memory,
                hotswap=hotswap,
                _pipeline=self,
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: dict[str, Any] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Writes adapters to one file.

        Args:
            save_directory: the folder.
            transformer_lora_layers: tensors of `peft.get_peft_model_state_dict(pipe.transformer)`.
            transformer_lora_adapter_metadata: the adapter's settings, `pipe.transformer.peft_config[...].to_dict()`.
            others: the same two for further denoisers: `transformer_2_lora_layers` and so on.
            is_main_process, weight_name, save_function, safe_serialization: as in diffusers.
        """
        given = {
            "transformer_lora_layers": transformer_lora_layers,
            "transformer_lora_adapter_metadata": transformer_lora_adapter_metadata,
            **others,
        }
        state: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for name in cls._lora_loadable_modules:
            layers = given.pop(f"{name}_lora_layers", None)
            metadata = given.pop(f"{name}_lora_adapter_metadata", None)
            if layers:
                state |= cls.pack_weights(layers, name)
                settings |= {f"{name}.{key}": value for key, value in (metadata or {}).items()}
        if given:
            raise WaltError(
                f"save_lora_weights takes the layers of {', '.join(cls._lora_loadable_modules)}; got {', '.join(given)}"
            )
        if not state:
            raise ValueError("You must pass at least one of `transformer_lora_layers` (or those of another denoiser)")
        cls.write_lora_layers(
            state_dict=state,
            save_directory=save_directory,
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
            lora_adapter_metadata=settings or None,
        )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the adapters' products to the weights of `components`, all denoisers by default."""
        super().fuse_lora(self._fusible(components), lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes them out again."""
        super().unfuse_lora(self._fusible(components), **kwargs)

    def _fusible(self, components: list[str] | None) -> list[str]:
        return list(self._lora_loadable_modules) if components is None else components
