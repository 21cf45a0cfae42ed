"""Model cards, and the mixin that sends one along when a model or pipeline goes to the Hub.

diffusers' own card for what it does not know lacks `import walt`, without which the files cannot be loaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from walt.errors import WaltError


def model_card(thing: Any, repo_id: str, license: str | None = None, description: str | None = None) -> str:
    """The text of a card: metadata, how to load it, what it holds. Made without the network.

    Args:
        thing: a pipeline or model of walt.
        repo_id: the name on the Hub, for the snippet.
        license: its identifier there, such as "apache-2.0"; None leaves it open.
        description: paragraphs in place of the generic one.
    """
    name, pipeline = type(thing).__name__, hasattr(thing, "components")
    parts = {key: part for key, part in thing.components.items() if part is not None} if pipeline else {"": thing}
    task, call = _use(thing)
    lines = [
        "---",
        "library_name: diffusers",
        f"pipeline_tag: {task}",
        "tags:",
        "- walt",
        f"- {'diffusers:' if pipeline else ''}{name}",
        *([f"license: {license}"] if license else []),
        "---",
        "",
        f"# {repo_id.rsplit('/', 1)[-1]}",
        "",
        description or f"A `{name}` of walt (W.A.L.T. latent video diffusion, arXiv 2312.06662).",
        "",
        "```python",
        "import walt  # before loading: diffusers finds walt's classes by it",
        f"from diffusers import {'DiffusionPipeline' if pipeline else 'AutoModel'}",
        "",
        f'{"pipe = DiffusionPipeline" if pipeline else "model = AutoModel"}.from_pretrained("{repo_id}")',
        *call,
        "```",
        "",
        "| part | class | parameters |",
        "|---|---|---|",
    ]
    for key, part in parts.items():
        count = sum(p.numel() for p in part.parameters()) if hasattr(part, "parameters") else None
        lines.append(f"| {key or 'model'} | `{type(part).__name__}` | {f'{count / 1e6:.2f}M' if count else '-'} |")
    return "\n".join(lines) + "\n"


def _use(thing: Any) -> tuple[str, list[str]]:
    """The Hub's name of the task, and the lines that do it."""
    name = type(thing).__name__
    if not hasattr(thing, "components"):
        return "text-to-video", []
    if name == "WaltSuperResolutionPipeline":
        return "video-to-video", ["frames = pipe(video, prompt).frames[0]  # twice the height and width"]
    config = getattr(getattr(thing, "transformer", None), "config", {})
    if config.get("text_dim") is None and config.get("num_classes") is not None:
        return "text-to-video", ["frames = pipe(class_labels=0, num_frames=17).frames[0]"]
    return "text-to-video", ['frames = pipe("a rocket flies up").frames[0]']


class HubCardMixin:
    """`push_to_hub` with walt's own card; a card that the repository has already is kept. Comes before diffusers' base."""

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, also with `push_to_hub`, `repo_id`, `commit_message`, `private`, `create_pr`, `token`.

        A pipeline looks at this signature to know what its parts' methods take.
        """
        hub = {
            key: kwargs.pop(key)
            for key in ("repo_id", "commit_message", "private", "create_pr", "token", "license", "subfolder")
            if key in kwargs
        }
        given: dict[str, Any] = {} if safe_serialization else {"safe_serialization": False}
        given |= {} if variant is None else {"variant": variant}
        given |= {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        super().save_pretrained(save_directory, *args, **given, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            self._push(Path(save_directory), hub.pop("repo_id", None) or Path(save_directory).name, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        license: str | None = None,
    ) -> str:
        """Uploads the files and, unless the repository has one, a card.

        Args:
            repo_id: `name` or `organisation/name`.
            license: identifier for the card, such as "apache-2.0".
            commit_message, private, token, create_pr, safe_serialization, variant, subfolder: as in diffusers.

        Returns:
            The address of the commit.
        """
        if not repo_id:
            raise WaltError("repo_id: empty, a name on the Hub such as 'me/my-model' needed")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._push(
                Path(folder),
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
                license=license,
            )

    def _push(
        self,
        folder: Path,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        license: str | None = None,
    ) -> str:
        import huggingface_hub as hub

        repo_id = hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        card = folder / "README.md"
        if not subfolder and not card.exists() and not hub.file_exists(repo_id, "README.md", token=token):
            card.write_text(model_card(self, repo_id, license), encoding="utf-8")
        return str(
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
                path_in_repo=subfolder,
            )
        )
