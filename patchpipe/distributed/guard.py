"""Notices on the control plane what a GPU's own waits cannot: that a rank has died, failed or fallen silent.

Over NCCL a wait orders streams, and the host runs ahead; a kernel that waits for a dead rank spins for ever. So a
thread of every rank looks on: at the store, where the first failure is told; at a connection to the next rank, which
breaks when that one dies; and at whether anything under way still makes progress. In trouble it aborts the
communicators. Stuck kernels end, the host wakes up, and the next thing it does on a wire raises the cause.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any

import torch

from patchpipe.errors import PatchpipeError

LOOK_SECONDS = 0.2  # between two looks
GRACE_SECONDS = 1.0  # for what is under way to end, after another rank has told of a failure
SETTLE_SECONDS = 0.0005  # between two looks of a host that waits for its device
LIFELINE_TAG = 3
FOR_EVER = timedelta(days=3650)  # else gloo takes the group's deadline


class Guard:
    """Watches over one rank's communicators.

    Args:
        timeout: Seconds without any progress after which a rank counts as silent.
        failure: The first failure another rank has told of, as the error to raise; ``None`` while there is none.
        explain: Turns a broken wait for the ranks named into the error to raise.
        abort: Aborts the communicators.

    Attributes:
        problem: Why they were aborted, if they were.
    """

    def __init__(
        self,
        timeout: float,
        failure: Callable[[], PatchpipeError | None],
        explain: Callable[[Exception, str], PatchpipeError],
        abort: Callable[[], None],
    ) -> None:
        self.problem: PatchpipeError | None = None
        self._timeout, self._failure, self._explain, self._abort = timeout, failure, explain, abort
        self._pending: deque[tuple[Any, str]] = deque()  # operations and the ranks they wait for, oldest first
        self._progress = monotonic()  # when one was last seen to have ended
        self._told: float | None = None  # when a failure was first seen
        self._ended, self._deciding, self._looking = threading.Event(), threading.Lock(), threading.Lock()
        threading.Thread(target=self._look_on, name="patchpipe guard", daemon=True).start()

    def began(self, work: Any, whom: str) -> None:
        """An operation is under way."""
        if not self._pending:
            self._progress = monotonic()
        self._pending.append((work, whom))

    def check(self) -> None:
        """Raises what went wrong, if anything did.

        Raises:
            PatchpipeError: The first cause.
        """
        if self.problem is not None:
            raise self.problem

    def settle(self) -> None:
        """Waits on the host until nothing is under way.

        Raises:
            PatchpipeError: A rank failed, died or fell silent meanwhile.
        """
        while self._waits_for() is not None:
            self.check()
            self._ended.wait(SETTLE_SECONDS)
        self.check()

    def watch(self, group: Any, after: int) -> None:
        """Holds a connection to the next rank, and notices when it breaks.

        Args:
            group: A gloo group of all ranks.
            after: The next rank.
        """
        threading.Thread(target=self._hold, args=(group, after), name="patchpipe lifeline", daemon=True).start()

    def give_up(self, problem: PatchpipeError) -> None:
        """Aborts the communicators, the first time it is called."""
        with self._deciding:
            if self.problem is None and not self._ended.is_set():
                self.problem = problem
                self._abort()

    def end(self) -> None:
        """Looks no more."""
        self._ended.set()
        with self._looking:
            self._pending.clear()

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_SECONDS) and self.problem is None:
            whom = self._waits_for()
            if whom is None:
                self._told = None
                continue
            failure, now = self._failure(), monotonic()
            if failure is not None:
                self._told = self._told or now
                if now - self._told > GRACE_SECONDS:
                    self.give_up(failure)
            elif now - self._progress > self._timeout:
                self.give_up(self._explain(TimeoutError("timed out"), whom))

    def _waits_for(self) -> str | None:
        """The ranks that the oldest operation under way waits for."""
        with self._looking:  # the host looks too, while it settles
            while self._pending:
                work, whom = self._pending[0]
                if not work.is_completed():
                    return whom
                self._progress = monotonic()
                self._pending.popleft()
        return None

    def _hold(self, group: Any, after: int) -> None:
        try:
            group.recv([torch.empty(1, dtype=torch.uint8)], after, LIFELINE_TAG).wait(FOR_EVER)
        except RuntimeError as error:
            if not self._ended.is_set():
                self.give_up(self._explain(error, f"rank {after}"))


def say_goodbye(group: Any, before: int) -> None:
    """Lets the rank before know that this one leaves of its own will."""
    with suppress(RuntimeError):  # it has gone first
        group.send([torch.zeros(1, dtype=torch.uint8)], before, LIFELINE_TAG).wait(timedelta(seconds=1))
