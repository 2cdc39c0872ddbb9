"""The service without HTTP: its models, what waits for them, clips, figures, and its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from patchpipe.serve.clips.jobs import Clips
from patchpipe.serve.metrics import Metrics
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.settings import Settings
from patchpipe.serve.work.asking import lora_names
from patchpipe.serve.work.backlog import Backlog, shutting_down
from patchpipe.serve.work.dispatch import Dispatch, earliest_deadline
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.painter import Painter
from patchpipe.serve.work.tickets import Ended, Event, Listener, Painted, Started, Ticket, Work

logger = logging.getLogger("patchpipe.serve")

SWEEP_SECONDS = 60.0


class Service:
    """Takes work, has it painted, and tells how it went.

    Args:
        settings: What the operator decided.
        models: The models by the service's name for them; see ``add_model``.
        dispatch: Which request runs next; ``None`` takes the earliest deadline.

    Attributes:
        models: The models.
        clips: The clips.
        metrics: The figures.
        started: When it began, in seconds of the Unix epoch.

    Raises:
        ValueError: The folder or the database cannot be used.
    """

    def __init__(self, settings: Settings, models: Sequence[Model], dispatch: Dispatch | None = None) -> None:
        self.settings = settings
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.metrics = Metrics()
        self.started = int(time.time())
        self._painter = Painter(self.models, settings.in_flight, settings.lora_folder, self._put_back, self._stepped)
        order = dispatch or earliest_deadline(settings.in_flight, lambda name: self.models[name].facts.together)
        self.backlog = Backlog(order, self._paint, lambda name: self.models[name].usable, settings.limits.waiting)
        self.metrics.watch(self.backlog, self.models)
        self.clips = Clips(settings.folder, settings.database, settings.keep_hours, self._submit_again, self.cancel)
        self._ending = threading.Event()
        self.draining = False

    def start(self) -> None:
        """Starts the models that are not running, and goes on with what was accepted before.

        Raises:
            Exception: A model could not start.
        """
        for model in self.models.values():
            if model.cause is not None:
                model.start()
        restored = self.clips.restore()
        if restored:
            logger.info("clips restored", extra={"fields": {"clips": restored}})
        threading.Thread(target=self._look_on, name="look on", daemon=True).start()

    # -- requests --------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Makes sure that a request could be taken now, before its body is read.

        Raises:
            Refusal: It could not.
        """
        try:
            self.backlog.check_room()
        except Refusal as refusal:
            self.metrics.rejections.labels(refusal.code).inc()
            raise

    def submit(self, work: Work, listen: Listener) -> Ticket:
        """Takes a request.

        Args:
            work: What is to be painted.
            listen: Told how it goes, from threads of the service.

        Raises:
            Refusal: It cannot be taken now.
        """
        self.check_room()
        model = self.models[work.model]
        if model.down:
            self.metrics.rejections.labels("model_down").inc()
            raise Refusal(503, f"{model.public} cannot paint now: {model.cause}", code="model_down", retry_after=10)
        return self._take(work, listen, accepted=False)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request: at once where it waits, at the next step where it runs."""
        self.backlog.withdraw(ticket)
        self._painter.stop(ticket)

    def _submit_again(self, work: Work, listen: Listener) -> Ticket:
        if work.model not in self.models:
            raise Refusal(503, f"the model {work.model!r} is not served any more", code="model_not_found")
        return self._take(work, listen, accepted=True)

    def _take(self, work: Work, listen: Listener, accepted: bool) -> Ticket:
        holder: list[Ticket] = []
        ticket = Ticket(work, partial(self._hear, holder, listen), monotonic())
        holder.append(ticket)
        self.backlog.add(ticket, accepted=accepted)
        return ticket

    def _hear(self, holder: list[Ticket], listen: Listener, event: Event) -> None:
        [ticket] = holder
        self._count(ticket, event)
        listen(event)

    def _count(self, ticket: Ticket, event: Event) -> None:
        work, now = ticket.work, monotonic()
        names = (work.model, work.kind)
        if isinstance(event, Started) and ticket.attempts == 1:
            self.metrics.wait.labels(*names).observe(now - ticket.arrived)
        if not isinstance(event, (Painted, Ended)):
            return
        seconds = now - ticket.arrived
        outcome = "completed" if isinstance(event, Painted) else outcome_of(event.refusal)
        self.metrics.requests.labels(*names, outcome).inc()
        if outcome == "completed":
            self.metrics.latency.labels(*names).observe(seconds)
        if work.deadline_s is not None and outcome != "cancelled":
            met = outcome == "completed" and seconds <= work.deadline_s
            self.metrics.deadlines.labels(*names, "met" if met else "missed").inc()
        fields = {"request": work.id, "model": work.model, "kind": work.kind, "outcome": outcome, "seconds": seconds}
        if isinstance(event, Ended):
            fields["cause"] = event.refusal.message
        logger.info("request over", extra={"fields": {**fields, "work_seconds": ticket.seconds}})

    # -- painting --------------------------------------------------------------------------------

    def _paint(self, group: Sequence[Ticket]) -> None:
        model, began = self.models[group[0].work.model], monotonic()
        self.metrics.together.observe(len(group))
        try:
            self._painter.paint(group)
        finally:
            for number, device in enumerate(model.facts.devices):
                name = f"{device} (rank {number})" if device == "cpu" else device
                self.metrics.busy.labels(name).inc(monotonic() - began)

    def _stepped(self, model: str, seconds: float) -> None:
        self.metrics.step.labels(model).observe(seconds)

    def _put_back(self, tickets: Sequence[Ticket]) -> None:
        self.backlog.put_back(tickets)

    def model_changed(self) -> None:
        """A model can paint again, or could not be started: what waits for it is looked at anew."""
        for model in self.models.values():
            if model.down and not model.usable:
                self._refuse_pictures(model)
        self.backlog.look()

    def _refuse_pictures(self, model: Model) -> None:
        """Somebody waits for a picture at the other end of a connection; a clip can wait."""
        refusal = Refusal(503, f"{model.public} cannot paint now: {model.cause}", code="model_down", retry_after=30)
        waiting = self.backlog.take(model.name)
        self.backlog.put_back([ticket for ticket in waiting if ticket.work.kind == "clip"])
        for ticket in waiting:
            if ticket.work.kind == "picture":
                ticket.tell(Ended(refusal))

    # -- its state and its end -------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it can paint now, and will go on to."""
        return not self.draining and any(model.usable for model in self.models.values())

    def state(self) -> dict[str, Any]:
        """What the page shows: models, devices, and the queue without what anybody asked for."""
        waiting, running = self.backlog.snapshot()
        return {
            "ready": self.ready,
            "draining": self.draining,
            "models": [_describe(model) for model in self.models.values()],
            "running": [_place(ticket) for ticket in running],
            "waiting": [_place(ticket) for ticket in waiting],
            "limits": {**vars(self.settings.limits)},
            "loras": lora_names(self.settings.lora_folder),
        }

    def drain(self) -> None:
        """Says that it is not ready, so that nobody sends it anything more."""
        self.draining = True

    def close(self) -> None:
        """Lets pictures end that are under way, puts clips back for the next service, and ends the models."""
        self.draining = True
        self.backlog.idle(self.settings.drain_seconds, "picture")
        self.clips.stop()
        self._ending.set()
        for ticket in self.backlog.close():
            ticket.tell(Ended(shutting_down()))
        for ticket in self.backlog.snapshot()[1]:
            self.cancel(ticket)
            ticket.wait(10)
        for model in self.models.values():
            model.close()
        self.clips.close()

    def _look_on(self) -> None:
        """Notices workers that die while nothing is asked of them, and deletes old clips."""
        swept = monotonic()
        while not self._ending.wait(1.0):
            for model in self.models.values():
                model.check()
            if monotonic() - swept > SWEEP_SECONDS:
                swept = monotonic()
                self.clips.sweep()


def outcome_of(refusal: Refusal) -> str:
    """How a request ended, in a word."""
    if refusal.status == 499:
        return "cancelled"
    return "refused" if refusal.status < 500 else "failed"


def _describe(model: Model) -> dict[str, Any]:
    facts = model.facts
    return {
        "id": model.public,
        "kind": "clip" if facts.clips else "edit" if model.for_edits else "picture",
        "ready": model.usable,
        "cause": model.cause,
        "pipeline": facts.pipeline,
        "layout": facts.layout,
        "devices": list(facts.devices),
        "restarts": model.restarts,
        "usual": {name: facts.usual(name) for name in ("height", "width", "num_inference_steps", "num_frames")},
    }


def _place(ticket: Ticket) -> dict[str, Any]:
    now = monotonic()
    return {
        "model": ticket.work.model,
        "kind": ticket.work.kind,
        "step": ticket.step,
        "steps": ticket.total_steps,
        "waited": round((ticket.started or now) - ticket.arrived, 1),
        "ran": round(now - ticket.started, 1) if ticket.started else None,
    }
