"""One rank of the tests of context parallelism: `python -m tests.conformance.rank RENDEZVOUS RANK RANKS`.

Every case is computed alone first, and then by all ranks together; what differs is an error.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig

from tests import tiny
from walt.attention import PlanShare, plan_windows, share_plan
from walt.models.transformer_walt import TextCache, WaltTransformer3DModel

SIZES = ((3, 4, 6), (1, 4, 4), (4, 6, 8), (1, 8, 2), (3, 4, 6))
CASES: dict[str, dict[str, Any]] = {
    "bias": {},
    "rope": {"relative_positions": "rope", "spatial_window": (3, 3)},
    "small windows": {"spatial_window": (3, 2), "spatiotemporal_window": (2, 3, 4), "cross_attention_window": "same"},
    "local mixing": {"local_mixing": True, "adaln_rank": None, "relative_positions": None},
}


def inputs(sizes: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": [torch.randn(8, *size, generator=g) for size in sizes],
        "timestep": torch.rand(len(sizes), generator=g) * 999,
        "encoder_hidden_states": [torch.randn(1 + k % 3, tiny.TEXT_DIM, generator=g) for k in range(len(sizes))],
    }


def compare(name: str, alone: Any, together: Any) -> None:
    worst = max(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True))
    assert worst < 1e-5, f"{name}: {worst}"


@torch.no_grad()
def main() -> None:
    rendezvous, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    for name, fields in CASES.items():
        for sizes in (SIZES, ((1, 3, 3), (1, 5, 1)), ((5, 4, 4),) * 2) if name == "rope" else (SIZES,):
            model = tiny.transformer(num_layers=4, sample_size=(3, 4, 6), **fields)
            given = inputs(sizes)
            alone = model(**given).sample
            if name == "rope":
                model.set_attention_backend("walt_blocked")
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
            compare(name, alone, model(**given).sample)
            cache = TextCache()
            for _ in range(1 + (name == "rope")):
                compare(f"{name}, text cache", alone, model(**given, text_cache=cache).sample)
    # Every rank really has its part alone.
    plan = plan_windows(((4, 8, 8),), (1, 4, 4))
    share = share_plan(plan, dist.group.WORLD)
    assert isinstance(share, PlanShare) and abs(share.tokens - plan.tokens / ranks) <= 16
    seen: list[int] = []
    feed_forward: Any = model.transformer_blocks[0].ff

    def look(module: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(len(arguments[0]))

    handle = feed_forward.net[2].register_forward_pre_hook(look)
    model(**inputs(SIZES))
    handle.remove()
    rows = sum(t * h * w for t, h, w in SIZES)
    assert seen == [-(-rows // ranks)], "the MLP's tokens are split"

    pipe = tiny.base_pipeline()
    call: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
    alone = pipe("a rocket flies", generator=tiny.seeded(0), **call).frames
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=ranks))
    compare("pipeline", alone, pipe("a rocket flies", generator=tiny.seeded(0), **call).frames)

    # As loaded, and a gradient for whoever asks for it.
    folder = f"{rendezvous}-model"
    if rank == 0:
        model = WaltTransformer3DModel.from_config(model.config)
        model.save_pretrained(folder)
    dist.barrier()
    model = WaltTransformer3DModel.from_pretrained(folder)
    alone = model(**given).sample
    loaded = WaltTransformer3DModel.from_pretrained(
        folder, parallel_config=ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ranks))
    )
    compare("from_pretrained", alone, loaded(**given).sample)
    with torch.enable_grad():
        torch.stack([v.square().sum() for v in loaded(**given).sample]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())
    dist.barrier()
    print("same")


if __name__ == "__main__":
    main()
