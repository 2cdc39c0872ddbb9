"""OpenTelemetry spans of requests, for those who ask for them. No prompt is among them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from patchpipe.serve.work.tickets import Ticket
from patchpipe.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

PATIENCE = 5.0  # seconds for what collects them to answer
TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, section 3.2
_SHOWN = ("height", "width", "num_frames")


class Spans:
    """Tells of each request that is over: when it came, when its turn came, where it ran, and how it ended.

    One span a request (``patchpipe.picture`` or ``patchpipe.clip``), under the client's if it sent a ``traceparent``.
    Below it ``patchpipe.wait`` and ``patchpipe.paint``; every change of devices is an event of the latter.

    Args:
        exporter: Who takes them, in the background.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "patchpipe"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("patchpipe.serve", __version__)

    def over(self, ticket: Ticket, outcome: str, cause: str | None) -> None:
        """A request has ended.

        Args:
            ticket: The request.
            outcome: How, in a word.
            cause: Why, where it has no picture.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        work, now = ticket.work, monotonic()
        clock = time.time() - now
        at = [int(1e9 * (clock + when)) for when in (ticket.arrived, ticket.started or now, now)]
        attributes = {**_attributes(ticket), "patchpipe.outcome": outcome}
        whole = self._tracer.start_span(
            f"patchpipe.{work.kind}", _parent(work.traceparent), SpanKind.SERVER, attributes, start_time=at[0]
        )
        inside = set_span_in_context(whole)
        self._tracer.start_span("patchpipe.wait", inside, start_time=at[0]).end(at[1])
        if ticket.started is not None:
            paint = self._tracer.start_span("patchpipe.paint", inside, start_time=at[1])
            for when, what, devices in ticket.notes:
                paint.add_event(what, {"patchpipe.devices": devices}, int(1e9 * (clock + when)))
            paint.end(at[2])
        if outcome not in ("completed", "cancelled"):
            whole.set_status(Status(StatusCode.ERROR, cause))
        whole.end(at[2])

    def close(self) -> None:
        """Sends what is left."""
        self._provider.force_flush(int(1000 * PATIENCE))
        self._provider.shutdown()


def spans_to(url: str) -> Spans:
    """Spans for an OpenTelemetry collector that takes OTLP over HTTP.

    Args:
        url: Its address, such as ``http://localhost:4318``; ``/v1/traces`` is added where it has no path.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError("--otlp needs OpenTelemetry: pip install 'patchpipe[serve,otel]'") from error
    whole = url if re.search(r"://[^/]+/.", url) else f"{url.rstrip('/')}/v1/traces"
    return Spans(OTLPSpanExporter(whole, timeout=PATIENCE))


def _parent(traceparent: str | None) -> Any:
    """The client's span, as a context; ``None`` where it named none."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None


def _attributes(ticket: Ticket) -> Mapping[str, Any]:
    work = ticket.work
    shown = {f"patchpipe.{name}": work.arguments[name] for name in _SHOWN if isinstance(work.arguments.get(name), int)}
    return {
        "gen_ai.request.model": work.model,
        "patchpipe.request": work.id,
        "patchpipe.pictures": len(work.seeds),
        "patchpipe.steps": ticket.step,
        "patchpipe.attempts": ticket.attempts,
        "patchpipe.work_seconds": ticket.seconds,
        **shown,
    }
