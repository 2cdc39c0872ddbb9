"""How long requests take, and deadlines for those that name none."""

from __future__ import annotations

import dataclasses

from patchpipe.scheduling.costs import Costs
from patchpipe.scheduling.state import Job, Request, Shape

DEFAULT_SCALE = 3.0  # times the seconds alone; what others give a request that names no deadline


def alone(costs: Costs, shape: Shape, steps: int, devices: int) -> float:
    """Seconds of a request alone on an idle machine, at its best degree.

    Args:
        costs: The costs.
        shape: The request's.
        steps: Its steps.
        devices: Devices of the machine.

    Raises:
        ValueError: The shape needs more devices than there are.
    """
    degree = quickest(costs, shape, devices)
    around = costs.switch(shape, 0, degree) + costs.starts(shape) + costs.ends(shape, 1)
    return around + steps * costs.step(shape, 1, degree)


def quickest(costs: Costs, shape: Shape, devices: int) -> int:
    """The degree, of those that so many devices allow, whose step is the shortest.

    Raises:
        ValueError: None is so small.
    """
    fitting = [degree for degree in costs.degrees(shape) if degree <= devices]
    if not fitting:
        raise ValueError(f"{shape} needs {costs.degrees(shape)[0]} devices, and there are {devices}")
    return min(fitting, key=lambda degree: (costs.step(shape, 1, degree), degree))


def with_deadline(request: Request, costs: Costs, devices: int, scale: float = DEFAULT_SCALE) -> Request:
    """The request with the usual deadline: so many times its seconds alone on an idle machine, from its arrival."""
    seconds = scale * alone(costs, request.shape, request.steps, devices)
    return dataclasses.replace(request, deadline=request.arrival + seconds)


def seconds_left(costs: Costs, job: Job, degree: int, batch: int = 1) -> float:
    """Seconds until a job would be done if it ran on ``degree`` devices from its next boundary on."""
    shape = job.request.shape
    switch = costs.switch(shape, job.degree, degree) + (costs.starts(shape) if job.status == "waiting" else 0.0)
    return switch + job.remaining * costs.step(shape, batch, degree) + costs.ends(shape, batch)


def slack(costs: Costs, job: Job, now: float, degree: int) -> float:
    """Seconds a job could wait and still be done in time on ``degree`` devices; below 0 it is late."""
    return job.request.deadline - now - seconds_left(costs, job, degree)
