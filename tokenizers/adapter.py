"""Other people's video tokenizers behind walt's interface: the strictly causal ones of diffusers.

walt's pipelines and training know of a tokenizer: its two ratios, `config.latents_mean`, `config.latents_std` and
`config.latent_channels`, `encode(x).latent_dist` and `decode(z).sample`, and that latents of a prefix are the prefix of
the latents, both ways. The last is what image conditioning and joining of chunks rest on, and many "causal" models do
not have it, so it is measured and not believed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt

# Strictly causal by the probe below, each with random weights of a tiny config.
KNOWN = (
    "AutoencoderKLWan",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLCosmos",
    "AutoencoderKLMagvit",
    "AutoencoderKLMochi",
)

# Relative to the largest value: what float32 sums in another order may differ by.
TOLERANCE = 1e-3

_probed: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def adapt(vae: Any) -> Any:
    """`vae` as walt's tokenizer interface: itself if it is one, else in a `CausalVAE`.

    Raises:
        WaltError: a model that is no video tokenizer of that contract, or one that is not prefix-causal, with the
            property that failed.
    """
    if vae is None or isinstance(vae, (AutoencoderKLWalt, CausalVAE)):
        return vae
    return CausalVAE(vae)


def load_vae(folder: str, what: str = "tokenizer") -> Any:
    """The tokenizer in a diffusers model folder, walt's or one of diffusers', adapted.

    Raises:
        WaltError: for a folder without a model, of an unknown class, damaged, or with a model that `adapt` refuses.
    """
    import json
    from pathlib import Path

    import diffusers
    from safetensors import SafetensorError

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WaltError(f"{what}: no model in {str(folder)!r} (config.json is missing)")
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
        if name in (None, "AutoencoderKLWalt"):
            cls: Any = AutoencoderKLWalt
        else:
            cls = getattr(diffusers, str(name), None)
            if cls is None or not str(name).startswith("Autoencoder"):
                raise WaltError(f"{what}: {str(folder)!r} holds a {name}, which is no tokenizer; known: {_names()}")
        return adapt(cls.from_pretrained(str(folder)))
    except WaltError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WaltError(f"{what}: {str(folder)!r} cannot be loaded: {reason}") from error


class CausalVAE(nn.Module):
    """A diffusers video tokenizer with walt's interface. The model itself is `vae`, used as it is.

    Latents are the model's raw ones. `config.latents_mean` and `config.latents_std` are such that walt's
    `(z - mean) / std` is the model's own `(z - mean - shift) / std * scaling_factor`.

    Args:
        vae: a model whose `encode(x).latent_dist` and `decode(z).sample` take `(B, 3, 1 + r*k, H, W)` in [-1, 1] and
            `(B, C, 1 + k, h, w)`.
        probe: measure that it is prefix-causal (once a model; a tiny random clip each way).

    Raises:
        WaltError: see `adapt`.
    """

    def __init__(self, vae: Any, probe: bool = True) -> None:
        super().__init__()
        name = type(vae).__name__
        if not (hasattr(vae, "encode") and hasattr(vae, "decode") and hasattr(vae, "config")):
            raise WaltError(f"vae: {name} given, a video tokenizer with encode, decode and config needed ({_names()})")
        self.vae = vae
        self.spatial_compression_ratio, self.temporal_compression_ratio = _ratios(vae)
        channels = _channels(vae)
        mean, std = _statistics(vae, channels)
        self.config = FrozenDict(
            {
                **dict(vae.config),
                "in_channels": 3,
                "latent_channels": channels,
                "latents_mean": mean,
                "latents_std": std,
                "scaling_factor": 1.0,
            }
        )
        if probe:
            failed = _probed.get(vae)
            if failed is None:
                failed = _probed.setdefault(vae, self._probe())
            if failed:
                raise WaltError(f"vae: {name} cannot be used here: {failed}; known to be causal: {_names()}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.vae.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.vae.parameters()).device

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """`(B, 3, 1 + r*k, H, W)` in [-1, 1] -> `latent_dist` over raw latents `(B, C, 1 + k, h, w)`."""
        s, t = self.spatial_compression_ratio, self.temporal_compression_ratio
        if x.ndim != 5 or x.shape[1] != 3 or 0 in x.shape:
            raise WaltError(f"video must be (B, 3, T, H, W), got shape {tuple(x.shape)}")
        if x.shape[3] % s or x.shape[4] % s:
            raise WaltError(f"video height and width must be multiples of {s}, got {x.shape[3]}x{x.shape[4]}")
        if (x.shape[2] - 1) % t:
            raise WaltError(f"a clip has 1 + {t}k frames (1, {1 + t}, {1 + 2 * t}, ...), got {x.shape[2]}")
        dist = self._guarded(lambda: self.vae.encode(x, return_dict=False)[0])
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Raw latents `(B, C, 1 + k, h, w)` -> video `(B, 3, 1 + r*k, H, W)`."""
        if z.ndim != 5 or z.shape[1] != self.config["latent_channels"] or 0 in z.shape:
            raise WaltError(f"latents must be (B, {self.config['latent_channels']}, t, h, w), got {tuple(z.shape)}")
        x = self._guarded(lambda: self.vae.decode(z, return_dict=False)[0])
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Reconstructs a clip."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict)

    def enable_tiling(self, **options: Any) -> None:
        """The model's own tiling: it blends, so results change."""
        self.vae.enable_tiling(**options)

    def enable_slicing(self) -> None:
        """One clip of a batch at a time."""
        self.vae.enable_slicing()

    def _guarded(self, call: Any) -> Any:
        """Some keep their cache on the model and are spoiled by an exception: the cache is cleared then."""
        try:
            return call()
        except BaseException:
            for name in ("clear_cache", "_clear_conv_cache"):
                if hasattr(self.vae, name):
                    getattr(self.vae, name)()
            for module in self.vae.modules():
                if hasattr(module, "_clear_conv_cache"):
                    module._clear_conv_cache()
            raise

    @torch.no_grad()
    def _probe(self) -> str:
        """What keeps the model from being prefix-causal, '' if nothing does."""
        s, t = self.spatial_compression_ratio, self.temporal_compression_ratio
        generator = torch.Generator().manual_seed(0)
        # Some configs cannot take a frame of two cells, so four; three latents, so that a middle one is tried too.
        side = 4 * s
        clip = (torch.rand((1, 3, 1 + 2 * t, side, side), generator=generator) * 2 - 1).to(self.device, self.dtype)
        training = self.vae.training
        self.vae.eval()
        try:
            z = self.encode(clip).latent_dist.mode()
            shape = (1, self.config["latent_channels"], 3, side // s, side // s)
            if z.shape != shape:
                return f"a clip of {1 + 2 * t} frames gives latents {tuple(z.shape)}, not {shape}"
            x = self.decode(z).sample
            if x.shape != clip.shape:
                return f"latents {tuple(z.shape)} decode to {tuple(x.shape)}, not {tuple(clip.shape)}"
            for k in (0, 1):
                part = self.encode(clip[:, :, : 1 + k * t]).latent_dist.mode()
                if _differ(part, z[:, :, : 1 + k]):
                    return "its encoder is not prefix-causal (latents of a clip's beginning depend on later frames)"
            for k in (0, 1):
                part = self.decode(z[:, :, : 1 + k]).sample
                if _differ(part, x[:, :, : 1 + k * t]):
                    return "its decoder is not prefix-causal (frames of a clip's beginning depend on later latents)"
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            return f"a clip of {1 + 2 * t} frames fails ({(str(error) or type(error).__name__).splitlines()[0]})"
        finally:
            self.vae.train(training)
        return ""


def _names() -> str:
    return ", ".join(("AutoencoderKLWalt", *KNOWN))


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    tolerance = TOLERANCE if a.dtype == torch.float32 else 0.05
    return bool((a - b).abs().max() > tolerance * b.abs().max().clamp_min(1e-6))


def _first(vae: Any, *names: str) -> Any:
    """The first of these that the model or its config has."""
    for name in names:
        for owner in (vae.config, vars(vae)):
            value = owner.get(name) if hasattr(owner, "get") else None
            if value is not None and not isinstance(value, (list, tuple)):
                return value
    return None


def _ratios(vae: Any) -> tuple[int, int]:
    """Pixels per latent cell a side, and frames per latent frame."""
    space = _first(vae, "spatial_compression_ratio", "scale_factor_spatial")
    time = _first(vae, "temporal_compression_ratio", "scale_factor_temporal")
    if space is None or time is None:
        raise WaltError(
            f"vae: {type(vae).__name__} tells no spatial_compression_ratio and temporal_compression_ratio; "
            f"known: {_names()}"
        )
    return int(space), int(time)


def _channels(vae: Any) -> int:
    channels = _first(vae, "latent_channels", "z_dim", "z_channels")
    if channels is None:
        raise WaltError(f"vae: {type(vae).__name__} tells no latent_channels; known: {_names()}")
    return int(channels)


def _statistics(vae: Any, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel. One per channel and frame (Cosmos) is averaged over the frames."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    scale = float(vae.config.get("scaling_factor") or 1.0)
    shift = float(vae.config.get("shift_factor") or 0.0)

    def per_channel(values: Sequence[float] | None, neutral: float, what: str) -> Tensor:
        if values is None:
            return torch.full((channels,), neutral, dtype=torch.float64)
        table = torch.tensor(list(values), dtype=torch.float64).flatten()
        if table.numel() % channels:
            raise WaltError(f"vae: {what} has {table.numel()} values, the latent has {channels} channels")
        return table.view(channels, -1).mean(dim=1)

    means = per_channel(mean, 0.0, "latents_mean") + shift
    stds = per_channel(std, 1.0, "latents_std") / scale
    return means.tolist(), stds.tolist()
