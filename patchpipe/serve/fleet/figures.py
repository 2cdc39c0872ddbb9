"""A replica's figures travel to the service, which counts them: so they outlive the replica."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from patchpipe.serve.fleet.words import Figure
from patchpipe.serve.metrics import Metrics

COUNTED = ("step", "together", "preemptions", "degree_changes", "failed_decisions", "busy")


class Noted(Metrics):
    """Figures that are noted, for somebody else to count."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[Figure] = []
        self._noting = threading.Lock()
        for name in COUNTED:
            setattr(self, name, _Note(self, name))

    def note(self, figure: Figure) -> None:
        """Takes one."""
        with self._noting:
            self._noted.append(figure)

    def take(self) -> tuple[Figure, ...]:
        """Those since the last time."""
        with self._noting:
            taken, self._noted = self._noted, []
        return tuple(taken)


class _Note:
    """One figure, used as Prometheus' own are."""

    def __init__(self, noted: Noted, name: str, labels: tuple[str, ...] = ()) -> None:
        self._noted, self._name, self._labels = noted, name, labels

    def labels(self, *values: str) -> _Note:
        return _Note(self._noted, self._name, values)

    def inc(self, amount: float = 1.0) -> None:
        self._noted.note(Figure(self._name, self._labels, "inc", amount))

    def observe(self, amount: float) -> None:
        self._noted.note(Figure(self._name, self._labels, "observe", amount))


def count(figures: Iterable[Figure], metrics: Metrics, where: str) -> None:
    """Counts a replica's figures.

    Args:
        figures: What it told.
        metrics: The service's.
        where: The replica's name, which goes before its devices'.
    """
    for figure in figures:
        labels = tuple(f"{where} {label}" for label in figure.labels) if figure.name == "busy" else figure.labels
        counted: Any = getattr(metrics, figure.name)
        counted = counted.labels(*labels) if labels else counted
        (counted.inc if figure.how == "inc" else counted.observe)(figure.value)
