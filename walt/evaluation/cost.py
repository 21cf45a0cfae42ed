"""What a model costs: parameters, counted floating-point operations, and estimates of time and memory on this machine.

Operations are counted by running each stage once on the meta device, which computes shapes alone; time is that count
over the speed of a short timed matrix product. Estimates are for planning: within about 2x.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from walt.chunking import chunk_length, chunk_starts, latent_frames
from walt.diffusion import GuidanceOptions

# Convolutions, attention and element-wise work reach about this share of a plain matrix product's speed (measured).
EFFICIENCY = 0.5
RUNTIME_BYTES = 0.6e9  # Python, torch and transformers themselves


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that has weights."""

    name: str
    kind: str
    parameters: int
    megabytes: float


@dataclass(frozen=True)
class Stage:
    """One stage of a video: sizes of one chunk, operations of all chunks with decoding."""

    name: str
    height: int
    width: int
    latent: tuple[int, int, int, int]  # (C, t, h, w)
    tokens: int
    layers: int
    steps: int
    flops: float


@dataclass(frozen=True)
class Facts:
    """All that `walt info` prints."""

    components: list[Component]
    stages: list[Stage]
    speed: float  # measured FLOP/s of a matrix product
    seconds: float
    memory: float  # bytes


class _Largest(TorchDispatchMode):
    """Remembers the largest sum of an operation's inputs and outputs, in bytes: the working set of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return out


def components(pipe: Any) -> list[Component]:
    """The parts of a pipeline that have weights."""
    return [
        Component(
            name,
            type(part).__name__,
            # The state, not only parameters(): int8 weights are buffers.
            sum(value.numel() for value in part.state_dict().values()),
            sum(value.numel() * value.element_size() for value in part.state_dict().values()) / 1e6,
        )
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    ]


def describe(pipe: Any, frames: int, device: torch.device, dtype: torch.dtype) -> Facts:
    """Describes a WaltCascadePipeline making a video of `frames` at its default size, steps and guidance."""
    parts, count = components(pipe), len(pipe.transformers)
    stages, largest, chunks = [], 0, len(chunk_starts(frames, pipe.vae_scale_factor_temporal))
    for i, model in enumerate(pipe.transformers):
        height, width = pipe.default_size(i + 1)
        steps = pipe.default_steps(count)[i]
        scale = pipe.config.super_resolution_guidance_scale if i else pipe.config.base_guidance_scale
        guided = _guided_steps(pipe.scheduler, steps, pipe.guidance_options if i else pipe.base_guidance_options, scale)
        latent = (
            int(model.config.in_channels),
            latent_frames(chunk_length(frames, pipe.vae_scale_factor_temporal), pipe.vae_scale_factor_temporal),
            height // pipe.vae_scale_factor_spatial,
            width // pipe.vae_scale_factor_spatial,
        )
        forward, need = _count_forward(model, latent)
        decoding, need_decode = _count_decode(pipe.vae, latent)
        stages.append(
            Stage(
                f"{i + 1}",
                height,
                width,
                latent,
                latent[1] * latent[2] * latent[3] // model.config.patch_size**2,
                int(model.config.num_layers),
                steps,
                chunks * ((steps + guided) * forward + decoding),
            )
        )
        largest = max(largest, need, need_decode)
    speed = measure_speed(device, dtype)
    weights = sum(part.megabytes for part in parts) * 1e6
    height, width = pipe.default_size(count)
    # A chunk, the one before it, and the pixels being written: a long video is never held as a whole.
    video = 3 * min(frames, 2 * chunk_length(frames, pipe.vae_scale_factor_temporal)) * height * width * 4 * 3
    seconds = sum(stage.flops for stage in stages) / (EFFICIENCY * speed)
    return Facts(parts, stages, speed, seconds, RUNTIME_BYTES + weights + largest + video)


def _guided_steps(scheduler: Any, steps: int, options: GuidanceOptions, scale: float) -> int:
    """How many of the steps compute the unconditional branch too."""
    if scale <= 1:
        return 0
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    last = scheduler.config.num_train_timesteps - 1
    return sum(options.scale(scale, i, float(t), last) != 1 for i, t in enumerate(scheduler.timesteps))


def measure_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of `size` x `size` matrix products; takes a fraction of a second."""
    a = torch.randn(size, size, device=device).to(dtype)

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            b = a @ a
        b[0, 0].item()  # waits for an accelerator
        return time.perf_counter() - start

    run(1)
    return 4 * 2 * size**3 / min(run(4) for _ in range(3))


def _count_forward(model: Any, latent: tuple[int, int, int, int]) -> tuple[float, int]:
    """(operations, bytes of the largest one) of one denoiser forward on one chunk."""
    twin = _on_meta(model)
    with torch.device("meta"):
        c, t, h, w = latent
        given: dict[str, Any] = {}
        if model.config.text_dim is not None:
            given["encoder_hidden_states"] = [torch.empty(16, model.config.text_dim, dtype=model.dtype)]
        if model.config.get("low_res_channels") is not None:
            scale = model.config.low_res_scale
            low = (model.config.low_res_channels, t, h // scale, w // scale)
            given["low_res_hidden_states"] = [torch.empty(low, dtype=model.dtype)]
            given["low_res_noise_level"] = torch.zeros(1)
        return _run(lambda: twin([torch.empty(c, t, h, w, dtype=model.dtype)], torch.zeros(1), **given))


def _count_decode(vae: Any, latent: tuple[int, int, int, int]) -> tuple[float, int]:
    twin = _on_meta(vae)
    return _run(lambda: twin.decode(torch.empty(1, *latent, dtype=vae.dtype, device="meta")))


def _on_meta(model: Any) -> Any:
    """A model of the same config and dtype without data; only parameters, as constructors may read buffers."""
    with init_empty_weights():
        twin = type(model).from_config(dict(model.config))
    return twin.to("meta", model.dtype).eval()


def _run(call: Any) -> tuple[float, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Largest() as largest:
        call()
    return float(counter.get_total_flops()), largest.bytes
