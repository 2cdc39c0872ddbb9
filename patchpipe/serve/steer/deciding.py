"""Asks the policy what should run where, and makes of its answer what can be done; with a plain one should it fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from patchpipe.scheduling import Admission, Policy, Run, Scheduler, State, alone
from patchpipe.serve.steer.costs import LiveCosts, Machine
from patchpipe.serve.steer.parts import Part

logger = logging.getLogger("patchpipe.serve")


@dataclass(frozen=True)
class Plan:
    """Parts that should run together on some devices."""

    parts: tuple[Part, ...]
    devices: tuple[int, ...]


class Decider:
    """Decides for the parts of one machine.

    Args:
        machine: What there is to share.
        policy: How it is shared.
        costs: What steps take.
        admission: Whether to turn away what cannot be in time.
        scale: Deadlines of requests that name none: so many times their seconds alone on the idle machine.
        failed: Told when the policy failed.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy,
        costs: LiveCosts,
        *,
        admission: bool,
        scale: float,
        failed: Callable[[], None],
    ) -> None:
        self.machine, self.costs, self.policy, self._scale = machine, costs, policy, scale
        self._scheduler = Scheduler(policy, costs, Admission() if admission else None)
        self._failed = failed

    def decide(self, now: float, parts: Sequence[Part]) -> list[Plan]:
        """What should run where from now on; what is about to end is left out.

        Never raises: a request must not wait for ever because a decision failed.
        """
        try:
            state = self.state(now, parts)
            wanted = self._read(self._scheduler.decide(state).runs, parts, state)
            if wanted or any(job.ending for job in state.jobs):
                return wanted
            raise ValueError(f"{self.policy.name} leaves all devices idle although there are requests")
        except Exception:
            logger.exception("the policy failed", extra={"fields": {"policy": self.policy.name}})
            self._failed()
            return self.plain(parts)

    def refusal(self, now: float, parts: Sequence[Part], new: Part) -> str | None:
        """Why a request that has just come should be turned away; ``None`` takes it."""
        try:
            return self._scheduler.refusal(self.state(now, parts), new.request())
        except Exception:
            logger.exception("admission failed")
            self._failed()
            return None

    def hopeless(self, now: float, part: Part) -> bool:
        """Whether a request that has not begun can be in time no more, where such are turned away."""
        if self._scheduler.admission is None or part.ticket.work.deadline_s is None:
            return False
        return now + alone(self.costs, part.shape, part.total, self.machine.devices) > part.ticket.due

    def usual_seconds(self, part: Part) -> float:
        """Seconds in which a request that names no deadline should be there."""
        return self._scale * alone(self.costs, part.shape, part.total, self.machine.devices)

    def state(self, now: float, parts: Sequence[Part]) -> State:
        """What the scheduler is told."""
        devices = tuple(range(self.machine.devices))
        jobs = [part.job(now, self.costs, batch_of(part, parts)) for part in parts]
        return State(now, devices, tuple(jobs))

    def plain(self, parts: Sequence[Part]) -> list[Plan]:
        """What runs goes on, and the oldest of what waits gets what is free, one device each."""
        plans = [Plan(tuple(batch), batch[0].devices) for batch in batches(parts)]
        held = {device for plan in plans for device in plan.devices}
        free = [device for device in range(self.machine.devices) if device not in held]
        for part in sorted((one for one in parts if one.idle), key=lambda one: (one.ticket.arrived, one.id)):
            if free:
                plans.append(Plan((part,), (free.pop(0),)))
        return plans

    def _read(self, runs: Iterable[Run], parts: Sequence[Part], state: State) -> list[Plan]:
        """The runs as plans: each part once, each device once, and none that is held by what is ending."""
        by_id = {part.id: part for part in parts}
        ending = {job.id: job.devices for job in state.jobs if job.ending}
        free = set(state.devices) - {device for devices in ending.values() for device in devices}
        plans: list[Plan] = []
        for run in runs:
            chosen = tuple(by_id.pop(name) for name in run.requests if name in by_id and name not in ending)
            devices = self._lane([device for device in run.devices if device in free])
            if chosen and devices:
                plans.append(Plan(chosen, devices))
                free.difference_update(devices)
        return plans

    def _lane(self, devices: Sequence[int]) -> tuple[int, ...]:
        """The most of some devices that ranks can share a request on: so many neighbours, from a multiple on."""
        for degree in sorted(self.machine.degrees, reverse=True):
            for first in range(0, self.machine.devices, degree):
                if set(devices).issuperset(range(first, first + degree)):
                    return tuple(range(first, first + degree))
        return ()


def batches(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts that run, by where they run."""
    found: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        if part.stage == "running":
            found.setdefault(part.devices, []).append(part)
    return list(found.values())


def batch_of(part: Part, parts: Iterable[Part]) -> list[Part]:
    """The parts that run where one runs; itself alone where it does not."""
    if part.stage != "running":
        return [part]
    return [one for one in parts if one.stage == "running" and one.devices == part.devices]
