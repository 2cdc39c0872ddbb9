"""What Prometheus reads of a service. No prompt and no request's name is among it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from patchpipe.serve.work.model import Model

if TYPE_CHECKING:
    from patchpipe.serve.work.backlog import Backlog

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
        deadlines: Requests with a deadline, by whether it was met.
        together: Requests painted together.
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
        self.deadlines = Counter("patchpipe_deadlines", "Deadlines met and missed.", [*kind, "outcome"], **own)
        buckets = (1, 2, 4, 8, 16)
        self.together = Histogram("patchpipe_batch_size", "Requests painted together.", buckets=buckets, **own)
        self.busy = Counter("patchpipe_device_busy_seconds", "Seconds a device worked.", ["device"], **own)

    def watch(self, backlog: Backlog, models: Mapping[str, Model]) -> None:
        """Adds what is read from the service's own state whenever Prometheus asks."""
        self.registry.register(_State(backlog, models))

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, backlog: Backlog, models: Mapping[str, Model]) -> None:
        self._backlog, self._models = backlog, models

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        waiting, running = self._backlog.snapshot()
        steps = GaugeMetricFamily("patchpipe_backlog_steps", "Steps still to do.", labels=["model"])
        up = GaugeMetricFamily("patchpipe_model_up", "Whether a model can paint.", labels=["model"])
        restarts = CounterMetricFamily("patchpipe_engine_restarts", "Engines started again.", labels=["model"])
        for name, model in self._models.items():
            own = [one for one in (*waiting, *running) if one.work.model == name]
            steps.add_metric([name], sum(max(0, (one.total_steps or 0) - one.step) for one in own))
            up.add_metric([name], float(model.usable))
            restarts.add_metric([name], model.restarts)
        yield from (steps, up, restarts)
        for state, tickets in (("waiting", waiting), ("running", running)):
            gauge = GaugeMetricFamily(f"patchpipe_requests_{state}", f"Requests {state}.", labels=["model", "kind"])
            for name in self._models:
                for kind in ("picture", "clip"):
                    here = [one for one in tickets if (one.work.model, one.work.kind) == (name, kind)]
                    gauge.add_metric([name, kind], len(here))
            yield gauge
