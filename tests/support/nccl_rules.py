"""NCCL's rules on a CPU: a process group over gloo that does in the order, and with the waits, that NCCL does.

What it holds to, as read in torch's `ProcessGroupNCCL`:

- A communicator is made when two ranks (or a whole group) first meet on it, and that blocks each of them until the
  others come to the same place.
- What one communicator does, it does in the order posted: sends and receives of a pair, in both directions, stand in
  one line. Collectives of a group stand in another.
- A send is over only when its receive has been posted, and has got to the head of the other rank's line.
- `wait()` orders the stream, not the host. There is but one thread of work here, so it waits too, but it may: it stands
  for the stream. What was received is poison (NaN) until then, so that whoever reads without a wait shows.
- `wait(timeout)` blocks the host and is counted as a stall.
- Something sent must not be written to until the send is over.
- After `abort` nothing arrives any more, and whoever waits goes on with what is there: poison.

`under_nccl_rules()` slips it under patchpipe, for ranks that are threads or for the process it is called in.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from patchpipe.distributed.process_groups import ProcessGroups
from patchpipe.schedule.runner import Runner

CONTACT_SECONDS = 15.0  # two ranks that have not met by then never will
STUCK_SECONDS = 20.0  # nor does a line move again that has stood still so long
POISON = 0xFF  # four, two or eight of these bytes are a NaN


_here = threading.local()  # whether this thread, a rank, is in a request


class Broken(AssertionError):
    """One of NCCL's rules was broken, in a way that on a GPU would hang or paint a wrong picture."""


@dataclass
class Seen:
    """What happened under the rules, in all groups of this process.

    Attributes:
        stalls: Waits that blocked the host.
        contacts: Communicators made, by group and members.
        late: Those of them that were made in a request.
        written: Tensors that were written to while they were being sent.
    """

    stalls: list[str] = field(default_factory=list)
    contacts: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Asserts that the host never stalled, nothing was made late, and nothing was written to under way."""
        assert not self.stalls, f"the host waited for the device {len(self.stalls)} times: {self.stalls[:5]}"
        assert not self.late, f"communicators were made in a request: {self.late[:5]}"
        assert not self.written, f"written to while it was sent: {self.written[:5]}"


class Operation:
    """One operation under way; what torch calls a work."""

    def __init__(self, group: NcclDouble, title: str, run: Callable[[], None], deliver: Callable[[], None]) -> None:
        self.group, self.title, self.run, self.deliver = group, title, run, deliver
        self.over = threading.Event()
        self.error: Exception | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits as the stream would or, if told how long, as a host that has nothing better to do."""
        if timeout is not None:
            self.group.seen.stalls.append(self.title)
            patience = min(STUCK_SECONDS, timeout.total_seconds())
            if not self.over.wait(patience):
                kind = Broken if patience == STUCK_SECONDS else RuntimeError
                raise kind(f"{self.title} timed out: {self.group.standing()}")
        elif not self.over.wait(STUCK_SECONDS):
            raise Broken(f"{self.title} never ends: {self.group.standing()}")
        if self.error is not None:
            raise self.error
        if not self.group.aborted:
            self.deliver()
        return True

    def is_completed(self) -> bool:
        """Whether it is over; asking stalls nobody."""
        return self.over.is_set()


class Line:
    """A communicator: runs what is posted to it in order, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: queue.Queue[Operation | None] = queue.Queue()
        self.head: Operation | None = None
        threading.Thread(target=self._work, name=f"communicator {name}", daemon=True).start()

    def post(self, operation: Operation) -> Operation:
        """Puts an operation at the end of the line."""
        self.waiting.put(operation)
        return operation

    def _work(self) -> None:
        while (operation := self.waiting.get()) is not None:
            self.head = operation
            try:
                operation.run()
            except Exception as error:
                operation.error = None if operation.group.aborted else RuntimeError(str(error))
            self.head = None
            operation.over.set()


class NcclDouble:
    """Stands in for ``ProcessGroupNCCL``; data goes over gloo.

    Args:
        inner: The gloo group of the same ranks.
        store: Where they meet.
        name: The group's name.
        seen: What is told of it.
    """

    def __init__(self, inner: Any, store: dist.Store, name: str, seen: Seen) -> None:
        self.inner, self.store, self.name, self.seen = inner, dist.PrefixStore("communicators", store), name, seen
        self.aborted = False
        self._lines: dict[str, Line] = {}
        self._posted: list[Operation] = []

    def rank(self) -> int:
        return self.inner.rank()

    def size(self) -> int:
        return self.inner.size()

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        (tensor,), version = tensors, tensors[0]._version
        title = f"{self.name}: send from {self.rank()} to {peer}"

        def run() -> None:
            if tensor._version != version:
                self.seen.written.append(title)
            self.inner.send([tensor], peer, 7).wait()

        return self._post(self._pair(peer), title, run, lambda: None)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Operation:
        title = f"{self.name}: receive on {self.rank()} from {peer}"
        hidden = torch.empty_like(tensors[0])
        _poison(tensors[0])
        return self._post(
            self._pair(peer),
            title,
            lambda: self.inner.recv([hidden], peer, 7).wait(),
            lambda: _fill(tensors[0], hidden),
        )

    def alltoall(self, incoming: Sequence[Tensor], outgoing: Sequence[Tensor]) -> Operation:
        """Every rank's tensors to all others; empty ones stay at home."""
        title = f"{self.name}: all-to-all on {self.rank()}"
        hidden, versions = [torch.empty_like(tensor) for tensor in incoming], [each._version for each in outgoing]
        for tensor in incoming:
            _poison(tensor)
        peers = [(self.rank() + step) % self.size() for step in range(1, self.size())]

        def run() -> None:
            if [each._version for each in outgoing] != versions:
                self.seen.written.append(title)
            hidden[self.rank()].copy_(outgoing[self.rank()])
            works = [self.inner.recv([hidden[peer]], peer, 9) for peer in peers if hidden[peer].numel()]
            works += [self.inner.send([outgoing[peer]], peer, 9) for peer in peers if outgoing[peer].numel()]
            for work in works:
                work.wait()

        def deliver() -> None:
            for tensor, arrived in zip(incoming, hidden, strict=True):
                _fill(tensor, arrived)

        return self._post(self._line("all", range(self.size())), title, run, deliver)

    def alltoall_base(self, incoming: Tensor, outgoing: Tensor, into: list[int], out: list[int]) -> Operation:
        return self.alltoall(incoming.split(into), outgoing.split(out))

    def allreduce(self, tensors: list[Tensor]) -> Operation:
        title = f"{self.name}: all-reduce on {self.rank()}"
        hidden = tensors[0].clone()
        _poison(tensors[0])
        return self._post(
            self._line("all", range(self.size())),
            title,
            lambda: self.inner.allreduce([hidden]).wait(),
            lambda: _fill(tensors[0], hidden),
        )

    def abort(self) -> None:
        """Ends everything under way; nothing of it arrives."""
        self.aborted = True
        for operation in self._posted:
            operation.over.set()
        for line in self._lines.values():
            line.waiting.put(None)

    def standing(self) -> str:
        """What each communicator stands still at, for people."""
        heads = {line.name: line.head for line in self._lines.values() if line.head is not None}
        return "; ".join(f"{name} is at «{head.title}»" for name, head in heads.items()) or "nothing is under way"

    def _post(self, line: Line, title: str, run: Callable[[], None], deliver: Callable[[], None]) -> Operation:
        if self.aborted:
            raise RuntimeError("NCCL communicator was aborted")
        self._posted = [each for each in self._posted if not each.over.is_set()]
        operation = Operation(self, title, run, deliver)
        self._posted.append(operation)
        return line.post(operation)

    def _pair(self, peer: int) -> Line:
        low, high = sorted((self.rank(), peer))
        return self._line(f"{low}:{high}", (low, high))

    def _line(self, key: str, members: Sequence[int]) -> Line:
        if key not in self._lines:
            self._contact(key, members)
            self._lines[key] = Line(f"{self.name} {key}")
        return self._lines[key]

    def _contact(self, key: str, members: Sequence[int]) -> None:
        """Blocks this thread until all members have come."""
        title = f"{self.name} {key} on {self.rank()}"
        self.seen.contacts.append(title)
        if getattr(_here, "in_request", False):
            self.seen.late.append(title)
        self.store.set(f"{key}/{self.rank()}", "here")
        try:
            self.store.wait([f"{key}/{member}" for member in members], timedelta(seconds=CONTACT_SECONDS))
        except RuntimeError as error:
            raise Broken(
                f"rank {self.rank()} of {self.name} blocks for ever in the first contact of {key}: the other is busy"
            ) from error


def _poison(tensor: Tensor) -> None:
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).fill_(POISON)


def _fill(tensor: Tensor, arrived: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(arrived)


@contextmanager
def over(transport: str) -> Iterator[None]:
    """Ranks of this process talk over gloo as it is, or under NCCL's rules, which they must keep.

    Args:
        transport: ``"gloo"`` or ``"nccl"``.
    """
    if transport == "gloo":
        yield
        return
    with under_nccl_rules() as seen:
        yield
    assert seen.contacts, "nothing went through the double: nothing was tested"
    seen.check()


@contextmanager
def under_nccl_rules() -> Iterator[Seen]:
    """While it lasts, patchpipe takes the CPU's ranks for ones with a GPU each, and the double for NCCL."""
    seen, make = Seen(), ProcessGroups.make

    def made(self: ProcessGroups, name: str, backend: str, rank: int, size: int) -> Any:
        inner = make(self, name, "gloo", rank, size)
        if backend != "nccl":
            return inner
        assert self.store is not None
        return NcclDouble(inner, dist.PrefixStore(name, self.store), name, seen)

    open_request = Runner.open

    @contextmanager
    def opened(self: Runner, *args: Any) -> Iterator[None]:
        _here.in_request = True
        try:
            with open_request(self, *args):
                yield
        finally:
            _here.in_request = False

    with (
        mock.patch("patchpipe.distributed.joining._backend", return_value="nccl"),
        mock.patch.object(ProcessGroups, "make", made),
        mock.patch.object(Runner, "open", opened),
    ):
        yield seen
