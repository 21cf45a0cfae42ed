"""Frame-by-frame measures of a video against its reference: PSNR (also inside a mask), SSIM, LPIPS, high-frequency energy.

Letters: B batch, C channels, T frames, H W pixels. Videos are `(B, C, T, H, W)` in [-1, 1]; every measure gives one
float per video, `(B,)`, computed in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from walt.errors import WaltError

PEAK = 2.0  # the range of a pixel in [-1, 1]


def psnr(video: Tensor, target: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB over all pixels of each video, `(B,)`; inf where they are equal."""
    _check_pair(video, target)
    return _decibel(reduce(_wide(video) - _wide(target), "b c t h w -> b", _mean_square))


def ssim(video: Tensor, target: Tensor) -> Tensor:
    """Returns the structural similarity of each video's frames with the target's, `(B,)`; 1 where they are equal.

    Wang et al. 2004: local means, variances and covariance under a Gaussian window of 11 x 11 pixels with a standard
    deviation of 1.5, at every place where the window fits, averaged over places, colours and frames.

    Raises:
        WaltError: shapes differ, or a side is under 11 pixels.
    """
    _check_pair(video, target)
    if min(video.shape[-2:]) < 11:
        raise WaltError(f"video: expected a height and width of at least 11, got {tuple(video.shape[-2:])}")
    places = torch.arange(11, dtype=_wide(video[:0]).dtype, device=video.device) - 5
    window = torch.exp(-places.square() / (2 * 1.5**2))
    window = window / window.sum()

    def local_mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    frames = []
    for pair in zip(video.unbind(dim=2), target.unbind(dim=2), strict=True):  # one by one: it holds ten copies
        x, y = (rearrange(_wide(z), "b c h w -> (b c) 1 h w") for z in pair)
        mean_x, mean_y = local_mean(x), local_mean(y)
        variance_x = local_mean(x * x) - mean_x.square()
        variance_y = local_mean(y * y) - mean_y.square()
        covariance = local_mean(x * y) - mean_x * mean_y
        similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
            (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
        )
        frames.append(reduce(similarity, "(b c) 1 h w -> b", "mean", b=len(video)))
    return torch.stack(frames).mean(dim=0)


def masked_psnr(video: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Returns the PSNR in dB of the pixels in a mask, `(B,)`: the squared error weighted by alpha.

    Args:
        alpha: weights `(B, 1, T, H, W)`, not negative; 1 on the subject, 0 on the background. A uint8 mask (0..255)
            will do as well, as only ratios matter.

    Raises:
        WaltError: shapes differ, or a video's mask is empty.
    """
    _check_pair(video, target)
    if alpha.shape != (video.shape[0], 1, *video.shape[2:]):
        raise WaltError(f"alpha: expected {(video.shape[0], 1, *video.shape[2:])}, got {tuple(alpha.shape)}")
    weight = _wide(alpha)
    total = reduce(weight, "b 1 t h w -> b", "sum")
    if not bool((total > 0).all()):
        raise WaltError("alpha: the mask of at least one video is empty")
    error = reduce((_wide(video) - _wide(target)).square(), "b c t h w -> b 1 t h w", "mean")
    return _decibel(reduce(error * weight, "b 1 t h w -> b", "sum") / total)


def lpips(video: Tensor, target: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns the mean perceptual distance of each video's frames from the target's, `(B,)`.

    Args:
        perceptual: maps two `(1, 3, H, W)` images to a distance `(1,)`, such as
            `walt.tokenizers.losses.PerceptualLoss`. It sees one frame at a time, so that a large video needs the
            memory of one frame.
    """
    _check_pair(video, target)
    frames = zip(
        rearrange(video, "b c t h w -> (b t) 1 c h w"), rearrange(target, "b c t h w -> (b t) 1 c h w"), strict=True
    )
    with torch.no_grad():
        distances = torch.cat([perceptual(ours, theirs) for ours, theirs in frames])
    return reduce(distances, "(b t) -> b", "mean", b=len(video))


def high_frequency_energy(video: Tensor, cutoff: float = 0.25) -> Tensor:
    """Returns the energy per pixel that a video's frames hold above a spatial frequency, `(B,)`.

    Each frame is mirrored at its borders to 2H x 2W (so that they add no edges of their own) and Fourier transformed;
    the squared magnitudes where max(|f_y|, |f_x|) > cutoff are summed and divided by the number of pixels. By Parseval
    that is the mean square of the high-passed frame, in units of squared pixel values; the mean is over C and T.

    Args:
        cutoff: in cycles per pixel, from 0 to below 0.5. 0.25 is exactly the band that a video of half the resolution
            can hold, so the energy above it is detail that 2x super-resolution added.
    """
    if not 0 <= cutoff < 0.5:
        raise WaltError(f"cutoff: expected cycles per pixel from 0 to below 0.5, got {cutoff}")
    _check_video(video, "video")
    height, width = video.shape[-2:]
    # The transform of a real frame: rfft leaves out the negative f_x, which are counted by doubling.
    above = torch.maximum(
        torch.fft.fftfreq(2 * height, device=video.device).abs()[:, None],
        torch.fft.rfftfreq(2 * width, device=video.device)[None, :],
    ).gt(cutoff)
    weight = above.to(torch.float32) * 2
    weight[:, 0] /= 2
    weight[:, -1] /= 2
    energies = []
    for frame in rearrange(_wide(video), "b c t h w -> (b t) c h w"):
        mirrored = torch.cat([frame, frame.flip(-1)], dim=-1)
        mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
        power = torch.fft.rfft2(mirrored, norm="forward").abs().square()
        energies.append((power * weight).sum(dim=(-2, -1)).mean())
    return reduce(torch.stack(energies), "(b t) -> b", "mean", b=len(video))


def _mean_square(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    return tensor.square().mean(dim=axes)


def _decibel(mean_square: Tensor) -> Tensor:
    return 10 * torch.log10(PEAK**2 / mean_square)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_video(video: Tensor, name: str) -> None:
    if video.ndim != 5:
        raise WaltError(f"{name}: expected (B, C, T, H, W), got {tuple(video.shape)}")


def _check_pair(video: Tensor, target: Tensor) -> None:
    _check_video(video, "video")
    if video.shape != target.shape:
        raise WaltError(f"target: expected the video's shape {tuple(video.shape)}, got {tuple(target.shape)}")


def join_ratio(video: Tensor, join: int, neighbours: int = 4, period: int = 1) -> Tensor:
    """How much a chunk join shows: the frame difference across it over the median of its neighbours' differences.

    Of an even number of neighbours the median is the mean of the two middle ones.

    Args:
        video: `(B, C, T, H, W)`.
        join: first frame of the later chunk's own frames (17 in a 29-frame video).
        neighbours: differences on each side that the median is taken of.
        period: how many frames these are apart. 4 compares a join with the borders of latents around it: a denoiser's
            errors differ from latent to latent, so the picture may move there everywhere, joins or not.

    Returns:
        `(B,)`; 1 is a join like any other pair of frames.

    Raises:
        WaltError: not a video, or no difference on one side of the join.
    """
    _check_video(video, "video")
    if not period < join < video.shape[2] - period:
        raise WaltError(
            f"join must be from {1 + period} to {video.shape[2] - 1 - period} in a video of {video.shape[2]} frames, "
            f"got {join}"
        )
    differences = _wide(video).diff(dim=2).abs().mean(dim=(1, 3, 4))
    around = [join - 1 + side * period * (i + 1) for i in range(neighbours) for side in (-1, 1)]
    around = [i for i in around if 0 <= i < differences.shape[1]]
    return differences[:, join - 1] / differences[:, around].quantile(0.5, dim=1).clamp_min(1e-12)
