"""Times walt's denoiser, windowed and full, against diffusers' video transformers of equal width, depth and MLP ratio.

walt is class-conditional, as the paper's UCF-101 model; the peers, which cannot do without text, get as little as 16
states; "walt text" is walt with cross-attention to the same states, which the goals do not look at: the paper's
cross-attention reads the window's tokens beside the text, and so costs more than the peers' does. Equal width, depth and
MLP ratio, not equal parameters: AdaLN-LoRA saves many that cost no time. Weights are random. Windows are the paper's for
the grid (Tables 6 and 8): a frame of up to 16x28 tokens is one spatial window. On one thread of a CPU seconds are CPU
seconds, so that other load on the machine does not count.

    python benchmarks/denoiser.py --quick                    a minute: 5x16x16, forward
    python benchmarks/denoiser.py --latents 5x64x112:2 --layers 2 --repeats 2
    python benchmarks/denoiser.py --width 1024 --layers 2 --dtype bfloat16 --models "walt windowed"
    python benchmarks/denoiser.py                            on a GPU: training steps of W.A.L.T.-L (training_step.py)
    python benchmarks/denoiser.py --plot docs/step_time.png  step time against tokens, windowed and full, in both types
bfloat16 (--dtype bfloat16) means something only where the processor has matrix units for it; elsewhere it is emulated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training_step
from measure import Goal, finish, interleaved, matmul_rate, own_clock, peak_memory
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from walt.models.transformer_walt import WaltTransformer3DModel

HEAD = 64
CHANNELS = 8
TEXT = 16  # states of the models that need text
GOALS = {  # (peer or None for the fastest, ratio) by latents and dtype
    ("5x64x112:2", "float32"): {"cogvideox": 1.8, "wan": 1.8, "latte": 1.0},
    ("5x64x112:2", "bfloat16"): {"cogvideox": 4.0, "wan": 4.0, "latte": 1.5},
    ("5x16x16:1", "float32"): {None: 1.15},
    ("5x16x16:1", "bfloat16"): {None: 1.5},
}


class Setting:
    """Models and inputs of one latent size; a model is built when first asked for."""

    def __init__(self, latents: str, layers: int, width: int, dtype: torch.dtype, device: str) -> None:
        size, patch = latents.split(":")
        self.t, self.h, self.w = (int(n) for n in size.split("x"))
        self.patch, self.layers, self.heads = int(patch), layers, width // HEAD
        self.dtype, self.device, self.width = dtype, device, width
        self.rows, self.columns = self.h // self.patch, self.w // self.patch
        self.tokens = self.t * self.rows * self.columns

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def models(self) -> dict[str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]]:
        return {
            "walt windowed": lambda: self.walt(True, False),
            "walt full": lambda: self.walt(False, False),
            "walt text": lambda: self.walt(True, True),
            "latte": self.latte,
            "cogvideox": self.cogvideox,
            "wan": self.wan,
        }

    def walt(self, windowed: bool, text: bool) -> tuple[torch.nn.Module, dict[str, Any]]:
        wide = self.columns > self.rows
        frame = (16, 28) if wide else (16, 16)
        spatial = frame if self.rows > frame[0] or self.columns > frame[1] else None
        model = WaltTransformer3DModel(
            CHANNELS,
            CHANNELS,
            self.patch,
            self.layers,
            self.heads,
            HEAD,
            text_dim=self.width if text else None,
            num_classes=None if text else 101,
            sample_size=(self.t, self.h, self.w),
            relative_positions="rope",
            spatial_window=spatial if windowed else None,
            spatiotemporal_window=((8, 14) if wide else (8, 8)) if windowed else None,
            self_conditioning=False,
            frame_conditioning=False,
        )
        if not windowed:  # every layer over everything
            model._spatial = (None, None, None)
        given: dict[str, Any] = {"hidden_states": self.random(1, CHANNELS, self.t, self.h, self.w)}
        if text:
            given["encoder_hidden_states"] = self.random(1, TEXT, self.width)
        else:
            given["class_labels"] = torch.tensor([3], device=self.device)
        return model, given

    def latte(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        from diffusers import LatteTransformer3DModel

        model = LatteTransformer3DModel(
            self.heads,
            HEAD,
            CHANNELS,
            CHANNELS,
            num_layers=self.layers // 2,  # of them there are pairs, spatial and temporal
            attention_bias=True,
            sample_size=max(self.h, self.w),
            patch_size=self.patch,
            activation_fn="gelu-approximate",
            cross_attention_dim=self.width,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            num_embeds_ada_norm=1000,
            caption_channels=self.width,
            video_length=self.t,
        )
        # Its table is square; the frame is cut out of it.
        table = model.pos_embed.pos_embed.unflatten(1, (max(self.h, self.w) // self.patch, -1))
        model.pos_embed.pos_embed = table[:, : self.rows, : self.columns].flatten(1, 2)
        model.pos_embed.height, model.pos_embed.width = self.rows, self.columns
        latents = self.random(1, CHANNELS, self.t, self.h, self.w)
        return model, {"hidden_states": latents, "encoder_hidden_states": self.random(1, TEXT, self.width)}

    def cogvideox(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        from diffusers import CogVideoXTransformer3DModel

        model = CogVideoXTransformer3DModel(
            self.heads,
            HEAD,
            CHANNELS,
            CHANNELS,
            time_embed_dim=self.width,
            text_embed_dim=self.width,
            num_layers=self.layers,
            sample_width=self.w,
            sample_height=self.h,
            sample_frames=(self.t - 1) * 4 + 1,
            patch_size=self.patch,
            max_text_seq_length=TEXT,
            spatial_interpolation_scale=1.0,
        )
        latents = self.random(1, self.t, CHANNELS, self.h, self.w)
        return model, {"hidden_states": latents, "encoder_hidden_states": self.random(1, TEXT, self.width)}

    def wan(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(
            (1, self.patch, self.patch),
            self.heads,
            HEAD,
            CHANNELS,
            CHANNELS,
            text_dim=self.width,
            ffn_dim=4 * self.width,
            num_layers=self.layers,
        )
        latents = self.random(1, CHANNELS, self.t, self.h, self.w)
        return model, {"hidden_states": latents, "encoder_hidden_states": self.random(1, TEXT, self.width)}

    def step(self, name: str, backward: bool) -> tuple[Callable[[], object], float, float]:
        """A callable step, its parameters in millions, and the FLOPs of its matrix products, attention counted."""
        model, given = self.models()[name]()
        model = model.to(self.device)
        if self.dtype != torch.float32:
            model = model.to(self.dtype)
        given["timestep"] = torch.tensor([500], device=self.device)

        def forward() -> torch.Tensor:
            out: torch.Tensor = model(**given, return_dict=False)[0]
            return out

        def run() -> object:
            if not backward:
                with torch.no_grad():
                    return forward()
            forward().float().square().mean().backward()
            model.zero_grad()
            return None

        aten = torch.ops.aten
        kernels = {
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *a, **kw: (
                sdpa_backward_flop_count(g, q, k, v)
            ),
        }
        with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
            run()
        return run, sum(p.numel() for p in model.parameters()) / 1e6, float(counter.get_total_flops())


def compare(
    latents: str, names: list[str], args: argparse.Namespace, dtype: torch.dtype, backward: bool, rate: float
) -> list[Goal]:
    setting = Setting(latents, args.layers, args.width, dtype, args.device)
    steps = {name: setting.step(name, backward) for name in names}
    times = interleaved({name: run for name, (run, _, _) in steps.items()}, args.repeats, warmup=0, clock=own_clock())
    kind, number = ("forward + backward" if backward else "forward"), str(dtype).removeprefix("torch.")
    print(f"\nlatents {latents} ({setting.tokens} tokens), {args.layers} layers of {args.width}, {kind}, {number}")
    print(f"{'':16}{'params':>9}{'ms':>10}{'tokens/s':>10}{'GFLOP':>9}{'of matmul':>11}{'peak MiB':>10}")
    for name, (run, parameters, flops) in steps.items():
        memory = f"{peak_memory(run) / 2**20:10.0f}" if args.memory else f"{'-':>10}"
        seconds = times[name]
        print(
            f"{name:16}{parameters:8.1f}M{seconds * 1e3:10.1f}{setting.tokens / seconds:10.0f}{flops / 1e9:9.1f}"
            f"{flops / seconds / rate:11.0%}{memory}",
            flush=True,
        )
    own = times["walt windowed"]
    peers = {name: times[name] for name in names if name in ("latte", "cogvideox", "wan")}
    found = []
    if args.width == 1024 and number == "bfloat16" and not backward:
        share = steps["walt windowed"][2] / own / rate
        found.append(Goal(f"{latents} {number} {kind}, width 1024, walt windowed / matmul rate", share, 0.6))
    for peer, goal in GOALS.get((latents, number), {}).items():
        if peer is None and len(peers) == 3:
            found.append(
                Goal(f"{latents} {number} {kind}, fastest peer / walt windowed", min(peers.values()) / own, goal)
            )
        elif peer in peers:
            found.append(Goal(f"{latents} {number} {kind}, {peer} / walt windowed", peers[peer] / own, goal))
    return found


def plot(path: Path, args: argparse.Namespace) -> None:
    """Step time (forward and backward) against tokens, windowed and full."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[tuple[int, float]]] = {}
    for size in args.plot_sizes.split(","):
        runs, tokens = {}, 0
        for number in args.plot_dtypes.split(","):
            setting = Setting(f"{size}:1", args.layers, args.width, getattr(torch, number), args.device)
            tokens = setting.tokens
            runs |= {f"{name}, {number}": setting.step(name, True)[0] for name in ("walt windowed", "walt full")}
        for name, seconds in interleaved(runs, args.repeats, warmup=0, clock=own_clock()).items():
            curves.setdefault(name, []).append((tokens, seconds))
        print(size, tokens, {name: round(points[-1][1], 3) for name, points in curves.items()}, flush=True)
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="tokens", ylabel="seconds a training step", ylim=(0, None), xlim=(0, None))
    axes.set_title(f"{args.layers} layers of {args.width}, {torch.get_num_threads()} threads", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--latents", default="5x16x16:1,5x32x56:2,5x64x112:2", help="t x h x w : patch, comma-separated"
    )
    parser.add_argument("--models", default="walt windowed,walt full,walt text,latte,cogvideox,wan")
    parser.add_argument("--layers", type=int, default=8, help="even; 8 of width 512 are about 30M parameters")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backward", action="store_true", help="also forward + backward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also peak memory (one more step of each)")
    parser.add_argument(
        "--device", help="of the comparison; none given and a GPU there: benchmarks/training_step.py instead"
    )
    parser.add_argument("--quick", action="store_true", help="5x16x16 and the forward pass alone")
    parser.add_argument("--plot", type=Path, help="only draw step time against tokens to this PNG")
    parser.add_argument("--plot-sizes", default="5x8x8,5x16x16,5x24x24,5x32x32,5x40x40", help="latents, patch 1")
    parser.add_argument("--plot-dtypes", default="float32,bfloat16")
    parser.add_argument("--json", help="write the goals to this file")
    args = parser.parse_args()
    if args.device is None and args.plot is None and torch.cuda.is_available():
        return training_step.main([] if args.json is None else ["--json", args.json])
    args.device = args.device or "cpu"
    torch.manual_seed(0)
    if args.plot is not None:
        plot(args.plot, args)
        return 0
    dtype = getattr(torch, args.dtype)
    rate = matmul_rate(dtype, args.device)
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s {args.dtype}, {torch.get_num_threads()} threads")
    goals = []
    for latents in ("5x16x16:1",) if args.quick else args.latents.split(","):
        for backward in (False, True) if args.backward and not args.quick else (False,):
            goals += compare(latents, args.models.split(","), args, dtype, backward, rate)
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
