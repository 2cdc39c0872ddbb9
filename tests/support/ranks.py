"""Runs a function on several real processes that talk over gloo, as the ranks of one group."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from patchpipe import ParallelConfig
from patchpipe.distributed.joining import join
from patchpipe.distributed.mesh import Group

PRELOAD = ["tests.support.prepared"]
PR_SET_PDEATHSIG = 1

# Bit-equality is promised at equal thread counts: the test's own process computes as its ranks do.
torch.set_num_threads(1)


@dataclass
class Place:
    """Where a test's rank stands."""

    rank: int
    world_size: int
    store: dist.Store | None
    joined: list[Group] = field(default_factory=list)

    def join(self, config: ParallelConfig) -> Group:
        """A group of all the ranks."""
        group = join(config, rank=self.rank, world_size=self.world_size, store=self.store, device="cpu")
        self.joined.append(group)
        return group

    def leave(self) -> None:
        """Closes them: the threads and sockets of a rank that is itself a thread would stay for good."""
        for group in self.joined:
            group.close()


def run_ranks(
    world_size: int,
    target: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    mortal: Collection[int] = (),
) -> list[Any]:
    """Calls ``target(place, *args)`` on every rank and returns what each returned.

    Args:
        world_size: Number of ranks.
        target: A function of a module, called in each rank's process.
        args: Its further arguments.
        timeout: Seconds the whole may take.
        mortal: Ranks that are meant to die; ``None`` stands for what they would have returned.

    Raises:
        AssertionError: A rank raised, died or was late; the text shows every rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank_main, args=(theirs, rank, world_size, server.port, target, args), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout, mortal)
    finally:
        for process in processes:
            process.kill()
            process.join()


def quieten() -> None:
    """Silences what diffusers and transformers tell about tiny models; errors still show."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own lock is a named semaphore, which a killed rank would leave behind


def _collect(pipes: list[Connection], deadline: float, mortal: Collection[int]) -> list[Any]:
    results: dict[int, tuple[bool, Any]] = {}
    failed_at: float | None = None
    while len(results) < len(pipes):
        limit = deadline if failed_at is None else min(deadline, failed_at + 5)
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(0.0, limit - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                results[rank] = pipe.recv()
            except (EOFError, ConnectionError):
                results[rank] = (rank in mortal, None if rank in mortal else "the process died without a word")
            if not results[rank][0]:
                failed_at = failed_at or time.monotonic()
    if len(results) == len(pipes) and all(fine for fine, _ in results.values()):
        return [results[rank][1] for rank in range(len(pipes))]
    texts = []
    for rank in range(len(pipes)):
        fine, value = results.get(rank, (False, "no answer before the deadline"))
        texts.append(f"--- rank {rank} ---\n{'finished' if fine else value}")
    raise AssertionError("\n".join(texts))


def _rank_main(
    pipe: Connection, rank: int, world_size: int, port: int, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _die_with_parent()
    torch.set_num_threads(1)  # the first call after a fork makes torch's threads: two threads at once would race for it
    gc.freeze()  # what was imported need not be gone through again
    warnings.simplefilter("ignore")
    quieten()
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        pipe.send((True, target(Place(rank, world_size, store), *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _die_with_parent() -> None:
    """A killed test leaves no ranks: the fork server goes with its owner, and its children with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
