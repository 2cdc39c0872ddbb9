"""Simulated time: requests come, the scheduler decides, groups of devices run."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from patchpipe.scheduling.costs import Costs, MeasuredCosts
from patchpipe.scheduling.router import Router
from patchpipe.scheduling.scheduler import Scheduler
from patchpipe.scheduling.simulator.group import Counts, Group
from patchpipe.scheduling.state import Request

_SHORTEST_REVIEW = 0.25  # seconds


@dataclass(frozen=True)
class Fleet:
    """The devices.

    Attributes:
        devices: How many.
        group: Devices of a group, which is decided about as a whole; a request runs within one.
        review: Decisions come at the latest after so many steps of the clip with the shortest step.
    """

    devices: int = 8
    group: int = 8
    review: int = 5

    def __post_init__(self) -> None:
        for name in ("devices", "group", "review"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.devices % self.group:
            raise ValueError(f"{self.devices} devices are no multiple of a group of {self.group}")


@dataclass(frozen=True)
class Served:
    """What became of a request.

    Attributes:
        request: The request.
        end: When it was done; ``None`` where it was refused.
        reason: Why it was refused.
    """

    request: Request
    end: float | None
    reason: str = ""

    @property
    def in_time(self) -> bool:
        """Whether it met its deadline; a refused one did not."""
        return self.end is not None and self.end <= self.request.deadline + 1e-6

    @property
    def seconds(self) -> float:
        """From its arrival to its end; infinity where it was refused."""
        return math.inf if self.end is None else self.end - self.request.arrival


@dataclass
class Simulation:
    """What happened.

    Attributes:
        served: Every request, in the order they were done.
        counts: Pauses and the like of each group.
        seconds: Simulated seconds until all was done.
        decisions: Seconds of the processor that each decision took on the machine that simulated.
        routes: Likewise for choosing the group of a request.
    """

    served: list[Served] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    seconds: float = 0.0
    decisions: list[float] = field(default_factory=list)
    routes: list[float] = field(default_factory=list)


def simulate(
    requests: Sequence[Request],
    fleet: Fleet,
    scheduler: Scheduler,
    truth: Costs | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Simulation:
    """Serves requests in simulated time.

    Args:
        requests: The requests in the order of their arrival.
        fleet: The devices.
        scheduler: Who decides. If its costs are ``MeasuredCosts``, they are told what is measured.
        truth: What steps really take; ``None`` is what the scheduler believes.
        on_done: Told how many requests are done, now and then.

    Returns:
        What became of all of them.
    """
    return _Run(requests, fleet, scheduler, truth or scheduler.costs, on_done).all()


class _Run:
    def __init__(
        self,
        requests: Sequence[Request],
        fleet: Fleet,
        scheduler: Scheduler,
        truth: Costs,
        on_done: Callable[[int], None] | None,
    ) -> None:
        self._requests, self._fleet, self._scheduler, self._truth = requests, fleet, scheduler, truth
        measured = scheduler.costs.measured if isinstance(scheduler.costs, MeasuredCosts) else None
        size = fleet.group
        self._groups = [Group(range(first, first + size), truth, measured) for first in range(0, fleet.devices, size)]
        self._reviews = [math.inf] * len(self._groups)
        self._events: list[tuple[float, int]] = []
        self._times = [math.inf] * len(self._groups)
        self._router, self._work = Router(), [0.0] * len(self._groups)
        for index in range(len(self._groups)):
            self._router.update(index, 0.0)
        self._told = on_done
        self.found = Simulation()

    def all(self) -> Simulation:
        coming = 0
        while True:
            arrival = self._requests[coming].arrival if coming < len(self._requests) else math.inf
            event = self._next_event()
            now = min(arrival, event)
            if now == math.inf:
                break
            self.found.seconds = now
            if event <= arrival:
                _, index = heapq.heappop(self._events)
                self._advance(index, now)
            else:
                self._arrive(self._requests[coming], now)
                coming += 1
        self.found.counts = [group.counts for group in self._groups]
        if any(len(group) for group in self._groups):
            raise RuntimeError("requests were left over that nothing will run")
        return self.found

    def _next_event(self) -> float:
        while self._events:
            time_, index = self._events[0]
            if self._times[index] == time_:
                return time_
            heapq.heappop(self._events)
        return math.inf

    def _arrive(self, request: Request, now: float) -> None:
        began = time.thread_time()
        index = self._router.choose()
        self.found.routes.append(time.thread_time() - began)
        group = self._groups[index]
        reason = self._scheduler.refusal(group.state(now), request)
        if reason is not None:
            self._done(Served(request, None, reason))
            return
        group.add(request)
        self._load(index, request, 1)
        self._decide(index, now)

    def _advance(self, index: int, now: float) -> None:
        group = self._groups[index]
        done = group.advance(now)
        for request in done:
            self._done(Served(request, now))
            self._load(index, request, -1)
        if done or now >= self._reviews[index]:
            self._decide(index, now)
        else:
            self._plan_event(index)

    def _decide(self, index: int, now: float) -> None:
        group = self._groups[index]
        self._reviews[index] = math.inf
        if len(group):
            state = group.state(now)
            began = time.thread_time()
            decisions = self._scheduler.decide(state)
            self.found.decisions.append(time.thread_time() - began)
            group.apply(decisions, now)
            if self._scheduler.policy.reviews:
                self._reviews[index] = now + max(_SHORTEST_REVIEW, self._fleet.review * group.shortest_step())
        self._plan_event(index)

    def _plan_event(self, index: int) -> None:
        self._times[index] = min(self._groups[index].next_event(), self._reviews[index])
        if self._times[index] < math.inf:
            heapq.heappush(self._events, (self._times[index], index))

    def _load(self, index: int, request: Request, sign: int) -> None:
        degree = self._truth.degrees(request.shape)[0]
        seconds = degree * request.steps * self._truth.step(request.shape, 1, degree)
        self._work[index] += sign * seconds / self._fleet.group
        self._router.update(index, round(self._work[index], 6))

    def _done(self, served: Served) -> None:
        self.found.served.append(served)
        if self._told is not None:
            self._told(1)
