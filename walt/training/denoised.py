"""Latents as a denoiser makes them, for a decoder to learn from: what it is given in sampling is never quite an encoder's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from walt.conditioning import low_res_kind
from walt.diffusion import add_noise, make_scheduler, x0_from_velocity
from walt.errors import WaltError
from walt.latents import denormalize, normalize
from walt.training.job import DenoisedJob, Shape


class DenoisedLatents:
    """Adds noise to a tokenizer's latents and removes it again, in the last steps of sampling, without words.

    Scenes stay what they are while the noise is low, so that the true frames are still what the decoder should show; what
    the denoiser gets wrong about them is in the latents.

    Args:
        job: the recipe's `denoised`.
        transformer: a base denoiser of the tokenizer's latents.
        words: `walt.training.objectives.TextStates`; None for a denoiser without text.

    Raises:
        WaltError: a denoiser that makes no latents of this kind from nothing.
    """

    def __init__(self, job: DenoisedJob, transformer: Any, words: Any) -> None:
        config = transformer.config
        if low_res_kind(config) is not None:
            raise WaltError(f"denoised.denoiser: a base is needed, {job.denoiser!r} enlarges what a base made")
        if config.text_dim is not None and words is None:
            raise WaltError("denoised: this denoiser reads text: give text_encoder and text_tokenizer")
        self.job, self.words = job, words if config.text_dim is not None else None
        if self.words is not None and (width := self.words([""])[0].shape[-1]) != config.text_dim:
            raise WaltError(f"denoised.text_encoder: gives states of {width}, the denoiser reads {config.text_dim}")
        self.transformer = transformer.eval().requires_grad_(False)
        self.noising = make_scheduler()
        self.sampling = DDIMScheduler.from_config(self.noising.config)

    def check(self, model: Any, shapes: tuple[Shape, ...]) -> None:
        """Raises a WaltError where the denoiser does not fit the tokenizer, or `sizes` not the recipe's shapes."""
        config, ours = self.transformer.config, model.config.latent_channels
        if config.in_channels != ours:
            raise WaltError(
                f"denoised.denoiser: makes latents of {config.in_channels} channels, the tokenizer has {ours}"
            )
        if not model.config.latents_mean or not model.config.latents_std:
            raise WaltError("denoised: init is a tokenizer whose latents' mean and deviation were never recorded")
        sides = {(shape.cut or shape.height, shape.cut or shape.width) for shape in shapes}
        multiple = model.spatial_compression_ratio * config.patch_size
        for size in self.job.sizes:
            if size not in sides:
                known = ", ".join(f"{height}x{width}" for height, width in sorted(sides))
                raise WaltError(f"denoised.sizes: no shape is {size[0]}x{size[1]}; there are {known}")
            if size[0] % multiple or size[1] % multiple:
                raise WaltError(f"denoised.sizes: the denoiser needs multiples of {multiple}, got {size[0]}x{size[1]}")

    def to(self, device: torch.device) -> None:
        self.transformer.to(device)
        if self.words is not None:
            self.words.to(device)

    @torch.no_grad()
    def __call__(self, model: Any, video: Tensor, noise: Tensor, steps: int) -> Tensor:
        """What denoising changes of the latents of `video`, in units of each channel's standard deviation over the batch.

        Args:
            model: the tokenizer.
            video: `(B, 3, T, H, W)` in [-1, 1].
            noise: standard normal, as the latents.
            steps: how many of the last steps run; 1 or more.
        """
        raw = model.encode(video).latent_dist.mode().float()
        clean = normalize(raw, model.config.latents_mean, model.config.latents_std)
        self.sampling.set_timesteps(self.job.steps)
        timesteps = [int(t) for t in self.sampling.timesteps[-steps:]]
        x = add_noise(self.noising, clean, noise, timesteps[0])
        told = self._nothing(len(x), x.device)
        x0: Tensor | None = None
        for t in timesteps:
            given = (
                {"self_conditioning": x0 if x0 is None else list(x0)}
                if self.transformer.config.self_conditioning
                else {}
            )
            times = torch.full((len(x),), t, device=x.device)
            v = torch.stack(list(self.transformer(list(x), times, return_dict=False, **told, **given)[0])).float()
            x0 = x0_from_velocity(self.noising, v, x, t)
            x = self.sampling.step(v, t, x, return_dict=False)[0]
        made = denormalize(x, model.config.latents_mean, model.config.latents_std)
        return (made - raw) / raw.std(dim=(0, 2, 3, 4), keepdim=True, correction=0).clamp_min(1e-6)

    def _nothing(self, batch: int, device: torch.device) -> dict[str, Any]:
        """What the denoiser is told: the empty prompt, no class."""
        told: dict[str, Any] = {}
        if self.words is not None:
            told["encoder_hidden_states"] = [self.words([""])[0].to(device)] * batch
        if (classes := self.transformer.config.num_classes) is not None:
            told["class_labels"] = torch.full((batch,), classes, device=device)
        return told
