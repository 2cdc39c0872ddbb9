"""What a worker was sent about requests of a stream, kept until it comes to them."""

from __future__ import annotations

import threading
import time
from collections import deque

from patchpipe.engine.messages import Direct, Submit
from patchpipe.errors import RankLost

MOST = 8  # orders that are taken at once


class Letters:
    """Read by the thread that serves the stream, filled by the one that reads the channel."""

    def __init__(self) -> None:
        self._orders: deque[Direct | Submit] = deque()
        self._calls: dict[tuple[int, int], Submit] = {}
        self._come = threading.Condition()

    def put(self, letter: Direct | Submit) -> None:
        """Takes one in."""
        with self._come:
            if isinstance(letter, Submit):
                self._calls[letter.request, letter.ticket] = letter
            self._orders.append(letter)
            self._come.notify_all()

    def orders(self, request: int, seconds: float) -> list[Direct | Submit]:
        """Those of a stream that came since, in order; waits a while for the first.

        Args:
            request: The stream's number; what was meant for an earlier one is dropped.
            seconds: How long to wait.
        """
        with self._come:
            self._come.wait_for(lambda: any(each.request >= request for each in self._orders), seconds)
            found: list[Direct | Submit] = []
            while self._orders and self._orders[0].request <= request and len(found) < MOST:
                letter = self._orders.popleft()
                if letter.request == request:
                    found.append(letter)
            return found

    def call(self, request: int, ticket: int, timeout: float) -> Submit:
        """Waits for the call of a request, and takes it.

        Raises:
            RankLost: It does not come.
        """
        deadline = time.monotonic() + timeout
        with self._come:
            while (request, ticket) not in self._calls:
                if not self._come.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    raise RankLost(f"request {ticket} is to join, but its call did not come within {timeout:g} s")
            for key in [key for key in self._calls if key[0] < request]:
                del self._calls[key]
            return self._calls.pop((request, ticket))
