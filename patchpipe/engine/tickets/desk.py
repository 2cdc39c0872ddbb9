"""Keeps count of an engine's tickets: opens a stream of requests when there is one, and ends it when there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from patchpipe.engine.crew import Crew
from patchpipe.engine.failures import rebuild
from patchpipe.engine.messages import Became, Direct, OpenStream, Submit
from patchpipe.engine.requests import NUMBERED_LATER
from patchpipe.engine.results import Progress
from patchpipe.engine.tickets.ticket import KEEP, Keep, Ticket
from patchpipe.errors import CANCELLED, Cancelled, PatchpipeError
from patchpipe.schedule.steps.verbs import Verb

ENDINGS = ("done", "saved", "not saved", "withdrawn", "refused")  # of a move
CLOSING_SECONDS = 10.0  # for open requests to end, when the engine is closed


class Desk:
    """The tickets of one engine.

    A thread serves them. It has the engine to itself as long as any of them is open: a call of the engine waits until
    they are over, as it waits for another call.

    Args:
        crew: The workers.
        engine: What whoever uses the workers holds.
        lane: Which of the lanes of all workers these are.
    """

    def __init__(self, crew: Crew, engine: AbstractContextManager[Any], lane: int = 0) -> None:
        self._crew, self._engine, self._lane = crew, engine, lane
        self._leader = crew.members[0].rank
        self._lock = threading.RLock()
        self._open: dict[int, Ticket] = {}  # sent, and not over
        self._waiting: list[Ticket] = []  # for the next stream
        self._moving: dict[int, Desk] = {}  # where open ones are to go on
        self._stream: int | None = None  # the number of the one that takes tickets
        self._server: threading.Thread | None = None

    def take(self, ticket: Ticket) -> None:
        """Takes a request in.

        Raises:
            RankLost: The workers take no messages.
        """
        with self._lock:
            ticket.director = self
            if self._stream is not None:
                self._send(ticket)
                return
            self._waiting.append(ticket)
            if self._server is None:
                self._server = threading.Thread(target=self._serve, name="tickets", daemon=True)
                self._server.start()

    def give(self, ticket: Ticket, other: Desk) -> None:
        """Has a request go on at another desk, from its next step on."""
        with self._lock:
            waiting = ticket in self._waiting
            if waiting:
                self._waiting.remove(ticket)
            elif ticket.number in self._open:
                self._moving[ticket.number] = other
                self._direct(ticket, Verb.SAVE)
        if waiting:  # with no lock held: the other desk may be giving one to this
            other.take(ticket)

    def check_free(self) -> None:
        """Refuses a call that would wait for a request which is paused.

        Raises:
            ValueError: There is one.
        """
        with self._lock:
            paused = [ticket for ticket in self._open.values() if ticket.state == "paused"]
        if paused:
            raise ValueError(
                f"request {paused[0].number} is paused, and until it ends the engine starts no call outside a ticket: "
                f"submit this call as a ticket, or resume, cancel or checkpoint request {paused[0].number} first"
            )

    def cancel_all(self) -> bool:
        """Ends the requests under way; gives whether there were any."""
        return self._crew.cancel()

    def close(self) -> None:
        """Ends what is open."""
        with self._lock:
            server, open_ones = self._server, [*self._open.values(), *self._waiting]
            self._waiting.clear()
        for ticket in open_ones:
            ticket.become("cancelled", error=Cancelled("the engine was closed"))
        if server is not None and server is not threading.current_thread():
            self._crew.cancel()
            server.join(CLOSING_SECONDS)

    # -- what tickets are asked for --------------------------------------------------------------

    def pause(self, ticket: Ticket, keep: Keep) -> None:
        """See ``Ticket.pause``."""
        self._direct(ticket, Verb.HOLD, KEEP.index(keep))

    def resume(self, ticket: Ticket) -> None:
        """See ``Ticket.resume``."""
        self._direct(ticket, Verb.GO_ON)

    def cancel(self, ticket: Ticket) -> None:
        """See ``Ticket.cancel``."""
        self._direct(ticket, Verb.WITHDRAW)

    def save(self, ticket: Ticket) -> None:
        """See ``Ticket.checkpoint``."""
        self._direct(ticket, Verb.SAVE)

    def _direct(self, ticket: Ticket, verb: Verb, option: int = 0) -> None:
        with self._lock:
            if ticket in self._waiting:
                self._direct_waiting(ticket, verb, option)
            elif ticket.number in self._open and self._stream is not None:
                self._crew.send(Direct(self._stream, verb, ticket.number, option), [self._leader])

    def _direct_waiting(self, ticket: Ticket, verb: Verb, option: int) -> None:
        """What is asked of a request that no worker knows yet."""
        ticket.wishes = [(verb, option)]
        if verb is Verb.WITHDRAW:
            self._waiting.remove(ticket)
            ticket.become("cancelled", error=Cancelled(CANCELLED))

    # -- the thread that serves them -------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._engine:
                problem = self._serve_stream()
            with self._lock:
                self._stream = None
                if problem is not None:
                    self._fail(problem)
                if not self._waiting:
                    self._server = None
                    return

    def _serve_stream(self) -> BaseException | None:
        try:
            if self._crew.closed:
                raise PatchpipeError("the engine is closed: make a new one")
            self._crew.run(
                OpenStream(NUMBERED_LATER, self._lane), self._progressed, on_sent=self._opened, on_other=self._hear
            )
        except BaseException as error:
            return error
        return None

    def _fail(self, problem: BaseException) -> None:
        problem = (self._crew.cause if self._crew.closed else None) or problem
        lost = [*self._open.values()]
        if self._crew.closed:
            lost += self._waiting
            self._waiting.clear()
        self._open.clear()
        for ticket in lost:
            ticket.become("cancelled" if isinstance(problem, Cancelled) else "failed", error=problem)

    def _opened(self, request: int) -> None:
        with self._lock:
            self._stream = request
            waiting, self._waiting = self._waiting, []
            for ticket in waiting:
                self._send(ticket)
            self._end_if_none()

    def _send(self, ticket: Ticket) -> None:
        assert self._stream is not None
        self._open[ticket.number] = ticket
        self._crew.send(Submit(self._stream, ticket.number, ticket.asked.call, ticket.asked.state))
        for verb, option in ticket.wishes:
            self._crew.send(Direct(self._stream, verb, ticket.number, option), [self._leader])

    def _progressed(self, progress: Progress) -> None:
        ticket = self._open.get(progress.call)
        if ticket is not None:
            self._told(ticket, lambda: ticket.progressed(progress))

    def _hear(self, message: object) -> None:
        if not isinstance(message, Became) or message.ticket not in self._open:
            return
        ticket = self._open[message.ticket]
        self._told(ticket, lambda: self._pass_on(ticket, message))
        with self._lock:
            if ticket.over:
                self._open.pop(ticket.number, None)
            self._end_if_none()

    def _pass_on(self, ticket: Ticket, message: Became) -> None:
        device = self._crew.devices[self._leader]
        error = None if message.failed is None else rebuild(self._leader, device, message.failed)
        other = self._moving.pop(ticket.number, None) if message.what in ENDINGS else None
        if message.what == "done":
            ticket.finish(message.output, message.stats or {})
        elif message.what == "saved" and message.state is not None and other is not None:
            with self._lock:
                self._open.pop(ticket.number)
            ticket.go_on_from(message.state)
            other.take(ticket)
        elif message.what == "saved" and message.state is not None:
            ticket.leave(message.state)
        elif message.what == "not saved" and error is not None:
            ticket.stay(error)
        elif message.what == "withdrawn":
            ticket.become("cancelled", message.step, error)
        elif message.what == "refused":
            ticket.become("failed", message.step, error)
        else:
            ticket.become("paused" if message.what == "held" else "running", message.step)

    def _told(self, ticket: Ticket, tell: Callable[[], None]) -> None:
        """Tells a caller something; one whose own function raises has its request cancelled, with that error."""
        try:
            tell()
        except Exception as error:
            self._direct(ticket, Verb.WITHDRAW)
            ticket.become("failed", error=error)

    def _end_if_none(self) -> None:
        if not self._open and self._stream is not None:
            stream, self._stream = self._stream, None
            self._crew.send(Direct(stream, Verb.END), [self._leader])
