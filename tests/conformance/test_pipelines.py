"""The pipelines among diffusers' own: signatures, sharing, offloading, dtypes, variants, step caches, the Hub.

What they make (batches, generators, output types, callbacks, interrupts) is in tests/pipelines.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, FasterCacheConfig, FirstBlockCacheConfig
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from torch import Tensor

import walt
from tests import tiny
from walt import register
from walt.card import model_card
from walt.errors import WaltError
from walt.pipelines.pipeline_walt import WaltPipeline
from walt.pipelines.pipeline_walt_cascade import WaltCascadePipeline
from walt.pipelines.pipeline_walt_super_resolution import WaltSuperResolutionPipeline

PIPELINES: dict[str, Callable[[], Any]] = {
    "base": tiny.base_pipeline,
    "super-resolution": tiny.super_resolution_pipeline,
    "cascade": tiny.cascade,
}
PROMPT = "a rocket flies up"


def make(pipe: Any, **changes: Any) -> Tensor:
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": tiny.seeded(0),
        "prompt": PROMPT,
    }
    if isinstance(pipe, WaltSuperResolutionPipeline):
        call["video"] = torch.rand(1, 5, 3, 16, 16, generator=tiny.seeded(9))
    else:
        call["num_frames"] = 5
    if isinstance(pipe, WaltCascadePipeline):
        call["num_inference_steps"], call["stages"] = 1, 2
    result: Tensor = pipe(**{**call, **changes}).frames
    return result


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


def test_signatures(pipe: Any) -> None:
    call = inspect.signature(type(pipe).__call__).parameters
    shared = {
        "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "generator", "latents",
        "num_videos_per_prompt", "prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict",
        "attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "max_sequence_length",
    }  # fmt: skip
    assert shared <= call.keys() and all(p.default is not p.empty for name, p in call.items() if name != "self")
    for name in ("guidance_scale", "do_classifier_free_guidance", "num_timesteps", "current_timestep", "interrupt"):
        assert isinstance(inspect.getattr_static(type(pipe), name), property)
    assert {"latents", "prompt_embeds", "negative_prompt_embeds"} <= set(pipe._callback_tensor_inputs)
    order = pipe.model_cpu_offload_seq.split("->")
    assert [
        name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and name not in order
    ] == []
    # What encode_prompt returns goes back in by the names that it returns it by.
    visitor = ReturnNameVisitor()
    visitor.visit(visitor.get_ast_tree(cls=type(pipe)))
    assert visitor.return_names[:2] == ["prompt_embeds", "negative_prompt_embeds"]
    assert set(visitor.return_names) <= call.keys()


def test_offloading(pipe: Any) -> None:
    expected = make(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(part, "_hf_hook") for part in (pipe.transformer, pipe.vae, pipe.text_encoder))
    assert torch.allclose(make(pipe), expected, atol=1e-5)  # hooked layers go by torch's own products
    pipe.remove_all_hooks()
    # Sequential, as `enable_sequential_cpu_offload` does it; that names the CPU "cpu:0", which accelerate does not take.
    for part in (pipe.transformer, pipe.vae):
        cpu_offload(part, torch.device("cpu"))
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    assert torch.allclose(make(pipe), expected, atol=1e-5)  # hooked layers go by torch's own products


def test_group_offloading_and_layerwise_casting(pipe: Any) -> None:
    expected = make(pipe)
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.allclose(make(pipe), expected, atol=1e-5)  # hooked layers go by torch's own products
    other = type(pipe)(
        **{**pipe.components, "transformer": type(pipe.transformer).from_config(pipe.transformer.config)}
    )
    other.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert make(tiny.quiet(other)).isfinite().all()


def test_dtypes_and_variants(pipe: Any, tmp_path: Path) -> None:
    expected = make(pipe)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path, variant="fp16"))
    assert type(again) is type(pipe) and torch.equal(make(again), expected)
    with pytest.raises((ValueError, OSError), match="variant"):
        DiffusionPipeline.from_pretrained(tmp_path, variant="ema")
    mixed = tiny.quiet(
        DiffusionPipeline.from_pretrained(
            tmp_path, variant="fp16", dtype={"transformer": torch.bfloat16, "default": torch.float32}
        )
    )
    assert mixed.transformer.dtype == torch.bfloat16 and mixed.vae.dtype == torch.float32
    assert (make(mixed) - expected).abs().mean() < 0.02
    mixed.to(torch.bfloat16)
    assert mixed.vae.dtype == torch.bfloat16 and (make(mixed) - expected).abs().mean() < 0.05
    assert torch.equal(make(pipe.to("cpu", torch.float32)), expected)


def test_pipelines_share_components() -> None:
    cascade = tiny.cascade()
    base = tiny.quiet(WaltPipeline.from_pipe(cascade))
    assert base.transformer is cascade.transformer and base.vae is cascade.vae
    assert make(base, guidance_scale=3.0).shape == (1, 5, 3, 16, 16)
    enlarge = tiny.quiet(WaltSuperResolutionPipeline.from_pipe(base, transformer=cascade.transformer_2))
    assert enlarge.transformer is cascade.transformer_2 and make(enlarge).shape == (1, 5, 3, 32, 32)
    assert torch.equal(make(tiny.quiet(WaltPipeline(**base.components))), make(base))


def test_step_caches_in_the_loop() -> None:
    pipe = tiny.base_pipeline(num_layers=4)
    call: dict[str, Any] = {"num_inference_steps": 4}
    expected = make(pipe, **call)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = make(pipe, **call)
    assert not torch.allclose(cached, expected, atol=1e-4) and (cached - expected).abs().mean() < 0.2
    assert torch.equal(make(pipe, **call), cached), "a run leaves nothing behind for the next"
    pipe.transformer.disable_cache()
    assert torch.equal(make(pipe, **call), expected)


def test_faster_cache_needs_no_guidance() -> None:
    """It halves a batch of two branches; walt's two branches are one pack."""
    pipe = tiny.base_pipeline()

    def config(distilled: bool) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=distilled,
        )

    pipe.transformer.enable_cache(config(False))
    with pytest.raises(WaltError, match=r"FasterCache .*is_guidance_distilled=True.* FirstBlockCache"):
        make(pipe)
    pipe.transformer.disable_cache()
    expected = make(pipe, num_inference_steps=4)
    pipe.transformer.enable_cache(config(True))
    assert not torch.allclose(make(pipe, num_inference_steps=4), expected, atol=1e-5)


# -- cards and the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub of one repository that remembers what is uploaded."""
    state = SimpleNamespace(files={}, card=False, created=[], uploads=[])

    def create(repo_id: str, **given: Any) -> Any:
        state.created.append(given)
        return SimpleNamespace(repo_id=repo_id)

    def upload(repo_id: str, folder_path: str, **given: Any) -> str:
        state.files = {p.relative_to(folder_path).as_posix(): p for p in Path(folder_path).rglob("*") if p.is_file()}
        state.text = {name: p.read_text() for name, p in state.files.items() if name.endswith((".md", ".json"))}
        state.uploads.append({"repo_id": repo_id, **given})
        return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_, **__: state.card)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return state


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


def test_push_brings_our_card(pipe: Any, hub: SimpleNamespace, tmp_path: Path) -> None:
    address = pipe.push_to_hub("me/small-videos", license="apache-2.0", private=True, commit_message="first")
    assert address == "https://hub/me/small-videos/commit/1" and hub.created[0]["private"] is True
    assert hub.uploads == [
        {
            "repo_id": "me/small-videos",
            "token": None,
            "commit_message": "first",
            "create_pr": False,
            "path_in_repo": None,
        }
    ]
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= hub.files.keys()
    card, facts = hub.text["README.md"], metadata(hub.text["README.md"])
    assert facts["library_name"] == "diffusers" and facts["license"] == "apache-2.0" and "walt" in facts["tags"]
    enlarges = isinstance(pipe, WaltSuperResolutionPipeline)
    assert facts["pipeline_tag"] == ("video-to-video" if enlarges else "text-to-video")
    parsed: Any = huggingface_hub.ModelCard(card).data
    assert parsed.to_dict()["library_name"] == "diffusers"
    snippet = card.split("```python\n")[1].split("```")[0]
    assert snippet.startswith("import walt") and 'from_pretrained("me/small-videos")' in snippet
    compile(snippet, "snippet", "exec")
    hub.card = True
    pipe.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="me/again", variant="fp16")
    assert "README.md" not in hub.files, "the repository has a card of its own"
    assert (
        "transformer/diffusion_pytorch_model.fp16.safetensors" in hub.files and hub.uploads[1]["repo_id"] == "me/again"
    )


def test_the_cards_snippet_works(tmp_path: Path) -> None:
    pipe = tiny.base_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    snippet = model_card(pipe, str(tmp_path / "model")).split("```python\n")[1].split("```")[0]
    loaded = snippet.replace(".frames[0]", "")
    scope: dict[str, Any] = {}
    exec(loaded.rsplit("\n", 2)[0], scope)
    assert type(scope["pipe"]) is WaltPipeline
    pipe.transformer.save_pretrained(tmp_path / "part")
    exec(model_card(pipe.transformer, str(tmp_path / "part")).split("```python\n")[1].split("```")[0], scope)
    assert type(scope["model"]) is walt.WaltTransformer3DModel
    assert "pipe(class_labels=0" in model_card(tiny.class_pipeline(), "me/classes")


def test_a_model_alone_and_a_subfolder(hub: SimpleNamespace) -> None:
    model = tiny.transformer()
    model.push_to_hub("me/part")
    assert "AutoModel" in hub.text["README.md"] and hub.uploads[0]["commit_message"] == "Upload WaltTransformer3DModel"
    model.push_to_hub("me/whole", subfolder="transformer")
    assert "README.md" not in hub.files and hub.uploads[1]["path_in_repo"] == "transformer"
    with pytest.raises(WaltError, match="repo_id: empty"):
        model.push_to_hub("")


def test_versions_outside_the_tested_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    with monkeypatch.context() as patch:
        patch.setattr(diffusers, "__version__", "0.99.0")
        with pytest.warns(UserWarning, match=r"diffusers 0\.99\.0; tested are 0\.42 to 0\.43"):
            register._check_version(diffusers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register._check_version(diffusers)


def test_installing_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    import diffusers
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = list(AttentionBackendName)
    lookup = vars(diffusers)["__getattr__"]
    with caplog.at_level(logging.WARNING):
        register.install()
        register.install()
    assert list(AttentionBackendName) == names and vars(diffusers)["__getattr__"] is lookup
    assert not caplog.records


def test_private_surfaces_are_in_one_file() -> None:
    private = re.compile(
        r"hooks\._|_modeling_parallel|_AttentionBackendRegistry|LOADABLE_CLASSES|PIPELINES?_MAPPING|_cache_config\b|"
        r"ProcessorRegistry|BlockRegistry|_flattened_mesh"
    )
    root = Path(walt.__file__).parent.parent
    for folder in ("walt", "pipelines", "tokenizers", "configs"):
        for path in sorted((root / folder).rglob("*.py")):
            found = private.search(path.read_text(encoding="utf-8"))
            assert found is None or path.name == "register.py", f"{path}: {found}"
