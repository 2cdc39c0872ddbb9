"""Requests that come by chance or from a trace: who asks for what, and when."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patchpipe.scheduling.state import Request, Shape

Deadline = Callable[[Shape, int], float]
"""Seconds from its arrival to the deadline of a request, by shape and steps."""
COLUMNS = ("arrival", "model", "width", "height", "frames", "steps")


@dataclass(frozen=True)
class Ask:
    """A request of which there are many.

    Attributes:
        shape: Model and size.
        steps: Denoising steps.
        share: How often it is asked for beside others.
        weight: What meeting its deadline is worth.
    """

    shape: Shape
    steps: int
    share: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.share < 0:
            raise ValueError(f"share={self.share} of {self.shape} must be 0 or more")


@dataclass(frozen=True)
class Bursts:
    """Arrivals that come in bursts: calm and busy times alternate, each as long as chance has it.

    Attributes:
        busy: How much denser requests come in a burst than in the calm, 1 or more.
        seconds: Mean length of a burst.
        share: Share of the time that is bursts.
    """

    busy: float = 4.0
    seconds: float = 20.0
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.busy < 1 or not self.seconds > 0 or not 0 < self.share < 1:
            raise ValueError(
                f"bursts {self.busy} times as dense, of {self.seconds} seconds, for {self.share} of the time: must be "
                f"1 or more, above 0, and between 0 and 1"
            )


def arrivals(per_minute: float, count: int, chance: random.Random, bursts: Bursts | None = None) -> Iterator[float]:
    """Times of ``count`` arrivals, so many a minute on average: a Poisson process, or one that comes in bursts.

    Args:
        per_minute: Mean arrivals a minute.
        count: How many.
        chance: Where chance comes from.
        bursts: How they come in bursts; ``None`` for a Poisson process.

    Raises:
        ValueError: The rate is not above 0.
    """
    if not per_minute > 0:
        raise ValueError(f"{per_minute} requests a minute must be above 0")
    rate = per_minute / 60
    if bursts is None:
        now = 0.0
        for _ in range(count):
            now += chance.expovariate(rate)
            yield now
        return
    yield from _in_bursts(rate, count, chance, bursts)


def _in_bursts(rate: float, count: int, chance: random.Random, bursts: Bursts) -> Iterator[float]:
    calm = rate / (1 - bursts.share + bursts.share * bursts.busy)
    lengths = {True: bursts.seconds, False: bursts.seconds * (1 - bursts.share) / bursts.share}
    busy = chance.random() < bursts.share
    now, end = 0.0, chance.expovariate(1 / lengths[busy])
    for _ in range(count):
        while True:
            step = chance.expovariate(calm * (bursts.busy if busy else 1))
            if now + step <= end:
                break
            now, busy = end, not busy
            end = now + chance.expovariate(1 / lengths[busy])
        now += step
        yield now


def requests(asks: list[Ask], times: Iterator[float], deadline: Deadline, chance: random.Random) -> list[Request]:
    """Requests at these times, each drawn from what is asked for.

    Raises:
        ValueError: Nothing is asked for.
    """
    if not sum(ask.share for ask in asks) > 0:
        raise ValueError("nothing is asked for: at least one share must be above 0")
    found = []
    for number, time in enumerate(times):
        [ask] = chance.choices(asks, weights=[ask.share for ask in asks])
        due = time + deadline(ask.shape, ask.steps)
        found.append(Request(f"r{number:06d}", ask.shape, ask.steps, time, due, ask.weight))
    return found


def read_trace(path: Path, deadline: Deadline) -> list[Request]:
    """Requests from a CSV file with the columns arrival (seconds), model, width, height, frames, steps.

    The columns ``deadline_s`` (seconds from the arrival) and ``weight`` may follow; an empty deadline is the usual one.

    Args:
        path: The file.
        deadline: The usual deadline.

    Raises:
        ValueError: A column is missing, or a value is not what it should be; the message names the line.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no trace {path}")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
        found = [_read_row(path, number, row, deadline) for number, row in enumerate(reader, start=2)]
    if not found:
        raise ValueError(f"{path} has no requests")
    return sorted(found, key=lambda request: (request.arrival, request.id))


def _read_row(path: Path, number: int, row: dict[str, str], deadline: Deadline) -> Request:
    try:
        shape = Shape(row["model"], int(row["width"]), int(row["height"]), int(row["frames"]))
        steps, arrival = int(row["steps"]), float(row["arrival"])
        given = (row.get("deadline_s") or "").strip()
        seconds = float(given) if given else deadline(shape, steps)
        weight = float((row.get("weight") or "").strip() or 1)
        return Request(f"r{number:06d}", shape, steps, arrival, arrival + seconds, weight)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
