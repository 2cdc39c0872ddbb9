"""What the service and its replicas tell each other. All of it is data that travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from patchpipe.scheduling import Shape
from patchpipe.serve.models import Loading, Named
from patchpipe.serve.settings import Settings
from patchpipe.serve.steer.costs import Machine
from patchpipe.serve.work.model import Facts
from patchpipe.serve.work.tickets import Event


@dataclass(frozen=True)
class Spec:
    """What a replica is to be.

    Attributes:
        version: The service's version, which must be the replica's.
        named: The models.
        loading: How they are loaded.
        edits: Whether to load what paints from pictures too.
        settings: Policy, LoRAs and pictures in flight.
    """

    version: str
    named: tuple[Named, ...]
    loading: Loading
    edits: bool
    settings: Settings


def theirs(settings: Settings) -> Settings:
    """The settings that replicas have to know; the API's keys and the database are not among them."""
    return Settings(
        lora_folder=settings.lora_folder,
        in_flight=settings.in_flight,
        policy=settings.policy,
        deadline_scale=settings.deadline_scale,
    )


@dataclass(frozen=True)
class Introduced:
    """One of a replica's models.

    Attributes:
        public: What clients call it.
        source: Its folder or hub id.
        for_edits: Whether it only paints from pictures.
        facts: What it takes and gives.
    """

    public: str
    source: str
    for_edits: bool
    facts: Facts


@dataclass(frozen=True)
class Begun:
    """A replica that can paint.

    Attributes:
        pid: Its process.
        models: Its models by name.
        machine: What it has to share.
    """

    pid: int
    models: Mapping[str, Introduced]
    machine: Machine


@dataclass(frozen=True)
class Price:
    """What requests of a shape take there.

    Attributes:
        steps: Seconds of a step by the number of devices.
        ends: Seconds beside the steps.
    """

    steps: Mapping[int, float]
    ends: float


@dataclass(frozen=True)
class Place:
    """Where a request is in a replica; see ``Seen``."""

    state: Literal["waiting", "running", "paused"]
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Health:
    """How a model is.

    Attributes:
        cause: Why it cannot paint; ``None`` where it can.
        restarts: How often it was started again.
    """

    cause: str | None
    restarts: int


@dataclass(frozen=True)
class Figure:
    """A figure of ``Metrics`` that has grown.

    Attributes:
        name: Its name there.
        labels: Its labels.
        how: ``inc`` or ``observe``.
        value: By how much.
    """

    name: str
    labels: tuple[str, ...]
    how: str
    value: float


@dataclass(frozen=True)
class Told:
    """What has happened in a replica since it was last asked.

    Attributes:
        events: By request, in order. A picture that is ``Painted`` is left out, and fetched by itself.
        places: Where each request is.
        healths: How each model is.
        figures: What to count.
        prices: Of each shape that was priced or measured anew.
    """

    events: tuple[tuple[str, Event], ...]
    places: Mapping[str, Place]
    healths: Mapping[str, Health]
    figures: tuple[Figure, ...]
    prices: Mapping[Shape, Price]


class Actor:
    """What the service asks of a replica; ``cluster`` carries it to another process, and ``Replica`` does it."""

    def start(self) -> Begun:
        """Loads the models."""
        raise NotImplementedError

    def price(self, shapes: tuple[Shape, ...]) -> dict[Shape, Price]:
        """What requests of some shapes take."""
        raise NotImplementedError

    def submit(self, key: str, work: Any) -> None:
        """Takes a request."""

    def cancel(self, key: str) -> None:
        """Ends one, at its next step."""

    def poll(self, seconds: float) -> Told:
        """What has happened; waits so long where nothing has."""
        raise NotImplementedError

    def fetch(self, key: str) -> tuple[Any, ...]:
        """The pictures of a request that is painted."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the models."""
