"""All-to-all, all-gather and hops around a ring, among the ranks of one line of the mesh."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from patchpipe.distributed.transport import CALLS_IN_FLIGHT, Wire

Shape: TypeAlias = torch.Size | tuple[int, ...]
EXCHANGE_TAG = 1  # apart from the tensors of channels, whose receives may be posted long before


class Coming(Protocol):
    """What every rank of a line gives this one, on its way."""

    def take(self) -> list[Tensor]:
        """All of it, by rank; once only."""
        ...


class Trading(Protocol):
    """Ranks that give each other tensors, all to all."""

    index: int
    size: int

    def trade(self, sent: Sequence[Tensor], shape_of: Callable[[int, int], Shape]) -> Coming:
        """See ``Exchange.trade``."""
        ...


class Exchange:
    """All-to-all, all-gather and hops around a ring, among the ranks of one line of the mesh.

    Every rank of the line asks for the same thing at the same place.

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
        self._open: deque[Pieces] = deque()  # gatherings that nobody has waited for yet
        self._calls: deque[int] = deque()  # gatherings of each call that are open, oldest first

    def meet(self) -> None:
        """Makes the line's communicator, over NCCL: all its ranks come to this place, or none goes on."""
        nothing = torch.zeros(1, device=self.wire.place)
        self.wait(self.wire.start(lambda: self.wire.group.allreduce([nothing]), self.whom))

    def spread(self, own: Tensor, shapes: Sequence[Shape]) -> Pieces:
        """Starts to give every rank this one's tensor and to get theirs; returns at once.

        Args:
            own: This rank's tensor; not to be written to afterwards.
            shapes: Shape of each rank's tensor, all of one dtype.

        Returns:
            The tensors of all the ranks, on their way.
        """
        pieces = self._start([own] * self.size, shapes)
        self._open.append(pieces)
        return pieces

    def all_to_all(self, sent: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Gives each rank its tensor and returns what each gave this one, of the ``shapes`` known beforehand."""
        return self._start(sent, shapes).take()

    def trade(self, sent: Sequence[Tensor], shape_of: Callable[[int, int], Shape]) -> Pieces:
        """Starts to give each rank its tensor and to take what each gives this one; returns at once.

        Args:
            sent: What each rank is given, all of one dtype; not to be written to until it was taken there.
            shape_of: The shape of what a rank gives another, by their places in the line.
        """
        return self._start(sent, [shape_of(source, self.index) for source in range(self.size)])

    def pass_on(self, sent: Tensor, shape: Shape) -> Shift:
        """Starts giving a tensor to the next rank of the line and taking one from the rank before; returns at once.

        Args:
            sent: Any shape; the next rank knows it.
            shape: Of what comes from the rank before; of the same dtype.
        """
        # An all-to-all that is empty between other ranks: NCCL would run a lone send before a lone receive, and
        # ranks in a circle would then wait for each other.
        nothing = sent.new_empty((0,))
        out, into = [nothing] * self.size, [torch.Size((0,))] * self.size
        out[(self.index + 1) % self.size], into[(self.index - 1) % self.size] = sent, torch.Size(shape)
        return Shift(self._start(out, into), (self.index - 1) % self.size)

    def complete(self, parts: Sequence[Tensor]) -> None:
        """Gives every rank this one's part of something, and takes theirs to where they belong in it.

        Args:
            parts: Each rank's part of it, in one piece of memory each, where the group takes it from. The other ranks'
                parts are there afterwards: over gloo when this returns, over NCCL in the order of streams.
        """
        nothing = parts[self.index].new_empty((0,))
        incoming, outgoing = list(parts), [parts[self.index]] * self.size
        incoming[self.index] = outgoing[self.index] = nothing
        self.wait(self.wire.start(lambda: self._begin(incoming, outgoing), self.whom))
        self.sent_bytes += (self.size - 1) * parts[self.index].nbytes

    def next_call(self, requests: int = 1) -> None:
        """Lets go of what was gathered for calls long past; see ``Channel.next_call``."""
        self._calls.append(len(self._open) - sum(self._calls))
        while len(self._calls) > CALLS_IN_FLIGHT * requests:
            for _ in range(self._calls.popleft()):
                self._open.popleft().wait()

    def drain(self) -> None:
        """Waits until nothing is under way."""
        while self._open:
            self._open.popleft().wait()
        self._calls.clear()

    def forget(self) -> None:
        """Lets go of what is under way, arrived or not."""
        self._open.clear()
        self._calls.clear()

    def wait(self, work: Any) -> None:
        """Waits for an operation of the whole line."""
        started = perf_counter()
        gate = self.wire.gate if self.wire.backend == "gloo" else None
        with nullcontext() if gate is None else gate.awaited():
            for one, whom in work if isinstance(work, list) else [(work, self.whom)]:
                self.wire.wait_for(one, whom)
        self.waited_seconds += perf_counter() - started

    def _start(self, sent: Sequence[Tensor], shapes: Sequence[Shape]) -> Pieces:
        """One operation that gives every rank its tensor; what a rank gives itself stays where it is."""
        wire, own = self.wire, self.index
        outgoing = [tensor.detach().to(wire.place).contiguous() for tensor in sent]
        incoming = [torch.empty(shape, dtype=sent[0].dtype, device=wire.place) for shape in shapes]
        kept, incoming[own] = sent[own], incoming[own].new_empty((0,))
        size = sum(piece.nbytes for place, piece in enumerate(outgoing) if place != own)
        outgoing[own] = incoming[own]
        work = wire.start(lambda: self._begin(incoming, outgoing), self.whom)
        self.sent_bytes += size
        others = [place for place, piece in enumerate(outgoing) if piece.numel()]
        wire.sent(size, wire.name(others[0]) if len(others) == 1 else f"the ranks {self.ranks}")
        return Pieces(self, work, kept, incoming, outgoing)

    def _begin(self, incoming: list[Tensor], outgoing: list[Tensor]) -> Any:
        """The work of the exchange; over gloo those of its parts, each with the rank it is with."""
        group = self.wire.group
        if self.wire.backend == "nccl":
            return group.alltoall(incoming, outgoing)
        # By sends and receives, which go both ways at once: gloo's all-to-all takes the ways in turn.
        peers = [(self.index + step) % self.size for step in range(1, self.size)]
        come, go = ([peer for peer in peers if pieces[peer].numel()] for pieces in (incoming, outgoing))
        works = [group.recv([incoming[peer]], peer, EXCHANGE_TAG) for peer in come]
        works += [group.send([outgoing[peer]], peer, EXCHANGE_TAG) for peer in go]
        return [(work, self.wire.name(peer)) for work, peer in zip(works, (*come, *go), strict=True)]

    @property
    def whom(self) -> str:
        """The other ranks of the line, for messages."""
        others = [str(rank) for at, rank in enumerate(self.ranks) if at != self.index]
        return f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {', '.join(others)}"


class Pieces:
    """A tensor of every rank of a line, on their way together. Waited for once."""

    def __init__(
        self, exchange: Exchange, work: Any, own: Tensor, incoming: list[Tensor], outgoing: list[Tensor]
    ) -> None:
        self._exchange, self._work, self._own, self._incoming = exchange, work, own, incoming
        self._alive: list[Tensor] | None = outgoing  # until they have left

    def wait(self) -> None:
        """Waits for all of them without taking them."""
        if self._work is not None:
            work, self._work = self._work, None
            self._exchange.wait(work)
            self._alive = None

    def take(self) -> list[Tensor]:
        """All of them, on this rank's device."""
        self.wait()
        device = self._exchange.wire.device
        pieces = [piece.to(device) for piece in self._incoming]
        pieces[self._exchange.index] = self._own
        return pieces


class Shift:
    """A tensor on its way to the next rank of a line, and one on its way from the rank before."""

    def __init__(self, pieces: Pieces, source: int) -> None:
        self._pieces: Pieces | None = pieces
        self._source = source

    def take(self) -> Tensor:
        """The tensor from the rank before; once only."""
        if self._pieces is None:
            raise RuntimeError("a passed tensor was taken twice")
        pieces, self._pieces = self._pieces, None
        return pieces.take()[self._source]
