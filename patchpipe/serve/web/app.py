"""The FastAPI application."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route

from patchpipe.serve.refusals import Refusal
from patchpipe.serve.service import Service
from patchpipe.serve.web import others, pictures, videos
from patchpipe.serve.web.answers import refuse
from patchpipe.serve.web.described import describe
from patchpipe.serve.web.door import Door
from patchpipe.serve.web.reading import validation_refused
from patchpipe.version import __version__

logger = logging.getLogger("patchpipe.serve")
_ROUTERS = (pictures.router, videos.router, others.router)
_SAID = {
    404: ("there is no such route", "not_found"),
    405: ("this route takes no such method", "method_not_allowed"),
    413: ("the body is too large", "body_too_large"),
}


def make_app(service: Service) -> FastAPI:
    """The application of a service that runs."""
    app = FastAPI(
        title="patchpipe",
        version=__version__,
        description="Pictures and clips of diffusion models behind OpenAI's API.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Door, service=service)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id"],
        )
    for router in _ROUTERS:
        app.include_router(router, max_body_size=service.settings.limits.body)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    app.openapi = describe(app, service.settings)  # type: ignore[method-assign]
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refuse(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = _SAID.get(error.status_code, (str(error.detail), None))
    answer = refuse(Refusal(error.status_code, message, code=code))
    answer.headers.update(error.headers or {})
    if error.status_code == 405:  # FastAPI names the methods of the first route alone
        answer.headers["allow"] = ", ".join(sorted(_methods(request)))
    return answer


def _methods(request: Request) -> set[str]:
    """The methods that a path takes, over all its routes."""
    routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, Route)]
    found = [route for route in routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in found for method in route.methods or ()}


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refuse(validation_refused(error))


async def _failed(_: Request, error: Exception) -> Response:
    logger.error("request failed", exc_info=error)
    return refuse(Refusal(500, f"the service failed: {type(error).__name__}", code="internal_error"))
