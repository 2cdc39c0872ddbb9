"""A clock that goes on when every thread waits: what threads do in turns takes the same time on any machine.

A thread sleeps on the clock, or waits on a condition of the clock. When all of them do, the clock jumps to the moment
at which the first one wakes. Work costs nothing, only sleep does.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest import mock

from patchpipe.distributed import gate as gates
from patchpipe.distributed.gate import Gate
from patchpipe.offload import mover as movers
from patchpipe.offload.mover import Mover


class _Wait:
    """One thread that waits."""

    def __init__(self) -> None:
        self.event, self.over = threading.Event(), False


class VirtualClock:
    """The clock. The thread that makes it is the first that it counts."""

    def __init__(self) -> None:
        self._now, self._awake, self._lock = 0.0, 1, threading.Lock()
        self._timers: list[tuple[float, int, _Wait]] = []
        self._numbers = count()

    def now(self) -> float:
        """Seconds since it was made."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Wakes so much later."""
        wait = _Wait()
        self.begin(wait, seconds)
        wait.event.wait()

    def begin(self, wait: _Wait, seconds: float | None) -> None:
        """A thread is about to wait, for so long at most."""
        with self._lock:
            if seconds is not None:
                heapq.heappush(self._timers, (self._now + seconds, next(self._numbers), wait))
            self._awake -= 1
            self._go_on()

    def wake(self, wait: _Wait) -> None:
        """Another thread ends a wait."""
        with self._lock:
            self._wake(wait)

    def _wake(self, wait: _Wait) -> None:
        if not wait.over:
            wait.over = True
            self._awake += 1
            wait.event.set()

    def _go_on(self) -> None:
        while self._awake == 0 and self._timers:
            moment, _, wait = heapq.heappop(self._timers)
            if not wait.over:
                self._now = moment
                self._wake(wait)

    def start(self, run: Callable[[], None]) -> threading.Thread:
        """Starts a thread that counts."""

        def counted() -> None:
            try:
                run()
            finally:
                with self._lock:
                    self._awake -= 1
                    self._go_on()

        with self._lock:
            self._awake += 1
        thread = threading.Thread(target=counted, daemon=True)
        thread.start()
        return thread

    @contextmanager
    def of(self, mover: Mover, gate: Gate) -> Iterator[None]:
        """A mover and a gate live by this clock."""
        mover._changed, gate._changed = _Condition(self), _Condition(self)  # type: ignore[assignment]

        def start() -> None:
            if mover._thread is None:
                mover._thread = self.start(lambda: movers.work(weakref.ref(mover), mover._changed))

        with (
            mock.patch.object(mover, "_start", start),
            mock.patch.object(movers, "perf_counter", self.now),
            mock.patch.object(gates, "perf_counter", self.now),
        ):
            yield
            self._close(mover)

    def _close(self, mover: Mover) -> None:
        """Ends a mover's thread, which may be asleep: meanwhile this one counts as waiting."""
        with mover._changed:
            mover._closed = True
            mover._changed.notify_all()
        wait = _Wait()
        self.begin(wait, None)
        if mover._thread is not None:
            mover._thread.join()
        self.wake(wait)


class _Condition:
    """``threading.Condition``, as far as movers and gates use it."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock, self._lock = clock, threading.RLock()
        self._waits: list[_Wait] = []

    def __enter__(self) -> Any:
        return self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)

    def wait(self, timeout: float | None = None) -> bool:
        wait = _Wait()
        self._waits.append(wait)
        state = self._lock._release_save()  # type: ignore[attr-defined]
        self._clock.begin(wait, timeout)
        wait.event.wait()
        self._lock._acquire_restore(state)  # type: ignore[attr-defined]
        timed_out = wait in self._waits
        if timed_out:
            self._waits.remove(wait)
        return not timed_out

    def notify_all(self) -> None:
        waits, self._waits = self._waits, []
        for wait in waits:
            self._clock.wake(wait)
