"""What a recipe will cost before it runs: parameters, memory of each rank, operations and seconds of a step.

Nothing of the recipe's data is needed. Operations and kept activations are counted on the meta device; seconds are the
operations over a rate that two layers of the very model reach here, with the pack's own sizes (narrow models are far
below the rate of a plain matrix product, wide ones near it), or over a rate that is given for another machine.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from walt.data.packing import fill_budget
from walt.errors import WaltError
from walt.linear import has_bfloat16_units
from walt.training.average import Average, PowerAverage
from walt.training.job import DenoiserJob, NuwaJob, OptimizerJob, RunJob, TokenizerJob
from walt.training.loop import Objective
from walt.training.optimizers import make_optimizer

Result = TypeVar("Result")
TEXT_LENGTH = 16  # text states per sample in a count: their share is small

# Dense peak FLOP/s in bfloat16 and float32 (without TF32's shorter mantissa), from the vendors' datasheets.
DATASHEETS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10": (125e12, 31.2e12),
}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device: from its datasheet, or of a timed matrix product where there is none."""
    from walt.evaluation.cost import measure_speed

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (half, full) in DATASHEETS.items():
            if part in name:
                return half if dtype == torch.bfloat16 else full
    return measure_speed(device, dtype, size=512)


class ForwardCounter:
    """Counts the floating-point operations of one forward pass per sample, on the meta device, once per size.

    Samples of a pack do not meet, so a pack's operations are the sum over its samples.

    Args:
        cls: a denoiser, a tokenizer or NUWA.
        config: its config.
    """

    def __init__(self, cls: type[Any], config: dict[str, Any]) -> None:
        self.cls, self.config = cls, config
        self.twin: Any = None
        self.counts: dict[tuple[int, ...], float] = {}

    def __call__(self, size: tuple[int, ...]) -> float:
        """Operations for one latent of grid `size` (t, h, w) of a denoiser, one video of (T, H, W) of a tokenizer, or one
        grid of tokens of NUWA with its condition: (s, h, w, 1) with a sketch, (s, h, w, 0) with a text."""
        if size not in self.counts:
            if self.twin is None:
                self.twin = meta_twin(self.cls, self.config).requires_grad_(False)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                meta_forward(self.twin, size)
            self.counts[size] = float(counter.get_total_flops())
        return self.counts[size]


def meta_twin(cls: type[Any], config: dict[str, Any]) -> Any:
    """A model without data; only its parameters are empty, as constructors may read buffers."""
    with init_empty_weights():
        twin = cls.from_config(dict(config))
    return twin.to("meta").eval()


def meta_forward(twin: Any, size: tuple[int, ...]) -> Any:
    """Runs a `meta_twin` on one sample of `size`; returns what it gives (NUWA: its loss, for which the logits are kept)."""
    config = twin.config
    with torch.device("meta"):
        if _is_nuwa(config):
            return _nuwa_loss(twin, [size])
        if _is_tokenizer(config):
            # What a quantizer does depends on values, which there are none of: networks alone, which are nearly all.
            video = torch.empty(1, config.in_channels, *size)
            if hasattr(config, "vq_embed_dim"):  # frame by frame, never without a quantizer
                return (twin._decode(twin._encode(video)),)
            quantizer, twin.quantize = twin.quantize, None
            try:
                return twin(video, return_dict=False)
            finally:
                twin.quantize = quantizer
        t, h, w = size
        given: dict[str, Any] = {}
        if config.text_dim is not None:
            given["encoder_hidden_states"] = [torch.empty(TEXT_LENGTH, config.text_dim)]
        if config.num_classes is not None:
            given["class_labels"] = torch.zeros(1, dtype=torch.long)
        if config.get("low_res_channels") is not None:
            scale = config.low_res_scale
            given["low_res_hidden_states"] = [torch.empty(config.low_res_channels, t, h // scale, w // scale)]
            given["low_res_noise_level"] = torch.zeros(1)
        return twin([torch.empty(config.in_channels, t, h, w)], torch.zeros(1), **given).sample


def _is_nuwa(config: Any) -> bool:
    return hasattr(config, "num_layers_decoder")


def _is_tokenizer(config: Any) -> bool:
    return hasattr(config, "encoder_widths")


def _nuwa_loss(model: Any, sizes: Sequence[tuple[int, ...]]) -> Tensor:
    """NUWA's loss on samples of one size `(s, h, w, sketched)`, on the default device."""
    config, (s, h, w, sketched) = model.config, sizes[0]
    more = (config.num_subcodes,) if config.num_subcodes > 1 else ()
    tokens = torch.zeros(len(sizes), s, h, w, *more, dtype=torch.long)
    given: dict[str, Any] = {}
    if sketched:
        given["sketch"] = torch.zeros(len(sizes), s, h, w, dtype=torch.long)
    elif config.text_dim is not None:
        given["text"] = [torch.zeros(TEXT_LENGTH, config.text_dim) for _ in sizes]
    logits = model(tokens, **given)
    return F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten())


@dataclass(frozen=True)
class Plan:
    """What `walt train RECIPE --dry-run` prints. Bytes are of one rank, seconds and tokens of one step."""

    parameters: int
    trained: int
    ranks: int
    packs: int  # per step, all ranks
    samples: float  # per step, all ranks: mean over packs
    tokens: float  # of denoisers and NUWA: per step, all ranks
    # weights, gradients, optimizer, average, activations; of codes the codebook's running means; of FSDP the gathered
    # block; all of a discriminator
    memory: dict[str, float]
    flops: float  # per step, all ranks
    matmul_rate: float | None  # of one rank, measured; None: a rate was given
    rate: float  # of one rank, as used
    # compute and optimizer; and data, where the recipe's own was seen: compute is then all that a step does with it
    seconds: dict[str, float]
    shards: list[tuple[str, int, int]]  # module, parameters, parameters on each rank

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


MEASURED_FLOPS = 1e11  # about as many operations are timed: a second or a few on a CPU core
MEASURED_SECONDS = 10.0  # after which a measurement is not repeated
PACKS = 16  # packs that a mean is taken over
REHEARSED = 3  # steps of a small recipe that are timed
REHEARSED_FLOPS = 1e12  # of a pack: what counts as small


def make_plan(
    job: DenoiserJob | TokenizerJob | NuwaJob,
    cls: type[Any],
    autoencoder: type[Any],
    ranks: int = 1,
    rate: float | None = None,
    build: Callable[[], Objective | None] | None = None,
    adversary: nn.Module | None = None,
) -> Plan:
    """Plans a recipe.

    Args:
        job: the recipe; of its files only the tokenizer's config is read, if it is there.
        cls: the class of its model.
        autoencoder: the class of its tokenizer.
        ranks: how many processes will train.
        rate: FLOP/s that a rank sustains on another machine; None: measured here.
        build: makes the recipe's objective where its files are there and its operations can be counted: a small one is
            then timed on its own data, with all that a step does beside the model. None: the model alone is.
        adversary: the discriminator of a recipe that has one, on the meta device.

    Raises:
        WaltError: packs that do not divide among the ranks.
    """
    packs = job.run.packs or ranks
    if packs % ranks:
        raise WaltError(f"run.packs: {packs} packs per step do not divide among {ranks} ranks")
    twin = _planned_twin(cls, job)
    counts = {name: p.numel() for name, p in twin.named_parameters()}
    trained = _trained(twin, job)
    sizes, cost, drawn = _packs(job, twin, autoencoder)
    samples = sum(map(len, drawn)) / PACKS
    counter = ForwardCounter(cls, dict(twin.config))
    forward = sum(counter(sizes[i]) for pack in drawn for i in pack) / PACKS
    passes = 3.0 + job.run.gradient_checkpointing
    if isinstance(job, DenoiserJob) and twin.config.self_conditioning:
        passes += job.diffusion.self_conditioning_probability
    flops = forward * passes * packs
    kept = [_activations(cls, twin, size, job) for size in sizes]
    activations = max(sum(kept[i] for i in pack) for pack in drawn)
    matmul: float | None = None
    process, seconds = 0.0, dict[str, float]()
    if rate is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = job.run.precision == "bf16" and has_bfloat16_units(device)
        matmul = peak_rate(device, torch.bfloat16 if half else torch.float32)
        small = flops / packs <= REHEARSED_FLOPS
        objective = build() if build is not None and small else None
        if objective is not None:
            measured = _rehearse(objective, job, device)
        else:
            measured = _measure(cls, job, sizes, drawn[0], device, half)
        rate, process = measured.rate, measured.process
        # FSDP cuts the weights across the ranks; of whole ones Muon shares the work.
        share = ranks if job.run.parallel == "fsdp" or job.optimizer.kind == "muon" else 1
        seconds["optimizer"] = measured.update * sum(counts[name] for name in trained) / share
        if measured.data is not None:
            seconds["data"] = measured.data * packs / ranks
    seconds = {"compute": flops / ranks / rate, **seconds}
    if job.run.workers and "data" in seconds:
        # Workers make the next packs while a rank computes: only what they are late by is waited for.
        busy = seconds["compute"] + seconds["optimizer"]
        seconds["data"] = max(0.0, seconds["data"] / job.run.workers - busy)
    per_pack = sum(cost[i] for pack in drawn for i in pack) / PACKS
    memory = _memory(job, twin, trained, ranks, activations)
    if adversary is not None:
        assert isinstance(job, TokenizerJob) and job.loss.adversarial is not None
        shapes = [p.shape for p in adversary.parameters()]
        memory["adversary"] = 8.0 * sum(map(math.prod, shapes)) + _moments(job.loss.adversarial.optimizer, shapes)
    return Plan(
        parameters=sum(counts.values()),
        trained=sum(counts[name] for name in trained),
        ranks=ranks,
        packs=packs,
        samples=samples * packs,
        tokens=0.0 if isinstance(job, TokenizerJob) else per_pack * packs,
        memory=memory | ({"process": process} if process else {}),
        flops=flops,
        matmul_rate=matmul,
        rate=rate,
        seconds=seconds,
        shards=_shards(job, twin, ranks),
    )


def _packs(
    job: DenoiserJob | TokenizerJob | NuwaJob, twin: Any, autoencoder: type[Any]
) -> tuple[list[tuple[int, ...]], list[int], list[list[int]]]:
    """The sizes of samples, as `ForwardCounter` takes them; what each costs of a pack's budget (tokens, pixels); and
    PACKS packs as indices of sizes."""
    if isinstance(job, NuwaJob):
        from walt.training.nuwa import TASKS, check_fields, draw_tasks, trained_tasks

        check_fields(job)
        tasks, space = trained_tasks(job), _nuwa_span(job, twin, autoencoder)
        clip = job.clip
        grids = [
            (
                clip.frames if TASKS[name].target == "clip" else 1,
                clip.height // space,
                clip.width // space,
                int(TASKS[name].condition == "sketch"),
            )
            for name in tasks
        ]
        rngs = [np.random.default_rng((job.run.seed, step, 0)) for step in range(PACKS)]
        places = {name: place for place, name in enumerate(tasks)}
        codes = [math.prod(grid[:3]) * int(twin.config.num_subcodes) for grid in grids]
        return [*grids], codes, [[places[name] for name in draw_tasks(tasks, rng)] for rng in rngs]
    sizes: list[tuple[int, ...]]
    if isinstance(job, DenoiserJob):
        space, frames_per_latent = _spans(job, autoencoder)
        patch = int(twin.config.patch_size)
        sizes = [(1 + (s.frames - 1) // frames_per_latent, *_side(s, space)) for s in job.shapes]
        cost = [math.prod(size) // patch**2 for size in sizes]
        budget, name = job.batch_tokens, "batch_tokens"
    else:
        sizes = [(s.frames, *_side(s, 1)) for s in job.shapes]
        cost = [math.prod(size) for size in sizes]
        budget, name = job.batch_pixels, "batch_pixels"
    weights = [shape.weight for shape in job.shapes]
    rngs = [np.random.default_rng((job.run.seed, i, 0)) for i in range(PACKS)]
    return sizes, cost, [fill_budget(budget, cost, weights, rng, name) for rng in rngs]


def _nuwa_span(job: NuwaJob, twin: Any, autoencoder: type[Any]) -> int:
    """Pixels that a token spans: of the recipe's tokenizer, or, where that is not trained yet, as its model expects."""
    config = Path(job.tokenizer) / "config.json"
    if config.is_file():
        with init_empty_weights():
            vq = autoencoder.from_config(json.loads(config.read_text()))
        return int(vq.spatial_compression_ratio)
    return max(1, job.clip.height // int(twin.config.sample_size[1]))


def _spans(job: DenoiserJob, autoencoder: type[Any]) -> tuple[int, int]:
    """How many pixels and frames a latent of the recipe's tokenizer spans."""
    config = Path(job.tokenizer) / "config.json"
    if config.is_file():
        with init_empty_weights():
            vae = autoencoder.from_config(json.loads(config.read_text()))
        return vae.spatial_compression_ratio, vae.temporal_compression_ratio
    return 8, 4  # Table 8's


def _planned_twin(cls: type[Any], job: Any, **changes: Any) -> Any:
    from walt.training.objectives import add_lora, build_model

    with init_empty_weights():
        twin = build_model(cls, {**job.model, **changes})
    twin = twin.to("meta")
    if isinstance(job, DenoiserJob) and job.lora is not None:
        with init_empty_weights():
            add_lora(twin, job.lora, job.init)
    return twin


def _trained(model: nn.Module, job: Any) -> list[str]:
    frozen = ("encoder.", "quantize.") if getattr(job, "freeze_encoder", False) else ()
    return [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(frozen)]


def _side(shape: Any, space: int) -> tuple[int, int]:
    return (shape.cut or shape.height) // space, (shape.cut or shape.width) // space


def _memory(job: Any, model: nn.Module, trained: list[str], ranks: int, activations: float) -> dict[str, float]:
    """Bytes by purpose on one rank. Weights, gradients and moments are float32."""
    share = ranks if job.run.parallel == "fsdp" else 1
    parameters = dict(model.named_parameters())
    own = 4.0 * sum(p.numel() for p in parameters.values()) / share
    learnt = 4.0 * sum(parameters[name].numel() for name in trained) / share
    memory = {
        "weights": own,
        "gradients": learnt,
        "optimizer": _moments(job.optimizer, [parameters[name].shape for name in trained]) / share,
        "average": learnt * (bool(job.run.ema_decay) + len(job.run.ema_lengths)),
    }
    quantizer = getattr(model, "quantize", None)
    if quantizer is not None and (codes := sum(buffer.nbytes for buffer in quantizer.buffers())):
        memory["codebook"] = float(codes)  # running means are no parameters
    if share > 1:
        blocks = [n for _, n, _ in _shards(job, model, ranks)]
        # Two blocks at a time are whole, weights and gradients: the one at work and the one fetched for the next.
        memory["gathered"] = 2 * (2.0 if job.run.precision == "bf16" else 4.0) * 2 * max(blocks)
    return {**memory, "activations": activations}


def _moments(optimizer: OptimizerJob, shapes: Sequence[torch.Size]) -> float:
    """Bytes of what an optimizer keeps of parameters of these shapes."""
    if optimizer.kind == "adafactor":  # a row and a column of every matrix
        kept = (math.prod(s[:-1]) + math.prod((*s[:-2], s[-1])) if len(s) > 1 else s.numel() for s in shapes)
    else:  # of Muon one for a matrix
        kept = (math.prod(s) * (1 if optimizer.kind == "muon" and len(s) > 1 else 2) for s in shapes)
    return 4.0 * sum(kept)


def _shards(job: Any, model: nn.Module, ranks: int) -> list[tuple[str, int, int]]:
    """What each rank holds of every block (FSDP2), or of the whole (DDP): `(name, parameters, on each rank)`."""
    whole = sum(p.numel() for p in model.parameters())
    if job.run.parallel != "fsdp" or ranks == 1:
        return [("whole model, on every rank", whole, whole)]
    names = set(getattr(model, "_no_split_modules", None) or ())
    rows: dict[tuple[str, int], int] = {}
    left = whole
    for child in model.modules():
        if type(child).__name__ in names:
            size = sum(p.numel() for p in child.parameters())
            rows[type(child).__name__, size] = rows.get((type(child).__name__, size), 0) + 1
            left -= size
    found = [(f"{count} x {name}", size, -(-size // ranks)) for (name, size), count in rows.items()]
    return [*found, ("the rest", left, -(-left // ranks))]


def _activations(cls: type[Any], model: Any, size: tuple[int, ...], job: Any) -> float:
    """Bytes that autograd keeps of one sample's forward pass; with gradient checkpointing the inputs of the blocks, and
    all of one block."""
    if isinstance(job, NuwaJob) and job.run.gradient_checkpointing:
        config = model.config
        width = config.num_attention_heads * config.attention_head_dim
        # Of the decoder two, as the last of its blocks has half the states; each gets the contents and the queries.
        few = job.model_copy(update={"run": job.run.model_copy(update={"gradient_checkpointing": False})})
        whole = _activations(cls, _planned_twin(cls, job, **_few_layers(job)), size, few)
        states = 2 * config.num_layers_decoder + size[3] * config.num_layers_encoder
        return whole + 4.0 * math.prod(size[:3]) * width * states
    kept: dict[int, Tensor] = {}
    parameters = {id(p) for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in parameters and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = meta_forward(model, size)
        del out
    total = float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    if job.run.precision == "bf16":
        total *= 0.6  # what products keep is halved, what norms and sums keep is not
    blocks = getattr(model, "transformer_blocks", None)
    if job.run.gradient_checkpointing and blocks is not None:
        config = model.config
        tokens = math.prod(size) // config.patch_size**2
        width = config.num_attention_heads * config.attention_head_dim
        total = total / len(blocks) + 4.0 * tokens * width * len(blocks)
    return total


@dataclass(frozen=True)
class _Measured:
    rate: float  # FLOP/s of forward and backward, and all that goes with it
    update: float  # seconds of an update per trained parameter
    data: float | None  # seconds to make a pack; None: not seen
    process: float  # bytes that this process holds beside the model: libraries, tokenizer, words, scenes


def _timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds that `run` takes, and what it gives."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _update(
    parameters: dict[str, nn.Parameter], job: OptimizerJob, run: RunJob, averages: bool, device: torch.device
) -> Callable[[], float]:
    """What times an update as the loop does it: norm, scale, step, and the model's `averages`."""
    optimizer = make_optimizer(job, list(parameters.values()), run.precision == "bf16")
    kept: list[Average | PowerAverage] = []
    if averages:
        kept = [Average(run.ema_decay, parameters), *(PowerAverage(length, parameters) for length in run.ema_lengths)]

    def step() -> None:
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, 0.5)
        float(torch.nn.utils.get_total_norm(grads))
        optimizer.step()
        for average in kept:
            average.step()
        optimizer.zero_grad()

    return lambda: _timed(step, device)[0]


def _rehearse(objective: Objective, job: Any, device: torch.device) -> _Measured:
    """Some steps of the recipe itself, on its data; the first one warms up and does not count."""
    model = objective.model.to(device).train()
    parts = objective.parts()
    if job.run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    objective.to(device)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    process = _resident() - held if device.type == "cpu" else 0.0
    timed_updates = []
    for name, part in parts.items():
        part.module.to(device).train()
        learnt = {key: p for key, p in part.module.named_parameters() if p.requires_grad}
        timed_updates.append(_update(learnt, part.optimizer, job.run, name == "model", device))
    data = compute = operations = 0.0
    updates = []
    for number in range(1 + REHEARSED):
        made, pack = _timed(partial(objective.batch, number, 0), device)
        took, forwards = _timed(partial(_pass, objective, job, pack, number, device), device)
        updates.append(sum(update() for update in timed_updates))
        if number:
            data, compute = data + made, compute + took
            again = float(job.run.gradient_checkpointing)
            operations += (objective.flops(pack) or 0.0) * (2.0 + again + forwards)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _Measured(operations / compute, min(updates[1:]) / trained, data / REHEARSED, process)


def _pass(objective: Objective, job: Any, pack: Any, number: int, device: torch.device) -> float:
    """Forward and backward of all parts on a pack, as at the end of the recipe; how often the model was run forward."""
    generator, shared = (torch.Generator().manual_seed(2 * number + i) for i in range(2))
    losses, forwards = objective.losses(pack, generator, shared, job.run.steps - 1), 1.0
    for name, part in objective.parts().items():
        with torch.autocast(device.type, torch.bfloat16, enabled=job.run.precision == "bf16"):
            loss = next(losses)
        if loss is not None:
            loss.total.backward(inputs=[p for p in part.module.parameters() if p.requires_grad])
            if name == "model":
                forwards = float(loss.figures.get("forwards", 1.0))
    return forwards


def _few_layers(job: Any) -> dict[str, int]:
    """What makes a model small whose layers are alike."""
    if isinstance(job, DenoiserJob):
        return {"num_layers": 2}
    if isinstance(job, NuwaJob):
        return {"num_layers_encoder": min(1, job.model.get("num_layers_encoder", 1)), "num_layers_decoder": 2}
    return {}


def _measure(
    cls: type[Any], job: Any, sizes: Sequence[tuple[int, ...]], pack: list[int], device: torch.device, half: bool
) -> _Measured:
    """Two layers of the model on a pack of random samples, or as many of them as are worth their time."""
    from walt.training.objectives import build_model

    torch.manual_seed(0)
    process = _resident() if device.type == "cpu" else 0.0
    model = build_model(cls, {**job.model, **_few_layers(job)}).to(device).train()
    if getattr(job, "freeze_encoder", False):
        model.encoder.requires_grad_(False)
    counter = ForwardCounter(cls, dict(model.config))
    left = MEASURED_FLOPS
    chosen: list[int] = []
    for index in pack:
        if chosen and left < 3 * counter(sizes[index]):
            break
        chosen.append(index)
        left -= 3 * counter(sizes[index])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    timed_update = _update(parameters, job.optimizer, job.run, True, device)
    call = _sample_call(model, [sizes[i] for i in chosen], device)

    def forward_backward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = call()
        loss.backward()

    compute, update = math.inf, math.inf
    begun = time.perf_counter()
    for attempt in range(3):
        if attempt and time.perf_counter() - begun > MEASURED_SECONDS:
            break
        compute = min(compute, _timed(forward_backward, device)[0])
        update = min(update, timed_update())
    operations = 3 * sum(counter(sizes[i]) for i in chosen)
    return _Measured(operations / compute, update / sum(p.numel() for p in parameters.values()), None, process)


def _resident() -> float:
    """Bytes that this process holds now: Python and its libraries."""
    try:
        return float(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    except (OSError, ValueError, IndexError):
        return 0.0


def _sample_call(model: Any, sizes: list[tuple[int, ...]], device: torch.device) -> Callable[[], Tensor]:
    """A forward pass of random samples of `sizes`, to a scalar."""
    config = model.config
    if _is_nuwa(config):
        alike = [[size for size in sizes if size == one] for one in sorted(set(sizes))]

        def nuwa() -> Tensor:
            with device:
                return torch.stack([_nuwa_loss(model, group) for group in alike]).sum()

        return nuwa
    if _is_tokenizer(config):
        groups: dict[tuple[int, ...], int] = {}
        for size in sizes:
            groups[size] = groups.get(size, 0) + 1
        videos = [torch.rand(count, config.in_channels, *size, device=device) * 2 - 1 for size, count in groups.items()]
        return lambda: torch.stack([model(video, return_dict=False)[0].float().abs().mean() for video in videos]).sum()
    noisy = [torch.randn(config.in_channels, *size, device=device) for size in sizes]
    given: dict[str, Any] = {}
    if config.frame_conditioning:
        given |= {"frame_latents": noisy, "frame_mask": [torch.zeros_like(z[:1]) for z in noisy]}
    if config.text_dim is not None:
        given["encoder_hidden_states"] = [torch.randn(TEXT_LENGTH, config.text_dim, device=device) for _ in sizes]
    if config.num_classes is not None:
        given["class_labels"] = torch.zeros(len(sizes), dtype=torch.long, device=device)
    if config.get("low_res_channels") is not None:
        scale = config.low_res_scale
        given["low_res_hidden_states"] = [
            torch.randn(config.low_res_channels, t, h // scale, w // scale, device=device) for t, h, w in sizes
        ]
        given["low_res_noise_level"] = torch.zeros(len(sizes), device=device)
    levels = torch.zeros(len(sizes), device=device)

    def call() -> Tensor:
        out = model(noisy, levels, **given).sample
        return torch.stack([z.float().square().mean() for z in out]).sum()

    return call
