"""The service as its clients meet it: the openai client, real engines, real sockets, and what goes wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from patchpipe.config import ParallelConfig
from patchpipe.demo import MODEL_DIR
from patchpipe.engine import Engine
from patchpipe.serve.models import EDIT_TASK, Loading
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Limits, Settings
from patchpipe.serve.start import address_of, listen, make_server
from patchpipe.serve.work.model import Model
from tests import tiny
from tests.support import chromium

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"num_inference_steps": 4}
LONG = {"prompt": "red apple", "num_inference_steps": 200, "size": "64x64"}
CLIP = {"num_frames": 17, "num_inference_steps": 4}


@dataclass(frozen=True)
class Running:
    """A service that takes requests."""

    service: Service
    address: str
    client: openai.OpenAI

    def post(self, path: str, **request: Any) -> httpx2.Response:
        return httpx2.post(self.address + path, timeout=300, **request)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.address + path, timeout=300)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny.save("wan", tmp_path_factory.mktemp("wan"))
    usual = {"height": 64, "width": 48, "max_sequence_length": 8, "guidance_scale": 3.0, "output_type": "np"}
    (folder / "call.json").write_text(json.dumps(usual))
    return str(folder)


@pytest.fixture(scope="module")
def running(clips: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The bundled model on two workers, the same for edits, and a tiny Wan."""
    made: list[Service] = []

    def changed() -> None:
        made[0].model_changed()

    def two_workers() -> Engine:
        return Engine(MODEL_DIR, ParallelConfig(pipefusion=2, patches=2), devices="cpu", threads=1)

    plain, demo = Loading(layout="plain", devices="cpu", threads=1), str(MODEL_DIR)
    models = [
        Model("demo", demo, two_workers, changed),
        Model("demo", demo, lambda: plain.start(demo, EDIT_TASK), changed, for_edits=True),
        Model("wan", clips, lambda: plain.start(clips), changed),
    ]
    folder = tmp_path_factory.mktemp("serve")
    lora_folder = save_lora(tmp_path_factory.mktemp("loras") / "ink.safetensors")
    settings = Settings(port=0, folder=folder, lora_folder=lora_folder, limits=Limits(waiting=2), in_flight=2)
    with ThreadPoolExecutor() as side_by_side:
        list(side_by_side.map(Model.start, models))
    made.append(Service(settings, models))
    made[0].start()
    started, listener = threading.Event(), listen(settings)
    server = make_server(made[0], started.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert started.wait(30)
    address = address_of(listener)
    yield Running(made[0], address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0))
    server.should_exit = True
    thread.join(20)
    made[0].close()


def save_lora(file: Path) -> Path:
    """A LoRA beside the bundled model's last layer; its folder."""
    [weights] = (MODEL_DIR / "transformer").glob("*.safetensors")
    with safe_open(weights, "pt") as found:
        outputs, inputs = found.get_slice("proj_out.weight").get_shape()
    draw = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (2, inputs), "lora_B": (outputs, 2)}
    save_file(
        {f"transformer.proj_out.{name}.weight": torch.randn(s, generator=draw) for name, s in shapes.items()}, file
    )
    return file.parent


def until(true: Callable[[], Any], seconds: float = 240.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def picture(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "")))


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


# -- pictures --------------------------------------------------------------------------------------


def test_a_seed_gives_the_engines_picture_in_any_number(running: Running) -> None:
    answer = running.client.images.generate(
        prompt="red apple", n=2, size="64x64", extra_body={**SHORT, "seed": 5, "priority": 3, "deadline_s": 1e4}
    )
    model = running.service.models["demo"]
    arguments = {**model.facts.advised, **SHORT, "height": 64, "width": 64, "prompt": "red apple"}
    for seed, data in zip((5, 6), answer.data or [], strict=True):
        assert picture(data.b64_json).tobytes() == model.engine(seed=seed, **arguments)[0].tobytes()
        assert (data.model_extra or {})["seed"] == seed
    assert (answer.size, answer.output_format) == ("64x64", "png")


def test_a_lora_is_on_for_the_requests_that_name_it(running: Running) -> None:
    def paint(**extra: Any) -> bytes:
        asked = {"prompt": "owl", "size": "64x64", "seed": 1, "num_inference_steps": 2, **extra}
        answer = running.post("/v1/images/generations", json=asked)
        assert answer.status_code == 200, answer.text
        return picture(answer.json()["data"][0]["b64_json"]).tobytes()

    without, weak, strong = paint(), paint(lora={"name": "ink", "scale": 0.1}), paint(lora="ink")
    assert len({without, weak, strong}) == 3
    assert paint() == without
    assert running.get("/v1/state").json()["loras"] == ["ink"]


def test_a_stream_shows_the_picture_on_the_way(running: Running) -> None:
    asked = {"prompt": "owl", "size": "64x64", "output_format": "webp"}
    extra = {"num_inference_steps": 12, "seed": 1}
    events = list(running.client.images.generate(**asked, stream=True, partial_images=2, extra_body=extra))  # type: ignore[call-overload]
    *partial, last = events
    assert [(one.type, one.partial_image_index) for one in partial] == [
        ("image_generation.partial_image", number) for number in range(len(partial))
    ]
    assert 1 <= len(partial) <= 2  # one may be left out where pictures come slower than they are asked for
    assert last.type == "image_generation.completed"
    whole = running.client.images.generate(**asked, extra_body=extra)  # type: ignore[call-overload]
    assert picture(last.b64_json).tobytes() == picture(whole.data[0].b64_json).tobytes()
    assert picture(partial[0].b64_json).tobytes() != picture(last.b64_json).tobytes()


def test_edits_start_from_a_picture_and_keep_its_shape(running: Running) -> None:
    edit = running.client.images.edit
    answer = edit(image=("a.png", png(80, 64)), prompt="red apple", extra_body={**SHORT, "strength": 0.5, "seed": 1})
    assert picture((answer.data or [])[0].b64_json).size == (80, 64)
    with pytest.raises(openai.BadRequestError, match="takes no mask"):
        edit(image=("a.png", png()), mask=("m.png", png()), prompt="red apple")
    with pytest.raises(openai.BadRequestError, match="starts from one picture"):
        edit(image=[("a.png", png()), ("b.png", png())], prompt="red apple")
    with pytest.raises(openai.BadRequestError, match="no picture that can be read"):
        edit(image=("a.png", b"GIF89a"), prompt="red apple")


def test_what_a_model_refuses_is_told_to_the_client(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="clips: use /v1/videos"):
        running.client.images.generate(prompt="owl", model="wan")
    with pytest.raises(openai.NotFoundError, match="did you mean 'demo'") as told:
        running.client.images.generate(prompt="owl", model="demos")
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    assert {one.id for one in running.client.models.list()} == {"demo", "wan"}
    assert running.client.models.retrieve("wan").owned_by == "patchpipe"


# -- clips -----------------------------------------------------------------------------------------


def test_a_clip_from_create_to_delete(running: Running) -> None:
    videos = running.client.videos
    clip = videos.create(prompt="a wave", model="wan", size="48x64", extra_body={**CLIP, "fps": 8})  # type: ignore[arg-type]
    assert (clip.status, clip.progress) == ("queued", 0)
    clip = videos.poll(clip.id, poll_interval_ms=100)
    assert (clip.status, clip.progress, clip.size, clip.seconds) == ("completed", 100, "48x64", "2.125")
    assert videos.download_content(clip.id).read()[4:8] == b"ftyp"
    small = Image.open(io.BytesIO(videos.download_content(clip.id, variant="thumbnail").read()))
    assert (small.size, small.format) == ((48, 64), "WEBP")
    ranged = httpx2.get(f"{running.address}/v1/videos/{clip.id}/content", headers={"range": "bytes=0-7"})
    assert (ranged.status_code, len(ranged.content)) == (206, 8)
    for wrong, status in (("bytes=99999999-", 416), ("bytes", 400)):
        refused = httpx2.get(f"{running.address}/v1/videos/{clip.id}/content", headers={"range": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, "range")
    assert clip.id in [one.id for one in videos.list(limit=1)]
    assert videos.delete(clip.id).deleted
    for again in (videos.delete, videos.retrieve, videos.download_content):
        with pytest.raises(openai.NotFoundError):
            again(clip.id)
    assert not (running.service.settings.folder / "clips" / clip.id).exists()


def test_a_clip_that_runs_ends_when_it_is_deleted(running: Running) -> None:
    asked = {"prompt": "a wave", "num_inference_steps": 200, "num_frames": 17}
    clip = running.post("/v1/videos", json=asked).json()["id"]
    until(lambda: running.get(f"/v1/videos/{clip}").json()["progress"] > 0)
    assert running.get(f"/v1/videos/{clip}/content").status_code == 400
    running.client.videos.delete(clip)
    until(lambda: not running.get("/v1/state").json()["running"])
    assert 'kind="clip",model="wan",outcome="cancelled"} 1.0' in running.get("/metrics").text


# -- bad input -------------------------------------------------------------------------------------

WRONG: list[tuple[Any, int, str]] = [
    ({}, 400, "prompt is missing"),
    ({"prompt": " "}, 400, "prompt is missing"),
    ({"prompt": 3}, 400, "valid string"),
    ({"prompt": "x" * 32_001}, 400, "32,000 are allowed"),
    ({"prompt": "\ud800"}, 400, "characters that are none"),
    ({"prompt": "x", "promt": 1}, 400, "did you mean 'prompt'"),
    ({"prompt": "x", "n": 0}, 400, "greater than or equal to 1"),
    ({"prompt": "x", "n": 11}, 400, "10 pictures are allowed"),
    ({"prompt": "x", "n": True}, 400, "true or false"),
    ({"prompt": "x", "n": 1e30}, 400, "n:"),
    ({"prompt": "x", "size": "big"}, 400, "WIDTHxHEIGHT"),
    ({"prompt": "x", "size": "100x100"}, 400, "multiple of 16"),
    ({"prompt": "x", "size": "8192x8192"}, 400, "4,194,304 are allowed"),
    ({"prompt": "x", "size": "64x64", "width": 32}, 400, "leave one out"),
    ({"prompt": "x", "num_inference_steps": 201}, 400, "200 are allowed"),
    ({"prompt": "x", "guidance_scale": "strong"}, 400, "valid number"),
    ({"prompt": "x", "seed": -1}, 400, "greater than or equal to 0"),
    ({"prompt": "x", "deadline_s": 0}, 400, "greater than 0"),
    ({"prompt": "x", "stream": True, "n": 2}, 400, "n must be 1"),
    ({"prompt": "x", "partial_images": 1}, 400, "needs stream"),
    ({"prompt": "x", "lora": {"path": "/etc/passwd"}}, 400, "files and addresses are not taken"),
    ({"prompt": "x", "lora": "../../secret"}, 400, "there are ink"),
    ({"prompt": "x", "response_format": "url"}, 400, "b64_json"),
    ({"prompt": "x", "negative_prompt": "y", "guidance_scale": 1}, 400, "no effect"),
    ([], 400, "JSON object"),
    (b"{", 400, "no JSON"),
    (b"[" * 100_000, 400, "no JSON"),
]


def test_bad_input_is_told_at_once_in_openais_shape(running: Running) -> None:
    kind = {"content-type": "application/json"}
    for body, status, words in WRONG:
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = running.post("/v1/images/generations", content=content, headers=kind)
        error = answer.json()["error"]
        assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"}), (body, error)
        assert words in error["message"], error
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-should-retry"] == "false"
    others = [
        ("/v1/images/generations", {"content": "{}", "headers": {"content-type": "text/plain"}}, 415),
        ("/v1/images/generations", {"content": b"{" + b" " * 2**26 + b"}", "headers": kind}, 413),
        ("/v1/images/edits", {"data": {"prompt": "x"}, "files": {"picture": png()}}, 400),
        ("/v1/images/edits", {"data": {"prompt": "x", "prompt[]": "y"}, "files": {"image": png()}}, 400),
        ("/v1/images/edits", {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
        ("/v1/videos", {"json": {"prompt": "x", "seconds": 599}}, 400),
        ("/v1/videos", {"data": {"prompt": "x"}, "files": {"input_reference": png()}}, 400),
        ("/v1/videos", {"json": {"prompt": "x", "model": "demo"}}, 400),
        ("/v1/nothing", {"json": {}}, 404),
    ]
    for path, request, status in others:
        answer = running.post(path, **request)
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for path in ("/v1/videos?limit=0", "/v1/videos?order=up", "/v1/videos/x/content?variant=big"):
        assert running.get(path).status_code == 400
    for path in ("/v1/videos?after=nothing", "/v1/videos/%00"):
        assert running.get(path).status_code == 404
    wrong = httpx2.put(f"{running.address}/v1/videos/x")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "DELETE, GET")


# -- the page --------------------------------------------------------------------------------------

COUNT_PREVIEWS = """
window.previews = 0;
new MutationObserver(() => window.previews += document.querySelectorAll("#canvas img.coming").length ? 1 : 0)
  .observe(document.getElementById("canvas"), { childList: true });
"""


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")
def test_the_page_paints_by_keyboard_alone_and_fits_a_phone(running: Running, tmp_path: Path) -> None:
    with chromium.Chromium(tmp_path) as page:
        page.size(1280, 900)
        page.open(running.address)
        page.until("document.getElementById('health')?.textContent === 'ready'")
        page.run(COUNT_PREVIEWS)
        for _ in range(2):  # past the link that skips to the prompt
            page.press("Tab", 9)
        assert page.run("document.activeElement.id") == "prompt"
        for number, prompt in enumerate(("owl, flat style", "red heart, 3d style"), start=1):
            page.run("document.getElementById('prompt').select()")
            page.type(prompt)
            page.press("Enter", 13, modifiers=2)
            page.until(f"document.querySelectorAll('#pictures li').length === {number}", 200)
            assert page.run("document.getElementById('said').textContent").startswith("The image is there")
        assert page.run("window.previews") >= 1
        assert page.run("document.querySelector('#canvas img').naturalWidth") == 128
        page.screenshot(tmp_path / "desktop.png")
        assert "pipefusion 2" in page.run("document.getElementById('models').textContent")
        assert all(name for _, name in page.names()), page.names()
        page.size(390, 844, phone=True)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(tmp_path / "phone.png")
        assert not page.problems


# -- under load, and when something dies --------------------------------------------------------------


def test_clients_that_leave_and_a_queue_that_is_full(running: Running) -> None:
    cancelled = _cancelled(running)
    clients = [_asking(running.address)]
    until(lambda: running.get("/v1/state").json()["running"])
    clients += [_asking(running.address) for _ in range(2)]
    until(lambda: len(running.get("/v1/state").json()["waiting"]) == 2)
    with pytest.raises(openai.RateLimitError) as told:
        running.client.images.generate(prompt="owl")
    assert 1 <= int(told.value.response.headers["retry-after"]) <= 120
    assert "patchpipe_requests_waiting" in running.get("/metrics").text
    for client in clients:
        client.close()
    until(lambda: not running.get("/v1/state").json()["running"], 10)
    assert not running.get("/v1/state").json()["waiting"]
    assert _cancelled(running) == cancelled + len(clients)
    assert running.client.images.generate(prompt="owl", size="64x64", extra_body=SHORT).data


def _cancelled(running: Running) -> int:
    lines = [line for line in running.get("/metrics").text.splitlines() if line.startswith("patchpipe_requests_total{")]
    return sum(int(float(line.split()[-1])) for line in lines if 'outcome="cancelled"' in line)


def _asking(address: str) -> HTTPConnection:
    """A client that has asked for a picture which takes long, and waits."""
    client = HTTPConnection(urlsplit(address).netloc)
    body = json.dumps(LONG)
    client.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    return client


def test_a_worker_that_is_killed_costs_time_and_nothing_else(running: Running) -> None:
    model, found = running.service.models["demo"], []
    asked = {"prompt": "owl", "size": "64x64", "num_inference_steps": 60, "seed": 1}
    thread = threading.Thread(target=lambda: found.append(running.post("/v1/images/generations", json=asked)))
    thread.start()
    until(lambda: any(one["step"] > 2 for one in running.get("/v1/state").json()["running"]))
    os.kill(model.engine.ranks[1].pid, signal.SIGKILL)
    until(lambda: not model.usable)
    assert running.get("/readyz").status_code == 200  # the others go on
    clip = running.post("/v1/videos", json={"prompt": "a wave", **CLIP}).json()["id"]
    until(lambda: running.get(f"/v1/videos/{clip}").json()["status"] == "completed")
    thread.join(300)
    assert found[0].status_code == 200
    assert model.restarts == 1
    again = running.post("/v1/images/generations", json=asked)
    assert again.json()["data"] == found[0].json()["data"]


# -- a process of its own ------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "patchpipe", "serve", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def address_told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if "listening on" in line:
            return line.split()[-1]
    raise AssertionError(process.communicate()[1])


@pytest.mark.extra
def test_a_restart_goes_on_with_what_was_accepted_also_after_a_kill(clips: str, tmp_path: Path) -> None:
    arguments = (f"wan={clips}", "--port", "0", "--folder", str(tmp_path), "--layout", "plain", "--threads", "1")
    with start(*arguments, "--log-format", "json") as first:
        address = address_told(first)
        slow = {"prompt": "a wave", "num_inference_steps": 200, "num_frames": 17}
        ids = [httpx2.post(f"{address}/v1/videos", json=one).json()["id"] for one in (slow, {"prompt": "x", **CLIP})]
        until(lambda: httpx2.get(f"{address}/v1/videos/{ids[0]}").json()["progress"] > 0)
        first.send_signal(signal.SIGTERM)
        _, log = first.communicate(timeout=300)
    assert first.returncode == 0, log
    assert "draining" in [json.loads(line)["event"] for line in log.splitlines()]
    with start(*arguments) as second:
        address = address_told(second)
        until(lambda: httpx2.get(f"{address}/v1/videos/{ids[0]}").json()["progress"] > 0)
        with start(*arguments) as other:  # the folder is taken
            assert "belongs to a service that runs" in other.communicate(timeout=300)[1]
        left = psutil.Process(second.pid).children(recursive=True)
        second.kill()  # -9, with one clip under way and one that waits
        assert left
        assert not psutil.wait_procs(left, timeout=60)[1]  # no worker outlives it
    with start(*arguments) as third:
        address = address_told(third)
        until(lambda: httpx2.get(f"{address}/v1/videos/{ids[0]}").json()["progress"] > 0)  # begun anew
        httpx2.delete(f"{address}/v1/videos/{ids[0]}")
        until(lambda: httpx2.get(f"{address}/v1/videos/{ids[1]}").json()["status"] == "completed")
        third.kill()
