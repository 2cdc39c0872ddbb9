"""What stays on the device, in which chunks the rest comes, and how far ahead: by the memory there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from patchpipe.layout.offloading import OffloadConfig
from patchpipe.offload.model import Passing, Transfers, Waiting, chunk_for, quicker_gated, waiting
from patchpipe.offload.residency import chosen, spread
from patchpipe.offload.ring import ring_bytes

GIB, MEGABYTE = 2**30, 10**6
SHARES = 40  # shares of the weights that may stay, which are tried
AHEAD = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the largest block's streamed bytes, that may be there beforehand


@dataclass(frozen=True)
class Inventory:
    """What a rank's blocks weigh, and how long they compute.

    Attributes:
        weights: Aligned bytes of each weight of each block that can come and go.
        seconds: How long each block computes in one pass.
        exchanges: Of these, seconds of exchanges with other ranks.
        transformers: How many transformers alike take turns, each with such blocks.
        fixed: Bytes of the blocks' weights that cannot move.
    """

    weights: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    exchanges: tuple[float, ...] = ()
    transformers: int = 1
    fixed: int = 0

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each block."""
        return tuple(map(sum, self.weights))

    @property
    def total(self) -> int:
        """Bytes of the blocks of one transformer."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Link:
    """What weights come over.

    Attributes:
        bandwidth: Bytes a second.
        contention: Share of common time by which copies lengthen exchanges; 0 where these have links of their own.
    """

    bandwidth: float
    contention: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """How the weights of a rank are kept and moved.

    Attributes:
        resident: The weights of each block that stay, by number.
        streamed: Bytes of each block that come anew in every pass.
        share: Share of the weights that stays.
        stays: Bytes that stay, of all transformers.
        ring: Bytes of the working buffer.
        transfers: Chunks, depth and gate.
        waiting: What a pass is predicted to come to.
    """

    resident: tuple[tuple[int, ...], ...]
    streamed: tuple[int, ...]
    share: float
    stays: int
    ring: int
    transfers: Transfers
    waiting: Waiting

    @property
    def bytes(self) -> int:
        """Bytes of the device that the blocks' weights take at most."""
        return self.stays + self.ring


def choose(asked: OffloadConfig, inventory: Inventory, link: Link, memory: int | None = None) -> Chosen:
    """Picks the share that stays, the chunks and the depth: the quickest by the model that the memory holds.

    Args:
        asked: What is fixed already.
        inventory: The blocks.
        link: What weights come over.
        memory: Bytes of the device for them, where ``asked`` names none; ``None`` is as many as it takes.

    Raises:
        ValueError: The least that would do is more than the memory.
    """
    limit = memory if asked.memory is None else int(asked.memory * GIB)
    found = list(_candidates(asked, inventory, link, limit))
    fitting = [each for each in found if limit is None or each.bytes <= limit]
    if fitting:
        return min(fitting, key=lambda each: (each.waiting.seconds, each.bytes))
    least = min(found, key=lambda each: each.bytes)
    raise ValueError(
        f"offload: the weights of a rank's blocks need at least {_gib(least.bytes)} on the device ({least.share:.0%} "
        f"of them stay there, and {_gib(least.ring)} is working memory), but there is only {_gib(limit or 0)}: give "
        f"more memory, smaller chunks or less depth, or use more stages"
    )


def _candidates(asked: OffloadConfig, inventory: Inventory, link: Link, limit: int | None) -> Iterator[Chosen]:
    """For every depth the largest share that fits: what stays need not come."""
    trial = Trial(asked, inventory, link)
    for part in AHEAD:
        if asked.resident is not None:
            yield trial.at(asked.resident, part)
            continue
        low, high = 0, SHARES + 1  # of SHARES: the most that is known to fit, the least that is known not to
        if limit is None or trial.at(1.0, part).bytes <= limit:
            low = SHARES
        while high - low > 1 and low < SHARES:
            middle = (low + high) // 2
            fits = limit is not None and trial.at(middle / SHARES, part).bytes <= limit
            low, high = (middle, high) if fits else (low, middle)
        yield trial.at(low / SHARES, part)


class Trial:
    """Works out what shares and depths come to.

    Args:
        asked: What is fixed already.
        inventory: The blocks.
        link: What weights come over.
    """

    def __init__(self, asked: OffloadConfig, inventory: Inventory, link: Link) -> None:
        self._asked, self._inventory, self._link = asked, inventory, link
        self._known: dict[float, Kept] = {}
        wanted = chunk_for(link.bandwidth, max(inventory.sizes, default=0))
        self._chunk = int(asked.chunk * MEGABYTE) if asked.chunk is not None else wanted

    def at(self, share: float, part: float) -> Chosen:
        """A share that stays, and a depth in parts of the largest block's streamed bytes."""
        kept = self._kept(share)
        largest = max(kept.streamed, default=0)
        depth = self._asked.depth or max(1, -(-int(part * largest) // self._chunk))
        transfers = Transfers(self._link.bandwidth, self._chunk, depth, contention=self._link.contention)
        passing = Passing(kept.streamed, self._inventory.seconds, self._inventory.exchanges)
        gate = quicker_gated(passing, transfers) if self._asked.gate == "auto" else self._asked.gate == "on"
        transfers = replace(transfers, gate=gate)
        ring = ring_bytes(largest, kept.tensor, depth, self._chunk)
        stays = 1 - sum(kept.streamed) / max(1, self._inventory.total + self._inventory.fixed)
        return Chosen(kept.resident, kept.streamed, stays, kept.stays, ring, transfers, waiting(passing, transfers))

    def _kept(self, share: float) -> Kept:
        if share not in self._known:
            self._known[share] = kept_at(share, self._inventory, self._link.bandwidth)
        return self._known[share]


@dataclass(frozen=True)
class Kept:
    """What stays at a share.

    Attributes:
        resident: The weights of each block, by number.
        streamed: Bytes of each block that do not.
        stays: Bytes that do, of all transformers.
        tensor: Bytes of the largest weight that does not.
    """

    resident: tuple[tuple[int, ...], ...]
    streamed: tuple[int, ...]
    stays: int
    tensor: int


def kept_at(share: float, inventory: Inventory, bandwidth: float) -> Kept:
    """Spreads a share of the weights over the blocks."""
    exchanges = inventory.exchanges or [0.0] * len(inventory.seconds)
    alone = [max(0.0, one - other) for one, other in zip(inventory.seconds, exchanges, strict=True)]
    targets = spread(inventory.sizes, alone, bandwidth, share * inventory.total)
    staying = chosen(inventory.weights, targets)
    coming = [
        [size for number, size in enumerate(sizes) if number not in kept]
        for sizes, kept in zip(inventory.weights, map(set, staying), strict=True)
    ]
    streamed = tuple(map(sum, coming))
    stays = inventory.transformers * (inventory.total - sum(streamed) + inventory.fixed)
    return Kept(tuple(map(tuple, staying)), streamed, stays, max(map(max, filter(None, coming)), default=0))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / MEGABYTE:.2f} MB"
