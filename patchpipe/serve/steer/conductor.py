"""The one thread in which news of what runs, decisions, and what is done about them meet."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from time import monotonic

from patchpipe.serve.metrics import Metrics
from patchpipe.serve.refusals import Refusal, cancelled, shutting_down
from patchpipe.serve.steer.deciding import Decider, batch_of, batches
from patchpipe.serve.steer.outcomes import MOST_ATTEMPTS, outcome_of
from patchpipe.serve.steer.parts import Part
from patchpipe.serve.steer.runs import Hand, News
from patchpipe.serve.steer.shapes import shape_of, stays
from patchpipe.serve.steer.stands import Stands
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.teller import Teller
from patchpipe.serve.work.tickets import Ended, Painted, Seen, Stepped, Ticket

logger = logging.getLogger("patchpipe.serve")

BEAT = 1.0  # seconds after which it looks even where nothing has happened
REVIEW_STEPS, SHORTEST_REVIEW = 5, 0.25  # between decisions: steps of the clip with the shortest, and seconds
FIRST_GUESS = 10.0  # seconds a request takes, before any has been seen


class Conductor:
    """Takes requests, has the policy decide, and has engines do what it decided.

    Args:
        models: The models by the service's name.
        decider: Decides.
        hands: Who calls each model's engine.
        metrics: The service's figures.
        limit: Requests that may wait.
    """

    def __init__(
        self, models: Mapping[str, Model], decider: Decider, hands: Mapping[str, Hand], metrics: Metrics, limit: int
    ) -> None:
        self._models, self._decider, self._metrics, self.limit = models, decider, metrics, limit
        self._teller = Teller()
        self._tell = self._teller.tell
        self._stands = Stands(models, hands, decider.machine, self._post, self._tell, metrics)
        self._parts: list[Part] = []
        self._why: dict[Ticket, Refusal] = {}  # what ends requests of which some still runs
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        self._changed = threading.Condition(threading.RLock())
        self._closed = self._draining = False
        self._usual, self._review = FIRST_GUESS, 0.0
        threading.Thread(target=self._conduct, name="conductor", daemon=True).start()

    # -- what others ask of it, from any thread ----------------------------------------------------

    def add(self, ticket: Ticket, *, accepted: bool = False) -> None:
        """Takes a request.

        Args:
            ticket: The request.
            accepted: It was accepted before, and so is never refused.

        Raises:
            Refusal: Too many wait, the service is about to end, or it cannot be in time.
        """
        parts = self._parts_of(ticket)
        with self._changed:
            if self._closed:
                raise shutting_down()
            if not accepted:
                self.check_room()
                self._admit(parts[0])
            self._parts += parts
        self.look()

    def check(self, ticket: Ticket) -> None:
        """Makes sure that a request would not be turned away because it would be late.

        Raises:
            Refusal: It would.
        """
        parts = self._parts_of(ticket)
        with self._changed:
            self._admit(parts[0])

    def check_room(self) -> None:
        """Makes sure that one more may wait.

        Raises:
            Refusal: Too many do.
        """
        if sum(one.state == "waiting" for one in self.snapshot()) >= self.limit:
            message = f"{self.limit} requests wait already, and no more may: try again later"
            raise Refusal(429, message, code="queue_full", retry_after=self._usual * 2)

    def withdraw(self, ticket: Ticket) -> None:
        """Ends a request: at once where it waits, when the step under way is over where it runs."""
        ticket.withdraw()
        with self._changed:
            self._end(ticket, cancelled())
        self.look()

    def refuse_pictures(self, model: str, refusal: Refusal) -> None:
        """Ends the pictures that wait for a model: somebody is at the other end of a connection; a clip can wait."""
        with self._changed:
            for one in self.snapshot():
                if (one.ticket.work.model, one.ticket.work.kind, one.state) == (model, "picture", "waiting"):
                    self._end(one.ticket, refusal)

    def look(self) -> None:
        """Decides anew: something has changed."""
        self._review = 0.0
        self._news.put(None)

    def drain(self, seconds: float) -> bool:
        """Begins no clip any more, and waits until no picture is left; whether it came to that."""
        with self._changed:
            self._draining = True
            self.look()
            return self._changed.wait_for(lambda: all(one.ticket.work.kind == "clip" for one in self._parts), seconds)

    def close(self) -> list[Ticket]:
        """Starts nothing more, and ends all there is; gives the requests that were left."""
        with self._changed:
            self._closed = True
            left = list(dict.fromkeys(part.ticket for part in self._parts))
            for ticket in left:
                self._end(ticket, shutting_down())
        self._news.put(None)
        return left

    def snapshot(self) -> list[Seen]:
        """The requests there are, in the order of their arrival."""
        with self._changed:
            found: dict[Ticket, list[Part]] = {}
            for part in self._parts:
                found.setdefault(part.ticket, []).append(part)
        return [_seen(ticket, parts) for ticket, parts in found.items()]

    # -- its thread --------------------------------------------------------------------------------

    def _post(self, news: News) -> None:
        self._news.put(news)

    def _conduct(self) -> None:
        while not (self._closed and not self._parts):
            try:
                news = self._next()
                with self._changed:
                    self._stands.account(self._parts)
                    while news is not None:
                        self._take(news)
                        news = None if self._news.empty() else self._news.get()
                    self._refuse_late()
                    self._decide()
                    self._changed.notify_all()
            except Exception:  # it must never end while a request is left
                logger.exception("the conductor stumbled")
        self._teller.close()

    def _next(self) -> News | None:
        wait = min(BEAT, max(0.0, self._review - monotonic()))
        try:
            return self._news.get(timeout=wait)
        except queue.Empty:
            return None

    def _decide(self) -> None:
        now = monotonic()
        if self._closed:
            return
        if now < self._review:
            self._stands.start(self._parts)
            return
        known = [part for part in self._parts if part.stage == "running" or self._may_run(part)]
        if known:
            self._stands.follow(self._decider.decide(now, known), self._parts)
            self._stands.start(self._parts)
        self._review = now + self._until_review()

    def _refuse_late(self) -> None:
        """Tells pictures that wait and can be in time no more, where the service turns such away."""
        now, pictures = monotonic(), [part for part in self._parts if part.ticket.work.kind == "picture"]
        hopeless = {part.ticket for part in pictures if self._decider.hopeless(now, part)}
        waiting = [one.ticket for one in self.snapshot() if one.state == "waiting"] if hopeless else []
        for ticket in waiting:
            if ticket in hopeless:
                message = "this would be late by now, and late requests are turned away here"
                late = Refusal(429, message, code="deadline_missed", param="deadline_s", retry_after=self._usual)
                self._end(ticket, late)

    def _may_run(self, part: Part) -> bool:
        return self._models[part.model].usable and not (self._draining and part.ticket.work.kind == "clip")

    def _until_review(self) -> float:
        """Seconds until it decides although nothing has come or gone."""
        running = [batch for batch in batches(self._parts) if batch[0].shape.kind == "clip"]
        if not running or not self._decider.policy.reviews:
            return 3600.0 if not any(part.idle for part in self._parts) else 10 * BEAT
        steps = [self._decider.costs.step(batch[0].shape, 1, len(batch[0].devices)) for batch in running]
        return max(SHORTEST_REVIEW, REVIEW_STEPS * min(steps))

    # -- news --------------------------------------------------------------------------------------

    def _take(self, news: News) -> None:
        part = news.part
        if part.run is not news.run or part.stage == "over":
            return
        try:
            {
                "stepped": self._on_step,
                "going": self._on_going,
                "paused": self._on_paused,
                "saved": self._on_saved,
                "not saved": self._on_not_saved,
                "done": self._on_done,
                "failed": self._on_failed,
            }[news.what](part, news)
        except Exception as error:  # a request must never be left without an answer
            logger.exception("a request could not be followed")
            self._settle(part, Refusal(500, f"the service failed: {type(error).__name__}", code="internal_error"))

    def _on_going(self, part: Part, news: News) -> None:
        if part.stage == "paused" and part.asked is None:
            part.asked = "pause"  # it was held for a pause that had been taken back; that for the last one comes yet
        part.stage, part.stepped, part.steady = "running", news.when, False

    def _on_step(self, part: Part, news: News) -> None:
        if news.total is not None:
            part.total = news.total
        if part.stage == "running":
            self._measure(part, news.when)
        part.done, part.stepped, part.steady = news.step, news.when, True
        ticket = part.ticket
        done = part.total * len(ticket.outputs) + sum(one.done for one in self._parts if one.ticket is ticket)
        ticket.step = max(ticket.step, done)
        if news.total is not None:
            self._tell(ticket, Stepped(ticket.step, news.total * len(ticket.work.seeds)))

    def _measure(self, part: Part, now: float) -> None:
        """Learns from a step that is over: of the first after it came, by how much it was longer than the second."""
        if part.fresh:
            part.fresh, part.first = False, now - part.since
        if not part.steady:
            return
        costs, seconds = self._decider.costs, max(1e-6, now - part.stepped)
        costs.measured(part.shape, len(batch_of(part, self._parts)), len(part.devices), seconds)
        self._metrics.step.labels(part.model).observe(seconds)
        if part.first is not None:
            longer, part.first = part.first - seconds, None
            if part.came == "began":
                costs.started(part.shape, longer)
            else:
                costs.switched(part.shape, part.came, longer + (part.saving if part.came == "change" else 0.0))

    def _on_paused(self, part: Part, news: News) -> None:
        if part.asked != "pause":
            return  # it was taken back, and goes on
        if not part.fresh:
            self._decider.costs.switched(part.shape, "pause", news.when - part.stepped)
        part.stage, part.asked, part.steady = "paused", None, False
        self._left(part, news.when)
        self._stands.left(part)
        if not any(one.stage == "running" for one in self._parts):
            self._review = 0.0  # or it would stay held until something else happens, and nothing may

    def _on_saved(self, part: Part, news: News) -> None:
        was, part.saving = part.stage, news.when - part.stepped
        part.stage, part.asked, part.run, part.kept, part.steady = "saved", None, None, news.kept, False
        if was == "running":
            self._left(part, news.when)
            self._stands.left(part)
        self._review = 0.0
        if part.ticket in self._why:
            self._settle(part, cancelled())

    def _on_not_saved(self, part: Part, news: News) -> None:
        """It goes on where it is; so it stays there to its end."""
        logger.warning("cannot be carried", extra={"fields": {"request": part.id, "cause": str(news.error)}})
        if part.stage != "running":
            part.stage, part.since = "running", news.when
        part.pinned = True
        part.asked = None if part.asked == "save" else part.asked
        self._review = 0.0

    def _on_done(self, part: Part, news: News) -> None:
        if part.stage == "running":
            self._left(part, news.when)
            if part.done:
                self._decider.costs.ended(part.shape, news.when - part.stepped)
        part.stage, self._review = "over", 0.0
        self._parts.remove(part)
        ticket = part.ticket
        if ticket in self._why:
            self._end(ticket, self._why[ticket])
            return
        ticket.outputs[part.number] = news.output
        if len(ticket.outputs) == len(ticket.work.seeds):
            self._usual += 0.2 * (news.when - (ticket.started or news.when) - self._usual)
            outputs = tuple(ticket.outputs[number] for number in range(len(ticket.work.seeds)))
            self._tell(ticket, Painted(outputs, ticket.seconds))

    def _left(self, part: Part, now: float) -> None:
        """It is on no device any more."""
        part.ticket.seconds += max(0.0, now - part.since)
        part.ticket.note(now, "left", part.devices)

    def _on_failed(self, part: Part, news: News) -> None:
        assert news.error is not None
        if part.stage == "running":
            self._left(part, news.when)
        self._review = 0.0
        model = self._models[part.model]
        beside = sum(one.model == part.model and one.run is not None for one in self._parts) > 1
        outcome = outcome_of(model, news.run, news.error)
        if part.ticket.cancelled or part.ticket in self._why:
            self._settle(part, cancelled())
        elif outcome.unbegun or outcome.carried_badly:
            part.begun -= outcome.unbegun
            part.pinned = part.pinned or outcome.carried_badly
            part.anew()
        elif part.begun < MOST_ATTEMPTS and (outcome.refusal.status == 503 or (beside and not outcome.clients)):
            part.anew()
            part.shape = shape_of(part.ticket.work, model.facts, alone=True)
        else:
            self._settle(part, outcome.refusal)

    # -- how requests end --------------------------------------------------------------------------

    def _settle(self, part: Part, refusal: Refusal) -> None:
        """A part has ended without its picture, and its request with it."""
        part.stage = "over"
        self._parts.remove(part)
        self._end(part.ticket, refusal)

    def _end(self, ticket: Ticket, refusal: Refusal) -> None:
        """Ends what is left of a request; told when nothing of it runs any more, and why it ended first."""
        if ticket.over:
            return
        why = self._why.setdefault(ticket, refusal)
        for part in [one for one in self._parts if one.ticket is ticket]:
            if part.run is None:
                part.stage = "over"
                self._parts.remove(part)
            elif part.asked != "cancel":
                part.asked = "cancel"
                part.run.cancel()
        if not any(part.ticket is ticket for part in self._parts):
            del self._why[ticket]
            self._tell(ticket, Ended(why))

    # -- what a request is to the scheduler ----------------------------------------------------------

    def _parts_of(self, ticket: Ticket) -> list[Part]:
        """A request's pictures, with a deadline if it named none; may have to ask the planner."""
        work, facts = ticket.work, self._models[ticket.work.model].facts
        whole, pinned = stays(work, facts)
        shape = shape_of(work, facts, alone=whole or pinned)
        self._decider.costs.know(shape)
        parts = [Part(ticket, number, shape, pinned=pinned, whole=whole) for number in range(len(work.seeds))]
        if work.deadline_s is None:
            ticket.due = ticket.arrived + len(parts) * self._decider.usual_seconds(parts[0])
        return parts

    def _admit(self, part: Part) -> None:
        """Turns a request away that cannot be in time, where the service does so.

        Raises:
            Refusal: It cannot.
        """
        reason = self._decider.refusal(monotonic(), self._parts, part)
        if reason is not None:
            message = f"this would be late, and late requests are turned away here: {reason}"
            raise Refusal(429, message, code="deadline_cannot_be_met", param="deadline_s", retry_after=self._usual)


def _seen(ticket: Ticket, parts: Sequence[Part]) -> Seen:
    devices = tuple(sorted({device for one in parts if one.stage == "running" for device in one.devices}))
    if devices:
        return Seen(ticket, "running", devices)
    return Seen(ticket, "paused" if any(one.begun and one.stage != "waiting" for one in parts) else "waiting", ())
