"""Admission: what cannot be met is refused at once, so that its user can go elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchpipe.scheduling.policies.view import View
from patchpipe.scheduling.state import Job, Request


@dataclass(frozen=True)
class Admission:
    """Refuses a request that would be late alone on the idle machine, or behind all that is due before it.

    The second is reckoned as if work flowed like water: the device seconds of what is due before the request, each at
    the degree that wastes least, shared by all devices. What is late already is not counted: it gives way.

    Attributes:
        margin: Share of the time to its deadline that a request's reckoned end may take; below 1 is stricter.
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"margin={self.margin} must be above 0")

    def refusal(self, view: View, request: Request) -> str | None:
        """Why a request should be turned away, in words for its user; ``None`` accepts it."""
        allowed = request.deadline - view.now
        job = Job(request, request.steps)
        needed = view.fastest(job)
        if needed > self.margin * allowed:
            return f"it takes {needed:.1f} s on the idle machine, and its deadline is in {allowed:.1f} s"
        due = [other for other in view.jobs if other.request.deadline <= request.deadline]
        reached = [other for other in due if view.now + view.fastest(other) <= other.request.deadline]
        soonest = reckoned(view, request, reached)
        if soonest > self.margin * allowed:
            return f"what is due before it takes {soonest:.1f} s, and its deadline is in {allowed:.1f} s"
        return None


def reckoned(view: View, request: Request, before: Sequence[Job]) -> float:
    """Seconds until a request would be done if it came now, as if work flowed like water.

    Args:
        view: What there is without it.
        request: The request.
        before: Of the jobs there are, those that go before it.
    """
    job = Job(request, request.steps)
    work = sum(_device_seconds(view, other) for other in before) + _device_seconds(view, job)
    return max(view.fastest(job), work / max(1, view.room))


def _device_seconds(view: View, job: Job) -> float:
    degrees = view.costs.degrees(job.request.shape)
    return min(degree * view.seconds(job, degree) for degree in degrees)
