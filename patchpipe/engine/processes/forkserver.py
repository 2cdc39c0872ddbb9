"""Workers that start at once: forked from a process that has loaded the libraries.

Loading torch, diffusers and transformers takes each process some ten seconds of a core and 400 MB. Done once per engine
instead of once per worker, a machine with eight devices starts with an eighth of the work, and what is loaded lies in
memory once. Only what all workers have in common is loaded before the fork, and no device is touched.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import IO, Any

from patchpipe.engine.processes.fresh import start
from patchpipe.engine.processes.worker import UNKNOWN_STATUS

LIBRARY_SECONDS = 180.0  # for the libraries to be loaded, on a slow disk
IDLE_SERVERS = 2  # kept by ``warm``, of different environments
PID = struct.Struct("=i")
SUPPORTED = sys.platform == "linux" and hasattr(os, "pidfd_open")


class ForkServer:
    """A process that has loaded the libraries, as its parent sees it; threads may use it at the same time.

    Args:
        env: Its environment, which its workers inherit.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(LIBRARY_SECONDS)
        self._talking = threading.Lock()
        with theirs:
            self._process = start("forks", theirs.fileno(), env, subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    def fork(self, channel: int, output: int) -> Forked | None:
        """A new worker, or ``None`` if there can be none: then start a fresh interpreter, which says why.

        Args:
            channel: The socket it is to talk over.
            output: The file it prints to.
        """
        lifeline, ours = os.pipe()
        try:
            pid, handles = self._ask(b"fork", [lifeline, channel, output])
        except OSError:
            os.close(ours)
            return None
        finally:
            os.close(lifeline)
        return Forked(pid, handles[0], open(ours, "wb", buffering=0), self)

    def status(self, pid: int) -> int:
        """The exit status of a worker that has ended; asked for once."""
        try:
            return self._ask(PID.pack(pid), [])[0]
        except OSError:
            return UNKNOWN_STATUS

    def _ask(self, question: bytes, fds: list[int]) -> tuple[int, list[int]]:
        with self._talking:
            try:
                socket.send_fds(self._control, [question], fds)
                answer, handles, _, _ = socket.recv_fds(self._control, PID.size, 1)
            except BaseException:
                self._control.close()  # a late answer would be taken for that to the next question
                raise
        if not answer:
            raise ConnectionError("the fork server is gone")
        return PID.unpack(answer)[0], handles

    @property
    def alive(self) -> bool:
        """Whether it runs, so that it can be asked for workers."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it; workers go on."""
        self._control.close()
        self._process.kill()
        self._process.wait()


class Forked:
    """A forked worker: another process's child, watched and signalled through a handle that no other process can get.

    Args:
        pid: Its process id.
        handle: Its pidfd.
        stdin: The other end of its standard input.
        server: The process it was forked from.
    """

    def __init__(self, pid: int, handle: int, stdin: IO[bytes], server: ForkServer) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self._handle, self._server = handle, server
        self._asking = threading.Lock()
        self._code: int | None = None
        weakref.finalize(self, os.close, handle)

    def poll(self) -> int | None:
        """Its exit status, or ``None`` while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end, and tells its exit status (negative: a signal).

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        if not poll.poll(None if timeout is None else 1000 * timeout):
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
        with self._asking:
            if self._code is None:
                self._code = self._server.status(self.pid)
            return self._code

    def send_signal(self, sig: int) -> None:
        """Sends a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, sig)


class _Servers:
    """The fork servers of this process, which engines with the same environment share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[Any, ForkServer] = {}  # last used last
        self._users: dict[ForkServer, int] = {}
        self._orphans: set[ForkServer] = set()  # dead ones, whose workers go on
        self._keepers = 0
        self._owner = os.getpid()

    def borrow(self, env: Mapping[str, str], make: bool) -> ForkServer | None:
        if not SUPPORTED:
            return None
        with self._lock:
            self._disown()
            key = (frozenset(env.items()), os.getcwd(), frozenset(os.sched_getaffinity(0)))
            server = self._by_key.pop(key, None)
            if server is not None and not server.alive:  # somebody killed it: workers go on, and another one takes over
                self._orphans.add(server)
                server = None
            if server is None:
                if not make and not self._keepers:
                    return None
                server = ForkServer(env)
            self._by_key[key] = server
            self._users[server] = self._users.get(server, 0) + 1
            return server

    def give_back(self, server: ForkServer) -> None:
        with self._lock:
            if os.getpid() == self._owner and server in self._users:
                self._users[server] -= 1
                self._close_idle()
                self._close_orphans()

    @contextlib.contextmanager
    def keep(self) -> Iterator[None]:
        with self._lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self._lock:
                self._keepers -= 1
                self._close_idle()

    def _close_idle(self) -> None:
        idle = [key for key, server in self._by_key.items() if not self._users[server]]
        for key in idle[: len(idle) - (IDLE_SERVERS if self._keepers else 0)]:
            server = self._by_key.pop(key)
            del self._users[server]
            server.close()

    def _close_orphans(self) -> None:
        for server in [one for one in self._orphans if not self._users[one]]:
            self._orphans.remove(server)
            del self._users[server]
            server.close()

    def _disown(self) -> None:
        """A fork of this process has servers of its own."""
        if os.getpid() != self._owner:
            self._by_key, self._users, self._keepers, self._owner = {}, {}, 0, os.getpid()
            self._orphans = set()


_SERVERS = _Servers()  # of the process, as its children are


def borrow(env: Mapping[str, str], make: bool) -> ForkServer | None:
    """A fork server with this environment, to be given back; ``None`` where there is none, or can be none.

    Args:
        env: The environment.
        make: Start one, if there is none.
    """
    return _SERVERS.borrow(env, make)


def give_back(server: ForkServer) -> None:
    """Its last user ends it, outside ``warm``."""
    _SERVERS.give_back(server)


def warm() -> contextlib.AbstractContextManager[None]:
    """Engines that start within this block start in a fraction of a second, but for the first.

    The process that has loaded the libraries stays until the block ends, some 400 MB, also while there is no engine. It
    is of use where engines come and go: in tests, and in a service that starts a failed one again.
    """
    return _SERVERS.keep()
