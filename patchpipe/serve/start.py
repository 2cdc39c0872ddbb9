"""Starts a service on this machine and runs it until it is told to end."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from patchpipe.serve.service import Service
from patchpipe.serve.settings import Settings
from patchpipe.serve.web.app import make_app

logger = logging.getLogger("patchpipe.serve")


def listen(settings: Settings) -> socket.socket:
    """Takes the port, so that one that is not free is found before models are loaded.

    Raises:
        ValueError: It cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--host {settings.host} --port {settings.port} cannot be used: {reason}") from error


def run(service: Service, listener: socket.socket, on_listening: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, then lets what is under way end.

    Args:
        service: The service, started.
        listener: Where it listens.
        on_listening: Called with its address when it takes requests.
    """
    address = address_of(listener)
    try:
        make_server(service, lambda: on_listening(address)).run([listener])
    finally:
        service.close()


def make_server(service: Service, on_started: Callable[[], None]) -> uvicorn.Server:
    """The server of a service.

    Args:
        service: The service, started.
        on_started: Called when it takes requests.
    """
    settings = service.settings
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds) + 1,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return _Server(config, service, on_started)


def address_of(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """A server whose end is the service's: what is under way ends first."""

    def __init__(self, config: uvicorn.Config, service: Service, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._on_started = service, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends gracefully; a second Ctrl-C ends at once."""
        if self._service.draining:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            return
        logger.info("draining", extra={"fields": {"signal": signal.Signals(sig).name}})
        self._service.drain()
        delay = 0.0 if sig == signal.SIGINT else self._service.settings.drain_delay
        if not delay:
            self.should_exit = True
            return
        timer = threading.Timer(delay, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> None:
        self.should_exit = True
