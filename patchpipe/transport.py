"""Ordered asynchronous tensors between two ranks, whose shapes both sides know beforehand.

Receives are posted before the data is needed and waited for once; what is sent is kept alive until it
has left. On gloo, CUDA tensors go through host memory, so that ranks may share a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from patchpipe.tracing.recorder import Recorder, span

Explain = Callable[[Exception, str], Exception]
EXCHANGE_TAG = 1  # apart from the tensors of channels, whose receives may be posted long before
CALLS_IN_FLIGHT = 3  # of the transformer, for each request: it waits for the last step's answers, two calls at most


class Wire:
    """One process group, seen as channels to its ranks.

    Args:
        group: The process group (gloo or NCCL).
        device: Where this rank computes.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: Seconds any wait may last.
        explain: Turns a failed wait into the error to raise.
        carries: What kind of tensors it carries, for the timeline.

    Attributes:
        recorder: Of the request under way, if it is traced.
    """

    def __init__(
        self, group: Any, device: torch.device, backend: str, timeout: float, explain: Explain, carries: str = ""
    ) -> None:
        self.group, self.device, self.backend = group, device, backend
        self.staged = backend == "gloo" and device.type != "cpu"
        self.timeout = timedelta(seconds=timeout)
        self.explain = explain
        self.ranks: tuple[int, ...] | None = None  # of the group's members among all ranks, where they differ
        self.carries = carries
        self.recorder: Recorder | None = None
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

    def close(self) -> None:
        """Gives up the process group and whatever is under way, so that the connections close at once."""
        self.group = Closed()
        for channel in self._channels.values():
            channel.forget()

    def wait(self, work: Any, peer: int) -> None:
        """Waits for one operation, until the deadline.

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
                work.wait(self.timeout)
            except RuntimeError as error:
                raise self.explain(error, whom) from error

    def sent(self, size: int, whom: str) -> None:
        """Notes, for the timeline, that ``size`` bytes set out for a rank or for several."""
        if self.recorder is not None:
            self.recorder.sent(self.carries, size, whom)


class Exchange:
    """All-to-all, all-gather and hops around a ring, among the ranks of one line of the mesh.

    Args:
        wire: Their process group.
        index: This rank's place in the line.
        size: Ranks in the line.
        ranks: Their ranks in the whole group, for messages.
    """

    def __init__(self, wire: Wire, index: int, size: int, ranks: tuple[int, ...]) -> None:
        self.wire, self.index, self.size, self.ranks = wire, index, size, ranks
        self.wire.ranks = ranks
        self.sent_bytes = 0
        self.waited_seconds = 0.0

    def spread(self, own: Tensor, shapes: list[tuple[int, ...]]) -> dict[int, Receive]:
        """Starts to give every rank this one's tensor and to get theirs; returns at once.

        Args:
            own: This rank's tensor; not to be written to afterwards.
            shapes: Shape of each rank's tensor, all of one dtype.

        Returns:
            The receive of each other rank's tensor.
        """
        receives = {}
        for peer in (*range(self.index), *range(self.index + 1, self.size)):
            channel = self.wire.channel(peer)
            # NCCL runs what one pair does in order: the two must not both begin with a send.
            if self.index < peer:
                channel.send(own)
            receives[peer] = channel.expect(shapes[peer], own.dtype)
            if self.index > peer:
                channel.send(own)
        self.sent_bytes += own.nbytes * len(receives)
        return receives

    def take(self, receive: Receive) -> Tensor:
        """What another rank gave in ``spread``; waits for it."""
        started = perf_counter()
        receive.wait()
        self.waited_seconds += perf_counter() - started
        return receive.take()

    def all_to_all(self, sent: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Gives each rank its tensor and returns what each gave this one, of the ``shapes`` known beforehand."""
        place = torch.device("cpu") if self.wire.staged else self.wire.device
        out = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in sent]
        outgoing = torch.cat(out).to(place)
        sizes = [torch.Size(shape).numel() * sent[0].element_size() for shape in shapes]
        incoming = torch.empty(sum(sizes), dtype=torch.uint8, device=place)
        started = perf_counter()
        self.wire.wait_for(self._begin(incoming, outgoing, sizes, [piece.numel() for piece in out]), self.whom)
        self.waited_seconds += perf_counter() - started
        size = outgoing.numel() - out[self.index].numel()
        self.sent_bytes += size
        self.wire.sent(size, f"the ranks {self.ranks}")
        pieces = incoming.to(self.wire.device).split(sizes)
        return [piece.view(sent[0].dtype).view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def pass_on(self, sent: Tensor, shape: torch.Size | tuple[int, ...]) -> Shift:
        """Starts giving a tensor to the next rank of the line and taking one from the rank before; returns at once.

        Args:
            sent: Any shape; the next rank knows it.
            shape: Of what comes from the rank before; of the same dtype.
        """
        place = torch.device("cpu") if self.wire.staged else self.wire.device
        outgoing = sent.contiguous().view(-1).view(torch.uint8).to(place)
        size = torch.Size(shape).numel() * sent.element_size()
        incoming = torch.empty(size, dtype=torch.uint8, device=place)
        # One all-to-all that is empty between other ranks: NCCL would run a lone send before a lone receive, and
        # ranks in a circle would then wait for each other.
        out, into = [0] * self.size, [0] * self.size
        out[(self.index + 1) % self.size], into[(self.index - 1) % self.size] = outgoing.numel(), size
        work = self._begin(incoming, outgoing, into, out)
        self.sent_bytes += outgoing.numel()
        self.wire.sent(outgoing.numel(), self.wire.name((self.index + 1) % self.size))
        return Shift(self, work, outgoing, incoming, sent.dtype, shape)

    def _begin(self, incoming: Tensor, outgoing: Tensor, into: list[int], out: list[int]) -> Any:
        try:
            if self.wire.backend == "gloo":
                return self._begin_in_pairs(incoming.split(into), outgoing.split(out))
            return self.wire.group.alltoall_base(incoming, outgoing, into, out)
        except RuntimeError as error:
            raise self.wire.explain(error, self.whom) from error

    def _begin_in_pairs(self, incoming: Sequence[Tensor], outgoing: Sequence[Tensor]) -> Works:
        """The same by sends and receives, which go both ways at once: gloo's all-to-all takes the ways in turn."""
        incoming[self.index].copy_(outgoing[self.index])
        peers = [(self.index + step) % self.size for step in range(1, self.size)]
        group = self.wire.group
        receives = [group.recv([incoming[peer]], peer, EXCHANGE_TAG) for peer in peers if incoming[peer].numel()]
        sends = [group.send([outgoing[peer]], peer, EXCHANGE_TAG) for peer in peers if outgoing[peer].numel()]
        return Works([*receives, *sends])

    @property
    def whom(self) -> str:
        """The ranks of the line, for messages."""
        return f"one of the ranks {self.ranks}"


class Works:
    """Several operations waited for as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, timeout: timedelta) -> None:
        """Waits for all of them, each until the deadline."""
        for work in self._works:
            work.wait(timeout)


class Shift:
    """A tensor on its way to the next rank of a line, and one on its way from the rank before."""

    def __init__(
        self,
        exchange: Exchange,
        work: Any,
        outgoing: Tensor,
        incoming: Tensor,
        dtype: torch.dtype,
        shape: torch.Size | tuple[int, ...],
    ) -> None:
        self._exchange, self._work, self._incoming = exchange, work, incoming
        self._dtype, self._shape = dtype, shape
        self._alive: Tensor | None = outgoing  # until it has left

    def take(self) -> Tensor:
        """The tensor from the rank before, on this rank's device; once only."""
        if self._work is None:
            raise RuntimeError("a passed tensor was taken twice")
        exchange, work, self._work = self._exchange, self._work, None
        started = perf_counter()
        exchange.wire.wait_for(work, exchange.whom)
        exchange.waited_seconds += perf_counter() - started
        self._alive = None
        return self._incoming.to(exchange.wire.device).view(self._dtype).view(self._shape)


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
        staged = tensor.detach().to("cpu") if self.wire.staged else tensor.detach()
        staged = staged.contiguous()
        try:
            work = self.wire.group.send([staged], self.peer, 0)
        except RuntimeError as error:
            raise self.wire.explain(error, self.wire.name(self.peer)) from error
        self._sends.append((work, staged))
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
        place = torch.device("cpu") if self.wire.staged else self.wire.device
        buffer = torch.empty(shape, dtype=dtype, device=place)
        try:
            work = self.wire.group.recv([buffer], self.peer, 0)
        except RuntimeError as error:
            raise self.wire.explain(error, self.wire.name(self.peer)) from error
        receive = Receive(self, work, buffer)
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
        return tensor.to(self._channel.wire.device, non_blocking=True)
