"""One replica: a group of devices of one node with an engine for each model, which decides for itself what runs when.

It runs in a process of its own that Ray has started. Its engines' ranks are that process's children, as on one machine:
Ray does placement and liveness, and no tensor passes through it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import ExitStack
from time import monotonic
from typing import Any

from patchpipe.scheduling import Shape
from patchpipe.serve.fleet.figures import Noted
from patchpipe.serve.fleet.words import Actor, Begun, Health, Introduced, Place, Price, Spec, Told
from patchpipe.serve.refusals import Refusal, cancelled, shutting_down
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Ended, Event, Painted, Stepped, Ticket, Work
from patchpipe.version import __version__


class Replica(Actor):
    """A replica, in its own process; threads may ask it at the same time.

    Args:
        spec: What it is to be.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec, self._metrics = spec, Noted()
        self._group: Any = None
        self._changed = threading.Condition()
        self._events: list[tuple[str, Event]] = []
        self._tickets: dict[str, Ticket] = {}
        self._outputs: dict[str, tuple[Any, ...]] = {}
        self._early: deque[str] = deque(maxlen=1000)  # cancelled before they came: questions may overtake each other
        self._shapes: set[Shape] = set()
        self._open = ExitStack()

    def start(self) -> Begun:
        """Loads the models.

        Raises:
            ValueError: The node has another version of patchpipe.
            Exception: A model could not start; see ``Engine``.
        """
        from patchpipe.serve.group import Group

        if self._spec.version != __version__:
            there = f"the service is patchpipe {self._spec.version}, and this node has {__version__}"
            raise ValueError(f"{there}: install the same on all nodes")
        models = self._load()
        self._group = Group(models, self._spec.settings, self._metrics)
        for name, work in (("look on", self._look_on), ("ask the planner", self._group.ask_planner)):
            threading.Thread(target=work, name=name, daemon=True).start()
        introduced = {one.name: Introduced(one.public, one.source, one.for_edits, one.facts) for one in models}
        return Begun(os.getpid(), introduced, self._group.machine)

    def _load(self) -> list[Model]:
        from patchpipe.engine.processes import warm
        from patchpipe.serve.models import start_models

        self._open.enter_context(warm())  # an engine that died is up again at once
        spec = self._spec
        return start_models(
            spec.named, spec.loading, edits=spec.edits, on_change=self._model_changed, told=lambda name: None
        )

    def price(self, shapes: tuple[Shape, ...]) -> dict[Shape, Price]:
        """What requests of some shapes take."""
        for shape in shapes:
            self._group.costs.know(shape)
            self._shapes.add(shape)
        return {shape: self._price(shape) for shape in shapes}

    def submit(self, key: str, work: Work) -> None:
        """Takes a request; a refusal is told as its end."""
        ticket = Ticket(work, lambda event: self._hear(key, event), monotonic())
        with self._changed:
            self._tickets[key] = ticket
            early = key in self._early
        try:
            if early or self._group is None:
                raise cancelled() if early else shutting_down()
            self._group.conductor.add(ticket, accepted=True)
        except Refusal as refusal:
            ticket.tell(Ended(refusal))
        except Exception as error:
            message = f"the replica could not take this: {type(error).__name__}: {error}"
            ticket.tell(Ended(Refusal(500, message, code="internal_error")))

    def cancel(self, key: str) -> None:
        """Ends a request, at its next step."""
        with self._changed:
            ticket = self._tickets.get(key)
            if ticket is None:
                self._early.append(key)
        if ticket is not None:
            self._group.conductor.withdraw(ticket)

    def poll(self, seconds: float) -> Told:
        """What has happened; waits so long where nothing has."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), seconds)
            events, self._events = _latest(self._events), []
            keys = {id(ticket): key for key, ticket in self._tickets.items()}
        seen = self._group.conductor.snapshot()
        places = {keys[id(one.ticket)]: Place(one.state, one.devices) for one in seen if id(one.ticket) in keys}
        healths = {name: Health(one.cause, one.restarts) for name, one in self._group.models.items()}
        prices = {shape: self._price(shape) for shape in tuple(self._shapes)}
        return Told(tuple(events), places, healths, self._metrics.take(), prices)

    def fetch(self, key: str) -> tuple[Any, ...]:
        """The pictures of a request that is painted, once."""
        with self._changed:
            return self._outputs.pop(key)

    def close(self) -> None:
        """Ends the models."""
        group, self._group = self._group, None
        if group is not None:
            group.conductor.close()
            group.close()
        self._open.close()

    def _hear(self, key: str, event: Event) -> None:
        with self._changed:
            if isinstance(event, Painted):
                self._outputs[key] = event.outputs
                event = Painted((), event.seconds)
            if isinstance(event, (Painted, Ended)):
                self._tickets.pop(key, None)
            self._events.append((key, event))
            self._changed.notify_all()

    def _price(self, shape: Shape) -> Price:
        costs = self._group.costs
        steps = {degree: costs.step(shape, 1, degree) for degree in costs.degrees(shape)}
        return Price(steps, costs.starts(shape) + costs.ends(shape, 1))

    def _look_on(self) -> None:
        while (group := self._group) is not None:
            group.look_on()
            threading.Event().wait(1.0)

    def _model_changed(self) -> None:
        """Gives pictures back that wait for a model which cannot start: another replica may paint them."""
        group = self._group
        for model in group.models.values() if group is not None else ():
            if model.down and not model.usable:
                group.conductor.refuse_pictures(model.name, _down(model))
        if group is not None:
            group.conductor.look()


def _down(model: Model) -> Refusal:
    return Refusal(503, f"{model.public} cannot paint now: {model.cause}", code="model_down", retry_after=30)


def _latest(events: list[tuple[str, Event]]) -> list[tuple[str, Event]]:
    """The events without steps that another step of the same request follows."""
    last: dict[str, int] = {key: place for place, (key, event) in enumerate(events) if isinstance(event, Stepped)}
    return [
        (key, event)
        for place, (key, event) in enumerate(events)
        if not isinstance(event, Stepped) or last[key] == place
    ]
