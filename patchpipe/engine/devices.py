"""Which device and how many threads each rank works with."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from numbers import Integral
from typing import Any


def choose_devices(devices: str | Sequence[str] | None, ranks: int, backend: str) -> list[str]:
    """Names one device for each rank.

    Args:
        devices: One name for all ranks, one name for each, or ``None``: a CUDA device each where there are
            enough, the CUDA devices in turn where ranks must share them, else the CPU.
        ranks: Number of ranks.
        backend: The config's backend; NCCL cannot serve two ranks on one device.

    Raises:
        ValueError: A device is unknown or absent, or there are not as many as ranks.
    """
    if devices is None:
        names = _default_devices(ranks, backend)
    elif isinstance(devices, str):
        names = _spread(devices, ranks)
    else:
        names = [str(name) for name in devices]
    if len(names) != ranks:
        raise ValueError(f"{len(names)} devices for {ranks} ranks: name one for each rank, or one for all")
    for name in names:
        _check_device(name)
    if backend == "nccl":
        _check_nccl(names)
    return [_numbered(name) for name in names]


def threads_per_rank(threads: Any, ranks: int) -> int:
    """CPU threads of each rank: as asked, else an even share of the cores.

    Raises:
        ValueError: Less than one thread was asked for.
    """
    if threads is None:
        return max(1, available_cores() // ranks)
    if isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1:
        raise ValueError(f"threads={threads!r} must be a whole number of 1 or more")
    return int(threads)


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loopback_interface() -> str | None:
    """The name of the loopback network interface, where it is known."""
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def _default_devices(ranks: int, backend: str) -> list[str]:
    count = cuda_count()
    if count == 0:
        return ["cpu"] * ranks
    if count < ranks and backend == "nccl":
        raise ValueError(
            f"backend='nccl' needs a CUDA device for each of {ranks} ranks, and this machine has {count}: "
            "use backend='gloo', with which ranks can share a device"
        )
    return [f"cuda:{rank % count}" for rank in range(ranks)]


def _spread(name: str, ranks: int) -> list[str]:
    if name == "cuda":
        return [f"cuda:{rank % max(1, cuda_count())}" for rank in range(ranks)]
    return [name] * ranks


def _check_device(name: str) -> None:
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or name.endswith(":"):
        raise ValueError(f"device {name!r} is unknown: use 'cpu', 'cuda' or 'cuda:0', 'cuda:1', …")
    if kind == "cuda" and int(index or 0) >= cuda_count():
        raise ValueError(f"device {name!r} is not there: this machine has {cuda_count()} CUDA devices")


def _check_nccl(names: list[str]) -> None:
    numbered = [_numbered(name) for name in names]
    if len(set(numbered)) < len(numbered) or any(name.startswith("cpu") for name in numbered):
        raise ValueError(
            f"backend='nccl' needs a CUDA device of its own for each rank, not {', '.join(names)}: "
            "use backend='gloo' to share a device or to run on the CPU"
        )


def _numbered(name: str) -> str:
    return "cuda:0" if name == "cuda" else name.split(":")[0] if name.startswith("cpu") else name


def cuda_count() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
