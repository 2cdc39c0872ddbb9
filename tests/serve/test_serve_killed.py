"""Each kind of process of a service is killed in turn, under load: requests are answered, and it goes on by itself."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.engine import Elastic, Engine
from patchpipe.engine.processes import warm
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Settings
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Ended, Painted, Ticket, Work
from tests import tiny
from tests.support.steered import Heard, until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The bundled model and a tiny Wan, both whole on each of two workers."""
    wan = tiny.save("wan", tmp_path_factory.mktemp("wan"))
    (wan / "call.json").write_text(json.dumps({"max_sequence_length": 8, "output_type": "np"}))
    made: list[Service] = []

    def start(source: Any) -> Engine:
        return Engine(source, Elastic(2, timeout=30), devices="cpu", threads=1)

    with warm():
        models = [
            Model(name, str(source), lambda source=source: start(source), lambda: made[0].model_changed())
            for name, source in (("pictures", MODEL_DIR), ("clips", wan))
        ]
        for model in models:
            model.start()
        made.append(Service(Settings(folder=tmp_path_factory.mktemp("serve")), models))
        made[0].start()
        yield made[0]
        made[0].close()


def ask(service: Service, heard: Heard, name: str, model: str, **more: Any) -> Ticket:
    own = {"num_frames": 9} if model == "clips" else {}
    call = {**call_defaults(service.models[model].source), "prompt": "owl", "height": 64, "width": 64, **own, **more}
    kind = "clip" if own else "picture"
    work = Work(name, model, kind, call, (1,), call["num_inference_steps"], deadline_s=60.0)  # type: ignore[arg-type]
    return service.submit(work, heard.listen(name))


def victims(service: Service) -> dict[str, int]:
    """A worker of each rank, and the process that they are forked from."""
    ranks = service.models["pictures"].engine.ranks
    parent = psutil.Process(ranks[0].pid).parent()
    assert parent is not None
    found = {"rank 0": ranks[0].pid, "rank 1": ranks[1].pid}
    return found if parent.pid == os.getpid() else {**found, "fork server": parent.pid}


def test_whoever_is_killed_every_request_is_answered(running: Service) -> None:
    pictures, clips = running.models["pictures"], running.models["clips"]
    for victim in ("rank 0", "fork server", "rank 1"):
        heard, restarts = Heard(), pictures.restarts
        asked = [ask(running, heard, f"clip {victim}", "clips", num_inference_steps=30)]
        asked += [ask(running, heard, f"{number} {victim}", "pictures", num_inference_steps=20) for number in range(3)]
        until(
            lambda heard=heard: any(
                one.ticket.step > 1 for one in running.conductor.snapshot() if one.state == "running"
            ),
            200,
        )
        found = victims(running)
        if victim in found:
            os.kill(found[victim], signal.SIGKILL)
        until(lambda asked=asked: all(ticket.over for ticket in asked), 240)
        assert not heard.twice
        for ticket in asked:
            end = heard.ends[ticket.work.id]
            assert isinstance(end, Painted) or (isinstance(end, Ended) and end.refusal.status == 503), end
        assert isinstance(heard.ends[f"clip {victim}"], Painted)  # another engine's: it goes on
        assert all(isinstance(end, Painted) for end in heard.ends.values())  # tried once more
        if victim.startswith("rank"):
            until(lambda restarts=restarts: pictures.restarts == restarts + 1, 60)
        assert (clips.restarts, pictures.usable) == (0, True)
