"""Policies against loads: every one serves the same requests, seed by seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from patchpipe.scheduling.admission import Admission
from patchpipe.scheduling.costs import Costs, MeasuredCosts
from patchpipe.scheduling.policies import Policy
from patchpipe.scheduling.scheduler import Scheduler
from patchpipe.scheduling.simulator.arrivals import Ask, Bursts, Deadline, arrivals, requests
from patchpipe.scheduling.simulator.measure import Figures, figures
from patchpipe.scheduling.simulator.simulate import Fleet, Simulation, simulate
from patchpipe.scheduling.state import Request, Shape


@dataclass(frozen=True)
class Load:
    """The requests of a run.

    Attributes:
        asks: What is asked for.
        deadline: Seconds to the deadline, by shape and steps.
        count: Requests of a run.
        bursts: How they come in bursts; ``None`` for a Poisson process.
        trace: Requests to serve instead of drawn ones, the same for every seed.
    """

    asks: Sequence[Ask]
    deadline: Deadline
    count: int = 100
    bursts: Bursts | None = None
    trace: Sequence[Request] = field(default=())

    def requests(self, per_minute: float, seed: int) -> Sequence[Request]:
        """The requests of a seed, in the order of their arrival."""
        if self.trace:
            return self.trace
        chance = random.Random(seed)
        times = arrivals(per_minute, self.count, chance, self.bursts)
        return requests(list(self.asks), times, self.deadline, chance)


@dataclass(frozen=True)
class Ground:
    """What the requests run on.

    Attributes:
        fleet: The devices.
        costs: What the scheduler believes.
        error: How wrong that is: a shape's steps really take up to so many times as long, or as much less.
        admission: Whether requests are refused that cannot be met.
    """

    fleet: Fleet
    costs: Costs
    error: float = 1.0
    admission: bool = False

    def __post_init__(self) -> None:
        if self.error < 1:
            raise ValueError(f"error={self.error} must be 1 or more")

    def run(self, policy: Policy, asked: Sequence[Request], seed: int, on_done: Callable[[int], None]) -> Simulation:
        """Serves requests by a policy, with costs that learn where they are wrong."""
        believed = self.costs if self.error == 1 else MeasuredCosts(self.costs)
        truth = self.costs if self.error == 1 else Mistaken(self.costs, self.error, seed)
        scheduler = Scheduler(policy, believed, Admission() if self.admission else None)
        return simulate(asked, self.fleet, scheduler, truth, on_done)


class Mistaken:
    """Costs that differ from others by a factor for each shape, drawn evenly on a logarithmic scale.

    Args:
        costs: The others.
        error: The largest factor, and the inverse of the smallest.
        seed: Of the draw.
    """

    def __init__(self, costs: Costs, error: float, seed: int) -> None:
        self._costs, self._error, self._seed = costs, error, seed

    def _factor(self, shape: Shape) -> float:
        return float(self._error ** random.Random(f"{self._seed} {shape}").uniform(-1, 1))

    def degrees(self, shape: Shape) -> tuple[int, ...]:
        """See ``Costs``."""
        return self._costs.degrees(shape)

    def largest_batch(self, shape: Shape) -> int:
        """See ``Costs``."""
        return self._costs.largest_batch(shape)

    def step(self, shape: Shape, batch: int, degree: int) -> float:
        """See ``Costs``."""
        return self._factor(shape) * self._costs.step(shape, batch, degree)

    def switch(self, shape: Shape, before: int, after: int, *, moved: bool = False) -> float:
        """See ``Costs``."""
        return self._costs.switch(shape, before, after, moved=moved)

    def starts(self, shape: Shape) -> float:
        """See ``Costs``."""
        return self._costs.starts(shape)

    def ends(self, shape: Shape, batch: int) -> float:
        """See ``Costs``."""
        return self._costs.ends(shape, batch)


def sweep(
    policies: Sequence[tuple[str, Policy]],
    loads: Sequence[float],
    load: Load,
    ground: Ground,
    seeds: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> Iterator[Figures]:
    """The figures of every policy under every load, as they come.

    Args:
        policies: Names and policies.
        loads: Requests a minute.
        load: The requests.
        ground: What they run on.
        seeds: Runs of each, the first with seed 0.
        on_done: Told how many more requests are done.
    """
    for per_minute in loads:
        asked = [load.requests(per_minute, seed) for seed in range(seeds)]
        for name, policy in policies:
            runs = [ground.run(policy, one, seed, on_done) for seed, one in enumerate(asked)]
            yield figures(name, per_minute, runs, ground.fleet.devices)
