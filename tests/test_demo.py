"""`walt demo`: what a request may ask for, what the server refuses, and the page in a real browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from walt import cli, demo, media
from walt.errors import WaltError
from walt.media import read_image, read_video, write_image, write_video

PAUSE = [0.0]  # seconds that the tiny model takes more per step

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the extra demo is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.cascade_folder(tmp_path_factory.mktemp("model") / "tiny")
    words = {"subjects": ["rocket", "cat"], "backgrounds": ["purple", "red"], "motions": ["flies up", "jumps"]}
    (folder / "world.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny.cascade()
    pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(PAUSE[0]))
    return pipe


@pytest.fixture
def studio(pipe: Any, tmp_path: Path) -> demo.Studio:
    return demo.Studio(pipe, demo.Limits(frames=41, steps=10), tmp_path / "made")


def ask(studio: demo.Studio, task: str = "text", given: dict[str, Any] | None = None, **changes: Any) -> demo.Request:
    values: dict[str, Any] = {
        "prompt": "a rocket flies up",
        "negative_prompt": "",
        "size": "16 x 16",
        "frames": 5,
        "seed": 3,
        "steps": 2,
        "later_steps": 1,
        "guidance": 3.0,
    }
    given = {"fps": 8} if task == "text" and given is None else given or {}
    return studio.check(task, given, **{**values, **changes})


def silent(done: int, total: int, text: str) -> None:
    pass


def test_a_request_is_made_as_the_pipeline_would(
    studio: demo.Studio, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    pieces: list[torch.Tensor] = []

    def keep(frames: torch.Tensor) -> np.ndarray:
        pieces.append(frames)
        return to_pixels(frames)

    to_pixels = media.to_pixels
    monkeypatch.setattr(media, "to_pixels", keep)
    request = ask(studio, size="32 x 32", frames=5)
    result = studio.run("me", "text", request, lambda done, total, text: steps.append((done, total, text)))
    video, fps = read_video(result.path)
    assert video.shape == (5, 32, 32, 3) and fps == 8 and not result.still
    assert steps == [(1, 3, "stage 1"), (2, 3, "stage 1"), (3, 3, "stage 2")]
    alone = pipe(
        "a rocket flies up",
        stages=2,
        num_frames=5,
        num_inference_steps=[2, 1],
        guidance_scale=[3.0, 1.0],
        generator=tiny.seeded(3),
        output_type="pt",
    ).frames[0]
    torch.testing.assert_close(torch.cat(pieces), alone, rtol=0, atol=1e-4)  # decoded in pieces: not to the last bit
    written, shown = (x.mean(axis=-1).ravel() for x in (video, alone.permute(0, 2, 3, 1).numpy()))
    assert np.corrcoef(written, shown)[0, 1] > 0.8  # the file has half of this noise's colours


@pytest.mark.parametrize("task", ["text", "edit"])
def test_guidance_is_spread_and_bounded(task: str, studio: demo.Studio, uploads: dict[str, Path]) -> None:
    """And what one request sets does not stay for the next."""
    given: Any = {"video": uploads["video"], "strength": 1.0} if task == "edit" else None
    made = []
    for options in (
        {},
        {"schedule": "oscillating", "hold": 0, "low": 0.0},
        {"schedule": "power-cosine"},
        {"start": 0.4},
        {"threshold": 0.3},
        {"threshold": 0.01, "percentile": 0.5},
        {},
    ):
        request = ask(studio, task, given, guidance=20.0, **options)
        made.append(read_video(studio.run("me", task, request, silent).path)[0])
    assert all(not np.array_equal(made[i], made[j]) for i in range(6) for j in range(i))
    # Products may differ in the last bit by where tensors lie: the same request gives the same video up to that.
    off = [float(np.abs(made[0].astype(int) - video).mean()) for video in made]
    assert off[6] < 0.5 < min(off[1:6])


def test_a_model_may_say_where_its_base_is_guided(tmp_path: Path) -> None:
    """The page shows the model's part of the steps; sent back unchanged, or left out, it is that of the base alone."""
    pipe = tiny.cascade(base_guidance_start=0.2, base_guidance_stop=0.7)
    studio = demo.Studio(pipe, demo.Limits(), tmp_path)
    same: tuple[dict[str, Any], ...] = ({}, {"start": 0.2, "stop": 0.7})
    for changes in same:
        assert (ask(studio, **changes).options.start, ask(studio, **changes).options.stop) == (None, None)
    asked = ask(studio, start=0.0, stop=0.7).options
    assert (asked.start, asked.stop) == (0.0, 0.7)
    assert ask(studio, start=0.4).options.part == (0.4, 1.0)
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])) if args else None)
    video = tmp_path / "x.mp4"
    write_video(np.zeros((5, 16, 16, 3), np.uint8), video, 8)
    for task, given in (("text", None), ("edit", {"video": video, "strength": 1.0})):
        rows.clear()
        studio.run("me", task, ask(studio, task, given, steps=5), silent)
        assert 0 < sum(count == 2 for count in rows) < 5 == len(rows), task


def test_a_still_is_a_png(studio: demo.Studio) -> None:
    result = studio.run("me", "text", ask(studio, frames=1), silent)
    assert result.still and result.path.suffix == ".png" and read_image(result.path).shape == (16, 16, 3)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video of 13 frames in which a square moves, and a picture, both wider than high."""
    folder = tmp_path_factory.mktemp("uploads")
    frames = np.full((13, 32, 48, 3), 40, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, i : i + 12] = (230, 60, 60)
    write_video(frames, folder / "video.mp4", 8)
    write_image(frames[0], folder / "image.png")
    return {"video": folder / "video.mp4", "image": folder / "image.png"}


# What each task is given beside the prompt, and the frames (height, width) that it makes.
GIVEN: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "text": ({"fps": 8}, (5, 32, 32)),
    "image": ({"image": "image"}, (5, 32, 32)),
    "keyframes": ({"first": "image", "middle": "image", "last": "image"}, (5, 32, 32)),
    "continue": ({"video": "video", "how": "Forward", "new": 4}, (17, 32, 32)),
    "fill": (
        {"video": "video", "left": 0, "right": 50, "top": 0, "bottom": 50, "where": "outside"},
        (13, 32, 32),
    ),
    "edit": ({"video": "video", "strength": 0.5}, (13, 32, 32)),
    "upscale": ({"video": "video", "scale": 2}, (13, 64, 96)),
    "long": ({"seconds": 3, "noise": 50, "fps": 8}, (24, 32, 32)),
}


@pytest.mark.parametrize("task", list(demo.TASKS))
def test_every_task_makes_its_frames(task: str, studio: demo.Studio, uploads: dict[str, Path]) -> None:
    given, shape = GIVEN[task]
    given = {name: uploads.get(str(value), value) for name, value in given.items()}
    request = ask(studio, task, given, size="32 x 32", frames=5)
    video, _ = read_video(studio.run("me", task, request, silent).path)
    assert video.shape == (*shape, 3)


def test_upscaling_takes_the_steps_of_super_resolution(studio: demo.Studio, uploads: dict[str, Path]) -> None:
    """Whatever size was chosen on another tab."""
    told: list[tuple[int, int, str]] = []
    request = ask(studio, "upscale", {"video": uploads["image"], "scale": 2}, size="16 x 16")
    studio.run("me", "upscale", request, lambda *state: told.append(state))
    assert [state[:2] for state in told] == [(1, 1)]


@pytest.mark.parametrize(("how", "frames"), [("Backward", 17), ("Loop", 17), ("Connect", 30)])
def test_a_video_is_continued_in_every_way(
    how: str, frames: int, studio: demo.Studio, uploads: dict[str, Path]
) -> None:
    given: dict[str, Any] = {"video": uploads["video"], "how": how, "new": 4}
    if how == "Connect":
        with pytest.raises(WaltError, match="give the second video too"):
            studio.run("me", "continue", ask(studio, "continue", given), silent)
        given |= {"next": uploads["video"]}
    video, _ = read_video(studio.run("me", "continue", ask(studio, "continue", given), silent).path)
    assert video.shape == (frames, 16, 16, 3)


def test_outside_the_box_nothing_changes(studio: demo.Studio, uploads: dict[str, Path]) -> None:
    box = {"left": 50, "right": 100, "top": 0, "bottom": 100, "where": "inside"}
    request = ask(studio, "fill", {"video": uploads["video"], **box})
    (frames,) = demo.TASKS["fill"].make(studio.pipe, request, lambda *_: {})
    given = request.clip("video")
    made = media.to_pixels(frames)
    assert np.array_equal(made[:, :, :8], given[:, :, :8]) and not np.array_equal(made[:, :, 8:], given[:, :, 8:])


def test_a_long_video_may_not_be_longer_than_allowed(studio: demo.Studio) -> None:
    with pytest.raises(WaltError, match="at most 41 frames"):
        studio.run("me", "long", ask(studio, "long", {"seconds": 6, "noise": 0, "fps": 8}), silent)


@pytest.mark.parametrize(("task", "given", "frames"), [("text", {}, 9), ("long", {"seconds": 3, "noise": 0}, 48)])
def test_a_model_with_the_temporal_stage_makes_16_frames_per_second(
    task: str, given: dict[str, Any], frames: int, tmp_path: Path
) -> None:
    pipe = tiny.cascade(super_resolution_steps=1)
    stage = tiny.super_resolution_transformer(6, 1, low_res_scale=1, text_dim=None)
    pipe.register_modules(temporal_super_resolution=stage)
    studio = demo.Studio(pipe, demo.Limits(), tmp_path)
    request = ask(studio, task, {**given, "fps": 16}, steps=1, frames=5)
    told: list[str] = []
    result = studio.run("me", task, request, lambda done, total, text: told.append(text))
    video, fps = read_video(result.path)
    assert video.shape == (frames, 16, 16, 3) and fps == 16
    assert set(told) == {"stage 1", "frame rate"}


def test_sizes_stay_within_the_limit(pipe: Any, tmp_path: Path) -> None:
    sizes = demo.Studio(pipe, demo.Limits(side=32), tmp_path).sizes
    assert sizes == {"32 x 32": (2, 32, 32), "16 x 16": (1, 16, 16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "write a prompt first"),
        ({"prompt": 5}, "write a prompt first"),
        ({"size": "8000 x 8000"}, 'there is no size "8000 x 8000"'),
        ({"frames": 53}, "frames must be a whole number from 1 to 41, got 53"),
        ({"frames": 6}, "the nearest are 5 and 9"),
        ({"frames": True}, "frames must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": float("nan")}, "seed must be a whole number from 0"),
        ({"steps": 11}, "steps must be a whole number from 1 to 10, got 11"),
        ({"later_steps": 1.5}, "super-resolution steps must be a whole number"),
        ({"guidance": 31}, "guidance must be from 0 to 30"),
        ({"guidance": None}, "guidance must be from 0 to 30"),
        ({"schedule": "cosine"}, "guidance schedule must be one of constant, oscillating, power-cosine"),
        ({"schedule": ["x"]}, "guidance schedule must be one of constant, oscillating, power-cosine"),
        ({"hold": 2.5}, "steps at full guidance must be a whole number from 0 to 10, got 2.5"),
        ({"low": float("nan")}, "low guidance must be from 0 to 30, got nan"),
        ({"power": 0}, "power of power-cosine guidance must be positive"),
        ({"stop": 1.5}, "stop must be from 0 to 1, got 1.5"),
        ({"start": 0.5, "stop": 0.2}, "guidance must start and stop between 0 and 1"),
        ({"threshold": "3"}, "threshold must be from 0 to 100, got 3"),
        ({"percentile": 0.9}, "go with a threshold"),
        ({"percentile": 1, "threshold": 3}, "percentile must be between 0 and 1"),
        ({"task": "nothing"}, 'there is no task "nothing"'),
        ({"task": "upscale", "given": {"scale": 2}}, "Upscale: give the video first"),
        ({"task": "upscale", "given": {"video": "x.mp4", "scale": 8}}, "Times must be one of 2, 4, got 8"),
        ({"task": "text", "given": {"fps": 16}}, "Frames per second: this model has no temporal super-resolution"),
        ({"task": "text", "given": {"fps": 12}}, "Frames per second: this model has no temporal super-resolution"),
        ({"task": "long", "given": {"seconds": 90, "noise": 0}}, "Seconds must be from 2 to 60, got 90"),
    ],
)
def test_what_a_request_may_not_ask_for(studio: demo.Studio, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WaltError, match=message.replace("(", r"\(")):
        ask(studio, **changes)


def test_one_request_at_a_time_and_a_cancelled_one_ends_early(studio: demo.Studio) -> None:
    inside, most, ended = [0], [0], []

    def report(session: str) -> Callable[[int, int, str], None]:
        def step(done: int, total: int, text: str) -> None:
            if text and "stage" in text and done == 1:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                if session == "first":
                    time.sleep(0.3)  # the second waits meanwhile
                    assert studio.cancel("first") and not studio.cancel("nobody")

        return step

    def work(session: str) -> None:
        try:
            studio.run(session, "text", ask(studio, steps=10), report(session))
            ended.append((session, "made"))
        except demo.Cancelled:
            ended.append((session, "cancelled"))
        finally:
            inside[0] -= 1

    threads = [threading.Thread(target=work, args=(session,)) for session in ("first", "second")]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert ended == [("first", "cancelled"), ("second", "made")] and most[0] == 1
    assert not studio.cancel("first")


def test_examples_are_sentences_of_the_models_world() -> None:
    assert demo.example_prompts({}) == []
    words = {"subjects": ["cat"], "motions": ["jumps"], "backgrounds": ["red"]}
    assert set(demo.example_prompts(words)) == {"a cat jumps on a red background"}


def test_without_gradio_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo", "--model", str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == 'walt: error: walt demo needs the extra "demo": pip install "walt[demo]"'


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(pipe: Any, folder: Path) -> Iterator[str]:
    """The address of a page; while it is served, this process may connect to itself alone."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the extra demo is not installed")
    connect, outside = socket.socket.connect, []

    def checked(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError(f"no connection to {address} in this test")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked)
        with demo.serving(pipe, folder, demo.Limits(frames=29, side=64, steps=50)) as address:
            yield address
    assert outside == []


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(address: str, body: Any = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=20) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def test_no_file_can_be_read_that_was_not_uploaded_or_made(served: str, folder: Path) -> None:
    files = ["/etc/passwd", Path(__file__), folder / "model_index.json", Path.cwd() / "pyproject.toml"]
    files += [folder / "transformer" / "config.json", "../../../../etc/passwd", "/proc/self/environ"]
    for file in files:
        status, text = fetch(f"{served}gradio_api/file={file}")
        assert status == 403 and "root:" not in text, file


def test_nothing_is_fetched_for_a_caller(served: str) -> None:
    for path in ("file=http://example.com/a.mp4", "file=https%3A//example.com/a.mp4", "proxy=https://a.hf.space/b"):
        assert fetch(f"{served}gradio_api/{path}")[0] == 403, path
    value = {"path": "http://example.com/a.mp4", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[{"video": value}]], "fn_index": 1, "session_hash": "x"}
    for route in ("queue/join", "run/predict", "api/predict"):
        status, text = fetch(f"{served}gradio_api/{route}", body)
        assert status == 403 and "fetches nothing" in text, route


def test_nothing_is_reported_and_there_is_no_api(served: str) -> None:
    config = json.loads(fetch(f"{served}config")[1])
    assert config["analytics_enabled"] is False and config["run_history"] is False
    assert json.loads(fetch(f"{served}gradio_api/info")[1]) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert "fonts.g" not in fetch(served)[1]


def test_it_listens_on_loopback_and_says_when_it_cannot(served: str, pipe: Any, folder: Path) -> None:
    assert served.startswith("http://127.0.0.1:")
    port = int(served.rstrip("/").rsplit(":", 1)[1])
    with (
        pytest.raises(WaltError, match=f"cannot listen on 127.0.0.1:{port}"),
        demo.serving(pipe, folder, demo.Limits(), port=port),
    ):
        pass


# -- a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, downloads: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-proxy-server",
        "window-size=1280,1000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


# The button is there and nothing lies over it.
READY = """
const button = document.querySelector('#make');
if (!button) return false;
const box = button.getBoundingClientRect();
return button.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2));
"""
STRANGERS = """
return performance.getEntriesByType('resource').map(entry => entry.name)
  .filter(name => !/^(blob|data):/.test(name) && !name.startsWith(location.origin));
"""


TOASTS = "return [...document.querySelectorAll('.toast-body')].map(toast => toast.innerText)"


class Page:
    """The page, used as a person would."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get(address)
        self.wait(READY)

    def wait(self, script: str, seconds: float = 120) -> Any:
        """What a script returns once that is true."""
        return self.until(lambda: self.browser.execute_script(script), script, seconds)

    def until(self, true: Callable[[], Any], what: str = "", seconds: float = 120) -> Any:
        end, said = time.monotonic() + seconds, set()
        while time.monotonic() < end:
            if value := true():
                return value
            said |= set(self.browser.execute_script(TOASTS))  # each is shown for a while only
            time.sleep(0.1)
        raise AssertionError(f"never true: {what or true}; the status is {self.text('#status')!r}, errors: {said}")

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def choose(self, task: str) -> None:
        """The tab of a task."""
        for tab in self.browser.find_elements("css selector", "#tasks button[role=tab]"):
            if tab.text.strip() == task and tab.is_displayed():
                tab.click()
                return
        raise AssertionError(f"there is no tab {task}")

    def write(self, prompt: str) -> None:
        box = self.find("#prompt textarea")
        box.clear()
        box.send_keys(prompt)


@pytest.mark.browser
def test_a_prompt_becomes_a_video_that_plays(browser: Any, served: str, downloads: Path) -> None:
    page = Page(browser, served)
    page.write("a rocket flies up")
    page.click("#make")
    source = page.wait("const v = document.querySelector('#video video'); return v && v.readyState >= 2 && v.src")
    assert source.startswith(served) and source.endswith(".mp4")
    assert page.wait("return document.querySelector('#video video').currentTime > 0")  # it plays
    size = browser.execute_script(
        "const v = document.querySelector('#video video'); return [v.videoWidth, v.videoHeight, v.duration]"
    )
    assert size == [64, 64, pytest.approx(29 / 8)]
    assert "29 frames, 3.6 s, of 64 x 64, seed 0" in page.text("#status")
    assert page.wait("return document.querySelectorAll('#gallery video').length === 1")
    page.click("#download")
    saved = downloads / "walt-text-0.mp4"
    page.until(saved.is_file)
    assert read_video(saved)[0].shape == (29, 64, 64, 3)
    # All of the page came from this server.
    assert browser.execute_script(STRANGERS) == []


@pytest.mark.browser
def test_cancel_interrupts_and_the_next_request_runs(browser: Any, served: str) -> None:
    page = Page(browser, served)
    page.write("a cat jumps")
    PAUSE[0] = 0.3
    try:
        page.click("#make")
        page.wait("return /stage 1/.test(document.querySelector('#video').innerText)")
        page.click("#stop")
        page.wait("return document.querySelector('#status').innerText.includes('Cancelled')")
    finally:
        PAUSE[0] = 0.0
    page.click("#make")
    page.wait("return document.querySelector('#status').innerText.includes('29 frames')")
    assert browser.execute_script("return document.querySelectorAll('#gallery video').length") == 1


@pytest.mark.browser
def test_errors_are_one_sentence_on_the_page(browser: Any, served: str) -> None:
    page = Page(browser, served)
    page.click("#make")
    assert page.wait("return document.querySelector('.toast-body')?.innerText.includes('write a prompt first')")


@pytest.mark.browser
def test_an_uploaded_video_is_enlarged(browser: Any, served: str, tmp_path: Path) -> None:
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    frames[:, 8:20, 8:20] = 200
    write_video(frames, tmp_path / "mine.mp4", 8)
    page = Page(browser, served)
    page.choose("Upscale")
    page.wait("const f = document.querySelector('#frames'); return !f || !f.offsetParent")  # it has no length to choose
    page.write("a cat")  # the tiny stages take text
    page.find("#upscale-video input[type=file]").send_keys(str(tmp_path / "mine.mp4"))
    page.wait("const v = document.querySelector('#upscale-video video'); return v && v.src.includes('/file=')")
    page.click("#make")
    page.wait("return document.querySelector('#status').innerText.includes('6 frames, 0.8 s, of 64 x 64')")
