"""How ranks find each other: each tells what it was started with before any of them connects."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.distributed.agreement import agree, attempt, gather, read
from patchpipe.distributed.mesh import Group
from patchpipe.layout.domains import check_alike

logger = logging.getLogger("patchpipe")
BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")


@dataclasses.dataclass(frozen=True)
class Process:
    """Where a rank runs.

    Attributes:
        host: The machine.
        space: Of its processes, those that see each other.
        number: The process.
    """

    host: str
    space: str
    number: int

    @classmethod
    def here(cls) -> Process:
        """This one."""
        space, _ = attempt(lambda: str(PROCESSES.readlink()))
        return cls(host_name(), space or "", os.getpid())

    @classmethod
    def of(cls, store: dist.Store, rank: int) -> Process:
        """That of a rank that has joined."""
        return cls(**json.loads(store.get(f"process/{rank}")))


def join(
    config: ParallelConfig,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    store: dist.Store | None = None,
    device: torch.device | str | None = None,
    about: Mapping[str, Any] | None = None,
    problem: Exception | None = None,
) -> Group:
    """Joins the group this process belongs to.

    No connection is made before all ranks have told what they were started with, so that none waits in vain.

    Args:
        config: The layout.
        rank: This rank; ``None`` reads the environment that ``torchrun`` sets.
        world_size: Number of ranks; likewise.
        store: Where the ranks meet; ``None`` takes ``torchrun``'s.
        device: Where this rank computes; ``None`` takes the CUDA device of its local rank, as ``"cuda"`` does, else
            the CPU.
        about: What else all ranks must have alike, by name.
        problem: Why this rank cannot go on, if it cannot; raised once the others know.

    Raises:
        ValueError: The number of processes does not fit the layout, or the ranks have different layouts.
        RankFailed: Another rank has a problem.
        RankLost: A rank did not show up in time.
    """
    if rank is None or world_size is None:
        rank, world_size = _place_from_environment()
    place, scoped = device_for(device), None
    if world_size > 1:
        scoped = _meeting_point(store, rank, config.timeout)
        what = {"config": config.as_dict(), **(about or {})}
        scoped.set(f"process/{rank}", json.dumps(dataclasses.asdict(Process.here())))
        agree(scoped, "layout", rank, world_size, what, config.timeout, problem)
    elif problem is not None:
        raise problem
    if world_size != config.world_size:
        raise ValueError(
            f"the layout needs {config.world_size} ranks ({config.describe()}) but {world_size} "
            f"were started: use `torchrun --nproc-per-node {config.world_size}` or change the layout"
        )
    if scoped is None:
        return Group(config, 0, place, None, "gloo")
    if config.ulysses_inner > 1:
        hosts = gather(scoped, "hosts", rank, world_size, host_name(), config.timeout)
        check_alike(config.mesh_shape, config.ulysses_inner, hosts)
    return Group(config, rank, place, scoped, _backend(config, scoped, rank, world_size, place))


def settle(
    config: ParallelConfig | AutoLayout | None,
    group: Group | None,
    choose: Callable[[AutoLayout, int], ParallelConfig],
    *,
    rank: int | None = None,
    world_size: int | None = None,
    store: dist.Store | None = None,
) -> tuple[ParallelConfig, dist.Store | None]:
    """The layout of all ranks: as given or, where none is, as rank 0 chooses.

    Args:
        config: What this rank was given; every rank must be given alike.
        group: Ranks that have joined before, whose layout it then is.
        choose: Finds the layout of so many ranks; called on rank 0.
        rank: See ``join``.
        world_size: See ``join``.
        store: See ``join``.

    Returns:
        The layout, and where the ranks met if they have.

    Raises:
        ValueError: Ranks were given differently, or there is no layout of so many; the same text on every rank.
        RankLost: A rank did not show up in time.
    """
    if isinstance(config, ParallelConfig):
        return config, store
    if group is not None:
        return group.config, store
    auto = config or AutoLayout()
    if rank is None or world_size is None:
        rank, world_size = _place_from_environment()
    if world_size == 1:
        return auto.alone(), store
    store = store or _store_from_environment(timedelta(seconds=auto.timeout))
    scoped = _meeting_point(store, rank, auto.timeout)
    agree(scoped, "layout", rank, world_size, {"config": dataclasses.asdict(auto)}, auto.timeout)
    if rank == 0:
        chosen, problem = attempt(lambda: choose(auto, world_size))
        told = {"problem": f"{problem}"} if chosen is None else {"config": chosen.as_dict()}
        scoped.set("chosen", json.dumps(told))
    found = json.loads(read(scoped, "chosen", 0, auto.timeout))
    if "problem" in found:
        raise ValueError(found["problem"])
    return ParallelConfig(**found["config"]), store


def meet(
    config: ParallelConfig,
    group: Group | None,
    device: torch.device | str | None,
    about: Mapping[str, Any],
    problem: Exception | None,
    store: dist.Store | None = None,
) -> Group:
    """The ranks of a pipeline, once all of them know that they were started alike and can go on.

    Args:
        config: The layout.
        group: Ranks that have joined before; ``None`` joins those ``torchrun`` started.
        device: See ``join``.
        about: See ``join``.
        problem: See ``join``.
        store: See ``join``.

    Raises:
        ValueError: As for ``join``; or the group was joined for another layout.
    """
    if group is None:
        return join(config, store=store, device=device, about=about, problem=problem)
    group.agree({"config": config.as_dict(), **about}, problem)
    if group.config != config:
        raise ValueError(
            f"the group was joined for another layout ({group.config.describe()}) than the pipeline's "
            f"({config.describe()}): join with the same configuration"
        )
    return group


def host_name() -> str:
    """What tells this machine from others: containers of one machine share it."""
    try:
        return BOOT.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _meeting_point(store: dist.Store | None, rank: int, timeout: float) -> dist.Store:
    store = store or _store_from_environment(timedelta(seconds=timeout))
    number = store.add(f"patchpipe/groups/{rank}", 1)  # ranks make their groups in the same order
    return dist.PrefixStore(f"patchpipe/{number}", store)


def _place_from_environment() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _store_from_environment(timeout: timedelta) -> dist.Store:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


def device_for(device: torch.device | str | None) -> torch.device:
    """The device asked for, as the current one of this process: streams and communicators are made there."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    if place.type == "cuda":
        if place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(place)
    return place


def _backend(config: ParallelConfig, store: dist.Store, rank: int, world_size: int, device: torch.device) -> str:
    """NCCL where every rank has a CUDA device of its own; two ranks on one device cannot use it."""
    if config.backend != "auto":
        if config.backend == "nccl" and device.type != "cuda":
            raise ValueError(f"backend='nccl' needs CUDA devices but rank {rank} computes on {device}: use 'gloo'")
        return config.backend
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    store.set(f"device/{rank}", f"{socket.gethostname()}/{uuid}" if uuid else "cpu")
    seen = [read(store, f"device/{other}", other, config.timeout).decode() for other in range(world_size)]
    if "cpu" in seen:
        return "gloo"
    if len(set(seen)) < world_size:
        _warn_of_sharing(rank, seen, device)
        return "gloo"
    return "nccl"


def _warn_of_sharing(rank: int, seen: list[str], device: torch.device) -> None:
    """Tells, once on every host, that ranks share a device while others of the host are idle."""
    mates = [other for other, place in enumerate(seen) if place == seen[rank]]
    host = seen[rank].partition("/")[0]
    on_host = [other for other, place in enumerate(seen) if place.partition("/")[0] == host]
    if len(mates) > 1 and rank == min(on_host) and torch.cuda.device_count() >= len(on_host):
        logger.warning(
            "ranks %s share %s although this host has %d GPUs, so that they take turns and talk through the host: "
            "give each its own, with pipe.to(f'cuda:{os.environ[\"LOCAL_RANK\"]}') or device='cuda'",
            ", ".join(map(str, mates)), device, torch.cuda.device_count(),
        )  # fmt: skip
