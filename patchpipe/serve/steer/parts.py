"""One picture or clip on its way: how far it is, where it runs, and how the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from patchpipe.scheduling import Costs, Job, Request, Shape, Status
from patchpipe.serve.work.tickets import Ticket

if TYPE_CHECKING:
    from patchpipe.engine import Checkpoint

Stage = Literal["waiting", "running", "paused", "saved", "over"]
Came = Literal["began", "resume", "change"]
USUAL_STEPS = 20  # where nobody has said, until its pipeline does
MOST_PRIORITY = 10
_STATUS: dict[Stage, Status] = {"waiting": "waiting", "running": "running", "paused": "paused", "saved": "paused"}


class Running(Protocol):
    """A part's run in an engine, as far as it can be asked for anything."""

    def pause(self) -> None:
        """Holds it when the step under way is over."""

    def resume(self) -> None:
        """Lets it go on, or takes a pause back."""

    def cancel(self) -> None:
        """Ends it when the step under way is over."""

    def save(self) -> None:
        """Ends it when the step under way is over, and keeps its state."""


class Part:
    """One picture of a request, or its clip: what the scheduler decides about.

    Args:
        ticket: The request.
        number: Which of its seeds.
        shape: What its steps cost depends on.
        pinned: Once begun it runs to its end where it is.
        whole: Likewise, and it has its engine to itself.

    Attributes:
        id: Its name.
        ticket: The request.
        number: Which of its seeds.
        shape: See ``Shape``.
        pinned: Once begun it runs to its end where it is.
        whole: Likewise, and it has its engine to itself.
        stage: Where it is on its way. One that was saved has its state in ``kept``, and is on no device.
        devices: Where it runs, or ran last.
        asked: What the engine was asked to do with it and has not done yet.
        run: Its run in an engine.
        kept: What it goes on from.
        done: Steps over.
        total: Steps in all, as far as known.
        stepped: When its last step ended, or it began or went on, or was asked to be saved while it was held.
        since: When it last came on its devices.
        begun: How often it was begun.
        steady: Whether the step under way began with the end of another, so that its seconds are those of a step.
        came: How it came on its devices: begun, or gone on with there or elsewhere.
        fresh: Whether no step has ended since.
        first: Seconds from then to the end of its first step there, until the next one is over too.
        saving: Seconds it took to save it when it was carried last.
    """

    def __init__(self, ticket: Ticket, number: int, shape: Shape, *, pinned: bool, whole: bool) -> None:
        self.id, self.ticket, self.number, self.shape = f"{ticket.work.id}/{number}", ticket, number, shape
        self.pinned, self.whole = pinned or whole, whole
        self.stage: Stage = "waiting"
        self.devices: tuple[int, ...] = ()
        self.asked: Literal["pause", "save", "cancel"] | None = None
        self.run: Running | None = None
        self.kept: Checkpoint | None = None
        self.done, self.total = 0, ticket.work.steps or USUAL_STEPS
        self.stepped = self.since = 0.0
        self.begun, self.steady = 0, False
        self.came: Came = "began"
        self.fresh, self.saving = False, 0.0
        self.first: float | None = None

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.ticket.work.seeds[self.number]

    @property
    def model(self) -> str:
        """The service's name for its model."""
        return self.ticket.work.model

    @property
    def idle(self) -> bool:
        """Whether it could be started."""
        return self.stage in ("waiting", "paused", "saved")

    @property
    def ends_here(self) -> bool:
        """Whether what runs of it runs to its end, so that nothing is to be decided about it."""
        return self.pinned or self.asked == "cancel" or self.done + 1 >= self.total

    def anew(self) -> None:
        """It has lost what was done of it."""
        self.stage, self.asked, self.run, self.kept, self.done = "waiting", None, None, None, 0
        self.devices, self.steady = (), False

    def request(self) -> Request:
        """The request as the scheduler knows it."""
        ticket = self.ticket
        weight = 2.0 ** max(-MOST_PRIORITY, min(MOST_PRIORITY, ticket.work.priority))
        return Request(self.id, self.shape, max(self.total, self.done, 1), ticket.arrived, ticket.due, weight)

    def lead(self, costs: Costs) -> float:
        """Seconds by which its first step since it came is longer than a step."""
        if self.came == "began":
            return costs.starts(self.shape)
        return costs.switch(self.shape, 0 if self.came == "resume" else 1, 1, moved=True)

    def job(self, now: float, costs: Costs, batch: Sequence[Part]) -> Job:
        """How it stands.

        Args:
            now: The time.
            costs: What steps take.
            batch: All parts that run where it runs, itself among them.
        """
        request = self.request()
        if self.stage != "running":
            left = max(1, request.steps - self.done)
            return Job(request, left, _STATUS[self.stage], self.devices)
        slowest = min(batch, key=lambda one: one.done - one.total)
        begun = min(slowest.done + 1, slowest.total)
        remaining = min(request.steps, slowest.total - begun)
        step = costs.step(self.shape, len(batch), len(self.devices))
        boundary = slowest.since + slowest.lead(costs) if slowest.fresh else slowest.stepped
        boundary += step if slowest.done < slowest.total else 0.0
        if any(one.ends_here for one in batch):
            boundary, remaining = boundary + remaining * step, 0
        if not remaining:
            boundary += costs.ends(self.shape, len(batch))
        return Job(request, remaining, "running", self.devices, max(now, boundary))
