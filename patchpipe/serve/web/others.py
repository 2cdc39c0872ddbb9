"""Models, health, figures, the state that the page shows, and the page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from patchpipe.serve.refusals import Refusal
from patchpipe.serve.service import Service
from patchpipe.serve.web import answers

PAGE = Path(__file__).resolve().parents[1] / "page"
# Nothing from elsewhere is loaded, nobody may frame the page, and no script may be written into it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = APIRouter()


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


@router.get("/v1/models", tags=["models"])
def models(request: Request) -> Response:
    """The models there are."""
    service = _service(request)
    found = {one.public: answers.model(one, service.started) for one in service.models.values()}
    return answers.Json({"object": "list", "data": list(found.values())})


@router.get("/v1/models/{name:path}", tags=["models"])
def model(request: Request, name: str) -> Response:
    """One model."""
    service = _service(request)
    for one in service.models.values():
        if one.public == name:
            return answers.Json(answers.model(one, service.started))
    raise Refusal(404, f"there is no model {name[:80]!r}", code="model_not_found", param="model")


@router.get("/v1/state", tags=["service"])
def state(request: Request) -> Response:
    """Models, devices and the queue, as the page shows them; no word of what anybody asked for."""
    return answers.Json(_service(request).state())


@router.get("/healthz", tags=["service"])
async def health() -> Response:
    """Whether the process answers."""
    return answers.Json({"status": "ok"})


@router.get("/readyz", tags=["service"])
async def ready(request: Request) -> Response:
    """Whether it can paint now, and will go on to."""
    service = _service(request)
    found = {one.name: "ready" if one.usable else one.cause for one in service.models.values()}
    body = {"ready": service.ready, "draining": service.draining, "models": found}
    return answers.Json(body, 200 if service.ready else 503)


@router.get("/metrics", tags=["service"])
def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The playground."""
    return FileResponse(PAGE / "index.html", headers=_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    """A part of it."""
    if name not in ("page.css", "page.js", "icon.svg"):
        raise Refusal(404, "there is no such file", code="not_found")
    return FileResponse(PAGE / name, headers=_HEADERS)
