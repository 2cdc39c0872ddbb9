"""All workers of one engine: their start, their private folder, their end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

from patchpipe.engine.messages import Channel, Close
from patchpipe.engine.processes import forkserver
from patchpipe.engine.processes.forkserver import ForkServer
from patchpipe.engine.processes.fresh import environment, start
from patchpipe.engine.processes.worker import Process, Worker


class Workers:
    """All worker processes of one engine.

    Several are forked from a process that has loaded the libraries (``ForkServer``), one is a fresh interpreter, unless
    there is such a process already.

    Args:
        count: Number of ranks.
        threads: CPU threads of each.
        offline: Keep the workers from asking the hub, which cannot be reached.
    """

    def __init__(self, count: int, threads: int, offline: bool = False) -> None:
        self._owner = os.getpid()
        self.directory = Path(tempfile.mkdtemp(prefix="patchpipe-"))
        self.members: list[Worker] = []
        self._env = environment(threads, offline)
        self._forks: ForkServer | None = None
        try:
            self._forks = forkserver.borrow(self._env, make=count > 1)
            for rank in range(count):
                self.members.append(self._start(rank))
        except BaseException:
            self.shutdown(grace=0)
            raise

    def shutdown(self, grace: float = 5.0) -> None:
        """Ends every worker and removes the private folder; safe to call again.

        Args:
            grace: Seconds the workers get to leave by themselves; 0 ends them at once.
        """
        if os.getpid() != self._owner:
            return  # a fork of the parent: the workers are not its own
        members, self.members = self.members, []
        _end(members, grace)
        forks, self._forks = self._forks, None
        if forks is not None:
            forkserver.give_back(forks)
        shutil.rmtree(self.directory, ignore_errors=True)

    def keep(self, count: int) -> None:
        """Ends all but the first ``count`` workers, which have nothing loaded yet."""
        surplus, self.members = self.members[count:], self.members[:count]
        _end(surplus, grace=0)

    def _start(self, rank: int) -> Worker:
        ours, theirs = socket.socketpair()
        log = self.directory / f"rank-{rank}.log"
        with theirs, ours, log.open("wb") as output:
            forked = None if self._forks is None else self._forks.fork(theirs.fileno(), output.fileno())
            process: Process = forked or start("main", theirs.fileno(), self._env, output)
            return Worker(rank, process, Channel(ours.detach(), send_timeout=60.0), log)


def _end(members: list[Worker], grace: float) -> None:
    if grace > 0:
        _ask_to_leave(members)
        _wait_all(members, grace)
    for worker in members:
        worker.signal(signal.SIGTERM)
    _wait_all(members, 1.0)
    for worker in members:
        worker.signal(signal.SIGKILL)
    for worker in members:
        worker.reap()


def _ask_to_leave(members: list[Worker]) -> None:
    for worker in members:
        try:
            worker.channel.send(Close())
        except OSError:
            continue  # it is gone already, which is what was wanted


def _wait_all(members: list[Worker], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for worker in members:
        worker.exit_code(max(0.0, deadline - time.monotonic()))
