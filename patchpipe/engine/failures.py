"""Turns what went wrong in the workers into the one error that the user reads."""

from __future__ import annotations

from dataclasses import dataclass

from patchpipe.engine.messages import Failed
from patchpipe.engine.processes import Worker, describe_exit
from patchpipe.errors import Cancelled, PatchpipeError, RankFailed, RankLost, UnsupportedModel

CAUSE = 0
ABORTED = 1
CONSEQUENCE = 2

_SIGABRT = -6
_SIGKILL = -9
_PLAIN = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "FileNotFoundError": FileNotFoundError,
    "NotImplementedError": NotImplementedError,
    "UnsupportedModel": UnsupportedModel,
    "RankLost": RankLost,
    "RankFailed": RankFailed,
    "Cancelled": Cancelled,
    "PatchpipeError": PatchpipeError,
}


class WorkerTraceback(Exception):
    """The traceback of an exception in a worker, as text: shown as the cause of the error raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong in one worker.

    Attributes:
        rank: The worker's rank.
        weight: ``CAUSE`` where it stands for itself, ``CONSEQUENCE`` where it follows from another rank's
            failure, ``ABORTED`` where it may be either.
        error: What to raise.
        clean: The worker can serve another request.
    """

    rank: int
    weight: int
    error: BaseException
    clean: bool = False


def from_message(worker: Worker, device: str, message: Failed) -> Failure:
    """The failure that a worker told about."""
    error = rebuild(worker.rank, device, message)
    error.__cause__ = WorkerTraceback(f"rank {worker.rank} (pid {worker.pid}) on {device}:\n{message.traceback}")
    return Failure(worker.rank, CONSEQUENCE if message.secondary else CAUSE, error, message.clean)


def from_death(worker: Worker, activity: str) -> Failure:
    """The failure of a worker that is gone without a word."""
    code = worker.exit_code()
    text = f"rank {worker.rank} (pid {worker.pid}) {describe_exit(code)} while {activity}"
    tail = worker.log_tail()
    if code == _SIGKILL:
        text += "; if nobody killed it, the machine may have run out of memory"
    elif code is not None and code > 0 and tail:
        text += f": {tail.splitlines()[-1].strip()}"
    error = RankLost(text)
    if tail:
        error.__cause__ = WorkerTraceback(f"last lines of rank {worker.rank}:\n{tail}")
    return Failure(worker.rank, ABORTED if code == _SIGABRT else CAUSE, error)


def from_silence(ranks: list[int], seconds: float, activity: str) -> Failure:
    """The failure of workers that said nothing for too long."""
    names = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)
    text = f"{names} said nothing for {seconds:.0f} s while {activity}; a longer timeout may help"
    return Failure(ranks[0], CAUSE, RankLost(text))


def first_cause(failures: list[Failure]) -> Failure:
    """Of failures in order of arrival, the one to blame; of ranks that fail alike, the lowest."""
    return min(failures, key=lambda failure: (failure.weight, failure.rank if failure.clean else 0))


def rebuild(rank: int, device: str, message: Failed) -> BaseException:
    """The exception that a worker told of, as the user reads it."""
    known = _PLAIN.get(message.class_name)
    if known is not None:
        return known(message.message)
    if message.class_name == "OutOfMemory":
        return RankFailed(message.message)
    return RankFailed(f"rank {rank} on {device}: {message.class_name}: {message.message}")
