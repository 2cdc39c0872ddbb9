"""Ordered asynchronous tensors between two ranks, whose shapes both sides know beforehand.

Receives are posted before the data is needed and waited for once; what is sent is kept alive until it has left. On
gloo, CUDA tensors go through host memory, so that ranks may share a device, and a wait blocks the host until its
deadline. On NCCL a wait orders streams and returns at once; a ``Guard`` notices trouble.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.gate import Gate
from patchpipe.distributed.guard import Guard
from patchpipe.layout.communicators import Link
from patchpipe.tracing.recorder import Recorder, span

Explain = Callable[[Exception, str], Exception]
CALLS_IN_FLIGHT = 3  # of the transformer, for each request: it waits for the last step's answers, two calls at most


class Wire:
    """What carries one kind of tensors among some ranks, seen as channels between two of them.

    Args:
        group: The process group of all its ranks; ``None`` where every link has one of its own.
        device: Where this rank computes.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: Seconds any wait may last.
        explain: Turns a failed wait into the error to raise.
        carries: What kind of tensors it carries, for the timeline.
        guard: Watches over what is under way, over NCCL.
        links: Over NCCL the process group of every link to and from this rank. Its ranks are 0, the sender, and 1.

    Attributes:
        recorder: Of the request under way, if it is traced.
        gate: Is told what is on its way, where somebody asks.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device,
        backend: str,
        timeout: float,
        explain: Explain,
        carries: str = "",
        guard: Guard | None = None,
        links: Mapping[Link, Any] | None = None,
    ) -> None:
        self.group, self.device, self.backend = group, device, backend
        self.staged = backend == "gloo" and device.type != "cpu"
        self.place = torch.device("cpu") if self.staged else device  # of what is sent and received
        self.timeout = timedelta(seconds=timeout)
        self.explain = explain
        self.ranks: tuple[int, ...] | None = None  # of the group's members among all ranks, where they differ
        self.carries = carries
        self.recorder: Recorder | None = None
        self.gate: Gate | None = None
        self._guard, self._links = guard, links
        self._channels: dict[int, Channel] = {}

    def channel(self, peer: int) -> Channel:
        """The channel to one rank."""
        if peer not in self._channels:
            self._channels[peer] = Channel(self, peer)
        return self._channels[peer]

    @property
    def channels(self) -> list[Channel]:
        """The channels used so far."""
        return list(self._channels.values())

    def drain(self) -> None:
        """Waits until nothing is under way on any channel."""
        for channel in self._channels.values():
            channel.drain()

    def abort(self) -> None:
        """Over NCCL, ends all that is under way on the device; what waits for it goes on with whatever is there."""
        groups = [self.group, *(self._links or {}).values()] if self.backend == "nccl" else []
        for group in groups:
            if group is not None and not isinstance(group, Closed):
                group.abort()

    def close(self) -> list[Any]:
        """Gives up whatever is under way, and returns the process groups: their connections close with them."""
        self.abort()
        groups = [self.group, *(self._links or {}).values()]
        self.group, self._links = Closed(), None
        for channel in self._channels.values():
            channel.forget()
        return groups

    # -- operations ------------------------------------------------------------------------------

    def start(self, begin: Callable[[], Any], whom: str, *, receives: bool = False) -> Any:
        """Begins an operation with the ranks named; returns its work. One that only receives may last long."""
        if self._guard is not None:
            self._guard.check()
        try:
            work = begin()
        except RuntimeError as error:
            raise self.explain(error, whom) from error
        if self._guard is not None:
            self._guard.began(work, whom)
        if self.gate is not None and self.backend == "nccl" and not receives:
            self.gate.began(work)
        return work

    def send(self, tensor: Tensor, peer: int) -> Any:
        """Begins to send a tensor, which must live until the work is waited for."""
        group, at = self._end(peer, sending=True)
        return self.start(lambda: group.send([tensor], at, 0), self.name(peer))

    def receive(self, buffer: Tensor, peer: int) -> Any:
        """Begins to receive into a tensor."""
        group, at = self._end(peer, sending=False)
        return self.start(lambda: group.recv([buffer], at, 0), self.name(peer), receives=True)

    def _end(self, peer: int, *, sending: bool) -> tuple[Any, int]:
        """The process group to a rank or from it, and the rank's place there."""
        if self._links is None:
            return self.group, peer
        link = next((link for link in self._links if (link.receiver if sending else link.sender) == peer), None)
        if link is None:
            way = "to" if sending else "from"
            raise RuntimeError(f"no communicator for {self.carries} {way} {self.name(peer)} was made at start-up")
        return self._links[link], 1 if sending else 0

    def wait(self, work: Any, peer: int) -> None:
        """Waits for one operation: on gloo until the deadline, on NCCL in the order of streams.

        Raises:
            PatchpipeError: The peer died, failed or did not answer.
        """
        self.wait_for(work, self.name(peer))

    def name(self, peer: int) -> str:
        """A member of the group, for messages."""
        return f"rank {self.ranks[peer] if self.ranks else peer}"

    def wait_for(self, work: Any, whom: str) -> None:
        """The same for ranks named in words."""
        with span(self.recorder, "wait", channel=self.carries, peer=whom):
            try:
                if self.backend == "nccl":
                    work.wait()
                else:
                    work.wait(self.timeout)
            except RuntimeError as error:
                raise self.explain(error, whom) from error
        if self._guard is not None:
            self._guard.check()

    def sent(self, size: int, whom: str) -> None:
        """Notes, for the timeline, that ``size`` bytes set out for a rank or for several."""
        if self.recorder is not None:
            self.recorder.sent(self.carries, size, whom)


class Closed:
    """Stands in for a process group that was given up."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("this rank has closed its connections")


class Channel:
    """Tensors to and from one rank, in the order they are sent."""

    def __init__(self, wire: Wire, peer: int) -> None:
        self.wire, self.peer = wire, peer
        self.sent_bytes = 0
        self.waited_seconds = 0.0
        self._sends: deque[tuple[Any, Tensor]] = deque()
        self._receives: deque[Receive] = deque()
        self._calls: deque[int] = deque()  # sends of each call, oldest first

    def send(self, tensor: Tensor) -> None:
        """Starts sending; returns at once."""
        size = self._send(tensor)
        self.sent_bytes += size
        self.wire.sent(size, self.wire.name(self.peer))

    def _send(self, tensor: Tensor) -> int:
        staged = tensor.detach().to(self.wire.place).contiguous()
        self._sends.append((self.wire.send(staged, self.peer), staged))
        return staged.nbytes

    def next_call(self, requests: int = 1) -> None:
        """Lets go of what was sent some calls ago, which has long arrived: memory must not grow with the steps."""
        self._calls.append(len(self._sends) - sum(self._calls))
        while len(self._calls) > CALLS_IN_FLIGHT * requests:
            for _ in range(self._calls.popleft()):
                self._finish_send()

    def send_nothing(self, shape: torch.Size, dtype: torch.dtype) -> None:
        """Answers a receive of this shape with nothing of use: as little as the transport allows, and not counted."""
        size = torch.Size((1,)) if self.wire.backend == "gloo" else shape  # gloo takes less than was asked for
        self._send(torch.zeros(size, dtype=dtype, device=self.wire.device))

    def expect(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Receive:
        """Posts the receive of the next tensor."""
        buffer = torch.empty(shape, dtype=dtype, device=self.wire.place)
        receive = Receive(self, self.wire.receive(buffer, self.peer), buffer)
        self._receives.append(receive)
        while self._receives and self._receives[0].done:
            self._receives.popleft()
        return receive

    def drain(self) -> None:
        """Waits until nothing is under way, so that the next request starts on a clean channel."""
        while self._receives:
            self._receives.popleft().wait()
        while self._sends:
            self._finish_send()
        self._calls.clear()

    def forget(self) -> None:
        """Lets go of what is under way, arrived or not."""
        for receive in self._receives:
            receive.forget()
        self._receives.clear()
        self._sends.clear()
        self._calls.clear()

    def _finish_send(self) -> None:
        work, _alive = self._sends.popleft()
        self.wire.wait(work, self.peer)


class Receive:
    """A posted receive. Waited for once only: a second wait on gloo never returns."""

    def __init__(self, channel: Channel, work: Any, buffer: Tensor) -> None:
        self._channel, self._work = channel, work
        self._buffer: Tensor | None = buffer

    @property
    def done(self) -> bool:
        """Whether it was waited for."""
        return self._work is None

    def wait(self) -> None:
        """Waits for the tensor without taking it."""
        if self._work is not None:
            started = perf_counter()
            work, self._work = self._work, None
            self._channel.wire.wait(work, self._channel.peer)
            self._channel.waited_seconds += perf_counter() - started

    def forget(self) -> None:
        """Is not waited for any more."""
        self._work = self._buffer = None

    def take(self) -> Tensor:
        """The tensor, on this rank's device; the receive then forgets it."""
        self.wait()
        if self._buffer is None:
            raise RuntimeError("a received tensor was taken twice")
        tensor, self._buffer = self._buffer, None
        return tensor.to(self._channel.wire.device)
