"""What runs of the simulator come to: shares of deadlines met, with intervals, and the rest in figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from patchpipe.scheduling.simulator.simulate import Served, Simulation
from patchpipe.scheduling.state import KINDS, Kind

_Z = 1.96  # of a 95 % interval


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
        value: The mean.
        half: Half of its 95 % interval; 0 for one seed.
    """

    value: float
    half: float


@dataclass(frozen=True)
class Waited:
    """Seconds from arrival to end of the requests of a class that were served.

    Attributes:
        median: Half are quicker.
        p90: Nine of ten are quicker.
        p99: All but one in a hundred are quicker.
    """

    median: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """One policy under one load.

    Attributes:
        policy: Its name.
        per_minute: Requests a minute.
        met: Share of deadlines met: ``all``, ``picture``, ``clip``. A refused request counts as missed.
        kept: Share of deadlines met among what was accepted.
        refused: Share of requests refused.
        waited: Seconds, by class.
        busy: Share of the devices' time in which something ran.
        pauses: Pauses a request.
        changes: Changes of degree a request.
        batched: Share of the requests that ran in a batch of several.
        decision: Mean, 99th percentile and largest milliseconds of the processor for a decision.
        route: Likewise for the choice of a request's group.
    """

    policy: str
    per_minute: float
    met: dict[str, Mean]
    kept: float
    refused: float
    waited: dict[str, Waited]
    busy: float
    pauses: float
    changes: float
    batched: float
    decision: tuple[float, float, float]
    route: tuple[float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        found = asdict(self)
        found["met"] = {name: mean._asdict() for name, mean in self.met.items()}
        return found


def figures(policy: str, per_minute: float, runs: Sequence[Simulation], devices: int) -> Figures:
    """What several runs, one a seed, come to.

    Args:
        policy: The policy's name.
        per_minute: Requests a minute.
        runs: The runs.
        devices: Devices of each.
    """
    served = [one for run in runs for one in run.served]
    accepted = [one for one in served if one.end is not None]
    counts = [count for run in runs for count in run.counts]
    met = {"all": _mean([share(run.served) for run in runs])}
    for kind in KINDS:
        met[kind] = _mean([share(run.served, kind) for run in runs])
    total = max(1, len(served))
    return Figures(
        policy, per_minute, met,
        kept=share(accepted),
        refused=1 - len(accepted) / total,
        waited={kind: _waited([one for one in accepted if one.request.kind == kind]) for kind in KINDS},
        busy=sum(count.busy for count in counts) / max(1e-9, devices * sum(run.seconds for run in runs)),
        pauses=sum(count.pauses for count in counts) / total,
        changes=sum(count.changes for count in counts) / total,
        batched=sum(count.batched for count in counts) / total,
        decision=_milliseconds([second for run in runs for second in run.decisions]),
        route=_milliseconds([second for run in runs for second in run.routes]),
    )  # fmt: skip


def share(served: Sequence[Served], kind: Kind | None = None) -> float:
    """The share of requests, of one class or all, that met their deadlines; not a number without any."""
    asked = [one for one in served if kind is None or one.request.kind == kind]
    return sum(one.in_time for one in asked) / len(asked) if asked else math.nan


def quantile(values: Sequence[float], part: float) -> float:
    """The value that this part of the values is below; not a number without any."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(part * len(ranked)))] if ranked else math.nan


def _mean(values: list[float]) -> Mean:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Mean(math.nan, 0.0)
    half = _Z * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return Mean(statistics.fmean(known), half)


def _waited(served: list[Served]) -> Waited:
    seconds = [one.seconds for one in served]
    return Waited(quantile(seconds, 0.5), quantile(seconds, 0.9), quantile(seconds, 0.99))


def _milliseconds(seconds: list[float]) -> tuple[float, float, float]:
    if not seconds:
        return (0.0, 0.0, 0.0)
    return 1e3 * statistics.fmean(seconds), 1e3 * quantile(seconds, 0.99), 1e3 * max(seconds)
