"""Which of a fleet's groups of devices a request goes to: earliest deadline first, to the group that ends it first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from patchpipe.scheduling.admission import reckoned
from patchpipe.scheduling.costs import Costs
from patchpipe.scheduling.policies.view import View
from patchpipe.scheduling.state import Job, Request, State

ALIKE = 1.1  # ends that differ by less are the same: costs are measured, and measurements differ
AHEAD = 1  # requests that wait at a group, so that it need not idle while it asks for the next


@dataclass(frozen=True)
class Group:
    """A group of devices, which decides by itself what of its requests runs when.

    Attributes:
        number: Its number.
        devices: How many devices it has.
        costs: What things take there.
        jobs: The requests it was given and has not ended.
        staying: The ids of those that run and would not give way to others.
        models: Models it can paint with now; ``None`` are all.
    """

    number: int
    devices: int
    costs: Costs
    jobs: tuple[Job, ...] = ()
    staying: frozenset[str] = frozenset()
    models: frozenset[str] | None = None

    def before(self, request: Request) -> list[Job]:
        """What of its work goes before a request."""
        key = urgency(request)
        return [job for job in self.jobs if job.id in self.staying or urgency(job.request) <= key]

    def paints(self, model: str) -> bool:
        """Whether it can paint with a model now."""
        return self.models is None or model in self.models

    def has_room(self, request: Request) -> bool:
        """Whether it would begin a request at once or next, as far as what goes before it.

        So what is urgent is sent even to a group that is busy with what is not, and which may hold that.
        """
        return len(self.before(request)) < self.devices * self.costs.largest_batch(request.shape) + AHEAD

    def end(self, now: float, request: Request) -> float:
        """Seconds until a request would be done there."""
        return reckoned(self._view(now), request, self.before(request))

    def load(self, now: float) -> float:
        """Seconds of work it has."""
        view = self._view(now)
        return sum(view.fastest(job) for job in view.jobs)

    def _view(self, now: float) -> View:
        return View(State(now, tuple(range(self.devices)), self.jobs), self.costs)


@dataclass(frozen=True)
class Waiting:
    """A request that no group has.

    Attributes:
        request: The request.
        model: The model it needs.
    """

    request: Request
    model: str


def dispatch(now: float, groups: Iterable[Group], waiting: Sequence[Waiting]) -> list[tuple[Request, int]]:
    """Which requests go to which group now.

    Each is meant for the group that ends it first, but sent only where that would begin it at once or next. So the
    others wait where every group can still have them, and none waits behind something long that happened to be short
    of company.

    Args:
        now: Seconds, on the clock of the deadlines.
        groups: The groups that live.
        waiting: The requests that none of them has.

    Returns:
        Requests and their groups, the most urgent first.

    Raises:
        ValueError: A group's costs do not know a shape.
    """
    there = {group.number: group for group in groups}
    sent: list[tuple[Request, int]] = []
    for one in sorted(waiting, key=lambda one: urgency(one.request)):
        able = [group for group in there.values() if group.paints(one.model)]
        if not any(group.has_room(one.request) for group in able):
            continue
        chosen = _soonest(now, able, one.request)
        if chosen.has_room(one.request):
            sent.append((one.request, chosen.number))
        there[chosen.number] = replace(chosen, jobs=(*chosen.jobs, Job(one.request, one.request.steps)))
    return sent


def urgency(request: Request) -> tuple[float, float, float, str]:
    """A key that sorts requests: those of more weight first, then by deadlines."""
    return -request.weight, request.deadline, request.arrival, request.id


def _soonest(now: float, groups: Sequence[Group], request: Request) -> Group:
    """The group that ends a request first; of those that end it as soon, the one with the least work."""
    ends = {group.number: group.end(now, request) for group in groups}
    best = min(ends.values())
    alike = [group for group in groups if ends[group.number] <= ALIKE * best]
    return min(alike, key=lambda group: (group.load(now), ends[group.number], group.number))
