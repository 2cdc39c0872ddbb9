"""How many replicas, what each takes of a node, and what to say where there is not enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Resources = Mapping[str, float]  # by Ray's names for them: "CPU", "GPU"


@dataclass(frozen=True)
class Wanted:
    """What an operator asks of a fleet.

    Attributes:
        address: Ray's: ``auto`` is the cluster that this machine is in, else ``HOST:PORT``.
        replicas: How many; ``None`` takes as many as there is room for, and more when nodes join.
        devices: Of each replica.
        wait: Seconds in which nodes may join at the start, before too little room is an error.
        silence: Seconds without a word after which a replica is taken for lost.
        start_timeout: Seconds a replica may take to load its models.
    """

    address: str = "auto"
    replicas: int | None = None
    devices: int = 1
    wait: float = 0.0
    silence: float = 20.0
    start_timeout: float = 1800.0

    def __post_init__(self) -> None:
        if not self.address:
            raise ValueError("--ray takes auto, or the HOST:PORT of Ray's head node")
        for name, value in (("replicas", self.replicas), ("replica-devices", self.devices)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be 1 or more")
        if not self.wait >= 0:
            raise ValueError(f"--ray-wait {self.wait} must be 0 or more")
        if not self.silence > 0 or not self.start_timeout > 0:
            raise ValueError("a fleet's deadlines must be above 0")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's name for it.
        address: Its network address.
        resources: All that it has, in use or not.
    """

    id: str
    address: str
    resources: Resources


@dataclass(frozen=True)
class Need:
    """What one replica takes of one node.

    Attributes:
        devices: Its devices.
        gpu: Whether they are GPUs.
        threads: CPU threads of each device that is none.
    """

    devices: int
    gpu: bool
    threads: int = 1

    @property
    def resources(self) -> Resources:
        """The same by Ray's names."""
        cores = float(self.devices * (1 if self.gpu else self.threads))
        return {"GPU": float(self.devices), "CPU": cores} if self.gpu else {"CPU": cores}

    def fits(self, node: Node) -> int:
        """How many replicas a node has room for, if nobody else uses it."""
        return int(min(node.resources.get(name, 0.0) // amount for name, amount in self.resources.items()))

    def room(self, nodes: Sequence[Node]) -> int:
        """How many replicas all nodes have room for."""
        return sum(self.fits(node) for node in nodes)

    def __str__(self) -> str:
        return in_words(self.resources)


def need_of(wanted: Wanted, nodes: Sequence[Node], devices: str | Sequence[str] | None, threads: int | None) -> Need:
    """What a replica takes: GPUs where the cluster has any, unless CPUs are asked for.

    Args:
        wanted: What the operator asks of the fleet.
        nodes: The cluster's.
        devices: ``cpu``, ``cuda`` or ``None``.
        threads: CPU threads of each rank.

    Raises:
        ValueError: Devices are named one by one, which no two nodes have alike.
    """
    if devices not in (None, "cpu", "cuda"):
        raise ValueError("--devices is cpu or cuda with --ray, which chooses them: say how many with --replica-devices")
    gpu = devices == "cuda" or (devices is None and any(node.resources.get("GPU", 0) >= 1 for node in nodes))
    return Need(wanted.devices, gpu, threads or 1)


def check_room(wanted: Wanted, need: Need, nodes: Sequence[Node]) -> None:
    """Makes sure that the cluster is large enough, whoever else uses it.

    Raises:
        ValueError: It is not; says what it would take.
    """
    room, least = need.room(nodes), wanted.replicas or 1
    if room >= least:
        return
    there = "; ".join(f"{node.address}: {in_words(node.resources)}" for node in nodes) or "none"
    each = f"a replica takes {need} on one node"
    if room == 0:
        raise ValueError(f"{each}, and no node of the cluster has that ({there}): join a larger node, {_less(need)}")
    raise ValueError(
        f"{each}, so {least} replicas take {least} times that, and the cluster has room for {room} ({there}): "
        f"join more nodes, ask for --replicas {room}, {_less(need)}"
    )


def _less(need: Need) -> str:
    if need.devices > 1:
        return "or ask for fewer --replica-devices"
    return "or ask for --devices cpu" if need.gpu else "or start Ray there with more --num-cpus"


def in_words(resources: Resources) -> str:
    """Devices and cores, as people read them."""
    found = [f"{resources.get(name, 0.0):g} {name}" for name in ("GPU", "CPU") if name in resources]
    return " and ".join(found) or "no GPU and no CPU"
