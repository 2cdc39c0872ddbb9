"""The requests that wait and those that run; starts what the dispatch says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic

from patchpipe.serve.refusals import Refusal
from patchpipe.serve.work.dispatch import Dispatch
from patchpipe.serve.work.tickets import Ended, Ticket

logger = logging.getLogger("patchpipe.serve")

Paint = Callable[[Sequence[Ticket]], None]
FIRST_GUESS = 10.0  # seconds a request takes, before any has been seen


class Backlog:
    """Takes requests, keeps them in order, and paints each in a thread of its own.

    Args:
        dispatch: Says what starts.
        paint: Paints what starts together; returns when it is done, and never raises.
        usable: Whether a model can paint now.
        limit: Requests that may wait.
    """

    def __init__(self, dispatch: Dispatch, paint: Paint, usable: Callable[[str], bool], limit: int) -> None:
        self._dispatch, self._paint, self._usable, self.limit = dispatch, paint, usable, limit
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._usual = FIRST_GUESS

    def add(self, ticket: Ticket, *, accepted: bool = False) -> None:
        """Takes a request.

        Args:
            ticket: The request.
            accepted: It was accepted before, and so is never refused.

        Raises:
            Refusal: Too many wait, or the service is about to end.
        """
        with self._changed:
            if self._closed:
                raise shutting_down()
            if not accepted:
                self.check_room()
            self._waiting.append(ticket)
        self.look()

    def check_room(self) -> None:
        """Makes sure that one more may wait.

        Raises:
            Refusal: Too many do.
        """
        if len(self._waiting) >= self.limit:
            message = f"{self.limit} requests wait already, and no more may: try again later"
            raise Refusal(429, message, code="queue_full", retry_after=self._usual * 2)

    def put_back(self, tickets: Sequence[Ticket]) -> None:
        """Lets requests that were begun wait once more; when the service ends they end too."""
        with self._changed:
            if not self._closed:
                self._waiting.extend(tickets)
                return
        for ticket in tickets:
            ticket.tell(Ended(shutting_down()))

    def withdraw(self, ticket: Ticket) -> None:
        """Takes a request that waits out of the line; one that runs ends at its next step."""
        ticket.withdraw()
        with self._changed:
            waited = ticket in self._waiting
            if waited:
                self._waiting.remove(ticket)
        if waited:
            ticket.tell(Ended(cancelled()))
            self.look()

    def take(self, model: str) -> list[Ticket]:
        """Takes what waits for one model out of the line."""
        with self._changed:
            taken = [one for one in self._waiting if one.work.model == model]
            self._waiting = [one for one in self._waiting if one.work.model != model]
        return taken

    def look(self) -> None:
        """Starts what can start now; called whenever something has changed."""
        with self._changed:
            if self._closed:
                return
            ready = [one for one in self._waiting if self._usable(one.work.model)]
            group = self._dispatch(ready, tuple(self._running))
            for ticket in group:
                self._waiting.remove(ticket)
                self._running.append(ticket)
        if group:
            threading.Thread(target=self._run, args=(group,), name=f"paint {group[0].work.id}", daemon=True).start()

    def close(self) -> list[Ticket]:
        """Starts nothing more; gives back what waits."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
        return left

    def idle(self, seconds: float, kind: str | None = None) -> bool:
        """Waits until nothing of a kind runs or waits; whether it came to that."""

        def nothing() -> bool:
            return not any(kind in (None, one.work.kind) for one in (*self._waiting, *self._running))

        with self._changed:
            return self._changed.wait_for(nothing, seconds)

    def snapshot(self) -> tuple[tuple[Ticket, ...], tuple[Ticket, ...]]:
        """What waits, and what runs."""
        with self._changed:
            return tuple(self._waiting), tuple(self._running)

    def _run(self, group: Sequence[Ticket]) -> None:
        began = monotonic()
        try:
            self._paint(group)
        except BaseException as error:  # a request must never be left without an answer
            logger.exception("painting failed")
            for ticket in group:
                ticket.tell(Ended(Refusal(500, f"the service failed: {type(error).__name__}", code="internal_error")))
        finally:
            with self._changed:
                self._usual += 0.2 * ((monotonic() - began) / len(group) - self._usual)
                self._running = [one for one in self._running if one not in group]
                self._changed.notify_all()
            self.look()


def shutting_down() -> Refusal:
    """What a request comes to when the service ends."""
    return Refusal(503, "the service is shutting down", code="shutting_down", retry_after=10)


def cancelled() -> Refusal:
    """What a request comes to that nobody wants any more; 499 is the usual status of a client that left."""
    return Refusal(499, "the request was cancelled", code="cancelled")
