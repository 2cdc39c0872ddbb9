"""A group of devices as it would run: batches, their steps, and what decisions make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from patchpipe.scheduling.costs import Costs
from patchpipe.scheduling.state import Decisions, Job, Request, Run, Shape, State, Status

_NEVER = math.inf
_SLIP = 1e-9  # of a step: what rounding may be wrong by


@dataclass
class Live:
    """A request that is not done."""

    request: Request
    remaining: int
    status: Status = "waiting"
    devices: tuple[int, ...] = ()
    batch: _Batch | None = None


@dataclass
class _Batch:
    """What runs: its steps follow one another from ``start`` on, then come ``ends`` seconds of decoding."""

    lives: tuple[Live, ...]
    devices: tuple[int, ...]
    start: float
    step: float
    steps: int
    ends: float
    pause: float = 0.0  # seconds from the end of its last step until its devices are free
    stopped: float = _NEVER  # when that step ends
    stop_steps: int = 0  # those over then

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(live.request.id for live in self.lives)

    @property
    def end(self) -> float:
        return self.start + self.steps * self.step + self.ends

    @property
    def shape(self) -> Shape:
        return self.lives[0].request.shape

    @property
    def stop(self) -> float:
        """When its devices are free, if it is to stop."""
        return self.stopped + self.pause

    def begun(self, now: float) -> int:
        """Steps that are done or under way."""
        if now > self.stopped:
            return self.stop_steps
        return max(0, min(self.steps, math.ceil((now - self.start) / self.step - _SLIP)))

    def boundary(self, now: float) -> float:
        """When the step under way ends: the end of it all where no steps are left."""
        begun = self.begun(now)
        return self.end if begun == self.steps else max(now, self.start + begun * self.step)


@dataclass
class Counts:
    """What happened in a group.

    Attributes:
        pauses: Times that something stopped to wait.
        changes: Changes of degree.
        moves: Times that something went on elsewhere, on as many devices.
        batched: Pictures that ran in a batch of several.
        busy: Device seconds in which something ran.
    """

    pauses: int = 0
    changes: int = 0
    moves: int = 0
    batched: int = 0
    busy: float = 0.0


class Group:
    """Runs what is decided for some devices, in simulated time.

    Args:
        devices: The devices.
        truth: What steps really take.
        measured: Told the shape, batch, degree and seconds a step of every batch that ran.
    """

    def __init__(
        self, devices: Iterable[int], truth: Costs, measured: Callable[[Shape, int, int, float], None] | None = None
    ) -> None:
        self.devices = tuple(devices)
        self.counts = Counts()
        self._truth, self._measured = truth, measured
        self._lives: dict[str, Live] = {}
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._busy: set[int] = set()
        self._pending: tuple[Run, ...] = ()

    def __len__(self) -> int:
        return len(self._lives)

    def add(self, request: Request) -> None:
        """A request has come."""
        self._lives[request.id] = Live(request, request.steps)

    def state(self, now: float) -> State:
        """What the scheduler is told."""
        return State(now, self.devices, tuple(_job(live, now) for live in self._lives.values()))

    def next_event(self) -> float:
        """When a batch ends or stops next; infinity if none runs."""
        return min((min(batch.end, batch.stop) for batch in self._batches.values()), default=_NEVER)

    def shortest_step(self) -> float:
        """The shortest step of the clips that run; infinity without any."""
        return min((batch.step for batch in self._batches.values() if batch.shape.kind == "clip"), default=_NEVER)

    def apply(self, decisions: Decisions, now: float) -> None:
        """Stops at their boundaries what should not go on, and starts what should run as devices come free."""
        wanted = {run.devices: frozenset(run.requests) for run in decisions.runs}
        for devices, batch in self._batches.items():
            goes_on = wanted.get(devices) == batch.ids or batch.begun(now) == batch.steps
            if goes_on:
                batch.stopped = _NEVER
            elif batch.stopped > now:  # else its devices are about to be free
                batch.stopped, batch.stop_steps = batch.boundary(now), batch.begun(now)
        self._pending = tuple(
            run for run in decisions.runs
            if run.devices not in self._batches or self._batches[run.devices].ids != frozenset(run.requests)
        )  # fmt: skip
        self.advance(now)

    def advance(self, now: float) -> list[Request]:
        """Ends and stops what is due, starts what waits for its devices, and gives the requests that are done."""
        done: list[Request] = []
        for batch in [one for one in self._batches.values() if min(one.end, one.stop) <= now + _SLIP]:
            if batch.end <= now + _SLIP:
                self._leave(batch, batch.steps, batch.end)
                for live in batch.lives:
                    del self._lives[live.request.id]
                    done.append(live.request)
            else:
                self._leave(batch, batch.stop_steps, batch.stop)
                self.counts.pauses += not any(batch.ids & set(run.requests) for run in self._pending)
        self._start(now)
        return done

    def _leave(self, batch: _Batch, steps: int, now: float) -> None:
        del self._batches[batch.devices]
        self._busy.difference_update(batch.devices)
        self.counts.busy += len(batch.devices) * (now - batch.start)
        if steps and self._measured is not None:
            self._measured(batch.shape, len(batch.lives), len(batch.devices), batch.step)
        for live in batch.lives:
            live.remaining -= steps
            live.status, live.batch = "paused", None

    def _start(self, now: float) -> None:
        waiting = []
        for run in self._pending:
            lives = [self._lives[name] for name in run.requests if name in self._lives]
            free = self._busy.isdisjoint(run.devices) and all(live.batch is None for live in lives)
            if lives and free:
                self._run(lives, run.devices, now)
            elif lives:
                waiting.append(run)
        self._pending = tuple(waiting)

    def _run(self, lives: list[Live], devices: tuple[int, ...], now: float) -> None:
        first, size, degree = lives[0], len(lives), len(devices)
        shape = first.request.shape
        paused = first.status == "paused"
        moved = paused and first.devices != devices
        switch = self._truth.switch(shape, len(first.devices) if moved else 0, degree, moved=moved)
        switch += 0.0 if paused else self._truth.starts(shape)
        step, ends = self._truth.step(shape, size, degree), self._truth.ends(shape, size)
        pause = self._truth.switch(shape, degree, 0)
        batch = _Batch(tuple(lives), devices, now + switch, step, first.remaining, ends, pause)
        self.counts.changes += moved and len(first.devices) != degree
        self.counts.moves += moved and len(first.devices) == degree
        self.counts.batched += size if size > 1 else 0
        for live in lives:
            live.status, live.devices, live.batch = "running", devices, batch
        self._batches[devices] = batch
        self._busy.update(devices)


def _job(live: Live, now: float) -> Job:
    batch = live.batch
    if batch is None:
        return Job(live.request, live.remaining, live.status, live.devices)
    left = live.remaining - batch.begun(now)
    return Job(live.request, left, "running", live.devices, batch.boundary(now))
