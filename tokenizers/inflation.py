"""A video tokenizer that starts as an image tokenizer (MAGVIT-v2, arXiv 2310.05737, appendix A.2).

Kernels of the image network go into the last temporal slice of the video network's, all other slices are zero: with
causal padding every frame is then seen as the image network would see it. Of the frames that a temporal stride joins
the last one counts; a temporal upsampling repeats. The discriminator is not inflated: it is trained from scratch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt, Upsample


@torch.no_grad()
def inflate(image: nn.Module, video: AutoencoderKLWalt) -> None:
    """Puts the weights of `image` into `video`, in place.

    Args:
        image: an `AutoencoderKLWalt` without temporal downsampling, or a `WaltVQModel`.
        video: of the same widths, blocks per level, latent channels and quantizer; its temporal strides are free.

    Raises:
        WaltError: front ends (both need patch_size 1: a block of frames is not a block of pixels) or shapes differ.
    """
    for name, model in (("image", image), ("video", video)):
        patch = model.config["patch_size"]  # type: ignore[index]
        if patch != 1:
            raise WaltError(f"{name}: only tokenizers with patch_size 1 can be inflated, got {patch}")
    source, target = image.state_dict(), video.state_dict()
    if source.keys() != target.keys():
        raise WaltError(f"video: has other parts than the image tokenizer ({min(source.keys() ^ target.keys())})")
    times = {f"{name}.conv": m.time for name, m in video.named_modules() if isinstance(m, Upsample)}
    for name, here in target.items():
        given = source[name]
        time = times.get(name.rpartition(".")[0], 1)
        if time > 1:
            # An upsampling's channels are (out, time, 2, 2): each time gets the image's (out, 2, 2).
            given = given.unflatten(0, (-1, 4)).unsqueeze(1).expand(-1, time, *[-1] * given.ndim).flatten(0, 2)
        here.copy_(_last_slice(given, here, name))


def _last_slice(given: Tensor, here: Tensor, name: str) -> Tensor:
    """`given` as a tensor of the shape of `here`: its last temporal slice in the last one, zeros before."""
    if given.ndim == 5 and here.ndim == 5 and here.shape[2] > 1:
        # An image never met the other slices of a causal kernel: whatever they hold is noise.
        wide = given.new_zeros(*given.shape[:2], *here.shape[2:3], *given.shape[3:])
        wide[:, :, -1] = given[:, :, -1]
        given = wide
    if given.shape != here.shape:
        raise WaltError(f"video: {name} is {tuple(here.shape)}, the image tokenizer's inflates to {tuple(given.shape)}")
    return given
