"""The process groups of one rank."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from patchpipe.errors import RankLost

WATCHDOG_FACTOR = 10  # torch's own deadline beside ours: the guard is to notice first, and to say what is wrong
PAIR_CTAS = 4  # multiprocessors that a posted receive may hold while it waits
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class ProcessGroups:
    """Makes a rank's process groups; unlike ``new_group`` it leaves no global state behind.

    Those over gloo share one device, that is, one thread that serves their sockets: it wakes a hundred times a second
    even if nothing comes, and with a device for each group the three or more of a rank would all do so.

    Args:
        store: Where the ranks meet; ``None`` only for a single rank, which needs no group.
        timeout: Seconds any wait may last.
    """

    def __init__(self, store: dist.Store | None, timeout: float) -> None:
        self.store, self.timeout = store, timeout
        self._devices: list[Any] = []

    def make(self, name: str, backend: str, rank: int, size: int) -> dist.ProcessGroup:
        """A group of its own; every one of its ranks calls this.

        Args:
            name: Tells it from others on the store.
            backend: ``"gloo"`` or ``"nccl"``.
            rank: This rank's place in it.
            size: Number of ranks.

        Raises:
            RankLost: A rank did not connect in time.
            ValueError: The environment names a network interface that is not there.
        """
        assert self.store is not None
        scoped = dist.PrefixStore(name, self.store)
        try:
            if backend == "nccl":
                with _own_error_handling():
                    return dist.ProcessGroupNCCL(scoped, rank, size, self._nccl(pair=size == 2))
            return dist.ProcessGroupGloo(scoped, rank, size, self._gloo())
        except RuntimeError as error:
            raise RankLost(f"a rank died or did not connect within {self.timeout:g} s ({gist(error)})") from error

    def close(self) -> None:
        """Lets the shared thread end with the last of the groups."""
        self._devices.clear()

    def _nccl(self, *, pair: bool) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        # Counted from when the host posts an operation, long before its turn; it ends the process without a word.
        options._timeout = timedelta(seconds=WATCHDOG_FACTOR * self.timeout)
        options.is_high_priority_stream = True  # a hop that waits for a free multiprocessor holds up another device
        if pair and hasattr(options, "config"):
            options.config.max_ctas = PAIR_CTAS
        return options

    def _gloo(self) -> Any:
        self._devices = self._devices or _devices()
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._threads = self._devices, 2 * len(self._devices)
        options._timeout = timedelta(seconds=self.timeout)
        return options


def _devices() -> list[Any]:
    """The interfaces that the environment names, as torch takes them, or the one torch picks."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    try:
        return [dist.ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]
    except RuntimeError as error:
        raise ValueError(
            f"GLOO_SOCKET_IFNAME={names} names no interface of this host that has an address ({gist(error)}): "
            f"unset it, or give one that `ip addr` lists"
        ) from error


@contextmanager
def _own_error_handling() -> Iterator[None]:
    """Keeps torch from ending the process when a communicator breaks: the guard aborts it, and says why."""
    if ERROR_HANDLING in os.environ:  # the user knows better
        yield
        return
    os.environ[ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        del os.environ[ERROR_HANDLING]


def gist(error: Exception) -> str:
    """What a transport's error says, without the place in its source and the advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\]\s*", "", line).split(". ")[0][:200]


def let_go(groups: list[Any]) -> None:
    """Gives up process groups side by side: gloo takes up to 10 ms for each connection that it closes.

    Args:
        groups: The groups, to which nothing else refers; those of NCCL, which were aborted, go one after another.
    """
    own = getattr(dist, "ProcessGroupNCCL", ())
    apart = [group for group in groups if not isinstance(group, own)]
    groups.clear()
    threads = [threading.Thread(target=apart.pop, name="patchpipe close") for _ in apart]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
