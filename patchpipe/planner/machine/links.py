"""Links as data, and how long a send, an exchange or a sum over ranks takes on them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchpipe.errors import did_you_mean
from patchpipe.planner.machine.devices import GB


@dataclass(frozen=True)
class Line:
    """Ranks that talk to each other: one line along an axis of the mesh, of which several run at once.

    Attributes:
        ranks: Ranks in the line.
        stride: Distance of neighbours in rank numbers, and so how many lines lie interleaved.
    """

    ranks: int
    stride: int = 1

    @property
    def extent(self) -> int:
        """Consecutive ranks that the interleaved lines cover."""
        return self.ranks * self.stride


@dataclass(frozen=True)
class Link:
    """How ranks reach each other.

    Attributes:
        name: Its name.
        bandwidth: Bytes a second from one rank to another, each way.
        latency: Seconds from a rank's send to the other's receive, for an empty message.
        island: Consecutive ranks that reach each other without the trunk: those of a CPU socket, switch or host.
        trunk: Bytes a second between islands, each way, shared by everything that crosses.
        contention: How an exchange of all with all degrades: a rank's bandwidth falls as (2 / ranks) to this power.
            0 for switches of full bisection; PCIe through the CPUs is far from it.
        interference: Share of the shorter of a transfer and the computing beside it that is not hidden: both want the
            device's memory and some of its processors.
        source: Where the figures are from.
    """

    name: str
    bandwidth: float
    latency: float
    island: int
    trunk: float
    contention: float
    interference: float
    source: str

    def __post_init__(self) -> None:
        for name in ("bandwidth", "island", "trunk"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} of link {self.name} must be above 0")
        for name in ("latency", "contention", "interference"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} of link {self.name} must be 0 or more")

    def flow(self, line: Line) -> float:
        """Bytes a second from neighbour to neighbour while every rank of every line sends to its next."""
        if line.extent <= self.island:
            return self.bandwidth
        return min(self.bandwidth, self.trunk / line.stride)

    def exposed(self, transfer: float, computing: float) -> float:
        """Seconds by which a transfer lengthens the computing that it runs beside."""
        return max(0.0, transfer - computing) + self.interference * min(transfer, computing)

    def send(self, size: float, line: Line) -> float:
        """Seconds of one hop of ``size`` bytes along a line."""
        return self.latency + size / self.flow(line)

    def all_to_all(self, size: float, line: Line) -> float:
        """Seconds of an exchange in which every rank sends ``size`` bytes in all, an equal part to each other."""
        if line.ranks < 2:
            return 0.0
        shared = self.flow(line) * (2 / line.ranks) ** self.contention
        return self.latency * (line.ranks - 1) + size / shared

    def two_levels(self, size: float, line: Line, inner: int) -> float:
        """Seconds of the same exchange on two levels: across domains of ``inner`` ranks, then inside them.

        A rank gives every rank, itself included, an equal part. Across domains go ``(O - 1) / O`` of that over lines
        that lie interleaved, and so share the trunk; inside ``(I - 1) / I``.
        """
        given, domains = size * line.ranks / max(1, line.ranks - 1), line.ranks // inner
        across = self.all_to_all(given * (domains - 1) / domains, Line(domains, line.stride * inner))
        return across + self.all_to_all(given * (inner - 1) / inner, Line(inner, line.stride))

    def domain(self, line: Line) -> int:
        """How many neighbours of a line reach each other without the trunk; 1 where that makes no two levels."""
        inner = self.island // line.stride
        return inner if 1 < inner < line.ranks and line.ranks % inner == 0 else 1

    def all_reduce(self, size: float, line: Line) -> float:
        """Seconds of a sum over the ranks of ``size`` bytes each: a ring, every part passed on twice."""
        rounds = 2 * (line.ranks - 1)
        return rounds * (self.latency + size / line.ranks / self.flow(line))

    def all_gather(self, size: float, line: Line) -> float:
        """Seconds until every rank has the ``size`` bytes of every other: a ring."""
        return (line.ranks - 1) * (self.latency + size / self.flow(line))


_SHARED = 2.1  # all-to-all over PCIe: 17 GB/s a rank between 2 ranks, 0.9 among 8 (CogVideoX, PixArt, FLUX.1 on L40)
_BESIDE = 0.5  # CogVideoX's Ring of 2 and PixArt's DistriFusion of 8 on L40 hide about half of what they could
_MEASURED = (
    "×16 slots of a host with two CPU sockets of four; bandwidth, all-to-all and trunk from Ulysses, Ring and USP on "
    "8×L40 in xDiT's documentation and arXiv 2405.14430"
)
_SCALED = "as PCIe 4.0, scaled by the generation's rate"
LINKS: tuple[Link, ...] = (
    Link("pcie3", 9 * GB, 15e-6, 4, 13.5 * GB, _SHARED, _BESIDE, _SCALED),
    Link("pcie4", 18 * GB, 15e-6, 4, 27 * GB, _SHARED, _BESIDE, _MEASURED),
    Link("pcie5", 36 * GB, 15e-6, 4, 54 * GB, _SHARED, _BESIDE, _SCALED),
    Link(
        "nvlink3", 230 * GB, 12e-6, 8, 24 * GB, 0.0, 0.3, "A100 with NVSwitch, 300 GB/s each way, about 230 under NCCL"
    ),
    Link(
        "nvlink4", 360 * GB, 12e-6, 8, 48 * GB, 0.0, 0.3, "H100 with NVSwitch, 450 GB/s each way, about 360 under NCCL"
    ),
    Link(
        "nvlink5", 720 * GB, 12e-6, 8, 48 * GB, 0.0, 0.3, "B200 with NVSwitch, 900 GB/s each way; share as of NVLink 4"
    ),
    Link("nvlink2", 60 * GB, 12e-6, 8, 12 * GB, 0.0, 0.3, "V100 in a cube of eight: 25 to 50 GB/s a pair, two hops"),
    Link("xgmi3", 50 * GB, 15e-6, 8, 48 * GB, 0.0, 0.3, "MI300X: a link of 64 GB/s each way to each of seven others"),
    Link("xgmi2", 40 * GB, 15e-6, 8, 24 * GB, 0.0, 0.3, "MI250: 50 GB/s each way between dies of neighbouring cards"),
    Link("25gbe", 2.9 * GB, 40e-6, 1, 1e15, 0.0, 0.2, "25 Gbit/s less 6 % of headers; a rank a host, on one switch"),
    Link("100gbe", 11.6 * GB, 40e-6, 1, 1e15, 0.0, 0.2, "100 Gbit/s less 6 % of headers; a rank a host, on one switch"),
)


def link_named(name: str) -> Link:
    """A link by its name, in any case.

    Raises:
        ValueError: It is unknown; names the nearest, or lists those known.
    """
    given = re.sub(r"[\s_-]", "", name.lower()).replace("pciegen", "pcie")
    for link in LINKS:
        if link.name == given:
            return link
    names = [link.name for link in LINKS]
    near = did_you_mean(given, names)
    known = f"did you mean {near}?" if near else f"use {', '.join(names)}."
    raise ValueError(f"link {name!r} is unknown: {known} Or measure your own with `patchpipe profile`")
