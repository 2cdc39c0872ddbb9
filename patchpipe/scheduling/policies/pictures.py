"""Batches of waiting pictures that meet their deadlines."""

from __future__ import annotations

from dataclasses import dataclass

from patchpipe.scheduling.policies.view import View, Wish, order
from patchpipe.scheduling.state import Job

_LATE = 0.01  # worth of a late picture beside one in time: it still is served before nothing


@dataclass(frozen=True)
class Batch:
    """Pictures to run together.

    Attributes:
        wish: The pictures, on one device.
        value: What it is worth to start them now: the weights of those in time.
        in_time: Whether all are.
    """

    wish: Wish
    value: float
    in_time: bool


def batches(view: View, pictures: list[Job]) -> list[Batch]:
    """Batches of the same shape, the worthiest first, that as a whole meet the deadlines.

    A picture joins a batch only if every member is then still in time; the late ones form batches of their own.

    Args:
        view: The view.
        pictures: Pictures that do not run.
    """
    urgent = sorted(pictures, key=lambda job: (job.request.deadline, order(job)))
    groups: list[list[Job]] = []
    late: list[list[Job]] = []
    for job in urgent:
        if _in_time(view, [job], len(groups)):
            _join(view, groups, job, check=True)
        else:
            _join(view, late, job, check=False)
    timely = [Batch(_wish(view, group), sum(job.request.weight for job in group), True) for group in groups]
    rest = [Batch(_wish(view, group), _LATE * sum(job.request.weight for job in group), False) for group in late]
    return sorted(timely, key=lambda batch: -batch.value) + rest


def _join(view: View, groups: list[list[Job]], job: Job, *, check: bool) -> None:
    largest = view.costs.largest_batch(job.request.shape)
    for index, group in enumerate(groups):
        alike = group[0].request.shape == job.request.shape and group[0].remaining == job.remaining
        if alike and len(group) < largest and (not check or _in_time(view, [*group, job], index)):
            group.append(job)
            return
    groups.append([job])


def _in_time(view: View, group: list[Job], place: int) -> bool:
    """Whether all of a batch are in time if it gets the device that is free after ``place`` others."""
    degree = view.degrees(group[0].request.shape)
    if not degree:
        return False
    start = view.free_at[min(place, len(view.free_at) - 1)]
    end = start + view.seconds(group[0], degree[0], len(group))
    return all(end <= job.request.deadline for job in group)


def _wish(view: View, group: list[Job]) -> Wish:
    return Wish(tuple(group), view.costs.degrees(group[0].request.shape)[0])
