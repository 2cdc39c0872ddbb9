"""Costs from the planner: what a step of each shape takes on this machine, before anything has run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from patchpipe.config import ParallelConfig
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.predict import predict
from patchpipe.planner.work.workload import Workload
from patchpipe.scheduling.costs import TableCosts
from patchpipe.scheduling.state import Shape


def planned_costs(
    workloads: Mapping[Shape, Workload],
    machine: Profile,
    degrees: Sequence[int] = (1, 2, 4, 8),
    batches: Sequence[int] = (1, 2, 4),
    ends: Mapping[Shape, float] | None = None,
) -> TableCosts:
    """Costs as the planner predicts them for workers that hold whole weights and share the tokens (Ulysses).

    A degree is left out where the heads cannot be shared so, and where fewer devices are as quick.

    Args:
        workloads: One request of each shape.
        machine: The devices and links, nominal or as ``patchpipe profile`` measured them.
        degrees: Numbers of devices to consider, ascending, the first of them 1.
        batches: Sizes of batches of pictures; clips run alone.
        ends: Seconds of text encoders and VAE by shape, which the planner leaves out.
    """
    steps: dict[tuple[Shape, int, int], float] = {}
    for shape, workload in workloads.items():
        for degree in _useful(workload, machine, degrees):
            for batch in batches if shape.kind == "picture" else (1,):
                steps[shape, batch, degree] = _step(workload, machine, degree, batch)
    return TableCosts(steps, decode=dict(ends or {}))


def _useful(workload: Workload, machine: Profile, degrees: Sequence[int]) -> list[int]:
    found: list[int] = []
    best = float("inf")
    for degree in degrees:
        if workload.heads % degree == 0 and (seconds := _step(workload, machine, degree, 1)) < best:
            found.append(degree)
            best = seconds
    return found


def _step(workload: Workload, machine: Profile, degree: int, batch: int) -> float:
    grown = dataclasses.replace(workload, pictures=batch)
    return predict(grown, ParallelConfig(ulysses=degree), machine).seconds / workload.steps
