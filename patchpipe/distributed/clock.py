"""How far apart the clocks of the ranks' hosts are, and how their events come together."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

import torch

from patchpipe.distributed.transport import Wire

PINGS = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Offset:
    """How to read this rank's clock on rank 0's.

    Attributes:
        nanoseconds: To be added to this rank's moments.
        uncertainty: Nanoseconds by which that may be wrong, either way.
    """

    nanoseconds: int = 0
    uncertainty: int = 0


def align(
    wire: Wire,
    rank: int,
    world_size: int,
    *,
    host: int | None = None,
    clock: Callable[[], int] = perf_counter_ns,
) -> Offset:
    """The offset of this rank's clock to rank 0's; every rank calls it.

    Processes of one host read one monotonic clock. Between hosts, rank 0 answers each rank's pings, and the one
    with the shortest way there and back counts (Cristian, 1989; NTP, RFC 5905, section 8).

    Args:
        wire: Among all ranks.
        rank: This rank.
        world_size: Number of ranks.
        host: Tells one host's clock from another's; ``None`` looks it up.
        clock: Nanoseconds.
    """
    own = host_number() if host is None else host
    if rank == 0:
        for peer in range(1, world_size):
            _answer(wire, peer, own, clock)
        return Offset()
    _tell(wire, 0, own)
    if _hear(wire, 0) == own:
        return Offset()
    return min((_ping(wire, clock) for _ in range(PINGS)), key=lambda offset: offset.uncertainty)


def host_number() -> int:
    """A number for the machine whose monotonic clock this process reads."""
    try:
        name = _BOOT_ID.read_text(encoding="ascii")
    except OSError:  # not Linux
        name = socket.gethostname()
    return zlib.crc32(name.encode())


def gather(wire: Wire, rank: int, world_size: int, data: bytes, root: int) -> list[bytes] | None:
    """Every rank's bytes, by rank, on the root; ``None`` on the others."""
    if rank != root:
        _tell(wire, root, len(data))
        wire.channel(root).send(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        wire.drain()
        return None
    return [data if peer == root else _hear_bytes(wire, peer) for peer in range(world_size)]


def _answer(wire: Wire, peer: int, own: int, clock: Callable[[], int]) -> None:
    other = _hear(wire, peer)
    _tell(wire, peer, own)
    for _ in range(PINGS if other != own else 0):
        _hear(wire, peer)
        _tell(wire, peer, clock())
    wire.drain()


def _ping(wire: Wire, clock: Callable[[], int]) -> Offset:
    sent = clock()
    _tell(wire, 0, 0)
    answered = _hear(wire, 0)
    back = clock()
    return Offset(answered - (sent + back) // 2, (back - sent + 1) // 2)


def _tell(wire: Wire, peer: int, number: int) -> None:
    wire.channel(peer).send(torch.tensor([number], dtype=torch.int64))


def _hear(wire: Wire, peer: int) -> int:
    return int(wire.channel(peer).expect((1,), torch.int64).take())


def _hear_bytes(wire: Wire, peer: int) -> bytes:
    size = _hear(wire, peer)
    return wire.channel(peer).expect((size,), torch.uint8).take().numpy().tobytes()
