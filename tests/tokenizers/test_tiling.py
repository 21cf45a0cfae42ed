"""Stripes, frames one by one, memory budgets: the result stays that of the whole clip; and what memory it takes."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tokenizers.test_autoencoder_kl_walt import CONFIGS, clip, make
from walt.errors import WaltError
from walt.heap import return_freed_memory
from walt.tokenizers import autoencoder_kl_walt
from walt.tokenizers.autoencoder_kl_walt import AutoencoderKLWalt

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def both(model: AutoencoderKLWalt, x: Tensor) -> tuple[Tensor, Tensor]:
    z = model.encode(x).latent_dist.mode()
    return z, model.decode(z).sample


@torch.no_grad()
@pytest.mark.parametrize("frames, height", [(1, 40), (9, 56)])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tiled_and_framewise_equal_whole(
    name: str, dtype: torch.dtype, tolerance: float, frames: int, height: int
) -> None:
    width = 16
    model, x = make(name).to(dtype), clip(frames, height, width).to(dtype)
    z, y = both(model, x)
    for tile in (8, 24):
        for framewise in (False, True):
            model.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=width)
            model.use_framewise_encoding = model.use_framewise_decoding = framewise
            assert (model.encode(x).latent_dist.mode() - z).abs().max() < tolerance
            assert (model.decode(z).sample - y).abs().max() < tolerance


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_tile_is_one_stripe_wherever_it_lies(name: str) -> None:
    """An input that differs in one row changes the stripes' result just as the whole frame's."""
    model, x = make(name), clip(5, 64, 16)
    changed = x.clone()
    changed[..., 31, :] *= -1
    whole = both(model, changed)[0] - both(model, x)[0]
    model.enable_tiling(8, 16)
    assert (both(model, changed)[0] - both(model, x)[0] - whole).abs().max() < 1e-12
    assert whole.abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "shrinkage", "shortcut"])
def test_a_stream_may_change_its_tiling(name: str) -> None:
    """The cache does not depend on the tiles, so they can be changed between any two chunks, both ways."""
    model, x = make(name), clip(17, 40, 24)
    z, y = both(model, x)
    tiles = [None, 8, 24, None, 16]
    caches: list[Any] = [None, None]
    latents, frames = [], []
    for part, piece, tile in zip(x.split([1, 4, 4, 4, 4], dim=2), z.split(1, dim=2), tiles, strict=True):
        model.disable_tiling()
        if tile is not None:
            model.enable_tiling(tile, 24)
        latent, caches[0] = model.encode_chunk(part, caches[0])
        frame, caches[1] = model.decode_chunk(piece, caches[1])
        latents.append(latent)
        frames.append(frame)
    assert (torch.cat(latents, dim=2) - z).abs().max() < 1e-12
    assert (torch.cat(frames, dim=2) - y).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("tiled", [False, True])
def test_interleaved_streams_and_an_exception_between(tiled: bool) -> None:
    """A cache is a value: it survives other streams, a failure in the middle of a layer, and being used twice."""
    model = make("paper")
    a, b = clip(9, 24, 16), clip(9, 24, 16).flip(2)
    za, zb = model.encode(a).latent_dist.mode(), model.encode(b).latent_dist.mode()
    if tiled:
        model.enable_tiling(8, 16)
    pieces: dict[str, list[Tensor]] = {"a": [], "b": []}
    caches: dict[str, Any] = {"a": None, "b": None}
    for part in range(3):
        frames = slice(0, 1) if part == 0 else slice(4 * part - 3, 4 * part + 1)
        for name, video in (("a", a), ("b", b)):
            before = caches[name]
            calls = 0

            def stop(*_: Any) -> None:
                nonlocal calls
                calls += 1
                if calls == (2 if tiled else 1):
                    raise RuntimeError("stop")

            handle = model.encoder.layers[3].register_forward_hook(stop)
            if part:
                with pytest.raises(RuntimeError, match="stop"):
                    model.encode_chunk(-video[:, :, frames], before)
            handle.remove()
            piece, caches[name] = model.encode_chunk(video[:, :, frames], before)
            again, _ = model.encode_chunk(video[:, :, frames], before)
            assert torch.equal(piece, again)
            pieces[name].append(piece)
    assert (torch.cat(pieces["a"], dim=2) - za).abs().max() < 1e-12
    assert (torch.cat(pieces["b"], dim=2) - zb).abs().max() < 1e-12


@torch.no_grad()
def test_decode_stream_yields_the_clip_piece_by_piece() -> None:
    model = make("patch4")
    z = model.encode(clip(17)).latent_dist.mode()
    pieces = list(model.decode_stream(z))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4, 4]
    assert (torch.cat(pieces, dim=2) - model.decode(z).sample).abs().max() < 1e-12
    model.tile_sample_min_num_frames = 8
    assert [piece.shape[2] for piece in model.decode_stream(z)] == [5, 8, 4]


@torch.no_grad()
def test_batches_slices_and_gradients() -> None:
    model = make("shrinkage")
    x = torch.cat([clip(5, 24, 16), clip(5, 24, 16).flip(4)])
    z, y = both(model, x)
    model.enable_tiling(8, 16)
    model.enable_slicing()
    model.use_framewise_decoding = True
    assert (both(model, x)[0] - z).abs().max() < 1e-12 and (both(model, x)[1] - y).abs().max() < 1e-12
    model.disable_slicing()
    grads = []
    with torch.enable_grad():
        for tiled in (False, True):
            model.use_tiling = tiled
            latent = z.clone().requires_grad_()
            model.decode(latent).sample.square().sum().backward()
            assert latent.grad is not None
            grads.append(latent.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-10)


@pytest.mark.parametrize("change", [{"norm": "group"}, {"adaptation": "global"}])
def test_statistics_over_the_clip_refuse(change: dict[str, str]) -> None:
    model = make("patch4", **change)
    with pytest.raises(WaltError, match="cannot tile: norm='group' and adaptation='global'"):
        model.enable_tiling()
    model.use_framewise_encoding = True
    with pytest.raises(WaltError, match="cannot encode or decode frame by frame"):
        model.encode(clip())


def test_bad_options() -> None:
    model = make("patch4")
    for name in ("tile_sample_min_height", "tile_sample_stride_width", "memory_budget"):
        with pytest.raises(WaltError, match=f"{name} must be at least 1, got 0"):
            model.enable_tiling(**{name: 0})
    assert not model.use_tiling


@torch.no_grad()
def test_a_budget_chooses_the_cheapest_way_that_fits() -> None:
    model, x = make("paper").float(), clip(17, 64, 32).float()
    z, y = both(model, x)
    plans = []
    for budget in (2**34, 5_340_000, 1_840_000, 1_040_000):
        model.enable_tiling(memory_budget=budget)
        plan = model._plan(model.decoder, 1, 5, (64, 32), z)
        plans.append((plan.rows, plan.frames))
        assert (model.decode(z).sample - y).abs().max() < 1e-5
        assert (model.encode(x).latent_dist.mode() - z).abs().max() < 1e-5
    assert plans[0] == (None, None)
    rows = [8 if rows is None else rows for rows, _ in plans]
    assert rows == sorted(rows, reverse=True) and len(set(plans)) == 4
    model.enable_tiling(memory_budget=1000)
    with pytest.raises(
        WaltError, match="memory_budget: 1000 bytes given, 5 latents of 64x32 pixels need at least about"
    ):
        model.decode(z)


# -- values ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bad_values() -> None:
    model = make("patch4", latents_mean=(1.0,) * 8, latents_std=(2.0,) * 8)
    x = clip(5)
    z = model.encode(x).latent_dist.mode()
    spoiled = x.clone()
    spoiled[0, 0, 2, 3, 4] = float("nan")
    for bad, words in (
        (spoiled, "video must be finite"),
        ((x + 1) * 127.5, r"video must lie in \[-1, 1\], got .* convert 0\.\.255"),
        (torch.zeros(1, 3, 5, 16, 24, dtype=torch.uint8), r"floating point in \[-1, 1\], got torch\.uint8"),
    ):
        for call in (model.encode, model, model.encode_chunk):
            with pytest.raises(WaltError, match=words):
                call(bad)
    for bad, words in ((z / 0, "latents must be finite"), (z * 1e5, "another model, or scaled"), (z.int(), "floating")):
        for call in (model.decode, model.decode_chunk):
            with pytest.raises(WaltError, match=words):
                call(bad)
    model.encode(x * 1.2)  # what resampling overshoots
    model.check_values = False
    model.encode(spoiled)
    assert torch.empty(1, 3, 5, 16, 24, device="meta").dtype and model._looks(x) is False
    model.check_values = None
    assert model._looks(x) is True and model._looks(torch.empty(1, device="meta")) is False


# -- memory: of tensors, operation by operation ---------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once. What an operation takes inside does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self.users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given} - self.users.keys()
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and all(x is not y for y in given):
                storage = x.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in known:
                    self.now += 0 if self.users[place] else size
                    self.users[place] += 1
                    weakref.finalize(x, self._drop, place, size)
        self.most = max(self.most, self.now)
        return made

    def _drop(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.now -= size


def most_held(work: Callable[[], Tensor]) -> int:
    """Bytes of tensors beside the result."""
    with Held() as held:
        made = work()
    return held.most - made.nbytes


def most_of_both(model: AutoencoderKLWalt, x: Tensor, z: Tensor) -> tuple[int, int]:
    """`most_held` of encoding x and of decoding z."""
    return most_held(lambda: model.encode(x).latent_dist.mode()), most_held(lambda: model.decode(z).sample)


def clips_and_latents(lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for latents in lengths:
        generator = torch.Generator().manual_seed(latents)
        x = torch.rand(1, 3, 4 * latents - 3, 64, 48, generator=generator)
        yield x, torch.randn(1, 8, latents, 8, 6, generator=generator)


def size_of(cache: Any) -> int:
    """Bytes; a layer without a past has None."""
    return cache.nbytes if isinstance(cache, Tensor) else sum(map(size_of, cache or ()))


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 8])
@pytest.mark.parametrize("name", ["paper", "patch4", "mixing"])
def test_frame_by_frame_holds_no_more_however_long_the_clip(name: str, rows: int | None) -> None:
    """One latent's work and one cache of the convolutions: not the old and the new together, and no list of pieces."""
    model = make(name, layers_per_block=3).float()
    if rows is not None:
        model.enable_tiling(rows, 48)
    model.use_framewise_encoding = model.use_framewise_decoding = True
    held = [most_of_both(model, x, z) for x, z in clips_and_latents((5, 9, 17))]
    assert held[0][1] == held[1][1] == held[2][1]
    # The latents are there twice: a distribution has mean and variance.
    latent = 8 * 8 * 6 * 4
    assert held[2][0] - held[1][0] <= 2 * 8 * latent
    x, z = next(clips_and_latents((5,)))
    if name == "paper":  # in which the caches weigh most; with two of them 2.7 and 3.0 times one
        assert held[0][0] < 2.5 * size_of(model.encode_chunk(x)[1])
        assert held[0][1] < 2.5 * size_of(model.decode_chunk(z)[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "patch4", "mixing"])
def test_a_long_clip_takes_no_more_than_17_frames_without_any_switch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the result is that of the whole clip; with gradients, and where it cannot be cut, the clip stays whole."""
    monkeypatch.setattr(autoencoder_kl_walt, "WHOLE_BYTES", 0)
    model = make(name, layers_per_block=2)
    (x, z), (long_x, long_z) = ((x.double(), z.double()) for x, z in clips_and_latents((5, 17)))
    most, long = most_of_both(model, x, z), most_of_both(model, long_x, long_z)
    assert long[0] <= most[0] and long[1] <= most[1]
    cut = both(model, long_x)
    model.enable_tiling(memory_budget=2**40)
    assert most_held(lambda: model.decode(long_z).sample) > 2 * most[1]
    for part, whole in zip(cut, both(model, long_x), strict=True):
        assert (part - whole).abs().max() < 1e-12
    model.disable_tiling()
    for network in (model.encoder, model.decoder):
        assert model._may_cut(network)
        with torch.enable_grad():
            assert not model._may_cut(network)
        assert not model._may_cut(cast(Any, torch.compile(network)))
    assert not make("paper", norm="group")._may_cut(model.decoder)


def test_slices_are_written_into_one_output() -> None:
    model = make("patch4").float()
    z = torch.randn(6, 8, 2, 8, 6)
    model.enable_slicing()
    with torch.no_grad():
        one = most_held(lambda: model.decode(z[:1]).sample)
        made = model.decode(z).sample
        assert most_held(lambda: model.decode(z).sample) <= one + made[:1].nbytes
    model.disable_slicing()
    with torch.no_grad():
        assert (model.decode(z).sample - made).abs().max() < 1e-5


# -- memory: of a child process, so that what others freed does not hide it --------------------------------------------


def peak(work: Callable[[], object]) -> int:
    """Bytes that `work` takes above what its process held before."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        work()
        send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)

    # Before the fork: what is reused would not count, and a child's peak begins at all that its parent holds.
    gc.collect()
    return_freed_memory()
    process = context.Process(target=child)
    process.start()
    send.close()
    value = int(receive.recv())
    process.join()
    return value


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_of_many_frames_and_of_high_frames() -> None:
    """65 frames in the memory of 17, output aside; and stripes in a fraction of the whole."""
    torch.manual_seed(0)
    model = AutoencoderKLWalt(encoder_widths=(8, 8, 8, 8), decoder_widths=(32, 32, 16, 16), layers_per_block=1).eval()
    generator = torch.Generator().manual_seed(0)
    short = torch.randn(1, 8, 5, 24, 24, generator=generator)
    long = torch.randn(1, 8, 17, 24, 24, generator=generator)
    size = 192 * 192 * 3 * 4

    def decode(z: Tensor) -> Callable[[], object]:
        return lambda: model.decode(z).sample

    whole = peak(decode(short)) - 17 * size
    model.use_framewise_decoding = True
    framewise = peak(decode(long)) - 65 * size
    assert framewise < whole
    model.enable_tiling(8, 192)
    tiled = peak(decode(long)) - 65 * size
    assert tiled < framewise
    model.use_framewise_decoding = False
    assert peak(decode(short)) - 17 * size < 0.5 * whole


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["patch4"])
def test_encoder_and_decoder_compile_without_a_break(name: str) -> None:
    model, x = make(name).float(), clip(5, 16, 16).float()
    z, y = both(model, x)
    model.encoder, model.decoder = (torch.compile(part, fullgraph=True) for part in (model.encoder, model.decoder))
    assert (model.encode(x).latent_dist.mode() - z).abs().max() < 1e-5
    assert (model.decode(z).sample - y).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_decoder_are_one_graph(name: str) -> None:
    """No break in whole clips nor in chunks (the eager backend: the graph alone, without a compiler)."""
    torch._dynamo.reset()
    model, x = make(name), clip(5, 16, 16)
    z, y = both(model, x)
    forward = torch.compile(
        lambda v: model.decoder(model.encoder(model.patcher.split(v, True))[0])[0], fullgraph=True, backend="eager"
    )
    assert (model.patcher.join(forward(x), True) - y).abs().max() < 1e-12
    _, cache = model.decode_chunk(z[:, :, :1])
    chunk = torch.compile(lambda v, past: model.decoder(v, past)[0], fullgraph=True, backend="eager")
    assert (model.patcher.join(chunk(z[:, :, 1:], cache), False) - y[:, :, 1:]).abs().max() < 1e-12


def test_checkpointing_is_where_diffusers_looks_for_it() -> None:
    """The set of classes with the switch, and equal gradients through encoder and decoder."""
    model = make("shortcut").train()
    model.enable_gradient_checkpointing()
    switched = {type(part).__name__ for part in model.modules() if getattr(part, "gradient_checkpointing", False)}
    assert switched == {"Encoder3d", "Decoder3d"} and model.is_gradient_checkpointing
    calls = 0
    original = model.decoder._gradient_checkpointing_func

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    model.decoder._gradient_checkpointing_func = counting
    model(clip(5)).sample.square().mean().backward()
    assert calls >= 8
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
