"""Feature networks that a user supplies as TorchScript: the I3D of the published FVD and the Inception of the published
FID, and others that are called as they are.

A distance may be called FVD, KVD, FID or KID, and a score IS, only by the sha256 of a file that is known to be the
official one. Any other file gets its own name and a part of its checksum: `FVD-mine@1a2b3c4d`.

A TorchScript archive is a program that loading and calling runs: take one only from a source that you trust.

Letters: B batch, T frames, H W pixels, d features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from walt.data.fetch import sha256
from walt.errors import WaltError
from walt.evaluation.features import check_video

SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")


@dataclass(frozen=True)
class Signature:
    """A way of calling a network that maps pixels, 0 to 255 at their own size, to features.

    Args:
        arguments: the booleans that its `forward` takes after the pixels and that are given as true; it may have others
            with defaults.
        excluded: arguments that it must not have, as another signature has them.
        least: frames that a clip must have.
        frechet, kernel: names of the distances.
        without_bias: the argument with which, in place of `arguments`, it gives the probabilities of its classes, for the
            Inception Score; None for a network whose classes nobody scores by.
        call: gives features `(B, d)` of pixels `(B, 3, T, H, W)`, float32 in 0..255, whole numbers.
    """

    arguments: tuple[str, ...]
    excluded: tuple[str, ...]
    least: int
    frechet: str
    kernel: str
    without_bias: str | None
    call: Callable[[torch.jit.ScriptModule, Tensor], Tensor]

    def fits(self, names: set[str]) -> bool:
        return names.issuperset(self.arguments) and names.isdisjoint(self.excluded)


def _call_i3d(module: torch.jit.ScriptModule, pixels: Tensor) -> Tensor:
    features: Tensor = module(pixels, rescale=True, resize=True, return_features=True)
    return features


def _call_inception(module: torch.jit.ScriptModule, pixels: Tensor) -> Tensor:
    """The middle frame, as `features.Preparation` takes it."""
    features: Tensor = module(_middle(pixels), return_features=True)
    return features


def _middle(pixels: Tensor) -> Tensor:
    return pixels[:, :, pixels.shape[2] // 2].to(torch.uint8)


# StyleGAN-V (Skorokhodov et al. 2022), src/metrics/frechet_video_distance.py; its clips have 16 frames or more, and
# code that scores prefixes of clips with this file begins at the tenth frame.
I3D = Signature(("rescale", "resize", "return_features"), (), 10, "FVD", "KVD", None, _call_i3d)
# StyleGAN2-ADA (Karras et al. 2020), metrics/frechet_inception_distance.py; inception_score.py leaves out the bias before
# the softmax, as the score's first implementation did.
INCEPTION = Signature(("return_features",), ("rescale", "resize"), 1, "FID", "KID", "no_output_bias", _call_inception)

OFFICIAL = {
    # i3d_torchscript.pt, 51,235,320 bytes, as StyleGAN-V links it
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2": ("I3D", I3D),
    # inception-2015-12-05.pt, 95,607,719 bytes, as StyleGAN2-ADA and StyleGAN3 link it
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": ("Inception", INCEPTION),
}


class ScriptedNetwork:
    """A FeatureNetwork in a TorchScript file, on the CPU. The file's code is run: only for files you trust.

    An I3D sees every frame of a clip, an Inception the middle one; both scale pictures themselves.

    Args:
        path: the archive. It is recognised by its sha256 in OFFICIAL, else by the arguments of its `forward`.

    Raises:
        WaltError: no TorchScript archive, a damaged one, or one that is called otherwise; its sha256 is shown.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fingerprint = sha256(self.path)
        self.module = _load(self.path, self.fingerprint)
        known = OFFICIAL.get(self.fingerprint)
        if known is not None:
            (self.name, self.signature), ending = known, ""
        else:
            self.signature = _recognise(self.module, self.path, self.fingerprint)
            self.name = f"{self.path.stem}@{self.fingerprint[:8]}"
            ending = f"-{self.name}"
        self.frechet, self.kernel = self.signature.frechet + ending, self.signature.kernel + ending
        scored = self.signature.without_bias is not None and self.signature.without_bias in _arguments(self.module)
        self.score = f"IS{ending}" if scored else None

    def features(self, video: Tensor) -> Tensor:
        """Features `(B, d)`, float32, of videos `(B, 3, T, H, W)` in [-1, 1].

        Raises:
            WaltError: no colour video, values outside [-1, 1], too few frames, a network that fails or gives anything
                but one finite row per video.
        """
        return self._call(video, lambda pixels: self.signature.call(self.module, pixels), "features (%d, d)")

    def probabilities(self, video: Tensor) -> Tensor:
        """`(B, K)` of the network's classes, float32, of the same videos; errors likewise, and where rows do not sum to 1."""
        assert self.signature.without_bias is not None, "asked only where there is a score"
        options = {self.signature.without_bias: True}
        given = self._call(video, lambda pixels: self.module(_middle(pixels), **options), "probabilities (%d, K)")
        if bool((given < 0).any()) or not torch.allclose(given.sum(dim=1), given.new_ones(()), atol=1e-3):
            raise WaltError(f'network: "{self.path}" gives classes that are no probabilities: rows do not sum to 1')
        return given

    def _call(self, video: Tensor, call: Callable[[Tensor], Tensor], wanted: str) -> Tensor:
        check_video(video)
        if video.shape[2] < self.signature.least:
            raise WaltError(f"video: {self.name} needs at least {self.signature.least} frames, got {video.shape[2]}")
        pixels = ((video.float() + 1) * 127.5).round()
        try:
            with torch.no_grad():
                rows = call(pixels)
        except (RuntimeError, torch.jit.Error) as error:
            raise WaltError(f'network: "{self.path}" fails on {_shape(video)}: {_last_line(error)}') from error
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(video):
            given = _shape(rows) if isinstance(rows, Tensor) else type(rows).__name__
            raise WaltError(f'network: "{self.path}" gives {given}, expected {wanted % len(video)}')
        if not bool(rows.isfinite().all()):
            raise WaltError(f'network: "{self.path}" gives {wanted.split()[0]} that are not finite')
        return rows.float()


def is_scripted(path: str | Path) -> bool:
    """Whether a file is to be read as TorchScript: by its name's end, as a damaged one has no other mark."""
    return Path(path).suffix.lower() in SUFFIXES


def _load(path: Path, checksum: str) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            # The published networks exist as TorchScript only, whatever PyTorch recommends for new ones.
            warnings.simplefilter("ignore", FutureWarning)
            module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).split(" This is an internal", 1)[0].splitlines()[0]
        raise WaltError(
            f'network: "{path}" is damaged or no TorchScript archive ({reason}); its sha256 is {checksum}'
        ) from error
    return module.eval()


def _recognise(module: torch.jit.ScriptModule, path: Path, checksum: str) -> Signature:
    names = _arguments(module)
    for signature in (I3D, INCEPTION):
        if signature.fits(set(names)):
            return signature
    raise WaltError(
        f'network: "{path}" (sha256 {checksum}) takes ({", ".join(names)}), expected (video, '
        f"{', '.join(I3D.arguments)}) of an I3D or (image, {', '.join(INCEPTION.arguments)}) of an Inception"
    )


def _arguments(module: torch.jit.ScriptModule) -> list[str]:
    """The names of what its `forward` takes."""
    schema = getattr(getattr(module, "forward", None), "schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments[1:]]


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _last_line(error: Exception) -> str:
    """What went wrong: TorchScript puts the traces of its code before it."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]
