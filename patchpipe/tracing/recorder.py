"""What one rank does in one request, and when: spans of work and of waiting, and tensors sent.

A rank that is not traced has no recorder: every hook is a check for ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Kind = Literal["request", "encode", "latent", "compute", "materialise", "decode", "wait", "send"]
_UNTRACED: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Where:
    """Which part of a denoising loop something belongs to.

    Attributes:
        step: Calls of the transformer made for this guidance branch before this one.
        branch: The guidance branch's place among the request's.
        warmup: Whether the call is synchronous.
        patch: The patch's index; ``None`` for the whole latent.
        request: The request's place among those in flight together.
        half: Which half of the batch; ``None`` for all of it.
    """

    step: int
    branch: int
    warmup: bool
    patch: int | None = None
    request: int = 0
    half: int | None = None


@dataclass(frozen=True)
class Event:
    """A span of time, or the moment at which a tensor was sent.

    Attributes:
        kind: What the rank did.
        start_ns: When it began, in nanoseconds on the recorder's clock.
        end_ns: When it ended; equal to ``start_ns`` for what was sent.
        where: The part of the denoising loop; ``None`` before it begins.
        details: ``channel`` (what kind of tensor was waited for or sent), ``peer`` (whom for), ``bytes``, ``reason``.
    """

    kind: Kind
    start_ns: int
    end_ns: int
    where: Where | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Clock(Protocol):
    """Tells moments, possibly ones that will be known only later."""

    def now(self) -> Any:
        """This moment."""
        ...

    def resolve(self, moment: Any) -> int:
        """A moment in nanoseconds of the host's monotonic clock."""
        ...


class HostClock:
    """The host's monotonic clock, for work that is done when its call returns."""

    def now(self) -> int:
        """This moment, in nanoseconds."""
        return perf_counter_ns()

    def resolve(self, moment: int) -> int:
        """The moment itself."""
        return moment


class StreamClock:
    """Moments at which a CUDA device gets to this point of its current stream.

    Work is only queued when its call returns, so that the host's clock would show when it was queued. A wait for
    another rank, which blocks the host, shows as the time for which the stream then has nothing to do.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = self.now()
        self._base.synchronize()
        self._base_ns = perf_counter_ns()

    def now(self) -> torch.cuda.Event:
        """A mark in the stream."""
        import torch  # heavy, and not needed to read a timeline

        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def resolve(self, moment: torch.cuda.Event) -> int:
        """When the device got there; waits until it has."""
        moment.synchronize()
        return self._base_ns + round(self._base.elapsed_time(moment) * 1e6)


class Recorder:
    """Collects one rank's events of one request.

    Args:
        clock: Where moments come from.

    Attributes:
        where: The part of the denoising loop that events belong to from now on.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.where: Where | None = None
        self._clock: Clock = clock or HostClock()
        self._events: list[tuple[Kind, Any, Any, Where | None, dict[str, Any]]] = []

    def now(self) -> Any:
        """This moment, for ``add``."""
        return self._clock.now()

    def add(self, kind: Kind, start: Any, where: Where | None, **details: Any) -> None:
        """Records what began at ``start``, in the part ``where`` of the loop, and ends now."""
        self._events.append((kind, start, self._clock.now(), where, details))

    def sent(self, channel: str, size: int, peer: str) -> None:
        """Records that ``size`` bytes set out now."""
        now = self._clock.now()
        self._events.append(("send", now, now, self.where, {"channel": channel, "bytes": size, "peer": peer}))

    def events(self) -> list[Event]:
        """All events so far, enclosing ones before what they enclose; waits until a CUDA device has got there."""
        resolve = self._clock.resolve
        found = [
            Event(kind, resolve(start), resolve(end), where, details)
            for kind, start, end, where, details in self._events
        ]
        return sorted(found, key=lambda event: (event.start_ns, -event.end_ns))


class _Span:
    def __init__(self, recorder: Recorder, kind: Kind, details: dict[str, Any]) -> None:
        self._recorder, self._kind, self._details = recorder, kind, details

    def __enter__(self) -> None:
        self._where, self._start = self._recorder.where, self._recorder.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.add(self._kind, self._start, self._where, **self._details)


def span(recorder: Recorder | None, kind: Kind, **details: Any) -> AbstractContextManager[None]:
    """A context whose extent is recorded, unless nobody records."""
    return _UNTRACED if recorder is None else _Span(recorder, kind, details)


def recorder_for(device: torch.device) -> Recorder:
    """A recorder of what is computed on ``device``."""
    return Recorder(StreamClock(device) if device.type == "cuda" else HostClock())
