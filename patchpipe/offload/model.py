"""How long blocks wait for weights that come while others compute: the first-order model.

Of a block's S bytes a share r stays on the device. The rest comes in (1 - r)·S / B seconds, and is hidden iff the block
before computes for as long. Chunks may come further ahead, up to the depth, so that what is spare in one block is saved
for the next: the model plays the bytes ahead through a pass of the blocks, and knows no chunks, streams or events.

Copies and exchanges with other ranks that share a link slow each other down. With the gate, no chunk is copied during
an exchange but the one that had begun; without it the exchange takes longer by ``contention`` of the time they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

# Of the time in which copies and a collective share a PCIe link, by which the collective is longer: NCCL's time in Wan
# 430 → 610 ms and in FLUX 632 → 911 ms a step beside copies on two H100 (ChunkFlow, arXiv 2605.11335, its notes).
CONTENTION = 0.43
CHUNK_SECONDS = 12e-6  # to start a copy and to see that it has ended
STARTING = 0.02  # of a chunk's time that may go to that
LEAST_CHUNK, MOST_CHUNK = 2**20, 64 * 2**20
PASSES = 2  # played; the last one counts, when the bytes ahead have settled


@dataclass(frozen=True)
class Passing:
    """One pass of a patch, or of the whole latent, through a rank's blocks.

    Attributes:
        streamed: Bytes of each block that come anew.
        seconds: Of each block, exchanges included.
        exchanges: Seconds of these in which the block's data is exchanged with other ranks.
        count: Exchanges in a block.
    """

    streamed: Sequence[int]
    seconds: Sequence[float]
    exchanges: Sequence[float] = ()
    count: int = 4

    @property
    def exchanged(self) -> Sequence[float]:
        """Seconds of exchanges in each block."""
        return self.exchanges or [0.0] * len(self.seconds)


@dataclass(frozen=True)
class Transfers:
    """How weights come.

    Attributes:
        bandwidth: Bytes a second from the host.
        chunk: Bytes copied at once.
        depth: Chunks ahead of the block that is called.
        gate: Whether chunks wait for exchanges.
        contention: Share of the common time by which copies lengthen an exchange; 0 where links are apart.
        starting: Seconds that a chunk costs beside its bytes.
    """

    bandwidth: float
    chunk: int
    depth: int
    gate: bool = True
    contention: float = CONTENTION
    starting: float = CHUNK_SECONDS

    @property
    def rate(self) -> float:
        """Bytes a second, chunk after chunk."""
        return self.chunk / (self.chunk / self.bandwidth + self.starting)


@dataclass(frozen=True)
class Waiting:
    """What a pass comes to.

    Attributes:
        seconds: The pass.
        stalled: Seconds in which blocks wait for weights.
        inflated: Seconds by which exchanges take longer.
        copied: Bytes.
    """

    seconds: float
    stalled: float
    inflated: float
    copied: int

    @property
    def exposed(self) -> float:
        """Seconds that the pass takes longer than with all weights on the device."""
        return self.stalled + self.inflated


def waiting(passing: Passing, transfers: Transfers) -> Waiting:
    """Plays a pass in the steady state, in which it begins with what the one before has copied ahead."""
    rate, most, blocks = transfers.rate, float(transfers.depth * transfers.chunk), list(_blocks(passing, transfers))
    spare = rate * sum(window for *_, window in blocks) >= sum(passing.streamed)
    ahead = most if spare else 0.0  # what it comes to, nearly, pass after pass
    for _ in range(PASSES):
        stalled = inflated = 0.0
        for size, seconds, exchange, window in blocks:
            missing = max(0.0, size - ahead)
            stalled += missing / rate
            ahead = max(0.0, ahead - size)
            following = min(most - ahead, sum(passing.streamed)) / rate  # seconds of copying there is to do meanwhile
            inflated += _inflation(exchange, following, seconds, passing.count, transfers)
            ahead = min(most, ahead + rate * window)
    return Waiting(sum(passing.seconds) + stalled + inflated, stalled, inflated, sum(passing.streamed))


def _blocks(passing: Passing, transfers: Transfers) -> Iterator[tuple[int, float, float, float]]:
    """Bytes of each block, seconds, those of exchanges, and those in which copies go on at their full rate.

    Without the gate exchanges and copies go on together, each more slowly: what exchanges lose copies do not gain.
    """
    for size, seconds, exchange in zip(passing.streamed, passing.seconds, passing.exchanged, strict=True):
        yield size, seconds, exchange, max(0.0, seconds - exchange) if transfers.gate else seconds


def _inflation(exchange: float, copying: float, seconds: float, count: int, transfers: Transfers) -> float:
    """Seconds by which a block's exchanges take longer: copies meet them as often as anything else in the block."""
    if not exchange or not copying:
        return 0.0
    beside = min(1.0, copying / seconds)
    if not transfers.gate:
        return transfers.contention * beside * exchange
    # But for what is left, half of it as a rule, of the chunk that has begun with every exchange.
    return transfers.contention * min(exchange, beside * count * transfers.chunk / transfers.bandwidth / 2)


def hidden(streamed: float, seconds: float, bandwidth: float) -> bool:
    """Whether a block's weights come while the block before computes: (1 - r)·S / B <= T."""
    return streamed / bandwidth <= seconds


def least_resident(size: float, seconds: float, bandwidth: float) -> float:
    """The share of ``size`` bytes that must stay for the rest to be hidden behind so many seconds."""
    return max(0.0, 1.0 - bandwidth * seconds / size) if size else 0.0


def quicker_gated(passing: Passing, transfers: Transfers) -> bool:
    """Whether copies should wait for exchanges: what that saves these against what it costs those."""
    if not transfers.contention:
        return False
    on, off = (waiting(passing, replace(transfers, gate=gate)) for gate in (True, False))
    return on.seconds <= off.seconds


def chunk_for(bandwidth: float, largest_block: int) -> int:
    """Bytes of a chunk: as few as may be, so that others wait little, and starting it takes little of its time."""
    wanted = CHUNK_SECONDS * bandwidth * (1 / STARTING - 1)
    rounded = max(LEAST_CHUNK, round(wanted / 2**20) * 2**20)
    return int(max(1, min(rounded, MOST_CHUNK, -(-largest_block // 4))))
