"""Where the ranks write to each other about one request: a few small notes on the store they met at."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.mesh import Group
from patchpipe.errors import RankFailed, RankLost
from patchpipe.lockstep.inputs import first_difference

HAND_OVER_SECONDS = 0.02  # between looks at whether something was handed over
SLICE_SECONDS = 0.5  # of waiting, between looks at who has left
LEFT = "left"  # where a rank tells that its program has ended


class Board:
    """What ranks tell each other about one request.

    Args:
        group: The ranks.
        number: The request's number; all ranks count alike.
    """

    def __init__(self, group: Group, number: int) -> None:
        assert group.store is not None
        self.rank, self.world_size = group.rank, group.world_size
        self.timeout = group.config.timeout
        self._failed_to_load = group.failures.failed_to_load
        self._store: dist.Store = group.store
        self._prefix = f"request/{number}"
        self._mine: set[str] = set()

    def tell(self, topic: str, what: Any) -> None:
        """Writes this rank's note on a topic, plain data, over an earlier one."""
        self._put(f"{topic}/{self.rank}", what)

    def _put(self, topic: str, what: Any) -> None:
        key = f"{self._prefix}/{topic}"
        self._mine.add(key)
        self._store.set(key, json.dumps(what))

    def tell_first(self, topic: str, what: Any) -> Any:
        """Writes a note that is one for all ranks, unless one is there; gives what is there."""
        key = f"{self._prefix}/{topic}"
        self._mine.add(key)
        return json.loads(self._store.compare_set(key, "", json.dumps(what)))

    def read(self, topic: str) -> Any:
        """A note that is one for all ranks; ``None`` where there is none."""
        key = f"{self._prefix}/{topic}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def note(self, topic: str, what: Any) -> None:
        """Writes a note that is one for all ranks, which no other rank writes."""
        self._put(topic, what)

    def hear(self, topic: str, failed: Callable[[], Exception | None]) -> Any:
        """Waits for a note that is one for all ranks; ``None`` if it does not come within the timeout.

        Args:
            topic: Of the note.
            failed: Gives the failure of another rank, for which nobody need wait any longer.

        Raises:
            Exception: That failure.
        """
        key, deadline = f"{self._prefix}/{topic}", time.monotonic() + self.timeout
        while not self._store.check([key]):
            failure = failed()
            if failure is not None:
                raise failure
            if time.monotonic() >= deadline:
                return None
            try:
                self._store.wait([key], timedelta(seconds=SLICE_SECONDS))
            except dist.DistStoreError:
                continue
        return json.loads(self._store.get(key))

    def told(self, topic: str, ranks: Collection[int] | None = None) -> list[Any] | None:
        """Every rank's note, or that of some ranks; ``None`` until all are there."""
        keys = [f"{self._prefix}/{topic}/{rank}" for rank in (range(self.world_size) if ranks is None else ranks)]
        if not self._store.check(keys):
            return None
        return [json.loads(found) for found in self._store.multi_get(keys)]

    def hear_all(self, topic: str, explain: Callable[[int], Exception]) -> list[Any]:
        """Waits for every rank's note.

        Args:
            topic: Of the notes.
            explain: The error for a rank that has not written one within the timeout.

        Raises:
            RankFailed: One of them has failed before any request.
            RankLost: One of them has left.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            patience = min(SLICE_SECONDS, max(0.01, deadline - time.monotonic()))
            missing = self._wait_for(topic, patience)
            if missing is None:
                found = self.told(topic)
                assert found is not None
                return found
            failure = self._failed_to_load()
            if failure is not None:
                raise failure
            if self._store.check([f"{LEFT}/{missing}"]):
                raise RankLost(
                    f"rank {missing} has ended its program, or has restored the pipeline, while rank {self.rank} "
                    f"calls it: every rank must call the pipeline, not only the one that keeps the picture"
                )
            if time.monotonic() >= deadline:
                raise explain(missing)

    def _wait_for(self, topic: str, seconds: float) -> int | None:
        """The first rank with no note on a topic after a while."""
        keys = [f"{self._prefix}/{topic}/{rank}" for rank in range(self.world_size)]
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
            return None
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            return missing[0] if missing else None

    def hand_over(self, topic: str, data: bytes) -> None:
        """Leaves data for one other rank to take."""
        key = f"{self._prefix}/{topic}"
        self._mine.add(key)
        self._store.set(key, data)

    def taken_over(self, topic: str, given_up: threading.Event) -> bytes:
        """Waits for what another rank hands over, and takes it.

        Args:
            topic: Of the data.
            given_up: Set when it is wanted no more.

        Raises:
            RankLost: It does not come.
        """
        key = f"{self._prefix}/{topic}"
        deadline = time.monotonic() + self.timeout
        while not self._store.check([key]):
            if given_up.is_set() or time.monotonic() > deadline:
                raise RankLost(f"nobody handed over {topic} within {self.timeout:g} s")
            time.sleep(HAND_OVER_SECONDS)
        data = self._store.get(key)
        self._store.delete_key(key)
        return data

    def withdraw(self, topic: str) -> None:
        """Takes this rank's note on a topic away; when all ranks have read it."""
        key = f"{self._prefix}/{topic}/{self.rank}"
        self._store.delete_key(key)
        self._mine.discard(key)

    def forget(self) -> None:
        """Takes this rank's notes away; when all ranks have ended the request."""
        for key in self._mine:
            self._store.delete_key(key)
        self._mine.clear()


def say_goodbye(store: dist.Store, rank: int) -> None:
    """Tells the others that this rank will not come to another request."""
    attempt(lambda: store.set(f"{LEFT}/{rank}", "left"))  # where the store is gone, so are they


def agree_on_calls(
    board: Board, topic: str, told: Sequence[Any], problem: Exception | None, stale: Board | None = None
) -> None:
    """Checks that every rank was called alike, and that none has found a reason not to go on.

    Args:
        board: Of the request.
        topic: Names the call.
        told: What each of this rank's calls was given.
        problem: Why this rank cannot go on, if it cannot.
        stale: Of the request before, which all ranks have ended when they have come to this one.

    Raises:
        ValueError: Ranks were called differently; every rank raises the same text.
        Exception: This rank's problem.
        RankFailed: Another rank has one that this one has not.
        RankLost: A rank did not call, or has left.
    """
    board.tell(topic, [told, f"{type(problem).__name__}: {problem}" if problem else None])
    heard = board.hear_all(topic, lambda missing: _no_call(board, missing))
    if stale is not None:
        stale.forget()
    found = first_difference([calls for calls, _ in heard])
    if found is not None:
        raise ValueError(
            f"the ranks were called differently: {found}. Every rank must make the same call: what is drawn at random "
            f"or read on one rank must be given to the others first, for example with "
            f"torch.distributed.broadcast_object_list"
        )
    if problem is not None:
        raise problem
    for other, (_, text) in enumerate(heard):
        if text:
            raise RankFailed(f"rank {other} failed first: {text}")


def _no_call(board: Board, missing: int) -> RankLost:
    return RankLost(
        f"rank {board.rank} calls the pipeline, but rank {missing} has not called it within {board.timeout:g} s "
        f"(timeout={board.timeout:g}): every rank must call it, not only the one that keeps the picture"
    )
