"""The page of `walt demo`, in Gradio: what is on it, and what it refuses.

Nothing leaves the machine and nothing but what was uploaded or made here can be read from it: no analytics, no shared
links, no fonts or scripts from elsewhere, no files fetched by address (`Guard`), and a folder of its own for uploads and
results, which is deleted at the end.
"""

from __future__ import annotations

import json
import secrets
from functools import partial
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from starlette.middleware import Middleware

from walt.demo import FPS, MAX_SEED, TASKS, Cancelled, Field, Limits, Studio, allowed_frames, example_prompts
from walt.diffusion import GuidanceOptions, ScaleSchedule
from walt.errors import WaltError

LONGEST = 125  # frames in the list of lengths: the tab of long videos asks for seconds

CSS = """
.gradio-container > main, main.fillable {max-width: 1240px !important; margin: 0 auto !important; padding: 20px !important;}
#head {padding: 0 0 4px;}
#head h1 {font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em; margin: 0;}
#head p {color: var(--body-text-color-subdued); margin: 2px 0 0;}
#tasks button[role=tab] {padding: 0 9px; font-size: .9rem;}
#status {min-height: 1.6em; color: var(--body-text-color-subdued);}
footer {display: none !important;}
"""


def build_page(studio: Studio, words: dict[str, Any]) -> Any:
    """The Gradio page.

    Args:
        studio: what runs the requests.
        words: the model's world.json, for examples; may be empty.
    """
    pipe, limits, sizes = studio.pipe, studio.limits, studio.sizes
    if not sizes:
        raise WaltError(
            f"--max-side {limits.side} allows no size of this model: its smallest is {pipe.default_size(1)}"
        )
    lengths = [
        ("1 frame, a still" if count == 1 else f"{count} frames, {count / FPS:.1f} s", count)
        for count in allowed_frames(min(limits.frames, LONGEST))
    ]
    usual = max(count for _, count in lengths if count <= 29)
    components: dict[tuple[str, str], Any] = {}

    with gr.Blocks(title="walt", analytics_enabled=False, fill_width=True) as page:
        name = gr.State("text")
        kept = gr.State([])
        gr.HTML("<h1>walt</h1><p>Latent video diffusion, on this machine.</p>", elem_id="head")
        tabs = []
        with gr.Tabs(elem_id="tasks"):
            for key, task in TASKS.items():
                with gr.Tab(task.title, id=key, elem_id=f"tab-{key}") as tab:
                    lacks = task.lacks(pipe)
                    gr.Markdown(f"**Not with this model:** {lacks}." if lacks else task.help)
                    with gr.Row():
                        for field_name, field_ in task.fields.items():
                            shown = field_.lacks is None or field_.lacks(pipe) is None
                            components[key, field_name] = _component(f"{key}-{field_name}", field_, shown)
                tabs.append((key, tab))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=420):
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=2,
                    max_length=2000,
                    elem_id="prompt",
                    placeholder="a rocket flies up on a purple background",
                )
                with gr.Row():
                    size = gr.Dropdown(list(sizes), value=next(iter(sizes)), label="Size", elem_id="size", scale=3)
                    frames = gr.Dropdown(lengths, value=usual, label="Length", elem_id="frames", scale=3)
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", scale=2)
                with gr.Accordion("More", open=False):
                    negative = gr.Textbox(label="Negative prompt", max_length=2000, elem_id="negative")
                    with gr.Row():
                        steps = gr.Slider(1, limits.steps, pipe.config.base_steps, step=1, label="Steps")
                        later = gr.Slider(
                            1, limits.steps, pipe.config.super_resolution_steps, step=1, label="Super-resolution steps"
                        )
                        guidance = gr.Slider(0, 30, pipe.config.base_guidance_scale, step=0.1, label="Guidance")
                    spread = _guidance(limits, pipe.config)
                    dice = gr.Button("New seed", size="sm")
                with gr.Row():
                    make = gr.Button("Generate", variant="primary", elem_id="make", scale=3)
                    stop = gr.Button("Cancel", elem_id="stop", scale=1)
                examples = example_prompts(words)
                if examples:
                    gr.Examples(examples, prompt, label="Examples", examples_per_page=6, api_visibility="private")
            with gr.Column(scale=1, min_width=420):
                video = gr.Video(
                    label="Result",
                    elem_id="video",
                    interactive=False,
                    autoplay=True,
                    loop=True,
                    height=380,
                    buttons=["download"],
                )
                image = gr.Image(
                    label="Result",
                    elem_id="image",
                    interactive=False,
                    visible=False,
                    type="filepath",
                    format="png",
                    height=380,
                    buttons=["download", "fullscreen"],
                )
                status = gr.Markdown("Ready.", elem_id="status")
                download = gr.DownloadButton("Download", elem_id="download", visible=False, size="sm")
                gallery = gr.Gallery(
                    label="Made in this session",
                    elem_id="gallery",
                    columns=4,
                    height=250,
                    object_fit="contain",
                    fit_columns=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                )

        def generate(
            request: gr.Request,
            progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it by its default
            *values: Any,
        ) -> list[Any]:
            task, results, own = values[0], values[1], values[2 : 2 + len(components)]
            given = {key[1]: value for key, value in zip(components, own, strict=True) if key[0] == task}
            try:
                asked = studio.check(task, given, *values[2 + len(components) :])
                result = studio.run(
                    str(request.session_hash),
                    task,
                    asked,
                    lambda done, total, text: progress((done, total), desc=text, unit="steps"),
                )
            except WaltError as error:
                raise gr.Error(str(error), print_exception=False) from error
            except Cancelled:
                return [gr.skip()] * 4 + ["Cancelled.", results]
            entry = (str(result.path), asked.prompt or TASKS[task].title)
            shown = str(result.path)
            return [
                gr.Video(None if result.still else shown, visible=not result.still),
                gr.Image(shown if result.still else None, visible=result.still),
                gr.DownloadButton(value=shown, visible=True),
                [entry, *results],
                result.caption,
                [entry, *results],
            ]

        def cancel(request: gr.Request) -> str:
            studio.cancel(str(request.session_hash))
            return "Cancelled."

        inputs = [
            name,
            kept,
            *components.values(),
            prompt,
            negative,
            size,
            frames,
            seed,
            steps,
            later,
            guidance,
            *spread,
        ]
        outputs = [video, image, download, gallery, status, kept]
        private: dict[str, Any] = {"api_visibility": "private"}
        running = gr.on(
            [make.click, prompt.submit],
            generate,
            inputs,
            outputs,
            concurrency_limit=1,
            concurrency_id="studio",
            trigger_mode="once",
            show_progress_on=[video, image],
            **private,
        )
        stop.click(cancel, None, status, cancels=[running], queue=False, **private)
        dice.click(lambda: secrets.randbelow(MAX_SEED), None, seed, queue=False, **private)

        def leave(request: gr.Request) -> None:
            studio.cancel(str(request.session_hash))

        page.unload(leave)
        for key, tab in tabs:
            tab.select(
                partial(_show, key, pipe),
                None,
                [name, prompt, size, frames],
                queue=False,
                show_progress="hidden",
                **private,
            )
    page.queue(default_concurrency_limit=1, max_size=16, api_open=False)
    return page


def _show(key: str, pipe: Any) -> list[Any]:
    """What changes when the tab of a task is chosen: of the shared fields those that it uses are shown."""
    task = TASKS[key]
    return [key, gr.Textbox(visible=task.told(pipe)), gr.Dropdown(visible=task.size), gr.Dropdown(visible=task.length)]


def _guidance(limits: Limits, config: Any) -> list[Any]:
    """How guidance is spread over the steps and bounded: the last values of `Studio.check`, in its order."""
    plain = GuidanceOptions()
    with gr.Row():
        schedule = gr.Dropdown(
            list(get_args(ScaleSchedule)), value=plain.schedule, label="Guidance over the steps", elem_id="schedule"
        )
        hold = gr.Slider(0, limits.steps, plain.hold, step=1, label="Oscillating: steps at full scale first")
        low = gr.Slider(0, 30, plain.low, step=0.1, label="Oscillating: scale in turn")
        power = gr.Slider(0.5, 20, plain.power, step=0.5, label="Power-cosine: weak for longer")
    with gr.Row():
        start = gr.Slider(0, 1, config.base_guidance_start, step=0.05, label="Guide from this share of the way")
        stop = gr.Slider(0, 1, config.base_guidance_stop, step=0.05, label="to this one (1: clean)")
    with gr.Row():
        threshold = gr.Slider(0, 10, 0, step=0.1, label="Threshold in standard deviations (0: none)")
        percentile = gr.Slider(0, 0.999, 0, step=0.001, label="Dynamic threshold's percentile (0: static)")
    return [schedule, hold, low, power, start, stop, threshold, percentile]


def _component(elem_id: str, field_: Field, visible: bool) -> Any:
    label = field_.label if field_.needed else f"{field_.label} (if any)"
    if field_.kind == "image":
        return gr.Image(
            label=label,
            type="filepath",
            format="png",
            sources=["upload"],
            elem_id=elem_id,
            height=180,
            buttons=[],
            min_width=180,
        )
    if field_.kind == "video":
        return gr.Video(label=label, sources=["upload"], elem_id=elem_id, height=180, buttons=[], min_width=180)
    if field_.kind == "choice":
        return gr.Radio(
            list(field_.options), value=field_.options[0], label=label, visible=visible, elem_id=elem_id, min_width=180
        )
    low, high, value, step = field_.options
    return gr.Slider(low, high, value, step=step, label=label, elem_id=elem_id, min_width=180)


class Guard:
    """ASGI middleware that refuses requests that would make the server fetch an address for the caller.

    Gradio loads `/file=http...` and file values whose path is an address; a local page needs neither.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].lower()
        refused = any(part in path for part in ("/file=http:", "/file=https:", "/proxy="))
        headers = {key.lower(): value for key, value in scope["headers"]}
        if not refused and scope["method"] == "POST" and b"json" in headers.get(b"content-type", b"json"):
            body, more = b"", True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False) and len(body) <= 2**20
            refused = len(body) > 2**20 or _names_an_address(body)
            messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
            rest = receive

            async def again() -> Any:
                return messages.pop() if messages else await rest()

            receive = again

        if refused:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"walt demo fetches nothing for its callers"})
            return
        await self.app(scope, receive, send)


def _names_an_address(body: bytes) -> bool:
    """Whether a JSON body holds a file (an object with a "path") that is an address."""
    try:
        waiting = [json.loads(body)]
    except ValueError:
        return False  # not JSON: Gradio refuses it too
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def launch(page: Any, model: Path, folder: Path, limits: Limits, host: str, port: int, browser: bool) -> str:
    """Serves `page` in the background and returns its address.

    Args:
        model: the model's folder, of which nothing may be read.
        folder: an empty one; uploads and results go there (GRADIO_TEMP_DIR).
        port: 0 for the first free one from 7860 on.

    Raises:
        WaltError: the address cannot be listened on.
    """
    (folder / "none").mkdir()
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            # An allowed folder is served with any type; uploads are not. So none is allowed but an empty one.
            allowed_paths=[str(folder / "none")],
            blocked_paths=[str(model.resolve()), str(model.absolute())],
            max_file_size=limits.upload_megabytes * 2**20,
            app_kwargs={"middleware": [Middleware(Guard)]},
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            ssr_mode=False,
            theme=theme,
            css=CSS,
        )
    except OSError as error:
        raise WaltError(f"cannot listen on {host}:{port}: {error}") from error
    return str(address)
