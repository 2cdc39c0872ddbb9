"""A fleet on a real Ray with two nodes on this machine: requests are answered by both, and whoever is killed.

It takes longer than other tests: Ray's two nodes start, and an engine on each, which a killed node and a killed process
must lose while they paint. All of it shares one cluster and one fleet.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.serve.models import Loading, Named
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Settings
from patchpipe.serve.work.tickets import Ended, Painted, Ticket, Work
from patchpipe.version import __version__
from tests.support.steered import Heard, until

ray = pytest.importorskip("ray", reason="a fleet needs Ray: pip install 'patchpipe[ray]'")

from patchpipe.serve.fleet.cluster import Cluster
from patchpipe.serve.fleet.fleet import Fleet
from patchpipe.serve.fleet.needs import Wanted
from patchpipe.serve.fleet.words import Spec, theirs

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"num_cpus": 1, "object_store_memory": 100 * 10**6, "include_dashboard": False}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Ray's two nodes, with one core each."""
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray has its processes give way to all others
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        found = Nodes(initialize_head=True, head_node_args=SMALL)
        found.add_node(**SMALL)
        ray.init(address=found.address, log_to_driver=False, namespace="patchpipe")
        yield found
        ray.shutdown()
        found.shutdown()


def make(nodes: Any, settings: Settings, source: str = str(MODEL_DIR), **wanted: Any) -> Fleet:
    loading = Loading(layout="exact", devices="cpu")
    spec = Spec(__version__, (Named("demo", source),), loading, False, theirs(settings))
    return Fleet(Wanted(nodes.address, silence=5.0, **wanted), spec, settings, Cluster(nodes.address))


@pytest.fixture(scope="module")
def running(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = Settings(folder=tmp_path_factory.mktemp("fleet"))
    fleet = make(nodes, settings, replicas=2)
    fleet.open()
    service = Service(settings, fleet=fleet)
    fleet.on_change = service.model_changed
    service.start()
    yield service
    service.close()


def ask(service: Service, heard: Heard, name: str, steps: int, **fields: Any) -> Ticket:
    call = {**call_defaults(MODEL_DIR), "prompt": "owl", "height": 64, "width": 64, "num_inference_steps": steps}
    return service.submit(Work(name, "demo", "picture", call, (1,), steps, **fields), heard.listen(name))


def replicas(service: Service) -> dict[int, dict[str, Any]]:
    return {one["replica"]: one for one in service.state()["replicas"]}


def both_up(service: Service) -> bool:
    return [one["state"] for one in replicas(service).values()] == ["up", "up"]


def figure(service: Service, line: str) -> float:
    found = [one for one in service.metrics.text().decode().splitlines() if one.startswith(line)]
    return sum(float(one.split()[-1]) for one in found)


def all_paint(service: Service, tickets: list[Ticket]) -> bool:
    return all(one["running"] for one in replicas(service).values()) and all(ticket.step > 2 for ticket in tickets)


def test_too_little_room_is_said_at_once_with_what_it_would_take(nodes: Any, tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path)
    with pytest.raises(ValueError, match="a replica takes 3 CPU on one node, and no node of the cluster has that"):
        make(nodes, settings, devices=3)
    with pytest.raises(ValueError, match=r"the cluster has room for 2 .*ask for --replicas 2"):
        make(nodes, settings, replicas=3)


def test_a_model_that_is_not_there_ends_the_start(nodes: Any, tmp_path: Path) -> None:
    fleet = make(nodes, Settings(folder=tmp_path), str(tmp_path / "nothing"), replicas=1)
    with pytest.raises(FileNotFoundError, match="nothing"):
        fleet.open()
    fleet.close()


def test_both_nodes_answer_and_what_is_killed_is_done_elsewhere(running: Service, nodes: Any) -> None:
    until(lambda: both_up(running), 240)
    heard = Heard()

    # -- both paint, and a request that is withdrawn ends at its next step
    asked = [ask(running, heard, f"first {number}", 150) for number in range(2)]
    gone = ask(running, heard, "gone", 5000)
    until(lambda: all_paint(running, asked), 120)
    running.cancel(gone)
    until(lambda: "gone" in heard.ends, 60)
    until(lambda: len(heard.ends) == 3, 120)
    assert all(isinstance(heard.ends[ticket.work.id], Painted) for ticket in asked)
    assert heard.ends["gone"].refusal.status == 499
    assert figure(running, "patchpipe_replica_up{") == 2
    assert all(figure(running, f'patchpipe_device_busy_seconds_total{{device="replica {one}') > 0 for one in (1, 2))

    # -- a node is killed, with all its processes, while it paints
    asked = [ask(running, heard, f"node {number}", 400) for number in range(3)]
    until(lambda: all_paint(running, asked[:2]), 120)
    victim = on_node(running, nodes.worker_nodes)
    nodes.remove_node(victim["node"], allow_graceful=False)
    kill(victim["pid"])
    until(lambda: all(ticket.over for ticket in asked), 240)
    assert all(isinstance(heard.ends[ticket.work.id], Painted) for ticket in asked)
    assert sorted(ticket.attempts for ticket in asked) == [1, 1, 2]  # what was lost began anew, once
    shown = replicas(running)[victim["replica"]]
    assert (shown["state"], shown["lost"]) == ("waiting for room", 1)
    assert "1 CPU on one node" in shown["cause"]

    # -- the other's process is killed while it paints: it comes back by itself
    last = ask(running, heard, "actor", 400)
    until(lambda: last.step > 2, 120)
    [left] = [one for one in replicas(running).values() if one["state"] == "up"]
    os.kill(left["pid"], signal.SIGKILL)
    until(lambda: last.over, 240)
    assert isinstance(heard.ends["actor"], Painted)
    assert last.attempts == 2
    assert figure(running, "patchpipe_replicas_lost_total") == 2

    # -- the node comes back, and its replica with it
    nodes.add_node(**SMALL)
    until(lambda: both_up(running), 240)
    assert not heard.twice
    assert not [end for end in heard.ends.values() if isinstance(end, Ended) and end.refusal.status != 499]


def on_node(service: Service, nodes: Any) -> dict[str, Any]:
    """The replica whose process is a descendant of a node's raylet."""
    [node] = nodes
    raylet = node.all_processes["raylet"][0].process.pid
    for one in replicas(service).values():
        if raylet in [parent.pid for parent in psutil.Process(one["pid"]).parents()]:
            return {**one, "node": node}
    raise AssertionError("no replica is on that node")


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # its node has taken it along
        os.kill(pid, signal.SIGKILL)
