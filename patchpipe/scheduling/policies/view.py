"""A state as policies look at it: what can be decided, how much room there is, and when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from patchpipe.scheduling.costs import Costs
from patchpipe.scheduling.deadlines import quickest, seconds_left
from patchpipe.scheduling.state import Job, Shape, State


@dataclass(frozen=True)
class Wish:
    """What a policy wants: a batch of jobs of one shape on so many devices, whichever they are."""

    jobs: tuple[Job, ...]
    degree: int


class Policy(Protocol):
    """A way to share devices. Policies have settings and no memory."""

    @property
    def name(self) -> str:
        """Its short name."""

    @property
    def reviews(self) -> bool:
        """Whether its plan may change between arrivals and completions, so that it should be asked every few steps."""

    def plan(self, view: View) -> list[Wish]:
        """What should run, the most urgent first, on no more devices than ``view.room``."""


class View:
    """What a policy decides by.

    Attributes:
        now: Seconds.
        costs: The costs.
        jobs: The jobs that can be decided about: all but those whose last step or decoding is under way.
        room: Devices that can be decided about: all but those such jobs hold.
    """

    def __init__(self, state: State, costs: Costs) -> None:
        self.state, self.costs, self.now = state, costs, state.now
        self.jobs = [job for job in state.jobs if not job.ending]
        held = {device for job in state.jobs if job.ending for device in job.devices}
        self.room = len(state.devices) - len(held)
        self._held = held

    @cached_property
    def running(self) -> list[Wish]:
        """The batches that run and are not ending, as they are, longest under way first."""
        batches = [jobs for jobs in self.state.running.values() if not jobs[0].ending]
        batches.sort(key=lambda jobs: (jobs[0].remaining - jobs[0].request.steps, order(jobs[0])))
        return [Wish(jobs, jobs[0].degree) for jobs in batches]

    @cached_property
    def idle(self) -> list[Job]:
        """The jobs that do not run, in the order of their arrival."""
        return sorted((job for job in self.jobs if job.status != "running"), key=order)

    @cached_property
    def free_at(self) -> list[float]:
        """When each of the devices in ``room`` could be had, soonest first."""
        boundary = {
            device: jobs[0].boundary + self._pause(jobs[0])
            for devices, jobs in self.state.running.items()
            for device in devices
        }
        times = (boundary.get(device, self.now) for device in self.state.devices if device not in self._held)
        return sorted(max(self.now, time) for time in times)

    def _pause(self, job: Job) -> float:
        return 0.0 if job.ending else self.costs.switch(job.request.shape, job.degree, 0)

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """The degrees of a shape that the machine allows."""
        return tuple(degree for degree in self.costs.degrees(shape) if degree <= self.room)

    def seconds(self, job: Job, degree: int, batch: int = 1) -> float:
        """Seconds until a job would be done on so many devices, from its next boundary on."""
        return seconds_left(self.costs, job, degree, batch)

    def fastest(self, job: Job) -> float:
        """Seconds a job still needs at its quickest degree."""
        return self.seconds(job, quickest(self.costs, job.request.shape, max(1, self.room)))

    def slack(self, job: Job, degree: int) -> float:
        """Seconds a job could wait and still be in time on so many devices."""
        return job.request.deadline - max(self.now, job.boundary) - self.seconds(job, degree)


def order(job: Job) -> tuple[float, str]:
    """A key that sorts jobs by arrival, and tells apart those that came together."""
    return job.request.arrival, job.request.id


def fit(wishes: Iterable[Wish], view: View) -> list[Wish]:
    """As many wishes as there is room for, in their order; one that does not fit whole gets fewer devices."""
    found, room = [], view.room
    for wish in wishes:
        degrees = [degree for degree in view.degrees(wish.jobs[0].request.shape) if degree <= min(room, wish.degree)]
        if degrees:
            found.append(Wish(wish.jobs, degrees[-1]))
            room -= degrees[-1]
        if room == 0:
            break
    return found
