"""The points of a request's program that all ranks pass in the same order, and how they stop at the same one.

Calls of the transformer and all else that ranks do together are counted. A rank that is to stop early (cancelled,
or a callback raised) cannot just stop: others may be waiting for what it owes them. So every rank is told, says which
point it has begun, and begins no other until all have said so. Then all go on to the furthest point that any of them
has begun, and end there: nothing is under way, and the pipeline can serve the next request. While nobody stops, a point
costs a lock and a number; a thread of each rank looks at the store ten times a second.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from patchpipe.distributed.agreement import attempt
from patchpipe.errors import CANCELLED, Cancelled, PatchpipeError, RankFailed, RankLost
from patchpipe.lockstep.board import Board
from patchpipe.lockstep.meeting import ROLL_CALL, check_meeting

LOOK_SECONDS = 0.1  # between looks at whether the request is to stop
STOP_SECONDS = 10.0  # for all ranks to say where they are
ALIKE_SECONDS = 3.0  # for the ranks that share a stage to fail alike
POLL_SECONDS = 0.005
RECENT = 64  # points whose names are kept


class Points:
    """What this rank has begun of a request, or of several in flight together.

    Args:
        board: Where ranks write to each other; ``None`` for a single rank.

    Attributes:
        begun: Points so far; the last one may not be finished.
        depth: How many requests are inside one another, 0 when there is none under way.
    """

    def __init__(self, board: Board | None) -> None:
        self.board, self.begun, self.depth = board, 0, 0
        self._unfinished = self._held = self._over = self._some_are_over = self._ended = self._parted = False
        self._names: deque[tuple[int, str]] = deque(maxlen=RECENT)  # of the last points
        self._stop: int | None = None
        self._why: dict[str, Any] = {"rank": None, "text": CANCELLED}
        self._ending: Exception | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._watcher: threading.Thread | None = None

    # -- passing points --------------------------------------------------------------------------

    def begin(self, name: str = "goes on") -> None:
        """Goes on to the next point.

        Args:
            name: What this rank does there, in words that follow "rank 0".

        Raises:
            Cancelled: The request was cancelled, and all ranks end here.
            RankFailed: Another rank failed, and all ranks end here.
        """
        with self._lock:
            if not self._held or self._ended:
                self._go_on(name)
                return
        if self.begun >= self._stopping_point():
            raise self._how_it_ends()
        self._go_on(name)

    def _go_on(self, name: str) -> None:
        self.begun += 1
        self._unfinished = True
        self._names.append((self.begun, name))

    def finish(self) -> None:
        """This rank has done its part at the point it began."""
        self._unfinished = False

    @contextmanager
    def passing(self, name: str = "goes on") -> Iterator[None]:
        """The extent of something all ranks do together, which raises the same on all of them or breaks.

        Args:
            name: See ``begin``.
        """
        self.begin(name)
        try:
            yield
        except Exception as error:
            self._unfinished = _broken(error)
            raise
        self.finish()

    def meet(self, provenance: int = 0) -> None:
        """Makes sure that all ranks have come to the same point, before one waits for another in vain.

        Args:
            provenance: How what they are about to share was computed.

        Raises:
            ValueError: Another rank is elsewhere, or has computed it otherwise; both are told.
        """
        if self.board is None or self._ended:
            return
        try:
            check_meeting(self.board, self.begun, [*self._names][-1][1], provenance)
        except ValueError:
            self._parted = True
            raise

    def end(self) -> None:
        """This rank's part of the request is over; from here on it cannot be stopped.

        Raises:
            Cancelled: The request was cancelled before any rank came here.
            RankFailed: Another rank failed before.
        """
        if self.depth > 1:
            return  # of one inside another
        with self._lock:
            self._over = not self._held
        if not self._over:
            self._stopping_point()
            if not self._some_are_over:
                raise self._how_it_ends()
        elif self.board is not None:
            self.board.tell("at", [self.begun, True])  # should others be about to stop

    # -- stopping --------------------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """In the block, this rank notices when another wants to stop."""
        if self.depth:
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
            return
        self.depth = 1
        if self.board is not None:
            self._watcher = threading.Thread(target=self._watch, name="stop watcher", daemon=True)
            self._watcher.start()
        try:
            yield
        finally:
            self.depth, self._ended = 0, True
            self._wake.set()
            if self._watcher is not None:
                self._watcher.join(1.0)

    def cancel(self, reason: str = CANCELLED) -> bool:
        """Stops the request at the next point, on all ranks; from any thread, and safe to call again.

        Returns:
            Whether there was anything to stop.
        """
        if self._ended:
            return False
        self._ask_to_stop({"rank": None, "text": reason})
        return True

    def fail(self, error: BaseException) -> bool:
        """Ends the request on all ranks because this one cannot go on.

        Returns:
            Whether all ranks end at the same point: nothing will be missing, and what is under way can be awaited.
        """
        if self.board is None or error is self._ending:
            return True
        if _broken(error):
            return False
        self._ask_to_stop({"rank": self.board.rank, "text": f"{type(error).__name__}: {error}"})
        if self._unfinished or self._parted:
            return False
        stop, problem = attempt(self._stopping_point)
        return problem is None and self.begun == stop

    def fail_inside(self, error: Exception, mates: Collection[int]) -> bool:
        """The same in the middle of a point, before this rank has done its part.

        Args:
            error: Why it cannot go on.
            mates: Ranks that wait for this one inside the point, unless they fail alike.

        Returns:
            Whether the request can end after this point, once this rank has sent the others something in place of
            what it owes them.
        """
        if self.board is None or _broken(error):
            return False
        self.board.tell("failed", self.begun)
        self._ask_to_stop({"rank": self.board.rank, "text": f"{type(error).__name__}: {error}"})
        stop, problem = attempt(self._stopping_point)
        return problem is None and self.begun == stop and self._failed_alike(mates)

    def _failed_alike(self, mates: Collection[int]) -> bool:
        assert self.board is not None
        deadline = time.monotonic() + ALIKE_SECONDS
        while (told := self.board.told("failed", mates)) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return all(each == self.begun for each in told)

    def _ask_to_stop(self, why: dict[str, Any]) -> None:
        self._why = why if self.board is None else self.board.tell_first("stop", why)
        self._hold()

    def _hold(self) -> None:
        """From here on this rank begins nothing before all have said where they are."""
        with self._lock:
            if self._held:
                return
            self._held = True
        if self.board is not None and not self._ended:
            self.board.tell("at", [self.begun, self._over])

    def _watch(self) -> None:
        while not self._ended:
            self._wake.wait(LOOK_SECONDS)
            asked, problem = attempt(self._look)
            if problem is not None:
                return  # the store is gone, and with it the other ranks: waits will tell
            if asked:
                self._hold()

    def _look(self) -> bool:
        assert self.board is not None
        if self._ended:
            return False
        if self.board.read(ROLL_CALL) is not None:
            self.board.tell(ROLL_CALL, [*self._names])
        found = None if self._held else self.board.read("stop")
        self._why = found or self._why
        return found is not None

    def _stopping_point(self) -> int:
        """The furthest point any rank has begun, once all have said so."""
        if self._stop is None:
            told = [(self.begun, False)] if self.board is None else self._hear_where_all_are(self.board)
            self._some_are_over = any(over for _, over in told)
            self._stop = max(begun for begun, _ in told)
        return self._stop

    def _hear_where_all_are(self, board: Board) -> list[tuple[int, bool]]:
        deadline = time.monotonic() + min(STOP_SECONDS, board.timeout)
        while (told := board.told("at")) is None:
            if time.monotonic() > deadline:
                late = f"a rank did not say where it is within {STOP_SECONDS:g} s"
                raise RankLost(f"{self._first_cause}, and {late}")
            time.sleep(POLL_SECONDS)
        return [(begun, over) for begun, over in told]

    @property
    def _first_cause(self) -> str:
        rank, text = self._why["rank"], self._why["text"]
        return str(text) if rank is None else f"rank {rank} failed first: {text}"

    def _how_it_ends(self) -> Exception:
        if self._ending is None:
            self._ending = (Cancelled if self._why["rank"] is None else RankFailed)(self._first_cause)
        return self._ending


def _broken(error: BaseException) -> bool:
    """Whether an error tells that ranks can no longer hear each other, or that one of them has failed."""
    if isinstance(error, RankLost):
        return True
    return isinstance(error, PatchpipeError) and " failed first: " in str(error)
