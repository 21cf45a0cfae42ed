"""The 2D VQ-GAN of NUWA and its VQ-GAN-Seg (arXiv 2111.12417, section 3.1) as one diffusers model, frame by frame.

The networks are those of the causal tokenizer: of a lone frame its convolutions see the last temporal tap only, so
that tap alone is kept and every frame of a video is a lone frame.
Letters: B batch, C channels, T frames, H W pixels; D code width, h w latent grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from walt.errors import WaltError
from walt.tokenizers.autoencoder_kl_walt import (
    BlockProjection,
    CausalConv3d,
    Decoder3d,
    Encoder3d,
    LappedProjection,
    Past,
    haar_matrix,
)
from walt.tokenizers.quantizers import VectorQuantizer


class FrameConv(CausalConv3d):
    """The last temporal tap of a `CausalConv3d`: all that a lone frame `(B, C, 1, H, W)` meets."""

    def __init__(self, conv: CausalConv3d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size[1], (1, conv.stride[1], conv.stride[2]))
        self.kernel_size = (1, *self.kernel_size[1:])
        self.weight = nn.Parameter(self.weight.detach()[:, :, -1:].clone())
        self.reset_parameters()

    def forward(self, x: Tensor, past: Past = None, carry: None = None) -> tuple[Tensor, Past]:  # type: ignore[override]
        y = F.conv2d(x[:, :, 0], self.weight[:, :, 0], self.bias, self.stride[1:], self.padding[1:])
        return y.unsqueeze(2), past


def _frames_only(network: nn.Module) -> None:
    """Puts a `FrameConv` in place of every causal convolution."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CausalConv3d):
                setattr(parent, name, FrameConv(child))
        if isinstance(parent, (BlockProjection, LappedProjection)):
            parent.later = cast(Any, None)  # the map of later positions in time


class FramePatcher(nn.Module):
    """Pictures <-> blocks of `patch` x `patch` pixels on channels, lossless: raw pixels or their Haar coefficients."""

    def __init__(self, patch: int, transform: str) -> None:
        super().__init__()
        self.patch = patch
        basis = haar_matrix(patch) if transform == "haar" else torch.eye(patch, dtype=torch.float64, device="cpu")
        # As lists, so that no .to(dtype) rounds them; the scale keeps the coarse coefficient a mean of pixels.
        scale = patch if transform == "haar" else 1.0
        matrix = torch.kron(basis, basis)
        self._forward_rows = (matrix / scale).tolist()
        self._inverse_rows = (matrix.T * scale).tolist()

    def split(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> `(N, C*p^2, H/p, W/p)`."""
        blocks = F.pixel_unshuffle(x, self.patch).unflatten(1, (x.shape[1], self.patch**2))
        rows = torch.tensor(self._forward_rows, dtype=x.dtype, device=x.device)
        return torch.einsum("kp,ncphw->nckhw", rows, blocks).flatten(1, 2)

    def join(self, blocks: Tensor) -> Tensor:
        """The inverse of `split`."""
        rows = torch.tensor(self._inverse_rows, dtype=blocks.dtype, device=blocks.device)
        pixels = torch.einsum("pk,nckhw->ncphw", rows, blocks.unflatten(1, (-1, self.patch**2)))
        return F.pixel_shuffle(pixels.flatten(1, 2), self.patch)


class WaltVQModel(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Pictures or segmentation maps <-> a grid of codes; videos frame by frame with the same codebook.

    Conventions are those of diffusers' `VQModel`: `encode(x).latents` are not yet quantized, `decode` quantizes unless
    told not to. Every picture argument is `(B, C, H, W)` or, as a video, `(B, C, T, H, W)`; results have the same form.

    Pictures are in [-1, 1]. With `segmentation` the channels are classes: a one-hot map goes in (or its class numbers,
    integers `(B, H, W)` or `(B, T, H, W)`) and class logits come out.

    Args:
        in_channels: 3, or the number of classes.
        segmentation: see above.
        num_vq_embeddings, vq_embed_dim: size and width of the codebook (NUWA: 12,288 x 256).
        encoder_widths, decoder_widths: channels per level, finest first; space shrinks by 2 between levels: 4 levels and
            patch 1 are F8, 5 are F16.
        layers_per_block: residual blocks per level.
        patch_size: 1, 2, 4, ...: a lossless front end that takes the place of the finest levels.
        front_end: "haar" or "space_to_depth".
        norm: "group" (VQ-GAN) or "channel" (per position: a crop is encoded as the whole picture is, borders aside).
        block_shortcut: a linear map per block beside the networks (`fit_block_shortcut`).
        shortcut_overlap: rings of neighbouring codes that the decoder's map reads too (`LappedProjection`).
        adaptation: of the decoder's norms to the code, "local" or "global".
        codebook, codebook_decay, restart_below, normalize: see `VectorQuantizer`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
    _skip_layerwise_casting_patterns = ["norm", "quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        segmentation: bool = False,
        num_vq_embeddings: int = 12288,
        vq_embed_dim: int = 256,
        encoder_widths: tuple[int, ...] = (128, 128, 256, 256, 512),
        decoder_widths: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        patch_size: int = 1,
        front_end: str = "haar",
        norm: str = "group",
        adaptation: str = "local",
        block_shortcut: bool = False,
        shortcut_overlap: int = 0,
        codebook: str = "ema",
        codebook_decay: float = 0.99,
        restart_below: float = 0.03,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        allowed = {"front_end": ("haar", "space_to_depth"), "norm": ("channel", "group")}
        allowed["adaptation"] = ("local", "global")
        for name, value in (("front_end", front_end), ("norm", norm), ("adaptation", adaptation)):
            if value not in allowed[name]:
                raise WaltError(f"{name} must be one of {allowed[name]}, got {value!r}")
        if patch_size < 1 or patch_size & (patch_size - 1):
            raise WaltError(f"patch_size must be a power of two, got {patch_size}")
        if not encoder_widths or len(encoder_widths) != len(decoder_widths):
            raise WaltError(
                f"encoder_widths and decoder_widths need one entry per level, got {encoder_widths} and {decoder_widths}"
            )
        self.spatial_compression_ratio = patch_size * 2 ** (len(encoder_widths) - 1)
        blocks, times = in_channels * patch_size**2, [1] * (len(encoder_widths) - 1)
        self.patcher = FramePatcher(patch_size, front_end)
        self.encoder = Encoder3d(blocks, vq_embed_dim, encoder_widths, times, layers_per_block, norm, block_shortcut)
        self.quantize = VectorQuantizer(
            num_vq_embeddings, vq_embed_dim, codebook, codebook_decay, restart_below, normalize
        )
        self.decoder = Decoder3d(
            vq_embed_dim,
            blocks,
            decoder_widths,
            times,
            layers_per_block,
            norm,
            adaptation,
            block_shortcut,
            shortcut_overlap,
            None,
        )
        _frames_only(self.encoder)
        _frames_only(self.decoder)
        self.use_slicing = False
        self.use_tiling = False

    @property
    def vocab_size(self) -> int:
        """The number of codes."""
        return self.quantize.size

    # -- diffusers' interface ----------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Latents `(B, D, h, w)` (a video's `(B, D, T, h, w)`) before quantization."""
        latents = self._encode(self._check_input(x))
        latents = latents if _is_video(x) else latents[:, :, 0]
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Decodes latents `(B, D, h, w)` or `(B, D, T, h, w)`, quantizing them first unless `force_not_quantize`.

        `shape` is VQModel's and not needed here. A tuple holds the picture and the commitment loss.
        """
        if h.ndim not in (4, 5) or h.shape[1] != self.config["vq_embed_dim"] or 0 in h.shape:
            raise WaltError(
                f"latents must be (B, {self.config['vq_embed_dim']}, h, w) or (B, {self.config['vq_embed_dim']}, T, h, w), "
                f"got shape {tuple(h.shape)}"
            )
        z = h if h.ndim == 5 else h.unsqueeze(2)
        loss = torch.zeros((), device=h.device, dtype=torch.float32)
        if not force_not_quantize:
            quantized = self.quantize(z)
            z, loss = quantized.z, quantized.losses["commitment"]
        x = self._decode(z)
        x = x if h.ndim == 5 else x[:, :, 0]
        return DecoderOutput(sample=x, commit_loss=loss) if return_dict else (x, loss)

    def forward(self, sample: Tensor, noise: None = None, return_dict: bool = True) -> Any:
        """Reconstructs pictures or videos; with `return_dict=False` training gets `(reconstruction, Quantized)`."""
        if noise is not None:
            raise WaltError("noise: codes take none")
        quantized = self.quantize(self._encode(self._as_channels(sample)))
        x = self._decode(quantized.z)
        x = x if _is_video(sample) else x[:, :, 0]
        if return_dict:
            return DecoderOutput(sample=x, commit_loss=quantized.losses["commitment"])
        return x, quantized

    # -- tokens ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_indices(self, x: Tensor) -> Tensor:
        """Codes int64 `(B, h, w)` of pictures or `(B, T, h, w)` of videos, each in `0..vocab_size-1`."""
        indices = self.quantize.latents_to_indices(self._encode(self._check_input(x)))
        return indices if _is_video(x) else indices[:, 0]

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Pictures `(B, C, H, W)` of codes `(B, h, w)`, videos `(B, C, T, H, W)` of `(B, T, h, w)`.

        In [-1, 1]; with `segmentation` class logits, whose argmax over C is the map.
        """
        if indices.ndim not in (3, 4) or 0 in indices.shape:
            raise WaltError(f"indices must be (B, h, w) or (B, T, h, w), got shape {tuple(indices.shape)}")
        codes = self.quantize.indices_to_codes(indices if indices.ndim == 4 else indices.unsqueeze(1))
        x = self._decode(codes.to(self.decoder.conv_in.weight.dtype))
        x = x if indices.ndim == 4 else x[:, :, 0]
        return x if self.config["segmentation"] else x.clamp(-1.0, 1.0)

    # -- start of training -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_block_shortcut(self, videos: Iterable[Tensor]) -> None:
        """Puts the principal components of `videos` into the block shortcut, and their k-means into the codebook.

        Afterwards the model is the best linear code of blocks of F x F pixels (F the spatial ratio) behind a codebook
        that is the k-means of these blocks' pixels, as far as `vq_embed_dim` components hold them; with
        `shortcut_overlap` the decoder's map is the best linear one (least squares) of the codes around a block. The
        networks say nothing yet.

        Args:
            videos: batches `(B, 3, T, H, W)` in [-1, 1] or class maps `(B, T, H, W)`.

        Raises:
            WaltError: no block shortcut, fewer blocks than codes, or a code wider than a block has values.
        """
        encode, decode = self.encoder.shortcut, self.decoder.shortcut
        if encode is None or decode is None:
            raise WaltError("fit_block_shortcut needs a model with block_shortcut=True")
        features, values = int(self.config["vq_embed_dim"]), encode.first.in_features
        if features > values:
            raise WaltError(f"vq_embed_dim: {features} given, a block has {values} values, which block_shortcut allows")
        frames = [
            self.patcher.split(rearrange(self._as_channels(video), "b c t h w -> (b t) c h w")).unsqueeze(2)
            for video in videos
        ]
        rows = torch.cat([encode.pack(part, 1).flatten(0, 3) for part in frames]).float()
        mean = rows.mean(dim=0)
        variance, vectors = torch.linalg.eigh(torch.cov((rows - mean).double().T))
        basis = vectors[:, -features:].flip(1).float()
        # One scale for all components: distances between codes stay distances between pixels.
        scale = float(variance[-features:].mean().clamp_min(1e-12).sqrt())
        encode.first.weight.copy_(basis.T / scale)
        cast(Tensor, encode.first.bias).copy_(-(basis.T @ mean) / scale)
        self.encoder.silence()
        self.decoder.silence()
        self.quantize.fit((rows - mean) @ basis / scale)
        if isinstance(decode, LappedProjection):
            self._fit_lapped(decode, frames)
        else:
            decode.first.weight.copy_(basis * scale)
            cast(Tensor, decode.first.bias).copy_(mean)

    def _fit_lapped(self, decode: LappedProjection, frames: Iterable[Tensor]) -> None:
        """The least-squares map of a code's neighbourhood to its block."""
        encode = cast(BlockProjection, self.encoder.shortcut)
        square = cross = torch.zeros((), dtype=torch.float64)
        for part in frames:
            latents = self.encoder(part)[0]
            codes = self.quantize.indices_to_codes(self.quantize.latents_to_indices(latents))
            ((_, bordered, _),) = decode.parts(codes, None)
            kernel = decode.first.kernel_size[1]
            read = F.unfold(bordered[:, :, 0], kernel).transpose(1, 2).flatten(0, 1).double()
            read = torch.cat([read, read.new_ones(len(read), 1)], dim=1)
            wanted = encode.pack(part, 1).flatten(0, 3).double()
            square, cross = square + read.T @ read, cross + read.T @ wanted
        # A trace of ridge: codes that are never neighbours must not divide by zero.
        square.diagonal().add_(1e-6 * square.diagonal().mean())
        solution = torch.linalg.solve(square, cross)
        decode.first.weight.copy_(solution[:-1].T.reshape(decode.first.weight.shape))
        cast(Tensor, decode.first.bias).copy_(solution[-1])

    # -- inside ------------------------------------------------------------------------------------------------------

    def _encode(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, D, T, h, w)`, the frames as a batch."""
        frames = self.patcher.split(rearrange(x, "b c t h w -> (b t) c h w"))
        latents = cast(Tensor, self.encoder(frames.unsqueeze(2))[0])
        return rearrange(latents[:, :, 0], "(b t) d h w -> b d t h w", b=len(x))

    def _decode(self, z: Tensor) -> Tensor:
        frames = self.decoder(rearrange(z, "b d t h w -> (b t) d 1 h w"))[0]
        return rearrange(self.patcher.join(frames[:, :, 0]), "(b t) c h w -> b c t h w", b=len(z))

    def _as_channels(self, x: Tensor) -> Tensor:
        """Any allowed input as `(B, C, T, H, W)` in the model's dtype."""
        classes, dtype = self.config["in_channels"], self.encoder.conv_in.weight.dtype
        if not x.is_floating_point():
            x = F.one_hot(x.long(), classes).movedim(-1, 1)
        x = x if x.ndim == 5 else x.unsqueeze(2)
        return x.to(dtype)

    def _check_input(self, x: Tensor) -> Tensor:
        """`_as_channels` of an input that a user gave."""
        channels, s = self.config["in_channels"], self.spatial_compression_ratio
        if self.config["segmentation"] and not x.is_floating_point():
            if x.ndim not in (3, 4) or 0 in x.shape:
                raise WaltError(f"class maps must be integers (B, H, W) or (B, T, H, W), got shape {tuple(x.shape)}")
            low, high = (int(v) for v in torch.aminmax(x))
            if low < 0 or high >= channels:
                raise WaltError(
                    f"class maps: class {low if low < 0 else high} is not known; there are 0 to {channels - 1}"
                )
        else:
            if x.ndim not in (4, 5) or x.shape[1] != channels or 0 in x.shape:
                raise WaltError(
                    f"pictures must be (B, {channels}, H, W) or (B, {channels}, T, H, W), got shape {tuple(x.shape)}"
                )
            if not x.is_floating_point():
                raise WaltError(f"pictures must be floats in [-1, 1], got {x.dtype}")
            least, most = (float(v) for v in torch.aminmax(x.detach()))
            if not (least >= -1.5 and most <= 1.5):  # false for nan too
                what = "nan" if least != least or most != most else f"{least:g}..{most:g}"
                raise WaltError(f"pictures must be in [-1, 1], got {what}")
        if x.shape[-2] % s or x.shape[-1] % s:
            raise WaltError(f"picture height and width must be multiples of {s}, got {x.shape[-2]}x{x.shape[-1]}")
        return self._as_channels(x)


def _is_video(x: Tensor) -> bool:
    """`(B, C, T, H, W)`, or class numbers `(B, T, H, W)`."""
    return x.ndim == 5 or (x.ndim == 4 and not x.is_floating_point())
