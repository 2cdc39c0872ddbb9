"""The desks of an engine: one for all its workers or, where these hold the whole model, one for every lane."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from patchpipe.engine.crew import Crew
from patchpipe.engine.tickets.desk import Desk
from patchpipe.engine.tickets.elastic import Elastic
from patchpipe.engine.tickets.ticket import Asked, Ticket


class Ranks(AbstractContextManager[None]):
    """Some ranks to oneself: waits until nobody else uses any of them.

    Args:
        locks: One for each of them, in an order that all users of several keep.
    """

    def __init__(self, locks: Sequence[threading.Lock]) -> None:
        self._locks, self._held = locks, threading.local()

    def __enter__(self) -> None:
        self._held.stack = ExitStack()
        for lock in self._locks:
            self._held.stack.enter_context(lock)

    def __exit__(self, *_: object) -> None:
        self._held.stack.close()


class Desks:
    """Takes requests in, and passes each to the ranks it is for.

    Args:
        crew: The workers.
        engine: What whoever uses all of them holds.
        elastic: Which of them can serve a request together; ``None`` for all.
    """

    def __init__(self, crew: Crew, engine: threading.Lock, elastic: Elastic | None) -> None:
        self._elastic, self._numbers = elastic, itertools.count(1)
        self._desks: list[Desk] = []
        if elastic is None:
            self._desks.append(Desk(crew, engine))
            return
        locks = [threading.Lock() for _ in range(elastic.ranks)]
        for number, ranks in enumerate(elastic.lanes):
            self._desks.append(Desk(crew.part(ranks), Ranks([locks[rank] for rank in ranks]), number))

    def submit(self, asked: Asked, ranks: Sequence[int] | None) -> Ticket:
        """Takes a request in; see ``Engine.submit``.

        Raises:
            ValueError: These ranks cannot serve it together.
        """
        desk = self._desk(ranks)
        ticket = Ticket(next(self._numbers), asked)
        ticket.mover = self.move
        desk.take(ticket)
        return ticket

    def move(self, ticket: Ticket, ranks: Sequence[int] | None) -> None:
        """See ``Ticket.move``."""
        if self._elastic is None:
            raise ValueError("the ranks of this engine hold parts of the model: give the engine an Elastic layout")
        desk = self._desk(ranks)
        held = ticket.director
        assert isinstance(held, Desk)
        if held is not desk:
            held.give(ticket, desk)

    def check_free(self) -> None:
        """Refuses a call of all ranks together, where they serve requests by themselves or one is paused.

        Raises:
            ValueError: It is so.
        """
        if self._elastic is not None:
            raise ValueError(
                "the ranks of an elastic engine serve requests by themselves, without previews, timelines and LoRA: "
                "use engine.submit(...)"
            )
        for desk in self._desks:
            desk.check_free()

    def cancel(self) -> bool:
        """Ends the requests under way; gives whether there were any."""
        found = [desk.cancel_all() for desk in self._desks]
        return any(found)

    def close(self) -> None:
        """Ends what is open."""
        for desk in self._desks:
            desk.close()

    def _desk(self, ranks: Sequence[int] | None) -> Desk:
        if self._elastic is not None:
            return self._desks[self._elastic.lane(ranks)]
        if ranks is not None:
            raise ValueError("the ranks of this engine serve every request together: leave ranks out")
        return self._desks[0]
