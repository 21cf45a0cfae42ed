"""What every denoiser shares: the interface that jobs and pipelines call, the table of backbones, and the checks of
their arguments.

A new backbone (MDTv2, DiffiT, ...) is a `ModelMixin`, `ConfigMixin` class that keeps to `Backbone` and stands in
`BACKBONES`; then `walt train`, `walt info` and the pipelines know it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor

from walt.errors import WaltError, suggest
from walt.latents import by_runs
from walt.linear import mlp

Samples = Tensor | Sequence[Tensor]
"""A batch with B first, or a list of B samples of any sizes."""

BACKBONES = {
    "walt": "walt.models.transformer_walt:WaltTransformer3DModel",
    "dit": "walt.models.transformer_dit:DiTTransformer3DModel",
    "uvit": "walt.models.transformer_uvit:UViTTransformer3DModel",
}
"""Name in a recipe -> module and class."""


def backbone(name: str) -> type[Any]:
    """The class of a backbone by its name in a recipe.

    Raises:
        WaltError: an unknown name.
    """
    if name not in BACKBONES:
        raise WaltError(f"backbone: {name!r} given, one of {', '.join(BACKBONES)} needed{suggest(name, BACKBONES)}")
    module, _, cls = BACKBONES[name].partition(":")
    return getattr(importlib.import_module(module), cls)


class Backbone(Protocol):
    """A denoiser that walt's jobs train and walt's pipelines sample.

    It is a `diffusers.ModelMixin` with `ConfigMixin` and `CacheMixin`. Its config has these fields (more as it likes):

    - `in_channels` C, `patch_size` p, `sample_size` (t, h, w) of the latents it is made for: the pipelines' default;
    - `text_dim` and `num_classes`: what it is told, None for nothing; class `num_classes` is the null label;
    - `self_conditioning`, `frame_conditioning`: whether it takes the previous estimate, and given clean frames;
    - where it is a super-resolution stage, `low_res_channels` and `low_res_scale`; absent or None otherwise.

    Samples of a pack never see one another: the output for a sample is that of the sample alone.
    """

    config: Any
    dtype: torch.dtype

    def __call__(
        self,
        hidden_states: Samples,
        timestep: Tensor,
        encoder_hidden_states: Samples | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        frame_latents: Samples | None = None,
        frame_mask: Samples | None = None,
        self_conditioning: Samples | None = None,
        kept: Sequence[Tensor | None] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predicts v.

        Args:
            hidden_states: noisy latents `(B, C, t, h, w)`, or a list of `(C, t, h, w)` of any sizes (a pack).
            timestep: `(B,)`, float or int, 0..999.
            encoder_hidden_states: text states `(B, S, text_dim)`, or a list of `(S_i, text_dim)`; needed with text_dim.
            encoder_attention_mask: `(B, S)` with a batch of text states, 1 where a state counts.
            class_labels: `(B,)` long in 0..num_classes; needed with num_classes.
            frame_latents: clean latents like `hidden_states`, used where the mask is 1; None for no given frame.
            frame_mask: `(B, 1, t, h, w)` or a list of `(1, t, h, w)`.
            self_conditioning: the previous estimate of the clean latents, like `hidden_states`; None for zeros.
            kept: per sample which tokens are computed, bool `(t, h / p, w / p)` on the CPU, or None for all of them:
                token dropping, in training. Dropped places of the prediction are 0.
            attention_kwargs: {"scale": LoRA scale}.
            return_dict: an output with `sample`, or a 1-tuple.

        Returns:
            v in the form and dtype of `hidden_states`. More than C channels are no part of v (a learned variance).

        Raises:
            WaltError: an argument that the model needs is missing, one it cannot use is given, or shapes disagree.
        """


class MLP(FeedForward):
    """diffusers' feed-forward layer with GELU in its tanh form, on the faster products of `walt.linear`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner_dim=inner, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(L, D)` to `(L, D)`."""
        return mlp(self.net[0].proj, self.net[2], hidden_states)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def check_latents(noisy: Sequence[Tensor], channels: int, patch: int) -> None:
    """Raises a WaltError unless `noisy` are samples `(channels, t, h, w)` whose sizes `patch` divides."""
    if not len(noisy):
        raise WaltError("hidden_states: empty, at least one sample needed")
    for i, z in enumerate(noisy):
        if z.ndim != 4:
            raise WaltError(
                f"hidden_states: sample {i} has shape {tuple(z.shape)}, a batch (B, {channels}, t, h, w) or a list "
                f"of ({channels}, t, h, w) needed"
            )
        if z.shape[0] != channels:
            raise WaltError(f"hidden_states: sample {i} has {z.shape[0]} channels, {channels} needed")
        if z.shape[2] % patch or z.shape[3] % patch or not z.numel():
            raise WaltError(
                f"hidden_states: sample {i} is {z.shape[2]}x{z.shape[3]}, positive multiples of the patch size "
                f"{patch} needed"
            )


def conditions(
    config: Any,
    noisy: list[Tensor],
    frame_latents: Samples | None,
    frame_mask: Samples | None,
    self_conditioning: Samples | None,
) -> list[list[Tensor]]:
    """Self-conditioning and given frames: lists of B tensors to lie beside the noisy latents, on channels."""
    pieces = []
    same = [tuple(z.shape) for z in noisy]
    if config.self_conditioning:
        pieces.append(samples("self_conditioning", self_conditioning, same, noisy))
    elif self_conditioning is not None:
        raise WaltError("self_conditioning: given, but the model was built with self_conditioning=False")
    if config.frame_conditioning:
        if (frame_latents is None) != (frame_mask is None):
            raise WaltError("frame_latents and frame_mask: only one given, both or neither needed")
        mask = samples("frame_mask", frame_mask, [(1, *s[1:]) for s in same], noisy)
        given = samples("frame_latents", frame_latents, same, noisy)
        pieces += [by_runs(torch.mul, given, mask), mask]
    elif frame_latents is not None or frame_mask is not None:
        raise WaltError("frame_latents: given, but the model was built with frame_conditioning=False")
    return pieces


def condition_channels(config: Any) -> int:
    """How many channels `conditions` adds to the noisy latents."""
    return int(config.in_channels * (config.self_conditioning + config.frame_conditioning) + config.frame_conditioning)


def check_labels(
    class_labels: Tensor | None, num_classes: int | None, batch: int, device: torch.device
) -> Tensor | None:
    """`(B,)` labels on `device`, or None for a model without classes."""
    if num_classes is None:
        if class_labels is not None:
            raise WaltError("class_labels: given, but the model was built with num_classes=None")
        return None
    if class_labels is None:
        raise WaltError(f"class_labels: missing, (B,) labels needed (the null label is {num_classes})")
    labels = per_sample("class_labels", class_labels, batch, device)
    if labels.is_floating_point():
        raise WaltError(f"class_labels: {labels.dtype} given, integers needed")
    # On an accelerator the check would wait for the device.
    if device.type == "cpu" and (int(labels.min()) < 0 or int(labels.max()) > num_classes):
        raise WaltError(f"class_labels: {labels.tolist()} given, 0..{num_classes} allowed")
    return labels


def pack_text(
    states: Samples | None, mask: Tensor | None, text_dim: int | None, batch: int
) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Text states of all samples end to end `(S, text_dim)`, without padding, and the length of each; or Nones."""
    if text_dim is None:
        if states is not None:
            raise WaltError("encoder_hidden_states: given, but the model was built with text_dim=None")
        return None, None
    if states is None:
        raise WaltError("encoder_hidden_states: missing, this model needs text states (an empty prompt's for none)")
    if len(states) != batch:
        raise WaltError(f"encoder_hidden_states: {len(states)} samples given for {batch} latents")
    for i, state in enumerate(states):
        if state.ndim != 2 or state.shape[1] != text_dim:
            raise WaltError(
                f"encoder_hidden_states: sample {i} has shape {tuple(state.shape)}, (length, {text_dim}) needed"
            )
    if mask is None:
        lengths = tuple(state.shape[0] for state in states)
        flat = states.flatten(0, 1) if isinstance(states, Tensor) else torch.cat(list(states))
        return flat, lengths
    if not isinstance(states, Tensor) or mask.shape != states.shape[:2]:
        raise WaltError(
            f"encoder_attention_mask: shape {tuple(mask.shape)} given, it goes with a batch of text states "
            "(B, S, text_dim) and is (B, S)"
        )
    kept = mask.bool().cpu()  # lengths shape the windows, so the host must know them
    lengths = tuple(kept.sum(1).tolist())
    flat = states.flatten(0, 1)
    if sum(lengths) < flat.shape[0]:
        flat = flat.index_select(0, kept.flatten().nonzero()[:, 0].to(flat.device))
    return flat, lengths


def samples(
    name: str, values: Samples | None, shapes: Sequence[tuple[int, ...]], like: Sequence[Tensor]
) -> list[Tensor]:
    """The B tensors of an argument in either form, with the dtype and device of `like`; zeros for None."""
    if values is None:
        return [z.new_zeros(shape) for z, shape in zip(like, shapes, strict=True)]
    if len(values) != len(shapes):
        raise WaltError(f"{name}: {len(values)} samples given for {len(shapes)} latents")
    for i, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if tuple(value.shape) != tuple(shape):
            raise WaltError(f"{name}: sample {i} has shape {tuple(value.shape)}, {tuple(shape)} needed")
    return [value.to(z) for value, z in zip(values, like, strict=True)]


def per_sample(name: str, value: Tensor, batch: int, device: torch.device) -> Tensor:
    """A tensor of shape `(B,)` on `device`; one number is given to all samples."""
    value = torch.as_tensor(value, device=device)
    if value.ndim == 0:
        value = value.expand(batch)
    if tuple(value.shape) != (batch,):
        raise WaltError(f"{name}: shape {tuple(value.shape)} given, ({batch},) needed, one per sample")
    return value


def one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    """Raises a WaltError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise WaltError(f"{name}: {value!r} given, one of {choices} needed{suggest(str(value), map(str, allowed))}")
