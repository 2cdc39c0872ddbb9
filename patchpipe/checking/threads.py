"""Ranks as threads of this process: a model so small needs no others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from patchpipe.config import ParallelConfig
from patchpipe.distributed.joining import join
from patchpipe.distributed.mesh import Group
from patchpipe.errors import PatchpipeError

SECONDS_FOR_THE_OTHERS = 10  # once one has failed


def on_ranks(config: ParallelConfig, target: Callable[[Group, int], Any], seconds: float) -> list[Any]:
    """Calls ``target(group, rank)`` on every rank of a layout.

    Args:
        config: The layout.
        target: What each rank does.
        seconds: How long the whole may take.

    Returns:
        What each rank returned.

    Raises:
        Exception: What a rank raised, the first cause of several.
        TimeoutError: A rank was late.
    """
    ranks, store = config.world_size, dist.HashStore()
    results: dict[int, Any] = {}
    problems: dict[int, BaseException] = {}
    groups: list[Group] = []

    def run(rank: int) -> None:
        stay_on_a_core(os.getpid())
        torch.set_num_threads(1)
        try:
            met = store if ranks > 1 else None
            group = join(config, rank=rank, world_size=ranks, store=met, device="cpu")
            groups.append(group)
            results[rank] = target(group, rank)
        except BaseException as error:
            problems[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    wait_for(threads, problems, time.monotonic() + seconds, SECONDS_FOR_THE_OTHERS)
    at_once([group.close for group in groups], SECONDS_FOR_THE_OTHERS)
    if problems:
        raise min(problems.values(), key=lambda error: isinstance(error, PatchpipeError))
    if len(results) < ranks:
        raise TimeoutError(f"not all {ranks} ranks answered within {seconds:.0f} s")
    return [results[rank] for rank in range(ranks)]


def stay_on_a_core(number: int) -> None:
    """Keeps this thread, and those that it starts, to one of the cores that it may use.

    Threads of one interpreter compute in turn. On several cores each of torch's operations lets another thread in and
    then waits for it, which takes as long again as the operations of a tiny model. On one core the thread that is let
    in must not push out the one that lets it in, for the same reason: threads of a batch do not.

    Args:
        number: Which core; threads that compute in turn have one number.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
        with suppress(OSError):  # a sandbox may refuse it, which costs only time
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def wait_for(threads: Sequence[threading.Thread], problems: Sized, deadline: float, grace: float) -> None:
    """Waits until all threads have ended, or for a deadline, which comes sooner once one has failed.

    Args:
        threads: The ranks.
        problems: What has failed so far; they add to it.
        deadline: When to give up, by ``time.monotonic``.
        grace: Seconds the others have once one has failed.
    """
    shortened = False
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        next(thread for thread in threads if thread.is_alive()).join(0.02)
        if problems and not shortened:
            deadline, shortened = min(deadline, time.monotonic() + grace), True


def at_once(calls: Sequence[Callable[[], object]], seconds: float) -> None:
    """Ranks leave together, each in a thread: each waits for the next one's word, so many seconds at most."""
    threads = [threading.Thread(target=call, name="leaving", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
