"""What ranks that hold the same weights tell each other, on the store where all ranks met."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist

from patchpipe.distributed.failures import Failures

GREETING = "greeting"
LOADING_SECONDS = 3600.0  # by which ranks may differ in reading their parts of a model
FIRST_LOOK, LONGEST_LOOK = 0.0005, 0.02  # seconds between two looks at the store


class Peers:
    """Ranks that tell each other things, none of which is waited for without end.

    Args:
        store: Where the ranks meet.
        rank: This rank.
        processes: Their processes on this host, this rank's included.
        failures: Who failed first, if any.
        timeout: Seconds that a wait may last.

    Attributes:
        ranks: All of them.
    """

    def __init__(
        self, store: dist.Store, rank: int, processes: Mapping[int, int], failures: Failures, timeout: float
    ) -> None:
        self.ranks = tuple(processes)
        self._store, self._rank, self._failures, self._timeout = store, rank, failures, timeout
        self._processes = dict(processes)
        number = store.add(f"offload/rounds/{rank}", 1)  # ranks attach their stages in the same order
        self._name = f"offload/{number}"
        self._until = monotonic() + max(timeout, LOADING_SECONDS if number == 1 else 0.0)

    def tell(self, topic: str, what: Any) -> None:
        """Tells plain data of a topic, once.

        Raises:
            PatchpipeError: The store is gone.
        """
        with self._failures.explaining("the store"):
            self._store.set(self._key(topic, self._rank), json.dumps(what))

    def greet(self, what: Any) -> dict[int, Any]:
        """Tells what the others are to know first, and hears it of them; one may still be reading its part of a model.

        Raises:
            RankLost: One has told nothing in time, or it has died.
            RankFailed: Another rank has failed first.
        """
        self.tell(GREETING, what)
        return {rank: self.hear(GREETING, rank, self._until) for rank in self.ranks}

    def hear(self, topic: str, rank: int, until: float | None = None) -> Any:
        """What a rank tells of a topic.

        Args:
            topic: The topic.
            rank: The rank.
            until: When to give it up, by the system's clock; ``None`` is this group's timeout from now.

        Raises:
            RankLost: It has told nothing in time, or it has died.
            RankFailed: Another rank has failed first.
        """
        key, pause = self._key(topic, rank), FIRST_LOOK
        until = monotonic() + self._timeout if until is None else until
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
        if not _alive(self._processes[rank]) and not self._store.check([key]):
            raise self._failures.explain_to_all(ProcessLookupError("it no longer runs"), f"rank {rank}")
        if monotonic() >= until:
            raise self._failures.explain_to_all(TimeoutError("timed out"), f"rank {rank}")

    def forget(self, topic: str, ranks: Iterable[int]) -> None:
        """Clears the store of what ranks have told of a topic and all of them have heard."""
        with self._failures.explaining("the store"):
            for rank in ranks:
                self._store.delete_key(self._key(topic, rank))

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._name}/{topic}/{rank}"


def _alive(process: int) -> bool:
    """Whether a process of this host runs; one that is over but not yet buried does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")
