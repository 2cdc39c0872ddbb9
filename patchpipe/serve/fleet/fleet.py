"""All replicas, as the service sees them: models, figures, and a queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from patchpipe.serve.fleet.cluster import Cluster
from patchpipe.serve.fleet.dispatcher import Dispatcher
from patchpipe.serve.fleet.figures import count
from patchpipe.serve.fleet.needs import Need, Wanted, check_room, in_words, need_of
from patchpipe.serve.fleet.slot import Life, Slot
from patchpipe.serve.fleet.words import Begun, Introduced, Spec, Told
from patchpipe.serve.metrics import Metrics
from patchpipe.serve.models import Loading, ServedLayout
from patchpipe.serve.settings import Settings
from patchpipe.serve.steer.shapes import shape_of
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Kind, Painted, Work

ROOM_SECONDS = 60.0  # for somebody else to give devices back, at the start
DOWN_SECONDS = 10.0  # without a replica, or one that loads, until pictures are refused
COUNT_SECONDS = 5.0  # between two looks for nodes that have joined
END_SECONDS = 20.0
FETCHERS = 8


class FleetModel(Model):
    """A model that replicas have; it can paint while one of them can."""

    def __init__(self, introduced: Introduced) -> None:
        super().__init__(introduced.public, introduced.source, _none_here, lambda: None, for_edits=introduced.for_edits)
        self.facts, self.cause = introduced.facts, None

    def start(self) -> None:
        """Replicas start it."""

    def check(self) -> None:
        """Replicas do."""

    def close(self) -> None:
        """Replicas do."""


def _none_here() -> Any:
    raise NotImplementedError("replicas have the engines")


class Fleet:
    """The replicas; see ``Painters``.

    Args:
        wanted: What the operator asked for.
        spec: What each replica is to be.
        settings: What the operator decided.
        cluster: Where they live.

    Attributes:
        models: The models by the service's name, once the first replica is up.
        metrics: The service's figures.
        conductor: The queue.
        policy: Who has which of a replica's devices next.
        on_change: Called when a model can paint again, or cannot any more.
        slots: The replicas, by number.
    """

    def __init__(self, wanted: Wanted, spec: Spec, settings: Settings, cluster: Cluster) -> None:
        self._wanted, self._cluster = wanted, cluster
        loading = spec.loading
        need = _find_room(wanted, loading, cluster)
        loading = replace(
            loading, devices=_devices(need, loading.layout), threads=loading.threads if need.gpu else need.threads
        )
        fetching = ThreadPoolExecutor(FETCHERS, "fetch")
        self._life = Life(cluster, wanted, need, replace(spec, loading=loading), fetching)
        self.models: dict[str, Model] = {}
        self.metrics, self.policy = Metrics(), settings.policy
        self.conductor = Dispatcher(settings, self.models)
        self.on_change: Callable[[], None] = lambda: None
        self.slots: dict[int, Slot] = {}
        self._lost = 0
        self._failures: dict[int, BaseException] = {}
        self._changed = threading.Condition(threading.RLock())
        self._counted = self._alive_at = monotonic()
        self._closed = False

    def open(self) -> None:
        """Starts the replicas, and waits until one can paint; others follow.

        Raises:
            ValueError: Others use what it would take.
            Exception: No replica could start; see ``Engine``.
        """
        self._grow(self._wanted.replicas or self._life.need.room(self._cluster.nodes()))
        deadline = monotonic() + ROOM_SECONDS
        with self._changed:
            while not self.models:
                self._changed.wait(0.2)
                states = [slot.state for slot in self.slots.values()]
                if "loading" in states or "up" in states:
                    continue
                if self._failures:
                    raise self._failures[min(self._failures)]
                if monotonic() > deadline:
                    raise ValueError(
                        f"a replica takes {self._life.need} on one node, and others use that: {self._free()}"
                    )
        self.metrics.registry.register(Figures(self))

    def start(self) -> None:
        """It has been opened."""

    def ask_planner(self) -> None:
        """Asks what usual requests take, so that the first of them need not wait for the answer."""
        for model in self.models.values():
            kind: Kind = "clip" if model.facts.clips else "picture"
            self.conductor.priced(shape_of(Work("usual", model.name, kind, {}, (0,)), model.facts))

    def look_on(self) -> None:
        """Notices nodes that have joined, and that no replica is left."""
        now = monotonic()
        if any(slot.state in ("loading", "up") for slot in self.slots.values()):
            self._alive_at = now
        self._see_models()
        self.conductor.look()
        if self._wanted.replicas is None and now - self._counted > COUNT_SECONDS:
            self._counted = now
            self._fit(self._life.need.room(self._cluster.nodes()))

    def state(self) -> dict[str, Any]:
        """Each replica: where it is, how it is, and how much it has to do."""
        return {"replicas": [self._describe(slot) for _, slot in sorted(self.slots.items())]}

    def close(self) -> None:
        """Ends the replicas, and leaves the cluster."""
        with self._changed:
            self._closed = True
            slots = list(self.slots.values())
        for slot in slots:
            slot.close()
        deadline = monotonic() + END_SECONDS
        for slot in slots:
            slot.join(max(0.0, deadline - monotonic()))
        self._life.fetching.shutdown(wait=False, cancel_futures=True)
        self._cluster.close()

    # -- what becomes of replicas ------------------------------------------------------------------

    def is_up(self, slot: Slot, begun: Begun) -> None:
        """A replica can paint."""
        with self._changed:
            self._failures.pop(slot.number, None)
            for name, introduced in begun.models.items():
                self.models.setdefault(name, FleetModel(introduced))
        self.conductor.is_up(slot, begun)
        self._see_models()
        with self._changed:
            self._changed.notify_all()

    def has_told(self, slot: Slot, told: Told) -> None:
        """A replica has news."""
        count(told.figures, self.metrics, slot.name)
        self.conductor.has_told(slot, told)

    def has_painted(self, slot: Slot, key: str, painted: Painted) -> None:
        """A request's pictures are here."""
        self.conductor.has_painted(slot, key, painted)

    def is_lost(self, slot: Slot, cause: str) -> None:
        """A replica is gone."""
        with self._changed:
            self._lost += 1
        self.conductor.is_lost(slot, cause)
        self._see_models()

    def has_failed(self, slot: Slot, error: BaseException) -> None:
        """A replica could not start."""
        with self._changed:
            self._failures[slot.number] = error
            self._changed.notify_all()

    # -- its replicas and models -------------------------------------------------------------------

    def _grow(self, count: int) -> None:
        """Adds replicas until there are so many."""
        with self._changed:
            for number in range(1, count + 1):
                if number not in self.slots and len(self.slots) < count and not self._closed:
                    self.slots[number] = Slot(number, self._life, self)
                    self.slots[number].start()

    def _fit(self, room: int) -> None:
        """As many replicas as there is room for; those that wait for more are given up, but for the last."""
        with self._changed:
            for number, slot in sorted(self.slots.items(), reverse=True):
                if len(self.slots) > max(1, room) and slot.state == "waiting for room":
                    slot.close()
                    del self.slots[number]
        self._grow(room)

    def _see_models(self) -> None:
        """Which models can paint, and where."""
        ups = self.conductor.ups()
        changed = False
        for name, model in list(self.models.items()):
            able = [up for up in ups if up.slot.healths[name].cause is None]
            causes = [up.slot.healths[name].cause for up in ups] or [slot.cause for slot in self.slots.values()]
            cause = None if able else "; ".join(dict.fromkeys(one for one in causes if one)) or "no replica is up"
            down = cause is not None and not ups and monotonic() - self._alive_at > DOWN_SECONDS
            changed = changed or (model.cause is None) != (cause is None) or down != model.down
            model.cause, model.down = cause, down
            model.restarts = max(model.restarts, sum(up.slot.healths[name].restarts for up in ups))
            devices = tuple(f"{up.slot.node} {one}" for up in ups for one in up.begun.models[name].facts.devices)
            model.facts = replace(model.facts, devices=devices)
        if changed:
            self.on_change()

    def _describe(self, slot: Slot) -> dict[str, Any]:
        return {
            "replica": slot.number,
            "node": slot.node,
            "pid": slot.pid,
            "state": slot.state,
            "cause": slot.cause,
            "lost": slot.lost,
            **self.conductor.counts(slot),
        }

    def _free(self) -> str:
        return "; ".join(f"{node.address} has {in_words(node.resources)}" for node in self._cluster.nodes())

    @property
    def lost(self) -> int:
        """Replicas that were lost so far."""
        return self._lost


def _find_room(wanted: Wanted, loading: Loading, cluster: Cluster) -> Need:
    """What each replica takes, once the cluster is large enough; nodes may be given time to join.

    Raises:
        ValueError: It is not.
    """
    deadline = monotonic() + wanted.wait
    while True:
        nodes = cluster.nodes()
        need = need_of(wanted, nodes, loading.devices, loading.threads)
        try:
            check_room(wanted, need, nodes)
        except ValueError:
            if monotonic() > deadline:
                raise
            time.sleep(min(1.0, wanted.wait))
        else:
            return need


def _devices(need: Need, layout: ServedLayout) -> str | list[str] | None:
    """A replica's devices as its engines are told: the GPUs that Ray shows it, or so many ranks on CPUs."""
    if need.gpu:
        return None
    return "cpu" if layout == "plain" else ["cpu"] * need.devices


class Figures(Collector):
    """What Prometheus reads of replicas whenever it asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The figures of now."""
        up = GaugeMetricFamily("patchpipe_replica_up", "Whether a replica can paint.", labels=["replica", "node"])
        text = "Requests that a replica has."
        has = GaugeMetricFamily("patchpipe_replica_requests", text, labels=["replica", "state"])
        for number, slot in sorted(self._fleet.slots.items()):
            up.add_metric([str(number), slot.node], float(slot.state == "up"))
            for state, found in self._fleet.conductor.counts(slot).items():
                has.add_metric([str(number), state], found)
        yield from (up, has)
        lost = CounterMetricFamily("patchpipe_replicas_lost", "Replicas that died or fell silent.")
        lost.add_metric([], self._fleet.lost)
        yield lost
