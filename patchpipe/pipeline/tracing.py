"""Traces the requests of one pipeline: aligns clocks, records, gathers, writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchpipe.distributed.clock import Offset, align, gather
from patchpipe.distributed.mesh import Group
from patchpipe.schedule.request import RequestStats
from patchpipe.tracing.recorder import Recorder, recorder_for, span
from patchpipe.tracing.timeline import Timeline, Track, pack, unpack, write
from patchpipe.version import __version__

logger = logging.getLogger("patchpipe")


class Tracing:
    """Where the requests of a pipeline are traced to, on one rank.

    Args:
        path: The file of the first request; later ones are numbered from 2.
        group: The ranks.
        stats: Tells what the last request, or the last ones together, did on this rank.
        about: What the timeline says of the pipeline.
    """

    def __init__(
        self, path: Path, group: Group, stats: Callable[[], Sequence[RequestStats]], about: Mapping[str, Any]
    ) -> None:
        self.path, self.group, self._stats, self._about = path, group, stats, dict(about)
        self._requests = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """The extent of one request, the same on every rank: its timeline is written when it ends.

        The output rank writes that of all ranks. If the request fails, each rank writes its own, as far as it got,
        to a file of its own.
        """
        self._requests += 1
        offset = self._align()
        recorder = recorder_for(self.group.device)
        self.group.record(recorder)
        try:
            with span(recorder, "request"):
                yield
        except BaseException as error:
            if recorder.where is not None:  # the denoising loop had begun
                self._write_own(recorder, offset, error)
            raise
        finally:
            self.group.record(None)
        self._write_all(recorder, offset)

    def _align(self) -> Offset:
        if self.group.world_size == 1:
            return Offset()
        return align(self.group.control_wire(), self.group.rank, self.group.world_size)

    def _write_all(self, recorder: Recorder, offset: Offset) -> None:
        own, group = self._own(recorder, offset), self.group
        if group.world_size == 1:
            self._write([own], self._file(), {})
            return
        wire, root = group.control_wire(), group.config.output_rank
        packed = gather(wire, group.rank, group.world_size, json.dumps(own).encode(), root)
        if packed is not None:
            self._write([json.loads(one) for one in packed], self._file(), {})

    def _write_own(self, recorder: Recorder, offset: Offset, error: BaseException) -> None:
        try:
            own = self._own(recorder, offset)
        except RuntimeError:  # the device itself has failed
            return
        file = self._file()
        told = {"error": f"{type(error).__name__}: {error}"}
        self._write([own], file.with_name(f"{file.stem}.rank{self.group.rank}{file.suffix}"), told)

    def _file(self) -> Path:
        name = self.path.stem if self._requests == 1 else f"{self.path.stem}-{self._requests}"
        return self.path.with_name(f"{name}{self.path.suffix}")

    def _own(self, recorder: Recorder, offset: Offset) -> dict[str, Any]:
        """This rank's part as plain data, its moments on rank 0's clock."""
        return {
            "rank": self.group.rank,
            "stage": self.group.stage,
            "device": str(self.group.device),
            "uncertainty_ns": offset.uncertainty,
            "sent_bytes": sum(one.sent_bytes for one in self._stats()),
            "events": pack(recorder.events(), offset.nanoseconds),
        }

    def _write(self, packed: list[dict[str, Any]], file: Path, told: dict[str, Any]) -> None:
        """Writes what is there; a full disk must not cost the picture."""
        tracks = tuple(Track(**{**one, "events": unpack(one["events"])}) for one in packed)
        places = [where for _, _, where in Timeline(tracks).computes()]
        about = {
            **self._about,
            "patchpipe": __version__,
            "steps": 1 + max((where.step for where in places), default=-1),
            "branches": 1 + max((where.branch for where in places), default=0),
            "patches": max(one.patches for one in self._stats()),
            "requests": len(self._stats()),
            **told,
        }
        try:
            write(Timeline(tracks, about), file)
        except OSError as error:
            logger.warning("the trace could not be written to %s: %s", file, error.strerror)
