"""WaltPipeline: a prompt or a class becomes a video or an image, by one denoiser (the base stage)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.chunking import chunk_count
from walt.conditioning import TEXT_TOKENS
from walt.errors import WaltError
from walt.models.transformer_dit import DiTTransformer3DModel
from walt.models.transformer_uvit import UViTTransformer3DModel
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_output import WaltPipelineOutput
from walt.pipelines.sampling import (
    Context,
    Generators,
    Given,
    Prompt,
    SamplingPipeline,
    StepCallback,
    check_frames,
    check_range,
    check_size,
    denoise_stream,
    sample_seeds,
    stream_without_grad,
)
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.text import CompactTextEncoder


@dataclass(frozen=True)
class Start:
    """What every task of a base denoiser begins with."""

    begin: Callable[[], None]  # sets the state of the call
    prompt: Prompt
    seeds: list[int]
    class_labels: Tensor | None
    size: tuple[int, int]  # of the latents
    num_frames: int
    steps: int
    given: Given
    context: Context


class WaltPipeline(SamplingPipeline):
    """Text- or class-conditional generation of videos and images (W.A.L.T., arXiv 2312.06662).

    Args:
        tokenizer, text_encoder: any transformers tokenizer and encoder with `last_hidden_state`; None for a model
            conditioned on classes alone, or to work from `prompt_embeds`.
        vae: the causal tokenizer.
        transformer: the denoiser, any of `walt.models.backbone.BACKBONES`.
        scheduler: a v-prediction scheduler with zero terminal SNR (`walt.diffusion.make_scheduler`, or DPM-Solver,
            UniPC, Euler from its config).
    """

    _optional_components = ["tokenizer", "text_encoder"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: PreTrainedModel | CompactTextEncoder | None,
        vae: AutoencoderKLWalt,
        transformer: WaltTransformer3DModel | DiTTransformer3DModel | UViTTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self._set_up()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 17,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        guidance_rescale: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature; never changed
        max_sequence_length: int = TEXT_TOKENS,
        context_guidance_scale: float = 1.0,
        context_noise_level: int = 0,
        anchor_every: int = 0,
    ) -> WaltPipelineOutput | Any:
        """Generates videos.

        Args:
            prompt: what to show, one or several.
            negative_prompt: what guidance steers away from, one or one per prompt; the empty text by default.
            height, width: pixels, multiples of 8 x patch; the size of the transformer's `sample_size` by default.
            num_frames: 1 (an image), 5, 9, 13, 17, then 12 more each: 29, 41, ...
            num_inference_steps: steps per chunk.
            guidance_scale: 1 for no guidance.
            guidance_rescale: phi of Lin et al. (arXiv 2305.08891), 0 to 1.
            num_videos_per_prompt: videos per prompt or class.
            generator: one, or one per video. A video depends on its own generator only.
            latents: start noise `(B, C, t, h, w)`, t counting the latent frames of all chunks.
            prompt_embeds, negative_prompt_embeds: text states `(P, S, D)` in place of prompts.
            prompt_embeds_mask, negative_prompt_embeds_mask: `(P, S)`, 1 where a state counts.
            class_labels: one or several classes, for a class-conditional transformer.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return a WaltPipelineOutput or a tuple.
            attention_kwargs: passed on to the transformer.
            callback_on_step_end: called as (pipe, step, timestep, tensors) after every step; what it returns is taken
                over.
            callback_on_step_end_tensor_inputs: which of latents, prompt_embeds, negative_prompt_embeds it gets.
            max_sequence_length: longer prompts are cut, with a warning; walt trains on no more than the default.
            context_guidance_scale: of long videos: how hard later chunks follow the frames before them; 1 for plain
                conditioning, more takes another forward per step.
            context_noise_level: of long videos: the timestep to which those frames are noised before they are told.
            anchor_every: of long videos: every so many chunks one ends on the first frame; 0 for never.

        Returns:
            WaltPipelineOutput, or `(frames,)`.

        Raises:
            WaltError: an argument that does not fit.
        """
        start = self._start(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_scale,
            guidance_rescale,
            num_videos_per_prompt,
            generator,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            class_labels,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
            context_guidance_scale,
            context_noise_level,
            anchor_every,
        )
        return self._finish(start, output_type, return_dict, latents=latents)

    @stream_without_grad
    def stream(self, prompt: str | list[str] | None = None, num_frames: int = 485, **call: Any) -> Iterator[Tensor]:
        """Generates a long video chunk by chunk, in memory that does not depend on its length.

        Args:
            prompt, num_frames: as of a call.
            call: any other argument of a call but `latents`, `output_type` and `return_dict`.

        Yields:
            `(B, n, 3, H, W)` in [0, 1]: together the frames of a call with the same arguments.

        Raises:
            WaltError: an argument that does not fit, at the call.
        """
        start = self._start(prompt, num_frames=num_frames, output_type="pt", **call)

        def run() -> Iterator[Tensor]:
            start.begin()
            with self.progress_bar(total=self._num_timesteps) as self._bar:
                yield from self._outputs(self._denoise(start, decode=True))
            self.maybe_free_model_hooks()

        return run()

    def _finish(
        self,
        start: Start,
        output_type: str,
        return_dict: bool,
        latents: Tensor | None = None,
        frames: int | None = None,
    ) -> WaltPipelineOutput | Any:
        """All of a call after its checks; with `frames` no more than the first so many."""
        start.begin()
        with self.progress_bar(total=self._num_timesteps) as self._bar:
            parts = list(self._denoise(start, output_type != "latent", latents))
        result = torch.cat(parts, dim=2)
        if frames is not None and output_type != "latent":
            result = result[:, :, :frames]
        made = self._output(result, output_type)
        self.maybe_free_model_hooks()
        return WaltPipelineOutput(frames=made) if return_dict else (made,)

    def _denoise(self, start: Start, decode: bool, latents: Tensor | None = None) -> Iterator[Tensor]:
        return denoise_stream(
            self,
            self.transformer,
            start.prompt,
            seeds=start.seeds,
            num_frames=start.num_frames,
            size=start.size,
            steps=start.steps,
            decode=decode,
            latents=latents,
            class_labels=start.class_labels,
            given=start.given,
            context=start.context,
        )

    def _start(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 17,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        guidance_rescale: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        output_type: str = "pil",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int = TEXT_TOKENS,
        context_guidance_scale: float = 1.0,
        context_noise_level: int = 0,
        anchor_every: int = 0,
        given: Given | None = None,
    ) -> Start:
        """Checks the arguments of a call and encodes its prompts."""
        sample = self.transformer.config.sample_size
        height = height if height is not None else sample[1] * self.vae_scale_factor_spatial
        width = width if width is not None else sample[2] * self.vae_scale_factor_spatial
        count = self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_rescale,
            num_videos_per_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            class_labels,
            output_type,
        )
        check_range("context_guidance_scale", context_guidance_scale, 0)
        check_range("context_noise_level", context_noise_level, 0, 999, whole=True)
        check_range("anchor_every", anchor_every, 0, whole=True)
        given = given or Given()
        chunks = chunk_count(num_frames, self.vae_scale_factor_temporal)
        begin = self._prepare(
            guidance_scale,
            guidance_rescale,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._count_steps(num_inference_steps, chunks, given.strength, given.resample),
        )
        device = self._execution_device
        seeds = sample_seeds(generator, count * num_videos_per_prompt)
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance_scale > 1,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            max_sequence_length,
            device,
        )
        labels = self._labels(class_labels, count, device)
        return Start(
            begin=begin,
            prompt=Prompt(embeds, mask, negative_embeds, negative_mask),
            seeds=seeds,
            class_labels=None if labels is None else labels.repeat_interleave(num_videos_per_prompt),
            size=(height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial),
            num_frames=num_frames,
            steps=num_inference_steps,
            given=given,
            context=Context(context_guidance_scale, context_noise_level, anchor_every),
        )

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_rescale: float,
        num_videos_per_prompt: int,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        output_type: str = "pil",
    ) -> int:
        """The number of prompts (or classes); a WaltError for whatever does not fit this pipeline's models."""
        config = self.transformer.config
        check_size(height, width, self.vae_scale_factor_spatial * int(config.patch_size))
        check_frames(num_frames, self.transformer, self.vae_scale_factor_temporal)
        self._check_common(num_inference_steps, num_videos_per_prompt, guidance_rescale, output_type)
        if config.get("low_res_channels") is not None:
            raise WaltError("this transformer is a super-resolution stage: use WaltSuperResolutionPipeline")
        prompts = self._check_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        if config.text_dim is None and prompts is not None:
            raise WaltError("this transformer takes no text: give class_labels instead of a prompt")
        if config.text_dim is not None and prompts is None:
            raise WaltError("give a prompt (or prompt_embeds)")
        if config.num_classes is None and class_labels is not None:
            raise WaltError("this transformer takes no classes: give a prompt instead of class_labels")
        if prompts is not None:
            return prompts
        if config.num_classes is None:
            return 1
        if class_labels is None:
            raise WaltError(f"give class_labels, integers from 0 to {config.num_classes - 1}")
        return int(torch.as_tensor(class_labels).numel())

    def _labels(self, class_labels: int | list[int] | Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """`(count,)` long; the null class where a model of text and classes gets a prompt alone."""
        classes = self.transformer.config.num_classes
        if classes is None:
            return None
        labels = torch.as_tensor(classes if class_labels is None else class_labels, device=device).reshape(-1)
        if (
            labels.is_floating_point()
            or labels.numel() not in (1, count)
            or not bool(((labels >= 0) & (labels <= classes)).all())
        ):
            raise WaltError(f"class_labels must be 1 or {count} integers from 0 to {classes - 1}, got {class_labels!r}")
        return labels.long().expand(count)
