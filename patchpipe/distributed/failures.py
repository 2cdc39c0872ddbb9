"""Who failed first: told on the store, and read by ranks whose waits break or end."""

from __future__ import annotations

import json
from time import sleep
from typing import Any

import torch.distributed as dist

from patchpipe.distributed.process_groups import gist
from patchpipe.errors import PatchpipeError, RankFailed, RankLost

LOADING = "first_failure/loading"  # where a rank tells why it failed before any request
GRACE_SECONDS = 1.0  # between the deadlines of ranks that wait for one another


class Failures:
    """The first failure of each request, as one rank tells and hears of it.

    Args:
        store: Where the ranks meet; ``None`` for a single rank.
        rank: This rank.
        timeout: Seconds a wait may take, for messages.
    """

    def __init__(self, store: dist.Store | None, rank: int, timeout: float) -> None:
        self._store, self._rank, self._timeout = store, rank, timeout
        self._requests = 0

    def begin(self) -> None:
        """From here on, failures are those of a new request, or of several together; all ranks count alike."""
        self._requests += 1

    @property
    def _key(self) -> str:
        return f"first_failure/{self._requests}" if self._requests else LOADING

    def report(self, text: str) -> None:
        """Tells the other ranks why this one fails, unless another told first."""
        self._tell(text, lost=False)

    def _tell(self, text: str, *, lost: bool) -> None:
        if self._store is None:
            return
        message = json.dumps({"rank": self._rank, "text": text, "lost": lost})
        try:
            self._store.compare_set(self._key, "", message)
        except RuntimeError:  # the store's own process is gone: nobody is left to tell
            return

    def explain(self, error: Exception, peer: str) -> PatchpipeError:
        """The error to raise when waiting for ``peer`` failed: the group's first failure where one is known."""
        told = self.told()
        if told is not None:
            return told
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            late = self._silent_rank(peer)
            return RankLost(f"{late} did not answer within {self._timeout:g} s (timeout={self._timeout:g})")
        return RankLost(f"{peer} closed its connection: its process has died or was killed ({gist(error)})")

    def told(self) -> PatchpipeError | None:
        """The first failure that another rank has told of, or that one has told of another."""
        return self._as_error(self._first())

    def failed_to_load(self) -> PatchpipeError | None:
        """Why another rank has failed before any request, as the error to raise; ``None`` if none has."""
        if self._store is None or not self._store.check([LOADING]):
            return None
        return self._as_error(json.loads(self._store.get(LOADING)))

    def _as_error(self, first: dict[str, Any] | None) -> PatchpipeError | None:
        if first is None:
            return None
        if first.get("lost"):
            return RankLost(first["text"])
        rank = first["rank"]
        return None if rank == self._rank else RankFailed(f"rank {rank} failed first: {first['text']}")

    def explain_to_all(self, error: Exception, peer: str) -> PatchpipeError:
        """The same as ``explain``, told to the other ranks too: they may wait for one that waits itself."""
        problem = self.explain(error, peer)
        if isinstance(problem, RankLost):
            self._tell(str(problem), lost=True)
        return problem

    def _silent_rank(self, peer: str) -> str:
        """The rank everybody waits for in the end: one that does not wait itself."""
        if self._store is None:
            return peer
        key = f"waits/{self._requests}/rank "
        try:
            self._store.set(f"{key}{self._rank}", peer)
            sleep(min(GRACE_SECONDS, self._timeout / 2))  # the others' deadlines pass at about the same time
            seen = {f"rank {self._rank}"}
            while peer not in seen and self._store.check([f"{key}{peer.removeprefix('rank ')}"]):
                seen.add(peer)
                peer = self._store.get(f"{key}{peer.removeprefix('rank ')}").decode()
        except RuntimeError:  # the store's own process is gone
            pass
        return peer

    def explaining(self, peer: str) -> _Explained:
        """A context that turns a failed wait into ``explain``'s error."""
        return _Explained(self, peer)

    def _first(self) -> dict[str, Any] | None:
        if self._store is None:
            return None
        try:
            for key in (self._key, LOADING):
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
            return None
        except (RuntimeError, ValueError):
            return None


class _Explained:
    def __init__(self, failures: Failures, peer: str) -> None:
        self._failures, self._peer = failures, peer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, PatchpipeError):
            raise self._failures.explain(error, self._peer) from error
