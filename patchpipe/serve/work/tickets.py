"""A request on its way: what is to be painted, how far it is, and who is told."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from patchpipe.serve.refusals import Refusal

Kind = Literal["picture", "clip"]
MOST_NOTES = 100


@dataclass(frozen=True)
class Work:
    """What is to be painted, as a model's pipeline takes it.

    Attributes:
        id: Its name in answers and logs.
        model: Which model paints it.
        kind: Pictures, or a clip.
        arguments: The pipeline's arguments by name.
        seeds: One for each picture. Pictures are painted one by one, so that a seed's is the same in any number.
        steps: Denoising steps, where known.
        loras: Name and strength of each LoRA, in order of names.
        previews: How many pictures on the way are wanted.
        deadline_s: Seconds from arrival by which it should be there.
        priority: The higher, the sooner.
        traceparent: The client's span, as W3C Trace Context writes it.
    """

    id: str
    model: str
    kind: Kind
    arguments: Mapping[str, Any] = field(repr=False)
    seeds: tuple[int, ...]
    steps: int | None = None
    loras: tuple[tuple[str, float], ...] = ()
    previews: int = 0
    deadline_s: float | None = None
    priority: int = 0
    traceparent: str | None = None


@dataclass(frozen=True)
class Started:
    """Its turn has come."""


@dataclass(frozen=True)
class Stepped:
    """A step is over.

    Attributes:
        step: Steps that are over.
        total: How many there will be, where known.
    """

    step: int
    total: int | None


@dataclass(frozen=True)
class Partial:
    """A picture on the way.

    Attributes:
        index: Which one, from 0.
        image: The picture.
    """

    index: int
    image: Any


@dataclass(frozen=True)
class Painted:
    """All pictures are there.

    Attributes:
        outputs: What the pipeline gave for each seed: a picture, or the frames of a clip.
        seconds: Of work, without waiting.
    """

    outputs: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Ended:
    """There will be no picture.

    Attributes:
        refusal: Why.
    """

    refusal: Refusal


Event = Started | Stepped | Partial | Painted | Ended
Listener = Callable[[Event], None]  # called from threads of the service


class Ticket:
    """One request's place in the service.

    Args:
        work: What is to be painted.
        listen: Told what happens to it.
        arrived: When it came, in seconds of a clock that only goes forward.

    Attributes:
        attempts: How often it was begun.
        due: When it should be there, on the same clock.
        outputs: What is painted of it so far, by the number of its seed.
        started: When its turn came; ``None`` while it waits.
        step: Steps over, of all its pictures.
        cancelled: Whether nobody wants it any more.
        seconds: Of work so far.
        notes: When it came on which devices and left them, the first hundred times.
    """

    def __init__(self, work: Work, listen: Listener, arrived: float) -> None:
        self.work, self._listen, self.arrived = work, listen, arrived
        self.attempts = 0
        self.due = math.inf if work.deadline_s is None else arrived + work.deadline_s
        self.outputs: dict[int, Any] = {}
        self.started: float | None = None
        self.step = 0
        self.seconds = 0.0
        self.notes: list[tuple[float, str, tuple[int, ...]]] = []
        self._over = threading.Event()
        self._cancelled = threading.Event()

    @property
    def total_steps(self) -> int | None:
        """Steps of all its pictures."""
        return None if self.work.steps is None else self.work.steps * len(self.work.seeds)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled.is_set()

    @property
    def over(self) -> bool:
        """Whether its last event is told."""
        return self._over.is_set()

    def withdraw(self) -> None:
        """Nobody wants it any more."""
        self._cancelled.set()

    def note(self, when: float, what: str, devices: tuple[int, ...]) -> None:
        """Keeps in mind what became of it."""
        if len(self.notes) < MOST_NOTES:
            self.notes.append((when, what, devices))

    def tell(self, event: Event) -> None:
        """Passes an event on; nothing comes after the last one."""
        if self.over:
            return
        if isinstance(event, (Painted, Ended)):
            self._over.set()
        self._listen(event)

    def wait(self, seconds: float) -> bool:
        """Waits for its last event; whether it came."""
        return self._over.wait(None if math.isinf(seconds) else seconds)


class Seen(NamedTuple):
    """A request as others see it.

    Attributes:
        ticket: The request.
        state: Whether any of its pictures runs, or is held.
        devices: Where it runs.
    """

    ticket: Ticket
    state: Literal["waiting", "running", "paused"]
    devices: tuple[int, ...]
