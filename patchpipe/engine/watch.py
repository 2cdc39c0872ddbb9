"""Waits for an answer from every worker: with progress, deadlines and the first cause of a failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from patchpipe.engine import failures
from patchpipe.engine.failures import Failure
from patchpipe.engine.messages import Failed, Previewed, Step, Warned
from patchpipe.engine.processes import Worker

logger = logging.getLogger("patchpipe.engine")

SETTLE_CONSEQUENCE = 1.0
SETTLE_CLEAN = 10.0
SILENCE_GRACE = 10.0


@dataclass(frozen=True)
class Outcome:
    """What came of a wait: one answer for each rank, or a failure.

    Attributes:
        answers: The message each rank ended with, in order of rank.
        failure: What went wrong first, if anything.
        usable: Whether the workers can serve another request.
    """

    answers: list[Any]
    failure: Failure | None
    usable: bool


class Watch:
    """One wait for the ``expected`` message of one request from all workers.

    Args:
        workers: The workers.
        devices: The device of every rank, for error messages.
        expected: The class of the message that ends the wait for a rank.
        request: The request's number; messages of other requests are dropped.
        activity: What the workers are doing, for error messages.
        silence: Seconds without any message after which the wait is given up.
        on_step: Called with the rank and each step it tells of.
        on_preview: Called with each preview.
        on_other: Called with each message of another kind.

    Attributes:
        ending: Whether the request was cancelled, so that steps are told no more.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        devices: Sequence[str],
        expected: type,
        request: int,
        activity: str,
        silence: float,
        on_step: Callable[[int, Step], None] | None = None,
        on_preview: Callable[[Previewed], None] | None = None,
        on_other: Callable[[Any], None] | None = None,
    ) -> None:
        self._workers = {worker.channel.connection: worker for worker in workers}
        self._ranks = [worker.rank for worker in workers]
        self._devices = devices
        self._expected = expected
        self._request = request
        self._activity = activity
        self._silence = silence
        self._on_step, self._on_preview, self._on_other = on_step, on_preview, on_other
        self._answers: dict[int, Any] = {}
        self._failures: list[Failure] = []
        self._warnings: set[str] = set()
        self._steps: dict[int, Step] = {}
        self._heard = time.monotonic()
        self._settled = float("inf")
        self.ending = False

    def run(self) -> Outcome:
        """Waits until every rank has answered or the failure to report is known."""
        while not self._finished():
            ready = connection.wait(list(self._workers), self._patience())
            for channel in ready:
                self._read(self._workers[channel])  # type: ignore[index]
            if ready:
                self._heard = time.monotonic()
            elif not self._failures and time.monotonic() - self._heard >= self._silence:
                self._fail(failures.from_silence(self._waiting(), self._silence, self._doing(self._waiting()[0])))
        answers = [self._answers[rank] for rank in sorted(self._answers)]
        failure = failures.first_cause(self._failures) if self._failures else None
        return Outcome(answers, failure, failure is None or self._all_clean())

    def _finished(self) -> bool:
        if not self._failures:
            return not self._waiting()
        if any(failure.weight == failures.CAUSE and not failure.clean for failure in self._failures):
            return True
        return not self._waiting() or time.monotonic() >= self._settled

    def _patience(self) -> float:
        deadline = min(self._heard + self._silence, self._settled)
        return max(0.0, deadline - time.monotonic())

    def _read(self, worker: Worker) -> None:
        try:
            message = worker.channel.receive()
        except EOFError:
            del self._workers[worker.channel.connection]
            self._fail(failures.from_death(worker, self._doing(worker.rank)))
            return
        if message.request != self._request:
            return
        if isinstance(message, Warned):
            self._warn(message.text)
        elif isinstance(message, Step):
            self._steps[worker.rank] = message
            if self._on_step is not None and not self._failures and not self.ending:
                self._on_step(worker.rank, message)
        elif isinstance(message, Previewed):
            if self._on_preview is not None and not self._failures and not self.ending:
                self._on_preview(message)
        elif isinstance(message, Failed):
            self._fail(failures.from_message(worker, self._devices[worker.rank], message))
        elif isinstance(message, self._expected):
            self._answers[worker.rank] = message
        elif self._on_other is not None:
            self._on_other(message)

    def _warn(self, text: str) -> None:
        """Passes a warning on, once where several ranks have it."""
        if text not in self._warnings:
            self._warnings.add(text)
            logger.warning("%s", text)

    def _fail(self, failure: Failure) -> None:
        self._failures.append(failure)
        wait = SETTLE_CLEAN if failure.clean else SETTLE_CONSEQUENCE
        self._settled = min(self._settled, time.monotonic() + wait)

    def _give_up(self) -> None:
        silent = self._waiting()
        self._fail(failures.from_silence(silent, self._silence, self._doing(silent[0])))

    def _waiting(self) -> list[int]:
        failed = {failure.rank for failure in self._failures}
        return [rank for rank in self._ranks if rank not in self._answers and rank not in failed]

    def _all_clean(self) -> bool:
        return not self._waiting() and all(failure.clean for failure in self._failures)

    def _doing(self, rank: int) -> str:
        step = self._steps.get(rank)
        if step is None:
            return self._activity
        return f"{self._activity}, after step {step.step}" + (f" of {step.total}" if step.total else "")
