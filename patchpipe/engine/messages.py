"""What the parent and its workers say to each other, and the channel they say it on."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from patchpipe.config import AutoLayout, ParallelConfig


@dataclass(frozen=True)
class Plan:
    """Parent to worker, before ``Start`` if at all: choose a layout for these devices."""

    auto: AutoLayout
    path: str
    devices: tuple[str, ...]
    cores: int
    dtype: str | None
    hub: Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """Worker to parent: the layout, ``None`` for plain diffusers, and why in one line."""

    request: int
    config: ParallelConfig | None
    why: str


@dataclass(frozen=True)
class Start:
    """Parent to worker, once: everything a worker needs to build its part of the pipeline.

    ``path`` is bytes, since the worker may read the names of files in another encoding than its parent. ``config`` of
    ``None`` asks for plain diffusers on one device; ``store_port`` is ``None`` then. ``lanes`` are ranks that may serve
    a request together, and how; ``config`` is then that of one rank.
    """

    rank: int
    world_size: int
    path: bytes
    config: Mapping[str, Any] | None
    device: str
    dtype: str | Mapping[str, str] | None
    variant: str | None
    threads: int
    store_port: int | None
    directory: str
    load_options: Mapping[str, Any]
    lanes: Sequence[tuple[tuple[int, ...], Mapping[str, Any]]] = ()


@dataclass(frozen=True)
class RankInfo:
    """What one worker holds.

    Attributes:
        rank: Its rank.
        pid: Its process.
        device: Where its part of the transformer lives.
        dtype: The transformer's dtype, such as ``"bfloat16"``.
        threads: CPU threads it computes with.
        pipeline_class: The diffusers pipeline it runs.
        transformer_class: The model spread over the ranks.
        parameters: Parameters of the transformer held by this rank.
        bytes: Bytes of all weights held by this rank, encoders and VAE included.
    """

    rank: int
    pid: int
    device: str
    dtype: str
    threads: int
    pipeline_class: str
    transformer_class: str
    parameters: int
    bytes: int

    def describe(self) -> str:
        """A line for people."""
        return (
            f"rank {self.rank}: {self.device}, {self.threads} threads, {self.parameters / 1e6:.1f} M parameters "
            f"of the transformer, {self.bytes / 2**20:.0f} MiB of weights, pid {self.pid}"
        )


@dataclass(frozen=True)
class Ready:
    """Worker to parent: the pipeline is loaded; ``arguments`` are the names its call takes, some with defaults."""

    request: int
    info: RankInfo
    arguments: tuple[str, ...]
    any_argument: bool
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """Parent to worker: run the pipeline once with these (encoded) arguments, its timeline written to ``trace``.

    ``preview`` asks for an approximate picture every so many steps.
    """

    request: int
    seed: int
    arguments: Mapping[str, Any]
    trace: str | None = None
    preview: int | None = None


@dataclass(frozen=True)
class CallTogether:
    """Parent to worker: run these in flight together; what they tell and give is of one request."""

    request: int
    calls: tuple[Call, ...]
    trace: str | None = None


@dataclass(frozen=True)
class LoadLora:
    """Parent to worker: load a LoRA as ``name``; ``strengths`` are those of all that are loaded then."""

    request: int
    path: str
    weight_name: str | None
    name: str
    strengths: Mapping[str, float]


@dataclass(frozen=True)
class UnloadLora:
    """Parent to worker: unload one LoRA, or all of them; ``left`` has the strengths of the others."""

    request: int
    name: str | None
    left: Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """Worker to parent: one turn of the pipeline's loop is over; ``call`` tells which one's, of several in flight."""

    request: int
    step: int
    total: int | None
    seconds: float
    call: int = 0


@dataclass(frozen=True)
class Previewed:
    """Worker to parent: what the pictures look like after some steps."""

    request: int
    step: int
    images: Any


@dataclass(frozen=True)
class Warned:
    """Worker to parent: a library or patchpipe itself warns about the request, such as of a cut prompt."""

    request: int
    text: str


@dataclass(frozen=True)
class Done:
    """Worker to parent: the request is over; only the output rank sends an output.

    Of calls in flight together, ``output`` and ``stats`` are lists.
    """

    request: int
    output: Any
    stats: Any
    seconds: float


@dataclass(frozen=True)
class Failed:
    """Worker to parent: an exception ended the request, or the start.

    ``clean`` tells that all ranks ended the request at the same point, so that the worker can go on.
    ``secondary`` tells that it follows from another rank's failure.
    """

    request: int
    class_name: str
    message: str
    traceback: str
    clean: bool
    secondary: bool


@dataclass(frozen=True)
class OpenStream:
    """Parent to worker: serve requests that come and go, until told to end; with the ranks of a lane, or all."""

    request: int
    lane: int = 0


@dataclass(frozen=True)
class Submit:
    """Parent to worker: a call that is to join the stream, from ``state`` on if it has begun before."""

    request: int
    ticket: int
    call: Call
    state: bytes | None = None


@dataclass(frozen=True)
class Direct:
    """Parent to rank 0: what is to become of a request; see ``schedule.steps.verbs``."""

    request: int
    verb: int
    ticket: int = 0
    option: int = 0


@dataclass(frozen=True)
class Became:
    """Output rank to parent: what has become of a request; see ``schedule.steps.entries.Told``."""

    request: int
    ticket: int
    what: str
    step: int
    output: Any = None
    stats: Mapping[str, Any] | None = None
    state: bytes | None = None
    failed: Failed | None = None


@dataclass(frozen=True)
class Alive:
    """Rank 0 to parent, while all requests are held: it still listens."""

    request: int


@dataclass(frozen=True)
class Cancel:
    """Parent to worker, while it runs a request: end it at the next point where all ranks can."""

    request: int


@dataclass(frozen=True)
class Close:
    """Parent to worker: leave the group and exit."""


@dataclass(frozen=True)
class GeneratorState:
    """A ``torch.Generator`` on its way to another process."""

    device: str
    state: Any


class Channel:
    """One end of a two-way channel of pickled messages over a socket.

    The plain pickler is used on purpose: ``Connection.send`` would hand tensors over as shared memory files
    as soon as ``torch.multiprocessing`` is imported, and such files outlive a killed process.
    """

    def __init__(self, fd: int, send_timeout: float | None = None) -> None:
        if send_timeout is not None:
            _limit_sends(fd, send_timeout)
        self.connection = Connection(fd)
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Sends one message; threads may send at the same time."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self.connection.send_bytes(data)

    def receive(self) -> Any:
        """Waits for one message.

        Raises:
            EOFError: The other process is gone.
        """
        try:
            data = self.connection.recv_bytes()
        except ConnectionError as error:
            raise EOFError(str(error)) from error
        return pickle.loads(data)

    def close(self) -> None:
        """Closes this end."""
        self.connection.close()


def _limit_sends(fd: int, seconds: float) -> None:
    with socket.socket(fileno=os.dup(fd)) as view:
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        view.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
