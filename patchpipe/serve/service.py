"""The service without HTTP: its models, what waits for them, clips, figures, and its end."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from patchpipe.scheduling import Policy, policy_named
from patchpipe.serve.clips.jobs import Clips
from patchpipe.serve.metrics import Metrics
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.settings import Settings
from patchpipe.serve.spans import Spans
from patchpipe.serve.steer.believed import planner_of
from patchpipe.serve.steer.conductor import Conductor
from patchpipe.serve.steer.costs import LiveCosts, Machine
from patchpipe.serve.steer.deciding import Decider
from patchpipe.serve.steer.runs import Hand
from patchpipe.serve.steer.shapes import shape_of
from patchpipe.serve.work.asking import lora_names
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Ended, Event, Kind, Listener, Painted, Seen, Started, Ticket, Work

logger = logging.getLogger("patchpipe.serve")

SWEEP_SECONDS = 60.0


class Service:
    """Takes work, has it painted, and tells how it went.

    Args:
        settings: What the operator decided.
        models: The models by the service's name for them; see ``add_model``.
        policy: Who has which devices next; ``None`` takes the one that the settings name.
        spans: Who is told of every request that is over; ``None`` tells nobody.

    Attributes:
        models: The models.
        clips: The clips.
        metrics: The figures.
        started: When it began, in seconds of the Unix epoch.

    Raises:
        ValueError: The folder or the database cannot be used.
    """

    def __init__(
        self, settings: Settings, models: Sequence[Model], policy: Policy | None = None, spans: Spans | None = None
    ) -> None:
        self.settings, self._spans = settings, spans
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.metrics = Metrics()
        self.started = int(time.time())
        machine = machine_of(models, settings.in_flight)
        self._decider = Decider(
            machine,
            policy or policy_named(settings.policy),
            LiveCosts(machine, planner_of(self.models)),
            admission=settings.admission,
            scale=settings.deadline_scale,
            failed=self.metrics.failed_decisions.inc,
        )
        self._hands = {name: Hand(model, settings.lora_folder) for name, model in self.models.items()}
        self.conductor = Conductor(self.models, self._decider, self._hands, self.metrics, settings.limits.waiting)
        self.metrics.watch(self.conductor.snapshot, self.models)
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
        for name, work in (("look on", self._look_on), ("ask the planner", self._ask_planner)):
            threading.Thread(target=work, name=name, daemon=True).start()

    # -- requests --------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Makes sure that a request could be taken now, before its body is read.

        Raises:
            Refusal: It could not.
        """
        try:
            self.conductor.check_room()
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

    def check_in_time(self, work: Work) -> None:
        """Makes sure that a clip is not to be turned away because it would be late.

        Raises:
            Refusal: It is.
        """
        try:
            self.conductor.check(Ticket(work, lambda event: None, monotonic()))
        except Refusal as refusal:
            self.metrics.rejections.labels(refusal.code).inc()
            raise

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request: at once where it waits, at the next step where it runs."""
        self.conductor.withdraw(ticket)

    def _submit_again(self, work: Work, listen: Listener) -> Ticket:
        if work.model not in self.models:
            raise Refusal(503, f"the model {work.model!r} is not served any more", code="model_not_found")
        return self._take(work, listen, accepted=True)

    def _take(self, work: Work, listen: Listener, accepted: bool) -> Ticket:
        holder: list[Ticket] = []
        ticket = Ticket(work, partial(self._hear, holder, listen), monotonic())
        holder.append(ticket)
        try:
            self.conductor.add(ticket, accepted=accepted)
        except Refusal as refusal:
            self.metrics.rejections.labels(refusal.code).inc()
            raise
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
        if outcome not in ("cancelled", "refused"):
            met, by = outcome == "completed" and now <= ticket.due, "client" if work.deadline_s else "service"
            self.metrics.deadlines.labels(*names, by, "met" if met else "missed").inc()
        fields = {"request": work.id, "model": work.model, "kind": work.kind, "outcome": outcome, "seconds": seconds}
        cause = event.refusal.message if isinstance(event, Ended) else None
        if cause is not None:
            fields["cause"] = cause
        if self._spans is not None:
            self._spans.over(ticket, outcome, cause)
        logger.info("request over", extra={"fields": {**fields, "work_seconds": ticket.seconds}})

    def model_changed(self) -> None:
        """A model can paint again, or could not be started: what waits for it is looked at anew."""
        for model in self.models.values():
            if model.down and not model.usable:
                self._refuse_pictures(model)
        self.conductor.look()

    def _refuse_pictures(self, model: Model) -> None:
        refusal = Refusal(503, f"{model.public} cannot paint now: {model.cause}", code="model_down", retry_after=30)
        self.conductor.refuse_pictures(model.name, refusal)

    # -- its state and its end -------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it can paint now, and will go on to."""
        return not self.draining and any(model.usable for model in self.models.values())

    def state(self) -> dict[str, Any]:
        """What the page shows: models, devices, and the queue without what anybody asked for."""
        seen = self.conductor.snapshot()
        return {
            "ready": self.ready,
            "draining": self.draining,
            "models": [_describe(model) for model in self.models.values()],
            "policy": self._decider.policy.name,
            **{
                state: [_place(one) for one in seen if one.state == state] for state in ("running", "paused", "waiting")
            },
            "limits": {**vars(self.settings.limits)},
            "loras": lora_names(self.settings.lora_folder),
        }

    def drain(self) -> None:
        """Says that it is not ready, so that nobody sends it anything more."""
        self.draining = True

    def close(self) -> None:
        """Lets pictures end that are under way, puts clips back for the next service, and ends the models."""
        self.draining = True
        self.conductor.drain(self.settings.drain_seconds)
        self.clips.stop()
        self._ending.set()
        for ticket in self.conductor.close():
            ticket.wait(10)
        for model in self.models.values():
            model.close()
        for hand in self._hands.values():
            hand.close()
        self.clips.close()
        if self._spans is not None:
            self._spans.close()

    def _ask_planner(self) -> None:
        """Asks what usual requests take, so that the first of them need not wait for the answer."""
        for model in self.models.values():
            kind: Kind = "clip" if model.facts.clips else "picture"
            self._decider.costs.know(shape_of(Work("usual", model.name, kind, {}, (0,)), model.facts))

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
        "elastic": facts.elastic is not None,
        "devices": list(facts.devices),
        "restarts": model.restarts,
        "usual": {name: facts.usual(name) for name in ("height", "width", "num_inference_steps", "num_frames")},
    }


def _place(seen: Seen) -> dict[str, Any]:
    now, ticket = monotonic(), seen.ticket
    return {
        "id": ticket.work.id if ticket.work.kind == "clip" else f"req_{ticket.work.id}",  # as its client knows it
        "model": ticket.work.model,
        "kind": ticket.work.kind,
        "state": seen.state,
        "devices": list(seen.devices),
        "step": ticket.step,
        "steps": ticket.total_steps,
        "waited": round((ticket.started or now) - ticket.arrived, 1),
        "ran": round(now - ticket.started, 1) if ticket.started else None,
        "due": None if math.isinf(ticket.due) else round(ticket.due - now, 1),
    }


def machine_of(models: Sequence[Model], in_flight: int) -> Machine:
    """What there is to share: the devices where all models are elastic, else the machine as a whole."""
    layouts = {model.facts.elastic for model in models if model.cause is None}
    counts = {0 if layout is None else layout.ranks for layout in layouts}
    if len(counts) != 1 or 0 in counts:
        return Machine(together=in_flight)
    [devices] = counts
    degrees = tuple(2**power for power in range(devices.bit_length()))
    return Machine(devices, degrees, in_flight, elastic=True)
