"""Lets one of several threads run at a time, in turn, so that what they do has one order."""

from __future__ import annotations

import threading

from patchpipe.errors import RankLost

IDLE = -1  # who has the baton while nobody is in the round


class Grounded(BaseException):
    """Ends a request's thread because another request has failed."""


class Baton:
    """Lets one thread at a time run, in turn.

    Args:
        runners: How many threads there are, numbered from 0, which begins; others may come later.
        timeout: Seconds a thread may keep it before those that wait give up; ``None`` for no limit.

    Attributes:
        holder: The thread that may run; ``IDLE`` where nobody is in the round.
    """

    def __init__(self, runners: int, timeout: float | None) -> None:
        self.holder = 0 if runners else IDLE
        self._round = list(range(runners))
        self._timeout, self._passes, self._dropped = timeout, 0, False
        self._moved = threading.Condition()

    def take(self, runner: int) -> None:
        """Waits for the baton.

        Raises:
            RankLost: The one that has it kept it too long.
        """
        with self._moved:
            while self.holder != runner and not self._dropped:
                passes = self._passes
                if not self._moved.wait(self._timeout) and passes == self._passes:
                    raise RankLost(
                        f"request {self.holder + 1} did not let the others go on within {self._timeout:g} s: "
                        f"a longer timeout may help"
                    )
            if self._dropped:
                raise Grounded

    def pass_on(self) -> None:
        """Gives it to the next in the round."""
        with self._moved:
            place = self._round.index(self.holder) + 1 if self.holder in self._round else 0
            self._hand(self._round[place % len(self._round)] if self._round else IDLE)

    def join(self, runner: int) -> None:
        """Takes a runner into the round, as the last one."""
        with self._moved:
            self._round.append(runner)

    def beat(self) -> None:
        """Tells those that wait that whoever has it is there, though nothing is to be done."""
        with self._moved:
            self._passes += 1

    def leave(self, runner: int) -> None:
        """Takes a runner out of the round, for good or for now; if it has the baton, the next gets it."""
        with self._moved:
            if runner not in self._round:
                return
            place = self._round.index(runner)
            self._round.remove(runner)
            if self.holder == runner:
                self._hand(self._round[place % len(self._round)] if self._round else IDLE)
            self._moved.notify_all()

    def wait_until_left(self, timeout: float | None = None) -> None:
        """Waits until every runner has left the round, or as long as ``timeout`` seconds."""
        with self._moved:
            self._moved.wait_for(lambda: not self._round, timeout)

    def drop(self) -> None:
        """Ends the round: whoever waits or will wait is grounded."""
        with self._moved:
            self._dropped = True
            self._moved.notify_all()

    def _hand(self, runner: int) -> None:
        self.holder = runner
        self._passes += 1
        self._moved.notify_all()
