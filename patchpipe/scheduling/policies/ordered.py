"""Policies that sort: first come, shortest first, least left first, earliest deadline first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from patchpipe.scheduling.policies.view import View, Wish, fit, order
from patchpipe.scheduling.state import Job, Shape

Key = Callable[[View, Job, int], float]
_KEYS: dict[str, tuple[Key, bool]] = {
    "fcfs": (lambda view, job, degree: job.request.arrival, False),
    "sjf": (lambda view, job, degree: _whole(view, job, degree), False),
    "srtf": (lambda view, job, degree: view.seconds(job, degree), True),
    "edf": (lambda view, job, degree: job.request.deadline, True),
}
ORDERED = tuple(_KEYS)


@dataclass(frozen=True)
class Ordered:
    """Serves requests one by one in an order, each on a fixed number of devices, and fewer only where no more are left.

    Those of more weight go before all others.

    Attributes:
        name: ``fcfs`` first come, first served; ``sjf`` shortest job first; ``srtf`` shortest remaining time first;
            ``edf`` earliest deadline first. The last two pause what runs for what comes before it, the others do not.
        degree: Devices of a clip; pictures run on one.
        degrees: Devices of particular shapes, which go before ``degree``.
    """

    name: str
    degree: int = 1
    degrees: Mapping[Shape, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in _KEYS:
            raise ValueError(f"policy {self.name} must be one of {', '.join(_KEYS)}")
        if self.degree < 1:
            raise ValueError(f"degree={self.degree} must be 1 or more")

    @property
    def reviews(self) -> bool:
        """See ``Policy``: its order changes only when requests come or go."""
        return False

    def plan(self, view: View) -> list[Wish]:
        """See ``Policy``."""
        key, preempts = _KEYS[self.name]
        waiting = view.jobs if preempts else view.idle
        wishes = [Wish((job,), self._degree(view, job)) for job in waiting]
        wishes.sort(key=lambda wish: _place(view, wish, key))
        return fit(wishes if preempts else [*view.running, *wishes], view)

    def _degree(self, view: View, job: Job) -> int:
        shape = job.request.shape
        most = self.degrees.get(shape, self.degree if shape.kind == "clip" else 1)
        return max((degree for degree in view.degrees(shape) if degree <= most), default=1)


def _place(view: View, wish: Wish, key: Key) -> tuple[float, float, tuple[float, str]]:
    job = wish.jobs[0]
    return -job.request.weight, key(view, job, wish.degree), order(job)


def _whole(view: View, job: Job, degree: int) -> float:
    shape = job.request.shape
    return view.costs.starts(shape) + job.request.steps * view.costs.step(shape, 1, degree) + view.costs.ends(shape, 1)
