"""WaltSuperResolutionPipeline: a video (or image) becomes twice as high and wide (papers.md 1.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.errors import WaltError
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_output import WaltPipelineOutput
from walt.pipelines.sampling import (
    Generators,
    Prompt,
    SamplingPipeline,
    StepCallback,
    check_frames,
    check_range,
    denoise_chunks,
    sample_seeds,
)
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.text import CompactTextEncoder


class WaltSuperResolutionPipeline(SamplingPipeline):
    """Doubles the height and width of a video with a denoiser that sees its noised low-resolution latents.

    Args:
        vae, transformer, scheduler: as for WaltPipeline; the transformer has `low_res_channels`.
        tokenizer, text_encoder: None to work from `prompt_embeds` (or for a transformer without text).
        noise_level: the default of the call's argument.
    """

    _optional_components = ["tokenizer", "text_encoder"]

    def __init__(
        self,
        vae: AutoencoderKLWalt,
        transformer: WaltTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | CompactTextEncoder | None = None,
        noise_level: int = 50,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder
        )
        self.register_to_config(noise_level=noise_level)
        self._set_up()

    @torch.no_grad()
    def __call__(
        self,
        video: Any = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        noise_level: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature; never changed
        max_sequence_length: int = 128,
    ) -> WaltPipelineOutput | Any:
        """Doubles the size of videos.

        Args:
            video: as diffusers' VideoProcessor takes it: a tensor `(B, T, 3, H, W)` or `(T, 3, H, W)` in [0, 1], an
                array `(B, T, H, W, 3)` or `(T, H, W, 3)` (float in [0, 1] or uint8), a list of PIL images, or a list of
                videos. T as `num_frames` of WaltPipeline; H and W multiples of 8. With one prompt per video.
            noise_level: 0 to 999, the timestep to which the low-resolution latents are noised: more trusts them less.
            prompt, and all the rest: as for WaltPipeline; `num_videos_per_prompt` makes that many versions of each
                video.

        Returns:
            WaltPipelineOutput, or `(frames,)`; frames of twice the height and width.

        Raises:
            WaltError: an argument that does not fit.
        """
        noise_level = noise_level if noise_level is not None else int(self.config.noise_level)
        self._check_common(num_inference_steps, num_videos_per_prompt, guidance_rescale, output_type)
        check_range("noise_level", noise_level, 0, 999, whole=True)
        prompts = self._check_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        small = self.check_inputs(video, prompts)
        self._begin(
            guidance_scale if self.transformer.config.text_dim is not None else 1.0,
            guidance_rescale,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        seeds = sample_seeds(generator, len(small) * num_videos_per_prompt)
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            max_sequence_length,
            device,
        )
        scale = int(self.transformer.config.low_res_scale)
        height, width = (side // self.vae_scale_factor_spatial * scale for side in small.shape[-2:])
        num_frames = small.shape[2]
        self._num_timesteps = self._count_steps(num_inference_steps, num_frames)
        with self.progress_bar(total=self._num_timesteps) as self._bar:
            result = denoise_chunks(
                self,
                self.transformer,
                Prompt(embeds, mask, negative_embeds, negative_mask),
                seeds=seeds,
                num_frames=num_frames,
                size=(height, width),
                steps=num_inference_steps,
                decode=output_type != "latent",
                latents=latents,
                low_res_video=small.to(device).repeat_interleave(num_videos_per_prompt, dim=0),
                noise_level=noise_level,
            )
        frames = self._output(result, output_type)
        self.maybe_free_model_hooks()
        return WaltPipelineOutput(frames=frames) if return_dict else (frames,)

    def check_inputs(self, video: Any, prompts: int | None) -> Tensor:
        """The video as `(B, 3, T, H, W)` float32 in [-1, 1]; a WaltError when it or the prompts do not fit."""
        config = self.transformer.config
        if config.low_res_channels is None:
            raise WaltError(
                "this transformer is no super-resolution stage (low_res_channels is None): use WaltPipeline"
            )
        if config.num_classes is not None:
            raise WaltError("WaltSuperResolutionPipeline does not take class-conditional transformers")
        if video is None:
            raise WaltError("give a video to enlarge")
        if isinstance(video, np.ndarray) and video.dtype == np.uint8:
            video = video.astype(np.float32) / 255
        try:
            small: Tensor = self.video_processor.preprocess_video(video).float()
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise WaltError(
                "video must be a tensor (B, T, 3, H, W) or (T, 3, H, W), an array (B, T, H, W, 3) or (T, H, W, 3), "
                f"or a list of PIL images or of videos of one size: {error}"
            ) from error
        if small.ndim != 5 or small.shape[1] != 3:
            raise WaltError(f"video must have 3 colour channels, got (B, C, T, H, W) = {tuple(small.shape)}")
        check_frames(small.shape[2], self.transformer, self.vae_scale_factor_temporal)
        multiple = self.vae_scale_factor_spatial
        for name, side in (("height", small.shape[3]), ("width", small.shape[4])):
            if side % multiple or side // multiple * config.low_res_scale % config.patch_size:
                step = max(multiple, multiple * config.patch_size // config.low_res_scale)
                raise WaltError(f"the video's {name} must be a multiple of {step}, got {side}")
        if config.text_dim is None and prompts is not None:
            raise WaltError("this transformer takes no text: leave the prompt out")
        if config.text_dim is not None and prompts is None:
            raise WaltError("give the prompt (or prompt_embeds) of the video")
        if prompts is not None and prompts != len(small):
            raise WaltError(f"{prompts} prompts for {len(small)} videos: give one per video")
        return small
