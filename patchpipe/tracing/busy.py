"""How busy the stages were: the share of a stretch of time in which a rank worked and did not wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patchpipe.tracing.recorder import Event
from patchpipe.tracing.timeline import Timeline, Track

WORK = frozenset({"encode", "latent", "compute", "materialise", "decode"})
Stretch = tuple[int, int]  # from, to, in nanoseconds


@dataclass(frozen=True)
class Busy:
    """One rank's figures.

    Attributes:
        rank: Its rank.
        stage: Its pipeline stage.
        steady: Its busy share in the steady state; ``None`` where there is none.
        request: Its busy share over the whole request.
        chosen: Its busy share in the stretch asked for, if one was.
        seconds: Time it worked, over the whole request.
        waited: Seconds it waited, by what it waited for, the longest first.
        sent_bytes: What it sent in hops and exchanges.
    """

    rank: int
    stage: int
    steady: float | None
    request: float
    chosen: float | None
    seconds: float
    waited: dict[str, float]
    sent_bytes: int


def busy(timeline: Timeline, chosen: Stretch | None = None) -> tuple[Busy, ...]:
    """The figures of every rank.

    A rank is busy while it runs a patch through its stage, does the scheduler's arithmetic on the latent, gathers it,
    encodes or decodes, and while doing so does not wait for another rank. All other time is idle.

    Args:
        timeline: The request.
        chosen: A further stretch to tell the busy share of.
    """
    steady = steady_state(timeline)
    return tuple(_busy(track, timeline.span_ns, steady, chosen) for track in timeline.tracks)


def steady_state(timeline: Timeline) -> Stretch | None:
    """From the end of the fill to the start of the drain.

    The pipe is full when every stage has begun with its first patch after the warm-up. The drain starts when the first
    stage is done with its last patch, after which nothing enters the pipe. ``None`` where every step is synchronous,
    or where there are so few steps that the pipe is never full.
    """
    begun: dict[int, int] = {}
    entered = []
    for track, event, where in timeline.computes():
        if not where.warmup:
            begun[track.rank] = min(event.start_ns, begun.get(track.rank, event.start_ns))
            entered += [event.end_ns] if track.stage == 0 else []
    if not entered:
        return None
    start, stop = max(begun.values()), max(entered)
    return (start, stop) if stop > start else None


def steps_stretch(timeline: Timeline, first: int, last: int) -> Stretch:
    """From the first work on step ``first`` to the last on step ``last``, on any rank; steps count from 1.

    Raises:
        ValueError: The request has no such steps.
    """
    steps = max((where.step for _, _, where in timeline.computes()), default=-1) + 1
    if not 1 <= first <= last <= steps:
        raise ValueError(f"steps {first}-{last} are not in this trace, which has the steps 1-{steps}")
    found = [event for _, event, where in timeline.computes() if first <= where.step + 1 <= last]
    return min(event.start_ns for event in found), max(event.end_ns for event in found)


def busy_stretches(events: Sequence[Event]) -> list[Stretch]:
    """When a rank worked and did not wait, in order and apart from each other."""
    work = _merged((event.start_ns, event.end_ns) for event in events if event.kind in WORK)
    return _without(work, _merged((event.start_ns, event.end_ns) for event in events if event.kind == "wait"))


def _busy(track: Track, whole: Stretch, steady: Stretch | None, chosen: Stretch | None) -> Busy:
    stretches = busy_stretches(track.events)

    def share(within: Stretch | None) -> float | None:
        return None if within is None else _length(_clipped(stretches, within)) / (within[1] - within[0])

    waited: dict[str, float] = {}
    for event in track.events:
        if event.kind == "wait":
            channel = str(event.details.get("channel"))
            waited[channel] = waited.get(channel, 0.0) + (event.end_ns - event.start_ns) / 1e9
    longest_first = dict(sorted(waited.items(), key=lambda item: -item[1]))
    seconds = _length(stretches) / 1e9
    return Busy(
        track.rank, track.stage, share(steady), share(whole) or 0.0, share(chosen), seconds, longest_first,
        track.sent_bytes,
    )  # fmt: skip


def _merged(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same time as stretches that are in order and do not touch."""
    merged: list[Stretch] = []
    for start, stop in sorted(stretches):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _without(stretches: list[Stretch], taken: list[Stretch]) -> list[Stretch]:
    """What of merged ``stretches`` lies in none of the merged ``taken``."""
    left, after = [], 0
    for start, stop in stretches:
        while after < len(taken) and taken[after][1] <= start:
            after += 1
        for low, high in taken[after:]:
            if low >= stop:
                break
            left.append((start, low))
            start = max(start, high)
        left.append((start, stop))
    return [(start, stop) for start, stop in left if stop > start]


def _clipped(stretches: list[Stretch], within: Stretch) -> list[Stretch]:
    cut = [(max(start, within[0]), min(stop, within[1])) for start, stop in stretches]
    return [(start, stop) for start, stop in cut if stop > start]


def _length(stretches: list[Stretch]) -> int:
    return sum(stop - start for start, stop in stretches)
