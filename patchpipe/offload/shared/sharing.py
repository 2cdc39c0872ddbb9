"""Which ranks share one copy of their weights in host memory, and who packs it.

Ranks of one host that stand alike along the axes that decide which weights a rank holds have the same. The first of
them packs a block, the others compare it with their own, map it and let their own go, and only then comes the next
block. Whoever cannot keeps a copy of its own, and says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from patchpipe.distributed.joining import Process
from patchpipe.distributed.mesh import Group
from patchpipe.errors import RankFailed
from patchpipe.layout.axes import Mesh
from patchpipe.offload.shared.file import MemoryFile, Place
from patchpipe.offload.shared.home import OtherWeights, SharedHome, packed
from patchpipe.offload.shared.peers import GREETING, Peers
from patchpipe.offload.weights import Home, HostHome, Shape, Weight

logger = logging.getLogger("patchpipe")
APART = "they are on this machine, but in a container whose processes it cannot see"
DIFFERENT = (
    "they have other weights, or have chosen others to stay on the device (memory=… or resident=… would fix that)"
)


def holders(mesh: Mesh) -> tuple[int, ...]:
    """The ranks that hold the same weights as this one: of the same stage, and with the same slices."""
    here = mesh.at("tensor")
    return tuple(rank for rank in mesh.stage(mesh.at("pipe")) if mesh.at("tensor", rank) == here)


def digest_of(blocks: Sequence[Sequence[Weight]], resident: Sequence[Sequence[int]]) -> str:
    """What tells whether two ranks would pack alike: every weight but for its values, and which of them stay.

    Args:
        blocks: The weights of each block.
        resident: Of each block the weights that stay on the device, by number.
    """
    told = [
        [(weight.name, type(weight.found).__name__, [str(Shape.of(each)) for each in weight.plain]) for weight in block]
        for block in blocks
    ]
    return hashlib.sha256(json.dumps([told, resident]).encode()).hexdigest()


@dataclass(frozen=True)
class InHost:
    """What of a rank's weights is in host memory.

    Attributes:
        bytes: All of it.
        shared: Of these, bytes that the host has once for several ranks.
        ranks: Those ranks, this one included.
    """

    bytes: int = 0
    shared: int = 0
    ranks: tuple[int, ...] = ()

    @property
    def words(self) -> str:
        """The same at the end of a line for people; nothing where nothing is there."""
        if not self.bytes:
            return ""
        if not self.shared:
            return f"; {self.bytes / 1e6:,.1f} MB in host memory"
        ranks = ", ".join(map(str, self.ranks))
        some = "" if self.shared == self.bytes else f", of which {self.shared / 1e6:,.1f} MB are"
        return f"; {self.bytes / 1e6:,.1f} MB in host memory{some}, once for ranks {ranks}"


def in_host(homes: Iterable[Home], ranks: Sequence[int]) -> InHost:
    """What of the homes of a rank's blocks is in host memory.

    Args:
        homes: Where the weights of each block come from.
        ranks: Those that share it, where it is shared.
    """
    here = [home for home in homes if home.in_memory]
    shared = sum(home.nbytes for home in here if home.shared)
    return InHost(sum(home.nbytes for home in here), shared, tuple(ranks) if shared else ())


class Sharing:
    """The ranks that share a stage's weights, which pack and map one block after the other.

    Args:
        rank: This rank.
        ranks: All of them, this one included; it may be the only one.
        peers: How they talk.

    Attributes:
        ranks: All of them.
    """

    def __init__(self, rank: int, ranks: Sequence[int] = (), peers: Peers | None = None) -> None:
        self.ranks = tuple(ranks) or (rank,)
        self._rank, self._peers, self._blocks = rank, peers, 0
        self._noted = False

    @classmethod
    def among(cls, group: Group, digest: str | None, problem: Exception | None) -> Sharing:
        """Finds the ranks to share with; all that hold the same weights call it alike.

        Args:
            group: The ranks.
            digest: What this rank would pack; ``None`` if it has a problem.
            problem: Why this rank cannot go on, if it cannot; raised once the others know.

        Raises:
            Exception: This rank's problem.
            RankFailed: Another rank has one that this one has not.
            RankLost: Another rank did not say what it would pack.
        """
        processes = _processes(group)
        if group.store is None or len(processes) < 2:
            if problem is not None:
                raise problem
            return cls(group.rank)
        peers = Peers(group.store, group.rank, processes, group.failures, group.config.timeout)
        if problem is not None:
            peers.tell(GREETING, {"problem": f"{type(problem).__name__}: {problem}"})
            raise problem
        told = peers.greet({"digest": digest, "problem": None})
        return cls(group.rank, _alike(group.rank, told), peers)

    def home(self, weights: Sequence[Weight], *, pinned: bool) -> Home:
        """Takes the streamed weights of the next block to host memory; those that share call it alike.

        Args:
            weights: The weights.
            pinned: Whether the device can copy from it by itself.

        Raises:
            PatchpipeError: Another rank has failed or died.
        """
        self._blocks += 1
        if self._peers is None or len(self.ranks) == 1:
            return HostHome(weights, pinned=pinned)
        share = self._lead if self._rank == self.ranks[0] else self._follow
        try:
            return share(self._peers, f"block {self._blocks}", weights, pinned)
        except (OSError, OtherWeights) as problem:
            self._note(str(problem))
            return HostHome(weights, pinned=pinned)

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.ranks if rank != self._rank)

    def _lead(self, peers: Peers, topic: str, weights: Sequence[Weight], pinned: bool) -> Home:
        """Packs a block for all."""
        try:
            with MemoryFile(sum(weight.nbytes for weight in weights)) as file:
                packed(file.place, weights)
                home = SharedHome(file.place, weights, pinned=pinned, compared=False)
                peers.tell(topic, asdict(file.place))
                took = [peers.hear(topic, rank) for rank in self._others]
                home.shared = any(took)
        except Exception as problem:
            peers.tell(topic, {"problem": str(problem)})
            raise
        peers.forget(topic, self.ranks)
        return home

    def _follow(self, peers: Peers, topic: str, weights: Sequence[Weight], pinned: bool) -> Home:
        """Maps a block that another rank has packed."""
        leader, home = self.ranks[0], None
        told = peers.hear(topic, leader)
        try:
            if "problem" in told:
                raise OSError(f"rank {leader} found: {told['problem']}")
            home = SharedHome(Place(**told), weights, pinned=pinned, compared=True)
        finally:
            peers.tell(topic, home is not None)
        return home

    def _note(self, why: str) -> None:
        """Says once why not all is shared."""
        if not self._noted:
            ranks = ", ".join(map(str, self._others))
            logger.warning("offload: rank %d does not share all its weights with ranks %s: %s", self._rank, ranks, why)
        self._noted = True


def _processes(group: Group) -> dict[int, int]:
    """The ranks of this host that hold the same weights as this one and can see each other, with their processes."""
    if group.store is None or group.closed or not hasattr(os, "memfd_create"):  # which only Linux has
        return {}
    found = {rank: Process.of(group.store, rank) for rank in holders(group.mesh)}
    here = found[group.rank]
    apart = [rank for rank, process in found.items() if process.host == here.host and process.space != here.space]
    if apart:
        ranks = ", ".join(map(str, apart))
        logger.warning("offload: rank %d shares no weights with ranks %s: %s", group.rank, ranks, APART)
    return {
        rank: process.number
        for rank, process in found.items()
        if (process.host, process.space) == (here.host, here.space)
    }


def _alike(rank: int, told: Mapping[int, Mapping[str, str | None]]) -> list[int]:
    """The ranks that would pack what this rank would.

    Raises:
        RankFailed: A rank has a problem.
    """
    for other, theirs in told.items():
        if theirs["problem"]:
            raise RankFailed(f"rank {other} failed first: {theirs['problem']}")
        if theirs["digest"] != told[rank]["digest"]:
            logger.warning("offload: rank %d shares no weights with rank %d: %s", rank, other, DIFFERENT)
    return [other for other, theirs in told.items() if theirs["digest"] == told[rank]["digest"]]
