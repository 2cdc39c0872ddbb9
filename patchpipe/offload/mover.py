"""Copies the blocks' chunks into the working buffer, ahead of the blocks, in a thread of its own.

Blocks are expected in the order in which they ran last. One that comes out of turn is right all the same, and late:
what was copied for others is dropped. One chunk is under way at a time, so that the next can wait for an exchange.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from patchpipe.distributed.gate import Gate
from patchpipe.offload.copying import Copier
from patchpipe.offload.model import Transfers
from patchpipe.offload.ring import Placement, Run, place
from patchpipe.offload.weights import Home

Key = Hashable
READ_AHEAD = 4  # chunks that the disk is asked for beforehand
IDLE_SECONDS = 2.0  # between looks at whether the buffer is still anybody's
REST_SECONDS = 10.0  # at the end: other ranks have come to it by then, or never will


@dataclass
class MoverStats:
    """What was done so far.

    Attributes:
        bytes: Copied to the device from the host, or from disk.
        gathered: Copied to the device from other ranks, which have copied them from there.
        chunks: Copied.
        blocks: Called for.
        stalls: Blocks that had to wait.
        stalled_seconds: For how long.
        gated: Chunks that waited for an exchange.
        gated_seconds: For how long.
        out_of_turn: Blocks that were not expected when they came.
        peak: Most bytes of the working buffer in use at once.
    """

    bytes: int = 0
    gathered: int = 0
    chunks: int = 0
    blocks: int = 0
    stalls: int = 0
    stalled_seconds: float = 0.0
    gated: int = 0
    gated_seconds: float = 0.0
    out_of_turn: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Streamed:
    """A block's weights that come and go.

    Attributes:
        home: Where they come from.
        sizes: Aligned bytes of each plain tensor, in their order there.
        following: The block that is expected next.
    """

    home: Home
    sizes: tuple[int, ...]
    following: Key


@dataclass(eq=False)
class Entry:
    """A block in the working buffer, or on its way there."""

    key: Key
    home: Home
    placement: Placement
    left: deque[Run]  # chunks that are still to come
    chunks: int
    arrived: Any = None  # the mark of the last chunk so far
    over: bool = False  # done with, or dropped
    mark: Any = None  # of the end of its computing

    @property
    def here(self) -> bool:
        """Whether all its chunks were begun."""
        return not self.left


class Mover:
    """One rank's working buffer and the thread that fills it.

    Args:
        ring: The buffer.
        copier: Copies into it.
        transfers: Chunks, depth and gate.
        gate: Tells of exchanges on their way; ``None`` where there are none, or copies need not wait.
        timeout: Seconds a block may wait.
        together: Whether other ranks copy the same chunks, and so must copy them in the same order.

    Attributes:
        stats: What was done so far.
        order: A number for the blocks that were called for so far, and their order.
        watch: Is told of every chunk and every block that waited, for a timeline: a kind, what of, start and end.
    """

    def __init__(
        self,
        ring: Tensor,
        copier: Copier,
        transfers: Transfers,
        gate: Gate | None,
        timeout: float,
        *,
        together: bool = False,
    ) -> None:
        self.stats = MoverStats()
        self.order = 0
        self.watch: Callable[[str, Key, float, float], None] | None = None
        self._ring, self._copier, self._transfers, self._gate = ring, copier, transfers, gate
        self._timeout, self._together = timeout, together
        self._blocks: dict[Key, Streamed] = {}
        self._entries: deque[Entry] = deque()  # oldest first; those that are over leave at the front
        self._head = 0  # the next free position
        self._next: Key = None  # the block to be copied next
        self._current: Entry | None = None
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._problem: Exception | None = None
        self._thread: threading.Thread | None = None

    def add(self, blocks: Mapping[Key, Streamed]) -> None:
        """Blocks of a transformer; nothing is copied before the first is called for."""
        with self._changed:
            self._blocks.update(blocks)

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._come_to_rest(min(self._timeout, REST_SECONDS))
            self._closed = True
            self._changed.notify_all()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()  # type: ignore[union-attr]

    # -- for the blocks --------------------------------------------------------------------------

    def need(self, key: Key) -> Placement:
        """Waits until a block's weights are in the buffer, and says where.

        Raises:
            RuntimeError: They could not be read, or did not come in time.
        """
        began = perf_counter()
        with self._changed:
            self._start()
            entry = self._called(key)
            self.order = crc32(str(key).encode(), self.order)
            self.stats.blocks += 1
            self._changed.notify_all()
            waited = not entry.here
            while not entry.here and self._problem is None:
                if not self._changed.wait(max(0.0, began + self._timeout - perf_counter())):
                    raise RuntimeError(f"the weights of {key} did not come from the host within {self._timeout:g} s")
            if not entry.here:
                raise RuntimeError(f"the weights of {key} could not be read: {self._problem}") from self._problem
            if waited:
                self.stats.stalls += 1
                self.stats.stalled_seconds += perf_counter() - began
        if waited and self.watch is not None:
            self.watch("stall", key, began, perf_counter())
        self._copier.arrive(entry.arrived)
        return entry.placement

    def done(self) -> None:
        """The block called for last has been computed: what it lies in may be used again when the device is there."""
        mark = self._copier.leave()
        with self._changed:
            if self._current is not None:
                self._current.mark, self._current.over, self._current = mark, True, None
            self._changed.notify_all()

    def _called(self, key: Key) -> Entry:
        """The block's entry; those expected before it are dropped."""
        if key != next((entry.key for entry in self._entries if not entry.over), None):
            self._come_to_rest(self._timeout)
        waiting = [entry for entry in self._entries if not entry.over]
        found = next((entry for entry in waiting if entry.key == key), None)
        if found is None or found is not waiting[0]:
            self.stats.out_of_turn += bool(waiting) or self._next not in (None, key)
            self._drop(lambda entry: found is None or entry in waiting[: waiting.index(found)])
        if found is None:
            self._next = key
            found = self._enter()
        self._current = found
        return found

    def _come_to_rest(self, limit: float) -> None:
        """Where ranks copy together, waits until all has come that may come ahead: then they drop the same chunks.

        Args:
            limit: Seconds. After that another rank has failed, which is told elsewhere; nothing is copied any more.
        """
        until = perf_counter() + limit
        while self._together and self._thread is not None and self._problem is None and not self._closed:
            if not self._busy and self._pending() is None:
                return
            if not self._changed.wait(max(0.0, until - perf_counter())):
                self._problem = RuntimeError(f"other ranks did not copy the same weights within {limit:g} s")

    def _drop(self, which: Callable[[Entry], bool]) -> None:
        for entry in self._entries:
            if not entry.over and which(entry):
                entry.over, entry.left = True, deque()

    def _enter(self) -> Entry:
        """Gives the next block its place."""
        streamed = self._blocks[self._next]
        placement = place(streamed.sizes, self._head, self._ring.numel())
        chunks = [chunk for run in placement.runs for chunk in run.chunks(self._transfers.chunk)]
        entry = Entry(self._next, streamed.home, placement, deque(chunks), len(chunks))
        self._entries.append(entry)
        self._head, self._next = placement.stop, streamed.following
        return entry

    # -- the thread ------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            if self._ring.device.type == "cuda":
                torch.cuda.synchronize(self._ring.device)  # what had the buffer's memory before is done with it
            self._thread = threading.Thread(
                target=work, args=(weakref.ref(self), self._changed), name="patchpipe weights", daemon=True
            )
            self._thread.start()

    def _task(self) -> Entry | tuple[Entry, Run] | None:
        """What to do next: free the oldest block's place, or copy a chunk."""
        found = self._pending()
        self._busy = found is not None
        self._changed.notify_all()
        return found

    def _do(self, task: Entry | tuple[Entry, Run]) -> None:
        if isinstance(task, Entry):
            self._copier.finish(task.mark)
            with self._changed:
                self._entries.popleft()
        else:
            self._copy(*task)

    def _fail(self, problem: Exception) -> None:
        with self._changed:
            self._problem = problem
            self._changed.notify_all()

    @property
    def _over(self) -> bool:
        return self._closed or self._problem is not None

    def _pending(self) -> Entry | tuple[Entry, Run] | None:
        """What there is to do at this moment."""
        while self._entries and self._entries[0].over:
            if self._entries[0].mark is None:
                self._entries.popleft()
                continue
            if self._short():
                return self._entries[0]
            break
        return self._next_chunk()

    def _short(self) -> bool:
        """Whether the chunk that comes next has no place."""
        entry = self._loading()
        if entry is None:
            return False
        return entry.left[0].stop - self._entries[0].placement.start > self._ring.numel()

    def _loading(self) -> Entry | None:
        """The oldest block with chunks to come, or else the one after all."""
        entry = next((entry for entry in self._entries if entry.left), None)
        if entry is None and self._next is not None and self._ahead() < self._transfers.depth:
            entry = self._enter()
        return entry

    def _next_chunk(self) -> tuple[Entry, Run] | None:
        entry = self._loading()
        if entry is None or self._short() or (entry is not self._current and self._ahead() >= self._transfers.depth):
            return None
        return entry, entry.left[0]

    def _ahead(self) -> int:
        """Chunks in the buffer of blocks that were not called for yet."""
        waiting = [entry for entry in self._entries if not entry.over and entry is not self._current]
        return sum(entry.chunks - len(entry.left) for entry in waiting)

    def _copy(self, entry: Entry, run: Run) -> None:
        own, asked = self._copier.own(run.size), perf_counter()
        piece = entry.home.piece(run.source + own.start, own.stop - own.start)
        self._copier.read(perf_counter() - asked)
        self._read_ahead(entry, run)
        self._yield(entry.key)
        with self._changed:
            if entry.over:
                return
        began = perf_counter()
        start = run.start % self._ring.numel()
        mark = self._copier.copy(self._ring[start : start + run.size], piece)
        with self._changed:
            if self._problem is not None:
                return
            self._note(run, piece.numel())
            if entry.left and entry.left[0] is run:
                entry.arrived = mark
                entry.left.popleft()
            self._changed.notify_all()
        self._copier.finish(mark)
        if self.watch is not None:
            self.watch("chunk", entry.key, began, perf_counter())

    def _read_ahead(self, entry: Entry, run: Run) -> None:
        """Has the disk read what comes after this chunk."""
        following = [each for each in entry.left if each is not run][:READ_AHEAD]
        for each in following:
            entry.home.ahead(each.source, each.size)

    def _yield(self, key: Key) -> None:
        """Lets an exchange that is on its way go first; asked again for every chunk."""
        if self._gate is None or not self._gate.closed:
            return
        began = perf_counter()
        waited = self._gate.wait()
        with self._changed:
            self.stats.gated += 1
            self.stats.gated_seconds += waited
        if self.watch is not None:
            self.watch("gate", key, began, perf_counter())

    def _note(self, run: Run, copied: int) -> None:
        self.stats.bytes += copied
        self.stats.gathered += run.size - copied
        self.stats.chunks += 1
        used = run.stop - self._entries[0].placement.start
        self.stats.peak = max(self.stats.peak, used)


def work(found: weakref.ref[Mover], changed: threading.Condition) -> None:
    """The thread. It holds its mover only while it copies: one that is dropped unclosed goes, with all its weights."""
    while True:
        with changed:
            mover = found()
            if mover is None or mover._over:
                return
            try:
                task = mover._task()
            except Exception as error:
                mover._fail(error)
                return
            if task is None:
                del mover
                changed.wait(IDLE_SECONDS)
                continue
        try:
            mover._do(task)
        except Exception as error:
            mover._fail(error)
