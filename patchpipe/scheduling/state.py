"""What the scheduler is told, and what it answers: plain, frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal
from zlib import crc32

Kind = Literal["picture", "clip"]
Status = Literal["waiting", "running", "paused"]
KINDS: tuple[Kind, ...] = ("picture", "clip")


@dataclass(frozen=True)
class Shape:
    """What a step's cost depends on. Requests of one shape can run as one batch.

    Attributes:
        model: The model's name.
        width: Pixels.
        height: Pixels.
        frames: Frames; one is a picture, more are a clip.
    """

    model: str
    width: int
    height: int
    frames: int = 1
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        object.__setattr__(self, "_hash", hash((crc32(self.model.encode()), self.width, self.height, self.frames)))

    def __hash__(self) -> int:
        return self._hash  # costs are looked up by shape, often; the same in every process

    @property
    def kind(self) -> Kind:
        """The class of its requests."""
        return "clip" if self.frames > 1 else "picture"

    def __str__(self) -> str:
        return f"{self.model} {self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        id: Its name, of which there is one.
        shape: Model and size.
        steps: Denoising steps in all.
        arrival: When it came, in seconds on the caller's clock.
        deadline: When it should be done, on the same clock; infinity where nobody cares.
        weight: What meeting the deadline is worth beside other requests; 2 counts for two.
    """

    id: str
    shape: Shape
    steps: int
    arrival: float
    deadline: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"request {self.id}: steps={self.steps} must be 1 or more")
        if not self.weight > 0:
            raise ValueError(f"request {self.id}: weight={self.weight} must be above 0")

    @property
    def kind(self) -> Kind:
        """Picture or clip."""
        return self.shape.kind


@dataclass(frozen=True)
class Job:
    """A request as it stands now.

    Jobs that run on the same devices are one batch.

    Attributes:
        request: The request.
        remaining: Steps not yet begun. 0 of a running job: its last step or its decoding is under way.
        status: Whether it has never run, runs, or was paused after a step.
        devices: Where it runs, or where a paused one ran last.
        boundary: When the step under way ends and its devices could be had, on the caller's clock. Of a running job
            only; of one that is ending, when all is done.
    """

    request: Request
    remaining: int
    status: Status = "waiting"
    devices: tuple[int, ...] = ()
    boundary: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.remaining <= self.request.steps:
            raise ValueError(f"request {self.request.id}: {self.remaining} steps remain of {self.request.steps}")
        if self.status == "running" and not self.devices:
            raise ValueError(f"request {self.request.id} runs on no device")

    @property
    def id(self) -> str:
        """The request's name."""
        return self.request.id

    @property
    def degree(self) -> int:
        """Devices it runs on: 0 unless it runs."""
        return len(self.devices) if self.status == "running" else 0

    @property
    def ending(self) -> bool:
        """Whether it needs no more steps, so that nothing is to be decided about it."""
        return self.status == "running" and self.remaining == 0


@dataclass(frozen=True)
class State:
    """Everything the scheduler decides by.

    Attributes:
        now: Seconds on the caller's clock.
        devices: The devices there are, dead ones left out.
        jobs: All requests that are not done.
    """

    now: float
    devices: tuple[int, ...]
    jobs: tuple[Job, ...]

    def __post_init__(self) -> None:
        known = set(self.devices)
        if len(known) != len(self.devices):
            raise ValueError(f"devices {self.devices} name one twice")
        if len({job.id for job in self.jobs}) != len(self.jobs):
            raise ValueError("two jobs have the same request id")
        for job in self.jobs:
            if job.status == "running" and not known.issuperset(job.devices):
                raise ValueError(f"request {job.id} runs on {job.devices}, which are not all among the devices")

    @cached_property
    def running(self) -> dict[tuple[int, ...], tuple[Job, ...]]:
        """The batches that run, by their devices."""
        found: dict[tuple[int, ...], list[Job]] = {}
        for job in self.jobs:
            if job.status == "running":
                found.setdefault(job.devices, []).append(job)
        return {devices: tuple(jobs) for devices, jobs in found.items()}


@dataclass(frozen=True)
class Run:
    """Requests of one shape that should run as a batch on these devices.

    Attributes:
        requests: Their ids; several only in a batch.
        devices: The devices, as many as the degree.
    """

    requests: tuple[str, ...]
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Decisions:
    """What should run where, from each batch's next step boundary on.

    A run that is under way on the same devices goes on undisturbed. Everything else that runs stops at its next
    boundary; a run starts as soon as its devices are free, with the steps its requests have left.

    Attributes:
        runs: What should run, the most urgent first.
    """

    runs: tuple[Run, ...]

    def stopped(self, state: State) -> tuple[tuple[int, ...], ...]:
        """Devices of the batches that must stop at their next boundary, because no run is theirs."""
        kept = {(frozenset(run.requests), run.devices) for run in self.runs}
        return tuple(
            devices
            for devices, jobs in state.running.items()
            if (frozenset(job.id for job in jobs), devices) not in kept
        )

    def paused(self, state: State) -> tuple[str, ...]:
        """Requests that run now and should not run at all for a while."""
        named = {request for run in self.runs for request in run.requests}
        return tuple(job.id for job in state.jobs if job.status == "running" and job.id not in named)
