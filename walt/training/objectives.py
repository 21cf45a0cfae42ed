"""What each kind of job adds to the loop: its model, its batches and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from walt.conditioning import draw_given_frames, drop, frame_mask
from walt.data.latents import LatentShards
from walt.data.packing import Packer, draw_drop_rate, draw_kept, draw_size, fill_budget
from walt.data.scenes import Scenes
from walt.diffusion import add_noise, draw_timesteps, make_scheduler, variance_bound, velocity, x0_from_velocity
from walt.errors import WaltError, suggest
from walt.latents import Grid, normalize
from walt.training.job import DenoiserJob, Shape, TokenizerJob


def build_model(cls: type[Any], config: dict[str, Any]) -> Any:
    """`cls(**config)` with unknown names answered by the nearest known one."""
    import inspect

    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in config:
        if name not in known:
            raise WaltError(f"model: {cls.__name__} has no {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


class TokenizerObjective:
    """Reconstruction + VGG perceptual loss on mixed image and clip cuts; records latent statistics at the end.

    The adversarial part of MAGVIT-v2 is not built. `latent_penalty` and `latent_noise` stand in for a KL term: they
    keep the latents' scale and make the decoder tolerant of a denoiser's errors.
    """

    model: Any

    def __init__(self, job: TokenizerJob, autoencoder: type[Any], perceptual: nn.Module | None) -> None:
        self.job = job
        self.scenes = Scenes(job.data)
        torch.manual_seed(job.run.seed)
        self.model = build_model(autoencoder, job.model)
        if job.init is not None:
            trained = start_from(self.model, job.init)
            self.model.register_to_config(
                latents_mean=trained.config.latents_mean, latents_std=trained.config.latents_std
            )
        elif self.model.config.block_shortcut:
            self.model.fit_block_shortcut(video for i in range(job.shortcut_batches) for video in self.batch(i, 0))
        if job.freeze_encoder:
            if job.init is None:
                raise WaltError("freeze_encoder: an untrained encoder cannot be frozen; give init=FOLDER")
            self.model.encoder.requires_grad_(False)
        self.perceptual = perceptual
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.device = device
        if self.perceptual is not None:
            self.perceptual.to(device)

    def batch(self, step: int, rank: int) -> list[Tensor]:
        """Groups of equal shape, each `(N, 3, T, H, W)` in [-1, 1]; about `batch_pixels` video pixels in all."""
        shapes = self.job.shapes
        rng = np.random.default_rng((self.job.run.seed, step, rank))
        sides = [(s.cut or s.height, s.cut or s.width) for s in shapes]
        pixels = [s.frames * h * w for s, (h, w) in zip(shapes, sides, strict=True)]
        chosen = fill_budget(self.job.batch_pixels, pixels, [s.weight for s in shapes], rng)
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for index in chosen:
            video = self.scenes.clip(int(rng.integers(self.job.data.scenes)), shapes[index]).video
            groups.setdefault(tuple(video.shape), []).append(video)
        return [torch.stack(videos) for _, videos in sorted(groups.items())]

    def loss(
        self, model: nn.Module, batch: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        weights = self.job.loss
        total = sum(video.numel() for video in batch)
        loss = torch.zeros((), device=self.device)
        seen: dict[str, float | Tensor] = {"pixels": total / 3, "samples": sum(len(video) for video in batch)}
        error = torch.zeros((), device=self.device)
        distances: list[Tensor] = []
        outputs: list[tuple[Tensor, Tensor]] = []
        for video in batch:
            video = video.to(self.device, non_blocking=True)
            share = video.numel() / total
            output, latent = model(video, noise=self._noise(video, generator), return_dict=False)
            difference = output.float() - video
            error = error + share * difference.detach().square().mean()
            loss = loss + share * weights.reconstruction * difference.abs().mean()
            loss = loss + share * weights.latent_penalty * latent.float().square().mean()
            outputs.append((output, video))
        if self.perceptual is not None:
            for _ in range(weights.perceptual_frames):
                # A random frame of a random group: the VGG costs more than the tokenizer.
                output, video = outputs[int(torch.randint(len(outputs), (), generator=generator))]
                row, frame = (int(torch.randint(video.shape[dim], (), generator=generator)) for dim in (0, 2))
                distances.append(self.perceptual(output[row : row + 1, :, frame], video[row : row + 1, :, frame]))
        if distances:
            distance = torch.cat(distances).float().mean()
            loss = loss + weights.perceptual * distance
            seen["lpips"] = distance.detach()
        seen["psnr"] = -10.0 * torch.log10(error / 4.0)
        return loss, seen

    def _noise(self, video: Tensor, generator: torch.Generator) -> Tensor | None:
        if not self.job.loss.latent_noise:
            return None
        b, _, t, h, w = video.shape
        s, r = self.model.spatial_compression_ratio, self.model.temporal_compression_ratio
        shape = (b, self.model.config.latent_channels, 1 + (t - 1) // r, h // s, w // s)
        # A random strength per sample, up to latent_noise: clean latents must decode sharply too.
        strength = torch.rand((b, 1, 1, 1, 1), generator=generator) * self.job.loss.latent_noise
        return (torch.randn(shape, generator=generator) * strength).to(self.device)

    def export(self, model: nn.Module, folder: Path) -> None:
        if not self.job.freeze_encoder:
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
            for video in self.batch(step, 0):
                z = model.encode(video.to(self.device)).latent_dist.mode().double().cpu()
                count = count + z[:, 0].numel()
                total = total + z.sum(dim=(0, 2, 3, 4))
                square = square + z.square().sum(dim=(0, 2, 3, 4))
        mean = total / count
        std = (square / count - mean.square()).clamp_min(1e-12).sqrt()
        return [round(float(v), 6) for v in mean], [round(float(v), 6) for v in std]


# ---------------------------------------------------------------------------------------------------------------------
# Denoiser: base and super-resolution stages


@dataclass(frozen=True)
class Sample:
    """One clip or image of a pack. Pixels `(3, T, H, W)` or raw latents `(8, t, h, w)`, whichever the data gives."""

    video: Tensor | None
    low_res_video: Tensor | None
    latent: Tensor | None
    low_res: Tensor | None
    caption: str
    start: int
    kept: Tensor | None = None  # bool (t, h / p, w / p), the tokens that are computed and scored; None: all


class DenoiserObjective:
    """v-prediction on packs of images and clips (W.A.L.T. sections 3.2-3.4, 4.1).

    Each sample has its own timestep, noise, text dropout, given frames and (super-resolution) noise level; all are
    drawn from the step's generator. With the recipe's probability the pack is predicted twice, the second time with
    the first estimate of the clean latents (self-conditioning).
    """

    model: Any

    def __init__(self, job: DenoiserJob, transformer: type[Any], vae: Any, words: TextStates | None) -> None:
        self.job = job
        torch.manual_seed(job.run.seed)
        self.model = build_model(transformer, job.model)
        if job.init is not None:
            start_from(self.model, job.init)
        config = self.model.config
        self.shards = LatentShards(Path(job.data.latents), job) if job.data.latents else None
        self.scenes = None if self.shards else Scenes(job.data)
        self.vae = vae.eval().requires_grad_(False)
        if job.diffusion.latent_normalization and self.vae.config.latents_mean is None:
            raise WaltError(f"{job.tokenizer}: the tokenizer has no latents_mean; export it with `walt train`")
        self.scheduler = make_scheduler(job.diffusion.zero_snr)
        self.words = words
        if (words is None) != (config.text_dim is None):
            raise WaltError(
                "text_encoder: a model with text_dim needs text_encoder and text_tokenizer, others take none"
            )
        self.super_resolution = config.get("low_res_channels") is not None
        if (job.resolution is not None or job.token_drop is not None) and self.super_resolution:
            raise WaltError("resolution, token_drop: for base stages only, this model takes low-resolution latents")
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
        self.device = torch.device("cpu")
        if job.init is None and self.super_resolution and config.sigma_data is not None:
            self.model.fit_low_res_embed(
                (self._latent(sample.low_res_video, sample.low_res), self._latent(sample.video, sample.latent))
                for i in range(job.low_res_batches)
                for sample in self.batch(i, 0)
            )

    def to(self, device: torch.device) -> None:
        self.device = device
        self.vae.to(device)
        if self.words is not None:
            self.words.to(device)

    def batch(self, step: int, rank: int) -> list[Sample]:
        """A pack: samples of mixed shape that fill `batch_tokens`, a pure function of (recipe, step, rank)."""
        rng = np.random.default_rng((self.job.run.seed, step, rank))
        pack: list[Sample] = []
        for index, shape, kept in self._draw(step, rng):
            number = int(rng.integers(self.job.data.scenes))
            if self.shards is not None:
                latent, low_res, caption = self.shards.get(index, number)
                pack.append(Sample(None, None, latent, low_res, caption, shape.start, kept))
            else:
                assert self.scenes is not None
                clip = self.scenes.clip(number, shape, self.super_resolution)
                pack.append(Sample(clip.video, clip.low_res, None, None, clip.caption, shape.start, kept))
        return pack

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

    @torch.no_grad()
    def _latent(self, video: Tensor | None, latent: Tensor | None) -> Tensor:
        """The normalised latent `(8, t, h, w)` of a sample, encoded now unless precomputed."""
        if latent is None:
            assert video is not None
            latent = self.vae.encode(video[None].to(self.device)).latent_dist.mode()[0]
        latent = latent.to(self.device, non_blocking=True)
        if not self.job.diffusion.latent_normalization:
            return latent
        return normalize(latent, self.vae.config.latents_mean, self.vae.config.latents_std)

    def loss(
        self, model: nn.Module, batch: list[Sample], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        knobs = self.job.diffusion
        clean = [self._latent(sample.video, sample.latent) for sample in batch]
        count = len(batch)
        steps = draw_timesteps(count, len(self.scheduler), knobs.timestep_logit_normal, generator)
        noise = [torch.randn(z.shape, generator=generator).to(self.device) for z in clean]
        given = draw_given_frames(
            [z.shape[1] for z in clean],
            [sample.start for sample in batch],
            knobs.frame_prediction_probability if self.model.config.frame_conditioning else 0.0,
            knobs.condition_dropout if self.model.config.frame_conditioning else 1.0,
            generator,
        )
        masks = [frame_mask(z, k) for z, k in zip(clean, given, strict=True)]
        noisy = [add_noise(self.scheduler, z, e, int(t)) for z, e, t in zip(clean, noise, steps, strict=True)]
        target = [velocity(self.scheduler, z, e, int(t)) for z, e, t in zip(clean, noise, steps, strict=True)]
        told: dict[str, Any] = {}
        if self.model.config.frame_conditioning:
            told |= {"frame_latents": clean, "frame_mask": masks}
        if self.words is not None:
            lost = drop(count, knobs.condition_dropout, generator)
            captions = ["" if gone else sample.caption for gone, sample in zip(lost, batch, strict=True)]
            told["encoder_hidden_states"] = self.words(captions)
        if self.super_resolution:
            levels = torch.randint(knobs.max_noise_level + 1, (count,), generator=generator)
            low = [self._latent(sample.low_res_video, sample.low_res) for sample in batch]
            told["low_res_hidden_states"] = [
                add_noise(self.scheduler, z, torch.randn(z.shape, generator=generator).to(self.device), int(t))
                for z, t in zip(low, levels, strict=True)
            ]
            told["low_res_noise_level"] = levels.to(self.device)
        if any(sample.kept is not None for sample in batch):
            told["kept"] = [sample.kept for sample in batch]
        timestep = steps.to(self.device)
        if self.model.config.self_conditioning:
            chance = float(torch.rand((), generator=generator))
            if chance < knobs.self_conditioning_probability:
                with torch.no_grad():
                    first = model(noisy, timestep, **told).sample
                told["self_conditioning"] = [
                    x0_from_velocity(self.scheduler, v[: len(x)].float(), x, int(t))
                    for v, x, t in zip(first, noisy, steps, strict=True)
                ]
        predicted = model(noisy, timestep, **told).sample
        # Given frames are known and dropped tokens were not computed: they carry no loss.
        scored = [(1.0 - m) * _pixels(sample.kept, m) for sample, m in zip(batch, masks, strict=True)]
        errors = [
            ((v[: len(y)].float() - y).square() * s).sum() / len(y)
            for v, y, s in zip(predicted, target, scored, strict=True)
        ]
        if self.model.config.get("learned_variance"):
            for i, (v, z, x, t, s) in enumerate(zip(predicted, clean, noisy, steps, scored, strict=True)):
                bound = variance_bound(self.scheduler, v[: len(z)].float(), v[len(z) :].float(), z, x, int(t))
                errors[i] = errors[i] + knobs.variance_weight * (bound * s).sum() / len(z)
        sizes = [s.sum() for s in scored]
        if knobs.loss_weighting == "token":
            loss = torch.stack(errors).sum() / torch.stack(sizes).sum()
        else:
            loss = torch.stack([e / s for e, s in zip(errors, sizes, strict=True)]).mean()
        whole = [z[0].numel() // self.model.config.patch_size**2 for z in clean]
        tokens = sum(n if s.kept is None else int(s.kept.sum()) for n, s in zip(whole, batch, strict=True))
        videos = sum(z.shape[1] > 1 for z in clean)
        figures = {"tokens": tokens, "samples": count, "clips": videos, "fill": tokens / self.job.batch_tokens}
        return loss, figures

    def export(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]


def _pixels(kept: Tensor | None, like: Tensor) -> Tensor | float:
    """1 at the latent pixels of kept tokens, in the shape `(1, t, h, w)` of `like`."""
    if kept is None:
        return 1.0
    patch = like.shape[-1] // kept.shape[-1]
    return kept.to(like).repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)[None]


class TextStates:
    """Prompt -> text states `(S, text_dim)` of a frozen transformers encoder, cached by prompt.

    Args:
        tokenizer: a transformers tokenizer.
        encoder: a model whose call gives `last_hidden_state`.
        max_length: tokens kept of a prompt.
    """

    def __init__(self, tokenizer: Any, encoder: Any, max_length: int = 64) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self.max_length = max_length
        self.cache: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> None:
        self.encoder.to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Tensor]:
        fresh = sorted({prompt for prompt in prompts if prompt not in self.cache})
        if fresh:
            ids = self.tokenizer(
                fresh, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.encoder.device)
            states = self.encoder(input_ids=ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
            for prompt, row, mask in zip(fresh, states, ids.attention_mask, strict=True):
                self.cache[prompt] = row[: int(mask.sum())].float().clone()
        return [self.cache[prompt] for prompt in prompts]


def start_from(model: Any, folder: str) -> Any:
    """Copies the weights of a trained model of the same shape into `model`; returns the trained one."""
    trained = load_folder(type(model), folder, "init")
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise WaltError(f"init: {folder!r} has another shape than the recipe's model") from error
    return trained


def load_folder(cls: type[Any], folder: str, what: str) -> Any:
    """`cls.from_pretrained(folder)` with a one-line error when the folder is missing or damaged."""
    if not (Path(folder) / "config.json").is_file():
        raise WaltError(f"{what}: no model in {folder!r} (config.json is missing)")
    try:
        return cls.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WaltError(f"{what}: {folder!r} cannot be loaded: {str(error).splitlines()[0]}") from error
