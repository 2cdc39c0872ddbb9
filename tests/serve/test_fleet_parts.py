"""A fleet's queue and what becomes of its replicas, on a cluster and engines that only pretend, in this process.

Everything but Ray and the engines is real. `test_fleet.py` has a real Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patchpipe.scheduling import Group, Job, Request, Shape, TableCosts, Waiting, dispatch
from patchpipe.serve.fleet.cluster import Lost
from patchpipe.serve.fleet.fleet import Fleet
from patchpipe.serve.fleet.needs import Need, Node, Wanted, check_room, need_of
from patchpipe.serve.fleet.replica import Replica
from patchpipe.serve.fleet.words import Spec, theirs
from patchpipe.serve.models import Loading, Named
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Limits, Settings
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Painted
from patchpipe.version import __version__
from tests.support import steered
from tests.support.steered import Engine, Heard, ask, states, until

PICTURE, CLIP = Shape("pictures", 64, 64), Shape("clips", 64, 64, 9)
COSTS = TableCosts({(PICTURE, 1, 1): 1.0, (CLIP, 1, 1): 10.0})


# -- the pure decision -------------------------------------------------------------------------------


def request(name: str, deadline: float, shape: Shape = PICTURE, steps: int = 10) -> Request:
    return Request(name, shape, steps, 0.0, deadline)


def sent(groups: list[Group], *wanted: Request) -> list[tuple[str, int]]:
    found = dispatch(0.0, groups, [Waiting(one, one.shape.model) for one in wanted])
    return [(one.id, number) for one, number in found]


def test_the_earliest_deadline_goes_first_to_whoever_ends_it_first() -> None:
    slow = TableCosts({(PICTURE, 1, 1): 3.0, (CLIP, 1, 1): 30.0})
    groups = [Group(1, 1, slow), Group(2, 1, COSTS)]
    wanted = [request("late", 90.0), request("soon", 20.0), request("next", 40.0), request("last", 99.0)]
    # The quick group ends two before the slow one ends any. The last is meant for it too, and waits for that here.
    assert sent(groups, *wanted) == [("soon", 2), ("next", 2), ("late", 1)]
    assert sent(groups[1:], *wanted) == [("soon", 2), ("next", 2)]


def test_what_is_urgent_goes_to_a_busy_group_and_to_the_one_with_less_work() -> None:
    first, second, third = (Job(request(f"clip {number}", 900.0, CLIP, 50), 50) for number in range(3))
    nearly_done = Job(request("nearly done", 900.0, CLIP, 50), 1)
    busy = [Group(1, 1, COSTS, (first, second)), Group(2, 1, COSTS, (nearly_done, third))]
    assert sent(busy, request("urgent", 20.0)) == [("urgent", 2)]
    running = replace(busy[1], staying=frozenset({"nearly done", "clip 2"}))  # it would have to wait for both
    assert sent([busy[0], running], request("urgent", 20.0)) == [("urgent", 1)]
    assert sent([running], request("urgent", 20.0)) == []
    assert sent(busy, request("can wait", 1000.0)) == []


def test_a_group_gets_only_what_it_can_paint() -> None:
    groups = [Group(1, 1, COSTS, models=frozenset({"pictures"})), Group(2, 4, COSTS, models=frozenset({"clips"}))]
    wanted = [request("clip", 1.0, CLIP), *(request(f"picture {number}", 2.0) for number in range(4))]
    assert sent(groups, *wanted) == [("clip", 2), ("picture 0", 1), ("picture 1", 1)]
    assert sent([], *wanted) == []


# -- room --------------------------------------------------------------------------------------------


def test_what_a_fleet_takes_is_told_where_it_is_not_there() -> None:
    nodes = [Node("a", "10.0.0.1", {"CPU": 8.0}), Node("b", "10.0.0.2", {"CPU": 32.0, "GPU": 4.0})]
    need = need_of(Wanted(devices=2), nodes, None, None)
    assert (need, need.room(nodes)) == (Need(2, gpu=True), 2)
    check_room(Wanted(replicas=2, devices=2), need, nodes)
    with pytest.raises(ValueError, match=r"2 GPU and 2 CPU on one node.*room for 2 .*10.0.0.1: 8 CPU; 10.0.0.2: 4 GPU"):
        check_room(Wanted(replicas=3, devices=2), need, nodes)
    with pytest.raises(ValueError, match="no node of the cluster has that"):
        check_room(Wanted(devices=8), Need(8, gpu=True), nodes)
    assert need_of(Wanted(), nodes, "cpu", 4).room(nodes) == 10
    with pytest.raises(ValueError, match="--replica-devices"):
        need_of(Wanted(), nodes, ["cuda:0", "cuda:1"], None)
    with pytest.raises(ValueError, match="--replicas 0"):
        Wanted(replicas=0)


# -- replicas that come and go -------------------------------------------------------------------------


class Pretended(Replica):
    """A replica whose engines pretend."""

    engine: Engine

    def _load(self) -> list[Model]:
        self.engine = Engine(1, elastic=False)
        return [steered._model(one.name, lambda: self.engine, self._model_changed) for one in self._spec.named]


class Process:
    """A replica's process: a thread for each question, and a death that all of them notice."""

    def __init__(self, replica: Replica) -> None:
        self.replica, self.dead = replica, threading.Event()
        self.calls = ThreadPoolExecutor(8)

    def ask(self, what: str, *given: Any, seconds: float) -> Any:
        answer = self.tell(what, *given)
        for _ in range(int(seconds / 0.01)):
            if self.dead.is_set():
                raise Lost("it was killed")
            try:
                return answer.result(0.01)
            except Late:
                continue
        raise Lost("it said nothing")

    def tell(self, what: str, *given: Any) -> Any:
        return self.calls.submit(getattr(self.replica, what), *given)

    def kill(self) -> None:
        self.dead.set()


class Rooms:
    """A cluster with room for so many replicas."""

    def __init__(self, room: int) -> None:
        self.room, self.processes = room, []
        self.held: list[Any] = []

    def nodes(self) -> list[Node]:
        return [Node(f"n{number}", f"10.0.0.{number}", {"CPU": 1.0}) for number in range(1, self.room + 1)]

    def ask_room(self, need: Need) -> Any:
        return Room(self)

    def at_work(self) -> list[Process]:
        return [one for one in self.processes if not one.dead.is_set() and one.replica.engine.open]

    def close(self) -> None:
        pass


class Room:
    node = "10.0.0.1"

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms

    def wait(self, seconds: float) -> bool:
        if self not in self.rooms.held and len(self.rooms.held) < self.rooms.room:
            self.rooms.held.append(self)
        threading.Event().wait(0.01)
        return self in self.rooms.held

    def enter(self, spec: Spec) -> Process:
        self.rooms.processes.append(Process(Pretended(spec)))
        return self.rooms.processes[-1]

    def give_back(self) -> None:
        if self in self.rooms.held:
            self.rooms.held.remove(self)


@contextmanager
def service(folder: Path, room: int = 2, **settings: Any) -> Iterator[tuple[Service, Rooms]]:
    rooms, chosen = Rooms(room), Settings(folder=folder, **settings)
    named = (Named("pictures", "nowhere"), Named("clips", "nowhere"))
    spec = Spec(__version__, named, Loading(devices="cpu"), False, theirs(chosen))
    fleet = Fleet(Wanted(replicas=room, silence=2.0), spec, chosen, rooms)  # type: ignore[arg-type]
    fleet.open()
    made = Service(chosen, fleet=fleet)
    fleet.on_change = made.model_changed
    made.start()
    until(lambda: len(made.state()["replicas"]) == room and all(one["state"] == "up" for one in replicas(made)))
    try:
        yield made, rooms
    finally:
        made.close()


def replicas(running: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.state()["replicas"]
    return found


def began(running: Service, *names: str) -> Callable[[], bool]:
    def are() -> bool:
        return all(states(running).get(name) == "running" for name in names)

    return are


def test_a_request_is_begun_anew_once_and_then_fails_with_the_cause(tmp_path: Path) -> None:
    with service(tmp_path) as (running, rooms):
        heard = Heard()
        doomed = ask(running, heard, "doomed", steps=2000)
        quick = [ask(running, heard, f"quick-{number}") for number in range(6)]
        until(lambda: all(ticket.over for ticket in quick))
        for attempt in (1, 2):
            [at_work] = until(lambda attempt=attempt: doomed.attempts == attempt and rooms.at_work())
            at_work.kill()
        until(lambda: "doomed" in heard.ends)
        end = heard.ends["doomed"]
        assert (end.refusal.status, end.refusal.code) == (503, "worker_lost")
        assert "it was killed" in end.refusal.message
        assert all(isinstance(heard.ends[ticket.work.id], Painted) for ticket in quick)
        until(lambda: all(one["state"] == "up" for one in replicas(running)))  # both came back
        assert sum(one["lost"] for one in replicas(running)) == 2
        assert "patchpipe_replicas_lost_total 2.0" in running.metrics.text().decode()


def test_what_waits_is_not_lost_and_cancelling_reaches_the_replica(tmp_path: Path) -> None:
    with service(tmp_path, room=1, limits=Limits(waiting=3)) as (running, rooms):
        heard = Heard()
        first = ask(running, heard, "first", steps=3000)
        until(began(running, "first"))
        for number in range(3):
            ask(running, heard, f"waits-{number}", deadline_s=100.0 + number)
        with pytest.raises(Refusal, match="3 requests wait already"):
            ask(running, heard, "one more")
        running.cancel(first)
        until(lambda: len(heard.ends) == 4)
        assert heard.ends["first"].refusal.status == 499
        assert first.step < 3000
        assert heard.order == ["first", "waits-0", "waits-1", "waits-2"]
        assert not rooms.processes[0].replica.engine.open


def test_a_fleet_that_has_lost_all_its_room_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchpipe.serve.fleet.fleet.DOWN_SECONDS", 0.3)
    with service(tmp_path, room=1) as (running, rooms):
        heard = Heard()
        ask(running, heard, "picture", steps=2000)
        ask(running, heard, "clip", model="clips", steps=3)
        until(began(running, "picture"))
        rooms.room = 0
        rooms.processes[0].kill()
        until(lambda: "picture" in heard.ends)
        assert heard.ends["picture"].refusal.status == 503
        assert "1 CPU on one node" in heard.ends["picture"].refusal.message
        assert not running.ready
        with pytest.raises(Refusal, match="it was killed"):
            ask(running, heard, "too late")
        assert "clip" not in heard.ends  # it can wait
        rooms.room = 1
        until(lambda: "clip" in heard.ends)
        assert isinstance(heard.ends["clip"], Painted)
        assert running.ready


def test_a_clip_gives_way_in_its_replica_and_the_end_puts_it_back(tmp_path: Path) -> None:
    with service(tmp_path, room=1) as (running, rooms):
        heard = Heard()
        ask(running, heard, "long", model="clips", steps=3000, deadline_s=1e5)
        until(began(running, "long"))
        ask(running, heard, "soon", deadline_s=30.0)
        until(lambda: "soon" in heard.ends)
        assert isinstance(heard.ends["soon"], Painted)
        assert 'patchpipe_preemptions_total{kind="clip",model="clips"} 1.0' in running.metrics.text().decode()
        assert 'patchpipe_replica_requests{replica="1",state="' in running.metrics.text().decode()
        assert not isinstance(heard.ends.get("long"), Painted)
    assert heard.ends["long"].refusal.code == "shutting_down"
    assert rooms.processes[0].replica.engine.closed
