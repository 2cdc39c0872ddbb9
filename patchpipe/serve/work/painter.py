"""Paints what the backlog starts, on the engine of its model, and says how it ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from patchpipe.errors import Cancelled
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.work.backlog import cancelled
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Ended, Painted, Partial, Started, Stepped, Ticket

if TYPE_CHECKING:
    from patchpipe.engine import Engine, Preview, Progress

logger = logging.getLogger("patchpipe.serve")

MOST_ATTEMPTS = 2  # of a request whose worker died


class _Unwanted(Exception):
    """Raised into the engine at a step after which nobody wants the picture."""


class Painter:
    """Paints requests.

    Args:
        models: The models by name.
        in_flight: Pictures painted together at most.
        lora_folder: Where LoRAs are, by name.
        put_back: Takes requests that are to be tried again.
        on_step: Called with the model's name and the seconds of each step.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        in_flight: int,
        lora_folder: Path | None,
        put_back: Callable[[Sequence[Ticket]], None],
        on_step: Callable[[str, float], None],
    ) -> None:
        self._models, self._in_flight, self._loras = models, in_flight, lora_folder
        self._put_back, self._on_step = put_back, on_step
        self._engines: dict[str, Engine] = {}  # under way, by ticket
        self._lock = threading.Lock()

    def paint(self, group: Sequence[Ticket]) -> None:
        """Paints what starts together, and tells each request how it ended."""
        model = self._models[group[0].work.model]
        for ticket in group:
            ticket.attempts += 1
            ticket.started = ticket.started or monotonic()
            ticket.tell(Started())
        engine: Engine | None = None
        try:
            if all(ticket.cancelled for ticket in group):
                raise _Unwanted
            engine = model.engine
            self._change_loras(engine, group[0].work.loras)
            if len(group) > 1 or (len(group[0].work.seeds) > 1 and self._joins(model, group[0])):
                self._paint_together(model, engine, group)
            else:
                self._paint_alone(model, engine, group[0])
        except Exception as error:
            self._settle(model, engine, group, error)

    def stop(self, ticket: Ticket) -> None:
        """Ends the work on a request at once, if it is the only one that the engine works for."""
        with self._lock:  # the engine must not have gone on to another request
            engine = self._engines.get(ticket.work.id)
            if engine is not None:
                engine.cancel()

    def _joins(self, model: Model, ticket: Ticket) -> bool:
        work = ticket.work
        return self._in_flight > 1 and model.facts.together and work.kind == "picture" and not work.previews

    # -- one request -----------------------------------------------------------------------------

    def _paint_alone(self, model: Model, engine: Engine, ticket: Ticket) -> None:
        work = ticket.work
        with self._lock:
            self._engines[work.id] = engine
        try:
            for number in range(len(ticket.outputs), len(work.seeds)):
                told = self._previews(ticket) if number == 0 else {}
                watch = self._watch(model, {0: ticket}, number)
                result = engine.generate(seed=work.seeds[number], on_progress=watch, **told, **work.arguments)
                ticket.seconds += result.seconds
                ticket.outputs.append(one_output(result.images))
        finally:
            with self._lock:
                del self._engines[work.id]
        ticket.tell(Painted(tuple(ticket.outputs), ticket.seconds))

    def _previews(self, ticket: Ticket) -> dict[str, Any]:
        """What to ask the engine for pictures on the way with: evenly spread, without the last one."""
        wanted, steps = ticket.work.previews, ticket.work.steps or 20
        if not wanted:
            return {}
        shown: list[int] = []

        def show(preview: Preview) -> None:
            if len(shown) < wanted and preview.step < steps:
                ticket.tell(Partial(len(shown), one_output(preview.images)))
                shown.append(preview.step)

        return {"on_preview": show, "preview_every": max(1, steps // (wanted + 1))}

    def _watch(self, model: Model, tickets: Mapping[int, Ticket], done: int = 0) -> Callable[[Progress], None]:
        """Follows the steps of calls, by number; ends them when nobody wants any of them."""
        last: float | None = None  # what comes before the first step is over is more than a step

        def on_progress(progress: Progress) -> None:
            nonlocal last
            now = monotonic()
            if last is not None:
                self._on_step(model.name, now - last)
            last = now
            ticket = tickets[progress.call]
            if progress.total is not None:
                ticket.step = max(ticket.step, done * progress.total + progress.step)
                ticket.tell(Stepped(ticket.step, progress.total * len(ticket.work.seeds)))
            if all(one.cancelled for one in tickets.values()):
                raise _Unwanted

        return on_progress

    # -- several -----------------------------------------------------------------------------------

    def _paint_together(self, model: Model, engine: Engine, group: Sequence[Ticket]) -> None:
        calls = [(ticket, seed) for ticket in group for seed in ticket.work.seeds[len(ticket.outputs) :]]
        while calls:
            calls = [(ticket, seed) for ticket, seed in calls if not ticket.cancelled]
            now, calls = calls[: self._in_flight], calls[self._in_flight :]
            if not now:
                break
            asked = [{**ticket.work.arguments, "seed": seed} for ticket, seed in now]
            tickets = {number: ticket for number, (ticket, _) in enumerate(now)}
            results = engine.generate_together(asked, on_progress=self._watch(model, tickets))
            for (ticket, _), result in zip(now, results, strict=True):
                ticket.seconds += result.seconds
                ticket.outputs.append(one_output(result.images))
                if len(ticket.outputs) == len(ticket.work.seeds):
                    ticket.tell(Painted(tuple(ticket.outputs), ticket.seconds))
        for ticket in group:
            ticket.tell(Ended(cancelled()))  # those that nobody wants; the others are over

    # -- how it ended --------------------------------------------------------------------------------

    def _settle(self, model: Model, engine: Engine | None, group: Sequence[Ticket], error: Exception) -> None:
        left = [ticket for ticket in group if not ticket.over]
        for ticket in left:
            if ticket.cancelled:
                ticket.tell(Ended(cancelled()))
        left = [ticket for ticket in left if not ticket.over]
        if isinstance(error, (Cancelled, _Unwanted)):
            refusal = cancelled()
        elif isinstance(error, Refusal):  # the model went down before anything was begun: they wait until it is up
            for ticket in left:
                ticket.attempts -= 1
            self._put_back(left)
            return
        elif isinstance(error, (ValueError, TypeError, FileNotFoundError, NotImplementedError)):
            if len(group) > 1:  # whose fault it is shows when each is painted alone
                self._put_back(left)
                return
            refusal = Refusal(400, str(error), code="refused_by_model")
        else:
            refusal = _failed(model, engine, error)
            again = [ticket for ticket in left if refusal.status == 503 and ticket.attempts < MOST_ATTEMPTS]
            self._put_back(again)
            left = [ticket for ticket in left if ticket not in again]
        for ticket in left:
            ticket.tell(Ended(refusal))

    def _change_loras(self, engine: Engine, wanted: tuple[tuple[str, float], ...]) -> None:
        """Has the engine paint with these LoRAs and no others."""
        loaded = engine.loras
        for name, scale in loaded.items():
            if (name, scale) not in wanted:
                engine.unload_lora(name)
        for name, scale in wanted:
            if (name, scale) not in loaded.items():
                assert self._loras is not None
                engine.load_lora(self._loras / f"{name}.safetensors", name=name, scale=scale)


def _failed(model: Model, engine: Engine | None, error: Exception) -> Refusal:
    """What to tell of a failure that is not the client's; gets a model up again whose engine it has ended."""
    cause = f"{type(error).__name__}: {error}"
    logger.error("painting failed", extra={"fields": {"model": model.name, "cause": cause}})
    if engine is not None and not engine.closed:
        return Refusal(500, f"{model.public} could not paint this: {error}", code="worker_failed")
    model.revive(str(error))
    return Refusal(503, f"a worker of {model.public} failed: {error}", code="worker_lost", retry_after=10)


def one_output(images: Any) -> Any:
    """The only picture or clip of a pipeline's output."""
    return images[0] if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) > 3 else images
