"""What each kind of job adds to the loop: its model, its batches and its loss."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from walt.attention import RelativeBias
from walt.conditioning import (
    draw_given_frames,
    drop,
    encode_text,
    frame_mask,
    frames_twice,
    half_rate,
    low_res_kind,
    partial_captions,
    random_mask,
)
from walt.data.clips import Clips, Draw, stack_equal
from walt.data.latents import LatentShards
from walt.data.packing import Packer, draw_drop_rate, draw_kept, draw_size, fill_budget
from walt.data.precompute import MediaLatents
from walt.data.scenes import Scenes
from walt.data.stage import Stage
from walt.diffusion import coefficients, draw_timesteps, make_scheduler, variance_bound
from walt.errors import WaltError, suggest
from walt.fidelity import project_frames
from walt.latents import Grid, by_runs, denormalize, normalize, runs, runs_of, stacked, to_device
from walt.models.transformer_walt import WaltPositionEmbedding
from walt.training.job import DenoiserJob, LoraJob, MediaJob, Shape, TokenizerJob
from walt.training.loop import Loss, Objective, Part
from walt.training.plan import ForwardCounter

HELD_OUT_SEED = 500_009  # added to a recipe's data seed: its training scenes never reach that far
NOISE_BINS = 5  # of the noise levels, in the held-out loss


def build_model(cls: type[Any], config: dict[str, Any]) -> Any:
    """`cls(**config)`, ready to be trained, with unknown names answered by the nearest known one."""
    import inspect

    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in config:
        if name not in known:
            raise WaltError(f"model: {cls.__name__} has no {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    try:
        model = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items()})
        if hasattr(model, "close_branches"):
            model.close_branches()
    except WaltError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise WaltError(
            f"model: {cls.__name__} cannot be built of these values: {error or type(error).__name__}"
        ) from error
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


class TokenizerObjective(Objective):
    """Reconstruction + VGG perceptual loss on mixed image and clip cuts, and the discriminator's if the recipe has one.

    Continuous latents: `latent_penalty` and `latent_noise` stand in for a KL term, they keep the latents' scale and make
    the decoder tolerant of a denoiser's errors; the latents' statistics are recorded at the end. Codes: the quantizer's
    losses with the recipe's weights. Segmentation models are given class maps, and the cross-entropy.

    Args:
        job: the recipe.
        autoencoder: AutoencoderKLWalt or WaltVQModel.
        perceptual: `walt.tokenizers.losses.PerceptualLoss` or None.
        adversary: `walt.tokenizers.losses.AdversarialLoss` for a recipe with `loss.adversarial`, else None.
        denoised: `walt.training.denoised.DenoisedLatents` for a recipe with `denoised`, else None.
    """

    model: Any

    def __init__(
        self,
        job: TokenizerJob,
        autoencoder: type[Any],
        perceptual: nn.Module | None,
        adversary: Any = None,
        denoised: Any = None,
    ) -> None:
        self.job = job
        self.scenes = None if isinstance(job.data, MediaJob) else Scenes(job.data)
        self.drawing = Drawing(self.scenes, job.data)
        self.unseen: Scenes | None = None
        torch.manual_seed(job.run.seed)
        self.model = build_model(autoencoder, job.model)
        self.segmentation = bool(self.model.config.get("segmentation", False))
        self.quantizer = getattr(self.model, "quantize", None)
        self.denoised = denoised
        self._check(job, adversary)
        self.clips = (
            Clips(
                job.data,
                job.shapes,
                multiple=self.model.spatial_compression_ratio,
                cost=lambda frames, height, width: frames * height * width,
                budget=job.batch_pixels,
                captions=False,
                report=Path(job.run.output) / "skipped.jsonl",
                packs=job.run.packs,
                workers=job.run.workers,
            )
            if isinstance(job.data, MediaJob)
            else None
        )
        if self.clips is not None and job.run.heldout_every:
            self.clips.check_held_out()
        if job.init is not None:
            self._start_from(job.init)
            if self.denoised is not None:
                self.denoised.check(self.model, job.shapes)
        elif self.model.config.block_shortcut:
            self.model.fit_block_shortcut(self._batches())
        if job.hold_keyframes:
            self._hold_keyframes(job)
        if job.freeze_encoder:
            self.model.encoder.requires_grad_(False)
            if self.quantizer is not None:
                self.quantizer.requires_grad_(False)
                self.quantizer.frozen = True
        self.perceptual, self.adversary = perceptual, adversary
        self.counter = ForwardCounter(autoencoder, dict(self.model.config))
        self.device = torch.device("cpu")

    def _check(self, job: TokenizerJob, adversary: Any) -> None:
        if job.freeze_encoder and job.init is None and (self.quantizer is None or not self.model.config.block_shortcut):
            raise WaltError(
                "freeze_encoder: an untrained encoder cannot be frozen; give init=FOLDER (codes may be fitted instead: "
                "model.block_shortcut=true)"
            )
        shortcut = self.model.config.block_shortcut
        fixed = job.freeze_encoder or job.inflate is not None
        if job.hold_keyframes and (self.quantizer is not None or not shortcut or fixed):
            raise WaltError(
                "hold_keyframes: needs model.block_shortcut=true, no quantizer, no inflate, and an encoder that learns "
                "(freeze_encoder=false)"
            )
        if (self.denoised is None) != (job.denoised is None):
            raise WaltError("denoised: the objective needs its denoiser with it, and takes none without")
        if self.denoised is not None and (self.quantizer is not None or not job.freeze_encoder):
            raise WaltError(
                "denoised: a denoiser knows the latents that are there: set freeze_encoder=true, no quantizer"
            )
        if self.quantizer is not None and job.loss.latent_noise:
            raise WaltError(f"loss.latent_noise: codes take no noise, got {job.loss.latent_noise}; set it to 0")
        if job.data.latents is not None:
            raise WaltError("data.latents: a tokenizer is trained on pixels; leave it out")
        if self.segmentation and self.drawing.device_draws:
            raise WaltError('data.draw: class maps are drawn on the host; set it to "host"')
        if (adversary is None) != (job.loss.adversarial is None):
            raise WaltError("loss.adversarial: the objective needs an adversary with it, and takes none without")
        if self.segmentation:
            if job.loss.perceptual_weights is not None or adversary is not None:
                raise WaltError("loss: class maps have neither a perceptual nor an adversarial loss; leave them out")
            if self.scenes is None:
                raise WaltError("data: class maps are drawn by the emoji theatre alone; user media have none")
            classes = 1 + len(self.scenes.theatre.subjects)
            if self.model.config.in_channels != classes:
                given = self.model.config.in_channels
                raise WaltError(f"model.in_channels: background and subjects are {classes} classes, got {given}")

    def _start_from(self, folder: str) -> None:
        """Takes over a trained tokenizer, but for an encoder or decoder of another kind.

        Such a one starts silent beside its shortcut. A decoder's shortcut is fitted anew if it differs.
        """
        trained = load_folder(type(self.model), folder, "init")
        ours, theirs = dict(self.model.config), dict(trained.config)
        overlap = ours.get("shortcut_overlap", 0)
        rebuilt = [
            half for half in ("encoder", "decoder") if ours.get(f"{half}_mixers", 0) != theirs.get(f"{half}_mixers", 0)
        ]
        refit = theirs.get("shortcut_overlap", 0) != overlap
        if self.job.freeze_encoder and "encoder" in rebuilt:
            raise WaltError(f"freeze_encoder: the encoder of {folder!r} is of another kind, ours would stay untrained")

        def ours_alone(name: str) -> bool:
            half, part, *_ = name.split(".")
            return half == "decoder" and refit if part == "shortcut" else half in rebuilt

        weights = {name: value for name, value in trained.state_dict().items() if not ours_alone(name)}
        kept = {name: value for name, value in self.model.state_dict().items() if ours_alone(name)}
        copy_weights(self.model, weights | kept, folder)
        if self.quantizer is None:
            self.model.register_to_config(
                latents_mean=trained.config.latents_mean, latents_std=trained.config.latents_std
            )
        for half in rebuilt:
            if ours.get("block_shortcut"):
                getattr(self.model, half).silence()
        if refit and overlap:
            generator = torch.Generator().manual_seed(self.job.run.seed)
            self.model.fit_decoder_shortcut(self._batches(), self.job.loss.latent_noise, generator)

    def _hold_keyframes(self, job: TokenizerJob) -> None:
        model = self.model
        # A mixing decoder decodes a first frame as before.
        parts = (model.decoder.last, model.decoder.shortcut)
        before = [{k: v.clone() for k, v in part.state_dict().items() if k.startswith("first.")} for part in parts]
        model.hold_keyframes()
        if model.config.shortcut_overlap:
            generator = torch.Generator().manual_seed(job.run.seed)
            model.fit_decoder_shortcut(self._batches(), job.loss.latent_noise, generator)
        for part, weights in zip(parts, before, strict=True):
            part.load_state_dict(part.state_dict() | weights)

    def to(self, device: torch.device) -> None:
        self.device = device
        self.drawing.to(device)
        if self.perceptual is not None:
            self.perceptual.to(device)
        if self.denoised is not None:
            self.denoised.to(device)

    def _batches(self) -> Iterator[Tensor]:
        """Groups of the first steps, drawn: what the shortcuts are fitted to."""
        for step in range(self.job.shortcut_batches):
            yield from (self.drawing.group(group) for group in self.batch(step, 0))

    def batch(self, step: int, rank: int) -> list[Any]:
        """Groups of equal shape, about `batch_pixels` pixels in all.

        Each `(N, 3, T, H, W)` in [-1, 1], class maps int64 `(N, T, H, W)` for a segmentation model, or a list of N layouts
        that the device draws.
        """
        if self.clips is not None:
            return stack_equal(self.clips.pack(step, rank))
        assert self.scenes is not None and not isinstance(self.job.data, MediaJob)
        shapes = self.job.shapes
        rng = np.random.default_rng((self.job.run.seed, step, rank))
        sides = [(s.cut or s.height, s.cut or s.width) for s in shapes]
        pixels = [s.frames * h * w for s, (h, w) in zip(shapes, sides, strict=True)]
        chosen = fill_budget(self.job.batch_pixels, pixels, [s.weight for s in shapes], rng, "batch_pixels")
        groups: dict[tuple[int, ...], list[Any]] = {}
        for index in chosen:
            number = int(rng.integers(self.job.data.scenes))
            video: Any = (
                self.scenes.layout(number, shapes[index]).video
                if self.drawing.device_draws
                else self._draw(self.scenes, number, shapes[index])
            )
            groups.setdefault(tuple(video.shape), []).append(video)
        return [videos if self.drawing.device_draws else torch.stack(videos) for _, videos in sorted(groups.items())]

    def _draw(self, scenes: Scenes, number: int, shape: Shape) -> Tensor:
        if self.segmentation:
            return scenes.sketch(number, shape)
        video = scenes.clip(number, shape).video
        assert isinstance(video, Tensor)
        return video

    def parts(self) -> dict[str, Part]:
        parts = super().parts()
        if self.job.loss.adversarial is not None:
            parts["adversary"] = Part(self.adversary, self.job.loss.adversarial.optimizer)
        return parts

    def losses(
        self, batch: list[Tensor], generator: torch.Generator, shared: torch.Generator, step: int
    ) -> Generator[Loss | None]:
        """The generator's loss, then the discriminator's on the same samples."""
        loss, figures, pairs = self._forward(self.model, batch, generator, step)
        weight = figures.pop("weight")
        yield Loss(loss * weight, weight, figures)
        if self.adversary is not None:
            loss, seen = self.adversary.judge([(video, output.detach()) for output, video in pairs], step)
            yield Loss(loss * weight, weight, seen)

    def loss(
        self, model: nn.Module, batch: list[Tensor], generator: torch.Generator, shared: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        loss, figures, _ = self._forward(model, batch, generator, 0)
        return loss, figures

    def _forward(
        self, model: nn.Module, batch: list[Tensor], generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, float | Tensor], list[tuple[Tensor, Tensor]]]:
        """Loss and figures of the tokenizer, and pairs (output, target) of each group."""
        weights = self.job.loss
        batch = [self.drawing.group(group) for group in batch]
        total = sum(group.numel() for group in batch)
        pixels = total / (1 if self.segmentation else 3)
        samples = sum(len(group) for group in batch)
        loss = torch.zeros((), device=self.device)
        seen: dict[str, float | Tensor] = {"weight": pixels, "pixels": pixels, "samples": samples}
        outputs: list[tuple[Tensor, Tensor]] = []
        if self.quantizer is not None:
            self.quantizer.open = self._open(step)
        for group in batch:
            target = to_device(group, self.device)
            share = target.numel() / total
            output, latent = model(target, noise=self._noise(target, generator), return_dict=False)
            loss = loss + share * weights.reconstruction * self._reconstruction(output.float(), target, share, seen)
            if weights.frame_difference and not self.segmentation and target.shape[2] > 1:
                flicker = (output.float() - target).diff(dim=2).abs().mean()
                _add(seen, "frame_difference", share * flicker.detach())
                loss = loss + share * weights.frame_difference * flicker
            if self.quantizer is None:
                loss = loss + share * weights.latent_penalty * latent.float().square().mean()
            else:
                loss = loss + share * self._quantization(latent, step, share, seen)
            outputs.append((output, target))
        if "mse" in seen:
            seen["psnr"] = -10.0 * torch.log10(torch.as_tensor(seen.pop("mse")) / 4.0)
        if self.perceptual is not None:
            distance = self._perceptual(self.perceptual, outputs, generator)
            loss = loss + weights.perceptual * distance
            seen["lpips"] = distance.detach()
        if weights.adversarial is not None and step >= weights.adversarial.start:
            last = self.model.decoder.last_weight
            fooling, figures = self.adversary.fool([output for output, _ in outputs], loss, last)
            loss = loss + fooling
            seen.update(figures)
        return loss, seen, outputs

    def _reconstruction(self, output: Tensor, target: Tensor, share: float, seen: dict[str, float | Tensor]) -> Tensor:
        """The pixel loss of one group; adds to the figures."""
        if self.segmentation:
            _add(seen, "pixel_accuracy", share * (output.detach().argmax(dim=1) == target).float().mean())
            return F.cross_entropy(output, target)
        difference = output - target
        squared = difference.square().mean()
        _add(seen, "mse", share * squared.detach())
        return difference.abs().mean() if self.job.loss.pixel == "l1" else squared

    def _open(self, step: int) -> float:
        """The share of samples that pass the quantizer unquantized: all, then ever fewer, then none."""
        warm = self.job.loss.quantizer_warmup
        return min(1.0, max(0.0, 2.0 - step / warm)) if warm else 0.0

    def _quantization(self, quantized: Any, step: int, share: float, seen: dict[str, float | Tensor]) -> Tensor:
        """The weighted losses of a quantizer on one group; adds to the figures."""
        weights = self.job.loss
        left = max(0.0, 1.0 - step / weights.entropy_steps) if weights.entropy_steps else 0.0
        scale = {
            "commitment": weights.commitment,
            "codebook": weights.codebook,
            "entropy": weights.entropy * (1.0 + (weights.entropy_start - 1.0) * left),
        }
        loss = torch.zeros((), device=self.device)
        for name, value in quantized.losses.items():
            loss = loss + scale[name] * value
            _add(seen, name, share * value.detach())
        for name, value in quantized.metrics.items():
            _add(seen, name, share * value)
        return loss

    def _perceptual(
        self, network: nn.Module, outputs: list[tuple[Tensor, Tensor]], generator: torch.Generator
    ) -> Tensor:
        seen: list[list[tuple[int, int]]] = [[] for _ in outputs]
        for _ in range(self.job.loss.perceptual_frames):
            # A random frame of a random group: the VGG costs more than the tokenizer.
            group = int(torch.randint(len(outputs), (), generator=generator))
            shape = outputs[group][1].shape
            row, frame = (int(torch.randint(shape[dim], (), generator=generator)) for dim in (0, 2))
            seen[group].append((row, frame))
        distances = [
            network(*(torch.stack([video[row, :, frame] for row, frame in places]) for video in pair))
            for pair, places in zip(outputs, seen, strict=True)
            if places
        ]
        return torch.cat(distances).float().mean()

    def _noise(self, video: Tensor, generator: torch.Generator) -> Tensor | None:
        """What the decoder's latents are off by, in units of each channel's standard deviation; None for nothing."""
        if self.denoised is None and not self.job.loss.latent_noise:
            return None
        b, _, t, h, w = video.shape
        s, r = self.model.spatial_compression_ratio, self.model.temporal_compression_ratio
        shape = (b, self.model.config.latent_channels, 1 + (t - 1) // r, h // s, w // s)
        if self.job.denoised is not None and (h, w) in self.job.denoised.sizes:
            steps = int(torch.randint(self.job.denoised.last + 1, (), generator=generator))
            if steps:
                return self.denoised(self.model, video, normal(shape, generator, self.device), steps)
        if not self.job.loss.latent_noise:
            return None
        # A random strength per sample, up to latent_noise: clean latents must decode sharply too.
        strength = torch.rand((b, 1, 1, 1, 1), generator=generator) * self.job.loss.latent_noise
        return normal(shape, generator, self.device) * to_device(strength, self.device)

    def flops(self, batch: list[Tensor]) -> float | None:
        if self.quantizer is not None:
            return None  # its work depends on values, which a count on the meta device has not
        return sum(len(videos) * self.counter(tuple(videos[0].shape[1:])) for videos in batch)

    @torch.no_grad()
    def heldout(self, model: nn.Module) -> dict[str, float]:
        """PSNR (dB) and mean absolute error of scenes of other seeds, per shape and over all of them.

        Of class maps the pixel accuracy and the cross-entropy.
        """
        found: dict[str, float] = {}
        for place, shape in enumerate(self.job.shapes):
            score, loss = [], []
            for video in self._held_out(place):
                video = video[None].to(self.device)
                output = model(video, return_dict=False)[0].float()
                if self.segmentation:
                    score.append(float((output.argmax(dim=1) == video).float().mean()))
                    loss.append(float(F.cross_entropy(output, video)))
                else:
                    score.append(float((output - video).square().mean()))
                    loss.append(float((output - video).abs().mean()))
            name, mean = f"tokenizer/{_shape_name(shape)}", sum(score) / len(score)
            if self.segmentation:
                found[f"{name}/pixel_accuracy"] = mean
            else:
                found[f"{name}/psnr"] = -10.0 * math.log10(max(mean / 4.0, 1e-12))
            found[f"{name}/loss"] = sum(loss) / len(loss)
        losses = [value for name, value in found.items() if name.endswith("/loss")]
        return {**found, "loss": sum(losses) / len(losses)}

    def _held_out(self, place: int) -> Iterator[Tensor]:
        """Videos of a shape that are never trained on: scenes of other seeds, or the items that the recipe sets aside."""
        data, shape = self.job.data, self.job.shapes[place]
        for number in range(self.job.run.heldout_clips):
            if self.clips is not None:
                yield self.clips.held_out(place, number).video
            else:
                assert not isinstance(data, MediaJob)
                if self.unseen is None:
                    self.unseen = Scenes(data.model_copy(update={"seed": data.seed + HELD_OUT_SEED}))
                yield self._draw(self.unseen, number, shape)

    def export(self, model: nn.Module, folder: Path) -> None:
        if not self.job.freeze_encoder and self.quantizer is None:
            mean, std = self.statistics(model)
            model.register_to_config(latents_mean=mean, latents_std=std)  # type: ignore[operator]
        model.save_pretrained(folder)  # type: ignore[operator]

    @torch.no_grad()
    def statistics(self, model: Any, batches: int = 24) -> tuple[list[float], list[float]]:
        """Per-channel mean and std of the latents of training batches (the same ones every time)."""
        count = torch.zeros(())
        total = torch.zeros(model.config.latent_channels, dtype=torch.float64)
        square = torch.zeros_like(total)
        for step in range(batches):
            for video in map(self.drawing.group, self.batch(step, 0)):
                z = model.encode(video.to(self.device)).latent_dist.mode().double().cpu()
                count = count + z[:, 0].numel()
                total = total + z.sum(dim=(0, 2, 3, 4))
                square = square + z.square().sum(dim=(0, 2, 3, 4))
        mean = total / count
        std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
        return [round(float(v), 6) for v in mean], [round(float(v), 6) for v in std]


def _add(figures: dict[str, float | Tensor], name: str, value: Tensor) -> None:
    figures[name] = figures[name] + value if name in figures else value


# ---------------------------------------------------------------------------------------------------------------------
# Denoiser: base and super-resolution stages


def normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal noise: a CPU draws it from `generator`, an accelerator from a seed that this gives."""
    if device.type == "cpu":
        return torch.randn(tuple(shape), generator=generator)
    own = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return torch.randn(tuple(shape), generator=own, device=device)


class Drawing:
    """Who draws a recipe's scenes: with `data.draw` "device" layouts become pixels here, else nothing is left to do."""

    def __init__(self, scenes: Scenes | None, data: Any) -> None:
        self.theatre = scenes.cast if scenes is not None and data.draw == "device" else None
        self.device = torch.device("cpu")
        self.stage: Stage | None = None

    @property
    def device_draws(self) -> bool:
        return self.theatre is not None

    def to(self, device: torch.device) -> None:
        if self.stage is not None and self.stage.device != device:
            self.stage = None
        self.device = device

    def group(self, group: Any) -> Tensor:
        """`(N, 3, T, H, W)` of clips of one shape: layouts, or pixels already."""
        if isinstance(group, Tensor):
            return group
        assert self.theatre is not None
        if self.stage is None:
            self.stage = Stage(self.theatre, self.device)
        return self.stage.draw(group)


@dataclass(frozen=True)
class Sample:
    """One clip or image of a pack. Pixels `(3, T, H, W)` or raw latents `(8, t, h, w)`, whichever the data gives; of pixels
    that the device draws, their layout.

    `states`: the caption's text states `(S, D)` if they were precomputed.
    """

    video: Any
    low_res_video: Any
    latent: Tensor | None
    low_res: Tensor | None
    caption: str
    start: int
    label: int | None = None  # of a model with num_classes
    states: Tensor | None = None
    kept: Tensor | None = None  # bool (t, h / p, w / p), the tokens that are computed and scored; None: all


def open_clips(job: DenoiserJob, vae: Any, captions: bool, report: Path) -> Clips | None:
    """The clips of a denoiser recipe on a user's media; None for the theatre.

    Args:
        job: the recipe.
        vae: its tokenizer, for the sizes.
        captions: whether the model reads them.
        report: the account's file.
    """
    if not isinstance(job.data, MediaJob):
        return None
    twins = low_res_kind(job.model) == "space"
    space, time = vae.spatial_compression_ratio * job.model.get("patch_size", 1), vae.temporal_compression_ratio
    return Clips(
        job.data,
        job.shapes,
        # The half-size twin must be whole latents too.
        multiple=math.lcm(space, 2 * vae.spatial_compression_ratio) if twins else space,
        cost=lambda frames, height, width: (1 + (frames - 1) // time) * (height // space) * (width // space),
        budget=job.batch_tokens,
        captions=captions or job.model.get("num_classes") is not None,
        low_res=twins,
        report=report,
        packs=job.run.packs,
        workers=job.run.workers,
    )


class DenoiserObjective(Objective):
    """v-prediction on packs of images and clips (W.A.L.T. sections 3.2-3.4, 4.1).

    Each sample has its own timestep, noise, text dropout, given frames and (super-resolution) noise level; all are
    drawn from the step's generator. With the recipe's probability the pack is predicted twice, the second time with
    the first estimate of the clean latents (self-conditioning). With `job.pixels` a super-resolution stage's estimate is
    decoded as well, and scored on its frames.

    Args:
        job: the recipe.
        transformer: class of the denoiser.
        vae: the frozen tokenizer.
        words: the text encoder of a model with text, else None.
        perceptual: `walt.tokenizers.losses.PerceptualLoss` for a recipe with `pixels.perceptual_weights`, else None.
    """

    model: Any
    shardable = True

    def __init__(
        self,
        job: DenoiserJob,
        transformer: type[Any],
        vae: Any,
        words: TextStates | None,
        perceptual: nn.Module | None = None,
    ) -> None:
        self.job = job
        torch.manual_seed(job.run.seed)
        self.model = build_model(transformer, job.model)
        if job.init is not None:
            start_from(self.model, job.init, job.interpolate_positions)
        if job.lora is not None:
            add_lora(self.model, job.lora, job.init)
        config = self.model.config
        if job.diffusion.mask_probability and not config.frame_conditioning:
            raise WaltError(
                "diffusion.mask_probability: a model without frame_conditioning is given nothing; set it to 0"
            )
        if job.interpolate_positions and job.init is None:
            raise WaltError("interpolate_positions: there is nothing to interpolate; give init=FOLDER")
        self.classes = read_classes(job.classes, config.num_classes)
        if low_res_kind(config) == "time" and job.data.latents is not None:
            raise WaltError("data.latents: a temporal stage encodes both frame rates as it trains, it needs pixels")
        if job.pixels is not None:
            if low_res_kind(config) != "space":
                raise WaltError("pixels: for super-resolution stages that enlarge (model.low_res_channels) only")
            if job.data.latents is not None:
                raise WaltError("pixels: frames are scored beside the true ones; leave data.latents out")
            if (perceptual is None) != (job.pixels.perceptual == 0):
                raise WaltError(
                    "pixels.perceptual_weights: the perceptual loss needs them (walt data lpips); without it set "
                    "pixels.perceptual=0"
                )
        self.perceptual = perceptual
        held = job.run.heldout_clips if job.run.heldout_every else 0
        media = isinstance(job.data, MediaJob)
        self.shards = LatentShards(Path(job.data.latents), job, held) if job.data.latents and not media else None
        self.scenes = None if self.shards or isinstance(job.data, MediaJob) else Scenes(job.data)
        self.drawing = Drawing(self.scenes, job.data)
        self.vae = vae.eval().requires_grad_(False)
        if job.diffusion.latent_normalization and self.vae.config.latents_mean is None:
            raise WaltError(f"{job.tokenizer}: the tokenizer has no latents_mean; export it with `walt train`")
        self.scheduler = make_scheduler(job.diffusion.zero_snr)
        self.words = words
        if (words is None) != (config.text_dim is None):
            raise WaltError(
                "text_encoder: a model with text_dim needs text_encoder and text_tokenizer, others take none"
            )
        kind = low_res_kind(config)
        self.super_resolution, self.temporal, self.twins = kind is not None, kind == "time", kind == "space"
        if (job.resolution is not None or job.token_drop is not None) and self.super_resolution:
            raise WaltError("resolution, token_drop: for base stages only, this model takes low-resolution latents")
        if (job.resolution is not None or job.token_drop is not None) and media:
            raise WaltError("resolution, token_drop: for the theatre's scenes; media have sizes of their own")
        if job.resolution is not None:
            if job.data.latents is not None:
                raise WaltError("resolution: needs pixels; precomputed latents (data.latents) have their size")
            if job.resolution.low > job.resolution.high:
                raise WaltError(f"resolution: low {job.resolution.low} is above high {job.resolution.high}")
        space = self.vae.spatial_compression_ratio * config.patch_size
        for shape in job.shapes:
            height, width = (shape.cut or shape.height), (shape.cut or shape.width)
            if height % space or width % space:
                raise WaltError(f"shapes: {height}x{width} is not a multiple of {space} (tokenizer x patch_size)")
        self.space = space
        self.tokens = [t * h * w for t, h, w in map(self._grid, job.shapes)]
        self.clips = open_clips(job, self.vae, words is not None, Path(job.run.output) / "skipped.jsonl")
        if self.clips is not None and job.run.heldout_every:
            self.clips.check_held_out()
        if self.clips is not None and config.num_classes is not None and job.classes is not None:
            for name in self.clips.classes():
                if name not in self.classes:
                    known = suggest(name, self.classes)
                    raise WaltError(f"classes: {job.classes} has no {name!r}{known}, a folder of the sources")
        if self.clips is not None and config.num_classes is not None and job.classes is None:
            self.classes = self.clips.classes()
            if self.classes and len(self.classes) != config.num_classes:
                raise WaltError(
                    f"model.num_classes: the sources have {len(self.classes)} folders of media, got {config.num_classes}"
                )
        self.media_latents = (
            MediaLatents(Path(job.data.latents), job, self.clips) if self.clips and job.data.latents else None
        )
        self.device = torch.device("cpu")
        self.unseen: Scenes | None = None
        self.counter = ForwardCounter(transformer, dict(self.model.config))
        if job.init is None and self.super_resolution and config.sigma_data is not None:
            self.model.fit_low_res_embed(
                (self._low_res(sample), self._latent(sample.video, sample.latent))
                for i in range(job.low_res_batches)
                for sample in self.drawn(self.batch(i, 0))
            )

    def to(self, device: torch.device) -> None:
        self.device = device
        self.drawing.to(device)
        self.vae.to(device)
        if self.perceptual is not None:
            self.perceptual.to(device)
        if self.words is not None:
            self.words.to(device)

    def _media_sample(self, draw: Draw) -> Sample:
        """A sample of a user's media: pixels, or precomputed latents and text states."""
        assert self.clips is not None
        start = self.job.shapes[draw.shape].start
        if self.media_latents is not None:
            latent, low_res, caption, states = self.media_latents.get(draw)
            return Sample(None, None, latent, low_res, caption, start, states=states)
        clip = self.clips.load(draw)
        return Sample(clip.video, clip.low_res, None, None, clip.caption, start)

    def batch(self, step: int, rank: int) -> list[Sample]:
        """A pack: samples of mixed shape that fill `batch_tokens`, a pure function of (recipe, step, rank)."""
        if self.clips is not None:
            return self._by_frame(self.clips.pack(step, rank, self._media_sample))
        assert not isinstance(self.job.data, MediaJob)
        rng = np.random.default_rng((self.job.run.seed, step, rank))
        pack: list[Sample] = []
        for index, shape, kept in self._draw(step, rng):
            number = int(rng.integers(self.job.data.scenes))
            if self.shards is not None:
                latent, low_res, caption = self.shards.get(index, number)
                pack.append(Sample(None, None, latent, low_res, caption, shape.start, kept=kept))
            else:
                assert self.scenes is not None
                make = self.scenes.layout if self.drawing.device_draws else self.scenes.clip
                clip = make(number, shape, self.twins)
                pack.append(Sample(clip.video, clip.low_res, None, None, clip.caption, shape.start, kept=kept))
        return self._by_frame(pack)

    @staticmethod
    def _by_frame(pack: list[Sample]) -> list[Sample]:
        """Samples of one frame size lie side by side: whole-frame windows are then in order and nothing is permuted."""

        def size(sample: Sample) -> tuple[int, ...]:
            x = sample.video if sample.latent is None else sample.latent
            assert x is not None
            return x.shape[2] * x.shape[3], x.shape[2], x.shape[1]

        return sorted(pack, key=size)

    def _draw(self, step: int, rng: np.random.Generator) -> list[tuple[int, Shape, Tensor | None]]:
        """The samples of a pack: index of their shape, the shape at its drawn size, and the tokens that stay."""
        job = self.job
        weights = np.array([shape.weight for shape in job.shapes], dtype=np.float64)
        if job.resolution is None and job.token_drop is None:
            return [(i, job.shapes[i], None) for i in fill_budget(job.batch_tokens, self.tokens, list(weights), rng)]
        # Sizes are known only once drawn: the first pack of a stream of draws, of which nothing depends on the rest.
        packer = Packer(job.batch_tokens, look_ahead=32, method="first_fit", oversize="report")
        for _ in range(100_000):
            index = int(rng.choice(len(weights), p=weights / weights.sum()))
            shape = job.shapes[index]
            if job.resolution is not None and not shape.cut:
                knobs = job.resolution.model_dump()
                height, width = draw_size(shape.height, shape.width, self.space, rng=rng, **knobs)
                shape = shape.model_copy(update={"height": height, "width": width})
            grid = self._grid(shape)
            tokens, kept = grid[0] * grid[1] * grid[2], None
            if job.token_drop is not None:
                knobs = job.token_drop.model_dump()
                spread = (tokens, min(self.tokens), max(self.tokens))
                kept = draw_kept(grid, draw_drop_rate(**knobs, tokens=spread, step=step, rng=rng), rng)
            packs = packer.add((tokens if kept is None else int(kept.sum()), (index, shape, kept)))
            if packs:
                return list(packs[0].payloads)
        raise WaltError(f"batch_tokens is {job.batch_tokens}, less than the sizes that the recipe draws")

    def _grid(self, shape: Shape) -> Grid:
        """Frames, rows and columns of a shape in tokens."""
        height, width = (shape.cut or shape.height), (shape.cut or shape.width)
        frames = 1 + (shape.frames - 1) // self.vae.temporal_compression_ratio
        return frames, height // self.space, width // self.space

    def _move(self, value: Tensor) -> Tensor:
        return to_device(value, self.device)

    def drawn(self, batch: list[Sample]) -> list[Sample]:
        """The pack with pixels where it had layouts."""
        if not self.drawing.device_draws:
            return batch
        drawn: list[Sample] = []
        for run in runs_of([sample.video.shape for sample in batch]):
            part = batch[run]
            videos = self.drawing.group([sample.video for sample in part])
            small = self.drawing.group([sample.low_res_video for sample in part]) if self.twins else [None] * len(part)
            drawn += [
                replace(sample, video=video, low_res_video=low)
                for sample, video, low in zip(part, videos, small, strict=True)
            ]
        return drawn

    def _latent(self, video: Tensor | None, latent: Tensor | None) -> Tensor:
        """The normalised latent `(8, t, h, w)` of a sample, encoded now unless precomputed."""
        return self._latents([video], [latent])[0]

    @torch.no_grad()
    def _latents(self, videos: Sequence[Tensor | None], latents: Sequence[Tensor | None]) -> list[Tensor]:
        """The normalised latent of each of some samples, encoded now where it is not precomputed."""
        found: list[Tensor] = []
        for video, latent in zip(videos, latents, strict=True):
            if latent is None:
                assert video is not None
                latent = self.vae.encode(self._move(video[None])).latent_dist.mode()[0]
            found.append(latent)
        if self.job.diffusion.latent_normalization:
            config = self.vae.config
            return by_runs(lambda z: normalize(self._move(z), config.latents_mean, config.latents_std), found)
        return by_runs(self._move, found)

    def _low_res(self, sample: Sample) -> Tensor:
        """The normalised latent of what a super-resolution stage is told: the half-size twin, or half the frames."""
        return self._low_res_all([sample])[0]

    def _low_res_all(self, batch: Sequence[Sample]) -> list[Tensor]:
        """`_low_res` of some samples."""
        if not self.temporal:
            return self._latents([s.low_res_video for s in batch], [s.low_res for s in batch])
        videos = []
        for sample in batch:
            assert sample.video is not None
            videos.append(frames_twice(half_rate(sample.video)))
        return self._latents(videos, [None] * len(batch))

    def _normal(self, like: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Standard normal noise in the shapes of `like`, on the device.

        On a CPU drawn sample by sample.
        """
        if self.device.type == "cpu":
            return [normal(z.shape, generator, self.device) for z in like]
        return by_runs(lambda z: normal(z.shape, generator, self.device), like)

    def _noisy(self, clean: list[Tensor], noise: list[Tensor], steps: Tensor) -> list[Tensor]:
        """Each sample at its own noise level; `steps` `(B,)` on the host."""
        levels = self._levels(steps)
        noisy: list[Tensor] = []
        for run in runs(clean):
            signal, sigma = levels[:, run]
            noisy += (signal * stacked(clean[run]) + sigma * stacked(noise[run])).unbind()
        return noisy

    def _levels(self, steps: Tensor) -> Tensor:
        """Signal and noise of every sample, `(2, B, 1, 1, 1, 1)` on the device; `steps` `(B,)` on the host."""
        like = torch.empty(len(steps), 1, 1, 1, 1)
        return self._move(torch.stack(coefficients(self.scheduler, steps, like)))

    def loss(
        self,
        model: nn.Module,
        batch: list[Sample],
        generator: torch.Generator,
        shared: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        knobs = self.job.diffusion
        batch = self.drawn(batch)
        if knobs.partial_captions and self.words is not None:
            captions = partial_captions([sample.caption for sample in batch], knobs.partial_captions, generator)
            batch = [
                sample if sample.caption == caption else replace(sample, caption=caption, states=None)
                for sample, caption in zip(batch, captions, strict=True)
            ]
        passed: list[bool] = []
        if self.job.pixels is not None:
            passed = drop(len(batch), self.job.pixels.passes, generator)
            batch = [self._pass(s, generator) if yes else s for s, yes in zip(batch, passed, strict=True)]
        clean = self._latents([sample.video for sample in batch], [sample.latent for sample in batch])
        count = len(batch)
        steps = draw_timesteps(count, len(self.scheduler), knobs.timestep_logit_normal, generator)
        noise = self._normal(clean, generator)
        masks = self._masks(clean, batch, generator)
        lost = drop(count, knobs.condition_dropout, generator)
        levels = None
        if self.super_resolution:
            levels = torch.randint(knobs.max_noise_level + 1, (count,), generator=generator)
        told = self._told(batch, clean, masks, lost, levels, generator)
        twice = False
        if self.model.config.self_conditioning:
            # Alike on all ranks: sharded weights are gathered by all of them in every forward pass.
            chance = float(torch.rand((), generator=generator if shared is None else shared))
            twice = chance < knobs.self_conditioning_probability
        errors, sizes, made = self._errors(model, clean, noise, steps, masks, told, twice)
        if knobs.loss_weighting == "token":
            weight = sizes.sum()
            loss = errors.sum() / weight.clamp_min(1)  # with tokens dropped nothing may be left that is scored
        else:
            weight = torch.tensor(float(count))
            loss = (errors / sizes.clamp_min(1)).mean()
        whole = [z[0].numel() // self.model.config.patch_size**2 for z in clean]
        tokens = sum(n if s.kept is None else int(s.kept.sum()) for n, s in zip(whole, batch, strict=True))
        videos = sum(z.shape[1] > 1 for z in clean)
        figures: dict[str, float | Tensor] = {"weight": weight, "tokens": tokens, "samples": count}
        figures |= {"clips": videos, "padding": 0}
        figures["fill"] = tokens / self.job.batch_tokens
        if self.job.pixels is not None:
            # What is given is not made.
            made = by_runs(lambda z, x, m: z * m + x * (1 - m), clean, made, masks)
            loss = loss + self._pixel_loss(made, batch, passed, generator, figures)
        return loss, {**figures, "forwards": 1.0 + twice}

    @torch.no_grad()
    def _pass(self, sample: Sample, generator: torch.Generator) -> Sample:
        """The sample with its small video as the tokenizer shows it, its latents with noise of a random strength."""
        assert self.job.pixels is not None
        z = self._latent(sample.low_res_video, None)
        strength = self.job.pixels.latent_noise * float(torch.rand((), generator=generator))
        z = z + strength * torch.randn(z.shape, generator=generator).to(self.device)
        return replace(sample, low_res_video=self._decode(z).clamp(-1, 1))

    def _decode(self, latent: Tensor) -> Tensor:
        """Frames `(3, T, H, W)` in about [-1, 1], float32, of latents `(8, t, h, w)` as the stages make them."""
        if self.job.diffusion.latent_normalization:
            latent = denormalize(latent, self.vae.config.latents_mean, self.vae.config.latents_std)
        frames: Tensor = self.vae.decode(latent[None], return_dict=False)[0][0]
        return frames.float()

    def _pixel_loss(
        self,
        made: list[Tensor],
        batch: list[Sample],
        passed: list[bool],
        generator: torch.Generator,
        figures: dict[str, float | Tensor],
    ) -> Tensor:
        """The weighted loss of the frames that clean latents become in sampling; adds to the figures."""
        knobs = self.job.pixels
        assert knobs is not None
        total = sum(sample.video.numel() for sample in batch if sample.video is not None)
        loss, squared = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        pairs: list[tuple[Tensor, Tensor]] = []
        for latent, sample, soft in zip(made, batch, passed, strict=True):
            assert sample.video is not None and sample.low_res_video is not None
            frames = self._decode(latent).transpose(0, 1)
            small = sample.low_res_video.to(self.device).float().transpose(0, 1)
            fidelity = knobs.fidelity if soft else 1.0
            if knobs.fidelity:
                frames = project_frames(frames, small, fidelity)
            target = sample.video.to(self.device).transpose(0, 1)
            share = target.numel() / total
            loss = loss + knobs.reconstruction * share * (frames - target).abs().mean()
            squared = squared + share * (frames.detach() - target).square().mean()
            pairs.append((frames, target))
        figures["psnr"] = -10.0 * torch.log10(squared / 4.0)
        if self.perceptual is not None:
            distances = []
            for _ in range(knobs.perceptual_frames):
                frames, target = pairs[int(torch.randint(len(pairs), (), generator=generator))]
                place = int(torch.randint(len(target), (), generator=generator))
                distances.append(self.perceptual(frames[place : place + 1].clamp(-1, 1), target[place : place + 1]))
            distance = torch.cat(distances).float().mean()
            figures["lpips"] = distance.detach()
            loss = loss + knobs.perceptual * distance
        return loss

    def _masks(self, clean: list[Tensor], batch: list[Sample], generator: torch.Generator) -> list[Tensor]:
        """`(1, t, h, w)` per sample, ones where its clean latents are given: first frames, or anything at all."""
        knobs, conditional = self.job.diffusion, self.model.config.frame_conditioning
        given = draw_given_frames(
            [z.shape[1] for z in clean],
            [sample.start for sample in batch],
            knobs.frame_prediction_probability if conditional else 0.0,
            knobs.condition_dropout if conditional else 1.0,
            generator,
            knobs.given_frames,
        )
        # Drawn on the host, so that no sample costs an accelerator a launch.
        blank = [torch.empty(1, *z.shape[1:], dtype=z.dtype, device="cpu") for z in clean]
        masks = [frame_mask(z, k) for z, k in zip(blank, given, strict=True)]
        if conditional and knobs.mask_probability:
            chosen = drop(len(clean), knobs.mask_probability, generator)
            kinds = knobs.mask_kinds
            masks = [random_mask(m, generator, kinds) if yes else m for m, yes in zip(masks, chosen, strict=True)]
        return masks if self.device.type == "cpu" else by_runs(self._move, masks)

    def _told(
        self,
        batch: list[Sample],
        clean: list[Tensor],
        masks: list[Tensor],
        lost: list[bool],
        levels: Tensor | None,
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """The model's conditions: given frames, words, classes, noisy low resolution. `lost` ones miss words or class."""
        told: dict[str, Any] = {}
        config = self.model.config
        if config.frame_conditioning:
            told |= {"frame_latents": clean, "frame_mask": masks}
        if self.words is not None:
            told["encoder_hidden_states"] = self._states(batch, lost)
        if config.num_classes is not None:
            labels = [self._label(sample) for sample in batch]
            null = config.num_classes
            told["class_labels"] = torch.tensor(
                [null if gone else label for gone, label in zip(lost, labels, strict=True)], device=self.device
            )
        if levels is not None:
            low = self._low_res_all(batch)
            told["low_res_hidden_states"] = self._noisy(low, self._normal(low, generator), levels)
            told["low_res_noise_level"] = self._move(levels)
        if any(sample.kept is not None for sample in batch):
            told["kept"] = [sample.kept for sample in batch]
        return told

    def _label(self, sample: Sample) -> int:
        if sample.label is not None:
            return sample.label
        if not self.classes:
            raise WaltError(
                "classes: a model with num_classes needs the file that lists them, one a line, or sources with "
                "caption_from=folder"
            )
        if not sample.caption:
            return int(self.model.config.num_classes)  # an item without a class is seen as if it had been dropped
        if sample.caption not in self.classes:
            known = suggest(sample.caption, self.classes)
            raise WaltError(f"classes: {self.job.classes} has no {sample.caption!r}{known}, the caption of a sample")
        return self.classes[sample.caption]

    def _errors(
        self,
        model: Any,
        clean: list[Tensor],
        noise: list[Tensor],
        steps: Tensor,
        masks: list[Tensor],
        told: dict[str, Any],
        twice: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Of each sample, the squared error of v summed over what is not given (and averaged over channels), how many
        latent places that is, each `(B,)`, and the clean latents that v says."""
        noisy = self._noisy(clean, noise, steps)
        levels, timestep = self._levels(steps), self._move(steps)

        def says(predicted: list[Tensor]) -> list[Tensor]:
            """x0 = signal x_t - sigma v, in float32."""
            result: list[Tensor] = []
            for run in runs(noisy):
                (signal, sigma), x = levels[:, run], stacked(noisy[run])
                result += (signal * x - sigma * stacked(predicted[run])[:, : x.shape[1]].float()).unbind()
            return result

        if twice:
            # A compiled network would have other graphs for a pass without gradients.
            with contextlib.nullcontext() if self.job.run.compile else torch.no_grad():
                first = says(model(noisy, timestep, **told).sample)
            told = told | {"self_conditioning": [x.detach() for x in first]}
        predicted = model(noisy, timestep, **told).sample
        kept = told.get("kept") or [None] * len(clean)
        errors, sizes = [], []
        for run in runs(clean):
            (signal, sigma), z, e = levels[:, run], stacked(clean[run]), stacked(noise[run])
            target = signal * e - sigma * z
            # Given frames are known and dropped tokens were not computed: they carry no loss.
            scored = 1.0 - stacked(masks[run])
            if any(mask is not None for mask in kept[run]):
                scored = torch.stack([s * _pixels(mask, s) for mask, s in zip(kept[run], scored, strict=True)])
            squared = (stacked(predicted[run])[:, : z.shape[1]].float() - target).square()
            errors.append((squared * scored).flatten(1).sum(1) / z.shape[1])
            sizes.append(scored.flatten(1).sum(1))
            if self.model.config.get("learned_variance"):
                bounds = []
                for i, s in zip(range(run.start, run.stop), scored, strict=True):
                    v, z, t = predicted[i], clean[i], int(steps[i])
                    bound = variance_bound(self.scheduler, v[: len(z)].float(), v[len(z) :].float(), z, noisy[i], t)
                    bounds.append((bound * s).sum() / len(z))
                errors[-1] = errors[-1] + self.job.diffusion.variance_weight * torch.stack(bounds)
        return torch.cat(errors), torch.cat(sizes), says(predicted) if self.job.pixels is not None else []

    def held_out(self, shape: int, number: int) -> Sample:
        """The `number`-th sample of a shape that is never trained on."""
        start = self.job.shapes[shape].start
        if self.clips is not None:
            return self.clips.held_out(shape, number, self._media_sample)
        assert not isinstance(self.job.data, MediaJob)
        if self.shards is not None:
            latent, low_res, caption = self.shards.held_out(shape, number)
            return Sample(None, None, latent, low_res, caption, start)
        if self.unseen is None:
            # Other seeds make other scenes.
            self.unseen = Scenes(self.job.data.model_copy(update={"seed": self.job.data.seed + HELD_OUT_SEED}))
        clip = self.unseen.clip(number, self.job.shapes[shape], self.twins)
        return Sample(clip.video, clip.low_res, None, None, clip.caption, start)

    @torch.no_grad()
    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error of v per noise level and shape, named `stage/shape/tLOW-HIGH`, and over all of them.

        No frame is given, no condition is lost, nothing is predicted beforehand; low resolution carries half the
        recipe's noise. Every clip is seen at the middle of every bin.
        """
        stage = "sr" if self.super_resolution else "base"
        length = len(self.scheduler)
        found: dict[str, float] = {}
        for place, shape in enumerate(self.job.shapes):
            batch = [self.held_out(place, number) for number in range(self.job.run.heldout_clips)]
            clean = self._latents([sample.video for sample in batch], [sample.latent for sample in batch])
            masks = [frame_mask(z, 0) for z in clean]
            for part in range(NOISE_BINS):
                low, high = part * length // NOISE_BINS, (part + 1) * length // NOISE_BINS
                generator = torch.Generator().manual_seed(1_000_003 * place + part)
                noise = [torch.randn(z.shape, generator=generator).to(self.device) for z in clean]
                levels = None
                if self.super_resolution:
                    levels = torch.full((len(batch),), self.job.diffusion.max_noise_level // 2)
                told = self._told(batch, clean, masks, [False] * len(batch), levels, generator)
                steps = torch.full((len(batch),), (low + high) // 2)
                errors, sizes, _ = self._errors(model, clean, noise, steps, masks, told, False)
                value = float(errors.sum() / sizes.sum())
                found[f"{stage}/{_shape_name(shape)}/t{low}-{high - 1}"] = value
        return {**found, "loss": sum(found.values()) / len(found)}

    def flops(self, batch: list[Sample]) -> float | None:
        total = 0.0
        for sample in batch:
            if sample.latent is not None:
                grid = tuple(sample.latent.shape[1:])
            else:
                assert sample.video is not None
                frames, height, width = sample.video.shape[1:]
                space = self.vae.spatial_compression_ratio
                grid = (1 + (frames - 1) // self.vae.temporal_compression_ratio, height // space, width // space)
            # Of a sample with dropped tokens its share, as nearly all operations go by tokens.
            total += self.counter(grid) * (1.0 if sample.kept is None else float(sample.kept.float().mean()))
        return total

    def _states(self, batch: list[Sample], lost: list[bool]) -> list[Tensor]:
        """Text states of every sample, those of "" where the caption is dropped; precomputed ones are taken as such."""
        assert self.words is not None
        states = [None if gone else sample.states for gone, sample in zip(lost, batch, strict=True)]
        unknown = [i for i, known in enumerate(states) if known is None]
        fresh = self.words(["" if lost[i] else batch[i].caption for i in unknown]) if unknown else []
        made = dict(zip(unknown, fresh, strict=True))
        return [made[i] if known is None else known.to(self.device) for i, known in enumerate(states)]

    def export(self, model: Any, folder: Path) -> None:
        if self.job.lora is not None and self.job.lora.export == "adapter":
            model.save_lora_adapter(folder)
            return
        if self.job.lora is not None:
            model.fuse_lora()
            model.unload_lora()
        model.save_pretrained(folder)
        if self.classes:
            names = sorted(self.classes, key=lambda name: self.classes[name])
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _pixels(kept: Tensor | None, like: Tensor) -> Tensor | float:
    """1 at the latent pixels of kept tokens, in the shape `(1, t, h, w)` of `like`."""
    if kept is None:
        return 1.0
    patch = like.shape[-1] // kept.shape[-1]
    return kept.to(like).repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)[None]


class TextStates:
    """Prompt -> text states `(S, text_dim)` of a frozen transformers encoder, the latest ones kept by prompt.

    Long prompts are cut as the pipelines cut them, with a warning about the first one.

    Args:
        tokenizer: a transformers tokenizer.
        encoder: a model whose call gives `last_hidden_state`.
        kept_bytes: most memory of the states that are kept: a user's media have captions without end.
    """

    def __init__(self, tokenizer: Any, encoder: Any, kept_bytes: int = 2**30) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self.kept_bytes, self.warned, self.held_bytes = kept_bytes, False, 0
        self.cache: dict[str, Tensor] = {}  # the oldest first

    def to(self, device: torch.device) -> None:
        self.encoder.to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Tensor]:
        fresh = sorted({prompt for prompt in prompts if prompt not in self.cache})
        if fresh:
            states, masks = encode_text(self.tokenizer, self.encoder, fresh, self.encoder.device, warn=self._warn)
            # What is padding the host must know: lengths shape the windows.
            for prompt, row, mask in zip(fresh, states, masks.bool().cpu(), strict=True):
                places = mask.nonzero()[:, 0]
                first, end = int(places[0]), int(places[-1]) + 1
                whole = end - first == len(places)  # a copy, as the batch is not to be kept
                made = (row[first:end].clone() if whole else row[mask.to(row.device)]).float()
                self.cache[prompt] = made
                self.held_bytes += made.nbytes
        found = [self.cache[prompt] for prompt in prompts]
        while self.held_bytes > self.kept_bytes:
            self.held_bytes -= self.cache.pop(next(iter(self.cache))).nbytes
        return found

    def _warn(self, line: str) -> None:
        if not self.warned:
            logging.getLogger(__name__).warning("%s (of further prompts this is not said)", line)
        self.warned = True


def _shape_name(shape: Shape) -> str:
    """Frames and size of a shape, and where its window starts and what is cut out of it, for figures by resolution."""
    size = f"{shape.cut}x{shape.cut}" if shape.cut else f"{shape.height}x{shape.width}"
    return (
        f"{shape.frames}x{size}"
        + (f"+{shape.start}" if shape.start else "")
        + (f"@{shape.height}" if shape.cut else "")
    )


def add_lora(model: Any, job: LoraJob, init: str | None) -> None:
    """Adapters on the layers that `job.targets` name; everything else is frozen."""
    from peft import LoraConfig

    if init is None:
        raise WaltError("lora: adapters on an untrained model learn nothing; give init=FOLDER")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in job.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.split(".", 2)[-1] if "blocks" in name else name for name in names})
            raise WaltError(
                f"lora.targets: no linear layer ends in {target!r}{suggest(target, ends)}; {', '.join(ends)}"
            )
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(r=job.rank, lora_alpha=job.alpha or job.rank, target_modules=list(job.targets), lora_dropout=0.0)
    )


def read_classes(path: str | None, count: int | None) -> dict[str, int]:
    """Class names by line, `{name: label}`; empty without a file."""
    if path is None:
        return {}
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WaltError(f"classes: {path} cannot be read: {error}") from None
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise WaltError(f"classes: {path} lists {twice!r} more than once; every class has one line")
    if len(names) != count:
        raise WaltError(f"classes: {path} lists {len(names)} classes, the model has num_classes={count}")
    return {name: label for label, name in enumerate(names)}


def start_from(model: Any, folder: str, interpolate: bool = False) -> Any:
    """Copies the weights of a trained model of the same shape into `model`; returns the trained one.

    With `interpolate` the shapes of position tables may differ (W.A.L.T. Table 6: a square model goes on at 16:9).
    """
    trained = load_folder(type(model), folder, "init")
    state = interpolated_positions(trained, model) if interpolate else trained.state_dict()
    copy_weights(model, state, folder, "" if interpolate else " (interpolate_positions=true lets sample_size differ)")
    return trained


def copy_weights(model: Any, weights: dict[str, Tensor], folder: str, hint: str = "") -> None:
    """Loads `weights`, which came from `folder`, into a model that must have the same shape."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise WaltError(f"init: {folder!r} has another shape than the recipe's model{hint}") from error


def interpolated_positions(trained: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The trained state with absolute and relative position tables resized to those of `model`.

    A table is read where the model reads tables of another size: space bilinear, time and offsets in a window linear
    from end to end. So the first step starts from what the trained model does at the new size.
    """
    state = trained.state_dict()
    modules = dict(trained.named_modules())
    for name, module in model.named_modules():
        old = modules.get(name)
        if isinstance(module, WaltPositionEmbedding) and isinstance(old, WaltPositionEmbedding):
            frames, height, width = module.grid
            table = state[f"{name}.space"].T.reshape(1, -1, *old.grid[1:])
            state[f"{name}.space"] = F.interpolate(table, size=(height, width), mode="bilinear").flatten(2)[0].T
            times = state[f"{name}.time"]
            if frames > len(times):
                times = F.interpolate(times.T[None], size=frames, mode="linear", align_corners=True)[0].T
            state[f"{name}.time"] = times[:frames]
        elif isinstance(module, RelativeBias) and isinstance(old, RelativeBias):
            table, size = state[f"{name}.table"], tuple(module.table.shape[1:])
            if tuple(table.shape[1:]) != size:
                table = F.interpolate(table[None], size=size, mode="trilinear", align_corners=True)[0]
            state[f"{name}.table"] = table
    return {name: value.contiguous() for name, value in state.items()}


def load_folder(cls: type[Any], folder: str, what: str) -> Any:
    """`cls.from_pretrained(folder)` with a one-line error when the folder is missing or damaged."""
    if not (Path(folder) / "config.json").is_file():
        raise WaltError(f"{what}: no model in {folder!r} (config.json is missing)")
    try:
        # diffusers would fill a model of another class, and weights that are missing, with noise.
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise WaltError(f"{what}: {folder!r} cannot be loaded: its config.json is no JSON object")
        saved = config.get("_class_name")
        if saved is not None and saved != cls.__name__:
            raise WaltError(f"{what}: {folder!r} is of class {saved}, {cls.__name__} is needed")
        model, found = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except WaltError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as e:
        said = (str(e).splitlines() or [type(e).__name__])[0]
        raise WaltError(f"{what}: {folder!r} cannot be loaded: {said}") from e
    for kind in ("missing", "unexpected"):
        if names := sorted(found[f"{kind}_keys"]):
            raise WaltError(f"{what}: {folder!r} has {kind} weights, {len(names)} of them, such as {names[0]}")
    return model
