"""The service against its own OpenAPI: schemathesis sends what the description allows and what it does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from patchpipe.demo import MODEL_DIR
from patchpipe.serve.models import Loading
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Limits, Settings
from patchpipe.serve.start import address_of, listen, make_server
from patchpipe.serve.web.app import make_app
from patchpipe.serve.work.model import Model
from tests import tiny

pytestmark = pytest.mark.timeout(600)

EXAMPLES = 8  # of each operation, always the same ones
LIMITS = Limits(pixels=48 * 48, frames=5, steps=2, prompt=200, pictures=2, body=2**20, waiting=500)
CLIP = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 8}


@dataclass(frozen=True)
class Running:
    """A service that takes requests, and a clip of it that is finished."""

    address: str
    clip: str


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The bundled model and a tiny Wan, each in one real worker."""
    wan = tiny.save("wan", tmp_path_factory.mktemp("wan"))
    (wan / "call.json").write_text(json.dumps({**CLIP, "output_type": "np"}))
    made: list[Service] = []
    plain = Loading(layout="plain", devices="cpu", threads=1)
    sources = {"demo": str(MODEL_DIR), "wan": str(wan)}
    models = [
        Model(name, source, lambda source=source: plain.start(source), lambda: made[0].model_changed())
        for name, source in sources.items()
    ]
    with ThreadPoolExecutor() as side_by_side:
        list(side_by_side.map(Model.start, models))
    made.append(Service(Settings(port=0, folder=tmp_path_factory.mktemp("serve"), limits=LIMITS), models))
    made[0].start()
    started, listener = threading.Event(), listen(made[0].settings)
    server = make_server(made[0], started.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert started.wait(30)
    address = address_of(listener)
    yield Running(address, finished_clip(address))
    server.should_exit = True
    thread.join(20)
    made[0].close()


def finished_clip(address: str) -> str:
    clip = httpx2.post(f"{address}/v1/videos", json={"prompt": "a wave"}).json()["id"]
    deadline = time.monotonic() + 120
    while httpx2.get(f"{address}/v1/videos/{clip}").json()["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return str(clip)


# What the service says of itself follows from its settings alone; the last test holds the two together.
DESCRIBED = make_app(SimpleNamespace(settings=Settings(limits=LIMITS))).openapi()  # type: ignore[arg-type]


@schemathesis.openapi.from_dict(DESCRIBED).parametrize()
@settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_one_that_the_description_has(running: Running, case: Any) -> None:
    names = case.path_parameters or {}
    if "video_id" in names and case.method == "GET" and len(names["video_id"]) % 2:
        names["video_id"] = running.clip  # no name that is drawn is a clip's
    left_out = [negative_data_rejection]  # numbers may come as text, for forms have nothing else
    if case.method == "POST":  # fields depend on each other and on the model: a size and a height, a stream and its n
        left_out.append(positive_data_acceptance)
    case.call_and_validate(base_url=running.address, excluded_checks=left_out, timeout=120)


def test_it_went_on_throughout(running: Running) -> None:
    assert httpx2.get(f"{running.address}/openapi.json").json() == json.loads(json.dumps(DESCRIBED))
    state = httpx2.get(f"{running.address}/v1/state").json()
    assert state["ready"]
    assert not [model["restarts"] for model in state["models"] if model["restarts"]]
