"""Who stands on which devices: stops what should not go on, and starts what should once its devices are free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from patchpipe.serve.metrics import Metrics
from patchpipe.serve.steer.costs import Machine
from patchpipe.serve.steer.deciding import Plan, batches
from patchpipe.serve.steer.parts import Part
from patchpipe.serve.steer.runs import Hand, News, Run, WholeRun
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Event, Started, Ticket


class Stands:
    """The devices, and what was decided about them and is not done yet.

    Args:
        models: The models by the service's name.
        hands: Who calls each model's engine.
        machine: What there is to share.
        post: Takes news of runs.
        tell: Tells a request's client.
        metrics: The service's figures.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        hands: Mapping[str, Hand],
        machine: Machine,
        post: Callable[[News], None],
        tell: Callable[[Ticket, Event], None],
        metrics: Metrics,
    ) -> None:
        self._models, self._hands, self._machine = models, hands, machine
        self._post, self._tell, self._metrics = post, tell, metrics
        self._pending: list[Plan] = []
        self._accounted = monotonic()

    def follow(self, plans: Sequence[Plan], parts: Sequence[Part]) -> None:
        """Takes a decision: what it leaves out stops after its step."""
        wanted = {plan.devices: set(plan.parts) for plan in plans}
        places = {part: plan.devices for plan in plans for part in plan.parts}
        for batch in batches(parts):
            if wanted.get(batch[0].devices) == set(batch):
                for part in batch:
                    self._go_on(part)
            elif not any(part.ends_here for part in batch):
                for part in batch:
                    self._stop(part, moves=places.get(part, part.devices) != part.devices)
        self._pending = [plan for plan in plans if not all(_stands(part, plan.devices) for part in plan.parts)]

    def start(self, parts: Sequence[Part]) -> None:
        """Starts what was decided, as far as its devices are free."""
        for plan in list(self._pending):
            chosen = [one for one in plan.parts if one.stage != "over" and one.asked != "cancel"]
            if not chosen or not self._models[chosen[0].model].usable:
                self._pending.remove(plan)
                continue
            held = {device for part in parts if part.stage == "running" for device in part.devices}
            if any(part.stage == "running" for part in chosen) or not held.isdisjoint(plan.devices):
                continue
            if self._make_way(chosen, plan.devices, parts):
                self._pending.remove(plan)
                self._metrics.together.observe(len(chosen))
                for part in chosen:
                    self._begin(part, plan.devices)

    def left(self, part: Part) -> None:
        """A part has stopped and is not over."""
        if not any(part in plan.parts for plan in self._pending):
            self._metrics.preemptions.labels(part.model, part.shape.kind).inc()

    def account(self, parts: Sequence[Part]) -> None:
        """Counts the time since it was last called for the devices that are at work."""
        now = monotonic()
        seconds, self._accounted = now - self._accounted, now
        for name in {name for part in parts if part.stage == "running" for name in self._names(part)}:
            self._metrics.busy.labels(name).inc(seconds)

    def _names(self, part: Part) -> list[str]:
        devices = self._models[part.model].facts.devices
        ranks = part.devices if self._machine.elastic else range(len(devices))
        return [f"{devices[rank]} (rank {rank})" if devices[rank] == "cpu" else devices[rank] for rank in ranks]

    # -- stopping ----------------------------------------------------------------------------------

    def _go_on(self, part: Part) -> None:
        if part.asked == "pause" and part.run is not None:
            part.asked = None
            part.run.resume()

    def _stop(self, part: Part, moves: bool) -> None:
        if part.asked is not None or part.run is None:
            return
        if moves:
            part.asked = "save"
            part.run.save()
        else:
            part.asked = "pause"
            part.run.pause()

    def _make_way(self, chosen: Sequence[Part], devices: tuple[int, ...], parts: Sequence[Part]) -> bool:
        """Whether nothing that is held is in the way; what is, is saved or, if it cannot be, goes first."""
        blocking = [part for part in parts if part.stage == "paused" and self._blocks(part, chosen, devices)]
        for part in blocking:
            if part.asked is not None or part.run is None:
                continue
            if self._models[part.model].facts.carried and not part.pinned:
                part.asked, part.stepped = "save", monotonic()
                part.run.save()
            elif part not in chosen:
                self._begin(part, part.devices)
                break
        return not blocking

    def _blocks(self, part: Part, chosen: Sequence[Part], devices: tuple[int, ...]) -> bool:
        """Whether a part that is held keeps others from running: ranks serve one group of theirs at a time.

        So does one that is to go on elsewhere: its engine holds it where it was.
        """
        first = chosen[0]
        if part.model != first.model:
            return False
        if self._machine.elastic and part in chosen:
            return part.devices != devices and not part.pinned
        if self._machine.elastic:
            return part.devices != devices and not set(part.devices).isdisjoint(devices)
        return part not in chosen and (first.whole or self._other_loras(first))

    def _other_loras(self, part: Part) -> bool:
        return self._hands[part.model].loras != part.ticket.work.loras

    # -- starting ----------------------------------------------------------------------------------

    def _begin(self, part: Part, devices: tuple[int, ...]) -> None:
        ticket, now = part.ticket, monotonic()
        part.came = "resume" if part.stage == "paused" else "began" if part.kept is None else "change"
        if part.stage == "paused" and part.run is not None:
            part.run.resume()
        else:
            if part.kept is not None and len(part.devices) != len(devices):
                self._metrics.degree_changes.labels(part.model).inc()
            part.run = run = (WholeRun if part.whole else Run)(part, self._hands[part.model], self._post)
            part.devices = devices
            if part.kept is None:
                self._count(part, ticket, now)
            run.start()
        part.stage, part.asked, part.steady, part.fresh, part.first = "running", None, False, True, None
        part.since = part.stepped = now
        ticket.note(now, "came", devices)

    def _count(self, part: Part, ticket: Ticket, now: float) -> None:
        part.begun += 1
        if part.begun > ticket.attempts:
            ticket.attempts = part.begun
            ticket.started = ticket.started or now
            self._tell(ticket, Started())


def _stands(part: Part, devices: tuple[int, ...]) -> bool:
    return part.stage == "running" and part.devices == devices
