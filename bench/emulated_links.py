"""Hosts whose links carry a tiny model's traffic as slowly, in dilated time, as real links carry the real model's.

A rank is a network namespace on one bridge. What it sends is shaped by destination: its peers in an exchange of all
with all get the rate that is left in such an exchange, its neighbours in hops the rate of a flow.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.network import LINK, Network, address_of
from patchpipe.config import ParallelConfig
from patchpipe.planner.machine.links import Line, Link

CLONE_NEWNET = 0x40000000
SEGMENT = 16 * 1024  # bytes that leave a host at once, and that a link lets pass at full speed after a rest
FREE = 40e9  # bits a second of what is not shaped
SETTINGS = ("tcp_congestion_control=reno", "tcp_slow_start_after_idle=0")


@dataclass(frozen=True)
class Share:
    """A part of what a rank sends.

    Attributes:
        peers: To which ranks.
        rate: Bytes a second to all of them together, on the real machine.
    """

    peers: tuple[int, ...]
    rate: float


def exchange_rate(link: Link, line: Line) -> float:
    """Bytes a second that a rank sends in an exchange of all with all along a line.

    What crosses between islands shares the trunk, and PCIe degrades further by the link's ``contention``.
    """
    rate = link.flow(line) * (2 / line.ranks) ** link.contention
    if line.extent <= link.island:
        return rate
    inside = max(1, link.island // line.stride)  # ranks of the line in one island
    crossing = (line.ranks - inside) / (line.ranks - 1)
    return min(rate, link.trunk / (link.island * crossing))


def shares_of(link: Link, config: ParallelConfig, rank: int) -> list[Share]:
    """How fast a rank sends to whom under a layout."""
    ranks = config.world_size
    others = tuple(peer for peer in range(ranks) if peer != rank)
    inner = ranks // (config.data * config.cfg)  # those that talk to each other
    if config.ulysses == 1:
        return [Share(others, link.flow(Line(inner)))]
    start = rank // config.ulysses * config.ulysses
    near = tuple(peer for peer in range(start, start + config.ulysses) if peer != rank)
    far = tuple(peer for peer in others if peer not in near)
    shares = [Share(near, exchange_rate(link, Line(config.ulysses)))]
    if far:
        shares.append(Share(far, link.flow(Line(inner // config.ulysses, config.ulysses))))
    return shares


class Hosts(Network):
    """One host a rank; each shapes its own link, anew for every layout.

    Args:
        hosts: Number of hosts.
    """

    prefix = "pe"  # beside another bench's
    packet = 1500  # small: a link lets few bytes pass at full speed after a rest

    def __init__(self, hosts: int) -> None:
        super().__init__(hosts, FREE)

    def _shape(self, inside: tuple[str, ...], device: str) -> None:
        """Nothing yet: see ``shape_link``."""


def enter_host(rank: int) -> None:
    """Moves this thread, and what it starts, to a host; sockets that are open stay where they are."""
    with Path(f"/var/run/netns/{Hosts.prefix}host{rank}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the host's namespace")
    os.environ["GLOO_SOCKET_IFNAME"] = LINK
    _run("ip", "link", "set", LINK, "gso_max_size", str(SEGMENT), "txqueuelen", "1000")
    for setting in SETTINGS:
        name, _, value = setting.partition("=")
        path = Path(f"/proc/sys/net/ipv4/{name}")
        if path.exists():
            path.write_text(value)


def shape_link(shares: list[Share], scale: float) -> None:
    """Shapes what this host sends.

    Args:
        shares: How fast to whom, on the real machine.
        scale: Bytes a second here for each byte a second there.
    """
    subprocess.run(["tc", "qdisc", "del", "dev", LINK, "root"], capture_output=True, check=False)
    _run("tc", "qdisc", "add", "dev", LINK, "root", "handle", "1:", "htb")
    for index, share in enumerate(shares, start=1):
        rate = f"{int(share.rate * scale * 8)}bit"
        _run("tc", "class", "add", "dev", LINK, "parent", "1:", "classid", f"1:{index}", "htb", "rate", rate,
             "ceil", rate, "burst", str(SEGMENT), "cburst", str(SEGMENT), "quantum", str(4 * SEGMENT))  # fmt: skip
        for peer in share.peers:
            _run("tc", "filter", "add", "dev", LINK, "parent", "1:", "protocol", "ip", "u32",
                 "match", "ip", "dst", f"{address_of(peer)}/32", "flowid", f"1:{index}")  # fmt: skip


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
