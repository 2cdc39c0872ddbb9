"""The service's parts by themselves: the checks, the clips' table, the door, who follows a request."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from patchpipe.serve import media
from patchpipe.serve.clips.jobs import MOST_BEGINNINGS, Clips, own
from patchpipe.serve.models import Loading, read_models
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Limits, Settings, read_keys
from patchpipe.serve.web.app import make_app
from patchpipe.serve.web.follow import Following
from patchpipe.serve.work.asking import ask, read_loras
from patchpipe.serve.work.model import Facts, Model
from patchpipe.serve.work.tickets import Ended, Listener, Painted, Started, Stepped, Ticket, Work

KEY = "0123456789abcdef"


def work(name: str, **fields: Any) -> Work:
    return Work(
        **{"id": name, "model": "demo", "kind": "picture", "arguments": {"prompt": name}, "seeds": (1,), **fields}
    )


# -- checks --------------------------------------------------------------------------------------------

FACTS = Facts(
    arguments=frozenset({"prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_frames", "image"}),
    defaults={"num_inference_steps": 50, "guidance_scale": 5.0},
    advised={"height": 480, "width": 832, "unknown_to_this_task": 1},
    clips=True,
    pipeline="WanPipeline",
    layout="cfg 2",
    devices=("cpu", "cpu"),
    together=True,
)


def asked(**fields: Any) -> Work:
    model = Model("wan", "nowhere", lambda: pytest.fail("it is not started"), lambda: None)
    model.facts = FACTS
    images = {"image": fields.pop("image")} if "image" in fields else None
    return ask("x", model, "clip", {"prompt": "a wave", **fields}, Limits(frames=81), None, images)


def test_what_a_client_asks_becomes_the_pipelines_arguments() -> None:
    found = asked(seconds=4.0, fps=16, guidance_scale=3)
    assert found.arguments == {
        "height": 480, "width": 832, "num_frames": 65, "guidance_scale": 3.0, "prompt": "a wave"
    }  # fmt: skip
    assert found.steps == 50
    fitted = asked(image=Image.new("RGB", (2000, 1000))).arguments
    assert (fitted["width"], fitted["height"]) == (880, 432)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seconds": 100.0}, "81 are allowed"),
        ({"negative_prompt": "x"}, "takes no negative_prompt"),
        ({"true_cfg_scale": 2.0}, "takes no true_cfg_scale"),
        ({"size": "0x16"}, "multiple of 16"),
        ({"size": "16x１６"}, "WIDTHxHEIGHT"),
        ({"size": "9999999x16"}, "too large"),
    ],
)
def test_what_a_model_cannot_do_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as told:
        asked(**fields)
    assert told.value.status == 400


def test_loras_are_named_and_never_a_path(tmp_path: Path) -> None:
    (tmp_path / "ink.safetensors").write_bytes(b"")
    (tmp_path / "evil.bin").write_bytes(b"")
    both = (("ink", 0.5),)
    assert read_loras({"name": "ink", "scale": "0.5"}, tmp_path) == both
    assert read_loras('{"name": "ink", "scale": 0.5}', tmp_path) == both
    assert read_loras([both[0][0]], tmp_path) == (("ink", 1.0),)
    for wrong in (
        "evil",
        "../ink",
        str(tmp_path / "ink"),
        {"name": "ink", "scale": "nan"},
        {"path": "ink"},
        "[",
        ["ink", "ink"],
    ):
        with pytest.raises(Refusal, match=r"lora|LoRA"):
            read_loras(wrong, tmp_path)


def test_uploads_are_looked_at_before_they_are_decoded() -> None:
    bomb = io.BytesIO()
    Image.new("L", (6000, 6000)).save(bomb, "PNG")
    tiff = io.BytesIO()
    Image.new("L", (8, 8)).save(tiff, "TIFF")
    for data, status in ((bomb.getvalue(), 413), (tiff.getvalue(), 400), (bomb.getvalue()[:200], 413), (b"", 400)):
        with pytest.raises(Refusal) as told:
            media.decode_upload(data, 32 * 2**20, "image")
        assert told.value.status == status


def test_settings_are_closed_by_default(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be reached by others"):
        Settings(host="0.0.0.0")
    with pytest.raises(ValueError, match="16 characters"):
        Settings(api_keys=("short",))
    (tmp_path / "keys").write_text(f"# one a line\n{KEY}\n")
    keys = read_keys(tmp_path / "keys", "another-key-of-mine, ")
    assert keys == ("another-key-of-mine", KEY)
    settings = Settings(host="0.0.0.0", api_keys=keys)
    assert [settings.admits(key) for key in (KEY, KEY + "x", "", None)] == [True, False, False, False]
    assert KEY not in repr(settings)
    with pytest.raises(ValueError, match="policy fifo must be one of fcfs"):
        Settings(policy="fifo")
    with pytest.raises(ValueError, match=r"--deadline-scale 0\.0 must be above 0"):
        Settings(deadline_scale=0.0)
    with pytest.raises(ValueError, match="there is one: leave it out"):
        Loading(layout="elastic", devices=["cpu"]).start("nowhere")
    with pytest.raises(ValueError, match="two models are called"):
        read_models(["a=x", "a=y"])
    with pytest.raises(ValueError, match="leave out --in-flight"):
        Loading(layout="plain", in_flight=2)


# -- clips ---------------------------------------------------------------------------------------------


class Taken:
    """Stands where the service is, and keeps what it is given."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.listeners: list[Listener] = []

    def submit(self, one: Work, listen: Listener) -> Ticket:
        self.work.append(one)
        self.listeners.append(listen)
        return Ticket(one, listen, 0.0)


def clips_of(folder: Path, taken: Taken) -> Clips:
    return Clips(folder, None, 1.0, taken.submit, lambda ticket: None)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_accepted_is_lost(tmp_path: Path) -> None:
    first, second = Taken(), Taken()
    before = clips_of(tmp_path, first)
    picture = Image.linear_gradient("L").convert("RGB")
    clip = work("clip", kind="clip", arguments={"prompt": "a", "image": picture}, loras=(("ink", 0.5),), steps=4)
    for one in (clip, work("other", kind="clip")):
        before.create(one, "wan", 8)
    first.listeners[0](Started())
    first.listeners[0](Stepped(1, 4))
    assert (before.get("clip").status, before.get("clip").progress) == ("in_progress", 25)
    after = clips_of(tmp_path, second)  # the first one was killed
    assert after.restore() == 2
    restored, _ = second.work
    assert restored.arguments.pop("image").tobytes() == picture.tobytes()  # type: ignore[attr-defined]
    assert (restored.loras, restored.arguments, restored.seeds) == (clip.loras, {"prompt": "a"}, (1,))
    assert after.get("clip").status == "queued"
    second.listeners[0](Started())
    second.listeners[0](Painted(([picture] * 3,), 1.0))
    second.listeners[1](Ended(Refusal(503, "a worker died", code="worker_lost")))
    until(lambda: after.get("clip").status == "completed")
    path, kind = after.file("clip", "video")
    assert (path.read_bytes()[4:8], kind) == (b"ftyp", "video/mp4")
    assert after.get("other").error == {"code": "worker_lost", "message": "a worker died"}
    assert [one.id for one in after.page(None, 1, True)[0]] == ["other"]
    assert after.page("other", 5, True) == ([after.get("clip")], False)
    after._store.change("clip", expires_at=time.time() - 1)
    after.sweep()
    assert not path.parent.exists()


def test_a_clip_that_ends_the_service_each_time_is_given_up(tmp_path: Path) -> None:
    for _ in range(MOST_BEGINNINGS):
        taken = Taken()
        clips = clips_of(tmp_path, taken)
        clips.restore() if clips._store.get("clip") else clips.create(work("clip", kind="clip"), "wan", 8)
        taken.listeners[0](Started())
    last = clips_of(tmp_path, Taken())
    last.restore()
    assert (last.get("clip").status, (last.get("clip").error or {})["code"]) == ("failed", "gave_up")


def test_a_service_that_ends_leaves_its_clips_to_the_next(tmp_path: Path) -> None:
    taken = Taken()
    clips = clips_of(tmp_path, taken)
    clips.create(work("clip", kind="clip"), "wan", 8)
    clips.stop()
    taken.listeners[0](Ended(Refusal(503, "shutting down")))
    assert clips.get("clip").status == "queued"
    with own(tmp_path), pytest.raises(ValueError, match="belongs to a service that runs"):
        own(tmp_path)


# -- the door ------------------------------------------------------------------------------------------


def door(folder: Path, address: str = "http://127.0.0.1", **settings: Any) -> TestClient:
    """A service without models: enough for whom it lets in."""
    return TestClient(make_app(Service(Settings(folder=folder, **settings), [])), base_url=address)


def test_without_keys_strangers_pages_and_names_stay_out(tmp_path: Path) -> None:
    client = door(tmp_path, origins=("https://studio.example",))
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers={"origin": "http://127.0.0.1"}).status_code == 200
    assert client.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"origin": "null"}).status_code == 403
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    friend = client.get("/v1/models", headers={"origin": "https://studio.example"})
    assert friend.headers["access-control-allow-origin"] == "https://studio.example"


def test_with_keys_only_those_who_have_one_come_in(tmp_path: Path) -> None:
    client = door(tmp_path, "http://studio.example", api_keys=(KEY,))
    for path in ("/v1/models", "/metrics", "/v1/state"):
        assert (
            client.get(path).status_code == client.get(path, headers={"authorization": "Bearer x"}).status_code == 401
        )
        assert client.get(path, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503  # no model
    refused = client.post("/v1/images/generations", content=b"never read")
    assert refused.json()["error"]["code"] == "invalid_api_key"


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    client = door(tmp_path)
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js", "icon.svg"):
        part = client.get(f"/page/{name}")
        assert part.status_code == 200
        assert f'"/page/{name}"' in page.text
        assert "https://" not in part.text
    assert client.get("/page/..%2fstart.py").status_code == 404
    assert client.get("/", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_the_api_describes_itself(tmp_path: Path) -> None:
    found = door(tmp_path).get("/openapi.json").json()
    asked = found["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "seed", "deadline_s", "partial_images"} <= set(asked["properties"])
    assert json.dumps(found)


# -- who follows a request -----------------------------------------------------------------------------


class Quick:
    """Paints in steps of a few milliseconds, as long as anybody wants it."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def submit(self, work: Work, listen: Listener) -> Ticket:
        ticket = Ticket(work, listen, arrived=0.0)
        threading.Thread(target=self._paint, args=(listen,), daemon=True).start()
        return ticket

    def _paint(self, listen: Listener) -> None:
        for step in range(2000):
            if self.cancelled.wait(0.005):
                return
            listen(Stepped(step, 2000))

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.set()


class Gone:
    """A connection whose client has left."""

    async def is_disconnected(self) -> bool:
        return True


def test_a_client_that_leaves_is_noticed_also_where_steps_are_quick() -> None:
    quick = Quick()

    async def follow() -> Any:
        following = await Following.begin(quick, work("a"), Gone())  # type: ignore[arg-type]
        return await asyncio.wait_for(following.end(), 5)

    assert asyncio.run(follow()) is None
    assert quick.cancelled.wait(5)
