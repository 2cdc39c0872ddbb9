"""What an operator sees of a service: spans of its requests, and a dashboard that asks for figures there are."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from patchpipe.serve.fleet.fleet import Figures
from patchpipe.serve.settings import Settings
from patchpipe.serve.spans import Spans, spans_to
from patchpipe.serve.work.tickets import Painted
from tests.serve import test_fleet_parts
from tests.support import steered

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "serve"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_below_its_clients_and_its_moves_are_told(tmp_path: Path) -> None:
    exporter, heard = InMemorySpanExporter(), steered.Heard()
    with steered.service(tmp_path, {"pictures": lambda: steered.Engine(2)}, spans=Spans(exporter)) as running:
        good = steered.ask(running, heard, "good", traceparent=PARENT)
        bad = steered.ask(running, heard, "wrong")
        for ticket in (good, bad):
            assert ticket.wait(30)
    found = {span.attributes["patchpipe.request"]: span for span in exporter.get_finished_spans() if span.attributes}
    whole = found["good"]
    assert isinstance(heard.ends["good"], Painted)
    assert (whole.name, whole.attributes["patchpipe.outcome"]) == ("patchpipe.picture", "completed")
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == tuple(PARENT.split("-")[1:3])
    assert not whole.status.description
    parts = {
        span.name: span
        for span in exporter.get_finished_spans()
        if span.parent and span.parent.span_id == whole.context.span_id
    }
    wait, paint = parts["patchpipe.wait"], parts["patchpipe.paint"]
    assert whole.start_time == wait.start_time <= wait.end_time == paint.start_time <= paint.end_time == whole.end_time
    assert [event.name for event in paint.events] == ["came", "left"]
    assert found["wrong"].attributes["patchpipe.outcome"] == "refused"
    assert found["wrong"].status.description == "wrong"
    assert "good" not in str([dict(span.attributes) for span in exporter.get_finished_spans()]).replace(
        "'patchpipe.request': 'good'", ""
    )  # no prompt: it is the request's name here


def test_a_collector_is_sent_otlp(tmp_path: Path) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        spans = spans_to(f"http://127.0.0.1:{server.server_port}")
        with steered.service(tmp_path, {"clips": lambda: steered.Engine(2)}, spans=spans) as running:
            assert steered.ask(running, steered.Heard(), "wave", model="clips").wait(30)
        server.shutdown()
    assert got[0][0] == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(got[0][1]).resource_spans
    assert "patchpipe.clip" in [span.name for span in resource.scope_spans[0].spans]
    with pytest.raises(ValueError, match="address of a collector"):
        Settings(otlp="localhost:4318")


ENDS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def test_the_dashboard_names_every_figure_there_is_and_no_other(tmp_path: Path) -> None:
    with test_fleet_parts.service(tmp_path) as (running, _):  # it has all figures of one machine, and its own
        known = {family.name: ENDS.get(family.type, ("",)) for family in running.metrics.registry.collect()}
    panels = json.loads((EXAMPLES / "grafana.json").read_text())["panels"]
    asked = {name for panel in panels for one in panel["targets"] for name in re.findall(r"patchpipe_\w+", one["expr"])}
    assert asked <= {name + end for name, ends in known.items() for end in ends}, asked
    assert all(any(name + end in asked for end in ends) for name, ends in known.items())
    guide = (EXAMPLES.parents[1] / "docs" / "serving.md").read_text()
    told = {name.removesuffix("_total") for name in re.findall(r"patchpipe_\w+", guide)}
    fleet = {family.name for family in Figures(SimpleNamespace(slots={}, lost=0)).collect()}  # type: ignore[arg-type]
    assert told <= {*known, *fleet}, told - {*known, *fleet}
    assert fleet <= told


def test_manifests_agree_with_the_dockerfile() -> None:
    docker = (EXAMPLES / "Dockerfile").read_text()
    [claim, deployment, service] = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [port] = container["ports"]
    assert f"EXPOSE {port['containerPort']}" in docker
    assert f"WORKDIR {container['volumeMounts'][0]['mountPath']}" in docker
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert (
        claim["metadata"]["name"]
        == deployment["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    )
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/healthz", "readiness": "/readyz", "liveness": "/healthz"}
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]["patchpipe"]
    assert [place.split(":")[1] for place in compose["volumes"]] == ["/data"]
