"""The events of all ranks of one request, and their file: Chrome's trace format, as Perfetto reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patchpipe.files import check_writable, write_text
from patchpipe.tracing.recorder import Event, Where

FORMAT, VERSION = "patchpipe trace", 1
SUFFIX = ".json"


@dataclass(frozen=True)
class Track:
    """What one rank did.

    Attributes:
        rank: Its rank.
        stage: Its pipeline stage.
        device: Where it computed.
        events: In the order they began, in nanoseconds of a clock that all ranks share.
        uncertainty_ns: By how much its events may be shifted against rank 0's, either way.
        sent_bytes: What it sent to other ranks in hops and exchanges, the VAE's strips apart.
    """

    rank: int
    stage: int
    device: str
    events: tuple[Event, ...]
    uncertainty_ns: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class Timeline:
    """One request.

    Attributes:
        tracks: What each rank did, by rank; of a request that failed, those that are known.
        about: Plain data on the request: ``layout``, ``layout_text``, ``pipeline``, ``model``, ``steps``,
            ``patches``, ``branches``, ``requests`` in flight together, and ``error`` if it failed.
    """

    tracks: tuple[Track, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def span_ns(self) -> tuple[int, int]:
        """From the first event to the last."""
        events = [event for track in self.tracks for event in track.events]
        return min(event.start_ns for event in events), max(event.end_ns for event in events)

    def computes(self) -> Iterator[tuple[Track, Event, Where]]:
        """Every patch's run through a stage, and its place in the denoising loop."""
        for track in self.tracks:
            for event in track.events:
                if event.kind == "compute" and event.where is not None:
                    yield track, event, event.where


def check_target(path: Path) -> Path:
    """Makes sure, before any work, that a timeline can be written to ``path``; makes its folder.

    Raises:
        ValueError: The name does not end in ``.json``, or the place cannot be written to.
    """
    path = path.expanduser().absolute()
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"a trace is a JSON file: {path.name} must end in {SUFFIX} (`patchpipe trace` draws it)")
    check_writable(path)
    return path


def write(timeline: Timeline, path: Path) -> None:
    """Writes the file whole or not at all; moments in it are microseconds since the first event."""
    zero, _ = timeline.span_ns
    counts = timeline.about.get("branches", 1), timeline.about.get("requests", 1)
    events = [entry for track in timeline.tracks for entry in _head(track)]
    events += [_entry(event, track.rank, zero, *counts) for track in timeline.tracks for event in track.events]
    ranks = [{name: value for name, value in _plain(track).items() if name != "events"} for track in timeline.tracks]
    about = {"format": FORMAT, "version": VERSION, **timeline.about, "ranks": ranks}
    text = json.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}, default=str)
    write_text(text + "\n", path)


def read(path: Path) -> Timeline:
    """Reads what ``write`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no trace of patchpipe, one of another version, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: `patchpipe generate … --trace {path.name}` writes one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    about = found.get("otherData") if isinstance(found, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} is no trace of patchpipe: give a file that `patchpipe generate --trace` wrote")
    if about.get("version") != VERSION:
        raise ValueError(
            f"{path} is a trace of version {about.get('version')}, but this patchpipe reads version {VERSION}: "
            f"trace the request again, or open the file in ui.perfetto.dev"
        )
    try:
        timeline = _timeline(about, found["traceEvents"])
        timeline.span_ns  # noqa: B018 - a file without events is damaged too
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): trace the request again") from error
    return timeline


def pack(events: Sequence[Event], shift_ns: int) -> list[dict[str, Any]]:
    """Events as plain data, shifted by ``shift_ns``, to travel to another rank."""
    return [
        {**_plain(event), "start_ns": event.start_ns + shift_ns, "end_ns": event.end_ns + shift_ns} for event in events
    ]


def unpack(packed: Sequence[Mapping[str, Any]]) -> tuple[Event, ...]:
    """Undoes ``pack``."""
    return tuple(Event(**{**one, "where": Where(**one["where"]) if one["where"] else None}) for one in packed)


def _plain(value: Any) -> dict[str, Any]:
    return asdict(value)


def _head(track: Track) -> list[dict[str, Any]]:
    """What Perfetto shows at the left."""
    name = f"rank {track.rank} · stage {track.stage + 1} · {track.device}"
    place = {"ph": "M", "pid": track.rank, "tid": 0}
    return [
        {**place, "name": "process_name", "args": {"name": name}},
        {**place, "name": "process_sort_index", "args": {"sort_index": track.rank}},
        {**place, "name": "thread_name", "args": {"name": "work and waiting"}},
    ]


def _entry(event: Event, rank: int, zero: int, branches: int, requests: int) -> dict[str, Any]:
    """One event as Chrome's format has it; people count steps, patches, branches and requests from 1."""
    args = dict(event.details)
    if event.where is not None:
        where = event.where
        args |= {"step": where.step + 1, "branch": where.branch + 1, "warmup": where.warmup}
        args |= {} if where.patch is None else {"patch": where.patch + 1}
        args |= {} if where.half is None else {"half": where.half + 1}
        args |= {} if requests == 1 else {"request": where.request + 1}
    entry = {"name": _name(event, branches, requests), "cat": event.kind, "pid": rank, "tid": 0, "args": args}
    moment = {"ts": (event.start_ns - zero) / 1000}
    if event.kind == "send":
        return {**entry, "ph": "i", "s": "t", **moment}
    return {**entry, "ph": "X", **moment, "dur": (event.end_ns - event.start_ns) / 1000}


def _name(event: Event, branches: int, requests: int) -> str:
    if event.kind == "compute" and event.where is not None:
        patch = "whole latent" if event.where.patch is None else f"patch {event.where.patch + 1}"
        half = "" if event.where.half is None else f" · half {event.where.half + 1}"
        branch = half + (f" · branch {event.where.branch + 1}" if branches > 1 else "")
        request = f"request {event.where.request + 1} · " if requests > 1 else ""
        return f"{request}step {event.where.step + 1} · {patch}{branch}"
    channel = event.details.get("channel")
    return event.kind if channel is None else f"{event.kind}: {channel}"


def _timeline(about: dict[str, Any], entries: list[dict[str, Any]]) -> Timeline:
    by_rank: dict[int, list[Event]] = {}
    for entry in entries:
        if entry["ph"] != "M":
            by_rank.setdefault(entry["pid"], []).append(_event(entry))
    tracks = tuple(Track(**one, events=tuple(by_rank.get(one["rank"], ()))) for one in about["ranks"])
    rest = {name: value for name, value in about.items() if name not in ("format", "version", "ranks")}
    return Timeline(tracks, rest)


def _counted(index: int) -> int | None:
    """A place in a row, told from its absence."""
    return None if index < 0 else index


def _event(entry: dict[str, Any]) -> Event:
    args = dict(entry["args"])
    where = None
    if "step" in args:
        patch, half, request = (args.pop(name, 0) - 1 for name in ("patch", "half", "request"))
        place = (args.pop("step") - 1, args.pop("branch") - 1, args.pop("warmup"))
        where = Where(*place, _counted(patch), max(0, request), _counted(half))
    start = round(entry["ts"] * 1000)
    return Event(entry["cat"], start, start + round(entry.get("dur", 0) * 1000), where, args)
