"""Hosts on one machine: network namespaces joined by a bridge, each behind a link of its own bandwidth and delay."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

LINK = "link0"
BURST_SECONDS = 0.002  # of tokens a shaper may save up
SMALLEST_BURST = 64 * 1024  # bytes: segments leave a host in pieces of this size


def address_of(host: int) -> str:
    """A host's address."""
    return f"10.77.0.{host + 1}"


class Network:
    """So many hosts, whose sockets are as slow as the links between them.

    Args:
        hosts: Number of hosts.
        bandwidth: Bits a second that each link carries, each way.
        latency: Seconds a packet needs from host to host.

    Attributes:
        latency: The same, or 0 where the kernel cannot delay packets (it has no netem).

    Raises:
        PermissionError: Not root.
        FileNotFoundError: ``ip`` or ``tc`` is not installed.
    """

    prefix = f"pp{os.getpid() % 100_000}x"  # of the names of hosts and their devices: two networks may stand at once
    packet = 65_000  # bytes: a real card cuts packets itself, here each costs a core that ought to compute some 10 µs

    def __init__(self, hosts: int, bandwidth: float, latency: float = 0.0) -> None:
        if os.geteuid() != 0:
            raise PermissionError("network namespaces need root: run this bench as root, or `python -m bench.loopback`")
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise FileNotFoundError(f"{' and '.join(missing)} not found: install iproute2")
        self.hosts, self.bandwidth, self.latency = hosts, bandwidth, latency
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        self._clear()
        try:
            _do("ip", "link", "add", self._bridge, "type", "bridge")
            _do("ip", "link", "set", self._bridge, "up")
            for host in range(self.hosts):
                self._add(host)
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        self._clear()

    def address(self, host: int) -> str:
        """A host's address."""
        return address_of(host)

    def start(self, host: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a process on a host; gloo there talks over its link."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": LINK}
        process = subprocess.Popen(["ip", "netns", "exec", self._name(host), *command], env=environment)
        self._started.append(process)
        return process

    def _name(self, host: int) -> str:
        return f"{self.prefix}host{host}"

    def _port(self, host: int) -> str:
        return f"{self.prefix}port{host}"

    @property
    def _bridge(self) -> str:
        return f"{self.prefix}bridge"

    def _add(self, host: int) -> None:
        name, port = self._name(host), self._port(host)
        _do("ip", "netns", "add", name)
        veth = ("type", "veth", "peer", "name", LINK, "mtu", str(self.packet), "netns", name)
        _do("ip", "link", "add", port, "mtu", str(self.packet), *veth)
        _do("ip", "link", "set", port, "master", self._bridge, "up")
        inside = ("ip", "netns", "exec", name)
        _do(*inside, "ip", "addr", "add", f"{self.address(host)}/24", "dev", LINK)
        _do(*inside, "ip", "link", "set", "lo", "up")
        _do(*inside, "ip", "link", "set", LINK, "up")
        self._shape(inside, LINK)  # what the host sends
        self._shape((), port)  # what it receives

    def _shape(self, inside: tuple[str, ...], device: str) -> None:
        burst = max(SMALLEST_BURST, int(self.bandwidth / 8 * BURST_SECONDS))
        rate = f"{int(self.bandwidth)}bit"
        _do(*inside, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "tbf",
            "rate", rate, "burst", str(burst), "latency", "500ms")  # fmt: skip
        if self.latency and inside:
            delay = f"{self.latency * 1e6:.0f}us"
            try:
                _do(*inside, "tc", "qdisc", "add", "dev", device, "parent", "1:1", "handle", "10:", "netem",
                    "delay", delay, "limit", "100000")  # fmt: skip
            except RuntimeError as error:
                if "kind is unknown" not in str(error):
                    raise
                self.latency = 0.0

    def _clear(self) -> None:
        for host in range(self.hosts):
            subprocess.run(["ip", "netns", "del", self._name(host)], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", self._port(host)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
