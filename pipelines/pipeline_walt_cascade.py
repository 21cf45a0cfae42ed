"""WaltCascadePipeline: base and both super-resolution stages in one folder, a prompt becomes a large video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.chunking import chunk_count, chunk_length, peek, windows
from walt.conditioning import TEXT_TOKENS, low_res_kind
from walt.diffusion import GuidanceOptions, check_part
from walt.errors import WaltError
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.conditions import read_video
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
    stream_without_grad,
)
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.text import CompactTextEncoder

TEMPORAL = -1  # the place of the temporal stage, among places in `transformers`


class WaltCascadePipeline(SamplingPipeline):
    """The three stages of W.A.L.T. text-to-video: the frames of each are the low-resolution video of the next.

    Args:
        tokenizer, text_encoder, vae, scheduler: shared by the stages.
        transformer: the base denoiser.
        transformer_2, transformer_3: the super-resolution denoisers, None where there are fewer stages.
        temporal_super_resolution: the denoiser that doubles the frame rate, right after the base; None where there is none.
        base_steps, super_resolution_steps: default inference steps.
        base_guidance_scale, super_resolution_guidance_scale: default guidance.
        noise_level: default noise on the low-resolution latents (a timestep).
        fidelity: default of how closely a super-resolution stage keeps to the frames it enlarges, from 0 to 1.
        base_guidance_start, base_guidance_stop: shares of the base's way from noise to clean between which it is guided by
            default; others are `set_guidance(start=..., stop=...)`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->temporal_super_resolution->transformer_2->transformer_3->vae"
    _optional_components = ["transformer_2", "transformer_3", "temporal_super_resolution"]
    _lora_loadable_modules = ["transformer", "transformer_2", "transformer_3", "temporal_super_resolution"]

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
        temporal_super_resolution: WaltTransformer3DModel | None = None,
        fidelity: float = 0.0,
        base_guidance_start: float = 0.0,
        base_guidance_stop: float = 1.0,
    ) -> None:
        super().__init__()
        check_part(base_guidance_start, base_guidance_stop, "base_guidance_start and base_guidance_stop must lie")
        if temporal_super_resolution is not None and low_res_kind(temporal_super_resolution.config) != "time":
            raise WaltError("temporal_super_resolution needs a transformer with low_res_channels and low_res_scale=1")
        if transformer is not None and low_res_kind(transformer.config) is not None:
            raise WaltError("transformer must be a base, without low_res_channels; this one enlarges what a base made")
        for name, model in (("transformer_2", transformer_2), ("transformer_3", transformer_3)):
            if model is not None and low_res_kind(model.config) != "space":
                raise WaltError(
                    f"{name} needs a super-resolution transformer, with low_res_channels and low_res_scale=2"
                )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            transformer_2=transformer_2,
            transformer_3=transformer_3,
            scheduler=scheduler,
            temporal_super_resolution=temporal_super_resolution,
        )
        self.register_to_config(
            base_steps=base_steps,
            super_resolution_steps=super_resolution_steps,
            base_guidance_scale=base_guidance_scale,
            super_resolution_guidance_scale=super_resolution_guidance_scale,
            noise_level=noise_level,
            fidelity=fidelity,
            base_guidance_start=base_guidance_start,
            base_guidance_stop=base_guidance_stop,
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
        """1, 2 or 3 while that stage runs; 0 while the frame rate is doubled, and outside a call."""
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
        max_sequence_length: int = TEXT_TOKENS,
        double_frame_rate: bool = False,
        fidelity: float | list[float] | tuple[float, ...] | None = None,
    ) -> WaltPipelineOutput | Any:
        """Generates videos with the first `stages` stages.

        Args:
            height, width: pixels of the last stage that runs; its base size times 2 per further stage by default.
            num_inference_steps, guidance_scale: one number for every stage, or one per stage (of the temporal one the
                default then); from the config by default.
            noise_level, fidelity: one number, or one per super-resolution stage (WaltSuperResolutionPipeline says what of);
                likewise.
            stages: how many stages to run, all by default.
            latents: start noise of the base stage.
            double_frame_rate: whether `temporal_super_resolution` makes 2 `num_frames` - 1 frames of the base's, so 16 per
                second; the other stages then enlarge those.
            prompt, and all the rest: as for WaltPipeline. Callbacks count the steps of all stages through
                (`num_timesteps` in all); `current_stage` tells which one runs.

        Returns:
            WaltPipelineOutput, or `(frames,)`, of the last stage that runs.

        Raises:
            WaltError: an argument that does not fit.
        """
        plan = self._plan(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_scale,
            guidance_rescale,
            noise_level,
            stages,
            num_videos_per_prompt,
            generator,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
            double_frame_rate,
            fidelity,
        )
        plan.begin()
        frames: Any = None
        for place, i in enumerate(plan.order):
            last = place + 1 == len(plan.order)
            self._current_stage = i + 1
            if place and plan.scales[i] != plan.scales[plan.order[place - 1]]:
                self._guidance_scale = plan.scales[i]
            stage = self._stage(i)
            call = {
                **self._told(plan, i),
                "guidance_scale": self._guidance_scale,
                "output_type": output_type if last else "pt",
                "return_dict": False,
                "callback_on_step_end": self._stage_callback([stage], 0, i, callback_on_step_end),
                "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            }
            if i == 0:
                call |= {"height": plan.base[0], "width": plan.base[1], "num_frames": num_frames, "latents": latents}
            else:
                call |= {"video": frames}
            frames = stage(**call)[0]
            if self.interrupt:
                if not last:
                    frames = self._early_output(frames, output_type)
                break
        self._current_stage = 0
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return WaltPipelineOutput(frames=frames) if return_dict else (frames,)

    @stream_without_grad
    def stream(
        self,
        prompt: str | list[str] | None = None,
        num_frames: int = 485,
        context_guidance_scale: float = 1.0,
        context_noise_level: int = 0,
        anchor_every: int = 0,
        **call: Any,
    ) -> Iterator[Tensor]:
        """Generates a long video chunk by chunk through all stages, in memory that does not depend on its length.

        Args:
            prompt, num_frames: as of a call; 485 frames are a minute at 8 frames per second.
            context_guidance_scale, context_noise_level, anchor_every: as for WaltPipeline, of the base stage.
            call: any other argument of a call but `latents`, `output_type` and `return_dict`.

        Yields:
            `(B, n, 3, H, W)` in [0, 1] of the last stage; together the frames of a call with the same arguments. A
            callback that sets `_interrupt` ends the stream with the chunk that runs.

        Raises:
            WaltError: an argument that does not fit, at the call.
        """
        plan = self._plan(prompt, num_frames=num_frames, output_type="pt", **call)
        stages: list[Any] = [self._stage(i) for i in plan.order]
        callback = call.get("callback_on_step_end")
        frames: Iterator[Tensor] | None = None
        for place, (i, stage) in enumerate(zip(plan.order, stages, strict=True)):
            told = {
                **self._told(plan, i),
                "guidance_scale": plan.scales[i],
                "callback_on_step_end": self._stage_callback(stages, place, i, callback),
                "callback_on_step_end_tensor_inputs": call.get("callback_on_step_end_tensor_inputs", ["latents"]),
            }
            if frames is None:
                frames = stage.stream(
                    num_frames=num_frames,
                    height=plan.base[0],
                    width=plan.base[1],
                    context_guidance_scale=context_guidance_scale,
                    context_noise_level=context_noise_level,
                    anchor_every=anchor_every,
                    **told,
                )
            else:
                frames = stage.stream(frames, **told)
        assert frames is not None
        return self._run(plan.begin, frames)

    def _run(self, begin: Callable[[], None], frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Begins a stream, whose frames are those of its last stage's."""
        begin()
        yield from frames
        self._current_stage = 0
        self.maybe_free_model_hooks()

    def upscale(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        scale: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **call: Any,
    ) -> WaltPipelineOutput | Any:
        """Enlarges videos of any length and size through the super-resolution stages.

        There are no tiles and so no seams: every stage works on whole frames with attention in windows, and later chunks
        of a long video see the frames before.

        Args:
            video: as WaltSuperResolutionPipeline takes it.
            prompt, scale, call: as for `upscale_stream`.
            output_type: "pil", "np" or "pt".
        """
        if output_type not in ("pil", "np", "pt"):
            raise WaltError(f"output_type must be one of pil, np, pt here, got {output_type!r}")
        frames = torch.cat(list(self.upscale_stream(video, prompt, scale, **call)), dim=1)
        result = self._output(frames.transpose(1, 2) * 2 - 1, output_type)
        return WaltPipelineOutput(frames=result) if return_dict else (result,)

    @stream_without_grad
    def upscale_stream(
        self,
        video: Any,
        prompt: str | list[str] | None = None,
        scale: int | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        noise_level: int | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        max_sequence_length: int = TEXT_TOKENS,
        fidelity: float = 1.0,
    ) -> Iterator[Tensor]:
        """Enlarges a video chunk by chunk, in memory that does not depend on its length.

        Args:
            video: as WaltSuperResolutionPipeline takes it, or an iterator of its pieces `(B, n, 3, H, W)` in [0, 1].
            prompt: what it shows, for stages that take text.
            scale: 2, 4, ...; by default what leads from the video's size to about the model's own. The first stage is
                the one whose own input is nearest to the video in size; the last one goes on where more is asked for.
            fidelity: as of WaltSuperResolutionPipeline; unlike a generated video the given one is kept to in full.
            num_inference_steps, and all the rest: as of a call, the same for all stages.

        Yields:
            `(B, n, 3, scale H, scale W)` in [0, 1].

        Raises:
            WaltError: an argument that does not fit, at the call, which reads the first piece.
        """
        models = self.transformers[1:]
        if not models:
            raise WaltError("this model has no super-resolution stage: a cascade of two or three stages enlarges")
        whole = None if isinstance(video, Iterator) else read_video(video).transpose(1, 2) / 2 + 0.5
        whole_frames = 0 if whole is None else whole.shape[1]
        chunks = chunk_count(whole_frames, self.vae_scale_factor_temporal) if whole_frames else 0
        first, pieces = peek(video if whole is None else [whole])
        del whole
        order = self._enlargers(first.shape[-2], first.shape[-1], scale)
        if whole_frames:
            self._check_length(order, whole_frames)
        steps = self.config.super_resolution_steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.super_resolution_guidance_scale if guidance_scale is None else guidance_scale
        level = self.config.noise_level if noise_level is None else noise_level
        self._check_common(steps, 1, guidance_rescale, "pt")
        texts = any(model.config.text_dim is not None for model in models)
        prompts = self._check_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        if texts and prompts is None:
            raise WaltError("the super-resolution stages of this model take text: give the prompt of the video")
        if prompts is not None and prompts != len(first):
            raise WaltError(f"{prompts} prompts for {len(first)} videos: give one per video")
        total = self._count_steps(steps, chunks) * len(order)
        begin = self._prepare(guidance, guidance_rescale, attention_kwargs, callback_on_step_end, ["latents"], total)
        states: Any = (None, None, None, None)
        if texts:
            states = self.encode_prompt(
                prompt,
                negative_prompt,
                guidance > 1,
                1,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_embeds_mask,
                negative_prompt_embeds_mask,
                max_sequence_length,
            )
        names = ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds_mask")
        sources = [torch.Generator().manual_seed(seed) for seed in sample_seeds(generator, len(first))]
        stages = [self._stage(i) for i in order]
        del first
        frames: Iterator[Tensor] = pieces
        for place, (i, stage) in enumerate(zip(order, stages, strict=True)):
            frames = stage.stream(
                frames,
                **dict(zip(names, states, strict=True)),
                noise_level=level,
                fidelity=fidelity,
                num_inference_steps=steps,
                guidance_scale=guidance,
                guidance_rescale=guidance_rescale,
                generator=sources,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=self._stage_callback(stages, place, i, callback_on_step_end),
            )
        return self._run(begin, frames)

    def _check_length(self, order: list[int], num_frames: int) -> None:
        """A WaltError where one of these stages cannot take so many frames: it is never given those of the chunk before."""
        ratio = self.vae_scale_factor_temporal
        if chunk_count(num_frames, ratio) > 1 and not all(self._model(i).config.frame_conditioning for i in order):
            raise WaltError(
                f"a video of {num_frames} frames needs stages with frame_conditioning; one of these has none and takes up to "
                f"{chunk_length(num_frames, ratio)}"
            )

    def _enlargers(self, height: int, width: int, scale: int | None) -> list[int]:
        """Places in `transformers` of the stages that enlarge a video of this size, one after another."""
        last = len(self.transformers) - 1
        nominal = [math.log2(h * w) / 2 for h, w in (self.default_size(stage) for stage in range(1, last + 1))]
        start = min(range(last), key=lambda i: abs(nominal[i] - math.log2(height * width) / 2)) + 1
        count = last - start + 1 if scale is None else round(math.log2(scale)) if scale > 0 else 0
        if count < 1 or (scale is not None and (isinstance(scale, bool) or 2**count != scale)):
            raise WaltError(f"scale must be 2, 4 or a higher power of 2, got {scale!r}")
        return [min(start + i, last) for i in range(count)]

    def _plan(
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
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = TEXT_TOKENS,
        double_frame_rate: bool = False,
        fidelity: float | list[float] | tuple[float, ...] | None = None,
    ) -> _Plan:
        """Checks the arguments of a call and encodes its prompts."""
        stages, height, width = self.check_inputs(stages, height, width, num_frames)
        if double_frame_rate and self.temporal_super_resolution is None:
            raise WaltError("this model has no temporal super-resolution stage: it makes 8 frames per second")
        steps = _per_stage("num_inference_steps", num_inference_steps, self.default_steps(stages))
        base, later = self.config.base_guidance_scale, self.config.super_resolution_guidance_scale
        scales = _per_stage("guidance_scale", guidance_scale, [base] + [later] * (stages - 1))
        levels = _per_stage("noise_level", noise_level, [self.config.noise_level] * (stages - 1))
        fidelities = _per_stage("fidelity", fidelity, [self.config.fidelity] * (stages - 1))
        for value in fidelities:
            check_range("fidelity", value, 0, 1)
        order = list(range(stages))
        if double_frame_rate and num_frames > 1:
            order.insert(1, TEMPORAL)
            # Numbers per stage do not speak of this one.
            for values, given, default in (
                (steps, num_inference_steps, self.config.super_resolution_steps),
                (scales, guidance_scale, later),
                (levels, noise_level, self.config.noise_level),
            ):
                values.append(default if given is None or isinstance(given, list | tuple) else given)
            self._check_length(order[1:], 2 * num_frames - 1)
        for level in levels:
            check_range("noise_level", level, 0, 999, whole=True)
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
        doubled = TEMPORAL in order
        begin = self._prepare(
            scales[0],
            guidance_rescale,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            sum(
                self._count_steps(
                    steps[i],
                    chunk_count(2 * num_frames - 1 if doubled and i else num_frames, self.vae_scale_factor_temporal),
                )
                for i in order
            ),
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
        down = 2 ** (stages - 1)
        shared: dict[str, Any] = {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative_embeds,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds_mask": negative_mask,
            "generator": sources,
            "guidance_rescale": guidance_rescale,
            "attention_kwargs": attention_kwargs,
        }
        return _Plan(begin, order, (height // down, width // down), steps, scales, levels, fidelities, shared)

    @property
    def base_guidance_options(self) -> GuidanceOptions:
        """`guidance_options` as the base follows them: where they name no part of the steps, in the model's.

        For a pipeline of the same base: `WaltConditionPipeline(...).set_guidance(cascade.base_guidance_options)`.
        """
        return self.guidance_options.within(self.config.base_guidance_start, self.config.base_guidance_stop)

    def _stage(self, i: int) -> Any:
        """The pipeline of one stage, 0 for the base, with this pipeline's parts."""
        model = self._model(i)
        if i == 0:
            stage: SamplingPipeline = WaltPipeline(None, None, self.vae, model, self.scheduler)
        else:
            stage = WaltSuperResolutionPipeline(self.vae, model, self.scheduler)
        stage.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        stage.set_guidance(self.guidance_options if i else self.base_guidance_options)
        return stage

    def _model(self, i: int) -> Any:
        return self.temporal_super_resolution if i == TEMPORAL else self.transformers[i]

    def _told(self, plan: _Plan, i: int) -> dict[str, Any]:
        """Arguments of stage `i` that its call and its stream share."""
        told = {**plan.shared, "num_inference_steps": plan.steps[i]}
        if i:
            told["noise_level"] = plan.levels[TEMPORAL if i == TEMPORAL else i - 1]
            if i != TEMPORAL:
                told["fidelity"] = plan.fidelities[i - 1]
            if self._model(i).config.text_dim is None:
                told |= dict.fromkeys(key for key in told if "prompt_embeds" in key)
        return told

    def _early_output(self, frames: Tensor, output_type: str) -> Any:
        """The frames `(B, T, 3, H, W)` in [0, 1] of the stage that was interrupted, as `output_type` says."""
        video = frames.transpose(1, 2) * 2 - 1
        if output_type != "latent":
            return self._output(video, output_type)
        chunks = [chunk for _, chunk, _, _ in windows([video], self.vae_scale_factor_temporal)]
        return torch.cat([encode_video(self.vae, chunk) for chunk in chunks], dim=2)

    def _stage_callback(
        self, running: list[Any], place: int, number: int, callback: StepCallback | None
    ) -> StepCallback:
        """Passes a stage's steps on with this pipeline in its place, and the state that a callback may change back.

        Args:
            running: the stages that run, of which this is the one at `place`.
            number: its place in `transformers`, or TEMPORAL.
        """
        stage, worded = running[place], self._model(number).config.text_dim is not None

        def step(_: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self._current_timestep, self._current_stage = t, number + 1
            if worded:  # one without text has no guidance, and nothing to say about that of later stages
                self._guidance_scale = stage._guidance_scale
            result = callback(self, self._step_index, t, tensors) if callback is not None else None
            self._step_index += 1
            stage._guidance_scale = self._guidance_scale
            for one in running:
                one._interrupt = self._interrupt
            return result or {}

        return step


@dataclass(frozen=True)
class _Plan:
    """A call after its checks: per stage its steps, guidance and (from the second on) noise level and fidelity.

    Those of the temporal stage, which has no fidelity, are the last ones, where it is among them.
    """

    begin: Callable[[], None]  # sets the state of the call
    order: list[int]  # places in `transformers`, or TEMPORAL
    base: tuple[int, int]  # height and width of the first stage
    steps: list[int]
    scales: list[float]
    levels: list[int]
    fidelities: list[float]
    shared: dict[str, Any]


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
