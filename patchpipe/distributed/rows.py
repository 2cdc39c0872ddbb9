"""The ranks that share a picture's rows, and what they tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from patchpipe.distributed.process_groups import ProcessGroups
from patchpipe.distributed.transport import Channel, Explain, Receive, Wire
from patchpipe.errors import RankLost

ROWS = -2  # height is the last but one dim of pictures and of videos alike


class Halo(Protocol):
    """Border rows of the neighbours, on their way."""

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The rows just above and just below the strip; ``None`` where the picture ends or none were asked for."""
        ...


class RowGroup(Protocol):
    """Ranks whose strips, in rank order from top to bottom, make the picture.

    Every method is collective: all ranks call it in the same order, with shapes that differ in the cut dim only.
    """

    @property
    def rank(self) -> int:
        """This rank's place, from the top."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def exchange_halo(self, strip: Tensor, above: int, below: int) -> Halo:
        """Starts fetching ``above`` rows of the upper neighbour and ``below`` of the lower; sends it theirs.

        Args:
            strip: This rank's rows, of shape (..., rows, width).
            above: Rows every rank wants from the one above it.
            below: Rows every rank wants from the one below it.
        """
        ...

    def all_gather(self, piece: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """All ranks' pieces joined along ``dim``, on every rank; ``sizes`` are their lengths there."""
        ...

    def gather(self, piece: Tensor, sizes: Sequence[int], dim: int, root: int) -> Tensor | None:
        """All ranks' pieces joined along ``dim`` on ``root``; ``None`` on the others."""
        ...


class WireRows:
    """A ``RowGroup`` over a wire of ordered point-to-point messages.

    Receives are posted before anything is sent, and both are waited for before the next message, so that no
    more than one layer's borders are ever held. CUDA tensors go through host memory.

    Args:
        wire: A gloo wire. NCCL orders sends and receives of one communicator: two neighbours that each
            receive first would wait for each other.
        rank: This rank's place, from the top.
        size: Number of ranks.
    """

    def __init__(self, wire: Wire, rank: int, size: int) -> None:
        self.rank, self.size, self.wire = rank, size, wire
        self._channels: dict[int, Channel] = {peer: wire.channel(peer) for peer in range(size) if peer != rank}

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank has sent so far."""
        return sum(channel.sent_bytes for channel in self._channels.values())

    def exchange_halo(self, strip: Tensor, above: int, below: int) -> Halo:
        """See ``RowGroup``.

        Raises:
            ValueError: The strip has fewer rows than a neighbour wants of it.
        """
        rows = strip.shape[ROWS]
        if rows < max(above, below):
            raise ValueError(f"rank {self.rank} has {rows} rows but its neighbours need {max(above, below)} of them")
        upper = self._channels.get(self.rank - 1)
        lower = self._channels.get(self.rank + 1)
        expected = (_expect(upper, strip, above), _expect(lower, strip, below))
        _send(upper, strip.narrow(ROWS, 0, below))
        _send(lower, strip.narrow(ROWS, rows - above, above))
        return _WireHalo(expected, [channel for channel in (upper, lower) if channel is not None])

    def all_gather(self, piece: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """See ``RowGroup``."""
        expected = self._expect_pieces(piece, sizes, dim)
        for channel in self._channels.values():
            channel.send(piece)
        whole = self._join(piece, expected, dim)
        self.finish()
        return whole

    def gather(self, piece: Tensor, sizes: Sequence[int], dim: int, root: int) -> Tensor | None:
        """See ``RowGroup``."""
        if self.rank == root:
            return self._join(piece, self._expect_pieces(piece, sizes, dim), dim)
        self._channels[root].send(piece)
        self.finish()
        return None

    def finish(self) -> None:
        """Waits until all that was sent has left."""
        for channel in self._channels.values():
            channel.drain()

    def _expect_pieces(self, like: Tensor, sizes: Sequence[int], dim: int) -> dict[int, Receive]:
        expected = {}
        for peer, channel in self._channels.items():
            shape = list(like.shape)
            shape[dim] = sizes[peer]
            expected[peer] = channel.expect(tuple(shape), like.dtype)
        return expected

    def _join(self, piece: Tensor, expected: dict[int, Receive], dim: int) -> Tensor:
        # What ranks agree on stays on the host, where it is read; the wire delivers to the device.
        pieces = {peer: receive.take().to(piece.device) for peer, receive in expected.items()}
        pieces[self.rank] = piece
        return torch.cat([pieces[rank] for rank in range(self.size)], dim)


class _WireHalo:
    def __init__(self, expected: tuple[Receive | None, Receive | None], channels: list[Channel]) -> None:
        self._expected, self._channels = expected, channels

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        above, below = (None if receive is None else receive.take() for receive in self._expected)
        for channel in self._channels:
            channel.drain()  # the neighbour posted its receive before it sent what has just arrived
        return above, below


def join_rows(
    groups: ProcessGroups,
    rank: int,
    size: int,
    *,
    device: torch.device | str = "cpu",
    name: str = "vae",
    explain: Explain | None = None,
) -> WireRows:
    """Joins the ranks that share a picture's rows; every one of them calls it.

    Args:
        groups: Makes the process group; its timeout is every wait's.
        rank: This rank's place, from the top.
        size: Number of ranks.
        device: Where this rank computes.
        name: Tells this group from others on the same store.
        explain: Turns a failed wait into the error to raise.
    """
    inner = groups.make(name, "gloo", rank, size) if size > 1 else None
    wire = Wire(inner, torch.device(device), "gloo", groups.timeout, explain or _lost, "vae")
    return WireRows(wire, rank, size)


def _lost(error: Exception, peer: str) -> Exception:
    return RankLost(f"{peer} of the VAE's ranks died or did not answer in time: {error}")


def _expect(channel: Channel | None, strip: Tensor, rows: int) -> Receive | None:
    if channel is None or rows == 0:
        return None
    return channel.expect((*strip.shape[:ROWS], rows, strip.shape[-1]), strip.dtype)


def _send(channel: Channel | None, rows: Tensor) -> None:
    if channel is not None and rows.shape[ROWS] > 0:
        # A copy of its own: the next layer may write into the strip before these rows have left.
        channel.send(rows.clone(memory_format=torch.contiguous_format))
