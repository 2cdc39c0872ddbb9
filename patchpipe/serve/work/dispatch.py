"""Which request runs next: the one place that decides it, with no clock and no threads.

Another policy is another function of the same shape. It sees what waits and what runs, and says what starts now; it is
asked again whenever a request comes or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patchpipe.serve.work.tickets import Ticket

# What waits (of models that can paint) and what runs, to what starts now: one request, or several of one model that
# are painted together; nothing to leave the devices as they are.
Dispatch = Callable[[Sequence[Ticket], Sequence[Ticket]], tuple[Ticket, ...]]


def earliest_deadline(together: int = 1, joins: Callable[[str], bool] = lambda model: True) -> Dispatch:
    """One after the other: by priority, then deadline, then arrival.

    The models share this machine's devices, so one request has them all.

    Args:
        together: Pictures that may be painted together, where they are of one model and its LoRAs, and none is to be
            seen on the way.
        joins: Whether a model paints several together.
    """

    def choose(waiting: Sequence[Ticket], running: Sequence[Ticket]) -> tuple[Ticket, ...]:
        if running or not waiting:
            return ()
        queue = sorted(waiting, key=_order)
        first, *others = queue
        if together == 1 or not joins(first.work.model) or not _joins(first, first):
            return (first,)
        return (first, *[one for one in others if _joins(first, one)][: together - 1])

    return choose


def _order(ticket: Ticket) -> tuple[int, float, float]:
    return -ticket.work.priority, ticket.deadline, ticket.arrived


def _joins(first: Ticket, other: Ticket) -> bool:
    """Whether both can be painted together; one that failed before is painted alone, to see whose fault it was."""
    one, two = first.work, other.work
    alike = (one.model, one.loras) == (two.model, two.loras)
    return alike and two.kind == "picture" and not two.previews and not other.attempts
