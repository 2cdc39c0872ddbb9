"""Which of a fleet's groups of devices a request goes to: earliest deadline first, to the group that ends it first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

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
        models: Models it can paint with now; ``None`` are all.
    """

    number: int
    devices: int
    costs: Costs
    jobs: tuple[Job, ...] = ()
    models: frozenset[str] | None = field(default=None)

    def takes(self, request: Request, model: str) -> bool:
        """Whether a request may be sent to it now, rather than wait where every group can still have it.

        It may where the group would begin it at once or next, as far as what is due before it goes. So what is
        urgent is sent even to a group that is busy with what is not, and which may hold that.
        """
        if self.models is not None and model not in self.models:
            return False
        before = sum(job.request.deadline <= request.deadline for job in self.jobs)
        return before < self.devices * self.costs.largest_batch(request.shape) + AHEAD

    def view(self, now: float) -> View:
        """It, as a policy looks at it: as if nothing had begun, since any of it may be held."""
        jobs = tuple(Job(job.request, max(1, job.remaining)) for job in self.jobs)
        return View(State(now, tuple(range(self.devices)), jobs), self.costs)

    def load(self, now: float) -> float:
        """Seconds of work it has."""
        view = self.view(now)
        return sum(view.fastest(job) for job in view.jobs)


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
    """Which requests go to which group now; the others wait, since no group would come to them soon.

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
    for one in sorted(waiting, key=_urgency):
        able = [group for group in there.values() if group.takes(one.request, one.model)]
        if able:
            chosen = _soonest(now, able, one.request)
            there[chosen.number] = replace(chosen, jobs=(*chosen.jobs, Job(one.request, one.request.steps)))
            sent.append((one.request, chosen.number))
    return sent


def _urgency(one: Waiting) -> tuple[float, float, str]:
    return one.request.deadline, one.request.arrival, one.request.id


def _soonest(now: float, groups: Sequence[Group], request: Request) -> Group:
    """The group that ends a request first; of those that end it as soon, the one with the least work."""
    ends = {group.number: reckoned(group.view(now), request, late=True) for group in groups}
    best = min(ends.values())
    alike = [group for group in groups if ends[group.number] <= ALIKE * best]
    return min(alike, key=lambda group: (group.load(now), ends[group.number], group.number))
