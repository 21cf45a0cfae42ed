"""WaltSuperResolutionPipeline: a video (or image) becomes twice as high and wide (W.A.L.T. section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from walt.chunking import chunk_count, peek
from walt.conditioning import TEXT_TOKENS, frames_twice, low_res_kind, pieces_twice
from walt.errors import WaltError
from walt.models.transformer_walt import WaltTransformer3DModel
from walt.pipelines.conditions import read_video
from walt.pipelines.pipeline_output import WaltPipelineOutput
from walt.pipelines.sampling import (
    Generators,
    Prompt,
    SamplingPipeline,
    StepCallback,
    check_range,
    denoise_stream,
    sample_seeds,
    stream_without_grad,
)
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt
from walt.tokenizers.text import CompactTextEncoder


class WaltSuperResolutionPipeline(SamplingPipeline):
    """Doubles the height and width of a video with a denoiser that sees its noised low-resolution latents.

    With a temporal stage (`low_res_scale` 1; Imagen Video, arXiv 2210.02303) it doubles the frame rate instead: n frames
    become 2n - 1, of which every second one is new, and the denoiser sees every given frame twice.

    Args:
        vae, transformer, scheduler: as for WaltPipeline; the transformer has `low_res_channels`.
        tokenizer, text_encoder: None to work from `prompt_embeds` (or for a transformer without text).
        noise_level, fidelity: the defaults of the call's arguments.
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
        fidelity: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder
        )
        self.register_to_config(noise_level=noise_level, fidelity=fidelity)
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
        max_sequence_length: int = TEXT_TOKENS,
        fidelity: float | None = None,
    ) -> WaltPipelineOutput | Any:
        """Doubles the size of videos.

        Args:
            video: as diffusers' VideoProcessor takes it: a tensor `(B, T, 3, H, W)` or `(T, 3, H, W)` in [0, 1], an
                array `(B, T, H, W, 3)` or `(T, H, W, 3)` (float in [0, 1] or uint8), a list of PIL images, or a list of
                videos. Of any length and size, with one prompt per video; `stream` takes a long one in pieces.
            noise_level: 0 to 999, the timestep to which the low-resolution latents are noised: more trusts them less.
            fidelity: 0 to 1, how much of the given video's detail the result, made small again, must keep: 1 for a sharp
                video, less for one that was decoded or compressed, 0 for what the stage makes of it. Not of latents, nor
                of a temporal stage.
            prompt, and all the rest: as for WaltPipeline; `num_videos_per_prompt` makes that many versions of each
                video.

        Returns:
            WaltPipelineOutput, or `(frames,)`; frames of twice the height and width, or twice as many less one.

        Raises:
            WaltError: an argument that does not fit.
        """
        noise_level = noise_level if noise_level is not None else int(self.config.noise_level)
        self._check_common(num_inference_steps, num_videos_per_prompt, guidance_rescale, output_type)
        check_range("noise_level", noise_level, 0, 999, whole=True)
        fidelity = self._check_fidelity(fidelity)
        prompts = self._check_prompt(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        small = self.check_inputs(video, prompts)
        num_frames = small.shape[2]
        self._prepare(
            guidance_scale if self.transformer.config.text_dim is not None else 1.0,
            guidance_rescale,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            self._count_steps(num_inference_steps, chunk_count(num_frames, self.vae_scale_factor_temporal)),
        )()
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
        low_res = small.repeat_interleave(num_videos_per_prompt, dim=0)
        with self.progress_bar(total=self._num_timesteps) as self._bar:
            result = torch.cat(
                list(
                    self._enlarge(
                        [low_res],
                        Prompt(embeds, mask, negative_embeds, negative_mask),
                        seeds,
                        num_inference_steps,
                        noise_level,
                        fidelity,
                        decode=output_type != "latent",
                        latents=latents,
                        num_frames=num_frames if latents is not None else None,
                    )
                ),
                dim=2,
            )
        frames = self._output(result, output_type)
        self.maybe_free_model_hooks()
        return WaltPipelineOutput(frames=frames) if return_dict else (frames,)

    @stream_without_grad
    def stream(
        self,
        pieces: Iterable[Tensor],
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        noise_level: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        generator: Generators = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        fidelity: float | None = None,
    ) -> Iterator[Tensor]:
        """Enlarges a video that comes in pieces, chunk by chunk, in memory that does not depend on its length.

        Args:
            pieces: `(B, n, 3, H, W)` in [0, 1] one after another, of any number of frames and any size.
            prompt_embeds, and all the rest: as of a call; guidance needs `negative_prompt_embeds` too.

        Yields:
            `(B, n, 3, scale H, scale W)` in [0, 1]; together the frames of one call with the whole video, so 2n - 1 of a
            temporal stage.

        Raises:
            WaltError: an argument that does not fit, at the call; what does not fit the pieces, with the first of them.
        """
        noise_level = noise_level if noise_level is not None else int(self.config.noise_level)
        self._check_common(num_inference_steps, 1, guidance_rescale, "pt")
        check_range("noise_level", noise_level, 0, 999, whole=True)
        fidelity = self._check_fidelity(fidelity)
        self._check_model()
        prompts = self._check_prompt(
            None,
            None,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
        )
        guidance_scale = guidance_scale if self.transformer.config.text_dim is not None else 1.0
        begin = self._prepare(  # how many steps there are is not known beforehand
            guidance_scale,
            guidance_rescale,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        prompt = Prompt()
        if self.transformer.config.text_dim is not None:
            if prompt_embeds is None:
                raise WaltError("give the prompt_embeds of the video")
            if negative_prompt_embeds is None and guidance_scale > 1:
                raise WaltError("guidance_scale > 1 needs negative_prompt_embeds (or set guidance_scale=1)")
            embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
                None,
                # Not by the scale, which a callback may raise.
                do_classifier_free_guidance=negative_prompt_embeds is not None,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                prompt_embeds_mask=prompt_embeds_mask,
                negative_prompt_embeds_mask=negative_prompt_embeds_mask,
            )
            prompt = Prompt(embeds, mask, negative_embeds, negative_mask)

        def run() -> Iterator[Tensor]:
            begin()
            first, source = peek(pieces)
            if prompt.embeds is not None and prompts != len(first):
                raise WaltError(f"prompt_embeds of {prompts} prompts for {len(first)} videos: give one per video")
            seeds = sample_seeds(generator, len(first))
            del first
            with self.progress_bar(total=math.inf) as self._bar:
                inputs: Iterator[Tensor] = map(_signed, source)
                if self.temporal:
                    inputs = pieces_twice(inputs)
                made = self._enlarge(inputs, prompt, seeds, num_inference_steps, noise_level, fidelity)
                yield from self._outputs(made)
            self.maybe_free_model_hooks()

        return run()

    def _enlarge(
        self,
        pieces: Iterable[Tensor],
        prompt: Prompt,
        seeds: list[int],
        steps: int,
        noise_level: int,
        fidelity: float,
        decode: bool = True,
        latents: Tensor | None = None,
        num_frames: int | None = None,
    ) -> Iterator[Tensor]:
        """`stream` after its checks. Sides that do not fit latents and patches are filled by their edges, and cut again."""
        config = self.transformer.config
        scale, spatial = int(config.low_res_scale), self.vae_scale_factor_spatial
        multiple = spatial * int(config.patch_size) // math.gcd(scale, int(config.patch_size))
        first, source = peek(pieces)
        height, width = first.shape[-2:]
        del first
        border = [0, -width % multiple, 0, -height % multiple]

        def bordered(piece: Tensor) -> Tensor:
            if tuple(piece.shape[-2:]) != (height, width):
                raise WaltError(
                    f"the video changes its size from {height}x{width} to {piece.shape[-2]}x{piece.shape[-1]}"
                )
            if not any(border):
                return piece
            flat = piece.transpose(1, 2).flatten(0, 1)
            return F.pad(flat, border, mode="replicate").unflatten(0, (len(piece), -1)).transpose(1, 2)

        def cut(frames: Tensor) -> Tensor:
            return frames[..., : height * scale, : width * scale]

        stream = denoise_stream(
            self,
            self.transformer,
            prompt,
            seeds=seeds,
            num_frames=num_frames,
            size=((height + border[3]) // spatial * scale, (width + border[1]) // spatial * scale),
            steps=steps,
            decode=decode,
            latents=latents,
            low_res_video=map(bordered, source),
            noise_level=noise_level,
            fidelity=fidelity,
        )
        yield from (map(cut, stream) if decode else stream)

    def _check_fidelity(self, fidelity: float | None) -> float:
        if self.temporal:
            if fidelity:
                raise WaltError(
                    f"fidelity is for stages that enlarge; this one doubles the frame rate, got {fidelity!r}"
                )
            return 0.0
        fidelity = float(self.config.fidelity) if fidelity is None else fidelity
        check_range("fidelity", fidelity, 0, 1)
        return fidelity

    def _check_model(self) -> None:
        config = self.transformer.config
        if config.low_res_channels is None:
            raise WaltError(
                "this transformer is no super-resolution stage (low_res_channels is None): use WaltPipeline"
            )
        if config.num_classes is not None:
            raise WaltError("WaltSuperResolutionPipeline does not take class-conditional transformers")

    def check_inputs(self, video: Any, prompts: int | None) -> Tensor:
        """The video as `(B, 3, T, H, W)` float32 in [-1, 1]; a WaltError when it or the prompts do not fit."""
        config = self.transformer.config
        self._check_model()
        if video is None:
            raise WaltError("give a video to enlarge")
        small = read_video(video)
        if self.temporal:
            small = frames_twice(small)
        if chunk_count(small.shape[2], self.vae_scale_factor_temporal) > 1 and not config.frame_conditioning:
            raise WaltError(
                f"a video of {small.shape[2]} frames needs a transformer with frame_conditioning; this one enlarges up to "
                f"{1 + 4 * self.vae_scale_factor_temporal}"
            )
        if config.text_dim is None and prompts is not None:
            raise WaltError("this transformer takes no text: leave the prompt out")
        if config.text_dim is not None and prompts is None:
            raise WaltError("give the prompt (or prompt_embeds) of the video")
        if prompts is not None and prompts != len(small):
            raise WaltError(f"{prompts} prompts for {len(small)} videos: give one per video")
        return small

    @property
    def temporal(self) -> bool:
        """Whether the transformer doubles the frame rate, and not the size."""
        return low_res_kind(self.transformer.config) == "time"


def _signed(piece: Tensor) -> Tensor:
    """`(B, n, 3, H, W)` in [0, 1] to `(B, 3, n, H, W)` in [-1, 1]."""
    return piece.transpose(1, 2) * 2 - 1
