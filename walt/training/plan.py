"""What a recipe will cost before it runs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch.utils.flop_counter import FlopCounterMode

TEXT_LENGTH = 16  # text states per sample in a count: their share is small

# Dense peak FLOP/s in bfloat16 and float32 (without TF32's shorter mantissa), from the vendors' datasheets.
DATASHEETS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10": (125e12, 31.2e12),
}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device: from its datasheet, or of a timed matrix product where there is none."""
    from walt.evaluation.cost import measure_speed

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (half, full) in DATASHEETS.items():
            if part in name:
                return half if dtype == torch.bfloat16 else full
    return measure_speed(device, dtype, size=512)


class ForwardCounter:
    """Counts the floating-point operations of one forward pass per sample, on the meta device, once per size.

    Samples of a pack do not meet, so a pack's operations are the sum over its samples.

    Args:
        cls: WaltTransformer3DModel or a tokenizer.
        config: its config.
    """

    def __init__(self, cls: type[Any], config: dict[str, Any]) -> None:
        self.cls, self.config = cls, config
        self.twin: Any = None
        self.counts: dict[tuple[int, ...], float] = {}

    def __call__(self, size: tuple[int, ...]) -> float:
        """Operations for one latent of grid `size` (t, h, w) of a denoiser, or one video of (T, H, W) of a tokenizer."""
        if size not in self.counts:
            if self.twin is None:
                self.twin = meta_twin(self.cls, self.config)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                meta_forward(self.twin, size)
            self.counts[size] = float(counter.get_total_flops())
        return self.counts[size]


def meta_twin(cls: type[Any], config: dict[str, Any]) -> Any:
    """A model without data; only its parameters are empty, as constructors may read buffers."""
    with init_empty_weights():
        twin = cls.from_config(dict(config))
    return twin.to("meta").eval()


def meta_forward(twin: Any, size: tuple[int, ...]) -> Any:
    """Runs a `meta_twin` on one sample of `size`; returns what it gives."""
    config = twin.config
    with torch.device("meta"):
        if not hasattr(config, "out_channels") or hasattr(config, "latent_channels"):
            return twin(torch.empty(1, 3, *size), return_dict=False)
        t, h, w = size
        given: dict[str, Any] = {}
        if config.text_dim is not None:
            given["encoder_hidden_states"] = [torch.empty(TEXT_LENGTH, config.text_dim)]
        if config.num_classes is not None:
            given["class_labels"] = torch.zeros(1, dtype=torch.long)
        if config.low_res_channels is not None:
            scale = config.low_res_scale
            given["low_res_hidden_states"] = [torch.empty(config.low_res_channels, t, h // scale, w // scale)]
            given["low_res_noise_level"] = torch.zeros(1)
        return twin([torch.empty(config.in_channels, t, h, w)], torch.zeros(1), **given).sample
