"""What steps take: as the planner believes until they are measured, then as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from patchpipe.scheduling import MeasuredCosts, Shape, Switch, kind_of
from patchpipe.serve.steer.shapes import bare, joins, model_of

logger = logging.getLogger("patchpipe.serve")

SHARE = 0.2  # weight of a new measurement beside the average so far
SWITCHES: Mapping[Switch, float] = {"stay": 0.0, "pause": 0.005, "resume": 0.02, "change": 0.2}  # until measured
GUESS = 1.0  # seconds of a step for each million pixels of all frames, where the planner knows nothing

Believe = Callable[[Shape, int], float | None]  # seconds of a step on so many devices; None where nothing is known


@dataclass(frozen=True)
class Machine:
    """What the scheduler has to share.

    Where every model is elastic, these are the devices. Else it is the machine as a whole, which one request has at a
    time, or several of one model in flight together.

    Attributes:
        devices: How many things there are to share.
        degrees: Of how many of them a request can make use.
        together: Pictures in flight together at most.
        elastic: Whether they are devices.
    """

    devices: int = 1
    degrees: tuple[int, ...] = (1,)
    together: int = 1
    elastic: bool = False


class Believed:
    """Costs before anything has run; see ``scheduling.Costs``.

    Args:
        machine: What there is to share.
        believe: Seconds of a step, as far as known.
    """

    def __init__(self, machine: Machine, believe: Believe) -> None:
        self._machine, self._believe = machine, believe
        self._steps: dict[Shape, Mapping[int, float]] = {}

    def know(self, shape: Shape) -> None:
        """Looks a shape up, which may take a moment the first time."""
        shape = bare(shape)
        if shape in self._steps:
            return
        found = {degree: self._ask(shape, degree) for degree in self._machine.degrees}
        useful: dict[int, float] = {}
        for degree, seconds in found.items():
            if not useful or seconds < min(useful.values()):
                useful[degree] = seconds
        self._steps[shape] = useful

    def _ask(self, shape: Shape, degree: int) -> float:
        try:
            seconds = self._believe(shape, degree)
        except Exception:  # a request is served all the same
            logger.exception("the planner failed", extra={"fields": {"shape": str(shape)}})
            seconds = None
        if seconds is not None and seconds > 0:
            return seconds
        return GUESS * shape.width * shape.height * shape.frames / 1e6 / degree**0.5

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """See ``Costs``."""
        self.know(shape)
        return tuple(self._steps[bare(shape)])

    def largest_batch(self, shape: Shape) -> int:
        """See ``Costs``."""
        return self._machine.together if shape.kind == "picture" and joins(shape) else 1

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """See ``Costs``."""
        self.know(shape)
        steps = self._steps[bare(shape)]
        return batch * (steps[degree] if degree in steps else self._ask(bare(shape), degree))

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """See ``Costs``."""
        return SWITCHES[kind_of(before, after, moved)]

    def starts(self, shape: Shape) -> float:
        """See ``Costs``."""
        return 0.0

    def ends(self, shape: Shape, batch: int) -> float:
        """See ``Costs``."""
        return 0.0


class LiveCosts(MeasuredCosts):
    """Costs that learn from what runs, also about shapes that have not run yet: from others of the same model.

    Args:
        machine: What there is to share.
        believe: Seconds of a step, as far as known.
    """

    def __init__(self, machine: Machine, believe: Believe) -> None:
        self._believed = Believed(machine, believe)
        super().__init__(self._believed, SHARE)
        self._models: dict[str, float] = {}
        self._ends: dict[Shape, float] = {}
        self._starts: dict[Shape, float] = {}
        self._switches: dict[tuple[str, Switch], float] = {}

    def know(self, shape: Shape) -> None:
        """Looks a shape up, which may take a moment the first time."""
        self._believed.know(shape)

    def measured(self, shape: Shape, batch: int, degree: int, seconds: float) -> None:
        """See ``MeasuredCosts``."""
        shape = bare(shape)
        super().measured(shape, batch, degree, seconds)
        ratio, model = seconds / self._believed.step(shape, batch, degree), model_of(shape)
        self._models[model] = self._averaged(self._models.get(model), ratio)

    def started(self, shape: Shape, seconds: float) -> None:
        """Takes in by how much a request's first step was longer than its second."""
        shape = bare(shape)
        self._starts[shape] = self._averaged(self._starts.get(shape), seconds)

    def ended(self, shape: Shape, seconds: float) -> None:
        """Takes in what a request took after its steps."""
        shape = bare(shape)
        self._ends[shape] = self._averaged(self._ends.get(shape), max(0.0, seconds))

    def switched(self, shape: Shape, switch: Switch, seconds: float) -> None:
        """Takes in what a pause took, or by how much the first step after a resume or a change was longer."""
        key = model_of(shape), switch
        self._switches[key] = self._averaged(self._switches.get(key), seconds)

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """See ``Costs``; the same for all shapes of a model."""
        switch = kind_of(before, after, moved)
        return max(0.0, self._switches.get((model_of(shape), switch), SWITCHES[switch]))

    def starts(self, shape: Shape) -> float:
        """See ``Costs``."""
        return max(0.0, self._starts.get(bare(shape), 0.0))

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """See ``Costs``."""
        shape = bare(shape)
        if shape in self._shapes:
            return super().step(shape, batch, degree)
        return self._models.get(model_of(shape), 1.0) * super().step(shape, batch, degree)

    def ends(self, shape: Shape, batch: int) -> float:
        """See ``Costs``; as long as one step, until it is measured."""
        found = self._ends.get(bare(shape))
        return self.step(shape, 1, self.degrees(shape)[0]) if found is None else found
