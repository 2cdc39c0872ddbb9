"""From the service's threads to a client's connection, and back when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from patchpipe.serve.service import Service
from patchpipe.serve.work.tickets import Ended, Event, Painted, Ticket, Work

BEAT = 0.25  # seconds between looks at whether the client is still there


class Following:
    """One request that a connection waits for; ``begin`` makes it.

    Args:
        service: Who paints.
        request: The client's connection.
    """

    _ticket: Ticket

    def __init__(self, service: Service, request: Request) -> None:
        self._service, self._request = service, request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @classmethod
    async def begin(cls, service: Service, work: Work, request: Request) -> Following:
        """Has a request painted.

        Args:
            service: Who paints.
            work: What is to be painted.
            request: The client's connection.

        Raises:
            Refusal: The service cannot take it now.
        """
        found = cls(service, request)
        found._ticket = await run_in_threadpool(service.submit, work, found._hear)  # it may have to ask the planner
        return found

    async def events(self) -> AsyncIterator[Event | None]:
        """What happens, up to the end; ``None`` at every beat. Cancels the work if the client leaves."""
        looked = self._loop.time()
        try:
            while True:
                event: Event | None = None
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    event = await asyncio.wait_for(self._events.get(), BEAT)
                if event is None or self._loop.time() > looked + BEAT:  # steps may come quicker than beats
                    looked = self._loop.time()
                    if await self._request.is_disconnected():
                        return
                yield event
                if isinstance(event, (Painted, Ended)):
                    return
        finally:
            if not self._ticket.over:  # not waited for: nobody is there any more
                self._loop.run_in_executor(None, self._service.cancel, self._ticket)

    async def end(self) -> Painted | Ended | None:
        """How it ended; ``None`` where the client left."""
        last: Event | None = None
        async for event in self.events():
            last = event
        return last if isinstance(last, (Painted, Ended)) else None

    def _hear(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
