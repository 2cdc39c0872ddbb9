"""One worker process as its parent sees it, whichever way it was started."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import IO, Protocol

from patchpipe.engine.messages import Channel

LOG_TAIL_LINES = 25
UNKNOWN_STATUS = 1 << 16  # of a process that has ended, nobody knows how


class Process(Protocol):
    """What is needed of a process: the part of ``subprocess.Popen`` that a forked one can have too."""

    pid: int
    stdin: IO[bytes] | None

    def poll(self) -> int | None:
        """Its exit status (negative: a signal), or ``None`` while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end. Raises ``subprocess.TimeoutExpired``."""

    def send_signal(self, sig: int) -> None:
        """Sends a signal, unless it has ended."""


class Worker:
    """One worker process.

    Args:
        rank: Its rank.
        process: The process.
        channel: The way to it.
        log: The file that it prints to.
    """

    def __init__(self, rank: int, process: Process, channel: Channel, log: Path) -> None:
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

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        if self.alive:
            self.process.send_signal(number)

    def reap(self) -> None:
        """Waits for its end, and closes what led to it."""
        self.process.wait()
        self.channel.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def log_tail(self) -> str:
        """The last lines the worker printed."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.rstrip().splitlines()[-LOG_TAIL_LINES:])


def describe_exit(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code == UNKNOWN_STATUS:
        return "closed its connection"
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"
