"""walt's base stage as modular blocks: text, latents, denoising with any of diffusers' guiders, decoding.

One chunk: up to 17 frames; longer videos are WaltPipeline's. A block can be replaced, and guidance is a component (CFG,
adaptive projected, skipped-layer, perturbed-attention, ...) in place of an argument.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, HookRegistry, ModularPipeline, ModularPipelineBlocks
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.chunking import chunk_starts, latent_frames
from walt.conditioning import TEXT_TOKENS, encode_text
from walt.diffusion import x0_from_velocity
from walt.errors import WaltError
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.lora import WaltLoraLoaderMixin
from walt.pipelines.sampling import (
    START_NOISE,
    check_range,
    check_size,
    decode_latents,
    sample_seeds,
    seeded_noise,
)
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt

_GUIDER = ComponentSpec(
    "guider",
    ClassifierFreeGuidance,
    config=FrozenDict({"guidance_scale": 6.0}),
    default_creation_method="from_config",
)
_TRANSFORMER = ComponentSpec("transformer", WaltTransformer3DModel)
_SCHEDULER = ComponentSpec("scheduler", DDIMScheduler)
_VAE = ComponentSpec("vae", AutoencoderKLWalt)
_TEXT = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "encoder_attention_mask": ("prompt_embeds_mask", "negative_prompt_embeds_mask"),
}


class WaltTextEncoderStep(ModularPipelineBlocks):
    """Prompts to text states, repeated for every video; those to steer away from where the guider wants them."""

    model_name = "walt"

    @property
    def description(self) -> str:
        return "Encodes prompts, and negative prompts where the guider has a use for them"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("text_encoder", PreTrainedModel),
            ComponentSpec("tokenizer", PreTrainedTokenizerBase),
            _GUIDER,
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt", required=True, description="a str or a list of str"),
            InputParam("negative_prompt", description="one for all or one per prompt; the empty text by default"),
            InputParam("num_videos_per_prompt", default=1, type_hint=int),
            InputParam("max_sequence_length", default=TEXT_TOKENS, type_hint=int),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name, type_hint=torch.Tensor) for names in _TEXT.values() for name in names]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        prompts = [block.prompt] if isinstance(block.prompt, str) else list(block.prompt)
        negatives = block.negative_prompt or ""
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
        if len(negatives) != len(prompts):
            raise WaltError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one or as many")

        def encode(texts: list[str]) -> list[torch.Tensor]:
            found = encode_text(
                components.tokenizer,
                components.text_encoder,
                texts,
                components._execution_device,
                block.max_sequence_length,
            )
            return [value.repeat_interleave(block.num_videos_per_prompt, dim=0) for value in found]

        block.prompt_embeds, block.prompt_embeds_mask = encode(prompts)
        block.negative_prompt_embeds = block.negative_prompt_embeds_mask = None
        if components.requires_unconditional_embeds:
            block.negative_prompt_embeds, block.negative_prompt_embeds_mask = encode(negatives)
        self.set_block_state(state, block)
        return components, state


class WaltPrepareLatentsStep(ModularPipelineBlocks):
    """Timesteps, and start noise of which a video's depends on its own generator alone."""

    model_name = "walt"

    @property
    def description(self) -> str:
        return "Sets the timesteps and draws the start noise"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [_TRANSFORMER, _SCHEDULER, _VAE]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt_embeds", required=True, type_hint=torch.Tensor),
            InputParam("height", type_hint=int, description="pixels; the transformer's sample_size by default"),
            InputParam("width", type_hint=int),
            InputParam("num_frames", default=17, type_hint=int, description="1, 5, 9, 13 or 17"),
            InputParam("num_inference_steps", default=50, type_hint=int),
            InputParam("generator", description="one, or one per video"),
            InputParam("latents", type_hint=torch.Tensor, description="start noise in place of the generator's"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor), OutputParam("timesteps", type_hint=torch.Tensor)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        config, vae = components.transformer.config, components.vae
        space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
        height = block.height or config.sample_size[1] * space
        width = block.width or config.sample_size[2] * space
        check_size(height, width, space * config.patch_size)
        check_range("num_inference_steps", block.num_inference_steps, 1, 1000, whole=True)
        if len(chunk_starts(block.num_frames, time)) > 1:
            raise WaltError(f"num_frames={block.num_frames} takes several chunks: use WaltPipeline for long videos")
        shape = (config.in_channels, latent_frames(block.num_frames, time), height // space, width // space)
        device = components._execution_device
        components.scheduler.set_timesteps(block.num_inference_steps, device=device)
        block.timesteps = components.scheduler.timesteps
        seeds = sample_seeds(block.generator, len(block.prompt_embeds))
        if block.latents is None:
            block.latents = seeded_noise(seeds, 0, START_NOISE, shape, device)
        elif tuple(block.latents.shape) != (len(seeds), *shape):
            raise WaltError(f"latents must have the shape {(len(seeds), *shape)}, got {tuple(block.latents.shape)}")
        block.latents = block.latents.to(device, torch.float32) * components.scheduler.init_noise_sigma
        self.set_block_state(state, block)
        return components, state


class WaltLoopDenoiser(ModularPipelineBlocks):
    """One prediction: a forward for every batch that the guider asks for."""

    model_name = "walt"

    @property
    def description(self) -> str:
        return "Predicts v of the latents with the guider"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [_TRANSFORMER, _SCHEDULER, _GUIDER]

    @property
    def inputs(self) -> list[InputParam]:
        names = [name for pair in _TEXT.values() for name in pair]
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("timesteps", required=True, type_hint=torch.Tensor),
            *(InputParam(name, required=not name.startswith("neg"), type_hint=torch.Tensor) for name in names),
            InputParam("attention_kwargs", description="passed on to the transformer"),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, block: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        transformer, guider, x0 = components.transformer, components.guider, block.estimate
        dtype, steps = transformer.dtype, len(block.timesteps)
        block.model_input = components.scheduler.scale_model_input(block.latents, t)
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        branches = guider.prepare_inputs_from_block_state(block, _TEXT)
        for branch in branches:
            given = {name: getattr(branch, name) for name in _TEXT}
            given["encoder_hidden_states"] = given["encoder_hidden_states"].to(dtype)
            if transformer.config.self_conditioning:
                given["self_conditioning"] = None if x0 is None else x0.to(dtype)
            guider.prepare_models(transformer)
            name = str(getattr(branch, guider._identifier_key))
            with transformer.cache_context(name, step_index=i, num_inference_steps=steps, timestep=t):
                branch.noise_pred = transformer(
                    block.model_input.to(dtype),
                    t.expand(len(block.latents)),
                    attention_kwargs=block.attention_kwargs,
                    return_dict=False,
                    **given,
                )[0].float()
            guider.cleanup_models(transformer)
        block.noise_pred = guider(branches)[0]
        return components, block


class WaltLoopAfterDenoiser(ModularPipelineBlocks):
    """One step of the scheduler, and the estimate of the clean latents for self-conditioning."""

    model_name = "walt"

    @property
    def description(self) -> str:
        return "Takes a step of the scheduler"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [_SCHEDULER]

    @torch.no_grad()
    def __call__(self, components: Any, block: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        scheduler = components.scheduler
        block.estimate = x0_from_velocity(scheduler, block.noise_pred, block.model_input, t.round().long())
        block.latents = scheduler.step(block.noise_pred, t, block.latents, return_dict=False)[0]
        return components, block


class WaltDenoiseStep(LoopSequentialPipelineBlocks):
    """The denoising loop."""

    model_name = "walt"
    block_classes = [WaltLoopDenoiser, WaltLoopAfterDenoiser]
    block_names = ["denoiser", "after_denoiser"]

    @property
    def description(self) -> str:
        return "Denoises the latents over `timesteps`"

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return [_TRANSFORMER]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("timesteps", required=True, type_hint=torch.Tensor)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        if components.transformer.is_cache_enabled:
            HookRegistry.check_if_exists_or_initialize(components.transformer).reset_stateful_hooks(recurse=True)
        block.estimate = None
        with self.progress_bar(total=len(block.timesteps)) as bar:
            for i, t in enumerate(block.timesteps):
                components, block = self.loop_step(components, block, i=i, t=t)
                bar.update()
        self.set_block_state(state, block)
        return components, state


class WaltDecodeStep(ModularPipelineBlocks):
    """Latents to frames."""

    model_name = "walt"

    @property
    def description(self) -> str:
        return "Decodes the latents"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            _VAE,
            ComponentSpec(
                "video_processor",
                VideoProcessor,
                config=FrozenDict({"vae_scale_factor": 8, "do_resize": False}),
                default_creation_method="from_config",
            ),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor),
            InputParam("output_type", default="pil", type_hint=str, description="pil, np, pt or latent"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("videos", description="as `frames` of WaltPipelineOutput")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        if block.output_type == "latent":
            block.videos = block.latents
        else:
            video = decode_latents(components.vae, block.latents)
            block.videos = components.video_processor.postprocess_video(video, output_type=block.output_type)
        self.set_block_state(state, block)
        return components, state


class WaltBlocks(SequentialPipelineBlocks):
    """Text to video, one chunk: `WaltBlocks().init_pipeline(folder)`, or `ModularPipeline.from_pretrained(folder)`."""

    model_name = "walt"
    block_classes = [WaltTextEncoderStep, WaltPrepareLatentsStep, WaltDenoiseStep, WaltDecodeStep]
    block_names = ["text_encoder", "prepare_latents", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Text to video by W.A.L.T.'s base stage, with a guider"

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam("videos")]


class WaltModularPipeline(ModularPipeline, WaltLoraLoaderMixin):
    """The pipeline of walt's blocks; components are loaded by `load_components()`, as in every ModularPipeline."""

    default_blocks_name = "WaltBlocks"

    @property
    def requires_unconditional_embeds(self) -> bool:
        """Whether the guider has a second branch."""
        guider = getattr(self, "guider", None)
        return guider is not None and bool(guider._enabled) and guider.num_conditions > 1
