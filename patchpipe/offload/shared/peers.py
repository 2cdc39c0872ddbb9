"""What ranks that hold the same weights tell each other, on the store where all ranks met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist

from patchpipe.distributed.failures import Failures

FIRST_LOOK, LONGEST_LOOK = 0.0005, 0.02  # seconds between two looks at the store


class Peers:
    """Ranks that tell each other things, none of which is waited for without end.

    Args:
        store: Where the ranks meet.
        rank: This rank.
        ranks: All of them, this one included.
        failures: Who failed first, if any.
        timeout: Seconds that a wait may last.

    Attributes:
        ranks: All of them.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: Sequence[int], failures: Failures, timeout: float) -> None:
        self.ranks = tuple(ranks)
        self._store, self._rank, self._failures, self._timeout = store, rank, failures, timeout
        self._processes: dict[int, int] = {}  # of the others, where they can be seen from here
        self._name = f"offload/{store.add(f'offload/rounds/{rank}', 1)}"  # ranks attach their stages in the same order

    def tell(self, topic: str, what: Any) -> None:
        """Tells plain data of a topic, once.

        Raises:
            PatchpipeError: The store is gone.
        """
        with self._failures.explaining("the store"):
            self._store.set(self._key(topic, self._rank), json.dumps(what))

    def hear(self, topic: str, rank: int) -> Any:
        """What a rank tells of a topic.

        Raises:
            RankLost: It has told nothing in time, or it has died.
            RankFailed: Another rank has failed first.
        """
        key, until, pause = self._key(topic, rank), monotonic() + self._timeout, FIRST_LOOK
        with self._failures.explaining(f"rank {rank}"):
            while not self._store.check([key]):
                self._look_at(rank, key, until)
                sleep(pause)
                pause = min(2 * pause, LONGEST_LOOK)
            return json.loads(self._store.get(key))

    def _look_at(self, rank: int, key: str, until: float) -> None:
        """Ends a wait that has become vain."""
        told = self._failures.told()
        if told is not None:
            raise told
        gone = rank in self._processes and not _alive(self._processes[rank])
        if gone and not self._store.check([key]):
            raise self._failures.explain_to_all(ProcessLookupError("it no longer runs"), f"rank {rank}")
        if monotonic() >= until:
            raise self._failures.explain_to_all(TimeoutError("timed out"), f"rank {rank}")

    def forget(self, topic: str) -> None:
        """Clears the store of a topic that all have heard of."""
        with self._failures.explaining("the store"):
            for rank in self.ranks:
                self._store.delete_key(self._key(topic, rank))

    def watch(self, rank: int, process: int) -> None:
        """From here on it is noticed when a rank's process ends; one that cannot be seen from here is not watched."""
        if _alive(process):
            self._processes[rank] = process

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._name}/{topic}/{rank}"


def _alive(process: int) -> bool:
    """Whether a process of this host runs; one that is over but not yet buried does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")
