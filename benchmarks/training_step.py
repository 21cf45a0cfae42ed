"""Times training steps of W.A.L.T.-L on a GPU: compiled, in bfloat16, over the matrix rate of its datasheet and of the card.

A step is forward, backward and a fused AdamW update of the paper's L model (Table 8: 24 layers of 1024, windows 8x8 over
all frames every other layer, AdaLN-LoRA of rank 2) with rotary positions, as the relative bias needs a kernel that takes
a mask. "autocast" is `walt train` with precision bf16: float32 weights, bfloat16 products; "bf16" has bfloat16 weights and
float32 masters of them in the optimizer. Model FLOPs are three times those of a forward pass's matrix products, attention
as the windows compute it; what a backward pass computes again is not counted. The blocks are compiled, each kind once.

Then windowed against full attention at 5x64x112, and the attention backends on the window plans of both.

    python benchmarks/training_step.py                 two minutes of an H100, most of them compilation
    python benchmarks/training_step.py --device cpu    the same lines of a tiny model, to rehearse
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from measure import Goal, finish, matmul_rate, median_seconds
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from walt.attention import WindowPlan, plan_windows, window_attention
from walt.configs.walt import ucf101_l
from walt.latents import Grid
from walt.models.transformer_walt import WaltTransformer3DModel

DATASHEET = 989e12  # FLOP/s of an H100 or H200 SXM in dense bfloat16
GOALS = (0.45, 0.55)  # over the datasheet, over the measured matrix product


class Bench:
    """The card, what the rows share, and the clock they must keep to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device: str = args.device
        self.small = not self.device.startswith("cuda")
        self.until = time.perf_counter() + args.seconds
        self.repeats = 2 if self.small else args.repeats
        self.rate = matmul_rate(torch.bfloat16, self.device)

    def late(self, name: str) -> bool:
        """Whether the time is up; says what it leaves out."""
        if time.perf_counter() < self.until:
            return False
        print(f"{name}: left out, the time is up", flush=True)
        return True

    def config(self, **fields: Any) -> dict[str, Any]:
        small = {"num_layers": 4, "num_attention_heads": 2} if self.small else {}
        return {**ucf101_l(), "relative_positions": "rope", **small, **fields}

    def model(self, half: bool, **fields: Any) -> WaltTransformer3DModel:
        with torch.device(self.device):
            model = WaltTransformer3DModel(**self.config(**fields))
        return torch.nn.Module.to(model, torch.bfloat16) if half else model

    def flops(self, config: dict[str, Any], full: bool = False) -> float:
        """Of the matrix products of one sample's forward pass."""
        with torch.device(self.device):
            model = WaltTransformer3DModel(**config)
        if full:
            model._spatial = (None, None, None)
        counted = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
                q, k, v
            )
        }
        size = config["sample_size"]
        inputs = torch.zeros(1, config["in_channels"], *size, device=self.device)
        labels = torch.zeros(1, dtype=torch.int64, device=self.device)
        half = torch.autocast(self.device.partition(":")[0], torch.bfloat16)
        # Windows as the batch of torch's own kernel, which the counter knows.
        counter = FlopCounterMode(display=False, custom_mapping=counted)
        with torch.no_grad(), half, attention_backend("walt_windows"), counter:
            model(inputs, labels.float(), class_labels=labels)
        return float(counter.get_total_flops())

    def release(self) -> None:
        """Frees what the last row held."""
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        return "-" if self.small else f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def trainer(model: WaltTransformer3DModel, batch: int, half: bool, device: str) -> Callable[[], None]:
    """A training step on random data."""
    config = model.config
    weights = list(model.parameters())
    masters = [w.detach().float() for w in weights] if half else weights
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    dtype = torch.bfloat16 if half else torch.float32
    latents = torch.randn(batch, config.in_channels, *config.sample_size, device=device, dtype=dtype)
    target = torch.randn_like(latents)
    timestep = torch.rand(batch, device=device) * 999
    labels = torch.randint(config.num_classes, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=not half):
            out = model(latents, timestep, class_labels=labels, return_dict=False)[0]
        (out.float() - target.float()).square().mean().backward()
        with torch.no_grad():
            if half:
                for master, weight in zip(masters, weights, strict=True):
                    master.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            if half:
                torch._foreach_copy_(weights, masters)
            for weight in (*weights, *masters):
                weight.grad = None

    return step


def tried(name: str, bench: Bench, run: Callable[[], float]) -> float | None:
    """Seconds, or None where the row fails: the rest goes on."""
    start = time.perf_counter()
    try:
        return run()
    except Exception as error:  # out of memory, a kernel that is not there
        text = str(error).strip().partition("\n")[0][:300]
        print(f"{name}: FAILED after {time.perf_counter() - start:.0f} s, {type(error).__name__}: {text}", flush=True)
        return None


def steps(bench: Bench, batches: list[int]) -> list[Goal]:
    """W.A.L.T.-L at 5x16x16, patch 1."""
    flops = 3 * bench.flops(bench.config())
    print(f"W.A.L.T.-L, 5x16x16 latents: {flops / 1e12:.3f} TFLOP a sample and step", flush=True)
    best: tuple[float, str] = (0.0, "")
    rows = [(batches[0], False), (batches[0], True), *((n, half) for n in batches[1:] for half in (True, False))]
    for batch, half in rows:
        name = f"batch {batch} ({batch * 1280} tokens), {'bf16' if half else 'autocast'}"
        if bench.late(name):
            continue
        start = time.perf_counter()

        def measured(batch: int = batch, half: bool = half) -> float:
            model = bench.model(half)
            if not bench.small:
                model.compile_repeated_blocks(fullgraph=True)
            return median_seconds(trainer(model, batch, half, bench.device), bench.repeats, 3, bench.device)

        seconds = tried(name, bench, measured)
        if seconds is not None:
            achieved = flops * batch / seconds
            print(
                f"{name}: {seconds * 1e3:.1f} ms a step, {batch * 1280 / seconds:.0f} tokens/s, {achieved / 1e12:.0f} "
                f"TFLOP/s, {achieved / DATASHEET:.1%} of the datasheet, {achieved / bench.rate:.1%} of the product; "
                f"peak {bench.peak()}, {time.perf_counter() - start:.0f} s in all",
                flush=True,
            )
            best = max(best, (achieved, name))
        bench.release()
    share, name = best
    return [
        Goal(
            f"W.A.L.T.-L training step, model FLOP/s over {DATASHEET / 1e12:.0f} TFLOP/s [{name}]",
            share / DATASHEET,
            GOALS[0],
        ),
        Goal(
            f"W.A.L.T.-L training step, model FLOP/s over the matrix product's [{name}]", share / bench.rate, GOALS[1]
        ),
    ]


def windowed_and_full(bench: Bench, patches: list[int]) -> list[Goal]:
    """One sample of 5x64x112, forward and backward."""
    goals = []
    size = (5, 16, 28) if bench.small else (5, 64, 112)
    for patch in patches:
        seconds: dict[str, float | None] = {}
        fields = {"sample_size": size, "patch_size": patch}
        tokens = size[0] * size[1] * size[2] // patch**2
        for kind in ("windowed", "full"):
            windows = {"spatial_window": (16, 28), "spatiotemporal_window": (8, 14)} if kind == "windowed" else {}
            windows = windows or {"spatial_window": None, "spatiotemporal_window": None}
            name = f"5x{size[1]}x{size[2]} patch {patch} ({tokens} tokens) {kind}"
            if bench.late(name):
                continue

            def measured(kind: str = kind, given: dict[str, Any] = {**fields, **windows}) -> float:  # noqa: B006
                model = bench.model(True, **given)
                if kind == "full":  # every layer over everything
                    model._spatial = (None, None, None)
                if not bench.small:
                    model.compile_repeated_blocks(fullgraph=True)
                latents = torch.randn(1, model.config.in_channels, *size, device=bench.device, dtype=torch.bfloat16)
                time_, labels = (
                    torch.full((1,), 500.0, device=bench.device),
                    torch.zeros(1, dtype=torch.int64, device=bench.device),
                )

                def run() -> None:
                    model(latents, time_, class_labels=labels).sample.float().square().mean().backward()
                    for weight in model.parameters():
                        weight.grad = None

                return median_seconds(run, 5 if not bench.small else 1, 2, bench.device)

            found = seconds[kind] = tried(name, bench, measured)
            if found is not None:
                flops = 3 * bench.flops(bench.config(**fields, **windows), kind == "full")
                print(
                    f"{name}: {found * 1e3:.1f} ms forward + backward, {flops / found / 1e12:.0f} TFLOP/s "
                    f"({flops / 1e12:.1f} TFLOP), peak {bench.peak()}",
                    flush=True,
                )
            bench.release()
        own, other = seconds.get("windowed"), seconds.get("full")
        if own is not None and other is not None:
            goals.append(
                Goal(f"5x{size[1]}x{size[2]} patch {patch}, full / windowed, forward + backward", other / own, 1.0)
            )
    return goals


def backends(bench: Bench) -> None:
    """Attention alone, forward and backward, on the plans of a step; 16 heads of 64."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    few = 1 if bench.small else 32
    mixed: tuple[Grid, ...] = ((5, 16, 16),) * few + ((1, 16, 16), (5, 16, 12), (1, 12, 16)) * (few // 4 + 1)
    plans: dict[str, WindowPlan] = {
        "frames of 16x16": plan_windows(((5, 16, 16),) * few, (1, None, None)),
        "5x8x8 windows, shifted, mixed pack": plan_windows(mixed, (None, 8, 8), (0, 4, 4), identity_images=True),
    }
    for what, plan in plans.items():
        placed = plan.to(bench.device)
        heads = 2 if bench.small else 16
        first = plan.singles
        q, k, v = torch.randn(3, plan.tokens, heads, 64, device=bench.device, dtype=torch.bfloat16)
        inputs = [x.detach().clone().requires_grad_() for x in (q[first:], k[first:], v)]
        flops = 3.5 * sum(4.0 * g.windows * g.length**2 * heads * 64 for g in plan.groups)
        grad = torch.randn(plan.tokens, heads, 64, device=bench.device, dtype=torch.bfloat16)
        for name in ("walt_windows", "walt_windows, cuDNN", "walt_varlen", "flex", "compiled operator"):
            if bench.late(f"{what}, {name}"):
                continue

            def measured(name: str = name, plan: WindowPlan = placed, inputs: Any = inputs, grad: Any = grad) -> float:
                def attend(*inputs: torch.Tensor) -> torch.Tensor:
                    return window_attention(*inputs, plan)

                call = attend
                if name == "compiled operator":
                    call = torch.compile(attend, backend="aot_eager", fullgraph=True)

                def run() -> None:
                    torch.autograd.grad(call(*inputs), inputs, grad)

                if name == "compiled operator":
                    return median_seconds(run, bench.repeats, 3, bench.device)
                if name.endswith("cuDNN"):
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), attention_backend("walt_windows"):
                        return median_seconds(run, bench.repeats, 3, bench.device)
                with attention_backend(name):
                    return median_seconds(run, bench.repeats, 3, bench.device)

            seconds = tried(f"{what}, {name}", bench, measured)
            if seconds is not None:
                print(
                    f"{what}, {name}: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.0f} TFLOP/s (of 3.5 x forward)",
                    flush=True,
                )
        bench.release()


def main(given: list[str] | None = None) -> int:
    """Everything, by the arguments given, else those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help='"cpu": a tiny model')
    parser.add_argument(
        "--batches", default="32", help="samples of 5x16x16, comma-separated; the first is tried both ways"
    )
    parser.add_argument("--patches", default="2,1", help="patch sizes at 5x64x112")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=110.0, help="rows that would begin later are left out")
    parser.add_argument("--parts", default="steps,windows,backends")
    parser.add_argument("--json", help="write the goals to this file")
    args = parser.parse_args(given)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # each row's types and sizes are graphs of their own
    bench = Bench(args)
    batches = [2] if bench.small else [int(n) for n in args.batches.split(",")]
    if not bench.small:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"matrix product: {bench.rate / 1e12:.1f} TFLOP/s bfloat16", flush=True)
    goals = []
    parts = args.parts.split(",")
    if "steps" in parts:
        goals += steps(bench, batches)
    if "windows" in parts:
        goals += windowed_and_full(bench, [int(n) for n in args.patches.split(",")])
    if "backends" in parts:
        backends(bench)
    return finish(goals, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
