"""WaltCascadePipeline: base and both super-resolution stages in one folder, a prompt becomes a large video."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.chunking import chunk_length, chunk_starts
from walt.errors import WaltError
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.pipeline_output import WaltPipelineOutput
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline
from walt.pipelines.sampling import (
    Generators,
    SamplingPipeline,
    StepCallback,
    check_frames,
    check_range,
    check_size,
    encode_video,
    sample_seeds,
)
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.text import CompactTextEncoder


class WaltCascadePipeline(SamplingPipeline):
    """The three stages of W.A.L.T. text-to-video: the frames of each are the low-resolution video of the next.

    Args:
        tokenizer, text_encoder, vae, scheduler: shared by the stages.
        transformer: the base denoiser.
        transformer_2, transformer_3: the super-resolution denoisers, None where there are fewer stages.
        base_steps, super_resolution_steps: default inference steps.
        base_guidance_scale, super_resolution_guidance_scale: default guidance.
        noise_level: default noise on the low-resolution latents (a timestep).
    """

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->transformer_3->vae"
    _optional_components = ["transformer_2", "transformer_3"]
    _lora_loadable_modules = ["transformer", "transformer_2", "transformer_3"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel | CompactTextEncoder,
        vae: AutoencoderKLWalt,
        transformer: WaltTransformer3DModel,
        transformer_2: WaltTransformer3DModel | None,
        transformer_3: WaltTransformer3DModel | None,
        scheduler: KarrasDiffusionSchedulers,
        base_steps: int = 50,
        super_resolution_steps: int = 20,
        base_guidance_scale: float = 6.0,
        super_resolution_guidance_scale: float = 1.0,
        noise_level: int = 50,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            transformer_2=transformer_2,
            transformer_3=transformer_3,
            scheduler=scheduler,
        )
        self.register_to_config(
            base_steps=base_steps,
            super_resolution_steps=super_resolution_steps,
            base_guidance_scale=base_guidance_scale,
            super_resolution_guidance_scale=super_resolution_guidance_scale,
            noise_level=noise_level,
        )
        self._set_up()
        self._current_stage = 0

    @property
    def transformers(self) -> list[Any]:
        """The denoisers of the stages there are, in order."""
        stages = [self.transformer]
        for later in (self.transformer_2, self.transformer_3):
            if later is None:
                break
            stages.append(later)
        return stages

    @property
    def current_stage(self) -> int:
        """1, 2 or 3 while that stage runs, 0 outside a call."""
        return self._current_stage

    def default_size(self, stages: int) -> tuple[int, int]:
        """(height, width) of stage `stages` when the base makes the size it was made for."""
        sample, factor = self.transformer.config.sample_size, self.vae_scale_factor_spatial * 2 ** (stages - 1)
        return sample[1] * factor, sample[2] * factor

    def size_multiple(self, stages: int) -> int:
        """What height and width of stage `stages` must be multiples of, for the patches of every stage on the way."""
        patches = [int(model.config.patch_size) for model in self.transformers[:stages]]
        return math.lcm(*(self.vae_scale_factor_spatial * p * 2 ** (stages - 1 - i) for i, p in enumerate(patches)))

    def default_steps(self, stages: int) -> list[int]:
        """Inference steps per stage, from the config."""
        return [self.config.base_steps] + [self.config.super_resolution_steps] * (stages - 1)

    def check_inputs(
        self, stages: int | None, height: int | None, width: int | None, num_frames: int
    ) -> tuple[int, int, int]:
        """(stages, height, width) with defaults filled in; a WaltError when they or `num_frames` do not fit."""
        available = len(self.transformers)
        stages = available if stages is None else stages
        check_range("stages", stages, 1, whole=True)
        if stages > available:
            raise WaltError(f"stages={stages}, but this model has {available}")
        default = self.default_size(stages)
        height = default[0] if height is None else height
        width = default[1] if width is None else width
        check_size(height, width, self.size_multiple(stages))
        for model in self.transformers[:stages]:
            check_frames(num_frames, model, self.vae_scale_factor_temporal)
        return stages, height, width

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 17,
        num_inference_steps: int | list[int] | tuple[int, ...] | None = None,
        guidance_scale: float | list[float] | tuple[float, ...] | None = None,
        guidance_rescale: float = 0.0,
        noise_level: int | list[int] | tuple[int, ...] | None = None,
        stages: int | None = None,
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
        """Generates videos with the first `stages` stages.

        Args:
            height, width: pixels of the last stage that runs; its base size times 2 per further stage by default.
            num_inference_steps, guidance_scale: one number for every stage, or one per stage; from the config by
                default.
            noise_level: one number, or one per super-resolution stage.
            stages: how many stages to run, all by default.
            latents: start noise of the base stage.
            prompt, and all the rest: as for WaltPipeline. Callbacks count the steps of all stages through
                (`num_timesteps` in all); `current_stage` tells which one runs.

        Returns:
            WaltPipelineOutput, or `(frames,)`, of the last stage that runs.

        Raises:
            WaltError: an argument that does not fit.
        """
        stages, height, width = self.check_inputs(stages, height, width, num_frames)
        steps = _per_stage("num_inference_steps", num_inference_steps, self.default_steps(stages))
        base, later = self.config.base_guidance_scale, self.config.super_resolution_guidance_scale
        scales = _per_stage("guidance_scale", guidance_scale, [base] + [later] * (stages - 1))
        levels = _per_stage("noise_level", noise_level, [self.config.noise_level] * (stages - 1))
        for count in steps:
            self._check_common(count, num_videos_per_prompt, guidance_rescale, output_type)
        for scale in scales:
            check_range("guidance_scale", scale, 0)
        prompts = self._check_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        if prompts is None:
            raise WaltError("give a prompt (or prompt_embeds)")
        self._begin(
            scales[0],
            guidance_rescale,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        # One seed per sample, drawn once: a sample's later stages do not depend on how many samples there are.
        batch = prompts * num_videos_per_prompt
        sources = [torch.Generator().manual_seed(seed) for seed in sample_seeds(generator, batch)]
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            max(scales) > 1,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            max_sequence_length,
        )
        self._num_timesteps = sum(self._count_steps(count, num_frames) for count in steps)
        shared: dict[str, Any] = {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative_embeds,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds_mask": negative_mask,
            "generator": sources,
            "guidance_rescale": guidance_rescale,
            "attention_kwargs": attention_kwargs,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "return_dict": False,
        }
        frames: Any = None
        for i, model in enumerate(self.transformers[:stages]):
            self._current_stage = i + 1
            if i and scales[i] != scales[i - 1]:
                self._guidance_scale = scales[i]
            call: dict[str, Any] = {
                **shared,
                "num_inference_steps": steps[i],
                "guidance_scale": self._guidance_scale,
                "output_type": output_type if i + 1 == stages else "pt",
            }
            if i == 0:
                stage: SamplingPipeline = WaltPipeline(None, None, self.vae, model, self.scheduler)
                down = 2 ** (stages - 1)
                call |= {"height": height // down, "width": width // down, "num_frames": num_frames, "latents": latents}
            else:
                stage = WaltSuperResolutionPipeline(self.vae, model, self.scheduler)
                call |= {"video": frames, "noise_level": levels[i - 1]}
                if model.config.text_dim is None:
                    call |= dict.fromkeys(key for key in shared if "prompt_embeds" in key)
            stage.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
            call["callback_on_step_end"] = self._stage_callback(stage, callback_on_step_end)
            frames = stage(**call)[0]
            if self.interrupt:
                if i + 1 < stages:
                    frames = self._early_output(frames, output_type)
                break
        self._current_stage = 0
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return WaltPipelineOutput(frames=frames) if return_dict else (frames,)

    def _early_output(self, frames: Tensor, output_type: str) -> Any:
        """The frames `(B, T, 3, H, W)` in [0, 1] of the stage that was interrupted, as `output_type` says."""
        video = frames.transpose(1, 2) * 2 - 1
        if output_type != "latent":
            return self._output(video, output_type)
        count = video.shape[2]
        ratio = self.vae_scale_factor_temporal
        length = chunk_length(count, ratio)
        chunks = [video[:, :, start : start + length] for start in chunk_starts(count, ratio)]
        return torch.cat([encode_video(self.vae, chunk) for chunk in chunks], dim=2)

    def _stage_callback(self, stage: Any, callback: StepCallback | None) -> StepCallback:
        """Passes a stage's steps on with this pipeline in its place, and the state that a callback may change back."""

        def step(_: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._current_timestep = t
            result = callback(self, self._step_index, t, tensors) if callback is not None else None
            self._step_index += 1
            stage._guidance_scale, stage._interrupt = self._guidance_scale, self._interrupt
            return result or {}

        return step


def _per_stage(name: str, value: Any, default: list[Any]) -> list[Any]:
    """One value per stage from None (the default), one number, or a sequence of as many."""
    if value is None:
        return default
    if not isinstance(value, list | tuple):
        return [value] * len(default)
    if len(value) != len(default):
        raise WaltError(
            f"{name} has {len(value)} values, expected one or {len(default)} (one per stage), got {value!r}"
        )
    return list(value)
