"""Tells when data of an exchange is on its way to or from this rank's device, so that copies of weights can wait.

What counts is the device, not the host, which runs ahead of it: over NCCL the gate closes when the device has come to
the operation, and opens when it has done it. Over gloo it is closed while the host waits for the exchange. A posted
receive does not close it: nobody knows when its data sets out, and it may be long. Its sender's gate is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

LOOK_SECONDS = 5e-5  # between two looks at what is under way
PATIENCE_SECONDS = 0.05  # many times a usual exchange; a rank that comes late to one must not hold up weights for long
MOST_UNSEEN = 64  # operations noted since somebody has asked


class Gate:
    """Whether an exchange is on its way.

    Args:
        device: Where this rank computes.
        patience: Seconds that a chunk waits at most.

    Attributes:
        passages: Exchanges seen so far.
    """

    def __init__(self, device: torch.device, patience: float = PATIENCE_SECONDS) -> None:
        self.passages = 0
        self._device, self._patience = device, patience
        self._awaited = 0  # exchanges that the host waits for
        self._under_way: list[tuple[Any, Any]] = []  # when the device came to one, and its work
        self._changed = threading.Condition()

    def began(self, work: Any) -> None:
        """An operation was launched that the device will come to when it has done what was launched before."""
        reached = None
        if self._device.type == "cuda":
            reached = torch.cuda.Event()
            reached.record(torch.cuda.current_stream(self._device))
        with self._changed:
            self.passages += 1
            self._under_way.append((reached, work))
            if len(self._under_way) > MOST_UNSEEN:
                self._closed()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Around the host's wait for an exchange, where that is how long it lasts."""
        with self._changed:
            self.passages += 1
            self._awaited += 1
        try:
            yield
        finally:
            with self._changed:
                self._awaited -= 1
                self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether something is on its way at this moment."""
        with self._changed:
            return self._closed()

    def wait(self) -> float:
        """Waits until nothing is on its way, or patience is at its end.

        Returns:
            Seconds waited.
        """
        began = perf_counter()
        with self._changed:
            while self._closed() and perf_counter() - began < self._patience:
                # A host's wait tells when it ends; of a device one has to ask.
                self._changed.wait(LOOK_SECONDS if self._under_way else self._patience)
        return perf_counter() - began

    def _closed(self) -> bool:
        self._under_way = [(reached, work) for reached, work in self._under_way if not work.is_completed()]
        return self._awaited > 0 or any(reached is None or reached.query() for reached, _ in self._under_way)
