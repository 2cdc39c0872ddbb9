"""What Prometheus reads of a service. No prompt and no request's name is among it."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Seen

Requests = Callable[[], Sequence[Seen]]  # those there are
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)
_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and histograms of one service, in a registry of their own.

    Attributes:
        requests: Requests by how they ended.
        rejections: Requests that were turned away, by why.
        wait: Seconds between arrival and start.
        latency: Seconds between arrival and end.
        step: Seconds of a step.
        deadlines: Requests by whether they were there in time, and who had named the deadline.
        together: Pictures that started together.
        preemptions: Requests that were stopped for others.
        degree_changes: Requests that went on with another number of devices.
        failed_decisions: Decisions that failed, and were made in the plainest way instead.
        busy: Seconds a device worked; its rate is the device's busy share.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kind: list[str] = ["model", "kind"]
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("patchpipe_requests", "Requests by outcome.", [*kind, "outcome"], **own)
        self.rejections = Counter("patchpipe_rejections", "Requests turned away, by reason.", ["reason"], **own)
        self.wait = Histogram("patchpipe_queue_wait_seconds", "Arrival to start.", kind, buckets=_LONG, **own)
        self.latency = Histogram("patchpipe_request_seconds", "Arrival to end.", kind, buckets=_LONG, **own)
        self.step = Histogram("patchpipe_step_seconds", "One denoising step.", ["model"], buckets=_SHORT, **own)
        self.deadlines = Counter("patchpipe_deadlines", "Deadlines met and missed.", [*kind, "by", "outcome"], **own)
        buckets = (1, 2, 4, 8, 16)
        self.together = Histogram("patchpipe_batch_size", "Pictures that started together.", buckets=buckets, **own)
        self.preemptions = Counter("patchpipe_preemptions", "Requests stopped for others.", kind, **own)
        self.degree_changes = Counter("patchpipe_degree_changes", "Changes of devices.", ["model"], **own)
        self.failed_decisions = Counter("patchpipe_failed_decisions", "Decisions that failed.", **own)
        self.busy = Counter("patchpipe_device_busy_seconds", "Seconds a device worked.", ["device"], **own)

    def watch(self, requests: Requests, models: Mapping[str, Model]) -> None:
        """Adds what is read from the service's own state whenever Prometheus asks."""
        self.registry.register(_State(requests, models))

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, requests: Requests, models: Mapping[str, Model]) -> None:
        self._requests, self._models = requests, models

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        seen = self._requests()
        steps = GaugeMetricFamily("patchpipe_backlog_steps", "Steps still to do.", labels=["model"])
        up = GaugeMetricFamily("patchpipe_model_up", "Whether a model can paint.", labels=["model"])
        restarts = CounterMetricFamily("patchpipe_engine_restarts", "Engines started again.", labels=["model"])
        for name, model in self._models.items():
            own = [one.ticket for one in seen if one.ticket.work.model == name]
            steps.add_metric([name], sum(max(0, (one.total_steps or 0) - one.step) for one in own))
            up.add_metric([name], float(model.usable))
            restarts.add_metric([name], model.restarts)
        yield from (steps, up, restarts)
        for state in ("waiting", "running", "paused"):
            gauge = GaugeMetricFamily(f"patchpipe_requests_{state}", f"Requests {state}.", labels=["model", "kind"])
            found = Counted((one.ticket.work.model, one.ticket.work.kind) for one in seen if one.state == state)
            for name in self._models:
                for kind in ("picture", "clip"):
                    gauge.add_metric([name, kind], found[name, kind])
            yield gauge
