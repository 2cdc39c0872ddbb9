"""The fleet's queue: requests wait here, go to replicas by their deadlines, and come back when a replica is lost."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import monotonic

from patchpipe.scheduling import Admission, Group, Job, Request, Shape, State, Waiting, alone, dispatch
from patchpipe.scheduling.policies.view import View
from patchpipe.serve.fleet.cluster import Lost
from patchpipe.serve.fleet.prices import Prices
from patchpipe.serve.fleet.slot import Slot
from patchpipe.serve.fleet.words import Begun, Place, Told
from patchpipe.serve.refusals import Refusal, cancelled, shutting_down
from patchpipe.serve.settings import Settings
from patchpipe.serve.steer.conductor import FIRST_GUESS
from patchpipe.serve.steer.outcomes import MOST_ATTEMPTS
from patchpipe.serve.steer.parts import MOST_PRIORITY, USUAL_STEPS
from patchpipe.serve.steer.shapes import bare, shape_of, stays
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.teller import Teller
from patchpipe.serve.work.tickets import Ended, Event, Painted, Partial, Seen, Started, Stepped, Ticket

logger = logging.getLogger("patchpipe.serve")

PRICE_SECONDS = 10.0  # for a replica to say what a request takes
HERE, SENT = Place("waiting", ()), Place("waiting", ())
HOLDING = ("srtf", "edf", "genserve", "balanced")  # policies that hold clips for others
GIVEN_BACK = ("model_down", "shutting_down")  # another replica may paint it


@dataclass(eq=False)
class Record:
    """A request, and which replica has it.

    Attributes:
        ticket: The request.
        request: The same as the scheduler knows it.
        slot: The replica; ``None`` while it waits here.
        place: Where it is in the replica.
        step: Steps over, there.
        begun: Whether the replica has begun it.
    """

    ticket: Ticket
    request: Request
    slot: Slot | None = None
    place: Place = HERE
    step: int = 0
    begun: bool = False

    def come_back(self) -> None:
        """Its replica does not have it any more."""
        self.slot, self.place, self.step, self.begun = None, HERE, 0, False


@dataclass(frozen=True)
class Up:
    """A replica that can paint."""

    slot: Slot
    begun: Begun
    prices: Prices


class Dispatcher:
    """Takes requests for a fleet; see ``Conducting``. Any thread may use it.

    Args:
        settings: What the operator decided.
        models: The models by the service's name; filled by the fleet.
    """

    def __init__(self, settings: Settings, models: Mapping[str, Model]) -> None:
        self._settings, self._models = settings, models
        self._admission = Admission() if settings.admission else None
        self._records: dict[str, Record] = {}
        self._numbers = itertools.count(1)
        self._up: dict[int, Up] = {}
        self._known: Up | None = None  # the last that came up: what requests take is asked of it
        self._changed = threading.Condition(threading.RLock())
        self._closed = self._draining = False
        self._usual = FIRST_GUESS
        self._teller = Teller()

    # -- what the service asks of it ---------------------------------------------------------------

    def add(self, ticket: Ticket, *, accepted: bool = False) -> None:
        """Takes a request.

        Raises:
            Refusal: Too many wait, the service is about to end, or it cannot be in time.
        """
        request = self._request(ticket)
        with self._changed:
            if self._closed:
                raise shutting_down()
            if not accepted:
                self.check_room()
                self._admit(request)
            self._records[request.id] = Record(ticket, request)
        self.look()

    def check(self, ticket: Ticket) -> None:
        """Refuses a request that would be late, where the service turns such away.

        Raises:
            Refusal: It would.
        """
        request = self._request(ticket)
        with self._changed:
            self._admit(request)

    def check_room(self) -> None:
        """Makes sure that one more may wait.

        Raises:
            Refusal: Too many do.
        """
        limit = self._settings.limits.waiting
        if sum(one.state == "waiting" for one in self.snapshot()) >= limit:
            message = f"{limit} requests wait already, and no more may: try again later"
            raise Refusal(429, message, code="queue_full", retry_after=self._usual * 2)

    def withdraw(self, ticket: Ticket) -> None:
        """Ends a request: at once where it waits here, at its next step where a replica has it."""
        ticket.withdraw()
        with self._changed:
            for record in [one for one in self._records.values() if one.ticket is ticket]:
                if record.slot is None:
                    self._end(record, cancelled())
                else:
                    record.slot.tell("cancel", record.request.id)

    def refuse_pictures(self, model: str, refusal: Refusal) -> None:
        """Ends the pictures that wait here for a model."""
        with self._changed:
            for record in list(self._records.values()):
                work = record.ticket.work
                if record.slot is None and (work.model, work.kind) == (model, "picture"):
                    self._end(record, refusal)

    def look(self) -> None:
        """Sends what can be sent."""
        with self._changed:
            try:
                self._dispatch()
            except Exception:  # a request must not be lost because a decision failed
                logger.exception("dispatching failed")
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Sends no clip any more, and waits until no picture is left; whether it came to that."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(self._only_clips, seconds)

    def close(self) -> list[Ticket]:
        """Sends nothing more, and ends all there is; gives the requests that were left."""
        with self._changed:
            self._closed = True
            left = list(self._records.values())
            for record in left:
                if record.slot is not None:
                    record.slot.tell("cancel", record.request.id)
                self._end(record, shutting_down())
        self._teller.close()
        return [record.ticket for record in left]

    def snapshot(self) -> list[Seen]:
        """The requests there are, in the order of their arrival; devices are those of all replicas that are up."""
        with self._changed:
            first, offsets = 0, {}
            for number, up in sorted(self._up.items()):
                offsets[number] = first
                first += up.begun.machine.devices
            return [_seen(record, offsets) for record in self._records.values()]

    def counts(self, slot: Slot) -> dict[str, int]:
        """How many requests a replica has, by their state."""
        with self._changed:
            states = [record.place.state for record in self._records.values() if record.slot is slot]
        return {state: states.count(state) for state in ("running", "paused", "waiting")}

    def ups(self) -> list[Up]:
        """The replicas that are up, by number."""
        with self._changed:
            return [up for _, up in sorted(self._up.items())]

    # -- what becomes of replicas --------------------------------------------------------------------

    def is_up(self, slot: Slot, begun: Begun) -> None:
        """A replica can paint."""
        up = Up(slot, begun, Prices(begun.machine))
        with self._changed:
            shapes = tuple({bare(record.request.shape) for record in self._records.values()})
            before, self._known, self._up[slot.number] = self._known, up, up
        if before is not None:  # what it tells itself comes with its news
            known = ((shape, before.prices.told(shape)) for shape in shapes)
            up.prices.take({shape: price for shape, price in known if price is not None})
            slot.tell("price", shapes)
        self.look()

    def has_told(self, slot: Slot, told: Told) -> None:
        """A replica has news."""
        with self._changed:
            up = self._up.get(slot.number)
            if up is None or up.slot is not slot:
                return
            up.prices.take(told.prices)
            for key, event in told.events:
                record = self._records.get(key)
                if record is not None and record.slot is slot:
                    self._take(record, event)
            for key, place in told.places.items():
                if key in self._records and self._records[key].slot is slot:
                    self._records[key].place = place
            if any(not isinstance(event, (Stepped, Partial)) for _, event in told.events):
                self.look()

    def has_painted(self, slot: Slot, key: str, painted: Painted) -> None:
        """A request's pictures are here."""
        with self._changed:
            record = self._records.get(key)
            if record is None or record.slot is not slot:
                return
            ticket = record.ticket
            ticket.seconds += painted.seconds
            self._usual += 0.2 * (painted.seconds - self._usual)
            if ticket.cancelled:
                self._end(record, cancelled())
            else:
                del self._records[key]
                self._teller.tell(ticket, Painted(painted.outputs, ticket.seconds))
            self.look()

    def is_lost(self, slot: Slot, cause: str) -> None:
        """A replica is gone: what it had begins anew elsewhere, or fails where that has been tried."""
        with self._changed:
            self._up.pop(slot.number, None)
            for record in [one for one in self._records.values() if one.slot is slot]:
                if record.ticket.cancelled:
                    self._end(record, cancelled())
                elif record.begun and record.ticket.attempts >= MOST_ATTEMPTS:
                    self._end(record, Refusal(503, cause, code="worker_lost", retry_after=10))
                else:
                    record.come_back()
            self.look()

    # -- under its lock ----------------------------------------------------------------------------

    def _dispatch(self) -> None:
        waiting = [record for record in self._records.values() if record.slot is None and self._may_go(record)]
        if self._closed or not waiting:
            return
        wanted = [Waiting(record.request, record.ticket.work.model) for record in waiting]
        for request, number in dispatch(monotonic(), [self._group(up) for up in self._up.values()], wanted):
            self._send(self._records[request.id], self._up[number].slot)

    def _may_go(self, record: Record) -> bool:
        return not (self._draining and record.ticket.work.kind == "clip")

    def _group(self, up: Up) -> Group:
        records = [record for record in self._records.values() if record.slot is up.slot]
        staying = frozenset(record.request.id for record in records if self._stays(record))
        usable = frozenset(name for name, health in up.slot.healths.items() if health.cause is None)
        return Group(
            up.slot.number,
            up.begun.machine.devices,
            up.prices,
            tuple(_job(record) for record in records),
            staying,
            usable,
        )

    def _stays(self, record: Record) -> bool:
        """Whether it is on its devices to its end; what was just sent is, until the replica tells that it waits."""
        work = record.ticket.work
        held = self._settings.policy in HOLDING and work.kind == "clip"
        waits = record.place.state == "waiting" and record.place is not SENT
        return not waits and not (held and not any(stays(work, self._models[work.model].facts)))

    def _send(self, record: Record, slot: Slot) -> None:
        ticket = record.ticket
        left = None if math.isinf(ticket.due) else max(0.001, ticket.due - monotonic())
        record.slot, record.place = slot, SENT
        try:
            slot.tell("submit", record.request.id, replace(ticket.work, deadline_s=left))
        except Exception as error:
            logger.exception("a request could not be sent")
            message = f"the request could not be sent to {slot.name}: {type(error).__name__}: {error}"
            self._end(record, Refusal(500, message, code="internal_error"))

    def _take(self, record: Record, event: Event) -> None:
        ticket = record.ticket
        if isinstance(event, Started):
            record.begun, ticket.attempts = True, ticket.attempts + 1
            ticket.started = ticket.started or monotonic()
            self._teller.tell(ticket, event)
        elif isinstance(event, Stepped):
            record.step, ticket.step = event.step, max(ticket.step, event.step)
            self._teller.tell(ticket, Stepped(ticket.step, event.total))
        elif isinstance(event, Partial):
            self._teller.tell(ticket, event)
        elif isinstance(event, Ended):
            if event.refusal.code in GIVEN_BACK and not ticket.cancelled:
                record.come_back()
            else:
                self._end(record, cancelled() if ticket.cancelled else event.refusal)

    def _end(self, record: Record, refusal: Refusal) -> None:
        if self._records.pop(record.request.id, None) is not None:
            self._teller.tell(record.ticket, Ended(refusal))
        self._changed.notify_all()

    def _only_clips(self) -> bool:
        return all(record.ticket.work.kind == "clip" for record in self._records.values())

    def _admit(self, request: Request) -> None:
        """Turns a request away that cannot be in time even on all replicas together, where the service does so.

        Raises:
            Refusal: It cannot.
        """
        if self._admission is None or not self._up:
            return
        devices = sum(up.begun.machine.devices for up in self._up.values())
        jobs = tuple(_job(record) for record in self._records.values())
        prices = next(iter(self._up.values())).prices
        reason = self._admission.refusal(View(State(monotonic(), tuple(range(devices)), jobs), prices), request)
        if reason is not None:
            message = f"this would be late, and late requests are turned away here: {reason}"
            raise Refusal(429, message, code="deadline_cannot_be_met", param="deadline_s", retry_after=self._usual)

    # -- outside its lock --------------------------------------------------------------------------

    def _request(self, ticket: Ticket) -> Request:
        """The request as the scheduler knows it, with a deadline if it named none; may have to ask a replica."""
        work, facts = ticket.work, self._models[ticket.work.model].facts
        shape = shape_of(work, facts, alone=any(stays(work, facts)))
        prices, devices = self.priced(shape)
        steps = work.steps or USUAL_STEPS
        if work.deadline_s is None and prices is not None:
            seconds = len(work.seeds) * alone(prices, shape, steps, devices)
            ticket.due = ticket.arrived + self._settings.deadline_scale * seconds
        key = f"{next(self._numbers)} {work.id}"
        weight = 2.0 ** max(-MOST_PRIORITY, min(MOST_PRIORITY, work.priority))
        return Request(key, shape, max(1, steps * len(work.seeds)), ticket.arrived, ticket.due, weight)

    def priced(self, shape: Shape) -> tuple[Prices | None, int]:
        """What requests of a shape take, and the devices of the replica that says so."""
        known, shape = self._known, bare(shape)
        if known is None:
            return None, 0
        if known.prices.told(shape) is None:
            try:
                told = known.slot.ask("price", (shape,), seconds=PRICE_SECONDS)
            except Lost:
                return known.prices, known.begun.machine.devices
            for up in self.ups():  # they may know better, and will tell
                up.prices.take(told)
                if up is not known:
                    up.slot.tell("price", (shape,))
        return known.prices, known.begun.machine.devices


def _job(record: Record) -> Job:
    return Job(record.request, max(1, record.request.steps - record.step))


def _seen(record: Record, offsets: Mapping[int, int]) -> Seen:
    first = offsets.get(record.slot.number, 0) if record.slot is not None else 0
    return Seen(record.ticket, record.place.state, tuple(first + device for device in record.place.devices))
