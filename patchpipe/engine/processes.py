"""Starts worker processes, tells how they died, and ends them.

A worker is a fresh interpreter, so the caller's script is never imported again and needs no ``__main__`` guard. It
imports nothing from the current folder, where a user's ``queue.py`` would stand in for the standard library's. Its
standard input is a lifeline: it never carries data, and its end means that the parent is gone. (``PR_SET_PDEATHSIG``
would not do: it fires when the *thread* that started the worker ends, which in a web server or a notebook is not the
end of the parent.)
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patchpipe.engine.devices import loopback_interface
from patchpipe.engine.messages import Channel, Close

LOG_TAIL_LINES = 25
_PACKAGE = Path(__file__).resolve().parents[1]
# ``python -m`` and ``python -c`` look for modules in the current folder first, and ``-P`` came with Python 3.11. The
# package is loaded by its place, so that a folder it shares with others does not go before the standard library.
_BOOTSTRAP = """
import sys
sys.path[:] = [place for place in sys.path if place]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("patchpipe", sys.argv[2])
package = sys.modules["patchpipe"] = module_from_spec(spec)
spec.loader.exec_module(package)
from patchpipe.engine.worker.main import main
main()
"""


class Worker:
    """One worker process as its parent sees it."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], channel: Channel, log: Path) -> None:
        self.rank = rank
        self.process = process
        self.channel = channel
        self.log = log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def exit_code(self, wait: float = 2.0) -> int | None:
        """The exit status (negative: a signal), waiting a little for it."""
        try:
            return self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return None

    def log_tail(self) -> str:
        """The last lines the worker printed."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.rstrip().splitlines()[-LOG_TAIL_LINES:])


class Workers:
    """All worker processes of one engine, their private folder and their end.

    Args:
        count: Number of ranks.
        threads: CPU threads of each.
        offline: Keep the workers from asking the hub, which cannot be reached.
    """

    def __init__(self, count: int, threads: int, offline: bool = False) -> None:
        self._owner = os.getpid()
        self.directory = Path(tempfile.mkdtemp(prefix="patchpipe-"))
        self.members: list[Worker] = []
        try:
            env = _environment(threads, offline)
            for rank in range(count):
                self.members.append(_start(rank, self.directory, env))
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
        shutil.rmtree(self.directory, ignore_errors=True)

    def keep(self, count: int) -> None:
        """Ends all but the first ``count`` workers, which have nothing loaded yet."""
        surplus, self.members = self.members[count:], self.members[:count]
        _end(surplus, grace=0)


def describe_exit(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"


def _start(rank: int, directory: Path, env: dict[str, str]) -> Worker:
    ours, theirs = socket.socketpair()
    log = directory / f"rank-{rank}.log"
    with theirs, ours, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), str(_PACKAGE / "__init__.py")],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            env=env,
            start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
        )
        return Worker(rank, process, Channel(ours.detach(), send_timeout=60.0), log)


def _environment(threads: int, offline: bool) -> dict[str, str]:
    env = dict(os.environ)
    env.update(
        PYTHONPATH=_python_path(os.environ.get("PYTHONPATH", "")),
        PYTHONUNBUFFERED="1",
        PYTHONUTF8="1",  # whatever the locale, folders have their names
        PYTHONFAULTHANDLER="1",
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
    )
    # Every communicator has a stream; two that share a hardware queue wait for each other, in a circle if need be.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    interface = loopback_interface()
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
    return env


def _end(members: list[Worker], grace: float) -> None:
    if grace > 0:
        _ask_to_leave(members)
        _wait_all(members, grace)
    for worker in members:
        _signal(worker, signal.SIGTERM)
    _wait_all(members, 1.0)
    for worker in members:
        _signal(worker, signal.SIGKILL)
    for worker in members:
        _reap(worker)


def _python_path(paths: str) -> str:
    """``PYTHONPATH`` for the workers: relative places made absolute, less those that mean the current folder."""
    given = [path for path in paths.split(os.pathsep) if os.path.normpath(path or ".") != "."]
    return os.pathsep.join(dict.fromkeys(map(os.path.abspath, given)))


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


def _signal(worker: Worker, number: signal.Signals) -> None:
    if worker.alive:
        worker.process.send_signal(number)


def _reap(worker: Worker) -> None:
    worker.process.wait()
    worker.channel.close()
    if worker.process.stdin is not None:
        worker.process.stdin.close()
