"""Domains on one machine: the ranks of a domain share a network namespace, and domains are joined by slower links.

A domain's ranks reach each other over its loopback device, other domains over its veth device. Both are shaped by tc.
All ranks of a domain share both, each way.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from bench.network import LINK, SMALLEST_BURST, Network, _do, address_of

CLONE_NEWNET = 0x40000000
SETTINGS = ("tcp_slow_start_after_idle=0",)
DEEP, SHALLOW = "500ms", "5ms"  # how long a packet may stand in the queue of a link: no loss, and loss as in a switch


class Domains(Network):
    """So many domains of ranks.

    Args:
        domains: Their number.
        slow: Bits a second of a domain's link to the others, each way.
        fast: Bits a second inside a domain.
        queue: How long a packet may stand in a slow link's queue before it is dropped.
        packet: Bytes of a packet on slow links.
    """

    def __init__(self, domains: int, slow: float, fast: float, queue: str = DEEP, packet: int = 65_000) -> None:
        super().__init__(domains, slow)
        self.fast, self.queue, self.packet = fast, queue, packet

    def __enter__(self) -> Domains:
        super().__enter__()
        for domain in range(self.hosts):
            self._limit(("ip", "netns", "exec", self._name(domain)), "lo", self.fast, DEEP)
        return self

    def _shape(self, inside: tuple[str, ...], device: str) -> None:
        self._limit(inside, device, self.bandwidth, self.queue)

    def _limit(self, inside: tuple[str, ...], device: str, bandwidth: float, queue: str) -> None:
        burst = max(SMALLEST_BURST + 4096, int(bandwidth / 8 * 0.002))
        _do(*inside, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{int(bandwidth)}bit",
            "burst", str(burst), "latency", queue)  # fmt: skip

    def names(self) -> list[str]:
        """What ``enter`` needs to know, by domain."""
        return [self._name(domain) for domain in range(self.hosts)]


def enter(name: str) -> None:
    """Moves this thread, and the threads it starts, to a domain; sockets that are open stay where they are."""
    with Path(f"/var/run/netns/{name}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the domain's namespace")
    os.environ["GLOO_SOCKET_IFNAME"] = LINK
    for setting in SETTINGS:
        key, _, value = setting.partition("=")
        path = Path(f"/proc/sys/net/ipv4/{key}")
        if path.exists():
            path.write_text(value)


@dataclass(frozen=True)
class Carried:
    """What a domain's devices have sent, headers and acknowledgements included.

    Attributes:
        fast: Bytes inside the domain.
        slow: Bytes to other domains.
        slow_packets: Packets to other domains.
    """

    fast: int
    slow: int
    slow_packets: int

    def since(self, before: Carried) -> Carried:
        """What was added."""
        return Carried(self.fast - before.fast, self.slow - before.slow, self.slow_packets - before.slow_packets)


def carried() -> Carried:
    """What this thread's domain has sent so far, as the kernel counts it."""
    found = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, figures = line.partition(":")
        numbers = figures.split()
        found[name.strip()] = int(numbers[8]), int(numbers[9])
    return Carried(found["lo"][0], *found[LINK])


__all__ = ["DEEP", "SHALLOW", "Carried", "Domains", "address_of", "carried", "enter"]
