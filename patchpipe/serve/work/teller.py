"""Tells clients what happens to their requests, in a thread of its own: one of them may wait for a database."""

from __future__ import annotations

import logging
import queue
import threading

from patchpipe.serve.work.tickets import Event, Ticket

logger = logging.getLogger("patchpipe.serve")


class Teller:
    """The thread that tells."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[tuple[Ticket, Event] | None] = queue.SimpleQueue()
        threading.Thread(target=self._tell_all, name="teller", daemon=True).start()

    def tell(self, ticket: Ticket, event: Event) -> None:
        """Tells a request's client, after what it was told before."""
        self._told.put((ticket, event))

    def close(self) -> None:
        """Ends it once all is told; returns at once."""
        self._told.put(None)

    def _tell_all(self) -> None:
        while (told := self._told.get()) is not None:
            try:
                told[0].tell(told[1])
            except Exception:
                logger.exception("a listener failed")
