"""The workers of one engine, spoken to as one: what is sent goes to all, and all must answer."""

from __future__ import annotations

import copy
import itertools
import os
import socket
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.engine.failures import from_death
from patchpipe.engine.messages import (
    Call,
    CallTogether,
    Cancel,
    Done,
    LoadLora,
    OpenStream,
    Previewed,
    Ready,
    Start,
    Step,
    UnloadLora,
)
from patchpipe.engine.processes import Worker, Workers
from patchpipe.engine.results import OnPreview, OnProgress, Preview, Progress
from patchpipe.engine.watch import SILENCE_GRACE, Outcome, Watch
from patchpipe.errors import PatchpipeError, RankLost


class Crew:
    """The workers, from their start to their end.

    Args:
        devices: The device of each.
        threads: CPU threads of each.
        offline: Keep the workers from asking the hub, which cannot be reached.

    Attributes:
        devices: The device of each.
        threads: CPU threads of each.
        store: Where the ranks meet.
    """

    def __init__(self, devices: Sequence[str], threads: int, *, offline: bool = False) -> None:
        self.devices, self.threads = tuple(devices), threads
        self.store: Any = None
        self._sending = threading.Lock()
        self._painting = False
        self._request, self._numbers = 0, itertools.count(1)
        self._causes: list[BaseException] = []
        self._ranks: tuple[int, ...] | None = None  # of those spoken to; all
        self._silence, self._output_rank = 0.0, 0
        self._workers = Workers(len(self.devices), threads, offline=offline)
        self._finalizer = weakref.finalize(self, self._workers.shutdown, 0.0)

    @property
    def members(self) -> list[Worker]:
        """The workers, by rank."""
        return [worker for worker in self._workers.members if self._ranks is None or worker.rank in self._ranks]

    @property
    def directory(self) -> Path:
        """The workers' private folder."""
        return self._workers.directory

    @property
    def closed(self) -> bool:
        """Whether the workers are gone."""
        return not self._finalizer.alive

    @property
    def alive(self) -> bool:
        """Whether all workers run."""
        return not self.closed and all(worker.alive for worker in self.members)

    def take(self, layout: ParallelConfig, threads: int) -> None:
        """Keeps as many workers as a layout needs; the others go, which have nothing loaded yet.

        Args:
            layout: The layout.
            threads: CPU threads of each.
        """
        self._workers.keep(layout.world_size)
        self.devices, self.threads = self.devices[: layout.world_size], threads
        self._silence, self._output_rank = layout.timeout + SILENCE_GRACE, layout.output_rank

    def part(self, ranks: Sequence[int]) -> Crew:
        """Some of the workers, who work by themselves; the first gives the output.

        Args:
            ranks: Theirs, neighbours.
        """
        part = copy.copy(self)
        part._ranks, part._output_rank, part._painting = tuple(ranks), ranks[0], False
        return part

    def start(
        self,
        folder: Path,
        config: ParallelConfig | None,
        dtype: str | Mapping[str, str] | None,
        variant: str | None,
        load_options: Mapping[str, Any],
        timeout: float,
        lanes: Sequence[tuple[tuple[int, ...], Mapping[str, Any]]] = (),
    ) -> list[Ready]:
        """Has every worker load its part.

        Args:
            folder: The model.
            config: The layout; ``None`` is plain diffusers.
            dtype: What the weights are to be.
            variant: File variant of the weights.
            load_options: Options of ``from_pretrained``.
            timeout: Seconds it may take.
            lanes: Ranks that may serve a request together, and how; ``config`` is then that of one rank.

        Returns:
            What each worker says of itself.
        """
        for worker in self.members:
            start = Start(
                rank=worker.rank,
                world_size=len(self.devices),
                path=os.fsencode(folder),
                config=None if config is None else config.as_dict(),
                device=self.devices[worker.rank],
                dtype=dtype,
                variant=variant,
                threads=self.threads,
                store_port=None if self.store is None else self.store.port,
                directory=str(self.directory),
                load_options=load_options,
                lanes=lanes,
            )
            _send(worker, start)
        return self._settle(self._watch(Ready, "starting", timeout).run())

    def run(
        self,
        call: Call | CallTogether | LoadLora | UnloadLora | OpenStream,
        on_progress: OnProgress | None,
        on_preview: OnPreview | None = None,
        on_sent: Callable[[int], None] | None = None,
        on_other: Callable[[Any], None] | None = None,
    ) -> Done:
        """Sends a request, which gets its number here, and waits for all workers.

        Args:
            call: The request.
            on_progress: Called after each step.
            on_preview: Called with each preview.
            on_sent: Called with its number when the workers have it.
            on_other: Called with what else they tell.

        Returns:
            The output rank's answer.

        Raises:
            Exception: What ended the request; see ``Engine.generate``.
        """

        def show(told: Previewed) -> None:
            if on_preview is not None:
                on_preview(Preview(told.step, told.images))

        def on_step(rank: int, step: Step) -> None:
            if on_progress is not None and rank == self._output_rank:
                on_progress(Progress(step.step, step.total, step.seconds, step.call))

        try:
            self._check_alive()
            with self._sending:
                self._request = next(self._numbers)
                for worker in self.members:
                    _send(worker, replace(call, request=self._request))
                self._painting = True
            if on_sent is not None:
                on_sent(self._request)
            outcome = self._wait(self._watch(Done, "painting", self._silence, on_step, show, on_other))
        except BaseException:
            self.abandon()
            raise
        finally:
            with self._sending:
                self._painting = False
        if isinstance(outcome, BaseException):
            raise outcome
        return self._settle(outcome)[self._output_rank - self.members[0].rank]

    def send(self, message: Any, ranks: Sequence[int] | None = None) -> None:
        """Sends a message to some workers, or to all, beside the request under way.

        Raises:
            RankLost: One of them takes no messages.
        """
        with self._sending:
            for worker in self.members:
                if ranks is None or worker.rank in ranks:
                    _send(worker, message)

    def cancel(self) -> bool:
        """Ends the request under way, if there is one; see ``Engine.cancel``."""
        with self._sending:
            if not self._painting or self.closed:
                return False
            for worker in self.members:
                _send(worker, Cancel(self._request))
            return True

    def close(self) -> None:
        """Ends the workers; safe to call again."""
        if self._finalizer.detach() is not None:
            self._workers.shutdown()
            self.store = None

    def _wait(self, watch: Watch) -> Outcome | BaseException:
        """Waits for the request; an interrupt, or an ``on_progress`` that raises, cancels it and comes back as such."""
        try:
            return watch.run()
        except BaseException as interrupt:
            watch.ending = True
            self.cancel()
            outcome = watch.run()  # a second interrupt ends the workers
            if outcome.failure is not None and not outcome.usable:
                self.abandon()
            return interrupt

    def _check_alive(self) -> None:
        for worker in self.members:
            if not worker.alive:
                raise from_death(worker, "waiting for a request").error

    def _watch(
        self,
        expected: type,
        activity: str,
        silence: float,
        on_step: Callable[[int, Step], None] | None = None,
        on_preview: Callable[[Previewed], None] | None = None,
        on_other: Callable[[Any], None] | None = None,
    ) -> Watch:
        told = (on_step, on_preview, on_other)
        return Watch(self.members, self.devices, expected, self._request, activity, silence, *told)

    def _settle(self, outcome: Outcome) -> list[Any]:
        if outcome.failure is None:
            return outcome.answers
        if not outcome.usable:
            self._causes.append(outcome.failure.error)
            self.abandon()
        raise outcome.failure.error

    @property
    def cause(self) -> BaseException | None:
        """Why the workers are gone, where one of them failed: what other parts of the crew then see follows from it."""
        return self._causes[0] if self._causes else None

    def abandon(self) -> None:
        """Ends the workers at once, without waiting for the request they are in."""
        self._finalizer()
        self.store = None


def _send(worker: Worker, message: Any) -> None:
    try:
        worker.channel.send(message)
    except BlockingIOError as error:
        raise RankLost(f"rank {worker.rank} (pid {worker.pid}) takes no messages: it seems to be stopped") from error
    except ConnectionError:
        return  # it is dead: the wait that follows finds out how it died


def listen(port: int | None) -> socket.socket:
    """A socket that only this machine can reach, for the store.

    Raises:
        PatchpipeError: The port cannot be used.
    """
    try:
        return socket.create_server(("127.0.0.1", port or 0))
    except OSError as error:
        reason = f"port {port} cannot be used ({error.strerror})"
        raise PatchpipeError(f"{reason}: name another one, or none to let the system choose") from error


def serve_store(listener: socket.socket) -> Any:
    """Hosts the place where the ranks meet on a socket that only this machine can reach."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())
