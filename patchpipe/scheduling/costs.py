"""What a step, a change and a request's ends cost: from a table, and corrected by what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from patchpipe.scheduling.state import Shape

Key = tuple[Shape, int, int]
Switch = Literal["stay", "pause", "resume", "change"]


class Costs(Protocol):
    """What the scheduler asks. Answers must not change during a decision."""

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """Numbers of devices that requests of a shape can run on, ascending."""

    def largest_batch(self, shape: Shape) -> int:
        """Requests of a shape that can run as one batch."""

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """Seconds of one step of so many requests on so many devices."""

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """Seconds to go from one degree to another.

        Args:
            shape: Of the request.
            before: The degree; 0 starts or resumes.
            after: The degree; 0 pauses.
            moved: The devices are others, though they may be as many.
        """

    def starts(self, shape: Shape) -> float:
        """Seconds before the first step of a request that has never run, such as its text encoders'."""

    def ends(self, shape: Shape, batch: int) -> float:
        """Seconds after the last step: the VAE, and whatever ``starts`` leaves out."""


def kind_of(before: int, after: int, moved: bool) -> Switch:
    """What it is to go from one degree to another; see ``Costs.switch``."""
    if after == 0:
        return "pause" if before else "stay"
    if before == 0:
        return "resume"
    return "change" if moved or before != after else "stay"


@dataclass(frozen=True)
class TableCosts:
    """Costs from a table of seconds a step.

    Attributes:
        steps: Seconds of a step by shape, batch and degree. A batch that is not there costs what lies on the line
            through the two nearest that are.
        pause: Seconds to pause, from the end of the step under way until the devices are free.
        resume: Seconds to start or resume.
        change: Seconds to go on with another degree or on other devices.
        decode: Seconds after the steps, by shape, for each request of a batch.
        encode: Seconds before the first step, by shape.
    """

    steps: Mapping[Key, float]
    pause: float = 0.001
    resume: float = 0.001
    change: float = 0.05
    decode: Mapping[Shape, float] = field(default_factory=dict)
    encode: Mapping[Shape, float] = field(default_factory=dict)
    _batches: dict[tuple[Shape, int], tuple[int, ...]] = field(init=False, repr=False, compare=False)
    _degrees: dict[Shape, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a table of costs needs the seconds of at least one step")
        batches: dict[tuple[Shape, int], list[int]] = {}
        for (shape, batch, degree), seconds in self.steps.items():
            if not seconds > 0:
                raise ValueError(f"a step of {shape} in {seconds} seconds must take more than 0")
            batches.setdefault((shape, degree), []).append(batch)
        degrees: dict[Shape, set[int]] = {}
        for shape, degree in batches:
            degrees.setdefault(shape, set()).add(degree)
        object.__setattr__(self, "_batches", {key: tuple(sorted(found)) for key, found in batches.items()})
        object.__setattr__(self, "_degrees", {shape: tuple(sorted(found)) for shape, found in degrees.items()})

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """See ``Costs``.

        Raises:
            ValueError: The table does not know the shape.
        """
        if shape not in self._degrees:
            raise ValueError(f"there are no costs for {shape}; known are {', '.join(map(str, self._degrees))}")
        return self._degrees[shape]

    def largest_batch(self, shape: Shape) -> int:
        """See ``Costs``."""
        return self._batches[shape, self.degrees(shape)[0]][-1]

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """See ``Costs``.

        Raises:
            ValueError: The table does not know the degree.
        """
        exact = self.steps.get((shape, batch, degree))
        if exact is not None:
            return exact
        if degree not in self.degrees(shape):
            raise ValueError(f"there are no costs for {shape} on {degree} devices")
        return self._between(shape, batch, degree)

    def _between(self, shape: Shape, batch: int, degree: int) -> float:
        known = self._batches[shape, degree]
        if len(known) == 1:
            return self.steps[shape, known[0], degree] * batch / known[0]
        high = next((index for index, size in enumerate(known) if size > batch), len(known) - 1)
        low, high = known[max(0, high - 1)], known[max(1, high)]
        first, second = self.steps[shape, low, degree], self.steps[shape, high, degree]
        return first + (second - first) * (batch - low) / (high - low)

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """See ``Costs``."""
        return {"stay": 0.0, "pause": self.pause, "resume": self.resume, "change": self.change}[
            kind_of(before, after, moved)
        ]

    def starts(self, shape: Shape) -> float:
        """See ``Costs``."""
        return self.encode.get(shape, 0.0)

    def ends(self, shape: Shape, batch: int) -> float:
        """See ``Costs``."""
        return self.decode.get(shape, 0.0) * batch


class MeasuredCosts:
    """Costs that learn: the steps of another, corrected by an exponential average of what they really took.

    A combination that was never measured takes the correction of its shape; a shape that never was, none. Tell it
    between decisions what was measured, from one thread.

    Args:
        costs: What is believed beforehand.
        share: Weight of a new measurement beside the average so far, above 0 and at most 1.
    """

    def __init__(self, costs: Costs, share: float = 0.2) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must be above 0 and at most 1")
        self._costs, self._share = costs, share
        self._exact: dict[Key, float] = {}
        self._shapes: dict[Shape, float] = {}

    def measured(self, shape: Shape, batch: int, degree: int, seconds: float) -> None:
        """Takes in what one step really took.

        Raises:
            ValueError: The time is not above 0.
        """
        if not seconds > 0:
            raise ValueError(f"a step of {shape} in {seconds} seconds must take more than 0")
        ratio = seconds / self._costs.step(shape, batch, degree)
        key = (shape, batch, degree)
        self._exact[key] = self._averaged(self._exact.get(key), ratio)
        self._shapes[shape] = self._averaged(self._shapes.get(shape), ratio)

    def _averaged(self, so_far: float | None, ratio: float) -> float:
        return ratio if so_far is None else so_far + self._share * (ratio - so_far)

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """See ``Costs``."""
        return self._costs.degrees(shape)

    def largest_batch(self, shape: Shape) -> int:
        """See ``Costs``."""
        return self._costs.largest_batch(shape)

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """See ``Costs``."""
        ratio = self._exact.get((shape, batch, degree)) or self._shapes.get(shape, 1.0)
        return ratio * self._costs.step(shape, batch, degree)

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """See ``Costs``."""
        return self._costs.switch(shape, before, after, moved=moved)

    def starts(self, shape: Shape) -> float:
        """See ``Costs``."""
        return self._costs.starts(shape)

    def ends(self, shape: Shape, batch: int) -> float:
        """See ``Costs``."""
        return self._costs.ends(shape, batch)
