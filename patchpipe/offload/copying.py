"""How bytes get from the host into the working buffer: by a CUDA device's copy engine, or by this thread."""

from __future__ import annotations

import threading
from time import perf_counter, sleep
from typing import Any, Protocol

import torch
from torch import Tensor

from patchpipe.offload.gathering import Gathering


class Copier(Protocol):
    """Copies for the mover. Marks are moments on the device; ``None`` is now."""

    def own(self, size: int) -> slice:
        """The bytes of a chunk that this rank copies; others give it the rest."""
        ...

    def read(self, seconds: float) -> None:
        """The chunk that is copied next was read for so long."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Starts a copy; returns the mark of its end.

        Args:
            target: Where the chunk belongs.
            source: This rank's own bytes of it.
        """
        ...

    def finish(self, mark: Any) -> None:
        """Waits, on the host, until the device has come to a mark."""
        ...

    def arrive(self, mark: Any) -> None:
        """Has what is computed from now on wait for a mark."""
        ...

    def leave(self) -> Any:
        """The mark of all that was computed so far."""
        ...


class Throttle:
    """A link of a set bandwidth that copies share, for trials.

    Args:
        bandwidth: Bytes a second.
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self._free, self._read, self._lock = 0.0, 0.0, threading.Lock()

    def read(self, seconds: float) -> None:
        """What comes next was read for so long, which is part of its time on the link."""
        self._read = seconds

    def take(self, size: int) -> None:
        """Returns when so many bytes are through."""
        with self._lock:
            self._free = max(self._free, perf_counter() - self._read) + size / self.bandwidth
            until, self._read = self._free, 0.0
        while (left := until - perf_counter()) > 0:
            sleep(left)


class HostCopier:
    """Copies with the host's own cores, where the device is the host.

    Args:
        throttle: The link that bytes come over; ``None`` is as fast as memory is.
        gathering: The ranks that copy chunks together; ``None`` is this one alone.
    """

    def __init__(self, throttle: Throttle | None = None, gathering: Gathering | None = None) -> None:
        self._throttle, self._gathering = throttle, gathering

    def own(self, size: int) -> slice:
        """See ``Copier``."""
        return slice(0, size) if self._gathering is None else self._gathering.own(size)

    def read(self, seconds: float) -> None:
        """See ``Copier``."""
        if self._throttle is not None:
            self._throttle.read(seconds)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See ``Copier``; it has ended when this returns."""
        target[self.own(target.numel())].copy_(source)
        if self._throttle is not None:
            self._throttle.take(source.numel())
        if self._gathering is not None:
            self._gathering.fill(target)

    def finish(self, mark: Any) -> None:
        """See ``Copier``."""

    def arrive(self, mark: Any) -> None:
        """See ``Copier``."""

    def leave(self) -> None:
        """See ``Copier``."""


class CudaCopier:
    """Copies on a stream of their own.

    Args:
        device: The device.
        throttle: As for the host.
        gathering: As for the host.
    """

    def __init__(
        self, device: torch.device, throttle: Throttle | None = None, gathering: Gathering | None = None
    ) -> None:
        self._device, self._throttle, self._gathering = device, throttle, gathering
        self._stream = torch.cuda.Stream(device)

    def own(self, size: int) -> slice:
        """See ``Copier``."""
        return slice(0, size) if self._gathering is None else self._gathering.own(size)

    def read(self, seconds: float) -> None:
        """See ``Copier``."""
        if self._throttle is not None:
            self._throttle.read(seconds)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """See ``Copier``."""
        mark = torch.cuda.Event()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            target[self.own(target.numel())].copy_(source, non_blocking=True)
            if self._gathering is not None:
                self._gathering.fill(target)
            mark.record(self._stream)
        if self._throttle is not None:
            self._throttle.take(source.numel())
        return mark

    def finish(self, mark: Any) -> None:
        """See ``Copier``."""
        if mark is not None:
            mark.synchronize()

    def arrive(self, mark: Any) -> None:
        """See ``Copier``."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def leave(self) -> Any:
        """See ``Copier``."""
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark


def copier_for(device: torch.device, throttle: float | None, gathering: Gathering | None = None) -> Copier:
    """What copies to a device, at no more than ``throttle`` gigabytes a second, alone or with other ranks."""
    link = None if throttle is None else Throttle(throttle * 1e9)
    return CudaCopier(device, link, gathering) if device.type == "cuda" else HostCopier(link, gathering)
