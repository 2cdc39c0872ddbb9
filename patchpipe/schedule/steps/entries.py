"""A request of a stream: as it comes, as it flies, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from patchpipe.schedule.request import Request
from patchpipe.schedule.steps.following import Steps
from patchpipe.schedule.steps.orders import Order
from patchpipe.schedule.steps.saved import Saved
from patchpipe.schedule.steps.verbs import Keys
from patchpipe.schedule.surroundings import Draws
from patchpipe.tracing.recorder import Where


@dataclass(frozen=True)
class Entry:
    """A request that joins, the same on all ranks.

    Attributes:
        paint: Runs the pipeline; its scheduler and its texts are shown to what it is given.
        about: What the pipeline is called with, in short.
        pipeline: Its class.
        may_be_saved: Raises ``ValueError`` where requests of that class cannot be carried elsewhere.
        seed: Of the default generators.
        generators: What the call is given.
        saved: What it goes on from; ``None`` begins anew.
    """

    paint: Callable[[Steps], Any]
    about: Mapping[str, Sequence[str]]
    pipeline: str
    may_be_saved: Callable[[], None]
    seed: int
    generators: Sequence[torch.Generator] = ()
    saved: Saved | None = None


@dataclass(frozen=True)
class Told:
    """What has become of a request, as one rank sees it.

    Attributes:
        number: The request's.
        what: ``"running"``, ``"held"``, ``"saved"``, ``"not saved"``, ``"done"``, ``"withdrawn"`` or ``"refused"``.
        step: Steps that are over.
        output: What the pipeline gave on the output rank.
        stats: What it was like.
        saved: Its state, where it was saved.
        error: Why it was refused, or cannot be saved.
    """

    number: int
    what: str
    step: int = 0
    output: Any = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    saved: Saved | None = None
    error: Exception | None = None


class Source(Protocol):
    """Where a stream's requests come from, and who hears of them."""

    def orders(self, seconds: float) -> list[Order]:
        """The next orders, on rank 0; waits for them so long."""
        raise NotImplementedError

    def entry(self, number: int) -> Entry:
        """A request that is to join, on every rank; raises ``RankLost`` where it does not come in time."""
        raise NotImplementedError

    def tell(self, told: Told) -> None:
        """Hears what has become of a request, on every rank."""
        raise NotImplementedError


class Withdrawn(BaseException):
    """Ends one request's thread: it was withdrawn, or carried away."""


@dataclass
class Flight:
    """One of the requests.

    Attributes:
        number: Its number.
        entry: What it is.
        steps: Its steps.
        draws: Its default generators.
        request: What it keeps, once it has begun.
        where: The part of its denoising loop it is in, where it is traced.
        prepared: Whether all ranks have found that it can be painted.
        wish: What is to become of it at its next step.
        held: Where its keys and values are, if it is held.
        waking: Why it will not be held any more, when its turn comes.
        saved: Its state, if it was carried away.
    """

    number: int
    entry: Entry
    steps: Steps
    draws: Draws
    request: Request | None = None
    where: Where | None = None
    prepared: bool = False
    wish: Order | None = None
    held: Keys | None = None
    waking: Order | None = None
    saved: Saved | None = None
