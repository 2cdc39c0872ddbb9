"""What a caller holds of a request that runs beside others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from patchpipe.engine.messages import Call
from patchpipe.engine.requests import OwnSeed
from patchpipe.engine.results import OnProgress, Progress, Result, result_of
from patchpipe.engine.tickets.checkpoint import Checkpoint
from patchpipe.errors import PatchpipeError
from patchpipe.schedule.steps.verbs import Verb

State = Literal["waiting", "running", "paused", "moving", "done", "failed", "cancelled", "saved"]
Keep = Literal["device", "host", "nothing"]
OVER: tuple[State, ...] = ("done", "failed", "cancelled", "saved")
KEEP: tuple[Keep, ...] = ("device", "host", "nothing")


class Director(Protocol):
    """Who passes on what a ticket is asked for."""

    def pause(self, ticket: Ticket, keep: Keep) -> None:
        """See ``Ticket.pause``."""
        raise NotImplementedError

    def resume(self, ticket: Ticket) -> None:
        """See ``Ticket.resume``."""
        raise NotImplementedError

    def cancel(self, ticket: Ticket) -> None:
        """See ``Ticket.cancel``."""
        raise NotImplementedError

    def save(self, ticket: Ticket) -> None:
        """See ``Ticket.checkpoint``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Asked:
    """What a request was asked for.

    Attributes:
        arguments: The pipeline's arguments by name, and ``seed``.
        call: The same as it travels.
        seed: The seed used.
        state: What it goes on from, if it has begun before.
        on_progress: Called after each step.
        on_state: Called when its state changes.
    """

    arguments: Mapping[str, Any]
    call: Call
    seed: OwnSeed
    state: bytes | None = None
    on_progress: OnProgress | None = None
    on_state: Callable[[Ticket], None] | None = None


class Ticket:
    """A request that runs beside others of the engine; ``Engine.submit`` gives it.

    What is asked of it (``pause``, ``resume``, ``cancel``) returns at once and takes effect when the step under way is
    over, on all ranks at the same step. ``wait_for`` waits for that. Any thread may use it.

    Args:
        number: Its number.
        asked: What it was asked for.

    Attributes:
        number: Its number, in the order of submission.
        arguments: What it was submitted with: ``engine.submit(**ticket.arguments)`` asks for the same once more.
        step: Steps that are over.
        problem: Why it could not be carried elsewhere, if it was asked to be.
    """

    def __init__(self, number: int, asked: Asked) -> None:
        self.number, self.arguments, self.step = number, asked.arguments, 0
        self.asked = asked
        self.problem: BaseException | None = None
        self.mover: Callable[[Ticket, Sequence[int]], None]
        self.director: Director  # that of the ranks which serve it
        self.wishes: list[tuple[Verb, int]] = []  # what it was asked for before any worker knew it
        self._state: State = "waiting"
        self._changed = threading.Condition()
        self._began = time.monotonic()
        self._result: Result | None = None
        self._checkpoint: Checkpoint | None = None
        self._error: BaseException | None = None

    @property
    def state(self) -> State:
        """``"waiting"`` until it is prepared, ``"running"``, ``"paused"``, ``"moving"``; at last one of ``over``."""
        return self._state

    @property
    def over(self) -> bool:
        """Whether it is ``"done"``, ``"failed"``, ``"cancelled"``, or ``"saved"`` by ``checkpoint``."""
        return self._state in OVER

    def pause(self, keep: Keep = "device") -> None:
        """Holds it after the step it is in; a request whose last step has begun is not held, and gives its picture.

        Args:
            keep: Where its keys and values stay meanwhile. On the ``"device"`` or in the ``"host"``'s memory, it paints
                to the bit what it would have painted. With ``"nothing"`` they are let go, and it goes on with one
                synchronous step; ``Result.stats["resumed"]`` says so. Called again while it is paused, it moves them.

        Raises:
            ValueError: There is no such place.
        """
        if keep not in KEEP:
            raise ValueError(f"keep={keep!r} must be one of {', '.join(map(repr, KEEP))}")
        self.director.pause(self, keep)

    def resume(self) -> None:
        """Lets it go on, or takes a ``pause`` back that has not taken effect."""
        self.director.resume(self)

    def cancel(self) -> None:
        """Ends it; ``result`` then raises ``Cancelled``. One whose last step has begun gives its picture."""
        self.director.cancel(self)

    def checkpoint(self, timeout: float | None = None) -> Checkpoint:
        """Ends it after the step it is in and gives its state, for ``Engine.submit`` of this engine or another.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            ValueError: Its pipeline or scheduler keeps more than can be carried; it goes on as it was.
            PatchpipeError: It was over before.
            TimeoutError: It takes longer.
        """
        self.problem = None
        self.director.save(self)
        with self._changed:
            self._wait(lambda: self.over or self.problem is not None, timeout, "to be saved")
        if self._checkpoint is not None:
            return self._checkpoint
        raise self.problem or _no_state(self._state)

    def move(self, ranks: Sequence[int]) -> None:
        """Has it go on with other ranks of an ``Elastic`` engine from its next step on, paused or not; returns at once.

        Args:
            ranks: One, or two, four, … neighbours.

        Raises:
            ValueError: These cannot share a request, or the engine is not elastic.
        """
        self.mover(self, ranks)

    def result(self, timeout: float | None = None) -> Result:
        """What it came to; waits for it.

        Args:
            timeout: Seconds to wait; a paused request is waited for too.

        Raises:
            Exception: What ended it; see ``Engine.generate``.
            PatchpipeError: It was saved to go on elsewhere.
            TimeoutError: It takes longer.
        """
        with self._changed:
            self._wait(lambda: self.over, timeout, "to end")
        if self._result is not None:
            return self._result
        raise self._error or _no_state(self._state)

    def wait_for(self, *states: State, timeout: float | None = None) -> State:
        """Waits until it is in one of some states, or over.

        Args:
            states: The states; none waits until it is over.
            timeout: Seconds to wait.

        Returns:
            The state it is in.

        Raises:
            TimeoutError: It takes longer.
        """
        with self._changed:
            self._wait(lambda: self.over or self._state in states, timeout, f"to be {' or '.join(states) or 'over'}")
            return self._state

    def _wait(self, until: Callable[[], bool], timeout: float | None, what: str) -> None:
        if not self._changed.wait_for(until, timeout):
            raise TimeoutError(f"request {self.number} is {self._state} and took more than {timeout:g} s {what}")

    # -- what has become of it -------------------------------------------------------------------

    def become(self, state: State, step: int | None = None, error: BaseException | None = None) -> None:
        """Its state has changed; called by the engine."""
        with self._changed:
            if self.over:
                return
            changed, self._state = state != self._state, state
            self.step, self._error = self.step if step is None else step, error
            self._changed.notify_all()
        if changed and self.asked.on_state is not None:
            self.asked.on_state(self)

    def progressed(self, progress: Progress) -> None:
        """A step is over; called by the engine."""
        self.step = progress.step
        if self.asked.on_progress is not None:
            self.asked.on_progress(progress)

    def finish(self, output: Any, stats: Mapping[str, Any]) -> None:
        """It has its picture; called by the engine."""
        self._result = result_of(output, time.monotonic() - self._began, stats, self.asked.seed)
        self.become("done")

    def leave(self, state: bytes) -> None:
        """It goes on elsewhere; called by the engine."""
        self._checkpoint = Checkpoint(state)
        self.become("saved", self._checkpoint.step)

    def go_on_from(self, state: bytes) -> None:
        """It goes on with other ranks; called by the engine."""
        self.asked = replace(self.asked, state=state)
        self.wishes = []
        self.become("moving")

    def stay(self, error: BaseException) -> None:
        """It cannot be carried elsewhere; called by the engine."""
        with self._changed:
            self.problem = error
            self._changed.notify_all()

    def __repr__(self) -> str:
        return f"Ticket({self.number}, {self._state}, step {self.step})"


def _no_state(state: State) -> Exception:
    if state == "saved":
        return PatchpipeError("the request was saved and ended here: submit it again with its checkpoint")
    return PatchpipeError(f"the request is {state}, and there is nothing to save")
