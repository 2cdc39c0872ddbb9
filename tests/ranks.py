"""Runs a function on several real processes that talk over gloo, as the ranks of one group."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from patchpipe import ParallelConfig
from patchpipe.mesh import Group, join

PRELOAD = ["torch", "diffusers", "transformers", "patchpipe.loading", "tests.tiny", "tests.ranks"]


@dataclass
class Place:
    """Where a test's rank stands."""

    rank: int
    world_size: int
    store: dist.Store | None

    def join(self, config: ParallelConfig) -> Group:
        """A group of all the ranks."""
        return join(config, rank=self.rank, world_size=self.world_size, store=self.store, device="cpu")


def run_ranks(world_size: int, target: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Calls ``target(place, *args)`` on every rank and returns what each returned.

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
            target=_rank_main, args=(theirs, rank, world_size, server.port, target, args)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
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
            except EOFError:
                results[rank] = (False, "the process died without a word")
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
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        pipe.send((True, target(Place(rank, world_size, store), *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
