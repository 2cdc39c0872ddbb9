"""What the planner believes a step to take, for each of the service's models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from patchpipe.scheduling import Shape
from patchpipe.serve.steer.shapes import model_of
from patchpipe.serve.work.model import Model

if TYPE_CHECKING:
    from patchpipe.config import ParallelConfig
    from patchpipe.planner.work.workload import Workload


def planner_of(models: Mapping[str, Model]) -> Callable[[Shape, int], float | None]:
    """Asks the planner for the seconds of a step of one of these models on its devices, in its layout."""
    workloads: dict[Shape, Workload] = {}  # of all degrees

    def believe(shape: Shape, degree: int) -> float | None:
        from patchpipe.errors import UnsupportedModel

        model = models[model_of(shape)]
        try:
            if shape not in workloads:
                workloads[shape] = _workload(model, shape)
            return _seconds(workloads[shape], model, degree)
        except (UnsupportedModel, FileNotFoundError, ValueError):
            return None  # a model, a size or a layout that it does not know

    return believe


def _workload(model: Model, shape: Shape) -> Workload:
    from patchpipe.planner.work.named import Asked, workload_for

    frames = shape.frames if shape.kind == "clip" else None
    return workload_for(model.source, Asked(height=shape.height, width=shape.width, frames=frames, steps=20))


def _seconds(workload: Workload, model: Model, degree: int) -> float:
    from patchpipe.planner.machine.here import profile_of
    from patchpipe.planner.predict import predict

    facts = model.facts
    layout: ParallelConfig | None = facts.elastic.of(degree) if facts.elastic is not None else facts.config
    count = 1 if layout is None else layout.world_size
    machine = profile_of(facts.devices[:count], os.cpu_count() or 1)
    return predict(workload, layout or _plain(), machine).seconds / workload.steps


def _plain() -> ParallelConfig:
    from patchpipe.config import ParallelConfig

    return ParallelConfig()
